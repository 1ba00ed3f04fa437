//! `injector list`: the rules there are.

use std::fmt::Write;

use clap::Args;
use serde_json::json;

use super::{
    exit::Failure,
    output::{Output, Table, Tone, time, toned},
    report,
    session::Session,
};
use crate::protocol::{Call, ListResult, NoArgs, RuleState};

/// List the rules, and what they leave alone
#[derive(Debug, Args)]
pub(super) struct ListArgs {}

impl ListArgs {
    /// Runs the command.
    pub(super) fn run(session: &Session) -> Result<(), Failure> {
        let Some(mut connected) = session.connect()? else {
            let recovery = session.recover()?;
            return session.output.either(
                &json!({ "rules": [], "protected": [], "daemon": null, "recovered": recovery }),
                || "no daemon is running, so there are no rules\n".to_owned(),
            );
        };
        let result: ListResult = connected.client.call(Call::List(NoArgs {}))?;
        session
            .output
            .either(&result, || text(session.output, &result))
    }
}

fn text(output: Output, result: &ListResult) -> String {
    let mut text = String::new();
    if result.rules.is_empty() {
        text.push_str("there are no rules\n");
    } else {
        // The rules of a partition are named after it.
        let grouped = result.rules.iter().any(|rule| {
            let group = rule.spec.group.as_deref();
            group.is_some_and(|group| !report::name(&rule.spec).starts_with(&format!("{group}:")))
        });
        let mut head = vec!["NAME", "STATE", "TARGETS", "FAULT", "PACKETS", "REMAINING"];
        if grouped {
            head.insert(1, "GROUP");
        }
        let mut table = Table::new(&head);
        for rule in &result.rules {
            let mut fault = report::fault(&rule.spec);
            if let Some(flap) = &rule.spec.flap {
                let _ = write!(fault, ", flapping {flap}");
            }
            let remaining = match (rule.remaining, rule.held) {
                (Some(seconds), _) => time(seconds),
                (None, true) => "while its command runs".to_owned(),
                (None, false) => "until healed".to_owned(),
            };
            let state = match &rule.state_reason {
                Some(reason) => format!("{} ({reason})", report::state(rule.state)),
                None => report::state(rule.state),
            };
            let mut packets = report::selector(&rule.spec);
            if rule.unprotected {
                packets.push_str(", protected ones too");
            }
            // What ended the rule is said once.
            let mut targets = rule.targets.clone();
            for target in &mut targets {
                target
                    .problem
                    .take_if(|problem| Some(&*problem) == rule.state_reason.as_ref());
            }
            let active = rule.state == RuleState::Active;
            let mut row = vec![
                report::name(&rule.spec).to_owned(),
                state,
                report::targets(&targets, active),
                fault,
                packets,
                remaining,
            ];
            if grouped {
                row.insert(1, rule.spec.group.clone().unwrap_or_else(|| "-".to_owned()));
            }
            table.row(row);
        }
        text.push_str(&output.table(&table));
    }
    text.push_str(&report::protected(&result.protected));
    if !result.lease.valid {
        let _ = writeln!(
            text,
            "{} the lease has lapsed: no rule acts until the daemon renews it",
            toned(Tone::Bad, "WARNING:")
        );
    } else if result.lease.lapses > 0 {
        let _ = writeln!(
            text,
            "{} the lease lapsed {} times since the daemon started: rules did not act in between",
            toned(Tone::Notice, "warning:"),
            result.lease.lapses
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_shown_where_names_do_not_say_them() {
        let shown = |name: &str| {
            let result: ListResult = serde_json::from_value(json!({
                "rules": [{
                    "spec": {"name": name, "group": "split", "iface": ["p1"], "src": ["10.0.0.1"],
                        "fault": {"cut": true}, "seed": 1},
                    "state": "active", "targets": [], "activated_at": "2026-01-01T00:00:00Z",
                    "activation": 1
                }],
                "protected": [],
                "lease": {"seconds": 10.0, "valid": true, "lapses": 0},
                "daemon": {"pid": 1, "version": "0", "protocol": 1,
                    "started": "2026-01-01T00:00:00Z", "state_dir": "/run/injector"},
                "epoch": 3
            }))
            .unwrap();
            text(Output::plain(), &result)
        };
        assert!(!shown("split:1-2").contains("GROUP"));
        assert!(shown("other").contains("GROUP"));
    }

    #[test]
    fn rules_in_plain_columns() {
        let result: ListResult = serde_json::from_value(json!({
            "rules": [{
                "spec": {"name": "web", "netns": "n1", "iface": ["eth0"], "direction": "egress",
                    "peer": ["10.0.0.1"], "fault": {"drop_every": 10}, "for": "30s", "seed": 1},
                "state": "active", "targets": [{"netns": "n1", "iface": "eth0", "ifindex": 2,
                    "attached": true}],
                "activated_at": "2026-01-01T00:00:00Z", "remaining": 12.34, "activation": 1
            }, {
                "spec": {"name": "old", "iface": ["eth9"], "proto": ["tcp"],
                    "fault": {"cut": true}, "seed": 1},
                "state": "gone", "state_reason": "eth9 was deleted", "targets": [],
                "activated_at": "2026-01-01T00:00:00Z", "activation": 2
            }],
            "protected": [{"what": "port 22", "why": "the protect list"}],
            "lease": {"seconds": 10.0, "valid": true, "lapses": 0},
            "daemon": {"pid": 1, "version": "0", "protocol": 1, "started": "2026-01-01T00:00:00Z",
                "state_dir": "/run/injector"},
            "epoch": 3
        }))
        .unwrap();
        let shown = text(Output::plain(), &result);
        assert_eq!(
            super::super::output::bare(&shown),
            "\
NAME  STATE                    TARGETS  FAULT                                PACKETS      REMAINING
web   active                   n1/eth0  drop every 10th packet of each flow  to 10.0.0.1  12.3s
old   gone (eth9 was deleted)  -        cut                                  tcp          until healed
left alone: port 22 (the protect list)
"
        );
    }
}
