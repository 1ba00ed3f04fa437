//! What the terminal shows at the end of a run.

use std::{fmt::Write as _, path::PathBuf};

use super::story::Story;
use crate::{
    realised::{Realised, Unit},
    scenario::{
        file::Kind,
        record::{Record, Verdict},
    },
};

/// The end of a run in a few lines: its checks, its faults, the verdict and the reports.
#[must_use]
pub fn text(_terminal: bool, records: &[Record], files: &[PathBuf]) -> String {
    let story = Story::of(records);
    let mut text = String::from("\n");
    for check in &story.checks {
        let kind = match check.info.kind {
            Kind::Safety => "safety",
            Kind::Liveness => "liveness",
            Kind::Measure => "measure",
        };
        let _ = write!(
            text,
            "check {} ({kind}): asked {} times, failed {}",
            check.info.name,
            check.answers.len(),
            check.failed()
        );
        if let Some((median, late)) = check.latency() {
            let _ = write!(text, "; p50 {median:.1} ms, p99 {late:.1} ms");
        }
        for (from, to, _) in check.outages().iter().take(3) {
            let _ = write!(text, "; from {from:.1} to {to:.1} s");
        }
        text.push('\n');
    }
    for fault in &story.faults {
        let _ = write!(
            text,
            "fault {} ({}): from {:.1} to {:.1} s",
            fault.step, fault.what, fault.from, fault.to
        );
        if let Some(ended) = fault.ended {
            let _ = write!(text, ", {} packets met", ended.matched_packets);
            for one in &ended.realised {
                let _ = write!(text, "; {}", realised(one));
            }
        }
        text.push('\n');
    }
    let expected = match (story.ended.verdict, story.ended.as_expected) {
        (Verdict::Failed, true) => ", as expected",
        (Verdict::Passed, false) => ", and was expected to fail",
        _ => "",
    };
    let _ = writeln!(text, "{}{expected}", story.ended.verdict);
    for reason in &story.ended.reasons {
        let _ = writeln!(text, "  {reason}");
    }
    if let Some(started) = story.started {
        let _ = writeln!(text, "again: {}", started.replay);
    }
    for file in files {
        let _ = writeln!(text, "{}", file.display());
    }
    text
}

/// Asked against realised, in words.
pub(super) fn realised(one: &Realised) -> String {
    let value = |value: f64| match one.unit {
        Unit::Share => format!("{:.3} %", value * 100.0),
        Unit::Seconds => format!("{:.1} ms", value * 1e3),
        Unit::BitsPerSecond => format!("{:.3} Mbit/s", value / 1e6),
    };
    let got = one.realised.map_or_else(|| "nothing".to_owned(), value);
    // Of a queue and a stall the longest is asked, and most packets wait less.
    let asked = match one.fault.as_str() {
        "queue" | "stall" => format!("up to {}", value(one.asked)),
        _ => value(one.asked),
    };
    let spread = one.spread.map_or_else(String::new, |spread| {
        format!(
            " (p50 {:.1}, p99 {:.1}, longest {:.1} ms)",
            spread.p50 * 1e3,
            spread.p99 * 1e3,
            spread.max * 1e3
        )
    });
    format!(
        "{} {asked} asked, {got} realised{spread} of {} packets",
        one.fault, one.packets
    )
}
