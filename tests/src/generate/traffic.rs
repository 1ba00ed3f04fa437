//! Packets of the conversations of a world.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr},
};

use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;

use crate::model::{Hook, Link, Packet};

use super::{
    Extension, Frame, Network, Transport, chance, damage,
    frame::flag::{ACK, CWR, ECE, FIN, PSH, RST, SYN, URG},
    pick,
    world::{Flow, Talk, World},
};

/// TCP flags as they occur, the beginning of connections more often.
const TCP_FLAGS: [u8; 12] = [
    SYN,
    SYN,
    SYN | ACK,
    ACK,
    ACK,
    ACK | PSH,
    ACK | PSH | CWR,
    ACK | FIN,
    ACK | FIN | PSH | CWR,
    RST,
    ACK | URG | PSH,
    SYN | ECE | CWR,
];
/// Numbers of the extension headers that are skipped, apart from fragments and AH.
const LONG_EXTENSIONS: [u8; 6] = [0, 43, 60, 135, 139, 140];
/// The longest payload: `BPF_PROG_TEST_RUN` takes no more.
const LONGEST_PAYLOAD: usize = 3200;
const MORE_FRAGMENTS: u16 = 0x2000;
const DONT_FRAGMENT: u16 = 0x4000;

/// A source of packets.
#[derive(Debug)]
pub(super) struct Traffic<'w> {
    world: &'w World,
    /// Later fragments of packets whose first fragment has been sent or never will be.
    pending: VecDeque<Packet>,
    next_id: u32,
}

impl<'w> Traffic<'w> {
    /// Packets of a world. `first_id` is where the identifications of fragmented packets begin.
    pub(super) fn new(world: &'w World, first_id: u32) -> Self {
        Self {
            world,
            pending: VecDeque::new(),
            next_id: first_id,
        }
    }

    /// The next packet.
    pub(super) fn packet(&mut self, rng: &mut ChaCha8Rng) -> Packet {
        if !self.pending.is_empty() && chance(rng, 50) {
            let index = rng.random_range(0..self.pending.len());
            if let Some(packet) = self.pending.remove(index) {
                return packet;
            }
        }
        let Some(flow) = self
            .world
            .flows
            .get(rng.random_range(0..self.world.flows.len()))
            .copied()
        else {
            return empty();
        };
        // A loopback device has egress only.
        let outgoing = self.world.loopback(flow.target) || chance(rng, 55);
        let hook = if outgoing {
            Hook::Egress
        } else {
            Hook::Ingress
        };
        let link = self.world.link(flow.target);
        // What is routed through a host has its own idea of who is peer.
        let routed = chance(rng, 5);
        let outwards = (hook == Hook::Egress) != routed;
        let mut network = network(rng, flow, outwards, link);
        options(rng, &mut network);
        if chance(rng, 14) {
            self.fragment(rng, &mut network, flow, hook, link);
        }
        let mut packet = frame(rng, network, flow, hook, link);
        match rng.random_range(0..100) {
            0..8 => damage::truncate(rng, &mut packet),
            8..24 => damage::corrupt(rng, &mut packet, link),
            _ => {}
        }
        packet
    }

    /// Makes the first fragment of a packet, and puts later ones aside. Now and then the first one is
    /// late, or never comes.
    fn fragment(
        &mut self,
        rng: &mut ChaCha8Rng,
        network: &mut Network,
        flow: Flow,
        hook: Hook,
        link: Link,
    ) {
        self.next_id = self.next_id.wrapping_add(1);
        // Now and then an identification is used again.
        let id = if chance(rng, 5) {
            self.next_id & !3
        } else {
            self.next_id
        };
        let count = rng.random_range(1..4_u16);
        let mut later = Vec::new();
        match network {
            Network::V4 {
                id: field,
                fragment,
                transport,
                ..
            } => {
                *field = u16::try_from(id & 0xffff).unwrap_or(0);
                *fragment = MORE_FRAGMENTS;
                let number = transport.number(false);
                for index in 1..=count {
                    let mut next = network.clone();
                    if let Network::V4 {
                        fragment,
                        transport,
                        ..
                    } = &mut next
                    {
                        let more = if index == count { 0 } else { MORE_FRAGMENTS };
                        *fragment = more | (index * 64);
                        *transport = Transport::Plain {
                            number,
                            payload: rng.random_range(0..200),
                        };
                    }
                    later.push(next);
                }
            }
            Network::V6 {
                extensions,
                transport,
                ..
            } => {
                let at = rng.random_range(0..=extensions.len());
                let number = match extensions.get(at) {
                    Some(Extension::Long { number, .. }) => *number,
                    Some(Extension::Authentication { .. }) => 51,
                    Some(Extension::Fragment { .. }) => 44,
                    None => transport.number(true),
                };
                // A fragment header alone: an atomic fragment (RFC 6946).
                let more = chance(rng, 85);
                extensions.insert(
                    at,
                    Extension::Fragment {
                        offset: 0,
                        more,
                        id,
                    },
                );
                for index in 1..=count {
                    let mut next = network.clone();
                    if let Network::V6 {
                        extensions,
                        transport,
                        ..
                    } = &mut next
                    {
                        extensions.truncate(at);
                        let more = index != count;
                        extensions.push(Extension::Fragment {
                            offset: index * 64,
                            more,
                            id,
                        });
                        *transport = Transport::Plain {
                            number,
                            payload: rng.random_range(0..200),
                        };
                    }
                    later.push(next);
                }
            }
            Network::Arp { .. } | Network::Other { .. } => return,
        }
        if chance(rng, 15) {
            // An orphan: what would have been the first fragment is lost.
            if let Some(next) = later.pop() {
                *network = next;
            }
        } else if chance(rng, 10)
            && let Some(next) = later.pop()
        {
            // The first fragment is late.
            later.push(std::mem::replace(network, next));
        }
        for next in later {
            // Fragments of a packet that is sent back, or elsewhere, have the same identification.
            let back = chance(rng, 4) && !self.world.loopback(flow.target);
            let hook = match (hook, back) {
                (Hook::Egress, false) | (Hook::Ingress, true) => Hook::Egress,
                _ => Hook::Ingress,
            };
            let packet = frame(rng, next, flow, hook, link);
            self.pending.push_back(packet);
        }
    }
}

fn frame(rng: &mut ChaCha8Rng, mut network: Network, flow: Flow, hook: Hook, link: Link) -> Packet {
    let mut tags = Vec::new();
    if link == Link::Ethernet && chance(rng, 25) {
        let depth = pick(rng, &[1, 1, 1, 2, 2, 3, 4, 5]);
        tags.extend((0..depth).map(|_| pick(rng, &[0x8100_u16, 0x8100, 0x88a8, 0x9100])));
    }
    let (gso_size, gso_segs) = super_packet(rng, &mut network);
    let protocol = network.ethertype();
    let padding = if chance(rng, 8) {
        rng.random_range(1..30)
    } else {
        0
    };
    let frame = Frame {
        ethernet: link == Link::Ethernet,
        tags,
        network,
        padding,
    };
    let mut bytes = frame.bytes();
    if link == Link::Ethernet && chance(rng, 8) {
        // To a group of stations.
        bytes[0] |= 1;
    }
    Packet {
        target: flow.target,
        hook,
        protocol,
        gso_size,
        gso_segs,
        mark: pick(rng, &[0, 0, 0, 1, 0x10, 0x11, 0xff00, 0xdead_beef]),
        bytes,
    }
}

fn empty() -> Packet {
    Packet {
        target: 0,
        hook: Hook::Egress,
        protocol: 0,
        gso_size: 0,
        gso_segs: 0,
        mark: 0,
        bytes: vec![0; 14],
    }
}

fn network(rng: &mut ChaCha8Rng, flow: Flow, outwards: bool, link: Link) -> Network {
    let (from, to) = if outwards {
        (flow.local, flow.peer)
    } else {
        (flow.peer, flow.local)
    };
    let (source, destination) = if outwards {
        (flow.local_port, flow.peer_port)
    } else {
        (flow.peer_port, flow.local_port)
    };
    let payload = match rng.random_range(0..10) {
        0 => 0,
        1..7 => rng.random_range(1..120),
        _ => rng.random_range(120..1460),
    };
    let v6 = from.is_ipv6();
    let transport = match flow.talk {
        Talk::Tcp => Transport::Tcp {
            source,
            destination,
            flags: if chance(rng, 90) {
                pick(rng, &TCP_FLAGS)
            } else {
                rng.random()
            },
            options: pick(rng, &[0, 0, 3, 5, 10]),
            payload,
        },
        Talk::Udp => Transport::Udp {
            source,
            destination,
            payload,
        },
        Talk::Sctp => Transport::Sctp {
            source,
            destination,
            chunk: pick(rng, &[None, Some(1), Some(1), Some(2), Some(0)]),
            payload: if chance(rng, 20) { 0 } else { payload },
        },
        Talk::Echo => Transport::Icmp {
            kind: match (v6, outwards) {
                (false, true) => 8,
                (false, false) => 0,
                (true, true) => 128,
                (true, false) => 129,
            },
            code: 0,
            id: flow.peer_port,
            payload,
        },
        Talk::Icmp => Transport::Icmp {
            kind: if v6 {
                pick(rng, &[1, 2, 3, 130, 138])
            } else {
                pick(rng, &[3, 5, 11, 13, 17])
            },
            code: rng.random_range(0..3),
            id: flow.peer_port,
            payload,
        },
        Talk::Discovery if v6 => Transport::Icmp {
            kind: rng.random_range(133..=137),
            code: 0,
            id: rng.random(),
            payload: payload.min(24),
        },
        Talk::Number(number) => Transport::Plain { number, payload },
        Talk::Other | Talk::Discovery => {
            // Not IP; without a link header there is nothing else to be.
            let plain = Transport::Plain {
                number: 253,
                payload,
            };
            return match (flow.talk, from, to) {
                (Talk::Discovery, IpAddr::V4(sender), IpAddr::V4(target))
                    if link == Link::Ethernet =>
                {
                    arp(rng, sender, target)
                }
                (Talk::Other, ..) if link == Link::Ethernet => Network::Other {
                    ethertype: pick(rng, &[0x88cc, 0x8847, 0x0026, 0x05ff, 0x0600, 0x8863]),
                    length: payload.max(46),
                },
                _ => ip(from, to, plain),
            };
        }
    };
    ip(from, to, transport)
}

fn ip(from: IpAddr, to: IpAddr, transport: Transport) -> Network {
    Network::ip(from, to, transport).unwrap_or(Network::Other {
        ethertype: 0x88b5,
        length: 46,
    })
}

fn arp(rng: &mut ChaCha8Rng, sender: Ipv4Addr, target: Ipv4Addr) -> Network {
    let mut kind = (1, 0x0800, 6, 4);
    match rng.random_range(0..12) {
        0 => kind.0 = 6,
        1 => kind.1 = 0x86dd,
        2 => kind.2 = 8,
        3 => kind.3 = 16,
        _ => {}
    }
    Network::Arp {
        kind,
        sender,
        target,
    }
}

/// Network header fields and headers that do not concern who talks to whom.
fn options(rng: &mut ChaCha8Rng, network: &mut Network) {
    let dscp: u8 = pick(rng, &[0, 0, 0, 8, 10, 46, 63]);
    let ecn = rng.random_range(0..4_u8);
    match network {
        Network::V4 {
            tos,
            options,
            fragment,
            total_length,
            ..
        } => {
            *tos = dscp << 2 | ecn;
            if chance(rng, 20) {
                *options = rng.random_range(1..=10);
            }
            if chance(rng, 50) {
                *fragment = DONT_FRAGMENT;
            }
            if chance(rng, 3) {
                *total_length = Some(pick(rng, &[0, 0, 20, 1500, u16::MAX]));
            }
        }
        Network::V6 {
            class,
            extensions,
            payload_length,
            ..
        } => {
            *class = dscp << 2 | ecn;
            if chance(rng, 30) {
                let count = pick(rng, &[1, 1, 1, 2, 2, 3, 4, 7, 8, 9]);
                extensions.extend((0..count).map(|_| extension(rng)));
            }
            if chance(rng, 3) {
                *payload_length = Some(pick(rng, &[0, 0, 8, 1460, u16::MAX]));
            }
        }
        Network::Arp { .. } | Network::Other { .. } => {}
    }
}

fn extension(rng: &mut ChaCha8Rng) -> Extension {
    match rng.random_range(0..10) {
        0 | 1 => Extension::Authentication {
            units: rng.random_range(0..7),
        },
        // A second fragment header where a packet is fragmented, an atomic fragment elsewhere.
        2 if chance(rng, 20) => Extension::Fragment {
            offset: 0,
            more: chance(rng, 50),
            id: rng.random_range(0..4),
        },
        _ => Extension::Long {
            number: pick(rng, &LONG_EXTENSIONS),
            units: pick(rng, &[0, 0, 0, 1, 2, 7]),
        },
    }
}

/// Makes some packets super-packets.
fn super_packet(rng: &mut ChaCha8Rng, network: &mut Network) -> (u16, u16) {
    let Some(transport) = network.transport_mut() else {
        return if chance(rng, 3) {
            (rng.random_range(10..100), 0)
        } else {
            (0, 0)
        };
    };
    let likely = match transport {
        Transport::Tcp { .. } => 30,
        Transport::Udp { .. } | Transport::Sctp { .. } => 15,
        Transport::Icmp { .. } | Transport::Plain { .. } => 2,
    };
    if !chance(rng, likely) {
        // Without a size the number of segments says nothing.
        return (0, if chance(rng, 5) { 3 } else { 0 });
    }
    let payload = transport.payload_mut();
    if chance(rng, 80) {
        *payload = rng.random_range(1..LONGEST_PAYLOAD);
    }
    let payload = *payload;
    let size: u16 = pick(rng, &[1, 100, 200, 536, 1000, 1448]);
    let segments = u16::try_from(payload.div_ceil(usize::from(size)).max(1)).unwrap_or(u16::MAX);
    match rng.random_range(0..20) {
        // The kernel leaves the count open on some paths.
        0..9 => (size, 0),
        9..17 => (size, segments),
        // A count that does not fit the size.
        17 => (size, rng.random_range(1..6)),
        18 => (size, if chance(rng, 5) { u16::MAX } else { 64 }),
        // GSO_BY_FRAGS.
        _ => (u16::MAX, rng.random_range(0..5)),
    }
}
