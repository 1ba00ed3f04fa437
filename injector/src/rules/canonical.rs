//! From a validated rule back to text: one text for one meaning, and nothing lost.

use std::ops::RangeInclusive;

use super::{
    model::{ConnState, Direction, Fault, FlowIdentity, IpVersion, MAX_LENGTH, Rule},
    spec::{FaultSpec, RuleSpec},
    text::{address, dscp, duration, flap, icmp, mark, netns, protocol, range, share, tcp_flags},
};

impl From<&Rule> for RuleSpec {
    fn from(rule: &Rule) -> RuleSpec {
        let selector = &rule.selector;
        RuleSpec {
            name: Some(rule.name.clone()),
            group: rule.group.clone(),
            netns: netns::format(&rule.netns),
            iface: rule.interfaces.clone(),
            direction: Some(
                match selector.direction {
                    Direction::Egress => "egress",
                    Direction::Ingress => "ingress",
                    Direction::Both => "both",
                }
                .to_owned(),
            ),
            peer: address::format_set(&selector.peer),
            local: address::format_set(&selector.local),
            src: address::format_set(&selector.src),
            dst: address::format_set(&selector.dst),
            except: Vec::new(),
            peer_port: ports(&selector.peer_port),
            local_port: ports(&selector.local_port),
            src_port: ports(&selector.src_port),
            dst_port: ports(&selector.dst_port),
            proto: selector
                .protocols
                .iter()
                .map(|&p| protocol::format(p))
                .collect(),
            ip_version: selector.ip_version.map(|version| match version {
                IpVersion::V4 => 4,
                IpVersion::V6 => 6,
            }),
            icmp_type: icmp::format(&selector.icmp_types, &selector.icmpv6_types),
            tcp_flags: selector.tcp_flags.map(tcp_flags::format),
            length: selector
                .length
                .iter()
                .map(|r| range::format(r, MAX_LENGTH))
                .collect(),
            dscp: selector
                .dscp
                .iter()
                .map(|&value| dscp::format(value))
                .collect(),
            mark: selector
                .marks
                .iter()
                .map(|&value| mark::format(value))
                .collect(),
            flows: selector.share.map(share::format),
            state: selector.state.map(|state| {
                match state {
                    ConnState::New => "new",
                    ConnState::Established => "established",
                }
                .to_owned()
            }),
            fault: {
                let mut fault = FaultSpec::from(&rule.fault);
                rule.shaping.write(&mut fault);
                fault
            },
            lifetime: rule.lifetime.map(duration::format),
            flap: rule.flap.as_ref().map(flap::format),
            seed: Some(rule.seed),
            key: match rule.key {
                FlowIdentity::Tuple => None,
                FlowIdentity::Service => Some("service".to_owned()),
                FlowIdentity::Ordinal => Some("ordinal".to_owned()),
            },
            all_traffic: rule.all_traffic,
            unprotected: rule.unprotected,
        }
    }
}

impl From<&Fault> for FaultSpec {
    fn from(fault: &Fault) -> FaultSpec {
        let nothing = FaultSpec::default();
        match fault {
            Fault::Cut => FaultSpec {
                cut: true,
                ..nothing
            },
            Fault::DropNth(n) => FaultSpec {
                drop_nth: Some(*n),
                ..nothing
            },
            Fault::DropFirst(n) => FaultSpec {
                drop_first: Some(*n),
                ..nothing
            },
            Fault::DropEvery(n) => FaultSpec {
                drop_every: Some(*n),
                ..nothing
            },
            Fault::DropPattern { bits, once } => FaultSpec {
                drop_pattern: Some(
                    bits.iter()
                        .map(|&bit| if bit { '1' } else { '0' })
                        .collect(),
                ),
                once: *once,
                ..nothing
            },
            Fault::DropOnce => FaultSpec {
                drop_once: true,
                ..nothing
            },
            Fault::Reject(answer) => FaultSpec {
                reject: Some(answer.name().to_owned()),
                ..nothing
            },
            Fault::None => nothing,
        }
    }
}

fn ports(ranges: &[RangeInclusive<u16>]) -> Vec<String> {
    ranges
        .iter()
        .map(|r| {
            range::format(
                &(u32::from(*r.start())..=u32::from(*r.end())),
                u32::from(u16::MAX),
            )
        })
        .collect()
}
