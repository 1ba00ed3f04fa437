//! Bursts and floods: a lane loses nothing by itself, and where a queue is full what it drops is counted.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    counters::{Nstat, backlog_drops},
    injector::Injector,
    lent::Lent,
    load::{Load, Transfer},
    netem::Netem,
    on_wire::Capture,
    packet_socket::on_one_cpu,
    stream::{Stream, now_ns},
    timed::Timed,
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, trial},
    wait::{wait_for, wait_until},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "burst::sixty_four_super_packets_at_once",
            NEEDS,
            sixty_four_super_packets_at_once,
        ),
        trial(
            "burst::eight_streams_lose_nothing",
            NEEDS,
            eight_streams_lose_nothing,
        ),
        trial(
            "burst::what_arrives_undelayed_is_not_lost",
            NEEDS,
            what_arrives_undelayed_is_not_lost,
        ),
        trial(
            "burst::a_flood_is_accounted_for",
            NEEDS,
            a_flood_is_accounted_for,
        ),
        trial(
            "burst::healing_under_load_loses_nothing",
            NEEDS,
            healing_under_load_loses_nothing,
        ),
    ]
}

/// Datagrams of one super-packet.
const SEGMENTS: u32 = 40;
/// Datagrams of a burst.
const COUNT: u32 = 64 * SEGMENTS;

/// Sends 64 super-packets at once, of which all arrive, in order.
fn burst_arrives(path: &Timed) -> Result<()> {
    // From one CPU: a veth hands over to the backlog of whatever CPU sends, which may overtake another's.
    on_one_cpu(|| path.send_super_packets(1..=COUNT, SEGMENTS as usize, 1400))?;
    let arrived = path.receive(
        COUNT as usize,
        Duration::from_millis(20),
        Duration::from_secs(20),
    )?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(1..=COUNT),
        "lost, doubled or out of order: {arrived:?}"
    );
    Ok(())
}

/// Super-packets of forty, both as they are and cut up, in both directions and families.
fn sixty_four_super_packets_at_once() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (direction, more, v6) in [
        ("egress", "", false),
        ("ingress", "", true),
        ("egress", "--loss 0.00000002%", true),
        ("ingress", "--loss 0.00000002%", false),
    ] {
        injector.add(&format!(
            "slow --netns {} --iface eth0 --direction {direction} --proto udp --dst-port 7000 --delay 100ms {more}",
            a.netns()
        ))?;
        let (from, to) = if direction == "egress" {
            (a, b)
        } else {
            (b, a)
        };
        let path = if v6 {
            Timed::v6(from, 6000, to, 7000)?
        } else {
            Timed::v4(from, 6000, to, 7000)?
        };
        burst_arrives(&path).with_context(|| format!("{direction} {more}, IPv6 {v6}"))?;
        let stats = injector.stats()?;
        let rule = stats.rule("slow")?;
        ensure!(
            rule.both(|one| one.delayed_packets) == u64::from(COUNT),
            "{rule:?}"
        );
        stats.lanes_lost_nothing()?;
        injector.heal("slow")?;
    }
    Ok(())
}

/// Eight streams with all that goes: every wire packet that TCP sent arrives, by its identification, and in order,
/// where what comes after the lane keeps it. Where each CPU has a queue of its own there, as a veth has, packets
/// overtake one another, which TCP answers by sending some again; what netem has of that is shown beside.
fn eight_streams_lose_nothing() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (name, port, more) in [("plain", 7001, ""), ("exact", 7002, "--loss 0.00000002%")] {
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --peer-port {port} --delay 20ms {more}",
            a.netns(),
            b.v4
        ))?;
    }
    eight_streams(a, b, false)?;
    b.ns.receive_on_one_cpu("eth0")?;
    eight_streams(a, b, true)?;
    let stats = injector.stats()?;
    for name in ["plain", "exact"] {
        let rule = stats.rule(name)?;
        ensure!(rule.egress.lost_packets == 0, "{rule:?}");
    }
    stats.lanes_lost_nothing()
}

fn eight_streams(a: &Node, b: &Node, in_order: bool) -> Result<()> {
    for (name, port) in [("plain", 7001), ("exact", 7002), ("netem", 7003)] {
        let netem = match name {
            "netem" => Some(Netem::on(&a.ns, "eth0", "delay 20ms")?),
            _ => None,
        };
        let capture = Capture::start(&b.ns, port)?;
        let before = Nstat::read(&a.ns)?;
        let transfer = Transfer {
            streams: 8,
            bytes: 2 << 20,
            within: Duration::from_mins(1),
            talks_back: false,
        };
        let (senders, taken) = transfer.run(a, b, port)?;
        let again = Nstat::read(&a.ns)?.since(&before, "TcpRetransSegs")?;
        let seen = capture.finish()?;
        // Not before: what it holds goes with it.
        drop(netem);
        let (mut packets, mut overtaken, mut missing) = (0, 0, 0);
        for sender in senders {
            let connection = seen
                .get(&sender.port())
                .with_context(|| format!("{name}: nothing of {sender} was seen"))?;
            packets += connection.last;
            overtaken += connection.overtaken;
            missing += connection.missing().len();
        }
        report(format!(
            "{name}, {}: {packets} wire packets in {:.1} s, {missing} lost, {overtaken} overtaken, {again} sent again",
            if in_order {
                "one backlog"
            } else {
                "a backlog to each CPU"
            },
            taken.as_secs_f64()
        ));
        ensure!(
            name == "netem" || missing == 0 && (!in_order || overtaken == 0),
            "{name}: of {packets} wire packets {missing} were lost, {overtaken} overtaken"
        );
    }
    Ok(())
}

/// What arrives and has nothing to wait for is cut up and comes back to the CPU's backlog within the interrupt in which
/// it came: eight streams, and 64 super-packets at once.
fn what_arrives_undelayed_is_not_lost() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    b.make_clsact()?;
    let injector = Lent::new()?;
    injector.add(&format!(
        "arriving --netns {} --iface eth0 --from {} --loss 0.00000002%",
        b.netns(),
        a.v4
    ))?;
    let dropped = backlog_drops()?;
    let transfer = Transfer {
        streams: 8,
        bytes: 4 << 20,
        within: Duration::from_mins(1),
        talks_back: false,
    };
    transfer.run(a, b, 7001)?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    burst_arrives(&path)?;
    let dropped = backlog_drops()? - dropped;
    ensure!(dropped == 0, "backlogs dropped {dropped} packets");
    let stats = injector.stats()?;
    let rule = stats.rule("arriving")?;
    // Of some 26,000 packets chance takes two in one run of 50,000 million.
    ensure!(
        rule.ingress.lost_packets <= 1 && rule.ingress.matched_packets > u64::from(COUNT),
        "{rule:?}"
    );
    stats.lanes_lost_nothing()?;
    injector.heal("arriving")
}

/// What an interface or a socket has no room for is counted by the kernel, what a lane has no room for by us:
/// what was sent is what arrived and what was counted.
fn a_flood_is_accounted_for() -> Result<()> {
    const FLOOD: Duration = Duration::from_secs(1);
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    for (name, delay, settings) in [
        ("flowing", "10ms", &[][..]),
        // Filling what a lane holds otherwise would take long.
        ("full", "1500ms", &["--lane-packets", "1000"]),
    ] {
        let injector = Injector::started(settings)?;
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --proto udp --delay {delay}",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        let before = (Nstat::read(&b.ns)?, a.dropped()?, backlog_drops()?);
        let lane = lane_drops(&injector)?;
        let sent = u64::from(path.flood(FLOOD, 64)?);
        let arrived = wait_for(
            "the flood is accounted for",
            Duration::from_secs(30),
            || {
                let after = Nstat::read(&b.ns)?;
                let arrived = after.since(&before.0, "UdpInDatagrams")?;
                let overflown = after.since(&before.0, "UdpRcvbufErrors")?;
                let device = a.dropped()? - before.1;
                let lane = lane_drops(&injector)? - lane;
                let counted = arrived + overflown + device + lane;
                ensure!(
                    counted <= sent,
                    "of {sent} sent {counted} are accounted for"
                );
                path.drain()?;
                Ok((counted == sent).then_some((arrived, overflown, device, lane)))
            },
        )
        .with_context(|| format!("{name}: {sent} sent"))?;
        let (arrived, overflown, device, lane) = arrived;
        report(format!(
            "{name}: {sent} sent, {arrived} arrived, {overflown} found the socket full, {device} the backlog \
             ({}), {lane} the lane",
            backlog_drops()? - before.2
        ));
        let stats = injector.stats()?;
        let rule = stats.rule(name)?;
        ensure!(
            rule.egress.matched_packets == sent && rule.egress.lost_packets == 0,
            "{rule:?}"
        );
        if name == "full" {
            ensure!(lane > 0, "nothing was too much for a lane of 1,000 packets");
        } else {
            stats.lanes_lost_nothing()?;
        }
        injector.json(&["heal", name])?;
    }
    Ok(())
}

/// What the queue and the devices of all lanes have dropped.
fn lane_drops(injector: &Injector) -> Result<u64> {
    let stats = injector.stats()?;
    Ok(stats
        .lanes
        .iter()
        .map(|lane| lane.full_packets + lane.dropped_packets + lane.device_drops)
        .sum())
}

/// Rules that lose nothing come and go while datagrams and TCP go on, and with them the lane.
fn healing_under_load_loses_nothing() -> Result<()> {
    const FAULTS: [&str; 6] = [
        "--stall 50ms --every 150ms",
        "--rate 50mbit --queue 5s",
        "--delay 30ms",
        "--delay 30ms --jitter 10ms --order free",
        "--delay 5ms --jitter 5ms --order keep --duplicate 5%",
        "--reorder 10% --hold 20ms",
    ];
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let stream = Stream::start(a, b, 7000, Duration::from_micros(500))?;
    let load = Load {
        streams: 2,
        offered: Some(10e6),
        lasting: Duration::from_secs(5),
    };
    let (rate, rounds) = thread::scope(|scope| {
        let running = scope.spawn(|| load.deliver(a, b, 7001));
        let mut rounds = 0;
        while !running.is_finished() || rounds < FAULTS.len() {
            injector.add(&format!(
                "now --netns {} --iface eth0 --to {} {}",
                a.netns(),
                b.v4,
                FAULTS[rounds % FAULTS.len()]
            ))?;
            stream.await_time(now_ns(), Duration::from_millis(60))?;
            injector.stats()?.lanes_lost_nothing()?;
            injector.heal("now")?;
            rounds += 1;
        }
        let rate = running.join().map_err(|_| anyhow!("the load panicked"))??;
        Ok::<_, anyhow::Error>((rate, rounds))
    })?;
    // What it holds is on its way until then.
    wait_until("the lane has gone", Duration::from_secs(20), || {
        let stats = injector.stats()?;
        stats.lanes_lost_nothing()?;
        Ok(stats.lanes.is_empty())
    })?;
    let shots = stream.finish()?;
    let lost = shots.iter().filter(|shot| !shot.arrived).count();
    report(format!(
        "{rounds} rules came and went; {:.1} Mbit/s, {lost} of {} datagrams lost",
        rate / 1e6,
        shots.len()
    ));
    ensure!(lost == 0, "{lost} of {} datagrams were lost", shots.len());
    Ok(())
}
