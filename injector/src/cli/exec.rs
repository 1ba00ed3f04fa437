//! `injector exec`: a fault for as long as a command runs.
//!
//! The rule is bound to a connection that this process holds: whatever becomes of this process, a
//! SIGKILL included, the rule ends with it.

use std::{
    ffi::OsString,
    io::{self, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use clap::Args;
use nix::{
    sys::{
        signal::{self, SigSet, SigmaskHow, Signal},
        signalfd::{SfdFlags, SignalFd},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};

use super::{
    exit::{Exit, Failure},
    output, report,
    rule_args::RuleArgs,
    session::{self, Session},
};
use crate::{
    client::Client,
    protocol::{AddArgs, AddResult, Call, HealArgs, HealResult},
    rules::RuleSpec,
};

/// Signals that are for the command rather than for us.
const FORWARDED: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Run a command under a fault; the fault is healed whatever becomes of the command
///
/// The command's exit code is returned (128+N after signal N). SIGINT, SIGTERM and other signals go to
/// the command.
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// Name of the rule [default: made from its content]
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    rule: RuleArgs,
    /// Do not say what the fault did
    #[arg(short, long)]
    quiet: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl ExecArgs {
    /// Runs the command, and gives its exit code.
    pub(super) fn run(&self, session: &Session) -> Result<u8, Failure> {
        let rule = self
            .rule
            .to_rule(self.name.as_deref(), &session.endpoint.state_dir)?;
        let mut spec = RuleSpec::from(&rule);
        let mut held = session.connect_or_start()?;
        if spec.netns.is_none() {
            spec.netns = session::own_netns(&held.info)?;
        }
        if rule.name_generated {
            spec.name = None;
        }
        // From here on signals wait until there is a command to give them to.
        let signals = Signals::block()?;
        let result: AddResult = held.client.call(Call::Add(AddArgs {
            rules: vec![spec],
            replace: false,
            hold: true,
            operator: session::operator(self.rule.no_protect_operator),
            dry_run: false,
        }))?;
        report::warnings(&result.warnings);
        let names: Vec<String> = result
            .rules
            .iter()
            .map(|rule| report::name(&rule.spec).to_owned())
            .collect();
        if !self.quiet {
            for rule in &result.rules {
                output::say(&format!("added {}", report::rule(rule, false)));
            }
        }
        let watcher = Watcher::start(&held.client);
        let status = self.run_command(&signals);
        watcher.expect_end();
        // On a connection of its own: the one that holds the rules is being watched.
        let summary = heal(session, names);
        drop(held);
        match summary {
            Ok(result) if !self.quiet => {
                if session.output.json {
                    // Standard output is the command's.
                    if let Ok(text) = serde_json::to_string(&result) {
                        output::say(&text);
                    }
                } else {
                    for stats in &result.healed {
                        output::say(&format!("healed {}", report::deeds(stats)));
                    }
                }
            }
            Ok(_) => {}
            // The end of the holding connection heals all the same.
            Err(failure) => output::warn(&format!("no summary: {failure}")),
        }
        status.map(code)
    }

    fn run_command(&self, signals: &Signals) -> Result<ExitStatus, Failure> {
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(Failure::usage("no command is given"));
        };
        let shown = program.to_string_lossy();
        let mut command = Command::new(program);
        command.args(arguments);
        let before = signals.before;
        // SAFETY: between fork and exec only sigprocmask is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || before.thread_set_mask().map_err(io::Error::from));
        }
        let child = command.spawn().map_err(|error| {
            Failure::new(spawn_exit(&error), "exec", format!("running {shown}")).caused_by(&error)
        })?;
        signals.wait(child).map_err(|error| {
            Failure::new(Exit::Exec, "exec", format!("waiting for {shown}")).caused_by(&error)
        })
    }
}

/// The exit code for a command that could not be started, as shells have it.
#[must_use]
pub(super) fn spawn_exit(error: &io::Error) -> Exit {
    match error.kind() {
        io::ErrorKind::NotFound => Exit::CommandNotFound,
        io::ErrorKind::PermissionDenied => Exit::NotExecutable,
        _ if error.raw_os_error() == Some(libc::ENOEXEC) => Exit::NotExecutable,
        _ => Exit::Exec,
    }
}

/// The exit code of a command that ended.
fn code(status: ExitStatus) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => Exit::Exec as i32,
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn heal(session: &Session, names: Vec<String>) -> Result<HealResult, Failure> {
    let mut client = Client::connect(&session.endpoint)?;
    Ok(client.call(Call::Heal(HealArgs {
        names,
        ..HealArgs::default()
    }))?)
}

/// Notices, while the command runs, that the daemon has gone and the fault with it.
struct Watcher {
    ending: Arc<AtomicBool>,
}

impl Watcher {
    fn start(client: &Client) -> Watcher {
        let ending = Arc::new(AtomicBool::new(false));
        if let Ok(mut stream) = client.watch() {
            let ending = Arc::clone(&ending);
            thread::spawn(move || {
                // The daemon says nothing unasked: whatever this returns is the end.
                let _ = stream.read(&mut [0; 1]);
                if !ending.load(Ordering::Relaxed) {
                    output::warn("the daemon has gone: the command runs on without the fault");
                }
            });
        }
        Watcher { ending }
    }

    fn expect_end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }
}

/// Signals, blocked and read from a descriptor instead.
struct Signals {
    before: SigSet,
    fd: Arc<SignalFd>,
}

impl Signals {
    /// Blocks them for this thread and those that it starts.
    fn block() -> Result<Signals, Failure> {
        let mut set = SigSet::empty();
        for signal in FORWARDED {
            set.add(signal);
        }
        let failed = |errno: nix::Error| {
            Failure::new(Exit::Exec, "exec", "taking signals over").caused_by(&errno)
        };
        let before = set
            .thread_swap_mask(SigmaskHow::SIG_BLOCK)
            .map_err(failed)?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).map_err(failed)?;
        Ok(Signals {
            before,
            fd: Arc::new(fd),
        })
    }

    /// Waits for the end of the command, and gives it the signals that come.
    fn wait(&self, mut child: Child) -> io::Result<ExitStatus> {
        let Ok(pid) = i32::try_from(child.id()).map(Pid::from_raw) else {
            return child.wait();
        };
        let running = Arc::new(Mutex::new(true));
        {
            let (fd, running) = (Arc::clone(&self.fd), Arc::clone(&running));
            // It ends with the process.
            thread::Builder::new().spawn(move || forward(&fd, pid, &running))?;
        }
        // Until the child is reaped its id is nobody else's: no signal may be sent from then on.
        let ended = loop {
            match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Err(nix::Error::EINTR) => {}
                other => break other,
            }
        };
        *running.lock().unwrap_or_else(PoisonError::into_inner) = false;
        ended?;
        child.wait()
    }
}

/// Passes signals on to the command for as long as it runs.
fn forward(fd: &SignalFd, pid: Pid, running: &Mutex<bool>) {
    loop {
        let info = match fd.read_signal() {
            Ok(Some(info)) => info,
            Ok(None) | Err(nix::Error::EINTR) => continue,
            Err(_) => return,
        };
        // What a terminal sends (Ctrl-C) goes to its whole foreground process group, the command
        // included; what somebody sends to us alone is passed on.
        if info.ssi_code == libc::SI_KERNEL {
            continue;
        }
        let signal = i32::try_from(info.ssi_signo)
            .ok()
            .and_then(|n| Signal::try_from(n).ok());
        let running = running.lock().unwrap_or_else(PoisonError::into_inner);
        if !*running {
            return;
        }
        if let Some(signal) = signal {
            // It may have ended in this moment; then there is nobody to tell.
            let _ = signal::kill(pid, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> u8 {
        let signals = Signals::block().unwrap();
        let child = Command::new("sh").arg("-c").arg(script).spawn().unwrap();
        code(signals.wait(child).unwrap())
    }

    #[test]
    fn codes_of_commands() {
        assert_eq!(run("exit 0"), 0);
        assert_eq!(run("exit 42"), 42);
        assert_eq!(run("kill -KILL $$"), 137);
    }

    #[test]
    fn commands_that_cannot_be_started() {
        let code = |path: &str| spawn_exit(&Command::new(path).spawn().unwrap_err()) as u8;
        assert_eq!(code("/nonexistent/command"), 127);
        assert_eq!(code("/etc/passwd"), 126);
        assert_eq!(code("/etc"), 126);
    }
}
