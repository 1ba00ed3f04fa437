//! A link that flaps: `up=3s,down=500ms`, with `phase=1s` where wanted.

use std::{fmt::Write, time::Duration};

use super::duration;
use crate::rules::{error::Problem, model::Flap};

const ACCEPTED: &str = "up=TIME,down=TIME and, where wanted, phase=TIME, as in up=3s,down=500ms";

/// Reads a flap.
pub fn parse(text: &str) -> Result<Flap, Problem> {
    let (mut up, mut down, mut phase) = (None, None, None);
    for part in text.split(',') {
        let (key, value) = part
            .trim()
            .split_once('=')
            .ok_or_else(|| Problem::new(format!("'{part}' is not KEY=TIME"), ACCEPTED))?;
        let slot = match key {
            "up" => &mut up,
            "down" => &mut down,
            "phase" => &mut phase,
            _ => return Err(Problem::new(format!("has no part '{key}'"), ACCEPTED)),
        };
        let value = duration::parse(value)
            .map_err(|p| Problem::new(format!("{key} '{value}' {}", p.problem), p.help))?;
        if slot.replace(value).is_some() {
            return Err(Problem::new(format!("has '{key}' twice"), ACCEPTED));
        }
    }
    let part = |value: Option<Duration>, key: &str| match value {
        None => Err(Problem::new(format!("lacks '{key}'"), ACCEPTED)),
        Some(Duration::ZERO) => Err(Problem::new(
            format!("has '{key}' of zero"),
            "both parts longer than zero; without flapping leave flap out",
        )),
        Some(value) => Ok(value),
    };
    let (up, down) = (part(up, "up")?, part(down, "down")?);
    let phase = phase.unwrap_or_default();
    if phase >= up + down {
        return Err(Problem::new(
            format!(
                "has a phase of {} in a cycle of {}",
                duration::format(phase),
                duration::format(up + down)
            ),
            "a phase shorter than up and down together",
        ));
    }
    Ok(Flap { up, down, phase })
}

/// Writes a flap; a phase of zero is left out.
#[must_use]
pub fn format(flap: &Flap) -> String {
    let mut text = format!(
        "up={},down={}",
        duration::format(flap.up),
        duration::format(flap.down)
    );
    if flap.phase > Duration::ZERO {
        // Writing to a String does not fail.
        let _ = write!(text, ",phase={}", duration::format(flap.phase));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for text in ["up=3s,down=500ms", "up=3s,down=500ms,phase=3s499ms"] {
            assert_eq!(format(&parse(text).unwrap()), text);
        }
        assert_eq!(format(&parse("down=1s, up=2s").unwrap()), "up=2s,down=1s");
    }

    #[test]
    fn bad_flaps() {
        for bad in [
            "",
            "up=3s",
            "down=3s",
            "up=0s,down=1s",
            "up=1s,down=0ms",
            "up=1s,down=1s,phase=2s",
            "up=1s,up=1s,down=1s",
            "3s/500ms",
            "up=1,down=1s",
            "up=1s,down=1s,x=1s",
            "up=1s,,down=1s",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
