//! Reports of a run, each a pure function of its records: for CI systems (`JUnit` XML), and for people (one HTML file).
//! The one for the terminal is in `cli::verdict`.

mod html;
mod junit;
mod plots;
pub(crate) mod story;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

pub use self::{html::html, junit::junit};
use super::record::Record;

/// Writes the reports into a directory, and says what their files are.
pub fn write(records: &[Record], dir: &Path) -> io::Result<Vec<PathBuf>> {
    let files = [
        ("report.html", html(records).map_err(io::Error::other)?),
        ("junit.xml", junit(records).map_err(io::Error::other)?),
    ];
    files
        .into_iter()
        .map(|(name, text)| {
            let path = dir.join(name);
            fs::write(&path, text)?;
            Ok(path)
        })
        .collect()
}

/// Reads a log back: lines of JSON, of which the last one may be incomplete.
pub fn read_log(text: &str) -> Result<Vec<Record>, serde_json::Error> {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let mut records = Vec::with_capacity(lines.len());
    for (place, line) in lines.iter().enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            // The run was killed while it wrote it.
            Err(_) if place + 1 == lines.len() && !text.ends_with('\n') => {}
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What a service prints, or a file is called, is anybody's.
    const HOSTILE: &str =
        "</text></svg></title><script>alert(1)</script>\"' onload=x ]]> &amp; \u{1b}[31m\u{1}\u{0}";

    fn records() -> Vec<Record> {
        let at = |t: f64, mut event: Value| {
            event["t"] = json!(t);
            event["at"] = json!("2026-01-01T00:00:00Z");
            serde_json::from_value(event).unwrap()
        };
        let h = HOSTILE;
        vec![
            at(
                0.0,
                json!({
                    "event": "run_started", "scenario": h, "description": h, "file": h, "seed": 1, "replay": h,
                    "version": h, "kernel": h, "hosts": {h: "10.0.0.1"}, "selves": [h], "timeline": [h],
                    "expect": "passed", "checks": [
                        {"name": h, "kind": "safety", "what": h, "recovers_within": 1.0, "at_end": false}
                    ],
                }),
            ),
            at(0.1, json!({"event": "lab_made", "lab": h})),
            at(
                0.2,
                json!({"event": "service_ended", "service": h, "how": h, "asked": false}),
            ),
            at(0.3, json!({"event": "steady", "took": 0.1})),
            at(0.4, json!({"event": "step_started", "step": h, "what": h})),
            at(
                0.5,
                json!({
                    "event": "fault_started", "step": h, "what": h, "rules": [h], "effect_ns": 1,
                    "expect_effect": true,
                }),
            ),
            at(
                0.6,
                json!({"event": "paused", "step": format!("{h}2"), "what": h, "processes": 1}),
            ),
            at(
                0.7,
                json!({
                    "event": "checked", "check": h, "ok": false, "asked": 0.6, "latency_ms": 1.0, "detail": h,
                }),
            ),
            at(
                0.8,
                json!({"event": "resumed", "step": format!("{h}2"), "after": 0.2}),
            ),
            at(
                0.9,
                json!({"event": "fault_ended", "step": h, "rules": [], "matched_packets": 0}),
            ),
            at(
                1.0,
                json!({"event": "step_ended", "step": h, "failure": h, "detail": h}),
            ),
            at(1.1, json!({"event": "trouble", "text": h})),
            at(1.2, json!({"event": "note", "text": h})),
            at(
                1.3,
                json!({
                    "event": "run_ended", "verdict": "failed", "as_expected": false,
                    "reasons": [format!("check {h} failed")],
                }),
            ),
        ]
    }

    #[test]
    fn text_of_others_stays_text_in_the_page() {
        let page = html(&records()).unwrap();
        assert!(page.contains("&lt;script&gt;alert(1)"));
        for wrong in ["<script", "</text></svg></title>", "\"' onload=x"] {
            assert!(!page.contains(wrong), "{wrong}");
        }
    }

    #[test]
    fn text_of_others_stays_text_in_the_xml() {
        let xml = junit(&records()).unwrap();
        assert!(
            !xml.chars()
                .any(|letter| letter.is_control() && !letter.is_whitespace()),
            "XML 1.0 has no such characters (section 2.2): {xml:?}"
        );
        let report = quick_junit::Report::deserialize_from_str(&xml).unwrap();
        let suite = &report.test_suites[0];
        // The run, the check, the fault and the step.
        assert_eq!(suite.test_cases.len(), 4, "{xml}");
        assert!(
            suite
                .name
                .as_str()
                .starts_with("</text></svg></title><script>"),
            "{xml}"
        );
    }
}
