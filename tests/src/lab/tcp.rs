//! TCP between two nodes: bulk transfers, and connections that are asked whether they still work.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::{netns::Netns, topology::Node, udp::FREE, wait::wait_for};

/// Sends `bytes` from one node to another on a connection of its own; returns how long that took.
/// Fails if they are not all there within the time.
pub fn bulk(from: &Node, to: &Node, port: u16, bytes: usize, within: Duration) -> Result<Duration> {
    let began = Instant::now();
    let listener = listen(&to.ns, to.at(port))?;
    let reader = thread::spawn(move || -> Result<usize> {
        let mut stream = accept(&listener, within)?;
        stream.set_read_timeout(Some(within))?;
        let mut buffer = vec![0; 1 << 18];
        let mut total = 0;
        loop {
            match stream.read(&mut buffer).context("receiving in bulk")? {
                0 => return Ok(total),
                got => total += got,
            }
        }
    });
    let sent = (|| {
        let mut stream = connect(&from.ns, to.at(port), within)?;
        stream.set_write_timeout(Some(within))?;
        let chunk = vec![0x5a; 1 << 16];
        let mut left = bytes;
        while left > 0 {
            ensure!(
                began.elapsed() < within,
                "{left} bytes left after {within:?}"
            );
            let now = left.min(chunk.len());
            stream.write_all(&chunk[..now]).context("sending in bulk")?;
            left -= now;
        }
        Ok(())
    })();
    let arrived = reader
        .join()
        .map_err(|_| anyhow!("the bulk receiver panicked"))?;
    sent?;
    let arrived = arrived?;
    ensure!(arrived == bytes, "{arrived} of {bytes} bytes arrived");
    Ok(began.elapsed())
}

/// A listener in a namespace.
pub fn listen(ns: &Netns, address: SocketAddr) -> Result<TcpListener> {
    let listener = wait_for("the address is free", FREE, || {
        ns.enter(|| {
            TcpListener::bind(address)
                .map(Some)
                .with_context(|| format!("listening on {address}"))
        })
    })?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Waits for a connection.
pub fn accept(listener: &TcpListener, within: Duration) -> Result<TcpStream> {
    let began = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("accept"),
        }
        if began.elapsed() > within {
            bail!("nobody connected within {within:?}");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Connects from a namespace.
pub fn connect(ns: &Netns, address: SocketAddr, within: Duration) -> Result<TcpStream> {
    ns.enter(|| {
        TcpStream::connect_timeout(&address, within)
            .with_context(|| format!("connecting to {address} from {}", ns.name()))
    })
}

/// A connection between two nodes, both ends in hand.
#[derive(Debug)]
pub struct Connection {
    client: TcpStream,
    server: TcpStream,
}

impl Connection {
    /// Connects `from` to a port of `to`.
    pub fn open(from: &Node, to: &Node, port: u16, within: Duration) -> Result<Self> {
        let listener = listen(&to.ns, to.at(port))?;
        let client = connect(&from.ns, to.at(port), within)?;
        let server = accept(&listener, within)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        Ok(Self { client, server })
    }

    /// Sends a byte there and one back; whether both arrived in time.
    pub fn works(&mut self, within: Duration) -> Result<bool> {
        Ok(pass(&mut self.client, &mut self.server, within)?
            && pass(&mut self.server, &mut self.client, within)?)
    }
}

impl Connection {
    /// Waits for a byte that was sent to the server before; whether it arrived.
    pub fn arrives(&mut self, within: Duration) -> Result<bool> {
        self.server.set_read_timeout(Some(within))?;
        match self.server.read(&mut [0]) {
            Ok(got) => Ok(got == 1),
            Err(error) if is_timeout(&error) => Ok(false),
            Err(error) => Err(error).context("receiving a byte"),
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Sends a byte from one end of a connection to the other; whether it arrived in time.
pub fn pass(from: &mut TcpStream, to: &mut TcpStream, within: Duration) -> Result<bool> {
    from.write_all(&[1]).context("sending a byte")?;
    to.set_read_timeout(Some(within))?;
    match to.read(&mut [0]) {
        Ok(1) => Ok(true),
        Ok(_) => Ok(false),
        Err(error) if is_timeout(&error) => Ok(false),
        Err(error) => Err(error).context("receiving a byte"),
    }
}

/// A server that sends back what it gets, until it is dropped, for commands that connect to it.
#[derive(Debug)]
pub struct Echo {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Serves a port of a node.
    pub fn serve(node: &Node, port: u16) -> Result<Self> {
        use std::sync::atomic::Ordering;
        let listener = listen(&node.ns, node.at(port))?;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let told = std::sync::Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                if let Ok(mut stream) = accept(&listener, Duration::from_millis(100)) {
                    let mut bytes = [0; 1024];
                    let _timeout = stream.set_read_timeout(Some(Duration::from_secs(1)));
                    while let Ok(got @ 1..) = stream.read(&mut bytes) {
                        if stream.write_all(&bytes[..got]).is_err() {
                            break;
                        }
                    }
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}
