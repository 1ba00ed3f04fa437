//! Drawing from a seed, so that the same seed gives the same on every machine and with every release.
//!
//! `ChaCha8` is a fixed algorithm; what is made of its numbers is written out here, since the algorithms behind
//! `rand`'s ranges and shuffles change between its releases.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Draw(ChaCha8Rng);

impl Draw {
    /// The stream of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A number below `limit`, all equally likely; 0 where that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let Ok(limit) = u64::try_from(limit) else {
            return 0;
        };
        if limit == 0 {
            return 0;
        }
        // The last, incomplete stretch of numbers would favour the low ones.
        let complete = u64::MAX - u64::MAX % limit;
        loop {
            let number = self.0.next_u64();
            if number < complete {
                return usize::try_from(number % limit).unwrap_or_default();
            }
        }
    }

    /// A number from 0 up to, but not including, 1.
    #[expect(
        clippy::cast_precision_loss,
        reason = "53 bits are what a double holds"
    )]
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Puts a list into a random order (Fisher and Yates, as given by Knuth, TAOCP 3.4.2, algorithm P).
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for end in (1..list.len()).rev() {
            let other = self.below(end + 1);
            list.swap(end, other);
        }
    }

    /// One of a list.
    pub fn choose<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        list.get(self.below(list.len()))
    }

    /// The place of one of these weights, each as likely as it is heavy.
    pub fn weighted(&mut self, weights: &[u32]) -> usize {
        let total: usize = weights.iter().map(|weight| *weight as usize).sum();
        let mut left = self.below(total);
        for (place, weight) in weights.iter().enumerate() {
            let weight = *weight as usize;
            if left < weight {
                return place;
            }
            left -= weight;
        }
        0
    }

    /// An exponential variate of this mean.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_what_it_has_always_given() {
        let mut draw = Draw::new(7);
        let numbers: Vec<usize> = (0..8).map(|_| draw.below(1000)).collect();
        let mut list: Vec<u32> = (0..6).collect();
        draw.shuffle(&mut list);
        assert_eq!(numbers, GOLDEN, "{list:?}");
        assert_eq!(list, GOLDEN_ORDER);
    }

    const GOLDEN: [usize; 8] = [635, 994, 745, 443, 440, 238, 251, 470];
    const GOLDEN_ORDER: [u32; 6] = [3, 2, 1, 4, 0, 5];

    /// Chi-square of 60,000 draws of six; 5 degrees of freedom are beyond 35.9 once in a million.
    fn chi_square(draws: impl IntoIterator<Item = usize>) -> f64 {
        let mut counts = [0_u32; 6];
        let mut total = 0_u32;
        for value in draws {
            counts[value] += 1;
            total += 1;
        }
        let expected = f64::from(total) / 6.0;
        counts
            .iter()
            .map(|count| (f64::from(*count) - expected).powi(2) / expected)
            .sum()
    }

    #[test]
    fn all_are_equally_likely() {
        let mut draw = Draw::new(1);
        let fair = chi_square((0..60_000).map(|_| draw.below(6)));
        assert!(fair < 35.9, "{fair}");
        // The wrong model: one value is drawn a tenth more often.
        let loaded = chi_square((0..60_000).map(|n| if n % 60 == 0 { 0 } else { draw.below(6) }));
        assert!(loaded > 35.9, "{loaded}");
    }

    #[test]
    fn weights_are_kept() {
        let mut draw = Draw::new(2);
        let heavy = (0..10_000)
            .filter(|_| draw.weighted(&[1, 0, 3]) == 2)
            .count();
        // Binomial, 10,000 times 3/4: five standard deviations are 217.
        assert!((7283..=7717).contains(&heavy), "{heavy}");
        assert!((0..1000).all(|_| draw.weighted(&[1, 0, 3]) != 1));
    }

    #[test]
    fn exponential_times_have_their_mean() {
        let mut draw = Draw::new(3);
        let mean = (0..10_000).map(|_| draw.exponential(5.0)).sum::<f64>() / 1e4;
        // Five standard errors are 0.25.
        assert!((mean - 5.0).abs() < 0.25, "{mean}");
    }
}
