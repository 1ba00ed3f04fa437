//! Targets that the same packet passes: a fault on both acts twice.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{NetlinkError, link::Link, link::links, nsid::netns_number};
use crate::netns::{Netns, NetnsId};

/// Links whose `IFLA_LINK` is the device that their packets leave through, unchanged but for a tag or
/// an address. (Tunnels have one, too, but what leaves through it is another packet.)
const STACKED: [&str; 9] = [
    "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec", "hsr", "dsa", "rmnet",
];
/// Links that come in pairs: `IFLA_LINK` is the other end.
const PAIRED: [&str; 3] = ["veth", "netkit", "vxcan"];

/// The links of one namespace, and what it calls the others.
struct View<'a> {
    netns: &'a Netns,
    links: BTreeMap<u32, Link>,
    /// Numbers under which this namespace knows other targets' namespaces.
    numbers: BTreeMap<i32, NetnsId>,
}

/// A link of a namespace.
type Place = (NetnsId, u32);

/// A warning for each pair of targets that the same packet passes: a VLAN or macvlan and its parent, a
/// bridge, bond, team or VRF and its port, the two ends of a veth pair; also over several steps (a VLAN
/// on a bond and one of the bond's ports). Targets are a namespace and an interface index each. What
/// cannot be looked at (gone meanwhile) is left out.
#[must_use]
pub fn double_pass(targets: &[(Netns, u32)]) -> Vec<String> {
    let mut namespaces: Vec<&Netns> = targets.iter().map(|(netns, _)| netns).collect();
    namespaces.sort_by_key(|netns| netns.id);
    namespaces.dedup_by_key(|netns| netns.id);
    let views: Vec<View<'_>> = namespaces
        .iter()
        .filter_map(|netns| look(netns, &namespaces).ok())
        .collect();
    let targets: BTreeSet<Place> = targets
        .iter()
        .map(|(netns, index)| (netns.id, *index))
        .collect();
    warnings(&views, &targets)
}

fn look<'a>(netns: &'a Netns, others: &[&Netns]) -> Result<View<'a>, NetlinkError> {
    let gone = |_| NetlinkError::Malformed {
        what: "list the network interfaces".to_owned(),
        detail: "the namespace has gone".to_owned(),
    };
    netns
        .run(|| {
            Ok(View {
                netns,
                links: links()?
                    .into_iter()
                    .map(|link| (link.index, link))
                    .collect(),
                numbers: others
                    .iter()
                    .filter(|other| other.id != netns.id)
                    .filter_map(|other| Some((netns_number(other).ok()??, other.id)))
                    .collect(),
            })
        })
        .map_err(gone)?
}

fn warnings(views: &[View<'_>], targets: &BTreeSet<Place>) -> Vec<String> {
    let view = |id: NetnsId| views.iter().find(|view| view.netns.id == id);
    let name = |(id, index): Place| -> Option<String> {
        let view = view(id)?;
        let link = view.links.get(&index)?;
        Some(if views.len() > 1 {
            format!("{} (namespace {})", link.name, view.netns)
        } else {
            link.name.clone()
        })
    };
    let mut texts = Vec::new();
    let mut pairs = BTreeSet::new();
    for &from in targets {
        // Everything that the packets of `from` pass as well, nearest first.
        let mut seen = BTreeMap::from([(from, None)]);
        let mut queue = VecDeque::from([from]);
        while let Some(at) = queue.pop_front() {
            let Some(view) = view(at.0) else { continue };
            for (next, relation) in passes(view, at.1) {
                seen.entry(next).or_insert_with(|| {
                    queue.push_back(next);
                    (at == from).then_some(relation)
                });
            }
        }
        for (to, relation) in seen {
            if to == from || !targets.contains(&to) || !pairs.insert((from.min(to), from.max(to))) {
                continue;
            }
            if let (Some(a), Some(b)) = (name(from), name(to)) {
                let relation = match relation {
                    Some(Relation::Parent) => format!("{a} is stacked on {b}"),
                    Some(Relation::Port) => format!("{b} is a port of {a}"),
                    Some(Relation::Peer) => format!("{a} is the other end of {b}"),
                    None => format!("what {a} carries passes {b}, too"),
                };
                texts.push(format!(
                    "{relation}: the same packet passes both, so a rule on both acts on it twice; \
                     use one of them"
                ));
            }
        }
    }
    texts
}

/// What a place that a link's packets pass is to that link.
#[derive(Clone, Copy)]
enum Relation {
    Parent,
    Port,
    Peer,
}

/// Where the packets of a link of `view` pass next on their way to the wire.
fn passes(view: &View<'_>, index: u32) -> Vec<(Place, Relation)> {
    let Some(link) = view.links.get(&index) else {
        return Vec::new();
    };
    let mut found: Vec<_> = view
        .links
        .values()
        .filter(|port| port.master == Some(index))
        .map(|port| ((view.netns.id, port.index), Relation::Port))
        .collect();
    let kind = link.kind.as_deref().unwrap_or_default();
    let relation = if PAIRED.contains(&kind) {
        Relation::Peer
    } else if STACKED.contains(&kind) {
        Relation::Parent
    } else {
        return found;
    };
    let netns = match link.link_netnsid {
        None => Some(view.netns.id),
        Some(number) => view.numbers.get(&number).copied(),
    };
    if let (Some(netns), Some(other)) = (netns, link.link) {
        found.push(((netns, other), relation));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::model::NetnsRef;

    fn netns(name: &str, cookie: u64) -> Netns {
        Netns {
            reference: NetnsRef::Name(name.to_owned()),
            id: NetnsId {
                dev: 4,
                ino: cookie,
                cookie,
            },
            path: name.into(),
        }
    }

    fn link(index: u32, name: &str, kind: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind: (!kind.is_empty()).then(|| kind.to_owned()),
            ..Link::default()
        }
    }

    fn check(views: &[View<'_>], targets: &[(&Netns, u32)], expected: &[&str]) {
        let targets = targets
            .iter()
            .map(|(netns, index)| (netns.id, *index))
            .collect();
        let texts = warnings(views, &targets);
        assert_eq!(texts.len(), expected.len(), "{texts:?}");
        for (text, begin) in texts.iter().zip(expected) {
            assert!(text.starts_with(begin), "{text}");
        }
    }

    #[test]
    fn stacked_links_are_warned_about_once() {
        let a = netns("a", 1);
        let all = [
            link(1, "lo", ""),
            Link {
                master: Some(4),
                ..link(2, "eth0", "")
            },
            Link {
                master: Some(4),
                ..link(3, "eth1", "")
            },
            Link {
                master: Some(6),
                ..link(4, "bond0", "bond")
            },
            Link {
                link: Some(4),
                ..link(5, "bond0.7", "vlan")
            },
            link(6, "br0", "bridge"),
            link(7, "eth2", ""),
            Link {
                link: Some(7),
                ..link(8, "vx0", "vxlan")
            },
        ];
        let views = [View {
            netns: &a,
            links: all.into_iter().map(|link| (link.index, link)).collect(),
            numbers: BTreeMap::new(),
        }];
        check(&views, &[(&a, 1), (&a, 7), (&a, 8)], &[]);
        check(&views, &[(&a, 2), (&a, 3)], &[]);
        check(&views, &[(&a, 2), (&a, 4)], &["eth0 is a port of bond0: "]);
        check(
            &views,
            &[(&a, 4), (&a, 5)],
            &["bond0.7 is stacked on bond0: "],
        );
        check(
            &views,
            &[(&a, 3), (&a, 6)],
            &["what br0 carries passes eth1, too: "],
        );
        check(
            &views,
            &[(&a, 2), (&a, 5)],
            &["what bond0.7 carries passes eth0, too: "],
        );
        check(&views, &[(&a, 99), (&a, 6)], &[]);
    }

    #[test]
    fn both_ends_of_a_pair_are_found_across_namespaces() {
        let (a, b) = (netns("a", 1), netns("b", 2));
        let of = |netns, link: Link, numbers| View {
            netns,
            links: BTreeMap::from([(link.index, link)]),
            numbers,
        };
        let end = |name: &str| Link {
            link: Some(2),
            link_netnsid: Some(0),
            ..link(2, name, "veth")
        };
        let views = [
            of(&a, end("va"), BTreeMap::from([(0, b.id)])),
            of(&b, end("vb"), BTreeMap::from([(0, a.id)])),
        ];
        check(
            &views,
            &[(&a, 2), (&b, 2)],
            &["va (namespace 'a') is the other end of vb (namespace 'b'): "],
        );
        let elsewhere = [
            of(&a, end("va"), BTreeMap::new()),
            of(&b, end("vb"), BTreeMap::new()),
        ];
        check(&elsewhere, &[(&a, 2), (&b, 2)], &[]);
    }
}
