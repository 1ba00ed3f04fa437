//! The socket: newline-delimited JSON, with limits on what is read and how fast. Whatever one client
//! sends, others are served.

use std::{
    collections::VecDeque,
    fs, io,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind as bind_socket, listen,
            socket,
        },
        stat::{Mode, fchmod},
        time::TimeValLike,
    },
};
use serde::Serialize;
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{actor::ActorHandle, record::ConnId, state::Origin};
use crate::protocol::{
    ErrorBody, ErrorCode, MAX_CONNECTIONS, MAX_REQUEST_BYTES, MAX_REQUESTS_PER_SECOND, Request,
    Response,
};

/// Mode of the socket: the owner's alone.
pub const SOCKET_MODE: u32 = 0o600;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// A request above this size is a large one.
const LARGE_BYTES: usize = 1 << 20;
/// So many large requests are held in memory at one time; others wait.
const LARGE_REQUESTS: usize = 4;
/// A request, once begun, is complete after so long.
const REQUEST_TIME: Duration = Duration::from_mins(1);
/// A client takes an answer off our hands in so long.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// On the way out, answers that are due have so long to be sent.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// A daemon with another state directory serves it.
    #[error("another daemon serves the socket {path}; choose another --socket")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// A file that is no socket is in its place.
    #[error("{path} exists and is not a socket; choose another --socket, or remove it")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {what} the socket {path}: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The socket file; removed when it is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

/// Makes the socket, in place of one that a dead daemon has left. Call it on a runtime.
///
/// # Errors
/// Another daemon serves it, a file is in its place, or a system call failed.
pub fn bind(path: &Path) -> Result<(UnixListener, SocketFile), ServerError> {
    let failed = |what| {
        let path = path.to_owned();
        move |source| ServerError::Io { what, path, source }
    };
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ServerError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => {
                return Err(ServerError::InUse {
                    path: path.to_owned(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed("remove what a dead daemon left of"))?;
            }
            Err(error) => return Err(failed("look at")(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at")(error)),
    }
    let listener = private_listener(path).map_err(|errno| failed("make")(errno.into()))?;
    let file = SocketFile {
        path: path.to_owned(),
    };
    let listener = UnixListener::from_std(listener).map_err(failed("serve"))?;
    Ok((listener, file))
}

/// A listening socket that was never open to others, not even for a moment: the file gets the mode of
/// the socket's own inode (`unix_bind_bsd` in `net/unix/af_unix.c`, Linux 6.1), which is set before.
fn private_listener(path: &Path) -> Result<std::os::unix::net::UnixListener, Errno> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    fchmod(&socket, Mode::from_bits_truncate(SOCKET_MODE))?;
    bind_socket(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket.into())
}

/// Serves connections until `stopping` becomes true, and then lets answers that are due go out.
pub async fn serve(listener: UnixListener, actor: ActorHandle, stopping: watch::Receiver<bool>) {
    let seats = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let large = Arc::new(Semaphore::new(LARGE_REQUESTS));
    let mut connections = JoinSet::new();
    let mut last: ConnId = 0;
    let mut stop = stopping.clone();
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                if let Err(error) = ended && error.is_panic() {
                    tracing::error!("a connection's task has panicked: {error}");
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => match Arc::clone(&seats).try_acquire_owned() {
                    Ok(seat) => {
                        last += 1;
                        let connection = Connection {
                            id: last,
                            actor: actor.clone(),
                            large: Arc::clone(&large),
                            stopping: stopping.clone(),
                            pace: Pace::new(MAX_REQUESTS_PER_SECOND),
                        };
                        connections.spawn(async move {
                            connection.serve(stream).await;
                            drop(seat);
                        });
                    }
                    Err(_) => { connections.spawn(refuse(stream)); }
                },
                Err(error) => {
                    // Out of descriptors, for instance: others will close theirs.
                    tracing::warn!("cannot accept a connection: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    let rest = async { while connections.join_next().await.is_some() {} };
    if timeout(FAREWELL, rest).await.is_err() {
        tracing::debug!("a client has not taken its answer in time");
    }
}

/// Waits until it is time to leave (or nobody is left to say so).
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // Both outcomes mean the same; the borrow that comes with one of them must not be kept.
    drop(stopping.wait_for(|stop| *stop).await);
}

/// Tells a client that there are too many.
async fn refuse(stream: UnixStream) {
    let (_, mut writer) = stream.into_split();
    let error = ErrorBody::new(
        ErrorCode::Limit,
        format!("{MAX_CONNECTIONS} clients are connected already"),
    )
    .with_hint("try again when one of them has left");
    let response = Response::<()>::failure(None, error);
    if let Err(error) = answer(&mut writer, &response).await {
        tracing::debug!("cannot refuse a client: {error}");
    }
}

/// One client.
struct Connection {
    id: ConnId,
    actor: ActorHandle,
    large: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
    pace: Pace,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.actor.closed(self.id);
    }
}

impl Connection {
    async fn serve(mut self, stream: UnixStream) {
        if let Ok(peer) = stream.peer_cred() {
            tracing::debug!(
                conn = self.id,
                uid = peer.uid(),
                pid = peer.pid(),
                "connected"
            );
        }
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::with_capacity(64 << 10, reader);
        loop {
            let line = tokio::select! {
                biased;
                // A half-read request is not worth waiting for on the way out.
                () = stopped(&mut self.stopping) => break,
                line = read_line(&mut reader, MAX_REQUEST_BYTES, REQUEST_TIME, &self.large) => line,
            };
            let (line, _large) = match line {
                Ok(Line::Request(line, permit)) => (line, permit),
                Ok(Line::TooLong) => {
                    let error = ErrorBody::new(
                        ErrorCode::BadRequest,
                        format!("the request is longer than {MAX_REQUEST_BYTES} bytes"),
                    )
                    .with_hint("split it into several requests");
                    if answer(&mut writer, &Response::<()>::failure(None, error))
                        .await
                        .is_err()
                    {
                        break;
                    }
                    continue;
                }
                Ok(Line::TooSlow) => {
                    let error = ErrorBody::new(
                        ErrorCode::BadRequest,
                        format!(
                            "the request was not complete after {} s",
                            REQUEST_TIME.as_secs()
                        ),
                    )
                    .with_hint("end each request with a newline");
                    // The client may have gone; we are leaving it in any case.
                    let _ = answer(&mut writer, &Response::<()>::failure(None, error)).await;
                    break;
                }
                Ok(Line::End) => break,
                Err(error) => {
                    tracing::debug!(conn = self.id, "cannot read: {error}");
                    break;
                }
            };
            let origin = Origin {
                conn: self.id,
                received_ns: monotonic_ns(),
            };
            if let Some(wait) = self.pace.step(Instant::now()) {
                sleep(wait).await;
            }
            let response = self.handle(line, origin).await;
            if let Err(error) = answer(&mut writer, &response).await {
                tracing::debug!(conn = self.id, "cannot answer: {error}");
                break;
            }
        }
    }

    async fn handle(&self, line: Vec<u8>, origin: Origin) -> Response<super::state::Reply> {
        // Reading 64 MiB of JSON takes a while; other connections go on meanwhile.
        match tokio::task::block_in_place(|| Request::parse(&line)) {
            Ok(request) => {
                drop(line);
                match self.actor.call(request.call, origin).await {
                    Ok(reply) => Response::success(request.id, reply),
                    Err(error) => Response::failure(Some(request.id), error),
                }
            }
            Err(malformed) => Response::failure(malformed.id, malformed.error),
        }
    }
}

/// Sends one answer.
async fn answer<T: Serialize>(
    writer: &mut OwnedWriteHalf,
    response: &Response<T>,
) -> io::Result<()> {
    let mut line = tokio::task::block_in_place(|| serde_json::to_vec(response))?;
    line.push(b'\n');
    timeout(ANSWER_TIME, writer.write_all(&line))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client does not read"))?
}

/// What a client has sent.
enum Line {
    /// A request, without its newline, and the leave to hold it if it is large.
    Request(Vec<u8>, Option<OwnedSemaphorePermit>),
    /// A line above the limit, which was thrown away.
    TooLong,
    /// A line that does not end.
    TooSlow,
    /// Nothing more comes.
    End,
}

/// Reads one line that is not blank. Not safe to be cancelled and tried again.
async fn read_line(
    reader: &mut (impl AsyncBufRead + Unpin),
    limit: usize,
    patience: Duration,
    large: &Arc<Semaphore>,
) -> io::Result<Line> {
    let mut line = Vec::new();
    let mut permit = None;
    let mut too_long = false;
    let mut deadline = None;
    loop {
        let chunk = match deadline {
            None => reader.fill_buf().await?,
            Some(deadline) => match tokio::time::timeout_at(deadline, reader.fill_buf()).await {
                Ok(chunk) => chunk?,
                Err(_) => return Ok(Line::TooSlow),
            },
        };
        if chunk.is_empty() {
            // What has no newline was cut off in the middle: it must not be acted upon.
            return Ok(Line::End);
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let part = end.map_or(chunk, |end| &chunk[..end]);
        if too_long || line.len() + part.len() > limit {
            too_long = true;
            line = Vec::new();
            permit = None;
        } else {
            line.extend_from_slice(part);
        }
        let used = end.map_or(chunk.len(), |end| end + 1);
        reader.consume(used);
        if end.is_some() {
            if too_long {
                return Ok(Line::TooLong);
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                line.clear();
                deadline = None;
                continue;
            }
            return Ok(Line::Request(line, permit));
        }
        if line.len() > LARGE_BYTES && permit.is_none() {
            // Not counted against the client's time: others are to blame.
            permit = Some(
                Arc::clone(large)
                    .acquire_owned()
                    .await
                    .map_err(io::Error::other)?,
            );
            deadline = None;
        }
        deadline = deadline.or_else(|| Some(Instant::now() + patience));
    }
}

/// Begins at most so many requests in any second, by having them wait.
struct Pace {
    rate: usize,
    begun: VecDeque<Instant>,
}

impl Pace {
    fn new(rate: u32) -> Self {
        Self {
            rate: rate as usize,
            begun: VecDeque::new(),
        }
    }

    /// A request is to begin: how long must it wait?
    fn step(&mut self, now: Instant) -> Option<Duration> {
        let second = Duration::from_secs(1);
        let mut at = now;
        if self.begun.len() >= self.rate
            && let Some(oldest) = self.begun.pop_front()
        {
            at = at.max(oldest + second);
        }
        self.begun.push_back(at);
        (at > now).then(|| at - now)
    }
}

/// The kernel's monotonic clock (what `bpf_ktime_get_ns` reads), in nanoseconds; 0 on a kernel without
/// one, which cannot be.
pub(super) fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|time| u64::try_from(time.num_nanoseconds()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seats() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(1))
    }

    async fn lines(input: &[u8], limit: usize) -> Vec<String> {
        let mut reader = BufReader::with_capacity(4, input);
        let mut lines = Vec::new();
        loop {
            match read_line(&mut reader, limit, REQUEST_TIME, &seats())
                .await
                .unwrap()
            {
                Line::Request(line, _) => lines.push(String::from_utf8(line).unwrap()),
                Line::TooLong => lines.push("TOO LONG".into()),
                Line::TooSlow => lines.push("TOO SLOW".into()),
                Line::End => return lines,
            }
        }
    }

    #[tokio::test]
    async fn lines_are_read_and_blank_ones_skipped() {
        assert_eq!(
            lines(b"one\n\n  \r\ntwo three\n", 100).await,
            ["one", "two three"]
        );
        assert_eq!(lines(b"one\nhalf", 100).await, ["one"]);
        assert_eq!(lines(b"", 100).await, Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_line_above_the_limit_is_thrown_away_and_the_next_one_read() {
        assert_eq!(
            lines(b"12345678\n12345\nx\n", 5).await,
            ["TOO LONG", "12345", "x"]
        );
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_is_given_up() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut reader = BufReader::new(server);
        client.write_all(b"{").await.unwrap();
        let line = read_line(&mut reader, 100, Duration::from_millis(10), &seats())
            .await
            .unwrap();
        assert!(matches!(line, Line::TooSlow));
    }

    #[test]
    fn fast_clients_are_slowed_down() {
        let mut pace = Pace::new(2);
        let start = Instant::now();
        assert_eq!(pace.step(start), None);
        assert_eq!(pace.step(start), None);
        assert_eq!(pace.step(start), Some(Duration::from_secs(1)));
        assert_eq!(pace.step(start + Duration::from_secs(1)), None);
        assert_eq!(
            pace.step(start + Duration::from_secs(1)),
            Some(Duration::from_secs(1))
        );
        assert_eq!(pace.step(start + Duration::from_secs(9)), None);
    }
}
