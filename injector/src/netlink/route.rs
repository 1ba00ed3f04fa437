//! Routes, and which interfaces lead to an address.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink_packet_core::DecodeError;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteFlags, RouteHeader, RouteType},
};

use super::{
    NetlinkError,
    attribute::{Attributes, Message},
    socket::{Connection, malformed},
};

// include/uapi/linux/rtnetlink.h, nexthop.h
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_GETNEXTHOP: u16 = 106;
const ROUTE_HEADER: usize = 12;
const NEXTHOP_HEADER: usize = 8;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_NH_ID: u16 = 30;
const NHA_ID: u16 = 1;
const NHA_GROUP: u16 = 2;
const NHA_OIF: u16 = 5;
/// Table of the host's own and broadcast addresses.
const RT_TABLE_LOCAL: u32 = 255;

/// A route of a table other than `local`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Route {
    /// Destination; the default route has prefix length 0.
    pub dst: IpNet,
    /// Interfaces of its next hops; empty for one that discards (blackhole, unreachable, prohibit) or
    /// goes on to the next table (throw).
    pub oifs: Vec<u32>,
    /// Routing table (main: 254).
    pub table: u32,
    /// Metric; lower wins.
    pub metric: u32,
}

/// A route as it was read, its next hops not yet looked up.
struct Raw {
    route: Route,
    nexthop: Option<u32>,
}

/// All routes of the namespace, IPv4 and IPv6, except those of the local table and for broadcast,
/// anycast and multicast.
pub fn routes() -> Result<Vec<Route>, NetlinkError> {
    let what = "list the routes";
    let mut connection = Connection::open(what)?;
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let header = RouteHeader {
            address_family: family,
            ..RouteHeader::default()
        };
        let request = Message::new(&header).into_bytes();
        let parts = match connection.dump(what, RTM_GETROUTE, &request) {
            Ok(parts) => parts,
            // A kernel without IPv6.
            Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        for (kind, message) in parts {
            if kind == RTM_NEWROUTE
                && let Some(raw) =
                    parse(family, &message).map_err(|error| malformed(what, error))?
            {
                found.push(raw);
            }
        }
    }
    // The kernel repeats the interfaces of a nexthop object in the route, unless
    // net.ipv4.nexthop_compat_mode is off.
    if found
        .iter()
        .any(|raw| raw.nexthop.is_some() && raw.route.oifs.is_empty())
    {
        let nexthops = nexthops(&mut connection)?;
        for raw in &mut found {
            if raw.route.oifs.is_empty()
                && let Some(oifs) = raw.nexthop.and_then(|id| nexthops.get(&id))
            {
                raw.route.oifs.clone_from(oifs);
            }
        }
    }
    Ok(found.into_iter().map(|raw| raw.route).collect())
}

fn parse(family: AddressFamily, message: &[u8]) -> Result<Option<Raw>, DecodeError> {
    let header = RouteHeader::parse(message)?;
    let attributes = Attributes::after(ROUTE_HEADER, message)?;
    let table = attributes
        .u32(RTA_TABLE)
        .unwrap_or_else(|| header.table.into());
    let wanted = matches!(
        header.kind,
        RouteType::Unicast
            | RouteType::BlackHole
            | RouteType::Unreachable
            | RouteType::Prohibit
            | RouteType::Throw
    );
    // A family that the kernel lacks is answered with all families; cloned routes are exceptions that
    // the kernel learnt (path MTU, redirects).
    if !wanted
        || header.address_family != family
        || table == RT_TABLE_LOCAL
        || header.flags.contains(RouteFlags::Cloned)
    {
        return Ok(None);
    }
    let dst = attributes.address(RTA_DST).unwrap_or(match family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    });
    let dst = IpNet::new(dst, header.destination_prefix_length)
        .map_err(|error| DecodeError::from(error.to_string()))?;
    let oifs: BTreeSet<u32> = if header.kind == RouteType::Unicast {
        attributes
            .u32(RTA_OIF)
            .into_iter()
            .chain(multipath(attributes.get(RTA_MULTIPATH).unwrap_or_default()))
            .collect()
    } else {
        // The kernel hangs discarding IPv6 routes on lo.
        BTreeSet::new()
    };
    Ok(Some(Raw {
        route: Route {
            dst: dst.trunc(),
            oifs: oifs.into_iter().collect(),
            table,
            metric: attributes.u32(RTA_PRIORITY).unwrap_or_default(),
        },
        nexthop: attributes
            .u32(RTA_NH_ID)
            .filter(|_| header.kind == RouteType::Unicast),
    }))
}

/// Interfaces of the next hops of a multipath route: an array of `struct rtnexthop` (length of 16 bits,
/// flags, weight, interface of 32 bits), each followed by attributes.
fn multipath(mut bytes: &[u8]) -> Vec<u32> {
    let mut oifs = Vec::new();
    while let (Some(length), Some(oif)) = (
        bytes.get(..2).and_then(|field| field.try_into().ok()),
        bytes.get(4..8).and_then(|field| field.try_into().ok()),
    ) {
        oifs.push(u32::from_ne_bytes(oif));
        let length = usize::from(u16::from_ne_bytes(length)).max(8);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    oifs
}

/// Interfaces of every nexthop object, those of groups included.
fn nexthops(connection: &mut Connection) -> Result<BTreeMap<u32, Vec<u32>>, NetlinkError> {
    let what = "list the nexthop objects";
    let request = Message::from_header(&[0; NEXTHOP_HEADER]).into_bytes();
    let mut oifs = BTreeMap::new();
    let mut groups = Vec::new();
    for (kind, message) in connection.dump(what, RTM_GETNEXTHOP, &request)? {
        if kind != RTM_NEWNEXTHOP {
            continue;
        }
        let attributes =
            Attributes::after(NEXTHOP_HEADER, &message).map_err(|error| malformed(what, error))?;
        let Some(id) = attributes.u32(NHA_ID) else {
            continue;
        };
        if let Some(group) = attributes.get(NHA_GROUP) {
            // struct nexthop_grp: id of 32 bits, weight and reserved.
            let members: Vec<u32> = group
                .chunks_exact(8)
                .filter_map(|member| member.get(..4)?.try_into().ok())
                .map(u32::from_ne_bytes)
                .collect();
            groups.push((id, members));
        } else {
            oifs.insert(id, attributes.u32(NHA_OIF).into_iter().collect());
        }
    }
    for (id, members) in groups {
        let joined: BTreeSet<u32> = members
            .iter()
            .filter_map(|member| oifs.get(member))
            .flat_map(|list: &Vec<u32>| list.iter().copied())
            .collect();
        oifs.insert(id, joined.into_iter().collect());
    }
    Ok(oifs)
}

/// Interfaces through which packets to some address of `to` can leave: of every table, those of the
/// routes to a part of `to` and those of the longest prefix that covers all of it. Metrics are not
/// weighed (a backup route counts), and neither are policy rules (every table may be used).
#[must_use]
pub fn outgoing(routes: &[Route], to: &IpNet) -> Vec<u32> {
    let mut oifs = BTreeSet::new();
    let mut covering: BTreeMap<u32, (u8, Vec<u32>)> = BTreeMap::new();
    for route in routes {
        if route.dst.contains(to) {
            let best = covering.entry(route.table).or_default();
            if route.dst.prefix_len() > best.0 {
                *best = (route.dst.prefix_len(), Vec::new());
            }
            if route.dst.prefix_len() == best.0 {
                best.1.extend(&route.oifs);
            }
        } else if to.contains(&route.dst) {
            oifs.extend(&route.oifs);
        }
    }
    oifs.extend(covering.into_values().flat_map(|(_, list)| list));
    oifs.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(dst: &str, oifs: &[u32], table: u32) -> Route {
        Route {
            dst: dst.parse().unwrap(),
            oifs: oifs.to_vec(),
            table,
            metric: 0,
        }
    }

    #[test]
    fn the_longest_covering_prefix_and_all_within_lead_there() {
        let routes = [
            route("0.0.0.0/0", &[1], 254),
            route("10.0.0.0/8", &[2], 254),
            route("10.1.0.0/16", &[3, 4], 254),
            route("10.2.0.0/16", &[], 254),
            route("10.0.0.0/8", &[5], 254),
            route("10.1.2.0/24", &[6], 100),
            route("::/0", &[7], 254),
        ];
        let to = |net: &str| outgoing(&routes, &net.parse().unwrap());
        assert_eq!(to("192.0.2.1/32"), [1]);
        assert_eq!(to("10.9.0.1/32"), [2, 5]);
        assert_eq!(to("10.1.9.9/32"), [3, 4]);
        assert_eq!(to("10.1.2.3/32"), [3, 4, 6]);
        assert_eq!(to("10.2.0.1/32"), [0_u32; 0], "a blackhole leads nowhere");
        assert_eq!(to("10.0.0.0/8"), [2, 3, 4, 5, 6]);
        assert_eq!(to("0.0.0.0/0"), [1, 2, 3, 4, 5, 6]);
        assert_eq!(to("2001:db8::1/128"), [7]);
        assert_eq!(outgoing(&[], &"10.0.0.0/8".parse().unwrap()), [0_u32; 0]);
    }

    #[test]
    fn every_hop_of_a_multipath_route_is_read() {
        let hop = |length: u16, oif: u32| {
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend([0, 0]);
            bytes.extend(oif.to_ne_bytes());
            bytes.resize(usize::from(length).next_multiple_of(4).max(8), 0);
            bytes
        };
        assert_eq!(multipath(&[hop(16, 3), hop(8, 5)].concat()), [3, 5]);
        assert_eq!(
            multipath(&hop(0, 9)),
            [9],
            "a length of zero ends, not hangs"
        );
        assert_eq!(multipath(&[8, 0, 0]), [0_u32; 0]);
    }
}
