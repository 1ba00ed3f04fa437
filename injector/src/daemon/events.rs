//! What happened: every change that the daemon makes or meets, as a structured log event and in a ring
//! that clients read.

use std::collections::VecDeque;

use jiff::Timestamp;

use crate::protocol::{Event, EventKind, EventsResult};

/// So many events are remembered.
const CAPACITY: usize = 4096;

/// The ring of events.
#[derive(Debug)]
pub struct EventLog {
    ring: VecDeque<Event>,
    last: u64,
    capacity: usize,
}

impl Default for EventLog {
    fn default() -> Self {
        Self {
            ring: VecDeque::new(),
            last: 0,
            capacity: CAPACITY,
        }
    }
}

impl EventLog {
    /// Logs an event and remembers it.
    pub fn push(
        &mut self,
        kind: EventKind,
        rule: Option<&str>,
        target: Option<&str>,
        message: impl Into<String>,
    ) {
        self.last += 1;
        let event = Event {
            seq: self.last,
            at: Timestamp::now(),
            kind,
            rule: rule.map(str::to_owned),
            target: target.map(str::to_owned),
            message: message.into(),
        };
        // The message is the log line; the fields are there for who filters.
        match kind {
            EventKind::Problem
            | EventKind::LeaseLapsed
            | EventKind::TargetLost
            | EventKind::TargetGone
            | EventKind::RuleGone => {
                tracing::warn!(event = ?kind, seq = event.seq, rule, target, "{}", event.message);
            }
            _ => {
                tracing::info!(event = ?kind, seq = event.seq, rule, target, "{}", event.message);
            }
        }
        if self.ring.len() == self.capacity {
            self.ring.pop_front();
        }
        self.ring.push_back(event);
    }

    /// The events after one that was seen.
    #[must_use]
    pub fn after(&self, seen: u64) -> EventsResult {
        let events: Vec<Event> = self
            .ring
            .iter()
            .filter(|event| event.seq > seen)
            .cloned()
            .collect();
        let first = self.ring.front().map_or(self.last + 1, |event| event.seq);
        EventsResult {
            events,
            last: self.last,
            missed: first.saturating_sub(seen.saturating_add(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_later_events_are_told_and_forgotten_ones_are_counted() {
        let mut log = EventLog {
            capacity: 3,
            ..EventLog::default()
        };
        for number in 1..=5 {
            log.push(
                EventKind::RuleAdded,
                Some("r"),
                None,
                format!("event {number}"),
            );
        }
        let all = log.after(0);
        assert_eq!(
            all.events.iter().map(|event| event.seq).collect::<Vec<_>>(),
            [3, 4, 5]
        );
        assert_eq!((all.last, all.missed), (5, 2));
        let rest = log.after(4);
        assert_eq!((rest.events.len(), rest.last, rest.missed), (1, 5, 0));
        assert_eq!(log.after(5).events, []);
        assert_eq!(log.after(u64::MAX).missed, 0);
    }
}
