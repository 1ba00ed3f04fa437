//! One HTML file for people: nothing in it is loaded from elsewhere.

use std::collections::BTreeMap;

use maud::{DOCTYPE, Markup, PreEscaped, html as markup};

use super::{
    plots::{self, HUES, Line},
    story::{CheckStory, Fault, Story},
};
use crate::{
    protocol::{RuleCounters, RuleStats},
    scenario::{
        file::Kind,
        record::{Record, Verdict},
    },
    words::realised,
};

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
#[error("drawing a plot: {0}")]
pub struct HtmlError(String);

const STYLE: &str = include_str!("style.css");

/// The report of these records.
pub fn html(records: &[Record]) -> Result<String, HtmlError> {
    let story = Story::of(records);
    let title = story
        .started
        .map_or_else(|| "scenario".to_owned(), |started| started.scenario.clone());
    let plots = drawn(&story)?;
    let verdict = story.ended.verdict;
    let page = markup! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) ": " (verdict) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { (title) }
                    @if let Some(description) = story.started.and_then(|started| started.description.as_ref()) {
                        p.description { (description) }
                    }
                    section.verdict.(verdict_class(&story)) {
                        p { strong { (verdict_words(&story)) } }
                        @if !story.ended.reasons.is_empty() {
                            ul { @for reason in &story.ended.reasons { li { (reason) } } }
                        }
                    }
                    (windows(&story))
                    @for plot in &plots {
                        figure {
                            figcaption {
                                (plot.title)
                                @if plot.names.len() > 1 || plot.failures {
                                    span.legend {
                                        @for (name, hue) in plot.names.iter().zip(HUES.iter().cycle()) {
                                            span { i style=(format!("background:rgb({},{},{})", hue.0, hue.1, hue.2)) {} (name) }
                                        }
                                        @if plot.failures { span { b.cross { "×" } "failed" } }
                                    }
                                }
                            }
                            div.plot role="img" aria-label=(plot.title) { (PreEscaped(&plot.svg)) }
                        }
                    }
                    (checks(&story))
                    (faults(&story))
                    (steps(&story))
                    (remarks(&story))
                    (again(&story))
                }
            }
        }
    };
    Ok(page.into_string())
}

fn verdict_class(story: &Story<'_>) -> &'static str {
    match (story.ended.verdict, story.ended.as_expected) {
        (_, true) => "good",
        (Verdict::Void, _) => "void",
        (_, false) => "bad",
    }
}

fn verdict_words(story: &Story<'_>) -> String {
    match (story.ended.verdict, story.ended.as_expected) {
        (Verdict::Passed, true) => {
            "Passed: every check held when it had to, and every fault acted".to_owned()
        }
        (Verdict::Passed, false) => "Passed, and was expected to fail".to_owned(),
        (Verdict::Failed, true) => "Failed, as expected".to_owned(),
        (Verdict::Failed, false) => "Failed".to_owned(),
        (Verdict::Void, _) => "Void: this run says nothing about the service".to_owned(),
    }
}

/// A plot with what stands above it.
struct Drawn {
    title: String,
    svg: String,
    names: Vec<String>,
    failures: bool,
}

fn drawn(story: &Story<'_>) -> Result<Vec<Drawn>, HtmlError> {
    let mut found = Vec::new();
    let mut add = |title: &str, unit: &str, lines: Vec<Line>| -> Result<(), HtmlError> {
        let lines: Vec<Line> = lines
            .into_iter()
            .filter(|line| {
                line.parts.iter().any(|part| !part.is_empty()) || !line.failures.is_empty()
            })
            .collect();
        if lines.is_empty() {
            return Ok(());
        }
        found.push(Drawn {
            title: title.to_owned(),
            svg: plots::lines(story, &lines, unit).map_err(|error| HtmlError(error.to_string()))?,
            failures: lines.iter().any(|line| !line.failures.is_empty()),
            names: lines.into_iter().map(|line| line.name).collect(),
        });
        Ok(())
    };
    let latency = story
        .checks
        .iter()
        .filter(|check| !check.info.at_end)
        .map(|check| Line {
            name: check.info.name.clone(),
            parts: unbroken(check),
            failures: check
                .answers
                .iter()
                .filter(|(_, answer)| !answer.ok)
                .map(|(at, answer)| (*at, answer.latency_ms))
                .collect(),
        })
        .collect();
    add("Latency of checks", "ms", latency)?;
    add("Checks that held, of each second", "%", success(story))?;
    add(
        "Packets that faults met, by fate",
        "packets/s",
        fates(story),
    )?;
    add(
        "Waiting in queues, and delay given (means)",
        "ms",
        times(story),
    )?;
    Ok(found)
}

/// Latencies of answers that held, in stretches without a failure between them.
fn unbroken(check: &CheckStory<'_>) -> Vec<Vec<(f64, f64)>> {
    check
        .answers
        .split(|(_, answer)| !answer.ok)
        .filter(|part| !part.is_empty())
        .map(|part| {
            part.iter()
                .map(|(at, answer)| (*at, answer.latency_ms))
                .collect()
        })
        .collect()
}

/// The share of answers that held, second by second.
fn success(story: &Story<'_>) -> Vec<Line> {
    story
        .checks
        .iter()
        .filter(|check| !check.info.at_end)
        .map(|check| {
            let mut seconds: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
            for (at, answer) in &check.answers {
                let second = seconds.entry(whole(*at)).or_default();
                second.0 += u32::from(answer.ok);
                second.1 += 1;
            }
            Line {
                name: check.info.name.clone(),
                parts: vec![
                    seconds
                        .into_iter()
                        .map(|(second, (held, all))| {
                            (
                                float(second) + 0.5,
                                100.0 * f64::from(held) / f64::from(all),
                            )
                        })
                        .collect(),
                ],
                failures: Vec::new(),
            }
        })
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times of a run are seconds from 0"
)]
fn whole(time: f64) -> u64 {
    time.max(0.0) as u64
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Both directions of a rule together.
fn both(rule: &RuleStats) -> RuleCounters {
    let mut sum = rule.egress;
    sum += rule.ingress;
    sum
}

/// What the counters of all rules grew by between two samples. A rule that was not there before began at nothing; one
/// that began anew (it was changed) too.
fn growth(story: &Story<'_>, of: impl Fn(&RuleCounters) -> u64) -> Vec<(f64, f64, f64)> {
    let mut before: BTreeMap<&str, u64> = BTreeMap::new();
    let mut last = story.steady.unwrap_or(0.0);
    let mut grown = Vec::new();
    for (at, sample) in &story.samples {
        let mut sum = 0;
        for rule in &sample.rules {
            let now = of(&both(rule));
            let then = before.insert(&rule.name, now).unwrap_or(0);
            sum += now.checked_sub(then).unwrap_or(now);
        }
        let time = at - last;
        if time > 0.0 {
            grown.push((*at, float(sum), time));
        }
        last = *at;
    }
    grown
}

fn fates(story: &Story<'_>) -> Vec<Line> {
    type Of = fn(&RuleCounters) -> u64;
    let kinds: [(&str, Of); 7] = [
        ("matched", |c| c.matched_packets),
        ("cut", |c| c.cut_packets + c.too_long_packets),
        ("lost", |c| c.lost_packets),
        ("queue full", |c| c.overflow_packets),
        ("duplicated", |c| c.duplicated_packets),
        ("corrupted", |c| c.corrupted_packets),
        ("delayed", |c| {
            c.delayed_packets + c.stalled_packets + c.reordered_packets
        }),
    ];
    kinds
        .into_iter()
        .map(|(name, of)| Line {
            name: name.to_owned(),
            parts: vec![
                growth(story, of)
                    .into_iter()
                    .map(|(at, count, time)| (at, count / time))
                    .collect(),
            ],
            failures: Vec::new(),
        })
        .filter(|line| line.parts.iter().flatten().any(|(_, value)| *value > 0.0))
        .collect()
}

fn times(story: &Story<'_>) -> Vec<Line> {
    type Of = fn(&RuleCounters) -> u64;
    let kinds: [(&str, Of, Of); 3] = [
        ("in queues", |c| c.queued_ns, |c| c.queued_packets),
        ("delay", |c| c.delayed_ns, |c| c.delayed_packets),
        ("stall", |c| c.stalled_ns, |c| c.stalled_packets),
    ];
    kinds
        .into_iter()
        .map(|(name, time, packets)| Line {
            name: name.to_owned(),
            parts: vec![
                growth(story, time)
                    .into_iter()
                    .zip(growth(story, packets))
                    .filter(|(_, (_, packets, _))| *packets > 0.0)
                    .map(|((at, nanos, _), (_, packets, _))| (at, nanos / packets / 1e6))
                    .collect(),
            ],
            failures: Vec::new(),
        })
        .collect()
}

/// The timeline: a row for each fault.
fn windows(story: &Story<'_>) -> Markup {
    let share = |at: f64| 100.0 * at / story.length.max(0.1);
    markup! {
        @if !story.faults.is_empty() {
            section {
                h2 { "Timeline" }
                div.timeline {
                    @for fault in &story.faults {
                        div.lane {
                            span.label title=(fault.what) { (fault.step) }
                            span.track {
                                span.window style=(format!(
                                    "left:{:.2}%;width:{:.2}%",
                                    share(fault.from),
                                    share((fault.to - fault.from).max(story.length / 400.0))
                                )) title=(format!("{}: {:.1} s to {:.1} s", fault.what, fault.from, fault.to)) {}
                            }
                        }
                    }
                    div.lane.axis {
                        span.label { "seconds" }
                        span.track {
                            @for tick in ticks(story.length) {
                                span.tick style=(format!("left:{:.2}%", share(tick))) { (format!("{tick:.0}")) }
                            }
                        }
                    }
                }
                p.note {
                    "Shaded in the plots below: while a fault acted. Green lines: the steady state was there; everything was healed."
                }
            }
        }
    }
}

/// At most ten round times.
fn ticks(length: f64) -> Vec<f64> {
    let step = [
        1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
    ]
    .into_iter()
    .find(|step| length / step <= 10.0)
    .unwrap_or(length / 10.0);
    (0..=10_u32)
        .map(|tick| f64::from(tick) * step)
        .take_while(|tick| *tick < length)
        .collect()
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Safety => "safety",
        Kind::Liveness => "liveness",
        Kind::Measure => "measure",
    }
}

fn checks(story: &Story<'_>) -> Markup {
    let failures = |check: &CheckStory<'_>| {
        markup! {
            @for (from, to, why) in check.outages() {
                div { (format!("{from:.1} to {to:.1} s")) @if let Some(why) = why { ": " (why) } }
            }
        }
    };
    markup! {
        @if !story.checks.is_empty() {
            section {
                h2 { "Checks" }
                div.wide { table {
                    thead { tr { th { "Check" } th { "Kind" } th { "Asked" } th { "Failed" } th { "p50" } th { "p99" } th { "When it failed" } } }
                    tbody {
                        @for check in &story.checks {
                            tr {
                                td { strong { (check.info.name) } div.note { (check.info.what) } }
                                td { (kind(check.info.kind)) @if check.info.at_end { ", at the end" } }
                                td.number { (check.answers.len()) }
                                td.number { (check.failed()) }
                                @match check.latency() {
                                    Some((median, late)) => {
                                        td.number { (format!("{median:.1} ms")) }
                                        td.number { (format!("{late:.1} ms")) }
                                    }
                                    None => { td {} td {} }
                                }
                                td { (failures(check)) }
                            }
                        }
                    }
                } }
            }
        }
    }
}

fn faults(story: &Story<'_>) -> Markup {
    let acted = |fault: &Fault<'_>| match (fault.started, fault.ended) {
        (Some(started), Some(ended)) if started.expect_effect && ended.matched_packets == 0 => {
            markup! { span.bad { "did nothing: no packet matched" } }
        }
        (_, Some(ended)) => markup! {
            (ended.matched_packets) " packets matched"
            @for one in &ended.realised { div { (realised(one)) } }
        },
        (Some(_), None) => markup! { span.bad { "what it did is not known" } },
        (None, None) => markup! { "processes stood still" },
    };
    markup! {
        @if !story.faults.is_empty() {
            section {
                h2 { "Faults: asked and realised" }
                div.wide { table {
                    thead { tr { th { "Step" } th { "Asked" } th { "From" } th { "To" } th { "Realised" } } }
                    tbody {
                        @for fault in &story.faults {
                            tr {
                                td { strong { (fault.step) } }
                                td { (fault.what) }
                                td.number { (format!("{:.1} s", fault.from)) }
                                td.number { (format!("{:.1} s", fault.to)) }
                                td { (acted(fault)) }
                            }
                        }
                    }
                } }
            }
        }
    }
}

fn steps(story: &Story<'_>) -> Markup {
    markup! {
        @if !story.steps.is_empty() {
            section {
                h2 { "Steps" }
                div.wide { table {
                    thead { tr { th { "Step" } th { "What" } th { "From" } th { "To" } th { "Result" } } }
                    tbody {
                        @for step in &story.steps {
                            tr {
                                td { strong { (step.path) } }
                                td { (step.what) }
                                td.number { (format!("{:.1} s", step.from)) }
                                td.number { @if let Some(to) = step.to { (format!("{to:.1} s")) } }
                                td {
                                    @if let Some(failure) = step.failure { span.bad { (failure) } }
                                    @if let Some(detail) = step.detail { (detail) }
                                }
                            }
                        }
                    }
                } }
            }
        }
    }
}

fn remarks(story: &Story<'_>) -> Markup {
    markup! {
        @if !story.remarks.is_empty() {
            section {
                h2 { "What else happened" }
                div.wide { table { tbody {
                    @for (at, text) in &story.remarks {
                        tr { td.number { (format!("{at:.1} s")) } td { (text) } }
                    }
                } } }
            }
        }
    }
}

fn again(story: &Story<'_>) -> Markup {
    markup! {
        @if let Some(started) = story.started {
            section {
                h2 { "Once more" }
                p { "Seed " code { (started.seed) } ". The same faults at the same times:" }
                pre { code { (started.replay) } }
                div.wide { table { tbody {
                    tr { td { "File" } td { (started.file) } }
                    tr { td { "injector" } td { (started.version) } }
                    tr { td { "Kernel" } td { (started.kernel) } }
                    tr { td { "This run did the part of" } td { (started.selves.join(", ")) } }
                    @for (name, address) in &started.hosts {
                        tr { td { "Host " (name) } td { (address) } }
                    }
                } } }
            }
        }
    }
}
