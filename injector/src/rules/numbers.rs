//! The numbers of a distribution that is given rather than named: a table, or samples.

use std::sync::Arc;

use injector_common::layout::DISTRIBUTION_STEPS;

/// So many numbers are kept; of more the quantiles are.
pub const MOST: usize = DISTRIBUTION_STEPS + 1;

/// Numbers of which each is as likely as any other: 1 to [`MOST`], in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Numbers(Arc<[i64]>);

impl Numbers {
    /// Takes numbers in any order; `None` if there is none. More than [`MOST`] become as many quantiles.
    #[must_use]
    pub fn new(mut values: Vec<i64>) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        values.sort_unstable();
        if values.len() > MOST {
            values = (0..MOST).map(|step| quantile(&values, step)).collect();
        }
        Some(Self(values.into()))
    }

    /// The numbers.
    #[must_use]
    pub fn values(&self) -> &[i64] {
        &self.0
    }

    /// The least one.
    #[must_use]
    pub fn least(&self) -> i64 {
        self.0[0]
    }

    /// The greatest one.
    #[must_use]
    pub fn greatest(&self) -> i64 {
        self.0[self.0.len() - 1]
    }

    /// Quantiles at `0 / DISTRIBUTION_STEPS` to `DISTRIBUTION_STEPS / DISTRIBUTION_STEPS`.
    pub fn quantiles(&self) -> impl Iterator<Item = i64> {
        (0..MOST).map(|step| quantile(&self.0, step))
    }

    /// The quantile at a probability from 0 to 1.
    #[must_use]
    pub fn at(&self, probability: f64) -> i64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            clippy::cast_sign_loss,
            reason = "from 0 to 4096"
        )]
        let step = (probability.clamp(0.0, 1.0) * DISTRIBUTION_STEPS as f64) as usize;
        quantile(&self.0, step)
    }

    /// The mean of what `value` makes of the numbers, as they are drawn: between two quantiles every value is
    /// equally likely.
    #[must_use]
    pub fn mean(&self, value: impl Fn(i64) -> f64) -> f64 {
        let values: Vec<f64> = self.quantiles().map(value).collect();
        let sum: f64 = values
            .windows(2)
            .map(|ends| f64::midpoint(ends[0], ends[1]))
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "there are 4096 steps")]
        let steps = DISTRIBUTION_STEPS as f64;
        sum / steps
    }
}

/// The quantile of some numbers in ascending order at `step / DISTRIBUTION_STEPS`: where that falls between two
/// of them, their middle, so that what is symmetrical stays so.
fn quantile(values: &[i64], step: usize) -> i64 {
    let place = step * values.len();
    let at = place / DISTRIBUTION_STEPS;
    if at == 0 || at == values.len() || !place.is_multiple_of(DISTRIBUTION_STEPS) {
        return values[at.min(values.len() - 1)];
    }
    i64::midpoint(values[at - 1], values[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(values: impl IntoIterator<Item = i64>) -> Numbers {
        Numbers::new(values.into_iter().collect()).unwrap()
    }

    #[test]
    fn few_numbers_are_kept_and_drawn_equally_often() {
        let three = numbers([30, 10, 20]);
        assert_eq!(three.values(), [10, 20, 30]);
        let quantiles: Vec<i64> = three.quantiles().collect();
        for (value, about) in [(10, 1366), (20, 1365), (30, 1366)] {
            let often = quantiles.iter().filter(|one| **one == value).count();
            assert_eq!(often, about, "{value}");
        }
        let two = numbers([-100, 100]);
        assert!(
            two.mean(|value| f64::from(i32::try_from(value).unwrap()))
                .abs()
                < 1e-9
        );
        assert!(Numbers::new(Vec::new()).is_none());
        assert!(numbers([7]).quantiles().all(|one| one == 7));
    }

    #[test]
    fn many_numbers_become_quantiles_once() {
        let many = numbers((0..100_000).rev());
        assert_eq!(many.values().len(), MOST);
        assert_eq!((many.least(), many.greatest()), (0, 99_999));
        for (step, value) in (0..).zip(many.values()) {
            let exact = step * 100_000 / 4096;
            assert!((value - exact).abs() <= 1, "{step}: {value} {exact}");
        }
        // What is read back from a rule says the same again.
        assert_eq!(numbers(many.values().iter().copied()), many);
        assert!(many.quantiles().eq(many.values().iter().copied()));
    }
}
