//! A run while it goes on: on a terminal the checks and faults as they are now, in a pipe a line for each event.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{self, Output, Tone, toned};
use crate::{
    scenario::{
        file::Scenario,
        plan::Plan,
        record::{Checked, Event, Record},
    },
    words,
};

/// What is shown of a run.
pub(super) struct Live {
    output: Output,
    bars: Option<Bars>,
    state: Mutex<State>,
}

/// Lines at the bottom of a terminal.
struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    faults: ProgressBar,
    checks: BTreeMap<String, ProgressBar>,
}

#[derive(Default)]
struct State {
    faults: BTreeMap<String, String>,
    checks: BTreeMap<String, Tally>,
}

#[derive(Default)]
struct Tally {
    asked: u64,
    failed: u64,
    holds: Option<bool>,
}

impl Live {
    /// Nothing has happened yet.
    pub(super) fn new(output: Output, plan: &Plan, scenario: &Scenario) -> Self {
        let bars = (output.terminal && !output.json).then(|| {
            // What else is printed of a run goes there, too.
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
            let line = |template: &str| {
                let bar = all.add(ProgressBar::new_spinner());
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar
            };
            let head = line("{spinner} {elapsed_precise}  {msg}");
            head.set_message(format!("{}, seed {}", scenario.name, plan.seed));
            head.enable_steady_tick(Duration::from_millis(200));
            let faults = line("  faults: {msg}");
            faults.set_message("none");
            let checks = scenario
                .checks
                .iter()
                .map(|check| {
                    let name = check.value.name.clone();
                    let bar = line("  {prefix}: {msg}");
                    bar.set_prefix(name.clone());
                    bar.set_message("not asked yet");
                    (name, bar)
                })
                .collect();
            Bars {
                all,
                head,
                faults,
                checks,
            }
        });
        Self {
            output,
            bars,
            state: Mutex::default(),
        }
    }

    /// Shows a record.
    pub(super) fn show(&self, record: &Record) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let line = state.line(record);
        if let Some(bars) = &self.bars {
            let names: Vec<&str> = state.faults.keys().map(String::as_str).collect();
            bars.faults.set_message(if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            });
            if let Event::Checked(checked) = &record.event
                && let (Some(bar), Some(tally)) = (
                    bars.checks.get(&checked.check),
                    state.checks.get(&checked.check),
                )
            {
                bar.set_message(tally.words(checked));
            }
            if let Some(line) = line {
                // Lines that a terminal does not take are in the log.
                let _ = bars.all.println(output::for_stdout(&line));
            }
        } else if let Some(line) = line
            && !self.output.json
        {
            // A reader that has gone finds the rest in the log.
            let _ = output::print(&format!("{line}\n"));
        }
    }

    /// Takes the lines at the bottom away.
    pub(super) fn close(&self) {
        if let Some(bars) = &self.bars {
            bars.head.finish_and_clear();
            bars.faults.finish_and_clear();
            for bar in bars.checks.values() {
                bar.finish_and_clear();
            }
        }
    }
}

impl Tally {
    fn words(&self, last: &Checked) -> String {
        let state = if last.ok { "holds" } else { "FAILS" };
        let failed = match self.failed {
            0 => String::new(),
            failed => format!(", {failed} of {} failed", self.asked),
        };
        format!("{state}, {:.1} ms{failed}", last.latency_ms)
    }
}

impl State {
    /// What a record says in a line; of checks only that they turn.
    fn line(&mut self, record: &Record) -> Option<String> {
        let text = match &record.event {
            Event::RunStarted(started) => {
                let replay = &started.replay;
                format!("{} with seed {} ({replay})", started.scenario, started.seed)
            }
            Event::LabMade { lab } => format!("lab {lab} is made"),
            Event::ServiceStarted { service, pid } => {
                format!("service {service} is started (process {pid})")
            }
            Event::ServiceReady { service, took } => {
                format!("service {service} is ready after {took:.1} s")
            }
            Event::ServiceEnded {
                service,
                how,
                asked,
            } => {
                let tone = if *asked { Tone::Head } else { Tone::Bad };
                toned(tone, &format!("service {service} ended ({how})"))
            }
            Event::Steady { took } => toned(Tone::Good, &format!("steady state after {took:.1} s")),
            Event::NotSteady { checks } => toned(
                Tone::Bad,
                &format!("no steady state: {} did not hold", checks.join(", ")),
            ),
            Event::Checked(checked) => {
                let tally = self.checks.entry(checked.check.clone()).or_default();
                tally.asked += 1;
                tally.failed += u64::from(!checked.ok);
                if tally.holds == Some(checked.ok) {
                    return None;
                }
                tally.holds = Some(checked.ok);
                let detail = checked
                    .detail
                    .as_ref()
                    .map_or_else(String::new, |detail| format!(": {detail}"));
                if checked.ok {
                    toned(
                        Tone::Good,
                        &format!("check {} holds{detail}", checked.check),
                    )
                } else {
                    toned(Tone::Bad, &format!("check {} fails{detail}", checked.check))
                }
            }
            Event::StepStarted { step, what } => format!("{step}: {what}"),
            Event::StepEnded {
                step,
                failure: Some(failure),
                ..
            } => toned(Tone::Bad, &format!("{step} failed: {failure}")),
            Event::StepEnded {
                step,
                failure: None,
                detail: Some(detail),
            } => format!("{step}: {detail}"),
            Event::FaultStarted(started) => {
                self.faults
                    .insert(started.step.clone(), started.what.clone());
                toned(
                    Tone::Notice,
                    &format!("{} acts: {}", started.step, started.what),
                )
            }
            Event::FaultEnded(ended) => {
                self.faults.remove(&ended.step);
                format!(
                    "{} is healed, {} met",
                    ended.step,
                    words::count(ended.matched_packets, "packet")
                )
            }
            Event::Paused {
                step,
                what,
                processes,
            } => {
                self.faults.insert(step.clone(), what.clone());
                toned(
                    Tone::Notice,
                    &format!(
                        "{step}: {what} stands still ({processes} process{})",
                        if *processes == 1 { "" } else { "es" }
                    ),
                )
            }
            Event::Resumed { step, after } => {
                self.faults.remove(step);
                format!("{step}: goes on after {after:.1} s")
            }
            Event::Note { text } => text.clone(),
            Event::Trouble { text } => toned(Tone::Bad, text),
            Event::Interrupted { signal } => toned(Tone::Bad, &format!("interrupted by {signal}")),
            Event::Healed => toned(Tone::Good, "everything is healed"),
            Event::StepEnded { .. } | Event::Sample(_) | Event::RunEnded(_) => return None,
        };
        Some(format!("{:>7.1} s  {text}", record.t))
    }
}
