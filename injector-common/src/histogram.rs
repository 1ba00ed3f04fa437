//! Histograms of times, kept in the kernel: buckets whose width is a sixteenth of the power of two below them.
//!
//! From one microsecond (2^10 ns) to 73 minutes (2^42 ns): 32 octaves of 16 buckets each. A value read back is off by
//! a 32nd at most, 3 %. Shorter times are in the first bucket, longer ones in the last.

/// Octaves.
const OCTAVES: u32 = 32;
/// Power of two with which the first octave begins.
const FIRST_OCTAVE: u32 = 10;
/// Bits of a value behind its first one that tell buckets of an octave apart.
const SUB_BITS: u32 = 4;
/// Buckets of a histogram. A power of two, so that an index can be bounded by a mask.
pub const BUCKETS: usize = (OCTAVES << SUB_BITS) as usize;

const _: () = assert!(BUCKETS.is_power_of_two());

/// The bucket of a time in nanoseconds.
#[inline(always)]
#[must_use]
pub const fn bucket(ns: u64) -> usize {
    const LEAST: u64 = 1 << FIRST_OCTAVE;
    const MOST: u64 = (1 << (FIRST_OCTAVE + OCTAVES)) - 1;
    let ns = if ns < LEAST {
        LEAST
    } else if ns > MOST {
        MOST
    } else {
        ns
    };
    // The lowest bit changes nothing, and keeps a reader from fearing for the zero.
    let octave = u64::BITS - 1 - (ns | 1).leading_zeros();
    let sub = (ns >> (octave - SUB_BITS)) & ((1 << SUB_BITS) - 1);
    (((octave - FIRST_OCTAVE) as usize) << SUB_BITS | sub as usize) & (BUCKETS - 1)
}

/// The times of a bucket in nanoseconds: the least, and the least of the next one.
#[must_use]
pub const fn bounds(bucket: usize) -> (u64, u64) {
    let bucket = (bucket & (BUCKETS - 1)) as u64;
    let (octave, sub) = (bucket >> SUB_BITS, bucket & ((1 << SUB_BITS) - 1));
    let shift = octave as u32 + FIRST_OCTAVE - SUB_BITS;
    let first = (1 << SUB_BITS) + sub;
    let low = if bucket == 0 { 0 } else { first << shift };
    (low, (first + 1) << shift)
}

/// The time below which a share of the packets is, in nanoseconds: the middle of its bucket, and not above the
/// longest, `max`. `per_mille` is the share in thousandths; `None` where there is no packet.
#[must_use]
pub fn quantile(counts: &[u64; BUCKETS], per_mille: u64, max: u64) -> Option<u64> {
    let total = counts
        .iter()
        .fold(0, |sum: u64, count| sum.saturating_add(*count));
    if total == 0 {
        return None;
    }
    // The rank of the packet that is asked for, from 1.
    let rank = (u128::from(total) * u128::from(per_mille))
        .div_ceil(1000)
        .max(1);
    let mut below = 0_u128;
    for (bucket, count) in counts.iter().enumerate() {
        below += u128::from(*count);
        if below >= rank {
            let (low, high) = bounds(bucket);
            let middle = if low == 0 { 0 } else { low.midpoint(high) };
            return Some(if middle < max { middle } else { max });
        }
    }
    Some(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_holds_its_bounds_and_they_join() {
        for index in 0..BUCKETS {
            let (low, high) = bounds(index);
            assert!(low < high);
            assert_eq!(bucket(low), index, "{low}");
            assert_eq!(bucket(high - 1), index, "{high}");
            if index + 1 < BUCKETS {
                assert_eq!(bounds(index + 1).0, high);
                assert_eq!(bucket(high), index + 1);
            }
            if index > 0 {
                let width = high - low;
                assert!(
                    width * 16 <= low,
                    "bucket {index} is {width} wide from {low} on"
                );
            }
        }
    }

    #[test]
    fn the_ends() {
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(1023), 0);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert!(bounds(BUCKETS - 1).1 > 3_600_000_000_000, "an hour fits");
    }

    #[test]
    fn quantiles_are_near_those_of_the_values() {
        let mut counts = [0; BUCKETS];
        let mut values = [0_u64; 1000];
        let mut value = 1_000_000_u64;
        for (n, one) in (0..).zip(&mut values) {
            value += 37_000 + n;
            *one = value;
            counts[bucket(value)] += 1;
        }
        for per_mille in [1, 500, 900, 990, 1000] {
            let exact = values[usize::try_from(per_mille).unwrap() - 1];
            let found = quantile(&counts, per_mille, value).unwrap();
            assert!(
                found.abs_diff(exact) * 31 <= exact,
                "{per_mille}: {found} for {exact}"
            );
        }
        assert_eq!(quantile(&[0; BUCKETS], 500, 0), None);
    }

    #[test]
    fn nothing_is_above_the_longest() {
        let mut counts = [0; BUCKETS];
        counts[bucket(50_000_000)] = 10;
        assert_eq!(quantile(&counts, 990, 48_500_000), Some(48_500_000));
        let mut short = [0; BUCKETS];
        short[0] = 3;
        assert_eq!(quantile(&short, 500, 0), Some(0));
    }
}
