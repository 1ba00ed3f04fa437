//! Selectors, end to end: a rule for each part of the rule language, and packets that it must and must
//! not match, through the hooks of real interfaces.
//!
//! The packets of the table go through a packet socket, so that every bit of them is the test's own;
//! MTU 9000 lets some be so large that the kernel keeps their headers outside of the linear part. Below
//! the table the same is done with ordinary tools: ping, TCP, UDP, ARP and neighbour discovery.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tests::lab::{
    frame::{
        self, ETH_EXPERIMENT, ETH_EXPERIMENT_2, ETH_IPV4, ETH_QINQ, ETH_VLAN, Extension, Layer4,
        Packet, flag,
    },
    injector::{Injector, Mode, RuleCounters, RuleStats},
    packet_socket::{Receiver, Sender, numbers, on_one_cpu},
    tcp,
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, trial},
    udp::Path,
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    const PING: &[Need] = &[Need::Root, Need::Injector, Need::Tool("ping")];
    vec![
        trial("selectors::table_at_egress", NEEDS, || table(Hook::Egress)),
        trial("selectors::table_at_ingress", NEEDS, || {
            table(Hook::Ingress)
        }),
        trial(
            "selectors::packets_that_cannot_be_parsed_pass",
            NEEDS,
            || {
                unparsed(Hook::Egress)?;
                unparsed(Hook::Ingress)
            },
        ),
        trial("selectors::a_syn_is_cut_and_nothing_else", NEEDS, syn),
        trial("selectors::fragments_follow_their_first", PING, fragments),
        trial(
            "selectors::neighbours_are_found_unless_named",
            PING,
            neighbours,
        ),
        trial("selectors::flags_of_the_command_line", NEEDS, command_line),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hook {
    Egress,
    Ingress,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }

    fn of(self, rule: &RuleStats) -> RuleCounters {
        match self {
            Self::Egress => rule.egress,
            Self::Ingress => rule.ingress,
        }
    }
}

/// A packet of the table.
#[derive(Clone)]
enum Probe {
    /// An IP packet.
    Packet(Packet),
    /// An IP packet sent with this firewall mark.
    Marked(Packet, u32),
    /// An ARP request.
    Arp,
    /// A frame of another ethertype.
    Other(u16),
}

/// One row: a selector, and what it is for.
struct Row {
    name: &'static str,
    selector: Value,
    hits: Vec<Probe>,
    misses: Vec<Probe>,
    /// The selector asks for something that does not survive the way to another host.
    egress_only: bool,
    /// The selector takes the ethertype that the marker usually has.
    takes_other: bool,
}

impl Row {
    fn new(name: &'static str, selector: Value, hits: Vec<Packet>, misses: Vec<Packet>) -> Self {
        Self::of_probes(
            name,
            selector,
            hits.into_iter().map(Probe::Packet).collect(),
            misses.into_iter().map(Probe::Packet).collect(),
        )
    }

    fn of_probes(
        name: &'static str,
        selector: Value,
        hits: Vec<Probe>,
        misses: Vec<Probe>,
    ) -> Self {
        Self {
            name,
            selector,
            hits,
            misses,
            egress_only: false,
            takes_other: false,
        }
    }
}

fn ip(text: &str) -> IpAddr {
    // Only literals of this file come here.
    text.parse().unwrap_or(IpAddr::V4([0, 0, 0, 0].into()))
}

const C4: &str = "198.51.100.7";
const S4: &str = "203.0.113.9";
const C6: &str = "2001:db8:1::7";
const S6: &str = "2001:db8:2::9";

/// From a client to a server, IPv4.
fn v4(layer4: Layer4) -> Packet {
    Packet::new(ip(C4), ip(S4), layer4)
}

/// The same, IPv6.
fn v6(layer4: Layer4) -> Packet {
    Packet::new(ip(C6), ip(S6), layer4)
}

fn udp(from: u16, to: u16) -> Packet {
    v4(Layer4::Udp(from, to))
}

fn udp6(from: u16, to: u16) -> Packet {
    v6(Layer4::Udp(from, to))
}

fn tcp(from: u16, to: u16, flags: u8) -> Packet {
    v4(Layer4::Tcp(from, to, flags))
}

fn to(address: &str) -> Packet {
    let from = if address.contains(':') { C6 } else { C4 };
    Packet::new(ip(from), ip(address), Layer4::Udp(1000, 2000))
}

fn from(address: &str) -> Packet {
    let to = if address.contains(':') { S6 } else { S4 };
    Packet::new(ip(address), ip(to), Layer4::Udp(1000, 2000))
}

/// Neighbour solicitation.
const ND: u8 = 135;

#[expect(
    clippy::too_many_lines,
    reason = "a table that is read from top to bottom"
)]
fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new(
            "peer, with an exception in a prefix",
            json!({"peer": ["203.0.113.0/24", "!203.0.113.128/25", "2001:db8:2::/48"]}),
            vec![to("203.0.113.9"), to("203.0.113.127"), to("2001:db8:2::9")],
            vec![
                to("203.0.113.128"),
                to("203.0.112.255"),
                to("2001:db8:3::9"),
                Packet::new(ip("203.0.113.9"), ip("192.0.2.9"), Layer4::Udp(1000, 2000)),
            ],
        ),
        Row::new(
            "peer, a single address and except",
            json!({"peer": ["203.0.113.0/24", "2001:db8:2::9"], "except": ["203.0.113.9"]}),
            vec![to("203.0.113.8"), to("203.0.113.10"), to("2001:db8:2::9")],
            vec![to("203.0.113.9"), to("2001:db8:2::8")],
        ),
        Row::new(
            "local",
            json!({"local": ["198.51.100.0/29", "2001:db8:1::/64"]}),
            vec![from("198.51.100.7"), from("2001:db8:1::1")],
            vec![
                from("198.51.100.8"),
                from("2001:db8:1:1::1"),
                Packet::new(ip("192.0.2.9"), ip("198.51.100.7"), Layer4::Udp(1000, 2000)),
            ],
        ),
        Row::new(
            "src and dst together",
            json!({"src": ["198.51.100.7", "2001:db8:1::7"], "dst": ["203.0.113.0/28", "2001:db8:2::/124"]}),
            vec![to("203.0.113.15"), to("2001:db8:2::f")],
            vec![
                to("203.0.113.16"),
                from("198.51.100.6"),
                to("2001:db8:2::10"),
            ],
        ),
        Row::new(
            "overlapping prefixes and a host in them",
            json!({"dst": ["203.0.0.0/16", "203.0.113.9", "!203.0.113.0/24"]}),
            vec![to("203.0.112.9")],
            vec![to("203.0.113.9"), to("203.0.113.10")],
        ),
        Row::new(
            "ports and ranges at the peer",
            json!({"peer_port": ["80", "8000-8080"]}),
            vec![
                udp(5, 80),
                udp(5, 8000),
                tcp(5, 8040, flag::ACK),
                udp6(5, 8080),
                v4(Layer4::Sctp(5, 80, 0)),
                v6(Layer4::Tcp(5, 80, flag::SYN)),
            ],
            vec![
                udp(5, 79),
                udp(5, 81),
                udp(80, 5),
                tcp(5, 7999, flag::ACK),
                udp6(5, 8081),
                v4(Layer4::Icmp(8, 80)),
                v4(Layer4::Other(47)),
            ],
        ),
        Row::new(
            "ports at the local side",
            json!({"local_port": ["53", "1024-65535"]}),
            vec![udp(53, 5), udp(1024, 5), tcp(65535, 5, 0)],
            vec![udp(1023, 53), tcp(54, 53, 0), udp(0, 53)],
        ),
        Row::new(
            "source and destination port",
            json!({"src_port": ["1000-1999"], "dst_port": ["443"], "proto": ["tcp", "udp"]}),
            vec![udp(1500, 443), tcp(1000, 443, flag::ACK), udp6(1999, 443)],
            vec![
                udp(443, 1500),
                udp(999, 443),
                tcp(1000, 444, flag::ACK),
                v4(Layer4::Sctp(1500, 443, 0)),
            ],
        ),
        Row::new(
            "protocols by name",
            json!({"proto": ["tcp", "icmp"]}),
            vec![
                tcp(1, 2, 0),
                v6(Layer4::Tcp(1, 2, 0)),
                v4(Layer4::Icmp(8, 1)),
            ],
            vec![
                udp(1, 2),
                udp6(1, 2),
                v6(Layer4::Icmp(128, 1)),
                v4(Layer4::Sctp(1, 2, 0)),
            ],
        ),
        Row::new(
            "protocols by number",
            json!({"proto": ["47", "132", "icmpv6"]}),
            vec![
                v4(Layer4::Other(47)),
                v6(Layer4::Other(47)),
                v4(Layer4::Sctp(1, 2, 1)),
                v6(Layer4::Icmp(128, 1)),
            ],
            vec![
                udp(1, 2),
                v4(Layer4::Icmp(8, 1)),
                v4(Layer4::Other(50)),
                v6(Layer4::Icmp(ND, 0)),
            ],
        ),
        Row::new(
            "IP version 4",
            json!({"ip_version": 4, "all_traffic": true}),
            vec![udp(1, 2), v4(Layer4::Other(99))],
            vec![udp6(1, 2), v6(Layer4::Other(99))],
        ),
        Row::new(
            "IP version 6",
            json!({"ip_version": 6, "all_traffic": true}),
            vec![udp6(1, 2), v6(Layer4::Other(99))],
            vec![udp(1, 2), v6(Layer4::Icmp(ND, 0))],
        ),
        Row::new(
            "ICMP type by name, both versions",
            json!({"icmp_type": ["echo-request"]}),
            vec![v4(Layer4::Icmp(8, 7)), v6(Layer4::Icmp(128, 7))],
            vec![
                v4(Layer4::Icmp(0, 7)),
                v6(Layer4::Icmp(129, 7)),
                v4(Layer4::Icmp(3, 0)),
                v6(Layer4::Icmp(ND, 0)),
                udp(8, 8),
            ],
        ),
        Row::new(
            "TCP flags",
            json!({"tcp_flags": "syn,!ack"}),
            vec![
                tcp(1, 2, flag::SYN),
                v6(Layer4::Tcp(1, 2, flag::SYN | flag::PSH)),
            ],
            vec![
                tcp(1, 2, flag::SYN | flag::ACK),
                tcp(1, 2, flag::ACK),
                tcp(1, 2, 0),
                udp(1, 2),
            ],
        ),
        Row::new(
            "TCP flags, a connection's end",
            json!({"tcp_flags": "rst", "proto": ["tcp"]}),
            vec![tcp(1, 2, flag::RST), tcp(1, 2, flag::RST | flag::ACK)],
            vec![tcp(1, 2, flag::FIN | flag::ACK), tcp(1, 2, flag::ACK)],
        ),
        Row::new(
            "length, from and up to",
            json!({"length": ["-50", "100", "1400-"]}),
            vec![
                udp(1, 2).length(50),
                udp(1, 2).length(40),
                udp(1, 2).length(100),
                udp(1, 2).length(1400),
                udp(1, 2).length(8000),
                udp6(1, 2).length(100),
                udp6(1, 2).length(1400),
                udp(1, 2).length(100).tagged(&[(ETH_VLAN, 3)]),
            ],
            vec![
                udp(1, 2).length(51),
                udp(1, 2).length(99),
                udp(1, 2).length(101),
                udp(1, 2).length(1399),
                udp6(1, 2).length(1399),
            ],
        ),
        Row::new(
            "DSCP",
            json!({"dscp": ["ef", "10"]}),
            vec![
                udp(1, 2).dscp(46),
                udp(1, 2).dscp(10),
                udp6(1, 2).dscp(46),
                udp6(1, 2).dscp(10),
            ],
            vec![
                udp(1, 2),
                udp(1, 2).dscp(45),
                udp6(1, 2).dscp(47),
                udp6(1, 2),
            ],
        ),
        Row::new(
            "VLAN tags in the packet",
            json!({"dst_port": ["2000"], "src": [C4, C6]}),
            vec![
                udp(1, 2000).tagged(&[(ETH_VLAN, 5)]),
                udp(1, 2000).tagged(&[(ETH_QINQ, 5), (ETH_VLAN, 6)]),
                udp6(1, 2000).tagged(&[(ETH_VLAN, 5)]),
                udp(1, 2000).tagged(&[(ETH_QINQ, 1), (ETH_QINQ, 2), (ETH_VLAN, 3), (ETH_VLAN, 4)]),
            ],
            vec![
                udp(1, 2001).tagged(&[(ETH_VLAN, 5)]),
                udp6(1, 2001).tagged(&[(ETH_QINQ, 5), (ETH_VLAN, 6)]),
            ],
        ),
        Row::new(
            "IPv4 options",
            json!({"dst_port": ["2000"]}),
            vec![
                udp(1, 2000).options(4),
                udp(1, 2000).options(40),
                tcp(1, 2000, flag::ACK).options(12),
            ],
            vec![udp(2000, 1).options(4), udp(1, 2001).options(40)],
        ),
        Row::new(
            "IPv6 extension headers",
            json!({"dst_port": ["2000"]}),
            vec![
                udp6(1, 2000).extensions(&[Extension::HopByHop]),
                udp6(1, 2000).extensions(&[
                    Extension::HopByHop,
                    Extension::Destination(24),
                    Extension::Routing,
                ]),
                v6(Layer4::Tcp(1, 2000, flag::ACK)).extensions(&[Extension::Destination(8)]),
            ],
            vec![
                udp6(1, 2001).extensions(&[Extension::HopByHop]),
                udp6(2000, 1).extensions(&[Extension::Destination(64)]),
            ],
        ),
        Row::new(
            "headers outside of the linear part",
            json!({"dst_port": ["2000"], "proto": ["udp", "tcp"]}),
            vec![
                udp(1, 2000).length(6000),
                udp6(1, 2000).length(8000),
                tcp(1, 2000, flag::ACK).length(8900),
                udp(1, 2000)
                    .length(8000)
                    .options(40)
                    .tagged(&[(ETH_VLAN, 9)]),
                udp6(1, 2000)
                    .length(8000)
                    .extensions(&[Extension::Destination(248)]),
            ],
            vec![udp(1, 2001).length(6000), udp6(1, 2001).length(8000)],
        ),
        Row::new(
            "IPv4 fragments follow their first",
            json!({"dst_port": ["2000"]}),
            vec![
                udp(1, 2000).length(600).fragment(71, 0, true),
                udp(1, 2000).length(600).fragment(71, 576, true),
                udp(1, 2000).fragment(71, 1152, false),
            ],
            vec![
                udp(1, 2001).length(600).fragment(72, 0, true),
                udp(1, 2001).fragment(72, 576, false),
                // Its first was never seen.
                udp(1, 2000).fragment(73, 576, false),
            ],
        ),
        Row::new(
            "IPv6 fragments follow their first",
            json!({"dst_port": ["2000"]}),
            vec![
                udp6(1, 2000).length(600).fragment(0x0007_0001, 0, true),
                udp6(1, 2000).length(600).fragment(0x0007_0001, 576, true),
                udp6(1, 2000)
                    .extensions(&[Extension::HopByHop])
                    .length(600)
                    .fragment(0x0007_0002, 0, true),
                udp6(1, 2000)
                    .extensions(&[Extension::HopByHop])
                    .fragment(0x0007_0002, 576, false),
            ],
            vec![
                udp6(1, 2001).length(600).fragment(0x0008_0001, 0, true),
                udp6(1, 2001).fragment(0x0008_0001, 576, false),
                udp6(1, 2000).fragment(0x0009_0001, 576, false),
            ],
        ),
        Row::new(
            "established connections",
            json!({"state": "established", "dst": [S4], "dst_port": ["3000"], "proto": ["tcp"]}),
            vec![
                tcp(40, 3000, flag::ACK),
                tcp(40, 3000, flag::ACK | flag::PSH),
            ],
            vec![
                tcp(41, 3000, flag::SYN),
                tcp(41, 3000, flag::ACK),
                tcp(41, 3000, flag::FIN | flag::ACK),
            ],
        ),
        Row::new(
            "new connections",
            json!({"state": "new", "dst": [S4], "dst_port": ["3001"]}),
            vec![
                tcp(41, 3001, flag::SYN),
                tcp(41, 3001, flag::ACK),
                udp(42, 3001),
                udp(42, 3001),
            ],
            vec![tcp(40, 3001, flag::ACK), tcp(40, 3001, flag::ACK)],
        ),
        Row::new(
            "everything at once",
            json!({
                "src": [C4], "dst": ["203.0.113.0/24"], "except": ["203.0.113.1"],
                "dst_port": ["5000-5010"], "src_port": ["1-9"], "proto": ["tcp"],
                "tcp_flags": "ack", "length": ["100-200"], "dscp": ["af11"], "ip_version": 4,
            }),
            vec![tcp(5, 5005, flag::ACK).dscp(10).length(150)],
            vec![
                tcp(10, 5005, flag::ACK).dscp(10).length(150),
                tcp(5, 5011, flag::ACK).dscp(10).length(150),
                tcp(5, 5005, flag::SYN).dscp(10).length(150),
                tcp(5, 5005, flag::ACK).dscp(11).length(150),
                tcp(5, 5005, flag::ACK).dscp(10).length(99),
                udp(5, 5005).dscp(10).length(150),
            ],
        ),
    ];
    let everyday = || {
        vec![
            Probe::Arp,
            Probe::Packet(v6(Layer4::Icmp(ND, 0))),
            Probe::Other(ETH_EXPERIMENT_2),
        ]
    };
    rows.push(Row::of_probes(
        "all traffic leaves ARP, neighbour discovery and other ethertypes alone",
        json!({"all_traffic": true}),
        [
            udp(1, 2),
            tcp(3, 4, 0),
            udp6(1, 2),
            v4(Layer4::Other(99)),
            v4(Layer4::Icmp(8, 1)),
        ]
        .map(Probe::Packet)
        .to_vec(),
        everyday(),
    ));
    rows.push(Row::of_probes(
        "ARP where it is named",
        json!({"proto": ["arp"]}),
        vec![Probe::Arp],
        vec![
            Probe::Packet(udp(1, 2)),
            Probe::Packet(v6(Layer4::Icmp(ND, 0))),
            Probe::Other(ETH_EXPERIMENT_2),
        ],
    ));
    rows.push(Row::of_probes(
        "ARP for one address",
        json!({"proto": ["arp"], "dst": ["10.88.0.2"]}),
        vec![Probe::Arp],
        vec![Probe::Packet(Packet::new(
            ip("10.88.0.1"),
            ip("10.88.0.2"),
            Layer4::Udp(1, 2),
        ))],
    ));
    rows.push(Row::of_probes(
        "neighbour discovery where it is named",
        json!({"proto": ["nd"]}),
        [133, 134, ND, 136, 137]
            .map(|kind| Probe::Packet(v6(Layer4::Icmp(kind, 0))))
            .to_vec(),
        vec![
            Probe::Packet(v6(Layer4::Icmp(128, 0))),
            Probe::Packet(v6(Layer4::Icmp(138, 0))),
            Probe::Packet(v4(Layer4::Icmp(ND, 0))),
            Probe::Arp,
        ],
    ));
    rows.push(Row {
        takes_other: true,
        ..Row::of_probes(
            "other ethertypes where they are named",
            json!({"proto": ["other"]}),
            vec![Probe::Other(ETH_EXPERIMENT), Probe::Other(ETH_EXPERIMENT_2)],
            vec![
                Probe::Packet(udp(1, 2)),
                Probe::Arp,
                Probe::Packet(udp6(1, 2)),
            ],
        )
    });
    rows.push(Row {
        egress_only: true,
        ..Row::of_probes(
            "firewall marks",
            json!({"mark": ["0x10/0xf0", "7"]}),
            vec![Probe::Marked(udp(1, 2), 0x1f), Probe::Marked(udp6(1, 2), 7)],
            vec![
                Probe::Marked(udp(1, 2), 0x20),
                Probe::Marked(udp(1, 2), 6),
                Probe::Packet(udp(1, 2)),
            ],
        )
    });
    rows
}

/// A rule as seen from the other end of the wire: what is local there is the peer here.
fn mirrored(selector: &Value) -> Value {
    let mut mirrored = serde_json::Map::new();
    for (name, value) in selector.as_object().into_iter().flatten() {
        let name = match name.as_str() {
            "peer" => "local",
            "local" => "peer",
            "peer_port" => "local_port",
            "local_port" => "peer_port",
            // `except` is about the peer, which is the packet's source here.
            same => same,
        };
        mirrored.insert(name.to_owned(), value.clone());
    }
    // An exception belongs to the peer: put it where the peer went.
    if let Some(Value::Array(except)) = mirrored.remove("except") {
        let place = if selector.get("peer").is_some() {
            "local"
        } else {
            "dst"
        };
        if let Some(list) = mirrored.get_mut(place).and_then(Value::as_array_mut) {
            for one in except {
                list.push(json!(format!("!{}", one.as_str().unwrap_or_default())));
            }
        }
    }
    Value::Object(mirrored)
}

/// Everything that sends and looks.
struct Bench<'a> {
    lab: &'a Lab,
    sender: Sender,
    receiver: Receiver,
    next: u32,
}

impl<'a> Bench<'a> {
    fn open(lab: &'a Lab) -> Result<Self> {
        Ok(Self {
            lab,
            sender: Sender::open(&lab.a().ns)?,
            receiver: Receiver::open(&lab.b().ns)?,
            next: 1,
        })
    }

    /// Sends frames made from fresh numbers; returns which of them (by position) were lost.
    fn lost(
        &mut self,
        count: usize,
        marker: u16,
        mut send: impl FnMut(&Sender, usize, u32) -> Result<()>,
    ) -> Result<BTreeSet<usize>> {
        let first = self.next;
        let last = first + u32::try_from(count)?;
        self.next = last + 1;
        on_one_cpu(|| {
            for (index, number) in (first..last).enumerate() {
                send(&self.sender, index, number)?;
            }
            let end = if marker == ETH_IPV4 {
                Packet::new(ip("192.0.2.1"), ip("192.0.2.2"), Layer4::Other(254)).frame(last)
            } else {
                frame::raw(&[], marker, &[], last)
            };
            self.sender.send(&end)
        })?;
        let arrived = numbers(&self.receiver.until(last, Duration::from_secs(10))?);
        Ok((first..last)
            .enumerate()
            .filter(|(_, number)| !arrived.contains(number))
            .map(|(index, _)| index)
            .collect())
    }

    fn lost_probes(&mut self, probes: &[Probe], marker: u16) -> Result<BTreeSet<usize>> {
        let (a, b) = (self.lab.a().clone(), self.lab.b().clone());
        self.lost(
            probes.len(),
            marker,
            |sender, index, number| match &probes[index] {
                Probe::Packet(packet) => sender.send(&packet.frame(number)),
                Probe::Marked(packet, mark) => {
                    sender.mark(*mark)?;
                    sender.send(&packet.frame(number))?;
                    sender.mark(0)
                }
                Probe::Arp => sender.send(&frame::arp(&a, &b, number)),
                Probe::Other(ethertype) => {
                    sender.send(&frame::raw(&[], *ethertype, &[0; 40], number))
                }
            },
        )
    }
}

fn place(lab: &Lab, hook: Hook) -> &Node {
    match hook {
        Hook::Egress => lab.a(),
        Hook::Ingress => lab.b(),
    }
}

fn table(hook: Hook) -> Result<()> {
    let lab = Lab::pair_with_mtu(9000)?;
    let injector = Injector::started(&[])?;
    let mut bench = Bench::open(&lab)?;
    let mut wrong = Vec::new();
    let rows = rows();
    let mut packets = 0;
    for row in rows
        .iter()
        .filter(|row| hook == Hook::Egress || !row.egress_only)
    {
        let marker = if row.takes_other {
            ETH_IPV4
        } else {
            ETH_EXPERIMENT
        };
        let probes: Vec<Probe> = row.hits.iter().chain(&row.misses).cloned().collect();
        packets += probes.len();
        // The fragments' memory is per target and lives longer than a rule: what a row calls unseen
        // must be unseen, so nothing is sent before the rule is there.
        let mut rule = match hook {
            Hook::Egress => row.selector.clone(),
            Hook::Ingress => mirrored(&row.selector),
        };
        rule["name"] = json!("row");
        rule["netns"] = json!(place(&lab, hook).netns());
        rule["iface"] = json!(["eth0"]);
        rule["direction"] = json!(hook.name());
        rule["fault"] = json!({"cut": true});
        injector.json(&["heal", "--all"])?;
        injector
            .apply(&[rule.clone()], Mode::Replace)
            .with_context(|| row.name)?;
        let lost = bench
            .lost_probes(&probes, marker)
            .with_context(|| row.name)?;
        let expected: BTreeSet<usize> = (0..row.hits.len()).collect();
        let stats = injector.stats()?;
        let found = stats.rule("row")?;
        let counters = hook.of(found);
        let count = u64::try_from(row.hits.len())?;
        if lost != expected || counters.matched_packets != count || counters.cut_packets != count {
            wrong.push(format!(
                "{}: of {} hits and {} misses lost {lost:?}; {counters:?}; rule {rule}",
                row.name,
                row.hits.len(),
                row.misses.len()
            ));
        }
        let target = stats.target(place(&lab, hook).netns(), "eth0")?;
        if target.egress.errors + target.ingress.errors > 0 {
            wrong.push(format!(
                "{}: errors of the injector's own: {target:?}",
                row.name
            ));
        }
    }
    report(format!(
        "{} rows, {packets} packets at {}",
        rows.len(),
        hook.name()
    ));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Without any rule the same packets all arrive: none was lost for another reason.
    injector.heal_all()?;
    for row in &rows {
        let marker = if row.takes_other {
            ETH_IPV4
        } else {
            ETH_EXPERIMENT
        };
        let probes: Vec<Probe> = row.hits.iter().chain(&row.misses).cloned().collect();
        let lost = bench.lost_probes(&probes, marker)?;
        ensure!(
            lost.is_empty(),
            "{}: lost without a rule: {lost:?}",
            row.name
        );
    }
    Ok(())
}

/// What it is, its ethertype, its VLAN tags, its bytes.
type Nonsense = (&'static str, u16, Vec<(u16, u16)>, Vec<u8>);

/// Nonsense passes, and is counted.
fn unparsed(hook: Hook) -> Result<()> {
    let lab = Lab::pair_with_mtu(9000)?;
    let injector = Injector::started(&[])?;
    let mut bench = Bench::open(&lab)?;
    // On arrival the kernel takes the outermost off: five are left.
    let tags: Vec<(u16, u16)> = (1..=6).map(|id| (ETH_QINQ, id)).collect();
    let whole = udp(1, 2).frame(0);
    let header = &whole[14..];
    let tcp_header = tcp(1, 2, flag::ACK).frame(0);
    let no_words = {
        // Data offset 4: shorter than a TCP header can be.
        let mut bytes = tcp_header[14..54].to_vec();
        bytes[32] = 4 << 4;
        bytes
    };
    let version_5 = {
        let mut bytes = header[..28].to_vec();
        bytes[0] = 0x55;
        bytes
    };
    let short_ihl = {
        let mut bytes = header[..28].to_vec();
        bytes[0] = 0x44;
        bytes
    };
    let long_ihl = {
        let mut bytes = header[..20].to_vec();
        bytes[0] = 0x4f;
        bytes
    };
    let six = udp6(1, 2).frame(0);
    // The number at a frame's end is 8 bytes long: a header that is cut short is at least as long.
    let frames: Vec<Nonsense> = vec![
        ("8 bytes of IPv4", 0x0800, vec![], vec![]),
        ("19 bytes of IPv4", 0x0800, vec![], header[..11].to_vec()),
        (
            "an IPv4 header and no UDP header of 8",
            0x0800,
            vec![],
            header[..19].to_vec(),
        ),
        ("39 bytes of IPv6", 0x86dd, vec![], six[14..45].to_vec()),
        ("a version of 5", 0x0800, vec![], version_5),
        ("a header length of 4 words", 0x0800, vec![], short_ihl),
        ("options that are not there", 0x0800, vec![], long_ihl),
        ("a TCP header of 4 words", 0x0800, vec![], no_words),
        ("too many VLAN tags", 0x0800, tags, header.to_vec()),
    ];
    injector.apply(
        &[json!({
            "name": "all",
            "netns": place(&lab, hook).netns(),
            "iface": ["eth0"],
            "direction": hook.name(),
            "all_traffic": true,
            "fault": {"cut": true},
        })],
        Mode::Replace,
    )?;
    let lost = bench.lost(frames.len(), ETH_EXPERIMENT, |sender, index, number| {
        let (_, ethertype, tags, bytes) = &frames[index];
        sender.send(&frame::raw(tags, *ethertype, bytes, number))
    })?;
    let lost: Vec<&str> = lost.into_iter().map(|index| frames[index].0).collect();
    ensure!(
        lost.is_empty(),
        "{hook:?}: cut although not parsed: {lost:?}"
    );
    let stats = injector.stats()?;
    let target = stats.target(place(&lab, hook).netns(), "eth0")?;
    let counters = match hook {
        Hook::Egress => target.egress,
        Hook::Ingress => target.ingress,
    };
    report(format!(
        "{hook:?}: {} of {} frames counted as unparsed",
        counters.unparsed_packets,
        frames.len()
    ));
    let expected = u64::try_from(frames.len())?;
    ensure!(
        counters.unparsed_packets == expected,
        "{hook:?}: {expected} frames cannot be parsed, counted: {counters:?}"
    );
    ensure!(counters.cut_packets == 0, "{hook:?}: {counters:?}");
    Ok(())
}

/// Connecting fails, connections that exist and those from the other side do not notice.
fn syn() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let within = Duration::from_secs(10);
    let mut before = tcp::Connection::open(a, b, 5200, within)?;
    injector.add(&format!(
        "syn --netns {} --iface eth0 --to {} --proto tcp --tcp-flags syn,!ack --cut",
        a.netns(),
        b.v4
    ))?;
    let listener = tcp::listen(&b.ns, b.at(5201))?;
    let refused = tcp::connect(&a.ns, b.at(5201), Duration::from_millis(400));
    ensure!(refused.is_err(), "connected although every SYN is cut");
    drop(listener);
    ensure!(before.works(within)?, "a connection that existed was hurt");
    let mut other = tcp::Connection::open(b, a, 5202, within)?;
    ensure!(
        other.works(within)?,
        "a connection from the other side was hurt"
    );
    let stats = injector.stats()?;
    let rule = stats.rule("syn")?;
    ensure!(
        rule.egress.cut_packets >= 1 && rule.egress.cut_packets == rule.egress.matched_packets,
        "{rule:?}"
    );
    injector.heal_all()?;
    let mut after = tcp::Connection::open(a, b, 5201, within)?;
    ensure!(after.works(within)?, "healed, and connecting fails");
    Ok(())
}

/// Fragments that the kernel makes itself.
fn fragments() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    injector.apply(
        &[
            json!({"name": "echo", "netns": a.netns(), "iface": ["eth0"], "direction": "egress",
                   "icmp_type": ["echo-request"], "fault": {"cut": true}}),
            json!({"name": "port", "netns": b.netns(), "iface": ["eth0"], "direction": "ingress",
                   "dst_port": ["7001"], "proto": ["udp"], "fault": {"cut": true}}),
        ],
        Mode::Replace,
    )?;
    for target in b.addresses() {
        let ping = |from: &Node, to: IpAddr| {
            from.ns
                .try_tool(&format!("ping -c 2 -i 0.05 -W 1 -s 3000 -q {to}"))
        };
        let there = ping(a, target)?;
        ensure!(
            there.code() == Some(1) && there.stdout.contains("100% packet loss"),
            "pinged into a cut: {}",
            there.describe()
        );
        // The way back carries echo replies, fragments too, which the rule is not for.
        let source = if target.is_ipv4() {
            IpAddr::V4(a.v4)
        } else {
            IpAddr::V6(a.v6)
        };
        ping(b, source)?
            .success()
            .context("pings from the other side")?;
    }
    let stats = injector.stats()?;
    let echo = stats.rule("echo")?.egress;
    // 3,008 bytes of ICMP in packets of at most 1,500: three pieces each, two pings, two versions.
    ensure!(
        echo.cut_packets == 12 && echo.matched_packets == 12,
        "pieces of pings: {echo:?}"
    );

    for mut path in [Path::new(a, 7000, b, 7001)?, Path::new6(a, 7000, b, 7001)?] {
        let lost = path.lost(1..=5)?;
        ensure!(lost.len() == 5, "lost {lost:?}");
    }
    let small = injector.stats()?.rule("port")?.ingress.cut_packets;
    for (socket, to) in [(a.at(7002), b.at(7001)), (a.at6(7002), b.at6(7001))] {
        let socket = tests::lab::udp::socket(&a.ns, socket)?;
        for _ in 0..4 {
            socket.send_to(&[7; 4000], to)?;
        }
    }
    wait_until("all pieces are cut", Duration::from_secs(5), || {
        let rule = injector.stats()?;
        let cut = rule.rule("port")?.ingress.cut_packets - small;
        // 4,008 bytes of UDP: three pieces each.
        ensure!(cut <= 24, "more than all pieces: {cut}");
        Ok(cut == 24)
    })?;
    let stats = injector.stats()?;
    for node in [a, b] {
        let target = stats.target(node.netns(), "eth0")?;
        ensure!(
            target.egress.orphan_fragments + target.ingress.orphan_fragments == 0,
            "pieces without their first one: {target:?}"
        );
    }
    Ok(())
}

/// ARP and neighbour discovery go on under a rule for everything, and fail where they are named.
fn neighbours() -> Result<()> {
    let lab = Lab::pair()?;
    lab.free_neighbours()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let found = |address: IpAddr| -> Result<bool> {
        let text =
            a.ns.tool(&format!("ip neigh show {address} dev eth0"))?
                .stdout;
        Ok(text.contains("lladdr"))
    };
    let ask = |address: IpAddr| -> Result<()> {
        a.ns.try_tool(&format!("ip neigh del {address} dev eth0"))?;
        a.ns.try_tool(&format!("ping -c 1 -W 1 -q {address}"))
            .map(drop)
    };
    injector.add(&format!(
        "all --netns {} --iface eth0 --all-traffic --cut",
        a.netns()
    ))?;
    for address in b.addresses() {
        ask(address)?;
        wait_until("a neighbour is found", Duration::from_secs(10), || {
            found(address)
        })?;
    }
    for (protocol, address) in [("arp", IpAddr::V4(b.v4)), ("nd", IpAddr::V6(b.v6))] {
        injector.heal_all()?;
        injector.add(&format!(
            "name --netns {} --iface eth0 --proto {protocol} --cut",
            a.netns()
        ))?;
        ask(address)?;
        ensure!(
            !found(address)?,
            "{protocol} is cut, and {address} was found"
        );
        let stats = injector.stats()?;
        ensure!(
            stats.rule("name")?.egress.cut_packets > 0,
            "{protocol}: {stats:?}"
        );
    }
    injector.heal_all()?;
    for address in b.addresses() {
        ask(address)?;
        wait_until("a neighbour is found", Duration::from_secs(10), || {
            found(address)
        })?;
    }
    Ok(())
}

/// The same rules as flags and as a file: what `list --json` prints of both is the same.
fn command_line() -> Result<()> {
    let lab = Lab::pair()?;
    let a = lab.a().netns();
    let injector = Injector::started(&[])?;
    let cases = [
        (
            "--to 10.0.0.0/8,!10.1.0.0/16 --peer-port 80,8000-8080 --proto tcp --cut",
            json!({"direction": "egress", "peer": ["10.0.0.0/8", "!10.1.0.0/16"],
                   "peer_port": ["80", "8000-8080"], "proto": ["tcp"], "fault": {"cut": true}}),
        ),
        (
            "--from 10.0.0.1 --except 10.0.0.2 --local-port 53 --cut",
            json!({"direction": "ingress", "peer": ["10.0.0.1"], "except": ["10.0.0.2"],
                   "local_port": ["53"], "fault": {"cut": true}}),
        ),
        (
            "--peer fd00::/8 --local fd88::1 --flows 25% --seed 7 --drop-nth 5",
            json!({"peer": ["fd00::/8"], "local": ["fd88::1"], "flows": "25%", "seed": 7,
                   "fault": {"drop_nth": 5}}),
        ),
        (
            "--src 10.0.0.1 --dst 10.0.0.2 --src-port 1 --dst-port 2 --proto udp --drop-first 3",
            json!({"src": ["10.0.0.1"], "dst": ["10.0.0.2"], "src_port": ["1"], "dst_port": ["2"],
                   "proto": ["udp"], "fault": {"drop_first": 3}}),
        ),
        (
            "--tcp-flags syn,!ack --length 1400- --dscp ef --mark 0x10/0xff --state new --drop-every 10",
            json!({"tcp_flags": "syn,!ack", "length": ["1400-"], "dscp": ["ef"],
                   "mark": ["0x10/0xff"], "state": "new", "fault": {"drop_every": 10}}),
        ),
        (
            "--icmp-type echo-request --flap up=3s,down=500ms --for 30s --drop-pattern 0010",
            json!({"icmp_type": ["echo-request"], "flap": "up=3s,down=500ms", "for": "30s",
                   "fault": {"drop_pattern": "0010"}}),
        ),
        (
            "--peer 10.0.0.1 --key service --ip-version 4 --drop-once",
            json!({"peer": ["10.0.0.1"], "key": "service", "ip_version": 4,
                   "fault": {"drop_once": true}}),
        ),
        (
            "--all-traffic --cut",
            json!({"all_traffic": true, "fault": {"cut": true}}),
        ),
    ];
    let listed = || -> Result<Value> {
        let mut specs: Vec<Value> = injector.json(&["list"])?["rules"]
            .as_array()
            .context("list prints no rules")?
            .iter()
            .map(|rule| rule.get("spec").unwrap_or(rule).clone())
            .collect();
        for spec in &mut specs {
            // Drawn at random where not given.
            if let Some(fields) = spec.as_object_mut() {
                fields.remove("seed");
            }
        }
        Ok(Value::Array(specs))
    };
    let mut rules = Vec::new();
    for (index, (flags, spec)) in cases.into_iter().enumerate() {
        let name = format!("case-{index}");
        injector
            .add(&format!("{name} --netns {a} --iface eth0 {flags}"))
            .with_context(|| flags)?;
        let mut spec = spec;
        spec["name"] = json!(name);
        spec["netns"] = json!(a);
        spec["iface"] = json!(["eth0"]);
        rules.push(spec);
    }
    let by_flags = listed()?;
    injector.heal_all()?;
    injector.apply(&rules, Mode::Add)?;
    let by_file = listed()?;
    ensure!(
        by_flags == by_file,
        "by flags: {by_flags:#}\nby file: {by_file:#}"
    );
    // What list prints, apply takes, and finds that nothing changes.
    let printed = injector.json(&["list"])?;
    injector.try_apply(&printed, Mode::Replace)?.success()?;
    let again = injector.json(&["list"])?;
    ensure!(
        printed["rules"] == again["rules"]
            || listed()? == by_file && same_activations(&printed, &again),
        "applying what list printed changed the rules: {printed:#}\n{again:#}"
    );
    Ok(())
}

fn same_activations(one: &Value, other: &Value) -> bool {
    let activations = |list: &Value| -> Vec<Value> {
        list["rules"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|rule| rule["activation"].clone())
            .collect()
    };
    activations(one) == activations(other)
}
