//! The library of scenarios, each played as a user would, on real services, and ended as its file expects.
//!
//! Those whose names begin with `host` need no lane, those with `lane` a kernel with fq and VLAN devices. Needs root,
//! `INJECTOR_BIN` and `INJECTOR_SERVICES`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Arguments;
use serde_json::Value;
use tests::lab::{
    command::run,
    injector::Injector,
    scratch::Scratch,
    services,
    snapshot::Snapshot,
    sweep::sweep,
    transcript::report,
    trial::{Need, trial},
    wait::wait_until,
};

/// The longest of them take a minute, in emulation more.
const PLAYED: Duration = Duration::from_mins(4);
/// So many at once on a host: they wait most of the time.
const THREADS: usize = 5;

macro_rules! library {
    ($($kind:ident $name:literal,)*) => {
        &[$((
            concat!(stringify!($kind), "::", $name),
            include_str!(concat!("../../../scenarios/", $name, ".yaml")),
        ),)*]
    };
}

const LIBRARY: &[(&str, &str)] = library! {
    host "etcd-bridge",
    host "etcd-crash",
    host "etcd-leader-isolated",
    host "etcd-leader-paused",
    host "etcd-majorities-ring",
    host "etcd-nemesis",
    host "etcd-one-way-leader",
    host "etcd-response-lost",
    host "nginx-cut-links",
    host "nginx-grey-path",
    host "nginx-retry-storm",
    host "postgres-replica-lag",
    host "postgres-synchronous-replica-cut",
    host "redis-min-replicas",
    host "redis-split-brain",
    lane "chrony-asymmetric-delay",
    lane "etcd-slow-follower",
    lane "http-corruption",
    lane "nginx-bufferbloat",
    lane "nginx-find-the-timeout",
    lane "nginx-indistinguishable",
    lane "nginx-links",
    lane "nginx-omission",
    lane "nginx-timing-models",
};

fn main() -> ExitCode {
    const NEEDS: &[Need] = &[
        Need::Root,
        Need::Injector,
        Need::Etcd,
        Need::Redis,
        Need::Tool("curl"),
    ];
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    let mut trials: Vec<_> = LIBRARY
        .iter()
        .map(|&(name, text)| trial(name, NEEDS, move || plays_as_expected(name, text)))
        .collect();
    trials.push(trial(
        "host::the_library_is_complete",
        &[],
        the_library_is_complete,
    ));
    trials.push(trial(
        "host::the_guide_s_examples_are_right",
        &[Need::Injector],
        the_guide_s_examples_are_right,
    ));
    if arguments.list || !nix::unistd::geteuid().is_root() {
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    if let Err(error) = sweep() {
        eprintln!("could not remove what a killed run left behind: {error:#}");
        return ExitCode::FAILURE;
    }
    let before = match Snapshot::of_host() {
        Ok(before) => before,
        Err(error) => {
            eprintln!("could not look at the host: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Namespaces go some time after their names.
    let unchanged = wait_until("the host is as it was", Duration::from_secs(10), || {
        before.must_equal(&Snapshot::of_host()?).map(|()| true)
    });
    if let Err(error) = unchanged {
        eprintln!("error: the scenarios left something behind: {error:?}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// Plays a scenario, and expects what its file expects: a passed run, or one that fails as it says.
fn plays_as_expected(name: &str, text: &str) -> Result<()> {
    let injector = Injector::started(&[])?;
    let dir = Scratch::new()?;
    let file = dir.path().join("scenario.yaml");
    fs::write(&file, text)?;
    let mut command = injector.cli(&["--json", "run"]);
    if !text.contains("\nseed: ") {
        command.args(["--seed", "1"]);
    }
    command.arg(&file).arg("--report").arg(dir.path());
    services::offer(&mut command)?;
    let output = run(command, PLAYED)?;
    let log = || {
        let text = fs::read_to_string(dir.path().join("run.jsonl")).unwrap_or_default();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.contains("\"event\":\"sample\"") && !line.contains("\"ok\":true"))
            .collect();
        let services: Vec<String> = logs_in(dir.path()).unwrap_or_default();
        format!("{}\n{}", lines.join("\n"), services.join("\n"))
    };
    ensure!(output.code() == Some(0), "{}\n{}", output.describe(), log());
    let document: Value =
        serde_json::from_str(&output.stdout).with_context(|| output.describe())?;
    let expected = if text.lines().any(|line| line.starts_with("expect: ")) {
        "failed"
    } else {
        "passed"
    };
    ensure!(document["verdict"] == expected, "{document}");
    for file in ["run.jsonl", "report.html", "junit.xml"] {
        ensure!(dir.path().join(file).exists(), "no {file}");
    }
    report(format!("{name}: {expected}, {}", document["reasons"]));
    Ok(())
}

/// What the services printed last, each with its file's name.
fn logs_in(dir: &Path) -> Result<Vec<String>> {
    const LINES: usize = 10;
    let mut logs = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES)..];
            logs.push(format!("{}:\n{}", path.display(), last.join("\n")));
        }
    }
    Ok(logs)
}

/// The project's folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The guide to scenarios.
fn guide() -> Result<String> {
    Ok(fs::read_to_string(root().join("docs/scenarios.md"))?)
}

/// Every file of the library is played here, and the published schema is the one that the types give.
fn the_library_is_complete() -> Result<()> {
    let files: BTreeSet<String> = fs::read_dir(root().join("scenarios"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    let played: BTreeSet<String> = LIBRARY
        .iter()
        .filter_map(|(name, _)| name.split("::").nth(1))
        .map(|name| format!("{name}.yaml"))
        .collect();
    ensure!(
        files == played,
        "in the folder {files:?}, played {played:?}"
    );
    let schema: Value = serde_json::from_str(&fs::read_to_string(
        root().join("docs/scenario.schema.json"),
    )?)?;
    let current = serde_json::to_value(injector::scenario::file::schema())?;
    ensure!(
        schema == current,
        "docs/scenario.schema.json is out of date: injector validate --schema > docs/scenario.schema.json"
    );
    let guide = guide()?;
    for file in &files {
        ensure!(
            guide.contains(file.as_str()),
            "docs/scenarios.md does not name {file}"
        );
    }
    for name in injector::scenario::vocabulary::NAMES {
        let name = serde_json::to_value(name)?;
        let name = name.as_str().unwrap_or_default();
        ensure!(
            guide.contains(&format!("`{name}`")),
            "docs/scenarios.md does not explain {name}"
        );
        ensure!(
            LIBRARY
                .iter()
                .any(|(_, text)| text.contains(&format!("profile: {{name: {name}"))),
            "no scenario shows {name}"
        );
    }
    Ok(())
}

/// Each example of the guide is a scenario, or the steps of one, of which there is a plan.
fn the_guide_s_examples_are_right() -> Result<()> {
    /// What steps without a scenario around them are about.
    const AROUND: &str = "\
name: example
lab:
  nodes: [n1, n2, n3, db]
  services:
    - {name: etcd1, on: n1, run: sleep 9}
    - {name: etcd2, on: n2, run: sleep 9}
    - {name: etcd3, on: n3, run: sleep 9}
";
    let guide = guide()?;
    let dir = Scratch::new()?;
    let injector = Injector::new()?;
    let mut found = 0;
    for block in guide.split("```yaml\n").skip(1) {
        let text = block.split("```").next().unwrap_or_default();
        // An example for another program.
        if text.starts_with("jobs:") {
            continue;
        }
        let mut arguments = vec!["run", "--dry-run", "--seed", "7"];
        let text = if text.starts_with("steps:") {
            format!("{AROUND}{text}")
        } else {
            // The first of its hosts is this one.
            let host = text
                .split_once("hosts: {")
                .and_then(|(_, hosts)| hosts.split(':').next())
                .with_context(|| format!("an example without hosts: {text}"))?;
            arguments.extend(["--self", host]);
            text.to_owned()
        };
        let file = dir.path().join("example.yaml");
        fs::write(&file, &text)?;
        let mut command = injector.cli(&arguments);
        command.arg(&file);
        let output = run(command, PLAYED)?;
        ensure!(output.code() == Some(0), "{text}\n{}", output.describe());
        found += 1;
    }
    ensure!(found >= 4, "the guide has only {found} examples");
    Ok(())
}
