//! Scenarios on hosts as they are, without a lab: in a namespace that somebody else made, and with control groups.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use tests::lab::{
    PREFIX,
    command::run,
    injector::Injector,
    process::Process,
    scratch::Scratch,
    topology::Lab,
    trial::{Need, trial},
    wait::wait_until,
};

use crate::scenario::{PLAYED, Run, command, log, of};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("ping")];
    vec![
        trial(
            "scenario_hosts::rules_act_in_a_namespace",
            NEEDS,
            rules_act_in_a_namespace,
        ),
        trial(
            "scenario_hosts::control_groups_and_units_are_frozen",
            NEEDS,
            control_groups_and_units_are_frozen,
        ),
        trial(
            "scenario_hosts::a_killed_run_thaws_what_it_froze",
            NEEDS,
            a_killed_run_thaws_what_it_froze,
        ),
        trial(
            "scenario_hosts::a_fault_of_others_ends_here_too_when_it_is_healed",
            NEEDS,
            a_fault_of_others_ends_here_too_when_it_is_healed,
        ),
    ]
}

/// `targets.netns`: a container, say, of which the host plays the part.
fn rules_act_in_a_namespace() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let text = format!(
        "name: elsewhere
hosts: {{a: {a}, b: {b}}}
targets: {{netns: {netns}, iface: [eth0]}}
settle: 1s
checks:
  - name: reach
    kind: liveness
    command: ip netns exec {netns} ping -c 1 -W 1 {b}
    every: 200ms
    timeout: 3s
steps:
  - {{wait: 1s}}
  - {{name: cut, partition: {{shape: sides, sides: [[a], [b]]}}, for: 3s}}
",
        a = a.v4,
        b = b.v4,
        netns = a.netns(),
    );
    let run = Run::play(&injector, &text, &["--self", "a"])?;
    run.expect(0, "passed")?;
    let log = run.log()?;
    let ended = of(&log, "fault_ended");
    ensure!(
        ended.len() == 1 && ended[0]["matched_packets"].as_u64() > Some(0),
        "{ended:?}"
    );
    let failed = of(&log, "checked")
        .iter()
        .filter(|record| record["ok"] == false)
        .count();
    ensure!(failed > 0, "nobody noticed: {log:#?}");
    Ok(())
}

/// A control group of the test's own with one process in it.
struct Group {
    path: PathBuf,
    name: String,
    process: Process,
}

impl Group {
    fn new(dir: &Path) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let root = mounts
            .lines()
            .find(|line| line.contains(" - cgroup2 "))
            .and_then(|line| line.split(' ').nth(4))
            .context("no control groups of version 2 are mounted")?;
        let unique = dir.file_name().context("a scratch without a name")?;
        let name = format!("{}-group", unique.to_string_lossy());
        ensure!(name.starts_with(PREFIX), "{name}");
        let path = Path::new(root).join(&name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let mut command = Command::new("sleep");
        command.arg("600");
        let process = Process::start(command, &dir.join("sleep.log"));
        let process = match process {
            Ok(process) => process,
            Err(error) => {
                fs::remove_dir(&path)?;
                return Err(error);
            }
        };
        let group = Self {
            path,
            name,
            process,
        };
        fs::write(
            group.path.join("cgroup.procs"),
            group.process.pid().to_string(),
        )?;
        Ok(group)
    }

    fn frozen(&self) -> Result<bool> {
        let events = fs::read_to_string(self.path.join("cgroup.events"))?;
        Ok(events.lines().any(|line| line == "frozen 1"))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.path.join("cgroup.freeze"), "0");
        let _ = self.process.signal(Signal::SIGKILL);
        let _ = self.process.wait(Duration::from_secs(5));
        // The kernel lets a group go some time after its last process.
        let gone = wait_until("a control group goes", Duration::from_secs(5), || {
            Ok(fs::remove_dir(&self.path).is_ok())
        });
        if let Err(error) = gone {
            eprintln!("could not remove {}: {error:#}", self.path.display());
        }
    }
}

fn control_groups_and_units_are_frozen() -> Result<()> {
    let dir = Scratch::new()?;
    let group = Group::new(dir.path())?;
    let injector = Injector::started(&[])?;
    // Where no systemd runs: what it would say of the unit.
    let systemctl = dir.path().join("systemctl");
    fs::write(
        &systemctl,
        format!(
            "#!/bin/sh\ntest \"$*\" = 'show --property=ControlGroup --value -- probe.service' && echo /{}\n",
            group.name
        ),
    )?;
    fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755))?;
    let is = |frozen: u8| {
        format!(
            "grep -x 'frozen {frozen}' {}/cgroup.events",
            group.path.display()
        )
    };
    let (frozen, thawed) = (is(1), is(0));
    let text = format!(
        "name: frozen
hosts: {{here: 127.0.0.1}}
settle: 0s
steps:
  - {{name: before, run: {thawed:?}}}
  - {{name: group, pause: {{cgroup: {name}}}, for: 2s}}
  - {{name: during, after: {{step: group, of: start, plus: 500ms}}, run: {frozen:?}}}
  - {{name: between, after: group, run: {thawed:?}}}
  - {{name: unit, pause: {{unit: probe.service}}}}
  - {{name: again, run: {frozen:?}}}
  - {{resume: {{unit: probe.service}}}}
  - {{name: after, run: {thawed:?}}}
  - {{name: left, pause: {{cgroup: {name}}}}}
",
        name = group.name,
    );
    let file = dir.path().join("scenario.yaml");
    fs::write(&file, text)?;
    let reports = dir.path().join("reports");
    let mut command = command(&injector, &file, &reports, &["--self", "here"]);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", dir.path().display()));
    let output = run(command, PLAYED)?;
    ensure!(output.code() == Some(0), "{}", output.describe());
    let log = log(&reports)?;
    ensure!(
        of(&log, "paused").len() == 3 && of(&log, "resumed").len() == 3,
        "{log:#?}"
    );
    ensure!(!group.frozen()?, "it was left frozen");
    Ok(())
}

fn a_killed_run_thaws_what_it_froze() -> Result<()> {
    let dir = Scratch::new()?;
    let group = Group::new(dir.path())?;
    let injector = Injector::started(&[])?;
    let file = dir.path().join("scenario.yaml");
    fs::write(
        &file,
        format!(
            "name: killed
hosts: {{here: 127.0.0.1}}
steps:
  - {{name: group, pause: {{cgroup: {}}}}}
  - {{run: sleep 600}}
",
            group.name
        ),
    )?;
    let reports = dir.path().join("reports");
    let mut playing = Process::start(
        command(&injector, &file, &reports, &["--self", "here"]),
        &dir.path().join("output"),
    )?;
    wait_until("it is frozen", PLAYED, || group.frozen())?;
    playing.signal(Signal::SIGKILL)?;
    playing.wait(Duration::from_secs(30))?;
    wait_until("it is thawed", Duration::from_secs(30), || {
        Ok(!group.frozen()?)
    })
}

/// What follows a fault in its sequence begins on all hosts at the same time, also where another step heals it.
fn a_fault_of_others_ends_here_too_when_it_is_healed() -> Result<()> {
    let injector = Injector::started(&[])?;
    let text = "name: others
hosts: {a: 198.18.7.1, b: 198.18.7.2, c: 198.18.7.3}
targets: {iface: [none0]}
settle: 0s
steps:
  - {name: ramp, on: a, ramp: {rule: {peer: b}, field: delay, from: 0ms, to: 1s, over: 1h}}
  - {name: cut, at: 0s, on: a, rule: {peer: b, fault: {cut: true}}, for: 1h}
  - {name: split, at: 0s, partition: {shape: sides, sides: [[a], [c]]}, for: 1h}
  - {name: asked, at: 0s, partition: {shape: isolate, hosts: [a, c], who: {command: echo a}}, for: 1h}
  - {name: whole, at: 0s, on: a, ramp: {rule: {peer: b}, field: delay, from: 0ms, to: 1s, over: 3s}}
  - {name: heal, at: 1s, heal: [ramp, cut, split, asked]}
";
    let run = Run::play(&injector, text, &["--self", "b"])?;
    run.expect(0, "passed")?;
    let log = run.log()?;
    ensure!(of(&log, "fault_started").is_empty(), "{log:#?}");
    let ended: Vec<&str> = of(&log, "step_ended")
        .iter()
        .filter_map(|record| record["step"].as_str())
        .collect();
    ensure!(
        ended.len() == 6 && ended.last() == Some(&"whole"),
        "{ended:?}"
    );
    Ok(())
}
