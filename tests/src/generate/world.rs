//! The small world that rules and packets of one scenario are drawn from: a few addresses, ports,
//! targets, and a pool of conversations between them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;

use crate::model::{Link, Target};

use super::{chance, pick};

/// Ports of services.
const SERVICE_PORTS: [u16; 8] = [80, 443, 53, 2379, 6379, 8080, 9000, 40_000];

/// What a conversation speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Talk {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP echo, by identifier (which is the first port).
    Echo,
    /// Other ICMP.
    Icmp,
    /// Neighbour discovery (ARP between IPv4 addresses).
    Discovery,
    /// A protocol that is only a number.
    Number(u8),
    /// An ethertype that is not IP.
    Other,
}

/// A conversation. Its two ends are ends of a target: the peer's and the local one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) target: u16,
    pub(super) peer: IpAddr,
    pub(super) local: IpAddr,
    pub(super) peer_port: u16,
    pub(super) local_port: u16,
    pub(super) talk: Talk,
}

/// The world of one scenario.
#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) targets: Vec<Target>,
    pub(super) peers: Vec<IpAddr>,
    pub(super) locals: Vec<IpAddr>,
    pub(super) flows: Vec<Flow>,
}

/// `BPF_PROG_TEST_RUN` takes the protocol of a packet without link header from its bytes 12 and 13,
/// which belong to the source address: these addresses say IPv4 and IPv6 there.
fn raw_address(rng: &mut ChaCha8Rng, v6: bool) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::new(
            0xfd00,
            1,
            0x86dd,
            0,
            0,
            0,
            0,
            rng.random_range(1..4),
        ))
    } else {
        IpAddr::V4(Ipv4Addr::new(8, 0, 0, rng.random_range(1..5)))
    }
}

fn address(rng: &mut ChaCha8Rng, v6: bool, peer: bool) -> IpAddr {
    let low = rng.random_range(0..4_u8);
    let high = rng.random_range(0..3_u8);
    match (v6, peer) {
        (false, true) => IpAddr::V4(Ipv4Addr::new(10, high, low << 6, low)),
        (false, false) => IpAddr::V4(Ipv4Addr::new(10, 77, 0, low)),
        (true, true) => {
            let high = u16::from(high);
            IpAddr::V6(Ipv6Addr::new(
                0xfd00,
                high,
                0,
                high << 15,
                0,
                0,
                0,
                u16::from(low) << 14,
            ))
        }
        (true, false) => IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, u16::from(low))),
    }
}

impl World {
    /// A world. `first_slot` is the slot of its first target.
    pub(super) fn new(rng: &mut ChaCha8Rng, first_slot: u16) -> Self {
        let mut targets: Vec<Target> = (0..rng.random_range(1..=3))
            .map(|index| Target {
                slot: first_slot + index,
                link: Link::Ethernet,
                loopback: false,
            })
            .collect();
        if let Some(last) = targets.last_mut() {
            match rng.random_range(0..20) {
                0 | 1 => last.link = Link::Raw,
                2 => last.loopback = true,
                _ => {}
            }
        }
        let mut world = Self {
            targets,
            peers: Vec::new(),
            locals: Vec::new(),
            flows: Vec::new(),
        };
        for v6 in [false, true] {
            for _ in 0..6 {
                let peer = address(rng, v6, true);
                world.peers.push(peer);
            }
            for _ in 0..2 {
                let local = address(rng, v6, false);
                world.locals.push(local);
            }
        }
        if chance(rng, 10) {
            world.peers.push(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            world.peers.push(IpAddr::V4(Ipv4Addr::BROADCAST));
            world.peers.push(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        }
        if world.targets.iter().any(|target| target.link == Link::Raw) {
            for v6 in [false, true] {
                world.peers.push(raw_address(rng, v6));
                world.locals.push(raw_address(rng, v6));
            }
        }
        for _ in 0..rng.random_range(4..16) {
            let flow = world.flow(rng);
            world.flows.push(flow);
        }
        // Conversations that differ in one thing only.
        for _ in 0..rng.random_range(0..4) {
            let Some(mut flow) = world
                .flows
                .get(rng.random_range(0..world.flows.len()))
                .copied()
            else {
                continue;
            };
            match rng.random_range(0..5) {
                0 => flow.peer_port = flow.peer_port.wrapping_add(1),
                1 => flow.local_port = flow.local_port.wrapping_add(1),
                2 => std::mem::swap(&mut flow.peer_port, &mut flow.local_port),
                3 => flow.target = pick(rng, &world.slots()),
                _ => flow.talk = talk(rng),
            }
            if world.link(flow.target) == Link::Ethernet {
                world.flows.push(flow);
            }
        }
        world
    }

    fn slots(&self) -> Vec<u16> {
        self.targets.iter().map(|target| target.slot).collect()
    }

    /// What packets of a target begin with.
    pub(super) fn link(&self, slot: u16) -> Link {
        let target = self.targets.iter().find(|target| target.slot == slot);
        target.map_or(Link::Ethernet, |target| target.link)
    }

    /// Whether a target is a loopback device.
    pub(super) fn loopback(&self, slot: u16) -> bool {
        self.targets
            .iter()
            .any(|target| target.slot == slot && target.loopback)
    }

    /// A new conversation of this world.
    fn flow(&self, rng: &mut ChaCha8Rng) -> Flow {
        let v6 = chance(rng, 45);
        let target = pick(rng, &self.slots());
        let (peer, local) = if self.link(target) == Link::Raw {
            (raw_address(rng, v6), raw_address(rng, v6))
        } else {
            (one_of(rng, &self.peers, v6), one_of(rng, &self.locals, v6))
        };
        let service = pick(rng, &SERVICE_PORTS);
        let ephemeral = match rng.random_range(0..20) {
            0 => 0,
            1 => service,
            _ => rng.random_range(32_768..32_772),
        };
        let (peer_port, local_port) = if chance(rng, 60) {
            (service, ephemeral)
        } else {
            (ephemeral, service)
        };
        Flow {
            target,
            peer,
            local,
            peer_port,
            local_port,
            talk: talk(rng),
        }
    }
}

fn talk(rng: &mut ChaCha8Rng) -> Talk {
    match rng.random_range(0..100) {
        0..40 => Talk::Tcp,
        40..60 => Talk::Udp,
        60..66 => Talk::Sctp,
        66..73 => Talk::Echo,
        73..78 => Talk::Icmp,
        78..84 => Talk::Discovery,
        // GRE, ESP, AH, IGMP, UDP-Lite, DCCP; ICMP and ICMPv6 in the other family; no next header.
        84..96 => Talk::Number(pick(rng, &[47, 50, 51, 2, 136, 33, 1, 58, 59, 253])),
        _ => Talk::Other,
    }
}

/// An address of a family from a list.
fn one_of(rng: &mut ChaCha8Rng, list: &[IpAddr], v6: bool) -> IpAddr {
    let family: Vec<IpAddr> = list
        .iter()
        .copied()
        .filter(|address| address.is_ipv6() == v6)
        .collect();
    match family.get(rng.random_range(0..family.len().max(1))) {
        Some(address) => *address,
        None => address(rng, v6, true),
    }
}
