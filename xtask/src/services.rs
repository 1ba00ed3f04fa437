//! Services and traffic generators for tests and the demo.
//!
//! Installing a server's package starts the server. So nothing is installed here: the packages are
//! unpacked into the cache folder, and whoever needs a server starts it from there with its own
//! configuration.

use std::collections::BTreeSet;
use std::env::consts::ARCH;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::packages::{self, Apt};
use crate::process;

/// The packages that are unpacked. Libraries that the host lacks are added to them.
const PACKAGES: [&str; 8] = [
    "etcd-server",
    "etcd-client",
    "redis-server",
    "redis-tools",
    "iperf3",
    "chrony",
    "nginx",
    "postgresql",
];

/// Packages whose names have a version in them, by how they begin; they are dependencies of others.
const VERSIONED: [&str; 2] = ["postgresql-", "postgresql-client-"];

/// The programs that must work afterwards, below the folder.
pub(crate) const PROGRAMS: [&str; 8] = [
    "usr/bin/etcd",
    "usr/bin/etcdctl",
    "usr/bin/redis-server",
    "usr/bin/redis-cli",
    "usr/bin/iperf3",
    "usr/bin/chronyc",
    "usr/sbin/chronyd",
    "usr/sbin/nginx",
];

/// Programs of `PostgreSQL`, in a folder with its version.
const POSTGRESQL: [&str; 5] = ["postgres", "initdb", "pg_basebackup", "pg_ctl", "psql"];

/// All programs that are there, below the folder.
pub(crate) fn programs(root: &Path) -> Vec<PathBuf> {
    let versions = fs::read_dir(root.join("usr/lib/postgresql"))
        .into_iter()
        .flatten()
        .flatten();
    let mut found: Vec<PathBuf> = PROGRAMS.iter().map(PathBuf::from).collect();
    for version in versions {
        let bin = Path::new("usr/lib/postgresql")
            .join(version.file_name())
            .join("bin");
        found.extend(POSTGRESQL.iter().map(|program| bin.join(program)));
    }
    found
}

/// The file that says what the folder holds; written last.
const CONTENTS: &str = "contents.json";

/// Unpacked services.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    /// A root folder with `usr/bin/…` in it.
    pub(crate) root: PathBuf,
}

/// What is in the folder.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    /// The packages that were asked for.
    asked: Vec<String>,
    /// The package files that were unpacked, with their versions.
    unpacked: Vec<String>,
}

impl Services {
    /// The folders of the shared libraries that came along, as `LD_LIBRARY_PATH` takes them.
    pub(crate) fn libraries(&self) -> OsString {
        library_path(&self.root)
    }
}

/// The folders below `root` in which Debian keeps shared libraries, joined with colons.
fn library_path(root: &Path) -> OsString {
    let triplet = format!("{ARCH}-linux-gnu");
    let mut joined = OsString::new();
    for folder in [
        root.join("usr/lib").join(&triplet),
        root.join("lib").join(&triplet),
        root.join("usr/lib"),
    ] {
        if !joined.is_empty() {
            joined.push(":");
        }
        joined.push(folder);
    }
    joined
}

/// Makes sure that the services are unpacked in the cache.
pub(crate) fn ensure(cache: &Cache, apt: &mut Apt) -> Result<Services> {
    let root = cache.folder().join("services");
    if is_complete(&root) {
        return Ok(Services { root });
    }
    if !apt.is_available() {
        bail!(
            "missing: {} for tests against real services. They are unpacked from Debian packages, and \
             this machine has no apt-get",
            PACKAGES.join(", ")
        );
    }
    eprintln!(
        "setup: unpacking {} into {}: tests and the demo run real services (nothing is installed or started)",
        PACKAGES.join(" "),
        root.display()
    );
    let partial = cache.folder().join("services.partial");
    remove(&partial)?;
    let debs = partial.join("packages");
    fs::create_dir_all(&debs).with_context(|| format!("making {}", debs.display()))?;
    let mut unpacked = fetch(apt, &PACKAGES.map(str::to_owned), &debs, &partial)?;
    add_versioned(apt, &debs, &partial, &mut unpacked)?;
    add_libraries(apt, &debs, &partial, &mut unpacked)?;
    remove(&debs)?;
    // Nobody reads it, and it would be carried into every virtual machine.
    for folder in ["doc", "locale", "man"] {
        remove(&partial.join("usr/share").join(folder))?;
    }
    let contents = Contents {
        asked: PACKAGES.map(str::to_owned).to_vec(),
        unpacked: unpacked.iter().map(|deb| file_name(deb)).collect(),
    };
    let path = partial.join(CONTENTS);
    let text = serde_json::to_vec_pretty(&contents).context("describing the unpacked services")?;
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    remove(&root)?;
    fs::rename(&partial, &root)
        .with_context(|| format!("renaming {} to {}", partial.display(), root.display()))?;
    Ok(Services { root })
}

/// Whether the folder holds what we want today.
fn is_complete(root: &Path) -> bool {
    let contents: Option<Contents> = fs::read(root.join(CONTENTS))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let programs = programs(root);
    contents.is_some_and(|contents| contents.asked == PACKAGES)
        && programs.len() > PROGRAMS.len()
        && programs.iter().all(|program| root.join(program).exists())
}

/// Fetches and unpacks packages, and returns their files.
fn fetch(apt: &mut Apt, names: &[String], debs: &Path, root: &Path) -> Result<BTreeSet<PathBuf>> {
    let files: BTreeSet<PathBuf> = apt.download(names, debs)?.into_iter().collect();
    for deb in &files {
        packages::unpack(deb, root)?;
    }
    Ok(files)
}

/// Unpacks the packages that have a version in their names.
fn add_versioned(
    apt: &mut Apt,
    debs: &Path,
    root: &Path,
    unpacked: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    // A round finds what the round before has brought: the server is a dependency of `postgresql`, its client one of
    // the server.
    for _ in VERSIONED {
        let mut next = Vec::new();
        for deb in unpacked.iter() {
            for name in packages::dependencies(&packages::field(deb, "Depends")?) {
                let versioned = VERSIONED.iter().any(|begin| {
                    name.strip_prefix(begin).is_some_and(|rest| {
                        !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit())
                    })
                });
                let there = unpacked
                    .iter()
                    .any(|deb| file_name(deb).starts_with(&format!("{name}_")));
                if versioned && !there && !next.contains(&name) {
                    next.push(name);
                }
            }
        }
        if !next.is_empty() {
            unpacked.extend(fetch(apt, &next, debs, root)?);
        }
    }
    Ok(())
}

/// Unpacks the libraries that the programs need and the host lacks: those among the dependencies of
/// what was unpacked, until nothing is missing.
fn add_libraries(
    apt: &mut Apt,
    debs: &Path,
    root: &Path,
    unpacked: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    let mut tried: BTreeSet<String> = PACKAGES.map(str::to_owned).into();
    loop {
        let missing = missing_libraries(root)?;
        if missing.is_empty() {
            return Ok(());
        }
        let mut next = Vec::new();
        for deb in unpacked.iter() {
            for name in packages::dependencies(&packages::field(deb, "Depends")?) {
                if name.starts_with("lib") && !apt.installed(&name)? && tried.insert(name.clone()) {
                    next.push(name);
                }
            }
        }
        if next.is_empty() {
            let missing: Vec<&str> = missing.iter().map(String::as_str).collect();
            bail!(
                "the unpacked services lack shared libraries that none of their packages brings: {}",
                missing.join(", ")
            );
        }
        unpacked.extend(fetch(apt, &next, debs, root)?);
    }
}

/// The shared libraries that the programs ask for and that neither the host nor the folder has.
fn missing_libraries(root: &Path) -> Result<BTreeSet<String>> {
    let mut missing = BTreeSet::new();
    for program in programs(root) {
        let path = root.join(&program);
        if !path.exists() {
            bail!(
                "the packages {} brought no {}",
                PACKAGES.join(", "),
                program.display()
            );
        }
        let output = process::output(
            Command::new("ldd")
                .arg(&path)
                .env("LD_LIBRARY_PATH", library_path(root))
                .env("LC_ALL", "C"),
            "looking for the shared libraries of a service",
        )?;
        missing.extend(not_found(&String::from_utf8_lossy(&output.stdout)));
    }
    Ok(missing)
}

/// The libraries that ldd did not find.
fn not_found(ldd: &str) -> Vec<String> {
    ldd.lines()
        .filter_map(|line| line.trim().strip_suffix("=> not found"))
        .map(|name| name.trim().to_owned())
        .collect()
}

/// Removes a folder, if it is there.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The last part of a path, as text.
fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(OsStr::new(""))
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)
\tliblzf.so.1 => not found
\tlibssl.so.3 => /lib/x86_64-linux-gnu/libssl.so.3 (0x00007f)
\tlibjemalloc.so.2 => not found
";
        assert_eq!(not_found(text), ["liblzf.so.1", "libjemalloc.so.2"]);
        assert!(not_found("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn libraries_are_looked_for_below_the_root() {
        let services = Services {
            root: PathBuf::from("/c/services"),
        };
        let path = services.libraries().into_string().unwrap();
        assert!(
            path.starts_with("/c/services/usr/lib/") && path.contains(":/c/services/lib/"),
            "{path}"
        );
    }
}
