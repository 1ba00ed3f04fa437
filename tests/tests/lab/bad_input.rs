//! Wrong input and hopeless situations: a message that says what was tried and what to do, the
//! documented exit code, and nothing changed on the host.

use std::{os::unix::process::CommandExt, time::Duration};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use serde_json::json;
use tests::lab::{
    command,
    injector::{Injector, Mode, binary, exit},
    process::Process,
    scratch::Scratch,
    snapshot::Snapshot,
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial("bad_input::rules_on_the_command_line", NEEDS, command_line),
        trial("bad_input::files", NEEDS, files),
        trial("bad_input::no_daemon", NEEDS, no_daemon),
        trial("bad_input::no_root", NEEDS, no_root),
        trial(
            "bad_input::a_socket_that_is_none",
            NEEDS,
            socket_that_is_none,
        ),
        trial("bad_input::a_second_daemon", NEEDS, second_daemon),
        trial("bad_input::requests_by_hand", NEEDS, requests_by_hand),
        trial("bad_input::check_probes", NEEDS, check_probes),
    ]
}

/// Arguments of `add` behind the target, expected exit code, words that the message must have.
type Case = (&'static str, i32, &'static [&'static str]);

const CASES: &[Case] = &[
    (
        "x --peer 10.0.0.1 --peer-port 90-80 --cut",
        exit::USAGE,
        &["90-80"],
    ),
    (
        "x --peer 10.0.0.1 --peer-port 80- --peer-port 70000 --cut",
        exit::USAGE,
        &["70000"],
    ),
    ("x --length 500-400 --cut", exit::USAGE, &["500-400"]),
    (
        "x --peer 10.0.0.1 --local fd00::1 --cut",
        exit::USAGE,
        &["10.0.0.1", "fd00::1"],
    ),
    (
        "x --peer fd00::1 --ip-version 4 --cut",
        exit::USAGE,
        &["fd00::1"],
    ),
    (
        "x --peer 10.0.0.1/8 --cut",
        exit::USAGE,
        &["10.0.0.1/8", "10.0.0.0/8"],
    ),
    ("x --peer 10.0.0.300 --cut", exit::USAGE, &["10.0.0.300"]),
    (
        "x --peer 10.0.0.1 --drop-pattern 0000",
        exit::USAGE,
        &["0000"],
    ),
    (
        "x --peer 10.0.0.1 --drop-pattern 012",
        exit::USAGE,
        &["012"],
    ),
    ("x --peer 10.0.0.1 --drop-nth 0", exit::USAGE, &["0"]),
    ("x --peer 10.0.0.1 --drop-every 0", exit::USAGE, &["0"]),
    ("x --peer 10.0.0.1 --cut --for 0s", exit::USAGE, &["0s"]),
    (
        "x --peer 10.0.0.1 --cut --for fortnight",
        exit::USAGE,
        &["fortnight"],
    ),
    (
        "x --peer 10.0.0.1 --cut --flap up=0s,down=1s",
        exit::USAGE,
        &["up"],
    ),
    (
        "x --peer 10.0.0.1 --cut --flap up=1s,down=1s,phase=2s",
        exit::USAGE,
        &["phase"],
    ),
    ("x --peer 10.0.0.1 --cut --flows 0%", exit::USAGE, &["0%"]),
    (
        "x --peer 10.0.0.1 --cut --flows 101%",
        exit::USAGE,
        &["101%"],
    ),
    ("x --peer 10.0.0.1 --cut --proto tpc", exit::USAGE, &["tpc"]),
    (
        "x --peer 10.0.0.1 --cut --tcp-flags sin",
        exit::USAGE,
        &["sin"],
    ),
    (
        "x --peer 10.0.0.1 --cut --tcp-flags syn --proto udp",
        exit::USAGE,
        &["udp"],
    ),
    ("x --peer 10.0.0.1 --cut --state old", exit::USAGE, &["old"]),
    ("x --peer 10.0.0.1 --cut --dscp 64", exit::USAGE, &["64"]),
    (
        "x --peer 10.0.0.1 --cut --no-such-flag",
        exit::USAGE,
        &["no-such-flag"],
    ),
    ("x --peer 10.0.0.1", exit::USAGE, &["--cut"]),
    (
        "x --peer 10.0.0.1 --cut --drop-nth 3",
        exit::USAGE,
        &["--drop-nth"],
    ),
    ("x --cut", exit::USAGE, &["--all-traffic"]),
    ("x --peer 0.0.0.0/0 --cut", exit::USAGE, &["--all-traffic"]),
    ("bad/name --peer 10.0.0.1 --cut", exit::USAGE, &["bad/name"]),
    ("there --peer 10.0.0.1 --cut", exit::NAME, &["there"]),
];

/// Runs the CLI; what is wrong with its end, if anything.
fn wrong_end(
    injector: &Injector,
    arguments: &[&str],
    code: i32,
    words: &[&str],
) -> Result<Option<String>> {
    let output = injector.run(arguments)?;
    let says = words.iter().all(|word| output.stderr.contains(word));
    let right = output.code() == Some(code) && says && !output.stderr.contains("panicked");
    Ok((!right).then(|| format!("expected {code}, {words:?}:\n{}", output.describe())))
}

fn command_line() -> Result<()> {
    const PLAIN: [&str; 3] = ["--peer", "10.0.0.1", "--cut"];
    let lab = Lab::pair()?;
    let a = lab.a().netns();
    let injector = Injector::started(&[])?;
    injector.add(&format!(
        "there --netns {a} --iface lo --peer 10.9.9.9 --cut"
    ))?;
    let before = Snapshot::of(&lab.a().ns)?;
    let listed = injector.json(&["list"])?["rules"].clone();
    let mut wrong = Vec::new();
    for (line, code, words) in CASES {
        let mut arguments = vec!["add", "--netns", a, "--iface", "eth0"];
        arguments.extend(line.split_whitespace());
        wrong.extend(wrong_end(&injector, &arguments, *code, words)?);
    }
    let add = |target: &[&'static str], netns: &'static str| {
        [&["add"], target, &["--netns", netns], &PLAIN].concat()
    };
    // (An empty pattern cannot come through a line that is split at white space.)
    let empty = [
        "add",
        "x",
        "--netns",
        a,
        "--iface",
        "eth0",
        "--peer",
        "10.0.0.1",
        "--drop-pattern",
        "",
    ];
    let no_interface = [&["add", "--netns", a, "--iface", "eth9"], &PLAIN[..]].concat();
    let none_named = [&["add", "--netns", a], &PLAIN[..]].concat();
    let one_side = ["partition", "--netns", a, "--side", "10.0.0.1"];
    let unknown_side = [&one_side[..], &["--side", "no-such-host"]].concat();
    let same_side = [&one_side[..], &["--side", "10.0.0.1"]].concat();
    let others: [(&[&str], i32, &[&str]); 13] = [
        (&no_interface, exit::USAGE, &["eth9"]),
        (
            &add(&["--iface", "eth0"], "no-such-namespace"),
            exit::USAGE,
            &["no-such-namespace"],
        ),
        (
            &add(&["--iface", "eth0"], "/no/such/file"),
            exit::USAGE,
            &["/no/such/file"],
        ),
        (&none_named, exit::USAGE, &["--iface"]),
        (&empty, exit::USAGE, &["pattern"]),
        (&["heal", "nobody"], exit::NAME, &["nobody"]),
        (&["heal"], exit::USAGE, &["--all"]),
        (&["show", "nobody"], exit::NAME, &["nobody"]),
        (&one_side, exit::USAGE, &["side"]),
        (&unknown_side, exit::USAGE, &["no-such-host"]),
        (&same_side, exit::USAGE, &["10.0.0.1"]),
        (&["frobnicate"], exit::USAGE, &["frobnicate"]),
        (
            &[
                &["exec", "--netns", a, "--iface", "eth0"],
                &PLAIN[..],
                &["--"],
            ]
            .concat(),
            exit::EXEC,
            &["COMMAND"],
        ),
    ];
    for (arguments, code, words) in others {
        wrong.extend(wrong_end(&injector, arguments, code, words)?);
    }
    report(format!(
        "{} of {} wrong",
        wrong.len(),
        CASES.len() + others.len()
    ));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    before.must_equal(&Snapshot::of(&lab.a().ns)?)?;
    ensure!(
        injector.json(&["list"])?["rules"] == listed,
        "wrong input changed the rules"
    );
    Ok(())
}

fn files() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    let before = Snapshot::of(&lab.a().ns)?;
    let folder = Scratch::new()?;
    let file = folder.path().join("rules.json");
    let file_name = file.to_string_lossy().into_owned();
    let good = json!({"name": "good", "netns": lab.a().netns(), "iface": ["eth0"],
                      "peer": ["10.0.0.1"], "fault": {"cut": true}});
    let documents = [
        ("not JSON at all".to_owned(), "JSON"),
        ("{\"rules\": [".to_owned(), "JSON"),
        ("{\"rulse\": []}".to_owned(), "rulse"),
        (json!({"rules": [{"name": "x"}]}).to_string(), "iface"),
        (json!({"rules": [good, {"name": "y", "iface": ["eth0"], "fault": {"cut": true}, "colour": 1}]}).to_string(), "colour"),
        (json!({"rules": [good, good]}).to_string(), "good"),
        (json!({"rules": [good, {"name": "z", "netns": lab.a().netns(), "iface": ["eth9"], "peer": ["10.0.0.1"], "fault": {"cut": true}}]}).to_string(), "eth9"),
    ];
    for (document, word) in documents {
        std::fs::write(&file, &document)?;
        let output = injector.run(&["apply", &file_name])?;
        ensure!(
            !matches!(output.code(), None | Some(0))
                && output.stderr.contains(word)
                && !output.stderr.contains("panicked"),
            "{document}\n{}",
            output.describe()
        );
    }
    let output = injector.run(&["apply", "/no/such/file.json"])?;
    ensure!(
        output.code() != Some(0) && output.stderr.contains("/no/such/file.json"),
        "{}",
        output.describe()
    );
    // All or nothing: the good rules of those files are not there.
    before.must_equal(&Snapshot::of(&lab.a().ns)?)?;
    let rules = injector.json(&["list"])?;
    ensure!(
        rules["rules"].as_array().is_some_and(Vec::is_empty),
        "half a file was applied: {rules}"
    );
    injector
        .try_apply(&json!({"rules": [good]}), Mode::Add)?
        .success()?;
    Ok(())
}

fn no_daemon() -> Result<()> {
    let injector = Injector::new()?;
    for (arguments, code) in [
        (&["list"][..], exit::OK),
        (&["stats"], exit::OK),
        (&["heal", "--all"], exit::OK),
        (&["down"], exit::OK),
        (&["show", "x"], exit::NAME),
        (&["heal", "x"], exit::NAME),
    ] {
        let output = injector.run(arguments)?;
        ensure!(
            output.code() == Some(code),
            "expected {code}: {}",
            output.describe()
        );
        let text = output.stdout.clone() + &output.stderr;
        ensure!(
            text.contains("no daemon"),
            "it does not say that there is no daemon: {}",
            output.describe()
        );
        ensure!(
            !injector.socket().exists(),
            "looking started a daemon: {}",
            output.describe()
        );
    }
    // Whoever reads the JSON finds the same fields as from a daemon.
    let stats = injector.stats()?;
    ensure!(
        stats.rules.is_empty() && stats.lanes.is_empty() && stats.flushes.is_empty(),
        "{stats:?}"
    );
    // A command that needs one starts it, says so, and it serves.
    let lab = Lab::pair()?;
    let output = injector.ok(&[
        "add",
        "x",
        "--netns",
        lab.a().netns(),
        "--iface",
        "eth0",
        "--peer",
        "10.0.0.1",
        "--cut",
    ])?;
    ensure!(
        output.stderr.contains("daemon"),
        "a daemon was started in silence: {}",
        output.describe()
    );
    let list = injector.json(&["list"])?;
    ensure!(list["rules"][0]["spec"]["name"] == "x", "{list}");
    let pid = injector.locked_by()?;
    injector.json(&["down"])?;
    tests::lab::wait::wait_until("the daemon leaves", Duration::from_secs(10), || {
        Ok(!tests::lab::injector::serves(pid, injector.state_dir()))
    })?;
    // One that a crash left a socket of is no daemon either.
    let mut injector = Injector::started(&[])?;
    injector.kill_daemon()?;
    ensure!(
        injector.socket().exists(),
        "the socket went with a killed daemon"
    );
    let output = injector.run(&["list"])?;
    ensure!(
        output.code() == Some(exit::OK),
        "a stale socket: {}",
        output.describe()
    );
    Ok(())
}

/// A command that will run as nobody. The binary is copied to where nobody can read it.
fn as_nobody(
    injector: &Injector,
    arguments: &[&str],
    copy: &std::path::Path,
) -> std::process::Command {
    let mut command = std::process::Command::new(copy);
    injector.configure(&mut command, arguments);
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(|| {
            setgroups(&[])?;
            setgid(Gid::from_raw(65534))?;
            setuid(Uid::from_raw(65534))?;
            Ok(())
        });
    }
    command
}

fn no_root() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::pair()?;
    let folder = Scratch::new()?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))?;
    let copy = folder.path().join("injector");
    std::fs::copy(binary()?, &copy)?;
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755))?;
    let add = [
        "add",
        "x",
        "--netns",
        lab.a().netns(),
        "--iface",
        "eth0",
        "--peer",
        "10.0.0.1",
        "--cut",
    ];
    // Once where no daemon runs, and once where one of root's does.
    let idle = Injector::new()?;
    let serving = Injector::started(&[])?;
    for injector in [&idle, &serving] {
        for arguments in [
            &add[..],
            &["daemon"],
            &["list"],
            &["heal", "--all"],
            &["down"],
        ] {
            let output = command::run(as_nobody(injector, arguments, &copy), command::DEADLINE)?;
            if std::ptr::eq(injector, &raw const idle) && !["add", "daemon"].contains(&arguments[0])
            {
                // Anybody can see that there is no daemon, and nothing to undo.
                ensure!(
                    output.code() == Some(exit::OK) && output.stdout.contains("no daemon"),
                    "{}",
                    output.describe()
                );
                continue;
            }
            ensure!(
                output.code() == Some(exit::NOT_PERMITTED)
                    && (output.stderr.contains("root") || output.stderr.contains("sudo")),
                "{}",
                output.describe()
            );
        }
    }
    let rules = serving.json(&["list"])?;
    ensure!(
        rules["rules"].as_array().is_some_and(Vec::is_empty),
        "{rules}"
    );
    // What needs no privileges works without.
    for arguments in [&["--help"][..], &["--version"]] {
        command::run(as_nobody(&idle, arguments, &copy), command::DEADLINE)?.success()?;
    }
    Ok(())
}

fn socket_that_is_none() -> Result<()> {
    let injector = Injector::new()?;
    std::fs::write(injector.socket(), "a file")?;
    let output = injector.run(&["list"])?;
    ensure!(
        output.code() == Some(exit::NO_DAEMON) && output.stderr.contains("socket"),
        "{}",
        output.describe()
    );
    ensure!(
        std::fs::read_to_string(injector.socket())? == "a file",
        "a file that is no socket was touched"
    );
    Ok(())
}

fn second_daemon() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    injector.add(&format!(
        "x --netns {} --iface eth0 --peer 10.0.0.1 --cut",
        lab.a().netns()
    ))?;
    let before = Snapshot::of(&lab.a().ns)?;
    let output = injector.run(&["daemon"])?;
    ensure!(
        !matches!(output.code(), None | Some(0)),
        "a second daemon: {}",
        output.describe()
    );
    let pid = injector.locked_by()?;
    ensure!(
        (output.stdout.clone() + &output.stderr).contains(&pid.to_string()),
        "it does not name the first one, {pid}: {}",
        output.describe()
    );
    before.must_equal(&Snapshot::of(&lab.a().ns)?)?;
    ensure!(
        injector.stats()?.rules.len() == 1,
        "the first one's rule is gone"
    );
    // A first one that hangs is still the first one.
    injector.signal(Signal::SIGSTOP)?;
    let mut second = Process::start(
        injector.cli(&["daemon"]),
        &injector.state_dir().join("second.out"),
    )?;
    let ended = second.wait(Duration::from_secs(10))?;
    injector.signal(Signal::SIGCONT)?;
    ensure!(
        ended.is_some_and(|status| !status.success()),
        "a second daemon beside one that hangs: {ended:?}"
    );
    before.must_equal(&Snapshot::of(&lab.a().ns)?)?;
    Ok(())
}

fn requests_by_hand() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    let mut other = injector.connect()?;
    let mut connection = injector.connect()?;
    for line in [
        "nonsense",
        "{}",
        "[]",
        "null",
        r#"{"v":1,"id":1}"#,
        r#"{"v":99,"id":1,"op":"list"}"#,
        r#"{"v":1,"id":1,"op":"lits"}"#,
        r#"{"v":1,"id":1,"op":"add","args":{"rules":7}}"#,
        r#"{"v":1,"id":1,"op":"heal","args":{"nmaes":["x"]}}"#,
        "\u{1}\u{2}{\"v\":1}",
    ] {
        let answer = connection.send_line(line).with_context(|| line)?;
        ensure!(
            answer["ok"] == json!(false) && answer["error"]["message"].is_string(),
            "{line} was answered with {answer}"
        );
        // Nobody else is hurt, nor this one.
        other.call("list", &json!({}))?;
        connection.call("list", &json!({}))?;
    }
    // Deep nesting, and a line without an end that is dropped with its connection.
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let answer = connection.send_line(&deep)?;
    ensure!(answer["ok"] == json!(false), "{answer}");
    drop(connection);
    let answer = other.call(
        "add",
        &json!({"rules": [{"name": "x", "netns": lab.a().netns(), "iface": ["eth0"],
                           "peer": ["10.0.0.1"], "fault": {"cut": true}}]}),
    )?;
    ensure!(answer["rules"][0]["state"] == "active", "{answer}");
    let mode = {
        use std::os::unix::fs::PermissionsExt;
        std::fs::metadata(injector.socket())?.permissions().mode() & 0o777
    };
    ensure!(mode == 0o600, "the socket's mode is {mode:o}");
    Ok(())
}

/// `check` says what this kernel really has, and changes nothing.
fn check_probes() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::new()?;
    let before = Snapshot::of(&lab.a().ns)?;
    let output = injector.run(&["--json", "check"])?;
    let features: serde_json::Value =
        serde_json::from_str(&output.stdout).with_context(|| output.describe())?;
    let list = features
        .as_array()
        .or_else(|| features["features"].as_array())
        .or_else(|| features["probes"].as_array())
        .with_context(|| format!("check prints no list: {features}"))?;
    let status = |name: &str| -> Result<String> {
        list.iter()
            .find(|one| {
                one["feature"]
                    .as_str()
                    .is_some_and(|feature| feature.to_lowercase().contains(name))
            })
            .and_then(|one| one["status"].as_str())
            .map(ToOwned::to_owned)
            .with_context(|| format!("check does not know {name}: {features}"))
    };
    // The same asked of the kernel in another way.
    let has_fq = lab.b().ns.try_tool("tc qdisc add dev eth0 root fq")?.code() == Some(0);
    for (name, there) in [
        ("clsact", true),
        ("veth", true),
        ("bpf", true),
        ("fq", has_fq),
    ] {
        let status = status(name)?;
        ensure!(
            (status == "ok") == there,
            "check says {status} of {name}, and it is {}there",
            if there { "" } else { "not " }
        );
    }
    let text = injector.run(&["check"])?.stdout;
    ensure!(
        text.lines().count() >= list.len(),
        "less than a line each:\n{text}"
    );
    before.must_equal(&Snapshot::of(&lab.a().ns)?)?;
    Ok(())
}
