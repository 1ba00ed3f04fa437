//! Changes to the rule set: each is made as a whole or not at all.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map::Entry},
    hash::Hasher,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use siphasher::sip::SipHasher24;

use super::{
    host::Host,
    partition::{self, Piece},
    plane::{ActiveRule, Plane, RuleSlot, TargetConfig},
    protect::Protection,
    record::{ConnId, Ended, Place, Record, Tally},
    state::{Origin, State},
    targets::TargetKey,
};
use crate::{
    attach::TargetLink,
    netns::Netns,
    protocol::{
        AddArgs, AddResult, ApplyArgs, ApplyMode, DownResult, ErrorBody, ErrorCode, EventKind,
        HealArgs, HealResult, OperatorConnection, PartitionArgs, PartitionResult, ProtectArgs,
        ProtectResult, RuleState, RuleStats, RuleStatus,
    },
    rules::{
        self, RuleSpec,
        model::{Fault, FlowIdentity, NetnsRef, Rule},
        shaping::Shaping,
        text,
    },
};

/// So many ended rules are kept for their counters; older ones are forgotten.
const MAX_ENDED: usize = 1024;

/// A rule that is asked for.
struct Wanted {
    rule: Rule,
    /// The seed was given rather than drawn.
    seed_given: bool,
}

/// What happens to rules that are not asked for.
enum Retire {
    Nothing,
    /// They end, except held ones.
    Others,
    /// Those of this group end.
    Group(String),
}

/// How rules are installed.
struct Policy {
    /// An active rule of the same name is replaced instead of being an error.
    replace: bool,
    retire: Retire,
    hold: Option<ConnId>,
    dry_run: bool,
}

/// Where the rules that are asked for are to act.
struct Resolved {
    /// Per rule.
    places: Vec<Vec<Place>>,
    /// Every target among them.
    links: BTreeMap<TargetKey, TargetLink>,
}

/// What a set of rules asked for means for the rules that there are.
struct Difference {
    /// Indices of wanted rules that are new or changed.
    new: Vec<usize>,
    /// Names of wanted rules that stay as they are.
    unchanged: Vec<String>,
    /// Activations of rules that make room for a new one of the same name.
    replaced: HashSet<u32>,
    /// Activations of rules that end.
    retired: HashSet<u32>,
    warnings: Vec<String>,
}

impl<P: Plane, H: Host> State<P, H> {
    pub(super) fn add(&mut self, args: AddArgs, origin: Origin) -> Result<AddResult, ErrorBody> {
        let policy = Policy {
            replace: args.replace,
            retire: Retire::Nothing,
            hold: args.hold.then_some(origin.conn),
            dry_run: args.dry_run,
        };
        let wanted = parse(&args.rules)?;
        if wanted.is_empty() {
            return Err(ErrorBody::new(
                ErrorCode::Invalid,
                "there is no rule to add",
            ));
        }
        drop(args.rules);
        self.install(wanted, &policy, &args.operator, origin)
    }

    pub(super) fn apply(
        &mut self,
        args: ApplyArgs,
        origin: Origin,
    ) -> Result<AddResult, ErrorBody> {
        let policy = Policy {
            replace: true,
            retire: match args.mode {
                ApplyMode::Add => Retire::Nothing,
                ApplyMode::Replace => Retire::Others,
            },
            hold: None,
            dry_run: args.dry_run,
        };
        let wanted = parse(&args.rules)?;
        drop(args.rules);
        self.install(wanted, &policy, &args.operator, origin)
    }

    pub(super) fn partition(
        &mut self,
        args: &PartitionArgs,
        origin: Origin,
    ) -> Result<PartitionResult, ErrorBody> {
        let group = match &args.name {
            Some(name) => name.clone(),
            None => generated_group(args)?,
        };
        rules::check_name(&group).map_err(|problem| {
            ErrorBody::new(
                ErrorCode::Invalid,
                format!("the name {group:?} of the partition {}", problem.problem),
            )
            .with_hint(problem.help)
        })?;
        let taken = |what: &str| {
            ErrorBody::new(
                ErrorCode::Exists,
                format!("there is a {what} named {group:?} already; nothing was changed"),
            )
            .with_hint(format!(
                "heal it first (`injector heal {group}`), or choose another name"
            ))
        };
        if self.find(&group).is_some_and(Record::is_active) {
            return Err(taken("rule"));
        }
        let exists = self
            .rules
            .iter()
            .any(|record| record.is_active() && record.rule.group.as_ref() == Some(&group));
        if exists && !args.replace {
            return Err(taken("partition"));
        }
        let invalid = |what: &str, text: &str, problem: rules::Problem| {
            ErrorBody::new(
                ErrorCode::Invalid,
                format!("{what} {text:?} {}", problem.problem),
            )
            .with_hint(problem.help)
        };
        let netns = match &args.netns {
            None => NetnsRef::Own,
            Some(text) => {
                text::netns::parse(text).map_err(|problem| invalid("netns", text, problem))?
            }
        };
        let lifetime = args
            .lifetime
            .as_deref()
            .map(|text| {
                text::duration::parse(text).map_err(|problem| invalid("for", text, problem))
            })
            .transpose()?;
        if lifetime.is_some_and(|lifetime| lifetime.is_zero()) {
            return Err(
                ErrorBody::new(ErrorCode::Invalid, "the lifetime (for) is zero")
                    .with_hint("give a time such as 30s, or none"),
            );
        }
        let topology = self.host.topology(&self.host.resolve(&netns)?)?;
        let plan = partition::resolve(&args.sides, &topology, &args.ifaces, args.one_way)?;
        let wanted = plan
            .pieces
            .into_iter()
            .map(|piece| piece_of(piece, args, &group, &netns, lifetime))
            .collect::<Result<Vec<_>, ErrorBody>>()?;
        let policy = Policy {
            replace: args.replace,
            retire: Retire::Group(group.clone()),
            hold: args.hold.then_some(origin.conn),
            dry_run: args.dry_run,
        };
        let mut added = self.install(wanted, &policy, &args.operator, origin)?;
        added.warnings.splice(0..0, plan.warnings);
        Ok(PartitionResult {
            group,
            plan: plan.steps,
            added,
        })
    }

    /// Finds the targets of rules.
    fn resolve(&self, wanted: &[Wanted]) -> Result<Resolved, ErrorBody> {
        let mut namespaces: HashMap<&NetnsRef, Netns> = HashMap::new();
        let mut found: HashMap<(&NetnsRef, &str), TargetKey> = HashMap::new();
        let mut links = BTreeMap::new();
        let mut all = Vec::with_capacity(wanted.len());
        for Wanted { rule, .. } in wanted {
            let of_rule = |error: ErrorBody| ErrorBody {
                message: format!(
                    "rule {:?}: {}; nothing was changed",
                    rule.name, error.message
                ),
                ..error
            };
            let netns = match namespaces.entry(&rule.netns) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => {
                    unknown.insert(self.host.resolve(&rule.netns).map_err(of_rule)?)
                }
            };
            let mut places: Vec<Place> = Vec::with_capacity(rule.interfaces.len());
            for interface in &rule.interfaces {
                let key = match found.entry((&rule.netns, interface)) {
                    Entry::Occupied(known) => *known.get(),
                    Entry::Vacant(unknown) => {
                        let link = self.host.inspect(netns, interface).map_err(of_rule)?;
                        let key = TargetKey::of(&link);
                        links.entry(key).or_insert(link);
                        *unknown.insert(key)
                    }
                };
                // Two names of one interface are one target.
                if places.iter().all(|place| place.key != key) {
                    places.push(Place {
                        key,
                        netns: text::netns::format(&rule.netns),
                        iface: interface.clone(),
                        problem: None,
                    });
                }
            }
            all.push(places);
        }
        Ok(Resolved { places: all, links })
    }

    /// Compares what is asked for with what there is. Rules that turn out to be there already get the
    /// seed that was drawn for them then.
    fn compare(
        &self,
        wanted: &mut [Wanted],
        resolved: &Resolved,
        policy: &Policy,
    ) -> Result<Difference, ErrorBody> {
        let mut names = HashSet::new();
        for Wanted { rule, .. } in &*wanted {
            if !names.insert(rule.name.clone()) {
                return Err(ErrorBody::new(
                    ErrorCode::Invalid,
                    format!(
                        "two of the rules are named {:?}; nothing was changed",
                        rule.name
                    ),
                )
                .with_hint(
                    "give each a name of its own (rules that say the same get the same generated \
                     name)",
                ));
            }
        }
        let by_name: HashMap<&str, &Record> = self
            .rules
            .iter()
            .map(|record| (record.rule.name.as_str(), record))
            .collect();
        let groups: HashSet<&str> = self
            .rules
            .iter()
            .filter(|record| record.is_active())
            .filter_map(|record| record.rule.group.as_deref())
            .collect();
        let mut difference = Difference {
            new: Vec::new(),
            unchanged: Vec::new(),
            replaced: HashSet::new(),
            retired: HashSet::new(),
            warnings: Vec::new(),
        };
        for (index, asked) in wanted.iter_mut().enumerate() {
            let exists = |what: &str| {
                ErrorBody::new(
                    ErrorCode::Exists,
                    format!(
                        "there is a {what} named {:?} already; nothing was changed",
                        asked.rule.name
                    ),
                )
                .with_hint("choose another name, heal it first, or replace it (--replace)")
            };
            if groups.contains(asked.rule.name.as_str()) {
                return Err(exists("partition"));
            }
            match by_name.get(asked.rule.name.as_str()) {
                Some(record) if record.is_active() => {
                    if !policy.replace {
                        return Err(exists("rule"));
                    }
                    if !asked.seed_given {
                        asked.rule.seed = record.rule.seed;
                    }
                    if self.is_same(record, &asked.rule, &resolved.places[index], policy.hold) {
                        difference.unchanged.push(asked.rule.name.clone());
                    } else {
                        difference.replaced.insert(record.activation);
                        difference.new.push(index);
                    }
                }
                // One that has ended does not keep its name from being used.
                Some(record) => {
                    difference.replaced.insert(record.activation);
                    difference.new.push(index);
                }
                None => difference.new.push(index),
            }
        }
        for record in &self.rules {
            if names.contains(&record.rule.name) {
                continue;
            }
            match &policy.retire {
                Retire::Others if record.hold.is_some() => difference.warnings.push(format!(
                    "rule {:?} is held by a running command and was left alone",
                    record.rule.name
                )),
                Retire::Others => {
                    difference.retired.insert(record.activation);
                }
                Retire::Group(group) if record.rule.group.as_ref() == Some(group) => {
                    difference.retired.insert(record.activation);
                }
                Retire::Group(_) | Retire::Nothing => {}
            }
        }
        Ok(difference)
    }

    /// Whether a rule that acts is what is asked for.
    fn is_same(
        &self,
        record: &Record,
        rule: &Rule,
        places: &[Place],
        hold: Option<ConnId>,
    ) -> bool {
        let mut asked = rule.clone();
        // Whether a name was generated says nothing about what the rule does.
        asked.name_generated = record.rule.name_generated;
        let keys = |places: &[Place]| {
            places
                .iter()
                .map(|place| place.key)
                .collect::<BTreeSet<_>>()
        };
        asked == *record.rule
            && keys(places) == keys(&record.places)
            && places.iter().all(|place| {
                self.targets
                    .get(&place.key)
                    .is_some_and(super::targets::Target::is_attached)
                    && self.lane_problem(rule, &place.key).is_none()
            })
            && (hold.is_none() || hold == record.hold)
            && !record.doomed
    }

    /// Makes rules act, all of them or none.
    fn install(
        &mut self,
        mut wanted: Vec<Wanted>,
        policy: &Policy,
        operator: &[OperatorConnection],
        origin: Origin,
    ) -> Result<AddResult, ErrorBody> {
        let resolved = self.resolve(&wanted)?;
        let difference = self.compare(&mut wanted, &resolved, policy)?;
        self.check_room(&difference)?;
        let mut protection = self.protection.clone();
        protection.remember(operator);
        let names: Vec<String> = wanted
            .iter()
            .map(|wanted| wanted.rule.name.clone())
            .collect();
        let spares = wanted.iter().any(|wanted| !wanted.rule.unprotected);
        let protected = if spares {
            protection.entries()
        } else {
            Vec::new()
        };
        let keys: BTreeSet<TargetKey> = resolved.links.keys().copied().collect();

        let new = difference.new.iter().copied().collect::<HashSet<_>>();
        let fresh_rules: Vec<(Rule, Vec<Place>)> = wanted
            .into_iter()
            .zip(resolved.places)
            .enumerate()
            .filter(|(index, _)| new.contains(index))
            .map(|(_, (wanted, places))| (wanted.rule, places))
            .collect();
        let healed: Vec<String> = self
            .rules
            .iter()
            .filter(|record| difference.retired.contains(&record.activation))
            .map(|record| record.rule.name.clone())
            .collect();

        if policy.dry_run {
            return Ok(AddResult {
                rules: self.preview(&names, fresh_rules, policy.hold),
                unchanged: difference.unchanged,
                healed,
                warnings: difference.warnings,
                protected,
                epoch: self.epoch,
                effect_ns: 0,
            });
        }

        self.put(
            fresh_rules,
            &resolved.links,
            &difference,
            protection,
            policy.hold,
        )?;
        let effect_ns = self.effective_ns.saturating_sub(origin.received_ns);
        if policy.hold.is_some() {
            self.holders.insert(origin.conn);
        }
        let mut warnings = difference.warnings;
        warnings.extend(self.warnings(&keys));
        Ok(AddResult {
            rules: names
                .iter()
                .filter_map(|name| self.find(name))
                .map(|record| self.status(record))
                .collect(),
            unchanged: difference.unchanged,
            healed,
            warnings,
            protected,
            epoch: self.epoch,
            effect_ns,
        })
    }

    /// Makes sure that no more rules act than can.
    fn check_room(&self, difference: &Difference) -> Result<(), ErrorBody> {
        let ending = |record: &&Record| {
            difference.replaced.contains(&record.activation)
                || difference.retired.contains(&record.activation)
        };
        let staying = self
            .rules
            .iter()
            .filter(|r| r.is_active() && !ending(r))
            .count();
        let most = usize::from(self.plane.limits().rules);
        if staying + difference.new.len() > most {
            return Err(ErrorBody::new(
                ErrorCode::Limit,
                format!(
                    "{} rules would act at once, {most} can; nothing was changed",
                    staying + difference.new.len()
                ),
            )
            .with_hint("heal rules, or put addresses that share a fate into one rule"));
        }
        Ok(())
    }

    /// What the status of rules would be if they were installed.
    fn preview(
        &self,
        names: &[String],
        fresh_rules: Vec<(Rule, Vec<Place>)>,
        hold: Option<ConnId>,
    ) -> Vec<RuleStatus> {
        let now_ns = self.plane.now_ns();
        let records: Vec<Record> = fresh_rules
            .into_iter()
            .map(|(rule, places)| new_record(rule, places, RuleSlot(0), 0, now_ns, hold))
            .collect();
        names
            .iter()
            .filter_map(|name| {
                records
                    .iter()
                    .find(|record| record.rule.name == *name)
                    .or_else(|| self.find(name))
            })
            .map(|record| self.status(record))
            .collect()
    }

    /// What the user should know about the targets of new rules.
    fn warnings(&self, keys: &BTreeSet<TargetKey>) -> Vec<String> {
        let mut warnings = Vec::new();
        for key in keys {
            let Some(target) = self.targets.get(key) else {
                continue;
            };
            for obstacle in self.obstacles(key) {
                warnings.push(format!(
                    "{}, {obstacle}; it runs before the injector and may hide packets from it",
                    target.label()
                ));
            }
        }
        warnings.extend(self.double_passes());
        if !self.lease_status().valid {
            warnings.push(
                "the lease has lapsed: no rule acts until it is renewed (`injector stats`)".into(),
            );
        }
        warnings
    }

    /// Attaches what is missing, commits, and only then changes what is remembered.
    fn put(
        &mut self,
        fresh_rules: Vec<(Rule, Vec<Place>)>,
        links: &BTreeMap<TargetKey, TargetLink>,
        difference: &Difference,
        protection: Protection,
        hold: Option<ConnId>,
    ) -> Result<(), ErrorBody> {
        let ending: HashSet<u32> = difference
            .replaced
            .union(&difference.retired)
            .copied()
            .collect();
        let lanes = self.make_lanes(&fresh_rules, links)?;
        let fresh = match self.attach_all(links) {
            Ok(fresh) => fresh,
            Err(error) => {
                self.take_back_lanes(lanes);
                return Err(error);
            }
        };
        let mut finals: HashMap<u32, Tally> = HashMap::new();
        let committed = self
            .take_slots(fresh_rules.len(), &ending, &mut finals)
            .and_then(|slots| {
                let now_ns = self.plane.now_ns();
                let records: Vec<Record> = fresh_rules
                    .into_iter()
                    .zip(slots)
                    .zip(self.free_activations())
                    .map(|(((rule, places), slot), activation)| {
                        new_record(rule, places, slot, activation, now_ns, hold)
                    })
                    .collect();
                self.commit(&ending, &records, &protection)?;
                Ok(records)
            });
        let records = match committed {
            Ok(records) => records,
            Err(error) => {
                // Counters of rules that go on were cleared for nothing: they are added from now on.
                for record in &mut self.rules {
                    if let Some(counters) = finals.get(&record.activation) {
                        record.base = counters.clone();
                    }
                }
                self.take_back(fresh);
                self.take_back_lanes(lanes);
                return Err(error);
            }
        };
        self.tell_fresh(&fresh);
        self.protection = protection;
        // Numbers are not reused; so many changes (four thousand million) end no daemon's life.
        if let Some(last) = records.last() {
            self.next_activation = last.activation.saturating_add(1);
        }
        let changed: HashSet<String> = self
            .rules
            .iter()
            .filter(|r| r.is_active() && difference.replaced.contains(&r.activation))
            .map(|record| record.rule.name.clone())
            .collect();
        self.forget(&ending, &finals, |state, record, _| {
            if difference.retired.contains(&record.activation) && record.is_active() {
                state.events.push(
                    EventKind::RuleHealed,
                    Some(&record.rule.name),
                    None,
                    format!(
                        "rule {} ended: not among the rules applied",
                        record.rule.name
                    ),
                );
            }
        });
        for record in records {
            let name = &record.rule.name;
            let what = format!("{}: {}", record.rule.describe_faults(), record.asked);
            let place = record
                .places
                .iter()
                .map(|place| super::targets::label(&record.rule.netns, &place.iface))
                .collect::<Vec<_>>()
                .join(",");
            if changed.contains(name) {
                let message = format!("rule {name} replaced, now {what}, at {place}");
                self.events
                    .push(EventKind::RuleChanged, Some(name), Some(&place), message);
            } else {
                let message = format!("rule {name} added, {what}, at {place}");
                self.events
                    .push(EventKind::RuleAdded, Some(name), Some(&place), message);
            }
            self.rules.push(record);
        }
        self.detach_unused();
        Ok(())
    }

    /// Free rule slots with their counters at zero. Where there are too few, those of ending rules are
    /// used, whose counters go into `finals`.
    fn take_slots(
        &mut self,
        count: usize,
        ending: &HashSet<u32>,
        finals: &mut HashMap<u32, Tally>,
    ) -> Result<Vec<RuleSlot>, ErrorBody> {
        let used: BTreeMap<RuleSlot, &Record> = self
            .rules
            .iter()
            .filter(|record| record.is_active())
            .map(|record| (record.slot, record))
            .collect();
        let mut slots: Vec<RuleSlot> = (0..self.plane.limits().rules)
            .map(RuleSlot)
            .filter(|slot| !used.contains_key(slot))
            .take(count)
            .collect();
        let missing = count - slots.len();
        let reused: Vec<(RuleSlot, u32, Tally)> = used
            .iter()
            .filter(|(_, record)| ending.contains(&record.activation))
            .take(missing)
            .map(|(slot, record)| Ok((*slot, record.activation, self.counters(record)?)))
            .collect::<Result<_, ErrorBody>>()?;
        for slot in &slots {
            self.plane.clear_rule(*slot)?;
        }
        for (slot, activation, counters) in reused {
            self.plane.clear_rule(slot)?;
            finals.insert(activation, counters);
            slots.push(slot);
        }
        Ok(slots)
    }

    /// Makes the rules that there are, without some and with some, the ones that act.
    pub(super) fn commit(
        &mut self,
        without: &HashSet<u32>,
        with: &[Record],
        protection: &Protection,
    ) -> Result<(), ErrorBody> {
        let exemptions = protection.exemptions();
        let most = self.plane.limits().exemptions;
        if exemptions.len() > most {
            return Err(ErrorBody::new(
                ErrorCode::Limit,
                format!(
                    "the protected connections, addresses and ports make {} exemptions, {most} can \
                     be; nothing was changed",
                    exemptions.len()
                ),
            )
            .with_hint("shorten the protect list (`injector protect`), or use wider prefixes"));
        }
        self.hold_for_ending(without);
        let in_force: Vec<&Record> = self
            .rules
            .iter()
            .filter(|record| record.is_active() && !without.contains(&record.activation))
            .chain(with)
            .collect();
        let needed = self.needed_lanes(in_force.iter().copied());
        let held = self
            .targets
            .iter()
            .filter(|(_, target)| target.hold.is_some());
        let mut targets: BTreeMap<TargetKey, TargetConfig> = held
            .map(|(key, target)| (*key, target.config(self.lane_of(key, &needed))))
            .collect();
        let rules: Vec<ActiveRule> = in_force
            .iter()
            .map(|record| ActiveRule {
                slot: record.slot,
                activation: record.activation,
                activated_ns: record.activated_ns,
                targets: record
                    .places
                    .iter()
                    .filter_map(|place| {
                        let target = self.targets.get(&place.key)?;
                        let lane = self.lane_of(&place.key, &needed);
                        targets.insert(place.key, target.config(lane));
                        Some(target.slot)
                    })
                    .collect(),
                rule: Arc::clone(&record.rule),
            })
            .collect();
        let holds = self.holds(in_force.iter().copied());
        if !with.is_empty() {
            self.must_be_within_horizon(&in_force)?;
        }
        let widened = self.widen_lanes(&holds);
        match widened {
            // Rules end, whatever somebody has done to the queues that they have used.
            Err(error) if with.is_empty() => {
                self.problem(None, format!("a lane keeps its limits: {}", error.message));
            }
            widened => widened?,
        }
        let targets: Vec<TargetConfig> = targets.into_values().collect();
        self.epoch = self.plane.commit(&targets, &rules, &exemptions)?.epoch;
        self.narrow_lanes(&holds);
        self.effective_ns = self.plane.now_ns();
        Ok(())
    }

    /// Drops rules that no longer act, after telling `each` of them and of its last counters.
    fn forget(
        &mut self,
        activations: &HashSet<u32>,
        finals: &HashMap<u32, Tally>,
        mut each: impl FnMut(&mut Self, &Record, &Tally),
    ) {
        let (gone, kept) = std::mem::take(&mut self.rules)
            .into_iter()
            .partition(|record| activations.contains(&record.activation));
        self.rules = kept;
        let gone: Vec<Record> = gone;
        for record in gone {
            let counters = match finals.get(&record.activation) {
                Some(counters) => counters.clone(),
                None => self.last_counters(&record),
            };
            each(self, &record, &counters);
        }
    }

    /// A rule's counters at its end; an error is told and costs the counters, not the end.
    fn last_counters(&mut self, record: &Record) -> Tally {
        self.counters(record).unwrap_or_else(|error| {
            let message = format!(
                "cannot read the last counters of rule {}: {error}",
                record.rule.name
            );
            self.problem(Some(&record.rule.name), message);
            record.base.clone()
        })
    }

    /// Ends rules for good and forgets them. After an error nothing has changed.
    pub(super) fn remove(
        &mut self,
        activations: &HashSet<u32>,
        kind: EventKind,
        why: &str,
    ) -> Result<Vec<RuleStats>, ErrorBody> {
        let acting = self
            .rules
            .iter()
            .any(|record| record.is_active() && activations.contains(&record.activation));
        if acting {
            let protection = self.protection.clone();
            self.commit(activations, &[], &protection)?;
        }
        let mut stats = Vec::new();
        self.forget(activations, &HashMap::new(), |state, record, counters| {
            stats.push(Self::rule_stats(record, counters));
            let name = &record.rule.name;
            let [egress, ingress] = counters.counters;
            let message = format!(
                "rule {name} {why}; it matched {} packets and cut {}",
                egress.matched_packets + ingress.matched_packets,
                egress.cut_packets + ingress.cut_packets
            );
            state.events.push(kind, Some(name), None, message);
        });
        self.after_ending();
        Ok(stats)
    }

    /// Ends rules and keeps them for their counters. After an error nothing has changed.
    pub(super) fn end(
        &mut self,
        activations: &HashSet<u32>,
        state: RuleState,
        kind: EventKind,
        reason: impl Fn(&Record) -> String,
    ) -> Result<(), ErrorBody> {
        let protection = self.protection.clone();
        self.commit(activations, &[], &protection)?;
        for index in 0..self.rules.len() {
            if !activations.contains(&self.rules[index].activation) {
                continue;
            }
            let record = self.rules[index].clone();
            let counters = self.last_counters(&record);
            let reason = reason(&record);
            let name = &record.rule.name;
            self.events.push(
                kind,
                Some(name),
                None,
                format!("rule {name} ended: {reason}"),
            );
            self.rules[index].ended = Some(Ended {
                state,
                reason,
                counters,
            });
        }
        let mut surplus = self
            .rules
            .iter()
            .filter(|r| !r.is_active())
            .count()
            .saturating_sub(MAX_ENDED);
        self.rules.retain(|record| {
            let forgotten = surplus > 0 && !record.is_active();
            surplus -= usize::from(forgotten);
            !forgotten
        });
        self.after_ending();
        Ok(())
    }

    fn after_ending(&mut self) {
        self.detach_unused();
        if !self.rules.iter().any(Record::is_active) {
            self.protection.forget_operators();
            self.schedule.idle_since_ns = self.plane.now_ns();
        }
    }

    pub(super) fn heal(
        &mut self,
        args: &HealArgs,
        origin: Origin,
    ) -> Result<HealResult, ErrorBody> {
        let activations: HashSet<u32> = if args.all {
            if !args.names.is_empty() {
                return Err(ErrorBody::new(
                    ErrorCode::Invalid,
                    "both names and all were asked for; nothing was changed",
                )
                .with_hint("give names, or --all"));
            }
            self.rules.iter().map(|record| record.activation).collect()
        } else {
            if args.names.is_empty() {
                return Err(
                    ErrorBody::new(ErrorCode::Invalid, "no rule to heal was named")
                        .with_hint("give names of rules or groups, or --all"),
                );
            }
            let mut activations = HashSet::new();
            for name in &args.names {
                let before = activations.len();
                let named: Vec<u32> = self
                    .rules
                    .iter()
                    .filter(|r| r.rule.name == *name || r.rule.group.as_ref() == Some(name))
                    .map(|record| record.activation)
                    .collect();
                if named.is_empty() && before == activations.len() {
                    return Err(ErrorBody::new(
                        ErrorCode::NotFound,
                        format!("there is no rule or group named {name:?}; nothing was changed"),
                    )
                    .with_hint("`injector list` shows the rules that there are"));
                }
                activations.extend(named);
            }
            activations
        };
        let flushes = if args.flush {
            // Begun before, lest packets that come between wait behind some that are dropped later.
            self.begin_flushes(&activations)?
        } else {
            Vec::new()
        };
        let healed = match self.remove(&activations, EventKind::RuleHealed, "healed") {
            Ok(healed) => healed,
            Err(error) => {
                self.abandon_flushes(&flushes);
                return Err(error);
            }
        };
        // The rules have ended, whatever can be told of what they held.
        let flushing = self.flush_status(&flushes).unwrap_or_else(|error| {
            self.problem(None, format!("cannot tell what is flushed: {error}"));
            Vec::new()
        });
        self.flushes.extend(flushes);
        let effect_ns = self.effective_ns.saturating_sub(origin.received_ns);
        self.retry_leftovers();
        Ok(HealResult {
            healed,
            flushing,
            host_restored: self.targets.is_empty() && self.leftovers.is_empty(),
            problems: self.problems(),
            epoch: self.epoch,
            effect_ns,
        })
    }

    pub(super) fn protect(&mut self, args: &ProtectArgs) -> Result<ProtectResult, ErrorBody> {
        let mut protection = self.protection.clone();
        protection.change(&args.add, &args.remove)?;
        if protection != self.protection {
            self.commit(&HashSet::new(), &[], &protection)?;
            self.protection = protection;
            let list: Vec<String> = self
                .protection
                .entries()
                .into_iter()
                .map(|entry| entry.what)
                .collect();
            let list = if list.is_empty() {
                "nothing".to_owned()
            } else {
                list.join(", ")
            };
            self.events.push(
                EventKind::ProtectChanged,
                None,
                None,
                format!("protected are now: {list}"),
            );
        }
        Ok(ProtectResult {
            protected: self.protection.entries(),
        })
    }

    /// A connection has closed: what it held ends.
    pub fn closed(&mut self, conn: ConnId) {
        if !self.holders.remove(&conn) {
            return;
        }
        for record in &mut self.rules {
            if record.hold == Some(conn) {
                record.doomed = true;
            }
        }
        self.end_doomed();
        self.schedule.idle_since_ns = self.plane.now_ns();
    }

    /// Ends the rules whose holder has gone.
    pub(super) fn end_doomed(&mut self) {
        let doomed: HashSet<u32> = self
            .rules
            .iter()
            .filter(|record| record.doomed)
            .map(|record| record.activation)
            .collect();
        if doomed.is_empty() {
            return;
        }
        let why = "ended: the command that held it has ended";
        if let Err(error) = self.remove(&doomed, EventKind::HoldReleased, why) {
            self.problem(
                None,
                format!("cannot end rules whose command has ended, will try again: {error}"),
            );
        }
    }

    /// Heals everything, detaches everything, and lets nothing in any more.
    pub fn down(&mut self, why: &str) -> DownResult {
        if !self.leaving {
            self.leaving = true;
            self.events
                .push(EventKind::Stopping, None, None, format!("leaving: {why}"));
        }
        let all: HashSet<u32> = self.rules.iter().map(|record| record.activation).collect();
        // Nobody is there to wait for what lanes hold: `remove` sets no time for it while leaving.
        for target in self.targets.values_mut() {
            target.hold = None;
        }
        let healed = self
            .remove(&all, EventKind::RuleHealed, "healed: the daemon leaves")
            .unwrap_or_else(|error| {
                // Taking the programs off heals as well.
                self.problem(None, format!("cannot commit an empty rule set: {error}"));
                let mut stats = Vec::new();
                self.forget(&all, &HashMap::new(), |_, record, counters| {
                    stats.push(Self::rule_stats(record, counters));
                });
                self.detach_unused();
                stats
            });
        if !self.leftovers.is_empty() {
            self.retry_leftovers();
        }
        self.holders.clear();
        DownResult {
            healed,
            host_restored: self.targets.is_empty() && self.leftovers.is_empty(),
            problems: self.problems(),
        }
    }
}

fn new_record(
    rule: Rule,
    places: Vec<Place>,
    slot: RuleSlot,
    activation: u32,
    activated_ns: u64,
    hold: Option<ConnId>,
) -> Record {
    Record {
        asked: rule.describe_selector(),
        rule: Arc::new(rule),
        slot,
        activation,
        activated_ns,
        activated_at: Timestamp::now(),
        places,
        hold,
        base: Tally::default(),
        ended: None,
        doomed: false,
    }
}

/// Reads the rules of a request.
fn parse(specs: &[RuleSpec]) -> Result<Vec<Wanted>, ErrorBody> {
    specs
        .iter()
        .enumerate()
        .map(|(index, spec)| {
            let rule = spec.parse().map_err(|error| {
                let which = match &spec.name {
                    Some(name) => format!("rule {name:?}"),
                    None if specs.len() == 1 => "the rule".to_owned(),
                    None => format!("rule {} of {}", index + 1, specs.len()),
                };
                ErrorBody::new(
                    ErrorCode::Invalid,
                    format!("{which} is wrong: {error}; nothing was changed"),
                )
                .with_hint(error.help(rules::Surface::File))
            })?;
            Ok(Wanted {
                rule,
                seed_given: spec.seed.is_some(),
            })
        })
        .collect()
}

/// One rule of a partition.
fn piece_of(
    piece: Piece,
    args: &PartitionArgs,
    group: &str,
    netns: &NetnsRef,
    lifetime: Option<Duration>,
) -> Result<Wanted, ErrorBody> {
    let rule = Rule {
        name: format!("{group}:{}", piece.suffix),
        name_generated: args.name.is_none(),
        group: Some(group.to_owned()),
        netns: netns.clone(),
        interfaces: piece.interfaces,
        selector: piece.selector,
        fault: Fault::Cut,
        shaping: Shaping::default(),
        lifetime,
        flap: None,
        seed: args.seed.unwrap_or_else(rules::draw_seed),
        key: FlowIdentity::default(),
        all_traffic: false,
        unprotected: false,
    };
    rules::check_name(&rule.name).map_err(|problem| {
        ErrorBody::new(
            ErrorCode::Invalid,
            format!(
                "the name {group:?} is too long for a partition: its rule {:?} {}",
                rule.name, problem.problem
            ),
        )
        .with_hint(problem.help)
    })?;
    Ok(Wanted {
        rule,
        seed_given: args.seed.is_some(),
    })
}

/// The name of a partition that was given none: a hash of what it is.
fn generated_group(args: &PartitionArgs) -> Result<String, ErrorBody> {
    let content = PartitionArgs {
        sides: args.sides.clone(),
        netns: args.netns.clone(),
        ifaces: args.ifaces.clone(),
        one_way: args.one_way,
        lifetime: args.lifetime.clone(),
        ..PartitionArgs::default()
    };
    let text = serde_json::to_vec(&content).map_err(|error| {
        ErrorBody::new(
            ErrorCode::Internal,
            format!("cannot name the partition: {error}"),
        )
    })?;
    let mut hasher = SipHasher24::new();
    hasher.write(&text);
    Ok(format!("partition-{:08x}", hasher.finish() >> 32))
}
