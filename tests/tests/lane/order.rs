//! Order within a flow: kept where it is to be kept, by time where it is free, broken for the packets that are
//! held back.

use std::{collections::BTreeSet, thread, time::Duration};

use anyhow::{Result, ensure};
use injector::{dataplane::distribution::quantile, rules::shaping::Distribution};
use libtest_mimic::Trial;
use tests::{
    lab::{
        lent::Lent,
        timed::{Arrived, Sent, Timed, delays, median, milliseconds},
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
            "order::jitter_keeps_order_unless_it_is_free",
            NEEDS,
            jitter_keeps_order_unless_it_is_free,
        ),
        trial(
            "order::kept_within_a_flow_each_packet_waits_for_the_latest_before_it",
            NEEDS,
            kept_within_a_flow_each_packet_waits_for_the_latest_before_it,
        ),
        trial(
            "order::chosen_packets_are_held_back_and_no_others",
            NEEDS,
            chosen_packets_are_held_back_and_no_others,
        ),
    ]
}

fn jitter_keeps_order_unless_it_is_free() -> Result<()> {
    const COUNT: u32 = 400;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for order in ["keep", "free"] {
        injector.add(&format!(
            "jittery --netns {} --iface eth0 --to {} --delay 40ms --jitter 30ms --order {order} --seed 3",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        let sent = path.send(1..=COUNT, Duration::from_millis(1))?;
        let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(10))?;
        ensure!(
            delays(&sent, &arrived).iter().all(|delay| *delay >= 10.0),
            "a packet came too early"
        );
        let overtaken = arrived
            .windows(2)
            .filter(|pair| pair[1].number < pair[0].number)
            .count();
        report(format!("{order}: {overtaken} times out of order"));
        ensure!(
            if order == "keep" {
                overtaken == 0
            } else {
                overtaken > 50
            },
            "{order}: {overtaken} times out of order"
        );
        if order == "free" {
            let stream = Stream::of_udp(3, "jittery", path.ends, true);
            must_arrive_by_time(&sent, &arrived, |n| {
                40.0 + 30.0 * quantile(&Distribution::Uniform, stream.delay(n))
            })?;
        }
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal("jittery")?;
    }
    Ok(())
}

/// Two flows, whose packets alternate: each arrives at its own time, or with the latest packet before it of its flow,
/// and not of the other one.
fn kept_within_a_flow_each_packet_waits_for_the_latest_before_it() -> Result<()> {
    const COUNT: u32 = 400;
    const SEED: u64 = 4;
    /// Of a clock that is looked at before sending.
    const EARLY_MS: f64 = 0.1;
    const LATE_MS: f64 = 3.0;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (direction, from, to) in [("--to", a, b), ("--from", b, a)] {
        injector.add(&format!(
            "jittery --netns {} --iface eth0 {direction} {} --delay 40ms --jitter 30ms --seed {SEED}",
            a.netns(),
            b.v4
        ))?;
        let paths = [
            Timed::v4(from, 6000, to, 7000)?,
            Timed::v4(from, 6001, to, 7001)?,
        ];
        let mut sent = [Vec::new(), Vec::new()];
        for number in 1..=COUNT {
            for (path, sent) in paths.iter().zip(&mut sent) {
                sent.extend(path.send([number], Duration::ZERO)?);
            }
            thread::sleep(Duration::from_millis(1));
        }
        let first_ns = sent[0][0].at_ns;
        let (mut late, mut constant, mut longest) = (Vec::new(), Vec::new(), Vec::new());
        // Of all packets: when sent, when due by its own delay, when there; in milliseconds.
        let mut all = Vec::new();
        for (path, sent) in paths.iter().zip(&sent) {
            let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(10))?;
            ensure!(
                arrived.iter().map(|one| one.number).eq(1..=COUNT),
                "{direction}: order was not kept"
            );
            let stream = Stream::of_udp(SEED, "jittery", path.ends, direction == "--to");
            let mut latest = f64::MIN;
            for (sent, arrived) in sent.iter().zip(&arrived) {
                let at = milliseconds(sent.at_ns - first_ns);
                let there = milliseconds(arrived.at_ns - first_ns);
                let value = quantile(&Distribution::Uniform, stream.delay(sent.number.into()));
                let own = at + 40.0 + 30.0 * value;
                latest = latest.max(own);
                ensure!(
                    there >= latest - EARLY_MS,
                    "{direction}: packet {} came {} ms too early",
                    sent.number,
                    latest - there
                );
                late.push(there - latest);
                constant.push((there - at - 40.0).abs());
                longest.push((there - at - 70.0).abs());
                all.push((at, own, there));
            }
        }
        all.sort_by(|one, other| one.0.total_cmp(&other.0));
        let mut latest = f64::MIN;
        let mut together = Vec::new();
        for (_, own, there) in &all {
            latest = latest.max(*own);
            together.push(latest - there);
        }
        // A packet in four is sooner than one of the other flow before it by more than that: that is told apart.
        together.sort_by(f64::total_cmp);
        let overtakes = together[together.len() * 3 / 4];
        let late = median(&late);
        report(format!(
            "{direction}: {late:.3} ms later than the latest before; from 40 ms {:.1}, from 70 ms {:.1}; a quarter \
             {overtakes:.1} ms before the other flow",
            median(&constant),
            median(&longest)
        ));
        ensure!(late < LATE_MS, "{direction}: {late} ms later");
        for (wrong, by) in [
            ("no jitter", median(&constant)),
            ("always the longest", median(&longest)),
            ("one order for all flows", overtakes),
        ] {
            ensure!(
                by > LATE_MS,
                "{direction}: the wrong model passes for right: {wrong}, {by} ms off"
            );
        }
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal("jittery")?;
    }
    Ok(())
}

/// Fails unless packets arrived in the order of the times at which they were due by the delay of their number.
/// Where the time of two differs by less than what an emulated machine needs between a look at the clock and the
/// sending, either may come first; a handful in a hundred may be further apart where something held it up.
fn must_arrive_by_time(
    sent: &[Sent],
    arrived: &[Arrived],
    delay_ms: impl Fn(u64) -> f64,
) -> Result<()> {
    const CLOSE_MS: f64 = 2.0;
    let due: Vec<f64> = arrived
        .iter()
        .zip(delays(sent, arrived))
        // What it took and when it came give when it was sent.
        .map(|(one, taken)| since(arrived, one) - taken + delay_ms(one.number.into()))
        .collect();
    let wrong = due
        .windows(2)
        .filter(|pair| pair[0] > pair[1] + CLOSE_MS)
        .count();
    report(format!("{wrong} of {} not in the order of time", due.len()));
    ensure!(
        wrong * 20 <= due.len(),
        "{wrong} of {} packets came out of the order of their times",
        due.len()
    );
    // In the order of their numbers they would not be: that is told apart.
    let mut by_number: Vec<(u32, f64)> = arrived.iter().map(|one| one.number).zip(due).collect();
    by_number.sort_by_key(|(number, _)| *number);
    let other = by_number
        .windows(2)
        .filter(|pair| pair[0].1 > pair[1].1 + CLOSE_MS)
        .count();
    ensure!(
        other * 4 > by_number.len(),
        "the order of sending passes for that of time: {other} of {}",
        by_number.len()
    );
    Ok(())
}

/// When a packet arrived, in milliseconds after the first.
fn since(arrived: &[Arrived], one: &Arrived) -> f64 {
    arrived
        .first()
        .map_or(0.0, |first| milliseconds(one.at_ns - first.at_ns))
}

fn chosen_packets_are_held_back_and_no_others() -> Result<()> {
    const COUNT: u32 = 300;
    const SEED: u64 = 5;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for egress in [true, false] {
        let direction = if egress { "--to" } else { "--from" };
        injector.add(&format!(
            "shuffle --netns {} --iface eth0 {direction} {} --proto udp --reorder 10% --hold 150ms --seed {SEED}",
            a.netns(),
            b.v4
        ))?;
        let (from, to) = if egress { (a, b) } else { (b, a) };
        let path = Timed::v4(from, 6000, to, 7000)?;
        let sent = path.send(1..=COUNT, Duration::from_millis(1))?;
        let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(10))?;
        let stream = Stream::of_udp(SEED, "shuffle", path.ends, egress);
        let expected: BTreeSet<u32> = (1..=COUNT)
            .filter(|n| stream.holds_back(u64::from(*n), 0.1))
            .collect();
        let held: BTreeSet<u32> = arrived
            .iter()
            .zip(delays(&sent, &arrived))
            .filter(|(_, delay)| *delay >= 150.0)
            .map(|(one, _)| one.number)
            .collect();
        ensure!(
            held == expected,
            "{direction}: held back {held:?}, drawn {expected:?}"
        );
        // Nobody else waited, and the others are in order among themselves.
        let others: Vec<_> = arrived
            .iter()
            .filter(|one| !held.contains(&one.number))
            .collect();
        ensure!(
            others.is_sorted_by_key(|one| one.number),
            "packets that were not held back are out of order"
        );
        let stats = injector.stats()?;
        let rule = stats.rule("shuffle")?;
        ensure!(
            rule.both(|one| one.reordered_packets) == u64::try_from(expected.len())?,
            "{rule:?}"
        );
        stats.lanes_lost_nothing()?;
        injector.heal("shuffle")?;
    }
    Ok(())
}
