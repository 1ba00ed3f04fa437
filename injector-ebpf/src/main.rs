//! The injector's TC programs: one for each direction at a target, and those of the [`lane`].
//!
//! An entry point builds the context, lets [`injector_common::decide`] decide, and turns the verdict into an
//! action. Maps are in [`tables`], reading of the skb in [`skb`], turning over of its bits in [`corrupt`], what becomes
//! of rejected packets in [`reject`].
//!
//! A packet can need more than one pass: because its headers had to be pulled into the linear part first, or because it
//! leaves through a loopback device and is decided for arrival as well, or because it is answered. Each pass is a run
//! of its own, by a tail call.
//!
//! Both are `cls_bpf` filters in direct-action mode on clsact. To pass a packet they return `TC_ACT_UNSPEC`:
//! filters behind them still see it, and `tc_index` is left alone (`TC_ACT_OK` would overwrite it from
//! `tc_classid`: `sch_handle_egress`, net/core/dev.c, 6.1). To cut one they return `TC_ACT_STOLEN`: the skb is
//! consumed and the sender is told `NET_XMIT_SUCCESS`, where `TC_ACT_SHOT` would tell it `NET_XMIT_DROP`.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(
    internal_features,
    reason = "BPF's fetch-and-add is reached only through the intrinsic"
)]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::needless_pass_by_value,
    reason = "what the classifier macro makes of a documented function, and the signature that it asks for"
)]
#![expect(
    clippy::inline_always,
    reason = "a function that is not inlined takes at most five arguments, and is verified anew with each caller"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "the kernel hands down 16-bit numbers in 32-bit fields; a checked conversion leaves a panic"
)]

mod corrupt;
mod lane;
mod reject;
mod skb;
mod tables;

use aya_ebpf::{
    bindings::{TC_ACT_STOLEN, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use injector_common::{
    decide::{Outcome, pass},
    layout::hook,
};

use crate::lane::Returned;

/// Packets that leave through the interface.
#[classifier]
pub fn injector_egress(ctx: TcContext) -> i32 {
    run(&ctx, hook::EGRESS)
}

/// Packets that arrive at the interface.
#[classifier]
pub fn injector_ingress(ctx: TcContext) -> i32 {
    run(&ctx, hook::INGRESS)
}

/// Passes everything: what `cargo xtask bench` measures the cost of the others against.
#[classifier]
pub fn injector_empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// Packets that leave through the carrier of a lane.
#[classifier]
pub fn injector_carrier(ctx: TcContext) -> i32 {
    lane::carry(&ctx)
}

/// Wire packets at the entry of a lane's line.
#[classifier]
pub fn injector_line(ctx: TcContext) -> i32 {
    lane::line(&ctx)
}

/// Packets that are answered.
#[classifier]
pub fn injector_reject(ctx: TcContext) -> i32 {
    reject::reject(&ctx)
}

#[inline(always)]
fn run(ctx: &TcContext, direction: u32) -> i32 {
    match lane::returned(ctx, direction) {
        Returned::Not => {}
        Returned::Done => return TC_ACT_UNSPEC,
        Returned::Arrives => {
            tables::tail_call(ctx, hook::INGRESS);
            return TC_ACT_UNSPEC;
        }
    }
    let mut packet = skb::SkbPacket::new(ctx);
    let next = match pass(&mut packet, skb::meta(ctx, direction), &tables::Kernel) {
        Outcome::Pass => return TC_ACT_UNSPEC,
        Outcome::Cut => return TC_ACT_STOLEN,
        Outcome::Lane => return lane::enter(ctx, direction),
        Outcome::Reject => {
            tables::tail_call(ctx, tables::REJECT);
            return TC_ACT_STOLEN;
        }
        Outcome::Again => direction,
        Outcome::Arrives => hook::INGRESS,
    };
    tables::tail_call(ctx, next);
    // Still here: the table of programs is empty, since nobody holds the data plane any more.
    TC_ACT_UNSPEC
}

/// A panic that could be reached would be an endless loop, which the verifier refuses.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Some of the helpers in use are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
