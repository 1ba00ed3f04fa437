//! Undoing: whatever ends the injector, the host is as it was, compared as text; what others put there
//! stays.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::lab::{
    foreign,
    injector::{Injector, Mode},
    netns::Netns,
    snapshot::Snapshot,
    topology::Lab,
    trial::{Need, trial},
    udp::Path,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial("undo::heal_all", NEEDS, || every_host(Ending::HealAll)),
        trial("undo::heal_by_name", NEEDS, || {
            every_host(Ending::HealByName)
        }),
        trial("undo::down", NEEDS, || every_host(Ending::Down)),
        trial("undo::sigterm", NEEDS, || every_host(Ending::Terminate)),
        trial("undo::kill_and_next_start", NEEDS, || {
            every_host(Ending::KillAndStart)
        }),
        trial("undo::kill_and_heal_all_without_a_daemon", NEEDS, || {
            every_host(Ending::KillAndHealAll)
        }),
        trial(
            "undo::what_came_after_us_stays",
            NEEDS,
            what_came_after_us_stays,
        ),
        trial(
            "undo::a_lab_is_gone_when_it_is_down",
            NEEDS,
            a_lab_is_gone_when_it_is_down,
        ),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    HealAll,
    HealByName,
    Down,
    Terminate,
    KillAndStart,
    KillAndHealAll,
}

/// Makes a host what it is before the injector comes.
type Prepare = fn(&Netns) -> Result<()>;

/// What a host has before the injector comes.
const HOSTS: [(&str, Prepare); 5] = [
    ("a plain host", |_| Ok(())),
    ("an empty clsact", |ns| foreign::clsact(ns, "eth0")),
    ("a clsact with filters", |ns| {
        foreign::clsact(ns, "eth0")?;
        foreign::filter(ns, "eth0", "egress", 1, foreign::UNSPEC)?;
        foreign::filter(ns, "eth0", "egress", 49152, foreign::UNSPEC)?;
        foreign::filter(ns, "eth0", "ingress", 3, foreign::UNSPEC)
    }),
    ("a shaper with classes and filters", |ns| {
        ns.tool("tc qdisc add dev eth0 root handle 1: htb default 1")?;
        ns.tool("tc class add dev eth0 parent 1: classid 1:1 htb rate 10gbit")?;
        ns.tool(
            "tc filter add dev eth0 parent 1: protocol ip prio 3 u32 match ip dport 80 0xffff classid 1:1",
        )
        .map(drop)
    }),
    ("odd settings", |ns| {
        ns.tool("ip link set eth0 mtu 1400 txqueuelen 77")?;
        ns.tool("ip route add 203.0.113.0/24 dev eth0")?;
        ns.sysctl("net/ipv4/conf/eth0/accept_local", "1")?;
        ns.sysctl("net/ipv4/ip_forward", "1")
    }),
];

fn rules(lab: &Lab) -> Vec<Value> {
    let rule = |name: &str, node: usize, iface: &str, fault: Value| {
        json!({
            "name": name,
            "netns": lab.nodes[node].netns(),
            "iface": [iface],
            "dst_port": ["7500-7509"],
            "proto": ["udp"],
            "fault": fault,
        })
    };
    vec![
        rule("one", 0, "eth0", json!({"cut": true})),
        rule("two", 0, "eth0", json!({"drop_nth": 3})),
        rule("three", 1, "eth0", json!({"cut": true})),
        rule("four", 1, "lo", json!({"cut": true})),
    ]
}

fn every_host(ending: Ending) -> Result<()> {
    for (name, prepare) in HOSTS {
        one_host(ending, prepare).with_context(|| format!("{ending:?} on {name}"))?;
    }
    Ok(())
}

fn one_host(ending: Ending, prepare: Prepare) -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    prepare(&a.ns)?;
    let mut path = Path::new(a, 7000, b, 7500)?;
    path.lost([1])?;
    let look = || -> Result<[Snapshot; 2]> { Ok([Snapshot::of(&a.ns)?, Snapshot::of(&b.ns)?]) };
    let before = look()?;

    let mut injector = Injector::started(&[])?;
    unchanged(&before, &look()?).context("a daemon without rules")?;
    injector.apply(&rules(&lab), Mode::Replace)?;
    ensure!(path.lost([2])?.len() == 1, "the cut does not cut");
    let during = look()?;
    for (part, before) in [
        ("links", &before[0]),
        ("routes", &before[0]),
        ("sysctls", &before[0]),
    ] {
        ensure!(
            before.part(part) == during[0].part(part),
            "attaching changed the host's {part}"
        );
    }
    ensure!(
        during[0].part("filters").contains("injector:egress"),
        "no filter of ours is there: {}",
        during[0].part("filters")
    );
    match ending {
        Ending::HealAll => {
            let answer = injector.heal_all()?;
            ensure!(
                answer["host_restored"] == json!(true),
                "heal --all says: {answer}"
            );
        }
        Ending::HealByName => {
            injector.json(&["heal", "one", "two"])?;
            injector.json(&["heal", "three"])?;
            injector.json(&["heal", "four"])?;
        }
        Ending::Down => {
            injector.json(&["down"])?;
            let code = injector.await_daemon_end(Duration::from_secs(10))?;
            ensure!(code == Some(0), "the daemon left with {code:?}");
        }
        Ending::Terminate => {
            injector.signal(Signal::SIGTERM)?;
            let code = injector.await_daemon_end(Duration::from_secs(10))?;
            ensure!(code == Some(0), "the daemon left with {code:?}");
        }
        Ending::KillAndStart => {
            injector.kill_daemon()?;
            injector.start_daemon(&[])?;
        }
        Ending::KillAndHealAll => {
            injector.kill_daemon()?;
            injector.ok(&["heal", "--all"])?;
        }
    }
    unchanged(&before, &look()?)?;
    let lost = path.lost([3])?;
    ensure!(lost.is_empty(), "traffic is not healthy again");
    Ok(())
}

fn unchanged(before: &[Snapshot; 2], after: &[Snapshot; 2]) -> Result<()> {
    before[0].must_equal(&after[0]).context("host a")?;
    before[1].must_equal(&after[1]).context("host b")
}

/// Somebody uses the clsact that we made: it stays, with their filter and without ours.
fn what_came_after_us_stays() -> Result<()> {
    for ending in [Ending::HealAll, Ending::Down, Ending::KillAndStart] {
        let lab = Lab::pair()?;
        let ns = &lab.a().ns;
        let mut injector = Injector::started(&[])?;
        injector.apply(&rules(&lab), Mode::Replace)?;
        foreign::filter(ns, "eth0", "egress", 77, foreign::UNSPEC)?;
        match ending {
            Ending::HealAll => drop(injector.heal_all()?),
            Ending::Down => drop(injector.json(&["down"])?),
            _ => {
                injector.kill_daemon()?;
                injector.start_daemon(&[])?;
            }
        }
        let after = Snapshot::of(ns)?;
        let filters = after.part("filters");
        ensure!(
            filters.contains("pref 77") && !filters.contains("injector"),
            "{ending:?}: {filters}"
        );
        ensure!(
            after.part("qdiscs").contains("clsact"),
            "{ending:?}: the clsact that they use is gone"
        );
    }
    Ok(())
}

fn a_lab_is_gone_when_it_is_down() -> Result<()> {
    let injector = Injector::new()?;
    let name = format!("t{}", std::process::id());
    let namespaces = || -> Result<Vec<String>> {
        Ok(std::fs::read_dir("/run/netns")?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|space| space.contains(&name))
            .collect())
    };
    injector.ok(&["lab", "up", "--nodes", "3", "--name", &name])?;
    // Whatever happens, it goes.
    let down = Down(&injector, &name);
    let there = namespaces()?;
    ensure!(there.len() == 4, "three hosts and a switch: {there:?}");
    for (from, to) in [("n1", "10.77.0.3"), ("n2", "fd77::1")] {
        injector.ok(&[
            "lab", "exec", "--name", &name, from, "--", "ping", "-c", "1", "-W", "2", to,
        ])?;
    }
    let code = injector
        .run(&[
            "lab", "exec", "--name", &name, "n1", "--", "sh", "-c", "exit 7",
        ])?
        .code();
    ensure!(code == Some(7), "lab exec returned {code:?}");
    injector.json(&["lab", "status", "--name", &name])?;
    drop(down);
    let left = namespaces()?;
    ensure!(left.is_empty(), "lab down left {left:?}");
    Ok(())
}

struct Down<'a>(&'a Injector, &'a str);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        // What it left is what the test looks at next.
        let _output = self.0.run(&["lab", "down", "--name", self.1]);
    }
}
