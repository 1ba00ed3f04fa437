//! How exact a delay is, beside netem in the same boot.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    lent::Lent,
    netem::Netem,
    probe::{Probes, Times},
    timed::median,
    topology::Lab,
    transcript::report,
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![trial(
        "accuracy::a_delay_is_as_exact_as_netem_s",
        NEEDS,
        a_delay_is_as_exact_as_netem_s,
    )]
}

const DELAYS_MS: [u16; 4] = [1, 10, 50, 200];
/// Worse than netem by at most so much, where a packet's way without any delay takes less than a third of it.
const WORSE_MS: f64 = 0.2;
/// A lane is a longer way, by twice what a packet's way without any delay takes (measured: 1.1 to 1.9 times), which on an
/// emulated machine with busy neighbours is more than all that is allowed elsewhere.
const BARE_SHARE: f64 = 3.0;
/// A delay that is kept by the kernel's tick, of 4 ms, would be late by half of it.
const TICK_MS: f64 = 2.0;
/// Probes of a kind in a round.
const TURNS: u32 = 60;
/// An emulated machine may have something else to do for seconds: where the medians are apart after a round,
/// another one is added to it, up to so many.
const ROUNDS: u32 = 10;
/// By when the probes of a round are back.
const WITHIN: Duration = Duration::from_secs(10);
/// Probes without delay go to this port, those with our delays to the next ones, then those with netem's.
const PORT: u16 = 7000;

/// Probes without delay, with ours and with netem's take turns, all delays among them, so that whatever the
/// machine does meanwhile meets all of them alike.
fn a_delay_is_as_exact_as_netem_s() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let kinds = DELAYS_MS.len();
    for direction in ["egress", "ingress"] {
        for (port, delay) in (PORT + 1..).zip(DELAYS_MS) {
            injector.add(&format!(
                "{direction}-{delay} --netns {} --iface eth0 --direction {direction} --proto udp --dst-port {port} \
                 --delay {delay}ms",
                a.netns()
            ))?;
        }
    }
    let delays = DELAYS_MS.map(|delay| format!("delay {delay}ms"));
    let delays: Vec<&str> = delays.iter().map(String::as_str).collect();
    // Without delay and with ours the qdisc is passed without meeting a netem.
    let mut priorities = vec![0; kinds + 1];
    priorities.extend((1..).take(kinds));
    for (from, to, direction) in [(a, b, "egress"), (b, a, "ingress")] {
        let netem = Netem::by_priority(&from.ns, "eth0", &delays)?;
        for v6 in [false, true] {
            let probes = Probes::new(from, to, v6, PORT, &priorities)?;
            let mut times = vec![Times::default(); priorities.len()];
            for round in 1.. {
                for (all, more) in times.iter_mut().zip(probes.run(TURNS, WITHIN)?) {
                    all.one_way.extend(more.one_way);
                    all.round_trip.extend(more.round_trip);
                }
                must_not_be_early(&times)?;
                let worse = compare(&times);
                if worse.is_empty() || round == ROUNDS {
                    for (middles, line) in middles(&times) {
                        report(format!("{direction}, IPv6 {v6}, {line}: {middles}"));
                    }
                    ensure!(
                        worse.is_empty(),
                        "{direction}, IPv6 {v6}, after {round} rounds: {worse:?}"
                    );
                    let allowed = allowed(&times);
                    ensure!(
                        allowed < TICK_MS,
                        "this machine is so slow that {allowed:.3} ms are allowed"
                    );
                    break;
                }
            }
        }
        drop(netem);
    }
    injector.stats()?.lanes_lost_nothing()
}

/// Fails if a probe took less than our delay for it.
fn must_not_be_early(times: &[Times]) -> Result<()> {
    for (times, asked) in times[1..].iter().zip(DELAYS_MS) {
        ensure!(
            times.one_way.iter().all(|taken| *taken >= asked.into()),
            "a probe came before its {asked} ms were over: {:?}",
            times.one_way
        );
    }
    Ok(())
}

/// Medians in milliseconds.
struct Middles {
    asked: f64,
    bare: f64,
    ours: f64,
    netem: f64,
}

impl std::fmt::Display for Middles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let over = |taken: f64| taken - self.bare - self.asked;
        write!(
            f,
            "{:+.3} ms, netem {:+.3} ms, over {:.3} ms",
            over(self.ours),
            over(self.netem),
            self.bare
        )
    }
}

/// One way and both ways, for each of the delays.
fn middles(times: &[Times]) -> Vec<(Middles, String)> {
    let mut all = Vec::new();
    for (kind, asked) in (1..).zip(DELAYS_MS) {
        for way in ["one way", "round trip"] {
            let middle = |kind: usize| {
                median(if way == "one way" {
                    &times[kind].one_way
                } else {
                    &times[kind].round_trip
                })
            };
            let middles = Middles {
                asked: asked.into(),
                bare: middle(0),
                ours: middle(kind),
                netem: middle(kind + DELAYS_MS.len()),
            };
            all.push((middles, format!("{way}, {asked} ms")));
        }
    }
    all
}

/// By how much our median error may be more than netem's.
fn allowed(times: &[Times]) -> f64 {
    WORSE_MS.max(BARE_SHARE * median(&times[0].one_way))
}

/// Where our median error is more than what is allowed over netem's.
fn compare(times: &[Times]) -> Vec<String> {
    let allowed = allowed(times);
    middles(times)
        .into_iter()
        .filter(|(middles, _)| {
            let error = |taken: f64| (taken - middles.bare - middles.asked).abs();
            error(middles.ours) > error(middles.netem) + allowed
        })
        .map(|(middles, line)| format!("{line}: {middles}"))
        .collect()
}
