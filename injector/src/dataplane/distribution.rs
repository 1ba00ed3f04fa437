//! Tables of the distributions of delay: quantiles in units of the jitter.

use injector_common::layout::{
    DISTRIBUTION_NORMAL, DISTRIBUTION_NORMAL_CDF, DISTRIBUTION_SCALE, DISTRIBUTION_STEPS,
    Distribution, distribution,
};
use statrs::distribution::{ContinuousCDF as _, Normal};

use crate::rules::shaping;

/// Numbers of the tables behind the two that the programs know.
const PARETO: u32 = 2;
const PARETO_NORMAL: u32 = 3;
const EXPONENTIAL: u32 = 4;
const LOG_NORMAL: u32 = 5;

/// Where a distribution goes on for ever, it is cut off at so many times the jitter.
const FURTHEST: f64 = 8.0;
/// Where netem's tables end: 16 bits, with 8192 for one (`NETEM_DIST_SCALE`, `include/uapi/linux/pkt_sched.h`).
const FURTHEST_IN_NETEM: f64 = 4.0;

/// The table that a rule's delays are drawn from.
pub(super) fn number(distribution: shaping::Distribution) -> u32 {
    match distribution {
        shaping::Distribution::Uniform => distribution::UNIFORM,
        shaping::Distribution::Normal => DISTRIBUTION_NORMAL,
        shaping::Distribution::Pareto => PARETO,
        shaping::Distribution::ParetoNormal => PARETO_NORMAL,
        shaping::Distribution::Exponential => EXPONENTIAL,
        shaping::Distribution::LogNormal => LOG_NORMAL,
    }
}

/// The quantile of a distribution at a probability above 0 and below 1, in units of the jitter.
#[must_use]
pub fn quantile(distribution: shaping::Distribution, probability: f64) -> f64 {
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
    };
    value.clamp(-FURTHEST, FURTHEST)
}

/// All tables, with their numbers.
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
        let table = table(|probability| quantile(distribution, probability) * scale);
        (number(distribution), table)
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
    clippy::large_stack_arrays,
    reason = "values are within 32 bits by their clamps; a table has 16 KiB, and there are six"
)]
fn table_of_steps(value: impl Fn(f64) -> f64) -> Distribution {
    let mut table = Distribution {
        quantiles: [0; DISTRIBUTION_STEPS + 1],
        reserved: 0,
    };
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
            let exact = quantile(shaping::Distribution::Normal, probability);
            assert!((read - exact).abs() < 2e-3, "{probability}: {read} {exact}");
        }
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
