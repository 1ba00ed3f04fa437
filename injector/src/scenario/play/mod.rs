//! Carrying a plan out: the lab and its services, the checks, the steps, and the way back to how everything was.

mod checks;
mod faults;
pub mod keeper;
mod processes;
mod recorder;
mod services;
mod steps;

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    fmt::Write as _,
    fs, io,
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::{Path, PathBuf},
    process,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tokio::{
    process::Command,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

pub use self::recorder::{Recorder, Watcher};
use self::{faults::Faults, keeper::Keeper, services::Services, steps::Player};
use super::{
    file::{CommandLine, Kind, Scenario, Service},
    names::Hosts,
    plan::Plan,
    record::{CheckInfo, Event, RunEnded, RunStarted},
    verdict,
};
use crate::{
    client::{Client, Endpoint},
    lab,
    netns::{Netns, NetnsError},
    ssh::OperatorConnection,
};

/// How often counters are read.
const SAMPLED: Duration = Duration::from_millis(500);
/// How often it is looked whether checks hold.
const LOOKED: Duration = Duration::from_millis(50);
/// When no answer of a service that starts is one.
const READY_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is asked.
const READY_EVERY: Duration = Duration::from_millis(200);

/// A run, ready to begin.
pub struct Job {
    /// What is played.
    pub scenario: Scenario,
    /// How.
    pub plan: Plan,
    /// The file, as the user named it.
    pub file: String,
    /// The command that plays it again.
    pub replay: String,
    /// Name of the lab to make, where the scenario asks for one.
    pub lab: Option<String>,
    /// The daemon, which must be running.
    pub endpoint: Endpoint,
    /// Connections that must not be cut.
    pub operator: Vec<OperatorConnection>,
    /// When the run begins, to be in step with other hosts; at once where absent.
    pub start_at: Option<Timestamp>,
    /// The directory of its log and of what services print.
    pub dir: PathBuf,
}

/// What a run acts on.
pub struct World {
    /// Name of the scenario.
    pub scenario: String,
    /// The plan.
    pub plan: Plan,
    /// The nodes of the lab.
    pub nodes: BTreeMap<String, Netns>,
    /// A directory of the run's own, removed at its end.
    pub scratch: PathBuf,
    /// The hosts file that programs in nodes see.
    names: CString,
    /// The log.
    pub recorder: Arc<Recorder>,
    /// The keeper, which undoes what this process cannot.
    pub keeper: Arc<Keeper>,
    /// The daemon's process.
    pub daemon: u32,
}

impl World {
    /// The hosts.
    #[must_use]
    pub fn hosts(&self) -> &Hosts {
        &self.plan.hosts
    }

    /// The namespace of a node; `None` for the run's own.
    fn netns(&self, on: Option<&str>) -> Result<Option<&Netns>, String> {
        on.map(|on| {
            self.nodes
                .get(on)
                .ok_or_else(|| format!("the lab has no node '{on}'"))
        })
        .transpose()
    }

    /// What commands, probes and services find in their environment.
    #[must_use]
    pub fn environment(&self, on: Option<&str>) -> Vec<(String, String)> {
        let mut all: Vec<(String, String)> = self
            .hosts()
            .names()
            .into_iter()
            .filter_map(|name| {
                let address = self.hosts().address(&name)?;
                let name = name.replace(['-', '.'], "_");
                Some((format!("HOST_{name}"), address.to_string()))
            })
            .collect();
        all.push(("RUN_DIR".to_owned(), self.scratch.display().to_string()));
        if let Some(on) = on {
            all.push(("NODE".to_owned(), on.to_owned()));
        }
        all
    }

    /// A command that will run in a node, or here.
    fn command(&self, line: &CommandLine, on: Option<&str>) -> Result<Command, String> {
        let (program, arguments) = match line {
            CommandLine::Shell(text) => ("sh", vec!["-c".to_owned(), text.clone()]),
            CommandLine::Program(words) => match words.split_first() {
                Some((program, arguments)) => (program.as_str(), arguments.to_vec()),
                None => return Err("a command needs a program".to_owned()),
            },
        };
        let mut command = match self.netns(on)? {
            Some(netns) => netns
                .command(program)
                .map_err(|error: NetnsError| error.to_string())?,
            None => process::Command::new(program),
        };
        command.args(arguments).envs(self.environment(on));
        if on.is_some() {
            let (source, target) = (self.names.clone(), c"/etc/hosts");
            // SAFETY: between fork and exec only system calls are made, on texts that are there already.
            unsafe {
                command.pre_exec(move || know_names(&source, target));
            }
        }
        Ok(Command::from(command))
    }
}

/// Lets this process, and those that it starts, read another hosts file. Where the host has none, names stay unknown.
fn know_names(source: &CStr, target: &CStr) -> io::Result<()> {
    const NOTHING: Option<&CStr> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        NOTHING,
        c"/",
        NOTHING,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        NOTHING,
    )?;
    match mount(Some(source), target, NOTHING, MsFlags::MS_BIND, NOTHING) {
        Err(Errno::ENOENT) | Ok(()) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The hosts file of a lab's nodes: the hosts of the scenario before those of this host.
fn write_names(hosts: &Hosts, path: &Path) -> io::Result<CString> {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost\n");
    for name in hosts.names() {
        for net in hosts.addresses(&name).unwrap_or_default() {
            if net.prefix_len() == net.max_prefix_len() {
                let _ = writeln!(text, "{} {name}", net.addr());
            }
        }
    }
    text.push_str(&fs::read_to_string("/etc/hosts").unwrap_or_default());
    fs::write(path, text)?;
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// What ends a run early.
pub type Stop = watch::Receiver<Option<String>>;

/// Plays a scenario. Everything that goes wrong is in the log; the last record, which is returned too, says how the
/// run ended.
pub async fn play(job: Job, recorder: Arc<Recorder>, stop: Stop) -> RunEnded {
    recorder.write(Event::RunStarted(started(&job)));
    if let Err(text) = whole(job, &recorder, stop).await {
        recorder.write(Event::Trouble { text });
    }
    if let Some(problem) = recorder.problem() {
        recorder.write(Event::Note {
            text: format!("the log is not complete: {problem}"),
        });
    }
    let ended = verdict::judge(&recorder.records());
    recorder.write(Event::RunEnded(ended.clone()));
    ended
}

fn started(job: &Job) -> RunStarted {
    let hosts = &job.plan.hosts;
    RunStarted {
        scenario: job.scenario.name.clone(),
        description: job.scenario.description.clone(),
        file: job.file.clone(),
        seed: job.plan.seed,
        replay: job.replay.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: nix::sys::utsname::uname().map_or_else(
            |_| String::new(),
            |uname| uname.release().to_string_lossy().into_owned(),
        ),
        hosts: hosts
            .names()
            .into_iter()
            .filter_map(|name| Some((name.clone(), hosts.address(&name)?)))
            .collect(),
        selves: job.plan.selves.keys().cloned().collect(),
        checks: job
            .scenario
            .checks
            .iter()
            .map(|check| {
                let check = &check.value;
                CheckInfo {
                    name: check.name.clone(),
                    kind: check.kind,
                    what: check.words(),
                    recovers_within: check.recovers_within.0.as_secs_f64(),
                    at_end: check.at_end,
                }
            })
            .collect(),
        timeline: job
            .plan
            .timeline()
            .iter()
            .map(|entry| format!("{} {}: {}", entry.begins, entry.path, entry.words))
            .collect(),
        expect: job.scenario.expect.value.clone(),
    }
}

/// The whole run, and the way back, whatever happens on the way.
async fn whole(job: Job, recorder: &Arc<Recorder>, stop: Stop) -> Result<(), String> {
    if let Some(at) = job.start_at {
        let wait = Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default();
        if unless_stopped(&stop, sleep(wait)).await.is_none() {
            interrupted(recorder, &stop);
            return Ok(());
        }
    }
    let keeper = Keeper::start(&job.endpoint.state_dir)
        .map_err(|error| format!("starting the process that cleans up: {error}"))?;
    let keeper = Arc::new(keeper);
    let result = with_keeper(&job, recorder, &keeper, &stop).await;
    // From here on nothing may be left out. The keeper takes away what is still there: services, lab, directory.
    let problems = tokio::task::spawn_blocking(move || keeper.finish())
        .await
        .unwrap_or_else(|error| vec![error.to_string()]);
    for problem in problems {
        recorder.write(Event::Trouble {
            text: format!("cleaning up: {problem}"),
        });
    }
    result
}

/// Waits for something, unless the run is to end early before.
async fn unless_stopped<T>(stop: &Stop, what: impl Future<Output = T>) -> Option<T> {
    let mut stop = stop.clone();
    tokio::select! {
        biased;
        _ = stop.wait_for(Option::is_some) => None,
        value = what => Some(value),
    }
}

fn interrupted(recorder: &Recorder, stop: &Stop) {
    let signal = stop.borrow().clone();
    recorder.write(Event::Interrupted {
        signal: signal.unwrap_or_else(|| "a signal".to_owned()),
    });
}

async fn with_keeper(
    job: &Job,
    recorder: &Arc<Recorder>,
    keeper: &Arc<Keeper>,
    stop: &Stop,
) -> Result<(), String> {
    let scratch = keeper
        .scratch()
        .map_err(|error| format!("making the run's directory: {error}"))?;
    let mut client = Client::connect(&job.endpoint).map_err(|error| error.to_string())?;
    let daemon = client.hello().map_err(|error| error.to_string())?.pid;
    let nodes = match (&job.scenario.lab, &job.lab) {
        (Some(lab), Some(name)) => make_lab(job, recorder, keeper, name, &lab.nodes.names())?,
        _ => BTreeMap::new(),
    };
    let world = Arc::new(World {
        scenario: job.scenario.name.clone(),
        plan: job.plan.clone(),
        nodes,
        names: write_names(&job.plan.hosts, &scratch.join("hosts"))
            .map_err(|error| format!("writing the hosts file of the nodes: {error}"))?,
        scratch,
        recorder: Arc::clone(recorder),
        keeper: Arc::clone(keeper),
        daemon,
    });
    let services = Arc::new(Services::new(Arc::clone(&world), job.dir.clone()));
    let result = match unless_stopped(stop, start_services(job, &world, &services)).await {
        None => {
            interrupted(recorder, stop);
            Ok(())
        }
        Some(Err(problem)) => Err(problem),
        Some(Ok(())) => {
            let faults = Faults::new(client, job.operator.clone(), Arc::clone(&world));
            with_services(job, &world, &services, faults, stop).await
        }
    };
    services.stop_all().await;
    result
}

async fn start_services(job: &Job, world: &Arc<World>, services: &Services) -> Result<(), String> {
    for service in job.scenario.lab.iter().flat_map(|lab| &lab.services) {
        let service: &Service = &service.value;
        let begun = Instant::now();
        services.start(service).await?;
        let Some(ready) = &service.ready else {
            continue;
        };
        let mut last = None;
        while begun.elapsed() < service.ready_within.0 {
            let answer = checks::ask(world, ready, Some(&service.on), READY_TIMEOUT).await;
            if answer.ok {
                world.recorder.write(Event::ServiceReady {
                    service: service.name.clone(),
                    took: begun.elapsed().as_secs_f64(),
                });
                last = None;
                break;
            }
            if let Some(how) = services.ended(&service.name) {
                return Err(format!(
                    "service {} ended before it was ready ({how}); what it printed is in {}",
                    service.name,
                    services.log(&service.name).display()
                ));
            }
            last = answer.detail.or(Some(String::new()));
            sleep(READY_EVERY).await;
        }
        if let Some(why) = last {
            return Err(format!(
                "service {} was not ready within {}: {why}; what it printed is in {}",
                service.name,
                service.ready_within,
                services.log(&service.name).display()
            ));
        }
    }
    Ok(())
}

async fn with_services(
    job: &Job,
    world: &Arc<World>,
    services: &Arc<Services>,
    faults: Arc<Faults>,
    stop: &Stop,
) -> Result<(), String> {
    let recorder = &world.recorder;
    let mut asking = JoinSet::new();
    let mut states = BTreeMap::new();
    for check in &job.scenario.checks {
        let check = check.value.clone();
        if check.at_end {
            continue;
        }
        let (sender, state) = watch::channel(None);
        states.insert(check.name.clone(), state);
        asking.spawn(checks::keep_asking(Arc::clone(world), check, sender));
    }
    match unless_stopped(stop, steady(job, &states)).await {
        None => {
            interrupted(recorder, stop);
            return Ok(());
        }
        Some(Err(checks)) => {
            recorder.write(Event::NotSteady { checks });
            return Ok(());
        }
        Some(Ok(took)) => recorder.write(Event::Steady {
            took: took.as_secs_f64(),
        }),
    }
    let player = Arc::new(Player {
        world: Arc::clone(world),
        faults,
        services: Arc::clone(services),
        checks: states.clone(),
        stop: stop.clone(),
        paused: Mutex::default(),
    });
    let sampler = Arc::clone(&player);
    let sampling = tokio::spawn(async move {
        loop {
            sleep(SAMPLED).await;
            if let Err(error) = sampler.faults.sample().await {
                sampler.world.recorder.write(Event::Trouble {
                    text: format!("reading counters: {error}"),
                });
                return;
            }
        }
    });
    Arc::clone(&player)
        .play(job.plan.steps.clone(), false, Arc::new(|| {}))
        .await;
    sampling.abort();
    // Whatever is left of faults: those that no step heals, and those of steps that were given up.
    let healed = player.faults.heal_all().await;
    let resumed = player.resume_where(|_| true);
    healed.map_err(|error| format!("healing: {error}"))?;
    resumed.map_err(|problem| format!("letting processes go on: {problem}"))?;
    recorder.write(Event::Healed);
    if stop.borrow().is_some() {
        interrupted(recorder, stop);
        return Ok(());
    }
    if unless_stopped(stop, settle(job, &states)).await.is_none() {
        interrupted(recorder, stop);
        return Ok(());
    }
    asking.shutdown().await;
    for check in &job.scenario.checks {
        let check = &check.value;
        if !check.at_end {
            continue;
        }
        let asked = Instant::now();
        let answer = checks::ask(world, &check.probe(), check.on.as_deref(), check.timeout.0).await;
        let (state, _) = watch::channel(None);
        checks::note(recorder, &check.name, asked, &answer, &state);
    }
    Ok(())
}

/// Checks that must hold.
fn judging(job: &Job) -> impl Iterator<Item = &super::file::Check> {
    job.scenario
        .checks
        .iter()
        .map(|check| &check.value)
        .filter(|check| check.kind != Kind::Measure && !check.at_end)
}

/// Waits until all checks hold; those that do not, where that takes too long.
async fn steady(
    job: &Job,
    states: &BTreeMap<String, checks::State>,
) -> Result<Duration, Vec<String>> {
    let begun = Instant::now();
    loop {
        let missing: Vec<String> = judging(job)
            .filter(|check| {
                let state = states.get(&check.name).map(|state| *state.borrow());
                state != Some(Some(true))
            })
            .map(|check| check.name.clone())
            .collect();
        if missing.is_empty() {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() > job.scenario.steady_within.0 {
            return Err(missing);
        }
        sleep(LOOKED).await;
    }
}

/// Goes on after healing for as long as the file says, and until every check has been asked at least once more and
/// those of liveness hold or have had their time.
async fn settle(job: &Job, states: &BTreeMap<String, checks::State>) {
    let begun = Instant::now();
    for check in judging(job) {
        let Some(mut state) = states.get(&check.name).cloned() else {
            continue;
        };
        // The next answer may be to a question from before the healing.
        for _ in 0..2 {
            let longest = check.every.0 + check.timeout.0 + LOOKED;
            state.mark_unchanged();
            if timeout(longest, state.changed()).await.is_err() {
                break;
            }
        }
    }
    loop {
        let gone = begun.elapsed();
        let waiting = judging(job).any(|check| {
            check.kind == Kind::Liveness
                && gone < check.recovers_within.0 + check.timeout.0 + LOOKED
                && states.get(&check.name).map(|state| *state.borrow()) != Some(Some(true))
        });
        if gone >= job.scenario.settle.0 && !waiting {
            return;
        }
        sleep(LOOKED).await;
    }
}

fn make_lab(
    job: &Job,
    recorder: &Recorder,
    keeper: &Keeper,
    name: &str,
    nodes: &[String],
) -> Result<BTreeMap<String, Netns>, String> {
    let state_dir = &job.endpoint.state_dir;
    let failed = |error: &dyn std::fmt::Display| format!("making the lab: {error}");
    let count = u8::try_from(nodes.len()).map_err(|error| failed(&error))?;
    keeper.lab(name).map_err(|error| failed(&error))?;
    lab::up(state_dir, name, count).map_err(|error| failed(&error))?;
    recorder.write(Event::LabMade {
        lab: name.to_owned(),
    });
    nodes
        .iter()
        .enumerate()
        .map(|(index, node)| {
            let netns = lab::node(state_dir, name, &format!("n{}", index + 1))
                .map_err(|error| failed(&error))?;
            Ok((node.clone(), netns))
        })
        .collect()
}
