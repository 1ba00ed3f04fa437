//! Rules in words, for tables and messages.

use std::fmt::Write;

use super::{
    model::{Direction, Fault, Rule, Selector},
    shaping::Shaping,
    spec::RuleSpec,
};

/// Lists in words name at most so many entries.
const SHOWN: usize = 4;

impl Fault {
    /// The fault in words: `cut`, `drop every 10th packet of each flow`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Fault::Cut => "cut".to_owned(),
            Fault::DropNth(n) => format!("drop the {} packet of each flow", ordinal(*n)),
            Fault::DropFirst(1) => "drop the first packet of each flow".to_owned(),
            Fault::DropFirst(n) => format!("drop the first {n} packets of each flow"),
            Fault::DropEvery(1) => "drop every packet of each flow".to_owned(),
            Fault::DropEvery(n) => format!("drop every {} packet of each flow", ordinal(*n)),
            Fault::DropPattern { bits, once } => {
                let text: String = bits
                    .iter()
                    .map(|&bit| if bit { '1' } else { '0' })
                    .collect();
                let how = if *once { "once" } else { "over and over" };
                format!("drop by pattern {text} in each flow, {how}")
            }
            Fault::DropOnce => "drop one packet".to_owned(),
            Fault::Reject(answer) => format!("reject with {}", answer.name()),
            Fault::None => "drop nothing".to_owned(),
        }
    }
}

impl Rule {
    /// What happens to the packets, in words: `cut`, `delay 100ms, lose 1%`.
    #[must_use]
    pub fn describe_faults(&self) -> String {
        let mut parts = Vec::new();
        if self.fault != Fault::None {
            parts.push(self.fault.describe());
        }
        parts.extend(self.shaping.describe());
        parts.join(", ")
    }
}

/// `1st`, `2nd`, `3rd`, `4th`, `11th`.
fn ordinal(n: u64) -> String {
    let suffix = match (n % 10, n % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{n}{suffix}")
}

impl Selector {
    /// The selector in words: `to 10.0.0.0/8, peer port 80, tcp`.
    #[must_use]
    pub fn describe(&self) -> String {
        RuleSpec::describe_selector(&self.to_spec(), self.direction)
    }

    /// The selector's part of the text form.
    fn to_spec(&self) -> RuleSpec {
        RuleSpec::from(&Rule {
            name: String::new(),
            name_generated: false,
            group: None,
            netns: super::model::NetnsRef::Own,
            interfaces: Vec::new(),
            selector: self.clone(),
            fault: Fault::Cut,
            shaping: Shaping::default(),
            lifetime: None,
            flap: None,
            seed: 0,
            key: super::model::FlowIdentity::Tuple,
            all_traffic: false,
            unprotected: false,
        })
    }
}

impl Rule {
    /// Which packets the rule is for and how it acts in time, in words.
    #[must_use]
    pub fn describe_selector(&self) -> String {
        RuleSpec::describe_selector(&RuleSpec::from(self), self.selector.direction)
    }
}

impl RuleSpec {
    fn describe_selector(spec: &RuleSpec, direction: Direction) -> String {
        let mut parts: Vec<String> = Vec::new();
        let (peer, alone) = match direction {
            Direction::Egress => ("to", "leaving"),
            Direction::Ingress => ("from", "arriving"),
            Direction::Both => ("to and from", ""),
        };
        if spec.peer.is_empty() {
            if !alone.is_empty() {
                parts.push(alone.to_owned());
            }
        } else {
            parts.push(format!("{peer} {}", shortened(&spec.peer)));
        }
        for (name, list) in [
            ("local", &spec.local),
            ("src", &spec.src),
            ("dst", &spec.dst),
            ("peer port", &spec.peer_port),
            ("local port", &spec.local_port),
            ("src port", &spec.src_port),
            ("dst port", &spec.dst_port),
            ("", &spec.proto),
            ("type", &spec.icmp_type),
        ] {
            if !list.is_empty() {
                parts.push(
                    format!("{name} {}", shortened(list))
                        .trim_start()
                        .to_owned(),
                );
            }
        }
        if let Some(version) = spec.ip_version {
            parts.push(format!("IPv{version}"));
        }
        if let Some(flags) = &spec.tcp_flags {
            parts.push(format!("flags {flags}"));
        }
        for (name, list) in [
            ("length", &spec.length),
            ("dscp", &spec.dscp),
            ("mark", &spec.mark),
        ] {
            if !list.is_empty() {
                parts.push(format!("{name} {}", shortened(list)));
            }
        }
        if let Some(share) = &spec.flows {
            parts.push(format!("{share} of flows"));
        }
        if let Some(state) = &spec.state {
            parts.push(format!("{state} connections"));
        }
        if parts.is_empty() {
            "all traffic".to_owned()
        } else {
            parts.join(", ")
        }
    }
}

fn shortened(list: &[String]) -> String {
    let mut text = list
        .iter()
        .take(SHOWN)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(",");
    if list.len() > SHOWN {
        // Writing to a String does not fail.
        let _ = write!(text, " and {} more", list.len() - SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::model::Answer;

    #[test]
    fn faults_in_words() {
        for (fault, words) in [
            (Fault::Cut, "cut"),
            (Fault::Reject(Answer::IcmpHost), "reject with icmp-host"),
            (Fault::DropNth(1), "drop the 1st packet of each flow"),
            (Fault::DropNth(12), "drop the 12th packet of each flow"),
            (Fault::DropFirst(3), "drop the first 3 packets of each flow"),
            (Fault::DropEvery(10), "drop every 10th packet of each flow"),
            (
                Fault::DropEvery(102),
                "drop every 102nd packet of each flow",
            ),
            (
                Fault::DropPattern {
                    bits: vec![false, true],
                    once: true,
                },
                "drop by pattern 01 in each flow, once",
            ),
            (Fault::DropOnce, "drop one packet"),
        ] {
            assert_eq!(fault.describe(), words);
        }
    }

    #[test]
    fn selectors_in_words() {
        let spec: RuleSpec = serde_json::from_str(
            r#"{"iface":"eth0","direction":"egress","peer":"10.0.0.0/8,!10.1.0.0/16","proto":"tcp",
                "peer_port":"80,443","flows":"25%","state":"new","fault":{"cut":true}}"#,
        )
        .unwrap();
        assert_eq!(
            spec.parse().unwrap().selector.describe(),
            "to 10.0.0.0/8,!10.1.0.0/16, peer port 80,443, tcp, 25% of flows, new connections"
        );
        assert_eq!(Selector::default().describe(), "all traffic");
    }

    #[test]
    fn long_lists_are_shortened() {
        let list: Vec<String> = (1..=6).map(|n| n.to_string()).collect();
        assert_eq!(shortened(&list), "1,2,3,4 and 2 more");
    }
}
