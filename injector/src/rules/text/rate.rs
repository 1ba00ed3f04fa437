//! Rates: `10mbit` in bits per second, without floating point.

use crate::rules::error::Problem;

/// Units in bits per second, from the largest to the smallest, as tc has them.
const UNITS: [(&str, u64); 4] = [
    ("gbit", 1_000_000_000),
    ("mbit", 1_000_000),
    ("kbit", 1_000),
    ("bit", 1),
];

/// The lowest and the highest rate.
const LEAST: u64 = 1_000;
const MOST: u64 = 400_000_000_000;

const ACCEPTED: &str = "a number with a unit (bit, kbit, mbit, gbit per second), such as 10mbit or 1.5mbit, from \
                        1kbit to 400gbit";

/// Reads a rate in bits per second.
pub fn parse(text: &str) -> Result<u64, Problem> {
    let text = text.trim().to_ascii_lowercase();
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, unit)| text.strip_suffix(name).map(|number| (number, *unit)))
        .ok_or_else(|| no_unit(&text))?;
    let wrong = || Problem::new("is not a rate", ACCEPTED);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| {
        (!text.is_empty() && text.len() <= 9 && text.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| text.parse::<u64>().ok())
            .flatten()
    };
    let scale = 10_u64.pow(u32::try_from(fraction.len()).map_err(|_| wrong())?.min(9));
    let (whole, fraction) = (
        digits(whole).ok_or_else(wrong)?,
        digits(fraction).ok_or_else(wrong)?,
    );
    let bits = whole.saturating_mul(unit) + fraction * unit / scale;
    if (LEAST..=MOST).contains(&bits) {
        Ok(bits)
    } else {
        Err(Problem::new("is out of range", ACCEPTED))
    }
}

/// What is wrong with a text that ends in none of the units.
fn no_unit(text: &str) -> Problem {
    // `bps` is bytes per second to tc (tc(8), PARAMETERS), and bits to nearly everybody else.
    for (unit, bits) in [
        ("kbps", "kbit"),
        ("mbps", "mbit"),
        ("gbps", "gbit"),
        ("bps", "bit"),
    ] {
        if text.ends_with(unit) {
            return Problem::new(
                format!("is in {unit}, which tc takes for bytes per second"),
                format!(
                    "say it in bits: {bits}, and eight times the number if bytes are meant; accepted: {ACCEPTED}"
                ),
            );
        }
    }
    Problem::new("has no unit of a rate", ACCEPTED)
}

/// Writes a rate in the largest unit that it is a whole number of.
#[must_use]
pub fn format(bits: u64) -> String {
    let (name, unit) = UNITS
        .into_iter()
        .find(|(_, unit)| bits.is_multiple_of(*unit))
        .unwrap_or(("bit", 1));
    format!("{}{name}", bits / unit)
}

/// Writes a rate in its largest unit, rounded to two decimals: for people.
#[must_use]
pub fn format_rounded(bits: u64) -> String {
    let (name, unit) = UNITS
        .into_iter()
        .find(|(_, unit)| bits >= *unit)
        .unwrap_or(("bit", 1));
    let hundredths = (u128::from(bits) * 100 + u128::from(unit) / 2) / u128::from(unit);
    if hundredths.is_multiple_of(100) {
        format!("{}{name}", hundredths / 100)
    } else {
        format!("{}.{:02}{name}", hundredths / 100, hundredths % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, bits) in [
            ("10mbit", 10_000_000),
            ("1kbit", 1_000),
            ("400gbit", 400_000_000_000),
            ("1500kbit", 1_500_000),
            ("1234567bit", 1_234_567),
        ] {
            assert_eq!(parse(text).unwrap(), bits);
            assert_eq!(format(bits), text);
        }
        assert_eq!(parse("1.5Mbit").unwrap(), 1_500_000);
    }

    #[test]
    fn rounded() {
        for (bits, text) in [
            (10_000_000, "10mbit"),
            (2_406_400, "2.41mbit"),
            (999_996_000, "1000mbit"),
            (12, "12bit"),
        ] {
            assert_eq!(format_rounded(bits), text);
        }
    }

    #[test]
    fn bad_rates() {
        for bad in [
            "", "10", "mbit", "10mbps", "1bit", "500gbit", "-1mbit", "1.mbit", "1e3mbit",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for (text, unit, hint) in [
            ("10mbps", "is in mbps", "bits: mbit"),
            ("5Bps", "is in bps", "bits: bit"),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.problem.contains(unit), "{problem}");
            assert!(problem.help.contains(hint), "{}", problem.help);
        }
    }
}
