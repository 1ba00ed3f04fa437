//! The lease: rules act only while it lasts, and it lasts only while the daemon works.
//!
//! A thread of its own moves the deadline forward every third of the lease's length. It goes by the
//! *pulses* of the parts that must be alive (the thread that owns the rules, the loop that serves the
//! socket): the deadline is one lease after the oldest last beat. A process that is killed or stopped
//! renews nothing; a part that hangs stops beating, and the deadline stops moving. A part that begins
//! long work says so ([`Pulse::work`]): it counts as alive meanwhile, for a stated time at most.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::plane::LeaseSwitch;
use crate::protocol::LeaseStatus;

/// The longest piece of work that a part may do without a beat: a rule set with a million prefixes on
/// a slow machine needs a fraction of it.
pub const LONGEST_WORK: Duration = Duration::from_mins(1);
/// The shortest lease that can be kept on a busy machine.
pub const SHORTEST: Duration = Duration::from_millis(500);
/// The longest lease that makes sense: so long a killed daemon's rules go on.
pub const LONGEST: Duration = Duration::from_hours(1);

/// The sign of life of one part of the daemon.
#[derive(Debug, Clone)]
pub struct Pulse {
    inner: Arc<Beats>,
}

#[derive(Debug)]
struct Beats {
    /// Monotonic nanoseconds of the last beat.
    last: AtomicU64,
    /// Until then the part is excused.
    busy_until: AtomicU64,
}

impl Pulse {
    /// A pulse that beats now.
    #[must_use]
    pub fn new(now_ns: u64) -> Self {
        Self {
            inner: Arc::new(Beats {
                last: AtomicU64::new(now_ns),
                busy_until: AtomicU64::new(0),
            }),
        }
    }

    /// The part is alive.
    pub fn beat(&self, now_ns: u64) {
        self.inner.busy_until.store(0, Ordering::Relaxed);
        self.inner.last.store(now_ns, Ordering::Release);
    }

    /// The part begins work that may take up to [`LONGEST_WORK`]. The next beat ends the excuse.
    pub fn work(&self, now_ns: u64) {
        self.inner.last.store(now_ns, Ordering::Relaxed);
        self.inner.busy_until.store(
            now_ns.saturating_add(nanos(LONGEST_WORK)),
            Ordering::Release,
        );
    }

    /// The latest time at which the part is known to have been alive.
    pub(super) fn alive_at(&self, now_ns: u64) -> u64 {
        let busy_until = self.inner.busy_until.load(Ordering::Acquire);
        let last = self.inner.last.load(Ordering::Acquire);
        last.max(busy_until.min(now_ns)).min(now_ns)
    }
}

/// What others may know of the lease.
#[derive(Debug, Clone)]
pub struct LeaseView {
    length: Duration,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    until: AtomicU64,
    lapses: AtomicU64,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl LeaseView {
    /// A lease of this length that nobody keeps yet.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self {
            length,
            shared: Arc::default(),
        }
    }

    /// How often the lease was found to have lapsed.
    #[must_use]
    pub fn lapses(&self) -> u64 {
        self.shared.lapses.load(Ordering::Relaxed)
    }

    /// The lease for a client.
    #[must_use]
    pub fn status(&self, now_ns: u64) -> LeaseStatus {
        LeaseStatus {
            seconds: self.length.as_secs_f64(),
            valid: self.shared.until.load(Ordering::Acquire) > now_ns,
            lapses: self.lapses(),
        }
    }
}

/// The deadline's arithmetic, apart from the thread and the kernel.
#[derive(Debug)]
struct Keeper {
    view: LeaseView,
    pulses: Vec<Pulse>,
}

/// What a look at the pulses asks for.
#[derive(Debug, PartialEq, Eq)]
struct Renewal {
    /// Move the deadline there, if it moves.
    until: Option<u64>,
    /// The deadline had passed.
    lapsed: bool,
}

impl Keeper {
    fn look(&self, now_ns: u64) -> Renewal {
        let alive = self
            .pulses
            .iter()
            .map(|pulse| pulse.alive_at(now_ns))
            .min()
            .unwrap_or(now_ns);
        let until = alive.saturating_add(nanos(self.view.length));
        let current = self.view.shared.until.load(Ordering::Acquire);
        Renewal {
            until: (until > current && until > now_ns).then_some(until),
            lapsed: current != 0 && current < now_ns,
        }
    }

    /// Looks once and does what is asked for.
    fn step(&self, switch: &dyn LeaseSwitch, lapsed_before: &mut bool) {
        let renewal = self.look(switch.now_ns());
        if renewal.lapsed && !*lapsed_before {
            self.view.shared.lapses.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("the lease has lapsed: no rule acts until it is renewed");
        }
        *lapsed_before = renewal.lapsed;
        if let Some(until) = renewal.until {
            match switch.renew(until) {
                Ok(()) => {
                    self.view.shared.until.store(until, Ordering::Release);
                    *lapsed_before = false;
                }
                Err(error) => tracing::error!("cannot renew the lease: {error}"),
            }
        }
    }
}

/// The thread that keeps the lease. Stops, without taking the lease back, when it is dropped.
#[derive(Debug)]
pub struct LeaseKeeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl LeaseKeeper {
    /// Renews the lease once and starts the thread that goes on doing so.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        view: &LeaseView,
        switch: Box<dyn LeaseSwitch>,
        pulses: Vec<Pulse>,
    ) -> std::io::Result<Self> {
        let shared = Arc::clone(&view.shared);
        let keeper = Keeper {
            view: view.clone(),
            pulses,
        };
        let period = view.length / 3;
        let mut lapsed = false;
        keeper.step(&*switch, &mut lapsed);
        let thread = thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || {
                let shared = Arc::clone(&keeper.view.shared);
                let mut stop = shared.stop.lock().unwrap_or_else(PoisonError::into_inner);
                while !*stop {
                    stop = shared
                        .stopped
                        .wait_timeout(stop, period)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                    if !*stop {
                        keeper.step(&*switch, &mut lapsed);
                    }
                }
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for LeaseKeeper {
    fn drop(&mut self) {
        *self
            .shared
            .stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stopped.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the lease thread had panicked");
        }
    }
}

/// A duration in nanoseconds; more than fits (584 years) is the most that fits.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::ErrorBody;

    const SECOND: u64 = 1_000_000_000;

    fn keeper(pulses: &[&Pulse]) -> Keeper {
        Keeper {
            view: LeaseView::new(Duration::from_secs(10)),
            pulses: pulses.iter().map(|pulse| (*pulse).clone()).collect(),
        }
    }

    struct Recorder(std::sync::Arc<AtomicU64>, std::sync::Arc<AtomicU64>);

    impl LeaseSwitch for Recorder {
        fn now_ns(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
        fn renew(&self, until_ns: u64) -> Result<(), ErrorBody> {
            self.1.store(until_ns, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn the_deadline_follows_the_slowest_pulse() {
        let (a, b) = (Pulse::new(100 * SECOND), Pulse::new(100 * SECOND));
        let keeper = keeper(&[&a, &b]);
        a.beat(103 * SECOND);
        b.beat(102 * SECOND);
        assert_eq!(keeper.look(103 * SECOND).until, Some(112 * SECOND));
    }

    #[test]
    fn a_part_that_hangs_lets_the_lease_lapse() {
        let pulse = Pulse::new(100 * SECOND);
        let keeper = keeper(&[&pulse]);
        keeper
            .view
            .shared
            .until
            .store(110 * SECOND, Ordering::Relaxed);
        assert_eq!(
            keeper.look(105 * SECOND),
            Renewal {
                until: None,
                lapsed: false
            }
        );
        assert_eq!(
            keeper.look(111 * SECOND),
            Renewal {
                until: None,
                lapsed: true
            }
        );
        assert!(!keeper.view.status(111 * SECOND).valid);
    }

    #[test]
    fn long_work_is_excused_but_not_for_ever() {
        let pulse = Pulse::new(100 * SECOND);
        let keeper = keeper(&[&pulse]);
        pulse.work(100 * SECOND);
        assert_eq!(keeper.look(130 * SECOND).until, Some(140 * SECOND));
        assert_eq!(keeper.look(165 * SECOND).until, Some(170 * SECOND));
        assert_eq!(keeper.look(171 * SECOND).until, None);
        pulse.beat(172 * SECOND);
        assert_eq!(keeper.look(172 * SECOND).until, Some(182 * SECOND));
    }

    #[test]
    fn a_stopped_process_counts_one_lapse_and_goes_on() {
        let (clock, until) = (Arc::new(AtomicU64::new(SECOND)), Arc::default());
        let switch = Recorder(Arc::clone(&clock), Arc::clone(&until));
        let pulse = Pulse::new(SECOND);
        let keeper = keeper(&[&pulse]);
        let mut lapsed = false;
        keeper.step(&switch, &mut lapsed);
        assert_eq!(until.load(Ordering::Relaxed), 11 * SECOND);
        // SIGSTOP for a minute; this thread comes back first, and the part some time later.
        clock.store(61 * SECOND, Ordering::Relaxed);
        keeper.step(&switch, &mut lapsed);
        clock.store(64 * SECOND, Ordering::Relaxed);
        keeper.step(&switch, &mut lapsed);
        assert_eq!(until.load(Ordering::Relaxed), 11 * SECOND);
        pulse.beat(65 * SECOND);
        clock.store(65 * SECOND, Ordering::Relaxed);
        keeper.step(&switch, &mut lapsed);
        assert_eq!(until.load(Ordering::Relaxed), 75 * SECOND);
        assert_eq!(keeper.view.lapses(), 1);
        assert!(keeper.view.status(66 * SECOND).valid);
    }

    #[test]
    fn the_thread_renews_at_once_and_stops() {
        let (clock, until) = (Arc::new(AtomicU64::new(SECOND)), Arc::default());
        let switch = Recorder(Arc::clone(&clock), Arc::clone(&until));
        let view = LeaseView::new(Duration::from_secs(30));
        let keeper = LeaseKeeper::start(&view, Box::new(switch), vec![Pulse::new(SECOND)]).unwrap();
        assert_eq!(until.load(Ordering::Relaxed), 31 * SECOND);
        drop(keeper);
    }
}
