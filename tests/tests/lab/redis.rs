//! A Redis master and its replica with one direction between them cut: which side notices.
//!
//! The side that listens into the void is the one that learns of it. Each server's `repl-timeout` says
//! how long it puts up with silence; the side that is to notice has a short one, the other a long one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    injector::Injector,
    redis::{Redis, Reply, Role},
    transcript::{note, report},
    trial::{Need, trial},
    wait::wait_for,
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Redis, Need::Tool("ip")];
    let mut tests = vec![
        trial(
            "redis::the_replica_notices_when_it_hears_nothing",
            NEEDS,
            || story(Way::ToReplica, &Cutter::Injector),
        ),
        trial(
            "redis::the_master_notices_when_it_hears_nothing",
            NEEDS,
            || story(Way::ToMaster, &Cutter::Injector),
        ),
    ];
    if std::env::var_os("LAB_REFERENCE").is_some() {
        const REFERENCE: &[Need] = &[Need::Root, Need::Redis, Need::Tool("nft")];
        tests.push(trial("redis::reference_to_replica", REFERENCE, || {
            story(Way::ToReplica, &Cutter::Nftables)
        }));
        tests.push(trial("redis::reference_to_master", REFERENCE, || {
            story(Way::ToMaster, &Cutter::Nftables)
        }));
    }
    tests
}

/// Which packets are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ToReplica,
    ToMaster,
}

/// Who loses them.
enum Cutter {
    Injector,
    Nftables,
}

/// What each side thinks of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct View {
    replica_linked: bool,
    master_has_replica: bool,
}

fn story(way: Way, cutter: &Cutter) -> Result<()> {
    let (short, long) = (4, 60);
    let redis = match way {
        Way::ToReplica => Redis::start(long, short)?,
        Way::ToMaster => Redis::start(short, long)?,
    };
    let injector = match cutter {
        Cutter::Injector => Some(Injector::started(&[])?),
        Cutter::Nftables => None,
    };
    scene(&redis, way, injector.as_ref(), short).with_context(|| redis.logs())
}

fn scene(redis: &Redis, way: Way, injector: Option<&Injector>, short: u32) -> Result<()> {
    let (master, replica) = (redis.lab.a(), redis.lab.b());
    redis.command(Role::Master, &["SET", "before", "1"])?;
    redis.await_in_step(Duration::from_secs(20))?;

    if let Some(injector) = injector {
        // Both ways are cut on the master's host: what leaves it, or what arrives.
        let flag = match way {
            Way::ToReplica => "--to",
            Way::ToMaster => "--from",
        };
        injector.add(&format!(
            "oneway --netns {} --iface eth0 {flag} {} --proto tcp --cut",
            master.netns(),
            replica.v4
        ))?;
    } else {
        let place = match way {
            Way::ToReplica => &replica.ns,
            Way::ToMaster => &master.ns,
        };
        place.tool("nft add table inet t")?;
        place.tool("nft add chain inet t c { type filter hook input priority 0 ; }")?;
        place.tool("nft add rule inet t c iifname eth0 tcp dport != 0 drop")?;
    }
    let cut = Instant::now();

    // Written to the master right away. Whether it crosses is what "one way" means; that the master
    // does not hear of it either way is why neither is safe.
    let mut client = redis.session(Role::Master)?;
    ensure!(
        client.command(&["SET", "during", "1"])? == Reply::Text("OK".into()),
        "the master refused a write"
    );
    let confirmed = client.command(&["WAIT", "1", "700"])?;
    let crossed = redis.command(Role::Replica, &["GET", "during"])?;
    report(format!(
        "{way:?} cut: replicas that confirmed a write: {confirmed:?}; the replica's copy: {crossed:?}"
    ));
    ensure!(
        confirmed == Reply::Number(0),
        "a write was confirmed although one way is cut: {confirmed:?}"
    );
    let expected = match way {
        Way::ToReplica => Reply::Nil,
        Way::ToMaster => Reply::Text("1".into()),
    };
    ensure!(
        crossed == expected,
        "{way:?} cut, and the replica has {crossed:?}"
    );

    let within = Duration::from_secs(u64::from(short) + 10);
    let view = wait_for("one of the two notices", within, || {
        let view = View {
            replica_linked: redis.replica_is_linked()?,
            master_has_replica: redis.master_has_replica()?,
        };
        Ok((!view.replica_linked || !view.master_has_replica).then_some(view))
    })?;
    report(format!(
        "after {:.1} s (repl-timeout {short} s): master_link_status:{}, connected_slaves:{}",
        cut.elapsed().as_secs_f64(),
        if view.replica_linked { "up" } else { "down" },
        u8::from(view.master_has_replica),
    ));
    let noticed = match way {
        Way::ToReplica => !view.replica_linked,
        Way::ToMaster => !view.master_has_replica,
    };
    ensure!(noticed, "the wrong side noticed: {view:?}");
    note(format!(
        "master: {:?}\nreplica: {:?}",
        redis.replication(Role::Master)?,
        redis.replication(Role::Replica)?
    ));

    if let Some(injector) = injector {
        let stats = injector.stats()?;
        let rule = stats.rule("oneway")?;
        let (cut, spared) = match way {
            Way::ToReplica => (rule.egress, rule.ingress),
            Way::ToMaster => (rule.ingress, rule.egress),
        };
        ensure!(cut.cut_packets > 0, "nothing was cut: {rule:?}");
        ensure!(spared.matched_packets == 0, "the other way too: {rule:?}");
        injector.json(&["heal", "oneway"])?;
    } else {
        for node in [master, replica] {
            node.ns.try_tool("nft delete table inet t")?;
        }
    }
    redis.await_in_step(Duration::from_mins(1))?;
    ensure!(
        redis.command(Role::Replica, &["GET", "during"])? == Reply::Text("1".into()),
        "healed, and the replica lacks a write"
    );
    Ok(())
}
