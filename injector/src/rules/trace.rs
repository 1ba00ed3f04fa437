//! Traces of a link's rate, in Mahimahi's packet-delivery format: a line for each opportunity to deliver 1504 bytes,
//! with its time in milliseconds; after the last one it begins again.

use std::{sync::Arc, time::Duration};

use injector_common::layout::{MAX_TRACE, OPPORTUNITY_BYTES};

use super::{
    error::{Problem, SpecError},
    spec::TraceSpec,
};

/// Times up to here, in milliseconds: a day.
const LAST: u32 = 86_400_000;

/// Characters of a name at most.
const NAME_LENGTH: usize = 64;

/// A trace: at least one opportunity, in ascending order, the last one after the beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    name: String,
    milliseconds: Arc<[u32]>,
}

impl Trace {
    /// Reads the lines of a file.
    pub fn read(text: &str) -> Result<Vec<u32>, Problem> {
        const ACCEPTED: &str = "Mahimahi's packet-delivery format: on each line a whole number of milliseconds, none \
                                below the one before";
        text.lines()
            .zip(1..)
            .map(|(line, number)| {
                line.trim().parse().map_err(|_| {
                    Problem::new(
                        format!("line {number} is no number of milliseconds"),
                        ACCEPTED,
                    )
                })
            })
            .collect()
    }

    /// Reads the text form of a rule.
    pub(super) fn parse(spec: &TraceSpec) -> Result<Self, SpecError> {
        let refuse = |problem: String, help: String| SpecError::field("rate_trace", problem, help);
        let name = spec.name.as_deref().unwrap_or("trace");
        if name.is_empty()
            || name.chars().count() > NAME_LENGTH
            || name.chars().any(char::is_control)
        {
            return Err(refuse(
                "the name of the trace cannot be shown".to_owned(),
                format!("1 to {NAME_LENGTH} characters, none of them a control character"),
            ));
        }
        let times = spec.milliseconds.as_slice();
        if times.len() > MAX_TRACE as usize {
            return Err(refuse(
                format!("the trace has {} opportunities", times.len()),
                format!("at most {MAX_TRACE}"),
            ));
        }
        if let Some(at) = times.windows(2).position(|pair| pair[0] > pair[1]) {
            return Err(refuse(
                format!("line {} of the trace is before the line above it", at + 2),
                "times in ascending order".to_owned(),
            ));
        }
        match times.last() {
            None => Err(refuse(
                "the trace is empty".to_owned(),
                "at least one opportunity".to_owned(),
            )),
            Some(0) => Err(refuse(
                "the trace takes no time".to_owned(),
                "a last opportunity after 0 ms".to_owned(),
            )),
            Some(last) if *last > LAST => Err(refuse(
                format!("the trace lasts for {last} ms"),
                format!("a day at most, {LAST} ms"),
            )),
            Some(_) => Ok(Self {
                name: name.to_owned(),
                milliseconds: times.into(),
            }),
        }
    }

    /// The text form.
    pub(super) fn spec(&self) -> TraceSpec {
        TraceSpec {
            name: Some(self.name.clone()),
            milliseconds: self.milliseconds.to_vec(),
        }
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opportunities.
    #[must_use]
    pub fn len(&self) -> u32 {
        // `parse` saw to it.
        u32::try_from(self.milliseconds.len()).unwrap_or(MAX_TRACE)
    }

    /// Never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.milliseconds.is_empty()
    }

    /// Times of the opportunities in nanoseconds.
    pub fn nanoseconds(&self) -> impl Iterator<Item = u64> {
        self.milliseconds
            .iter()
            .map(|time| u64::from(*time) * 1_000_000)
    }

    /// After how long it begins again.
    #[must_use]
    pub fn period(&self) -> Duration {
        let last = self.milliseconds.last().copied().unwrap_or(1);
        Duration::from_millis(u64::from(last))
    }

    /// Its mean rate in bits per second, rounded down.
    #[must_use]
    pub fn mean_bits(&self) -> u64 {
        let period = u64::try_from(self.period().as_millis()).unwrap_or(u64::MAX);
        u64::from(self.len()) * OPPORTUNITY_BYTES * 8 * 1000 / period.max(1)
    }

    /// The longest that it can take until so many bytes are through that are all there are, wherever it is.
    #[must_use]
    pub fn longest(&self, bytes: u64) -> Duration {
        let length = self.milliseconds.len();
        // The first byte may find an opportunity that has just gone by, and lie at the end of the next one.
        let steps = usize::try_from(bytes.div_ceil(OPPORTUNITY_BYTES) + 1).unwrap_or(usize::MAX);
        let rounds = u64::try_from(steps / length).unwrap_or(u64::MAX);
        let rest = steps % length;
        let period = u64::try_from(self.period().as_millis()).unwrap_or(u64::MAX);
        let over = self
            .milliseconds
            .iter()
            .enumerate()
            .map(|(at, from)| {
                let to = at + rest;
                let round = if to < length { 0 } else { period };
                u64::from(self.milliseconds[to % length]) + round - u64::from(*from)
            })
            .max()
            .unwrap_or(0);
        Duration::from_millis(period.saturating_mul(rounds).saturating_add(over))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(milliseconds: &[u32]) -> Trace {
        Trace::parse(&TraceSpec {
            name: None,
            milliseconds: milliseconds.to_vec(),
        })
        .unwrap()
    }

    #[test]
    fn files_are_read() {
        assert_eq!(Trace::read("0\n0\n5\n10\n").unwrap(), [0, 0, 5, 10]);
        assert_eq!(Trace::read("7\r\n8").unwrap(), [7, 8]);
        for bad in ["1\n\n2", "1.5", "-1", "x", "1 2"] {
            assert!(Trace::read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn wrong_traces_are_refused() {
        let refused = |milliseconds: Vec<u32>| {
            let spec = TraceSpec {
                name: None,
                milliseconds,
            };
            Trace::parse(&spec).unwrap_err().problem
        };
        assert!(refused(vec![]).contains("empty"));
        assert!(refused(vec![0, 0]).contains("no time"));
        assert!(refused(vec![5, 4]).contains("line 2"));
        assert!(refused(vec![1; MAX_TRACE as usize + 1]).contains("opportunities"));
        assert!(refused(vec![LAST + 1]).contains("lasts"));
        for name in ["", "a\nb", &"x".repeat(65)] {
            let spec = TraceSpec {
                name: Some(name.to_owned()),
                milliseconds: vec![1],
            };
            assert!(Trace::parse(&spec).is_err(), "{name:?}");
        }
    }

    #[test]
    fn mean_and_longest() {
        // Two opportunities in 10 ms: 2 * 1504 * 8 bits.
        let even = trace(&[5, 10]);
        assert_eq!(even.mean_bits(), 2_406_400);
        assert_eq!(even.longest(1), Duration::from_millis(10));
        assert_eq!(even.longest(1505), Duration::from_millis(15));
        // All at once, then nothing for a second.
        let burst = trace(&[0, 0, 0, 1000]);
        assert_eq!(burst.longest(1), Duration::from_secs(1));
        assert_eq!(burst.longest(1504 * 8), Duration::from_secs(3));
        assert_eq!(trace(&[100]).longest(1504), Duration::from_millis(200));
    }
}
