//! The clsact qdisc and the filters on it.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use serde::{Deserialize, Serialize};

use super::{
    NetlinkError,
    attribute::{Attributes, Message},
    socket::{Connection, malformed},
};

// include/uapi/linux/rtnetlink.h, pkt_sched.h, pkt_cls.h
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const RTM_NEWCHAIN: u16 = 100;
const RTM_GETCHAIN: u16 = 102;
const HEADER: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const TCA_INGRESS_BLOCK: u16 = 13;
const TCA_EGRESS_BLOCK: u16 = 14;
const TCA_BPF_CLASSID: u16 = 3;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_TAG: u16 = 10;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TCA_STATS2: u16 = 7;
const TCA_STATS_BASIC: u16 = 1;
const TCA_STATS_QUEUE: u16 = 3;
const TCA_FQ_PLIMIT: u16 = 1;
const TCA_FQ_FLOW_PLIMIT: u16 = 2;
const TCA_FQ_RATE_ENABLE: u16 = 5;
const TCA_FQ_BUCKETS_LOG: u16 = 8;
const TCA_FQ_ORPHAN_MASK: u16 = 10;
const TCA_FQ_HORIZON: u16 = 14;
const TCA_FQ_PRIOMAP: u16 = 16;
/// `FQ_BUCKETS_LOG` at most (`fq_policy` and `fq_change`, `net/sched/sch_fq.c`, 6.1).
const MAX_BUCKETS_LOG: u32 = 18;
/// `struct tc_prio_qopt`: three bands, as fq has them, and every priority in the first of them.
const FQ_ONE_BAND: [u8; 20] = {
    let mut map = [0; 20];
    let bands = 3_u32.to_ne_bytes();
    (map[0], map[1], map[2], map[3]) = (bands[0], bands[1], bands[2], bands[3]);
    map
};
/// Handle of the mq that a device of several queues gets; its classes are numbered from 1.
const MQ_HANDLE: u32 = 1 << 16;
const TC_H_ROOT: u32 = 0xffff_ffff;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const ETH_P_ALL: u16 = 3;

/// A hook of clsact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// Packets leaving through the interface.
    Egress,
    /// Packets arriving at the interface.
    Ingress,
}

impl Hook {
    /// Both hooks.
    pub const BOTH: [Hook; 2] = [Hook::Egress, Hook::Ingress];

    /// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS | TC_H_MIN_INGRESS)`.
    fn parent(self) -> u32 {
        match self {
            Self::Egress => 0xffff_fff3,
            Self::Ingress => 0xffff_fff2,
        }
    }
}

impl std::fmt::Display for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        })
    }
}

/// What sits at the place of an interface that clsact would take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookQdisc {
    /// "clsact", or "ingress", which offers no egress hook.
    pub kind: String,
    /// Hooks whose filters live in a block shared with other interfaces, with the block's number.
    pub shared_blocks: Vec<(Hook, u32)>,
}

/// A filter on a clsact hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Preference; lower runs first.
    pub priority: u16,
    /// Handle within the preference.
    pub handle: u32,
    /// Ethertype, or `ETH_P_ALL` (3).
    pub protocol: u16,
    /// Chain; the hook starts in 0.
    pub chain: u32,
    /// Kind ("bpf", "u32", "flower" …).
    pub kind: String,
    /// Details of a bpf filter.
    pub bpf: Option<BpfFilter>,
}

/// Details of a bpf filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpfFilter {
    /// Name that was given on attaching.
    pub name: String,
    /// Program id; 0 for a classic BPF program, which has none.
    pub id: u32,
    /// Program tag, in hexadecimal.
    pub tag: String,
    /// Whether the program's return value is the verdict.
    pub direct_action: bool,
    /// Class id.
    pub classid: u32,
}

/// What [`add_clsact`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// It was made.
    Created,
    /// There was one before.
    Existed,
}

/// A bpf filter to attach.
#[derive(Debug, Clone, Copy)]
pub struct NewFilter<'a> {
    /// The program.
    pub program: BorrowedFd<'a>,
    /// Name shown by `tc filter show`.
    pub name: &'a str,
    /// Preference, from 1.
    pub priority: u16,
    /// Handle, from 1.
    pub handle: u32,
    /// Class id, which the program reads from `skb->tc_classid`.
    pub classid: u32,
}

/// `struct tcmsg`.
#[derive(Default)]
struct Header {
    ifindex: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

impl Header {
    fn message(&self) -> Message {
        let mut bytes = vec![0; 4];
        for field in [self.ifindex, self.handle, self.parent, self.info] {
            bytes.extend(field.to_ne_bytes());
        }
        Message::from_header(&bytes)
    }

    fn parse(message: &[u8]) -> Option<Self> {
        let field = |at: usize| -> Option<u32> {
            Some(u32::from_ne_bytes(
                message.get(at..at + 4)?.try_into().ok()?,
            ))
        };
        Some(Self {
            ifindex: field(4)?,
            handle: field(8)?,
            parent: field(12)?,
            info: field(16)?,
        })
    }
}

/// `TC_H_MAKE(priority << 16, htons(protocol))`.
fn info(priority: u16, protocol: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(protocol.to_be())
}

/// Names an interface in messages; attaching puts its name in front.
fn place(ifindex: u32, hook: Hook) -> String {
    format!("the {hook} hook of interface {ifindex}")
}

/// The messages that describe the qdiscs of the interface.
fn qdiscs(what: &str, ifindex: u32) -> Result<Vec<(Header, Vec<u8>)>, NetlinkError> {
    let request = Header::default().message().into_bytes();
    let mut found = Vec::new();
    for (kind, message) in Connection::open(what)?.dump(what, RTM_GETQDISC, &request)? {
        let header =
            Header::parse(&message).ok_or_else(|| malformed(what, "short qdisc message"))?;
        // The dump is of all interfaces, whatever the request names.
        if kind == RTM_NEWQDISC && header.ifindex == ifindex {
            found.push((header, message));
        }
    }
    Ok(found)
}

/// The clsact (or ingress) qdisc of the interface.
pub fn hook_qdisc(ifindex: u32) -> Result<Option<HookQdisc>, NetlinkError> {
    let what = format!("list the qdiscs of interface {ifindex}");
    let found = qdiscs(&what, ifindex)?
        .into_iter()
        .find(|(header, _)| header.parent == TC_H_CLSACT);
    let Some((_, message)) = found else {
        return Ok(None);
    };
    let attributes =
        Attributes::after(HEADER, &message).map_err(|error| malformed(&what, error))?;
    let block = |hook, attribute| {
        let number = attributes.u32(attribute).filter(|number| *number != 0)?;
        Some((hook, number))
    };
    Ok(Some(HookQdisc {
        kind: attributes.string(TCA_KIND).unwrap_or_default(),
        shared_blocks: [
            block(Hook::Egress, TCA_EGRESS_BLOCK),
            block(Hook::Ingress, TCA_INGRESS_BLOCK),
        ]
        .into_iter()
        .flatten()
        .collect(),
    }))
}

/// Whether the interface has a clsact qdisc.
pub fn has_clsact(ifindex: u32) -> Result<bool, NetlinkError> {
    Ok(hook_qdisc(ifindex)?.is_some_and(|qdisc| qdisc.kind == "clsact"))
}

/// Adds a clsact qdisc unless there is one. An error of `EEXIST` means that an ingress qdisc has taken
/// its place.
pub fn add_clsact(ifindex: u32) -> Result<Created, NetlinkError> {
    let what = format!("add a clsact qdisc to interface {ifindex}");
    let request = Header {
        ifindex,
        handle: CLSACT_HANDLE,
        parent: TC_H_CLSACT,
        ..Header::default()
    }
    .message()
    .string(TCA_KIND, "clsact")
    .into_bytes();
    match Connection::open(&what)?.request(&what, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &request)
    {
        Ok(_) => Ok(Created::Created),
        Err(error) if error.errno() == Some(libc::EEXIST) && has_clsact(ifindex)? => {
            Ok(Created::Existed)
        }
        Err(error) => Err(error),
    }
}

/// Deletes the clsact qdisc with every filter on it.
pub fn delete_clsact(ifindex: u32) -> Result<(), NetlinkError> {
    let what = format!("delete the clsact qdisc of interface {ifindex}");
    let request = Header {
        ifindex,
        handle: CLSACT_HANDLE,
        parent: TC_H_CLSACT,
        ..Header::default()
    }
    .message()
    .string(TCA_KIND, "clsact")
    .into_bytes();
    Connection::open(&what)?
        .request(&what, RTM_DELQDISC, 0, &request)
        .map(|_| ())
}

/// Filters on a hook, in the order in which they run within their chains. None without clsact.
pub fn filters(ifindex: u32, hook: Hook) -> Result<Vec<Filter>, NetlinkError> {
    let what = format!("list the filters on {}", place(ifindex, hook));
    let mut found: Vec<Filter> = Vec::new();
    for message in hook_dump(&what, RTM_GETTFILTER, RTM_NEWTFILTER, ifindex, hook)? {
        found.push(
            parse_filter(&message)
                .map_err(|error| malformed(&what, error))?
                .ok_or_else(|| malformed(&what, "short filter message"))?,
        );
    }
    // Each preference is announced by a message with handle 0; it stands for itself only where nothing
    // follows it.
    let real = found.clone();
    found.retain(|filter| {
        filter.handle != 0
            || !real.iter().any(|other| {
                other.handle != 0
                    && (other.chain, other.priority, &other.kind)
                        == (filter.chain, filter.priority, &filter.kind)
            })
    });
    found.sort_by_key(|filter| (filter.chain, filter.priority));
    Ok(found)
}

/// Numbers of the chains on a hook: those in which there are filters and those that were made by hand.
pub fn chains(ifindex: u32, hook: Hook) -> Result<Vec<u32>, NetlinkError> {
    let what = format!("list the filter chains on {}", place(ifindex, hook));
    hook_dump(&what, RTM_GETCHAIN, RTM_NEWCHAIN, ifindex, hook)?
        .iter()
        .map(|message| {
            let attributes =
                Attributes::after(HEADER, message).map_err(|error| malformed(&what, error))?;
            Ok(attributes.u32(TCA_CHAIN).unwrap_or_default())
        })
        .collect()
}

/// Dumps what hangs on a hook.
fn hook_dump(
    what: &str,
    ask: u16,
    answer: u16,
    ifindex: u32,
    hook: Hook,
) -> Result<Vec<Vec<u8>>, NetlinkError> {
    let request = Header {
        ifindex,
        parent: hook.parent(),
        ..Header::default()
    }
    .message()
    .into_bytes();
    // Where there is no clsact the kernel answers with an empty list, and chains with an error
    // (`tc_dump_tfilter`, `tc_dump_chain` in net/sched/cls_api.c, 6.1 to 6.18).
    let parts = Connection::open(what)?.dump(what, ask, &request)?;
    Ok(parts
        .into_iter()
        .filter(|(kind, message)| {
            *kind == answer
                && Header::parse(message).is_some_and(|header| header.ifindex == ifindex)
        })
        .map(|(_, message)| message)
        .collect())
}

fn parse_filter(message: &[u8]) -> Result<Option<Filter>, netlink_packet_core::DecodeError> {
    let Some(header) = Header::parse(message) else {
        return Ok(None);
    };
    let attributes = Attributes::after(HEADER, message)?;
    let kind = attributes.string(TCA_KIND).unwrap_or_default();
    let bpf = if kind == "bpf" && header.handle != 0 {
        let options = attributes.nested(TCA_OPTIONS)?;
        let tag = options.get(TCA_BPF_TAG).unwrap_or_default();
        Some(BpfFilter {
            name: options.string(TCA_BPF_NAME).unwrap_or_default(),
            id: options.u32(TCA_BPF_ID).unwrap_or_default(),
            tag: hexadecimal(tag),
            direct_action: options
                .u32(TCA_BPF_FLAGS)
                .is_some_and(|flags| flags & TCA_BPF_FLAG_ACT_DIRECT != 0),
            classid: options.u32(TCA_BPF_CLASSID).unwrap_or_default(),
        })
    } else {
        None
    };
    let [priority, protocol] = [header.info >> 16, header.info & 0xffff]
        .map(|half| u16::try_from(half).unwrap_or(u16::MAX));
    Ok(Some(Filter {
        priority,
        handle: header.handle,
        protocol: u16::from_be(protocol),
        chain: attributes.u32(TCA_CHAIN).unwrap_or_default(),
        kind,
        bpf,
    }))
}

/// Bytes as tc and ip write them, without separators.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let digit = |half: u8| char::from_digit(half.into(), 16).unwrap_or('?');
        text.extend([digit(byte >> 4), digit(byte & 15)]);
        text
    })
}

/// Attaches a bpf filter in direct-action mode, for all protocols. Never replaces one: `EEXIST` if there
/// is one with that preference and handle.
pub fn attach(ifindex: u32, hook: Hook, filter: &NewFilter<'_>) -> Result<(), NetlinkError> {
    let what = format!(
        "attach filter '{}' with preference {} to {}",
        filter.name,
        filter.priority,
        place(ifindex, hook)
    );
    let request = Header {
        ifindex,
        handle: filter.handle,
        parent: hook.parent(),
        info: info(filter.priority, ETH_P_ALL),
    }
    .message()
    .string(TCA_KIND, "bpf")
    .nest(TCA_OPTIONS, |options| {
        options
            .u32(TCA_BPF_CLASSID, filter.classid)
            .u32(TCA_BPF_FD, filter.program.as_raw_fd().cast_unsigned())
            .string(TCA_BPF_NAME, filter.name)
            .u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
    })
    .into_bytes();
    Connection::open(&what)?
        .request(&what, RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &request)
        .map(|_| ())
}

/// Removes one bpf filter that was attached for all protocols.
pub fn detach(ifindex: u32, hook: Hook, priority: u16, handle: u32) -> Result<(), NetlinkError> {
    let what = format!(
        "remove the bpf filter with preference {priority} and handle {handle:#x} from {}",
        place(ifindex, hook)
    );
    let request = Header {
        ifindex,
        handle,
        parent: hook.parent(),
        info: info(priority, ETH_P_ALL),
    }
    .message()
    .string(TCA_KIND, "bpf")
    .into_bytes();
    Connection::open(&what)?
        .request(&what, RTM_DELTFILTER, 0, &request)
        .map(|_| ())
}

/// Adds a qdisc with its default settings as the root of an interface (for probing, in a namespace made
/// for that).
pub(crate) fn add_root_qdisc(ifindex: u32, kind: &str) -> Result<(), NetlinkError> {
    let what = format!("add qdisc {kind} to interface {ifindex}");
    let request = Header {
        ifindex,
        parent: 0xffff_ffff,
        ..Header::default()
    }
    .message()
    .string(TCA_KIND, kind)
    .into_bytes();
    Connection::open(&what)?
        .request(&what, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &request)
        .map(|_| ())
}

/// The limits of an fq.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FqLimits {
    /// Packets that it holds, of one flow or of many.
    pub packets: u32,
    /// Packets whose departure is further ahead are dropped, microseconds.
    pub horizon_us: u32,
}

impl FqLimits {
    /// Trees over which it spreads its flows, as a power of two: sixteen flows a tree, where each packet that it
    /// may hold is a flow of its own (packets that may be overtaken are). Eight bytes a tree.
    fn buckets_log(self) -> u32 {
        self.packets
            .max(1)
            .ilog2()
            .saturating_sub(4)
            .clamp(10, MAX_BUCKETS_LOG)
    }
}

/// Adds fq as the root of an interface or, where it has several queues, mq with one fq a queue. They pace by
/// departure times alone. The interface is down: grafting a child takes its queue out of service (`mq_graft`,
/// `net/sched/sch_mq.c`).
pub fn add_fq(ifindex: u32, queues: u32, limits: FqLimits) -> Result<(), NetlinkError> {
    if queues > 1 {
        let what = format!("add qdisc mq to interface {ifindex}");
        let request = Header {
            ifindex,
            handle: MQ_HANDLE,
            parent: TC_H_ROOT,
            ..Header::default()
        }
        .message()
        .string(TCA_KIND, "mq")
        .into_bytes();
        Connection::open(&what)?.request(
            &what,
            RTM_NEWQDISC,
            NLM_F_CREATE | NLM_F_EXCL,
            &request,
        )?;
    }
    fq_parents(queues).try_for_each(|parent| {
        let what = format!("add qdisc fq to interface {ifindex}");
        Connection::open(&what)?
            .request(
                &what,
                RTM_NEWQDISC,
                NLM_F_CREATE | NLM_F_EXCL,
                &fq(ifindex, parent, limits),
            )
            .map(|_| ())
    })
}

/// Gives what [`add_fq`] has made other limits. What it holds stays, up to the new limit: what is beyond that is
/// dropped (`fq_change`, `net/sched/sch_fq.c`).
pub fn change_fq(ifindex: u32, queues: u32, limits: FqLimits) -> Result<(), NetlinkError> {
    fq_parents(queues).try_for_each(|parent| {
        let what = format!("change qdisc fq of interface {ifindex}");
        // Without a handle, and without flags, the child that is there is changed (`tc_modify_qdisc`,
        // net/sched/sch_api.c).
        Connection::open(&what)?
            .request(&what, RTM_NEWQDISC, 0, &fq(ifindex, parent, limits))
            .map(|_| ())
    })
}

/// Whether the qdiscs of an interface are still of the kinds that [`add_fq`] gave it.
pub fn has_fq(ifindex: u32, queues: u32) -> Result<bool, NetlinkError> {
    let what = format!("list the qdiscs of interface {ifindex}");
    let mut fq = 0;
    for (header, message) in qdiscs(&what, ifindex)? {
        if fq_parents(queues).any(|parent| parent == header.parent) {
            let attributes =
                Attributes::after(HEADER, &message).map_err(|error| malformed(&what, error))?;
            fq += usize::from(attributes.string(TCA_KIND).as_deref() == Some("fq"));
        }
    }
    Ok(fq == fq_parents(queues).count())
}

/// The root, or the classes of the mq.
fn fq_parents(queues: u32) -> impl Iterator<Item = u32> {
    (1..=queues.max(1)).map(move |number| {
        if queues > 1 {
            MQ_HANDLE | number
        } else {
            TC_H_ROOT
        }
    })
}

fn fq(ifindex: u32, parent: u32, limits: FqLimits) -> Vec<u8> {
    Header {
        ifindex,
        parent,
        ..Header::default()
    }
    .message()
    .string(TCA_KIND, "fq")
    .nest(TCA_OPTIONS, |options| {
        options
            .u32(TCA_FQ_PLIMIT, limits.packets)
            .u32(TCA_FQ_FLOW_PLIMIT, limits.packets)
            .u32(TCA_FQ_RATE_ENABLE, 0)
            .u32(TCA_FQ_BUCKETS_LOG, limits.buckets_log())
            // Every packet has a hash of our making. With the default, 1023, flows would share queues, and
            // wait for each other's departure times.
            .u32(TCA_FQ_ORPHAN_MASK, u32::MAX)
            .u32(TCA_FQ_HORIZON, limits.horizon_us)
            // From 6.7 on the limit is one a band, and bands take turns: here all priorities are equal. Older
            // kernels do not know the attribute and skip it (`nla_parse_nested_deprecated`).
            .bytes(TCA_FQ_PRIOMAP, &FQ_ONE_BAND)
    })
    .into_bytes()
}

/// Counters of a qdisc.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QdiscStats {
    /// Packets that it holds.
    pub queued_packets: u64,
    /// Their bytes.
    pub queued_bytes: u64,
    /// Packets that it dropped, since it was made.
    pub dropped_packets: u64,
    /// Packets that have left it; 32 bits, which begin again.
    pub sent_packets: u64,
}

/// The counters of an interface's root qdisc; those of mq are the sums of its children's (`mq_dump`,
/// `net/sched/sch_mq.c`).
pub fn root_stats(ifindex: u32) -> Result<QdiscStats, NetlinkError> {
    let what = format!("read the counters of the qdisc of interface {ifindex}");
    let root = qdiscs(&what, ifindex)?
        .into_iter()
        .find(|(header, _)| header.parent == TC_H_ROOT);
    let Some((_, message)) = root else {
        return Ok(QdiscStats::default());
    };
    let statistics = Attributes::after(HEADER, &message)
        .and_then(|attributes| attributes.nested(TCA_STATS2))
        .map_err(|error| malformed(&what, &error))?;
    // struct gnet_stats_queue: qlen, backlog, drops, requeues, overlimits; struct gnet_stats_basic: bytes (64 bits),
    // packets.
    let field = |attribute: u16, at: usize| {
        statistics
            .get(attribute)
            .and_then(|bytes| bytes.get(at..at + 4)?.try_into().ok())
            .map_or(0, |bytes| u64::from(u32::from_ne_bytes(bytes)))
    };
    Ok(QdiscStats {
        queued_packets: field(TCA_STATS_QUEUE, 0),
        queued_bytes: field(TCA_STATS_QUEUE, 4),
        dropped_packets: field(TCA_STATS_QUEUE, 8),
        sent_packets: field(TCA_STATS_BASIC, 8),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bpf_filter_is_read_as_the_kernel_writes_it() {
        let message = Header {
            ifindex: 2,
            handle: 1,
            parent: Hook::Egress.parent(),
            info: info(7, ETH_P_ALL),
        }
        .message()
        .string(TCA_KIND, "bpf")
        .u32(TCA_CHAIN, 0)
        .nest(TCA_OPTIONS, |options| {
            options
                .string(TCA_BPF_NAME, "injector:egress")
                .u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
                .u32(TCA_BPF_CLASSID, 5)
                .bytes(TCA_BPF_TAG, &[0xa0, 4, 0, 0, 0, 0, 0, 0xff])
                .u32(TCA_BPF_ID, 77)
        })
        .into_bytes();
        let filter = parse_filter(&message).unwrap().unwrap();
        assert_eq!((filter.priority, filter.handle), (7, 1));
        assert_eq!((filter.protocol, filter.chain), (ETH_P_ALL, 0));
        let bpf = filter.bpf.unwrap();
        assert_eq!(bpf.name, "injector:egress");
        assert_eq!((bpf.id, bpf.classid, bpf.direct_action), (77, 5, true));
        assert_eq!(bpf.tag, "a0040000000000ff");
        assert!(parse_filter(&message[..12]).unwrap().is_none());
    }

    #[test]
    fn trees_grow_with_the_packets() {
        let log = |packets| {
            FqLimits {
                packets,
                horizon_us: 0,
            }
            .buckets_log()
        };
        assert_eq!(log(0), 10);
        assert_eq!(log(1000), 10);
        assert_eq!(log(100_000), 12);
        assert_eq!(log(u32::MAX), MAX_BUCKETS_LOG);
        assert_eq!(FQ_ONE_BAND[..4], 3_u32.to_ne_bytes());
        assert_eq!(fq_parents(1).collect::<Vec<_>>(), [TC_H_ROOT]);
        assert_eq!(fq_parents(2).collect::<Vec<_>>(), [0x1_0001, 0x1_0002]);
    }

    #[test]
    fn without_clsact_there_is_nothing() {
        // Index 1 is lo, which has no clsact in any namespace in which unit tests run.
        if hook_qdisc(1).unwrap().is_none() {
            assert!(!has_clsact(1).unwrap());
            for hook in Hook::BOTH {
                assert_eq!(filters(1, hook).unwrap(), []);
            }
        }
    }
}
