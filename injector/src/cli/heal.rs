//! `injector heal`: rules end.

use clap::Args;
use serde_json::json;

use super::{
    exit::{Exit, Failure},
    report,
    session::{self, Session},
};
use crate::protocol::{Call, HealArgs as Request, HealResult};

/// End rules; what they hold leaves at its time, later packets of a flow behind it
#[derive(Debug, Args)]
pub(super) struct HealArgs {
    /// Rules and groups (partitions) to end
    #[arg(conflicts_with = "all")]
    names: Vec<String>,
    /// End every rule there is
    #[arg(short, long)]
    all: bool,
    /// Drop the packets that the rules hold, instead of letting them leave at their time
    #[arg(long)]
    flush: bool,
}

impl HealArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<Exit, Failure> {
        if self.names.is_empty() && !self.all {
            return Err(Failure::usage("heal: no rule is named").help(
                "name rules or groups, or end every rule with --all; `injector list` shows them",
            ));
        }
        let Some(mut connected) = session.connect()? else {
            let recovery = session.recover()?;
            if let Some(name) = self.names.first() {
                return Err(session::no_such_rule(name));
            }
            let problems = recovery
                .as_ref()
                .map_or(&[][..], |recovery| &recovery.failed);
            let restored = problems.is_empty();
            session.output.either(
                &json!({
                    "healed": [], "host_restored": restored, "problems": problems,
                    "daemon": null, "recovered": recovery,
                }),
                || "no daemon is running, so there are no rules\n".to_owned(),
            )?;
            return Ok(if restored {
                Exit::Success
            } else {
                Exit::Failed
            });
        };
        let call = Call::Heal(Request {
            names: self.names.clone(),
            all: self.all,
            flush: self.flush,
        });
        let result: HealResult = connected.client.call(call)?;
        session.output.either(&result, || {
            let mut text = report::healed(&result.healed, result.host_restored, &result.problems);
            text.push_str(&report::flushes(&result.flushing));
            if self.flush && result.flushing.is_empty() {
                text.push_str("none of them held packets\n");
            }
            text
        })?;
        Ok(if result.problems.is_empty() {
            Exit::Success
        } else {
            Exit::Failed
        })
    }
}
