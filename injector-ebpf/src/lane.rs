//! The skb's way through a lane: in from its target, past the line, and back.
//!
//! ```text
//! target hook ─clone─▶ segmenter (VLAN 1 on the carrier) ─▶ carrier ─▶ line (VLAN 2 on the carrier)
//!              └─────────── nothing to cut up ────────────────────────▶   │ fate, departure time
//!                                                                         ▼ fq
//! target ◀──────────────────────────────────────────────── carrier ◀──────┘
//! ```
//!
//! A clone has no socket, so that a packet that is held does not count against what its sender may have under way. From
//! the hook to the line everything is one call chain on one CPU; from fq on a packet is known by the mark in its
//! `tc_index` ([`lane_mark`]), which clones, redirects, segmentation and fq leave alone. Which rules hold it
//! ([`holders`]) is in the last eight of the 20 bytes of `cb` that a TC program may write: of these the qdisc has the
//! first twelve at most (`struct fq_skb_cb`, `net/sched/sch_fq.c`: eight in 6.1, nine from 6.7 on), copies of the skb
//! take them along (`__copy_skb_header`, net/core/skbuff.c), and on the way through the VLAN device nobody else touches
//! them (`vlan_dev_hard_start_xmit`, `net/8021q/vlan_dev.c`, 6.1).

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, TC_ACT_STOLEN, TC_ACT_UNSPEC},
    helpers::{
        bpf_check_mtu, bpf_clone_redirect, bpf_redirect, bpf_set_hash, bpf_set_hash_invalid,
        bpf_skb_ecn_set_ce, bpf_skb_pull_data, bpf_skb_vlan_pop,
    },
    programs::TcContext,
};
use injector_common::{
    decide::{Tables as _, Work},
    holders,
    layout::{
        MIX, PRIORITY_CLASS, PRIORITY_CONTROL, PRIORITY_HELD, hook, lane_load, lane_mark,
        lane_vlan, needs, queue_hash,
    },
    line::{Entry, LineOutcome, SENT, count_marked, line as decide_line},
    packet::{Parsed, parse},
    segments::Segments,
};

use crate::{
    corrupt, skb,
    tables::{self, lost},
};

/// The skb's `tstamp` is the departure time that its sender asks for, by the monotonic clock
/// (`BPF_SKB_TSTAMP_DELIVERY_MONO`, include/uapi/linux/bpf.h).
const DELIVERY_MONO: u8 = 1;

/// What a packet that is not under way any more adds to the count.
const NO_MORE: u64 = 1_u64.wrapping_neg();

/// Where a hash keeps a packet's `tc_index`.
const INDEX_MASK: u32 = 0xffff;

/// Skbs longer than this, with their link-layer header, are cut up before a VLAN device sends them, as its
/// `gso_max_size` has it (`gso_features_check`, net/core/dev.c, 6.7 and later releases of 6.1): BIG TCP.
const LONGEST: u32 = 0xffff;

/// Bytes of a VLAN tag.
const VLAN_LENGTH: u32 = 4;

/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;

/// VLAN identifier in a tag.
const VLAN_MASK: u32 = 0xfff;

/// A packet that has come back from a lane.
pub(crate) enum Returned {
    /// It has none.
    Not,
    /// Everything has been decided.
    Done,
    /// It leaves through a loopback device, and is still to be decided for its arrival.
    Arrives,
}

/// Whether the packet comes back from a lane to this target. Its mark is taken off, and it gets its `tc_index`
/// back. The hash that it was queued by goes: what comes after may spread flows by it, and packets that may be
/// overtaken had one each.
#[inline(always)]
pub(crate) fn returned(ctx: &TcContext, direction: u32) -> Returned {
    let skb = ctx.skb.skb;
    // SAFETY: the context is the program's own; a TC program may read and write these fields.
    unsafe {
        let mark = (*skb).tc_index as u16;
        if mark & lane_mark::SET == 0 {
            return Returned::Not;
        }
        let (slot, marked) = lane_mark::read(mark);
        if slot != (*skb).tc_classid as u16 {
            return Returned::Not;
        }
        let Some(target) = tables::target(u32::from(slot)) else {
            return Returned::Not;
        };
        let loopback = (*target).loopback != 0;
        if marked != direction && !loopback {
            return Returned::Not;
        }
        if direction == hook::EGRESS
            && let Some(entry) = tables::entry()
        {
            (*entry).back += wire_packets(ctx);
        }
        if mark & lane_mark::ANSWER == 0 {
            tables::count_underway((*skb).hash, NO_MORE);
        }
        (*skb).tc_index = if mark & lane_mark::INDEX != 0 {
            (*skb).hash & INDEX_MASK
        } else {
            0
        };
        bpf_set_hash_invalid(skb);
        if loopback && marked == hook::EGRESS {
            Returned::Arrives
        } else {
            Returned::Done
        }
    }
}

/// Sends the packet through its target's lane, as a clone. If that does not reach the line, the packet passes.
#[inline(always)]
pub(crate) fn enter(ctx: &TcContext, direction: u32) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is the program's own.
    let slot = unsafe { (*skb).tc_classid } as u16;
    let (Some(target), Some(entry), Some(work), Some(counters)) = (
        tables::target(u32::from(slot)),
        tables::entry(),
        tables::work(),
        tables::target_counters(u32::from(slot) * 2 + (direction & 1)),
    ) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: map memory; the work and the counters are this CPU's. Packets that fq lets go meanwhile can come to a
    // hook too, within the call below: what they write is put right behind them, for the outer packet's further
    // segments.
    let outer = unsafe { *entry };
    // SAFETY: as above.
    let (packets, cut_up, device) = unsafe {
        let work = &*work;
        let packets = u64::from(work.segments.count);
        *entry = Entry {
            departure_ns: if direction == hook::EGRESS {
                departure(skb)
            } else {
                0
            },
            connection: work.connection,
            index: u64::from((*skb).tc_index),
            ..Entry::default()
        };
        let cut_up = (work.enter & needs::WIRE != 0 || (*skb).len > LONGEST) && packets > 1
            || work.enter & needs::COMPLETE != 0;
        let device = if cut_up {
            (*target).segmenter
        } else {
            (*target).line
        };
        (packets, cut_up, device)
    };
    // SAFETY: as above; a TC program may write `tc_index` and `cb`.
    let (arrived, astray) = unsafe {
        let (index, noted) = ((*skb).tc_index, noted(skb));
        (*skb).tc_index = u32::from(lane_mark::of(slot, direction));
        note(skb, UNDECIDED);
        bpf_clone_redirect(skb, device, 0);
        (*skb).tc_index = index;
        note(skb, noted);
        let arrived = u64::from((*entry).arrived);
        let astray = (*entry).left.saturating_sub((*entry).back);
        *entry = outer;
        (arrived, astray)
    };
    if astray != 0 {
        tables::count_lost(lost::RETURN, astray);
    }
    // SAFETY: as above.
    let counters = unsafe { &mut *counters };
    // Whatever the reason: out of memory, a device has gone, too many devices without a queue in each other. Not by
    // what the helper returns, which says nothing of redirects behind the first.
    if arrived == 0 {
        counters.lane_refused += packets;
        counters.passed_packets += packets;
        return TC_ACT_UNSPEC;
    }
    counters.lane_packets += packets;
    // Where the kernel has not counted the segments, their number here need not be that of its cutting.
    // SAFETY: the context is the program's own.
    let exact = cut_up && (packets == 1 || u64::from(unsafe { (*skb).gso_segs }) == packets);
    if exact && arrived < packets {
        tables::count_lost(lost::ENTRY, packets - arrived);
    }
    TC_ACT_STOLEN
}

/// When a paced sender wants the packet to leave; 0 for at once.
#[inline(always)]
unsafe fn departure(skb: *mut __sk_buff) -> u64 {
    // SAFETY: the caller's skb; a TC program may read these fields.
    unsafe {
        if (*skb).tstamp_type == DELIVERY_MONO {
            (*skb).tstamp
        } else {
            0
        }
    }
}

/// At the carrier: from the segmenter on to the line, from the line back to the target.
#[inline(always)]
pub(crate) fn carry(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is the program's own.
    let (mark, present, tag) = unsafe {
        (
            (*skb).tc_index as u16,
            (*skb).vlan_present,
            (*skb).vlan_tci & VLAN_MASK,
        )
    };
    if mark & lane_mark::SET == 0 || present == 0 {
        tables::count_lost(lost::STRAY, 1);
        return TC_ACT_STOLEN;
    }
    let from_segmenter = tag == u32::from(lane_vlan::SEGMENTER);
    // SAFETY: the context is the program's own.
    let held_by = unsafe { noted(skb) };
    if !from_segmenter {
        // Somebody has taken the line's program away: the original has passed.
        if held_by == UNDECIDED {
            return TC_ACT_STOLEN;
        }
        // SAFETY: as above.
        unsafe { release(skb) };
    }
    let (slot, direction) = lane_mark::read(mark);
    let Some(target) = tables::target(u32::from(slot)) else {
        // What does not reach the line passes at the hook.
        if !from_segmenter {
            tables::count_lost(lost::RETURN, wire_packets(ctx));
        }
        return TC_ACT_STOLEN;
    };
    // SAFETY: the context is the program's own; the target is map memory.
    unsafe {
        if from_segmenter {
            if bpf_skb_vlan_pop(skb) != 0 {
                return TC_ACT_STOLEN;
            }
            (*skb).tc_index = u32::from(mark | lane_mark::COMPLETE);
            return bpf_redirect((*target).line, 0) as i32;
        }
        if bpf_skb_vlan_pop(skb) != 0 || !is_there(skb, (*target).ifindex) {
            tables::count_lost(lost::RETURN, wire_packets(ctx));
            return TC_ACT_STOLEN;
        }
        if let Some(flushed) = holders::flushing(&tables::Kernel, held_by) {
            holders::count(&tables::Kernel, flushed, direction, wire_packets(ctx));
            tables::count_underway((*skb).hash, NO_MORE);
            return TC_ACT_STOLEN;
        }
        // The line's queue says nothing of the target's: that goes by the flow (`skb_tx_hash`, net/core/dev.c).
        (*skb).queue_mapping = 0;
        if mark & lane_mark::CONTROL != 0 {
            (*skb).priority = (*skb).priority & !PRIORITY_CLASS | PRIORITY_CONTROL;
            (*skb).tc_index = u32::from(mark & !lane_mark::CONTROL);
        }
        // A redirect to egress takes the departure time off, one to ingress does not (`____dev_forward_skb`,
        // include/linux/netdevice.h, 6.1): a socket would take it for the time of arrival.
        (*skb).tstamp = 0;
        // A loopback device takes what arrives as something that leaves: there it still has its route.
        let flags = if direction == hook::INGRESS && (*target).loopback == 0 {
            u64::from(BPF_F_INGRESS)
        } else {
            if let Some(entry) = tables::entry() {
                (*entry).left += wire_packets(ctx);
            }
            0
        };
        bpf_redirect((*target).ifindex, flags) as i32
    }
}

/// Whether the lane's namespace has an interface of this index. A redirect says nothing where there is none; of all
/// helpers this one does (`bpf_skb_check_mtu`, net/core/filter.c, 5.12).
#[inline(always)]
unsafe fn is_there(skb: *mut __sk_buff, ifindex: u32) -> bool {
    let mut mtu = 0_u32;
    // SAFETY: the caller's skb; the kernel writes into `mtu`.
    unsafe { bpf_check_mtu(skb.cast(), ifindex, &raw mut mtu, 0, 0) >= 0 }
}

/// At the line: the fate of one packet.
#[inline(always)]
pub(crate) fn line(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let (Some(copy), Some(entry)) = (tables::copy(), tables::entry()) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: the maps' memory is this CPU's, the context the program's own.
    unsafe {
        if (*copy).valid != 0 {
            (*copy).valid = 0;
            return send(
                ctx,
                (*copy).leaves_ns,
                (*copy).hash,
                (*copy).index,
                (*copy).holders,
            );
        }
        let mark = (*skb).tc_index as u16;
        if mark & lane_mark::SET == 0 {
            tables::count_lost(lost::STRAY, 1);
            return TC_ACT_STOLEN;
        }
        note(skb, 0);
        let (slot, direction) = lane_mark::read(mark);
        let meta = skb::marked(ctx, slot, direction);
        let brought = Entry {
            complete: u32::from(mark & lane_mark::COMPLETE),
            ..*entry
        };
        let outcome = decide_line(
            &mut skb::SkbPacket::new(ctx),
            meta,
            brought,
            &tables::Kernel,
        );
        if outcome == LineOutcome::Again {
            tables::tail_call(ctx, tables::LINE);
        }
        (*entry).arrived = (*entry).arrived.wrapping_add(1);
        match outcome {
            LineOutcome::Lost => TC_ACT_STOLEN,
            LineOutcome::Again | LineOutcome::Undecided => send(ctx, 0, (*skb).hash, 0, 0),
            LineOutcome::Sent => {
                let index = brought.index as u32 & INDEX_MASK;
                corrupt::corrupt(ctx);
                emit(ctx, index)
            }
        }
    }
}

/// Sends the copies and stamps the original, or consumes it if it is lost.
#[inline(always)]
fn emit(ctx: &TcContext, index: u32) -> i32 {
    let (Some(work), Some(copy)) = (tables::work(), tables::copy()) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: the maps' memory is this CPU's. What is sent may run programs that use it too (a second target
    // behind the first), so everything that is needed is taken out before.
    unsafe {
        let copies = (*work).line.copies;
        let in_order = (*work).line.in_order;
        if (*work).line.mark != 0 {
            mark(ctx, &mut *work);
        }
        let flow = queue_hash(&(*work).key, (*work).line.turn);
        // With an own `tc_index`, a flow has only half of the hash to itself. Packets that may be overtaken need
        // all of it: they would wait for each other.
        let (flow, index) = if index != 0 && in_order != 0 {
            (flow & !INDEX_MASK | index, 1)
        } else {
            (flow, 0)
        };
        let queued_as = |number: u32, leaves_ns: u64| {
            if in_order >> number & 1 != 0 {
                (flow, index)
            } else {
                let mixed = (leaves_ns ^ u64::from(flow)).wrapping_mul(MIX);
                ((mixed >> 32) as u32 ^ number, 0)
            }
        };
        let depth = (*copy).depth;
        let mut own = 0;
        let (mut leaves_ns, mut held_by) = ((*work).line.leaves_ns[0], (*work).line.holders[0]);
        if copies != 0
            && let Some(emission) = tables::emission(depth)
        {
            // fq looks at a flow as soon as it has a packet, and then lets the flow wait for that one's time
            // (`fq_dequeue`, net/sched/sch_fq.c). So packets in order are sent in order: the last of them is this one,
            // which is not queued before the program ends.
            own = (*work).line.last;
            (*emission).leaves_ns = (*work).line.leaves_ns;
            (*emission).holders = (*work).line.holders;
            if (own as usize) < SENT {
                leaves_ns = (*emission).leaves_ns[own as usize];
                held_by = (*emission).holders[own as usize];
            }
            (*copy).depth = depth + 1;
            for number in 0..SENT {
                if number as u32 > copies {
                    break;
                }
                let leaves = (*emission).leaves_ns[number];
                if leaves == 0 || number as u32 == own {
                    continue;
                }
                (*copy).leaves_ns = leaves;
                (*copy).holders = (*emission).holders[number];
                ((*copy).hash, (*copy).index) = queued_as(number as u32, leaves);
                (*copy).valid = 1;
                let device = (*ctx.skb.skb).ifindex;
                if bpf_clone_redirect(ctx.skb.skb, device, 0) < 0 {
                    tables::count_lost(lost::COPY, 1);
                }
                (*copy).valid = 0;
            }
            (*copy).depth = depth;
        } else if copies != 0 {
            for number in 1..SENT {
                if number as u32 > copies {
                    break;
                }
                tables::count_lost(lost::COPY, 1);
            }
        }
        if leaves_ns == 0 {
            return TC_ACT_STOLEN;
        }
        let (hash, index) = queued_as(own, leaves_ns);
        send(ctx, leaves_ns, hash, index, held_by)
    }
}

/// Sends the packet on to fq if the lane has room for it: when it leaves, which packets it stays in order with,
/// whether its `tc_index` is in that hash, and, for the exit, who holds it.
#[inline(always)]
unsafe fn send(ctx: &TcContext, leaves_ns: u64, hash: u32, index: u32, held_by: u64) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is the program's own; a TC program may write these fields.
    unsafe {
        if !admit(ctx) {
            return TC_ACT_STOLEN;
        }
        bpf_set_hash(skb, hash);
        tables::count_underway(hash, 1);
        // What a receive queue was recorded as would choose the queue instead of the hash (`skb_tx_hash`).
        (*skb).queue_mapping = 0;
        (*skb).tstamp = leaves_ns;
        note(skb, held_by);
        let mut mark = (*skb).tc_index & !u32::from(lane_mark::COMPLETE);
        if index != 0 {
            mark |= u32::from(lane_mark::INDEX);
        }
        let priority = (*skb).priority;
        if priority & PRIORITY_CLASS == PRIORITY_CONTROL {
            mark |= u32::from(lane_mark::CONTROL);
            (*skb).priority = priority | PRIORITY_HELD;
        }
        (*skb).tc_index = mark;
    }
    TC_ACT_UNSPEC
}

/// Bytes of the longer of the two IP headers, without options.
const IP_HEADER: u32 = 40;

/// Says that the packet met congestion (ECN), if it is capable of being told so, and counts that.
#[inline(always)]
fn mark(ctx: &TcContext, work: &mut Work) {
    let length = ctx.len();
    let headers = work.parsed.network_offset + IP_HEADER;
    // The helper leaves the headers of a clone alone, and every packet here is one (`bpf_skb_ecn_set_ce`,
    // net/core/filter.c, 6.1); pulling gives it headers of its own (`bpf_skb_pull_data`, there). It says 1 for a
    // packet that is marked now, also where it had been before, and 0 for one that is not capable of it.
    // SAFETY: the context is the program's own, and nothing points into the packet.
    let marked = unsafe {
        bpf_skb_pull_data(ctx.skb.skb, if length < headers { length } else { headers }) == 0
            && bpf_skb_ecn_set_ce(ctx.skb.skb) == 1
    };
    if marked {
        count_marked(&tables::Kernel, work);
    }
}

/// Notes on a packet in a lane which rules hold it ([`holders`]), or [`UNDECIDED`]. (fq keeps its own notes in the first
/// three: `struct fq_skb_cb`, `net/sched/sch_fq.c`.)
#[inline(always)]
unsafe fn note(skb: *mut __sk_buff, note: u64) {
    // SAFETY: the caller's skb; a TC program may write `cb`.
    unsafe {
        (*skb).cb[3] = note as u32;
        (*skb).cb[4] = (note >> 32) as u32;
    }
}

/// What was noted.
#[inline(always)]
unsafe fn noted(skb: *mut __sk_buff) -> u64 {
    // SAFETY: the caller's skb; a TC program may read `cb`.
    unsafe { u64::from((*skb).cb[3]) | u64::from((*skb).cb[4]) << 32 }
}

/// Noted on a packet that has not been at the line. (Rules' names in a note differ: it is none of theirs.)
const UNDECIDED: u64 = u64::MAX;

/// How many wire packets an skb is.
#[inline(always)]
fn wire_packets(ctx: &TcContext) -> u64 {
    let packets = match skb::meta(ctx, hook::EGRESS).counted() {
        Some(packets) => packets,
        None => uncounted(ctx),
    };
    u64::from(packets)
}

/// The same by its headers; a function of its own, since only few packets need it.
#[inline(never)]
fn uncounted(ctx: &TcContext) -> u32 {
    let meta = skb::meta(ctx, hook::EGRESS);
    let mut parsed = Parsed::default();
    if parse(
        &skb::SkbPacket::new(ctx),
        ETHERNET,
        meta.protocol,
        &mut parsed,
    )
    .is_err()
    {
        return 1;
    }
    Segments::of(&parsed, &meta).count
}

/// What a packet adds to its lane's load. A tag of its own counts, be it beside the packet or in it.
#[inline(always)]
unsafe fn load(skb: *mut __sk_buff) -> u64 {
    // SAFETY: the caller's skb; a TC program may read these fields.
    unsafe {
        let tag = if (*skb).vlan_present != 0 {
            VLAN_LENGTH
        } else {
            0
        };
        lane_load::of((*skb).len + tag)
    }
}

/// Takes the packet into its lane's load; `false` if there is no room.
#[inline(always)]
fn admit(ctx: &TcContext) -> bool {
    let skb = ctx.skb.skb;
    // SAFETY: the context is the program's own; map memory.
    unsafe {
        let Some(lane) = tables::lane((*skb).tc_classid) else {
            return true;
        };
        let adds = load(skb);
        let held = &raw mut (*lane).held;
        let after = tables::Kernel.increment(held, adds).wrapping_add(adds);
        if lane_load::packets(after) <= (*lane).most_packets
            && lane_load::bytes(after) <= (*lane).most_bytes
        {
            return true;
        }
        tables::Kernel.increment(held, adds.wrapping_neg());
        tables::Kernel.increment(&raw mut (*lane).full_packets, wire_packets(ctx));
        false
    }
}

/// Takes a packet out of its lane's load.
#[inline(always)]
unsafe fn release(skb: *mut __sk_buff) {
    // SAFETY: the caller's skb; map memory.
    unsafe {
        if let Some(lane) = tables::lane((*skb).tc_classid) {
            // Here the tag beside the packet is the line's. One of its own is in the packet: a VLAN device, which
            // cannot insert it, has put it there (`validate_xmit_vlan`, net/core/dev.c).
            let takes = lane_load::of((*skb).len);
            tables::Kernel.increment(&raw mut (*lane).held, takes.wrapping_neg());
        }
    }
}
