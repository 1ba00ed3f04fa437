//! What the daemon hands to the data plane.

use std::{ops::RangeInclusive, sync::Arc};

pub use crate::netlink::LinkKind;
use crate::rules::model::{AddrSet, Protocol, Rule};

/// Number of a target; 1 and up. It is the classid of the target's filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetSlot(pub u16);

/// Number of a lane, from 0. It is the classid of the filters on the lane's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneNumber(pub u16);

/// How much a lane may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneBounds {
    /// Packets.
    pub packets: u32,
    /// Memory, in bytes, as [`injector_common::layout::lane_load`] estimates it.
    pub bytes: u64,
}

/// What a lane holds, and what it could not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneUse {
    /// Packets that it holds.
    pub packets: u64,
    /// Their memory, in bytes, as [`injector_common::layout::lane_load`] estimates it.
    pub bytes: u64,
    /// Wire packets that were lost because it was full, since it was made.
    pub full_packets: u64,
    /// The word behind `packets` and `bytes`.
    pub load: u64,
}

/// Number of a rule among those in force: 0 to 1,023.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleSlot(pub u16);

/// A target, as the programs need to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetConfig {
    /// Its number.
    pub slot: TargetSlot,
    /// What its packets begin with.
    pub link: LinkKind,
    /// Whether it is a loopback device.
    pub loopback: bool,
    /// Its interface index.
    pub ifindex: u32,
    /// The lane of its namespace, if there is one.
    pub lane: Option<LaneDevices>,
}

/// Where packets enter a lane, by interface index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneDevices {
    /// Cuts super-packets up.
    pub segmenter: u32,
    /// Decides each wire packet.
    pub line: u32,
}

/// A rule in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveRule {
    /// Where it is kept.
    pub slot: RuleSlot,
    /// Number of its activation, never used again while the programs are loaded. A rule with the same
    /// number as before is unchanged and keeps its state.
    pub activation: u32,
    /// When it was activated, `CLOCK_MONOTONIC` in nanoseconds.
    pub activated_ns: u64,
    /// Its targets.
    pub targets: Vec<TargetSlot>,
    /// The rule.
    pub rule: Arc<Rule>,
}

/// Packets that rules leave alone, on every target and in both directions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Exemption {
    /// Peers.
    pub peer: AddrSet,
    /// Local addresses.
    pub local: AddrSet,
    /// Ports at the peer.
    pub peer_port: Vec<RangeInclusive<u16>>,
    /// Local ports.
    pub local_port: Vec<RangeInclusive<u16>>,
    /// Protocols; empty for every IP protocol.
    pub protocols: Vec<Protocol>,
}
