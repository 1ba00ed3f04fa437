//! `injector lab`: network namespaces on a bridge, to try things out.

use std::{ffi::OsString, fmt::Write, os::unix::process::CommandExt};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    exit::{Exit, Failure},
    output::{Table, Tone, toned},
    report,
    session::{self, Session},
};
use crate::lab::{self, Lab, LabError};

/// Make a lab of network namespaces on a bridge, to try things out
#[derive(Debug, Args)]
pub(super) struct LabArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a lab: nodes n1, n2 … on a bridge, with IPv4 and IPv6 addresses
    Up {
        /// How many nodes
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=i64::from(lab::MAX_NODES)))]
        nodes: u8,
        #[command(flatten)]
        name: Name,
    },
    /// Run a command in a node (n1 …, or sw for the switch)
    Exec {
        /// The node
        node: String,
        #[command(flatten)]
        name: Name,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Remove a lab's namespaces and network; what still runs in it is named, not ended
    Down {
        #[command(flatten)]
        name: Name,
    },
    /// Show the labs there are
    Status {
        /// Show this lab only
        #[arg(long = "name", value_name = "LAB")]
        name: Option<String>,
    },
}

#[derive(Debug, Args)]
struct Name {
    /// Name of the lab
    #[arg(long = "name", value_name = "LAB", default_value = lab::DEFAULT_NAME)]
    text: String,
}

impl LabArgs {
    /// Whether the command's own exit code is returned, so that ours must stay apart from it.
    #[must_use]
    pub(super) fn is_exec(&self) -> bool {
        matches!(self.action, Action::Exec { .. })
    }

    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<Exit, Failure> {
        let dir = &session.endpoint.state_dir;
        let output = session.output;
        match &self.action {
            Action::Up { nodes, name } => {
                needs_root("making a lab")?;
                let lab = lab::up(dir, &name.text, *nodes).map_err(|e| failed(&e))?;
                output.either(&lab, || {
                    let mut text = described(session, std::slice::from_ref(&lab));
                    let example = &lab.name;
                    let option = if example == lab::DEFAULT_NAME {
                        String::new()
                    } else {
                        format!(" --name {example}")
                    };
                    // Writing to a String does not fail, here and below.
                    let _ = writeln!(
                        text,
                        "run commands in it: injector lab exec n1{option} -- ping 10.77.0.2"
                    );
                    text
                })?;
            }
            Action::Exec {
                node,
                name,
                command,
            } => {
                let Some((program, arguments)) = command.split_first() else {
                    return Err(Failure::usage("no command is given"));
                };
                needs_root("entering a lab")?;
                let program = program.to_string_lossy();
                let error = lab::command(dir, &name.text, node, &program)
                    .map_err(|e| failed(&e))?
                    .args(arguments)
                    .exec();
                let exit = super::exec::spawn_exit(&error);
                return Err(
                    Failure::new(exit, "exec", format!("running {program}")).caused_by(&error)
                );
            }
            Action::Down { name } => {
                needs_root("removing a lab")?;
                match lab::down(dir, &name.text).map_err(|e| failed(&e))? {
                    None => output.either(&json!({ "removed": null }), || {
                        format!("there is no lab '{}'\n", name.text)
                    })?,
                    Some(removed) => output.either(&json!({ "removed": removed }), || {
                        let mut text = format!(
                            "removed lab '{}' ({})\n",
                            name.text,
                            report::widen(removed.namespaces.len()).to_string() + " namespaces"
                        );
                        for note in &removed.notes {
                            let _ = writeln!(text, "{} {note}", toned(Tone::Notice, "note:"));
                        }
                        text
                    })?,
                }
            }
            Action::Status { name } => {
                let mut labs = lab::status(dir).map_err(|e| failed(&e))?;
                if let Some(name) = name {
                    labs.retain(|lab| lab.name == *name);
                    if labs.is_empty() {
                        return Err(Failure::new(
                            Exit::Failed,
                            "lab",
                            format!("there is no lab '{name}'"),
                        )
                        .help("`injector lab status` shows the labs there are"));
                    }
                }
                output.either(&json!({ "labs": labs }), || described(session, &labs))?;
            }
        }
        Ok(Exit::Success)
    }
}

fn needs_root(what: &str) -> Result<(), Failure> {
    if session::may_attach() {
        return Ok(());
    }
    Err(Failure::new(
        Exit::NotPermitted,
        "not_permitted",
        format!("{what} needs root"),
    )
    .help("run this as root (sudo)"))
}

fn failed(error: &LabError) -> Failure {
    Failure::from_error(Exit::Failed, "lab", error)
}

fn described(session: &Session, labs: &[Lab]) -> String {
    if labs.is_empty() {
        return "there is no lab; make one with `injector lab up`\n".to_owned();
    }
    let mut table = Table::new(&["LAB", "NODE", "NAMESPACE", "INTERFACE", "ADDRESSES"]);
    let mut notes = String::new();
    for lab in labs {
        for node in &lab.nodes {
            let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
            table.row(vec![
                lab.name.clone(),
                node.name.clone(),
                node.netns.clone(),
                "eth0".to_owned(),
                addresses.join(", "),
            ]);
        }
        let ports: Vec<&str> = lab.nodes.iter().map(|node| node.port.as_str()).collect();
        table.row(vec![
            lab.name.clone(),
            "sw".to_owned(),
            lab.switch.clone(),
            format!("{} ({})", lab.bridge, ports.join(", ")),
            "-".to_owned(),
        ]);
        for problem in &lab.problems {
            let _ = writeln!(notes, "{} {problem}", toned(Tone::Bad, "WARNING:"));
        }
    }
    session.output.table(&table) + &notes
}
