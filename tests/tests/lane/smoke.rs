//! The least that must work on every kernel.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    lent::Lent,
    snapshot::Snapshot,
    timed::{Timed, delays},
    topology::Lab,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![trial(
        "smoke::packets_are_delayed_and_the_host_is_as_before",
        &[Need::Root, Need::Injector],
        packets_are_delayed_and_the_host_is_as_before,
    )]
}

fn packets_are_delayed_and_the_host_is_as_before() -> Result<()> {
    const ASKED: f64 = 30.0;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let injector = Lent::new()?;
    for direction in ["--to", "--from"] {
        injector.add(&format!(
            "slow --netns {} --iface eth0 {direction} {} --delay {ASKED}ms --loss 0.0001%",
            a.netns(),
            b.v4
        ))?;
        let path = if direction == "--to" {
            Timed::v4(a, 6000, b, 7000)?
        } else {
            Timed::v4(b, 6000, a, 7000)?
        };
        let sent = path.send(1..=50, Duration::from_millis(2))?;
        let arrived = path.receive(50, Duration::ZERO, Duration::from_secs(10))?;
        let taken = delays(&sent, &arrived);
        ensure!(
            taken.iter().all(|delay| *delay >= ASKED),
            "{direction}: a packet came too early: {taken:?}"
        );
        ensure!(
            arrived.is_sorted_by_key(|one| one.number),
            "{direction}: order was not kept: {arrived:?}"
        );
        let stats = injector.stats()?;
        let rule = stats.rule("slow")?;
        ensure!(
            rule.egress.delayed_packets + rule.ingress.delayed_packets == 50,
            "{rule:?}"
        );
        stats.lanes_lost_nothing()?;
        injector.heal("slow")?;
        wait_until("the host is as before", Duration::from_secs(5), || {
            Ok(before.must_equal(&Snapshot::of(&a.ns)?).is_ok())
        })?;
    }
    Ok(())
}
