//! `injector apply`: many rules at once, from a file.

use std::{
    fs,
    io::{self, Read},
    path::PathBuf,
};

use clap::{Args, ValueEnum};
use serde::de::Error as _;
use serde_json::Value;

use super::{
    distribution_file,
    exit::Failure,
    report,
    rule_args::{Names, absolute_netns},
    session::{self, Session},
};
use crate::{
    protocol::{AddResult, ApplyArgs as Request, ApplyMode, Call},
    rules::RuleSpec,
};

/// What becomes of rules that are not in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// They stay
    Add,
    /// They are healed
    Replace,
}

/// Add the rules of a file, all at once or none; with --replace they are the only ones
///
/// The file holds JSON: what `injector list --json` prints, a list of rules, or one rule. A rule that
/// exists under its name and says the same is left alone, with its counters.
#[derive(Debug, Args)]
pub(super) struct ApplyArgs {
    /// The file; - for standard input
    file: PathBuf,
    /// What becomes of rules that are not in the file
    #[arg(long, value_enum, default_value = "add")]
    mode: Mode,
    /// Same as --mode replace
    #[arg(long, conflicts_with = "mode")]
    replace: bool,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not protect the control connection (SSH) that this command is run over
    #[arg(long)]
    no_protect_operator: bool,
    /// A hosts file for names in address lists, besides /etc/hosts and those of labs
    #[arg(long, value_name = "FILE")]
    hosts: Vec<PathBuf>,
}

impl ApplyArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<(), Failure> {
        let shown = self.file.display();
        let text = if self.file.as_os_str() == "-" {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            fs::read_to_string(&self.file)
        }
        .map_err(|error| Failure::usage(format!("reading rules from {shown}")).caused_by(&error))?;
        let mut specs = read(&text).map_err(|error| {
            Failure::usage(format!("{shown} is not a file of rules"))
                .caused_by(&error)
                .help(
                    "it holds JSON: what `injector list --json` prints, or \
                     [{\"iface\": [\"eth0\"], \"peer\": [\"10.0.0.1\"], \"fault\": {\"cut\": true}}, …]",
                )
        })?;
        let mut names = Names::new(&session.endpoint.state_dir, &self.hosts);
        let mut generated = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter_mut().enumerate() {
            let rule = (|| {
                for list in [
                    &mut spec.peer,
                    &mut spec.local,
                    &mut spec.src,
                    &mut spec.dst,
                    &mut spec.except,
                ] {
                    if !list.is_empty() {
                        *list = names.resolve(list)?;
                    }
                }
                if let Some(text) = &mut spec.fault.distribution {
                    *text = distribution_file::inline(text)?;
                }
                if let Some(netns) = &mut spec.netns {
                    *netns = absolute_netns(netns)?;
                }
                spec.parse()
                    .map_err(|error| Failure::from_spec(&error, false))
            })();
            let rule = rule.map_err(|mut failure: Failure| {
                let name = match &spec.name {
                    Some(name) => format!(" ('{name}')"),
                    None => String::new(),
                };
                failure.message =
                    format!("rule {}{name} of {shown}: {}", index + 1, failure.message);
                failure
            })?;
            generated.push(rule.name_generated);
            *spec = RuleSpec::from(&rule);
        }
        let mode = if self.replace {
            Mode::Replace
        } else {
            self.mode
        };
        if specs.is_empty() && mode == Mode::Add {
            return Err(Failure::usage(format!("{shown} holds no rule"))
                .help("with --mode replace an empty list heals all rules"));
        }
        let mut connected = session.connect_or_start()?;
        if let Some(netns) = session::own_netns_if(&specs, &connected.info)? {
            for (spec, generated) in specs.iter_mut().zip(generated) {
                if spec.netns.is_none() {
                    spec.netns = Some(netns.clone());
                    if generated {
                        spec.name = None;
                    }
                }
            }
        }
        let result: AddResult = connected.client.call(Call::Apply(Request {
            rules: specs,
            mode: match mode {
                Mode::Add => ApplyMode::Add,
                Mode::Replace => ApplyMode::Replace,
            },
            operator: session::operator(self.no_protect_operator),
            dry_run: self.dry_run,
        }))?;
        report::warnings(&result.warnings);
        session
            .output
            .either(&result, || report::added(&result, self.dry_run))
    }
}

/// Reads rules in any of the forms in which this program prints them, or a person would write them:
/// `{"rules": […]}`, `[…]`, or one rule; each rule bare or as the `spec` of its status.
fn read(text: &str) -> Result<Vec<RuleSpec>, serde_json::Error> {
    let value: Value = serde_json::from_str(text)?;
    let rules = match value {
        Value::Array(rules) => rules,
        Value::Object(mut object) => match object.remove("rules") {
            Some(Value::Array(rules)) => rules,
            Some(_) => return Err(serde_json::Error::custom("\"rules\" is not a list")),
            None => vec![Value::Object(object)],
        },
        _ => return Err(serde_json::Error::custom("neither an object nor a list")),
    };
    rules
        .into_iter()
        .enumerate()
        .map(|(index, value)| {
            let spec = match value {
                Value::Object(mut object) if object.contains_key("spec") => {
                    object.remove("spec").unwrap_or_default()
                }
                other => other,
            };
            serde_json::from_value(spec)
                .map_err(|error| serde_json::Error::custom(format!("rule {}: {error}", index + 1)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        let rule = r#"{"iface":"eth0","peer":"10.0.0.1","fault":{"cut":true}}"#;
        for text in [
            rule.to_owned(),
            format!("[{rule}]"),
            format!(r#"{{"rules":[{rule}]}}"#),
            format!(r#"{{"rules":[{{"spec":{rule},"state":"active"}}],"epoch":4}}"#),
        ] {
            let specs = read(&text).unwrap();
            assert_eq!(specs.len(), 1, "{text}");
            assert_eq!(specs[0].iface, ["eth0"]);
        }
        assert!(read("[]").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_file_of_rules_says_where() {
        for (text, fragment) in [
            ("", "EOF"),
            ("rules:\n  - cut", "expected"),
            ("7", "neither"),
            (r#"{"rules":7}"#, "not a list"),
            (
                r#"[{"iface":"a"},{"ifcae":"b"}]"#,
                "rule 2: unknown field `ifcae`",
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(fragment), "{text}: {error}");
        }
    }
}
