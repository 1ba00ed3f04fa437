//! `injector check`: what this kernel offers.

use std::fmt::Write;

use clap::Args;
use serde_json::json;

use super::{
    exit::{Exit, Failure},
    output::{Output, Tone, toned},
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
            text(&results)
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

/// One line to each feature.
fn text(results: &[ProbeResult]) -> String {
    let mut text = String::new();
    let widest = results
        .iter()
        .map(|result| result.feature.len())
        .max()
        .unwrap_or(0);
    for result in results {
        let (tone, status) = match (result.status, result.needed) {
            (Status::Ok, _) => (Some(Tone::Good), "ok"),
            (Status::Missing, Needed::Required) => (Some(Tone::Bad), "missing"),
            (Status::Missing, Needed::Lanes | Needed::Lab) => (Some(Tone::Notice), "missing"),
            (Status::Missing, Needed::Optional) => (None, "missing"),
            (Status::Unknown, _) => (Some(Tone::Notice), "unknown"),
        };
        let padded = format!("{status:<7}");
        let shown = tone.map_or(padded.clone(), |tone| toned(tone, &padded));
        let needed = match result.needed {
            Needed::Required => " [needed]",
            Needed::Lanes => " [for delay, rate …]",
            Needed::Lab => " [for labs]",
            Needed::Optional => "",
        };
        // Writing to a String does not fail, here and below.
        let _ = write!(
            text,
            "{shown}  {:<widest$}  {}{needed}",
            result.feature, result.detail
        );
        if result.status != Status::Ok {
            for (name, part) in [("so", &result.consequence), ("remedy", &result.remedy)] {
                if !part.is_empty() {
                    let _ = write!(text, "; {name}: {part}");
                }
            }
        }
        text.push('\n');
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
    text + &verdict + "\n"
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
        let shown = text(&results);
        assert!(
            shown.contains("cannot work here: BPF is missing"),
            "{shown}"
        );
        assert_eq!(shown.lines().count(), 3);
    }
}
