//! A lane's life: held packets leave at their time after healing and are not overtaken, a dead daemon's lane is
//! harmless and goes with the next one, other traffic never enters.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use tests::lab::{
    injector::Injector,
    snapshot::Snapshot,
    timed::{Timed, delays},
    topology::Lab,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "life::healing_lets_held_packets_leave_at_their_time",
            NEEDS,
            healing_lets_held_packets_leave_at_their_time,
        ),
        trial(
            "life::a_killed_daemon_s_lane_is_harmless",
            NEEDS,
            a_killed_daemon_s_lane_is_harmless,
        ),
        trial(
            "life::other_traffic_never_enters",
            NEEDS,
            other_traffic_never_enters,
        ),
    ]
}

fn healing_lets_held_packets_leave_at_their_time() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let injector = Injector::started(&[])?;
    for egress in [true, false] {
        let direction = if egress { "--to" } else { "--from" };
        injector.add(&format!(
            "slow --netns {} --iface eth0 {direction} {} --delay 1500ms",
            a.netns(),
            b.v4
        ))?;
        let (from, to) = if egress { (a, b) } else { (b, a) };
        let path = Timed::v4(from, 6000, to, 7000)?;
        let mut sent = path.send(1..=50, Duration::from_millis(1))?;
        injector.json(&["heal", "slow"])?;
        sent.extend(path.send(51..=100, Duration::from_millis(1))?);
        let arrived = path.receive(100, Duration::from_millis(50), Duration::from_secs(10))?;
        ensure!(
            arrived.iter().map(|one| one.number).eq(1..=100),
            "{direction}: packets overtook held ones, or were lost: {arrived:?}"
        );
        let taken = delays(&sent, &arrived);
        ensure!(
            taken[..50].iter().all(|delay| *delay >= 1500.0),
            "{direction}: held packets left early: {taken:?}"
        );
        // A flow that had nothing held is not delayed any more.
        let other = if egress {
            Timed::v4(a, 6001, b, 7001)?
        } else {
            Timed::v4(b, 6001, a, 7001)?
        };
        let sent = other.send(1..=10, Duration::from_millis(1))?;
        let arrived = other.receive(10, Duration::ZERO, Duration::from_secs(5))?;
        let taken = delays(&sent, &arrived);
        ensure!(
            taken.iter().all(|delay| *delay < 1000.0),
            "{direction}: another flow is still delayed: {taken:?}"
        );
        wait_until("the lane has gone", Duration::from_secs(10), || {
            Ok(before.must_equal(&Snapshot::of(&a.ns)?).is_ok())
        })?;
    }
    Ok(())
}

fn a_killed_daemon_s_lane_is_harmless() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let mut injector = Injector::started(&["--lease", "1s"])?;
    injector.add(&format!(
        "slow --netns {} --iface eth0 --to {} --delay 300ms --loss 10%",
        a.netns(),
        b.v4
    ))?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    path.send(1..=20, Duration::from_millis(1))?;
    injector.signal(Signal::SIGKILL)?;
    injector.kill_daemon()?;
    std::thread::sleep(Duration::from_millis(1500));
    while !path
        .receive(0, Duration::from_millis(400), Duration::from_secs(5))?
        .is_empty()
    {}
    // The lease has lapsed: nothing is lost, nothing waits.
    let sent = path.send(101..=200, Duration::from_millis(1))?;
    let arrived = path.receive(100, Duration::from_millis(20), Duration::from_secs(5))?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(101..=200),
        "packets were lost after the lease had lapsed: {arrived:?}"
    );
    let taken = delays(&sent, &arrived);
    ensure!(taken.iter().all(|delay| *delay < 200.0), "{taken:?}");
    // The next daemon takes everything back.
    injector.start_daemon(&[])?;
    wait_until(
        "what was left behind has gone",
        Duration::from_secs(10),
        || Ok(before.must_equal(&Snapshot::of(&a.ns)?).is_ok()),
    )
}

fn other_traffic_never_enters() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Injector::started(&[])?;
    injector.add(&format!(
        "slow --netns {} --iface eth0 --to {} --peer-port 7000 --delay 500ms --jitter 100ms",
        a.netns(),
        b.v4
    ))?;
    let faulted = Timed::v4(a, 6000, b, 7000)?;
    let other = Timed::v4(a, 6001, b, 7001)?;
    faulted.send(1..=100, Duration::ZERO)?;
    let sent = other.send(1..=100, Duration::from_millis(1))?;
    let arrived = other.receive(100, Duration::ZERO, Duration::from_secs(5))?;
    let taken = delays(&sent, &arrived);
    ensure!(
        taken.iter().all(|delay| *delay < 200.0),
        "a flow that no rule is for waited: {taken:?}"
    );
    faulted.receive(100, Duration::ZERO, Duration::from_secs(10))?;
    let stats = injector.stats()?;
    let target = stats.target(a.netns(), "eth0")?;
    ensure!(
        target.egress.lane_packets == 100 && target.ingress.lane_packets == 0,
        "{target:?}"
    );
    stats.lanes_lost_nothing()
}
