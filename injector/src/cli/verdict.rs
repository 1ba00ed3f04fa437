//! The end of a run: its checks, its faults with what was asked beside what was realised, and the verdict.

use std::{fmt::Write as _, path::PathBuf};

use super::output::{Output, Table, Tone, toned};
use crate::{
    scenario::{
        file::Kind,
        record::{Record, Verdict},
        report::story::{CheckStory, Fault, Story},
    },
    words::{grouped, realised},
};

/// So many times that a check failed are told one by one; the report has all.
const OUTAGES: usize = 3;

/// The end of a run, and where its reports are.
#[must_use]
pub(super) fn text(output: Output, records: &[Record], files: &[PathBuf]) -> String {
    let story = Story::of(records);
    let mut text = String::new();
    if !story.checks.is_empty() {
        let _ = write!(text, "\n{}", output.table(&checks(&story.checks)));
    }
    if !story.faults.is_empty() {
        let _ = write!(text, "\n{}", output.table(&faults(&story.faults)));
    }
    for fault in &story.faults {
        for one in fault.ended.iter().flat_map(|ended| &ended.realised) {
            let _ = writeln!(text, "{}: {}", fault.step, realised(one));
        }
    }
    let tone = if story.ended.as_expected {
        Tone::Good
    } else {
        Tone::Bad
    };
    let expected = match (story.ended.verdict, story.ended.as_expected) {
        (Verdict::Failed, true) => ", as expected",
        (Verdict::Passed, false) => ", and was expected to fail",
        _ => "",
    };
    let verdict = format!("{}{expected}", story.ended.verdict);
    let _ = writeln!(text, "\n{}", toned(tone, &verdict));
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

fn checks(checks: &[CheckStory<'_>]) -> Table {
    let mut table = Table::new(&["CHECK", "KIND", "ASKED", "FAILED", "P50", "P99", "WHEN"]);
    for check in checks {
        let kind = match check.info.kind {
            Kind::Safety => "safety",
            Kind::Liveness => "liveness",
            Kind::Measure => "measure",
        };
        let failed = grouped(check.failed() as u64);
        let outages = check.outages();
        let mut when: Vec<String> = outages
            .iter()
            .take(OUTAGES)
            .map(|(from, to, _)| format!("{from:.1}-{to:.1}s"))
            .collect();
        if let Some(more @ 1..) = outages.len().checked_sub(OUTAGES) {
            when.push(format!("and {more} more"));
        }
        let milliseconds = |value: f64| format!("{value:.1}ms");
        let (median, late) = check
            .latency()
            .map_or_else(Default::default, |(median, late)| {
                (milliseconds(median), milliseconds(late))
            });
        table.row(vec![
            check.info.name.clone(),
            kind.to_owned(),
            grouped(check.answers.len() as u64),
            if check.failed() > 0 {
                toned(Tone::Bad, &failed)
            } else {
                failed
            },
            median,
            late,
            when.join(", "),
        ]);
    }
    table
}

fn faults(faults: &[Fault<'_>]) -> Table {
    let mut table = Table::new(&["FAULT", "WHAT", "FROM", "TO", "PACKETS"]);
    for fault in faults {
        table.row(vec![
            fault.step.to_owned(),
            fault.what.clone(),
            format!("{:.1}s", fault.from),
            format!("{:.1}s", fault.to),
            fault
                .ended
                .map_or_else(String::new, |ended| grouped(ended.matched_packets)),
        ]);
    }
    table
}
