//! Answers to packets that are refused: which packets may be answered, and the headers of the answer.
//!
//! Sources: RFC 9293, section 3.10.7 (resets), RFC 1122, section 3.2.2, and RFC 1812, section 4.3.2 (ICMP errors),
//! RFC 4443, sections 2.4 and 3.1 (ICMPv6 errors), RFC 1071 (the checksum).
//!
//! An answer comes from the address that the packet was for, as if its peer had sent it. A packet whose checksum
//! its device has yet to complete (`CHECKSUM_PARTIAL`, include/linux/skbuff.h) stays one: BPF can neither see that
//! directly nor change it. So headers are made for both cases ([`Body`], [`reset`]'s `partial`).

use crate::{
    layout::{answer, kind, upper_has},
    packet::{Fragment, Parsed},
    segments::Segments,
};

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Bytes of an IPv4 header without options.
const IPV4_HEADER: u32 = 20;
/// Bytes of an IPv6 header.
const IPV6_HEADER: u32 = 40;
/// Bytes of an ICMP header, that of ICMPv6 alike.
const ICMP_HEADER: u32 = 8;
/// Bytes of a TCP header without options.
const TCP_HEADER: u32 = 20;

/// Hops that an answer may take: Linux's default (`IPDEFTTL`, include/uapi/linux/ip.h).
const TTL: u8 = 64;
/// Don't Fragment. With it the identification has no meaning and may be 0 (RFC 6864, section 4.1).
const DONT_FRAGMENT: u16 = 0x4000;
/// Precedence of ICMP errors: internetwork control (RFC 1812, section 4.3.2.5).
const INTERNETWORK_CONTROL: u8 = 0xc0;

/// The longest ICMP error: RFC 1812, section 4.3.2.3.
const ICMP_LENGTH: u32 = 576;
/// The longest ICMPv6 error, the smallest MTU of IPv6: RFC 4443, section 2.4 (c).
const ICMPV6_LENGTH: u32 = 1280;

/// Bytes of an original packet that an answer contains at most.
pub const MAX_BODY: u32 = ICMPV6_LENGTH - IPV6_HEADER - ICMP_HEADER;

/// Bytes that all the headers of an answer have at most, those of a reset over IPv6.
pub const MAX_HEADERS: usize = (IPV6_HEADER + TCP_HEADER) as usize;

/// The headers of an answer; how many bytes of them are used the functions say that write them.
pub type Headers = [u8; MAX_HEADERS];

/// Whether a packet may be answered so. Answers and what was sent to many are not: they would breed storms. Nor
/// is a packet whose own length denies its headers: a host drops it without a word.
#[inline(always)]
#[must_use]
pub fn may_answer(what: u32, parsed: &Parsed) -> bool {
    let upper = &parsed.upper;
    let v4 = upper.kind == kind::V4;
    if upper.has & upper_has::ADDRESSES == 0
        || !v4 && upper.kind != kind::V6
        || parsed.fragment == Fragment::Later
        || parsed.stated_length != 0
            && parsed.stated_length < parsed.network_length + parsed.upper_length
    {
        return false;
    }
    let addressed = if v4 {
        is_host_v4(parsed.source) && is_host_v4(parsed.destination)
    } else {
        is_host_v6(parsed.source) && is_host_v6(parsed.destination)
    };
    if !addressed {
        return false;
    }
    if upper.has & upper_has::TCP_FLAGS != 0 && upper.detail & RST != 0 {
        return false;
    }
    if upper.has & upper_has::ICMP_TYPE != 0 && is_icmp_error(v4, upper.detail) {
        return false;
    }
    // The length of a segment is not known by its first fragment.
    what != answer::RST
        || upper.has & upper_has::TCP_FLAGS != 0 && parsed.fragment == Fragment::Whole
}

/// Whether an address is that of a single host: neither unspecified nor multicast, nor class E with the limited
/// broadcast (RFC 1122, section 3.2.2).
#[inline(always)]
fn is_host_v4(address: [u64; 2]) -> bool {
    let [first, ..] = address[0].to_ne_bytes();
    address[0] != 0 && first < 224
}

/// The same for IPv6: neither unspecified nor multicast (RFC 4291, sections 2.5.2 and 2.7).
#[inline(always)]
fn is_host_v6(address: [u64; 2]) -> bool {
    let [first, ..] = address[0].to_ne_bytes();
    address[0] | address[1] != 0 && first != 0xff
}

/// Whether an ICMP message is an error, or may be: of IPv4 those of RFC 792 and what is not known
/// (`__icmp_send`, net/ipv4/icmp.c, 6.1, keeps silent to the same), of IPv6 all types below 128 (RFC 4443,
/// section 2.1). Redirects of IPv6 are neighbour discovery, which is not answered anyway.
#[inline(always)]
fn is_icmp_error(v4: bool, icmp_type: u8) -> bool {
    if v4 {
        matches!(icmp_type, 3 | 4 | 5 | 11 | 12) || icmp_type > 18
    } else {
        icmp_type < 128
    }
}

/// What is needed of a TCP segment to reset its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Payload of all wire packets together, in bytes.
    pub payload: u32,
}

/// Payload of all wire packets of an skb together, in bytes.
#[inline(always)]
#[must_use]
pub fn payload(parsed: &Parsed, segments: &Segments) -> u32 {
    let headers = parsed.network_length + parsed.upper_length;
    segments
        .full_length
        .saturating_sub(headers)
        .wrapping_mul(segments.count.wrapping_sub(1))
        .wrapping_add(segments.last_length.saturating_sub(headers))
}

/// Where a packet's sum is yet to be completed: the offset of the field behind the upper-layer header's
/// beginning, for the protocols in which what it will be is known.
#[inline(always)]
#[must_use]
pub fn checksum_field(parsed: &Parsed) -> Option<u32> {
    match parsed.upper.protocol {
        TCP => Some(16),
        UDP => Some(6),
        _ => None,
    }
}

/// Bytes of the original packet, from its network header on, that an ICMP error contains if the packet has
/// `length` of them: as many as its own greatest length allows.
#[inline(always)]
#[must_use]
pub fn body_length(parsed: &Parsed, length: u32) -> u32 {
    let room = if parsed.upper.kind == kind::V4 {
        ICMP_LENGTH - IPV4_HEADER - ICMP_HEADER
    } else {
        MAX_BODY
    };
    if length < room { length } else { room }
}

/// What an ICMP error contains of the original packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body {
    /// Bytes.
    pub length: u32,
    /// Their ones' complement sum as 16-bit numbers in network order; not folded. Where a device completes a
    /// checksum in there: the sum afterwards.
    pub sum: u32,
}

/// The sum of the bytes behind a field that a device completes, the field and its upper layer included: the
/// device sums up all of them, with the field as it is now, and stores the complement in the field
/// (`skb_checksum_help`, net/core/dev.c, 6.1). So whatever they are, their sum becomes the complement of what the
/// field holds now.
#[inline(always)]
#[must_use]
pub fn completed_sum(field: u16) -> u32 {
    u32::from(!field)
}

/// A sum folded to 16 bits.
#[inline(always)]
#[must_use]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// Writes an ICMP or ICMPv6 error in front of `body`; returns the bytes of its headers. `what` is one of those of
/// [`answer`] that are ICMP's.
#[inline(always)]
pub fn unreachable(what: u32, parsed: &Parsed, body: Body, out: &mut Headers) -> u32 {
    let length = ICMP_HEADER + body.length;
    if parsed.upper.kind == kind::V4 {
        let code = match what {
            answer::ICMP_HOST => 1,
            answer::ICMP_PORT => 3,
            _ => 13,
        };
        write_ipv4(parsed, INTERNETWORK_CONTROL, ICMP, length, out);
        write_icmp(out, IPV4_HEADER as usize, [3, code], body.sum);
        IPV4_HEADER + ICMP_HEADER
    } else {
        let code = match what {
            answer::ICMP_HOST => 3,
            answer::ICMP_PORT => 4,
            _ => 1,
        };
        write_ipv6(parsed, ICMPV6, length, out);
        let pseudo = pseudo_header(parsed, ICMPV6, length);
        write_icmp(
            out,
            IPV6_HEADER as usize,
            [1, code],
            body.sum + u32::from(pseudo),
        );
        IPV6_HEADER + ICMP_HEADER
    }
}

#[inline(always)]
fn write_icmp(out: &mut Headers, at: usize, [kind, code]: [u8; 2], rest: u32) {
    let check = !fold(u32::from(fold(rest)) + (u32::from(kind) << 8 | u32::from(code)));
    out[at] = kind;
    out[at + 1] = code;
    write16(out, at + 2, check);
    write16(out, at + 4, 0);
    write16(out, at + 6, 0);
}

/// Writes the reset that a segment is answered with; returns the bytes of its headers, of which the last 20 are
/// TCP's. With `partial` the checksum is left to be completed.
#[inline(always)]
pub fn reset(parsed: &Parsed, segment: &Segment, partial: bool, out: &mut Headers) -> u32 {
    let flags = parsed.upper.detail;
    let (sequence, acknowledgement, answer) = if flags & ACK != 0 {
        (segment.acknowledgement, 0, RST)
    } else {
        let length = segment.payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        (0, segment.sequence.wrapping_add(length), RST | ACK)
    };
    let v4 = parsed.upper.kind == kind::V4;
    let at = if v4 {
        write_ipv4(parsed, 0, TCP, TCP_HEADER, out);
        IPV4_HEADER
    } else {
        write_ipv6(parsed, TCP, TCP_HEADER, out);
        IPV6_HEADER
    };
    let (from, to) = (parsed.upper.destination_port, parsed.upper.source_port);
    let offset_flags = 5 << 12 | u16::from(answer);
    let pseudo = pseudo_header(parsed, TCP, TCP_HEADER);
    let header = u32::from(from)
        + u32::from(to)
        + halves(sequence)
        + halves(acknowledgement)
        + u32::from(offset_flags);
    let check = if partial {
        pseudo
    } else {
        !fold(header + u32::from(pseudo))
    };
    let mut write = |at: usize| {
        write16(out, at, from);
        write16(out, at + 2, to);
        write32(out, at + 4, sequence);
        write32(out, at + 8, acknowledgement);
        write16(out, at + 12, offset_flags);
        // A reset opens no window, and is not urgent.
        write16(out, at + 14, 0);
        write16(out, at + 16, check);
        write16(out, at + 18, 0);
    };
    if v4 {
        write(IPV4_HEADER as usize);
    } else {
        write(IPV6_HEADER as usize);
    }
    at + TCP_HEADER
}

/// An IPv4 header without options, for `length` bytes, from the packet's destination to its source.
#[inline(always)]
fn write_ipv4(parsed: &Parsed, tos: u8, protocol: u8, length: u32, out: &mut Headers) {
    let [from, to] = [parsed.destination, parsed.source].map(|address| {
        let [a, b, c, d, ..] = address[0].to_ne_bytes();
        u32::from_be_bytes([a, b, c, d])
    });
    let version_tos = 0x4500 | u16::from(tos);
    let total = (IPV4_HEADER + length) as u16;
    let ttl_protocol = u16::from(TTL) << 8 | u16::from(protocol);
    let sum = u32::from(version_tos)
        + u32::from(total)
        + u32::from(DONT_FRAGMENT)
        + u32::from(ttl_protocol)
        + halves(from)
        + halves(to);
    write16(out, 0, version_tos);
    write16(out, 2, total);
    write16(out, 4, 0);
    write16(out, 6, DONT_FRAGMENT);
    write16(out, 8, ttl_protocol);
    write16(out, 10, !fold(sum));
    write32(out, 12, from);
    write32(out, 16, to);
}

/// The same of IPv6.
#[inline(always)]
fn write_ipv6(parsed: &Parsed, next: u8, length: u32, out: &mut Headers) {
    write32(out, 0, 0x6000_0000);
    write16(out, 4, length as u16);
    out[6] = next;
    out[7] = TTL;
    let words = [
        parsed.destination[0],
        parsed.destination[1],
        parsed.source[0],
        parsed.source[1],
    ];
    for (index, word) in words.iter().enumerate() {
        let bytes = word.to_ne_bytes();
        for (place, byte) in bytes.iter().enumerate() {
            out[8 + index * 8 + place] = *byte;
        }
    }
}

/// Sum of the pseudo-header, folded and not complemented (RFC 9293, section 3.1; RFC 8200, section 8.1). That both
/// addresses change places does not show in it.
#[inline(always)]
fn pseudo_header(parsed: &Parsed, protocol: u8, length: u32) -> u16 {
    let mut sum = u32::from(protocol) + length;
    for word in [
        parsed.source[0],
        parsed.source[1],
        parsed.destination[0],
        parsed.destination[1],
    ] {
        let word = u64::from_be(word);
        sum += halves((word >> 32) as u32) + halves(word as u32);
    }
    fold(sum)
}

/// Both halves of a number added up.
#[inline(always)]
fn halves(number: u32) -> u32 {
    (number >> 16) + (number & 0xffff)
}

#[inline(always)]
fn write16(out: &mut Headers, at: usize, value: u16) {
    let [a, b] = value.to_be_bytes();
    out[at] = a;
    out[at + 1] = b;
}

#[inline(always)]
fn write32(out: &mut Headers, at: usize, value: u32) {
    write16(out, at, (value >> 16) as u16);
    write16(out, at + 2, value as u16);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::parse;

    fn sum(bytes: &[u8]) -> u32 {
        bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum()
    }

    /// The sum of an upper layer with its pseudo-header: 0xffff if its checksum is right.
    fn checked(v6: bool, packet: &[u8]) -> u16 {
        let (at, addresses, protocol) = if v6 {
            (40, 8..40, packet[6])
        } else {
            (20, 12..20, packet[9])
        };
        let length = packet.len() - at;
        fold(sum(&packet[addresses]) + u32::from(protocol) + length as u32 + sum(&packet[at..]))
    }

    fn packet(v6: bool, protocol: u8, upper: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        let length = upper.len() as u16;
        if v6 {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([protocol, 60]);
            packet.extend([0xfd; 15]);
            packet.push(1);
            packet.extend([0xfd; 15]);
            packet.push(2);
        } else {
            packet.extend([0x45, 0]);
            packet.extend((length + 20).to_be_bytes());
            packet.extend([0, 1, 0, 0, 60, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        packet.extend(upper);
        packet
    }

    fn tcp(flags: u8, payload: usize) -> Vec<u8> {
        let mut header = vec![
            0x30, 0x39, 0, 80, 0xff, 0xff, 0xff, 0xfe, 0x11, 0x22, 0x33, 0x44, 0x50, flags,
        ];
        header.extend([1, 2, 0, 0, 0, 0]);
        header.extend(vec![7; payload]);
        header
    }

    fn read(packet: &[u8]) -> Parsed {
        let mut parsed = Parsed::default();
        let ethertype = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
        parse(&packet, 0, ethertype, &mut parsed).unwrap();
        parsed
    }

    fn segment(payload: u32) -> Segment {
        Segment {
            sequence: 0xffff_fffe,
            acknowledgement: 0x1122_3344,
            payload,
        }
    }

    #[test]
    fn resets_are_those_of_rfc_9293() {
        for v6 in [false, true] {
            for (flags, payload, sequence, acknowledgement, answer) in [
                (SYN, 0, 0, 0xffff_ffff_u32, RST | ACK),
                (SYN, 5, 0, 4, RST | ACK),
                (FIN, 3, 0, 2, RST | ACK),
                (ACK, 100, 0x1122_3344, 0, RST),
                (SYN | ACK, 0, 0x1122_3344, 0, RST),
            ] {
                let original = packet(v6, TCP, &tcp(flags, payload));
                let parsed = read(&original);
                let mut out = [0xee; MAX_HEADERS];
                let length = reset(&parsed, &segment(payload as u32), false, &mut out) as usize;
                let out = &out[..length];
                let header = &out[length - 20..];
                assert_eq!(header[..4], [0, 80, 0x30, 0x39]);
                assert_eq!(header[4..8], u32::to_be_bytes(sequence));
                assert_eq!(header[8..12], acknowledgement.to_be_bytes());
                assert_eq!(header[12..16], [0x50, answer, 0, 0]);
                assert_eq!(checked(v6, out), 0xffff);
                let back = read(out);
                assert_eq!(
                    (back.source, back.destination),
                    (parsed.destination, parsed.source)
                );
                assert_eq!(back.stated_length, length as u32);
                if !v6 {
                    assert_eq!(fold(sum(&out[..20])), 0xffff);
                }
                assert!(!may_answer(answer::RST, &back) && !may_answer(answer::ICMP_HOST, &back));
            }
        }
    }

    #[test]
    fn a_partial_reset_is_right_once_it_is_completed() {
        for v6 in [false, true] {
            let parsed = read(&packet(v6, TCP, &tcp(SYN, 0)));
            let mut out = [0; MAX_HEADERS];
            let length = reset(&parsed, &segment(0), true, &mut out) as usize;
            let check = !fold(sum(&out[length - 20..length]));
            out[length - 4..length - 2].copy_from_slice(&check.to_be_bytes());
            assert_eq!(checked(v6, &out[..length]), 0xffff);
        }
    }

    #[test]
    fn errors_contain_the_packet_and_have_the_right_checksum() {
        for v6 in [false, true] {
            for (what, code4, code6) in [
                (answer::ICMP_HOST, 1, 3),
                (answer::ICMP_PORT, 3, 4),
                (answer::ICMP_ADMIN, 13, 1),
            ] {
                for payload in [0, 1, 7, 500, 1400] {
                    let original = packet(v6, UDP, &vec![0xab; 8 + payload]);
                    let parsed = read(&original);
                    let length = body_length(&parsed, original.len() as u32) as usize;
                    let body = Body {
                        length: length as u32,
                        sum: sum(&original[..length]),
                    };
                    let mut out = [0xee; MAX_HEADERS];
                    let headers = unreachable(what, &parsed, body, &mut out) as usize;
                    let answer = [&out[..headers], &original[..length]].concat();
                    let back = read(&answer);
                    assert_eq!(back.stated_length as usize, answer.len());
                    assert!(answer.len() <= if v6 { 1280 } else { 576 });
                    assert!(payload > 500 || length == original.len());
                    assert!(payload != 1400 || answer.len() == if v6 { 1280 } else { 576 });
                    assert_eq!(answer[headers - 8], if v6 { 1 } else { 3 });
                    assert_eq!(answer[headers - 7], if v6 { code6 } else { code4 });
                    assert_eq!(answer[headers - 4..headers], [0; 4]);
                    if v6 {
                        assert_eq!(checked(true, &answer), 0xffff);
                    } else {
                        assert_eq!(fold(sum(&answer[..20])), 0xffff);
                        assert_eq!(fold(sum(&answer[20..])), 0xffff);
                    }
                    assert!(!may_answer(answer::ICMP_HOST, &back));
                }
            }
        }
    }

    #[test]
    fn a_completed_sum_is_known_beforehand() {
        // What the field holds, whatever follows, and however much of it.
        for field in [0, 1, 0x1234, 0xfffe, 0xffff] {
            for length in [20, 21, 333] {
                let mut bytes: Vec<u8> = (3..=250).cycle().take(length).collect();
                bytes[16..18].copy_from_slice(&u16::to_be_bytes(field));
                let check = !fold(sum(&bytes));
                bytes[16..18].copy_from_slice(&check.to_be_bytes());
                let (after, before) = (fold(sum(&bytes)), fold(completed_sum(field)));
                // 0 and 0xffff are the same number in ones' complement.
                assert_eq!(after % 0xffff, before % 0xffff, "{field:#x} {length}");
            }
        }
    }

    #[test]
    fn what_must_not_be_answered_is_not() {
        let echo = |v6: bool, icmp_type| {
            packet(
                v6,
                if v6 { ICMPV6 } else { ICMP },
                &[icmp_type, 0, 0, 0, 0, 1, 0, 1],
            )
        };
        let icmp = |packet: &[u8]| may_answer(answer::ICMP_PORT, &read(packet));
        assert!(icmp(&echo(false, 8)) && icmp(&echo(false, 0)) && icmp(&echo(true, 128)));
        for error in [3, 4, 5, 11, 12, 200] {
            assert!(!icmp(&echo(false, error)), "{error}");
        }
        for error in [1, 2, 3, 4, 127, 135, 137] {
            assert!(!icmp(&echo(true, error)), "{error}");
        }
        let datagram = packet(false, UDP, &[0, 1, 0, 2, 0, 8, 0, 0]);
        assert!(icmp(&datagram));
        assert!(!may_answer(answer::RST, &read(&datagram)));
        for (at, address) in [
            (12, [0, 0, 0, 0]),
            (12, [224, 0, 0, 1]),
            (12, [255, 255, 255, 255]),
            (16, [239, 1, 2, 3]),
            (16, [255, 255, 255, 255]),
        ] {
            let mut other = datagram.clone();
            other[at..at + 4].copy_from_slice(&address);
            assert!(!icmp(&other), "{address:?}");
        }
        let datagram = packet(true, UDP, &[0, 1, 0, 2, 0, 8, 0, 0]);
        assert!(icmp(&datagram));
        for (at, first) in [(8, 0xff), (24, 0xff)] {
            let mut other = datagram.clone();
            other[at] = first;
            assert!(!icmp(&other));
        }
        let mut other = datagram.clone();
        other[8..24].fill(0);
        assert!(!icmp(&other));
        // Fragments: the first one for ICMP only, later ones not at all.
        let mut first = packet(false, TCP, &tcp(SYN, 0));
        assert!(may_answer(answer::RST, &read(&first)));
        first[6] = 0x20;
        assert!(!may_answer(answer::RST, &read(&first)) && icmp(&first));
        let mut later = first.clone();
        later[7] = 1;
        assert!(!icmp(&later));
        // A length that denies the headers.
        let mut short = packet(false, TCP, &tcp(SYN, 0));
        short[3] = 39;
        assert!(!icmp(&short));
    }

    #[test]
    fn the_payload_of_a_super_packet_is_that_of_all_its_segments() {
        let parsed = read(&packet(false, TCP, &tcp(ACK, 0)));
        let segments = Segments {
            count: 4,
            full_length: 140,
            last_length: 45,
        };
        assert_eq!(payload(&parsed, &segments), 305);
    }
}
