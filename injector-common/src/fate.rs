//! The arithmetic of faults: which positions a rule hits, when it acts, which share of flows is in.

use crate::{
    layout::{FlowKey, RuleEntry, fault, kind},
    siphash::{Key, hash_words},
};

/// How many of the `count` positions after `before` (that is, of `before + 1` to `before + count`) the fault
/// of `rule` hits.
#[inline(always)]
#[must_use]
pub fn hits(rule: &RuleEntry, before: u64, count: u64) -> u64 {
    let after = before + count;
    match rule.fault {
        fault::CUT | fault::REJECT => count,
        fault::NTH => u64::from(before < rule.n && rule.n <= after),
        fault::FIRST => at_most(after, rule.n) - at_most(before, rule.n),
        fault::ONCE => at_most(after, 1) - at_most(before, 1),
        fault::EVERY if rule.n != 0 => after / rule.n - before / rule.n,
        fault::PATTERN | fault::PATTERN_ONCE if rule.pattern_length != 0 => {
            pattern_hits(rule, after) - pattern_hits(rule, before)
        }
        _ => 0,
    }
}

/// Whether a fault hits every packet, whatever its position.
#[inline(always)]
#[must_use]
pub fn hits_all(rule: &RuleEntry) -> bool {
    rule.fault == fault::CUT || rule.fault == fault::REJECT
}

#[inline(always)]
fn at_most(value: u64, limit: u64) -> u64 {
    if value < limit { value } else { limit }
}

/// How many of the first `positions` positions the pattern hits.
#[inline(always)]
fn pattern_hits(rule: &RuleEntry, positions: u64) -> u64 {
    let length = u64::from(rule.pattern_length);
    let (cycles, rest) = if rule.fault == fault::PATTERN {
        (positions / length, positions % length)
    } else {
        (0, at_most(positions, length))
    };
    let mut in_cycle = 0;
    let mut in_rest = 0;
    for (index, word) in rule.pattern.iter().enumerate() {
        let start = index as u64 * 64;
        in_cycle += ones(*word);
        if rest > start {
            let bits = rest - start;
            in_rest += ones(if bits >= 64 {
                *word
            } else {
                *word & ((1 << bits) - 1)
            });
        }
    }
    cycles * in_cycle + in_rest
}

/// Bits set in `word`, without the population-count instruction that BPF does not have.
/// Source: H. S. Warren, "Hacker's Delight", section 5-1.
#[inline(always)]
fn ones(word: u64) -> u64 {
    let pairs = word - (word >> 1 & 0x5555_5555_5555_5555);
    let nibbles = (pairs & 0x3333_3333_3333_3333) + (pairs >> 2 & 0x3333_3333_3333_3333);
    ((nibbles + (nibbles >> 4)) & 0x0f0f_0f0f_0f0f_0f0f).wrapping_mul(0x0101_0101_0101_0101) >> 56
}

/// Position of the only bit that is set in `bit`.
#[inline(always)]
#[must_use]
pub fn position(bit: u64) -> u32 {
    // The barrier keeps LLVM from seeing a count of trailing zeros, which it would turn into a table
    // look-up that a BPF object cannot hold.
    (ones(core::hint::black_box(bit).wrapping_sub(1)) & 63) as u32
}

/// Whether a rule acts at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It acts.
    Acting,
    /// It flaps, and the link is up.
    Off,
    /// Its lifetime is over.
    Over,
}

/// Whether `rule` acts at `now_ns` (the lease aside).
#[inline(always)]
#[must_use]
pub fn phase(rule: &RuleEntry, now_ns: u64) -> Phase {
    if rule.deadline_ns != 0 && now_ns >= rule.deadline_ns {
        return Phase::Over;
    }
    if rule.flap_period_ns != 0 {
        let since = now_ns.saturating_sub(rule.activated_ns) + rule.flap_phase_ns;
        if since % rule.flap_period_ns < rule.flap_up_ns {
            return Phase::Off;
        }
    }
    Phase::Acting
}

/// Takes the ephemeral port out of a flow: the higher of the two ports is zeroed (equal ports both stay),
/// and so is the identifier of an ICMP echo.
#[inline(always)]
pub fn make_service(flow: &mut FlowKey) {
    if flow.kind == kind::ND
        || (flow.kind == kind::V4 && flow.protocol == 1)
        || (flow.kind == kind::V6 && flow.protocol == 58)
    {
        flow.low_port = 0;
        flow.high_port = 0;
    } else if flow.low_port > flow.high_port {
        flow.low_port = 0;
    } else if flow.high_port > flow.low_port {
        flow.high_port = 0;
    }
}

/// "share", the domain of the draw that decides whether a flow belongs to a share.
const SHARE_DOMAIN: u64 = 0x73_6861_7265;

/// The 32-bit draw that decides whether a flow belongs to the share of `rule`. `flow` is as the rule
/// identifies flows; `ordinal` its number among those to its service, where the rule goes by that, else 0.
#[inline(always)]
#[must_use]
pub fn share_draw(rule: &RuleEntry, flow: &FlowKey, ordinal: u64) -> u64 {
    // Addresses are bytes in memory order; SipHash reads little-endian words.
    let words = [
        u64::from_le(flow.low[0]),
        u64::from_le(flow.low[1]),
        u64::from_le(flow.high[0]),
        u64::from_le(flow.high[1]),
        u64::from(flow.low_port)
            | u64::from(flow.high_port) << 16
            | u64::from(flow.protocol) << 32
            | u64::from(flow.kind) << 40,
        // Above the domain first, and never the same for two of them.
        SHARE_DOMAIN ^ ordinal.rotate_left(40),
    ];
    hash_words(Key(rule.key0, rule.key1), &words) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_hand(rule: &RuleEntry, position: u64) -> bool {
        let index = |p: u64| rule.pattern[(p / 64) as usize] >> (p % 64) & 1 == 1;
        let length = u64::from(rule.pattern_length);
        match rule.fault {
            fault::CUT | fault::REJECT => true,
            fault::NTH => position == rule.n,
            fault::FIRST => position <= rule.n,
            fault::EVERY => position.is_multiple_of(rule.n),
            fault::PATTERN => index((position - 1) % length),
            fault::PATTERN_ONCE => position <= length && index(position - 1),
            fault::ONCE => position == 1,
            _ => unreachable!(),
        }
    }

    #[test]
    fn hits_of_a_range_are_those_of_its_positions() {
        for kind in [
            fault::CUT,
            fault::REJECT,
            fault::NTH,
            fault::FIRST,
            fault::EVERY,
            fault::PATTERN,
            fault::PATTERN_ONCE,
            fault::ONCE,
        ] {
            for (n, pattern_length) in [(1, 1), (3, 4), (7, 64), (45, 65), (100, 200), (2, 256)] {
                let rule = RuleEntry {
                    fault: kind,
                    n,
                    pattern: [0x8000_0000_dead_beef, 5, u64::MAX, 0x8000_0000_0000_0001],
                    pattern_length,
                    ..RuleEntry::default()
                };
                let mut rule = rule;
                for bit in pattern_length..256 {
                    rule.pattern[bit as usize / 64] &= !(1 << (bit % 64));
                }
                for before in [0, 1, 2, 3, 63, 64, 99, 255, 256, 1000] {
                    for count in [1, 2, 44, 64, 300] {
                        let expected = (before + 1..=before + count)
                            .filter(|p| by_hand(&rule, *p))
                            .count();
                        assert_eq!(
                            hits(&rule, before, count),
                            expected as u64,
                            "{rule:?} {before}+{count}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn positions_of_bits() {
        for bit in 0..64 {
            assert_eq!(position(1 << bit), bit);
        }
    }

    #[test]
    fn every_ordinal_has_a_draw_of_its_own() {
        let rule = RuleEntry {
            key0: 1,
            key1: 2,
            ..RuleEntry::default()
        };
        let draw = |ordinal| share_draw(&rule, &FlowKey::default(), ordinal);
        for bit in 0..64 {
            for other in bit + 1..64 {
                assert_ne!(draw(1 << bit), draw(1 << other), "{bit} and {other}");
            }
            assert_ne!(draw(1 << bit), draw(0), "{bit}");
        }
    }

    #[test]
    fn a_flapping_link_begins_up() {
        let rule = RuleEntry {
            activated_ns: 1000,
            deadline_ns: 2000,
            flap_period_ns: 35,
            flap_up_ns: 30,
            ..RuleEntry::default()
        };
        assert_eq!(phase(&rule, 1000), Phase::Off);
        assert_eq!(phase(&rule, 1029), Phase::Off);
        assert_eq!(phase(&rule, 1030), Phase::Acting);
        assert_eq!(phase(&rule, 1035), Phase::Off);
        assert_eq!(phase(&rule, 2000), Phase::Over);
    }
}
