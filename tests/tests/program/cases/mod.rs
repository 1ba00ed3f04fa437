//! Hand-written cases: packets whose fate was worked out on paper.

mod faults;
mod fragments;
mod headers;
mod idle;
mod selectors;
mod unfaulted;

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, bail};
use injector::rules::model::{
    AddrSet, ConnState, Direction, Fault, Flap, FlowIdentity, IpVersion, Mark, Protocol, Rule,
    Selector, TcpFlags,
};
use libtest_mimic::{Completion, Failed, Trial};
use tests::{
    generate::{Extension, Frame, Network, Transport, flag, plain_rule},
    model::{Exemption, Hook, InForce, Link, Packet, RuleOutcome, Setup, Subject, Target},
    subject::Kernel,
};

use crate::subjects::{Entry, MODEL, OTHERS};

/// Slots of the targets that every case has.
const ETHERNET: u16 = 1;
const SECOND: u16 = 2;
const RAW: u16 = 3;
const LOOPBACK: u16 = 4;

const NEAR: &str = "10.77.0.1";
const FAR: &str = "10.0.0.2";
const NEAR_6: &str = "fd00:77::1";
const FAR_6: &str = "fd00::2";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Pass,
    Cut,
    /// Passes, and is counted as not understood.
    Unparsed,
}
use Fate::{Cut, Pass, Unparsed};

enum Step {
    Packet(Packet, Fate),
    Change(Setup),
    Lease(bool),
}

struct Case {
    setup: Setup,
    steps: Vec<Step>,
    /// Counters of the rules at the end, where the case is about them.
    counters: Option<Vec<[RuleOutcome; 2]>>,
}

impl Case {
    fn new(rules: Vec<InForce>) -> Self {
        Self {
            setup: setup(rules),
            steps: Vec::new(),
            counters: None,
        }
    }

    fn packet(mut self, packet: Packet, fate: Fate) -> Self {
        self.steps.push(Step::Packet(packet, fate));
        self
    }

    fn packets(self, packet: &Packet, fates: &[Fate]) -> Self {
        fates
            .iter()
            .fold(self, |case, fate| case.packet(packet.clone(), *fate))
    }

    fn exempt(mut self, entry: Exemption) -> Self {
        self.setup.exempt.push(entry);
        self
    }

    fn change(mut self, rules: Vec<InForce>) -> Self {
        self.steps.push(Step::Change(setup(rules)));
        self
    }

    fn lease(mut self, valid: bool) -> Self {
        self.steps.push(Step::Lease(valid));
        self
    }

    fn counts(mut self, counters: Vec<[RuleOutcome; 2]>) -> Self {
        self.counters = Some(counters);
        self
    }

    fn run(&self, subject: &mut dyn Subject) -> anyhow::Result<()> {
        subject
            .install(&self.setup)
            .context("installing the first setup")?;
        for (index, step) in self.steps.iter().enumerate() {
            match step {
                Step::Change(setup) => subject.replace(setup).context("changing the setup")?,
                Step::Lease(valid) => subject.set_lease(*valid).context("setting the lease")?,
                Step::Packet(packet, fate) => {
                    let link = self
                        .setup
                        .target(packet.target)
                        .map_or(Link::Ethernet, |t| t.link);
                    if !packet.fits_test_run(link) {
                        bail!("step {index}: not a packet for BPF_PROG_TEST_RUN: {packet:?}");
                    }
                    let outcome = subject.decide(packet).context("deciding a packet")?;
                    let unparsed = outcome.unparsed.unwrap_or(*fate == Unparsed);
                    if outcome.cut != (*fate == Cut) || unparsed != (*fate == Unparsed) {
                        bail!("step {index}: {outcome:?} instead of {fate:?} for {packet:?}");
                    }
                }
            }
        }
        if let Some(wanted) = &self.counters {
            let counters = subject.rule_counters().context("reading counters")?;
            if counters != *wanted {
                bail!("counters are {counters:?}, not {wanted:?}");
            }
        }
        self.unparsed_are_counted(subject)
    }

    fn unparsed_are_counted(&self, subject: &mut dyn Subject) -> anyhow::Result<()> {
        let Some(counters) = subject.target_counters()? else {
            return Ok(());
        };
        let hook = Hook::Egress;
        let wanted = self
            .steps
            .iter()
            .filter(|step| {
                matches!(step, Step::Packet(packet, Unparsed)
                    if packet.target == ETHERNET && packet.hook == hook)
            })
            .count() as u64;
        let seen = counters[0][hook.index()].unparsed;
        if self.setup.covers(ETHERNET, hook) && seen != wanted {
            bail!("{seen} packets were counted as unparsed, not {wanted}");
        }
        Ok(())
    }
}

fn setup(rules: Vec<InForce>) -> Setup {
    let target = |slot, link, loopback| Target {
        slot,
        link,
        loopback,
    };
    Setup {
        targets: vec![
            target(ETHERNET, Link::Ethernet, false),
            target(SECOND, Link::Ethernet, false),
            target(RAW, Link::Raw, false),
            target(LOOPBACK, Link::Ethernet, true),
        ],
        rules,
        exempt: Vec::new(),
    }
}

fn in_force(rule: Rule, activation: u32) -> InForce {
    let targets = vec![ETHERNET, SECOND, RAW, LOOPBACK];
    InForce {
        rule,
        targets,
        activation,
        age: Duration::from_secs(5),
    }
}

/// A rule in force on every target.
fn rule(fault: Fault, selector: Selector) -> InForce {
    in_force(
        Rule {
            selector,
            ..plain_rule("rule", fault)
        },
        1,
    )
}

fn to_port(port: u16) -> Selector {
    Selector {
        dst_port: vec![port..=port],
        ..Selector::default()
    }
}

fn set(include: &[&str], except: &[&str]) -> AddrSet {
    let nets = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
    AddrSet {
        include: nets(include),
        except: nets(except),
    }
}

fn peers(include: &[&str], except: &[&str]) -> Selector {
    Selector {
        peer: set(include, except),
        ..Selector::default()
    }
}

fn protocols(list: &[Protocol]) -> Selector {
    Selector {
        protocols: list.to_vec(),
        ..Selector::default()
    }
}

fn counts(matched: u64, cut: u64, excess: u64) -> RuleOutcome {
    RuleOutcome {
        matched,
        cut,
        excess,
        ..RuleOutcome::default()
    }
}

fn tcp(source: u16, destination: u16) -> Transport {
    Transport::Tcp {
        source,
        destination,
        flags: flag::ACK,
        options: 0,
        payload: 10,
    }
}

fn flags(flags: u8) -> Transport {
    Transport::Tcp {
        source: 40_000,
        destination: 80,
        flags,
        options: 0,
        payload: 10,
    }
}

fn udp(source: u16, destination: u16) -> Transport {
    Transport::Udp {
        source,
        destination,
        payload: 10,
    }
}

fn icmp(kind: u8) -> Transport {
    Transport::Icmp {
        kind,
        code: 0,
        id: 7,
        payload: 8,
    }
}

fn between(from: &str, to: &str, transport: Transport) -> Network {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    Network::ip(address(from), address(to), transport).unwrap()
}

/// An IPv4 packet to the far end.
fn v4(transport: Transport) -> Network {
    between(NEAR, FAR, transport)
}

/// An IPv6 packet to the far end.
fn v6(transport: Transport) -> Network {
    between(NEAR_6, FAR_6, transport)
}

fn v6_with(list: &[Extension], transport: Transport) -> Network {
    let mut network = v6(transport);
    if let Network::V6 { extensions, .. } = &mut network {
        extensions.extend_from_slice(list);
    }
    network
}

fn frame(bytes: Vec<u8>) -> Packet {
    Packet {
        target: ETHERNET,
        hook: Hook::Egress,
        protocol: 0,
        gso_size: 0,
        gso_segs: 0,
        mark: 0,
        bytes,
    }
}

fn out(network: Network) -> Packet {
    frame(Frame::ethernet(network).bytes())
}

fn back(network: Network) -> Packet {
    Packet {
        hook: Hook::Ingress,
        ..out(network)
    }
}

fn tagged(tags: &[u16], network: Network) -> Packet {
    frame(
        Frame {
            tags: tags.to_vec(),
            ..Frame::ethernet(network)
        }
        .bytes(),
    )
}

/// Cut off at a length, behind one VLAN tag: so `BPF_PROG_TEST_RUN` does not ask for a whole header.
fn cut_off(network: Network, length: usize) -> Packet {
    let mut packet = tagged(&[0x8100], network);
    packet.bytes.truncate(18 + length);
    packet
}

/// With some bytes behind the Ethernet header replaced.
fn patched(network: Network, changes: &[(usize, u8)]) -> Packet {
    let mut packet = out(network);
    for (at, byte) in changes {
        packet.bytes[14 + at] = *byte;
    }
    packet
}

fn long(number: u8, units: u8) -> Extension {
    Extension::Long { number, units }
}

/// A name and the cases under it.
type Group = (&'static str, fn() -> Vec<Case>);

const GROUPS: &[Group] = &[
    ("extension_headers", headers::extension_headers),
    ("vlan_tags", headers::vlan_tags),
    ("ipv4_options", headers::ipv4_options),
    (
        "malformed_network_headers",
        headers::malformed_network_headers,
    ),
    (
        "malformed_transport_headers",
        headers::malformed_transport_headers,
    ),
    (
        "ethernet_padding_is_not_checked_against_lengths",
        headers::padding,
    ),
    ("fragments", fragments::fragments),
    ("fragments_inherit", fragments::inheritance),
    ("ipv6_fragments", fragments::ipv6_fragments),
    ("protocols", selectors::protocol_classes),
    ("arp", selectors::arp),
    ("addresses", selectors::addresses),
    ("directions", selectors::directions),
    ("ports", selectors::ports),
    ("icmp_types", selectors::icmp_types),
    ("tcp_flags", selectors::tcp_flags),
    ("length_dscp_mark", selectors::length_dscp_mark),
    ("positional_faults", faults::positional_faults),
    ("flow_identity", faults::flow_identity),
    ("super_packets", faults::super_packets),
    ("super_packet_selectors", faults::super_packet_selectors),
    ("share", selectors::share),
    ("state", selectors::state),
    ("protect_list", selectors::protect_list),
    ("time", faults::time),
    ("changes", faults::changes),
    ("raw_target", headers::raw_target),
    ("loopback_target", faults::loopback_target),
];

/// One trial for each group of cases and each subject.
pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![idle::trial(), unfaulted::trial()];
    for entry in std::iter::once(&MODEL).chain(OTHERS) {
        for (name, cases) in GROUPS {
            let name = format!("{}::{name}", entry.name);
            trials.push(Trial::ignorable_test(name, move || run(entry, &cases())));
        }
    }
    trials
}

/// A trial of the kernel alone, which looks at more than fates.
fn of_kernel(name: &'static str, test: fn(&mut Kernel) -> anyhow::Result<()>) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some(reason) = Kernel::missing() {
            return Ok(Completion::ignored_with(reason));
        }
        Kernel::new()
            .and_then(|mut kernel| test(&mut kernel))
            .map_err(|error| Failed::from(format!("{error:#}")))?;
        Ok(Completion::Completed)
    })
}

fn run(entry: &Entry, cases: &[Case]) -> Result<Completion, Failed> {
    if let Some(reason) = (entry.missing)() {
        return Ok(Completion::ignored_with(reason));
    }
    let all = || -> anyhow::Result<()> {
        let mut subject = (entry.make)().with_context(|| format!("making {}", entry.name))?;
        for (index, case) in cases.iter().enumerate() {
            case.run(&mut *subject)
                .with_context(|| format!("case {index}"))?;
        }
        Ok(())
    };
    all().map_err(|error| format!("{error:#}"))?;
    Ok(Completion::Completed)
}
