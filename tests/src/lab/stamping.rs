//! The kernel's times of arrival.

use std::{
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsFd,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimestampns};

use super::{
    netns::Netns,
    timed::{now_ns, stamped},
    udp::socket,
    wait::wait_until,
};

/// Far more than a reader needs to come to a datagram that waits for it.
const UNREAD: Duration = Duration::from_millis(2);

/// Has the kernel say of each datagram that comes to a socket of a namespace when it arrived (`SO_TIMESTAMPNS`).
///
/// The first socket of a host that asks for it has the kernel turn a switch, by way of a worker
/// (`net_enable_timestamp`). What comes before that gets the time at which it is read. So the first one here waits for
/// the switch, at the namespace's loopback interface, and keeps it turned for as long as this process lives.
pub(super) fn stamp_arrivals(receiver: &impl AsFd, ns: &Netns) -> Result<()> {
    static KEEPING: Mutex<Option<UdpSocket>> = Mutex::new(None);
    ask(receiver)?;
    let mut keeping = KEEPING.lock().unwrap_or_else(PoisonError::into_inner);
    if keeping.is_some() {
        return Ok(());
    }
    let looking = socket(ns, (Ipv4Addr::LOCALHOST, 0).into())?;
    looking.connect(looking.local_addr()?)?;
    ask(&looking)?;
    wait_until(
        "the kernel stamps what arrives",
        Duration::from_secs(10),
        || {
            looking.send(&[0]).context("sending a datagram to itself")?;
            thread::sleep(UNREAD);
            let read_ns = now_ns()?;
            let stamp = stamped(&looking, &mut [0])?;
            Ok(stamp.is_some_and(|stamp| stamp.at_ns < read_ns))
        },
    )?;
    // In the host's own namespace, where it neither sends nor receives anything: there no lab has to wait for it.
    let kept = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("binding a socket")?;
    ask(&kept)?;
    *keeping = Some(kept);
    Ok(())
}

fn ask(socket: &impl AsFd) -> Result<()> {
    setsockopt(socket, ReceiveTimestampns, &true).context("SO_TIMESTAMPNS")
}
