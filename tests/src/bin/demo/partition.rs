//! An etcd of three members, whose leader is cut off from the other two and reconnected, with clients that write
//! all the while.

use std::{
    cell::Cell,
    fmt::Write as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tests::lab::{
    etcd::{Etcd, Leadership, MEMBERS, Write, Writers},
    injector::Injector,
    wait::given_up,
};

use crate::stage::{DemoLab, Tone, paragraph, run, say, title};

/// Plays it.
pub(crate) fn tell(injector: &Injector) -> Result<()> {
    let began = Instant::now();
    paragraph(&[
        "An etcd of three servers runs in a lab on this machine, and a client writes to",
        "it all the while. Its leader is cut off from the other two, and reconnected.",
        "What has to happen: the two elect another leader and go on; the one that is",
        "alone refuses writes; afterwards all three agree, and no write that was",
        "acknowledged is lost.",
    ]);
    title("1. Three servers and a client on a switch, each in a network namespace of its own");
    let lab = DemoLab::up(injector, MEMBERS + 1)?;
    let etcd = Etcd::start_on(lab.nodes()?, lab.switch(), None)?;
    let writers = Writers::start(&etcd, "demo/");
    paragraph(&[
        "etcd runs on n1, n2 and n3; from n4 a client writes through each of them. Each",
        "line is a second: whom each server takes for the leader, how many writes it",
        "accepted and refused (or did not answer within a second), and how many packets",
        "have been cut so far.",
    ]);
    say(Tone::Plain, "");
    let story = Story {
        injector,
        etcd: &etcd,
        writers: &writers,
        began,
        cut: Cell::new(0),
    };
    story.watch_until(Duration::from_secs(30), Duration::from_secs(2), |now| {
        now.leaders[0].is_some() && now.agree()
    })?;
    let old = etcd.await_leader(&[0, 1, 2], Duration::from_secs(10))?;
    let cut = story.cut_off(old, &lab)?;
    let healed = story.heal(&cut)?;
    story.look_back(&cut, &healed)?;
    drop(writers);
    drop(etcd);
    drop(lab);
    Ok(())
}

/// What became of the cut.
struct Cut {
    /// The leader that was cut off.
    old: usize,
    /// When the command had returned.
    at: Instant,
    /// How long the others took to elect another.
    elected: Duration,
    /// What was lost by then.
    packets: u64,
}

/// What became of healing.
struct Healed {
    /// When the command was given, and when it had returned.
    at: (Instant, Instant),
    /// All writes up to the end.
    writes: Vec<Write>,
}

/// Seconds from `since` to the first write through a member that was accepted.
fn first_accepted(writes: &[Write], node: usize, since: Instant) -> Option<f64> {
    writes
        .iter()
        .filter(|w| w.node == node && w.time.0 >= since && w.outcome.is_ok())
        .map(|w| w.time.1.duration_since(since).as_secs_f64())
        .next()
}

/// Who watches what.
struct Story<'a> {
    injector: &'a Injector,
    etcd: &'a Etcd,
    writers: &'a Writers,
    began: Instant,
    /// Packets cut, when last looked at.
    cut: Cell<u64>,
}

/// What was seen in the last second.
struct Now {
    leaders: [Option<usize>; MEMBERS],
    accepted: [usize; MEMBERS],
    refused: [usize; MEMBERS],
}

impl Now {
    /// Whether all members name the same leader.
    fn agree(&self) -> bool {
        self.leaders.iter().all(|leader| *leader == self.leaders[0])
    }

    /// Prints a line of the table.
    fn show(&self, seconds: u64, cut: u64) -> Result<()> {
        let mut line = format!("  {seconds:3} s ");
        for leader in self.leaders {
            let leader = leader.map_or("none".to_owned(), |node| format!("n{}", node + 1));
            write!(line, "  {leader:>4}")?;
        }
        line.push_str("   ");
        for accepted in self.accepted {
            write!(line, " {accepted:4}")?;
        }
        line.push_str("    ");
        for refused in self.refused {
            write!(line, " {refused:4}")?;
        }
        write!(line, "     {cut:8}")?;
        say(Tone::Plain, &line);
        Ok(())
    }
}

impl Story<'_> {
    /// All that was cut so far. Rules that have been healed are not in the statistics any more.
    fn cut_packets(&self) -> Result<u64> {
        let now = self
            .injector
            .stats()?
            .rules
            .iter()
            .map(|rule| rule.egress.cut_packets + rule.ingress.cut_packets)
            .sum();
        self.cut.set(self.cut.get().max(now));
        Ok(self.cut.get())
    }

    /// Prints a line a second until the scene is as `wanted`, and for `longer` after that.
    fn watch_until(
        &self,
        within: Duration,
        longer: Duration,
        wanted: impl Fn(&Now) -> bool,
    ) -> Result<()> {
        const BEAT: Duration = Duration::from_secs(1);
        say(
            Tone::Title,
            "         leader, as seen by    writes accepted    writes refused    packets",
        );
        say(
            Tone::Title,
            "  time     n1    n2    n3      n1   n2   n3       n1   n2   n3          cut",
        );
        let began = Instant::now();
        let mut reached: Option<Instant> = None;
        let mut members: [Option<String>; MEMBERS] = std::array::from_fn(|_| None);
        let mut seen = self.writers.so_far().len();
        loop {
            let beat = Instant::now();
            while beat.elapsed() < BEAT {
                ensure!(!given_up(), "interrupted");
                thread::sleep(Duration::from_millis(50));
            }
            let writes = self.writers.so_far();
            let recent = &writes[seen..];
            seen = writes.len();
            let count = |node: usize, ok: bool| {
                recent
                    .iter()
                    .filter(|w| w.node == node && w.outcome.is_ok() == ok)
                    .count()
            };
            let statuses: [_; MEMBERS] = std::array::from_fn(|node| self.etcd.status(node).ok());
            for (member, status) in members.iter_mut().zip(&statuses) {
                if let Some(status) = status {
                    *member = Some(status.member.clone());
                }
            }
            let now = Now {
                leaders: std::array::from_fn(|node| {
                    let leader = statuses[node].as_ref()?.leader.as_ref();
                    leader.and_then(|leader| {
                        members
                            .iter()
                            .position(|member| member.as_ref() == Some(leader))
                    })
                }),
                accepted: std::array::from_fn(|node| count(node, true)),
                refused: std::array::from_fn(|node| count(node, false)),
            };
            now.show(self.began.elapsed().as_secs(), self.cut_packets()?)?;
            if reached.is_none() && wanted(&now) {
                reached = Some(Instant::now());
            }
            if reached.is_some_and(|reached| reached.elapsed() >= longer) {
                return Ok(());
            }
            ensure!(
                reached.is_some() || began.elapsed() < within,
                "waited {within:?} for the next scene"
            );
        }
    }

    /// Cuts the leader off, and watches until another one leads and the old one refuses writes.
    fn cut_off(&self, old: Leadership, lab: &DemoLab<'_>) -> Result<Cut> {
        title(&format!(
            "2. The leader, n{}, is cut off from the other two, at the switch; the client reaches all",
            old.leader + 1
        ));
        let others: Vec<usize> = (0..MEMBERS).filter(|node| *node != old.leader).collect();
        let alone = format!("n{}", old.leader + 1);
        let rest = format!("n{},n{}", others[0] + 1, others[1] + 1);
        let switch = lab.switch();
        run(
            self.injector,
            &[
                "partition",
                "--netns",
                switch.name(),
                "--side",
                &alone,
                "--side",
                &rest,
            ],
        )?;
        let at = Instant::now();
        say(Tone::Plain, "");
        let (new, elected) = thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                self.etcd
                    .await_leader_after(old.term, &others, Duration::from_secs(20))
                    .map(|new| (new, at.elapsed()))
            });
            self.watch_until(Duration::from_secs(25), Duration::from_secs(4), |now| {
                waiting.is_finished()
                    && now.refused[old.leader] > 0
                    && others.iter().all(|node| now.accepted[*node] > 0)
            })?;
            waiting
                .join()
                .unwrap_or_else(|_| bail!("waiting for a leader panicked"))
        })?;
        say(Tone::Plain, "");
        say(
            Tone::Good,
            &format!(
                "n{} was elected {:.1} s after the cut; it accepts writes, n{} refuses them.",
                new.leader + 1,
                elected.as_secs_f64(),
                old.leader + 1
            ),
        );
        say(Tone::Plain, "");
        run(self.injector, &["stats"])?;
        let packets = self.cut_packets()?;
        ensure!(packets > 0, "the partition cut nothing");
        Ok(Cut {
            old: old.leader,
            at,
            elected,
            packets,
        })
    }

    /// Heals, and watches until all three accept writes and agree on a leader.
    fn heal(&self, cut: &Cut) -> Result<Healed> {
        title("3. The partition is healed");
        let healing = Instant::now();
        run(self.injector, &["heal", "--all"])?;
        let healed = Instant::now();
        paragraph(&[
            &format!(
                "n{} comes back with a higher term than the others', since it has tried to be",
                cut.old + 1
            ),
            "elected all the while. They have to elect a leader once more, which can take",
            "some seconds: that is how Raft works without its pre-vote phase.",
        ]);
        say(Tone::Plain, "");
        self.watch_until(Duration::from_secs(25), Duration::from_secs(2), |now| {
            now.accepted.iter().all(|count| *count > 0) && now.agree()
        })?;
        self.writers
            .await_acknowledged(cut.old, healed, Duration::from_secs(20))?;
        Ok(Healed {
            at: (healing, healed),
            writes: self.writers.finish(),
        })
    }

    /// Looks for every acknowledged write in every member's copy, and sums up.
    fn look_back(&self, cut: &Cut, healed: &Healed) -> Result<()> {
        title("4. Summary");
        let writes = &healed.writes;
        let (revision, hash) = self.etcd.await_agreement(Duration::from_secs(15))?;
        for node in 0..MEMBERS {
            let (accepted, refused): (Vec<&Write>, Vec<&Write>) = writes
                .iter()
                .filter(|w| w.node == node && w.time.0 >= cut.at && w.time.1 <= healed.at.0)
                .partition(|w| w.outcome.is_ok());
            let alone = node == cut.old;
            let note = match (alone, refused.is_empty()) {
                (true, _) => " (alone)",
                (false, false) => " (until there was a leader)",
                (false, true) => "",
            };
            say(
                Tone::Plain,
                &format!(
                    "  while cut, n{}      {} writes accepted, {} refused{note}",
                    node + 1,
                    accepted.len(),
                    refused.len()
                ),
            );
            ensure!(
                alone == accepted.is_empty(),
                "n{} accepted {} writes",
                node + 1,
                accepted.len()
            );
        }
        let acknowledged: Vec<&Write> = writes.iter().filter(|w| w.outcome.is_ok()).collect();
        for node in 0..MEMBERS {
            let copy = self.etcd.all(node, "demo/")?;
            let lost = acknowledged
                .iter()
                .filter(|write| copy.get(&write.key) != Some(&write.key))
                .count();
            ensure!(lost == 0, "n{} lost {lost} acknowledged writes", node + 1);
        }
        say(
            Tone::Plain,
            &format!("  packets cut        {}", cut.packets),
        );
        say(
            Tone::Plain,
            &format!(
                "  a new leader       {:.1} s after the cut",
                cut.elected.as_secs_f64()
            ),
        );
        say(
            Tone::Plain,
            &format!(
                "  healed             n{} accepts writes again {:.1} s later",
                cut.old + 1,
                first_accepted(writes, cut.old, healed.at.1)
                    .context("the old leader accepted no write after healing")?
            ),
        );
        say(
            Tone::Good,
            &format!(
                "  data               all three at revision {revision}, hash {hash}\n\
                \x20 acknowledged       {} writes, each of them in all three",
                acknowledged.len()
            ),
        );
        say(Tone::Plain, "");
        Ok(())
    }
}
