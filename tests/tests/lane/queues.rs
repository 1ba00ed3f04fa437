//! A lane's queues: one for each CPU, within bounds that are told, with limits that follow the rules in force.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tests::lab::{
    injector::{Injector, Stats},
    lent::Lent,
    netns::Netns,
    tcp,
    timed::{Timed, delays},
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial(
            "queues::eight_streams_share_the_cpus_and_keep_their_order",
            NEEDS,
            eight_streams_share_the_cpus_and_keep_their_order,
        ),
        trial(
            "queues::a_full_lane_loses_what_it_says_and_no_more",
            NEEDS,
            a_full_lane_loses_what_it_says_and_no_more,
        ),
        trial(
            "queues::limits_follow_the_rules_and_held_packets_stay",
            NEEDS,
            limits_follow_the_rules_and_held_packets_stay,
        ),
    ]
}

/// The fq qdiscs of the line.
fn queues(ns: &Netns) -> Result<Vec<Value>> {
    let text = ns.tool("tc -s -j qdisc show dev inj-line")?.stdout;
    let all: Vec<Value> = serde_json::from_str(&text).context("reading tc's JSON")?;
    Ok(all.into_iter().filter(|one| one["kind"] == "fq").collect())
}

/// TCP's own counters of a namespace.
fn counter(ns: &Netns, name: &str) -> Result<u64> {
    let text = ns.tool(&format!("nstat -asz {name}"))?.stdout;
    text.lines()
        .find(|line| line.starts_with(name))
        .and_then(|line| line.split_whitespace().nth(1))
        .and_then(|count| count.parse().ok())
        .with_context(|| format!("nstat does not say {name}: {text}"))
}

fn eight_streams_share_the_cpus_and_keep_their_order() -> Result<()> {
    const BYTES: usize = 2 << 20;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    // Steady: two CPUs that take turns at a queue would overtake each other in their backlogs, with or without an
    // injector.
    let injector = Lent::new()?;
    // By the segmenter too: each wire packet of its own.
    for more in ["", "--jitter 2ms"] {
        injector.add(&format!(
            "slow --netns {} --iface eth0 --to {} --delay 20ms {more}",
            a.netns(),
            b.v4
        ))?;
        let before = counter(&b.ns, "TcpExtTCPOFOQueue")?;
        thread::scope(|scope| -> Result<()> {
            let streams: Vec<_> = (0..8)
                .map(|number| {
                    scope.spawn(move || {
                        tcp::bulk(a, b, 7100 + number, BYTES, Duration::from_mins(1))
                    })
                })
                .collect();
            for stream in streams {
                stream
                    .join()
                    .map_err(|_| anyhow::anyhow!("a stream panicked"))??;
            }
            Ok(())
        })?;
        let late = counter(&b.ns, "TcpExtTCPOFOQueue")? - before;
        // What acknowledgements say is missing. Timers send again, too (a probe of the tail, a timeout), where a machine
        // is late, which is no sign of a loss.
        let again = counter(&a.ns, "TcpExtTCPFastRetrans")?;
        report(format!(
            "{more}: {late} segments out of order, {again} sent again, {} with those of timers; backlogs: {:?}",
            counter(&a.ns, "TcpRetransSegs")?,
            std::fs::read_to_string("/proc/net/softnet_stat")?
                .lines()
                .filter_map(|line| line.split_whitespace().nth(1))
                .collect::<Vec<_>>()
        ));
        ensure!(
            late + again == 0,
            "{late} segments came out of order, {again} were sent again"
        );
        let queues = queues(&a.ns)?;
        let cpus = thread::available_parallelism()?.get();
        ensure!(queues.len() == cpus, "{} queues, {cpus} CPUs", queues.len());
        // Eight flows in one of two queues only: once in 128, so more flows than streams are looked at.
        for port in 7200..7240 {
            Timed::v4(a, 6000, b, port)?.send(1..=2, Duration::ZERO)?;
        }
        let sent: Vec<u64> = self::queues(&a.ns)?
            .iter()
            .map(|queue| queue["packets"].as_u64().unwrap_or(0))
            .collect();
        report(format!("packets by queue: {sent:?}"));
        ensure!(
            sent.iter().all(|packets| *packets > 0),
            "a queue was not used: {sent:?}"
        );
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal("slow")?;
    }
    Ok(())
}

fn a_full_lane_loses_what_it_says_and_no_more() -> Result<()> {
    const SENT: u32 = 100;
    // A datagram of 64 bytes is a frame of 106, and counts 768 more.
    for (bounds, room, capacity) in [
        (["--lane-packets", "40"], 40, "packets"),
        (["--lane-memory", "64kb"], 65_536 / (106 + 768), "memory"),
    ] {
        let lab = Lab::steady_pair()?;
        let (a, b) = (lab.a(), lab.b());
        a.make_clsact()?;
        let injector = Injector::started(&bounds)?;
        injector.add(&format!(
            "slow --netns {} --iface eth0 --to {} --proto udp --delay 3s",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        path.send(1..=SENT, Duration::ZERO)?;
        let stats = injector.stats()?;
        let lane = stats.lanes.first().context("there is no lane")?;
        ensure!(
            lane.queued_packets == u64::from(room)
                && lane.memory_bytes == u64::from(room) * 874
                && lane.full_packets == u64::from(SENT - room)
                && lane.dropped_packets + lane.device_drops == 0,
            "bound by {capacity} to {room}: {lane:?}"
        );
        ensure!(
            stats.lanes_lost_nothing().is_err(),
            "packets that a full lane lost go unnoticed"
        );
        let arrived = path.receive(
            room as usize,
            Duration::from_millis(300),
            Duration::from_secs(15),
        )?;
        ensure!(
            arrived.iter().map(|one| one.number).eq(1..=room),
            "{arrived:?}"
        );
        // Nothing is left in the account, and there is room again.
        let lane_is_empty = |stats: &Stats| stats.lanes.iter().all(|lane| lane.memory_bytes == 0);
        ensure!(lane_is_empty(&injector.stats()?), "{:?}", injector.stats()?);
        path.send(1..=room, Duration::ZERO)?;
        path.receive(room as usize, Duration::ZERO, Duration::from_secs(15))?;
        let full = injector.stats()?.lanes[0].full_packets;
        ensure!(full == u64::from(SENT - room), "{full} found no room");
    }
    Ok(())
}

fn limits_follow_the_rules_and_held_packets_stay() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let rule = |name: &str, port: u16, delay: &str| {
        format!(
            "{name} --netns {} --iface eth0 --to {} --peer-port {port} --delay {delay}",
            a.netns(),
            b.v4
        )
    };
    let limit = || -> Result<u64> {
        let queues = queues(&a.ns)?;
        let limits: Vec<u64> = queues
            .iter()
            .filter_map(|queue| queue["options"]["limit"].as_u64())
            .map(|packets| packets.max(1))
            .collect();
        ensure!(
            limits.len() == queues.len() && limits.windows(2).all(|pair| pair[0] == pair[1]),
            "queues with different limits: {queues:?}"
        );
        limits.first().copied().context("the line has no fq")
    };
    injector.add(&rule("short", 7000, "1ms"))?;
    let short = limit()?;
    injector.add(&rule("half", 7001, "1500ms"))?;
    let half = limit()?;
    let path = Timed::v4(a, 6000, b, 7001)?;
    let sent = path.send(1..=100, Duration::ZERO)?;
    // Up while packets are held, and down again with the rule.
    injector.add(&rule("long", 7002, "5s"))?;
    let long = limit()?;
    injector.heal("long")?;
    let arrived = path.receive(100, Duration::ZERO, Duration::from_secs(10))?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(1..=100)
            && delays(&sent, &arrived).iter().all(|delay| *delay >= 1500.0),
        "changing the limits disturbed held packets: {arrived:?}"
    );
    report(format!(
        "limits: {short} for 1 ms, {half} for 1.5 s, {long} for 5 s"
    ));
    ensure!(
        short < half && half <= long,
        "limits do not follow: {short}, {half}, {long}"
    );
    injector.heal("half")?;
    wait_until("the limit is low again", Duration::from_secs(20), || {
        Ok(limit()? == short)
    })?;
    injector.stats()?.lanes_lost_nothing()
}
