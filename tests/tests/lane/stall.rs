//! Stalls: everything is held, then let go at once, in its order.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    lent::Lent,
    packet_socket::on_one_cpu,
    tcp,
    timed::{Timed, delays},
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "stall::what_is_held_comes_in_a_burst_and_in_order",
            NEEDS,
            what_is_held_comes_in_a_burst_and_in_order,
        ),
        trial("stall::healed_in_the_middle", NEEDS, healed_in_the_middle),
        trial("stall::again_and_again", NEEDS, again_and_again),
        trial("stall::a_connection_survives", NEEDS, a_connection_survives),
    ]
}

fn milliseconds(nanoseconds: i64) -> i64 {
    nanoseconds / 1_000_000
}

fn what_is_held_comes_in_a_burst_and_in_order() -> Result<()> {
    const SINGLE: u32 = 200;
    const TOGETHER: u32 = 400;
    const LATER: u32 = 50;
    const ALL: u32 = SINGLE + TOGETHER + LATER;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for direction in ["--to", "--from"] {
        let (from, to) = if direction == "--to" { (a, b) } else { (b, a) };
        let path = Timed::v4(from, 6000, to, 7000)?;
        injector.add(&format!(
            "pause --netns {} --iface eth0 {direction} {} --proto udp --stall 2s",
            a.netns(),
            b.v4
        ))?;
        // A veth hands over to the backlog of the CPU that sends, and fq's timer runs on the one that set it.
        let (sent, arrived) = on_one_cpu(|| {
            let mut sent = path.send(1..=SINGLE, Duration::from_millis(1))?;
            path.send_super_packets(SINGLE + 1..=SINGLE + TOGETHER, 40, 500)?;
            ensure!(
                path.receive(0, Duration::ZERO, Duration::from_secs(1))?
                    .is_empty(),
                "{direction}: something came during the stall"
            );
            // Until it is over, and on.
            let mut arrived = path.receive(1, Duration::ZERO, Duration::from_secs(10))?;
            sent.extend(path.send(ALL - LATER + 1..=ALL, Duration::from_millis(1))?);
            let left = ALL as usize - arrived.len();
            arrived.extend(path.receive(
                left,
                Duration::from_millis(50),
                Duration::from_secs(10),
            )?);
            Ok((sent, arrived))
        })?;
        let numbers: Vec<u32> = arrived.iter().map(|one| one.number).collect();
        let overtaken: Vec<_> = numbers
            .windows(2)
            .filter(|pair| pair[0] > pair[1])
            .collect();
        ensure!(
            numbers.len() == ALL as usize && overtaken.is_empty(),
            "{direction}: {} of {ALL} came, out of order {overtaken:?}",
            numbers.len()
        );
        let burst = arrived[(SINGLE + TOGETHER) as usize - 1].at_ns - arrived[0].at_ns;
        let taken = delays(&sent, &arrived);
        let stats = injector.stats()?;
        let rule = stats.rule("pause")?;
        let stall = rule.realised("stall")?;
        report(format!(
            "{direction}: the burst took {} ms, the first packet {:.1} ms; {stall:?}",
            milliseconds(burst),
            taken[0]
        ));
        ensure!(
            milliseconds(burst) < 500,
            "it took {} ms",
            milliseconds(burst)
        );
        // The first was sent soon after the rule was made.
        ensure!(taken[0] > 1200.0 && taken[0] < 2100.0, "{}", taken[0]);
        ensure!(
            rule.both(|one| one.stalled_packets) == u64::from(SINGLE + TOGETHER),
            "{rule:?}"
        );
        // What the rule says that the first packet got is what it was seen to get, but for the way.
        let max = stall.max.unwrap_or(0.0) * 1e3;
        ensure!(
            max <= taken[0] + 1.0 && max > taken[0] - 30.0,
            "{max} ms said, {} seen",
            taken[0]
        );
        stats.lanes_lost_nothing()?;
        injector.heal("pause")?;
    }
    Ok(())
}

/// What a stall holds comes when it would have been over, and what is sent after the heal behind it; or it is dropped,
/// and what is sent then goes at once.
fn healed_in_the_middle() -> Result<()> {
    const HELD: u32 = 100;
    const ALL: u32 = 200;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let gap = Duration::from_millis(2);
    let within = Duration::from_secs(10);
    for (direction, from, to) in [("--to", a, b), ("--from", b, a)] {
        for flush in [false, true] {
            let what = format!("{direction}, flush {flush}");
            // Another flow, which no rule is for.
            let other = Timed::v4(from, 6001, to, 7001)?;
            let path = Timed::v4(from, 6000, to, 7000)?;
            injector.add(&format!(
                "pause --netns {} --iface eth0 {direction} {} --proto udp --dst-port 7000 --stall 3s",
                a.netns(),
                b.v4
            ))?;
            let mut sent = path.send(1..=HELD, gap)?;
            let healed = if flush {
                injector.json(&["heal", "pause", "--flush"])?
            } else {
                injector.json(&["heal", "pause"])?
            };
            sent.extend(path.send(HELD + 1..=ALL, gap)?);
            let others = other.send(1..=HELD, gap)?;
            let first = if flush { HELD + 1 } else { 1 };
            let arrived =
                path.receive((first..=ALL).count(), Duration::from_millis(300), within)?;
            ensure!(
                arrived.iter().map(|one| one.number).eq(first..=ALL),
                "{what}: {arrived:?}"
            );
            let taken = delays(&sent, &arrived);
            let (soonest, latest) = taken.iter().fold((f64::MAX, 0.0_f64), |(low, high), one| {
                (low.min(*one), high.max(*one))
            });
            let beside = other.receive(HELD as usize, Duration::ZERO, within)?;
            let beside = delays(&others, &beside).into_iter().fold(0.0_f64, f64::max);
            report(format!(
                "{what}: after {soonest:.1} to {latest:.1} ms, the other flow after {beside:.1} at most"
            ));
            ensure!(
                if flush {
                    latest < 500.0
                } else {
                    // The first was sent soon after the rule was made, the last seconds before the stall was over.
                    latest < 3100.0 && soonest > 1000.0
                } && beside < 500.0,
                "{what}: {taken:?}, the other flow {beside}"
            );
            ensure!(healed["healed"][0]["name"] == "pause", "{what}: {healed}");
            wait_until("the flush is over", within, || {
                Ok(injector.stats()?.flushes.is_empty())
            })?;
            injector.stats()?.lanes_lost_nothing()?;
        }
        let told = injector.flushed("pause")?;
        let dropped = format!(": {HELD} packets");
        ensure!(
            told.iter()
                .filter(|message| message.contains(&dropped))
                .count()
                == if direction == "--to" { 1 } else { 2 },
            "{direction}: {told:?}"
        );
    }
    Ok(())
}

/// A third of a second in each: what is sent all the time comes in bursts, and between them at once.
fn again_and_again() -> Result<()> {
    const COUNT: u32 = 1000;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    injector.add(&format!(
        "pause --netns {} --iface eth0 --to {} --proto udp --stall 300ms --every 900ms",
        a.netns(),
        b.v4
    ))?;
    let sent = path.send(1..=COUNT, Duration::from_micros(2700))?;
    let arrived = path.receive(
        COUNT as usize,
        Duration::from_millis(50),
        Duration::from_secs(10),
    )?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(1..=COUNT),
        "lost, or out of order"
    );
    let taken = delays(&sent, &arrived);
    let quick = taken.iter().filter(|delay| **delay < 20.0).count();
    let longest = taken.iter().copied().fold(0.0, f64::max);
    report(format!(
        "{quick} of {COUNT} at once, the longest after {longest:.1} ms"
    ));
    // Two thirds are not held, more or less by where in a cycle it begins and ends; with one stall only it would be
    // nine tenths.
    ensure!(
        (500..=800).contains(&quick),
        "{quick} of {COUNT} were not held"
    );
    ensure!((270.0..400.0).contains(&longest), "{longest} ms");
    injector.stats()?.lanes_lost_nothing()
}

fn a_connection_survives() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let mut connection = tcp::Connection::open(a, b, 7001, Duration::from_secs(5))?;
    injector.add(&format!(
        "pause --netns {} --iface eth0 --peer {} --stall 2s",
        a.netns(),
        b.v4
    ))?;
    let began = std::time::Instant::now();
    ensure!(
        connection.works(Duration::from_secs(5))?,
        "a byte did not get there and back"
    );
    let taken = began.elapsed();
    report(format!("there and back in {taken:?}"));
    ensure!(
        taken > Duration::from_millis(500),
        "nothing was held: {taken:?}"
    );
    injector.stats()?.lanes_lost_nothing()
}
