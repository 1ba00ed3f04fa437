//! Exact binomial intervals, for tests of shares.

/// ln of n over k, by sums of logarithms: exact enough far beyond the sizes used here.
fn ln_choose(n: u32, k: u32) -> f64 {
    (1..=k)
        .map(|i| (f64::from(n - k + i) / f64::from(i)).ln())
        .sum()
}

/// The probability of exactly `k` hits in `n` trials of probability `p`.
#[must_use]
pub fn probability(n: u32, k: u32, p: f64) -> f64 {
    (ln_choose(n, k) + f64::from(k) * p.ln() + f64::from(n - k) * (1.0 - p).ln()).exp()
}

/// The smallest interval, by equal tails, outside of which a count of hits lies with a probability of
/// at most `alpha`.
#[must_use]
pub fn interval(n: u32, p: f64, alpha: f64) -> (u32, u32) {
    let (mut low, mut below) = (0, 0.0);
    while low < n && below + probability(n, low, p) <= alpha / 2.0 {
        below += probability(n, low, p);
        low += 1;
    }
    let (mut high, mut above) = (n, 0.0);
    while high > 0 && above + probability(n, high, p) <= alpha / 2.0 {
        above += probability(n, high, p);
        high -= 1;
    }
    (low, high)
}

/// The probability that a count of hits lies inside an interval: how often a wrong model of
/// probability `p` would go unnoticed.
#[must_use]
pub fn inside(n: u32, p: f64, (low, high): (u32, u32)) -> f64 {
    (low..=high).map(|k| probability(n, k, p)).sum()
}

#[cfg(test)]
mod tests {
    use super::{inside, interval};

    #[test]
    fn an_interval_holds_what_it_promises() {
        let found = interval(400, 0.25, 1e-7);
        assert!(1.0 - inside(400, 0.25, found) <= 1e-7);
        assert!(1.0 - inside(400, 0.25, (found.0 + 1, found.1)) > 0.5e-7);
        assert!(inside(400, 0.5, found) < 1e-6);
    }
}
