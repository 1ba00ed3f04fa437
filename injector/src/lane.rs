//! The lane of a network namespace: the private devices through which packets go that are to be delayed,
//! queued, lost by chance, duplicated or held back.
//!
//! ```text
//! inj-segmenter   VLAN 1 on inj-carrier, offloads off: super-packets leave it as wire packets
//! inj-line        VLAN 2 on inj-carrier, one queue with an fq per CPU: each wire packet's fate, and its
//!                 departure time
//! inj-carrier     an ifb; its egress program redirects everything by the VLAN's number, so that nothing ever
//!                 reaches the device itself
//! ```
//!
//! Nobody's address is on them, and nothing but our packets is on their way through them: what else turns up
//! is dropped and counted. They go as a whole when the carrier is deleted.

use std::{
    fmt, fs, io,
    os::fd::BorrowedFd,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use injector_common::layout::lane_vlan;

use crate::{
    dataplane::LaneNumber,
    journal::{Change, Entry, EntryId, Journal, JournalError, boot_id},
    netlink::{self, FqLimits, Hook, Link, NetlinkError, NewFilter, QdiscStats},
    netns::{Netns, NetnsError},
    undo,
};

/// Name of the carrier.
pub const CARRIER: &str = "inj-carrier";
/// Its kind.
const CARRIER_KIND: &str = "ifb";
/// Kind of the devices on it.
const VLAN_KIND: &str = "vlan";
const SEGMENTER: &str = "inj-segmenter";
const LINE: &str = "inj-line";

/// Longer than any packet: what passes is already cut to its target's MTU.
const MTU: u32 = 65_535;
/// Queues of the line at most: an fq of each is memory, and beyond this many CPUs little is to be gained.
const MAX_QUEUES: u32 = 64;
/// How long devices may take until they are seen to be up: the kernel looks after up to a second
/// (`linkwatch_schedule_work`, `net/core/link_watch.c`).
const COMING_UP: Duration = Duration::from_secs(5);
/// How long the queue may take to empty when nothing is held any more.
const EMPTYING: Duration = Duration::from_millis(500);

/// Preference of our filters.
const PRIORITY: u16 = 1;
/// Handle of our filters.
const HANDLE: u32 = 1;

/// Why there is no lane.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The journal could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kernel lacks what it takes.
    #[error(
        "delays, random loss and other faults of single packets need {what}, which this kernel does not offer: \
         {source}; load or install the kernel module {module}"
    )]
    Unsupported {
        /// What is lacking.
        what: &'static str,
        /// The module that has it.
        module: &'static str,
        /// What the kernel said.
        source: NetlinkError,
    },
    /// There is a device of its name.
    #[error(
        "network namespace {netns} has a device {name} that is not of this daemon; if no other injector runs \
         there, delete it (`ip link delete {name}`)"
    )]
    Taken {
        /// The namespace.
        netns: String,
        /// The name.
        name: &'static str,
    },
    /// The kernel refused.
    #[error("the lane of network namespace {netns}: {source}")]
    Netlink {
        /// The namespace.
        netns: String,
        /// What was tried, and what went wrong.
        source: NetlinkError,
    },
    /// Its devices stay down.
    #[error(
        "the lane of network namespace {netns}: its devices did not come up within {seconds} s; `ip link` shows their \
         state there, `dmesg` what the kernel says of them"
    )]
    Down {
        /// The namespace.
        netns: String,
        /// How long was waited.
        seconds: u64,
    },
    /// A setting of a device could not be made.
    #[error("the lane of network namespace {netns}: writing {path} failed: {source}")]
    Setting {
        /// The namespace.
        netns: String,
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// How a lane is to be made.
#[derive(Debug, Clone, Copy)]
pub struct LaneConfig<'a> {
    /// The program for the carrier.
    pub carrier: BorrowedFd<'a>,
    /// The program for the line.
    pub line: BorrowedFd<'a>,
    /// Its number, by which its programs know how much it may hold: the classid of their filters.
    pub number: LaneNumber,
    /// Limits of each of its queues.
    pub limits: FqLimits,
}

/// What a lane holds and has dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneQueue {
    /// The queue of its line.
    pub qdisc: QdiscStats,
    /// Packets that its devices dropped.
    pub device_drops: u64,
}

impl LaneQueue {
    /// Packets that its queue and its devices have dropped.
    #[must_use]
    pub const fn dropped(&self) -> u64 {
        self.qdisc.dropped_packets + self.device_drops
    }
}

/// What somebody else has done to a lane, so that packets are lost in it or pass it unfaulted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Deleted, renamed or moved to another namespace.
    Gone(&'static str),
    /// Set down.
    Down(&'static str),
    /// Without our program.
    FilterRemoved(&'static str),
    /// With other qdiscs than the fq that we gave it.
    QueueReplaced(&'static str),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone(name) => write!(f, "its device {name} was deleted, renamed or moved"),
            Self::Down(name) => write!(f, "its device {name} was set down"),
            Self::FilterRemoved(name) => write!(f, "our filter on its device {name} was removed"),
            Self::QueueReplaced(name) => write!(f, "the queue of its device {name} was replaced"),
        }
    }
}

/// A lane. Dropping it removes it as well as it can.
#[derive(Debug)]
pub struct Lane {
    netns: Netns,
    journal: Arc<Journal>,
    entry: Option<(EntryId, Entry)>,
    queues: u32,
    /// Interface index of the carrier.
    carrier: u32,
    /// Program identifiers: the carrier's and the line's.
    programs: [u32; 2],
    /// Interface index of the segmenter.
    pub segmenter: u32,
    /// Interface index of the line.
    pub line: u32,
}

impl Lane {
    /// Makes the lane of a namespace. It is in the journal before it is made; a failure undoes what there is.
    pub fn make(
        netns: &Netns,
        journal: &Arc<Journal>,
        config: &LaneConfig<'_>,
    ) -> Result<Self, LaneError> {
        // A locally administered address (bit 1 of the first byte) by which the carrier is known again.
        let mut mac = [0x02, 0, 0, 0, 0, 0];
        mac[1..].copy_from_slice(&rand::random::<[u8; 5]>());
        let entry = Entry {
            boot_id: boot_id()?,
            pid: std::process::id(),
            netns: netns.id,
            netns_path: netns.path.clone(),
            ifindex: 0,
            ifname: CARRIER.to_owned(),
            mac: netlink::hexadecimal(&mac),
            change: Change::Lane,
        };
        let mut lane = Self {
            netns: netns.clone(),
            journal: Arc::clone(journal),
            entry: None,
            queues: queues(),
            carrier: 0,
            programs: [0; 2],
            segmenter: 0,
            line: 0,
        };
        netns.run(|| lane.build(entry, mac, config))??;
        Ok(lane)
    }

    fn build(
        &mut self,
        entry: Entry,
        mac: [u8; 6],
        config: &LaneConfig<'_>,
    ) -> Result<(), LaneError> {
        for name in [CARRIER, SEGMENTER, LINE] {
            if netlink::link_by_name(name)
                .map_err(|source| self.failed(source))?
                .is_some()
            {
                return Err(LaneError::Taken {
                    netns: self.netns.to_string(),
                    name,
                });
            }
        }
        let id = self.journal.record(&entry)?;
        // From here on dropping this takes back what there is.
        self.entry = Some((id, entry));
        // A VLAN device takes from its parent whether packets lose their route on it
        // (`vlan_newlink`, net/8021q/vlan_netlink.c). On a veth they do, and a packet of a loopback device
        // that comes back without is a martian; on an ifb they do not (`ifb_setup`, drivers/net/ifb.c, 6.1).
        netlink::create_ifb(CARRIER, mac, MTU).map_err(|source| {
            lacking("ifb devices", CARRIER_KIND, source)
                .unwrap_or_else(|source| self.failed(source))
        })?;
        let carrier = self.index(CARRIER)?;
        // The segmenter has no queue, and a VLAN device no lock of its own: it needs no second one.
        for (name, number, queues) in [
            (SEGMENTER, lane_vlan::SEGMENTER, 1),
            (LINE, lane_vlan::LINE, self.queues),
        ] {
            netlink::create_vlan(name, carrier, number, queues).map_err(|source| {
                lacking("VLAN devices", "8021q", source)
                    .unwrap_or_else(|source| self.failed(source))
            })?;
        }
        let (segmenter, line) = (self.index(SEGMENTER)?, self.index(LINE)?);
        for name in [CARRIER, SEGMENTER, LINE] {
            self.mute(name)?;
        }
        netlink::complete_packets(SEGMENTER).map_err(|source| self.failed(source))?;
        netlink::add_fq(line, self.queues, config.limits).map_err(|source| {
            lacking("the fq qdisc", "sch_fq", source).unwrap_or_else(|source| self.failed(source))
        })?;
        for (index, program, name) in [
            (carrier, config.carrier, "injector_carrier"),
            (line, config.line, "injector_line"),
        ] {
            netlink::add_clsact(index)
                .and_then(|_| {
                    let filter = NewFilter {
                        program,
                        name,
                        priority: PRIORITY,
                        handle: HANDLE,
                        classid: u32::from(config.number.0),
                    };
                    netlink::attach(index, Hook::Egress, &filter)
                })
                .map_err(|source| self.failed(source))?;
        }
        for index in [carrier, segmenter, line] {
            netlink::set_up(index).map_err(|source| self.failed(source))?;
        }
        self.await_carriers(&[segmenter, line])?;
        let id = |program| netlink::program(program).map(|program| program.id);
        self.programs = [
            id(config.carrier).map_err(|source| self.failed(source))?,
            id(config.line).map_err(|source| self.failed(source))?,
        ];
        (self.carrier, self.segmenter, self.line) = (carrier, segmenter, line);
        Ok(())
    }

    /// A VLAN device passes packets on only once its carrier's is seen to be up: until then it has no queue, and what
    /// is sent is dropped.
    fn await_carriers(&self, indices: &[u32]) -> Result<(), LaneError> {
        let began = Instant::now();
        loop {
            let mut running = true;
            for index in indices {
                running &= netlink::link_by_index(*index)
                    .map_err(|source| self.failed(source))?
                    .is_some_and(|link| link.running);
            }
            if running {
                return Ok(());
            }
            if began.elapsed() > COMING_UP {
                return Err(LaneError::Down {
                    netns: self.netns.to_string(),
                    seconds: COMING_UP.as_secs(),
                });
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Keeps the kernel from sending anything of its own through a device.
    fn mute(&self, name: &str) -> Result<(), LaneError> {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        if !Path::new(&path).exists() {
            // A kernel without IPv6.
            return Ok(());
        }
        fs::write(&path, "1").map_err(|source| LaneError::Setting {
            netns: self.netns.to_string(),
            path,
            source,
        })
    }

    fn index(&self, name: &str) -> Result<u32, LaneError> {
        match netlink::link_by_name(name).map_err(|source| self.failed(source))? {
            Some(link) => Ok(link.index),
            None => Err(LaneError::Setting {
                netns: self.netns.to_string(),
                path: name.to_owned(),
                source: io::ErrorKind::NotFound.into(),
            }),
        }
    }

    fn failed(&self, source: NetlinkError) -> LaneError {
        LaneError::Netlink {
            netns: self.netns.to_string(),
            source,
        }
    }

    /// The namespace that it is in.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// What somebody else has done to it, if anything. One whose namespace has gone is sound: nothing passes there.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn damage(&self) -> Result<Option<Damage>, LaneError> {
        match self.netns.run(|| self.look()) {
            Ok(found) => found.map_err(|source| self.failed(source)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn look(&self) -> Result<Option<Damage>, NetlinkError> {
        for (index, name) in [
            (self.carrier, CARRIER),
            (self.segmenter, SEGMENTER),
            (self.line, LINE),
        ] {
            match netlink::link_by_index(index)? {
                Some(link) if link.name == name => {
                    if !link.up {
                        return Ok(Some(Damage::Down(name)));
                    }
                }
                _ => return Ok(Some(Damage::Gone(name))),
            }
        }
        for (index, name, program) in [
            (self.carrier, CARRIER, self.programs[0]),
            (self.line, LINE, self.programs[1]),
        ] {
            if !netlink::filters(index, Hook::Egress)?
                .iter()
                .any(|filter| undo::is_ours(filter, PRIORITY, HANDLE, program))
            {
                return Ok(Some(Damage::FilterRemoved(name)));
            }
        }
        Ok((!netlink::has_fq(self.line, self.queues)?).then_some(Damage::QueueReplaced(LINE)))
    }

    /// What it holds and has dropped.
    pub fn queue(&self) -> Result<LaneQueue, LaneError> {
        let (qdisc, links) = self
            .netns
            .run(|| -> Result<_, NetlinkError> {
                let links = [CARRIER, SEGMENTER, LINE]
                    .into_iter()
                    .map(netlink::link_by_name)
                    .collect::<Result<Vec<_>, _>>()?;
                Ok((netlink::root_stats(self.line)?, links))
            })?
            .map_err(|source| self.failed(source))?;
        Ok(LaneQueue {
            qdisc,
            device_drops: links
                .into_iter()
                .flatten()
                .map(|link| link.stats.tx_dropped + link.stats.rx_dropped)
                .sum(),
        })
    }

    /// Gives its queues other limits. They must not hold more than that.
    pub fn set_limits(&self, limits: FqLimits) -> Result<(), LaneError> {
        self.netns
            .run(|| netlink::change_fq(self.line, self.queues, limits))?
            .map_err(|source| self.failed(source))
    }

    /// Waits, for a moment, until its queue is empty: for packets that leave now.
    fn await_empty(&self) {
        let began = Instant::now();
        while began.elapsed() < EMPTYING
            && matches!(self.queue(), Ok(queue) if queue.qdisc.queued_packets > 0)
        {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Removes it. Packets that are due leave before; what is still held beyond is lost, and their number is
    /// given. After an error it can be tried again.
    pub fn remove(&mut self) -> Result<u64, LaneError> {
        if self.entry.is_some() {
            self.await_empty();
        }
        self.remove_now()
    }

    /// The same without a wait for packets that are due.
    fn remove_now(&mut self) -> Result<u64, LaneError> {
        let Some((id, entry)) = self.entry.take() else {
            return Ok(0);
        };
        let lost = self.queue().map_or(0, |queue| queue.qdisc.queued_packets);
        let removed = self.netns.run(|| delete(&entry, Some(self.carrier)));
        match removed {
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.is_no_device() => {}
            Err(error) if error.is_gone() => {}
            Ok(Err(error)) => {
                self.entry = Some((id, entry));
                return Err(self.failed(error));
            }
            Err(error) => {
                self.entry = Some((id, entry));
                return Err(error.into());
            }
        }
        // If this cannot be written the next recovery finds nothing to do: no harm.
        let _ = self.journal.done(id);
        Ok(lost)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if let Err(error) = self.remove_now() {
            tracing::warn!("cannot remove a lane: {error}");
        }
    }
}

/// Queues of a line: one for each CPU that is online, within bounds.
fn queues() -> u32 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten()
        .and_then(|count| u32::try_from(count).ok())
        .unwrap_or(1)
        .clamp(1, MAX_QUEUES)
}

/// Deletes the devices of the lane that an entry is about; whether any was there. The carrier is known by its kind and
/// its address, also if somebody has renamed it, or by its name and index, where that is known. The VLANs on it go with
/// it; they are deleted by themselves where it has been moved to another namespace.
pub(crate) fn delete(entry: &Entry, carrier: Option<u32>) -> Result<bool, NetlinkError> {
    let ours = |link: &Link| {
        let addressed = netlink::hexadecimal(&link.mac) == entry.mac;
        match link.kind.as_deref() {
            Some(CARRIER_KIND) => {
                addressed || carrier == Some(link.index) && link.name == entry.ifname
            }
            Some(VLAN_KIND) => addressed && [SEGMENTER, LINE].contains(&link.name.as_str()),
            _ => false,
        }
    };
    let mut found = false;
    for link in netlink::links()?.iter().filter(|link| ours(link)) {
        found = true;
        match netlink::delete_link(link.index) {
            Err(error) if error.is_no_device() => {}
            deleted => deleted?,
        }
    }
    Ok(found)
}

/// An error that says that the kernel lacks a kind of device or qdisc; else the error itself.
fn lacking(
    what: &'static str,
    module: &'static str,
    source: NetlinkError,
) -> Result<LaneError, NetlinkError> {
    match source.errno() {
        Some(libc::EOPNOTSUPP | libc::ENOENT) => Ok(LaneError::Unsupported {
            what,
            module,
            source,
        }),
        _ => Err(source),
    }
}
