//! Lines of limited rate, with a queue in front: when a packet has its turn, when it is through, whether there is
//! room for it.
//!
//! A line is one number that only grows, exchanged as a whole: how far it is taken by the packets so far. At a
//! constant rate that is a time, the end of the last packet. Under a trace it is a place, counted in bytes from the
//! activation on, where each opportunity of the trace has [`OPPORTUNITY_BYTES`]: a packet takes the bytes that follow
//! on those of the one before, but none of opportunities that have gone by, and is through when the opportunity with
//! its last byte comes (`LinkQueue::rationalize`, `src/frontend/link_queue.cc` in Mahimahi).
//!
//! Packets have their turns in the order in which they are decided.

use crate::{
    decide::{Step, Tables, Work, every},
    layout::{
        BYTE_TIME_SCALE, FlowKey, MAX_CANDIDATES, MAX_TRACE, OPPORTUNITY_BYTES, RuleEntry, Shape,
        StateKey, hook, kind, queue_limit, rate_share, stage, state_site,
    },
    line::{Acting, Spread, acting, hold, record},
};

/// Rounds in which a binary search has looked through the longest trace.
const SEARCH_ROUNDS: u32 = MAX_TRACE.ilog2() + 1;

/// Bytes that Mahimahi counts besides the IP packet: the header of a TUN device (`struct tun_pi`,
/// `include/uapi/linux/if_tun.h`), with which a packet of 1500 bytes fills an opportunity.
const TUN_HEADER: u32 = 4;

/// A search for the first opportunity of a trace that is not before a time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Search {
    /// The first entry of the trace.
    pub start: u32,
    /// It is not below this one, counted from `start`.
    pub low: u32,
    /// It is below this one or is this one.
    pub high: u32,
    /// Zero.
    pub reserved: u32,
    /// The time, nanoseconds into the trace.
    pub at_ns: u64,
}

/// The line of one rule a round.
pub(crate) struct Queue;

impl Step for Queue {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let at = index as usize & (MAX_CANDIDATES - 1);
        if let Some(acting) = acting(tables, work, at, stage::RATE) {
            queue(tables, acting, work, at);
        }
        work.line.at_ns != 0
    }
}

/// Says which line of a rule the packet takes: `work.state`.
#[inline(always)]
fn identify_line(rule: &RuleEntry, shape: &Shape, work: &mut Work) {
    work.state = StateKey {
        flow: work.key,
        activation: rule.activation,
        index: 0,
    };
    if shape.rate_share != rate_share::FLOW {
        work.state.flow = FlowKey::default();
    }
    if shape.rate_share == rate_share::PEER {
        work.state.flow.low = if work.meta.hook == hook::EGRESS {
            work.parsed.destination
        } else {
            work.parsed.source
        };
        // A peer's neighbour discovery is on the line of its other packets.
        work.state.flow.kind = if work.key.kind == kind::ND {
            kind::V6
        } else {
            work.key.kind
        };
    }
    work.state.flow.site = state_site::LINE + (work.meta.hook & 1) as u16;
}

/// Bytes of the packet at hand on a line; at least 1.
#[inline(always)]
fn bytes_on_line(shape: &Shape, work: &Work) -> u64 {
    let around = if shape.trace_length == 0 {
        work.parsed.network_offset
    } else {
        TUN_HEADER
    };
    let more = i64::from(around) + i64::from(shape.overhead);
    let count = work.segments.count;
    let packets = every(&work.segments).bytes;
    let bytes = packets.cast_signed() + i64::from(count) * more;
    if bytes < 1 { 1 } else { bytes.cast_unsigned() }
}

/// How long `bytes` are on a line of constant rate, nanoseconds, rounded down.
#[inline(always)]
#[must_use]
pub const fn line_time(shape: &Shape, bytes: u64) -> u64 {
    (bytes * shape.byte_time) >> BYTE_TIME_SCALE
}

/// Bytes that take so long on a line of constant rate, rounded down; times are below 2^43 ns.
#[inline(always)]
#[must_use]
pub const fn line_bytes(shape: &Shape, ns: u64) -> u64 {
    match (ns << BYTE_TIME_SCALE).checked_div(shape.byte_time) {
        Some(bytes) => bytes,
        None => 0,
    }
}

/// Sends the copy at hand through a rule's line: it waits until its turn comes, and is on the line for as long as its
/// bytes take.
#[inline(always)]
fn queue<T: Tables>(tables: &T, acting: Acting<'_>, work: &mut Work, at: usize) {
    let Acting {
        rule,
        shape,
        counters,
    } = acting;
    identify_line(rule, shape, work);
    let Some((state, _)) = tables.remember(&work.state, work.now_ns) else {
        work.full += 1;
        counters.stateless_packets += 1;
        return;
    };
    // SAFETY: valid by `Tables`.
    let place = unsafe { &raw mut (*state).n };
    let arrives = work.line.at_ns;
    let bytes = bytes_on_line(shape, work);
    let traced = shape.trace_length != 0;
    // Where the line would begin if it were idle, and how much of it the packet takes.
    let (idle, size) = if traced {
        let Some(first) = opportunity_at(tables, rule, shape, work) else {
            work.missing = 1;
            return;
        };
        (first * OPPORTUNITY_BYTES, bytes)
    } else {
        (arrives, line_time(shape, bytes))
    };
    if shape.queue_limit == queue_limit::PACKETS && !has_room(tables, shape, work, arrives) {
        counters.overflow_packets += 1;
        work.line.at_ns = 0;
        return;
    }
    let mut taken = 0;
    let mut done = false;
    // Another CPU may send a packet in between; eight times in a row it hardly does.
    for _ in 0..8 {
        // SAFETY: as above.
        taken = unsafe { core::ptr::read_volatile(place) };
        let begins = if taken > idle { taken } else { idle };
        let Some(turn) = time_at(tables, rule, shape, begins) else {
            work.missing = 1;
            return;
        };
        if is_too_much(shape, begins - idle, bytes, turn.saturating_sub(arrives)) {
            counters.overflow_packets += 1;
            work.line.at_ns = 0;
            return;
        }
        // SAFETY: as above.
        if unsafe { tables.exchange(place, taken, begins + size) } == taken {
            done = true;
            break;
        }
    }
    if !done {
        // Adding cannot fail. What it does not do is to skip the time in which a line was idle; others have just
        // sent, so there was none.
        // SAFETY: as above.
        taken = unsafe { tables.increment(place, size) };
    }
    let begins = if taken > idle { taken } else { idle };
    let (Some(turn), Some(ends)) = (
        time_at(tables, rule, shape, begins),
        time_at(tables, rule, shape, begins + size - u64::from(traced)),
    ) else {
        work.missing = 1;
        return;
    };
    // Under a trace the opportunity of its first byte may be that of the last packet's last one.
    let free = if taken <= idle {
        arrives
    } else if traced {
        time_at(tables, rule, shape, taken - 1).unwrap_or(arrives)
    } else {
        taken
    };
    let waits = turn.saturating_sub(arrives);
    counters.queued_packets += 1;
    counters.queued_bytes += bytes;
    counters.queued_ns += waits;
    counters.busy_ns += ends.saturating_sub(free);
    if waits > counters.queued_max_ns {
        counters.queued_max_ns = waits;
    }
    record(tables, work, at, Spread::Queued, waits, 1);
    if waits > shape.ecn_ns {
        work.line.mark |= 1 << at;
    }
    // SAFETY: as above.
    unsafe { core::ptr::write_volatile(&raw mut (*state).stream, ends) };
    if shape.queue_limit == queue_limit::PACKETS {
        enter_ring(tables, shape, work, turn);
    }
    hold(rule, work);
    work.line.at_ns = ends;
}

/// Whether a queue that is limited in time or bytes has no room. `backlog` is what is to go before the packet, in
/// nanoseconds, or in bytes under a trace.
#[inline(always)]
fn is_too_much(shape: &Shape, backlog: u64, bytes: u64, waits: u64) -> bool {
    if waits > shape.longest_ns {
        return true;
    }
    match shape.queue_limit {
        queue_limit::TIME => waits > shape.queue,
        queue_limit::BYTES => {
            let before = if shape.trace_length == 0 {
                line_bytes(shape, backlog)
            } else {
                backlog
            };
            backlog != 0 && before + bytes > shape.queue
        }
        _ => false,
    }
}

/// When a line comes to a place of its own: that time, or that of the opportunity with this byte.
#[inline(always)]
fn time_at<T: Tables>(tables: &T, rule: &RuleEntry, shape: &Shape, place: u64) -> Option<u64> {
    if shape.trace_length == 0 {
        return Some(place);
    }
    let length = u64::from(shape.trace_length);
    let opportunity = place / OPPORTUNITY_BYTES;
    let (round, number) = (
        opportunity.checked_div(length)?,
        opportunity.checked_rem(length)?,
    );
    let into = tables.trace(shape.trace_start.wrapping_add(number as u32))?;
    Some(rule.activated_ns + round * shape.trace_period_ns + into)
}

/// The number, from 0, of the first opportunity since the activation that is not before the copy at hand arrives.
#[inline(always)]
fn opportunity_at<T: Tables>(
    tables: &T,
    rule: &RuleEntry,
    shape: &Shape,
    work: &mut Work,
) -> Option<u64> {
    let since = work.line.at_ns.saturating_sub(rule.activated_ns);
    let round = since.checked_div(shape.trace_period_ns)?;
    work.search = Search {
        start: shape.trace_start,
        low: 0,
        high: shape.trace_length,
        reserved: 0,
        at_ns: since.checked_rem(shape.trace_period_ns)?,
    };
    tables.repeat::<Halve>(SEARCH_ROUNDS, work);
    (work.missing == 0).then(|| round * u64::from(shape.trace_length) + u64::from(work.search.low))
}

/// Halves what is left to be searched.
struct Halve;

impl Step for Halve {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, _index: u32, work: &mut Work) -> bool {
        let search = &mut work.search;
        if search.low >= search.high {
            return false;
        }
        let middle = search.low.midpoint(search.high);
        let Some(time) = tables.trace(search.start.wrapping_add(middle)) else {
            work.missing = 1;
            return false;
        };
        if time < search.at_ns {
            search.low = middle + 1;
        } else {
            search.high = middle;
        }
        true
    }
}

/// Whether fewer packets than the limit wait: as many packets ago the line's turn had come.
#[inline(always)]
fn has_room<T: Tables>(tables: &T, shape: &Shape, work: &mut Work, arrives: u64) -> bool {
    work.state.flow.site = state_site::RING + (work.meta.hook & 1) as u16;
    let taken = tables.state(&work.state).unwrap_or(0);
    if taken < shape.queue {
        return true;
    }
    work.state.index = ring_index(shape, taken);
    // Where there was no room for its entry the packet was counted.
    tables.state(&work.state).is_none_or(|turn| turn <= arrives)
}

/// The place of packet `number` (from 0) in a ring.
#[inline(always)]
fn ring_index(shape: &Shape, number: u64) -> u32 {
    1 + number.checked_rem(shape.queue).unwrap_or(0) as u32
}

/// Writes down when the packet at hand has its turn. Two that are taken at one time by two CPUs may change places.
#[inline(always)]
fn enter_ring<T: Tables>(tables: &T, shape: &Shape, work: &mut Work, turn: u64) {
    work.state.flow.site = state_site::RING + (work.meta.hook & 1) as u16;
    work.state.index = 0;
    let Some((count, _)) = tables.remember(&work.state, work.now_ns) else {
        work.full += 1;
        return;
    };
    // SAFETY: valid by `Tables`.
    let number = unsafe {
        core::ptr::write_volatile(&raw mut (*count).stream, turn);
        tables.increment(&raw mut (*count).n, 1)
    };
    work.state.index = ring_index(shape, number);
    let Some((state, _)) = tables.remember(&work.state, work.now_ns) else {
        work.full += 1;
        return;
    };
    // SAFETY: as above.
    unsafe {
        core::ptr::write_volatile(&raw mut (*state).n, turn);
        core::ptr::write_volatile(&raw mut (*state).stream, turn);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        boxed::Box,
        cell::{Cell, RefCell, UnsafeCell},
        collections::HashMap,
        vec::Vec,
    };

    use super::*;
    use crate::{
        decide::{Advanced, Part},
        layout::{
            Bitmap, Class, Config, Connection, Distribution, FlowEntry, Flushed, FragmentKey, Held,
            Histograms, MAX_EXEMPTIONS, Prefix, RuleCounters, State, Target, TargetCounters, Upper,
        },
        segments::Segments,
    };

    /// One rule in memory, whose packets come to its line one by one.
    struct World {
        rule: RuleEntry,
        shape: Shape,
        trace: Vec<u64>,
        counters: UnsafeCell<RuleCounters>,
        histograms: Box<UnsafeCell<Histograms>>,
        states: RefCell<HashMap<StateKey, Box<UnsafeCell<State>>>>,
        /// Exchanges that are to fail, since others come in between.
        rivals: Cell<u32>,
        work: UnsafeCell<Box<Work>>,
    }

    impl World {
        fn new(shape: Shape) -> Self {
            Self {
                rule: RuleEntry {
                    activated_ns: 1_000_000_000,
                    ..RuleEntry::default()
                },
                shape: Shape {
                    stages: stage::RATE,
                    longest_ns: u64::MAX,
                    ecn_ns: u64::MAX,
                    ..shape
                },
                trace: Vec::new(),
                counters: UnsafeCell::default(),
                histograms: Box::default(),
                states: RefCell::default(),
                rivals: Cell::new(0),
                work: UnsafeCell::default(),
            }
        }

        /// A trace of these milliseconds.
        fn traced(milliseconds: &[u64], shape: Shape) -> Self {
            let trace: Vec<u64> = milliseconds.iter().map(|time| time * 1_000_000).collect();
            let mut world = Self::new(Shape {
                trace_start: 7,
                trace_length: u32::try_from(trace.len()).unwrap(),
                trace_period_ns: *trace.last().unwrap(),
                ..shape
            });
            world.trace = trace;
            world
        }

        /// When an IP packet of `length` bytes that arrives `at` ns after the activation is through; 0 if it is
        /// lost.
        fn send(&self, at: u64, length: u32) -> u64 {
            // SAFETY: one thread, and nobody holds a reference between two calls.
            let work = unsafe { &mut **self.work.get() };
            work.segments = Segments {
                count: 1,
                full_length: length,
                last_length: length,
            };
            work.found.count = 1;
            work.found.slots[0] = u16::try_from(MAX_EXEMPTIONS).unwrap();
            work.line.n[0] = 1;
            work.line.mark = 0;
            work.line.at_ns = self.rule.activated_ns + at;
            work.now_ns = work.line.at_ns;
            self.repeat::<Queue>(1, work);
            assert_eq!(work.missing, 0);
            work.line.at_ns.saturating_sub(self.rule.activated_ns)
        }

        fn counters(&self) -> RuleCounters {
            // SAFETY: as above.
            unsafe { *self.counters.get() }
        }

        fn marked(&self) -> bool {
            // SAFETY: as above.
            unsafe { (*self.work.get()).line.mark != 0 }
        }
    }

    impl Tables for World {
        fn rule(&self, _: u32) -> Option<*const RuleEntry> {
            Some(&raw const self.rule)
        }
        fn shape(&self, _: u32) -> Option<*const Shape> {
            Some(&raw const self.shape)
        }
        fn rule_counters(&self, _: u32) -> Option<*mut RuleCounters> {
            Some(self.counters.get())
        }
        fn histograms(&self, slot: u32) -> Option<*mut Histograms> {
            (slot == 0).then(|| self.histograms.get())
        }
        fn trace(&self, index: u32) -> Option<u64> {
            let index = index.checked_sub(self.shape.trace_start)?;
            self.trace.get(usize::try_from(index).unwrap()).copied()
        }
        fn remember(&self, key: &StateKey, now_ns: u64) -> Option<(*mut State, bool)> {
            let mut states = self.states.borrow_mut();
            let created = !states.contains_key(key);
            let state = states.entry(*key).or_default().get();
            // SAFETY: in the table.
            unsafe { (*state).last_ns = now_ns };
            Some((state, created))
        }
        fn state(&self, key: &StateKey) -> Option<u64> {
            // SAFETY: in the table.
            self.states
                .borrow()
                .get(key)
                .map(|state| unsafe { (*state.get()).n })
        }
        unsafe fn exchange(&self, word: *mut u64, old: u64, new: u64) -> u64 {
            // SAFETY: as the caller promises.
            unsafe {
                if self.rivals.get() > 0 {
                    self.rivals.set(self.rivals.get() - 1);
                    *word += 1000;
                }
                let found = *word;
                if found == old {
                    *word = new;
                }
                found
            }
        }
        unsafe fn increment(&self, word: *mut u64, by: u64) -> u64 {
            // SAFETY: as the caller promises.
            unsafe {
                let before = *word;
                *word = before + by;
                before
            }
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
        fn config(&self) -> Option<*const Config> {
            None
        }
        fn target(&self, _: u32) -> Option<*const Target> {
            None
        }
        fn protocol(&self, _: u32) -> Option<u32> {
            None
        }
        fn port(&self, _: u32) -> Option<*const Class> {
            None
        }
        fn address(&self, _: &Prefix) -> Option<*const Class> {
            None
        }
        fn bitmap(&self, _: u32, _: u32) -> Option<*const Bitmap> {
            None
        }
        fn idle(&self, _: &FlowKey) -> Option<u64> {
            None
        }
        fn set_idle(&self, _: &FlowKey, _: u64) {}
        fn flow(&self, _: &FlowKey) -> Option<*mut FlowEntry> {
            None
        }
        fn set_flow(&self, _: &FlowKey, _: &FlowEntry) -> bool {
            false
        }
        fn work(&self) -> Option<*mut Work> {
            None
        }
        fn advance(&self, _: &StateKey, _: u64, _: u64) -> Option<Advanced> {
            None
        }
        fn create_state(&self, _: &StateKey, _: u64, _: u64) -> bool {
            false
        }
        fn connection(&self, _: &FlowKey) -> Option<*mut Connection> {
            None
        }
        fn set_connection(&self, _: &FlowKey, _: &Connection) -> bool {
            false
        }
        fn fragment(&self, _: &FragmentKey) -> Option<Upper> {
            None
        }
        fn set_fragment(&self, _: &FragmentKey, _: &Upper) {}
        fn distribution(&self, _: u32) -> Option<*const Distribution> {
            None
        }
        fn held(&self, _: &FlowKey) -> Option<*mut Held> {
            None
        }
        fn hold(&self, _: &FlowKey) -> Option<*mut Held> {
            None
        }
        fn underway(&self, _: u32) -> u64 {
            0
        }
        fn flushed(&self, _: u16) -> Option<*mut Flushed> {
            None
        }
        fn target_counters(&self, _: u32) -> Option<*mut TargetCounters> {
            None
        }
        fn now_ns(&self) -> u64 {
            0
        }
    }

    /// 8 Mbit/s: a microsecond a byte.
    fn microsecond_a_byte() -> Shape {
        Shape {
            byte_time: 1000 << BYTE_TIME_SCALE,
            queue: u64::MAX,
            ..Shape::default()
        }
    }

    #[test]
    fn packets_follow_each_other_at_the_rate() {
        let world = World::new(microsecond_a_byte());
        assert_eq!(world.send(5_000, 100), 105_000);
        assert_eq!(world.send(5_000, 50), 155_000);
        assert_eq!(world.send(150_000, 10), 165_000);
        // Idle meanwhile.
        assert_eq!(world.send(500_000, 10), 510_000);
        let counters = world.counters();
        assert_eq!(counters.queued_packets, 4);
        assert_eq!(counters.queued_bytes, 170);
        assert_eq!(counters.busy_ns, 170_000);
        assert_eq!(counters.queued_ns, 100_000 + 5_000);
        assert_eq!(counters.queued_max_ns, 100_000);
    }

    #[test]
    fn overhead_counts_and_nothing_is_shorter_than_a_byte() {
        let more = World::new(Shape {
            overhead: 24,
            ..microsecond_a_byte()
        });
        assert_eq!(more.send(0, 100), 124_000);
        let less = World::new(Shape {
            overhead: -1000,
            ..microsecond_a_byte()
        });
        assert_eq!(less.send(0, 100), 1000);
    }

    #[test]
    fn a_queue_limited_in_time() {
        let world = World::new(Shape {
            queue: 250_000,
            ..microsecond_a_byte()
        });
        let taken: Vec<u64> = (0..5).map(|_| world.send(0, 100)).collect();
        assert_eq!(taken, [100_000, 200_000, 300_000, 0, 0]);
        // 50 us later the last one's turn would come after exactly as long as may be.
        assert_eq!(world.send(50_000, 100), 400_000);
        assert_eq!(world.counters().overflow_packets, 2);
    }

    #[test]
    fn a_queue_limited_in_bytes() {
        let world = World::new(Shape {
            queue_limit: queue_limit::BYTES,
            queue: 300,
            ..microsecond_a_byte()
        });
        let taken: Vec<u64> = (0..5).map(|_| world.send(0, 100)).collect();
        assert_eq!(taken, [100_000, 200_000, 300_000, 0, 0]);
        assert_eq!(world.send(50_000, 51), 0);
        assert_eq!(world.send(50_000, 50), 350_000);
        // What is longer than the queue finds room on an idle line.
        assert_eq!(world.send(1_000_000, 400), 1_400_000);
        assert_eq!(world.send(1_399_000, 300), 0);
    }

    /// Against the definition: how many packets wait, counted one by one.
    #[test]
    fn a_queue_limited_in_packets() {
        for limit in [1_u64, 2, 7, 100] {
            let world = World::new(Shape {
                queue_limit: queue_limit::PACKETS,
                queue: limit,
                ..microsecond_a_byte()
            });
            let mut turns: Vec<u64> = Vec::new();
            let mut lost = 0;
            let (mut now, mut seed) = (0_u64, 1_u64);
            for _ in 0..5000 {
                seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(99);
                now += (seed >> 33) % 90_000;
                let length = 40 + u32::try_from((seed >> 20) % 60).unwrap();
                let waiting = turns.iter().filter(|turn| **turn > now).count();
                let through = world.send(now, length);
                if waiting as u64 >= limit {
                    assert_eq!(through, 0, "{waiting} of {limit} wait");
                    lost += 1;
                } else {
                    assert_ne!(through, 0, "{waiting} of {limit} wait");
                    turns.push(through - u64::from(length) * 1000);
                }
            }
            assert_eq!(world.counters().overflow_packets, lost);
            assert!(
                limit > 7 || lost > 100,
                "the limit of {limit} was never reached"
            );
        }
    }

    #[test]
    fn nobody_waits_longer_than_the_longest() {
        let mut world = World::new(Shape {
            queue_limit: queue_limit::PACKETS,
            queue: 100,
            ..microsecond_a_byte()
        });
        world.shape.longest_ns = 150_000;
        let taken: Vec<u64> = (0..3).map(|_| world.send(0, 100)).collect();
        assert_eq!(taken, [100_000, 200_000, 0]);
    }

    #[test]
    fn marks_above_the_sojourn() {
        let mut world = World::new(microsecond_a_byte());
        world.shape.ecn_ns = 100_000;
        let marked: Vec<bool> = (0..4)
            .map(|_| {
                world.send(0, 100);
                world.marked()
            })
            .collect();
        assert_eq!(marked, [false, false, true, true]);
    }

    #[test]
    fn a_lost_race_costs_no_packet_and_no_time() {
        for rivals in [1, 7, 8, 9, 100] {
            let world = World::new(microsecond_a_byte());
            assert_eq!(world.send(0, 100), 100_000);
            world.rivals.set(rivals);
            // Each rival takes a microsecond of the line.
            let before = 100_000 + u64::from(rivals.min(8)) * 1000;
            assert_eq!(world.send(0, 100), before + 100_000, "{rivals}");
            world.rivals.set(0);
            assert_eq!(world.send(0, 100), before + 200_000, "{rivals}");
            assert_eq!(world.counters().queued_packets, 3);
        }
    }

    #[test]
    fn peers_and_flows_have_lines_of_their_own() {
        for (share, alone) in [
            (rate_share::RULE, false),
            (rate_share::FLOW, true),
            (rate_share::PEER, true),
        ] {
            let world = World::new(Shape {
                rate_share: share,
                ..microsecond_a_byte()
            });
            assert_eq!(world.send(0, 100), 100_000);
            // SAFETY: nobody holds a reference.
            unsafe {
                (*world.work.get()).key.low[0] = 9;
                (*world.work.get()).parsed.destination[0] = 9;
            }
            let through = world.send(0, 100);
            assert_eq!(through == 100_000, alone, "{share}: {through}");
        }
    }

    const MS: u64 = 1_000_000;
    /// Fills an opportunity: with the header of the TUN device 1504 bytes.
    const FULL: u32 = 1500;

    fn endless() -> Shape {
        Shape {
            queue: u64::MAX,
            ..Shape::default()
        }
    }

    #[test]
    fn a_trace_s_opportunities_are_used_one_by_one() {
        let world = World::traced(&[2, 2, 5, 10], endless());
        assert_eq!(world.send(0, FULL), 2 * MS);
        assert_eq!(world.send(0, FULL), 2 * MS);
        assert_eq!(world.send(0, FULL), 5 * MS);
        assert_eq!(world.send(0, FULL), 10 * MS);
        // It begins again after 10 ms.
        assert_eq!(world.send(0, FULL), 12 * MS);
        assert_eq!(world.counters().busy_ns, 12 * MS);
        assert_eq!(world.counters().queued_bytes, 5 * 1504);
    }

    #[test]
    fn what_is_left_of_an_opportunity_is_used_by_those_who_are_there() {
        let world = World::traced(&[2, 5, 10], endless());
        // Three small ones share one; a larger one goes on in the next.
        assert_eq!(world.send(0, 496), 2 * MS);
        assert_eq!(world.send(0, 496), 2 * MS);
        assert_eq!(world.send(1, 1000), 5 * MS);
        // What is left of the one at 5 ms is lost to those who come later.
        assert_eq!(world.send(6 * MS, 100), 10 * MS);
        // An opportunity serves who comes at its time.
        assert_eq!(world.send(15 * MS, 100), 15 * MS);
        // 25 ms are two rounds and a half.
        assert_eq!(world.send(25 * MS + 1, 100), 30 * MS);
    }

    #[test]
    fn queues_in_front_of_a_trace() {
        let mut world = World::traced(&[1, 2, 3, 4, 5], endless());
        world.shape.queue = 2 * MS;
        // The turn of the third would come at 3 ms.
        let taken: Vec<u64> = (0..4).map(|_| world.send(0, FULL)).collect();
        assert_eq!(taken, [MS, 2 * MS, 0, 0]);

        let mut world = World::traced(&[1, 2, 3, 4, 5], endless());
        world.shape.queue_limit = queue_limit::BYTES;
        world.shape.queue = 3 * 1504;
        let taken: Vec<u64> = (0..4).map(|_| world.send(0, FULL)).collect();
        assert_eq!(taken, [MS, 2 * MS, 3 * MS, 0]);

        let mut world = World::traced(&[1, 2, 3, 4, 5], endless());
        world.shape.queue_limit = queue_limit::PACKETS;
        world.shape.queue = 1;
        // Nothing is on the line before the first opportunity comes: one waits.
        assert_eq!(world.send(0, FULL), MS);
        assert_eq!(world.send(0, FULL), 0);
        assert_eq!(world.send(MS, FULL), 2 * MS);
    }

    /// Against Mahimahi's own loop, packet by packet: each opportunity carries what has arrived by then.
    #[test]
    fn as_mahimahi_delivers() {
        let milliseconds = [0, 0, 3, 4, 4, 4, 9, 15, 15, 16];
        let world = World::traced(&milliseconds, endless());
        let mut arrivals = Vec::new();
        let (mut now, mut seed) = (0_u64, 7_u64);
        for _ in 0..400 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            now += (seed >> 33) % (4 * MS);
            arrivals.push((now, 30 + u32::try_from((seed >> 20) % 1470).unwrap()));
        }
        let ours: Vec<u64> = arrivals
            .iter()
            .map(|(at, length)| world.send(*at, *length))
            .collect();
        let mut theirs = Vec::new();
        let mut left = arrivals.iter().copied().peekable();
        let mut in_transit: Option<i64> = None;
        'rounds: for round in 0.. {
            for ms in milliseconds {
                let time = (round * 16 + ms) * MS;
                let mut room = 1504_i64;
                while room > 0 {
                    if in_transit.is_none() {
                        in_transit = left
                            .next_if(|(at, _)| *at <= time)
                            .map(|(_, length)| i64::from(length) + 4);
                    }
                    let Some(bytes) = in_transit else { break };
                    if bytes <= room {
                        room -= bytes;
                        in_transit = None;
                        theirs.push(time);
                    } else {
                        in_transit = Some(bytes - room);
                        room = 0;
                    }
                }
            }
            if theirs.len() == arrivals.len() {
                break 'rounds;
            }
        }
        assert_eq!(ours, theirs);
    }
}
