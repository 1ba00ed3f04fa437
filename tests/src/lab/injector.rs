//! The injector as its users see it: the real binary, run with a state folder of the test's own, and
//! its JSON. Nothing of the injector's code is used here, so that its words and numbers are what is
//! tested.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    command::{self, Output},
    process::{self, Process},
    scratch::Scratch,
    transcript::note,
    wait::{wait_for, wait_to_end},
};

/// Exit codes, as documented in the README.
pub mod exit {
    /// Done.
    pub const OK: i32 = 0;
    /// The host or the daemon refused.
    pub const FAILED: i32 = 1;
    /// Wrong input.
    pub const USAGE: i32 = 2;
    /// No daemon.
    pub const NO_DAEMON: i32 = 3;
    /// Not permitted.
    pub const NOT_PERMITTED: i32 = 4;
    /// `--expect-effect` was not met.
    pub const NO_EFFECT: i32 = 6;
    /// A name that exists, or does not.
    pub const NAME: i32 = 7;
    /// `exec` failed by itself; lower codes are its command's.
    pub const EXEC: i32 = 125;
}

/// The binary under test.
pub fn binary() -> Result<PathBuf> {
    let path = std::env::var_os("INJECTOR_BIN")
        .map(PathBuf::from)
        .context("INJECTOR_BIN does not name the injector's binary")?;
    ensure!(path.is_file(), "{} is not there", path.display());
    Ok(path)
}

/// The injector with a state folder of its own, and the daemon that this test started.
#[derive(Debug)]
pub struct Injector {
    binary: PathBuf,
    state: Scratch,
    daemon: Option<Process>,
}

/// Counters of one rule in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct RuleCounters {
    /// Wire packets that matched.
    pub matched_packets: u64,
    /// Wire packets that were cut.
    pub cut_packets: u64,
    /// Wire packets cut only because they shared a super-packet with one that was asked for.
    pub excess_packets: u64,
    /// Flows seen.
    pub flows: u64,
    /// Matched while the rule was flapped off.
    pub off_packets: u64,
    /// Matched while the lease had lapsed.
    pub lapsed_packets: u64,
    /// Decided without state.
    pub stateless_packets: u64,
    /// Lost by chance.
    pub lost_packets: u64,
    /// Copies made.
    pub copies: u64,
    /// Delayed.
    pub delayed_packets: u64,
    /// Held back.
    pub reordered_packets: u64,
    /// Lost because they were too long.
    pub too_long_packets: u64,
    /// Lost because a line's queue was full.
    pub overflow_packets: u64,
    /// Through a line of limited rate.
    pub queued_packets: u64,
    /// How long that was busy with them, in nanoseconds.
    pub busy_ns: u64,
    /// Marked (ECN).
    pub marked_packets: u64,
    /// Corrupted.
    pub corrupted_packets: u64,
    /// Held by a stall.
    pub stalled_packets: u64,
    /// Answered.
    pub answered_packets: u64,
    /// When the first packet matched, on the monotonic clock.
    pub first_ns: u64,
    /// When the last one did.
    pub last_ns: u64,
}

/// What a rule did.
#[derive(Debug, Clone, Deserialize)]
pub struct RuleStats {
    /// Its name.
    pub name: String,
    /// `active`, `expired`, `gone`.
    pub state: String,
    /// Packets that left.
    pub egress: RuleCounters,
    /// Packets that arrived.
    pub ingress: RuleCounters,
    /// What was asked beside what became of it.
    #[serde(default)]
    pub realised: Vec<Realised>,
}

impl RuleStats {
    /// A counter of both directions.
    pub fn both(&self, of: impl Fn(&RuleCounters) -> u64) -> u64 {
        of(&self.egress) + of(&self.ingress)
    }

    /// What became of one of its faults.
    pub fn realised(&self, fault: &str) -> Result<&Realised> {
        self.realised
            .iter()
            .find(|one| one.fault == fault)
            .with_context(|| format!("nothing is said of {fault}: {self:?}"))
    }
}

/// One fault of a rule, as asked and as it turned out; times in seconds.
#[derive(Debug, Clone, Deserialize)]
pub struct Realised {
    /// Its name.
    pub fault: String,
    /// What was asked.
    pub asked: f64,
    /// What happened.
    pub realised: Option<f64>,
    /// Wire packets.
    pub packets: u64,
    /// Median.
    pub p50: Option<f64>,
    /// 90 % are not above.
    pub p90: Option<f64>,
    /// 99 % are not above.
    pub p99: Option<f64>,
    /// The longest.
    pub max: Option<f64>,
}

/// Counters of one target in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct TargetCounters {
    /// Packets that came by.
    pub seen_packets: u64,
    /// Packets that went on.
    pub passed_packets: u64,
    /// Packets that were cut.
    pub cut_packets: u64,
    /// Packets that could not be parsed.
    pub unparsed_packets: u64,
    /// Later fragments without their first one.
    pub orphan_fragments: u64,
    /// Errors of the injector's own.
    pub errors: u64,
    /// Inserts into full tables.
    pub table_full: u64,
    /// Matched while the lease had lapsed.
    pub lapsed_packets: u64,
    /// Went into a lane.
    pub lane_packets: u64,
    /// Could not be sent into a lane.
    pub lane_refused: u64,
}

/// What came by a target.
#[derive(Debug, Clone, Deserialize)]
pub struct TargetStats {
    /// Namespace.
    #[serde(default)]
    pub netns: Option<String>,
    /// Interface.
    pub iface: String,
    /// Whether the filters are on it.
    pub attached: bool,
    /// What stands in front of them.
    #[serde(default)]
    pub obstacles: Vec<String>,
    /// Packets that left.
    pub egress: TargetCounters,
    /// Packets that arrived.
    pub ingress: TargetCounters,
}

/// What a lane holds and lost.
#[derive(Debug, Clone, Deserialize)]
pub struct LaneStats {
    /// Packets in its queue.
    pub queued_packets: u64,
    /// Packets that it may hold.
    pub capacity_packets: u64,
    /// Memory that it takes, in bytes.
    pub memory_bytes: u64,
    /// Memory that it may take, in bytes.
    pub memory_capacity: u64,
    /// Packets that found it full.
    pub full_packets: u64,
    /// Packets that its queues dropped.
    pub dropped_packets: u64,
    /// Packets that its devices dropped.
    pub device_drops: u64,
    /// Packets that went missing in it.
    pub missing_packets: u64,
    /// Packets that its targets dropped as they arrived.
    pub backlog_drops: u64,
}

/// What lanes lost on the way.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct LaneLosses {
    /// Packets of somebody else's.
    pub strays: u64,
    /// Copies that could not be sent.
    pub copies: u64,
    /// Packets that could not be brought back.
    pub returns: u64,
    /// Packets that were lost on the way to the line.
    pub entries: u64,
}

/// A healed rule whose held packets are being dropped.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct FlushStatus {
    /// Its name.
    pub rule: String,
    /// Packets dropped so far that would have left.
    pub egress_packets: u64,
    /// Packets dropped so far that would have arrived.
    pub ingress_packets: u64,
}

/// Everything that `stats` says.
#[derive(Debug, Clone, Deserialize)]
pub struct Stats {
    /// Per rule.
    pub rules: Vec<RuleStats>,
    /// Per target.
    pub targets: Vec<TargetStats>,
    /// How often the lease was found to have lapsed.
    pub lapses: u64,
    /// Per lane.
    pub lanes: Vec<LaneStats>,
    /// What lanes lost on the way.
    pub lane_losses: LaneLosses,
    /// Healed rules whose held packets are being dropped.
    pub flushes: Vec<FlushStatus>,
}

impl Stats {
    /// Fails if a lane lost a packet that no rule took.
    pub fn lanes_lost_nothing(&self) -> Result<()> {
        let LaneLosses {
            strays,
            copies,
            returns,
            entries,
        } = self.lane_losses;
        let refused: u64 = self
            .targets
            .iter()
            .map(|target| target.egress.lane_refused + target.ingress.lane_refused)
            .sum();
        let dropped: u64 = self
            .lanes
            .iter()
            .map(|lane| {
                lane.full_packets
                    + lane.dropped_packets
                    + lane.device_drops
                    + lane.missing_packets
                    + lane.backlog_drops
            })
            .sum();
        let errors: u64 = self
            .targets
            .iter()
            .map(|target| target.egress.errors + target.ingress.errors)
            .sum();
        ensure!(
            strays + copies + returns + entries + refused + dropped + errors == 0,
            "a lane lost packets: {self:?}"
        );
        Ok(())
    }

    /// One rule's numbers.
    pub fn rule(&self, name: &str) -> Result<&RuleStats> {
        self.rules
            .iter()
            .find(|rule| rule.name == name)
            .with_context(|| format!("stats do not know the rule {name:?}: {self:?}"))
    }

    /// One target's numbers.
    pub fn target(&self, netns: &str, iface: &str) -> Result<&TargetStats> {
        self.targets
            .iter()
            .find(|target| target.netns.as_deref() == Some(netns) && target.iface == iface)
            .with_context(|| format!("stats do not know the target {netns}/{iface}: {self:?}"))
    }
}

impl Injector {
    /// A state folder, no daemon yet.
    pub fn new() -> Result<Self> {
        Ok(Self {
            binary: binary()?,
            state: Scratch::new()?,
            daemon: None,
        })
    }

    /// With a daemon, started in the foreground with these further arguments, that answers.
    pub fn started(arguments: &[&str]) -> Result<Self> {
        let mut injector = Self::new()?;
        injector.start_daemon(arguments)?;
        Ok(injector)
    }

    /// The program.
    #[must_use]
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Where its state is.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.state.path().join("injector.sock")
    }

    fn daemon_output(&self) -> PathBuf {
        self.state.path().join("daemon.out")
    }

    /// Starts a daemon and waits until it answers.
    pub fn start_daemon(&mut self, arguments: &[&str]) -> Result<()> {
        self.launch_daemon(arguments)?;
        self.await_answer(Duration::from_secs(30))
    }

    /// Starts a daemon and does not wait.
    pub fn launch_daemon(&mut self, arguments: &[&str]) -> Result<()> {
        let mut command = self.cli(&["daemon"]);
        command.args(arguments);
        self.daemon = Some(Process::start(command, &self.daemon_output())?);
        Ok(())
    }

    /// Waits until the daemon answers.
    pub fn await_answer(&mut self, within: Duration) -> Result<()> {
        let socket = self.socket();
        let mut daemon = self.daemon.take();
        let answered = wait_for("the daemon answers", within, || {
            if let Some(daemon) = &mut daemon
                && let Some(status) = daemon.ended()?
            {
                return Ok(Some(Err(status)));
            }
            let mut connection = Connection::open(&socket)?;
            connection.call("hello", &json!({})).map(|_| Some(Ok(())))
        });
        self.daemon = daemon;
        match answered.with_context(|| self.daemon_log())? {
            Ok(()) => Ok(()),
            Err(status) => bail!(
                "the daemon ended with {status} instead of serving:\n{}",
                self.daemon_log()
            ),
        }
    }

    /// What the daemon wrote, last lines.
    #[must_use]
    pub fn daemon_log(&self) -> String {
        let mut text = process::tail(&self.daemon_output(), 40);
        let background = self.state.path().join("daemon.log");
        if background.exists() {
            text.push('\n');
            text.push_str(&process::tail(&background, 40));
        }
        format!("--- daemon log ---\n{text}")
    }

    /// The daemon that this test started.
    pub fn daemon(&mut self) -> Result<&mut Process> {
        self.daemon.as_mut().context("no daemon was started")
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.daemon
            .as_ref()
            .context("no daemon was started")?
            .signal(signal)
    }

    /// Kills the daemon without giving it a chance, and waits for its end.
    pub fn kill_daemon(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("no daemon was started")?;
        daemon.signal(Signal::SIGKILL)?;
        daemon
            .wait(Duration::from_secs(10))?
            .context("SIGKILL did not end the daemon")?;
        Ok(())
    }

    /// Waits for the end of a daemon that was told to leave; returns its exit code.
    pub fn await_daemon_end(&mut self, within: Duration) -> Result<Option<i32>> {
        let mut daemon = self.daemon.take().context("no daemon was started")?;
        let status = daemon.wait(within)?;
        status
            .map(|status| status.code())
            .with_context(|| format!("the daemon did not leave: {}", self.daemon_log()))
    }

    /// The process id in the lock file: of whatever daemon serves this state folder.
    pub fn locked_by(&self) -> Result<Pid> {
        let text = std::fs::read_to_string(self.state.path().join("daemon.lock"))
            .context("reading daemon.lock")?;
        let digits: String = text
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        Ok(Pid::from_raw(digits.parse().with_context(|| {
            format!("daemon.lock holds no process id: {text:?}")
        })?))
    }

    /// The CLI as a command, with this state folder, and without an SSH connection of whoever runs the
    /// tests.
    #[must_use]
    pub fn cli(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        self.configure(&mut command, arguments);
        command
    }

    /// Adds to a command what [`Self::cli`] has.
    pub fn configure(&self, command: &mut Command, arguments: &[&str]) {
        command
            .env_remove("SSH_CONNECTION")
            .env_remove("SSH_CLIENT")
            .env_remove("NOTIFY_SOCKET")
            .env_remove("INJECTOR_STATE_DIR")
            .env("NO_COLOR", "1")
            .arg("--state-dir")
            .arg(self.state.path())
            .args(arguments);
    }

    /// Runs the CLI to its end, whatever its exit code.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        command::run(self.cli(arguments), command::DEADLINE)
    }

    /// Runs the CLI; fails unless it exits with 0.
    pub fn ok(&self, arguments: &[&str]) -> Result<Output> {
        self.run(arguments)?
            .success()
            .with_context(|| self.daemon_log())
    }

    /// Runs the CLI with `--json`; fails unless it exits with 0 and prints JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut words = vec!["--json"];
        words.extend_from_slice(arguments);
        let output = self.ok(&words)?;
        serde_json::from_str(&output.stdout)
            .with_context(|| format!("not JSON: {}", output.describe()))
    }

    /// `add` with a line of arguments, split at white space.
    pub fn add(&self, line: &str) -> Result<Value> {
        let mut words = vec!["add"];
        words.extend(line.split_whitespace());
        self.json(&words)
    }

    /// `apply -` with these rules, instead of or besides those that are there.
    pub fn apply(&self, rules: &[Value], mode: Mode) -> Result<Output> {
        self.try_apply(&json!({ "rules": rules }), mode)?
            .success()
            .with_context(|| self.daemon_log())
    }

    /// The same with any document, whatever the exit code.
    pub fn try_apply(&self, document: &Value, mode: Mode) -> Result<Output> {
        let mut arguments = vec!["--json", "apply"];
        match mode {
            Mode::Replace => arguments.push("--replace"),
            Mode::Add => {}
        }
        arguments.push("-");
        command::run_with_input(
            self.cli(&arguments),
            document.to_string().as_bytes(),
            command::DEADLINE,
        )
    }

    /// `stats`.
    pub fn stats(&self) -> Result<Stats> {
        let value = self.json(&["stats"])?;
        serde_json::from_value(value.clone())
            .with_context(|| format!("stats are not as documented: {value}"))
    }

    /// `heal --all`.
    pub fn heal_all(&self) -> Result<Value> {
        self.json(&["heal", "--all"])
    }

    /// `events`, as text.
    pub fn events(&self) -> Result<Vec<Value>> {
        let value = self.json(&["events"])?;
        let events = value.get("events").unwrap_or(&value);
        events
            .as_array()
            .cloned()
            .with_context(|| format!("events are not a list: {value}"))
    }

    /// A connection to the daemon's socket.
    pub fn connect(&self) -> Result<Connection> {
        Connection::open(&self.socket())
    }
}

/// What `apply` does with rules that are there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They are healed.
    Replace,
    /// They stay.
    Add,
}

impl Drop for Injector {
    fn drop(&mut self) {
        let background = self.locked_by().ok();
        note(self.daemon_log());
        // The one in the foreground, by its guard.
        let foreground = self.daemon.take().map(|daemon| daemon.pid());
        // One that a command started in the background, if it is there and serves our folder.
        if let Some(pid) = background.filter(|pid| Some(*pid) != foreground)
            && serves(pid, self.state.path())
        {
            let _sent = kill(pid, Signal::SIGCONT);
            let _sent = kill(pid, Signal::SIGTERM);
            let ended = wait_to_end("a daemon leaves", Duration::from_secs(5), || {
                Ok(!serves(pid, self.state.path()))
            });
            if ended.is_err() {
                let _sent = kill(pid, Signal::SIGKILL);
            }
        }
    }
}

/// Whether a process is there and was told to use this state folder.
#[must_use]
pub fn serves(pid: Pid, state: &Path) -> bool {
    let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let state = state.to_string_lossy();
    line.split(|byte| *byte == 0)
        .any(|word| String::from_utf8_lossy(word).contains(state.as_ref()))
}

/// A connection to a daemon: the protocol of docs/protocol.md, by hand.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<UnixStream>,
    next: u64,
}

impl Connection {
    /// Connects.
    pub fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self {
            stream: BufReader::new(stream),
            next: 1,
        })
    }

    /// Sends a line as it is and returns the answer's line.
    pub fn send_line(&mut self, line: &str) -> Result<Value> {
        let stream = self.stream.get_mut();
        stream.write_all(line.as_bytes()).context("sending")?;
        stream.write_all(b"\n").context("sending")?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer).context("receiving")?;
        ensure!(
            !answer.is_empty(),
            "the daemon closed the connection without an answer"
        );
        serde_json::from_str(&answer).with_context(|| format!("not JSON: {answer:?}"))
    }

    /// Sends a request and returns its result.
    pub fn call(&mut self, op: &str, arguments: &Value) -> Result<Value> {
        let id = self.next;
        self.next += 1;
        let request = json!({"v": 1, "id": id, "op": op, "args": arguments});
        let mut answer = self.send_line(&request.to_string())?;
        ensure!(
            answer["id"] == json!(id),
            "an answer to another request: {answer}"
        );
        ensure!(
            answer["ok"] == json!(true),
            "{op} was refused: {}",
            answer["error"]
        );
        Ok(answer["result"].take())
    }
}
