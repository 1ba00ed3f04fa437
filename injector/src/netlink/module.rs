//! Kernel modules, where the kernel's own way of loading one does more than is wanted.

use std::{fs, path::Path, process::Command};

/// The program that the kernel runs to load a module (`call_modprobe`, kernel/module/kmod.c).
const LOADER: &str = "/proc/sys/kernel/modprobe";

/// Loads the ifb module, unless it is loaded or built in, without the two devices (`ifb0`, `ifb1`) that it makes in the
/// host's first namespace where it is not told otherwise (`numifbs`, drivers/net/ifb.c). Where that fails the kernel
/// loads it, with them, when an ifb is asked for; so failures are for the log only.
pub(super) fn load_ifb() {
    if Path::new("/sys/module/ifb").exists() {
        return;
    }
    let Ok(loader) = fs::read_to_string(LOADER) else {
        // A kernel without modules.
        return;
    };
    let loader = loader.trim();
    if loader.is_empty() {
        return;
    }
    match Command::new(loader)
        .args(["-q", "--", "ifb", "numifbs=0"])
        .output()
    {
        Ok(output) if output.status.success() => {}
        Ok(output) => tracing::debug!("{loader} could not load ifb: {output:?}"),
        Err(error) => tracing::debug!("{loader} could not be run: {error}"),
    }
}
