//! What a rule does in a lane, as the tables hold it.

use std::time::Duration;

use injector_common::layout::{
    BYTE_TIME_SCALE, DISTRIBUTION_SCALE, Shape, corrupt_how, loss_model, needs, queue_limit,
    rate_share, stage,
};

use super::distribution;
use crate::rules::{
    model::Rule,
    shaping::{
        Checksum, Corrupt, Delay, Loss, Order, Part, QueueLimit, Rate, RateShare, Shaping, Speed,
    },
};

/// What a rule needs beyond its targets' hooks.
pub(super) fn needs(rule: &Rule) -> u32 {
    let mut bits = 0;
    if rule.shaping.needs_lane() {
        bits |= needs::LANE;
    }
    if rule.tells_packets_apart() {
        bits |= needs::WIRE;
    }
    if rule.shaping.corrupt.is_some() {
        bits |= needs::COMPLETE;
    }
    bits
}

/// The table's entry of a rule, save for the number of a given distribution's table, and for where its trace is among
/// all of them: whoever finds them room fills these in.
#[must_use]
pub fn shape(shaping: &Shaping) -> Shape {
    let mut shape = Shape::default();
    if let Some(loss) = shaping.loss {
        shape.stages |= stage::LOSS;
        (shape.loss_model, shape.loss) = match loss {
            Loss::Bernoulli(probability) => (loss_model::BERNOULLI, [probability, 0, 0, 0, 0]),
            Loss::GilbertElliott {
                to_bad,
                to_good,
                in_bad,
                in_good,
            } => (
                loss_model::GILBERT_ELLIOTT,
                [to_bad, to_good, in_bad, in_good, 0],
            ),
            Loss::FourStates {
                p13,
                p31,
                p32,
                p23,
                p14,
            } => (loss_model::FOUR_STATES, [p13, p31, p32, p23, p14]),
        };
    }
    if let Some(one) = &shaping.corrupt {
        shape.stages |= stage::CORRUPT;
        set_corrupt(&mut shape, one);
    }
    if let Some(one) = shaping.duplicate {
        shape.stages |= stage::DUPLICATE;
        shape.duplicate = one.probability;
        shape.copies = one.copies;
        shape.copy_delay_ns = nanoseconds(one.copy_delay);
    }
    if let Some(rate) = &shaping.rate {
        shape.stages |= stage::RATE;
        set_rate(&mut shape, rate);
    }
    if let Some(stall) = shaping.stall {
        shape.stages |= stage::STALL;
        shape.stall_ns = nanoseconds(stall.length);
        shape.stall_every_ns = stall.every.map_or(0, nanoseconds);
    }
    if let Some(delay) = &shaping.delay {
        shape.stages |= stage::DELAY;
        set_delay(&mut shape, delay);
    }
    if let Some(one) = shaping.reorder {
        shape.stages |= stage::REORDER;
        shape.reorder = one.probability;
        shape.hold_ns = nanoseconds(one.hold);
    }
    shape
}

fn set_corrupt(shape: &mut Shape, corrupt: &Corrupt) {
    shape.corrupt = corrupt.probability;
    shape.corrupt_bits = corrupt.bits;
    shape.corrupt_how = match corrupt.part {
        Part::Any => corrupt_how::HEADER | corrupt_how::PAYLOAD,
        Part::Header => corrupt_how::HEADER,
        Part::Payload => corrupt_how::PAYLOAD,
    };
    if corrupt.checksum == Checksum::Repaired {
        shape.corrupt_how |= corrupt_how::REPAIR;
    }
}

fn set_delay(shape: &mut Shape, delay: &Delay) {
    shape.delay_ns = nanoseconds(delay.base);
    shape.jitter_ns = nanoseconds(distribution::jitter(delay));
    shape.distribution = distribution::number(&delay.distribution);
    shape.free_order = u32::from(delay.order == Order::Free);
    shape.correlation = delay.correlation;
    // In integers: the root of 2^32 less the square is below 2^16.
    let one = 1_u64 << (2 * DISTRIBUTION_SCALE);
    let rest = one - u64::from(delay.correlation) * u64::from(delay.correlation);
    shape.innovation = u32::try_from(rest.isqrt()).unwrap_or(u32::MAX);
}

fn set_rate(shape: &mut Shape, rate: &Rate) {
    match &rate.speed {
        Speed::Constant(bits) => {
            let byte = u128::from(8_000_000_000_u64) << BYTE_TIME_SCALE;
            shape.byte_time = u64::try_from(byte / u128::from((*bits).max(1))).unwrap_or(u64::MAX);
        }
        Speed::Trace(trace) => {
            shape.trace_length = trace.len();
            shape.trace_period_ns = nanoseconds(trace.period());
        }
    }
    shape.overhead = rate.overhead;
    shape.rate_share = match rate.share {
        RateShare::Rule => rate_share::RULE,
        RateShare::Flow => rate_share::FLOW,
        RateShare::Peer => rate_share::PEER,
    };
    (shape.queue_limit, shape.queue) = match rate.queue {
        QueueLimit::Time(time) => (queue_limit::TIME, nanoseconds(time)),
        QueueLimit::Bytes(bytes) => (queue_limit::BYTES, bytes),
        QueueLimit::Packets(packets) => (queue_limit::PACKETS, u64::from(packets)),
    };
    shape.longest_ns = nanoseconds(rate.longest_wait());
    shape.ecn_ns = rate.ecn.map_or(u64::MAX, nanoseconds);
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
