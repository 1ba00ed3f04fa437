//! Numbers, and what was asked beside what was realised, in the words that people read everywhere.

use crate::{
    realised::{Realised, Spread, Unit},
    rules::text::rate,
};

/// `1 packet`, `2 packets`, `1,204,113 packets`.
#[must_use]
pub fn count(number: u64, thing: &str) -> String {
    if number == 1 {
        format!("1 {thing}")
    } else {
        format!("{} {thing}s", grouped(number))
    }
}

/// A number with its thousands apart: `1,204,113`.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `loss: asked 5.00%, realised 4.97% of 1,204,113 wire packets`; times with how they are spread, in milliseconds:
/// `delay: asked 50.000 ms, realised 50.012 ms on average of 1,204 wire packets (p50 50.1, p90 50.2, p99 50.4, max
/// 51.0)`.
#[must_use]
pub fn realised(one: &Realised) -> String {
    let number = |value: f64| match one.unit {
        Unit::Share => format!("{:.2}%", value * 100.0),
        Unit::Seconds => format!("{:.3} ms", value * 1e3),
        Unit::BitsPerSecond => bits(value),
    };
    let mean = match one.unit {
        Unit::Share => " of",
        Unit::Seconds => " on average of",
        Unit::BitsPerSecond => " while busy with",
    };
    let most = match one.fault.as_str() {
        "queue" | "stall" => " at most",
        _ => "",
    };
    let asked = format!("{}: asked {}{most}", one.fault, number(one.asked));
    match one.realised {
        Some(value) => format!(
            "{asked}, realised {}{mean} {}{}",
            number(value),
            count(one.packets, "wire packet"),
            one.spread.as_ref().map_or_else(String::new, spread)
        ),
        None => format!("{asked}, no packet yet"),
    }
}

/// ` (p50 50.1, p90 50.2, p99 50.4, max 51.0)`, in milliseconds.
fn spread(spread: &Spread) -> String {
    let number = |seconds: f64| {
        let value = seconds * 1e3;
        let decimals = match value {
            100.0.. => 0,
            10.0.. => 1,
            1.0.. => 2,
            _ => 3,
        };
        format!("{value:.decimals$}")
    };
    format!(
        " (p50 {}, p90 {}, p99 {}, max {})",
        number(spread.p50),
        number(spread.p90),
        number(spread.p99),
        number(spread.max)
    )
}

/// A rate that was measured.
fn bits(value: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates are not negative, and the cast saturates"
    )]
    let whole = value.round() as u64;
    rate::format_rounded(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!(count(1, "packet"), "1 packet");
        assert_eq!(count(0, "packet"), "0 packets");
        assert_eq!(count(1_204_113, "packet"), "1,204,113 packets");
    }

    #[test]
    fn realised_in_words() {
        let mut one = Realised {
            fault: "delay".into(),
            unit: Unit::Seconds,
            asked: 0.05,
            realised: Some(0.050_012),
            packets: 1_204_113,
            spread: Some(Spread {
                p50: 0.050_1,
                p90: 0.123_4,
                p99: 0.001_234,
                max: 0.000_5,
            }),
        };
        assert_eq!(
            realised(&one),
            "delay: asked 50.000 ms, realised 50.012 ms on average of 1,204,113 wire packets \
             (p50 50.1, p90 123, p99 1.23, max 0.500)"
        );
        one = Realised {
            fault: "rate".into(),
            unit: Unit::BitsPerSecond,
            asked: 1e7,
            realised: Some(9_987_000.0),
            packets: 1,
            spread: None,
        };
        assert_eq!(
            realised(&one),
            "rate: asked 10mbit, realised 9.99mbit while busy with 1 wire packet"
        );
        one.realised = None;
        assert_eq!(realised(&one), "rate: asked 10mbit, no packet yet");
    }
}
