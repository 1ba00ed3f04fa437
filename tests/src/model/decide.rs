//! The model itself: state in hash maps, one linear scan over the rules per packet.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use injector::rules::model::{ConnState, Fault, FlowIdentity, Protocol, Rule};

use super::{
    FlowKey, Hook, InForce, Link, Packet, Parsed, Setup, Transport, answering, matching, parse,
    share_draw,
};

/// The model's clock begins here: far enough from zero for any age of a rule.
const START: u64 = 1_000_000_000_000_000;
/// Time between two packets.
const PACKET_GAP: Duration = Duration::from_micros(1);
/// Time before a change, so that what was seen before it is older than what it brings.
const CHANGE_GAP: Duration = Duration::from_secs(1);

/// What one rule did with a packet, or with all packets so far, in wire packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RuleOutcome {
    /// Matched while the rule acted.
    pub matched: u64,
    /// Of these, those that its fault hit.
    pub cut: u64,
    /// Lost in addition, because a super-packet is lost as a whole.
    pub excess: u64,
    /// Matched while the rule was in the up part of its flapping.
    pub off: u64,
    /// Matched while the lease had lapsed.
    pub lapsed: u64,
}

impl std::ops::AddAssign for RuleOutcome {
    fn add_assign(&mut self, other: Self) {
        self.matched += other.matched;
        self.cut += other.cut;
        self.excess += other.excess;
        self.off += other.off;
        self.lapsed += other.lapsed;
    }
}

/// What was found about packets of one target and hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TargetOutcome {
    /// Packets that could not be parsed.
    pub unparsed: u64,
    /// Later fragments whose first one is not known.
    pub orphan_fragments: u64,
}

/// What the model decided for one packet.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a finding of its own"
)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Lost.
    pub cut: bool,
    /// Lost, and its sender is told.
    pub answered: bool,
    /// Not understood, so passed.
    pub unparsed: bool,
    /// A later fragment without its first.
    pub orphan: bool,
    /// What each rule did, in the order of the setup, egress and ingress apart (on a loopback target
    /// one packet is both).
    pub per_rule: Vec<[RuleOutcome; 2]>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct FragmentKey {
    target: u16,
    hook: Hook,
    addresses: Option<(IpAddr, IpAddr)>,
    id: u32,
    protocol: u8,
}

/// What positions are counted by.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Counted {
    /// One flow of an activation, in one direction.
    Flow(u32, FlowKey, Hook),
    /// A whole activation.
    Rule(u32),
}

/// The model.
#[derive(Debug, Default)]
pub struct Model {
    setup: Arc<Setup>,
    now: u64,
    lease_lapsed: bool,
    activated: HashMap<u32, u64>,
    positions: HashMap<Counted, u64>,
    /// Flows in order of first sight, per activation and service.
    ordinals: HashMap<(u32, FlowKey), Vec<FlowKey>>,
    fragments: HashMap<FragmentKey, Transport>,
    /// When the connection began, per target and flow.
    connections: HashMap<(u16, FlowKey), u64>,
    rule_totals: HashMap<u32, [RuleOutcome; 2]>,
    target_totals: HashMap<u16, [TargetOutcome; 2]>,
}

impl Model {
    /// A model that has seen nothing yet.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let mut model = Self {
            now: START,
            ..Self::default()
        };
        model.replace(setup);
        model
    }

    /// Puts another setup into force. Activations that are in both keep what they have counted, and so
    /// do fragments and connections.
    pub fn replace(&mut self, setup: Setup) {
        self.advance(CHANGE_GAP);
        let mut activated = HashMap::new();
        for entry in &setup.rules {
            let since = match self.activated.get(&entry.activation) {
                Some(since) => *since,
                None => self.now - nanoseconds(entry.age),
            };
            activated.insert(entry.activation, since);
        }
        self.activated = activated;
        self.setup = Arc::new(setup);
    }

    /// Lets time pass.
    pub fn advance(&mut self, time: Duration) {
        self.now += nanoseconds(time);
    }

    /// Whether the lease is valid from now on.
    pub fn set_lease(&mut self, valid: bool) {
        self.lease_lapsed = !valid;
    }

    /// Forgets all first fragments: later ones are orphans.
    pub fn forget_fragments(&mut self) {
        self.fragments.clear();
    }

    /// What is in force.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// What the rules of the setup have done so far, egress and ingress.
    #[must_use]
    pub fn rule_totals(&self) -> Vec<[RuleOutcome; 2]> {
        let total = |entry: &InForce| self.rule_totals.get(&entry.activation).copied();
        self.setup
            .rules
            .iter()
            .map(|entry| total(entry).unwrap_or_default())
            .collect()
    }

    /// What was found on the targets of the setup so far, egress and ingress.
    #[must_use]
    pub fn target_totals(&self) -> Vec<[TargetOutcome; 2]> {
        let slots = self.setup.targets.iter().map(|target| target.slot);
        slots
            .map(|slot| self.target_totals.get(&slot).copied().unwrap_or_default())
            .collect()
    }

    /// Decides one packet.
    pub fn decide(&mut self, packet: &Packet) -> Decision {
        self.advance(PACKET_GAP);
        let target = self.setup.target(packet.target);
        let link = target.map_or(Link::Ethernet, |target| target.link);
        let loopback = target.is_some_and(|target| target.loopback);
        let mut decision = Decision {
            cut: false,
            answered: false,
            unparsed: false,
            orphan: false,
            per_rule: vec![[RuleOutcome::default(); 2]; self.setup.rules.len()],
        };
        // Choice: a packet that is lost on its way out of a loopback device never comes in.
        let hooks: &[Hook] = if loopback {
            &Hook::ALL
        } else {
            std::slice::from_ref(&packet.hook)
        };
        for hook in hooks {
            if !decision.cut {
                self.decide_at(packet, link, *hook, &mut decision);
            }
        }
        decision
    }

    /// Choice: where no rule is for packets of this target and hook, and none asks for connections there,
    /// a packet is not looked at: neither fragments nor what cannot be parsed are noticed.
    fn decide_at(&mut self, packet: &Packet, link: Link, hook: Hook, decision: &mut Decision) {
        if !self.setup.covers(packet.target, hook) && !self.asks_for_connections(packet.target) {
            return;
        }
        let totals = &mut self.target_totals.entry(packet.target).or_default()[hook.index()];
        let Ok(mut parsed) = parse(&packet.bytes, link, packet.protocol) else {
            totals.unparsed += 1;
            decision.unparsed = true;
            return;
        };
        decision.orphan = follow_fragments(&mut self.fragments, packet.target, hook, &mut parsed);
        if decision.orphan {
            totals.orphan_fragments += 1;
        }
        let flow = FlowKey::of(&parsed);
        self.follow_connection(packet.target, &flow, &parsed);
        let protected = self
            .setup
            .exempt
            .iter()
            .any(|entry| matching::exempt(entry, hook, &parsed));

        let setup = Arc::clone(&self.setup);
        let mut answers = Vec::new();
        let mut silent = false;
        for (index, entry) in setup.rules.iter().enumerate() {
            if protected && !entry.rule.unprotected {
                continue;
            }
            let outcome = self.apply(entry, packet, hook, &parsed, &flow);
            if outcome.cut > 0 {
                decision.cut = true;
                match entry.rule.fault {
                    Fault::Reject(answer) => answers.push(answer),
                    _ => silent = true,
                }
            }
            decision.per_rule[index][hook.index()] += outcome;
            self.rule_totals.entry(entry.activation).or_default()[hook.index()] += outcome;
        }
        // Choice: of several answers one is given, and none if another rule is silent.
        decision.answered = !silent
            && answers
                .into_iter()
                .any(|answer| answering::may_answer(answer, packet, link, &parsed));
    }

    /// What one rule does with one packet.
    fn apply(
        &mut self,
        entry: &InForce,
        packet: &Packet,
        hook: Hook,
        parsed: &Parsed,
        flow: &FlowKey,
    ) -> RuleOutcome {
        let mut outcome = RuleOutcome::default();
        let selector = &entry.rule.selector;
        let concerns_flow = entry.targets.contains(&packet.target)
            && matching::flow_matches(selector, hook, parsed)
            && self.in_share(entry, flow);
        if !concerns_flow
            || !self.in_state(entry, packet.target, flow)
            || !matching::packet_matches(selector, packet, parsed)
        {
            return outcome;
        }
        let wires = matching::wire_packets(packet, parsed);
        let matched = wires
            .iter()
            .filter(|wire| matching::wire_matches(selector, wire))
            .count() as u64;

        // Choice: a rule whose life is over does nothing and counts nothing, whatever else holds; one
        // whose lease has lapsed counts that, whatever its flapping says.
        let age = self.now - self.activated[&entry.activation];
        if entry
            .rule
            .lifetime
            .is_some_and(|lifetime| age >= nanoseconds(lifetime))
        {
            return outcome;
        }
        if self.lease_lapsed {
            outcome.lapsed = matched;
            return outcome;
        }
        if is_up(&entry.rule, age) {
            outcome.off = matched;
            return outcome;
        }

        let counted = match entry.rule.fault {
            Fault::DropOnce => Counted::Rule(entry.activation),
            _ => Counted::Flow(entry.activation, flow.for_positions(entry.rule.key), hook),
        };
        let position = self.positions.entry(counted).or_default();
        for _ in 0..matched {
            *position += 1;
            outcome.matched += 1;
            if hits(&entry.rule.fault, *position) {
                outcome.cut += 1;
            }
        }
        if outcome.cut > 0 {
            outcome.excess = wires.len() as u64 - outcome.cut;
        }
        outcome
    }

    fn in_share(&mut self, entry: &InForce, flow: &FlowKey) -> bool {
        let rule = &entry.rule;
        let Some(threshold) = rule.selector.share else {
            return true;
        };
        let draw = match rule.key {
            FlowIdentity::Tuple => share_draw(rule.seed, &rule.name, flow, None),
            FlowIdentity::Service => share_draw(rule.seed, &rule.name, &flow.service(), None),
            FlowIdentity::Ordinal => {
                let service = flow.service();
                let seen = self
                    .ordinals
                    .entry((entry.activation, service))
                    .or_default();
                let index = seen
                    .iter()
                    .position(|known| known == flow)
                    .unwrap_or_else(|| {
                        seen.push(*flow);
                        seen.len() - 1
                    });
                share_draw(rule.seed, &rule.name, &service, Some(index as u64 + 1))
            }
        };
        u64::from(draw) < threshold
    }

    fn in_state(&self, entry: &InForce, target: u16, flow: &FlowKey) -> bool {
        let Some(wanted) = entry.rule.selector.state else {
            return true;
        };
        let began = self.connections.get(&(target, *flow));
        let is_new = began.is_some_and(|began| *began >= self.activated[&entry.activation]);
        match wanted {
            ConnState::New => is_new,
            ConnState::Established => !is_new,
        }
    }

    fn asks_for_connections(&self, target: u16) -> bool {
        self.setup
            .rules
            .iter()
            .any(|entry| entry.rule.selector.state.is_some() && entry.targets.contains(&target))
    }

    /// Keeps the table of connections. Choice: what is in it stays while no rule asks; a later fragment
    /// never opens a connection again, although it takes over the flags of its first one.
    fn follow_connection(&mut self, target: u16, flow: &FlowKey, parsed: &Parsed) {
        if !self.asks_for_connections(target) {
            return;
        }
        let key = (target, *flow);
        match parsed.transport.protocol {
            Protocol::Ip(6) => {
                let later = parsed.fragment.is_some_and(|fragment| !fragment.first);
                let opens = parsed
                    .transport
                    .tcp_flags
                    .is_some_and(|flags| flags & 0x12 == 0x02);
                if opens && !later {
                    self.connections.insert(key, self.now);
                }
            }
            Protocol::Ip(132) => {
                if parsed.sctp_chunk == Some(1) {
                    self.connections.insert(key, self.now);
                }
            }
            _ => {
                self.connections.entry(key).or_insert(self.now);
            }
        }
    }
}

/// Remembers first fragments and completes later ones. Tells whether it is a later one whose first
/// is not known.
fn follow_fragments(
    known: &mut HashMap<FragmentKey, Transport>,
    target: u16,
    hook: Hook,
    parsed: &mut Parsed,
) -> bool {
    let Some(fragment) = parsed.fragment else {
        return false;
    };
    let key = FragmentKey {
        target,
        hook,
        addresses: parsed.addresses,
        id: fragment.id,
        protocol: fragment.protocol,
    };
    if fragment.first {
        if fragment.more {
            known.insert(key, parsed.transport);
        }
        return false;
    }
    match known.get(&key) {
        Some(transport) => {
            parsed.transport = *transport;
            false
        }
        None => true,
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn is_up(rule: &Rule, age: u64) -> bool {
    rule.flap.is_some_and(|flap| {
        let cycle = nanoseconds(flap.up) + nanoseconds(flap.down);
        (age + nanoseconds(flap.phase)) % cycle < nanoseconds(flap.up)
    })
}

/// Whether a fault hits the packet at a position, from 1.
fn hits(fault: &Fault, position: u64) -> bool {
    match fault {
        Fault::Cut | Fault::Reject(_) => true,
        Fault::DropNth(n) => position == *n,
        Fault::DropFirst(n) => position <= *n,
        Fault::DropEvery(n) => position.is_multiple_of(*n),
        Fault::DropPattern { bits, once } => {
            let index = position - 1;
            let length = bits.len() as u64;
            if *once && index >= length {
                return false;
            }
            usize::try_from(index % length).is_ok_and(|index| bits[index])
        }
        Fault::DropOnce => position == 1,
        Fault::None => false,
    }
}
