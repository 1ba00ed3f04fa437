//! Judging a run by its records: passed, failed, or void (it says nothing about the service).

use std::collections::BTreeMap;

use super::{
    file::{Expectation, Kind},
    record::{CheckInfo, Event, FaultEnded, Record, RunEnded, Verdict},
};
use crate::{
    protocol::RuleStats,
    realised::{Realised, Unit},
};

/// Counts are compared with what was asked at this many standard deviations: two-sided, a normal variate is beyond it
/// less than once in 500 million times.
const DEVIATIONS: f64 = 6.0;
/// Losses that come in bursts (`gemodel`, `state`) vary more than independent ones; their variance is taken to be this
/// many times as large (a mean burst of 15 packets: the variance of a Gilbert model's count grows by
/// (1 + λ) / (1 - λ) with λ = 1 - p - r).
const BURSTY: f64 = 30.0;
/// How far a mean delay may be from the one asked, besides what is due to chance.
const DELAY_SHARE: f64 = 0.10;
/// The same in seconds: what timers and the host's load add.
const DELAY_SECONDS: f64 = 0.002;
/// How far a rate may be from the one asked.
const RATE_SHARE: f64 = 0.05;
/// A line's mean rate means something from so many packets on.
const RATE_PACKETS: u64 = 100;

/// Judges a run that has ended, all of whose other records these are.
#[must_use]
pub fn judge(records: &[Record]) -> RunEnded {
    let mut void = Vec::new();
    let mut failed = Vec::new();
    let mut expect = Expectation::Passed;
    let mut checks: &[CheckInfo] = &[];
    let mut steady = None;
    let mut healed = None;
    for record in records {
        match &record.event {
            Event::RunStarted(started) => {
                expect = started.expect;
                checks = &started.checks;
            }
            Event::Steady { .. } => steady = Some(record.t),
            Event::NotSteady { checks } => void.push(format!(
                "no steady state before the first step: {} did not hold",
                checks.join(", ")
            )),
            Event::Interrupted { signal } => void.push(format!("interrupted by {signal}")),
            Event::Trouble { text } => void.push(text.clone()),
            Event::Healed => healed = Some(record.t),
            Event::ServiceEnded {
                service,
                how,
                asked: false,
            } => failed.push(format!(
                "service {service} ended at {:.1} s without being told to ({how})",
                record.t
            )),
            Event::StepEnded {
                step,
                failure: Some(failure),
                ..
            } => failed.push(format!("step {step} failed: {failure}")),
            _ => {}
        }
    }
    faults(records, &mut failed, &mut void);
    match (steady, healed) {
        (Some(steady), Some(healed)) => {
            let answers = answers(records);
            for check in checks {
                let answers = answers
                    .get(check.name.as_str())
                    .map_or(&[][..], Vec::as_slice);
                if let Some(reason) = judge_check(check, answers, steady, healed) {
                    failed.push(reason);
                }
            }
        }
        _ if void.is_empty() => {
            void.push("the run ended before its faults were healed".to_owned());
        }
        _ => {}
    }
    let verdict = if !void.is_empty() {
        Verdict::Void
    } else if !failed.is_empty() {
        Verdict::Failed
    } else {
        Verdict::Passed
    };
    let as_expected = matches!(
        (verdict, expect),
        (Verdict::Passed, Expectation::Passed) | (Verdict::Failed, Expectation::Failed)
    );
    let mut reasons = void;
    reasons.append(&mut failed);
    if verdict == Verdict::Passed && expect == Expectation::Failed {
        reasons.push("it was expected to fail, and did not".to_owned());
    }
    RunEnded {
        verdict,
        as_expected,
        reasons,
    }
}

/// An answer of a check: when it was there, and what it was.
struct Answer<'a> {
    at: f64,
    ok: bool,
    detail: Option<&'a str>,
}

fn answers(records: &[Record]) -> BTreeMap<&str, Vec<Answer<'_>>> {
    let mut all: BTreeMap<&str, Vec<Answer<'_>>> = BTreeMap::new();
    for record in records {
        if let Event::Checked(checked) = &record.event {
            all.entry(&checked.check).or_default().push(Answer {
                at: record.t,
                ok: checked.ok,
                detail: checked.detail.as_deref(),
            });
        }
    }
    all
}

fn judge_check(
    check: &CheckInfo,
    answers: &[Answer<'_>],
    steady: f64,
    healed: f64,
) -> Option<String> {
    let name = &check.name;
    if check.kind == Kind::Measure {
        return None;
    }
    let because = |answer: &Answer<'_>| {
        answer
            .detail
            .map_or_else(String::new, |detail| format!(" ({detail})"))
    };
    if check.at_end {
        return match answers.last() {
            None => Some(format!("check {name} was never asked")),
            Some(answer) if answer.ok => None,
            Some(answer) => Some(format!("check {name} failed at the end{}", because(answer))),
        };
    }
    let judged: Vec<&Answer<'_>> = answers.iter().filter(|answer| answer.at > steady).collect();
    if judged.is_empty() {
        return Some(format!(
            "check {name} was never asked after the steady state"
        ));
    }
    match check.kind {
        Kind::Safety => {
            let failures: Vec<&&Answer<'_>> = judged.iter().filter(|answer| !answer.ok).collect();
            let first = failures.first()?;
            Some(format!(
                "safety check {name} failed {} of {} times, first at {:.1} s{}",
                failures.len(),
                judged.len(),
                first.at,
                because(first)
            ))
        }
        Kind::Liveness => {
            let after: Vec<&&Answer<'_>> =
                judged.iter().filter(|answer| answer.at > healed).collect();
            let within = check.recovers_within;
            let Some(recovered) = after.iter().find(|answer| answer.ok) else {
                return Some(format!(
                    "liveness check {name} did not hold again after healing{}",
                    after
                        .last()
                        .map(|answer| because(answer))
                        .unwrap_or_default()
                ));
            };
            if recovered.at > healed + within {
                return Some(format!(
                    "liveness check {name} held again {:.1} s after healing, and had {within:.1} s",
                    recovered.at - healed
                ));
            }
            let late = after
                .iter()
                .find(|answer| !answer.ok && answer.at > healed + within)?;
            Some(format!(
                "liveness check {name} failed {:.1} s after healing, when it had to hold{}",
                late.at - healed,
                because(late)
            ))
        }
        Kind::Measure => None,
    }
}

/// Whether faults acted, as they were asked to.
fn faults(records: &[Record], failed: &mut Vec<String>, void: &mut Vec<String>) {
    let mut expected: BTreeMap<&str, bool> = BTreeMap::new();
    for record in records {
        match &record.event {
            Event::FaultStarted(started) => {
                expected.insert(&started.step, started.expect_effect);
            }
            Event::FaultEnded(ended) => {
                let expect = expected.remove(ended.step.as_str()).unwrap_or(true);
                if expect && ended.matched_packets == 0 {
                    failed.push(format!(
                        "the fault of step {} did nothing: no packet matched its rules",
                        ended.step
                    ));
                } else if !expect && ended.matched_packets > 0 {
                    failed.push(format!(
                        "the fault of step {} was to meet no packet, and met {}",
                        ended.step, ended.matched_packets
                    ));
                }
                disagreements(ended, failed, void);
            }
            _ => {}
        }
    }
    for step in expected.keys() {
        void.push(format!("what the fault of step {step} did is not known"));
    }
}

fn disagreements(ended: &FaultEnded, failed: &mut Vec<String>, void: &mut Vec<String>) {
    for rule in &ended.rules {
        let lapsed = rule.egress.lapsed_packets + rule.ingress.lapsed_packets;
        if lapsed > 0 {
            void.push(format!(
                "rule {} did not act on {lapsed} packets: the daemon's lease had lapsed",
                rule.name
            ));
        }
        for realised in &rule.realised {
            if let Some(problem) = disagrees(rule, realised) {
                failed.push(format!(
                    "rule {} of step {}: {problem}",
                    rule.name, ended.step
                ));
            }
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of packets are far below 2^52"
)]
fn disagrees(rule: &RuleStats, realised: &Realised) -> Option<String> {
    let (asked, got) = (realised.asked, realised.realised?);
    let count = realised.packets as f64;
    let bursty = ["gemodel", "state", "correlation"]
        .iter()
        .any(|word| rule.fault.contains(word));
    match realised.unit {
        Unit::Share => {
            let variance = asked * (1.0 - asked) / count * if bursty { BURSTY } else { 1.0 };
            // A count is a whole number: half a packet is never a disagreement.
            let allowed = DEVIATIONS * variance.sqrt() + 1.0 / count;
            ((got - asked).abs() > allowed).then(|| {
                format!(
                    "{} {:.3} % was asked, {:.3} % of {} packets realised",
                    realised.fault,
                    asked * 100.0,
                    got * 100.0,
                    realised.packets
                )
            })
        }
        Unit::BitsPerSecond => (realised.packets >= RATE_PACKETS
            && (got - asked).abs() > asked * RATE_SHARE)
            .then(|| {
                format!(
                    "a rate of {:.3} Mbit/s was asked, {:.3} realised",
                    asked / 1e6,
                    got / 1e6
                )
            }),
        Unit::Seconds if realised.fault == "delay" => {
            // The spread of single delays, from their quantiles: of a normal distribution p90 - p50 is 1.28 standard
            // deviations; taken as one, so that heavier tails have room.
            let spread = realised
                .spread
                .map_or(0.0, |s| (s.p99 - s.p50).max(s.p90 - s.p50));
            let inflated = if bursty { BURSTY.sqrt() } else { 1.0 };
            let allowed =
                DELAY_SECONDS + DELAY_SHARE * asked + DEVIATIONS * inflated * spread / count.sqrt();
            ((got - asked).abs() > allowed).then(|| {
                format!(
                    "a mean delay of {:.1} ms was asked, {:.1} ms given to {} packets",
                    asked * 1e3,
                    got * 1e3,
                    realised.packets
                )
            })
        }
        // Of a stall and a queue the longest is asked; single packets wait less.
        Unit::Seconds if matches!(realised.fault.as_str(), "stall" | "queue") => {
            let longest = realised.spread.map_or(got, |spread| spread.max);
            (realised.fault == "queue" && longest > asked + DELAY_SECONDS + asked * DELAY_SHARE)
                .then(|| {
                    format!(
                        "a queue of {:.1} ms was asked, and a packet waited {:.1} ms",
                        asked * 1e3,
                        longest * 1e3
                    )
                })
        }
        Unit::Seconds => None,
    }
}
