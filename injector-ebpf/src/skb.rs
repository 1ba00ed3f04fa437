//! The skb as a packet: bounds-checked reads of its linear part, and what the kernel says of it.

use aya_ebpf::{helpers::bpf_skb_pull_data, programs::TcContext};
use injector_common::{
    packet::{Packet, Window},
    segments::Meta,
};

/// Offsets beyond are not read. Far more than four VLAN tags and eight extension headers of ordinary size
/// take, and little enough for the verifier, which bounds packet offsets by 65,535 (`MAX_PACKET_OFF`,
/// kernel/bpf/verifier.c).
const MAX_OFFSET: usize = 0x3fff;

/// Bytes that are pulled into the linear part when headers lie in pages.
const PULL: u32 = 512;

/// An skb.
pub(crate) struct SkbPacket<'a> {
    ctx: &'a TcContext,
}

impl<'a> SkbPacket<'a> {
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }
}

/// Bytes of the linear part that were checked to be there.
#[derive(Clone, Copy)]
pub(crate) struct SkbWindow(*const u8);

impl Packet for SkbPacket<'_> {
    type Window = SkbWindow;

    #[inline(always)]
    fn window(&self, offset: u32, length: u32) -> Option<SkbWindow> {
        let offset = opaque(offset as usize);
        if offset > MAX_OFFSET {
            return None;
        }
        // Both ends are read anew each time: a helper may have moved the packet in between.
        let start = opaque(self.ctx.data() + offset);
        if start + length as usize > self.ctx.data_end() {
            return None;
        }
        Some(SkbWindow(start as *const u8))
    }

    #[inline(always)]
    fn pull(&mut self) -> bool {
        let length = self.ctx.len();
        let length = if length < PULL { length } else { PULL };
        if self.ctx.data_end() - self.ctx.data() >= length as usize {
            return false;
        }
        // SAFETY: the context is the program's own.
        unsafe { bpf_skb_pull_data(self.ctx.skb.skb, length) == 0 }
    }
}

/// Hides from the optimiser how an offset or a packet pointer came about. Else it may compare one sum with the
/// packet's end and read through another that it knows to be equal; the verifier knows only about the first.
#[inline(always)]
pub(crate) fn opaque(mut value: usize) -> usize {
    // SAFETY: a register is copied onto itself. (Without any instruction two lines of source would share an
    // address, which the kernel refuses in line_info.)
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// A length from 1 to `most`, in a form of which the verifier knows that it is one: that of 6.1 learns nothing from
/// a comparison with zero (`reg_set_min_max`, kernel/bpf/verifier.c).
#[inline(always)]
pub(crate) fn bounded(length: u32, most: u32) -> Option<u32> {
    let beyond_first = opaque((length as usize).wrapping_sub(1));
    if beyond_first < most as usize {
        Some(beyond_first as u32 + 1)
    } else {
        None
    }
}

#[expect(
    clippy::cast_ptr_alignment,
    reason = "the supported machines read any address, and the compiler would read an unaligned one bytewise"
)]
impl Window for SkbWindow {
    #[inline(always)]
    fn u8(self, at: usize) -> u8 {
        // SAFETY: within the window, which `window` compared with the packet's end.
        unsafe { *self.0.add(at) }
    }

    #[inline(always)]
    fn be16(self, at: usize) -> u16 {
        // SAFETY: as above. Headers are aligned to two bytes at least; BPF_F_STRICT_ALIGNMENT is not asked
        // for, and the supported machines read any address.
        u16::from_be(unsafe { *self.0.add(at).cast::<u16>() })
    }

    #[inline(always)]
    fn be32(self, at: usize) -> u32 {
        u32::from_be(self.raw32(at))
    }

    #[inline(always)]
    fn raw32(self, at: usize) -> u32 {
        // SAFETY: as in `be16`.
        unsafe { *self.0.add(at).cast::<u32>() }
    }
}

/// What the kernel says of the packet. The slot of the target is the classid of our own filter, which
/// `cls_bpf` puts into `tc_classid` before it runs the program (`cls_bpf_classify`, `net/sched/cls_bpf.c`, 6.1):
/// one loaded program serves any number of interfaces and namespaces.
#[inline(always)]
pub(crate) fn meta(ctx: &TcContext, direction: u32) -> Meta {
    // SAFETY: the context is the program's own, and these fields may be read by a TC program.
    let skb = unsafe { &*ctx.skb.skb };
    Meta {
        length: skb.len,
        gso_size: skb.gso_size,
        gso_segs: skb.gso_segs,
        mark: skb.mark,
        protocol: u16::from_be(skb.protocol as u16),
        target: skb.tc_classid as u16,
        hook: direction,
    }
}

/// The same for a packet in a lane, whose target and direction are known by its mark.
#[inline(always)]
pub(crate) fn marked(ctx: &TcContext, target: u16, direction: u32) -> Meta {
    Meta {
        target,
        hook: direction,
        ..meta(ctx, direction)
    }
}
