//! A program of our own at the TCX hook, which runs before every clsact filter: what a user of another
//! tool may have there.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;

use super::{bpf, netns::Netns};

/// `BPF_LINK_CREATE`.
const LINK_CREATE: libc::c_long = 28;
/// `BPF_TCX_INGRESS`.
const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`.
const TCX_EGRESS: u32 = 47;

/// A program at an interface's TCX hook, removed with its guard.
#[derive(Debug)]
pub struct TcxProgram {
    _program: OwnedFd,
    _link: OwnedFd,
}

/// The beginning of `union bpf_attr` for making a link at an interface.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    padding: u32,
    expected_revision: u64,
}

impl TcxProgram {
    /// Attaches a program that returns `verdict` for everything (`-1`: next, 0: pass, 2: drop). `None`
    /// where the kernel knows no TCX.
    pub fn attach(ns: &Netns, interface: &str, egress: bool, verdict: i32) -> Result<Option<Self>> {
        // r0 = verdict; exit
        let instructions: [u64; 2] = [0xb7 | u64::from(verdict.cast_unsigned()) << 32, 0x95];
        let program = bpf::load_classifier(&instructions)?;
        let link = ns.enter(|| {
            let attributes = LinkCreate {
                program: program.as_raw_fd().cast_unsigned(),
                interface: if_nametoindex(interface).context(interface.to_owned())?,
                attach_type: if egress { TCX_EGRESS } else { TCX_INGRESS },
                ..LinkCreate::default()
            };
            match bpf::call(LINK_CREATE, &attributes) {
                Ok(link) => Ok(Some(link)),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
                Err(error) => Err(error).context("attaching a program at the TCX hook"),
            }
        })?;
        Ok(link.map(|link| Self {
            _program: program,
            _link: link,
        }))
    }
}
