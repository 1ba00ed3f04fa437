//! `cargo xtask`: builds, tests and demonstrates the injector.
//!
//! Every verb first does the set-up that it needs, says what it installs and why, and does nothing
//! where everything is there already.

mod artifacts;
mod build;
mod cache;
mod ebpf;
mod linker;
mod lint;
mod outcome;
mod packages;
mod privilege;
mod process;
mod run;
mod services;
mod setup;
mod test;
mod toolchain;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::build::Profile;
use crate::setup::{Need, Setup};
use crate::test::Tier;

const ABOUT: &str = "Build, test and demonstrate the injector";

const LONG_ABOUT: &str = "Build, test and demonstrate the injector.

Every verb first does the set-up that it needs: it looks for an eBPF toolchain (a rustup nightly \
with rust-src, else the distribution's compiler with its sources) and for a bpf-linker that \
understands it, installs what is missing, and says what and why. The second time it finds \
everything and does nothing.

Root is asked for (through sudo, where the caller is not root) only to install packages and to run \
what attaches programs to interfaces; never for compiling. Services that tests and the demo use \
are unpacked into a cache folder ($XDG_CACHE_HOME/injector or ~/.cache/injector), never installed.";

/// The command line.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = ABOUT, long_about = LONG_ABOUT)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// What to do.
#[derive(Subcommand)]
enum Verb {
    /// Install what all the other verbs need, and show what is used
    Setup,
    /// Build the eBPF object, then the injector with the object inside
    Build(BuildArgs),
    /// Build the eBPF object and load it: the verifier's verdict, sizes, maps and their memory
    Load(LoadArgs),
    /// Build the injector and run `injector lab …`: network namespaces on a bridge to try things in
    ///
    /// Everything after `lab` is passed on: `cargo xtask lab up --nodes 3`, `cargo xtask lab
    /// exec n1 -- ping -c1 n2`, `cargo xtask lab down`, `cargo xtask lab --help`.
    #[command(disable_help_flag = true)]
    Lab(PassedOn),
    /// Run the tests: unit, lint, program (`BPF_PROG_TEST_RUN`) and lab (network namespaces)
    ///
    /// Ends with one line: "N passed, N failed, N skipped". Fails if a test failed, and, where CI
    /// is set in the environment, if a test was skipped that this machine could have run.
    Test(TestArgs),
    /// Build for release and measure: nanoseconds a packet, throughput, time from command to effect
    ///
    /// Arguments are passed on to the benchmark: `cargo xtask bench --json`.
    Bench(PassedOn),
    /// Build for release and show a real service being partitioned and healed
    ///
    /// Arguments are passed on to the demo.
    Demo(PassedOn),
}

/// Arguments of `build`.
#[derive(Args)]
struct BuildArgs {
    /// Build the injector with optimisations (the eBPF object always is)
    #[arg(long)]
    release: bool,
    /// Build the eBPF object only
    #[arg(long, conflicts_with = "release")]
    object_only: bool,
}

/// Arguments of `load`.
#[derive(Args)]
struct LoadArgs {
    /// Passed on to the `verify` binary
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENT"
    )]
    arguments: Vec<OsString>,
}

/// Arguments of the verbs that hand everything on.
#[derive(Args)]
struct PassedOn {
    /// Passed on as they are
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENT"
    )]
    arguments: Vec<OsString>,
}

/// Arguments of `test`.
#[derive(Args)]
struct TestArgs {
    /// Run the long versions too: more packets, more rule sets, more crashes
    #[arg(long)]
    full: bool,
    /// Run these tiers only
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TIER")]
    tier: Vec<Tier>,
    /// Run only the tests with this text in their name (and no lints)
    filter: Option<String>,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Setup => setup(),
        Verb::Build(arguments) => build(&arguments),
        Verb::Load(arguments) => run::load(&arguments.arguments),
        Verb::Lab(arguments) => run::lab(&arguments.arguments),
        Verb::Test(arguments) => {
            return test::run(&test::Options {
                full: arguments.full,
                tiers: arguments.tier,
                filter: arguments.filter,
            });
        }
        Verb::Bench(arguments) => run::bench(&arguments.arguments),
        Verb::Demo(arguments) => run::demo(&arguments.arguments),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `cargo xtask setup`.
fn setup() -> Result<ExitCode> {
    let setup = Setup::ensure(&[Need::Ebpf, Need::Lints, Need::Services, Need::Tools])?;
    print!("{setup}");
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask build`.
fn build(arguments: &BuildArgs) -> Result<ExitCode> {
    let setup = Setup::ensure(&[Need::Ebpf])?;
    let object = ebpf::build(setup.ebpf()?)?;
    println!(
        "eBPF object: {} ({} bytes)",
        object.path.display(),
        object.bytes
    );
    if arguments.object_only {
        return Ok(ExitCode::SUCCESS);
    }
    let profile = if arguments.release {
        Profile::Release
    } else {
        Profile::Dev
    };
    let built = build::user_space(profile)?;
    println!("injector:    {}", built.binary("injector")?.display());
    Ok(ExitCode::SUCCESS)
}
