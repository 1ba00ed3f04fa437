//! Rules, counters and healing in words: what several commands print.

use std::fmt::Write;

use super::output::{self, Tone, bytes, percent, toned};
use crate::{
    protocol::{
        AddResult, FlushStatus, ProtectedEntry, RuleCounters, RuleState, RuleStats, RuleStatus,
        TargetRef,
    },
    rules::RuleSpec,
    words::{count, grouped, realised},
};

/// A state with its tone.
#[must_use]
pub(super) fn state(state: RuleState) -> String {
    let tone = match state {
        RuleState::Active => Tone::Good,
        RuleState::Expired => Tone::Notice,
        RuleState::Gone => Tone::Bad,
    };
    toned(tone, &state.to_string())
}

/// `eth0`, or `n1/eth0` in a namespace.
#[must_use]
pub(super) fn interface(netns: Option<&String>, iface: &str) -> String {
    match netns {
        Some(netns) => format!("{netns}/{iface}"),
        None => iface.to_owned(),
    }
}

/// Targets, those with a problem marked: `eth0, n1/eth0, sw/{p1,p2,p3}`.
#[must_use]
pub(super) fn targets(targets: &[TargetRef], should_be_attached: bool) -> String {
    if targets.is_empty() {
        return "-".to_owned();
    }
    targets
        .chunk_by(|one, next| one.netns == next.netns)
        .map(|together| {
            let names: Vec<String> = together
                .iter()
                .map(|target| marked(target, should_be_attached))
                .collect();
            match (&together[0].netns, names.as_slice()) {
                (None, _) => names.join(", "),
                (netns, [name]) => interface(netns.as_ref(), name),
                (Some(netns), _) => format!("{netns}/{{{}}}", names.join(",")),
            }
        })
        .collect::<Vec<_>>()
        .join(", ")
}

/// An interface, and what is wrong with it.
fn marked(target: &TargetRef, should_be_attached: bool) -> String {
    let name = &target.iface;
    match &target.problem {
        Some(problem) => format!("{name} ({})", toned(Tone::Bad, problem)),
        None if should_be_attached && !target.attached => {
            format!("{name} ({})", toned(Tone::Bad, "not attached"))
        }
        None => name.clone(),
    }
}

/// The fault of a text form in words.
#[must_use]
pub(super) fn fault(spec: &RuleSpec) -> String {
    spec.parse()
        .map_or_else(|error| error.to_string(), |rule| rule.describe_faults())
}

/// Which packets a text form is for, in words.
#[must_use]
pub(super) fn selector(spec: &RuleSpec) -> String {
    spec.parse()
        .map_or_else(|error| error.to_string(), |rule| rule.selector.describe())
}

/// The name in a text form that the daemon gave.
#[must_use]
pub(super) fn name(spec: &RuleSpec) -> &str {
    spec.name.as_deref().unwrap_or("(unnamed)")
}

/// How a rule acts in time, in words; empty for a rule that simply holds.
#[must_use]
pub(super) fn timing(spec: &RuleSpec) -> String {
    let mut parts = Vec::new();
    if let Some(lifetime) = &spec.lifetime {
        parts.push(format!("for {lifetime}"));
    }
    if let Some(flap) = &spec.flap {
        parts.push(format!("flapping {flap}"));
    }
    parts.join(", ")
}

/// One line about a rule as it is, or, in a dry run, as it would be.
#[must_use]
pub(super) fn rule(rule: &RuleStatus, dry_run: bool) -> String {
    let spec = &rule.spec;
    let mut text = format!(
        "{}: {}, {}, on {}",
        toned(Tone::Head, name(spec)),
        fault(spec),
        selector(spec),
        targets(&rule.targets, !dry_run)
    );
    let timing = timing(spec);
    if !timing.is_empty() {
        let _ = write!(text, ", {timing}");
    }
    if let Some(seed) = spec.seed {
        let _ = write!(text, " (seed {seed})");
    }
    text
}

/// What `add`, `apply` and `partition` say. `more`: also what is left alone.
#[must_use]
pub(super) fn added(result: &AddResult, dry_run: bool) -> String {
    /// So many rules are described one by one.
    const SHOWN: usize = 20;
    let verb = if dry_run { "would add" } else { "added" };
    let mut text = String::new();
    for status in result.rules.iter().take(SHOWN) {
        let unchanged = result
            .unchanged
            .iter()
            .any(|unchanged| unchanged == name(&status.spec));
        let verb = if unchanged { "unchanged" } else { verb };
        let _ = writeln!(text, "{verb} {}", rule(status, dry_run));
    }
    if result.rules.len() > SHOWN {
        let _ = writeln!(
            text,
            "… and {} more",
            count(widen(result.rules.len() - SHOWN), "rule")
        );
    }
    if !result.healed.is_empty() {
        let verb = if dry_run { "would heal" } else { "healed" };
        let _ = writeln!(text, "{verb} {}", result.healed.join(", "));
    }
    text.push_str(&protected(&result.protected));
    if !dry_run && result.rules.len() > result.unchanged.len() {
        let _ = writeln!(text, "in effect after {}", effect(result.effect_ns));
    }
    text
}

/// What rules leave alone, and why.
#[must_use]
pub(super) fn protected(entries: &[ProtectedEntry]) -> String {
    entries.iter().fold(String::new(), |mut text, entry| {
        let _ = writeln!(text, "left alone: {} ({})", entry.what, entry.why);
        text
    })
}

/// Nanoseconds as milliseconds.
#[must_use]
pub(super) fn effect(nanos: u64) -> String {
    format!("{}.{:03} ms", nanos / 1_000_000, nanos / 1000 % 1000)
}

/// Both directions together.
#[must_use]
pub(super) fn total(stats: &RuleStats) -> RuleCounters {
    let mut total = stats.egress;
    total += stats.ingress;
    total
}

/// `12 of 120 packets (10.0%, 1.2 kB)`.
#[must_use]
pub(super) fn cut(counters: &RuleCounters) -> String {
    format!(
        "{} of {} ({}, {})",
        counters.cut_packets,
        count(counters.matched_packets, "matching packet"),
        percent(counters.cut_packets, counters.matched_packets),
        bytes(counters.cut_bytes)
    )
}

/// What a full queue took and what was marked: `queue: lost 12 of 412 wire packets (2.91%), marked 30`. `None` where
/// nothing was.
#[must_use]
pub(super) fn queue(counters: &RuleCounters) -> Option<String> {
    let RuleCounters {
        queued_packets,
        overflow_packets,
        marked_packets,
        ..
    } = *counters;
    if overflow_packets == 0 && marked_packets == 0 {
        return None;
    }
    let all = queued_packets + overflow_packets;
    Some(format!(
        "queue: lost {} of {} ({}), marked {}",
        grouped(overflow_packets),
        count(all, "wire packet"),
        percent(overflow_packets, all),
        grouped(marked_packets)
    ))
}

/// Whether how much a rule has cut is of interest: it has, or it was asked to, having no other fault.
#[must_use]
pub(super) fn cuts(stats: &RuleStats) -> bool {
    let total = total(stats);
    total.cut_packets > 0 || stats.realised.is_empty() && total.too_long_packets == 0
}

/// One line about what a rule did, said when it ends.
#[must_use]
pub(super) fn deeds(stats: &RuleStats) -> String {
    let total = total(stats);
    if total.matched_packets == 0 && total.off_packets == 0 && total.lapsed_packets == 0 {
        return format!(
            "{}: {}: matched no packet",
            toned(Tone::Head, &stats.name),
            stats.fault
        );
    }
    let did = if cuts(stats) {
        format!("cut {}", cut(&total))
    } else {
        format!(
            "matched {} ({})",
            count(total.matched_packets, "packet"),
            bytes(total.matched_bytes)
        )
    };
    let mut text = format!(
        "{}: {}: {did} in {}",
        toned(Tone::Head, &stats.name),
        stats.fault,
        count(total.flows, "flow")
    );
    for one in &stats.realised {
        let _ = write!(text, "; {}", realised(one));
    }
    if let Some(queue) = queue(&total) {
        let _ = write!(text, "; {queue}");
    }
    for (number, what) in [
        (total.answered_packets, "answers sent"),
        (total.too_long_packets, "lost because they were too long"),
        (
            total.excess_packets,
            "excess: cut along with others of their super-packet",
        ),
        (total.off_packets, "passed while the rule flapped to off"),
        (total.lapsed_packets, "passed because the lease had lapsed"),
        (
            total.stateless_packets,
            "decided without a flow's state, its table was full",
        ),
    ] {
        if number > 0 {
            let _ = write!(text, "; {number} {what}");
        }
    }
    text
}

/// What `heal` and `down` say.
#[must_use]
pub(super) fn healed(healed: &[RuleStats], host_restored: bool, problems: &[String]) -> String {
    let mut text = String::new();
    for stats in healed {
        let _ = writeln!(text, "healed {}", deeds(stats));
    }
    if healed.is_empty() {
        text.push_str("there was no rule to heal\n");
    }
    if host_restored {
        text.push_str("nothing of the injector is left on the host's interfaces\n");
    }
    for problem in problems {
        let _ = writeln!(text, "{} {problem}", toned(Tone::Bad, "not undone:"));
    }
    text
}

/// What is being dropped of what healed rules held, a line each.
pub(super) fn flushes(flushes: &[FlushStatus]) -> String {
    let mut text = String::new();
    for flush in flushes {
        let _ = writeln!(
            text,
            "dropping what rule {} held, for {:.1} s at most; {} packets so far",
            flush.rule,
            flush.remaining,
            flush.egress_packets + flush.ingress_packets
        );
    }
    text
}

/// Prints the warnings of a change to standard error.
pub(super) fn warnings(warnings: &[String]) {
    for warning in warnings {
        output::warn(warning);
    }
}

/// A length of a list as a count.
#[must_use]
pub(super) fn widen(length: usize) -> u64 {
    length as u64
}

#[cfg(test)]
mod tests {
    use super::{super::output::bare, *};

    #[test]
    fn what_is_flushed_is_told_by_rule() {
        let flush = FlushStatus {
            rule: "slow".into(),
            egress_packets: 5,
            ingress_packets: 2,
            remaining: 1.25,
        };
        assert_eq!(
            flushes(&[flush]),
            "dropping what rule slow held, for 1.2 s at most; 7 packets so far\n"
        );
        assert!(flushes(&[]).is_empty());
    }

    fn stats(counters: &RuleCounters) -> RuleStats {
        RuleStats {
            name: "web".into(),
            group: None,
            state: RuleState::Active,
            fault: "cut".into(),
            asked: "all traffic".into(),
            egress: *counters,
            ingress: RuleCounters::default(),
            realised: Vec::new(),
        }
    }

    #[test]
    fn deeds_in_words() {
        assert_eq!(
            bare(&deeds(&stats(&RuleCounters::default()))),
            "web: cut: matched no packet"
        );
        let counters = RuleCounters {
            matched_packets: 120,
            matched_bytes: 12_000,
            cut_packets: 12,
            cut_bytes: 1200,
            flows: 1,
            lapsed_packets: 3,
            ..RuleCounters::default()
        };
        assert_eq!(
            bare(&deeds(&stats(&counters))),
            "web: cut: cut 12 of 120 matching packets (10.0%, 1.2 kB) in 1 flow; 3 passed because \
             the lease had lapsed"
        );
    }

    #[test]
    fn full_queues_in_words() {
        assert_eq!(queue(&RuleCounters::default()), None);
        let counters = RuleCounters {
            queued_packets: 1400,
            overflow_packets: 100,
            marked_packets: 7,
            ..RuleCounters::default()
        };
        assert_eq!(
            queue(&counters).unwrap(),
            "queue: lost 100 of 1,500 wire packets (6.6%), marked 7"
        );
    }

    #[test]
    fn effect_times() {
        assert_eq!(effect(1_234_567), "1.234 ms");
        assert_eq!(effect(12_000), "0.012 ms");
    }

    #[test]
    fn interfaces() {
        assert_eq!(interface(None, "eth0"), "eth0");
        assert_eq!(interface(Some(&"n1".to_owned()), "eth0"), "n1/eth0");
    }
}
