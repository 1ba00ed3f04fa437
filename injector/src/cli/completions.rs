//! `injector completions` and `injector man`: what is generated from the command line's definition.

use std::{io, path::PathBuf};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, exit::Failure};

/// Print completions for a shell
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl CompletionsArgs {
    /// Runs the command.
    pub(super) fn run(&self) -> Result<(), Failure> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "injector", &mut text);
        io::Write::write_all(&mut io::stdout().lock(), &text)
            .map_err(|error| Failure::output(&error))
    }
}

/// Write man pages, one for each command
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The folder to write them to
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

impl ManArgs {
    /// Runs the command.
    pub(super) fn run(&self) -> Result<(), Failure> {
        clap_mangen::generate_to(Cli::command(), &self.folder).map_err(|error| {
            Failure::usage(format!("writing man pages to {}", self.folder.display()))
                .caused_by(&error)
        })
    }
}
