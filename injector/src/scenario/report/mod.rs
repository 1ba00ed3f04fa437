//! Reports of a run, each a pure function of its records: for CI systems (`JUnit` XML), and for people (one HTML file).
//! The one for the terminal is in `cli::verdict`.

mod html;
mod junit;
mod plots;
pub(crate) mod story;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

pub use self::{html::html, junit::junit};
use super::record::Record;

/// Writes the reports into a directory, and says what their files are.
pub fn write(records: &[Record], dir: &Path) -> io::Result<Vec<PathBuf>> {
    let files = [
        ("report.html", html(records).map_err(io::Error::other)?),
        ("junit.xml", junit(records).map_err(io::Error::other)?),
    ];
    files
        .into_iter()
        .map(|(name, text)| {
            let path = dir.join(name);
            fs::write(&path, text)?;
            Ok(path)
        })
        .collect()
}

/// Reads a log back: lines of JSON, of which the last one may be incomplete.
pub fn read_log(text: &str) -> Result<Vec<Record>, serde_json::Error> {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let mut records = Vec::with_capacity(lines.len());
    for (place, line) in lines.iter().enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            // The run was killed while it wrote it.
            Err(_) if place + 1 == lines.len() && !text.ends_with('\n') => {}
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}
