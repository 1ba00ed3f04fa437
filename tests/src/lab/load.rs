//! TCP under load: streams whose application offers so much and no more, or all that it can, and what of it
//! arrives.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{
    tcp::{accept, connect, listen},
    topology::Node,
};

/// How long a connection may take to come about.
const CONNECTS: Duration = Duration::from_secs(10);
/// How often a connection is tried.
const TRIES: u32 = 5;
/// How often a sender that offers a rate looks at the clock.
const TICK: Duration = Duration::from_millis(4);
/// A sender or receiver that is stuck looks so often whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// What is offered.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Connections, all to one port.
    pub streams: u32,
    /// Bits per second that their application offers together; `None` for all that goes.
    pub offered: Option<f64>,
    /// For so long.
    pub lasting: Duration,
}

impl Load {
    /// Sends from one node to a port of another; returns the bits per second that arrived in the time that it
    /// lasted, counted from when all connections stood.
    pub fn deliver(&self, from: &Node, to: &Node, port: u16) -> Result<f64> {
        self.deliver_to(from, to, to.at(port))
    }

    fn deliver_to(&self, from: &Node, to: &Node, target: SocketAddr) -> Result<f64> {
        let listener = listen(&to.ns, target)?;
        let mut pairs = Vec::new();
        for _ in 0..self.streams {
            let sender = connect(&from.ns, target, CONNECTS)?;
            let receiver = accept(&listener, CONNECTS)?;
            sender.set_write_timeout(Some(LOOK))?;
            receiver.set_read_timeout(Some(LOOK))?;
            pairs.push((sender, receiver));
        }
        let each = self.offered.map(|all| all / f64::from(self.streams));
        let over = AtomicBool::new(false);
        let arrived = thread::scope(|scope| {
            let mut senders = Vec::new();
            let mut receivers = Vec::new();
            for (sender, receiver) in &mut pairs {
                let over = &over;
                senders.push(scope.spawn(move || offer(sender, each, over)));
                receivers.push(scope.spawn(move || count(receiver, over)));
            }
            thread::sleep(self.lasting);
            over.store(true, Ordering::Relaxed);
            let mut arrived = 0;
            for receiver in receivers {
                arrived += receiver
                    .join()
                    .map_err(|_| anyhow!("a receiver of a load panicked"))??;
            }
            for sender in senders {
                sender
                    .join()
                    .map_err(|_| anyhow!("a sender of a load panicked"))??;
            }
            Ok::<_, anyhow::Error>(arrived)
        })?;
        Ok(8.0 * f64::from(u32::try_from(arrived)?) / self.lasting.as_secs_f64())
    }
}

/// So many bytes on each of several connections at once.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// Connections, all to one port.
    pub streams: u32,
    /// Bytes on each.
    pub bytes: usize,
    /// Without bytes for so long it has failed.
    pub within: Duration,
    /// Whether the receiver sends a byte now and then, which the sender acknowledges: a sender whose timeout doubles
    /// with every packet lost sends too few, otherwise, to get out of a burst of losses within minutes.
    pub talks_back: bool,
}

/// How often a receiver talks back.
const TALK: Duration = Duration::from_millis(20);

impl Transfer {
    /// Sends from one node to a port of another; returns the senders' addresses, and how long it took.
    pub fn run(&self, from: &Node, to: &Node, port: u16) -> Result<(Vec<SocketAddr>, Duration)> {
        let listener = listen(&to.ns, to.at(port))?;
        let began = Instant::now();
        let senders = thread::scope(|scope| {
            let mut sending = Vec::new();
            let mut receiving = Vec::new();
            for _ in 0..self.streams {
                // One whose SYN is lost, in a burst perhaps, tries again from another port.
                let mut sender = (1..TRIES)
                    .find_map(|_| connect(&from.ns, to.at(port), CONNECTS / 5).ok())
                    .map_or_else(|| connect(&from.ns, to.at(port), CONNECTS), Ok)?;
                sender.set_write_timeout(Some(self.within))?;
                sender.set_read_timeout(Some(self.within))?;
                sending.push(scope.spawn(move || {
                    let chunk = vec![0x5a; 1 << 16];
                    let mut left = self.bytes;
                    while left > 0 {
                        let now = left.min(chunk.len());
                        sender
                            .write_all(&chunk[..now])
                            .context("sending a transfer")?;
                        left -= now;
                    }
                    // The receiver has it all and says so by its end: whatever this end sends is sent by a socket that
                    // is whole, and nothing is unread when it closes, which would break the connection.
                    std::io::copy(&mut sender, &mut std::io::sink())
                        .context("waiting for a receiver")?;
                    Ok(sender.local_addr()?)
                }));
                // Its first bytes bring the connection about if the last packet of the handshake was lost.
                let mut receiver = accept(&listener, self.within)?;
                receiving.push(scope.spawn(move || self.receive(&mut receiver)));
            }
            for one in receiving {
                one.join()
                    .map_err(|_| anyhow!("a receiver of a transfer panicked"))??;
            }
            sending
                .into_iter()
                .map(|one| {
                    one.join()
                        .map_err(|_| anyhow!("a sender of a transfer panicked"))?
                })
                .collect::<Result<Vec<SocketAddr>>>()
        })?;
        Ok((senders, began.elapsed()))
    }

    /// Takes one connection's bytes.
    fn receive(&self, stream: &mut TcpStream) -> Result<()> {
        stream.set_read_timeout(Some(if self.talks_back { TALK } else { self.within }))?;
        stream.set_nodelay(true)?;
        let mut buffer = vec![0; 1 << 18];
        let mut arrived = 0;
        let mut latest = Instant::now();
        let mut talked = latest;
        while arrived < self.bytes {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    arrived += length;
                    latest = Instant::now();
                }
                Err(error) if is_timeout(&error) && latest.elapsed() < self.within => {}
                Err(error) => return Err(error).context("receiving a transfer"),
            }
            if self.talks_back && talked.elapsed() >= TALK {
                stream.write_all(b".").context("talking back")?;
                talked = Instant::now();
            }
        }
        ensure!(
            arrived == self.bytes,
            "{arrived} of {} bytes of a transfer arrived",
            self.bytes
        );
        Ok(())
    }
}

/// Writes until it is over: so many bits per second, or all that goes.
fn offer(stream: &mut TcpStream, rate: Option<f64>, over: &AtomicBool) -> Result<()> {
    let chunk = vec![0x5a; 1 << 16];
    let began = Instant::now();
    let mut written = 0.0;
    while !over.load(Ordering::Relaxed) {
        let length = match rate {
            None => chunk.len(),
            Some(rate) => {
                let due = rate / 8.0 * began.elapsed().as_secs_f64() - written;
                if due < 1.0 {
                    thread::sleep(TICK);
                    continue;
                }
                bytes_of(due).min(chunk.len())
            }
        };
        match stream.write(&chunk[..length]) {
            Ok(length) => written += f64::from(u32::try_from(length)?),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error).context("sending a load"),
        }
    }
    Ok(())
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a positive number of bytes, cut to the size of a buffer"
)]
fn bytes_of(due: f64) -> usize {
    due.min(1e9) as usize
}

/// Reads until it is over; returns how many bytes there were.
fn count(stream: &mut TcpStream, over: &AtomicBool) -> Result<u64> {
    let mut buffer = vec![0; 1 << 18];
    let mut arrived = 0;
    while !over.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => arrived += u64::try_from(length)?,
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error).context("receiving a load"),
        }
    }
    Ok(arrived)
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
