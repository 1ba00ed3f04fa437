//! The daemon as seen from the command line: finding it, starting it, asking it.
//!
//! A connection that does not work out is told apart by cause (no daemon, no permission, not a
//! socket, a daemon that hangs, one that died), since each asks for something else to be done.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt},
            net::UnixStream,
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, sockopt::SendTimeout,
};
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::{
    protocol::{Call, DaemonInfo, ErrorBody, ErrorCode, HelloArgs, Request, Response, VERSION},
    rules::text::duration,
};

/// Where a daemon keeps its state unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/run/injector";
/// The socket's name in the state directory.
pub const SOCKET_NAME: &str = "injector.sock";
/// The lock's name in the state directory.
const LOCK_NAME: &str = crate::daemon::lock::FILE_NAME;
/// The name, in the state directory, of the log of a daemon that runs in the background.
pub const LOG_NAME: &str = "daemon.log";
/// How long an answer may take unless told otherwise.
pub const ANSWER_TIME: Duration = Duration::from_secs(30);
/// How long a daemon that was started may take until it answers. Loading the programs, which the
/// kernel verifies, is most of it, and is slow on emulated machines.
pub const START_TIME: Duration = Duration::from_mins(1);
/// How long a daemon that was started by a command stays after its last rule has gone.
pub const IDLE_EXIT: Duration = Duration::from_mins(1);

/// How many lines of its log are shown of a daemon that failed to start.
const LOG_TAIL_LINES: usize = 12;
/// The longest answer that is read.
const MAX_ANSWER_BYTES: u64 = 1 << 30;

/// Where to find a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
    /// How long an answer may take.
    pub answer_time: Duration,
}

/// Why the daemon could not be asked, or what it answered instead of a result.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nothing listens there.
    #[error("no daemon is running (nothing listens at {})", socket.display())]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket, or its directory, is closed to this user.
    #[error("connecting to the daemon at {}: permission denied", socket.display())]
    NotPermitted {
        /// The socket.
        socket: PathBuf,
    },
    /// There is something else at the socket's path.
    #[error("{} is not a socket", socket.display())]
    NotASocket {
        /// The path.
        socket: PathBuf,
    },
    /// The path does not fit into a socket address (`sun_path`, 108 bytes).
    #[error("the path of the socket, {}, is too long for one", socket.display())]
    PathTooLong {
        /// The path.
        socket: PathBuf,
    },
    /// Connected, but no answer came in time.
    #[error("the daemon did not answer '{op}' within {}", duration::format(*waited))]
    Hung {
        /// What was asked.
        op: &'static str,
        /// How long the wait was.
        waited: Duration,
    },
    /// The connection ended before the answer.
    #[error("the daemon died or closed the connection before it answered '{op}'")]
    Died {
        /// What was asked.
        op: &'static str,
    },
    /// The daemon speaks another version of the protocol.
    #[error("the daemon speaks version {theirs} of the protocol, this command version {VERSION}")]
    Version {
        /// The daemon's version.
        theirs: u32,
    },
    /// The answer makes no sense.
    #[error("the daemon's answer to '{op}' cannot be read: {problem}")]
    Garbled {
        /// What was asked.
        op: &'static str,
        /// What is wrong with the answer.
        problem: String,
    },
    /// The daemon answered with an error.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// A system call on the way failed.
    #[error("{what} {}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A daemon was started and did not come up.
    #[error("starting a daemon in the background: {problem}")]
    StartFailed {
        /// What happened to it.
        problem: String,
        /// Where it logs to.
        log: PathBuf,
        /// The last lines of that, since the start.
        tail: Vec<String>,
    },
}

impl ClientError {
    /// What to do about it.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        Some(match self {
            ClientError::NoDaemon { .. } => {
                "start one with `injector daemon`, or let `injector add` start one".to_owned()
            }
            ClientError::NotPermitted { .. } => {
                "the daemon serves its own user (as a rule root): run this as root".to_owned()
            }
            ClientError::NotASocket { socket } => format!(
                "remove {} if nothing needs it, or choose another --socket or --state-dir",
                socket.display()
            ),
            ClientError::PathTooLong { .. } => "choose a shorter --socket".to_owned(),
            ClientError::Hung { .. } => {
                "traffic is safe: rules stop acting when the daemon's lease lapses; see whether the \
                 daemon is stopped (SIGSTOP) or wait longer with --timeout; if it stays so, kill it \
                 with SIGKILL and run `injector down`, which undoes what it left"
                    .to_owned()
            }
            ClientError::Died { .. } => {
                "see its log; run `injector list`, which undoes what a dead daemon left, and try again"
                    .to_owned()
            }
            ClientError::Version { .. } => {
                "use the command of the daemon's version, or end the daemon (SIGTERM) and let this \
                 version start one"
                    .to_owned()
            }
            ClientError::Garbled { .. } => {
                "see whether the socket is an injector daemon's, and of this version".to_owned()
            }
            ClientError::StartFailed { log, .. } => format!("its log is {}", log.display()),
            ClientError::Refused(body) => return body.hint.clone(),
            ClientError::Io { .. } => return None,
        })
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    next_id: u64,
    answer_time: Duration,
}

impl Client {
    /// Connects. That does not say yet that the daemon answers: [`Client::hello`] does.
    pub fn connect(endpoint: &Endpoint) -> Result<Client, ClientError> {
        let path = &endpoint.socket;
        let address = UnixAddr::new(path).map_err(|_| ClientError::PathTooLong {
            socket: path.clone(),
        })?;
        let failed = |what: &'static str| {
            let path = path.clone();
            move |errno: nix::Error| ClientError::Io {
                what,
                path,
                source: errno.into(),
            }
        };
        let fd = socket::socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(failed("making a socket for"))?;
        // connect(2) on a unix socket waits for a place in the listener's queue, for as long as the
        // send timeout says (net/unix/af_unix.c, unix_stream_connect): a hung daemon's is full one
        // day.
        let wait = nix::sys::time::TimeVal::new(
            i64::try_from(endpoint.answer_time.as_secs()).unwrap_or(i64::MAX),
            i64::from(endpoint.answer_time.subsec_micros()),
        );
        setsockopt(&fd, SendTimeout, &wait).map_err(failed("setting a timeout on"))?;
        if let Err(errno) = socket::connect(fd.as_raw_fd(), &address) {
            return Err(match errno {
                nix::Error::ENOENT => ClientError::NoDaemon {
                    socket: path.clone(),
                },
                nix::Error::EACCES | nix::Error::EPERM => ClientError::NotPermitted {
                    socket: path.clone(),
                },
                // What connect says of a file that is no socket, and of one that nobody listens to.
                nix::Error::ECONNREFUSED | nix::Error::ENOTSOCK => {
                    match fs::symlink_metadata(path) {
                        Ok(meta) if !meta.file_type().is_socket() && !meta.is_symlink() => {
                            ClientError::NotASocket {
                                socket: path.clone(),
                            }
                        }
                        _ => ClientError::NoDaemon {
                            socket: path.clone(),
                        },
                    }
                }
                nix::Error::ENOTDIR => ClientError::NotASocket {
                    socket: path.parent().unwrap_or(path).to_owned(),
                },
                nix::Error::EAGAIN => ClientError::Hung {
                    op: "connect",
                    waited: endpoint.answer_time,
                },
                other => failed("connecting to")(other),
            });
        }
        let stream = UnixStream::from(fd);
        Ok(Client {
            stream: BufReader::new(stream),
            next_id: 1,
            answer_time: endpoint.answer_time,
        })
    }

    /// Asks who is there.
    pub fn hello(&mut self) -> Result<DaemonInfo, ClientError> {
        let client = format!(
            "injector {} (process {})",
            env!("CARGO_PKG_VERSION"),
            std::process::id()
        );
        self.call(Call::Hello(HelloArgs {
            client: Some(client),
        }))
    }

    /// Asks, and waits for the answer.
    pub fn call<T: DeserializeOwned>(&mut self, call: Call) -> Result<T, ClientError> {
        let op = call.op();
        let garbled = |error: serde_json::Error| ClientError::Garbled {
            op,
            problem: error.to_string(),
        };
        let id = self.next_id;
        self.next_id += 1;
        let line = Request { id, call }.to_line().map_err(garbled)?;
        let deadline = Instant::now() + self.answer_time;
        // The daemon may refuse a request before it has read all of it: look for its answer even
        // where writing failed.
        let written = self.write(&line, deadline);
        if let Err(error) = &written
            && is_timeout(error)
        {
            return Err(ClientError::Hung {
                op,
                waited: self.answer_time,
            });
        }
        let answer = match self.read_line(deadline) {
            Ok(answer) if !answer.is_empty() => answer,
            Err(error) if is_timeout(&error) => {
                return Err(ClientError::Hung {
                    op,
                    waited: self.answer_time,
                });
            }
            Ok(_) | Err(_) => return Err(ClientError::Died { op }),
        };
        let head: ResponseHead = serde_json::from_slice(&answer).map_err(garbled)?;
        if head.v != VERSION {
            return Err(ClientError::Version { theirs: head.v });
        }
        if head.id.is_some_and(|theirs| theirs != id) {
            let problem = "it answers another request".to_owned();
            return Err(ClientError::Garbled { op, problem });
        }
        serde_json::from_slice::<Response<T>>(&answer)
            .map_err(garbled)?
            .into_result()
            .map_err(ClientError::Refused)
    }

    /// Splits off a second handle of the connection, to notice its end.
    pub fn watch(&self) -> io::Result<UnixStream> {
        let stream = self.stream.get_ref().try_clone()?;
        stream.set_read_timeout(None)?;
        Ok(stream)
    }

    fn write(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            let stream = self.stream.get_mut();
            stream.set_write_timeout(Some(left(deadline)?))?;
            match stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_line(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        loop {
            self.stream
                .get_mut()
                .set_read_timeout(Some(left(deadline)?))?;
            let buffered = match self.stream.fill_buf() {
                Ok(buffered) => buffered,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if buffered.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = buffered.iter().position(|&byte| byte == b'\n');
            let take = end.unwrap_or(buffered.len());
            line.extend_from_slice(buffered.get(..take).unwrap_or_default());
            self.stream.consume(take + usize::from(end.is_some()));
            if end.is_some() {
                return Ok(line);
            }
            if line.len() as u64 > MAX_ANSWER_BYTES {
                return Err(io::Error::other("the answer is too long"));
            }
        }
    }
}

/// What is looked at before the result's own type is read.
#[derive(serde::Deserialize)]
struct ResponseHead {
    v: u32,
    #[serde(default)]
    id: Option<u64>,
}

/// The time until a deadline, as a timeout (which must not be zero).
fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left.max(Duration::from_micros(1))),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Starts a daemon in the background and waits until it answers.
pub fn start_daemon(endpoint: &Endpoint) -> Result<(Client, DaemonInfo), ClientError> {
    let log = endpoint.state_dir.join(LOG_NAME);
    let (mut child, log_start) = spawn_daemon(endpoint, &log)?;
    let failed = |problem: String| ClientError::StartFailed {
        problem,
        tail: log_tail(&log, log_start),
        log: log.clone(),
    };
    let deadline = Instant::now() + START_TIME;
    let patient = Endpoint {
        answer_time: START_TIME,
        ..endpoint.clone()
    };
    let mut ended = None;
    loop {
        match Client::connect(&patient).and_then(|mut client| {
            let info = client.hello()?;
            client.answer_time = endpoint.answer_time;
            Ok((client, info))
        }) {
            Ok(found) => return Ok(found),
            Err(ClientError::NoDaemon { .. } | ClientError::Died { .. }) => {}
            Err(other) => return Err(other),
        }
        if ended.is_none() {
            ended = child.try_wait().ok().flatten();
        }
        // Another command may have started a daemon in the same moment, whose lock ours found held.
        // The socket appears while the lock is held, so look at the lock first.
        match ended {
            Some(_) if is_locked(&endpoint.state_dir) => {}
            Some(status) if Client::connect(endpoint).is_err() => {
                return Err(failed(format!("it ended at once ({status})")));
            }
            _ => {}
        }
        if Instant::now() > deadline {
            // Ours, and of no use to anybody: nobody could reach it.
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(format!(
                "it did not answer within {}",
                duration::format(START_TIME)
            )));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a daemon holds the lock of a state directory: it may be starting, and have no socket yet,
/// or ending, and have none any more. Only looks: taking the lock to find out would be in the way of a
/// daemon that starts in the same moment.
#[must_use]
pub fn is_locked(state_dir: &Path) -> bool {
    let Ok(meta) = fs::metadata(state_dir.join(LOCK_NAME)) else {
        return false;
    };
    // FLOCK lines of /proc/locks end in MAJOR:MINOR:INODE START END, device numbers in hexadecimal
    // (fs/locks.c, lock_get_status).
    let file = format!(
        "{:02x}:{:02x}:{}",
        libc::major(meta.dev()),
        libc::minor(meta.dev()),
        meta.ino()
    );
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    locks
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .any(|words| words.contains(&"FLOCK") && words.contains(&file.as_str()))
}

fn spawn_daemon(endpoint: &Endpoint, log: &Path) -> Result<(Child, u64), ClientError> {
    let failed = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| ClientError::Io { what, path, source }
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&endpoint.state_dir)
        .map_err(failed("making the state directory", &endpoint.state_dir))?;
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log)
        .map_err(failed("opening the daemon's log", log))?;
    let log_start = file.metadata().map_or(0, |meta| meta.len());
    let second = file
        .try_clone()
        .map_err(failed("opening the daemon's log", log))?;
    let program =
        std::env::current_exe().map_err(failed("finding", Path::new("/proc/self/exe")))?;
    let mut command = Command::new(&program);
    command
        .arg("daemon")
        .arg("--state-dir")
        .arg(&endpoint.state_dir)
        .arg("--socket")
        .arg(&endpoint.socket)
        .arg("--idle-exit")
        .arg(duration::format(IDLE_EXIT))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(second);
    // SAFETY: between fork and exec only async-signal-safe system calls are made (setsid,
    // close_range), and no memory is allocated.
    unsafe {
        command.pre_exec(|| {
            // A session of its own: not ended by the terminal's hang-up, nor by its Ctrl-C.
            nix::unistd::setsid()?;
            // Nothing that this process was handed (a pipe of a script, say) may be kept open.
            // Kernels before 5.11 lack the flag: nothing is lost but this courtesy.
            libc::close_range(
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC.cast_signed(),
            );
            Ok(())
        });
    }
    let child = command.spawn().map_err(failed("starting", &program))?;
    Ok((child, log_start))
}

/// The last lines that were written to a log since `start`.
fn log_tail(log: &Path, start: u64) -> Vec<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(1 << 20).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines
        .iter()
        .skip(lines.len().saturating_sub(LOG_TAIL_LINES))
        .map(ToString::to_string)
        .collect()
}

/// Whether a failed answer says that the rule or name is the matter, and not the daemon.
#[must_use]
pub fn refused_with(error: &ClientError, code: ErrorCode) -> bool {
    matches!(error, ClientError::Refused(body) if body.code == code)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::protocol::{ListResult, NoArgs};

    fn endpoint(dir: &Path) -> Endpoint {
        Endpoint {
            state_dir: dir.to_owned(),
            socket: dir.join(SOCKET_NAME),
            answer_time: Duration::from_millis(200),
        }
    }

    /// A daemon that reads one request and answers with `answer`, or hangs up.
    fn answering(endpoint: &Endpoint, answer: Option<&'static str>) -> thread::JoinHandle<()> {
        let listener = UnixListener::bind(&endpoint.socket).unwrap();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(answer) = answer {
                reader.get_mut().write_all(answer.as_bytes()).unwrap();
                reader.get_mut().write_all(b"\n").unwrap();
                reader.read_line(&mut line).unwrap();
            }
        })
    }

    fn ask(endpoint: &Endpoint) -> ClientError {
        let mut client = Client::connect(endpoint).unwrap();
        client
            .call::<ListResult>(Call::List(NoArgs {}))
            .unwrap_err()
    }

    #[test]
    fn nobody_there() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = endpoint(dir.path());
        assert!(matches!(
            Client::connect(&endpoint),
            Err(ClientError::NoDaemon { .. })
        ));
        // The socket of a daemon that died.
        drop(UnixListener::bind(&endpoint.socket).unwrap());
        assert!(matches!(
            Client::connect(&endpoint),
            Err(ClientError::NoDaemon { .. })
        ));
    }

    #[test]
    fn something_else_there() {
        let dir = tempfile::tempdir().unwrap();
        let mut endpoint = endpoint(dir.path());
        fs::write(&endpoint.socket, "").unwrap();
        assert!(matches!(
            Client::connect(&endpoint),
            Err(ClientError::NotASocket { .. })
        ));
        endpoint.socket = endpoint.socket.join("below-a-file");
        assert!(matches!(
            Client::connect(&endpoint),
            Err(ClientError::NotASocket { .. })
        ));
        endpoint.socket = dir.path().join("x".repeat(120));
        assert!(matches!(
            Client::connect(&endpoint),
            Err(ClientError::PathTooLong { .. })
        ));
    }

    #[test]
    fn a_daemon_that_says_nothing_hangs() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = endpoint(dir.path());
        let _listener = UnixListener::bind(&endpoint.socket).unwrap();
        let error = ask(&endpoint);
        assert!(
            matches!(error, ClientError::Hung { op: "list", .. }),
            "{error}"
        );
        assert!(error.help().is_some());
    }

    #[test]
    fn a_daemon_that_hangs_up_died() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = endpoint(dir.path());
        let server = answering(&endpoint, None);
        assert!(matches!(ask(&endpoint), ClientError::Died { op: "list" }));
        server.join().unwrap();
    }

    #[test]
    fn answers_are_told_apart() {
        let error =
            r#"{"v":1,"id":1,"ok":false,"error":{"code":"exists","message":"m","hint":"h"}}"#;
        for (answer, check) in [
            (r#"{"v":9,"id":1,"ok":true}"#, "version 9"),
            ("nonsense", "cannot be read"),
            (r#"{"v":1,"id":7,"ok":true,"result":{}}"#, "another request"),
            (r#"{"v":1,"id":1,"ok":true,"result":{}}"#, "cannot be read"),
            (error, "m"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let endpoint = endpoint(dir.path());
            let server = answering(&endpoint, Some(answer));
            let error = ask(&endpoint);
            assert!(error.to_string().contains(check), "{answer}: {error}");
            drop(error);
            server.join().unwrap();
        }
    }

    #[test]
    fn a_lock_is_seen_without_taking_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_locked(dir.path()));
        let lock = crate::daemon::lock::StateLock::acquire(dir.path()).unwrap();
        assert!(is_locked(dir.path()));
        drop(lock);
        assert!(!is_locked(dir.path()));
    }

    #[test]
    fn the_tail_of_a_log_begins_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "old\n").unwrap();
        let mut file = OpenOptions::new().append(true).open(&log).unwrap();
        for n in 0..20 {
            writeln!(file, "line {n}").unwrap();
        }
        let tail = log_tail(&log, 4);
        assert_eq!(tail.len(), LOG_TAIL_LINES);
        assert_eq!(tail.last().unwrap(), "line 19");
        assert_eq!(log_tail(&log, 4 + 7 * 10 + 8 * 9).len(), 1);
        assert!(log_tail(&dir.path().join("none"), 0).is_empty());
    }
}
