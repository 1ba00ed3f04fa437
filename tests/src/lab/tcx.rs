//! A program of our own at the TCX hook, which runs before every clsact filter: what a user of another
//! tool may have there.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;

use super::netns::Netns;

/// `BPF_PROG_LOAD` of bpf(2).
const PROG_LOAD: libc::c_long = 5;
/// `BPF_LINK_CREATE`.
const LINK_CREATE: libc::c_long = 28;
/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
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

/// The beginning of `union bpf_attr` for loading a program.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// The same for making a link at an interface.
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

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: bpf(2) reads `size_of::<T>()` bytes of attributes, whose pointers are to memory that
    // outlives the call; both commands used here return a new descriptor.
    unsafe {
        let result = libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        );
        let Ok(raw) = i32::try_from(result) else {
            return Err(io::Error::other("bpf(2) returned no descriptor"));
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(raw))
    }
}

/// Loads a TC program.
pub(super) fn load(instructions: &[u64]) -> Result<OwnedFd> {
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"labtests");
    bpf(
        PROG_LOAD,
        &ProgLoad {
            kind: SCHED_CLS,
            instruction_count: u32::try_from(instructions.len())?,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            name,
            ..ProgLoad::default()
        },
    )
    .with_context(|| format!("loading a program of {} instructions", instructions.len()))
}

impl TcxProgram {
    /// Attaches a program that returns `verdict` for everything (`-1`: next, 0: pass, 2: drop). `None`
    /// where the kernel knows no TCX.
    pub fn attach(ns: &Netns, interface: &str, egress: bool, verdict: i32) -> Result<Option<Self>> {
        // r0 = verdict; exit
        let instructions: [u64; 2] = [0xb7 | u64::from(verdict.cast_unsigned()) << 32, 0x95];
        let program = load(&instructions)?;
        let link = ns.enter(|| {
            let attributes = LinkCreate {
                program: program.as_raw_fd().cast_unsigned(),
                interface: if_nametoindex(interface).context(interface.to_owned())?,
                attach_type: if egress { TCX_EGRESS } else { TCX_INGRESS },
                ..LinkCreate::default()
            };
            match bpf(LINK_CREATE, &attributes) {
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
