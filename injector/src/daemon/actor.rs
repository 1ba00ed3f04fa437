//! The thread that owns the state machine, and the way to talk to it.
//!
//! Everything that may take long (namespaces, netlink, system calls with a million prefixes) happens
//! on this thread, so that neither the socket nor the lease waits for it.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    host::Host,
    lease::Pulse,
    plane::Plane,
    record::ConnId,
    state::{Origin, Reply, State},
};
use crate::protocol::{Call, DownResult, ErrorBody, ErrorCode};

/// The pulse beats at least so often.
const BEAT: Duration = Duration::from_millis(100);

/// What the thread is told.
enum Command {
    Call {
        call: Box<Call>,
        origin: Origin,
        reply: oneshot::Sender<Result<Reply, ErrorBody>>,
    },
    Closed(ConnId),
    Stop {
        why: String,
    },
}

/// Speaks to the thread.
#[derive(Clone)]
pub struct ActorHandle {
    commands: mpsc::Sender<Command>,
}

impl ActorHandle {
    /// Has a request done.
    ///
    /// # Errors
    /// What the client is told.
    pub async fn call(&self, call: Call, origin: Origin) -> Result<Reply, ErrorBody> {
        let (reply, answer) = oneshot::channel();
        let gone = || {
            ErrorBody::new(
                ErrorCode::ShuttingDown,
                "the daemon is on its way out; nothing was changed",
            )
            .with_hint("try again: a new daemon will be started")
        };
        self.commands
            .send(Command::Call {
                call: Box::new(call),
                origin,
                reply,
            })
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Says that a connection has closed.
    pub fn closed(&self, conn: ConnId) {
        // If the thread has ended, so has everything that the connection held.
        let _ = self.commands.send(Command::Closed(conn));
    }

    /// Has everything healed and the thread end.
    pub fn stop(&self, why: &str) {
        // If the thread has ended, it has healed everything.
        let _ = self.commands.send(Command::Stop {
            why: why.to_owned(),
        });
    }
}

/// Starts the thread. `ended` is called on it when it is about to end in order; its result is what was
/// undone at the end.
///
/// # Errors
/// The thread cannot be started.
pub fn start<P: Plane, H: Host>(
    mut state: State<P, H>,
    pulse: Pulse,
    ended: impl FnOnce() + Send + 'static,
) -> std::io::Result<(ActorHandle, JoinHandle<DownResult>)> {
    let (commands, inbox) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("rules".to_owned())
        .spawn(move || {
            /// Tells that the thread ends, even if it panics.
            struct Ended<F: FnOnce()>(Option<F>);
            impl<F: FnOnce()> Drop for Ended<F> {
                fn drop(&mut self) {
                    if let Some(ended) = self.0.take() {
                        ended();
                    }
                }
            }
            let _ended = Ended(Some(ended));
            run(&mut state, &inbox, &pulse)
        })?;
    Ok((ActorHandle { commands }, thread))
}

fn run<P: Plane, H: Host>(
    state: &mut State<P, H>,
    inbox: &mpsc::Receiver<Command>,
    pulse: &Pulse,
) -> DownResult {
    loop {
        pulse.work(state.plane().now_ns());
        let tick = state.tick();
        pulse.beat(state.plane().now_ns());
        if tick.leave {
            pulse.work(state.plane().now_ns());
            return state.down("no rule for some time");
        }
        match inbox.recv_timeout(tick.wake.min(BEAT)) {
            Ok(command) => {
                pulse.work(state.plane().now_ns());
                match command {
                    Command::Call {
                        call,
                        origin,
                        reply,
                    } => {
                        let answer = state.call(*call, origin);
                        let last = match &answer {
                            Ok(Reply::Down(result)) => Some(result.clone()),
                            _ => None,
                        };
                        if reply.send(answer).is_err() {
                            tracing::debug!(
                                conn = origin.conn,
                                "the client has gone before its answer"
                            );
                        }
                        if let Some(result) = last {
                            return result;
                        }
                    }
                    Command::Closed(conn) => state.closed(conn),
                    Command::Stop { why } => return state.down(&why),
                }
                pulse.beat(state.plane().now_ns());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return state.down("nobody is left to serve"),
        }
    }
}
