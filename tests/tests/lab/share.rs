//! A share of flows: as many as asked, always the same ones, and the same in both directions.

use std::{collections::BTreeSet, net::UdpSocket, time::Duration};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use rand::RngExt;
use serde_json::{Value, json};
use tests::lab::{
    binomial,
    injector::{Injector, Mode},
    packet_socket::on_one_cpu,
    tcp,
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, trial},
    udp::{self, Path, drain, numbered},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "share::one_flow_in_four_is_cut_for_good_and_both_ways",
            NEEDS,
            one_flow_in_four_is_cut_for_good_and_both_ways,
        ),
        trial(
            "share::a_tcp_connection_is_either_whole_or_cut",
            NEEDS,
            a_tcp_connection_is_either_whole_or_cut,
        ),
    ]
}

const FLOWS: u16 = 400;
const SERVER: u16 = 9000;
const CLIENTS: u16 = 20_000;
/// Two-sided, of one count.
const ALPHA: f64 = 1e-7;

/// The sockets of 400 conversations, all with one server.
struct Conversations {
    clients: Vec<UdpSocket>,
    server: UdpSocket,
    marker: Path,
    back: Path,
}

impl Conversations {
    fn open(client: &Node, server: &Node) -> Result<Self> {
        let clients = (CLIENTS..CLIENTS + FLOWS)
            .map(|port| {
                let socket = udp::socket(&client.ns, client.at(port))?;
                socket.connect(server.at(SERVER))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .collect::<Result<Vec<_>>>()?;
        let socket = udp::socket(&server.ns, server.at(SERVER))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            clients,
            server: socket,
            // Flows that the rules are not for: what went before on the same CPU has arrived when they
            // have.
            marker: Path::new(client, 9, server, 9)?,
            back: Path::new(server, 10, client, 10)?,
        })
    }

    /// Sends one datagram of each flow to the server; returns the flows of those that did not arrive.
    fn lost_to_server(&mut self, round: u32) -> Result<BTreeSet<u16>> {
        on_one_cpu(|| {
            for (port, client) in (CLIENTS..).zip(&self.clients) {
                client.send(&numbered(round, port, 16))?;
            }
            let lost = self.marker.lost([round])?;
            ensure!(lost.is_empty(), "a flow that no rule is for was cut");
            Ok(())
        })?;
        let arrived: BTreeSet<u16> = drain(&self.server)?
            .into_iter()
            .filter(|(number, _)| *number == round)
            .map(|(_, port)| port)
            .collect();
        Ok(missing(&arrived))
    }

    /// Sends one datagram of each flow from the server; returns the flows of those that did not arrive.
    fn lost_to_clients(&mut self, round: u32, client: &Node) -> Result<BTreeSet<u16>> {
        on_one_cpu(|| {
            for port in CLIENTS..CLIENTS + FLOWS {
                self.server
                    .send_to(&numbered(round, port, 16), client.at(port))?;
            }
            let lost = self.back.lost([round])?;
            ensure!(lost.is_empty(), "a flow that no rule is for was cut");
            Ok(())
        })?;
        let mut arrived = BTreeSet::new();
        for (port, socket) in (CLIENTS..).zip(&self.clients) {
            if drain(socket)?.iter().any(|(number, _)| *number == round) {
                arrived.insert(port);
            }
        }
        Ok(missing(&arrived))
    }
}

fn missing(arrived: &BTreeSet<u16>) -> BTreeSet<u16> {
    (CLIENTS..CLIENTS + FLOWS)
        .filter(|port| !arrived.contains(port))
        .collect()
}

fn rule(lab: &Lab, seed: u64, share: &str, direction: &str) -> Value {
    json!({
        "name": "grey",
        "netns": lab.a().netns(),
        "iface": ["eth0"],
        "direction": direction,
        "peer": [lab.b().v4.to_string()],
        "peer_port": [SERVER.to_string()],
        "proto": ["udp"],
        "flows": share,
        "seed": seed,
        "fault": {"cut": true},
    })
}

fn one_flow_in_four_is_cut_for_good_and_both_ways() -> Result<()> {
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    let mut talk = Conversations::open(lab.a(), lab.b())?;
    let none = talk.lost_to_server(1)?;
    ensure!(none.is_empty(), "lost without a rule: {none:?}");
    let seed: u64 = rand::rng().random();
    let expected = binomial::interval(u32::from(FLOWS), 0.25, ALPHA);
    report(format!(
        "seed {seed}; of {FLOWS} flows {} to {} may be cut (false alarms: {ALPHA:e}; a share of 50 % \
         would pass with {:.1e})",
        expected.0,
        expected.1,
        binomial::inside(u32::from(FLOWS), 0.5, expected)
    ));
    let inside = |cut: &BTreeSet<u16>| {
        u32::try_from(cut.len()).is_ok_and(|count| (expected.0..=expected.1).contains(&count))
    };

    // Both ways at once, over and over.
    injector.apply(&[rule(&lab, seed, "25%", "both")], Mode::Replace)?;
    let cut = talk.lost_to_server(10)?;
    report(format!("{} flows are cut", cut.len()));
    ensure!(inside(&cut), "{} flows are cut", cut.len());
    for round in 11..30 {
        let again = talk.lost_to_server(round)?;
        ensure!(
            again == cut,
            "round {round}: fates changed: {:?}",
            again.symmetric_difference(&cut)
        );
        let back = talk.lost_to_clients(round, lab.a())?;
        ensure!(
            back == cut,
            "round {round}: the way back differs: {:?}",
            back.symmetric_difference(&cut)
        );
    }
    // Each way alone, in new activations of the rule: the way back is judged without having seen the
    // way there.
    injector.apply(&[rule(&lab, seed, "25%", "ingress")], Mode::Replace)?;
    let back = talk.lost_to_clients(40, lab.a())?;
    ensure!(back == cut, "the way back alone differs");
    let there = talk.lost_to_server(41)?;
    ensure!(there.is_empty(), "an ingress rule cut {there:?} on egress");
    injector.apply(&[rule(&lab, seed, "25%", "egress")], Mode::Replace)?;
    let there = talk.lost_to_server(42)?;
    ensure!(there == cut, "the way there alone differs");

    // Another seed chooses others; as many flows in common as chance has it, at most.
    injector.apply(&[rule(&lab, seed ^ 1, "25%", "both")], Mode::Replace)?;
    let other = talk.lost_to_server(50)?;
    ensure!(inside(&other), "{} flows are cut", other.len());
    let common = u32::try_from(cut.intersection(&other).count())?;
    let by_chance = binomial::interval(u32::try_from(other.len())?, 0.25, ALPHA);
    ensure!(
        (by_chance.0..=by_chance.1).contains(&common),
        "{common} flows in common, by chance {by_chance:?}"
    );

    // The wrong model is noticed.
    injector.apply(&[rule(&lab, seed, "50%", "both")], Mode::Replace)?;
    let half = talk.lost_to_server(60)?;
    report(format!("with a share of 50 %: {} flows", half.len()));
    ensure!(
        !inside(&half),
        "{} of {FLOWS} flows pass for a share of 25 %",
        half.len()
    );
    ensure!(
        cut.is_subset(&half),
        "a larger share of the same rule must contain the smaller one"
    );
    let stats = injector.stats()?;
    ensure!(
        stats.rule("grey")?.egress.stateless_packets == 0,
        "decided without state: {stats:?}"
    );
    Ok(())
}

fn a_tcp_connection_is_either_whole_or_cut() -> Result<()> {
    const CONNECTIONS: u32 = 40;
    let lab = Lab::pair()?;
    let injector = Injector::started(&[])?;
    let (a, b) = (lab.a(), lab.b());
    let mut connections = (0..CONNECTIONS)
        .map(|_| tcp::Connection::open(a, b, 5100, Duration::from_secs(10)))
        .collect::<Result<Vec<_>>>()?;
    injector.add(&format!(
        "grey --netns {} --iface eth0 --peer {} --peer-port 5100 --proto tcp --flows 50% --cut",
        a.netns(),
        b.v4
    ))?;
    let mut working = Vec::new();
    for connection in &mut connections {
        working.push(connection.works(Duration::from_millis(60))?);
    }
    let cut = u32::try_from(working.iter().filter(|works| !**works).count())?;
    let expected = binomial::interval(CONNECTIONS, 0.5, ALPHA);
    report(format!("{cut} of {CONNECTIONS} connections are cut"));
    ensure!(
        (expected.0..=expected.1).contains(&cut),
        "{cut} of {CONNECTIONS} connections are cut, expected {expected:?}"
    );
    for _ in 0..10 {
        for (connection, works) in connections.iter_mut().zip(&working) {
            if *works {
                ensure!(
                    connection.works(Duration::from_secs(10))?,
                    "a connection that was spared stopped working"
                );
            }
        }
    }
    // Those that were cut get through when healed, with all that was sent meanwhile.
    injector.json(&["heal", "grey"])?;
    for connection in &mut connections {
        ensure!(
            connection.works(Duration::from_secs(30))?,
            "healed, and a connection does not work"
        );
    }
    Ok(())
}
