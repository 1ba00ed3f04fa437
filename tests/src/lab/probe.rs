//! Probes: datagrams that are sent back at once, of several kinds in turn, with the time that each took there,
//! and there and back. The kernel says when they arrived.

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt::Priority},
};
use rand::{RngExt as _, SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;

use super::{
    stamping::stamp_arrivals,
    timed::{Stamp, milliseconds, now_ns, stamped},
    topology::Node,
    udp::socket,
};

/// A probe's number; on its way back also when it arrived, and when it was sent back.
const LENGTH: usize = 20;
/// Senders' ports are so much higher.
const SENDERS: u16 = 1000;
/// Between two probes, in microseconds: not in step with anything.
const GAPS: std::ops::Range<u64> = 600..1400;
/// How often the thread that sends back looks whether it is to end, in milliseconds.
const LOOK: u16 = 50;

/// The times that the probes of one kind took, in milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Times {
    /// There.
    pub one_way: Vec<f64>,
    /// There and back, without the time that it took to be sent back.
    pub round_trip: Vec<f64>,
}

/// Sockets for probes of several kinds, and a thread that sends them back.
#[derive(Debug)]
pub struct Probes {
    senders: Vec<UdpSocket>,
    stop: Arc<AtomicBool>,
    echo: Option<JoinHandle<Result<()>>>,
}

impl Probes {
    /// From one node to another. There is a kind for each of `priorities` (`SO_PRIORITY`): kind `i` goes to port
    /// `port + i`, from another one.
    pub fn new(from: &Node, to: &Node, v6: bool, port: u16, priorities: &[i32]) -> Result<Self> {
        let mut senders = Vec::new();
        let mut echoing = Vec::new();
        for (port, priority) in (port..).zip(priorities) {
            let at = |node: &Node, port: u16| -> SocketAddr {
                if v6 { node.at6(port) } else { node.at(port) }
            };
            let (near, far) = (at(from, port + SENDERS), at(to, port));
            let (sender, receiver) = (socket(&from.ns, near)?, socket(&to.ns, far)?);
            sender.connect(far)?;
            receiver.connect(near)?;
            for (socket, node) in [(&sender, from), (&receiver, to)] {
                socket.set_nonblocking(true)?;
                stamp_arrivals(socket, &node.ns)?;
            }
            setsockopt(&sender, Priority, priority).context("SO_PRIORITY")?;
            senders.push(sender);
            echoing.push(receiver);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let echo = thread::spawn(move || send_back(&echoing, &told));
        Ok(Self {
            senders,
            stop,
            echo: Some(echo),
        })
    }

    /// Sends so many of each kind, one of each in turn, in an order that changes from turn to turn; returns their
    /// times by kind. Fails if they are not all back within the time.
    pub fn run(&self, turns: u32, within: Duration) -> Result<Vec<Times>> {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let mut order: Vec<usize> = (0..self.senders.len()).collect();
        let mut sent = vec![Vec::new(); self.senders.len()];
        for turn in 0..turns {
            order.shuffle(&mut random);
            for kind in &order {
                let mut bytes = [0; LENGTH];
                bytes[..4].copy_from_slice(&turn.to_be_bytes());
                sent[*kind].push(now_ns()?);
                self.senders[*kind]
                    .send(&bytes)
                    .context("sending a probe")?;
                // The probes' pace.
                thread::sleep(Duration::from_micros(random.random_range(GAPS)));
            }
        }
        let began = Instant::now();
        let mut times = vec![Times::default(); self.senders.len()];
        let each = usize::try_from(turns)?;
        while times.iter().any(|times| times.one_way.len() < each) {
            ensure!(
                began.elapsed() < within,
                "of {turns} probes there are back, by kind: {:?}",
                times
                    .iter()
                    .map(|times| times.one_way.len())
                    .collect::<Vec<_>>()
            );
            for ((socket, sent), times) in self.senders.iter().zip(&sent).zip(&mut times) {
                let mut bytes = [0; LENGTH];
                while let Some(Stamp { at_ns: back_ns, .. }) = stamped(socket, &mut bytes)? {
                    let turn = u32::from_be_bytes(part(&bytes, 0));
                    let sent_ns = sent[usize::try_from(turn)?];
                    let there_ns = i64::from_be_bytes(part(&bytes, 4));
                    let again_ns = i64::from_be_bytes(part(&bytes, 12));
                    let there = there_ns - sent_ns;
                    times.one_way.push(milliseconds(there));
                    times
                        .round_trip
                        .push(milliseconds(there + back_ns - again_ns));
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(times)
    }
}

/// Some bytes of a probe.
fn part<const N: usize>(bytes: &[u8; LENGTH], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

/// Sends back what comes, with the time at which it came.
fn send_back(sockets: &[UdpSocket], stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let mut waiting: Vec<PollFd> = sockets
            .iter()
            .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
            .collect();
        poll(&mut waiting, PollTimeout::from(LOOK)).context("poll")?;
        for socket in sockets {
            let mut bytes = [0; LENGTH];
            while let Some(Stamp { at_ns, .. }) = stamped(socket, &mut bytes)? {
                bytes[4..12].copy_from_slice(&at_ns.to_be_bytes());
                bytes[12..].copy_from_slice(&now_ns()?.to_be_bytes());
                socket.send(&bytes).context("sending a probe back")?;
            }
        }
    }
    Ok(())
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self
            .echo
            .take()
            .map(|echo| echo.join().unwrap_or_else(|_| Err(anyhow!("it panicked"))));
        if let Some(Err(error)) = ended {
            eprintln!("the thread that sends probes back: {error:#}");
        }
    }
}
