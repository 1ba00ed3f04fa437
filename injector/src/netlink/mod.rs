//! Blocking rtnetlink, as much of it as the injector needs. Every function opens a socket of its own,
//! so that it talks to the network namespace of the calling thread: call them inside
//! [`crate::netns::Netns::run`].

mod address;
mod attribute;
mod bpf;
mod error;
mod ethtool;
mod link;
mod module;
mod nsid;
mod overlap;
mod route;
mod socket;
mod tc;

pub use self::{
    address::{add_address, addresses},
    bpf::{Program, program, program_by_id, tcx_programs},
    error::NetlinkError,
    ethtool::complete_packets,
    link::{
        Link, LinkKind, LinkStats, create_bridge, create_ifb, create_veth, create_vlan,
        delete_link, link_by_index, link_by_name, link_kind, links, set_master, set_up,
    },
    overlap::double_pass,
    route::{Route, outgoing, routes},
    tc::{
        BpfFilter, Created, Filter, FqLimits, Hook, HookQdisc, NewFilter, QdiscStats, add_clsact,
        add_fq, attach, chains, change_fq, delete_clsact, detach, filters, has_clsact, has_fq,
        hook_qdisc, root_stats,
    },
};
pub(crate) use self::{
    bpf::{bpf as bpf_call, tcx_query},
    tc::{add_root_qdisc, hexadecimal},
};
