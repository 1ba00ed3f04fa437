//! Protocols by name or number (IANA 'Assigned Internet Protocol Numbers'), and the classes that are
//! no IP protocol: `arp`, `nd`, `other`.

use super::number;
use crate::rules::{error::Problem, model::Protocol};

/// Names that are written; numbers without one are written as numbers.
const NAMES: [(&str, u8); 18] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ipip", 4),
    ("tcp", 6),
    ("udp", 17),
    ("dccp", 33),
    ("ipv6", 41),
    ("rsvp", 46),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("icmpv6", 58),
    ("eigrp", 88),
    ("ospf", 89),
    ("pim", 103),
    ("vrrp", 112),
    ("sctp", 132),
    ("udplite", 136),
];

/// Names that are read only.
const ALIASES: [(&str, u8); 4] = [
    ("icmp6", 58),
    ("ipv6-icmp", 58),
    ("icmp4", 1),
    ("icmpv4", 1),
];

/// Reads a protocol.
pub fn parse(text: &str) -> Result<Protocol, Problem> {
    let lower = text.to_ascii_lowercase();
    match lower.as_str() {
        "arp" => return Ok(Protocol::Arp),
        "nd" | "ndp" => return Ok(Protocol::Nd),
        "other" => return Ok(Protocol::OtherEthertype),
        _ => {}
    }
    NAMES
        .iter()
        .chain(&ALIASES)
        .find(|(name, _)| *name == lower)
        .map(|&(_, number)| number)
        .or_else(|| number::parse(&lower).and_then(|number| u8::try_from(number).ok()))
        .map(Protocol::Ip)
        .ok_or_else(|| {
            let names: Vec<&str> = NAMES.iter().map(|&(name, _)| name).collect();
            Problem::new(
                "is not a protocol",
                format!(
                    "{}, numbers from 0 to 255, arp, nd (IPv6 neighbour discovery), other (every \
                     ethertype that is none of IPv4, IPv6 and ARP)",
                    names.join(", ")
                ),
            )
        })
}

/// Writes a protocol.
#[must_use]
pub fn format(protocol: Protocol) -> String {
    match protocol {
        Protocol::Arp => "arp".to_owned(),
        Protocol::Nd => "nd".to_owned(),
        Protocol::OtherEthertype => "other".to_owned(),
        Protocol::Ip(number) => NAMES
            .iter()
            .find(|&&(_, known)| known == number)
            .map_or_else(|| number.to_string(), |&(name, _)| name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for number in 0..=255 {
            let protocol = Protocol::Ip(number);
            assert_eq!(parse(&format(protocol)).unwrap(), protocol);
            assert_eq!(parse(&number.to_string()).unwrap(), protocol);
        }
        for protocol in [Protocol::Arp, Protocol::Nd, Protocol::OtherEthertype] {
            assert_eq!(parse(&format(protocol)).unwrap(), protocol);
        }
        assert_eq!(parse("TCP").unwrap(), Protocol::Ip(6));
        for bad in ["", "256", "tpc", "-1", "tcp udp"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
