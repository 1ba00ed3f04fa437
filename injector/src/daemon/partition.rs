//! How the sides of a partition become rules, by the addresses, routes and bridges of a namespace.
//!
//! - A host that is in one side is cut from every other side, on each interface that routes to it.
//! - A router or a bridge that is in none (or, as routers are, in several) cuts the sides from each
//!   other where their packets arrive: on the ports of its bridges and on the interfaces that route to
//!   a side.
//! - A host in one side that also forwards between interfaces does both, and then cuts only its own
//!   addresses from the others, so that it stays out of the way of third parties' packets.

use std::{collections::BTreeSet, fmt::Write, net::IpAddr};

use ipnet::IpNet;

use super::host::Topology;
use crate::{
    netlink,
    protocol::{ErrorBody, ErrorCode},
    rules::{
        model::{AddrSet, Direction, Selector},
        text::address,
    },
};

/// More sides than anybody's cluster falls into; bounds the number of rules.
const MAX_SIDES: usize = 16;

/// One rule of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// What its name ends in.
    pub suffix: String,
    /// Where it acts.
    pub interfaces: Vec<String>,
    /// Which packets it cuts.
    pub selector: Selector,
}

/// What a partition becomes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Plan {
    /// Its rules.
    pub pieces: Vec<Piece>,
    /// How it came to them, for people.
    pub steps: Vec<String>,
    /// What of the sides is not reached.
    pub warnings: Vec<String>,
}

/// Turns sides into rules. `interfaces` are those that the user insists on; empty: find them.
///
/// # Errors
/// The sides are too few, empty, overlap, or nothing here leads to them.
pub(super) fn resolve(
    sides: &[Vec<IpNet>],
    topology: &Topology,
    interfaces: &[String],
    one_way: bool,
) -> Result<Plan, ErrorBody> {
    check(sides)?;
    for name in interfaces {
        if !topology.links.iter().any(|link| link.name == *name) {
            return Err(ErrorBody::new(
                ErrorCode::Target,
                format!("cannot partition at interface {name:?}: there is no such interface here"),
            )
            .with_hint("`ip link` (in that namespace) shows the interfaces"));
        }
    }
    let resolver = Resolver {
        sides,
        topology,
        interfaces,
        one_way,
    };
    let own = resolver.own_sides();
    let mut plan = Plan::default();
    match own.as_slice() {
        [] => resolver.between(&mut plan, false)?,
        [(side, address)] => resolver.host(&mut plan, *side, *address)?,
        [(first, one), (second, other), ..] => {
            if !topology.forwarding {
                return Err(invalid(format!(
                    "this host is in two sides at once: its address {one} is in side {}, its \
                     address {other} in side {}",
                    first + 1,
                    second + 1
                ))
                .with_hint(
                    "list single addresses instead of prefixes, so that the host is in one side",
                ));
            }
            resolver.between(&mut plan, true)?;
        }
    }
    Ok(plan)
}

fn invalid(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorCode::Invalid, message)
}

/// Makes sure that the sides can be sides.
fn check(sides: &[Vec<IpNet>]) -> Result<(), ErrorBody> {
    if sides.len() < 2 {
        return Err(invalid(format!(
            "a partition needs at least two sides, {} given",
            sides.len()
        ))
        .with_hint("give --side twice or more"));
    }
    if sides.len() > MAX_SIDES {
        return Err(invalid(format!(
            "a partition has at most {MAX_SIDES} sides, {} given",
            sides.len()
        )));
    }
    let mut all = Vec::with_capacity(sides.iter().map(Vec::len).sum());
    for (side, nets) in sides.iter().enumerate() {
        if nets.is_empty() {
            return Err(invalid(format!(
                "side {} of the partition is empty",
                side + 1
            )));
        }
        for net in nets {
            if *net != net.trunc() {
                return Err(invalid(format!(
                    "{net} in side {} has bits set after its prefix; {} is meant, or {}",
                    side + 1,
                    net.trunc(),
                    net.addr()
                )));
            }
            if net.prefix_len() == 0 {
                return Err(invalid(format!(
                    "side {} is every address there is ({net}); nothing is left for another side",
                    side + 1
                )));
            }
            all.push((*net, side));
        }
    }
    // Prefixes are nested or disjoint, so in order of their beginnings (wider ones first) those that
    // contain the current one are a stack.
    all.sort_unstable_by_key(|(net, side)| {
        (net.addr().is_ipv6(), net.network(), net.prefix_len(), *side)
    });
    let mut around: Vec<(IpNet, usize)> = Vec::new();
    for (net, side) in all {
        while around
            .last()
            .is_some_and(|(outer, _)| !outer.contains(&net))
        {
            around.pop();
        }
        if let Some((outer, other)) = around.last()
            && *other != side
        {
            return Err(invalid(format!(
                "the sides overlap: {} of side {} lies in {} of side {}",
                address::format_prefix(&net),
                side + 1,
                address::format_prefix(outer),
                other + 1
            ))
            .with_hint("no address may be in two sides"));
        }
        around.push((net, side));
    }
    Ok(())
}

struct Resolver<'a> {
    sides: &'a [Vec<IpNet>],
    topology: &'a Topology,
    interfaces: &'a [String],
    one_way: bool,
}

impl Resolver<'_> {
    /// Addresses of this host that others can send to.
    fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.topology
            .addresses
            .iter()
            .map(|(_, net)| net.addr())
            .filter(|address| !address.is_loopback())
    }

    /// The sides that this host is in, each with the address that says so.
    fn own_sides(&self) -> Vec<(usize, IpAddr)> {
        let own: Vec<IpAddr> = self.own_addresses().collect();
        self.sides
            .iter()
            .enumerate()
            .filter_map(|(side, nets)| {
                own.iter()
                    .find(|address| nets.iter().any(|net| net.contains(*address)))
                    .map(|address| (side, *address))
            })
            .collect()
    }

    /// Whether packets from one side to another are to be lost.
    fn cut(&self, from: usize, to: usize) -> bool {
        from != to && (!self.one_way || from < to)
    }

    /// Interfaces that route to a side, and the prefixes of it to which none does.
    fn towards(&self, side: usize) -> (BTreeSet<u32>, Vec<IpNet>) {
        let mut interfaces = BTreeSet::new();
        let mut unreached = Vec::new();
        for net in &self.sides[side] {
            let out = netlink::outgoing(&self.topology.routes, net);
            if out.is_empty() {
                unreached.push(*net);
            }
            interfaces.extend(out);
        }
        (interfaces, unreached)
    }

    fn names(&self, indices: &BTreeSet<u32>) -> Vec<String> {
        self.topology
            .links
            .iter()
            .filter(|link| indices.contains(&link.index))
            .map(|link| link.name.clone())
            .collect()
    }

    /// Interfaces towards a side by name: those given, or those found. Complains if there are none.
    fn interfaces_towards(&self, side: usize, plan: &mut Plan) -> Result<Vec<String>, ErrorBody> {
        if !self.interfaces.is_empty() {
            return Ok(self.interfaces.to_vec());
        }
        let (indices, unreached) = self.towards(side);
        let names = self.names(&indices);
        if names.is_empty() {
            return Err(ErrorBody::new(
                ErrorCode::Target,
                format!(
                    "cannot cut side {} off: no route of this namespace leads to {}",
                    side + 1,
                    some(&self.sides[side])
                ),
            )
            .with_hint(
                "check the addresses, the namespace (--netns), or name interfaces (--iface)",
            ));
        }
        if !unreached.is_empty() {
            plan.warnings.push(format!(
                "no route leads to {} of side {}: packets to there are cut only where the side's \
                 others are reached ({})",
                some(&unreached),
                side + 1,
                names.join(", ")
            ));
        }
        Ok(names)
    }

    /// This host is in `own`: cut it from the others.
    fn host(&self, plan: &mut Plan, own: usize, address: IpAddr) -> Result<(), ErrorBody> {
        plan.steps.push(format!(
            "this host is in side {} (its address {address})",
            own + 1
        ));
        let explicit = self.sides[own].contains(&IpNet::from(address));
        let routing = if explicit || !self.topology.forwarding || !self.interfaces.is_empty() {
            BTreeSet::new()
        } else {
            (0..self.sides.len())
                .flat_map(|side| self.towards(side).0)
                .collect()
        };
        // With one interface there is nothing to forward between.
        let forwards = routing.len() > 1;
        let local = if forwards {
            set(&self.own_addresses().map(IpNet::from).collect::<Vec<_>>())
        } else {
            AddrSet::default()
        };
        for other in (0..self.sides.len()).filter(|other| *other != own) {
            let direction = match (self.cut(own, other), self.cut(other, own)) {
                (true, true) => Direction::Both,
                (true, false) => Direction::Egress,
                (false, _) => Direction::Ingress,
            };
            let interfaces = self.interfaces_towards(other, plan)?;
            plan.steps.push(format!(
                "{} side {} at {}",
                match direction {
                    Direction::Both => "cutting it from",
                    Direction::Egress => "cutting what it sends to",
                    Direction::Ingress => "cutting what it receives from",
                },
                other + 1,
                interfaces.join(", ")
            ));
            plan.pieces.push(Piece {
                suffix: if forwards {
                    format!("host-{}", other + 1)
                } else {
                    format!("{}-{}", own + 1, other + 1)
                },
                interfaces,
                selector: Selector {
                    direction,
                    peer: set(&self.sides[other]),
                    local: local.clone(),
                    ..Selector::default()
                },
            });
        }
        if forwards {
            let names = self.names(&routing);
            plan.steps.push(format!(
                "it also forwards: cutting the sides from each other where packets arrive, at {}",
                names.join(", ")
            ));
            self.pairs(plan, &names, Direction::Ingress);
        }
        Ok(())
    }

    /// Cut the sides from each other in passing. `among`: this host has addresses in several sides.
    fn between(&self, plan: &mut Plan, among: bool) -> Result<(), ErrorBody> {
        if !self.interfaces.is_empty() {
            plan.steps.push(format!(
                "cutting the sides from each other at {}, in both directions",
                self.interfaces.join(", ")
            ));
            self.pairs(plan, self.interfaces, Direction::Both);
            return Ok(());
        }
        let bridges: BTreeSet<u32> = self
            .topology
            .links
            .iter()
            .filter(|link| link.kind.as_deref() == Some("bridge"))
            .map(|link| link.index)
            .collect();
        let is_port =
            |link: &&netlink::Link| link.master.is_some_and(|master| bridges.contains(&master));
        let with_ports: BTreeSet<u32> = self
            .topology
            .links
            .iter()
            .filter(is_port)
            .filter_map(|link| link.master)
            .collect();
        let ports: BTreeSet<u32> = self
            .topology
            .links
            .iter()
            .filter(is_port)
            .map(|link| link.index)
            .collect();
        let mut arrivals = ports.clone();
        if self.topology.forwarding {
            for side in 0..self.sides.len() {
                let (indices, _) = self.towards(side);
                if indices.is_empty() && ports.is_empty() {
                    // Says which side and what to do.
                    self.interfaces_towards(side, plan)?;
                }
                // What arrives at a bridge has arrived at one of its ports before.
                arrivals.extend(indices.difference(&with_ports));
            }
        }
        let names = self.names(&arrivals);
        if names.is_empty() {
            return Err(ErrorBody::new(
                ErrorCode::Target,
                "this namespace has no part in the partition: none of its addresses is in a side, \
                 and it neither forwards packets nor has a bridge with ports",
            )
            .with_hint(
                "run it on (or with --netns name) a member, a router or a bridge, or name \
                 interfaces with --iface",
            ));
        }
        let who = match (ports.is_empty(), self.topology.forwarding) {
            (true, _) => "this router",
            (false, true) => "this router and bridge",
            (false, false) => "this bridge",
        };
        plan.steps.push(format!(
            "{who} cuts the sides from each other where packets arrive, at {}",
            names.join(", ")
        ));
        self.pairs(
            plan,
            &names,
            if among {
                Direction::Both
            } else {
                Direction::Ingress
            },
        );
        Ok(())
    }

    /// A rule for each ordered pair of sides.
    fn pairs(&self, plan: &mut Plan, interfaces: &[String], direction: Direction) {
        for (from, sources) in self.sides.iter().enumerate() {
            for (to, destinations) in self.sides.iter().enumerate() {
                if self.cut(from, to) {
                    plan.pieces.push(Piece {
                        suffix: format!("{}-{}", from + 1, to + 1),
                        interfaces: interfaces.to_vec(),
                        selector: Selector {
                            direction,
                            src: set(sources),
                            dst: set(destinations),
                            ..Selector::default()
                        },
                    });
                }
            }
        }
    }
}

/// A set of prefixes in its canonical order.
fn set(nets: &[IpNet]) -> AddrSet {
    let mut set = AddrSet {
        include: nets.to_vec(),
        except: Vec::new(),
    };
    address::normalise(&mut set);
    set
}

/// The first few of a list of prefixes.
fn some(nets: &[IpNet]) -> String {
    const SHOWN: usize = 3;
    let mut text = nets
        .iter()
        .take(SHOWN)
        .map(address::format_prefix)
        .collect::<Vec<_>>()
        .join(", ");
    if nets.len() > SHOWN {
        // Writing to a String does not fail.
        let _ = write!(text, " and {} more", nets.len() - SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{Link, LinkStats, Route};

    fn link(index: u32, name: &str, kind: Option<&str>, master: Option<u32>) -> Link {
        Link {
            index,
            name: name.into(),
            kind: kind.map(Into::into),
            arp_type: 1,
            master,
            link: None,
            link_netnsid: None,
            up: true,
            running: true,
            loopback: name == "lo",
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            xdp_program: None,
            stats: LinkStats::default(),
        }
    }

    fn route(dst: &str, oif: u32) -> Route {
        Route {
            dst: dst.parse().unwrap(),
            oifs: vec![oif],
            table: 254,
            metric: 0,
        }
    }

    fn net(text: &str) -> IpNet {
        address::parse_prefix(text).unwrap()
    }

    fn sides(texts: &[&[&str]]) -> Vec<Vec<IpNet>> {
        texts
            .iter()
            .map(|side| side.iter().map(|text| net(text)).collect())
            .collect()
    }

    /// A host 10.0.0.1 on eth0 with a default route there and 10.9.0.0/16 through eth1.
    fn host() -> Topology {
        Topology {
            links: vec![
                link(1, "lo", None, None),
                link(2, "eth0", None, None),
                link(3, "eth1", None, None),
            ],
            addresses: vec![
                (1, "127.0.0.1/8".parse().unwrap()),
                (2, "10.0.0.1/24".parse().unwrap()),
                (3, "192.168.9.1/24".parse().unwrap()),
                (2, "fd00::1/64".parse().unwrap()),
            ],
            routes: vec![
                route("10.0.0.0/24", 2),
                route("192.168.9.0/24", 3),
                route("10.9.0.0/16", 3),
                route("0.0.0.0/0", 2),
                route("fd00::/64", 2),
            ],
            forwarding: false,
        }
    }

    fn bridge() -> Topology {
        Topology {
            links: vec![
                link(1, "lo", None, None),
                link(2, "br0", Some("bridge"), None),
                link(3, "p1", Some("veth"), Some(2)),
                link(4, "p2", Some("veth"), Some(2)),
                link(5, "other", Some("veth"), None),
            ],
            ..Topology::default()
        }
    }

    fn router() -> Topology {
        Topology {
            links: vec![
                link(2, "a", None, None),
                link(3, "b", None, None),
                link(4, "c", None, None),
            ],
            addresses: vec![
                (2, "10.1.0.254/24".parse().unwrap()),
                (3, "10.2.0.254/24".parse().unwrap()),
            ],
            routes: vec![
                route("10.1.0.0/24", 2),
                route("10.2.0.0/24", 3),
                route("10.3.0.0/24", 4),
            ],
            forwarding: true,
        }
    }

    fn code(result: Result<Plan, ErrorBody>, fragment: &str) -> ErrorCode {
        let error = result.unwrap_err();
        assert!(error.to_string().contains(fragment), "{error}");
        error.code
    }

    #[test]
    fn a_member_is_cut_from_the_others_where_it_routes_to_them() {
        let sides = sides(&[
            &["10.0.0.1", "10.0.0.2"],
            &["10.0.0.3", "10.9.0.3"],
            &["fd00::4"],
        ]);
        let plan = resolve(&sides, &host(), &[], false).unwrap();
        assert_eq!(plan.pieces.len(), 2);
        assert_eq!(plan.pieces[0].interfaces, ["eth0", "eth1"]);
        assert_eq!(plan.pieces[0].suffix, "1-2");
        assert_eq!(plan.pieces[0].selector.direction, Direction::Both);
        assert_eq!(
            plan.pieces[0].selector.peer.include,
            [net("10.0.0.3"), net("10.9.0.3")]
        );
        assert!(plan.pieces[0].selector.local.is_any());
        assert_eq!(plan.pieces[1].interfaces, ["eth0"]);
        assert!(plan.steps[0].contains("side 1"), "{:?}", plan.steps);
    }

    #[test]
    fn one_way_is_from_an_earlier_side_to_a_later_one() {
        let directions = |texts: &[&[&str]]| {
            resolve(&sides(texts), &host(), &[], true)
                .unwrap()
                .pieces
                .into_iter()
                .map(|piece| piece.selector.direction)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            directions(&[&["10.0.0.1"], &["10.0.0.2"]]),
            [Direction::Egress]
        );
        assert_eq!(
            directions(&[&["10.0.0.2"], &["10.0.0.1"]]),
            [Direction::Ingress]
        );
        assert_eq!(
            directions(&[&["10.0.0.2"], &["10.0.0.1"], &["10.0.0.3"]]),
            [Direction::Ingress, Direction::Egress]
        );
    }

    #[test]
    fn what_no_route_reaches_is_said() {
        let plan = resolve(
            &sides(&[&["10.0.0.1"], &["10.0.0.3", "fe00::1"]]),
            &host(),
            &[],
            false,
        )
        .unwrap();
        assert!(plan.warnings[0].contains("fe00::1"), "{:?}", plan.warnings);
        let result = resolve(&sides(&[&["10.0.0.1"], &["fe00::1"]]), &host(), &[], false);
        assert_eq!(code(result, "no route"), ErrorCode::Target);
        let result = resolve(
            &sides(&[&["10.0.0.1"], &["fe00::1"]]),
            &host(),
            &["eth1".into()],
            false,
        );
        assert_eq!(result.unwrap().pieces[0].interfaces, ["eth1"]);
    }

    #[test]
    fn a_bridge_cuts_at_the_ingress_of_its_ports() {
        let sides = sides(&[&["10.0.0.1"], &["10.0.0.2"], &["10.0.0.3"]]);
        let plan = resolve(&sides, &bridge(), &[], false).unwrap();
        assert_eq!(plan.pieces.len(), 6);
        for piece in &plan.pieces {
            assert_eq!(piece.interfaces, ["p1", "p2"]);
            assert_eq!(piece.selector.direction, Direction::Ingress);
        }
        let suffixes: Vec<&str> = plan
            .pieces
            .iter()
            .map(|piece| piece.suffix.as_str())
            .collect();
        assert_eq!(suffixes, ["1-2", "1-3", "2-1", "2-3", "3-1", "3-2"]);
        let plan = resolve(&sides, &bridge(), &[], true).unwrap();
        let suffixes: Vec<&str> = plan
            .pieces
            .iter()
            .map(|piece| piece.suffix.as_str())
            .collect();
        assert_eq!(suffixes, ["1-2", "1-3", "2-3"]);
        assert_eq!(plan.pieces[2].selector.src.include, [net("10.0.0.2")]);
        assert_eq!(plan.pieces[2].selector.dst.include, [net("10.0.0.3")]);
    }

    #[test]
    fn a_router_cuts_where_packets_arrive() {
        // In no side.
        let plan = resolve(
            &sides(&[&["10.1.0.1"], &["10.3.0.0/24"]]),
            &router(),
            &[],
            false,
        )
        .unwrap();
        assert_eq!(plan.pieces.len(), 2);
        assert_eq!(plan.pieces[0].interfaces, ["a", "c"]);
        assert_eq!(plan.pieces[0].selector.direction, Direction::Ingress);
        // In both, by its gateway addresses: its own packets are cut as well.
        let plan = resolve(
            &sides(&[&["10.1.0.0/24"], &["10.2.0.0/24"]]),
            &router(),
            &[],
            false,
        )
        .unwrap();
        assert_eq!(plan.pieces[0].interfaces, ["a", "b"]);
        assert_eq!(plan.pieces[0].selector.direction, Direction::Both);
        // In one of them.
        let plan = resolve(
            &sides(&[&["10.1.0.0/24"], &["10.3.0.0/24"]]),
            &router(),
            &[],
            false,
        )
        .unwrap();
        let suffixes: Vec<&str> = plan
            .pieces
            .iter()
            .map(|piece| piece.suffix.as_str())
            .collect();
        assert_eq!(suffixes, ["host-2", "1-2", "2-1"]);
        assert_eq!(plan.pieces[0].selector.local.include.len(), 2);
        assert_eq!(plan.pieces[0].interfaces, ["c"]);
        assert_eq!(plan.pieces[1].interfaces, ["a", "c"]);
        // A side that nothing routes to.
        let result = resolve(
            &sides(&[&["10.1.0.1"], &["10.4.0.1"]]),
            &router(),
            &[],
            false,
        );
        assert_eq!(code(result, "side 2"), ErrorCode::Target);
    }

    #[test]
    fn a_routed_bridge_cuts_at_its_ports_and_not_twice() {
        let mut topology = bridge();
        topology.forwarding = true;
        topology.addresses = vec![(2, "10.0.0.254/24".parse().unwrap())];
        topology.routes = vec![route("10.0.0.0/24", 2), route("0.0.0.0/0", 5)];
        let plan = resolve(
            &sides(&[&["10.0.0.1"], &["10.9.0.1"]]),
            &topology,
            &[],
            false,
        )
        .unwrap();
        assert_eq!(plan.pieces[0].interfaces, ["p1", "p2", "other"]);
    }

    #[test]
    fn a_container_host_is_an_ordinary_member() {
        let mut topology = host();
        topology.forwarding = true;
        let plan = resolve(
            &sides(&[&["10.0.0.0/28"], &["10.0.0.16/28"]]),
            &topology,
            &[],
            false,
        )
        .unwrap();
        assert_eq!(plan.pieces.len(), 1);
        assert!(plan.pieces[0].selector.local.is_any());
    }

    #[test]
    fn sides_that_cannot_be_sides_are_refused() {
        let refused = |texts: &[&[&str]], fragment: &str| {
            assert_eq!(
                code(resolve(&sides(texts), &host(), &[], false), fragment),
                ErrorCode::Invalid
            );
        };
        refused(&[&["10.0.0.1"]], "at least two");
        refused(&[&["10.0.0.1"], &[]], "side 2 of the partition is empty");
        refused(
            &[&["10.0.0.1"], &["10.0.0.2", "10.0.0.1"]],
            "overlap: 10.0.0.1",
        );
        refused(
            &[&["10.0.0.5"], &["10.1.0.0/16"], &["10.1.2.0/24"]],
            "10.1.2.0/24 of side 3",
        );
        refused(&[&["10.0.0.5"], &["0.0.0.0/0"]], "every address");
        refused(&[&["10.0.0.1"], &["192.168.9.0/24"]], "two sides at once");
        let bits = vec![vec!["10.0.0.1/24".parse().unwrap()], vec![net("10.1.0.1")]];
        assert_eq!(
            code(resolve(&bits, &host(), &[], false), "10.0.0.0/24"),
            ErrorCode::Invalid
        );
        // Nested prefixes within one side are no overlap.
        resolve(
            &sides(&[&["10.0.0.1", "10.0.0.0/25"], &["10.0.0.128"]]),
            &host(),
            &[],
            false,
        )
        .unwrap();
    }

    #[test]
    fn a_bystander_is_told_so() {
        let result = resolve(&sides(&[&["10.0.0.2"], &["10.0.0.3"]]), &host(), &[], false);
        assert_eq!(code(result, "no part in the partition"), ErrorCode::Target);
        let named = resolve(
            &sides(&[&["10.0.0.2"], &["10.0.0.3"]]),
            &host(),
            &["eth0".into()],
            false,
        );
        let pieces = named.unwrap().pieces;
        assert_eq!(pieces.len(), 2);
        assert_eq!(pieces[0].selector.direction, Direction::Both);
        let result = resolve(
            &sides(&[&["10.0.0.2"], &["10.0.0.3"]]),
            &host(),
            &["eth9".into()],
            false,
        );
        assert_eq!(code(result, "eth9"), ErrorCode::Target);
    }

    #[test]
    fn ten_thousand_addresses_are_checked_quickly() {
        let side = |third: u8| {
            (0..5000_u32)
                .map(|n| {
                    let [_, _, high, low] = n.to_be_bytes();
                    IpNet::from(IpAddr::from([10, third, high, low]))
                })
                .collect::<Vec<_>>()
        };
        let mut all = vec![side(100), side(101)];
        all[0].push(net("10.0.0.1"));
        let plan = resolve(&all, &host(), &[], false).unwrap();
        assert_eq!(plan.pieces[0].selector.peer.include.len(), 5000);
    }
}
