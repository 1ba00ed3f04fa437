//! Lockstep comparison of anything that decides packets with the model, and the search for the
//! smallest scenario that still shows a difference.

use std::fmt;

use anyhow::Context as _;

use super::{Hook, Link, Model, Packet, RuleOutcome, Setup, TargetOutcome, describe_rule};

/// Comparisons that a search for a smaller scenario may cost.
const MINIMISING_RUNS: usize = 600;

/// What a subject says of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Lost.
    pub cut: bool,
    /// Answered.
    pub answered: bool,
    /// Not understood; `None` where the subject cannot tell packet by packet.
    pub unparsed: Option<bool>,
}

/// Something that decides packets: the loaded program, the shared code in user space, a model.
pub trait Subject {
    /// Name for messages.
    fn name(&self) -> String;

    /// Puts a setup into force and forgets everything before it: positions, counters, fragments,
    /// connections, ordinals. The lease is valid afterwards.
    fn install(&mut self, setup: &Setup) -> anyhow::Result<()>;

    /// Puts another setup into force as a change: activations that are in both keep what they have
    /// counted, and so do fragments and connections.
    fn replace(&mut self, setup: &Setup) -> anyhow::Result<()>;

    /// Lets the lease lapse, or be valid again.
    fn set_lease(&mut self, valid: bool) -> anyhow::Result<()>;

    /// Decides one packet.
    fn decide(&mut self, packet: &Packet) -> anyhow::Result<Outcome>;

    /// Counters of the rules in force, in the order of the setup; egress and ingress.
    fn rule_counters(&mut self) -> anyhow::Result<Vec<[RuleOutcome; 2]>>;

    /// Counters of the targets, in the order of the setup; `None` if the subject has none.
    fn target_counters(&mut self) -> anyhow::Result<Option<Vec<[TargetOutcome; 2]>>>;

    /// Whether a packet can be given to this subject at all.
    fn takes(&self, packet: &Packet, link: Link) -> bool {
        let _ = (packet, link);
        true
    }
}

impl Subject for Model {
    fn name(&self) -> String {
        "model".to_owned()
    }

    fn install(&mut self, setup: &Setup) -> anyhow::Result<()> {
        *self = Self::new(setup.clone());
        Ok(())
    }

    fn replace(&mut self, setup: &Setup) -> anyhow::Result<()> {
        Self::replace(self, setup.clone());
        Ok(())
    }

    fn set_lease(&mut self, valid: bool) -> anyhow::Result<()> {
        Self::set_lease(self, valid);
        Ok(())
    }

    fn decide(&mut self, packet: &Packet) -> anyhow::Result<Outcome> {
        let decision = Self::decide(self, packet);
        Ok(Outcome {
            cut: decision.cut,
            answered: decision.answered,
            unparsed: Some(decision.unparsed),
        })
    }

    fn rule_counters(&mut self) -> anyhow::Result<Vec<[RuleOutcome; 2]>> {
        Ok(self.rule_totals())
    }

    fn target_counters(&mut self) -> anyhow::Result<Option<Vec<[TargetOutcome; 2]>>> {
        Ok(Some(self.target_totals()))
    }
}

/// A setup and the packets that come while it is in force.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Phase {
    /// The setup.
    pub setup: Setup,
    /// The lease has lapsed throughout.
    pub lease_lapsed: bool,
    /// The packets.
    pub packets: Vec<Packet>,
}

/// Phases one after the other; each replaces the setup of the one before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scenario {
    /// What it was generated from.
    pub seed: u64,
    /// The phases.
    pub phases: Vec<Phase>,
}

impl Scenario {
    /// All packets.
    #[must_use]
    pub fn packet_count(&self) -> usize {
        self.phases.iter().map(|phase| phase.packets.len()).sum()
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "scenario of seed {}", self.seed)?;
        for (index, phase) in self.phases.iter().enumerate() {
            let lease = if phase.lease_lapsed {
                ", lease lapsed"
            } else {
                ""
            };
            writeln!(f, "phase {index}{lease}")?;
            for target in &phase.setup.targets {
                writeln!(f, "  {target:?}")?;
            }
            for entry in &phase.setup.rules {
                writeln!(f, "  rule {}", describe_rule(entry))?;
            }
            for entry in &phase.setup.exempt {
                writeln!(f, "  {entry:?}")?;
            }
            for (number, packet) in phase.packets.iter().enumerate() {
                writeln!(f, "  packet {number}: {packet:?}")?;
            }
        }
        Ok(())
    }
}

/// Where a subject and the model part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The subject.
    pub subject: String,
    /// Index of the phase.
    pub phase: usize,
    /// Index of the packet in its phase; `None` for counters at the end of the phase.
    pub packet: Option<usize>,
    /// What was seen and what the model says.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} differs from the model in phase {}",
            self.subject, self.phase
        )?;
        match self.packet {
            Some(packet) => write!(f, ", packet {packet}: {}", self.what),
            None => write!(f, ", counters: {}", self.what),
        }
    }
}

/// What a comparison went through, and the first difference, if there is one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Comparison {
    /// Packets decided by all.
    pub packets: u64,
    /// Packets that not every subject can be given.
    pub left_out: u64,
    /// Packets lost.
    pub cut: u64,
    /// Packets answered.
    pub answered: u64,
    /// Packets not understood.
    pub unparsed: u64,
    /// Later fragments without their first.
    pub orphans: u64,
    /// Packets that at least one rule matched.
    pub matched: u64,
    /// Rules that matched at least one packet.
    pub rules_matched: u64,
    /// Rules in force, phase by phase.
    pub rules: u64,
    /// The first difference.
    pub difference: Option<Difference>,
}

impl std::ops::AddAssign for Comparison {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.left_out += other.left_out;
        self.cut += other.cut;
        self.answered += other.answered;
        self.unparsed += other.unparsed;
        self.orphans += other.orphans;
        self.matched += other.matched;
        self.rules_matched += other.rules_matched;
        self.rules += other.rules;
        self.difference = self.difference.take().or(other.difference);
    }
}

/// Runs a scenario through the subjects and the model side by side, until the first difference.
///
/// # Errors
/// If a subject fails at what it was asked to do.
pub fn compare(
    subjects: &mut [&mut dyn Subject],
    scenario: &Scenario,
) -> anyhow::Result<Comparison> {
    let mut result = Comparison::default();
    let mut model = Model::default();
    for (index, phase) in scenario.phases.iter().enumerate() {
        enter(subjects, &mut model, index, phase)
            .with_context(|| format!("phase {index} of the scenario of seed {}", scenario.seed))?;
        for (number, packet) in phase.packets.iter().enumerate() {
            let link = phase
                .setup
                .target(packet.target)
                .map_or(Link::Ethernet, |t| t.link);
            if !subjects.iter().all(|subject| subject.takes(packet, link)) {
                result.left_out += 1;
                continue;
            }
            let decision = model.decide(packet);
            result.packets += 1;
            result.cut += u64::from(decision.cut);
            result.answered += u64::from(decision.answered);
            result.unparsed += u64::from(decision.unparsed);
            result.orphans += u64::from(decision.orphan);
            let touched = decision.per_rule.iter().flatten();
            result.matched += u64::from(touched.clone().any(|o| *o != RuleOutcome::default()));
            for subject in &mut *subjects {
                let outcome = subject.decide(packet).with_context(|| {
                    format!("{}: deciding packet {number}: {packet:?}", subject.name())
                })?;
                let unparsed_differs = phase.setup.covers(packet.target, packet.hook)
                    && outcome
                        .unparsed
                        .is_some_and(|unparsed| unparsed != decision.unparsed);
                if outcome.cut != decision.cut
                    || outcome.answered != decision.answered
                    || unparsed_differs
                {
                    result.difference = Some(Difference {
                        subject: subject.name(),
                        phase: index,
                        packet: Some(number),
                        what: format!("{outcome:?}, but the model says {decision:?}"),
                    });
                    return Ok(result);
                }
            }
        }
        let totals = model.rule_totals();
        result.rules += totals.len() as u64;
        let idle = [RuleOutcome::default(); 2];
        result.rules_matched += totals.iter().filter(|total| **total != idle).count() as u64;
        for subject in &mut *subjects {
            if let Some(what) = counters_differ(*subject, &model)? {
                let name = subject.name();
                result.difference = Some(Difference {
                    subject: name,
                    phase: index,
                    packet: None,
                    what,
                });
                return Ok(result);
            }
        }
    }
    Ok(result)
}

fn enter(
    subjects: &mut [&mut dyn Subject],
    model: &mut Model,
    index: usize,
    phase: &Phase,
) -> anyhow::Result<()> {
    let model: &mut dyn Subject = model;
    for subject in std::iter::once(model).chain(subjects.iter_mut().map(|subject| &mut **subject)) {
        if index == 0 {
            subject.install(&phase.setup)
        } else {
            subject.replace(&phase.setup)
        }
        .and_then(|()| subject.set_lease(!phase.lease_lapsed))
        .with_context(|| subject.name())?;
    }
    Ok(())
}

fn counters_differ(subject: &mut dyn Subject, model: &Model) -> anyhow::Result<Option<String>> {
    let setup = model.setup();
    let counters = subject.rule_counters().with_context(|| subject.name())?;
    let totals = model.rule_totals();
    if counters.len() != totals.len() {
        return Ok(Some(format!(
            "{} rules, not {}",
            counters.len(),
            totals.len()
        )));
    }
    for ((entry, seen), wanted) in setup.rules.iter().zip(&counters).zip(&totals) {
        if seen != wanted {
            let name = &entry.rule.name;
            return Ok(Some(format!(
                "rule {name}: {seen:?}, but the model says {wanted:?}"
            )));
        }
    }
    let Some(counters) = subject.target_counters().with_context(|| subject.name())? else {
        return Ok(None);
    };
    for ((target, seen), wanted) in setup
        .targets
        .iter()
        .zip(&counters)
        .zip(model.target_totals())
    {
        for hook in Hook::ALL {
            // Where no rule is, a packet need not be looked at.
            let (seen, wanted) = (seen[hook.index()], wanted[hook.index()]);
            if seen != wanted && setup.covers(target.slot, hook) {
                let slot = target.slot;
                return Ok(Some(format!(
                    "target {slot} {hook:?}: {seen:?}, but the model says {wanted:?}"
                )));
            }
        }
    }
    Ok(None)
}

/// Searches for a smaller scenario that still shows a difference, and returns the smallest one found
/// with the difference that it shows.
///
/// # Errors
/// If a subject fails at what it was asked to do.
pub fn minimise(
    subjects: &mut [&mut dyn Subject],
    scenario: &Scenario,
    difference: &Difference,
) -> anyhow::Result<(Scenario, Difference)> {
    let mut best = scenario.clone();
    best.phases.truncate(difference.phase + 1);
    if let (Some(packet), Some(phase)) = (difference.packet, best.phases.last_mut()) {
        phase.packets.truncate(packet + 1);
    }
    let mut found = difference.clone();
    let mut runs = 0;
    loop {
        let before = (best.packet_count(), rule_count(&best), best.phases.len());
        for kind in [Part::Phases, Part::Packets, Part::Rules, Part::Exemptions] {
            for phase in (0..best.phases.len()).rev() {
                let mut step = kind.count(&best, phase).div_ceil(2);
                while step > 0 && phase < best.phases.len() {
                    let mut from = 0;
                    while from < kind.count(&best, phase) && runs < MINIMISING_RUNS {
                        let candidate = kind.without(&best, phase, from, step);
                        runs += 1;
                        match compare(subjects, &candidate)?.difference {
                            Some(difference) => {
                                best = candidate;
                                found = difference;
                            }
                            None => from += step,
                        }
                        if phase >= best.phases.len() {
                            break;
                        }
                    }
                    step /= 2;
                }
            }
        }
        if before == (best.packet_count(), rule_count(&best), best.phases.len())
            || runs >= MINIMISING_RUNS
        {
            return Ok((best, found));
        }
    }
}

fn rule_count(scenario: &Scenario) -> usize {
    scenario
        .phases
        .iter()
        .map(|phase| phase.setup.rules.len() + phase.setup.exempt.len())
        .sum()
}

/// What can be taken out of a scenario.
#[derive(Debug, Clone, Copy)]
enum Part {
    Phases,
    Packets,
    Rules,
    Exemptions,
}

impl Part {
    fn count(self, scenario: &Scenario, phase: usize) -> usize {
        let Some(entry) = scenario.phases.get(phase) else {
            return 0;
        };
        match self {
            Self::Phases => usize::from(scenario.phases.len() > 1),
            Self::Packets => entry.packets.len(),
            Self::Rules => entry.setup.rules.len(),
            Self::Exemptions => entry.setup.exempt.len(),
        }
    }

    fn without(self, scenario: &Scenario, phase: usize, from: usize, count: usize) -> Scenario {
        let mut smaller = scenario.clone();
        let entry = &mut smaller.phases[phase];
        let range = |length: usize| from..(from + count).min(length);
        match self {
            Self::Phases => drop(smaller.phases.remove(phase)),
            Self::Packets => drop(entry.packets.drain(range(entry.packets.len()))),
            Self::Rules => drop(entry.setup.rules.drain(range(entry.setup.rules.len()))),
            Self::Exemptions => drop(entry.setup.exempt.drain(range(entry.setup.exempt.len()))),
        }
        smaller
    }
}
