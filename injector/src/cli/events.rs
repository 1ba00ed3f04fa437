//! `injector events`: what happened.

use std::{thread, time::Duration};

use clap::Args;
use serde_json::json;

use super::{
    exit::Failure,
    output::{self, Tone, toned},
    session::Session,
};
use crate::protocol::{Call, Event, EventKind, EventsArgs as Request, EventsResult};

/// How often `--follow` asks.
const EVERY: Duration = Duration::from_millis(250);

/// Show what happened: rules, targets, the lease
#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Go on as things happen, until the daemon ends
    #[arg(short, long)]
    follow: bool,
    /// Only events after this number
    #[arg(long, value_name = "N", default_value_t = 0)]
    after: u64,
}

impl EventsArgs {
    /// Runs the command. With `--follow --json` every event is a document of its own.
    pub(super) fn run(&self, session: &Session) -> Result<(), Failure> {
        let Some(mut connected) = session.connect()? else {
            return session
                .output
                .either(&json!({ "events": [], "last": 0, "daemon": null }), || {
                    "no daemon is running, so nothing is known to have happened\n".to_owned()
                });
        };
        let mut after = self.after;
        loop {
            let call = Call::Events(Request { after });
            let result: EventsResult = match connected.client.call(call) {
                Ok(result) => result,
                Err(crate::client::ClientError::Died { .. }) if self.follow && after > 0 => {
                    output::say("the daemon has ended");
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            if result.missed > 0 {
                output::warn(&format!("{} events were forgotten already", result.missed));
            }
            if session.output.json && self.follow {
                for event in &result.events {
                    output::print_document(event)?;
                }
            } else if session.output.json {
                output::print_document(&result)?;
            } else if !result.events.is_empty() {
                let text: String = result.events.iter().map(line).collect();
                output::print(&text)?;
            }
            if !self.follow {
                return Ok(());
            }
            after = result.last;
            thread::sleep(EVERY);
        }
    }
}

fn line(event: &Event) -> String {
    let kind = serde_json::to_value(event.kind)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default();
    let kind = match event.kind {
        EventKind::Problem | EventKind::LeaseLapsed => toned(Tone::Bad, &kind),
        EventKind::RuleGone | EventKind::TargetGone | EventKind::TargetLost => {
            toned(Tone::Notice, &kind)
        }
        _ => kind,
    };
    format!("{} {:.3} {kind} {}\n", event.seq, event.at, event.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_each() {
        let event: Event = serde_json::from_value(json!({
            "seq": 3, "at": "2026-01-01T00:00:00Z", "kind": "rule_added", "rule": "web",
            "message": "rule web was added"
        }))
        .unwrap();
        assert_eq!(
            line(&event),
            "3 2026-01-01T00:00:00.000Z rule_added rule web was added\n"
        );
    }
}
