//! SipHash-2-4, the keyed hash of every random decision.
//!
//! Source: J.-P. Aumasson, D. J. Bernstein, "`SipHash`: a fast short-input PRF", 2012. Inputs here are whole
//! 64-bit words, so that the kernel program needs neither buffering nor a loop of unknown length.

/// The two halves of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(pub u64, pub u64);

struct State {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl State {
    #[inline(always)]
    fn new(key: Key) -> Self {
        Self {
            v0: key.0 ^ 0x736f_6d65_7073_6575,
            v1: key.1 ^ 0x646f_7261_6e64_6f6d,
            v2: key.0 ^ 0x6c79_6765_6e65_7261,
            v3: key.1 ^ 0x7465_6462_7974_6573,
        }
    }

    #[inline(always)]
    fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v2 = self.v2.rotate_left(32);
    }

    #[inline(always)]
    fn absorb(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.round();
        self.v0 ^= word;
    }

    #[inline(always)]
    fn finish(mut self) -> u64 {
        self.v2 ^= 0xff;
        for _ in 0..4 {
            self.round();
        }
        self.v0 ^ self.v1 ^ self.v2 ^ self.v3
    }
}

/// SipHash-2-4 of `words`, each taken as eight little-endian bytes.
#[inline(always)]
#[must_use]
pub fn hash_words<const N: usize>(key: Key, words: &[u64; N]) -> u64 {
    let mut state = State::new(key);
    for word in words {
        state.absorb(*word);
    }
    state.absorb(((N as u64 * 8) & 0xff) << 56);
    state.finish()
}

/// SipHash-2-4 of `bytes`.
#[cfg(any(feature = "std", test))]
#[must_use]
pub fn hash_bytes(key: Key, bytes: &[u8]) -> u64 {
    let mut state = State::new(key);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        state.absorb(u64::from_le_bytes(*word));
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    last[7] = (bytes.len() & 0xff) as u8;
    state.absorb(u64::from_le_bytes(last));
    state.finish()
}

/// The key of a rule's random stream. Name and seed are all that enters: neither slots nor interfaces nor
/// CPUs, so that the same rule draws the same numbers on every run and every host.
#[cfg(any(feature = "std", test))]
#[must_use]
pub fn rule_key(seed: u64, name: &str) -> Key {
    // "injector" and "fault ke": two domains, so that the halves are independent.
    Key(
        hash_bytes(Key(seed, 0x696e_6a65_6374_6f72), name.as_bytes()),
        hash_bytes(Key(seed, 0x6661_756c_7420_6b65), name.as_bytes()),
    )
}

#[cfg(test)]
mod tests {
    use std::hash::Hasher as _;

    use siphasher::sip::SipHasher24;

    use super::*;

    #[test]
    fn bytes_agree_with_a_known_implementation() {
        let bytes: Vec<u8> = (0..64).collect();
        for length in 0..bytes.len() {
            let mut theirs = SipHasher24::new_with_keys(7, 0xdead_beef);
            theirs.write(&bytes[..length]);
            assert_eq!(
                hash_bytes(Key(7, 0xdead_beef), &bytes[..length]),
                theirs.finish()
            );
        }
    }

    #[test]
    fn words_are_little_endian_bytes() {
        let words = [1, u64::MAX, 0x0102_0304_0506_0708, 4, 5, 6];
        let bytes: Vec<u8> = words
            .iter()
            .flat_map(|word: &u64| word.to_le_bytes())
            .collect();
        assert_eq!(hash_words(Key(1, 2), &words), hash_bytes(Key(1, 2), &bytes));
    }

    #[test]
    fn rule_keys_differ_by_seed_and_by_name() {
        assert_ne!(rule_key(1, "a"), rule_key(2, "a"));
        assert_ne!(rule_key(1, "a"), rule_key(1, "b"));
        assert_ne!(rule_key(1, "a").0, rule_key(1, "a").1);
    }
}
