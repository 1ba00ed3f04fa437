//! The loaded programs and their maps.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{
        Array, HashMap as BpfHashMap, IterableMap as _, LpmTrie, Map, MapData, PerCpuArray,
        PerCpuValues, ProgramArray, lpm_trie::Key,
    },
    programs::SchedClassifier,
};
use injector_common::{
    holders,
    layout::{
        Bitmap, Class, Config, Connection, DISTRIBUTIONS, Distribution, FlowEntry, FlowKey,
        Flushed, Held, Histograms, LaneLoad, MAX_EXEMPTIONS, MAX_FLUSHES, MAX_RULES, MAX_SLOTS,
        PORT_CLASSES, PROTOCOL_CLASSES, Prefix, RuleCounters, RuleEntry, Shape, State, StateKey,
        TRACE_ENTRIES, Target, TargetCounters, UNDERWAY, family, hook, lane_load, state_site,
    },
};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::netlink::Hook;

use super::{
    compile::{Capacity, CompileError, Compiler},
    distribution,
    image::{Image, PrefixOf, TargetImage},
    mapping::Mapping,
    values::{
        ActiveRule, Exemption, LaneBounds, LaneNumber, LaneUse, LinkKind, RuleSlot, TargetConfig,
        TargetSlot,
    },
};

/// The object that `cargo xtask build` made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("INJECTOR_EBPF_OBJECT"));

/// Sizes of tables, in entries, chosen when the programs are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sizes {
    /// Flows that meet rules. Full: flows are classified with every packet, and counted (`table_full`).
    pub flows: u32,
    /// Flows that rules remember something of. Full: positional faults do not act on further flows, and that
    /// is counted (`stateless_packets`).
    pub states: u32,
    /// Flows known to meet no rule. Full: the oldest is forgotten and classified again.
    pub idle_flows: u32,
    /// Different prefixes in the address sets of all rules. Full: `add` is refused.
    pub prefixes: u32,
    /// Different ways in which address and port sets overlap. Full: `add` is refused.
    pub bitmaps: u32,
    /// Interfaces. Full: `add` is refused.
    pub targets: u16,
    /// Fragmented datagrams under way. Full: the oldest is forgotten, and its later fragments have no ports.
    pub fragments: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            flows: 65_536,
            states: 131_072,
            idle_flows: 65_536,
            prefixes: 1_048_576,
            bitmaps: 8192,
            targets: 256,
            fragments: 8192,
        }
    }
}

/// The name, in the object, of the program for a hook.
fn program_of(hook: Hook) -> &'static str {
    match hook {
        Hook::Egress => "injector_egress",
        Hook::Ingress => "injector_ingress",
    }
}

/// What went wrong with the data plane.
#[derive(Debug, thiserror::Error)]
pub enum DataPlaneError {
    /// The object or its maps were refused.
    #[error("cannot load the eBPF object: {source}; `injector check` says what this kernel lacks")]
    Load {
        /// Cause.
        source: Box<aya::EbpfError>,
    },
    /// A program was refused.
    #[error(
        "the kernel's verifier refused program {program} (bpf(BPF_PROG_LOAD)): {source}; \
         `injector check` says what this kernel lacks"
    )]
    Program {
        /// Its name.
        program: &'static str,
        /// Cause.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object lacks a part: it is not the one of this build.
    #[error("the eBPF object has no {0}; rebuild with `cargo xtask build`")]
    Missing(&'static str),
    /// A map could not be read or written.
    #[error("cannot {what} map {map}: {source}")]
    Map {
        /// What was tried.
        what: &'static str,
        /// The map.
        map: &'static str,
        /// Cause.
        source: Box<aya::maps::MapError>,
    },
    /// A map could not be mapped into memory.
    #[error("cannot map {map} into memory (mmap): {source}")]
    Mmap {
        /// The map.
        map: &'static str,
        /// Cause.
        source: nix::Error,
    },
}

/// Why a rule set was not made visible. The one in force before still is.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// It does not fit.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// Its prefixes could not be written.
    #[error(transparent)]
    Plane(#[from] DataPlaneError),
}

/// A rule set that is now in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    /// Its number.
    pub epoch: u64,
    /// Prefixes that had to be written or deleted.
    pub prefixes_changed: usize,
    /// Time to compile and write it.
    pub prepared: Duration,
    /// Time until no CPU decides by the one before any more.
    pub settled: Duration,
}

/// What a timed collection of flow state did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Flows forgotten.
    pub flows: u64,
    /// States of rules that are gone.
    pub orphaned_states: u64,
    /// States that were idle: should the flow come back, its numbers begin anew.
    pub idle_states: u64,
    /// Connections forgotten.
    pub connections: u64,
}

/// What lanes lost, or met on their devices and know nothing of, since the programs were loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct LaneLosses {
    /// Packets of somebody else's.
    pub strays: u64,
    /// Copies that could not be sent.
    pub copies: u64,
    /// Packets that could not be brought back.
    pub returns: u64,
    /// Packets that were lost on the way to the line.
    pub entries: u64,
}

/// How full a table is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableUse {
    /// Its name.
    pub name: &'static str,
    /// Entries in use; `None` where that is not counted (the oldest is evicted when it is full).
    pub entries: Option<u64>,
    /// Entries at most.
    pub capacity: u32,
    /// Memory that the kernel accounts to it, in bytes.
    pub bytes: u64,
}

/// A program, as the verifier saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProgramReport {
    /// Its name.
    pub name: String,
    /// Instructions that the verifier went through.
    pub verified: Option<u32>,
    /// Size of the translated program in bytes.
    pub translated_bytes: Option<u32>,
    /// Size of the machine code in bytes.
    pub machine_bytes: u32,
}

/// The loaded programs and their maps. Dropping it frees them, unless a filter still holds a program.
pub struct DataPlane {
    ebpf: Ebpf,
    egress: OwnedFd,
    ingress: OwnedFd,
    carrier: OwnedFd,
    line: OwnedFd,
    sizes: Sizes,
    config: Arc<Mapping<Config>>,
    targets: Mapping<Target>,
    protocols: Mapping<u32>,
    ports: Mapping<Class>,
    bitmaps: Mapping<Bitmap>,
    rules: Mapping<RuleEntry>,
    shapes: Mapping<Shape>,
    traces: Mapping<u64>,
    histograms: Mapping<Histograms>,
    prefixes: LpmTrie<MapData, Prefix, Class>,
    flows: BpfHashMap<MapData, FlowKey, FlowEntry>,
    states: BpfHashMap<MapData, StateKey, State>,
    held: BpfHashMap<MapData, FlowKey, Held>,
    lane_lost: PerCpuArray<MapData, u64>,
    flushes: BpfHashMap<MapData, u32, Flushed>,
    /// How many entries that has.
    flushing: u64,
    tables: Array<MapData, Distribution>,
    /// The given distributions among `tables`.
    given: BTreeMap<u32, Arc<Distribution>>,
    lanes: Mapping<LaneLoad>,
    under_way: Mapping<u64>,
    connections: BpfHashMap<MapData, FlowKey, Connection>,
    rule_counters: PerCpuArray<MapData, RuleCounters>,
    target_counters: PerCpuArray<MapData, TargetCounters>,
    caches: Vec<(&'static str, MapData, u32)>,
    /// Held because the kernel empties it when nobody does.
    _passes: ProgramArray<MapData>,
    compiler: Compiler,
    /// What each copy of the tables holds.
    images: [Image; 2],
    epoch: u64,
    activations: HashSet<u32>,
}

/// The time until which rules act.
#[derive(Debug, Clone)]
pub struct Lease(Arc<Mapping<Config>>);

impl Lease {
    /// Lets rules act until `until_ns` (`CLOCK_MONOTONIC`).
    pub fn renew(&self, until_ns: u64) {
        // SAFETY: an aligned field of a live mapping; the kernel only reads it.
        let lease = unsafe { AtomicU64::from_ptr(&raw mut (*self.0.pointer(0)).lease_until_ns) };
        lease.store(until_ns, Ordering::Release);
    }
}

const PROGRAMS: [&str; 6] = [
    "injector_egress",
    "injector_ingress",
    "injector_carrier",
    "injector_line",
    "injector_reject",
    "injector_empty",
];

/// The line's place among the programs that call each other.
const LINE_PASS: u32 = 2;
/// The place of what answers rejected packets.
const REJECT_PASS: u32 = 3;

fn array(map: Map, name: &'static str) -> Result<MapData, DataPlaneError> {
    match map {
        Map::Array(data) => Ok(data),
        _ => Err(DataPlaneError::Missing(name)),
    }
}

/// A map whose entries are written through memory.
fn mapped<T: aya::Pod>(
    map: Map,
    name: &'static str,
    entries: u32,
) -> Result<Mapping<T>, DataPlaneError> {
    let data = array(map, name)?;
    Mapping::new(data.fd(), entries).map_err(|source| DataPlaneError::Mmap { map: name, source })
}

/// A map as the type that it is used as.
fn typed<T: TryFrom<Map, Error = aya::maps::MapError>>(
    map: Map,
    name: &'static str,
) -> Result<T, DataPlaneError> {
    T::try_from(map).map_err(|source| DataPlaneError::Map {
        what: "open",
        map: name,
        source: Box::new(source),
    })
}

/// Gives the programs each other, for further passes over a packet.
fn link_passes(ebpf: &mut Ebpf) -> Result<ProgramArray<MapData>, DataPlaneError> {
    const MAP: &str = "PASSES";
    let map = ebpf.take_map(MAP).ok_or(DataPlaneError::Missing(MAP))?;
    let mut passes =
        ProgramArray::try_from(map).map_err(|source| map_error("open", MAP, source))?;
    for (index, name) in [
        (hook::EGRESS, program_of(Hook::Egress)),
        (hook::INGRESS, program_of(Hook::Ingress)),
        (LINE_PASS, "injector_line"),
        (REJECT_PASS, "injector_reject"),
    ] {
        let program: &SchedClassifier = ebpf
            .program(name)
            .and_then(|program| program.try_into().ok())
            .ok_or(DataPlaneError::Missing(name))?;
        let fd = program.fd().map_err(|source| DataPlaneError::Program {
            program: name,
            source: Box::new(source),
        })?;
        passes
            .set(index, fd, 0)
            .map_err(|source| map_error("write to", MAP, source))?;
    }
    Ok(passes)
}

/// Fills the tables of the named distributions of delay.
fn write_distributions(tables: &mut Array<MapData, Distribution>) -> Result<(), DataPlaneError> {
    for (number, table) in distribution::tables() {
        tables
            .set(number, table, 0)
            .map_err(|source| map_error("write to", "TABLES", source))?;
    }
    Ok(())
}

impl DataPlane {
    /// Loads the programs with tables of the given sizes. Nothing is attached, and no rule is in force.
    pub fn load(sizes: &Sizes) -> Result<Self, DataPlaneError> {
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::STATS)
            .map_max_entries("TARGETS", u32::from(sizes.targets))
            // There is a lane in a namespace only if there is a target.
            .map_max_entries("LANES", u32::from(sizes.targets))
            .map_max_entries("TARGET_COUNTERS", 2 * u32::from(sizes.targets))
            .map_max_entries("BITMAPS", 2 * sizes.bitmaps)
            .override_global("BITMAPS_PER_COPY", &sizes.bitmaps, true)
            // Both copies' entries are in one trie.
            .map_max_entries(
                "PREFIXES",
                sizes.prefixes.saturating_mul(2).saturating_add(16),
            )
            .map_max_entries("IDLE", sizes.idle_flows)
            .map_max_entries("FLOWS", sizes.flows)
            .map_max_entries("STATES", sizes.states)
            .map_max_entries("HELD", sizes.flows)
            .map_max_entries("CONNECTIONS", sizes.flows)
            .map_max_entries("FRAGMENTS", sizes.fragments)
            .load(OBJECT)
            .map_err(|source| DataPlaneError::Load {
                source: Box::new(source),
            })?;
        for name in PROGRAMS {
            let failed = |source| DataPlaneError::Program {
                program: name,
                source: Box::new(source),
            };
            let program: &mut SchedClassifier = ebpf
                .program_mut(name)
                .ok_or(DataPlaneError::Missing(name))?
                .try_into()
                .map_err(failed)?;
            program.load().map_err(failed)?;
        }
        let program = |name: &'static str| {
            ebpf.program(name)
                .and_then(|program| <&SchedClassifier>::try_from(program).ok())
                .ok_or(DataPlaneError::Missing(name))?
                .fd()
                .and_then(|fd| fd.as_fd().try_clone_to_owned().map_err(Into::into))
                .map_err(|source| DataPlaneError::Program {
                    program: name,
                    source: Box::new(source),
                })
        };
        let (egress, ingress) = (
            program(program_of(Hook::Egress))?,
            program(program_of(Hook::Ingress))?,
        );
        let (carrier, line) = (program("injector_carrier")?, program("injector_line")?);
        let passes = link_passes(&mut ebpf)?;
        let mut take =
            |name: &'static str| ebpf.take_map(name).ok_or(DataPlaneError::Missing(name));
        let mut caches = Vec::new();
        for (name, capacity) in [("IDLE", sizes.idle_flows), ("FRAGMENTS", sizes.fragments)] {
            if let Map::LruHashMap(data) = take(name)? {
                caches.push((name, data, capacity));
            }
        }
        let mut tables = typed(take("TABLES")?, "TABLES")?;
        write_distributions(&mut tables)?;
        Ok(Self {
            egress,
            ingress,
            carrier,
            line,
            config: Arc::new(mapped(take("CONFIG")?, "CONFIG", 1)?),
            targets: mapped(take("TARGETS")?, "TARGETS", u32::from(sizes.targets))?,
            protocols: mapped(take("PROTOCOLS")?, "PROTOCOLS", 2 * PROTOCOL_CLASSES)?,
            ports: mapped(take("PORTS")?, "PORTS", 2 * PORT_CLASSES)?,
            bitmaps: mapped(take("BITMAPS")?, "BITMAPS", 2 * sizes.bitmaps)?,
            rules: mapped(take("RULES")?, "RULES", 2 * MAX_SLOTS)?,
            shapes: mapped(take("SHAPES")?, "SHAPES", 2 * MAX_SLOTS)?,
            traces: mapped(take("TRACES")?, "TRACES", TRACE_ENTRIES)?,
            histograms: mapped(take("HISTOGRAMS")?, "HISTOGRAMS", MAX_RULES)?,
            prefixes: typed(take("PREFIXES")?, "PREFIXES")?,
            flows: typed(take("FLOWS")?, "FLOWS")?,
            states: typed(take("STATES")?, "STATES")?,
            held: typed(take("HELD")?, "HELD")?,
            lanes: mapped(take("LANES")?, "LANES", u32::from(sizes.targets))?,
            under_way: mapped(take("UNDER_WAY")?, "UNDER_WAY", UNDERWAY)?,
            lane_lost: typed(take("LANE_LOST")?, "LANE_LOST")?,
            flushes: typed(take("FLUSHES")?, "FLUSHES")?,
            flushing: 0,
            tables,
            given: BTreeMap::new(),
            connections: typed(take("CONNECTIONS")?, "CONNECTIONS")?,
            rule_counters: typed(take("RULE_COUNTERS")?, "RULE_COUNTERS")?,
            target_counters: typed(take("TARGET_COUNTERS")?, "TARGET_COUNTERS")?,
            caches,
            _passes: passes,
            ebpf,
            sizes: *sizes,
            compiler: Compiler::default(),
            images: [Image::default(), Image::default()],
            epoch: 0,
            activations: HashSet::new(),
        })
    }

    /// The sizes that it was loaded with.
    #[must_use]
    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// A loaded program, by its name in the object. For tests and benchmarks.
    pub fn program(&self, name: &'static str) -> Result<&SchedClassifier, DataPlaneError> {
        self.ebpf
            .program(name)
            .and_then(|program| <&SchedClassifier>::try_from(program).ok())
            .ok_or(DataPlaneError::Missing(name))
    }

    /// The program for a hook, to be attached.
    #[must_use]
    pub fn program_fd(&self, hook: Hook) -> BorrowedFd<'_> {
        match hook {
            Hook::Egress => self.egress.as_fd(),
            Hook::Ingress => self.ingress.as_fd(),
        }
    }

    /// The programs of a lane: at its carrier, at its line.
    #[must_use]
    pub fn lane_fds(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.carrier.as_fd(), self.line.as_fd())
    }

    /// Sets the account of a lane that is about to be made to zero.
    pub fn clear_lane(&mut self, lane: LaneNumber) {
        self.lanes.write(usize::from(lane.0), LaneLoad::default());
    }

    /// Forgets what was lost on its way through lanes, of which there is none.
    pub fn clear_underway(&mut self) {
        for count in 0..UNDERWAY as usize {
            self.under_way.write(count, 0);
        }
    }

    /// Whether packets are on their way through any lane, or back to the hook that they came from.
    #[must_use]
    pub fn is_underway(&self) -> bool {
        (0..UNDERWAY as usize).any(|count| self.under_way.read(count) != 0)
    }

    /// Says how much a lane may hold. What it holds beyond leaves at its time.
    pub fn bound_lane(&mut self, lane: LaneNumber, bounds: LaneBounds) {
        let entry = self.lanes.pointer(usize::from(lane.0));
        // SAFETY: aligned fields of a live mapping, which the programs only read.
        let (packets, bytes) = unsafe {
            (
                AtomicU64::from_ptr(&raw mut (*entry).most_packets),
                AtomicU64::from_ptr(&raw mut (*entry).most_bytes),
            )
        };
        packets.store(
            u64::from(bounds.packets).min(lane_load::MAX_PACKETS),
            Ordering::Relaxed,
        );
        bytes.store(bounds.bytes.min(lane_load::MAX_BYTES), Ordering::Relaxed);
    }

    /// What a lane holds.
    #[must_use]
    pub fn lane_use(&self, lane: LaneNumber) -> LaneUse {
        let entry = self.lanes.pointer(usize::from(lane.0));
        // SAFETY: as in `bound_lane`; here the programs write, atomically.
        let (load, full_packets) = unsafe {
            (
                AtomicU64::from_ptr(&raw mut (*entry).held).load(Ordering::Relaxed),
                AtomicU64::from_ptr(&raw mut (*entry).full_packets).load(Ordering::Relaxed),
            )
        };
        LaneUse {
            packets: lane_load::packets(load),
            bytes: lane_load::bytes(load),
            full_packets,
            load,
        }
    }

    /// Takes a lane for empty if its load is still the one that was seen; whether it was.
    pub fn empty_lane(&mut self, lane: LaneNumber, seen: u64) -> bool {
        let entry = self.lanes.pointer(usize::from(lane.0));
        // SAFETY: as in `lane_use`.
        let held = unsafe { AtomicU64::from_ptr(&raw mut (*entry).held) };
        held.compare_exchange(seen, 0, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }

    /// Packets that lanes lost on the way, or met on their devices and know nothing of.
    pub fn lane_losses(&self) -> Result<LaneLosses, DataPlaneError> {
        let sum = |index: u32| -> Result<u64, DataPlaneError> {
            let values = self
                .lane_lost
                .get(&index, 0)
                .map_err(|source| map_error("read", "LANE_LOST", source))?;
            Ok(values.iter().sum())
        };
        Ok(LaneLosses {
            strays: sum(0)?,
            copies: sum(1)?,
            returns: sum(2)?,
            entries: sum(3)?,
        })
    }

    /// Begins to drop what rules of these activations hold, as it comes out of its queue. `false` if that were more
    /// than [`MAX_FLUSHES`] at once; nothing has changed then, nor after an error.
    pub fn begin_flush(&mut self, activations: &[u32]) -> Result<bool, DataPlaneError> {
        let more = activations.len() as u64;
        if self.flushing + more > u64::from(MAX_FLUSHES) {
            return Ok(false);
        }
        for (done, activation) in activations.iter().enumerate() {
            let name = u32::from(holders::name(*activation));
            if let Err(source) = self.flushes.insert(name, Flushed::default(), 0) {
                // One that stays behind is without effect: `flushing` says how many there are.
                self.forget_flushes(&activations[..done])?;
                return Err(map_error("insert into", "FLUSHES", source));
            }
        }
        self.set_flushing(self.flushing + more);
        Ok(true)
    }

    /// Ends that.
    pub fn end_flush(&mut self, activations: &[u32]) -> Result<(), DataPlaneError> {
        self.set_flushing(self.flushing.saturating_sub(activations.len() as u64));
        self.forget_flushes(activations)
    }

    fn forget_flushes(&mut self, activations: &[u32]) -> Result<(), DataPlaneError> {
        for activation in activations {
            let name = u32::from(holders::name(*activation));
            match self.flushes.remove(&name) {
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => {}
                Err(source) => return Err(map_error("delete from", "FLUSHES", source)),
            }
        }
        Ok(())
    }

    fn set_flushing(&mut self, flushing: u64) {
        self.flushing = flushing;
        // SAFETY: an aligned field of a live mapping; the kernel only reads it. Release: entries that were made are
        // there before it.
        let word = unsafe { AtomicU64::from_ptr(&raw mut (*self.config.pointer(0)).flushing) };
        word.store(flushing, Ordering::Release);
    }

    /// Packets dropped by the flush of a rule: those that would have left, those that would have arrived.
    pub fn flushed(&self, activation: u32) -> Result<[u64; 2], DataPlaneError> {
        let flushed = self
            .flushes
            .get(&u32::from(holders::name(activation)), 0)
            .map_err(|source| map_error("read", "FLUSHES", source))?;
        Ok([flushed.egress_packets, flushed.ingress_packets])
    }

    /// The kernel's number for the program of a hook.
    pub fn program_id(&self, hook: Hook) -> Result<u32, DataPlaneError> {
        let name = program_of(hook);
        let failed = |source| DataPlaneError::Program {
            program: name,
            source: Box::new(source),
        };
        Ok(self.program(name)?.info().map_err(failed)?.id())
    }

    /// Sizes of the programs and what the verifier said.
    pub fn programs(&self) -> Result<Vec<ProgramReport>, DataPlaneError> {
        PROGRAMS
            .iter()
            .map(|name| {
                let failed = |source| DataPlaneError::Program {
                    program: name,
                    source: Box::new(source),
                };
                let info = self.program(name)?.info().map_err(failed)?;
                Ok(ProgramReport {
                    name: (*name).to_owned(),
                    verified: info.verified_instruction_count(),
                    translated_bytes: info.size_translated(),
                    machine_bytes: info.size_jitted(),
                })
            })
            .collect()
    }

    /// `CLOCK_MONOTONIC` in nanoseconds: the clock of the programs.
    #[must_use]
    pub fn monotonic_ns() -> u64 {
        clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
            let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
            seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
        })
    }

    /// The lease, to be renewed from any thread.
    #[must_use]
    pub fn lease(&self) -> Lease {
        Lease(Arc::clone(&self.config))
    }

    /// Makes a whole rule set visible at once, and returns when no CPU decides by the one before any more.
    /// On an error the one before stays in force, unchanged.
    pub fn commit(
        &mut self,
        targets: &[TargetConfig],
        rules: &[ActiveRule],
        exempt: &[Exemption],
    ) -> Result<Commit, CommitError> {
        let started = std::time::Instant::now();
        let capacity = Capacity {
            bitmaps: self.sizes.bitmaps,
            prefixes: self.sizes.prefixes,
        };
        let mut image = self.compiler.compile(targets, rules, exempt, capacity)?;
        let epoch = self.epoch + 1;
        let copy = (epoch & 1) as u32;
        self.write_given(&mut image)?;
        let prefixes_changed = self.write_prefixes(copy, &image)?;
        self.write_arrays(copy, targets, &image);
        let prepared = started.elapsed();
        // 0 says that there are no rules; the next ones get a number of their own all the same.
        // While a lane still holds packets, later ones of their flows must not overtake them.
        let holds = targets.iter().any(|target| target.lane.is_some());
        let visible = if rules.is_empty() && !holds { 0 } else { epoch };
        // SAFETY: an aligned field of a live mapping; the kernel only reads it. Release: everything that was
        // written above is there before it.
        let word = unsafe { AtomicU64::from_ptr(&raw mut (*self.config.pointer(0)).epoch) };
        word.store(visible, Ordering::Release);
        self.epoch = epoch;
        self.compiler.in_force(&image);
        self.images[copy as usize] = image;
        self.activations = rules.iter().map(|active| active.activation).collect();
        let flipped = std::time::Instant::now();
        wait_for_grace_period();
        Ok(Commit {
            epoch,
            prefixes_changed,
            prepared,
            settled: flipped.elapsed(),
        })
    }

    /// Finds tables for the distributions that rules bring along, and writes those that are not there. Those that
    /// rules in force draw from stay as they are.
    fn write_given(&mut self, image: &mut Image) -> Result<(), CommitError> {
        let in_use = self
            .image()
            .shapes
            .values()
            .map(|shape| shape.distribution)
            .filter(|number| distribution::is_given(*number))
            .collect();
        let numbers = distribution::assign(&image.given, &self.given, &in_use)
            .ok_or(CompileError::TooManyDistributions)?;
        for (number, table) in numbers.iter().zip(&image.given) {
            if self.given.get(number) != Some(table) {
                // What it holds is not known after an error.
                self.given.remove(number);
                self.tables
                    .set(*number, **table, 0)
                    .map_err(|source| map_error("write to", "TABLES", source))?;
                self.given.insert(*number, Arc::clone(table));
            }
        }
        for (slot, place) in &image.given_of {
            if let (Some(shape), Some(number)) = (image.shapes.get_mut(slot), numbers.get(*place)) {
                shape.distribution = *number;
            }
        }
        Ok(())
    }

    fn write_prefixes(&mut self, copy: u32, image: &Image) -> Result<usize, DataPlaneError> {
        let held = &mut self.images[copy as usize].prefixes;
        let mut changed = 0;
        // Deleted first, so that there is room.
        let gone: Vec<PrefixOf> = held
            .keys()
            .filter(|prefix| !image.prefixes.contains_key(prefix))
            .copied()
            .collect();
        for prefix in gone {
            self.prefixes
                .remove(&key_of(copy, &prefix))
                .map_err(|source| map_error("delete from", "PREFIXES", source))?;
            held.remove(&prefix);
            changed += 1;
        }
        for (prefix, class) in &image.prefixes {
            if held.get(prefix) != Some(class) {
                self.prefixes
                    .insert(&key_of(copy, prefix), class, 0)
                    .map_err(|source| map_error("insert into", "PREFIXES", source))?;
                held.insert(*prefix, *class);
                changed += 1;
            }
        }
        Ok(changed)
    }

    fn write_arrays(&mut self, copy: u32, targets: &[TargetConfig], image: &Image) {
        let base = copy as usize;
        for (index, bitmap) in &image.bitmaps {
            self.bitmaps.write(
                base * self.sizes.bitmaps as usize + *index as usize,
                *bitmap,
            );
        }
        for (index, bitmap) in image.protocols.iter().enumerate() {
            self.protocols
                .write(base * PROTOCOL_CLASSES as usize + index, *bitmap);
        }
        let held = &self.images[base].ports;
        for (index, class) in image.ports.iter().enumerate() {
            if held[index] != *class {
                self.ports
                    .write(base * PORT_CLASSES as usize + index, *class);
            }
        }
        for (slot, rule) in &image.rules {
            self.rules
                .write(base * MAX_SLOTS as usize + *slot as usize, *rule);
        }
        // Where the set in force has none (`traces::place`).
        for (activation, placed) in &image.traces {
            if self.activations.contains(activation) {
                continue;
            }
            for (index, time) in (placed.start as usize..).zip(placed.trace.nanoseconds()) {
                self.traces.write(index, time);
            }
        }
        for (slot, shape) in &image.shapes {
            self.shapes
                .write(base * MAX_SLOTS as usize + *slot as usize, *shape);
        }
        let configured: BTreeMap<TargetSlot, &TargetConfig> =
            targets.iter().map(|target| (target.slot, target)).collect();
        for slot in 0..self.sizes.targets {
            let mut entry = self.targets.read(usize::from(slot));
            let own = image
                .targets
                .get(&TargetSlot(slot))
                .copied()
                .unwrap_or_default();
            let TargetImage { bitmap, track } = own;
            entry.bitmap[base] = bitmap;
            entry.track[base] = u32::from(track);
            if let Some(config) = configured.get(&TargetSlot(slot)) {
                entry.l2_length = if config.link == LinkKind::Ethernet {
                    14
                } else {
                    0
                };
                entry.loopback = u32::from(config.loopback);
                entry.ifindex = config.ifindex;
                entry.segmenter = config.lane.map_or(0, |lane| lane.segmenter);
                entry.line = config.lane.map_or(0, |lane| lane.line);
            } else {
                entry.segmenter = 0;
                entry.line = 0;
            }
            self.targets.write(usize::from(slot), entry);
        }
    }

    /// Counters of a rule: egress, ingress.
    pub fn rule_counters(&self, slot: RuleSlot) -> Result<[RuleCounters; 2], DataPlaneError> {
        let mut result = [RuleCounters::default(); 2];
        for (direction, sum) in (0..).zip(&mut result) {
            let index = (MAX_EXEMPTIONS + u32::from(slot.0)) * 2 + direction;
            let values = self
                .rule_counters
                .get(&index, 0)
                .map_err(|source| map_error("read", "RULE_COUNTERS", source))?;
            for value in values.iter() {
                add_rule_counters(sum, value);
            }
        }
        Ok(result)
    }

    /// How times are spread under a rule, in both directions.
    #[must_use]
    pub fn rule_histograms(&self, slot: RuleSlot) -> Box<Histograms> {
        let mut copy = Box::<Histograms>::default();
        let entry = self.histograms.pointer(usize::from(slot.0));
        // SAFETY: within the mapping; the programs add to each number atomically, and each is read as a whole.
        unsafe {
            let counts = [&raw mut (*entry).given, &raw mut (*entry).queued];
            for (array, target) in counts.into_iter().zip([&mut copy.given, &mut copy.queued]) {
                for (index, value) in target.iter_mut().enumerate() {
                    *value =
                        AtomicU64::from_ptr(array.cast::<u64>().add(index)).load(Ordering::Relaxed);
                }
            }
        }
        copy
    }

    /// Counters of a target: egress, ingress.
    pub fn target_counters(&self, slot: TargetSlot) -> Result<[TargetCounters; 2], DataPlaneError> {
        let mut result = [TargetCounters::default(); 2];
        for (direction, sum) in (0..).zip(&mut result) {
            let values = self
                .target_counters
                .get(&(u32::from(slot.0) * 2 + direction), 0)
                .map_err(|source| map_error("read", "TARGET_COUNTERS", source))?;
            for value in values.iter() {
                add_target_counters(sum, value);
            }
        }
        Ok(result)
    }

    /// Zeroes the counters and the histograms of a rule, before its slot is used again.
    pub fn clear_rule(&mut self, slot: RuleSlot) -> Result<(), DataPlaneError> {
        let index = (MAX_EXEMPTIONS + u32::from(slot.0)) * 2;
        self.histograms
            .write(usize::from(slot.0), Histograms::default());
        clear(&mut self.rule_counters, "RULE_COUNTERS", index)
    }

    /// Zeroes the counters of a target, before its slot is used again.
    pub fn clear_target(&mut self, slot: TargetSlot) -> Result<(), DataPlaneError> {
        clear(
            &mut self.target_counters,
            "TARGET_COUNTERS",
            u32::from(slot.0) * 2,
        )
    }

    /// Forgets flows that have been idle for longer than `idle`, and all state of rules that are gone.
    pub fn collect(&mut self, idle: Duration) -> Result<Collected, DataPlaneError> {
        let now = Self::monotonic_ns();
        let idle = u64::try_from(idle.as_nanos()).unwrap_or(u64::MAX);
        let is_idle = |last: u64| now.saturating_sub(last) > idle;
        let mut collected = Collected::default();
        let epoch = self.epoch;
        collected.flows = sweep(&mut self.flows, "FLOWS", |_, flow| {
            // What was found under an older epoch is found again when the flow's next packet comes.
            is_idle(flow.last_ns) || flow.epoch != epoch
        })?;
        let activations = &self.activations;
        let mut orphaned = 0;
        let all = sweep(&mut self.states, "STATES", |key, state| {
            let gone = !activations.contains(&key.activation);
            orphaned += u64::from(gone);
            // What is kept of the rule as a whole (--drop-once) is one entry, and holds as long as the rule.
            // A line that packets still wait for stays, however long ago the last one came.
            let taken = (state_site::LINE..=state_site::RING + 1).contains(&key.flow.site)
                && state.stream > now;
            gone || key.flow.site != state_site::RULE && !taken && is_idle(state.last_ns)
        })?;
        collected.orphaned_states = orphaned;
        collected.idle_states = all - orphaned;
        sweep(&mut self.held, "HELD", |_, held| {
            held.until_ns
                .max(held.flushed_until_ns)
                .saturating_add(HELD_LONGER_NS)
                < now
        })?;
        collected.connections = sweep(&mut self.connections, "CONNECTIONS", |_, connection| {
            is_idle(connection.last_ns)
        })?;
        Ok(collected)
    }

    /// How full the tables are.
    pub fn table_use(&self) -> Result<Vec<TableUse>, DataPlaneError> {
        let prefixes: usize = self.images.iter().map(|image| image.prefixes.len()).sum();
        let mut tables = vec![
            TableUse {
                name: "flows",
                entries: Some(count(&self.flows, "FLOWS")?),
                capacity: self.sizes.flows,
                bytes: memory(self.flows.map()),
            },
            TableUse {
                name: "states",
                entries: Some(count(&self.states, "STATES")?),
                capacity: self.sizes.states,
                bytes: memory(self.states.map()),
            },
            TableUse {
                name: "held flows",
                entries: Some(count(&self.held, "HELD")?),
                capacity: self.sizes.flows,
                bytes: memory(self.held.map()),
            },
            TableUse {
                name: "connections",
                entries: Some(count(&self.connections, "CONNECTIONS")?),
                capacity: self.sizes.flows,
                bytes: memory(self.connections.map()),
            },
            TableUse {
                name: "flushes",
                entries: Some(self.flushing),
                capacity: MAX_FLUSHES,
                bytes: memory(self.flushes.map()),
            },
            TableUse {
                name: "prefixes",
                entries: Some(prefixes as u64),
                capacity: self.sizes.prefixes.saturating_mul(2),
                bytes: memory(self.prefixes.map()),
            },
        ];
        for (name, data, capacity) in &self.caches {
            let name = if *name == "IDLE" {
                "idle flows"
            } else {
                "fragments"
            };
            tables.push(TableUse {
                name,
                entries: None,
                capacity: *capacity,
                bytes: memory(data),
            });
        }
        let image = &self.images[(self.epoch & 1) as usize];
        tables.push(TableUse {
            name: "bitmaps",
            entries: Some(image.bitmaps.len() as u64),
            capacity: self.sizes.bitmaps,
            bytes: 2 * u64::from(self.sizes.bitmaps) * size_of::<Bitmap>() as u64,
        });
        tables.push(TableUse {
            name: "distributions",
            entries: Some(u64::from(distribution::NAMED) + image.given.len() as u64),
            capacity: DISTRIBUTIONS,
            bytes: memory(self.tables.map()),
        });
        tables.push(TableUse {
            name: "rules",
            entries: Some(image.rules.len() as u64),
            capacity: MAX_RULES,
            bytes: 2 * u64::from(MAX_SLOTS) * size_of::<RuleEntry>() as u64,
        });
        let opportunities: u32 = image.traces.values().map(|one| one.trace.len()).sum();
        tables.push(TableUse {
            name: "trace opportunities",
            entries: Some(u64::from(opportunities)),
            capacity: TRACE_ENTRIES,
            bytes: u64::from(TRACE_ENTRIES) * size_of::<u64>() as u64,
        });
        tables.push(TableUse {
            name: "histograms",
            entries: Some(image.rules.len() as u64),
            capacity: MAX_RULES,
            bytes: u64::from(MAX_RULES) * size_of::<Histograms>() as u64,
        });
        Ok(tables)
    }

    /// The tables in force. For tests that decide in user space.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.images[(self.epoch & 1) as usize]
    }

    /// Forgets every flow, state, connection and counter. For tests that start anew.
    pub fn forget_everything(&mut self) -> Result<(), DataPlaneError> {
        sweep(&mut self.flows, "FLOWS", |_, _| true)?;
        sweep(&mut self.states, "STATES", |_, _| true)?;
        sweep(&mut self.connections, "CONNECTIONS", |_, _| true)?;
        sweep(&mut self.held, "HELD", |_, _| true)?;
        for (name, data, _) in &self.caches {
            let key_length = if *name == "IDLE" {
                size_of::<FlowKey>()
            } else {
                40
            };
            empty(data, key_length)
                .map_err(|source| map_error("empty", name, aya::maps::MapError::IoError(source)))?;
        }
        Ok(())
    }
}

fn map_error(what: &'static str, map: &'static str, source: aya::maps::MapError) -> DataPlaneError {
    DataPlaneError::Map {
        what,
        map,
        source: Box::new(source),
    }
}

fn key_of(copy: u32, prefix: &PrefixOf) -> Key<Prefix> {
    let bytes = prefix.address.to_be_bytes();
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    debug_assert!(prefix.family <= family::NONE);
    Key::new(
        Prefix::TAG_BITS + u32::from(prefix.length),
        Prefix {
            tag: Prefix::tag(copy, prefix.family),
            address: [word(0), word(4), word(8), word(12)],
        },
    )
}

/// Waits until no CPU runs a program that began before: a TC program runs within an RCU read-side critical
/// section, and a global membarrier waits for a grace period (`membarrier`, kernel/sched/membarrier.c, 6.1).
fn wait_for_grace_period() {
    // SAFETY: a system call without pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // With nohz_full CPUs the kernel refuses (EINVAL). A program runs for microseconds, in softirq or with
        // preemption off: after this long none is left of those that ran before.
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// What is known of held packets is kept so long after their time: they may be late (by `LATE_NS` of the decision at
/// most), and while all flows are gone through, more may come.
const HELD_LONGER_NS: u64 = 2_000_000_000;

fn sweep<K: aya::Pod, V: aya::Pod>(
    map: &mut BpfHashMap<MapData, K, V>,
    name: &'static str,
    mut gone: impl FnMut(&K, &V) -> bool,
) -> Result<u64, DataPlaneError> {
    // Collected before they are deleted: deleting the key at hand would restart the walk.
    let mut doomed = Vec::new();
    for entry in map.iter() {
        match entry {
            Ok((key, value)) => {
                if gone(&key, &value) {
                    doomed.push(key);
                }
            }
            // Deleted by somebody else between two steps.
            Err(aya::maps::MapError::KeyNotFound) => {}
            Err(source) => return Err(map_error("read", name, source)),
        }
    }
    let mut removed = 0;
    for key in doomed {
        match map.remove(&key) {
            Ok(()) => removed += 1,
            Err(aya::maps::MapError::KeyNotFound) => {}
            Err(source) => return Err(map_error("delete from", name, source)),
        }
    }
    Ok(removed)
}

fn count<K: aya::Pod, V: aya::Pod>(
    map: &BpfHashMap<MapData, K, V>,
    name: &'static str,
) -> Result<u64, DataPlaneError> {
    let mut entries = 0;
    for key in map.keys() {
        match key {
            Ok(_) | Err(aya::maps::MapError::KeyNotFound) => entries += 1,
            Err(source) => return Err(map_error("read", name, source)),
        }
    }
    Ok(entries)
}

fn clear<V: aya::Pod + Default>(
    map: &mut PerCpuArray<MapData, V>,
    name: &'static str,
    first: u32,
) -> Result<(), DataPlaneError> {
    let cpus = aya::util::nr_cpus().map_err(|(_, source)| {
        map_error(
            "count the CPUs for",
            name,
            aya::maps::MapError::IoError(source),
        )
    })?;
    for index in [first, first + 1] {
        let zeros = PerCpuValues::try_from(vec![V::default(); cpus])
            .map_err(|source| map_error("zero", name, aya::maps::MapError::IoError(source)))?;
        map.set(index, zeros, 0)
            .map_err(|source| map_error("zero", name, source))?;
    }
    Ok(())
}

/// What the kernel accounts to a map, from its entry in /proc/self/fdinfo (`bpf_map_show_fdinfo`,
/// kernel/bpf/syscall.c); 0 where that does not say.
fn memory(map: &MapData) -> u64 {
    let fd = map.fd().as_fd().as_raw_fd();
    std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))
        .ok()
        .and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("memlock:"))
                .and_then(|bytes| bytes.trim().parse().ok())
        })
        .unwrap_or(0)
}

/// Empties a hash map of any value type, by its keys alone.
fn empty(map: &MapData, key_length: usize) -> io::Result<()> {
    /// The part of `union bpf_attr` that the element commands read (include/uapi/linux/bpf.h).
    #[repr(C)]
    #[derive(Default)]
    struct Element {
        map_fd: u32,
        padding: u32,
        key: u64,
        next_or_value: u64,
        flags: u64,
    }
    const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
    const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
    let map_fd = u32::try_from(map.fd().as_fd().as_raw_fd()).unwrap_or(u32::MAX);
    let mut key = vec![0_u8; key_length];
    loop {
        let mut next = Element {
            map_fd,
            next_or_value: key.as_mut_ptr() as u64,
            ..Element::default()
        };
        // SAFETY: the attribute is of the size given, and its pointer is to a key of the map's length.
        let found = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_GET_NEXT_KEY,
                &raw mut next,
                size_of::<Element>(),
            )
        };
        if found != 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ENOENT) {
                Ok(())
            } else {
                Err(error)
            };
        }
        let mut gone = Element {
            map_fd,
            key: key.as_ptr() as u64,
            ..Element::default()
        };
        // SAFETY: as above. Evicted in between is as good as deleted.
        unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_DELETE_ELEM,
                &raw mut gone,
                size_of::<Element>(),
            )
        };
    }
}

fn add_rule_counters(sum: &mut RuleCounters, value: &RuleCounters) {
    sum.matched_packets += value.matched_packets;
    sum.matched_bytes += value.matched_bytes;
    sum.cut_packets += value.cut_packets;
    sum.cut_bytes += value.cut_bytes;
    sum.excess_packets += value.excess_packets;
    sum.flows += value.flows;
    sum.off_packets += value.off_packets;
    sum.lapsed_packets += value.lapsed_packets;
    sum.stateless_packets += value.stateless_packets;
    sum.lost_packets += value.lost_packets;
    sum.duplicated_packets += value.duplicated_packets;
    sum.copies += value.copies;
    sum.delayed_packets += value.delayed_packets;
    sum.delayed_ns += value.delayed_ns;
    sum.reordered_packets += value.reordered_packets;
    sum.too_long_packets += value.too_long_packets;
    sum.queued_packets += value.queued_packets;
    sum.queued_bytes += value.queued_bytes;
    sum.queued_ns += value.queued_ns;
    sum.queued_max_ns = sum.queued_max_ns.max(value.queued_max_ns);
    sum.busy_ns += value.busy_ns;
    sum.overflow_packets += value.overflow_packets;
    sum.marked_packets += value.marked_packets;
    sum.stalled_packets += value.stalled_packets;
    sum.answered_packets += value.answered_packets;
    sum.corrupted_packets += value.corrupted_packets;
    sum.stalled_ns += value.stalled_ns;
    sum.given_max_ns = sum.given_max_ns.max(value.given_max_ns);
    if value.first_ns != 0 && (sum.first_ns == 0 || value.first_ns < sum.first_ns) {
        sum.first_ns = value.first_ns;
    }
    sum.last_ns = sum.last_ns.max(value.last_ns);
}

fn add_target_counters(sum: &mut TargetCounters, value: &TargetCounters) {
    sum.seen_packets += value.seen_packets;
    sum.seen_bytes += value.seen_bytes;
    sum.passed_packets += value.passed_packets;
    sum.cut_packets += value.cut_packets;
    sum.unparsed_packets += value.unparsed_packets;
    sum.orphan_fragments += value.orphan_fragments;
    sum.errors += value.errors;
    sum.table_full += value.table_full;
    sum.lapsed_packets += value.lapsed_packets;
    sum.surplus_rules += value.surplus_rules;
    sum.lane_packets += value.lane_packets;
    sum.lane_refused += value.lane_refused;
}

/// Loads the programs, reports on them and on the tables, and lets them go again: `cargo xtask load`.
pub fn report(sizes: &Sizes) -> Result<(Vec<ProgramReport>, Vec<TableUse>), DataPlaneError> {
    let plane = DataPlane::load(sizes)?;
    Ok((plane.programs()?, plane.table_use()?))
}
