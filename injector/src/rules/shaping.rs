//! Faults that a lane gives to single wire packets: loss by chance, corruption, duplication, delay, holding back.
//! Their values, and their text form both ways.

use std::{fmt::Write as _, time::Duration};

use super::{
    error::{Problem, SpecError},
    numbers::Numbers,
    spec::FaultSpec,
    text::{distribution, duration, rate, share, size},
    trace::Trace,
};

/// What a rule does to packets besides cutting them. Stages act in the order of the fields, each for itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shaping {
    /// The longest IP packet that passes, in bytes.
    pub mtu_blackhole: Option<u32>,
    /// Loss by chance.
    pub loss: Option<Loss>,
    /// Corruption.
    pub corrupt: Option<Corrupt>,
    /// Duplication.
    pub duplicate: Option<Duplicate>,
    /// A line of limited rate.
    pub rate: Option<Rate>,
    /// Delay.
    pub delay: Option<Delay>,
    /// Holding some packets back.
    pub reorder: Option<Reorder>,
    /// Holding everything for a while.
    pub stall: Option<Stall>,
}

/// Loss by chance, with netem's models and parameters. Probabilities are thresholds from 0 to 2^32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Each packet for itself.
    Bernoulli(u64),
    /// Gilbert-Elliott: two states, good and bad.
    GilbertElliott {
        /// From good to bad (p).
        to_bad: u64,
        /// From bad to good (r).
        to_good: u64,
        /// Loss in the bad state (1-h).
        in_bad: u64,
        /// Loss in the good state (1-k).
        in_good: u64,
    },
    /// Four states: 1 received in a gap, 2 received in a burst, 3 lost in a burst, 4 lost in a gap.
    FourStates {
        /// From 1 to 3.
        p13: u64,
        /// From 3 to 1.
        p31: u64,
        /// From 3 to 2.
        p32: u64,
        /// From 2 to 3.
        p23: u64,
        /// From 1 to 4.
        p14: u64,
    },
}

/// Corruption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corrupt {
    /// Of each packet, a threshold from 1 to 2^32.
    pub probability: u64,
    /// Distinct bits that are turned over: 1 to 32. In packets with fewer, all of those.
    pub bits: u32,
    /// Which bits.
    pub part: Part,
    /// What becomes of checksums.
    pub checksum: Checksum,
}

/// A part of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Part {
    /// Headers and payload.
    #[default]
    Any,
    /// IP with options or extension headers, and the header of the upper layer.
    Header,
    /// What follows them.
    Payload,
}

impl Part {
    const ALL: [Self; 3] = [Self::Any, Self::Header, Self::Payload];

    fn name(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Header => "header",
            Self::Payload => "payload",
        }
    }
}

/// What becomes of the checksums of a corrupted packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Checksum {
    /// They stay as they were, so that the receiver's stack finds the error.
    #[default]
    Broken,
    /// They are made right, so that the application gets wrong bytes.
    Repaired,
}

impl Checksum {
    const ALL: [Self; 2] = [Self::Broken, Self::Repaired];

    fn name(self) -> &'static str {
        match self {
            Self::Broken => "broken",
            Self::Repaired => "repaired",
        }
    }
}

/// Duplication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Duplicate {
    /// Of each packet, a threshold from 1 to 2^32.
    pub probability: u64,
    /// Copies besides the original: 1 to 8.
    pub copies: u32,
    /// What they leave after it.
    pub copy_delay: Duration,
}

/// Delay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delay {
    /// Its mean (for [`Distribution::Exponential`] the least; [`Distribution::Samples`] come on top).
    pub base: Duration,
    /// Its spread: half the width of the uniform distribution, else the standard deviation. Zero for none, and
    /// under [`Distribution::Samples`].
    pub jitter: Duration,
    /// How it is spread.
    pub distribution: Distribution,
    /// With the delay of the packet before, in 2^16; below 2^16.
    pub correlation: u32,
    /// Whether a packet may overtake earlier ones of its flow.
    pub order: Order,
}

/// Distributions of delay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub enum Distribution {
    /// Evenly between mean less jitter and mean plus jitter.
    #[default]
    Uniform,
    /// Gaussian.
    Normal,
    /// Pareto, shape 3, scaled to the standard deviation.
    Pareto,
    /// A quarter normal, three quarters Pareto, as netem mixes them.
    ParetoNormal,
    /// The jitter is the mean of what is added to the delay.
    Exponential,
    /// Log-normal, shape 1, scaled to the standard deviation.
    LogNormal,
    /// Given: what netem draws from, where
    /// [`TABLE_SCALE`](super::text::distribution::TABLE_SCALE) stands for the jitter.
    Table(Numbers),
    /// Given: the delays themselves, in nanoseconds; none below zero.
    Samples(Numbers),
}

impl Distribution {
    /// Those that have nothing but a name.
    pub const NAMED: [Self; 6] = [
        Self::Uniform,
        Self::Normal,
        Self::Pareto,
        Self::ParetoNormal,
        Self::Exponential,
        Self::LogNormal,
    ];

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Normal => "normal",
            Self::Pareto => "pareto",
            Self::ParetoNormal => "paretonormal",
            Self::Exponential => "exponential",
            Self::LogNormal => "lognormal",
            Self::Table(_) => "table",
            Self::Samples(_) => "samples",
        }
    }
}

/// Order within a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Order {
    /// No packet overtakes an earlier one: it waits for it.
    #[default]
    Keep,
    /// Each packet leaves at its own time.
    Free,
}

/// Holding some packets back, while the others are not delayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reorder {
    /// Of each packet, a threshold from 1 to 2^32.
    pub probability: u64,
    /// For how long.
    pub hold: Duration,
}

/// A line of limited rate, with a queue in front of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rate {
    /// How fast it is.
    pub speed: Speed,
    /// How much waits at most.
    pub queue: QueueLimit,
    /// Bytes by which a packet is longer on the line than its frame; under a trace, than its IP packet with the four
    /// bytes that Mahimahi counts too. From -1000 to 1000; a packet has one byte at least.
    pub overhead: i32,
    /// Which packets share a line.
    pub share: RateShare,
    /// Packets that wait longer are marked (ECN).
    pub ecn: Option<Duration>,
}

/// How fast a line is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Speed {
    /// So many bits per second.
    Constant(u64),
    /// As a trace says.
    Trace(Trace),
}

/// How much waits in front of a line at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueLimit {
    /// A packet that would have to wait longer for its turn is lost.
    Time(Duration),
    /// A packet is lost if, with it, more bytes than these would still be to go (what is left of the packet on the
    /// line included), as the line counts them; an idle line takes any packet.
    Bytes(u64),
    /// A packet is lost if so many packets wait for their turns, 1 to 10,000.
    Packets(u32),
}

/// Which packets share a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum RateShare {
    /// All of the rule, in one direction.
    #[default]
    Rule,
    /// Those of a flow.
    Flow,
    /// Those of a peer.
    Peer,
}

/// Holding everything, then letting it go at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// For how long, from the rule's activation on.
    pub length: Duration,
    /// From the beginning of one stall to that of the next; one only where it is absent.
    pub every: Option<Duration>,
}

/// The queue in front of a line where none is asked for.
const DEFAULT_QUEUE: Duration = Duration::from_millis(100);

/// Bits of one packet that a rule turns over at most.
pub const MAX_BITS: u32 = injector_common::layout::MAX_BITS;

/// The longest that a packet waits in a queue that is limited in packets, whose length in time nobody knows.
const LONGEST_QUEUE: Duration = Duration::from_mins(15);

/// Packets that a queue can be limited to.
const QUEUE_PACKETS: std::ops::RangeInclusive<u32> = 1..=10_000;

/// Bytes of the longest packet on a line.
const LONGEST_PACKET: u64 = 65_535 + 1000;

/// Copies of one packet at most.
pub const MAX_COPIES: u32 = injector_common::layout::MAX_COPIES;

/// The longest that a fault may hold a packet: fq keeps horizons in 32 bits of microseconds
/// (`TCA_FQ_HORIZON`, `include/uapi/linux/pkt_sched.h`), which is 71 minutes.
pub const LONGEST_HOLD: Duration = Duration::from_hours(1);

/// Something that holds packets.
struct Hold {
    /// The field that asks for it.
    field: &'static str,
    /// What it is, in words.
    what: &'static str,
    /// For how long at most.
    longest: Duration,
}

impl Shaping {
    /// Whether it asks for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the fate of each wire packet is its own, so that super-packets have to be cut up. A constant
    /// delay is the same for all of them.
    #[must_use]
    pub fn tells_packets_apart(&self) -> bool {
        self.loss.is_some()
            || self.mtu_blackhole.is_some()
            || self.rate.is_some()
            || self.corrupt.is_some()
            || self.duplicate.is_some()
            || self.reorder.is_some()
            || self.delay.as_ref().is_some_and(Delay::varies)
    }

    /// Whether packets have to go through a lane. What is too long is recognised at the target's hook already.
    #[must_use]
    pub fn needs_lane(&self) -> bool {
        let rest = Self {
            mtu_blackhole: None,
            ..self.clone()
        };
        !rest.is_empty()
    }

    /// The longest that a packet may be held.
    #[must_use]
    pub fn longest_hold(&self) -> Duration {
        self.holds()
            .into_iter()
            .fold(Duration::ZERO, |sum, hold| sum.saturating_add(hold.longest))
    }

    /// What makes up the longest that a packet may be held.
    fn holds(&self) -> Vec<Hold> {
        let mut holds = Vec::new();
        let mut push = |field, what, longest: Duration| {
            if !longest.is_zero() {
                holds.push(Hold {
                    field,
                    what,
                    longest,
                });
            }
        };
        if let Some(delay) = &self.delay {
            push("delay", "`delay`", delay.base);
            match &delay.distribution {
                Distribution::Samples(_) => {
                    push("distribution", "its longest sample", delay.longest_above());
                }
                _ => push("jitter", "eight times the `jitter`", delay.longest_above()),
            }
        }
        if let Some(one) = self.duplicate {
            push("copy_delay", "`copy_delay`", one.copy_delay);
        }
        if let Some(one) = self.reorder {
            push("hold", "`hold`", one.hold);
        }
        if let Some(rate) = &self.rate {
            let speed = match rate.speed {
                Speed::Constant(_) => "rate",
                Speed::Trace(_) => "rate_trace",
            };
            push("queue", "the `queue`", rate.longest_wait());
            push(speed, "the longest packet on the line", rate.longest_turn());
        }
        if let Some(one) = self.stall {
            push("stall", "`stall`", one.length);
        }
        holds
    }

    /// Refuses what would hold packets for longer than [`LONGEST_HOLD`], and says what it is made of.
    fn check_hold(&self) -> Result<(), SpecError> {
        let longest = self.longest_hold();
        if longest <= LONGEST_HOLD {
            return Ok(());
        }
        let holds = self.holds();
        let parts: Vec<String> = holds
            .iter()
            .map(|hold| format!("{} {}", hold.what, duration::format(hold.longest)))
            .collect();
        let field = holds
            .iter()
            .max_by_key(|hold| hold.longest)
            .map_or("delay", |hold| hold.field);
        Err(SpecError::field(
            field,
            format!(
                "a packet could be held for {} ({})",
                duration::format(longest),
                parts.join(", ")
            ),
            format!(
                "{} at most in one rule: `delay`, eight times the `jitter` or the longest sample, `copy_delay`, \
                 `hold`, the `queue` with the longest packet on the line, and `stall` together",
                duration::format(LONGEST_HOLD)
            ),
        ))
    }

    /// Reads the text form.
    pub(super) fn parse(spec: &FaultSpec) -> Result<Self, SpecError> {
        let shaping = Self {
            mtu_blackhole: mtu(spec)?,
            loss: field("loss", spec.loss.as_ref(), loss)?,
            corrupt: corrupt(spec)?,
            duplicate: duplicate(spec)?,
            rate: rate_of(spec)?,
            delay: delay(spec)?,
            reorder: reorder(spec)?,
            stall: stall(spec)?,
        };
        shaping.check_hold()?;
        Ok(shaping)
    }

    /// Writes the text form.
    pub(super) fn write(&self, spec: &mut FaultSpec) {
        spec.mtu_blackhole = self.mtu_blackhole;
        spec.loss = self.loss.map(Loss::format);
        if let Some(one) = &self.rate {
            match &one.speed {
                Speed::Constant(bits) => spec.rate = Some(rate::format(*bits)),
                Speed::Trace(trace) => spec.rate_trace = Some(trace.spec()),
            }
            spec.queue = (one.queue != QueueLimit::Time(DEFAULT_QUEUE)).then(|| one.queue.format());
            spec.overhead = (one.overhead != 0).then_some(one.overhead);
            spec.share = (one.share != RateShare::Rule).then(|| one.share.name().to_owned());
            spec.ecn = one.ecn.map(duration::format);
        }
        if let Some(one) = self.stall {
            spec.stall = Some(duration::format(one.length));
            spec.every = one.every.map(duration::format);
        }
        if let Some(one) = self.corrupt {
            spec.corrupt = Some(share::format(one.probability));
            spec.bits = (one.bits != 1).then_some(one.bits);
            spec.part = (one.part != Part::Any).then(|| one.part.name().to_owned());
            spec.checksum =
                (one.checksum != Checksum::Broken).then(|| one.checksum.name().to_owned());
        }
        if let Some(one) = self.duplicate {
            spec.duplicate = Some(share::format(one.probability));
            spec.copies = (one.copies != 1).then_some(one.copies);
            spec.copy_delay = (!one.copy_delay.is_zero()).then(|| duration::format(one.copy_delay));
        }
        if let Some(delay) = &self.delay {
            spec.delay = Some(duration::format(delay.base));
            if delay.varies() {
                spec.jitter = (!delay.jitter.is_zero()).then(|| duration::format(delay.jitter));
                spec.distribution = (delay.distribution != Distribution::Uniform)
                    .then(|| distribution::format(&delay.distribution));
                spec.correlation = (delay.correlation != 0)
                    .then(|| share::format(u64::from(delay.correlation) << 16));
            }
            spec.order = (delay.order == Order::Free).then(|| "free".to_owned());
        }
        if let Some(one) = self.reorder {
            spec.reorder = Some(share::format(one.probability));
            spec.hold = Some(duration::format(one.hold));
        }
    }

    /// In words, one text for each fault.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        let mut parts = Vec::new();
        if let Some(mtu) = self.mtu_blackhole {
            parts.push(format!("lose what is longer than {mtu} bytes"));
        }
        if let Some(loss) = self.loss {
            parts.push(match loss {
                Loss::Bernoulli(probability) => format!("lose {}", share::format(probability)),
                _ => format!("lose by {}", loss.format()),
            });
        }
        if let Some(one) = self.corrupt {
            let bits = match one.bits {
                1 => "a bit".to_owned(),
                bits => format!("{bits} bits"),
            };
            let part = match one.part {
                Part::Any => String::new(),
                part => format!(" of the {}", part.name()),
            };
            parts.push(format!(
                "corrupt {bits}{part} in {}, checksums {}",
                share::format(one.probability),
                one.checksum.name()
            ));
        }
        if let Some(one) = self.duplicate {
            let mut text = format!("duplicate {}", share::format(one.probability));
            if one.copies > 1 {
                let _ = write!(text, " {} times", one.copies);
            }
            if !one.copy_delay.is_zero() {
                let _ = write!(text, ", copies {} later", duration::format(one.copy_delay));
            }
            parts.push(text);
        }
        if let Some(one) = &self.rate {
            let mut text = match &one.speed {
                Speed::Constant(bits) => format!("rate {}", rate::format(*bits)),
                Speed::Trace(trace) => format!(
                    "rate by trace {} ({} on average)",
                    trace.name(),
                    rate::format_rounded(trace.mean_bits())
                ),
            };
            if one.share != RateShare::Rule {
                let _ = write!(text, " per {}", one.share.name());
            }
            let _ = write!(text, " with a queue of {}", one.queue.format());
            if one.overhead != 0 {
                let _ = write!(text, ", {:+} bytes each", one.overhead);
            }
            if let Some(ecn) = one.ecn {
                let _ = write!(text, ", marked above {}", duration::format(ecn));
            }
            parts.push(text);
        }
        if let Some(delay) = &self.delay {
            let mut text = format!("delay {}", duration::format(delay.base));
            if delay.varies() {
                text.push_str(&delay.describe_spread());
                if delay.correlation != 0 {
                    let _ = write!(
                        text,
                        ", correlated {}",
                        share::format(u64::from(delay.correlation) << 16)
                    );
                }
                if delay.order == Order::Free {
                    text.push_str(", in any order");
                }
            }
            parts.push(text);
        }
        if let Some(one) = self.reorder {
            parts.push(format!(
                "hold {} back for {}",
                share::format(one.probability),
                duration::format(one.hold)
            ));
        }
        if let Some(one) = self.stall {
            let mut text = format!("stall for {}", duration::format(one.length));
            if let Some(every) = one.every {
                let _ = write!(text, " every {}", duration::format(every));
            }
            parts.push(text);
        }
        parts
    }
}

impl Delay {
    /// Whether packets have delays of their own.
    #[must_use]
    pub fn varies(&self) -> bool {
        !self.jitter.is_zero() || matches!(self.distribution, Distribution::Samples(_))
    }

    /// The longest: distributions have no more than eight times the jitter.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.base.saturating_add(self.longest_above())
    }

    /// The longest that comes on top of the base.
    fn longest_above(&self) -> Duration {
        match &self.distribution {
            Distribution::Samples(numbers) => {
                Duration::from_nanos(numbers.greatest().unsigned_abs())
            }
            _ => self.jitter.saturating_mul(8),
        }
    }

    fn describe_spread(&self) -> String {
        let jitter = duration::format(self.jitter);
        match &self.distribution {
            Distribution::Table(numbers) => {
                format!(" ± {jitter} by a table of {}", numbers.values().len())
            }
            Distribution::Samples(numbers) => {
                let time =
                    |value: i64| duration::format(Duration::from_nanos(value.unsigned_abs()));
                format!(
                    " and one of {} samples from {} to {}",
                    numbers.values().len(),
                    time(numbers.least()),
                    time(numbers.greatest())
                )
            }
            named => format!(" ± {jitter} {}", named.name()),
        }
    }
}

impl Rate {
    /// The longest that a packet waits for its turn on the line.
    #[must_use]
    pub fn longest_wait(&self) -> Duration {
        match self.queue {
            QueueLimit::Time(time) => time,
            QueueLimit::Bytes(bytes) => self.time_of(bytes),
            QueueLimit::Packets(packets) => self
                .time_of(u64::from(packets) * LONGEST_PACKET)
                .min(LONGEST_QUEUE),
        }
    }

    /// The longest from its arrival until it is through.
    #[must_use]
    pub fn longest_hold(&self) -> Duration {
        self.longest_wait().saturating_add(self.longest_turn())
    }

    /// The longest that a packet is on the line.
    fn longest_turn(&self) -> Duration {
        self.time_of(LONGEST_PACKET)
    }

    /// The longest that so many bytes take.
    fn time_of(&self, bytes: u64) -> Duration {
        match &self.speed {
            Speed::Constant(bits) => {
                let nanoseconds = u128::from(bytes) * 8_000_000_000 / u128::from((*bits).max(1));
                Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
            }
            Speed::Trace(trace) => trace.longest(bytes),
        }
    }

    /// Its mean in bits per second.
    #[must_use]
    pub fn mean_bits(&self) -> u64 {
        match &self.speed {
            Speed::Constant(bits) => *bits,
            Speed::Trace(trace) => trace.mean_bits(),
        }
    }
}

impl QueueLimit {
    fn format(self) -> String {
        match self {
            Self::Time(time) => duration::format(time),
            Self::Bytes(bytes) if bytes.is_multiple_of(1024) => format!("{}kb", bytes / 1024),
            Self::Bytes(bytes) => format!("{bytes}b"),
            Self::Packets(packets) => format!("{packets}p"),
        }
    }
}

impl RateShare {
    fn name(self) -> &'static str {
        match self {
            Self::Rule => "rule",
            Self::Flow => "flow",
            Self::Peer => "peer",
        }
    }
}

impl Loss {
    fn format(self) -> String {
        let list = |model: &str, values: &[u64]| {
            let values: Vec<String> = values.iter().map(|value| percent(*value)).collect();
            format!("{model}:{}", values.join(","))
        };
        match self {
            Self::Bernoulli(probability) => share::format(probability),
            Self::GilbertElliott {
                to_bad,
                to_good,
                in_bad,
                in_good,
            } => list("gemodel", &[to_bad, to_good, in_bad, in_good]),
            Self::FourStates {
                p13,
                p31,
                p32,
                p23,
                p14,
            } => list("state", &[p13, p31, p32, p23, p14]),
        }
    }
}

fn percent(probability: u64) -> String {
    if probability == 0 {
        "0%".to_owned()
    } else {
        share::format(probability)
    }
}

/// A probability that may be zero.
fn probability(text: &str) -> Result<u64, Problem> {
    if text.trim() == "0" {
        return Ok(0);
    }
    share::parse_from_zero(text)
}

fn field<T>(
    name: &'static str,
    text: Option<&String>,
    parse: impl FnOnce(&str) -> Result<T, Problem>,
) -> Result<Option<T>, SpecError> {
    text.map(|text| parse(text).map_err(|problem| problem.of(name, text)))
        .transpose()
}

/// Complains about a field that only goes with another one.
fn without(name: &'static str, given: bool, other: &str) -> Result<(), SpecError> {
    without_any(name, given, &format!("`{other}`"))
}

/// The same for one of several, given as marked text.
fn without_any(name: &'static str, given: bool, others: &str) -> Result<(), SpecError> {
    if given {
        return Err(SpecError::field(
            name,
            format!("goes with {others} only"),
            format!("give {others} too, or leave `{name}` out"),
        ));
    }
    Ok(())
}

fn loss(text: &str) -> Result<Loss, Problem> {
    const ACCEPTED: &str = "a percentage (1%), gemodel:p,r[,1-h[,1-k]], or \
                            state:p13[,p31[,p32[,p23[,p14]]]], each a percentage";
    let Some((model, values)) = text.split_once(':') else {
        return share::parse(text).map(Loss::Bernoulli);
    };
    let values = values
        .split(',')
        .map(probability)
        .collect::<Result<Vec<u64>, Problem>>()?;
    let at = |index: usize, default: u64| values.get(index).copied().unwrap_or(default);
    let first = at(0, 0);
    if first == 0 {
        return Err(Problem::new("never loses a packet", ACCEPTED));
    }
    match model {
        "gemodel" if values.len() <= 4 => Ok(Loss::GilbertElliott {
            to_bad: first,
            to_good: at(1, share::ALL - first),
            in_bad: at(2, share::ALL),
            in_good: at(3, 0),
        }),
        "state" if values.len() <= 5 => {
            let (p13, p14) = (first, at(4, 0));
            let (p31, p32) = (at(1, share::ALL - first), at(2, 0));
            if p13 + p14 > share::ALL || p31 + p32 > share::ALL {
                return Err(Problem::new(
                    "a state is left with more than 100%",
                    "p13 + p14 and p31 + p32 of at most 100% each",
                ));
            }
            Ok(Loss::FourStates {
                p13,
                p31,
                p32,
                p23: at(3, share::ALL),
                p14,
            })
        }
        "gemodel" | "state" => Err(Problem::new("has too many values", ACCEPTED)),
        other => Err(Problem::new(
            format!("'{other}' is no model of loss"),
            ACCEPTED,
        )),
    }
}

fn corrupt(spec: &FaultSpec) -> Result<Option<Corrupt>, SpecError> {
    let Some(probability) = field("corrupt", spec.corrupt.as_ref(), share::parse)? else {
        without("bits", spec.bits.is_some(), "corrupt")?;
        without("where", spec.part.is_some(), "corrupt")?;
        without("checksum", spec.checksum.is_some(), "corrupt")?;
        return Ok(None);
    };
    let bits = spec.bits.unwrap_or(1);
    if bits == 0 || bits > MAX_BITS {
        let problem = Problem::new("is out of range", format!("1 to {MAX_BITS} bits"));
        return Err(problem.of("bits", &bits.to_string()));
    }
    Ok(Some(Corrupt {
        probability,
        bits,
        part: field("where", spec.part.as_ref(), |text| {
            Part::ALL
                .into_iter()
                .find(|part| part.name() == text)
                .ok_or_else(|| Problem::new("is not a part of a packet", "any, header or payload"))
        })?
        .unwrap_or_default(),
        checksum: field("checksum", spec.checksum.as_ref(), |text| {
            Checksum::ALL
                .into_iter()
                .find(|checksum| checksum.name() == text)
                .ok_or_else(|| {
                    Problem::new("is nothing that checksums can be", "broken or repaired")
                })
        })?
        .unwrap_or_default(),
    }))
}

fn duplicate(spec: &FaultSpec) -> Result<Option<Duplicate>, SpecError> {
    let Some(probability) = field("duplicate", spec.duplicate.as_ref(), share::parse)? else {
        without("copies", spec.copies.is_some(), "duplicate")?;
        without("copy_delay", spec.copy_delay.is_some(), "duplicate")?;
        return Ok(None);
    };
    let copies = spec.copies.unwrap_or(1);
    if copies == 0 || copies > MAX_COPIES {
        let problem = Problem::new("is out of range", format!("1 to {MAX_COPIES} copies"));
        return Err(problem.of("copies", &copies.to_string()));
    }
    Ok(Some(Duplicate {
        probability,
        copies,
        copy_delay: field("copy_delay", spec.copy_delay.as_ref(), time)?.unwrap_or_default(),
    }))
}

fn delay(spec: &FaultSpec) -> Result<Option<Delay>, SpecError> {
    let Some(base) = field("delay", spec.delay.as_ref(), time)? else {
        without("jitter", spec.jitter.is_some(), "delay")?;
        without("distribution", spec.distribution.is_some(), "delay")?;
        without("correlation", spec.correlation.is_some(), "delay")?;
        without("order", spec.order.is_some(), "delay")?;
        return Ok(None);
    };
    let jitter = field("jitter", spec.jitter.as_ref(), time)?.unwrap_or_default();
    let distribution = field(
        "distribution",
        spec.distribution.as_ref(),
        distribution::parse,
    )?;
    let longest_sample = match &distribution {
        Some(Distribution::Samples(numbers)) => Some(numbers.greatest()),
        _ => None,
    };
    if base.is_zero() && jitter.is_zero() && longest_sample.is_none_or(|longest| longest == 0) {
        return Err(SpecError::field(
            "delay",
            "is no delay at all",
            "a duration above zero, such as 100ms",
        ));
    }
    if longest_sample.is_some() {
        if spec.jitter.is_some() {
            return Err(SpecError::field(
                "jitter",
                "does not go with samples, which are delays by themselves",
                "leave `jitter` out, or give a table, whose numbers are in units of the `jitter`",
            ));
        }
    } else if jitter.is_zero() {
        without("distribution", spec.distribution.is_some(), "jitter")?;
        without("correlation", spec.correlation.is_some(), "jitter")?;
        without("order", spec.order.is_some(), "jitter")?;
    }
    let correlation = field("correlation", spec.correlation.as_ref(), |text| {
        match probability(text)? >> 16 {
            whole @ 0x1_0000.. => Err(Problem::new(
                format!("{whole} of 65536 would repeat the first delay for ever"),
                "0% to 99.99%",
            )),
            part => Ok(part),
        }
    })?;
    Ok(Some(Delay {
        base,
        jitter,
        distribution: distribution.unwrap_or_default(),
        correlation: u32::try_from(correlation.unwrap_or(0)).unwrap_or(0),
        order: field("order", spec.order.as_ref(), order)?.unwrap_or_default(),
    }))
}

/// The least MTU of IPv4 is 68 bytes (RFC 791).
fn mtu(spec: &FaultSpec) -> Result<Option<u32>, SpecError> {
    match spec.mtu_blackhole {
        Some(bytes) if !(68..=65_535).contains(&bytes) => {
            let problem = Problem::new("is no MTU", "68 to 65535 bytes");
            Err(problem.of("mtu_blackhole", &bytes.to_string()))
        }
        other => Ok(other),
    }
}

fn rate_of(spec: &FaultSpec) -> Result<Option<Rate>, SpecError> {
    let speed = match (
        field("rate", spec.rate.as_ref(), rate::parse)?,
        &spec.rate_trace,
    ) {
        (Some(bits), None) => Speed::Constant(bits),
        (None, Some(trace)) => Speed::Trace(Trace::parse(trace)?),
        (Some(_), Some(_)) => {
            return Err(SpecError::field(
                "rate_trace",
                "a line has one rate, and `rate` is given too",
                "give one of `rate` and `rate_trace`",
            ));
        }
        (None, None) => {
            const LINES: &str = "`rate` or `rate_trace`";
            without_any("queue", spec.queue.is_some(), LINES)?;
            without_any("overhead", spec.overhead.is_some(), LINES)?;
            without_any("share", spec.share.is_some(), LINES)?;
            without_any("ecn", spec.ecn.is_some(), LINES)?;
            return Ok(None);
        }
    };
    if let Some(bytes) = spec.overhead
        && !(-1000..=1000).contains(&bytes)
    {
        let problem = Problem::new("is out of range", "-1000 to 1000 bytes");
        return Err(problem.of("overhead", &bytes.to_string()));
    }
    Ok(Some(Rate {
        speed,
        queue: field("queue", spec.queue.as_ref(), queue)?
            .unwrap_or(QueueLimit::Time(DEFAULT_QUEUE)),
        overhead: spec.overhead.unwrap_or(0),
        share: field("share", spec.share.as_ref(), |text| {
            [RateShare::Rule, RateShare::Flow, RateShare::Peer]
                .into_iter()
                .find(|share| share.name() == text)
                .ok_or_else(|| Problem::new("is nothing to share", "rule, flow or peer"))
        })?
        .unwrap_or_default(),
        ecn: field("ecn", spec.ecn.as_ref(), time)?,
    }))
}

fn queue(text: &str) -> Result<QueueLimit, Problem> {
    const ACCEPTED: &str = "a time (100ms), bytes (b, kb, mb or gb: 64kb; kb is 1024 bytes) or packets (50p, 1 to 10000)";
    let lower = text.trim().to_ascii_lowercase();
    if let Some(number) = lower.strip_suffix('p')
        && number.bytes().all(|byte| byte.is_ascii_digit())
    {
        return number
            .parse()
            .ok()
            .filter(|packets| QUEUE_PACKETS.contains(packets))
            .map(QueueLimit::Packets)
            .ok_or_else(|| Problem::new("is not a length of a queue", ACCEPTED));
    }
    // Times as they are written: a capital M would be taken for minutes.
    size::parse(&lower)
        .map(QueueLimit::Bytes)
        .or_else(|_| duration::parse(text).map(QueueLimit::Time))
        .map_err(|_| Problem::new("is not a length of a queue", ACCEPTED))
}

fn stall(spec: &FaultSpec) -> Result<Option<Stall>, SpecError> {
    let Some(length) = field("stall", spec.stall.as_ref(), time)? else {
        without("every", spec.every.is_some(), "stall")?;
        return Ok(None);
    };
    let every = field("every", spec.every.as_ref(), time)?;
    if length.is_zero() {
        return Err(SpecError::field(
            "stall",
            "is no time at all",
            "a duration above zero, such as 15s",
        ));
    }
    if every.is_some_and(|every| every <= length) {
        return Err(SpecError::field(
            "every",
            "a stall would begin before the one before has ended",
            "a time longer than the stall",
        ));
    }
    Ok(Some(Stall { length, every }))
}

fn reorder(spec: &FaultSpec) -> Result<Option<Reorder>, SpecError> {
    let Some(probability) = field("reorder", spec.reorder.as_ref(), share::parse)? else {
        without("hold", spec.hold.is_some(), "reorder")?;
        return Ok(None);
    };
    let problem = match field("hold", spec.hold.as_ref(), time)? {
        None => "is not given, so nothing would be held back",
        Some(Duration::ZERO) => "is no time at all, so nothing would be held back",
        Some(hold) => return Ok(Some(Reorder { probability, hold })),
    };
    Err(SpecError::field(
        "hold",
        problem,
        "for how long the chosen packets are held back, such as 3ms",
    ))
}

fn time(text: &str) -> Result<Duration, Problem> {
    duration::parse(text)
}

fn order(text: &str) -> Result<Order, Problem> {
    match text {
        "keep" => Ok(Order::Keep),
        "free" => Ok(Order::Free),
        _ => Err(Problem::new("is not an order", "keep or free")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Surface;

    fn parsed(json: &str) -> Result<Shaping, SpecError> {
        Shaping::parse(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn texts_go_there_and_back() {
        for text in [
            r#"{"loss":"1%"}"#,
            r#"{"loss":"gemodel:1%,10%,100%,0%"}"#,
            r#"{"loss":"state:1%,20%,5%,90%,0.5%"}"#,
            r#"{"corrupt":"0.1%"}"#,
            r#"{"corrupt":"0.1%","bits":32,"where":"header","checksum":"repaired"}"#,
            r#"{"duplicate":"2%"}"#,
            r#"{"duplicate":"2%","copies":3,"copy_delay":"3s"}"#,
            r#"{"delay":"100ms"}"#,
            r#"{"delay":"100ms","jitter":"20ms"}"#,
            r#"{"delay":"100ms","jitter":"20ms","distribution":"pareto","correlation":"25%","order":"free"}"#,
            r#"{"delay":"100ms","jitter":"20ms","distribution":"table:-8192,0,8192"}"#,
            r#"{"delay":"0s","distribution":"samples:10ms,12ms500us","order":"free"}"#,
            r#"{"reorder":"5%","hold":"3ms"}"#,
            r#"{"mtu_blackhole":1400}"#,
            r#"{"rate":"10mbit"}"#,
            r#"{"rate":"10mbit","queue":"64kb","overhead":24,"share":"peer","ecn":"5ms"}"#,
            r#"{"rate":"10mbit","queue":"50p","overhead":-14}"#,
            r#"{"rate_trace":{"name":"lte","milliseconds":[0,3,3,9]},"queue":"1s","share":"flow"}"#,
            r#"{"stall":"15s"}"#,
            r#"{"stall":"15s","every":"1m"}"#,
            r#"{"delay":"10ms","loss":"0.1%","duplicate":"1%","reorder":"5%","hold":"3ms"}"#,
        ] {
            let shaping = parsed(text).unwrap();
            let mut spec = FaultSpec::default();
            shaping.write(&mut spec);
            assert_eq!(spec, serde_json::from_str(text).unwrap(), "{text}");
            assert_eq!(Shaping::parse(&spec).unwrap(), shaping);
            assert!(!shaping.describe().is_empty());
        }
    }

    #[test]
    fn defaults_are_those_of_netem() {
        assert_eq!(
            parsed(r#"{"loss":"gemodel:25%"}"#).unwrap().loss,
            Some(Loss::GilbertElliott {
                to_bad: 1 << 30,
                to_good: 3 << 30,
                in_bad: 1 << 32,
                in_good: 0
            })
        );
        assert_eq!(
            parsed(r#"{"loss":"state:25%"}"#).unwrap().loss,
            Some(Loss::FourStates {
                p13: 1 << 30,
                p31: 3 << 30,
                p32: 0,
                p23: 1 << 32,
                p14: 0
            })
        );
    }

    #[test]
    fn wrong_values_are_refused() {
        for (text, field) in [
            (r#"{"loss":"1"}"#, "loss"),
            (r#"{"loss":"0%"}"#, "loss"),
            (r#"{"loss":"101%"}"#, "loss"),
            (r#"{"loss":"gemodel:0%,1%"}"#, "loss"),
            (r#"{"loss":"gemodel:1%,1%,1%,1%,1%"}"#, "loss"),
            (r#"{"loss":"markov:1%"}"#, "loss"),
            (r#"{"loss":"state:60%,1%,1%,1%,60%"}"#, "loss"),
            (r#"{"corrupt":"0"}"#, "corrupt"),
            (r#"{"bits":2}"#, "bits"),
            (r#"{"corrupt":"1%","bits":0}"#, "bits"),
            (r#"{"corrupt":"1%","bits":33}"#, "bits"),
            (r#"{"where":"any"}"#, "where"),
            (r#"{"corrupt":"1%","where":"trailer"}"#, "where"),
            (r#"{"checksum":"broken"}"#, "checksum"),
            (r#"{"corrupt":"1%","checksum":"right"}"#, "checksum"),
            (r#"{"copies":2}"#, "copies"),
            (r#"{"duplicate":"1%","copies":0}"#, "copies"),
            (r#"{"duplicate":"1%","copies":9}"#, "copies"),
            (r#"{"copy_delay":"1s"}"#, "copy_delay"),
            (r#"{"jitter":"1s"}"#, "jitter"),
            (r#"{"delay":"0s"}"#, "delay"),
            (r#"{"delay":"2h"}"#, "delay"),
            (r#"{"delay":"1s","distribution":"normal"}"#, "distribution"),
            (
                r#"{"delay":"1s","distribution":"table:1,2"}"#,
                "distribution",
            ),
            (
                r#"{"delay":"1s","distribution":"samples:1,x"}"#,
                "distribution",
            ),
            (
                r#"{"delay":"1s","jitter":"1s","distribution":"samples:1,2"}"#,
                "jitter",
            ),
            (r#"{"delay":"0s","distribution":"samples:0"}"#, "delay"),
            (
                r#"{"delay":"0s","distribution":"samples:2h"}"#,
                "distribution",
            ),
            (r#"{"distribution":"samples:1"}"#, "distribution"),
            (r#"{"delay":"1s","order":"free"}"#, "order"),
            (r#"{"delay":"1s","jitter":"1s","order":"none"}"#, "order"),
            (
                r#"{"delay":"1s","jitter":"1s","distribution":"cauchy"}"#,
                "distribution",
            ),
            (
                r#"{"delay":"1s","jitter":"1s","correlation":"100%"}"#,
                "correlation",
            ),
            (r#"{"mtu_blackhole":10}"#, "mtu_blackhole"),
            (r#"{"rate":"10"}"#, "rate"),
            (r#"{"queue":"1s"}"#, "queue"),
            (r#"{"rate":"1mbit","queue":"0p"}"#, "queue"),
            (r#"{"rate":"1mbit","queue":"10001p"}"#, "queue"),
            (r#"{"rate":"1mbit","queue":"p"}"#, "queue"),
            (r#"{"rate":"1mbit","overhead":-1001}"#, "overhead"),
            (
                r#"{"rate":"1mbit","rate_trace":{"milliseconds":[1]}}"#,
                "rate_trace",
            ),
            (r#"{"rate_trace":{"milliseconds":[]}}"#, "rate_trace"),
            (r#"{"rate":"1mbit","share":"host"}"#, "share"),
            (r#"{"every":"1s"}"#, "every"),
            (r#"{"stall":"2s","every":"1s"}"#, "every"),
            (r#"{"hold":"1s"}"#, "hold"),
            (r#"{"reorder":"1%"}"#, "hold"),
        ] {
            let error = parsed(text).unwrap_err();
            assert_eq!(error.field, field, "{text}");
            error.assert_speaks_of_flags();
        }
    }

    #[test]
    fn what_holds_packets_longest_is_to_blame() {
        for (text, field, parts) in [
            (r#"{"stall":"2h"}"#, "stall", "2h (stall 2h)"),
            (
                r#"{"rate":"1kbit","queue":"1mb"}"#,
                "queue",
                "the queue 2h19m48s608ms, the longest packet on the line 8m52s",
            ),
            (
                r#"{"rate_trace":{"milliseconds":[86400000]}}"#,
                "rate_trace",
                "the longest packet on the line ",
            ),
            (
                r#"{"delay":"10m","jitter":"10m"}"#,
                "jitter",
                "1h30m (delay 10m, eight times the jitter 1h20m)",
            ),
            (
                r#"{"delay":"1s","distribution":"samples:2h"}"#,
                "distribution",
                "delay 1s, its longest sample 2h",
            ),
            (
                r#"{"duplicate":"1%","copy_delay":"40m","delay":"30m"}"#,
                "copy_delay",
                "1h10m (delay 30m, copy_delay 40m)",
            ),
            (r#"{"reorder":"1%","hold":"61m"}"#, "hold", "(hold 1h1m)"),
        ] {
            let error = parsed(text).unwrap_err();
            assert_eq!(error.field, field, "{text}");
            assert!(error.to_string().contains(parts), "{text}: {error}");
            assert!(error.help.starts_with("1h at most"), "{}", error.help);
            error.assert_speaks_of_flags();
        }
        assert!(parsed(r#"{"delay":"12m","jitter":"6m"}"#).is_ok());
        assert!(
            parsed(r#"{"duplicate":"1%","copy_delay":"61m"}"#)
                .unwrap_err()
                .message(Surface::Flags)
                .starts_with("--copy-delay: a packet could be held for 1h1m (--copy-delay 1h1m)")
        );
    }

    #[test]
    fn zero_is_not_absent() {
        for (text, problem) in [
            (r#"{"reorder":"1%"}"#, "is not given"),
            (r#"{"reorder":"1%","hold":"0s"}"#, "is no time at all"),
            (r#"{"loss":"0%"}"#, "chooses nothing at all"),
            (r#"{"corrupt":"0%"}"#, "chooses nothing at all"),
            (r#"{"duplicate":"0.0%"}"#, "chooses nothing at all"),
            (r#"{"loss":"gemodel:0%,1%"}"#, "never loses a packet"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.problem.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn queues_are_read_like_rates() {
        for (text, limit) in [
            ("64KB", QueueLimit::Bytes(65_536)),
            (" 1gb ", QueueLimit::Bytes(1 << 30)),
            ("1500B", QueueLimit::Bytes(1500)),
            ("10P", QueueLimit::Packets(10)),
            (" 100ms ", QueueLimit::Time(Duration::from_millis(100))),
        ] {
            assert_eq!(queue(text), Ok(limit), "{text}");
        }
        for bad in ["64", "kb", "64 kb", "10M", "-1p", ""] {
            assert!(queue(bad).is_err(), "{bad}");
        }
    }
}
