//! The kernel's own counters in a namespace.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

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

/// What an interface has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Transmitted {
    /// Packets that it has handed over.
    pub packets: u64,
    /// Packets that it could not hand over.
    pub dropped: u64,
}

impl Transmitted {
    /// Of an interface of a namespace.
    pub fn by(ns: &Netns, interface: &str) -> Result<Self> {
        let text = ns
            .tool(&format!("ip -s -j link show dev {interface}"))?
            .stdout;
        let links: Value = serde_json::from_str(&text)?;
        serde_json::from_value(links[0]["stats64"]["tx"].clone())
            .with_context(|| format!("ip shows no counters: {text}"))
    }
}
