//! Rule sets of any size, in which one peer and one port are of each rule.

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Result, ensure};
use injector::{
    dataplane::{ActiveRule, DataPlane, RuleSlot, TargetSlot},
    rules::RuleSpec,
};
use serde_json::json;

/// The port that the first rule cuts; those of the others follow.
const FIRST_PORT: usize = 10_000;
/// A port that no rule is about.
pub const FREE_PORT: u16 = 9;

/// The `index`-th peer. Neighbours are two apart, so that no two of them share a prefix.
#[must_use]
pub fn peer(index: usize) -> Ipv4Addr {
    let index = u32::try_from(index).unwrap_or(0);
    Ipv4Addr::from(0x0b00_0001 + 2 * index)
}

/// So many peers and rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Size {
    /// Different addresses, over all rules.
    pub peers: usize,
    /// Rules.
    pub rules: usize,
}

impl Size {
    /// The peers of a rule: they are dealt out in turn, and where there are fewer of them than rules several
    /// rules have the same.
    fn peers_of(self, rule: usize) -> Vec<String> {
        if self.peers < self.rules {
            vec![peer(rule % self.peers).to_string()]
        } else {
            (rule..self.peers)
                .step_by(self.rules)
                .map(|index| peer(index).to_string())
                .collect()
        }
    }

    /// A peer and a port that the last rule cuts.
    pub fn cut(self) -> Result<(Ipv4Addr, u16)> {
        let last = self.rules - 1;
        Ok((peer(last % self.peers), u16::try_from(FIRST_PORT + last)?))
    }

    /// The port at which a peer is cut, where there are at least as many peers as rules.
    pub fn port_of(self, peer: usize) -> Result<u16> {
        Ok(u16::try_from(FIRST_PORT + peer % self.rules)?)
    }

    /// The rules, with activations from `first_activation` on.
    pub fn rules(self, target: TargetSlot, first_activation: u32) -> Result<Vec<ActiveRule>> {
        let now = DataPlane::monotonic_ns();
        (0..self.rules)
            .map(|index| {
                let spec: RuleSpec = serde_json::from_value(json!({
                    "name": format!("rule-{index}"),
                    "iface": ["eth0"],
                    "direction": "egress",
                    "peer": self.peers_of(index),
                    "peer_port": [(FIRST_PORT + index).to_string()],
                    "proto": ["udp"],
                    "seed": 1,
                    "fault": {"cut": true},
                }))?;
                let slot = u16::try_from(index)?;
                ensure!(
                    usize::from(u16::MAX) > FIRST_PORT + index,
                    "there are not so many ports"
                );
                Ok(ActiveRule {
                    slot: RuleSlot(slot),
                    activation: first_activation + u32::from(slot),
                    activated_ns: now,
                    targets: vec![target],
                    rule: Arc::new(spec.parse()?),
                })
            })
            .collect()
    }
}
