//! The injector beside netem, on a kernel that has both: within one boot, in turns, on the same veth pair. What the
//! two are asked is the same; netem is set up as its users have to, and where it decides about super-packets that is
//! part of what is compared.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use tests::{
    lab::{
        injector::{Injector, Mode},
        iperf::iperf,
        scratch::Scratch,
        timed::{Timed, delays},
        topology::{Lab, Node},
    },
    subject::meter::median,
    table::Table,
};

use super::{progress, span};

/// Rounds of what takes little time.
const ROUNDS: usize = 5;
/// Rounds of transfers.
const TRANSFERS: usize = 3;
/// What netem's queue holds: its default of 1,000 packets would be the limit of every transfer.
const NETEM: &str = "netem limit 1000000";
/// How long one command may take that makes thousands of classes.
const SETTING_UP: Duration = Duration::from_mins(10);

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    sections: Vec<Section>,
}

/// One question, and who answers it how.
#[derive(Debug, Serialize)]
struct Section {
    title: String,
    unit: &'static str,
    rows: Vec<Row>,
}

/// One answer.
#[derive(Debug, Serialize)]
struct Row {
    asked: String,
    by: &'static str,
    values: Vec<f64>,
}

/// Who does what is asked.
#[derive(Debug, Clone, Copy)]
enum Means<'a> {
    /// Nobody: the path as it is.
    Nobody,
    /// The injector: a name for the table, and the fault.
    Injector(&'static str, &'a str),
    /// netem: what it is given.
    Netem(&'a str),
}

impl Means<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nothing",
            Self::Injector(name, _) => name,
            Self::Netem(_) => "netem",
        }
    }
}

/// The path on which all of it is measured.
struct Bench {
    lab: Lab,
    injector: Injector,
}

impl Bench {
    fn new() -> Result<Self> {
        let lab = Lab::pair()?;
        lab.a().make_clsact()?;
        Ok(Self {
            lab,
            injector: Injector::started(&[])?,
        })
    }

    fn a(&self) -> &Node {
        self.lab.a()
    }

    fn b(&self) -> &Node {
        self.lab.b()
    }

    /// Does something while somebody impairs the way from the first host to the second.
    fn under<T>(&self, means: Means<'_>, work: impl FnOnce() -> Result<T>) -> Result<T> {
        match means {
            Means::Nobody => work(),
            Means::Injector(_, fault) => {
                self.injector.add(&format!(
                    "bench --netns {} --iface eth0 --to {} {fault}",
                    self.a().netns(),
                    self.b().v4
                ))?;
                let done = work();
                self.injector.json(&["heal", "bench"])?;
                done
            }
            Means::Netem(arguments) => {
                let ns = &self.a().ns;
                ns.tool(&format!(
                    "tc qdisc replace dev eth0 root {NETEM} {arguments}"
                ))?;
                let done = work();
                ns.tool("tc qdisc del dev eth0 root")?;
                done
            }
        }
    }

    /// Rows of one question: everybody in turns, round after round.
    fn in_turns(
        &self,
        rounds: usize,
        cases: &[(String, Means<'_>)],
        mut measure: impl FnMut(&Self) -> Result<f64>,
    ) -> Result<Vec<Row>> {
        let mut rows: Vec<Row> = cases
            .iter()
            .map(|(asked, means)| Row {
                asked: asked.clone(),
                by: means.name(),
                values: Vec::new(),
            })
            .collect();
        for round in 0..rounds {
            for turn in 0..cases.len() {
                let index = (round + turn) % cases.len();
                let (asked, means) = &cases[index];
                let value = self
                    .under(*means, || measure(self))
                    .with_context(|| format!("{asked}, {}", means.name()))?;
                rows[index].values.push(value);
            }
        }
        Ok(rows)
    }

    /// Fails if a lane lost a packet: then what was measured is something else.
    fn check(&self) -> Result<()> {
        self.injector.stats()?.lanes_lost_nothing()
    }
}

/// Answers one question.
type Part = fn(&Bench) -> Result<Section>;

/// Measures everything, or what has this text in its title.
pub(crate) fn measure(only: Option<&str>) -> Result<Report> {
    let parts: [(&str, Part); 6] = [
        ("error of delays (two minutes)", delay_error),
        ("TCP through a delay (five minutes)", throughput),
        ("packets per second through a delay", packets),
        ("realised loss", loss),
        ("what others feel (a minute)", others),
        ("delays of their own for many peers (five minutes)", peers),
    ];
    let mut sections = Vec::new();
    for (what, section) in parts {
        if only.is_some_and(|only| !what.contains(only)) {
            continue;
        }
        progress(what);
        let bench = Bench::new()?;
        let section = section(&bench).with_context(|| what.to_owned())?;
        bench.check()?;
        print_now(&section);
        sections.push(section);
    }
    ensure!(
        !sections.is_empty(),
        "nothing that is measured has '{}' in its title; the titles are: {}",
        only.unwrap_or_default(),
        parts.map(|(what, _)| what).join(", ")
    );
    Ok(Report { sections })
}

/// What has been measured so far is of use also where the rest fails.
fn print_now(section: &Section) {
    eprintln!("{}", section.text(false));
}

/// Median of the one-way delay of datagrams, milliseconds.
fn one_way(bench: &Bench) -> Result<f64> {
    const COUNT: u32 = 60;
    let path = Timed::v4(bench.a(), 6000, bench.b(), 7000)?;
    let sent = path.send(1..=COUNT, Duration::from_millis(3))?;
    let arrived = path.receive(COUNT as usize, Duration::ZERO, Duration::from_secs(10))?;
    Ok(median(&delays(&sent, &arrived)))
}

fn delay_error(bench: &Bench) -> Result<Section> {
    let mut rows = Vec::new();
    for asked in [1_u32, 10, 50, 200] {
        let (ours, netem) = (format!("--delay {asked}ms"), format!("delay {asked}ms"));
        let title = format!("{asked} ms");
        let mut found = bench.in_turns(
            ROUNDS,
            &[
                (title.clone(), Means::Nobody),
                (title.clone(), Means::Injector("injector", &ours)),
                (title, Means::Netem(&netem)),
            ],
            one_way,
        )?;
        let bare = median(&found.remove(0).values);
        for row in &mut found {
            for value in &mut row.values {
                *value = (*value - bare - f64::from(asked)) * 1e3;
            }
        }
        rows.extend(found);
    }
    Ok(Section {
        title: "Delay: how much later than asked, over the path without it (one way, UDP, median)"
            .to_owned(),
        unit: "µs",
        rows,
    })
}

/// One TCP stream, Mbit/s.
fn transfer(bench: &Bench) -> Result<f64> {
    // A stream needs some round trips until it has its speed.
    let report = iperf(bench.a(), bench.b(), &["--time", "4", "--omit", "2"])?;
    Ok(report.received()? / 1e6)
}

fn throughput(bench: &Bench) -> Result<Section> {
    let mut rows = bench.in_turns(
        TRANSFERS,
        &[("no delay".to_owned(), Means::Nobody)],
        transfer,
    )?;
    for asked in [10, 50, 200] {
        let (ours, netem) = (format!("--delay {asked}ms"), format!("delay {asked}ms"));
        // A rule that treats wire packets differently: every one of them is decided by itself.
        let wire = format!("{ours} --reorder 0.000001% --hold 1ms");
        let title = format!("{asked} ms");
        rows.extend(bench.in_turns(
            TRANSFERS,
            &[
                (title.clone(), Means::Injector("injector", &ours)),
                (
                    title.clone(),
                    Means::Injector("injector, per wire packet", &wire),
                ),
                (title, Means::Netem(&netem)),
            ],
            transfer,
        )?);
    }
    Ok(Section {
        title: "One TCP stream through a delay".to_owned(),
        unit: "Mbit/s",
        rows,
    })
}

/// Datagrams in one go, and how many a second arrive.
fn flood(path: &Timed, count: u32) -> Result<f64> {
    path.send(1..=count, Duration::ZERO)?;
    let arrived = path.receive(0, Duration::from_millis(300), Duration::from_secs(30))?;
    let (Some(first), Some(last)) = (arrived.first(), arrived.last()) else {
        anyhow::bail!("no datagram arrived");
    };
    ensure!(arrived.len() > 1, "one datagram arrived");
    Ok(float(arrived.len() - 1) / (float_i(last.at_ns - first.at_ns) / 1e9))
}

fn packets(bench: &Bench) -> Result<Section> {
    let title = "1 ms".to_owned();
    let rows = bench.in_turns(
        ROUNDS,
        &[
            ("no delay".to_owned(), Means::Nobody),
            (title.clone(), Means::Injector("injector", "--delay 1ms")),
            (title, Means::Netem("delay 1ms")),
        ],
        |bench| {
            let path = Timed::v4(bench.a(), 6000, bench.b(), 7000)?;
            flood(&path, 10_000)
        },
    )?;
    Ok(Section {
        title: "Datagrams through a delay, one sender that does nothing else".to_owned(),
        unit: "packets/s",
        rows,
    })
}

/// What a receiver misses of numbered wire packets that left in super-packets: share, mean and longest burst.
fn missing(bench: &Bench) -> Result<[f64; 3]> {
    const GROUPS: u32 = 15;
    const GROUP: u32 = 2000;
    let path = Timed::v4(bench.a(), 6000, bench.b(), 7000)?;
    let mut seen = BTreeSet::new();
    for group in 0..GROUPS {
        path.send_super_packets(group * GROUP + 1..=(group + 1) * GROUP, 40, 1000)?;
        let arrived = path.receive(0, Duration::from_millis(200), Duration::from_secs(20))?;
        seen.extend(arrived.iter().map(|one| one.number));
    }
    let (mut lost, mut bursts, mut longest, mut run) = (0_u32, 0_u32, 0_u32, 0_u32);
    for number in 1..=GROUPS * GROUP {
        if seen.contains(&number) {
            run = 0;
            continue;
        }
        lost += 1;
        run += 1;
        bursts += u32::from(run == 1);
        longest = longest.max(run);
    }
    Ok([
        100.0 * f64::from(lost) / f64::from(GROUPS * GROUP),
        f64::from(lost) / f64::from(bursts.max(1)),
        f64::from(longest),
    ])
}

fn loss(bench: &Bench) -> Result<Section> {
    let mut rows = Vec::new();
    for means in [
        Means::Injector("injector", "--proto udp --loss 1%"),
        Means::Netem("loss 1%"),
    ] {
        let mut found = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..TRANSFERS {
            let values = bench.under(means, || missing(bench))?;
            for (place, value) in found.iter_mut().zip(values) {
                place.push(value);
            }
        }
        let asked = [
            "share of 30,000, in %",
            "mean burst, packets",
            "longest burst, packets",
        ];
        rows.extend(asked.into_iter().zip(found).map(|(asked, values)| Row {
            asked: asked.to_owned(),
            by: means.name(),
            values,
        }));
    }
    Ok(Section {
        title: "1 % loss asked, of wire packets that are sent in super-packets of 40".to_owned(),
        unit: "",
        rows,
    })
}

/// A transfer that no rule is for, while there is one for another peer.
fn others(bench: &Bench) -> Result<Section> {
    const OTHER: &str = "10.88.0.200";
    let mut rows: Vec<Row> = ["nothing", "injector", "netem"]
        .map(|by| Row {
            asked: "50 ms to another host".to_owned(),
            by,
            values: Vec::new(),
        })
        .into();
    let ns = &bench.a().ns;
    for _ in 0..ROUNDS {
        rows[0].values.push(transfer(bench)?);
        bench.injector.add(&format!(
            "other --netns {} --iface eth0 --to {OTHER} --delay 50ms",
            bench.a().netns()
        ))?;
        rows[1].values.push(transfer(bench)?);
        bench.injector.json(&["heal", "other"])?;
        for line in [
            "qdisc replace dev eth0 root handle 1: prio bands 4 priomap 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0".to_owned(),
            format!("qdisc add dev eth0 parent 1:4 handle 40: {NETEM} delay 50ms"),
            format!("filter add dev eth0 parent 1: protocol ip u32 match ip dst {OTHER} flowid 1:4"),
        ] {
            ns.tool(&format!("tc {line}"))?;
        }
        rows[2].values.push(transfer(bench)?);
        ns.tool("tc qdisc del dev eth0 root")?;
    }
    Ok(Section {
        title: "One TCP stream that nothing is asked for".to_owned(),
        unit: "Mbit/s",
        rows,
    })
}

/// Filters that a list of u32 takes (`net/sched/cls_u32.c`: a node's number in its bucket has 12 bits).
const MOST_IN_A_LIST: u32 = 4095;

/// A peer by its number.
fn peer(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 99, 0, 0)) + 1 + number)
}

/// Delays in turn: the rule set of the injector has 1,024 places, so ten thousand peers share a thousand delays.
fn delay_of(number: u32) -> u32 {
    10 + number % 1000 / 10
}

fn peers(bench: &Bench) -> Result<Section> {
    let (a, b) = (bench.a(), bench.b());
    b.ns.tool("ip route add local 10.99.0.0/16 dev lo")?;
    a.ns.tool(&format!("ip route add 10.99.0.0/16 via {}", b.v4))?;
    let mut rows = Vec::new();
    for count in [1, 1000, 10_000] {
        let far = Node {
            v4: peer(count - 1),
            ..b.clone()
        };
        // It takes the way that a user's packets take: no entry of the neighbour table is made for it.
        let path = Timed::v4(a, 6000, &far, 7000)?;
        let mut add = |what: &str, by, value: f64| {
            rows.push(Row {
                asked: format!("{count} peers: {what}"),
                by,
                values: vec![value],
            });
        };
        let mut answer = |by, set_up: f64| -> Result<()> {
            let sent = path.send(1..=40, Duration::from_millis(3))?;
            let arrived = path.receive(40, Duration::ZERO, Duration::from_secs(20))?;
            let found = median(&delays(&sent, &arrived));
            add("set up, ms", by, set_up);
            add(
                &format!("the last one's delay, {} ms asked", delay_of(count - 1)),
                by,
                found,
            );
            add("packets/s to the last one", by, flood(&path, 5000)?);
            Ok(())
        };
        let began = Instant::now();
        bench.injector.apply(&rules(a, count), Mode::Replace)?;
        answer("injector", began.elapsed().as_secs_f64() * 1e3)?;
        bench.injector.json(&["heal", "--all"])?;
        let began = Instant::now();
        netem_tree(a, count)?;
        answer("netem", began.elapsed().as_secs_f64() * 1e3)?;
        a.ns.tool("tc qdisc del dev eth0 root")?;
    }
    Ok(Section {
        title: "Peers with delays of their own (10,000 share 1,000 delays; netem below htb, found by u32)".to_owned(),
        unit: "",
        rows,
    })
}

/// A rule for every delay of that many peers.
fn rules(node: &Node, count: u32) -> Vec<Value> {
    (0..count.min(1000))
        .map(|rule| {
            let peers: Vec<String> = (rule..count)
                .step_by(1000)
                .map(|number| peer(number).to_string())
                .collect();
            json!({
                "name": format!("peer-{rule}"),
                "netns": node.netns(),
                "iface": ["eth0"],
                "direction": "egress",
                "peer": peers,
                "fault": {"delay": format!("{}ms", delay_of(rule))},
            })
        })
        .collect()
}

/// The same by a class and a netem for every delay, and a filter for every peer.
fn netem_tree(node: &Node, count: u32) -> Result<()> {
    let mut batch = String::from("qdisc replace dev eth0 root handle 1: htb\n");
    for class in 0..count.min(1000) {
        let minor = class + 1;
        // Handles are hexadecimal.
        let _ = writeln!(
            batch,
            "class add dev eth0 parent 1: classid 1:{minor:x} htb rate 10gbit\n\
             qdisc add dev eth0 parent 1:{minor:x} {NETEM} delay {}ms",
            delay_of(class)
        );
    }
    // A list of u32 filters ends at 4,095: beyond, tc fails with ENOMEM, and a table of 256 lists, by the last byte of
    // the destination, is what its manual offers.
    let hashed = count > MOST_IN_A_LIST;
    if hashed {
        batch.push_str(
            "filter add dev eth0 parent 1: prio 5 handle 2: protocol ip u32 divisor 256\n\
             filter add dev eth0 parent 1: prio 5 protocol ip u32 ht 800:: match ip dst 10.99.0.0/16 \
             hashkey mask 0x000000ff at 16 link 2:\n",
        );
    }
    for number in 0..count {
        let peer = peer(number);
        let list = if hashed {
            format!("prio 5 protocol ip u32 ht 2:{:x}:", peer.octets()[3])
        } else {
            "protocol ip u32".to_owned()
        };
        let _ = writeln!(
            batch,
            "filter add dev eth0 parent 1: {list} match ip dst {peer} flowid 1:{:x}",
            number % 1000 + 1
        );
    }
    let scratch = Scratch::new()?;
    let file = scratch.path().join("batch");
    std::fs::write(&file, batch).context("writing a batch for tc")?;
    let mut command = node.ns.command("tc")?;
    command.arg("-batch").arg(&file);
    tests::lab::command::run(command, SETTING_UP)?
        .success()
        .map(drop)
}

impl Section {
    fn text(&self, terminal: bool) -> String {
        let mut table = Table::new(&["asked", "by", "median", "from", "to"]);
        for row in &self.rows {
            let (low, high) = span(&row.values);
            let number = |value: f64| {
                if value.abs() >= 1000.0 {
                    format!("{value:.0}")
                } else {
                    format!("{value:.2}")
                }
            };
            table.row([
                row.asked.clone(),
                row.by.to_owned(),
                number(median(&row.values)),
                number(low),
                number(high),
            ]);
        }
        let unit = if self.unit.is_empty() {
            String::new()
        } else {
            format!(", {}", self.unit)
        };
        format!("{}{unit}:\n\n{}", self.title, table.render(terminal))
    }
}

impl Report {
    pub(crate) fn text(&self, terminal: bool) -> String {
        let sections: Vec<String> = self
            .sections
            .iter()
            .map(|section| section.text(terminal))
            .collect();
        sections.join("\n")
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of packets in a benchmark"
)]
fn float(number: usize) -> f64 {
    number as f64
}

#[expect(
    clippy::cast_precision_loss,
    reason = "times of a benchmark are below 2^52 ns"
)]
fn float_i(number: i64) -> f64 {
    number as f64
}
