//! Delay: as long as its number draws it, by the distribution that was asked for, and beyond fq's usual horizon.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Result, ensure};
use injector::{dataplane::distribution::quantile, rules::shaping::Distribution};
use libtest_mimic::Trial;
use tests::{
    lab::{
        lent::Lent,
        scratch::Scratch,
        tcp,
        timed::{Timed, delays, median},
        topology::Lab,
        transcript::report,
        trial::{Need, trial},
    },
    model::line::Stream,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial("delay::twelve_seconds", NEEDS, twelve_seconds),
        trial(
            "delay::each_packet_gets_the_delay_that_its_number_draws",
            NEEDS,
            each_packet_gets_the_delay_that_its_number_draws,
        ),
        trial(
            "delay::distributions_are_the_asked_ones",
            NEEDS,
            distributions_are_the_asked_ones,
        ),
        trial(
            "delay::distributions_of_files_are_the_asked_ones",
            NEEDS,
            distributions_of_files_are_the_asked_ones,
        ),
        trial(
            "delay::correlation_is_the_asked_one",
            NEEDS,
            correlation_is_the_asked_one,
        ),
        trial("delay::loopback", NEEDS, loopback),
    ]
}

/// Later than asked by at most so much in the median, over the path without a rule: emulated machines keep time
/// to about half a millisecond.
const LATE_MS: f64 = 3.0;

/// Beyond fq's usual horizon of ten seconds, both ways, over IPv4 and IPv6.
fn twelve_seconds() -> Result<()> {
    const COUNT: u32 = 100;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    injector.add(&format!(
        "slow --netns {} --iface eth0 --peer {},{} --delay 12s",
        a.netns(),
        b.v4,
        b.v6
    ))?;
    let paths = [
        ("to, IPv4", Timed::v4(a, 6000, b, 7000)?),
        ("to, IPv6", Timed::v6(a, 6000, b, 7000)?),
        ("from, IPv4", Timed::v4(b, 6001, a, 7001)?),
        ("from, IPv6", Timed::v6(b, 6001, a, 7001)?),
    ];
    let mut sent = Vec::new();
    for (_, path) in &paths {
        sent.push(path.send(1..=COUNT, Duration::from_millis(1))?);
    }
    for ((what, path), sent) in paths.iter().zip(&sent) {
        let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(20))?;
        let taken = delays(sent, &arrived);
        ensure!(
            taken
                .iter()
                .all(|delay| (12_000.0..12_500.0).contains(delay)),
            "{what}: {taken:?}"
        );
    }
    injector.stats()?.lanes_lost_nothing()
}

fn each_packet_gets_the_delay_that_its_number_draws() -> Result<()> {
    const COUNT: u32 = 200;
    const SEED: u64 = 11;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (distribution, name) in [
        (Distribution::Uniform, "uniform"),
        (Distribution::Normal, "normal"),
        (Distribution::Pareto, "pareto"),
    ] {
        injector.add(&format!(
            "jittery --netns {} --iface eth0 --to {} --proto udp --delay 60ms --jitter 15ms --distribution {name} \
             --order free --seed {SEED}",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        let sent = path.send(1..=COUNT, Duration::from_millis(2))?;
        let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(10))?;
        let stream = Stream::of_udp(SEED, "jittery", path.ends, true);
        let mut late = Vec::new();
        for (one, taken) in arrived.iter().zip(delays(&sent, &arrived)) {
            let value = quantile(&distribution, stream.delay(one.number.into()));
            let asked = (60.0 + 15.0 * value).max(0.0);
            late.push(taken - asked);
            // Interpolation is worst where the tails are steep.
            ensure!(
                taken > asked - 2.0,
                "{name}: packet {} was due after {asked} ms and came after {taken}",
                one.number
            );
        }
        let late = median(&late);
        report(format!("{name}: {late:.3} ms later than drawn"));
        ensure!(late.abs() < LATE_MS, "{name}: {late} ms later than drawn");
        injector.heal("jittery")?;
    }
    Ok(())
}

/// The greatest distance between the distribution of some values and an asked one (Kolmogorov-Smirnov).
fn distance(values: &[f64], mean: f64, jitter: f64, distribution: &Distribution) -> f64 {
    distance_from(values, |share| {
        mean + jitter * quantile(distribution, share)
    })
}

/// The same, of a distribution given by its quantiles.
fn distance_from(values: &[f64], asked: impl Fn(f64) -> f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let steps = 10_000;
    let quantiles: Vec<f64> = (1..steps)
        .map(|step| asked(f64::from(step) / f64::from(steps)))
        .collect();
    let count = f64::from(u32::try_from(sorted.len()).unwrap_or(u32::MAX));
    (0_u32..)
        .zip(&sorted)
        .map(|(rank, value)| {
            let below = u32::try_from(quantiles.partition_point(|one| one < value)).unwrap_or(0);
            let asked = f64::from(below) / f64::from(steps);
            let low = (asked - f64::from(rank) / count).abs();
            let high = (asked - f64::from(rank + 1) / count).abs();
            low.max(high)
        })
        .fold(0.0, f64::max)
}

/// Kolmogorov-Smirnov with 1,500 delays: by chance alone the distance exceeds 0.0696 once in a million times
/// (the square root of ln(2 / 10^-6) / (2 n)). Late timers add the density of the distribution, at most
/// 1 / 40 ms here, times their lateness.
fn distributions_are_the_asked_ones() -> Result<()> {
    const COUNT: u32 = 1500;
    const BOUND: f64 = 0.0696 + 0.035;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    // Each with one that it must not be taken for.
    for (distribution, wrong) in [
        (Distribution::Uniform, Distribution::Exponential),
        (Distribution::Normal, Distribution::Pareto),
        (Distribution::Pareto, Distribution::Normal),
        (Distribution::ParetoNormal, Distribution::Uniform),
        (Distribution::Exponential, Distribution::Uniform),
        (Distribution::LogNormal, Distribution::Uniform),
    ] {
        let name = distribution.name();
        injector.add(&format!(
            "jittery --netns {} --iface eth0 --to {} --proto udp --delay 150ms --jitter 40ms --distribution {name} \
             --order free --seed 4",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        let sent = path.send(1..=COUNT, Duration::from_micros(700))?;
        let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(20))?;
        let taken = delays(&sent, &arrived);
        let right = distance(&taken, 150.0, 40.0, &distribution);
        let other = distance(&taken, 150.0, 40.0, &wrong);
        report(format!(
            "{name}: {right:.4} from itself, {other:.4} from {}",
            wrong.name()
        ));
        ensure!(right < BOUND, "{name}: {right} from what was asked");
        ensure!(other > BOUND, "{name}: {other} from {} too", wrong.name());
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal("jittery")?;
    }
    Ok(())
}

/// Three delays in four lie evenly in the first half of the range, one in the last quarter, none between: the
/// quantile at `share`, from -1 to 1.
fn two_clusters(share: f64) -> f64 {
    if share < 0.75 {
        share / 0.75 - 1.0
    } else {
        2.0 * share - 1.0
    }
}

/// With the bounds of [`distributions_are_the_asked_ones`], and ten times the delays: the density is at most
/// 0.75 / 400 ms, so that a busy machine may be late by 18 ms. What it must not be taken for is the uniform
/// distribution over the same range, whose distance is a quarter.
fn distributions_of_files_are_the_asked_ones() -> Result<()> {
    const COUNT: u32 = 1500;
    const BOUND: f64 = 0.0696 + 0.035;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let scratch = Scratch::new()?;
    let injector = Lent::new()?;
    let shares = || (0..5000).map(|step| (f64::from(step) + 0.5) / 5000.0);
    // Eight to a line, as iproute2 has them; 16384 is twice the jitter.
    let table: Vec<String> = shares()
        .map(|share| format!("{:.0}", 8192.0 * two_clusters(share)))
        .collect();
    let lines: Vec<String> = table.chunks(8).map(|line| line.join(" ")).collect();
    let dist = scratch.path().join("clusters.dist");
    fs::write(&dist, format!("# two clusters\n{}\n", lines.join("\n")))?;
    // In no order, and in three ways to write them. The other 400 ms are the rule's own delay.
    let samples: Vec<String> = (0_u32..)
        .zip(shares())
        .map(|(index, share)| {
            let milliseconds = 1100.0 + 400.0 * two_clusters(share);
            let text = match index % 3 {
                0 => format!("{milliseconds:.3}"),
                1 => format!("{milliseconds:.4}ms # with its unit"),
                _ => format!("{:.6}s", milliseconds / 1000.0),
            };
            (index.wrapping_mul(2_654_435_761), text)
        })
        .collect::<BTreeMap<u32, String>>()
        .into_values()
        .collect();
    let file = scratch.path().join("rtt.txt");
    fs::write(&file, samples.join("\n"))?;
    for (how, name) in [
        (
            format!(
                "--delay 1500ms --jitter 400ms --distribution file:{}",
                dist.display()
            ),
            "table",
        ),
        (
            format!("--delay 400ms --distribution file:{}", file.display()),
            "samples",
        ),
    ] {
        injector.add(&format!(
            "jittery --netns {} --iface eth0 --to {} --proto udp {how} --order free --seed 4",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        let sent = path.send(1..=COUNT, Duration::from_micros(700))?;
        let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(20))?;
        let taken = delays(&sent, &arrived);
        let right = distance_from(&taken, |share| 1500.0 + 400.0 * two_clusters(share));
        let other = distance(&taken, 1500.0, 400.0, &Distribution::Uniform);
        report(format!(
            "{name}: {right:.4} from the file, {other:.4} from uniform"
        ));
        ensure!(right < BOUND, "{name}: {right} from what was asked");
        ensure!(other > BOUND, "{name}: {other} from uniform too");
        let list = injector.json(&["list"])?;
        fs::remove_file(if name == "table" { &dist } else { &file })?;
        // What is listed says the same without the file.
        let listed = scratch.path().join("rules.json");
        fs::write(&listed, list.to_string())?;
        let applied = injector.json(&["apply", &listed.to_string_lossy()])?;
        ensure!(
            applied["unchanged"] == serde_json::json!(["jittery"]),
            "applied again: {}",
            applied["unchanged"]
        );
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal("jittery")?;
    }
    Ok(())
}

/// Of 1,500 pairs the correlation has a standard error of 0.026 at most; five of them and a half are once in
/// thirty million.
fn correlation_is_the_asked_one() -> Result<()> {
    const COUNT: u32 = 1500;
    const BOUND: f64 = 0.143;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for asked in [0.0_f64, 0.5, 0.9] {
        injector.add(&format!(
            "jittery --netns {} --iface eth0 --to {} --proto udp --delay 150ms --jitter 40ms --distribution normal \
             --order free --correlation {}% --seed 4",
            a.netns(),
            b.v4,
            asked * 100.0
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        let sent = path.send(1..=COUNT, Duration::from_micros(700))?;
        let mut arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(20))?;
        arrived.sort_by_key(|one| one.number);
        let taken = delays(&sent, &arrived);
        let found = autocorrelation(&taken);
        let far = distance(&taken, 150.0, 40.0, &Distribution::Normal);
        report(format!(
            "asked {asked}, found {found:.3}; {far:.4} from normal"
        ));
        ensure!(
            (found - asked).abs() < BOUND,
            "asked {asked}, found {found}"
        );
        // Correlated values are worth fewer: with 0.9 they are (1 - 0.9) / (1 + 0.9) of as many.
        let worth = (1.0 - asked) / (1.0 + asked);
        let bound = 0.0696 / worth.sqrt() + 0.035;
        ensure!(
            far < bound,
            "correlation {asked} changed the distribution: {far}"
        );
        injector.heal("jittery")?;
    }
    Ok(())
}

/// The correlation of each value with the next.
fn autocorrelation(values: &[f64]) -> f64 {
    let count = f64::from(u32::try_from(values.len()).unwrap_or(u32::MAX));
    let mean = values.iter().sum::<f64>() / count;
    let variance: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let together: f64 = values
        .windows(2)
        .map(|pair| (pair[0] - mean) * (pair[1] - mean))
        .sum();
    together / variance
}

fn loopback() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let a = lab.a();
    a.make_clsact()?;
    let injector = Lent::new()?;
    injector.add(&format!(
        "slow --netns {} --iface lo --peer-port 7000 --delay 40ms",
        a.netns()
    ))?;
    for (address, name) in [("127.0.0.1", "IPv4"), ("[::1]", "IPv6")] {
        let server = tcp::listen(&a.ns, format!("{address}:7000").parse()?)?;
        let began = std::time::Instant::now();
        let client = tcp::connect(&a.ns, server.local_addr()?, Duration::from_secs(5))?;
        let taken = began.elapsed();
        report(format!("{name}: connected after {taken:?}"));
        // The SYN waits as it leaves; so does the answer as it arrives, whose peer's port it is.
        ensure!(
            taken >= Duration::from_millis(80) && taken < Duration::from_millis(500),
            "{name}: connected after {taken:?}"
        );
        drop(client);
    }
    injector.stats()?.lanes_lost_nothing()
}
