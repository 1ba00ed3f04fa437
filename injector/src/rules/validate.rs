//! From text to a validated rule: every field on its own, then what the fields say together.

use std::{collections::HashSet, fmt, ops::RangeInclusive, time::Duration};

use ipnet::IpNet;

use super::{
    error::{Problem, SpecError, marked},
    model::{
        AddrSet, Answer, ConnState, Direction, Fault, FlowIdentity, IpVersion, MAX_LENGTH,
        MAX_LENGTH_RANGES, MAX_MARKS, MAX_PATTERN_BITS, NetnsRef, Protocol, Rule, Selector,
    },
    name,
    shaping::Shaping,
    spec::{FaultSpec, RuleSpec},
    text::{
        address, dscp, duration, entries, flap, icmp, mark, netns, protocol, range, share,
        tcp_flags,
    },
};

/// The longest interface name (IFNAMSIZ without its final zero byte, include/uapi/linux/if.h).
const MAX_INTERFACE_NAME: usize = 15;

const TCP: Protocol = Protocol::Ip(6);
const ICMP: Protocol = Protocol::Ip(1);
const ICMPV6: Protocol = Protocol::Ip(58);

/// The faults that a rule has one of.
fn one_position() -> String {
    let all = FaultSpec::POSITIONAL.map(|fault| match fault {
        "drop_pattern" => "`drop_pattern` (with `once` where wanted)".to_owned(),
        other => format!("`{other}`"),
    });
    format!("one of {}", all.join(", "))
}

/// All faults.
fn faults() -> String {
    format!(
        "{}; and any of {}",
        one_position(),
        marked(&FaultSpec::COMBINED)
    )
}

/// Draws a seed. Seeds stay below 2^53, which JSON readers that know only floating point numbers
/// keep exact.
#[must_use]
pub fn draw_seed() -> u64 {
    rand::random::<u64>() >> 11
}

impl RuleSpec {
    /// Validates the text and gives the rule that it means. A missing seed is drawn at random, a
    /// missing name is made from the content.
    pub fn parse(&self) -> Result<Rule, SpecError> {
        let mut rule = Rule {
            name: String::new(),
            name_generated: false,
            group: optional("group", self.group.as_ref(), |text| {
                name::check_name(text).map(|()| text.to_owned())
            })?,
            netns: optional("netns", self.netns.as_ref(), netns::parse)?.unwrap_or(NetnsRef::Own),
            interfaces: interfaces(&self.iface)?,
            selector: selector(self)?,
            fault: fault(&self.fault)?,
            shaping: Shaping::parse(&self.fault)?,
            lifetime: optional("for", self.lifetime.as_ref(), lifetime)?,
            flap: optional("flap", self.flap.as_ref(), flap::parse)?,
            seed: self.seed.unwrap_or_else(draw_seed),
            key: optional("key", self.key.as_ref(), key)?.unwrap_or_default(),
            all_traffic: self.all_traffic,
            unprotected: self.unprotected,
        };
        check_reject(&rule)?;
        let generated = name::generate_name(&rule);
        if let Some(given) = &self.name {
            name::check_name(given).map_err(|problem| problem.of("name", given))?;
            rule.name.clone_from(given);
            rule.name_generated = *given == generated;
        } else {
            rule.name = generated;
            rule.name_generated = true;
        }
        if is_unconstrained(&rule.selector) && !rule.all_traffic {
            return Err(SpecError::field(
                "all_traffic",
                format!(
                    "nothing limits this rule, so it would act on all traffic of {}",
                    rule.interfaces.join(", ")
                ),
                "say which packets are meant (addresses, ports, a protocol, a share of flows …), or \
                 ask for it with `all_traffic`",
            ));
        }
        Ok(rule)
    }
}

impl TryFrom<&RuleSpec> for Rule {
    type Error = SpecError;

    fn try_from(spec: &RuleSpec) -> Result<Rule, SpecError> {
        spec.parse()
    }
}

/// Whether a selector matches (nearly) everything: it names no address beyond prefixes that cover a
/// whole family, no port, protocol, ICMP type, flag, length, DSCP, mark or share. Direction, IP
/// version and connection state alone do not count as limits.
#[must_use]
pub fn is_unconstrained(selector: &Selector) -> bool {
    let whole_ports =
        |ranges: &[RangeInclusive<u16>]| ranges.is_empty() || ranges.contains(&(0..=u16::MAX));
    [
        &selector.peer,
        &selector.local,
        &selector.src,
        &selector.dst,
    ]
    .into_iter()
    .all(covers_a_family)
        && [
            &selector.peer_port,
            &selector.local_port,
            &selector.src_port,
            &selector.dst_port,
        ]
        .into_iter()
        .all(|ranges| whole_ports(ranges))
        && selector.protocols.is_empty()
        && selector.icmp_types.is_empty()
        && selector.icmpv6_types.is_empty()
        && selector.tcp_flags.is_none()
        && (selector.length.is_empty() || selector.length.contains(&(0..=MAX_LENGTH)))
        && selector.dscp.is_empty()
        && selector.marks.is_empty()
        && selector
            .share
            .is_none_or(|threshold| threshold >= share::ALL)
}

/// Whether a set takes in at least one family whole (two halves are a whole) and excepts nothing.
fn covers_a_family(set: &AddrSet) -> bool {
    let except = set.except.iter().any(|prefix| prefix.prefix_len() > 0);
    // Aggregation sorts; sets of a million prefixes do not come near a whole family without a short
    // prefix, so look at it only where one is there.
    let wide = set.include.iter().any(|prefix| prefix.prefix_len() <= 8);
    !except
        && (set.include.is_empty()
            || (wide
                && IpNet::aggregate(&set.include)
                    .iter()
                    .any(|net| net.prefix_len() == 0)))
}

fn optional<T>(
    field: &'static str,
    text: Option<&String>,
    parse: impl FnOnce(&str) -> Result<T, Problem>,
) -> Result<Option<T>, SpecError> {
    text.map(|text| parse(text).map_err(|problem| problem.of(field, text)))
        .transpose()
}

/// Every entry of a list, read by `parse`.
fn list<T>(
    field: &'static str,
    texts: &[String],
    parse: impl Fn(&str) -> Result<T, Problem>,
) -> Result<Vec<T>, SpecError> {
    entries(texts)
        .map(|entry| {
            let entry = entry.map_err(|problem| problem.of(field, &texts.join(",")))?;
            parse(entry).map_err(|problem| problem.of(field, entry))
        })
        .collect()
}

/// The same for lists that are sets: in order, without duplicates.
fn sorted<T: Ord>(
    field: &'static str,
    texts: &[String],
    parse: impl Fn(&str) -> Result<T, Problem>,
) -> Result<Vec<T>, SpecError> {
    let mut all = list(field, texts, parse)?;
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

fn interfaces(texts: &[String]) -> Result<Vec<String>, SpecError> {
    const HELP: &str = "the name of an interface as `ip link` shows it, such as eth0";
    let all = list("iface", texts, |text| {
        let wrong = |problem: String| Err(Problem::new(problem, HELP));
        if text.len() > MAX_INTERFACE_NAME {
            return wrong(format!(
                "is {} bytes long, an interface name has at most {MAX_INTERFACE_NAME}",
                text.len()
            ));
        }
        if text == "." || text == ".." || text.contains(['/', ':', '\0']) {
            return wrong("cannot be the name of an interface".to_owned());
        }
        if text.contains(char::is_whitespace) {
            return wrong("contains white space".to_owned());
        }
        Ok(text.to_owned())
    })?;
    if all.is_empty() {
        return Err(SpecError::field("iface", "no interface is given", HELP));
    }
    let mut seen = HashSet::new();
    match all.iter().find(|name| !seen.insert(name.as_str())) {
        Some(twice) => {
            Err(Problem::new("is given twice", "each interface once").of("iface", twice))
        }
        None => Ok(all),
    }
}

fn lifetime(text: &str) -> Result<Duration, Problem> {
    match duration::parse(text)? {
        Duration::ZERO => Err(Problem::new(
            "is no time at all",
            "a lifetime above zero, such as 30s; without one the rule stays until it is healed",
        )),
        lifetime => Ok(lifetime),
    }
}

fn key(text: &str) -> Result<FlowIdentity, Problem> {
    match text {
        "tuple" => Ok(FlowIdentity::Tuple),
        "service" => Ok(FlowIdentity::Service),
        "ordinal" => Ok(FlowIdentity::Ordinal),
        _ => Err(Problem::new(
            "is not a flow identity",
            "tuple, service or ordinal",
        )),
    }
}

fn fault(spec: &FaultSpec) -> Result<Fault, SpecError> {
    let mut found: Vec<(&'static str, Fault)> = Vec::new();
    let positive = |field: &'static str, n: u64| {
        if n == 0 {
            let problem = Problem::new("packets are counted from 1", "a number of at least 1");
            Err(problem.of(field, "0"))
        } else {
            Ok(n)
        }
    };
    if spec.cut {
        found.push(("cut", Fault::Cut));
    }
    if let Some(n) = spec.drop_nth {
        found.push(("drop_nth", Fault::DropNth(positive("drop_nth", n)?)));
    }
    if let Some(n) = spec.drop_first {
        found.push(("drop_first", Fault::DropFirst(positive("drop_first", n)?)));
    }
    if let Some(n) = spec.drop_every {
        found.push(("drop_every", Fault::DropEvery(positive("drop_every", n)?)));
    }
    if let Some(text) = &spec.drop_pattern {
        let bits = pattern(text).map_err(|problem| problem.of("drop_pattern", text))?;
        found.push((
            "drop_pattern",
            Fault::DropPattern {
                bits,
                once: spec.once,
            },
        ));
    }
    if spec.drop_once {
        found.push(("drop_once", Fault::DropOnce));
    }
    if let Some(text) = &spec.reject {
        let answer = answer(text).map_err(|problem| problem.of("reject", text))?;
        found.push(("reject", Fault::Reject(answer)));
    }
    if spec.once && spec.drop_pattern.is_none() {
        return Err(SpecError::field(
            "once",
            "goes with `drop_pattern` only",
            "for the loss of a single packet use `drop_once`",
        ));
    }
    if found.len() > 1 {
        let names: Vec<String> = found.iter().map(|(name, _)| format!("`{name}`")).collect();
        return Err(SpecError::field(
            "fault",
            format!("{} are given together", names.join(" and ")),
            format!("{}; give a rule of its own to each", one_position()),
        ));
    }
    match found.pop() {
        Some((_, fault)) => Ok(fault),
        None if spec.is_empty() => Err(SpecError::field("fault", "none is given", faults())),
        None => Ok(Fault::None),
    }
}

fn answer(text: &str) -> Result<Answer, Problem> {
    Answer::ALL
        .into_iter()
        .find(|answer| answer.name() == text)
        .ok_or_else(|| {
            let names = Answer::ALL.map(Answer::name);
            Problem::new("is not an answer", names.join(", "))
        })
}

/// What a rule that rejects has to say besides.
fn check_reject(rule: &Rule) -> Result<(), SpecError> {
    let Fault::Reject(answer) = rule.fault else {
        return Ok(());
    };
    if !rule.shaping.is_empty() {
        return Err(SpecError::field(
            "reject",
            format!(
                "every packet is answered, none is left to {}",
                rule.shaping.describe().join(" or ")
            ),
            "give a rule of its own to each",
        ));
    }
    let tcp_only = rule.selector.tcp_flags.is_some() || rule.selector.protocols == [TCP];
    if answer == Answer::Rst && !tcp_only {
        return Err(SpecError::field(
            "reject",
            "rst answers TCP only, and the rule is not for TCP only",
            "`proto` tcp, or one of icmp-host, icmp-port, icmp-admin",
        ));
    }
    Ok(())
}

fn pattern(text: &str) -> Result<Vec<bool>, Problem> {
    let help = format!(
        "1 to {MAX_PATTERN_BITS} digits 0 (passes) and 1 (is lost), at least one of them 1, as in 0010"
    );
    if text.is_empty() {
        return Err(Problem::new("the pattern is empty", help));
    }
    let bits = text
        .chars()
        .map(|digit| match digit {
            '0' => Ok(false),
            '1' => Ok(true),
            other => Err(Problem::new(
                format!("{other:?} is neither 0 nor 1"),
                help.clone(),
            )),
        })
        .collect::<Result<Vec<bool>, Problem>>()?;
    if bits.len() > MAX_PATTERN_BITS {
        return Err(Problem::new(format!("has {} digits", bits.len()), help));
    }
    if !bits.contains(&true) {
        return Err(Problem::new("loses no packet at all", help));
    }
    Ok(bits)
}

fn selector(spec: &RuleSpec) -> Result<Selector, SpecError> {
    let mut peer = addresses("peer", &spec.peer)?;
    let except = list("except", &spec.except, |text| {
        address::parse_prefix(text.strip_prefix('!').unwrap_or(text))
    })?;
    peer.except.extend(except);
    address::normalise(&mut peer);
    let mut selector = Selector {
        direction: optional("direction", spec.direction.as_ref(), direction)?.unwrap_or_default(),
        peer,
        local: addresses("local", &spec.local)?,
        src: addresses("src", &spec.src)?,
        dst: addresses("dst", &spec.dst)?,
        peer_port: ports("peer_port", &spec.peer_port)?,
        local_port: ports("local_port", &spec.local_port)?,
        src_port: ports("src_port", &spec.src_port)?,
        dst_port: ports("dst_port", &spec.dst_port)?,
        protocols: sorted("proto", &spec.proto, protocol::parse)?,
        ip_version: spec.ip_version.map(ip_version).transpose()?,
        icmp_types: Vec::new(),
        icmpv6_types: Vec::new(),
        tcp_flags: optional("tcp_flags", spec.tcp_flags.as_ref(), tcp_flags::parse)?,
        length: ranges("length", &spec.length, MAX_LENGTH)?,
        dscp: sorted("dscp", &spec.dscp, dscp::parse)?,
        marks: Vec::new(),
        share: optional("flows", spec.flows.as_ref(), share::parse)?,
        state: optional("state", spec.state.as_ref(), state)?,
    };
    at_most("length", "ranges", selector.length.len(), MAX_LENGTH_RANGES)?;
    let mut marks = list("mark", &spec.mark, mark::parse)?;
    marks.sort_unstable_by_key(|mark| (mark.value, mark.mask));
    marks.dedup();
    at_most("mark", "marks", marks.len(), MAX_MARKS)?;
    selector.marks = marks;

    icmp_types(&mut selector, &spec.icmp_type)?;
    tcp_flags_mean_tcp(&mut selector)?;
    ports_need_ports(&selector)?;
    one_family(&selector)?;
    Ok(selector)
}

fn at_most(field: &'static str, what: &str, count: usize, most: usize) -> Result<(), SpecError> {
    if count <= most {
        return Ok(());
    }
    Err(SpecError::field(
        field,
        format!("{count} {what} are given"),
        format!("at most {most} in one rule; give the others a rule of their own"),
    ))
}

fn direction(text: &str) -> Result<Direction, Problem> {
    match text {
        "egress" => Ok(Direction::Egress),
        "ingress" => Ok(Direction::Ingress),
        "both" => Ok(Direction::Both),
        _ => Err(Problem::new(
            "is not a direction",
            "egress, ingress or both",
        )),
    }
}

fn state(text: &str) -> Result<ConnState, Problem> {
    match text {
        "new" => Ok(ConnState::New),
        "established" => Ok(ConnState::Established),
        _ => Err(Problem::new(
            "is not a state of a connection",
            "new or established",
        )),
    }
}

fn ip_version(number: u8) -> Result<IpVersion, SpecError> {
    match number {
        4 => Ok(IpVersion::V4),
        6 => Ok(IpVersion::V6),
        other => {
            let problem = Problem::new("is not an IP version", "4 or 6");
            Err(problem.of("ip_version", &other.to_string()))
        }
    }
}

fn addresses(field: &'static str, texts: &[String]) -> Result<AddrSet, SpecError> {
    let mut set = AddrSet::default();
    for (except, prefix) in list(field, texts, |text| match text.strip_prefix('!') {
        Some(text) => address::parse_prefix(text).map(|prefix| (true, prefix)),
        None => address::parse_prefix(text).map(|prefix| (false, prefix)),
    })? {
        if except {
            &mut set.except
        } else {
            &mut set.include
        }
        .push(prefix);
    }
    address::normalise(&mut set);
    Ok(set)
}

fn ranges(
    field: &'static str,
    texts: &[String],
    max: u32,
) -> Result<Vec<RangeInclusive<u32>>, SpecError> {
    list(field, texts, |text| range::parse(text, max)).map(range::normalise)
}

fn ports(field: &'static str, texts: &[String]) -> Result<Vec<RangeInclusive<u16>>, SpecError> {
    let narrow = |port: u32| u16::try_from(port).unwrap_or(u16::MAX);
    Ok(ranges(field, texts, u32::from(u16::MAX))?
        .into_iter()
        .map(|range| narrow(*range.start())..=narrow(*range.end()))
        .collect())
}

/// Types of ICMP are for the families that the rule is for at all, and imply the protocols.
fn icmp_types(selector: &mut Selector, texts: &[String]) -> Result<(), SpecError> {
    if texts.is_empty() {
        return Ok(());
    }
    if let Some(&other) = selector
        .protocols
        .iter()
        .find(|&&p| ![ICMP, ICMPV6, Protocol::Nd].contains(&p))
    {
        return Err(SpecError::field(
            "icmp_type",
            format!(
                "packets of `proto` {} have no ICMP type",
                protocol::format(other)
            ),
            "leave `proto` out or limit it to icmp, icmpv6 and nd; give other protocols a rule of \
             their own",
        ));
    }
    let (families, _) = families(selector);
    let named = |protocol| selector.protocols.is_empty() || selector.protocols.contains(&protocol);
    let (mut v4, mut v6, mut protocols) = (Vec::new(), Vec::new(), Vec::new());
    for (text, found) in list("icmp_type", texts, |text| {
        icmp::parse(text).map(|found| (text.to_owned(), found))
    })? {
        let mut used = false;
        if let Some(number) = found.v4
            && families.v4
            && named(ICMP)
        {
            v4.push(number);
            protocols.push(ICMP);
            used = true;
        }
        if let Some(number) = found.v6
            && families.v6
        {
            let class = if icmp::is_neighbour_discovery(number) {
                Protocol::Nd
            } else {
                ICMPV6
            };
            if named(class) {
                v6.push(number);
                protocols.push(class);
                used = true;
            }
        }
        if !used {
            return Err(Problem::new(
                "matches no packet of the protocols and addresses of this rule",
                "types 133 to 137 of ICMPv6 are `proto` nd, its others icmpv6; types of ICMP need \
                 IPv4, those of ICMPv6 need IPv6",
            )
            .of("icmp_type", &text));
        }
    }
    for list in [&mut v4, &mut v6] {
        list.sort_unstable();
        list.dedup();
    }
    protocols.sort_unstable();
    protocols.dedup();
    selector.icmp_types = v4;
    selector.icmpv6_types = v6;
    selector.protocols = protocols;
    Ok(())
}

fn tcp_flags_mean_tcp(selector: &mut Selector) -> Result<(), SpecError> {
    if selector.tcp_flags.is_none() {
        return Ok(());
    }
    if selector.protocols.is_empty() {
        selector.protocols = vec![TCP];
    }
    match selector.protocols.iter().find(|&&protocol| protocol != TCP) {
        None => Ok(()),
        Some(&other) => Err(SpecError::field(
            "tcp_flags",
            format!(
                "packets of `proto` {} have no TCP flags",
                protocol::format(other)
            ),
            "leave `proto` out or limit it to tcp; give other protocols a rule of their own",
        )),
    }
}

fn ports_need_ports(selector: &Selector) -> Result<(), SpecError> {
    let Some((field, _)) = [
        ("peer_port", &selector.peer_port),
        ("local_port", &selector.local_port),
        ("src_port", &selector.src_port),
        ("dst_port", &selector.dst_port),
    ]
    .into_iter()
    .find(|(_, ranges)| !ranges.is_empty()) else {
        return Ok(());
    };
    let has_ports = |protocol: &Protocol| matches!(protocol, Protocol::Ip(6 | 17 | 132));
    match selector
        .protocols
        .iter()
        .find(|protocol| !has_ports(protocol))
    {
        None => Ok(()),
        Some(&other) => Err(SpecError::field(
            field,
            format!(
                "packets of `proto` {} have no ports",
                protocol::format(other)
            ),
            "leave `proto` out or limit it to tcp, udp and sctp; give other protocols a rule of their \
             own",
        )),
    }
}

/// The IP versions that something leaves possible.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    const BOTH: Families = Families { v4: true, v6: true };

    fn and(self, other: Families) -> Families {
        Families {
            v4: self.v4 && other.v4,
            v6: self.v6 && other.v6,
        }
    }

    fn is_empty(self) -> bool {
        !self.v4 && !self.v6
    }
}

/// Which families one part of a selector leaves.
struct Limit {
    field: &'static str,
    /// What stands there, as the user may write it; its first entry if it is a list.
    value: Option<String>,
    left: Families,
}

impl Limit {
    /// The value in front of what is said of it.
    fn prefix(&self) -> String {
        self.value
            .as_ref()
            .map(|value| format!("{value} "))
            .unwrap_or_default()
    }
}

/// A network as a user writes it: a single address without its length.
fn written(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() {
        net.addr().to_string()
    } else {
        net.to_string()
    }
}

impl fmt::Display for Families {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.v4, self.v6) {
            (true, false) => "IPv4",
            (false, true) => "IPv6",
            (true, true) => "IPv4 and IPv6",
            (false, false) => "neither IPv4 nor IPv6",
        })
    }
}

/// The families that are left by everything together, and those of each part that limits them.
fn families(selector: &Selector) -> (Families, Vec<Limit>) {
    let mut limits: Vec<Limit> = Vec::new();
    for (field, set) in [
        ("peer", &selector.peer),
        ("local", &selector.local),
        ("src", &selector.src),
        ("dst", &selector.dst),
    ] {
        if !set.include.is_empty() {
            let v4 = set.include.iter().any(|net| net.addr().is_ipv4());
            let v6 = set.include.iter().any(|net| net.addr().is_ipv6());
            limits.push(Limit {
                field,
                // One of a family is enough to tell by.
                value: set.include.first().map(written),
                left: Families { v4, v6 },
            });
        }
    }
    if let Some(version) = selector.ip_version {
        let v4 = version == IpVersion::V4;
        limits.push(Limit {
            field: "ip_version",
            value: Some(if v4 { "4" } else { "6" }.to_owned()),
            left: Families { v4, v6: !v4 },
        });
    }
    if !selector.protocols.is_empty() {
        let mut of_protocols = Families {
            v4: false,
            v6: false,
        };
        for protocol in &selector.protocols {
            match *protocol {
                ICMP | Protocol::Arp => of_protocols.v4 = true,
                ICMPV6 | Protocol::Nd => of_protocols.v6 = true,
                Protocol::Ip(_) => of_protocols = Families::BOTH,
                Protocol::OtherEthertype => {}
            }
        }
        limits.push(Limit {
            field: "proto",
            value: None,
            left: of_protocols,
        });
    }
    let left = limits
        .iter()
        .fold(Families::BOTH, |left, limit| left.and(limit.left));
    (left, limits)
}

/// Refuses a rule that no packet can match because its parts are of different IP versions.
fn one_family(selector: &Selector) -> Result<(), SpecError> {
    if selector.protocols == [Protocol::OtherEthertype] {
        let ip_only = [
            ("peer", !selector.peer.is_any()),
            ("local", !selector.local.is_any()),
            ("src", !selector.src.is_any()),
            ("dst", !selector.dst.is_any()),
            ("ip_version", selector.ip_version.is_some()),
            ("dscp", !selector.dscp.is_empty()),
        ];
        return match ip_only.into_iter().find(|&(_, given)| given) {
            None => Ok(()),
            Some((field, _)) => Err(SpecError::field(
                field,
                "packets of `proto` other are not IP and have none",
                "leave it out, or give IP packets a rule of their own",
            )),
        };
    }
    let (left, limits) = families(selector);
    if !left.is_empty() {
        return Ok(());
    }
    // Two parts always suffice to name: each part leaves IPv4, IPv6 or both.
    let first = limits.iter().find(|limit| limit.left != Families::BOTH);
    let second = first.and_then(|one| {
        limits
            .iter()
            .find(|limit| one.left.and(limit.left).is_empty())
    });
    match (first, second) {
        (Some(one), Some(other)) => Err(SpecError::field(
            one.field,
            format!(
                "{}leaves only {} and `{}`{} only {}, so no packet can match",
                one.prefix(),
                one.left,
                other.field,
                other
                    .value
                    .as_ref()
                    .map(|value| format!(" {value}"))
                    .unwrap_or_default(),
                other.left
            ),
            "use addresses of one family in a rule, or both families in each of its lists",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::rules::Surface;

    /// The rule of a text form that has an interface and a fault already.
    fn parse(fields: &str) -> Result<Rule, SpecError> {
        let mut text = r#"{"iface":["eth0"]"#.to_owned();
        if !fields.contains("\"fault\"") {
            text.push_str(r#","fault":{"cut":true}"#);
        }
        if !fields.is_empty() {
            write!(text, ",{fields}").unwrap();
        }
        text.push('}');
        serde_json::from_str::<RuleSpec>(&text)
            .expect(&text)
            .parse()
    }

    fn error(fields: &str) -> SpecError {
        let error = parse(fields).expect_err(fields);
        error.assert_speaks_of_flags();
        error
    }

    #[test]
    fn text_to_rule_and_back_is_the_identity() {
        for fields in [
            r#""peer":"10.0.0.1""#,
            r#""peer":["10.2.0.0/16","10.0.0.0/8","!10.1.0.0/16","10.2.0.0/16"],"except":"10.3.0.0/16""#,
            r#""name":"r1","group":"g","netns":"1234","peer":"fd00::/64","direction":"egress""#,
            r#""netns":"/proc/1/ns/net","local":"10.0.0.1,fd00::1","src":"::/0","dst":"!10.0.0.1""#,
            r#""peer_port":"8000-8080,80,81","local_port":["1024-"],"src_port":"-10","dst_port":5"#,
            r#""proto":"udp,tcp,arp,nd,other,200""#,
            r#""icmp_type":"echo-request,destination-unreachable,135,77""#,
            r#""icmp_type":"icmpv6/echo-request,icmp/echo-reply""#,
            r#""icmp_type":"echo-request","ip_version":6"#,
            r#""tcp_flags":"syn,!ack","state":"new""#,
            r#""length":"1400-,-100,200-300","dscp":"ef,1","mark":"0x10/0xff,7","flows":"12.5%""#,
            r#""proto":"tcp","for":"1m30s","flap":"up=3s,down=500ms,phase=1s","seed":18446744073709551615"#,
            r#""proto":"tcp","key":"ordinal","fault":{"drop_pattern":"0010","once":true}"#,
            r#""proto":"tcp","key":"service","fault":{"drop_nth":5}"#,
            r#""proto":"tcp","key":"tuple","fault":{"drop_first":5}"#,
            r#""proto":"tcp","fault":{"drop_every":5},"unprotected":true"#,
            r#""all_traffic":true,"fault":{"drop_once":true}"#,
            r#""proto":"tcp","fault":{"reject":"rst"}"#,
            r#""tcp_flags":"syn","fault":{"reject":"rst"}"#,
            r#""peer":"10.0.0.1","fault":{"reject":"icmp-host"}"#,
            r#""peer":"10.0.0.1","fault":{"reject":"icmp-port"}"#,
            r#""peer":"10.0.0.1","fault":{"reject":"icmp-admin"}"#,
        ] {
            let rule = parse(fields).unwrap_or_else(|error| panic!("{fields}: {error}"));
            let spec = RuleSpec::from(&rule);
            let json = serde_json::to_string(&spec).unwrap();
            let again: RuleSpec = serde_json::from_str(&json).unwrap();
            assert_eq!(again, spec);
            assert_eq!(again.parse().unwrap(), rule, "{json}");
            assert_eq!(RuleSpec::from(&again.parse().unwrap()), spec);
        }
    }

    /// A small generator (xorshift) is enough: the point is to combine fields.
    #[test]
    fn combinations_come_back_too() {
        let choices: [(&str, &[&str]); 9] = [
            (
                "peer",
                &[
                    r#""10.0.0.0/8""#,
                    r#"["fd00::1","!fd00::/120"]"#,
                    r#""10.0.0.1,fd00::1""#,
                ],
            ),
            ("local", &[r#""10.0.0.2""#, r#"["fd00::2","10.0.0.3"]"#]),
            ("peer_port", &[r"80", r#""1-10,5-20""#]),
            (
                "proto",
                &[
                    r#""tcp""#,
                    r#"["tcp","udp"]"#,
                    r#""icmp""#,
                    r#""nd,icmpv6""#,
                ],
            ),
            ("icmp_type", &[r#""echo-reply""#, r"[8,3]"]),
            ("flows", &[r#""25%""#, r#""0.00001%""#]),
            ("ip_version", &["4", "6"]),
            ("flap", &[r#""up=1s,down=2s""#]),
            ("fault", &[r#"{"drop_nth":3}"#, r#"{"drop_pattern":"01"}"#]),
        ];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut draw = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % u64::try_from(below).unwrap()).unwrap()
        };
        let mut valid = 0;
        for _ in 0..3000 {
            let mut fields: Vec<String> = Vec::new();
            for (field, values) in choices {
                let pick = draw(values.len() * 2);
                if let Some(value) = values.get(pick) {
                    fields.push(format!("\"{field}\":{value}"));
                }
            }
            let Ok(rule) = parse(&fields.join(",")) else {
                continue;
            };
            valid += 1;
            assert_eq!(RuleSpec::from(&rule).parse().unwrap(), rule, "{fields:?}");
        }
        assert!(valid > 300, "{valid}");
    }

    #[test]
    fn names_depend_on_content_only() {
        let a = parse(r#""peer":"10.0.0.1,10.0.0.2","seed":1"#).unwrap();
        let b = parse(r#""peer":["10.0.0.2","10.0.0.1"],"seed":2"#).unwrap();
        let c = parse(r#""peer":"10.0.0.1","seed":1"#).unwrap();
        assert_eq!(a.name, b.name);
        assert_ne!(a.name, c.name);
        assert!(
            a.name.starts_with("cut-") && a.name.len() == 12,
            "{}",
            a.name
        );
        assert!(a.name_generated);
        assert!(
            !parse(r#""name":"mine","proto":"tcp""#)
                .unwrap()
                .name_generated
        );
        // Pinned: a generated name enters the random stream and must not change between versions.
        assert_eq!(c.name, "cut-ead90995");
    }

    #[test]
    fn seeds_are_drawn_where_none_is_given() {
        let rules: Vec<Rule> = (0..8).map(|_| parse(r#""proto":"tcp""#).unwrap()).collect();
        assert!(rules.iter().any(|rule| rule.seed != rules[0].seed));
        assert!(rules.iter().all(|rule| rule.seed < 1 << 53));
    }

    #[test]
    fn icmp_types_follow_the_families() {
        let both = parse(r#""icmp_type":"echo-request""#).unwrap().selector;
        assert_eq!((both.icmp_types, both.icmpv6_types), (vec![8], vec![128]));
        assert_eq!(both.protocols, [ICMP, ICMPV6]);
        let v4 = parse(r#""icmp_type":"echo-request","peer":"10.0.0.1""#)
            .unwrap()
            .selector;
        assert_eq!((v4.icmp_types, v4.icmpv6_types), (vec![8], vec![]));
        assert_eq!(v4.protocols, [ICMP]);
        let v6 = parse(r#""icmp_type":"128","proto":"icmpv6""#)
            .unwrap()
            .selector;
        assert_eq!((v6.icmp_types, v6.icmpv6_types), (vec![], vec![128]));
        let nd = parse(r#""icmp_type":"neighbor-solicitation""#)
            .unwrap()
            .selector;
        assert_eq!(nd.protocols, [Protocol::Nd]);
    }

    #[test]
    fn fields_are_flags_on_the_command_line() {
        for (fields, message, help) in [
            (
                r#""fault":{"cut":true,"drop_nth":1}"#,
                "fault: --cut and --drop-nth are given together",
                "one of --cut, --drop-nth,",
            ),
            (
                r#""fault":{}"#,
                "fault: none is given",
                "--drop-pattern (with --once where wanted), --drop-once, --reject; and any of --loss,",
            ),
            (
                r#""fault":{"copy_delay":"1s"}"#,
                "--copy-delay: goes with --duplicate only",
                "give --duplicate too, or leave --copy-delay out",
            ),
            (
                r#""fault":{"queue":"1s"}"#,
                "--queue: goes with --rate or --rate-trace only",
                "give --rate or --rate-trace too, or leave --queue out",
            ),
            (
                r#""fault":{"rate":"1mbit","rate_trace":{"milliseconds":[1]}}"#,
                "--rate-trace: a line has one rate, and --rate is given too",
                "give one of --rate and --rate-trace",
            ),
            (
                r#""peer":"fd00::1","ip_version":4"#,
                "--peer: fd00::1 leaves only IPv6 and --ip-version 4 only IPv4, so no packet can match",
                "use addresses",
            ),
            (
                r#""peer_port":"80","proto":"icmp""#,
                "--peer-port: packets of --proto icmp have no ports",
                "leave --proto out",
            ),
        ] {
            let error = error(fields);
            assert_eq!(error.message(Surface::Flags), message, "{fields}");
            let said = error.help(Surface::Flags);
            assert!(said.contains(help), "{fields}: {said}");
            assert!(!error.help(Surface::File).contains('-'), "{fields}");
        }
    }

    #[test]
    fn every_fault_is_offered_where_none_is_given() {
        let help = error(r#""fault":{}"#).help(Surface::File);
        for fault in FaultSpec::POSITIONAL.iter().chain(&FaultSpec::COMBINED) {
            assert!(
                help.split([' ', ',', ';']).any(|word| word == *fault),
                "{fault}: {help}"
            );
        }
    }

    #[test]
    fn rejects_are_checked() {
        for (fields, field) in [
            (r#""proto":"tcp","fault":{"reject":"drop"}"#, "reject"),
            (r#""proto":"udp","fault":{"reject":"rst"}"#, "reject"),
            (r#""proto":"tcp,udp","fault":{"reject":"rst"}"#, "reject"),
            (r#""peer":"10.0.0.1","fault":{"reject":"rst"}"#, "reject"),
            (
                r#""proto":"udp","fault":{"reject":"icmp-port","delay":"1s"}"#,
                "reject",
            ),
            (
                r#""proto":"udp","fault":{"reject":"icmp-port","cut":true}"#,
                "fault",
            ),
        ] {
            assert_eq!(error(fields).field, field, "{fields}");
        }
    }

    #[test]
    fn a_rule_for_everything_must_be_asked_for() {
        for fields in [
            "",
            r#""ip_version":4"#,
            r#""direction":"ingress""#,
            r#""state":"new""#,
            r#""peer":"0.0.0.0/0""#,
            r#""peer":"0.0.0.0/1,128.0.0.0/1""#,
            r#""peer":"::/0","peer_port":"0-65535","flows":"100%","length":"0-""#,
            r#""fault":{"drop_once":true}"#,
        ] {
            assert_eq!(error(fields).field, "all_traffic", "{fields}");
            let fields = if fields.is_empty() {
                r#""all_traffic":true"#.to_owned()
            } else {
                format!(r#"{fields},"all_traffic":true"#)
            };
            assert!(parse(&fields).is_ok(), "{fields}");
        }
        for fields in [
            r#""peer":"0.0.0.0/1""#,
            r#""proto":"arp""#,
            r#""except":"10.0.0.1""#,
        ] {
            assert!(parse(fields).is_ok(), "{fields}");
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table of cases")]
    #[test]
    fn every_bad_input_names_its_field_and_text() {
        let cases = [
            (r#""name":"-x""#, "name", "begins with '-'"),
            (r#""name":"a b""#, "name", "' '"),
            (r#""group":"""#, "group", "is empty"),
            (r#""netns":"a/b""#, "netns", "relative"),
            (r#""iface":["lo","lo"]"#, "iface", "twice"),
            (r#""iface":[]"#, "iface", "no interface"),
            (r#""iface":"an-interface-name-too-long""#, "iface", "15"),
            (r#""iface":"a/b""#, "iface", "cannot"),
            (r#""iface":"eth0,""#, "iface", "empty entry"),
            (r#""direction":"up""#, "direction", "not a direction"),
            (r#""peer":"10.0.0.1/8""#, "peer", "behind the prefix length"),
            (r#""peer":"10.0.0.0/40""#, "peer", "'40'"),
            (r#""peer":"web1""#, "peer", "neither an address"),
            (r#""except":"x""#, "except", "neither an address"),
            (r#""peer":"10.0.0.1,,10.0.0.2""#, "peer", "empty entry"),
            (r#""peer_port":"90-80""#, "peer_port", "reversed"),
            (r#""dst_port":"70000""#, "dst_port", "more than 65535"),
            (r#""local_port":"http""#, "local_port", "not a number"),
            (r#""length":"100-50""#, "length", "reversed"),
            (r#""length":"1048577""#, "length", "more than 1048576"),
            (r#""length":"1,3,5,7,9""#, "length", "5 ranges"),
            (r#""mark":"1,2,3,4,5""#, "mark", "5 marks"),
            (r#""mark":"0x10/0xf""#, "mark", "outside its mask"),
            (r#""dscp":"64""#, "dscp", "not a DSCP"),
            (r#""flows":"0%""#, "flows", "chooses nothing"),
            (r#""flows":"101%""#, "flows", "more than 100%"),
            (r#""flows":"25""#, "flows", "percent sign"),
            (r#""proto":"tpc""#, "proto", "not a protocol"),
            (r#""ip_version":5"#, "ip_version", "not an IP version"),
            (r#""state":"old""#, "state", "not a state"),
            (r#""key":"host""#, "key", "not a flow identity"),
            (r#""tcp_flags":"sin""#, "tcp_flags", "'sin'"),
            (
                r#""tcp_flags":"syn","proto":"udp""#,
                "tcp_flags",
                "proto udp",
            ),
            (
                r#""peer_port":"80","proto":"icmp""#,
                "peer_port",
                "proto icmp",
            ),
            (r#""icmp_type":"8","proto":"tcp""#, "icmp_type", "proto tcp"),
            (
                r#""icmp_type":"packet-too-big","peer":"10.0.0.1""#,
                "icmp_type",
                "matches no packet",
            ),
            (
                r#""icmp_type":"135","proto":"icmpv6""#,
                "icmp_type",
                "matches no packet",
            ),
            (
                r#""peer":"10.0.0.1","local":"fd00::1""#,
                "peer",
                "10.0.0.1 leaves only IPv4 and local fd00::1 only IPv6",
            ),
            (
                r#""peer":"fd00::1","ip_version":4"#,
                "peer",
                "ip_version 4 only IPv4",
            ),
            (
                r#""peer":"fd00::1","proto":"icmp""#,
                "peer",
                "proto only IPv4",
            ),
            (r#""peer":"10.0.0.1","proto":"other""#, "peer", "not IP"),
            (r#""for":"0s""#, "for", "no time at all"),
            (r#""for":"30""#, "for", "no unit"),
            (r#""flap":"up=3s""#, "flap", "lacks 'down'"),
            (r#""flap":"up=0s,down=1s""#, "flap", "'up' of zero"),
            (r#""flap":"up=1s,down=1s,phase=2s""#, "flap", "phase"),
            (r#""fault":{}"#, "fault", "none is given"),
            (
                r#""fault":{"cut":true,"drop_nth":1}"#,
                "fault",
                "cut and drop_nth",
            ),
            (r#""fault":{"drop_nth":0}"#, "drop_nth", "from 1"),
            (r#""fault":{"drop_first":0}"#, "drop_first", "from 1"),
            (r#""fault":{"drop_every":0}"#, "drop_every", "from 1"),
            (r#""fault":{"drop_pattern":""}"#, "drop_pattern", "empty"),
            (
                r#""fault":{"drop_pattern":"000"}"#,
                "drop_pattern",
                "no packet",
            ),
            (r#""fault":{"drop_pattern":"012"}"#, "drop_pattern", "'2'"),
            (
                r#""fault":{"cut":true,"once":true}"#,
                "once",
                "drop_pattern only",
            ),
        ];
        for (fields, field, fragment) in cases {
            let fields_and_limit = if fields.contains("iface") {
                // Replaces the interface that `parse` would give.
                let text = format!(r#"{{{fields},"proto":"tcp","fault":{{"cut":true}}}}"#);
                let error = serde_json::from_str::<RuleSpec>(&text)
                    .unwrap()
                    .parse()
                    .expect_err(fields);
                assert_eq!(error.field, field);
                assert!(error.to_string().contains(fragment), "{fields}: {error}");
                continue;
            } else {
                fields
            };
            let error = error(fields_and_limit);
            assert_eq!(error.field, field, "{fields}: {error}");
            assert!(error.to_string().contains(fragment), "{fields}: {error}");
            assert!(!error.help.is_empty(), "{fields}");
        }
        let long = "01".repeat(129);
        assert_eq!(
            error(&format!(r#""fault":{{"drop_pattern":"{long}"}}"#)).field,
            "drop_pattern"
        );
    }
}
