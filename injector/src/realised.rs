//! What a rule's faults of chance and time were asked to do, beside what they did.

use serde::{Deserialize, Serialize};

use injector_common::histogram::{self, BUCKETS};

use crate::{
    dataplane::Histograms,
    protocol::RuleCounters,
    rules::{
        shaping::{Delay, Distribution, Loss, Shaping},
        text::distribution::TABLE_SCALE,
    },
};

/// One fault, as asked and as it turned out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Realised {
    /// `loss`, `corrupt`, `duplicate`, `delay`, `reorder`, `stall`, `rate`, or `queue` for the waits in front of a
    /// line.
    pub fault: String,
    /// What `asked` and `realised` are.
    pub unit: Unit,
    /// What was asked for: a share from 0 to 1, the mean in seconds (of `queue` and `stall` the longest), the mean
    /// in bits per second.
    pub asked: f64,
    /// What happened; absent while there was no packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub realised: Option<f64>,
    /// Wire packets that it could have happened to.
    pub packets: u64,
    /// How the times are spread that the rule gave: of `queue` how long packets waited for their turns, of one other
    /// fault of the rule what it gave them by delay, holding back and stall together, also where that was nothing.
    #[serde(default, flatten, skip_serializing_if = "Option::is_none")]
    pub spread: Option<Spread>,
}

/// How times are spread, in seconds. All but the longest are off by 3 % at most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Half of them are not longer.
    pub p50: f64,
    /// 90 % are not longer.
    pub p90: f64,
    /// 99 % are not longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Spread {
    fn of(counts: &[u64; BUCKETS], max_ns: u64) -> Option<Self> {
        let at = |per_mille| {
            histogram::quantile(counts, per_mille, max_ns).map(|time| float(time) / 1e9)
        };
        Some(Self {
            p50: at(500)?,
            p90: at(900)?,
            p99: at(990)?,
            max: float(max_ns) / 1e9,
        })
    }
}

/// Units of [`Realised`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Of all packets.
    Share,
    /// Mean, in seconds.
    Seconds,
    /// Mean, in bits per second: on the line, while it was busy.
    BitsPerSecond,
}

/// The faults of a rule that can be told in numbers, and what became of them.
#[must_use]
pub fn realised(
    shaping: &Shaping,
    counters: &RuleCounters,
    histograms: Option<&Histograms>,
) -> Vec<Realised> {
    let mut list = Vec::new();
    let mut add = |fault: &str, unit, asked, sum: f64, packets: u64| {
        list.push(Realised {
            fault: fault.to_owned(),
            unit,
            asked,
            realised: (packets > 0).then(|| sum / float(packets)),
            packets,
            spread: None,
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
        let given = float(counters.delayed_ns) / 1e9;
        add(
            "delay",
            Unit::Seconds,
            mean_delay(delay),
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
    if let Some(one) = shaping.stall {
        let held = float(counters.stalled_ns) / 1e9;
        add(
            "stall",
            Unit::Seconds,
            one.length.as_secs_f64(),
            held,
            counters.stalled_packets,
        );
    }
    let given =
        histograms.and_then(|histograms| Spread::of(&histograms.given, counters.given_max_ns));
    for name in ["delay", "stall", "reorder"] {
        if let Some(one) = list.iter_mut().find(|one| one.fault == name) {
            one.spread = given;
            break;
        }
    }
    if let Some(rate) = &shaping.rate {
        list.push(Realised {
            fault: "rate".to_owned(),
            unit: Unit::BitsPerSecond,
            asked: float(rate.mean_bits()),
            realised: (counters.busy_ns > 0)
                .then(|| float(counters.queued_bytes) * 8e9 / float(counters.busy_ns)),
            packets: counters.queued_packets,
            spread: None,
        });
        list.push(Realised {
            fault: "queue".to_owned(),
            unit: Unit::Seconds,
            asked: rate.longest_wait().as_secs_f64(),
            realised: (counters.queued_packets > 0)
                .then(|| float(counters.queued_ns) / 1e9 / float(counters.queued_packets)),
            packets: counters.queued_packets,
            spread: histograms
                .and_then(|histograms| Spread::of(&histograms.queued, counters.queued_max_ns)),
        });
    }
    list
}

/// The mean of the delays that are asked for, in seconds.
fn mean_delay(delay: &Delay) -> f64 {
    let base = delay.base.as_secs_f64();
    match &delay.distribution {
        // Its jitter is the mean of what comes on top.
        Distribution::Exponential => base + delay.jitter.as_secs_f64(),
        Distribution::Table(numbers) => {
            let unit = delay.jitter.as_secs_f64() / signed(TABLE_SCALE);
            numbers.mean(|value| (base + unit * signed(value)).max(0.0))
        }
        Distribution::Samples(numbers) => numbers.mean(|value| base + signed(value) / 1e9),
        // netem's tables are centred on the mean of the whole Pareto distribution.
        _ => base,
    }
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

    fn shaping(json: &str) -> Shaping {
        let text = format!(r#"{{"iface":"eth0","peer":"10.0.0.1","seed":1,"fault":{json}}}"#);
        let spec: crate::rules::RuleSpec = serde_json::from_str(&text).unwrap();
        spec.parse().unwrap().shaping
    }

    #[test]
    fn rates_queues_and_stalls() {
        let shaping = shaping(r#"{"rate":"8mbit","queue":"50ms","stall":"2s"}"#);
        let mut histograms = Histograms::default();
        histograms.queued[histogram::bucket(20_000_000)] = 99;
        histograms.queued[histogram::bucket(40_000_000)] = 1;
        histograms.given[histogram::bucket(1_000_000_000)] = 10;
        let counters = RuleCounters {
            queued_packets: 100,
            queued_bytes: 100_000,
            queued_ns: 2_020_000_000,
            queued_max_ns: 40_000_000,
            busy_ns: 100_000_000,
            stalled_packets: 10,
            stalled_ns: 10_000_000_000,
            given_max_ns: 1_000_000_000,
            ..RuleCounters::default()
        };
        let list = realised(&shaping, &counters, Some(&histograms));
        let of = |fault: &str| list.iter().find(|one| one.fault == fault).unwrap();
        assert_eq!((of("rate").asked, of("rate").realised), (8e6, Some(8e6)));
        let queue = of("queue");
        assert_eq!((queue.asked, queue.realised), (0.05, Some(0.0202)));
        let spread = queue.spread.unwrap();
        assert!((spread.p50 / 0.02 - 1.0).abs() < 0.032, "{spread:?}");
        assert!((spread.p99 / 0.02 - 1.0).abs() < 0.032, "{spread:?}");
        assert!((spread.max - 0.04).abs() < 1e-12, "{spread:?}");
        let stall = of("stall");
        assert_eq!((stall.asked, stall.realised), (2.0, Some(1.0)));
        assert!(stall.spread.unwrap().p50 <= 1.0);
        assert!(of("rate").spread.is_none());
        // In JSON the quantiles stand beside the rest, and only where there are some.
        let json = serde_json::to_value(&list).unwrap();
        assert_eq!(json[0]["fault"], "stall");
        assert!(json[0]["p90"].is_number());
        assert!(json[1].get("p90").is_none());
        assert_eq!(serde_json::from_value::<Vec<Realised>>(json).unwrap(), list);
    }

    #[test]
    fn nothing_has_happened_yet() {
        let shaping = shaping(r#"{"rate":"8mbit","delay":"1ms"}"#);
        let list = realised(
            &shaping,
            &RuleCounters::default(),
            Some(&Histograms::default()),
        );
        assert_eq!(list.len(), 3);
        assert!(
            list.iter()
                .all(|one| one.realised.is_none() && one.spread.is_none())
        );
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
