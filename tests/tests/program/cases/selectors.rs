//! Selectors: which packets a rule is for.

use super::{
    Case, ConnState, Cut, Direction, Duration, Exemption, FAR, Fault, FlowIdentity, InForce,
    IpVersion, Mark, NEAR, NEAR_6, Network, Packet, Pass, Protocol, Rule, SECOND, Selector,
    TcpFlags, Transport, Unparsed, back, between, counts, cut_off, flag, flags,
    fragments::v4_fragment, icmp, in_force, out, peers, plain_rule, protocols, rule, set, tagged,
    tcp, to_port, udp, v4, v6,
};

pub(super) fn protocol_classes() -> Vec<Case> {
    let case = |selector| Case::new(vec![rule(Fault::Cut, selector)]);
    let ip = Protocol::Ip;
    let lldp = || {
        out(Network::Other {
            ethertype: 0x88cc,
            length: 46,
        })
    };
    let llc = || {
        out(Network::Other {
            ethertype: 0x0026,
            length: 46,
        })
    };
    let gre = || {
        out(v4(Transport::Plain {
            number: 47,
            payload: 8,
        }))
    };
    vec![
        // Nothing named: every IP protocol, and nothing else.
        case(Selector::default())
            .packet(out(v4(tcp(1, 80))), Cut)
            .packet(out(v6(udp(1, 80))), Cut)
            .packet(gre(), Cut)
            .packet(out(v6(icmp(128))), Cut)
            .packet(out(v6(icmp(133))), Pass)
            .packet(out(v6(icmp(137))), Pass)
            .packet(out(v6(icmp(132))), Cut)
            .packet(out(v6(icmp(138))), Cut)
            .packet(lldp(), Pass)
            .packet(llc(), Pass),
        case(protocols(&[Protocol::OtherEthertype]))
            .packet(lldp(), Cut)
            .packet(llc(), Cut)
            .packet(out(v4(tcp(1, 80))), Pass),
        case(protocols(&[Protocol::Nd]))
            .packet(out(v6(icmp(135))), Cut)
            .packet(out(v6(icmp(128))), Pass)
            .packet(out(v4(icmp(135))), Pass),
        case(protocols(&[ip(58)]))
            .packet(out(v6(icmp(128))), Cut)
            .packet(out(v6(icmp(135))), Pass)
            .packet(
                out(v4(Transport::Plain {
                    number: 58,
                    payload: 0,
                })),
                Cut,
            ),
        // ICMP in IPv6 is a number like any other: nothing of it need be there.
        case(protocols(&[ip(1)]))
            .packet(out(v4(icmp(8))), Cut)
            .packet(
                out(v6(Transport::Plain {
                    number: 1,
                    payload: 0,
                })),
                Cut,
            ),
        case(protocols(&[ip(6), ip(47)]))
            .packet(out(v4(tcp(1, 80))), Cut)
            .packet(gre(), Cut)
            .packet(out(v4(udp(1, 80))), Pass),
        case(Selector {
            ip_version: Some(IpVersion::V4),
            ..Selector::default()
        })
        .packet(out(v4(tcp(1, 80))), Cut)
        .packet(out(v6(tcp(1, 80))), Pass),
        case(Selector {
            ip_version: Some(IpVersion::V6),
            ..protocols(&[Protocol::Nd, Protocol::Arp, ip(6)])
        })
        .packet(out(v6(icmp(135))), Cut)
        .packet(out(v6(tcp(1, 80))), Cut)
        .packet(out(v4(tcp(1, 80))), Pass),
    ]
}

pub(super) fn arp() -> Vec<Case> {
    let who_has = |kind| Network::Arp {
        kind,
        sender: NEAR.parse().unwrap(),
        target: FAR.parse().unwrap(),
    };
    let ethernet = (1, 0x0800, 6, 4);
    let all = || Case::new(vec![rule(Fault::Cut, protocols(&[Protocol::Arp]))]);
    let to_far = || {
        let selector = Selector {
            peer: set(&["10.0.0.2/32"], &[]),
            ..protocols(&[Protocol::Arp])
        };
        Case::new(vec![rule(Fault::Cut, selector)])
    };
    let mut cases = vec![
        all().packet(out(who_has(ethernet)), Cut),
        Case::new(vec![rule(Fault::Cut, Selector::default())]).packet(out(who_has(ethernet)), Pass),
        to_far()
            .packet(out(who_has(ethernet)), Cut)
            .packet(back(who_has(ethernet)), Pass),
    ];
    // Other hardware, protocols and lengths: ARP, but without addresses.
    for kind in [
        (6, 0x0800, 6, 4),
        (1, 0x86dd, 6, 4),
        (1, 0x0800, 8, 4),
        (1, 0x0800, 6, 16),
    ] {
        cases.push(all().packet(out(who_has(kind)), Cut));
        cases.push(to_far().packet(out(who_has(kind)), Pass));
    }
    for length in 0..28 {
        let fate = if length < 8 { Unparsed } else { Cut };
        cases.push(all().packet(cut_off(who_has(ethernet), length), fate));
        let fate = if length < 8 { Unparsed } else { Pass };
        cases.push(to_far().packet(cut_off(who_has(ethernet), length), fate));
    }
    cases
}

pub(super) fn addresses() -> Vec<Case> {
    let to = |address: &str| {
        let near = if address.contains(':') { NEAR_6 } else { NEAR };
        out(between(near, address, tcp(1, 80)))
    };
    let case = |selector| Case::new(vec![rule(Fault::Cut, selector)]);
    vec![
        case(peers(&["10.0.0.0/8"], &["10.1.0.0/16"]))
            .packet(to("10.0.255.255"), Cut)
            .packet(to("10.1.0.0"), Pass)
            .packet(to("10.1.255.255"), Pass)
            .packet(to("10.2.0.0"), Cut)
            .packet(to("9.255.255.255"), Pass)
            .packet(to("11.0.0.0"), Pass)
            .packet(to("fd00::2"), Pass),
        // An exception holds whatever includes the address, a narrower prefix too.
        case(peers(&["10.0.0.0/8", "10.1.2.3/32"], &["10.1.0.0/16"]))
            .packet(to("10.1.2.3"), Pass)
            .packet(to("10.2.2.3"), Cut),
        // Exceptions alone: everything else, of both families.
        case(peers(&[], &["10.0.0.0/8"]))
            .packet(to("10.1.2.3"), Pass)
            .packet(to("192.0.2.1"), Cut)
            .packet(to("fd00::2"), Cut),
        // All of one family is not all of the other.
        case(peers(&["0.0.0.0/0"], &[]))
            .packet(to("192.0.2.1"), Cut)
            .packet(to("fd00::2"), Pass),
        case(peers(&["::/0"], &[]))
            .packet(to("192.0.2.1"), Pass)
            .packet(to("fd00::2"), Cut),
        case(peers(&["fd00::/16", "192.0.2.0/25"], &["fd00:0:0:1::/64"]))
            .packet(to("fd00::2"), Cut)
            .packet(to("fd00:0:0:1::2"), Pass)
            .packet(to("fd00:0:0:2::2"), Cut)
            .packet(to("fd01::"), Pass)
            .packet(to("192.0.2.127"), Cut)
            .packet(to("192.0.2.128"), Pass),
        // Peer and source are two different questions.
        case(Selector {
            src: set(&["10.77.0.0/16"], &[]),
            ..peers(&["10.0.0.0/16"], &[])
        })
        .packet(out(v4(tcp(1, 80))), Cut)
        .packet(back(v4(tcp(1, 80))), Pass)
        .packet(back(between(FAR, NEAR, tcp(80, 1))), Pass),
    ]
}

pub(super) fn directions() -> Vec<Case> {
    let going = |direction| Selector {
        direction,
        ..peers(&["10.0.0.2/32"], &[])
    };
    let case = |selector| Case::new(vec![rule(Fault::Cut, selector)]);
    let there = || out(between(NEAR, FAR, tcp(40_000, 80)));
    let reply = || back(between(FAR, NEAR, tcp(80, 40_000)));
    vec![
        case(going(Direction::Both))
            .packet(there(), Cut)
            .packet(reply(), Cut),
        case(going(Direction::Egress))
            .packet(there(), Cut)
            .packet(reply(), Pass),
        case(going(Direction::Ingress))
            .packet(there(), Pass)
            .packet(reply(), Cut),
        case(Selector {
            peer_port: vec![80..=80],
            ..Selector::default()
        })
        .packet(there(), Cut)
        .packet(reply(), Cut)
        .packet(back(between(NEAR, FAR, tcp(40_000, 80))), Pass),
        case(Selector {
            local_port: vec![40_000..=40_000],
            ..Selector::default()
        })
        .packet(there(), Cut)
        .packet(reply(), Cut),
        case(to_port(80)).packet(there(), Cut).packet(reply(), Pass),
        case(Selector {
            src_port: vec![80..=80],
            ..Selector::default()
        })
        .packet(there(), Pass)
        .packet(reply(), Cut),
        case(Selector {
            local: set(&["10.77.0.1/32"], &[]),
            ..Selector::default()
        })
        .packet(there(), Cut)
        .packet(reply(), Cut)
        .packet(out(between(FAR, NEAR, tcp(1, 1))), Pass),
        // Elsewhere the rule is not.
        Case::new(vec![InForce {
            targets: vec![SECOND],
            ..rule(Fault::Cut, Selector::default())
        }])
        .packet(there(), Pass)
        .packet(
            Packet {
                target: SECOND,
                ..there()
            },
            Cut,
        ),
    ]
}

pub(super) fn ports() -> Vec<Case> {
    let case = |list: &[(u16, u16)]| {
        let dst_port = list.iter().map(|(from, to)| *from..=*to).collect();
        Case::new(vec![rule(
            Fault::Cut,
            Selector {
                dst_port,
                ..Selector::default()
            },
        )])
    };
    let sctp = |destination| Transport::Sctp {
        source: 1,
        destination,
        chunk: Some(0),
        payload: 4,
    };
    vec![
        case(&[(80, 80), (8000, 8080)])
            .packet(out(v4(tcp(1, 79))), Pass)
            .packet(out(v4(tcp(1, 80))), Cut)
            .packet(out(v4(tcp(1, 81))), Pass)
            .packet(out(v4(udp(1, 7999))), Pass)
            .packet(out(v4(udp(1, 8000))), Cut)
            .packet(out(v6(sctp(8080))), Cut)
            .packet(out(v6(sctp(8081))), Pass),
        case(&[(0, 0), (65_535, 65_535)])
            .packet(out(v4(tcp(1, 0))), Cut)
            .packet(out(v4(tcp(1, 1))), Pass)
            .packet(out(v4(tcp(1, 65_534))), Pass)
            .packet(out(v4(tcp(1, 65_535))), Cut),
        // Every port is still a port: what has none does not match.
        case(&[(0, 65_535)])
            .packet(out(v4(udp(0, 0))), Cut)
            .packet(out(v4(icmp(8))), Pass)
            .packet(
                out(v4(Transport::Plain {
                    number: 47,
                    payload: 20,
                })),
                Pass,
            )
            .packet(
                out(v4_fragment(
                    3,
                    9,
                    Transport::Plain {
                        number: 17,
                        payload: 20,
                    },
                )),
                Pass,
            ),
        // An orphan has the flow of a packet between two ports zero, but no port.
        case(&[(0, 0)])
            .packet(
                out(v4_fragment(
                    3,
                    9,
                    Transport::Plain {
                        number: 17,
                        payload: 20,
                    },
                )),
                Pass,
            )
            .packet(out(v4(udp(0, 0))), Cut)
            .packet(
                out(v4_fragment(
                    3,
                    9,
                    Transport::Plain {
                        number: 17,
                        payload: 20,
                    },
                )),
                Pass,
            ),
    ]
}

pub(super) fn icmp_types() -> Vec<Case> {
    let case = |icmp_types: &[u8], icmpv6_types: &[u8], protocols: &[Protocol]| {
        Case::new(vec![rule(
            Fault::Cut,
            Selector {
                icmp_types: icmp_types.to_vec(),
                icmpv6_types: icmpv6_types.to_vec(),
                protocols: protocols.to_vec(),
                ..Selector::default()
            },
        )])
    };
    vec![
        case(&[8, 3], &[], &[])
            .packet(out(v4(icmp(8))), Cut)
            .packet(out(v4(icmp(3))), Cut)
            .packet(out(v4(icmp(0))), Pass)
            .packet(out(v6(icmp(8))), Pass)
            .packet(out(v4(tcp(1, 80))), Pass),
        case(&[8], &[128], &[])
            .packet(out(v4(icmp(8))), Cut)
            .packet(out(v6(icmp(128))), Cut),
        case(&[], &[128], &[])
            .packet(out(v4(icmp(128))), Pass)
            .packet(out(v6(icmp(128))), Cut)
            .packet(out(v6(icmp(129))), Pass),
        // Discovery has ICMPv6 types, where it is named.
        case(&[], &[135], &[]).packet(out(v6(icmp(135))), Pass),
        case(&[], &[135], &[Protocol::Nd])
            .packet(out(v6(icmp(135))), Cut)
            .packet(out(v6(icmp(136))), Pass),
    ]
}

pub(super) fn tcp_flags() -> Vec<Case> {
    let case = |mask, value| {
        let tcp_flags = Some(TcpFlags { mask, value });
        Case::new(vec![rule(
            Fault::Cut,
            Selector {
                tcp_flags,
                ..Selector::default()
            },
        )])
    };
    let (syn, ack) = (flag::SYN, flag::ACK);
    vec![
        case(syn | ack, syn)
            .packet(out(v4(flags(syn))), Cut)
            .packet(out(v4(flags(syn | flag::ECE | flag::CWR))), Cut)
            .packet(out(v4(flags(syn | ack))), Pass)
            .packet(out(v4(flags(0))), Pass)
            .packet(out(v6(flags(syn))), Cut)
            .packet(out(v4(udp(1, 80))), Pass),
        case(0xff, flag::CWR | ack)
            .packet(out(v4(flags(flag::CWR | ack))), Cut)
            .packet(out(v4(flags(ack))), Pass),
        case(flag::RST, 0)
            .packet(out(v4(flags(ack))), Cut)
            .packet(out(v4(flags(flag::RST))), Pass),
        // Nothing asked of the flags still asks for flags.
        case(0, 0)
            .packet(out(v4(flags(0))), Cut)
            .packet(out(v4(udp(1, 80))), Pass),
    ]
}

pub(super) fn length_dscp_mark() -> Vec<Case> {
    let case = |selector| Case::new(vec![rule(Fault::Cut, selector)]);
    let lengths = |list: &[(u32, u32)]| Selector {
        length: list.iter().map(|(from, to)| *from..=*to).collect(),
        ..Selector::default()
    };
    let of = |payload| Transport::Udp {
        source: 1,
        destination: 2,
        payload,
    };
    let class = |byte| {
        let mut network = v6(tcp(1, 80));
        if let Network::V6 { class, .. } = &mut network {
            *class = byte;
        }
        out(network)
    };
    let tos = |byte| {
        let mut network = v4(tcp(1, 80));
        if let Network::V4 { tos, .. } = &mut network {
            *tos = byte;
        }
        out(network)
    };
    let dscp = |list: &[u8]| Selector {
        dscp: list.to_vec(),
        ..Selector::default()
    };
    let marked = |mark| Packet {
        mark,
        ..out(v4(tcp(1, 80)))
    };
    let marks = |list: &[(u32, u32)]| Selector {
        marks: list
            .iter()
            .map(|(value, mask)| Mark {
                value: *value,
                mask: *mask,
            })
            .collect(),
        ..Selector::default()
    };
    vec![
        // IPv4: 28 bytes of headers; IPv6: 48.
        case(lengths(&[(100, 200), (1500, 1500)]))
            .packet(out(v4(of(71))), Pass)
            .packet(out(v4(of(72))), Cut)
            .packet(out(v4(of(172))), Cut)
            .packet(out(v4(of(173))), Pass)
            .packet(out(v6(of(51))), Pass)
            .packet(out(v6(of(52))), Cut)
            .packet(out(v4(of(1472))), Cut)
            .packet(tagged(&[0x8100], v4(of(1472))), Cut)
            .packet(out(v6(of(1453))), Pass),
        // ECN is no part of the DSCP.
        case(dscp(&[46, 0]))
            .packet(tos(46 << 2 | 3), Cut)
            .packet(tos(3), Cut)
            .packet(tos(10 << 2), Pass)
            .packet(class(46 << 2 | 1), Cut)
            .packet(class(47 << 2), Pass)
            .packet(
                out(Network::Other {
                    ethertype: 0x88cc,
                    length: 46,
                }),
                Pass,
            ),
        case(marks(&[(0x10, 0xff), (0xdead_0000, 0xffff_0000)]))
            .packet(marked(0), Pass)
            .packet(marked(0x10), Cut)
            .packet(marked(0x110), Cut)
            .packet(marked(0x11), Pass)
            .packet(marked(0xdead_beef), Cut),
        case(marks(&[(0, u32::MAX)]))
            .packet(marked(0), Cut)
            .packet(marked(1), Pass),
    ]
}

pub(super) fn share() -> Vec<Case> {
    let shared = |share: u64, key| {
        let selector = Selector {
            share: Some(share),
            ..Selector::default()
        };
        let rule = Rule {
            selector,
            seed: 42,
            key,
            ..plain_rule("r1", Fault::Cut)
        };
        Case::new(vec![in_force(rule, 1)])
    };
    let there = |port| out(between("10.0.0.1", "10.0.0.2", tcp(port, 80)));
    let reply = |port| back(between("10.0.0.2", "10.0.0.1", tcp(80, port)));
    // Draws computed with another implementation: of the flow with port 40,000 0xdeda68bd, of its
    // service 0x88521861, of the first and the second connection to it 0x70c31cd9 and 0xc1c638d1.
    let mut cases = vec![
        shared(0, FlowIdentity::Tuple).packet(there(40_000), Pass),
        shared(1 << 32, FlowIdentity::Tuple).packet(there(40_000), Cut),
    ];
    for (key, draw) in [
        (FlowIdentity::Tuple, 0xdeda_68bd_u64),
        (FlowIdentity::Service, 0x8852_1861),
    ] {
        cases.push(
            shared(draw, key)
                .packet(there(40_000), Pass)
                .packet(reply(40_000), Pass),
        );
        cases.push(
            shared(draw + 1, key)
                .packet(there(40_000), Cut)
                .packet(reply(40_000), Cut),
        );
    }
    // By order of appearance, whatever the ports are; each keeps its number.
    for (first, second) in [(40_000, 50_000), (50_000, 40_000)] {
        cases.push(
            shared(0x8000_0000, FlowIdentity::Ordinal)
                .packet(there(first), Cut)
                .packet(there(second), Pass)
                .packet(reply(first), Cut)
                .packet(reply(second), Pass)
                .packet(there(first), Cut),
        );
    }
    cases
}

pub(super) fn state() -> Vec<Case> {
    let asking = |state| Selector {
        state: Some(state),
        ..Selector::default()
    };
    let new = || Case::new(vec![rule(Fault::Cut, asking(ConnState::New))]);
    let old = || Case::new(vec![rule(Fault::Cut, asking(ConnState::Established))]);
    let syn = || out(v4(flags(flag::SYN)));
    let syn_ack = || {
        back(between(
            FAR,
            NEAR,
            Transport::Tcp {
                source: 80,
                destination: 40_000,
                flags: flag::SYN | flag::ACK,
                options: 0,
                payload: 0,
            },
        ))
    };
    let ack = || out(v4(flags(flag::ACK)));
    let sctp = |chunk| {
        out(v4(Transport::Sctp {
            source: 1,
            destination: 2,
            chunk,
            payload: 4,
        }))
    };
    let datagram = || out(v4(udp(1, 2)));
    let later = |activation| {
        let rule = Rule {
            selector: asking(ConnState::New),
            ..plain_rule("later", Fault::Cut)
        };
        InForce {
            age: Duration::ZERO,
            ..in_force(rule, activation)
        }
    };
    vec![
        new()
            .packet(ack(), Pass)
            .packet(syn(), Cut)
            .packet(syn_ack(), Cut)
            .packet(ack(), Cut),
        old()
            .packet(ack(), Cut)
            .packet(syn(), Pass)
            .packet(syn_ack(), Pass)
            .packet(ack(), Pass),
        // A SYN with ACK begins nothing.
        new().packet(syn_ack(), Pass).packet(ack(), Pass),
        // SCTP begins with INIT; without any chunk to be seen it does not.
        new()
            .packet(sctp(Some(2)), Pass)
            .packet(sctp(None), Pass)
            .packet(sctp(Some(1)), Cut)
            .packet(sctp(Some(0)), Cut),
        // Everything else begins with its first packet.
        new().packet(datagram(), Cut).packet(datagram(), Cut),
        old().packet(datagram(), Pass),
        // A change: what began before it is established for a rule that it brings, until it begins
        // again.
        new()
            .packet(syn(), Cut)
            .packet(datagram(), Cut)
            .change(vec![later(2)])
            .packet(ack(), Pass)
            .packet(datagram(), Pass)
            .packet(syn(), Cut)
            .packet(ack(), Cut),
        // Connections are known by target.
        new().packet(syn(), Cut).packet(
            Packet {
                target: SECOND,
                ..ack()
            },
            Pass,
        ),
        // Both directions are followed where a rule asks in one of them.
        Case::new(vec![rule(
            Fault::Cut,
            Selector {
                direction: Direction::Ingress,
                ..asking(ConnState::New)
            },
        )])
        .packet(syn(), Pass)
        .packet(syn_ack(), Cut),
    ]
}

pub(super) fn protect_list() -> Vec<Case> {
    let every = || rule(Fault::DropNth(2), Selector::default());
    let bold = || {
        let rule = Rule {
            unprotected: true,
            ..plain_rule("bold", Fault::DropNth(4))
        };
        in_force(rule, 2)
    };
    let ssh = || Exemption {
        peer: set(&["10.0.0.0/24"], &["10.0.0.9/32"]),
        local_port: vec![22..=22],
        protocols: vec![Protocol::Ip(6)],
        ..Exemption::default()
    };
    let there = || out(between(NEAR, FAR, tcp(22, 50_000)));
    let reply = || back(between(FAR, NEAR, tcp(50_000, 22)));
    let other = || out(between(NEAR, "10.0.0.9", tcp(22, 50_000)));
    let none = counts(0, 0, 0);
    vec![
        Case::new(vec![every()])
            .exempt(ssh())
            .packets(&there(), &[Pass, Pass, Pass])
            .packets(&reply(), &[Pass, Pass, Pass])
            .counts(vec![[none, none]]),
        Case::new(vec![every()])
            .exempt(ssh())
            .packets(&other(), &[Pass, Cut]),
        Case::new(vec![every()])
            .exempt(ssh())
            .packets(&out(v4(udp(22, 50_000))), &[Pass, Cut]),
        // The other way round it is another service.
        Case::new(vec![every()])
            .exempt(ssh())
            .packets(&out(between(NEAR, FAR, tcp(50_000, 22))), &[Pass, Cut]),
        // A rule that is told to may.
        Case::new(vec![every(), bold()])
            .exempt(ssh())
            .packets(&there(), &[Pass, Pass, Pass, Cut])
            .counts(vec![[none, none], [counts(4, 1, 0), none]]),
        // Two entries: either suffices.
        Case::new(vec![every()])
            .exempt(Exemption {
                peer_port: vec![1..=2],
                ..Exemption::default()
            })
            .exempt(ssh())
            .packets(&there(), &[Pass, Pass]),
    ]
}
