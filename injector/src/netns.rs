//! Network namespaces: naming them, telling one from another for good, and running code inside one.
//!
//! Nothing here keeps a namespace open. An open file descriptor would keep a deleted namespace, and
//! every interface in it, alive: `ip netns del` would delete the name only.

pub mod named;

use std::{
    fmt, fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use serde::{Deserialize, Serialize};

use crate::rules::model::NetnsRef;

/// Where `ip netns` and the lab bind the namespaces that have a name.
pub const RUN_DIR: &str = "/run/netns";

/// `NS_GET_NSTYPE`, `_IO(0xb7, 3)` in include/uapi/linux/nsfs.h: the `CLONE_NEW*` flag of a namespace.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
/// include/uapi/asm-generic/socket.h; the kernel answers it from 5.14 on (`sk_getsockopt`).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// What makes a namespace the same one. The inode number alone does not: the kernel hands the number
/// of a deleted namespace to the next one that is made (`proc_alloc_inum` takes the lowest free one).
/// The cookie is never used twice in one boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device of the nsfs file system.
    pub dev: u64,
    /// Inode in it.
    pub ino: u64,
    /// The kernel's cookie of the namespace (`SO_NETNS_COOKIE`); 0 where the kernel has none
    /// (before 5.14).
    pub cookie: u64,
}

/// A network namespace that existed when it was resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns {
    /// How the user named it.
    pub reference: NetnsRef,
    /// Which one that was.
    pub id: NetnsId,
    /// Where it can be opened.
    pub path: PathBuf,
}

/// Why a namespace could not be found or entered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetnsError {
    /// No namespace has that name.
    #[error(
        "there is no network namespace named '{name}' in {RUN_DIR}; `ip netns list` shows those \
         that exist"
    )]
    NoSuchName {
        /// The name.
        name: String,
    },
    /// No process has that id.
    #[error("cannot use the network namespace of process {pid}: there is no such process")]
    NoSuchProcess {
        /// The process id.
        pid: u32,
    },
    /// The file could not be opened.
    #[error("cannot open the network namespace {path}: {source}{}", hint(source))]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is something else.
    #[error(
        "{path} is not a network namespace; name one in {RUN_DIR}, a process id, or a file such as \
         /proc/PID/ns/net"
    )]
    NotANamespace {
        /// The file.
        path: PathBuf,
    },
    /// `setns` or `unshare` failed.
    #[error("cannot enter network namespace {what}: {source}{}", hint(source))]
    Enter {
        /// Which one.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// It was deleted (its name may have been given to another one since).
    #[error("network namespace {what} has been deleted")]
    Gone {
        /// Which one.
        what: String,
    },
    /// A name in /run/netns could not be made or deleted.
    #[error(
        "cannot make or delete {name} (namespaces are named in {RUN_DIR}): {source}{}",
        hint(source)
    )]
    Name {
        /// The name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// No thread could be started.
    #[error("cannot start a thread for network namespace {what}: {source}")]
    Thread {
        /// Which one.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// What to do about an error, as the end of its message.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; run as root",
        _ => "",
    }
}

impl NetnsError {
    /// Whether the namespace does not exist (any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::NoSuchName { .. } | Self::NoSuchProcess { .. } | Self::Gone { .. } => true,
            Self::Open { source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

/// How messages call the namespace that a user named so.
fn describe(reference: &NetnsRef) -> String {
    match reference {
        NetnsRef::Own => "of the host".to_owned(),
        NetnsRef::Name(name) => format!("'{name}'"),
        NetnsRef::Path(path) => path.display().to_string(),
        NetnsRef::Pid(pid) => format!("of process {pid}"),
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(&self.reference))
    }
}

impl Netns {
    /// Finds the namespace that `reference` names. It is opened for the moment that this takes.
    pub fn resolve(reference: &NetnsRef) -> Result<Netns, NetnsError> {
        let path = match reference {
            NetnsRef::Own => PathBuf::from("/proc/self/ns/net"),
            NetnsRef::Name(name) if name.contains('/') || name == "." || name == ".." => {
                return Err(NetnsError::NoSuchName { name: name.clone() });
            }
            NetnsRef::Name(name) => Path::new(RUN_DIR).join(name),
            NetnsRef::Path(path) => path.clone(),
            NetnsRef::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        };
        let file = open(&path).map_err(|error| match (reference, error) {
            (NetnsRef::Name(name), NetnsError::Open { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                NetnsError::NoSuchName { name: name.clone() }
            }
            (NetnsRef::Pid(pid), NetnsError::Open { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                NetnsError::NoSuchProcess { pid: *pid }
            }
            (_, error) => error,
        })?;
        let id = identify(&file, &describe(reference))?;
        Ok(Netns {
            reference: reference.clone(),
            id,
            path,
        })
    }

    /// The namespace that was known under `path` when its identity was written down.
    #[must_use]
    pub fn recorded(id: NetnsId, path: &Path) -> Netns {
        let reference = match path.strip_prefix(RUN_DIR) {
            _ if path == Path::new("/proc/self/ns/net") => NetnsRef::Own,
            Ok(name) => NetnsRef::Name(name.to_string_lossy().into_owned()),
            Err(_) => NetnsRef::Path(path.to_owned()),
        };
        Netns {
            reference,
            id,
            path: path.to_owned(),
        }
    }

    /// The namespace of this process.
    pub fn own() -> Result<Netns, NetnsError> {
        Self::resolve(&NetnsRef::Own)
    }

    /// Finds a namespace by identity: our own, those in /run/netns, those of all processes.
    #[must_use]
    pub fn find_by_id(id: &NetnsId) -> Option<Netns> {
        let named = fs::read_dir(RUN_DIR)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| NetnsRef::Name(entry.file_name().to_string_lossy().into_owned()));
        let processes = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
            .map(NetnsRef::Pid);
        std::iter::once(NetnsRef::Own)
            .chain(named)
            .chain(processes)
            .filter(|reference| {
                let path = match reference {
                    NetnsRef::Own => PathBuf::from("/proc/self/ns/net"),
                    NetnsRef::Name(name) => Path::new(RUN_DIR).join(name),
                    NetnsRef::Path(path) => path.clone(),
                    NetnsRef::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
                };
                // Looking at the file costs next to nothing; resolving it starts a thread.
                fs::metadata(path).is_ok_and(|meta| meta.dev() == id.dev && meta.ino() == id.ino)
            })
            .filter_map(|reference| Netns::resolve(&reference).ok())
            .find(|netns| netns.id == *id)
    }

    /// Runs `f` inside the namespace, on a thread of its own (directly if this thread is in it
    /// already). A namespace whose name was deleted is found by its identity as long as a process
    /// lives in it; another one that has taken over the name is not entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let gone = || NetnsError::Gone {
            what: self.to_string(),
        };
        match current() {
            Some(id) if id == self.id => return Ok(f()),
            // Where we are now has its inode number: it must have been freed.
            Some(id) if (id.dev, id.ino) == (self.id.dev, self.id.ino) => return Err(gone()),
            _ => {}
        }
        let f = match open(&self.path) {
            Ok(file) => match self.run_in(&file, f)? {
                Ok(value) => return Ok(value),
                Err(f) => f,
            },
            Err(error @ NetnsError::Open { .. }) if !error.is_gone() => return Err(error),
            Err(_) => f,
        };
        let elsewhere = Self::find_by_id(&self.id).ok_or_else(gone)?;
        let file = open(&elsewhere.path).map_err(|_| gone())?;
        self.run_in(&file, f)?.map_err(|_| gone())
    }

    /// Runs `f` in the namespace behind `file` if it is this one, and hands it back otherwise.
    fn run_in<T: Send, F: FnOnce() -> T + Send>(
        &self,
        file: &OwnedFd,
        f: F,
    ) -> Result<Result<T, F>, NetnsError> {
        if inode(file).is_none_or(|(dev, ino)| (dev, ino) != (self.id.dev, self.id.ino)) {
            return Ok(Err(f));
        }
        let what = self.to_string();
        on_thread(&what, || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter {
                what: what.clone(),
                source: errno.into(),
            })?;
            Ok(
                if cookie().map_err(|source| NetnsError::Enter {
                    what: what.clone(),
                    source,
                })? == self.id.cookie
                {
                    Ok(f())
                } else {
                    Err(f)
                },
            )
        })?
    }

    /// Whether the namespace still exists and can be entered.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.run(|| ()).is_ok()
    }

    /// A command that will run inside the namespace. File systems stay those of the caller: unlike
    /// `ip netns exec`, /sys is not mounted anew.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command, NetnsError> {
        let gone = || NetnsError::Gone {
            what: self.to_string(),
        };
        let mut file =
            open(&self.path).map_err(|error| if error.is_gone() { gone() } else { error });
        if !matches!(&file, Ok(file) if identify(file, &self.to_string())? == self.id) {
            let elsewhere = Self::find_by_id(&self.id).ok_or_else(gone)?;
            file = open(&elsewhere.path);
        }
        let file = file?;
        let mut command = Command::new(program);
        // SAFETY: setns is a bare system call: it neither allocates nor takes a lock.
        unsafe {
            command.pre_exec(move || Ok(setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?));
        }
        Ok(command)
    }
}

/// Runs `f` in a network namespace made for it, which is gone when `f` has returned.
pub fn in_new<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    let what = "that is new";
    on_thread(what, || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter {
            what: what.to_owned(),
            source: errno.into(),
        })?;
        Ok(f())
    })?
}

/// Runs `f` on a thread of its own and waits for it: a thread that has changed its namespace must not
/// be used for anything else.
fn on_thread<T: Send>(what: &str, f: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, f)
            .map_err(|source| NetnsError::Thread {
                what: what.to_owned(),
                source,
            })?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Opens a namespace file, making sure that it is one.
fn open(path: &Path) -> Result<OwnedFd, NetnsError> {
    // A fifo or device at that path must not block us or be disturbed: look before opening.
    let failed = |source| NetnsError::Open {
        path: path.to_owned(),
        source,
    };
    let not_one = || NetnsError::NotANamespace {
        path: path.to_owned(),
    };
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(not_one());
    }
    let file: OwnedFd = fs::File::open(path).map_err(failed)?.into();
    // SAFETY: NS_GET_NSTYPE takes no argument and touches no memory of ours.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE as _) };
    if kind == libc::CLONE_NEWNET {
        Ok(file)
    } else {
        Err(not_one())
    }
}

/// Device and inode of an open file.
fn inode(file: &OwnedFd) -> Option<(u64, u64)> {
    let stat = nix::sys::stat::fstat(file).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// Identity of the namespace behind `file`.
fn identify(file: &OwnedFd, what: &str) -> Result<NetnsId, NetnsError> {
    let failed = |errno: Errno| NetnsError::Enter {
        what: what.to_owned(),
        source: errno.into(),
    };
    let (dev, ino) = inode(file).ok_or_else(|| failed(Errno::last()))?;
    if let Some(id) = current()
        && (id.dev, id.ino) == (dev, ino)
    {
        return Ok(id);
    }
    let cookie = on_thread(what, || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(failed)?;
        cookie().map_err(|source| NetnsError::Enter {
            what: what.to_owned(),
            source,
        })
    })??;
    Ok(NetnsId { dev, ino, cookie })
}

/// Identity of this thread's namespace.
fn current() -> Option<NetnsId> {
    let meta = fs::metadata("/proc/thread-self/ns/net").ok()?;
    Some(NetnsId {
        dev: meta.dev(),
        ino: meta.ino(),
        cookie: cookie().ok()?,
    })
}

/// Cookie of this thread's namespace; 0 where the kernel has none.
fn cookie() -> io::Result<u64> {
    // A socket of any family belongs to the namespace in which it was made; this one always exists.
    let probe = socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `cookie`, and `length`.
    let result = unsafe {
        libc::getsockopt(
            probe.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match Errno::result(result) {
        Ok(_) => Ok(cookie),
        Err(Errno::ENOPROTOOPT) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_namespace_is_found_and_entered_directly() {
        let own = Netns::own().unwrap();
        let thread = thread::current().id();
        assert_eq!(own.run(|| thread::current().id()).unwrap(), thread);
        assert_eq!(Netns::find_by_id(&own.id).unwrap().id, own.id);
        assert!(own.is_alive());
        let mut command = own.command("true").unwrap();
        // Entering even one's own namespace needs privileges; without them the spawn says so.
        if nix::unistd::geteuid().is_root() {
            assert!(command.status().unwrap().success());
        }
    }

    #[test]
    fn what_is_not_a_namespace_is_refused() {
        let name = NetnsRef::Name("injb-no-such".to_owned());
        let error = Netns::resolve(&name).unwrap_err();
        assert!(error.is_gone());
        assert!(error.to_string().contains("ip netns list"), "{error}");
        let error = Netns::resolve(&NetnsRef::Name("../x".to_owned())).unwrap_err();
        assert!(matches!(error, NetnsError::NoSuchName { .. }));
        for path in ["/etc/passwd", "/", "/dev/null", "/proc/self/ns/mnt"] {
            let error = Netns::resolve(&NetnsRef::Path(path.into())).unwrap_err();
            assert!(matches!(error, NetnsError::NotANamespace { .. }), "{error}");
            assert!(!error.is_gone());
        }
        let error = Netns::resolve(&NetnsRef::Pid(u32::MAX)).unwrap_err();
        assert!(matches!(error, NetnsError::NoSuchProcess { .. }), "{error}");
    }

    #[test]
    fn another_cookie_is_another_namespace() {
        let mut own = Netns::own().unwrap();
        if own.id.cookie == 0 {
            return;
        }
        own.id.cookie += 1_000_000;
        assert!(!own.is_alive());
        assert!(own.run(|| ()).unwrap_err().is_gone());
        assert!(Netns::find_by_id(&own.id).is_none());
    }
}
