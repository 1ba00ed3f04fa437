//! What a lane does to numbered packets, computed anew from its definition: random streams by another
//! implementation of `SipHash`, models of loss as the man page of netem has them. Shares no code with the injector.

use std::{
    collections::BTreeSet,
    hash::Hasher as _,
    net::{IpAddr, SocketAddr},
};

use siphasher::sip::SipHasher24;

/// A rule's random stream for one flow and direction.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    keys: (u64, u64),
    stream: u64,
}

/// Protocol number of UDP.
const UDP: u64 = 17;
/// Protocol number of TCP.
const TCP: u64 = 6;

fn siphash(keys: (u64, u64), words: &[u64]) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(keys.0, keys.1);
    for word in words {
        hasher.write(&word.to_le_bytes());
    }
    hasher.finish()
}

fn named(key: (u64, u64), name: &str) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(key.0, key.1);
    hasher.write(name.as_bytes());
    hasher.finish()
}

/// The big-endian number of some ASCII letters.
fn letters(text: &str) -> u64 {
    text.bytes()
        .fold(0, |number, byte| number << 8 | u64::from(byte))
}

impl Stream {
    /// The stream of a rule for a flow of UDP; `leaving` as seen at the target.
    #[must_use]
    pub fn of_udp(seed: u64, rule: &str, ends: (SocketAddr, SocketAddr), leaving: bool) -> Self {
        Self::of(UDP, seed, rule, ends, leaving)
    }

    /// The same for a flow of TCP.
    #[must_use]
    pub fn of_tcp(seed: u64, rule: &str, ends: (SocketAddr, SocketAddr), leaving: bool) -> Self {
        Self::of(TCP, seed, rule, ends, leaving)
    }

    fn of(
        protocol: u64,
        seed: u64,
        rule: &str,
        ends: (SocketAddr, SocketAddr),
        leaving: bool,
    ) -> Self {
        let keys = (
            named((seed, letters("injector")), rule),
            named((seed, letters("fault ke")), rule),
        );
        let (low, high) = if order(&ends.0) <= order(&ends.1) {
            (ends.0, ends.1)
        } else {
            (ends.1, ends.0)
        };
        let [a, b] = words(low.ip());
        let [c, d] = words(high.ip());
        let kind = u64::from(low.is_ipv6());
        let rest = u64::from(low.port())
            | u64::from(high.port()) << 16
            | protocol << 32
            | kind << 40
            | u64::from(!leaving) << 48;
        let stream = siphash(keys, &[a, b, c, d, rest, letters("stream")]) | 1;
        Self { keys, stream }
    }

    fn bits(&self, n: u64, purpose: &str, more: u64) -> u64 {
        let shift = match purpose {
            "delay" | "bit" => 16,
            _ => 0,
        };
        let purpose = letters(purpose) << shift | more;
        siphash(self.keys, &[self.stream, n, purpose])
    }

    /// The upper and the lower 32 bits drawn for packet `n`.
    fn draw(&self, n: u64, purpose: &str, more: u64) -> (f64, f64) {
        let bits = self.bits(n, purpose, more);
        let share = |bits: u64| {
            f64::from(u32::try_from(bits & 0xffff_ffff).unwrap_or(u32::MAX)) / 4_294_967_296.0
        };
        (share(bits >> 32), share(bits))
    }

    /// Whether chance takes packet `n`, each for itself.
    #[must_use]
    pub fn loses(&self, n: u64, probability: f64) -> bool {
        self.draw(n, "loss", 0).0 < probability
    }

    /// Which of the first `count` packets the Gilbert-Elliott model takes: from good to bad with `p`, back with
    /// `r`, loss in the bad state `bad`, in the good one `good`.
    #[must_use]
    pub fn gilbert_elliott(&self, count: u64, [p, r, bad, good]: [f64; 4]) -> Vec<u64> {
        let mut is_bad = false;
        (1..=count)
            .filter(|n| {
                let (step, chance) = self.draw(*n, "loss", 0);
                let lost = chance < if is_bad { bad } else { good };
                is_bad = if is_bad { step >= r } else { step < p };
                lost
            })
            .collect()
    }

    /// Which of the first `count` packets the model of four states takes.
    #[must_use]
    pub fn four_states(&self, count: u64, [p13, p31, p32, p23, p14]: [f64; 5]) -> Vec<u64> {
        let mut state = 1;
        (1..=count)
            .filter(|n| {
                let chance = self.draw(*n, "loss", 0).0;
                state = match state {
                    1 if chance < p14 => 4,
                    1 if chance < p14 + p13 => 3,
                    2 if chance < p23 => 3,
                    3 if chance < p32 => 2,
                    3 if chance < p32 + p31 => 1,
                    4 => 1,
                    same => same,
                };
                state >= 3
            })
            .collect()
    }

    /// Whether packet `n` is duplicated.
    #[must_use]
    pub fn duplicates(&self, n: u64, probability: f64) -> bool {
        self.draw(n, "chance", 0).0 < probability
    }

    /// Whether packet `n` is corrupted.
    #[must_use]
    pub fn corrupts(&self, n: u64, probability: f64) -> bool {
        self.draw(n, "corrupt", 0).0 < probability
    }

    /// At which of these positions bits of packet `n` are turned over, if it is corrupted: `count` of them, by
    /// Floyd's algorithm.
    #[must_use]
    pub fn flips(&self, n: u64, count: usize, positions: &[usize]) -> BTreeSet<usize> {
        let count = count.min(positions.len());
        let mut chosen = BTreeSet::new();
        for (round, last) in (0..).zip(positions.len() - count..positions.len()) {
            let draw = u128::from(self.bits(n, "bit", round) >> 20);
            let number = (draw * (last as u128 + 1)) >> 44;
            let number = usize::try_from(number).unwrap_or(usize::MAX);
            if !chosen.insert(number) {
                chosen.insert(last);
            }
        }
        chosen.into_iter().map(|number| positions[number]).collect()
    }

    /// Whether packet `n` is held back.
    #[must_use]
    pub fn holds_back(&self, n: u64, probability: f64) -> bool {
        self.draw(n, "chance", 0).1 < probability
    }

    /// The probability at which the quantile of packet `n`'s delay is taken.
    #[must_use]
    pub fn delay(&self, n: u64) -> f64 {
        self.draw(n, "delay", 0).0
    }
}

/// By what two ends of a flow are ordered: address, then port, as bytes.
fn order(end: &SocketAddr) -> ([u8; 16], u16) {
    (bytes(end.ip()), end.port())
}

fn bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            bytes
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// An address as two little-endian words.
fn words(address: IpAddr) -> [u64; 2] {
    let bytes = bytes(address);
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    [word(0), word(8)]
}
