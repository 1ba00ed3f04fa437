//! `injector show`: everything about one rule.

use std::fmt::Write;

use clap::Args;
use jiff::Timestamp;

use super::{
    exit::Failure,
    output::{Output, Tone, age, bytes, time, toned},
    report,
    session::{self, Session},
    stats,
};
use crate::{
    protocol::{Call, RuleCounters, ShowArgs as Request, ShowResult},
    words::{self, count},
};

/// Show everything about one rule
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Name of the rule
    name: String,
}

impl ShowArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<(), Failure> {
        let Some(mut connected) = session.connect()? else {
            session.recover()?;
            return Err(session::no_such_rule(&self.name));
        };
        let call = Call::Show(Request {
            name: self.name.clone(),
        });
        let result: ShowResult = connected.client.call(call)?;
        session
            .output
            .either(&result, || text(session.output, &result, Timestamp::now()))
    }
}

fn text(output: Output, result: &ShowResult, now: Timestamp) -> String {
    let ShowResult {
        rule,
        stats,
        targets,
        protected,
    } = result;
    let spec = &rule.spec;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(
                text,
                "{} {value}",
                toned(Tone::Head, &format!("{:<12}", format!("{name}:")))
            );
        }
    };
    line("name", report::name(spec));
    line("group", spec.group.as_deref().unwrap_or_default());
    let state = match &rule.state_reason {
        Some(reason) => format!("{} ({reason})", report::state(rule.state)),
        None => report::state(rule.state),
    };
    line("state", &state);
    line("targets", &report::targets(&rule.targets, true));
    line("fault", &report::fault(spec));
    line("packets", &report::selector(spec));
    line("timing", &report::timing(spec));
    line(
        "seed",
        &spec.seed.map(|seed| seed.to_string()).unwrap_or_default(),
    );
    line("flow key", spec.key.as_deref().unwrap_or("tuple"));
    line(
        "active",
        &format!(
            "since {:.0} ({})",
            rule.activated_at,
            age(Some(rule.activated_at), now)
        ),
    );
    if let Some(expires) = rule.expires_at {
        let remaining = rule
            .remaining
            .map_or_else(String::new, |s| format!(" ({} left)", time(s)));
        line("until", &format!("{expires:.0}{remaining}"));
    } else if rule.held {
        line("until", "its command has ended");
    }
    if rule.unprotected {
        line(
            "protected",
            "nothing: the rule acts on protected traffic too",
        );
    } else {
        for entry in protected {
            line("left alone", &format!("{} ({})", entry.what, entry.why));
        }
    }
    for (name, counters) in [("egress", &stats.egress), ("ingress", &stats.ingress)] {
        counters_lines(&mut text, name, counters, now);
    }
    for one in &stats.realised {
        let _ = writeln!(text, "{:12} {}", "", words::realised(one));
    }
    if let Some(queue) = report::queue(&report::total(stats)) {
        let _ = writeln!(text, "{:12} {queue}", "");
    }
    text.push_str(&stats::targets(output, targets));
    if spec.fault.rate_trace.is_some() {
        // A trace has thousands of lines.
        let _ = writeln!(
            text,
            "{} `injector show {} --json`, since it has a trace",
            toned(Tone::Head, "as text:    "),
            report::name(spec)
        );
    } else if let Ok(json) = serde_json::to_string(spec) {
        let _ = writeln!(text, "{} {json}", toned(Tone::Head, "as text:    "));
    }
    text
}

fn counters_lines(text: &mut String, direction: &str, counters: &RuleCounters, now: Timestamp) {
    let RuleCounters {
        matched_packets,
        off_packets,
        lapsed_packets,
        ..
    } = *counters;
    let head = toned(Tone::Head, &format!("{:<12}", format!("{direction}:")));
    if matched_packets == 0 && off_packets == 0 && lapsed_packets == 0 {
        let _ = writeln!(text, "{head} matched no packet");
        return;
    }
    let _ = writeln!(
        text,
        "{head} cut {} in {}, matched {}, first {}, last {}",
        report::cut(counters),
        count(counters.flows, "flow"),
        bytes(counters.matched_bytes),
        age(counters.first_at, now),
        age(counters.last_at, now),
    );
    for (number, what) in [
        (
            counters.excess_packets,
            "excess: cut along with others of their super-packet",
        ),
        (off_packets, "passed while the rule flapped to off"),
        (lapsed_packets, "passed because the lease had lapsed"),
        (
            counters.stateless_packets,
            "decided without a flow's state, its table was full",
        ),
    ] {
        if number > 0 {
            let _ = writeln!(text, "{:12} {number} {what}", "");
        }
    }
}
