//! Which rules hold a packet in a lane: what travels with the packet from the line to the exit, so that a rule's
//! packets can be told from others, flow by flow and packet by packet.
//!
//! A rule is named by the lowest 16 bits of its activation, which user space keeps different among rules in force
//! and those being flushed; four of them fill a word. Of a fifth the packet knows nothing: a flush of that rule
//! leaves it alone.

use crate::{
    decide::{Tables, read_once},
    layout::{Flushed, hook},
};

/// Rules that a packet can name.
pub const MAX_HOLDERS: u32 = 4;

const BITS: u32 = 16;
const MASK: u64 = (1 << BITS) - 1;

/// By what a rule of this activation is named; 0 for no rule.
#[inline(always)]
#[must_use]
pub const fn name(activation: u32) -> u16 {
    (activation as u64 & MASK) as u16
}

/// The rule at a place, from 0.
#[inline(always)]
#[must_use]
pub const fn at(holders: u64, place: u32) -> u16 {
    (holders >> (place * BITS) & MASK) as u16
}

/// Whether a rule is among them.
#[inline(always)]
const fn has(holders: u64, name: u16) -> bool {
    at(holders, 0) == name
        || at(holders, 1) == name
        || at(holders, 2) == name
        || at(holders, 3) == name
}

/// These and one more, if there is room.
#[inline(always)]
#[must_use]
pub const fn with(holders: u64, name: u16) -> u64 {
    if has(holders, name) || holders >> (3 * BITS) != 0 {
        holders
    } else {
        // The names in use come first; the newest one moves them on.
        holders << BITS | name as u64
    }
}

/// Those that are among both.
#[inline(always)]
#[must_use]
pub const fn common(a: u64, b: u64) -> u64 {
    let mut both = 0;
    let mut place = 0;
    while place < MAX_HOLDERS {
        let name = at(a, place);
        if name != 0 && has(b, name) {
            both = both << BITS | name as u64;
        }
        place += 1;
    }
    both
}

/// Where it is counted that a packet with these holders is dropped; `None` if none of them is being flushed.
#[inline(always)]
pub fn flushing<T: Tables>(tables: &T, holders: u64) -> Option<*mut Flushed> {
    if holders == 0 || read_once!(tables.config()?, flushing) == 0 {
        return None;
    }
    for place in 0..MAX_HOLDERS {
        let name = at(holders, place);
        if name == 0 {
            break;
        }
        if let Some(flushed) = tables.flushed(name) {
            return Some(flushed);
        }
    }
    None
}

/// Counts packets that are dropped.
///
/// # Safety
///
/// The pointer is valid, as those of [`flushing`] are.
#[inline(always)]
pub unsafe fn count<T: Tables>(tables: &T, flushed: *mut Flushed, direction: u32, packets: u64) {
    // SAFETY: as the caller promises; words are aligned.
    unsafe {
        let place = if direction == hook::EGRESS {
            &raw mut (*flushed).egress_packets
        } else {
            &raw mut (*flushed).ingress_packets
        };
        tables.increment(place, packets);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_are_named_and_each_once() {
        let mut holders = 0;
        for activation in [0x1_0007, 9, 7, 65_535, 9, 3, 11] {
            holders = with(holders, name(activation));
        }
        let mut names = [0, 1, 2, 3].map(|place| at(holders, place));
        names.sort_unstable();
        assert_eq!(names, [3, 7, 9, 65_535]);
        assert!(!has(holders, 11));
    }

    #[test]
    fn what_two_have_in_common() {
        let of = |names: &[u16]| names.iter().fold(0, |all, name| with(all, *name));
        let both = common(of(&[1, 2, 3]), of(&[4, 3, 5, 1]));
        assert!(has(both, 1) && has(both, 3) && !has(both, 2));
        // They fill the places from the first on: the first empty one ends them.
        assert_eq!([2, 3].map(|place| at(both, place)), [0, 0]);
        assert!(has(common(of(&[1, 2]), of(&[2])), 2));
        assert_eq!(common(of(&[1, 2]), of(&[3, 4])), 0);
        assert_eq!(common(of(&[1, 2]), 0), 0);
    }
}
