//! Silence: who sends into a cut is not told by its own host, and TCP takes it for a loss on the way.
//!
//! Each test is also told with a loud drop of the same packets (`TC_ACT_SHOT`), and must notice it.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    counters::Nstat,
    foreign,
    injector::Injector,
    tcp,
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
    udp::{self, Told, drain, send_asking_for_errors},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    const NSTAT: &[Need] = &[
        Need::Root,
        Need::Injector,
        Need::Tool("tc"),
        Need::Tool("nstat"),
    ];
    vec![
        trial(
            "silence::a_udp_sender_is_told_nothing",
            NEEDS,
            a_udp_sender_is_told_nothing,
        ),
        trial(
            "silence::tcp_retransmits_what_is_dropped_now_and_then",
            NSTAT,
            tcp_retransmits_what_is_dropped_now_and_then,
        ),
        trial(
            "silence::tcp_keeps_retransmitting_into_a_cut",
            NSTAT,
            tcp_keeps_retransmitting_into_a_cut,
        ),
    ]
}

fn a_udp_sender_is_told_nothing() -> Result<()> {
    const COUNT: u32 = 200;
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let receiver = udp::socket(&b.ns, b.at(7000))?;
    receiver.set_nonblocking(true)?;
    let arrived = || -> Result<usize> { Ok(drain(&receiver)?.len()) };
    let nothing = Told {
        accepted: COUNT,
        ..Told::default()
    };

    let told = send_asking_for_errors(a, b.at(7000), COUNT)?;
    ensure!(told == nothing, "errors without any fault: {told:?}");
    wait_until("all datagrams arrive", Duration::from_secs(5), {
        let mut total = 0;
        move || {
            total += arrived()?;
            Ok(total == COUNT as usize)
        }
    })?;

    for hook in ["egress", "ingress"] {
        let place = if hook == "egress" {
            format!("--netns {} --to {}", a.netns(), b.v4)
        } else {
            format!("--netns {} --from {}", b.netns(), a.v4)
        };
        injector.add(&format!("silent {place} --iface eth0 --proto udp --cut"))?;
        let told = send_asking_for_errors(a, b.at(7000), COUNT)?;
        report(format!("cut at {hook}: {told:?}"));
        ensure!(told == nothing, "the sender was told of its cut: {told:?}");
        let stats = injector.stats()?;
        let rule = stats.rule("silent")?;
        let counters = if hook == "egress" {
            rule.egress
        } else {
            rule.ingress
        };
        ensure!(
            counters.cut_packets == u64::from(COUNT)
                && counters.matched_packets == u64::from(COUNT),
            "not all was cut at {hook}: {rule:?}"
        );
        injector.json(&["heal", "silent"])?;
    }
    // All that was cut on its way would have been here before what is sent now.
    let told = send_asking_for_errors(a, b.at(7000), 1)?;
    ensure!(told.accepted == 1, "after healing: {told:?}");
    let mut after = Vec::new();
    wait_until("a datagram after healing", Duration::from_secs(5), || {
        after.extend(drain(&receiver)?);
        Ok(!after.is_empty())
    })?;
    ensure!(after.len() == 1, "cut datagrams arrived: {after:?}");

    // The same sender hears of a loud drop.
    foreign::clsact(&a.ns, "eth0")?;
    foreign::filter(&a.ns, "eth0", "egress", 1, foreign::SHOT)?;
    let told = send_asking_for_errors(a, b.at(7000), COUNT)?;
    report(format!("dropped loudly: {told:?}"));
    ensure!(
        told.refused.get("ENOBUFS: No buffer space available") == Some(&COUNT),
        "this sender would not have noticed a loud drop: {told:?}"
    );
    Ok(())
}

/// What TCP made of a transfer over a lossy way.
#[derive(Debug)]
struct Account {
    lost: u64,
    retransmitted: u64,
    failed: u64,
}

/// Segments sent again that the receiver had not had before: two CPUs' backlogs reorder, and TCP then sends
/// again what was only late, which the receiver tells it of (DSACK, RFC 2883).
fn needed(before: &Nstat, after: &Nstat) -> Result<u64> {
    let spurious = after.since(before, "TcpExtTCPDSACKRecvSegs")?;
    Ok(after
        .since(before, "TcpRetransSegs")?
        .saturating_sub(spurious))
}

fn tcp_retransmits_what_is_dropped_now_and_then() -> Result<()> {
    const BYTES: usize = 40 << 20;
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let within = Duration::from_mins(1);
    injector.add(&format!(
        "lossy --netns {} --iface eth0 --to {} --peer-port 5001 --proto tcp --drop-every 400",
        a.netns(),
        b.v4
    ))?;
    let before = Nstat::read(&a.ns)?;
    let took = tcp::bulk(a, b, 5001, BYTES, within)?;
    let after = Nstat::read(&a.ns)?;
    let stats = injector.stats()?;
    let rule = stats.rule("lossy")?.egress;
    let silent = Account {
        lost: rule.cut_packets + rule.excess_packets,
        retransmitted: needed(&before, &after)?,
        failed: after.since(&before, "TcpExtTCPRetransFail")?,
    };
    report(format!(
        "every 400th wire packet, {took:.2?}: {silent:?}, {} of them for sharing a super-packet; {:?}",
        rule.excess_packets,
        after.grown(&before, "Retrans")
    ));
    // Every segment that was lost is sent again at least once, or the transfer would not have ended.
    // The one that only carries FIN may still be on its way.
    ensure!(silent.lost > 20, "hardly anything was lost: {silent:?}");
    ensure!(
        silent.retransmitted + 1 >= silent.lost,
        "some losses were excused as local: {silent:?}"
    );
    ensure!(
        silent.failed == 0,
        "a retransmission failed locally: {silent:?}"
    );
    injector.heal_all()?;

    // Dropped loudly, TCP hardly counts a retransmission: the comparison above would fail.
    foreign::clsact(&a.ns, "eth0")?;
    foreign::drop_at_random(&a.ns, "eth0", 1, u32::MAX / 4)?;
    let before = Nstat::read(&a.ns)?;
    tcp::bulk(a, b, 5002, BYTES, within)?;
    let after = Nstat::read(&a.ns)?;
    let loud = Account {
        lost: foreign::loud_drops(&a.ns, "eth0")?,
        retransmitted: needed(&before, &after)?,
        failed: after.since(&before, "TcpExtTCPRetransFail")?,
    };
    report(format!("dropped loudly: {loud:?}"));
    ensure!(
        loud.retransmitted + 1 < loud.lost,
        "this test would not have noticed a loud drop: {loud:?}"
    );
    Ok(())
}

fn tcp_keeps_retransmitting_into_a_cut() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let mut connection = tcp::Connection::open(a, b, 5003, Duration::from_secs(10))?;
    ensure!(
        connection.works(Duration::from_secs(5))?,
        "a connection without any fault does not work"
    );
    injector.add(&format!(
        "cut --netns {} --iface eth0 --peer {} --peer-port 5003 --cut",
        a.netns(),
        b.v4
    ))?;
    let before = Nstat::read(&a.ns)?;
    ensure!(
        !connection.works(Duration::from_millis(300))?,
        "bytes crossed a cut"
    );
    wait_until(
        "TCP retransmits and times out",
        Duration::from_secs(20),
        || {
            let now = Nstat::read(&a.ns)?;
            Ok(now.since(&before, "TcpRetransSegs")? >= 3
                && now.since(&before, "TcpExtTCPTimeouts")? >= 2)
        },
    )?;
    // Read together: the counters of TCP before the rule's, so that none is missing there.
    let after = Nstat::read(&a.ns)?;
    let stats = injector.stats()?;
    let retransmitted = after.since(&before, "TcpRetransSegs")?;
    let failed = after.since(&before, "TcpExtTCPRetransFail")?;
    let cut = stats.rule("cut")?.egress.cut_packets;
    report(format!(
        "{retransmitted} retransmissions, {cut} packets cut, {failed} failed locally; {:?}",
        after.grown(&before, "Timeouts")
    ));
    ensure!(failed == 0, "retransmissions failed locally");
    ensure!(
        cut > retransmitted,
        "the first packet and {retransmitted} retransmissions were sent, {cut} were cut"
    );
    injector.json(&["heal", "cut"])?;
    // What was sent into the cut arrives now.
    ensure!(
        connection.arrives(Duration::from_secs(30))?,
        "healed, and the connection does not recover"
    );
    Ok(())
}
