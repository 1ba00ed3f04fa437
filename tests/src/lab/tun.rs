//! A tunnel device whose other end is the test: no link layer, packets begin with their IP headers.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{netns::Netns, packet_socket::last_error, wait::wait_until};

/// The other end of a device, which goes with it.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes a device of this name in a namespace.
    pub fn new(ns: &Netns, name: &str) -> Result<Self> {
        let file = ns.enter(|| {
            let file = File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")
                .context("opening /dev/net/tun")?;
            // SAFETY: all-zero bytes are a valid request.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *place = byte.cast_signed();
            }
            request.ifr_ifru.ifru_flags =
                i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).context("flags")?;
            // SAFETY: the request is valid and outlives the call.
            let made =
                unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
            if made < 0 {
                return Err(last_error("TUNSETIFF"));
            }
            Ok(file)
        })?;
        Ok(Self { file })
    }

    /// Lets a packet arrive at the device.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        (&self.file)
            .write_all(packet)
            .context("sending into a tunnel")
    }

    /// Waits for a packet that leaves through the device and that `wanted` makes something of.
    pub fn wait<T>(&self, wanted: impl Fn(&[u8]) -> Result<Option<T>>) -> Result<T> {
        let mut found = None;
        wait_until("a tunnel's packet", Duration::from_secs(10), || {
            let mut bytes = vec![0; 1 << 16];
            loop {
                match (&self.file).read(&mut bytes) {
                    Ok(length) => found = wanted(&bytes[..length])?,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                    Err(error) => return Err(error).context("reading from a tunnel"),
                }
                if found.is_some() {
                    return Ok(true);
                }
            }
        })?;
        found.context("nothing was found")
    }
}
