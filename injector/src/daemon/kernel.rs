//! The real data plane behind the daemon's [`Plane`].

use std::{os::fd::BorrowedFd, time::Duration};

use injector_common::layout::{MAX_EXEMPTIONS, MAX_FLUSHES, MAX_RULES};

use super::plane::{
    ActiveRule, Committed, Exemption, Histograms, LaneBounds, LaneNumber, LaneUse, LeaseSwitch,
    Limits, Plane, RuleSlot, TargetConfig, TargetSlot,
};
use crate::{
    dataplane::{self, CommitError, DataPlane, DataPlaneError, Lease, Sizes},
    netlink::Hook,
    protocol::{ErrorBody, ErrorCode, LaneLosses, RuleCounters, TableUse, TargetCounters},
};

/// Loads the data plane.
///
/// # Errors
/// The kernel refuses it: `unsupported` where it lacks something, `not_permitted` without the privilege.
pub fn load(sizes: &Sizes) -> Result<KernelPlane, ErrorBody> {
    let plane = DataPlane::load(sizes).map_err(|error| {
        let code = if nix::unistd::geteuid().is_root() {
            ErrorCode::Unsupported
        } else {
            ErrorCode::NotPermitted
        };
        ErrorBody::new(code, chain(&error))
            .with_hint("`injector check` says what this kernel and this user can do")
    })?;
    Ok(KernelPlane { plane })
}

/// The loaded programs.
pub struct KernelPlane {
    plane: DataPlane,
}

impl std::fmt::Debug for KernelPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelPlane")
            .field("sizes", self.plane.sizes())
            .finish_non_exhaustive()
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

fn host_error(error: &DataPlaneError) -> ErrorBody {
    ErrorBody::new(ErrorCode::Host, chain(error))
}

impl Plane for KernelPlane {
    fn limits(&self) -> Limits {
        Limits {
            rules: u16::try_from(MAX_RULES).unwrap_or(u16::MAX),
            // Slot 0 is for test runs.
            targets: self.plane.sizes().targets.saturating_sub(1),
            exemptions: MAX_EXEMPTIONS as usize,
        }
    }

    fn program(&self, hook: Hook) -> BorrowedFd<'_> {
        self.plane.program_fd(hook)
    }

    fn lane_programs(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        self.plane.lane_fds()
    }

    fn now_ns(&self) -> u64 {
        DataPlane::monotonic_ns()
    }

    fn lease(&self) -> Result<Box<dyn LeaseSwitch>, ErrorBody> {
        Ok(Box::new(self.plane.lease()))
    }

    fn commit(
        &mut self,
        targets: &[TargetConfig],
        rules: &[ActiveRule],
        exempt: &[Exemption],
    ) -> Result<Committed, ErrorBody> {
        match self.plane.commit(targets, rules, exempt) {
            Ok(commit) => Ok(Committed {
                epoch: commit.epoch,
            }),
            Err(CommitError::Compile(error)) => {
                Err(ErrorBody::new(ErrorCode::Limit, chain(&error)))
            }
            Err(CommitError::Plane(error)) => Err(host_error(&error)),
        }
    }

    fn rule_counters(&self, slot: RuleSlot) -> Result<[RuleCounters; 2], ErrorBody> {
        let counters = self
            .plane
            .rule_counters(slot)
            .map_err(|error| host_error(&error))?;
        Ok(counters.map(|counters| rule_counters(&counters)))
    }

    fn rule_histograms(&self, slot: RuleSlot) -> Box<Histograms> {
        self.plane.rule_histograms(slot)
    }

    fn target_counters(&self, slot: TargetSlot) -> Result<[TargetCounters; 2], ErrorBody> {
        let counters = self
            .plane
            .target_counters(slot)
            .map_err(|error| host_error(&error))?;
        Ok(counters.map(|counters| target_counters(&counters)))
    }

    fn clear_rule(&mut self, slot: RuleSlot) -> Result<(), ErrorBody> {
        self.plane
            .clear_rule(slot)
            .map_err(|error| host_error(&error))
    }

    fn clear_target(&mut self, slot: TargetSlot) -> Result<(), ErrorBody> {
        self.plane
            .clear_target(slot)
            .map_err(|error| host_error(&error))
    }

    fn collect(&mut self, idle: Duration) -> Result<u64, ErrorBody> {
        let collected = self
            .plane
            .collect(idle)
            .map_err(|error| host_error(&error))?;
        Ok(collected.flows
            + collected.idle_states
            + collected.orphaned_states
            + collected.connections)
    }

    fn clear_lane(&mut self, lane: LaneNumber) {
        self.plane.clear_lane(lane);
    }

    fn clear_underway(&mut self) {
        self.plane.clear_underway();
    }

    fn is_underway(&self) -> bool {
        self.plane.is_underway()
    }

    fn bound_lane(&mut self, lane: LaneNumber, bounds: LaneBounds) {
        self.plane.bound_lane(lane, bounds);
    }

    fn lane_use(&self, lane: LaneNumber) -> LaneUse {
        self.plane.lane_use(lane)
    }

    fn empty_lane(&mut self, lane: LaneNumber, seen: u64) -> bool {
        self.plane.empty_lane(lane, seen)
    }

    fn lane_losses(&self) -> Result<LaneLosses, ErrorBody> {
        let losses = self
            .plane
            .lane_losses()
            .map_err(|error| host_error(&error))?;
        Ok(LaneLosses {
            strays: losses.strays,
            copies: losses.copies,
            returns: losses.returns,
            entries: losses.entries,
        })
    }

    fn begin_flush(&mut self, activations: &[u32]) -> Result<(), ErrorBody> {
        match self.plane.begin_flush(activations) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ErrorBody::new(
                ErrorCode::Limit,
                format!("{MAX_FLUSHES} rules can be flushed at once; nothing was changed"),
            )
            .with_hint("wait until earlier flushes are over (`injector stats`)")),
            Err(error) => Err(host_error(&error)),
        }
    }

    fn end_flush(&mut self, activations: &[u32]) -> Result<(), ErrorBody> {
        self.plane
            .end_flush(activations)
            .map_err(|error| host_error(&error))
    }

    fn flushed(&self, activation: u32) -> Result<[u64; 2], ErrorBody> {
        self.plane
            .flushed(activation)
            .map_err(|error| host_error(&error))
    }

    fn tables(&self) -> Result<Vec<TableUse>, ErrorBody> {
        let tables = self.plane.table_use().map_err(|error| host_error(&error))?;
        Ok(tables
            .into_iter()
            .map(|table| TableUse {
                name: table.name.to_owned(),
                used: table.entries,
                capacity: u64::from(table.capacity),
                bytes: Some(table.bytes).filter(|bytes| *bytes != 0),
            })
            .collect())
    }
}

impl LeaseSwitch for Lease {
    fn now_ns(&self) -> u64 {
        DataPlane::monotonic_ns()
    }

    fn renew(&self, until_ns: u64) -> Result<(), ErrorBody> {
        Self::renew(self, until_ns);
        Ok(())
    }
}

fn rule_counters(counters: &dataplane::RuleCounters) -> RuleCounters {
    RuleCounters {
        matched_packets: counters.matched_packets,
        matched_bytes: counters.matched_bytes,
        cut_packets: counters.cut_packets,
        cut_bytes: counters.cut_bytes,
        excess_packets: counters.excess_packets,
        flows: counters.flows,
        off_packets: counters.off_packets,
        lapsed_packets: counters.lapsed_packets,
        stateless_packets: counters.stateless_packets,
        lost_packets: counters.lost_packets,
        duplicated_packets: counters.duplicated_packets,
        copies: counters.copies,
        delayed_packets: counters.delayed_packets,
        delayed_ns: counters.delayed_ns,
        reordered_packets: counters.reordered_packets,
        too_long_packets: counters.too_long_packets,
        queued_packets: counters.queued_packets,
        queued_bytes: counters.queued_bytes,
        queued_ns: counters.queued_ns,
        queued_max_ns: counters.queued_max_ns,
        busy_ns: counters.busy_ns,
        overflow_packets: counters.overflow_packets,
        marked_packets: counters.marked_packets,
        stalled_packets: counters.stalled_packets,
        answered_packets: counters.answered_packets,
        corrupted_packets: counters.corrupted_packets,
        stalled_ns: counters.stalled_ns,
        given_max_ns: counters.given_max_ns,
        first_ns: counters.first_ns,
        last_ns: counters.last_ns,
        first_at: None,
        last_at: None,
    }
}

fn target_counters(counters: &dataplane::TargetCounters) -> TargetCounters {
    TargetCounters {
        seen_packets: counters.seen_packets,
        seen_bytes: counters.seen_bytes,
        passed_packets: counters.passed_packets,
        cut_packets: counters.cut_packets,
        unparsed_packets: counters.unparsed_packets,
        orphan_fragments: counters.orphan_fragments,
        errors: counters.errors,
        table_full: counters.table_full,
        lapsed_packets: counters.lapsed_packets,
        too_many_rules: counters.surplus_rules,
        lane_packets: counters.lane_packets,
        lane_refused: counters.lane_refused,
    }
}
