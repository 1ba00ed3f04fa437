//! The data plane: loads the TC programs and makes rule sets visible to them.
//!
//! [`compile`](compile::compile) turns rules into the tables of `injector_common::layout`, as an
//! [`Image`](compile::Image) in ordinary memory; [`DataPlane::commit`] writes an image into the copy of the
//! tables that is not in force, and then stores the new epoch.

pub mod compile;
pub mod distribution;
mod image;
mod intern;
mod mapping;
mod plane;
mod prefixes;
mod shape;
pub mod traces;
mod values;

pub use image::Image;
pub use plane::{
    Collected, Commit, CommitError, DataPlane, DataPlaneError, LaneLosses, Lease, ProgramReport,
    Sizes, TableUse, report,
};
pub use shape::shape as shape_of;
pub use values::{
    ActiveRule, Exemption, LaneBounds, LaneDevices, LaneNumber, LaneUse, LinkKind, RuleSlot,
    TargetConfig, TargetSlot,
};

pub use crate::netlink::Hook;
pub use injector_common::layout::{Histograms, RuleCounters, TargetCounters};
