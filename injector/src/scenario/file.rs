//! The scenario file: its types, from which its JSON Schema is made, and reading it with the place of every mistake.

use std::{collections::BTreeMap, fmt, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Location, Spanned};

pub use super::{nemesis::Nemesis, shape::Partition, vocabulary::Profile};
use crate::rules::{RuleSpec, text::duration};

/// A span of time: `500ms`, `1m30s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Period(pub Duration);

impl Period {
    /// Of so many seconds.
    #[must_use]
    pub const fn secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&duration::format(self.0))
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "0" => Ok(Self::default()),
            text => duration::parse(text).map(Self).map_err(|problem| {
                D::Error::custom(format!("'{text}' {}; {}", problem.problem, problem.help))
            }),
        }
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for Period {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Period".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "description": "A span of time: 500ms, 1.5s, 1m30s; 0",
            "examples": ["500ms", "1m30s"],
        })
    }
}

/// One text, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// `a`
    One(String),
    /// `[a, b]`
    Many(Vec<String>),
}

impl OneOrMany {
    /// As a list.
    #[must_use]
    pub fn list(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

impl From<Vec<String>> for OneOrMany {
    fn from(many: Vec<String>) -> Self {
        Self::Many(many)
    }
}

impl<'de> Deserialize<'de> for OneOrMany {
    // Derived, a mistake within would be reported as one of the whole, without its place.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of texts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMany, A::Error> {
                let mut many = Vec::new();
                while let Some(text) = list.next_element()? {
                    many.push(text);
                }
                Ok(OneOrMany::Many(many))
            }
        }

        deserializer.deserialize_any(Texts)
    }
}

/// A command: a text is given to `sh -c`, a list is a program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum CommandLine {
    /// For the shell.
    Shell(String),
    /// A program and its arguments.
    Program(Vec<String>),
}

impl<'de> Deserialize<'de> for CommandLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match OneOrMany::deserialize(deserializer)? {
            OneOrMany::Many(words) if words.is_empty() => {
                Err(D::Error::custom("a command needs a program"))
            }
            OneOrMany::Many(words) => Ok(Self::Program(words)),
            OneOrMany::One(text) if text.trim().is_empty() => {
                Err(D::Error::custom("a command must not be empty"))
            }
            OneOrMany::One(text) => Ok(Self::Shell(text)),
        }
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shell(text) => f.write_str(text.trim()),
            Self::Program(words) => f.write_str(&words.join(" ")),
        }
    }
}

/// A scenario: hosts, faults over time, and what must stay true.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Name of the scenario: lower-case letters, digits, dashes.
    pub name: String,
    /// What it shows, for whoever reads the report.
    #[serde(default)]
    pub description: Option<String>,
    /// Seed of everything that is left to chance; drawn, and reported, where absent.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Names of hosts and their addresses. A lab's nodes are hosts without being named here.
    #[serde(default)]
    pub hosts: BTreeMap<String, OneOrMany>,
    /// Where rules act that do not say so themselves.
    #[serde(default)]
    pub targets: Targets,
    /// Nodes to make for this run, and services to start in them.
    #[serde(default)]
    pub lab: Option<Lab>,
    /// What happens, in order.
    #[serde(default)]
    #[schemars(with = "Vec<Step>")]
    pub steps: Vec<Spanned<Step>>,
    /// What must stay true, or is measured.
    #[serde(default)]
    #[schemars(with = "Vec<Check>")]
    pub checks: Vec<Spanned<Check>>,
    /// How long the steady state may take to come about before the first step.
    #[serde(default = "steady_within")]
    pub steady_within: Period,
    /// How long the run goes on after the last fault was healed.
    #[serde(default = "settle")]
    pub settle: Period,
    /// How the run is expected to end; a run that fails as expected is a success.
    #[serde(default = "passed")]
    #[schemars(with = "Expectation")]
    pub expect: Spanned<Expectation>,
    /// Where reports go.
    #[serde(default)]
    pub report: Reports,
}

fn steady_within() -> Period {
    Period::secs(30)
}

fn settle() -> Period {
    Period::secs(5)
}

/// What is expected where the file does not say it.
const fn passed() -> Spanned<Expectation> {
    Spanned::new(Expectation::Passed, Location::UNKNOWN, Location::UNKNOWN)
}

/// How a run is expected to end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Expectation {
    /// Everything holds.
    #[default]
    Passed,
    /// Checks fail, whichever, and nothing else does: the service is known not to stand this.
    Failed,
    /// These checks fail, and nothing else does: `{fails: [no-write-is-lost]}`.
    Fails(OneOrMany),
}

/// Where rules act that do not say so themselves. In a lab that is `eth0` of each node that a step is about.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Targets {
    /// Interfaces. Where absent, a partition takes those that lead to the hosts that it cuts off.
    #[serde(default)]
    pub iface: Vec<String>,
    /// Network namespace.
    #[serde(default)]
    pub netns: Option<String>,
}

/// Where reports go. Relative paths are relative to the working directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Reports {
    /// The directory of all of them, if not given on the command line.
    #[serde(default)]
    pub dir: Option<String>,
}

/// When a step begins that does not simply follow the one before it, and what it does: exactly one of the fields
/// from `rule` to `profile`.
///
/// A step follows the one before it in its group. A fault with `for` ends when that time is over; one without stays,
/// its step ends at once, and it is healed by a `heal` step or at the end of the run.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Step {
    /// Name, for `after`, `heal` and the report; made from the place of the step where absent.
    pub name: Option<String>,
    /// It begins so long after its group did, whatever has become of the step before it.
    pub at: Option<Period>,
    /// It begins when another step of its group has ended (or begun), whatever has become of the step before it.
    pub after: Option<After>,
    /// Once it could begin it waits until a check has turned true or false.
    pub when: Option<When>,
    /// How long the fault lasts, or the process is paused; of a killed service, when it is started again; of a group,
    /// when all of it ends, and faults that it has begun are healed.
    #[serde(rename = "for")]
    pub lasts: Option<Period>,
    /// Hosts that act; all where absent. A host that plays the file does the part of those that it is itself; a
    /// run with a lab does that of all nodes.
    pub on: Option<OneOrMany>,
    /// Whether the fault is expected to meet packets; if it does not, the run fails. True where absent.
    pub expect_effect: Option<bool>,

    /// A fault: any rule that `injector apply` takes; names of hosts may stand for addresses.
    pub rule: Option<RuleSpec>,
    /// Hosts are cut from each other.
    pub partition: Option<Partition>,
    /// Faults of these steps are healed, or `all`.
    pub heal: Option<OneOrMany>,
    /// A command is run to its end.
    pub run: Option<Run>,
    /// Processes stand still, as in a long garbage collection or a paused virtual machine.
    pub pause: Option<Processes>,
    /// Paused processes go on.
    pub resume: Option<Processes>,
    /// Processes get a signal.
    pub kill: Option<Kill>,
    /// A service of the lab that has ended is started again.
    pub start: Option<String>,
    /// Nothing happens for so long.
    pub wait: Option<Period>,
    /// Steps, one after the other.
    #[schemars(with = "Option<Vec<Step>>")]
    pub sequence: Option<Vec<Spanned<Step>>>,
    /// Steps that begin together.
    #[schemars(with = "Option<Vec<Step>>")]
    pub parallel: Option<Vec<Spanned<Step>>>,
    /// Steps, again and again.
    #[serde(rename = "loop")]
    pub repeat: Option<Loop>,
    /// A fault whose strength grows or shrinks.
    pub ramp: Option<Ramp>,
    /// One of several steps, drawn from the seed.
    #[schemars(with = "Option<Vec<Step>>")]
    pub choose: Option<Vec<Spanned<Step>>>,
    /// A random sequence of faults, drawn from the seed.
    pub nemesis: Option<Nemesis>,
    /// A network, host or system model by name.
    pub profile: Option<Profile>,
}

/// After which step, and how long after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum After {
    /// When it has ended.
    Ended(String),
    /// More precisely.
    Precisely(AfterStep),
}

/// After which step, and how long after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AfterStep {
    /// The step.
    pub step: String,
    /// Whether its beginning or its end counts.
    #[serde(default)]
    pub of: Edge,
    /// So long after that.
    #[serde(default)]
    pub plus: Period,
}

/// The beginning or the end of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Edge {
    /// Its beginning.
    Start,
    /// Its end.
    #[default]
    End,
}

impl After {
    /// In the precise form.
    #[must_use]
    pub fn precisely(&self) -> AfterStep {
        match self {
            Self::Ended(step) => AfterStep {
                step: step.clone(),
                of: Edge::End,
                plus: Period::default(),
            },
            Self::Precisely(after) => after.clone(),
        }
    }
}

impl<'de> Deserialize<'de> for After {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_map(
            "a step's name, or {step, of, plus}",
            After::Ended,
            After::Precisely,
            deserializer,
        )
    }
}

/// Reads a value that is either a text or a map, with the place of mistakes within.
fn text_or_map<'de, D: Deserializer<'de>, T, M: Deserialize<'de>>(
    expected: &'static str,
    of_text: impl FnOnce(String) -> T,
    of_map: impl FnOnce(M) -> T,
    deserializer: D,
) -> Result<T, D::Error> {
    struct Either<T, M, F, G>(&'static str, F, G, std::marker::PhantomData<(T, M)>);

    impl<'de, T, M: Deserialize<'de>, F: FnOnce(String) -> T, G: FnOnce(M) -> T> Visitor<'de>
        for Either<T, M, F, G>
    {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            Ok(self.1(text.to_owned()))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<T, A::Error> {
            M::deserialize(de::value::SeqAccessDeserializer::new(list)).map(self.2)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            M::deserialize(de::value::MapAccessDeserializer::new(map)).map(self.2)
        }
    }

    deserializer.deserialize_any(Either(expected, of_text, of_map, std::marker::PhantomData))
}

/// When a check turns true or false. It counts from when the group of the step begins; a check that is so already
/// counts at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct When {
    /// The check.
    pub check: String,
    /// Which way.
    pub is: CheckState,
    /// How long to wait for it; if it does not come about, the run fails.
    #[serde(default = "when_within")]
    pub within: Period,
}

fn when_within() -> Period {
    Period::secs(60)
}

/// What the last answer of a check was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    /// It held.
    Holding,
    /// It failed.
    Failing,
}

/// A command that is run to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Run {
    /// For the shell; it must succeed.
    Shell(CommandLine),
    /// More precisely.
    Precisely(RunCommand),
}

impl Run {
    /// In the precise form.
    #[must_use]
    pub fn precisely(&self) -> RunCommand {
        match self {
            Self::Shell(command) => RunCommand::new(command.clone()),
            Self::Precisely(run) => run.clone(),
        }
    }
}

impl<'de> Deserialize<'de> for Run {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_map(
            "a command, or {command, until, within, every}",
            |text| Run::Shell(CommandLine::Shell(text)),
            |of: CommandOrPrecisely| match of {
                CommandOrPrecisely::Program(words) => Run::Shell(CommandLine::Program(words)),
                CommandOrPrecisely::Precisely(run) => Run::Precisely(run),
            },
            deserializer,
        )
    }
}

/// What a run step has if it is no text.
enum CommandOrPrecisely {
    Program(Vec<String>),
    Precisely(RunCommand),
}

impl<'de> Deserialize<'de> for CommandOrPrecisely {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = CommandOrPrecisely;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a command, or {command, until, within, every}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(list))
                    .map(CommandOrPrecisely::Program)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                RunCommand::deserialize(de::value::MapAccessDeserializer::new(map))
                    .map(CommandOrPrecisely::Precisely)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// A command, and what is expected of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunCommand {
    /// The command.
    pub command: CommandLine,
    /// What is expected: if it does not come about, the run fails.
    #[serde(default)]
    pub expect: Outcome,
    /// How long it may take. Where `every` is given: how long to try again until it comes out as expected.
    #[serde(default = "run_within")]
    pub within: Period,
    /// Try again so often.
    #[serde(default)]
    pub every: Option<Period>,
}

impl RunCommand {
    /// A command that must succeed.
    #[must_use]
    pub fn new(command: CommandLine) -> Self {
        Self {
            command,
            expect: Outcome::Success,
            within: run_within(),
            every: None,
        }
    }
}

fn run_within() -> Period {
    Period::secs(60)
}

/// How a command is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// With exit code 0.
    #[default]
    Success,
    /// With another one, or not in time.
    Failure,
    /// In any way.
    Any,
}

/// A command that names somebody, such as the current leader.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// The command.
    pub command: CommandLine,
    /// The node of a lab in which it is run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
}

/// Which processes: exactly one of these.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Processes {
    /// A service of the lab, with all its processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Whoever a command names, by its first word: a service, the services of a node, or a process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
    /// A process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// A file with a process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<String>,
    /// All processes of this name (`/proc/PID/comm`), which must exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// A unit of systemd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// A control group (version 2): its path below the root of the hierarchy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
}

/// Processes, and the signal for them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kill {
    /// See [`Processes::service`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// See [`Processes::asked`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
    /// See [`Processes::pid`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// See [`Processes::pid_file`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<String>,
    /// See [`Processes::process`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// See [`Processes::unit`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// See [`Processes::cgroup`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// `KILL` unless another one is given: `TERM`, `HUP`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
}

impl Kill {
    /// Which processes.
    #[must_use]
    pub fn processes(&self) -> Processes {
        Processes {
            service: self.service.clone(),
            asked: self.asked.clone(),
            pid: self.pid,
            pid_file: self.pid_file.clone(),
            process: self.process.clone(),
            unit: self.unit.clone(),
            cgroup: self.cgroup.clone(),
        }
    }
}

/// Steps, again and again.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Loop {
    /// How often, up to 10,000.
    pub times: u32,
    /// The steps.
    #[schemars(with = "Vec<Step>")]
    pub steps: Vec<Spanned<Step>>,
}

/// A fault whose strength changes in even steps from one value to another.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// The fault; the changing field is left out.
    pub rule: RuleSpec,
    /// The field of its `fault` that changes: `delay`, `rate`, `loss`, …
    pub field: String,
    /// The first value: `0ms`, `100mbit`, `0%`; its unit is that of all of them.
    pub from: String,
    /// The last value.
    pub to: String,
    /// How long it takes from the first to the last.
    pub over: Period,
    /// How many values there are; 20 where absent.
    #[serde(default = "ramp_steps")]
    pub steps: u32,
}

fn ramp_steps() -> u32 {
    20
}

/// Network namespaces, joined by a bridge, that live as long as the run.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lab {
    /// How many nodes (named n1, n2, …), or their names. They can be used wherever a host can.
    pub nodes: Nodes,
    /// Services to start in them, one after the other.
    #[serde(default)]
    #[schemars(with = "Vec<Service>")]
    pub services: Vec<Spanned<Service>>,
}

/// How many nodes, or their names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Nodes {
    /// So many.
    Count(u8),
    /// These.
    Names(Vec<String>),
}

impl Nodes {
    /// The nodes' names.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::Count(count) => (1..=*count).map(|number| format!("n{number}")).collect(),
            Self::Names(names) => names.clone(),
        }
    }
}

/// A program that runs in a node for as long as the run.
///
/// Its environment has `HOST_<name>`, the IPv4 address of each host (dashes of names become underscores), and
/// `RUN_DIR`, a directory of this run that is removed at its end. What it prints goes into a file beside the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Name.
    pub name: String,
    /// The node that it runs in.
    pub on: String,
    /// A command that is run to its end before the service starts for the first time.
    #[serde(default)]
    pub prepare: Option<CommandLine>,
    /// The service itself; it must stay in the foreground.
    pub run: CommandLine,
    /// The user that it runs as, for services that refuse to run as root.
    #[serde(default)]
    pub user: Option<String>,
    /// More environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// When it is ready; the next service waits for that.
    #[serde(default)]
    pub ready: Option<Probe>,
    /// How long that may take.
    #[serde(default = "ready_within")]
    pub ready_within: Period,
}

fn ready_within() -> Period {
    Period::secs(30)
}

/// How to ask whether something holds: exactly one of these.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// A command that succeeds (exit code 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandLine>,
    /// A TCP connection that is accepted: `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    /// An HTTP request that is answered as expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<Http>,
    /// A long-running command that prints a line of JSON for each of its own probes:
    /// `{"ok": true, "latency_ms": 1.5, "detail": "…"}`, of which only `ok` has to be there. It runs from before the
    /// first step until the end, in place of being asked again and again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<CommandLine>,
}

/// An HTTP request (HTTP/1.1, in the clear; for anything else use a command), and the answer that is expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// `http://HOST:PORT/PATH`
    pub url: String,
    /// `GET` unless another one is given.
    #[serde(default = "get")]
    pub method: String,
    /// Body of the request.
    #[serde(default)]
    pub body: Option<String>,
    /// Headers of the request.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Status of the answer; any from 200 to 299 where absent.
    #[serde(default)]
    pub status: Option<u16>,
    /// A text that must be in the answer's body.
    #[serde(default)]
    pub contains: Option<String>,
}

fn get() -> String {
    "GET".to_owned()
}

/// What a check that fails means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It must never fail.
    Safety,
    /// It may fail during faults, and must hold again within `recovers_within` after the last fault was healed.
    Liveness,
    /// It is recorded and does not judge.
    Measure,
}

/// Something that must stay true, or is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// Name.
    pub name: String,
    /// What its failure means.
    pub kind: Kind,
    /// The node of the lab that it is asked from; the host itself where absent.
    #[serde(default)]
    pub on: Option<String>,
    /// See [`Probe::command`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandLine>,
    /// See [`Probe::tcp`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    /// See [`Probe::http`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<Http>,
    /// See [`Probe::stream`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<CommandLine>,
    /// How often; the next time comes after the last answer at the earliest.
    #[serde(default = "every")]
    pub every: Period,
    /// When no answer is a failure.
    #[serde(default = "timeout")]
    pub timeout: Period,
    /// Of a liveness check: how long after the last fault was healed it may still fail.
    #[serde(default = "recovers_within")]
    pub recovers_within: Period,
    /// Asked once, after everything is healed and has settled, in place of all the time.
    #[serde(default)]
    pub at_end: bool,
}

impl Probe {
    /// What is asked, in words.
    #[must_use]
    pub fn words(&self) -> String {
        if let Some(command) = self.command.as_ref().or(self.stream.as_ref()) {
            let text = command.to_string();
            let mut lines = text.lines();
            let first = lines.next().unwrap_or_default().to_owned();
            if lines.next().is_some() {
                return format!("{first} …");
            }
            first
        } else if let Some(tcp) = &self.tcp {
            format!("connect to {tcp}")
        } else if let Some(http) = &self.http {
            format!("{} {}", http.method, http.url)
        } else {
            String::new()
        }
    }
}

impl Check {
    /// What is asked, in words.
    #[must_use]
    pub fn words(&self) -> String {
        let from = self
            .on
            .as_ref()
            .map_or_else(String::new, |on| format!(" (from {on})"));
        format!("{}{from}", self.probe().words())
    }

    /// How to ask.
    #[must_use]
    pub fn probe(&self) -> Probe {
        Probe {
            command: self.command.clone(),
            tcp: self.tcp.clone(),
            http: self.http.clone(),
            stream: self.stream.clone(),
        }
    }
}

fn every() -> Period {
    Period::secs(1)
}

fn timeout() -> Period {
    Period::secs(1)
}

fn recovers_within() -> Period {
    Period::secs(10)
}

/// Why a file is no scenario, with the place in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}{}: {problem}", place(self.at.as_ref()))]
pub struct FileError {
    /// The file, as the user named it.
    pub path: String,
    /// Line and column, from 1.
    pub at: Option<Place>,
    /// What is wrong, and what was expected.
    pub problem: String,
    /// The lines around it, with the place marked.
    pub excerpt: Option<String>,
}

fn place(at: Option<&Place>) -> String {
    at.map_or_else(String::new, |at| format!(":{}:{}", at.line, at.column))
}

/// A place in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// Line, from 1.
    pub line: u64,
    /// Column, from 1.
    pub column: u64,
}

impl<T> From<&Spanned<T>> for Place {
    fn from(spanned: &Spanned<T>) -> Self {
        Self {
            line: spanned.referenced.line(),
            column: spanned.referenced.column(),
        }
    }
}

/// Reads a scenario, YAML or JSON (which is YAML too). What it says is not yet checked: see [`super::plan`].
pub fn read(path: &str, text: &str) -> Result<Scenario, FileError> {
    // By YAML 1.1 `y`, `no` and `off` are truth values; here they are names, as by YAML 1.2.
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let at = error.location().map(|at| Place {
            line: at.line(),
            column: at.column(),
        });
        let rendered = error.to_string();
        let mut lines = rendered.lines();
        let first = lines.next().unwrap_or_default();
        // "error: line 4 column 5: unknown field …"
        let problem = first.trim_start_matches("error: ");
        let problem = match at {
            Some(at) => problem
                .strip_prefix(&format!("line {} column {}: ", at.line, at.column))
                .unwrap_or(problem),
            None => problem,
        };
        let excerpt: Vec<&str> = lines.skip(1).collect();
        FileError {
            path: path.to_owned(),
            at,
            problem: problem.to_owned(),
            excerpt: (!excerpt.is_empty()).then(|| excerpt.join("\n")),
        }
    })
}

/// The JSON Schema of a scenario file.
#[must_use]
pub fn schema() -> Schema {
    let mut schema = schemars::schema_for!(Scenario);
    schema.insert("title".to_owned(), "injector scenario".into());
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_and_json_are_the_same() {
        let yaml = "name: x\nsteps:\n  - at: 5s\n    run: echo hello\n  - run: [echo, hello]\n  - run: {command: 'false', expect: failure, within: 3s}\n";
        let json = r#"{"name": "x", "steps": [{"at": "5s", "run": "echo hello"}, {"run": ["echo", "hello"]},
            {"run": {"command": "false", "expect": "failure", "within": "3s"}}]}"#;
        let steps = |text: &str| -> Vec<Step> {
            read("f", text)
                .unwrap()
                .steps
                .into_iter()
                .map(|step| step.value)
                .collect()
        };
        assert_eq!(steps(yaml), steps(json));
        assert_eq!(steps(yaml)[0].at, Some(Period::secs(5)));
        assert_eq!(
            steps(yaml)[2].run.as_ref().unwrap().precisely().expect,
            Outcome::Failure
        );
    }

    #[test]
    fn mistakes_have_their_places() {
        for (text, line, column, words) in [
            (
                "name: x\nsteps:\n  - att: 5s\n",
                3,
                5,
                "unknown field `att`",
            ),
            ("name: x\nsteps:\n  - at: 5\n", 3, 9, "5 has no unit"),
            (
                "name: x\nsteps:\n  - run: {commando: a}\n",
                3,
                11,
                "commando",
            ),
            (
                "name: x\nsteps:\n  - after: {step: a, of: middle}\n",
                3,
                26,
                "middle",
            ),
            (
                "name: x\nchecks:\n  - {name: c, kind: important}\n",
                3,
                21,
                "important",
            ),
            ("name: x\nsteps: [\n", 2, 8, "bracket"),
            ("steps: []\n", 1, 1, "missing field `name`"),
        ] {
            let error = read("f.yaml", text).unwrap_err();
            let at = error.at.unwrap();
            assert_eq!((at.line, at.column), (line, column), "{text}: {error:?}");
            assert!(error.problem.contains(words), "{text}: {error:?}");
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("f.yaml:{line}:{column}: "))
            );
            assert!(error.excerpt.is_some());
        }
    }

    #[test]
    fn the_schema_knows_every_field() {
        let schema = serde_json::to_value(schema()).unwrap();
        let step = &schema["$defs"]["Step"]["properties"];
        for field in [
            "at",
            "for",
            "loop",
            "rule",
            "nemesis",
            "profile",
            "partition",
        ] {
            assert!(step.get(field).is_some(), "{field}: {step}");
        }
        assert_eq!(schema["$defs"]["Step"]["additionalProperties"], false);
        assert!(schema["$defs"]["RuleSpec"]["properties"]["peer_port"].is_object());
    }
}
