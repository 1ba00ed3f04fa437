//! The benchmark: what a packet costs in the programs, what a host's throughput feels of them, and how
//! soon a large partition takes effect; or, as `bench netem`, how the injector's faults of single packets compare
//! with netem's. `cargo xtask bench` builds for release and runs it as root, with `--vm` in a virtual machine.
//!
//! Everything is compared within one run, and measured in turns, since machines are noisy. What was aimed
//! at stands beside what was measured; a missed aim is printed and does not fail the run.
//!
//! Exit codes: 0 measured; 1 something could not be measured; 2 wrong arguments.

mod cost;
mod effect;
mod netem;
mod throughput;

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde::Serialize;
use tests::{lab::sweep::sweep, table::Table};

/// Measures the injector on this machine.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Arguments {
    /// Print one JSON document instead of tables.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    what: Option<What>,
}

/// What is measured, where it is not the programs.
#[derive(Debug, Subcommand)]
enum What {
    /// The injector beside netem; needs a kernel with netem and lanes
    Netem {
        /// Write a JSON document into this file besides
        #[arg(long, value_name = "FILE")]
        document: Option<PathBuf>,
        /// Measure only what has this text in its title
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
    },
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

impl Machine {
    fn text(&self) -> String {
        format!(
            "injector {}, kernel {}, {} x {}\n",
            self.version, self.kernel, self.cpus, self.cpu
        )
    }
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
    let done = match &arguments.what {
        None => measure().and_then(|document| print(&arguments, &document)),
        Some(What::Netem { document, only }) => {
            beside_netem(&arguments, document.as_deref(), only.as_deref())
        }
    };
    match done {
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

/// What is printed with `--json` of the comparison.
#[derive(Debug, Serialize)]
struct Comparison {
    machine: Machine,
    netem: netem::Report,
}

fn beside_netem(arguments: &Arguments, file: Option<&Path>, only: Option<&str>) -> Result<()> {
    sweep()?;
    let comparison = Comparison {
        netem: netem::measure(only)?,
        machine: machine(),
    };
    if let Some(file) = file {
        let text = serde_json::to_vec_pretty(&comparison)?;
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
    }
    show(arguments, &comparison, |terminal| {
        format!(
            "{}\n{}",
            comparison.machine.text(),
            comparison.netem.text(terminal)
        )
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
    show(arguments, document, |terminal| text(document, terminal))
}

/// Prints a document as JSON, or as text.
fn show(
    arguments: &Arguments,
    document: &impl Serialize,
    text: impl FnOnce(bool) -> String,
) -> Result<()> {
    let mut out = io::stdout().lock();
    let done = if arguments.json {
        serde_json::to_writer_pretty(&mut out, document).map_err(io::Error::from)
    } else {
        let terminal = out.is_terminal();
        out.write_all(text(terminal).as_bytes())
    }
    .and_then(|()| writeln!(out));
    match done {
        // Whoever read our output has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("printing the report"),
    }
}

fn text(document: &Document, terminal: bool) -> String {
    let mut aims = Table::new(&["aim", "measured", ""]);
    for aim in &document.aims {
        aims.row([
            aim.wanted.clone(),
            aim.measured.clone(),
            if aim.met { "met" } else { "MISSED" }.to_owned(),
        ]);
    }
    [
        document.machine.text(),
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
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (value.min(low), value.max(high))
        })
}
