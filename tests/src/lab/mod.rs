//! Machinery of the lab tier: network namespaces that a test makes and loses again, the real `injector`
//! binary driven from outside, real services, and small packet tools.
//!
//! Everything here waits for conditions with deadlines, touches only namespaces of its own making, and
//! is undone when its guard is dropped, also by a panic. What a killed run leaves behind is swept up by
//! the next one ([`sweep`]).

pub mod binomial;
mod bpf;
pub mod bursts;
pub mod capture;
pub mod command;
pub mod counters;
pub mod departure;
pub mod etcd;
pub mod foreign;
pub mod frame;
pub mod http;
pub mod injector;
pub mod iperf;
pub mod lent;
pub mod load;
pub mod module;
pub mod moment;
pub mod netem;
pub mod netns;
pub mod on_wire;
pub mod packet_socket;
pub mod ping;
pub mod probe;
pub mod process;
pub mod redis;
pub mod scratch;
pub mod services;
pub mod skb_field;
pub mod snapshot;
mod stamping;
pub mod stream;
pub mod sweep;
pub mod tcp;
pub mod tcx;
pub mod timed;
pub mod topology;
pub mod transcript;
pub mod trial;
pub mod tun;
pub mod udp;
pub mod wait;

/// Every namespace and folder that the lab makes begins with this, then the maker's process id.
pub const PREFIX: &str = "labtests-";

/// The demo's lab is called this, then the demo's process id; the injector puts its own prefix before it.
pub const DEMO_LAB: &str = "demo";
