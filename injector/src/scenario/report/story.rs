//! What reports tell, found in the records once for all of them.

use std::collections::BTreeMap;

use crate::scenario::record::{
    CheckInfo, Checked, Event, FaultEnded, FaultStarted, Record, RunEnded, RunStarted, Sample,
    Verdict,
};

/// A run, in the order in which it is told.
pub(crate) struct Story<'a> {
    pub(crate) started: Option<&'a RunStarted>,
    pub(crate) ended: RunEnded,
    /// Time of the last record, in seconds.
    pub(crate) length: f64,
    pub(crate) steady: Option<f64>,
    pub(crate) healed: Option<f64>,
    pub(crate) faults: Vec<Fault<'a>>,
    pub(crate) checks: Vec<CheckStory<'a>>,
    pub(crate) steps: Vec<StepStory<'a>>,
    pub(crate) samples: Vec<(f64, &'a Sample)>,
    /// What else happened, in order.
    pub(crate) remarks: Vec<(f64, String)>,
}

/// A fault: rules that act, or processes that stand still.
pub(crate) struct Fault<'a> {
    pub(crate) step: &'a str,
    pub(crate) what: String,
    pub(crate) from: f64,
    pub(crate) to: f64,
    pub(crate) started: Option<&'a FaultStarted>,
    pub(crate) ended: Option<&'a FaultEnded>,
}

/// A check and its answers.
pub(crate) struct CheckStory<'a> {
    pub(crate) info: &'a CheckInfo,
    pub(crate) answers: Vec<(f64, &'a Checked)>,
}

impl CheckStory<'_> {
    pub(crate) fn failed(&self) -> usize {
        self.answers.iter().filter(|(_, answer)| !answer.ok).count()
    }

    /// From when to when it failed without a break, and why first.
    pub(crate) fn outages(&self) -> Vec<(f64, f64, Option<&str>)> {
        let mut found: Vec<(f64, f64, Option<&str>)> = Vec::new();
        let mut failing = false;
        for (at, answer) in &self.answers {
            if answer.ok {
                if failing && let Some(last) = found.last_mut() {
                    last.1 = *at;
                }
                failing = false;
                continue;
            }
            if failing && let Some(last) = found.last_mut() {
                last.1 = *at;
            } else {
                found.push((answer.asked, *at, answer.detail.as_deref()));
            }
            failing = true;
        }
        found
    }

    /// Median and 99th percentile of the latency of answers that held, in milliseconds.
    pub(crate) fn latency(&self) -> Option<(f64, f64)> {
        let mut all: Vec<f64> = self
            .answers
            .iter()
            .filter(|(_, answer)| answer.ok)
            .map(|(_, answer)| answer.latency_ms)
            .collect();
        all.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            all.get((all.len().checked_sub(1)?) * percent / 100)
                .copied()
        };
        Some((at(50)?, at(99)?))
    }
}

/// A step.
pub(crate) struct StepStory<'a> {
    pub(crate) path: &'a str,
    pub(crate) what: &'a str,
    pub(crate) from: f64,
    pub(crate) to: Option<f64>,
    pub(crate) failure: Option<&'a str>,
    pub(crate) detail: Option<&'a str>,
}

impl<'a> Story<'a> {
    pub(crate) fn of(records: &'a [Record]) -> Self {
        let length = records.last().map_or(0.0, |record| record.t);
        let mut story = Self {
            started: None,
            ended: RunEnded {
                verdict: Verdict::Void,
                as_expected: false,
                reasons: vec!["the run ended without a verdict: it was killed".to_owned()],
            },
            length,
            steady: None,
            healed: None,
            faults: Vec::new(),
            checks: Vec::new(),
            steps: Vec::new(),
            samples: Vec::new(),
            remarks: Vec::new(),
        };
        let mut places = BTreeMap::new();
        for record in records {
            story.add(record, &mut places);
        }
        story
    }

    fn add(&mut self, record: &'a Record, places: &mut BTreeMap<&'a str, usize>) {
        let t = record.t;
        match &record.event {
            Event::RunStarted(started) => {
                self.checks = started
                    .checks
                    .iter()
                    .map(|info| CheckStory {
                        info,
                        answers: Vec::new(),
                    })
                    .collect();
                for (place, check) in started.checks.iter().enumerate() {
                    places.insert(&check.name, place);
                }
                self.started = Some(started);
            }
            Event::Steady { .. } => self.steady = Some(t),
            Event::Healed => self.healed = Some(t),
            Event::Checked(checked) => {
                let check = places
                    .get(checked.check.as_str())
                    .and_then(|place| self.checks.get_mut(*place));
                if let Some(check) = check {
                    check.answers.push((t, checked));
                }
            }
            Event::StepStarted { step, what } => self.steps.push(StepStory {
                path: step,
                what,
                from: t,
                to: None,
                failure: None,
                detail: None,
            }),
            Event::StepEnded {
                step,
                failure,
                detail,
            } => {
                if let Some(found) = self.steps.iter_mut().rev().find(|one| one.path == step) {
                    found.to = Some(t);
                    found.failure = failure.as_deref();
                    found.detail = detail.as_deref();
                } else if let Some(failure) = failure {
                    self.remarks
                        .push((t, format!("step {step} never began: {failure}")));
                }
            }
            Event::FaultStarted(started) => self.faults.push(Fault {
                step: &started.step,
                what: started.what.clone(),
                from: t,
                to: self.length,
                started: Some(started),
                ended: None,
            }),
            Event::FaultEnded(ended) => {
                let open = self
                    .faults
                    .iter_mut()
                    .rev()
                    .find(|fault| fault.step == ended.step);
                if let Some(fault) = open {
                    fault.to = t;
                    fault.ended = Some(ended);
                }
            }
            Event::Paused { step, what, .. } => self.faults.push(Fault {
                step,
                what: format!("pause {what}"),
                from: t,
                to: self.length,
                started: None,
                ended: None,
            }),
            Event::Resumed { step, .. } => {
                let open = self
                    .faults
                    .iter_mut()
                    .rev()
                    .find(|fault| fault.step == step);
                if let Some(fault) = open {
                    fault.to = t;
                }
            }
            Event::Sample(sample) => self.samples.push((t, sample)),
            Event::RunEnded(ended) => self.ended = ended.clone(),
            event => self.remarks.extend(remark(event).map(|remark| (t, remark))),
        }
    }
}

/// What happened to the lab and its services, and what the run itself had to say, in words.
fn remark(event: &Event) -> Option<String> {
    Some(match event {
        Event::LabMade { lab } => format!("lab {lab} was made"),
        Event::ServiceStarted { service, .. } => format!("service {service} was started"),
        Event::ServiceReady { service, took } => {
            format!("service {service} was ready after {took:.1} s")
        }
        Event::ServiceEnded {
            service,
            how,
            asked: true,
        } => format!("service {service} ended ({how})"),
        Event::ServiceEnded {
            service,
            how,
            asked: false,
        } => format!("service {service} ended ({how}), and nobody had told it to"),
        Event::NotSteady { checks } => format!("no steady state: {}", checks.join(", ")),
        Event::Note { text } => text.clone(),
        Event::Trouble { text } => format!("trouble: {text}"),
        Event::Interrupted { signal } => format!("interrupted by {signal}"),
        _ => return None,
    })
}
