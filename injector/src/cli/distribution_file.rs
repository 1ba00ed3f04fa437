//! Distributions of delay in files: what they hold goes to the daemon within the rule, which may live elsewhere
//! and is printed, and read again, without the file.

use std::fs;

use super::exit::Failure;
use crate::rules::text::distribution;

/// The text of a distribution, with the numbers of a file in the place of `file:PATH`.
pub(super) fn inline(text: &str) -> Result<String, Failure> {
    let Some(path) = distribution::file(text) else {
        return Ok(text.to_owned());
    };
    let content = fs::read_to_string(path).map_err(|error| {
        Failure::usage(format!("reading a distribution of delay from {path}")).caused_by(&error)
    })?;
    distribution::read(path, &content)
        .map(|read| distribution::format(&read))
        .map_err(|problem| {
            Failure::usage(format!("{path}: {}", problem.problem)).help(problem.help)
        })
}
