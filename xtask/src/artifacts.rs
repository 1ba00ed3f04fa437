//! What a cargo invocation has built, from its JSON messages.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;

/// One executable that cargo has built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Executable {
    /// The name of its target: a binary's, a library's, an integration test's.
    pub(crate) name: String,
    /// `lib`, `bin`, `test` …
    pub(crate) kind: String,
    /// The folder of its package.
    pub(crate) package: PathBuf,
    /// Whether it is a test harness and not the program itself.
    pub(crate) test: bool,
    /// The file.
    pub(crate) path: PathBuf,
}

impl Executable {
    /// The name of the package's folder.
    pub(crate) fn package_name(&self) -> String {
        self.package
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }
}

/// The messages of cargo that matter here.
#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Runs a cargo command, which must ask for [`FORMAT`], and returns the executables that it built.
pub(crate) fn executables(command: &mut Command, purpose: &str) -> Result<Vec<Executable>> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{purpose}: `{}` cannot be started", process::shown(command)))?;
    if !output.status.success() {
        bail!(
            "{purpose}: `{}` failed ({}); its own messages are above",
            process::shown(command),
            output.status
        );
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Makes cargo print JSON messages on stdout and the compiler's diagnostics for people on stderr.
pub(crate) const FORMAT: &str = "--message-format=json-render-diagnostics";

/// The executables in cargo's messages. Lines that are no message of cargo are skipped.
fn parse(messages: &str) -> Vec<Executable> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter(|message| message.reason == "compiler-artifact")
        .filter_map(|message| {
            let target = message.target?;
            Some(Executable {
                name: target.name,
                kind: target.kind.into_iter().next()?,
                package: message.manifest_path?.parent()?.to_owned(),
                test: message.profile?.test,
                path: message.executable?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_among_messages() {
        let messages = r#"{"reason":"compiler-artifact","package_id":"x","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"crate_types":["bin"],"name":"lab","src_path":"/w/tests/tests/lab.rs"},"profile":{"opt_level":"0","test":true},"features":[],"filenames":["/w/target/debug/deps/lab-1"],"executable":"/w/target/debug/deps/lab-1","fresh":true}
{"reason":"compiler-artifact","package_id":"y","manifest_path":"/w/injector/Cargo.toml","target":{"kind":["lib"],"name":"injector"},"profile":{"test":false},"executable":null}
not json
{"reason":"build-finished","success":true}"#;
        let found = parse(messages);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (
                found[0].name.as_str(),
                found[0].kind.as_str(),
                found[0].test
            ),
            ("lab", "test", true)
        );
        assert_eq!(found[0].package_name(), "tests");
    }
}
