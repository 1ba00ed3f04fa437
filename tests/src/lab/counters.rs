//! The kernel's own counters in a namespace.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::{command, netns::Netns};

/// What `nstat` shows: absolute values, since the namespace was made.
#[derive(Debug, Clone, Deserialize)]
pub struct Nstat {
    kernel: BTreeMap<String, u64>,
}

impl Nstat {
    /// Reads them, leaving nstat's own history alone.
    pub fn read(ns: &Netns) -> Result<Self> {
        let mut command = ns.command("nstat")?;
        command.args(["-a", "-s", "-z", "--json"]);
        let output = command::run(command, Duration::from_secs(20))?.success()?;
        serde_json::from_str(&output.stdout)
            .with_context(|| format!("nstat printed no JSON: {}", output.stdout))
    }

    /// One counter; one that the kernel does not have is an error.
    pub fn get(&self, name: &str) -> Result<u64> {
        self.kernel
            .get(name)
            .copied()
            .with_context(|| format!("nstat shows no {name}"))
    }

    /// How much a counter grew since `before`.
    pub fn since(&self, before: &Self, name: &str) -> Result<u64> {
        Ok(self.get(name)? - before.get(name)?)
    }

    /// All counters with `part` in their name that grew since `before`.
    #[must_use]
    pub fn grown(&self, before: &Self, part: &str) -> BTreeMap<String, u64> {
        self.kernel
            .iter()
            .filter(|(name, _)| name.contains(part))
            .filter_map(|(name, now)| {
                let grown = now - before.kernel.get(name).copied().unwrap_or(0);
                (grown > 0).then(|| (name.clone(), grown))
            })
            .collect()
    }
}

/// Packets that this machine dropped because a CPU's backlog was full: a test bed's loss, not the
/// injector's. Read it before blaming anyone.
pub fn backlog_drops() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/softnet_stat").context("softnet_stat")?;
    text.lines()
        .map(|line| {
            let dropped = line.split_whitespace().nth(1).unwrap_or("0");
            u64::from_str_radix(dropped, 16).context("softnet_stat")
        })
        .sum()
}
