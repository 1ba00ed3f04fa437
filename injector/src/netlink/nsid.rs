//! The numbers under which one namespace knows others.

use std::{fs, os::fd::AsRawFd};

use super::{
    NetlinkError,
    attribute::{Attributes, Message},
    socket::{Connection, malformed},
};
use crate::netns::Netns;

// include/uapi/linux/rtnetlink.h, net_namespace.h
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// `struct rtgenmsg`, padded.
const HEADER: usize = 4;

/// The number that the namespace of this thread has for `other`; none if it has given none (no link
/// here leads there).
pub(super) fn netns_number(other: &Netns) -> Result<Option<i32>, NetlinkError> {
    let what = format!("look up the number of network namespace {other}");
    let file = fs::File::open(&other.path).map_err(|source| NetlinkError::Open {
        what: what.clone(),
        source,
    })?;
    let request = Message::from_header(&[0; HEADER])
        .u32(NETNSA_FD, file.as_raw_fd().cast_unsigned())
        .into_bytes();
    let parts = Connection::open(&what)?.request(&what, RTM_GETNSID, 0, &request)?;
    let Some((_, answer)) = parts.first() else {
        return Ok(None);
    };
    let number = Attributes::after(HEADER, answer)
        .map_err(|error| malformed(&what, error))?
        .u32(NETNSA_NSID)
        .map(u32::cast_signed);
    // NETNSA_NSID_NOT_ASSIGNED is -1.
    Ok(number.filter(|number| *number >= 0))
}
