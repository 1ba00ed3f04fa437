//! Tables of the distributions of delay: quantiles in units of the jitter. Those that have names are always there;
//! the numbers behind are for distributions that rules bring along.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use injector_common::layout::{
    DISTRIBUTION_NORMAL, DISTRIBUTION_NORMAL_CDF, DISTRIBUTION_SCALE, DISTRIBUTION_STEPS,
    DISTRIBUTIONS, Distribution, distribution,
};
use statrs::distribution::{ContinuousCDF as _, Normal};

use crate::rules::{
    numbers::Numbers,
    shaping::{self, Delay},
    text::distribution::TABLE_SCALE,
};

/// Numbers of the tables behind the two that the programs know.
const PARETO: u32 = 2;
const PARETO_NORMAL: u32 = 3;
const EXPONENTIAL: u32 = 4;
const LOG_NORMAL: u32 = 5;
/// Tables that are always there.
pub(super) const NAMED: u32 = 6;
/// The first of the tables for given distributions.
const FIRST_GIVEN: u32 = NAMED;

/// Different given distributions that rules can have at once.
pub const MAX_GIVEN: usize = (DISTRIBUTIONS - FIRST_GIVEN) as usize;

/// Where a distribution goes on for ever, it is cut off at so many times the jitter.
const FURTHEST: f64 = 8.0;
/// Where netem's tables end: 16 bits, with 8192 for one (`NETEM_DIST_SCALE`, `include/uapi/linux/pkt_sched.h`).
const FURTHEST_IN_NETEM: f64 = 4.0;

/// The table that a rule's delays are drawn from, if its distribution has a name; those of others are found by
/// [`assign`].
pub(super) fn number(distribution: &shaping::Distribution) -> u32 {
    match distribution {
        shaping::Distribution::Uniform
        | shaping::Distribution::Table(_)
        | shaping::Distribution::Samples(_) => distribution::UNIFORM,
        shaping::Distribution::Normal => DISTRIBUTION_NORMAL,
        shaping::Distribution::Pareto => PARETO,
        shaping::Distribution::ParetoNormal => PARETO_NORMAL,
        shaping::Distribution::Exponential => EXPONENTIAL,
        shaping::Distribution::LogNormal => LOG_NORMAL,
    }
}

/// The quantile of a distribution at a probability above 0 and below 1, in units of the jitter; of samples in
/// those of [`jitter`].
#[must_use]
pub fn quantile(distribution: &shaping::Distribution, probability: f64) -> f64 {
    let normal = |probability| Normal::standard().inverse_cdf(probability);
    // netem/pareto.c and netem/paretonormal.c of iproute2: shape 3, its mean taken off, times four thirds.
    let pareto = |probability: f64| {
        (((1.0 - probability).powf(-1.0 / 3.0) - 1.5) * 4.0 / 3.0).min(FURTHEST_IN_NETEM)
    };
    let value = match distribution {
        shaping::Distribution::Uniform => 2.0 * probability - 1.0,
        shaping::Distribution::Normal => normal(probability),
        shaping::Distribution::Pareto => pareto(probability),
        shaping::Distribution::ParetoNormal => {
            (0.25 * normal(probability) + 0.75 * pareto(probability)).min(FURTHEST_IN_NETEM)
        }
        shaping::Distribution::Exponential => -(1.0 - probability).ln(),
        shaping::Distribution::LogNormal => {
            // Of exp(Z): its mean is exp(1/2), its variance (e - 1) e.
            let e = std::f64::consts::E;
            (normal(probability).exp() - e.sqrt()) / ((e - 1.0) * e).sqrt()
        }
        shaping::Distribution::Table(numbers) => {
            return float(numbers.at(probability)) / float(TABLE_SCALE);
        }
        shaping::Distribution::Samples(numbers) => {
            return float(numbers.at(probability)) / float(unit_ns(numbers));
        }
    };
    value.clamp(-FURTHEST, FURTHEST)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "delays of up to an hour in nanoseconds have 42 bits"
)]
fn float(number: i64) -> f64 {
    number as f64
}

/// In what the samples of a table are counted, nanoseconds: such that the longest one has no more than 14 bits
/// before the binary point. With 16 bits behind it they are exact to a
/// thousand-millionth of it.
fn unit_ns(samples: &Numbers) -> i64 {
    (samples.greatest() >> 14) + 1
}

/// What the values of a delay's table are in units of: its jitter.
#[must_use]
pub(super) fn jitter(delay: &Delay) -> Duration {
    match &delay.distribution {
        shaping::Distribution::Samples(numbers) => {
            Duration::from_nanos(unit_ns(numbers).unsigned_abs())
        }
        _ => delay.jitter,
    }
}

/// The table of a distribution that is given; `None` for one with a name.
pub(super) fn given(distribution: &shaping::Distribution) -> Option<Arc<Distribution>> {
    let (numbers, unit) = match distribution {
        shaping::Distribution::Table(numbers) => (numbers, TABLE_SCALE),
        shaping::Distribution::Samples(numbers) => (numbers, unit_ns(numbers)),
        _ => return None,
    };
    let mut table = Box::new(EMPTY);
    for (place, value) in table.quantiles.iter_mut().zip(numbers.quantiles()) {
        // Samples are below 2^42, and below 2^14 units.
        *place = i32::try_from((value << DISTRIBUTION_SCALE) / unit).unwrap_or(i32::MAX);
    }
    Some(Arc::from(table))
}

/// Numbers for given distributions: of a table that holds one already, or of one that is free. `held` are the
/// given distributions in their tables, `in_use` the numbers that may not be written. `None` if they do not fit.
pub(super) fn assign(
    wanted: &[Arc<Distribution>],
    held: &BTreeMap<u32, Arc<Distribution>>,
    in_use: &BTreeSet<u32>,
) -> Option<Vec<u32>> {
    let known: Vec<Option<u32>> = wanted
        .iter()
        .map(|table| {
            held.iter()
                .find(|(_, there)| *there == table)
                .map(|(number, _)| *number)
        })
        .collect();
    let mut free = (FIRST_GIVEN..DISTRIBUTIONS)
        .filter(|number| !in_use.contains(number) && !known.contains(&Some(*number)));
    known
        .iter()
        .map(|number| number.or_else(|| free.next()))
        .collect()
}

/// Whether a table is one for given distributions.
pub(super) fn is_given(number: u32) -> bool {
    (FIRST_GIVEN..DISTRIBUTIONS).contains(&number)
}

const EMPTY: Distribution = Distribution {
    quantiles: [0; DISTRIBUTION_STEPS + 1],
    reserved: 0,
};

/// All tables of named distributions, with their numbers.
pub(super) fn tables() -> Vec<(u32, Distribution)> {
    let mut tables: Vec<(u32, Distribution)> = [
        shaping::Distribution::Normal,
        shaping::Distribution::Pareto,
        shaping::Distribution::ParetoNormal,
        shaping::Distribution::Exponential,
        shaping::Distribution::LogNormal,
    ]
    .into_iter()
    .map(|distribution| {
        let scale = f64::from(1_u32 << DISTRIBUTION_SCALE);
        let table = table(|probability| quantile(&distribution, probability) * scale);
        (number(&distribution), table)
    })
    .collect();
    // The steps of this one are deviates from -8 to 8.
    let normal = Normal::standard();
    let cdf = table_of_steps(|step| {
        let deviate = step / 256.0 - 8.0;
        normal.cdf(deviate) * f64::from(i32::MAX)
    });
    tables.push((DISTRIBUTION_NORMAL_CDF, cdf));
    tables
}

/// A table of a function of the probability. Its ends are a quarter of a step inside, where it is finite.
fn table(value: impl Fn(f64) -> f64) -> Distribution {
    let steps = f64::from(STEPS);
    table_of_steps(|step| value(step.clamp(0.25, steps - 0.25) / steps))
}

/// [`DISTRIBUTION_STEPS`] as a number that converts without loss.
const STEPS: u16 = 4096;

const _: () = assert!(STEPS as usize == DISTRIBUTION_STEPS);

#[expect(
    clippy::cast_possible_truncation,
    reason = "values are within 32 bits by their clamps"
)]
fn table_of_steps(value: impl Fn(f64) -> f64) -> Distribution {
    let mut table = EMPTY;
    for (step, place) in (0..=STEPS).zip(&mut table.quantiles) {
        *place = value(f64::from(step)).round() as i32;
    }
    table
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "tables are small and probabilities positive"
)]
mod tests {
    use super::*;

    #[test]
    fn tables_ascend_and_are_centred() {
        let scale = f64::from(1_u32 << DISTRIBUTION_SCALE);
        for (number, table) in tables() {
            assert!(table.quantiles.is_sorted(), "{number}");
            if number == DISTRIBUTION_NORMAL {
                let values = table.quantiles.map(|value| f64::from(value) / scale);
                let mean: f64 = values.iter().sum::<f64>() / values.len() as f64;
                let variance: f64 =
                    values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64;
                assert!(mean.abs() < 1e-3, "{mean}");
                assert!((variance - 1.0).abs() < 0.01, "{variance}");
            }
        }
    }

    #[test]
    fn the_kernel_s_interpolation_meets_the_quantiles() {
        let scale = f64::from(1_u32 << DISTRIBUTION_SCALE);
        let (_, table) = tables().remove(0);
        for step in 1..1000_u32 {
            let probability = f64::from(step) / 1000.0;
            let read =
                injector_common::shape::quantile(&table, (probability * 4_294_967_296.0) as u64)
                    as f64
                    / scale;
            let exact = quantile(&shaping::Distribution::Normal, probability);
            assert!((read - exact).abs() < 2e-3, "{probability}: {read} {exact}");
        }
    }

    #[test]
    fn samples_are_exact_and_tables_netem_s() {
        let delay = |distribution| Delay {
            base: Duration::from_millis(5),
            jitter: Duration::from_millis(20),
            distribution,
            correlation: 0,
            order: shaping::Order::Free,
        };
        let drawn = |delay: &Delay, share: f64| {
            let shape = super::super::shape_of(&shaping::Shaping {
                delay: Some(delay.clone()),
                ..shaping::Shaping::default()
            });
            let table = given(&delay.distribution).unwrap();
            let value = injector_common::shape::quantile(&table, (share * 4_294_967_296.0) as u64);
            injector_common::shape::delayed(&shape, value)
        };
        for longest in [1_i64, 40_000_000, 3_600_000_000_000 - 1] {
            let samples = Numbers::new(vec![0, longest / 2, longest]).unwrap();
            let delay = delay(shaping::Distribution::Samples(samples));
            for (share, sample) in [(0.1, 0), (0.5, longest / 2), (0.9, longest)] {
                let off = drawn(&delay, share).abs_diff(5_000_000 + sample.unsigned_abs());
                assert!(
                    off <= 1 + (longest.unsigned_abs() >> 29),
                    "{longest} {share}: {off}"
                );
            }
        }
        let table = Numbers::new(vec![-8192, 4096, 32767]).unwrap();
        let delay = delay(shaping::Distribution::Table(table));
        assert_eq!(drawn(&delay, 0.1), 0);
        assert_eq!(drawn(&delay, 0.5), 15_000_000);
        assert!(drawn(&delay, 0.9).abs_diff(85_000_000) < 4_000);
    }

    #[test]
    fn given_tables_are_shared_kept_and_limited() {
        let table = |value: i64| {
            given(&shaping::Distribution::Table(
                Numbers::new(vec![value]).unwrap(),
            ))
            .unwrap()
        };
        let none = BTreeSet::new();
        let first = assign(&[table(1), table(2)], &BTreeMap::new(), &none).unwrap();
        assert_eq!(first, [FIRST_GIVEN, FIRST_GIVEN + 1]);
        let held = BTreeMap::from([(FIRST_GIVEN, table(1)), (FIRST_GIVEN + 1, table(2))]);
        // One that is in use is not overwritten; one that is not may be, but not if it is what is wanted.
        let in_use = BTreeSet::from([FIRST_GIVEN]);
        assert_eq!(
            assign(&[table(2)], &held, &in_use).unwrap(),
            [FIRST_GIVEN + 1]
        );
        assert_eq!(
            assign(&[table(3)], &held, &in_use).unwrap(),
            [FIRST_GIVEN + 1]
        );
        assert_eq!(
            assign(&[table(3), table(2)], &held, &in_use).unwrap(),
            [FIRST_GIVEN + 2, FIRST_GIVEN + 1]
        );
        let many: Vec<Arc<Distribution>> = (0_i64..).take(MAX_GIVEN).map(table).collect();
        assert!(assign(&many, &BTreeMap::new(), &none).is_some());
        assert!(assign(&many, &held, &BTreeSet::from([FIRST_GIVEN + 5])).is_none());
        assert!(!is_given(FIRST_GIVEN - 1) && is_given(DISTRIBUTIONS - 1));
    }

    #[test]
    fn a_deviate_s_probability_is_read_back() {
        let tables = tables();
        let (_, cdf) = &tables[tables.len() - 1];
        let normal = Normal::standard();
        for step in -400..400_i32 {
            let deviate = f64::from(step) / 100.0;
            let read = injector_common::shape::below(cdf, i64::from(step * 8192 / 100)) as f64
                / 4_294_967_296.0;
            assert!(
                (read - normal.cdf(deviate)).abs() < 1e-4,
                "{deviate}: {read}"
            );
        }
    }
}
