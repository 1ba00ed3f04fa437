//! What is wrong with a rule: the field, the text that was found there, and what is accepted.
//!
//! Texts name other fields between backticks, `` `copy_delay` ``, and are shown through [`fields`]
//! only: a file has `copy_delay`, the command line has `--copy-delay`.

use std::borrow::Cow;

use thiserror::Error;

/// A rule that cannot be accepted, and why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", self.message(Surface::File))]
pub struct SpecError {
    /// The field of the text form, as in a file (`peer_port`; the flag is `--peer-port`).
    pub field: &'static str,
    /// The text that was found, where a particular one is to blame.
    pub text: Option<String>,
    /// What is wrong with it, its fields marked.
    pub(super) problem: String,
    /// What is accepted, or what to do, its fields marked.
    pub(super) help: String,
}

/// How the fields of a rule are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// In files and requests: `peer_port`.
    File,
    /// On the command line: `--peer-port`.
    Flags,
}

impl Surface {
    /// The name of a field.
    #[must_use]
    pub fn name(self, field: &str) -> Cow<'_, str> {
        match (self, field) {
            (Self::File, _) => field.into(),
            (Self::Flags, "name") => "NAME".into(),
            // A fault is one of many flags.
            (Self::Flags, "fault") => "fault".into(),
            (Self::Flags, _) => format!("--{}", field.replace('_', "-")).into(),
        }
    }
}

/// A text with its marked fields as they are called there. Other text between backticks, such as a
/// command with its arguments, is left alone.
fn fields(text: &str, surface: Surface) -> String {
    let is_field =
        |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_lowercase() || c == b'_');
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('`') {
        shown.push_str(before);
        if let Some((field, after)) = after.split_once('`')
            && is_field(field)
        {
            shown.push_str(&surface.name(field));
            rest = after;
        } else {
            shown.push('`');
            rest = after;
        }
    }
    shown.push_str(rest);
    shown
}

/// Field names in a text, marked and with commas between them.
pub(super) fn marked(fields: &[&str]) -> String {
    let marked: Vec<String> = fields.iter().map(|field| format!("`{field}`")).collect();
    marked.join(", ")
}

impl SpecError {
    /// What is accepted, or what to do.
    #[must_use]
    pub fn help(&self, surface: Surface) -> String {
        fields(&self.help, surface)
    }

    /// An error about a field as a whole. Other fields are marked in the texts, `` `copy_delay` ``.
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

    /// Fails if the command line would be shown the name of a field as files have it, or if what is marked is no
    /// field.
    #[cfg(test)]
    pub(super) fn assert_speaks_of_flags(&self) {
        let schema = serde_json::to_value(schemars::schema_for!(super::RuleSpec)).unwrap();
        let is_field = |name: &str| {
            schema["properties"].get(name).is_some()
                || schema["$defs"]["FaultSpec"]["properties"]
                    .get(name)
                    .is_some()
        };
        for text in [&self.problem, &self.help] {
            let shown = fields(text, Surface::Flags);
            let mut words = shown.split(|c: char| c != '_' && !c.is_ascii_alphanumeric());
            assert!(
                !words.any(|word| word.len() > 1 && word.contains('_')),
                "{}: {shown}",
                self.field
            );
            for marked in text.split('`').skip(1).step_by(2) {
                assert!(
                    is_field(marked) || marked.contains(' '),
                    "{}: {marked}",
                    self.field
                );
            }
        }
    }

    /// The field, the text found there, and what is wrong with it.
    #[must_use]
    pub fn message(&self, surface: Surface) -> String {
        let field = surface.name(self.field);
        let problem = fields(&self.problem, surface);
        match &self.text {
            Some(text) => format!("{field} '{}': {problem}", shorten(text)),
            None => format!("{field}: {problem}"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_called_as_the_user_calls_them() {
        let error = SpecError::field(
            "copy_delay",
            "goes with `duplicate` only",
            "as `ip link` shows; give `drop_nth`, or ` or `NAME` or `fault`",
        );
        assert_eq!(error.to_string(), "copy_delay: goes with duplicate only");
        assert_eq!(
            error.message(Surface::Flags),
            "--copy-delay: goes with --duplicate only"
        );
        assert_eq!(
            error.help(Surface::Flags),
            "as `ip link` shows; give --drop-nth, or ` or `NAME` or fault"
        );
        assert_eq!(
            error.help(Surface::File),
            "as `ip link` shows; give drop_nth, or ` or `NAME` or fault"
        );
    }

    #[test]
    fn text_that_was_found_is_left_alone() {
        let error = Problem::new("is wrong", "right").of("peer_port", "`peer_port`");
        assert_eq!(
            error.message(Surface::Flags),
            "--peer-port '`peer_port`': is wrong"
        );
    }
}
