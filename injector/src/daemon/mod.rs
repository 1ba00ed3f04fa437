//! The daemon: owns the rules, what is attached to the host and the kernel's tables, and serves the
//! socket.
//!
//! ```text
//!   socket ── server (tokio) ──► actor thread: State ──► Plane (kernel tables)
//!                    │ pulse             │ pulse    └──► Host  (namespaces, filters, journal)
//!                    └───► lease thread ◄┘
//! ```
//!
//! [`run`] does all of it. Everything that it changes on the host is undone when it returns.

pub mod actor;
mod change;
pub mod events;
mod flush;
pub mod host;
pub mod kernel;
mod lanes;
pub mod lease;
pub mod lock;
mod partition;
pub mod plane;
mod poll;
pub mod protect;
mod record;
mod run;
pub mod server;
pub mod state;
mod targets;

#[cfg(test)]
mod tests;

pub use poll::Tick;
pub use record::ConnId;
pub use run::{
    DEFAULT_LANES, DEFAULT_LEASE, DaemonError, DaemonOptions, LogFormat, SOCKET_NAME, run,
};
pub use targets::TargetKey;
