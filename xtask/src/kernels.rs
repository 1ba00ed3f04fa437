//! Debian's kernels for virtual machines: found, fetched and unpacked into the cache, never installed.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::packages::{self, Apt, Source};
use crate::process;

/// The suite that has newer kernels than the machine's own.
const BACKPORTS: &str = "trixie-backports";

/// Kernel modules that tests need where they are not built in, each behind what it depends on, with
/// parameters. What a kernel does not have is left out.
const MODULES: [(&str, &str); 24] = [
    ("llc", ""),
    ("stp", ""),
    ("garp", ""),
    ("mrp", ""),
    ("8021q", ""),
    ("bridge", ""),
    ("cls_bpf", ""),
    ("cls_u32", ""),
    ("act_mirred", ""),
    ("sch_ingress", ""),
    ("sch_fq", ""),
    ("sch_fq_codel", ""),
    ("sch_netem", ""),
    ("sch_prio", ""),
    ("sch_htb", ""),
    ("sch_tbf", ""),
    ("veth", ""),
    // Without devices of its own: a test compares the host before and after.
    ("ifb", "numifbs=0"),
    ("dummy", "numdummies=0"),
    ("macvlan", ""),
    ("tls", ""),
    ("bonding", "max_bonds=0"),
    ("tun", ""),
    ("nfnetlink", ""),
];

/// A line of kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    /// The newest that Debian has.
    Newest,
    /// The newest of `X.Y`.
    Of(String),
}

impl std::str::FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_number =
            |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        match text.split_once('.') {
            _ if text == "newest" => Ok(Self::Newest),
            Some((major, minor)) if is_number(major) && is_number(minor) => {
                Ok(Self::Of(text.to_owned()))
            }
            _ => Err("a line of kernels is `newest` or two numbers, such as 6.1".to_owned()),
        }
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Newest => f.write_str("newest"),
            Self::Of(line) => f.write_str(line),
        }
    }
}

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// The line that was asked for.
    pub(crate) line: Line,
    /// Its version, as the package has it.
    pub(crate) version: String,
    /// The kernel itself.
    pub(crate) image: PathBuf,
    /// Its modules that are of use, uncompressed, in the order in which they are to be loaded, with
    /// parameters.
    pub(crate) modules: Vec<(PathBuf, String)>,
}

/// What is in the folder of a kernel.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    version: String,
    modules: Vec<(String, String)>,
    /// The list of modules at the time.
    wanted: Vec<String>,
}

const CONTENTS: &str = "contents.json";

/// Makes sure that the newest kernel of a line is unpacked in the cache.
pub(crate) fn ensure(cache: &Cache, apt: &mut Apt, line: &Line) -> Result<Kernel> {
    let folder = cache.folder().join("kernels");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let (source, package) = find(apt, &folder, line)?;
    let root = folder.join(&package.name);
    if let Some(kernel) = unpacked(&root, line, &package.version) {
        return Ok(kernel);
    }
    eprintln!(
        "setup: unpacking kernel {} for virtual machines (nothing is installed)",
        package.name
    );
    let partial = folder.join("partial");
    remove(&partial)?;
    let debs = partial.join("packages");
    let tree = partial.join("tree");
    fs::create_dir_all(&debs).with_context(|| format!("making {}", debs.display()))?;
    let mut next = vec![package.name.clone()];
    let mut fetched = Vec::new();
    // Newer kernels are split: the image's package depends on one with the binary and one with modules.
    while !next.is_empty() {
        let files = apt.download_from(source.as_ref(), &next, &debs)?;
        fetched.append(&mut next);
        for deb in files {
            for name in packages::dependencies(&packages::field(&deb, "Depends")?) {
                let is_part = ["linux-binary-", "linux-modules-"]
                    .iter()
                    .any(|part| name.starts_with(part));
                if is_part && !fetched.contains(&name) && !next.contains(&name) {
                    next.push(name);
                }
            }
            packages::unpack(&deb, &tree)?;
        }
    }
    let keep = partial.join("keep");
    fs::create_dir_all(&keep).with_context(|| format!("making {}", keep.display()))?;
    let image = find_file(&tree, &|name| name.starts_with("vmlinuz"))?
        .with_context(|| format!("package {} brought no kernel (vmlinuz)", package.name))?;
    fs::copy(&image, keep.join("vmlinuz")).context("keeping the kernel")?;
    let mut modules = Vec::new();
    for (name, parameters) in MODULES {
        if let Some(file) = find_file(&tree, &|file| {
            file.strip_prefix(name)
                .is_some_and(|rest| rest == ".ko" || rest == ".ko.xz")
        })? {
            let kept = format!("{name}.ko");
            keep_module(&file, &keep.join(&kept))?;
            modules.push((kept, parameters.to_owned()));
        }
    }
    let contents = Contents {
        version: package.version.clone(),
        modules,
        wanted: wanted(),
    };
    let path = keep.join(CONTENTS);
    fs::write(&path, serde_json::to_vec_pretty(&contents)?)
        .with_context(|| format!("writing {}", path.display()))?;
    remove(&root)?;
    fs::rename(&keep, &root).with_context(|| format!("making {}", root.display()))?;
    remove(&partial)?;
    unpacked(&root, line, &package.version)
        .with_context(|| format!("{} is not as it was just written", root.display()))
}

fn wanted() -> Vec<String> {
    MODULES
        .iter()
        .map(|(name, parameters)| format!("{name} {parameters}"))
        .collect()
}

/// The kernel in a folder, if it is this version and complete.
fn unpacked(root: &Path, line: &Line, version: &str) -> Option<Kernel> {
    let contents: Contents = serde_json::from_slice(&fs::read(root.join(CONTENTS)).ok()?).ok()?;
    (contents.version == version && contents.wanted == wanted()).then(|| Kernel {
        line: line.clone(),
        version: contents.version,
        image: root.join("vmlinuz"),
        modules: contents
            .modules
            .into_iter()
            .map(|(name, parameters)| (root.join(name), parameters))
            .collect(),
    })
}

/// A package and its version.
struct Package {
    name: String,
    version: String,
}

/// The newest package of a line: among the machine's own, else among the backports.
fn find(apt: &mut Apt, folder: &Path, line: &Line) -> Result<(Option<Source>, Package)> {
    if !apt.is_available() {
        bail!(
            "missing: a kernel for virtual machines. They are unpacked from Debian packages, and this machine \
             has no apt-get"
        );
    }
    if let Line::Of(_) = line {
        if let Some(package) = newest(None, line)? {
            return Ok((None, package));
        }
        if apt.update_once()?
            && let Some(package) = newest(None, line)?
        {
            return Ok((None, package));
        }
    }
    let source = Source::beside(&folder.join("apt"), BACKPORTS)?;
    match newest(Some(&source), line)? {
        Some(package) => Ok((Some(source), package)),
        None => bail!(
            "missing: Debian has no cloud kernel of line {line} any more (looked in {BACKPORTS} too)"
        ),
    }
}

fn newest(source: Option<&Source>, line: &Line) -> Result<Option<Package>> {
    let names: Vec<String> = Apt::names(source, "linux-image-")?
        .into_iter()
        .filter(|name| is_of_line(name, line))
        .collect();
    let mut best: Option<Package> = None;
    for (name, version) in Apt::candidates(source, &names)? {
        let newer = match &best {
            None => true,
            Some(best) => packages::compare(&version, &best.version)? == Ordering::Greater,
        };
        if newer {
            best = Some(Package { name, version });
        }
    }
    Ok(best)
}

/// Whether this is a kernel for virtual machines, of that line.
fn is_of_line(package: &str, line: &Line) -> bool {
    let Some(version) = package.strip_prefix("linux-image-") else {
        return false;
    };
    let version = version.strip_suffix("-unsigned").unwrap_or(version);
    let Some(version) = version.strip_suffix("-cloud-amd64") else {
        return false;
    };
    match line {
        Line::Newest => version.starts_with(|first: char| first.is_ascii_digit()),
        Line::Of(line) => version
            .strip_prefix(line.as_str())
            .is_some_and(|rest| rest.starts_with('.')),
    }
}

/// The first file below a folder whose name is accepted.
fn find_file(folder: &Path, accepted: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    let context = || format!("listing {}", folder.display());
    for entry in fs::read_dir(folder).with_context(context)? {
        let entry = entry.with_context(context)?;
        let kind = entry.file_type().with_context(context)?;
        let path = entry.path();
        if kind.is_dir() {
            if let Some(found) = find_file(&path, accepted)? {
                return Ok(Some(found));
            }
        } else if kind.is_file() && accepted(&entry.file_name().to_string_lossy()) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Copies a module, uncompressed.
fn keep_module(from: &Path, to: &Path) -> Result<()> {
    let bytes = if from.extension() == Some(OsStr::new("xz")) {
        let output = process::output(
            Command::new("xz").arg("-dc").arg(from),
            "unpacking a kernel module",
        )?;
        if !output.status.success() {
            bail!("unpacking {}: {}", from.display(), process::said(&output));
        }
        output.stdout
    } else {
        fs::read(from).with_context(|| format!("reading {}", from.display()))?
    };
    fs::write(to, bytes).with_context(|| format!("writing {}", to.display()))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_a_line() {
        let of = |line: &str| line.parse::<Line>().unwrap();
        for (package, line, expected) in [
            ("linux-image-6.1.0-56-cloud-amd64-unsigned", "6.1", true),
            ("linux-image-6.1.0-56-cloud-amd64", "6.1", true),
            ("linux-image-6.12.117+deb12-cloud-amd64", "6.1", false),
            ("linux-image-6.12.117+deb12-cloud-amd64", "6.12", true),
            ("linux-image-6.12.117+deb12-amd64", "6.12", false),
            ("linux-image-7.3.4+deb13-cloud-amd64", "newest", true),
            ("linux-image-cloud-amd64", "newest", false),
            (
                "linux-image-6.12.117+deb12-cloud-amd64-dbg",
                "newest",
                false,
            ),
        ] {
            assert_eq!(is_of_line(package, &of(line)), expected, "{package} {line}");
        }
        assert!("6".parse::<Line>().is_err());
        assert!("old".parse::<Line>().is_err());
    }
}
