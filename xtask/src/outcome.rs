//! What test programs report, and what a whole run comes to.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;

/// What one test program, or one tier, comes to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed.
    pub(crate) failed: u64,
    /// What failed, by name.
    pub(crate) failures: Vec<String>,
    /// What was skipped, and why.
    pub(crate) skips: Vec<Skip>,
    /// What passed only at the second attempt.
    pub(crate) retried: Vec<String>,
}

/// A test that did not run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Skip {
    /// The test.
    pub(crate) test: String,
    /// Why it did not run.
    pub(crate) reason: String,
    /// Whether this machine truly cannot run it. Other skips fail CI.
    pub(crate) excusable: bool,
}

impl Skip {
    /// A test that was skipped without having written down why.
    fn unexplained(test: String, reason: String) -> Self {
        let reason = if reason.is_empty() {
            "no reason given".to_owned()
        } else {
            reason
        };
        Self {
            test,
            reason,
            excusable: false,
        }
    }
}

impl Outcome {
    /// How many tests were skipped.
    fn skip_count(&self) -> u64 {
        self.skips.len().try_into().unwrap_or(u64::MAX)
    }

    /// Something of this name that failed and is no test program's test.
    pub(crate) fn failure(name: impl Into<String>) -> Self {
        Self {
            failed: 1,
            failures: vec![name.into()],
            ..Self::default()
        }
    }

    /// Something of this name that was skipped.
    pub(crate) fn skip(
        test: impl Into<String>,
        reason: impl Into<String>,
        excusable: bool,
    ) -> Self {
        let skip = Skip {
            test: test.into(),
            reason: reason.into(),
            excusable,
        };
        Self {
            skips: vec![skip],
            ..Self::default()
        }
    }

    /// One thing that passed.
    pub(crate) fn success() -> Self {
        Self {
            passed: 1,
            ..Self::default()
        }
    }

    /// Whether there was nothing to run.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed == 0 && self.failed == 0 && self.skips.is_empty()
    }

    /// Adds another outcome to this one.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend(other.failures);
        self.skips.extend(other.skips);
        self.retried.extend(other.retried);
    }

    /// A test that had failed has passed at another attempt.
    pub(crate) fn passes_after_all(&mut self, program: &str, name: &str) {
        let name = format!("{program}: {name}");
        if let Some(index) = self.failures.iter().position(|failure| *failure == name) {
            self.failures.remove(index);
            self.failed -= 1;
            self.passed += 1;
            self.retried.push(name);
        }
    }

    /// Whether the run as a whole has failed. In CI a skip that could have been avoided fails too.
    pub(crate) fn has_failed(&self, ci: bool) -> bool {
        self.failed > 0 || (ci && self.skips.iter().any(|skip| !skip.excusable))
    }
}

impl fmt::Display for Outcome {
    /// The closing line of a run.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed,
            self.skips.len()
        )
    }
}

/// The time of a tier, as shown in the table.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// Reads the output of one test program while it runs: libtest's and libtest-mimic's line format.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    outcome: Outcome,
    ignored: BTreeMap<String, String>,
    ignored_count: u64,
    finished: bool,
}

/// Counts of a line `test result: …`.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Reader {
    /// Takes one line of output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(counts) = result_line(line) {
            // One program may print several, as `cargo test --doc` does for several crates.
            self.finished = true;
            self.outcome.passed += counts.passed;
            self.outcome.failed += counts.failed;
            self.ignored_count += counts.ignored;
        } else if let Some((before, _)) = line.split_once(": failed after ") {
            // What a test prints while it runs breaks the line that names it; this says its name, wherever it stands.
            self.failed(before.split_whitespace().next_back().unwrap_or(before));
        } else if let Some((name, verdict)) = test_line(line) {
            if verdict == "FAILED" {
                self.failed(name);
            } else if let Some(rest) = verdict.strip_prefix("ignored") {
                self.ignored
                    .insert(name.to_owned(), reason_of(rest).to_owned());
            }
        }
    }

    fn failed(&mut self, name: &str) {
        if !self.failures().iter().any(|known| known == name) {
            self.outcome.failures.push(name.to_owned());
        }
    }

    /// Names of the tests that have failed so far.
    pub(crate) fn failures(&self) -> &[String] {
        &self.outcome.failures
    }

    /// The outcome, once the program has ended. `skips` are those that it has written down itself;
    /// an ignored test that is not among them counts as one that should have run.
    pub(crate) fn finish(self, program: &str, success: bool, skips: Vec<Skip>) -> Outcome {
        let Self {
            mut outcome,
            ignored,
            ignored_count,
            finished,
        } = self;
        outcome.failures = outcome
            .failures
            .iter()
            .map(|name| format!("{program}: {name}"))
            .collect();
        let mut unseen = skips;
        for (name, reason) in ignored {
            let skip = match unseen.iter().position(|skip| skip.test == name) {
                Some(index) => unseen.swap_remove(index),
                None => Skip::unexplained(name, reason),
            };
            outcome.skips.push(skip);
        }
        // A test that prints while it runs breaks the line that names it.
        while outcome.skip_count() < ignored_count {
            let skip = unseen.pop().unwrap_or_else(|| {
                Skip::unexplained(
                    format!("ignored test {}", outcome.skips.len() + 1),
                    String::new(),
                )
            });
            outcome.skips.push(skip);
        }
        for skip in &mut outcome.skips {
            skip.test = format!("{program}: {}", skip.test);
        }
        let unnamed = outcome
            .failed
            .saturating_sub(outcome.failures.len().try_into().unwrap_or(u64::MAX));
        if unnamed > 0 {
            outcome
                .failures
                .push(format!("{program}: {unnamed} more, named in its output"));
        }
        if !finished {
            outcome.add(Outcome::failure(format!(
                "{program}: ended without a result line"
            )));
        } else if !success && outcome.failed == 0 {
            outcome.add(Outcome::failure(format!(
                "{program}: exit status other than 0 although no test failed"
            )));
        }
        outcome
    }
}

/// `test NAME ... VERDICT` or `test [KIND] NAME ... VERDICT`.
fn test_line(line: &str) -> Option<(&str, &str)> {
    let (name, verdict) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let name = match name.strip_prefix('[') {
        Some(rest) => rest.split_once("] ")?.1,
        None => name,
    };
    Some((name.trim(), verdict.trim()))
}

/// The reason behind `ignored`: libtest writes `ignored, REASON`, libtest-mimic `ignored (REASON)`.
fn reason_of(rest: &str) -> &str {
    let rest = rest.trim_start_matches([',', ' ']);
    rest.strip_prefix('(')
        .and_then(|inner| inner.strip_suffix(')'))
        .unwrap_or(rest)
}

/// `test result: ok. 5 passed; 0 failed; 1 ignored; …`.
fn result_line(line: &str) -> Option<Counts> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what: &str| {
        counts
            .split(';')
            .find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
    };
    Some(Counts {
        passed: count("passed")?,
        failed: count("failed")?,
        ignored: count("ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, success: bool, skips: Vec<Skip>) -> Outcome {
        let mut reader = Reader::default();
        text.lines().for_each(|line| reader.line(line));
        reader.finish("lab", success, skips)
    }

    #[test]
    fn a_result_line_is_read() {
        let line = "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 1 filtered out; finished in 0.31s";
        assert_eq!(
            result_line(line),
            Some(Counts {
                passed: 12,
                failed: 0,
                ignored: 3
            })
        );
        let line = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 2s";
        assert_eq!(
            result_line(line),
            Some(Counts {
                passed: 1,
                failed: 2,
                ignored: 0
            })
        );
        assert_eq!(result_line("test result: unknown"), None);
        assert_eq!(result_line("running 3 tests"), None);
    }

    #[test]
    fn failures_are_named_whatever_they_print_first() {
        for output in [
            "test a::b ...     a::b: failed after 2.0 s: why\nFAILED\n",
            "test a::b ...     a::b: something\n    a::b: failed after 2.0 s: why\nFAILED\n",
        ] {
            let outcome = read(
                &format!(
                    "{output}test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured\n"
                ),
                false,
                Vec::new(),
            );
            assert_eq!(outcome.failures, ["lab: a::b"], "{output}");
        }
    }

    #[test]
    fn failures_are_named() {
        let outcome = read(
            "test a::b ... ok\ntest c ... FAILED\ntest result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured\n",
            false,
            Vec::new(),
        );
        assert_eq!(outcome.failures, ["lab: c"]);
        assert_eq!((outcome.passed, outcome.failed), (1, 1));
        assert!(outcome.has_failed(false));
        assert_eq!(outcome.to_string(), "1 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn a_program_that_dies_has_failed() {
        let outcome = read("test a ... ok\n", false, Vec::new());
        assert_eq!(outcome.failed, 1);
        assert!(
            outcome.failures[0].contains("without a result line"),
            "{:?}",
            outcome.failures
        );
    }

    #[test]
    fn an_exit_status_is_not_overlooked() {
        let outcome = read(
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured\n",
            false,
            Vec::new(),
        );
        assert_eq!((outcome.passed, outcome.failed), (1, 1));
    }

    #[test]
    fn several_result_lines_add_up() {
        let line = "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n";
        assert_eq!(read(&line.repeat(2), true, Vec::new()).passed, 4);
    }

    #[test]
    fn only_excused_skips_pass_in_ci() {
        let text = "test a ... ignored, no 8021q\ntest b ... ignored\ntest result: ok. 0 passed; 0 failed; 2 ignored; 0 measured\n";
        let skip = Skip {
            test: "a".into(),
            reason: "no 8021q".into(),
            excusable: true,
        };
        let outcome = read(text, true, vec![skip.clone()]);
        assert_eq!(outcome.to_string(), "0 passed, 0 failed, 2 skipped");
        assert!(outcome.has_failed(true) && !outcome.has_failed(false));

        let text =
            "test a ... ignored\ntest result: ok. 0 passed; 0 failed; 1 ignored; 0 measured\n";
        let outcome = read(text, true, vec![skip]);
        assert_eq!(outcome.skips[0].reason, "no 8021q");
        assert!(!outcome.has_failed(true));
    }

    #[test]
    fn reasons_of_both_formats_are_read() {
        assert_eq!(reason_of(", needs a VM"), "needs a VM");
        assert_eq!(reason_of(" (no 8021q (module))"), "no 8021q (module)");
        assert_eq!(reason_of(""), "");
        assert_eq!(
            test_line("test [lab] etcd::isolate   ... ignored (x ... y)"),
            Some(("etcd::isolate", "ignored (x ... y)"))
        );
    }

    #[test]
    fn a_broken_line_finds_its_reason_by_count() {
        let skip = Skip {
            test: "a".into(),
            reason: "no IPv6".into(),
            excusable: true,
        };
        let text = "test a ... chatter\nignored\ntest result: ok. 0 passed; 0 failed; 1 ignored; 0 measured\n";
        let outcome = read(text, true, vec![skip]);
        assert_eq!(outcome.skips[0].test, "lab: a");
        assert!(!outcome.has_failed(true));
    }

    #[test]
    fn ignored_tests_that_print_no_line_are_counted() {
        let text = "test result: ok. 0 passed; 0 failed; 2 ignored; 0 measured\n";
        let outcome = read(text, true, Vec::new());
        assert_eq!(outcome.skips.len(), 2);
        assert!(outcome.has_failed(true));
    }

    #[test]
    fn the_skips_file_has_the_agreed_form() {
        let text = r#"[{"test":"a","reason":"no IPv6","excusable":true}]"#;
        let skips: Vec<Skip> = serde_json::from_str(text).unwrap();
        assert!(skips[0].excusable);
        assert!(serde_json::from_str::<Vec<Skip>>(r#"[{"test":"a"}]"#).is_err());
    }
}
