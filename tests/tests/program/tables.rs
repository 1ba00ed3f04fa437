//! The tables: what happens when one is full, that a set which does not fit changes nothing, a million
//! prefixes, and that the cost of a packet does not grow with any of it.

use std::sync::Arc;

use anyhow::{Result, ensure};
use injector::{
    dataplane::{ActiveRule, DataPlane, LinkKind, RuleSlot, Sizes, TargetConfig},
    rules::RuleSpec,
};
use libtest_mimic::{Completion, Failed, Trial};
use serde_json::{Value, json};
use tests::{
    model::Hook,
    subject::{
        Context, Dispatcher, Kernel, Verdict,
        many::{FREE_PORT, Size, peer},
        meter::{Meter, PASSED, TARGET, frame},
    },
};

type Case = fn() -> Result<()>;

pub(crate) fn trials() -> Vec<Trial> {
    let cases: [(&'static str, Case); 7] = [
        ("tables::flows_are_full", flows_are_full),
        ("tables::states_are_full", states_are_full),
        ("tables::connections_are_full", connections_are_full),
        (
            "tables::what_does_not_fit_changes_nothing",
            what_does_not_fit,
        ),
        (
            "tables::at_most_16_rules_for_one_packet",
            too_many_for_one_packet,
        ),
        ("tables::a_million_prefixes", a_million_prefixes),
        (
            "cost::known_flows_cost_the_same_with_many_rules",
            known_flows_cost_the_same,
        ),
    ];
    cases
        .into_iter()
        .map(|(name, case)| {
            Trial::ignorable_test(name, move || {
                if let Some(reason) = Kernel::missing() {
                    return Ok(Completion::ignored_with(reason));
                }
                case().map_err(|error| Failed::from(format!("{error:#}")))?;
                Ok(Completion::Completed)
            })
        })
        .collect()
}

/// A data plane of its own with tables of these sizes.
struct Subject {
    plane: DataPlane,
    dispatcher: Dispatcher,
}

impl Subject {
    fn load(sizes: &Sizes) -> Result<Self> {
        let plane = DataPlane::load(sizes)?;
        plane.lease().renew(u64::MAX);
        let dispatcher = Dispatcher::new(&plane)?;
        Ok(Self { plane, dispatcher })
    }

    /// Puts rules in force at the target of test runs.
    fn commit(&mut self, rules: &[Value]) -> Result<()> {
        let now = DataPlane::monotonic_ns();
        let rules = (0..)
            .zip(rules)
            .map(|(slot, rule)| {
                let spec: RuleSpec = serde_json::from_value(rule.clone())?;
                Ok(ActiveRule {
                    slot: RuleSlot(slot),
                    activation: 1 + u32::from(slot),
                    activated_ns: now,
                    targets: vec![TARGET],
                    rule: Arc::new(spec.parse()?),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let target = TargetConfig {
            slot: TARGET,
            link: LinkKind::Ethernet,
            loopback: false,
            ifindex: 0,
            lane: None,
        };
        self.plane.commit(&[target], &rules, &[])?;
        Ok(())
    }

    fn is_cut(&self, frame: &[u8]) -> Result<bool> {
        let verdict = self
            .dispatcher
            .run(Hook::Egress, Context::default(), frame)?;
        Ok(verdict == Verdict::Cut)
    }

    /// How many of so many flows to a port lose their packet.
    fn cut_of(&self, flows: u16, port: u16) -> Result<u16> {
        let mut cut = 0;
        for flow in 0..flows {
            cut += u16::from(self.is_cut(&frame(peer(0), port, 1000 + flow))?);
        }
        Ok(cut)
    }
}

const SMALL: Sizes = Sizes {
    flows: 64,
    states: 64,
    idle_flows: 4096,
    prefixes: 64,
    bitmaps: 64,
    targets: 4,
    fragments: 4096,
};
const FLOWS: u16 = 400;

fn rule(name: &str, selector: &Value, fault: &Value) -> Value {
    let mut rule = json!({
        "name": name,
        "iface": ["eth0"],
        "direction": "egress",
        "proto": ["udp"],
        "seed": 1,
        "fault": fault,
    });
    if let (Some(rule), Some(selector)) = (rule.as_object_mut(), selector.as_object()) {
        rule.extend(selector.clone());
    }
    rule
}

fn flows_are_full() -> Result<()> {
    let mut subject = Subject::load(&Sizes {
        states: 4096,
        ..SMALL
    })?;
    subject.commit(&[rule(
        "third",
        &json!({"peer_port": ["7000"]}),
        &json!({"drop_nth": 3}),
    )])?;
    // Decided as ever, packet by packet.
    for (nth, expected) in [(1, 0), (2, 0), (3, FLOWS), (4, 0)] {
        let cut = subject.cut_of(FLOWS, 7000)?;
        ensure!(
            cut == expected,
            "packet {nth}: {cut} of {FLOWS} flows lost it"
        );
    }
    let [egress, _] = subject.plane.target_counters(TARGET)?;
    ensure!(
        egress.table_full > 0 && egress.errors == 0,
        "not counted: {egress:?}"
    );
    Ok(())
}

fn states_are_full() -> Result<()> {
    let mut subject = Subject::load(&Sizes {
        flows: 4096,
        ..SMALL
    })?;
    subject.commit(&[
        rule(
            "first",
            &json!({"peer_port": ["7000"]}),
            &json!({"drop_first": 1}),
        ),
        rule(
            "cut",
            &json!({"peer_port": ["7001"]}),
            &json!({"cut": true}),
        ),
    ])?;
    // A position that cannot be known is not hit; a cut needs none.
    let cut = subject.cut_of(FLOWS, 7000)?;
    let [first, _] = subject.plane.rule_counters(RuleSlot(0))?;
    ensure!(
        cut < FLOWS && first.stateless_packets == u64::from(FLOWS - cut),
        "{cut} of {FLOWS} flows lost their first packet: {first:?}"
    );
    ensure!(
        u64::from(cut) == first.cut_packets && cut >= 32,
        "{first:?}"
    );
    let cut = subject.cut_of(FLOWS, 7001)?;
    let [all, _] = subject.plane.rule_counters(RuleSlot(1))?;
    ensure!(
        cut == FLOWS && all.cut_packets == u64::from(FLOWS) && all.stateless_packets > 0,
        "{cut} of {FLOWS} flows were cut: {all:?}"
    );
    let [egress, _] = subject.plane.target_counters(TARGET)?;
    ensure!(
        egress.table_full == first.stateless_packets + all.stateless_packets,
        "not counted: {egress:?}"
    );
    Ok(())
}

fn connections_are_full() -> Result<()> {
    let mut subject = Subject::load(&Sizes {
        states: 4096,
        ..SMALL
    })?;
    subject.commit(&[rule(
        "new",
        &json!({"peer_port": ["7000"], "state": "new"}),
        &json!({"cut": true}),
    )])?;
    // One that there is no room for counts as established.
    let cut = subject.cut_of(FLOWS, 7000)?;
    ensure!(
        (32..FLOWS).contains(&cut),
        "{cut} of {FLOWS} connections count as new, and the table holds {}",
        SMALL.flows
    );
    let [egress, _] = subject.plane.target_counters(TARGET)?;
    ensure!(egress.table_full > 0, "not counted: {egress:?}");
    Ok(())
}

fn what_does_not_fit() -> Result<()> {
    let mut subject = Subject::load(&SMALL)?;
    let good = rule(
        "good",
        &json!({"peer_port": ["7000"]}),
        &json!({"cut": true}),
    );
    subject.commit(std::slice::from_ref(&good))?;
    let prefixes: Vec<String> = (0..200).map(|index| peer(index).to_string()).collect();
    let wide = rule("wide", &json!({"peer": prefixes}), &json!({"cut": true}));
    let ports: Vec<Value> = (0..100)
        .map(|index| {
            let port = (8000 + index).to_string();
            rule(
                &format!("port-{index}"),
                &json!({"peer_port": [port]}),
                &json!({"cut": true}),
            )
        })
        .collect();
    for (what, rules, said) in [
        ("200 prefixes", vec![good.clone(), wide], "--table-prefixes"),
        (
            "100 sets of ports",
            [vec![good.clone()], ports].concat(),
            "--table-bitmaps",
        ),
    ] {
        let error = subject
            .commit(&rules)
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        ensure!(error.contains(said), "{what} in tables of 64: {error:?}");
        let fates = (subject.cut_of(1, 7000)?, subject.cut_of(1, 8000)?);
        ensure!(
            fates == (1, 0),
            "{what} were refused, and fates are {fates:?}"
        );
    }
    // And the next set that fits is taken.
    subject.commit(&[rule(
        "next",
        &json!({"peer_port": ["8000"]}),
        &json!({"cut": true}),
    )])?;
    let fates = (subject.cut_of(1, 7000)?, subject.cut_of(1, 8000)?);
    ensure!(fates == (0, 1), "after two refusals: {fates:?}");
    Ok(())
}

fn too_many_for_one_packet() -> Result<()> {
    let mut subject = Subject::load(&SMALL)?;
    let alike = |count: u32| -> Vec<Value> {
        (0..count)
            .map(|index| {
                rule(
                    &format!("alike-{index}"),
                    &json!({"peer_port": ["7000"]}),
                    &json!({"drop_nth": index + 1}),
                )
            })
            .collect()
    };
    subject.commit(&alike(16))?;
    let error = subject
        .commit(&alike(17))
        .err()
        .map(|error| error.to_string());
    ensure!(
        error
            .as_ref()
            .is_some_and(|text| text.contains("at most 16")),
        "17 rules for one packet: {error:?}"
    );
    // All sixteen act: each takes a packet of its own.
    let packet = frame(peer(0), 7000, 1);
    for n in 1..=17 {
        let cut = subject.is_cut(&packet)?;
        ensure!(cut == (n <= 16), "packet {n}: cut is {cut}");
    }
    Ok(())
}

fn a_million_prefixes() -> Result<()> {
    const PREFIXES: usize = 1_000_000;
    const RULES: usize = 1024;
    let plane = DataPlane::load(&Sizes::default())?;
    let dispatcher = Dispatcher::new(&plane)?;
    let mut subject = Subject { plane, dispatcher };
    subject.plane.lease().renew(u64::MAX);
    let size = Size {
        peers: PREFIXES,
        rules: RULES,
    };
    let target = TargetConfig {
        slot: TARGET,
        link: LinkKind::Ethernet,
        loopback: false,
        ifindex: 0,
        lane: None,
    };
    let commit = subject
        .plane
        .commit(&[target], &size.rules(TARGET, 1)?, &[])?;
    ensure!(
        commit.prefixes_changed >= PREFIXES,
        "{commit:?} of {PREFIXES} prefixes"
    );
    // A peer belongs to one rule, and that rule is about one port; its neighbour belongs to none.
    for sample in (0..2000).map(|sample| sample * 499).chain([PREFIXES - 1]) {
        let port = size.port_of(sample)?;
        for (to, port, expected) in [
            (peer(sample), port, true),
            (peer(sample), port ^ 1, false),
            (
                std::net::Ipv4Addr::from(u32::from(peer(sample)) + 1),
                port,
                false,
            ),
        ] {
            let cut = subject.is_cut(&frame(to, port, 1))?;
            ensure!(
                cut == expected,
                "peer {sample}: {to} port {port} is cut: {cut}; {commit:?}"
            );
        }
    }
    Ok(())
}

/// A known flow costs the same with 65,000 peers in 1,000 rules as with one of each. Measured in turns, the
/// best of each: noise only ever adds. A look-up that went through the rules one by one would be slower by a
/// factor of a hundred.
fn known_flows_cost_the_same() -> Result<()> {
    const PASSES: usize = 8;
    let mut meter = Meter::new(DataPlane::load(&Sizes::default())?);
    let packet = frame(peer(0), FREE_PORT, 1);
    let sizes = [
        Size { peers: 1, rules: 1 },
        Size {
            peers: 65_000,
            rules: 1000,
        },
    ];
    let mut best = [f64::INFINITY; 2];
    for _ in 0..PASSES {
        for (size, best) in sizes.iter().zip(&mut best) {
            meter.commit(*size, TARGET)?;
            let cost = meter.repeated(&packet, PASSED)?;
            *best = best.min(cost.empty + cost.over);
        }
    }
    let [one, many] = best;
    ensure!(
        many < 1.5 * one,
        "a packet takes {many:.0} ns with 65,000 peers and 1,000 rules, {one:.0} ns with one of each"
    );
    Ok(())
}
