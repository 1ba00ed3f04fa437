//! The host as the daemon sees it: namespaces, interfaces and what is attached to them. A trait, so
//! that the daemon's state machine is tested without privileges.

use std::{io, os::fd::BorrowedFd, path::Path, sync::Arc};

use ipnet::IpNet;

use super::plane::{LaneDevices, LaneNumber, TargetSlot};
use crate::{
    attach::{self, AttachError, Attachment, Obstacle, Presence, TargetLink},
    journal::{Journal, JournalError},
    lane::{Damage, Lane, LaneConfig, LaneError, LaneQueue},
    netlink::{self, FqLimits, Link, NetlinkError, Route},
    netns::{Netns, NetnsError},
    protocol::{ErrorBody, ErrorCode},
    rules::model::NetnsRef,
};

/// What a namespace looks like, as far as finding the interfaces of a partition needs it.
#[derive(Debug, Clone, Default)]
pub struct Topology {
    /// Its interfaces.
    pub links: Vec<Link>,
    /// Their addresses.
    pub addresses: Vec<(u32, IpNet)>,
    /// Its routes, except those of the local table.
    pub routes: Vec<Route>,
    /// Whether it forwards packets of IPv4 or of IPv6.
    pub forwarding: bool,
}

/// What the daemon does to the host.
pub trait Host: Send + 'static {
    /// The injector attached to one target. Detaches when it is dropped, as well as it can.
    type Attachment: Send;
    /// A lane. Removed when it is dropped, as well as it can.
    type Lane: Send;

    /// Finds a namespace.
    fn resolve(&self, reference: &NetnsRef) -> Result<Netns, ErrorBody>;
    /// Finds an interface and makes sure that the injector can work on it.
    fn inspect(&self, netns: &Netns, interface: &str) -> Result<TargetLink, ErrorBody>;
    /// Looks a namespace over.
    fn topology(&self, netns: &Netns) -> Result<Topology, ErrorBody>;
    /// Attaches both programs to an interface. After an error nothing has changed.
    fn attach(
        &self,
        link: &TargetLink,
        egress: BorrowedFd<'_>,
        ingress: BorrowedFd<'_>,
        slot: TargetSlot,
    ) -> Result<Self::Attachment, ErrorBody>;
    /// Packets that the kernel dropped while it was attached.
    fn dropped(&self, attachment: &Self::Attachment) -> u64;
    /// Looks whether an attachment is still in place.
    fn verify(&self, attachment: &Self::Attachment) -> Result<Presence, ErrorBody>;
    /// What runs before us on the target and may hide packets.
    fn ahead(&self, attachment: &Self::Attachment) -> Result<Vec<Obstacle>, ErrorBody>;
    /// Undoes an attachment exactly. Returns what was met and left alone. After an error it can be
    /// tried again.
    fn detach(&self, attachment: &mut Self::Attachment) -> Result<Vec<String>, ErrorBody>;
    /// Makes the lane of a namespace. After an error nothing has changed.
    fn make_lane(
        &self,
        netns: &Netns,
        carrier: BorrowedFd<'_>,
        line: BorrowedFd<'_>,
        number: LaneNumber,
        limits: FqLimits,
    ) -> Result<(Self::Lane, LaneDevices), ErrorBody>;
    /// Gives the queues of a lane other limits; what they hold must fit.
    fn limit_lane(&self, lane: &Self::Lane, limits: FqLimits) -> Result<(), ErrorBody>;
    /// What somebody else has done to a lane, if anything.
    fn lane_damage(&self, lane: &Self::Lane) -> Result<Option<Damage>, ErrorBody>;
    /// What a lane holds and has dropped.
    fn lane_stats(&self, lane: &Self::Lane) -> Result<LaneQueue, ErrorBody>;
    /// Removes a lane. Returns how many packets it still held. After an error it can be tried again.
    fn remove_lane(&self, lane: &mut Self::Lane) -> Result<u64, ErrorBody>;
    /// Packets that an interface has dropped as they arrived; a full backlog shows there.
    fn rx_dropped(&self, link: &TargetLink) -> Result<u64, ErrorBody>;
    /// A warning for each pair of targets that the same packet passes.
    fn double_pass(&self, targets: &[(Netns, u32)]) -> Vec<String>;
}

/// The host that this process runs on.
#[derive(Debug)]
pub struct KernelHost {
    journal: Arc<Journal>,
}

impl KernelHost {
    /// Opens the journal in the state directory, whose lock the caller holds.
    ///
    /// # Errors
    /// The journal cannot be opened.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        Ok(Self {
            journal: Arc::new(Journal::open(state_dir)?),
        })
    }
}

impl Host for KernelHost {
    type Attachment = Attachment;
    type Lane = Lane;

    fn resolve(&self, reference: &NetnsRef) -> Result<Netns, ErrorBody> {
        Netns::resolve(reference).map_err(|error| netns_error(&error))
    }

    fn inspect(&self, netns: &Netns, interface: &str) -> Result<TargetLink, ErrorBody> {
        attach::inspect(netns, interface).map_err(|error| attach_error(&error))
    }

    fn topology(&self, netns: &Netns) -> Result<Topology, ErrorBody> {
        netns
            .run(|| {
                Ok(Topology {
                    links: netlink::links()?,
                    addresses: netlink::addresses()?,
                    routes: netlink::routes()?,
                    forwarding: forwarding(),
                })
            })
            .map_err(|error| netns_error(&error))?
            .map_err(|error: NetlinkError| ErrorBody::new(netlink_error(&error), error.to_string()))
    }

    fn attach(
        &self,
        link: &TargetLink,
        egress: BorrowedFd<'_>,
        ingress: BorrowedFd<'_>,
        slot: TargetSlot,
    ) -> Result<Attachment, ErrorBody> {
        Attachment::attach(link, &self.journal, egress, ingress, slot.0)
            .map_err(|error| attach_error(&error))
    }

    fn dropped(&self, attachment: &Attachment) -> u64 {
        attachment.dropped()
    }

    fn verify(&self, attachment: &Attachment) -> Result<Presence, ErrorBody> {
        attachment.verify().map_err(|error| attach_error(&error))
    }

    fn ahead(&self, attachment: &Attachment) -> Result<Vec<Obstacle>, ErrorBody> {
        attachment.ahead().map_err(|error| attach_error(&error))
    }

    fn detach(&self, attachment: &mut Attachment) -> Result<Vec<String>, ErrorBody> {
        attachment
            .detach()
            .map(|detached| detached.notes)
            .map_err(|error| attach_error(&error))
    }

    fn make_lane(
        &self,
        netns: &Netns,
        carrier: BorrowedFd<'_>,
        line: BorrowedFd<'_>,
        number: LaneNumber,
        limits: FqLimits,
    ) -> Result<(Lane, LaneDevices), ErrorBody> {
        let config = LaneConfig {
            carrier,
            line,
            number,
            limits,
        };
        let made = Lane::make(netns, &self.journal, &config).map_err(|error| lane_error(&error))?;
        let devices = LaneDevices {
            segmenter: made.segmenter,
            line: made.line,
        };
        Ok((made, devices))
    }

    fn limit_lane(&self, lane: &Lane, limits: FqLimits) -> Result<(), ErrorBody> {
        lane.set_limits(limits).map_err(|error| lane_error(&error))
    }

    fn lane_damage(&self, lane: &Lane) -> Result<Option<Damage>, ErrorBody> {
        lane.damage().map_err(|error| lane_error(&error))
    }

    fn lane_stats(&self, lane: &Lane) -> Result<LaneQueue, ErrorBody> {
        lane.queue().map_err(|error| lane_error(&error))
    }

    fn remove_lane(&self, lane: &mut Lane) -> Result<u64, ErrorBody> {
        lane.remove().map_err(|error| lane_error(&error))
    }

    fn rx_dropped(&self, link: &TargetLink) -> Result<u64, ErrorBody> {
        let found = link
            .netns
            .run(|| netlink::link_by_index(link.index))
            .map_err(|error| netns_error(&error))?
            .map_err(|error| ErrorBody::new(netlink_error(&error), error.to_string()))?;
        Ok(found.map_or(0, |link| link.stats.rx_dropped))
    }

    fn double_pass(&self, targets: &[(Netns, u32)]) -> Vec<String> {
        netlink::double_pass(targets)
    }
}

/// Whether the calling thread's namespace forwards packets. /proc/net/.. follows the *process*'s
/// namespace, but /proc/sys/net is resolved by the *calling thread's* one
/// (`net_ctl_header_lookup` in `net/sysctl_net.c` looks at `current->nsproxy`).
fn forwarding() -> bool {
    [
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/net/ipv6/conf/all/forwarding",
    ]
    .iter()
    .any(|path| std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0"))
}

fn netns_error(error: &NetnsError) -> ErrorBody {
    let code = match error {
        NetnsError::Open { source, .. } | NetnsError::Enter { source, .. }
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            ErrorCode::NotPermitted
        }
        NetnsError::NotANamespace { .. } | NetnsError::Open { .. } => ErrorCode::Target,
        error if error.is_gone() => ErrorCode::Target,
        _ => ErrorCode::Host,
    };
    ErrorBody::new(code, error.to_string())
}

fn netlink_error(error: &NetlinkError) -> ErrorCode {
    match error.errno() {
        Some(libc::EPERM | libc::EACCES) => ErrorCode::NotPermitted,
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => ErrorCode::Unsupported,
        _ if error.is_no_device() => ErrorCode::Target,
        _ => ErrorCode::Host,
    }
}

fn lane_error(error: &LaneError) -> ErrorBody {
    let code = match error {
        LaneError::Netns(error) => return netns_error(error),
        LaneError::Unsupported { .. } => ErrorCode::Unsupported,
        LaneError::Netlink { source, .. } => netlink_error(source),
        LaneError::Taken { .. } => ErrorCode::Target,
        _ => ErrorCode::Host,
    };
    ErrorBody::new(code, error.to_string())
}

fn attach_error(error: &AttachError) -> ErrorBody {
    let code = match error {
        AttachError::Netns(error) => return netns_error(error),
        AttachError::Netlink { source, .. } => netlink_error(source),
        AttachError::Journal(_) => ErrorCode::Host,
        _ => ErrorCode::Target,
    };
    ErrorBody::new(code, error.to_string())
}
