//! Whole numbers, decimal or hexadecimal (`0x…`).

/// Reads a number; `None` where the text is none, or one beyond 64 bits. No sign, no blanks.
#[must_use]
pub fn parse(text: &str) -> Option<u64> {
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (digits, radix) = hexadecimal.map_or((text, 10), |digits| (digits, 16));
    // from_str_radix would take a sign.
    let only_digits = digits.chars().all(|c| c.is_digit(radix));
    only_digits
        .then(|| u64::from_str_radix(digits, radix).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn numbers() {
        assert_eq!(parse("0"), Some(0));
        assert_eq!(parse("0x1F"), Some(31));
        for bad in ["", "+1", "-1", "0x", "0x+1", "1 ", "99999999999999999999"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
