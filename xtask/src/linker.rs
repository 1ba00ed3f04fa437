//! bpf-linker: finding one that understands the compiler's output, building one where there is
//! none.
//!
//! Whether a linker is usable is tried, not guessed from versions: a few lines are compiled and
//! linked, and the outcome is remembered for this pair of files.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::packages::{Apt, Wanted};
use crate::process;
use crate::toolchain::Compiler;
use crate::workspace;

/// The release that is built where none is found.
const RELEASE: &str = "0.13.0";

/// The LLVM major versions that this release can be built for.
const LLVM_FEATURES: std::ops::RangeInclusive<u32> = 21..=23;

/// The smallest program that goes through all that a real one goes through: `core` is left out so
/// that it compiles at once.
const PROBE: &str = r#"#![feature(no_core, lang_items)]
#![allow(internal_features)]
#![no_core]
#![no_main]
#[lang = "pointee_sized"]
pub trait PointeeSized {}
#[lang = "meta_sized"]
pub trait MetaSized: PointeeSized {}
#[lang = "sized"]
pub trait Sized: MetaSized {}
#[lang = "copy"]
pub trait Copy: Sized {}
impl Copy for u32 {}
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
pub extern "C" fn probe() -> u32 {
    0
}
"#;

/// A linker that was tried with a compiler.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Trial {
    linker: PathBuf,
    linker_bytes: u64,
    linker_changed: (i64, i64),
    compiler: PathBuf,
    compiler_title: String,
}

impl Trial {
    /// The identity of this pair of files.
    fn of(linker: &Path, compiler: &Compiler) -> io::Result<Self> {
        let metadata = fs::metadata(linker)?;
        Ok(Self {
            linker: linker.to_owned(),
            linker_bytes: metadata.len(),
            linker_changed: (metadata.mtime(), metadata.mtime_nsec()),
            compiler: compiler.rustc.clone(),
            compiler_title: compiler.version.title.clone(),
        })
    }
}

/// Looks for a linker that works with the compiler: on `PATH`, then in the cache. Adds to
/// `rejected` why others were passed over.
pub(crate) fn find(
    cache: &Cache,
    compiler: &Compiler,
    rejected: &mut Vec<String>,
) -> Option<PathBuf> {
    let on_path = process::find_programs("bpf-linker");
    for linker in on_path.chain(cached(cache, compiler.version.llvm)) {
        match usable(cache, &linker, compiler) {
            Ok(()) => return Some(linker),
            Err(error) => rejected.push(format!("{}: {error:#}", linker.display())),
        }
    }
    None
}

/// The linkers in the cache whose LLVM is the compiler's or newer, the oldest first.
fn cached(cache: &Cache, llvm: u32) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cache.folder()) else {
        return Vec::new();
    };
    let mut found: Vec<(u32, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let built_for = llvm_of_folder(&entry.file_name().to_string_lossy())?;
            let linker = entry.path().join("bin").join("bpf-linker");
            (built_for >= llvm && linker.is_file()).then_some((built_for, linker))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, linker)| linker).collect()
}

/// The folder of a linker of ours, which records the LLVM that it was built with.
fn folder_name(llvm: u32) -> String {
    format!("bpf-linker-{RELEASE}-llvm-{llvm}")
}

/// The LLVM of a folder that [`folder_name`] named.
fn llvm_of_folder(name: &str) -> Option<u32> {
    name.strip_prefix("bpf-linker-")?
        .split_once("-llvm-")?
        .1
        .parse()
        .ok()
}

/// Whether the linker can link what the compiler makes.
fn usable(cache: &Cache, linker: &Path, compiler: &Compiler) -> Result<()> {
    let record = cache.folder().join("linker-trial.json");
    let trial =
        Trial::of(linker, compiler).with_context(|| format!("looking at {}", linker.display()))?;
    let remembered: Option<Trial> = fs::read(&record)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if remembered.as_ref() == Some(&trial) {
        return Ok(());
    }
    try_linker(cache, linker, compiler)?;
    let bytes = serde_json::to_vec_pretty(&trial).context("writing down which linker works")?;
    fs::write(&record, bytes).with_context(|| format!("writing {}", record.display()))
}

/// Compiles and links the probe.
fn try_linker(cache: &Cache, linker: &Path, compiler: &Compiler) -> Result<()> {
    process::capture(Command::new(linker).arg("--version"), "starting bpf-linker")?;
    let folder = cache.folder().join("linker-trial");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let (source, bitcode, object) = (
        folder.join("probe.rs"),
        folder.join("probe.bc"),
        folder.join("probe.o"),
    );
    fs::write(&source, PROBE).with_context(|| format!("writing {}", source.display()))?;
    let bitcode_made = process::output(
        compiler
            .command(&compiler.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .args([
                "--edition",
                "2024",
                "--crate-name",
                "probe",
                "--crate-type",
                "bin",
            ])
            .args(["--target", crate::ebpf::target(), "--emit", "llvm-bc"])
            .args([
                "-C",
                "panic=abort",
                "-C",
                "debuginfo=2",
                "-C",
                "opt-level=3",
                "-o",
            ])
            .arg(&bitcode)
            .arg(&source),
        "compiling a program to try bpf-linker with",
    )?;
    if !bitcode_made.status.success() {
        // A compiler whose language items have other names says nothing about the linker. The real
        // build will show.
        return Ok(());
    }
    process::capture(
        Command::new(linker)
            .args(["--btf", "--emit", "obj", "--output"])
            .arg(&object)
            .arg(&bitcode),
        "linking a small program with bpf-linker",
    )
    .map(drop)
}

/// Where an LLVM of this version that one can build against is installed.
fn llvm_prefix(llvm: u32) -> Option<PathBuf> {
    let debian = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if debian.join("bin/llvm-config").exists() && debian.join("include/llvm-c/Core.h").is_file() {
        return Some(debian);
    }
    [format!("llvm-config-{llvm}"), "llvm-config".to_owned()]
        .iter()
        .find_map(|name| {
            let config = process::find_program(name)?;
            let version = process::capture(
                Command::new(&config).arg("--version"),
                "asking LLVM for its version",
            )
            .ok()?;
            if version.split('.').next()?.trim().parse::<u32>().ok()? != llvm {
                return None;
            }
            let prefix = process::capture(
                Command::new(&config).arg("--prefix"),
                "asking LLVM for its folder",
            )
            .ok()?;
            let prefix = PathBuf::from(prefix.trim());
            prefix
                .join("include/llvm-c/Core.h")
                .is_file()
                .then_some(prefix)
        })
}

/// Whether a linker for this LLVM could be built here.
pub(crate) fn can_build(apt: &Apt, llvm: u32) -> Result<bool> {
    Ok(LLVM_FEATURES.contains(&llvm)
        && (llvm_prefix(llvm).is_some() || apt.candidate(&format!("llvm-{llvm}-dev"))?.is_some()))
}

/// Builds a linker for the compiler into the cache, installing LLVM's development files first
/// where they are missing.
pub(crate) fn build(
    cache: &Cache,
    apt: &mut Apt,
    compiler: &Compiler,
    rejected: &[String],
) -> Result<PathBuf> {
    let llvm = compiler.version.llvm;
    if !LLVM_FEATURES.contains(&llvm) {
        bail!(
            "no bpf-linker for {compiler}: release {RELEASE} cannot be built for LLVM {llvm}, only for {} \
             to {}. Put a bpf-linker of LLVM {llvm} or newer on PATH{}",
            LLVM_FEATURES.start(),
            LLVM_FEATURES.end(),
            passed_over(rejected)
        );
    }
    let root = cache.folder().join(folder_name(llvm));
    let linker = root.join("bin").join("bpf-linker");
    let prefix = if let Some(prefix) = llvm_prefix(llvm) {
        prefix
    } else {
        apt.install(&[Wanted::new(
            format!("llvm-{llvm}-dev"),
            format!("bpf-linker is built against the compiler's LLVM, which is {llvm}"),
        )])?;
        // The linker may have been built before and miss nothing but LLVM's library.
        if linker.is_file() && usable(cache, &linker, compiler).is_ok() {
            return Ok(linker);
        }
        llvm_prefix(llvm).with_context(|| {
            format!("llvm-{llvm}-dev is installed, but neither /usr/lib/llvm-{llvm} nor llvm-config-{llvm} is there")
        })?
    };
    eprintln!(
        "setup: building bpf-linker {RELEASE} for LLVM {llvm} into {}: the eBPF object needs a linker that reads \
         LLVM {llvm}'s bitcode (one to three minutes, once){}",
        root.display(),
        passed_over(rejected)
    );
    process::run(
        workspace::cargo()
            // Away from the workspace, whose configuration is not meant for it.
            .current_dir(cache.folder())
            .args([
                "install",
                "bpf-linker",
                "--version",
                RELEASE,
                "--locked",
                "--force",
                "--no-default-features",
            ])
            .args(["--features", &format!("llvm-{llvm}"), "--root"])
            .arg(&root)
            .arg("--quiet")
            .env("LLVM_PREFIX", &prefix)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("CARGO_TARGET_DIR"),
        "building bpf-linker",
    )?;
    usable(cache, &linker, compiler)
        .with_context(|| format!("the bpf-linker just built does not work with {compiler}"))?;
    Ok(linker)
}

/// The linkers that were passed over, as the end of a sentence.
fn passed_over(rejected: &[String]) -> String {
    if rejected.is_empty() {
        String::new()
    } else {
        format!("; passed over: {}", rejected.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_records_the_llvm() {
        assert_eq!(llvm_of_folder(&folder_name(22)), Some(22));
        assert_eq!(llvm_of_folder("bpf-linker-0.12.1-llvm-21"), Some(21));
        assert_eq!(llvm_of_folder("services"), None);
        assert_eq!(llvm_of_folder("bpf-linker-0.12.1"), None);
    }
}
