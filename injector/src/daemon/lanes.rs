//! The lanes of namespaces: each from the first rule that needs it until the last packet that it holds has
//! left.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::Duration,
};

use injector_common::{layout::MAX_CANDIDATES, line::PACED_MOST_NS};

use super::{
    host::Host,
    lease::nanos,
    plane::{LaneBounds, LaneDevices, LaneNumber, LaneUse, Plane},
    poll::PERIOD,
    record::{Place, Record},
    state::State,
    targets::TargetKey,
};
use crate::{
    attach::TargetLink,
    lane::{Damage, LaneQueue},
    netlink::{FqLimits, LinkKind},
    netns::{Netns, NetnsId},
    protocol::{ErrorBody, ErrorCode, EventKind, LaneStats},
    rules::{model::Rule, text::duration},
};

/// Packets whose time has come leave within so long, even on a busy machine.
pub(super) const MARGIN: Duration = Duration::from_millis(50);

/// What lanes may hold by rules that have ended. Times are the kernel's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hold {
    /// When the last of these rules was about to end.
    since_ns: u64,
    /// From then on nothing is held.
    pub(super) until_ns: u64,
    /// What the last look has found.
    seen: Seen,
}

/// What a look at lanes finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// Nobody can say what is held, or nobody has looked yet.
    Unsure,
    /// Something is in them.
    Busy,
    /// Nothing is in them, and this many packets have ever left; since when that is so.
    Quiet {
        /// Packets.
        sent: u64,
        /// Since then.
        since_ns: u64,
    },
}

/// For so long a lane stays beyond what rules could hold, while flows that had to wait there go on without a gap: each
/// leaves the lane when nothing of it is under way, and is overtaken by none of its own packets then.
const LINGER: Duration = Duration::from_secs(2);

impl Hold {
    pub(super) const fn new(since_ns: u64, until_ns: u64) -> Self {
        Self {
            since_ns,
            until_ns,
            seen: Seen::Unsure,
        }
    }

    /// When it is over: when the lanes have been quiet for [`MARGIN`], for the last packet that has left the account may
    /// still be on its way back; where that cannot be seen, when nothing can be held.
    pub(super) fn over_ns(&self) -> u64 {
        let latest_ns = self.until_ns.saturating_add(nanos(LINGER));
        match self.seen {
            Seen::Unsure => self.until_ns,
            Seen::Busy => latest_ns,
            Seen::Quiet { since_ns, .. } => since_ns.saturating_add(nanos(MARGIN)).min(latest_ns),
        }
    }

    /// Looks what is held. (Nothing is on its way in: from the hook into the account is one chain of calls, and for such
    /// ones the commit has waited that ended the rules.)
    fn look(&mut self, now_ns: u64, look: impl FnOnce() -> Seen) {
        if now_ns <= self.since_ns {
            return;
        }
        let seen = look();
        let goes_on = matches!(
            (self.seen, seen),
            (Seen::Quiet { sent: before, .. }, Seen::Quiet { sent, .. }) if before == sent
        );
        if !goes_on {
            self.seen = seen;
        }
    }
}

/// One lane.
pub(super) struct LaneRecord<L> {
    /// Our hold on it.
    lane: L,
    /// Where packets enter it.
    devices: LaneDevices,
    /// The namespace in words.
    netns: String,
    /// Its number in the kernel's tables.
    number: LaneNumber,
    /// The limits that its queues have.
    limits: FqLimits,
    /// The limits that the rules in force ask for.
    wanted: FqLimits,
    /// Its load at the last look, if its queues were empty then.
    idle_load: Option<(u64, u64)>,
    /// What somebody else has done to it. Nothing is sent into it any more, until it is made anew.
    damage: Option<Damage>,
    /// Packets that its devices had dropped when its account was right last.
    dropped: u64,
    /// What its counters do not tell of, or not any more.
    lost: Losses,
}

impl<L> LaneRecord<L> {
    /// What is in it, now or in what its flows remember: later packets of a flow leave after one that was lost would have,
    /// and need a queue whose horizon reaches as far. A damaged lane's account need not be right.
    fn look(
        &self,
        now_ns: u64,
        held: &LaneUse,
        is_underway: impl FnOnce() -> bool,
        queue: impl FnOnce() -> Option<LaneQueue>,
    ) -> Seen {
        if self.damage.is_some() || self.lost != Losses::default() || held.full_packets != 0 {
            return Seen::Unsure;
        }
        if held.load != 0 || is_underway() {
            return Seen::Busy;
        }
        match queue() {
            Some(queue) if queue.dropped() != 0 => Seen::Unsure,
            Some(queue) if queue.qdisc.queued_packets != 0 => Seen::Busy,
            Some(queue) => Seen::Quiet {
                sent: queue.qdisc.sent_packets,
                since_ns: now_ns,
            },
            None => Seen::Unsure,
        }
    }
}

/// Packets that a lane has lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Losses {
    /// Those that went missing, and that no counter tells of.
    missing: u64,
    /// Those that it refused while it was full, before it was made anew last.
    full: u64,
    /// Those that its queue dropped until then.
    dropped: u64,
    /// Those that its devices dropped until then.
    devices: u64,
}

/// A lane that was made for rules that are to come.
pub(super) struct MadeLane {
    netns: NetnsId,
    /// What was wrong with the one in whose place it is.
    before: Option<Damage>,
}

/// Packets a second that a lane is to take: more than the CPUs of a large machine send through one.
const PACKETS_PER_SECOND: u64 = 4_000_000;
/// Packets that it is to take at any rate, however short their delay: bursts, and what gathers while the kernel does
/// not come to send.
const BURST: u64 = 16_384;

/// The limits of queues that hold packets for so long, `most` packets at most.
fn limits(hold: Duration, most: u32) -> FqLimits {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let packets = micros(hold)
        .saturating_mul(PACKETS_PER_SECOND / 1_000_000)
        .saturating_add(BURST);
    let horizon = hold.saturating_add(Duration::from_nanos(PACED_MOST_NS));
    FqLimits {
        packets: u32::try_from(packets).unwrap_or(u32::MAX).min(most),
        horizon_us: u32::try_from(micros(horizon)).unwrap_or(u32::MAX),
    }
}

/// The greater of both, one by one.
fn greater(a: FqLimits, b: FqLimits) -> FqLimits {
    FqLimits {
        packets: a.packets.max(b.packets),
        horizon_us: a.horizon_us.max(b.horizon_us),
    }
}

/// Whether a rule's packets go through a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    /// They do not.
    None,
    /// Super-packets do, if there is one: without it a hit inside one, by position, length or TCP flags, takes all of
    /// it.
    Better,
    /// They all do.
    Must,
}

/// Whether a rule's packets go through a lane.
pub(super) fn need(rule: &Rule) -> Need {
    if rule.shaping.needs_lane() {
        Need::Must
    } else if rule.tells_packets_apart() {
        Need::Better
    } else {
        Need::None
    }
}

/// What rules may hold a packet for together: with what a sender may have asked for itself, fq's longest horizon, which
/// is 32 bits of microseconds.
const LONGEST_TOGETHER: Duration =
    Duration::from_micros(u32::MAX as u64 - PACED_MOST_NS.div_ceil(1000));

/// The longest that a packet of a target may be held by these rules: of those that act there, it may meet the ones that
/// hold longest, and their times add up.
fn longest_hold<'a>(rules: impl Iterator<Item = &'a Record>, key: &TargetKey) -> Duration {
    let mut holds: Vec<Duration> = rules
        .filter(|record| record.places.iter().any(|place| place.key == *key))
        .map(|record| record.rule.shaping.longest_hold())
        .collect();
    holds.sort_unstable_by(|a, b| b.cmp(a));
    holds
        .into_iter()
        .take(MAX_CANDIDATES)
        .fold(Duration::ZERO, Duration::saturating_add)
}

impl<P: Plane, H: Host> State<P, H> {
    /// Makes the lanes that new rules need and that are not there, or not whole. Returns those made; after an error
    /// there are none of them.
    pub(super) fn make_lanes(
        &mut self,
        rules: &[(Rule, Vec<Place>)],
        links: &BTreeMap<TargetKey, TargetLink>,
    ) -> Result<Vec<MadeLane>, ErrorBody> {
        let mut wanted: BTreeMap<NetnsId, (Need, &Netns)> = BTreeMap::new();
        for (rule, places) in rules {
            let need = need(rule);
            for place in places {
                let Some(link) = links.get(&place.key) else {
                    continue;
                };
                if link.kind != LinkKind::Ethernet {
                    if need == Need::Must {
                        return Err(no_ethernet(&rule.name, &link.name));
                    }
                    continue;
                }
                let entry = wanted
                    .entry(place.key.netns)
                    .or_insert((Need::None, &link.netns));
                entry.0 = entry.0.max(need);
            }
        }
        wanted.retain(|_, (need, _)| *need != Need::None);
        if !wanted.is_empty() {
            self.find_damage();
        }
        let mut made = Vec::new();
        for (id, (need, netns)) in wanted {
            let before = match self.lanes.get(&id) {
                Some(record) if record.damage.is_none() => continue,
                Some(record) => record.damage,
                None => None,
            };
            match self.make_lane(id, netns) {
                Ok(()) => made.push(MadeLane { netns: id, before }),
                Err(error) if need == Need::Better && error.code != ErrorCode::Limit => {
                    tracing::debug!("no lane, super-packets are cut as a whole: {error}");
                }
                Err(error) => {
                    self.take_back_lanes(made);
                    return Err(ErrorBody {
                        message: format!("{}; nothing was changed", error.message),
                        ..error
                    });
                }
            }
        }
        Ok(made)
    }

    /// Makes the lane of a namespace that has none, or a damaged one.
    fn make_lane(&mut self, id: NetnsId, netns: &Netns) -> Result<(), ErrorBody> {
        let Some(number) = self.free_lane() else {
            return Err(ErrorBody::new(
                ErrorCode::Limit,
                "rules need lanes in more network namespaces than there can be targets",
            )
            .with_hint("start the daemon with more room (`injector daemon --table-targets`)"));
        };
        let lost = self.clear_away(id)?;
        // Its rules come to be in force, and counted, with the commit.
        let limits = limits(Duration::ZERO, self.settings.lanes.packets);
        self.plane.clear_lane(number);
        if self.lanes.is_empty() {
            self.plane.clear_underway();
        }
        let (at_carrier, at_line) = self.plane.lane_programs();
        let (lane, devices) = self
            .host
            .make_lane(netns, at_carrier, at_line, number, limits)?;
        let record = LaneRecord {
            lane,
            devices,
            netns: netns.to_string(),
            number,
            limits,
            wanted: limits,
            idle_load: None,
            damage: None,
            dropped: 0,
            lost,
        };
        self.lanes.insert(id, record);
        Ok(())
    }

    /// Removes what is left of a damaged lane, to make room for a new one; its record stands until there is one.
    /// Returns what was lost in it.
    fn clear_away(&mut self, id: NetnsId) -> Result<Losses, ErrorBody> {
        let Some(record) = self.lanes.get_mut(&id) else {
            return Ok(Losses::default());
        };
        // There are none of a device that was deleted.
        let queue = self.host.lane_stats(&record.lane).unwrap_or_default();
        self.host.remove_lane(&mut record.lane)?;
        let held = self.plane.lane_use(record.number);
        self.plane.clear_lane(record.number);
        let told = queue.dropped().saturating_sub(record.dropped);
        let missing = held.packets.saturating_sub(told);
        record.dropped = 0;
        record.lost.missing += missing;
        record.lost.full += held.full_packets;
        record.lost.dropped += queue.qdisc.dropped_packets;
        record.lost.devices += queue.device_drops;
        if missing > 0 {
            self.events.push(
                EventKind::Problem,
                None,
                None,
                format!(
                    "the damaged lane of network namespace {} held {missing} packets when it was made anew; they are \
                     lost",
                    record.netns
                ),
            );
        }
        Ok(record.lost)
    }

    /// Takes back lanes whose rules did not come to be in force. One in place of a damaged lane goes on in its stead,
    /// as damaged as that was: rules that are in force need it, and do not use it.
    pub(super) fn take_back_lanes(&mut self, made: Vec<MadeLane>) {
        let (anew, fresh): (Vec<_>, Vec<_>) =
            made.into_iter().partition(|made| made.before.is_some());
        for lane in anew {
            if let Some(record) = self.lanes.get_mut(&lane.netns) {
                record.damage = lane.before;
            }
        }
        self.remove_lanes(fresh.into_iter().map(|made| made.netns).collect());
    }

    /// The lowest number that no lane has. There are as many as targets, and slot 0's.
    fn free_lane(&self) -> Option<LaneNumber> {
        let used: BTreeSet<LaneNumber> = self.lanes.values().map(|lane| lane.number).collect();
        (0..=self.plane.limits().targets)
            .map(LaneNumber)
            .find(|number| !used.contains(number))
    }

    /// For how long lanes hold packets by these rules and by those that have ended: a packet meets several rules,
    /// whose delays add up.
    pub(super) fn holds<'a>(
        &self,
        rules: impl Iterator<Item = &'a Record>,
    ) -> BTreeMap<NetnsId, Duration> {
        let now_ns = self.plane.now_ns();
        let mut holds: BTreeMap<NetnsId, Duration> = BTreeMap::new();
        for (key, target) in &self.targets {
            let until_ns = target.hold.map_or(0, |hold| hold.until_ns);
            let left = Duration::from_nanos(until_ns.saturating_sub(now_ns));
            let hold = holds.entry(key.netns).or_default();
            *hold = (*hold).max(left);
        }
        let mut by_rules: BTreeMap<NetnsId, Duration> = BTreeMap::new();
        for record in rules {
            let namespaces: BTreeSet<NetnsId> =
                record.places.iter().map(|place| place.key.netns).collect();
            for netns in namespaces {
                let hold = by_rules.entry(netns).or_default();
                *hold = hold.saturating_add(record.rule.shaping.longest_hold());
            }
        }
        for (netns, by_rules) in by_rules {
            let hold = holds.entry(netns).or_default();
            *hold = (*hold).max(by_rules);
        }
        holds
    }

    /// Makes lanes fit for rules that hold packets for so long, and that are about to be in force: no limit falls.
    pub(super) fn widen_lanes(
        &mut self,
        holds: &BTreeMap<NetnsId, Duration>,
    ) -> Result<(), ErrorBody> {
        for (id, record) in &mut self.lanes {
            if record.damage.is_some() {
                continue;
            }
            let hold = holds.get(id).copied().unwrap_or_default();
            record.wanted = greater(record.wanted, limits(hold, self.settings.lanes.packets));
            let grown = greater(record.limits, record.wanted);
            if grown != record.limits {
                self.host.limit_lane(&record.lane, grown)?;
                record.limits = grown;
            }
            let bounds = LaneBounds {
                packets: record.wanted.packets,
                bytes: self.settings.lanes.bytes,
            };
            self.plane.bound_lane(record.number, bounds);
        }
        Ok(())
    }

    /// Limits lanes to what the rules that are in force now need. Their queues' own limits follow when what they
    /// hold fits ([`Self::look_at_lanes`]): a queue drops what does not.
    pub(super) fn narrow_lanes(&mut self, holds: &BTreeMap<NetnsId, Duration>) {
        for (id, record) in &mut self.lanes {
            let hold = holds.get(id).copied().unwrap_or_default();
            record.wanted = limits(hold, self.settings.lanes.packets);
            let bounds = LaneBounds {
                packets: record.wanted.packets,
                bytes: self.settings.lanes.bytes,
            };
            self.plane.bound_lane(record.number, bounds);
        }
    }

    /// Sends nothing into lanes any more that somebody else has damaged: packets pass there, instead of being lost,
    /// and rules that need the lane do not act, until it is made anew for the next rule.
    fn find_damage(&mut self) {
        let mut found = Vec::new();
        for (id, record) in &mut self.lanes {
            if record.damage.is_some() {
                continue;
            }
            // What is listed while other devices of the namespace come and go can lack some of it: no damage that a
            // second look does not find.
            let damage = self
                .host
                .lane_damage(&record.lane)
                .and_then(|first| first.map_or(Ok(None), |_| self.host.lane_damage(&record.lane)));
            match damage {
                Ok(None) => {}
                Ok(Some(damage)) => {
                    record.damage = Some(damage);
                    found.push((
                        *id,
                        format!("the lane of network namespace {}: {damage}", record.netns),
                    ));
                }
                Err(error) => tracing::warn!("cannot look at a lane: {error}"),
            }
        }
        if found.is_empty() {
            return;
        }
        let protection = self.protection.clone();
        let committed = self.commit(&HashSet::new(), &[], &protection);
        for (id, what) in found {
            let message = match &committed {
                Ok(()) => format!(
                    "{what}; what it held may be lost, and delays, loss and other faults that need it do not act \
                     there until a rule with such a fault is added or applied"
                ),
                Err(error) => {
                    // The next look finds it again.
                    if let Some(record) = self.lanes.get_mut(&id) {
                        record.damage = None;
                    }
                    format!("{what}, and packets cannot be kept out of it, will try again: {error}")
                }
            };
            self.problem(None, message);
        }
    }

    /// What keeps a rule that needs a lane from acting at a target.
    pub(super) fn lane_problem(&self, rule: &Rule, key: &TargetKey) -> Option<String> {
        if need(rule) != Need::Must {
            return None;
        }
        let damage = self.lanes.get(&key.netns)?.damage?;
        Some(format!("no lane: {damage}"))
    }

    /// Looks whether lanes are sound, lowers the limits of queues where what they hold fits, and puts right what is
    /// held in the account of a lane and is not there: what a device dropped on the way was never taken out of it.
    pub(super) fn look_at_lanes(&mut self) {
        self.find_damage();
        for record in self.lanes.values_mut() {
            let held = self.plane.lane_use(record.number);
            if record.damage.is_none()
                && record.limits != record.wanted
                && held.packets <= u64::from(record.wanted.packets)
            {
                match self.host.limit_lane(&record.lane, record.wanted) {
                    Ok(()) => record.limits = record.wanted,
                    Err(error) => tracing::warn!("cannot limit a lane, will try again: {error}"),
                }
            }
            let before = record.idle_load.take();
            let Ok(queue) = self.host.lane_stats(&record.lane) else {
                continue;
            };
            let dropped = queue.dropped();
            if held.load == 0 {
                record.dropped = dropped;
                continue;
            }
            if queue.qdisc.queued_packets != 0 {
                continue;
            }
            // Not empty on paper at two looks in a row, with nothing in the queues at either: no packet is on its
            // way from or to a queue for so long.
            let now = (held.load, queue.qdisc.sent_packets);
            if before == Some(now) {
                if self.plane.empty_lane(record.number, held.load) {
                    let told = dropped.saturating_sub(record.dropped);
                    record.dropped = dropped;
                    let missing = held.packets.saturating_sub(told);
                    record.lost.missing += missing;
                    if missing > 0 {
                        self.events.push(
                            EventKind::Problem,
                            None,
                            None,
                            format!(
                                "{missing} packets went missing in the lane of network namespace {}, and no counter \
                                 of its devices tells of them; was one of them set down?",
                                record.netns
                            ),
                        );
                    }
                }
            } else {
                record.idle_load = Some(now);
            }
        }
    }

    /// What lanes hold and have dropped. One whose namespace has just gone is not there.
    pub(super) fn lane_stats(&self) -> Vec<LaneStats> {
        self.lanes
            .iter()
            .filter_map(|(netns, record)| {
                let queue = self.host.lane_stats(&record.lane).ok()?;
                // What comes back on ingress passes the CPU's backlog again.
                let backlog_drops = self
                    .targets
                    .iter()
                    .filter(|(key, _)| key.netns == *netns)
                    .filter_map(|(_, target)| {
                        let now = self.host.rx_dropped(&target.link).ok()?;
                        Some(now.saturating_sub(target.rx_dropped))
                    })
                    .sum();
                let held = self.plane.lane_use(record.number);
                Some(LaneStats {
                    netns: record.netns.clone(),
                    queued_packets: queue.qdisc.queued_packets,
                    queued_bytes: queue.qdisc.queued_bytes,
                    capacity_packets: u64::from(record.wanted.packets),
                    memory_bytes: held.bytes,
                    memory_capacity: self.settings.lanes.bytes,
                    full_packets: record.lost.full + held.full_packets,
                    dropped_packets: record.lost.dropped + queue.qdisc.dropped_packets,
                    device_drops: record.lost.devices + queue.device_drops,
                    missing_packets: record.lost.missing,
                    backlog_drops,
                    problem: record.damage.map(|damage| damage.to_string()),
                })
            })
            .collect()
    }

    /// Where packets of a target enter its lane, if some of these namespaces is its.
    pub(super) fn lane_of(
        &self,
        key: &TargetKey,
        needed: &BTreeSet<NetnsId>,
    ) -> Option<LaneDevices> {
        if !needed.contains(&key.netns) {
            return None;
        }
        self.lanes
            .get(&key.netns)
            .filter(|record| record.damage.is_none())
            .map(|record| record.devices)
    }

    /// Remembers until when lanes may hold packets of rules that end.
    pub(super) fn hold_for_ending(&mut self, ending: &HashSet<u32>) {
        if self.leaving {
            return;
        }
        let now_ns = self.plane.now_ns();
        let at: BTreeSet<TargetKey> = self
            .rules
            .iter()
            .filter(|record| record.is_active() && ending.contains(&record.activation))
            .filter(|record| !record.rule.shaping.longest_hold().is_zero())
            .flat_map(|record| record.places.iter().map(|place| place.key))
            .collect();
        for key in at {
            let hold = self.longest_hold_at(&key);
            let until_ns = now_ns.saturating_add(nanos(hold.saturating_add(MARGIN)));
            if let Some(target) = self.targets.get_mut(&key) {
                let before_ns = target.hold.map_or(0, |hold| hold.until_ns);
                target.hold = Some(Hold::new(now_ns, until_ns.max(before_ns)));
            }
        }
    }

    /// Looks what is held by rules that have ended.
    pub(super) fn look_at_holds(&mut self) {
        let now_ns = self.plane.now_ns();
        let mut found: BTreeMap<NetnsId, Seen> = BTreeMap::new();
        let mut look = |netns: &NetnsId| {
            *found.entry(*netns).or_insert_with(|| {
                let Some(record) = self.lanes.get(netns) else {
                    return Seen::Quiet {
                        sent: 0,
                        since_ns: now_ns,
                    };
                };
                let held = self.plane.lane_use(record.number);
                record.look(
                    now_ns,
                    &held,
                    || self.plane.is_underway(),
                    || self.host.lane_stats(&record.lane).ok(),
                )
            })
        };
        for (key, target) in &mut self.targets {
            if let Some(hold) = &mut target.hold {
                hold.look(now_ns, || look(&key.netns));
            }
        }
        for flush in &mut self.flushes {
            flush.hold.look(now_ns, || look(&flush.lane));
        }
    }

    /// The longest that a packet of a target may be held by the rules in force.
    pub(super) fn longest_hold_at(&self, key: &TargetKey) -> Duration {
        longest_hold(self.rules.iter().filter(|record| record.is_active()), key)
    }

    /// Fails where these rules together could hold a packet for longer than fq's horizon can be: fq would drop it.
    pub(super) fn must_be_within_horizon(&self, rules: &[&Record]) -> Result<(), ErrorBody> {
        for (key, target) in &self.targets {
            let hold = longest_hold(rules.iter().copied(), key);
            if hold > LONGEST_TOGETHER {
                return Err(ErrorBody::new(
                    ErrorCode::Limit,
                    format!(
                        "the rules at {} could hold a packet for {} together, and {} is the most; nothing was \
                         changed",
                        target.label(),
                        duration::format(hold),
                        duration::format(LONGEST_TOGETHER)
                    ),
                )
                .with_hint(
                    "shorten delays, queues or stalls (jitter counts eightfold), or heal some of these rules",
                ));
            }
        }
        Ok(())
    }

    /// The namespaces whose lanes are needed: by these rules, or for what is still held.
    pub(super) fn needed_lanes<'a>(
        &self,
        rules: impl Iterator<Item = &'a Record>,
    ) -> BTreeSet<NetnsId> {
        let by_rules = rules
            .filter(|record| need(&record.rule) != Need::None)
            .flat_map(|record| record.places.iter().map(|place| place.key.netns));
        let held = self
            .targets
            .iter()
            .filter(|(_, target)| target.hold.is_some())
            .map(|(key, _)| key.netns);
        by_rules.chain(held).collect()
    }

    /// Removes the lanes that are not needed any more. No rule set in force refers to them.
    pub(super) fn remove_unused_lanes(&mut self) {
        let active = self.rules.iter().filter(|record| record.is_active());
        let needed = self.needed_lanes(active);
        let unused = self
            .lanes
            .keys()
            .filter(|id| !needed.contains(id))
            .copied()
            .collect();
        self.remove_lanes(unused);
    }

    pub(super) fn remove_lanes(&mut self, lanes: Vec<NetnsId>) {
        for id in lanes {
            let Some(mut record) = self.lanes.remove(&id) else {
                continue;
            };
            match self.host.remove_lane(&mut record.lane) {
                Ok(0) => {}
                Ok(lost) => self.events.push(
                    EventKind::Problem,
                    None,
                    None,
                    format!(
                        "the lane of network namespace {} held {lost} packets when it was removed; they are lost",
                        record.netns
                    ),
                ),
                Err(error) => {
                    let message = format!("cannot remove a lane, will try again: {error}");
                    self.events
                        .push(EventKind::Problem, None, None, message);
                    self.lanes.insert(id, record);
                }
            }
        }
    }

    /// When the next target has nothing held any more, by the kernel's monotonic clock.
    pub(super) fn next_release_ns(&self) -> Option<u64> {
        self.targets
            .values()
            .filter_map(|target| target.hold)
            .map(|hold| hold.over_ns())
            .min()
    }

    /// Lets go of what was kept only for packets that have left by now.
    pub(super) fn release_held(&mut self) {
        let now_ns = self.plane.now_ns();
        let mut released = Vec::new();
        for (key, target) in &mut self.targets {
            if target.hold.is_some_and(|hold| hold.over_ns() <= now_ns) {
                target.hold = None;
                released.push(*key);
            }
        }
        if released.is_empty() {
            return;
        }
        let protection = self.protection.clone();
        if let Err(error) = self.commit(&HashSet::new(), &[], &protection) {
            self.problem(
                None,
                format!("cannot let go of lanes, will try again: {error}"),
            );
            let again_ns = self.plane.now_ns().saturating_add(nanos(PERIOD));
            for key in released {
                if let Some(target) = self.targets.get_mut(&key) {
                    target.hold = Some(Hold::new(again_ns, again_ns));
                }
            }
            return;
        }
        self.detach_unused();
    }
}

fn no_ethernet(rule: &str, interface: &str) -> ErrorBody {
    ErrorBody::new(
        ErrorCode::Unsupported,
        format!(
            "rule {rule} needs a lane, and packets of interface {interface} have no Ethernet header, without which \
             they cannot pass it; nothing was changed"
        ),
    )
    .with_hint("give the rule on the Ethernet interface below, selecting by addresses")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_follow_what_is_held() {
        let usual = limits(Duration::ZERO, 1 << 18);
        assert_eq!(u64::from(usual.packets), BURST);
        assert_eq!(usual.horizon_us, 10_000_000);
        let longer = limits(Duration::from_millis(10), 1 << 18);
        assert_eq!(u64::from(longer.packets), BURST + 40_000);
        assert_eq!(longer.horizon_us, 10_010_000);
        // As many as are allowed, and no overflow.
        let long = limits(Duration::from_hours(1), 1000);
        assert_eq!((long.packets, long.horizon_us), (1000, 3_610_000_000));
        let longest = limits(Duration::MAX, u32::MAX);
        assert_eq!((longest.packets, longest.horizon_us), (u32::MAX, u32::MAX));
        assert_eq!(greater(usual, long).packets, usual.packets);
        assert_eq!(greater(usual, long).horizon_us, long.horizon_us);
    }
}
