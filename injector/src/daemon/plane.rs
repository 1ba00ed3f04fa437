//! The data plane as the daemon sees it: what turns rules into what the kernel does. A trait, so that
//! the daemon's state machine is tested without a kernel.

use std::{os::fd::BorrowedFd, time::Duration};

pub use crate::dataplane::{
    ActiveRule, Exemption, Histograms, LaneBounds, LaneDevices, LaneNumber, LaneUse, RuleSlot,
    TargetConfig, TargetSlot,
};
use crate::{
    netlink::Hook,
    protocol::{ErrorBody, LaneLosses, RuleCounters, TableUse, TargetCounters},
};

/// How much fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rules that act at one time.
    pub rules: u16,
    /// Targets; slots go from 1 to this.
    pub targets: u16,
    /// Exemptions.
    pub exemptions: usize,
}

/// What a commit made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// The generation of the rule set that is now visible.
    pub epoch: u64,
}

/// What makes rules act in the kernel. Errors carry the protocol's codes: `unsupported` where the
/// kernel lacks something, `limit` where a table would be too small, `host` for the rest.
pub trait Plane: Send + 'static {
    /// How much fits.
    fn limits(&self) -> Limits;
    /// The loaded program for a hook.
    fn program(&self, hook: Hook) -> BorrowedFd<'_>;
    /// The loaded programs of a lane: for its carrier, for its line.
    fn lane_programs(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>);
    /// The kernel's monotonic clock, in nanoseconds.
    fn now_ns(&self) -> u64;
    /// A handle by which another thread moves the lease.
    fn lease(&self) -> Result<Box<dyn LeaseSwitch>, ErrorBody>;
    /// Makes a whole rule set visible at once. After an error nothing has changed.
    fn commit(
        &mut self,
        targets: &[TargetConfig],
        rules: &[ActiveRule],
        exempt: &[Exemption],
    ) -> Result<Committed, ErrorBody>;
    /// A rule's counters on egress and on ingress, over all CPUs.
    fn rule_counters(&self, slot: RuleSlot) -> Result<[RuleCounters; 2], ErrorBody>;
    /// How the times that a rule gives are spread, in both directions together.
    fn rule_histograms(&self, slot: RuleSlot) -> Box<Histograms>;
    /// A target's counters on egress and on ingress, over all CPUs.
    fn target_counters(&self, slot: TargetSlot) -> Result<[TargetCounters; 2], ErrorBody>;
    /// Sets a rule slot's counters and histograms to zero before it is used.
    fn clear_rule(&mut self, slot: RuleSlot) -> Result<(), ErrorBody>;
    /// Sets a target slot's counters to zero before it is used.
    fn clear_target(&mut self, slot: TargetSlot) -> Result<(), ErrorBody>;
    /// Forgets the state of flows in which nothing has moved for so long. Returns how many.
    fn collect(&mut self, idle: Duration) -> Result<u64, ErrorBody>;
    /// Begins to drop what rules of these activations hold, all of them or none.
    fn begin_flush(&mut self, activations: &[u32]) -> Result<(), ErrorBody>;
    /// Ends that.
    fn end_flush(&mut self, activations: &[u32]) -> Result<(), ErrorBody>;
    /// Packets of a rule that is being flushed which were dropped: on egress, on ingress.
    fn flushed(&self, activation: u32) -> Result<[u64; 2], ErrorBody>;
    /// How full the tables are.
    fn tables(&self) -> Result<Vec<TableUse>, ErrorBody>;
    /// Sets the account of a lane that is about to be made to zero.
    fn clear_lane(&mut self, lane: LaneNumber);
    /// Forgets what was lost on its way through lanes, of which there is none.
    fn clear_underway(&mut self);
    /// Whether packets are on their way through any lane, or back to the hook that they came from.
    fn is_underway(&self) -> bool;
    /// Says how much a lane may hold.
    fn bound_lane(&mut self, lane: LaneNumber, bounds: LaneBounds);
    /// What a lane holds.
    fn lane_use(&self, lane: LaneNumber) -> LaneUse;
    /// Takes a lane for empty if its load is still the one that was seen; whether it was.
    fn empty_lane(&mut self, lane: LaneNumber, seen: u64) -> bool;
    /// What lanes lost.
    fn lane_losses(&self) -> Result<LaneLosses, ErrorBody>;
}

/// The kernel-side deadline after which no rule acts.
pub trait LeaseSwitch: Send {
    /// The kernel's monotonic clock, in nanoseconds.
    fn now_ns(&self) -> u64;
    /// Rules act until then.
    fn renew(&self, until_ns: u64) -> Result<(), ErrorBody>;
}
