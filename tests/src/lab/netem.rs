//! netem on an interface of a test's own, for comparisons in one boot.

use anyhow::{Context, Result};

use super::netns::Netns;

/// More packets than any test has under way: netem's own limit is 1,000.
pub const LIMIT: u32 = 100_000;

/// A netem as an interface's root qdisc, gone when this is dropped.
#[derive(Debug)]
pub struct Netem {
    ns: Netns,
    interface: String,
}

impl Netem {
    /// Puts one, with these options, on an interface that has no qdisc of its own.
    pub fn on(ns: &Netns, interface: &str, options: &str) -> Result<Self> {
        Self::add(
            ns,
            interface,
            &[format!("root netem limit {LIMIT} {options}")],
        )
    }

    /// Puts several side by side, each with options of its own: the first is for packets of priority 1, the next
    /// for those of priority 2, and so on (`SO_PRIORITY`); all others meet none.
    pub fn by_priority(ns: &Netns, interface: &str, options: &[&str]) -> Result<Self> {
        let bands = options.len() + 1;
        // Of sixteen priorities, beginning with 0.
        let map: Vec<String> = (0..16)
            .map(|priority| if priority < bands { priority } else { 0 }.to_string())
            .collect();
        let mut lines = vec![format!(
            "root handle 1: prio bands {bands} priomap {}",
            map.join(" ")
        )];
        for (band, options) in (2..).zip(options) {
            lines.push(format!("parent 1:{band} netem limit {LIMIT} {options}"));
        }
        Self::add(ns, interface, &lines)
    }

    fn add(ns: &Netns, interface: &str, lines: &[String]) -> Result<Self> {
        let mut netem = None;
        for line in lines {
            ns.tool(&format!("tc qdisc add dev {interface} {line}"))?;
            // From the first on there is something to take back.
            netem.get_or_insert_with(|| Self {
                ns: ns.clone(),
                interface: interface.to_owned(),
            });
        }
        netem.context("no qdisc was asked for")
    }
}

impl Drop for Netem {
    fn drop(&mut self) {
        let line = format!("tc qdisc del dev {} root", self.interface);
        if let Err(error) = self.ns.tool(&line) {
            eprintln!("could not take netem off {}: {error:#}", self.interface);
        }
    }
}
