//! One rule as the daemon keeps it: what it says, where it acts, how it ended.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};

use super::{lease::nanos, plane::RuleSlot, targets::TargetKey};
use crate::{
    protocol::{RuleCounters, RuleState},
    rules::model::Rule,
};

/// Number of a client's connection.
pub type ConnId = u64;

/// Counters on egress and on ingress.
pub(super) type BothCounters = [RuleCounters; 2];

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
    pub(super) counters: BothCounters,
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
    pub(super) base: BothCounters,
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
