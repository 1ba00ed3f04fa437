//! Every kind of interface that a lane works on, and what cannot be had.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    counters::Transmitted,
    injector::Injector,
    lent::Lent,
    netns::Netns,
    tcp,
    timed::Timed,
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, trial},
    tun::Tun,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[
        Need::Root,
        Need::Injector,
        Need::Tool("ip"),
        Need::Tool("ping"),
        Need::Tool("ethtool"),
    ];
    vec![
        trial("kinds::veth", NEEDS, veth),
        trial("kinds::bridge_and_port", NEEDS, bridge_and_port),
        trial("kinds::vlan_and_parent", NEEDS, vlan_and_parent),
        trial("kinds::loopback", NEEDS, loopback),
        trial("kinds::dummy", NEEDS, dummy),
        trial("kinds::macvlan", NEEDS, macvlan),
        trial("kinds::bonds_in_bonds", NEEDS, bonds_in_bonds),
        trial(
            "kinds::what_has_no_ethernet_header",
            NEEDS,
            what_has_no_ethernet_header,
        ),
        trial(
            "kinds::what_has_no_ethernet_header_stays_out_of_a_lane",
            NEEDS,
            what_has_no_ethernet_header_stays_out_of_a_lane,
        ),
    ]
}

const ASKED_MS: f64 = 20.0;

/// The least round trip of three, in milliseconds.
fn round_trip(from: &Netns, to: &str) -> Result<f64> {
    let text = from.tool(&format!("ping -n -c 3 -i 0.2 -W 5 {to}"))?.stdout;
    // rtt min/avg/max/mdev = 20.1/20.2/20.3/0.1 ms
    let least = text
        .split(" = ")
        .nth(1)
        .and_then(|times| times.split('/').next())
        .and_then(|time| time.parse().ok());
    ensure!(text.contains(" 0% packet loss"), "{text}");
    least.with_context(|| format!("ping does not say how long it took: {text}"))
}

/// A round trip through `times` delays.
fn is_delayed(from: &Netns, to: &str, times: f64, what: &str) -> Result<()> {
    let took = round_trip(from, to)?;
    report(format!("{what}: {took} ms"));
    ensure!(
        took >= times * ASKED_MS && took < times * ASKED_MS + 60.0,
        "{what}: {took} ms, {times} times {ASKED_MS} ms were asked"
    );
    Ok(())
}

/// TCP in super-packets, and UDP in super-packets, intact and in order.
fn bulk_arrives(from: &Node, to: &Node) -> Result<()> {
    tcp::bulk(from, to, 7300, 4 << 20, Duration::from_secs(40))?;
    let path = Timed::v4(from, 6000, to, 7301)?;
    path.send_super_packets(1..=200, 40, 1000)?;
    let arrived = path.receive(200, Duration::ZERO, Duration::from_secs(10))?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(1..=200),
        "a UDP super-packet was not delivered whole and in order: {arrived:?}"
    );
    Ok(())
}

fn add(injector: &Lent, ns: &Netns, iface: &str, which: &str) -> Result<()> {
    injector
        .add(&format!(
            "slow --netns {} --iface {iface} {which} --delay {ASKED_MS}ms",
            ns.name()
        ))
        .map(drop)
}

fn heal(injector: &Lent) -> Result<()> {
    injector.stats()?.lanes_lost_nothing()?;
    injector.heal("slow")
}

fn veth() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for direction in ["--to", "--from"] {
        for (peer, name) in [(b.v4.to_string(), "IPv4"), (b.v6.to_string(), "IPv6")] {
            add(&injector, &a.ns, "eth0", &format!("{direction} {peer}"))?;
            is_delayed(&a.ns, &peer, 1.0, &format!("{direction} {name}"))?;
            let (from, to) = if direction == "--to" { (a, b) } else { (b, a) };
            bulk_arrives(from, to)?;
            heal(&injector)?;
        }
    }
    // ARP: the first packet waits for the answer, which waits itself.
    lab.free_neighbours()?;
    add(&injector, &a.ns, "eth0", "--proto arp --direction egress")?;
    a.ns.tool("ip neigh flush dev eth0")?;
    let text = a.ns.tool(&format!("ping -n -c 1 -W 5 {}", b.v4))?.stdout;
    let stats = injector.stats()?;
    let rule = stats.rule("slow")?;
    ensure!(
        rule.egress.delayed_packets >= 1,
        "no ARP packet was delayed: {rule:?}; {text}"
    );
    heal(&injector)
}

fn bridge_and_port() -> Result<()> {
    let lab = Lab::switched(2)?;
    let (a, b) = (lab.a(), lab.b());
    let switch = lab.switch()?;
    for port in ["p1", "p2"] {
        switch.receive_on_one_cpu(port)?;
    }
    a.ns.receive_on_one_cpu("eth0")?;
    b.ns.receive_on_one_cpu("eth0")?;
    switch.tool("tc qdisc add dev p1 clsact")?;
    let injector = Lent::new()?;
    for (direction, peer) in [("--dst", a.v4), ("--src", a.v4)] {
        add(&injector, switch, "p1", &format!("{direction} {peer}"))?;
        is_delayed(&b.ns, &a.v4.to_string(), 1.0, &format!("port, {direction}"))?;
        bulk_arrives(b, a)?;
        heal(&injector)?;
    }
    switch.tool("ip addr add 10.88.0.100/24 dev br0")?;
    switch.tool("tc qdisc add dev br0 clsact")?;
    for direction in ["--to", "--from"] {
        add(&injector, switch, "br0", &format!("{direction} {}", a.v4))?;
        is_delayed(
            switch,
            &a.v4.to_string(),
            1.0,
            &format!("bridge, {direction}"),
        )?;
        heal(&injector)?;
    }
    Ok(())
}

fn vlan_and_parent() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let (mut from, mut to) = (a.clone(), b.clone());
    (from.v4, to.v4) = (Ipv4Addr::new(10, 99, 5, 1), Ipv4Addr::new(10, 99, 5, 2));
    let injector = Lent::new()?;
    // Tags beside the packet, and within it where the device cannot insert them.
    for offload in ["on", "off"] {
        for node in [&from, &to] {
            node.ns.tool(&format!(
                "ethtool -K eth0 txvlan {offload} rxvlan {offload}"
            ))?;
            node.ns
                .tool("ip link add link eth0 name eth0.5 type vlan id 5")?;
            node.ns
                .tool(&format!("ip addr add {}/24 dev eth0.5", node.v4))?;
            node.ns.tool("ip link set eth0.5 up")?;
        }
        for iface in ["eth0.5", "eth0"] {
            for direction in ["--to", "--from"] {
                let what = format!("{iface}, tags beside the packet {offload}, {direction}");
                add(&injector, &a.ns, iface, &format!("{direction} {}", to.v4))?;
                is_delayed(&a.ns, &to.v4.to_string(), 1.0, &what)?;
                bulk_arrives(&from, &to).with_context(|| what.clone())?;
                heal(&injector).with_context(|| what)?;
            }
        }
        for node in [&from, &to] {
            node.ns.tool("ip link del eth0.5")?;
        }
    }
    Ok(())
}

fn loopback() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let a = lab.a();
    let injector = Lent::new()?;
    // Each packet leaves once and arrives once; the request and the answer both pass.
    for (which, times) in [
        ("--direction egress", 2.0),
        ("--direction ingress", 2.0),
        ("", 4.0),
    ] {
        add(
            &injector,
            &a.ns,
            "lo",
            &format!("--proto icmp,icmpv6 {which}"),
        )?;
        is_delayed(&a.ns, "127.0.0.1", times, &format!("IPv4 {which}"))?;
        is_delayed(&a.ns, "::1", times, &format!("IPv6 {which}"))?;
        heal(&injector)?;
    }
    Ok(())
}

/// What is sent into a dummy goes nowhere; there it is counted when it has come back from the lane.
fn dummy() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let ns = &lab.a().ns;
    ns.tool("ip link add dummy0 type dummy")?;
    ns.tool("ip addr add 10.99.7.1/24 dev dummy0")?;
    ns.tool("ip link set dummy0 up")?;
    ns.tool("ip neigh add 10.99.7.2 lladdr 02:00:00:00:00:02 dev dummy0")?;
    let injector = Lent::new()?;
    add(&injector, ns, "dummy0", "--to 10.99.7.2 --proto icmp")?;
    // Nobody answers.
    let _unanswered = ns.try_tool("ping -n -c 3 -i 0.2 -W 1 10.99.7.2")?;
    let stats = injector.stats()?;
    let target = stats.target(ns.name(), "dummy0")?;
    ensure!(
        // The kernel may say something of its own there (IPv6), which nothing is asked for.
        target.egress.lane_packets == 3
            && target.egress.passed_packets == target.egress.seen_packets,
        "{target:?}"
    );
    let sent = Transmitted::by(ns, "dummy0")?.packets;
    ensure!(sent >= 3, "the device sent {sent} packets");
    heal(&injector)
}

fn macvlan() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.ns.tool("ip link add link eth0 name mv0 type macvlan mode bridge")?;
    a.ns.tool("ip addr add 10.99.9.1/24 dev mv0")?;
    a.ns.tool("ip link set mv0 up")?;
    b.ns.tool("ip addr add 10.99.9.2/24 dev eth0")?;
    let (mut from, mut to) = (a.clone(), b.clone());
    (from.v4, to.v4) = (Ipv4Addr::new(10, 99, 9, 1), Ipv4Addr::new(10, 99, 9, 2));
    let injector = Lent::new()?;
    for direction in ["--to", "--from"] {
        add(&injector, &a.ns, "mv0", &format!("{direction} {}", to.v4))?;
        is_delayed(
            &a.ns,
            &to.v4.to_string(),
            1.0,
            &format!("macvlan, {direction}"),
        )?;
        bulk_arrives(&from, &to)?;
        heal(&injector)?;
    }
    Ok(())
}

/// The kernel sends through eight devices without queues within each other, and drops what is deeper
/// (`XMIT_RECURSION_LIMIT`, include/linux/netdevice.h); a lane takes four. What cannot enter passes, what cannot come back
/// is counted.
fn bonds_in_bonds() -> Result<()> {
    const PACKETS: u32 = 120;
    const DEEPEST: usize = 7;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    // Not lent: it loses packets.
    let injector = Injector::started(&[])?;
    let mut lower = "eth0".to_owned();
    for depth in 1..=DEEPEST {
        let bond = format!("bond{depth}");
        for command in [
            format!("link add {bond} type bond mode active-backup"),
            format!("addr flush dev {lower}"),
            format!("link set {lower} down"),
            format!("link set {lower} master {bond}"),
            format!("link set {bond} up"),
            format!("addr add {}/24 dev {bond}", a.v4),
        ] {
            a.ns.tool(&format!("ip {command}"))?;
        }
        lower = bond;
        if ![1, 4, 5, 6, DEEPEST].contains(&depth) {
            continue;
        }
        round_trip(&a.ns, &b.v4.to_string())?;
        for faults in [
            "--delay 20ms --loss 0.00000002%",
            // What waits for nothing leaves within the same transmissions.
            "--loss 0.00000002%",
        ] {
            let before = losses(&injector, &a.ns)?;
            injector.add(&format!(
                "faulted --netns {} --iface eth0 --to {} --proto udp {faults}",
                a.netns(),
                b.v4
            ))?;
            let path = Timed::v4(a, 6000, b, 7000)?;
            path.send_super_packets(1..=PACKETS, 40, 1000)?;
            let arrived = path.receive(0, Duration::from_secs(1), Duration::from_secs(10))?;
            let arrived = arrived.len() as u64;
            let target = injector.stats()?.target(a.netns(), "eth0")?.egress;
            let lost = losses(&injector, &a.ns)? - before;
            report(format!(
                "{depth} bonds, {faults}: {arrived} of {PACKETS} arrived, {lost} were lost on the way back, \
                 {} did not enter",
                target.lane_refused
            ));
            ensure!(
                arrived + lost == u64::from(PACKETS)
                    && (target.lane_refused > 0) == (depth == DEEPEST)
                    && (lost == 0 || [5, 6].contains(&depth))
                    && (arrived > 0 || !faults.starts_with("--delay")),
                "{depth} bonds, {faults}: {arrived} arrived, {lost} were lost: {target:?}"
            );
            injector.json(&["heal", "faulted"])?;
            path.drain()?;
        }
    }
    Ok(())
}

/// What was lost at the ends of a lane, and what the kernel did not send on behind the target's hook.
fn losses(injector: &Injector, ns: &Netns) -> Result<u64> {
    let lane = injector.stats()?.lane_losses;
    Ok(Transmitted::by(ns, "eth0")?.dropped + lane.entries + lane.returns)
}

fn what_has_no_ethernet_header() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let ns = &lab.a().ns;
    ns.tool("ip tuntap add dev tun0 mode tun")?;
    let injector = Lent::new()?;
    let refused = injector.run(&[
        "add",
        "slow",
        "--netns",
        ns.name(),
        "--iface",
        "tun0",
        "--to",
        "10.99.8.2",
        "--delay",
        "20ms",
    ])?;
    let said = &refused.stderr;
    ensure!(
        refused.code() == Some(5) && said.contains("have no Ethernet header"),
        "{refused:?}"
    );
    // Nothing was made for it.
    let links = ns.tool("ip -o link show")?.stdout;
    ensure!(!links.contains("inj-"), "{links}");
    Ok(())
}

/// A lane that another interface of the namespace has changes nothing for it.
fn what_has_no_ethernet_header_stays_out_of_a_lane() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let ns = &lab.a().ns;
    lab.a().make_clsact()?;
    let _tunnel = Tun::new(ns, "tun0")?;
    ns.tool("ip addr add 10.99.8.1/24 dev tun0")?;
    ns.tool("ip link set tun0 up")?;
    let injector = Lent::new()?;
    add(&injector, ns, "eth0", &format!("--to {}", lab.b().v4))?;
    injector.add(&format!(
        "odd --netns {} --iface tun0 --to 10.99.8.2 --proto icmp --drop-every 2",
        ns.name()
    ))?;
    // Nobody answers.
    let _unanswered = ns.try_tool("ping -n -c 4 -i 0.2 -W 1 10.99.8.2")?;
    let stats = injector.stats()?;
    let rule = stats.rule("odd")?;
    let target = stats.target(ns.name(), "tun0")?;
    ensure!(
        rule.egress.matched_packets == 4
            && rule.egress.cut_packets == 2
            && target.egress.lane_packets == 0
            && target.egress.lane_refused == 0,
        "{rule:?} {target:?}"
    );
    injector.heal("odd")?;
    heal(&injector)
}
