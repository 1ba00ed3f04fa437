//! Frames put together from their parts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP flags, as in the 14th byte of the header.
pub mod flag {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// PSH.
    pub const PSH: u8 = 0x08;
    /// ACK.
    pub const ACK: u8 = 0x10;
    /// URG.
    pub const URG: u8 = 0x20;
    /// ECE.
    pub const ECE: u8 = 0x40;
    /// CWR.
    pub const CWR: u8 = 0x80;
}

/// A frame: link header, tags, network packet, padding.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Begins with an Ethernet header.
    pub ethernet: bool,
    /// Ethertypes of the VLAN tags, outermost first.
    pub tags: Vec<u16>,
    /// The network packet.
    pub network: Network,
    /// Bytes of padding behind the network packet.
    pub padding: usize,
}

/// A network packet.
#[derive(Debug, Clone)]
pub enum Network {
    /// IPv4.
    V4 {
        /// Source.
        source: Ipv4Addr,
        /// Destination.
        destination: Ipv4Addr,
        /// DSCP and ECN.
        tos: u8,
        /// Options, in words of four bytes; at most ten.
        options: usize,
        /// Identification.
        id: u16,
        /// DF, MF and the fragment offset.
        fragment: u16,
        /// Total length if not the true one.
        total_length: Option<u16>,
        /// What is in it.
        transport: Transport,
    },
    /// IPv6.
    V6 {
        /// Source.
        source: Ipv6Addr,
        /// Destination.
        destination: Ipv6Addr,
        /// Traffic class.
        class: u8,
        /// Extension headers.
        extensions: Vec<Extension>,
        /// Payload length if not the true one.
        payload_length: Option<u16>,
        /// What is in it.
        transport: Transport,
    },
    /// ARP.
    Arp {
        /// Hardware type, protocol type, hardware length, protocol length.
        kind: (u16, u16, u8, u8),
        /// Sender's protocol address.
        sender: Ipv4Addr,
        /// Target's protocol address.
        target: Ipv4Addr,
    },
    /// Anything else.
    Other {
        /// Ethertype, or the length of an 802.3 frame.
        ethertype: u16,
        /// Bytes.
        length: usize,
    },
}

/// An IPv6 extension header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// One whose length counts units of eight bytes behind the first eight.
    Long {
        /// Its number: 0, 43, 60, 135, 139, 140.
        number: u8,
        /// Units behind the first.
        units: u8,
    },
    /// AH, whose length counts units of four bytes.
    Authentication {
        /// Units behind the first two.
        units: u8,
    },
    /// A fragment header.
    Fragment {
        /// Offset in units of eight bytes.
        offset: u16,
        /// More fragments follow.
        more: bool,
        /// Identification.
        id: u32,
    },
}

impl Extension {
    fn number(self) -> u8 {
        match self {
            Self::Long { number, .. } => number,
            Self::Authentication { .. } => 51,
            Self::Fragment { .. } => 44,
        }
    }

    fn bytes(self, next: u8) -> Vec<u8> {
        match self {
            Self::Long { units, .. } => {
                let mut bytes = vec![0; (usize::from(units) + 1) * 8];
                bytes[0] = next;
                bytes[1] = units;
                bytes
            }
            Self::Authentication { units } => {
                let mut bytes = vec![0; ((usize::from(units) + 2) * 4).max(8)];
                bytes[0] = next;
                bytes[1] = units;
                bytes
            }
            Self::Fragment { offset, more, id } => {
                let mut bytes = vec![next, 0];
                bytes.extend_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
                bytes.extend_from_slice(&id.to_be_bytes());
                bytes
            }
        }
    }
}

/// What is behind the network headers.
#[derive(Debug, Clone)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Flags.
        flags: u8,
        /// Options, in words of four bytes; at most ten.
        options: usize,
        /// Bytes of payload.
        payload: usize,
    },
    /// UDP.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Bytes of payload.
        payload: usize,
    },
    /// SCTP.
    Sctp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Type of the first chunk, if there is one.
        chunk: Option<u8>,
        /// Bytes of payload.
        payload: usize,
    },
    /// ICMP of the family of the network header.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Identifier.
        id: u16,
        /// Bytes of payload.
        payload: usize,
    },
    /// Bytes under a protocol number: other protocols and later fragments.
    Plain {
        /// Protocol number.
        number: u8,
        /// Bytes.
        payload: usize,
    },
}

impl Transport {
    /// The protocol number in the header before.
    #[must_use]
    pub fn number(&self, v6: bool) -> u8 {
        match self {
            Self::Tcp { .. } => 6,
            Self::Udp { .. } => 17,
            Self::Sctp { .. } => 132,
            Self::Icmp { .. } if v6 => 58,
            Self::Icmp { .. } => 1,
            Self::Plain { number, .. } => *number,
        }
    }

    /// Bytes of payload, to be changed.
    pub fn payload_mut(&mut self) -> &mut usize {
        match self {
            Self::Tcp { payload, .. }
            | Self::Udp { payload, .. }
            | Self::Sctp { payload, .. }
            | Self::Icmp { payload, .. }
            | Self::Plain { payload, .. } => payload,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let ports = |bytes: &mut Vec<u8>, source: u16, destination: u16| {
            bytes.extend_from_slice(&source.to_be_bytes());
            bytes.extend_from_slice(&destination.to_be_bytes());
        };
        let payload = match *self {
            Self::Tcp {
                source,
                destination,
                flags,
                options,
                payload,
            } => {
                ports(&mut bytes, source, destination);
                bytes.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1]);
                let words = u8::try_from(5 + options.min(10)).unwrap_or(15);
                bytes.extend_from_slice(&[words << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
                bytes.resize(usize::from(words) * 4, 1);
                payload
            }
            Self::Udp {
                source,
                destination,
                payload,
            } => {
                ports(&mut bytes, source, destination);
                let length = u16::try_from(payload + 8).unwrap_or(0);
                bytes.extend_from_slice(&length.to_be_bytes());
                bytes.extend_from_slice(&[0, 0]);
                payload
            }
            Self::Sctp {
                source,
                destination,
                chunk,
                payload,
            } => {
                ports(&mut bytes, source, destination);
                bytes.extend_from_slice(&[0; 8]);
                bytes.extend(chunk.map(|chunk| [chunk, 0, 0, 4]).into_iter().flatten());
                payload
            }
            Self::Icmp {
                kind,
                code,
                id,
                payload,
            } => {
                bytes.extend_from_slice(&[kind, code, 0, 0]);
                bytes.extend_from_slice(&id.to_be_bytes());
                bytes.extend_from_slice(&[0, 1]);
                payload
            }
            Self::Plain { payload, .. } => payload,
        };
        bytes.extend(filler().take(payload));
        bytes
    }
}

/// Bytes that differ from their neighbours, so that a read at a wrong offset reads something else.
fn filler() -> impl Iterator<Item = u8> {
    std::iter::successors(Some(11_u8), |byte| Some(byte.wrapping_add(37)))
}

/// The Internet checksum (RFC 1071) of a header whose checksum field is zero.
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

impl Network {
    /// Ethertype that announces this packet.
    #[must_use]
    pub fn ethertype(&self) -> u16 {
        match self {
            Self::V4 { .. } => 0x0800,
            Self::V6 { .. } => 0x86dd,
            Self::Arp { .. } => 0x0806,
            Self::Other { ethertype, .. } => *ethertype,
        }
    }

    /// What is behind the network headers, of IP packets.
    pub fn transport_mut(&mut self) -> Option<&mut Transport> {
        match self {
            Self::V4 { transport, .. } | Self::V6 { transport, .. } => Some(transport),
            Self::Arp { .. } | Self::Other { .. } => None,
        }
    }

    /// Between two addresses of one family; `None` if they are not.
    #[must_use]
    pub fn ip(source: IpAddr, destination: IpAddr, transport: Transport) -> Option<Self> {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Some(Self::V4 {
                source,
                destination,
                tos: 0,
                options: 0,
                id: 1,
                fragment: 0,
                total_length: None,
                transport,
            }),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Some(Self::V6 {
                source,
                destination,
                class: 0,
                extensions: Vec::new(),
                payload_length: None,
                transport,
            }),
            _ => None,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::V4 {
                source,
                destination,
                tos,
                options,
                id,
                fragment,
                total_length,
                transport,
            } => {
                let words = 5 + (*options).min(10);
                let body = transport.bytes();
                let true_length = u16::try_from(words * 4 + body.len()).unwrap_or(0);
                let mut bytes = vec![0x40 | u8::try_from(words).unwrap_or(15), *tos];
                bytes.extend_from_slice(&total_length.unwrap_or(true_length).to_be_bytes());
                bytes.extend_from_slice(&id.to_be_bytes());
                bytes.extend_from_slice(&fragment.to_be_bytes());
                bytes.extend_from_slice(&[64, transport.number(false), 0, 0]);
                bytes.extend_from_slice(&source.octets());
                bytes.extend_from_slice(&destination.octets());
                bytes.resize(words * 4, 1);
                let sum = checksum(&bytes);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                bytes.extend_from_slice(&body);
                bytes
            }
            Self::V6 {
                source,
                destination,
                class,
                extensions,
                payload_length,
                transport,
            } => {
                let mut body = Vec::new();
                for (index, extension) in extensions.iter().enumerate() {
                    let next = extensions
                        .get(index + 1)
                        .map_or(transport.number(true), |following| following.number());
                    body.extend_from_slice(&extension.bytes(next));
                }
                body.extend_from_slice(&transport.bytes());
                let next = extensions
                    .first()
                    .map_or(transport.number(true), |first| first.number());
                let true_length = u16::try_from(body.len()).unwrap_or(0);
                let mut bytes = vec![0x60 | class >> 4, class << 4, 0x12, 0x34];
                bytes.extend_from_slice(&payload_length.unwrap_or(true_length).to_be_bytes());
                bytes.extend_from_slice(&[next, 64]);
                bytes.extend_from_slice(&source.octets());
                bytes.extend_from_slice(&destination.octets());
                bytes.extend_from_slice(&body);
                bytes
            }
            Self::Arp {
                kind,
                sender,
                target,
            } => {
                let mut bytes = Vec::new();
                bytes.extend_from_slice(&kind.0.to_be_bytes());
                bytes.extend_from_slice(&kind.1.to_be_bytes());
                bytes.extend_from_slice(&[kind.2, kind.3, 0, 1]);
                bytes.extend_from_slice(&[2, 0, 0, 0, 0, 1]);
                bytes.extend_from_slice(&sender.octets());
                bytes.extend_from_slice(&[0; 6]);
                bytes.extend_from_slice(&target.octets());
                bytes
            }
            Self::Other { length, .. } => filler().take(*length).collect(),
        }
    }
}

impl Frame {
    /// An Ethernet frame without tags and padding.
    #[must_use]
    pub fn ethernet(network: Network) -> Self {
        Self {
            ethernet: true,
            tags: Vec::new(),
            network,
            padding: 0,
        }
    }

    /// The frame's bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.ethernet {
            bytes.extend_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
            for (tag, id) in self.tags.iter().zip(100_u16..) {
                bytes.extend_from_slice(&tag.to_be_bytes());
                bytes.extend_from_slice(&id.to_be_bytes());
            }
            bytes.extend_from_slice(&self.network.ethertype().to_be_bytes());
        }
        bytes.extend_from_slice(&self.network.bytes());
        bytes.resize(bytes.len() + self.padding, 0);
        bytes
    }
}
