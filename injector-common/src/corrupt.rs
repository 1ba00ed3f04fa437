//! Corruption: which bits of a packet may be turned over, which of them are, and what that does to checksums.
//!
//! A bit's *position* counts from the first bit of the network header, in network order: the most significant bit
//! of a byte comes first. Nothing in front of the network header is ever touched.
//!
//! Where checksums are to be repaired, bits are left out whose change no checksum can make good: versions, lengths
//! of headers and packets, the protocol, fragment fields, TCP's data offset, and the checksums themselves. Left out
//! are also options of IPv4 and extension headers of IPv6, and addresses beside them (with a source route the
//! pseudo-header has another destination, RFC 8200 section 8.1); the network headers of fragments, since a fragment
//! with other addresses would be one of another datagram; and everything of later fragments, whose checksum is in
//! the first one, and of protocols other than TCP, UDP, ICMP and `ICMPv6`.
//!
//! Sources: RFC 1071 and RFC 1624 (checksums and their update), RFC 791, RFC 8200, RFC 9293, RFC 768, RFC 792,
//! RFC 4443.

use crate::{
    layout::{corrupt_how, kind},
    packet::{Fragment, ICMP, ICMPV6, Parsed, SCTP, TCP, UDP},
};

/// Ranges of positions at most.
const RANGES: usize = 8;

/// The positions at which bits may be turned over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ground {
    /// First position, and that behind the last one, in ascending order. Empty ones in between.
    pub ranges: [[u32; 2]; RANGES],
}

/// The upper-layer header, as far as it matters here.
#[derive(Clone, Copy, Default)]
struct UpperHeader {
    /// Its bytes; 0 where it is not known.
    length: u32,
    /// Offset of its checksum; 0 where that cannot be repaired.
    checksum: u32,
}

#[inline(always)]
fn upper_header(parsed: &Parsed) -> UpperHeader {
    if parsed.fragment == Fragment::Later {
        return UpperHeader::default();
    }
    let (length, checksum) = match (parsed.upper.protocol, parsed.upper.kind) {
        (TCP, _) => (parsed.upper_length, 16),
        (UDP, _) => (8, 6),
        (ICMP, kind::V4) | (ICMPV6, kind::V6 | kind::ND) => (8, 2),
        // CRC32c (RFC 9260) is not repaired.
        (SCTP, _) => (12, 0),
        _ => (0, 0),
    };
    UpperHeader { length, checksum }
}

impl Ground {
    /// Finds the positions in a packet whose IP packet has `length` bytes, for a rule with `how`
    /// ([`corrupt_how`]).
    #[inline(always)]
    pub fn find(&mut self, parsed: &Parsed, length: u32, how: u32) {
        *self = Self::default();
        if parsed.upper.kind == kind::OTHER {
            return;
        }
        let upper = upper_header(parsed);
        let network = parsed.network_length;
        let headers = network + upper.length;
        if how & corrupt_how::REPAIR == 0 {
            let headers = if headers < length { headers } else { length };
            if how & corrupt_how::HEADER != 0 {
                self.ranges[0] = [0, headers * 8];
            }
            if how & corrupt_how::PAYLOAD != 0 {
                self.ranges[1] = [headers * 8, length * 8];
            }
            return;
        }
        if upper.checksum == 0 || length < headers {
            return;
        }
        if how & corrupt_how::HEADER != 0 {
            if parsed.fragment == Fragment::Whole {
                self.add_network(parsed);
            }
            self.add_upper(parsed);
        }
        if how & corrupt_how::PAYLOAD != 0 {
            self.ranges[7] = [headers * 8, length * 8];
        }
    }

    #[inline(always)]
    fn add_network(&mut self, parsed: &Parsed) {
        if parsed.upper.kind == kind::V4 {
            // Type of service, identification, time to live, addresses.
            self.ranges[0] = [8, 16];
            self.ranges[1] = [32, 48];
            self.ranges[2] = [64, 72];
            if parsed.network_length == 20 {
                self.ranges[3] = [96, 160];
            }
        } else {
            // Traffic class and flow label, hop limit, addresses.
            self.ranges[0] = [4, 32];
            self.ranges[1] = [56, 64];
            if parsed.network_length == 40 {
                self.ranges[2] = [64, 320];
            }
        }
    }

    #[inline(always)]
    fn add_upper(&mut self, parsed: &Parsed) {
        let at = parsed.network_length * 8;
        match parsed.upper.protocol {
            TCP => {
                // Ports and numbers; flags and window; urgent pointer and options.
                self.ranges[4] = [at, at + 96];
                self.ranges[5] = [at + 104, at + 128];
                self.ranges[6] = [at + 144, at + parsed.upper_length * 8];
            }
            // Ports.
            UDP => self.ranges[4] = [at, at + 32],
            _ => {
                // Type and code; what follows the checksum.
                self.ranges[4] = [at, at + 16];
                self.ranges[5] = [at + 32, at + 64];
            }
        }
    }

    /// How many there are: fewer than 2^20.
    #[inline(always)]
    #[must_use]
    pub fn bits(&self) -> u32 {
        let mut bits = 0;
        for [begin, end] in self.ranges {
            bits += end - begin;
        }
        bits
    }

    /// The position of this number, from 0.
    #[inline(always)]
    #[must_use]
    pub fn position(&self, number: u32) -> u32 {
        let mut left = number;
        for [begin, end] in self.ranges {
            if left < end - begin {
                return begin + left;
            }
            left -= end - begin;
        }
        0
    }
}

/// The next one of some distinct numbers, of which each set is as likely as any other: round `index` of as many as
/// there are to be numbers, which are to be below that plus `spare`. `draw` is of [`crate::shape::purpose::BIT`]
/// plus the round, `taken` says whether a number was chosen before.
///
/// Source: R. W. Floyd in J. Bentley, "Programming Pearls: A Sample of Brilliance", Communications of the ACM 30
/// (1987), algorithm F2.
#[inline(always)]
#[must_use]
pub fn choose(draw: u64, spare: u32, index: u32, taken: impl FnOnce(u32) -> bool) -> u32 {
    let last = spare + index;
    // 44 bits of the draw times fewer than 20.
    let number = ((draw >> 20) * (u64::from(last) + 1)) >> 44;
    let number = number as u32;
    if taken(number) { last } else { number }
}

/// The offset from the network header of the byte at a position.
#[inline(always)]
#[must_use]
pub const fn byte(position: u32) -> u32 {
    position >> 3
}

/// The bit at a position, within its byte.
#[inline(always)]
#[must_use]
pub const fn mask(position: u32) -> u8 {
    0x80 >> (position & 7)
}

/// What changes of bytes add to the checksums that cover them: sums as RFC 1624 adds them up, not folded. Fewer than
/// 2^15 changes fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Repair {
    /// To IPv4's header checksum.
    pub network: u32,
    /// To that of the upper layer.
    pub upper: u32,
}

impl Repair {
    /// Takes account of a byte that was changed.
    #[inline(always)]
    pub fn account(&mut self, parsed: &Parsed, offset: u32, before: u8, after: u8) {
        // Headers have even lengths, so that an even offset is one in every checksum.
        let shift = if offset & 1 == 0 { 8 } else { 0 };
        let change = (!(u32::from(before) << shift) & 0xffff) + (u32::from(after) << shift);
        let v4 = parsed.upper.kind == kind::V4;
        if offset >= parsed.network_length {
            self.upper += change;
            return;
        }
        if v4 {
            self.network += change;
        }
        let first_address = if v4 { 12 } else { 8 };
        // ICMP, unlike ICMPv6, has no pseudo-header.
        let pseudo = !(v4 && parsed.upper.protocol == ICMP);
        if pseudo && offset >= first_address {
            self.upper += change;
        }
    }
}

/// Offset of IPv4's header checksum.
pub const NETWORK_CHECKSUM: u32 = 10;

/// Offset of the upper layer's checksum from the network header.
#[inline(always)]
#[must_use]
pub fn upper_checksum(parsed: &Parsed) -> u32 {
    parsed.network_length + upper_header(parsed).checksum
}

/// A checksum after a change (RFC 1624, equation 3), of which [`Repair`] has the sum.
#[inline(always)]
#[must_use]
pub fn amended(checksum: u16, change: u32) -> u16 {
    let sum = u32::from(!checksum) + change;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// The same for an upper layer. UDP's 0 says that there is none, and stays; one that becomes 0 is sent as 0xffff
/// (RFC 768).
#[inline(always)]
#[must_use]
pub fn amended_upper(parsed: &Parsed, checksum: u16, change: u32) -> u16 {
    if parsed.upper.protocol != UDP {
        return amended(checksum, change);
    }
    if checksum == 0 {
        return 0;
    }
    match amended(checksum, change) {
        0 => 0xffff,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        packet::parse,
        siphash::{Key, hash_words},
    };

    const ALL: u32 = corrupt_how::HEADER | corrupt_how::PAYLOAD;

    /// Ones' complement sum of 16-bit numbers in network order (RFC 1071).
    fn sum(bytes: &[u8]) -> u32 {
        let mut sum = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum::<u32>();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    }

    /// What the checksum of an upper layer is computed over, from an IP packet.
    fn covered(packet: &[u8], protocol: u8, header: usize) -> Vec<u8> {
        let upper = &packet[header..];
        let mut bytes = Vec::new();
        if packet[0] >> 4 == 6 {
            bytes.extend(&packet[8..40]);
        } else if protocol != ICMP {
            bytes.extend(&packet[12..20]);
        }
        if !bytes.is_empty() {
            bytes.extend((upper.len() as u32).to_be_bytes());
            bytes.extend([0, 0, 0, protocol]);
        }
        bytes.extend(upper);
        bytes
    }

    fn is_valid(packet: &[u8], protocol: u8, header: usize) -> bool {
        (packet[0] >> 4 == 6 || sum(&packet[..header]) == 0xffff)
            && sum(&covered(packet, protocol, header)) == 0xffff
    }

    /// A frame with an IP packet of right checksums, and `payload` bytes of payload.
    fn frame(v6: bool, protocol: u8, options: usize, payload: usize) -> Vec<u8> {
        let mut upper = match protocol {
            TCP => {
                let mut tcp = vec![0x30, 0x39, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8, 0x80, 0x18, 1, 0];
                tcp.extend([0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
                tcp
            }
            UDP => {
                let length = (8 + payload) as u16;
                let mut udp = vec![0x30, 0x39, 0, 53];
                udp.extend(length.to_be_bytes());
                udp.extend([0, 0]);
                udp
            }
            _ => vec![if v6 { 128 } else { 8 }, 0, 0, 0, 0, 7, 0, 1],
        };
        upper.extend((0..payload).map(|index| (index * 37) as u8));
        let mut packet = if v6 {
            let mut packet = vec![0x60, 0x01, 0x23, 0x45];
            packet.extend(((upper.len() + options) as u16).to_be_bytes());
            packet.extend([if options == 0 { protocol } else { 60 }, 64]);
            packet.extend((0..32).map(|index| 0x20 + index));
            if options != 0 {
                packet.extend([protocol, (options / 8 - 1) as u8, 1, 4]);
                packet.resize(40 + options, 0);
            }
            packet
        } else {
            let mut packet = vec![0x45 + (options / 4) as u8, 0x10];
            packet.extend(((20 + options + upper.len()) as u16).to_be_bytes());
            packet.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            packet.resize(20 + options, 1);
            let checksum = !(sum(&packet) as u16);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
            packet
        };
        let header = packet.len();
        packet.extend(upper);
        let at = match protocol {
            TCP => 16,
            UDP => 6,
            _ => 2,
        };
        let checksum = !(sum(&covered(&packet, protocol, header)) as u16);
        packet[header + at..header + at + 2].copy_from_slice(&checksum.to_be_bytes());
        let mut frame = vec![0; 12];
        frame.extend(if v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        frame.extend(packet);
        frame
    }

    fn parsed(frame: &[u8]) -> Parsed {
        let mut parsed = Parsed::default();
        parse(&frame, 14, 0, &mut parsed).unwrap();
        parsed
    }

    fn positions(parsed: &Parsed, length: usize, how: u32) -> Vec<u32> {
        let mut ground = Ground::default();
        ground.find(parsed, length as u32, how);
        (0..ground.bits())
            .map(|number| ground.position(number))
            .collect()
    }

    fn chosen(seed: u64, count: u32, bits: u32) -> Vec<u32> {
        let mut numbers = Vec::new();
        for index in 0..count {
            let draw = hash_words(Key(seed, 1), &[u64::from(index)]);
            let number = choose(draw, bits - count, index, |number| {
                numbers.contains(&number)
            });
            numbers.push(number);
        }
        numbers
    }

    /// Turns bits over and amends the checksums, as the kernel program does.
    fn corrupt(frame: &mut [u8], parsed: &Parsed, positions: &[u32]) {
        let start = parsed.network_offset as usize;
        let mut repair = Repair::default();
        for &position in positions {
            let at = start + byte(position) as usize;
            let before = frame[at];
            frame[at] ^= mask(position);
            repair.account(parsed, byte(position), before, frame[at]);
        }
        let mut amend = |at: u32, amended: &dyn Fn(u16) -> u16| {
            let at = start + at as usize;
            let old = u16::from_be_bytes([frame[at], frame[at + 1]]);
            frame[at..at + 2].copy_from_slice(&amended(old).to_be_bytes());
        };
        if repair.network != 0 {
            amend(NETWORK_CHECKSUM, &|old| amended(old, repair.network));
        }
        if repair.upper != 0 {
            amend(upper_checksum(parsed), &|old| {
                amended_upper(parsed, old, repair.upper)
            });
        }
    }

    /// Versions, lengths, protocol, fragments and checksums, byte by byte with the bits that are never chosen.
    fn excluded(v6: bool, protocol: u8, header: usize) -> Vec<(usize, u8)> {
        let mut bits = if v6 {
            vec![(0, 0xf0), (4, 0xff), (5, 0xff), (6, 0xff)]
        } else {
            [0, 2, 3, 6, 7, 9, 10, 11].map(|at| (at, 0xff)).to_vec()
        };
        let plain = if v6 { 40 } else { 20 };
        bits.extend((plain..header).map(|at| (at, 0xff)));
        if header > plain {
            bits.extend((if v6 { 8 } else { 12 }..plain).map(|at| (at, 0xff)));
        }
        let upper: &[usize] = match protocol {
            TCP => &[12, 16, 17],
            UDP => &[4, 5, 6, 7],
            _ => &[2, 3],
        };
        bits.extend(upper.iter().map(|at| (header + at, 0xff)));
        bits
    }

    #[test]
    fn repaired_packets_are_valid_and_only_the_chosen_bits_differ() {
        for v6 in [false, true] {
            for protocol in [TCP, UDP, if v6 { ICMPV6 } else { ICMP }] {
                for options in [0, 8] {
                    for payload in [0, 1, 64, 1001] {
                        let frame = frame(v6, protocol, options, payload);
                        let parsed = parsed(&frame);
                        let header = parsed.network_length as usize;
                        assert!(is_valid(&frame[14..], protocol, header));
                        let all = positions(&parsed, frame.len() - 14, ALL | corrupt_how::REPAIR);
                        let excluded = excluded(v6, protocol, header);
                        // Every bit is either chosen from or excluded.
                        let expected: Vec<u32> = (0..(frame.len() as u32 - 14) * 8)
                            .filter(|position| {
                                !excluded.iter().any(|(at, bits)| {
                                    byte(*position) as usize == *at && mask(*position) & bits != 0
                                })
                            })
                            .collect();
                        assert_eq!(all, expected, "IPv6 {v6} {protocol} {options} {payload}");
                        for seed in 0..200 {
                            let count = (seed as u32 % 32 + 1).min(all.len() as u32);
                            let flips: Vec<u32> = chosen(seed, count, all.len() as u32)
                                .into_iter()
                                .map(|number| all[number as usize])
                                .collect();
                            let mut after = frame.clone();
                            corrupt(&mut after, &parsed, &flips);
                            assert!(is_valid(&after[14..], protocol, header), "{flips:?}");
                            let different: BTreeSet<u32> = (0..(frame.len() as u32 - 14) * 8)
                                .filter(|position| {
                                    let at = 14 + byte(*position) as usize;
                                    (frame[at] ^ after[at]) & mask(*position) != 0
                                        && all.binary_search(position).is_ok()
                                })
                                .collect();
                            assert_eq!(different, flips.into_iter().collect());
                            assert_eq!(frame[..14], after[..14]);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn chosen_numbers_are_distinct_and_all_are_chosen() {
        let mut counts = [0_u32; 40];
        for seed in 0..20_000 {
            let numbers = chosen(seed, 32, 40);
            let distinct: BTreeSet<u32> = numbers.iter().copied().collect();
            assert_eq!(distinct.len(), 32);
            for number in numbers {
                counts[number as usize] += 1;
            }
        }
        // Each is in 16,000 sets of 20,000, with a deviation of 57. Taking the last one where Floyd does not would
        // leave out or prefer some by thousands.
        assert!(
            counts.iter().all(|count| (15_600..=16_400).contains(count)),
            "{counts:?}"
        );
        assert_eq!(
            chosen(1, 32, 32).into_iter().collect::<BTreeSet<_>>(),
            (0..32).collect()
        );
    }

    #[test]
    fn header_and_payload_are_apart() {
        for (protocol, upper) in [(TCP, 32), (UDP, 8), (ICMP, 8)] {
            let frame = frame(false, protocol, 0, 100);
            let parsed = parsed(&frame);
            let length = frame.len() - 14;
            let border = (20 + upper) * 8;
            assert_eq!(
                positions(&parsed, length, corrupt_how::HEADER),
                (0..border).collect::<Vec<_>>()
            );
            assert_eq!(
                positions(&parsed, length, corrupt_how::PAYLOAD),
                (border..length as u32 * 8).collect::<Vec<_>>()
            );
            let repaired = corrupt_how::PAYLOAD | corrupt_how::REPAIR;
            assert_eq!(
                positions(&parsed, length, repaired),
                (border..length as u32 * 8).collect::<Vec<_>>()
            );
            let repaired = corrupt_how::HEADER | corrupt_how::REPAIR;
            assert!(
                positions(&parsed, length, repaired)
                    .iter()
                    .all(|position| *position < border)
            );
        }
        let frame = frame(false, UDP, 0, 0);
        assert!(positions(&parsed(&frame), 28, corrupt_how::PAYLOAD).is_empty());
    }

    #[test]
    fn fragments_and_other_protocols_are_not_repaired_where_they_cannot_be() {
        let how = ALL | corrupt_how::REPAIR;
        let whole = frame(false, UDP, 0, 64);
        let mut first = parsed(&whole);
        first.fragment = Fragment::First;
        let at = positions(&first, 92, how);
        assert!(at.iter().all(|position| byte(*position) >= 20));
        assert_eq!(at.len(), 32 + 64 * 8);
        let mut later = first;
        later.fragment = Fragment::Later;
        assert!(positions(&later, 92, how).is_empty());
        assert_eq!(
            positions(&later, 92, corrupt_how::PAYLOAD),
            (160..92 * 8).collect::<Vec<_>>()
        );
        for protocol in [SCTP, 47, 50] {
            let mut other = parsed(&whole);
            other.upper.protocol = protocol;
            assert!(positions(&other, 92, how).is_empty());
            assert_eq!(positions(&other, 92, ALL).len(), 92 * 8);
        }
        let mut arp = parsed(&whole);
        arp.upper.kind = kind::OTHER;
        assert!(positions(&arp, 92, ALL).is_empty());
        // A packet that is cut off before its headers end.
        assert!(positions(&parsed(&whole), 27, how).is_empty());
        assert_eq!(positions(&parsed(&whole), 27, ALL).len(), 27 * 8);
    }

    #[test]
    fn checksums_of_udp_keep_away_from_zero() {
        let frame = frame(false, UDP, 0, 64);
        let udp = parsed(&frame);
        assert_eq!(amended_upper(&udp, 0, 0x1234), 0);
        // A change by 1 that makes the checksum 0.
        let mut repair = Repair::default();
        repair.account(&udp, 29, 0, 1);
        assert_eq!(amended(1, repair.upper), 0);
        assert_eq!(amended_upper(&udp, 1, repair.upper), 0xffff);
        let mut tcp = udp;
        tcp.upper.protocol = TCP;
        assert_eq!(amended_upper(&tcp, 1, repair.upper), 0);
    }
}
