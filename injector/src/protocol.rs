//! What the CLI and the daemon say to each other: newline-delimited JSON over a unix socket,
//! simple enough to be typed into `socat`. `docs/protocol.md` shows every operation with an example.
//!
//! A request is one line, `{"v":1,"id":N,"op":"add","args":{…}}`; the answer is one line with the same
//! `id`, either `{"v":1,"id":N,"ok":true,"result":{…}}` or `{"v":1,"id":N,"ok":false,"error":{…}}`.
//! Requests of one connection are answered in their order.

use std::{ops::AddAssign, path::PathBuf};

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned, de::IgnoredAny};

pub use crate::ssh::OperatorConnection;

use crate::{realised::Realised, rules::RuleSpec};

/// The version of the protocol that this build speaks.
pub const VERSION: u32 = 1;
/// The longest request line that the daemon reads, in bytes, without its newline.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;
/// So many connections are served at once; one more gets an error and is closed.
pub const MAX_CONNECTIONS: usize = 64;
/// So many requests of one connection are begun in a second; more are slowed down, not dropped.
pub const MAX_REQUESTS_PER_SECOND: u32 = 200;

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Chosen by the client; comes back in the answer.
    pub id: u64,
    /// What is asked.
    pub call: Call,
}

/// The operations and their arguments.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// `hello`: who is there. Result: [`DaemonInfo`].
    Hello(HelloArgs),
    /// `add`: add rules, all or none. Result: [`AddResult`].
    Add(AddArgs),
    /// `apply`: make a file's rules the rules. Result: [`AddResult`].
    Apply(ApplyArgs),
    /// `partition`: cut groups of hosts from each other. Result: [`PartitionResult`].
    Partition(PartitionArgs),
    /// `list`: all rules. Result: [`ListResult`].
    List(NoArgs),
    /// `stats`: all counters. Result: [`StatsResult`].
    Stats(NoArgs),
    /// `show`: one rule in full. Result: [`ShowResult`].
    Show(ShowArgs),
    /// `heal`: end rules. Result: [`HealResult`].
    Heal(HealArgs),
    /// `protect`: change the protect list. Result: [`ProtectResult`].
    Protect(ProtectArgs),
    /// `events`: what happened. Result: [`EventsResult`].
    Events(EventsArgs),
    /// `down`: heal everything, detach everything, leave. Result: [`DownResult`].
    Down(NoArgs),
}

impl Call {
    /// The operation's name on the wire.
    #[must_use]
    pub fn op(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Add(_) => "add",
            Self::Apply(_) => "apply",
            Self::Partition(_) => "partition",
            Self::List(_) => "list",
            Self::Stats(_) => "stats",
            Self::Show(_) => "show",
            Self::Heal(_) => "heal",
            Self::Protect(_) => "protect",
            Self::Events(_) => "events",
            Self::Down(_) => "down",
        }
    }
}

/// What is wrong with a line that is not a request, and the `id` to answer to where it could be read.
#[derive(Debug, Clone, PartialEq)]
pub struct Malformed {
    /// The request's id, if the line was well-formed that far.
    pub id: Option<u64>,
    /// What to answer.
    pub error: ErrorBody,
}

/// The parts of a request that say what its arguments are.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    v: u32,
    #[serde(default)]
    id: u64,
    op: String,
    #[serde(default, rename = "args")]
    _args: Option<IgnoredAny>,
}

/// The arguments of a request, whose other parts are known.
#[derive(Deserialize)]
struct Arguments<T> {
    args: Option<T>,
}

impl Request {
    /// Reads one line. `line` is read twice, so that nothing but the arguments' own type is built from
    /// a request of many megabytes.
    ///
    /// # Errors
    /// The line is no JSON object, speaks another version, names an unknown operation, or its
    /// arguments do not fit the operation.
    pub fn parse(line: &[u8]) -> Result<Self, Malformed> {
        let envelope: Envelope = serde_json::from_slice(line).map_err(|error| {
            let id = serde_json::from_slice::<IdOnly>(line)
                .ok()
                .and_then(|only| only.id);
            let message = format!("the request is not a valid request object: {error}");
            Malformed {
                id,
                error: ErrorBody::new(ErrorCode::BadRequest, message).with_hint(
                    r#"one line each, such as {"v":1,"id":1,"op":"list"}; see docs/protocol.md"#,
                ),
            }
        })?;
        let id = envelope.id;
        let malformed = |error| Malformed {
            id: Some(id),
            error,
        };
        if envelope.v != VERSION {
            return Err(malformed(
                ErrorBody::new(
                    ErrorCode::Version,
                    format!(
                        "the request speaks protocol version {}, this daemon speaks {VERSION}",
                        envelope.v
                    ),
                )
                .with_hint("use the CLI of the same version as the daemon, or restart the daemon"),
            ));
        }
        let op = envelope.op.as_str();
        let call = match op {
            "hello" => optional(line, op).map(Call::Hello),
            "add" => required(line, op).map(Call::Add),
            "apply" => required(line, op).map(Call::Apply),
            "partition" => required(line, op).map(Call::Partition),
            "list" => optional(line, op).map(Call::List),
            "stats" => optional(line, op).map(Call::Stats),
            "show" => required(line, op).map(Call::Show),
            "heal" => required(line, op).map(Call::Heal),
            "protect" => optional(line, op).map(Call::Protect),
            "events" => optional(line, op).map(Call::Events),
            "down" => optional(line, op).map(Call::Down),
            unknown => Err(ErrorBody::new(
                ErrorCode::BadRequest,
                format!("there is no operation {unknown:?}"),
            )
            .with_hint(
                "operations: hello, add, apply, partition, list, stats, show, heal, protect, \
                 events, down",
            )),
        };
        call.map(|call| Self { id, call }).map_err(malformed)
    }

    /// The request as one line, newline included.
    ///
    /// # Errors
    /// The arguments cannot be written as JSON (a map key that is no string; none of ours has one).
    pub fn to_line(&self) -> Result<Vec<u8>, serde_json::Error> {
        #[derive(Serialize)]
        struct Line<'a, T> {
            v: u32,
            id: u64,
            op: &'static str,
            args: &'a T,
        }
        fn line<T: Serialize>(
            id: u64,
            op: &'static str,
            args: &T,
        ) -> Result<Vec<u8>, serde_json::Error> {
            let mut bytes = serde_json::to_vec(&Line {
                v: VERSION,
                id,
                op,
                args,
            })?;
            bytes.push(b'\n');
            Ok(bytes)
        }
        let op = self.call.op();
        match &self.call {
            Call::Hello(args) => line(self.id, op, args),
            Call::Add(args) => line(self.id, op, args),
            Call::Apply(args) => line(self.id, op, args),
            Call::Partition(args) => line(self.id, op, args),
            Call::List(args) | Call::Stats(args) | Call::Down(args) => line(self.id, op, args),
            Call::Show(args) => line(self.id, op, args),
            Call::Heal(args) => line(self.id, op, args),
            Call::Protect(args) => line(self.id, op, args),
            Call::Events(args) => line(self.id, op, args),
        }
    }
}

/// Only the id, for an answer to a line that is otherwise wrong.
#[derive(Deserialize)]
struct IdOnly {
    id: Option<u64>,
}

fn arguments<T: DeserializeOwned>(line: &[u8], op: &str) -> Result<Option<T>, ErrorBody> {
    serde_json::from_slice::<Arguments<T>>(line)
        .map(|arguments| arguments.args)
        .map_err(|error| {
            ErrorBody::new(
                ErrorCode::BadRequest,
                format!("the arguments of {op} could not be read: {error}"),
            )
            .with_hint("see docs/protocol.md")
        })
}

fn optional<T: DeserializeOwned + Default>(line: &[u8], op: &str) -> Result<T, ErrorBody> {
    arguments(line, op).map(Option::unwrap_or_default)
}

fn required<T: DeserializeOwned>(line: &[u8], op: &str) -> Result<T, ErrorBody> {
    arguments(line, op)?.ok_or_else(|| {
        ErrorBody::new(
            ErrorCode::BadRequest,
            format!("{op} needs arguments (\"args\")"),
        )
        .with_hint("see docs/protocol.md")
    })
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response<T = serde_json::Value> {
    /// [`VERSION`].
    pub v: u32,
    /// The request's id; absent where the request was so malformed that it had none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Whether `result` or `error` is there.
    pub ok: bool,
    /// What the operation gave.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub result: Option<T>,
    /// Why there is no result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

fn none<T>() -> Option<T> {
    None
}

impl<T> Response<T> {
    /// A result.
    pub fn success(id: u64, result: T) -> Self {
        Self {
            v: VERSION,
            id: Some(id),
            ok: true,
            result: Some(result),
            error: None,
        }
    }

    /// An error.
    #[must_use]
    pub fn failure(id: Option<u64>, error: ErrorBody) -> Self {
        Self {
            v: VERSION,
            id,
            ok: false,
            result: None,
            error: Some(error),
        }
    }

    /// The result or the error, whichever the answer carries.
    ///
    /// # Errors
    /// The daemon answered with an error, or with neither.
    pub fn into_result(self) -> Result<T, ErrorBody> {
        match (self.ok, self.result, self.error) {
            (true, Some(result), _) => Ok(result),
            (_, _, Some(error)) => Err(error),
            _ => Err(ErrorBody::new(
                ErrorCode::Internal,
                "the daemon's answer carries neither a result nor an error",
            )),
        }
    }
}

/// Why an operation was not done. Nothing changed on the host unless the message says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What kind of error: what a program decides by.
    pub code: ErrorCode,
    /// What was attempted, on what, and what went wrong.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ErrorBody {
    /// An error without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
        }
    }

    /// The same with what to do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for ErrorBody {}

/// The kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The line is no request: no JSON, unknown operation or field, too long.
    BadRequest,
    /// Another version of the protocol.
    Version,
    /// A rule, a side or a protect entry that says something impossible.
    Invalid,
    /// A namespace or interface that is not there, or to which the injector does not attach.
    Target,
    /// A rule of this name exists.
    Exists,
    /// No rule or group of this name exists.
    NotFound,
    /// The kernel lacks something.
    Unsupported,
    /// A limit would be exceeded: rules, prefixes, targets, rules per packet, connections.
    Limit,
    /// The daemon lacks a privilege.
    NotPermitted,
    /// The host refused an operation.
    Host,
    /// The daemon is on its way out.
    ShuttingDown,
    /// An error of the daemon's own, or a code that this build does not know.
    #[serde(other)]
    Internal,
}

/// Arguments of operations that take none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoArgs {}

/// Arguments of `hello`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HelloArgs {
    /// Who asks, for the daemon's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
}

/// Arguments of `add`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddArgs {
    /// The rules, all of which are added or none.
    pub rules: Vec<RuleSpec>,
    /// A rule of the same name is replaced instead of being an error.
    #[serde(default)]
    pub replace: bool,
    /// The rules live as long as this connection.
    #[serde(default)]
    pub hold: bool,
    /// Connections that must not be cut.
    #[serde(default)]
    pub operator: Vec<OperatorConnection>,
    /// Everything is checked, nothing is done.
    #[serde(default)]
    pub dry_run: bool,
}

/// Arguments of `apply`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplyArgs {
    /// The rules.
    pub rules: Vec<RuleSpec>,
    /// What happens to rules that are not among them.
    #[serde(default)]
    pub mode: ApplyMode,
    /// Connections that must not be cut.
    #[serde(default)]
    pub operator: Vec<OperatorConnection>,
    /// Everything is checked, nothing is done.
    #[serde(default)]
    pub dry_run: bool,
}

/// What `apply` does with rules that exist. In both modes a rule that exists under the same name and
/// says the same is left alone (it keeps its counters and positions), and one that says something else
/// is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ApplyMode {
    /// Other rules stay.
    #[default]
    Add,
    /// Other rules are healed, except those that a running `exec` holds.
    Replace,
}

/// Arguments of `partition`.
#[expect(
    clippy::struct_excessive_bools,
    reason = "switches that do not depend on each other"
)]
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionArgs {
    /// The sides, at least two, each a list of addresses and prefixes (a bare address is a host).
    #[serde(with = "prefixes")]
    pub sides: Vec<Vec<IpNet>>,
    /// Namespace, as in a rule. Absent: the daemon's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// Interfaces to cut at. Empty: those that the namespace's routes and bridges call for.
    #[serde(default)]
    pub ifaces: Vec<String>,
    /// Only packets from an earlier side to a later one are lost.
    #[serde(default)]
    pub one_way: bool,
    /// Lifetime, as in a rule (`"30s"`).
    #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
    pub lifetime: Option<String>,
    /// Name of the partition (the group of its rules). Absent: derived from its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Seed of its rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// A partition of the same name is replaced instead of being an error.
    #[serde(default)]
    pub replace: bool,
    /// The partition lives as long as this connection.
    #[serde(default)]
    pub hold: bool,
    /// Connections that must not be cut.
    #[serde(default)]
    pub operator: Vec<OperatorConnection>,
    /// Everything is checked, nothing is done.
    #[serde(default)]
    pub dry_run: bool,
}

/// Lists of prefixes as text, in which a bare address stands for a host.
mod prefixes {
    use std::net::IpAddr;

    use ipnet::IpNet;
    use serde::{Deserialize, Deserializer, Serializer, de::Error, ser::SerializeSeq};

    pub(super) fn serialize<S: Serializer>(
        sides: &[Vec<IpNet>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(Some(sides.len()))?;
        for side in sides {
            seq.serialize_element(side)?;
        }
        seq.end()
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Vec<IpNet>>, D::Error> {
        let sides = Vec::<Vec<String>>::deserialize(deserializer)?;
        sides
            .into_iter()
            .map(|side| {
                side.iter()
                    .map(|text| parse(text).map_err(D::Error::custom))
                    .collect::<Result<Vec<_>, _>>()
            })
            .collect()
    }

    pub(super) fn parse(text: &str) -> Result<IpNet, String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(IpNet::from(address));
        }
        text.parse::<IpNet>()
            .map_err(|_| format!("{text:?} is neither an address nor a prefix such as 10.0.0.0/8"))
    }
}

/// Arguments of `show`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShowArgs {
    /// The rule's name.
    pub name: String,
}

/// Arguments of `heal`: either names or all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealArgs {
    /// Rules and groups.
    #[serde(default)]
    pub names: Vec<String>,
    /// Every rule there is.
    #[serde(default)]
    pub all: bool,
    /// What lanes hold by them is dropped instead of leaving at its time.
    #[serde(default)]
    pub flush: bool,
}

/// Arguments of `protect`. Both empty: only says what is protected.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectArgs {
    /// Entries to add: an address or prefix, a port, or both: `10.0.0.1`, `10.0.0.0/8`, `22`,
    /// `tcp/22`, `10.0.0.1:22`, `[fd00::1]:22`, `udp/10.0.0.0/8:53`.
    #[serde(default)]
    pub add: Vec<String>,
    /// Entries to take away.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// Arguments of `events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsArgs {
    /// Only events with a greater sequence number.
    #[serde(default)]
    pub after: u64,
}

/// Result of `hello`, and part of `list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonInfo {
    /// The daemon's process.
    pub pid: u32,
    /// The version of its build.
    pub version: String,
    /// The protocol that it speaks, [`VERSION`].
    pub protocol: u32,
    /// When it started.
    pub started: Timestamp,
    /// Where its socket, lock and journal are.
    pub state_dir: PathBuf,
}

/// Result of `add` and `apply`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AddResult {
    /// The rules that were asked for, as they now are.
    pub rules: Vec<RuleStatus>,
    /// Which of them were there already, saying the same, and were left alone.
    #[serde(default)]
    pub unchanged: Vec<String>,
    /// Rules that were ended by this (`apply` with mode `replace`).
    #[serde(default)]
    pub healed: Vec<String>,
    /// What the user should know: something stands before us, a packet passes two targets, …
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What these rules leave alone although they match it.
    #[serde(default)]
    pub protected: Vec<ProtectedEntry>,
    /// The generation of the rule set that this made.
    pub epoch: u64,
    /// Nanoseconds from reading the request to the kernel acting by it.
    pub effect_ns: u64,
}

/// Result of `partition`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartitionResult {
    /// The group that all its rules are in: what `heal` takes.
    pub group: String,
    /// How the sides became rules, one sentence each.
    pub plan: Vec<String>,
    /// The rules.
    #[serde(flatten)]
    pub added: AddResult,
}

/// Whether a rule acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuleState {
    /// It acts (or flaps, or waits for packets).
    Active,
    /// Its lifetime is over; its counters are kept until it is healed.
    Expired,
    /// None of its targets exists any more; its counters are kept until it is healed.
    Gone,
}

impl std::fmt::Display for RuleState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Active => "active",
            Self::Expired => "expired",
            Self::Gone => "gone",
        })
    }
}

/// One interface in one namespace, as part of a rule's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetRef {
    /// Namespace as a user named it; absent for the daemon's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// Interface name.
    pub iface: String,
    /// Interface index in its namespace.
    pub ifindex: u32,
    /// Whether our filters are on it.
    pub attached: bool,
    /// Why they are not, or what else is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// One rule as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleStatus {
    /// The rule: what `apply` takes.
    pub spec: RuleSpec,
    /// Whether it acts.
    pub state: RuleState,
    /// Why it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// Where it acts.
    pub targets: Vec<TargetRef>,
    /// When it began.
    pub activated_at: Timestamp,
    /// When its lifetime ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Seconds until then, not less than 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining: Option<f64>,
    /// Which activation of its slot this is: a rule that was changed has another one.
    pub activation: u32,
    /// Whether it lives as long as the connection that made it.
    #[serde(default)]
    pub held: bool,
    /// Whether the protect list does not hold for it.
    #[serde(default)]
    pub unprotected: bool,
}

/// Something that rules leave alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProtectedEntry {
    /// What: `tcp 192.0.2.7:50022 <-> 192.0.2.1:22`, `10.0.0.0/8`, `port 22`.
    pub what: String,
    /// Why: the operator's connection, or the protect list.
    pub why: String,
}

/// The lease.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Its length: so long after the daemon's last sign of life rules stop acting.
    pub seconds: f64,
    /// Whether it holds now. Without rules there is none to hold and this is true.
    pub valid: bool,
    /// How often it was found to have lapsed since the daemon started.
    pub lapses: u64,
}

/// Result of `list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListResult {
    /// All rules, ended ones that were not healed yet included, in the order of their making.
    pub rules: Vec<RuleStatus>,
    /// What they leave alone.
    pub protected: Vec<ProtectedEntry>,
    /// The lease.
    pub lease: LeaseStatus,
    /// Who says so.
    pub daemon: DaemonInfo,
    /// The generation of the rule set.
    pub epoch: u64,
}

/// Counters of one rule in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RuleCounters {
    /// Wire packets that matched.
    pub matched_packets: u64,
    /// Their bytes.
    pub matched_bytes: u64,
    /// Wire packets that this rule cut.
    pub cut_packets: u64,
    /// Their bytes.
    pub cut_bytes: u64,
    /// Wire packets that were cut only because they shared a super-packet with one that was asked for.
    pub excess_packets: u64,
    /// Flows seen.
    pub flows: u64,
    /// Wire packets that matched while the rule flapped to off.
    pub off_packets: u64,
    /// Wire packets that matched while the lease had lapsed.
    pub lapsed_packets: u64,
    /// Wire packets decided without a flow's state, because its table was full.
    pub stateless_packets: u64,
    /// Wire packets that loss by chance took.
    #[serde(default)]
    pub lost_packets: u64,
    /// Wire packets that were duplicated.
    #[serde(default)]
    pub duplicated_packets: u64,
    /// The copies made of them.
    #[serde(default)]
    pub copies: u64,
    /// Wire packets that were delayed.
    #[serde(default)]
    pub delayed_packets: u64,
    /// By how much together, in nanoseconds.
    #[serde(default)]
    pub delayed_ns: u64,
    /// Wire packets that were held back.
    #[serde(default)]
    pub reordered_packets: u64,
    /// Wire packets that were lost because they were too long.
    #[serde(default)]
    pub too_long_packets: u64,
    /// Wire packets that went through a line of limited rate.
    #[serde(default)]
    pub queued_packets: u64,
    /// Their bytes, as the line counts them.
    #[serde(default)]
    pub queued_bytes: u64,
    /// How long they waited for it together, in nanoseconds.
    #[serde(default)]
    pub queued_ns: u64,
    /// The longest of these waits.
    #[serde(default)]
    pub queued_max_ns: u64,
    /// How long the line was busy with them, in nanoseconds.
    #[serde(default)]
    pub busy_ns: u64,
    /// Wire packets that were lost because its queue was full.
    #[serde(default)]
    pub overflow_packets: u64,
    /// Wire packets that were marked (ECN).
    #[serde(default)]
    pub marked_packets: u64,
    /// Wire packets that a stall held.
    #[serde(default)]
    pub stalled_packets: u64,
    /// Answers sent to cut packets.
    #[serde(default)]
    pub answered_packets: u64,
    /// Wire packets of which bits were turned over.
    #[serde(default)]
    pub corrupted_packets: u64,
    /// For how long together, in nanoseconds.
    #[serde(default)]
    pub stalled_ns: u64,
    /// The longest that a packet was delayed, held back and stalled together, in nanoseconds.
    #[serde(default)]
    pub given_max_ns: u64,
    /// When the first packet matched, in nanoseconds of the kernel's monotonic clock; 0: never.
    pub first_ns: u64,
    /// When the last one did.
    pub last_ns: u64,
    /// `first_ns` as a time of day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_at: Option<Timestamp>,
    /// `last_ns` as a time of day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_at: Option<Timestamp>,
}

impl AddAssign for RuleCounters {
    /// Sums counts; of the longest times the longer one stays; the first time becomes the earlier one that is set, the
    /// last the later one.
    fn add_assign(&mut self, other: Self) {
        self.matched_packets += other.matched_packets;
        self.matched_bytes += other.matched_bytes;
        self.cut_packets += other.cut_packets;
        self.cut_bytes += other.cut_bytes;
        self.excess_packets += other.excess_packets;
        self.flows += other.flows;
        self.off_packets += other.off_packets;
        self.lapsed_packets += other.lapsed_packets;
        self.stateless_packets += other.stateless_packets;
        self.lost_packets += other.lost_packets;
        self.duplicated_packets += other.duplicated_packets;
        self.copies += other.copies;
        self.delayed_packets += other.delayed_packets;
        self.delayed_ns += other.delayed_ns;
        self.reordered_packets += other.reordered_packets;
        self.too_long_packets += other.too_long_packets;
        self.queued_packets += other.queued_packets;
        self.queued_bytes += other.queued_bytes;
        self.queued_ns += other.queued_ns;
        self.queued_max_ns = self.queued_max_ns.max(other.queued_max_ns);
        self.busy_ns += other.busy_ns;
        self.overflow_packets += other.overflow_packets;
        self.marked_packets += other.marked_packets;
        self.stalled_packets += other.stalled_packets;
        self.answered_packets += other.answered_packets;
        self.corrupted_packets += other.corrupted_packets;
        self.stalled_ns += other.stalled_ns;
        self.given_max_ns = self.given_max_ns.max(other.given_max_ns);
        if other.first_ns != 0 && (self.first_ns == 0 || other.first_ns < self.first_ns) {
            self.first_ns = other.first_ns;
            self.first_at = other.first_at;
        }
        if other.last_ns > self.last_ns {
            self.last_ns = other.last_ns;
            self.last_at = other.last_at;
        }
    }
}

/// Counters of one target in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TargetCounters {
    /// Packets that came by.
    pub seen_packets: u64,
    /// Their bytes.
    pub seen_bytes: u64,
    /// Packets that went on.
    pub passed_packets: u64,
    /// Packets that were cut.
    pub cut_packets: u64,
    /// Packets that could not be parsed, and passed.
    pub unparsed_packets: u64,
    /// Later fragments whose first one was not seen.
    pub orphan_fragments: u64,
    /// Errors of our own; the packet passed, or was cut without the answer that was due.
    pub errors: u64,
    /// Inserts into a full table.
    pub table_full: u64,
    /// Packets that matched a rule while the lease had lapsed.
    pub lapsed_packets: u64,
    /// Packets that matched more rules than one packet can meet.
    pub too_many_rules: u64,
    /// Packets that went into a lane.
    #[serde(default)]
    pub lane_packets: u64,
    /// Packets that could not be sent into a lane, and passed.
    #[serde(default)]
    pub lane_refused: u64,
}

/// What a rule has done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleStats {
    /// Its name.
    pub name: String,
    /// Its group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Whether it acts.
    pub state: RuleState,
    /// What it does: `cut`, `drop-every 10`.
    pub fault: String,
    /// Which packets it is for, as text.
    pub asked: String,
    /// Packets that left.
    pub egress: RuleCounters,
    /// Packets that arrived.
    pub ingress: RuleCounters,
    /// Faults of chance and time, in both directions together: asked, and what became of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub realised: Vec<Realised>,
}

/// What came by a target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetStats {
    /// Namespace as a user named it; absent for the daemon's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// Interface name.
    pub iface: String,
    /// Interface index in its namespace.
    pub ifindex: u32,
    /// Whether our filters are on it.
    pub attached: bool,
    /// Why they are not, or what else is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// What runs before us and may hide packets from us.
    #[serde(default)]
    pub obstacles: Vec<String>,
    /// Rules that act here.
    #[serde(default)]
    pub rules: Vec<String>,
    /// Packets that left.
    pub egress: TargetCounters,
    /// Packets that arrived.
    pub ingress: TargetCounters,
}

/// How full a table of the data plane is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableUse {
    /// The table.
    pub name: String,
    /// Entries in use; absent where counting them would cost too much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<u64>,
    /// Entries that fit.
    pub capacity: u64,
    /// Memory that it takes, in bytes; absent where the kernel does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

/// The lane of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneStats {
    /// The namespace in words.
    pub netns: String,
    /// Packets that it holds now.
    pub queued_packets: u64,
    /// Their bytes.
    pub queued_bytes: u64,
    /// Packets that it can hold: what the rules in force need, up to `daemon --lane-packets`.
    pub capacity_packets: u64,
    /// Memory that they take, in bytes, as it is estimated.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Memory that they may take, in bytes: `daemon --lane-memory`.
    #[serde(default)]
    pub memory_capacity: u64,
    /// Packets that were lost because it was full, by packets or by memory.
    #[serde(default)]
    pub full_packets: u64,
    /// Packets that its queues dropped.
    pub dropped_packets: u64,
    /// Packets that its devices dropped.
    pub device_drops: u64,
    /// Packets that it held, and that neither left nor were dropped by any counter: somebody set a device of it down.
    #[serde(default)]
    pub missing_packets: u64,
    /// Packets that its targets' interfaces dropped as they arrived, since they became targets: those of a full
    /// backlog are among them, through which packets come back from the lane.
    #[serde(default)]
    pub backlog_drops: u64,
    /// What somebody else has done to it: nothing is sent into it until it is made anew for the next rule that needs
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What lanes lost, or met on their devices and know nothing of, since the daemon started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneLosses {
    /// Packets of somebody else's on a lane's devices.
    pub strays: u64,
    /// Copies that could not be sent.
    pub copies: u64,
    /// Packets that could not be brought back.
    pub returns: u64,
    /// Packets that were lost on the way to the line.
    #[serde(default)]
    pub entries: u64,
}

/// Result of `stats`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatsResult {
    /// When these numbers were read.
    pub at: Timestamp,
    /// Per rule.
    pub rules: Vec<RuleStats>,
    /// Per target.
    pub targets: Vec<TargetStats>,
    /// Per table.
    pub tables: Vec<TableUse>,
    /// Per lane.
    #[serde(default)]
    pub lanes: Vec<LaneStats>,
    /// What lanes lost.
    #[serde(default)]
    pub lane_losses: LaneLosses,
    /// Healed rules whose held packets are being dropped.
    #[serde(default)]
    pub flushes: Vec<FlushStatus>,
    /// How often the lease was found to have lapsed.
    pub lapses: u64,
    /// The lease.
    pub lease: LeaseStatus,
}

/// Result of `show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShowResult {
    /// The rule.
    pub rule: RuleStatus,
    /// What it has done.
    pub stats: RuleStats,
    /// Its targets.
    pub targets: Vec<TargetStats>,
    /// What it leaves alone; empty if it is `unprotected`.
    pub protected: Vec<ProtectedEntry>,
}

/// Result of `heal`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HealResult {
    /// The rules that were ended, with their last counters.
    pub healed: Vec<RuleStats>,
    /// Those of them whose held packets are being dropped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flushing: Vec<FlushStatus>,
    /// Whether nothing of ours is left on the host.
    pub host_restored: bool,
    /// What could not be undone.
    #[serde(default)]
    pub problems: Vec<String>,
    /// The generation of the rule set that this made.
    pub epoch: u64,
    /// Nanoseconds from reading the request to the kernel acting by it.
    pub effect_ns: u64,
}

/// A rule that was healed, and whose held packets are being dropped as they come out of their queue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlushStatus {
    /// Its name.
    pub rule: String,
    /// Packets dropped so far that would have left.
    pub egress_packets: u64,
    /// Packets dropped so far that would have arrived.
    pub ingress_packets: u64,
    /// Seconds until nothing of it can be held any more.
    pub remaining: f64,
}

/// Result of `protect`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectResult {
    /// What is protected now.
    pub protected: Vec<ProtectedEntry>,
}

/// Result of `down`. The daemon leaves after having sent it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DownResult {
    /// The rules that were ended, with their last counters.
    pub healed: Vec<RuleStats>,
    /// Whether nothing of ours is left on the host.
    pub host_restored: bool,
    /// What could not be undone.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// Kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The daemon started.
    Started,
    /// What a dead daemon left was undone, or could not be.
    Recovered,
    /// A rule began.
    RuleAdded,
    /// A rule was replaced by one of the same name.
    RuleChanged,
    /// A rule was ended by a command.
    RuleHealed,
    /// A rule's lifetime was over.
    RuleExpired,
    /// A rule lost its last target.
    RuleGone,
    /// A rule was ended because the connection that held it closed.
    HoldReleased,
    /// Nothing is left of what a healed rule held.
    Flushed,
    /// Our filters were put on an interface.
    TargetAttached,
    /// They were taken off again.
    TargetDetached,
    /// The interface or its namespace was deleted.
    TargetGone,
    /// Somebody else removed our filters.
    TargetLost,
    /// Something could not be undone, or the host refused something in passing.
    Problem,
    /// The lease was found to have lapsed.
    LeaseLapsed,
    /// The protect list changed.
    ProtectChanged,
    /// The daemon leaves.
    Stopping,
    /// A kind that this build does not know.
    #[serde(other)]
    Other,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts from 1 since the daemon started.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// What.
    pub kind: EventKind,
    /// The rule that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The target that it is about, `netns/iface` or `iface`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The same for people.
    pub message: String,
}

/// Result of `events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsResult {
    /// The events, oldest first.
    pub events: Vec<Event>,
    /// What to ask `after` next.
    pub last: u64,
    /// Events that were asked for and had been forgotten already.
    #[serde(default)]
    pub missed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_without_arguments_may_leave_them_out() {
        for text in [
            r#"{"v":1,"id":7,"op":"list"}"#,
            r#"{"v":1,"id":7,"op":"list","args":{}}"#,
        ] {
            let request = Request::parse(text.as_bytes()).unwrap();
            assert_eq!(
                request,
                Request {
                    id: 7,
                    call: Call::List(NoArgs {})
                }
            );
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let request = Request {
            id: 3,
            call: Call::Partition(PartitionArgs {
                sides: vec![
                    vec!["10.0.0.1/32".parse().unwrap()],
                    vec!["fd00::/64".parse().unwrap()],
                ],
                one_way: true,
                lifetime: Some("30s".into()),
                ..PartitionArgs::default()
            }),
        };
        let line = request.to_line().unwrap();
        assert_eq!(line.last(), Some(&b'\n'));
        assert_eq!(Request::parse(&line).unwrap(), request);
    }

    #[test]
    fn a_bare_address_is_a_host() {
        let text =
            r#"{"v":1,"op":"partition","args":{"sides":[["10.0.0.1"],["fd00::1","10.1.0.0/16"]]}}"#;
        let Call::Partition(args) = Request::parse(text.as_bytes()).unwrap().call else {
            panic!("another operation");
        };
        assert_eq!(args.sides[0], vec!["10.0.0.1/32".parse::<IpNet>().unwrap()]);
        assert_eq!(args.sides[1][0], "fd00::1/128".parse::<IpNet>().unwrap());
    }

    #[test]
    fn malformed_lines_say_what_is_wrong() {
        let cases = [
            ("nonsense", None, ErrorCode::BadRequest, "expected"),
            (r#"{"v":1,"id":4}"#, Some(4), ErrorCode::BadRequest, "op"),
            (
                r#"{"v":2,"id":4,"op":"list"}"#,
                Some(4),
                ErrorCode::Version,
                "version 2",
            ),
            (
                r#"{"v":1,"id":4,"op":"lits"}"#,
                Some(4),
                ErrorCode::BadRequest,
                "lits",
            ),
            (
                r#"{"v":1,"id":4,"op":"show"}"#,
                Some(4),
                ErrorCode::BadRequest,
                "args",
            ),
            (
                r#"{"v":1,"id":4,"op":"heal","args":{"nmaes":[]}}"#,
                Some(4),
                ErrorCode::BadRequest,
                "nmaes",
            ),
            (
                r#"{"v":1,"id":4,"op":"partition","args":{"sides":[["10.0.0.300"]]}}"#,
                Some(4),
                ErrorCode::BadRequest,
                "10.0.0.300",
            ),
        ];
        for (line, id, code, fragment) in cases {
            let malformed = Request::parse(line.as_bytes()).unwrap_err();
            assert_eq!(malformed.id, id, "{line}");
            assert_eq!(malformed.error.code, code, "{line}");
            assert!(
                malformed.error.message.contains(fragment),
                "{line}: {}",
                malformed.error
            );
        }
    }

    #[test]
    fn a_code_from_a_later_version_is_still_an_error() {
        let line = r#"{"v":1,"id":1,"ok":false,"error":{"code":"quota","message":"m"}}"#;
        let response: Response = serde_json::from_str(line).unwrap();
        assert_eq!(
            response.into_result().unwrap_err().code,
            ErrorCode::Internal
        );
    }

    #[test]
    fn counters_add_up() {
        let mut sum = RuleCounters {
            matched_packets: 2,
            first_ns: 50,
            last_ns: 60,
            ..Default::default()
        };
        sum += RuleCounters {
            matched_packets: 3,
            first_ns: 40,
            last_ns: 45,
            ..Default::default()
        };
        sum += RuleCounters::default();
        assert_eq!(
            (sum.matched_packets, sum.first_ns, sum.last_ns),
            (5, 40, 60)
        );
    }
}
