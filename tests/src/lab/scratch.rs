//! Folders of a test's own, removed with their guard.

use std::path::Path;

use anyhow::{Context, Result};

use super::PREFIX;

/// A folder for state and logs of one test, readable by root only.
#[derive(Debug)]
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// Makes one. Its name carries this process's id, so that a later run can tell that it is orphaned.
    pub fn new() -> Result<Self> {
        let prefix = format!("{PREFIX}{}-", std::process::id());
        tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir()
            .map(Self)
            .context("could not make a folder for a test's state")
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}
