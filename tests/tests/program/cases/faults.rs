//! Faults: which of the packets are hit, counted by whom, and when.

use super::{
    Case, Cut, Direction, Duration, FAR, Fault, Flap, FlowIdentity, LOOPBACK, NEAR, Packet, Pass,
    Rule, RuleOutcome, Selector, TcpFlags, Transport, back, between, counts, flag, in_force, out,
    plain_rule, rule, tcp, to_port, udp, v4, v6,
};

fn bits(text: &str) -> Vec<bool> {
    text.chars().map(|bit| bit == '1').collect()
}

pub(super) fn positional_faults() -> Vec<Case> {
    let case = |fault| Case::new(vec![rule(fault, to_port(80))]);
    let packet = || out(v4(tcp(1, 80)));
    let no = |count| vec![Pass; count];
    let pattern = |text, once| Fault::DropPattern {
        bits: bits(text),
        once,
    };
    let total = |matched, cut| vec![[counts(matched, cut, 0), counts(0, 0, 0)]];
    let mut long = vec![false; 256];
    long[255] = true;
    long[64] = true;
    let mut fates = no(512);
    for index in [64, 255, 320, 511] {
        fates[index] = Cut;
    }
    vec![
        case(Fault::DropNth(1))
            .packets(&packet(), &[Cut, Pass, Pass])
            .counts(total(3, 1)),
        case(Fault::DropNth(3)).packets(&packet(), &[Pass, Pass, Cut, Pass, Pass, Pass]),
        case(Fault::DropFirst(2))
            .packets(&packet(), &[Cut, Cut, Pass, Pass])
            .counts(total(4, 2)),
        case(Fault::DropEvery(1)).packets(&packet(), &[Cut, Cut, Cut]),
        case(Fault::DropEvery(3))
            .packets(&packet(), &[Pass, Pass, Cut, Pass, Pass, Cut, Pass])
            .counts(total(7, 2)),
        case(pattern("0010", false)).packets(
            &packet(),
            &[Pass, Pass, Cut, Pass, Pass, Pass, Cut, Pass, Pass],
        ),
        case(pattern("011", true)).packets(&packet(), &[Pass, Cut, Cut, Pass, Pass, Pass, Pass]),
        case(pattern("1", false)).packets(&packet(), &[Cut, Cut, Cut]),
        case(Fault::DropPattern {
            bits: long,
            once: false,
        })
        .packets(&packet(), &fates),
        case(Fault::DropNth(u64::MAX)).packets(&packet(), &no(5)),
        case(Fault::DropEvery((1 << 32) + 1)).packets(&packet(), &no(5)),
        // Packets that do not match do not count.
        case(Fault::DropNth(2))
            .packet(packet(), Pass)
            .packet(out(v4(tcp(1, 81))), Pass)
            .packet(packet(), Cut),
        // Each rule counts by itself, also what another one cuts.
        Case::new(vec![
            rule(Fault::DropNth(1), to_port(80)),
            in_force(
                Rule {
                    selector: to_port(80),
                    ..plain_rule("b", Fault::DropNth(2))
                },
                2,
            ),
            in_force(
                Rule {
                    selector: Selector::default(),
                    ..plain_rule("c", Fault::DropEvery(2))
                },
                3,
            ),
        ])
        .packets(&packet(), &[Cut, Cut, Pass, Cut])
        .counts(vec![
            [counts(4, 1, 0), counts(0, 0, 0)],
            [counts(4, 1, 0), counts(0, 0, 0)],
            [counts(4, 2, 0), counts(0, 0, 0)],
        ]),
    ]
}

pub(super) fn flow_identity() -> Vec<Case> {
    let keyed = |fault, key| {
        let rule = Rule {
            key,
            ..plain_rule("rule", fault)
        };
        Case::new(vec![in_force(rule, 1)])
    };
    let there = |port| out(between(NEAR, FAR, tcp(port, 80)));
    let reply = |port| back(between(FAR, NEAR, tcp(80, port)));
    let mut cases = Vec::new();
    for key in [FlowIdentity::Tuple, FlowIdentity::Ordinal] {
        // Each connection and each direction by itself.
        cases.push(
            keyed(Fault::DropNth(2), key)
                .packet(there(40_000), Pass)
                .packet(there(40_001), Pass)
                .packet(reply(40_000), Pass)
                .packet(there(40_000), Cut)
                .packet(reply(40_000), Cut)
                .packet(there(40_001), Cut)
                .packet(there(40_001), Pass),
        );
    }
    // All connections to the service together, directions apart.
    cases.push(
        keyed(Fault::DropNth(3), FlowIdentity::Service)
            .packet(there(40_000), Pass)
            .packet(there(40_001), Pass)
            .packet(reply(40_001), Pass)
            .packet(there(40_002), Cut)
            .packet(there(40_003), Pass)
            .packet(out(between(NEAR, FAR, tcp(40_004, 81))), Pass)
            .packet(out(between(NEAR, "10.0.0.3", tcp(40_004, 80))), Pass)
            .packet(reply(40_004), Pass)
            .packet(reply(40_005), Cut),
    );
    // Once is once: for all flows, in both directions.
    for key in [
        FlowIdentity::Tuple,
        FlowIdentity::Service,
        FlowIdentity::Ordinal,
    ] {
        cases.push(
            keyed(Fault::DropOnce, key)
                .packet(reply(40_000), Cut)
                .packet(there(40_000), Pass)
                .packet(there(40_001), Pass)
                .packet(out(v6(udp(1, 2))), Pass)
                .counts(vec![[counts(3, 0, 0), counts(1, 1, 0)]]),
        );
    }
    // An echo is a flow by its identifier, and of one service with all others between two ends.
    let echo = |id| {
        out(v4(Transport::Icmp {
            kind: 8,
            code: 0,
            id,
            payload: 8,
        }))
    };
    cases.push(
        keyed(Fault::DropNth(2), FlowIdentity::Tuple)
            .packet(echo(1), Pass)
            .packet(echo(2), Pass)
            .packet(echo(1), Cut),
    );
    cases.push(
        keyed(Fault::DropNth(2), FlowIdentity::Service)
            .packet(echo(1), Pass)
            .packet(echo(2), Cut),
    );
    // Protocols and families are apart though addresses and ports are the same.
    cases.push(
        keyed(Fault::DropNth(2), FlowIdentity::Tuple)
            .packet(out(v4(tcp(1, 80))), Pass)
            .packet(out(v4(udp(1, 80))), Pass)
            .packet(out(between("::", "::", tcp(1, 80))), Pass)
            .packet(out(between("0.0.0.0", "0.0.0.0", tcp(1, 80))), Pass)
            .packet(out(v4(udp(1, 80))), Cut),
    );
    cases
}

fn sized(transport: Transport, gso_size: u16, gso_segs: u16) -> Packet {
    Packet {
        gso_size,
        gso_segs,
        ..out(v4(transport))
    }
}

/// 20 + 20 bytes of headers, 1000 of payload: ten times 100.
pub(super) fn bulk(segments: u16) -> Packet {
    let transport = Transport::Tcp {
        source: 40_000,
        destination: 80,
        flags: flag::ACK | flag::PSH | flag::FIN | flag::CWR,
        options: 0,
        payload: 1000,
    };
    sized(transport, 100, segments)
}

fn egress(outcome: RuleOutcome) -> Vec<[RuleOutcome; 2]> {
    vec![[outcome, counts(0, 0, 0)]]
}

pub(super) fn super_packets() -> Vec<Case> {
    let case = |fault| Case::new(vec![rule(fault, Selector::default())]);
    let plain = || out(v4(tcp(40_000, 80)));
    vec![
        // Positions 1 to 10, with the count given and without.
        case(Fault::DropNth(10))
            .packet(bulk(0), Cut)
            .counts(egress(counts(10, 1, 9))),
        case(Fault::DropNth(10))
            .packet(bulk(10), Cut)
            .counts(egress(counts(10, 1, 9))),
        case(Fault::DropNth(11))
            .packet(bulk(0), Pass)
            .packet(plain(), Cut)
            .counts(egress(counts(11, 1, 0))),
        case(Fault::DropEvery(4))
            .packet(bulk(0), Cut)
            .packet(plain(), Pass)
            .packet(plain(), Cut)
            .counts(egress(counts(12, 3, 8))),
        case(Fault::Cut)
            .packet(bulk(0), Cut)
            .counts(egress(counts(10, 10, 0))),
        case(Fault::DropOnce)
            .packet(bulk(0), Cut)
            .packet(bulk(0), Pass)
            .counts(egress(counts(20, 1, 9))),
        case(Fault::DropPattern {
            bits: bits("000000000001"),
            once: false,
        })
        .packet(bulk(0), Pass)
        .packet(bulk(0), Cut)
        .packet(bulk(0), Cut)
        .counts(egress(counts(30, 2, 18))),
        // The count that the kernel gives wins over the one that the size would make.
        case(Fault::Cut)
            .packet(bulk(7), Cut)
            .counts(egress(counts(7, 7, 0))),
        // Without payload there is still one packet.
        case(Fault::Cut)
            .packet(
                sized(
                    Transport::Udp {
                        source: 1,
                        destination: 2,
                        payload: 0,
                    },
                    100,
                    0,
                ),
                Cut,
            )
            .counts(egress(counts(1, 1, 0))),
        // By fragments: as many as there are said to be.
        case(Fault::DropNth(4))
            .packet(sized(tcp(1, 80), u16::MAX, 3), Pass)
            .packet(sized(tcp(1, 80), u16::MAX, 0), Cut)
            .counts(egress(counts(4, 1, 0))),
        // Segments without a size are none.
        case(Fault::Cut)
            .packet(sized(tcp(1, 80), 0, 5), Cut)
            .counts(egress(counts(1, 1, 0))),
    ]
}

/// What segmentation makes of flags and lengths.
pub(super) fn super_packet_selectors() -> Vec<Case> {
    let case = |selector| Case::new(vec![rule(Fault::Cut, selector)]);
    let odd = || {
        // Nine times 100 and once 50.
        let transport = Transport::Udp {
            source: 1,
            destination: 2,
            payload: 950,
        };
        sized(transport, 100, 0)
    };
    let length = |from, to| Selector {
        length: vec![from..=to],
        ..Selector::default()
    };
    let has = |bit| Selector {
        tcp_flags: Some(TcpFlags {
            mask: bit,
            value: bit,
        }),
        ..Selector::default()
    };
    let plain = || out(v4(tcp(40_000, 80)));
    vec![
        // FIN and PSH are on the last one only, CWR on the first, ACK on all.
        case(has(flag::FIN))
            .packet(bulk(0), Cut)
            .counts(egress(counts(1, 1, 9))),
        case(has(flag::PSH))
            .packet(bulk(0), Cut)
            .counts(egress(counts(1, 1, 9))),
        case(has(flag::CWR))
            .packet(bulk(0), Cut)
            .counts(egress(counts(1, 1, 9))),
        case(has(flag::ACK))
            .packet(bulk(0), Cut)
            .counts(egress(counts(10, 10, 0))),
        case(has(flag::FIN | flag::CWR))
            .packet(bulk(0), Pass)
            .counts(egress(counts(0, 0, 0))),
        // Lengths on the wire: 140 each; 128 nine times and 78 once.
        case(length(140, 140))
            .packet(bulk(0), Cut)
            .counts(egress(counts(10, 10, 0))),
        case(length(1040, 1040)).packet(bulk(0), Pass),
        case(length(78, 78))
            .packet(odd(), Cut)
            .counts(egress(counts(1, 1, 9))),
        Case::new(vec![rule(Fault::DropNth(9), length(128, 128))])
            .packet(odd(), Cut)
            .counts(egress(counts(9, 1, 9))),
        // A super-packet of one segment is a packet, with the length that its header says.
        case(length(50, 50))
            .packet(
                Packet {
                    gso_size: 1000,
                    ..plain()
                },
                Cut,
            )
            .counts(egress(counts(1, 1, 0))),
    ]
}

pub(super) fn time() -> Vec<Case> {
    let hour = Duration::from_hours(1);
    let timed = |lifetime: Option<Duration>, flap: Option<Flap>| {
        let rule = Rule {
            lifetime,
            flap,
            ..plain_rule("timed", Fault::DropNth(2))
        };
        Case::new(vec![in_force(rule, 1)])
    };
    let flap = |phase| {
        Some(Flap {
            up: hour,
            down: hour,
            phase,
        })
    };
    let packet = out(v4(udp(1, 2)));
    let two = [Pass, Pass];
    let egress = |outcome| vec![[outcome, RuleOutcome::default()]];
    vec![
        // In force for five seconds already.
        timed(Some(hour), None).packets(&packet, &[Pass, Cut]),
        timed(Some(Duration::from_secs(1)), None)
            .packets(&packet, &two)
            .counts(egress(counts(0, 0, 0))),
        // Up first, then down.
        timed(None, flap(Duration::ZERO))
            .packets(&packet, &two)
            .counts(egress(RuleOutcome {
                off: 2,
                ..RuleOutcome::default()
            })),
        timed(None, flap(hour)).packets(&packet, &[Pass, Cut]),
        // A lapsed lease: nothing, but it is counted, and positions stand still.
        timed(None, None)
            .packet(packet.clone(), Pass)
            .lease(false)
            .packets(&packet, &two)
            .lease(true)
            .packet(packet.clone(), Cut)
            .counts(egress(RuleOutcome {
                lapsed: 2,
                ..counts(2, 1, 0)
            })),
    ]
}

pub(super) fn changes() -> Vec<Case> {
    let entry = |name: &str, activation| in_force(plain_rule(name, Fault::DropNth(3)), activation);
    let packet = out(v4(udp(1, 2)));
    let none = counts(0, 0, 0);
    vec![
        // What stays goes on counting, what is new begins.
        Case::new(vec![entry("stays", 1), entry("changes", 2)])
            .packets(&packet, &[Pass, Pass])
            .change(vec![
                entry("new", 4),
                entry("changes", 3),
                entry("stays", 1),
            ])
            .packets(&packet, &[Cut, Pass, Cut, Pass])
            .counts(vec![
                [counts(4, 1, 0), none],
                [counts(4, 1, 0), none],
                [counts(6, 1, 0), none],
            ]),
        Case::new(vec![entry("goes", 1)])
            .packets(&packet, &[Pass, Pass])
            .change(vec![])
            .packets(&packet, &[Pass, Pass]),
    ]
}

pub(super) fn loopback_target() -> Vec<Case> {
    let here = || Packet {
        target: LOOPBACK,
        ..out(between("127.0.0.1", "127.0.0.1", tcp(40_000, 80)))
    };
    let going = |direction, fault| {
        rule(
            fault,
            Selector {
                direction,
                ..Selector::default()
            },
        )
    };
    let none = counts(0, 0, 0);
    vec![
        Case::new(vec![going(Direction::Egress, Fault::Cut)])
            .packet(here(), Cut)
            .counts(vec![[counts(1, 1, 0), none]]),
        Case::new(vec![going(Direction::Ingress, Fault::Cut)])
            .packet(here(), Cut)
            .counts(vec![[none, counts(1, 1, 0)]]),
        // Out and in, counted apart.
        Case::new(vec![going(Direction::Both, Fault::DropNth(3))])
            .packets(&here(), &[Pass, Pass, Cut, Cut, Pass])
            .counts(vec![[counts(5, 1, 0), counts(4, 1, 0)]]),
        // To the port at the peer on the way out, to the port here on the way in.
        Case::new(vec![rule(
            Fault::Cut,
            Selector {
                local_port: vec![80..=80],
                ..Selector::default()
            },
        )])
        .packet(here(), Cut)
        .counts(vec![[none, counts(1, 1, 0)]]),
    ]
}
