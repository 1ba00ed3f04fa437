//! Filters of somebody else's that look at a field of the skb, or set it: what another tool may have on the target,
//! and how a test sees what a packet carries there.

use std::os::fd::AsFd as _;

use anyhow::{Context, Result};
use injector::netlink::{Hook, NewFilter, attach};
use nix::net::if_::if_nametoindex;

use super::{bpf::load_classifier, netns::Netns};

/// A field of `struct __sk_buff` (`include/uapi/linux/bpf.h`): its offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `mark`.
    Mark = 8,
    /// `vlan_tci`, beside the packet.
    VlanTci = 24,
    /// `priority`.
    Priority = 32,
    /// `tc_index`.
    TcIndex = 44,
}

const fn instruction(code: u8, target: u8, source: u8, offset: i16, value: u32) -> u64 {
    code as u64
        | (target as u64) << 8
        | (source as u64) << 12
        | (offset.cast_unsigned() as u64) << 16
        | (value as u64) << 32
}

// Instructions, as include/uapi/linux/bpf.h composes them.
const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const IF_EQUAL: u8 = 0x16;
const IF_NOT_EQUAL: u8 = 0x56;
const MOVE: u8 = 0xb7;
const EXIT: u64 = 0x95;
/// `TC_ACT_SHOT`.
const SHOT: u32 = 2;
/// `TC_ACT_UNSPEC`.
const UNSPEC: u32 = u32::MAX;
/// A preference behind the injector's.
const LAST: u16 = 65_000;

/// Lets only packets pass in which a field has this value, until [`require_nothing`]. Runs after the injector.
pub fn require(ns: &Netns, interface: &str, hook: Hook, field: Field, value: u32) -> Result<()> {
    let program = [
        instruction(LOAD, 2, 1, field as i16, 0),
        instruction(IF_EQUAL, 2, 0, 2, value),
        instruction(MOVE, 0, 0, 0, SHOT),
        EXIT,
        instruction(MOVE, 0, 0, 0, UNSPEC),
        EXIT,
    ];
    filter(ns, interface, hook, &program, LAST)
}

/// Takes back what [`require`] has made.
pub fn require_nothing(ns: &Netns, interface: &str, hook: Hook) -> Result<()> {
    ns.tool(&format!("tc filter del dev {interface} {hook} pref {LAST}"))
        .map(drop)
}

/// Sets a field of packets whose `tc_index` is 0: not of those that come back from a lane. Made before the
/// injector is attached, it runs before it, in order of preference.
pub fn set(
    ns: &Netns,
    interface: &str,
    hook: Hook,
    preference: u16,
    field: Field,
    value: u32,
) -> Result<()> {
    let program = [
        instruction(LOAD, 2, 1, Field::TcIndex as i16, 0),
        instruction(IF_NOT_EQUAL, 2, 0, 2, 0),
        instruction(MOVE, 2, 0, 0, value),
        instruction(STORE, 1, 2, field as i16, 0),
        instruction(MOVE, 0, 0, 0, UNSPEC),
        EXIT,
    ];
    filter(ns, interface, hook, &program, preference)
}

fn filter(
    ns: &Netns,
    interface: &str,
    hook: Hook,
    instructions: &[u64],
    priority: u16,
) -> Result<()> {
    let program = load_classifier(instructions)?;
    ns.enter(|| {
        let index = if_nametoindex(interface).context(interface.to_owned())?;
        let filter = NewFilter {
            program: program.as_fd(),
            name: "labtests",
            priority,
            handle: 1,
            classid: 0,
        };
        attach(index, hook, &filter).context("attaching a filter")
    })
}
