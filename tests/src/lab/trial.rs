//! One test of the lab tier: what it needs, skipping with a reason, and what is printed when it fails.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Completion, Failed, Trial};
use serde::Serialize;

use super::{injector, services, transcript::Transcript};

/// Something without which a test cannot run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Namespaces, packet sockets, programs in the kernel.
    Root,
    /// The binary under test.
    Injector,
    /// etcd, unpacked.
    Etcd,
    /// Redis, unpacked.
    Redis,
    /// A command on the path.
    Tool(&'static str),
}

/// Why a test does not run here. Returned as an error from within a test, it makes the test count as
/// skipped.
#[derive(Debug, thiserror::Error)]
#[error("skipped: {reason}")]
pub struct Skip {
    /// What is missing.
    pub reason: String,
    /// Whether a tier that should run here may do without: true only for what a kernel may lack.
    pub excusable: bool,
}

impl Need {
    fn check(self) -> Result<(), String> {
        match self {
            Self::Root => nix::unistd::geteuid()
                .is_root()
                .then_some(())
                .ok_or_else(|| "needs root".to_owned()),
            Self::Injector => injector::binary().map(drop).map_err(|e| format!("{e:#}")),
            Self::Etcd => services::etcd().map(drop).map_err(|e| format!("{e:#}")),
            Self::Redis => services::redis_server()
                .map(drop)
                .map_err(|e| format!("{e:#}")),
            Self::Tool(name) => services::on_path(name)
                .map(drop)
                .ok_or_else(|| format!("needs the command {name}")),
        }
    }
}

/// One skipped test, as one entry of the list in the file that `INJECTOR_SKIPS` names.
#[derive(Debug, Serialize)]
struct SkipRecord {
    test: String,
    reason: String,
    excusable: bool,
}

static SKIPS: Mutex<Vec<SkipRecord>> = Mutex::new(Vec::new());

fn record_skip(test: &str, skip: &Skip) -> Result<()> {
    let Some(path) = std::env::var_os("INJECTOR_SKIPS").map(PathBuf::from) else {
        return Ok(());
    };
    let mut skips = SKIPS.lock().unwrap_or_else(PoisonError::into_inner);
    skips.push(SkipRecord {
        test: test.to_owned(),
        reason: skip.reason.clone(),
        excusable: skip.excusable,
    });
    std::fs::write(&path, serde_json::to_vec_pretty(&*skips)?)
        .with_context(|| format!("could not write {}", path.display()))
}

/// Makes a test. It fails with its error, and with the transcript of what it did.
pub fn trial(
    name: &'static str,
    needs: &'static [Need],
    test: impl FnOnce() -> Result<()> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        let transcript = Transcript::begin(name);
        let missing = needs.iter().find_map(|need| need.check().err());
        let outcome = match missing {
            Some(reason) => Err(Skip {
                reason,
                excusable: false,
            }
            .into()),
            None => catch_unwind(AssertUnwindSafe(test))
                .unwrap_or_else(|_| Err(anyhow!("the test panicked (see above)"))),
        };
        let error = match outcome {
            Ok(()) => {
                eprintln!("    {name}: {:.1} s", transcript.seconds());
                return Ok(Completion::Completed);
            }
            Err(error) => error,
        };
        if let Some(skip) = error.downcast_ref::<Skip>() {
            record_skip(name, skip).map_err(|e| Failed::from(format!("{e:#}")))?;
            return Ok(Completion::ignored_with(&skip.reason));
        }
        let reasons = error
            .chain()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n  because: ");
        // At once, too: the whole list comes at the end, which a machine that hangs does not reach.
        eprintln!(
            "    {name}: failed after {:.1} s: {reasons}",
            transcript.seconds()
        );
        Err(Failed::from(format!(
            "{reasons}\n--- transcript of {name} ---\n{}\n--- end ---",
            transcript.text()
        )))
    })
}
