//! Amounts of memory: bytes with a unit. A kilobyte is 1,024 bytes.

use crate::rules::error::Problem;

/// What is accepted.
const ACCEPTED: &str =
    "whole bytes with a unit, such as 256mb (b, kb, mb, gb; kb is 1024 bytes), up to 1023gb";
/// Units and their bytes; those that end like another one come first.
const UNITS: [(&str, u64); 4] = [("kb", 1 << 10), ("mb", 1 << 20), ("gb", 1 << 30), ("b", 1)];
/// Longer ones are not meant.
const MOST: u64 = 1023 << 30;

/// Reads an amount of memory above zero.
pub fn parse(text: &str) -> Result<u64, Problem> {
    let wrong = || Problem::new("is not an amount of memory", ACCEPTED);
    let lower = text.trim().to_ascii_lowercase();
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, bytes)| Some((lower.strip_suffix(name)?, *bytes)))
        .ok_or_else(wrong)?;
    // `parse` of the standard library would take a sign.
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .filter(|bytes| (1..=MOST).contains(bytes))
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts() {
        assert_eq!(parse("256mb"), Ok(256 << 20));
        assert_eq!(parse("1gb"), Ok(1 << 30));
        assert_eq!(parse(" 64KB "), Ok(65_536));
        assert_eq!(parse("1500b"), Ok(1500));
        assert_eq!(parse("1023gb"), Ok(MOST));
        for bad in [
            "",
            "b",
            "mb",
            "256",
            "0mb",
            "-1mb",
            "+1mb",
            "1.5mb",
            "1 mb",
            "1024gb",
            "99999999999gb",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
