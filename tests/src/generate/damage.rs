//! Packets that have lost their end, or some of their bits.

use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;

use crate::model::{Link, Packet};

use super::chance;

/// How far headers reach in most packets.
const HEADERS: usize = 90;

/// Cuts a packet off, most often inside its headers.
pub(super) fn truncate(rng: &mut ChaCha8Rng, packet: &mut Packet) {
    let length = packet.bytes.len();
    let reach = if chance(rng, 80) {
        length.min(HEADERS)
    } else {
        length
    };
    packet.bytes.truncate(rng.random_range(0..=reach));
}

/// Changes a packet, most often in the bytes that a parser steers by.
pub(super) fn corrupt(rng: &mut ChaCha8Rng, packet: &mut Packet, link: Link) {
    let network = match link {
        Link::Ethernet => 14,
        Link::Raw => 0,
    };
    for _ in 0..rng.random_range(1..4) {
        let reach = packet.bytes.len().min(HEADERS);
        if reach == 0 {
            return;
        }
        let at = match rng.random_range(0..10) {
            // Version and header length; both bytes of the length; fragmentation; next header.
            0 | 1 => network,
            2 => network + rng.random_range(2..8),
            3 => network + 6,
            4 => network + 9,
            // Extension headers and ports.
            5 => network + 20 + rng.random_range(0..14),
            6 => network + 40 + rng.random_range(0..14),
            // The ethertype.
            7 if link == Link::Ethernet => 12 + rng.random_range(0..2),
            _ => rng.random_range(0..reach),
        };
        if let Some(byte) = packet.bytes.get_mut(at) {
            if chance(rng, 50) {
                *byte ^= 1 << rng.random_range(0..8);
            } else {
                *byte = rng.random();
            }
        }
    }
}
