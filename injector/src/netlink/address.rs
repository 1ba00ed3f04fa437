//! Addresses of interfaces.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{AddressFamily, address::AddressHeader};

use super::{
    NetlinkError,
    attribute::{Attributes, Message},
    socket::{Connection, malformed},
};

// include/uapi/linux/rtnetlink.h, if_addr.h
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const HEADER: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;

/// All addresses of the namespace, with the interface's index and the prefix length.
pub fn addresses() -> Result<Vec<(u32, IpNet)>, NetlinkError> {
    let what = "list the addresses of the network interfaces";
    let request = Message::new(&AddressHeader::default()).into_bytes();
    let mut found = Vec::new();
    for (kind, message) in Connection::open(what)?.dump(what, RTM_GETADDR, &request)? {
        if kind != RTM_NEWADDR {
            continue;
        }
        let header = AddressHeader::parse(&message).map_err(|error| malformed(what, error))?;
        let attributes =
            Attributes::after(HEADER, &message).map_err(|error| malformed(what, error))?;
        // On a point-to-point link IFA_ADDRESS is the other end and IFA_LOCAL ours; IPv6 has only the
        // former unless there is a peer.
        let ours = attributes
            .address(IFA_LOCAL)
            .or_else(|| attributes.address(IFA_ADDRESS));
        // Other families (bridges list none, phonet does) have no address that can be read as IP.
        if let Some(address) = ours
            && let Ok(net) = IpNet::new(address, header.prefix_len)
        {
            found.push((header.index, net));
        }
    }
    Ok(found)
}

/// Gives an interface an address. An IPv6 one can be used at once: it is not probed for duplicates.
pub fn add_address(index: u32, address: IpNet) -> Result<(), NetlinkError> {
    let what = format!("give interface {index} the address {address}");
    let header = AddressHeader {
        family: match address {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        },
        prefix_len: address.prefix_len(),
        index,
        ..AddressHeader::default()
    };
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let own = octets(address.addr());
    let message = Message::new(&header)
        .bytes(IFA_LOCAL, &own)
        .bytes(IFA_ADDRESS, &own);
    let message = match address {
        IpNet::V4(_) => message.bytes(IFA_BROADCAST, &octets(address.broadcast())),
        IpNet::V6(_) => message.u32(IFA_FLAGS, IFA_F_NODAD),
    };
    Connection::open(&what)?
        .request(
            &what,
            RTM_NEWADDR,
            NLM_F_CREATE | NLM_F_EXCL,
            &message.into_bytes(),
        )
        .map(|_| ())
}
