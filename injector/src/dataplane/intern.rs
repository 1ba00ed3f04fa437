//! Numbers for bitmaps that stay the same from one rule set to the next.
//!
//! The prefix trie is the one table that costs a system call an entry, and its values are indices of
//! bitmaps. A bitmap is therefore known by *which conditions* it stands for rather than by its bits: when a
//! rule without addresses is added, the bits of every bitmap change, but no index, and no prefix is written.

use std::collections::HashMap;

use injector_common::layout::{BITMAP_EMPTY, BITMAP_UNPROTECTED, Bitmap};

/// What a bitmap stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Meaning {
    /// By role: the activations whose conditions on an address hold, of those that have any.
    Address(u8, Vec<u64>),
    /// These bits.
    Bits(Box<Bitmap>),
}

/// Indices of bitmaps.
#[derive(Debug, Clone, Default)]
pub(super) struct Indices {
    known: HashMap<Meaning, (u32, u64)>,
    free: Vec<u32>,
    next: u32,
    generation: u64,
}

/// There are more distinct bitmaps than the table holds.
#[derive(Debug)]
pub(super) struct TooMany;

impl Indices {
    /// Begins a rule set. What the two before it did not use is free again.
    pub(super) fn begin(&mut self) {
        self.generation += 1;
        let oldest = self.generation.saturating_sub(2);
        let free = &mut self.free;
        self.known.retain(|_, (index, used)| {
            let keep = *used >= oldest;
            if !keep {
                free.push(*index);
            }
            keep
        });
        if self.next == 0 {
            self.next = BITMAP_UNPROTECTED + 1;
        }
    }

    /// The index of a bitmap.
    pub(super) fn of(&mut self, meaning: Meaning, capacity: u32) -> Result<u32, TooMany> {
        if let Meaning::Bits(bits) = &meaning
            && **bits == Bitmap::default()
        {
            return Ok(BITMAP_EMPTY);
        }
        let generation = self.generation;
        if let Some((index, used)) = self.known.get_mut(&meaning) {
            *used = generation;
            return Ok(*index);
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.next < capacity => {
                self.next += 1;
                self.next - 1
            }
            None => return Err(TooMany),
        };
        self.known.insert(meaning, (index, generation));
        Ok(index)
    }
}
