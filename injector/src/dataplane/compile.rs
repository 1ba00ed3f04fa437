//! Rules into tables.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

use injector_common::{
    layout::{
        BITMAP_EMPTY, BITMAP_UNPROTECTED, Bitmap, Class, MAX_CANDIDATES, MAX_EXEMPTIONS, NO_PORT,
        PROTOCOL_CLASSES, RuleEntry, TRACE_ENTRIES, answer, family, fault, hook, identity, kind,
        role, rule_flag,
    },
    siphash::rule_key,
};

use super::{
    distribution,
    image::{Image, PrefixOf, TargetImage},
    intern::{Indices, Meaning, TooMany},
    prefixes::{Condition, ROOT, Resolved, StateId, prefix_of, resolve},
    shape,
    traces::{self, NoRoom, Traces},
    values::{ActiveRule, Exemption, TargetConfig},
};
use crate::rules::model::{
    AddrSet, Answer, ConnState, Direction, Fault, FlowIdentity, IpVersion, Protocol, Rule, Selector,
};

/// Why a rule set cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// More address and port sets overlap in different ways than the table of bitmaps holds.
    #[error(
        "the rules' address and port sets overlap in more than {capacity} different ways; \
         merge rules, or start the daemon with a larger --table-bitmaps"
    )]
    TooManyBitmaps {
        /// Size of the table.
        capacity: u32,
    },
    /// More prefixes than the trie holds.
    #[error(
        "the rules name {prefixes} different prefixes, and the table holds {capacity}; \
         start the daemon with a larger --table-prefixes"
    )]
    TooManyPrefixes {
        /// How many there are.
        prefixes: usize,
        /// How many fit.
        capacity: u32,
    },
    /// A packet can meet more rules than the program follows.
    #[error(
        "one packet can match {count} rules ({names}, …), and at most {MAX_CANDIDATES} can act on one; \
         merge rules or make them narrower"
    )]
    TooManyForOnePacket {
        /// How many rules.
        count: usize,
        /// Some of them.
        names: String,
    },
    /// More distributions of delay are given than there are tables.
    #[error(
        "the rules in force and those asked for give more than {} different distributions of delay \
         (file:PATH); let rules share them, or heal some",
        distribution::MAX_GIVEN
    )]
    TooManyDistributions,
    /// The traces of rates do not fit into their table.
    #[error(
        "a trace of {wanted} opportunities does not fit: rules in force have {taken}, and all together can have \
         {TRACE_ENTRIES}; heal some first, or give shorter traces"
    )]
    TooManyOpportunities {
        /// Opportunities of traces that have their places.
        taken: u32,
        /// Those of the one that has none.
        wanted: u32,
    },
    /// More exemptions than there are slots.
    #[error(
        "{count} entries are protected, and at most {MAX_EXEMPTIONS} can be; join prefixes or ports"
    )]
    TooManyExemptions {
        /// How many there are.
        count: usize,
    },
}

/// A rule or an exemption, as far as its flows go.
struct Entry<'a> {
    slot: u32,
    /// Tells meanings of bitmaps apart across rule sets: activations, or exemptions by content.
    stamp: u64,
    direction: Direction,
    addresses: [(&'a AddrSet, Place); 4],
    ports: [(&'a [RangeInclusive<u16>], Place); 4],
    protocols: &'a [Protocol],
    ip_version: Option<IpVersion>,
    tcp_only: bool,
    icmp_only: bool,
}

/// Which address or port of a packet a selector looks at.
#[derive(Clone, Copy)]
enum Place {
    Peer,
    Local,
    Source,
    Destination,
}

impl Place {
    fn role(self, direction: u32) -> usize {
        let egress = direction == hook::EGRESS;
        match self {
            Self::Peer if egress => Self::Destination.role(direction),
            Self::Local if egress => Self::Source.role(direction),
            Self::Source | Self::Peer => role::source(direction),
            Self::Destination | Self::Local => role::destination(direction),
        }
    }
}

impl<'a> Entry<'a> {
    fn of_rule(active: &'a ActiveRule) -> Self {
        let selector = &active.rule.selector;
        Self {
            slot: rule_slot(active),
            stamp: u64::from(active.activation),
            direction: selector.direction,
            addresses: [
                (&selector.peer, Place::Peer),
                (&selector.local, Place::Local),
                (&selector.src, Place::Source),
                (&selector.dst, Place::Destination),
            ],
            ports: [
                (&selector.peer_port, Place::Peer),
                (&selector.local_port, Place::Local),
                (&selector.src_port, Place::Source),
                (&selector.dst_port, Place::Destination),
            ],
            protocols: &selector.protocols,
            ip_version: selector.ip_version,
            tcp_only: selector.tcp_flags.is_some(),
            icmp_only: !selector.icmp_types.is_empty() || !selector.icmpv6_types.is_empty(),
        }
    }

    fn of_exemption(slot: u32, exemption: &'a Exemption, nothing: &'a AddrSet) -> Self {
        Self {
            slot,
            // Its place in the list, apart from every activation.
            stamp: u64::from(slot) | 1 << 63,
            direction: Direction::Both,
            addresses: [
                (&exemption.peer, Place::Peer),
                (&exemption.local, Place::Local),
                (nothing, Place::Source),
                (nothing, Place::Destination),
            ],
            ports: [
                (&exemption.peer_port, Place::Peer),
                (&exemption.local_port, Place::Local),
                (&[], Place::Source),
                (&[], Place::Destination),
            ],
            protocols: &exemption.protocols,
            ip_version: None,
            tcp_only: false,
            icmp_only: false,
        }
    }

    fn hooks(&self) -> impl Iterator<Item = u32> + use<> {
        let direction = self.direction;
        [hook::EGRESS, hook::INGRESS]
            .into_iter()
            .filter(move |hook| includes(direction, *hook))
    }
}

/// Whether `direction` includes a hook.
fn includes(direction: Direction, hook: u32) -> bool {
    match direction {
        Direction::Both => true,
        Direction::Egress => hook == hook::EGRESS,
        Direction::Ingress => hook == hook::INGRESS,
    }
}

/// The slot of a rule in the tables, where exemptions come first.
pub(super) fn rule_slot(active: &ActiveRule) -> u32 {
    MAX_EXEMPTIONS + u32::from(active.slot.0)
}

/// Sizes that a rule set must fit into.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Distinct bitmaps.
    pub bitmaps: u32,
    /// Prefixes.
    pub prefixes: u32,
}

/// Keeps the numbering of bitmaps from one rule set to the next, and the places of traces.
#[derive(Debug, Clone, Default)]
pub struct Compiler {
    indices: Indices,
    /// Traces of the rule set in force.
    traces: Traces,
}

impl Compiler {
    /// A rule set that was compiled is in force now: the places of its traces are taken, and no others.
    pub fn in_force(&mut self, image: &Image) {
        self.traces.clone_from(&image.traces);
    }

    /// The tables for a rule set.
    pub fn compile(
        &mut self,
        targets: &[TargetConfig],
        rules: &[ActiveRule],
        exempt: &[Exemption],
        capacity: Capacity,
    ) -> Result<Image, CompileError> {
        if exempt.len() > MAX_EXEMPTIONS as usize {
            return Err(CompileError::TooManyExemptions {
                count: exempt.len(),
            });
        }
        let traces = traces::place(&self.traces, rules).map_err(|NoRoom { taken, wanted }| {
            CompileError::TooManyOpportunities { taken, wanted }
        })?;
        // On an error the numbering is as before.
        let mut indices = self.indices.clone();
        indices.begin();
        let nothing = AddrSet::default();
        let entries: Vec<Entry<'_>> = (0..)
            .zip(exempt)
            .map(|(slot, exemption)| Entry::of_exemption(slot, exemption, &nothing))
            .chain(rules.iter().map(Entry::of_rule))
            .collect();
        let mut builder = Builder {
            image: Image {
                traces,
                ..Image::default()
            },
            indices: &mut indices,
            capacity,
        };
        let built = builder.build(targets, rules, &entries);
        let image = builder.image;
        match built {
            Ok(()) => {}
            Err(BuildError::Bitmaps(TooMany)) => {
                return Err(CompileError::TooManyBitmaps {
                    capacity: capacity.bitmaps,
                });
            }
            Err(BuildError::Compile(error)) => return Err(error),
        }
        check_candidates(&image, rules)?;
        self.indices = indices;
        Ok(image)
    }
}

enum BuildError {
    Bitmaps(TooMany),
    Compile(CompileError),
}

impl From<TooMany> for BuildError {
    fn from(error: TooMany) -> Self {
        Self::Bitmaps(error)
    }
}

struct Builder<'a> {
    image: Image,
    indices: &'a mut Indices,
    capacity: Capacity,
}

impl Builder<'_> {
    fn build(
        &mut self,
        targets: &[TargetConfig],
        rules: &[ActiveRule],
        entries: &[Entry<'_>],
    ) -> Result<(), BuildError> {
        self.image.bitmaps.insert(BITMAP_EMPTY, Bitmap::default());
        let mut unprotected = Bitmap::default();
        for active in rules.iter().filter(|active| active.rule.unprotected) {
            set(&mut unprotected, rule_slot(active));
        }
        self.image.bitmaps.insert(BITMAP_UNPROTECTED, unprotected);
        self.addresses(entries)?;
        self.ports(entries)?;
        self.protocols(entries)?;
        self.targets(targets, rules, entries)?;
        for active in rules {
            self.image
                .rules
                .insert(rule_slot(active), rule_entry(active));
            let mut shape = shape::shape(&active.rule.shaping);
            if let Some(placed) = self.image.traces.get(&active.activation) {
                shape.trace_start = placed.start;
            }
            self.image.shapes.insert(rule_slot(active), shape);
            let delay = active.rule.shaping.delay.as_ref();
            if let Some(table) = delay.and_then(|delay| distribution::given(&delay.distribution)) {
                self.image.give(rule_slot(active), table);
            }
        }
        if self.image.given.len() > distribution::MAX_GIVEN {
            return Err(BuildError::Compile(CompileError::TooManyDistributions));
        }
        Ok(())
    }

    fn bits(&mut self, bits: Bitmap) -> Result<u32, BuildError> {
        let index = self
            .indices
            .of(Meaning::Bits(Box::new(bits)), self.capacity.bitmaps)?;
        self.image.bitmaps.insert(index, bits);
        Ok(index)
    }

    fn targets(
        &mut self,
        targets: &[TargetConfig],
        rules: &[ActiveRule],
        entries: &[Entry<'_>],
    ) -> Result<(), BuildError> {
        for target in targets {
            let mut image = TargetImage::default();
            for hook in [hook::EGRESS, hook::INGRESS] {
                let mut bits = Bitmap::default();
                for active in rules
                    .iter()
                    .filter(|active| active.targets.contains(&target.slot))
                {
                    if includes(active.rule.selector.direction, hook) {
                        set(&mut bits, rule_slot(active));
                    }
                    image.track |= active.rule.selector.state.is_some();
                }
                if bits != Bitmap::default() {
                    for entry in entries.iter().filter(|entry| entry.slot < MAX_EXEMPTIONS) {
                        set(&mut bits, entry.slot);
                    }
                }
                image.bitmap[hook as usize] = self.bits(bits)?;
            }
            self.image.targets.insert(target.slot, image);
        }
        Ok(())
    }

    fn addresses(&mut self, entries: &[Entry<'_>]) -> Result<(), BuildError> {
        let mut conditions = Vec::new();
        for entry in entries {
            for (set, place) in entry.addresses {
                if !set.is_any() {
                    conditions.extend(entry.hooks().map(|hook| Condition {
                        slot: entry.slot,
                        role: place.role(hook),
                        set,
                    }));
                }
            }
        }
        let resolved = resolve(&conditions);
        if resolved.prefixes.len() + 3 > self.capacity.prefixes as usize {
            return Err(BuildError::Compile(CompileError::TooManyPrefixes {
                prefixes: resolved.prefixes.len(),
                capacity: self.capacity.prefixes.saturating_sub(3),
            }));
        }
        let roles = AddressRoles::new(entries, &conditions);
        // A packet without addresses meets no condition on any, not even one of exceptions only.
        let mut none = Class::default();
        let mut root = Class::default();
        for role in 0..4 {
            none.bitmap[role] = self.address_bitmap(&roles, role, roles.free[role], &[])?;
        }
        for role in 0..4 {
            let (bits, stamps) = roles.of_state(&resolved, ROOT, role);
            root.bitmap[role] = self.address_bitmap(&roles, role, bits, &stamps)?;
        }
        for (family, class) in [(family::V4, root), (family::V6, root), (family::NONE, none)] {
            self.image.prefixes.insert(
                PrefixOf {
                    family,
                    address: 0,
                    length: 0,
                },
                class,
            );
        }
        let mut classes: BTreeMap<StateId, Class> = BTreeMap::new();
        self.image.prefixes.reserve(resolved.prefixes.len());
        for (prefix, state) in &resolved.prefixes {
            let class = if let Some(class) = classes.get(state) {
                *class
            } else {
                let mut class = Class::default();
                for role in 0..4 {
                    let (bits, stamps) = roles.of_state(&resolved, *state, role);
                    class.bitmap[role] = self.address_bitmap(&roles, role, bits, &stamps)?;
                }
                classes.insert(*state, class);
                class
            };
            self.image.prefixes.insert(*prefix, class);
        }
        Ok(())
    }

    fn address_bitmap(
        &mut self,
        roles: &AddressRoles,
        role: usize,
        bits: Bitmap,
        stamps: &[u64],
    ) -> Result<u32, BuildError> {
        debug_assert!(roles.free.len() > role);
        let meaning = Meaning::Address(u8::try_from(role).unwrap_or(u8::MAX), stamps.to_vec());
        let index = self.indices.of(meaning, self.capacity.bitmaps)?;
        self.image.bitmaps.insert(index, bits);
        Ok(index)
    }

    fn ports(&mut self, entries: &[Entry<'_>]) -> Result<(), BuildError> {
        for role in 0..4 {
            let mut free = Bitmap::default();
            // Where, going up the ports, a slot comes in or goes out.
            let mut edges: Vec<(u32, u32, bool)> = Vec::new();
            for entry in entries {
                match port_ranges(entry, role) {
                    None => set(&mut free, entry.slot),
                    Some(ranges) => {
                        for (first, last) in ranges {
                            edges.push((u32::from(first), entry.slot, true));
                            edges.push((u32::from(last) + 1, entry.slot, false));
                        }
                    }
                }
            }
            edges.sort_unstable();
            let mut bits = free;
            let mut from = 0;
            for group in edges.chunk_by(|a, b| a.0 == b.0) {
                let at = group[0].0;
                self.fill_ports(role, from, at, bits)?;
                for (_, slot, on) in group {
                    if *on {
                        set(&mut bits, *slot);
                    } else {
                        clear(&mut bits, *slot);
                    }
                }
                from = at;
            }
            self.fill_ports(role, from, NO_PORT, bits)?;
            self.fill_ports(role, NO_PORT, NO_PORT + 1, free)?;
        }
        Ok(())
    }

    fn fill_ports(
        &mut self,
        role: usize,
        from: u32,
        to: u32,
        bits: Bitmap,
    ) -> Result<(), BuildError> {
        if from < to {
            let index = self.bits(bits)?;
            for class in &mut self.image.ports[from as usize..to as usize] {
                class.bitmap[role] = index;
            }
        }
        Ok(())
    }

    fn protocols(&mut self, entries: &[Entry<'_>]) -> Result<(), BuildError> {
        let mut classes = vec![Bitmap::default(); PROTOCOL_CLASSES as usize];
        for entry in entries {
            for class in protocol_classes(entry) {
                set(&mut classes[class], entry.slot);
            }
        }
        for (index, bits) in classes.into_iter().enumerate() {
            self.image.protocols[index] = self.bits(bits)?;
        }
        Ok(())
    }
}

/// By role: who asks nothing, and how many conditions the others have there.
struct AddressRoles<'a> {
    conditions: &'a [Condition<'a>],
    /// Slots without a condition.
    free: [Bitmap; 4],
    /// By slot: conditions.
    by_slot: [BTreeMap<u32, Vec<usize>>; 4],
    stamps: BTreeMap<u32, u64>,
    /// Slots all of whose conditions have exceptions only: they hold where nothing is named.
    open: [Vec<u32>; 4],
}

impl<'a> AddressRoles<'a> {
    fn new(entries: &[Entry<'_>], conditions: &'a [Condition<'a>]) -> Self {
        let mut by_slot: [BTreeMap<u32, Vec<usize>>; 4] = Default::default();
        for (index, condition) in conditions.iter().enumerate() {
            by_slot[condition.role]
                .entry(condition.slot)
                .or_default()
                .push(index);
        }
        let mut free = [Bitmap::default(); 4];
        let mut open: [Vec<u32>; 4] = Default::default();
        for role in 0..4 {
            for entry in entries {
                if !by_slot[role].contains_key(&entry.slot) {
                    set(&mut free[role], entry.slot);
                }
            }
            for (slot, own) in &by_slot[role] {
                if own
                    .iter()
                    .all(|index| conditions[*index].set.include.is_empty())
                {
                    open[role].push(*slot);
                }
            }
        }
        let stamps = entries
            .iter()
            .map(|entry| (entry.slot, entry.stamp))
            .collect();
        Self {
            conditions,
            free,
            by_slot,
            stamps,
            open,
        }
    }

    /// The bitmap of a role in a state, and the stamps of those whose conditions hold.
    fn of_state(&self, resolved: &Resolved, state: StateId, role: usize) -> (Bitmap, Vec<u64>) {
        let held: BTreeMap<usize, bool> = resolved.marks(state, self.conditions).collect();
        let holds = |slot: u32| {
            self.by_slot[role].get(&slot).is_some_and(|own| {
                own.iter().all(|index| {
                    held.get(index)
                        .copied()
                        .unwrap_or(self.conditions[*index].set.include.is_empty())
                })
            })
        };
        let mut bits = self.free[role];
        let mut stamps = Vec::new();
        let mut slots: Vec<u32> = held
            .keys()
            .filter(|index| self.conditions[**index].role == role)
            .map(|index| self.conditions[*index].slot)
            .chain(self.open[role].iter().copied())
            .collect();
        slots.sort_unstable();
        slots.dedup();
        for slot in slots {
            if holds(slot) {
                set(&mut bits, slot);
                stamps.extend(self.stamps.get(&slot));
            }
        }
        (bits, stamps)
    }
}

/// The ports that an entry asks for in a role: `None` if it asks nothing there.
fn port_ranges(entry: &Entry<'_>, role: usize) -> Option<Vec<(u16, u16)>> {
    let mut result: Option<Vec<(u16, u16)>> = None;
    for (ranges, place) in entry.ports {
        if ranges.is_empty() || !entry.hooks().any(|hook| place.role(hook) == role) {
            continue;
        }
        let mut own: Vec<(u16, u16)> = ranges
            .iter()
            .map(|range| (*range.start(), *range.end()))
            .collect();
        own.sort_unstable();
        let mut joined: Vec<(u16, u16)> = Vec::new();
        for (first, last) in own {
            match joined.last_mut() {
                Some((_, end)) if u32::from(first) <= u32::from(*end) + 1 => {
                    *end = (*end).max(last);
                }
                _ => joined.push((first, last)),
            }
        }
        result = Some(match result {
            None => joined,
            Some(before) => before
                .iter()
                .flat_map(|a| joined.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))))
                .filter(|(first, last)| first <= last)
                .collect(),
        });
    }
    result
}

fn class(kind: u8, protocol: u8) -> usize {
    usize::from(kind) << 8 | usize::from(protocol)
}

/// The protocol classes that an entry matches.
fn protocol_classes(entry: &Entry<'_>) -> Vec<usize> {
    let v4 = entry.ip_version != Some(IpVersion::V6);
    let v6 = entry.ip_version != Some(IpVersion::V4);
    let mut classes = Vec::new();
    let mut ip = |protocol: u8| {
        if v4 {
            classes.push(class(kind::V4, protocol));
        }
        if v6 {
            classes.push(class(kind::V6, protocol));
        }
    };
    if entry.protocols.is_empty() {
        (0..=255)
            .filter(|protocol| !entry.tcp_only || *protocol == 6)
            .filter(|protocol| !entry.icmp_only || matches!(protocol, 1 | 58))
            .for_each(&mut ip);
    }
    for protocol in entry.protocols {
        match protocol {
            Protocol::Ip(number) => ip(*number),
            Protocol::Nd | Protocol::Arp | Protocol::OtherEthertype => {}
        }
    }
    for protocol in entry.protocols {
        match protocol {
            Protocol::Nd if v6 => classes.push(class(kind::ND, 58)),
            Protocol::Arp if entry.ip_version.is_none() => {
                classes.push(class(kind::OTHER, injector_common::layout::OTHER_ARP));
            }
            Protocol::OtherEthertype if entry.ip_version.is_none() => {
                classes.push(class(kind::OTHER, injector_common::layout::OTHER_ETHERTYPE));
            }
            _ => {}
        }
    }
    classes
}

fn set(bitmap: &mut Bitmap, slot: u32) {
    bitmap.words[slot as usize / 64] |= 1 << (slot % 64);
}

fn clear(bitmap: &mut Bitmap, slot: u32) {
    bitmap.words[slot as usize / 64] &= !(1 << (slot % 64));
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// What the program judges packet by packet.
fn rule_entry(active: &ActiveRule) -> RuleEntry {
    let rule: &Rule = &active.rule;
    let key = rule_key(rule.seed, &rule.name);
    let mut entry = RuleEntry {
        activation: active.activation,
        identity: match rule.key {
            FlowIdentity::Tuple => identity::TUPLE,
            FlowIdentity::Service => identity::SERVICE,
            FlowIdentity::Ordinal => identity::ORDINAL,
        },
        key0: key.0,
        key1: key.1,
        activated_ns: active.activated_ns,
        deadline_ns: rule.lifetime.map_or(0, |lifetime| {
            active
                .activated_ns
                .saturating_add(nanoseconds(lifetime))
                .max(1)
        }),
        ..RuleEntry::default()
    };
    if let Some(flap) = &rule.flap {
        entry.flap_up_ns = nanoseconds(flap.up);
        entry.flap_period_ns = nanoseconds(flap.up).saturating_add(nanoseconds(flap.down));
        entry.flap_phase_ns = nanoseconds(flap.phase);
    }
    set_fault(&mut entry, &rule.fault);
    entry.needs = shape::needs(rule);
    entry.mtu = rule.shaping.mtu_blackhole.unwrap_or(0);
    set_selector(&mut entry, &rule.selector);
    entry
}

fn set_fault(entry: &mut RuleEntry, fault: &Fault) {
    (entry.fault, entry.n) = match fault {
        Fault::None => (fault::NONE, 0),
        Fault::Cut => (fault::CUT, 0),
        Fault::DropNth(n) => (fault::NTH, *n),
        Fault::DropFirst(n) => (fault::FIRST, *n),
        Fault::DropEvery(n) => (fault::EVERY, *n),
        Fault::DropOnce => (fault::ONCE, 1),
        Fault::Reject(answer) => (fault::REJECT, u64::from(answer_of(*answer))),
        Fault::DropPattern { bits, once } => {
            entry.pattern_length = u32::try_from(bits.len()).unwrap_or(0);
            for (position, _) in bits.iter().enumerate().filter(|(_, bit)| **bit) {
                entry.pattern[position / 64] |= 1 << (position % 64);
            }
            (
                if *once {
                    fault::PATTERN_ONCE
                } else {
                    fault::PATTERN
                },
                0,
            )
        }
    };
}

const fn answer_of(answer: Answer) -> u32 {
    match answer {
        Answer::Rst => answer::RST,
        Answer::IcmpHost => answer::ICMP_HOST,
        Answer::IcmpPort => answer::ICMP_PORT,
        Answer::IcmpAdmin => answer::ICMP_ADMIN,
    }
}

fn set_selector(entry: &mut RuleEntry, selector: &Selector) {
    if let Some(flags) = selector.tcp_flags {
        entry.flags |= rule_flag::TCP_FLAGS;
        entry.tcp_mask_value = u32::from_le_bytes([flags.mask, flags.value & flags.mask, 0, 0]);
    }
    if !selector.length.is_empty() {
        entry.flags |= rule_flag::LENGTH;
        for (index, range) in selector.length.iter().take(entry.lengths.len()).enumerate() {
            entry.lengths[index] = [*range.start(), *range.end()];
            entry.length_count += 1;
        }
    }
    if !selector.dscp.is_empty() {
        entry.flags |= rule_flag::DSCP;
        entry.dscp = selector
            .dscp
            .iter()
            .fold(0, |bits, code| bits | 1 << (code & 63));
    }
    if !selector.marks.is_empty() {
        entry.flags |= rule_flag::MARK;
        for (index, mark) in selector.marks.iter().take(entry.marks.len()).enumerate() {
            entry.marks[index] = [mark.value & mark.mask, mark.mask];
            entry.mark_count += 1;
        }
    }
    if !selector.icmp_types.is_empty() || !selector.icmpv6_types.is_empty() {
        entry.flags |= rule_flag::ICMP_TYPE;
        for (types, bits) in [
            (&selector.icmp_types, &mut entry.icmp_types),
            (&selector.icmpv6_types, &mut entry.icmpv6_types),
        ] {
            for icmp_type in types {
                bits[usize::from(*icmp_type) / 64] |= 1 << (icmp_type % 64);
            }
        }
    }
    match selector.state {
        Some(ConnState::New) => entry.flags |= rule_flag::STATE_NEW,
        Some(ConnState::Established) => entry.flags |= rule_flag::STATE_ESTABLISHED,
        None => {}
    }
    if let Some(share) = selector.share {
        entry.flags |= rule_flag::SHARE;
        entry.share = share;
    }
}

/// Refuses a rule set if a packet that one of its rules is for would meet too many of them. Each rule is
/// tried with one packet; what that does not find, the program counts.
fn check_candidates(image: &Image, rules: &[ActiveRule]) -> Result<(), CompileError> {
    if rules.len() <= MAX_CANDIDATES {
        return Ok(());
    }
    let names: BTreeMap<u32, &str> = rules
        .iter()
        .map(|active| (rule_slot(active), active.rule.name.as_str()))
        .collect();
    for active in rules {
        let entry = Entry::of_rule(active);
        for hook in entry.hooks() {
            for target in &active.targets {
                let met = sample(image, &entry, *target, hook);
                // Rules for a share of flows may or may not apply: they are left to the program's count.
                let met: Vec<&str> = met
                    .into_iter()
                    .filter(|slot| {
                        image
                            .rules
                            .get(slot)
                            .is_some_and(|rule| rule.flags & rule_flag::SHARE == 0)
                    })
                    .filter_map(|slot| names.get(&slot).copied())
                    .collect();
                if met.len() > MAX_CANDIDATES {
                    return Err(CompileError::TooManyForOnePacket {
                        count: met.len(),
                        names: met[..3].join(", "),
                    });
                }
            }
        }
    }
    Ok(())
}

/// The rules that a typical packet of `entry` meets.
fn sample(image: &Image, entry: &Entry<'_>, target: super::TargetSlot, hook: u32) -> Vec<u32> {
    let Some(protocol) = protocol_classes(entry).first().copied() else {
        return Vec::new();
    };
    // The longest of the prefixes that it names for a role: it lies within the others, if they meet at all.
    let named = |role: usize| -> Option<PrefixOf> {
        entry
            .addresses
            .iter()
            .filter(|(set, place)| !set.include.is_empty() && place.role(hook) == role)
            .filter_map(|(set, _)| set.include.first().map(prefix_of))
            .max_by_key(|prefix| prefix.length)
    };
    let source = role::source(hook);
    let destination = role::destination(hook);
    let (a, b) = (named(source), named(destination));
    let family = a.or(b).map_or(family::V4, |prefix| prefix.family);
    let address = |prefix: Option<PrefixOf>| {
        let prefix = prefix.unwrap_or(PrefixOf {
            family,
            address: 0,
            length: 128,
        });
        class_of(image, prefix.family, prefix.address)
    };
    let port = |role: usize| {
        let port = port_ranges(entry, role)
            .and_then(|ranges| ranges.first().copied())
            .map_or(0, |range| range.0);
        image.ports[usize::from(port)]
    };
    // Ports of protocols that have some; a rule that asks for none matches either.
    let kind = if family == family::V6 {
        kind::V6
    } else {
        kind::V4
    };
    let protocol = if protocol >> 8 <= 1 {
        class(kind, protocol.to_le_bytes()[0])
    } else {
        protocol
    };
    let indices = [
        image
            .targets
            .get(&target)
            .map_or(BITMAP_EMPTY, |target| target.bitmap[hook as usize]),
        image.protocols[protocol],
        address(a).bitmap[source],
        address(b).bitmap[destination],
        port(source).bitmap[source],
        port(destination).bitmap[destination],
    ];
    let mut bits = [u64::MAX; injector_common::layout::BITMAP_WORDS];
    for index in indices {
        let bitmap = image.bitmaps.get(&index).copied().unwrap_or_default();
        for (word, own) in bits.iter_mut().zip(bitmap.words) {
            *word &= own;
        }
    }
    (MAX_EXEMPTIONS..injector_common::layout::MAX_SLOTS)
        .filter(|slot| bits[*slot as usize / 64] >> (slot % 64) & 1 != 0)
        .collect()
}

/// The class of an address: that of the longest prefix around it.
#[must_use]
pub fn class_of(image: &Image, family: u32, address: u128) -> Class {
    let longest: u8 = if family == family::V4 { 32 } else { 128 };
    (0..=longest)
        .rev()
        .find_map(|length| {
            let masked = if length == 0 {
                0
            } else {
                address >> (128 - length) << (128 - length)
            };
            image.prefixes.get(&PrefixOf {
                family,
                address: masked,
                length,
            })
        })
        .copied()
        .unwrap_or_default()
}
