//! Loss and duplication by chance: of single wire packets, and exactly of those that the seed draws, whether they
//! were sent one by one or in super-packets.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::{
    lab::{
        lent::Lent,
        timed::{Timed, delays},
        topology::Lab,
        transcript::report,
        trial::{Need, trial},
    },
    model::line::Stream,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "chance::exactly_the_drawn_packets_are_lost",
            NEEDS,
            exactly_the_drawn_packets_are_lost,
        ),
        trial(
            "chance::exactly_the_drawn_packets_are_duplicated",
            NEEDS,
            exactly_the_drawn_packets_are_duplicated,
        ),
        trial(
            "chance::positions_count_wire_packets",
            NEEDS,
            positions_count_wire_packets,
        ),
        trial("chance::rules_compose", NEEDS, rules_compose),
    ]
}

const COUNT: u32 = 600;
const SEED: u64 = 99;

/// Which of the numbers up to a count a model takes.
type Model = fn(&Stream, u64) -> Vec<u64>;

const MODELS: [(&str, Model); 3] = [
    ("10%", |stream, count| {
        (1..=count).filter(|n| stream.loses(*n, 0.1)).collect()
    }),
    ("gemodel:5%,25%,90%,1%", |stream, count| {
        stream.gilbert_elliott(count, [0.05, 0.25, 0.9, 0.01])
    }),
    ("state:4%,30%,20%,60%,2%", |stream, count| {
        stream.four_states(count, [0.04, 0.3, 0.2, 0.6, 0.02])
    }),
];

fn exactly_the_drawn_packets_are_lost() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (model, taken) in MODELS {
        for egress in [true, false] {
            for v6 in [false, true] {
                let direction = if egress { "--to" } else { "--from" };
                let peer = if v6 {
                    b.v6.to_string()
                } else {
                    b.v4.to_string()
                };
                injector.add(&format!(
                    "lossy --netns {} --iface eth0 {direction} {peer} --proto udp --loss {model} --seed {SEED}",
                    a.netns()
                ))?;
                let (from, to) = if egress { (a, b) } else { (b, a) };
                let path = if v6 {
                    Timed::v6(from, 6000, to, 7000)?
                } else {
                    Timed::v4(from, 6000, to, 7000)?
                };
                let stream = Stream::of_udp(SEED, "lossy", path.ends, egress);
                let lost: BTreeSet<u32> = taken(&stream, COUNT.into())
                    .into_iter()
                    .map(u32::try_from)
                    .collect::<Result<_, _>>()?;
                let expected: Vec<u32> = (1..=COUNT)
                    .filter(|number| !lost.contains(number))
                    .collect();
                // Half of them one by one, the others as super-packets of forty.
                path.send(1..=COUNT / 2, Duration::from_micros(50))?;
                path.send_super_packets(COUNT / 2 + 1..=COUNT, 40, 1000)?;
                let mut arrived: Vec<u32> = path
                    .receive(
                        expected.len(),
                        Duration::from_millis(50),
                        Duration::from_secs(10),
                    )?
                    .iter()
                    .map(|one| one.number)
                    .collect();
                // Order is another test's: between two sends this thread may change its CPU.
                arrived.sort_unstable();
                ensure!(
                    arrived == expected,
                    "{model} {direction} IPv6 {v6}: lost {:?}, drawn {lost:?}",
                    (1..=COUNT)
                        .filter(|number| !arrived.contains(number))
                        .collect::<Vec<_>>()
                );
                let stats = injector.stats()?;
                let rule = stats.rule("lossy")?;
                let (matched, gone) = (
                    rule.both(|one| one.matched_packets),
                    rule.both(|one| one.lost_packets),
                );
                ensure!(
                    matched == u64::from(COUNT) && gone == u64::try_from(lost.len())?,
                    "{rule:?}"
                );
                report(format!(
                    "{model} {direction} IPv6 {v6}: {gone} of {matched} lost, as drawn"
                ));
                stats.lanes_lost_nothing()?;
                injector.heal("lossy")?;
            }
        }
    }
    Ok(())
}

fn exactly_the_drawn_packets_are_duplicated() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (egress, later) in [(true, 0_u32), (false, 0), (true, 400)] {
        let direction = if egress { "--to" } else { "--from" };
        injector.add(&format!(
            "double --netns {} --iface eth0 {direction} {} --proto udp --duplicate 15% --copies 2 --copy-delay \
             {later}ms --seed {SEED}",
            a.netns(),
            b.v4
        ))?;
        let (from, to) = if egress { (a, b) } else { (b, a) };
        let path = Timed::v4(from, 6000, to, 7000)?;
        let stream = Stream::of_udp(SEED, "double", path.ends, egress);
        let doubled: BTreeSet<u32> = (1..=200)
            .filter(|n| stream.duplicates(u64::from(*n), 0.15))
            .collect();
        let sent = path.send(1..=200, Duration::from_micros(500))?;
        let arrived = path.receive(
            200 + 2 * doubled.len(),
            Duration::from_millis(50),
            Duration::from_secs(10),
        )?;
        let mut times: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
        for (one, delay) in arrived.iter().zip(delays(&sent, &arrived)) {
            times.entry(one.number).or_default().push(delay);
        }
        for (number, delays) in &times {
            let expected = if doubled.contains(number) { 3 } else { 1 };
            ensure!(
                delays.len() == expected,
                "packet {number} arrived {} times, not {expected}",
                delays.len()
            );
            ensure!(
                delays[1..].iter().all(|delay| *delay >= f64::from(later))
                    && (later == 0 || delays[0] < f64::from(later)),
                "packet {number}: {delays:?} ms, copies were to leave {later} ms later"
            );
        }
        let stats = injector.stats()?;
        let rule = stats.rule("double")?;
        let copies = rule.both(|one| one.copies);
        ensure!(copies == 2 * u64::try_from(doubled.len())?, "{rule:?}");
        stats.lanes_lost_nothing()?;
        injector.heal("double")?;
    }
    Ok(())
}

/// With a lane, a position inside a super-packet takes that packet and nothing else.
fn positions_count_wire_packets() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (egress, v6) in [(true, false), (false, true)] {
        let direction = if egress { "egress" } else { "ingress" };
        injector.add(&format!(
            "tenth --netns {} --iface eth0 --direction {direction} --proto udp --dst-port 7000 --drop-every 10",
            a.netns()
        ))?;
        let (from, to) = if egress { (a, b) } else { (b, a) };
        let path = if v6 {
            Timed::v6(from, 6000, to, 7000)?
        } else {
            Timed::v4(from, 6000, to, 7000)?
        };
        path.send(1..=25, Duration::ZERO)?;
        path.send_super_packets(26..=225, 40, 1000)?;
        path.send(226..=250, Duration::ZERO)?;
        let arrived: Vec<u32> = path
            .receive(225, Duration::from_millis(50), Duration::from_secs(10))?
            .iter()
            .map(|one| one.number)
            .collect();
        let expected: Vec<u32> = (1..=250).filter(|number| number % 10 != 0).collect();
        ensure!(arrived == expected, "{direction}: arrived {arrived:?}");
        let stats = injector.stats()?;
        let rule = stats.rule("tenth")?;
        let rule = if egress { rule.egress } else { rule.ingress };
        ensure!(
            rule.cut_packets == 25 && rule.excess_packets == 0 && rule.matched_packets == 250,
            "{direction}: {rule:?}"
        );
        stats.lanes_lost_nothing()?;
        injector.heal("tenth")?;
    }
    Ok(())
}

/// Several rules on one interface, duplicates among them: losses are independent, delays add up, copies of lost
/// packets there are none.
fn rules_compose() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for rule in [
        "one --loss 10% --delay 20ms",
        "two --loss 20% --duplicate 10%",
        "three --delay 30ms",
    ] {
        injector.add(&format!(
            "{rule} --netns {} --iface eth0 --to {} --proto udp --seed {SEED}",
            a.netns(),
            b.v4
        ))?;
    }
    let path = Timed::v4(a, 6000, b, 7000)?;
    let [one, two] = ["one", "two"].map(|name| Stream::of_udp(SEED, name, path.ends, true));
    let mut expected = Vec::new();
    for n in 1..=COUNT {
        let number = u64::from(n);
        if one.loses(number, 0.1) || two.loses(number, 0.2) {
            continue;
        }
        expected.push(n);
        if two.duplicates(number, 0.1) {
            expected.push(n);
        }
    }
    let sent = path.send(1..=COUNT, Duration::from_micros(200))?;
    let arrived = path.receive(
        expected.len(),
        Duration::from_millis(80),
        Duration::from_secs(10),
    )?;
    let numbers: Vec<u32> = arrived.iter().map(|one| one.number).collect();
    ensure!(
        numbers == expected,
        "arrived {numbers:?}, expected {expected:?}"
    );
    let taken = delays(&sent, &arrived);
    ensure!(
        taken.iter().all(|delay| *delay >= 50.0),
        "delays do not add up: {taken:?}"
    );
    injector.stats()?.lanes_lost_nothing()
}
