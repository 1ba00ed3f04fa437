//! Qdiscs and filters of somebody else: what an injector must leave alone, and the loud drop that it is
//! compared with.
//!
//! The filters are classic BPF in direct-action mode, which needs neither a compiler nor actions that a
//! kernel may lack.

use anyhow::Result;

use super::{command, netns::Netns};

/// `TC_ACT_SHOT`: dropped, and on egress the sender is told.
pub const SHOT: u32 = 2;
/// `TC_ACT_OK`: a final verdict that hides later filters.
pub const OK: u32 = 0;
/// `TC_ACT_UNSPEC`: no verdict, later filters run.
pub const UNSPEC: u32 = u32::MAX;

/// Adds a clsact.
pub fn clsact(ns: &Netns, interface: &str) -> Result<()> {
    ns.tool(&format!("tc qdisc add dev {interface} clsact"))
        .map(drop)
}

/// Adds a filter that returns this verdict for everything. `hook` is `egress` or `ingress`.
pub fn filter(ns: &Netns, interface: &str, hook: &str, priority: u16, verdict: u32) -> Result<()> {
    bytecode(ns, interface, hook, priority, &format!("1,6 0 0 {verdict}"))
}

/// Adds a filter that drops loudly with this probability in 2^32, and else has no opinion.
pub fn drop_at_random(ns: &Netns, interface: &str, priority: u16, threshold: u32) -> Result<()> {
    // ld rand; jge threshold → pass; ret SHOT; ret UNSPEC
    let program = format!("4,32 0 0 4294963256,53 1 0 {threshold},6 0 0 {SHOT},6 0 0 {UNSPEC}");
    bytecode(ns, interface, "egress", priority, &program)
}

fn bytecode(ns: &Netns, interface: &str, hook: &str, priority: u16, program: &str) -> Result<()> {
    let mut command = ns.command("tc")?;
    command.args(["filter", "add", "dev", interface, hook]);
    command.args([
        "pref",
        &priority.to_string(),
        "bpf",
        "da",
        "bytecode",
        program,
    ]);
    command::run(command, command::DEADLINE)?
        .success()
        .map(drop)
}

/// How many packets an interface's clsact has dropped loudly.
pub fn loud_drops(ns: &Netns, interface: &str) -> Result<u64> {
    let text = ns
        .tool(&format!("tc -s qdisc show dev {interface} clsact"))?
        .stdout;
    Ok(text
        .split("dropped ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0))
}
