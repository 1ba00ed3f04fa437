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
        let mut parts = BTreeMap::new();
        for (name, line) in COMMANDS {
            parts.insert((*name).to_owned(), ns.tool(line)?.stdout);
        }
        let found = filters(ns.command("tc")?, &parts)?;
        parts.insert("filters".to_owned(), found);
        parts.insert("sysctls".to_owned(), ns.enter(sysctls)?);
        Ok(Self { parts })
    }

    /// Of the host's own namespace, with what is not per namespace: mounts and bpffs. Namespaces and
    /// programs of tests that run at the same time are left out.
    pub fn of_host() -> Result<Self> {
        let mut parts = BTreeMap::new();
        for (name, line) in COMMANDS {
            parts.insert((*name).to_owned(), command::tool(line)?.stdout);
        }
        let found = filters(Command::new("tc"), &parts)?;
        parts.insert("filters".to_owned(), found);
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

/// What is compared of every namespace.
const COMMANDS: &[(&str, &str)] = &[
    ("links", "ip -d link show"),
    ("addresses", "ip -o address show"),
    ("qdiscs", "tc qdisc show"),
    // Of all families.
    ("routes", "ip route show table all"),
    ("rules", "ip rule show"),
    ("rules v6", "ip -6 rule show"),
];

fn contains_line(text: &str, line: &str) -> bool {
    text.lines().any(|other| other == line)
}

/// Filters of every interface, at every place where one can hang, asked for in one process: in emulation each start
/// takes a tenth of a second.
fn filters(mut tc: Command, parts: &BTreeMap<String, String>) -> Result<String> {
    let links = parts.get("links").context("no links yet")?;
    let mut text = String::new();
    for line in links.lines().filter(|line| !line.starts_with(' ')) {
        let Some(name) = line.split(": ").nth(1).and_then(|n| n.split('@').next()) else {
            continue;
        };
        for place in ["ingress", "egress", "root"] {
            writeln!(text, "filter show dev {name} {place}")?;
        }
    }
    tc.args(["-batch", "-"]);
    let found = command::run_with_input(tc, text.as_bytes(), command::DEADLINE)?.success()?;
    Ok(text + &found.stdout)
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
