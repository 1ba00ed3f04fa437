//! Raising privileges: for installing packages and for what attaches programs, nothing else.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Result, bail};

use crate::process;

/// How root is come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// We are root.
    Root,
    /// We are not, and ask sudo.
    Sudo,
    /// We are not, and there is no sudo.
    None,
}

impl Privilege {
    /// What this process has.
    pub(crate) fn find() -> Self {
        // The owner of /proc/self is the effective user of this process (proc(5)).
        if fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0) {
            Self::Root
        } else if process::find_program("sudo").is_some() {
            Self::Sudo
        } else {
            Self::None
        }
    }

    /// A command that runs as root with these variables in its environment. sudo empties the
    /// environment, so the variables are handed over by env(1).
    pub(crate) fn command<'a>(
        self,
        program: &OsStr,
        environment: impl IntoIterator<Item = (&'a str, &'a OsStr)>,
        purpose: &str,
    ) -> Result<Command> {
        match self {
            Self::Root => {
                let mut command = Command::new(program);
                process::forget_cargo(&mut command);
                command.envs(environment);
                Ok(command)
            }
            Self::Sudo => {
                let mut command = Command::new("sudo");
                command.args(["--", "env"]);
                for (name, value) in environment {
                    let mut assignment = OsStr::new(name).to_owned();
                    assignment.push("=");
                    assignment.push(value);
                    command.arg(assignment);
                }
                command.arg(program);
                Ok(command)
            }
            Self::None => bail!(
                "{purpose}: `{}` must run as root, but this user is not root and there is no sudo; \
                 run `cargo xtask` as root or install sudo",
                program.to_string_lossy()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sudo_hands_over_the_environment() {
        let command = Privilege::Sudo
            .command(OsStr::new("lab"), [("CI", OsStr::new("true"))], "testing")
            .unwrap();
        assert_eq!(process::shown(&command), "sudo -- env CI=true lab");
    }

    #[test]
    fn without_root_and_sudo_the_way_out_is_named() {
        let error = Privilege::None
            .command(OsStr::new("lab"), [], "running the lab tests")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("running the lab tests") && error.contains("install sudo"),
            "{error}"
        );
    }
}
