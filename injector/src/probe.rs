//! What this kernel offers, found out by trying: loading a program, making a map, adding a qdisc.
//!
//! Everything is tried in a network namespace that is made for it and gone afterwards. The only thing
//! that can stay behind is a kernel module that the kernel loads by itself when its feature is asked
//! for, as it would when the feature is used.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use serde::Serialize;

use crate::{
    netlink::{self, Hook, NetlinkError, NewFilter, bpf_call},
    netns,
};

/// Outcome of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It works.
    Ok,
    /// It does not.
    Missing,
    /// It could not be tried.
    Unknown,
}

/// What a feature is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Needed {
    /// Nothing works without it.
    Required,
    /// Faults that need lanes.
    Lanes,
    /// `injector lab`.
    Lab,
    /// Nothing depends on it.
    Optional,
}

/// One line of `injector check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProbeResult {
    /// Name of the feature.
    pub feature: &'static str,
    /// Whether it is there.
    pub status: Status,
    /// What it is needed for.
    pub needed: Needed,
    /// What was found.
    pub detail: String,
    /// What follows from its absence; empty if it is there.
    pub consequence: String,
    /// What to do about its absence; empty if it is there.
    pub remedy: String,
}

/// A feature and what to say of its absence.
struct Feature {
    name: &'static str,
    needed: Needed,
    consequence: &'static str,
    remedy: &'static str,
}

const PRIVILEGES: Feature = Feature {
    name: "privileges",
    needed: Needed::Required,
    consequence: "nothing can be loaded or attached",
    remedy: "run as root (sudo injector …); in a container, give it CAP_NET_ADMIN, CAP_SYS_ADMIN, \
             CAP_BPF and CAP_PERFMON",
};
const NAMESPACES: Feature = Feature {
    name: "network namespaces",
    needed: Needed::Lab,
    consequence: "no labs, no --netns, and most of this check cannot be tried",
    remedy: "run as root on a kernel with CONFIG_NET_NS; in a container, allow unshare and setns",
};
const BPF: Feature = Feature {
    name: "BPF programs",
    needed: Needed::Required,
    consequence: "no fault of any kind",
    remedy: "use a kernel with CONFIG_BPF_SYSCALL; in a container, allow bpf(2) (its seccomp profile \
             may forbid it)",
};
const MAPS: Feature = Feature {
    name: "BPF maps",
    needed: Needed::Required,
    consequence: "no rule can be loaded",
    remedy: "use kernel 6.1 or later with CONFIG_BPF_SYSCALL; raise the memory limit of the cgroup if \
             that is what is short",
};
const BTF: Feature = Feature {
    name: "BTF",
    needed: Needed::Required,
    consequence: "the kernel refuses the type information of the program and its maps",
    remedy: "use kernel 6.1 or later with CONFIG_BPF_SYSCALL",
};
const JIT: Feature = Feature {
    name: "BPF JIT",
    needed: Needed::Optional,
    consequence: "programs are interpreted: every packet on a target costs several times as much",
    remedy: "sysctl net.core.bpf_jit_enable=1, on a kernel with CONFIG_BPF_JIT",
};
const CLSACT: Feature = Feature {
    name: "clsact",
    needed: Needed::Required,
    consequence: "the injector cannot attach to any interface",
    remedy: "use a kernel with CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF and CONFIG_NET_CLS_ACT \
             (modprobe sch_ingress cls_bpf)",
};
const TCX: Feature = Feature {
    name: "TCX",
    needed: Needed::Optional,
    consequence: "none: there is one thing less that could hide packets from us (kernels before 6.6)",
    remedy: "none needed",
};
const MEMBARRIER: Feature = Feature {
    name: "membarrier",
    needed: Needed::Optional,
    consequence: "when every CPU has left an old rule set must be found out in a slower way",
    remedy: "use a kernel with CONFIG_MEMBARRIER, booted without nohz_full",
};
const TEST_RUN: Feature = Feature {
    name: "BPF_PROG_TEST_RUN",
    needed: Needed::Optional,
    consequence: "the program tests and the benchmark cannot run; faults can",
    remedy: "use kernel 6.1 or later",
};
const VETH: Feature = Feature {
    name: "veth",
    needed: Needed::Lab,
    consequence: "no labs",
    remedy: "use a kernel with CONFIG_VETH (modprobe veth)",
};
const BRIDGE: Feature = Feature {
    name: "bridge",
    needed: Needed::Lab,
    consequence: "no labs",
    remedy: "use a kernel with CONFIG_BRIDGE (modprobe bridge)",
};
/// What cannot be had without a lane.
const WITHOUT_LANES: &str = "no faults that need lanes (delay, rate, loss per wire packet); cuts work, and a \
                             positional cut inside a super-packet takes all of it";
const FQ: Feature = Feature {
    name: "sch_fq",
    needed: Needed::Lanes,
    consequence: WITHOUT_LANES,
    remedy: "use a kernel with CONFIG_NET_SCH_FQ (modprobe sch_fq)",
};
const VLAN: Feature = Feature {
    name: "8021q",
    needed: Needed::Lanes,
    consequence: WITHOUT_LANES,
    remedy: "use a kernel with CONFIG_VLAN_8021Q (modprobe 8021q)",
};
const IFB: Feature = Feature {
    name: "ifb",
    needed: Needed::Lanes,
    consequence: WITHOUT_LANES,
    remedy: "use a kernel with CONFIG_IFB (modprobe ifb)",
};

/// Why a probe failed.
enum Failure {
    /// It was tried and does not work.
    Missing(String),
    /// It could not be tried.
    Untried(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Untried(error.to_string()),
            _ => Self::Missing(error.to_string()),
        }
    }
}

impl From<NetlinkError> for Failure {
    fn from(error: NetlinkError) -> Self {
        match error.errno() {
            Some(libc::EPERM | libc::EACCES) => Self::Untried(error.to_string()),
            _ => Self::Missing(error.to_string()),
        }
    }
}

/// What was found, or why nothing was.
type Tried = Result<String, Failure>;

impl Feature {
    fn result(&self, tried: Tried) -> ProbeResult {
        let (status, detail) = match tried {
            Ok(detail) => (Status::Ok, detail),
            Err(Failure::Missing(detail)) => (Status::Missing, detail),
            Err(Failure::Untried(detail)) => (Status::Unknown, detail),
        };
        let absent = |text: &str| match status {
            Status::Ok => String::new(),
            _ => text.to_owned(),
        };
        ProbeResult {
            feature: self.name,
            status,
            needed: self.needed,
            detail,
            consequence: absent(self.consequence),
            remedy: absent(self.remedy),
        }
    }
}

/// Tries everything, in a throw-away network namespace.
#[must_use]
pub fn probe() -> Vec<ProbeResult> {
    let program = load_program();
    let with_program = |test: &dyn Fn(BorrowedFd<'_>) -> Tried| match &program {
        Ok(program) => test(program.as_fd()),
        Err(_) => Err(Failure::Untried("no program could be loaded".to_owned())),
    };
    let inside = netns::in_new(|| {
        vec![
            CLSACT.result(with_program(&clsact)),
            TCX.result(tcx()),
            VETH.result(veth()),
            BRIDGE.result(bridge()),
            FQ.result(fq()),
            VLAN.result(vlan()),
            IFB.result(ifb()),
        ]
    });
    let namespaces = match &inside {
        Ok(_) => Ok("made one to try things in".to_owned()),
        Err(error) => Err(Failure::Untried(error.to_string())),
    };
    let inside = inside.unwrap_or_else(|error| {
        [CLSACT, TCX, VETH, BRIDGE, FQ, VLAN, IFB]
            .iter()
            .map(|feature| feature.result(Err(Failure::Untried(error.to_string()))))
            .collect()
    });
    let mut results = vec![
        PRIVILEGES.result(privileges()),
        BPF.result(match &program {
            Ok(_) => Ok("a tc program loads".to_owned()),
            Err(error) => {
                Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)).into())
            }
        }),
        MAPS.result(maps()),
        BTF.result(btf()),
        JIT.result(with_program(&jit)),
        TEST_RUN.result(with_program(&test_run)),
        MEMBARRIER.result(membarrier()),
        NAMESPACES.result(namespaces),
    ];
    results.extend(inside);
    results
}

/// Capabilities that the injector uses, by their bit in /proc/PID/status.
const CAPABILITIES: [(u32, &str); 4] = [
    (12, "CAP_NET_ADMIN"),
    (21, "CAP_SYS_ADMIN"),
    (38, "CAP_PERFMON"),
    (39, "CAP_BPF"),
];

fn privileges() -> Tried {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = effective_capabilities(&status)
        .ok_or_else(|| Failure::Untried("/proc/self/status names no capabilities".to_owned()))?;
    let lacking: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| effective >> bit & 1 == 0)
        .map(|(_, name)| *name)
        .collect();
    if lacking.is_empty() {
        Ok("all needed capabilities".to_owned())
    } else {
        Err(Failure::Missing(format!("without {}", lacking.join(", "))))
    }
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let text = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(text.trim(), 16).ok()
}

// include/uapi/linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_BTF_LOAD: libc::c_int = 18;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_F_NO_PREALLOC: u32 = 1;

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` needs.
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// The part of `union bpf_attr` that `BPF_MAP_CREATE` needs.
#[repr(C)]
#[derive(Default)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

/// The part of `union bpf_attr` that `BPF_BTF_LOAD` needs.
#[repr(C)]
#[derive(Default)]
struct BtfAttr {
    btf: u64,
    log_buf: u64,
    btf_size: u32,
    log_size: u32,
    log_level: u32,
    _pad: u32,
}

/// The part of `union bpf_attr` that `BPF_PROG_TEST_RUN` needs.
#[repr(C)]
#[derive(Default)]
struct TestAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// Calls bpf(2) for a command that answers with a new file descriptor.
///
/// # Safety
///
/// As for [`bpf_call`].
unsafe fn bpf_fd<T>(command: libc::c_int, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for the attribute.
    let fd = unsafe { bpf_call(command, attr) }?;
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just handed us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Address of a buffer, as bpf(2) takes it.
fn address<T>(buffer: &[T]) -> u64 {
    buffer.as_ptr().expose_provenance() as u64
}

/// A program that lets every packet pass: `r0 = TC_ACT_UNSPEC; exit`.
fn load_program() -> io::Result<OwnedFd> {
    const CODE: [u64; 2] = [0xffff_ffff_0000_00b7, 0x0000_0000_0000_0095];
    let mut attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: 2,
        insns: address(&CODE),
        license: address(b"GPL\0"),
        prog_name: *b"injector_probe\0\0",
        ..LoadAttr::default()
    };
    // SAFETY: the pointers are to constants: two instructions, and a string with its zero.
    unsafe { bpf_fd(BPF_PROG_LOAD, &mut attr) }
}

/// Makes one small map of each type that rules are kept in.
fn maps() -> Tried {
    let create = |name: &str, mut attr: MapAttr| {
        // SAFETY: the command reads numbers only.
        unsafe { bpf_fd(BPF_MAP_CREATE, &mut attr) }.map_err(|error| match Failure::from(error) {
            Failure::Missing(detail) => Failure::Missing(format!("{name}: {detail}")),
            Failure::Untried(detail) => Failure::Untried(format!("{name}: {detail}")),
        })
    };
    let plain = |map_type| MapAttr {
        map_type,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        ..MapAttr::default()
    };
    let inner = create("array", plain(2))?;
    create("hash", plain(1))?;
    create("per-CPU array", plain(6))?;
    create("LRU hash", plain(9))?;
    create(
        "longest-prefix trie",
        MapAttr {
            key_size: 20,
            map_flags: BPF_F_NO_PREALLOC,
            ..plain(11)
        },
    )?;
    create(
        "array of maps",
        MapAttr {
            value_size: 4,
            inner_map_fd: inner.as_raw_fd().cast_unsigned(),
            ..plain(12)
        },
    )?;
    Ok("array, hash, per-CPU array, LRU hash, longest-prefix trie, array of maps".to_owned())
}

/// Loads the BTF of one type, `int`.
fn btf() -> Tried {
    // struct btf_header (magic and version, flags, length; offsets and lengths of types and strings),
    // struct btf_type of kind INT with its 32 bits, and the strings "" and "int" (3 bytes of padding).
    const BLOB: [u32; 12] = [
        0x0001_eb9f,
        24,
        0,
        16,
        16,
        5,
        1,
        0x0100_0000,
        4,
        0x0100_0020,
        u32::from_le_bytes(*b"\0int"),
        0,
    ];
    let mut attr = BtfAttr {
        btf: address(&BLOB),
        // Header, type and the five bytes of strings.
        btf_size: 24 + 16 + 5,
        ..BtfAttr::default()
    };
    // SAFETY: `btf` is a constant of at least `btf_size` bytes; no other pointer is set.
    unsafe { bpf_fd(BPF_BTF_LOAD, &mut attr) }?;
    Ok("type information loads".to_owned())
}

fn jit(program: BorrowedFd<'_>) -> Tried {
    if netlink::program(program)?.jited {
        Ok("programs are compiled to machine code".to_owned())
    } else {
        Err(Failure::Missing("programs are interpreted".to_owned()))
    }
}

fn test_run(program: BorrowedFd<'_>) -> Tried {
    let packet = [0_u8; 64];
    let mut attr = TestAttr {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        data_size_in: 64,
        data_in: address(&packet),
        repeat: 1,
        ..TestAttr::default()
    };
    // SAFETY: `data_in` has `data_size_in` bytes and outlives the call; nothing is written back but
    // numbers in the attribute.
    unsafe { bpf_call(BPF_PROG_TEST_RUN, &mut attr) }?;
    Ok(format!(
        "a program was run on a packet in {} ns",
        attr.duration
    ))
}

fn membarrier() -> Tried {
    /// Waits until every CPU has passed through a quiescent state (`synchronize_rcu` in
    /// kernel/sched/membarrier.c).
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    nix::errno::Errno::result(result).map_err(io::Error::from)?;
    Ok("waits for all CPUs".to_owned())
}

/// Index of the loopback interface of a new namespace.
fn lo() -> Result<u32, Failure> {
    netlink::link_by_name("lo")?
        .map(|link| link.index)
        .ok_or_else(|| Failure::Untried("the new namespace has no lo".to_owned()))
}

fn clsact(program: BorrowedFd<'_>) -> Tried {
    let lo = lo()?;
    netlink::add_clsact(lo)?;
    for hook in Hook::BOTH {
        netlink::attach(
            lo,
            hook,
            &NewFilter {
                program,
                name: "injector:probe",
                priority: 1,
                handle: 1,
                classid: 1,
            },
        )?;
        if netlink::filters(lo, hook)?.len() != 1 {
            return Err(Failure::Missing(format!(
                "a filter attached to {hook} does not show"
            )));
        }
    }
    netlink::delete_clsact(lo)?;
    Ok("filters attach to egress and ingress".to_owned())
}

fn tcx() -> Tried {
    let lo = lo()?;
    match netlink::tcx_query(lo, Hook::Ingress) {
        Ok(_) => {
            Ok("there: what attaches to it sees packets before us, and is reported".to_owned())
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Err(Failure::Missing("this kernel has none".to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

fn veth() -> Tried {
    netlink::create_veth("probe0", "probe1", None)?;
    Ok("a pair can be made".to_owned())
}

fn bridge() -> Tried {
    netlink::create_bridge("probebr")?;
    Ok("a bridge can be made".to_owned())
}

fn fq() -> Tried {
    netlink::add_root_qdisc(lo()?, "fq")?;
    Ok("a qdisc can be made".to_owned())
}

fn vlan() -> Tried {
    let Some(parent) = netlink::link_by_name("probe0")? else {
        return Err(Failure::Untried("there is no veth to try it on".to_owned()));
    };
    netlink::create_vlan("probe0.1", parent.index, 1, 1)?;
    Ok("a VLAN interface can be made".to_owned())
}

fn ifb() -> Tried {
    // A locally administered address; the namespace is gone in a moment.
    netlink::create_ifb("probeifb", [0x02, 0, 0, 0, 0, 1], 1500)?;
    Ok("a device can be made".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_says_what_follows() {
        let results = probe();
        let mut names: Vec<&str> = results.iter().map(|result| result.feature).collect();
        assert_eq!(names.len(), 15);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 15, "{names:?}");
        for result in results {
            let ok = result.status == Status::Ok;
            assert!(!result.detail.is_empty(), "{result:?}");
            assert_eq!(ok, result.consequence.is_empty(), "{result:?}");
            assert_eq!(ok, result.remedy.is_empty(), "{result:?}");
        }
    }

    #[test]
    fn capabilities_are_read() {
        assert_eq!(
            effective_capabilities("CapPrm:\t00\nCapEff:\t000001fffeffffff\n"),
            Some(0x1ff_feff_ffff)
        );
        assert_eq!(effective_capabilities("CapEff:\tx\n"), None);
        assert_eq!(effective_capabilities(""), None);
    }
}
