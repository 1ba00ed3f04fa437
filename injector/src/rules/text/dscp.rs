//! DSCP code points, by number or by the names of RFC 2474 (cs), RFC 2597 (af), RFC 3246 (ef),
//! RFC 5865 (va) and RFC 8622 (le).

use super::number;
use crate::rules::error::Problem;

const NAMES: [(&str, u8); 23] = [
    ("cs0", 0),
    ("le", 1),
    ("cs1", 8),
    ("af11", 10),
    ("af12", 12),
    ("af13", 14),
    ("cs2", 16),
    ("af21", 18),
    ("af22", 20),
    ("af23", 22),
    ("cs3", 24),
    ("af31", 26),
    ("af32", 28),
    ("af33", 30),
    ("cs4", 32),
    ("af41", 34),
    ("af42", 36),
    ("af43", 38),
    ("cs5", 40),
    ("va", 44),
    ("ef", 46),
    ("cs6", 48),
    ("cs7", 56),
];

/// Reads a code point.
pub fn parse(text: &str) -> Result<u8, Problem> {
    if let Some(&(_, value)) = NAMES
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(text))
    {
        return Ok(value);
    }
    if text.eq_ignore_ascii_case("be") || text.eq_ignore_ascii_case("default") {
        return Ok(0);
    }
    number::parse(text)
        .and_then(|number| u8::try_from(number).ok())
        .filter(|&value| value < 64)
        .ok_or_else(|| {
            Problem::new(
                "is not a DSCP",
                "numbers from 0 to 63 and the names cs0 to cs7, af11 to af43, ef, va, le, be",
            )
        })
}

/// Writes a code point, by name where it has one.
#[must_use]
pub fn format(value: u8) -> String {
    NAMES
        .iter()
        .find(|&&(_, known)| known == value)
        .map_or_else(|| value.to_string(), |&(name, _)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for value in 0..64 {
            assert_eq!(parse(&format(value)).unwrap(), value);
            assert_eq!(parse(&value.to_string()).unwrap(), value);
        }
        assert_eq!(parse("EF").unwrap(), 46);
        assert_eq!(parse("0x2e").unwrap(), 46);
        assert_eq!(format(34), "af41");
        for bad in ["", "64", "af44", "-1", "cs8"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
