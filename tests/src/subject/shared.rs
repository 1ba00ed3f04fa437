//! The decision that the program makes, computed in user space: the same code over the same tables, which
//! are ordinary memory here.

use std::{
    cell::{Cell, RefCell, UnsafeCell},
    collections::HashMap,
    hash::Hash,
    time::Duration,
};

use injector::dataplane::{
    Image, TargetConfig,
    compile::{Capacity, Compiler, class_of},
};
use injector_common::{
    decide::{Advanced, Part, Step, Tables, Verdict, Work, decide},
    layout::{
        Bitmap, Class, Config, Connection, Distribution, FlowEntry, FlowKey, Flushed, FragmentKey,
        Held, Histograms, MAX_EXEMPTIONS, MAX_SLOTS, PORT_CLASSES, PROTOCOL_CLASSES, Prefix,
        RuleCounters, RuleEntry, Shape, State, StateKey, Target, TargetCounters, Upper, family,
    },
    segments::Meta,
};

use crate::model::{Outcome, Packet, RuleOutcome, Setup, Subject, TargetOutcome};

use super::placing::{Placing, Ready, check, direction, rule_outcome, target_outcome};

/// The clock begins here, as the model's does: far enough from zero for any age of a rule.
const START_NS: u64 = 1_000_000_000_000_000;
const PACKET_GAP_NS: u64 = 1000;
const CHANGE_GAP_NS: u64 = 1_000_000_000;
const CAPACITY: Capacity = Capacity {
    bitmaps: 4096,
    prefixes: 8192,
};

/// A table whose values stay where they are as it grows.
type Table<K, V> = RefCell<HashMap<K, Box<UnsafeCell<V>>>>;

fn pointer<K: Eq + Hash, V>(table: &Table<K, V>, key: &K) -> Option<*mut V> {
    table.borrow().get(key).map(|value| value.get())
}

/// Overwrites a value where it is, or puts a new one in.
fn put<K: Eq + Hash + Copy, V: Copy>(table: &Table<K, V>, key: &K, value: V) {
    if let Some(place) = pointer(table, key) {
        // SAFETY: the box is in the table, and nobody holds a reference into it.
        unsafe { place.write(value) };
    } else {
        table
            .borrow_mut()
            .insert(*key, Box::new(UnsafeCell::new(value)));
    }
}

/// The tables in memory.
#[derive(Default)]
struct Memory {
    config: Config,
    image: Image,
    targets: HashMap<u32, Target>,
    now_ns: Cell<u64>,
    /// Classes of addresses that were looked up, under this image.
    classes: Table<Prefix, Class>,
    idle: RefCell<HashMap<FlowKey, u64>>,
    flows: Table<FlowKey, FlowEntry>,
    states: Table<StateKey, State>,
    held: Table<FlowKey, Held>,
    distributions: HashMap<u32, Box<Distribution>>,
    connections: Table<FlowKey, Connection>,
    fragments: RefCell<HashMap<FragmentKey, Upper>>,
    rule_counters: Table<u32, RuleCounters>,
    histograms: Table<u32, Histograms>,
    target_counters: Table<u32, TargetCounters>,
    work: Box<UnsafeCell<Work>>,
}

impl Memory {
    /// An index into one copy of a table, from one into both. Only the copy in force may be asked for.
    fn in_copy(&self, index: u32, entries: u32) -> u32 {
        let copy = index / entries;
        assert_eq!(
            u64::from(copy),
            self.config.epoch & 1,
            "a copy that is not in force was read"
        );
        index % entries
    }
}

impl Tables for Memory {
    fn config(&self) -> Option<*const Config> {
        Some(&raw const self.config)
    }

    fn target(&self, slot: u32) -> Option<*const Target> {
        self.targets.get(&slot).map(std::ptr::from_ref)
    }

    fn protocol(&self, index: u32) -> Option<u32> {
        self.image
            .protocols
            .get(self.in_copy(index, PROTOCOL_CLASSES) as usize)
            .copied()
    }

    fn port(&self, index: u32) -> Option<*const Class> {
        self.image
            .ports
            .get(self.in_copy(index, PORT_CLASSES) as usize)
            .map(std::ptr::from_ref)
    }

    fn address(&self, key: &Prefix) -> Option<*const Class> {
        let tagged = key.tag & 1;
        assert_eq!(
            u64::from(tagged),
            self.config.epoch & 1,
            "a copy that is not in force was read"
        );
        if let Some(place) = pointer(&self.classes, key) {
            return Some(place);
        }
        let family = key.tag >> 1;
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(key.address) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        assert!(family <= family::NONE, "family {family}");
        put(
            &self.classes,
            key,
            class_of(&self.image, family, u128::from_be_bytes(bytes)),
        );
        pointer(&self.classes, key).map(<*mut Class>::cast_const)
    }

    fn bitmap(&self, copy: u32, index: u32) -> Option<*const Bitmap> {
        assert_eq!(
            u64::from(copy),
            self.config.epoch & 1,
            "a copy that is not in force was read"
        );
        self.image.bitmaps.get(&index).map(std::ptr::from_ref)
    }

    fn rule(&self, index: u32) -> Option<*const RuleEntry> {
        self.image
            .rules
            .get(&self.in_copy(index, MAX_SLOTS))
            .map(std::ptr::from_ref)
    }

    fn idle(&self, flow: &FlowKey) -> Option<u64> {
        self.idle.borrow().get(flow).copied()
    }

    fn set_idle(&self, flow: &FlowKey, epoch: u64) {
        self.idle.borrow_mut().insert(*flow, epoch);
    }

    fn flow(&self, flow: &FlowKey) -> Option<*mut FlowEntry> {
        pointer(&self.flows, flow)
    }

    fn set_flow(&self, flow: &FlowKey, entry: &FlowEntry) -> bool {
        put(&self.flows, flow, *entry);
        true
    }

    fn work(&self) -> Option<*mut Work> {
        Some(self.work.get())
    }

    fn advance(&self, key: &StateKey, by: u64, now_ns: u64) -> Option<Advanced> {
        let (state, created) = self.remember(key, now_ns)?;
        // SAFETY: in the table, and nobody holds a reference to it.
        let before = unsafe { self.increment(&raw mut (*state).n, by) };
        Some(Advanced { before, created })
    }

    fn shape(&self, index: u32) -> Option<*const Shape> {
        self.image
            .shapes
            .get(&self.in_copy(index, MAX_SLOTS))
            .map(std::ptr::from_ref)
    }

    fn distribution(&self, index: u32) -> Option<*const Distribution> {
        self.distributions
            .get(&index)
            .map(|table| std::ptr::from_ref(table.as_ref()))
    }

    fn remember(&self, key: &StateKey, now_ns: u64) -> Option<(*mut State, bool)> {
        let created = pointer(&self.states, key).is_none();
        if created {
            put(&self.states, key, State::default());
        }
        let state = pointer(&self.states, key)?;
        // SAFETY: in the table, and nobody holds a reference to it.
        unsafe { (*state).last_ns = now_ns };
        Some((state, created))
    }

    fn held(&self, flow: &FlowKey) -> Option<*mut Held> {
        pointer(&self.held, flow)
    }

    fn flushed(&self, _name: u16) -> Option<*mut Flushed> {
        // Nothing is flushed here: `Config::flushing` is 0.
        None
    }

    /// Nothing comes back here.
    fn underway(&self, _: u32) -> u64 {
        1
    }

    fn hold(&self, flow: &FlowKey) -> Option<*mut Held> {
        if pointer(&self.held, flow).is_none() {
            put(&self.held, flow, Held::default());
        }
        pointer(&self.held, flow)
    }

    unsafe fn exchange(&self, word: *mut u64, old: u64, new: u64) -> u64 {
        // SAFETY: as the caller promises; there is one thread.
        unsafe {
            let found = *word;
            if found == old {
                *word = new;
            }
            found
        }
    }

    unsafe fn increment(&self, word: *mut u64, by: u64) -> u64 {
        // SAFETY: as the caller promises; there is one thread.
        unsafe {
            let before = *word;
            *word = before + by;
            before
        }
    }

    fn state(&self, key: &StateKey) -> Option<u64> {
        // SAFETY: in the table, and nobody holds a reference to it.
        pointer(&self.states, key).map(|state| unsafe { (*state).n })
    }

    fn create_state(&self, key: &StateKey, n: u64, now_ns: u64) -> bool {
        let created = pointer(&self.states, key).is_none();
        if created {
            let state = State {
                n,
                last_ns: now_ns,
                stream: 0,
            };
            put(&self.states, key, state);
        }
        created
    }

    fn connection(&self, flow: &FlowKey) -> Option<*mut Connection> {
        pointer(&self.connections, flow)
    }

    fn set_connection(&self, flow: &FlowKey, connection: &Connection) -> bool {
        put(&self.connections, flow, *connection);
        true
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Upper> {
        self.fragments.borrow().get(key).copied()
    }

    fn set_fragment(&self, key: &FragmentKey, upper: &Upper) {
        self.fragments.borrow_mut().insert(*key, *upper);
    }

    fn trace(&self, index: u32) -> Option<u64> {
        let placed = self
            .image
            .traces
            .values()
            .find(|one| (one.start..one.start + one.trace.len()).contains(&index))?;
        placed
            .trace
            .nanoseconds()
            .nth((index - placed.start) as usize)
    }

    fn histograms(&self, slot: u32) -> Option<*mut Histograms> {
        if pointer(&self.histograms, &slot).is_none() {
            put(&self.histograms, &slot, Histograms::default());
        }
        pointer(&self.histograms, &slot)
    }

    fn rule_counters(&self, index: u32) -> Option<*mut RuleCounters> {
        if pointer(&self.rule_counters, &index).is_none() {
            put(&self.rule_counters, &index, RuleCounters::default());
        }
        pointer(&self.rule_counters, &index)
    }

    fn target_counters(&self, index: u32) -> Option<*mut TargetCounters> {
        if pointer(&self.target_counters, &index).is_none() {
            put(&self.target_counters, &index, TargetCounters::default());
        }
        pointer(&self.target_counters, &index)
    }

    fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }

    fn apart<P: Part>(&self, work: &mut Work) -> u32 {
        P::run(self, work)
    }

    fn repeat<S: Step>(&self, times: u32, work: &mut Work) {
        for index in 0..times {
            if !S::step(self, index, work) {
                break;
            }
        }
    }
}

/// The shared code.
#[derive(Default)]
pub struct Shared {
    memory: Memory,
    compiler: Compiler,
    placing: Placing,
    targets: Vec<TargetConfig>,
    /// Rule sets so far. The epoch is 0 for one without rules, as in the kernel.
    sets: u64,
}

impl Shared {
    fn commit(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let now_ns = self.memory.now_ns.get();
        let ready = self.placing.place(setup, now_ns, Duration::ZERO)?;
        let Ready {
            targets,
            rules,
            exempt,
            fresh,
        } = ready;
        for slot in fresh {
            for direction in [0, 1] {
                let index = (MAX_EXEMPTIONS + u32::from(slot.0)) * 2 + direction;
                self.memory.rule_counters.get_mut().remove(&index);
            }
        }
        self.memory.image = self.compiler.compile(&targets, &rules, &exempt, CAPACITY)?;
        self.memory.classes.get_mut().clear();
        self.sets += 1;
        let epoch = if rules.is_empty() { 0 } else { self.sets };
        self.memory.config.epoch = epoch;
        let copy = (self.sets & 1) as usize;
        self.memory.targets.clear();
        for target in &targets {
            let own = self
                .memory
                .image
                .targets
                .get(&target.slot)
                .copied()
                .unwrap_or_default();
            let mut entry = Target {
                l2_length: if target.link == injector::dataplane::LinkKind::Ethernet {
                    14
                } else {
                    0
                },
                loopback: u32::from(target.loopback),
                ..Target::default()
            };
            entry.bitmap[copy] = own.bitmap;
            entry.track[copy] = u32::from(own.track);
            self.memory.targets.insert(u32::from(target.slot.0), entry);
        }
        self.targets = targets;
        Ok(())
    }

    fn counters_of_target(&self, slot: u16) -> [TargetCounters; 2] {
        [0, 1].map(|direction| {
            let index = u32::from(slot) * 2 + direction;
            pointer(&self.memory.target_counters, &index)
                // SAFETY: in the table, and no packet is being decided.
                .map_or_else(TargetCounters::default, |counters| unsafe { *counters })
        })
    }

    fn unparsed(&self, slot: u16) -> u64 {
        self.counters_of_target(slot)
            .iter()
            .map(|counters| counters.unparsed_packets)
            .sum()
    }
}

impl Subject for Shared {
    fn name(&self) -> String {
        "shared".to_owned()
    }

    fn install(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.placing.forget();
        self.memory = Memory::default();
        self.memory.now_ns.set(START_NS + CHANGE_GAP_NS);
        self.commit(setup)?;
        self.set_lease(true)
    }

    fn replace(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.memory
            .now_ns
            .set(self.memory.now_ns.get() + CHANGE_GAP_NS);
        self.commit(setup)
    }

    fn set_lease(&mut self, valid: bool) -> anyhow::Result<()> {
        self.memory.config.lease_until_ns = if valid { u64::MAX } else { 1 };
        Ok(())
    }

    fn decide(&mut self, packet: &Packet) -> anyhow::Result<Outcome> {
        self.memory
            .now_ns
            .set(self.memory.now_ns.get() + PACKET_GAP_NS);
        let meta = Meta {
            length: u32::try_from(packet.bytes.len())?,
            gso_size: u32::from(packet.gso_size),
            gso_segs: u32::from(packet.gso_segs),
            mark: packet.mark,
            protocol: packet.protocol,
            target: packet.target,
            hook: direction(packet.hook),
        };
        let before = self.unparsed(packet.target);
        let verdict = decide(&mut packet.bytes.as_slice(), meta, &self.memory);
        let unparsed = self.unparsed(packet.target) != before;
        Ok(Outcome {
            cut: verdict != Verdict::Pass,
            answered: matches!(verdict, Verdict::Reject(_)),
            unparsed: Some(unparsed),
        })
    }

    fn rule_counters(&mut self) -> anyhow::Result<Vec<[RuleOutcome; 2]>> {
        let of_slot = |slot: &injector::dataplane::RuleSlot| {
            [0, 1].map(|direction| {
                let index = (MAX_EXEMPTIONS + u32::from(slot.0)) * 2 + direction;
                pointer(&self.memory.rule_counters, &index)
                    // SAFETY: in the table, and no packet is being decided.
                    .map_or_else(RuleOutcome::default, |counters| unsafe {
                        rule_outcome(&*counters)
                    })
            })
        };
        Ok(self.placing.slots().iter().map(of_slot).collect())
    }

    fn target_counters(&mut self) -> anyhow::Result<Option<Vec<[TargetOutcome; 2]>>> {
        let mut result = Vec::new();
        for target in &self.targets {
            let counters = self.counters_of_target(target.slot.0);
            counters.iter().try_for_each(check)?;
            result.push(counters.map(|counters| target_outcome(&counters)));
        }
        Ok(Some(result))
    }
}
