//! Faults together, in one rule and in several on one interface: each packet meets exactly what each of them draws
//! for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::{
    lab::{
        injector::RuleCounters,
        lent::Lent,
        timed::{Timed, delays},
        topology::{Lab, Node},
        transcript::report,
        trial::{Need, trial},
    },
    model::line::Stream,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial("compose::faults_in_one_rule", NEEDS, faults_in_one_rule),
        trial("compose::several_rules", NEEDS, several_rules),
    ]
}

const SEED: u64 = 77;
/// Sent one by one, then as many again in super-packets.
const SINGLE: u32 = 250;
const SEGMENTS: u32 = 25;

/// One rule: its faults as they are written, and as the model takes them.
struct Rule {
    name: &'static str,
    faults: &'static str,
    loss: f64,
    duplicate: f64,
    copies: usize,
    delay_ms: f64,
    reorder: f64,
    hold_ms: f64,
}

/// The way that packets go, seen from the target.
#[derive(Clone, Copy)]
struct Way {
    egress: bool,
    v6: bool,
}

fn faults_in_one_rule() -> Result<()> {
    const ALL: Rule = Rule {
        name: "all",
        faults: "--delay 20ms --loss 10% --duplicate 15% --copies 2 --reorder 8% --hold 300ms",
        loss: 0.1,
        duplicate: 0.15,
        copies: 2,
        delay_ms: 20.0,
        reorder: 0.08,
        hold_ms: 300.0,
    };
    for (egress, v6) in [(true, false), (false, true)] {
        must_compose(&[ALL], Way { egress, v6 })?;
    }
    Ok(())
}

/// Several duplicate, which netem refuses on some kernels (`check_netem_in_tree`, `net/sched/sch_netem.c`): its copies
/// enter again at the root.
fn several_rules() -> Result<()> {
    const RULES: [Rule; 3] = [
        Rule {
            name: "one",
            faults: "--loss 5% --duplicate 10% --delay 10ms",
            loss: 0.05,
            duplicate: 0.1,
            copies: 1,
            delay_ms: 10.0,
            reorder: 0.0,
            hold_ms: 0.0,
        },
        Rule {
            name: "two",
            faults: "--loss 10% --duplicate 20% --copies 2",
            loss: 0.1,
            duplicate: 0.2,
            copies: 2,
            delay_ms: 0.0,
            reorder: 0.0,
            hold_ms: 0.0,
        },
        Rule {
            name: "three",
            faults: "--reorder 10% --hold 300ms --delay 20ms",
            loss: 0.0,
            duplicate: 0.0,
            copies: 0,
            delay_ms: 20.0,
            reorder: 0.1,
            hold_ms: 300.0,
        },
    ];
    for (egress, v6) in [(true, true), (false, false)] {
        must_compose(&RULES, Way { egress, v6 })?;
    }
    netem_beside()
}

/// Whether netem takes two of itself that duplicate.
fn netem_beside() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let ns = &lab.a().ns;
    ns.tool("tc qdisc add dev eth0 root handle 1: netem duplicate 10%")?;
    let second = ns.try_tool("tc qdisc add dev eth0 parent 1: handle 2: netem duplicate 20%")?;
    report(match second.code() {
        Some(0) => "netem: takes two that duplicate".to_owned(),
        _ => format!(
            "netem: refuses a second one that duplicates: {}",
            second.stderr.trim()
        ),
    });
    Ok(())
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fate {
    /// How often it arrives.
    arrives: usize,
    /// Whether the original is held back, and its copies are not.
    held: bool,
}

fn fate(rules: &[(&Rule, Stream)], n: u64) -> Option<Fate> {
    if rules
        .iter()
        .any(|(rule, stream)| stream.loses(n, rule.loss))
    {
        return None;
    }
    let copies: usize = rules
        .iter()
        .filter(|(rule, stream)| stream.duplicates(n, rule.duplicate))
        .map(|(rule, _)| rule.copies)
        .sum();
    Some(Fate {
        arrives: 1 + copies,
        held: rules
            .iter()
            .any(|(rule, stream)| stream.holds_back(n, rule.reorder)),
    })
}

fn must_compose(rules: &[Rule], way: Way) -> Result<()> {
    const COUNT: u32 = 2 * SINGLE;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for rule in rules {
        let direction = if way.egress { "egress" } else { "ingress" };
        injector.add(&format!(
            "{} --netns {} --iface eth0 --direction {direction} --proto udp --dst-port 7000 {} --seed {SEED}",
            rule.name,
            a.netns(),
            rule.faults
        ))?;
    }
    let path = path(a, b, way)?;
    let rules: Vec<(&Rule, Stream)> = rules
        .iter()
        .map(|rule| {
            let stream = Stream::of_udp(SEED, rule.name, path.ends, way.egress);
            (rule, stream)
        })
        .collect();
    let fates: BTreeMap<u32, Fate> = (1..=COUNT)
        .filter_map(|n| Some((n, fate(&rules, n.into())?)))
        .collect();
    let sent = path.send(1..=SINGLE, Duration::from_micros(500))?;
    path.send_super_packets(SINGLE + 1..=COUNT, SEGMENTS as usize, 1000)?;
    let arrived = path.receive(
        fates.values().map(|fate| fate.arrives).sum(),
        Duration::from_millis(50),
        Duration::from_secs(20),
    )?;
    let mut times: BTreeMap<u32, usize> = BTreeMap::new();
    for one in &arrived {
        *times.entry(one.number).or_default() += 1;
    }
    for n in 1..=COUNT {
        let (found, drawn) = (times.get(&n), fates.get(&n).map(|fate| fate.arrives));
        ensure!(
            found == drawn.as_ref(),
            "packet {n} arrived {found:?} times, drawn {:?}",
            fates.get(&n)
        );
    }
    let least: f64 = rules.iter().map(|(rule, _)| rule.delay_ms).sum();
    let longer: f64 = rules.iter().map(|(rule, _)| rule.hold_ms).sum();
    let single: Vec<_> = arrived
        .iter()
        .filter(|one| one.number <= SINGLE)
        .copied()
        .collect();
    let taken = delays(&sent, &single);
    ensure!(
        taken.iter().all(|delay| *delay >= least),
        "delays do not add up to {least} ms: {taken:?}"
    );
    // As many copies of a packet came so late as were held back: the original, or none.
    let mut late: BTreeMap<u32, usize> = BTreeMap::new();
    for (one, delay) in single.iter().zip(&taken) {
        if *delay >= least + longer {
            *late.entry(one.number).or_default() += 1;
        }
    }
    let held: BTreeSet<u32> = fates
        .iter()
        .filter(|(n, fate)| **n <= SINGLE && fate.held)
        .map(|(n, _)| *n)
        .collect();
    ensure!(
        late.keys().eq(&held) && late.values().all(|count| *count == 1),
        "held back {late:?}, drawn {held:?}"
    );
    let stats = injector.stats()?;
    for (rule, stream) in &rules {
        let found = stats.rule(rule.name)?;
        let count = |drawn: &dyn Fn(u64) -> bool| {
            (1..=u64::from(COUNT)).filter(|n| drawn(*n)).count() as u64
        };
        let both = |of: fn(&RuleCounters) -> u64| of(&found.egress) + of(&found.ingress);
        // Every rule counts and decides for itself, whatever the others do; but what is lost is not held back.
        ensure!(
            both(|one| one.matched_packets) == u64::from(COUNT)
                && both(|one| one.lost_packets) == count(&|n| stream.loses(n, rule.loss))
                && both(|one| one.copies)
                    == count(&|n| stream.duplicates(n, rule.duplicate)) * rule.copies as u64
                && both(|one| one.reordered_packets)
                    <= count(&|n| stream.holds_back(n, rule.reorder)),
            "{found:?}"
        );
    }
    report(format!(
        "egress {}, IPv6 {}: of {COUNT} {} lost, {} arrived, {} of {SINGLE} held back, as drawn",
        way.egress,
        way.v6,
        COUNT as usize - fates.len(),
        arrived.len(),
        held.len()
    ));
    stats.lanes_lost_nothing()
}

fn path(a: &Node, b: &Node, way: Way) -> Result<Timed> {
    let (from, to) = if way.egress { (a, b) } else { (b, a) };
    if way.v6 {
        Timed::v6(from, 6000, to, 7000)
    } else {
        Timed::v4(from, 6000, to, 7000)
    }
}
