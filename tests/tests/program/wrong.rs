//! Proofs that the comparison can fail: models that are wrong in one way each, made by bending what
//! a right one is given, must be told from a right one.

use std::ops::RangeInclusive;

use anyhow::bail;
use injector::rules::model::{
    Answer, ConnState, Direction, Fault, FlowIdentity, Protocol, Selector,
};
use libtest_mimic::{Failed, Trial};
use tests::{
    generate::{Limits, scenario},
    model::{
        InForce, Link, Model, Outcome, Packet, RuleOutcome, Setup, Subject, TargetOutcome, compare,
        minimise,
    },
};

/// Each mistake must show within so many scenarios of 80 packets, a tenth of a full run.
const SCENARIOS: u64 = 260;
/// The smallest scenario that shows a mistake needs few packets.
const MOST_PACKETS: usize = 12;

/// A mistake: what a wrong decider takes rules, setups, packets or time for.
enum Mistake {
    Rule(fn(&mut InForce)),
    Setup(fn(&mut Setup)),
    Packet(fn(&mut Packet, Link)),
    ForgetsOnChange,
    IgnoresLease,
}

struct Wrong {
    name: &'static str,
    mistake: Mistake,
    model: Model,
}

impl Wrong {
    fn bend(&self, setup: &Setup) -> Setup {
        let mut setup = setup.clone();
        match self.mistake {
            Mistake::Rule(bend) => setup.rules.iter_mut().for_each(bend),
            Mistake::Setup(bend) => bend(&mut setup),
            Mistake::Packet(_) | Mistake::ForgetsOnChange | Mistake::IgnoresLease => {}
        }
        setup
    }
}

impl Subject for Wrong {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn install(&mut self, setup: &Setup) -> anyhow::Result<()> {
        self.model = Model::new(self.bend(setup));
        Ok(())
    }

    fn replace(&mut self, setup: &Setup) -> anyhow::Result<()> {
        if matches!(self.mistake, Mistake::ForgetsOnChange) {
            return self.install(setup);
        }
        let setup = self.bend(setup);
        self.model.replace(setup);
        Ok(())
    }

    fn set_lease(&mut self, valid: bool) -> anyhow::Result<()> {
        self.model
            .set_lease(valid || matches!(self.mistake, Mistake::IgnoresLease));
        Ok(())
    }

    fn decide(&mut self, packet: &Packet) -> anyhow::Result<Outcome> {
        let mut packet = packet.clone();
        if let Mistake::Packet(bend) = self.mistake {
            let target = self.model.setup().target(packet.target);
            bend(
                &mut packet,
                target.map_or(Link::Ethernet, |target| target.link),
            );
        }
        let decision = self.model.decide(&packet);
        // Only what a kernel program shows: its verdict. What it counts is compared at the end.
        Ok(Outcome {
            cut: decision.cut,
            answered: decision.answered,
            unparsed: None,
        })
    }

    fn rule_counters(&mut self) -> anyhow::Result<Vec<[RuleOutcome; 2]>> {
        Ok(self.model.rule_totals())
    }

    fn target_counters(&mut self) -> anyhow::Result<Option<Vec<[TargetOutcome; 2]>>> {
        Ok(None)
    }
}

/// Where the network header is, and its ethertype.
fn network(packet: &Packet, link: Link) -> Option<(usize, u16)> {
    if link == Link::Raw {
        return Some((0, packet.protocol));
    }
    let mut at = 12;
    loop {
        let pair = packet.bytes.get(at..at + 2)?;
        let ethertype = u16::from_be_bytes([pair[0], pair[1]]);
        if !matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
            return Some((at + 2, ethertype));
        }
        at += 4;
    }
}

/// Changes a byte of the network header of packets of one ethertype.
fn bend_byte(
    packet: &mut Packet,
    link: Link,
    ethertype: u16,
    offset: usize,
    bend: impl Fn(u8) -> u8,
) {
    if let Some((at, found)) = network(packet, link)
        && found == ethertype
        && let Some(byte) = packet.bytes.get_mut(at + offset)
    {
        *byte = bend(*byte);
    }
}

fn every_port_list(
    selector: &mut Selector,
    bend: impl Fn(&RangeInclusive<u16>) -> RangeInclusive<u16>,
) {
    for list in [
        &mut selector.peer_port,
        &mut selector.local_port,
        &mut selector.src_port,
        &mut selector.dst_port,
    ] {
        for range in list {
            *range = bend(range);
        }
    }
}

/// Reading the first extension header of one number as an unknown protocol.
fn unknown_extension(packet: &mut Packet, link: Link, number: u8) {
    bend_byte(packet, link, 0x86dd, 6, |next| {
        if next == number { 253 } else { next }
    });
}

/// A name and the mistake.
type Named = (&'static str, fn() -> Mistake);

const MISTAKES: &[Named] = &[
    ("ipv4_options_are_ignored", || {
        Mistake::Packet(|packet, link| {
            bend_byte(packet, link, 0x0800, 0, |byte| {
                if byte > 0x45 { 0x45 } else { byte }
            });
        })
    }),
    ("ipv4_fragments_are_whole_packets", || {
        Mistake::Packet(|packet, link| {
            bend_byte(packet, link, 0x0800, 6, |byte| byte & 0xc0);
            bend_byte(packet, link, 0x0800, 7, |_| 0);
        })
    }),
    ("one_vlan_tag_only", || {
        Mistake::Packet(|packet, link| {
            if link == Link::Ethernet && network(packet, link).is_some_and(|(at, _)| at > 18) {
                packet.bytes[16..18].copy_from_slice(&[0x88, 0xb5]);
            }
        })
    }),
    ("hop_by_hop_is_not_skipped", || {
        Mistake::Packet(|packet, link| unknown_extension(packet, link, 0))
    }),
    ("ah_is_not_skipped", || {
        Mistake::Packet(|packet, link| unknown_extension(packet, link, 51))
    }),
    ("shim6_is_not_skipped", || {
        Mistake::Packet(|packet, link| unknown_extension(packet, link, 140))
    }),
    ("ipv4_total_length_is_ignored", || {
        Mistake::Packet(|packet, link| {
            bend_byte(packet, link, 0x0800, 2, |_| 0);
            bend_byte(packet, link, 0x0800, 3, |_| 0);
        })
    }),
    ("a_super_packet_is_one_packet", || {
        Mistake::Packet(|packet, _| packet.gso_size = 0)
    }),
    ("an_open_segment_count_is_one", || {
        Mistake::Packet(|packet, _| packet.gso_segs = packet.gso_segs.max(1))
    }),
    ("by_frags_is_a_size", || {
        Mistake::Packet(|packet, _| {
            if packet.gso_size == u16::MAX {
                packet.gso_segs = 0;
                packet.gso_size = u16::MAX - 1;
            }
        })
    }),
    ("mark_is_not_read", || {
        Mistake::Packet(|packet, _| packet.mark = 0)
    }),
    ("nth_is_one_late", || {
        Mistake::Rule(|entry| {
            if let Fault::DropNth(n) = &mut entry.rule.fault {
                *n = n.saturating_add(1);
            }
        })
    }),
    ("first_is_one_short", || {
        Mistake::Rule(|entry| {
            if let Fault::DropFirst(n) = &mut entry.rule.fault {
                *n -= 1;
            }
        })
    }),
    ("every_is_one_short", || {
        Mistake::Rule(|entry| {
            if let Fault::DropEvery(n) = &mut entry.rule.fault {
                *n = (*n - 1).max(1);
            }
        })
    }),
    ("numbers_have_32_bits", || {
        Mistake::Rule(|entry| {
            if let Fault::DropNth(n) | Fault::DropFirst(n) | Fault::DropEvery(n) =
                &mut entry.rule.fault
            {
                *n = (*n & u64::from(u32::MAX)).max(1);
            }
        })
    }),
    ("a_pattern_always_repeats", || {
        Mistake::Rule(|entry| {
            if let Fault::DropPattern { once, .. } = &mut entry.rule.fault {
                *once = false;
            }
        })
    }),
    ("a_pattern_has_64_bits", || {
        Mistake::Rule(|entry| {
            if let Fault::DropPattern { bits, .. } = &mut entry.rule.fault {
                bits.truncate(64);
            }
        })
    }),
    ("one_shot_per_flow", || {
        Mistake::Rule(|entry| {
            if entry.rule.fault == Fault::DropOnce {
                entry.rule.fault = Fault::DropFirst(1);
            }
        })
    }),
    ("direction_is_ignored", || {
        Mistake::Rule(|entry| entry.rule.selector.direction = Direction::Both)
    }),
    ("exceptions_are_ignored", || {
        Mistake::Rule(|entry| {
            let selector = &mut entry.rule.selector;
            for set in [
                &mut selector.peer,
                &mut selector.local,
                &mut selector.src,
                &mut selector.dst,
            ] {
                set.except.clear();
            }
        })
    }),
    ("a_narrower_include_beats_an_exception", || {
        Mistake::Rule(|entry| {
            let selector = &mut entry.rule.selector;
            for set in [
                &mut selector.peer,
                &mut selector.local,
                &mut selector.src,
                &mut selector.dst,
            ] {
                let longest = set
                    .include
                    .iter()
                    .map(ipnet::IpNet::prefix_len)
                    .max()
                    .unwrap_or(0);
                set.except.retain(|except| except.prefix_len() >= longest);
            }
        })
    }),
    ("peer_is_destination", || {
        Mistake::Rule(|entry| {
            let selector = &mut entry.rule.selector;
            if selector.dst.is_any() {
                selector.dst = std::mem::take(&mut selector.peer);
            }
        })
    }),
    ("ranges_exclude_their_end", || {
        Mistake::Rule(|entry| {
            every_port_list(&mut entry.rule.selector, |range| {
                *range.start()..=range.end().saturating_sub(1).max(*range.start())
            });
        })
    }),
    ("port_zero_is_no_port", || {
        Mistake::Rule(|entry| {
            every_port_list(&mut entry.rule.selector, |range| {
                (*range.start()).max(1)..=(*range.end()).max(1)
            });
        })
    }),
    ("discovery_is_icmpv6", || {
        Mistake::Rule(|entry| {
            let protocols = &mut entry.rule.selector.protocols;
            if protocols.contains(&Protocol::Ip(58)) {
                protocols.push(Protocol::Nd);
            }
        })
    }),
    ("nothing_named_means_everything", || {
        Mistake::Rule(|entry| {
            let protocols = &mut entry.rule.selector.protocols;
            if protocols.is_empty() {
                *protocols = (0..=255).map(Protocol::Ip).collect();
                protocols.extend([Protocol::Arp, Protocol::Nd, Protocol::OtherEthertype]);
            }
        })
    }),
    ("ip_version_is_ignored", || {
        Mistake::Rule(|entry| entry.rule.selector.ip_version = None)
    }),
    ("icmpv6_types_are_icmp_types", || {
        Mistake::Rule(|entry| {
            let selector = &mut entry.rule.selector;
            std::mem::swap(&mut selector.icmp_types, &mut selector.icmpv6_types);
        })
    }),
    ("flags_need_only_one_of_the_mask", || {
        Mistake::Rule(|entry| {
            if let Some(flags) = &mut entry.rule.selector.tcp_flags {
                flags.mask = flags.value;
            }
        })
    }),
    ("length_excludes_its_end", || {
        Mistake::Rule(|entry| {
            for range in &mut entry.rule.selector.length {
                *range = *range.start()..=range.end().saturating_sub(1);
            }
        })
    }),
    ("dscp_is_ignored", || {
        Mistake::Rule(|entry| entry.rule.selector.dscp.clear())
    }),
    ("mark_masks_are_ignored", || {
        Mistake::Rule(|entry| {
            entry
                .rule
                .selector
                .marks
                .iter_mut()
                .for_each(|mark| mark.mask = u32::MAX);
        })
    }),
    ("another_seed", || {
        Mistake::Rule(|entry| entry.rule.seed ^= 1)
    }),
    ("another_name", || {
        Mistake::Rule(|entry| entry.rule.name.push('x'))
    }),
    ("a_whole_share_is_one_short", || {
        Mistake::Rule(|entry| {
            if let Some(share) = &mut entry.rule.selector.share {
                *share &= u64::from(u32::MAX);
            }
        })
    }),
    ("new_is_established", || {
        Mistake::Rule(|entry| {
            let state = &mut entry.rule.selector.state;
            *state = state.map(|state| match state {
                ConnState::New => ConnState::Established,
                ConnState::Established => ConnState::New,
            });
        })
    }),
    ("state_is_ignored", || {
        Mistake::Rule(|entry| entry.rule.selector.state = None)
    }),
    ("a_service_is_a_tuple", || {
        Mistake::Rule(|entry| {
            if entry.rule.key == FlowIdentity::Service {
                entry.rule.key = FlowIdentity::Tuple;
            }
        })
    }),
    ("an_ordinal_is_a_tuple", || {
        Mistake::Rule(|entry| {
            if entry.rule.key == FlowIdentity::Ordinal {
                entry.rule.key = FlowIdentity::Tuple;
            }
        })
    }),
    ("lifetime_is_ignored", || {
        Mistake::Rule(|entry| entry.rule.lifetime = None)
    }),
    ("flapping_is_ignored", || {
        Mistake::Rule(|entry| entry.rule.flap = None)
    }),
    ("flapping_begins_with_down", || {
        Mistake::Rule(|entry| {
            if let Some(flap) = &mut entry.rule.flap {
                flap.phase += flap.up;
            }
        })
    }),
    ("nothing_is_protected", || {
        Mistake::Setup(|setup| setup.exempt.clear())
    }),
    ("unprotected_is_ignored", || {
        Mistake::Rule(|entry| entry.rule.unprotected = false)
    }),
    ("the_first_target_only", || {
        Mistake::Rule(|entry| entry.targets.truncate(1))
    }),
    ("at_most_64_rules", || {
        Mistake::Setup(|setup| {
            for entry in setup.rules.iter_mut().skip(64) {
                entry.targets.clear();
            }
        })
    }),
    ("the_last_rule_is_lost", || {
        Mistake::Setup(|setup| {
            if let Some(entry) = setup.rules.last_mut() {
                entry.targets.clear();
            }
        })
    }),
    ("a_change_forgets_everything", || Mistake::ForgetsOnChange),
    ("a_reject_is_silent", || {
        Mistake::Rule(|entry| {
            if matches!(entry.rule.fault, Fault::Reject(_)) {
                entry.rule.fault = Fault::Cut;
            }
        })
    }),
    ("every_packet_is_reset", || {
        Mistake::Rule(|entry| {
            if entry.rule.fault == Fault::Reject(Answer::Rst) {
                entry.rule.fault = Fault::Reject(Answer::IcmpPort);
            }
        })
    }),
    ("frames_to_groups_are_answered", || {
        Mistake::Packet(|packet, link| {
            if link == Link::Ethernet
                && let Some(first) = packet.bytes.first_mut()
            {
                *first &= !1;
            }
        })
    }),
    ("the_lease_is_ignored", || Mistake::IgnoresLease),
];

/// One trial per mistake.
pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = MISTAKES
        .iter()
        .map(|(name, mistake)| {
            Trial::test(format!("wrong::{name}"), move || {
                is_noticed(name, mistake()).map_err(|error| Failed::from(format!("{error:#}")))
            })
        })
        .collect();
    trials.push(Trial::test("wrong::nothing_at_all_is_not_noticed", || {
        right_is_right().map_err(|error| Failed::from(format!("{error:#}")))
    }));
    trials
}

/// The way in which mistakes are made makes none by itself.
fn right_is_right() -> anyhow::Result<()> {
    let mistake = Mistake::Rule(|_| {});
    let mut right = Wrong {
        name: "right",
        mistake,
        model: Model::default(),
    };
    for seed in 0..SCENARIOS {
        let scenario = scenario(seed, 80, 1, Limits::TestRun);
        let result = compare(&mut [&mut right as &mut dyn Subject], &scenario)?;
        if let Some(difference) = result.difference {
            bail!("scenario {seed}: {difference}");
        }
    }
    Ok(())
}

fn is_noticed(name: &'static str, mistake: Mistake) -> anyhow::Result<()> {
    let mut wrong = Wrong {
        name,
        mistake,
        model: Model::default(),
    };
    let mut subjects = [&mut wrong as &mut dyn Subject];
    for seed in 0..SCENARIOS {
        let scenario = scenario(seed, 80, 1, Limits::TestRun);
        let Some(difference) = compare(&mut subjects, &scenario)?.difference else {
            continue;
        };
        let (small, found) = minimise(&mut subjects, &scenario, &difference)?;
        if small.packet_count() > MOST_PACKETS {
            bail!("noticed in scenario {seed}, but not made small: {found}\n{small}");
        }
        return Ok(());
    }
    bail!("{SCENARIOS} scenarios show no difference")
}
