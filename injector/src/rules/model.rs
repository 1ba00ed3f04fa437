//! The validated form of a rule: what the text of a command line, a file or a request becomes, once,
//! at the edge. A value of these types cannot hold a wrong rule; everything below the rule language
//! takes nothing else.

use std::{ops::RangeInclusive, time::Duration};

use ipnet::IpNet;

use super::shaping::Shaping;

/// One rule: which packets, what happens to them, for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Unique among the rules of one daemon. Enters the random stream, so it is part of repeatability.
    pub name: String,
    /// Whether the name was derived from the rule's content rather than given.
    pub name_generated: bool,
    /// Rules made together by one command (`partition`) carry its name here, and can be healed by it.
    pub group: Option<String>,
    /// The network namespace that the interfaces are in.
    pub netns: NetnsRef,
    /// Interface names, at least one, without duplicates.
    pub interfaces: Vec<String>,
    /// Which packets.
    pub selector: Selector,
    /// Which of them are lost, by their position.
    pub fault: Fault,
    /// What else happens to them, in a lane.
    pub shaping: Shaping,
    /// How long the rule acts, from activation. `None`: until healed.
    pub lifetime: Option<Duration>,
    /// On and off in turn.
    pub flap: Option<Flap>,
    /// Seed of the rule's random stream.
    pub seed: u64,
    /// What counts as one flow for counting and for the random stream.
    pub key: FlowIdentity,
    /// The user said that this rule may match all traffic of an interface.
    pub all_traffic: bool,
    /// The rule also acts on what the protect list exempts.
    pub unprotected: bool,
}

impl Rule {
    /// Whether the wire packets of a super-packet may differ in whether the rule is for them, or in their fates. (What
    /// is rejected is answered once, at the hook.)
    #[must_use]
    pub fn tells_packets_apart(&self) -> bool {
        let by_fault = match self.fault {
            Fault::Reject(_) => false,
            Fault::Cut | Fault::None => self.selector.tells_packets_apart(),
            _ => true,
        };
        by_fault || self.shaping.tells_packets_apart()
    }
}

/// A network namespace, as named by a user.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NetnsRef {
    /// The namespace of the daemon itself.
    Own,
    /// A name below /run/netns, as `ip netns` makes them.
    Name(String),
    /// A file: a bind mount of a namespace, or /proc/PID/ns/net.
    Path(std::path::PathBuf),
    /// The namespace of a process.
    Pid(u32),
}

/// Which packets a rule is for. All parts must hold; within a list one entry suffices; an empty list
/// asks nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selector {
    /// Direction as seen at the target.
    pub direction: Direction,
    /// Destination on egress, source on ingress.
    pub peer: AddrSet,
    /// Source on egress, destination on ingress.
    pub local: AddrSet,
    /// Source address of the packet.
    pub src: AddrSet,
    /// Destination address of the packet.
    pub dst: AddrSet,
    /// Port at the peer (destination port on egress, source port on ingress).
    pub peer_port: Vec<RangeInclusive<u16>>,
    /// Port at the local side.
    pub local_port: Vec<RangeInclusive<u16>>,
    /// Source port of the packet.
    pub src_port: Vec<RangeInclusive<u16>>,
    /// Destination port of the packet.
    pub dst_port: Vec<RangeInclusive<u16>>,
    /// Protocols. Empty: every IP protocol, but not ARP, not IPv6 neighbour discovery and no other
    /// ethertype: those match only where they are named.
    pub protocols: Vec<Protocol>,
    /// IPv4 or IPv6 only.
    pub ip_version: Option<IpVersion>,
    /// ICMP types (IPv4, protocol 1).
    pub icmp_types: Vec<u8>,
    /// ICMPv6 types.
    pub icmpv6_types: Vec<u8>,
    /// TCP flags.
    pub tcp_flags: Option<TcpFlags>,
    /// Length in bytes of the IP packet on the wire (header and payload, what an MTU is compared with);
    /// at most [`MAX_LENGTH_RANGES`] ranges.
    pub length: Vec<RangeInclusive<u32>>,
    /// DSCP code points, 0 to 63.
    pub dscp: Vec<u8>,
    /// Firewall marks (`skb->mark`), at most [`MAX_MARKS`].
    pub marks: Vec<Mark>,
    /// Share of conversations, as a threshold from 0 to 2^32: a flow is in if the 32-bit hash of its
    /// canonical key is below. The same in both directions, and sticky.
    pub share: Option<u64>,
    /// New or established connections only.
    pub state: Option<ConnState>,
}

/// The longest IP packet, in bytes, that a length range may name.
pub const MAX_LENGTH: u32 = 1 << 20;
/// At most so many length ranges in one rule.
pub const MAX_LENGTH_RANGES: usize = 4;
/// At most so many firewall marks in one rule.
pub const MAX_MARKS: usize = 4;
/// At most so many bits in a drop pattern.
pub const MAX_PATTERN_BITS: usize = 256;

/// Direction of a packet as seen at the target interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Direction {
    /// Leaving through the interface.
    Egress,
    /// Arriving at the interface.
    Ingress,
    /// Both.
    #[default]
    Both,
}

/// A set of addresses: in any of `include` and in none of `except`. With an empty `include` every
/// address is included; with both empty the set asks nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct AddrSet {
    /// Prefixes in the set (host bits zero).
    pub include: Vec<IpNet>,
    /// Prefixes taken out of it again, whatever includes them.
    pub except: Vec<IpNet>,
}

impl AddrSet {
    /// Whether the set asks nothing at all.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.include.is_empty() && self.except.is_empty()
    }
}

/// A protocol that a rule can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// An IP protocol number (TCP 6, UDP 17, ICMP 1, ICMPv6 58 without neighbour discovery, SCTP 132).
    Ip(u8),
    /// ARP.
    Arp,
    /// IPv6 neighbour discovery: ICMPv6 types 133 to 137.
    Nd,
    /// Every ethertype that is none of IPv4, IPv6 and ARP.
    OtherEthertype,
}

/// IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// TCP flags: `flags & mask == value`, bits as in the header's 14th byte (FIN 1, SYN 2, RST 4, PSH 8,
/// ACK 16, URG 32, ECE 64, CWR 128).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TcpFlags {
    /// Bits that must be as in `value`.
    pub mask: u8,
    /// Their values.
    pub value: u8,
}

impl Selector {
    /// Whether it may take some wire packets of a super-packet and not others: the last may be shorter, and only the
    /// last has FIN and PSH, only the first CWR (`tcp_gso_segment` in the kernel).
    fn tells_packets_apart(&self) -> bool {
        const FIN_PSH_CWR: u8 = 0x89;
        !self.length.is_empty()
            || self
                .tcp_flags
                .is_some_and(|flags| flags.mask & FIN_PSH_CWR != 0)
    }
}

/// A firewall mark: `mark & mask == value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mark {
    /// Value after masking.
    pub value: u32,
    /// Mask.
    pub mask: u32,
}

/// Whether a connection began under the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConnState {
    /// Its SYN (SCTP: INIT; otherwise its first packet) was seen since the rule's activation.
    New,
    /// Anything else.
    Established,
}

/// What counts as one flow: for the numbers n that positional faults go by, and in the key of the
/// random stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum FlowIdentity {
    /// Protocol, both addresses, both ports.
    #[default]
    Tuple,
    /// The same without the ephemeral port (the higher of the two): all connections of a client to a
    /// service are one flow.
    Service,
    /// The k-th connection of a client to a service, k in order of first sight since activation:
    /// repeatable although ephemeral ports differ from run to run. Counted per connection.
    Ordinal,
}

/// What happens to the packets of a rule. Positions count, per flow and direction, the wire packets
/// that matched since the rule was activated, from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Every packet is lost.
    Cut,
    /// The n-th packet of each flow is lost; n is at least 1.
    DropNth(u64),
    /// The first n packets of each flow are lost; n is at least 1.
    DropFirst(u64),
    /// Every n-th packet of each flow is lost; n is at least 1.
    DropEvery(u64),
    /// Packets at the positions of a 1 are lost; the pattern repeats, or is played once.
    DropPattern {
        /// 1 to [`MAX_PATTERN_BITS`] positions, at least one of them true.
        bits: Vec<bool>,
        /// Played once instead of over and over.
        once: bool,
    },
    /// One shot: the first packet that matches the rule, in whichever flow and direction, is lost, and
    /// no other.
    DropOnce,
    /// Every packet is lost, and its sender gets an answer where one may be given.
    Reject(Answer),
    /// None is lost for its position.
    None,
}

/// What a rejected packet is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// A TCP reset.
    Rst,
    /// ICMP host unreachable; ICMPv6 address unreachable.
    IcmpHost,
    /// ICMP or ICMPv6 port unreachable.
    IcmpPort,
    /// ICMP or ICMPv6 communication administratively prohibited.
    IcmpAdmin,
}

impl Answer {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Rst, Self::IcmpHost, Self::IcmpPort, Self::IcmpAdmin];

    /// Its name, as users write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rst => "rst",
            Self::IcmpHost => "icmp-host",
            Self::IcmpPort => "icmp-port",
            Self::IcmpAdmin => "icmp-admin",
        }
    }
}

/// A link that flaps: up (the fault does not act), then down (it acts), over and over, beginning with
/// up at activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flap {
    /// Time in which the fault does not act; more than zero.
    pub up: Duration,
    /// Time in which it acts; more than zero.
    pub down: Duration,
    /// How far into the cycle activation falls; less than `up + down`.
    pub phase: Duration,
}
