//! Super-packets: how many wire packets an skb will become, and what each of them looks like.
//!
//! The kernel hands down one skb for up to 64 KB and cuts it later (`skb_gso_segment`, net/core/gso.c): every
//! segment repeats the headers and carries `gso_size` bytes, the last one the rest. TCP's segmentation
//! (`tcp_gso_segment`, `net/ipv4/tcp_offload.c`) leaves FIN and PSH to the last segment and CWR to the first.

use crate::{
    layout::{RuleEntry, rule_flag, upper_has},
    packet::Parsed,
};

/// What the kernel says of an skb besides its bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Meta {
    /// Bytes of the skb, link layer included.
    pub length: u32,
    /// Payload bytes of each segment; 0 for a packet that is none of a super-packet.
    pub gso_size: u32,
    /// Segments, where the kernel has counted them; else 0.
    pub gso_segs: u32,
    /// Firewall mark.
    pub mark: u32,
    /// Ethertype, where there is no link layer to read it from.
    pub protocol: u16,
    /// Slot of the target.
    pub target: u16,
    /// [`crate::layout::hook`].
    pub hook: u32,
}

/// `gso_size` of packets that are cut along their fragment list (SCTP): `GSO_BY_FRAGS`,
/// include/linux/skbuff.h.
pub const GSO_BY_FRAGS: u32 = 0xffff;

impl Meta {
    /// How many wire packets the skb is, at least 1; `None` where only its headers tell, since the kernel has not counted
    /// the segments of a super-packet (those of virtual machines come that way).
    #[inline(always)]
    #[must_use]
    pub const fn counted(&self) -> Option<u32> {
        if self.gso_size == 0 {
            Some(1)
        } else if self.gso_segs != 0 {
            Some(self.gso_segs)
        } else if self.gso_size == GSO_BY_FRAGS {
            Some(1)
        } else {
            None
        }
    }
}

/// The wire packets of one skb.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segments {
    /// How many; at least 1.
    pub count: u32,
    /// Length of the IP packet of every one but the last.
    pub full_length: u32,
    /// Length of the last one's.
    pub last_length: u32,
}

impl Segments {
    /// The wire packets of an skb whose headers are `parsed`.
    #[inline(always)]
    #[must_use]
    pub fn of(parsed: &Parsed, meta: &Meta) -> Self {
        let length = meta.length.saturating_sub(parsed.network_offset);
        let headers = parsed.network_length + parsed.upper_length;
        let payload = length.saturating_sub(headers);
        let count = match meta.counted() {
            Some(count) => count,
            None => payload.div_ceil(meta.gso_size),
        };
        if count <= 1 {
            let length = if parsed.stated_length != 0 {
                parsed.stated_length
            } else {
                length
            };
            return Self {
                count: 1,
                full_length: length,
                last_length: length,
            };
        }
        if meta.gso_size == GSO_BY_FRAGS {
            let each = length.div_ceil(count);
            return Self {
                count,
                full_length: each,
                last_length: each,
            };
        }
        let before_last = (count - 1).wrapping_mul(meta.gso_size);
        Self {
            count,
            full_length: headers + meta.gso_size,
            last_length: headers + payload.saturating_sub(before_last).max(1),
        }
    }
}

impl Segments {
    /// How many of them are longer than `mtu` bytes; none if that is 0.
    #[inline(always)]
    #[must_use]
    pub const fn longer(&self, mtu: u32) -> u32 {
        if mtu == 0 || self.full_length <= mtu {
            0
        } else if self.last_length > mtu {
            self.count
        } else {
            self.count - 1
        }
    }
}

/// Which wire packets of an skb a rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Matched {
    /// How many.
    pub packets: u32,
    /// Bytes of their IP packets.
    pub bytes: u64,
}

const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// How many of the wire packets meet what `rule` asks packet by packet. What it asks of the flow, and of
/// connection state, has been judged before.
#[inline(always)]
#[must_use]
pub fn matching(rule: &RuleEntry, parsed: &Parsed, segments: &Segments, mark: u32) -> Matched {
    let flags = rule.flags;
    if flags & rule_flag::DSCP != 0 {
        let is_ip = parsed.upper.kind != crate::layout::kind::OTHER;
        if !is_ip || rule.dscp >> (parsed.dscp & 63) & 1 == 0 {
            return Matched::default();
        }
    }
    if flags & rule_flag::MARK != 0 && !mark_matches(rule, mark) {
        return Matched::default();
    }
    if flags & rule_flag::ICMP_TYPE != 0 && !icmp_matches(rule, parsed) {
        return Matched::default();
    }
    if flags & rule_flag::TCP_FLAGS != 0 && parsed.upper.has & upper_has::TCP_FLAGS == 0 {
        return Matched::default();
    }
    if segments.count == 1 {
        return if segment_matches(rule, parsed.upper.detail, segments.last_length) {
            Matched {
                packets: 1,
                bytes: u64::from(segments.last_length),
            }
        } else {
            Matched::default()
        };
    }
    let tcp = parsed.upper.detail;
    let mut matched = Matched::default();
    if segment_matches(rule, tcp & !FIN_PSH, segments.full_length) {
        matched.packets += 1;
        matched.bytes += u64::from(segments.full_length);
    }
    if segment_matches(rule, tcp & !FIN_PSH & !CWR, segments.full_length) {
        let between = segments.count - 2;
        matched.packets += between;
        matched.bytes += u64::from(between) * u64::from(segments.full_length);
    }
    if segment_matches(rule, tcp & !CWR, segments.last_length) {
        matched.packets += 1;
        matched.bytes += u64::from(segments.last_length);
    }
    matched
}

#[inline(always)]
fn segment_matches(rule: &RuleEntry, tcp_flags: u8, length: u32) -> bool {
    if rule.flags & rule_flag::TCP_FLAGS != 0 {
        let [mask, value, ..] = rule.tcp_mask_value.to_le_bytes();
        if tcp_flags & mask != value {
            return false;
        }
    }
    if rule.flags & rule_flag::LENGTH != 0 {
        let mut inside = false;
        for (index, range) in rule.lengths.iter().enumerate() {
            if (index as u32) < rule.length_count && length >= range[0] && length <= range[1] {
                inside = true;
            }
        }
        return inside;
    }
    true
}

#[inline(always)]
fn mark_matches(rule: &RuleEntry, mark: u32) -> bool {
    let mut found = false;
    for (index, pair) in rule.marks.iter().enumerate() {
        if (index as u32) < rule.mark_count && mark & pair[1] == pair[0] {
            found = true;
        }
    }
    found
}

#[inline(always)]
fn icmp_matches(rule: &RuleEntry, parsed: &Parsed) -> bool {
    if parsed.upper.has & upper_has::ICMP_TYPE == 0 {
        return false;
    }
    let types = if parsed.upper.kind == crate::layout::kind::V4 {
        &rule.icmp_types
    } else {
        &rule.icmpv6_types
    };
    let icmp_type = parsed.upper.detail;
    types[(icmp_type >> 6) as usize & 3] >> (icmp_type & 63) & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed() -> Parsed {
        Parsed {
            network_offset: 14,
            network_length: 20,
            upper_length: 32,
            upper: crate::layout::Upper {
                protocol: 6,
                has: upper_has::TCP_FLAGS | upper_has::PORTS,
                detail: 0x99,
                ..crate::layout::Upper::default()
            },
            ..Parsed::default()
        }
    }

    #[test]
    fn counts_segments_where_the_kernel_has_not() {
        let meta = Meta {
            length: 14 + 52 + 3000,
            gso_size: 1448,
            ..Meta::default()
        };
        let segments = Segments::of(&parsed(), &meta);
        assert_eq!(
            segments,
            Segments {
                count: 3,
                full_length: 1500,
                last_length: 52 + 104
            }
        );
    }

    #[test]
    fn flags_stand_on_the_segments_that_carry_them() {
        // FIN, PSH, ACK and CWR on the super-packet.
        let segments = Segments {
            count: 5,
            full_length: 1500,
            last_length: 700,
        };
        let asks = |mask: u8, value: u8| RuleEntry {
            flags: rule_flag::TCP_FLAGS,
            tcp_mask_value: u32::from_le_bytes([mask, value, 0, 0]),
            ..RuleEntry::default()
        };
        assert_eq!(
            matching(&asks(0x01, 0x01), &parsed(), &segments, 0).packets,
            1
        );
        assert_eq!(
            matching(&asks(0x80, 0x80), &parsed(), &segments, 0).packets,
            1
        );
        assert_eq!(
            matching(&asks(0x80, 0x00), &parsed(), &segments, 0).packets,
            4
        );
        assert_eq!(
            matching(&asks(0x10, 0x10), &parsed(), &segments, 0).packets,
            5
        );
        assert_eq!(
            matching(&asks(0x02, 0x02), &parsed(), &segments, 0).packets,
            0
        );
    }

    #[test]
    fn lengths_are_those_of_wire_packets() {
        let segments = Segments {
            count: 3,
            full_length: 1500,
            last_length: 156,
        };
        let mut rule = RuleEntry {
            flags: rule_flag::LENGTH,
            length_count: 1,
            ..RuleEntry::default()
        };
        rule.lengths[0] = [1400, u32::MAX];
        let matched = matching(&rule, &parsed(), &segments, 0);
        assert_eq!(
            matched,
            Matched {
                packets: 2,
                bytes: 3000
            }
        );
        rule.lengths[0] = [0, 200];
        assert_eq!(matching(&rule, &parsed(), &segments, 0).packets, 1);
    }
}
