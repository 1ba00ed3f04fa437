//! The lab itself: that its tools see what there is to see, without any injector. A test that trusts a
//! blind tool passes for the wrong reason.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    foreign,
    frame::{ETH_VLAN, Layer4, Packet, raw},
    packet_socket::{Receiver, Sender, on_one_cpu},
    snapshot::Snapshot,
    stream::{Stream, now_ns},
    topology::Lab,
    trial::{Need, trial},
    udp::Path,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Tool("tc"), Need::Tool("ip")];
    vec![
        trial(
            "machinery::a_lost_datagram_is_seen",
            NEEDS,
            a_lost_datagram_is_seen,
        ),
        trial(
            "machinery::a_receiver_sees_behind_the_ingress_hook",
            NEEDS,
            a_receiver_sees_behind_the_ingress_hook,
        ),
        trial(
            "machinery::a_stream_knows_when_a_fault_began_and_ended",
            NEEDS,
            a_stream_knows_when_a_fault_began_and_ended,
        ),
        trial(
            "machinery::a_snapshot_sees_every_kind_of_change",
            NEEDS,
            a_snapshot_sees_every_kind_of_change,
        ),
    ]
}

fn a_lost_datagram_is_seen() -> Result<()> {
    let lab = Lab::pair()?;
    for mut path in [
        Path::new(lab.a(), 7000, lab.b(), 7001)?,
        Path::new6(lab.a(), 7000, lab.b(), 7001)?,
    ] {
        let lost = path.lost(1..=500)?;
        ensure!(lost.is_empty(), "nothing was in the way of {lost:?}");
        let lost = path.lost_of_super_packets(501..=600, 10, 200)?;
        ensure!(lost.is_empty(), "nothing was in the way of {lost:?}");
    }
    // Every datagram of one flow, and no other.
    let mut path = Path::new(lab.a(), 7000, lab.b(), 7001)?;
    lab.b().ns.tool("nft add table inet t")?;
    lab.b()
        .ns
        .tool("nft add chain inet t c { type filter hook input priority 0 ; policy accept ; }")?;
    lab.b()
        .ns
        .tool("nft add rule inet t c udp dport 7001 drop")?;
    let lost = path.lost(1..=100)?;
    ensure!(lost.len() == 100, "not all were lost: {lost:?}");
    Ok(())
}

fn a_receiver_sees_behind_the_ingress_hook() -> Result<()> {
    let lab = Lab::pair_with_mtu(9000)?;
    let (a, b) = (lab.a(), lab.b());
    let sender = Sender::open(&a.ns)?;
    let receiver = Receiver::open(&b.ns)?;
    let tap = Receiver::tap(&b.ns)?;
    let udp = Packet::new(a.v4, b.v4, Layer4::Udp(1, 2));
    let frames = [
        udp.frame(1),
        udp.clone().length(6000).frame(2),
        udp.clone().tagged(&[(ETH_VLAN, 5)]).frame(3),
        Packet::new(a.v6, b.v6, Layer4::Udp(1, 2)).frame(4),
        raw(&[], frame_ethertype(), &[], 5),
        raw(&[], 0x0800, &[0x45, 0], 6),
    ];
    let send_all = || {
        on_one_cpu(|| {
            for frame in &frames {
                sender.send(frame)?;
            }
            sender.send(&raw(&[], 0x88b5, &[], 99))
        })
    };
    send_all()?;
    let arrivals = receiver.until(99, Duration::from_secs(10))?;
    let numbers: BTreeSet<u32> = arrivals.iter().map(|one| one.number).collect();
    ensure!(numbers == (1..=6).collect(), "arrived: {arrivals:?}");
    let tapped = tap.until(99, Duration::from_secs(10))?;
    let tagged = tapped.iter().find(|one| one.number == 3);
    ensure!(
        tagged.is_some_and(|one| one.tag == Some(5)),
        "the tag is not beside the packet: {tagged:?}"
    );
    // Dropped at the ingress hook, it must not be seen.
    foreign::clsact(&b.ns, "eth0")?;
    foreign::filter(&b.ns, "eth0", "ingress", 7, foreign::SHOT)?;
    send_all()?;
    let blind = receiver.until(99, Duration::from_millis(300));
    ensure!(blind.is_err(), "dropped at ingress and seen: {blind:?}");
    Ok(())
}

fn frame_ethertype() -> u16 {
    tests::lab::frame::ETH_EXPERIMENT_2
}

fn a_stream_knows_when_a_fault_began_and_ended() -> Result<()> {
    let lab = Lab::pair()?;
    foreign::clsact(&lab.b().ns, "eth0")?;
    let stream = Stream::start(lab.a(), lab.b(), 7000, Duration::from_millis(1))?;
    stream.await_arrival(0, Duration::from_secs(10))?;
    let before = now_ns();
    foreign::filter(&lab.b().ns, "eth0", "ingress", 7, foreign::SHOT)?;
    let cut = now_ns();
    stream.await_loss(cut, 20, Duration::from_secs(10))?;
    let healing = now_ns();
    lab.b().ns.tool("tc filter del dev eth0 ingress pref 7")?;
    let healed = now_ns();
    stream.await_arrival(healed, Duration::from_secs(10))?;
    for shot in stream.finish()? {
        let must_be_lost = shot.before > cut && shot.after < healing;
        let must_arrive = shot.after < before || shot.before > healed;
        ensure!(
            !(must_be_lost && shot.arrived || must_arrive && !shot.arrived),
            "cut from {before}..{cut} to {healing}..{healed}, but {shot:?}"
        );
    }
    Ok(())
}

fn a_snapshot_sees_every_kind_of_change() -> Result<()> {
    let lab = Lab::pair()?;
    let ns = &lab.a().ns;
    let first = Snapshot::of(ns)?;
    first.must_equal(&Snapshot::of(ns)?)?;
    for (change, part) in [
        ("tc qdisc add dev eth0 clsact", "qdiscs"),
        ("a filter", "filters"),
        ("ip link set eth0 mtu 1400", "links"),
        ("ip route add 203.0.113.0/24 dev eth0", "routes"),
        ("ip rule add fwmark 7 lookup 7", "rules"),
        ("ip -6 rule add fwmark 7 lookup 7", "rules v6"),
        ("sysctl -w net.ipv4.conf.eth0.accept_local=1", "sysctls"),
        ("ip addr add 203.0.113.1/32 dev lo", "addresses"),
    ] {
        let before = Snapshot::of(ns)?;
        if part == "filters" {
            foreign::filter(ns, "eth0", "egress", 3, foreign::UNSPEC)?;
        } else {
            ns.tool(change)?;
        }
        let after = Snapshot::of(ns)?;
        ensure!(
            before.part(part) != after.part(part),
            "{change} went unnoticed"
        );
    }
    Ok(())
}
