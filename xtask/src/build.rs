//! Building user space with the ordinary cargo. The object must have been built before: it is
//! embedded.

use std::path::Path;

use anyhow::{Context, Result};

use crate::artifacts::{self, Executable};
use crate::workspace;

/// How user space is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Quickly.
    Dev,
    /// With optimisations.
    Release,
}

/// What was built.
#[derive(Debug)]
pub(crate) struct Built {
    executables: Vec<Executable>,
}

impl Built {
    /// The program of that name.
    pub(crate) fn binary(&self, name: &str) -> Result<&Path> {
        self.executables
            .iter()
            .find(|one| one.name == name && one.kind == "bin" && !one.test)
            .map(|one| one.path.as_path())
            .with_context(|| format!("the workspace has no program `{name}`"))
    }

    /// The test harnesses.
    pub(crate) fn tests(&self) -> impl Iterator<Item = &Executable> {
        self.executables.iter().filter(|one| one.test)
    }
}

/// Builds every program of user space.
pub(crate) fn user_space(profile: Profile) -> Result<Built> {
    let mut command = workspace::cargo();
    command.args([
        "build",
        "--workspace",
        "--exclude",
        "injector-ebpf",
        "--bins",
        artifacts::FORMAT,
    ]);
    if profile == Profile::Release {
        command.arg("--release");
    }
    let executables = artifacts::executables(&mut command, "building user space")?;
    Ok(Built { executables })
}

/// Builds every program of user space and every test.
pub(crate) fn tests() -> Result<Built> {
    let mut built = user_space(Profile::Dev)?;
    let mut command = workspace::cargo();
    command.args([
        "test",
        "--workspace",
        "--exclude",
        "injector-ebpf",
        "--no-run",
        artifacts::FORMAT,
    ]);
    built
        .executables
        .extend(artifacts::executables(&mut command, "building the tests")?);
    Ok(built)
}
