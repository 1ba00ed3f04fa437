//! Headers: what is skipped, what is read, what makes a packet one that is not understood.

use super::{
    Case, Cut, Extension, FAR, FAR_6, Fault, Frame, Network, Packet, Pass, Protocol, RAW, Selector,
    Transport, Unparsed, between, cut_off, frame, icmp, long, out, patched, protocols, rule,
    tagged, tcp, to_port, udp, v4, v6, v6_with,
};

pub(super) fn extension_headers() -> Vec<Case> {
    let cut_http = || Case::new(vec![rule(Fault::Cut, to_port(80))]);
    let mut cases = Vec::new();
    for number in [0, 43, 60, 135, 139, 140] {
        for units in [0, 1, 7, 255] {
            let here = v6_with(&[long(number, units)], tcp(1, 80));
            let other = v6_with(&[long(number, units)], tcp(1, 81));
            cases.push(cut_http().packet(out(here), Cut).packet(out(other), Pass));
        }
        // Its first eight bytes must be there.
        let short = v6_with(&[long(number, 0)], tcp(1, 80));
        cases.push(cut_http().packet(cut_off(short, 47), Unparsed));
        // It reaches beyond the end of the packet, and TCP with it.
        let beyond = v6_with(&[long(number, 255)], tcp(1, 80));
        cases.push(cut_http().packet(cut_off(beyond, 100), Unparsed));
    }
    for units in 0..8 {
        let header = Extension::Authentication { units };
        cases.push(cut_http().packet(out(v6_with(&[header], tcp(1, 80))), Cut));
    }
    let atomic = Extension::Fragment {
        offset: 0,
        more: false,
        id: 9,
    };
    cases.push(cut_http().packet(out(v6_with(&[atomic], tcp(1, 80))), Cut));
    for count in 1..=10 {
        let fate = if count <= 8 { Cut } else { Unparsed };
        cases.push(cut_http().packet(out(v6_with(&vec![long(60, 0); count], tcp(1, 80))), fate));
    }
    // ESP, no next header, and what nobody knows end the chain: without ports, but parsed.
    for number in [50, 59, 253] {
        let plain = Transport::Plain {
            number,
            payload: 40,
        };
        let named = Case::new(vec![rule(Fault::Cut, protocols(&[Protocol::Ip(number)]))]);
        cases.push(cut_http().packet(out(v6(plain.clone())), Pass));
        cases.push(named.packet(out(v6_with(&[long(0, 0)], plain)), Cut));
    }
    // AH is skipped in IPv6 only.
    let ah = Transport::Plain {
        number: 51,
        payload: 40,
    };
    let named = Case::new(vec![rule(Fault::Cut, protocols(&[Protocol::Ip(51)]))]);
    cases.push(named.packet(out(v4(ah)), Cut));
    cases
}

pub(super) fn vlan_tags() -> Vec<Case> {
    let cut_http = || Case::new(vec![rule(Fault::Cut, to_port(80))]);
    let mut cases = Vec::new();
    for tag in [0x8100, 0x88a8, 0x9100] {
        for depth in 0..=6 {
            let fate = if depth <= 4 { Cut } else { Unparsed };
            for network in [v4(tcp(1, 80)), v6(tcp(1, 80))] {
                cases.push(cut_http().packet(tagged(&vec![tag; depth], network), fate));
            }
        }
    }
    let mixed = [0x88a8, 0x9100, 0x8100, 0x8100];
    cases.push(cut_http().packet(tagged(&mixed, v4(tcp(1, 80))), Cut));
    // 0x9200 is no tag.
    cases.push(cut_http().packet(tagged(&[0x9200], v4(tcp(1, 80))), Pass));
    // Tags that are cut off.
    for length in 14..18 {
        let mut packet = tagged(&[0x8100], v4(tcp(1, 80)));
        packet.bytes.truncate(length);
        cases.push(cut_http().packet(packet, Unparsed));
    }
    // Padding between a tag and the end reads as IPv4 only if it is IPv4.
    cases.push(cut_http().packet(cut_off(v4(tcp(1, 80)), 0), Unparsed));
    cases
}

pub(super) fn ipv4_options() -> Vec<Case> {
    let mut cases = Vec::new();
    for words in 0..=10 {
        let mut network = v4(tcp(1, 80));
        if let Network::V4 { options, .. } = &mut network {
            *options = words;
        }
        let case = Case::new(vec![rule(Fault::Cut, to_port(80))]);
        // The options say port 257: a fixed offset would find it there.
        let decoy = Case::new(vec![rule(Fault::Cut, to_port(0x0101))]);
        cases.push(case.packet(out(network.clone()), Cut));
        cases.push(decoy.packet(out(network.clone()), Pass));
        let cut_http = Case::new(vec![rule(Fault::Cut, to_port(80))]);
        cases.push(cut_http.packet(cut_off(network, 20 + 4 * words - 1), Unparsed));
    }
    cases
}

pub(super) fn malformed_network_headers() -> Vec<Case> {
    let cut_all = || Case::new(vec![rule(Fault::Cut, Selector::default())]);
    let mut cases = vec![
        // Wrong versions; header lengths below five words and beyond the packet.
        cut_all().packet(patched(v4(tcp(1, 80)), &[(0, 0x65)]), Unparsed),
        cut_all().packet(patched(v4(tcp(1, 80)), &[(0, 0x44)]), Unparsed),
        cut_all().packet(patched(v4(tcp(1, 80)), &[(0, 0x40)]), Unparsed),
        cut_all().packet(
            patched(
                v4(Transport::Plain {
                    number: 253,
                    payload: 0,
                }),
                &[(0, 0x46)],
            ),
            Unparsed,
        ),
        cut_all().packet(patched(v6(tcp(1, 80)), &[(0, 0x40)]), Unparsed),
        cut_all().packet(patched(v6(tcp(1, 80)), &[(0, 0x70)]), Unparsed),
    ];
    for length in 0..20 {
        let none = Transport::Plain {
            number: 253,
            payload: 0,
        };
        cases.push(cut_all().packet(cut_off(v4(none), length), Unparsed));
    }
    for length in 0..40 {
        let none = Transport::Plain {
            number: 253,
            payload: 0,
        };
        cases.push(cut_all().packet(cut_off(v6(none), length), Unparsed));
    }
    let none = Transport::Plain {
        number: 253,
        payload: 0,
    };
    cases.push(cut_all().packet(cut_off(v4(none.clone()), 20), Cut));
    cases.push(cut_all().packet(cut_off(v6(none), 40), Cut));
    cases
}

pub(super) fn malformed_transport_headers() -> Vec<Case> {
    let cut_all = || Case::new(vec![rule(Fault::Cut, Selector::default())]);
    let sctp = Transport::Sctp {
        source: 1,
        destination: 2,
        chunk: None,
        payload: 0,
    };
    let bare = |transport: &Transport| {
        let mut transport = transport.clone();
        *transport.payload_mut() = 0;
        transport
    };
    let mut cases = Vec::new();
    for (transport, need) in [(tcp(1, 80), 20), (udp(1, 80), 8), (icmp(8), 8), (sctp, 12)] {
        for (network, header) in [(v4(bare(&transport)), 20), (v6(bare(&transport)), 40)] {
            for length in 0..need {
                let packet = cut_off(network.clone(), header + length);
                cases.push(cut_all().packet(packet, Unparsed));
            }
            cases.push(cut_all().packet(cut_off(network, header + need), Cut));
        }
    }
    for (words, fate) in [(0, Unparsed), (4, Unparsed), (5, Cut), (15, Cut)] {
        // Options that are not there do not matter: nobody reads them.
        let packet = patched(v4(bare(&tcp(1, 80))), &[(32, words << 4)]);
        cases.push(cut_all().packet(packet, fate));
    }
    cases
}

pub(super) fn padding() -> Vec<Case> {
    // A UDP packet of 28 bytes in a frame of 60: its length is 28 all the same.
    let of_length = |length: u32| Selector {
        length: vec![length..=length],
        ..Selector::default()
    };
    let short = || {
        v4(Transport::Udp {
            source: 1,
            destination: 2,
            payload: 0,
        })
    };
    let padded = || {
        frame(
            Frame {
                padding: 18,
                ..Frame::ethernet(short())
            }
            .bytes(),
        )
    };
    let mut unsaid = short();
    if let Network::V4 { total_length, .. } = &mut unsaid {
        *total_length = Some(0);
    }
    let unsaid = frame(
        Frame {
            padding: 18,
            ..Frame::ethernet(unsaid)
        }
        .bytes(),
    );
    vec![
        Case::new(vec![rule(Fault::Cut, of_length(28))]).packet(padded(), Cut),
        Case::new(vec![rule(Fault::Cut, of_length(46))]).packet(padded(), Pass),
        Case::new(vec![rule(Fault::Cut, of_length(46))]).packet(unsaid, Cut),
    ]
}

/// `BPF_PROG_TEST_RUN` reads an Ethernet header whatever the target is: the source address says IPv4
/// or IPv6 where the ethertype would be.
pub(super) fn raw_target() -> Vec<Case> {
    let raw = |network: Network| Packet {
        target: RAW,
        protocol: network.ethertype(),
        bytes: Frame {
            ethernet: false,
            ..Frame::ethernet(network)
        }
        .bytes(),
        ..frame(Vec::new())
    };
    let cut_http = || Case::new(vec![rule(Fault::Cut, to_port(80))]);
    vec![
        cut_http()
            .packet(raw(between("8.0.0.1", FAR, tcp(1, 80))), Cut)
            .packet(raw(between("8.0.0.1", FAR, tcp(1, 81))), Pass),
        cut_http()
            .packet(raw(between("fd00:1:86dd::1", FAR_6, tcp(1, 80))), Cut)
            .packet(raw(between("fd00:1:86dd::1", FAR_6, tcp(1, 81))), Pass),
    ]
}
