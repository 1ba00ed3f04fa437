//! Loss of what is longer than an MTU, which needs no lane: super-packets of segments that fit pass, others go whole.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    injector::Injector,
    timed::Timed,
    topology::Lab,
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![trial(
        "mtu::longer_packets_vanish",
        &[Need::Root, Need::Injector],
        longer_packets_vanish,
    )]
}

fn longer_packets_vanish() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Injector::started(&[])?;
    for (direction, v6) in [("egress", false), ("egress", true), ("ingress", false)] {
        let headers = if v6 { 48 } else { 28 };
        let peer = if v6 {
            b.v6.to_string()
        } else {
            b.v4.to_string()
        };
        injector.add(&format!(
            "hole --netns {} --iface eth0 --direction {direction} --peer {peer} --proto udp --mtu-blackhole 1400",
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
        let fits = 1400 - headers;
        path.send_sized([1], fits, Duration::ZERO)?;
        path.send_sized([2], fits + 1, Duration::ZERO)?;
        path.send_super_packets(11..=20, 10, u16::try_from(fits)?)?;
        path.send_super_packets(21..=30, 10, u16::try_from(fits + 1)?)?;
        path.send_sized([31], 64, Duration::ZERO)?;
        let arrived: Vec<u32> = path
            .receive(12, Duration::from_millis(100), Duration::from_secs(10))?
            .iter()
            .map(|one| one.number)
            .collect();
        let expected: Vec<u32> = [1].into_iter().chain(11..=20).chain([31]).collect();
        ensure!(arrived == expected, "{direction}, IPv6 {v6}: {arrived:?}");
        let stats = injector.stats()?;
        let rule = stats.rule("hole")?;
        let counters = if direction == "egress" {
            rule.egress
        } else {
            rule.ingress
        };
        ensure!(
            counters.too_long_packets == 11
                && counters.excess_packets == 0
                && counters.matched_packets == 23,
            "{rule:?}"
        );
        injector.json(&["heal", "hole"])?;
    }
    Ok(())
}
