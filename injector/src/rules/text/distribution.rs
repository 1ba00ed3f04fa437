//! Distributions of delay: a name, `table:…` with netem's numbers, `samples:…` with delays; and the files from
//! which the command line takes the latter two.

use std::path::Path;

use super::duration;
use crate::rules::{error::Problem, numbers::Numbers, shaping::Distribution};

/// One jitter in a table of netem (`NETEM_DIST_SCALE`, `include/uapi/linux/pkt_sched.h`).
pub const TABLE_SCALE: i64 = 8192;

const TABLE: &str = "table:";
const SAMPLES: &str = "samples:";
const FILE: &str = "file:";

const ACCEPTED_ENTRY: &str =
    "whole numbers from -32768 to 32767, of which 8192 stands for the jitter";
const ACCEPTED_SAMPLE: &str =
    "delays, each in milliseconds (12.5) or with a unit (12.5ms, 3us, 1s)";

/// Reads the text form.
pub fn parse(text: &str) -> Result<Distribution, Problem> {
    if let Some(list) = text.strip_prefix(TABLE) {
        let values = list.split(',').map(entry).collect::<Result<_, _>>()?;
        return table(values);
    }
    if let Some(list) = text.strip_prefix(SAMPLES) {
        let values = list.split(',').map(sample).collect::<Result<_, _>>()?;
        return samples(values);
    }
    if text.starts_with(FILE) {
        return Err(Problem::new(
            "names a file, and only the command line reads files",
            "give the numbers themselves, as table:… or samples:…",
        ));
    }
    Distribution::NAMED
        .into_iter()
        .find(|one| one.name() == text)
        .ok_or_else(|| {
            let names: Vec<&str> = Distribution::NAMED.iter().map(Distribution::name).collect();
            Problem::new(
                "is not a distribution",
                format!(
                    "one of {}, or file:PATH on the command line, or table:… or samples:… with the numbers",
                    names.join(", ")
                ),
            )
        })
}

/// Writes the text form.
#[must_use]
pub fn format(distribution: &Distribution) -> String {
    match distribution {
        Distribution::Table(numbers) => list(TABLE, numbers, |value| value.to_string()),
        Distribution::Samples(numbers) => list(SAMPLES, numbers, |value| {
            duration::format(std::time::Duration::from_nanos(value.unsigned_abs()))
        }),
        named => named.name().to_owned(),
    }
}

fn list(kind: &str, numbers: &Numbers, one: impl Fn(i64) -> String) -> String {
    let texts: Vec<String> = numbers.values().iter().map(|value| one(*value)).collect();
    format!("{kind}{}", texts.join(","))
}

/// The path in `file:PATH`.
#[must_use]
pub fn file(text: &str) -> Option<&str> {
    text.strip_prefix(FILE)
}

/// Reads a file. One named `*.dist` is a table as iproute2 has them (`get_distribution`, `tc/q_netem.c`): numbers,
/// any amount to a line. Every other one has one sample a line. What follows a `#` is a comment.
pub fn read(path: &str, content: &str) -> Result<Distribution, Problem> {
    let is_table = Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "dist");
    let mut values = Vec::new();
    for (number, line) in (1_u64..).zip(content.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        let mut add = |text: &str, parse: fn(&str) -> Result<i64, Problem>| match parse(text) {
            Ok(value) => {
                values.push(value);
                Ok(())
            }
            Err(problem) => {
                let mut problem = problem;
                problem.problem = format!("line {number}: {}", problem.problem);
                Err(problem)
            }
        };
        if is_table {
            for text in line.split_whitespace() {
                add(text, entry)?;
            }
        } else if !line.is_empty() {
            add(line, sample)?;
        }
    }
    if is_table {
        table(values)
    } else {
        samples(values)
    }
}

fn table(values: Vec<i64>) -> Result<Distribution, Problem> {
    Numbers::new(values)
        .map(Distribution::Table)
        .ok_or_else(|| Problem::new("holds no number", ACCEPTED_ENTRY))
}

fn samples(values: Vec<i64>) -> Result<Distribution, Problem> {
    Numbers::new(values)
        .map(Distribution::Samples)
        .ok_or_else(|| Problem::new("holds no sample", ACCEPTED_SAMPLE))
}

/// One number of a table.
fn entry(text: &str) -> Result<i64, Problem> {
    text.trim().parse::<i16>().map(i64::from).map_err(|_| {
        Problem::new(
            format!("'{}' is no number of a table", shown(text)),
            format!("{ACCEPTED_ENTRY} (a file of delays has a name without .dist)"),
        )
    })
}

/// One sample, in nanoseconds.
fn sample(text: &str) -> Result<i64, Problem> {
    let text = text.trim();
    let bare = text.ends_with(|end: char| end.is_ascii_digit());
    let read = if bare {
        duration::parse(&format!("{text}ms"))
    } else {
        duration::parse(text)
    };
    read.ok()
        .and_then(|delay| i64::try_from(delay.as_nanos()).ok())
        .ok_or_else(|| {
            Problem::new(
                format!("'{}' is no delay", shown(text)),
                format!("{ACCEPTED_SAMPLE} (a file of netem's has a name that ends in .dist)"),
            )
        })
}

/// The beginning of a text, for a message.
fn shown(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_go_there_and_back() {
        for text in [
            "uniform",
            "lognormal",
            "table:-32768,0,32767",
            "samples:0s,12ms500us,1s",
        ] {
            assert_eq!(format(&parse(text).unwrap()), text);
        }
        assert_eq!(
            parse("samples:1s, 12.5,3us").unwrap(),
            parse("samples:3us,12ms500us,1s").unwrap()
        );
    }

    #[test]
    fn files_of_both_kinds() {
        // As maketable of iproute2 writes them.
        let dist = "# This is the distribution table for the experimental distribution.\n\
                    -8192 -4096\t0 4096\n\n  8192 # the end\n";
        assert_eq!(
            read("a/b.dist", dist).unwrap(),
            parse("table:-8192,-4096,0,4096,8192").unwrap()
        );
        assert_eq!(
            read(
                "rtt.txt",
                "# ms\n0.25\n12.5 # twice the usual\n\n3us\r\n1.5s\n"
            )
            .unwrap(),
            parse("samples:3us,250us,12ms500us,1s500ms").unwrap()
        );
        let numbers: Vec<String> = (0..20_000).map(|number: u32| number.to_string()).collect();
        let large = numbers.join("\n");
        let Distribution::Samples(numbers) = read("large", &large).unwrap() else {
            panic!("samples");
        };
        assert_eq!(numbers.greatest(), 19_999_000_000);
    }

    #[test]
    fn wrong_lines_are_told_by_their_number() {
        for (path, content, fragment) in [
            ("a.dist", "# c\n1 2\n3 x\n", "line 3: 'x' is no number"),
            ("a.dist", "1\n40000\n", "line 2: '40000' is no number"),
            ("a.dist", "1.5\n", "line 1: '1.5' is no number"),
            ("a.dist", "# nothing\n", "holds no number"),
            ("a.txt", "1\n\n-2\n", "line 3: '-2' is no delay"),
            ("a.txt", "1 2\n", "line 1: '1 2' is no delay"),
            (
                "a.txt",
                "1ms\n2 parsecs\n",
                "line 2: '2 parsecs' is no delay",
            ),
            ("a.txt", "nan\n", "line 1: 'nan' is no delay"),
            ("a.txt", "", "holds no sample"),
        ] {
            let problem = read(path, content).unwrap_err();
            assert!(problem.problem.contains(fragment), "{content:?}: {problem}");
            assert!(!problem.help.is_empty());
        }
        for bad in [
            "table:",
            "samples:",
            "table:1,,2",
            "file:/etc/passwd",
            "cauchy",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
