//! A three-node etcd whose leader is cut off from the other two, on its own host and at the switch.

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    etcd::{ELECTION_TIMEOUT, Etcd, MEMBERS, Write, Writers},
    injector::Injector,
    transcript::{Transcript, note, report},
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector, Need::Etcd, Need::Tool("ip")];
    let mut tests = vec![
        trial(
            "etcd::a_leader_cut_off_on_its_own_host",
            NEEDS,
            cut_off_on_its_own_host,
        ),
        trial(
            "etcd::a_leader_cut_off_at_the_switch",
            NEEDS,
            cut_off_at_the_switch,
        ),
    ];
    // The same story told by nftables: for whoever doubts the story and not the injector.
    if std::env::var_os("LAB_REFERENCE").is_some() {
        tests.push(trial(
            "etcd::reference_by_nftables",
            &[Need::Root, Need::Etcd, Need::Tool("nft")],
            cut_off_by_nftables,
        ));
    }
    tests
}

/// One cluster for all tests of this module, which take turns.
static CLUSTER: Mutex<Option<Etcd>> = Mutex::new(None);

/// Ends the cluster, if one was started.
pub(crate) fn finish() {
    CLUSTER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
}

fn with_cluster(test: impl FnOnce(&Etcd) -> Result<()>) -> Result<()> {
    let mut cluster = CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
    let etcd = match cluster.take() {
        Some(etcd) => etcd,
        None => Etcd::start()?,
    };
    let result = test(&etcd).with_context(|| etcd.logs());
    // A cluster that a failed test leaves behind is in an unknown state: the next one gets its own.
    if result.is_ok() {
        *cluster = Some(etcd);
    }
    result
}

/// A member's addresses, and those of the other members.
fn sides(etcd: &Etcd, leader: usize) -> (String, String) {
    let addresses = |nodes: &mut dyn Iterator<Item = usize>| {
        nodes
            .flat_map(|node| etcd.nodes[node].addresses())
            .map(|address| address.to_string())
            .collect::<Vec<_>>()
            .join(",")
    };
    (
        addresses(&mut std::iter::once(leader)),
        addresses(&mut (0..MEMBERS).filter(|node| *node != leader)),
    )
}

fn cut_off_on_its_own_host() -> Result<()> {
    with_cluster(|etcd| {
        let injector = Injector::started(&[])?;
        story(
            etcd,
            |leader| {
                let (alone, others) = sides(etcd, leader);
                let netns = etcd.nodes[leader].netns();
                injector
                    .json(&[
                        "partition",
                        "--netns",
                        netns,
                        "--side",
                        &alone,
                        "--side",
                        &others,
                    ])
                    .map(drop)
            },
            || must_have_cut(&injector).and_then(|()| injector.heal_all().map(drop)),
        )
    })
}

fn cut_off_at_the_switch() -> Result<()> {
    with_cluster(|etcd| {
        let injector = Injector::started(&[])?;
        let switch = etcd.switch.name();
        story(
            etcd,
            |leader| {
                let (alone, others) = sides(etcd, leader);
                injector
                    .json(&[
                        "partition",
                        "--netns",
                        switch,
                        "--side",
                        &alone,
                        "--side",
                        &others,
                    ])
                    .map(drop)
            },
            || must_have_cut(&injector).and_then(|()| injector.heal_all().map(drop)),
        )
    })
}

fn cut_off_by_nftables() -> Result<()> {
    with_cluster(|etcd| {
        let switch = &etcd.switch;
        story(
            etcd,
            |leader| {
                switch.tool("nft add table bridge t")?;
                switch
                    .tool("nft add chain bridge t c { type filter hook forward priority 0 ; }")?;
                let alone = etcd.nodes[leader].v4;
                for other in (0..MEMBERS).filter(|node| *node != leader) {
                    let other = etcd.nodes[other].v4;
                    for (from, to) in [(alone, other), (other, alone)] {
                        switch.tool(&format!(
                            "nft add rule bridge t c ip saddr {from} ip daddr {to} drop"
                        ))?;
                    }
                }
                Ok(())
            },
            || switch.tool("nft delete table bridge t").map(drop),
        )
    })
}

fn must_have_cut(injector: &Injector) -> Result<()> {
    let stats = injector.stats()?;
    let cut: u64 = stats
        .rules
        .iter()
        .map(|rule| rule.egress.cut_packets + rule.ingress.cut_packets)
        .sum();
    report(format!("{cut} packets were cut"));
    ensure!(cut > 0, "the partition cut nothing: {stats:?}");
    injector.ok(&["stats", "--expect-effect"]).map(drop)
}

/// Cuts the leader off, looks at both sides, heals, and looks for what was acknowledged.
fn story(
    etcd: &Etcd,
    cut: impl FnOnce(usize) -> Result<()>,
    heal: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let all = [0, 1, 2];
    let patience = Duration::from_secs(30);
    let before = etcd.await_leader(&all, patience)?;
    let (old, others): (usize, Vec<usize>) = (
        before.leader,
        all.into_iter().filter(|n| *n != before.leader).collect(),
    );
    let prefix = format!("t{}/", before.term);
    let writers = Writers::start(etcd, &prefix);
    for node in all {
        writers.await_acknowledged(node, Instant::now(), patience)?;
    }

    cut(old)?;
    let was_cut = Instant::now();
    let after = etcd.await_leader_after(before.term, &others, Duration::from_mins(1))?;
    let elected = was_cut.elapsed();
    // A follower campaigns one to two election timeouts after it last heard the leader, and a vote that
    // was split is repeated after as long again, in a term of its own. Raft promises no more, and a
    // machine that is busy adds to it.
    let campaigns = u32::try_from(after.term - before.term)?;
    let bound = 2 * ELECTION_TIMEOUT * campaigns + Duration::from_millis(1500);
    report(format!(
        "n{} of term {} was cut off; n{} leads in term {} after {:.2} s ({campaigns} campaign(s), at most {:.2} s)",
        old + 1,
        before.term,
        after.leader + 1,
        after.term,
        elected.as_secs_f64(),
        bound.as_secs_f64()
    ));
    ensure!(
        elected <= bound,
        "the majority took {elected:?} to elect, more than {bound:?}"
    );
    ensure!(after.leader != old, "the old leader leads without a quorum");

    // The minority is alive and says no; the client's own way to it is not cut.
    let first = etcd
        .get(old, "first", true, Duration::from_secs(5))
        .context("the minority does not even answer from its own copy")?;
    ensure!(first.as_deref() == Some("write"), "the minority lost data");
    let transcript = Transcript::current();
    let within = Duration::from_secs(20);
    let (write, read) = thread::scope(|scope| {
        let write = scope.spawn(|| {
            transcript.adopt();
            etcd.put(old, "minority", "write", within)
        });
        let read = scope.spawn(|| {
            transcript.adopt();
            etcd.get(old, "first", false, within)
        });
        (write.join(), read.join())
    });
    let refused = |what: &str, answer: String| {
        report(format!("the minority's answer to a {what}: {answer}"));
        ensure!(
            answer.contains("refused: {"),
            "the minority did not refuse a {what} itself: {answer}"
        );
        Ok(())
    };
    match write {
        Ok(Err(error)) => refused("write", format!("{error:#}"))?,
        other => bail!("the minority accepted a write: {other:?}"),
    }
    match read {
        Ok(Err(error)) => refused("linearizable read", format!("{error:#}"))?,
        other => bail!("the minority served a linearizable read: {other:?}"),
    }
    let alone = Instant::now();
    for node in &others {
        writers.await_acknowledged(*node, alone, patience)?;
    }
    let healing = Instant::now();
    heal()?;
    let healed = Instant::now();

    for node in all {
        writers.await_acknowledged(node, healed, Duration::from_mins(1))?;
    }
    report(format!(
        "healed; a write through n{} was acknowledged {:.2} s later",
        old + 1,
        healed.elapsed().as_secs_f64()
    ));
    etcd.await_leader(&all, patience)?;
    let tried = writers.finish();
    let (revision, hash) = etcd.await_agreement(patience)?;
    note(format!("all three hold revision {revision}, hash {hash}"));
    let crossed: Vec<&Write> = tried
        .iter()
        .filter(|w| w.node == old && w.time.0 >= was_cut && w.time.1 <= healing)
        .filter(|w| w.outcome.is_ok())
        .collect();
    ensure!(
        crossed.is_empty(),
        "writes were acknowledged by the minority: {crossed:?}"
    );
    everything_is_there(etcd, &prefix, &tried)
}

/// Every acknowledged write is in every member's copy.
fn everything_is_there(etcd: &Etcd, prefix: &str, writes: &[Write]) -> Result<()> {
    let acknowledged: Vec<&Write> = writes.iter().filter(|w| w.outcome.is_ok()).collect();
    for node in 0..MEMBERS {
        let copy = etcd.all(node, prefix)?;
        let lost: Vec<&&Write> = acknowledged
            .iter()
            .filter(|w| copy.get(&w.key) != Some(&w.key))
            .collect();
        ensure!(
            lost.is_empty(),
            "n{} lost acknowledged writes: {lost:?}",
            node + 1
        );
    }
    for node in 0..MEMBERS {
        let of_node: Vec<&Write> = writes.iter().filter(|w| w.node == node).collect();
        let refused: Vec<&&Write> = of_node.iter().filter(|w| w.outcome.is_err()).collect();
        note(format!(
            "n{}: {} writes, {} refused, the first with {:?}",
            node + 1,
            of_node.len(),
            refused.len(),
            refused.first().map(|w| &w.outcome)
        ));
    }
    report(format!(
        "{} writes tried, {} acknowledged, all of them on all three",
        writes.len(),
        acknowledged.len()
    ));
    Ok(())
}
