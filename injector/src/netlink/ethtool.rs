//! Switching an interface's offloads, by `ioctl(SIOCETHTOOL)`: the ethtool netlink family's feature setter is
//! in no crate, and the ioctl does the same on every kernel.

use std::{io, mem::size_of, os::fd::AsRawFd as _};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::NetlinkError;

// include/uapi/linux/ethtool.h, sockios.h
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// Switches off every offload of sending that cuts packets up or completes checksums later, so that what
/// leaves the interface is wire packets with complete checksums. What it cannot switch stays as it is.
pub fn complete_packets(ifname: &str) -> Result<(), NetlinkError> {
    let what = format!("switch off the offloads of interface {ifname}");
    let failed = |source: io::Error| NetlinkError::Transfer {
        what: what.clone(),
        source,
    };
    let names = features(ifname).map_err(failed)?;
    let blocks = names.len().div_ceil(32);
    // struct ethtool_sfeatures: command, number of blocks, and for each the mask and the values.
    let mut request = vec![0_u32; 2 + 2 * blocks];
    request[0] = ETHTOOL_SFEATURES;
    request[1] = u32::try_from(blocks).unwrap_or(0);
    for (bit, name) in names.iter().enumerate() {
        if name.starts_with("tx-") && (name.contains("checksum") || name.contains("seg")) {
            request[2 + 2 * (bit / 32)] |= 1 << (bit % 32);
        }
    }
    let length = request.len();
    call(ifname, &mut request[..length]).map_err(failed)
}

/// The names of all features, by bit.
fn features(ifname: &str) -> io::Result<Vec<String>> {
    // struct ethtool_sset_info: command, reserved, mask of sets (64 bits), one count.
    let mut info = [0_u32; 5];
    info[0] = ETHTOOL_GSSET_INFO;
    info[2] = 1 << ETH_SS_FEATURES;
    call(ifname, &mut info)?;
    let count = info[4] as usize;
    // struct ethtool_gstrings: command, set, length, and strings of 32 bytes.
    let mut strings = vec![0_u32; 3 + count * ETH_GSTRING_LEN / size_of::<u32>()];
    strings[0] = ETHTOOL_GSTRINGS;
    strings[1] = ETH_SS_FEATURES;
    strings[2] = info[4];
    call(ifname, &mut strings)?;
    let bytes: Vec<u8> = strings[3..]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    Ok(bytes
        .chunks_exact(ETH_GSTRING_LEN)
        .map(|name| {
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(name).into_owned()
        })
        .collect())
}

/// One request; the kernel writes its answer into the same memory.
fn call(ifname: &str, data: &mut [u32]) -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if ifname.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(ifname.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
    // SAFETY: the request and what it points to live until the call returns, and are as long as the
    // command says.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
