//! The state machine of the daemon: what rules there are, where they act, and what is said about them.
//! It belongs to one thread, knows no socket and no clock but the kernel's, and is tested without
//! privileges. Changes are in `change`, what happens by itself in `poll`, targets in `targets`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;

use super::{
    events::EventLog,
    flush::Flush,
    host::Host,
    lanes::LaneRecord,
    lease::LeaseView,
    plane::LaneBounds,
    plane::Plane,
    protect::Protection,
    record::{ConnId, Record, Tally, with_times},
    targets::{Leftover, Resting, Target, TargetKey},
};
use crate::{
    netns::NetnsId,
    protocol::{
        AddResult, Call, DaemonInfo, DownResult, ErrorBody, ErrorCode, EventKind, EventsResult,
        HealResult, LeaseStatus, ListResult, PartitionResult, ProtectResult, RuleState, RuleStats,
        RuleStatus, ShowArgs, ShowResult, StatsResult, TargetRef, TargetStats,
    },
    realised::realised,
    rules::RuleSpec,
};

/// What the state machine is told when it is made.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who we are, for clients.
    pub info: DaemonInfo,
    /// Leave so long after the last active rule and held connection have gone.
    pub idle_exit: Option<Duration>,
    /// The state of a flow in which nothing has moved for so long is forgotten.
    pub flow_idle: Duration,
    /// What one lane may hold at most.
    pub lanes: LaneBounds,
}

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    /// The connection.
    pub conn: ConnId,
    /// When its last byte was read, by the kernel's monotonic clock.
    pub received_ns: u64,
}

/// What an operation gives.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
#[expect(
    missing_docs,
    reason = "each is the result of the operation of its name"
)]
pub enum Reply {
    Hello(DaemonInfo),
    Add(AddResult),
    Partition(PartitionResult),
    List(ListResult),
    Stats(StatsResult),
    Show(Box<ShowResult>),
    Heal(HealResult),
    Protect(ProtectResult),
    Events(EventsResult),
    Down(DownResult),
}

/// The daemon's state.
pub struct State<P: Plane, H: Host> {
    pub(super) plane: P,
    pub(super) host: H,
    pub(super) settings: Settings,
    pub(super) lease: LeaseView,
    /// All rules, in the order of their making; ended ones stay until they are healed.
    pub(super) rules: Vec<Record>,
    pub(super) targets: BTreeMap<TargetKey, Target<H::Attachment>>,
    pub(super) leftovers: Vec<Leftover<H::Attachment>>,
    /// Numbers of targets that are not used again yet.
    pub(super) resting: Vec<Resting>,
    pub(super) lanes: BTreeMap<NetnsId, LaneRecord<H::Lane>>,
    pub(super) protection: Protection,
    pub(super) events: EventLog,
    pub(super) epoch: u64,
    /// When the kernel began to act by it.
    pub(super) effective_ns: u64,
    pub(super) next_activation: u32,
    /// Rules that were healed, and whose held packets are being dropped.
    pub(super) flushes: Vec<Flush>,
    /// Connections that hold rules, or did.
    pub(super) holders: BTreeSet<ConnId>,
    pub(super) schedule: super::poll::Schedule,
    /// Everything has been healed and nothing may be added any more.
    pub(super) leaving: bool,
}

impl<P: Plane, H: Host> State<P, H> {
    /// A state without rules.
    pub fn new(
        plane: P,
        host: H,
        settings: Settings,
        lease: LeaseView,
        protection: Protection,
        events: EventLog,
    ) -> Self {
        let schedule = super::poll::Schedule::starting(plane.now_ns());
        Self {
            plane,
            host,
            settings,
            lease,
            rules: Vec::new(),
            targets: BTreeMap::new(),
            leftovers: Vec::new(),
            resting: Vec::new(),
            lanes: BTreeMap::new(),
            protection,
            events,
            epoch: 0,
            effective_ns: 0,
            next_activation: 1,
            flushes: Vec::new(),
            holders: BTreeSet::new(),
            schedule,
            leaving: false,
        }
    }

    /// The data plane.
    pub fn plane(&self) -> &P {
        &self.plane
    }

    /// The events so far.
    pub fn events(&mut self) -> &mut EventLog {
        &mut self.events
    }

    /// Whether `down` was done.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Does what a request asks for.
    ///
    /// # Errors
    /// What the client is told; nothing has changed then.
    pub fn call(&mut self, call: Call, origin: Origin) -> Result<Reply, ErrorBody> {
        let changes = matches!(
            call,
            Call::Add(_) | Call::Apply(_) | Call::Partition(_) | Call::Protect(_) | Call::Heal(_)
        );
        if changes {
            if self.leaving {
                return Err(ErrorBody::new(
                    ErrorCode::ShuttingDown,
                    "the daemon is on its way out; nothing was changed",
                )
                .with_hint("try again: a new daemon will be started"));
            }
            self.schedule.idle_since_ns = self.plane.now_ns();
        }
        // A rule whose time is over is not to be met by a request as if it acted.
        self.expire();
        match call {
            Call::Hello(args) => {
                tracing::debug!(conn = origin.conn, client = args.client, "hello");
                Ok(Reply::Hello(self.settings.info.clone()))
            }
            Call::Add(args) => self.add(args, origin).map(Reply::Add),
            Call::Apply(args) => self.apply(args, origin).map(Reply::Add),
            Call::Partition(args) => self.partition(&args, origin).map(Reply::Partition),
            Call::List(_) => Ok(Reply::List(self.list())),
            Call::Stats(_) => self.stats().map(Reply::Stats),
            Call::Show(args) => self.show(&args).map(Box::new).map(Reply::Show),
            Call::Heal(args) => self.heal(&args, origin).map(Reply::Heal),
            Call::Protect(args) => self.protect(&args).map(Reply::Protect),
            Call::Events(args) => Ok(Reply::Events(self.events.after(args.after))),
            Call::Down(_) => Ok(Reply::Down(self.down("asked to"))),
        }
    }

    /// A rule by name.
    pub(super) fn find(&self, name: &str) -> Option<&Record> {
        self.rules.iter().find(|record| record.rule.name == name)
    }

    pub(super) fn lease_status(&self) -> LeaseStatus {
        self.lease.status(self.plane.now_ns())
    }

    pub(super) fn status(&self, record: &Record) -> RuleStatus {
        let now_ns = self.plane.now_ns();
        let targets = record
            .places
            .iter()
            .map(|place| {
                let target = self.targets.get(&place.key).filter(|_| record.is_active());
                TargetRef {
                    netns: place.netns.clone(),
                    iface: place.iface.clone(),
                    ifindex: place.key.ifindex,
                    attached: target.is_some_and(Target::is_attached),
                    problem: place
                        .problem
                        .clone()
                        .or_else(|| target?.problem.clone())
                        .or_else(|| target.and(self.lane_problem(&record.rule, &place.key))),
                }
            })
            .collect();
        RuleStatus {
            spec: RuleSpec::from(&*record.rule),
            state: record
                .ended
                .as_ref()
                .map_or(RuleState::Active, |ended| ended.state),
            state_reason: record.ended.as_ref().map(|ended| ended.reason.clone()),
            targets,
            activated_at: record.activated_at,
            expires_at: record.expires_at(),
            remaining: record
                .expires_ns()
                .map(|at| Duration::from_nanos(at.saturating_sub(now_ns)).as_secs_f64()),
            activation: record.activation,
            held: record.hold.is_some(),
            unprotected: record.rule.unprotected,
        }
    }

    fn list(&self) -> ListResult {
        ListResult {
            rules: self
                .rules
                .iter()
                .map(|record| self.status(record))
                .collect(),
            protected: self.protection.entries(),
            lease: self.lease_status(),
            daemon: self.settings.info.clone(),
            epoch: self.epoch,
        }
    }

    /// A rule's counters: the kernel's while it is active, the last ones after it.
    pub(super) fn counters(&self, record: &Record) -> Result<Tally, ErrorBody> {
        if let Some(ended) = &record.ended {
            return Ok(ended.counters.clone());
        }
        let now_ns = self.plane.now_ns();
        let mut tally = record.base.clone();
        let histograms = record
            .rule
            .shaping
            .needs_lane()
            .then(|| self.plane.rule_histograms(record.slot));
        tally.add(&self.plane.rule_counters(record.slot)?, histograms);
        for counters in &mut tally.counters {
            *counters = with_times(*counters, now_ns);
        }
        Ok(tally)
    }

    pub(super) fn rule_stats(record: &Record, tally: &Tally) -> RuleStats {
        let [egress, ingress] = tally.counters;
        RuleStats {
            name: record.rule.name.clone(),
            group: record.rule.group.clone(),
            state: record
                .ended
                .as_ref()
                .map_or(RuleState::Active, |ended| ended.state),
            fault: record.rule.describe_faults(),
            asked: record.asked.clone(),
            egress,
            ingress,
            realised: {
                let mut both = egress;
                both += ingress;
                realised(&record.rule.shaping, &both, tally.histograms.as_deref())
            },
        }
    }

    fn target_stats(
        &self,
        key: &TargetKey,
        target: &Target<H::Attachment>,
    ) -> Result<TargetStats, ErrorBody> {
        let [egress, ingress] = self.plane.target_counters(target.slot)?;
        let rules = self
            .rules
            .iter()
            .filter(|record| record.is_active())
            .filter(|record| record.places.iter().any(|place| place.key == *key))
            .map(|record| record.rule.name.clone())
            .collect();
        Ok(TargetStats {
            netns: crate::rules::text::netns::format(&target.link.netns.reference),
            iface: target.link.name.clone(),
            ifindex: target.link.index,
            attached: target.is_attached(),
            problem: target.problem.clone(),
            obstacles: self.obstacles(key),
            rules,
            egress,
            ingress,
        })
    }

    fn stats(&self) -> Result<StatsResult, ErrorBody> {
        Ok(StatsResult {
            at: Timestamp::now(),
            rules: self
                .rules
                .iter()
                .map(|record| Ok(Self::rule_stats(record, &self.counters(record)?)))
                .collect::<Result<_, ErrorBody>>()?,
            targets: self
                .targets
                .iter()
                .map(|(key, target)| self.target_stats(key, target))
                .collect::<Result<_, _>>()?,
            tables: self.plane.tables()?,
            lanes: self.lane_stats(),
            lane_losses: self.plane.lane_losses()?,
            flushes: self.flush_status(&self.flushes)?,
            lapses: self.lease.lapses(),
            lease: self.lease_status(),
        })
    }

    fn show(&self, args: &ShowArgs) -> Result<ShowResult, ErrorBody> {
        let record = self.find(&args.name).ok_or_else(|| {
            let hint = if self
                .rules
                .iter()
                .any(|r| r.rule.group.as_ref() == Some(&args.name))
            {
                "it is the name of a group; `injector list` shows the names of its rules"
            } else {
                "`injector list` shows the rules that there are"
            };
            ErrorBody::new(
                ErrorCode::NotFound,
                format!("there is no rule named {:?}", args.name),
            )
            .with_hint(hint)
        })?;
        Ok(ShowResult {
            rule: self.status(record),
            stats: Self::rule_stats(record, &self.counters(record)?),
            targets: record
                .places
                .iter()
                .filter(|_| record.is_active())
                .filter_map(|place| {
                    self.targets
                        .get(&place.key)
                        .map(|target| self.target_stats(&place.key, target))
                })
                .collect::<Result<_, _>>()?,
            protected: if record.rule.unprotected {
                Vec::new()
            } else {
                self.protection.entries()
            },
        })
    }

    /// What of ours is still on the host although it should not be.
    pub(super) fn problems(&self) -> Vec<String> {
        self.leftovers
            .iter()
            .map(|leftover| format!("{}: {}", leftover.label, leftover.error))
            .collect()
    }

    /// Tells of something that went wrong in passing.
    pub(super) fn problem(&mut self, rule: Option<&str>, message: String) {
        self.events.push(EventKind::Problem, rule, None, message);
    }
}
