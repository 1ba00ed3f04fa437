//! bpf(2) by hand, for programs of a few instructions that stand for somebody else's.

use std::{
    io,
    mem::size_of,
    os::fd::{FromRawFd, OwnedFd},
};

use anyhow::{Context, Result};

/// `BPF_PROG_LOAD` of bpf(2).
const PROG_LOAD: libc::c_long = 5;
/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;

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

/// Calls bpf(2) with a command that returns a new descriptor; `T` is what that command reads of
/// `union bpf_attr`.
pub(super) fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: bpf(2) reads `size_of::<T>()` bytes of attributes, whose pointers are to memory that
    // outlives the call; the commands used here return a new descriptor.
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

/// Loads a program for TC hooks.
pub(super) fn load_classifier(instructions: &[u64]) -> Result<OwnedFd> {
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"labtests");
    call(
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
