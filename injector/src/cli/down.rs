//! `injector down`: everything ends, the daemon included.

use clap::Args;
use serde_json::json;

use super::{
    exit::{Exit, Failure},
    report,
    session::Session,
};
use crate::protocol::{Call, DownResult, NoArgs};

/// End all rules, detach from everything, end the daemon
#[derive(Debug, Args)]
pub(super) struct DownArgs {}

impl DownArgs {
    /// Runs the command.
    pub(super) fn run(session: &Session) -> Result<Exit, Failure> {
        let Some(mut connected) = session.connect()? else {
            let recovery = session.recover()?;
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
        let result: DownResult = connected.client.call(Call::Down(NoArgs {}))?;
        drop(connected.client);
        session.wait_until_gone(&connected.info)?;
        session.output.either(&result, || {
            let mut text = report::healed(&result.healed, result.host_restored, &result.problems);
            text.push_str("the daemon has ended\n");
            text
        })?;
        Ok(if result.host_restored {
            Exit::Success
        } else {
            Exit::Failed
        })
    }
}
