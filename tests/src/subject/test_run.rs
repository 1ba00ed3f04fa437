//! `BPF_PROG_TEST_RUN` of the data plane's programs, for any target.
//!
//! A program learns its target from `tc_classid`, which a test run cannot set: of the fields that it can
//! (`convert___skb_to_skb`, `net/bpf/test_run.c`, 6.18) only `cb` is free to carry a number. So the program
//! under test is not run itself, but tail-called from one of six instructions that moves `cb[0]` into
//! `tc_classid`.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use injector::dataplane::{DataPlane, Hook as PlaneHook};

use crate::model::{Hook, Packet};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_MAP_TYPE_PROG_ARRAY: u32 = 3;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_FUNC_TAIL_CALL: i32 = 12;
const BPF_PSEUDO_MAP_FD: u8 = 1;

/// Actions of the programs (`include/uapi/linux/pkt_cls.h`).
const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_STOLEN: u32 = 4;
const TC_ACT_REDIRECT: u32 = 7;
/// What the dispatcher returns if the tail call failed.
const NOT_CALLED: u32 = 99;

/// `struct __sk_buff` (include/uapi/linux/bpf.h): the fields that a test run takes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SkBuff {
    len: u32,
    pkt_type: u32,
    mark: u32,
    unused_1: [u32; 9],
    cb: [u32; 5],
    unused_2: [u32; 24],
    gso_segs: u32,
    sk: u64,
    gso_size: u32,
    unused_3: u32,
    hwtstamp: u64,
}

const _: () = {
    assert!(std::mem::offset_of!(SkBuff, mark) == 8);
    assert!(std::mem::offset_of!(SkBuff, cb) == 48);
    assert!(std::mem::offset_of!(SkBuff, gso_segs) == 164);
    assert!(std::mem::offset_of!(SkBuff, gso_size) == 176);
    assert!(size_of::<SkBuff>() == 192);
};

/// Offset of `tc_classid` in `struct __sk_buff`.
const TC_CLASSID: i16 = 72;
/// Offset of `cb[0]`.
const CB: i16 = 48;

/// What is said of a packet besides its bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Context {
    /// Slot of the target.
    pub target: u16,
    /// `skb->mark`.
    pub mark: u32,
    /// Payload of a segment; 0 for a packet that is no super-packet.
    pub gso_size: u16,
    /// Segments; 0 if not counted.
    pub gso_segs: u16,
}

impl Context {
    /// That of a packet of the model's.
    #[must_use]
    pub fn of(packet: &Packet) -> Self {
        Self {
            target: packet.target,
            mark: packet.mark,
            gso_size: packet.gso_size,
            gso_segs: packet.gso_segs,
        }
    }
}

/// What a program says of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It is lost.
    Cut,
    /// It is lost, and was made into its answer.
    Answered,
}

/// Why a test run could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TestRunError {
    /// A call of bpf(2) failed.
    #[error(
        "bpf({command}) failed: {source}; this needs root, and a kernel with CONFIG_BPF_SYSCALL"
    )]
    Bpf {
        /// The command.
        command: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// A program returned what none of ours returns.
    #[error(
        "the program returned {0:#x}, which is none of TC_ACT_UNSPEC, TC_ACT_STOLEN, TC_ACT_REDIRECT"
    )]
    Action(u32),
}

fn bpf<T>(
    command: libc::c_long,
    name: &'static str,
    attributes: &mut T,
) -> Result<i32, TestRunError> {
    // SAFETY: the attributes are of the size given, and what they point to outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(TestRunError::Bpf {
            command: name,
            source: io::Error::last_os_error(),
        }),
    }
}

/// `struct bpf_insn`.
const fn instruction(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    (code as u64)
        | ((source << 4 | target) as u64) << 8
        | (offset.cast_unsigned() as u64) << 16
        | (immediate.cast_unsigned() as u64) << 32
}

/// A program that sets the target and tail-calls, and the array that it calls from.
#[derive(Debug)]
struct Trampoline {
    program: OwnedFd,
    _array: OwnedFd,
}

impl Trampoline {
    fn new(callee: BorrowedFd<'_>) -> Result<Self, TestRunError> {
        #[repr(C)]
        struct MapCreate {
            kind: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            flags: u32,
        }
        #[repr(C)]
        struct MapUpdate {
            map: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        #[repr(C)]
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
        }
        let mut create = MapCreate {
            kind: BPF_MAP_TYPE_PROG_ARRAY,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            flags: 0,
        };
        let array = bpf(BPF_MAP_CREATE, "BPF_MAP_CREATE", &mut create)?;
        // SAFETY: just made, and nobody else's.
        let array = unsafe { OwnedFd::from_raw_fd(array) };
        let key = 0_u32;
        let value = callee.as_raw_fd();
        let mut update = MapUpdate {
            map: array.as_raw_fd().cast_unsigned(),
            padding: 0,
            key: (&raw const key) as u64,
            value: (&raw const value) as u64,
            flags: 0,
        };
        bpf(BPF_MAP_UPDATE_ELEM, "BPF_MAP_UPDATE_ELEM", &mut update)?;

        // r1 is the context; r2, r3 and r0 are free.
        let instructions = [
            // r0 = *(u32 *)(r1 + cb[0]); *(u32 *)(r1 + tc_classid) = r0
            instruction(0x61, 0, 1, CB, 0),
            instruction(0x63, 1, 0, TC_CLASSID, 0),
            // r2 = array; r3 = 0; call bpf_tail_call
            instruction(0x18, 2, BPF_PSEUDO_MAP_FD, 0, array.as_raw_fd()),
            instruction(0, 0, 0, 0, 0),
            instruction(0xb7, 3, 0, 0, 0),
            instruction(0x85, 0, 0, 0, BPF_FUNC_TAIL_CALL),
            // Not reached if the call worked.
            instruction(0xb7, 0, 0, 0, NOT_CALLED.cast_signed()),
            instruction(0x95, 0, 0, 0, 0),
        ];
        let license = c"GPL";
        let mut load = ProgLoad {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            instruction_count: 8,
            instructions: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
        };
        let program = bpf(BPF_PROG_LOAD, "BPF_PROG_LOAD", &mut load)?;
        // SAFETY: just made, and nobody else's.
        let program = unsafe { OwnedFd::from_raw_fd(program) };
        Ok(Self {
            program,
            _array: array,
        })
    }
}

/// Runs a data plane's programs on packets. Keeps the programs, not the data plane: it can be used from
/// another thread while rule sets are committed.
#[derive(Debug)]
pub struct Dispatcher {
    egress: Trampoline,
    ingress: Trampoline,
}

impl Dispatcher {
    /// For the programs of a data plane.
    ///
    /// # Errors
    /// If bpf(2) refuses the dispatching programs.
    pub fn new(plane: &DataPlane) -> Result<Self, TestRunError> {
        Ok(Self {
            egress: Trampoline::new(plane.program_fd(PlaneHook::Egress))?,
            ingress: Trampoline::new(plane.program_fd(PlaneHook::Ingress))?,
        })
    }

    /// What the program of a hook says of a packet.
    ///
    /// # Errors
    /// If the kernel does not take the packet, or the program returned what none of ours returns.
    pub fn run(&self, hook: Hook, context: Context, bytes: &[u8]) -> Result<Verdict, TestRunError> {
        #[repr(C)]
        #[derive(Default)]
        struct TestRun {
            program: u32,
            result: u32,
            data_in_size: u32,
            data_out_size: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
            context_in_size: u32,
            context_out_size: u32,
            context_in: u64,
            context_out: u64,
            flags: u32,
            cpu: u32,
            batch_size: u32,
            padding: u32,
        }
        let trampoline = match hook {
            Hook::Egress => &self.egress,
            Hook::Ingress => &self.ingress,
        };
        let skb = SkBuff {
            len: 0,
            pkt_type: 0,
            mark: context.mark,
            unused_1: [0; 9],
            cb: [u32::from(context.target), 0, 0, 0, 0],
            unused_2: [0; 24],
            gso_segs: u32::from(context.gso_segs),
            sk: 0,
            gso_size: u32::from(context.gso_size),
            unused_3: 0,
            hwtstamp: 0,
        };
        let mut run = TestRun {
            program: trampoline.program.as_raw_fd().cast_unsigned(),
            data_in_size: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            data_in: bytes.as_ptr() as u64,
            repeat: 1,
            context_in_size: 192,
            context_in: (&raw const skb) as u64,
            ..TestRun::default()
        };
        bpf(BPF_PROG_TEST_RUN, "BPF_PROG_TEST_RUN", &mut run)?;
        match run.result {
            TC_ACT_UNSPEC => Ok(Verdict::Pass),
            TC_ACT_STOLEN => Ok(Verdict::Cut),
            TC_ACT_REDIRECT => Ok(Verdict::Answered),
            other => Err(TestRunError::Action(other)),
        }
    }
}
