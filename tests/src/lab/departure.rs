//! The wrong way to delay: a departure time on the sender's own packet, which fq then holds. The packet counts
//! against its socket while it is held, and TCP lets two of them be under way (`tcp_small_queue_check`,
//! `net/ipv4/tcp_output.c`, 6.1). Here so that tests of throughput can be shown to reject it.

use std::{os::fd::AsFd, time::Duration};

use anyhow::{Context, Result};
use injector::netlink::{self, Hook, NewFilter};
use nix::net::if_::if_nametoindex;

use super::{bpf, netns::Netns};

/// Where `tstamp` is in `struct __sk_buff` (`include/uapi/linux/bpf.h`).
const TSTAMP: u64 = 152;

/// An interface whose packets are delayed the wrong way, as it was before when this is dropped.
#[derive(Debug)]
pub struct Departures {
    ns: Netns,
    interface: String,
}

impl Departures {
    /// Delays what leaves through an interface that has a clsact and no qdisc of its own.
    pub fn on(ns: &Netns, interface: &str, delay: Duration) -> Result<Self> {
        let delay = u64::from(u32::try_from(delay.as_nanos())?);
        let instructions = [
            // r6 = r1; call bpf_ktime_get_ns; r0 += delay
            0x16bf,
            0x85 | 5 << 32,
            0x07 | delay << 32,
            // *(u64 *)(r6 + TSTAMP) = r0; r0 = TC_ACT_UNSPEC; exit
            0x067b | TSTAMP << 16,
            0xb7 | 0xffff_ffff << 32,
            0x95,
        ];
        let program = bpf::load_classifier(&instructions)?;
        let departures = Self {
            ns: ns.clone(),
            interface: interface.to_owned(),
        };
        ns.tool(&format!(
            "tc qdisc add dev {interface} root fq limit 100000 flow_limit 100000"
        ))?;
        ns.enter(|| {
            let index = if_nametoindex(interface).context(interface.to_owned())?;
            let filter = NewFilter {
                program: program.as_fd(),
                name: "departures",
                priority: 7,
                handle: 1,
                classid: 0,
            };
            Ok(netlink::attach(index, Hook::Egress, &filter)?)
        })?;
        Ok(departures)
    }
}

impl Drop for Departures {
    fn drop(&mut self) {
        let interface = &self.interface;
        for line in [
            format!("tc filter del dev {interface} egress pref 7"),
            format!("tc qdisc del dev {interface} root"),
        ] {
            if let Err(error) = self.ns.tool(&line) {
                eprintln!("could not undo {interface}: {error:#}");
            }
        }
    }
}
