//! A daemon's life: lock, recovery, data plane, socket, service, and the exact undoing of everything.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use jiff::Timestamp;
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tracing_subscriber::{EnvFilter, util::SubscriberInitExt};

use super::{
    actor::{self, ActorHandle},
    events::EventLog,
    host::KernelHost,
    lease::{self, LeaseKeeper, LeaseView, Pulse},
    lock::{LockError, StateLock},
    plane::{LaneBounds, Plane},
    protect::Protection,
    server::{self, ServerError, monotonic_ns},
    state::{Settings, State},
};
use crate::{
    journal::{self, JournalError},
    protocol::{self, DaemonInfo, DownResult, ErrorBody, ErrorCode, EventKind},
};

/// Name of the socket in the state directory.
pub const SOCKET_NAME: &str = "injector.sock";
/// How long rules go on after the daemon's last sign of life.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(10);
/// What one lane may hold unless told otherwise: a quarter of a gigabyte; as many packets are what small ones would
/// take of that.
pub const DEFAULT_LANES: LaneBounds = LaneBounds {
    packets: 1 << 18,
    bytes: 256 << 20,
};
/// The state of a flow in which nothing has moved for so long is forgotten.
const FLOW_IDLE: Duration = Duration::from_mins(5);
/// Pulses of the loop that serves the socket.
const BEAT: Duration = Duration::from_millis(100);

/// How the daemon logs to standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// How a daemon is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonOptions<S> {
    /// Where its lock, journal and socket are. One daemon per directory.
    pub state_dir: PathBuf,
    /// The socket; in the state directory where absent.
    pub socket: Option<PathBuf>,
    /// Length of the lease.
    pub lease: Duration,
    /// Leave so long after the last active rule and the last connection that held one have gone.
    pub idle_exit: Option<Duration>,
    /// The protect list to begin with.
    pub protect: Vec<String>,
    /// Table sizes of the data plane.
    pub sizes: S,
    /// What one lane may hold at most.
    pub lanes: LaneBounds,
    /// How it logs.
    pub log_format: LogFormat,
}

/// Why a daemon did not start, or did not end well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// An option has an impossible value.
    #[error("{0}")]
    Option(ErrorBody),
    /// The state directory cannot be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The journal of changes cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The data plane cannot be loaded.
    #[error("cannot load the data plane: {0}")]
    Plane(ErrorBody),
    /// The socket cannot be had.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// A thread, the runtime or a signal handler cannot be had.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The thread that owns the rules has panicked. What it had attached was detached as it unwound;
    /// the next start looks again.
    #[error("the daemon failed ({0}); `injector check` and the log say more")]
    Failed(String),
    /// Something could not be undone at the end.
    #[error(
        "not everything could be undone: {}; it is written down, and the next daemon or `injector \
         heal --all` tries again",
        problems.join("; ")
    )]
    NotRestored {
        /// What, and why.
        problems: Vec<String>,
    },
}

impl DaemonError {
    /// The same as a kind, for an exit code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        let of_io = |error: &io::Error| {
            if error.kind() == io::ErrorKind::PermissionDenied {
                ErrorCode::NotPermitted
            } else {
                ErrorCode::Host
            }
        };
        match self {
            Self::Option(error) | Self::Plane(error) => error.code,
            Self::Lock(LockError::Held { .. }) | Self::Server(ServerError::InUse { .. }) => {
                ErrorCode::Exists
            }
            Self::Lock(LockError::Io { source, .. })
            | Self::Server(ServerError::Io { source, .. })
            | Self::Io { source, .. } => of_io(source),
            Self::Lock(_) | Self::Journal(_) | Self::Server(_) | Self::NotRestored { .. } => {
                ErrorCode::Host
            }
            Self::Failed(_) => ErrorCode::Internal,
        }
    }
}

/// Runs a daemon until it is told to leave (`down`, SIGTERM, SIGINT, SIGHUP) or has been idle for long
/// enough. `load` loads the data plane.
///
/// # Errors
/// It cannot start, or something could not be undone at the end.
pub fn run<S, P: Plane>(
    options: DaemonOptions<S>,
    load: impl FnOnce(&S) -> Result<P, ErrorBody>,
) -> Result<(), DaemonError> {
    log_to_stderr(options.log_format);
    check_lease(options.lease)?;
    let protection = Protection::new(&options.protect).map_err(DaemonError::Option)?;
    let _lock = StateLock::acquire(&options.state_dir)?;
    let mut events = EventLog::default();
    recover(&options.state_dir, &mut events)?;
    let host = KernelHost::open(&options.state_dir)?;
    let plane = load(&options.sizes).map_err(DaemonError::Plane)?;

    let failed = |what| move |source| DaemonError::Io { what, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("socket")
        .enable_all()
        .build()
        .map_err(failed("start the runtime"))?;
    let socket = options
        .socket
        .unwrap_or_else(|| options.state_dir.join(SOCKET_NAME));
    let (listener, socket_file) = {
        let _inside = runtime.enter();
        server::bind(&socket)?
    };

    let view = LeaseView::new(options.lease);
    let (rules_pulse, socket_pulse) = (Pulse::new(plane.now_ns()), Pulse::new(plane.now_ns()));
    let keeper = LeaseKeeper::start(
        &view,
        plane.lease().map_err(DaemonError::Plane)?,
        vec![rules_pulse.clone(), socket_pulse.clone()],
    )
    .map_err(failed("start the lease thread"))?;
    events.push(
        EventKind::Started,
        None,
        None,
        format!(
            "injector {} serves {} with a lease of {:?}",
            env!("CARGO_PKG_VERSION"),
            socket.display(),
            options.lease
        ),
    );
    let settings = Settings {
        info: DaemonInfo {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: protocol::VERSION,
            started: Timestamp::now(),
            state_dir: options.state_dir,
        },
        idle_exit: options.idle_exit,
        flow_idle: FLOW_IDLE,
        lanes: options.lanes,
    };
    let state = State::new(plane, host, settings, view, protection, events);
    let (stop, stopping) = watch::channel(false);
    let watched = rules_pulse.clone();
    let (handle, thread) = actor::start(state, rules_pulse, move || {
        stop.send_replace(true);
    })
    .map_err(failed("start the thread that owns the rules"))?;

    let served = runtime.block_on(async {
        stop_on_signals(&handle)?;
        tokio::spawn(beat(socket_pulse, watched));
        notify(&[NotifyState::Ready]);
        server::serve(listener, handle.clone(), stopping).await;
        Ok::<(), io::Error>(())
    });
    if served.is_err() {
        handle.stop("it cannot handle signals");
    }
    notify(&[NotifyState::Stopping]);
    drop(handle);
    let result = thread.join();
    drop(socket_file);
    drop(keeper);
    runtime.shutdown_timeout(Duration::from_secs(1));
    served.map_err(failed("handle signals"))?;
    outcome(result)
}

/// What the end of the thread that owned the rules means.
fn outcome(result: thread::Result<DownResult>) -> Result<(), DaemonError> {
    match result {
        Ok(DownResult {
            host_restored: true,
            ..
        }) => Ok(()),
        Ok(DownResult { problems, .. }) => Err(DaemonError::NotRestored { problems }),
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "panic".to_owned());
            Err(DaemonError::Failed(text))
        }
    }
}

/// Makes sure that a lease of this length can be kept.
fn check_lease(length: Duration) -> Result<(), DaemonError> {
    if !(lease::SHORTEST..=lease::LONGEST).contains(&length) {
        return Err(DaemonError::Option(
            ErrorBody::new(
                ErrorCode::Invalid,
                format!(
                    "a lease of {:?} is not possible: {:?} to {:?} are",
                    length,
                    lease::SHORTEST,
                    lease::LONGEST
                ),
            )
            .with_hint("give --lease 10s, for instance"),
        ));
    }
    Ok(())
}

/// Undoes what a dead daemon left.
fn recover(state_dir: &Path, events: &mut EventLog) -> Result<(), DaemonError> {
    let recovery = journal::recover(state_dir)?;
    for text in recovery.undone.iter().chain(&recovery.gone) {
        events.push(
            EventKind::Recovered,
            None,
            None,
            format!("left by a daemon that died: {text}"),
        );
    }
    for text in &recovery.failed {
        events.push(
            EventKind::Problem,
            None,
            None,
            format!("left by a daemon that died, and cannot be undone: {text}"),
        );
    }
    Ok(())
}

/// Has the actor leave on the signals that ask for it.
fn stop_on_signals(handle: &ActorHandle) -> io::Result<()> {
    for (kind, name) in [
        (SignalKind::terminate(), "SIGTERM"),
        (SignalKind::interrupt(), "SIGINT"),
        (SignalKind::hangup(), "SIGHUP"),
    ] {
        let mut signal = signal(kind)?;
        let handle = handle.clone();
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                handle.stop(name);
            }
        });
    }
    Ok(())
}

/// Shows that the loop which serves the socket is alive, to the lease and, as long as the thread that
/// owns the rules is alive as well, to systemd's watchdog.
async fn beat(pulse: Pulse, rules: Pulse) {
    let watchdog = sd_notify::watchdog_enabled().map(|within| within / 3);
    let mut told = tokio::time::Instant::now();
    let mut ticks = interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now_ns = monotonic_ns();
        pulse.beat(now_ns);
        if let Some(period) = watchdog
            && told.elapsed() >= period
            && rules.alive_at(now_ns).saturating_add(lease::nanos(period)) > now_ns
        {
            told = tokio::time::Instant::now();
            notify(&[NotifyState::Watchdog]);
        }
    }
}

/// Tells the service manager, where there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("cannot notify the service manager: {error}");
    }
}

/// Logs to standard error; what, is in `INJECTOR_LOG` (`info` where absent). A program that has set a
/// logger up already keeps it.
fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_env("INJECTOR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false);
    let result = match format {
        LogFormat::Text => builder.finish().try_init(),
        LogFormat::Json => builder.json().finish().try_init(),
    };
    if let Err(error) = result {
        tracing::debug!("the log is set up already: {error}");
    }
}
