//! Running what was built: `load`, `lab`, `bench` and `demo`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build::{self, Built, Profile};
use crate::ebpf;
use crate::kernels::Line;
use crate::privilege::Privilege;
use crate::process;
use crate::setup::{Need, Setup};
use crate::vm;

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
pub(crate) fn bench(arguments: &[OsString]) -> Result<ExitCode> {
    let (setup, built) = prepare(&[Need::Ebpf, Need::Services, Need::Tools], Profile::Release)?;
    start(
        &setup,
        &built,
        "bench",
        arguments,
        "measuring loaded programs",
    )
}

/// `cargo xtask demo`.
pub(crate) fn demo(arguments: &[OsString]) -> Result<ExitCode> {
    let (setup, built) = prepare(&[Need::Ebpf, Need::Services, Need::Tools], Profile::Release)?;
    start(
        &setup,
        &built,
        "demo",
        arguments,
        "cutting traffic in network namespaces",
    )
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
    let environment = environment(setup, built)?;
    let mut command = Privilege::find().command(
        built.binary(program)?.as_os_str(),
        environment
            .iter()
            .map(|(name, value)| (*name, value.as_os_str())),
        purpose,
    )?;
    let shown = process::shown(command.args(arguments));
    let error = command.exec();
    Err(error).with_context(|| format!("{purpose}: `{shown}` cannot be started"))
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
