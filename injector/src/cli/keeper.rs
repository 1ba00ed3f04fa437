//! `injector keeper`: what undoes the deeds of a run if that cannot do it itself. Started by `injector run`.

use clap::Args;

use super::session::Session;
use crate::scenario::play::keeper;

/// Undo what a run has done to the host when its standard input ends
#[derive(Debug, Args)]
pub(super) struct KeeperArgs {}

impl KeeperArgs {
    /// Runs the command.
    pub(super) fn run(session: &Session) {
        let problems = keeper::keep(std::io::stdin(), &session.endpoint.state_dir);
        for problem in &problems {
            // Whoever started this reads it; if they are gone, nobody does.
            println!("{problem}");
        }
    }
}
