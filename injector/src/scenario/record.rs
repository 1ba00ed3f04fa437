//! What happened in a run, one record after the other: the run's log (JSON lines), from which it is judged and
//! reported.

use std::{collections::BTreeMap, net::IpAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::file::{Expectation, Kind};
use crate::{
    protocol::{LaneStats, RuleStats},
    realised::Realised,
};

/// One record: a line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Seconds since the run began, on the monotonic clock.
    pub t: f64,
    /// The time of day.
    pub at: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The run began.
    RunStarted(RunStarted),
    /// A lab was made.
    LabMade {
        /// Its name, as `injector lab` knows it.
        lab: String,
    },
    /// A service was started.
    ServiceStarted {
        /// Its name.
        service: String,
        /// Its process.
        pid: u32,
    },
    /// A service is ready.
    ServiceReady {
        /// Its name.
        service: String,
        /// Seconds since it was started.
        took: f64,
    },
    /// A service ended without being told to.
    ServiceEnded {
        /// Its name.
        service: String,
        /// How: `exit status: 1`, `signal: 9 (SIGKILL)`.
        how: String,
        /// Whether a step of the run (kill) is the reason.
        asked: bool,
    },
    /// All checks held, and the first step can begin.
    Steady {
        /// Seconds until then.
        took: f64,
    },
    /// The checks did not all hold in time before the first step: the run is void.
    NotSteady {
        /// Those that did not.
        checks: Vec<String>,
    },
    /// An answer of a check.
    Checked(Checked),
    /// A step began.
    StepStarted {
        /// The step, by its path (`split`, `cycle[2]/cut`).
        step: String,
        /// What it does, in words.
        what: String,
    },
    /// A step ended.
    StepEnded {
        /// The step.
        step: String,
        /// Why it failed; absent where it did not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<String>,
        /// What it is worth knowing about it: what a command printed, which host was chosen.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// The faults of a step act.
    FaultStarted(FaultStarted),
    /// The faults of a step were healed.
    FaultEnded(FaultEnded),
    /// Processes stand still.
    Paused {
        /// By this step.
        step: String,
        /// Which.
        what: String,
        /// How many.
        processes: usize,
    },
    /// They go on.
    Resumed {
        /// What step had paused them.
        step: String,
        /// For how long they stood still, in seconds.
        after: f64,
    },
    /// Counters, read every so often.
    Sample(Sample),
    /// Something that the user should know.
    Note {
        /// In a sentence.
        text: String,
    },
    /// Something went wrong that makes the run worthless as a test of the service.
    Trouble {
        /// In a sentence.
        text: String,
    },
    /// A signal ended the run early.
    Interrupted {
        /// The signal.
        signal: String,
    },
    /// All faults of the run are healed; liveness counts from here.
    Healed,
    /// The run is over; the last record.
    RunEnded(RunEnded),
}

/// The run began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunStarted {
    /// Name of the scenario.
    pub scenario: String,
    /// What it shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The file.
    pub file: String,
    /// The seed, given or drawn.
    pub seed: u64,
    /// The command that plays it again.
    pub replay: String,
    /// The injector's version.
    pub version: String,
    /// The kernel's release.
    pub kernel: String,
    /// Hosts and the address that each is known by.
    pub hosts: BTreeMap<String, IpAddr>,
    /// Those of them whose part this run does.
    pub selves: Vec<String>,
    /// The checks.
    pub checks: Vec<CheckInfo>,
    /// The steps as they will be played, one line each.
    pub timeline: Vec<String>,
    /// How the run is expected to end.
    pub expect: Expectation,
}

/// A check, as far as judging and showing its answers needs to know it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckInfo {
    /// Its name.
    pub name: String,
    /// What its failure means.
    pub kind: Kind,
    /// What is asked, in words.
    pub what: String,
    /// Of a liveness check: seconds after healing within which it must hold again.
    pub recovers_within: f64,
    /// Asked once, at the end.
    pub at_end: bool,
}

/// An answer of a check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checked {
    /// The check.
    pub check: String,
    /// Whether it held.
    pub ok: bool,
    /// When it was asked, in seconds since the run began; the record's own time is when the answer was there.
    pub asked: f64,
    /// How long the answer took, in milliseconds.
    pub latency_ms: f64,
    /// Why it failed, or what it said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The faults of a step act.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FaultStarted {
    /// The step.
    pub step: String,
    /// What the faults are, in words.
    pub what: String,
    /// Names of the rules.
    pub rules: Vec<String>,
    /// Nanoseconds until the kernel acted by them.
    pub effect_ns: u64,
    /// Whether it must meet packets.
    pub expect_effect: bool,
}

/// The faults of a step were healed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FaultEnded {
    /// The step.
    pub step: String,
    /// What became of its rules: their last counters.
    pub rules: Vec<RuleStats>,
    /// How many packets they met together.
    pub matched_packets: u64,
    /// Asked against realised, of faults of chance and time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub realised: Vec<Realised>,
}

/// Counters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Of the run's rules.
    pub rules: Vec<RuleStats>,
    /// Of lanes.
    pub lanes: Vec<LaneStats>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything held, and every fault acted.
    Passed,
    /// A check failed that must not, a step failed, or a fault did not act.
    Failed,
    /// It says nothing about the service: no steady state, interrupted, or trouble of the injector's own.
    Void,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Void => "void",
        })
    }
}

/// The run is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunEnded {
    /// How it ended.
    pub verdict: Verdict,
    /// Whether that is what the file expects.
    pub as_expected: bool,
    /// Why, one sentence each; empty if it passed.
    pub reasons: Vec<String>,
}
