//! `injector run` and `injector validate`: playing scenarios, and looking at their files.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::{
    exit::{Exit, Failure},
    live::Live,
    output::{self, Table, Tone, toned},
    session::{self, Session},
    verdict,
};
use crate::{
    lab, netlink,
    rules::draw_seed,
    scenario::{
        file::{self, FileError, Scenario},
        plan::{self, Part, Plan},
        play::{self, Job, Recorder},
        record::{Record, RunEnded, Verdict},
        report,
    },
    words,
};

/// Where reports go that nothing else is said about: a directory for each scenario in this one.
const REPORTS: &str = "injector-report";
/// The log's name among the reports.
const LOG: &str = "run.jsonl";

/// Play a scenario: its faults over time, with its checks; judge it and report
///
/// The file is YAML or JSON (docs/scenarios.md). The run begins when all checks hold, and everything is undone at its
/// end, also when it is interrupted (then everything is healed first, and reported) or killed.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// The scenario; - for standard input
    file: PathBuf,
    /// Seed of everything that is left to chance [default: the file's, or drawn, and reported]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Which of the scenario's hosts this is [default: those that have one of this host's addresses]
    #[arg(long = "self", value_name = "NAME,...", value_delimiter = ',')]
    selves: Vec<String>,
    /// When to begin, to be in step with other hosts that play the same file: 2026-11-26T14:00:00Z
    #[arg(long, value_name = "TIME")]
    start_at: Option<Timestamp>,
    /// Where the reports go [default: as the file says, or injector-report/NAME]
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Print the timeline that would be played; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not protect the control connection (SSH) that this command is run over
    #[arg(long)]
    no_protect_operator: bool,
}

/// Say whether files are scenarios, and where they are wrong
#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// The scenarios; - for standard input
    #[arg(required_unless_present = "schema")]
    files: Vec<PathBuf>,
    /// Print the JSON Schema of scenario files
    #[arg(long, conflicts_with = "files")]
    schema: bool,
}

/// Make the reports of a run from its log
///
/// Also of a run that was killed: what its log has is reported.
#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    /// The log, run.jsonl
    log: PathBuf,
    /// Where the reports go [default: beside the log]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl ReportArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<Exit, Failure> {
        let (shown, content) = read_file(&self.log)?;
        let records = report::read_log(&content).map_err(|error| {
            Failure::usage(format!("{shown} is not the log of a run"))
                .caused_by(&error)
                .help("it is the run.jsonl that `injector run` writes")
        })?;
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => self.log.parent().map(Path::to_owned).unwrap_or_default(),
        };
        let failed = |error: io::Error| {
            Failure::new(
                Exit::Failed,
                "report",
                format!("writing the reports into {}", dir.display()),
            )
            .caused_by(&error)
        };
        fs::create_dir_all(&dir).map_err(failed)?;
        let files = report::write(&records, &dir).map_err(failed)?;
        session.output.either(&json!({ "reports": files }), || {
            verdict::text(session.output, &records, &files)
        })?;
        Ok(Exit::Success)
    }
}

/// A scenario that was read and planned.
struct Planned {
    scenario: Scenario,
    plan: Plan,
    shown: String,
}

impl ValidateArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<Exit, Failure> {
        if self.schema {
            output::print_document(&file::schema())?;
            return Ok(Exit::Success);
        }
        let mut results = Vec::new();
        let mut text = String::new();
        let mut wrong = false;
        for path in &self.files {
            let (shown, content) = read_file(path)?;
            let errors = match read(&shown, &content, None, None) {
                Ok(read) => {
                    let steps = read.plan.timeline().len();
                    let _ = writeln!(
                        text,
                        "{shown}: {} ({}, {})",
                        toned(Tone::Good, "ok"),
                        words::count(steps as u64, "step"),
                        words::count(read.scenario.checks.len() as u64, "check"),
                    );
                    Vec::new()
                }
                Err(errors) => errors,
            };
            wrong |= !errors.is_empty();
            for error in &errors {
                text.push_str(&shown_error(error));
            }
            results.push(json!({
                "file": shown,
                "valid": errors.is_empty(),
                "errors": errors.iter().map(|error| json!({
                    "line": error.at.map(|at| at.line),
                    "column": error.at.map(|at| at.column),
                    "problem": error.problem,
                })).collect::<Vec<_>>(),
            }));
        }
        session
            .output
            .either(&json!({ "ok": !wrong, "files": results }), || text)?;
        Ok(if wrong { Exit::Usage } else { Exit::Success })
    }
}

fn shown_error(error: &FileError) -> String {
    let mut text = format!("{}\n", toned(Tone::Bad, &error.to_string()));
    if let Some(excerpt) = &error.excerpt {
        for line in excerpt.lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
    text
}

/// A file's name as the user gave it, and what is in it.
fn read_file(path: &Path) -> Result<(String, String), Failure> {
    let shown = path.display().to_string();
    let content = if path.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        fs::read_to_string(path)
    };
    content
        .map(|content| (shown.clone(), content))
        .map_err(|error| Failure::usage(format!("reading {shown}")).caused_by(&error))
}

/// Reads and plans a scenario. Without `selves` the part of every host is planned: all of the file is looked at.
fn read(
    shown: &str,
    content: &str,
    seed: Option<u64>,
    selves: Option<(&[String], &str)>,
) -> Result<Planned, Vec<FileError>> {
    let scenario = file::read(shown, content).map_err(|error| vec![error])?;
    let wrong = |problem: String| {
        vec![FileError {
            path: shown.to_owned(),
            at: None,
            problem,
            excerpt: None,
        }]
    };
    let mut nodes = BTreeMap::new();
    let mut parts = BTreeMap::new();
    if let Some(lab) = &scenario.lab {
        let names = lab.nodes.names();
        let most = usize::from(lab::MAX_NODES);
        if names.is_empty() || names.len() > most {
            return Err(wrong(format!(
                "a lab has 1 to {most} nodes, not {}",
                names.len()
            )));
        }
        for (number, name) in (1_u8..).zip(&names) {
            if nodes.contains_key(name) {
                return Err(wrong(format!("the lab has two nodes '{name}'")));
            }
            let addresses: Vec<IpNet> = lab::addresses(number)
                .into_iter()
                .map(IpNet::from)
                .collect();
            nodes.insert(name.clone(), addresses);
            let lab_name = selves.map_or("run", |(_, lab)| lab);
            parts.insert(
                name.clone(),
                Part {
                    netns: Some(lab::netns_name(lab_name, &format!("n{number}"))),
                    iface: vec!["eth0".to_owned()],
                },
            );
        }
    }
    let hosts = plan::hosts(&scenario, &nodes)
        .map_err(|problem| wrong(format!("{}: {}", problem.problem, problem.help)))?;
    if scenario.lab.is_none() {
        let part = Part {
            netns: scenario.targets.netns.clone(),
            iface: scenario.targets.iface.clone(),
        };
        let own = match selves {
            None => hosts.names(),
            Some((given, _)) => own_names(&hosts, given, &scenario).map_err(wrong)?,
        };
        // A scenario that names no hosts is about this one.
        let own = if own.is_empty() && hosts.names().is_empty() {
            vec!["this".to_owned()]
        } else {
            own
        };
        parts.extend(own.into_iter().map(|name| (name, part.clone())));
    }
    let seed = seed.or(scenario.seed).unwrap_or_else(draw_seed);
    let plan = plan::plan(shown, content, &scenario, seed, hosts, parts)?;
    Ok(Planned {
        scenario,
        plan,
        shown: shown.to_owned(),
    })
}

/// Which of the hosts this one is.
fn own_names(
    hosts: &crate::scenario::names::Hosts,
    given: &[String],
    scenario: &Scenario,
) -> Result<Vec<String>, String> {
    let known = hosts.names().join(", ");
    if let Some(stranger) = given.iter().find(|name| hosts.addresses(name).is_none()) {
        return Err(format!(
            "--self: there is no host '{stranger}'; there are: {known}"
        ));
    }
    if !given.is_empty() || hosts.names().is_empty() {
        return Ok(given.to_vec());
    }
    let looked = || netlink::addresses();
    let addresses = match &scenario.targets.netns {
        None => looked(),
        Some(netns) => {
            let reference = crate::rules::text::netns::parse(netns)
                .map_err(|problem| format!("netns '{netns}' {}", problem.problem))?;
            crate::netns::Netns::resolve(&reference)
                .and_then(|netns| netns.run(looked))
                .map_err(|error| error.to_string())?
        }
    };
    let own: Vec<IpAddr> = addresses
        .map_err(|error| error.to_string())?
        .into_iter()
        .map(|(_, net)| net.addr())
        .collect();
    let found = hosts.with_any_of(&own);
    if found.is_empty() {
        return Err(format!(
            "this host has no address of the scenario's hosts ({known}): say with --self which one it is"
        ));
    }
    Ok(found.into_iter().collect())
}

impl RunArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<Exit, Failure> {
        let (shown, content) = read_file(&self.file)?;
        let lab_name = format!("run-{}", std::process::id());
        let read = read(&shown, &content, self.seed, Some((&self.selves, &lab_name))).map_err(
            |errors| {
                let mut failure = Failure::usage(match errors.as_slice() {
                    [one] => one.to_string(),
                    many => format!("{shown} has {} mistakes", many.len()),
                });
                if let [one] = errors.as_slice() {
                    failure.causes.extend(one.excerpt.clone());
                } else {
                    failure.causes = errors.iter().map(ToString::to_string).collect();
                }
                failure.help(if errors.iter().any(|error| error.at.is_some()) {
                    "`injector validate` shows each with its place; docs/scenarios.md has the language"
                } else {
                    "docs/scenarios.md has the language, and how a scenario is played on several hosts"
                })
            },
        )?;
        if self.dry_run {
            return timeline(session, &read).map(|()| Exit::Success);
        }
        if !session::may_attach() {
            return Err(Failure::new(
                Exit::NotPermitted,
                "not_permitted",
                format!("playing {shown} takes root"),
            )
            .help(
                "run this as root (sudo); --dry-run and `injector validate` need no privileges",
            ));
        }
        self.play(session, read, lab_name)
    }

    fn play(&self, session: &Session, read: Planned, lab_name: String) -> Result<Exit, Failure> {
        let dir = match (&self.report, &read.scenario.report.dir) {
            (Some(dir), _) => dir.clone(),
            (None, Some(dir)) => PathBuf::from(dir),
            (None, None) => Path::new(REPORTS).join(&read.scenario.name),
        };
        let log = dir.join(LOG);
        let failed = |what: &str, path: &Path, error: &dyn std::error::Error| {
            Failure::new(Exit::Failed, "report", format!("{what} {}", path.display()))
                .caused_by(error)
        };
        // Services run elsewhere: the directory has to be found from there.
        let dir = std::path::absolute(&dir).map_err(|error| failed("finding", &dir, &error))?;
        fs::create_dir_all(&dir).map_err(|error| failed("making", &dir, &error))?;
        // A daemon has to be there; its connection is made by the run.
        drop(session.connect_or_start()?);
        let live = Arc::new(Live::new(session.output, &read.plan, &read.scenario));
        let watcher = Arc::clone(&live);
        let recorder =
            Recorder::create(&log, Box::new(move |record: &Record| watcher.show(record)))
                .map_err(|error| failed("making", &log, &error))?;
        let recorder = Arc::new(recorder);
        let selves = if self.selves.is_empty() {
            String::new()
        } else {
            format!(" --self {}", self.selves.join(","))
        };
        let job = Job {
            replay: format!(
                "injector run {} --seed {}{selves}",
                read.shown, read.plan.seed
            ),
            lab: read.scenario.lab.is_some().then_some(lab_name),
            scenario: read.scenario,
            plan: read.plan,
            file: read.shown,
            endpoint: session.endpoint.clone(),
            operator: session::operator(self.no_protect_operator),
            start_at: self.start_at,
            dir: dir.clone(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| {
                Failure::new(Exit::Failed, "runtime", "starting threads").caused_by(&error)
            })?;
        let ended = runtime.block_on(async {
            let stop = stops().map_err(|error| {
                Failure::new(Exit::Failed, "signals", "listening for signals").caused_by(&error)
            })?;
            Ok::<RunEnded, Failure>(play::play(job, Arc::clone(&recorder), stop).await)
        })?;
        live.close();
        let records = recorder.records();
        let files = report::write(&records, &dir)
            .map_err(|error| failed("writing the reports into", &dir, &error))?;
        session.output.either(
            &json!({
                "verdict": ended.verdict,
                "as_expected": ended.as_expected,
                "reasons": ended.reasons,
                "seed": job_seed(&records),
                "log": log,
                "reports": files,
            }),
            || verdict::text(session.output, &records, &files),
        )?;
        Ok(match ended {
            RunEnded {
                as_expected: true, ..
            } => Exit::Success,
            RunEnded {
                verdict: Verdict::Void,
                ..
            } => Exit::RunVoid,
            RunEnded { .. } => Exit::RunFailed,
        })
    }
}

fn job_seed(records: &[Record]) -> Option<u64> {
    records.iter().find_map(|record| match &record.event {
        crate::scenario::record::Event::RunStarted(started) => Some(started.seed),
        _ => None,
    })
}

/// The first signal ends the run early, with everything healed and reported; the second one ends it at once, and what
/// is left is undone by the daemon and the keeper.
fn stops() -> io::Result<play::Stop> {
    let (sender, receiver) = watch::channel(None);
    for (kind, name, number) in [
        (SignalKind::interrupt(), "SIGINT", 2),
        (SignalKind::terminate(), "SIGTERM", 15),
        (SignalKind::hangup(), "SIGHUP", 1),
    ] {
        let mut signals = signal(kind)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let again = sender.send_replace(Some(name.to_owned())).is_some();
                if again {
                    std::process::exit(128 + number);
                }
                output::warn(&format!(
                    "{name}: healing everything; the report follows (once more ends this at once)"
                ));
            }
        });
    }
    Ok(receiver)
}

fn timeline(session: &Session, read: &Planned) -> Result<(), Failure> {
    let entries = read.plan.timeline();
    session.output.either(
        &json!({
            "scenario": read.scenario.name,
            "seed": read.plan.seed,
            "selves": read.plan.selves.keys().collect::<Vec<_>>(),
            "steps": entries.iter().map(|entry| json!({
                "step": entry.path,
                "begins": entry.begins.at.as_secs_f64(),
                "ends": entry.ends.at.as_secs_f64(),
                "known": entry.begins.known,
                "what": entry.words,
            })).collect::<Vec<_>>(),
        }),
        || {
            let mut table = Table::new(&["FROM", "TO", "STEP", "WHAT"]);
            for entry in &entries {
                table.row(vec![
                    entry.begins.to_string(),
                    entry.ends.to_string(),
                    format!("{}{}", "  ".repeat(entry.depth), entry.path),
                    entry.words.clone(),
                ]);
            }
            let selves: Vec<&str> = read.plan.selves.keys().map(String::as_str).collect();
            format!(
                "{}: seed {}, for {}\n\n{}",
                read.scenario.name,
                read.plan.seed,
                selves.join(", "),
                session.output.table(&table)
            )
        },
    )
}
