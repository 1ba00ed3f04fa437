//! The state of a host as text, to be compared before and after: links, qdiscs, filters, addresses,
//! routes, rules, sysctls, programs, bpffs and mounts.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, process::Command};

use anyhow::{Context, Result, bail};

use super::{PREFIX, command, netns::Netns};

/// A host's state: one text per kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    parts: BTreeMap<String, String>,
}

/// Sysctls that change by themselves.
const RESTLESS: [&str; 4] = [
    "nf_conntrack_count",
    "net.netfilter.nf_log",
    "neigh.default.gc_stale_time",
    "fs.",
];

impl Snapshot {
    /// Of a namespace.
    pub fn of(ns: &Netns) -> Result<Self> {
        let mut parts = asked(|program| ns.command(program))?;
        parts.insert("sysctls".to_owned(), ns.enter(sysctls)?);
        Ok(Self { parts })
    }

    /// Of the host's own namespace, with what is not per namespace: mounts and bpffs. Namespaces and
    /// programs of tests that run at the same time are left out.
    pub fn of_host() -> Result<Self> {
        let mut parts = asked(|program| Ok(Command::new(program)))?;
        parts.insert("sysctls".to_owned(), sysctls()?);
        let mounts = std::fs::read_to_string("/proc/self/mounts").context("reading mounts")?;
        let mounts = mounts
            .lines()
            .filter(|line| !line.contains(PREFIX) && !line.contains("/run/netns"))
            .collect::<Vec<_>>()
            .join("\n");
        parts.insert("mounts".to_owned(), mounts);
        let mut pins = Vec::new();
        list_below(Path::new("/sys/fs/bpf"), &mut pins)?;
        parts.insert("bpffs".to_owned(), pins.join("\n"));
        Ok(Self { parts })
    }

    /// Fails, naming every line that differs, unless `later` says the same.
    pub fn must_equal(&self, later: &Self) -> Result<()> {
        let mut differences = String::new();
        for (name, before) in &self.parts {
            let after = later.parts.get(name).map_or("", String::as_str);
            if before == after {
                continue;
            }
            writeln!(differences, "{name} differ:")?;
            for line in before.lines().filter(|line| !contains_line(after, line)) {
                writeln!(differences, "  - {line}")?;
            }
            for line in after.lines().filter(|line| !contains_line(before, line)) {
                writeln!(differences, "  + {line}")?;
            }
            if differences.ends_with("differ:\n") {
                writeln!(
                    differences,
                    "  before: {before}
  after: {after}"
                )?;
            }
        }
        if differences.is_empty() {
            Ok(())
        } else {
            bail!("the host is not as it was\n{differences}")
        }
    }

    /// One part of it, for looking at.
    #[must_use]
    pub fn part(&self, name: &str) -> &str {
        self.parts.get(name).map_or("", String::as_str)
    }
}

/// What `ip` and `tc` say of a namespace, where `command` makes commands. In as few processes as possible, since in
/// emulation each takes a twentieth of a second.
fn asked(command: impl Fn(&str) -> Result<Command>) -> Result<BTreeMap<String, String>> {
    let ask = |program: &str, option: Option<&str>, questions: &str| {
        let mut command = command(program)?;
        command.args(option).args(["-batch", "-"]);
        let answered =
            command::run_with_input(command, questions.as_bytes(), command::DEADLINE)?.success()?;
        anyhow::Ok(answered.stdout)
    };
    let mut parts: BTreeMap<String, String> = BTreeMap::new();
    // Routes of all families, rules of IPv4.
    let questions = "address show\nroute show table all\nrule show";
    for line in ask("ip", Some("-o"), questions)?.split_inclusive('\n') {
        let behind_number = line.trim_start_matches(|c: char| c.is_ascii_digit());
        let part = match behind_number.as_bytes() {
            [b':', b' ', ..] => "addresses",
            [b':', b'\t', ..] => "rules",
            _ => "routes",
        };
        parts.entry(part.to_owned()).or_default().push_str(line);
    }
    parts.insert("rules v6".to_owned(), ask("ip", Some("-6"), "rule show")?);
    let links = ask("ip", Some("-d"), "link show")?;
    let mut questions = "qdisc show\n".to_owned();
    for line in links.lines().filter(|line| !line.starts_with(' ')) {
        let Some(name) = line.split(": ").nth(1).and_then(|n| n.split('@').next()) else {
            continue;
        };
        for place in ["ingress", "egress", "root"] {
            writeln!(questions, "filter show dev {name} {place}")?;
        }
    }
    parts.insert("links".to_owned(), links);
    let found = ask("tc", None, &questions)?;
    let qdiscs = found
        .split_inclusive('\n')
        .take_while(|line| line.starts_with("qdisc ") || line.starts_with(char::is_whitespace))
        .map(str::len)
        .sum();
    let (qdiscs, filters) = found.split_at(qdiscs);
    parts.insert("qdiscs".to_owned(), qdiscs.to_owned());
    parts.insert("filters".to_owned(), questions + filters);
    Ok(parts)
}

fn contains_line(text: &str, line: &str) -> bool {
    text.lines().any(|other| other == line)
}

/// All sysctls below net, with their values, of the namespace of the calling thread.
fn sysctls() -> Result<String> {
    let mut lines = Vec::new();
    let mut open = vec![std::path::PathBuf::from("/proc/sys/net")];
    while let Some(folder) = open.pop() {
        let entries =
            std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else {
                // Some can only be written.
                let value = std::fs::read_to_string(&path).unwrap_or_default();
                lines.push(format!("{} = {}", path.display(), value.trim()));
            }
        }
    }
    lines.retain(|line| !RESTLESS.iter().any(|part| line.contains(part)));
    lines.sort();
    Ok(lines.join("\n"))
}

fn list_below(folder: &Path, found: &mut Vec<String>) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry.context("reading bpffs")?.path();
        found.push(path.display().to_string());
        if path.is_dir() {
            list_below(&path, found)?;
        }
    }
    found.sort();
    Ok(())
}
