//! A lane's life: held packets leave at their time after healing and are not overtaken, a dead daemon's lane is
//! harmless and goes with the next one, other traffic never enters.

use std::{thread, time::Duration};

use anyhow::{Result, anyhow, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use tests::lab::{
    frame::{Layer4, Packet, flag},
    injector::{Injector, Mode},
    lent::Lent,
    packet_socket::Sender,
    snapshot::Snapshot,
    timed::{Timed, delays},
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
    wait::{wait_for, wait_until},
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
            "life::a_flush_drops_what_its_rule_holds_and_nothing_else",
            NEEDS,
            a_flush_drops_what_its_rule_holds_and_nothing_else,
        ),
        trial(
            "life::a_busy_flow_that_leaves_the_lane_keeps_its_order",
            NEEDS,
            a_busy_flow_that_leaves_the_lane_keeps_its_order,
        ),
        trial(
            "life::a_flush_drops_copies_and_not_originals",
            NEEDS,
            a_flush_drops_copies_and_not_originals,
        ),
        trial(
            "life::a_flush_counts_segments_that_the_kernel_has_not_counted",
            NEEDS,
            a_flush_counts_segments_that_the_kernel_has_not_counted,
        ),
        trial(
            "life::order_is_kept_when_one_of_two_rules_ends",
            NEEDS,
            order_is_kept_when_one_of_two_rules_ends,
        ),
        trial(
            "life::a_lane_goes_when_it_is_empty",
            NEEDS,
            a_lane_goes_when_it_is_empty,
        ),
        trial(
            "life::a_killed_daemon_s_lane_is_harmless",
            NEEDS,
            a_killed_daemon_s_lane_is_harmless,
        ),
        trial(
            "life::a_damaged_lane_lets_packets_pass_and_is_made_anew",
            &[Need::Root, Need::Injector, Need::Tool("tc")],
            a_damaged_lane_lets_packets_pass_and_is_made_anew,
        ),
        trial(
            "life::other_traffic_never_enters",
            NEEDS,
            other_traffic_never_enters,
        ),
    ]
}

fn healing_lets_held_packets_leave_at_their_time() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let injector = Lent::new()?;
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
        injector.heal("slow")?;
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
            before.must_equal(&Snapshot::of(&a.ns)?).map(|()| true)
        })?;
    }
    Ok(())
}

/// Later packets of a flow go through the lane too while earlier ones are in it. A busy one leaves it in the middle of its
/// traffic, and on arrival its packets come back by the CPU's backlog, where the next ones are already.
fn a_busy_flow_that_leaves_the_lane_keeps_its_order() -> Result<()> {
    const COUNT: u32 = 12_000;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for direction in ["--from", "--to", "--from", "--from"] {
        let (from, to) = if direction == "--to" { (a, b) } else { (b, a) };
        let path = Timed::v4(from, 6000, to, 7000)?;
        injector.add(&format!(
            "slow --netns {} --iface eth0 {direction} {} --proto udp --delay 20ms",
            a.netns(),
            b.v4
        ))?;
        let left = thread::scope(|scope| {
            let sending = scope.spawn(|| path.send(1..=COUNT, Duration::from_micros(80)));
            injector.heal("slow")?;
            wait_until("the lane has gone", Duration::from_secs(20), || {
                Ok(injector.stats()?.lanes.is_empty())
            })?;
            let left = !sending.is_finished();
            sending
                .join()
                .map_err(|_| anyhow!("the sender panicked"))??;
            Ok::<_, anyhow::Error>(left)
        })?;
        let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(10))?;
        let overtaken = arrived.windows(2).find(|two| two[0].number > two[1].number);
        ensure!(
            overtaken.is_none(),
            "{direction}: a packet overtook an earlier one: {overtaken:?}"
        );
        report(format!(
            "{direction}: left the lane while it was busy: {left}"
        ));
    }
    Ok(())
}

/// Two rules, `slow` for short packets to three ports, `other` for all packets to three ports, two of them the same:
/// one flow for each, one for both, and one in which both hold the short packets and `other` alone the long ones.
fn a_flush_drops_what_its_rule_holds_and_nothing_else() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let injector = Lent::new()?;
    for egress in [true, false] {
        let direction = if egress { "--to" } else { "--from" };
        let (from, to) = if egress { (a, b) } else { (b, a) };
        let port = if egress {
            "--peer-port"
        } else {
            "--local-port"
        };
        let place = format!(
            "--netns {} --iface eth0 {direction} {} --proto udp",
            a.netns(),
            b.v4
        );
        // Numbered datagrams have 64 bytes, their IP packets 92.
        injector.add(&format!(
            "slow {place} {port} 7000,7002,7003 --length -100 --delay 4s"
        ))?;
        injector.add(&format!("other {place} {port} 7001,7002,7003 --delay 1s"))?;
        let path = |port: u16| Timed::v4(from, port - 1000, to, port);
        let (slow, other, both, mixed) = (path(7000)?, path(7001)?, path(7002)?, path(7003)?);
        let gap = Duration::from_millis(1);
        slow.send(1..=20, gap)?;
        let mut others = other.send(1..=20, gap)?;
        // Before the short ones, behind which they would wait.
        mixed.send_super_packets(101..=120, 1, 200)?;
        mixed.send(1..=20, gap)?;
        both.send(1..=20, gap)?;
        let healed = injector.heal_flush("slow")?;
        ensure!(
            healed["flushing"][0]["rule"] == "slow",
            "heal did not tell of the flush: {healed}"
        );
        // Flows that `slow` alone held go on at once; those under `other` wait for no longer than it says.
        let since = slow.send(21..=40, gap)?;
        others.extend(other.send(21..=40, gap)?);
        let afterwards = both.send(21..=40, gap)?;
        let deadline = Duration::from_secs(10);
        for (path, sent, name, least, most) in [
            (&slow, &since, "slow", 0.0, 1000.0),
            (&both, &afterwards, "both", 1000.0, 2000.0),
        ] {
            let arrived = path.receive(20, Duration::ZERO, deadline)?;
            let taken = delays(sent, &arrived);
            ensure!(
                arrived.iter().map(|one| one.number).eq(21..=40)
                    && taken.iter().all(|delay| (least..most).contains(delay)),
                "{direction} {name}: {arrived:?} after {taken:?}"
            );
        }
        let arrived = other.receive(40, Duration::ZERO, deadline)?;
        let taken = delays(&others, &arrived);
        ensure!(
            arrived.iter().map(|one| one.number).eq(1..=40)
                && taken.iter().all(|delay| (1000.0..2000.0).contains(delay)),
            "{direction} other: {arrived:?} after {taken:?}"
        );
        let arrived = mixed.receive(20, Duration::ZERO, deadline)?;
        ensure!(
            arrived.iter().map(|one| one.number).eq(101..=120),
            "{direction} mixed: {arrived:?}"
        );
        wait_until("the flush is over", deadline, || {
            Ok(injector.stats()?.flushes.is_empty())
        })?;
        let told = injector.flushed("slow")?;
        ensure!(
            told.len() == if egress { 1 } else { 2 }
                && told.iter().all(|message| message.contains(": 60 packets")),
            "{direction}: {told:?}"
        );
        for path in [&slow, &both, &mixed] {
            let late = path.receive(0, Duration::from_millis(100), deadline)?;
            ensure!(
                late.is_empty(),
                "{direction}: flushed packets arrived: {late:?}"
            );
        }
        injector.stats()?.lanes_lost_nothing()?;
        injector.heal("other")?;
        wait_until("the lane has gone", deadline, || {
            before.must_equal(&Snapshot::of(&a.ns)?).map(|()| true)
        })?;
    }
    Ok(())
}

fn a_flush_drops_copies_and_not_originals() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let place = format!(
        "--netns {} --iface eth0 --to {} --proto udp",
        a.netns(),
        b.v4
    );
    injector.add(&format!(
        "replay {place} --duplicate 100% --copy-delay 1500ms"
    ))?;
    injector.add(&format!(
        "echo {place} --duplicate 100% --copy-delay 1700ms"
    ))?;
    injector.add(&format!(
        "slow {place} --delay 500ms --jitter 10ms --order free"
    ))?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    let sent = path.send(1..=20, Duration::from_millis(1))?;
    injector.heal_flush("replay")?;
    dropped(&injector, "replay", 20)?;
    let mut arrived = path.receive(40, Duration::from_millis(300), Duration::from_secs(10))?;
    arrived.sort_by_key(|one| (one.at_ns, one.number));
    let taken = delays(&sent, &arrived);
    ensure!(
        arrived.len() == 40
            && taken[..20]
                .iter()
                .all(|delay| (480.0..1400.0).contains(delay))
            && taken[20..].iter().all(|delay| *delay > 2100.0),
        "{arrived:?} after {taken:?}"
    );
    injector.stats()?.lanes_lost_nothing()
}

/// Super-packets as virtual machines send them: in the lane as they came, and dropped at its exit.
fn a_flush_counts_segments_that_the_kernel_has_not_counted() -> Result<()> {
    const PACKETS: u32 = 5;
    const SEGMENTS: u64 = 3;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    injector.add(&format!(
        "slow --netns {} --iface eth0 --to {} --peer-port 7000 --proto tcp --delay 3s",
        a.netns(),
        b.v4
    ))?;
    let sender = Sender::open(&a.ns)?;
    for number in 1..=PACKETS {
        // Two segments of 1,000 bytes, and a last one of 960, which with the headers would be more.
        let frame = Packet::new(a.v4, b.v4, Layer4::Tcp(6000, 7000, flag::ACK))
            .length(20 + 20 + 2960)
            .frame(number);
        sender.send_uncounted(&frame, 1000)?;
    }
    let all = u64::from(PACKETS) * SEGMENTS;
    let matched = injector
        .stats()?
        .rule("slow")?
        .both(|one| one.matched_packets);
    ensure!(matched == all, "{matched} of {all} segments matched");
    injector.heal_flush("slow")?;
    dropped(&injector, "slow", all)
}

/// Waits until the flush of a rule is over, and it has dropped so many packets.
fn dropped(injector: &Lent, rule: &str, packets: u64) -> Result<()> {
    let told = wait_for("the flush is over", Duration::from_secs(10), || {
        Ok(Some(injector.flushed(rule)?).filter(|told| !told.is_empty()))
    })?;
    ensure!(
        told.len() == 1 && told[0].contains(&format!(": {packets} packets")),
        "not {packets} packets were dropped: {told:?}"
    );
    Ok(())
}

/// What stays is a rule that needs no lane by itself: later packets wait for held ones all the same.
fn order_is_kept_when_one_of_two_rules_ends() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for rule in ["slow --delay 900ms", "short --mtu-blackhole 1400"] {
        injector.add(&format!(
            "{rule} --netns {} --iface eth0 --to {} --proto udp",
            a.netns(),
            b.v4
        ))?;
    }
    let path = Timed::v4(a, 6000, b, 7000)?;
    path.send(1..=30, Duration::from_millis(1))?;
    injector.heal("slow")?;
    path.send(31..=60, Duration::from_millis(1))?;
    let arrived = path.receive(60, Duration::from_millis(50), Duration::from_secs(10))?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(1..=60),
        "packets overtook held ones, or were lost: {arrived:?}"
    );
    injector.stats()?.lanes_lost_nothing()
}

/// And not before; however long the rules that have ended could have held what was not sent.
fn a_lane_goes_when_it_is_empty() -> Result<()> {
    const COULD_HOLD: Duration = Duration::from_mins(2);
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let injector = Lent::new()?;
    for rule in [
        format!("long --peer-port 7001 --delay {}s", COULD_HOLD.as_secs()),
        "short --peer-port 7000 --delay 3s".to_owned(),
    ] {
        injector.add(&format!(
            "{rule} --netns {} --iface eth0 --to {} --proto udp",
            a.netns(),
            b.v4
        ))?;
    }
    let path = Timed::v4(a, 6000, b, 7000)?;
    path.send(1..=20, Duration::ZERO)?;
    injector.heal_all()?;
    let held = injector.stats()?.lanes;
    ensure!(
        held.len() == 1 && held[0].queued_packets == 20,
        "the lane has let go of what it holds: {held:?}"
    );
    let arrived = path.receive(20, Duration::ZERO, Duration::from_secs(10))?;
    ensure!(
        arrived.iter().map(|one| one.number).eq(1..=20),
        "what was held has not left in order: {arrived:?}"
    );
    wait_until("the lane has gone", Duration::from_secs(20), || {
        before.must_equal(&Snapshot::of(&a.ns)?).map(|()| true)
    })
}

fn a_killed_daemon_s_lane_is_harmless() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let mut injector = Injector::started(&["--lease", "1s"])?;
    injector.add(&format!(
        "slow --netns {} --iface eth0 --to {} --delay 1s --loss 10%",
        a.netns(),
        b.v4
    ))?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    path.send(1..=20, Duration::from_millis(1))?;
    injector.signal(Signal::SIGKILL)?;
    injector.kill_daemon()?;
    thread::sleep(Duration::from_millis(2500));
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
    ensure!(taken.iter().all(|delay| *delay < 1000.0), "{taken:?}");
    // The next daemon takes everything back.
    injector.start_daemon(&[])?;
    wait_until(
        "what was left behind has gone",
        Duration::from_secs(10),
        || before.must_equal(&Snapshot::of(&a.ns)?).map(|()| true),
    )
}

/// What somebody else may do to a lane, each as commands (`OTHER` is another namespace), with what the daemon says of it.
const DAMAGES: [(&[&str], &str); 7] = [
    (&["ip link delete inj-line"], "inj-line was deleted"),
    (
        &["ip link set inj-carrier down"],
        "inj-carrier was set down",
    ),
    (
        &[
            "ip link set inj-carrier down",
            "ip link set inj-carrier name somebodys",
        ],
        "inj-carrier was deleted, renamed or moved",
    ),
    (
        &["tc qdisc replace dev inj-line root pfifo"],
        "the queue of its device inj-line was replaced",
    ),
    (
        &["tc qdisc delete dev inj-carrier clsact"],
        "our filter on its device inj-carrier was removed",
    ),
    (
        &["tc qdisc delete dev inj-line clsact"],
        "our filter on its device inj-line was removed",
    ),
    (
        &["ip link set inj-carrier netns OTHER"],
        "inj-carrier was deleted, renamed or moved",
    ),
];

fn a_damaged_lane_lets_packets_pass_and_is_made_anew() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    // Not lent: a daemon whose lanes were damaged has lost packets.
    let injector = Injector::started(&[])?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    let slow = serde_json::json!({
        "name": "slow",
        "netns": a.netns(),
        "iface": ["eth0"],
        "dst": [b.v4.to_string()],
        "fault": {"delay": "800ms"},
    });
    let mut number = 0;
    // Twenty packets, and how long each took.
    let mut taken = || -> Result<Vec<f64>> {
        let numbers = number + 1..=number + 20;
        number += 20;
        let sent = path.send(numbers, Duration::from_millis(1))?;
        let arrived = path.receive(20, Duration::from_millis(20), Duration::from_secs(10))?;
        ensure!(arrived.len() == 20, "packets were lost: {arrived:?}");
        Ok(delays(&sent, &arrived))
    };
    for (commands, what) in DAMAGES {
        injector.apply(std::slice::from_ref(&slow), Mode::Add)?;
        let delayed = taken()?;
        ensure!(delayed.iter().all(|delay| *delay >= 800.0), "{delayed:?}");
        for command in commands {
            a.ns.tool(&command.replace("OTHER", b.netns()))?;
        }
        wait_until("the damage is noticed", Duration::from_secs(10), || {
            let list = injector.json(&["list"])?;
            let problem = list["rules"][0]["targets"][0]["problem"].as_str();
            // It may have been looked at between two commands.
            let between = commands.len() > 1 && problem.is_some_and(|one| one.contains("set down"));
            Ok(between || problem.is_some_and(|one| one.contains(what)))
        })?;
        let passing = taken()?;
        ensure!(
            passing.iter().all(|delay| *delay < 800.0),
            "{what}: packets wait in a damaged lane: {passing:?}"
        );
    }
    // The same rule again makes the last one anew, too, and nothing is left of any of them.
    injector.apply(std::slice::from_ref(&slow), Mode::Add)?;
    let delayed = taken()?;
    ensure!(delayed.iter().all(|delay| *delay >= 800.0), "{delayed:?}");
    injector.heal_all()?;
    wait_until("the lanes have gone", Duration::from_secs(10), || {
        before.must_equal(&Snapshot::of(&a.ns)?).map(|()| true)
    })
}

fn other_traffic_never_enters() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    injector.add(&format!(
        "slow --netns {} --iface eth0 --to {} --peer-port 7000 --delay 3s --jitter 100ms",
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
        taken.iter().all(|delay| *delay < 2000.0),
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
