//! A steady stream of numbered datagrams with the time of each, for faults that begin and end by time.
//!
//! A datagram's fate is decided while `send` runs, so it was decided between the two times that are
//! kept with it, however busy the machine is.

use std::{
    collections::BTreeSet,
    net::UdpSocket,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use nix::time::{ClockId, clock_gettime};

use super::{
    topology::Node,
    udp::{drain, numbered, socket},
    wait::{wait_for, wait_until},
};

/// Nanoseconds of the monotonic clock, the one that the kernel's programs read.
#[must_use]
pub fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        time.tv_sec().unsigned_abs() * 1_000_000_000 + time.tv_nsec().unsigned_abs()
    })
}

/// One datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shot {
    /// Before it was sent.
    pub before: u64,
    /// After.
    pub after: u64,
    /// Whether it arrived.
    pub arrived: bool,
}

/// A stream that is running.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    shots: Arc<Mutex<Vec<Shot>>>,
    receiver: UdpSocket,
    /// Numbers of what has arrived. Kept apart, since a datagram may be seen here before its sender has
    /// come to write it down.
    arrived: Mutex<BTreeSet<u32>>,
    sender: Option<JoinHandle<Result<()>>>,
}

impl Stream {
    /// Starts sending one datagram per `gap`, from and to the same port.
    pub fn start(from: &Node, to: &Node, port: u16, gap: Duration) -> Result<Self> {
        let receiver = socket(&to.ns, to.at(port))?;
        receiver.set_nonblocking(true)?;
        let socket = socket(&from.ns, from.at(port))?;
        socket.connect(to.at(port))?;
        let stop = Arc::new(AtomicBool::new(false));
        let shots = Arc::new(Mutex::new(Vec::new()));
        let sender = {
            let (stop, shots) = (Arc::clone(&stop), Arc::clone(&shots));
            thread::spawn(move || {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let before = now_ns();
                    socket
                        .send(&numbered(number, port, 64))
                        .with_context(|| format!("sending datagram {number} of a stream"))?;
                    let after = now_ns();
                    shots
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(Shot {
                            before,
                            after,
                            arrived: false,
                        });
                    // The stream's pace.
                    thread::sleep(gap);
                }
                Ok(())
            })
        };
        Ok(Self {
            stop,
            shots,
            receiver,
            arrived: Mutex::default(),
            sender: Some(sender),
        })
    }

    /// All datagrams so far; of the last few it may not be known yet that they arrived.
    pub fn so_far(&self) -> Result<Vec<Shot>> {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        arrived.extend(drain(&self.receiver)?.into_iter().map(|(number, _)| number));
        let shots = self.shots.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((0..)
            .zip(shots.iter())
            .map(|(number, shot)| Shot {
                arrived: arrived.contains(&number),
                ..*shot
            })
            .collect())
    }

    /// Waits until a datagram sent after `since` arrives; returns when it was sent.
    pub fn await_arrival(&self, since: u64, within: Duration) -> Result<u64> {
        wait_for("a datagram of the stream arrives", within, || {
            Ok(self
                .so_far()?
                .iter()
                .find(|shot| shot.arrived && shot.before >= since)
                .map(|shot| shot.before))
        })
    }

    /// Waits until `count` datagrams in a row, all sent after `since`, have not arrived although later
    /// ones have been sent.
    pub fn await_loss(&self, since: u64, count: usize, within: Duration) -> Result<()> {
        wait_until("datagrams of the stream are lost", within, || {
            let shots = self.so_far()?;
            let recent: Vec<&Shot> = shots.iter().filter(|shot| shot.before >= since).collect();
            // The last few may still be on their way.
            let settled = recent.len().saturating_sub(3);
            Ok(recent[..settled]
                .windows(count)
                .any(|run| run.iter().all(|shot| !shot.arrived)))
        })
    }

    /// Waits until the stream has been going on for so long after `since`.
    pub fn await_time(&self, since: u64, length: Duration) -> Result<()> {
        let until = since + u64::try_from(length.as_nanos())?;
        wait_until(
            "the stream goes on",
            length + Duration::from_secs(20),
            || {
                Ok(self
                    .so_far()?
                    .last()
                    .is_some_and(|shot| shot.after >= until))
            },
        )
    }

    /// Stops sending and returns all datagrams.
    pub fn finish(mut self) -> Result<Vec<Shot>> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            sender
                .join()
                .map_err(|_| anyhow!("the stream's sender panicked"))??;
        }
        // A veth has delivered by the time that `send` returns, or its softirq does within moments:
        // two equal looks in a row settle it.
        let mut last = self.so_far()?;
        wait_for("the stream settles", Duration::from_secs(10), || {
            thread::sleep(Duration::from_millis(30));
            let look = self.so_far()?;
            let settled = look == last;
            last.clone_from(&look);
            Ok(settled.then_some(look))
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            // It has nothing to say that a test which ended early would hear.
            let _ended = sender.join();
        }
    }
}
