//! What bpf(2) knows of programs that others attached.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::errno::Errno;

use super::{NetlinkError, tc::Hook};

// include/uapi/linux/bpf.h
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

/// The kernel runs at most 64 programs on one hook (`BPF_MPROG_MAX`).
const MAX_PROGRAMS: usize = 64;

/// A loaded program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its id, unique for a boot.
    pub id: u32,
    /// Its name; may be empty.
    pub name: String,
    /// Whether it was compiled to machine code.
    pub jited: bool,
}

/// The part of `union bpf_attr` that `BPF_PROG_QUERY` reads.
#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    _pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The part of `union bpf_attr` that `BPF_OBJ_GET_INFO_BY_FD` reads.
#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// The part of `union bpf_attr` that `BPF_PROG_GET_FD_BY_ID` reads.
#[repr(C)]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next: u32,
    open_flags: u32,
}

/// The beginning of `struct bpf_prog_info`; the kernel fills as much as it is given room for.
#[repr(C)]
#[derive(Default)]
struct ProgInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_len: u32,
    xlated_len: u32,
    jited_insns: u64,
    xlated_insns: u64,
    load_time: u64,
    created_by_uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; 16],
}

const _: () = assert!(size_of::<QueryAttr>() == 64);
const _: () = assert!(size_of::<ProgInfo>() == 80);

/// Calls bpf(2).
///
/// # Safety
///
/// `attr` must be the part of `union bpf_attr` that `command` reads, and every pointer in it must be
/// good for what the command does with it.
pub(crate) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller vouches for the attribute; its size is passed along.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    Ok(Errno::result(result)?)
}

/// What is known of the program behind a file descriptor.
pub fn program(fd: BorrowedFd<'_>) -> Result<Program, NetlinkError> {
    let mut info = ProgInfo::default();
    let mut attr = InfoAttr {
        fd: fd.as_raw_fd().cast_unsigned(),
        length: 80,
        info: (&raw mut info).expose_provenance() as u64,
    };
    // SAFETY: `info` is 80 bytes of plain numbers, as `length` says, and outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.map_err(|source| NetlinkError::Refused {
        what: "look a BPF program up".to_owned(),
        source,
        kernel: None,
    })?;
    let name = info
        .name
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    Ok(Program {
        id: info.id,
        name: String::from_utf8_lossy(name).into_owned(),
        jited: info.jited_len != 0,
    })
}

/// What is known of a program by its id; `None` if it has been unloaded.
pub fn program_by_id(id: u32) -> Result<Option<Program>, NetlinkError> {
    let mut attr = IdAttr {
        id,
        ..IdAttr::default()
    };
    // SAFETY: the command reads numbers only.
    match unsafe { bpf(BPF_PROG_GET_FD_BY_ID, &mut attr) } {
        Ok(fd) => {
            let fd = libc::c_int::try_from(fd).map_err(|_| NetlinkError::Malformed {
                what: format!("look BPF program {id} up"),
                detail: "file descriptor out of range".to_owned(),
            })?;
            // SAFETY: the kernel has just handed us this descriptor; nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            program(std::os::fd::AsFd::as_fd(&fd)).map(Some)
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(source) => Err(NetlinkError::Refused {
            what: format!("look BPF program {id} up"),
            source,
            kernel: None,
        }),
    }
}

/// Whether the kernel has TCX, by asking it for the programs on an interface of this namespace.
pub(crate) fn tcx_query(ifindex: u32, hook: Hook) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_PROGRAMS];
    let mut attr = QueryAttr {
        target_ifindex: ifindex,
        attach_type: match hook {
            Hook::Egress => BPF_TCX_EGRESS,
            Hook::Ingress => BPF_TCX_INGRESS,
        },
        prog_ids: ids.as_mut_ptr().expose_provenance() as u64,
        count: 64,
        ..QueryAttr::default()
    };
    // SAFETY: `prog_ids` has room for `count` numbers and outlives the call; no other pointer is set.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    let count = usize::try_from(attr.count).map_or(MAX_PROGRAMS, |count| count.min(MAX_PROGRAMS));
    Ok(ids[..count].to_vec())
}

/// Ids of the TCX programs on a hook, in the order in which they run; none where the kernel has no TCX
/// (before 6.6).
pub fn tcx_programs(ifindex: u32, hook: Hook) -> Result<Vec<u32>, NetlinkError> {
    match tcx_query(ifindex, hook) {
        Ok(ids) => Ok(ids),
        // Unknown attach type; no entry for this hook.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
            Ok(Vec::new())
        }
        Err(source) => Err(NetlinkError::Refused {
            what: format!("list the TCX programs on the {hook} hook of interface {ifindex}"),
            source,
            kernel: None,
        }),
    }
}
