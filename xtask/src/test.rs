//! `cargo xtask test`: all tiers, one closing line.

use std::collections::{BTreeMap, VecDeque};
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;

use crate::artifacts::Executable;
use crate::build::{self, Built};
use crate::ebpf;
use crate::kernels::{Kernel, Line};
use crate::lint;
use crate::outcome::{self, Outcome, Reader, Skip};
use crate::privilege::Privilege;
use crate::process;
use crate::run;
use crate::setup::{Need, Setup};
use crate::vm::{self, Machine};
use crate::workspace;

/// The package whose integration tests run as root.
const PRIVILEGED_PACKAGE: &str = "tests";

/// The program tier's random packets for the kernel alone, for machines: on the host the same packets are those of the
/// comparison of everyone.
const KERNEL_ALONE: &str = "random::kernel";

/// What is understood of a test program's output is its plain form.
const PLAIN: [&str; 2] = ["--color", "never"];

/// A tier of tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Unit and property tests and documentation examples, without privileges
    Unit,
    /// Formatting and clippy
    Lint,
    /// The loaded eBPF object under `BPF_PROG_TEST_RUN`, as root
    Program,
    /// Real services in network namespaces, as root
    Lab,
    /// The same on Debian's kernels, and everything that needs a lane, in virtual machines
    Vm,
}

impl Tier {
    /// All tiers, in the order in which they run.
    const ALL: [Self; 5] = [Self::Unit, Self::Program, Self::Lint, Self::Lab, Self::Vm];

    /// The tier's name; for privileged tiers also that of their test program.
    const fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Lint => "lint",
            Self::Program => "program",
            Self::Lab => "lab",
            Self::Vm => "vm",
        }
    }
}

/// What to run.
#[derive(Debug)]
pub(crate) struct Options {
    /// The long versions too.
    pub(crate) full: bool,
    /// Only these tiers; all where empty.
    pub(crate) tiers: Vec<Tier>,
    /// Only tests with this in their names.
    pub(crate) filter: Option<String>,
    /// Kernels of the tier of virtual machines; the usual ones where empty.
    pub(crate) kernels: Vec<Line>,
    /// The only program of that tier.
    pub(crate) program: Option<String>,
}

impl Options {
    /// The tiers to run.
    fn tiers(&self) -> Vec<Tier> {
        Tier::ALL
            .into_iter()
            .filter(|tier| self.tiers.is_empty() || self.tiers.contains(tier))
            .filter(|tier| self.filter.is_none() || *tier != Tier::Lint)
            .collect()
    }
}

/// Runs the tests and prints what they come to, ending with one plain line.
pub(crate) fn run(options: &Options) -> ExitCode {
    let ci = env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    let mut total = Outcome::default();
    let mut times = Vec::new();
    if let Err(error) = tiers(options, &mut total, &mut times) {
        eprintln!("error: {error:#}");
        total.add(Outcome::failure(format!("{error:#}")));
    }
    if total.is_empty() {
        let reason = match &options.filter {
            Some(filter) => format!("no test of these tiers has '{filter}' in its name"),
            None => "no test ran".to_owned(),
        };
        total.add(Outcome::failure(reason));
    }
    report(&total, &times, ci);
    println!("{total}");
    if total.has_failed(ci) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

/// One tier's share of the table.
struct Row {
    tier: &'static str,
    outcome: Outcome,
    time: Duration,
}

/// Sets up, builds, and runs one tier after the other.
fn tiers(options: &Options, total: &mut Outcome, times: &mut Vec<Row>) -> Result<()> {
    let tiers = options.tiers();
    let mut needs = vec![Need::Ebpf];
    if tiers.contains(&Tier::Lint) {
        needs.push(Need::Lints);
    }
    if tiers.contains(&Tier::Lab) || tiers.contains(&Tier::Vm) {
        needs.extend([Need::Services, Need::Tools]);
    }
    if tiers.contains(&Tier::Vm) {
        needs.push(Need::Machine);
    }
    let started = Instant::now();
    let setup = Setup::ensure(&needs)?;
    ebpf::build(setup.ebpf()?)?;
    let built = build::tests()?;
    times.push(Row {
        tier: "build",
        outcome: Outcome::default(),
        time: started.elapsed(),
    });
    let one = |tier: Tier| {
        let started = Instant::now();
        let outcome = match tier {
            Tier::Unit => unit(&built, options),
            Tier::Lint => lint::run(&setup),
            Tier::Vm => Ok(machines(&setup, &built, options)),
            Tier::Program => {
                let skipped = match options.filter {
                    None => &["--skip", KERNEL_ALONE][..],
                    Some(_) => &[],
                };
                privileged(tier.name(), &setup, &built, options, skipped)
            }
            Tier::Lab => lab(&setup, &built, options),
        };
        let outcome = outcome.unwrap_or_else(|error| {
            println!("tier {} ... FAILED: {error:#}", tier.name());
            Outcome::failure(format!("{}: {error:#}", tier.name()))
        });
        Row {
            tier: tier.name(),
            outcome,
            time: started.elapsed(),
        }
    };
    for together in in_turn(&tiers, Privilege::find() == Privilege::Root) {
        let names: Vec<&str> = together.iter().map(|tier| tier.name()).collect();
        println!("\n== {} ==", names.join(" and "));
        thread::scope(|scope| {
            let one = &one;
            let running: Vec<_> = together
                .iter()
                .map(|tier| scope.spawn(move || one(*tier)))
                .collect();
            for (running, name) in running.into_iter().zip(names) {
                match running.join() {
                    Ok(row) => {
                        total.add(row.outcome.clone());
                        times.push(row);
                    }
                    Err(_) => total.add(Outcome::failure(format!("tier {name} panicked"))),
                }
            }
        });
    }
    Ok(())
}

/// Which tiers run at one time. Labs wait half of their time, and lints, at the lowest priority, take what they leave.
/// Only as root: sudo may give labs a session of their own, and priorities mean nothing between sessions (`sched(7)`,
/// autogroups).
fn in_turn(tiers: &[Tier], root: bool) -> Vec<&[Tier]> {
    const TOGETHER: [Tier; 2] = [Tier::Lint, Tier::Lab];
    tiers
        .chunk_by(|one, other| root && TOGETHER.contains(one) && TOGETHER.contains(other))
        .collect()
}

/// The table of tiers, then what failed and what was skipped.
fn report(total: &Outcome, times: &[Row], ci: bool) {
    println!(
        "\n{:<8} {:>7} {:>7} {:>8} {:>10}",
        "tier", "passed", "failed", "skipped", "time"
    );
    for Row {
        tier,
        outcome,
        time,
    } in times
    {
        println!(
            "{tier:<8} {:>7} {:>7} {:>8} {:>10}",
            outcome.passed,
            outcome.failed,
            outcome.skips.len(),
            outcome::seconds(*time)
        );
    }
    for skip in &total.skips {
        let verdict = match (skip.excusable, ci) {
            (true, _) => "this machine cannot run it",
            (false, true) => "it should have run here, which fails CI",
            (false, false) => "it should have run here, which would fail CI",
        };
        println!("skipped {}: {} ({verdict})", skip.test, skip.reason);
    }
    for test in &total.retried {
        println!("passed only at the second attempt: {test}");
    }
    for failure in &total.failures {
        println!("failed {failure}");
    }
}

/// The unit tier: every test harness that needs no privileges, then documentation examples.
fn unit(built: &Built, options: &Options) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    for executable in built.tests().filter(|one| !is_privileged(one)) {
        let program = format!("{} ({})", executable.package_name(), executable.name);
        println!("\n{program}");
        let mut command = Command::new(&executable.path);
        process::forget_cargo(&mut command);
        // As cargo does it: in the package's folder.
        command
            .current_dir(&executable.package)
            .env("CARGO_MANIFEST_DIR", &executable.package);
        command.args(PLAIN).args(&options.filter);
        outcome.add(watch(&mut command, &program, None)?);
    }
    println!("\ndocumentation");
    let mut command = workspace::cargo();
    command.args([
        "test",
        "--quiet",
        "--doc",
        "--no-fail-fast",
        "--workspace",
        "--exclude",
        "injector-ebpf",
        "--",
    ]);
    command.args(PLAIN).args(&options.filter);
    outcome.add(watch(&mut command, "documentation", None)?);
    Ok(outcome)
}

/// Whether this is a test program that runs as root.
fn is_privileged(executable: &Executable) -> bool {
    executable.kind == "test" && executable.package_name() == PRIVILEGED_PACKAGE
}

/// The tier of network namespaces; where this kernel can have lanes, their tests run here too.
fn lab(setup: &Setup, built: &Built, options: &Options) -> Result<Outcome> {
    let mut outcome = privileged(Tier::Lab.name(), setup, built, options, &[])?;
    if Privilege::find() == Privilege::None {
        return Ok(outcome);
    }
    let lacking = run::lacking_for_lanes(setup, built)?;
    println!("\n{SCENARIOS}");
    let without_lanes = ["--skip", "lane::"];
    let skipped = if lacking.is_empty() {
        &[][..]
    } else {
        &without_lanes
    };
    outcome.add(privileged(SCENARIOS, setup, built, options, skipped)?);
    if lacking.is_empty() {
        println!("\n{LANE}");
        outcome.add(privileged(LANE, setup, built, options, &[])?);
    } else {
        println!(
            "\n{LANE}: this kernel has no {}: these tests run in virtual machines (tier {})",
            lacking.join(", no "),
            Tier::Vm.name()
        );
    }
    Ok(outcome)
}

/// A test program that runs as root: an integration test in the package of end-to-end tests.
fn privileged_program<'a>(built: &'a Built, name: &str) -> Result<&'a Executable> {
    built
        .tests()
        .find(|one| is_privileged(one) && one.name == name)
        .with_context(|| format!("the package `{PRIVILEGED_PACKAGE}` has no test program `{name}`"))
}

/// Runs a test program that runs as root.
fn privileged(
    name: &str,
    setup: &Setup,
    built: &Built,
    options: &Options,
    more: &[&str],
) -> Result<Outcome> {
    let executable = privileged_program(built, name)?;
    let privilege = Privilege::find();
    if privilege == Privilege::None {
        let reason = "it runs as root, this user is not root, and there is no sudo";
        println!("tier {name} ... skipped: {reason}");
        return Ok(Outcome::skip(format!("tier {name}"), reason, false));
    }
    let notes = workspace::notes();
    fs::create_dir_all(&notes).with_context(|| format!("making {}", notes.display()))?;
    let skips = notes.join(format!("skips-{name}.json"));
    remove(&skips)?;
    let mut environment = run::environment(setup, built)?;
    environment.push(("INJECTOR_SKIPS", skips.clone().into_os_string()));
    environment.push((
        "CARGO_MANIFEST_DIR",
        executable.package.clone().into_os_string(),
    ));
    if options.full {
        environment.push(("INJECTOR_FULL", OsString::from("1")));
    }
    let mut command = privilege.command(
        executable.path.as_os_str(),
        environment
            .iter()
            .map(|(name, value)| (*name, value.as_os_str())),
        &format!("running the {name} tests"),
    )?;
    command
        .current_dir(&executable.package)
        .args(PLAIN)
        .args(more)
        .args(&options.filter);
    watch(&mut command, name, Some(&skips))
}

/// What runs on which kernel. The proof is on the oldest and on the newest; in between it is enough to see that
/// everything loads and works at all, unless everything is asked for.
const ON_KERNELS: [(&str, &str, Option<&str>); 6] = [
    ("newest", LANE, None),
    ("6.1", LANE, None),
    ("6.1", SCENARIOS, Some("lane::")),
    ("6.1", "program", Some("kernel")),
    ("newest", "program", Some("kernel")),
    ("6.12", LANE, Some("smoke")),
];

/// Lines of kernels for everything.
const ALL_KERNELS: [&str; 4] = ["6.1", "6.12", "6.18", "newest"];

/// The test program of what needs lanes.
const LANE: &str = "lane";

/// The test program of the library of scenarios.
const SCENARIOS: &str = "scenarios";

/// Test programs that run in virtual machines.
pub(crate) const IN_MACHINES: [&str; 4] = [LANE, "program", SCENARIOS, "lab"];

/// How long one test program may take in emulation.
const MACHINE_DEADLINE: Duration = Duration::from_mins(30);

/// Machines at one time. Each keeps one of two CPUs busy, most of the time: three take as long, and disturb what is
/// timed.
const MACHINES: usize = 2;

/// The tier of virtual machines. Failures of all kernels are collected.
fn machines(setup: &Setup, built: &Built, options: &Options) -> Outcome {
    let mut plan: Vec<(String, &str, Option<&str>)> = Vec::new();
    if options.full || !options.kernels.is_empty() {
        let lines = if options.kernels.is_empty() {
            ALL_KERNELS.map(str::to_owned).to_vec()
        } else {
            options.kernels.iter().map(Line::to_string).collect()
        };
        for line in lines {
            let programs = IN_MACHINES
                .iter()
                .filter(|name| options.full || options.program.is_some() || **name != "lab");
            plan.extend(programs.map(|name| (line.clone(), *name, None)));
        }
    } else {
        plan.extend(ON_KERNELS.map(|(line, name, filter)| (line.to_owned(), name, filter)));
    }
    if let Some(program) = &options.program {
        plan.retain(|(_, name, _)| name == program);
    }
    // A filter of the caller's need not match everywhere, and a machine takes its time to come up.
    if let Some(filter) = &options.filter {
        plan.retain(|(_, name, _)| lists(built, name, filter).unwrap_or(true));
    }
    // One after the other: they come from one package manager.
    let mut kernels = BTreeMap::new();
    for (line, _, _) in &plan {
        if !kernels.contains_key(line) {
            kernels.insert(line.clone(), kernel(line));
        }
    }
    let plan = Mutex::new(VecDeque::from(plan));
    let outcome = Mutex::new(Outcome::default());
    let again = Mutex::new(Vec::new());
    let next = || lock(&plan).pop_front();
    thread::scope(|scope| {
        for _ in 0..MACHINES {
            scope.spawn(|| {
                while let Some((line, name, filter)) = next() {
                    let title = format!("{name} on kernel {line}");
                    let say = |text: &str| println!("{line:>6} | {text}");
                    say(&title);
                    let started = Instant::now();
                    let filter = options.filter.as_deref().or(filter);
                    let one = match kernels.get(&line) {
                        Some(Ok(kernel)) => Guest::of(setup, built, kernel, name, options.full)
                            .and_then(|guest| {
                                let (one, failed) = in_machine(&guest, filter, &say)?;
                                let again_too =
                                    failed.into_iter().map(|test| (guest, line.clone(), test));
                                lock(&again).extend(again_too);
                                Ok(one)
                            }),
                        Some(Err(error)) => Err(anyhow!("{error:#}")),
                        None => Err(anyhow!("nobody has looked for kernel {line}")),
                    };
                    let mut one = one.unwrap_or_else(|error| {
                        say(&format!("{title} ... FAILED: {error:#}"));
                        Outcome::failure(format!("{title}: {error:#}"))
                    });
                    if one.is_empty() {
                        one.add(Outcome::failure(format!("{title}: no test ran")));
                    }
                    say(&format!(
                        "{title}: {one} in {}",
                        outcome::seconds(started.elapsed()).trim()
                    ));
                    lock(&outcome).add(one);
                }
            });
        }
    });
    let mut outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
    for (guest, line, test) in again.into_inner().unwrap_or_else(PoisonError::into_inner) {
        let say = |text: &str| println!("{line:>6} | {text}");
        say(&format!(
            "{test} has failed: a second attempt, with no other machine beside it"
        ));
        match guest.run(&[&test, "--exact"], &say) {
            Ok((second, _)) if second.passed == 1 && second.failed == 0 => {
                outcome.passes_after_all(&guest.program(), &test);
            }
            Ok(_) => {}
            Err(error) => say(&format!("there was no second attempt: {error:#}")),
        }
    }
    outcome
}

/// Whether a test program has a test with this in its name, as it says itself.
fn lists(built: &Built, name: &str, filter: &str) -> Result<bool> {
    let mut command = Command::new(&privileged_program(built, name)?.path);
    let listed = process::capture(
        command.args(["--list", filter]),
        "asking a test program for its tests",
    )?;
    Ok(listed.lines().any(|line| line.ends_with(": test")))
}

/// The newest kernel of a line.
fn kernel(line: &str) -> Result<Kernel> {
    vm::kernel(&line.parse().map_err(anyhow::Error::msg)?)
}

/// The contents of a lock; what a thread that panicked has left is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One test program on one kernel. Returns the tests that deserve a second attempt, too.
fn in_machine(
    guest: &Guest<'_>,
    filter: Option<&str>,
    say: &dyn Fn(&str),
) -> Result<(Outcome, Vec<String>)> {
    say(&format!("kernel {}", guest.kernel.version));
    let (outcome, failed) = guest.run(filter.as_slice(), say)?;
    // With more failures than tests that failed, the machine itself was in trouble.
    let tests = u64::try_from(failed.len()).unwrap_or(u64::MAX);
    if failed.len() > SECOND_ATTEMPTS || outcome.failed != tests {
        return Ok((outcome, Vec::new()));
    }
    let timed = |test: &String| {
        guest.executable.name == SCENARIOS || TIMED.iter().any(|tests| test.starts_with(tests))
    };
    Ok((outcome, failed.into_iter().filter(timed).collect()))
}

/// Emulated machines stall when their host's neighbours are busy. So a few tests of time that fail are tried once more,
/// when no other machine runs, and that is reported. If more fail it is no accident.
const SECOND_ATTEMPTS: usize = 3;

/// Tests of time, in the program of what needs lanes. Scenarios are, too, as a whole: databases give up on
/// each other after a second.
const TIMED: [&str; 8] = [
    "accuracy::",
    "compose::five_on_a_line",
    "delay::",
    "order::",
    "queue::",
    "rate::",
    "stall::",
    "throughput::",
];

/// A test program on a kernel.
#[derive(Clone, Copy)]
struct Guest<'a> {
    setup: &'a Setup,
    built: &'a Built,
    kernel: &'a Kernel,
    executable: &'a Executable,
    full: bool,
}

impl<'a> Guest<'a> {
    fn of(
        setup: &'a Setup,
        built: &'a Built,
        kernel: &'a Kernel,
        name: &str,
        full: bool,
    ) -> Result<Self> {
        let executable = privileged_program(built, name)?;
        Ok(Self {
            setup,
            built,
            kernel,
            executable,
            full,
        })
    }

    /// Its name in reports.
    fn program(&self) -> String {
        format!("{} on {}", self.executable.name, self.kernel.version)
    }

    /// Runs it with these arguments; returns the names of the tests that failed, too.
    fn run(&self, arguments: &[&str], say: &dyn Fn(&str)) -> Result<(Outcome, Vec<String>)> {
        let skips = PathBuf::from("/run/skips.json");
        let mut environment = vec![
            ("INJECTOR_SKIPS", skips.clone().into_os_string()),
            (
                "CARGO_MANIFEST_DIR",
                self.executable.package.clone().into_os_string(),
            ),
            // Emulated, a scenario takes a tenth of a second.
            (
                "INJECTOR_PROGRAM_SCENARIOS",
                OsString::from(if self.full { "1000" } else { "80" }),
            ),
        ];
        if self.full {
            environment.push(("INJECTOR_FULL", OsString::from("1")));
        }
        let mut command = vec![self.executable.path.clone().into_os_string()];
        command.extend(PLAIN.map(OsString::from));
        if self.executable.name == SCENARIOS {
            // Databases that are emulated wait for a CPU instead of for their timers.
            command.push(OsString::from("--test-threads=1"));
        }
        command.extend(arguments.iter().map(OsString::from));
        let machine = Machine {
            kernel: self.kernel,
            memory: vm::MEMORY,
            deadline: MACHINE_DEADLINE,
            command,
            folder: self.executable.package.clone(),
            environment,
            files: vec![],
            back: Some(skips),
            interactive: false,
        };
        let mut reader = Reader::default();
        let ended = machine.run(self.setup, self.built, &[&self.executable.path], |line| {
            say(line);
            reader.line(line);
        })?;
        let skips = match &ended.back {
            None => Vec::new(),
            Some(text) => {
                serde_json::from_str(text).context("reading the reasons of skipped tests")?
            }
        };
        let program = self.program();
        let failed = reader.failures().to_vec();
        let mut outcome = reader.finish(&program, ended.code == Some(0), skips);
        if let Some(trouble) = ended.trouble {
            outcome.add(Outcome::failure(format!("{program}: {trouble}")));
        }
        Ok((outcome, failed))
    }
}

/// Runs a test program, shows its output while it comes, and reads the outcome from it.
fn watch(command: &mut Command, program: &str, skips: Option<&Path>) -> Result<Outcome> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{}`", process::shown(command)))?;
    let mut reader = Reader::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.with_context(|| format!("reading the output of {program}"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            reader.line(&line);
        }
    }
    let status = child
        .wait()
        .with_context(|| format!("waiting for {program}"))?;
    let skips = match skips {
        Some(path) => read_skips(path)?,
        None => Vec::new(),
    };
    Ok(reader.finish(program, status.success(), skips))
}

/// What a test program has written down about tests that it could not run.
fn read_skips(path: &Path) -> Result<Vec<Skip>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "reading the reasons of skipped tests from {}",
                path.display()
            )
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Removes a file of an earlier run.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}
