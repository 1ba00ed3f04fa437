//! A path that loses what is too long and says nothing: with a lane, packet by packet, whatever they came in.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    counters::Nstat,
    lent::Lent,
    tcp,
    timed::Timed,
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial("mtu::longer_packets_vanish", NEEDS, longer_packets_vanish),
        trial("mtu::tcp_hangs_or_does_not", NEEDS, tcp_hangs_or_does_not),
    ]
}

/// In super-packets whose last datagram is shorter: it alone gets through.
fn longer_packets_vanish() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for v6 in [false, true] {
        let (peer, headers) = if v6 {
            (b.v6.to_string(), 48)
        } else {
            (b.v4.to_string(), 28)
        };
        injector.add(&format!(
            "hole --netns {} --iface eth0 --to {peer} --proto udp --mtu-blackhole 1400",
            a.netns()
        ))?;
        let path = if v6 {
            Timed::v6(a, 6000, b, 7000)?
        } else {
            Timed::v4(a, 6000, b, 7000)?
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
        ensure!(arrived == expected, "IPv6 {v6}: {arrived:?}");
        let stats = injector.stats()?;
        let rule = stats.rule("hole")?;
        ensure!(
            rule.egress.too_long_packets == 11 && rule.egress.excess_packets == 0,
            "{rule:?}"
        );
        stats.lanes_lost_nothing()?;
        injector.heal("hole")?;
    }
    Ok(())
}

fn tcp_hangs_or_does_not() -> Result<()> {
    const BYTES: usize = 2 << 20;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    injector.add(&format!(
        "hole --netns {} --iface eth0 --to {} --proto tcp --mtu-blackhole 1400",
        a.netns(),
        b.v4
    ))?;
    let before = Nstat::read(&a.ns)?;
    let hangs = tcp::bulk(a, b, 7001, BYTES, Duration::from_secs(2));
    ensure!(hangs.is_err(), "segments of 1500 bytes got through 1400");
    let after = Nstat::read(&a.ns)?;
    ensure!(
        after.since(&before, "IcmpInDestUnreachs")? == 0,
        "somebody told the sender"
    );
    let stats = injector.stats()?;
    ensure!(stats.rule("hole")?.egress.too_long_packets > 0, "{stats:?}");
    // Segments that fit, in super-packets that are far longer.
    a.ns.tool(&format!(
        "ip route add {}/32 dev eth0 advmss 1300 mtu 1380",
        b.v4
    ))?;
    let taken = tcp::bulk(a, b, 7002, BYTES, Duration::from_secs(20))?;
    let stats = injector.stats()?;
    let again = Nstat::read(&a.ns)?.since(&after, "TcpRetransSegs")?;
    report(format!(
        "with a path MTU of 1380 in {taken:?}, {again} segments sent again"
    ));
    let lane = stats.target(a.netns(), "eth0")?.egress.lane_packets;
    ensure!(lane > 0, "no super-packet was among them");
    stats.lanes_lost_nothing()
}
