//! Random scenarios for the comparison of deciders: rule sets whose selectors are drawn from the
//! same small world as the packets, so that rules match often, flows come back and positions advance.
//!
//! Everything is drawn from one seeded stream: a seed is a scenario.

mod damage;
mod frame;
mod rules;
mod scenario;
mod traffic;
mod world;

pub use frame::{Extension, Frame, Network, Transport, flag};
pub use rules::plain_rule;
pub use scenario::{Limits, scenario};

/// Chance of `percent` in a hundred.
fn chance(rng: &mut rand_chacha::ChaCha8Rng, percent: u32) -> bool {
    use rand::RngExt as _;
    rng.random_range(0..100) < percent
}

/// One of a list; the list's `T::default()` if it is empty.
fn pick<T: Clone + Default>(rng: &mut rand_chacha::ChaCha8Rng, list: &[T]) -> T {
    use rand::seq::IndexedRandom as _;
    list.choose(rng).cloned().unwrap_or_default()
}
