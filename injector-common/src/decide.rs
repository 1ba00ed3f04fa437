//! The decision about one packet: what the kernel program does with each skb, and what tests compute of the
//! same packet in user space. Only the tables differ: [`Tables`] is BPF maps there, ordinary memory here.
//!
//! The way of a packet, from cheap to dear; most leave early:
//!
//! 1. no rules at all, or none for this target and direction: passed, not parsed;
//! 2. a flow known to meet no rule: parsed, one look-up, passed;
//! 3. a flow with rules: each of them judges the packet, whatever the others decide;
//! 4. a flow not seen under this epoch: *classified*, which intersects one bitmap of rules per dimension
//!    (target, protocol, two addresses, two ports), at a cost that depends on neither the number of rules nor
//!    of prefixes.

use crate::{
    answers,
    fate::{self, Phase},
    holders,
    layout::{
        BITMAP_EMPTY, BITMAP_UNPROTECTED, BITMAP_WORDS, Bitmap, Class, Config, Connection,
        Distribution, EXEMPT_WORDS, FlowEntry, FlowKey, Flushed, FragmentKey, Held, Histograms,
        MAX_CANDIDATES, MAX_EXEMPTIONS, MAX_RULES, MAX_SLOTS, NO_PORT, PORT_CLASSES,
        PROTOCOL_CLASSES, Prefix, RuleCounters, RuleEntry, Shape, State, StateKey, Target,
        TargetCounters, Upper, answer, family, fault, hook, identity, kind, needs, queue_hash,
        role, rule_flag, state_site, underway, upper_has,
    },
    line::{Entry, Line},
    packet::{Fragment, MAX_VLAN_TAGS, Packet, Parsed, Unparsed, Window, parse},
    rate::Search,
    segments::{Matched, Meta, Segments, matching},
};

/// What to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on, untouched.
    Pass,
    /// It vanishes, and its sender is told nothing.
    Cut,
    /// It goes through the target's lane, where its wire packets are decided one by one.
    Lane,
    /// It vanishes, and its sender gets this [`crate::layout::answer`].
    Reject(u32),
}

/// What one pass over a packet came to. The kernel program makes each pass a run of its own (by tail calls):
/// two passes in one program would be twice the work for the verifier, which follows every path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on, untouched.
    Pass,
    /// It vanishes, and its sender is told nothing.
    Cut,
    /// More of it can be read now: the same pass is to be made again.
    Again,
    /// It leaves through a loopback device and would go on; what is to happen to it on arrival has to be
    /// decided now too. It would come in again without its route (an IPv4 martian).
    Arrives,
    /// It goes through the target's lane. [`Work::enter`] says by which way.
    Lane,
    /// It vanishes, and its sender gets an answer: [`Work::answer`].
    Reject,
}

/// A state after some packets were added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advanced {
    /// The number before.
    pub before: u64,
    /// Whether the state was made just now.
    pub created: bool,
}

/// The tables. Pointers stay valid while the packet is being decided (in the kernel: until the program
/// returns, by RCU); entries of per-CPU tables are the caller's alone.
pub trait Tables {
    /// The configuration.
    fn config(&self) -> Option<*const Config>;
    /// The target in `slot`.
    fn target(&self, slot: u32) -> Option<*const Target>;
    /// Bitmap of a protocol class, by copy and [`PROTOCOL_CLASSES`].
    fn protocol(&self, index: u32) -> Option<u32>;
    /// Class of a port, by copy and [`PORT_CLASSES`].
    fn port(&self, index: u32) -> Option<*const Class>;
    /// Class of an address: the longest prefix that covers it.
    fn address(&self, key: &Prefix) -> Option<*const Class>;
    /// A bitmap of the given copy.
    fn bitmap(&self, copy: u32, index: u32) -> Option<*const Bitmap>;
    /// A rule, by copy and slot.
    fn rule(&self, index: u32) -> Option<*const RuleEntry>;
    /// The epoch under which the flow was found to meet no rule.
    fn idle(&self, flow: &FlowKey) -> Option<u64>;
    /// Remembers that the flow meets no rule under `epoch`.
    fn set_idle(&self, flow: &FlowKey, epoch: u64);
    /// What is known of a flow.
    fn flow(&self, flow: &FlowKey) -> Option<*mut FlowEntry>;
    /// Keeps what was found of a flow; `false` if there is no room.
    fn set_flow(&self, flow: &FlowKey, entry: &FlowEntry) -> bool;
    /// Memory for the packet in hand; the caller's alone.
    fn work(&self) -> Option<*mut Work>;
    /// Adds `by` to the number of a state, made if it is not there; `None` if there is no room.
    fn advance(&self, key: &StateKey, by: u64, now_ns: u64) -> Option<Advanced>;
    /// The number of an existing state.
    fn state(&self, key: &StateKey) -> Option<u64>;
    /// Makes a state with number `n` unless there is one; `false` if there is one or no room.
    fn create_state(&self, key: &StateKey, n: u64, now_ns: u64) -> bool;
    /// A tracked connection.
    fn connection(&self, flow: &FlowKey) -> Option<*mut Connection>;
    /// Begins to track a connection, or begins again; `false` if there is no room.
    fn set_connection(&self, flow: &FlowKey, connection: &Connection) -> bool;
    /// What is remembered of a first fragment.
    fn fragment(&self, key: &FragmentKey) -> Option<Upper>;
    /// Remembers a first fragment.
    fn set_fragment(&self, key: &FragmentKey, upper: &Upper);
    /// What a rule does in a lane, by copy and slot.
    fn shape(&self, index: u32) -> Option<*const Shape>;
    /// A table of quantiles.
    fn distribution(&self, index: u32) -> Option<*const Distribution>;
    /// A state, made if it is not there, and whether it was; `None` if there is no room.
    fn remember(&self, key: &StateKey, now_ns: u64) -> Option<(*mut State, bool)>;
    /// What is held of a flow.
    fn held(&self, flow: &FlowKey) -> Option<*mut Held>;
    /// How many packets are on their way through lanes that belong to this count ([`crate::layout::underway`]).
    fn underway(&self, count: u32) -> u64;
    /// Where flushed packets of a rule are counted, while it is being flushed; by its name of
    /// [`crate::holders`].
    fn flushed(&self, name: u16) -> Option<*mut Flushed>;
    /// What is held of a flow, made if it is not there; `None` if there is no room.
    fn hold(&self, flow: &FlowKey) -> Option<*mut Held>;
    /// Stores `new` at a word of a table if it holds `old`; what it held.
    ///
    /// # Safety
    ///
    /// The pointer is valid and aligned.
    unsafe fn exchange(&self, word: *mut u64, old: u64, new: u64) -> u64;
    /// Adds `by` to a word of a table; what it held.
    ///
    /// # Safety
    ///
    /// The pointer is valid and aligned.
    unsafe fn increment(&self, word: *mut u64, by: u64) -> u64;
    /// When an opportunity of a trace comes, nanoseconds into the trace; by its place among those of all traces.
    fn trace(&self, index: u32) -> Option<u64>;
    /// Histograms of a rule, by slot among the rules.
    fn histograms(&self, slot: u32) -> Option<*mut Histograms>;
    /// Counters of a rule, by slot and direction.
    fn rule_counters(&self, index: u32) -> Option<*mut RuleCounters>;
    /// Counters of a target, by slot and direction.
    fn target_counters(&self, index: u32) -> Option<*mut TargetCounters>;
    /// `CLOCK_MONOTONIC` in nanoseconds.
    fn now_ns(&self) -> u64;
    /// Runs `S` with 0, 1, 2 … until it says `false`, at most `times` times.
    fn repeat<S: Step>(&self, times: u32, work: &mut Work);
    /// Runs `P`, about which its caller knows nothing but what it returns.
    fn apart<P: Part>(&self, work: &mut Work) -> u32;
}

/// The body of a loop whose rounds the verifier need not follow one by one.
pub trait Step {
    /// One round; `false` ends the loop.
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool;
}

/// A part of a decision that stands by itself: everything that it needs is in the work. The verifier looks at it once,
/// where it would follow what is inlined from each state in which its caller can come to it (7.3 went through three
/// quarters of a million instructions, where it gives up at a million).
pub trait Part {
    /// Which one it is.
    const WHICH: Which;
    /// Does it; what it returns is the part's own.
    fn run<T: Tables>(tables: &T, work: &mut Work) -> u32;
}

/// The parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// What becomes of a packet at its target's hook, once it is parsed: [`Judging`].
    Judging,
    /// The fate of a packet in a lane, once it is parsed: [`crate::line::Deciding`].
    Deciding,
    /// Which wire packets a rule matches: [`Matching`].
    Matching,
    /// Which positions a rule hits: [`Hitting`].
    Hitting,
}

/// A table did not have an entry that it must have: our own error, on which the packet passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing;

/// Reads a field that user space may store to at the same time, once.
macro_rules! read_once {
    ($pointer:expr, $field:ident) => {
        // SAFETY: `Tables` promises that the pointer is valid; the field is aligned.
        unsafe { core::ptr::read_volatile(&raw const (*$pointer).$field) }
    };
}

pub(crate) use read_once;

/// Words of a bitmap that belong to rules.
const RULE_WORDS: usize = BITMAP_WORDS - EXEMPT_WORDS;

/// A packet on its way, with all that is found out about it. In the kernel it lives in a per-CPU map: the
/// stack of a BPF program is 512 bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// What the kernel says of the packet.
    pub meta: Meta,
    /// The rule set in force.
    pub epoch: u64,
    /// Its copy of the tables.
    pub copy: u32,
    /// Bitmap of the target's rules for the direction.
    pub bitmap: u32,
    /// What was read of the packet.
    pub parsed: Parsed,
    /// The wire packets it stands for.
    pub segments: Segments,
    /// Its flow at its site.
    pub key: FlowKey,
    /// The state that a rule keeps of it.
    pub state: StateKey,
    /// The same, while `state` is about something else.
    pub kept: StateKey,
    /// What classification found.
    pub found: FlowEntry,
    /// The clock, read once.
    pub now_ns: u64,
    /// When its connection was seen to begin; 0 if that was not seen, or connections are not tracked.
    pub connection: u64,
    /// Whether its target tracks connections.
    pub track: u32,
    /// Zero.
    pub reserved: u32,
    /// What it brings along into a lane.
    pub entry: Entry,
    /// Slot of the rule at hand, where that is asked of a [`Part`].
    pub slot: u32,
    /// Zero.
    pub reserved_too: u32,
    /// The wire packets that the rule matches.
    pub matched: Matched,
    /// How many matched the rule before.
    pub before: u64,
    /// Wire packets that rules hit, together.
    pub hits: u64,
    /// What is left of an intersection of bitmaps that is being gone through.
    pub words: [u64; RULE_WORDS],
    /// The word of it that is at hand.
    pub word: u32,
    /// Whether a table lacked an entry in a loop.
    pub missing: u32,
    /// Whether the lease has lapsed.
    pub lapsed: u32,
    /// Times that a table was full.
    pub full: u32,
    /// Later fragments without their first one.
    pub orphans: u32,
    /// Whether it matched a rule that a lapsed lease kept from acting.
    pub idle_lease: u32,
    /// Whether its target has a lane.
    pub lane: u32,
    /// [`needs`] of the rules that act on it, where it goes through the lane.
    pub enter: u32,
    /// Whether a rule that rejects acts on it: then it stays out of the lane.
    pub refused: u32,
    /// Whether a rule that says nothing to the sender took it.
    pub silent: u32,
    /// What it is answered with: [`crate::layout::answer`].
    pub answer: u32,
    /// Slot of the rule that answers.
    pub answer_slot: u32,
    /// What becomes of it in the lane.
    pub line: Line,
    /// A search in a trace.
    pub search: Search,
}

/// Decides about a packet, and counts.
pub fn decide<P: Packet, T: Tables>(packet: &mut P, meta: Meta, tables: &T) -> Verdict {
    let mut meta = meta;
    loop {
        match pass(packet, meta, tables) {
            Outcome::Pass => return Verdict::Pass,
            Outcome::Cut => return Verdict::Cut,
            Outcome::Lane => return Verdict::Lane,
            Outcome::Reject => return tables.work().map_or(Verdict::Cut, rejected),
            Outcome::Again => {}
            Outcome::Arrives => meta.hook = hook::INGRESS,
        }
    }
}

/// The verdict about a packet that is answered.
fn rejected(work: *mut Work) -> Verdict {
    Verdict::Reject(read_once!(work, answer))
}

/// One pass over a packet, in the direction that `meta` says.
#[inline(always)]
pub fn pass<P: Packet, T: Tables>(packet: &mut P, meta: Meta, tables: &T) -> Outcome {
    let Some(config) = tables.config() else {
        return Outcome::Pass;
    };
    let epoch = read_once!(config, epoch);
    if epoch == 0 {
        return Outcome::Pass;
    }
    let Some(target) = tables.target(u32::from(meta.target)) else {
        return Outcome::Pass;
    };
    let copy = (epoch & 1) as u32;
    let direction = meta.hook & 1;
    // SAFETY: valid by `Tables`; user space changes only the copy that is not in force.
    let (bitmap, track, l2_length, loopback, lane) = unsafe {
        let target = &*target;
        (
            target.bitmap[copy as usize & 1][direction as usize & 1],
            target.track[copy as usize & 1],
            target.l2_length,
            target.loopback,
            target.line,
        )
    };
    let index = u32::from(meta.target) * 2 + direction;
    let Some(counters) = tables.target_counters(index) else {
        return Outcome::Pass;
    };
    // SAFETY: valid by `Tables`, and the caller's alone.
    let counters = unsafe { &mut *counters };
    let counted = if bitmap == BITMAP_EMPTY && track == 0 && lane == 0 {
        meta.counted()
    } else {
        None
    };
    if let Some(packets) = counted {
        let packets = u64::from(packets);
        counters.seen_packets += packets;
        counters.seen_bytes += u64::from(meta.length);
        counters.passed_packets += packets;
    } else {
        let Some(work) = tables.work() else {
            return Outcome::Pass;
        };
        // SAFETY: as for the counters.
        let work = unsafe { &mut *work };
        work.meta = meta;
        work.epoch = epoch;
        work.copy = copy;
        work.bitmap = bitmap;
        work.lane = lane;
        work.enter = 0;
        let outcome = decide_direction(packet, tables, work, l2_length, track, counters);
        if outcome != Outcome::Pass {
            return outcome;
        }
    }
    if loopback != 0 && direction == hook::EGRESS {
        Outcome::Arrives
    } else {
        Outcome::Pass
    }
}

#[inline(always)]
fn decide_direction<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    work: &mut Work,
    l2_length: u32,
    track: u32,
    counters: &mut TargetCounters,
) -> Outcome {
    let parsed = parse(packet, l2_length, work.meta.protocol, &mut work.parsed);
    // Only the linear part of an skb can be read. Before a packet counts as unparsable, its headers are pulled
    // into it; else packets in pages would fail open.
    if parsed == Err(Unparsed::Truncated) && packet.pull() {
        return Outcome::Again;
    }
    counters.seen_bytes += u64::from(work.meta.length);
    if work.bitmap == BITMAP_EMPTY && track == 0 && work.lane == 0 {
        // It is here only to be counted.
        let packets = if parsed.is_ok() {
            u64::from(Segments::of(&work.parsed, &work.meta).count)
        } else {
            1
        };
        counters.seen_packets += packets;
        counters.passed_packets += packets;
        return Outcome::Pass;
    }
    if parsed.is_err() {
        counters.seen_packets += 1;
        counters.passed_packets += 1;
        counters.unparsed_packets += 1;
        return Outcome::Pass;
    }
    work.track = track;
    let verdict = tables.apart::<Judging>(work);
    let packets = u64::from(work.segments.count);
    counters.seen_packets += packets;
    counters.orphan_fragments += u64::from(work.orphans);
    counters.table_full += u64::from(work.full);
    counters.surplus_rules += u64::from(work.found.surplus);
    if verdict == judged::CUT {
        counters.cut_packets += packets;
        let answered = work.answer != answer::NONE
            && work.silent == 0
            && can_go_back(packet, l2_length, work.parsed.network_offset);
        return if answered {
            Outcome::Reject
        } else {
            Outcome::Cut
        };
    }
    if verdict == judged::LANE {
        // Whether it passes or is cut is counted in the lane, packet by packet.
        return Outcome::Lane;
    }
    counters.passed_packets += packets;
    if work.idle_lease != 0 {
        counters.lapsed_packets += packets;
    }
    if verdict == judged::MISSING {
        counters.errors += 1;
    }
    Outcome::Pass
}

/// What [`Judging`] returns.
mod judged {
    pub(super) const PASS: u32 = 0;
    pub(super) const CUT: u32 = 1;
    pub(super) const LANE: u32 = 2;
    pub(super) const MISSING: u32 = 3;
}

/// What becomes of a packet at its target's hook, once it is parsed.
pub struct Judging;

impl Part for Judging {
    const WHICH: Which = Which::Judging;

    #[inline(always)]
    fn run<T: Tables>(tables: &T, work: &mut Work) -> u32 {
        let Some(config) = tables.config() else {
            return judged::MISSING;
        };
        work.segments = Segments::of(&work.parsed, &work.meta);
        work.orphans = 0;
        work.connection = 0;
        let site = identify_flow(tables, work);
        work.full = 0;
        work.idle_lease = 0;
        work.found.surplus = 0;
        if work.track != 0 {
            work.key.site = work.meta.target << 1;
            track_connection(tables, work);
            work.key.site = site;
        }
        if (work.bitmap == BITMAP_EMPTY && work.lane == 0)
            || tables.idle(&work.key) == Some(work.epoch)
        {
            return judged::PASS;
        }
        match decide_flow(tables, work, config) {
            Ok(Verdict::Cut) => judged::CUT,
            Ok(Verdict::Lane) => judged::LANE,
            Ok(_) => judged::PASS,
            Err(Missing) => judged::MISSING,
        }
    }
}

/// Finds out a packet's flow, and where and how it was seen: `work.key`. Returns its site.
#[inline(always)]
pub(crate) fn identify_flow<T: Tables>(tables: &T, work: &mut Work) -> u16 {
    let site = work.meta.target << 1 | work.meta.hook as u16;
    if work.parsed.fragment != Fragment::Whole {
        follow_fragment(tables, work, site);
    }
    work.parsed.write_flow(&mut work.key);
    // Read back, so that the verifier does not follow each combination of its bits.
    let how = read_once!(&raw const work.key, site);
    work.key.site = site | how;
    site | how
}

/// Whether a frame can be sent back. Not if it is addressed to a group or to everybody, by the lowest bit of its
/// first byte (IEEE 802): what was sent to many is answered by none (RFC 1122, section 3.2.2). Nor with tags of the
/// obsolete ethertype 0x9100 in the packet, which the kernel does not know for tags (`eth_type_vlan`,
/// `include/linux/if_vlan.h`), so that it cannot make room behind them.
#[inline(always)]
fn can_go_back<P: Packet>(packet: &P, l2_length: u32, network_offset: u32) -> bool {
    if l2_length == 0 {
        return true;
    }
    let mut can = packet
        .window(0, 1)
        .is_some_and(|window| window.u8(0) & 1 == 0);
    for tag in 0..MAX_VLAN_TAGS {
        let at = l2_length + 4 * tag;
        if at < network_offset {
            can &= packet
                .window(at - 2, 2)
                .is_some_and(|window| matches!(window.be16(0), 0x8100 | 0x88a8));
        }
    }
    can
}

/// [`FlowEntry::slots`] in words of eight bytes.
type SlotWords = [u64; MAX_CANDIDATES / 4];

const _: () = assert!(core::mem::offset_of!(FlowEntry, slots).is_multiple_of(8));

/// Finds the rules of a packet's flow: `work.found`. Flows that are new are kept, if they meet any.
#[inline(always)]
pub(crate) fn candidates<T: Tables>(tables: &T, work: &mut Work) -> Result<(), Missing> {
    let tag = work.key.tag();
    let known = match tables.flow(&work.key) {
        Some(entry) if read_once!(entry, epoch) == work.epoch => {
            work.now_ns = tables.now_ns();
            #[expect(
                clippy::cast_ptr_alignment,
                reason = "an assertion above says that the slots are aligned to eight bytes"
            )]
            // SAFETY: valid by `Tables`; the time is only ever overwritten with a later one, in one store.
            // The slots are aligned to eight bytes within their entry, and are copied as such.
            unsafe {
                core::ptr::write_volatile(&raw mut (*entry).last_ns, work.now_ns);
                *(&raw mut work.found.slots).cast::<SlotWords>() =
                    *(&raw const (*entry).slots).cast::<SlotWords>();
            }
            work.found.count = read_once!(entry, count);
            work.found.needs = read_once!(entry, needs);
            // What was copied is this flow's only if it still was afterwards.
            read_once!(entry, tag) == tag && read_once!(entry, epoch) == work.epoch
        }
        _ => false,
    };
    if !known {
        if !classify(tables, work) {
            return Err(Missing);
        }
        if work.found.count == 0 {
            return Ok(());
        }
        work.now_ns = tables.now_ns();
        work.found.last_ns = work.now_ns;
        work.found.tag = tag;
        if !tables.set_flow(&work.key, &work.found) {
            work.full += 1;
        }
    }
    Ok(())
}

/// Decides about a packet whose flow is not known to meet no rule.
#[inline(always)]
fn decide_flow<T: Tables>(
    tables: &T,
    work: &mut Work,
    config: *const Config,
) -> Result<Verdict, Missing> {
    candidates(tables, work)?;
    if work.found.count == 0 {
        if work.lane != 0 && is_held(tables, work) {
            work.enter = needs::LANE;
            return Ok(Verdict::Lane);
        }
        tables.set_idle(&work.key, work.epoch);
        return Ok(Verdict::Pass);
    }
    work.lapsed = u32::from(work.now_ns >= read_once!(config, lease_until_ns));
    work.missing = 0;
    work.refused = 0;
    if work.lane != 0 {
        if work.found.needs != 0 && work.lapsed == 0 {
            tables.repeat::<Entering>(work.found.count, work);
            if work.missing != 0 {
                return Err(Missing);
            }
        }
        if work.refused != 0 {
            work.enter = 0;
        } else if work.enter == 0 && is_held(tables, work) {
            // By a rule that has ended, perhaps, while others go on.
            work.enter = needs::LANE;
        }
        if work.enter != 0 {
            return Ok(Verdict::Lane);
        }
    }
    work.hits = 0;
    work.silent = 0;
    work.answer = answer::NONE;
    tables.repeat::<Candidate>(work.found.count, work);
    if work.missing != 0 {
        return Err(Missing);
    }
    Ok(if work.hits != 0 {
        Verdict::Cut
    } else {
        Verdict::Pass
    })
}

/// For so long after its time a packet may still be in the lane: fq lets it go when its timer runs, and the CPU takes it
/// up when it comes to it. Where a virtual machine stands still for a moment both are late by as much, and the next
/// packet may be at the hook first. Through the lane a packet is later by a tenth of a millisecond, and nothing else.
const LATE_NS: u64 = 1_000_000_000;

/// Whether earlier packets of the flow are still on their way through the lane, and in order: then this one goes there
/// too, lest it overtakes them. A packet that has arrived is under way until it has passed the hook for the second time:
/// it comes back by the CPU's backlog, and a busy flow's next ones are at the hook before. Those that are being flushed
/// cannot be overtaken. The time alone would keep a busy flow in the lane, the count one of which a packet was lost.
#[inline(always)]
fn is_held<T: Tables>(tables: &T, work: &mut Work) -> bool {
    match tables.held(&work.key) {
        Some(held) => {
            let hash = queue_hash(&work.key, read_once!(held, turn));
            read_once!(held, until_ns).saturating_add(LATE_NS) > tables.now_ns()
                && tables.underway(underway(hash)).cast_signed() > 0
                && holders::flushing(tables, read_once!(held, holders)).is_none()
        }
        None => false,
    }
}

/// Whether a rule sends a packet through the lane, one rule a round.
struct Entering;

impl Step for Entering {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        // A mask, which the verifier understands; there are no more rounds than candidates.
        let index = index as usize & (MAX_CANDIDATES - 1);
        let slot = u32::from(work.found.slots[index]);
        let Some(rule) = tables.rule(work.copy * MAX_SLOTS + slot) else {
            work.missing = 1;
            return false;
        };
        // SAFETY: valid by `Tables`; rules of the copy in force are not written.
        let rule = unsafe { &*rule };
        let rejects = rule.fault == fault::REJECT;
        // Single packets too where only super-packets have to be cut up: what passed here would overtake what is on its
        // way through the lane.
        let asks = rejects || rule.needs & (needs::LANE | needs::WIRE) != 0;
        if asks
            && matched(tables, rule, slot, work).packets != 0
            && fate::phase(rule, work.now_ns) == Phase::Acting
        {
            work.refused |= u32::from(rejects);
            work.enter |= rule.needs;
        }
        true
    }
}

/// The rules that a flow meets, one a round.
struct Candidate;

impl Step for Candidate {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, index: u32, work: &mut Work) -> bool {
        let index = index as usize;
        if index >= MAX_CANDIDATES {
            return false;
        }
        let slot = u32::from(work.found.slots[index]);
        let direction = work.meta.hook & 1;
        let (Some(rule), Some(counters)) = (
            tables.rule(work.copy * MAX_SLOTS + slot),
            tables.rule_counters(slot * 2 + direction),
        ) else {
            work.missing = 1;
            return false;
        };
        // SAFETY: valid by `Tables`; rules of the copy in force are not written, counters are per CPU.
        let (rule, counters) = unsafe { (&*rule, &mut *counters) };
        if work.refused != 0 && rule.needs & needs::LANE != 0 {
            // What this rule remembers of the flow is the lane's, which the packet does not come to.
            return true;
        }
        let hits = judge(tables, rule, slot, work, counters);
        work.hits += hits;
        if hits != 0 {
            if rule.fault != fault::REJECT {
                work.silent = 1;
            } else if work.answer == answer::NONE
                && answers::may_answer(rule.n as u32, &work.parsed)
            {
                work.answer = rule.n as u32;
                work.answer_slot = slot;
            }
        }
        true
    }
}

/// All wire packets of an skb.
#[inline(always)]
pub(crate) fn every(segments: &Segments) -> Matched {
    Matched {
        packets: segments.count,
        bytes: u64::from(segments.full_length) * u64::from(segments.count - 1)
            + u64::from(segments.last_length),
    }
}

/// The wire packets of an skb that the rule in a slot matches, its flow being one of the rule's.
#[inline(always)]
pub(crate) fn matched<T: Tables>(
    tables: &T,
    rule: &RuleEntry,
    slot: u32,
    work: &mut Work,
) -> Matched {
    if rule.flags & rule_flag::PER_PACKET == 0 {
        return every(&work.segments);
    }
    work.slot = slot;
    work.matched = Matched::default();
    tables.apart::<Matching>(work);
    work.matched
}

/// Which wire packets the rule in `work.slot` matches, of a packet that has to be looked at: `work.matched`.
pub struct Matching;

impl Part for Matching {
    const WHICH: Which = Which::Matching;

    #[inline(always)]
    fn run<T: Tables>(tables: &T, work: &mut Work) -> u32 {
        let Some(rule) = tables.rule(work.copy * MAX_SLOTS + work.slot) else {
            return 0;
        };
        // SAFETY: valid by `Tables`; rules of the copy in force are not written.
        let rule = unsafe { &*rule };
        let new = work.connection != 0 && work.connection >= rule.activated_ns;
        if rule.flags & rule_flag::STATE_NEW != 0 && !new
            || rule.flags & rule_flag::STATE_ESTABLISHED != 0 && new
        {
            return 0;
        }
        work.matched = matching(rule, &work.parsed, &work.segments, work.meta.mark);
        work.matched.packets
    }
}

/// How many of the `packets` positions after `before` the rule in a slot hits.
#[inline(always)]
pub(crate) fn hits<T: Tables>(
    tables: &T,
    rule: &RuleEntry,
    slot: u32,
    work: &mut Work,
    before: u64,
    packets: u64,
) -> u64 {
    if fate::hits_all(rule) {
        return packets;
    }
    if rule.fault == fault::NONE {
        return 0;
    }
    work.slot = slot;
    work.before = before;
    work.matched.packets = packets as u32;
    u64::from(tables.apart::<Hitting>(work))
}

/// How many of the `work.matched` positions after `work.before` the rule in `work.slot` hits.
pub struct Hitting;

impl Part for Hitting {
    const WHICH: Which = Which::Hitting;

    #[inline(always)]
    fn run<T: Tables>(tables: &T, work: &mut Work) -> u32 {
        let Some(rule) = tables.rule(work.copy * MAX_SLOTS + work.slot) else {
            return 0;
        };
        // SAFETY: valid by `Tables`; rules of the copy in force are not written.
        let rule = unsafe { &*rule };
        fate::hits(rule, work.before, u64::from(work.matched.packets)) as u32
    }
}

/// Whether a rule acts now. Packets that match it while it should and does not are counted.
#[inline(always)]
pub(crate) fn acts(
    rule: &RuleEntry,
    work: &mut Work,
    counters: &mut RuleCounters,
    packets: u64,
) -> bool {
    let phase = fate::phase(rule, work.now_ns);
    if phase == Phase::Over {
        return false;
    }
    if work.lapsed != 0 {
        counters.lapsed_packets += packets;
        work.idle_lease = 1;
        return false;
    }
    if phase == Phase::Off {
        counters.off_packets += packets;
        return false;
    }
    true
}

/// Counts packets that match a rule that acts.
#[inline(always)]
pub(crate) fn count_matched(work: &Work, counters: &mut RuleCounters, packets: u64, bytes: u64) {
    counters.matched_packets += packets;
    counters.matched_bytes += bytes;
    if counters.first_ns == 0 {
        counters.first_ns = work.now_ns;
    }
    counters.last_ns = work.now_ns;
}

/// Says which state a rule keeps of the packet: `work.state`.
#[inline(always)]
pub(crate) fn identify(rule: &RuleEntry, work: &mut Work) {
    work.state = StateKey {
        flow: work.key,
        activation: rule.activation,
        index: 0,
    };
    if rule.identity == identity::SERVICE {
        fate::make_service(&mut work.state.flow);
    }
    work.state.flow.site = if work.meta.hook == hook::EGRESS {
        state_site::EGRESS
    } else {
        state_site::INGRESS
    };
}

/// One rule's decision about a packet whose flow it is for: how many of its wire packets it hits.
#[inline(always)]
fn judge<T: Tables>(
    tables: &T,
    rule: &RuleEntry,
    slot: u32,
    work: &mut Work,
    counters: &mut RuleCounters,
) -> u64 {
    let matched = matched(tables, rule, slot, work);
    if matched.packets == 0 {
        return 0;
    }
    let all = u64::from(work.segments.count);
    let all_bytes = every(&work.segments).bytes;
    let packets = u64::from(matched.packets);
    if !acts(rule, work, counters, packets) {
        return 0;
    }
    let frame = u64::from(work.parsed.network_offset);
    count_matched(work, counters, packets, matched.bytes + packets * frame);
    identify(rule, work);
    let mut advanced = tables.advance(&work.state, packets, work.now_ns);
    if let Some(Advanced { created: true, .. }) = advanced {
        counters.flows += 1;
    }
    if rule.fault == fault::ONCE {
        work.state.flow = FlowKey {
            site: state_site::RULE,
            ..FlowKey::default()
        };
        advanced = tables.advance(&work.state, packets, work.now_ns);
    }
    let hits = if let Some(advanced) = advanced {
        hits(tables, rule, slot, work, advanced.before, packets)
    } else {
        // Without state a position is not known: only what does not depend on it is decided.
        counters.stateless_packets += packets;
        work.full += 1;
        if fate::hits_all(rule) { packets } else { 0 }
    };
    let too_long = too_long(rule, &work.segments, packets);
    counters.too_long_packets += too_long;
    if hits != 0 {
        counters.cut_packets += hits;
        counters.cut_bytes += all_bytes + all * frame;
    }
    let lost = if hits > too_long { hits } else { too_long };
    if lost != 0 {
        counters.excess_packets += all - lost;
    }
    lost
}

/// How many of an skb's wire packets, of which a rule matches `packets`, are too long for it.
#[inline(always)]
pub(crate) fn too_long(rule: &RuleEntry, segments: &Segments, packets: u64) -> u64 {
    let longer = u64::from(segments.longer(rule.mtu));
    if longer < packets { longer } else { packets }
}

/// Gives a fragment what its first one had, or remembers it for those that follow.
#[inline(always)]
fn follow_fragment<T: Tables>(tables: &T, work: &mut Work, site: u16) {
    let parsed = &mut work.parsed;
    let key = FragmentKey {
        source: parsed.source,
        destination: parsed.destination,
        id: parsed.fragment_id,
        site,
        protocol: parsed.fragment_protocol,
        kind: if parsed.upper.kind == kind::V4 {
            kind::V4
        } else {
            kind::V6
        },
    };
    if parsed.fragment == Fragment::First {
        tables.set_fragment(&key, &parsed.upper);
    } else if let Some(upper) = tables.fragment(&key) {
        parsed.upper = upper;
    } else {
        work.orphans = 1;
    }
}

/// Keeps the table of connections, and finds out when this one began.
#[inline(never)]
fn track_connection<T: Tables>(tables: &T, work: &mut Work) {
    let now_ns = tables.now_ns();
    let opens = work.parsed.opens() && work.parsed.fragment != Fragment::Later;
    if !opens {
        if let Some(connection) = tables.connection(&work.key) {
            // SAFETY: valid by `Tables`; the time is only ever overwritten with a later one.
            unsafe { core::ptr::write_volatile(&raw mut (*connection).last_ns, now_ns) };
            work.connection = read_once!(connection, first_ns);
            return;
        }
        if work.parsed.has_opening() {
            return;
        }
    }
    if tables.set_connection(
        &work.key,
        &Connection {
            first_ns: now_ns,
            last_ns: now_ns,
        },
    ) {
        work.connection = now_ns;
    } else {
        work.full += 1;
    }
}

/// Finds the rules whose conditions on the flow hold; `false` if a table lacks an entry.
#[inline(never)]
fn classify<T: Tables>(tables: &T, work: &mut Work) -> bool {
    find_candidates(tables, work).is_some()
}

#[inline(always)]
fn find_candidates<T: Tables>(tables: &T, work: &mut Work) -> Option<()> {
    work.missing = 0;
    work.found.epoch = work.epoch;
    work.found.count = 0;
    work.found.surplus = 0;
    work.found.needs = 0;
    let copy = work.copy;
    let direction = work.meta.hook & 1;
    let upper = &work.parsed.upper;
    let class = u32::from(upper.kind & 3) << 8 | u32::from(upper.protocol);
    let protocol = tables.protocol(copy * PROTOCOL_CLASSES + class)?;
    let source = role::source(direction);
    let destination = role::destination(direction);
    let (source_port, destination_port) = if upper.has & upper_has::PORTS != 0 {
        (
            u32::from(upper.source_port),
            u32::from(upper.destination_port),
        )
    } else {
        (NO_PORT, NO_PORT)
    };
    let family = if upper.has & upper_has::ADDRESSES == 0 {
        family::NONE
    } else if upper.kind == kind::V6 || upper.kind == kind::ND {
        family::V6
    } else {
        family::V4
    };
    let tag = Prefix::tag(copy, family);
    let source_class = tables.address(&prefix(tag, work.parsed.source))?;
    let destination_class = tables.address(&prefix(tag, work.parsed.destination))?;
    let source_port_class = tables.port(copy * PORT_CLASSES + source_port)?;
    let destination_port_class = tables.port(copy * PORT_CLASSES + destination_port)?;
    // SAFETY: valid by `Tables`; the copy in force is not written. The same for all bitmaps.
    let (a, b, c, d) = unsafe {
        (
            (*source_class).bitmap[source],
            (*destination_class).bitmap[destination],
            (*source_port_class).bitmap[source],
            (*destination_port_class).bitmap[destination],
        )
    };
    let target = tables.bitmap(copy, work.bitmap)?;
    let protocol = tables.bitmap(copy, protocol)?;
    let a = tables.bitmap(copy, a)?;
    let b = tables.bitmap(copy, b)?;
    let c = tables.bitmap(copy, c)?;
    let d = tables.bitmap(copy, d)?;
    let unprotected = tables.bitmap(copy, BITMAP_UNPROTECTED)?;
    let intersection = |word: usize| {
        // SAFETY: as above, and `word` is within the arrays.
        unsafe {
            (*target).words[word]
                & (*protocol).words[word]
                & (*a).words[word]
                & (*b).words[word]
                & (*c).words[word]
                & (*d).words[word]
        }
    };
    let mut exempt = 0;
    for word in 0..EXEMPT_WORDS {
        exempt |= intersection(word);
    }
    let acting = if exempt == 0 { u64::MAX } else { 0 };
    let mut any = 0;
    for word in 0..RULE_WORDS {
        // SAFETY: as above.
        let mask = acting | unsafe { (*unprotected).words[EXEMPT_WORDS + word] };
        let bits = intersection(EXEMPT_WORDS + word) & mask;
        work.words[word] = bits;
        any |= bits;
    }
    if any != 0 {
        work.word = 0;
        tables.repeat::<Bits>(MAX_RULES + RULE_WORDS as u32, work);
    }
    if work.missing != 0 { None } else { Some(()) }
}

/// The bits of an intersection: in each round the lowest one of a word, or on to the next word.
struct Bits;

impl Step for Bits {
    #[inline(always)]
    fn step<T: Tables>(tables: &T, _index: u32, work: &mut Work) -> bool {
        let at = work.word as usize;
        if at >= RULE_WORDS {
            return false;
        }
        let bits = work.words[at];
        if bits == 0 {
            work.word = at as u32 + 1;
            return true;
        }
        let bit = bits & bits.wrapping_neg();
        work.words[at] = bits ^ bit;
        let slot = (EXEMPT_WORDS + at) as u32 * 64 + fate::position(bit);
        if add_candidate(tables, work, slot).is_none() {
            work.missing = 1;
            return false;
        }
        true
    }
}

/// Adds the rule in `slot` to what was found, unless the flow is not in its share.
#[inline(always)]
fn add_candidate<T: Tables>(tables: &T, work: &mut Work, slot: u32) -> Option<()> {
    let rule = tables.rule(work.copy * MAX_SLOTS + slot)?;
    // SAFETY: valid by `Tables`; the copy in force is not written.
    let rule = unsafe { &*rule };
    if rule.flags & rule_flag::SHARE != 0 && in_share(tables, rule, work) == 0 {
        return Some(());
    }
    let count = work.found.count as usize;
    if count < MAX_CANDIDATES {
        work.found.slots[count] = slot as u16;
        work.found.count = count as u32 + 1;
        work.found.needs |= rule.needs;
    } else {
        work.found.surplus = 1;
    }
    Some(())
}

#[inline(always)]
fn prefix(tag: u32, address: [u64; 2]) -> Prefix {
    let [a, b] = address.map(u64::to_ne_bytes);
    let word = |bytes: [u8; 8], at: usize| {
        u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    Prefix {
        tag,
        address: [word(a, 0), word(a, 4), word(b, 0), word(b, 4)],
    }
}

/// 1 if the flow belongs to the share of `rule`, else 0.
#[inline(never)]
fn in_share<T: Tables>(tables: &T, rule: &RuleEntry, work: &mut Work) -> u64 {
    work.state = StateKey {
        flow: work.key,
        activation: rule.activation,
        index: 0,
    };
    let ordinal = if rule.identity == identity::ORDINAL {
        ordinal(tables, work)
    } else {
        0
    };
    work.state.flow = work.key;
    if rule.identity != identity::TUPLE {
        fate::make_service(&mut work.state.flow);
    }
    u64::from(fate::share_draw(rule, &work.state.flow, ordinal) < rule.share)
}

/// The number, from 1, of a flow among those to its service, in order of first sight under the rule of
/// `work.state`. 0 where there is no room to keep it.
#[inline(always)]
pub(crate) fn ordinal<T: Tables>(tables: &T, work: &mut Work) -> u64 {
    work.state.flow.site = state_site::ORDINAL;
    if let Some(number) = tables.state(&work.state) {
        return number;
    }
    fate::make_service(&mut work.state.flow);
    work.state.flow.site = state_site::SERVICE;
    let now_ns = tables.now_ns();
    let Some(advanced) = tables.advance(&work.state, 1, now_ns) else {
        return 0;
    };
    let number = advanced.before + 1;
    work.state.flow = work.key;
    work.state.flow.site = state_site::ORDINAL;
    if tables.create_state(&work.state, number, now_ns) {
        number
    } else {
        // Another CPU met the flow's other direction at the same moment: its number holds.
        tables.state(&work.state).unwrap_or(0)
    }
}

/// Slots below this one are exemptions.
pub const FIRST_RULE_SLOT: u32 = MAX_EXEMPTIONS;
