//! UDP tools: numbered datagrams whose loss is known one by one, super-packets, and a sender that asks
//! the kernel for every error.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        MsgFlags, SockaddrStorage, recvmsg, setsockopt,
        sockopt::{Ipv4RecvErr, RcvBufForce, UdpGsoSegment},
    },
};

use super::{netns::Netns, packet_socket::on_one_cpu, topology::Node, wait::wait_for};

/// A datagram's number in the flow is its first four bytes; its sender's port is the next two.
const HEADER: usize = 6;
const ARRIVES: Duration = Duration::from_secs(4);
/// A socket that a test has closed lives on in a child of another test between its fork and its exec.
pub(super) const FREE: Duration = Duration::from_secs(2);

/// A socket of a namespace with room for what a test sends before it looks.
pub fn socket(ns: &Netns, address: SocketAddr) -> Result<UdpSocket> {
    let socket = wait_for("the address is free", FREE, || {
        ns.enter(|| {
            UdpSocket::bind(address)
                .map(Some)
                .with_context(|| format!("binding UDP {address} in {}", ns.name()))
        })
    })?;
    setsockopt(&socket, RcvBufForce, &(32 << 20)).context("SO_RCVBUFFORCE")?;
    Ok(socket)
}

/// Sends one datagram on a connected socket that earlier datagrams were answered on. An error that waits at the
/// socket fails one send, which then sends nothing, and an answer may come in at any moment until then: that send is
/// made again.
pub fn send_answered(socket: &UdpSocket, payload: &[u8]) -> Result<()> {
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        match socket.send(payload) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > patience => {
                return Err(error).context("a datagram can not be sent");
            }
            Err(error) => match error.raw_os_error() {
                Some(
                    libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::EACCES | libc::ENETUNREACH,
                ) => {}
                _ => return Err(error).context("sending a datagram"),
            },
        }
    }
}

/// A number as the bytes of a datagram.
#[must_use]
pub fn numbered(number: u32, sender: u16, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(HEADER)];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes[4..HEADER].copy_from_slice(&sender.to_be_bytes());
    bytes
}

/// A one-way path from one node's UDP socket to another's, where each datagram has a number.
#[derive(Debug)]
pub struct Path {
    sender: UdpSocket,
    receiver: UdpSocket,
    marker_sender: UdpSocket,
    marker_receiver: UdpSocket,
    marks: u32,
    port: u16,
}

impl Path {
    /// From a port of one node to a port of another, over IPv4.
    pub fn new(from: &Node, from_port: u16, to: &Node, to_port: u16) -> Result<Self> {
        Self::between(
            &from.ns,
            from.at(from_port),
            from.at(0),
            &to.ns,
            to.at(to_port),
            to.at(0),
        )
    }

    /// The same over IPv6.
    pub fn new6(from: &Node, from_port: u16, to: &Node, to_port: u16) -> Result<Self> {
        Self::between(
            &from.ns,
            from.at6(from_port),
            from.at6(0),
            &to.ns,
            to.at6(to_port),
            to.at6(0),
        )
    }

    fn between(
        from_ns: &Netns,
        from: SocketAddr,
        from_marker: SocketAddr,
        to_ns: &Netns,
        to: SocketAddr,
        to_marker: SocketAddr,
    ) -> Result<Self> {
        let receiver = socket(to_ns, to)?;
        receiver.set_nonblocking(true)?;
        let marker_receiver = socket(to_ns, to_marker)?;
        marker_receiver.set_nonblocking(true)?;
        let marker_sender = socket(from_ns, from_marker)?;
        marker_sender.connect(marker_receiver.local_addr()?)?;
        let sender = socket(from_ns, from)?;
        sender.connect(to)?;
        Ok(Self {
            port: from.port(),
            sender,
            receiver,
            marker_sender,
            marker_receiver,
            marks: 0,
        })
    }

    /// Sends datagrams of these numbers, one by one.
    pub fn send(&self, numbers: impl IntoIterator<Item = u32>) -> Result<()> {
        for number in numbers {
            self.sender
                .send(&numbered(number, self.port, 32))
                .with_context(|| format!("sending datagram {number}"))?;
        }
        Ok(())
    }

    /// Sends datagrams of these numbers, then waits until what was sent afterwards on a flow that no
    /// rule is for has arrived; returns the numbers of those that were lost.
    pub fn lost(&mut self, numbers: impl IntoIterator<Item = u32>) -> Result<BTreeSet<u32>> {
        let numbers: Vec<u32> = numbers.into_iter().collect();
        on_one_cpu(|| {
            self.send(numbers.iter().copied())?;
            self.mark()
        })?;
        self.missing(&numbers)
    }

    /// The same, but the kernel gets them as super-packets of up to `segments` datagrams of `size` bytes
    /// (`UDP_SEGMENT`).
    pub fn lost_of_super_packets(
        &mut self,
        numbers: impl IntoIterator<Item = u32>,
        segments: usize,
        size: u16,
    ) -> Result<BTreeSet<u32>> {
        let numbers: Vec<u32> = numbers.into_iter().collect();
        setsockopt(&self.sender, UdpGsoSegment, &i32::from(size)).context("UDP_SEGMENT")?;
        on_one_cpu(|| {
            for group in numbers.chunks(segments) {
                let bytes: Vec<u8> = group
                    .iter()
                    .flat_map(|&number| numbered(number, self.port, usize::from(size)))
                    .collect();
                self.sender.send(&bytes).context("sending a super-packet")?;
            }
            self.mark()
        })?;
        setsockopt(&self.sender, UdpGsoSegment, &0).context("UDP_SEGMENT")?;
        self.missing(&numbers)
    }

    fn missing(&self, numbers: &[u32]) -> Result<BTreeSet<u32>> {
        let arrived: BTreeSet<u32> = self.drain()?.into_iter().collect();
        Ok(numbers
            .iter()
            .copied()
            .filter(|number| !arrived.contains(number))
            .collect())
    }

    /// The numbers that have arrived since the last look, in their order.
    pub fn drain(&self) -> Result<Vec<u32>> {
        Ok(drain(&self.receiver)?
            .into_iter()
            .map(|(number, _)| number)
            .collect())
    }

    fn mark(&mut self) -> Result<()> {
        self.marks += 1;
        self.marker_sender
            .send(&numbered(self.marks, 0, HEADER))
            .context("sending a marker")?;
        let began = Instant::now();
        loop {
            if drain(&self.marker_receiver)?
                .iter()
                .any(|(number, _)| *number == self.marks)
            {
                return Ok(());
            }
            if began.elapsed() > ARRIVES {
                bail!("a datagram of a flow that no rule is for did not arrive within {ARRIVES:?}");
            }
            thread::sleep(Duration::from_micros(200));
        }
    }
}

/// All numbered datagrams that wait at a non-blocking socket: number and sender's port.
pub fn drain(socket: &UdpSocket) -> Result<Vec<(u32, u16)>> {
    let mut found = Vec::new();
    let mut bytes = [0; 2048];
    loop {
        match socket.recv(&mut bytes) {
            Ok(length) if length >= HEADER => found.push((
                u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                u16::from_be_bytes([bytes[4], bytes[5]]),
            )),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(found),
            // An earlier datagram met a closed port: not what is asked here.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context("receiving datagrams"),
        }
    }
}

/// What a sender was told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Sends that returned success.
    pub accepted: u32,
    /// Sends that returned an error, by error.
    pub refused: BTreeMap<String, u32>,
    /// Errors found in the socket's error queue, by error.
    pub queued: BTreeMap<String, u32>,
}

/// Sends `count` datagrams on a connected socket with `IP_RECVERR` set, and returns all that the kernel
/// told the sender about them.
pub fn send_asking_for_errors(from: &Node, to: SocketAddr, count: u32) -> Result<Told> {
    let socket = socket(&from.ns, from.at(0))?;
    socket.connect(to)?;
    setsockopt(&socket, Ipv4RecvErr, &true).context("IP_RECVERR")?;
    let mut told = Told::default();
    let name = |error: &io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0)).to_string();
    for number in 0..count {
        match socket.send(&numbered(number, 0, 64)) {
            Ok(_) => told.accepted += 1,
            Err(error) => *told.refused.entry(name(&error)).or_default() += 1,
        }
    }
    loop {
        let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let got = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut [], Some(&mut space), flags);
        match got {
            Ok(message) => {
                for control in message.cmsgs()? {
                    let text = match control {
                        nix::sys::socket::ControlMessageOwned::Ipv4RecvErr(error, _) => {
                            Errno::from_raw(error.ee_errno.cast_signed()).to_string()
                        }
                        other => format!("{other:?}"),
                    };
                    *told.queued.entry(text).or_default() += 1;
                }
            }
            Err(Errno::EAGAIN) => return Ok(told),
            Err(error) => return Err(error).context("reading the error queue"),
        }
    }
}
