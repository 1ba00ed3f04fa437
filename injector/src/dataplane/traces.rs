//! Where each rule's trace is among those of all rules: a range of the table of opportunities.

use std::collections::BTreeMap;

use injector_common::layout::TRACE_ENTRIES;

use super::values::ActiveRule;
use crate::rules::{shaping::Speed, trace::Trace};

/// A rule's trace and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTrace {
    /// Its first entry in the table.
    pub start: u32,
    /// The trace.
    pub trace: Trace,
}

impl PlacedTrace {
    fn end(&self) -> u32 {
        self.start + self.trace.len()
    }
}

/// The traces of a rule set, by activation.
pub type Traces = BTreeMap<u32, PlacedTrace>;

/// The table is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoRoom {
    /// Opportunities of all traces, those in force included.
    pub(super) taken: u32,
    /// Opportunities of the trace that does not fit.
    pub(super) wanted: u32,
}

/// Finds room for the traces of `rules`. What `in_force` uses is not overwritten: packets are decided by it until the
/// new set has replaced it.
pub(super) fn place(in_force: &Traces, rules: &[ActiveRule]) -> Result<Traces, NoRoom> {
    let mut placed = Traces::new();
    let mut fresh = Vec::new();
    for active in rules {
        let Some(Speed::Trace(trace)) = active.rule.shaping.rate.as_ref().map(|rate| &rate.speed)
        else {
            continue;
        };
        match in_force.get(&active.activation) {
            Some(kept) => {
                placed.insert(active.activation, kept.clone());
            }
            None => fresh.push((active.activation, trace)),
        }
    }
    // What is kept is in force.
    let mut taken: Vec<(u32, u32)> = in_force
        .values()
        .map(|one| (one.start, one.end()))
        .collect();
    taken.sort_unstable();
    for (activation, trace) in fresh {
        let start = gap(&taken, trace.len()).ok_or_else(|| NoRoom {
            taken: taken.iter().map(|(start, end)| end - start).sum(),
            wanted: trace.len(),
        })?;
        let one = PlacedTrace {
            start,
            trace: trace.clone(),
        };
        let at = taken.partition_point(|(other, _)| *other < start);
        taken.insert(at, (start, one.end()));
        placed.insert(activation, one);
    }
    Ok(placed)
}

/// The first gap of so many entries between ranges in ascending order.
fn gap(taken: &[(u32, u32)], length: u32) -> Option<u32> {
    let mut from = 0;
    for (start, end) in taken {
        if start - from >= length {
            return Some(from);
        }
        from = *end;
    }
    (TRACE_ENTRIES - from >= length).then_some(from)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{dataplane::RuleSlot, rules::RuleSpec};

    fn active(activation: u32, length: u32) -> ActiveRule {
        let milliseconds: Vec<u32> = (1..=length).collect();
        let spec: RuleSpec = serde_json::from_value(serde_json::json!({
            "iface": "eth0", "peer": "10.0.0.1", "seed": 1,
            "fault": {"rate_trace": {"milliseconds": milliseconds}}
        }))
        .unwrap();
        ActiveRule {
            slot: RuleSlot(0),
            activation,
            activated_ns: 0,
            targets: Vec::new(),
            rule: Arc::new(spec.parse().unwrap()),
        }
    }

    fn starts(traces: &Traces) -> Vec<(u32, u32)> {
        traces
            .iter()
            .map(|(activation, one)| (*activation, one.start))
            .collect()
    }

    #[test]
    fn what_is_in_force_is_left_alone() {
        let first = place(&Traces::new(), &[active(1, 100), active(2, 50)]).unwrap();
        assert_eq!(starts(&first), [(1, 0), (2, 100)]);
        // 1 goes, 2 stays, 3 is new: the place of 1 is still in force.
        let second = place(&first, &[active(2, 50), active(3, 100)]).unwrap();
        assert_eq!(starts(&second), [(2, 100), (3, 150)]);
        // Now it is not.
        let third = place(&second, &[active(2, 50), active(3, 100), active(4, 100)]).unwrap();
        assert_eq!(starts(&third), [(2, 100), (3, 150), (4, 0)]);
    }

    #[test]
    fn the_table_can_be_full() {
        let large = 1 << 18;
        let rules: Vec<ActiveRule> = (1..=4).map(|number| active(number, large)).collect();
        let full = place(&Traces::new(), &rules).unwrap();
        assert_eq!(full.len(), 4);
        assert_eq!(
            place(&full, &[active(5, 1)]),
            Err(NoRoom {
                taken: TRACE_ENTRIES,
                wanted: 1
            })
        );
        // The same ones need no more.
        assert!(place(&full, &rules).is_ok());
    }
}
