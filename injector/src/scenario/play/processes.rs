//! Processes that stand still, go on or end: services, processes by id or name, units of systemd, control groups.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::{World, checks, services::Services};
use crate::scenario::{file::Processes, plan};

/// How long processes may take to stand still.
const STILL: Duration = Duration::from_secs(10);

/// A process, told from a later one of the same number by when it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct Process {
    /// Its id.
    pub pid: u32,
    /// When it was started, in clock ticks since the boot (`/proc/PID/stat`, field 22).
    pub started: u64,
}

/// A descriptor of a process.
fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: the call takes two integers and gives a descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else has a copy.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn pidfd_send_signal(process: &OwnedFd, signal: Signal) -> io::Result<()> {
    // SAFETY: a descriptor that is open, a number, no siginfo and no flags.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// "No such process" is something that is not found.
fn or_not_found(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ESRCH) => io::ErrorKind::NotFound.into(),
        _ => error,
    }
}

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stat {
    name: String,
    state: char,
    parent: u32,
    session: u32,
    started: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// `pid (name) state ppid pgrp session …`; the name may hold anything, parentheses and spaces too (proc(5)).
    fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.rsplit_once(')')?;
        let name = before.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = after.split_whitespace().collect();
        Some(Self {
            name,
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            session: fields.get(3)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    fn process(&self, pid: u32) -> Process {
        Process {
            pid,
            started: self.started,
        }
    }
}

impl Process {
    /// The process that has this id now.
    #[must_use]
    pub(super) fn of(pid: u32) -> Option<Self> {
        Stat::read(pid).map(|stat| stat.process(pid))
    }

    /// Whether it stands still.
    #[cfg(test)]
    #[must_use]
    pub(super) fn is_stopped(&self) -> bool {
        self.stat()
            .is_some_and(|stat| matches!(stat.state, 'T' | 't'))
    }

    fn stat(&self) -> Option<Stat> {
        Stat::read(self.pid).filter(|stat| stat.started == self.started)
    }

    /// A descriptor of it, which stays its own whatever becomes of its number.
    fn open(&self) -> io::Result<OwnedFd> {
        let fd = pidfd_open(self.pid).map_err(or_not_found)?;
        // Looked at once it cannot be somebody else any more.
        if self.stat().is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(fd)
    }

    /// Sends it a signal. One that has ended is not found.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        pidfd_send_signal(&self.open()?, signal).map_err(or_not_found)
    }

    /// Kills the process group that it leads, if it still lives.
    pub(super) fn kill_group(&self) -> io::Result<()> {
        let _fd = match self.open() {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let pid = i32::try_from(self.pid).map_err(io::Error::other)?;
        match nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// All processes there are.
fn all() -> BTreeMap<u32, Stat> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| Some((pid, Stat::read(pid)?)))
        .collect()
}

/// These processes, their descendants, and the sessions that they lead.
fn family(all: &BTreeMap<u32, Stat>, roots: &BTreeSet<u32>) -> BTreeSet<u32> {
    let mut found = roots.clone();
    loop {
        let before = found.len();
        for (pid, stat) in all {
            if found.contains(&stat.parent) || found.contains(&stat.session) {
                found.insert(*pid);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// Processes that were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    words: String,
    /// They are all there is in this control group.
    group: Option<PathBuf>,
    /// By id, where they are looked for again as they make new ones.
    roots: BTreeSet<u32>,
    processes: BTreeSet<Process>,
}

impl Found {
    /// Whether a process is among them.
    #[must_use]
    pub(super) fn has(&self, pid: u32) -> bool {
        self.processes.iter().any(|process| process.pid == pid)
    }
}

/// Processes that stand still because of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Paused {
    found: Found,
    stopped: BTreeSet<Process>,
}

impl Paused {
    /// How many.
    #[must_use]
    pub(super) fn count(&self) -> usize {
        self.stopped.len().max(self.found.processes.len())
    }

    /// Whether they are of these.
    #[must_use]
    pub(super) fn is_of(&self, found: &Found) -> bool {
        self.found.group == found.group && self.found.roots == found.roots
    }
}

/// Processes that must not be touched, and why.
fn untouchable(world: &World, all: &BTreeMap<u32, Stat>) -> BTreeMap<u32, &'static str> {
    let mut found = BTreeMap::from([
        (1, "is the host's first process"),
        (2, "is the kernel's"),
        (world.keeper.pid(), "cleans up after this run"),
        (world.daemon, "is the injector's daemon"),
    ]);
    for (pid, stat) in all {
        if stat.parent == 2 {
            found.insert(*pid, "is the kernel's");
        }
    }
    let mut pid = std::process::id();
    found.insert(pid, "is this run");
    while let Some(stat) = all.get(&pid) {
        if stat.parent < 2 {
            break;
        }
        pid = stat.parent;
        found
            .entry(pid)
            .or_insert("is what this run was started from");
    }
    found
}

/// Finds processes. Those that this run and the injector consist of cannot be meant.
pub(super) async fn find(
    world: &World,
    services: &Services,
    which: &Processes,
) -> Result<Found, String> {
    let words = plan::which(which);
    let failed = |why: &str| Err(format!("finding {words}: {why}"));
    let all = all();
    let mut group = None;
    let roots: BTreeSet<u32> = if let Some(service) = &which.service {
        match services.pid(service) {
            Some(pid) => BTreeSet::from([pid]),
            None => return failed("it is not running"),
        }
    } else if let Some(asked) = &which.asked {
        let named = checks::name(world, asked)
            .await
            .map_err(|why| format!("finding {words}: {why}"))?;
        let node = world.hosts().find(&named).unwrap_or_default();
        let found: BTreeSet<u32> = match (services.pid(&named), named.parse()) {
            (Some(pid), _) | (None, Ok(pid)) => BTreeSet::from([pid]),
            (None, Err(_)) => services.of_node(&node).into_iter().collect(),
        };
        if found.is_empty() {
            return failed(&format!(
                "'{}' named '{named}', which is neither a service that runs, nor a node with one, nor a process id",
                asked.command
            ));
        }
        found
    } else if let Some(pid) = which.pid {
        BTreeSet::from([pid])
    } else if let Some(file) = &which.pid_file {
        let text = fs::read_to_string(file)
            .map_err(|error| format!("finding {words}: reading {file}: {error}"))?;
        // PostgreSQL's has more lines.
        match text.lines().next().unwrap_or_default().trim().parse() {
            Ok(pid) => BTreeSet::from([pid]),
            Err(_) => return failed("its first line is no process id"),
        }
    } else if let Some(name) = &which.process {
        // The kernel cuts names off after 15 bytes.
        let name: String = name.chars().take(15).collect();
        all.iter()
            .filter(|(_, stat)| stat.name == name && stat.state != 'Z')
            .map(|(pid, _)| *pid)
            .collect()
    } else {
        let path = match (&which.unit, &which.cgroup) {
            (Some(unit), _) => unit_group(unit).map_err(|why| format!("finding {words}: {why}"))?,
            (None, Some(path)) => path.clone(),
            (None, None) => return failed("nothing says which"),
        };
        let path = group_path(&path).map_err(|why| format!("finding {words}: {why}"))?;
        let members = members(&path)
            .map_err(|error| format!("finding {words}: reading {}: {error}", path.display()))?;
        group = Some(path);
        members
    };
    let family = if group.is_some() {
        roots.clone()
    } else {
        family(&all, &roots)
    };
    let processes: BTreeSet<Process> = family
        .iter()
        .filter_map(|pid| Some(all.get(pid)?.process(*pid)))
        .collect();
    if processes.is_empty() {
        return failed("there is none");
    }
    let untouchable = untouchable(world, &all);
    if let Some((pid, why)) = family.iter().find_map(|pid| untouchable.get_key_value(pid)) {
        return failed(&format!("process {pid} among them {why}"));
    }
    Ok(Found {
        words,
        group,
        roots,
        processes,
    })
}

/// The control group of a unit.
fn unit_group(unit: &str) -> Result<String, String> {
    let asked = Command::new("systemctl")
        .args(["show", "--property=ControlGroup", "--value", "--", unit])
        .output()
        .map_err(|error| format!("running systemctl: {error}"))?;
    let path = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    if !asked.status.success() {
        return Err(format!(
            "systemctl: {}",
            String::from_utf8_lossy(&asked.stderr).trim()
        ));
    }
    if path.is_empty() || path == "/" {
        return Err("it has no control group: it is not running".to_owned());
    }
    Ok(path)
}

/// The directory of a control group, in the hierarchy of version 2.
fn group_path(path: &str) -> Result<PathBuf, String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| format!("reading /proc/self/mountinfo: {error}"))?;
    let root = mounts
        .lines()
        .find_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            (after.split(' ').next()? == "cgroup2").then(|| before.split(' ').nth(4))?
        })
        .ok_or("this host has no control groups of version 2 mounted")?;
    let inside = Path::new(path.trim_start_matches('/'));
    let plain = inside
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain || inside.as_os_str().is_empty() {
        return Err(format!(
            "'{path}' is no path of a control group below the root"
        ));
    }
    Ok(Path::new(root).join(inside))
}

/// The processes of a control group and of those below it.
fn members(group: &Path) -> io::Result<BTreeSet<u32>> {
    let mut found: BTreeSet<u32> = fs::read_to_string(group.join("cgroup.procs"))?
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for entry in fs::read_dir(group)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // One that goes away meanwhile has no members.
            found.extend(members(&entry.path()).unwrap_or_default());
        }
    }
    Ok(found)
}

/// Lets processes stand still, and waits until they do.
pub(super) async fn pause(
    world: &World,
    services: &Services,
    which: &Processes,
) -> Result<Paused, String> {
    let found = find(world, services, which).await?;
    let failed = |error: &dyn std::fmt::Display| format!("pausing {}: {error}", found.words);
    if let Some(group) = &found.group {
        world
            .keeper
            .freezing(group)
            .map_err(|error| failed(&error))?;
        freeze(group).map_err(|error| failed(&error))?;
        return Ok(Paused {
            found,
            stopped: BTreeSet::new(),
        });
    }
    let mut paused = Paused {
        found: found.clone(),
        stopped: BTreeSet::new(),
    };
    let result = stop(world, &mut paused);
    if let Err(error) = result {
        let problem = failed(&error);
        // Half of them standing still is not what was asked for.
        let undone = resume(world, &paused);
        return Err(match undone {
            Ok(()) => problem,
            Err(more) => format!("{problem}; {more}"),
        });
    }
    Ok(paused)
}

fn stop(world: &World, paused: &mut Paused) -> io::Result<()> {
    let deadline = Instant::now() + STILL;
    loop {
        let all = all();
        let mut moving = 0;
        for pid in family(&all, &paused.found.roots) {
            let Some(stat) = all.get(&pid) else { continue };
            let process = stat.process(pid);
            if stat.state == 'Z' || stat.state == 'X' {
                continue;
            }
            let stopped = matches!(stat.state, 'T' | 't');
            if paused.stopped.contains(&process) {
                moving += usize::from(!stopped);
                continue;
            }
            if stopped {
                // By somebody else: they will let it go on.
                continue;
            }
            moving += 1;
            world.keeper.stopping(process)?;
            paused.stopped.insert(process);
            match process.signal(Signal::SIGSTOP) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if moving == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "{moving} processes do not stand still after {} s",
                STILL.as_secs()
            )));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Freezes a control group, and waits until all of it stands still (kernel, admin-guide/cgroup-v2: `cgroup.freeze`,
/// `frozen` of `cgroup.events`).
fn freeze(group: &Path) -> io::Result<()> {
    fs::write(group.join("cgroup.freeze"), "1")?;
    let deadline = Instant::now() + STILL;
    loop {
        let events = fs::read_to_string(group.join("cgroup.events"))?;
        if events.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        if Instant::now() > deadline {
            thaw(group)?;
            return Err(io::Error::other(format!(
                "not all of it is frozen after {} s",
                STILL.as_secs()
            )));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Thaws a control group. One that has gone has nothing to thaw.
pub(super) fn thaw(group: &Path) -> io::Result<()> {
    match fs::write(group.join("cgroup.freeze"), "0") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Lets processes go on that stand still because of us.
pub(super) fn resume(world: &World, paused: &Paused) -> Result<(), String> {
    let failed =
        |error: &dyn std::fmt::Display| format!("resuming {}: {error}", paused.found.words);
    if let Some(group) = &paused.found.group {
        thaw(group).map_err(|error| failed(&error))?;
        return world.keeper.thawed(group).map_err(|error| failed(&error));
    }
    let mut first = Ok(());
    for process in &paused.stopped {
        let gone_on = match process.signal(Signal::SIGCONT) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        let done = gone_on.and_then(|()| world.keeper.continued(*process));
        if first.is_ok() {
            first = done.map_err(|error| failed(&error));
        }
    }
    first
}

/// Sends a signal, by its name without SIG, and says to how many processes.
pub(super) fn kill(found: &Found, signal: &str) -> Result<usize, String> {
    let name = format!("SIG{signal}");
    let signal: Signal = name.parse().map_err(|_| format!("{name} is no signal"))?;
    let mut count = 0;
    for process in &found.processes {
        match process.signal(signal) {
            Ok(()) => count += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(format!(
                    "sending {name} to process {} of {}: {error}",
                    process.pid, found.words
                ));
            }
        }
    }
    if count == 0 {
        return Err(format!("{} had ended before it got {name}", found.words));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_anything() {
        let fields = "S 12 34 56 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000";
        let stat = Stat::parse(&format!("77 (a) b (c) {fields}\n")).unwrap();
        assert_eq!(stat.name, "a) b (c");
        assert_eq!(
            (stat.state, stat.parent, stat.session, stat.started),
            ('S', 12, 56, 987_654)
        );
        assert!(Stat::parse("77 (a").is_none());
        assert!(Stat::parse("77 (a) S 1").is_none());
    }

    #[test]
    fn a_family_is_descendants_and_sessions() {
        let stat = |parent, session| Stat {
            name: "x".into(),
            state: 'S',
            parent,
            session,
            started: 1,
        };
        let all = BTreeMap::from([
            (10, stat(1, 10)),
            (11, stat(10, 10)),
            // In a session of its own.
            (12, stat(11, 12)),
            // Its parent has gone; it is still in the session.
            (13, stat(1, 10)),
            (14, stat(1, 14)),
        ]);
        assert_eq!(
            family(&all, &BTreeSet::from([10])),
            BTreeSet::from([10, 11, 12, 13])
        );
        assert_eq!(family(&all, &BTreeSet::from([14])), BTreeSet::from([14]));
    }

    #[test]
    fn ourselves_we_know() {
        let process = Process::of(std::process::id()).unwrap();
        assert!(process.open().is_ok());
        let other = Process {
            started: process.started + 1,
            ..process
        };
        assert_eq!(
            other.signal(Signal::SIGKILL).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn paths_of_groups_stay_in_their_hierarchy() {
        for path in ["/", "", "a/../..", "/../x"] {
            assert!(group_path(path).is_err(), "{path}");
        }
    }
}
