//! The lint tier: formatting, clippy on user space, clippy on the eBPF crate.

use std::io::{self, IsTerminal};
use std::process::Command;

use anyhow::Result;

use crate::outcome::Outcome;
use crate::process;
use crate::setup::Setup;
use crate::workspace;

/// Runs all lints, each counted as one test, at the lowest priority: labs may run beside them.
pub(crate) fn run(setup: &Setup) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    // rustfmt colours its differences even where they go to a file.
    let colour = if io::stdout().is_terminal() {
        "always"
    } else {
        "never"
    };
    outcome.add(check(
        "rustfmt",
        workspace::cargo().args(["fmt", "--all", "--check", "--", "--color", colour]),
    ));
    outcome.add(check(
        "clippy, user space",
        workspace::cargo().args([
            "clippy",
            "--quiet",
            "--workspace",
            "--exclude",
            "injector-ebpf",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]),
    ));
    let toolchain = setup.ebpf()?;
    outcome.add(if let Some(mut command) = toolchain.clippy()? {
        check("clippy, eBPF", &mut command)
    } else {
        let reason = format!("{} has no clippy", toolchain.compiler);
        println!("lint clippy, eBPF ... skipped: {reason}");
        Outcome::skip("lint: clippy, eBPF", reason, true)
    });
    Ok(outcome)
}

/// Runs one lint.
fn check(name: &str, command: &mut Command) -> Outcome {
    let verdict = process::run(&mut process::in_the_background(command), name);
    match verdict {
        Ok(()) => {
            println!("lint {name} ... ok");
            Outcome::success()
        }
        Err(error) => {
            println!("lint {name} ... FAILED: {error:#}");
            Outcome::failure(format!("lint: {name}"))
        }
    }
}
