//! Judging a run by its records: passed, failed, or void (it says nothing about the service).

use std::collections::{BTreeMap, BTreeSet};

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
    let mut failed_checks = Vec::new();
    let mut expect = &Expectation::Passed;
    let mut checks: &[CheckInfo] = &[];
    let mut steady = None;
    let mut healed = None;
    for record in records {
        match &record.event {
            Event::RunStarted(started) => {
                expect = &started.expect;
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
                    failed_checks.push((check.name.as_str(), reason));
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
    } else if !failed.is_empty() || !failed_checks.is_empty() {
        Verdict::Failed
    } else {
        Verdict::Passed
    };
    let (as_expected, instead) = expectation(verdict, expect, &failed, &failed_checks);
    let mut reasons = void;
    reasons.append(&mut failed);
    reasons.extend(failed_checks.into_iter().map(|(_, reason)| reason));
    reasons.extend(instead);
    RunEnded {
        verdict,
        as_expected,
        reasons,
    }
}

/// Whether a run ended as expected; where it failed and another failure was expected, or none came, what was expected.
fn expectation(
    verdict: Verdict,
    expect: &Expectation,
    failed: &[String],
    checks: &[(&str, String)],
) -> (bool, Option<String>) {
    if verdict == Verdict::Void {
        return (false, None);
    }
    let expected = match expect {
        Expectation::Passed => return (verdict == Verdict::Passed, None),
        _ if verdict == Verdict::Passed => {
            return (
                false,
                Some("it was expected to fail, and did not".to_owned()),
            );
        }
        Expectation::Failed => None,
        Expectation::Fails(names) => Some(names.list()),
    };
    let found: BTreeSet<&str> = checks.iter().map(|(name, _)| *name).collect();
    let as_named = expected
        .is_none_or(|names| found == names.iter().map(String::as_str).collect::<BTreeSet<&str>>());
    if failed.is_empty() && as_named {
        return (true, None);
    }
    let expected = expected.map_or_else(|| "checks".to_owned(), |names| names.join(", "));
    (
        false,
        Some(format!(
            "it was expected that {expected} fail, and nothing else"
        )),
    )
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

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::{super::file::OneOrMany, *};
    use crate::{
        protocol::{RuleCounters, RuleState},
        scenario::record::{Checked, FaultStarted, RunStarted},
    };

    fn record(t: f64, event: Event) -> Record {
        Record {
            t,
            at: Timestamp::UNIX_EPOCH,
            event,
        }
    }

    fn rule(matched: u64, realised: Vec<Realised>, fault: &str) -> RuleStats {
        RuleStats {
            name: "r".into(),
            group: None,
            state: RuleState::Active,
            fault: fault.into(),
            asked: String::new(),
            egress: RuleCounters {
                matched_packets: matched,
                ..RuleCounters::default()
            },
            ingress: RuleCounters::default(),
            realised,
        }
    }

    fn share(asked: f64, got: f64, packets: u64) -> Realised {
        Realised {
            fault: "loss".into(),
            unit: Unit::Share,
            asked,
            realised: Some(got),
            packets,
            spread: None,
        }
    }

    /// A run: steady at 1 s, a fault from 2 to 4 s, healed at 5 s; `answers` of the check, and its kind.
    fn run(
        kind: Kind,
        answers: &[(f64, bool)],
        rule: RuleStats,
        expect: Expectation,
    ) -> Vec<Record> {
        let matched = rule.egress.matched_packets;
        let mut records = vec![
            record(
                0.0,
                Event::RunStarted(RunStarted {
                    scenario: "s".into(),
                    description: None,
                    file: "f".into(),
                    seed: 1,
                    replay: String::new(),
                    version: String::new(),
                    kernel: String::new(),
                    hosts: BTreeMap::new(),
                    selves: Vec::new(),
                    checks: vec![CheckInfo {
                        name: "c".into(),
                        kind,
                        what: String::new(),
                        recovers_within: 3.0,
                        at_end: false,
                    }],
                    timeline: Vec::new(),
                    expect,
                }),
            ),
            record(1.0, Event::Steady { took: 1.0 }),
            record(
                2.0,
                Event::FaultStarted(FaultStarted {
                    step: "x".into(),
                    what: String::new(),
                    rules: Vec::new(),
                    effect_ns: 0,
                    expect_effect: true,
                }),
            ),
            record(
                4.0,
                Event::FaultEnded(FaultEnded {
                    step: "x".into(),
                    rules: vec![rule],
                    matched_packets: matched,
                    realised: Vec::new(),
                }),
            ),
            record(5.0, Event::Healed),
        ];
        records.extend(answers.iter().map(|&(t, ok)| {
            record(
                t,
                Event::Checked(Checked {
                    check: "c".into(),
                    ok,
                    asked: t,
                    latency_ms: 1.0,
                    detail: None,
                }),
            )
        }));
        records.sort_by(|one, other| one.t.total_cmp(&other.t));
        records
    }

    fn verdict(kind: Kind, answers: &[(f64, bool)]) -> (Verdict, String) {
        let ended = judge(&run(
            kind,
            answers,
            rule(7, vec![], "cut"),
            Expectation::Passed,
        ));
        (ended.verdict, ended.reasons.join("; "))
    }

    #[test]
    fn safety_must_never_fail() {
        assert_eq!(
            verdict(Kind::Safety, &[(1.5, true), (6.0, true)]).0,
            Verdict::Passed
        );
        let (found, why) = verdict(Kind::Safety, &[(1.5, true), (3.0, false), (6.0, true)]);
        assert_eq!(found, Verdict::Failed);
        assert!(why.contains("failed 1 of 3 times, first at 3.0 s"), "{why}");
        // Before the steady state it may.
        assert_eq!(
            verdict(Kind::Safety, &[(0.5, false), (1.5, true)]).0,
            Verdict::Passed
        );
        assert_eq!(verdict(Kind::Safety, &[(0.5, true)]).0, Verdict::Failed);
    }

    #[test]
    fn liveness_must_come_back_in_time_and_stay() {
        let passed = |answers| verdict(Kind::Liveness, answers).0;
        assert_eq!(
            passed(&[(1.5, true), (3.0, false), (6.0, true)]),
            Verdict::Passed
        );
        assert_eq!(
            passed(&[(3.0, false), (6.0, false), (7.9, true)]),
            Verdict::Passed
        );
        for (answers, words) in [
            (
                &[(3.0, false), (8.1, true)][..],
                "held again 3.1 s after healing",
            ),
            (&[(3.0, true), (6.0, false)], "did not hold again"),
            (&[(6.0, true), (9.0, false)], "failed 4.0 s after healing"),
        ] {
            let (found, why) = verdict(Kind::Liveness, answers);
            assert_eq!(found, Verdict::Failed);
            assert!(why.contains(words), "{why}");
        }
        assert_eq!(verdict(Kind::Measure, &[(3.0, false)]).0, Verdict::Passed);
    }

    #[test]
    fn faults_must_act_and_as_asked() {
        let of = |rule| {
            let ended = judge(&run(Kind::Measure, &[], rule, Expectation::Passed));
            (ended.verdict, ended.reasons.join("; "))
        };
        let (found, why) = of(rule(0, vec![], "cut"));
        assert_eq!(found, Verdict::Failed);
        assert!(why.contains("did nothing"), "{why}");
        // 1 % of 10,000 packets: six standard deviations are 0.6 %.
        assert_eq!(
            of(rule(9, vec![share(0.01, 0.0155, 10_000)], "loss 1 %")).0,
            Verdict::Passed
        );
        let (found, why) = of(rule(9, vec![share(0.01, 0.0165, 10_000)], "loss 1 %"));
        assert_eq!(found, Verdict::Failed);
        assert!(why.contains("1.000 % was asked, 1.650 %"), "{why}");
        // Bursts vary more.
        assert_eq!(
            of(rule(9, vec![share(0.01, 0.0165, 10_000)], "loss gemodel")).0,
            Verdict::Passed
        );
        let delay = |got| Realised {
            fault: "delay".into(),
            unit: Unit::Seconds,
            ..share(0.05, got, 1000)
        };
        assert_eq!(of(rule(9, vec![delay(0.054)], "delay")).0, Verdict::Passed);
        assert_eq!(of(rule(9, vec![delay(0.06)], "delay")).0, Verdict::Failed);
        let rate = |got| Realised {
            fault: "rate".into(),
            unit: Unit::BitsPerSecond,
            ..share(1e7, got, 1000)
        };
        assert_eq!(of(rule(9, vec![rate(9.8e6)], "rate")).0, Verdict::Passed);
        assert_eq!(of(rule(9, vec![rate(9.0e6)], "rate")).0, Verdict::Failed);
        let mut lapsed = rule(9, vec![], "cut");
        lapsed.egress.lapsed_packets = 1;
        assert_eq!(of(lapsed).0, Verdict::Void);
    }

    #[test]
    fn runs_that_say_nothing_are_void() {
        let good = || {
            run(
                Kind::Measure,
                &[],
                rule(1, vec![], "cut"),
                Expectation::Passed,
            )
        };
        for event in [
            Event::Interrupted {
                signal: "SIGINT".into(),
            },
            Event::Trouble { text: "x".into() },
            Event::NotSteady {
                checks: vec!["c".into()],
            },
        ] {
            let mut records = good();
            records.push(record(6.0, event));
            assert_eq!(judge(&records).verdict, Verdict::Void);
        }
        let mut records = good();
        records.retain(|record| record.event != Event::Healed);
        assert_eq!(judge(&records).verdict, Verdict::Void);
        let mut records = good();
        records.retain(|record| !matches!(record.event, Event::FaultEnded(_)));
        assert_eq!(judge(&records).verdict, Verdict::Void);
    }

    #[test]
    fn a_failure_can_be_expected() {
        let failing = [(1.5, true), (3.0, false)];
        let of = |answers: &[(f64, bool)]| {
            judge(&run(
                Kind::Safety,
                answers,
                rule(1, vec![], "cut"),
                Expectation::Failed,
            ))
        };
        assert!(of(&failing).as_expected);
        assert_eq!(of(&failing).verdict, Verdict::Failed);
        let passed = of(&[(1.5, true)]);
        assert!(!passed.as_expected);
        assert_eq!(passed.verdict, Verdict::Passed);
        assert!(passed.reasons[0].contains("expected to fail"));
        let mut void = run(
            Kind::Safety,
            &failing,
            rule(1, vec![], "cut"),
            Expectation::Failed,
        );
        void.push(record(6.0, Event::Trouble { text: "x".into() }));
        assert!(!judge(&void).as_expected);
    }

    #[test]
    fn another_failure_than_the_expected_one_is_none() {
        let failing = [(1.5, true), (3.0, false)];
        let named = |name: &str| Expectation::Fails(OneOrMany::One(name.to_owned()));
        let of = |expect: Expectation, matched: u64| {
            judge(&run(
                Kind::Safety,
                &failing,
                rule(matched, vec![], "cut"),
                expect,
            ))
        };
        assert!(of(named("c"), 1).as_expected);
        for (expect, matched) in [
            (named("other"), 1),
            // The fault did nothing, which fails the run too.
            (named("c"), 0),
            (Expectation::Failed, 0),
        ] {
            let ended = of(expect, matched);
            assert!(!ended.as_expected);
            let last = ended.reasons.last().unwrap();
            assert!(last.starts_with("it was expected that"), "{last}");
        }
    }
}
