//! What arrives at an interface, byte by byte, with its checksums as they are on a wire: the kernel says which of
//! them a device has yet to complete, and where (`PACKET_VNET_HDR`, packet(7)), and that is done here as a device
//! would do it. And what answers say, for tests of what they should say.

use std::{
    io,
    mem::size_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{
    netns::Netns,
    packet_socket::{PACKET_VNET_HDR, last_error, open, set_option},
    wait::wait_until,
};

/// Every protocol, as `socket(2)` takes it (`ETH_P_ALL`).
const ETH_ALL: u16 = 3;
/// `struct virtio_net_hdr` (`include/uapi/linux/virtio_net.h`): flags, GSO type, three lengths, the checksum's
/// start and offset.
const VNET_HEADER: usize = 10;
/// The checksum has to be completed.
const NEEDS_CSUM: u8 = 1;

/// Sees what arrives at one interface, before the ingress hook.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// All bytes with complete checksums, without a tag that is kept beside them.
    pub bytes: Vec<u8>,
    /// That tag.
    pub tag: Option<u16>,
    /// Whether a checksum had to be completed.
    pub partial: bool,
    /// Bytes of the link layer, tags in the frame included.
    pub link: usize,
    /// Whether it does not arrive, but leaves.
    leaves: bool,
}

impl Capture {
    /// Opens one at an interface.
    pub fn open(ns: &Netns, interface: &str) -> Result<Self> {
        let socket = ns.enter(|| {
            let socket = open(interface, ETH_ALL)?;
            let raw = socket.as_raw_fd();
            set_option(raw, libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
            set_option(raw, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
            Ok(socket)
        })?;
        Ok(Self { socket })
    }

    /// All frames that have arrived since the last look.
    pub fn drain(&self) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        while let Some(frame) = self.receive()? {
            if !frame.leaves {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    /// Waits for `count` frames that `wanted` holds for, and returns all such that are there then.
    pub fn wait(&self, count: usize, wanted: impl Fn(&Frame) -> bool) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        wait_until("answers arrive", Duration::from_secs(10), || {
            frames.extend(self.drain()?.into_iter().filter(|frame| wanted(frame)));
            Ok(frames.len() >= count)
        })?;
        Ok(frames)
    }

    /// One frame.
    fn receive(&self) -> Result<Option<Frame>> {
        let mut bytes = vec![0_u8; 1 << 17];
        let mut control = [0_u64; 16];
        // SAFETY: all-zero bytes are valid in both.
        let (mut message, mut from): (libc::msghdr, libc::sockaddr_ll) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let mut part = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>())?;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of::<[u64; 16]>();
        // SAFETY: the message points to buffers that outlive the call, with their sizes.
        let got = unsafe {
            libc::recvmsg(
                self.socket.as_raw_fd(),
                &raw mut message,
                libc::MSG_DONTWAIT,
            )
        };
        if got < 0 {
            return match io::Error::last_os_error().kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                _ => Err(last_error("recvmsg(AF_PACKET)")),
            };
        }
        let mut tag = None;
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
                }
                header = libc::CMSG_NXTHDR(&raw const message, header);
            }
        }
        bytes.truncate(usize::try_from(got)?);
        let header: Vec<u8> = bytes.drain(..VNET_HEADER).collect();
        let number = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
        let partial = header[0] & NEEDS_CSUM != 0;
        if partial {
            let (start, field) = (number(6), number(6) + number(8));
            ensure!(
                field + 2 <= bytes.len(),
                "a checksum beyond the frame: {header:?} {bytes:02x?}"
            );
            let sum = !sum(&bytes[start..]);
            bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let mut link = 14;
        while matches!(bytes.get(link - 2..link), Some([0x81, 0x00] | [0x88, 0xa8])) {
            link += 4;
        }
        Ok(Some(Frame {
            leaves: from.sll_pkttype == libc::PACKET_OUTGOING,
            bytes,
            tag,
            partial,
            link,
        }))
    }
}

/// The ones' complement sum of 16-bit numbers (RFC 1071): 0xffff over what contains its own checksum.
#[must_use]
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

/// An IP packet without options or extension headers, all of whose checksums are right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// Protocol.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Everything behind the network header.
    pub payload: Vec<u8>,
}

impl Ip {
    /// Reads a packet and checks the checksums of IPv4, TCP, ICMP and ICMPv6.
    pub fn read(packet: &[u8]) -> Result<Self> {
        let v4 = packet.first().context("an empty packet")? >> 4 == 4;
        let header = if v4 { 20 } else { 40 };
        ensure!(packet.len() >= header, "a short packet: {packet:02x?}");
        let stated = |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
        let (length, protocol, ttl) = if v4 {
            ensure!(packet[0] == 0x45, "options: {packet:02x?}");
            ensure!(
                sum(&packet[..20]) == 0xffff,
                "header checksum: {packet:02x?}"
            );
            (stated(2), packet[9], packet[8])
        } else {
            (stated(4) + 40, packet[6], packet[7])
        };
        ensure!(
            length <= packet.len(),
            "says {length} of {} bytes: {packet:02x?}",
            packet.len()
        );
        let address = |at: usize| -> Result<IpAddr> {
            Ok(if v4 {
                Ipv4Addr::from(<[u8; 4]>::try_from(&packet[at..at + 4])?).into()
            } else {
                Ipv6Addr::from(<[u8; 16]>::try_from(&packet[at..at + 16])?).into()
            })
        };
        let (source, destination) = if v4 {
            (address(12)?, address(16)?)
        } else {
            (address(8)?, address(24)?)
        };
        let payload = packet[header..length].to_vec();
        let mut summed = payload.clone();
        if protocol != 1 {
            summed.splice(..0, packet[if v4 { 12..20 } else { 8..40 }].iter().copied());
            summed.splice(..0, u32::try_from(payload.len())?.to_be_bytes());
            summed.splice(..0, [0, protocol]);
        }
        if matches!(protocol, 1 | 6 | 58) {
            ensure!(
                sum(&summed) == 0xffff,
                "the checksum of protocol {protocol} is wrong: {packet:02x?}"
            );
        }
        Ok(Self {
            source,
            destination,
            protocol,
            ttl,
            payload,
        })
    }
}

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// A TCP reset.
    Reset {
        /// From port, to port.
        ports: (u16, u16),
        /// Sequence number.
        sequence: u32,
        /// Acknowledgement number.
        acknowledgement: u32,
        /// TCP flags.
        flags: u8,
    },
    /// An ICMP error.
    Error {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The original packet, from its IP header on.
        about: Vec<u8>,
    },
}

impl Said {
    /// Reads a reset or an error; `None` if the packet is neither.
    pub fn read(ip: &Ip) -> Result<Option<Self>> {
        let bytes = &ip.payload;
        let half = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) << 16 | u32::from(half(at + 2));
        Ok(match ip.protocol {
            6 if bytes.len() >= 20 && bytes[13] & 4 != 0 => {
                ensure!(
                    bytes.len() == 20 && bytes[12] == 0x50,
                    "a reset with more than a header: {bytes:02x?}"
                );
                Some(Self::Reset {
                    ports: (half(0), half(2)),
                    sequence: word(4),
                    acknowledgement: word(8),
                    flags: bytes[13],
                })
            }
            1 | 58 if bytes.len() > 8 && matches!((ip.protocol, bytes[0]), (1, 3) | (58, 1)) => {
                ensure!(bytes[4..8] == [0; 4], "unused bytes: {bytes:02x?}");
                Some(Self::Error {
                    kind: bytes[0],
                    code: bytes[1],
                    about: bytes[8..].to_vec(),
                })
            }
            _ => None,
        })
    }
}
