//! The skb's way through a lane: in from its target, past the line, and back.
//!
//! ```text
//! target hook ─clone─▶ segmenter (VLAN 1 on the carrier) ─▶ carrier ─▶ line (VLAN 2 on the carrier)
//!              └─────────── nothing to cut up ────────────────────────▶   │ fate, departure time
//!                                                                         ▼ fq
//! target ◀──────────────────────────────────────────────── carrier ◀──────┘
//! ```
//!
//! A clone has no socket, so that a packet that is held does not count against what its sender may have under
//! way. From the hook to the line everything is one call chain on one CPU; from fq on a packet is known by the
//! mark in its `tc_index` ([`lane_mark`]), which clones, redirects, segmentation and fq leave alone.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_INGRESS, TC_ACT_STOLEN, TC_ACT_UNSPEC},
    helpers::{
        bpf_clone_redirect, bpf_redirect, bpf_set_hash, bpf_skb_ecn_set_ce, bpf_skb_pull_data,
        bpf_skb_vlan_pop,
    },
    programs::TcContext,
};
use injector_common::{
    decide::Work,
    layout::{hook, lane_mark, lane_vlan, needs},
    line::{Entry, LineOutcome, SENT, count_marked, line as decide_line},
};

use crate::{
    skb,
    tables::{self, lost},
};

/// The skb's `tstamp` is the departure time that its sender asks for, by the monotonic clock
/// (`BPF_SKB_TSTAMP_DELIVERY_MONO`, include/uapi/linux/bpf.h).
const DELIVERY_MONO: u8 = 1;

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

/// Whether the packet comes back from a lane to this target. Its mark is taken off.
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
        (*skb).tc_index = 0;
        if loopback && marked == hook::EGRESS {
            Returned::Arrives
        } else {
            Returned::Done
        }
    }
}

/// Sends the packet through its target's lane, as a clone. Where that fails it passes.
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
    // SAFETY: map memory; the work and the counters are this CPU's.
    let (packets, device) = unsafe {
        let work = &*work;
        let packets = u64::from(work.segments.count);
        *entry = Entry {
            departure_ns: if direction == hook::EGRESS {
                departure(skb)
            } else {
                0
            },
            connection: work.connection,
        };
        let cut_up = work.enter & needs::WIRE != 0 && packets > 1;
        let device = if cut_up {
            (*target).segmenter
        } else {
            (*target).line
        };
        (packets, device)
    };
    // SAFETY: as above; a TC program may write `tc_index`.
    let result = unsafe {
        let before = (*skb).tc_index;
        (*skb).tc_index = u32::from(lane_mark::of(slot, direction));
        let result = bpf_clone_redirect(skb, device, 0);
        (*skb).tc_index = before;
        result
    };
    // SAFETY: as above.
    let counters = unsafe { &mut *counters };
    if result < 0 {
        counters.lane_refused += packets;
        counters.passed_packets += packets;
        return TC_ACT_UNSPEC;
    }
    counters.lane_packets += packets;
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
        tables::count_lost(lost::STRAY);
        return TC_ACT_STOLEN;
    }
    let (slot, direction) = lane_mark::read(mark);
    let Some(target) = tables::target(u32::from(slot)) else {
        tables::count_lost(lost::RETURN);
        return TC_ACT_STOLEN;
    };
    // SAFETY: the context is the program's own; the target is map memory.
    unsafe {
        if bpf_skb_vlan_pop(skb) != 0 {
            tables::count_lost(lost::RETURN);
            return TC_ACT_STOLEN;
        }
        if tag == u32::from(lane_vlan::SEGMENTER) {
            return bpf_redirect((*target).line, 0) as i32;
        }
        // A redirect to egress takes the departure time off, one to ingress does not (`____dev_forward_skb`,
        // include/linux/netdevice.h, 6.1): a socket would take it for the time of arrival.
        (*skb).tstamp = 0;
        // A loopback device takes what arrives as something that leaves: there it still has its route.
        let flags = if direction == hook::INGRESS && (*target).loopback == 0 {
            u64::from(BPF_F_INGRESS)
        } else {
            0
        };
        bpf_redirect((*target).ifindex, flags) as i32
    }
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
            send(ctx, (*copy).leaves_ns, (*copy).hash);
            return TC_ACT_UNSPEC;
        }
        let mark = (*skb).tc_index as u16;
        if mark & lane_mark::SET == 0 {
            tables::count_lost(lost::STRAY);
            return TC_ACT_STOLEN;
        }
        let (slot, direction) = lane_mark::read(mark);
        let meta = skb::marked(ctx, slot, direction);
        let outcome = decide_line(&mut skb::SkbPacket::new(ctx), meta, *entry, &tables::Kernel);
        match outcome {
            LineOutcome::Lost => TC_ACT_STOLEN,
            LineOutcome::Again => {
                tables::tail_call(ctx, tables::LINE);
                TC_ACT_UNSPEC
            }
            LineOutcome::Undecided => TC_ACT_UNSPEC,
            LineOutcome::Sent => emit(ctx),
        }
    }
}

/// Sends the copies and stamps the original, or consumes it if it is lost.
#[inline(always)]
fn emit(ctx: &TcContext) -> i32 {
    let (Some(work), Some(copy)) = (tables::work(), tables::copy()) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: the maps' memory is this CPU's. What is sent may run programs that use it too (a second target
    // behind the first), so everything that is needed is taken out before.
    unsafe {
        let copies = (*work).line.copies;
        let free = (*work).line.free;
        if (*work).line.mark != 0 {
            mark(ctx, &mut *work);
        }
        let flow = (*work).key.tag();
        let flow = (flow ^ flow >> 32) as u32;
        let mut leaves = [0; SENT];
        if copies != 0 {
            leaves = (*work).line.leaves_ns;
        } else {
            leaves[0] = (*work).line.leaves_ns[0];
        }
        let alone = |leaves_ns: u64, number: u32| {
            let mixed = (leaves_ns ^ u64::from(flow)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed >> 32) as u32 ^ number
        };
        for number in 1..SENT {
            if number as u32 > copies {
                break;
            }
            if leaves[number] == 0 {
                continue;
            }
            let together = free == 0 && leaves[number] == leaves[0];
            (*copy).leaves_ns = leaves[number];
            (*copy).hash = if together {
                flow
            } else {
                alone(leaves[number], number as u32)
            };
            (*copy).valid = 1;
            let device = (*ctx.skb.skb).ifindex;
            if bpf_clone_redirect(ctx.skb.skb, device, 0) < 0 {
                tables::count_lost(lost::COPY);
            }
            (*copy).valid = 0;
        }
        if leaves[0] == 0 {
            return TC_ACT_STOLEN;
        }
        let hash = if free == 0 { flow } else { alone(leaves[0], 0) };
        send(ctx, leaves[0], hash);
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

/// Stamps the packet for fq: when it leaves, and which packets it stays in order with.
#[inline(always)]
unsafe fn send(ctx: &TcContext, leaves_ns: u64, hash: u32) {
    // SAFETY: the context is the program's own; a TC program may write `tstamp`.
    unsafe {
        bpf_set_hash(ctx.as_ptr().cast(), hash);
        (*ctx.skb.skb).tstamp = leaves_ns;
    }
}
