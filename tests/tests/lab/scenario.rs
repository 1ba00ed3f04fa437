//! Scenarios, from the file to the report: played by the command on labs that it makes, ended in every way.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use jiff::Timestamp;
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::lab::{
    command::{Output, run},
    injector::Injector,
    process::Process,
    scratch::Scratch,
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
    wait::wait_until,
};

/// A run takes some seconds, on a machine that is busy some more.
pub(crate) const PLAYED: Duration = Duration::from_mins(2);

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[
        Need::Root,
        Need::Injector,
        Need::Tool("socat"),
        Need::Tool("ping"),
    ];
    const BROWSER: &[Need] = &[
        Need::Root,
        Need::Injector,
        Need::Tool("socat"),
        Need::Tool("chromium"),
    ];
    vec![
        trial(
            "scenario::faults_act_and_checks_judge",
            NEEDS,
            faults_act_and_checks_judge,
        ),
        trial("scenario::steps_of_every_kind", NEEDS, steps_of_every_kind),
        trial(
            "scenario::runs_that_fail_say_why",
            NEEDS,
            runs_that_fail_say_why,
        ),
        trial(
            "scenario::an_interrupted_run_heals_and_reports",
            NEEDS,
            an_interrupted_run_heals_and_reports,
        ),
        trial(
            "scenario::a_killed_run_leaves_nothing",
            NEEDS,
            a_killed_run_leaves_nothing,
        ),
        trial(
            "scenario::hosts_compute_the_same_partition",
            NEEDS,
            hosts_compute_the_same_partition,
        ),
        trial(
            "scenario::several_hosts_play_one_file",
            NEEDS,
            several_hosts_play_one_file,
        ),
        trial(
            "scenario::a_browser_shows_the_report",
            BROWSER,
            a_browser_shows_the_report,
        ),
    ]
}

/// A server that answers with the name of its node, a process to each connection.
const SERVICE: &str = r#"
    - name: web
      on: n1
      prepare: |
        cat > $RUN_DIR/answer <<'END'
        while read -r line && [ "${#line}" -gt 1 ]; do :; done
        printf 'HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n%s.' "$NODE"
        END
      run: exec socat TCP-LISTEN:8000,fork,reuseaddr EXEC:"sh $RUN_DIR/answer"
      ready: {tcp: "n1:8000"}
"#;

/// Three nodes, of which the second asks the first, and the third too.
fn scenario(name: &str, rest: &str) -> String {
    format!(
        "name: {name}
seed: 7
lab:
  nodes: 3
  services:{SERVICE}
checks:
  - name: second
    kind: liveness
    on: n2
    http: {{url: 'http://n1:8000/', contains: n1}}
    every: 200ms
    timeout: 500ms
    recovers_within: 8s
  - name: third
    kind: safety
    on: n3
    tcp: n1:8000
    every: 200ms
    timeout: 2s
settle: 1s
{rest}"
    )
}

/// A run and what it left in its directory.
pub(crate) struct Run {
    output: Output,
    dir: Scratch,
}

impl Run {
    pub(crate) fn play(injector: &Injector, text: &str, more: &[&str]) -> Result<Self> {
        let dir = Scratch::new()?;
        let file = dir.path().join("scenario.yaml");
        fs::write(&file, text)?;
        let output = run(command(injector, &file, dir.path(), more), PLAYED)?;
        Ok(Self { output, dir })
    }

    fn document(&self) -> Result<Value> {
        serde_json::from_str(&self.output.stdout).with_context(|| self.output.describe())
    }

    pub(crate) fn log(&self) -> Result<Vec<Value>> {
        log(self.dir.path())
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.dir.path().join(name);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    pub(crate) fn expect(&self, code: i32, verdict: &str) -> Result<()> {
        let document = self.document()?;
        ensure!(
            self.output.code() == Some(code) && document["verdict"] == verdict,
            "not {code}, {verdict}: {}",
            self.output.describe()
        );
        Ok(())
    }
}

pub(crate) fn command(injector: &Injector, file: &Path, dir: &Path, more: &[&str]) -> Command {
    let mut command = injector.cli(&["--json", "run"]);
    command.arg(file).arg("--report").arg(dir).args(more);
    command
}

/// The log's lines, of which a run that goes on may not have finished the last.
pub(crate) fn log(dir: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(dir.join("run.jsonl"))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}

/// Records of this kind.
pub(crate) fn of<'a>(log: &'a [Value], event: &str) -> Vec<&'a Value> {
    log.iter()
        .filter(|record| record["event"] == event)
        .collect()
}

fn time(record: &Value) -> f64 {
    record["t"].as_f64().unwrap_or_default()
}

fn faults_act_and_checks_judge() -> Result<()> {
    let injector = Injector::started(&[])?;
    let text = scenario(
        "judged",
        "steps:
  - {name: cut, partition: {shape: sides, sides: [[n1], [n2]]}, for: 2s}
  - {wait: 1s}
  - {name: pause, pause: {service: web}, for: 1500ms}
",
    );
    let run = Run::play(&injector, &text, &[])?;
    run.expect(0, "passed")?;
    let log = run.log()?;
    let [cut] = of(&log, "fault_started")[..] else {
        bail!("{log:#?}")
    };
    let [healed] = of(&log, "fault_ended")[..] else {
        bail!("{log:#?}")
    };
    ensure!(healed["matched_packets"].as_u64() > Some(0), "{healed}");
    let [paused] = of(&log, "paused")[..] else {
        bail!("{log:#?}")
    };
    let [resumed] = of(&log, "resumed")[..] else {
        bail!("{log:#?}")
    };
    let after = resumed["after"].as_f64().unwrap_or_default();
    ensure!((1.4..4.0).contains(&after), "{resumed}");
    // What the faulted check says: nothing before, failures during both, nothing at the end.
    let failed = |from: f64, to: f64, check: &str| {
        of(&log, "checked")
            .iter()
            .filter(|record| record["check"] == check && record["ok"] == false)
            .filter(|record| {
                let asked = record["asked"].as_f64().unwrap_or_default();
                (from..to).contains(&asked)
            })
            .count()
    };
    // A fault acts before the log says that it does, and a check may be on its way then.
    let steady = time(of(&log, "steady").first().context("never steady")?);
    let begins = of(&log, "step_started")
        .into_iter()
        .find(|record| record["step"] == "cut")
        .map(time)
        .context("the cut never began")?;
    let early: Vec<&Value> = of(&log, "checked")
        .into_iter()
        .filter(|record| record["ok"] == false && (steady..begins).contains(&time(record)))
        .collect();
    ensure!(early.is_empty(), "before the cut: {early:?}");
    ensure!(
        failed(time(cut), time(healed), "second") > 0,
        "during the cut"
    );
    ensure!(
        failed(time(paused), time(resumed), "second") > 0,
        "during the pause"
    );
    ensure!(failed(time(resumed), f64::MAX, "second") == 0, "after it");
    // A TCP connection is made by the kernel, also to a process that stands still.
    ensure!(failed(0.0, f64::MAX, "third") == 0, "of another node");
    let junit = run.read("junit.xml")?;
    for case in [
        "name=\"second\"",
        "name=\"third\"",
        "name=\"cut\"",
        "failures=\"0\"",
        "errors=\"0\"",
    ] {
        ensure!(junit.contains(case), "{case}: {junit}");
    }
    let html = run.read("report.html")?;
    ensure!(
        html.contains("<svg") && !html.contains("src=") && !html.contains("href="),
        "the report loads something"
    );
    ensure!(
        run.dir.path().join("web.log").exists(),
        "no log of the service"
    );
    report(format!(
        "scenario::faults_act_and_checks_judge: {} records, report of {} bytes",
        log.len(),
        html.len()
    ));
    Ok(())
}

fn steps_of_every_kind() -> Result<()> {
    let injector = Injector::started(&[])?;
    let text = scenario(
        "kinds",
        r#"steps:
  - {name: asked, partition: {shape: isolate, who: {command: "echo $HOST_n2 is it", on: n3}}}
  - {name: noticed, on: n3, when: {check: second, is: failing, within: 20s}, run: "test \"$(getent hosts n1)\""}
  - {heal: asked}
  - {when: {check: second, is: holding, within: 20s}, wait: 100ms}
  - name: twice
    loop:
      times: 2
      steps:
        - {name: every, on: n2, rule: {peer: n1, fault: {drop_every: 3}}}
        - {on: n2, run: "ping -c 1 -W 5 n1"}
        - {heal: every}
  - name: ramp
    on: n2
    ramp: {rule: {peer: n1, direction: egress}, field: drop_every, from: "9", to: "5", over: 3s, steps: 3}
  - {name: crash, kill: {service: web}, for: 500ms}
  - {when: {check: second, is: holding, within: 20s}, wait: 100ms}
  - name: together
    for: 1s
    parallel:
      - {name: left, on: n2, rule: {peer: n1, fault: {cut: true}}}
      - {name: right, run: {command: "test -e $RUN_DIR/later", until: x, every: 100ms, within: 5s}}
      - {run: "sleep 0.3; touch $RUN_DIR/later"}
"#,
    )
    // No safety check: the service is killed.
    .replace("kind: safety", "kind: measure")
    .replace("until: x, ", "");
    let run = Run::play(&injector, &text, &["--seed", "3"])?;
    run.expect(0, "passed")?;
    let log = run.log()?;
    let steps: Vec<&str> = of(&log, "step_ended")
        .iter()
        .filter_map(|record| record["step"].as_str())
        .collect();
    for step in [
        "asked",
        "noticed",
        "twice[1]/every",
        "twice[2]/every",
        "ramp",
        "crash",
        "together/left",
        "together",
    ] {
        ensure!(steps.contains(&step), "{step}: {steps:?}");
    }
    let named = of(&log, "step_ended")
        .into_iter()
        .find(|record| record["step"] == "asked")
        .and_then(|record| record["detail"].as_str())
        .context("nobody was named")?;
    ensure!(named == "n2: partition n2 | n1 n3", "{named}");
    // What a rule did before it was changed is not lost.
    let ramp = of(&log, "fault_ended")
        .into_iter()
        .find(|record| record["step"] == "ramp")
        .context("no ramp")?;
    ensure!(ramp["rules"].as_array().map(Vec::len) == Some(3), "{ramp}");
    ensure!(
        of(&log, "service_ended")
            .iter()
            .all(|record| record["asked"] == true)
    );
    ensure!(of(&log, "service_started").len() == 2);
    // A group that has a time of its own (a second, from when it began) heals what it began.
    let of_step = |event: &str| {
        of(&log, event)
            .into_iter()
            .find(|record| record["step"] == "together/left")
            .map(time)
            .context(event.to_owned())
    };
    let lasted = of_step("fault_ended")? - of_step("fault_started")?;
    ensure!((0.5..4.0).contains(&lasted), "{lasted}");
    Ok(())
}

fn runs_that_fail_say_why() -> Result<()> {
    let injector = Injector::started(&[])?;
    let cases = [
        (
            "a safety check that fails",
            scenario(
                "unsafe",
                "steps:\n  - {partition: {shape: sides, sides: [[n1], [n3]]}, for: 3s}\n",
            ),
            (8, "failed", "safety check third failed"),
        ),
        (
            "the same, expected",
            scenario(
                "expected",
                "expect: failed\nsteps:\n  - {partition: {shape: sides, sides: [[n1], [n3]]}, for: 3s}\n",
            ),
            (0, "failed", "safety check third failed"),
        ),
        (
            "a fault that meets nothing",
            scenario(
                "idle",
                "steps:\n  - {on: n2, rule: {peer: n3, fault: {cut: true}}, for: 1s}\n",
            ),
            (8, "failed", "did nothing"),
        ),
        (
            "a command that fails",
            scenario("command", "steps:\n  - {run: 'echo so it is; exit 3'}\n"),
            (8, "failed", "exit status: 3: so it is"),
        ),
        (
            "no steady state",
            scenario("unsteady", "steady_within: 1s\nsteps: []\n")
                .replace("contains: n1", "contains: n9"),
            (9, "void", "no steady state before the first step: second"),
        ),
        (
            "a service that does not start",
            scenario("broken", "steps: []\n").replace("exec socat", "exit 4; socat"),
            (9, "void", "ended before it was ready (exit status: 4)"),
        ),
    ];
    for (what, text, (code, verdict, why)) in cases {
        let run = Run::play(&injector, &text, &[]).context(what)?;
        run.expect(code, verdict).context(what)?;
        let reasons = run.document()?["reasons"].to_string();
        ensure!(reasons.contains(why), "{what}: {reasons}");
        let junit = run.read("junit.xml")?;
        let blamed = junit.contains("<failure") || junit.contains("<error");
        ensure!(blamed == (code != 0), "{what}: {junit}");
    }
    // Nothing is begun for a file that is wrong.
    let wrong = Run::play(
        &injector,
        &scenario("wrong", "steps:\n  - {heal: nothing}\n"),
        &[],
    )?;
    ensure!(
        wrong.output.code() == Some(2),
        "{}",
        wrong.output.describe()
    );
    ensure!(!wrong.dir.path().join("run.jsonl").exists(), "it was begun");
    Ok(())
}

/// A scenario that stands still for a long time, in a partition and with a paused service.
fn long() -> String {
    scenario(
        "long",
        "steps:
  - {name: cut, partition: {shape: sides, sides: [[n1], [n2]]}}
  - {name: pause, pause: {service: web}}
  - {name: slow, run: 'sleep 600', on: n3}
",
    )
}

/// The same, begun, with its run's process, when all of it acts.
fn begun(injector: &Injector) -> Result<(Process, Scratch, u64)> {
    let dir = Scratch::new()?;
    let file = dir.path().join("scenario.yaml");
    fs::write(&file, long())?;
    let process = Process::start(
        command(injector, &file, dir.path(), &[]),
        &dir.path().join("output"),
    )?;
    let mut service = 0;
    wait_until("all of it acts", PLAYED, || {
        let Ok(log) = log(dir.path()) else {
            return Ok(false);
        };
        service = of(&log, "service_started")
            .first()
            .and_then(|record| record["pid"].as_u64())
            .unwrap_or_default();
        Ok(of(&log, "step_started")
            .iter()
            .any(|record| record["step"] == "slow"))
    })?;
    let stat = fs::read_to_string(format!("/proc/{service}/stat"))?;
    ensure!(
        stat.contains(") T "),
        "the service does not stand still: {stat}"
    );
    Ok((process, dir, service))
}

/// Waits until nothing is left of a run.
fn nothing_left(injector: &Injector, run: i32, service: u64) -> Result<()> {
    wait_until(
        "nothing is left of the run",
        Duration::from_secs(30),
        || {
            let namespaces = fs::read_dir("/run/netns")
                .into_iter()
                .flatten()
                .flatten()
                .any(|entry| {
                    entry
                        .file_name()
                        .to_string_lossy()
                        .starts_with(&format!("injector-run-{run}-"))
                });
            let directory = fs::read_dir(std::env::temp_dir())?.flatten().any(|entry| {
                entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with(&format!("injector-run-{run}-"))
            });
            let lives = Path::new(&format!("/proc/{service}")).exists();
            let rules = injector.json(&["list"])?["rules"]
                .as_array()
                .map_or(0, Vec::len);
            Ok(!namespaces && !directory && !lives && rules == 0)
        },
    )
}

fn an_interrupted_run_heals_and_reports() -> Result<()> {
    let injector = Injector::started(&[])?;
    let (mut process, dir, service) = begun(&injector)?;
    let run = process.pid();
    process.signal(Signal::SIGINT)?;
    let status = process.wait(Duration::from_secs(30))?;
    ensure!(
        status.and_then(|status| status.code()) == Some(9),
        "{status:?}"
    );
    nothing_left(&injector, run.as_raw(), service)?;
    let log = log(dir.path())?;
    let last = log.last().context("no log")?;
    ensure!(
        last["event"] == "run_ended" && last["verdict"] == "void",
        "{last}"
    );
    ensure!(of(&log, "fault_ended").len() == 1 && of(&log, "resumed").len() == 1);
    ensure!(dir.path().join("report.html").exists(), "no report");
    Ok(())
}

fn a_killed_run_leaves_nothing() -> Result<()> {
    let injector = Injector::started(&[])?;
    let (mut process, _dir, service) = begun(&injector)?;
    let run = process.pid();
    process.signal(Signal::SIGKILL)?;
    process.wait(Duration::from_secs(30))?;
    nothing_left(&injector, run.as_raw(), service)
}

/// Every host that plays a file computes the same partition, without asking another one.
fn hosts_compute_the_same_partition() -> Result<()> {
    let injector = Injector::new()?;
    let dir = Scratch::new()?;
    let file: PathBuf = dir.path().join("hosts.yaml");
    fs::write(
        &file,
        "name: hosts
hosts: {a: 198.18.7.1, b: 198.18.7.2, c: 198.18.7.3, d: 198.18.7.4}
targets: {iface: [eth0]}
steps:
  - {name: p, partition: {shape: random_halves}, for: 5s}
",
    )?;
    let played = |host: &str, seed: &str| -> Result<Value> {
        let mut command =
            injector.cli(&["--json", "run", "--dry-run", "--self", host, "--seed", seed]);
        command.arg(&file);
        let output = run(command, PLAYED)?.success()?;
        Ok(serde_json::from_str(&output.stdout)?)
    };
    let mut all = Vec::new();
    for seed in ["1", "2", "3", "4", "5", "6", "7", "8"] {
        let of_each: Vec<Value> = ["a", "b", "c", "d"]
            .iter()
            .map(|host| Ok(played(host, seed)?["steps"].clone()))
            .collect::<Result<_>>()?;
        ensure!(
            of_each.windows(2).all(|two| two[0] == two[1]),
            "{of_each:?}"
        );
        all.push(of_each[0].to_string());
    }
    all.dedup();
    ensure!(all.len() > 1, "the seed changes nothing: {all:?}");
    // Who is none of them is told so.
    let mut command = injector.cli(&["run", "--dry-run"]);
    command.arg(&file);
    let output = run(command, PLAYED)?;
    ensure!(
        output.code() == Some(2) && output.stderr.contains("--self"),
        "{}",
        output.describe()
    );
    Ok(())
}

/// Three hosts, each with a daemon and a run of its own that know nothing of the others', and one file. Which of them it is
/// each finds by its addresses.
fn several_hosts_play_one_file() -> Result<()> {
    const HOSTS: [&str; 3] = ["n1", "n2", "n3"];
    let lab = Lab::switched(HOSTS.len())?;
    let nodes = &lab.spaces()[..HOSTS.len()];
    let injectors: Vec<Injector> = HOSTS
        .iter()
        .map(|_| Injector::new())
        .collect::<Result<_>>()?;
    let dir = Scratch::new()?;
    let file = dir.path().join("split.yaml");
    let checks: Vec<String> = (1..)
        .zip(HOSTS)
        .map(|(number, host)| {
            format!(
                "  - {{name: {host}, kind: measure, command: ping -c 1 -W 1 10.88.0.{number}, every: 300ms, timeout: 3s}}\n"
            )
        })
        .collect();
    fs::write(
        &file,
        format!(
            "name: split
hosts: {{n1: 10.88.0.1, n2: 10.88.0.2, n3: 10.88.0.3}}
targets: {{iface: [eth0]}}
settle: 1s
checks:
{}steps:
  - {{wait: 2s}}
  - {{name: alone, partition: {{shape: isolate}}, for: 4s}}
",
            checks.concat()
        ),
    )?;
    // Late enough for all of them to be up and waiting.
    let start = (Timestamp::now() + Duration::from_secs(6)).to_string();
    let play = |place: usize| -> Result<Vec<Value>> {
        let reports = dir.path().join(HOSTS[place]);
        let mut command = nodes[place].command(injectors[place].binary())?;
        injectors[place].configure(
            &mut command,
            &["--json", "run", "--seed", "5", "--start-at", &start],
        );
        command.arg(&file).arg("--report").arg(&reports);
        let output = run(command, PLAYED)?;
        injectors[place].ok(&["down"])?;
        ensure!(output.code() == Some(0), "{}", output.describe());
        log(&reports)
    };
    let logs: Vec<Vec<Value>> = thread::scope(|scope| {
        let running: Vec<_> = (0..HOSTS.len())
            .map(|place| scope.spawn(move || play(place)))
            .collect();
        running
            .into_iter()
            .map(|one| one.join().map_err(|_| anyhow!("a run panicked"))?)
            .collect::<Result<_>>()
    })?;
    let mut began: Vec<Timestamp> = Vec::new();
    let mut words: Vec<&str> = Vec::new();
    for log in &logs {
        let [fault] = of(log, "fault_started")[..] else {
            bail!("{log:#?}")
        };
        began.push(fault["at"].as_str().context("no time")?.parse()?);
        words.push(fault["what"].as_str().context("no words")?);
    }
    ensure!(words.windows(2).all(|two| two[0] == two[1]), "{words:?}");
    began.sort();
    let apart = began[began.len() - 1].duration_since(began[0]);
    report(format!("{}, begun within {apart:#}", words[0]));
    ensure!(apart.as_secs() < 3, "begun at {began:?}");
    let alone = words[0]
        .strip_prefix("partition ")
        .and_then(|words| words.split(' ').next())
        .context(words[0].to_owned())?;
    // Everybody lost whoever is alone, who lost everybody, and nobody lost anybody else.
    for (host, log) in HOSTS.iter().zip(&logs) {
        for other in HOSTS {
            let failed = of(log, "checked")
                .iter()
                .filter(|record| record["check"] == other && record["ok"] == false)
                .count();
            let cut = *host != other && (*host == alone || other == alone);
            ensure!(
                (failed > 0) == cut,
                "{host} to {other}: {failed} failed, and {alone} was alone"
            );
        }
    }
    Ok(())
}

/// In a browser without a network: nothing is missing, nothing complains.
fn a_browser_shows_the_report() -> Result<()> {
    let injector = Injector::started(&[])?;
    let text = scenario(
        "browser",
        "description: \"<script>alert(1)</script> & 'more'\"
steps:
  - {name: cut, partition: {shape: sides, sides: [[n1], [n2]]}, for: 2s}
",
    );
    let run = Run::play(&injector, &text, &[])?;
    run.expect(0, "passed")?;
    let mut browser = Command::new("unshare");
    browser
        .args([
            "--net",
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
        ])
        .args(["--enable-logging=stderr", "--v=0", "--dump-dom"])
        .arg(format!(
            "--user-data-dir={}",
            run.dir.path().join("browser").display()
        ))
        .arg(format!(
            "file://{}",
            run.dir.path().join("report.html").display()
        ));
    let shown = tests::lab::command::run(browser, Duration::from_mins(2))?.success()?;
    ensure!(
        !shown.stderr.contains("CONSOLE"),
        "the console: {}",
        shown.stderr
    );
    // The style sheet names the colours too.
    let (_, body) = shown.stdout.split_once("</style>").context("no style")?;
    let count = |what: &str| body.matches(what).count();
    // Latency, success and packets; each has the window of the one fault, and lines.
    ensure!(count("<svg") == 3, "{} plots", count("<svg"));
    ensure!(
        count("fill=\"#EED2CA\"") == 3,
        "{} windows",
        count("fill=\"#EED2CA\"")
    );
    ensure!(count("<polyline") > 6, "{} lines", count("<polyline"));
    ensure!(count("<script") == 0, "text became a script");
    ensure!(
        shown.stdout.contains("&lt;script&gt;"),
        "the description is not there"
    );
    Ok(())
}
