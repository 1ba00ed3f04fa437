//! The set-up: from what a verb needs to what is there.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::ebpf::Toolchain;
use crate::kernels;
use crate::linker;
use crate::packages::{Apt, Wanted};
use crate::process;
use crate::services::{self, Services};
use crate::toolchain;
use crate::workspace;

/// Programs that tests call, and the packages that carry them. None of the packages starts
/// anything when it is installed.
pub(crate) const TOOLS: [(&str, &str); 10] = [
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("ss", "iproute2"),
    ("nstat", "iproute2"),
    ("ping", "iputils-ping"),
    ("ethtool", "ethtool"),
    ("tcpdump", "tcpdump"),
    ("socat", "socat"),
    ("nft", "nftables"),
    ("curl", "curl"),
];

/// What looks at reports as a person would; too large to be put into virtual machines.
const BROWSER: [(&str, &str); 1] = [("chromium", "chromium")];

/// Something that a verb cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A compiler and a linker for the eBPF object.
    Ebpf,
    /// Clippy for the eBPF compiler; does without where there is none.
    Lints,
    /// Services and traffic generators, unpacked into the cache.
    Services,
    /// Network tools that tests call.
    Tools,
    /// What runs virtual machines.
    Machine,
}

/// Programs for virtual machines, and their packages: what runs them, and what unpacks kernel modules.
const MACHINE: [(&str, &str); 2] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("xz", "xz-utils"),
];

/// What the set-up found or made.
#[derive(Debug, Default)]
pub(crate) struct Setup {
    ebpf: Option<Toolchain>,
    services: Option<Services>,
    tools: bool,
}

impl Setup {
    /// Makes sure that everything in `needs` is there.
    pub(crate) fn ensure(needs: &[Need]) -> Result<Self> {
        let cache = Cache::open()?;
        let mut apt = Apt::new();
        let mut setup = Self::default();
        if needs.contains(&Need::Ebpf) {
            setup.ebpf = Some(ebpf_toolchain(&cache, &mut apt)?);
        }
        if needs.contains(&Need::Lints)
            && let Some(toolchain) = &setup.ebpf
        {
            clippy(&mut apt, toolchain)?;
        }
        if needs.contains(&Need::Tools) {
            tools(&mut apt)?;
            setup.tools = true;
        }
        if needs.contains(&Need::Machine) {
            install(
                &mut apt,
                &MACHINE,
                "tests run on several kernels, in virtual machines",
            )?;
        }
        if needs.contains(&Need::Services) {
            setup.services = Some(services::ensure(&cache, &mut apt)?);
        }
        Ok(setup)
    }

    /// The eBPF toolchain.
    pub(crate) fn ebpf(&self) -> Result<&Toolchain> {
        self.ebpf
            .as_ref()
            .context("this verb has not asked for the eBPF toolchain; that is a mistake in xtask")
    }

    /// The newest kernel of a line, unpacked.
    pub(crate) fn kernel(line: &kernels::Line) -> Result<kernels::Kernel> {
        kernels::ensure(&Cache::open()?, &mut Apt::new(), line)
    }

    /// The services, where this verb has asked for them.
    pub(crate) fn services(&self) -> Option<&Services> {
        self.services.as_ref()
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(toolchain) = &self.ebpf {
            writeln!(f, "compiler: {}", toolchain.compiler)?;
            writeln!(f, "linker:   {}", toolchain.linker.display())?;
            match toolchain.compiler.clippy() {
                Some(clippy) => writeln!(f, "clippy:   {}", clippy.display())?,
                None => writeln!(
                    f,
                    "clippy:   none for this compiler; the eBPF crate is not linted"
                )?,
            }
        }
        if let Some(services) = &self.services {
            writeln!(f, "services: {}", services.root.display())?;
        }
        if self.tools {
            let names: Vec<&str> = TOOLS.iter().map(|(program, _)| *program).collect();
            writeln!(f, "tools:    {}", names.join(" "))?;
        }
        Ok(())
    }
}

/// Finds a compiler and a linker that go together: what is there first, then what is there but for
/// a linker, then the distribution's.
fn ebpf_toolchain(cache: &Cache, apt: &mut Apt) -> Result<Toolchain> {
    let found = toolchain::find();
    let mut rejected = Vec::new();
    for compiler in &found.usable {
        if let Some(linker) = linker::find(cache, compiler, &mut rejected) {
            return Ok(Toolchain {
                compiler: compiler.clone(),
                linker,
            });
        }
    }
    for compiler in &found.usable {
        if linker::can_build(apt, compiler.version.llvm)? {
            let linker = linker::build(cache, apt, compiler, &rejected)?;
            return Ok(Toolchain {
                compiler: compiler.clone(),
                linker,
            });
        }
    }
    let mut reasons = found.rejected;
    for compiler in &found.usable {
        reasons.push(format!(
            "{compiler}: no bpf-linker for its LLVM can be had here"
        ));
    }
    let compiler = toolchain::install_distribution(apt, &reasons)?;
    let linker = match linker::find(cache, &compiler, &mut rejected) {
        Some(linker) => linker,
        None => linker::build(cache, apt, &compiler, &rejected)?,
    };
    Ok(Toolchain { compiler, linker })
}

/// Installs clippy for the distribution's compiler. Where that fails the lint tier says so.
fn clippy(apt: &mut Apt, toolchain: &Toolchain) -> Result<()> {
    if toolchain.compiler.clippy().is_some()
        || toolchain.compiler.origin != toolchain::Origin::Distribution
    {
        return Ok(());
    }
    // Remembered, so that a machine where it cannot be had does not ask apt every time.
    let note = workspace::notes().join("no-ebpf-clippy");
    if std::fs::read_to_string(&note).is_ok_and(|title| title == toolchain.compiler.version.title) {
        return Ok(());
    }
    let installed = match toolchain::clippy_package(apt)? {
        Some(package) => apt.install(&[Wanted::new(
            package,
            "the eBPF crate is linted with its own compiler's clippy",
        )]),
        None => Err(anyhow::anyhow!("apt offers no clippy for this compiler")),
    };
    if let Err(error) = installed {
        eprintln!("setup: the eBPF crate will not be linted: {error:#}");
        std::fs::create_dir_all(workspace::notes())
            .and_then(|()| std::fs::write(&note, &toolchain.compiler.version.title))
            .with_context(|| format!("writing {}", note.display()))?;
    }
    Ok(())
}

/// Installs the network tools that are missing.
fn tools(apt: &mut Apt) -> Result<()> {
    install(apt, &TOOLS, "tests call them")?;
    install(apt, &BROWSER, "a test opens reports in it")
}

/// Installs the packages of those programs that are missing.
fn install(apt: &mut Apt, programs: &[(&str, &str)], why: &str) -> Result<()> {
    let missing: Vec<&(&str, &str)> = programs
        .iter()
        .filter(|(program, _)| process::find_program(program).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|(program, _)| *program).collect();
    let why = format!("{} missing; {why}", names.join(", "));
    let packages: BTreeSet<&str> = missing.iter().map(|(_, package)| *package).collect();
    let wanted: Vec<Wanted> = packages
        .into_iter()
        .map(|package| Wanted::new(package, why.as_str()))
        .collect();
    apt.install(&wanted)
}
