//! Choosing the compiler of the eBPF object.
//!
//! A BPF target has no prebuilt `core`, so the compiler must come with its own sources: a rustup
//! toolchain with the `rust-src` component, else the distribution's compiler with its source
//! package.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages::{Apt, Wanted};
use crate::process;

/// Where a toolchain keeps the sources of `core`, below its sysroot.
const SOURCES: &str = "lib/rustlib/src/rust/library/core/src/lib.rs";

/// Package names of distributions: compiler, cargo, sources, clippy. Debian stable carries a recent
/// compiler (the one that its browsers are built with) under the first names.
const DISTRIBUTIONS: [DistributionNames; 2] = [
    DistributionNames {
        compiler: "rustc-web",
        cargo: "cargo-web",
        sources: "rust-web-src",
        clippy: "rust-web-clippy",
    },
    DistributionNames {
        compiler: "rustc",
        cargo: "cargo",
        sources: "rust-src",
        clippy: "rust-clippy",
    },
];

/// How one distribution calls its packages.
#[derive(Debug, Clone, Copy)]
struct DistributionNames {
    compiler: &'static str,
    cargo: &'static str,
    sources: &'static str,
    clippy: &'static str,
}

/// A compiler's own account of itself, from `rustc -vV`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    /// The first line, such as `rustc 1.96.0 (ac68faa20 2026-05-25)`.
    pub(crate) title: String,
    /// Major, minor.
    pub(crate) release: (u32, u32),
    /// Whether unstable features are allowed without asking.
    pub(crate) nightly: bool,
    /// Major version of its LLVM.
    pub(crate) llvm: u32,
}

impl Version {
    /// Reads the output of `rustc -vV`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .with_context(|| format!("`rustc -vV` printed no line \"{name}: …\", but:\n{text}"))
        };
        let release = field("release")?;
        let llvm = field("LLVM version")?;
        Ok(Self {
            title: text.lines().next().unwrap_or_default().to_owned(),
            release: release_of(release).with_context(|| {
                format!("`rustc -vV` names its release in an unknown form: {release}")
            })?,
            nightly: release.contains("-nightly") || release.contains("-dev"),
            llvm: llvm
                .split('.')
                .next()
                .and_then(|major| major.parse().ok())
                .with_context(|| {
                    format!("`rustc -vV` names its LLVM in an unknown form: {llvm}")
                })?,
        })
    }
}

/// The first two numbers of a release such as `1.96.0-nightly`.
fn release_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(['.', '-', '+', '~']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The oldest release that builds the workspace.
fn oldest() -> (u32, u32) {
    release_of(env!("CARGO_PKG_RUST_VERSION")).unwrap_or((1, 95))
}

/// Where a compiler comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The rustup toolchain of this name.
    Rustup(String),
    /// The distribution's package.
    Distribution,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rustup(name) => write!(f, "rustup toolchain {name}"),
            Self::Distribution => f.write_str("the distribution's compiler"),
        }
    }
}

/// A compiler that can build the eBPF object.
#[derive(Debug, Clone)]
pub(crate) struct Compiler {
    /// The compiler.
    pub(crate) rustc: PathBuf,
    /// The cargo that belongs to it.
    pub(crate) cargo: PathBuf,
    /// What it says about itself.
    pub(crate) version: Version,
    /// Where it comes from.
    pub(crate) origin: Origin,
}

impl Compiler {
    /// The `cargo-clippy` that belongs to this compiler, where it is installed.
    pub(crate) fn clippy(&self) -> Option<PathBuf> {
        let folder = self.rustc.parent()?;
        let clippy = folder.join("cargo-clippy");
        (clippy.is_file() && folder.join("clippy-driver").is_file()).then_some(clippy)
    }

    /// A command of this toolchain that sees nothing of the toolchain that runs us.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        process::forget_cargo(&mut command);
        for name in [
            "RUSTUP_TOOLCHAIN",
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET_DIR",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTDOC",
            "LD_LIBRARY_PATH",
        ] {
            command.env_remove(name);
        }
        command.env("CARGO", &self.cargo).env("RUSTC", &self.rustc);
        if !self.version.nightly {
            // A released compiler builds `core` only where it is told to behave like a nightly.
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, LLVM {}, {} ({})",
            self.version.title,
            self.version.llvm,
            self.rustc.display(),
            self.origin
        )
    }
}

/// What a look around found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Compilers that can build the object, the preferred one first.
    pub(crate) usable: Vec<Compiler>,
    /// Compilers that cannot, each with the reason.
    pub(crate) rejected: Vec<String>,
}

/// Looks for compilers that come with their sources: rustup nightlies, newest first, then the
/// distribution's.
pub(crate) fn find() -> Found {
    let mut found = Found::default();
    for folder in rustup_nightlies() {
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let origin = Origin::Rustup(name.clone());
        if !folder.join(SOURCES).is_file() {
            found.rejected.push(format!(
                "{origin}: no rust-src (`rustup component add rust-src --toolchain {name}` adds it)"
            ));
            continue;
        }
        let bin = folder.join("bin");
        add(&mut found, &bin.join("rustc"), &bin.join("cargo"), origin);
    }
    found
        .usable
        .sort_by_key(|compiler| std::cmp::Reverse(compiler.version.release));
    let (rustc, cargo) = (Path::new("/usr/bin/rustc"), Path::new("/usr/bin/cargo"));
    if rustc.is_file() {
        if sysroot_sources(rustc) {
            add(&mut found, rustc, cargo, Origin::Distribution);
        } else {
            found.rejected.push(format!(
                "{}: its sources are not installed",
                Origin::Distribution
            ));
        }
    }
    found
}

/// Judges one compiler that has its sources.
fn add(found: &mut Found, rustc: &Path, cargo: &Path, origin: Origin) {
    let version = process::capture(
        Command::new(rustc).arg("-vV"),
        "asking a compiler for its version",
    )
    .and_then(|text| Version::parse(&text));
    match version {
        Err(error) => found.rejected.push(format!("{origin}: {error:#}")),
        Ok(version) if version.release < oldest() => found.rejected.push(format!(
            "{origin}: {} is older than {}",
            version.title,
            env!("CARGO_PKG_RUST_VERSION")
        )),
        Ok(_) if !cargo.is_file() => {
            found
                .rejected
                .push(format!("{origin}: {} is missing", cargo.display()));
        }
        Ok(version) => found.usable.push(Compiler {
            rustc: rustc.to_owned(),
            cargo: cargo.to_owned(),
            version,
            origin,
        }),
    }
}

/// Whether the sources are where this compiler looks for them.
fn sysroot_sources(rustc: &Path) -> bool {
    process::capture(
        Command::new(rustc)
            .args(["--print", "sysroot"])
            .env_remove("RUSTUP_TOOLCHAIN"),
        "asking a compiler for its folder",
    )
    .is_ok_and(|sysroot| Path::new(sysroot.trim()).join(SOURCES).is_file())
}

/// The folders of rustup's nightly toolchains, and of custom ones that are linked into it.
fn rustup_nightlies() -> Vec<PathBuf> {
    let Some(home) = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".rustup")))
    else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir(home.join("toolchains")) else {
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("nightly"))
        })
        .collect();
    folders.sort();
    folders
}

/// Installs the distribution's compiler with its sources, and returns it.
pub(crate) fn install_distribution(apt: &mut Apt, rejected: &[String]) -> Result<Compiler> {
    let tried = if rejected.is_empty() {
        "no nightly of rustup and no compiler of the distribution is here".to_owned()
    } else {
        rejected.join("; ")
    };
    let remedy = "Install one by hand: `rustup toolchain install nightly --component rust-src`";
    if !apt.is_available() {
        bail!(
            "no compiler for the eBPF object: it needs one with the sources of `core` ({tried}), and \
             there is no apt-get to install the distribution's. {remedy}"
        );
    }
    let Some(names) = candidate(apt)? else {
        bail!(
            "no compiler for the eBPF object: it needs one with the sources of `core` ({tried}), and \
             apt offers no rustc-web or rustc of {} or newer. {remedy}",
            env!("CARGO_PKG_RUST_VERSION")
        );
    };
    let why = "the eBPF object needs `core` built from the compiler's own sources";
    apt.install(&[
        Wanted::new(names.compiler, why),
        Wanted::new(names.cargo, why),
        Wanted::new(names.sources, why),
    ])?;
    let found = find();
    found
        .usable
        .into_iter()
        .find(|compiler| compiler.origin == Origin::Distribution)
        .with_context(|| {
            format!(
                "no compiler for the eBPF object, although {} is installed now: {}. {remedy}",
                names.compiler,
                found.rejected.join("; ")
            )
        })
}

/// The package names under which apt offers a compiler that is new enough. Lists that are out of
/// date may offer an older one, so they are brought up to date before giving up.
fn candidate(apt: &mut Apt) -> Result<Option<DistributionNames>> {
    loop {
        for names in DISTRIBUTIONS {
            let offered = apt.candidate(names.compiler)?;
            if offered
                .as_deref()
                .and_then(upstream_release)
                .is_some_and(|release| release >= oldest())
            {
                return Ok(Some(names));
            }
        }
        if !apt.update_once()? {
            return Ok(None);
        }
    }
}

/// The release in a Debian version such as `1:1.96.0+dfsg1-1~deb12u2`.
fn upstream_release(version: &str) -> Option<(u32, u32)> {
    release_of(version.split_once(':').map_or(version, |(_, rest)| rest))
}

/// The package that carries clippy for the distribution's compiler.
pub(crate) fn clippy_package(apt: &mut Apt) -> Result<Option<&'static str>> {
    for names in DISTRIBUTIONS {
        if apt.installed(names.compiler)? {
            return Ok(apt.candidate(names.clippy)?.map(|_| names.clippy));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)
binary: rustc
commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96
commit-date: 2026-05-25
host: x86_64-unknown-linux-gnu
release: 1.96.0
LLVM version: 22.1.8
";

    #[test]
    fn a_released_compiler_is_recognised() {
        let version = Version::parse(DEBIAN).unwrap();
        assert_eq!(version.release, (1, 96));
        assert_eq!(version.llvm, 22);
        assert!(!version.nightly);
        assert!(version.title.starts_with("rustc 1.96.0 (ac68faa20"));
    }

    #[test]
    fn a_nightly_is_recognised() {
        let text = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nrelease: 1.97.0-nightly\nLLVM version: 22.1\n";
        let version = Version::parse(text).unwrap();
        assert!(version.nightly);
        assert_eq!((version.release, version.llvm), ((1, 97), 22));
    }

    #[test]
    fn a_compiler_that_names_no_llvm_is_refused_by_name() {
        let error = Version::parse("rustc 1.96.0\nrelease: 1.96.0\n").unwrap_err();
        assert!(error.to_string().contains("LLVM version"), "{error}");
        assert!(Version::parse("").is_err());
        assert!(Version::parse("rustc 1\nrelease: next\nLLVM version: 22\n").is_err());
    }

    #[test]
    fn debian_versions_tell_the_release() {
        assert_eq!(upstream_release("1.96.0+dfsg1-1~deb12u2"), Some((1, 96)));
        assert_eq!(upstream_release("2:1.63.0+dfsg1-2"), Some((1, 63)));
        assert_eq!(upstream_release("(none)"), None);
    }

    #[test]
    fn the_oldest_release_is_that_of_the_workspace() {
        assert!(oldest() >= (1, 95));
    }
}
