//! The decision about one wire packet in a lane: which rules it meets was settled at its target's hook, what
//! each of them does to it is settled here, in fixed stages.
//!
//! 1. cut, positional loss, length, random loss;
//! 2. corruption;
//! 3. duplication;
//! 4. rate and queue;
//! 5. delay, holding back;
//! 6. stall.
//!
//! Every rule takes part in each stage, in the order of its slot. Delays add up, losses are independent. Whether a
//! packet is corrupted is decided with the first stages; the bits are chosen and turned over when the other stages
//! have let it go on ([`choose_bits`]), before copies are made of it.

use crate::{
    corrupt::{Ground, Repair, choose},
    decide::{
        Part, Step, Tables, Which, Work, acts, candidates, count_matched, every, hits, identify,
        identify_flow, matched, ordinal, read_once, too_long,
    },
    fate,
    histogram::{BUCKETS, bucket},
    holders,
    layout::{
        DISTRIBUTION_NORMAL, DISTRIBUTION_NORMAL_CDF, FlowKey, MAX_BITS, MAX_CANDIDATES,
        MAX_COPIES, MAX_EXEMPTIONS, MAX_SLOTS, RuleCounters, RuleEntry, Shape, corrupt_how, fault,
        identity, stage, state_site,
    },
    packet::{Packet, Unparsed, parse},
    rate::Queue,
    segments::{Meta, Segments},
    shape::{self, Memory, purpose},
};

const _: () = assert!(MAX_CANDIDATES.is_power_of_two() && MAX_BITS.is_power_of_two());

/// Packets that one can become: itself and its copies.
pub const SENT: usize = MAX_COPIES as usize + 1;

/// What a packet brings along from its target's hook.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// When its sender wants it to leave (a paced one), `CLOCK_MONOTONIC` in nanoseconds; 0 for at once.
    pub departure_ns: u64,
    /// When its connection was seen to begin ([`Work::connection`]).
    pub connection: u64,
    /// The `tc_index` that it had before it was marked.
    pub index: u64,
    /// Whether it went through the segmenter, so that its checksums are complete.
    pub complete: u32,
    /// Packets that have reached the line: what does not was lost on the way there.
    pub arrived: u32,
    /// Packets of whatever targets that lanes have meanwhile let leave on this CPU, of those that leave their host.
    pub left: u64,
    /// Those of them that came back to their target's hook: the others were lost on the way there.
    pub back: u64,
}

/// A sender's wish for a later departure counts up to so far ahead, nanoseconds: as far as fq honours it with its
/// usual horizon.
pub const PACED_MOST_NS: u64 = 10_000_000_000;

/// What becomes of a packet in a lane.
#[derive(Debug, Clone, Copy, Default)]
pub struct Line {
    /// By candidate: its number under the rule, from 1; 0 if the rule does not act on it.
    pub n: [u64; MAX_CANDIDATES],
    /// By candidate: the flow's random stream under the rule.
    pub stream: [u64; MAX_CANDIDATES],
    /// By candidate: the normal deviate of its delay, under rules with correlation.
    pub deviate: [i64; MAX_CANDIDATES],
    /// By candidate: bytes of the wire packets that the rule matches, with their frames' headers.
    pub bytes: [u64; MAX_CANDIDATES],
    /// By candidate: how many these are.
    pub packets: [u32; MAX_CANDIDATES],
    /// The candidates whose memory of the flow is more than a number, one bit each.
    pub remembering: u32,
    /// The candidates whose model of loss takes the packet, one bit each.
    pub struck: u32,
    /// The candidate at hand, where that is asked of a loop.
    pub at: u32,
    /// Whether its memory has been advanced.
    pub advanced: u32,
    /// Whether it is lost.
    pub lost: u32,
    /// Its copies.
    pub copies: u32,
    /// Whether it may be overtaken and overtake.
    pub free: u32,
    /// Whether its checksums are complete.
    pub complete: u32,
    /// [`stage`] of the rules that act on it, together.
    pub stages: u32,
    /// The candidates that ask for it to be marked (ECN), one bit each.
    pub mark: u32,
    /// When the copy at hand is through the lines of the rules so far; 0 if it was lost there.
    pub at_ns: u64,
    /// The copy at hand; 0 is the original.
    pub copy: u64,
    /// When its way through the lane begins: now, or when its sender wants it to leave.
    pub begin_ns: u64,
    /// Delay of the copy at hand.
    pub delay_ns: u64,
    /// [`holders`] of the copy at hand.
    pub holding: u64,
    /// [`Held::turn`](crate::layout::Held::turn) of its flow.
    pub turn: u64,
    /// By copy, the original first: its [`holders`].
    pub holders: [u64; SENT],
    /// By candidate: what the rule has given the original by delay and holding back.
    pub given_ns: [u64; MAX_CANDIDATES],
    /// By copy, the original first: when it is through all lines; 0 if it was lost.
    pub through_ns: [u64; SENT],
    /// By copy, the original first: delay after the original's.
    pub after_ns: [u64; SENT],
    /// By copy, the original first: when it leaves, `CLOCK_MONOTONIC` in nanoseconds; 0 if it was lost.
    pub leaves_ns: [u64; SENT],
    /// The candidates that corrupt it, one bit each.
    pub corrupt: u32,
    /// The candidate whose bits are being chosen.
    pub choosing: u32,
    /// By how much there are more bits to choose from than are to be chosen.
    pub spare: u32,
    /// The number that was drawn.
    pub drawn: u32,
    /// Whether it was chosen before.
    pub taken: u32,
    /// By copy, the original first: whether it leaves in its flow's order, one bit each.
    pub in_order: u32,
    /// The last copy of those that leave in order: the one that leaves last of them; 0 is the original.
    pub last: u32,
    /// Numbers of the bits that were chosen.
    pub chosen: [u32; MAX_BITS as usize],
    /// Their positions ([`crate::corrupt`]).
    pub bits: [u32; MAX_BITS as usize],
    /// From what they are chosen.
    pub ground: Ground,
    /// What their change adds to checksums that are to be repaired.
    pub repair: Repair,
}

/// What to do with a packet in a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineOutcome {
    /// It is lost.
    Lost,
    /// More of it can be read now: the same decision is to be made again.
    Again,
    /// It goes on, as [`Work::line`] says.
    Sent,
    /// It goes on at once: it could not be decided.
    Undecided,
}

/// Decides about a packet in a lane, and counts.
#[inline(always)]
pub fn line<P: Packet, T: Tables>(
    packet: &mut P,
    meta: Meta,
    entry: Entry,
    tables: &T,
) -> LineOutcome {
    let (Some(config), Some(target), Some(counters), Some(work)) = (
        tables.config(),
        tables.target(u32::from(meta.target)),
        tables.target_counters(u32::from(meta.target) * 2 + (meta.hook & 1)),
        tables.work(),
    ) else {
        return LineOutcome::Undecided;
    };
    // SAFETY: valid by `Tables`, and the caller's alone.
    let (counters, work) = unsafe { (&mut *counters, &mut *work) };
    let epoch = read_once!(config, epoch);
    work.meta = meta;
    work.epoch = epoch;
    work.copy = (epoch & 1) as u32;
    // SAFETY: valid by `Tables`; user space changes only the copy that is not in force.
    work.bitmap = unsafe { (*target).bitmap[work.copy as usize & 1][meta.hook as usize & 1] };
    let parsed = parse(
        packet,
        read_once!(target, l2_length),
        meta.protocol,
        &mut work.parsed,
    );
    if parsed == Err(Unparsed::Truncated) && packet.pull() {
        return LineOutcome::Again;
    }
    if parsed.is_err() {
        counters.errors += 1;
        counters.passed_packets += 1;
        return LineOutcome::Undecided;
    }
    work.entry = entry;
    let decided = tables.apart::<Deciding>(work);
    let packets = u64::from(work.segments.count);
    counters.table_full += u64::from(work.full);
    if work.missing != 0 {
        counters.errors += 1;
    }
    if decided == SENT_ON {
        counters.passed_packets += packets;
        if work.idle_lease != 0 {
            counters.lapsed_packets += packets;
        }
        return LineOutcome::Sent;
    }
    counters.cut_packets += packets;
    if decided == COPIES_ONLY {
        LineOutcome::Sent
    } else {
        LineOutcome::Lost
    }
}

/// What [`Deciding`] returns: the packet goes on.
const SENT_ON: u32 = 1;
/// What [`Deciding`] returns: copies of it go on, which have found room where it did not.
const COPIES_ONLY: u32 = 2;
/// What [`Deciding`] returns: nothing of it goes on.
const LOST: u32 = 0;

/// The fate of a packet in a lane, once it is parsed.
pub struct Deciding;

impl Part for Deciding {
    const WHICH: Which = Which::Deciding;

    #[inline(always)]
    fn run<T: Tables>(tables: &T, work: &mut Work) -> u32 {
        let Some(config) = tables.config() else {
            work.missing = 1;
            return LOST;
        };
        work.segments = Segments::of(&work.parsed, &work.meta);
        work.connection = work.entry.connection;
        work.orphans = 0;
        identify_flow(tables, work);
        work.full = 0;
        work.idle_lease = 0;
        work.missing = 0;
        work.found.count = 0;
        if work.epoch != 0 && candidates(tables, work).is_err() {
            work.missing = 1;
        }
        work.now_ns = tables.now_ns();
        work.lapsed = u32::from(work.now_ns >= read_once!(config, lease_until_ns));
        let line = &mut work.line;
        line.lost = 0;
        line.copies = 0;
        line.in_order = 0;
        line.last = 0;
        line.free = 0;
        line.stages = 0;
        line.mark = 0;
        line.corrupt = 0;
        line.remembering = 0;
        line.struck = 0;
        line.complete = work.entry.complete;
        // (`clamp` would bring a panic along.)
        let latest = work.now_ns.saturating_add(PACED_MOST_NS);
        line.begin_ns = work.entry.departure_ns.min(latest).max(work.now_ns);
        line.after_ns[0] = 0;
        line.holders[0] = 0;
        line.turn = 0;
        if work.missing == 0 && work.found.count != 0 {
            tables.repeat::<Meet>(work.found.count, work);
            if work.line.remembering != 0 {
                tables.repeat::<Remember>(work.found.count, work);
            }
            tables.repeat::<Strike>(work.found.count, work);
            if work.line.lost != 0 {
                return LOST;
            }
            tables.repeat::<Copy>(work.line.copies + 1, work);
        } else {
            work.line.leaves_ns[0] = work.line.begin_ns;
        }
        let outcome = if work.line.leaves_ns[0] != 0 {
            SENT_ON
        } else if work.line.copies == 0 {
            return LOST;
        } else {
            stand_in(&mut work.line);
            COPIES_ONLY
        };
        leave_in_order(tables, work);
        outcome
    }
}

/// Puts the first copy that has found room, and has no delay of its own, in the place of an original that has not.
#[inline(always)]
fn stand_in(line: &mut Line) {
    for copy in 1..SENT {
        if copy > line.copies as usize {
            break;
        }
        if line.leaves_ns[0] == 0 && line.after_ns[copy] == 0 {
            line.leaves_ns[0] = line.leaves_ns[copy];
            line.through_ns[0] = line.through_ns[copy];
            line.holders[0] = line.holders[copy];
            line.leaves_ns[copy] = 0;
        }
    }
}

/// Keeps a packet in its flow's order, with the copies that travel with it, as close as lines let them: those without
/// a delay of their own.
#[inline(always)]
fn leave_in_order<T: Tables>(tables: &T, work: &mut Work) {
    if work.line.free != 0 || work.line.leaves_ns[0] == 0 {
        return;
    }
    work.line.in_order = 1;
    let mut behind_ns = 0;
    for copy in 1..SENT {
        if copy > work.line.copies as usize {
            break;
        }
        if work.line.after_ns[copy] == 0 && work.line.leaves_ns[copy] != 0 {
            work.line.in_order |= 1 << copy;
            work.line.last = copy as u32;
            // Lines let no copy overtake the one before.
            behind_ns = behind(&work.line, copy);
        }
    }
    keep_order(tables, work, behind_ns);
    if work.line.last != 0 {
        for copy in 1..SENT {
            if work.line.in_order >> copy & 1 != 0 {
                work.line.leaves_ns[copy] = work.line.leaves_ns[0] + behind(&work.line, copy);
                work.line.holders[copy] = work.line.holders[0];
            }
        }
    }
}

/// How much later than the original a copy is through the lines.
#[inline(always)]
const fn behind(line: &Line, copy: usize) -> u64 {
    line.through_ns[copy].saturating_sub(line.through_ns[0])
}

/// Lets no packet leave before an earlier one of its flow whose order is kept; the last of its copies that travel with
/// it leaves so much later.
#[inline(always)]
fn keep_order<T: Tables>(tables: &T, work: &mut Work, behind_ns: u64) {
    let mut leaves = work.line.leaves_ns[0];
    let held = if leaves + behind_ns > work.now_ns {
        tables.hold(&work.key)
    } else {
        tables.held(&work.key)
    };
    let Some(held) = held else {
        // A packet that is held should have its place there.
        work.full += u32::from(leaves + behind_ns > work.now_ns);
        return;
    };
    // SAFETY: valid by `Tables`.
    let place = unsafe { &raw mut (*held).until_ns };
    let mut holders = work.line.holders[0];
    // A later packet of the same flow on another CPU may come between; three times in a row it does not. What is
    // stored beside the time is then another packet's: a flush may leave the flow waiting, or let it overtake.
    for _ in 0..3 {
        let until = read_once!(held, until_ns);
        let all = read_once!(held, holders);
        let waiting = until > work.now_ns;
        if waiting && holders::flushing(tables, all).is_some() {
            // All that is held of the flow will be dropped. fq lets a flow wait for its first packet as a whole, so
            // this one is queued apart.
            let last = until.max(read_once!(held, flushed_until_ns));
            // SAFETY: as above.
            unsafe {
                if tables.exchange(place, until, leaves + behind_ns) == until {
                    core::ptr::write_volatile(&raw mut (*held).flushed_until_ns, last);
                    tables.increment(&raw mut (*held).turn, 1);
                    break;
                }
            }
            continue;
        }
        if waiting {
            holders = holders::common(all, holders);
        }
        if until > leaves {
            leaves = until;
        }
        let last = leaves + behind_ns;
        // SAFETY: as above.
        if last == until || unsafe { tables.exchange(place, until, last) } == until {
            break;
        }
    }
    // SAFETY: as above.
    unsafe { core::ptr::write_volatile(&raw mut (*held).holders, holders) };
    work.line.turn = read_once!(held, turn);
    work.line.leaves_ns[0] = leaves;
}

/// Whether one rule a round acts on the packet, and its number under the rule: `n`, 0 where it does not.
struct Meet;

impl Step for Meet {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let at = index as usize & (MAX_CANDIDATES - 1);
        work.line.n[at] = 0;
        if let Some(met) = rule_at(tables, work, at) {
            meet(tables, met, work, at);
        }
        work.missing == 0
    }
}

/// The rule of candidate `at`: its entry, shape and counters.
#[inline(always)]
fn rule_at<'a, T: Tables>(tables: &'a T, work: &mut Work, at: usize) -> Option<Acting<'a>> {
    let slot = u32::from(work.found.slots[at]);
    let (Some(rule), Some(shape), Some(counters)) = (
        tables.rule(work.copy * MAX_SLOTS + slot),
        tables.shape(work.copy * MAX_SLOTS + slot),
        tables.rule_counters(slot * 2 + (work.meta.hook & 1)),
    ) else {
        work.missing = 1;
        return None;
    };
    // SAFETY: valid by `Tables`; what is in force is not written, counters are per CPU.
    let (rule, shape, counters) = unsafe { (&*rule, &*shape, &mut *counters) };
    Some(Acting {
        rule,
        shape,
        counters,
    })
}

#[inline(always)]
fn meet<T: Tables>(tables: &T, met: Acting<'_>, work: &mut Work, at: usize) {
    let Acting {
        rule,
        shape,
        counters,
    } = met;
    let slot = u32::from(work.found.slots[at]);
    let matched = matched(tables, rule, slot, work);
    let packets = u64::from(matched.packets);
    if packets == 0 || !acts(rule, work, counters, packets) {
        return;
    }
    let bytes = matched.bytes + packets * u64::from(work.parsed.network_offset);
    count_matched(work, counters, packets, bytes);
    identify(rule, work);
    let Some((state, created)) = tables.remember(&work.state, work.now_ns) else {
        // Without state nothing is drawn: only what does not depend on it happens.
        counters.stateless_packets += packets;
        work.full += 1;
        if fate::hits_all(rule) {
            lose(work, counters, packets, bytes);
        }
        return;
    };
    if created {
        counters.flows += 1;
    }
    // SAFETY: valid by `Tables`. Whoever computes the stream comes to the same.
    let mut stream = read_once!(state, stream);
    if stream == 0 && shape.stages != 0 {
        work.kept = work.state;
        let ordinal = if rule.identity == identity::ORDINAL {
            work.state.flow = work.key;
            let number = ordinal(tables, work);
            work.state = work.kept;
            fate::make_service(&mut work.state.flow);
            number
        } else {
            0
        };
        work.state.flow.site = 0;
        stream = shape::stream(rule, &work.state.flow, work.meta.hook, ordinal);
        work.state = work.kept;
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*state).stream, stream) };
    }
    work.line.stream[at] = stream;
    work.line.bytes[at] = bytes;
    work.line.packets[at] = matched.packets;
    work.line.stages |= shape.stages;
    if shape::remembers(shape) {
        work.line.remembering |= 1 << at;
        return;
    }
    // SAFETY: as above.
    let n = unsafe { tables.increment(&raw mut (*state).n, packets) } + 1;
    work.line.n[at] = n;
    if shape.stages & stage::LOSS != 0
        && shape::loss(shape, 0, shape::draw(rule, stream, n, purpose::LOSS)).0
    {
        work.line.struck |= 1 << at;
    }
}

/// Another CPU may advance a memory between reading and writing it; four times in a row it does not.
const REMEMBERING_ROUNDS: u32 = 4;

/// The memory of one rule a round, of those that remember more than a number.
struct Remember;

impl Step for Remember {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let at = index as usize & (MAX_CANDIDATES - 1);
        if work.line.remembering >> at & 1 != 0 {
            work.line.at = at as u32;
            if let Some(met) = rule_at(tables, work, at) {
                identify(met.rule, work);
                work.line.advanced = 0;
                tables.repeat::<Advance>(REMEMBERING_ROUNDS, work);
                if work.line.advanced == 0 {
                    // It has a number that another packet has too.
                    met.counters.stateless_packets += u64::from(work.line.packets[at]);
                }
            }
        }
        work.missing == 0
    }
}

/// Advances the memory of candidate `work.line.at` as a whole: the packet's number, and whether it is lost. A round is
/// an attempt.
struct Advance;

impl Step for Advance {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, _index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more candidates.
        let at = work.line.at as usize & (MAX_CANDIDATES - 1);
        let index = work.copy * MAX_SLOTS + u32::from(work.found.slots[at]);
        let (Some(rule), Some(shape), Some((state, _))) = (
            tables.rule(index),
            tables.shape(index),
            tables.remember(&work.state, work.now_ns),
        ) else {
            work.missing = 1;
            return false;
        };
        // SAFETY: valid by `Tables`; what is in force is not written, the number is written as a whole.
        let (rule, shape, place) = unsafe { (&*rule, &*shape, &raw mut (*state).n) };
        let old = read_once!(state, n);
        let stream = work.line.stream[at];
        let memory = Memory(old);
        let n = memory.n() + 1;
        let mut standing = 0;
        work.line.struck &= !(1 << at);
        if shape.stages & stage::LOSS != 0 {
            let draw = shape::draw(rule, stream, n, purpose::LOSS);
            let (lost, next) = shape::loss(shape, memory.loss(), draw);
            standing = next;
            if lost {
                work.line.struck |= 1 << at;
            }
        }
        let mut deviate = 0;
        if shape.correlation != 0
            && let Some(normal) = tables.distribution(DISTRIBUTION_NORMAL)
        {
            let draw = shape::upper(shape::draw(rule, stream, n, purpose::DELAY));
            // SAFETY: valid by `Tables`; tables in use are not written.
            let innovation = unsafe { shape::quantile(&*normal, draw) };
            deviate = if n == 1 {
                shape::first_deviate(innovation)
            } else {
                shape::correlate(shape, memory.deviate(), innovation)
            };
        }
        work.line.n[at] = n;
        work.line.deviate[at] = deviate;
        let new = Memory::new(n, standing, deviate);
        // SAFETY: as above.
        work.line.advanced = u32::from(unsafe { tables.exchange(place, old, new.0) } == old);
        work.line.advanced == 0
    }
}

/// The first stages of one rule a round: whether the packet is lost, corrupted, duplicated.
struct Strike;

impl Step for Strike {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let at = index as usize & (MAX_CANDIDATES - 1);
        if work.line.n[at] != 0
            && let Some(met) = rule_at(tables, work, at)
        {
            strike(tables, met, work, at);
        }
        work.missing == 0
    }
}

#[inline(always)]
fn strike<T: Tables>(tables: &T, met: Acting<'_>, work: &mut Work, at: usize) {
    let Acting {
        rule,
        shape,
        counters,
    } = met;
    let slot = u32::from(work.found.slots[at]);
    let packets = u64::from(work.line.packets[at]);
    let (n, stream) = (work.line.n[at], work.line.stream[at]);
    let hits = if rule.fault == fault::ONCE {
        identify(rule, work);
        once(tables, rule, work, packets)
    } else {
        hits(tables, rule, slot, work, n - 1, packets)
    };
    if hits != 0 {
        lose(work, counters, hits, work.line.bytes[at]);
        counters.excess_packets += u64::from(work.segments.count) - hits;
    }
    let too_long = too_long(rule, &work.segments, packets);
    if too_long != 0 {
        counters.too_long_packets += too_long;
        work.line.lost = 1;
    }
    if work.line.struck >> at & 1 != 0 {
        counters.lost_packets += packets;
        work.line.lost = 1;
    }
    // Before a segmenter has completed the checksum it would be computed over the changed bytes. A packet comes here
    // without one only if the rule began to act after it had passed the hook.
    if shape.stages & stage::CORRUPT != 0
        && work.line.complete != 0
        && shape::upper(shape::draw(rule, stream, n, purpose::CORRUPT)) < shape.corrupt
    {
        work.line.corrupt |= 1 << at;
    }
    if shape.stages & stage::DUPLICATE != 0
        && shape::upper(shape::draw(rule, stream, n, purpose::CHANCE)) < shape.duplicate
    {
        counters.duplicated_packets += packets;
        add_copies(rule, work, shape, counters);
    }
}

#[inline(always)]
fn lose(work: &mut Work, counters: &mut RuleCounters, packets: u64, bytes: u64) {
    counters.cut_packets += packets;
    counters.cut_bytes += bytes;
    work.line.lost = 1;
}

/// One shot: the first packet of the whole rule.
#[inline(always)]
fn once<T: Tables>(tables: &T, rule: &RuleEntry, work: &mut Work, packets: u64) -> u64 {
    work.kept = work.state;
    work.state.flow = FlowKey {
        site: state_site::RULE,
        ..FlowKey::default()
    };
    let before = tables
        .advance(&work.state, packets, work.now_ns)
        .map_or(1, |advanced| advanced.before);
    work.state = work.kept;
    fate::hits(rule, before, packets)
}

#[inline(always)]
fn add_copies(rule: &RuleEntry, work: &mut Work, shape: &Shape, counters: &mut RuleCounters) {
    for number in 0..MAX_COPIES {
        let at = work.line.copies as usize + 1;
        if number >= shape.copies || at >= SENT {
            break;
        }
        work.line.after_ns[at] = shape.copy_delay_ns;
        work.line.holders[at] = if shape.copy_delay_ns != 0 {
            u64::from(holders::name(rule.activation))
        } else {
            0
        };
        work.line.copies = at as u32;
        counters.copies += 1;
    }
}

/// Chooses the bits of the packet that the candidate `index` turns over ([`Line::bits`]), and counts. How many there
/// are, and whether checksums are to be repaired; `None` if it changes nothing.
#[inline(always)]
pub fn choose_bits<T: Tables>(tables: &T, index: u32, work: &mut Work) -> Option<(u32, u32)> {
    // A mask, which the verifier understands.
    let at = index as usize & (MAX_CANDIDATES - 1);
    if work.line.corrupt >> at & 1 == 0 {
        return None;
    }
    let Acting {
        shape, counters, ..
    } = acting(tables, work, at, stage::CORRUPT)?;
    // A frame can be longer than its packet (padding), and an IP packet claim more than there is.
    let stated = work.segments.last_length;
    let there = work.meta.length.saturating_sub(work.parsed.network_offset);
    let length = if stated < there { stated } else { there };
    let how = shape.corrupt_how;
    work.line.ground.find(&work.parsed, length, how);
    let bits = work.line.ground.bits();
    let count = if shape.corrupt_bits < bits {
        shape.corrupt_bits
    } else {
        bits
    };
    if count == 0 {
        return None;
    }
    counters.corrupted_packets += 1;
    work.line.choosing = at as u32;
    work.line.spare = bits - count;
    tables.repeat::<Choose>(count, work);
    Some((count, how & corrupt_how::REPAIR))
}

/// One more bit a round.
struct Choose;

impl Step for Choose {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        let at = work.line.choosing as usize & (MAX_CANDIDATES - 1);
        let slot = u32::from(work.found.slots[at]);
        let Some(rule) = tables.rule(work.copy * MAX_SLOTS + slot) else {
            return false;
        };
        // SAFETY: valid by `Tables`; what is in force is not written.
        let rule = unsafe { &*rule };
        let purpose = purpose::BIT + u64::from(index);
        let draw = shape::draw(rule, work.line.stream[at], work.line.n[at], purpose);
        let number = choose(draw, work.line.spare, index, |number| {
            work.line.drawn = number;
            work.line.taken = 0;
            tables.repeat::<Taken>(index, work);
            work.line.taken != 0
        });
        // A mask as above; there are no more rounds than bits.
        let place = (index & (MAX_BITS - 1)) as usize;
        work.line.chosen[place] = number;
        work.line.bits[place] = work.line.ground.position(number);
        true
    }
}

/// Whether the number at hand is one of those chosen before, one of them a round.
struct Taken;

impl Step for Taken {
    #[inline(always)]
    fn step<T: Tables>(_tables: &T, index: u32, work: &mut Work) -> bool {
        let place = (index & (MAX_BITS - 1)) as usize;
        work.line.taken = u32::from(work.line.chosen[place] == work.line.drawn);
        work.line.taken == 0
    }
}

/// The last stage: one copy a round, the original first.
struct Copy;

impl Step for Copy {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        let at = index as usize;
        if at >= SENT {
            return false;
        }
        work.line.copy = u64::from(index);
        work.line.delay_ns = work.line.after_ns[at];
        work.line.holding = work.line.holders[at];
        work.line.at_ns = work.line.begin_ns;
        let stages = work.line.stages;
        if stages & stage::RATE != 0 {
            tables.repeat::<Queue>(work.found.count, work);
        }
        let through = work.line.at_ns;
        if through != 0 {
            if stages & (stage::DELAY | stage::REORDER) != 0 {
                tables.repeat::<Delay>(work.found.count, work);
            }
            work.line.at_ns += work.line.delay_ns;
            if stages & stage::STALL != 0 {
                tables.repeat::<Stall>(work.found.count, work);
            }
        }
        // Read back: what was compared with the bound before the loops is not known to the verifier any more.
        let at = work.line.copy as usize;
        if at >= SENT {
            return false;
        }
        work.line.through_ns[at] = through;
        work.line.leaves_ns[at] = work.line.at_ns;
        work.line.holders[at] = work.line.holding;
        true
    }
}

/// A rule that acts on the packet at hand: its entry, shape and counters.
pub(crate) struct Acting<'a> {
    pub(crate) rule: &'a RuleEntry,
    pub(crate) shape: &'a Shape,
    pub(crate) counters: &'a mut RuleCounters,
}

/// The candidate `at`, if it acts and has one of these stages.
#[inline(always)]
pub(crate) fn acting<'a, T: Tables>(
    tables: &'a T,
    work: &mut Work,
    at: usize,
    stages: u32,
) -> Option<Acting<'a>> {
    if work.line.n[at] == 0 {
        return None;
    }
    let met = rule_at(tables, work, at)?;
    (met.shape.stages & stages != 0).then_some(met)
}

/// Notes that a rule holds the copy at hand.
#[inline(always)]
pub(crate) fn hold(rule: &RuleEntry, work: &mut Work) {
    work.line.holding = holders::with(work.line.holding, holders::name(rule.activation));
}

/// Which histogram of a rule a time goes into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spread {
    /// What the rule itself delays packets by.
    Given,
    /// What they wait for its line.
    Queued,
}

/// Counts `packets` in a histogram of candidate `at`.
#[inline(always)]
pub(crate) fn record<T: Tables>(
    tables: &T,
    work: &mut Work,
    at: usize,
    spread: Spread,
    ns: u64,
    packets: u64,
) {
    let slot = u32::from(work.found.slots[at]).wrapping_sub(MAX_EXEMPTIONS);
    let Some(histograms) = tables.histograms(slot) else {
        work.missing = 1;
        return;
    };
    // A mask, which the verifier understands; there are no more buckets.
    let bucket = bucket(ns) & (BUCKETS - 1);
    // SAFETY: valid by `Tables`, and within the array.
    unsafe {
        let counts = match spread {
            Spread::Given => (&raw mut (*histograms).given).cast::<u64>(),
            Spread::Queued => (&raw mut (*histograms).queued).cast::<u64>(),
        };
        tables.increment(counts.add(bucket), packets);
    }
}

/// Counts that the packet was marked, for the rules that asked for it.
#[inline(always)]
pub fn count_marked<T: Tables>(tables: &T, work: &mut Work) {
    tables.repeat::<Marked>(work.found.count, work);
}

/// One rule a round, of those that may have asked for a mark.
struct Marked;

impl Step for Marked {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let at = index as usize & (MAX_CANDIDATES - 1);
        if work.line.mark >> at & 1 != 0
            && let Some(acting) = acting(tables, work, at, stage::RATE)
        {
            acting.counters.marked_packets += 1;
        }
        true
    }
}

/// The stall of one rule a round.
struct Stall;

impl Step for Stall {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let at = index as usize & (MAX_CANDIDATES - 1);
        if let Some(acting) = acting(tables, work, at, stage::STALL) {
            let until =
                shape::stalled_until(acting.shape, acting.rule.activated_ns, work.line.at_ns);
            let mut stalled = 0;
            if until != 0 {
                stalled = until - work.line.at_ns;
                work.line.at_ns = until;
                hold(acting.rule, work);
            }
            if work.line.copy == 0 {
                let packets = u64::from(work.segments.count);
                if stalled != 0 {
                    acting.counters.stalled_packets += packets;
                    acting.counters.stalled_ns += packets * stalled;
                }
                let held = acting.shape.stages & (stage::DELAY | stage::REORDER) != 0;
                let given = if held { work.line.given_ns[at] } else { 0 };
                give(tables, work, acting.counters, at, given + stalled);
            }
        }
        true
    }
}

/// What one rule a round adds to the delay of the copy at hand.
struct Delay;

impl Step for Delay {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let at = index as usize & (MAX_CANDIDATES - 1);
        if let Some(acting) = acting(tables, work, at, stage::DELAY | stage::REORDER) {
            delay(tables, acting.rule, acting.shape, work, acting.counters, at);
        }
        true
    }
}

#[inline(always)]
fn delay<T: Tables>(
    tables: &T,
    rule: &RuleEntry,
    shape: &Shape,
    work: &mut Work,
    counters: &mut RuleCounters,
    at: usize,
) {
    let original = work.line.copy == 0;
    let packets = u64::from(every(&work.segments).packets);
    let (stream, n) = (work.line.stream[at], work.line.n[at]);
    let before = work.line.delay_ns;
    if shape.stages & stage::DELAY != 0 {
        let delay_ns = if shape.jitter_ns == 0 {
            shape.delay_ns
        } else {
            drawn(tables, rule, shape, work, at)
        };
        work.line.delay_ns += delay_ns;
        if delay_ns != 0 {
            hold(rule, work);
        }
        if shape.free_order != 0 {
            work.line.free = 1;
        }
        if original {
            counters.delayed_packets += packets;
            counters.delayed_ns += packets * delay_ns;
        }
    }
    if original
        && shape.stages & stage::REORDER != 0
        && shape::lower(shape::draw(rule, stream, n, purpose::CHANCE)) < shape.reorder
    {
        work.line.delay_ns += shape.hold_ns;
        hold(rule, work);
        work.line.free = 1;
        counters.reordered_packets += packets;
    }
    if original {
        let given = work.line.delay_ns - before;
        if shape.stages & stage::STALL == 0 {
            give(tables, work, counters, at, given);
        } else {
            work.line.given_ns[at] = given;
        }
    }
}

/// Counts how long a rule has delayed the packet, all in all.
#[inline(always)]
fn give<T: Tables>(tables: &T, work: &mut Work, counters: &mut RuleCounters, at: usize, ns: u64) {
    if ns > counters.given_max_ns {
        counters.given_max_ns = ns;
    }
    let packets = u64::from(work.segments.count);
    record(tables, work, at, Spread::Given, ns, packets);
}

/// A delay with jitter.
#[inline(always)]
fn drawn<T: Tables>(
    tables: &T,
    rule: &RuleEntry,
    shape: &Shape,
    work: &mut Work,
    at: usize,
) -> u64 {
    let probability = if shape.correlation != 0 && work.line.copy == 0 {
        let Some(table) = tables.distribution(DISTRIBUTION_NORMAL_CDF) else {
            work.missing = 1;
            return shape.delay_ns;
        };
        // SAFETY: valid by `Tables`; tables in use are not written.
        unsafe { shape::below(&*table, work.line.deviate[at]) }
    } else {
        let purpose = purpose::DELAY + work.line.copy;
        shape::upper(shape::draw(
            rule,
            work.line.stream[at],
            work.line.n[at],
            purpose,
        ))
    };
    let value = if shape::has_table(shape) {
        let Some(table) = tables.distribution(shape.distribution) else {
            work.missing = 1;
            return shape.delay_ns;
        };
        // SAFETY: as above.
        unsafe { shape::quantile(&*table, probability) }
    } else {
        shape::uniform(probability)
    };
    shape::delayed(shape, value)
}
