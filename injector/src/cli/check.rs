//! `injector check`: what this kernel offers.

use std::fmt::Write;

use clap::Args;
use serde_json::json;

use super::{
    exit::{Exit, Failure},
    output::{Output, Table, Tone, toned},
};
use crate::probe::{self, Needed, ProbeResult, Status};

/// Try out what this kernel offers, and say what follows
#[derive(Debug, Args)]
pub(super) struct CheckArgs {}

impl CheckArgs {
    /// Runs the command.
    pub(super) fn run(output: Output) -> Result<Exit, Failure> {
        let results = probe::probe();
        let usable = lacking(&results).is_none();
        output.either(&json!({ "usable": usable, "features": results }), || {
            text(output, &results)
        })?;
        Ok(match lacking(&results) {
            None => Exit::Success,
            Some(result) if result.feature.contains("privilege") => Exit::NotPermitted,
            Some(_) => Exit::Unsupported,
        })
    }
}

/// The first feature that is needed for everything and is not there.
fn lacking(results: &[ProbeResult]) -> Option<&ProbeResult> {
    results
        .iter()
        .find(|result| result.needed == Needed::Required && result.status == Status::Missing)
}

/// One row to each feature, in a pipe one line.
fn text(output: Output, results: &[ProbeResult]) -> String {
    let mut table = Table::new(&["STATUS", "FEATURE", "FOUND"]);
    for result in results {
        let status = match (result.status, result.needed) {
            (Status::Ok, _) => toned(Tone::Good, "ok"),
            (Status::Missing, Needed::Required) => toned(Tone::Bad, "missing"),
            (Status::Missing, Needed::Lanes | Needed::Lab) => toned(Tone::Notice, "missing"),
            (Status::Missing, Needed::Optional) => "missing".to_owned(),
            (Status::Unknown, _) => toned(Tone::Notice, "unknown"),
        };
        let needed = match result.needed {
            Needed::Required => " [needed]",
            Needed::Lanes => " [for delay, rate …]",
            Needed::Lab => " [for labs]",
            Needed::Optional => "",
        };
        let mut found = format!("{}{needed}", result.detail);
        if result.status != Status::Ok {
            for (name, part) in [("so", &result.consequence), ("remedy", &result.remedy)] {
                if !part.is_empty() {
                    // Writing to a String does not fail.
                    let _ = write!(found, "\n{name}: {part}");
                }
            }
        }
        table.row(vec![status, result.feature.to_owned(), found]);
    }
    let verdict = match lacking(results) {
        None => toned(Tone::Good, "the injector can work here"),
        Some(result) => toned(
            Tone::Bad,
            &format!(
                "the injector cannot work here: {} is missing",
                result.feature
            ),
        ),
    };
    output.table(&table) + &verdict + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(feature: &'static str, status: Status, needed: Needed) -> ProbeResult {
        ProbeResult {
            feature,
            status,
            needed,
            detail: "d".into(),
            consequence: String::new(),
            remedy: String::new(),
        }
    }

    #[test]
    fn only_what_everything_needs_makes_it_unusable() {
        let lanes = result("sch_fq", Status::Missing, Needed::Lanes);
        assert!(lacking(std::slice::from_ref(&lanes)).is_none());
        let results = [lanes, result("BPF", Status::Missing, Needed::Required)];
        assert_eq!(lacking(&results).unwrap().feature, "BPF");
        let shown = text(Output::plain(), &results);
        assert!(
            shown.contains("cannot work here: BPF is missing"),
            "{shown}"
        );
        assert_eq!(shown.lines().count(), 4);
    }
}
