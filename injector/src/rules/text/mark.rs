//! Firewall marks: `0x10`, or `VALUE/MASK`.

use super::number;
use crate::rules::{error::Problem, model::Mark};

const ACCEPTED: &str = "VALUE or VALUE/MASK, decimal or 0x…, of 32 bits, as in 0x10/0xff";

/// Reads a mark.
pub fn parse(text: &str) -> Result<Mark, Problem> {
    let word = |text: &str| {
        number::parse(text)
            .and_then(|number| u32::try_from(number).ok())
            .ok_or_else(|| Problem::new(format!("'{text}' is not a 32-bit number"), ACCEPTED))
    };
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (word(value)?, word(mask)?),
        None => (word(text)?, u32::MAX),
    };
    if mask == 0 {
        return Err(Problem::new(
            "has a mask of zero, which asks nothing",
            ACCEPTED,
        ));
    }
    if value & !mask != 0 {
        return Err(Problem::new(
            "asks for bits outside its mask, so no packet can match",
            format!("write {:#x}/{mask:#x}", value & mask),
        ));
    }
    Ok(Mark { value, mask })
}

/// Writes a mark; a full mask is left out.
#[must_use]
pub fn format(mark: Mark) -> String {
    if mark.mask == u32::MAX {
        format!("{:#x}", mark.value)
    } else {
        format!("{:#x}/{:#x}", mark.value, mark.mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, shown) in [
            ("16", "0x10"),
            ("0x10/0xff", "0x10/0xff"),
            ("0", "0x0"),
            ("0/1", "0x0/0x1"),
        ] {
            let mark = parse(text).unwrap();
            assert_eq!(format(mark), shown);
            assert_eq!(parse(shown).unwrap(), mark);
        }
        for bad in ["", "x", "1/0", "3/2", "0x100000000", "1/2/3", "-1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
