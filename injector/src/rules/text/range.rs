//! Ranges of whole numbers: `80`, `8000-8080`, `1024-`, `-1023`.

use std::ops::RangeInclusive;

use crate::rules::error::Problem;

/// Reads a range within `0..=max`; an end that is left out is 0 or `max`.
pub fn parse(text: &str, max: u32) -> Result<RangeInclusive<u32>, Problem> {
    let accepted =
        || format!("numbers from 0 to {max} and ranges such as 10-20, 10- (and up) or -20 (up to)");
    let bound = |text: &str| {
        let problem = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            match text.parse::<u32>() {
                Ok(number) if number <= max => return Ok(number),
                _ => format!("{text} is more than {max}"),
            }
        } else {
            format!("'{text}' is not a number")
        };
        Err(Problem::new(problem, accepted()))
    };
    match text.split_once('-') {
        None => bound(text).map(|number| number..=number),
        Some(("", "")) => Err(Problem::new("has neither beginning nor end", accepted())),
        Some(("", end)) => Ok(0..=bound(end)?),
        Some((start, "")) => Ok(bound(start)?..=max),
        Some((start, end)) => {
            let (start, end) = (bound(start)?, bound(end)?);
            if start > end {
                return Err(Problem::new(
                    "is a reversed range",
                    format!("write {end}-{start}"),
                ));
            }
            Ok(start..=end)
        }
    }
}

/// Writes a range within `0..=max`.
#[must_use]
pub fn format(range: &RangeInclusive<u32>, max: u32) -> String {
    match (*range.start(), *range.end()) {
        (start, end) if start == end => start.to_string(),
        (start, end) if end == max => format!("{start}-"),
        (0, end) => format!("-{end}"),
        (start, end) => format!("{start}-{end}"),
    }
}

/// Sorts ranges and joins those that touch or overlap.
#[must_use]
pub fn normalise(mut ranges: Vec<RangeInclusive<u32>>) -> Vec<RangeInclusive<u32>> {
    ranges.sort_unstable_by_key(|range| (*range.start(), *range.end()));
    let mut joined: Vec<RangeInclusive<u32>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if *range.start() <= last.end().saturating_add(1) => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_there_and_back() {
        for (text, range, shown) in [
            ("80", 80..=80, "80"),
            ("8000-8080", 8000..=8080, "8000-8080"),
            ("1024-", 1024..=65535, "1024-"),
            ("-1023", 0..=1023, "-1023"),
            ("0-65535", 0..=65535, "0-"),
            ("65535", 65535..=65535, "65535"),
            ("0", 0..=0, "0"),
            ("7-7", 7..=7, "7"),
        ] {
            assert_eq!(parse(text, 65535).unwrap(), range, "{text}");
            assert_eq!(format(&range, 65535), shown);
            assert_eq!(parse(shown, 65535).unwrap(), range);
        }
    }

    #[test]
    fn bad_ranges() {
        for bad in [
            "",
            "-",
            "http",
            "80-http",
            "65536",
            "1-65536",
            "-+5",
            "1-2-3",
            "99999999999",
        ] {
            assert!(parse(bad, 65535).is_err(), "{bad}");
        }
        let problem = parse("90-80", 65535).unwrap_err();
        assert_eq!(problem.problem, "is a reversed range");
        assert_eq!(problem.help, "write 80-90");
    }

    #[test]
    fn joined() {
        assert_eq!(
            normalise(vec![5..=6, 1..=2, 3..=3, 9..=9, 6..=7]),
            vec![1..=3, 5..=7, 9..=9]
        );
    }
}
