//! Positional cuts: the n-th packet and only it, the first n, every n-th, patterns, one shot; and what
//! they take along where packets travel in super-packets.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tests::lab::{
    injector::{Injector, Mode},
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
    udp::Path,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "positions::exactly_the_asked_packets_go_missing",
            NEEDS,
            exactly_the_asked_packets_go_missing,
        ),
        trial(
            "positions::one_shot_hits_once_in_all",
            NEEDS,
            one_shot_hits_once_in_all,
        ),
        trial(
            "positions::an_unchanged_rule_keeps_counting",
            NEEDS,
            an_unchanged_rule_keeps_counting,
        ),
        trial(
            "positions::a_super_packet_goes_whole_and_is_accounted_for",
            NEEDS,
            a_super_packet_goes_whole_and_is_accounted_for,
        ),
    ]
}

const COUNT: u32 = 60;

/// Which of so many packets a fault takes.
type Asked = fn(u32) -> bool;

const FAULTS: [(&str, &str, Asked); 9] = [
    ("nth-7", r#"{"drop_nth": 7}"#, |n| n == 7),
    ("nth-1", r#"{"drop_nth": 1}"#, |n| n == 1),
    ("first-3", r#"{"drop_first": 3}"#, |n| n <= 3),
    ("every-10", r#"{"drop_every": 10}"#, |n| n % 10 == 0),
    ("every-1", r#"{"drop_every": 1}"#, |_| true),
    ("pattern-0010", r#"{"drop_pattern": "0010"}"#, |n| {
        n % 4 == 3
    }),
    ("pattern-10011", r#"{"drop_pattern": "10011"}"#, |n| {
        matches!(n % 5, 1 | 4 | 0)
    }),
    (
        "pattern-once",
        r#"{"drop_pattern": "01101", "once": true}"#,
        |n| matches!(n, 2 | 3 | 5),
    ),
    ("cut", r#"{"cut": true}"#, |_| true),
];

fn exactly_the_asked_packets_go_missing() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    // Every fault at its own port, at egress of one host (even ports) and ingress of the other (odd).
    let mut rules = Vec::new();
    for (index, (name, fault, _)) in (0_u16..).zip(FAULTS) {
        let fault: Value = serde_json::from_str(fault)?;
        for (hook, host, port) in [("egress", a, 7100), ("ingress", b, 7101)] {
            rules.push(json!({
                "name": format!("{name}-{hook}"),
                "netns": host.netns(),
                "iface": ["eth0"],
                "direction": hook,
                "dst_port": [(port + 2 * index).to_string()],
                "proto": ["udp"],
                "fault": fault,
            }));
        }
    }
    injector.apply(&rules, Mode::Replace)?;
    for (index, (name, _, asked)) in (0_u16..).zip(FAULTS) {
        let expected: BTreeSet<u32> = (1..=COUNT).filter(|n| asked(*n)).collect();
        for (hook, port) in [("egress", 7100), ("ingress", 7101)] {
            let port = port + 2 * index;
            // Two flows, of both IP versions, packet by packet in turn: each counts for itself.
            let mut flows = [Path::new(a, 6000, b, port)?, Path::new6(a, 6000, b, port)?];
            for (flow, path) in flows.iter_mut().enumerate() {
                let first = path.lost(1..=COUNT / 2)?;
                let rest = path.lost(COUNT / 2 + 1..=COUNT)?;
                let lost: BTreeSet<u32> = first.union(&rest).copied().collect();
                ensure!(
                    lost == expected,
                    "{name} at {hook}, flow {flow}: asked {expected:?}, lost {lost:?}"
                );
            }
            let name = format!("{name}-{hook}");
            let stats = injector.stats()?;
            let rule = stats.rule(&name)?;
            let counters = if hook == "egress" {
                rule.egress
            } else {
                rule.ingress
            };
            let cut = 2 * u64::try_from(expected.len())?;
            ensure!(
                counters.matched_packets == 2 * u64::from(COUNT)
                    && counters.cut_packets == cut
                    && counters.excess_packets == 0
                    && counters.flows == 2
                    && counters.stateless_packets == 0,
                "{name}: {counters:?}, expected {cut} cut of {}",
                2 * COUNT
            );
        }
    }
    Ok(())
}

fn one_shot_hits_once_in_all() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    injector.apply(
        &[json!({
            "name": "once",
            "netns": a.netns(),
            "iface": ["eth0"],
            "peer": [b.v4.to_string()],
            "peer_port": ["7001"],
            "proto": ["udp"],
            "fault": {"drop_once": true},
        })],
        Mode::Replace,
    )?;
    let mut one = Path::new(a, 6001, b, 7001)?;
    let first = one.lost(1..=10)?;
    let again = one.lost(11..=20)?;
    drop(one);
    // Another flow, and the way back.
    let other = Path::new(a, 6002, b, 7001)?.lost(1..=10)?;
    let back = Path::new(b, 7001, a, 6002)?.lost(1..=10)?;
    ensure!(
        first == BTreeSet::from([1]) && again.is_empty() && other.is_empty() && back.is_empty(),
        "lost: {first:?}, {again:?}, {other:?}, {back:?}"
    );
    // A rule that is made anew shoots anew.
    injector.json(&["heal", "once"])?;
    injector.add(&format!(
        "once --netns {} --iface eth0 --peer {} --peer-port 7001 --proto udp --drop-once",
        a.netns(),
        b.v4
    ))?;
    let anew = Path::new(a, 6001, b, 7001)?.lost(1..=10)?;
    ensure!(anew == BTreeSet::from([1]), "made anew: {anew:?}");
    Ok(())
}

fn an_unchanged_rule_keeps_counting() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let rule = |every: u32| {
        json!({
            "name": "steady",
            "netns": a.netns(),
            "iface": ["eth0"],
            "direction": "egress",
            "dst_port": ["7001"],
            "proto": ["udp"],
            "seed": 1,
            "fault": {"drop_every": every},
        })
    };
    let other = json!({
        "name": "other",
        "netns": a.netns(),
        "iface": ["eth0"],
        "dst_port": ["7002"],
        "proto": ["udp"],
        "fault": {"cut": true},
    });
    let mut path = Path::new(a, 6001, b, 7001)?;
    injector.apply(&[rule(5)], Mode::Replace)?;
    let lost = path.lost(1..=3)?;
    ensure!(lost.is_empty(), "lost {lost:?}");
    // A new epoch in which the rule is as it was.
    injector.apply(&[rule(5), other], Mode::Replace)?;
    let lost = path.lost(4..=7)?;
    ensure!(
        lost == BTreeSet::from([5]),
        "the rule lost its place: {lost:?}"
    );
    // One in which it is not.
    injector.apply(&[rule(4)], Mode::Replace)?;
    let lost = path.lost(8..=16)?;
    ensure!(
        lost == BTreeSet::from([11, 15]),
        "a changed rule counts from its change: {lost:?}"
    );
    let stats = injector.stats()?;
    ensure!(
        stats.rule("steady")?.egress.matched_packets == 9,
        "a changed rule's counters start again: {stats:?}"
    );
    Ok(())
}

fn a_super_packet_goes_whole_and_is_accounted_for() -> Result<()> {
    const SEGMENTS: u32 = 10;
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    injector.add(&format!(
        "burst --netns {} --iface eth0 --to {} --peer-port 7001 --proto udp --drop-nth 15",
        a.netns(),
        b.v4
    ))?;
    let mut path = Path::new(a, 6001, b, 7001)?;
    let lost = path.lost_of_super_packets(1..=40, SEGMENTS as usize, 200)?;
    ensure!(
        lost == (11..=20).collect(),
        "the super-packet around the 15th: {lost:?}"
    );
    let stats = injector.stats()?;
    let rule = stats.rule("burst")?.egress;
    report(format!("{rule:?}"));
    ensure!(
        rule.matched_packets == 40 && rule.cut_packets == 1 && rule.excess_packets == 9,
        "one wire packet was asked for and nine went along, counted: {rule:?}"
    );
    let target = stats.target(a.netns(), "eth0")?.egress;
    ensure!(
        target.cut_packets == 10,
        "ten wire packets are gone, counted: {target:?}"
    );
    // What the user sees says so.
    for command in [&["stats"][..], &["show", "burst"]] {
        let text = injector.ok(command)?.stdout;
        ensure!(
            text.to_lowercase().contains("excess") && text.contains('9'),
            "{command:?} does not show the excess:\n{text}"
        );
    }
    // The numbers go on behind it, packet by packet.
    injector.json(&["heal", "burst"])?;
    injector.add(&format!(
        "next --netns {} --iface eth0 --to {} --peer-port 7001 --proto udp --drop-nth 22",
        a.netns(),
        b.v4
    ))?;
    let lost = path.lost_of_super_packets(1..=20, SEGMENTS as usize, 200)?;
    ensure!(lost.is_empty(), "lost {lost:?}");
    let lost = path.lost(21..=30)?;
    ensure!(
        lost == BTreeSet::from([22]),
        "two super-packets are twenty positions: {lost:?}"
    );
    let first = stats.rules.first().context("no rule in stats")?;
    ensure!(first.name == "burst", "stats name {first:?}");
    Ok(())
}
