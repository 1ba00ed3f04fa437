//! Nanoseconds a packet, from `BPF_PROG_TEST_RUN`.
//!
//! A flow that is known is measured by running one packet a great many times: the kernel divides the time
//! by the number of runs. The first packet of a flow can be run only once, since by the second it is known:
//! thousands of flows are run once each, which takes the clock and cold caches into the bargain. The empty
//! program is measured in both ways too, and everything is given as what it costs over that.

use anyhow::Result;
use injector::dataplane::{DataPlane, Sizes};
use serde::Serialize;
use tests::{
    subject::{
        many::{FREE_PORT, Size, peer},
        meter::{CUT, ELSEWHERE, Meter, PASSED, TARGET, frame},
    },
    table::Table,
};

use super::Aim;

/// Passes over all cases. A machine's neighbours make everything slower for seconds at a time, and nothing
/// makes it faster: of each case the best pass counts.
const PASSES: u16 = 6;
/// Flows whose first packets are run in each pass.
const FLOWS: u16 = 1000;

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

pub(crate) fn measure() -> Result<Report> {
    let mut meter = Meter::new(DataPlane::load(&Sizes::default())?);
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
        meter.clear()?;
        let none = meter.repeated(&other, PASSED)?;
        lower(&mut report.empty, none.empty);
        lower(&mut report.no_rules, none.over);
        meter.commit(Size { peers: 1, rules: 1 }, ELSEWHERE)?;
        let elsewhere = meter.repeated(&other, PASSED)?;
        lower(&mut report.no_rules_here, elsewhere.over);
        for row in &mut report.rows {
            lower(&mut row.commit_ms, meter.commit(row.size, TARGET)?);
            let ports = 20_000 + pass * FLOWS..20_000 + (pass + 1) * FLOWS;
            let first = meter.once(ports)?;
            lower(&mut report.empty_once, first.empty);
            lower(&mut row.first, first.over);
            lower(&mut row.established, meter.repeated(&other, PASSED)?.over);
            let (address, port) = row.size.cut()?;
            let cut = frame(address, port, 1);
            lower(&mut row.matched, meter.repeated(&cut, CUT)?.over);
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

impl Report {
    pub(crate) fn aims(&self) -> Vec<Aim> {
        let row = |peers, rules| {
            self.rows
                .iter()
                .find(|row| row.size == Size { peers, rules })
        };
        let mut aims = vec![Aim {
            wanted: "no rules: at most 5 ns over the empty program".to_owned(),
            measured: format!("{:+.0} ns", self.no_rules),
            met: self.no_rules <= 5.0,
        }];
        if let (Some(small), Some(large)) = (row(1, 1), row(65_000, 1000)) {
            aims.push(Aim {
                wanted: "established, unmatched: at most 60 ns over it".to_owned(),
                measured: format!("{:+.0} ns", small.established),
                met: small.established <= 60.0,
            });
            for (what, of_small, of_large, most) in [
                ("established", small.established, large.established, 1.1),
                ("first packet", small.first, large.first, 2.0),
            ] {
                let ratio = of_large / of_small;
                aims.push(Aim {
                    wanted: format!(
                        "{what}: 65,000 peers and 1,000 rules within {most} of 1 and 1"
                    ),
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
