//! `injector add`: one rule.

use clap::Args;

use super::{
    exit::Failure,
    report,
    rule_args::RuleArgs,
    session::{self, Session},
};
use crate::{
    protocol::{AddArgs as Request, AddResult, Call},
    rules::RuleSpec,
};

/// Add a rule: its faults act on packets that match it, from now on
#[derive(Debug, Args)]
pub(super) struct AddArgs {
    /// Name of the rule [default: made from its content]
    pub(super) name: Option<String>,
    #[command(flatten)]
    rule: RuleArgs,
    /// Replace a rule of the same name instead of refusing
    #[arg(long)]
    replace: bool,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
}

impl AddArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<(), Failure> {
        let rule = self
            .rule
            .to_rule(self.name.as_deref(), &session.endpoint.state_dir)?;
        let mut spec = RuleSpec::from(&rule);
        let mut connected = session.connect_or_start()?;
        if spec.netns.is_none() {
            spec.netns = session::own_netns(&connected.info)?;
        }
        if rule.name_generated {
            // The namespace may have been filled in, and is part of the content.
            spec.name = None;
        }
        let result: AddResult = connected.client.call(Call::Add(Request {
            rules: vec![spec],
            replace: self.replace,
            hold: false,
            operator: session::operator(self.rule.no_protect_operator),
            dry_run: self.dry_run,
        }))?;
        report::warnings(&result.warnings);
        session
            .output
            .either(&result, || report::added(&result, self.dry_run))
    }
}
