//! TCP flags: `syn,!ack` (these set, those not), or `VALUE/MASK` in numbers.

use super::number;
use crate::rules::{error::Problem, model::TcpFlags};

/// Names by bit of the header's 14th byte.
const NAMES: [&str; 8] = ["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"];

const ACCEPTED: &str = "flags that must be set and, with '!', flags that must not, out of fin, syn, \
                        rst, psh, ack, urg, ece, cwr, as in syn,!ack; or VALUE/MASK, as in 0x02/0x12";

/// Reads a condition on TCP flags.
pub fn parse(text: &str) -> Result<TcpFlags, Problem> {
    if let Some((value, mask)) = text.trim().split_once('/') {
        let byte = |text: &str| {
            number::parse(text)
                .and_then(|number| u8::try_from(number).ok())
                .ok_or_else(|| {
                    Problem::new(format!("'{text}' is not a number from 0 to 255"), ACCEPTED)
                })
        };
        let (value, mask) = (byte(value)?, byte(mask)?);
        if mask == 0 {
            return Err(Problem::new(
                "has a mask of zero, which asks nothing",
                ACCEPTED,
            ));
        }
        if value & !mask != 0 {
            return Err(Problem::new(
                "asks for bits outside its mask, so no packet can match",
                format!("write {:#04x}/{mask:#04x}", value & mask),
            ));
        }
        return Ok(TcpFlags { mask, value });
    }
    let mut flags = TcpFlags { mask: 0, value: 0 };
    for entry in text.split(',').map(str::trim) {
        let (wanted, name) = match entry.strip_prefix('!') {
            Some(name) => (false, name),
            None => (true, entry),
        };
        let bit = NAMES
            .iter()
            .position(|known| known.eq_ignore_ascii_case(name))
            .map(|position| 1u8 << position)
            .ok_or_else(|| Problem::new(format!("'{name}' is not a TCP flag"), ACCEPTED))?;
        if flags.mask & bit != 0 {
            return Err(Problem::new(format!("names '{name}' twice"), ACCEPTED));
        }
        flags.mask |= bit;
        if wanted {
            flags.value |= bit;
        }
    }
    Ok(flags)
}

/// Writes a condition on TCP flags, by names.
#[must_use]
pub fn format(flags: TcpFlags) -> String {
    let named = |set: bool| {
        NAMES
            .iter()
            .enumerate()
            .filter_map(move |(position, name)| {
                let bit = 1u8 << position;
                (flags.mask & bit != 0 && (flags.value & bit != 0) == set)
                    .then(|| format!("{}{name}", if set { "" } else { "!" }))
            })
    };
    named(true)
        .chain(named(false))
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, mask, value, shown) in [
            ("syn,!ack", 0x12, 0x02, "syn,!ack"),
            ("!ack,SYN", 0x12, 0x02, "syn,!ack"),
            ("0x02/0x12", 0x12, 0x02, "syn,!ack"),
            ("rst", 4, 4, "rst"),
            ("!fin,!rst", 5, 0, "!fin,!rst"),
            ("0/255", 255, 0, "!fin,!syn,!rst,!psh,!ack,!urg,!ece,!cwr"),
        ] {
            let flags = parse(text).unwrap();
            assert_eq!(flags, TcpFlags { mask, value }, "{text}");
            assert_eq!(format(flags), shown);
            assert_eq!(parse(shown).unwrap(), flags);
        }
    }

    #[test]
    fn bad_flags() {
        for bad in [
            "", "sin", "syn,!syn", "syn,syn", "syn,", "0/0", "3/2", "256/256", "!", "2",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
