//! What a bulk transfer feels: iperf3 between two namespaces with nothing attached, attached without rules,
//! and attached with 1,000 rules that are about other traffic. The three take turns.

use std::sync::Arc;

use anyhow::Result;
use injector::{
    attach::{Attachment, inspect},
    dataplane::{DataPlane, Hook, LinkKind, Sizes, TargetConfig, TargetSlot},
    journal::Journal,
    netns::Netns,
    rules::model::NetnsRef,
};
use serde::Serialize;
use tests::{
    lab::{iperf::iperf, scratch::Scratch, topology::Lab},
    subject::{many::Size, meter::median},
    table::Table,
};

use super::{Aim, span};

const ROUNDS: usize = 7;
const SECONDS: &str = "2";
const SLOT: u16 = 1;
const OTHERS: Size = Size {
    peers: 65_000,
    rules: 1000,
};

/// What was measured, in Gbit/s.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    seconds: &'static str,
    cases: Vec<Case>,
}

#[derive(Debug, Serialize)]
struct Case {
    case: &'static str,
    gbits: Vec<f64>,
}

pub(crate) fn measure() -> Result<Report> {
    let lab = Lab::pair()?;
    let scratch = Scratch::new()?;
    let journal = Arc::new(Journal::open(scratch.path())?);
    let netns = Netns::resolve(&NetnsRef::Name(lab.a().netns().to_owned()))?;
    let link = inspect(&netns, "eth0")?;
    let mut plane = DataPlane::load(&Sizes::default())?;
    plane.lease().renew(u64::MAX);
    let target = TargetSlot(SLOT);
    let targets = [TargetConfig {
        slot: target,
        link: LinkKind::Ethernet,
        loopback: false,
        ifindex: 0,
        lane: None,
    }];
    let others = OTHERS.rules(target, 1)?;
    let mut cases = ["nothing attached", "no rules", "1,000 rules for others"].map(|case| Case {
        case,
        gbits: Vec::new(),
    });
    for round in 0..ROUNDS {
        for turn in 0..cases.len() {
            let index = (round + turn) % cases.len();
            let attachment = if index == 0 {
                None
            } else {
                let rules = if index == 1 { &[][..] } else { &others };
                plane.commit(&targets, rules, &[])?;
                Some(Attachment::attach(
                    &link,
                    &journal,
                    plane.program_fd(Hook::Egress),
                    plane.program_fd(Hook::Ingress),
                    SLOT,
                )?)
            };
            let report = iperf(lab.a(), lab.b(), &["--time", SECONDS])?;
            cases[index].gbits.push(report.received()? / 1e9);
            if let Some(mut attachment) = attachment {
                attachment.detach()?;
            }
        }
    }
    Ok(Report {
        seconds: SECONDS,
        cases: cases.into(),
    })
}

impl Report {
    /// The median of a case over that of nothing attached.
    fn ratio(&self, case: &Case) -> f64 {
        let nothing = self.cases.first().map_or(0.0, |case| median(&case.gbits));
        median(&case.gbits) / nothing
    }

    pub(crate) fn aims(&self) -> Vec<Aim> {
        let Some((nothing, attached)) = self.cases.split_first() else {
            return Vec::new();
        };
        let (low, high) = span(&nothing.gbits);
        let noise = (high - low) / median(&nothing.gbits);
        attached
            .iter()
            .map(|case| Aim {
                wanted: format!("iperf3, {}: as with nothing, within noise", case.case),
                measured: format!("{:.2}, noise {:.2}", self.ratio(case), noise),
                met: self.ratio(case) >= 1.0 - noise,
            })
            .collect()
    }

    pub(crate) fn text(&self, terminal: bool) -> String {
        let mut table = Table::new(&["attached", "median", "from", "to", "ratio"]);
        for case in &self.cases {
            let (low, high) = span(&case.gbits);
            table.row([
                case.case.to_owned(),
                format!("{:.2}", median(&case.gbits)),
                format!("{low:.2}"),
                format!("{high:.2}"),
                format!("{:.2}", self.ratio(case)),
            ]);
        }
        format!(
            "iperf3 over a veth pair, one TCP stream, {ROUNDS} runs of {} s each in turns, Gbit/s:\n\n{}",
            self.seconds,
            table.render(terminal)
        )
    }
}
