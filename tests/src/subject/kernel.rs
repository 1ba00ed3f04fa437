//! The loaded programs, run by `BPF_PROG_TEST_RUN`.

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use injector::dataplane::{Collected, DataPlane, RuleSlot, Sizes, TargetSlot};

use crate::model::{Hook, Link, Outcome, Packet, RuleOutcome, Setup, Subject, TargetOutcome};

use super::{
    placing::{Placing, Ready, check, rule_outcome, target_outcome},
    test_run::{Context, Dispatcher, Verdict},
};

/// Tables large enough for any scenario, and quick to empty. (Small LRU tables evict early: every CPU keeps
/// free entries to itself, `bpf_common_lru_populate`, `kernel/bpf/bpf_lru_list.c`.)
pub const TEST_SIZES: Sizes = Sizes {
    flows: 4096,
    states: 8192,
    idle_flows: 4096,
    prefixes: 8192,
    bitmaps: 4096,
    targets: 16,
    fragments: 4096,
};

/// The model lets so much time pass when setups change. The kernel's clock does not move for that.
const CHANGE_GAP: Duration = Duration::from_secs(1);

/// Data planes that are not in use: to load one takes the verifier longer than a case takes.
static SPARE: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

struct Loaded {
    plane: DataPlane,
    dispatcher: Dispatcher,
    placing: Placing,
}

/// The programs in the kernel.
pub struct Kernel {
    /// `None` only while it is dropped.
    loaded: Option<Loaded>,
    targets: Vec<TargetSlot>,
}

impl Kernel {
    /// Loads the programs, or takes ones that were loaded before.
    ///
    /// # Errors
    /// If they cannot be loaded.
    pub fn new() -> anyhow::Result<Self> {
        let spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let loaded = if let Some(loaded) = spare {
            loaded
        } else {
            let plane = DataPlane::load(&TEST_SIZES)?;
            let dispatcher = Dispatcher::new(&plane)?;
            Loaded {
                plane,
                dispatcher,
                placing: Placing::default(),
            }
        };
        Ok(Self {
            loaded: Some(loaded),
            targets: Vec::new(),
        })
    }

    /// Why it cannot run here, if so.
    #[must_use]
    pub fn missing() -> Option<String> {
        // SAFETY: a system call without arguments.
        (unsafe { libc::geteuid() } != 0).then(|| "loading eBPF programs needs root".to_owned())
    }

    /// Forgets what has been idle for longer than `idle`, as the daemon does from time to time.
    pub fn collect(&mut self, idle: Duration) -> anyhow::Result<Collected> {
        Ok(self.loaded()?.plane.collect(idle)?)
    }

    /// Wire packets that have come by a target in a direction.
    pub fn seen(&mut self, target: u16, hook: Hook) -> anyhow::Result<u64> {
        let [egress, ingress] = self.loaded()?.plane.target_counters(TargetSlot(target))?;
        Ok(match hook {
            Hook::Egress => egress.seen_packets,
            Hook::Ingress => ingress.seen_packets,
        })
    }

    fn loaded(&mut self) -> anyhow::Result<&mut Loaded> {
        self.loaded
            .as_mut()
            .context("the data plane has been given back")
    }

    fn commit(&mut self, setup: &Setup, skipped: Duration) -> anyhow::Result<()> {
        wait_for_the_clock(setup);
        let loaded = self.loaded()?;
        let ready = loaded
            .placing
            .place(setup, DataPlane::monotonic_ns(), skipped)?;
        let Ready {
            targets,
            rules,
            exempt,
            fresh,
        } = ready;
        for slot in fresh {
            loaded.plane.clear_rule(slot)?;
        }
        loaded.plane.commit(&targets, &rules, &exempt)?;
        self.targets = targets.iter().map(|target| target.slot).collect();
        Ok(())
    }
}

/// Waits until the oldest rule may have begun: the clock of a machine that has just booted does not go back so far.
fn wait_for_the_clock(setup: &Setup) {
    const MARGIN: Duration = Duration::from_secs(1);
    let oldest = setup.rules.iter().map(|entry| entry.age).max();
    let up = Duration::from_nanos(DataPlane::monotonic_ns());
    thread::sleep((oldest.unwrap_or_default() + MARGIN).saturating_sub(up));
}

impl Drop for Kernel {
    fn drop(&mut self) {
        SPARE
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(self.loaded.take());
    }
}

impl Subject for Kernel {
    fn name(&self) -> String {
        "kernel".to_owned()
    }

    fn install(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let loaded = self.loaded()?;
        loaded.placing.forget();
        loaded.plane.forget_everything()?;
        for slot in 0..TEST_SIZES.targets {
            loaded.plane.clear_target(TargetSlot(slot))?;
        }
        self.commit(setup, Duration::ZERO)?;
        self.set_lease(true)
    }

    fn replace(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.commit(setup, CHANGE_GAP)
    }

    fn set_lease(&mut self, valid: bool) -> anyhow::Result<()> {
        self.loaded()?
            .plane
            .lease()
            .renew(if valid { u64::MAX } else { 1 });
        Ok(())
    }

    fn decide(&mut self, packet: &Packet) -> anyhow::Result<Outcome> {
        let dispatcher = &self.loaded()?.dispatcher;
        let verdict = dispatcher.run(packet.hook, Context::of(packet), &packet.bytes)?;
        Ok(Outcome {
            cut: verdict != Verdict::Pass,
            answered: verdict == Verdict::Answered,
            unparsed: None,
        })
    }

    fn rule_counters(&mut self) -> anyhow::Result<Vec<[RuleOutcome; 2]>> {
        let loaded = self.loaded()?;
        let slots: Vec<RuleSlot> = loaded.placing.slots().to_vec();
        slots
            .into_iter()
            .map(|slot| {
                Ok(loaded
                    .plane
                    .rule_counters(slot)?
                    .map(|counters| rule_outcome(&counters)))
            })
            .collect()
    }

    fn target_counters(&mut self) -> anyhow::Result<Option<Vec<[TargetOutcome; 2]>>> {
        let targets = self.targets.clone();
        let loaded = self.loaded()?;
        let mut result = Vec::new();
        for slot in targets {
            let counters = loaded.plane.target_counters(slot)?;
            counters.iter().try_for_each(check)?;
            result.push(counters.map(|counters| target_outcome(&counters)));
        }
        Ok(Some(result))
    }

    fn takes(&self, packet: &Packet, link: Link) -> bool {
        packet.fits_test_run(link)
    }
}
