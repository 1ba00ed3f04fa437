//! The state machine against a data plane and a host that exist in memory only.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use injector_common::layout::lane_load;
use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::json;

use super::{
    events::EventLog,
    host::{Host, Topology},
    lanes::MARGIN,
    lease::LeaseView,
    plane::{
        ActiveRule, Committed, Exemption, Histograms, LaneBounds, LaneDevices, LaneNumber, LaneUse,
        LeaseSwitch, Limits, Plane, RuleSlot, TargetConfig, TargetSlot,
    },
    protect::Protection,
    state::{Origin, Reply, Settings, State},
};
use crate::{
    attach::{Obstacle, Presence, TargetLink},
    lane::{Damage, LaneQueue},
    netlink::{FqLimits, Hook, Link, LinkKind, LinkStats, Route},
    netns::{Netns, NetnsId},
    protocol::{
        AddResult, Call, DaemonInfo, ErrorBody, ErrorCode, Event, EventKind, LaneLosses,
        ListResult, Request, RuleCounters, RuleState, StatsResult, TableUse, TargetCounters,
    },
    rules::model::NetnsRef,
};

const SECOND: u64 = 1_000_000_000;

/// Everything that the fakes know, for the test to look at and to change.
#[derive(Default)]
struct World {
    now_ns: u64,
    /// Interface indices by namespace inode and name.
    interfaces: BTreeMap<(u64, String), u32>,
    /// What is attached: namespace inode and index, with slot.
    attached: BTreeMap<(u64, u32), TargetSlot>,
    /// Interfaces on which attaching fails.
    refuse_attach: BTreeSet<String>,
    dropped: BTreeMap<u32, u64>,
    refuse_detach: bool,
    refuse_commit: bool,
    gone: BTreeSet<u32>,
    filter_removed: BTreeSet<u32>,
    obstacles: Vec<Obstacle>,
    topology: Topology,
    /// The last commit.
    targets: Vec<TargetConfig>,
    rules: Vec<ActiveRule>,
    exemptions: Vec<Exemption>,
    epoch: u64,
    counters: BTreeMap<RuleSlot, RuleCounters>,
    rule_limit: u16,
    /// Rules that are being flushed, by activation, and what was dropped.
    flushing: BTreeMap<u32, [u64; 2]>,
    refuse_flush: bool,
    /// Namespaces with lanes, by inode.
    lanes: BTreeSet<u64>,
    /// What somebody has done to every lane.
    lane_damage: Option<Damage>,
    /// What the queues of every lane have dropped.
    queue_drops: u64,
    /// Why no lane can be made.
    refuse_lane: Option<ErrorCode>,
    /// What lanes may hold.
    bounds: BTreeMap<LaneNumber, LaneBounds>,
    /// The load of the first lane.
    load: u64,
    /// The load of every other one.
    second_load: u64,
    /// Packets that every lane refused since it was made.
    full_packets: u64,
    /// Packets on their way back from lanes.
    underway: u64,
    /// Packets in the queues of every lane.
    queued: u64,
    /// Packets that the queues of every lane have sent.
    sent: u64,
    /// Limits of the queues of the lane made or limited last.
    queue_limits: Option<FqLimits>,
}

impl World {
    fn load_of(&mut self, lane: LaneNumber) -> &mut u64 {
        if lane == LaneNumber(0) {
            &mut self.load
        } else {
            &mut self.second_load
        }
    }
}

#[derive(Clone)]
struct Shared(Arc<Mutex<World>>);

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

struct FakePlane(Shared, File);

impl Plane for FakePlane {
    fn limits(&self) -> Limits {
        Limits {
            rules: self.0.world().rule_limit,
            targets: 3,
            exemptions: 128,
        }
    }
    fn program(&self, _: Hook) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
    fn lane_programs(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.1.as_fd(), self.1.as_fd())
    }
    fn now_ns(&self) -> u64 {
        self.0.world().now_ns
    }
    fn lease(&self) -> Result<Box<dyn LeaseSwitch>, ErrorBody> {
        Err(ErrorBody::new(
            ErrorCode::Internal,
            "no lease in these tests",
        ))
    }
    fn commit(
        &mut self,
        targets: &[TargetConfig],
        rules: &[ActiveRule],
        exempt: &[Exemption],
    ) -> Result<Committed, ErrorBody> {
        let mut world = self.0.world();
        if world.refuse_commit {
            return Err(ErrorBody::new(ErrorCode::Limit, "the tables are too small"));
        }
        let slots: BTreeSet<RuleSlot> = rules.iter().map(|rule| rule.slot).collect();
        assert_eq!(slots.len(), rules.len(), "a slot is used twice");
        let known: BTreeSet<TargetSlot> = targets.iter().map(|target| target.slot).collect();
        assert!(
            rules
                .iter()
                .all(|rule| rule.targets.iter().all(|slot| known.contains(slot)))
        );
        world.targets = targets.to_vec();
        world.rules = rules.to_vec();
        world.exemptions = exempt.to_vec();
        world.epoch += 1;
        Ok(Committed { epoch: world.epoch })
    }
    fn rule_counters(&self, slot: RuleSlot) -> Result<[RuleCounters; 2], ErrorBody> {
        let world = self.0.world();
        Ok([
            world.counters.get(&slot).copied().unwrap_or_default(),
            RuleCounters::default(),
        ])
    }
    fn rule_histograms(&self, _: RuleSlot) -> Box<Histograms> {
        Box::default()
    }
    fn target_counters(&self, _: TargetSlot) -> Result<[TargetCounters; 2], ErrorBody> {
        Ok([
            TargetCounters {
                seen_packets: 7,
                ..Default::default()
            },
            TargetCounters::default(),
        ])
    }
    fn clear_rule(&mut self, slot: RuleSlot) -> Result<(), ErrorBody> {
        self.0.world().counters.remove(&slot);
        Ok(())
    }
    fn clear_target(&mut self, _: TargetSlot) -> Result<(), ErrorBody> {
        Ok(())
    }
    fn collect(&mut self, _: Duration) -> Result<u64, ErrorBody> {
        Ok(0)
    }
    fn clear_lane(&mut self, lane: LaneNumber) {
        let mut world = self.0.world();
        world.bounds.remove(&lane);
        world.load = 0;
        world.full_packets = 0;
    }
    fn clear_underway(&mut self) {
        assert!(self.0.world().lanes.is_empty(), "packets are in lanes");
    }
    fn is_underway(&self) -> bool {
        self.0.world().underway != 0
    }
    fn bound_lane(&mut self, lane: LaneNumber, bounds: LaneBounds) {
        self.0.world().bounds.insert(lane, bounds);
    }
    fn lane_use(&self, lane: LaneNumber) -> LaneUse {
        let mut world = self.0.world();
        let load = *world.load_of(lane);
        LaneUse {
            packets: lane_load::packets(load),
            bytes: lane_load::bytes(load),
            full_packets: world.full_packets,
            load,
        }
    }
    fn empty_lane(&mut self, lane: LaneNumber, seen: u64) -> bool {
        let mut world = self.0.world();
        let load = world.load_of(lane);
        let same = *load == seen;
        if same {
            *load = 0;
        }
        same
    }
    fn lane_losses(&self) -> Result<LaneLosses, ErrorBody> {
        Ok(LaneLosses::default())
    }
    fn begin_flush(&mut self, activations: &[u32]) -> Result<(), ErrorBody> {
        let mut world = self.0.world();
        if world.refuse_flush {
            return Err(ErrorBody::new(ErrorCode::Limit, "too many at once"));
        }
        world
            .flushing
            .extend(activations.iter().map(|one| (*one, [0, 0])));
        Ok(())
    }
    fn end_flush(&mut self, activations: &[u32]) -> Result<(), ErrorBody> {
        for activation in activations {
            assert!(self.0.world().flushing.remove(activation).is_some());
        }
        Ok(())
    }
    fn flushed(&self, activation: u32) -> Result<[u64; 2], ErrorBody> {
        Ok(self.0.world().flushing[&activation])
    }
    fn tables(&self) -> Result<Vec<TableUse>, ErrorBody> {
        Ok(Vec::new())
    }
}

struct FakeHost(Shared);

impl Host for FakeHost {
    type Attachment = TargetLink;
    /// Its namespace's inode.
    type Lane = u64;

    fn resolve(&self, reference: &NetnsRef) -> Result<Netns, ErrorBody> {
        // `a` and /run/netns/a are the same one.
        let ino = match reference {
            NetnsRef::Own => 1,
            NetnsRef::Name(name) if name == "a" => 2,
            NetnsRef::Path(path) if path.ends_with("a") => 2,
            _ => {
                return Err(ErrorBody::new(
                    ErrorCode::Target,
                    "there is no such namespace",
                ));
            }
        };
        Ok(Netns {
            reference: reference.clone(),
            id: NetnsId {
                dev: 4,
                ino,
                cookie: ino,
            },
            path: PathBuf::from("/nowhere"),
        })
    }
    fn inspect(&self, netns: &Netns, interface: &str) -> Result<TargetLink, ErrorBody> {
        let world = self.0.world();
        let index = world
            .interfaces
            .get(&(netns.id.ino, interface.to_owned()))
            .ok_or_else(|| {
                ErrorBody::new(
                    ErrorCode::Target,
                    format!("there is no interface {interface}"),
                )
            })?;
        Ok(TargetLink {
            netns: netns.clone(),
            index: *index,
            name: interface.to_owned(),
            kind: LinkKind::Ethernet,
            loopback: interface == "lo",
        })
    }
    fn topology(&self, _: &Netns) -> Result<Topology, ErrorBody> {
        Ok(self.0.world().topology.clone())
    }
    fn attach(
        &self,
        link: &TargetLink,
        _: BorrowedFd<'_>,
        _: BorrowedFd<'_>,
        slot: TargetSlot,
    ) -> Result<TargetLink, ErrorBody> {
        let mut world = self.0.world();
        if world.refuse_attach.contains(&link.name) {
            return Err(ErrorBody::new(
                ErrorCode::Host,
                format!("cannot attach to {}", link.name),
            ));
        }
        let before = world.attached.insert((link.netns.id.ino, link.index), slot);
        assert_eq!(before, None, "attached twice to {}", link.name);
        Ok(link.clone())
    }
    fn dropped(&self, attachment: &TargetLink) -> u64 {
        self.0
            .world()
            .dropped
            .get(&attachment.index)
            .copied()
            .unwrap_or(0)
    }
    fn verify(&self, attachment: &TargetLink) -> Result<Presence, ErrorBody> {
        let world = self.0.world();
        Ok(if world.gone.contains(&attachment.index) {
            Presence::InterfaceGone
        } else if world.filter_removed.contains(&attachment.index) {
            Presence::FilterRemoved {
                hook: Hook::Ingress,
            }
        } else {
            Presence::Present
        })
    }
    fn ahead(&self, _: &TargetLink) -> Result<Vec<Obstacle>, ErrorBody> {
        Ok(self.0.world().obstacles.clone())
    }
    fn detach(&self, attachment: &mut TargetLink) -> Result<Vec<String>, ErrorBody> {
        let mut world = self.0.world();
        if world.refuse_detach {
            return Err(ErrorBody::new(
                ErrorCode::Host,
                "the kernel is in a bad mood",
            ));
        }
        world
            .attached
            .remove(&(attachment.netns.id.ino, attachment.index));
        Ok(Vec::new())
    }
    fn make_lane(
        &self,
        netns: &Netns,
        _: BorrowedFd<'_>,
        _: BorrowedFd<'_>,
        _: LaneNumber,
        limits: FqLimits,
    ) -> Result<(u64, LaneDevices), ErrorBody> {
        let mut world = self.0.world();
        if let Some(code) = world.refuse_lane {
            return Err(ErrorBody::new(code, "there is no fq"));
        }
        assert!(world.lanes.insert(netns.id.ino), "there is a lane already");
        world.lane_damage = None;
        world.queue_limits = Some(limits);
        Ok((
            netns.id.ino,
            LaneDevices {
                segmenter: 100,
                line: 101,
            },
        ))
    }
    fn rx_dropped(&self, _: &TargetLink) -> Result<u64, ErrorBody> {
        Ok(0)
    }
    fn limit_lane(&self, _: &u64, limits: FqLimits) -> Result<(), ErrorBody> {
        self.0.world().queue_limits = Some(limits);
        Ok(())
    }
    fn lane_damage(&self, _: &u64) -> Result<Option<Damage>, ErrorBody> {
        Ok(self.0.world().lane_damage)
    }
    fn lane_stats(&self, _: &u64) -> Result<LaneQueue, ErrorBody> {
        let mut queue = LaneQueue::default();
        queue.qdisc.dropped_packets = self.0.world().queue_drops;
        queue.qdisc.queued_packets = self.0.world().queued;
        queue.qdisc.sent_packets = self.0.world().sent;
        Ok(queue)
    }
    fn remove_lane(&self, lane: &mut u64) -> Result<u64, ErrorBody> {
        self.0.world().lanes.remove(lane);
        Ok(0)
    }
    fn double_pass(&self, targets: &[(Netns, u32)]) -> Vec<String> {
        vec![format!("{} targets", targets.len())]
    }
}

/// A daemon's state with its world.
struct Bench {
    state: State<FakePlane, FakeHost>,
    shared: Shared,
}

fn bench() -> Bench {
    let mut world = World {
        now_ns: 1000 * SECOND,
        rule_limit: 4,
        ..World::default()
    };
    for (ino, name, index) in [
        (1, "eth0", 2),
        (1, "eth1", 3),
        (1, "eth2", 4),
        (1, "eth3", 5),
        (2, "eth0", 2),
    ] {
        world.interfaces.insert((ino, name.to_owned()), index);
    }
    let shared = Shared(Arc::new(Mutex::new(world)));
    let settings = Settings {
        info: DaemonInfo {
            pid: 1,
            version: "0".into(),
            protocol: 1,
            started: Timestamp::now(),
            state_dir: PathBuf::from("/nowhere"),
        },
        idle_exit: Some(Duration::from_mins(1)),
        flow_idle: Duration::from_mins(5),
        lanes: LaneBounds {
            packets: 100_000,
            bytes: 1 << 20,
        },
    };
    let state = State::new(
        FakePlane(shared.clone(), File::open("/dev/null").unwrap()),
        FakeHost(shared.clone()),
        settings,
        LeaseView::new(Duration::from_secs(10)),
        Protection::default(),
        EventLog::default(),
    );
    Bench { state, shared }
}

impl Bench {
    fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world()
    }

    /// Has an operation done, as connection 1.
    fn ask(&mut self, op: &str, args: &serde_json::Value) -> Result<Reply, ErrorBody> {
        self.ask_as(1, op, args)
    }

    fn ask_as(
        &mut self,
        conn: u64,
        op: &str,
        args: &serde_json::Value,
    ) -> Result<Reply, ErrorBody> {
        let line = json!({"v": 1, "id": 1, "op": op, "args": args}).to_string();
        let call: Call = Request::parse(line.as_bytes()).unwrap().call;
        let received_ns = self.world().now_ns;
        self.state.call(call, Origin { conn, received_ns })
    }

    fn add(&mut self, rules: &serde_json::Value) -> AddResult {
        match self.ask("add", &json!({"rules": rules})).unwrap() {
            Reply::Add(result) => result,
            other => panic!("{other:?}"),
        }
    }

    fn apply(&mut self, mode: &str, rules: &serde_json::Value) -> AddResult {
        match self
            .ask("apply", &json!({"rules": rules, "mode": mode}))
            .unwrap()
        {
            Reply::Add(result) => result,
            other => panic!("{other:?}"),
        }
    }

    fn list(&mut self) -> ListResult {
        match self.ask("list", &json!({})).unwrap() {
            Reply::List(result) => result,
            other => panic!("{other:?}"),
        }
    }

    fn stats(&mut self) -> StatsResult {
        match self.ask("stats", &json!({})).unwrap() {
            Reply::Stats(result) => result,
            other => panic!("{other:?}"),
        }
    }

    fn heal(&mut self, names: &[&str]) -> crate::protocol::HealResult {
        match self.ask("heal", &json!({"names": names})).unwrap() {
            Reply::Heal(result) => result,
            other => panic!("{other:?}"),
        }
    }

    /// Time passes, and what is due happens.
    fn pass(&mut self, seconds: u64) -> super::Tick {
        self.world().now_ns += seconds * SECOND;
        self.state.tick()
    }

    fn names(&mut self) -> Vec<String> {
        self.list()
            .rules
            .into_iter()
            .filter_map(|rule| rule.spec.name)
            .collect()
    }

    fn events(&mut self, kind: EventKind) -> Vec<Event> {
        self.state
            .events()
            .after(0)
            .events
            .into_iter()
            .filter(|e| e.kind == kind)
            .collect()
    }

    /// The activations that act in the kernel, by rule name.
    fn acting(&self) -> BTreeMap<String, u32> {
        self.world()
            .rules
            .iter()
            .map(|r| (r.rule.name.clone(), r.activation))
            .collect()
    }
}

fn rule(name: &str, iface: &str) -> serde_json::Value {
    json!({"name": name, "iface": [iface], "peer": ["10.0.0.1"], "fault": {"cut": true}})
}

#[test]
fn a_target_is_attached_with_its_first_rule_and_detached_with_its_last() {
    let mut bench = bench();
    let added = bench.add(&json!([rule("one", "eth0"), rule("two", "eth0")]));
    assert_eq!(added.rules.len(), 2);
    assert!(added.rules[0].targets[0].attached);
    assert_eq!(added.epoch, 1);
    assert_eq!(bench.world().attached.len(), 1);
    assert!(!bench.heal(&["one"]).host_restored);
    assert_eq!(bench.world().attached.len(), 1);
    assert_eq!(bench.acting().len(), 1);
    assert!(bench.heal(&["two"]).host_restored);
    assert!(bench.world().attached.is_empty());
    assert!(bench.acting().is_empty());
    assert_eq!(bench.events(EventKind::TargetAttached).len(), 1);
    assert_eq!(bench.events(EventKind::TargetDetached).len(), 1);
}

#[test]
fn what_the_kernel_drops_while_attaching_is_told() {
    let mut bench = bench();
    bench.world().dropped.insert(2, 7);
    bench.add(&json!([rule("one", "eth0")]));
    let told = &bench.events(EventKind::TargetAttached)[0].message;
    assert!(told.contains("dropped 7 packets"), "{told}");
}

#[test]
fn a_namespace_under_two_names_is_one_target() {
    let mut bench = bench();
    let mut by_name = rule("name", "eth0");
    by_name["netns"] = json!("a");
    let mut by_path = rule("path", "eth0");
    by_path["netns"] = json!("/run/netns/a");
    bench.add(&json!([rule("own", "eth0"), by_name, by_path]));
    assert_eq!(bench.world().attached.len(), 2);
    let rules = bench.world().rules.clone();
    assert_ne!(rules[0].targets, rules[1].targets);
    assert_eq!(rules[1].targets, rules[2].targets);
}

#[test]
fn one_wrong_rule_adds_none() {
    let mut bench = bench();
    for (second, code) in [
        (rule("two", "eth9"), ErrorCode::Target),
        (
            json!({"name": "two", "iface": ["eth1"], "fault": {"cut": true}}),
            ErrorCode::Invalid,
        ),
        (rule("one", "eth1"), ErrorCode::Invalid),
        (
            json!({"name": "two", "netns": "b", "iface": ["eth0"], "peer": ["10.0.0.1"],
                   "fault": {"cut": true}}),
            ErrorCode::Target,
        ),
    ] {
        let error = bench
            .ask("add", &json!({"rules": [rule("one", "eth0"), second]}))
            .unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains("nothing was changed"), "{error}");
        assert!(bench.world().attached.is_empty());
        assert_eq!(bench.names(), Vec::<String>::new());
    }
}

#[test]
fn a_failure_to_attach_takes_the_other_targets_back() {
    let mut bench = bench();
    bench.add(&json!([rule("old", "eth0")]));
    bench.world().refuse_attach.insert("eth2".into());
    let rules = json!([rule("a", "eth0"), rule("b", "eth1"), rule("c", "eth2")]);
    let error = bench.ask("add", &json!({"rules": rules})).unwrap_err();
    assert!(error.message.contains("eth2"), "{error}");
    assert_eq!(bench.world().attached.len(), 1);
    assert_eq!(bench.names(), ["old"]);
    assert_eq!(bench.world().epoch, 1);
}

#[test]
fn a_failure_to_commit_takes_everything_back() {
    let mut bench = bench();
    bench.add(&json!([rule("old", "eth0")]));
    bench.world().refuse_commit = true;
    let error = bench
        .ask(
            "add",
            &json!({"rules": [rule("old", "eth1"), rule("b", "eth1")], "replace": true}),
        )
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::Limit);
    assert_eq!(bench.world().attached.len(), 1);
    assert_eq!(bench.names(), ["old"]);
    assert_eq!(bench.heal_fails(), ErrorCode::Limit);
    assert_eq!(bench.names(), ["old"]);
    bench.world().refuse_commit = false;
    assert!(bench.heal(&["old"]).host_restored);
}

impl Bench {
    fn heal_fails(&mut self) -> ErrorCode {
        self.ask("heal", &json!({"all": true})).unwrap_err().code
    }
}

#[test]
fn names_are_unique_unless_replacing() {
    let mut bench = bench();
    bench.add(&json!([rule("one", "eth0")]));
    let error = bench
        .ask("add", &json!({"rules": [rule("one", "eth1")]}))
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::Exists);
    let before = bench.acting()["one"];
    bench
        .ask(
            "add",
            &json!({"rules": [rule("one", "eth1")], "replace": true}),
        )
        .unwrap();
    assert_ne!(bench.acting()["one"], before);
    assert_eq!(bench.names(), ["one"]);
    let attached: Vec<(u64, u32)> = bench.world().attached.keys().copied().collect();
    assert_eq!(attached, [(1, 3)]);
    assert_eq!(bench.events(EventKind::RuleChanged).len(), 1);
}

#[test]
fn applying_keeps_what_is_unchanged() {
    let mut bench = bench();
    bench.add(&json!([
        rule("keep", "eth0"),
        rule("change", "eth0"),
        rule("end", "eth1")
    ]));
    let before = bench.acting();
    let mut changed = rule("change", "eth0");
    changed["peer"] = json!(["10.0.0.2"]);
    let result = bench.apply(
        "replace",
        &json!([rule("keep", "eth0"), changed, rule("new", "eth2")]),
    );
    assert_eq!(result.unchanged, ["keep"]);
    assert_eq!(result.healed, ["end"]);
    let after = bench.acting();
    assert_eq!(after["keep"], before["keep"]);
    assert_ne!(after["change"], before["change"]);
    assert!(after.contains_key("new") && !after.contains_key("end"));
    // A seed that was drawn is not a difference.
    let again = bench.apply("add", &json!([rule("keep", "eth0")]));
    assert_eq!(again.unchanged, ["keep"]);
    assert_eq!(bench.acting().len(), 3);
}

#[test]
fn what_list_prints_can_be_applied_and_changes_nothing() {
    let mut bench = bench();
    bench.add(&json!([
        rule("one", "eth0"),
        {"iface": ["eth1", "eth0"], "proto": ["tcp"], "peer_port": ["80", "8000-8080"],
         "flows": "25%", "fault": {"drop_every": 10}, "for": "1h"},
    ]));
    let before = bench.acting();
    let specs: Vec<_> = bench
        .list()
        .rules
        .into_iter()
        .map(|rule| rule.spec)
        .collect();
    let result = bench.apply("replace", &json!(specs));
    assert_eq!(result.unchanged.len(), 2, "{result:?}");
    assert_eq!(bench.acting(), before);
}

#[test]
fn a_full_rule_set_can_be_replaced_as_a_whole() {
    let mut bench = bench();
    let old: Vec<_> = (0..4).map(|n| rule(&format!("old{n}"), "eth0")).collect();
    bench.add(&json!(old));
    let error = bench
        .ask("add", &json!({"rules": [rule("more", "eth0")]}))
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::Limit);
    bench.world().counters.insert(
        RuleSlot(0),
        RuleCounters {
            matched_packets: 5,
            ..RuleCounters::default()
        },
    );
    // A failure leaves the old rules with what they have counted.
    bench.world().refuse_commit = true;
    let new: Vec<_> = (0..4).map(|n| rule(&format!("new{n}"), "eth0")).collect();
    bench
        .ask("apply", &json!({"rules": new, "mode": "replace"}))
        .unwrap_err();
    bench.world().refuse_commit = false;
    assert_eq!(bench.stats().rules[0].egress.matched_packets, 5);
    bench.world().counters.insert(
        RuleSlot(0),
        RuleCounters {
            matched_packets: 2,
            ..RuleCounters::default()
        },
    );
    assert_eq!(bench.stats().rules[0].egress.matched_packets, 7);
    let result = bench.apply("replace", &json!(new));
    assert_eq!(result.healed.len(), 4);
    assert_eq!(bench.acting().len(), 4);
    assert_eq!(bench.stats().rules[0].egress.matched_packets, 0);
}

#[test]
fn a_dry_run_does_nothing() {
    let mut bench = bench();
    bench.add(&json!([rule("one", "eth0")]));
    let reply = bench
        .ask(
            "add",
            &json!({"rules": [rule("two", "eth1")], "dry_run": true}),
        )
        .unwrap();
    let Reply::Add(result) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(result.rules[0].spec.name.as_deref(), Some("two"));
    assert!(!result.rules[0].targets[0].attached);
    assert_eq!(bench.world().attached.len(), 1);
    assert_eq!(bench.names(), ["one"]);
    let error = bench
        .ask(
            "add",
            &json!({"rules": [rule("one", "eth1")], "dry_run": true}),
        )
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::Exists);
}

#[test]
fn a_lifetime_ends_and_its_counters_stay() {
    let mut bench = bench();
    let mut short = rule("short", "eth0");
    short["for"] = json!("30s");
    bench.add(&json!([short, rule("long", "eth1")]));
    bench.world().counters.insert(
        RuleSlot(0),
        RuleCounters {
            cut_packets: 9,
            first_ns: 1000 * SECOND,
            ..RuleCounters::default()
        },
    );
    assert!(bench.pass(29).wake <= Duration::from_secs(1));
    assert_eq!(bench.acting().len(), 2);
    assert_eq!(bench.list().rules[0].remaining, Some(1.0));
    bench.pass(1);
    assert_eq!(bench.acting().len(), 1);
    assert_eq!(bench.world().attached.len(), 1);
    let rule = bench.list().rules[0].clone();
    assert_eq!(rule.state, RuleState::Expired);
    assert!(rule.state_reason.unwrap().contains("30s"));
    assert!(!rule.targets[0].attached);
    bench.world().counters.clear();
    let stats = bench.stats();
    assert_eq!(stats.rules[0].egress.cut_packets, 9);
    assert!(stats.rules[0].egress.first_at.is_some());
    // Its name is free again.
    bench.add(&json!([rule_named("short")]));
    assert_eq!(bench.names(), ["long", "short"]);
    assert_eq!(bench.list().rules[1].state, RuleState::Active);
    assert_eq!(bench.events(EventKind::RuleExpired).len(), 1);
}

fn rule_named(name: &str) -> serde_json::Value {
    rule(name, "eth2")
}

#[test]
fn an_expiry_that_cannot_be_committed_is_tried_again() {
    let mut bench = bench();
    let mut short = rule("short", "eth0");
    short["for"] = json!("5s");
    bench.add(&json!([short]));
    bench.world().refuse_commit = true;
    bench.pass(5);
    bench.state.tick();
    assert_eq!(bench.events(EventKind::Problem).len(), 1);
    bench.world().refuse_commit = false;
    bench.pass(1);
    assert_eq!(bench.list().rules[0].state, RuleState::Expired);
    assert!(bench.world().attached.is_empty());
}

#[test]
fn a_flush_lasts_as_long_as_something_may_be_held() {
    let mut bench = bench();
    let mut slow = rule("slow", "eth0");
    slow["fault"] = json!({"delay": "3s"});
    // Another rule's time comes on top.
    let mut other = rule("other", "eth0");
    other["fault"] = json!({"delay": "1s"});
    bench.add(&json!([slow, rule("cut", "eth0"), other]));
    bench.world().load = lane_load::of(64);
    let flush =
        |bench: &mut Bench| bench.ask("heal", &json!({"names": ["slow", "cut"], "flush": true}));
    // As long as it is refused nothing changes.
    bench.world().refuse_flush = true;
    assert_eq!(flush(&mut bench).unwrap_err().code, ErrorCode::Limit);
    bench.world().refuse_flush = false;
    bench.world().refuse_commit = true;
    flush(&mut bench).unwrap_err();
    assert!(bench.world().flushing.is_empty());
    assert_eq!(bench.names(), ["slow", "cut", "other"]);
    bench.world().refuse_commit = false;
    let Reply::Heal(healed) = flush(&mut bench).unwrap() else {
        panic!("heal");
    };
    assert_eq!(healed.healed.len(), 2);
    // What is cut is not held.
    assert_eq!(healed.flushing.len(), 1);
    assert_eq!(healed.flushing[0].rule, "slow");
    assert!((healed.flushing[0].remaining - 4.05).abs() < 1e-6);
    bench.pass(2);
    for counts in bench.world().flushing.values_mut() {
        *counts = [5, 2];
    }
    let stats = bench.stats();
    assert_eq!(
        (
            stats.flushes[0].egress_packets,
            stats.flushes[0].ingress_packets
        ),
        (5, 2)
    );
    assert!(bench.events(EventKind::Flushed).is_empty());
    bench.pass(3);
    let told = bench.events(EventKind::Flushed);
    assert_eq!(told.len(), 1);
    assert!(told[0].message.contains("7 packets"), "{}", told[0].message);
    assert!(bench.world().flushing.is_empty() && bench.stats().flushes.is_empty());
    bench.heal(&["other"]);
    bench.pass(2);
    assert!(bench.world().attached.is_empty());
}

#[test]
fn what_an_expired_rule_still_holds_can_be_flushed() {
    let mut bench = bench();
    let mut slow = rule("slow", "eth0");
    slow["fault"] = json!({"delay": "3s"});
    slow["for"] = json!("5s");
    bench.add(&json!([slow]));
    bench.world().load = lane_load::of(64);
    bench.pass(5);
    bench.pass(1);
    let Reply::Heal(healed) = bench
        .ask("heal", &json!({"all": true, "flush": true}))
        .unwrap()
    else {
        panic!("heal");
    };
    assert_eq!(healed.flushing.len(), 1);
    assert!(healed.flushing[0].remaining < 2.1);
    bench.pass(3);
    assert_eq!(bench.events(EventKind::Flushed).len(), 1);
}

#[test]
fn a_lane_that_is_empty_is_not_kept_for_the_longest_hold() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "20s")]));
    bench.world().load = 2 * lane_load::of(64);
    let Reply::Heal(healed) = bench
        .ask("heal", &json!({"all": true, "flush": true}))
        .unwrap()
    else {
        panic!("heal");
    };
    assert!(!healed.host_restored);
    // As long as it holds something …
    bench.pass(1);
    bench.world().load = lane_load::of(64);
    bench.pass(1);
    bench.world().load = 0;
    bench.world().queued = 1;
    bench.pass(1);
    bench.pass(1);
    assert_eq!(bench.world().attached.len(), 1);
    assert_eq!(bench.stats().flushes.len(), 1);
    // … and a moment longer.
    bench.world().queued = 0;
    let tick = bench.pass(1);
    assert!(tick.wake <= MARGIN, "{tick:?}");
    assert_eq!(bench.world().attached.len(), 1);
    bench.pass(1);
    assert!(bench.world().attached.is_empty() && bench.world().lanes.is_empty());
    assert!(bench.stats().flushes.is_empty());
    assert_eq!(bench.events(EventKind::Flushed).len(), 1);

    // What is sent as the rule ends need not be in the account yet.
    bench.add(&json!([delaying("two", "eth0", "20s")]));
    assert!(!bench.heal(&["two"]).host_restored);
    let tick = bench.pass(0);
    assert!(tick.wake > MARGIN, "{tick:?}");
    bench.pass(1);
    // Where it cannot be let go of, that is tried again once a second.
    bench.world().refuse_commit = true;
    let problems = bench.events(EventKind::Problem).len();
    for _ in 0..25 {
        bench.world().now_ns += SECOND / 10;
        bench.state.tick();
    }
    assert_eq!(bench.events(EventKind::Problem).len(), problems + 3);
    bench.world().refuse_commit = false;
    bench.pass(1);
    bench.pass(1);
    assert!(bench.world().attached.is_empty());

    // The account of a damaged one need not be right.
    bench.add(&json!([delaying("three", "eth0", "20s")]));
    bench.world().lane_damage = Some(Damage::Gone("inj-line"));
    bench.pass(2);
    bench.heal(&["three"]);
    for _ in 0..4 {
        bench.pass(2);
    }
    assert_eq!(bench.world().attached.len(), 1);
    bench.pass(20);
    assert!(bench.world().attached.is_empty());
}

#[test]
fn a_lane_that_has_lost_packets_is_kept_for_the_longest_hold() {
    // Later packets of their flows may wait for them.
    let full = |world: &mut World| world.full_packets = 1;
    let dropped = |world: &mut World| world.queue_drops = 1;
    let missing = |world: &mut World| world.load = lane_load::of(64);
    let loses: [fn(&mut World); 3] = [full, dropped, missing];
    for lose in loses {
        let mut bench = bench();
        bench.add(&json!([delaying("one", "eth0", "40s")]));
        lose(&mut bench.world());
        bench.pass(1);
        bench.pass(1);
        bench.heal(&["one"]);
        for _ in 0..3 {
            bench.pass(13);
        }
        assert_eq!(bench.world().attached.len(), 1);
        bench.pass(2);
        assert!(bench.world().attached.is_empty());
    }
    // So may those of a lane in whose place another one is.
    for lose in [full, missing] {
        let mut bench = bench();
        bench.add(&json!([delaying("one", "eth0", "40s")]));
        lose(&mut bench.world());
        bench.world().lane_damage = Some(Damage::Gone("inj-line"));
        bench.pass(1);
        bench.world().lane_damage = None;
        bench.add(&json!([delaying("two", "eth0", "1s")]));
        assert_eq!(bench.world().full_packets, 0);
        bench.heal(&["one", "two"]);
        bench.pass(1);
        bench.pass(1);
        assert_eq!(bench.world().attached.len(), 1);
    }
}

#[test]
fn a_lane_is_looked_at_until_it_goes() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "20s")]));
    bench.heal(&["one"]);
    bench.pass(1);
    // A packet of a flow that had waited there until just now.
    bench.world().load = lane_load::of(64);
    bench.world().queued = 1;
    bench.pass(1);
    bench.pass(1);
    assert_eq!(bench.world().attached.len(), 1);
    bench.world().load = 0;
    bench.world().queued = 0;
    bench.pass(1);
    bench.pass(1);
    assert!(bench.world().attached.is_empty());
}

#[test]
fn a_lane_lingers_while_flows_that_waited_go_on() {
    let tenths = |bench: &mut Bench, count: u32, sent: u64| {
        for _ in 0..count {
            bench.world().now_ns += SECOND / 10;
            bench.world().sent += sent;
            bench.state.tick();
        }
        bench.world().attached.len()
    };
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "1s")]));
    bench.heal(&["one"]);
    // Two seconds longer than anything is held, at most.
    assert_eq!(tenths(&mut bench, 30, 100), 1);
    assert_eq!(tenths(&mut bench, 1, 100), 0);
    bench.add(&json!([delaying("two", "eth0", "1s")]));
    bench.heal(&["two"]);
    assert_eq!(tenths(&mut bench, 20, 100), 1);
    assert_eq!(tenths(&mut bench, 1, 0), 0);
    // Also while something is on its way back, though the lane itself is empty.
    bench.add(&json!([delaying("three", "eth0", "1s")]));
    bench.heal(&["three"]);
    bench.world().underway = 1;
    assert_eq!(tenths(&mut bench, 30, 0), 1);
    bench.world().underway = 0;
    assert_eq!(tenths(&mut bench, 1, 0), 0);
}

#[test]
fn each_lane_is_kept_for_what_it_holds_itself() {
    let mut bench = bench();
    let mut elsewhere = delaying("elsewhere", "eth0", "20s");
    elsewhere["netns"] = json!("a");
    bench.add(&json!([delaying("here", "eth0", "20s")]));
    bench.add(&json!([elsewhere]));
    bench.world().second_load = 2 * lane_load::of(64);
    bench.heal(&["here", "elsewhere"]);
    bench.pass(1);
    bench.world().second_load = lane_load::of(64);
    bench.pass(1);
    assert_eq!(bench.world().lanes, BTreeSet::from([2]));
    assert_eq!(bench.world().attached.len(), 1);
    bench.world().second_load = 0;
    bench.pass(1);
    bench.pass(1);
    assert!(bench.world().lanes.is_empty() && bench.world().attached.is_empty());
}

#[test]
fn activations_differ_in_what_packets_know_of_them() {
    let mut bench = bench();
    bench.add(&json!([rule("first", "eth0")]));
    assert_eq!(bench.list().rules[0].activation, 1);
    // The next one would be 65,536, of which packets see 0; the one after has the number of `first`.
    bench.state.next_activation = 1 << 16;
    bench.add(&json!([rule("second", "eth0"), rule("third", "eth0")]));
    let activations: Vec<u32> = bench
        .list()
        .rules
        .iter()
        .map(|rule| rule.activation)
        .collect();
    assert_eq!(activations, [1, 0x1_0002, 0x1_0003]);
}

#[test]
fn held_rules_end_with_their_connection() {
    let mut bench = bench();
    bench
        .ask_as(
            7,
            "add",
            &json!({"rules": [rule("held", "eth0")], "hold": true}),
        )
        .unwrap();
    bench.add(&json!([rule("free", "eth1")]));
    assert!(bench.list().rules[0].held);
    // `apply` leaves it to its command.
    let result = bench.apply("replace", &json!([]));
    assert_eq!(result.healed, ["free"]);
    assert!(result.warnings[0].contains("held"), "{:?}", result.warnings);
    bench.state.closed(1);
    assert_eq!(bench.names(), ["held"]);
    // What cannot be committed now is tried again.
    bench.world().refuse_commit = true;
    bench.state.closed(7);
    assert_eq!(bench.names(), ["held"]);
    bench.world().refuse_commit = false;
    bench.pass(1);
    assert_eq!(bench.names(), Vec::<String>::new());
    assert!(bench.world().attached.is_empty());
    assert_eq!(bench.events(EventKind::HoldReleased).len(), 1);
}

#[test]
fn an_idle_daemon_leaves_after_its_time() {
    let mut bench = bench();
    assert!(!bench.pass(59).leave);
    let mut short = rule("short", "eth0");
    short["for"] = json!("100s");
    bench
        .ask_as(7, "add", &json!({"rules": [short], "hold": true}))
        .unwrap();
    assert!(!bench.pass(99).leave);
    // The rule has ended, its command goes on.
    assert!(!bench.pass(100).leave);
    bench.state.closed(7);
    assert!(!bench.pass(59).leave);
    assert!(bench.pass(1).leave);
}

#[test]
fn a_target_that_goes_ends_the_rules_that_have_no_other() {
    let mut bench = bench();
    let both = json!({"name": "both", "iface": ["eth0", "eth1"], "peer": ["10.0.0.1"],
                      "fault": {"cut": true}});
    bench.add(&json!([rule("one", "eth0"), both]));
    bench.world().gone.insert(2);
    bench.pass(1);
    let list = bench.list();
    assert_eq!(list.rules[0].state, RuleState::Gone);
    assert!(
        list.rules[0]
            .state_reason
            .as_ref()
            .unwrap()
            .contains("eth0")
    );
    assert_eq!(list.rules[1].state, RuleState::Active);
    assert!(
        list.rules[1].targets[0]
            .problem
            .as_ref()
            .unwrap()
            .contains("gone")
    );
    assert!(list.rules[1].targets[1].attached);
    assert_eq!(bench.world().rules.len(), 1);
    assert_eq!(bench.world().targets.len(), 1);
    assert_eq!(bench.events(EventKind::TargetGone).len(), 1);
    assert_eq!(bench.events(EventKind::RuleGone).len(), 1);
    assert_eq!(bench.world().attached.len(), 1);
}

#[test]
fn a_filter_that_somebody_removed_is_shown_and_can_be_put_back() {
    let mut bench = bench();
    bench.add(&json!([rule("one", "eth0")]));
    bench.world().filter_removed.insert(2);
    bench.pass(1);
    bench.pass(1);
    assert_eq!(bench.events(EventKind::TargetLost).len(), 1);
    let target = bench.stats().targets[0].clone();
    assert!(!target.attached);
    assert!(target.problem.unwrap().contains("ingress"));
    bench.world().filter_removed.clear();
    // A failure leaves it as it was …
    bench.world().refuse_commit = true;
    bench
        .ask("add", &json!({"rules": [rule("two", "eth0")]}))
        .unwrap_err();
    assert!(!bench.list().rules[0].targets[0].attached);
    bench.world().refuse_commit = false;
    // … and adding again attaches again, even the same rule.
    let result = bench.apply("add", &json!([rule("one", "eth0")]));
    assert!(result.unchanged.is_empty());
    assert!(result.rules[0].targets[0].attached);
    assert_eq!(bench.world().attached.len(), 1);
}

#[test]
fn what_cannot_be_detached_is_told_and_tried_again() {
    let mut bench = bench();
    bench.add(&json!([rule("one", "eth0")]));
    bench.world().refuse_detach = true;
    let healed = bench.heal(&["one"]);
    assert!(!healed.host_restored);
    assert!(
        healed.problems[0].contains("bad mood"),
        "{:?}",
        healed.problems
    );
    assert!(bench.acting().is_empty());
    bench.world().refuse_detach = false;
    bench.pass(1);
    assert!(bench.world().attached.is_empty());
}

#[test]
fn healing_takes_names_and_groups_and_all_or_nothing() {
    let mut bench = bench();
    let mut grouped = rule("one", "eth0");
    grouped["group"] = json!("g");
    bench.add(&json!([
        grouped,
        rule("two", "eth0"),
        rule("three", "eth0")
    ]));
    let error = bench
        .ask("heal", &json!({"names": ["two", "nine"]}))
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    assert_eq!(bench.names().len(), 3);
    assert_eq!(bench.heal(&["g", "two"]).healed.len(), 2);
    assert_eq!(bench.names(), ["three"]);
    for args in [json!({}), json!({"names": ["three"], "all": true})] {
        assert_eq!(
            bench.ask("heal", &args).unwrap_err().code,
            ErrorCode::Invalid
        );
    }
    bench.ask("heal", &json!({"all": true})).unwrap();
    assert!(bench.world().attached.is_empty());
    // With nothing to heal, everything is healed.
    bench.ask("heal", &json!({"all": true})).unwrap();
}

#[test]
fn operators_and_the_protect_list_are_exempt() {
    let mut bench = bench();
    let operator = json!([{"client": "192.0.2.7", "client_port": 50022, "server": "192.0.2.1",
                           "server_port": 22}]);
    let reply = bench
        .ask(
            "add",
            &json!({"rules": [rule("one", "eth0")], "operator": operator}),
        )
        .unwrap();
    let Reply::Add(result) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(result.protected.len(), 1);
    assert_eq!(bench.world().exemptions.len(), 2);
    bench
        .ask("protect", &json!({"add": ["10.0.0.9", "tcp/443"]}))
        .unwrap();
    assert_eq!(bench.world().exemptions.len(), 6);
    assert_eq!(bench.list().protected.len(), 3);
    // A list that does not fit changes nothing.
    let many: Vec<String> = (0..70).map(|n| format!("10.1.0.{n}:22")).collect();
    let error = bench.ask("protect", &json!({"add": many})).unwrap_err();
    assert_eq!(error.code, ErrorCode::Limit);
    assert_eq!(bench.list().protected.len(), 3);
    // With the last rule the operators are forgotten; the list stays.
    bench.heal(&["one"]);
    assert_eq!(bench.list().protected.len(), 2);
    let mut bare = rule("bare", "eth0");
    bare["unprotected"] = json!(true);
    assert!(bench.add(&json!([bare])).protected.is_empty());
}

#[test]
fn what_stands_before_us_is_reported() {
    let mut bench = bench();
    bench.world().obstacles = vec![Obstacle {
        hook: Hook::Egress,
        what: "TCX program id 12".into(),
    }];
    let result = bench.add(&json!([rule("one", "eth0")]));
    assert!(
        result
            .warnings
            .iter()
            .any(|w| w.contains("TCX program id 12"))
    );
    assert_eq!(bench.stats().targets[0].obstacles.len(), 1);
    let result = bench.add(&json!([rule("two", "eth1")]));
    assert!(
        result.warnings.contains(&"2 targets".to_owned()),
        "{:?}",
        result.warnings
    );
}

#[test]
fn there_are_only_so_many_targets() {
    let mut bench = bench();
    let rules: Vec<_> = (0..4)
        .map(|n| rule(&format!("r{n}"), &format!("eth{n}")))
        .collect();
    let error = bench.ask("add", &json!({"rules": rules})).unwrap_err();
    assert_eq!(error.code, ErrorCode::Limit);
    assert!(bench.world().attached.is_empty());
}

fn bridge() -> Topology {
    let link = |index: u32, name: &str, kind: &str, master: Option<u32>| Link {
        index,
        name: name.into(),
        kind: Some(kind.into()),
        arp_type: 1,
        master,
        link: None,
        link_netnsid: None,
        up: true,
        running: true,
        loopback: false,
        mac: Vec::new(),
        mtu: 1500,
        xdp_program: None,
        stats: LinkStats::default(),
    };
    Topology {
        links: vec![
            link(9, "br0", "bridge", None),
            link(2, "eth0", "veth", Some(9)),
            link(3, "eth1", "veth", Some(9)),
        ],
        ..Topology::default()
    }
}

#[test]
fn a_partition_is_a_group_of_rules() {
    let mut bench = bench();
    bench.world().topology = bridge();
    let args = json!({"sides": [["10.0.0.1"], ["10.0.0.2"]], "for": "30s"});
    let Reply::Partition(made) = bench.ask("partition", &args).unwrap() else {
        panic!()
    };
    assert!(made.group.starts_with("partition-"), "{}", made.group);
    assert_eq!(made.added.rules.len(), 2);
    assert_eq!(bench.world().attached.len(), 2);
    assert_eq!(
        bench.names(),
        [format!("{}:1-2", made.group), format!("{}:2-1", made.group)]
    );
    let error = bench.ask("partition", &args).unwrap_err();
    assert_eq!(error.code, ErrorCode::Exists);
    let mut again = args.clone();
    again["replace"] = json!(true);
    let Reply::Partition(same) = bench.ask("partition", &again).unwrap() else {
        panic!()
    };
    assert_eq!(same.added.unchanged.len(), 2);
    again["one_way"] = json!(true);
    again["name"] = json!(made.group);
    let Reply::Partition(less) = bench.ask("partition", &again).unwrap() else {
        panic!()
    };
    assert_eq!(
        (less.added.unchanged.len(), less.added.healed.len()),
        (1, 1)
    );
    // Neither a rule nor another partition takes its name.
    let error = bench
        .ask("add", &json!({"rules": [rule(&made.group, "eth0")]}))
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::Exists);
    assert!(bench.heal(&[&made.group]).host_restored);
}

#[test]
fn a_wrong_partition_changes_nothing() {
    let mut bench = bench();
    bench.world().topology = bridge();
    let sides = json!([["10.0.0.1"], ["10.0.0.2"]]);
    for (args, code) in [
        (json!({"sides": [["10.0.0.1"]]}), ErrorCode::Invalid),
        (json!({"sides": sides, "for": "0s"}), ErrorCode::Invalid),
        (json!({"sides": sides, "for": "soon"}), ErrorCode::Invalid),
        (json!({"sides": sides, "name": "-x"}), ErrorCode::Invalid),
        (
            json!({"sides": sides, "name": "x".repeat(64)}),
            ErrorCode::Invalid,
        ),
        (json!({"sides": sides, "netns": "b"}), ErrorCode::Target),
        (
            json!({"sides": sides, "ifaces": ["eth9"]}),
            ErrorCode::Target,
        ),
    ] {
        let error = bench.ask("partition", &args).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(bench.world().attached.is_empty());
    }
}

#[test]
fn a_partition_of_a_member_follows_its_routes() {
    let mut bench = bench();
    let mut topology = bridge();
    topology.links.remove(0);
    topology.addresses = vec![(2, "10.0.0.1/24".parse::<IpNet>().unwrap())];
    topology.routes = vec![Route {
        dst: "10.0.0.0/24".parse().unwrap(),
        oifs: vec![2],
        table: 254,
        metric: 0,
    }];
    bench.world().topology = topology;
    let args = json!({"sides": [["10.0.0.1"], ["10.0.0.2"]], "name": "p", "hold": true});
    bench.ask_as(5, "partition", &args).unwrap();
    assert_eq!(bench.names(), ["p:1-2"]);
    assert_eq!(bench.world().attached.len(), 1);
    bench.state.closed(5);
    assert!(bench.world().attached.is_empty());
}

#[test]
fn down_undoes_everything_and_lets_nothing_in() {
    let mut bench = bench();
    bench.add(&json!([rule("one", "eth0"), rule("two", "eth1")]));
    // Not even a data plane that refuses keeps the programs on.
    bench.world().refuse_commit = true;
    let Reply::Down(result) = bench.ask("down", &json!({})).unwrap() else {
        panic!()
    };
    assert!(result.host_restored);
    assert_eq!(result.healed.len(), 2);
    assert!(bench.world().attached.is_empty());
    bench.world().refuse_commit = false;
    let error = bench
        .ask("add", &json!({"rules": [rule("three", "eth0")]}))
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::ShuttingDown);
    bench.list();
}

#[test]
fn show_tells_of_one_rule() {
    let mut bench = bench();
    bench.add(&json!([rule("one", "eth0"), rule("two", "eth1")]));
    let Reply::Show(shown) = bench.ask("show", &json!({"name": "two"})).unwrap() else {
        panic!()
    };
    assert_eq!(shown.targets.len(), 1);
    assert_eq!(shown.targets[0].iface, "eth1");
    assert_eq!(shown.targets[0].egress.seen_packets, 7);
    assert_eq!(shown.stats.fault, "cut");
    let error = bench.ask("show", &json!({"name": "nine"})).unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[test]
fn ended_rules_are_forgotten_in_the_end() {
    let mut bench = bench();
    for round in 0..300 {
        let rules: Vec<_> = (0..4)
            .map(|n| {
                let mut short = rule(&format!("r{round}-{n}"), "eth0");
                short["for"] = json!("1s");
                short
            })
            .collect();
        bench.add(&json!(rules));
        bench.pass(1);
    }
    let names = bench.names();
    assert_eq!(names.len(), 1024);
    assert_eq!(names.last().unwrap(), "r299-3");
}

/// A rule that delays.
fn delaying(name: &str, iface: &str, delay: &str) -> serde_json::Value {
    let mut asked = rule(name, iface);
    asked["fault"] = json!({"delay": delay});
    asked
}

#[test]
fn a_target_s_number_rests_while_a_lane_may_hold_packets_of_it() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "10s")]));
    bench.add(&json!([delaying("two", "eth1", "10s")]));
    let slot_of = |bench: &Bench, index: u32| {
        let world = bench.world();
        let found = world.targets.iter().find(|one| one.ifindex == index);
        found.map(|one| one.slot)
    };
    let (first, second) = (slot_of(&bench, 2), slot_of(&bench, 3));
    assert!(first.is_some() && second.is_some() && first != second);
    // The interface goes, and the lane stays because of the other one.
    bench.world().gone.insert(2);
    bench.pass(1);
    assert_eq!(slot_of(&bench, 2), None);
    bench.add(&json!([delaying("three", "eth2", "10s")]));
    let third = slot_of(&bench, 4);
    assert!(third.is_some() && third != first && third != second);
    bench.heal(&["three"]);
    // 10 s by the rule, and 10 s that a sender may have asked for.
    bench.pass(45);
    bench.add(&json!([delaying("four", "eth3", "10s")]));
    assert_eq!(slot_of(&bench, 5), first);
}

#[test]
fn rules_that_would_hold_longer_than_a_queue_can_are_refused() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "40m")]));
    let error = bench
        .ask("add", &json!({"rules": [delaying("two", "eth0", "40m")]}))
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::Limit);
    assert!(error.message.contains("1h20m"), "{}", error.message);
    assert_eq!(bench.world().rules.len(), 1);
    // Elsewhere, where no packet meets both, it is right.
    bench.add(&json!([delaying("two", "eth1", "40m")]));
}

#[test]
fn what_cannot_be_let_go_is_tried_again() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "1s")]));
    bench.heal(&["one"]);
    bench.world().refuse_commit = true;
    bench.pass(1);
    bench.pass(1);
    assert_eq!(bench.events(EventKind::Problem).len(), 1);
    assert_eq!(bench.world().attached.len(), 1);
    bench.world().refuse_commit = false;
    bench.pass(2);
    bench.pass(1);
    assert!(bench.world().attached.is_empty() && bench.world().lanes.is_empty());
}

#[test]
fn a_damaged_lane_lets_packets_pass_and_is_made_anew() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "1s")]));
    let lane = |bench: &Bench| bench.world().targets[0].lane;
    assert!(lane(&bench).is_some());
    bench.world().lane_damage = Some(Damage::Down("inj-line"));
    bench.pass(2);
    assert_eq!(lane(&bench), None);
    let told = bench.events(EventKind::Problem);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].message.contains("inj-line was set down"),
        "{told:?}"
    );
    let problem = |bench: &mut Bench| bench.list().rules[0].targets[0].problem.clone();
    assert_eq!(
        problem(&mut bench).as_deref(),
        Some("no lane: its device inj-line was set down")
    );
    assert!(bench.stats().lanes[0].problem.is_some());
    // Told once, and a rule that needs none changes nothing.
    bench.add(&json!([rule("two", "eth0")]));
    bench.pass(2);
    assert_eq!(bench.events(EventKind::Problem).len(), 1);
    assert_eq!(lane(&bench), None);
    // It cannot be made anew: as before, and said so.
    bench.world().refuse_lane = Some(ErrorCode::Unsupported);
    let three = json!({"rules": [delaying("three", "eth0", "2s")]});
    assert_eq!(
        bench.ask("add", &three).unwrap_err().code,
        ErrorCode::Unsupported
    );
    assert!(problem(&mut bench).is_some() && bench.world().lanes.is_empty());
    // Asking for the same rules again makes it.
    bench.world().refuse_lane = None;
    let one = json!([delaying("one", "eth0", "1s")]);
    assert_eq!(bench.apply("add", &one).unchanged.len(), 0);
    assert!(lane(&bench).is_some() && bench.world().lanes.len() == 1);
    assert_eq!(problem(&mut bench), None);
    assert_eq!(bench.apply("add", &one).unchanged.len(), 1);
}

#[test]
fn a_lane_damaged_just_now_is_made_anew_at_once() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "1s")]));
    bench.world().lane_damage = Some(Damage::Gone("inj-carrier"));
    bench.add(&json!([delaying("two", "eth0", "2s")]));
    assert!(bench.world().targets[0].lane.is_some() && bench.world().lanes.len() == 1);
    assert_eq!(bench.events(EventKind::Problem).len(), 1);
    let list = bench.list();
    assert!(
        list.rules
            .iter()
            .all(|rule| rule.targets[0].problem.is_none())
    );
}

#[test]
fn a_lane_made_anew_in_vain_stays_damaged() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "1s")]));
    bench.world().lane_damage = Some(Damage::Gone("inj-line"));
    bench.pass(2);
    // The kernel's tables refuse what would use the new lane; the rule that is in force does not either.
    bench.world().refuse_commit = true;
    let two = json!({"rules": [delaying("two", "eth0", "2s")]});
    bench.ask("add", &two).unwrap_err();
    let problem = |bench: &mut Bench| bench.list().rules[0].targets[0].problem.clone();
    assert_eq!(
        problem(&mut bench).as_deref(),
        Some("no lane: its device inj-line was deleted, renamed or moved")
    );
    bench.world().refuse_commit = false;
    bench.pass(2);
    assert!(problem(&mut bench).is_some() && bench.world().targets[0].lane.is_none());
    let one = json!([delaying("one", "eth0", "1s")]);
    assert_eq!(bench.apply("add", &one).unchanged.len(), 0);
    assert!(problem(&mut bench).is_none() && bench.world().targets[0].lane.is_some());
    assert_eq!(bench.world().lanes.len(), 1);
    // One that was made where there was none goes again.
    bench.ask("heal", &json!({"names": ["one"]})).unwrap();
    bench.pass(1);
    bench.pass(1);
    assert!(bench.world().lanes.is_empty());
    bench.world().refuse_commit = true;
    bench.ask("add", &two).unwrap_err();
    assert!(bench.world().lanes.is_empty());
}

#[test]
fn a_lane_made_anew_goes_on_with_the_losses_of_the_one_before() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "1s")]));
    // Four packets, of which a queue has dropped one; five were dropped before.
    bench.world().queue_drops = 5;
    bench.pass(2);
    bench.world().load = 4 * lane_load::of(64);
    bench.world().queue_drops = 6;
    bench.world().lane_damage = Some(Damage::Gone("inj-line"));
    bench.add(&json!([delaying("two", "eth0", "1s")]));
    let told = bench.events(EventKind::Problem);
    assert!(
        told.iter().any(|event| event
            .message
            .contains("held 3 packets when it was made anew")),
        "{told:?}"
    );
    bench.world().queue_drops = 0;
    let lane = bench.stats().lanes[0].clone();
    assert_eq!((lane.missing_packets, lane.dropped_packets), (3, 6));
}

#[test]
fn what_goes_missing_in_a_lane_is_told() {
    let mut bench = bench();
    bench.add(&json!([delaying("one", "eth0", "1s")]));
    bench.world().load = 3 * lane_load::of(64);
    bench.pass(2);
    assert_eq!(bench.events(EventKind::Problem).len(), 0);
    bench.pass(2);
    let told = bench.events(EventKind::Problem);
    assert!(
        told.len() == 1 && told[0].message.starts_with("3 packets went missing"),
        "{told:?}"
    );
    assert_eq!(bench.stats().lanes[0].missing_packets, 3);
    // What its queues drop is told by their own counter.
    bench.world().queue_drops = 2;
    bench.world().load = 2 * lane_load::of(64);
    bench.pass(2);
    bench.pass(2);
    assert_eq!(bench.world().load, 0);
    assert_eq!(bench.stats().lanes[0].missing_packets, 3);
}

#[test]
fn lanes_are_limited_by_what_the_rules_hold() {
    let mut bench = bench();
    let delayed = |name: &str, delay: &str| delaying(name, "eth0", delay);
    bench.add(&json!([delayed("short", "1ms")]));
    let short = bench.world().queue_limits.unwrap();
    bench.add(&json!([delayed("long", "1s")]));
    let long = bench.world().queue_limits.unwrap();
    // As many packets as one lane may hold here.
    assert!(short.packets < long.packets && long.packets == 100_000);
    assert_eq!(long.horizon_us - short.horizon_us, 1_000_000);
    let bounds = |bench: &Bench| bench.world().bounds[&LaneNumber(0)];
    assert_eq!(
        bounds(&bench),
        LaneBounds {
            packets: 100_000,
            bytes: 1 << 20,
        }
    );
    // More is held than the lower limit lets in: fq would drop it.
    bench.world().load = 90_000 * lane_load::of(64);
    bench.ask("heal", &json!({"names": ["long"]})).unwrap();
    bench.pass(4);
    assert_eq!(bounds(&bench).packets, short.packets);
    assert_eq!(bench.world().queue_limits.unwrap().packets, long.packets);
    // What a device has lost is still in the account, and nothing in the queues.
    bench.world().load = lane_load::of(64);
    bench.pass(2);
    assert_eq!(bench.world().queue_limits, Some(short));
    bench.pass(2);
    assert_eq!(bench.world().load, 0);
}

/// The whole daemon behind its socket, apart from the kernel.
mod served {
    use std::path::Path;

    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
        net::{
            UnixStream,
            unix::{OwnedReadHalf, OwnedWriteHalf},
        },
        sync::watch,
    };

    use super::*;
    use crate::{
        daemon::{actor, lease::Pulse, server},
        protocol::MAX_CONNECTIONS,
    };

    struct Client {
        lines: Lines<BufReader<OwnedReadHalf>>,
        writer: OwnedWriteHalf,
    }

    impl Client {
        async fn connect(path: &Path) -> Self {
            let (reader, writer) = UnixStream::connect(path).await.unwrap().into_split();
            Self {
                lines: BufReader::new(reader).lines(),
                writer,
            }
        }

        async fn answer(&mut self) -> serde_json::Value {
            let line = self.lines.next_line().await.unwrap().unwrap();
            serde_json::from_str(&line).unwrap()
        }

        async fn ask(&mut self, line: &str) -> serde_json::Value {
            self.writer.write_all(line.as_bytes()).await.unwrap();
            self.writer.write_all(b"\n").await.unwrap();
            self.answer().await
        }
    }

    /// Waits until something holds.
    async fn until(what: &str, mut holds: impl FnMut() -> bool) {
        for _ in 0..1000 {
            if holds() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never: {what}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_daemon_serves_many_and_survives_nonsense() {
        let Bench { mut state, shared } = bench();
        state.settings.idle_exit = None;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (listener, file) = server::bind(&path).unwrap();
        assert!(server::bind(&path).is_err(), "two daemons on one socket");
        let (stop, stopping) = watch::channel(false);
        let (handle, thread) = actor::start(state, Pulse::new(0), move || {
            stop.send_replace(true);
        })
        .unwrap();
        let served = tokio::spawn(server::serve(listener, handle.clone(), stopping));

        let mut one = Client::connect(&path).await;
        let mut two = Client::connect(&path).await;
        for nonsense in [
            "{",
            "[]",
            "\u{1}\u{2}",
            r#"{"v":1,"op":"add","args":{"rules":7}}"#,
        ] {
            let answer = one.ask(nonsense).await;
            assert_eq!(answer["ok"], false, "{answer}");
            assert_eq!(answer["error"]["code"], "bad_request", "{answer}");
        }
        let hold = json!({"v": 1, "id": 5, "op": "add",
                          "args": {"rules": [rule("held", "eth0")], "hold": true}});
        let answer = one.ask(&hold.to_string()).await;
        assert_eq!(
            (&answer["id"], &answer["ok"]),
            (&json!(5), &json!(true)),
            "{answer}"
        );
        assert_eq!(answer["result"]["rules"][0]["spec"]["name"], "held");
        let answer = two.ask(r#"{"v":1,"id":6,"op":"list"}"#).await;
        assert_eq!(answer["result"]["rules"][0]["held"], true, "{answer}");
        // A client that dies in the middle of a request loses what it held, and acts on nothing.
        one.writer
            .write_all(br#"{"v":1,"id":7,"op":"down"}"#)
            .await
            .unwrap();
        drop(one);
        until("the held rule ends", || shared.world().attached.is_empty()).await;

        let mut others = Vec::new();
        for _ in 1..MAX_CONNECTIONS {
            others.push(Client::connect(&path).await);
        }
        for other in &mut others {
            assert_eq!(
                other.ask(r#"{"v":1,"id":1,"op":"hello"}"#).await["ok"],
                true
            );
        }
        let mut surplus = Client::connect(&path).await;
        assert_eq!(surplus.answer().await["error"]["code"], "limit");
        drop(others);

        let add = json!({"v": 1, "id": 8, "op": "add", "args": {"rules": [rule("a", "eth0")]}});
        assert_eq!(two.ask(&add.to_string()).await["ok"], true);
        let answer = two.ask(r#"{"v":1,"id":9,"op":"down"}"#).await;
        assert_eq!(answer["result"]["host_restored"], true, "{answer}");
        assert!(shared.world().attached.is_empty());
        served.await.unwrap();
        assert!(thread.join().unwrap().host_restored);
        assert!(
            handle
                .call(
                    Call::Down(crate::protocol::NoArgs {}),
                    Origin {
                        conn: 1,
                        received_ns: 0
                    }
                )
                .await
                .is_err()
        );
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_a_dead_daemon_left_of_a_socket_is_replaced_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let (_listener, _file) = server::bind(&path).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&path).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        let other = dir.path().join("file");
        std::fs::write(&other, "mine").unwrap();
        assert!(matches!(
            server::bind(&other),
            Err(server::ServerError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read(&other).unwrap(), b"mine");
    }
}
