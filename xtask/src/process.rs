//! Running other programs, with errors that name the command and why it was run.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Output, Stdio};

use anyhow::{Context, Result, bail};

/// What cargo sets for a program that it runs. None of it is meant for another cargo.
const SET_BY_CARGO: [&str; 3] = [
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_PATH",
    "CARGO_PRIMARY_PACKAGE",
];

/// The command as one would type it, for messages.
pub(crate) fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Runs the command with its output going where ours goes; an exit status other than 0 is an error.
pub(crate) fn run(command: &mut Command, purpose: &str) -> Result<()> {
    let status = status(command, purpose)?;
    if !status.success() {
        bail!(
            "{purpose}: `{}` failed ({status}); its own messages are above",
            shown(command)
        );
    }
    Ok(())
}

/// Runs the command with its output going where ours goes.
pub(crate) fn status(command: &mut Command, purpose: &str) -> Result<ExitStatus> {
    command
        .status()
        .with_context(|| format!("{purpose}: `{}` cannot be started", shown(command)))
}

/// Runs the command and collects its output, whatever its exit status.
pub(crate) fn output(command: &mut Command, purpose: &str) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{purpose}: `{}` cannot be started", shown(command)))
}

/// Runs the command and returns what it printed; an exit status other than 0 is an error that
/// repeats what it said on stderr.
pub(crate) fn capture(command: &mut Command, purpose: &str) -> Result<String> {
    let output = output(command, purpose)?;
    if !output.status.success() {
        bail!(
            "{purpose}: `{}` failed ({}): {}",
            shown(command),
            output.status,
            said(&output)
        );
    }
    String::from_utf8(output.stdout).with_context(|| {
        format!(
            "{purpose}: `{}` printed something that is not UTF-8",
            shown(command)
        )
    })
}

/// What a failed program said: its stderr, or its stdout where that is empty.
pub(crate) fn said(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let text = if stderr.trim().is_empty() {
        String::from_utf8_lossy(&output.stdout)
    } else {
        stderr
    };
    text.trim().to_owned()
}

/// Takes out of the command's environment what the cargo that runs us has put into ours, so that
/// nested builds do not differ from those that a user starts.
pub(crate) fn forget_cargo(command: &mut Command) -> &mut Command {
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || SET_BY_CARGO.contains(&name_text.as_ref()) {
            command.env_remove(&name);
        }
    }
    if let Some(paths) = env::var_os("LD_LIBRARY_PATH") {
        let kept: Vec<PathBuf> = env::split_paths(&paths)
            .filter(|path| !added_by_cargo(path.as_os_str()))
            .collect();
        match env::join_paths(&kept) {
            Ok(joined) if !kept.is_empty() => command.env("LD_LIBRARY_PATH", joined),
            _ => command.env_remove("LD_LIBRARY_PATH"),
        };
    }
    command
}

/// Whether cargo put this folder into `LD_LIBRARY_PATH`: its own build folders and its compiler's.
fn added_by_cargo(path: &OsStr) -> bool {
    let text = path.to_string_lossy();
    text.is_empty()
        || text.contains("/target/")
        || text.contains("/rustlib/")
        || text.contains("/toolchains/")
}

/// The same command at the lowest priority: it gets of the CPUs what everything else of the session leaves.
pub(crate) fn in_the_background(command: &Command) -> Command {
    let mut nice = Command::new("nice");
    nice.args(["-n", "19"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => nice.env(name, value),
            None => nice.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        nice.current_dir(folder);
    }
    nice
}

/// Looks a program up on `PATH` and in the folders of system programs, which `PATH` often lacks
/// for ordinary users.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    find_programs(name).next()
}

/// Every program of that name, in the order of `PATH`.
pub(crate) fn find_programs(name: &str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    folders.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let name = name.to_owned();
    folders
        .into_iter()
        .map(move |folder| folder.join(&name))
        .filter(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_typed() {
        let mut command = Command::new("apt-get");
        command.args(["install", "socat"]);
        assert_eq!(shown(&command), "apt-get install socat");
    }

    #[test]
    fn in_the_background_a_command_is_the_same() {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $(nice) $COLOUR $HOME; pwd"])
            .env("COLOUR", "blue")
            .env_remove("HOME")
            .current_dir("/");
        let said = capture(&mut in_the_background(&command), "trying").expect("sh runs");
        assert_eq!(said, "19 blue\n/\n");
    }

    #[test]
    fn failures_repeat_what_the_program_said() {
        let error = capture(
            Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"]),
            "trying",
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("trying") && text.contains("no such thing") && text.contains('3'),
            "{text}"
        );
    }

    #[test]
    fn only_what_cargo_added_is_taken_out_of_the_library_path() {
        assert!(added_by_cargo(OsStr::new(
            "/home/u/injector/target/debug/deps"
        )));
        assert!(added_by_cargo(OsStr::new(
            "/home/u/.rustup/toolchains/stable/lib"
        )));
        assert!(!added_by_cargo(OsStr::new("/opt/lib")));
    }
}
