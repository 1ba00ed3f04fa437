//! Exit codes, and errors on their way to the user: what was attempted, why it failed, what to do.

use std::fmt;

use serde_json::json;

use crate::{
    client::ClientError,
    protocol::{ErrorBody, ErrorCode},
    rules::{SpecError, Surface, hosts::HostsError},
};

/// What a command ends with, apart from the command that `exec` runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Success = 0,
    /// The host or the daemon could not do it.
    Failed = 1,
    /// What was asked makes no sense: arguments, files, targets that do not exist.
    Usage = 2,
    /// No daemon could be reached or started.
    NoDaemon = 3,
    /// Root is needed.
    NotPermitted = 4,
    /// The kernel lacks a feature.
    Unsupported = 5,
    /// `--expect-effect` was not met.
    NoEffect = 6,
    /// A name exists already, or does not exist.
    Name = 7,
    /// `run`: the scenario failed, or did not fail as its file expects.
    RunFailed = 8,
    /// `run`: the run is void, and says nothing about the service.
    RunVoid = 9,
    /// `exec` failed before its command ran.
    Exec = 125,
    /// `exec`: the command cannot be executed.
    NotExecutable = 126,
    /// `exec`: the command was not found.
    CommandNotFound = 127,
}

/// The exit codes, as the help shows them.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the host or the daemon could not do it
  2    wrong input: arguments, a file, an interface or namespace that does not exist
  3    no daemon could be reached or started
  4    not permitted: root is needed
  5    the kernel lacks a feature (see `injector check`)
  6    stats --expect-effect: a rule had no effect
  7    a rule of this name exists already, or none does
  8    run: the scenario failed (or passed where its file expects it to fail)
  9    run: void, it says nothing about the service (no steady state, interrupted, the injector's trouble)
  exec returns its command's code (128+N after signal N), 125 if the command was not run,
  126 if it cannot be executed, 127 if it was not found";

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What the process ends with.
    pub exit: Exit,
    /// The kind of error, for programs.
    pub code: String,
    /// What was attempted, and what went wrong.
    pub message: String,
    /// What lies behind it, the nearest first.
    pub causes: Vec<String>,
    /// What to do.
    pub help: Option<String>,
    /// The reader of our output has gone: nobody is left to be told.
    pub silent: bool,
}

impl Failure {
    /// A failure with a message.
    pub fn new(exit: Exit, code: &str, message: impl Into<String>) -> Failure {
        Failure {
            exit,
            code: code.to_owned(),
            message: message.into(),
            causes: Vec::new(),
            help: None,
            silent: false,
        }
    }

    /// Wrong input.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, "invalid", message)
    }

    /// The same with what to do.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Failure {
        self.help = Some(help.into());
        self
    }

    /// The same with what lies behind it.
    #[must_use]
    pub fn caused_by(mut self, error: &dyn std::error::Error) -> Failure {
        let mut next = Some(error);
        while let Some(error) = next {
            self.causes.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// An error and what lies behind it, as it says so itself.
    pub fn from_error(exit: Exit, code: &str, error: &dyn std::error::Error) -> Failure {
        let failure = Failure::new(exit, code, error.to_string());
        match error.source() {
            Some(source) => failure.caused_by(source),
            None => failure,
        }
    }

    /// Output that could not be written.
    #[must_use]
    pub fn output(error: &std::io::Error) -> Failure {
        let gone = error.kind() == std::io::ErrorKind::BrokenPipe;
        let exit = if gone { Exit::Success } else { Exit::Failed };
        let mut failure = Failure::new(exit, "output", "writing the output").caused_by(error);
        failure.silent = gone;
        failure
    }

    /// A rule that cannot be accepted; `flag`: it came from the command line rather than a file.
    #[must_use]
    pub fn from_spec(error: &SpecError, flag: bool) -> Failure {
        let surface = if flag { Surface::Flags } else { Surface::File };
        Failure::usage(error.message(surface)).help(error.help(surface))
    }

    /// The failure as `--json` prints it.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        json!({
            "ok": false,
            "error": {
                "code": self.code,
                "message": self.message,
                "causes": self.causes,
                "hint": self.help,
                "exit": self.exit as u8,
            }
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Failure {
        let exit = match body.code {
            ErrorCode::BadRequest | ErrorCode::Invalid | ErrorCode::Target => Exit::Usage,
            ErrorCode::Version | ErrorCode::ShuttingDown => Exit::NoDaemon,
            ErrorCode::Exists | ErrorCode::NotFound => Exit::Name,
            ErrorCode::Unsupported => Exit::Unsupported,
            ErrorCode::NotPermitted => Exit::NotPermitted,
            ErrorCode::Limit | ErrorCode::Host | ErrorCode::Internal => Exit::Failed,
        };
        let code = serde_json::to_value(body.code)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default();
        let mut failure = Failure::new(exit, &code, body.message);
        failure.help = body.hint;
        failure
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        let (exit, code) = match &error {
            ClientError::NoDaemon { .. } => (Exit::NoDaemon, "no_daemon"),
            ClientError::NotPermitted { .. } => (Exit::NotPermitted, "not_permitted"),
            ClientError::NotASocket { .. } => (Exit::NoDaemon, "not_a_socket"),
            ClientError::PathTooLong { .. } => (Exit::Usage, "invalid"),
            ClientError::Hung { .. } => (Exit::NoDaemon, "daemon_hung"),
            ClientError::Died { .. } => (Exit::NoDaemon, "daemon_died"),
            ClientError::Version { .. } => (Exit::NoDaemon, "version"),
            ClientError::Garbled { .. } => (Exit::NoDaemon, "garbled"),
            ClientError::StartFailed { .. } => (Exit::NoDaemon, "start_failed"),
            ClientError::Io { source, .. }
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                (Exit::NotPermitted, "not_permitted")
            }
            ClientError::Io { .. } => (Exit::NoDaemon, "io"),
            ClientError::Refused(body) => return Failure::from(body.clone()),
        };
        let mut failure = Failure::from_error(exit, code, &error);
        failure.help = error.help();
        if let ClientError::StartFailed { tail, .. } = &error {
            failure.causes.extend(tail.iter().cloned());
        }
        failure
    }
}

impl From<HostsError> for Failure {
    fn from(error: HostsError) -> Failure {
        Failure::from_error(Exit::Usage, "invalid", &error).help(error.help())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Problem;

    #[test]
    fn codes_of_the_daemon_have_exit_codes() {
        for (code, exit) in [
            (ErrorCode::Invalid, 2),
            (ErrorCode::Target, 2),
            (ErrorCode::Exists, 7),
            (ErrorCode::NotFound, 7),
            (ErrorCode::Unsupported, 5),
            (ErrorCode::NotPermitted, 4),
            (ErrorCode::ShuttingDown, 3),
            (ErrorCode::Host, 1),
            (ErrorCode::Limit, 1),
        ] {
            assert_eq!(
                Failure::from(ErrorBody::new(code, "m")).exit as u8,
                exit,
                "{code:?}"
            );
        }
        let failure = Failure::from(ErrorBody::new(ErrorCode::NotFound, "m"));
        assert_eq!(failure.code, "not_found");
    }

    #[test]
    fn connection_troubles_have_exit_codes() {
        let socket = std::path::PathBuf::from("/s");
        for (error, exit) in [
            (
                ClientError::NoDaemon {
                    socket: socket.clone(),
                },
                3,
            ),
            (
                ClientError::NotPermitted {
                    socket: socket.clone(),
                },
                4,
            ),
            (ClientError::NotASocket { socket }, 3),
            (ClientError::Died { op: "add" }, 3),
            (ClientError::Version { theirs: 2 }, 3),
        ] {
            let failure = Failure::from(error);
            assert_eq!(failure.exit as u8, exit);
            assert!(failure.help.is_some());
        }
    }

    #[test]
    fn fields_are_flags_on_the_command_line() {
        let error = Problem::new("is a reversed range", "write 80-90").of("peer_port", "90-80");
        assert_eq!(
            Failure::from_spec(&error, true).message,
            "--peer-port '90-80': is a reversed range"
        );
        assert_eq!(
            Failure::from_spec(&error, false).message,
            "peer_port '90-80': is a reversed range"
        );
        let json = Failure::from_spec(&error, false).to_json();
        assert_eq!(json["ok"], false);
        assert_eq!(json["error"]["exit"], 2);
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let failure = Failure::output(&std::io::ErrorKind::BrokenPipe.into());
        assert!(failure.silent);
        assert_eq!(failure.exit, Exit::Success);
        assert_eq!(
            Failure::output(&std::io::Error::other("full")).exit,
            Exit::Failed
        );
    }
}
