//! A model's setup as the data plane takes it: slots, activations, instants.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use injector::dataplane::{ActiveRule, Exemption, LinkKind, RuleSlot, TargetConfig, TargetSlot};
use injector_common::layout::MAX_RULES;

use crate::model::{Hook, Link, RuleOutcome, Setup, TargetOutcome};

/// By how much the slots of two successive activations differ: rules come to lie all over the bitmaps.
const STRIDE: u32 = 37;

/// An activation of the model's, as the data plane knows it.
#[derive(Debug, Clone, Copy)]
struct Placed {
    slot: RuleSlot,
    activation: u32,
    activated_ns: u64,
    /// Time that passed in the model but not on our clock since then.
    skipped: Duration,
}

/// Keeps what activations are known by, from one setup to the next.
#[derive(Debug, Default)]
pub(super) struct Placing {
    known: HashMap<u32, Placed>,
    /// In the order of the setup.
    slots: Vec<RuleSlot>,
    last_slot: u32,
    last_activation: u32,
}

/// A setup for the data plane.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) targets: Vec<TargetConfig>,
    pub(super) rules: Vec<ActiveRule>,
    pub(super) exempt: Vec<Exemption>,
    /// Slots that have a new occupant.
    pub(super) fresh: Vec<RuleSlot>,
}

impl Placing {
    /// Forgets all activations. Their numbers are not used again.
    pub(super) fn forget(&mut self) {
        self.known.clear();
        self.slots.clear();
    }

    /// Slots of the rules in force, in the order of the setup.
    pub(super) fn slots(&self) -> &[RuleSlot] {
        &self.slots
    }

    /// Places a setup that comes into force at `now_ns`, `skipped` later than our clock says.
    pub(super) fn place(
        &mut self,
        setup: &Setup,
        now_ns: u64,
        skipped: Duration,
    ) -> anyhow::Result<Ready> {
        let stays: HashSet<u32> = setup.rules.iter().map(|entry| entry.activation).collect();
        self.known
            .retain(|activation, _| stays.contains(activation));
        for placed in self.known.values_mut() {
            placed.skipped += skipped;
        }
        let mut taken: HashSet<RuleSlot> = self.known.values().map(|placed| placed.slot).collect();
        let mut ready = Ready {
            targets: setup.targets.iter().map(target).collect(),
            rules: Vec::with_capacity(setup.rules.len()),
            exempt: setup.exempt.iter().map(exemption).collect(),
            fresh: Vec::new(),
        };
        self.slots.clear();
        for entry in &setup.rules {
            let placed = if let Some(placed) = self.known.get(&entry.activation) {
                *placed
            } else {
                let slot = self.free_slot(&taken)?;
                taken.insert(slot);
                ready.fresh.push(slot);
                self.last_activation += 1;
                let age = u64::try_from(entry.age.as_nanos()).unwrap_or(u64::MAX);
                let placed = Placed {
                    slot,
                    activation: self.last_activation,
                    activated_ns: now_ns.checked_sub(age).with_context(|| {
                        format!("an age of {:?} on a clock at {now_ns} ns", entry.age)
                    })?,
                    skipped: Duration::ZERO,
                };
                self.known.insert(entry.activation, placed);
                placed
            };
            self.slots.push(placed.slot);
            let mut rule = entry.rule.clone();
            // The skipped time counts for what is measured from the activation on.
            rule.lifetime = rule.lifetime.map(|lifetime| {
                lifetime
                    .saturating_sub(placed.skipped)
                    .max(Duration::from_nanos(1))
            });
            if let Some(flap) = &mut rule.flap {
                let cycle = (flap.up + flap.down).as_nanos();
                let phase = (flap.phase + placed.skipped).as_nanos() % cycle;
                flap.phase = Duration::from_nanos(u64::try_from(phase)?);
            }
            ready.rules.push(ActiveRule {
                slot: placed.slot,
                activation: placed.activation,
                activated_ns: placed.activated_ns,
                targets: entry.targets.iter().copied().map(TargetSlot).collect(),
                rule: Arc::new(rule),
            });
        }
        Ok(ready)
    }

    fn free_slot(&mut self, taken: &HashSet<RuleSlot>) -> anyhow::Result<RuleSlot> {
        for _ in 0..MAX_RULES {
            self.last_slot = (self.last_slot + STRIDE) % MAX_RULES;
            let slot = RuleSlot(u16::try_from(self.last_slot)?);
            if !taken.contains(&slot) {
                return Ok(slot);
            }
        }
        anyhow::bail!("a setup of more than {MAX_RULES} rules")
    }
}

fn target(target: &crate::model::Target) -> TargetConfig {
    TargetConfig {
        slot: TargetSlot(target.slot),
        link: match target.link {
            Link::Ethernet => LinkKind::Ethernet,
            Link::Raw => LinkKind::Raw,
        },
        loopback: target.loopback,
        ifindex: 0,
        lane: None,
    }
}

fn exemption(entry: &crate::model::Exemption) -> Exemption {
    Exemption {
        peer: entry.peer.clone(),
        local: entry.local.clone(),
        peer_port: entry.peer_port.clone(),
        local_port: entry.local_port.clone(),
        protocols: entry.protocols.clone(),
    }
}

/// The direction that the programs know a hook by.
pub(super) fn direction(hook: Hook) -> u32 {
    match hook {
        Hook::Egress => injector_common::layout::hook::EGRESS,
        Hook::Ingress => injector_common::layout::hook::INGRESS,
    }
}

/// What the model counts of a rule.
pub(super) fn rule_outcome(counters: &injector::dataplane::RuleCounters) -> RuleOutcome {
    RuleOutcome {
        matched: counters.matched_packets,
        cut: counters.cut_packets,
        excess: counters.excess_packets,
        off: counters.off_packets,
        lapsed: counters.lapsed_packets,
    }
}

/// What the model counts of a target.
pub(super) fn target_outcome(counters: &injector::dataplane::TargetCounters) -> TargetOutcome {
    TargetOutcome {
        unparsed: counters.unparsed_packets,
        orphan_fragments: counters.orphan_fragments,
    }
}

/// Fails if a target counted what cannot be in a comparison: failures of our own, or tables that are too
/// small for it.
pub(super) fn check(counters: &injector::dataplane::TargetCounters) -> anyhow::Result<()> {
    anyhow::ensure!(
        counters.errors == 0 && counters.table_full == 0 && counters.surplus_rules == 0,
        "the target's counters say that something failed: {counters:?}"
    );
    anyhow::ensure!(
        counters.seen_packets == counters.passed_packets + counters.cut_packets,
        "packets seen are not those passed and those cut: {counters:?}"
    );
    Ok(())
}
