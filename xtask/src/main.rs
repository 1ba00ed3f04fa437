//! `cargo xtask`: builds, tests and demonstrates the injector.
//!
//! Every verb first does the set-up that it needs, says what it installs and why, and does nothing
//! where everything is there already.

mod artifacts;
mod build;
mod cache;
mod ebpf;
mod image;
mod kernels;
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
mod vm;
mod workspace;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::build::Profile;
use crate::kernels::Line;
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
    /// exec n1 -- ping -c1 10.77.0.2`, `cargo xtask lab down`, `cargo xtask lab --help`.
    #[command(disable_help_flag = true)]
    Lab(PassedOn),
    /// Run things on Debian's kernels, in virtual machines
    #[command(subcommand)]
    Vm(VmVerb),
    /// Run the tests: unit, program (`BPF_PROG_TEST_RUN`), lint, lab (network namespaces) and vm (the same on
    /// other kernels, and everything that needs a lane)
    ///
    /// Ends with one line: "N passed, N failed, N skipped". Fails if a test failed, and, where CI
    /// is set in the environment, if a test was skipped that this machine could have run.
    Test(TestArgs),
    /// Build for release and measure: nanoseconds a packet, throughput, time from command to effect
    Bench(BenchArgs),
    /// Build for release and show what it does: a slow, lossy, narrow link (in a virtual machine where this kernel
    /// has no lanes), and a real service being partitioned and healed
    ///
    /// Arguments are passed on to the demo: `cargo xtask demo partition` plays that part alone.
    Demo(PassedOn),
}

/// What to do with virtual machines.
#[derive(Subcommand)]
enum VmVerb {
    /// Run the test programs on kernels
    Test(VmTestArgs),
    /// Run a command on a kernel: one of our own programs (injector, verify), or one of the system's
    Run(VmRunArgs),
    /// Open a shell on a kernel; leave it with `exit`
    Shell(MachineArgs),
}

/// Which machine.
#[derive(Args)]
struct MachineArgs {
    /// The line of kernels: two numbers, or `newest`
    #[arg(long, value_name = "LINE", default_value = "6.1")]
    kernel: Line,
    /// Its memory
    #[arg(long, value_name = "MIB", default_value_t = vm::MEMORY)]
    memory: u32,
}

/// Arguments of `vm run`.
#[derive(Args)]
struct VmRunArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// End it after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Play this scenario instead of a command, and bring its reports out
    #[arg(long, value_name = "FILE")]
    scenario: Option<PathBuf>,
    /// With --scenario: where the reports go [default: injector-report/NAME]
    #[arg(long, value_name = "DIR", requires = "scenario")]
    report: Option<PathBuf>,
    /// The command, after `--`
    #[arg(
        last = true,
        required_unless_present = "scenario",
        conflicts_with = "scenario",
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

/// Arguments of `bench`.
#[derive(Args)]
struct BenchArgs {
    /// Measure the injector beside netem instead, on another kernel, in a virtual machine (ten minutes)
    #[arg(long)]
    vm: bool,
    /// With --vm: the line of kernels
    #[arg(long, value_name = "LINE", default_value = "6.1", requires = "vm")]
    kernel: Line,
    /// With --vm: only what has this text in its title
    #[arg(long, value_name = "TEXT", requires = "vm")]
    only: Option<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Arguments of `vm test`.
#[derive(Args)]
struct VmTestArgs {
    /// On these lines of kernels only
    #[arg(long, value_name = "LINE", value_delimiter = ',')]
    kernel: Vec<Line>,
    /// Only this test program
    #[arg(long, value_name = "NAME", value_parser = test::IN_MACHINES)]
    program: Option<String>,
    /// Run the long versions too, and everything on every kernel
    #[arg(long)]
    full: bool,
    /// Run only the tests with this text in their name
    filter: Option<String>,
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
                kernels: Vec::new(),
                program: None,
            });
        }
        Verb::Vm(VmVerb::Test(arguments)) => {
            return test::run(&test::Options {
                full: arguments.full,
                tiers: vec![Tier::Vm],
                filter: arguments.filter,
                kernels: arguments.kernel,
                program: arguments.program,
            });
        }
        Verb::Vm(VmVerb::Run(arguments)) => {
            let (kernel, memory) = (&arguments.machine.kernel, arguments.machine.memory);
            let timeout = Duration::from_secs(arguments.timeout);
            match &arguments.scenario {
                Some(file) => {
                    run::scenario(kernel, memory, timeout, file, arguments.report.as_deref())
                }
                None => run::machine(kernel, memory, timeout, &arguments.command),
            }
        }
        Verb::Vm(VmVerb::Shell(arguments)) => {
            run::machine(&arguments.kernel, arguments.memory, Duration::MAX, &[])
        }
        Verb::Bench(arguments) if arguments.vm => {
            run::bench_in_machine(&arguments.kernel, arguments.only.as_deref(), arguments.json)
        }
        Verb::Bench(arguments) => run::bench(arguments.json),
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
    let setup = Setup::ensure(&[
        Need::Ebpf,
        Need::Lints,
        Need::Services,
        Need::Tools,
        Need::Machine,
    ])?;
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
