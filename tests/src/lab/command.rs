//! Running commands with a deadline and keeping what they said.

use std::{
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::transcript::note;

/// For commands that should be done at once, on a machine that is busy.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// What became of a command.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Output {
    /// Its exit code; `None` if a signal ended it.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Fails, with everything that is known, unless the exit code is 0.
    pub fn success(self) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        bail!("{}", self.describe());
    }

    /// The command and its end, in full.
    #[must_use]
    pub fn describe(&self) -> String {
        let how = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "ended oddly".to_owned(),
        };
        format!(
            "$ {}\n  {how} after {:?}\n  stdout: {}\n  stderr: {}",
            self.line,
            self.took,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// A command as a person would type it.
#[must_use]
pub fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for word in command.get_args() {
        let word = word.to_string_lossy();
        line.push(' ');
        if word.is_empty() || word.contains(char::is_whitespace) {
            line.push('\'');
            line.push_str(&word);
            line.push('\'');
        } else {
            line.push_str(&word);
        }
    }
    line
}

/// Runs a command to its end, or kills it at the deadline and fails.
pub fn run(command: Command, within: Duration) -> Result<Output> {
    run_with_input(command, &[], within)
}

/// The same with something on its standard input.
pub fn run_with_input(mut command: Command, input: &[u8], within: Duration) -> Result<Output> {
    let line = line_of(&command);
    let began = Instant::now();
    let mut child = command
        .stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start: {line}"))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_vec();
        // A child that leaves without reading its input is its own business.
        thread::spawn(move || stdin.write_all(&input).is_ok());
    }
    let status = wait_for_exit(&mut child, within)?;
    // A background process that inherited the pipes would hold them open: that is a fault of the
    // command, not something to wait for.
    let grace = Duration::from_secs(2);
    let collected = (stdout.recv_timeout(grace), stderr.recv_timeout(grace));
    let (stdout, stderr) = match collected {
        (Ok(stdout), Ok(stderr)) => (stdout, stderr),
        _ if status.is_some() => {
            bail!("{line} ended, but something that it started still holds its output open")
        }
        _ => (String::new(), String::new()),
    };
    let Some(status) = status else {
        bail!("killed after {within:?}: {line}\n  stdout: {stdout}\n  stderr: {stderr}");
    };
    let output = Output {
        line,
        status,
        stdout,
        stderr,
        took: began.elapsed(),
    };
    let quiet = output.status.success() && output.stdout.is_empty() && output.stderr.is_empty();
    if quiet {
        note(format!("$ {}", output.line));
    } else {
        note(output.describe());
    }
    Ok(output)
}

/// Runs a command line, split at white space; fails unless it exits with 0.
pub fn tool(line: &str) -> Result<Output> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().context("an empty command line")?);
    command.args(words);
    run(command, DEADLINE)?.success()
}

/// Waits for a child; kills it when the time is over and returns `None`.
pub fn wait_for_exit(child: &mut Child, within: Duration) -> Result<Option<ExitStatus>> {
    let began = Instant::now();
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait().context("waiting for a child")? {
            return Ok(Some(status));
        }
        if began.elapsed() >= within {
            child.kill().context("killing a child")?;
            child.wait().context("waiting for a killed child")?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error is still worth showing.
            let _read = pipe.read_to_end(&mut bytes);
        }
        sender.send(String::from_utf8_lossy(&bytes).into_owned())
    });
    receiver
}
