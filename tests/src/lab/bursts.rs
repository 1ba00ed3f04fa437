//! Bursts of losses, and whether their lengths are those of a model (chi-square).

use statrs::distribution::{Binomial, ChiSquared, ContinuousCDF as _, DiscreteCDF as _};

/// Categories that fewer bursts than this are expected in are put together: the statistic of Pearson's test is
/// distributed as it should be only where none is sparse.
const LEAST: f64 = 20.0;
/// How often chance alone exceeds the bound, if nothing is sparse. With [`LEAST`] in a category it is a few times
/// as often, still less than once in a million times (see the test below).
const FALSE_ALARM: f64 = 1e-9;

/// The lengths of the runs of consecutive numbers, which are given in ascending order.
#[must_use]
pub fn lengths(numbers: &[u64]) -> Vec<u64> {
    numbers
        .chunk_by(|one, next| one + 1 == *next)
        .map(|run| u64::try_from(run.len()).unwrap_or(u64::MAX))
        .collect()
}

/// How well some lengths fit a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fit {
    /// Pearson's statistic.
    pub statistic: f64,
    /// What it exceeds less than once in a million times if the model is right.
    pub bound: f64,
    /// Categories of lengths that were told apart: fewer than two tell nothing.
    pub categories: usize,
}

impl Fit {
    /// Whether the model may be right.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.categories > 1 && self.statistic <= self.bound
    }

    /// Whether the model is wrong.
    #[must_use]
    pub fn is_bad(&self) -> bool {
        self.categories > 1 && self.statistic > self.bound
    }
}

/// Compares lengths of bursts with those of a model in which every loss is followed by another one with the
/// probability `goes_on`: of Bernoulli losses, where that is the rate, or of a Gilbert-Elliott model that loses
/// everything in its bad state and nothing in the good one, where it is the probability of staying.
#[must_use]
pub fn fit(lengths: &[u64], goes_on: f64) -> Fit {
    let bursts = float(lengths.len());
    let mut statistic = 0.0;
    let mut categories = 0;
    let mut add = |found: usize, expected: f64| {
        statistic += (float(found) - expected).powi(2) / expected;
        categories += 1;
    };
    // Bursts expected to be of this length or longer.
    let mut tail = bursts;
    let mut length = 1;
    while tail * goes_on >= LEAST {
        let found = lengths.iter().filter(|one| **one == length).count();
        add(found, tail * (1.0 - goes_on));
        tail *= goes_on;
        length += 1;
    }
    add(lengths.iter().filter(|one| **one >= length).count(), tail);
    let freedom = float(categories.max(2) - 1);
    let bound = ChiSquared::new(freedom).map_or(f64::NAN, |chi_squared| {
        chi_squared.inverse_cdf(1.0 - FALSE_ALARM)
    });
    Fit {
        statistic,
        bound,
        categories,
    }
}

/// An interval outside of which the number of independent losses of probability `p` among `n` packets lies once
/// in ten million times at most.
#[must_use]
pub fn interval(n: u64, p: f64) -> (u64, u64) {
    const TAIL: f64 = 0.5e-7;
    Binomial::new(p, n).map_or((0, 0), |losses| {
        (losses.inverse_cdf(TAIL), losses.inverse_cdf(1.0 - TAIL))
    })
}

/// The same for the losses of a Gilbert-Elliott model that goes bad with `p`, good with `r`, and loses
/// everything that it meets while bad. Lengths of bursts are skew, so a normal distribution's tail is too thin; by
/// Chernoff's bound, P(losses >= x) <= E(exp(t * losses)) * exp(-t * x) for every t > 0, and as much below for t < 0.
#[must_use]
pub fn gilbert_elliott_interval(n: u64, p: f64, r: f64) -> (f64, f64) {
    const TAIL: f64 = 0.5e-7;
    // For the scale of t alone: steps of a chain of two states correlate by 1 - p - r.
    let share = p / (p + r);
    let correlation = 1.0 - p - r;
    let packets = float(usize::try_from(n).unwrap_or(usize::MAX));
    let deviation =
        (packets * share * (1.0 - share) * (1.0 + correlation) / (1.0 - correlation)).sqrt();
    let bounds = |sign: f64| {
        (1..=40).map(move |step| {
            let t = sign * f64::from(step) * 0.3 / deviation;
            (ln_moment(n, p, r, t) - TAIL.ln()) / t
        })
    };
    (
        bounds(-1.0).fold(0.0, f64::max),
        bounds(1.0).fold(packets, f64::min),
    )
}

/// ln E(exp(t * losses)): the chain from its stationary distribution, each loss weighted with exp(t).
fn ln_moment(n: u64, p: f64, r: f64, t: f64) -> f64 {
    let weight = t.exp();
    let (mut good, mut bad) = (r / (p + r), p / (p + r));
    let mut sum = 0.0;
    for _ in 0..n {
        let lost = bad * weight;
        (good, bad) = (
            good.mul_add(1.0 - p, lost * r),
            good.mul_add(p, lost * (1.0 - r)),
        );
        let both = good + bad;
        sum += both.ln();
        good /= both;
        bad /= both;
    }
    sum
}

fn float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Lengths in a few words.
#[must_use]
pub fn describe(lengths: &[u64]) -> String {
    let lost: u64 = lengths.iter().sum();
    let mean = float(usize::try_from(lost).unwrap_or(usize::MAX)) / float(lengths.len().max(1));
    let single = lengths.iter().filter(|length| **length == 1).count();
    format!(
        "{lost} lost in {} bursts, {single} of one packet, {mean:.2} on average, {} at most",
        lengths.len(),
        lengths.iter().max().unwrap_or(&0)
    )
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;
    use statrs::distribution::{DiscreteCDF as _, Poisson};

    use super::{LEAST, fit, gilbert_elliott_interval, interval, lengths};

    fn bernoulli(count: u64, p: f64, seed: u64) -> Vec<u64> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (1..=count).filter(|_| random.random_bool(p)).collect()
    }

    #[test]
    fn runs_are_counted() {
        assert!(lengths(&[]).is_empty());
        assert_eq!(lengths(&[3, 4, 5, 9, 11, 12]), [3, 1, 2]);
    }

    #[test]
    fn single_losses_fit_and_whole_super_packets_do_not() {
        for seed in 0..20 {
            let losses = lengths(&bernoulli(50_000, 0.05, seed));
            assert!(fit(&losses, 0.05).is_good(), "seed {seed}");
            assert!(fit(&losses, 0.25).is_bad(), "seed {seed}");
        }
        // Of super-packets of sixteen, one in twenty lost as a whole.
        let whole: Vec<u64> = bernoulli(10_000, 0.05, 1)
            .iter()
            .flat_map(|one| one * 16..one * 16 + 16)
            .collect();
        assert!(fit(&lengths(&whole), 0.05).is_bad());
    }

    #[test]
    fn the_sparsest_category_gives_few_false_alarms() -> anyhow::Result<()> {
        // With two categories, the other one full: the bound's square root many deviations from LEAST.
        let bound = fit(&vec![1; 1000], 0.02).bound;
        let far = (bound * LEAST).sqrt();
        let sparse = Poisson::new(LEAST)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "47"
        )]
        let most = (LEAST + far) as u64;
        assert!(sparse.sf(most) < 1e-6);
        Ok(())
    }

    #[test]
    fn an_interval_of_bursts_is_as_wide_as_it_must_be() {
        // Independent losses are the model's with r = 1 - p.
        let exact = interval(50_000, 0.05);
        let (low, high) = gilbert_elliott_interval(50_000, 0.05, 0.95);
        let exact = [exact.0, exact.1].map(|end| f64::from(u32::try_from(end).unwrap_or(u32::MAX)));
        assert!(
            low <= exact[0] && low > exact[0] - 30.0,
            "from {low}, {exact:?}"
        );
        assert!(
            high >= exact[1] && high < exact[1] + 30.0,
            "to {high}, {exact:?}"
        );
        // Bursts of two on average: skew to the right.
        let (low, high) = gilbert_elliott_interval(10_000, 0.01, 0.5);
        let mean = 10_000.0 * 0.01 / 0.51;
        assert!(high - mean > mean - low, "{low} to {high}");
        assert!(high < 2.0 * mean && low > 0.4 * mean, "{low} to {high}");
    }

    #[test]
    fn an_interval_is_as_wide_as_it_must_be() {
        let (low, high) = interval(50_000, 0.05);
        assert!(low > 2500 - 300 && low < 2500 - 200, "from {low}");
        assert!(high < 2500 + 300 && high > 2500 + 200, "to {high}");
    }
}
