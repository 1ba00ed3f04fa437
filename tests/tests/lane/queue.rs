//! The queue in front of a line: how long it is, exactly; what it does to others; what it marks.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    counters::Nstat,
    lent::Lent,
    tcp,
    timed::{Timed, delays, median},
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "queue::it_holds_what_was_asked",
            NEEDS,
            it_holds_what_was_asked,
        ),
        trial(
            "queue::a_full_one_delays_who_shares_it_and_nobody_else",
            NEEDS,
            a_full_one_delays_who_shares_it_and_nobody_else,
        ),
        trial("queue::marks_are_seen", NEEDS, marks_are_seen),
        trial("queue::tcp_answers_to_marks", NEEDS, tcp_answers_to_marks),
    ]
}

/// A burst of sixty on a line where each takes 71 ms (142 bytes at 16 kbit/s): which ones find room does not depend
/// on how fast they were sent, within that time.
fn it_holds_what_was_asked() -> Result<()> {
    const SIZE: u16 = 100;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (queue, taken) in [
        // One on the line, twenty behind it.
        ("20p", 21),
        ("1p", 2),
        // Twenty of 142 bytes, the one on the line included.
        ("2840b", 20),
        // Half a packet less: the line sends two bytes a millisecond meanwhile.
        ("2770b", 19),
        // The fifteenth has its turn after 14 * 71 ms.
        ("1s", 15),
        // An idle line takes a packet in any case.
        ("1b", 1),
    ] {
        injector.add(&format!(
            "line --netns {} --iface eth0 --to {} --proto udp --rate 16kbit --queue {queue}",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        path.send_super_packets(1..=60, 60, SIZE)?;
        let stats = injector.stats()?;
        let rule = stats.rule("line")?;
        ensure!(
            rule.egress.queued_packets == taken && rule.egress.overflow_packets == 60 - taken,
            "{queue}: {rule:?}"
        );
        let count = usize::try_from(taken)?;
        let arrived = path.receive(count, Duration::from_millis(100), Duration::from_secs(10))?;
        ensure!(
            arrived
                .iter()
                .map(|one| u64::from(one.number))
                .eq(1..=taken),
            "{queue}: {arrived:?}"
        );
        report(format!("{queue}: {taken} of 60"));
        stats.lanes_lost_nothing()?;
        injector.heal("line")?;
    }
    Ok(())
}

fn a_full_one_delays_who_shares_it_and_nobody_else() -> Result<()> {
    const FLOOD: u32 = 400;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    injector.add(&format!(
        "line --netns {} --iface eth0 --to {} --peer-port 7000-7001 --rate 1mbit --queue 100ms",
        a.netns(),
        b.v4
    ))?;
    let flood = Timed::v4(a, 6000, b, 7000)?;
    let sharing = Timed::v4(a, 6001, b, 7001)?;
    let other = Timed::v4(a, 6002, b, 7002)?;
    let (probes, others) = std::thread::scope(|scope| {
        let flooding = scope.spawn(|| {
            // 10 ms each on the line, for 2.8 s: the queue is full after a quarter of a second.
            flood.send_sized(1..=FLOOD, 1208, Duration::from_millis(7))
        });
        wait_until("the queue is full", Duration::from_secs(5), || {
            Ok(injector.stats()?.rule("line")?.egress.overflow_packets > 0)
        })?;
        let mut probes = Vec::new();
        let mut others = Vec::new();
        for number in 1..=80 {
            probes.extend(sharing.send([number], Duration::ZERO)?);
            others.extend(other.send([number], Duration::ZERO)?);
            std::thread::sleep(Duration::from_millis(9));
        }
        flooding
            .join()
            .map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        anyhow::Ok((probes, others))
    })?;
    let quiet = Duration::from_millis(200);
    let flooded = flood.receive(1, quiet, Duration::from_secs(10))?;
    // Most find no room.
    let shared = sharing.receive(3, quiet, Duration::from_secs(10))?;
    let free = other.receive(80, quiet, Duration::from_secs(10))?;
    let waited = median(&delays(&probes, &shared));
    let unharmed = median(&delays(&others, &free));
    let stats = injector.stats()?;
    let rule = stats.rule("line")?;
    let queue = rule.realised("queue")?;
    report(format!(
        "{waited:.3} ms behind the flood, {unharmed:.3} ms beside it; {} of {FLOOD} and {} of 80 came; {queue:?}",
        flooded.len(),
        shared.len()
    ));
    ensure!(
        (86.0..112.0).contains(&waited),
        "a full queue of 100 ms took {waited} ms"
    );
    ensure!(
        unharmed < 10.0,
        "a flow that no rule is for waited {unharmed} ms"
    );
    let came = u64::try_from(flooded.len() + shared.len())?;
    ensure!(
        rule.egress.queued_packets == came
            && rule.egress.overflow_packets == u64::from(FLOOD) + 80 - came
            && rule.egress.overflow_packets > 30,
        "{came} came: {rule:?}"
    );
    let (p99, max) = (queue.p99.unwrap_or(0.0), queue.max.unwrap_or(0.0));
    ensure!(
        (0.088..=0.1).contains(&max) && (0.08..=0.1).contains(&p99),
        "the rule says otherwise: {queue:?}"
    );
    stats.lanes_lost_nothing()
}

const ECT_0: u8 = 2;
const CE: u8 = 3;

/// Packets of 142 bytes, 11.36 ms each at 100 kbit/s (20 bytes and 1.6 ms more with IPv6's longer header). The first
/// has its turn at once; one is marked if it waits for more than 50 ms.
fn marks_are_seen() -> Result<()> {
    const COUNT: u32 = 40;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (v6, class, super_packets) in [
        (false, ECT_0, false),
        (false, ECT_0, true),
        (true, ECT_0, false),
        (true, ECT_0, true),
        (false, 0, false),
        (true, 0, true),
    ] {
        let peer = if v6 {
            b.v6.to_string()
        } else {
            b.v4.to_string()
        };
        injector.add(&format!(
            "line --netns {} --iface eth0 --to {peer} --proto udp --rate 100kbit --queue 10s --ecn 50ms",
            a.netns()
        ))?;
        let path = if v6 {
            Timed::v6(a, 6000, b, 7000)?
        } else {
            Timed::v4(a, 6000, b, 7000)?
        };
        path.set_class(class)?;
        if super_packets {
            path.send_super_packets(1..=COUNT, COUNT as usize, 100)?;
        } else {
            path.send_sized(1..=COUNT, 100, Duration::ZERO)?;
        }
        let arrived = path.receive(
            COUNT as usize,
            Duration::from_millis(20),
            Duration::from_secs(10),
        )?;
        ensure!(arrived.len() == COUNT as usize, "{arrived:?}");
        let frame = if v6 { 162.0 } else { 142.0 };
        let marked = arrived.iter().filter(|one| one.class & 3 == CE).count();
        let stats = injector.stats()?;
        let counted = stats.rule("line")?.egress.marked_packets;
        report(format!(
            "IPv6 {v6}, class {class}, super-packets {super_packets}: {marked} marked, {counted} counted"
        ));
        ensure!(
            counted == u64::try_from(marked)?,
            "{counted} marked, {marked} seen"
        );
        if class == 0 {
            ensure!(
                arrived.iter().all(|one| one.class == 0),
                "packets that know nothing of ECN were changed: {arrived:?}"
            );
        } else {
            ensure!(
                arrived.iter().all(|one| one.class & !1 == ECT_0),
                "more than the mark was changed: {arrived:?}"
            );
            // Number n waits for the n - 1 before it, less the time that sending took.
            let first = arrived
                .iter()
                .find(|one| one.class == CE)
                .map_or(0, |one| one.number);
            let due = (0.05 / (frame * 8.0 / 1e5) + 2.0_f64).floor();
            ensure!(
                f64::from(first) >= due && f64::from(first) <= due + 3.0,
                "the first mark is on number {first}, due on {due}"
            );
            ensure!(
                arrived
                    .iter()
                    .all(|one| (one.class == CE) == (one.number >= first)),
                "{arrived:?}"
            );
        }
        stats.lanes_lost_nothing()?;
        injector.heal("line")?;
    }
    Ok(())
}

/// With ECN a stream keeps the queue short without losing a packet.
fn tcp_answers_to_marks() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    for node in [a, b] {
        node.ns.tool("sysctl -q -w net.ipv4.tcp_ecn=1")?;
    }
    let injector = Lent::new()?;
    injector.add(&format!(
        "line --netns {} --iface eth0 --to {} --proto tcp --rate 4mbit --queue 2s --ecn 5ms",
        a.netns(),
        b.v4
    ))?;
    let (sender, receiver) = (Nstat::read(&a.ns)?, Nstat::read(&b.ns)?);
    tcp::bulk(a, b, 7001, 5 << 18, Duration::from_mins(1))?;
    let marked = Nstat::read(&b.ns)?.since(&receiver, "IpExtInCEPkts")?;
    let told = Nstat::read(&a.ns)?;
    let (answered, again) = (
        told.since(&sender, "TcpExtTCPDeliveredCE")?,
        told.since(&sender, "TcpRetransSegs")?,
    );
    let stats = injector.stats()?;
    let rule = stats.rule("line")?;
    let queue = rule.realised("queue")?;
    report(format!(
        "{marked} packets came with a mark, of {answered} the sender was told, {again} sent again; {queue:?}"
    ));
    ensure!(
        marked > 0 && answered > 0,
        "no mark was seen: {marked}, {answered}"
    );
    ensure!(
        rule.egress.marked_packets >= marked && rule.egress.overflow_packets == 0,
        "{rule:?}"
    );
    ensure!(again == 0, "{again} segments were sent again");
    // Without an answer the queue would grow by megabytes, that is seconds.
    ensure!(
        queue.p90.unwrap_or(1.0) < 0.5,
        "the queue did not stay short: {queue:?}"
    );
    stats.lanes_lost_nothing()
}
