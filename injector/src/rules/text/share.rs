//! Shares, of flows and of packets: `25%` as a threshold from 0 to 2^32, without floating point.

use crate::rules::error::Problem;

/// The whole.
pub const ALL: u64 = 1 << 32;

/// Decimals of a percentage that are read; one unit of the last is below half a threshold step.
const DECIMALS: u32 = 12;

const ACCEPTED: &str = "a percentage above 0% and up to 100%, with its sign, such as 25% or 0.1%";

/// Reads a percentage above zero as the nearest threshold.
pub fn parse(text: &str) -> Result<u64, Problem> {
    match parse_from_zero(text)? {
        0 => Err(Problem::new("chooses nothing at all", ACCEPTED)),
        threshold => Ok(threshold),
    }
}

/// Reads a percentage that may be zero as the nearest threshold; none but zero itself becomes zero.
pub fn parse_from_zero(text: &str) -> Result<u64, Problem> {
    let number = text
        .trim()
        .strip_suffix('%')
        .map(str::trim_end)
        .ok_or_else(|| Problem::new("has no percent sign", format!("accepted: {ACCEPTED}")))?;
    let wrong = || Problem::new("is not a percentage", ACCEPTED);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str, longest: u32| {
        let fits = !text.is_empty()
            && text.len() <= longest as usize
            && text.bytes().all(|b| b.is_ascii_digit());
        fits.then(|| text.parse::<u64>().ok())
            .flatten()
            .map(u128::from)
    };
    let whole = digits(whole, 12).ok_or_else(wrong)?;
    let decimals = u32::try_from(fraction.len()).map_err(|_| wrong())?;
    let fraction = digits(fraction, DECIMALS).ok_or_else(wrong)?;
    // In units of 10^-DECIMALS percent.
    let percent = whole * 10u128.pow(DECIMALS) + fraction * 10u128.pow(DECIMALS - decimals);
    let hundred = 100 * 10u128.pow(DECIMALS);
    if percent > hundred {
        return Err(Problem::new("is more than 100%", ACCEPTED));
    }
    if percent == 0 {
        return Ok(0);
    }
    let threshold = (percent * u128::from(ALL) + hundred / 2) / hundred;
    match u64::try_from(threshold) {
        Ok(0) | Err(_) => Err(Problem::new(
            "is less than 32 bits can tell from zero",
            "at least 0.00000002%",
        )),
        Ok(threshold) => Ok(threshold),
    }
}

/// Writes a threshold as the shortest percentage that is read as the same threshold.
#[must_use]
pub fn format(threshold: u64) -> String {
    let hundred = |decimals: u32| 100 * 10u128.pow(decimals);
    for decimals in 0..=DECIMALS {
        let rounded =
            (u128::from(threshold) * hundred(decimals) + u128::from(ALL) / 2) / u128::from(ALL);
        let scale = 10u128.pow(decimals);
        let text = if decimals == 0 {
            format!("{rounded}%")
        } else {
            format!(
                "{}.{:0width$}%",
                rounded / scale,
                rounded % scale,
                width = decimals as usize
            )
        };
        if parse(&text).is_ok_and(|read| read == threshold) {
            return text;
        }
    }
    // Not reached for thresholds in range: eight decimals are finer than a step.
    format!("{threshold}/{ALL}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, threshold) in [
            ("25%", 1 << 30),
            ("50%", 1 << 31),
            ("100%", 1 << 32),
            ("0.1%", 4_294_967),
            ("33.3%", 1_430_224_110),
        ] {
            assert_eq!(parse(text).unwrap(), threshold);
            assert_eq!(format(threshold), text);
        }
        let mut threshold = 1;
        while threshold <= ALL {
            assert_eq!(parse(&format(threshold)).unwrap(), threshold);
            threshold = threshold * 3 / 2 + 1;
        }
    }

    #[test]
    fn zero_is_told_from_what_is_too_small() {
        for zero in ["0%", "0.0%", " 0 % "] {
            assert_eq!(parse_from_zero(zero), Ok(0));
            assert_eq!(parse(zero).unwrap_err().problem, "chooses nothing at all");
        }
        for small in ["0.000000001%", "0.00000001%"] {
            assert!(parse_from_zero(small).is_err(), "{small}");
        }
        assert_eq!(parse("0.00000002%"), Ok(1));
    }

    #[test]
    fn bad_shares() {
        for bad in [
            "",
            "25",
            "0.25",
            "0%",
            "101%",
            "100.1%",
            "-5%",
            "%",
            "a%",
            "1.%",
            ".5%",
            "1e1%",
            "0.000000001%",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
