//! Nanoseconds a packet, from `BPF_PROG_TEST_RUN`.
//!
//! A flow that is known is measured by running one packet a great many times: the kernel divides the time
//! by the number of runs. The first packet of a flow can be run only once, since by the second it is known:
//! thousands of flows are run once each, which takes the clock and cold caches into the bargain. The empty
//! program is measured in both ways too, and everything is given as what it costs over that.

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use injector::dataplane::{DataPlane, LinkKind, Sizes, TargetConfig, TargetSlot};
use serde::Serialize;
use tests::{
    lab::frame::{Layer4, Packet},
    table::Table,
};

use super::{
    Aim, median,
    rules::{FREE_PORT, Size, peer},
};

/// Runs of one packet that the kernel takes the mean of.
const REPEAT: u32 = 100_000;
/// Such means of each case in a pass, taken in turns with those of the empty program.
const ROUNDS: usize = 3;
/// Passes over all cases. A machine's neighbours make everything slower for seconds at a time, and nothing
/// makes it faster: of each case the best pass counts.
const PASSES: u16 = 6;
/// Flows whose first packets are run in each pass.
const FLOWS: u16 = 1000;
/// The classid of a test run.
const TARGET: TargetSlot = TargetSlot(0);
const LOCAL: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 88, 0, 1);
/// `TC_ACT_UNSPEC` and `TC_ACT_STOLEN` (include/uapi/linux/pkt_cls.h).
const PASSED: u32 = u32::MAX;
const CUT: u32 = 4;

const PEERS: [usize; 3] = [1, 1000, 65_000];
const RULES: [usize; 3] = [1, 100, 1000];

/// What is measured of one rule set. All in nanoseconds over the empty program.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    size: Size,
    /// A flow that is known to meet no rule, although its peer is one of the rules'.
    established: f64,
    /// A flow that is known to meet one rule, and is cut.
    matched: f64,
    /// The first packet of a flow to a peer of the rules that meets none.
    first: f64,
    /// The time to compile and write the rule set, in milliseconds.
    commit_ms: f64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The empty program itself, in nanoseconds, with what a test run adds to it.
    empty: f64,
    /// The same, for packets that are run once.
    empty_once: f64,
    /// No rules at all, over the empty program.
    no_rules: f64,
    /// Rules, but none for this interface and direction.
    no_rules_here: f64,
    rows: Vec<Row>,
}

/// The loaded programs.
struct Bench {
    plane: DataPlane,
    next_activation: u32,
}

pub(crate) fn measure() -> Result<Report> {
    let plane = DataPlane::load(&Sizes::default())?;
    plane.lease().renew(u64::MAX);
    let mut bench = Bench {
        plane,
        next_activation: 1,
    };
    let other = frame(peer(0), FREE_PORT, 1);
    let mut report = Report {
        empty: f64::INFINITY,
        empty_once: f64::INFINITY,
        no_rules: f64::INFINITY,
        no_rules_here: f64::INFINITY,
        rows: PEERS
            .into_iter()
            .flat_map(|peers| RULES.map(|rules| Row::of(Size { peers, rules })))
            .collect(),
    };
    for pass in 0..PASSES {
        bench.commit_none()?;
        let (empty, no_rules) = bench.repeated(&other, PASSED)?;
        lower(&mut report.empty, empty);
        lower(&mut report.no_rules, no_rules);
        bench.commit(Size { peers: 1, rules: 1 }, TargetSlot(1))?;
        let (_, no_rules_here) = bench.repeated(&other, PASSED)?;
        lower(&mut report.no_rules_here, no_rules_here);
        for row in &mut report.rows {
            lower(&mut row.commit_ms, bench.commit(row.size, TARGET)?);
            let (empty_once, first) = bench.once(pass)?;
            lower(&mut report.empty_once, empty_once);
            lower(&mut row.first, first);
            lower(&mut row.established, bench.repeated(&other, PASSED)?.1);
            let (address, port) = row.size.cut()?;
            let cut = frame(address, port, 1);
            lower(&mut row.matched, bench.repeated(&cut, CUT)?.1);
        }
    }
    Ok(report)
}

fn lower(best: &mut f64, value: f64) {
    *best = best.min(value);
}

impl Row {
    /// Nothing measured yet.
    fn of(size: Size) -> Self {
        Self {
            size,
            established: f64::INFINITY,
            matched: f64::INFINITY,
            first: f64::INFINITY,
            commit_ms: f64::INFINITY,
        }
    }
}

/// A UDP packet to a peer.
fn frame(to: std::net::Ipv4Addr, port: u16, from_port: u16) -> Vec<u8> {
    Packet::new(LOCAL, to, Layer4::Udp(from_port, port)).frame(0)
}

impl Bench {
    /// Puts no rule in force.
    fn commit_none(&mut self) -> Result<()> {
        self.plane.commit(&[], &[], &[])?;
        Ok(())
    }

    /// Puts a rule set in force; returns how long that took in milliseconds.
    fn commit(&mut self, size: Size, target: TargetSlot) -> Result<f64> {
        let rules = size.rules(target, self.next_activation)?;
        self.next_activation += u32::try_from(size.rules)?;
        let targets = [TARGET, TargetSlot(1)].map(|slot| TargetConfig {
            slot,
            link: LinkKind::Ethernet,
            loopback: false,
        });
        let commit = self.plane.commit(&targets, &rules, &[])?;
        Ok((commit.prepared + commit.settled).as_secs_f64() * 1e3)
    }

    /// Nanoseconds of a run of a program, over `repeat` runs. Fails if it does not return `expected`.
    fn run(&self, program: &'static str, frame: &[u8], repeat: u32, expected: u32) -> Result<f64> {
        let program: &SchedClassifier = self.plane.program(program)?;
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                repeat,
                ..TestRunOptions::new()
            })
            .context("BPF_PROG_TEST_RUN")?;
        ensure!(
            result.return_value == expected,
            "the program returned {:#x} where {expected:#x} was due: what was measured is not what was meant",
            result.return_value
        );
        Ok(result.duration.as_secs_f64() * 1e9)
    }

    /// Nanoseconds of the empty program, and of ours over it, for a packet that is run many times.
    fn repeated(&self, frame: &[u8], expected: u32) -> Result<(f64, f64)> {
        let (mut empty, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            empty.push(self.run("injector_empty", frame, REPEAT, PASSED)?);
            ours.push(self.run("injector_egress", frame, REPEAT, expected)?);
        }
        let empty = median(&empty);
        Ok((empty, median(&ours) - empty))
    }

    /// The same for first packets of flows.
    fn once(&self, pass: u16) -> Result<(f64, f64)> {
        let (mut empty, mut ours) = (Vec::new(), Vec::new());
        for flow in 0..FLOWS {
            let frame = frame(peer(0), FREE_PORT, 20_000 + pass * FLOWS + flow);
            empty.push(self.run("injector_empty", &frame, 1, PASSED)?);
            ours.push(self.run("injector_egress", &frame, 1, PASSED)?);
        }
        let empty = median(&empty);
        Ok((empty, median(&ours) - empty))
    }
}

impl Report {
    pub(crate) fn aims(&self) -> Vec<Aim> {
        let row = |peers, rules| {
            self.rows
                .iter()
                .find(|row| row.size == Size { peers, rules })
        };
        let mut aims = vec![Aim {
            aim: "no rules: at most 5 ns over the empty program".to_owned(),
            measured: format!("{:+.0} ns", self.no_rules),
            met: self.no_rules <= 5.0,
        }];
        if let (Some(small), Some(large)) = (row(1, 1), row(65_000, 1000)) {
            aims.push(Aim {
                aim: "established, unmatched: at most 60 ns over it".to_owned(),
                measured: format!("{:+.0} ns", small.established),
                met: small.established <= 60.0,
            });
            for (what, of_small, of_large, most) in [
                ("established", small.established, large.established, 1.1),
                ("first packet", small.first, large.first, 2.0),
            ] {
                let ratio = of_large / of_small;
                aims.push(Aim {
                    aim: format!("{what}: 65,000 peers and 1,000 rules within {most} of 1 and 1"),
                    measured: format!("{ratio:.2}"),
                    met: ratio <= most,
                });
            }
        }
        aims
    }

    pub(crate) fn text(&self, terminal: bool) -> String {
        let mut table = Table::new(&[
            "peers",
            "rules",
            "established, unmatched",
            "matched and cut",
            "first packet",
            "commit",
        ]);
        for row in &self.rows {
            table.row([
                row.size.peers.to_string(),
                row.size.rules.to_string(),
                format!("{:+.0} ns", row.established),
                format!("{:+.0} ns", row.matched),
                format!("{:+.0} ns", row.first),
                format!("{:.1} ms", row.commit_ms),
            ]);
        }
        format!(
            "A packet, over the empty program ({:.0} ns; {:.0} ns where each packet is run once):\n\
             {:+.0} ns without rules, {:+.0} ns with rules for another interface only, and\n\n{}",
            self.empty,
            self.empty_once,
            self.no_rules,
            self.no_rules_here,
            table.render(terminal)
        )
    }
}
