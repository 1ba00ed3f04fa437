//! Durations: `30s`, `500ms`, `1m30s`, `1.5s`, down to nanoseconds and without floating point.

use std::{fmt::Write, time::Duration};

use crate::rules::error::Problem;

/// Units from the largest to the smallest, in nanoseconds.
const UNITS: [(&str, u64); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// The longest duration that is accepted: ten years. It keeps sums with the kernel's clock far from
/// the end of 64 bits.
pub const MAX: Duration = Duration::from_hours(3650 * 24);

const ACCEPTED: &str = "a number with a unit (ns, us, ms, s, m, h, d), such as 500ms, 1.5s or 1m30s, \
                        up to 3650d";

/// Reads a duration. Fractions of a nanosecond are cut off.
pub fn parse(text: &str) -> Result<Duration, Problem> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(Problem::new("is empty", ACCEPTED));
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let number_end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, after) = rest.split_at(number_end);
        let unit_end = after
            .find(|c: char| !c.is_alphabetic())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        if number.is_empty() {
            return Err(Problem::new("is not a duration", ACCEPTED));
        }
        if unit.is_empty() {
            return Err(Problem::new(
                format!("{number} has no unit"),
                format!("write {number}s for seconds; accepted: {ACCEPTED}"),
            ));
        }
        let nanos = match unit {
            "µs" | "μs" => 1_000,
            _ => UNITS
                .iter()
                .find(|(name, _)| *name == unit)
                .map(|&(_, nanos)| nanos)
                .ok_or_else(|| Problem::new(format!("'{unit}' is not a unit"), ACCEPTED))?,
        };
        total += amount(number, nanos).ok_or_else(|| {
            Problem::new(
                format!("'{number}' is not a number of at most 12 digits"),
                ACCEPTED,
            )
        })?;
        rest = after.trim_start();
    }
    match u64::try_from(total).map(Duration::from_nanos) {
        Ok(duration) if duration <= MAX => Ok(duration),
        _ => Err(Problem::new("is longer than ten years", ACCEPTED)),
    }
}

/// `number` (with or without a fraction) times a unit of `nanos`.
fn amount(number: &str, nanos: u64) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| {
        (1..=12)
            .contains(&text.len())
            .then(|| text.parse::<u64>().ok())
            .flatten()
            .map(u128::from)
    };
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?.min(12));
    let nanos = u128::from(nanos);
    Some(digits(whole)? * nanos + digits(fraction)? * nanos / scale)
}

/// Writes a duration exactly: `1m30s`, `500ms`, `0s`.
#[must_use]
pub fn format(duration: Duration) -> String {
    let mut rest = duration.as_nanos();
    if rest == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (unit, nanos) in UNITS {
        let nanos = u128::from(nanos);
        let amount = rest / nanos;
        rest %= nanos;
        if amount > 0 {
            // Writing to a String does not fail.
            let _ = write!(text, "{amount}{unit}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, nanos, shown) in [
            ("30s", 30_000_000_000, "30s"),
            ("500ms", 500_000_000, "500ms"),
            ("1m30s", 90_000_000_000, "1m30s"),
            ("1m 30s", 90_000_000_000, "1m30s"),
            ("90s", 90_000_000_000, "1m30s"),
            ("1.5s", 1_500_000_000, "1s500ms"),
            ("0.25ms", 250_000, "250us"),
            ("7µs", 7_000, "7us"),
            ("1d2h3m4s5ms6us7ns", 93_784_005_006_007, "1d2h3m4s5ms6us7ns"),
            ("0s", 0, "0s"),
        ] {
            let duration = parse(text).unwrap();
            assert_eq!(duration, Duration::from_nanos(nanos), "{text}");
            assert_eq!(format(duration), shown);
            assert_eq!(parse(shown).unwrap(), duration);
        }
    }

    #[test]
    fn bad_durations() {
        for bad in [
            "",
            " ",
            "30",
            "s",
            "-1s",
            "1x",
            "1.s",
            ".5s",
            "1..5s",
            "1s1",
            "3651d",
            "1s,2s",
            "9999999999999s",
            "soon",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse("30").unwrap_err().help.contains("30s"));
    }
}
