//! Removes what a run that was killed left behind: namespaces, folders and daemons whose maker is dead.

use std::path::Path;

use anyhow::Result;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{DEMO_LAB, PREFIX, injector::serves, netns::Netns};

/// Does it.
pub fn sweep() -> Result<()> {
    if let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) {
        for entry in entries.flatten() {
            if is_orphan(&entry.file_name().to_string_lossy()) {
                end_daemon(&entry.path());
                eprintln!("removing {} of a killed run", entry.path().display());
                std::fs::remove_dir_all(entry.path())?;
            }
        }
    }
    if let Ok(entries) = std::fs::read_dir("/run/netns") {
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_orphan(&name) {
                eprintln!("deleting namespace {name} of a killed run");
                end_processes(&entry.path());
                Netns::named(&name).delete()?;
            }
        }
    }
    Ok(())
}

/// Whether a name says that we made it, and its maker is dead.
fn is_orphan(name: &str) -> bool {
    let demo = format!("injector-{DEMO_LAB}");
    name.strip_prefix(PREFIX)
        .or_else(|| name.strip_prefix(&demo))
        .and_then(|rest| rest.split('-').next())
        .and_then(|pid| pid.parse::<u32>().ok())
        .is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

fn end_daemon(state: &Path) {
    let pid = std::fs::read_to_string(state.join("daemon.lock"))
        .ok()
        .and_then(|text| {
            text.split(|c: char| !c.is_ascii_digit())
                .find_map(|digits| digits.parse().ok())
        });
    if let Some(pid) = pid.map(Pid::from_raw)
        && serves(pid, state)
    {
        let _sent = kill(pid, Signal::SIGKILL);
    }
}

/// Kills the processes that live in a namespace of ours.
fn end_processes(namespace: &Path) {
    use std::os::unix::fs::MetadataExt;
    let Ok(ours) = std::fs::metadata(namespace) else {
        return;
    };
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return;
    };
    for process in processes.flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let theirs = std::fs::metadata(process.path().join("ns/net"));
        if theirs.is_ok_and(|theirs| (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino())) {
            let _sent = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
