//! Where the real services are: Debian's packages, unpacked below the folder that `INJECTOR_SERVICES`
//! names, never installed.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::netns::Netns;

/// The folder with `usr/bin/etcd` and the like.
pub fn root() -> Result<PathBuf> {
    std::env::var_os("INJECTOR_SERVICES")
        .map(PathBuf::from)
        .context("INJECTOR_SERVICES does not name the folder with the unpacked services")
}

fn binary(name: &str) -> Result<PathBuf> {
    let path = root()?.join("usr/bin").join(name);
    if path.is_file() {
        Ok(path)
    } else {
        bail!("{} is not there", path.display())
    }
}

/// The etcd server.
pub fn etcd() -> Result<PathBuf> {
    binary("etcd")
}

/// The Redis server.
pub fn redis_server() -> Result<PathBuf> {
    binary("redis-server")
}

/// iperf3, client and server.
pub fn iperf3() -> Result<PathBuf> {
    binary("iperf3")
}

/// Puts the unpacked programs, and the libraries beside them, where a command and what it starts find them.
pub fn offer(command: &mut Command) -> Result<()> {
    let root = root()?;
    let mut folders = vec![root.join("usr/bin"), root.join("usr/sbin")];
    if let Ok(versions) = std::fs::read_dir(root.join("usr/lib/postgresql")) {
        folders.extend(versions.flatten().map(|entry| entry.path().join("bin")));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    command
        .env("PATH", std::env::join_paths(folders)?)
        .env("LD_LIBRARY_PATH", std::env::join_paths(libraries(&root))?);
    Ok(())
}

/// The folders with shared libraries that were unpacked.
fn libraries(root: &Path) -> Vec<PathBuf> {
    let library = root.join("usr/lib");
    let mut folders = vec![library.clone()];
    if let Ok(entries) = std::fs::read_dir(&library) {
        folders.extend(
            entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_dir()),
        );
    }
    folders
}

/// A service's program as a command in a namespace, with the libraries that were unpacked beside it.
pub fn command(ns: &Netns, program: &Path) -> Result<Command> {
    let mut command = ns.command(program)?;
    command.env(
        "LD_LIBRARY_PATH",
        std::env::join_paths(libraries(&root()?))?,
    );
    Ok(command)
}

/// A command's file, looked for on the path.
#[must_use]
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}
