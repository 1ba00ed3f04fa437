//! The benchmark: what a packet costs in the programs, what a host's throughput feels of them, and how
//! soon a large partition takes effect. `cargo xtask bench` builds for release and runs it as root.
//!
//! Everything is compared within one run, and measured in turns, since machines are noisy. What was aimed
//! at stands beside what was measured; a missed aim is printed and does not fail the run.
//!
//! Exit codes: 0 measured; 1 something could not be measured; 2 wrong arguments.

mod cost;
mod effect;
mod throughput;

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tests::{lab::sweep::sweep, table::Table};

/// Measures the injector on this machine.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Arguments {
    /// Print one JSON document instead of tables.
    #[arg(long)]
    json: bool,
}

/// An aim, and whether it was met.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Aim {
    /// What was aimed at.
    wanted: String,
    /// What was measured.
    measured: String,
    /// Whether that meets it.
    met: bool,
}

/// The machine that was measured.
#[derive(Debug, Serialize)]
struct Machine {
    kernel: String,
    cpu: String,
    cpus: usize,
    version: &'static str,
}

/// What is printed with `--json`.
#[derive(Debug, Serialize)]
struct Document {
    machine: Machine,
    cost: cost::Report,
    throughput: throughput::Report,
    effect: effect::Report,
    aims: Vec<Aim>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match measure().and_then(|document| print(&arguments, &document)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<Document> {
    sweep()?;
    progress("nanoseconds a packet (half a minute)");
    let cost = cost::measure().context("measuring the programs")?;
    progress("throughput (a minute)");
    let throughput = throughput::measure().context("measuring throughput")?;
    progress("time to effect");
    let effect = effect::measure().context("measuring the time to effect")?;
    let aims = [cost.aims(), throughput.aims()].concat();
    Ok(Document {
        machine: machine(),
        cost,
        throughput,
        effect,
        aims,
    })
}

/// Says what is going on, beside the output that may go to a file.
fn progress(what: &str) {
    eprintln!("measuring: {what}");
}

fn machine() -> Machine {
    let cpu = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            line.split_once(':').map(|(_, name)| name.trim().to_owned())
        });
    Machine {
        kernel: nix::sys::utsname::uname().map_or_else(
            |_| "unknown".to_owned(),
            |name| name.release().to_string_lossy().into_owned(),
        ),
        cpu: cpu.unwrap_or_else(|| "unknown".to_owned()),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        version: env!("CARGO_PKG_VERSION"),
    }
}

fn print(arguments: &Arguments, document: &Document) -> Result<()> {
    let mut out = io::stdout().lock();
    let done = if arguments.json {
        serde_json::to_writer_pretty(&mut out, document).map_err(io::Error::from)
    } else {
        let terminal = out.is_terminal();
        out.write_all(text(document, terminal).as_bytes())
    }
    .and_then(|()| writeln!(out));
    match done {
        // Whoever read our output has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("printing the report"),
    }
}

fn text(document: &Document, terminal: bool) -> String {
    let machine = &document.machine;
    let mut aims = Table::new(&["aim", "measured", ""]);
    for aim in &document.aims {
        aims.row([
            aim.wanted.clone(),
            aim.measured.clone(),
            if aim.met { "met" } else { "MISSED" }.to_owned(),
        ]);
    }
    [
        format!(
            "injector {}, kernel {}, {} x {}\n",
            machine.version, machine.kernel, machine.cpus, machine.cpu
        ),
        document.cost.text(terminal),
        document.throughput.text(terminal),
        document.effect.text(),
        aims.render(terminal),
    ]
    .join("\n")
}

/// The smallest and the largest.
pub(crate) fn span(values: &[f64]) -> (f64, f64) {
    values
        .iter()
        .fold((f64::INFINITY, 0.0), |(low, high), value| {
            (value.min(low), value.max(high))
        })
}
