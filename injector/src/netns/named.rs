//! Namespaces with a name in /run/netns, made in the way of `ip netns add` (ip/ipnetns.c of iproute2),
//! so that every tool finds them.

use std::{
    ffi::CString,
    fs, io,
    mem::MaybeUninit,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

use super::{Netns, NetnsError, NetnsId, RUN_DIR, current, in_new};
use crate::rules::model::NetnsRef;

/// What had to be done to /run/netns before a namespace could be named in it. It is found out by
/// [`RunDir::missing`] and done by [`RunDir::prepare`], so that it can be written down in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct RunDir {
    /// The directory is made.
    pub made: bool,
    /// It is bound on itself, so that its mounts can be shared with other mount namespaces.
    pub bound: bool,
}

impl RunDir {
    /// What is missing now.
    pub fn missing() -> Result<Self, NetnsError> {
        if !Path::new(RUN_DIR).is_dir() {
            return Ok(Self {
                made: true,
                bound: true,
            });
        }
        Ok(Self {
            made: false,
            bound: !is_mount(RUN_DIR).map_err(failed)?,
        })
    }

    /// Does what is missing.
    pub fn prepare(self) -> Result<(), NetnsError> {
        if self.made {
            match fs::DirBuilder::new().mode(0o755).create(RUN_DIR) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed(error));
                }
                _ => {}
            }
        }
        let none = None::<&str>;
        if self.bound {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(RUN_DIR), RUN_DIR, none, flags, none)
                .map_err(|errno| failed(errno.into()))?;
        }
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(none, RUN_DIR, none, flags, none).map_err(|errno| failed(errno.into()))
    }

    /// Takes back what was done, unless others have named namespaces there since. Says whether it did.
    pub fn restore(self) -> Result<bool, NetnsError> {
        // Whoever names a namespace at this moment holds the same lock, and fails cleanly if it comes
        // second.
        let _lock = match lock() {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(failed(error)),
        };
        if fs::read_dir(RUN_DIR).map_err(failed)?.next().is_some() {
            return Ok(false);
        }
        if self.bound {
            // Detached: the lock is an open file below the mount.
            match umount2(RUN_DIR, MntFlags::MNT_DETACH) {
                // EINVAL: not mounted any more.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        if self.made {
            match fs::remove_dir(RUN_DIR) {
                Ok(()) => {}
                // Somebody has put something there since.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOENT | libc::ENOTEMPTY | libc::EBUSY)
                    ) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(true)
    }
}

/// Whether a directory is where something is mounted.
fn is_mount(path: &str) -> io::Result<bool> {
    let path = CString::new(path)?;
    let mut found = MaybeUninit::<libc::statx>::uninit();
    // SAFETY: the path is a string with its zero, and `found` has room for what the kernel writes.
    let result = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), 0, 0, found.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: the kernel has filled it.
    let attributes = unsafe { found.assume_init() }.stx_attributes;
    Ok(attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}

/// The lock that `ip netns` takes as well while it makes a name.
fn lock() -> io::Result<Flock<fs::File>> {
    let directory = fs::File::open(RUN_DIR)?;
    Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

fn failed(source: io::Error) -> NetnsError {
    NetnsError::Name {
        name: RUN_DIR.to_owned(),
        source,
    }
}

/// Makes a namespace and gives it a name, which must be free. /run/netns must have been prepared.
pub fn create(name: &str) -> Result<Netns, NetnsError> {
    let path = Path::new(RUN_DIR).join(name);
    let failed = |source| NetnsError::Name {
        name: name.to_owned(),
        source,
    };
    let _lock = lock().map_err(failed)?;
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o000)
        .open(&path)
        .map_err(failed)?;
    let made = in_new(|| -> io::Result<NetnsId> {
        let none = None::<&str>;
        let own = "/proc/thread-self/ns/net";
        mount(Some(own), &path, none, MsFlags::MS_BIND, none)?;
        current().ok_or_else(io::Error::last_os_error)
    })
    .and_then(|result| result.map_err(failed));
    match made {
        Ok(id) => Ok(Netns {
            reference: NetnsRef::Name(name.to_owned()),
            id,
            path,
        }),
        Err(error) => {
            let _ = umount2(&path, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(&path);
            Err(error)
        }
    }
}

/// What became of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deleted {
    /// Deleted.
    Deleted,
    /// It was not there.
    Absent,
    /// It belongs to another namespace now, and was left alone.
    Foreign,
}

/// Deletes the name of a namespace; the namespace itself lives on as long as a process is in it. With an
/// `id` only if the name is that namespace's.
pub fn delete(name: &str, id: Option<&NetnsId>) -> Result<Deleted, NetnsError> {
    let path = Path::new(RUN_DIR).join(name);
    let failed = |source| NetnsError::Name {
        name: name.to_owned(),
        source,
    };
    if let Some(id) = id {
        match Netns::resolve(&NetnsRef::Name(name.to_owned())) {
            Ok(netns) if netns.id == *id => {}
            // The plain file on which a namespace was mounted: what a crash in mid-deletion leaves.
            Err(NetnsError::NotANamespace { .. })
                if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file()) => {}
            Ok(_) | Err(NetnsError::NotANamespace { .. }) => return Ok(Deleted::Foreign),
            Err(error) if error.is_gone() => return Ok(Deleted::Absent),
            Err(error) => return Err(error),
        }
    }
    match umount2(&path, MntFlags::MNT_DETACH) {
        // EINVAL: a plain file.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(Errno::ENOENT) => return Ok(Deleted::Absent),
        Err(errno) => return Err(failed(errno.into())),
    }
    match fs::remove_file(&path) {
        Ok(()) => Ok(Deleted::Deleted),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Deleted::Deleted),
        Err(error) => Err(failed(error)),
    }
}
