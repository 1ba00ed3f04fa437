//! The keeper: a process that undoes what a run has done to the host, also if the run is killed.
//!
//! Rules live only as long as the run's connection to the daemon. Everything else (processes that stand still, the
//! lab and what runs in it, the run's directory) is written down, as lines of JSON in the keeper's standard input,
//! *before* it is done. When the input ends, because the run has ended in whatever way, the keeper undoes what is
//! still to be undone, prints what it could not undo, a line each, and leaves.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, BufRead, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::processes::{self, Process};
use crate::lab;

/// Beginning of the name of a run's directory.
const SCRATCH: &str = "injector-run-";
/// How long processes of a lab may take to end after SIGTERM, and then after SIGKILL.
const ENDING: [(Signal, Duration); 2] = [
    (Signal::SIGTERM, Duration::from_secs(2)),
    (Signal::SIGKILL, Duration::from_secs(5)),
];

/// What is to be undone, or has been.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Deed {
    /// A lab of this name.
    Lab(String),
    /// A directory.
    Scratch(PathBuf),
    /// A process that was sent SIGSTOP.
    Stopped(Process),
    /// A control group that was frozen.
    Frozen(PathBuf),
    /// A process group of ours.
    Group(Process),
}

/// A line of the keeper's input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// It is about to be done.
    Do(Deed),
    /// It has been undone.
    Undone(Deed),
}

/// The keeper, as the run sees it.
#[derive(Debug)]
pub struct Keeper {
    pid: u32,
    child: Mutex<Option<Child>>,
}

impl Keeper {
    /// Starts it. `state_dir` is where labs are known.
    pub fn start(state_dir: &Path) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("--state-dir")
            .arg(state_dir)
            .arg("keeper")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/");
        // SAFETY: between fork and exec only async-signal-safe system calls are made.
        unsafe {
            command.pre_exec(|| {
                // Neither a terminal's Ctrl-C nor its hang-up is for the keeper.
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        let child = command.spawn()?;
        Ok(Self {
            pid: child.id(),
            child: Mutex::new(Some(child)),
        })
    }

    /// Its process.
    #[must_use]
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    fn write(&self, line: &Line) -> io::Result<()> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let pipe = child
            .as_mut()
            .and_then(|child| child.stdin.as_mut())
            .ok_or_else(|| io::Error::other("the process that cleans up has been let go"))?;
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        pipe.write_all(&text)
    }

    /// A lab is about to be made.
    pub(super) fn lab(&self, name: &str) -> io::Result<()> {
        self.write(&Line::Do(Deed::Lab(name.to_owned())))
    }

    /// A process is about to be stopped.
    pub(super) fn stopping(&self, process: Process) -> io::Result<()> {
        self.write(&Line::Do(Deed::Stopped(process)))
    }

    /// A process goes on.
    pub(super) fn continued(&self, process: Process) -> io::Result<()> {
        self.write(&Line::Undone(Deed::Stopped(process)))
    }

    /// A control group is about to be frozen.
    pub(super) fn freezing(&self, group: &Path) -> io::Result<()> {
        self.write(&Line::Do(Deed::Frozen(group.to_owned())))
    }

    /// A control group is thawed.
    pub(super) fn thawed(&self, group: &Path) -> io::Result<()> {
        self.write(&Line::Undone(Deed::Frozen(group.to_owned())))
    }

    /// A process group of ours has been started, by its leader.
    pub(super) fn started(&self, leader: Process) -> io::Result<()> {
        self.write(&Line::Do(Deed::Group(leader)))
    }

    /// It has ended.
    pub(super) fn ended(&self, leader: Process) -> io::Result<()> {
        self.write(&Line::Undone(Deed::Group(leader)))
    }

    /// Makes a directory for the run, in which everybody may make files.
    pub(super) fn scratch(&self) -> io::Result<PathBuf> {
        let base = std::env::temp_dir();
        for attempt in 0..100_u32 {
            let path = base.join(format!("{SCRATCH}{}-{attempt}", std::process::id()));
            self.write(&Line::Do(Deed::Scratch(path.clone())))?;
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    // Services run as users of their own, and keep their files here.
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o1777))?;
                    return Ok(path);
                }
                Err(error) => {
                    self.write(&Line::Undone(Deed::Scratch(path)))?;
                    if error.kind() != io::ErrorKind::AlreadyExists {
                        return Err(error);
                    }
                }
            }
        }
        Err(io::Error::other(format!(
            "all names for a directory in {} are taken",
            base.display()
        )))
    }

    /// Lets it undo what is left, and waits for that; returns what it could not undo.
    pub fn finish(&self) -> Vec<String> {
        let taken = {
            let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
            child.take()
        };
        let Some(mut child) = taken else {
            return Vec::new();
        };
        drop(child.stdin.take());
        let mut said = String::new();
        let read = child
            .stdout
            .take()
            .map_or(Ok(0), |mut out| out.read_to_string(&mut said));
        let ended = child.wait();
        let mut problems: Vec<String> = said.lines().map(str::to_owned).collect();
        if let Err(error) = read {
            problems.push(format!(
                "reading what the process that cleans up said: {error}"
            ));
        }
        match ended {
            Ok(status) if status.success() => {}
            Ok(status) => {
                problems.push(format!("the process that cleans up ended early ({status})"));
            }
            Err(error) => problems.push(format!("waiting for the process that cleans up: {error}")),
        }
        problems
    }
}

/// The keeper's own work, in its process: reads `input` to its end, then undoes what is left. Returns what it could not
/// undo.
pub fn keep(input: impl Read, state_dir: &Path) -> Vec<String> {
    let mut outstanding = BTreeSet::new();
    let mut problems = Vec::new();
    for line in io::BufReader::new(input).lines() {
        // A run that is killed while it writes leaves half a line, of something that it has not done yet.
        let Ok(line) = line else { break };
        match serde_json::from_str(&line) {
            Ok(Line::Do(deed)) => {
                outstanding.insert(deed);
            }
            Ok(Line::Undone(deed)) => {
                outstanding.remove(&deed);
            }
            Err(_) => {}
        }
    }
    // In the order in which they stand in `Deed`, but processes go on first: those of a lab are to end.
    let (go_on, rest): (Vec<Deed>, Vec<Deed>) = outstanding
        .into_iter()
        .partition(|deed| matches!(deed, Deed::Stopped(_) | Deed::Frozen(_)));
    for deed in go_on.into_iter().chain(rest) {
        if let Err(problem) = undo(&deed, state_dir) {
            problems.push(problem);
        }
    }
    problems
}

fn undo(deed: &Deed, state_dir: &Path) -> Result<(), String> {
    match deed {
        Deed::Stopped(process) => match process.signal(Signal::SIGCONT) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(format!("letting process {} go on: {error}", process.pid)),
        },
        Deed::Frozen(group) => processes::thaw(group)
            .map_err(|error| format!("thawing control group {}: {error}", group.display())),
        Deed::Group(leader) => leader
            .kill_group()
            .map_err(|error| format!("ending process group {}: {error}", leader.pid)),
        Deed::Lab(name) => {
            end_inhabitants(state_dir, name)?;
            lab::down(state_dir, name)
                .map(drop)
                .map_err(|error| format!("removing lab {name}: {error}"))
        }
        Deed::Scratch(path) => {
            let ours = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with(SCRATCH))
                && fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
            if !ours {
                return Ok(());
            }
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(format!("removing {}: {error}", path.display()))
                }
                _ => Ok(()),
            }
        }
    }
}

/// Ends all processes that live in the namespaces of a lab.
fn end_inhabitants(state_dir: &Path, name: &str) -> Result<(), String> {
    let living = || lab::inhabitants(state_dir, name).map_err(|error| error.to_string());
    for (signal, patience) in ENDING {
        let deadline = Instant::now() + patience;
        for process in living()?.iter().filter_map(|&pid| Process::of(pid)) {
            // One that has ended meanwhile is what is wanted.
            let _ = process.signal(signal);
            let _ = process.signal(Signal::SIGCONT);
        }
        while !living()?.is_empty() {
            if Instant::now() > deadline {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    let left = living()?;
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("processes of lab {name} do not end: {left:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lines: &[Line]) -> Vec<u8> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, line).unwrap();
            text.push(b'\n');
        }
        text
    }

    #[test]
    fn what_was_undone_is_left_alone_and_the_rest_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        let [kept, gone, foreign] =
            ["injector-run-1-0", "injector-run-1-1", "other"].map(|name| dir.path().join(name));
        for path in [&kept, &gone, &foreign] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("file"), "").unwrap();
        }
        let mut input = lines(&[
            Line::Do(Deed::Scratch(kept.clone())),
            Line::Do(Deed::Scratch(gone.clone())),
            Line::Do(Deed::Scratch(foreign.clone())),
            Line::Undone(Deed::Scratch(kept.clone())),
        ]);
        // Half a line.
        input.extend_from_slice(b"{\"do\":{\"scr");
        assert!(keep(&input[..], state.path()).is_empty());
        assert!(kept.exists());
        assert!(!gone.exists());
        assert!(foreign.exists());
    }

    #[test]
    fn a_stopped_process_goes_on_and_its_namesake_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        process.signal(Signal::SIGSTOP).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !process.is_stopped() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
        // Of the same number, but started at another time: not ours.
        let other = Process {
            started: process.started + 1,
            ..process
        };
        assert!(keep(&lines(&[Line::Do(Deed::Stopped(other))])[..], state.path()).is_empty());
        assert!(process.is_stopped());
        assert!(
            keep(
                &lines(&[Line::Do(Deed::Stopped(process))])[..],
                state.path()
            )
            .is_empty()
        );
        while process.is_stopped() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
