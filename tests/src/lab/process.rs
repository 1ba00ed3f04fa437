//! A server or a background command, ended with its guard.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{command, transcript::note};

/// A child that runs in the background, with its output in a file.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    line: String,
}

impl Process {
    /// Starts it; standard output and standard error go to `log` (appended).
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let line = command::line_of(&command);
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("could not open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("duplicating a log's descriptor")?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("could not start: {line}"))?;
        note(format!("$ {line} &  # pid {}", child.id()));
        Ok(Self {
            child,
            log: log.to_owned(),
            line,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        note(format!("{signal} to pid {}", self.child.id()));
        kill(self.pid(), signal)
            .with_context(|| format!("sending {signal} to {} ({})", self.child.id(), self.line))
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("waiting for a child")
    }

    /// Waits for its end; `None` if it had to be killed.
    pub fn wait(&mut self, within: Duration) -> Result<Option<ExitStatus>> {
        command::wait_for_exit(&mut self.child, within)
    }

    /// The last lines of what it wrote.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, 40)
    }
}

/// The last lines of a file, or why there are none.
#[must_use]
pub fn tail(file: &Path, lines: usize) -> String {
    match std::fs::read(file) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({}: {error})", file.display()),
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // A stopped process does not act on anything but SIGKILL and SIGCONT.
            let _sent = kill(self.pid(), Signal::SIGCONT);
            let _sent = kill(self.pid(), Signal::SIGTERM);
            let _ended = command::wait_for_exit(&mut self.child, Duration::from_secs(4));
        }
    }
}
