//! Turning over bits of an skb, as [`injector_common::corrupt`] chooses them.
//!
//! The packet has come through the segmenter, so that its checksums are in its bytes (never `CHECKSUM_PARTIAL`), and
//! the receiver has to look at them again: one that somebody has vouched for (`CHECKSUM_UNNECESSARY`: a NIC, GRO, or
//! a forwarded packet's) loses that word (`__skb_reset_checksum_unnecessary`, include/linux/skbuff.h, 6.1). Where a
//! NIC has summed up the bytes (`CHECKSUM_COMPLETE`), each store keeps the sum true to them (`bpf_skb_store_bytes`
//! with `BPF_F_RECOMPUTE_CSUM`, `net/core/filter.c`, 6.1), so that the comparison with the checksum fails, or not, as
//! it should. That is why checksums are repaired by stores too: `bpf_l4_csum_replace` leaves that sum alone, in the
//! belief that the change and its repair cancel out.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_CSUM_LEVEL_RESET, BPF_F_RECOMPUTE_CSUM},
    helpers::{
        bpf_csum_level, bpf_loop, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use injector_common::{
    corrupt::{NETWORK_CHECKSUM, Repair, amended, amended_upper, byte, mask, upper_checksum},
    decide::Work,
    layout::MAX_BITS,
    line::choose_bits,
};

use crate::tables;

/// What the loops need. It lies on the stack, as a `bpf_loop` callback's context must.
struct Corrupting {
    skb: *mut __sk_buff,
    work: *mut Work,
    /// Whether checksums are to be repaired, for the rule at hand.
    repair: u32,
    /// Whether a store failed.
    failed: u32,
}

/// Does to the packet in hand what rules chose to: one after the other, each on what those before have left.
#[inline(always)]
pub(crate) fn corrupt(ctx: &TcContext) {
    let Some(work) = tables::work() else {
        return;
    };
    let skb = ctx.skb.skb;
    // SAFETY: the work is this CPU's, the context the program's own.
    unsafe {
        if (*work).line.corrupt == 0 {
            return;
        }
        // Makes it all linear and this skb's own: the bytes may be shared with the sender's queue, and a sender that
        // retransmits has to find what it sent (`skb_ensure_writable`, net/core/skbuff.c, 6.1). Stores succeed then.
        if bpf_skb_pull_data(skb, (*skb).len) != 0 {
            count_error(work);
            return;
        }
        bpf_csum_level(skb, u64::from(BPF_CSUM_LEVEL_RESET));
        (*work).line.repair = Repair::default();
        let mut corrupting = Corrupting {
            skb,
            work,
            repair: 0,
            failed: 0,
        };
        let rules = (*work).found.count;
        bpf_loop(
            rules,
            by_rule as *mut c_void,
            (&raw mut corrupting).cast(),
            0,
        );
        if corrupting.failed != 0 || !repair(skb, &*work) {
            count_error(work);
        }
    }
}

#[inline(always)]
unsafe fn count_error(work: *mut Work) {
    // SAFETY: the caller's work; counters are per CPU.
    unsafe {
        let index = u32::from((*work).meta.target) * 2 + ((*work).meta.hook & 1);
        if let Some(counters) = tables::target_counters(index) {
            (*counters).errors += 1;
        }
    }
}

/// What one rule a round does: 1 ends the loop.
extern "C" fn by_rule(index: u64, corrupting: *mut c_void) -> i64 {
    let corrupting = corrupting.cast::<Corrupting>();
    // SAFETY: `corrupt` passes its own.
    unsafe {
        let work = &mut *(*corrupting).work;
        if let Some((count, repair)) = choose_bits(&tables::Kernel, index as u32, work) {
            (*corrupting).repair = repair;
            bpf_loop(count, turn as *mut c_void, corrupting.cast(), 0);
        }
        i64::from((*corrupting).failed != 0)
    }
}

/// Turns one bit over a round: 1 ends the loop.
extern "C" fn turn(index: u64, corrupting: *mut c_void) -> i64 {
    let corrupting = corrupting.cast::<Corrupting>();
    // SAFETY: `corrupt` passes its own.
    unsafe {
        let skb = (*corrupting).skb;
        let work = &mut *(*corrupting).work;
        // A mask, which the verifier understands; there are no more rounds than bits.
        let position = work.line.bits[index as usize & (MAX_BITS as usize - 1)];
        let offset = work.parsed.network_offset + byte(position);
        let mut before = MaybeUninit::<u8>::uninit();
        if bpf_skb_load_bytes(skb.cast(), offset, before.as_mut_ptr().cast(), 1) != 0 {
            (*corrupting).failed = 1;
            return 1;
        }
        let before = before.assume_init();
        let after = before ^ mask(position);
        if !store(skb, offset, &[after]) {
            (*corrupting).failed = 1;
            return 1;
        }
        if (*corrupting).repair != 0 {
            let parsed = &work.parsed;
            work.line
                .repair
                .account(parsed, byte(position), before, after);
        }
    }
    0
}

/// Makes checksums right again; whether that worked.
#[inline(always)]
unsafe fn repair(skb: *mut __sk_buff, work: &Work) -> bool {
    let parsed = &work.parsed;
    let change = work.line.repair;
    let mut whole = true;
    // SAFETY: the caller's skb.
    unsafe {
        if change.network != 0 {
            let at = parsed.network_offset + NETWORK_CHECKSUM;
            whole &= amend(skb, at, |old| amended(old, change.network));
        }
        if change.upper != 0 {
            let at = parsed.network_offset + upper_checksum(parsed);
            whole &= amend(skb, at, |old| amended_upper(parsed, old, change.upper));
        }
    }
    whole
}

#[inline(always)]
unsafe fn amend(skb: *mut __sk_buff, at: u32, amended: impl FnOnce(u16) -> u16) -> bool {
    let mut old = [0_u8; 2];
    // SAFETY: the caller's skb, and two bytes of our own.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), at, old.as_mut_ptr().cast(), 2) != 0 {
            return false;
        }
        store(skb, at, &amended(u16::from_be_bytes(old)).to_be_bytes())
    }
}

#[inline(always)]
unsafe fn store<const N: usize>(skb: *mut __sk_buff, offset: u32, bytes: &[u8; N]) -> bool {
    let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
    // SAFETY: the caller's skb; the bytes are read only.
    unsafe { bpf_skb_store_bytes(skb, offset, bytes.as_ptr().cast(), N as u32, flags) == 0 }
}
