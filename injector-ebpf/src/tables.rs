//! The maps, and the decision's view of them.
//!
//! "Mapped" tables are arrays that user space writes through a shared mapping (`BPF_F_MMAPABLE`): a whole
//! rule set costs no system call but the prefixes'. Sizes marked *load time* are set by the loader.

use core::ffi::c_void;

use aya_ebpf::{
    helpers::{bpf_ktime_get_ns, bpf_loop},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, lpm_trie::Key},
    programs::TcContext,
};
use injector_common::{
    decide::{Advanced, Hitting, Judging, Matching, Part, Step, Tables, Which, Work},
    layout::{
        Bitmap, Class, Config, Connection, DISTRIBUTIONS, Distribution, FlowEntry, FlowKey,
        Flushed, FragmentKey, Held, Histograms, LaneLoad, MAX_FLUSHES, MAX_RULES, MAX_SLOTS,
        PORT_CLASSES, PROTOCOL_CLASSES, Prefix, RuleCounters, RuleEntry, Shape, State, StateKey,
        TRACE_ENTRIES, Target, TargetCounters, UNDERWAY, Upper, underway,
    },
    line::{Deciding, Entry, SENT},
};

use crate::reject::Answer;

const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;

/// Epoch and lease. Mapped: written by user space, one field at a time. One entry.
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Targets by slot. Mapped. Load time.
#[map]
static TARGETS: Array<Target> = Array::with_max_entries(256, BPF_F_MMAPABLE);

/// Index of a bitmap by protocol class, two copies. Mapped.
#[map]
static PROTOCOLS: Array<u32> = Array::with_max_entries(2 * PROTOCOL_CLASSES, BPF_F_MMAPABLE);

/// Classes of ports, two copies. Mapped.
#[map]
static PORTS: Array<Class> = Array::with_max_entries(2 * PORT_CLASSES, BPF_F_MMAPABLE);

/// Classes of addresses by prefix; both copies' entries in one trie, told apart by the tag. Written by user
/// space, entry by entry. Load time.
#[map]
static PREFIXES: LpmTrie<Prefix, Class> = LpmTrie::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);

/// Distinct bitmaps; the second copy follows after [`BITMAPS_PER_COPY`] entries. Mapped. Load time.
#[map]
static BITMAPS: Array<Bitmap> = Array::with_max_entries(2 * 8192, BPF_F_MMAPABLE);

/// Entries of one copy in `BITMAPS`, set by the loader together with the size of the map.
#[unsafe(no_mangle)]
static BITMAPS_PER_COPY: u32 = 8192;

/// Rules by slot, two copies. Mapped.
#[map]
static RULES: Array<RuleEntry> = Array::with_max_entries(2 * MAX_SLOTS, BPF_F_MMAPABLE);

/// Flows that meet no rule, with the epoch under which that was found. Written by the program; a flow that is
/// evicted is classified again, with the same result. Load time.
#[map]
static IDLE: LruHashMap<FlowKey, u64> = LruHashMap::with_max_entries(65_536, 0);

/// Flows that meet rules, by site. Written by the program, collected by user space. When it is full, flows
/// are classified with every packet, and that is counted. Load time.
#[map]
static FLOWS: HashMap<FlowKey, FlowEntry> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// What rules remember of flows. Written by the program, collected by user space. When it is full, faults
/// that depend on a position do not act, and that is counted. Load time.
#[map]
static STATES: HashMap<StateKey, State> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);

/// Connections, while a rule selects on their state. Written by the program, collected by user space. When it
/// is full, connections count as established, and that is counted. Load time.
#[map]
static CONNECTIONS: HashMap<FlowKey, Connection> =
    HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// First fragments. Written by the program; the oldest is evicted. Load time.
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Upper> = LruHashMap::with_max_entries(8192, 0);

/// Counters of rules, by slot and direction. Written by the program, read and zeroed by user space.
#[map]
static RULE_COUNTERS: PerCpuArray<RuleCounters> = PerCpuArray::with_max_entries(2 * MAX_SLOTS, 0);

/// Counters of targets, by slot and direction. Written by the program, read and zeroed by user space. Load
/// time.
#[map]
static TARGET_COUNTERS: PerCpuArray<TargetCounters> = PerCpuArray::with_max_entries(2 * 256, 0);

/// What rules do in lanes, by slot, two copies. Mapped.
#[map]
static SHAPES: Array<Shape> = Array::with_max_entries(2 * MAX_SLOTS, BPF_F_MMAPABLE);

/// Quantiles of distributions. Written by user space before a rule refers to them.
#[map]
static TABLES: Array<Distribution> = Array::with_max_entries(DISTRIBUTIONS, 0);

/// Opportunities of all traces, each rule's together: nanoseconds into the trace, in ascending order. Mapped:
/// written by user space before a rule refers to them.
#[map]
static TRACES: Array<u64> = Array::with_max_entries(TRACE_ENTRIES, BPF_F_MMAPABLE);

/// How times are spread, by slot among the rules. Mapped: added to by the program, read and zeroed by user space.
#[map]
static HISTOGRAMS: Array<Histograms> = Array::with_max_entries(MAX_RULES, BPF_F_MMAPABLE);

/// What lanes hold of flows whose order is kept. Written by the program, collected by user space. When it is
/// full, order is kept by equal delays only, and that is counted. Load time.
#[map]
static HELD: HashMap<FlowKey, Held> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// What lanes may hold and hold, by the number of the lane, which is the classid of the filters on its devices.
/// Mapped. Bounds are written by user space, the rest by the programs; user space clears it for a new lane, and puts
/// `held` right where it finds a lane idle. Load time.
#[map]
static LANES: Array<LaneLoad> = Array::with_max_entries(256, BPF_F_MMAPABLE);

/// How many packets are on their way through lanes and back past the hook that they came from, by
/// [`injector_common::layout::underway`] of what they are queued by. One that is lost on the way is never taken out.
/// Mapped: user space sets it to zero where there is no lane.
#[map]
static UNDER_WAY: Array<u64> = Array::with_max_entries(UNDERWAY, BPF_F_MMAPABLE);

/// Rules whose held packets are being flushed, by their name of [`injector_common::holders`]. Entries are made and
/// deleted by user space, counted in by the program.
#[map]
static FLUSHES: HashMap<u32, Flushed> = HashMap::with_max_entries(MAX_FLUSHES, BPF_F_NO_PREALLOC);

/// What a packet brings into the lane: the hook's program writes it, and the line's, which the same packet runs
/// into before the former's helper returns, reads it.
#[map]
static ENTRY: PerCpuArray<Entry> = PerCpuArray::with_max_entries(1, 0);

/// A copy that the line's program is sending to itself.
#[map]
static COPY: PerCpuArray<Sending> = PerCpuArray::with_max_entries(1, 0);

/// Packets that lanes met on devices of theirs and know nothing of, or lost: by [`lost`].
#[map]
static LANE_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(lost::COUNT, 0);

/// How a packet is to be sent by a line.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Sending {
    /// When it leaves.
    pub(crate) leaves_ns: u64,
    /// [`injector_common::holders`] of it.
    pub(crate) holders: u64,
    /// What it is queued by.
    pub(crate) hash: u32,
    /// Whether that contains its `tc_index`.
    pub(crate) index: u32,
    /// Whether this is about the packet at hand.
    pub(crate) valid: u32,
    /// How many runs of the line's program, one within the other, are sending copies.
    pub(crate) depth: u32,
}

/// A packet's copies, while they are sent: the per-CPU work may be another packet's meanwhile.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Emission {
    /// [`injector_common::line::Line::leaves_ns`].
    pub(crate) leaves_ns: [u64; SENT],
    /// [`injector_common::line::Line::holders`].
    pub(crate) holders: [u64; SENT],
}

/// What a copy sets off may send copies in turn. The kernel allows eight nested transmissions
/// (`XMIT_RECURSION_LIMIT`, include/linux/netdevice.h, 6.1).
#[map]
static EMISSIONS: PerCpuArray<Emission> = PerCpuArray::with_max_entries(8, 0);

/// Room for a packet's copies, by [`Sending::depth`].
#[inline(always)]
pub(crate) fn emission(depth: u32) -> Option<*mut Emission> {
    EMISSIONS.get_ptr_mut(depth)
}

/// Indices of `LANE_LOST`.
pub(crate) mod lost {
    /// A packet of somebody else's on a lane's device.
    pub(crate) const STRAY: u32 = 0;
    /// A copy could not be sent.
    pub(crate) const COPY: u32 = 1;
    /// A packet could not be brought back: its tag could not be taken off, or its target has gone.
    pub(crate) const RETURN: u32 = 2;
    /// A packet did not get from its target to the line.
    pub(crate) const ENTRY: u32 = 3;
    /// How many there are.
    pub(crate) const COUNT: u32 = 4;
}

/// What a packet brings into the lane.
#[inline(always)]
pub(crate) fn entry() -> Option<*mut Entry> {
    ENTRY.get_ptr_mut(0)
}

/// A copy on its way to the line.
#[inline(always)]
pub(crate) fn copy() -> Option<*mut Sending> {
    COPY.get_ptr_mut(0)
}

/// The load of a lane, by its number.
#[inline(always)]
pub(crate) fn lane(number: u32) -> Option<*mut LaneLoad> {
    LANES.get_ptr_mut(number)
}

/// Counts a packet that is queued by this hash as under way, or as not any more.
#[inline(always)]
pub(crate) fn count_underway(hash: u32, by: u64) {
    if let Some(count) = UNDER_WAY.get_ptr_mut(underway(hash)) {
        // SAFETY: map memory.
        unsafe { Kernel.increment(count, by) };
    }
}

/// Counts a packet that a lane lost.
#[inline(always)]
pub(crate) fn count_lost(which: u32, packets: u64) {
    if let Some(count) = LANE_LOST.get_ptr_mut(which) {
        // SAFETY: per CPU.
        unsafe { *count += packets };
    }
}

/// A target, by slot.
#[inline(always)]
pub(crate) fn target(slot: u32) -> Option<*const Target> {
    TARGETS.get_ptr(slot)
}

/// The packet in hand.
#[inline(always)]
pub(crate) fn work() -> Option<*mut Work> {
    WORK.get_ptr_mut(0)
}

/// Counters of a target, by slot and direction.
#[inline(always)]
pub(crate) fn target_counters(index: u32) -> Option<*mut TargetCounters> {
    TARGET_COUNTERS.get_ptr_mut(index)
}

/// The packet in hand.
#[map]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// What an answer is made of.
#[map]
static ANSWER: PerCpuArray<Answer> = PerCpuArray::with_max_entries(1, 0);

/// What an answer is made of.
#[inline(always)]
pub(crate) fn answer() -> Option<*mut Answer> {
    ANSWER.get_ptr_mut(0)
}

/// Counters of a rule, by slot and direction.
#[inline(always)]
pub(crate) fn rule_counters(index: u32) -> Option<*mut RuleCounters> {
    RULE_COUNTERS.get_ptr_mut(index)
}

/// The programs by direction, for further passes over a packet. Written by the loader. The kernel empties it
/// when the last file descriptor of it is closed (`bpf_fd_array_map_clear`, kernel/bpf/arraymap.c): a loader
/// that has died takes its lease with it anyway.
#[map]
static PASSES: ProgramArray = ProgramArray::with_max_entries(4, 0);

/// Index of the line's program in `PASSES`; those of the hooks are their directions.
pub(crate) const LINE: u32 = 2;
/// Index of the program in `PASSES` that answers rejected packets.
pub(crate) const REJECT: u32 = 3;

/// Ends this program and runs another one of `PASSES` on the same packet; returns only if there is none.
#[inline(always)]
pub(crate) fn tail_call(ctx: &TcContext, which: u32) {
    // SAFETY: nothing of this run is used afterwards.
    unsafe { PASSES.tail_call(ctx, which) };
}

/// The maps as the decision sees them.
pub(crate) struct Kernel;

impl Tables for Kernel {
    #[inline(always)]
    fn config(&self) -> Option<*const Config> {
        CONFIG.get_ptr(0)
    }

    #[inline(always)]
    fn target(&self, slot: u32) -> Option<*const Target> {
        TARGETS.get_ptr(slot)
    }

    #[inline(always)]
    fn protocol(&self, index: u32) -> Option<u32> {
        PROTOCOLS.get(index).copied()
    }

    #[inline(always)]
    fn port(&self, index: u32) -> Option<*const Class> {
        PORTS.get_ptr(index)
    }

    #[inline(always)]
    fn address(&self, prefix: &Prefix) -> Option<*const Class> {
        PREFIXES
            .get(Key::new(Prefix::BITS, *prefix))
            .map(core::ptr::from_ref)
    }

    #[inline(always)]
    fn bitmap(&self, copy: u32, index: u32) -> Option<*const Bitmap> {
        // SAFETY: a constant that the loader has set; volatile, so that its value here is not folded in.
        let per_copy = unsafe { core::ptr::read_volatile(&raw const BITMAPS_PER_COPY) };
        BITMAPS.get_ptr(copy * per_copy + index)
    }

    #[inline(always)]
    fn rule(&self, index: u32) -> Option<*const RuleEntry> {
        RULES.get_ptr(index)
    }

    #[inline(always)]
    fn idle(&self, flow: &FlowKey) -> Option<u64> {
        // SAFETY: a value that is replaced meanwhile is a number of another epoch, and whole.
        unsafe { IDLE.get(flow) }.copied()
    }

    #[inline(always)]
    fn set_idle(&self, flow: &FlowKey, epoch: u64) {
        // Not kept means classified again: nothing is lost but time.
        let _ = IDLE.insert(flow, epoch, BPF_ANY);
    }

    #[inline(always)]
    fn flow(&self, flow: &FlowKey) -> Option<*mut FlowEntry> {
        FLOWS.get_ptr_mut(flow)
    }

    #[inline(always)]
    fn set_flow(&self, flow: &FlowKey, entry: &FlowEntry) -> bool {
        FLOWS.insert(flow, entry, BPF_ANY).is_ok()
    }

    #[inline(always)]
    fn work(&self) -> Option<*mut Work> {
        WORK.get_ptr_mut(0)
    }

    #[inline(always)]
    fn advance(&self, key: &StateKey, by: u64, now_ns: u64) -> Option<Advanced> {
        let mut created = false;
        let state = if let Some(state) = STATES.get_ptr_mut(key) {
            state
        } else {
            created = STATES.insert(key, fresh(0, now_ns), BPF_NOEXIST).is_ok();
            // Where another CPU was first, its state is there now.
            STATES.get_ptr_mut(key)?
        };
        // SAFETY: map memory, valid until the program returns; the fetch-and-add is atomic, the time is one
        // store.
        unsafe {
            core::ptr::write_volatile(&raw mut (*state).last_ns, now_ns);
            let before = self.increment(&raw mut (*state).n, by);
            Some(Advanced { before, created })
        }
    }

    #[inline(always)]
    fn shape(&self, index: u32) -> Option<*const Shape> {
        SHAPES.get_ptr(index)
    }

    #[inline(always)]
    fn distribution(&self, index: u32) -> Option<*const Distribution> {
        TABLES.get_ptr(index)
    }

    #[inline(always)]
    fn remember(&self, key: &StateKey, now_ns: u64) -> Option<(*mut State, bool)> {
        if let Some(state) = STATES.get_ptr_mut(key) {
            // SAFETY: map memory, valid until the program returns; one store.
            unsafe { core::ptr::write_volatile(&raw mut (*state).last_ns, now_ns) };
            return Some((state, false));
        }
        let created = STATES.insert(key, fresh(0, now_ns), BPF_NOEXIST).is_ok();
        // Where another CPU was first, its state is there now.
        Some((STATES.get_ptr_mut(key)?, created))
    }

    #[inline(always)]
    fn held(&self, flow: &FlowKey) -> Option<*mut Held> {
        HELD.get_ptr_mut(flow)
    }

    #[inline(always)]
    fn underway(&self, count: u32) -> u64 {
        match UNDER_WAY.get_ptr(count) {
            // SAFETY: map memory, which others write.
            Some(count) => unsafe { core::ptr::read_volatile(count) },
            None => 0,
        }
    }

    #[inline(always)]
    fn flushed(&self, name: u16) -> Option<*mut Flushed> {
        FLUSHES.get_ptr_mut(u32::from(name))
    }

    #[inline(always)]
    fn hold(&self, flow: &FlowKey) -> Option<*mut Held> {
        if let Some(held) = HELD.get_ptr_mut(flow) {
            return Some(held);
        }
        let _ = HELD.insert(flow, UNHELD, BPF_NOEXIST);
        HELD.get_ptr_mut(flow)
    }

    #[inline(always)]
    unsafe fn exchange(&self, word: *mut u64, old: u64, new: u64) -> u64 {
        // SAFETY: as the caller promises.
        unsafe {
            core::intrinsics::atomic_cxchg::<
                u64,
                { core::intrinsics::AtomicOrdering::SeqCst },
                { core::intrinsics::AtomicOrdering::SeqCst },
            >(word, old, new)
        }
        .0
    }

    #[inline(always)]
    unsafe fn increment(&self, word: *mut u64, by: u64) -> u64 {
        // Not relaxed: LLVM 22 turns a relaxed add into the instruction without BPF_FETCH, whose register
        // keeps the addend, although the old value is used.
        // SAFETY: as the caller promises.
        unsafe {
            core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::SeqCst }>(
                word, by,
            )
        }
    }

    #[inline(always)]
    fn state(&self, key: &StateKey) -> Option<u64> {
        // SAFETY: map memory, valid until the program returns.
        STATES
            .get_ptr(key)
            .map(|state| unsafe { core::ptr::read_volatile(&raw const (*state).n) })
    }

    #[inline(always)]
    fn create_state(&self, key: &StateKey, n: u64, now_ns: u64) -> bool {
        STATES.insert(key, fresh(n, now_ns), BPF_NOEXIST).is_ok()
    }

    #[inline(always)]
    fn connection(&self, flow: &FlowKey) -> Option<*mut Connection> {
        CONNECTIONS.get_ptr_mut(flow)
    }

    #[inline(always)]
    fn set_connection(&self, flow: &FlowKey, connection: &Connection) -> bool {
        CONNECTIONS.insert(flow, connection, BPF_ANY).is_ok()
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Upper> {
        // SAFETY: eight bytes, replaced as a whole.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_fragment(&self, key: &FragmentKey, upper: &Upper) {
        // Not kept means that later fragments count as orphans, which is counted there.
        let _ = FRAGMENTS.insert(key, upper, BPF_ANY);
    }

    #[inline(always)]
    fn trace(&self, index: u32) -> Option<u64> {
        TRACES.get(index).copied()
    }

    #[inline(always)]
    fn histograms(&self, slot: u32) -> Option<*mut Histograms> {
        HISTOGRAMS.get_ptr_mut(slot)
    }

    #[inline(always)]
    fn rule_counters(&self, index: u32) -> Option<*mut RuleCounters> {
        RULE_COUNTERS.get_ptr_mut(index)
    }

    #[inline(always)]
    fn target_counters(&self, index: u32) -> Option<*mut TargetCounters> {
        TARGET_COUNTERS.get_ptr_mut(index)
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn apart<P: Part>(&self, work: &mut Work) -> u32 {
        // The function finds the same memory by itself. The compiler is made to believe that somebody has told it
        // where: behind an exclusive reference it would expect no change otherwise.
        let mut known = core::ptr::from_mut(work);
        // SAFETY: a register is copied onto itself. (Without any instruction two lines of source would share an
        // address, which the kernel refuses in line_info.)
        unsafe {
            core::arch::asm!("{0} = {0}", inout(reg) known, options(nostack, preserves_flags));
        }
        let _ = known;
        match P::WHICH {
            Which::Judging => injector_judging(),
            Which::Deciding => injector_deciding(),
            Which::Matching => injector_matching(),
            Which::Hitting => injector_hitting(),
        }
    }

    #[inline(always)]
    fn repeat<S: Step>(&self, times: u32, work: &mut Work) {
        // bpf_loop (5.17) has its callback verified once, where a plain loop is followed round by round.
        // Its context must be on the stack (ARG_PTR_TO_STACK_OR_NULL), so it is the pointer that is passed.
        let mut work = core::ptr::from_mut(work);
        // SAFETY: the callback takes what it is given here.
        unsafe {
            bpf_loop(times, round::<S> as *mut c_void, (&raw mut work).cast(), 0);
        }
    }
}

/// What is held of a flow of which nothing is.
const UNHELD: Held = Held {
    until_ns: 0,
    holders: 0,
    flushed_until_ns: 0,
    turn: 0,
};

/// A part of the decision as a global function: the verifier looks at it by itself, without what its callers know
/// (`do_check_subprogs`, kernel/bpf/verifier.c, 6.1).
macro_rules! apart {
    ($name:ident, $part:ty) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name() -> u32 {
            // Callers have had it in their hands.
            let Some(work) = work() else {
                return 0;
            };
            // SAFETY: per CPU, and the caller's while it runs.
            <$part>::run(&Kernel, unsafe { &mut *work })
        }
    };
}

apart!(injector_judging, Judging);
apart!(injector_deciding, Deciding);
apart!(injector_matching, Matching);
apart!(injector_hitting, Hitting);

#[inline(always)]
const fn fresh(n: u64, now_ns: u64) -> State {
    State {
        n,
        last_ns: now_ns,
        stream: 0,
    }
}

/// One round of `Kernel::repeat`: 1 ends the loop.
extern "C" fn round<S: Step>(index: u64, work: *mut c_void) -> i64 {
    // SAFETY: `repeat` passes a `Work` that is its caller's alone.
    let work = unsafe { &mut **work.cast::<*mut Work>() };
    i64::from(!S::step(&Kernel, index as u32, work))
}
