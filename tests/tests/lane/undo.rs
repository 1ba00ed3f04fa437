//! Everything is undone exactly, lanes too: however the daemon ends, and killed at random moments while lanes are
//! made, used and removed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tests::lab::{
    foreign,
    injector::{Connection, Injector, Mode},
    moment::Commands,
    netns::Netns,
    snapshot::Snapshot,
    timed::Timed,
    topology::Lab,
    transcript::{note, report},
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Tool("tc")];
    vec![
        trial("undo::however_it_ends", NEEDS, however_it_ends),
        trial(
            "undo::killed_at_random_moments",
            NEEDS,
            killed_at_random_moments,
        ),
    ]
}

/// How the injector's work ends.
#[derive(Debug, Clone, Copy)]
enum Ending {
    HealAll,
    HealByName,
    Down,
    KillAndStart,
    KillAndHealAll,
}

type Prepare = fn(&Netns) -> Result<()>;

/// One host for each ending, so that each is met once without a boot of its own. The last two with `--full`.
const CASES: [(Ending, Prepare); 5] = [
    (Ending::HealByName, |ns| foreign::clsact(ns, "eth0")),
    (Ending::Down, |ns| {
        ns.tool("tc qdisc add dev eth0 root handle 7: fq limit 5000 flow_limit 60")?;
        foreign::clsact(ns, "eth0")?;
        foreign::filter(ns, "eth0", "egress", 1, foreign::UNSPEC)
    }),
    (Ending::KillAndStart, |ns| {
        ns.tool("ip link add link eth0 name eth0.9 type vlan id 9")?;
        ns.tool("ip link set eth0.9 up")?;
        ns.sysctl("net/ipv4/conf/eth0/accept_local", "1")
    }),
    (Ending::HealAll, |_| Ok(())),
    (Ending::KillAndHealAll, |ns| {
        ns.tool("tc qdisc add dev eth0 root netem delay 1ms")?;
        ns.tool("ip link set eth0 mtu 1400 txqueuelen 77").map(drop)
    }),
];

fn rules(lab: &Lab) -> Vec<Value> {
    let rule = |name: &str, node: usize, iface: &str, fault: Value| {
        json!({
            "name": name,
            "netns": lab.nodes[node].netns(),
            "iface": [iface],
            "dst_port": ["7000-7009"],
            "proto": ["udp"],
            "fault": fault,
        })
    };
    vec![
        rule("one", 0, "eth0", json!({"delay": "300ms"})),
        rule("two", 0, "lo", json!({"loss": "10%"})),
        rule(
            "three",
            1,
            "eth0",
            json!({"delay": "50ms", "jitter": "10ms"}),
        ),
    ]
}

fn however_it_ends() -> Result<()> {
    let count = if tests::thoroughness() > 1 {
        CASES.len()
    } else {
        CASES.len() - 2
    };
    for (ending, prepare) in CASES.into_iter().take(count) {
        one_host(ending, prepare).with_context(|| format!("{ending:?}"))?;
    }
    Ok(())
}

fn one_host(ending: Ending, prepare: Prepare) -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    prepare(&a.ns)?;
    // A new link takes a moment until it is seen to be up, and has its addresses and routes then.
    let look = || -> Result<[Snapshot; 2]> { Ok([Snapshot::of(&a.ns)?, Snapshot::of(&b.ns)?]) };
    let mut before = look()?;
    wait_until("the hosts are settled", Duration::from_mins(1), || {
        let settled = unchanged(&lab, &before, Duration::ZERO).is_ok();
        before = look()?;
        Ok(settled)
    })?;
    let mut injector = Injector::started(&[])?;
    injector.apply(&rules(&lab), Mode::Replace)?;
    let path = Timed::v4(a, 6000, b, 7000)?;
    // Some are held when it ends.
    path.send(1..=50, Duration::ZERO)?;
    let during = Snapshot::of(&a.ns)?;
    ensure!(
        during.part("links").contains("inj-line") && during.part("qdiscs").contains("fq"),
        "there is no lane: {}",
        during.part("links")
    );
    match ending {
        Ending::HealAll => {
            injector.heal_all()?;
        }
        Ending::HealByName => {
            injector.json(&["heal", "one", "two", "three"])?;
        }
        Ending::Down => {
            injector.json(&["down"])?;
            let code = injector.await_daemon_end(Duration::from_secs(20))?;
            ensure!(code == Some(0), "the daemon left with {code:?}");
        }
        Ending::KillAndStart => {
            injector.kill_daemon()?;
            injector.start_daemon(&[])?;
        }
        Ending::KillAndHealAll => {
            injector.kill_daemon()?;
            injector.ok(&["heal", "--all"])?;
        }
    }
    unchanged(&lab, &before, Duration::from_secs(10))?;
    // Packets held until now have left or are lost; new ones are healthy.
    let numbers = 101..=120;
    path.send(numbers.clone(), Duration::from_millis(1))?;
    let arrived = path.receive(20, Duration::from_millis(500), Duration::from_secs(10))?;
    ensure!(
        numbers
            .clone()
            .all(|number| arrived.iter().any(|one| one.number == number)),
        "traffic is not healthy again: {arrived:?}"
    );
    Ok(())
}

/// At once, or, where packets are still held, soon.
fn unchanged(lab: &Lab, before: &[Snapshot; 2], within: Duration) -> Result<()> {
    wait_until("the hosts are as before", within, || {
        for (node, before) in lab.nodes.iter().zip(before) {
            if before.must_equal(&Snapshot::of(&node.ns)?).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .with_context(|| {
        let of =
            |at: usize| -> Result<()> { before[at].must_equal(&Snapshot::of(&lab.nodes[at].ns)?) };
        format!("{:?} {:?}", of(0), of(1))
    })
}

/// Kills in one test; ten times as many with `--full`.
const KILLS: u32 = 5;

fn killed_at_random_moments() -> Result<()> {
    let seed = std::env::var("LAB_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| rand::rng().next_u64());
    report(format!("LAB_SEED={seed}"));
    let mut random = StdRng::seed_from_u64(seed);
    let lab = Lab::pair()?;
    lab.a().make_clsact()?;
    let before = [Snapshot::of(&lab.a().ns)?, Snapshot::of(&lab.b().ns)?];
    let mut injector = Injector::new()?;
    let mut lanes = 0;
    let mut kill = 0;
    // Until some of them have left a lane behind: others come when there is none.
    while kill < KILLS * tests::thoroughness() || (lanes == 0 && kill < 10 * KILLS) {
        kill += 1;
        let context = || format!("kill {kill}");
        injector
            .start_daemon(&["--lease", "1s"])
            .with_context(context)?;
        // What the one before left was undone as this one started, before it served.
        unchanged(&lab, &before, Duration::ZERO).with_context(context)?;
        let netns = [lab.a().netns().to_owned(), lab.b().netns().to_owned()];
        let commands = Commands::give(&injector, random.next_u64(), move |connection, random| {
            command(connection, &netns, random)
        })?;
        commands.in_the_midst(4, &mut random)?;
        injector.kill_daemon().with_context(context)?;
        let done = commands.end()?;
        let there = lab
            .nodes
            .iter()
            .map(|node| Ok(node.ns.tool("ip -o link show")?.stdout))
            .filter(|links: &Result<String>| {
                links.as_ref().is_ok_and(|links| links.contains("inj-"))
            })
            .count();
        lanes += there;
        note(format!(
            "kill {kill}: {done} commands answered, {there} lanes left"
        ));
    }
    injector.ok(&["heal", "--all"])?;
    unchanged(&lab, &before, Duration::ZERO)?;
    report(format!("{lanes} lanes were left behind and removed"));
    ensure!(lanes > 0, "no lane was ever left: nothing was tested");
    Ok(())
}

/// One command; an error of the connection ends the game, a refusal of the daemon does not.
fn command(connection: &mut Connection, netns: &[String; 2], random: &mut StdRng) -> Result<()> {
    let (op, arguments) = if random.random_ratio(2, 3) {
        let number = random.random_range(0..3);
        let fault = if random.random_bool(0.5) {
            json!({"delay": "1ms"})
        } else {
            json!({"loss": "1%", "duplicate": "1%"})
        };
        let rule = json!({
            "name": format!("rule-{number}"),
            "netns": netns[random.random_range(0..2)],
            "iface": ["eth0"],
            "dst_port": ["7000"],
            "proto": ["udp"],
            "seed": 1,
            "fault": fault,
        });
        ("add", json!({"rules": [rule], "replace": true}))
    } else {
        ("heal", json!({"all": true}))
    };
    let line = json!({"v": 1, "id": 1, "op": op, "args": arguments}).to_string();
    connection.send_line(&line).map(drop)
}
