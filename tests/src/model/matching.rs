//! Whether a packet, and which of its wire packets, is what a selector asks for.

use std::{net::IpAddr, ops::RangeInclusive};

use injector::rules::model::{AddrSet, Direction, IpVersion, Protocol, Selector};
use ipnet::IpNet;

use super::{Exemption, Hook, Packet, Parsed};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
/// `GSO_BY_FRAGS` (include/linux/skbuff.h): every fragment of the frag list is a segment of its own
/// length.
const GSO_BY_FRAGS: u16 = 0xffff;

fn in_prefix(address: IpAddr, prefix: &IpNet) -> bool {
    match (address, prefix) {
        (IpAddr::V4(address), IpNet::V4(prefix)) => {
            let drop = 32 - u32::from(prefix.prefix_len());
            let shift = |bits: u32| u64::from(bits) >> drop;
            shift(address.to_bits()) == shift(prefix.addr().to_bits())
        }
        (IpAddr::V6(address), IpNet::V6(prefix)) => {
            let drop = 128 - u32::from(prefix.prefix_len());
            let shift = |bits: u128| bits.checked_shr(drop).unwrap_or(0);
            shift(address.to_bits()) == shift(prefix.addr().to_bits())
        }
        _ => false,
    }
}

/// Choice: a packet without addresses is in no set that asks something, not even in one that only
/// has exceptions.
fn in_set(address: Option<IpAddr>, set: &AddrSet) -> bool {
    if set.include.is_empty() && set.except.is_empty() {
        return true;
    }
    let Some(address) = address else { return false };
    let included =
        set.include.is_empty() || set.include.iter().any(|prefix| in_prefix(address, prefix));
    included && !set.except.iter().any(|prefix| in_prefix(address, prefix))
}

fn in_ports(port: Option<u16>, ranges: &[RangeInclusive<u16>]) -> bool {
    ranges.is_empty()
        || port.is_some_and(|port| {
            ranges
                .iter()
                .any(|range| *range.start() <= port && port <= *range.end())
        })
}

fn in_protocols(protocol: Protocol, wanted: &[Protocol]) -> bool {
    if wanted.is_empty() {
        matches!(protocol, Protocol::Ip(_))
    } else {
        wanted.contains(&protocol)
    }
}

/// Source, destination, peer and local of something that both ends have.
struct Ends<T> {
    source: Option<T>,
    destination: Option<T>,
    peer: Option<T>,
    local: Option<T>,
}

impl<T: Copy> Ends<T> {
    fn new(pair: Option<(T, T)>, hook: Hook) -> Self {
        let source = pair.map(|pair| pair.0);
        let destination = pair.map(|pair| pair.1);
        match hook {
            Hook::Egress => Self {
                source,
                destination,
                peer: destination,
                local: source,
            },
            Hook::Ingress => Self {
                source,
                destination,
                peer: source,
                local: destination,
            },
        }
    }
}

/// What a selector asks about the flow as a whole, the share apart: direction, addresses, ports,
/// protocol, IP version.
pub(super) fn flow_matches(selector: &Selector, hook: Hook, packet: &Parsed) -> bool {
    let direction = match selector.direction {
        Direction::Both => true,
        Direction::Egress => hook == Hook::Egress,
        Direction::Ingress => hook == Hook::Ingress,
    };
    // Choice: what is not IP has no IP version; neighbour discovery is IPv6.
    let version = match (selector.ip_version, packet.version) {
        (None, _) => true,
        (Some(wanted), version) => version == Some(wanted),
    };
    let address = Ends::new(packet.addresses, hook);
    let port = Ends::new(packet.transport.ports, hook);
    direction
        && version
        && in_set(address.source, &selector.src)
        && in_set(address.destination, &selector.dst)
        && in_set(address.peer, &selector.peer)
        && in_set(address.local, &selector.local)
        && in_ports(port.source, &selector.src_port)
        && in_ports(port.destination, &selector.dst_port)
        && in_ports(port.peer, &selector.peer_port)
        && in_ports(port.local, &selector.local_port)
        && in_protocols(packet.transport.protocol, &selector.protocols)
}

/// Whether a flow is on the protect list.
///
/// Choice: an entry without protocols is for IP protocols only, as a rule without protocols is.
pub(super) fn exempt(entry: &Exemption, hook: Hook, packet: &Parsed) -> bool {
    let address = Ends::new(packet.addresses, hook);
    let port = Ends::new(packet.transport.ports, hook);
    in_set(address.peer, &entry.peer)
        && in_set(address.local, &entry.local)
        && in_ports(port.peer, &entry.peer_port)
        && in_ports(port.local, &entry.local_port)
        && in_protocols(packet.transport.protocol, &entry.protocols)
}

/// What a selector asks about the packet that is the same for all of its wire packets: ICMP type,
/// DSCP, mark.
pub(super) fn packet_matches(selector: &Selector, packet: &Packet, parsed: &Parsed) -> bool {
    let no_types = selector.icmp_types.is_empty() && selector.icmpv6_types.is_empty();
    let icmp_type = no_types
        || match (parsed.transport.icmp_type, parsed.version) {
            (Some(kind), Some(IpVersion::V4)) => selector.icmp_types.contains(&kind),
            (Some(kind), Some(IpVersion::V6)) => selector.icmpv6_types.contains(&kind),
            _ => false,
        };
    let dscp = selector.dscp.is_empty()
        || parsed
            .dscp
            .is_some_and(|dscp| selector.dscp.contains(&dscp));
    let mark = selector.marks.is_empty()
        || selector
            .marks
            .iter()
            .any(|mark| packet.mark & mark.mask == mark.value);
    icmp_type && dscp && mark
}

/// One packet as it will be on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WirePacket {
    /// Length from the network header on.
    length: u64,
    /// TCP flags.
    tcp_flags: Option<u8>,
}

/// The packets that segmentation makes of a packet.
pub(super) fn wire_packets(packet: &Packet, parsed: &Parsed) -> Vec<WirePacket> {
    let present = packet.bytes.len().saturating_sub(parsed.link_length);
    let headers = parsed.network_headers + parsed.transport_header;
    let payload = present.saturating_sub(headers);
    let size = usize::from(packet.gso_size);
    let count = match (packet.gso_size, packet.gso_segs) {
        (0, _) => 1,
        (GSO_BY_FRAGS, segments) => usize::from(segments.max(1)),
        (_, 0) => payload.div_ceil(size).max(1),
        (_, segments) => usize::from(segments),
    };
    if count == 1 {
        let length = parsed.stated_length.unwrap_or(present) as u64;
        return vec![WirePacket {
            length,
            tcp_flags: parsed.transport.tcp_flags,
        }];
    }
    (0..count)
        .map(|index| {
            let last = index == count - 1;
            let length = if packet.gso_size == GSO_BY_FRAGS {
                present.div_ceil(count)
            } else if last {
                headers + payload.saturating_sub((count - 1) * size).max(1)
            } else {
                headers + size
            };
            let tcp_flags = parsed.transport.tcp_flags.map(|mut flags| {
                if !last {
                    flags &= !(FIN | PSH);
                }
                if index != 0 {
                    flags &= !CWR;
                }
                flags
            });
            WirePacket {
                length: length as u64,
                tcp_flags,
            }
        })
        .collect()
}

/// What a selector asks about each wire packet: TCP flags, length.
pub(super) fn wire_matches(selector: &Selector, wire: &WirePacket) -> bool {
    let flags = selector.tcp_flags.is_none_or(|wanted| {
        wire.tcp_flags
            .is_some_and(|flags| flags & wanted.mask == wanted.value)
    });
    let length = selector.length.is_empty()
        || selector.length.iter().any(|range| {
            u64::from(*range.start()) <= wire.length && wire.length <= u64::from(*range.end())
        });
    flags && length
}
