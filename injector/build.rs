//! Finds the eBPF object that is embedded into the daemon.
//!
//! The object is built by `cargo xtask build` with another compiler. `INJECTOR_EBPF_OBJECT` names
//! another file than that one; either way the crate sees its path under that name.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The variable that names the object.
const VARIABLE: &str = "INJECTOR_EBPF_OBJECT";

fn main() {
    println!("cargo:rerun-if-env-changed={VARIABLE}");
    println!("cargo:rerun-if-changed=build.rs");
    let path = env::var_os(VARIABLE).map_or_else(default_path, PathBuf::from);
    // A relative path would be looked for beside the source file that includes it.
    let path = std::path::absolute(&path).unwrap_or(path);
    println!("cargo:rerun-if-changed={}", path.display());
    let Some(changed) = changed(&path) else {
        println!(
            "cargo::error=the eBPF object is missing: {} (run `cargo xtask build`, which builds it first, \
             or let {VARIABLE} name it)",
            path.display()
        );
        return;
    };
    for source in sources(&path) {
        println!("cargo:rerun-if-changed={}", source.display());
        if self::changed(&source).is_some_and(|source| source > changed) {
            println!(
                "cargo::warning=the eBPF object is older than {}; run `cargo xtask build` to bring it up to date",
                source.display()
            );
        }
    }
    println!("cargo:rustc-env={VARIABLE}={}", path.display());
}

/// Where `cargo xtask build` leaves the object.
fn default_path() -> PathBuf {
    let target = match env::var("CARGO_CFG_TARGET_ENDIAN").as_deref() {
        Ok("big") => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .unwrap_or_default();
    let workspace = package.parent().map(Path::to_owned).unwrap_or_default();
    workspace
        .join("target/bpf")
        .join(target)
        .join("release/injector-ebpf")
}

/// When the file was last written; `None` where there is none.
fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

/// The sources that the object was made of, from the file of dependencies that cargo leaves beside
/// it: `OBJECT: SOURCE SOURCE …`, with blanks in names escaped.
fn sources(object: &Path) -> Vec<PathBuf> {
    let Ok(text) = fs::read_to_string(object.with_extension("d")) else {
        return Vec::new();
    };
    let Some((_, list)) = text.lines().next().and_then(|line| line.split_once(": ")) else {
        return Vec::new();
    };
    list.replace("\\ ", "\0")
        .split(' ')
        .filter(|name| !name.is_empty())
        .map(|name| PathBuf::from(name.replace('\0', " ")))
        .collect()
}
