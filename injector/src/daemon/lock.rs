//! The state directory and its lock: one daemon per directory.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// Name of the lock file in the state directory.
pub const FILE_NAME: &str = "daemon.lock";
/// Mode of a state directory that we make.
pub const DIR_MODE: u32 = 0o700;

/// Why a state directory cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody else has it.
    #[error(
        "another injector daemon{} works in {dir}; two would undo each other's changes: use that \
         one, end it with `injector down`, or choose another --state-dir",
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    Held {
        /// The directory.
        dir: PathBuf,
        /// The process that holds it, if it has written its id down.
        pid: Option<u32>,
    },
    /// Others could plant files in it.
    #[error(
        "the state directory {dir} can be written by others (owner {owner}, mode {mode:04o}): use \
         a directory of your own, or `chmod go-w` it"
    )]
    Unsafe {
        /// The directory.
        dir: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// A system call failed.
    #[error("cannot {what} {path}: {source}{}", if source.kind() == io::ErrorKind::PermissionDenied { "; run as root, or choose another --state-dir" } else { "" })]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The lock of a state directory, held until it is dropped (and no longer than the process lives).
#[derive(Debug)]
pub struct StateLock {
    file: Flock<File>,
}

impl StateLock {
    /// Makes the directory where it does not exist, and takes its lock.
    ///
    /// # Errors
    /// Somebody else holds the lock, the directory is not safe to use, or a system call failed.
    pub fn acquire(dir: &Path) -> Result<Self, LockError> {
        let failed = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| LockError::Io { what, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(DIR_MODE)
            .create(dir)
            .map_err(failed("make the state directory", dir))?;
        let meta = fs::metadata(dir).map_err(failed("look at the state directory", dir))?;
        let me = nix::unistd::geteuid().as_raw();
        if meta.mode() & 0o022 != 0 || (meta.uid() != me && meta.uid() != 0) {
            return Err(LockError::Unsafe {
                dir: dir.to_owned(),
                owner: meta.uid(),
                mode: meta.mode() & 0o7777,
            });
        }
        let path = dir.join(FILE_NAME);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open the lock file", &path))?;
        // The lock belongs to the open file, and the kernel lets go of it when the process ends in
        // whatever way. The file itself is never deleted: a lock on a deleted file excludes nobody.
        let mut pid = String::new();
        let read = Read::by_ref(&mut file).take(16).read_to_string(&mut pid);
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(LockError::Held {
                    dir: dir.to_owned(),
                    pid: read.ok().and_then(|_| pid.trim().parse().ok()),
                });
            }
            Err((_, errno)) => return Err(failed("lock", &path)(errno.into())),
        };
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(failed("write", &path))?;
        Ok(Self { file })
    }
}

impl Drop for StateLock {
    fn drop(&mut self) {
        // So that nobody takes our id, which may be another process's one day, for a daemon's.
        if let Err(error) = self.file.set_len(0) {
            tracing::debug!("cannot empty the lock file: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_has_one_daemon_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        let first = StateLock::acquire(&dir).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        let error = StateLock::acquire(&dir).unwrap_err();
        assert!(matches!(error, LockError::Held { pid, .. } if pid == Some(std::process::id())));
        assert!(error.to_string().contains("injector down"), "{error}");
        drop(first);
        StateLock::acquire(&dir).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let error = StateLock::acquire(dir.path()).unwrap_err();
        assert!(matches!(error, LockError::Unsafe { .. }), "{error}");
        assert_eq!(fs::metadata(dir.path()).unwrap().mode() & 0o7777, 0o1777);
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs::write(&path, "").unwrap();
        let error = StateLock::acquire(&path).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
}
