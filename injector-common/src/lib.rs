//! What the injector's kernel program and its user space share.
//!
//! [`layout`] is the contract: the tables' keys and values; [`histogram`] the buckets of one of them. [`packet`]
//! reads headers, [`segments`] turns a super-packet into wire packets, [`fate`] and [`shape`] hold the arithmetic of
//! faults, [`corrupt`] that of bits and checksums. [`line`] decides what happens to a wire packet in a lane, [`rate`]
//! how it gets through a line of limited rate there, [`holders`] tells afterwards which rules hold it, [`answers`]
//! which packets are answered and how, and [`decide`] is the whole decision about one packet, over tables that are
//! BPF maps in the kernel and ordinary memory in tests.
//!
//! Everything here is `no_std`, and is compiled for the BPF target as well as for the host: no floating
//! point, no panics that could be reached, loops with a constant bound.

#![expect(
    clippy::inline_always,
    reason = "a function that the BPF target does not inline takes at most five arguments"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "every narrowed number is bounded where it is narrowed; a checked conversion leaves a panic, \
              which the verifier would have to prove unreachable"
)]
#![cfg_attr(not(any(feature = "std", test)), no_std)]

pub mod answers;
pub mod corrupt;
pub mod decide;
pub mod fate;
pub mod histogram;
pub mod holders;
pub mod layout;
pub mod line;
pub mod packet;
pub mod rate;
pub mod segments;
pub mod shape;
pub mod siphash;
