//! Reaching the daemon on behalf of a command: use the one that runs, start one where that is wanted,
//! and undo what a dead one left behind.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::{
    exit::{Exit, Failure},
    output::{self, Output},
};
use crate::{
    client::{self, Client, ClientError, Endpoint},
    daemon::lock::{LockError, StateLock},
    journal::{self, Recovery},
    netns,
    protocol::DaemonInfo,
    rules::{RuleSpec, model::NetnsRef, text},
    ssh::{self, OperatorConnection},
};

/// What all commands have in common.
#[derive(Debug, Clone)]
pub(super) struct Session {
    /// Where the daemon is.
    pub(super) endpoint: Endpoint,
    /// How to print.
    pub(super) output: Output,
}

/// A daemon that answers.
#[derive(Debug)]
pub(super) struct Connected {
    /// The connection.
    pub(super) client: Client,
    /// Who answered.
    pub(super) info: DaemonInfo,
}

impl Session {
    /// Connects to the daemon that runs; `None` where there is none.
    pub(super) fn connect(&self) -> Result<Option<Connected>, Failure> {
        let deadline = Instant::now() + client::START_TIME;
        loop {
            // Looked at first: a daemon has its socket before it lets go of the lock.
            let locked = client::is_locked(&self.endpoint.state_dir);
            match Client::connect(&self.endpoint) {
                Ok(mut client) => {
                    let info = client.hello()?;
                    return Ok(Some(Connected { client, info }));
                }
                // One is just starting or ending: there will be an answer, or nobody, in a moment.
                Err(ClientError::NoDaemon { .. }) if locked && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(20));
                }
                Err(ClientError::NoDaemon { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Connects to the daemon that runs, or starts one in the background and says so.
    pub(super) fn connect_or_start(&self) -> Result<Connected, Failure> {
        if let Some(connected) = self.connect()? {
            return Ok(connected);
        }
        if !may_attach() {
            return Err(Failure::new(
                Exit::NotPermitted,
                "not_permitted",
                "no daemon is running, and starting one needs root",
            )
            .help("run this as root (sudo), or have root run `injector daemon`"));
        }
        let (client, info) = client::start_daemon(&self.endpoint)?;
        output::say(&format!(
            "started a daemon in the background (process {}); it leaves {} after the last rule, and \
             logs to {}",
            info.pid,
            output::time(client::IDLE_EXIT.as_secs_f64()),
            self.endpoint.state_dir.join(client::LOG_NAME).display()
        ));
        Ok(Connected { client, info })
    }

    /// Where no daemon runs: undoes what a dead one left behind, and says what that was. `None`:
    /// nothing was left.
    pub(super) fn recover(&self) -> Result<Option<Recovery>, Failure> {
        let dir = &self.endpoint.state_dir;
        if !dir.exists() {
            return Ok(None);
        }
        let failed =
            |error: &dyn std::error::Error| Failure::from_error(Exit::Failed, "host", error);
        match journal::has_leftovers(dir) {
            Ok(false) => return Ok(None),
            Ok(true) => {}
            Err(error) => return Err(failed(&error)),
        }
        let _lock = match StateLock::acquire(dir) {
            Ok(lock) => lock,
            // A daemon is just starting or ending, and undoes what is left itself.
            Err(LockError::Held { .. }) => return Ok(None),
            Err(error) => return Err(failed(&error)),
        };
        let recovery = journal::recover(dir).map_err(|error| failed(&error))?;
        output::say("a daemon that died had left something behind:");
        for line in &recovery.undone {
            output::say(&format!("  undone: {line}"));
        }
        for line in &recovery.gone {
            output::say(&format!("  gone already: {line}"));
        }
        for line in &recovery.failed {
            output::warn(&format!("not undone: {line}"));
        }
        Ok(Some(recovery))
    }

    /// Waits until a daemon that is leaving has gone.
    pub(super) fn wait_until_gone(&self, info: &DaemonInfo) -> Result<(), Failure> {
        let deadline = Instant::now() + self.endpoint.answer_time;
        // The lock is the last thing that it lets go of.
        while client::is_locked(&info.state_dir) {
            if Instant::now() > deadline {
                return Err(Failure::new(
                    Exit::Failed,
                    "daemon_hung",
                    format!(
                        "the daemon (process {}) healed everything but does not end",
                        info.pid
                    ),
                )
                .help("see its log; it can be killed, nothing of it is left on the host"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// The operator's control connections, to be left alone, unless that is not wanted.
#[must_use]
pub(super) fn operator(unprotected: bool) -> Vec<OperatorConnection> {
    if unprotected {
        Vec::new()
    } else {
        ssh::operator_connections()
    }
}

/// A failure for commands that need a rule of a daemon that does not run.
#[must_use]
pub(super) fn no_such_rule(name: &str) -> Failure {
    Failure::new(
        Exit::Name,
        "not_found",
        format!("there is no rule '{name}': no daemon is running, so there are no rules"),
    )
}

/// The namespace that a rule without `--netns` means: the one in which the command is run. `None`
/// where that is the daemon's own.
pub(super) fn own_netns(daemon: &DaemonInfo) -> Result<Option<String>, Failure> {
    // Device and inode suffice: both namespaces have a process in them, so neither number is reused.
    let id = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let (Ok(ours), Ok(theirs)) = (
        id(Path::new("/proc/self/ns/net")),
        id(Path::new(&format!("/proc/{}/ns/net", daemon.pid))),
    ) else {
        return Ok(None);
    };
    if ours == theirs {
        return Ok(None);
    }
    let name = fs::read_dir(netns::RUN_DIR)
        .into_iter()
        .flatten()
        .flatten()
        .find(|entry| id(&entry.path()).is_ok_and(|theirs| theirs == ours))
        .and_then(|entry| entry.file_name().into_string().ok());
    match name {
        Some(name) => Ok(text::netns::format(&NetnsRef::Name(name))),
        None => Err(Failure::usage(
            "this command runs in another network namespace than the daemon, and the namespace has \
             no name below /run/netns",
        )
        .help("say with --netns which namespace is meant (a name, a path or a process id)")),
    }
}

/// The same for several rules: looked up only if one of them names no namespace.
pub(super) fn own_netns_if(
    specs: &[RuleSpec],
    daemon: &DaemonInfo,
) -> Result<Option<String>, Failure> {
    if specs.iter().any(|spec| spec.netns.is_none()) {
        own_netns(daemon)
    } else {
        Ok(None)
    }
}

/// Whether this process may attach programs: root, or the capabilities that matter.
#[must_use]
pub(super) fn may_attach() -> bool {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    const BPF: u64 = 1 << 39;
    let Ok(status) = fs::read_to_string("/proc/self/status") else {
        return nix::unistd::geteuid().is_root();
    };
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or(0);
    effective & NET_ADMIN != 0 && effective & (SYS_ADMIN | BPF) != 0
}
