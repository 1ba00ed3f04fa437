//! Answers to rejected packets: the packet itself is made into its answer, and goes back.
//!
//! A packet that would have left arrives at its target as the answer, one that arrived leaves; at a loopback device,
//! where a packet keeps the route that it will need on arrival, answers leave like anything else. They are marked
//! as what has come back from a lane is ([`lane_mark`]), so that no rule is asked about them.
//!
//! # Checksums
//!
//! Whether a checksum is yet to be completed (`CHECKSUM_PARTIAL`) a program is not told, and it cannot have it
//! completed. But `bpf_skb_change_tail` does not cut into a field that is (`__bpf_skb_min_len`, net/core/filter.c,
//! 6.1), which tells exactly ([`Rejected::cut_to_checksum`]). Such a packet's upper layer stays where it is, since the
//! field is known to the kernel by its place: a reset takes it over, an ICMP error has its own headers put in front
//! of it, and a checksum that reckons with what the field will hold.
//!
//! With `CHECKSUM_COMPLETE` the kernel has the sum of all bytes behind the link layer. It becomes `CHECKSUM_NONE` where
//! the packet is cut off or lengthened (`__skb_trim_rcsum`, `__skb_grow_rcsum`, include/linux/skbuff.h), and is kept
//! right by `BPF_F_RECOMPUTE_CSUM` where it is not. `CHECKSUM_UNNECESSARY` is taken off by `bpf_skb_adjust_room`, or
//! stays, which says the truth: what is written here is right.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, TC_ACT_STOLEN,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::{
        bpf_csum_diff, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes, bpf_skb_vlan_pop, bpf_skb_vlan_push,
    },
    programs::TcContext,
};
use injector_common::{
    answers::{self, Body, Headers, MAX_BODY, MAX_HEADERS, Segment},
    decide::Work,
    layout::{answer, hook, kind, lane_mark},
    packet::MAX_VLAN_TAGS,
};

use crate::{
    skb::{bounded, opaque},
    tables,
};

/// Bytes that one call of `bpf_csum_diff` adds up at most (`MAX_BPF_STACK`, net/core/filter.c, 6.1).
const SUMMED: usize = 512;
/// Room for the longest body, in pieces of [`SUMMED`].
const ROOM: usize = 3 * SUMMED;
/// Tags that are taken off and put back: those in the packet, and one beside it.
const TAGS: usize = MAX_VLAN_TAGS as usize + 1;

const _: () = assert!(MAX_BODY as usize + 4 <= ROOM && MAX_BODY.is_multiple_of(4));

/// What an answer is made of; in a per-CPU map, since the stack is small.
#[repr(C)]
pub(crate) struct Answer {
    /// The original packet from its network header on, then zeros up to a multiple of four.
    body: [u8; ROOM],
    /// What is put in front of it, or takes its place.
    headers: Headers,
    /// VLAN tags from the outside in: the ethertype of the tag, and the tag.
    tags: [[u16; 2]; 8],
}

/// A helper refused. The packet is lost without an answer.
struct Refused;

/// A helper's result.
#[inline(always)]
fn check(result: i64) -> Result<(), Refused> {
    if result == 0 { Ok(()) } else { Err(Refused) }
}

/// Answers the packet at hand, which has been decided.
#[inline(always)]
pub(crate) fn reject(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let (Some(work), Some(space)) = (tables::work(), tables::answer()) else {
        return TC_ACT_STOLEN;
    };
    // SAFETY: map memory; both are this CPU's, and `decide` is done with the work.
    let (work, space) = unsafe { (&*work, &mut *space) };
    // SAFETY: the context is the program's own.
    let slot = unsafe { (*skb).tc_classid } as u16;
    let direction = work.meta.hook & 1;
    let (Some(target), Some(counters), Some(rule_counters)) = (
        tables::target(u32::from(slot)),
        tables::target_counters(u32::from(slot) * 2 + direction),
        tables::rule_counters(work.answer_slot * 2 + direction),
    ) else {
        return TC_ACT_STOLEN;
    };
    // SAFETY: map memory; counters are this CPU's, the fields read of the target do not change.
    let (l2_length, loopback, ifindex, counters, rule_counters) = unsafe {
        (
            (*target).l2_length,
            (*target).loopback != 0,
            (*target).ifindex,
            &mut *counters,
            &mut *rule_counters,
        )
    };
    let rejected = Rejected {
        ctx,
        work,
        l2_length,
    };
    if rejected.make_answer(space).is_err() {
        counters.errors += 1;
        return TC_ACT_STOLEN;
    }
    rule_counters.answered_packets += 1;
    let back = if loopback || direction == hook::EGRESS {
        hook::INGRESS
    } else {
        hook::EGRESS
    };
    let flags = if loopback || back == hook::EGRESS {
        0
    } else {
        u64::from(BPF_F_INGRESS)
    };
    // The original's mark and departure time are none of its answer's: a redirect to ingress would keep them.
    // SAFETY: a TC program may write these fields.
    unsafe {
        (*skb).tc_index = u32::from(lane_mark::of(slot, back) | lane_mark::ANSWER);
        (*skb).mark = 0;
        (*skb).tstamp = 0;
        bpf_redirect(ifindex, flags) as i32
    }
}

/// A packet that is to be answered.
struct Rejected<'a> {
    ctx: &'a TcContext,
    work: &'a Work,
    l2_length: u32,
}

impl Rejected<'_> {
    fn skb(&self) -> *mut __sk_buff {
        self.ctx.skb.skb
    }

    /// Turns the packet into its answer.
    ///
    /// Headers are made room for directly behind the Ethernet header, where the kernel has them only of packets
    /// without tags (`bpf_skb_adjust_room` refuses others by `skb->protocol`). So tags come off meanwhile.
    #[inline(always)]
    fn make_answer(&self, space: &mut Answer) -> Result<(), Refused> {
        let tags = self.take_tags_off(space)?;
        if self.work.answer == answer::RST {
            self.reset(space)?;
        } else {
            self.unreachable(space)?;
        }
        if self.l2_length != 0 {
            self.turn_round()?;
            self.put_tags_back(space, tags)?;
        }
        Ok(())
    }

    /// Takes all VLAN tags off; returns how many there were.
    #[inline(always)]
    fn take_tags_off(&self, space: &mut Answer) -> Result<usize, Refused> {
        let skb = self.skb();
        let mut count = 0;
        // SAFETY: the context is the program's own.
        unsafe {
            if (*skb).vlan_present != 0 {
                let kind = u16::from_be((*skb).vlan_proto as u16);
                space.tags[0] = [kind, (*skb).vlan_tci as u16];
                count = 1;
            }
        }
        let inside = (self.work.parsed.network_offset - self.l2_length) / 4;
        for index in 0..MAX_VLAN_TAGS {
            if index < inside {
                // The ethertype of a tag stands in front of it, in the place of the packet's.
                let [a, b, c, d] = self.load(12 + 4 * index)?;
                space.tags[count & 7] = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
                count += 1;
            }
        }
        for index in 0..TAGS {
            if index < count {
                // SAFETY: the context is the program's own.
                check(unsafe { bpf_skb_vlan_pop(skb) })?;
            }
        }
        Ok(count)
    }

    /// Puts the tags back on, the innermost first. The outermost ends up beside the packet, as tags of arriving
    /// packets do, and is written into it where the device cannot do that (`validate_xmit_vlan`, net/core/dev.c).
    #[inline(always)]
    fn put_tags_back(&self, space: &Answer, count: usize) -> Result<(), Refused> {
        for back in 0..TAGS {
            let index = TAGS - 1 - back;
            if index < count {
                let [kind, tag] = space.tags[index];
                // SAFETY: the context is the program's own.
                check(unsafe { bpf_skb_vlan_push(self.skb(), kind.to_be(), tag) })?;
            }
        }
        Ok(())
    }

    /// Cuts the packet's end off, up to just before the end of its checksum field, or at the end of it if that is
    /// yet to be completed: then the former is refused, the latter is not. Returns whether it is. Fields of other
    /// protocols than TCP and UDP are not known: the packet is refused if there is one to be completed.
    #[inline(always)]
    fn cut_to_checksum(&self, upper: u32) -> Result<bool, Refused> {
        let Some(field) = answers::checksum_field(&self.work.parsed) else {
            self.set_length(upper + 1)?;
            return Ok(false);
        };
        if self.set_length(upper + field + 1).is_ok() {
            return Ok(false);
        }
        self.set_length(upper + field + 2)?;
        Ok(true)
    }

    /// Cuts the packet off, or lengthens it by zeros. It is no super-packet afterwards (`skb_gso_reset`).
    #[inline(always)]
    fn set_length(&self, length: u32) -> Result<(), Refused> {
        // SAFETY: the context is the program's own.
        check(unsafe { bpf_skb_change_tail(self.skb(), length, 0) })
    }

    /// Makes room in front of the network header, or takes it away.
    #[inline(always)]
    fn adjust_room(&self, by: i32) -> Result<(), Refused> {
        // SAFETY: the context is the program's own.
        check(unsafe { bpf_skb_adjust_room(self.skb(), by, BPF_ADJ_ROOM_MAC, 0) })
    }

    /// Reads bytes. By a helper: the compiler folds several uses of the context's packet pointer into one address
    /// within the context, through which the verifier lets nobody read.
    #[inline(always)]
    fn load<const N: usize>(&self, at: u32) -> Result<[u8; N], Refused> {
        let mut bytes = [0; N];
        // SAFETY: the context is the program's own, the bytes are as many.
        check(unsafe {
            bpf_skb_load_bytes(self.skb().cast(), at, bytes.as_mut_ptr().cast(), N as u32)
        })?;
        Ok(bytes)
    }

    /// Writes bytes behind the link layer.
    #[inline(always)]
    fn store(&self, at: u32, bytes: *const u8, length: u32, most: u32) -> Result<(), Refused> {
        let length = bounded(length, most).ok_or(Refused)?;
        // SAFETY: the caller's bytes, at least `most` of them.
        check(unsafe {
            bpf_skb_store_bytes(
                self.skb(),
                at,
                bytes.cast(),
                length,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            )
        })
    }

    /// Where the packet, without tags, has its upper-layer header.
    #[inline(always)]
    fn upper(&self) -> u32 {
        self.l2_length + self.work.parsed.network_length
    }

    /// Makes a TCP reset of a segment.
    #[inline(always)]
    fn reset(&self, space: &mut Answer) -> Result<(), Refused> {
        let parsed = &self.work.parsed;
        let upper = self.upper();
        let segment = Segment {
            sequence: u32::from_be_bytes(self.load(upper + 4)?),
            acknowledgement: u32::from_be_bytes(self.load(upper + 8)?),
            payload: answers::payload(parsed, &self.work.segments),
        };
        let partial = self.cut_to_checksum(upper)?;
        self.set_length(upper + 20)?;
        // Options and extension headers go.
        let bare = if parsed.upper.kind == kind::V4 {
            20
        } else {
            40
        };
        if parsed.network_length > bare {
            self.adjust_room(bare.cast_signed() - parsed.network_length.cast_signed())?;
        }
        let length = answers::reset(parsed, &segment, partial, &mut space.headers);
        self.store(
            self.l2_length,
            space.headers.as_ptr(),
            length,
            MAX_HEADERS as u32,
        )
    }

    /// Makes an ICMP error about a packet.
    #[inline(always)]
    fn unreachable(&self, space: &mut Answer) -> Result<(), Refused> {
        let parsed = &self.work.parsed;
        let network = self.l2_length;
        let whole = self.ctx.len().saturating_sub(network);
        // Frames may be padded, super-packets are longer than each of their packets.
        let segments = &self.work.segments;
        let length = if segments.count == 1 && segments.last_length < whole {
            segments.last_length
        } else {
            whole
        };
        let length = answers::body_length(parsed, length);
        let length = bounded(length, MAX_BODY).ok_or(Refused)?;
        let body = space.body.as_mut_ptr();
        // SAFETY: as many bytes, and four more, are there.
        check(unsafe { bpf_skb_load_bytes(self.skb().cast(), network, body.cast(), length) })?;
        // SAFETY: as above.
        unsafe {
            body.add(length as usize).write(0);
            body.add(length as usize + 1).write(0);
            body.add(length as usize + 2).write(0);
        }
        let sum = if self.cut_to_checksum(self.upper())? {
            let at = parsed.network_length + answers::checksum_field(parsed).ok_or(Refused)?;
            let at = opaque(at as usize);
            if at >= MAX_BODY as usize {
                return Err(Refused);
            }
            // SAFETY: within the body.
            let field = unsafe { u16::from_be_bytes([*body.add(at), *body.add(at + 1)]) };
            sum(body, parsed.network_length as usize) + answers::completed_sum(field)
        } else {
            sum(body, length as usize)
        };
        self.set_length(network + length)?;
        let about = Body { length, sum };
        let headers = answers::unreachable(self.work.answer, parsed, about, &mut space.headers);
        self.adjust_room(headers.cast_signed())?;
        self.store(network, space.headers.as_ptr(), headers, MAX_HEADERS as u32)?;
        self.store(network + headers, body, length, MAX_BODY)
    }

    /// Sends the frame back to where it came from.
    #[inline(always)]
    fn turn_round(&self) -> Result<(), Refused> {
        let to: [u8; 6] = self.load(0)?;
        let from: [u8; 6] = self.load(6)?;
        // SAFETY: the context is the program's own, the addresses have six bytes each.
        unsafe {
            check(bpf_skb_store_bytes(
                self.skb(),
                0,
                from.as_ptr().cast(),
                6,
                0,
            ))?;
            check(bpf_skb_store_bytes(self.skb(), 6, to.as_ptr().cast(), 6, 0))
        }
    }
}

/// Ones' complement sum of the first `length` bytes of a body, which zeros follow up to a multiple of four.
#[inline(always)]
fn sum(body: *const u8, length: usize) -> u32 {
    let rounded = (length + 3) & !3;
    let mut sum = 0;
    for piece in 0..ROOM / SUMMED {
        let left = rounded.saturating_sub(piece * SUMMED);
        let now = opaque(if left < SUMMED { left } else { SUMMED });
        if now > SUMMED {
            break;
        }
        // SAFETY: a piece of the body. Its words are added as they are in memory.
        let added = unsafe {
            bpf_csum_diff(
                core::ptr::null_mut(),
                0,
                body.add(piece * SUMMED).cast_mut().cast(),
                now as u32,
                sum,
            )
        };
        // The helper's result is a sum of 32 bits.
        sum = (added & 0xffff_ffff).cast_unsigned() as u32;
    }
    u32::from(u16::from_be(answers::fold(sum)))
}
