//! What a packet carries besides its bytes is there again when it comes back: mark, priority, `tc_index`, VLAN tag.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use injector::netlink::Hook;
use libtest_mimic::Trial;
use nix::sys::socket::{setsockopt, sockopt};
use tests::lab::{
    injector::Injector,
    lent::Lent,
    skb_field::{Field, require, require_nothing, set},
    timed::{Timed, delays},
    topology::Lab,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial("way_back::what_leaves", NEEDS, what_leaves),
        trial("way_back::what_arrives", NEEDS, what_arrives),
        trial(
            "way_back::what_has_no_way_back_is_counted",
            NEEDS,
            what_has_no_way_back_is_counted,
        ),
    ]
}

const COUNT: u32 = 20;
const DELAY_MS: f64 = 40.0;

/// All of them arrive, in order, and late. Those that lack a value are dropped behind the injector.
fn all_arrive(path: &Timed, what: &str) -> Result<()> {
    let sent = path.send(1..=COUNT, Duration::from_millis(1))?;
    let arrived = path
        .receive(COUNT as usize, Duration::ZERO, Duration::from_secs(5))
        .with_context(|| format!("{what} is not there any more"))?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(1..=COUNT)
            && delays(&sent, &arrived)
                .iter()
                .all(|delay| *delay >= DELAY_MS),
        "{what}: {:?}",
        delays(&sent, &arrived)
    );
    Ok(())
}

/// The interface goes while the lane, which another one's rule keeps, holds packets of it.
fn what_has_no_way_back_is_counted() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    for iface in ["eth0", "lo"] {
        injector.add(&format!(
            "slow-{iface} --netns {} --iface {iface} --to {} --proto udp --delay 3s",
            a.netns(),
            b.v4
        ))?;
    }
    let path = Timed::v4(a, 6000, b, 7000)?;
    path.send(1..=COUNT, Duration::ZERO)?;
    // One super-packet is as many as it would have become.
    path.send_super_packets(1..=30, 30, 1000)?;
    a.ns.tool("ip link delete eth0")?;
    wait_until("the packets are counted", Duration::from_secs(15), || {
        Ok(injector.stats()?.lane_losses.returns == u64::from(COUNT) + 30)
    })
}

/// By both ways: past the segmenter, and, with a chance of loss, where order is kept too.
const WAYS: [&str; 2] = ["--delay 40ms", "--delay 40ms --loss 0.00000002%"];

fn what_leaves() -> Result<()> {
    const MARK: u32 = 0xabcd_0042;
    const INDEX: u32 = 0x1234;
    for way in WAYS {
        let lab = Lab::steady_pair()?;
        let (a, b) = (lab.a(), lab.b());
        a.make_clsact()?;
        set(&a.ns, "eth0", Hook::Egress, 1, Field::TcIndex, INDEX)?;
        let injector = Lent::new()?;
        injector.add(&format!(
            "slow --netns {} --iface eth0 --to {} --proto udp {way}",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(a, 6000, b, 7000)?;
        setsockopt(path.sender(), sockopt::Mark, &MARK).context("SO_MARK")?;
        // Of these priorities 7 is the one that fq does not hold up to 6.6 (TC_PRIO_CONTROL), and 15 what stands for
        // it on the line.
        for (priority, field, value) in [
            (0, Field::Mark, MARK),
            (0, Field::TcIndex, INDEX),
            (7, Field::TcIndex, INDEX),
            (3, Field::Priority, 3),
            (7, Field::Priority, 7),
            (15, Field::Priority, 15),
            (0x1_0007, Field::Priority, 0x1_0007),
        ] {
            setsockopt(path.sender(), sockopt::Priority, &priority).context("SO_PRIORITY")?;
            require(&a.ns, "eth0", Hook::Egress, field, value)?;
            all_arrive(&path, &format!("{field:?} {value:#x}"))?;
            require_nothing(&a.ns, "eth0", Hook::Egress)?;
        }
        injector.stats()?.lanes_lost_nothing()?;
    }
    Ok(())
}

fn what_arrives() -> Result<()> {
    for way in WAYS {
        let lab = Lab::steady_pair()?;
        let (a, b) = (lab.a(), lab.b());
        a.make_clsact()?;
        for (node, last) in [(a, 1), (b, 2)] {
            node.ns
                .tool("ip link add link eth0 name eth0.5 type vlan id 5")?;
            node.ns
                .tool(&format!("ip addr add 10.99.5.{last}/24 dev eth0.5"))?;
            node.ns.tool("ip link set eth0.5 up")?;
        }
        let (mut to, mut from) = (a.clone(), b.clone());
        (to.v4, from.v4) = ([10, 99, 5, 1].into(), [10, 99, 5, 2].into());
        set(&a.ns, "eth0", Hook::Ingress, 1, Field::Mark, 0x42)?;
        set(&a.ns, "eth0", Hook::Ingress, 2, Field::TcIndex, 0x0321)?;
        let injector = Lent::new()?;
        injector.add(&format!(
            "slow --netns {} --iface eth0 --from {},{} --proto udp {way}",
            a.netns(),
            b.v4,
            from.v4
        ))?;
        let path = Timed::v4(b, 6000, a, 7000)?;
        for (field, value) in [(Field::Mark, 0x42), (Field::TcIndex, 0x0321)] {
            require(&a.ns, "eth0", Hook::Ingress, field, value)?;
            all_arrive(&path, &format!("{field:?} {value:#x}"))?;
            require_nothing(&a.ns, "eth0", Hook::Ingress)?;
        }
        let path = Timed::v4(&from, 6000, &to, 7001)?;
        // Neighbours are found before anything is required of packets.
        path.send([0], Duration::ZERO)?;
        path.receive(1, Duration::ZERO, Duration::from_secs(5))?;
        require(&a.ns, "eth0", Hook::Ingress, Field::VlanTci, 5)?;
        all_arrive(&path, "the VLAN tag")?;
        injector.stats()?.lanes_lost_nothing()?;
    }
    Ok(())
}
