//! The system's ping, and what it says of round trips.

use anyhow::{Context, Result};

use super::{command::Output, topology::Node};

/// Round trips of a series of pings, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundTrips {
    /// The shortest.
    pub min: f64,
    /// Their mean.
    pub mean: f64,
    /// The longest.
    pub max: f64,
}

/// Pings a node from another one, `count` times, every `interval` seconds; fails if no answer came.
pub fn ping(from: &Node, to: &Node, count: u32, interval: &str) -> Result<RoundTrips> {
    let output = from
        .ns
        .try_tool(&format!("ping -n -q -c {count} -i {interval} {}", to.v4))?;
    parse(&output).with_context(|| output.describe())
}

/// The summary: `rtt min/avg/max/mdev = 0.045/0.055/0.063/0.006 ms`.
fn parse(output: &Output) -> Result<RoundTrips> {
    round_trips(&output.stdout).context("no answer came, or ping says it in other words")
}

fn round_trips(text: &str) -> Option<RoundTrips> {
    let (_, numbers) = text.split_once("min/avg/max/mdev = ")?;
    let mut numbers = numbers.split('/').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(RoundTrips {
        min: next()?,
        mean: next()?,
        max: next()?,
    })
}

/// How many pings were sent, and how many of them had no answer, from the summary:
/// `2 packets transmitted, 1 received, 50% packet loss, time 1001ms`.
#[must_use]
pub fn sent_and_lost(text: &str) -> Option<(u64, u64)> {
    let line = text
        .lines()
        .find(|line| line.contains(" packets transmitted, "))?;
    let mut parts = line.split(", ");
    let mut number = |unit: &str| parts.next()?.strip_suffix(unit)?.parse::<u64>().ok();
    let sent = number(" packets transmitted")?;
    let received = number(" received")?;
    Some((sent, sent.checked_sub(received)?))
}

#[cfg(test)]
mod tests {
    use super::{RoundTrips, round_trips, sent_and_lost};

    #[test]
    fn lost_pings_are_counted() {
        let text = "--- 10.88.0.2 ping statistics ---\n\
                    2 packets transmitted, 1 received, 50% packet loss, time 1001ms\n";
        assert_eq!(sent_and_lost(text), Some((2, 1)));
        assert_eq!(sent_and_lost("ping: 10.88.0.2: no route"), None);
    }

    #[test]
    fn the_summary_is_read() {
        let text =
            "2 packets transmitted, 2 received\nrtt min/avg/max/mdev = 0.5/1.25/2.0/0.1 ms\n";
        assert_eq!(
            round_trips(text),
            Some(RoundTrips {
                min: 0.5,
                mean: 1.25,
                max: 2.0
            })
        );
        assert_eq!(round_trips("2 packets transmitted, 0 received"), None);
    }
}
