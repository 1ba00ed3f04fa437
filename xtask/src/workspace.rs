//! Where things are in the workspace.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;

/// The workspace's root folder.
pub(crate) fn root() -> &'static Path {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_folder.parent().unwrap_or(crate_folder)
}

/// The build folder of the eBPF object, apart from that of user space: another compiler fills it.
pub(crate) fn ebpf_target() -> PathBuf {
    root().join("target").join("bpf")
}

/// Where notes of a test run are kept.
pub(crate) fn notes() -> PathBuf {
    root().join("target").join("xtask")
}

/// The cargo that builds user space: the one that runs us.
pub(crate) fn cargo() -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root());
    process::forget_cargo(&mut command);
    command
}
