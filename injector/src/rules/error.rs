//! What is wrong with a rule: the field, the text that was found there, and what is accepted.

use thiserror::Error;

/// A rule that cannot be accepted, and why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", self.message())]
pub struct SpecError {
    /// The field of the text form, as in a file (`peer_port`; the flag is `--peer-port`).
    pub field: &'static str,
    /// The text that was found, where a particular one is to blame.
    pub text: Option<String>,
    /// What is wrong with it.
    pub problem: String,
    /// What is accepted, or what to do.
    pub help: String,
}

impl SpecError {
    /// An error about a field as a whole.
    #[must_use]
    pub fn field(
        field: &'static str,
        problem: impl Into<String>,
        help: impl Into<String>,
    ) -> SpecError {
        SpecError {
            field,
            text: None,
            problem: problem.into(),
            help: help.into(),
        }
    }

    fn message(&self) -> String {
        match &self.text {
            Some(text) => format!("{} '{}': {}", self.field, shorten(text), self.problem),
            None => format!("{}: {}", self.field, self.problem),
        }
    }
}

/// What is wrong with one piece of text, before it is known which field it stood in.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{problem}")]
pub struct Problem {
    /// What is wrong.
    pub problem: String,
    /// What is accepted.
    pub help: String,
}

impl Problem {
    /// A problem and what would be accepted instead.
    #[must_use]
    pub fn new(problem: impl Into<String>, help: impl Into<String>) -> Problem {
        Problem {
            problem: problem.into(),
            help: help.into(),
        }
    }

    /// The same, said of a text in a field.
    #[must_use]
    pub fn of(self, field: &'static str, text: &str) -> SpecError {
        SpecError {
            field,
            text: Some(text.to_owned()),
            problem: self.problem,
            help: self.help,
        }
    }
}

/// Keeps a message readable when someone hands in a megabyte or control characters.
fn shorten(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut shown: String = text
        .chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}
