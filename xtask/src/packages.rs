//! Packages of the distribution, through apt.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::privilege::Privilege;
use crate::process;

/// How long apt waits for another apt, in seconds.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=300";

/// A package and why it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Its name.
    pub(crate) package: String,
    /// What it is for, as the end of "installing … because …".
    pub(crate) why: String,
}

impl Wanted {
    /// A package that is wanted for this reason.
    pub(crate) fn new(package: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            package: package.into(),
            why: why.into(),
        }
    }
}

/// Packages of another suite of the machine's own archive, without touching the machine's configuration.
#[derive(Debug)]
pub(crate) struct Source {
    /// What apt's programs are told.
    options: Vec<OsString>,
}

impl Source {
    /// A suite, with lists of its own in `folder`, brought up to date now.
    pub(crate) fn beside(folder: &Path, suite: &str) -> Result<Self> {
        let archive = archive()?;
        let place = folder.join(suite);
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = place.join(part);
            fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        }
        let list = place.join("sources.list");
        let text = format!("deb [signed-by={DEBIAN_KEYS}] {archive} {suite} main\n");
        fs::write(&list, text).with_context(|| format!("writing {}", list.display()))?;
        let option = |name: &str, value: &OsStr| {
            let mut text = OsString::from(format!("{name}="));
            text.push(value);
            [OsString::from("-o"), text]
        };
        let options = [
            option("Dir::Etc::sourcelist", list.as_os_str()),
            option("Dir::Etc::sourceparts", OsStr::new("-")),
            option("Dir::State::lists", place.join("lists").as_os_str()),
            option("Dir::Cache", place.join("cache").as_os_str()),
            option("APT::Sandbox::User", OsStr::new("root")),
        ]
        .concat();
        let source = Self { options };
        process::capture(
            Command::new("apt-get")
                .args(&source.options)
                .args(["update", "-q"])
                .env("LC_ALL", "C"),
            &format!("reading the package lists of {suite}"),
        )?;
        Ok(source)
    }
}

/// Where Debian's keys are (package debian-archive-keyring, which every Debian has).
const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The address of the archive that this machine takes Debian's main packages from.
fn archive() -> Result<String> {
    let text = process::capture(
        Command::new("apt-get")
            .args([
                "indextargets",
                "--format",
                "$(REPO_URI) $(ORIGIN) $(LABEL) $(SUITE)",
            ])
            .env("LC_ALL", "C"),
        "asking apt where its packages come from",
    )?;
    text.lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next()?;
            (words.next() == Some("Debian") && words.next() == Some("Debian"))
                .then(|| address.to_owned())
        })
        .context(
            "apt knows no archive of Debian on this machine; newer kernels for virtual machines come from there",
        )
}

/// Which of two package versions is newer.
pub(crate) fn compare(one: &str, other: &str) -> Result<Ordering> {
    for (relation, ordering) in [("gt", Ordering::Greater), ("eq", Ordering::Equal)] {
        let output = process::output(
            Command::new("dpkg").args(["--compare-versions", one, relation, other]),
            "comparing package versions",
        )?;
        if output.status.success() {
            return Ok(ordering);
        }
    }
    Ok(Ordering::Less)
}

/// apt, with its package lists brought up to date at most once.
#[derive(Debug)]
pub(crate) struct Apt {
    available: bool,
    updated: bool,
}

impl Apt {
    /// Looks for apt.
    pub(crate) fn new() -> Self {
        let programs = ["apt-get", "apt-cache", "dpkg-query", "dpkg-deb"];
        let available = programs
            .iter()
            .all(|program| process::find_program(program).is_some());
        Self {
            available,
            updated: false,
        }
    }

    /// Whether this machine has apt.
    pub(crate) fn is_available(&self) -> bool {
        self.available
    }

    /// Whether the package is installed.
    pub(crate) fn installed(&self, package: &str) -> Result<bool> {
        if !self.available {
            return Ok(false);
        }
        let output = process::output(
            Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status}\\n", package]),
            "asking whether a package is installed",
        )?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().any(|line| line == "installed"))
    }

    /// The version that apt would install, or `None` where its lists do not know the package.
    pub(crate) fn candidate(&self, package: &str) -> Result<Option<String>> {
        if !self.available {
            return Ok(None);
        }
        let text = process::capture(
            Command::new("apt-cache")
                .args(["policy", package])
                .env("LC_ALL", "C"),
            "asking apt which version of a package it offers",
        )?;
        Ok(parse_candidate(&text))
    }

    /// Brings the package lists up to date, unless that was done before. Says whether it was done
    /// now.
    pub(crate) fn update_once(&mut self) -> Result<bool> {
        if self.updated || !self.available {
            return Ok(false);
        }
        self.updated = true;
        eprintln!(
            "setup: apt-get update (the package lists of this machine are missing or too old)"
        );
        let mut command = privileged("bringing the package lists up to date")?;
        let output = process::output(
            command.args(["update", "-q", "-o", LOCK_TIMEOUT]),
            "bringing the package lists up to date",
        )?;
        if !output.status.success() {
            // One source that is out of reach does not make the others' lists useless; what is
            // missing in the end is named by whoever needs it.
            eprintln!(
                "setup: apt-get update had trouble ({}): {}",
                output.status,
                process::said(&output)
            );
        }
        Ok(true)
    }

    /// Installs what is missing of these packages.
    pub(crate) fn install(&mut self, wanted: &[Wanted]) -> Result<()> {
        let names: Vec<&str> = wanted.iter().map(|one| one.package.as_str()).collect();
        let what = names.join(" ");
        if !self.available {
            bail!(
                "missing: {what} ({}). This machine has no apt-get; install what these Debian packages \
                 contain by its own means",
                reasons(wanted)
            );
        }
        for name in &names {
            if self.candidate(name)?.is_none()
                && (!self.update_once()? || self.candidate(name)?.is_none())
            {
                bail!(
                    "missing: package {name} ({}). apt does not know it; look at the sources that \
                     `apt-cache policy` lists",
                    reasons(wanted)
                );
            }
        }
        eprintln!("setup: installing {what}: {}", reasons(wanted));
        let purpose = format!("installing {what}");
        for attempt in 1.. {
            let mut command = privileged(&purpose)?;
            command
                .args([
                    "install",
                    "-y",
                    "-q",
                    "--no-install-recommends",
                    "-o",
                    LOCK_TIMEOUT,
                ])
                .args(&names);
            let output = process::output(&mut command, &purpose)?;
            if output.status.success() {
                break;
            }
            // Lists that are older than the archive name files that are no longer there.
            if attempt == 1 && self.update_once()? {
                continue;
            }
            bail!(
                "{purpose}: `{}` failed ({}): {}",
                process::shown(&command),
                output.status,
                process::said(&output)
            );
        }
        Ok(())
    }

    /// The names of all packages that begin with a text.
    pub(crate) fn names(source: Option<&Source>, prefix: &str) -> Result<Vec<String>> {
        let mut command = Command::new("apt-cache");
        if let Some(source) = source {
            command.args(&source.options);
        }
        let text = process::capture(
            command.args(["pkgnames", prefix]).env("LC_ALL", "C"),
            "asking apt for the names of packages",
        )?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Those of these packages that can be had, with the versions that apt would take.
    pub(crate) fn candidates(
        source: Option<&Source>,
        names: &[String],
    ) -> Result<Vec<(String, String)>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut command = Command::new("apt-cache");
        if let Some(source) = source {
            command.args(&source.options);
        }
        let text = process::capture(
            command.arg("policy").args(names).env("LC_ALL", "C"),
            "asking apt which versions of packages it offers",
        )?;
        let mut found = Vec::new();
        let mut package = None;
        for line in text.lines() {
            if !line.starts_with(' ') {
                package = line.strip_suffix(':').map(str::to_owned);
            } else if let Some(version) = line.trim().strip_prefix("Candidate:")
                && let Some(name) = package.take()
                && version.trim() != "(none)"
            {
                found.push((name, version.trim().to_owned()));
            }
        }
        Ok(found)
    }

    /// Fetches packages into the folder without installing them, and returns the files.
    pub(crate) fn download(&mut self, packages: &[String], folder: &Path) -> Result<Vec<PathBuf>> {
        self.download_from(None, packages, folder)
    }

    /// The same from another source than the machine's own.
    pub(crate) fn download_from(
        &mut self,
        source: Option<&Source>,
        packages: &[String],
        folder: &Path,
    ) -> Result<Vec<PathBuf>> {
        let what = packages.join(" ");
        let purpose = format!("fetching the packages {what}");
        if !self.available {
            bail!("{purpose}: this machine has no apt-get");
        }
        let before = debs(folder)?;
        loop {
            let mut command = Command::new("apt-get");
            if let Some(source) = source {
                command.args(&source.options);
            }
            command
                // A root that drops its privileges could not write into the caller's cache folder.
                .args(["download", "-q", "-o", "APT::Sandbox::User=root"])
                .args(packages)
                .current_dir(folder)
                .env("LC_ALL", "C");
            let output = process::output(&mut command, &purpose)?;
            if output.status.success() {
                return Ok(debs(folder)?.difference(&before).cloned().collect());
            }
            if !self.update_once()? {
                bail!(
                    "{purpose}: `{}` failed ({}): {}",
                    process::shown(&command),
                    output.status,
                    process::said(&output)
                );
            }
        }
    }
}

/// apt-get as root, asking no questions.
fn privileged(purpose: &str) -> Result<Command> {
    let environment = [
        ("DEBIAN_FRONTEND", OsStr::new("noninteractive")),
        ("LC_ALL", OsStr::new("C")),
    ];
    Privilege::find().command(OsStr::new("apt-get"), environment, purpose)
}

/// Unpacks a package file into the folder.
pub(crate) fn unpack(deb: &Path, root: &Path) -> Result<()> {
    process::capture(
        Command::new("dpkg-deb").arg("-x").arg(deb).arg(root),
        "unpacking a package",
    )
    .map(drop)
}

/// A field of a package file's own description.
pub(crate) fn field(deb: &Path, name: &str) -> Result<String> {
    process::capture(
        Command::new("dpkg-deb").arg("-f").arg(deb).arg(name),
        "reading a package's description",
    )
    .map(|text| text.trim().to_owned())
}

/// The package files in a folder.
fn debs(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let context = || format!("listing {}", folder.display());
    let mut found = BTreeSet::new();
    for entry in folder.read_dir().with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.extension() == Some(OsStr::new("deb")) {
            found.insert(path);
        }
    }
    Ok(found)
}

/// The reasons of all these packages, each once.
fn reasons(wanted: &[Wanted]) -> String {
    let mut seen: Vec<&str> = Vec::new();
    for one in wanted {
        if !seen.contains(&one.why.as_str()) {
            seen.push(&one.why);
        }
    }
    seen.join("; ")
}

/// The candidate version in the output of `apt-cache policy PACKAGE`.
fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate:"))?
        .trim();
    (version != "(none)" && !version.is_empty()).then(|| version.to_owned())
}

/// The packages in a `Depends` field, without versions and architectures; of alternatives the
/// first.
pub(crate) fn dependencies(field: &str) -> Vec<String> {
    field
        .split(',')
        .filter_map(|alternatives| {
            let first = alternatives.split('|').next()?.trim();
            let name = first.split([' ', '(', ':']).next()?.trim();
            (!name.is_empty()).then(|| name.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_candidate_is_read() {
        let text = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n";
        assert_eq!(
            parse_candidate(text).as_deref(),
            Some("1.96.0+dfsg1-1~deb12u2")
        );
    }

    #[test]
    fn a_package_without_candidate_is_unknown() {
        assert_eq!(
            parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"),
            None
        );
        assert_eq!(parse_candidate(""), None);
    }

    #[test]
    fn dependencies_lose_versions_architectures_and_alternatives() {
        let field = "lsb-base (>= 3.2-14), redis-tools (= 5:7.0.15-1), libsystemd0 | libelogind0, libc6:any";
        assert_eq!(
            dependencies(field),
            ["lsb-base", "redis-tools", "libsystemd0", "libc6"]
        );
        assert!(dependencies("").is_empty());
    }

    #[test]
    fn a_reason_is_given_once() {
        let wanted = [
            Wanted::new("a", "one"),
            Wanted::new("b", "one"),
            Wanted::new("c", "two"),
        ];
        assert_eq!(reasons(&wanted), "one; two");
    }
}
