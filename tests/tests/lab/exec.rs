//! `injector exec`: the fault holds while the command runs and is healed whatever becomes of it.

use std::{os::unix::process::ExitStatusExt, time::Duration};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::lab::{
    injector::{Injector, exit},
    process::Process,
    snapshot::Snapshot,
    topology::Lab,
    trial::{Need, trial},
    udp::Path,
    wait::{wait_for, wait_until},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("sh")];
    vec![
        trial("exec::the_exit_code_is_the_commands", NEEDS, exit_codes),
        trial(
            "exec::the_fault_holds_while_the_command_runs",
            NEEDS,
            || holds(End::Itself),
        ),
        trial("exec::healed_when_the_command_is_killed", NEEDS, || {
            holds(End::CommandKilled)
        }),
        trial("exec::healed_when_the_cli_is_killed", NEEDS, || {
            holds(End::CliKilled)
        }),
        trial("exec::healed_when_the_cli_is_interrupted", NEEDS, || {
            holds(End::Interrupted)
        }),
    ]
}

const PATIENCE: Duration = Duration::from_secs(10);

fn exit_codes() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    let run = |command: &[&str]| {
        let mut arguments = vec![
            "exec",
            "--netns",
            lab.a().netns(),
            "--iface",
            "eth0",
            "--peer",
            "10.0.0.1",
            "--cut",
            "--",
        ];
        arguments.extend_from_slice(command);
        injector.run(&arguments)
    };
    for (command, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 42"], 42),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["/no/such/command"], 127),
        (&["/"], 126),
    ] {
        let output = run(command)?;
        ensure!(
            output.code() == Some(code),
            "{command:?} should give {code}: {}",
            output.describe()
        );
    }
    let output = run(&["echo", "to", "standard", "output"])?;
    ensure!(
        output.stdout == "to standard output\n",
        "the command's output is not its own: {}",
        output.describe()
    );
    // Where the fault cannot be made, the command does not run.
    let output = injector.run(&[
        "exec",
        "--netns",
        lab.a().netns(),
        "--iface",
        "eth9",
        "--peer",
        "10.0.0.1",
        "--cut",
        "--",
        "echo",
        "ran",
    ])?;
    ensure!(
        output.code() == Some(125) && !output.stdout.contains("ran"),
        "{}",
        output.describe()
    );
    let wrong = injector.run(&[
        "exec",
        "--netns",
        lab.a().netns(),
        "--cut",
        "--",
        "echo",
        "ran",
    ])?;
    ensure!(
        matches!(wrong.code(), Some(125 | exit::USAGE)) && !wrong.stdout.contains("ran"),
        "{}",
        wrong.describe()
    );
    let rules = injector.stats()?.rules;
    ensure!(rules.is_empty(), "rules are left: {rules:?}");
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Itself,
    CommandKilled,
    CliKilled,
    Interrupted,
}

fn holds(end: End) -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let before = Snapshot::of(&a.ns)?;
    let injector = Injector::started(&[])?;
    let mut path = Path::new(a, 7000, b, 7001)?;
    ensure!(path.lost(1..=3)?.is_empty(), "lost without a fault");
    // The command says who it is and waits for a line. The pipe is opened to write too, which waits for nobody: dash,
    // interrupted just before an open that waits, goes on waiting (1 of 20,000 times).
    let pid_file = injector.state_dir().join("pid");
    let pipe = injector.state_dir().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).context("mkfifo")?;
    let script = format!(
        "echo $$ > {pid}.new; mv {pid}.new {pid}; read line <> {pipe}; exit 5",
        pid = pid_file.display(),
        pipe = pipe.display()
    );
    let b_v4 = b.v4.to_string();
    let command = injector.cli(&[
        "exec",
        "--netns",
        a.netns(),
        "--iface",
        "eth0",
        "--to",
        &b_v4,
        "--peer-port",
        "7001",
        "--cut",
        "--",
        "env",
        // Who runs the tests in the background of a script has it ignored, and a shell keeps to that.
        "--default-signal=INT",
        "sh",
        "-c",
        &script,
    ]);
    let mut running = Process::start(command, &injector.state_dir().join("exec.out"))?;
    let pid = wait_for("the command runs", PATIENCE, || {
        if let Some(status) = running.ended()? {
            anyhow::bail!("exec ended with {status}: {}", running.log_tail());
        }
        let Ok(text) = std::fs::read_to_string(&pid_file) else {
            return Ok(None);
        };
        Ok(Some(Pid::from_raw(text.trim().parse()?)))
    })?;
    ensure!(path.lost(4..=13)?.len() == 10, "the fault does not hold");
    let stats = injector.stats()?;
    ensure!(
        stats.rules.len() == 1 && stats.rules[0].egress.cut_packets == 10,
        "{stats:?}"
    );
    match end {
        End::Itself => std::fs::write(&pipe, "go\n")?,
        End::CommandKilled => kill(pid, Signal::SIGKILL)?,
        End::CliKilled => running.signal(Signal::SIGKILL)?,
        End::Interrupted => running.signal(Signal::SIGINT)?,
    }
    let ended = running
        .wait(PATIENCE)?
        .with_context(|| format!("exec did not end: {}", running.log_tail()))?;
    match end {
        End::Itself => ensure!(ended.code() == Some(5), "{ended}"),
        End::CommandKilled => ensure!(ended.code() == Some(128 + 9), "{ended}"),
        End::CliKilled => ensure!(ended.signal() == Some(9), "{ended}"),
        End::Interrupted => ensure!(ended.code() == Some(128 + 2), "{ended}"),
    }
    // With its CLI dead, the daemon heals by itself, soon.
    let mut number = 20;
    wait_until("traffic is healthy", PATIENCE, || {
        number += 1;
        Ok(path.lost([number])?.is_empty())
    })?;
    wait_until("the host is as it was", PATIENCE, || {
        before.must_equal(&Snapshot::of(&a.ns)?).map(|()| true)
    })?;
    let rules = injector.stats()?.rules;
    ensure!(rules.is_empty(), "rules are left: {rules:?}");
    // A command that outlived its CLI is ours to end; it may be gone already.
    let _sent = kill(pid, Signal::SIGKILL);
    Ok(())
}
