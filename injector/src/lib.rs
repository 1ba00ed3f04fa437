//! Network fault injector for Linux hosts: everything behind the `injector` command.
//!
//! Modules are layered and import only downwards: the rule language at the bottom, then the host
//! side and the data plane, the protocol, the daemon, and on top the client and the command line.

pub mod attach;
pub mod cli;
pub mod client;
pub mod daemon;
pub mod dataplane;
pub mod journal;
pub mod lab;
pub mod lane;
pub mod netlink;
pub mod netns;
pub mod probe;
pub mod protocol;
pub mod realised;
pub mod rules;
pub mod scenario;
pub mod ssh;
mod undo;
pub mod words;
