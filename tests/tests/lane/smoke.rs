//! The least that must work on every kernel.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use tests::lab::{
    lent::Lent,
    ping::sent_and_lost,
    process::Process,
    scratch::Scratch,
    snapshot::Snapshot,
    timed::{Timed, delays, median},
    topology::Lab,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial(
            "smoke::the_machine_bears_a_first_filter_beside_packets",
            &[Need::Root],
            the_machine_bears_a_first_filter_beside_packets,
        ),
        trial(
            "smoke::packets_are_delayed_and_the_host_is_as_before",
            &[Need::Root, Need::Injector],
            packets_are_delayed_and_the_host_is_as_before,
        ),
    ]
}

/// The first clsact of a host makes the kernel patch its own code while packets run through it, and the last one's end
/// undoes that. Emulated with a thread for each CPU, a machine dies of it in the first second (4 of 4 with this test
/// on 6.12; 6.1 hangs). It is the first test, since no other one keeps a clsact here.
fn the_machine_bears_a_first_filter_beside_packets() -> Result<()> {
    const ROUNDS: usize = 100;
    let mut lab = Lab::pair()?;
    let elsewhere = lab.add_space("first")?;
    let scratch = Scratch::new()?;
    let log = scratch.path().join("ping");
    let (a, b) = (lab.a(), lab.b());
    let mut pings = Process::start(a.ns.line(&format!("ping -n -q -f -w 60 {}", b.v4))?, &log)?;
    let round = "qdisc add dev lo clsact\nqdisc del dev lo clsact\n";
    elsewhere.batch("tc", &round.repeat(ROUNDS))?;
    ensure!(
        pings.ended()?.is_none(),
        "the pings ended before the filters did: {}",
        pings.log_tail()
    );
    pings.signal(Signal::SIGINT)?;
    pings.wait(Duration::from_secs(10))?;
    let said = pings.log_tail();
    let (sent, lost) = sent_and_lost(&said).with_context(|| said.clone())?;
    // Those that are on their way as it ends count as lost: one, and a hundred a second while the machine stands still.
    ensure!(sent > 1_000 && lost <= 100, "{said}");
    Ok(())
}

fn packets_are_delayed_and_the_host_is_as_before() -> Result<()> {
    const ASKED: f64 = 200.0;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let before = Snapshot::of(&a.ns)?;
    let injector = Lent::new()?;
    for direction in ["--to", "--from"] {
        injector.add(&format!(
            "slow --netns {} --iface eth0 {direction} {} --delay {ASKED}ms --loss 0.00000002%",
            a.netns(),
            b.v4
        ))?;
        let path = if direction == "--to" {
            Timed::v4(a, 6000, b, 7000)?
        } else {
            Timed::v4(b, 6000, a, 7000)?
        };
        let sent = path.send(1..=50, Duration::from_millis(2))?;
        let arrived = path.receive(50, Duration::ZERO, Duration::from_secs(10))?;
        let taken = delays(&sent, &arrived);
        ensure!(
            taken.iter().all(|delay| *delay >= ASKED) && median(&taken) < 2.0 * ASKED,
            "{direction}: a packet came too early, or most came late: {taken:?}"
        );
        ensure!(
            arrived.is_sorted_by_key(|one| one.number),
            "{direction}: order was not kept: {arrived:?}"
        );
        let stats = injector.stats()?;
        let rule = stats.rule("slow")?;
        ensure!(rule.both(|one| one.delayed_packets) == 50, "{rule:?}");
        stats.lanes_lost_nothing()?;
        injector.heal("slow")?;
        wait_until("the host is as before", Duration::from_secs(20), || {
            before.must_equal(&Snapshot::of(&a.ns)?).map(|()| true)
        })?;
    }
    Ok(())
}
