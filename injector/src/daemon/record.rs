//! One rule as the daemon keeps it: what it says, where it acts, how it ended.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};

use super::{
    lease::nanos,
    plane::{Histograms, RuleSlot},
    targets::TargetKey,
};
use crate::{
    protocol::{RuleCounters, RuleState},
    rules::model::Rule,
};

/// Number of a client's connection.
pub type ConnId = u64;

/// What a rule has counted.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    /// On egress and on ingress.
    pub(super) counters: [RuleCounters; 2],
    /// How the times that it gave are spread; `None` for a rule that gives none.
    pub(super) histograms: Option<Box<Histograms>>,
}

impl Tally {
    /// Adds what was counted later.
    pub(super) fn add(
        &mut self,
        counters: &[RuleCounters; 2],
        histograms: Option<Box<Histograms>>,
    ) {
        for (sum, part) in self.counters.iter_mut().zip(counters) {
            *sum += *part;
        }
        let Some(mut later) = histograms else {
            return;
        };
        if let Some(earlier) = &self.histograms {
            let pairs = (later.given.iter_mut().zip(&earlier.given))
                .chain(later.queued.iter_mut().zip(&earlier.queued));
            for (sum, part) in pairs {
                *sum += part;
            }
        }
        self.histograms = Some(later);
    }
}

/// One interface of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Which target it is.
    pub(super) key: TargetKey,
    /// Its namespace as the rule names it.
    pub(super) netns: Option<String>,
    /// Its name.
    pub(super) iface: String,
    /// Why the rule does not act there (any more).
    pub(super) problem: Option<String>,
}

/// How a rule ended that is kept for its counters.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    /// How.
    pub(super) state: RuleState,
    /// Why.
    pub(super) reason: String,
    /// Its last counters.
    pub(super) counters: Tally,
}

/// One rule.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// What it says.
    pub(super) rule: Arc<Rule>,
    /// Which packets it is for, in words: worked out once, since a rule may hold a million prefixes.
    pub(super) asked: String,
    /// Its place in the kernel, while it is active.
    pub(super) slot: RuleSlot,
    /// Identifies this rule among all that this daemon has ever had.
    pub(super) activation: u32,
    /// When it began, by the kernel's clock.
    pub(super) activated_ns: u64,
    /// When it began, by the calendar.
    pub(super) activated_at: Timestamp,
    /// Where it acts.
    pub(super) places: Vec<Place>,
    /// The connection whose end ends it.
    pub(super) hold: Option<ConnId>,
    /// Counted before the kernel's counters were cleared.
    pub(super) base: Tally,
    /// Set once it has ended.
    pub(super) ended: Option<Ended>,
    /// The connection that held it has closed, and ending it has failed so far.
    pub(super) doomed: bool,
}

impl Record {
    /// Whether it acts.
    pub(super) fn is_active(&self) -> bool {
        self.ended.is_none()
    }

    /// When its lifetime ends, by the kernel's clock.
    pub(super) fn expires_ns(&self) -> Option<u64> {
        self.rule
            .lifetime
            .map(|lifetime| self.activated_ns.saturating_add(nanos(lifetime)))
    }

    /// When its lifetime ends, by the calendar.
    pub(super) fn expires_at(&self) -> Option<Timestamp> {
        self.rule
            .lifetime
            .and_then(|lifetime| later(self.activated_at, lifetime))
    }
}

/// A time of day so much later; `None` if the calendar does not reach there.
fn later(time: Timestamp, by: Duration) -> Option<Timestamp> {
    time.checked_add(SignedDuration::try_from(by).ok()?).ok()
}

/// Puts times of day beside times of the kernel's clock.
pub(super) fn with_times(mut counters: RuleCounters, now_ns: u64) -> RuleCounters {
    let now = Timestamp::now();
    let at = |ns: u64| {
        let ago = i64::try_from(now_ns.saturating_sub(ns)).ok()?;
        (ns != 0)
            .then(|| now.checked_sub(SignedDuration::from_nanos(ago)).ok())
            .flatten()
    };
    counters.first_at = at(counters.first_ns);
    counters.last_at = at(counters.last_ns);
    counters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_add_up() {
        let counters = |packets, longest| {
            let one = RuleCounters {
                matched_packets: packets,
                queued_max_ns: longest,
                ..RuleCounters::default()
            };
            [one, RuleCounters::default()]
        };
        let mut histograms = Box::<Histograms>::default();
        histograms.given[3] = 5;
        histograms.queued[511] = 7;
        let mut tally = Tally::default();
        tally.add(&counters(2, 9), Some(histograms.clone()));
        tally.add(&counters(3, 4), None);
        tally.add(&counters(4, 1), Some(histograms));
        assert_eq!(tally.counters[0].matched_packets, 9);
        assert_eq!(tally.counters[0].queued_max_ns, 9);
        let sum = tally.histograms.unwrap();
        assert_eq!((sum.given[3], sum.queued[511]), (10, 14));
    }
}
