//! What the kernel judges by time: lifetimes, flapping, and the lease, which ends every fault when the
//! daemon is stopped or dead.
//!
//! A steady stream of datagrams is the witness. Each one's fate was decided between the two times that
//! are kept with it, so a busy machine makes these tests vague in places, never wrong.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use tests::lab::{
    injector::{Injector, exit},
    stream::{Shot, Stream, now_ns},
    topology::Lab,
    transcript::{note, report},
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial("time::a_link_flaps_as_asked", NEEDS, a_link_flaps_as_asked),
        trial(
            "time::a_lifetime_ends_without_the_daemon",
            NEEDS,
            a_lifetime_ends_without_the_daemon,
        ),
        trial(
            "time::a_stopped_daemon_cuts_nobody_off",
            NEEDS,
            a_stopped_daemon_cuts_nobody_off,
        ),
        trial(
            "time::a_killed_daemon_cuts_nobody_off",
            NEEDS,
            a_killed_daemon_cuts_nobody_off,
        ),
        trial(
            "time::a_rule_without_effect_is_told_of",
            NEEDS,
            a_rule_without_effect_is_told_of,
        ),
    ]
}

const PORT: u16 = 7400;
const GAP: Duration = Duration::from_millis(1);
/// The kernel may judge by its coarse clock, which stands still for a tick (at most 10 ms).
const TICK: u64 = 10_000_000;
const PATIENCE: Duration = Duration::from_secs(20);

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn seconds(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64()
}

/// Whether a stream fits a link that, in cycles from `start` on, is up and then down; how many
/// datagrams say so, and the first that says otherwise.
fn fits(shots: &[Shot], start: u64, up: u64, down: u64) -> (usize, Option<Shot>) {
    let mut telling = 0;
    for shot in shots.iter().filter(|shot| shot.before >= start) {
        let place = |time: u64| (time - start) % (up + down);
        let (from, to) = (place(shot.before), place(shot.after));
        // Vague: decided within a tick of a change, or over a change.
        let near = |time: u64| time < TICK || time.abs_diff(up) < TICK || time + TICK > up + down;
        if near(from) || near(to) || (from < up) != (to < up) || shot.after - shot.before > TICK {
            continue;
        }
        telling += 1;
        if shot.arrived != (from < up) {
            return (telling, Some(*shot));
        }
    }
    (telling, None)
}

fn a_link_flaps_as_asked() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    let stream = Stream::start(lab.a(), lab.b(), PORT, GAP)?;
    stream.await_arrival(0, PATIENCE)?;
    let (up, down, phase) = (
        Duration::from_millis(500),
        Duration::from_millis(300),
        Duration::from_millis(200),
    );
    let asked = now_ns();
    injector.add(&format!(
        "flap --netns {} --iface eth0 --to {} --peer-port {PORT} --cut \
         --flap up=500ms,down=300ms,phase=200ms",
        lab.a().netns(),
        lab.b().v4
    ))?;
    let active = now_ns();
    stream.await_time(active, 5 * (up + down))?;
    let shots = stream.finish()?;
    let stats = injector.stats()?;
    let (up, down) = (nanos(up), nanos(down));
    // Activation lies between asking and being told; where, the stream itself says.
    let began = (asked..=active)
        .step_by(1_000_000)
        .map(|t| t - nanos(phase));
    let mut best = None;
    let mut contradiction = None;
    for start in began.clone() {
        match fits(&since(&shots, active), start, up, down) {
            (telling, None) => best = best.max(Some((telling, start))),
            (_, other) => contradiction = other,
        }
    }
    let Some((telling, start)) = best else {
        bail!("no beginning of the cycle fits what was seen, for instance {contradiction:?}");
    };
    report(format!(
        "{telling} datagrams of {} fit a cycle that began {:.3} s after asking (phase 0.2 s)",
        shots.len(),
        seconds(start + nanos(phase) - asked)
    ));
    ensure!(telling > 500, "only {telling} datagrams say anything");
    // Slightly other times do not fit.
    for (wrong_up, wrong_down) in [(up + 20 * TICK, down), (up, down + 20 * TICK), (down, up)] {
        ensure!(
            began.clone().all(
                |start| fits(&since(&shots, active), start, wrong_up, wrong_down)
                    .1
                    .is_some()
            ),
            "up {wrong_up} ns and down {wrong_down} ns would have passed too"
        );
    }
    let rule = stats.rule("flap")?.egress;
    ensure!(
        rule.off_packets > 0 && rule.cut_packets > 0 && rule.matched_packets >= rule.cut_packets,
        "counters: {rule:?}"
    );
    Ok(())
}

fn since(shots: &[Shot], time: u64) -> Vec<Shot> {
    shots
        .iter()
        .copied()
        .filter(|shot| shot.before >= time)
        .collect()
}

fn a_lifetime_ends_without_the_daemon() -> Result<()> {
    let lab = Lab::pair()?;
    // So long a lease that it has nothing to do with what is seen.
    let injector = Injector::started(&["--lease", "60s"])?;
    let stream = Stream::start(lab.a(), lab.b(), PORT, GAP)?;
    stream.await_arrival(0, PATIENCE)?;
    let lifetime = nanos(Duration::from_millis(1500));
    let asked = now_ns();
    injector.add(&format!(
        "brief --netns {} --iface eth0 --peer {} --peer-port {PORT} --cut --for 1500ms",
        lab.a().netns(),
        lab.b().v4
    ))?;
    let active = now_ns();
    injector.signal(Signal::SIGSTOP)?;
    stream.await_loss(active, 20, PATIENCE)?;
    let healthy = stream.await_arrival(active, PATIENCE)?;
    stream.await_time(healthy, Duration::from_millis(300))?;
    injector.signal(Signal::SIGCONT)?;
    let shots = stream.finish()?;
    report(format!(
        "cut at most {:.3} s after asking, healthy {:.3} s after asking, daemon stopped",
        seconds(active - asked),
        seconds(healthy - asked)
    ));
    for shot in &shots {
        let must_be_lost = shot.before > active && shot.after + TICK < asked + lifetime;
        let must_arrive = shot.after < asked || shot.before > active + lifetime + TICK;
        ensure!(
            !(must_be_lost && shot.arrived || must_arrive && !shot.arrived),
            "asked {asked}, active {active}, lifetime {lifetime}: {shot:?}"
        );
    }
    wait_until("the rule is listed as expired", PATIENCE, || {
        Ok(injector.stats()?.rule("brief")?.state == "expired")
    })?;
    Ok(())
}

const LEASE: Duration = Duration::from_secs(2);

/// Cuts, silences the daemon by a signal, and waits until the traffic is healthy; returns when the
/// signal was sent and all datagrams up to then.
fn lapse(lab: &Lab, injector: &Injector, signal: Signal) -> Result<(u64, u64, Vec<Shot>)> {
    let stream = Stream::start(lab.a(), lab.b(), PORT, GAP)?;
    stream.await_arrival(0, PATIENCE)?;
    injector.add(&format!(
        "held --netns {} --iface eth0 --peer {} --peer-port {PORT} --cut",
        lab.a().netns(),
        lab.b().v4
    ))?;
    let active = now_ns();
    // Longer than the lease, so that it has been renewed at least once.
    stream.await_time(active, LEASE + LEASE / 2)?;
    injector.ok(&["stats", "--expect-effect"])?;
    let silenced = now_ns();
    injector.signal(signal)?;
    // The daemon may have renewed the lease until here.
    let silent = now_ns();
    let healthy = stream.await_arrival(active, LEASE + PATIENCE)?;
    stream.await_time(healthy, Duration::from_millis(300))?;
    let shots = stream.finish()?;
    report(format!(
        "{signal}: healthy after {:.3} s of a lease of {LEASE:?}",
        seconds(healthy.saturating_sub(silenced))
    ));
    for shot in since(&shots, active) {
        let must_arrive = shot.before > silent + nanos(LEASE) + TICK;
        ensure!(
            shot.arrived || !must_arrive,
            "cut {:.3} s after the daemon fell silent",
            seconds(shot.before - silent)
        );
        let must_be_lost = shot.after < silenced;
        ensure!(
            !(shot.arrived && must_be_lost),
            "the lease lapsed while the daemon was well: {shot:?}"
        );
    }
    let filters = filters(lab)?;
    ensure!(
        filters.matches("injector:").count() >= 2,
        "the programs are no longer attached:\n{filters}"
    );
    Ok((silenced, healthy, shots))
}

/// All filters at the hooks of the first host's interface.
fn filters(lab: &Lab) -> Result<String> {
    let ns = &lab.a().ns;
    Ok(ns.tool("tc filter show dev eth0 egress")?.stdout
        + &ns.tool("tc filter show dev eth0 ingress")?.stdout)
}

fn a_stopped_daemon_cuts_nobody_off() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&["--lease", "2s"])?;
    let (silenced, _, shots) = lapse(&lab, &injector, Signal::SIGSTOP)?;
    let passed = shots
        .iter()
        .filter(|shot| shot.arrived && shot.before > silenced)
        .count();
    injector.signal(Signal::SIGCONT)?;
    wait_until("the lapse is noticed", PATIENCE, || {
        Ok(injector.stats()?.lapses >= 1)
    })?;
    let stats = injector.stats()?;
    let rule = stats.rule("held")?.egress;
    note(format!("{passed} datagrams passed in the lapse: {rule:?}"));
    ensure!(
        rule.lapsed_packets == u64::try_from(passed)?,
        "{passed} datagrams passed while the lease had lapsed, counted: {rule:?}"
    );
    let target = stats.target(lab.a().netns(), "eth0")?;
    ensure!(
        target.egress.lapsed_packets == rule.lapsed_packets,
        "the target counted differently: {target:?}"
    );
    let void = injector.run(&["stats", "--expect-effect"])?;
    ensure!(
        void.code() == Some(exit::NO_EFFECT),
        "a lapsed lease went unnoticed: {}",
        void.describe()
    );
    let events = injector.events()?;
    ensure!(
        events.iter().any(|event| event["kind"] == "lease_lapsed"),
        "no event of it: {events:?}"
    );
    Ok(())
}

fn a_killed_daemon_cuts_nobody_off() -> Result<()> {
    let lab = Lab::pair()?;
    let mut injector = Injector::started(&["--lease", "2s"])?;
    lapse(&lab, &injector, Signal::SIGKILL)?;
    injector.await_daemon_end(PATIENCE).map(drop)?;
    // The next one clears up and starts with nothing.
    injector.start_daemon(&[])?;
    let filters = filters(&lab)?;
    ensure!(
        !filters.contains("injector"),
        "the next start left filters:\n{filters}"
    );
    let rules = injector.json(&["list"])?;
    ensure!(
        rules["rules"].as_array().is_some_and(Vec::is_empty),
        "rules from nowhere: {rules}"
    );
    Ok(())
}

fn a_rule_without_effect_is_told_of() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    injector.add(&format!(
        "idle --netns {} --iface eth0 --peer 203.0.113.9 --cut",
        lab.a().netns()
    ))?;
    let void = injector.run(&["stats", "--expect-effect"])?;
    ensure!(
        void.code() == Some(exit::NO_EFFECT),
        "a rule that matched nothing went unnoticed: {}",
        void.describe()
    );
    ensure!(
        (void.stdout.clone() + &void.stderr).contains("idle"),
        "it is not named: {}",
        void.describe()
    );
    Ok(())
}
