//! The demo, in two parts: a link that becomes slow, lossy and narrow ([`link`]), and an etcd of three members
//! whose leader is cut off from the others ([`partition`]). Plain lines where the output is not a terminal; exits
//! non-zero if the story does not happen, and leaves nothing behind, also where a signal ends it.
//!
//! Needs root, `INJECTOR_BIN` and `INJECTOR_SERVICES`; `cargo xtask demo` sees to it, and plays the first part in a
//! virtual machine where this kernel lacks what it takes.

mod link;
mod partition;
mod stage;

use std::{process::ExitCode, time::Duration, time::Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use tests::lab::{injector::Injector, snapshot::Snapshot, sweep::sweep, wait::wait_until};

use crate::stage::{Tone, say};

/// Shows what the injector does, on real programs in network namespaces.
#[derive(Debug, Parser)]
#[command(name = "demo", version)]
struct Arguments {
    /// Play only this part
    part: Option<Part>,
}

/// A part of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// A slow, lossy and narrow link
    Link,
    /// An etcd whose leader is cut off
    Partition,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Err(error) = play(arguments.part) else {
        return ExitCode::SUCCESS;
    };
    let signal = stage::interrupted_by();
    if signal == 0 {
        say(Tone::Bad, &format!("The story did not happen: {error:#}"));
        return ExitCode::FAILURE;
    }
    say(Tone::Bad, "Interrupted; everything was cleared away.");
    // As a shell says it of a command that a signal ended.
    u8::try_from(128 + signal).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn play(part: Option<Part>) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces need root: run `cargo xtask demo`, which asks for it"
    );
    stage::end_on_signals()?;
    sweep()?;
    let began = Instant::now();
    let before = Snapshot::of_host()?;
    let injector = Injector::new()?;
    if part != Some(Part::Partition) {
        link::tell(&injector).context("a slow, lossy and narrow link")?;
    }
    if part != Some(Part::Link) {
        partition::tell(&injector).context("an etcd whose leader is cut off")?;
    }
    stage::run(&injector, &["down"])?;
    wait_until("the host is as it was", Duration::from_secs(10), || {
        before.must_equal(&Snapshot::of_host()?).map(|()| true)
    })?;
    say(Tone::Plain, "");
    say(
        Tone::Good,
        &format!(
            "This machine's interfaces, filters, routes and settings are as they were. {:.0} s in all.",
            began.elapsed().as_secs_f64()
        ),
    );
    Ok(())
}
