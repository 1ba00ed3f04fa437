//! Building the eBPF object with the compiler that the set-up chose.

use std::env::consts::ARCH;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::toolchain::Compiler;
use crate::workspace;

/// The crate that becomes the object.
const PACKAGE: &str = "injector-ebpf";

/// The target of the object: BPF in this machine's byte order.
pub(crate) const fn target() -> &'static str {
    if cfg!(target_endian = "big") {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    }
}

/// What builds the object.
#[derive(Debug, Clone)]
pub(crate) struct Toolchain {
    /// The compiler, with the sources of `core`.
    pub(crate) compiler: Compiler,
    /// A bpf-linker that reads what the compiler writes.
    pub(crate) linker: PathBuf,
}

/// A built object.
#[derive(Debug)]
pub(crate) struct Object {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// How large it is.
    pub(crate) bytes: u64,
}

impl Toolchain {
    /// A command of this toolchain, ready for the eBPF crate: flags, linker and build folder.
    fn command(&self, program: &Path) -> Result<Command> {
        let flags = [
            // BTF for maps and programs comes from the debug information.
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            // Without this the linker has every copying and zeroing of more than a few bytes done by a function,
            // byte after byte.
            "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
            // From v3 on there are atomic instructions that return the old value.
            "-Ctarget-cpu=v3".to_owned(),
            // The layout of the host's registers, which aya-ebpf asks for.
            format!("--cfg=bpf_target_arch=\"{ARCH}\""),
        ];
        let mut command = self.compiler.command(program);
        command
            .current_dir(workspace::root())
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env("CARGO_TARGET_DIR", workspace::ebpf_target())
            .env("PATH", self.path()?);
        Ok(command)
    }

    /// `PATH` with the linker's folder and the compiler's in front. The target's own definition asks
    /// for a linker called `bpf-linker`; were its path among the flags, another cache folder would
    /// mean compiling `core` again.
    fn path(&self) -> Result<OsString> {
        let folders = [self.linker.as_path(), self.compiler.rustc.as_path()]
            .into_iter()
            .filter_map(Path::parent)
            .map(Path::to_owned);
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::join_paths(folders.chain(std::env::split_paths(&path)))
            .context("putting the eBPF toolchain on PATH")
    }

    /// Runs clippy on the eBPF crate. `None` where this compiler has no clippy.
    pub(crate) fn clippy(&self) -> Result<Option<Command>> {
        let Some(clippy) = self.compiler.clippy() else {
            return Ok(None);
        };
        let mut command = self.command(&clippy)?;
        // Called directly and not as `cargo clippy`: cargo would take rustup's.
        command
            .arg("clippy")
            .args(arguments())
            .args(["--", "-D", "warnings"]);
        Ok(Some(command))
    }
}

/// The arguments that building and checking the crate share.
fn arguments() -> [&'static OsStr; 7] {
    [
        "--package",
        PACKAGE,
        "--release",
        "--target",
        target(),
        "-Z",
        "build-std=core",
    ]
    .map(OsStr::new)
}

/// Builds the object.
pub(crate) fn build(toolchain: &Toolchain) -> Result<Object> {
    let mut command = toolchain.command(&toolchain.compiler.cargo)?;
    process::run(
        command.arg("build").args(arguments()),
        "building the eBPF object",
    )?;
    let path = workspace::ebpf_target()
        .join(target())
        .join("release")
        .join(PACKAGE);
    let metadata = path.metadata().with_context(|| {
        format!(
            "the eBPF object was built, but is not at {}",
            path.display()
        )
    })?;
    Ok(Object {
        path,
        bytes: metadata.len(),
    })
}
