//! Packet sockets: sending any bytes through an interface, and seeing what arrives there *behind* the
//! ingress hook.
//!
//! A socket for all protocols sees a packet before the hook does, so the receiver opens one socket per
//! ethertype, which the kernel serves after it (`__netif_receive_skb_core`, net/core/dev.c).

use std::{
    collections::BTreeSet,
    io,
    mem::size_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::net::if_::if_nametoindex;

use super::{
    frame::{
        self, ETH_ARP, ETH_EXPERIMENT, ETH_EXPERIMENT_2, ETH_IPV4, ETH_IPV6, ETH_QINQ, ETH_VLAN,
    },
    netns::Netns,
    stamping::stamp_arrivals,
};

/// Every protocol, as `socket(2)` takes it (`ETH_P_ALL`).
const ETH_ALL: u16 = 3;
/// Frames are preceded by a `struct virtio_net_hdr` (`include/uapi/linux/if_packet.h`).
pub(super) const PACKET_VNET_HDR: libc::c_int = 15;
/// Room for everything that one test sends before it looks.
pub(super) const BUFFER: libc::c_int = 64 << 20;

/// Sends frames through one interface.
#[derive(Debug)]
pub struct Sender {
    socket: OwnedFd,
}

/// Receives frames of the ethertypes that the lab uses at one interface, after the ingress hook.
#[derive(Debug)]
pub struct Receiver {
    sockets: Vec<OwnedFd>,
}

/// Sees whole frames at an interface, in the order in which they arrive there.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
}

/// A frame as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its bytes, without a tag that is kept beside it.
    pub bytes: Vec<u8>,
    /// Whether the kernel takes its checksum for verified (`CHECKSUM_UNNECESSARY`).
    pub verified: bool,
    /// When the kernel saw it, in nanoseconds of the time of day, if that was asked for.
    pub at_ns: Option<i64>,
    tag: Option<u16>,
}

/// A frame that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Its number.
    pub number: u32,
    /// The VLAN id of a tag that is kept beside the packet (an accelerated one).
    pub tag: Option<u16>,
    /// Length of the frame without that tag.
    pub length: usize,
}

pub(super) fn last_error(what: &str) -> anyhow::Error {
    anyhow::Error::from(io::Error::last_os_error()).context(what.to_owned())
}

fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0)
}

/// Sets an option whose value is a number.
pub(super) fn set_option(
    socket: RawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: i32,
) -> Result<()> {
    // SAFETY: `value` outlives the call and its size is passed.
    let result = unsafe {
        libc::setsockopt(
            socket,
            level,
            name,
            (&raw const value).cast(),
            length_of::<i32>(),
        )
    };
    if result < 0 {
        return Err(last_error(&format!("setsockopt {level}/{name}")));
    }
    Ok(())
}

/// A packet socket of this thread's namespace for one ethertype at one interface.
pub(super) fn open(interface: &str, ethertype: u16) -> Result<OwnedFd> {
    let index = if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
    let protocol = ethertype.to_be();
    // SAFETY: plain system calls; the descriptor is owned from here on.
    let socket = unsafe {
        let raw = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(protocol),
        );
        if raw < 0 {
            return Err(last_error("socket(AF_PACKET)"));
        }
        OwnedFd::from_raw_fd(raw)
    };
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET)?;
    address.sll_protocol = protocol;
    address.sll_ifindex = i32::try_from(index)?;
    // SAFETY: the address outlives the call and its size is passed.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            length_of::<libc::sockaddr_ll>(),
        )
    };
    if bound < 0 {
        return Err(last_error("bind(AF_PACKET)"));
    }
    Ok(socket)
}

impl Sender {
    /// Opens one for `eth0` of a namespace.
    pub fn open(ns: &Netns) -> Result<Self> {
        Self::open_on(ns, "eth0")
    }

    /// Opens one for an interface of a namespace.
    pub fn open_on(ns: &Netns, interface: &str) -> Result<Self> {
        // Protocol 0: it receives nothing.
        let socket = ns.enter(|| open(interface, 0))?;
        Ok(Self { socket })
    }

    /// Sets the firewall mark of what is sent from now on.
    pub fn mark(&self, mark: u32) -> Result<()> {
        set_option(
            self.socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MARK,
            mark.cast_signed(),
        )
    }

    /// Sends one frame. A frame that the egress hook drops silently counts as sent.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the frame outlives the call and its length is passed.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
            )
        };
        if usize::try_from(sent) == Ok(frame.len()) {
            Ok(())
        } else {
            Err(last_error(&format!(
                "sending a frame of {} bytes",
                frame.len()
            )))
        }
    }

    /// Sends a TCP packet over IPv4, without options of either, as it comes from a virtual machine: a super-packet of
    /// segments of `size` bytes whose number the kernel has not counted (`virtio_net_hdr_to_skb`,
    /// `include/linux/virtio_net.h`).
    pub fn send_uncounted(&self, frame: &[u8], size: u16) -> Result<()> {
        const NEEDS_CHECKSUM: u8 = 1;
        const GSO_TCPV4: u8 = 1;
        const HEADERS: u16 = 14 + 20 + 20;
        const TRANSPORT: u16 = 14 + 20;
        const CHECKSUM: u16 = 16;
        let socket = self.socket.as_raw_fd();
        let mut bytes = vec![NEEDS_CHECKSUM, GSO_TCPV4];
        for field in [HEADERS, size, TRANSPORT, CHECKSUM] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(frame);
        set_option(socket, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        let sent = self.send(&bytes);
        set_option(socket, libc::SOL_PACKET, PACKET_VNET_HDR, 0)?;
        sent
    }
}

impl Receiver {
    /// Opens one for `eth0` of a namespace.
    pub fn open(ns: &Netns) -> Result<Self> {
        Self::open_on(ns, "eth0")
    }

    /// Opens one for an interface of a namespace.
    pub fn open_on(ns: &Netns, interface: &str) -> Result<Self> {
        Self::of_protocols(
            ns,
            interface,
            &[
                ETH_IPV4,
                ETH_IPV6,
                ETH_ARP,
                ETH_VLAN,
                ETH_QINQ,
                ETH_EXPERIMENT,
                ETH_EXPERIMENT_2,
            ],
        )
    }

    /// Opens one that sees everything *before* the ingress hook, with its tag beside it: the kernel
    /// takes a tag that no VLAN device wants off before it looks for a protocol's receiver.
    pub fn tap(ns: &Netns) -> Result<Self> {
        Self::of_protocols(ns, "eth0", &[ETH_ALL])
    }

    fn of_protocols(ns: &Netns, interface: &str, ethertypes: &[u16]) -> Result<Self> {
        let sockets = ns.enter(|| {
            ethertypes
                .iter()
                .map(|&ethertype| {
                    let socket = open(interface, ethertype)?;
                    let raw = socket.as_raw_fd();
                    set_option(raw, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
                    set_option(raw, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
                    Ok(socket)
                })
                .collect::<Result<Vec<_>>>()
        })?;
        Ok(Self { sockets })
    }

    /// All frames of ours that are waiting.
    pub fn drain(&self) -> Result<Vec<Arrival>> {
        let mut arrivals = Vec::new();
        for socket in &self.sockets {
            loop {
                match receive(socket.as_raw_fd())? {
                    Received::Nothing => break,
                    Received::Foreign => {}
                    Received::Ours(arrival) => arrivals.push(arrival),
                }
            }
        }
        Ok(arrivals)
    }

    /// All frames of ours up to the one numbered `marker`, which was sent last and from the same CPU:
    /// what has not arrived by then never will.
    pub fn until(&self, marker: u32, within: Duration) -> Result<Vec<Arrival>> {
        let began = Instant::now();
        let mut arrivals = Vec::new();
        loop {
            arrivals.extend(self.drain()?);
            if let Some(place) = arrivals.iter().position(|one| one.number == marker) {
                arrivals.remove(place);
                // The marker may have come into its socket while the others had been looked at already.
                arrivals.extend(self.drain()?);
                return Ok(arrivals);
            }
            if began.elapsed() > within {
                bail!(
                    "the marker {marker} did not arrive within {within:?}; what did: {:?}",
                    numbers(&arrivals)
                );
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The numbers of what arrived.
#[must_use]
pub fn numbers(arrivals: &[Arrival]) -> BTreeSet<u32> {
    arrivals.iter().map(|arrival| arrival.number).collect()
}

impl Capture {
    /// Opens one for frames of an ethertype at `eth0` of a namespace, as they are after the ingress hook.
    pub fn open(ns: &Netns, ethertype: u16) -> Result<Self> {
        let socket = ns.enter(|| {
            let socket = open("eth0", ethertype)?;
            let raw = socket.as_raw_fd();
            set_option(raw, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
            set_option(raw, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
            Ok(socket)
        })?;
        Ok(Self { socket })
    }

    /// The same, and the kernel says of each frame when it arrived.
    pub fn open_stamped(ns: &Netns, ethertype: u16) -> Result<Self> {
        let capture = Self::open(ns, ethertype)?;
        stamp_arrivals(&capture.socket, ns)?;
        Ok(capture)
    }

    /// Opens one that sees everything *before* the ingress hook.
    pub fn tap(ns: &Netns) -> Result<Self> {
        Self::open(ns, ETH_ALL)
    }

    /// The frames to a hardware address, until there are `count` and then nothing more for `quiet`. Fails if there
    /// are fewer after `within`.
    pub fn frames_to(
        &self,
        mac: [u8; 6],
        count: usize,
        quiet: Duration,
        within: Duration,
    ) -> Result<Vec<Frame>> {
        let began = Instant::now();
        let mut last = began;
        let mut frames = Vec::new();
        loop {
            if let Some(frame) = receive_frame(self.socket.as_raw_fd())? {
                if frame.bytes.starts_with(&mac) {
                    frames.push(frame);
                    last = Instant::now();
                }
            } else if frames.len() >= count && last.elapsed() >= quiet {
                return Ok(frames);
            } else if began.elapsed() > within {
                bail!(
                    "{} frames of {count} arrived within {within:?}",
                    frames.len()
                );
            } else {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// What a look at a socket found.
enum Received {
    /// No frame is waiting.
    Nothing,
    /// A frame that is none of ours.
    Foreign,
    /// One of ours.
    Ours(Arrival),
}

/// Takes one frame if one is waiting.
fn receive(socket: RawFd) -> Result<Received> {
    let Some(frame) = receive_frame(socket)? else {
        return Ok(Received::Nothing);
    };
    let Some(number) = frame::number_of(&frame.bytes) else {
        return Ok(Received::Foreign);
    };
    Ok(Received::Ours(Arrival {
        number,
        tag: frame.tag,
        length: frame.bytes.len(),
    }))
}

fn receive_frame(socket: RawFd) -> Result<Option<Frame>> {
    // The lab's MTU is at most 9000.
    let mut bytes = [0_u8; 16_384];
    let mut control = [0_u64; 16];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<[u64; 16]>();
    // SAFETY: the message points to buffers that outlive the call, with their sizes.
    let got = unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_DONTWAIT) };
    if got < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock => Ok(None),
            _ => Err(error).context("recvmsg(AF_PACKET)"),
        };
    }
    let length = usize::try_from(got)?;
    let mut tag = None;
    let mut verified = false;
    let mut at_ns = None;
    // SAFETY: the kernel filled the control buffer; the macros walk it within msg_controllen.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_PACKET
                && (*header).cmsg_type == libc::PACKET_AUXDATA
            {
                let aux = libc::CMSG_DATA(header)
                    .cast::<libc::tpacket_auxdata>()
                    .read_unaligned();
                if aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                    tag = Some(aux.tp_vlan_tci & 0xfff);
                }
                verified = aux.tp_status & libc::TP_STATUS_CSUM_VALID != 0;
            }
            if (*header).cmsg_level == libc::SOL_SOCKET
                && (*header).cmsg_type == libc::SCM_TIMESTAMPNS
            {
                let time = libc::CMSG_DATA(header)
                    .cast::<libc::timespec>()
                    .read_unaligned();
                at_ns = Some(time.tv_sec * 1_000_000_000 + time.tv_nsec);
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(Some(Frame {
        bytes: bytes[..length].to_vec(),
        verified,
        at_ns,
        tag,
    }))
}

/// Runs `work` with this thread kept on the CPU that it is on, so that packets which it sends over a
/// veth arrive in the order in which they were sent (a veth hands over to the sending CPU's backlog).
pub fn on_one_cpu<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
    use nix::unistd::Pid;
    let this_thread = Pid::from_raw(0);
    let before = sched_getaffinity(this_thread).context("sched_getaffinity")?;
    let mut one = CpuSet::new();
    one.set(sched_getcpu().context("getcpu")?)?;
    sched_setaffinity(this_thread, &one).context("sched_setaffinity")?;
    let result = work();
    sched_setaffinity(this_thread, &before).context("sched_setaffinity")?;
    result
}
