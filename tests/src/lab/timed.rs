//! Numbered datagrams of which the kernel says when each arrived.

use std::{
    io::IoSliceMut,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt,
            sockopt::{IpRecvTos, Ipv4Tos, Ipv6RecvTClass, Ipv6TClass, UdpGsoSegment},
        },
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime},
};

use super::{
    packet_socket::on_one_cpu,
    stamping::stamp_arrivals,
    topology::Node,
    udp::{drain, numbered, socket},
};

/// A datagram that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Its number.
    pub number: u32,
    /// When, in nanoseconds of the clock of [`Arrived`].
    pub at_ns: i64,
}

/// A datagram that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// Its number.
    pub number: u32,
    /// When the kernel saw it, in nanoseconds of the time of day.
    pub at_ns: i64,
    /// Its DS field or traffic class; the lower two bits are the ECN field.
    pub class: u8,
}

/// A one-way path between two nodes.
#[derive(Debug)]
pub struct Timed {
    sender: UdpSocket,
    receiver: UdpSocket,
    /// Addresses and ports of its two ends.
    pub ends: (SocketAddr, SocketAddr),
}

impl Timed {
    /// Over IPv4.
    pub fn v4(from: &Node, from_port: u16, to: &Node, to_port: u16) -> Result<Self> {
        Self::between(from, from.at(from_port), to, to.at(to_port))
    }

    /// Over IPv6.
    pub fn v6(from: &Node, from_port: u16, to: &Node, to_port: u16) -> Result<Self> {
        Self::between(from, from.at6(from_port), to, to.at6(to_port))
    }

    fn between(from: &Node, source: SocketAddr, to: &Node, target: SocketAddr) -> Result<Self> {
        let receiver = socket(&to.ns, target)?;
        receiver.set_nonblocking(true)?;
        stamp_arrivals(&receiver, &to.ns)?;
        if target.is_ipv4() {
            setsockopt(&receiver, IpRecvTos, &true).context("IP_RECVTOS")?;
        } else {
            setsockopt(&receiver, Ipv6RecvTClass, &true).context("IPV6_RECVTCLASS")?;
        }
        let sender = socket(&from.ns, source)?;
        sender.connect(target)?;
        Ok(Self {
            sender,
            receiver,
            ends: (source, target),
        })
    }

    /// The socket that sends, for its options.
    #[must_use]
    pub fn sender(&self) -> &UdpSocket {
        &self.sender
    }

    /// Gives what is sent from now on this DS field or traffic class.
    pub fn set_class(&self, class: u8) -> Result<()> {
        if self.ends.0.is_ipv4() {
            setsockopt(&self.sender, Ipv4Tos, &class.into()).context("IP_TOS")
        } else {
            setsockopt(&self.sender, Ipv6TClass, &class.into()).context("IPV6_TCLASS")
        }
    }

    /// Sends datagrams of these numbers, one after the other, each so long after the one before.
    pub fn send(&self, numbers: impl IntoIterator<Item = u32>, gap: Duration) -> Result<Vec<Sent>> {
        self.send_sized(numbers, 64, gap)
    }

    /// The same with datagrams of so many bytes.
    pub fn send_sized(
        &self,
        numbers: impl IntoIterator<Item = u32>,
        size: usize,
        gap: Duration,
    ) -> Result<Vec<Sent>> {
        on_one_cpu(|| {
            let mut sent = Vec::new();
            let began = Instant::now();
            for (index, number) in (0_u32..).zip(numbers) {
                while began.elapsed() < gap * index {
                    let left = (gap * index).saturating_sub(began.elapsed());
                    if left > Duration::from_millis(1) {
                        thread::sleep(left.saturating_sub(Duration::from_micros(500)));
                    }
                }
                sent.push(Sent {
                    number,
                    at_ns: now_ns()?,
                });
                self.sender
                    .send(&numbered(number, 0, size))
                    .with_context(|| format!("sending datagram {number}"))?;
            }
            Ok(sent)
        })
    }

    /// Sends datagrams of these numbers as super-packets of up to `segments` of `size` bytes.
    pub fn send_super_packets(
        &self,
        numbers: impl IntoIterator<Item = u32>,
        segments: usize,
        size: u16,
    ) -> Result<()> {
        let numbers: Vec<u32> = numbers.into_iter().collect();
        setsockopt(&self.sender, UdpGsoSegment, &i32::from(size)).context("UDP_SEGMENT")?;
        on_one_cpu(|| {
            for group in numbers.chunks(segments) {
                let mut bytes = vec![0; group.len() * usize::from(size)];
                for (place, number) in bytes.chunks_mut(size.into()).zip(group) {
                    place[..4].copy_from_slice(&number.to_be_bytes());
                }
                self.sender.send(&bytes).context("sending a super-packet")?;
            }
            Ok(())
        })?;
        setsockopt(&self.sender, UdpGsoSegment, &0).context("UDP_SEGMENT")
    }

    /// Sends datagrams of `size` bytes for so long, as many as go; returns how many the kernel took.
    pub fn flood(&self, lasting: Duration, size: usize) -> Result<u32> {
        let began = Instant::now();
        let bytes = numbered(0, 0, size);
        let mut sent = 0;
        while began.elapsed() < lasting {
            self.sender.send(&bytes).context("flooding")?;
            sent += 1;
        }
        Ok(sent)
    }

    /// Throws away what has arrived.
    pub fn drain(&self) -> Result<()> {
        drain(&self.receiver).map(|_| ())
    }

    /// What arrives, in its order, until there are `count` and then nothing more for `quiet`. Fails if there are
    /// fewer after `within`.
    pub fn receive(&self, count: usize, quiet: Duration, within: Duration) -> Result<Vec<Arrived>> {
        let began = Instant::now();
        let mut arrived = Vec::new();
        let mut last = Instant::now();
        loop {
            match self.one()? {
                Some(one) => {
                    arrived.push(one);
                    last = Instant::now();
                }
                None if arrived.len() >= count && last.elapsed() >= quiet => return Ok(arrived),
                None if began.elapsed() > within => {
                    bail!(
                        "{} datagrams of {count} arrived within {within:?}: {:?}",
                        arrived.len(),
                        arrived.iter().map(|one| one.number).collect::<Vec<_>>()
                    );
                }
                None => thread::sleep(Duration::from_micros(500)),
            }
        }
    }

    fn one(&self) -> Result<Option<Arrived>> {
        let mut bytes = [0; 4];
        let stamp = stamped(&self.receiver, &mut bytes)?;
        Ok(stamp.map(|Stamp { at_ns, class }| Arrived {
            number: u32::from_be_bytes(bytes),
            at_ns,
            class,
        }))
    }
}

/// What the kernel says of a datagram that arrived.
pub(super) struct Stamp {
    /// When, in nanoseconds of the time of day.
    pub(super) at_ns: i64,
    /// Its DS field or traffic class; 0 where the socket does not ask for it.
    pub(super) class: u8,
}

/// Takes a datagram from a socket with `SO_TIMESTAMPNS`, if one is waiting: its beginning, and its stamp.
pub(super) fn stamped(socket: &UdpSocket, bytes: &mut [u8]) -> Result<Option<Stamp>> {
    let mut space = nix::cmsg_space!(TimeSpec, i32);
    let mut slices = [IoSliceMut::new(bytes)];
    let message = match recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_DONTWAIT,
    ) {
        Ok(message) => message,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(error) => return Err(error).context("receiving datagrams"),
    };
    let mut at_ns = None;
    let mut class = 0;
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::ScmTimestampns(time) => {
                at_ns = Some(nanoseconds(time.tv_sec(), time.tv_nsec()));
            }
            ControlMessageOwned::Ipv4Tos(tos) => class = tos,
            ControlMessageOwned::Ipv6TClass(tos) => class = u8::try_from(tos)?,
            _ => {}
        }
    }
    let at_ns = at_ns.context("a datagram came without its time of arrival")?;
    Ok(Some(Stamp { at_ns, class }))
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds * 1_000_000_000 + nanoseconds
}

/// The time of day in nanoseconds.
pub fn now_ns() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).context("clock_gettime")?;
    Ok(nanoseconds(now.tv_sec(), now.tv_nsec()))
}

/// How long each of the datagrams was under way, in milliseconds, in the order of arrival.
#[must_use]
pub fn delays(sent: &[Sent], arrived: &[Arrived]) -> Vec<f64> {
    arrived
        .iter()
        .filter_map(|one| {
            let sent = sent.iter().find(|sent| sent.number == one.number)?;
            Some(milliseconds(one.at_ns - sent.at_ns))
        })
        .collect()
}

/// Nanoseconds in milliseconds.
#[expect(
    clippy::cast_precision_loss,
    reason = "differences of times in a test are far below 2^52 ns"
)]
#[must_use]
pub fn milliseconds(nanoseconds: i64) -> f64 {
    nanoseconds as f64 / 1e6
}

/// The middle one of some values.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
