//! Loads the eBPF object, lets the verifier speak, and shows sizes of programs and maps: what
//! `cargo xtask load` runs as root. Nothing is attached, and everything is unloaded again.
//!
//! Exit codes: 0 loaded; 1 failed otherwise; 2 wrong arguments; 4 not permitted; 5 refused by this kernel.

use std::{
    error::Error,
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use aya::programs::ProgramError;
use clap::Parser;
use injector::dataplane::{DataPlaneError, ProgramReport, Sizes, TableUse, report};
use serde::Serialize;
use tests::table::Table;

/// Lines of the verifier's log that are shown of a refusal: its end names the instruction and the cause.
const LOG_LINES: usize = 40;

const FAILED: u8 = 1;
const NOT_PERMITTED: u8 = 4;
const REFUSED: u8 = 5;

/// Loads the eBPF object and shows what the verifier says.
#[derive(Debug, Parser)]
#[command(name = "verify", version)]
struct Arguments {
    /// Print one JSON document instead of tables.
    #[arg(long)]
    json: bool,
}

/// What is printed with `--json`.
#[derive(Debug, Serialize)]
struct Document {
    kernel: String,
    programs: Vec<ProgramReport>,
    maps: Vec<TableUse>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match report(&Sizes::default()) {
        Ok((programs, maps)) => match print(&arguments, programs, maps) {
            Ok(()) => ExitCode::SUCCESS,
            // Whoever read our output has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("verify: cannot print the report: {error}");
                ExitCode::from(FAILED)
            }
        },
        Err(error) => explain(&error),
    }
}

fn kernel() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

fn print(
    arguments: &Arguments,
    programs: Vec<ProgramReport>,
    maps: Vec<TableUse>,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if arguments.json {
        let document = Document {
            kernel: kernel(),
            programs,
            maps,
        };
        serde_json::to_writer_pretty(&mut out, &document)?;
        return writeln!(out);
    }
    let terminal = out.is_terminal();
    writeln!(
        out,
        "The verifier of kernel {} takes the object.\n",
        kernel()
    )?;
    write!(out, "{}", program_table(&programs).render(terminal))?;
    writeln!(out)?;
    write!(out, "{}", map_table(&maps).render(terminal))?;
    let total: u64 = maps.iter().map(|map| map.bytes).sum();
    writeln!(
        out,
        "\nMemory of these maps: {}. Tables without preallocation grow as they fill.",
        bytes(total)
    )
}

fn program_table(programs: &[ProgramReport]) -> Table {
    let mut table = Table::new(&[
        "program",
        "verified instructions",
        "translated bytes",
        "machine code bytes",
    ]);
    let unknown = || "unknown".to_owned();
    for program in programs {
        table.row([
            program.name.clone(),
            program.verified.map_or_else(unknown, grouped),
            program.translated_bytes.map_or_else(unknown, grouped),
            grouped(program.machine_bytes),
        ]);
    }
    table
}

fn map_table(maps: &[TableUse]) -> Table {
    let mut table = Table::new(&["map", "entries", "capacity", "memory"]);
    for map in maps {
        table.row([
            map.name.to_owned(),
            map.entries.map_or_else(|| "-".to_owned(), grouped),
            grouped(map.capacity),
            bytes(map.bytes),
        ]);
    }
    table
}

/// A number with a comma before every third digit from the end.
fn grouped(number: impl Into<u64>) -> String {
    let digits = number.into().to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn bytes(number: u64) -> String {
    if number < 10 * 1024 {
        format!("{number} B")
    } else if number < 10 * 1024 * 1024 {
        format!("{} KiB", grouped(number.div_ceil(1024)))
    } else {
        format!("{} MiB", grouped(number.div_ceil(1024 * 1024)))
    }
}

/// Prints why it failed and what to do, and says with which code to leave.
fn explain(error: &DataPlaneError) -> ExitCode {
    if let DataPlaneError::Program { program, source } = error
        && let ProgramError::LoadError {
            io_error,
            verifier_log,
        } = &**source
    {
        let log = verifier_log.to_string();
        if io_error.kind() == io::ErrorKind::PermissionDenied && log.trim().is_empty() {
            return not_permitted(error);
        }
        eprintln!(
            "verify: the verifier of kernel {} refuses program {program} (bpf(BPF_PROG_LOAD)): {io_error}",
            kernel()
        );
        let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
        let from = lines.len().saturating_sub(LOG_LINES);
        if from > 0 {
            eprintln!("  ({from} lines before these left out)");
        }
        for line in &lines[from..] {
            eprintln!("  {line}");
        }
        eprintln!(
            "The last lines name the instruction and the cause. If the sources are as released, please report \
             this log with the kernel's version; `injector check` says what else this kernel lacks."
        );
        return ExitCode::from(REFUSED);
    }
    if is_permission(error) {
        return not_permitted(error);
    }
    eprintln!("verify: {}", chain(error));
    ExitCode::from(match error {
        DataPlaneError::Load { .. } | DataPlaneError::Program { .. } => REFUSED,
        _ => FAILED,
    })
}

fn not_permitted(error: &DataPlaneError) -> ExitCode {
    eprintln!("verify: {}", chain(error));
    eprintln!(
        "Loading eBPF programs needs root (CAP_BPF and CAP_NET_ADMIN): run `cargo xtask load`, which asks sudo."
    );
    ExitCode::from(NOT_PERMITTED)
}

fn is_permission(error: &DataPlaneError) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io_error) = error.downcast_ref::<io::Error>() {
            return io_error.kind() == io::ErrorKind::PermissionDenied;
        }
        cause = error.source();
    }
    false
}

/// The error with its causes, each said once.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
