//! The lanes of namespaces: each from the first rule that needs it until the last packet that it holds has
//! left.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::Duration,
};

use super::{
    host::Host,
    lease::nanos,
    plane::{LaneDevices, Plane},
    record::{Place, Record},
    state::State,
    targets::TargetKey,
};
use crate::{
    attach::TargetLink,
    netlink::LinkKind,
    netns::{Netns, NetnsId},
    protocol::{ErrorBody, ErrorCode, EventKind, LaneStats},
    rules::model::{Fault, Rule},
};

/// Packets whose time has come leave within so long, even on a busy machine.
const MARGIN: Duration = Duration::from_millis(50);

/// One lane.
pub(super) struct LaneRecord<L> {
    /// Our hold on it.
    lane: L,
    /// Where packets enter it.
    devices: LaneDevices,
    /// The namespace in words.
    netns: String,
}

/// Whether a rule's packets go through a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    /// They do not.
    None,
    /// Super-packets do, if there is one: without it a hit inside one, by position or length, takes all of it.
    Better,
    /// They all do.
    Must,
}

/// Whether a rule's packets go through a lane.
pub(super) fn need(rule: &Rule) -> Need {
    if rule.shaping.needs_lane() {
        Need::Must
    } else if rule.shaping.is_empty() && matches!(rule.fault, Fault::Cut | Fault::None) {
        Need::None
    } else {
        Need::Better
    }
}

impl<P: Plane, H: Host> State<P, H> {
    /// Makes the lanes that new rules need and that are not there. Returns those made; after an error there are
    /// none of them.
    pub(super) fn make_lanes(
        &mut self,
        rules: &[(Rule, Vec<Place>)],
        links: &BTreeMap<TargetKey, TargetLink>,
    ) -> Result<Vec<NetnsId>, ErrorBody> {
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
        let mut made = Vec::new();
        for (id, (need, netns)) in wanted {
            if need == Need::None || self.lanes.contains_key(&id) {
                continue;
            }
            let (at_carrier, at_line) = self.plane.lane_programs();
            match self.host.make_lane(netns, at_carrier, at_line) {
                Ok((lane, devices)) => {
                    let record = LaneRecord {
                        lane,
                        devices,
                        netns: netns.to_string(),
                    };
                    self.lanes.insert(id, record);
                    made.push(id);
                }
                Err(error) if need == Need::Better => {
                    tracing::debug!("no lane, super-packets are cut as a whole: {error}");
                }
                Err(error) => {
                    self.remove_lanes(made);
                    return Err(ErrorBody {
                        message: format!("{}; nothing was changed", error.message),
                        ..error
                    });
                }
            }
        }
        Ok(made)
    }

    /// What lanes hold and have dropped.
    pub(super) fn lane_stats(&self) -> Result<Vec<LaneStats>, ErrorBody> {
        self.lanes
            .values()
            .map(|record| {
                let queue = self.host.lane_stats(&record.lane)?;
                Ok(LaneStats {
                    netns: record.netns.clone(),
                    queued_packets: queue.qdisc.queued_packets,
                    queued_bytes: queue.qdisc.queued_bytes,
                    capacity_packets: queue.capacity_packets,
                    dropped_packets: queue.qdisc.dropped_packets,
                    device_drops: queue.device_drops,
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
        self.lanes.get(&key.netns).map(|record| record.devices)
    }

    /// Remembers until when lanes may hold packets of rules that end.
    pub(super) fn hold_for_ending(&mut self, ending: &HashSet<u32>) {
        if self.leaving {
            return;
        }
        let now_ns = self.plane.now_ns();
        for record in &self.rules {
            if !record.is_active() || !ending.contains(&record.activation) {
                continue;
            }
            let hold = record.rule.shaping.longest_hold();
            if hold.is_zero() {
                continue;
            }
            let until_ns = now_ns.saturating_add(nanos(hold.saturating_add(MARGIN)));
            for place in &record.places {
                if let Some(target) = self.targets.get_mut(&place.key) {
                    target.held_until_ns = target.held_until_ns.max(until_ns);
                }
            }
        }
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
            .filter(|(_, target)| target.held_until_ns != 0)
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
            .map(|target| target.held_until_ns)
            .filter(|until| *until != 0)
            .min()
    }

    /// Lets go of what was kept only for packets that have left by now.
    pub(super) fn release_held(&mut self) {
        let now_ns = self.plane.now_ns();
        let mut released = false;
        for target in self.targets.values_mut() {
            if target.held_until_ns != 0 && target.held_until_ns <= now_ns {
                target.held_until_ns = 0;
                released = true;
            }
        }
        if !released {
            return;
        }
        let protection = self.protection.clone();
        if let Err(error) = self.commit(&HashSet::new(), &[], &protection) {
            self.problem(None, format!("cannot let go of lanes: {error}"));
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
