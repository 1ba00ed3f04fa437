//! Frames byte by byte: what a packet socket sends when a test wants VLAN tags, fragments, extension
//! headers or nonsense of its own choosing.

use std::net::IpAddr;

use super::topology::Node;

/// Every frame of ours ends with this and four bytes of its number. The first byte looks like the first
/// one of an IPv4 header without options.
const MAGIC: [u8; 4] = [0x45, 0x4c, 0x41, 0x42];
/// The end of a frame that carries its number.
pub const TOKEN_BYTES: usize = 8;

/// IPv4.
pub const ETH_IPV4: u16 = 0x0800;
/// ARP.
pub const ETH_ARP: u16 = 0x0806;
/// IPv6.
pub const ETH_IPV6: u16 = 0x86dd;
/// VLAN tag (802.1Q).
pub const ETH_VLAN: u16 = 0x8100;
/// Outer VLAN tag (802.1ad).
pub const ETH_QINQ: u16 = 0x88a8;
/// Local experiments (IEEE 802): no protocol of ours.
pub const ETH_EXPERIMENT: u16 = 0x88b5;
/// The second one of these.
pub const ETH_EXPERIMENT_2: u16 = 0x88b6;

/// A TCP flag as in the header's 14th byte.
pub mod flag {
    /// The last of a stream.
    pub const FIN: u8 = 1;
    /// The first.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Push.
    pub const PSH: u8 = 8;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 16;
}

/// What follows the IP header and its extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layer4 {
    /// UDP from port, to port.
    Udp(u16, u16),
    /// TCP from port, to port, flags.
    Tcp(u16, u16, u8),
    /// SCTP from port, to port, chunk type.
    Sctp(u16, u16, u8),
    /// ICMP or ICMPv6, by the version of the addresses: type and identifier.
    Icmp(u8, u16),
    /// Another protocol's number, and no header.
    Other(u8),
}

/// A piece of a fragmented packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// What the pieces of one packet have in common.
    pub id: u32,
    /// Where this one begins, in bytes; a multiple of 8. Other than at 0 there is no layer 4 header.
    pub offset: u16,
    /// Whether others follow.
    pub more: bool,
}

/// An IPv6 extension header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// Hop-by-hop options, padding only.
    HopByHop,
    /// Destination options, padding only, so many bytes (a multiple of 8).
    Destination(u8),
    /// Routing header of type 4 with no segments left and no addresses.
    Routing,
}

/// An IP packet in an Ethernet frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Sender's address.
    pub src: IpAddr,
    /// Receiver's address, of the same version.
    pub dst: IpAddr,
    /// VLAN tags from the outside in: ethertype of the tag, VLAN id.
    pub tags: Vec<(u16, u16)>,
    /// Code point.
    pub dscp: u8,
    /// IPv4 options; a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers.
    pub extensions: Vec<Extension>,
    /// If it is a piece.
    pub fragment: Option<Fragment>,
    /// The rest.
    pub layer4: Layer4,
    /// Length of the whole IP packet in bytes, reached by padding; 0: as short as possible.
    pub length: usize,
}

impl Packet {
    /// A packet without any extras.
    #[must_use]
    pub fn new(src: impl Into<IpAddr>, dst: impl Into<IpAddr>, layer4: Layer4) -> Self {
        Self {
            src: src.into(),
            dst: dst.into(),
            tags: Vec::new(),
            dscp: 0,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            layer4,
            length: 0,
        }
    }

    /// With VLAN tags.
    #[must_use]
    pub fn tagged(mut self, tags: &[(u16, u16)]) -> Self {
        self.tags = tags.to_vec();
        self
    }

    /// With a code point.
    #[must_use]
    pub fn dscp(mut self, dscp: u8) -> Self {
        self.dscp = dscp;
        self
    }

    /// Of this length.
    #[must_use]
    pub fn length(mut self, length: usize) -> Self {
        self.length = length;
        self
    }

    /// As a piece.
    #[must_use]
    pub fn fragment(mut self, id: u32, offset: u16, more: bool) -> Self {
        self.fragment = Some(Fragment { id, offset, more });
        self
    }

    /// With IPv4 options: so many bytes of NOP.
    #[must_use]
    pub fn options(mut self, bytes: usize) -> Self {
        self.options = vec![1; bytes];
        self
    }

    /// With IPv6 extension headers.
    #[must_use]
    pub fn extensions(mut self, extensions: &[Extension]) -> Self {
        self.extensions = extensions.to_vec();
        self
    }

    /// The frame, ending with its number.
    #[must_use]
    pub fn frame(&self, number: u32) -> Vec<u8> {
        let body = self.body(number);
        let (ethertype, packet) = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                (ETH_IPV4, self.v4(src.octets(), dst.octets(), &body))
            }
            (src, dst) => (ETH_IPV6, self.v6(&octets16(src), &octets16(dst), &body)),
        };
        ethernet(&self.tags, ethertype, &packet)
    }

    fn protocol(&self) -> u8 {
        match (&self.layer4, self.src) {
            (Layer4::Udp(..), _) => 17,
            (Layer4::Tcp(..), _) => 6,
            (Layer4::Sctp(..), _) => 132,
            (Layer4::Icmp(..), IpAddr::V4(_)) => 1,
            (Layer4::Icmp(..), IpAddr::V6(_)) => 58,
            (Layer4::Other(number), _) => *number,
        }
    }

    fn headers(&self) -> usize {
        match self.src {
            IpAddr::V4(_) => 20 + self.options.len(),
            IpAddr::V6(_) => {
                40 + self.extension_bytes().len() + if self.fragment.is_some() { 8 } else { 0 }
            }
        }
    }

    /// Layer 4 header and payload. Checksums are those of a packet that nobody will check: zero.
    fn body(&self, number: u32) -> Vec<u8> {
        let mut body = match self.layer4 {
            // A later piece carries no header.
            _ if self.fragment.is_some_and(|piece| piece.offset > 0) => Vec::new(),
            Layer4::Udp(from, to) => {
                [from.to_be_bytes(), to.to_be_bytes(), [0, 0], [0, 0]].concat()
            }
            Layer4::Tcp(from, to, flags) => {
                let mut header = [from.to_be_bytes(), to.to_be_bytes()].concat();
                header.extend([
                    0,
                    0,
                    0,
                    1,
                    0,
                    0,
                    0,
                    0,
                    5 << 4,
                    flags,
                    0xff,
                    0xff,
                    0,
                    0,
                    0,
                    0,
                ]);
                header
            }
            Layer4::Sctp(from, to, chunk) => {
                let mut header = [from.to_be_bytes(), to.to_be_bytes()].concat();
                header.extend([0, 0, 0, 0, 0, 0, 0, 0, chunk, 0, 0, 4]);
                header
            }
            Layer4::Icmp(kind, id) => {
                let id = id.to_be_bytes();
                vec![kind, 0, 0, 0, id[0], id[1], 0, 1]
            }
            Layer4::Other(_) => Vec::new(),
        };
        let padding = self
            .length
            .saturating_sub(self.headers() + body.len() + TOKEN_BYTES);
        body.resize(body.len() + padding, 0);
        // A piece that others follow is a multiple of 8 bytes long.
        if self.fragment.is_some_and(|piece| piece.more) {
            body.resize(body.len().next_multiple_of(8), 0);
        }
        if matches!(self.layer4, Layer4::Udp(..)) && self.fragment.is_none() {
            let length = u16::try_from(body.len() + TOKEN_BYTES).unwrap_or(u16::MAX);
            body[4..6].copy_from_slice(&length.to_be_bytes());
        }
        body.extend(token(number));
        body
    }

    fn v4(&self, src: [u8; 4], dst: [u8; 4], body: &[u8]) -> Vec<u8> {
        let words = 5 + self.options.len() / 4;
        let total = u16::try_from(words * 4 + body.len()).unwrap_or(u16::MAX);
        let (id, place) = self.fragment.map_or((0, 0), |piece| {
            (
                piece.id,
                (piece.offset / 8) | if piece.more { 0x2000 } else { 0 },
            )
        });
        let mut packet = vec![0x40 | u8::try_from(words).unwrap_or(15), self.dscp << 2];
        packet.extend(total.to_be_bytes());
        packet.extend(&id.to_be_bytes()[2..]);
        packet.extend(place.to_be_bytes());
        packet.extend([64, self.protocol(), 0, 0]);
        packet.extend(src);
        packet.extend(dst);
        packet.extend(&self.options);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(body);
        packet
    }

    /// The chain of extension headers without the fragment header, each with its own number.
    fn extension_bytes(&self) -> Vec<u8> {
        self.chain()
            .into_iter()
            .flat_map(|(_, bytes)| bytes)
            .collect()
    }

    fn chain(&self) -> Vec<(u8, Vec<u8>)> {
        self.extensions
            .iter()
            .map(|extension| match extension {
                Extension::HopByHop => (0, vec![0, 0, 1, 4, 0, 0, 0, 0]),
                Extension::Destination(bytes) => {
                    let mut header = vec![0, bytes / 8 - 1, 1, bytes - 4];
                    header.resize(usize::from(*bytes), 0);
                    (60, header)
                }
                Extension::Routing => (43, vec![0, 0, 4, 0, 0, 0, 0, 0]),
            })
            .collect()
    }

    fn v6(&self, src: &[u8; 16], dst: &[u8; 16], body: &[u8]) -> Vec<u8> {
        let mut chain = self.chain();
        if let Some(piece) = self.fragment {
            let place = piece.offset | u16::from(piece.more);
            let mut header = vec![0, 0];
            header.extend(place.to_be_bytes());
            header.extend(piece.id.to_be_bytes());
            chain.push((44, header));
        }
        // Every header names the next one.
        let mut next = self.protocol();
        for (number, header) in chain.iter_mut().rev() {
            header[0] = next;
            next = *number;
        }
        let mut rest: Vec<u8> = chain.into_iter().flat_map(|(_, header)| header).collect();
        rest.extend(body);
        let mut packet = vec![0x60 | self.dscp >> 2, (self.dscp & 3) << 6, 0, 0];
        packet.extend(u16::try_from(rest.len()).unwrap_or(u16::MAX).to_be_bytes());
        packet.extend([next, 64]);
        packet.extend(src);
        packet.extend(dst);
        packet.extend(rest);
        packet
    }
}

/// An ARP request from one node for another's address.
#[must_use]
pub fn arp(from: &Node, to: &Node, number: u32) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(from.mac);
    packet.extend(from.v4.octets());
    packet.extend([0; 6]);
    packet.extend(to.v4.octets());
    packet.extend(token(number));
    ethernet(&[], ETH_ARP, &packet)
}

/// A frame of any ethertype with these bytes and its number at the end.
#[must_use]
pub fn raw(tags: &[(u16, u16)], ethertype: u16, bytes: &[u8], number: u32) -> Vec<u8> {
    let mut packet = bytes.to_vec();
    packet.extend(token(number));
    ethernet(tags, ethertype, &packet)
}

/// The number of a frame of ours.
#[must_use]
pub fn number_of(frame: &[u8]) -> Option<u32> {
    let (magic, number) = frame.last_chunk::<TOKEN_BYTES>()?.split_at(4);
    (magic == MAGIC).then(|| u32::from_be_bytes([number[0], number[1], number[2], number[3]]))
}

fn token(number: u32) -> [u8; TOKEN_BYTES] {
    let mut token = [0; TOKEN_BYTES];
    token[..4].copy_from_slice(&MAGIC);
    token[4..].copy_from_slice(&number.to_be_bytes());
    token
}

/// Addressed to nobody's hardware address: it crosses a veth and the hooks, and the receiving stack
/// answers to none of it.
fn ethernet(tags: &[(u16, u16)], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0x88, 0, 0xff, 0xff, 0xff, 2, 0x88, 0, 0xff, 0xff, 1];
    for (kind, id) in tags {
        frame.extend(kind.to_be_bytes());
        frame.extend(id.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

fn octets16(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::{Extension, Layer4, Packet, checksum, number_of};

    #[test]
    fn a_packet_has_the_length_asked_for() {
        let v4 = Packet::new(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, Layer4::Udp(1, 2));
        assert_eq!(v4.clone().length(100).frame(7).len(), 114);
        assert_eq!(v4.clone().options(8).length(100).frame(7).len(), 114);
        assert_eq!(checksum(&v4.frame(7)[14..34]), 0);
        assert_eq!(number_of(&v4.frame(7)), Some(7));
        let v6 = Packet::new(
            Ipv6Addr::LOCALHOST,
            Ipv6Addr::LOCALHOST,
            Layer4::Tcp(1, 2, 3),
        )
        .extensions(&[Extension::HopByHop, Extension::Destination(16)])
        .length(200);
        assert_eq!(v6.frame(1).len(), 214);
    }
}
