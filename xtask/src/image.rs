//! The initial RAM disk of a virtual machine: programs with the libraries that they need, under the paths that
//! they have on the host, and what they are to do.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// What a path in the image is.
#[derive(Debug)]
enum Node {
    Folder,
    Link(PathBuf),
    File { bytes: Vec<u8>, mode: u32 },
}

/// An image under construction.
#[derive(Debug, Default)]
pub(crate) struct Image {
    nodes: BTreeMap<PathBuf, Node>,
}

impl Image {
    /// An image with the folders that a system expects.
    pub(crate) fn new() -> Self {
        let mut image = Self::default();
        for folder in ["proc", "sys", "dev", "tmp", "run", "root", "etc", "var/lib"] {
            image.folder(Path::new(folder));
        }
        // As on every Debian machine, and as the programs' own paths ask for.
        for (link, target) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/sbin"),
            ("lib", "usr/lib"),
            ("lib64", "usr/lib64"),
        ] {
            image.folder(Path::new(target));
            image
                .nodes
                .insert(PathBuf::from(link), Node::Link(PathBuf::from(target)));
        }
        image
    }

    fn folder(&mut self, path: &Path) {
        for folder in path.ancestors() {
            if !folder.as_os_str().is_empty() {
                self.nodes.entry(folder.to_owned()).or_insert(Node::Folder);
            }
        }
    }

    /// Puts bytes at an absolute path.
    pub(crate) fn file(&mut self, path: &Path, bytes: Vec<u8>, mode: u32) {
        let inside = inside(path);
        if let Some(parent) = inside.parent() {
            self.folder(parent);
        }
        self.nodes.insert(inside, Node::File { bytes, mode });
    }

    /// Makes an absolute path a link to another.
    pub(crate) fn link(&mut self, path: &Path, target: &Path) {
        self.nodes
            .insert(inside(path), Node::Link(target.to_owned()));
    }

    /// Makes an empty folder, unless something is there.
    pub(crate) fn empty(&mut self, path: &Path) {
        self.folder(&inside(path));
    }

    /// Copies a file of the host to the same path.
    pub(crate) fn copy(&mut self, path: &Path) -> Result<()> {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        self.file(path, bytes, 0o755);
        Ok(())
    }

    /// Copies a program of the host to the same path, without what only a debugger needs, and the libraries that
    /// it asks for. `libraries` is where else than in the usual places they are.
    pub(crate) fn program(&mut self, path: &Path, libraries: &std::ffi::OsStr) -> Result<()> {
        let notes = crate::workspace::notes();
        fs::create_dir_all(&notes).with_context(|| format!("making {}", notes.display()))?;
        let slim = notes.join(format!("vm-{}.stripped", std::process::id()));
        let stripped = process::output(
            Command::new("strip")
                .arg("--strip-debug")
                .arg("-o")
                .arg(&slim)
                .arg(path),
            "taking debugging information out of a program",
        );
        match stripped {
            Ok(output) if output.status.success() => {
                let bytes =
                    fs::read(&slim).with_context(|| format!("reading {}", slim.display()))?;
                self.file(path, bytes, 0o755);
                // It is written anew each time.
                let _ = fs::remove_file(&slim);
            }
            // A script, or a machine without binutils.
            _ => self.copy(path)?,
        }
        let output = process::output(
            Command::new("ldd")
                .arg(path)
                .env("LD_LIBRARY_PATH", libraries)
                .env("LC_ALL", "C"),
            "looking for the libraries of a program",
        )?;
        for library in libraries_of(&String::from_utf8_lossy(&output.stdout)) {
            if !self.nodes.contains_key(&inside(&library)) {
                self.copy(&library)?;
            }
        }
        Ok(())
    }

    /// Copies a folder of the host to the same path.
    pub(crate) fn tree(&mut self, folder: &Path) -> Result<()> {
        let context = || format!("listing {}", folder.display());
        for entry in fs::read_dir(folder).with_context(context)? {
            let entry = entry.with_context(context)?;
            let path = entry.path();
            let kind = entry.file_type().with_context(context)?;
            if kind.is_dir() {
                self.folder(&inside(&path));
                self.tree(&path)?;
            } else if kind.is_symlink() {
                let target =
                    fs::read_link(&path).with_context(|| format!("reading {}", path.display()))?;
                if let Some(parent) = inside(&path).parent() {
                    self.folder(parent);
                }
                self.nodes.insert(inside(&path), Node::Link(target));
            } else {
                self.copy(&path)?;
            }
        }
        Ok(())
    }

    /// Writes the image as an uncompressed cpio archive.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let file = fs::File::create(path).with_context(|| format!("making {}", path.display()))?;
        let mut out = std::io::BufWriter::new(file);
        let context = || format!("writing {}", path.display());
        for (number, (name, node)) in (1_u32..).zip(&self.nodes) {
            let target;
            let (mode, bytes): (u32, &[u8]) = match node {
                Node::Folder => (libc_mode::FOLDER | 0o755, &[]),
                Node::Link(link) => {
                    target = link.as_os_str().to_string_lossy().into_owned();
                    (libc_mode::LINK | 0o777, target.as_bytes())
                }
                Node::File { bytes, mode } => (libc_mode::FILE | mode, bytes),
            };
            let size = u32::try_from(bytes.len()).with_context(context)?;
            let mut writer = cpio::newc::Builder::new(&name.to_string_lossy())
                .ino(number)
                .mode(mode)
                .nlink(1)
                .write(&mut out, size);
            writer.write_all(bytes).with_context(context)?;
            writer.finish().with_context(context)?;
        }
        cpio::newc::trailer(&mut out).with_context(context)?;
        out.flush().with_context(context)
    }
}

/// Kinds of files in a mode (include/uapi/linux/stat.h).
mod libc_mode {
    pub(super) const FOLDER: u32 = 0o040_000;
    pub(super) const FILE: u32 = 0o100_000;
    pub(super) const LINK: u32 = 0o120_000;
}

/// The path in the archive: relative, and below `usr` where the host's root links there.
fn inside(path: &Path) -> PathBuf {
    let path = path.strip_prefix("/").unwrap_or(path);
    for merged in ["bin", "sbin", "lib", "lib64"] {
        if path.starts_with(merged) {
            return Path::new("usr").join(path);
        }
    }
    path.to_owned()
}

/// The paths that ldd found.
fn libraries_of(ldd: &str) -> Vec<PathBuf> {
    ldd.lines()
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with('/'))
                .map(PathBuf::from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)
\tlibssl.so.3 => /lib/x86_64-linux-gnu/libssl.so.3 (0x00007f)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f)
";
        assert_eq!(
            libraries_of(text),
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libssl.so.3"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert!(libraries_of("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn paths_are_below_usr() {
        assert_eq!(inside(Path::new("/bin/ls")), Path::new("usr/bin/ls"));
        assert_eq!(inside(Path::new("/lib/x/y")), Path::new("usr/lib/x/y"));
        assert_eq!(inside(Path::new("/srv/lib/y")), Path::new("srv/lib/y"));
    }
}
