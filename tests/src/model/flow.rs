//! Flow identity, and the draw that decides whether a flow is in a rule's share.

use std::net::IpAddr;

use injector::rules::model::{FlowIdentity, Protocol};
use siphasher::sip::SipHasher24;

use super::Parsed;

/// Halves of the constant part of the two key derivations ("injector", "fault ke").
const NAME_KEY_0: u64 = 0x696e_6a65_6374_6f72;
const NAME_KEY_1: u64 = 0x6661_756c_7420_6b65;
/// "share".
const SHARE: u64 = 0x73_6861_7265;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Kind of a flow: what its addresses and its protocol number mean.
const KIND_V4: u8 = 0;
const KIND_V6: u8 = 1;
const KIND_NOT_IP: u8 = 2;
const KIND_ND: u8 = 3;

/// A conversation, the same for both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The lower address (as 16 bytes, IPv4 in the first four).
    pub lo: [u8; 16],
    /// The higher address.
    pub hi: [u8; 16],
    /// Port at the lower address.
    pub lo_port: u16,
    /// Port at the higher address.
    pub hi_port: u16,
    /// Protocol number.
    pub protocol: u8,
    /// 0 IPv4, 1 IPv6, 2 not IP, 3 neighbour discovery.
    pub kind: u8,
}

fn sixteen(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            bytes
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

impl FlowKey {
    /// The flow of a packet.
    ///
    /// Choice: ARP and other ethertypes are told apart by the protocol number, 0 for ARP and 1 for the
    /// others; packets without addresses have zero addresses.
    #[must_use]
    pub fn of(packet: &Parsed) -> Self {
        let (source, destination) = match packet.addresses {
            Some((source, destination)) => (sixteen(source), sixteen(destination)),
            None => ([0; 16], [0; 16]),
        };
        let (source_port, destination_port) = packet.transport.flow_ports;
        let (protocol, kind) = match packet.transport.protocol {
            Protocol::Ip(number) => (number, if packet.is_v6() { KIND_V6 } else { KIND_V4 }),
            Protocol::Nd => (ICMPV6, KIND_ND),
            Protocol::Arp => (0, KIND_NOT_IP),
            Protocol::OtherEthertype => (1, KIND_NOT_IP),
        };
        let from = (source, source_port);
        let to = (destination, destination_port);
        let (lo, hi) = if from <= to { (from, to) } else { (to, from) };
        Self {
            lo: lo.0,
            hi: hi.0,
            lo_port: lo.1,
            hi_port: hi.1,
            protocol,
            kind,
        }
    }

    /// The same without what changes from connection to connection: the higher of two unequal ports,
    /// both identifiers of an ICMP echo.
    ///
    /// Choice: the order of the two ends stays that of the whole flow.
    #[must_use]
    pub fn service(self) -> Self {
        let icmp = matches!(
            (self.kind, self.protocol),
            (KIND_V4, ICMP) | (KIND_V6, ICMPV6)
        );
        if icmp {
            Self {
                lo_port: 0,
                hi_port: 0,
                ..self
            }
        } else if self.lo_port > self.hi_port {
            Self { lo_port: 0, ..self }
        } else if self.hi_port > self.lo_port {
            Self { hi_port: 0, ..self }
        } else {
            self
        }
    }

    /// What counts as one flow for the positions of a rule.
    #[must_use]
    pub fn for_positions(self, identity: FlowIdentity) -> Self {
        match identity {
            FlowIdentity::Tuple | FlowIdentity::Ordinal => self,
            FlowIdentity::Service => self.service(),
        }
    }
}

/// The 32-bit draw of a flow for a rule. `ordinal` is the flow's number among those to its service,
/// from 1, for rules that go by it, and `flow` is then the service's key.
#[must_use]
pub fn share_draw(seed: u64, name: &str, flow: &FlowKey, ordinal: Option<u64>) -> u32 {
    let key_0 = SipHasher24::new_with_keys(seed, NAME_KEY_0).hash(name.as_bytes());
    let key_1 = SipHasher24::new_with_keys(seed, NAME_KEY_1).hash(name.as_bytes());
    let word = match ordinal {
        Some(ordinal) => SHARE ^ ordinal.rotate_left(40),
        None => SHARE,
    };
    let mut input = Vec::with_capacity(48);
    input.extend_from_slice(&flow.lo);
    input.extend_from_slice(&flow.hi);
    input.extend_from_slice(&flow.lo_port.to_le_bytes());
    input.extend_from_slice(&flow.hi_port.to_le_bytes());
    input.push(flow.protocol);
    input.push(flow.kind);
    input.extend_from_slice(&[0, 0]);
    input.extend_from_slice(&word.to_le_bytes());
    let hash = SipHasher24::new_with_keys(key_0, key_1).hash(&input);
    (hash >> 32) as u32
}
