//! What is in force: targets, rules with their activations, exemptions.

use std::{fmt::Write as _, ops::RangeInclusive, time::Duration};

use injector::rules::model::{AddrSet, Direction, FlowIdentity, Protocol, Rule};

use super::{Hook, Link};

/// One target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its slot.
    pub slot: u16,
    /// What its packets begin with.
    pub link: Link,
    /// A loopback device: attached on egress only, where every packet is decided for both directions.
    pub loopback: bool,
}

/// A rule on its targets since an instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    /// The rule. Its interfaces are not looked at: `targets` says where it is.
    pub rule: Rule,
    /// Slots of its targets.
    pub targets: Vec<u16>,
    /// Identifies this activation: a rule that keeps it keeps its positions and counters.
    pub activation: u32,
    /// How long before the change that brings this activation into force it counts as activated.
    /// Not looked at for an activation that is in force already.
    pub age: Duration,
}

/// An entry of the protect list: flows that only rules marked `unprotected` may touch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exemption {
    /// Destination on egress, source on ingress.
    pub peer: AddrSet,
    /// Source on egress, destination on ingress.
    pub local: AddrSet,
    /// Port at the peer.
    pub peer_port: Vec<RangeInclusive<u16>>,
    /// Port at the local side.
    pub local_port: Vec<RangeInclusive<u16>>,
    /// Protocols; empty: every IP protocol, as in a rule.
    pub protocols: Vec<Protocol>,
}

/// Everything that is in force at one time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Setup {
    /// The targets.
    pub targets: Vec<Target>,
    /// The rules.
    pub rules: Vec<InForce>,
    /// The protect list.
    pub exempt: Vec<Exemption>,
}

impl Setup {
    /// The target in a slot.
    #[must_use]
    pub fn target(&self, slot: u16) -> Option<&Target> {
        self.targets.iter().find(|target| target.slot == slot)
    }

    /// Whether any rule is for packets of this target and hook.
    #[must_use]
    pub fn covers(&self, slot: u16, hook: Hook) -> bool {
        self.rules.iter().any(|entry| {
            entry.targets.contains(&slot)
                && match entry.rule.selector.direction {
                    Direction::Both => true,
                    Direction::Egress => hook == Hook::Egress,
                    Direction::Ingress => hook == Hook::Ingress,
                }
        })
    }
}

/// A rule in one line: what differs from a rule that asks nothing.
#[must_use]
pub fn describe_rule(entry: &InForce) -> String {
    let rule = &entry.rule;
    let selector = &rule.selector;
    let mut text = format!(
        "{} activation {} age {:?} targets {:?} {:?}",
        rule.name, entry.activation, entry.age, entry.targets, rule.fault
    );
    // Writing to a String cannot fail.
    let mut part = |name: &str, set: bool, value: &dyn std::fmt::Debug| {
        if set {
            let _ = write!(text, " {name}={value:?}");
        }
    };
    part(
        "direction",
        selector.direction != Direction::Both,
        &selector.direction,
    );
    for (name, set) in [
        ("peer", &selector.peer),
        ("local", &selector.local),
        ("src", &selector.src),
        ("dst", &selector.dst),
    ] {
        part(name, !set.include.is_empty(), &set.include);
        part(
            &format!("{name}.except"),
            !set.except.is_empty(),
            &set.except,
        );
    }
    for (name, ports) in [
        ("peer_port", &selector.peer_port),
        ("local_port", &selector.local_port),
        ("src_port", &selector.src_port),
        ("dst_port", &selector.dst_port),
    ] {
        part(name, !ports.is_empty(), ports);
    }
    part(
        "protocols",
        !selector.protocols.is_empty(),
        &selector.protocols,
    );
    part(
        "ip_version",
        selector.ip_version.is_some(),
        &selector.ip_version,
    );
    part(
        "icmp_types",
        !selector.icmp_types.is_empty(),
        &selector.icmp_types,
    );
    part(
        "icmpv6_types",
        !selector.icmpv6_types.is_empty(),
        &selector.icmpv6_types,
    );
    part(
        "tcp_flags",
        selector.tcp_flags.is_some(),
        &selector.tcp_flags,
    );
    part("length", !selector.length.is_empty(), &selector.length);
    part("dscp", !selector.dscp.is_empty(), &selector.dscp);
    part("marks", !selector.marks.is_empty(), &selector.marks);
    part("share", selector.share.is_some(), &selector.share);
    part("state", selector.state.is_some(), &selector.state);
    part("lifetime", rule.lifetime.is_some(), &rule.lifetime);
    part("flap", rule.flap.is_some(), &rule.flap);
    part("seed", selector.share.is_some(), &rule.seed);
    part("key", rule.key != FlowIdentity::Tuple, &rule.key);
    part("unprotected", rule.unprotected, &rule.unprotected);
    text
}
