//! Throughput through a delay: that it costs the sender nothing but the delay, on one path or among containers,
//! beside netem in the same boot.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    departure::Departures,
    lent::Lent,
    load::Load,
    netem::Netem,
    netns::Netns,
    timed::median,
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "throughput::an_offered_load_gets_through",
            NEEDS,
            an_offered_load_gets_through,
        ),
        trial(
            "throughput::containers_on_one_host",
            NEEDS,
            containers_on_one_host,
        ),
    ]
}

const DELAY: &str = "delay 50ms";
/// Of what gets through netem so much gets through us, in the median.
const SHARE: f64 = 0.9;
/// What is offered at most, in bits per second.
const OFFERED: f64 = 20e6;
/// What is offered at least. The wrong model, which lets two packets be under way (of 64 KiB at most, 21 Mbit/s; of what
/// TCP makes them at such a pace 1), gets less through.
const LEAST: f64 = 5e6;
/// Of what a machine carries one wire packet at a time so much is offered: what lacks is then the delay's doing, and
/// not the machine's, which may be an emulated one.
const LOAD: f64 = 0.25;
/// Rounds, alternating between netem and us.
const ROUNDS: u32 = 3;
/// A machine that is busy with something else spoils some rounds: there are so many times more before a failure.
const BLOCKS: u32 = 3;
/// Ports of what a rule is for, one wire packet at a time and not, and of what netem gets.
const PLAIN: u16 = 7001;
const EXACT: u16 = 7002;
const NETEM: u16 = 7003;

/// Several times what TCP takes to come up to speed through 50 ms.
const LASTING: Duration = Duration::from_millis(800);

/// All that goes.
const ALL: Load = Load {
    streams: 1,
    offered: None,
    lasting: LASTING,
};

fn offered(streams: u32, rate: f64) -> Load {
    Load {
        streams,
        offered: Some(rate),
        lasting: LASTING,
    }
}

/// What goes one wire packet at a time, in the median of some rounds, and what to offer to such a machine. One that
/// carries less than [`LEAST`] is not spared.
fn capacity(from: &Node, to: &Node) -> Result<(f64, f64)> {
    let rates = (0..ROUNDS)
        .map(|_| ALL.deliver(from, to, EXACT))
        .collect::<Result<Vec<f64>>>()?;
    let all = median(&rates);
    Ok((all, (LOAD * all).clamp(LEAST, OFFERED)))
}

/// One comparison: a load from one node to another, through us by its port and through netem at a place where
/// it does what our rule does.
struct Comparison<'a> {
    from: &'a Node,
    to: &'a Node,
    /// Where netem is put, for its rounds only.
    netem: (&'a Netns, &'a str),
    what: String,
}

impl Comparison<'_> {
    /// Alternates; fails if one of our ports gets less than its share of what netem does.
    fn run(&self, load: &Load, ports: &[u16]) -> Result<f64> {
        let mut ours = vec![Vec::new(); ports.len()];
        let mut theirs = Vec::new();
        for round in 1..=BLOCKS * ROUNDS {
            let (ns, interface) = self.netem;
            let netem = Netem::on(ns, interface, DELAY)?;
            theirs.push(load.deliver(self.from, self.to, NETEM)?);
            drop(netem);
            for (rates, port) in ours.iter_mut().zip(ports) {
                rates.push(load.deliver(self.from, self.to, *port)?);
            }
            let enough = |rates: &Vec<f64>| median(rates) >= SHARE * median(&theirs);
            if round % ROUNDS == 0 && ours.iter().all(enough) {
                break;
            }
        }
        let reference = median(&theirs);
        for (rates, port) in ours.iter().zip(ports) {
            let kind = if *port == EXACT {
                "packet by packet"
            } else {
                "plain"
            };
            let rate = median(rates);
            report(format!(
                "{}, {} streams, {kind}: {:.1} Mbit/s, netem {:.1} ({:.0} offered)",
                self.what,
                load.streams,
                rate / 1e6,
                reference / 1e6,
                load.offered.unwrap_or(f64::INFINITY) / 1e6
            ));
            ensure!(
                rate >= SHARE * reference,
                "{}, {} streams, {kind}: {rates:?} bit/s, netem {theirs:?}",
                self.what,
                load.streams
            );
        }
        Ok(reference)
    }
}

/// One stream and eight; then what the wrong model makes, which must not pass, and what goes at most.
fn an_offered_load_gets_through() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (name, port, more) in [("plain", PLAIN, ""), ("exact", EXACT, "--loss 0.00000002%")] {
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --peer-port {port} --delay 50ms {more}",
            a.netns(),
            b.v4
        ))?;
    }
    let comparison = Comparison {
        from: a,
        to: b,
        netem: (&a.ns, "eth0"),
        what: "through 50 ms".to_owned(),
    };
    let (capacity, load) = capacity(a, b)?;
    let mut reference = 0.0;
    for streams in [1, 8] {
        reference = comparison.run(&offered(streams, load), &[PLAIN, EXACT])?;
    }
    // What a departure time on the sender's own packets makes of the same load.
    let wrong = Departures::on(&a.ns, "eth0", Duration::from_millis(50))?;
    let rate = offered(1, load).deliver(a, b, NETEM)?;
    drop(wrong);
    report(format!(
        "held in the sender's name: {:.1} Mbit/s",
        rate / 1e6
    ));
    ensure!(
        rate < SHARE * reference,
        "the wrong model passes for right: {rate} of {reference} bit/s"
    );
    let netem = Netem::on(&a.ns, "eth0", DELAY)?;
    let theirs = ALL.deliver(a, b, NETEM)?;
    drop(netem);
    report(format!(
        "all that goes: {:.0} Mbit/s, {:.0} packet by packet, netem {:.0}",
        ALL.deliver(a, b, PLAIN)? / 1e6,
        capacity / 1e6,
        theirs / 1e6
    ));
    injector.stats()?.lanes_lost_nothing()
}

/// Sender, bridge and receiver share a kernel, and the rules are on the host's side of a container's veth, where
/// packets that arrive still have their sender's socket.
fn containers_on_one_host() -> Result<()> {
    let lab = Lab::switched(2)?;
    let (one, two) = (lab.a(), lab.b());
    let switch = lab.switch()?;
    switch.tool("tc qdisc add dev p1 clsact")?;
    let injector = Lent::new()?;
    for (name, port, more) in [("plain", PLAIN, ""), ("exact", EXACT, "--loss 0.00000002%")] {
        // From container one, as it comes in at its port, and to it, as it leaves there.
        for direction in ["from", "to"] {
            injector.add(&format!(
                "{name}-{direction} --netns {} --iface p1 --{direction} {} --dst-port {port} --delay 50ms {more}",
                switch.name(),
                one.v4
            ))?;
        }
    }
    let (_, load) = capacity(one, two)?;
    for (from, to, port, what) in [
        (one, two, "p2", "from a container"),
        (two, one, "p1", "to a container"),
    ] {
        Comparison {
            from,
            to,
            netem: (switch, port),
            what: what.to_owned(),
        }
        .run(&offered(1, load), &[PLAIN, EXACT])?;
    }
    injector.stats()?.lanes_lost_nothing()
}
