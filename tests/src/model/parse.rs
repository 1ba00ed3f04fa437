//! From bytes to what selectors ask about: a parser over a byte slice that reads one field at a time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use injector::rules::model::{IpVersion, Protocol};

use super::Link;

const MAX_VLAN_TAGS: usize = 4;
const MAX_EXTENSION_HEADERS: usize = 8;

/// The packet cannot be understood: it passes, and is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unparsed;

/// What the transport header says, or what a later fragment takes over from its first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// Protocol as rules name it.
    pub protocol: Protocol,
    /// Source and destination port of TCP, UDP and SCTP.
    pub ports: Option<(u16, u16)>,
    /// What stands for ports in the flow: the ports, or the identifier of an ICMP echo twice, or zeros.
    pub flow_ports: (u16, u16),
    /// Type of an ICMP message, of either family.
    pub icmp_type: Option<u8>,
    /// The 14th byte of a TCP header.
    pub tcp_flags: Option<u8>,
}

impl Transport {
    fn without_ports(protocol: Protocol) -> Self {
        Self {
            protocol,
            ports: None,
            flow_ports: (0, 0),
            icmp_type: None,
            tcp_flags: None,
        }
    }

    fn with_ports(protocol: u8, source: u16, destination: u16) -> Self {
        Self {
            ports: Some((source, destination)),
            flow_ports: (source, destination),
            ..Self::without_ports(Protocol::Ip(protocol))
        }
    }
}

/// What the network header says about fragmentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Identification.
    pub id: u32,
    /// Protocol field of the IPv4 header, 0 for IPv6: what else tells fragmented packets apart.
    pub protocol: u8,
    /// Whether the fragment offset is zero.
    pub first: bool,
    /// Whether more fragments follow.
    pub more: bool,
}

/// One packet, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// IP version; `None` if it is not IP.
    pub version: Option<IpVersion>,
    /// Source and destination.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// The transport header. Of a later fragment: the protocol alone.
    pub transport: Transport,
    /// First byte behind the SCTP common header.
    pub sctp_chunk: Option<u8>,
    /// DSCP, of IP packets.
    pub dscp: Option<u8>,
    /// Fragmentation, if it is a fragment (an IPv6 fragment header makes one, even alone).
    pub fragment: Option<Fragment>,
    /// Bytes before the network header.
    pub link_length: usize,
    /// Bytes from the network header to the transport header.
    pub network_headers: usize,
    /// Bytes of the transport header of TCP and UDP, else 0.
    pub transport_header: usize,
    /// Length of the packet as its IP header says, if it says one.
    pub stated_length: Option<usize>,
}

impl Parsed {
    /// Whether it is an IPv6 packet.
    #[must_use]
    pub fn is_v6(&self) -> bool {
        self.version == Some(IpVersion::V6)
    }
}

fn byte(bytes: &[u8], at: usize) -> Result<u8, Unparsed> {
    bytes.get(at).copied().ok_or(Unparsed)
}

fn half(bytes: &[u8], at: usize) -> Result<u16, Unparsed> {
    Ok(u16::from_be_bytes([byte(bytes, at)?, byte(bytes, at + 1)?]))
}

fn word(bytes: &[u8], at: usize) -> Result<u32, Unparsed> {
    Ok(u32::from_be_bytes([
        byte(bytes, at)?,
        byte(bytes, at + 1)?,
        byte(bytes, at + 2)?,
        byte(bytes, at + 3)?,
    ]))
}

fn v4_address(bytes: &[u8], at: usize) -> Result<IpAddr, Unparsed> {
    Ok(IpAddr::V4(Ipv4Addr::from_bits(word(bytes, at)?)))
}

fn v6_address(bytes: &[u8], at: usize) -> Result<IpAddr, Unparsed> {
    let octets: [u8; 16] = bytes
        .get(at..at + 16)
        .and_then(|slice| slice.try_into().ok())
        .ok_or(Unparsed)?;
    Ok(IpAddr::V6(Ipv6Addr::from(octets)))
}

fn need(bytes: &[u8], at: usize, count: usize) -> Result<(), Unparsed> {
    if bytes.len() >= at + count {
        Ok(())
    } else {
        Err(Unparsed)
    }
}

/// Parses a packet. `protocol` is `skb->protocol`, read only where there is no link header.
///
/// # Errors
/// If something that must be read is not there, or is malformed.
pub fn parse(bytes: &[u8], link: Link, protocol: u16) -> Result<Parsed, Unparsed> {
    let (ethertype, network) = match link {
        Link::Raw => (protocol, 0),
        Link::Ethernet => {
            need(bytes, 0, 14)?;
            let mut ethertype = half(bytes, 12)?;
            let mut at = 14;
            let mut tags = 0;
            while matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
                tags += 1;
                if tags > MAX_VLAN_TAGS {
                    return Err(Unparsed);
                }
                need(bytes, at, 4)?;
                ethertype = half(bytes, at + 2)?;
                at += 4;
            }
            (ethertype, at)
        }
    };
    match ethertype {
        0x0800 => parse_v4(bytes, network),
        0x86dd => parse_v6(bytes, network),
        0x0806 => parse_arp(bytes, network),
        _ => Ok(not_ip(Protocol::OtherEthertype, network)),
    }
}

fn not_ip(protocol: Protocol, network: usize) -> Parsed {
    Parsed {
        version: None,
        addresses: None,
        transport: Transport::without_ports(protocol),
        sctp_chunk: None,
        dscp: None,
        fragment: None,
        link_length: network,
        network_headers: 0,
        transport_header: 0,
        stated_length: None,
    }
}

fn parse_arp(bytes: &[u8], at: usize) -> Result<Parsed, Unparsed> {
    need(bytes, at, 8)?;
    let mut parsed = not_ip(Protocol::Arp, at);
    let hardware_is_ethernet = half(bytes, at)? == 1 && byte(bytes, at + 4)? == 6;
    let protocol_is_v4 = half(bytes, at + 2)? == 0x0800 && byte(bytes, at + 5)? == 4;
    if hardware_is_ethernet && protocol_is_v4 && need(bytes, at, 28).is_ok() {
        parsed.addresses = Some((v4_address(bytes, at + 14)?, v4_address(bytes, at + 24)?));
    }
    Ok(parsed)
}

fn parse_v4(bytes: &[u8], at: usize) -> Result<Parsed, Unparsed> {
    let first = byte(bytes, at)?;
    let header = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || header < 20 {
        return Err(Unparsed);
    }
    need(bytes, at, header)?;
    let total_length = usize::from(half(bytes, at + 2)?);
    let flags_and_offset = half(bytes, at + 6)?;
    let more = flags_and_offset & 0x2000 != 0;
    let offset = flags_and_offset & 0x1fff;
    let protocol = byte(bytes, at + 9)?;
    let fragment = (more || offset != 0).then_some(Fragment {
        id: u32::from(half(bytes, at + 4)?),
        protocol,
        first: offset == 0,
        more,
    });
    let parsed = Parsed {
        version: Some(IpVersion::V4),
        addresses: Some((v4_address(bytes, at + 12)?, v4_address(bytes, at + 16)?)),
        transport: Transport::without_ports(Protocol::Ip(protocol)),
        sctp_chunk: None,
        dscp: Some(byte(bytes, at + 1)? >> 2),
        fragment,
        link_length: at,
        network_headers: header,
        transport_header: 0,
        stated_length: (total_length != 0).then_some(total_length),
    };
    parse_transport(bytes, parsed, protocol)
}

fn parse_v6(bytes: &[u8], at: usize) -> Result<Parsed, Unparsed> {
    need(bytes, at, 40)?;
    let first = word(bytes, at)?;
    if first >> 28 != 6 {
        return Err(Unparsed);
    }
    let payload_length = usize::from(half(bytes, at + 4)?);
    let addresses = (v6_address(bytes, at + 8)?, v6_address(bytes, at + 24)?);

    let mut next = byte(bytes, at + 6)?;
    let mut here = at + 40;
    let mut fragment: Option<Fragment> = None;
    let mut headers = 0;
    while matches!(next, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140) {
        headers += 1;
        if headers > MAX_EXTENSION_HEADERS {
            return Err(Unparsed);
        }
        need(bytes, here, 8)?;
        let following = byte(bytes, here)?;
        let units = usize::from(byte(bytes, here + 1)?);
        let length = match next {
            44 => 8,
            51 => (units + 2) * 4,
            _ => (units + 1) * 8,
        };
        if next == 44 {
            let offset_and_more = half(bytes, here + 2)?;
            // Choice: of several fragment headers the last one that is read counts.
            fragment = Some(Fragment {
                id: word(bytes, here + 4)?,
                protocol: 0,
                first: offset_and_more >> 3 == 0,
                more: offset_and_more & 1 != 0,
            });
        }
        next = following;
        here += length;
        // What follows the header of a later fragment is data, whatever the header calls it.
        if fragment.is_some_and(|fragment| !fragment.first) {
            break;
        }
    }
    let parsed = Parsed {
        version: Some(IpVersion::V6),
        addresses: Some(addresses),
        transport: Transport::without_ports(Protocol::Ip(next)),
        sctp_chunk: None,
        // Version 4 bits, traffic class 8, flow label 20; the DSCP is the upper 6 of the class.
        dscp: Some(((first >> 22) & 0x3f) as u8),
        fragment,
        link_length: at,
        network_headers: here - at,
        transport_header: 0,
        stated_length: (payload_length != 0).then_some(payload_length + 40),
    };
    parse_transport(bytes, parsed, next)
}

fn parse_transport(bytes: &[u8], mut parsed: Parsed, protocol: u8) -> Result<Parsed, Unparsed> {
    if parsed.fragment.is_some_and(|fragment| !fragment.first) {
        return Ok(parsed);
    }
    let at = parsed.link_length + parsed.network_headers;
    match (protocol, parsed.is_v6()) {
        (6, _) => {
            need(bytes, at, 20)?;
            let header = usize::from(byte(bytes, at + 12)? >> 4) * 4;
            if header < 20 {
                return Err(Unparsed);
            }
            parsed.transport = Transport {
                tcp_flags: Some(byte(bytes, at + 13)?),
                ..Transport::with_ports(6, half(bytes, at)?, half(bytes, at + 2)?)
            };
            parsed.transport_header = header;
        }
        (17, _) => {
            need(bytes, at, 8)?;
            parsed.transport = Transport::with_ports(17, half(bytes, at)?, half(bytes, at + 2)?);
            parsed.transport_header = 8;
        }
        (132, _) => {
            need(bytes, at, 12)?;
            parsed.transport = Transport::with_ports(132, half(bytes, at)?, half(bytes, at + 2)?);
            parsed.sctp_chunk = bytes.get(at + 12).copied();
        }
        (1, false) | (58, true) => {
            need(bytes, at, 8)?;
            let kind = byte(bytes, at)?;
            let echo = if protocol == 1 {
                matches!(kind, 0 | 8)
            } else {
                matches!(kind, 128 | 129)
            };
            let discovery = protocol == 58 && (133..=137).contains(&kind);
            let id = half(bytes, at + 4)?;
            parsed.transport = Transport {
                icmp_type: Some(kind),
                flow_ports: if echo { (id, id) } else { (0, 0) },
                ..Transport::without_ports(if discovery {
                    Protocol::Nd
                } else {
                    Protocol::Ip(protocol)
                })
            };
        }
        _ => {}
    }
    Ok(parsed)
}
