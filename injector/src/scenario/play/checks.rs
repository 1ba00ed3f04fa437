//! Asking whether something holds: by a command, a TCP connection, an HTTP request, or a probe of the user's own that
//! runs all the time.

use std::{
    net::SocketAddr,
    os::fd::{FromRawFd, IntoRawFd},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, body::Bytes};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{TcpSocket, TcpStream},
    process::Command,
    sync::watch,
    time::{sleep, timeout},
};

use super::{World, keeper::Keeper, processes::Process, recorder::Recorder};
use crate::scenario::{
    file::{Asked, Check, CommandLine, Http, Probe},
    names,
    record::{Checked, Event},
};

/// So much of what a command prints is looked at.
const MOST_OUTPUT: u64 = 64 << 10;
/// So much of an answer's body is read.
const MOST_BODY: usize = 1 << 20;
/// So much of it is kept as the detail of an answer.
const MOST_DETAIL: usize = 400;
/// A probe of the user's own that ends is started again after this time.
const AGAIN: Duration = Duration::from_secs(1);

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    /// Whether it held.
    pub(super) ok: bool,
    /// How long it took.
    pub(super) latency: Duration,
    /// Why not, or what was said.
    pub(super) detail: Option<String>,
}

/// Asks once.
pub(super) async fn ask(world: &World, probe: &Probe, on: Option<&str>, limit: Duration) -> Answer {
    let start = Instant::now();
    let asked = timeout(limit, async {
        if let Some(command) = &probe.command {
            run(world, command, on).await
        } else if let Some(tcp) = &probe.tcp {
            let address = names::host_and_port(world.hosts(), tcp)?;
            connect(world, on, address).await.map(|_| None)
        } else if let Some(http) = &probe.http {
            request(world, on, http).await
        } else {
            Err("nothing to ask".to_owned())
        }
    })
    .await;
    let latency = start.elapsed();
    match asked {
        Ok(Ok(detail)) => Answer {
            ok: true,
            latency,
            detail,
        },
        Ok(Err(detail)) => Answer {
            ok: false,
            latency,
            detail: Some(detail),
        },
        Err(_) => Answer {
            ok: false,
            latency,
            detail: Some(format!("no answer within {} s", limit.as_secs_f64())),
        },
    }
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    /// With exit code 0.
    pub(super) success: bool,
    /// `exit status: 1`, `signal: 9 (SIGKILL)`.
    pub(super) how: String,
    /// The end of what it printed, standard output before standard error.
    pub(super) said: String,
}

/// Runs a command to its end; if this is given up before, the command and what it started are killed.
pub(super) async fn command(
    world: &World,
    line: &CommandLine,
    on: Option<&str>,
) -> Result<Ended, String> {
    let failed = |error: &dyn std::fmt::Display| format!("running '{line}': {error}");
    let mut command = world.command(line, on).map_err(|error| failed(&error))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    let group = Group::of(world, child.id());
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (out, err, status) = tokio::join!(read(out), read(err), child.wait());
    let status = status.map_err(|error| failed(&error))?;
    group.ended();
    let text = [out, err].concat();
    Ok(Ended {
        success: status.success(),
        how: status.to_string(),
        said: text,
    })
}

/// How long a command may take that names somebody.
const NAMING: Duration = Duration::from_secs(10);

/// Whom a command names: the first word that it prints.
pub(super) async fn name(world: &World, asked: &Asked) -> Result<String, String> {
    let line = &asked.command;
    let ended = timeout(NAMING, command(world, line, asked.on.as_deref()))
        .await
        .map_err(|_| format!("'{line}' named nobody within {} s", NAMING.as_secs()))??;
    let first = ended.said.split_whitespace().next();
    match first {
        Some(named) if ended.success => Ok(named.to_owned()),
        _ => Err(format!(
            "'{line}' named nobody: {}: {}",
            ended.how,
            ended.said.trim()
        )),
    }
}

/// A process group that is killed if it is dropped before its leader has ended, by the keeper if this process is killed.
struct Group {
    leader: Option<Process>,
    keeper: Arc<Keeper>,
}

impl Group {
    fn of(world: &World, pid: Option<u32>) -> Self {
        let leader = pid.and_then(Process::of);
        if let Some(leader) = leader {
            // Without a keeper there is one thing less that is certain; the run notices that at its end.
            let _ = world.keeper.started(leader);
        }
        Self {
            leader,
            keeper: Arc::clone(&world.keeper),
        }
    }

    fn ended(mut self) {
        if let Some(leader) = self.leader.take() {
            let _ = self.keeper.ended(leader);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.leader.take() {
            // The leader has not been waited for: its id, and the group's, are still its own.
            let _ = leader.kill_group();
            let _ = self.keeper.ended(leader);
        }
    }
}

async fn run(
    world: &World,
    line: &CommandLine,
    on: Option<&str>,
) -> Result<Option<String>, String> {
    let ended = command(world, line, on).await?;
    let said = detail(&ended.said);
    if ended.success {
        Ok(said)
    } else {
        Err(match said {
            Some(said) => format!("{}: {said}", ended.how),
            None => ended.how,
        })
    }
}

/// The beginning of what something printed, and all of it to the end so that nobody blocks.
async fn read(stream: Option<impl AsyncReadExt + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        // What cannot be read any more is not there.
        let _ = (&mut stream)
            .take(MOST_OUTPUT)
            .read_to_end(&mut bytes)
            .await;
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A text in one line, without control characters, shortened.
#[must_use]
pub(super) fn detail(text: &str) -> Option<String> {
    let words = text
        .split(|letter: char| letter.is_whitespace() || letter.is_control())
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    if words.is_empty() {
        return None;
    }
    if words.chars().count() <= MOST_DETAIL {
        return Some(words);
    }
    let mut short: String = words.chars().take(MOST_DETAIL - 1).collect();
    short.push('…');
    Some(short)
}

/// Connects from a node, or from here.
async fn connect(
    world: &World,
    on: Option<&str>,
    address: SocketAddr,
) -> Result<TcpStream, String> {
    let failed = |error: &dyn std::fmt::Display| format!("connecting to {address}: {error}");
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let open = || socket(family, SockType::Stream, flags, None);
    // A socket stays in the namespace in which it was made.
    let opened = match world.netns(on).map_err(|error| failed(&error))? {
        None => open(),
        Some(netns) => netns.run(open).map_err(|error| failed(&error))?,
    };
    let opened = opened.map_err(|error| failed(&error))?;
    // SAFETY: the descriptor is a socket of which nobody else has a copy.
    let stream = unsafe { std::net::TcpStream::from_raw_fd(opened.into_raw_fd()) };
    TcpSocket::from_std_stream(stream)
        .connect(address)
        .await
        .map_err(|error| failed(&error))
}

async fn request(world: &World, on: Option<&str>, http: &Http) -> Result<Option<String>, String> {
    let (address, authority, path) = names::url(world.hosts(), &http.url)?;
    let failed = |error: &dyn std::fmt::Display| format!("{} {}: {error}", http.method, http.url);
    let stream = connect(world, on, address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    // It ends with its sender, when the answer has been read or is no longer waited for.
    let _driver = Driver(tokio::spawn(async move {
        // An error of the connection comes out of the request too.
        let _ = connection.await;
    }));
    let mut request = Request::builder()
        .method(http.method.as_str())
        .uri(path)
        .header(hyper::header::HOST, authority)
        .header(
            hyper::header::USER_AGENT,
            concat!("injector/", env!("CARGO_PKG_VERSION")),
        );
    for (name, value) in &http.headers {
        request = request.header(name, value);
    }
    let body = Full::new(Bytes::from(http.body.clone().unwrap_or_default()));
    let request = request.body(body).map_err(|error| failed(&error))?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|error| failed(&error))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MOST_BODY)
        .collect()
        .await
        .map_err(|error| failed(&error))?
        .to_bytes();
    let body = String::from_utf8_lossy(&body);
    let wanted = match http.status {
        Some(wanted) => status.as_u16() == wanted,
        None => status.is_success(),
    };
    let said = detail(&body).map_or_else(String::new, |body| format!(": {body}"));
    if !wanted {
        return Err(format!("status {status}{said}"));
    }
    match &http.contains {
        Some(text) if !body.contains(text.as_str()) => {
            Err(format!("status {status}, without '{text}'{said}"))
        }
        _ => Ok(Some(format!("status {status}{said}"))),
    }
}

/// A task that ends with this.
struct Driver(tokio::task::JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What the last answer was; none before the first.
pub(super) type State = watch::Receiver<Option<bool>>;

/// Asks again and again, until told to stop.
pub(super) async fn keep_asking(
    world: Arc<World>,
    check: Check,
    state: watch::Sender<Option<bool>>,
) {
    if let Some(stream) = &check.stream {
        follow(&world, &check, stream, &state).await;
        return;
    }
    let probe = check.probe();
    loop {
        let asked = Instant::now();
        let answer = ask(&world, &probe, check.on.as_deref(), check.timeout.0).await;
        note(&world.recorder, &check.name, asked, &answer, &state);
        sleep(check.every.0.saturating_sub(asked.elapsed())).await;
    }
}

/// Writes an answer down.
pub(super) fn note(
    recorder: &Recorder,
    check: &str,
    asked: Instant,
    answer: &Answer,
    state: &watch::Sender<Option<bool>>,
) {
    recorder.write(Event::Checked(Checked {
        check: check.to_owned(),
        ok: answer.ok,
        asked: recorder.at(asked),
        latency_ms: answer.latency.as_secs_f64() * 1e3,
        detail: answer.detail.clone(),
    }));
    state.send_replace(Some(answer.ok));
}

/// A line of a user's probe.
#[derive(Debug, Deserialize)]
struct Line {
    ok: bool,
    #[serde(default)]
    latency_ms: Option<f64>,
    #[serde(default)]
    detail: Option<String>,
}

/// Reads the lines of a user's probe. No line within the check's timeout is a failure.
async fn follow(
    world: &World,
    check: &Check,
    line: &CommandLine,
    state: &watch::Sender<Option<bool>>,
) {
    let failure = |asked: Instant, problem: String| {
        let answer = Answer {
            ok: false,
            latency: asked.elapsed(),
            detail: Some(problem),
        };
        note(&world.recorder, &check.name, asked, &answer, state);
    };
    loop {
        let mut asked = Instant::now();
        match start(world, line, check.on.as_deref()) {
            Ok((mut child, lines, group)) => {
                let mut lines = BufReader::new(lines).lines();
                loop {
                    match timeout(check.every.0 + check.timeout.0, lines.next_line()).await {
                        Ok(Ok(Some(text))) if text.trim().is_empty() => {}
                        Ok(Ok(Some(text))) => {
                            match serde_json::from_str::<Line>(&text) {
                                Ok(line) => {
                                    let latency = line.latency_ms.map_or_else(
                                        || asked.elapsed(),
                                        |ms| {
                                            Duration::try_from_secs_f64(ms / 1e3)
                                                .unwrap_or_default()
                                        },
                                    );
                                    let answer = Answer {
                                        ok: line.ok,
                                        latency,
                                        detail: line.detail.as_deref().and_then(detail),
                                    };
                                    note(&world.recorder, &check.name, asked, &answer, state);
                                }
                                Err(error) => failure(
                                    asked,
                                    format!(
                                        "its probe printed no line of JSON with \"ok\" ({error}): {text}"
                                    ),
                                ),
                            }
                            asked = Instant::now();
                        }
                        Ok(Ok(None)) => break,
                        Ok(Err(error)) => {
                            failure(asked, format!("reading what its probe prints: {error}"));
                            break;
                        }
                        Err(_) => {
                            failure(
                                asked,
                                format!(
                                    "its probe printed nothing for {} s",
                                    (check.every.0 + check.timeout.0).as_secs_f64()
                                ),
                            );
                            asked = Instant::now();
                        }
                    }
                }
                let how = match child.wait().await {
                    Ok(status) => {
                        group.ended();
                        status.to_string()
                    }
                    Err(error) => error.to_string(),
                };
                failure(asked, format!("its probe ended ({how})"));
            }
            Err(problem) => failure(asked, problem),
        }
        sleep(AGAIN).await;
    }
}

type Started = (tokio::process::Child, tokio::process::ChildStdout, Group);

fn start(world: &World, line: &CommandLine, on: Option<&str>) -> Result<Started, String> {
    let failed = |error: &dyn std::fmt::Display| format!("starting '{line}': {error}");
    let mut command: Command = world.command(line, on).map_err(|error| failed(&error))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    let group = Group::of(world, child.id());
    let lines = child
        .stdout
        .take()
        .ok_or_else(|| failed(&"it has no standard output"))?;
    Ok((child, lines, group))
}
