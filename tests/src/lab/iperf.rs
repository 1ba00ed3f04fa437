//! iperf3 between two nodes: a server for one test, a client that reports in JSON.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{
    command::{self, DEADLINE},
    process::Process,
    scratch::Scratch,
    services,
    topology::Node,
    wait::wait_for,
};

const PORT: &str = "5201";

/// What iperf3 says of one test.
#[derive(Debug, Clone)]
pub struct Report(Value);

impl Report {
    /// What the receiver got, in bits per second.
    pub fn received(&self) -> Result<f64> {
        let sums = &self.0["end"];
        // A UDP test has one sum for both ends.
        let sum = match &sums["sum_received"] {
            Value::Null => &sums["sum"],
            sum => sum,
        };
        sum["bits_per_second"]
            .as_f64()
            .context("iperf3 says no bits_per_second")
    }

    /// Datagrams that were sent, and those of them that did not arrive.
    pub fn datagrams(&self) -> Result<(u64, u64)> {
        let sum = &self.0["end"]["sum"];
        let number = |name: &str| {
            sum[name]
                .as_u64()
                .with_context(|| format!("iperf3 says no {name}"))
        };
        Ok((number("packets")?, number("lost_packets")?))
    }
}

/// Runs one test from a node to another; `arguments` are those of the client.
pub fn iperf(from: &Node, to: &Node, arguments: &[&str]) -> Result<Report> {
    let program = services::iperf3()?;
    let scratch = Scratch::new()?;
    let address = to.v4.to_string();
    let log = scratch.path().join("iperf3.log");
    let serve = || {
        let mut server = services::command(&to.ns, &program)?;
        server.args(["--server", "--one-off", "--bind", &address, "--port", PORT]);
        Process::start(server, &log)
    };
    let mut server = serve()?;
    let report = wait_for("iperf3 has measured", Duration::from_mins(1), || {
        // A server whose one test failed has ended.
        if server.ended()?.is_some() {
            server = serve()?;
        }
        let mut client = services::command(&from.ns, &program)?;
        client.args(["--client", &address, "--port", PORT, "--json"]);
        client.args(arguments);
        let output = command::run(client, DEADLINE)?.success()?;
        let report: Value = serde_json::from_str(&output.stdout)?;
        // The server may not be listening yet, and with `--json` that is no failure of the client's.
        if let Some(error) = report["error"].as_str() {
            bail!("iperf3: {error}; its server says: {}", server.log_tail());
        }
        Ok(Some(Report(report)))
    })?;
    // It means to end now, and now and then listens again instead (3.12, on a slow machine): then it is ended.
    server.wait(Duration::from_secs(1))?;
    Ok(report)
}
