//! Reading headers: Ethernet, VLAN tags, IPv4, IPv6 with extension headers, fragments, and what is needed
//! of TCP, UDP, ICMP, ICMPv6, SCTP and ARP.
//!
//! Sources: IEEE 802.1Q and 802.1ad (tags), RFC 791, RFC 8200 and RFC 7045 (extension headers), RFC 4302
//! (authentication header), RFC 9293, RFC 768, RFC 792, RFC 4443, RFC 4861 (neighbour discovery is ICMPv6
//! types 133 to 137), RFC 9260, RFC 826.

use crate::layout::{FlowKey, Upper, kind, site, upper_has};

/// Bytes of a packet, from the link layer on. In the kernel a bounds-checked view of the linear part of an
/// skb, elsewhere a slice.
pub trait Packet {
    /// A checked part of the packet.
    type Window: Window;

    /// The `length` bytes at `offset`, or `None` where the packet (or its linear part) ends before.
    fn window(&self, offset: u32, length: u32) -> Option<Self::Window>;

    /// Makes more bytes available, if that is possible; `false` if not. Windows taken before are void.
    fn pull(&mut self) -> bool;
}

/// Bytes that are known to be there. Offsets must lie within the length that was asked for.
pub trait Window: Copy {
    /// The byte at `at`.
    fn u8(self, at: usize) -> u8;
    /// The 16-bit number in network order at `at`.
    fn be16(self, at: usize) -> u16;
    /// The 32-bit number in network order at `at`.
    fn be32(self, at: usize) -> u32;
    /// Four bytes at `at` as they are in memory.
    fn raw32(self, at: usize) -> u32;
}

/// Why a packet was not parsed. It passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unparsed {
    /// A header that must be read does not lie within the packet.
    Truncated,
    /// A version or a header length cannot be.
    Malformed,
    /// More VLAN tags or extension headers than are followed.
    TooDeep,
}

/// Writes a macro out as many times as at most so many headers are followed. Not a loop: the verifier of 6.1
/// refuses those that the compiler lays out so that their last instruction falls through into their first
/// ("back-edge": `push_insn` with `loop_ok` false, kernel/bpf/verifier.c).
macro_rules! unrolled {
    (4, $step:ident) => {
        $step!();
        $step!();
        $step!();
        $step!();
    };
    (8, $step:ident) => {
        unrolled!(4, $step);
        unrolled!(4, $step);
    };
}

/// VLAN tags in the packet itself that are followed.
pub const MAX_VLAN_TAGS: u32 = 4;
/// IPv6 extension headers that are followed.
pub const MAX_EXTENSION_HEADERS: u32 = 8;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const SCTP: u8 = 132;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// Where a packet stands in its datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fragment {
    /// It is the whole of it.
    #[default]
    Whole,
    /// The first of several.
    First,
    /// One without upper-layer header.
    Later,
}

/// What was read of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parsed {
    /// Source address, network order; IPv4 in the first four bytes.
    pub source: [u64; 2],
    /// Destination address.
    pub destination: [u64; 2],
    /// Upper-layer protocol and what was read of it.
    pub upper: Upper,
    /// Place within a datagram.
    pub fragment: Fragment,
    /// Identification of a fragmented datagram.
    pub fragment_id: u32,
    /// Protocol that is part of a fragmented datagram's identity: IPv4's; 0 for IPv6.
    pub fragment_protocol: u8,
    /// Differentiated services code point, 0 to 63.
    pub dscp: u8,
    /// Bytes of the network header with options or extension headers.
    pub network_length: u32,
    /// Bytes of the upper-layer header as far as segmentation repeats it.
    pub upper_length: u32,
    /// Offset of the network header.
    pub network_offset: u32,
    /// Length of the IP packet by its own header; 0 where that does not say.
    pub stated_length: u32,
}

impl Parsed {
    /// Writes the conversation, canonically: the end with the lower address (and port, where both are the
    /// same) first. `site` says only how the packet stands to it ([`site`]).
    #[inline(always)]
    pub fn write_flow(&self, flow: &mut FlowKey) {
        let upper = &self.upper;
        let source = (u64::from_be(self.source[0]), u64::from_be(self.source[1]));
        let destination = (
            u64::from_be(self.destination[0]),
            u64::from_be(self.destination[1]),
        );
        let ordered = if source.0 != destination.0 {
            source.0 < destination.0
        } else if source.1 != destination.1 {
            source.1 < destination.1
        } else {
            upper.source_port <= upper.destination_port
        };
        if ordered {
            flow.low = self.source;
            flow.high = self.destination;
            flow.low_port = upper.source_port;
            flow.high_port = upper.destination_port;
            flow.site = 0;
        } else {
            flow.low = self.destination;
            flow.high = self.source;
            flow.low_port = upper.destination_port;
            flow.high_port = upper.source_port;
            flow.site = site::REVERSED;
        }
        flow.protocol = upper.protocol;
        flow.kind = upper.kind;
        if upper.has & upper_has::PORTS == 0 {
            flow.site |= site::PORTLESS;
        }
        if upper.has & upper_has::ADDRESSES == 0 {
            flow.site |= site::ADDRESSLESS;
        }
    }

    /// The conversation, with `site` 0; see [`Parsed::write_flow`].
    #[must_use]
    pub fn flow(&self) -> FlowKey {
        let mut flow = FlowKey::default();
        self.write_flow(&mut flow);
        FlowKey { site: 0, ..flow }
    }

    /// Whether the packet opens a connection by its own word: a TCP SYN without ACK, an SCTP INIT (chunk
    /// type 1, RFC 9260).
    #[inline(always)]
    #[must_use]
    pub fn opens(&self) -> bool {
        (self.upper.has & upper_has::TCP_FLAGS != 0 && self.upper.detail & 0x12 == 0x02)
            || (self.upper.has & upper_has::SCTP_CHUNK != 0 && self.upper.detail == 1)
    }

    /// Whether its protocol has an opening that a tracker waits for.
    #[inline(always)]
    #[must_use]
    pub fn has_opening(&self) -> bool {
        self.upper.protocol == TCP || self.upper.protocol == SCTP
    }
}

/// Reads the headers of `packet` into `parsed`. `l2_length` is 14 with an Ethernet header; with 0 the packet
/// begins with its network header, and `protocol` is the ethertype that came with it.
#[inline(always)]
pub fn parse<P: Packet>(
    packet: &P,
    l2_length: u32,
    protocol: u16,
    parsed: &mut Parsed,
) -> Result<(), Unparsed> {
    *parsed = Parsed::default();
    let mut offset = l2_length;
    let mut ethertype = protocol;
    if l2_length != 0 {
        ethertype = packet.window(0, 14).ok_or(Unparsed::Truncated)?.be16(12);
        macro_rules! tag {
            () => {
                if is_vlan(ethertype) {
                    ethertype = packet.window(offset, 4).ok_or(Unparsed::Truncated)?.be16(2);
                    offset += 4;
                }
            };
        }
        unrolled!(4, tag);
        if is_vlan(ethertype) {
            return Err(Unparsed::TooDeep);
        }
    }
    parsed.network_offset = offset;
    match ethertype {
        ETHERTYPE_IPV4 => parse_ipv4(packet, parsed),
        ETHERTYPE_IPV6 => parse_ipv6(packet, parsed),
        ETHERTYPE_ARP => parse_arp(packet, parsed),
        _ => {
            parsed.upper.kind = kind::OTHER;
            parsed.upper.protocol = crate::layout::OTHER_ETHERTYPE;
            Ok(())
        }
    }
}

/// Reads a number back from where it was stored. The verifier, which follows every path on its own, knows no
/// more of it then than its type, so that paths which differ in nothing else become one. (It follows values
/// on the stack, but not in maps, where the program keeps what it parses.)
#[inline(always)]
fn recall(number: &u32) -> u32 {
    // SAFETY: a reference is valid and aligned.
    unsafe { core::ptr::read_volatile(number) }
}

#[inline(always)]
fn is_vlan(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88a8 | 0x9100)
}

/// An address of four bytes, as it is kept in 16.
#[inline(always)]
fn short_address(raw: u32) -> [u64; 2] {
    // The four bytes as they are in memory come first, whatever the byte order of the machine.
    let [a, b, c, d] = raw.to_ne_bytes();
    [u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0]), 0]
}

#[inline(always)]
fn long_address<W: Window>(window: W, at: usize) -> [u64; 2] {
    [
        join(window.raw32(at), window.raw32(at + 4)),
        join(window.raw32(at + 8), window.raw32(at + 12)),
    ]
}

/// Eight bytes from two times four, in memory order.
#[inline(always)]
fn join(first: u32, second: u32) -> u64 {
    if cfg!(target_endian = "little") {
        u64::from(first) | u64::from(second) << 32
    } else {
        u64::from(first) << 32 | u64::from(second)
    }
}

#[expect(
    clippy::verbose_bit_mask,
    reason = "the mask is a field of the header, not a test for divisibility"
)]
#[inline(always)]
fn parse_ipv4<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Unparsed> {
    let offset = recall(&parsed.network_offset);
    let header = packet.window(offset, 20).ok_or(Unparsed::Truncated)?;
    let first = header.u8(0);
    let length = u32::from(first & 0xf) * 4;
    if first >> 4 != 4 || length < 20 {
        return Err(Unparsed::Malformed);
    }
    if length > 20 && packet.window(offset, length).is_none() {
        return Err(Unparsed::Truncated);
    }
    let flags_offset = header.be16(6);
    let protocol = header.u8(9);
    parsed.source = short_address(header.raw32(12));
    parsed.destination = short_address(header.raw32(16));
    parsed.dscp = header.u8(1) >> 2;
    parsed.network_length = length;
    parsed.stated_length = u32::from(header.be16(2));
    parsed.upper.kind = kind::V4;
    parsed.upper.has = upper_has::ADDRESSES;
    parsed.upper.protocol = protocol;
    // More fragments (0x2000), or an offset.
    if flags_offset & 0x3fff != 0 {
        parsed.fragment = if flags_offset & 0x1fff == 0 {
            Fragment::First
        } else {
            Fragment::Later
        };
        parsed.fragment_id = u32::from(header.be16(4));
        parsed.fragment_protocol = protocol;
        if parsed.fragment == Fragment::Later {
            return Ok(());
        }
    }
    parse_upper(packet, parsed)
}

#[inline(always)]
fn parse_ipv6<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Unparsed> {
    let offset = recall(&parsed.network_offset);
    let header = packet.window(offset, 40).ok_or(Unparsed::Truncated)?;
    let first = header.be16(0);
    if first >> 12 != 6 {
        return Err(Unparsed::Malformed);
    }
    let payload = u32::from(header.be16(4));
    parsed.source = long_address(header, 8);
    parsed.destination = long_address(header, 24);
    parsed.dscp = ((first >> 6) & 0x3f) as u8;
    parsed.stated_length = if payload == 0 { 0 } else { payload + 40 };
    parsed.upper.kind = kind::V6;
    parsed.upper.has = upper_has::ADDRESSES;
    parsed.network_length = 40;
    let next = skip_extensions(packet, parsed, header.u8(6))?;
    parsed.upper.protocol = next;
    if parsed.fragment == Fragment::Later {
        return Ok(());
    }
    parse_upper(packet, parsed)
}

/// Skips the extension headers, of which `next` is the first if there are any, and returns the protocol that
/// follows them.
#[inline(always)]
fn skip_extensions<P: Packet>(
    packet: &P,
    parsed: &mut Parsed,
    mut next: u8,
) -> Result<u8, Unparsed> {
    macro_rules! header {
        () => {
            if !is_extension(next) || parsed.fragment == Fragment::Later {
                return Ok(next);
            }
            next = skip_extension(packet, parsed, next)?;
        };
    }
    unrolled!(8, header);
    if !is_extension(next) || parsed.fragment == Fragment::Later {
        return Ok(next);
    }
    Err(Unparsed::TooDeep)
}

/// Skips the extension header `this`, and returns what it says is next.
#[inline(always)]
fn skip_extension<P: Packet>(packet: &P, parsed: &mut Parsed, this: u8) -> Result<u8, Unparsed> {
    let length = recall(&parsed.network_length);
    let offset = recall(&parsed.network_offset);
    let window = packet
        .window(offset + length, 8)
        .ok_or(Unparsed::Truncated)?;
    let units = u32::from(window.u8(1));
    if this == FRAGMENT {
        let position = window.be16(2);
        // Of several fragment headers the last one that is read counts.
        parsed.fragment = if position >> 3 != 0 {
            Fragment::Later
        } else if position & 1 != 0 {
            Fragment::First
        } else {
            Fragment::Whole
        };
        parsed.fragment_id = window.be32(4);
        parsed.network_length = length + 8;
    } else if this == AUTHENTICATION {
        parsed.network_length = length + (units + 2) * 4;
    } else {
        parsed.network_length = length + (units + 1) * 8;
    }
    Ok(window.u8(0))
}

/// Extension headers that are skipped. ESP (50) hides what follows and No Next Header (59) says that
/// nothing does: both end the chain, like any upper-layer protocol.
#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HOP_BY_HOP
            | ROUTING
            | FRAGMENT
            | AUTHENTICATION
            | DESTINATION_OPTIONS
            | MOBILITY
            | HIP
            | SHIM6
    )
}

#[inline(always)]
fn parse_upper<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Unparsed> {
    let offset = recall(&parsed.network_offset) + recall(&parsed.network_length);
    let upper = &mut parsed.upper;
    match (upper.protocol, upper.kind) {
        (TCP, _) => {
            let header = packet.window(offset, 20).ok_or(Unparsed::Truncated)?;
            let length = u32::from(header.u8(12) >> 4) * 4;
            if length < 20 {
                return Err(Unparsed::Malformed);
            }
            upper.source_port = header.be16(0);
            upper.destination_port = header.be16(2);
            upper.detail = header.u8(13);
            upper.has |= upper_has::PORTS | upper_has::TCP_FLAGS;
            parsed.upper_length = length;
        }
        (UDP, _) => {
            let header = packet.window(offset, 8).ok_or(Unparsed::Truncated)?;
            upper.source_port = header.be16(0);
            upper.destination_port = header.be16(2);
            upper.has |= upper_has::PORTS;
            parsed.upper_length = 8;
        }
        (SCTP, _) => {
            let header = packet.window(offset, 12).ok_or(Unparsed::Truncated)?;
            upper.source_port = header.be16(0);
            upper.destination_port = header.be16(2);
            upper.has |= upper_has::PORTS;
            if let Some(chunk) = packet.window(offset + 12, 1) {
                upper.detail = chunk.u8(0);
                upper.has |= upper_has::SCTP_CHUNK;
            }
        }
        (ICMP, kind::V4) => {
            let header = packet.window(offset, 8).ok_or(Unparsed::Truncated)?;
            let icmp_type = header.u8(0);
            if icmp_type == 8 || icmp_type == 0 {
                upper.source_port = header.be16(4);
                upper.destination_port = upper.source_port;
            }
            upper.detail = icmp_type;
            upper.has |= upper_has::ICMP_TYPE;
        }
        (ICMPV6, kind::V6) => {
            let header = packet.window(offset, 8).ok_or(Unparsed::Truncated)?;
            let icmp_type = header.u8(0);
            if icmp_type == 128 || icmp_type == 129 {
                upper.source_port = header.be16(4);
                upper.destination_port = upper.source_port;
            }
            if (133..=137).contains(&icmp_type) {
                upper.kind = kind::ND;
            }
            upper.detail = icmp_type;
            upper.has |= upper_has::ICMP_TYPE;
        }
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn parse_arp<P: Packet>(packet: &P, parsed: &mut Parsed) -> Result<(), Unparsed> {
    let offset = recall(&parsed.network_offset);
    let header = packet.window(offset, 8).ok_or(Unparsed::Truncated)?;
    parsed.upper.kind = kind::OTHER;
    parsed.upper.protocol = crate::layout::OTHER_ARP;
    // Ethernet and IPv4, the only pairing whose addresses a rule can name.
    if header.be32(0) == 0x0001_0800
        && header.be16(4) == 0x0604
        && let Some(body) = packet.window(offset, 28)
    {
        parsed.source = short_address(body.raw32(14));
        parsed.destination = short_address(body.raw32(24));
        parsed.upper.has = upper_has::ADDRESSES;
    }
    Ok(())
}

/// A packet in ordinary memory.
impl Packet for &[u8] {
    type Window = Self;

    fn window(&self, offset: u32, length: u32) -> Option<Self> {
        self.get(offset as usize..)?.get(..length as usize)
    }

    fn pull(&mut self) -> bool {
        false
    }
}

impl Window for &[u8] {
    fn u8(self, at: usize) -> u8 {
        self[at]
    }

    fn be16(self, at: usize) -> u16 {
        u16::from_be_bytes([self[at], self[at + 1]])
    }

    fn be32(self, at: usize) -> u32 {
        u32::from_be(self.raw32(at))
    }

    fn raw32(self, at: usize) -> u32 {
        u32::from_ne_bytes([self[at], self[at + 1], self[at + 2], self[at + 3]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(packet: &[u8]) -> Result<Parsed, Unparsed> {
        let mut parsed = Parsed::default();
        parse(&packet, 14, 0, &mut parsed).map(|()| parsed)
    }

    fn ipv4(protocol: u8, options: usize, upper: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 12];
        packet.extend([0x08, 0x00, 0x45 + (options as u8), 0xb8]);
        packet.extend(((20 + options * 4 + upper.len()) as u16).to_be_bytes());
        packet.extend([
            0x12, 0x34, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1,
        ]);
        packet.extend(vec![1; options * 4]);
        packet.extend(upper);
        packet
    }

    fn tcp(flags: u8) -> [u8; 20] {
        let mut header = [0; 20];
        header[..4].copy_from_slice(&[0x30, 0x39, 0, 80]);
        header[12] = 0x50;
        header[13] = flags;
        header
    }

    #[test]
    fn both_directions_are_one_flow() {
        let there = ipv4(6, 0, &tcp(2));
        let parsed = read(&there).unwrap();
        let mut back = there.clone();
        back[26..30].copy_from_slice(&[10, 0, 0, 1]);
        back[30..34].copy_from_slice(&[10, 0, 0, 2]);
        back[34..38].copy_from_slice(&[0, 80, 0x30, 0x39]);
        let reply = read(&back).unwrap();
        assert_eq!(parsed.flow(), reply.flow());
        assert_eq!(parsed.flow().low_port, 80);
        assert_eq!(parsed.dscp, 46);
        assert!(parsed.opens());
    }

    #[test]
    fn options_move_the_upper_header() {
        let packet = ipv4(6, 10, &tcp(0x10));
        let parsed = read(&packet).unwrap();
        assert_eq!(parsed.network_length, 60);
        assert_eq!(parsed.upper.source_port, 12345);
    }

    #[test]
    fn every_truncation_is_unparsed_and_none_panics() {
        let packet = ipv4(6, 3, &tcp(0x10));
        for length in 0..packet.len() {
            assert_eq!(
                read(&packet[..length]),
                Err(Unparsed::Truncated),
                "{length}"
            );
        }
        assert!(read(&packet).is_ok());
    }

    #[test]
    fn a_fifth_tag_is_too_deep() {
        for tags in 0..=5 {
            let plain = ipv4(17, 0, &[0, 1, 0, 2, 0, 8, 0, 0]);
            let mut packet = plain[..12].to_vec();
            for _ in 0..tags {
                packet.extend([0x81, 0x00, 0, 5]);
            }
            packet.extend(&plain[12..]);
            let parsed = read(&packet);
            if tags <= 4 {
                assert_eq!(parsed.unwrap().upper.destination_port, 2);
            } else {
                assert_eq!(parsed, Err(Unparsed::TooDeep));
            }
        }
    }
}
