//! Whether a rejected packet is answered, or lost in silence.

use std::net::IpAddr;

use injector::rules::model::{Answer, IpVersion, Protocol};

use super::{Link, Packet, Parsed};

const RST: u8 = 4;
/// ICMP types of which it is known that they are no errors (RFC 792, RFC 950).
const ICMP_QUERIES: [u8; 10] = [0, 8, 9, 10, 13, 14, 15, 16, 17, 18];
/// Types that no RFC gives a meaning to, but that Linux takes for queries as well.
const ICMP_UNASSIGNED: [u8; 4] = [1, 2, 6, 7];

/// Choice: what cannot be sent back with all its tags is not answered, and no segment is reset by its first
/// fragment.
pub(super) fn may_answer(answer: Answer, packet: &Packet, link: Link, parsed: &Parsed) -> bool {
    let (Some(version), Some((source, destination))) = (parsed.version, parsed.addresses) else {
        return false;
    };
    let transport = &parsed.transport;
    if transport.protocol == Protocol::Nd || parsed.fragment.is_some_and(|piece| !piece.first) {
        return false;
    }
    if !is_one_host(source) || !is_one_host(destination) {
        return false;
    }
    let is_reset = transport.tcp_flags.is_some_and(|flags| flags & RST != 0);
    let is_error = transport.icmp_type.is_some_and(|kind| match version {
        IpVersion::V4 => !ICMP_QUERIES.contains(&kind) && !ICMP_UNASSIGNED.contains(&kind),
        IpVersion::V6 => kind < 128,
    });
    if is_reset || is_error {
        return false;
    }
    let headers = parsed.network_headers + parsed.transport_header;
    if parsed.stated_length.is_some_and(|stated| stated < headers) {
        return false;
    }
    if link == Link::Ethernet && !can_go_back(&packet.bytes, parsed.link_length) {
        return false;
    }
    let is_piece = parsed
        .fragment
        .is_some_and(|piece| !piece.first || piece.more);
    answer != Answer::Rst || transport.tcp_flags.is_some() && !is_piece
}

fn is_one_host(address: IpAddr) -> bool {
    match address {
        // From 224.0.0.0 on: multicast, class E, everybody.
        IpAddr::V4(address) => !address.is_unspecified() && address.octets()[0] < 224,
        IpAddr::V6(address) => !address.is_unspecified() && !address.is_multicast(),
    }
}

/// Whether a frame was for one station only, and its tags are of types that the kernel knows.
fn can_go_back(frame: &[u8], link_length: usize) -> bool {
    let obsolete = [0x91, 0x00];
    frame[0] & 1 == 0
        && frame[12..link_length]
            .chunks(4)
            .all(|tag| tag[..2] != obsolete)
}
