//! From the command to the effect: a host is cut off from 10,000 addresses, one of which answers until then.

use std::{fmt::Write, time::Duration};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use tests::{
    lab::{
        command::{self, DEADLINE},
        injector::Injector,
        stream::{Stream, now_ns},
        topology::Lab,
    },
    subject::{many::peer, meter::median},
};

const ADDRESSES: usize = 10_000;
const ROUNDS: usize = 5;
const PORT: u16 = 7600;
const GAP: Duration = Duration::from_micros(500);
const PATIENCE: Duration = Duration::from_secs(20);

/// What was measured; medians, in milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    addresses: usize,
    rounds: usize,
    /// From the start of the command until the last datagram got through.
    effect_ms: f64,
    /// From the start of the command to its end.
    command_ms: f64,
    /// What the command itself says, from the request to the effect.
    reported_ms: f64,
}

pub(crate) fn measure() -> Result<Report> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    let file = injector.state_dir().join("side");
    let mut addresses = format!("{}\n", lab.b().v4);
    for index in 1..ADDRESSES {
        writeln!(addresses, "{}", peer(index))?;
    }
    std::fs::write(&file, addresses)?;
    let side = format!("@{}", file.display());
    let own = lab.a().v4.to_string();
    let (mut effect, mut command, mut reported) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let stream = Stream::start(lab.a(), lab.b(), PORT, GAP)?;
        stream.await_arrival(now_ns(), PATIENCE)?;
        let cli = injector.cli(&[
            "--json",
            "partition",
            "--netns",
            lab.a().netns(),
            "--iface",
            "eth0",
            "--side",
            &own,
            "--side",
            &side,
        ]);
        let began = now_ns();
        let output = command::run(cli, DEADLINE)?.success()?;
        let ended = now_ns();
        stream.await_loss(ended, 10, PATIENCE)?;
        let shots = stream.finish()?;
        let last = shots
            .iter()
            .rfind(|shot| shot.arrived)
            .context("no datagram arrived before the partition")?;
        effect.push(milliseconds(last.after.saturating_sub(began)));
        command.push(milliseconds(ended - began));
        let answer: Value = serde_json::from_str(&output.stdout)?;
        let nanoseconds = answer["effect_ns"]
            .as_u64()
            .context("partition does not say when it was in effect")?;
        reported.push(milliseconds(nanoseconds));
        injector.heal_all()?;
    }
    Ok(Report {
        addresses: ADDRESSES,
        rounds: ROUNDS,
        effect_ms: median(&effect),
        command_ms: median(&command),
        reported_ms: median(&reported),
    })
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds of seconds")]
fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

impl Report {
    pub(crate) fn text(&self) -> String {
        format!(
            "A partition from {} addresses, median of {}: the last datagram got through {:.0} ms after the\n\
             command began; the command took {:.0} ms, and says that it was in effect after {:.0} ms.\n",
            self.addresses, self.rounds, self.effect_ms, self.command_ms, self.reported_ms
        )
    }
}
