//! Flushes: what lanes hold by rules that were healed with `--flush` is dropped as it comes out of its queue, until
//! nothing can be left.

use std::collections::HashSet;

use super::{
    host::Host,
    lanes::{Hold, MARGIN},
    lease::nanos,
    plane::Plane,
    record::Record,
    state::State,
};
use crate::{
    netns::NetnsId,
    protocol::{ErrorBody, EventKind, FlushStatus},
};

/// A rule whose held packets are being dropped.
#[derive(Debug)]
pub(super) struct Flush {
    /// The rule's name.
    pub(super) rule: String,
    /// Its activation.
    pub(super) activation: u32,
    /// What is held of it.
    pub(super) hold: Hold,
    /// Where its packets are held.
    pub(super) lane: NetnsId,
}

impl Flush {
    /// When it is over, by the kernel's monotonic clock: nothing of its rule is held any more.
    fn over_ns(&self) -> u64 {
        self.hold.over_ns().min(self.hold.until_ns)
    }
}

impl<P: Plane, H: Host> State<P, H> {
    /// Begins to drop what these rules hold. Those that hold nothing are left out.
    pub(super) fn begin_flushes(
        &mut self,
        activations: &HashSet<u32>,
    ) -> Result<Vec<Flush>, ErrorBody> {
        let flushes: Vec<Flush> = self
            .rules
            .iter()
            .filter(|record| activations.contains(&record.activation))
            .filter_map(|record| {
                Some(Flush {
                    rule: record.rule.name.clone(),
                    activation: record.activation,
                    hold: Hold::new(self.plane.now_ns(), self.holds_until(record)?),
                    lane: record.places.first()?.key.netns,
                })
            })
            .collect();
        let numbers: Vec<u32> = flushes.iter().map(|flush| flush.activation).collect();
        self.plane.begin_flush(&numbers)?;
        Ok(flushes)
    }

    /// Until when a rule that ends now may hold packets; `None` if it holds none.
    fn holds_until(&self, record: &Record) -> Option<u64> {
        if record.rule.shaping.longest_hold().is_zero() {
            return None;
        }
        let now_ns = self.plane.now_ns();
        if record.is_active() {
            let hold = record
                .places
                .iter()
                .map(|place| self.longest_hold_at(&place.key))
                .max()?;
            return Some(now_ns.saturating_add(nanos(hold.saturating_add(MARGIN))));
        }
        // It ended by itself, and its targets know until when something of it may be held.
        record
            .places
            .iter()
            .filter_map(|place| self.targets.get(&place.key))
            .filter_map(|target| target.hold)
            .map(|hold| hold.until_ns)
            .max()
            .filter(|until| *until > now_ns)
    }

    /// Takes back what [`State::begin_flushes`] began.
    pub(super) fn abandon_flushes(&mut self, flushes: &[Flush]) {
        let numbers: Vec<u32> = flushes.iter().map(|flush| flush.activation).collect();
        if let Err(error) = self.plane.end_flush(&numbers) {
            self.problem(None, format!("cannot end a flush: {error}"));
        }
    }

    /// What became of flushes so far.
    pub(super) fn flush_status(&self, flushes: &[Flush]) -> Result<Vec<FlushStatus>, ErrorBody> {
        let now_ns = self.plane.now_ns();
        flushes
            .iter()
            .map(|flush| {
                let [egress_packets, ingress_packets] = self.plane.flushed(flush.activation)?;
                let left = flush.hold.until_ns.saturating_sub(now_ns);
                Ok(FlushStatus {
                    rule: flush.rule.clone(),
                    egress_packets,
                    ingress_packets,
                    remaining: std::time::Duration::from_nanos(left).as_secs_f64(),
                })
            })
            .collect()
    }

    /// Ends the flushes of which nothing can be held any more, and tells what they dropped.
    pub(super) fn end_flushes(&mut self) {
        let now_ns = self.plane.now_ns();
        let (over, going_on) = std::mem::take(&mut self.flushes)
            .into_iter()
            .partition(|flush| flush.over_ns() <= now_ns);
        self.flushes = going_on;
        let over: Vec<Flush> = over;
        if over.is_empty() {
            return;
        }
        match self.flush_status(&over) {
            Ok(all) => {
                for status in all {
                    let message = format!(
                        "rule {}: {} packets that it had held were dropped",
                        status.rule,
                        status.egress_packets + status.ingress_packets
                    );
                    self.events
                        .push(EventKind::Flushed, Some(&status.rule), None, message);
                }
            }
            Err(error) => self.problem(None, format!("cannot tell what was flushed: {error}")),
        }
        self.abandon_flushes(&over);
    }

    /// When the next flush is over, by the kernel's monotonic clock.
    pub(super) fn next_flush_end_ns(&self) -> Option<u64> {
        self.flushes.iter().map(Flush::over_ns).min()
    }

    /// Numbers for activations to come. Packets in lanes know rules by the lowest 16 bits, so those of a rule that is
    /// there or being flushed are left out. (A rule that ended otherwise has none of its packets held after an hour,
    /// and 65,535 activations do not happen in an hour.)
    pub(super) fn free_activations(&self) -> impl Iterator<Item = u32> + use<P, H> {
        let name = injector_common::holders::name;
        let taken: HashSet<u16> = self
            .rules
            .iter()
            .map(|record| name(record.activation))
            .chain(self.flushes.iter().map(|flush| name(flush.activation)))
            .collect();
        (self.next_activation..).filter(move |activation| {
            let name = name(*activation);
            name != 0 && !taken.contains(&name)
        })
    }
}
