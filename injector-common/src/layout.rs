//! Keys and values of the tables that kernel and user space share.
//!
//! Everything is `repr(C)`, of fixed width and without padding; sizes are asserted at compile time. The
//! tables themselves are in `injector-ebpf/src/tables.rs`, with who writes and who reads each of them.
//!
//! # Epochs
//!
//! A rule set is an *epoch*. Tables that depend on it hold two copies; [`Config::epoch`] says, by its lowest
//! bit, which of them is in force. User space fills the other copy, then stores the new epoch: a change of
//! any size becomes visible with that one store. What was cached under an older epoch is recognised by its
//! number and decided anew.

use core::mem::{offset_of, size_of};

use crate::histogram::BUCKETS;

/// Rules at most. One bit of a [`Bitmap`] each.
pub const MAX_RULES: u32 = 1024;
/// Exemptions at most (the protect list). They have the lowest slots, so that one pass over a bitmap knows
/// whether a packet is exempt before it comes to the rules.
pub const MAX_EXEMPTIONS: u32 = 128;
/// Slots of exemptions and rules together.
pub const MAX_SLOTS: u32 = MAX_EXEMPTIONS + MAX_RULES;
/// Words of a bitmap over all slots.
pub const BITMAP_WORDS: usize = (MAX_SLOTS / 64) as usize;
/// Words of a bitmap that belong to exemptions.
pub const EXEMPT_WORDS: usize = (MAX_EXEMPTIONS / 64) as usize;
/// Rules that one packet can meet. More are counted, and the surplus does not act.
pub const MAX_CANDIDATES: usize = 16;
/// Entries of the protocol table: [`Kind`] and protocol number.
pub const PROTOCOL_CLASSES: u32 = 4 * 256;
/// Entries of the port table: every port, and [`NO_PORT`].
pub const PORT_CLASSES: u32 = 65_537;
/// The port table's entry for packets without ports.
pub const NO_PORT: u32 = 65_536;
/// The bitmap in which no bit is set. Its index is fixed: a packet whose target has this one for its
/// direction is not even parsed.
pub const BITMAP_EMPTY: u32 = 0;
/// The bitmap of the rules that act on exempt packets too.
pub const BITMAP_UNPROTECTED: u32 = 1;
/// Length ranges of one rule.
pub const MAX_LENGTHS: usize = 4;
/// Firewall marks of one rule.
pub const MAX_MARKS: usize = 4;

/// Direction of a packet as seen at its target, and index of everything that is kept by direction.
pub mod hook {
    /// Leaving through the interface.
    pub const EGRESS: u32 = 0;
    /// Arriving at the interface.
    pub const INGRESS: u32 = 1;
}

/// What kind of packet a [`FlowKey`] or a protocol class is about.
pub mod kind {
    /// IPv4.
    pub const V4: u8 = 0;
    /// IPv6, neighbour discovery excepted.
    pub const V6: u8 = 1;
    /// Neither: ARP (protocol 0) and all other ethertypes (protocol 1).
    pub const OTHER: u8 = 2;
    /// IPv6 neighbour discovery.
    pub const ND: u8 = 3;
}

/// The protocol number of ARP within [`kind::OTHER`].
pub const OTHER_ARP: u8 = 0;
/// The protocol number of every other ethertype within [`kind::OTHER`].
pub const OTHER_ETHERTYPE: u8 = 1;

/// What the program reads first. One entry, written by user space through a mapping, field by field.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Config {
    /// The epoch in force; 0 while there are no rules.
    pub epoch: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds until which rules act. The daemon moves it on while it lives.
    pub lease_until_ns: u64,
    /// Rules whose held packets are being flushed; 0 for none, and then their table is not looked at.
    pub flushing: u64,
}

/// An interface to which the programs are attached. Slot 0 is for test runs, which have no filter.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Target {
    /// Bytes in front of the network header: 14 on Ethernet, 0 on a device without a link layer.
    pub l2_length: u32,
    /// Whether it is a loopback device, where a packet is decided for both directions as it leaves.
    pub loopback: u32,
    /// By copy and [`hook`]: index of the bitmap of rules for that direction.
    pub bitmap: [[u32; 2]; 2],
    /// By copy: whether connections are tracked, because a rule selects on their state.
    pub track: [u32; 2],
    /// Its interface index, to which a lane returns packets.
    pub ifindex: u32,
    /// Interface index of its lane's segmenter; 0 while there is no lane.
    pub segmenter: u32,
    /// Interface index of its lane's line; 0 while there is no lane.
    pub line: u32,
    /// Zero.
    pub reserved: u32,
}

/// A set of rules and exemptions, one bit a slot.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bitmap {
    /// Slot s is bit `s % 64` of word `s / 64`.
    pub words: [u64; BITMAP_WORDS],
}

impl Default for Bitmap {
    fn default() -> Self {
        Self {
            words: [0; BITMAP_WORDS],
        }
    }
}

/// A place in which an address or a port can stand, as index of a class: by direction, source and
/// destination.
pub mod role {
    /// Source of a packet in direction `hook`.
    #[inline(always)]
    #[must_use]
    pub const fn source(hook: u32) -> usize {
        (hook * 2) as usize
    }

    /// Destination of a packet in direction `hook`.
    #[inline(always)]
    #[must_use]
    pub const fn destination(hook: u32) -> usize {
        (hook * 2 + 1) as usize
    }
}

/// What an address or a port means to the rules: by [`role`], the index of a bitmap.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Class {
    /// Index of the bitmap of the rules whose conditions on that role hold.
    pub bitmap: [u32; 4],
}

/// Key of the prefix trie, behind the length of the prefix: [`Prefix::TAG_BITS`] and that of the address's.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// Copy and family ([`Prefix::tag`]).
    pub tag: u32,
    /// The address in network order; IPv4 in the first four bytes. In words of 32 bits, because the kernel
    /// has the length in front of it, and no padding.
    pub address: [u32; 4],
}

impl Prefix {
    /// Bits in front of the address.
    pub const TAG_BITS: u32 = 32;
    /// Bits of the whole key.
    pub const BITS: u32 = Self::TAG_BITS + 128;

    /// The tag of a copy of the addresses of a [`family`].
    #[inline(always)]
    #[must_use]
    pub const fn tag(copy: u32, family: u32) -> u32 {
        copy | family << 1
    }
}

/// Families of addresses in the prefix trie.
pub mod family {
    /// IPv4, and ARP's.
    pub const V4: u32 = 0;
    /// IPv6.
    pub const V6: u32 = 1;
    /// A packet without addresses. Only rules that ask nothing of them match it.
    pub const NONE: u32 = 2;
}

/// One conversation. Both directions have the same addresses and ports here, in canonical order.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The lower of the two ends: its address in network order; IPv4 in the first four bytes.
    pub low: [u64; 2],
    /// The higher end's address.
    pub high: [u64; 2],
    /// The lower end's port; the identifier of an ICMP echo; 0 where there is none.
    pub low_port: u16,
    /// The higher end's port.
    pub high_port: u16,
    /// Protocol number.
    pub protocol: u8,
    /// [`kind`].
    pub kind: u8,
    /// Where and how it was seen: twice the target's slot, plus [`hook`], plus bits of [`site`]. 0 in
    /// everything that is hashed.
    pub site: u16,
}

/// Parts of a site: what tells packets of one flow apart, at one target and in one direction, for which
/// different rules hold.
pub mod site {
    /// The packet has no ports (a later fragment, say), and rules that ask for any do not match it, unlike one
    /// whose ports are really 0.
    pub const PORTLESS: u16 = 0x8000;
    /// The packet has no addresses, unlike one whose addresses are really 0.
    pub const ADDRESSLESS: u16 = 0x4000;
    /// The packet goes from the higher end to the lower one. A loopback device, a bridge and a router's
    /// interface see both ways of a flow in one direction.
    pub const REVERSED: u16 = 0x2000;
}

/// Targets at most: their slots share the site with the bits of [`site`].
pub const MAX_TARGETS: u16 = site::REVERSED / 2;

impl FlowKey {
    /// A number that two flows hardly ever share. (Not a hash for tables: it need not mix.)
    #[inline(always)]
    #[must_use]
    pub fn tag(&self) -> u64 {
        let rest = u64::from(self.low_port)
            | u64::from(self.high_port) << 16
            | u64::from(self.protocol) << 32
            | u64::from(self.kind) << 40
            | u64::from(self.site) << 48;
        self.low[0]
            ^ self.low[1].rotate_left(13)
            ^ self.high[0].rotate_left(29)
            ^ self.high[1].rotate_left(43)
            ^ rest
    }
}

/// What is known of a flow at one site, under one epoch.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowEntry {
    /// [`FlowKey::tag`] of the flow. An element that is deleted or replaced may be given to another flow at
    /// once, while a program on another CPU still reads it (`free_htab_elem` puts it where `alloc_htab_elem`
    /// takes from, kernel/bpf/hashtab.c, 6.1); the tag tells. It comes first, so that it is overwritten first.
    pub tag: u64,
    /// The epoch under which it was decided.
    pub epoch: u64,
    /// When a packet of it was last seen, `CLOCK_MONOTONIC` in nanoseconds.
    pub last_ns: u64,
    /// How many of `slots` are in use.
    pub count: u32,
    /// Whether more rules matched than fit.
    pub surplus: u32,
    /// [`needs`] of the rules in `slots`, together.
    pub needs: u32,
    /// Zero.
    pub reserved: u32,
    /// Slots of the rules whose conditions on the flow hold, in ascending order.
    pub slots: [u16; MAX_CANDIDATES],
}

/// What rules need beyond the target's hook; bits of [`RuleEntry::needs`] and [`FlowEntry::needs`].
pub mod needs {
    /// Packets go through a lane.
    pub const LANE: u32 = 1;
    /// Wire packets are decided one by one, so super-packets go through the lane's segmenter.
    pub const WIRE: u32 = 1 << 1;
    /// Checksums are complete before the packet is decided, so single packets go through the segmenter too.
    pub const COMPLETE: u32 = 1 << 2;
}

/// What a packet that goes through a lane carries in `tc_index` from its target's hook to the lane's exit, and
/// back to that hook, which lets it pass.
pub mod lane_mark {
    use super::{MAX_TARGETS, hook};

    /// Set in every mark.
    pub const SET: u16 = 1 << 15;
    /// The lower half of the packet's hash is the `tc_index` that it had.
    pub const INDEX: u16 = 1 << 14;
    /// The packet's priority is [`super::PRIORITY_CONTROL`] where it now is [`super::PRIORITY_HELD`].
    pub const CONTROL: u16 = 1 << 13;
    /// Set by the carrier when the packet comes out of the segmenter, and taken off at the line: it is one wire
    /// packet, and its checksums are complete. (Its index has no bit to stand for before the line.)
    pub const COMPLETE: u16 = INDEX;
    /// It is an answer, which has been in no lane: the carrier takes [`CONTROL`] off what has.
    pub const ANSWER: u16 = CONTROL;
    const DIRECTION: u16 = 1 << 12;
    const SLOT: u16 = DIRECTION - 1;

    const _: () = assert!(SLOT + 1 == MAX_TARGETS);

    /// The mark of packets of a target and direction.
    #[inline(always)]
    #[must_use]
    pub const fn of(target: u16, hook: u32) -> u16 {
        let direction = if hook == hook::INGRESS { DIRECTION } else { 0 };
        SET | direction | target & SLOT
    }

    /// The target and the direction of a marked packet.
    #[inline(always)]
    #[must_use]
    pub const fn read(mark: u16) -> (u16, u32) {
        let hook = if mark & DIRECTION != 0 {
            hook::INGRESS
        } else {
            hook::EGRESS
        };
        (mark & SLOT, hook)
    }
}

/// Part of a priority that qdiscs choose by: `TC_PRIO_MAX`, `include/uapi/linux/pkt_sched.h`.
pub const PRIORITY_CLASS: u32 = 15;
/// `TC_PRIO_CONTROL`. Up to 6.6 fq sends packets of this priority at once, whatever their departure time
/// (`fq_classify`, `net/sched/sch_fq.c`).
pub const PRIORITY_CONTROL: u32 = 7;
/// What stands in its place while a lane holds the packet; fq gives it no special treatment.
pub const PRIORITY_HELD: u32 = 15;

/// What a lane may hold, and what it holds. The line's program adds, the carrier's takes away.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneLoad {
    /// What it holds: a [`lane_load`].
    pub held: u64,
    /// Packets that it may hold: up to [`lane_load::MAX_PACKETS`].
    pub most_packets: u64,
    /// Bytes of memory that it may hold: up to [`lane_load::MAX_BYTES`].
    pub most_bytes: u64,
    /// Wire packets that it had no room for, and that were lost.
    pub full_packets: u64,
}

/// What a lane holds, in one word, so that one atomic addition keeps both: packets in the upper 24 bits, the bytes
/// of memory that they take in the lower 40.
///
/// The word is signed: should more be taken away than was added (a packet that a device cut up on its way out),
/// the lane counts as empty, not as full, until user space finds it idle and puts the count right.
pub mod lane_load {
    const SHIFT: u32 = 40;
    /// Packets at most: 23 bits.
    pub const MAX_PACKETS: u64 = (1 << 23) - 1;
    /// Bytes at most.
    pub const MAX_BYTES: u64 = (1 << SHIFT) - 1;
    /// What a packet takes besides its bytes: its `sk_buff` (256 bytes), `skb_shared_info` (320), and what its
    /// headroom and the allocator's sizes leave unused. With 768 a frame of 1,514 bytes counts as 2,282, and its
    /// `truesize` is 2,304; a super-packet's is little more than its bytes. A clone that shares its data with a
    /// sender's retransmission queue counts in full.
    pub const PACKET: u64 = 768;

    /// What a packet of so many bytes adds.
    #[inline(always)]
    #[must_use]
    pub const fn of(length: u32) -> u64 {
        1 << SHIFT | (length as u64 + PACKET)
    }

    /// The packets of a load.
    #[inline(always)]
    #[must_use]
    pub const fn packets(load: u64) -> u64 {
        if load >> 63 != 0 { 0 } else { load >> SHIFT }
    }

    /// The bytes of a load.
    #[inline(always)]
    #[must_use]
    pub const fn bytes(load: u64) -> u64 {
        if load >> 63 != 0 { 0 } else { load & MAX_BYTES }
    }
}

/// VLAN identifiers by which a lane's carrier knows where a packet comes from.
pub mod lane_vlan {
    /// The segmenter: on to the line.
    pub const SEGMENTER: u16 = 1;
    /// The line: back to the target.
    pub const LINE: u16 = 2;
}

/// Key of the state that a rule keeps of a flow.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct StateKey {
    /// The flow, as the rule identifies flows. `site` is one of [`state_site`].
    pub flow: FlowKey,
    /// [`RuleEntry::activation`] of the rule.
    pub activation: u32,
    /// Place in a [`state_site::RING`]; else 0.
    pub index: u32,
}

/// What a [`StateKey`] is about, in the place of the site.
pub mod state_site {
    /// Packets leaving: [`super::hook::EGRESS`].
    pub const EGRESS: u16 = 0;
    /// Packets arriving: [`super::hook::INGRESS`].
    pub const INGRESS: u16 = 1;
    /// The number of a flow among those to its service; both directions.
    pub const ORDINAL: u16 = 2;
    /// How many flows to a service there have been; both directions.
    pub const SERVICE: u16 = 3;
    /// The rule as a whole.
    pub const RULE: u16 = 4;
    /// The line of a rule with a rate, for packets leaving; one more for those arriving. The number is when it is
    /// free, `CLOCK_MONOTONIC` in nanoseconds; under a trace it is how far into the trace it is taken, in bytes
    /// ([`super::OPPORTUNITY_BYTES`] to each opportunity since the activation).
    pub const LINE: u16 = 5;
    /// The last packets that a line has taken, where its queue is limited in packets; for packets leaving, one more
    /// for those arriving. [`super::StateKey::index`] 0: how many there have been. From 1 on: a ring of when each
    /// of the last ones had its turn, `CLOCK_MONOTONIC` in nanoseconds.
    pub const RING: u16 = 7;
}

/// State of a flow under a rule.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct State {
    /// How many wire packets matched so far (or the ordinal, or the number of ordinals given out). Under a rule
    /// whose faults remember more than that: a [`crate::shape::Memory`].
    pub n: u64,
    /// When it was last used, `CLOCK_MONOTONIC` in nanoseconds.
    pub last_ns: u64,
    /// [`crate::shape::stream`] of the flow under the rule; 0 while nobody has asked for it. Of a line
    /// ([`state_site::LINE`], [`state_site::RING`]): until when it is of use, `CLOCK_MONOTONIC` in nanoseconds.
    pub stream: u64,
}

/// What is held of a flow at a site, in a lane.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// When the last packet whose order is kept leaves, `CLOCK_MONOTONIC` in nanoseconds.
    pub until_ns: u64,
    /// [`crate::holders`] that all packets held until then have in common.
    pub holders: u64,
    /// When the last one leaves that was flushed: until then fq has a queue of it that later ones keep out of.
    pub flushed_until_ns: u64,
    /// How often that happened: part of what the flow's packets are queued by.
    pub turn: u64,
}

/// Multiplier that spreads a number over the upper bits of the product: 2^64 over the golden ratio.
pub const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// By what the packets of a flow that are kept in order are queued in a lane, in this turn ([`Held::turn`]): skb hashes,
/// whose upper bits choose the queue (`reciprocal_scale` in `skb_tx_hash`, net/core/dev.c) and depend on all of the flow.
#[inline(always)]
#[must_use]
pub fn queue_hash(flow: &FlowKey, turn: u64) -> u32 {
    /// Tells the turns of a flow apart: of `fmix64` (A. Appleby, `MurmurHash3`).
    const TURN: u64 = 0xff51_afd7_ed55_8ccd;
    ((flow.tag() ^ turn.wrapping_mul(TURN)).wrapping_mul(MIX) >> 32) as u32
}

/// How many counts there are of what is in lanes.
pub const UNDERWAY: u32 = 1 << 12;

/// Which of them a packet belongs to that is queued by this hash. The lower half of a hash may be its `tc_index`.
#[inline(always)]
#[must_use]
pub const fn underway(hash: u32) -> u32 {
    hash >> 20
}

/// Packets that were dropped because a rule is being flushed; the key is its name of [`crate::holders`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Those that would have left, wire packets.
    pub egress_packets: u64,
    /// Those that would have arrived.
    pub ingress_packets: u64,
}

/// Rules that can be flushed at once.
pub const MAX_FLUSHES: u32 = 4096;

/// A tracked connection; key is a [`FlowKey`] with `site` twice the target's slot.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Connection {
    /// When it began: its SYN, its INIT, or its first packet. `CLOCK_MONOTONIC` in nanoseconds.
    pub first_ns: u64,
    /// When a packet of it was last seen.
    pub last_ns: u64,
}

/// Key of what is remembered of a first fragment.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address, as in [`FlowKey`].
    pub source: [u64; 2],
    /// Destination address.
    pub destination: [u64; 2],
    /// The datagram's identification.
    pub id: u32,
    /// Twice the target's slot, plus [`hook`].
    pub site: u16,
    /// IPv4: the protocol, which is part of a datagram's identity (RFC 791). IPv6: 0 (RFC 8200).
    pub protocol: u8,
    /// [`kind::V4`] or [`kind::V6`].
    pub kind: u8,
}

/// What later fragments take from their first one.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Upper {
    /// Source port, or the identifier of an ICMP echo.
    pub source_port: u16,
    /// Destination port, or the identifier of an ICMP echo.
    pub destination_port: u16,
    /// Protocol number.
    pub protocol: u8,
    /// [`kind`].
    pub kind: u8,
    /// TCP flags, ICMP type, or SCTP chunk type.
    pub detail: u8,
    /// [`upper_has`].
    pub has: u8,
}

/// Bits of [`Upper::has`].
pub mod upper_has {
    /// The ports are ports, and port selectors apply.
    pub const PORTS: u8 = 1;
    /// `detail` holds TCP flags.
    pub const TCP_FLAGS: u8 = 2;
    /// `detail` holds an ICMP or ICMPv6 type.
    pub const ICMP_TYPE: u8 = 4;
    /// `detail` holds the type of an SCTP packet's first chunk.
    pub const SCTP_CHUNK: u8 = 8;
    /// The packet has addresses.
    pub const ADDRESSES: u8 = 16;
}

/// Bits of [`RuleEntry::flags`]: what has to be looked at beyond the bitmaps.
pub mod rule_flag {
    /// TCP flags.
    pub const TCP_FLAGS: u32 = 1;
    /// Length ranges.
    pub const LENGTH: u32 = 1 << 1;
    /// DSCP.
    pub const DSCP: u32 = 1 << 2;
    /// Firewall mark.
    pub const MARK: u32 = 1 << 3;
    /// ICMP or ICMPv6 type.
    pub const ICMP_TYPE: u32 = 1 << 4;
    /// Connections that began under the rule.
    pub const STATE_NEW: u32 = 1 << 5;
    /// Connections that did not.
    pub const STATE_ESTABLISHED: u32 = 1 << 6;
    /// A share of flows.
    pub const SHARE: u32 = 1 << 7;
    /// Everything that is judged packet by packet.
    pub const PER_PACKET: u32 =
        TCP_FLAGS | LENGTH | DSCP | MARK | ICMP_TYPE | STATE_NEW | STATE_ESTABLISHED;
}

/// Values of [`RuleEntry::identity`].
pub mod identity {
    /// Protocol, both addresses, both ports.
    pub const TUPLE: u32 = 0;
    /// Without the ephemeral port.
    pub const SERVICE: u32 = 1;
    /// The k-th flow to a service.
    pub const ORDINAL: u32 = 2;
}

/// Values of [`RuleEntry::fault`].
pub mod fault {
    /// Every packet is lost.
    pub const CUT: u32 = 0;
    /// The `n`-th.
    pub const NTH: u32 = 1;
    /// The first `n`.
    pub const FIRST: u32 = 2;
    /// Every `n`-th.
    pub const EVERY: u32 = 3;
    /// Positions of a one in `pattern`, over and over.
    pub const PATTERN: u32 = 4;
    /// The same, once.
    pub const PATTERN_ONCE: u32 = 5;
    /// The first packet of the whole rule.
    pub const ONCE: u32 = 6;
    /// None of these.
    pub const NONE: u32 = 7;
    /// Every packet is lost, and answered where that may be done: [`super::answer`] is in
    /// [`super::RuleEntry::n`].
    pub const REJECT: u32 = 8;
}

/// What a packet is answered with.
pub mod answer {
    /// Nothing.
    pub const NONE: u32 = 0;
    /// A TCP reset.
    pub const RST: u32 = 1;
    /// ICMP: host unreachable (ICMPv6: address unreachable).
    pub const ICMP_HOST: u32 = 2;
    /// ICMP: port unreachable.
    pub const ICMP_PORT: u32 = 3;
    /// ICMP: communication administratively prohibited.
    pub const ICMP_ADMIN: u32 = 4;
}

/// Bits of [`Shape::stages`]: what a rule does to packets in a lane.
pub mod stage {
    /// Random loss.
    pub const LOSS: u32 = 1;
    /// Duplication.
    pub const DUPLICATE: u32 = 1 << 1;
    /// Delay, with or without jitter.
    pub const DELAY: u32 = 1 << 2;
    /// Holding some packets back.
    pub const REORDER: u32 = 1 << 3;
    /// A line of limited rate with a queue in front.
    pub const RATE: u32 = 1 << 4;
    /// Holding everything for a while.
    pub const STALL: u32 = 1 << 5;
    /// Losing what is too long.
    pub const MTU: u32 = 1 << 6;
    /// Turning bits over.
    pub const CORRUPT: u32 = 1 << 7;
}

/// Bits of [`Shape::corrupt_how`].
pub mod corrupt_how {
    /// Bits of headers: IP with options or extension headers, and the upper layer's.
    pub const HEADER: u32 = 1;
    /// Bits of what follows them.
    pub const PAYLOAD: u32 = 1 << 1;
    /// Checksums are made right again.
    pub const REPAIR: u32 = 1 << 2;
}

/// Values of [`Shape::rate_share`]: which packets share a line.
pub mod rate_share {
    /// All of the rule.
    pub const RULE: u32 = 0;
    /// Those of a flow.
    pub const FLOW: u32 = 1;
    /// Those of a peer.
    pub const PEER: u32 = 2;
}

/// Values of [`Shape::queue_limit`]: in what the queue in front of a line is limited.
pub mod queue_limit {
    /// Nanoseconds until it is a packet's turn.
    pub const TIME: u32 = 0;
    /// Bytes that are to go before the packet, and its own; an idle line takes any packet.
    pub const BYTES: u32 = 1;
    /// Packets that wait, the one on the line not counted.
    pub const PACKETS: u32 = 2;
}

/// Opportunities of all traces together.
pub const TRACE_ENTRIES: u32 = 1 << 20;
/// Opportunities of one trace.
pub const MAX_TRACE: u32 = 1 << 18;
/// What one opportunity of a trace carries (`PACKET_SIZE`, `src/frontend/link_queue.hh` in Mahimahi).
pub const OPPORTUNITY_BYTES: u64 = 1504;

/// Bits behind the binary point of [`Shape::byte_time`].
pub const BYTE_TIME_SCALE: u32 = 20;

/// Values of [`Shape::loss_model`].
pub mod loss_model {
    /// Each packet for itself, with probability `loss[0]`.
    pub const BERNOULLI: u32 = 0;
    /// Gilbert-Elliott: `loss` is p, r, 1-h, 1-k.
    pub const GILBERT_ELLIOTT: u32 = 1;
    /// Four states: `loss` is p13, p31, p32, p23, p14.
    pub const FOUR_STATES: u32 = 2;
}

/// Values of [`Shape::distribution`] that are no number of a table.
pub mod distribution {
    /// Uniform over the delay plus and minus the jitter.
    pub const UNIFORM: u32 = u32::MAX;
}

/// Intervals of a distribution's table.
pub const DISTRIBUTION_STEPS: usize = 4096;
/// Tables of distributions.
pub const DISTRIBUTIONS: u32 = 64;
/// Bits behind the binary point of a table's values, and of [`Shape::correlation`].
pub const DISTRIBUTION_SCALE: u32 = 16;
/// Table of the normal distribution's quantiles.
pub const DISTRIBUTION_NORMAL: u32 = 0;
/// Table of the normal distribution function: of the index in steps of 1/256 from -8, in units of 2^-31.
pub const DISTRIBUTION_NORMAL_CDF: u32 = 1;

/// Quantiles of a distribution: the value at probability `index / DISTRIBUTION_STEPS`, in units of the jitter,
/// with [`DISTRIBUTION_SCALE`] bits behind the binary point. Between them it is interpolated.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Distribution {
    /// The values, in ascending order.
    pub quantiles: [i32; DISTRIBUTION_STEPS + 1],
    /// Zero.
    pub reserved: i32,
}

/// What a rule does to the packets that it sends through a lane. Probabilities are thresholds from 0 to 2^32,
/// compared with a 32-bit draw.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    /// [`stage`].
    pub stages: u32,
    /// [`loss_model`].
    pub loss_model: u32,
    /// Parameters of the loss.
    pub loss: [u64; 5],
    /// Probability of duplication.
    pub duplicate: u64,
    /// What copies are sent after the original, nanoseconds.
    pub copy_delay_ns: u64,
    /// Copies of a duplicated packet, besides the original: 1 to [`MAX_COPIES`].
    pub copies: u32,
    /// A table's number, or of [`distribution`].
    pub distribution: u32,
    /// Delay, nanoseconds.
    pub delay_ns: u64,
    /// Jitter, nanoseconds; 0 for none.
    pub jitter_ns: u64,
    /// Correlation of one packet's delay with the one before, with [`DISTRIBUTION_SCALE`] bits behind the point.
    pub correlation: u32,
    /// The square root of one less the correlation's square, likewise.
    pub innovation: u32,
    /// Probability of being held back.
    pub reorder: u64,
    /// For how long, nanoseconds.
    pub hold_ns: u64,
    /// 1 where a packet may overtake earlier ones of its flow, 0 where order is kept.
    pub free_order: u32,
    /// [`queue_limit`].
    pub queue_limit: u32,
    /// Time of one byte on the line, nanoseconds with [`BYTE_TIME_SCALE`] bits behind the binary point. Unused under
    /// a trace.
    pub byte_time: u64,
    /// Bytes by which a packet is longer on the line than its frame, or under a trace than its IP packet; may be
    /// negative.
    pub overhead: i32,
    /// [`rate_share`].
    pub rate_share: u32,
    /// Limit of the queue, in what `queue_limit` says.
    pub queue: u64,
    /// However the queue is limited: a packet that would have to wait longer is lost, nanoseconds.
    pub longest_ns: u64,
    /// First entry of the trace among all of them.
    pub trace_start: u32,
    /// Opportunities in the trace; 0 where there is none, and the rate is constant.
    pub trace_length: u32,
    /// After how long the trace begins again: the time of its last opportunity, nanoseconds.
    pub trace_period_ns: u64,
    /// Packets that wait longer are marked (ECN), nanoseconds; `u64::MAX` for never.
    pub ecn_ns: u64,
    /// How long everything is held, nanoseconds.
    pub stall_ns: u64,
    /// From the beginning of one stall to that of the next, nanoseconds; 0 where there is one only.
    pub stall_every_ns: u64,
    /// Probability of corruption.
    pub corrupt: u64,
    /// Bits that are turned over in a corrupted packet: 1 to [`MAX_BITS`].
    pub corrupt_bits: u32,
    /// [`corrupt_how`].
    pub corrupt_how: u32,
}

/// Copies of one packet at most, by all rules together.
pub const MAX_COPIES: u32 = 8;
/// Bits of one packet that one rule turns over at most.
pub const MAX_BITS: u32 = 32;

/// A rule, as the program judges it once the bitmaps have named it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RuleEntry {
    /// Number of the activation, unique while the program is loaded: part of the key of all state, so that a
    /// rule that is changed, or another in the same slot, starts again.
    pub activation: u32,
    /// [`rule_flag`].
    pub flags: u32,
    /// [`fault`].
    pub fault: u32,
    /// [`identity`].
    pub identity: u32,
    /// [`needs`].
    pub needs: u32,
    /// The longest IP packet that passes, in bytes; 0 for any.
    pub mtu: u32,
    /// First half of the key of the random stream ([`crate::siphash::rule_key`]).
    pub key0: u64,
    /// Second half.
    pub key1: u64,
    /// Flows whose 32-bit draw is below are in: 0 to 2^32.
    pub share: u64,
    /// Activation, `CLOCK_MONOTONIC` in nanoseconds.
    pub activated_ns: u64,
    /// End of the lifetime, `CLOCK_MONOTONIC` in nanoseconds; 0 for none.
    pub deadline_ns: u64,
    /// Length of a flap cycle in nanoseconds; 0 for none.
    pub flap_period_ns: u64,
    /// First part of the cycle, in which the fault does not act.
    pub flap_up_ns: u64,
    /// How far into a cycle the activation is.
    pub flap_phase_ns: u64,
    /// Number of a positional fault, at least 1; under [`fault::REJECT`] one of [`answer`].
    pub n: u64,
    /// Pattern: position p (from 0) is bit `p % 64` of word `p / 64`.
    pub pattern: [u64; 4],
    /// Bits in the pattern: 1 to 256.
    pub pattern_length: u32,
    /// How many of `lengths` are in use.
    pub length_count: u32,
    /// How many of `marks` are in use.
    pub mark_count: u32,
    /// TCP flags that must be as in `tcp_value`, in the lowest byte; their values in the second.
    pub tcp_mask_value: u32,
    /// DSCP code points, one bit each.
    pub dscp: u64,
    /// Length ranges in bytes, both ends included.
    pub lengths: [[u32; 2]; MAX_LENGTHS],
    /// Firewall marks: value, mask.
    pub marks: [[u32; 2]; MAX_MARKS],
    /// ICMP types, one bit each.
    pub icmp_types: [u64; 4],
    /// ICMPv6 types, one bit each.
    pub icmpv6_types: [u64; 4],
}

/// What a rule did, in one direction, on one CPU. Packets are wire packets; bytes are those of their frames.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RuleCounters {
    /// Packets that matched while the rule acted.
    pub matched_packets: u64,
    /// Their bytes.
    pub matched_bytes: u64,
    /// Packets that the rule chose to lose.
    pub cut_packets: u64,
    /// Bytes that were lost by that, those of `excess_packets` included.
    pub cut_bytes: u64,
    /// Packets that went with chosen ones because they shared a super-packet.
    pub excess_packets: u64,
    /// Flows of which a packet matched.
    pub flows: u64,
    /// Packets that matched while a flapping link was up.
    pub off_packets: u64,
    /// Packets that matched while the lease had lapsed: the rule should have acted and did not.
    pub lapsed_packets: u64,
    /// Packets that were decided without state because the table was full.
    pub stateless_packets: u64,
    /// Packets that random loss took.
    pub lost_packets: u64,
    /// Packets that were duplicated.
    pub duplicated_packets: u64,
    /// The copies made of them.
    pub copies: u64,
    /// Packets that were delayed.
    pub delayed_packets: u64,
    /// By how much together, nanoseconds.
    pub delayed_ns: u64,
    /// Packets that were held back.
    pub reordered_packets: u64,
    /// Packets that were lost because they were too long.
    pub too_long_packets: u64,
    /// Packets that went through a line of limited rate.
    pub queued_packets: u64,
    /// Their bytes, as the line counts them.
    pub queued_bytes: u64,
    /// How long they waited for it together, nanoseconds.
    pub queued_ns: u64,
    /// The longest of these waits.
    pub queued_max_ns: u64,
    /// How long the line was busy with them, nanoseconds.
    pub busy_ns: u64,
    /// Packets that were lost because its queue was full.
    pub overflow_packets: u64,
    /// Packets that were marked (ECN).
    pub marked_packets: u64,
    /// Packets that a stall held.
    pub stalled_packets: u64,
    /// Answers sent to cut packets; one for a super-packet.
    pub answered_packets: u64,
    /// Packets of which bits were turned over.
    pub corrupted_packets: u64,
    /// For how long together, nanoseconds.
    pub stalled_ns: u64,
    /// The longest that a packet was delayed, held back and stalled together, nanoseconds.
    pub given_max_ns: u64,
    /// When the first packet matched, `CLOCK_MONOTONIC` in nanoseconds; 0 for never.
    pub first_ns: u64,
    /// When the last packet matched.
    pub last_ns: u64,
}

/// How times are spread, of one rule in both directions: wire packets by [`crate::histogram::bucket`] of
/// nanoseconds.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Histograms {
    /// What the rule itself delayed them by: delay, holding back and stall together.
    pub given: [u64; BUCKETS],
    /// What they waited for its line, from their arrival until their turn.
    pub queued: [u64; BUCKETS],
}

impl Default for Histograms {
    fn default() -> Self {
        Self {
            given: [0; BUCKETS],
            queued: [0; BUCKETS],
        }
    }
}

/// What was seen at a target in one direction, on one CPU, while there were rules. Wire packets.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TargetCounters {
    /// Packets seen.
    pub seen_packets: u64,
    /// Their bytes (a super-packet's headers counted once).
    pub seen_bytes: u64,
    /// Packets that went on.
    pub passed_packets: u64,
    /// Packets that were cut, by however many rules, excess included.
    pub cut_packets: u64,
    /// Packets that could not be parsed, and passed.
    pub unparsed_packets: u64,
    /// Later fragments whose first one was not seen.
    pub orphan_fragments: u64,
    /// Failures of our own; the packet passed, or was cut without the answer that was due.
    pub errors: u64,
    /// Times that a table was full: flows decided anew with each packet, states not kept.
    pub table_full: u64,
    /// Packets that matched a rule while the lease had lapsed.
    pub lapsed_packets: u64,
    /// Flows that matched more rules than one packet can meet.
    pub surplus_rules: u64,
    /// Packets that went into a lane.
    pub lane_packets: u64,
    /// Packets that could not be sent into a lane, and passed.
    pub lane_refused: u64,
}

const _: () = {
    assert!(MAX_SLOTS.is_multiple_of(64) && MAX_EXEMPTIONS.is_multiple_of(64));
    assert!(size_of::<Config>() == 24);
    assert!(size_of::<Target>() == 48);
    assert!(size_of::<Bitmap>() == 144);
    assert!(size_of::<Class>() == 16);
    assert!(size_of::<Prefix>() == 20);
    assert!(size_of::<FlowKey>() == 40 && offset_of!(FlowKey, low_port) == 32);
    assert!(offset_of!(FlowKey, protocol) == 36 && offset_of!(FlowKey, site) == 38);
    assert!(size_of::<FlowEntry>() == 40 + 2 * MAX_CANDIDATES);
    assert!(size_of::<StateKey>() == 48);
    assert!(size_of::<State>() == 24);
    assert!(size_of::<LaneLoad>() == 32);
    assert!(size_of::<Held>() == 32);
    assert!(size_of::<Flushed>() == 16);
    assert!(size_of::<Shape>() == 208);
    assert!(size_of::<Histograms>() == 2 * 8 * BUCKETS);
    assert!(size_of::<Distribution>() == 4 * (DISTRIBUTION_STEPS + 2));
    assert!(size_of::<Connection>() == 16);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<Upper>() == 8);
    assert!(size_of::<RuleEntry>() == 280 && offset_of!(RuleEntry, dscp) == 144);
    assert!(size_of::<RuleCounters>() == 240);
    assert!(size_of::<TargetCounters>() == 96);
};

#[cfg(feature = "user")]
mod pod {
    use super::{
        Bitmap, Class, Config, Connection, Distribution, FlowEntry, FlowKey, Flushed, FragmentKey,
        Held, Histograms, LaneLoad, Prefix, RuleCounters, RuleEntry, Shape, State, StateKey,
        Target, TargetCounters, Upper,
    };

    macro_rules! pod {
        ($($type:ty),+ $(,)?) => {$(
            // SAFETY: `repr(C)`, fixed-width integers only, no padding (sizes asserted above).
            unsafe impl aya::Pod for $type {}
        )+};
    }

    pod!(
        Bitmap,
        Class,
        Config,
        Connection,
        Distribution,
        FlowEntry,
        FlowKey,
        Flushed,
        FragmentKey,
        Held,
        LaneLoad,
        Histograms,
        Prefix,
        RuleCounters,
        RuleEntry,
        Shape,
        State,
        StateKey,
        Target,
        TargetCounters,
        Upper,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_s_load_keeps_packets_and_bytes_apart() {
        let mut load = 0_u64;
        for length in [64, 1514, 65_549] {
            load = load.wrapping_add(lane_load::of(length));
        }
        assert_eq!(lane_load::packets(load), 3);
        assert_eq!(lane_load::bytes(load), 64 + 1514 + 65_549 + 3 * 768);
        for length in [1514, 65_549, 64] {
            load = load.wrapping_sub(lane_load::of(length));
        }
        assert_eq!(load, 0);
        // More left than came: empty, not full.
        load = load.wrapping_sub(lane_load::of(64));
        assert_eq!((lane_load::packets(load), lane_load::bytes(load)), (0, 0));
        load = load.wrapping_add(lane_load::of(64));
        assert_eq!(load, 0);
    }

    #[test]
    fn marks_keep_their_parts_apart() {
        for target in [1, MAX_TARGETS - 1] {
            for direction in [hook::EGRESS, hook::INGRESS] {
                let mark = lane_mark::of(target, direction);
                assert_eq!(mark & (lane_mark::INDEX | lane_mark::CONTROL), 0);
                let all = mark | lane_mark::INDEX | lane_mark::CONTROL;
                assert_eq!(lane_mark::read(all), (target, direction));
            }
        }
    }
}
