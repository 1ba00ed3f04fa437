//! Rules and protect lists about the conversations of a world.

use std::{net::IpAddr, ops::RangeInclusive, time::Duration};

use injector::rules::model::{
    AddrSet, Answer, ConnState, Direction, Fault, Flap, FlowIdentity, IpVersion, MAX_LENGTH_RANGES,
    MAX_MARKS, MAX_PATTERN_BITS, Mark, NetnsRef, Protocol, Rule, Selector, TcpFlags,
};
use injector::rules::shaping::Shaping;
use ipnet::IpNet;
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;

use crate::model::{Exemption, InForce};

use super::{
    chance,
    frame::flag::{ACK, CWR, FIN, PSH, RST, SYN},
    pick,
    world::{Flow, Talk, World},
};

/// Far longer than any test.
const LONG: Duration = Duration::from_hours(1);
/// Longest age of a rule: monotonic time of a machine that has just booted goes back no further.
const OLDEST: u64 = 20;
/// Everything that a 32-bit draw can be is below this.
const WHOLE: u64 = 1 << 32;

/// A rule that asks nothing, under a name.
#[must_use]
pub fn plain_rule(name: &str, fault: Fault) -> Rule {
    Rule {
        name: name.to_owned(),
        name_generated: false,
        group: None,
        netns: NetnsRef::Own,
        interfaces: vec!["eth0".to_owned()],
        selector: Selector::default(),
        fault,
        shaping: Shaping::default(),
        lifetime: None,
        flap: None,
        seed: 0,
        key: FlowIdentity::Tuple,
        all_traffic: true,
        unprotected: false,
    }
}

/// A rule that is for something in this world, in force on some of its targets.
pub(super) fn rule(rng: &mut ChaCha8Rng, world: &World, activation: u32) -> InForce {
    // Most rules are drawn around a conversation, so that they match something.
    let flow = world
        .flows
        .get(rng.random_range(0..world.flows.len().max(1)))
        .copied();
    let mut rule = plain_rule(&format!("rule-{activation}"), fault(rng));
    rule.seed = if chance(rng, 20) { 0 } else { rng.random() };
    rule.key = pick(
        rng,
        &[
            FlowIdentity::Tuple,
            FlowIdentity::Tuple,
            FlowIdentity::Service,
            FlowIdentity::Ordinal,
        ],
    );
    rule.unprotected = chance(rng, 15);
    rule.selector = selector(rng, world, flow);
    if chance(rng, 6) {
        rule.lifetime = Some(if chance(rng, 60) {
            LONG
        } else {
            Duration::from_secs(1)
        });
    }
    if chance(rng, 6) {
        rule.flap = Some(flap(rng));
    }
    let mut targets: Vec<u16> = world
        .targets
        .iter()
        .map(|target| target.slot)
        .filter(|_| chance(rng, 50))
        .collect();
    if let (true, Some(flow)) = (targets.is_empty(), flow) {
        targets.push(flow.target);
    }
    let age = Duration::from_secs(pick(rng, &[0, 5, OLDEST]));
    InForce {
        rule,
        targets,
        activation,
        age,
    }
}

/// A rule for one peer address alone.
pub(super) fn rule_for_peer(
    rng: &mut ChaCha8Rng,
    world: &World,
    activation: u32,
    peer: IpAddr,
) -> InForce {
    let mut entry = rule(rng, world, activation);
    let selector = &mut entry.rule.selector;
    *selector = Selector {
        direction: selector.direction,
        peer: AddrSet {
            include: vec![IpNet::from(peer)],
            except: Vec::new(),
        },
        share: selector.share,
        dscp: std::mem::take(&mut selector.dscp),
        ..Selector::default()
    };
    entry
}

/// An entry of the protect list.
pub(super) fn exemption(rng: &mut ChaCha8Rng, world: &World) -> Exemption {
    let mut entry = Exemption::default();
    let Some(flow) = world
        .flows
        .get(rng.random_range(0..world.flows.len().max(1)))
        .copied()
    else {
        return entry;
    };
    // At least a port or an address, or all would be exempt.
    if chance(rng, 60) {
        entry.peer_port = ports(rng, flow.peer_port);
        if chance(rng, 40) {
            entry.peer = addresses(rng, world, flow.peer);
        }
    } else {
        entry.peer.include = vec![IpNet::from(flow.peer)];
    }
    if chance(rng, 30) {
        entry.local_port = ports(rng, flow.local_port);
    }
    if chance(rng, 30) {
        entry.local = addresses(rng, world, flow.local);
    }
    if chance(rng, 40) {
        entry.protocols = protocols(rng, Some(flow));
    }
    entry
}

fn fault(rng: &mut ChaCha8Rng) -> Fault {
    match rng.random_range(0..24) {
        0..5 => Fault::Cut,
        5..8 => Fault::DropNth(rng.random_range(1..6)),
        8..11 => Fault::DropFirst(rng.random_range(1..5)),
        11..14 => Fault::DropEvery(rng.random_range(1..6)),
        14..18 => {
            let length = match rng.random_range(0..10) {
                0 => MAX_PATTERN_BITS,
                1 => rng.random_range(60..70),
                2 => rng.random_range(1..MAX_PATTERN_BITS),
                _ => rng.random_range(1..12),
            };
            let mut bits: Vec<bool> = (0..length).map(|_| chance(rng, 30)).collect();
            let one = rng.random_range(0..length);
            bits[one] = true;
            Fault::DropPattern {
                bits,
                once: chance(rng, 40),
            }
        }
        18 => Fault::DropOnce,
        19..23 => Fault::Reject(Answer::ALL[rng.random_range(0..Answer::ALL.len())]),
        // Numbers that no flow of a test reaches, or that a narrow type would not hold.
        _ => pick_fault(rng),
    }
}

fn pick_fault(rng: &mut ChaCha8Rng) -> Fault {
    let n = [1 << 16, (1 << 32) + 1, u64::MAX][rng.random_range(0..3)];
    match rng.random_range(0..3) {
        0 => Fault::DropNth(n),
        1 => Fault::DropFirst(n),
        _ => Fault::DropEvery(n),
    }
}

fn flap(rng: &mut ChaCha8Rng) -> Flap {
    // Parts so long that the phase alone decides in which of them a test runs.
    let minutes = Duration::from_mins;
    Flap {
        up: LONG,
        down: LONG,
        phase: [Duration::ZERO, minutes(20), minutes(62), minutes(90)][rng.random_range(0..4)],
    }
}

fn selector(rng: &mut ChaCha8Rng, world: &World, flow: Option<Flow>) -> Selector {
    let mut selector = Selector {
        direction: pick(
            rng,
            &[
                Direction::Both,
                Direction::Both,
                Direction::Egress,
                Direction::Ingress,
            ],
        ),
        ..Selector::default()
    };
    if let Some(flow) = flow {
        addresses_and_ports(rng, world, flow, &mut selector);
    }
    if chance(rng, 35) {
        selector.protocols = protocols(rng, flow);
    }
    if chance(rng, 10) {
        selector.ip_version = Some(if chance(rng, 50) {
            IpVersion::V4
        } else {
            IpVersion::V6
        });
    }
    if chance(rng, 5) {
        selector.icmp_types = subset(rng, &[0, 3, 5, 8, 11, 13]);
        selector.icmpv6_types = subset(rng, &[1, 2, 128, 129, 135, 136]);
    }
    if chance(rng, 12) {
        let mask = pick(
            rng,
            &[
                SYN,
                SYN | ACK,
                FIN,
                PSH,
                CWR,
                RST | FIN,
                FIN | PSH | ACK,
                0xff,
                0,
            ],
        );
        let value = if chance(rng, 30) {
            mask & rng.random::<u8>()
        } else {
            mask
        };
        selector.tcp_flags = Some(TcpFlags { mask, value });
    }
    if chance(rng, 15) {
        selector.length = (0..rng.random_range(1..=MAX_LENGTH_RANGES))
            .map(|_| length_range(rng))
            .collect();
    }
    if chance(rng, 12) {
        selector.dscp = subset(rng, &[0, 8, 10, 46, 63, 1]);
    }
    if chance(rng, 10) {
        selector.marks = (0..rng.random_range(1..=MAX_MARKS))
            .map(|_| {
                let mask = [0xffff_ffff_u32, 0x10, 0xff, 0xff00, 0][rng.random_range(0..5)];
                let value = [0_u32, 1, 0x10, 0x11, 0xff00, 0xdead_beef][rng.random_range(0..6)];
                Mark {
                    value: value & mask,
                    mask,
                }
            })
            .collect();
    }
    if chance(rng, 15) {
        selector.share =
            Some([WHOLE / 4, WHOLE / 2, WHOLE / 4 * 3, WHOLE, 1, 0][rng.random_range(0..6)]);
    }
    if chance(rng, 10) {
        let new = chance(rng, 50);
        selector.state = Some(if new {
            ConnState::New
        } else {
            ConnState::Established
        });
    }
    selector
}

fn addresses_and_ports(rng: &mut ChaCha8Rng, world: &World, flow: Flow, selector: &mut Selector) {
    if chance(rng, 35) {
        selector.peer = addresses(rng, world, flow.peer);
    }
    if chance(rng, 12) {
        selector.local = addresses(rng, world, flow.local);
    }
    let (one, other) = if chance(rng, 50) {
        (flow.peer, flow.local)
    } else {
        (flow.local, flow.peer)
    };
    if chance(rng, 10) {
        selector.src = addresses(rng, world, one);
    }
    if chance(rng, 10) {
        selector.dst = addresses(rng, world, other);
    }
    if chance(rng, 18) {
        selector.peer_port = ports(rng, flow.peer_port);
    }
    if chance(rng, 10) {
        selector.local_port = ports(rng, flow.local_port);
    }
    let (one, other) = if chance(rng, 50) {
        (flow.peer_port, flow.local_port)
    } else {
        (flow.local_port, flow.peer_port)
    };
    if chance(rng, 7) {
        selector.src_port = ports(rng, one);
    }
    if chance(rng, 7) {
        selector.dst_port = ports(rng, other);
    }
}

/// A prefix that holds an address.
fn prefix(rng: &mut ChaCha8Rng, address: IpAddr) -> IpNet {
    let lengths: &[u8] = if address.is_ipv6() {
        &[0, 1, 16, 32, 47, 48, 49, 64, 65, 112, 113, 114, 127, 128]
    } else {
        &[0, 1, 7, 8, 14, 15, 16, 17, 18, 24, 25, 30, 31, 32]
    };
    let length = lengths[rng.random_range(0..lengths.len())];
    // `new` fails on lengths beyond the address alone.
    IpNet::new(address, length).map_or(IpNet::from(address), |prefix| prefix.trunc())
}

/// A set around an address: prefixes of it and of others, with exceptions inside them.
fn addresses(rng: &mut ChaCha8Rng, world: &World, around: IpAddr) -> AddrSet {
    let all: Vec<IpAddr> = world.peers.iter().chain(&world.locals).copied().collect();
    let other = |rng: &mut ChaCha8Rng| all[rng.random_range(0..all.len())];
    let mut set = AddrSet::default();
    if chance(rng, 90) {
        set.include.push(prefix(rng, around));
        for _ in 0..pick(rng, &[0, 0, 1, 2, 4]) {
            let address = other(rng);
            set.include.push(prefix(rng, address));
        }
    } else {
        let address = other(rng);
        set.except.push(prefix(rng, address));
    }
    for _ in 0..pick(rng, &[0, 0, 0, 1, 2]) {
        let address = other(rng);
        let except = prefix(rng, address);
        set.except.push(except);
    }
    if chance(rng, 10) {
        // Inside an exception a narrower prefix is included: the exception still holds.
        set.include.push(IpNet::from(around));
        set.except.push(prefix(rng, around));
    }
    set
}

fn ports(rng: &mut ChaCha8Rng, around: u16) -> Vec<RangeInclusive<u16>> {
    let mut ranges = Vec::new();
    match rng.random_range(0..10) {
        0..5 => ranges.push(around..=around),
        5 => ranges.push(around.saturating_sub(1)..=around),
        6 => ranges.push(around..=around.saturating_add(1)),
        7 => ranges.push(0..=u16::MAX),
        8 => ranges.push(1..=1024),
        _ => ranges.push(around.saturating_add(1)..=u16::MAX),
    }
    for _ in 0..pick(rng, &[0, 0, 1, 3]) {
        let from = pick(rng, &[0, 53, 80, 443, 8000, 32_768, 40_000]);
        ranges.push(from..=from.saturating_add(pick(rng, &[0, 0, 1, 100])));
    }
    ranges
}

fn protocols(rng: &mut ChaCha8Rng, flow: Option<Flow>) -> Vec<Protocol> {
    let all = [
        Protocol::Ip(6),
        Protocol::Ip(17),
        Protocol::Ip(1),
        Protocol::Ip(58),
        Protocol::Ip(132),
        Protocol::Ip(47),
        Protocol::Ip(50),
        Protocol::Ip(51),
        Protocol::Ip(0),
        Protocol::Ip(60),
        Protocol::Ip(255),
        Protocol::Arp,
        Protocol::Nd,
        Protocol::OtherEthertype,
    ];
    let mut list = Vec::new();
    if let (true, Some(flow)) = (chance(rng, 75), flow) {
        let v6 = flow.peer.is_ipv6();
        list.push(match flow.talk {
            Talk::Tcp => Protocol::Ip(6),
            Talk::Udp => Protocol::Ip(17),
            Talk::Sctp => Protocol::Ip(132),
            Talk::Echo | Talk::Icmp => Protocol::Ip(if v6 { 58 } else { 1 }),
            Talk::Discovery if v6 => Protocol::Nd,
            Talk::Discovery => Protocol::Arp,
            Talk::Number(number) => Protocol::Ip(number),
            Talk::Other => Protocol::OtherEthertype,
        });
    }
    for _ in 0..pick(rng, &[0, 0, 1, 2, 5]) {
        list.push(all[rng.random_range(0..all.len())]);
    }
    list.sort_unstable();
    list.dedup();
    list
}

fn length_range(rng: &mut ChaCha8Rng) -> RangeInclusive<u32> {
    match rng.random_range(0..6) {
        0 => 0..=pick(rng, &[40, 60, 100, 576]),
        1 => pick(rng, &[41, 100, 576, 1200])..=1 << 20,
        2 => {
            let from = rng.random_range(20..1600);
            from..=from + rng.random_range(0..200)
        }
        // Wire packets of a segment size that occurs, with the usual headers.
        3 => {
            let size = pick(rng, &[100, 200, 536, 1000, 1448]) + pick(rng, &[28, 40, 52, 60]);
            size..=size
        }
        4 => 1500..=1500,
        _ => 20..=rng.random_range(21..1600),
    }
}

fn subset(rng: &mut ChaCha8Rng, list: &[u8]) -> Vec<u8> {
    list.iter().copied().filter(|_| chance(rng, 40)).collect()
}
