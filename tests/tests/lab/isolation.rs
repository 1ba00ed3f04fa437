//! What a rule must not touch: neighbours on the same interface, the operator's connection, protected
//! flows; and what must not be seen of a change: half of it.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tests::lab::{
    command,
    counters::{Nstat, backlog_drops},
    frame::{ETH_EXPERIMENT, Layer4, Packet, raw},
    injector::{Injector, Mode, TargetCounters},
    packet_socket::{Receiver, Sender, numbers, on_one_cpu},
    stream::now_ns,
    tcp,
    topology::{Lab, Node},
    transcript::{note, report},
    trial::{Need, trial},
    udp::Path,
    wait::wait_for,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    const NSTAT: &[Need] = &[Need::Root, Need::Injector, Need::Tool("nstat")];
    vec![
        trial(
            "isolation::neighbours_notice_nothing",
            NSTAT,
            neighbours_notice_nothing,
        ),
        trial(
            "isolation::a_thousand_rules_change_at_once",
            NEEDS,
            a_thousand_rules_change_at_once,
        ),
        trial("isolation::ten_thousand_peers", NEEDS, ten_thousand_peers),
        trial(
            "isolation::what_attaching_costs_is_told",
            NEEDS,
            what_attaching_costs_is_told,
        ),
        trial(
            "isolation::the_operator_is_not_cut_off",
            NEEDS,
            the_operator_is_not_cut_off,
        ),
        trial(
            "isolation::what_is_protected_is_left_alone",
            NEEDS,
            what_is_protected_is_left_alone,
        ),
    ]
}

/// Whether all that passed one hook was seen at the other, but for what a backlog has dropped.
fn arrived(passed: &TargetCounters, seen: &TargetCounters, drops: u64) -> bool {
    /// Wire packets in what it drops as one, at most.
    const SEGMENTS: u64 = 64;
    let lost = passed.passed_packets.checked_sub(seen.seen_packets);
    lost.is_some_and(|lost| (drops..=drops * SEGMENTS).contains(&lost))
}

/// While much is cut on an interface, the rest of its traffic loses nothing.
fn neighbours_notice_nothing() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let rules: Vec<Value> = [a, b]
        .iter()
        .map(|node| {
            json!({
                "name": format!("cut-{}", node.v4),
                "netns": node.netns(),
                "iface": ["eth0"],
                "peer_port": ["7100-7199"],
                "fault": {"cut": true},
            })
        })
        .collect();
    injector.apply(&rules, Mode::Replace)?;
    let drops = || Ok::<_, anyhow::Error>([a.dropped()?, b.dropped()?]);
    let before = (Nstat::read(&a.ns)?, Nstat::read(&b.ns)?, drops()?);
    let busy = AtomicBool::new(true);
    let (bulk, lost, cut) = thread::scope(|scope| {
        let busy = &busy;
        // What is cut, in great numbers.
        let cut = scope.spawn(move || -> Result<u32> {
            let mut path = Path::new(a, 7000, b, 7150)?;
            let mut cut = 0;
            while busy.load(Ordering::Relaxed) {
                let lost = path.lost(1..=200)?;
                ensure!(lost.len() == 200, "only {} of 200 were cut", lost.len());
                cut += 200;
            }
            Ok(cut)
        });
        let datagrams = scope.spawn(move || -> Result<u32> {
            let mut path = Path::new(a, 7001, b, 7250)?;
            let mut back = Path::new(b, 7002, a, 7251)?;
            let mut sent = 0;
            while busy.load(Ordering::Relaxed) {
                for path in [&mut path, &mut back] {
                    let lost = path.lost(1..=200)?;
                    ensure!(lost.is_empty(), "an unfaulted flow lost {lost:?}");
                    sent += 200;
                }
            }
            Ok(sent)
        });
        let bulk = (0..4)
            .map(|round| tcp::bulk(a, b, 5300 + round, 50 << 20, Duration::from_mins(1)))
            .collect::<Result<Vec<_>>>();
        busy.store(false, Ordering::Relaxed);
        let panicked = || anyhow!("a sender panicked");
        Ok::<_, anyhow::Error>((
            bulk?,
            datagrams.join().map_err(|_| panicked())??,
            cut.join().map_err(|_| panicked())??,
        ))
    })?;
    let after = (Nstat::read(&a.ns)?, Nstat::read(&b.ns)?);
    let retransmitted =
        after.0.since(&before.0, "TcpRetransSegs")? + after.1.since(&before.1, "TcpRetransSegs")?;
    let after_drops = drops()?;
    let [a_drops, b_drops] = [0, 1].map(|end| after_drops[end] - before.2[end]);
    report(format!(
        "{cut} datagrams cut beside {lost} that none was lost of and 4 x 50 MB of TCP ({bulk:.2?}), \
         {retransmitted} retransmissions"
    ));
    // TCP retransmits here without a loss: the backlogs of two CPUs reorder. What went missing shows
    // between the hook that a packet left through and the one that it arrived at.
    let counters = || -> Result<_> {
        let stats = injector.stats()?;
        let of = |node: &Node| stats.target(node.netns(), "eth0").cloned();
        Ok((of(a)?, of(b)?))
    };
    let conserved = wait_for("nothing is on its way", Duration::from_secs(10), || {
        let (a, b) = counters()?;
        let both_ways =
            arrived(&a.egress, &b.ingress, a_drops) && arrived(&b.egress, &a.ingress, b_drops);
        Ok(both_ways.then_some((a, b)))
    });
    let Ok((a, b)) = conserved else {
        bail!(
            "packets went missing between the hosts (the machine's own backlogs lost {a_drops} and {b_drops}): {:?}; {:?}",
            counters()?,
            after.0.grown(&before.0, "Tcp")
        );
    };
    for (hook, counters, cut) in [
        ("a's egress", a.egress, u64::from(cut)),
        ("a's ingress", a.ingress, 0),
        ("b's egress", b.egress, 0),
        ("b's ingress", b.ingress, 0),
    ] {
        ensure!(
            counters.seen_packets == counters.passed_packets + counters.cut_packets
                && counters.cut_packets == cut
                && counters.errors == 0
                && counters.table_full == 0,
            "{hook}, where {cut} were to be cut: {counters:?}"
        );
    }
    Ok(())
}

/// When a datagram was decided, and how.
#[derive(Debug, Clone, Copy)]
struct Decided {
    before: u64,
    after: u64,
    arrived: bool,
}

const RULES: u16 = 1000;
const FIRST: u16 = 10_000;

/// Rules for every port from `first` on.
fn thousand(lab: &Lab, first: u16) -> Vec<Value> {
    (first..first + RULES)
        .map(|port| {
            json!({
                "name": format!("rule-{port}"),
                "netns": lab.a().netns(),
                "iface": ["eth0"],
                "direction": "egress",
                "dst_port": [port.to_string()],
                "proto": ["udp"],
                "seed": 1,
                "fault": {"cut": true},
            })
        })
        .collect()
}

/// Two senders on two threads go round and round all ports while the rules change; every packet's fate
/// must be by the old rules up to one moment and by the new ones from then on.
fn a_thousand_rules_change_at_once() -> Result<()> {
    let lab = Lab::pair()?;
    lab.a().make_clsact()?;
    let injector = Injector::started(&[])?;
    // From no rules to a thousand, from these to a thousand others, and back to none.
    for (name, by_old, by_new) in [
        ("none to a thousand", (true, true), (false, true)),
        (
            "a thousand to a thousand others",
            (false, true),
            (true, false),
        ),
        ("a thousand to none", (true, false), (true, true)),
    ] {
        let samples = sample_while(&lab, || match name {
            "none to a thousand" => injector
                .apply(&thousand(&lab, FIRST), Mode::Replace)
                .map(drop),
            "a thousand to a thousand others" => injector
                .apply(&thousand(&lab, FIRST + RULES), Mode::Replace)
                .map(drop),
            _ => injector.heal_all().map(drop),
        })?;
        // `.0`: ports of the first thousand; `.1`: ports of the second.
        let mut last_old = 0;
        let mut first_new = u64::MAX;
        let (mut old, mut new) = (0, 0);
        for (in_first, decided) in &samples {
            let (expected_old, expected_new) = if *in_first {
                (by_old.0, by_new.0)
            } else {
                (by_old.1, by_new.1)
            };
            if expected_old == expected_new {
                ensure!(
                    decided.arrived == expected_old,
                    "{name}: a port that no change is about: {decided:?}"
                );
            } else if decided.arrived == expected_old {
                last_old = last_old.max(decided.before);
                old += 1;
            } else {
                first_new = first_new.min(decided.after);
                new += 1;
            }
        }
        report(format!(
            "{name}: {old} decided by the old rules, {new} by the new ones"
        ));
        ensure!(old > 100 && new > 100, "{name}: the change was not caught");
        ensure!(
            last_old <= first_new,
            "{name}: a packet begun {} ns after one was decided by the new rules was decided by the old ones",
            last_old - first_new
        );
    }
    Ok(())
}

/// Sends without pause on two threads, over all ports, around a change; whether each packet was to the
/// first thousand, and its fate.
fn sample_while(lab: &Lab, change: impl FnOnce() -> Result<()>) -> Result<Vec<(bool, Decided)>> {
    const THREADS: u32 = 2;
    /// Numbers of one thread.
    const SHARE: u32 = 1 << 28;
    let receiver = Receiver::open(&lab.b().ns)?;
    let stop = AtomicBool::new(false);
    let before = lab.a().dropped()?;
    let (sent, arrived) = thread::scope(|scope| -> Result<_> {
        let (stop, receiver) = (&stop, &receiver);
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || -> Result<Vec<(u16, u64, u64)>> {
                    let sender = Sender::open(&lab.a().ns)?;
                    let (a, b) = (lab.a().v4, lab.b().v4);
                    let mut sent = Vec::new();
                    on_one_cpu(|| {
                        for count in 0_u32.. {
                            if stop.load(Ordering::Relaxed) {
                                break;
                            }
                            // A stride that visits both thousands in turn.
                            let port = FIRST + u16::try_from((count * 1009 + thread) % 2000)?;
                            let packet = Packet::new(a, b, Layer4::Udp(7000, port));
                            let frame = packet.frame(thread * SHARE + count);
                            let before = now_ns();
                            sender.send(&frame)?;
                            sent.push((port, before, now_ns()));
                            if count % 64 == 0 {
                                // Leave the CPU to whoever makes the change.
                                thread::sleep(Duration::from_micros(300));
                            }
                        }
                        // What went before has arrived when this has.
                        sender.send(&raw(&[], ETH_EXPERIMENT, &[], thread * SHARE + SHARE - 1))
                    })?;
                    Ok(sent)
                })
            })
            .collect();
        let mut arrived = BTreeSet::new();
        thread::sleep(Duration::from_millis(50));
        let changed = change();
        thread::sleep(Duration::from_millis(50));
        stop.store(true, Ordering::Relaxed);
        let mut sent = Vec::new();
        for thread in threads {
            sent.push(thread.join().map_err(|_| anyhow!("a sender panicked"))??);
        }
        changed?;
        arrived.extend(numbers(&receiver.drain()?));
        for thread in 0..THREADS {
            let marker = thread * SHARE + SHARE - 1;
            if !arrived.contains(&marker) {
                arrived.extend(numbers(&receiver.until(marker, Duration::from_secs(10))?));
            }
        }
        Ok((sent, arrived))
    })?;
    let dropped = lab.a().dropped()? - before;
    ensure!(
        dropped == 0,
        "this machine's backlog lost {dropped} packets: the sample is void"
    );
    let mut samples = Vec::new();
    for (thread, sent) in (0_u32..).zip(sent) {
        for (count, (port, before, after)) in (0_u32..).zip(sent) {
            samples.push((
                port < FIRST + RULES,
                Decided {
                    before,
                    after,
                    arrived: arrived.contains(&(thread * SHARE + count)),
                },
            ));
        }
    }
    Ok(samples)
}

/// Making and deleting a clsact makes the kernel drop what is sent in that moment. Events tell how many; with
/// a clsact that was there before, there are none.
fn what_attaching_costs_is_told() -> Result<()> {
    for there_before in [false, true] {
        let lab = Lab::pair()?;
        let (a, b) = (lab.a(), lab.b());
        if there_before {
            a.make_clsact()?;
        }
        let injector = Injector::started(&[])?;
        let backlog = backlog_drops()?;
        let busy = AtomicBool::new(true);
        let lost = thread::scope(|scope| {
            let busy = &busy;
            let flood = scope.spawn(move || -> Result<u64> {
                let receiver = Receiver::open(&b.ns)?;
                let sender = Sender::open(&a.ns)?;
                let packet = Packet::new(a.v4, b.v4, Layer4::Udp(7000, 7001));
                let mut sent = 0;
                let mut arrived = BTreeSet::new();
                on_one_cpu(|| {
                    while busy.load(Ordering::Relaxed) {
                        sender.send(&packet.frame(sent))?;
                        sent += 1;
                        if sent % 1000 == 0 {
                            arrived.extend(numbers(&receiver.drain()?));
                        }
                    }
                    sender.send(&raw(&[], ETH_EXPERIMENT, &[], u32::MAX))
                })?;
                arrived.extend(numbers(&receiver.until(u32::MAX, Duration::from_secs(10))?));
                Ok(u64::from(sent) - u64::try_from(arrived.len())?)
            });
            let changed = (0..10).try_for_each(|_| {
                injector.add(&format!(
                    "other --netns {} --iface eth0 --peer-port 9999 --cut",
                    a.netns()
                ))?;
                injector.heal_all().map(drop)
            });
            busy.store(false, Ordering::Relaxed);
            let lost = flood.join().map_err(|_| anyhow!("the sender panicked"))??;
            changed.map(|()| lost)
        })?;
        // The machine's own backlog may overflow: that is nobody's doing here. A veth counts it as its own
        // drop, so events tell of it only where it fell into a change.
        let overflow = backlog_drops()? - backlog;
        let told = dropped_in_events(&injector.events()?)?;
        let seen = format!(
            "clsact there before: {there_before}; {lost} datagrams were lost, events tell of {told}, \
             backlogs dropped {overflow}"
        );
        report(&seen);
        let all_told = told <= lost && lost <= told + overflow;
        ensure!(all_told && (!there_before || lost <= overflow), "{seen}");
    }
    Ok(())
}

/// How many dropped packets the events tell of.
fn dropped_in_events(events: &[Value]) -> Result<u64> {
    let mut sum = 0;
    for event in events {
        let message = event["message"].as_str().context("an event says nothing")?;
        if let Some((_, rest)) = message.split_once("the kernel dropped ") {
            let number = rest.split(' ').next().unwrap_or_default();
            sum += number.parse::<u64>().context(message.to_owned())?;
        }
    }
    Ok(sum)
}

fn ten_thousand_peers() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    // Ten thousand hosts with gaps between them, and one exception.
    let peer = |index: u32| std::net::Ipv4Addr::from(0x0b00_0000 + index * 3);
    let peers: Vec<String> = (0..10_000).map(|index| peer(index).to_string()).collect();
    let output = injector.apply(
        &[json!({
            "name": "many",
            "netns": lab.a().netns(),
            "iface": ["eth0"],
            "direction": "egress",
            "peer": peers,
            "except": [peer(5000).to_string()],
            "fault": {"cut": true},
        })],
        Mode::Replace,
    )?;
    let answer: Value = serde_json::from_str(&output.stdout).context("apply printed no JSON")?;
    report(format!(
        "10,000 addresses: command {:.3} s, effect {:.1} ms",
        output.took.as_secs_f64(),
        answer["effect_ns"].as_f64().unwrap_or(0.0) / 1e6
    ));
    let sender = Sender::open(&lab.a().ns)?;
    let receiver = Receiver::open(&lab.b().ns)?;
    let mut expected = BTreeSet::new();
    on_one_cpu(|| {
        for index in (0..10_000).step_by(7).chain([0, 5000, 9999]) {
            for (number, address) in [
                (index * 2, peer(index)),
                (
                    index * 2 + 1,
                    std::net::Ipv4Addr::from(u32::from(peer(index)) + 1),
                ),
            ] {
                let packet = Packet::new(lab.a().v4, address, Layer4::Udp(7000, 7001));
                sender.send(&packet.frame(number))?;
                if number % 2 == 1 || index == 5000 {
                    expected.insert(number);
                }
            }
        }
        sender.send(&raw(&[], ETH_EXPERIMENT, &[], u32::MAX))
    })?;
    let arrived = numbers(&receiver.until(u32::MAX, Duration::from_secs(10))?);
    ensure!(
        arrived == expected,
        "wrong fates: {:?}",
        arrived.symmetric_difference(&expected)
    );
    Ok(())
}

/// Runs the CLI with this environment.
fn run_with(injector: &Injector, line: &str, environment: &[(&str, &str)]) -> Result<Value> {
    let mut words = vec!["--json"];
    words.extend(line.split_whitespace());
    let mut cli = injector.cli(&words);
    cli.envs(environment.iter().copied());
    let output = command::run(cli, command::DEADLINE)?.success()?;
    serde_json::from_str(&output.stdout).with_context(|| output.describe())
}

fn the_operator_is_not_cut_off() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let within = Duration::from_secs(10);
    // `b` is logged in on `a`: a connection from b's port to a's port 22, as sshd describes it.
    let listener = tcp::listen(&a.ns, a.at(22))?;
    let mut client = tcp::connect(&b.ns, a.at(22), within)?;
    let mut server = tcp::accept(&listener, within)?;
    let port = client.local_addr()?.port();
    let connection = format!("{} {port} {} 22", b.v4, a.v4);
    let mut other = tcp::Connection::open(a, b, 5400, within)?;
    let rule = format!("all --netns {} --iface eth0 --all-traffic --cut", a.netns());

    run_with(
        &injector,
        &format!("add {rule}"),
        &[("SSH_CONNECTION", &connection)],
    )?;
    let listed = injector.json(&["list"])?["protected"].to_string();
    report(format!("protected: {listed}"));
    ensure!(
        listed.contains(&port.to_string()) && listed.contains("22"),
        "list does not show the operator's connection: {listed}"
    );
    for _ in 0..3 {
        ensure!(
            tcp::pass(&mut client, &mut server, within)?
                && tcp::pass(&mut server, &mut client, within)?,
            "the operator is cut off"
        );
    }
    ensure!(!other.works(Duration::from_millis(200))?, "nothing is cut");
    injector.heal_all()?;
    ensure!(
        other.arrives(Duration::from_secs(30))?,
        "healed, and not healthy"
    );

    // sudo takes the variable away; a parent process still has it.
    let mut shell = std::process::Command::new("sh");
    let script = format!(
        "env -u SSH_CONNECTION -u SSH_CLIENT {} --state-dir {} add {rule}; true",
        tests::lab::injector::binary()?.display(),
        injector.state_dir().display()
    );
    shell
        .args(["-c", &script])
        .env("SSH_CONNECTION", &connection);
    command::run(shell, command::DEADLINE)?.success()?;
    ensure!(
        tcp::pass(&mut client, &mut server, within)?,
        "the operator is cut off when sudo hid the connection"
    );
    injector.heal_all()?;

    // Who asks for it is cut off.
    run_with(
        &injector,
        &format!("add {rule} --unprotected"),
        &[("SSH_CONNECTION", &connection)],
    )?;
    ensure!(
        !tcp::pass(&mut client, &mut server, Duration::from_millis(300))?,
        "--unprotected was not obeyed"
    );
    Ok(())
}

fn what_is_protected_is_left_alone() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    let injector = Injector::started(&[])?;
    let mut listed = [
        Path::new(a, 7000, b, 7010)?,
        Path::new(a, 7001, b, 7020)?,
        Path::new6(a, 7000, b, 7030)?,
    ];
    let fates = |listed: &mut [Path; 3], number: u32| -> Result<Vec<bool>> {
        listed
            .iter_mut()
            .map(|path| Ok(path.lost([number])?.is_empty()))
            .collect()
    };
    ensure!(fates(&mut listed, 1)? == [true; 3], "lost without a rule");
    injector.json(&["protect", "udp/7020"])?;
    injector.json(&["protect", &b.v6.to_string()])?;
    injector.add(&format!(
        "ports --netns {} --iface eth0 --peer-port 7010-7030 --cut",
        a.netns()
    ))?;
    let text = injector.json(&["list"])?["protected"].to_string();
    note(&text);
    ensure!(
        text.contains("7020") && text.contains(&b.v6.to_string()),
        "list does not show what is protected: {text}"
    );
    let found = fates(&mut listed, 2)?;
    ensure!(
        found == [false, true, true],
        "protected by port and by address: {found:?}"
    );
    // Taken off the list while the rule stands.
    injector.json(&["protect", "--remove", "udp/7020"])?;
    let found = fates(&mut listed, 3)?;
    ensure!(
        found == [false, false, true],
        "no longer protected: {found:?}"
    );
    injector.json(&["protect", "--remove", &b.v6.to_string()])?;
    let found = fates(&mut listed, 4)?;
    ensure!(found == [false; 3], "no longer protected: {found:?}");
    Ok(())
}
