//! The arithmetic of a lane's faults: random draws, models of loss, distributions of delay.
//!
//! Every draw is a pure function of the rule's key, the flow, the direction, the packet's number n and the
//! draw's purpose ([`purpose`]), so that equal sequences of packets meet equal fates.

use crate::{
    layout::{
        DISTRIBUTION_SCALE, DISTRIBUTION_STEPS, Distribution, FlowKey, RuleEntry, Shape,
        distribution, loss_model,
    },
    siphash::{Key, hash_words},
};

/// What a draw is for.
pub mod purpose {
    /// Loss: the upper half for the model's state, the lower one for the packet.
    pub const LOSS: u64 = 0x6c6f_7373;
    /// Duplication (upper half) and holding back (lower half).
    pub const CHANCE: u64 = 0x6368_616e_6365;
    /// Delay (upper half); plus the number of the copy, 0 for the original.
    pub const DELAY: u64 = 0x64_656c_6179_0000;
    /// Corruption (upper half).
    pub const CORRUPT: u64 = 0x63_6f72_7275_7074;
    /// Which bits; plus the number of those chosen before.
    pub const BIT: u64 = 0x62_6974_0000;
}

/// The random stream of a flow under a rule, in one direction; never 0. `flow` is as the rule identifies flows,
/// `ordinal` its number among those to its service where the rule goes by that, else 0.
#[inline(always)]
#[must_use]
pub fn stream(rule: &RuleEntry, flow: &FlowKey, direction: u32, ordinal: u64) -> u64 {
    /// "stream".
    const DOMAIN: u64 = 0x7374_7265_616d;
    // Addresses are bytes in memory order; SipHash reads little-endian words.
    let words = [
        u64::from_le(flow.low[0]),
        u64::from_le(flow.low[1]),
        u64::from_le(flow.high[0]),
        u64::from_le(flow.high[1]),
        u64::from(flow.low_port)
            | u64::from(flow.high_port) << 16
            | u64::from(flow.protocol) << 32
            | u64::from(flow.kind) << 40
            | u64::from(direction) << 48,
        // Above the domain first, and never the same for two of them.
        DOMAIN ^ ordinal.rotate_left(48),
    ];
    hash_words(Key(rule.key0, rule.key1), &words) | 1
}

/// A draw of 64 bits for packet `n` (from 1) of a stream.
#[inline(always)]
#[must_use]
pub fn draw(rule: &RuleEntry, stream: u64, n: u64, purpose: u64) -> u64 {
    hash_words(Key(rule.key0, rule.key1), &[stream, n, purpose])
}

/// The upper 32 bits of a draw.
#[inline(always)]
#[must_use]
pub const fn upper(draw: u64) -> u64 {
    draw >> 32
}

/// The lower 32 bits of a draw.
#[inline(always)]
#[must_use]
pub const fn lower(draw: u64) -> u64 {
    draw & 0xffff_ffff
}

/// What a rule remembers of a flow from packet to packet, in one word that is exchanged as a whole: the number
/// of packets (44 bits), the state of the loss model (2 bits), and the last delay as a normal deviate (18 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory(pub u64);

const N_BITS: u32 = 44;
const LOSS_BITS: u32 = 2;
/// Bits behind the binary point of the normal deviate.
const DEVIATE_SCALE: u32 = 13;

impl Memory {
    /// Puts one together; what does not fit is cut off.
    #[inline(always)]
    #[must_use]
    pub const fn new(n: u64, loss: u64, deviate: i64) -> Self {
        Self(
            n & ((1 << N_BITS) - 1)
                | (loss & ((1 << LOSS_BITS) - 1)) << N_BITS
                | deviate.cast_unsigned() << (N_BITS + LOSS_BITS),
        )
    }

    /// Packets so far.
    #[inline(always)]
    #[must_use]
    pub const fn n(self) -> u64 {
        self.0 & ((1 << N_BITS) - 1)
    }

    /// State of the loss model, from 0.
    #[inline(always)]
    #[must_use]
    pub const fn loss(self) -> u64 {
        self.0 >> N_BITS & ((1 << LOSS_BITS) - 1)
    }

    /// The last normal deviate, with 13 bits behind the binary point.
    #[inline(always)]
    #[must_use]
    pub const fn deviate(self) -> i64 {
        self.0.cast_signed() >> (N_BITS + LOSS_BITS)
    }
}

/// Whether a rule needs more of its flows remembered than how many packets there were.
#[inline(always)]
#[must_use]
pub const fn remembers(shape: &Shape) -> bool {
    shape.loss_model != loss_model::BERNOULLI || shape.correlation != 0
}

/// Whether the loss model takes a packet, and its state afterwards. `draw` is of [`purpose::LOSS`].
///
/// Gilbert-Elliott and the four states are those of netem (`loss_gilb_ell` and `loss_4state`,
/// `net/sched/sch_netem.c`, 6.1; S. Salsano and others, "Definition of a general and intuitive loss model for
/// packet networks and its implementation in the Netem module in the Linux kernel", 2012), whose states 1 to 4
/// are 0 to 3 here.
#[inline(always)]
#[must_use]
pub fn loss(shape: &Shape, state: u64, draw: u64) -> (bool, u64) {
    let first = upper(draw);
    match shape.loss_model {
        loss_model::GILBERT_ELLIOTT => {
            let [to_bad, to_good, in_bad, in_good, _] = shape.loss;
            // Good is 0, bad is 1. The packet meets the state as it was before.
            if state == 0 {
                (lower(draw) < in_good, u64::from(first < to_bad))
            } else {
                (lower(draw) < in_bad, u64::from(first >= to_good))
            }
        }
        loss_model::FOUR_STATES => {
            let [p13, p31, p32, p23, p14] = shape.loss;
            match state {
                // In a gap, received.
                0 if first < p14 => (true, 3),
                0 if first < p14 + p13 => (true, 2),
                // In a burst, received.
                1 if first < p23 => (true, 2),
                1 => (false, 1),
                // In a burst, lost.
                2 if first < p32 => (false, 1),
                2 if first < p32 + p31 => (false, 0),
                2 => (true, 2),
                // On in a gap, or back in one after a loss.
                _ => (false, 0),
            }
        }
        _ => (first < shape.loss[0], 0),
    }
}

/// A quantile of a distribution at `probability` (in 2^32): interpolated, in units of the jitter with
/// [`DISTRIBUTION_SCALE`] bits behind the binary point.
#[inline(always)]
#[must_use]
pub fn quantile(table: &Distribution, probability: u64) -> i64 {
    const SHIFT: u32 = 32 - DISTRIBUTION_STEPS.ilog2();
    let at = (probability >> SHIFT) as usize & (DISTRIBUTION_STEPS - 1);
    let part = (probability & ((1 << SHIFT) - 1)).cast_signed();
    let (below, above) = (
        i64::from(table.quantiles[at]),
        i64::from(table.quantiles[at + 1]),
    );
    below + (((above - below) * part) >> SHIFT)
}

/// The next normal deviate of a process with the correlation of `shape`, in which the one before was `last`
/// (13 bits behind the binary point) and `innovation` is a fresh one (16 bits). Every one of them is distributed
/// as the first: correlation leaves the distribution alone.
#[inline(always)]
#[must_use]
pub fn correlate(shape: &Shape, last: i64, innovation: i64) -> i64 {
    let last = last << (DISTRIBUTION_SCALE - DEVIATE_SCALE);
    let next = (i64::from(shape.correlation) * last + i64::from(shape.innovation) * innovation)
        >> DISTRIBUTION_SCALE;
    next >> (DISTRIBUTION_SCALE - DEVIATE_SCALE)
}

/// The first deviate of such a process.
#[inline(always)]
#[must_use]
pub const fn first_deviate(innovation: i64) -> i64 {
    innovation >> (DISTRIBUTION_SCALE - DEVIATE_SCALE)
}

/// The probability (in 2^32) below a normal deviate with 13 bits behind the binary point. `table` is
/// [`crate::layout::DISTRIBUTION_NORMAL_CDF`].
#[inline(always)]
#[must_use]
pub fn below(table: &Distribution, deviate: i64) -> u64 {
    const HALF: i64 = 8 << DEVIATE_SCALE;
    /// Deviates of a step: the table has 256 steps to one.
    const SHIFT: u32 = DEVIATE_SCALE - 8;
    let place = deviate + HALF;
    let place = place.clamp(0, 2 * HALF - 1).cast_unsigned();
    let at = (place >> SHIFT) as usize & (DISTRIBUTION_STEPS - 1);
    let part = (place & ((1 << SHIFT) - 1)).cast_signed();
    let (below, above) = (
        i64::from(table.quantiles[at]),
        i64::from(table.quantiles[at + 1]),
    );
    // From units of 2^-31 to 2^-32.
    (below + (((above - below) * part) >> SHIFT)).cast_unsigned() << 1
}

/// A delay in nanoseconds, from a quantile's value. Never below zero.
#[inline(always)]
#[must_use]
pub fn delayed(shape: &Shape, value: i64) -> u64 {
    let jitter = (shape.jitter_ns.cast_signed() * value) >> DISTRIBUTION_SCALE;
    let delay = shape.delay_ns.cast_signed() + jitter;
    delay.max(0).cast_unsigned()
}

/// The value of the uniform distribution at `probability` (in 2^32), as [`quantile`] gives it.
#[inline(always)]
#[must_use]
pub const fn uniform(probability: u64) -> i64 {
    (probability >> (31 - DISTRIBUTION_SCALE)).cast_signed() - (1 << DISTRIBUTION_SCALE)
}

/// When a packet leaves that would leave at `leaves_ns`, if a stall holds it; else 0.
#[inline(always)]
#[must_use]
pub const fn stalled_until(shape: &Shape, activated_ns: u64, leaves_ns: u64) -> u64 {
    let since = leaves_ns.saturating_sub(activated_ns);
    let into = if shape.stall_every_ns != 0 {
        since % shape.stall_every_ns
    } else {
        since
    };
    if into < shape.stall_ns {
        leaves_ns + (shape.stall_ns - into)
    } else {
        0
    }
}

/// Whether delays of `shape` are drawn from a table.
#[inline(always)]
#[must_use]
pub const fn has_table(shape: &Shape) -> bool {
    shape.distribution != distribution::UNIFORM
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn flows_that_go_by_ordinals_have_streams_of_their_own() {
        let rule = RuleEntry::default();
        let flow = FlowKey::default();
        let ordinals: Vec<u64> = (0..20)
            .flat_map(|bit| [1 << bit, (1 << bit) + 1, 0x1_0000 << bit])
            .collect();
        let different: HashSet<u64> = ordinals.iter().copied().collect();
        let streams: HashSet<u64> = ordinals
            .iter()
            .map(|ordinal| stream(&rule, &flow, 0, *ordinal))
            .collect();
        assert_eq!(streams.len(), different.len());
    }
}
