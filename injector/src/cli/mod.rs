//! The `injector` command: its arguments, one module per subcommand, and what they print.
//!
//! A subcommand first turns its raw arguments into validated values, then reaches the daemon, then
//! prints; nothing is asked of a daemon, and none is started, for arguments that make no sense.

mod add;
mod apply;
mod check;
mod completions;
mod daemon;
mod distribution_file;
mod down;
mod events;
mod exec;
pub mod exit;
mod heal;
mod keeper;
mod lab;
mod list;
mod live;
mod output;
mod partition;
mod protect;
mod report;
mod rule_args;
mod scenario;
mod session;
mod show;
mod stats;
mod verdict;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum, error::ErrorKind};

use self::{
    exit::{EXIT_CODES, Exit, Failure},
    output::Output,
    session::Session,
};
use crate::{
    client::{ANSWER_TIME, DEFAULT_STATE_DIR, Endpoint, SOCKET_NAME},
    rules::text::duration,
};

/// When colour is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Color {
    /// On a terminal, unless the variable `NO_COLOR` is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// Faults in real traffic: chosen flows of unmodified services cut, delayed, damaged or slowed, and healed exactly
#[derive(Debug, Parser)]
#[command(
    name = "injector",
    version,
    max_term_width = 100,
    after_help = EXIT_CODES,
    infer_subcommands = false,
    arg_required_else_help = true
)]
pub struct Cli {
    /// Print one JSON document instead of text; errors too, on standard output
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// The daemon's socket [default: injector.sock in the state directory]
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "INJECTOR_SOCKET",
        help_heading = "Global options"
    )]
    socket: Option<PathBuf>,
    /// Where the daemon keeps its state
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "INJECTOR_STATE_DIR",
        default_value = DEFAULT_STATE_DIR,
        help_heading = "Global options"
    )]
    state_dir: PathBuf,
    /// How long to wait for the daemon's answer [default: 30s]
    #[arg(
        long,
        global = true,
        value_name = "TIME",
        help_heading = "Global options"
    )]
    timeout: Option<String>,
    /// When to show colour
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "auto",
        help_heading = "Global options"
    )]
    color: Color,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Add(Box<add::AddArgs>),
    Apply(apply::ApplyArgs),
    Partition(partition::PartitionArgs),
    List(list::ListArgs),
    Stats(stats::StatsArgs),
    Show(show::ShowArgs),
    Heal(heal::HealArgs),
    Exec(Box<exec::ExecArgs>),
    Run(scenario::RunArgs),
    Validate(scenario::ValidateArgs),
    Report(scenario::ReportArgs),
    Protect(protect::ProtectArgs),
    Events(events::EventsArgs),
    Check(check::CheckArgs),
    Lab(lab::LabArgs),
    Daemon(daemon::DaemonArgs),
    Down(down::DownArgs),
    #[command(hide = true)]
    Keeper(keeper::KeeperArgs),
    #[command(hide = true)]
    Completions(completions::CompletionsArgs),
    #[command(hide = true)]
    Man(completions::ManArgs),
}

/// Runs the command that the arguments (the program's name first) ask for.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return misread(&arguments, &error),
    };
    match cli.color {
        Color::Auto => {}
        Color::Always => anstream::ColorChoice::Always.write_global(),
        Color::Never => anstream::ColorChoice::Never.write_global(),
    }
    let json = cli.json;
    match cli.run() {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            output::report(&failure, json);
            ExitCode::from(failure.exit as u8)
        }
    }
}

/// Arguments that clap refuses, or that ask for help or the version.
fn misread(arguments: &[OsString], error: &clap::Error) -> ExitCode {
    let json = arguments
        .iter()
        .take_while(|argument| *argument != "--")
        .any(|a| a == "--json");
    let wrong =
        error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if json && wrong {
        let text = error.render().to_string();
        let mut lines = text.lines();
        let message = lines
            .next()
            .unwrap_or_default()
            .trim_start_matches("error: ");
        let mut failure = Failure::usage(message);
        failure.causes = lines
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .map(str::to_owned)
            .collect();
        output::report(&failure, true);
    } else {
        // Nothing can be said about output that fails.
        let _ = error.print();
    }
    // `exec` keeps the code 2 for its command, as env and timeout do.
    let exec = arguments
        .iter()
        .take_while(|argument| *argument != "--")
        .any(|a| a == "exec");
    match (error.use_stderr(), exec) {
        (false, _) => ExitCode::SUCCESS,
        (true, false) => ExitCode::from(Exit::Usage as u8),
        (true, true) => ExitCode::from(Exit::Exec as u8),
    }
}

impl Cli {
    fn run(self) -> Result<u8, Failure> {
        let session = self.session()?;
        let done = |result: Result<(), Failure>| result.map(|()| Exit::Success as u8);
        let with = |result: Result<Exit, Failure>| result.map(|exit| exit as u8);
        match self.command {
            Command::Add(args) => done(args.run(&session)),
            Command::Apply(args) => done(args.run(&session)),
            Command::Partition(args) => done(args.run(&session)),
            Command::List(_) => done(list::ListArgs::run(&session)),
            Command::Stats(args) => with(args.run(&session)),
            Command::Show(args) => done(args.run(&session)),
            Command::Heal(args) => with(args.run(&session)),
            Command::Exec(args) => args.run(&session).map_err(before_command),
            Command::Run(args) => with(args.run(&session)),
            Command::Validate(args) => with(args.run(&session)),
            Command::Report(args) => with(args.run(&session)),
            Command::Keeper(_) => {
                keeper::KeeperArgs::run(&session);
                Ok(Exit::Success as u8)
            }
            Command::Protect(args) => done(args.run(&session)),
            Command::Events(args) => done(args.run(&session)),
            Command::Check(_) => with(check::CheckArgs::run(session.output)),
            Command::Lab(args) => {
                let exec = args.is_exec();
                with(args.run(&session)).map_err(|f| if exec { before_command(f) } else { f })
            }
            Command::Daemon(args) => done(args.run(&session)),
            Command::Down(_) => with(down::DownArgs::run(&session)),
            Command::Completions(args) => done(args.run()),
            Command::Man(args) => done(args.run()),
        }
    }

    fn session(&self) -> Result<Session, Failure> {
        let answer_time = match &self.timeout {
            None => ANSWER_TIME,
            Some(text) => duration::parse(text)
                .ok()
                .filter(|time| !time.is_zero())
                .ok_or_else(|| {
                    Failure::usage(format!("--timeout '{text}' is not a time to wait"))
                        .help("a time above zero, such as --timeout 5s")
                })?,
        };
        // A daemon in the background has another working directory.
        let absolute = |flag: &str, path: &PathBuf| {
            std::path::absolute(path).map_err(|error| {
                Failure::usage(format!("{flag} '{}': finding the path", path.display()))
                    .caused_by(&error)
            })
        };
        let state_dir = absolute("--state-dir", &self.state_dir)?;
        let socket = match &self.socket {
            Some(socket) => absolute("--socket", socket)?,
            None => state_dir.join(SOCKET_NAME),
        };
        Ok(Session {
            endpoint: Endpoint {
                state_dir,
                socket,
                answer_time,
            },
            output: Output::new(self.json),
        })
    }
}

/// Commands that return another command's exit code fail with one that stays apart from it.
fn before_command(mut failure: Failure) -> Failure {
    if !matches!(failure.exit, Exit::NotExecutable | Exit::CommandNotFound) {
        failure.exit = Exit::Exec;
    }
    failure
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_contract_parses() {
        for line in [
            "add --iface eth0 --cut --to 10.0.0.1",
            "add r1 --iface eth0,eth1 --netns n1 --peer 10.0.0.0/8 --except 10.1.0.0/16 --cut",
            "add r1 -i eth0 --drop-pattern 0010 --length 1400- --flap up=3s,down=500ms --for 30s",
            "apply rules.json --mode replace",
            "apply - --json",
            "partition --side a --side b --side c --one-way --for 10s",
            "--json list",
            "list --json",
            "stats --watch",
            "stats --watch=100ms --json",
            "stats web --expect-effect",
            "show web --json",
            "heal web db",
            "heal --all --json",
            "check --json",
            "down",
            "exec -i eth0 --cut --to 10.0.0.1 -- curl -v http://10.0.0.1",
            "lab up --nodes 3",
            "lab exec n1 -- ip addr",
            "lab down",
            "lab status",
            "protect",
            "protect 10.0.0.1:22 :80",
            "protect --remove 10.0.0.1:22",
            "events --follow",
            "run scenario.yaml --seed 7 --self n1,n2 --start-at 2026-11-26T14:00:00Z --report dir",
            "run --dry-run - --json",
            "validate a.yaml b.yaml",
            "validate --schema",
            "report run.jsonl --dir out",
            "daemon --idle-exit 60s --state-dir /tmp/x",
        ] {
            let words = std::iter::once("injector").chain(line.split_whitespace());
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for line in [
            "",
            "add --cut --to 10.0.0.1",
            "heal --all web",
            "lab up --nodes 0",
            "lab up --nodes 65",
            "run",
            "run a.yaml --start-at tomorrow",
            "validate",
            "exec -i eth0 --cut --to 10.0.0.1",
            "stats --watch --expect-effect",
            "add -i eth0 --drop-nth x",
        ] {
            let words = std::iter::once("injector").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn failures_of_exec_stay_apart_from_the_commands_codes() {
        assert_eq!(before_command(Failure::usage("x")).exit, Exit::Exec);
        let failure = Failure::new(Exit::CommandNotFound, "exec", "x");
        assert_eq!(before_command(failure).exit, Exit::CommandNotFound);
    }
}
