//! Targets: several namespaces under one daemon, loopback, targets that vanish, a packet that passes
//! two, and what stands in front of us.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tests::lab::{
    foreign,
    injector::Injector,
    snapshot::Snapshot,
    tcx::TcxProgram,
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, Skip, trial},
    udp::Path,
    wait::{wait_for, wait_until},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial(
            "targets::one_daemon_serves_many_namespaces",
            NEEDS,
            one_daemon_serves_many_namespaces,
        ),
        trial("targets::loopback", NEEDS, loopback),
        trial("targets::an_interface_disappears", NEEDS, || {
            disappears(Loss::Interface)
        }),
        trial("targets::a_namespace_disappears", NEEDS, || {
            disappears(Loss::Namespace)
        }),
        trial(
            "targets::a_namesake_is_left_alone",
            NEEDS,
            a_namesake_is_left_alone,
        ),
        trial(
            "targets::somebody_else_removes_our_filters",
            NEEDS,
            somebody_else_removes_our_filters,
        ),
        trial(
            "targets::a_packet_that_passes_twice_is_warned_of",
            NEEDS,
            a_packet_that_passes_twice_is_warned_of,
        ),
        trial(
            "targets::a_filter_in_front_of_us_is_reported",
            NEEDS,
            a_filter_in_front_of_us_is_reported,
        ),
        trial(
            "targets::a_tcx_program_in_front_of_us_is_reported",
            NEEDS,
            a_tcx_program_in_front_of_us_is_reported,
        ),
        trial(
            "targets::a_partition_cuts_where_the_routes_go",
            NEEDS,
            a_partition_cuts_where_the_routes_go,
        ),
    ]
}

const PATIENCE: Duration = Duration::from_secs(15);

fn one_daemon_serves_many_namespaces() -> Result<()> {
    let labs = [Lab::pair()?, Lab::pair()?, Lab::pair()?];
    let injector = Injector::started(&[])?;
    // The same rule by name, by path and by process id of somebody in the namespace.
    let mut sleeper = labs[2].a().ns.command("sleep")?;
    let mut sleeper = sleeper.arg("1000").spawn()?;
    let references = [
        labs[0].a().netns().to_owned(),
        labs[1].a().ns.path().display().to_string(),
        sleeper.id().to_string(),
    ];
    let mut paths = labs
        .iter()
        .map(|lab| Path::new(lab.a(), 7000, lab.b(), 7001))
        .collect::<Result<Vec<_>>>()?;
    let result = (|| {
        for (index, reference) in references.iter().enumerate() {
            let lost: Vec<usize> = lose(&mut paths, 10 + u32::try_from(index)?)?;
            ensure!(
                lost == (0..index).collect::<Vec<_>>(),
                "before rule {index} lost in {lost:?}"
            );
            injector.add(&format!(
                "rule-{index} --netns {reference} --iface eth0 --to {} --peer-port 7001 --cut",
                labs[index].b().v4
            ))?;
        }
        ensure!(lose(&mut paths, 20)? == [0, 1, 2], "not all are cut");
        injector.json(&["heal", "rule-1"])?;
        ensure!(lose(&mut paths, 21)? == [0, 2], "healed one of three");
        let stats = injector.stats()?;
        ensure!(
            stats.rule("rule-0")?.egress.cut_packets == 4
                && stats.rule("rule-2")?.egress.cut_packets == 2,
            "{stats:?}"
        );
        Ok(())
    })();
    sleeper.kill()?;
    sleeper.wait()?;
    result
}

/// Sends one datagram along each path; which of them are lost.
fn lose(paths: &mut [Path], number: u32) -> Result<Vec<usize>> {
    let mut lost = Vec::new();
    for (index, path) in paths.iter_mut().enumerate() {
        if !path.lost([number])?.is_empty() {
            lost.push(index);
        }
    }
    Ok(lost)
}

/// A packet on loopback is decided as leaving and as arriving.
fn loopback() -> Result<()> {
    let lab = Lab::pair()?;
    let mut node = lab.a().clone();
    node.v4 = [127, 0, 0, 1].into();
    node.v6 = std::net::Ipv6Addr::LOCALHOST;
    let ns = node.ns.name().to_owned();
    let before = Snapshot::of(&node.ns)?;
    let injector = Injector::started(&[])?;
    for (name, rule, lost_to_7001, lost_to_7002) in [
        (
            "out",
            "--to 127.0.0.1,::1 --peer-port 7001 --cut",
            true,
            false,
        ),
        (
            "in",
            "--from 127.0.0.1,::1 --local-port 7001 --cut",
            true,
            false,
        ),
        ("both", "--peer-port 7001 --proto udp --cut", true, false),
        ("other", "--dst-port 7002 --cut", false, true),
    ] {
        injector.add(&format!("{name} --netns {ns} --iface lo {rule}"))?;
        for (port, expected) in [(7001, lost_to_7001), (7002, lost_to_7002)] {
            for mut path in [
                Path::new(&node, 7000, &node, port)?,
                Path::new6(&node, 7000, &node, port)?,
            ] {
                let lost = path.lost(1..=5)?.len();
                ensure!(
                    lost == if expected { 5 } else { 0 },
                    "{name}: {lost} of 5 lost to port {port}"
                );
            }
        }
        let stats = injector.stats()?;
        let rule = stats.rule(name)?;
        let (egress, ingress) = (rule.egress, rule.ingress);
        ensure!(
            egress.cut_packets + ingress.cut_packets >= 10,
            "{name}: {rule:?}"
        );
        match name {
            "out" => ensure!(ingress.matched_packets == 0, "{name}: {rule:?}"),
            "in" => ensure!(egress.matched_packets == 0, "{name}: {rule:?}"),
            _ => {}
        }
        injector.json(&["heal", name])?;
    }
    before.must_equal(&Snapshot::of(&node.ns)?)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Interface,
    Namespace,
}

fn disappears(loss: Loss) -> Result<()> {
    let doomed = Lab::pair()?;
    let lab = Lab::pair()?;
    let mut injector = Injector::started(&[])?;
    for (name, lab) in [("doomed", &doomed), ("stays", &lab)] {
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --peer-port 7001 --cut",
            lab.a().netns(),
            lab.b().v4
        ))?;
    }
    let mut path = Path::new(lab.a(), 7000, lab.b(), 7001)?;
    match loss {
        Loss::Interface => drop(doomed.a().ns.tool("ip link del eth0")?),
        Loss::Namespace => doomed.a().ns.delete()?,
    }
    wait_until("the rule is gone", PATIENCE, || {
        Ok(injector.stats()?.rule("doomed")?.state == "gone")
    })?;
    let event = wait_for("an event says so", PATIENCE, || {
        Ok(injector.events()?.into_iter().find(|event| {
            event["kind"] == "target_gone"
                && event["target"]
                    .as_str()
                    .is_some_and(|target| target.contains(doomed.a().netns()))
        }))
    })?;
    report(format!("{}", event["message"]));
    ensure!(
        injector.daemon()?.ended()?.is_none(),
        "the daemon went with its target"
    );
    ensure!(path.lost(1..=5)?.len() == 5, "the other rule stopped");
    // What is gone can be healed, and its name used again.
    injector.json(&["heal", "doomed"])?;
    injector.json(&["heal", "--all"])?;
    ensure!(path.lost(6..=9)?.is_empty(), "healed, and not healthy");
    let answer = injector.json(&["down"])?;
    ensure!(
        answer["host_restored"] == Value::Bool(true),
        "nothing is left to undo: {answer}"
    );
    Ok(())
}

/// An interface of the same name that comes after ours is gone is somebody else's.
fn a_namesake_is_left_alone() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let mut injector = Injector::started(&[])?;
    injector.add(&format!(
        "x --netns {} --iface eth0 --peer {} --cut",
        a.netns(),
        b.v4
    ))?;
    injector.kill_daemon()?;
    a.ns.tool("ip link del eth0")?;
    a.ns.tool("ip link add eth0 type veth peer name eth1")?;
    foreign::clsact(&a.ns, "eth0")?;
    foreign::filter(&a.ns, "eth0", "egress", 1, foreign::UNSPEC)?;
    let before = Snapshot::of(&a.ns)?;
    injector.start_daemon(&[])?;
    before.must_equal(&Snapshot::of(&a.ns)?)
}

fn somebody_else_removes_our_filters() -> Result<()> {
    let lab = Lab::pair()?;
    let ns = &lab.a().ns;
    let injector = Injector::started(&[])?;
    injector.add(&format!(
        "x --netns {} --iface eth0 --to {} --peer-port 7001 --cut",
        ns.name(),
        lab.b().v4
    ))?;
    ns.tool("tc qdisc del dev eth0 clsact")?;
    wait_until("stats say so", PATIENCE, || {
        Ok(!injector.stats()?.target(ns.name(), "eth0")?.attached)
    })?;
    wait_until("an event says so", PATIENCE, || {
        Ok(injector
            .events()?
            .iter()
            .any(|event| event["kind"] == "target_lost"))
    })?;
    let void = injector.run(&["stats", "--expect-effect"])?;
    ensure!(
        void.code() == Some(tests::lab::injector::exit::NO_EFFECT),
        "{}",
        void.describe()
    );
    injector.heal_all()?;
    let qdiscs = ns.tool("tc qdisc show dev eth0")?.stdout;
    ensure!(!qdiscs.contains("clsact"), "left: {qdiscs}");
    Ok(())
}

fn warnings(answer: &Value) -> String {
    answer["warnings"].to_string()
}

fn a_packet_that_passes_twice_is_warned_of() -> Result<()> {
    let lab = Lab::switched(2)?;
    let switch = lab.switch()?;
    let injector = Injector::started(&[])?;
    let answer = injector.add(&format!(
        "once --netns {} --iface p1 --iface p2 --from 203.0.113.1 --cut",
        switch.name()
    ))?;
    ensure!(
        !warnings(&answer).contains("br0"),
        "warned without a reason: {}",
        warnings(&answer)
    );
    let answer = injector.add(&format!(
        "twice --netns {} --iface br0 --peer 203.0.113.1 --cut",
        switch.name()
    ))?;
    report(warnings(&answer));
    ensure!(
        warnings(&answer).contains("br0") && warnings(&answer).contains("p1"),
        "a bridge and its port: {answer}"
    );
    Ok(())
}

fn obstacles(injector: &Injector, netns: &str) -> Result<String> {
    Ok(injector
        .stats()?
        .target(netns, "eth0")?
        .obstacles
        .join("; "))
}

fn a_filter_in_front_of_us_is_reported() -> Result<()> {
    let lab = Lab::pair()?;
    let ns = &lab.a().ns;
    foreign::clsact(ns, "eth0")?;
    foreign::filter(ns, "eth0", "egress", 1, foreign::OK)?;
    let injector = Injector::started(&[])?;
    let answer = injector.add(&format!(
        "hidden --netns {} --iface eth0 --to {} --peer-port 7001 --cut",
        ns.name(),
        lab.b().v4
    ))?;
    report(warnings(&answer));
    ensure!(
        warnings(&answer).contains("eth0") && warnings(&answer).contains("pref 1"),
        "a filter with a final verdict runs before ours: {answer}"
    );
    let seen = obstacles(&injector, ns.name())?;
    ensure!(seen.contains("pref 1"), "stats do not say so: {seen}");
    let text = injector.ok(&["stats"])?.stdout;
    ensure!(text.contains("pref 1"), "stats do not say so:\n{text}");
    // It is right: the packets are hidden from us.
    let lost = Path::new(lab.a(), 7000, lab.b(), 7001)?.lost(1..=3)?;
    ensure!(lost.is_empty(), "cut although hidden: {lost:?}");
    // Without it they are not.
    ns.tool("tc filter del dev eth0 egress pref 1")?;
    wait_until("the obstacle is gone from stats", PATIENCE, || {
        Ok(obstacles(&injector, ns.name())?.is_empty())
    })?;
    let lost = Path::new(lab.a(), 7000, lab.b(), 7001)?.lost(1..=3)?;
    ensure!(lost == BTreeSet::from([1, 2, 3]), "lost {lost:?}");
    Ok(())
}

fn a_tcx_program_in_front_of_us_is_reported() -> Result<()> {
    const PASS: i32 = 0;
    let lab = Lab::pair()?;
    let ns = &lab.a().ns;
    let injector = Injector::started(&[])?;
    let add = |name: &str| {
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --peer-port 7001 --cut",
            ns.name(),
            lab.b().v4
        ))
    };
    let answer = add("free")?;
    ensure!(
        !warnings(&answer).to_lowercase().contains("tcx"),
        "warned without a reason: {answer}"
    );
    let Some(program) = TcxProgram::attach(ns, "eth0", true, PASS)? else {
        return Err(Skip {
            reason: "this kernel knows no TCX".to_owned(),
            excusable: true,
        }
        .into());
    };
    wait_until("stats report it", PATIENCE, || {
        Ok(obstacles(&injector, ns.name())?
            .to_lowercase()
            .contains("tcx"))
    })?;
    let lost = Path::new(lab.a(), 7000, lab.b(), 7001)?.lost(1..=3)?;
    ensure!(lost.is_empty(), "cut although hidden: {lost:?}");
    injector.json(&["heal", "free"])?;
    let answer = add("hidden")?;
    report(warnings(&answer));
    ensure!(
        warnings(&answer).to_lowercase().contains("tcx"),
        "a TCX program runs before ours: {answer}"
    );
    drop(program);
    wait_until("the obstacle is gone from stats", PATIENCE, || {
        Ok(obstacles(&injector, ns.name())?.is_empty())
    })?;
    let lost = Path::new(lab.a(), 7000, lab.b(), 7001)?.lost(1..=3)?;
    ensure!(lost == BTreeSet::from([1, 2, 3]), "lost {lost:?}");
    Ok(())
}

/// Ordered pairs of hosts that cannot reach each other.
type Severed = BTreeSet<(usize, usize)>;

/// Which they are, in a lab of three. Those that should not be are looked at for long.
fn severed(lab: &Lab, expected: &Severed) -> Result<Severed> {
    let mut severed = BTreeSet::new();
    for from in 0..3 {
        for to in (0..3).filter(|to| *to != from) {
            let (here, there) = (&lab.nodes[from], &lab.nodes[to]);
            let within = if expected.contains(&(from, to)) {
                Duration::from_millis(150)
            } else {
                Duration::from_secs(5)
            };
            let v4 = lost_without_marker(here, there, false, within)?;
            let v6 = lost_without_marker(here, there, true, within)?;
            ensure!(v4 == v6, "n{from} to n{to}: v4 lost {v4}, v6 lost {v6}");
            if v4 {
                severed.insert((from, to));
            }
        }
    }
    Ok(severed)
}

fn both_ways(pairs: &[(usize, usize)]) -> Severed {
    pairs.iter().flat_map(|&(x, y)| [(x, y), (y, x)]).collect()
}

/// `partition` without `--iface`: on a host in one side, one way and both, and three sides at a switch.
fn a_partition_cuts_where_the_routes_go() -> Result<()> {
    let lab = Lab::switched(3)?;
    let injector = Injector::started(&[])?;
    let nothing = Severed::new();
    ensure!(
        severed(&lab, &nothing)? == nothing,
        "severed without a partition"
    );
    let host = lab.nodes[0].netns();
    let switch = lab.switch()?.name();
    let file = injector.state_dir().join("names");
    let mut names = String::new();
    for (number, node) in lab.nodes.iter().enumerate() {
        writeln!(names, "{} host{number}\n{} host{number}", node.v4, node.v6)?;
    }
    std::fs::write(&file, names)?;
    let file = file.to_string_lossy();
    let side = |node: usize| format!("{},{}", lab.nodes[node].v4, lab.nodes[node].v6);
    let sides = [side(0), side(1), side(2)];
    let [zero, one, two] = sides.each_ref().map(String::as_str);
    let cases: [(&str, &[&str], Severed); 6] = [
        (
            "on a host in one side",
            &["--netns", host, "--side", zero, "--side", one],
            both_ways(&[(0, 1)]),
        ),
        (
            "on a host, one way",
            &["--netns", host, "--side", zero, "--side", one, "--one-way"],
            BTreeSet::from([(0, 1)]),
        ),
        (
            "on a host, the other way",
            &["--netns", host, "--side", one, "--side", zero, "--one-way"],
            BTreeSet::from([(1, 0)]),
        ),
        (
            "at a switch, two sides by name",
            &[
                "--netns",
                switch,
                "--hosts",
                &file,
                "--side",
                "host0",
                "--side",
                "host1,host2",
            ],
            both_ways(&[(0, 1), (0, 2)]),
        ),
        (
            "at a switch, three sides",
            &[
                "--netns", switch, "--side", zero, "--side", one, "--side", two,
            ],
            both_ways(&[(0, 1), (0, 2), (1, 2)]),
        ),
        (
            "at a switch, one way",
            &[
                "--netns",
                switch,
                "--side",
                zero,
                "--side",
                one,
                "--one-way",
            ],
            BTreeSet::from([(0, 1)]),
        ),
    ];
    for (name, arguments, expected) in cases {
        let answer = injector.json(&[&["partition"], arguments].concat())?;
        let found = severed(&lab, &expected)?;
        ensure!(
            found == expected,
            "{name}: severed {found:?}, asked {expected:?}: {answer}"
        );
        let group = answer["group"].as_str().unwrap_or_default();
        injector.json(&["heal", group])?;
        ensure!(
            severed(&lab, &nothing)? == nothing,
            "{name}: healed, and severed"
        );
    }
    Ok(())
}

/// Whether a datagram is lost on a way of which nothing else is known: what lies behind it was sent
/// several times and is waited for a while.
fn lost_without_marker(from: &Node, to: &Node, v6: bool, within: Duration) -> Result<bool> {
    use tests::lab::udp::{drain, numbered, socket};
    let (source, target) = if v6 {
        (from.at6(7300), to.at6(7301))
    } else {
        (from.at(7300), to.at(7301))
    };
    let receiver = socket(&to.ns, target)?;
    receiver.set_nonblocking(true)?;
    let sender = socket(&from.ns, source)?;
    for number in 0..3 {
        // The first may be dropped while the neighbour is being found.
        sender.send_to(&numbered(number, 0, 16), target)?;
    }
    let arrived = wait_until("a datagram arrives", within, || {
        Ok(!drain(&receiver)?.is_empty())
    });
    Ok(arrived.is_err())
}
