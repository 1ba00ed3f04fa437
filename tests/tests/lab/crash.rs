//! The daemon killed with SIGKILL at random moments of starting, adding, changing and healing: nothing
//! is ever left after recovery, and nobody is ever cut off beyond the lease.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tests::lab::{
    injector::{Connection, Injector},
    moment::Commands,
    snapshot::Snapshot,
    stream::{Shot, Stream, now_ns},
    topology::Lab,
    transcript::{note, report},
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial("crash::killed_at_random_moments_1", NEEDS, || killed(1)),
        trial("crash::killed_at_random_moments_2", NEEDS, || killed(2)),
        trial("crash::killed_at_random_moments_3", NEEDS, || killed(3)),
        trial("crash::killed_at_random_moments_4", NEEDS, || killed(4)),
    ]
}

/// Kills per test; all tests together make at least a hundred. Ten times as many with `--full`.
const KILLS: u32 = 30;
const PORT: u16 = 7600;
const LEASE: Duration = Duration::from_secs(1);
/// The kernel's coarse clock, and the time between a signal and its effect.
const SLACK: u64 = 20_000_000;

/// When packets may have been lost: from the first command to a daemon until its death and the lease
/// after it, or recovery.
#[derive(Debug, Clone, Copy)]
struct Window {
    from: u64,
    to: u64,
}

fn killed(worker: u64) -> Result<()> {
    let seed = std::env::var("LAB_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| rand::rng().next_u64());
    report(format!("LAB_SEED={seed}"));
    let mut random = StdRng::seed_from_u64(seed.wrapping_add(worker));
    let lab = Lab::pair()?;
    // Of the two hosts one has a clsact that must stay, the other none.
    lab.a().make_clsact()?;
    let mut injector = Injector::new()?;
    let stream = Stream::start(lab.a(), lab.b(), PORT, Duration::from_millis(2))?;
    stream.await_arrival(0, Duration::from_secs(20))?;
    let before = [Snapshot::of(&lab.a().ns)?, Snapshot::of(&lab.b().ns)?];
    let kills = KILLS * tests::thoroughness();
    let mut windows = Vec::new();
    let began = Instant::now();
    for kill in 0..kills {
        let context = || format!("kill {kill}");
        if random.random_ratio(1, 6) {
            // While it starts: recovering, loading, listening.
            injector.launch_daemon(&["--lease", "1s"])?;
            pause(&mut random, 150);
            injector.kill_daemon().with_context(context)?;
        }
        injector
            .start_daemon(&["--lease", "1s"])
            .with_context(context)?;
        let recovered = now_ns();
        if let Some(Window { to, .. }) = windows.last_mut() {
            *to = recovered.min(*to);
        }
        nothing_is_left(&lab, &before, kill % 10 == 0).with_context(context)?;

        let from = now_ns();
        let netns = [lab.a().netns().to_owned(), lab.b().netns().to_owned()];
        let commands = Commands::give(&injector, random.next_u64(), move |connection, random| {
            command(connection, &netns, random)
        })?;
        commands.in_the_midst(6, &mut random)?;
        injector.kill_daemon().with_context(context)?;
        let dead = now_ns();
        windows.push(Window {
            from,
            to: dead + u64::try_from(LEASE.as_nanos())? + SLACK,
        });
        let done = commands.end()?;
        note(format!("kill {kill}: {done} commands were answered"));
        if kill % 10 == 5 {
            // Nobody comes to recover: the lease alone must do.
            stream
                .await_arrival(dead, LEASE + Duration::from_secs(5))
                .with_context(context)?;
            stream.await_time(dead, LEASE + Duration::from_millis(200))?;
        }
    }
    injector.start_daemon(&[])?;
    let recovered = now_ns();
    if let Some(Window { to, .. }) = windows.last_mut() {
        *to = recovered.min(*to);
    }
    nothing_is_left(&lab, &before, true)?;
    let shots = stream.finish()?;
    let lost: Vec<&Shot> = shots.iter().filter(|shot| !shot.arrived).collect();
    report(format!(
        "{kills} kills in {:.1} s; {} of {} datagrams lost, all while they might be",
        began.elapsed().as_secs_f64(),
        lost.len(),
        shots.len()
    ));
    for shot in &lost {
        ensure!(
            windows
                .iter()
                .any(|window| shot.after >= window.from && shot.before <= window.to),
            "lost when nothing may be lost: {shot:?}; windows {windows:?}"
        );
    }
    ensure!(
        !lost.is_empty(),
        "no rule was ever alive: nothing was tested"
    );
    Ok(())
}

/// A random moment within so many milliseconds.
fn pause(random: &mut StdRng, milliseconds: u64) {
    thread::sleep(Duration::from_micros(
        random.random_range(0..milliseconds * 1000),
    ));
}

fn nothing_is_left(lab: &Lab, before: &[Snapshot; 2], thorough: bool) -> Result<()> {
    for (node, before) in lab.nodes.iter().zip(before) {
        if thorough {
            before.must_equal(&Snapshot::of(&node.ns)?)?;
        } else {
            // Without a clsact no filter can be left at a hook.
            let qdiscs = node.ns.tool("tc qdisc show")?.stdout;
            ensure!(
                qdiscs == before.part("qdiscs"),
                "left on {}: {qdiscs}",
                node.netns()
            );
            for hook in ["egress", "ingress"] {
                let filters = node.ns.tool(&format!("tc filter show dev eth0 {hook}"))?;
                ensure!(
                    filters.stdout.is_empty(),
                    "left on {}: {}",
                    node.netns(),
                    filters.stdout
                );
            }
        }
    }
    Ok(())
}

/// One command; an error of the connection ends the game, a refusal of the daemon does not.
fn command(connection: &mut Connection, netns: &[String; 2], random: &mut StdRng) -> Result<()> {
    let (op, arguments) = match random.random_range(0..10) {
        0..=3 => (
            "add",
            json!({"rules": rules(netns, random, 3), "replace": true}),
        ),
        4..=6 => (
            "apply",
            json!({"rules": rules(netns, random, 40), "mode": "replace"}),
        ),
        7 | 8 => (
            "heal",
            json!({"names": [format!("rule-{}", random.random_range(0..40))]}),
        ),
        _ => ("heal", json!({"all": true})),
    };
    let line = json!({"v": 1, "id": 1, "op": op, "args": arguments}).to_string();
    connection.send_line(&line).map(drop)
}

/// Up to `most` random rules; the first of them is always about the stream.
fn rules(netns: &[String; 2], random: &mut StdRng, most: u32) -> Vec<Value> {
    (0..random.random_range(1..=most))
        .map(|number| {
            let on_stream = number == 0 || random.random_bool(0.2);
            let port = if on_stream {
                PORT
            } else {
                random.random_range(1..60_000)
            };
            let fault = match random.random_range(0..3) {
                0 => json!({"drop_every": random.random_range(1..5)}),
                _ => json!({"cut": true}),
            };
            json!({
                "name": format!("rule-{number}"),
                "netns": netns[random.random_range(0..2)],
                "iface": [if on_stream || random.random_bool(0.7) { "eth0" } else { "lo" }],
                "dst_port": [port.to_string()],
                "proto": ["udp"],
                "seed": 1,
                "fault": fault,
            })
        })
        .collect()
}
