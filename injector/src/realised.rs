//! What a rule's faults of chance and time were asked to do, beside what they did.

use serde::{Deserialize, Serialize};

use crate::{
    protocol::RuleCounters,
    rules::{
        shaping::{Distribution, Loss, Shaping},
        text::distribution::TABLE_SCALE,
    },
};

/// One fault, as asked and as it turned out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Realised {
    /// `loss`, `corrupt`, `duplicate`, `delay` or `reorder`.
    pub fault: String,
    /// What `asked` and `realised` are.
    pub unit: Unit,
    /// What was asked for: a share from 0 to 1, or the mean in seconds.
    pub asked: f64,
    /// What happened; absent while there was no packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub realised: Option<f64>,
    /// Wire packets that it could have happened to.
    pub packets: u64,
}

/// Units of [`Realised`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Of all packets.
    Share,
    /// Mean, in seconds.
    Seconds,
}

/// The faults of a rule that can be told in numbers, and what became of them.
#[must_use]
pub fn realised(shaping: &Shaping, counters: &RuleCounters) -> Vec<Realised> {
    let mut list = Vec::new();
    let mut add = |fault: &str, unit, asked, sum: f64, packets: u64| {
        list.push(Realised {
            fault: fault.to_owned(),
            unit,
            asked,
            realised: (packets > 0).then(|| sum / float(packets)),
            packets,
        });
    };
    let decided = counters.matched_packets;
    if let Some(loss) = shaping.loss {
        let taken = float(counters.lost_packets);
        add("loss", Unit::Share, mean_loss(loss), taken, decided);
    }
    if let Some(one) = shaping.corrupt {
        let changed = float(counters.corrupted_packets);
        let gone = counters.cut_packets + counters.lost_packets + counters.too_long_packets;
        let left = decided.saturating_sub(gone);
        add(
            "corrupt",
            Unit::Share,
            share(one.probability),
            changed,
            left,
        );
    }
    if let Some(one) = shaping.duplicate {
        let doubled = float(counters.duplicated_packets);
        add(
            "duplicate",
            Unit::Share,
            share(one.probability),
            doubled,
            decided,
        );
    }
    if let Some(delay) = &shaping.delay {
        let base = delay.base.as_secs_f64();
        let asked = match &delay.distribution {
            // Its jitter is the mean of what comes on top.
            Distribution::Exponential => base + delay.jitter.as_secs_f64(),
            Distribution::Table(numbers) => {
                let unit = delay.jitter.as_secs_f64() / signed(TABLE_SCALE);
                numbers.mean(|value| (base + unit * signed(value)).max(0.0))
            }
            Distribution::Samples(numbers) => numbers.mean(|value| base + signed(value) / 1e9),
            // netem's tables are centred on the mean of the whole Pareto distribution.
            _ => base,
        };
        let given = float(counters.delayed_ns) / 1e9;
        add(
            "delay",
            Unit::Seconds,
            asked,
            given,
            counters.delayed_packets,
        );
    }
    if let Some(one) = shaping.reorder {
        let held = float(counters.reordered_packets);
        // What is lost is not held back.
        let left = decided.saturating_sub(counters.lost_packets + counters.cut_packets);
        add("reorder", Unit::Share, share(one.probability), held, left);
    }
    list
}

/// The share of packets that a model of loss takes in the long run.
///
/// Gilbert-Elliott: in the bad state is p / (p + r) of the time. Four states: the stationary probabilities of
/// states 3 and 4 (S. Salsano and others, 2012, section 3).
#[must_use]
pub fn mean_loss(loss: Loss) -> f64 {
    match loss {
        Loss::Bernoulli(probability) => share(probability),
        Loss::GilbertElliott {
            to_bad,
            to_good,
            in_bad,
            in_good,
        } => {
            let (p, r) = (share(to_bad), share(to_good));
            (p * share(in_bad) + r * share(in_good)) / (p + r)
        }
        Loss::FourStates {
            p13,
            p31,
            p32,
            p23,
            p14,
        } => {
            let [p13, p31, p32, p23, p14] = [p13, p31, p32, p23, p14].map(share);
            // Weights of the states, with state 1 as one: 1 gains what 3 and 4 give back.
            if p31 == 0.0 {
                // What has come into a burst never leaves it.
                return if p32 == 0.0 { 1.0 } else { p23 / (p23 + p32) };
            }
            let third = p13 / p31;
            let second = if p23 == 0.0 { 0.0 } else { third * p32 / p23 };
            (third + p14) / (1.0 + second + third + p14)
        }
    }
}

/// A threshold out of 2^32 as a share.
#[expect(
    clippy::cast_precision_loss,
    reason = "thresholds have 33 bits, counts are shown with a few digits"
)]
fn share(threshold: u64) -> f64 {
    threshold as f64 / 4_294_967_296.0
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with a few digits")]
fn signed(number: i64) -> f64 {
    number as f64
}

#[expect(clippy::cast_precision_loss, reason = "it is shown with a few digits")]
fn float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a model for long, with draws of its own.
    fn simulated(loss: Loss) -> f64 {
        use injector_common::siphash::{Key, hash_words};
        let shaping = Shaping {
            loss: Some(loss),
            ..Shaping::default()
        };
        let shape = crate::dataplane::shape_of(&shaping);
        let mut state = 0;
        let mut taken = 0_u32;
        for n in 0..1_000_000 {
            let draw = hash_words(Key(7, 7), &[n]);
            let (hit, next) = injector_common::shape::loss(&shape, state, draw);
            taken += u32::from(hit);
            state = next;
        }
        f64::from(taken) / 1e6
    }

    #[test]
    fn mean_losses_are_those_of_the_models() {
        let percent = |percent: u64| percent * (1 << 32) / 100;
        for loss in [
            Loss::Bernoulli(percent(5)),
            Loss::GilbertElliott {
                to_bad: percent(2),
                to_good: percent(30),
                in_bad: percent(80),
                in_good: percent(1),
            },
            Loss::FourStates {
                p13: percent(3),
                p31: percent(30),
                p32: percent(20),
                p23: percent(60),
                p14: percent(1),
            },
        ] {
            let (asked, got) = (mean_loss(loss), simulated(loss));
            assert!((asked - got).abs() < 0.004, "{loss:?}: {asked} {got}");
        }
    }
}
