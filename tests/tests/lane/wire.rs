//! Loss is of single wire packets whatever the sender hands over at once: rate and lengths of bursts, for TCP
//! in bulk and UDP in super-packets, with netem's beside.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use tests::{
    lab::{
        bursts::{self, describe, fit, gilbert_elliott_interval, lengths},
        counters::Transmitted,
        lent::Lent,
        load::Transfer,
        netem::Netem,
        on_wire::Capture,
        timed::{Timed, milliseconds},
        topology::{Lab, Node},
        transcript::report,
        trial::{Need, trial},
    },
    model::line::Stream,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "wire::bulk_tcp_loses_single_packets",
            NEEDS,
            bulk_tcp_loses_single_packets,
        ),
        trial(
            "wire::super_packets_lose_single_packets",
            NEEDS,
            super_packets_lose_single_packets,
        ),
        trial(
            "wire::what_is_the_same_for_all_skips_the_segmenter",
            NEEDS,
            what_is_the_same_for_all_skips_the_segmenter,
        ),
        trial(
            "wire::a_length_tells_the_packets_of_a_super_packet_apart",
            NEEDS,
            a_length_tells_the_packets_of_a_super_packet_apart,
        ),
    ]
}

const SEED: u64 = 21;
/// Gilbert-Elliott: into the bad state and out of it. It loses everything while bad, nothing while good.
const P: f64 = 0.01;
const R: f64 = 0.3;
/// For TCP, which would otherwise wait too long for its own end of too long a burst.
const R_TCP: f64 = 0.5;

/// Bulk TCP, of which every wire packet is known by its identification: those that the seed draws are lost, no
/// others, and their bursts are as long as the model has them.
fn bulk_tcp_loses_single_packets() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    // After a burst TCP often waits for its timeout: many streams wait at the same time. And what it sends then may
    // be lost as well, for longer and longer: so its receiver talks back.
    for (name, port, loss, streams, bytes) in [
        ("bernoulli", 7001, "3%", 8, 8 << 20),
        ("bursty", 7002, "gemodel:1%,50%", 32, 3 << 17),
    ] {
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --peer-port {port} --loss {loss} --seed {SEED}",
            a.netns(),
            b.v4
        ))?;
        let before = segmented(a)?;
        let capture = Capture::start(&b.ns, port)?;
        let transfer = Transfer {
            streams,
            bytes,
            within: Duration::from_mins(1),
            talks_back: name == "bursty",
        };
        let (senders, taken) = transfer.run(a, b, port)?;
        let seen = capture.finish()?;
        let (mut packets, mut lost, mut overtaken, mut found) = (0, 0, 0, Vec::new());
        for sender in senders {
            let connection = &seen[&sender.port()];
            let stream = Stream::of_tcp(SEED, name, (sender, b.at(port)), true);
            // What is seen counts from the first that came through.
            let all = connection.last + 1000;
            let drawn = if name == "bernoulli" {
                (1..=all).filter(|n| stream.loses(*n, 0.03)).collect()
            } else {
                stream.gilbert_elliott(all, [P, R_TCP, 1.0, 0.0])
            };
            let first = (1..).zip(&drawn).take_while(|(n, lost)| n == *lost).count();
            let first = u64::try_from(first)?;
            let expected: Vec<u64> = drawn
                .iter()
                .filter(|n| **n > first)
                .map(|n| n - first)
                .filter(|n| *n < connection.last)
                .collect();
            let missing = connection.missing();
            ensure!(
                missing == expected,
                "{name}: lost {missing:?} from {sender}, drawn {expected:?}"
            );
            packets += connection.last;
            lost += u64::try_from(missing.len())?;
            overtaken += connection.overtaken;
            found.extend(lengths(&missing));
        }
        let goes_on = if name == "bernoulli" {
            0.03
        } else {
            1.0 - R_TCP
        };
        let fit = fit(&found, goes_on);
        let in_super_packets = segmented(a)? - before;
        report(format!(
            "{name}: {packets} wire packets in {:.1} s, {overtaken} overtaken, {in_super_packets} in \
             super-packets; {}; chi-square {:.1} of {:.1}",
            taken.as_secs_f64(),
            describe(&found),
            fit.statistic,
            fit.bound
        ));
        ensure!(
            2 * in_super_packets > packets,
            "only {in_super_packets} of {packets} wire packets were in super-packets"
        );
        ensure!(fit.is_good(), "{name}: {fit:?} of bursts {found:?}");
        if name == "bernoulli" {
            let (low, high) = bursts::interval(packets, 0.03);
            ensure!((low..=high).contains(&lost), "{lost} of {packets} lost");
        } else {
            must_be_gilbert_elliott(packets, R_TCP, lost)?;
        }
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal(name)?;
    }
    netem_beside(a, b)
}

fn must_be_gilbert_elliott(packets: u64, r: f64, lost: u64) -> Result<()> {
    let (low, high) = gilbert_elliott_interval(packets, P, r);
    let share = f64::from(u32::try_from(lost)?);
    ensure!(
        (low..=high).contains(&share),
        "{lost} of {packets} lost, expected {low:.0} to {high:.0}"
    );
    Ok(())
}

/// What netem makes of bulk TCP; it loses what it is handed as a whole.
fn netem_beside(a: &Node, b: &Node) -> Result<()> {
    let netem = Netem::on(&a.ns, "eth0", "loss 1%")?;
    let capture = Capture::start(&b.ns, 7003)?;
    let transfer = Transfer {
        streams: 8,
        bytes: 8 << 20,
        within: Duration::from_mins(1),
        talks_back: false,
    };
    let (_, taken) = transfer.run(a, b, 7003)?;
    drop(netem);
    let (mut packets, mut overtaken, mut found) = (0, 0, Vec::new());
    for connection in capture.finish()?.values() {
        packets += connection.last;
        overtaken += connection.overtaken;
        found.extend(lengths(&connection.missing()));
    }
    report(format!(
        "netem, 1%: {packets} wire packets in {:.1} s, {overtaken} overtaken; {}",
        taken.as_secs_f64(),
        describe(&found)
    ));
    Ok(())
}

/// Wire packets that the segmenter of a node's lane has made of super-packets.
fn segmented(node: &Node) -> Result<u64> {
    Ok(Transmitted::by(&node.ns, "inj-segmenter")?.packets)
}

/// Numbered datagrams in super-packets of sixteen.
const SEGMENTS: u32 = 16;
const MANY: u32 = 51_200;
const FEW: u32 = 12_800;
/// So many are sent before it is looked for them: less than what a CPU's backlog and a socket hold.
const PART: u32 = 6_400;

fn super_packets_lose_single_packets() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (name, loss, v6, count) in [
        ("bernoulli", "5%", false, MANY),
        ("bursty", "gemodel:1%,30%", true, FEW),
    ] {
        let peer = if v6 {
            b.v6.to_string()
        } else {
            b.v4.to_string()
        };
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {peer} --proto udp --loss {loss} --seed {SEED}",
            a.netns()
        ))?;
        let path = if v6 {
            Timed::v6(a, 6000, b, 7000)?
        } else {
            Timed::v4(a, 6000, b, 7000)?
        };
        let stream = Stream::of_udp(SEED, name, path.ends, true);
        let drawn: BTreeSet<u64> = if name == "bernoulli" {
            (1..=u64::from(count))
                .filter(|n| stream.loses(*n, 0.05))
                .collect()
        } else {
            stream
                .gilbert_elliott(count.into(), [P, R, 1.0, 0.0])
                .into_iter()
                .collect()
        };
        let lost = lost_of_super_packets(&path, count, |first, last| {
            let lost = drawn.range(u64::from(first)..=u64::from(last)).count();
            (last - first + 1) as usize - lost
        })?;
        ensure!(
            lost.iter().eq(&drawn),
            "{name}: lost {lost:?}, drawn {drawn:?}"
        );
        let found = lengths(&lost);
        let goes_on = if name == "bernoulli" { 0.05 } else { 1.0 - R };
        let fit = fit(&found, goes_on);
        report(format!(
            "{name}, IPv6 {v6}: of {count} {}; chi-square {:.1} of {:.1}",
            describe(&found),
            fit.statistic,
            fit.bound
        ));
        ensure!(fit.is_good(), "{name}: {fit:?} of bursts {found:?}");
        let lost = u64::try_from(lost.len())?;
        if name == "bernoulli" {
            let (low, high) = bursts::interval(count.into(), 0.05);
            ensure!((low..=high).contains(&lost), "{lost} of {count} lost");
        } else {
            must_be_gilbert_elliott(count.into(), R, lost)?;
        }
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal(name)?;
    }
    // Whoever loses super-packets as a whole is found out.
    let path = Timed::v4(a, 6001, b, 7001)?;
    let netem = Netem::on(&a.ns, "eth0", "loss 25%")?;
    let lost = lost_of_super_packets(&path, FEW, |_, _| 0)?;
    drop(netem);
    let found = lengths(&lost);
    let fit = fit(&found, 0.25);
    report(format!(
        "netem, 25%: of {FEW} {}; chi-square {:.1} of {:.1}",
        describe(&found),
        fit.statistic,
        fit.bound
    ));
    ensure!(
        fit.is_bad(),
        "the loss of whole super-packets passes for that of single packets: {fit:?}"
    );
    Ok(())
}

/// A delay and a stall do the same to all wire packets of a super-packet, which therefore stays whole. What arrives is
/// what arrives if it is taken apart, which a loss that loses nothing brings about.
fn what_is_the_same_for_all_skips_the_segmenter() -> Result<()> {
    const COUNT: u32 = 400;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    for fault in ["--delay 300ms", "--stall 3s"] {
        let mut firsts = Vec::new();
        for more in ["", " --loss 0.00000002%"] {
            injector.add(&format!(
                "same --netns {} --iface eth0 --to {} --proto udp {fault}{more} --seed {SEED}",
                a.netns(),
                b.v4
            ))?;
            let before = segmented(a)?;
            let began = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())?;
            path.send_super_packets(1..=COUNT, SEGMENTS as usize, 500)?;
            let arrived = path.receive(
                COUNT as usize,
                Duration::from_millis(100),
                Duration::from_secs(20),
            )?;
            let apart = segmented(a)? - before;
            ensure!(
                apart == if more.is_empty() { 0 } else { COUNT.into() },
                "{fault}{more}: {apart} wire packets came out of the segmenter"
            );
            ensure!(
                arrived.iter().map(|one| one.number).eq(1..=COUNT),
                "{fault}{more}: lost, twice, or out of order: {arrived:?}"
            );
            let first = milliseconds(arrived[0].at_ns - began);
            let last = milliseconds(arrived[arrived.len() - 1].at_ns - began);
            let rule = injector.stats()?.rule("same")?.egress;
            report(format!(
                "{fault}{more}: {apart} taken apart, the first after {first:.1} ms, the last {:.1} ms later",
                last - first
            ));
            ensure!(
                first >= 300.0 && last - first < 500.0,
                "{fault}{more}: from {first} to {last} ms"
            );
            ensure!(
                rule.delayed_packets.max(rule.stalled_packets) == u64::from(COUNT)
                    && rule.lost_packets == 0,
                "{fault}{more}: {rule:?}"
            );
            firsts.push(first);
            injector.stats()?.lanes_lost_nothing()?;
            injector.heal("same")?;
        }
        if fault.starts_with("--delay") {
            ensure!(
                (firsts[0] - firsts[1]).abs() < 100.0,
                "whole and apart: {firsts:?} ms"
            );
        }
    }
    Ok(())
}

/// Sends the numbers up to `count` and returns those that did not arrive. `expected` is how many from one number to
/// another there are at least to wait for.
fn lost_of_super_packets(
    path: &Timed,
    count: u32,
    expected: impl Fn(u32, u32) -> usize,
) -> Result<Vec<u64>> {
    let mut arrived = BTreeSet::new();
    for first in (1..=count).step_by(PART as usize) {
        let last = first + PART - 1;
        path.send_super_packets(first..=last, SEGMENTS as usize, 500)?;
        let part = path.receive(
            expected(first, last),
            Duration::from_millis(50),
            Duration::from_secs(20),
        )?;
        arrived.extend(part.iter().map(|one| one.number));
    }
    Ok((1..=count)
        .filter(|number| !arrived.contains(number))
        .map(u64::from)
        .collect())
}

/// Ten wire packets of a super-packet are long and the last is short: a rule for short ones is for that one alone.
fn a_length_tells_the_packets_of_a_super_packet_apart() -> Result<()> {
    const LONG: usize = 1000;
    const SHORT: usize = 300;
    const LAST: u32 = 11;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let mut bytes = vec![0; (LAST as usize - 1) * LONG + SHORT];
    for (place, number) in bytes.chunks_mut(LONG).zip(1_u32..) {
        place[..4].copy_from_slice(&number.to_be_bytes());
    }
    for (from, to, direction) in [(a, b, "--to"), (b, a, "--from")] {
        for fault in ["--delay 700ms", "--stall 5s", "--cut"] {
            let what = format!("{direction} {fault}");
            injector.add(&format!(
                "short --netns {} --iface eth0 {direction} {} --proto udp --length -400 {fault}",
                a.netns(),
                b.v4
            ))?;
            let path = Timed::v4(from, 6000, to, 7000)?;
            setsockopt(path.sender(), UdpGsoSegment, &i32::try_from(LONG)?)
                .context("UDP_SEGMENT")?;
            path.sender()
                .send(&bytes)
                .context("sending a super-packet")?;
            let count = if fault == "--cut" { LAST - 1 } else { LAST };
            let quiet = Duration::from_millis(300);
            let arrived = path.receive(count as usize, quiet, Duration::from_secs(10))?;
            ensure!(
                arrived.iter().map(|one| one.number).eq(1..=count),
                "{what}: {arrived:?}"
            );
            let since = |one: usize| milliseconds(arrived[one].at_ns - arrived[0].at_ns);
            let (ninth, last) = (since(LAST as usize - 2), since(arrived.len() - 1));
            let stats = injector.stats()?;
            let rule = stats.rule("short")?;
            report(format!(
                "{what}: the long ones within {ninth:.1} ms, all within {last:.1} ms"
            ));
            ensure!(ninth < 300.0, "{what}: long ones waited: {ninth} ms");
            let (held, cut) = match fault {
                "--cut" => (0, 1),
                "--stall 5s" => (rule.both(|one| one.stalled_packets), 0),
                _ => (rule.both(|one| one.delayed_packets), 0),
            };
            ensure!(
                rule.both(|one| one.matched_packets) == 1
                    && rule.both(|one| one.excess_packets) == 0
                    && rule.both(|one| one.cut_packets) == cut
                    && held + cut == 1
                    && (cut == 1 || last > 600.0),
                "{what}: the last after {last} ms, {rule:?}"
            );
            stats.lanes_lost_nothing()?;
            injector.heal("short")?;
        }
    }
    Ok(())
}
