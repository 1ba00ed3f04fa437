//! Interfaces: reading them, and making the few kinds that labs and probes need.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{LinkFlags, LinkHeader};
use serde::{Deserialize, Serialize};

use super::{
    NetlinkError,
    attribute::{Attributes, Message},
    module::load_ifb,
    socket::{Connection, Part, malformed},
};

// include/uapi/linux/rtnetlink.h, if_link.h, if.h, if_vlan.h, veth.h
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const HEADER: usize = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_ALT_IFNAME: u16 = 53;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;
const VETH_INFO_PEER: u16 = 1;
/// `IFLA_XDP_PROG_ID` (any mode), then those of driver, generic and hardware mode.
const XDP_PROGRAM_IDS: [u16; 4] = [4, 5, 6, 7];
// include/uapi/linux/if_arp.h; libc lacks them.
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_NETLINK: u16 = 824;
/// `IFNAMSIZ` without the terminating zero; alternative names may be longer.
const MAX_NAME: usize = 15;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Kind of virtual link ("veth", "bridge", "vlan" …); none for hardware and `lo`.
    pub kind: Option<String>,
    /// Hardware type (`ARPHRD_*`).
    pub arp_type: u16,
    /// Bridge, bond, team or VRF that this link is a port of.
    pub master: Option<u32>,
    /// Parent of a VLAN or macvlan, peer of a veth: its index, in the namespace `link_netnsid` says.
    pub link: Option<u32>,
    /// Set if `link` lives in another namespace: this namespace's number for that one.
    pub link_netnsid: Option<i32>,
    /// Administratively up.
    pub up: bool,
    /// Up and with carrier.
    pub running: bool,
    /// Is a loopback interface.
    pub loopback: bool,
    /// Hardware address; empty if there is none.
    pub mac: Vec<u8>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Program id of an XDP program, which sees arriving packets before any other hook.
    pub xdp_program: Option<u32>,
    /// Packet counters.
    pub stats: LinkStats,
}

/// Counters of a link since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LinkStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Received and dropped (a full backlog shows here).
    pub rx_dropped: u64,
    /// Dropped on sending.
    pub tx_dropped: u64,
}

/// What a packet at the tc hooks of a link begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// With an Ethernet header.
    Ethernet,
    /// With the IP header; `skb->protocol` says which.
    Raw,
}

/// All links of the namespace.
pub fn links() -> Result<Vec<Link>, NetlinkError> {
    let what = "list the network interfaces";
    let request = Message::new(&LinkHeader::default()).into_bytes();
    Connection::open(what)?
        .dump(what, RTM_GETLINK, &request)?
        .iter()
        .filter(|(kind, _)| *kind == RTM_NEWLINK)
        .map(|part| parse(what, part))
        .collect()
}

/// The link of that name (or alternative name), if there is one.
pub fn link_by_name(name: &str) -> Result<Option<Link>, NetlinkError> {
    let attribute = if name.len() > MAX_NAME {
        IFLA_ALT_IFNAME
    } else {
        IFLA_IFNAME
    };
    if name.is_empty() || name.contains('\0') {
        return Ok(None);
    }
    one(
        &format!("look up interface '{name}'"),
        Message::new(&LinkHeader::default()).string(attribute, name),
    )
}

/// The link of that index, if there is one.
pub fn link_by_index(index: u32) -> Result<Option<Link>, NetlinkError> {
    if index == 0 {
        return Ok(None);
    }
    let header = LinkHeader {
        index,
        ..LinkHeader::default()
    };
    one(&format!("look up interface {index}"), Message::new(&header))
}

fn one(what: &str, request: Message) -> Result<Option<Link>, NetlinkError> {
    match Connection::open(what)?.request(what, RTM_GETLINK, 0, &request.into_bytes()) {
        Ok(parts) => parts.first().map(|part| parse(what, part)).transpose(),
        // An alternative name longer than the kernel's limit is nobody's name.
        Err(error) if error.is_no_device() || error.errno() == Some(libc::ERANGE) => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(what: &str, (_, message): &Part) -> Result<Link, NetlinkError> {
    let broken = |error| malformed(what, error);
    let header = LinkHeader::parse(message).map_err(broken)?;
    let attributes = Attributes::after(HEADER, message).map_err(broken)?;
    let xdp = attributes.nested(IFLA_XDP).map_err(broken)?;
    let counter = |at: usize| -> u64 {
        attributes
            .get(IFLA_STATS64)
            .and_then(|stats| stats.get(at * 8..at * 8 + 8)?.try_into().ok())
            .map_or(0, u64::from_ne_bytes)
    };
    Ok(Link {
        index: header.index,
        name: attributes.string(IFLA_IFNAME).unwrap_or_default(),
        kind: attributes
            .nested(IFLA_LINKINFO)
            .map_err(broken)?
            .string(IFLA_INFO_KIND),
        arp_type: header.link_layer_type.into(),
        master: attributes.u32(IFLA_MASTER),
        link: attributes.u32(IFLA_LINK).filter(|index| *index != 0),
        link_netnsid: attributes.u32(IFLA_LINK_NETNSID).map(u32::cast_signed),
        up: header.flags.contains(LinkFlags::Up),
        running: header.flags.contains(LinkFlags::Running),
        loopback: header.flags.contains(LinkFlags::Loopback),
        mac: attributes.get(IFLA_ADDRESS).unwrap_or_default().to_vec(),
        mtu: attributes.u32(IFLA_MTU).unwrap_or_default(),
        xdp_program: XDP_PROGRAM_IDS
            .iter()
            .find_map(|kind| xdp.u32(*kind))
            .filter(|id| *id != 0),
        // struct rtnl_link_stats64: rx_packets, tx_packets, rx_bytes, tx_bytes, rx_errors, tx_errors,
        // rx_dropped, tx_dropped, …
        stats: LinkStats {
            rx_packets: counter(0),
            tx_packets: counter(1),
            rx_bytes: counter(2),
            tx_bytes: counter(3),
            rx_dropped: counter(6),
            tx_dropped: counter(7),
        },
    })
}

/// How a packet at the link's tc hooks begins, or the reason why that cannot be relied on.
///
/// At the ingress hook a program sees a packet from `skb->mac_header` on (`cls_bpf_classify` pushes
/// `mac_len` back), so what a driver leaves there decides. Ethernet and loopback devices leave an
/// Ethernet header. ipip (`ipip_tunnel_rcv`), ip6tnl (`__ip6_tnl_rcv`), tun, `WireGuard`
/// (`wg_reset_packet`), PPP (`ppp_receive_nonmp_frame`) and raw-IP modems reset it to the IP header.
/// sit (`ipip6_rcv`) and gre (`__ipgre_rcv`, by `skb_pop_mac_header`) leave it at the *outer* IP header,
/// ip6gre builds a header of its own on egress when it has no fixed remote (`ip6gre_header`), and
/// xfrm and vti keep the header of the device that received the encrypted packet
/// (`skb_mac_header_rebuild`). Read in 6.1 to 6.18.
pub fn link_kind(link: &Link) -> Result<LinkKind, String> {
    let kind = link.kind.as_deref().unwrap_or_default();
    match (link.arp_type, kind) {
        (libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK, _) => Ok(LinkKind::Ethernet),
        (libc::ARPHRD_TUNNEL | libc::ARPHRD_TUNNEL6 | libc::ARPHRD_NONE, "vti" | "vti6" | "xfrm") => {
            Err(format!(
                "it is an IPsec interface ({kind}), and arriving packets still carry the link header \
                 of the device that received them; use that device and select ESP"
            ))
        }
        (
            libc::ARPHRD_NONE
            | ARPHRD_RAWIP
            | libc::ARPHRD_PPP
            | libc::ARPHRD_TUNNEL
            | libc::ARPHRD_TUNNEL6,
            _,
        ) => Ok(LinkKind::Raw),
        (libc::ARPHRD_SIT | libc::ARPHRD_IPGRE | ARPHRD_IP6GRE, _) => Err(format!(
            "it is a tunnel ({}) on which packets begin with the outer header in one direction and \
             with the inner one in the other; use the interface below it and select the tunnel's \
             protocol, or a gretap",
            if kind.is_empty() { "sit or gre" } else { kind }
        )),
        (libc::ARPHRD_CAN, _) => Err("it is a CAN bus, which carries no IP packets".to_owned()),
        (ARPHRD_NETLINK, _) => {
            Err("it is a netlink monitor, which carries no IP packets".to_owned())
        }
        (
            libc::ARPHRD_IEEE80211 | libc::ARPHRD_IEEE80211_PRISM | libc::ARPHRD_IEEE80211_RADIOTAP,
            _,
        ) => Err(
            "it is a wireless interface in monitor mode, whose packets begin with radio headers; use \
             the managed interface"
                .to_owned(),
        ),
        (libc::ARPHRD_INFINIBAND, _) => Err(
            "it is IP over InfiniBand, whose link header the injector cannot read".to_owned(),
        ),
        (other, _) => Err(format!(
            "packets on it begin with a link header that the injector cannot read (hardware type \
             {other}); Ethernet, loopback, tun, WireGuard, PPP, ipip and ip6tnl can be used"
        )),
    }
}

/// Changes a link, or makes or deletes one.
fn change(what: &str, kind: u16, flags: u16, message: Message) -> Result<(), NetlinkError> {
    Connection::open(what)?
        .request(what, kind, flags, &message.into_bytes())
        .map(|_| ())
}

fn create(what: &str, message: Message) -> Result<(), NetlinkError> {
    change(what, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, message)
}

fn on(index: u32) -> Message {
    Message::new(&LinkHeader {
        index,
        ..LinkHeader::default()
    })
}

/// Makes a veth pair: `name` here, `peer` in the namespace `peer_netns` (or here).
pub fn create_veth(
    name: &str,
    peer: &str,
    peer_netns: Option<BorrowedFd<'_>>,
) -> Result<(), NetlinkError> {
    let other = on(0).string(IFLA_IFNAME, peer);
    let other = match peer_netns {
        Some(fd) => other.u32(IFLA_NET_NS_FD, fd.as_raw_fd().cast_unsigned()),
        None => other,
    };
    create(
        &format!("create the veth pair {name} and {peer}"),
        on(0).string(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |info| {
            info.string(IFLA_INFO_KIND, "veth")
                .nest(IFLA_INFO_DATA, |data| {
                    data.bytes(VETH_INFO_PEER, &other.into_bytes())
                })
        }),
    )
}

/// Makes an ifb with the given hardware address and MTU.
pub fn create_ifb(name: &str, mac: [u8; 6], mtu: u32) -> Result<(), NetlinkError> {
    load_ifb();
    create(
        &format!("create the ifb {name}"),
        on(0)
            .string(IFLA_IFNAME, name)
            .bytes(IFLA_ADDRESS, &mac)
            .u32(IFLA_MTU, mtu)
            .nest(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, "ifb")),
    )
}

/// Makes a bridge, with the kernel's default settings (no spanning tree).
pub fn create_bridge(name: &str) -> Result<(), NetlinkError> {
    create(
        &format!("create bridge {name}"),
        on(0)
            .string(IFLA_IFNAME, name)
            .nest(IFLA_LINKINFO, |info| info.string(IFLA_INFO_KIND, "bridge")),
    )
}

/// Makes the interface for VLAN `id` (802.1Q) of `parent`, with so many queues for what it sends. They are not
/// taken from the parent (`rtnl_create_link`, net/core/rtnetlink.c).
pub fn create_vlan(name: &str, parent: u32, id: u16, queues: u32) -> Result<(), NetlinkError> {
    create(
        &format!("create VLAN {id} ({name}) of interface {parent}"),
        on(0)
            .string(IFLA_IFNAME, name)
            .u32(IFLA_LINK, parent)
            .u32(IFLA_NUM_TX_QUEUES, queues)
            .nest(IFLA_LINKINFO, |info| {
                info.string(IFLA_INFO_KIND, "vlan")
                    .nest(IFLA_INFO_DATA, |data| {
                        data.bytes(IFLA_VLAN_ID, &id.to_ne_bytes())
                    })
            }),
    )
}

/// Sets a link up.
pub fn set_up(index: u32) -> Result<(), NetlinkError> {
    let header = LinkHeader {
        index,
        flags: LinkFlags::Up,
        change_mask: LinkFlags::Up,
        ..LinkHeader::default()
    };
    change(
        &format!("set interface {index} up"),
        RTM_NEWLINK,
        0,
        Message::new(&header),
    )
}

/// Makes a link a port of a bridge.
pub fn set_master(index: u32, master: u32) -> Result<(), NetlinkError> {
    change(
        &format!("make interface {index} a port of bridge {master}"),
        RTM_NEWLINK,
        0,
        on(index).u32(IFLA_MASTER, master),
    )
}

/// Deletes a link.
pub fn delete_link(index: u32) -> Result<(), NetlinkError> {
    change(
        &format!("delete interface {index}"),
        RTM_DELLINK,
        0,
        on(index),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_namespace_has_its_loopback() {
        let all = links().unwrap();
        let lo = all.iter().find(|link| link.name == "lo").unwrap();
        assert!(lo.loopback);
        assert_eq!(lo.arp_type, libc::ARPHRD_LOOPBACK);
        assert_eq!(link_kind(lo), Ok(LinkKind::Ethernet));
        let named = link_by_name("lo").unwrap().unwrap();
        assert_eq!(named.index, lo.index);
        assert_eq!(named.mac, [0; 6]);
        assert_eq!(link_by_index(lo.index).unwrap().unwrap().name, "lo");
    }

    #[test]
    fn absent_links_are_none_and_not_errors() {
        for name in [
            "injb-none",
            "",
            "a\0b",
            "a-name-longer-than-an-interface-name",
            &"x".repeat(300),
        ] {
            assert_eq!(link_by_name(name).unwrap(), None, "{name:?}");
        }
        assert_eq!(link_by_index(0).unwrap(), None);
        assert_eq!(link_by_index(0x7fff_ff00).unwrap(), None);
    }

    #[test]
    fn only_links_that_can_be_parsed_are_accepted() {
        let of = |arp_type, kind: &str| {
            link_kind(&Link {
                arp_type,
                kind: (!kind.is_empty()).then(|| kind.to_owned()),
                ..Link::default()
            })
        };
        assert_eq!(of(libc::ARPHRD_ETHER, "veth"), Ok(LinkKind::Ethernet));
        for (arp_type, kind) in [
            (libc::ARPHRD_NONE, "tun"),
            (libc::ARPHRD_NONE, "wireguard"),
            (libc::ARPHRD_PPP, "ppp"),
            (ARPHRD_RAWIP, ""),
            (libc::ARPHRD_TUNNEL, "ipip"),
            (libc::ARPHRD_TUNNEL6, "ip6tnl"),
        ] {
            assert_eq!(of(arp_type, kind), Ok(LinkKind::Raw), "{kind}");
        }
        for (arp_type, kind, word) in [
            (libc::ARPHRD_SIT, "sit", "outer header"),
            (libc::ARPHRD_IPGRE, "gre", "outer header"),
            (libc::ARPHRD_TUNNEL, "vti", "IPsec"),
            (libc::ARPHRD_NONE, "xfrm", "IPsec"),
            (libc::ARPHRD_CAN, "vcan", "CAN"),
            (libc::ARPHRD_INFINIBAND, "ipoib", "InfiniBand"),
            (libc::ARPHRD_IEEE80211_RADIOTAP, "", "monitor"),
            (27, "", "hardware type 27"),
        ] {
            assert!(of(arp_type, kind).unwrap_err().contains(word), "{kind}");
        }
    }
}
