//! Carrying out the steps of a plan: each waits for its turn, acts, and says when it has begun and ended.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Stop, World, checks,
    faults::Faults,
    processes::{self, Paused},
    services::Services,
};
use crate::{
    rules::{RuleSpec, text::duration},
    scenario::{
        file::{CheckState, Edge, Outcome, Partition, Processes, RunCommand, When},
        plan::{self, Action, Begins, Planned},
        record::Event,
        shape::{self, Who},
    },
};

/// What carrying out steps needs.
pub(super) struct Player {
    /// What they act on.
    pub(super) world: Arc<World>,
    /// The rules.
    pub(super) faults: Arc<Faults>,
    /// The services.
    pub(super) services: Arc<Services>,
    /// What checks answered last.
    pub(super) checks: BTreeMap<String, checks::State>,
    /// Why the run is to end early, once it is.
    pub(super) stop: Stop,
    /// Processes that stand still, by the step that paused them.
    pub(super) paused: Mutex<BTreeMap<String, (Paused, Instant)>>,
}

/// How far a step has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Waiting,
    Begun,
    Ended,
}

/// What a step calls as soon as it has begun: with a fault, when that is in force; with a group, when its first step
/// has. More calls mean nothing.
pub(super) type Begun = Arc<dyn Fn() + Send + Sync>;

/// What a step has to say when it ends.
type Outcomes = Result<Option<String>, String>;

impl Player {
    /// Plays steps; ready when all of them have ended. Boxed, since a group may stand in a group.
    #[must_use]
    pub(super) fn play(
        self: Arc<Self>,
        steps: Vec<Planned>,
        together: bool,
        begun: Begun,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.play_all(steps, together, begun))
    }

    async fn play_all(self: Arc<Self>, steps: Vec<Planned>, together: bool, any: Begun) {
        let start = Instant::now();
        let stages: Vec<watch::Sender<Stage>> = steps
            .iter()
            .map(|_| watch::channel(Stage::Waiting).0)
            .collect();
        let stages = Arc::new(stages);
        let mut tasks = JoinSet::new();
        for (index, step) in steps.into_iter().enumerate() {
            let player = Arc::clone(&self);
            let stages = Arc::clone(&stages);
            let any = Arc::clone(&any);
            tasks.spawn(async move {
                let _ended = EndsAtLast(&stages, index);
                let begun: Begun = {
                    let stages = Arc::clone(&stages);
                    Arc::new(move || {
                        set(&stages, index, Stage::Begun);
                        any();
                    })
                };
                let due = player.due(&step, index, start, together, &stages).await;
                let outcome = match due {
                    Due::Now => {
                        player.world.recorder.write(Event::StepStarted {
                            step: step.path.clone(),
                            what: step.words(),
                        });
                        Arc::clone(&player).step(&step, &begun).await
                    }
                    Due::Never(problem) => Err(problem),
                    Due::Stopped => return,
                };
                let (failure, detail) = match outcome {
                    Ok(detail) => (None, detail),
                    Err(failure) => (Some(failure), None),
                };
                player.world.recorder.write(Event::StepEnded {
                    step: step.path.clone(),
                    failure,
                    detail,
                });
            });
        }
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                self.world.recorder.write(Event::Trouble {
                    text: format!("a step broke off: {error}"),
                });
            }
        }
    }

    /// Waits until a step is due.
    async fn due(
        &self,
        step: &Planned,
        index: usize,
        start: Instant,
        together: bool,
        stages: &[watch::Sender<Stage>],
    ) -> Due {
        let waited = async {
            match &step.begins {
                Begins::Next if together => {}
                Begins::Next => {
                    if let Some(before) = index.checked_sub(1) {
                        reached(stages, before, Stage::Ended).await;
                    }
                }
                Begins::At(offset) => sleep_until(start + *offset).await,
                Begins::After { step, of, plus } => {
                    let stage = match of {
                        Edge::Start => Stage::Begun,
                        Edge::End => Stage::Ended,
                    };
                    reached(stages, *step, stage).await;
                    sleep(*plus).await;
                }
            }
            match &step.when {
                Some(when) => self.turned(when).await.err(),
                None => None,
            }
        };
        let mut stopping = self.stop.clone();
        tokio::select! {
            biased;
            _ = stopping.wait_for(Option::is_some) => Due::Stopped,
            problem = waited => problem.map_or(Due::Now, Due::Never),
        }
    }

    /// Waits until a check has turned true or false.
    async fn turned(&self, when: &When) -> Result<(), String> {
        let Some(state) = self.checks.get(&when.check) else {
            return Err(format!("there is no check '{}'", when.check));
        };
        let wanted = when.is == CheckState::Holding;
        let mut state = state.clone();
        match timeout(when.within.0, state.wait_for(|ok| *ok == Some(wanted))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(format!("check '{}' is not asked any more", when.check)),
            Err(_) => Err(format!(
                "check '{}' did not begin to {} within {}",
                when.check,
                if wanted { "hold" } else { "fail" },
                when.within
            )),
        }
    }

    /// Until a time has passed or the run is to end early.
    async fn pause_for(&self, time: Duration) {
        let mut stopping = self.stop.clone();
        tokio::select! {
            biased;
            _ = stopping.wait_for(Option::is_some) => {}
            () = sleep(time) => {}
        }
    }

    async fn step(self: Arc<Self>, step: &Planned, begun: &Begun) -> Outcomes {
        if !matches!(
            step.action,
            Action::Rules { .. }
                | Action::AskedPartition { .. }
                | Action::Ramp { .. }
                | Action::Pause(_)
                | Action::Group { .. }
                | Action::Others(_)
        ) {
            begun();
        }
        match &step.action {
            Action::Rules { rules, words } => self.fault(step, words, rules.clone(), begun).await,
            Action::AskedPartition { partition, seed } => {
                self.asked_partition(step, partition, *seed, begun).await
            }
            Action::Ramp {
                values,
                each,
                words,
            } => self.ramp(step, values, *each, words, begun).await,
            Action::Heal(paths) => {
                let healed = async {
                    if paths.is_empty() {
                        self.faults.heal_all().await?;
                    }
                    for path in paths {
                        self.faults.heal(path).await?;
                    }
                    Ok::<_, super::faults::FaultError>(())
                };
                healed.await.map_err(|error| error.to_string())?;
                self.resume_where(|step| {
                    paths.is_empty() || paths.iter().any(|path| is_within(step, path))
                })
            }
            Action::Run { run, on } => self.run(run, on.as_deref()).await,
            Action::Pause(which) => self.pause(step, which, begun).await,
            Action::Resume(which) => self.resume(which).await,
            Action::Kill { processes, signal } => {
                let killed = self.kill(processes, signal).await?;
                if let (Some(lasts), Some(service)) = (step.lasts, &processes.service) {
                    self.pause_for(lasts).await;
                    self.services.restart(service).await?;
                }
                Ok(killed)
            }
            Action::Start(service) => self.services.restart(service).await.map(|()| None),
            Action::Wait(time) => {
                self.pause_for(*time).await;
                Ok(None)
            }
            Action::Group { together, steps } => {
                let inner = Arc::clone(&self).play(steps.clone(), *together, Arc::clone(begun));
                let Some(lasts) = step.lasts else {
                    inner.await;
                    return Ok(None);
                };
                let end = Instant::now() + lasts;
                let done = tokio::time::timeout_at(end, inner).await.is_ok();
                if done {
                    // What it has begun goes on until its time is over.
                    self.pause_for(end.saturating_duration_since(Instant::now()))
                        .await;
                }
                self.faults
                    .heal(&step.path)
                    .await
                    .map_err(|error| error.to_string())?;
                self.resume_where(|paused| is_within(paused, &step.path))?;
                Ok((!done).then(|| format!("ended after {}", duration::format(lasts))))
            }
            Action::Others(action) => self.others(step, action, begun).await,
        }
    }

    /// A fault, and its end where it has one of its own.
    async fn fault(
        &self,
        step: &Planned,
        words: &str,
        rules: Vec<RuleSpec>,
        begun: &Begun,
    ) -> Outcomes {
        let mut healed = self
            .faults
            .start(&step.path, words, rules, step.expect_effect)
            .await
            .map_err(|error| error.to_string())?;
        begun();
        let Some(lasts) = step.lasts else {
            return Ok(None);
        };
        self.until_healed(step, &mut healed, lasts).await
    }

    /// A partition around a host that a command names.
    async fn asked_partition(
        &self,
        step: &Planned,
        partition: &Partition,
        seed: u64,
        begun: &Begun,
    ) -> Outcomes {
        let (who, cut) = self.asked(partition, seed).await?;
        let rules = plan::partition_rules(
            &self.world.scenario,
            self.world.plan.seed,
            &step.path,
            &cut,
            self.world.hosts(),
            &self.world.plan.selves,
        );
        let words = format!("partition {}", cut.words);
        if rules.is_empty() {
            self.elsewhere(step, step.lasts, begun).await?;
        } else {
            self.fault(step, &words, rules, begun).await?;
        }
        Ok(Some(format!("{who}: {words}")))
    }

    /// What other hosts do, which takes its time here too.
    async fn others(&self, step: &Planned, action: &Action, begun: &Begun) -> Outcomes {
        match action {
            Action::Rules { .. } => self.elsewhere(step, step.lasts, begun).await,
            Action::Ramp { .. } => {
                let lasts = action.takes(step.lasts);
                self.elsewhere(step, Some(lasts), begun).await
            }
            _ => {
                begun();
                self.pause_for(action.takes(step.lasts)).await;
                Ok(None)
            }
        }
    }

    /// A fault of other hosts: until it is over, or another step heals it.
    async fn elsewhere(&self, step: &Planned, lasts: Option<Duration>, begun: &Begun) -> Outcomes {
        let mut healed = self.faults.start_elsewhere(&step.path);
        begun();
        match lasts {
            None => Ok(None),
            Some(lasts) => self.until_healed(step, &mut healed, lasts).await,
        }
    }

    /// Until the time of a step's fault is over, which is healed then, or another step has healed it.
    async fn until_healed(
        &self,
        step: &Planned,
        healed: &mut watch::Receiver<bool>,
        lasts: Duration,
    ) -> Outcomes {
        tokio::select! {
            () = self.pause_for(lasts) => {}
            _ = healed.wait_for(|healed| *healed) => {}
        }
        self.faults
            .heal(&step.path)
            .await
            .map(|()| None)
            .map_err(|error| error.to_string())
    }

    async fn ramp(
        &self,
        step: &Planned,
        values: &[(String, Vec<RuleSpec>)],
        each: Duration,
        words: &str,
        begun: &Begun,
    ) -> Outcomes {
        let mut acting = None;
        for (number, (text, rules)) in (1..).zip(values) {
            let failed = |error: super::faults::FaultError| format!("at {text}: {error}");
            let (healed, since) = match &mut acting {
                None => {
                    let receiver = self
                        .faults
                        .start(&step.path, words, rules.clone(), step.expect_effect)
                        .await
                        .map_err(failed)?;
                    begun();
                    acting.insert((receiver, Instant::now()))
                }
                Some(acting) => {
                    let changed = self.faults.change(&step.path, rules.clone()).await;
                    if !changed.map_err(failed)? {
                        return Ok(None);
                    }
                    acting
                }
            };
            // In all it takes its time, but where changes are so slow that a value would have less than half of its own.
            let until = (*since + each * number).max(Instant::now() + each / 2);
            self.world.recorder.write(Event::Note {
                text: format!("step {}: {text}", step.path),
            });
            let mut stopping = self.stop.clone();
            tokio::select! {
                biased;
                _ = stopping.wait_for(Option::is_some) => break,
                _ = healed.wait_for(|healed| *healed) => return Ok(None),
                () = sleep_until(until) => {}
            }
        }
        self.faults
            .heal(&step.path)
            .await
            .map(|()| None)
            .map_err(|error| error.to_string())
    }

    /// Asks which host a partition is about.
    async fn asked(
        &self,
        partition: &Partition,
        seed: u64,
    ) -> Result<(String, shape::Cut), String> {
        let Some(Who::Asked(asked)) = &partition.who else {
            return Err("the partition names no command".to_owned());
        };
        let command = &asked.command;
        let word = checks::name(&self.world, asked).await?;
        let host = self
            .world
            .hosts()
            .find(&word)
            .ok_or_else(|| format!("'{command}' named '{word}', which is no host"))?;
        let names = self.world.hosts().names();
        let cut = shape::cut(partition, &names, seed, Some(&host))
            .map_err(|problem| format!("{}: {}", problem.problem, problem.help))?;
        Ok((host, cut))
    }

    async fn run(&self, run: &RunCommand, on: Option<&str>) -> Outcomes {
        let deadline = Instant::now() + run.within.0;
        loop {
            let begun = Instant::now();
            let mut stopping = self.stop.clone();
            let ended = tokio::select! {
                biased;
                _ = stopping.wait_for(Option::is_some) => return Ok(Some("the run ended first".to_owned())),
                ended = tokio::time::timeout_at(deadline, checks::command(&self.world, &run.command, on)) => ended,
            };
            let (success, how, said) = match ended {
                Ok(Ok(ended)) => (ended.success, ended.how, checks::detail(&ended.said)),
                Ok(Err(problem)) => return Err(problem),
                Err(_) => (false, format!("not done within {}", run.within), None),
            };
            let wanted = match run.expect {
                Outcome::Success => success,
                Outcome::Failure => !success,
                Outcome::Any => true,
            };
            if wanted {
                return Ok(said);
            }
            let again = run.every.map(|every| begun + every.0);
            match again {
                Some(again) if again < deadline => {
                    self.pause_for(again.saturating_duration_since(Instant::now()))
                        .await;
                }
                _ => {
                    let said = said.map_or_else(String::new, |said| format!(": {said}"));
                    let was = match run.expect {
                        Outcome::Failure => "it was to fail, and did not",
                        _ => how.as_str(),
                    };
                    return Err(format!("'{}': {was}{said}", run.command));
                }
            }
        }
    }

    async fn pause(&self, step: &Planned, which: &Processes, begun: &Begun) -> Outcomes {
        let start = Instant::now();
        let paused = processes::pause(&self.world, &self.services, which).await?;
        self.world.recorder.write(Event::Paused {
            step: step.path.clone(),
            what: plan::which(which),
            processes: paused.count(),
        });
        self.locked().insert(step.path.clone(), (paused, start));
        begun();
        let Some(lasts) = step.lasts else {
            return Ok(None);
        };
        self.pause_for(lasts.saturating_sub(start.elapsed())).await;
        self.resume_where(|paused| paused == step.path)
    }

    /// Lets processes go on that these steps have paused.
    pub(super) fn resume_where(&self, wanted: impl Fn(&str) -> bool) -> Outcomes {
        let steps: Vec<String> = self
            .locked()
            .keys()
            .filter(|step| wanted(step))
            .cloned()
            .collect();
        let mut problems = Vec::new();
        for step in steps {
            let Some((paused, since)) = self.locked().remove(&step) else {
                continue;
            };
            if let Err(problem) = processes::resume(&self.world, &paused) {
                problems.push(problem);
            }
            self.world.recorder.write(Event::Resumed {
                step,
                after: since.elapsed().as_secs_f64(),
            });
        }
        if problems.is_empty() {
            Ok(None)
        } else {
            Err(problems.join("; "))
        }
    }

    async fn resume(&self, which: &Processes) -> Outcomes {
        let found = processes::find(&self.world, &self.services, which).await?;
        let steps: Vec<String> = self
            .locked()
            .iter()
            .filter(|(_, (paused, _))| paused.is_of(&found))
            .map(|(step, _)| step.clone())
            .collect();
        if steps.is_empty() {
            return Err(format!("no step has paused {}", plan::which(which)));
        }
        self.resume_where(|step| steps.iter().any(|wanted| wanted == step))
    }

    async fn kill(&self, which: &Processes, signal: &str) -> Outcomes {
        let found = processes::find(&self.world, &self.services, which).await?;
        self.services.expect_ends(&found);
        let count = processes::kill(&found, signal)?;
        Ok(Some(format!("{count} processes")))
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, (Paused, Instant)>> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a step's turn comes.
enum Due {
    Now,
    Never(String),
    Stopped,
}

/// Whether a step is another one, or within it.
fn is_within(step: &str, path: &str) -> bool {
    step.strip_prefix(path)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '[']))
}

/// A step comes no less far than it has come.
fn set(stages: &[watch::Sender<Stage>], index: usize, stage: Stage) {
    if let Some(sender) = stages.get(index) {
        sender.send_if_modified(|now| {
            let further = stage > *now;
            *now = stage.max(*now);
            further
        });
    }
}

async fn reached(stages: &[watch::Sender<Stage>], index: usize, stage: Stage) {
    if let Some(sender) = stages.get(index) {
        // The sender lives as long as we look at it.
        let _ = sender.subscribe().wait_for(|now| *now >= stage).await;
    }
}

/// Whatever becomes of a step's task, those that wait for its end are let go.
struct EndsAtLast<'a>(&'a [watch::Sender<Stage>], usize);

impl Drop for EndsAtLast<'_> {
    fn drop(&mut self) {
        set(self.0, self.1, Stage::Ended);
    }
}
