//! Running what was built: `load`, `lab`, `bench` and `demo`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::build::{self, Built, Profile};
use crate::ebpf;
use crate::kernels::Line;
use crate::privilege::Privilege;
use crate::process;
use crate::setup::{Need, Setup};
use crate::vm::{self, Machine};

/// Variables that are passed through to programs that run as root, where they are set.
const PASSED_THROUGH: [&str; 6] = [
    "CI",
    "NO_COLOR",
    "PATH",
    "RUST_BACKTRACE",
    "RUST_LOG",
    "TERM",
];

/// `cargo xtask load`: builds the object, loads it and shows what the verifier says.
pub(crate) fn load(arguments: &[OsString]) -> Result<ExitCode> {
    let (setup, built) = prepare(&[Need::Ebpf], Profile::Dev)?;
    start(
        &setup,
        &built,
        "verify",
        arguments,
        "loading the eBPF object",
    )
}

/// `cargo xtask lab`: the injector's own lab.
pub(crate) fn lab(arguments: &[OsString]) -> Result<ExitCode> {
    let (setup, built) = prepare(&[Need::Ebpf], Profile::Dev)?;
    let mut all = vec![OsString::from("lab")];
    all.extend_from_slice(arguments);
    start(
        &setup,
        &built,
        "injector",
        &all,
        "making network namespaces",
    )
}

/// `cargo xtask bench`.
pub(crate) fn bench(json: bool) -> Result<ExitCode> {
    let (setup, built) = prepare(&[Need::Ebpf, Need::Services, Need::Tools], Profile::Release)?;
    let arguments = json.then(|| OsString::from("--json"));
    start(
        &setup,
        &built,
        "bench",
        arguments.as_slice(),
        "measuring loaded programs",
    )
}

/// `cargo xtask bench --vm`: the injector beside netem, on another kernel. With `json` the document goes to standard
/// output and everything else to standard error.
pub(crate) fn bench_in_machine(line: &Line, only: Option<&str>, json: bool) -> Result<ExitCode> {
    /// Emulated machines are slow, and there is much to measure.
    const DEADLINE: Duration = Duration::from_mins(40);
    const DOCUMENT: &str = "/run/bench.json";
    let (setup, built) = prepare(
        &[Need::Ebpf, Need::Services, Need::Tools, Need::Machine],
        Profile::Release,
    )?;
    let kernel = vm::kernel(line)?;
    let program = built.binary("bench")?;
    let mut command: Vec<OsString> = [
        program.as_os_str(),
        "netem".as_ref(),
        "--document".as_ref(),
        DOCUMENT.as_ref(),
    ]
    .map(OsString::from)
    .to_vec();
    if let Some(only) = only {
        command.extend(["--only".into(), only.into()]);
    }
    let machine = Machine {
        kernel: &kernel,
        memory: vm::MEMORY,
        deadline: DEADLINE,
        command,
        folder: PathBuf::from("/root"),
        environment: vec![],
        files: vec![],
        back: Some(PathBuf::from(DOCUMENT)),
        interactive: false,
    };
    let ended = machine.run(&setup, &built, &[program], |line| {
        if json {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    })?;
    let code = ended.verdict(&kernel)?;
    if json {
        print!("{}", ended.back.unwrap_or_default());
    }
    Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The part of the demo that needs a lane, and the one that does not.
const DEMO_PARTS: [&str; 2] = ["link", "partition"];
/// The kernel on which the former plays where this one cannot.
const DEMO_KERNEL: &str = "6.12";

/// `cargo xtask demo`. The part that needs a lane plays in a virtual machine where this kernel has none.
pub(crate) fn demo(arguments: &[OsString]) -> Result<ExitCode> {
    const PURPOSE: &str = "faulting traffic in network namespaces";
    /// What it takes is a minute.
    const DEADLINE: Duration = Duration::from_mins(5);
    let (setup, built) = prepare(&[Need::Ebpf, Need::Services, Need::Tools], Profile::Release)?;
    let [link, partition] = DEMO_PARTS;
    let whole = arguments.is_empty();
    if !whole && arguments != [link] {
        return start(&setup, &built, "demo", arguments, PURPOSE);
    }
    let lacking = lacking_for_lanes(&setup, &built)?;
    if lacking.is_empty() {
        return start(&setup, &built, "demo", arguments, PURPOSE);
    }
    // What was found before stays; this looks only for what runs machines.
    Setup::ensure(&[Need::Machine])?;
    println!(
        "This kernel has no {}, so the first part plays on kernel {DEMO_KERNEL} in a virtual machine.",
        lacking.join(", no ")
    );
    let kernel = DEMO_KERNEL.parse().map_err(anyhow::Error::msg)?;
    let command = ["demo", link].map(OsString::from);
    let code = vm::run(&setup, &built, &kernel, vm::MEMORY, DEADLINE, &command)?;
    if code != 0 || !whole {
        return Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from));
    }
    println!("\nThe second part needs no virtual machine.");
    start(&setup, &built, "demo", &[partition.into()], PURPOSE)
}

/// What `injector check` says of one feature, as far as it is of interest here.
#[derive(Deserialize)]
struct Feature {
    #[serde(rename = "feature")]
    name: String,
    needed: String,
    status: String,
}

/// What `injector check --json` prints.
#[derive(Deserialize)]
struct Check {
    features: Vec<Feature>,
}

/// What this kernel lacks for lanes.
pub(crate) fn lacking_for_lanes(setup: &Setup, built: &Built) -> Result<Vec<String>> {
    const PURPOSE: &str = "looking for what this kernel offers";
    let mut command = as_root(setup, built, "injector", PURPOSE)?;
    let output = process::output(command.args(["check", "--json"]), PURPOSE)?;
    let check: Check = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{PURPOSE}: {}", process::said(&output)))?;
    Ok(check
        .features
        .into_iter()
        .filter(|one| one.needed == "lanes" && one.status != "ok")
        .map(|one| one.name)
        .collect())
}

/// `cargo xtask vm run` and `cargo xtask vm shell`.
pub(crate) fn machine(
    line: &Line,
    memory: u32,
    deadline: Duration,
    command: &[OsString],
) -> Result<ExitCode> {
    let (setup, built) = prepare(
        &[Need::Ebpf, Need::Services, Need::Tools, Need::Machine],
        Profile::Dev,
    )?;
    let code = vm::run(&setup, &built, line, memory, deadline, command)?;
    Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// `cargo xtask vm run --scenario`: plays a scenario on a kernel, and leaves its reports in `reports`.
pub(crate) fn scenario(
    line: &Line,
    memory: u32,
    deadline: Duration,
    file: &Path,
    reports: Option<&Path>,
) -> Result<ExitCode> {
    /// The services are not where a shell would look for them.
    const SCRIPT: &str = "export PATH=\"$(echo $INJECTOR_SERVICES/usr/lib/postgresql/*/bin):\
                          $INJECTOR_SERVICES/usr/bin:$INJECTOR_SERVICES/usr/sbin:$PATH\" \
                          LD_LIBRARY_PATH=\"$INJECTOR_SERVICES_LIB\"; exec \"$@\"";
    let (setup, built) = prepare(
        &[Need::Ebpf, Need::Services, Need::Tools, Need::Machine],
        Profile::Dev,
    )?;
    let injector = built.binary("injector")?;
    // Mistakes are found before a machine is started, and named by the file's own name.
    let status = Command::new(injector)
        .arg("validate")
        .arg(file)
        .status()
        .context("looking at the scenario")?;
    if !status.success() {
        return Ok(ExitCode::from(2));
    }
    let kernel = vm::kernel(line)?;
    let name = file.file_stem().unwrap_or(OsStr::new("scenario"));
    let folder = reports.map_or_else(|| Path::new("injector-report").join(name), Path::to_owned);
    // In the machine they have the paths that they have here, so that what it prints is true here too.
    let absolute = |path: &Path| {
        std::path::absolute(path).with_context(|| format!("looking at {}", path.display()))
    };
    let (inside, folder) = (absolute(file)?, absolute(&folder)?);
    let command = [
        OsStr::new("/bin/sh"),
        OsStr::new("-c"),
        OsStr::new(SCRIPT),
        OsStr::new("sh"),
        injector.as_os_str(),
        OsStr::new("run"),
        inside.as_os_str(),
        OsStr::new("--report"),
        folder.as_os_str(),
    ];
    let machine = Machine {
        kernel: &kernel,
        memory,
        deadline,
        command: command.map(OsStr::to_owned).to_vec(),
        folder: PathBuf::from("/root"),
        environment: vec![],
        files: vec![(inside.clone(), file.to_owned())],
        back: Some(folder.join("run.jsonl")),
        interactive: false,
    };
    eprintln!("kernel {} ({})", kernel.line, kernel.version);
    let ended = machine.run(&setup, &built, &[], |line| println!("{line}"))?;
    let code = ended.verdict(&kernel)?;
    if let Some(log) = ended.back.filter(|log| !log.is_empty()) {
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join("run.jsonl");
        fs::write(&path, log).with_context(|| format!("writing {}", path.display()))?;
        let made = Command::new(injector)
            .args(["--json", "report"])
            .arg(&path)
            .stdout(Stdio::null())
            .status()
            .context("making the reports")?;
        ensure!(
            made.success(),
            "making the reports of {} failed ({made})",
            path.display()
        );
    }
    Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Does the set-up and builds everything.
fn prepare(needs: &[Need], profile: Profile) -> Result<(Setup, Built)> {
    let setup = Setup::ensure(needs)?;
    ebpf::build(setup.ebpf()?)?;
    Ok((setup, build::user_space(profile)?))
}

/// Becomes one of the programs, as root: its exit code and the signals that it gets are ours.
fn start(
    setup: &Setup,
    built: &Built,
    program: &str,
    arguments: &[OsString],
    purpose: &str,
) -> Result<ExitCode> {
    let mut command = as_root(setup, built, program, purpose)?;
    let shown = process::shown(command.args(arguments));
    let error = command.exec();
    Err(error).with_context(|| format!("{purpose}: `{shown}` cannot be started"))
}

/// One of the programs as a command that runs as root.
fn as_root(setup: &Setup, built: &Built, program: &str, purpose: &str) -> Result<Command> {
    let environment = environment(setup, built)?;
    Privilege::find().command(
        built.binary(program)?.as_os_str(),
        environment
            .iter()
            .map(|(name, value)| (*name, value.as_os_str())),
        purpose,
    )
}

/// What programs that run as root find in their environment:
///
/// - `INJECTOR_BIN`: the injector that was built
/// - `INJECTOR_SERVICES`: a root folder with `usr/bin/etcd` and others
/// - `INJECTOR_SERVICES_LIB`: `LD_LIBRARY_PATH` for those
pub(crate) fn environment(setup: &Setup, built: &Built) -> Result<Vec<(&'static str, OsString)>> {
    let mut environment = vec![(
        "INJECTOR_BIN",
        built.binary("injector")?.as_os_str().to_owned(),
    )];
    if let Some(services) = setup.services() {
        environment.push(("INJECTOR_SERVICES", services.root.as_os_str().to_owned()));
        environment.push(("INJECTOR_SERVICES_LIB", services.libraries()));
    }
    for name in PASSED_THROUGH {
        if let Some(value) = std::env::var_os(name) {
            environment.push((name, value));
        }
    }
    Ok(environment)
}
