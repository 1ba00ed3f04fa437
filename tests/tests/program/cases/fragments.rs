//! Fragments: later ones go with their first one.

use super::{
    Case, Cut, Extension, Fault, Network, Packet, Pass, Protocol, SECOND, Selector, TcpFlags,
    Transport, Unparsed, back, counts, flag, flags, icmp, long, out, protocols, rule, tcp, to_port,
    v4, v6_with,
};

pub(super) fn v4_fragment(id: u16, field: u16, transport: Transport) -> Network {
    let mut network = v4(transport);
    if let Network::V4 {
        id: own_id,
        fragment,
        ..
    } = &mut network
    {
        *own_id = id;
        *fragment = field;
    }
    network
}

const MORE: u16 = 0x2000;

/// The first fragment of a packet to port 80.
fn first() -> Network {
    v4_fragment(5, MORE, tcp(1, 80))
}

/// A later one.
fn later(offset: u16) -> Network {
    v4_fragment(5, offset, data())
}

fn data() -> Transport {
    Transport::Plain {
        number: 6,
        payload: 24,
    }
}

pub(super) fn fragments() -> Vec<Case> {
    let cut_http = || Case::new(vec![rule(Fault::Cut, to_port(80))]);
    let reversed = |network: Network| match network {
        Network::V4 {
            source,
            destination,
            tos,
            options,
            id,
            fragment,
            total_length,
            transport,
        } => {
            let (source, destination) = (destination, source);
            Network::V4 {
                source,
                destination,
                tos,
                options,
                id,
                fragment,
                total_length,
                transport,
            }
        }
        other => other,
    };
    vec![
        // Later fragments go with their first one, the last one and those in between.
        cut_http()
            .packet(out(first()), Cut)
            .packet(out(later(MORE | 3)), Cut)
            .packet(out(later(9)), Cut),
        // Without the first one there are no ports; what asks for none matches.
        cut_http()
            .packet(out(later(9)), Pass)
            .packet(out(first()), Cut)
            .packet(out(later(9)), Cut),
        Case::new(vec![rule(Fault::Cut, protocols(&[Protocol::Ip(6)]))]).packet(out(later(9)), Cut),
        // Another identification, direction, target, protocol, end: not the same packet.
        cut_http()
            .packet(out(first()), Cut)
            .packet(out(v4_fragment(6, 9, data())), Pass),
        cut_http()
            .packet(out(first()), Cut)
            .packet(back(later(9)), Pass),
        cut_http().packet(out(first()), Cut).packet(
            Packet {
                target: SECOND,
                ..out(later(9))
            },
            Pass,
        ),
        cut_http().packet(out(first()), Cut).packet(
            out(v4_fragment(
                5,
                9,
                Transport::Plain {
                    number: 17,
                    payload: 24,
                },
            )),
            Pass,
        ),
        cut_http()
            .packet(out(first()), Cut)
            .packet(out(reversed(later(9))), Pass),
        // A later fragment needs no transport header, and a first one does.
        cut_http()
            .packet(
                out(v4_fragment(
                    5,
                    9,
                    Transport::Plain {
                        number: 6,
                        payload: 0,
                    },
                )),
                Pass,
            )
            .packet(
                out(v4_fragment(
                    5,
                    MORE,
                    Transport::Plain {
                        number: 6,
                        payload: 8,
                    },
                )),
                Unparsed,
            ),
        // A later first fragment takes the place of an earlier one.
        cut_http()
            .packet(out(first()), Cut)
            .packet(out(v4_fragment(5, MORE, tcp(1, 81))), Pass)
            .packet(out(later(9)), Pass),
        // A whole packet is not remembered, whatever DF says.
        cut_http()
            .packet(out(v4_fragment(5, 0x4000, tcp(1, 80))), Cut)
            .packet(out(later(9)), Pass),
    ]
}

/// Flags and types are inherited too, and fragments are packets of the flow.
pub(super) fn inheritance() -> Vec<Case> {
    vec![
        Case::new(vec![rule(
            Fault::Cut,
            Selector {
                tcp_flags: Some(TcpFlags {
                    mask: flag::SYN,
                    value: flag::SYN,
                }),
                ..Selector::default()
            },
        )])
        .packet(out(later(9)), Pass)
        .packet(out(v4_fragment(5, MORE, flags(flag::SYN))), Cut)
        .packet(out(later(9)), Cut),
        Case::new(vec![rule(
            Fault::Cut,
            Selector {
                icmp_types: vec![8],
                ..Selector::default()
            },
        )])
        .packet(out(v4_fragment(5, MORE, icmp(8))), Cut)
        .packet(
            out(v4_fragment(
                5,
                9,
                Transport::Plain {
                    number: 1,
                    payload: 9,
                },
            )),
            Cut,
        )
        .packet(
            out(v4_fragment(
                6,
                9,
                Transport::Plain {
                    number: 1,
                    payload: 9,
                },
            )),
            Pass,
        ),
        // They count as packets of the flow.
        Case::new(vec![rule(Fault::DropNth(3), to_port(80))])
            .packet(out(first()), Pass)
            .packet(out(later(3)), Pass)
            .packet(out(later(9)), Cut)
            .counts(vec![[counts(3, 1, 0), counts(0, 0, 0)]]),
    ]
}

pub(super) fn ipv6_fragments() -> Vec<Case> {
    let cut_http = || Case::new(vec![rule(Fault::Cut, to_port(80))]);
    let fragment = |offset, more, id| Extension::Fragment { offset, more, id };
    let data = |number| Transport::Plain {
        number,
        payload: 24,
    };
    let first = |id| out(v6_with(&[fragment(0, true, id)], tcp(1, 80)));
    let later = |id| out(v6_with(&[fragment(9, false, id)], data(6)));
    vec![
        cut_http()
            .packet(first(5), Cut)
            .packet(later(5), Cut)
            .packet(later(6), Pass),
        // All 32 bits of the identification count.
        cut_http()
            .packet(first(0x1_0005), Cut)
            .packet(later(5), Pass)
            .packet(later(0x1_0005), Cut),
        // An atomic fragment is not remembered.
        cut_http()
            .packet(out(v6_with(&[fragment(0, false, 5)], tcp(1, 80))), Cut)
            .packet(later(5), Pass),
        // Headers before the fragment header, and behind it in the first fragment only. What the
        // fragment header of a later one announces is not looked at.
        cut_http()
            .packet(
                out(v6_with(
                    &[long(0, 0), fragment(0, true, 5), long(60, 1)],
                    tcp(1, 80),
                )),
                Cut,
            )
            .packet(
                out(v6_with(&[long(0, 0), fragment(9, false, 5)], data(60))),
                Cut,
            ),
        Case::new(vec![rule(Fault::Cut, protocols(&[Protocol::Ip(60)]))])
            .packet(out(v6_with(&[fragment(9, false, 5)], data(60))), Cut),
        // A fragment of neighbour discovery is neighbour discovery, if its first one is known.
        Case::new(vec![rule(Fault::Cut, protocols(&[Protocol::Nd]))])
            .packet(out(v6_with(&[fragment(9, false, 5)], data(58))), Pass)
            .packet(out(v6_with(&[fragment(0, true, 5)], icmp(135))), Cut)
            .packet(out(v6_with(&[fragment(9, false, 5)], data(58))), Cut),
    ]
}
