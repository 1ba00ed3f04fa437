//! What happens without being asked for: lifetimes end, interfaces go, flows are forgotten, an idle
//! daemon leaves.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use super::{
    host::Host, lease::nanos, plane::Plane, record::Record, state::State, targets::TargetKey,
};
use crate::protocol::{EventKind, RuleState};

/// Targets are looked at and flows collected so often, unless that takes too much of the time.
pub(super) const PERIOD: Duration = Duration::from_secs(1);
/// Looking takes at most one part in so many of the time.
const SHARE: u32 = 10;

/// What is due when, by the kernel's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    /// Look at the targets.
    look_ns: u64,
    /// Collect flows.
    collect_ns: u64,
    /// Try again what has failed.
    retry_ns: u64,
    /// Since then nothing has kept the daemon.
    pub(super) idle_since_ns: u64,
    /// Lapses of the lease that were told.
    lapses: u64,
}

impl Schedule {
    pub(super) fn starting(now_ns: u64) -> Self {
        Self {
            look_ns: now_ns,
            collect_ns: now_ns,
            retry_ns: now_ns,
            idle_since_ns: now_ns,
            lapses: 0,
        }
    }
}

/// What the owner of the state does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tick {
    /// Come back after so long at the latest.
    pub wake: Duration,
    /// Nothing has kept the daemon for long enough: leave.
    pub leave: bool,
}

impl<P: Plane, H: Host> State<P, H> {
    /// Does what is due.
    pub fn tick(&mut self) -> Tick {
        self.tell_lapses();
        self.expire();
        self.look_at_holds();
        self.release_held();
        self.end_flushes();
        let now_ns = self.plane.now_ns();
        if now_ns >= self.schedule.look_ns {
            let began = Instant::now();
            self.end_doomed();
            let gone = self.look_at_targets();
            self.lose(gone);
            self.look_at_lanes();
            if !self.leftovers.is_empty() {
                self.retry_leftovers();
            }
            self.schedule.look_ns = now_ns.saturating_add(pause(began.elapsed()));
        }
        if now_ns >= self.schedule.collect_ns {
            let began = Instant::now();
            if self.rules.iter().any(Record::is_active) {
                match self.plane.collect(self.settings.flow_idle) {
                    Ok(0) => {}
                    Ok(count) => tracing::debug!(count, "forgot the state of idle flows"),
                    Err(error) => tracing::warn!("cannot collect idle flows: {error}"),
                }
            }
            self.schedule.collect_ns = now_ns.saturating_add(pause(began.elapsed()));
        }
        let now_ns = self.plane.now_ns();
        let kept = !self.holders.is_empty()
            || self.next_release_ns().is_some()
            || self.next_flush_end_ns().is_some()
            || self.rules.iter().any(Record::is_active);
        if kept {
            self.schedule.idle_since_ns = now_ns;
        }
        let leave_ns = self
            .settings
            .idle_exit
            .map(|idle| self.schedule.idle_since_ns.saturating_add(nanos(idle)));
        let next_ns = self
            .rules
            .iter()
            .filter(|record| record.is_active())
            .filter_map(|record| record.expires_ns().map(|at| at.max(self.schedule.retry_ns)))
            .chain([self.schedule.look_ns, self.schedule.collect_ns])
            .chain(leave_ns)
            .chain(self.next_release_ns())
            .chain(self.next_flush_end_ns())
            .min()
            .unwrap_or(u64::MAX);
        Tick {
            wake: Duration::from_nanos(next_ns.saturating_sub(now_ns)),
            leave: !kept && leave_ns.is_some_and(|at| now_ns >= at),
        }
    }

    /// Ends rules whose lifetime is over. The kernel has enforced it already.
    pub(super) fn expire(&mut self) {
        let now_ns = self.plane.now_ns();
        if now_ns < self.schedule.retry_ns {
            return;
        }
        let over: HashSet<u32> = self
            .rules
            .iter()
            .filter(|record| record.is_active())
            .filter(|record| record.expires_ns().is_some_and(|at| at <= now_ns))
            .map(|record| record.activation)
            .collect();
        if over.is_empty() {
            return;
        }
        let result = self.end(
            &over,
            RuleState::Expired,
            EventKind::RuleExpired,
            |record| {
                let lifetime = record.rule.lifetime.unwrap_or_default();
                format!(
                    "its lifetime of {} is over",
                    crate::rules::text::duration::format(lifetime)
                )
            },
        );
        if let Err(error) = result {
            self.schedule.retry_ns = now_ns.saturating_add(nanos(PERIOD));
            self.problem(
                None,
                format!(
                    "cannot take rules out whose lifetime is over (the kernel ignores them), will \
                     try again: {error}"
                ),
            );
        }
    }

    /// Targets have gone: so do the rules that have no other. Also ends rules for which that has
    /// failed before.
    fn lose(&mut self, gone: Vec<(TargetKey, String)>) {
        let reasons: HashMap<TargetKey, String> = gone.into_iter().collect();
        for (key, reason) in &reasons {
            if let Some(target) = self.targets.remove(key) {
                self.rest(key, &target);
                let label = target.label();
                self.events
                    .push(EventKind::TargetGone, None, Some(&label), reason.clone());
                // What was attached has gone with the interface; this strikes it from the journal.
                if let Some(attachment) = target.attachment {
                    self.detach(target.slot, label, attachment, false);
                }
            }
        }
        for record in self.rules.iter_mut().filter(|record| record.is_active()) {
            for place in &mut record.places {
                if let Some(reason) = reasons.get(&place.key) {
                    place.problem = Some(reason.clone());
                }
            }
        }
        let ended: HashSet<u32> = self
            .rules
            .iter()
            .filter(|record| record.is_active())
            .filter(|record| record.places.iter().all(|place| place.problem.is_some()))
            .map(|record| record.activation)
            .collect();
        if ended.is_empty() && reasons.is_empty() {
            return;
        }
        let result = self.end(&ended, RuleState::Gone, EventKind::RuleGone, |record| {
            record
                .places
                .first()
                .and_then(|place| place.problem.clone())
                .unwrap_or_default()
        });
        if let Err(error) = result {
            self.problem(
                None,
                format!(
                    "cannot take rules out whose interfaces have gone, will try again: {error}"
                ),
            );
        }
    }

    fn tell_lapses(&mut self) {
        let lapses = self.lease.lapses();
        if lapses > self.schedule.lapses {
            self.schedule.lapses = lapses;
            self.events.push(
                EventKind::LeaseLapsed,
                None,
                None,
                "the lease had lapsed: for some time no rule acted (the daemon was stopped, or the \
                 machine stood still)",
            );
        }
    }
}

/// How long to wait after work that took so long, in nanoseconds.
fn pause(took: Duration) -> u64 {
    nanos(PERIOD.max(took.saturating_mul(SHARE)))
}
