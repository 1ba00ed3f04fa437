//! The cache folder: what is worth keeping between clones of the repository.

use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The cache folder, locked against another set-up for as long as this value lives.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    _lock: File,
}

impl Cache {
    /// Opens the cache folder, making it where it is missing, and waits for another set-up to end.
    pub(crate) fn open() -> Result<Self> {
        let folder = folder()?;
        fs::create_dir_all(&folder)
            .with_context(|| format!("making the cache folder {}", folder.display()))?;
        let path = folder.join("lock");
        let lock = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("setup: waiting for another `cargo xtask` that is setting up");
                lock.lock()
                    .with_context(|| format!("waiting for the lock on {}", path.display()))?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
        Ok(Self {
            folder,
            _lock: lock,
        })
    }

    /// The folder itself.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

/// `$XDG_CACHE_HOME/injector`, else `~/.cache/injector`.
fn folder() -> Result<PathBuf> {
    if let Some(base) = env::var_os("XDG_CACHE_HOME").map(PathBuf::from)
        && base.is_absolute()
    {
        return Ok(base.join("injector"));
    }
    match env::home_dir() {
        Some(home) if home.is_absolute() => Ok(home.join(".cache").join("injector")),
        _ => bail!("no cache folder: neither XDG_CACHE_HOME nor HOME is set; set one of them"),
    }
}
