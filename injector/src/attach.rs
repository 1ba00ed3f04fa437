//! The injector's presence on one target: clsact and its two filters, put there and taken away again
//! without a trace.

use std::{os::fd::BorrowedFd, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    journal::{Change, Entry, EntryId, Journal, JournalError, boot_id},
    netlink::{self, Created, Hook, Link, LinkKind, LinkStats, NetlinkError, NewFilter},
    netns::{Netns, NetnsError},
    undo::{self, Outcome, UndoError},
};

/// Name of the egress filter.
pub const EGRESS_NAME: &str = "injector:egress";
/// Name of the ingress filter.
pub const INGRESS_NAME: &str = "injector:ingress";

/// The handle of our filter within its preference, which is ours alone.
const HANDLE: u32 = 1;
/// So often a preference is chosen anew when somebody else takes it at the same moment.
const TRIES: u32 = 16;

/// An interface that the injector can be attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetLink {
    /// The namespace that it is in.
    pub netns: Netns,
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// How packets begin at its hooks.
    pub kind: LinkKind,
    /// Is a loopback interface: attached on egress only.
    pub loopback: bool,
}

/// Why attaching, looking or detaching failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// There is no such interface.
    #[error(
        "there is no interface '{ifname}' in network namespace {netns}; it has {}",
        listed(have)
    )]
    NoSuchInterface {
        /// The name that was given.
        ifname: String,
        /// The namespace.
        netns: String,
        /// The names that exist.
        have: Vec<String>,
    },
    /// The injector cannot read this interface's packets.
    #[error("the injector cannot work on interface {ifname}: {reason}")]
    Unsuitable {
        /// The interface.
        ifname: String,
        /// Why, and what to use instead.
        reason: String,
    },
    /// An ingress qdisc is in the way.
    #[error(
        "cannot attach to interface {ifname} in network namespace {netns}: it has an ingress qdisc, \
         which takes the place of clsact and offers no egress hook; have its filters moved to a \
         clsact qdisc (tc qdisc replace dev {ifname} clsact), or use another interface"
    )]
    IngressQdisc {
        /// The interface.
        ifname: String,
        /// The namespace.
        netns: String,
    },
    /// Filters of a hook are shared with other interfaces.
    #[error(
        "cannot attach to interface {ifname} in network namespace {netns}: its clsact qdisc shares \
         filter block {block} with other interfaces, so that a filter here would act on those, too; \
         use an interface that is not bound to a block"
    )]
    SharedBlock {
        /// The interface.
        ifname: String,
        /// The namespace.
        netns: String,
        /// Number of the block.
        block: u32,
    },
    /// The interface was deleted (or moved away) in the meantime.
    #[error(
        "interface {ifname} ({ifindex}) of network namespace {netns} has been deleted or replaced; \
         name it again if there is a new one"
    )]
    Gone {
        /// The interface.
        ifname: String,
        /// Its index.
        ifindex: u32,
        /// The namespace.
        netns: String,
    },
    /// The namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused.
    #[error("interface {ifname} of network namespace {netns}: {source}")]
    Netlink {
        /// The interface.
        ifname: String,
        /// The namespace.
        netns: String,
        /// What was refused.
        source: NetlinkError,
    },
    /// The change could not be written down, and so was not made.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Every preference is taken, or somebody takes them faster than we can.
    #[error(
        "cannot attach to the {hook} hook of interface {ifname} in network namespace {netns}: no \
         preference is free; look at `tc filter show dev {ifname} {hook}`"
    )]
    Full {
        /// The hook.
        hook: Hook,
        /// The interface.
        ifname: String,
        /// The namespace.
        netns: String,
    },
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

/// Whether an attachment is still what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// All is in place.
    Present,
    /// The interface has been deleted or moved away.
    InterfaceGone,
    /// The namespace has been deleted.
    NamespaceGone,
    /// Somebody removed our filter.
    FilterRemoved {
        /// From which hook.
        hook: Hook,
    },
}

/// Something that handles packets before us and may hide them from us.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Obstacle {
    /// At which hook.
    pub hook: Hook,
    /// What it is, for people.
    pub what: String,
}

/// Packets that were dropped on sending between two looks.
fn dropped_since(before: LinkStats, after: LinkStats) -> u64 {
    after.tx_dropped.saturating_sub(before.tx_dropped)
}

/// Says that packets were dropped while a clsact was made or deleted.
#[must_use]
pub fn dropped_text(packets: u64) -> String {
    let plural = if packets == 1 { "packet" } else { "packets" };
    format!("the kernel dropped {packets} {plural} that it sent in that moment")
}

/// What [`Attachment::detach`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Detached {
    /// Texts on what was met and left alone (foreign filters on our clsact, an interface that has gone),
    /// and on packets that the kernel dropped meanwhile.
    pub notes: Vec<String>,
}

/// Looks an interface up and decides whether the injector can work on it.
pub fn inspect(netns: &Netns, ifname: &str) -> Result<TargetLink, AttachError> {
    let failed = |source| AttachError::Netlink {
        ifname: ifname.to_owned(),
        netns: netns.to_string(),
        source,
    };
    let (link, have) = netns
        .run(|| -> Result<_, NetlinkError> {
            Ok(match netlink::link_by_name(ifname)? {
                Some(link) => (Some(link), Vec::new()),
                None => (None, netlink::links()?),
            })
        })?
        .map_err(failed)?;
    let Some(link) = link else {
        return Err(AttachError::NoSuchInterface {
            ifname: ifname.to_owned(),
            netns: netns.to_string(),
            have: have.into_iter().map(|link| link.name).collect(),
        });
    };
    let kind = netlink::link_kind(&link).map_err(|reason| AttachError::Unsuitable {
        ifname: ifname.to_owned(),
        reason,
    })?;
    Ok(TargetLink {
        netns: netns.clone(),
        index: link.index,
        name: link.name,
        kind,
        loopback: link.loopback,
    })
}

/// The injector attached to one target. Dropping it detaches as well as it can; [`Attachment::detach`]
/// says how that went.
#[derive(Debug)]
pub struct Attachment {
    link: TargetLink,
    journal: Arc<Journal>,
    /// What we did and have not undone, oldest first.
    made: Vec<(EntryId, Entry)>,
    /// What the interface did not send while its clsact was made.
    dropped: u64,
}

impl Attachment {
    /// Attaches both programs (on loopback: egress only), each as early as there is room. Every step is
    /// in the journal before it is made; a failure undoes the steps before it.
    pub fn attach(
        link: &TargetLink,
        journal: &Arc<Journal>,
        egress: BorrowedFd<'_>,
        ingress: BorrowedFd<'_>,
        classid: u16,
    ) -> Result<Attachment, AttachError> {
        // From here on an error drops this, and dropping it undoes what was done.
        let mut attachment = Attachment {
            link: link.clone(),
            journal: Arc::clone(journal),
            made: Vec::new(),
            dropped: 0,
        };
        let mut template = Entry {
            boot_id: boot_id()?,
            pid: std::process::id(),
            netns: link.netns.id,
            netns_path: link.netns.path.clone(),
            ifindex: link.index,
            ifname: link.name.clone(),
            mac: String::new(),
            change: Change::Clsact,
        };
        link.netns.run(|| {
            let before = attachment.same_link()?;
            template.mac = undo::mac(&before);
            attachment.add_clsact(&template)?;
            if !attachment.made.is_empty() {
                attachment.dropped = dropped_since(before.stats, attachment.same_link()?.stats);
            }
            // Ingress first, so that no answer to what egress lets through is missed.
            if !link.loopback {
                attachment.add_filter(&template, Hook::Ingress, ingress, classid)?;
            }
            attachment.add_filter(&template, Hook::Egress, egress, classid)
        })??;
        Ok(attachment)
    }

    /// Packets that the interface dropped on sending while its clsact was made, where it was: the kernel
    /// takes an interface's queues out of service for that moment (`qdisc_graft`, `net/sched/sch_api.c`). A
    /// lower bound: what is flushed from a queue is not counted there, and older kernels count less.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The interface, if it is still the one that was inspected.
    fn same_link(&self) -> Result<Link, AttachError> {
        match netlink::link_by_index(self.link.index).map_err(|error| self.failed(error))? {
            Some(link) if link.name == self.link.name => Ok(link),
            _ => Err(AttachError::Gone {
                ifname: self.link.name.clone(),
                ifindex: self.link.index,
                netns: self.link.netns.to_string(),
            }),
        }
    }

    fn add_clsact(&mut self, template: &Entry) -> Result<(), AttachError> {
        let index = self.link.index;
        let (ifname, netns) = (self.link.name.clone(), self.link.netns.to_string());
        match netlink::hook_qdisc(index).map_err(|error| self.failed(error))? {
            Some(qdisc) if qdisc.kind != "clsact" => {
                return Err(AttachError::IngressQdisc { ifname, netns });
            }
            Some(qdisc) => {
                if let Some((_, block)) = qdisc.shared_blocks.first() {
                    return Err(AttachError::SharedBlock {
                        ifname,
                        netns,
                        block: *block,
                    });
                }
                return Ok(());
            }
            None => {}
        }
        let id = self.journal.record(template)?;
        match netlink::add_clsact(index) {
            Ok(Created::Created) => {
                self.made.push((id, template.clone()));
                Ok(())
            }
            // Somebody else made one at this very moment: it is theirs.
            Ok(Created::Existed) => Ok(self.journal.done(id)?),
            Err(error) => {
                self.journal.done(id)?;
                Err(if error.errno() == Some(libc::EEXIST) {
                    AttachError::IngressQdisc { ifname, netns }
                } else {
                    self.failed(error)
                })
            }
        }
    }

    fn add_filter(
        &mut self,
        template: &Entry,
        hook: Hook,
        program: BorrowedFd<'_>,
        classid: u16,
    ) -> Result<(), AttachError> {
        let name = match hook {
            Hook::Egress => EGRESS_NAME,
            Hook::Ingress => INGRESS_NAME,
        };
        let id_of_program = netlink::program(program)
            .map_err(|error| self.failed(error))?
            .id;
        let full = || AttachError::Full {
            hook,
            ifname: self.link.name.clone(),
            netns: self.link.netns.to_string(),
        };
        for _ in 0..TRIES {
            let taken: Vec<u16> = netlink::filters(self.link.index, hook)
                .map_err(|error| self.failed(error))?
                .into_iter()
                .map(|filter| filter.priority)
                .collect();
            let priority = (1..=u16::MAX)
                .find(|priority| !taken.contains(priority))
                .ok_or_else(full)?;
            let entry = Entry {
                change: Change::Filter {
                    hook,
                    priority,
                    handle: HANDLE,
                    name: name.to_owned(),
                    program: id_of_program,
                },
                ..template.clone()
            };
            let id = self.journal.record(&entry)?;
            let filter = NewFilter {
                program,
                name,
                priority,
                handle: HANDLE,
                classid: classid.into(),
            };
            match netlink::attach(self.link.index, hook, &filter) {
                Ok(()) => {
                    self.made.push((id, entry));
                    return Ok(());
                }
                Err(error) => {
                    self.journal.done(id)?;
                    // Somebody took the preference since we looked; with a filter of another kind or
                    // protocol the kernel says EINVAL.
                    let now: Vec<u16> = netlink::filters(self.link.index, hook)
                        .map_err(|error| self.failed(error))?
                        .into_iter()
                        .map(|filter| filter.priority)
                        .collect();
                    if !now.contains(&priority) {
                        return Err(self.failed(error));
                    }
                }
            }
        }
        Err(full())
    }

    fn failed(&self, source: NetlinkError) -> AttachError {
        if source.is_no_device() {
            return AttachError::Gone {
                ifname: self.link.name.clone(),
                ifindex: self.link.index,
                netns: self.link.netns.to_string(),
            };
        }
        AttachError::Netlink {
            ifname: self.link.name.clone(),
            netns: self.link.netns.to_string(),
            source,
        }
    }

    /// The target.
    #[must_use]
    pub fn link(&self) -> &TargetLink {
        &self.link
    }

    /// Our filters: hook, preference, handle, program.
    fn filters(&self) -> impl Iterator<Item = (Hook, u16, u32, u32)> {
        self.made
            .iter()
            .filter_map(|(_, entry)| match entry.change {
                Change::Filter {
                    hook,
                    priority,
                    handle,
                    program,
                    ..
                } => Some((hook, priority, handle, program)),
                Change::Clsact | Change::Lane => None,
            })
    }

    /// Looks whether everything is still in place. A renamed interface is still the same one.
    pub fn verify(&self) -> Result<Presence, AttachError> {
        let look = || -> Result<Presence, NetlinkError> {
            let Some(link) = netlink::link_by_index(self.link.index)? else {
                return Ok(Presence::InterfaceGone);
            };
            for (hook, priority, handle, program) in self.filters() {
                if !netlink::filters(self.link.index, hook)?
                    .iter()
                    .any(|filter| undo::is_ours(filter, priority, handle, program))
                {
                    return Ok(if link.name == self.link.name {
                        Presence::FilterRemoved { hook }
                    } else {
                        // Another interface that was given the index of ours.
                        Presence::InterfaceGone
                    });
                }
            }
            Ok(Presence::Present)
        };
        match self.link.netns.run(look) {
            Ok(Ok(presence)) => Ok(presence),
            Ok(Err(error)) if error.is_no_device() => Ok(Presence::InterfaceGone),
            Ok(Err(error)) => Err(self.failed(error)),
            Err(error) if error.is_gone() => Ok(Presence::NamespaceGone),
            Err(error) => Err(error.into()),
        }
    }

    /// What stands in front of us, in the order in which it sees packets.
    pub fn ahead(&self) -> Result<Vec<Obstacle>, AttachError> {
        self.link
            .netns
            .run(|| self.look_ahead())?
            .map_err(|error| self.failed(error))
    }

    fn look_ahead(&self) -> Result<Vec<Obstacle>, NetlinkError> {
        let mut found = Vec::new();
        let program = |id: u32| -> Result<String, NetlinkError> {
            let name = netlink::program_by_id(id)?.map(|program| program.name);
            Ok(match name.filter(|name| !name.is_empty()) {
                Some(name) => format!("program id {id} '{name}'"),
                None => format!("program id {id}"),
            })
        };
        for (hook, priority, handle, _) in self.filters() {
            let mut add = |what| found.push(Obstacle { hook, what });
            // XDP sees arriving packets first, then TCX, then clsact (sch_handle_ingress and
            // sch_handle_egress in net/core/dev.c, 6.6 to 6.18).
            if hook == Hook::Ingress
                && let Some(link) = netlink::link_by_index(self.link.index)?
                && let Some(id) = link.xdp_program
            {
                add(format!("XDP {}", program(id)?));
            }
            for id in netlink::tcx_programs(self.link.index, hook)? {
                add(format!("TCX {}", program(id)?));
            }
            for filter in netlink::filters(self.link.index, hook)? {
                // Of several bpf filters with one preference the newest runs first
                // (cls_bpf_change in net/sched/cls_bpf.c, 6.1 to 6.18).
                if filter.chain == 0
                    && (filter.priority < priority
                        || (filter.priority == priority && filter.handle != handle))
                {
                    add(undo::name(&filter));
                }
            }
        }
        Ok(found)
    }

    /// The interface's own counters.
    pub fn link_stats(&self) -> Result<LinkStats, AttachError> {
        match self
            .link
            .netns
            .run(|| netlink::link_by_index(self.link.index))?
        {
            Ok(Some(link)) => Ok(link.stats),
            Ok(None) => Err(AttachError::Gone {
                ifname: self.link.name.clone(),
                ifindex: self.link.index,
                netns: self.link.netns.to_string(),
            }),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Undoes everything exactly. After an error the rest can be tried again, and is in the journal.
    pub fn detach(&mut self) -> Result<Detached, AttachError> {
        let entries: Vec<&Entry> = self.made.iter().rev().map(|(_, entry)| entry).collect();
        if entries.is_empty() {
            return Ok(Detached::default());
        }
        let deletes_clsact = entries
            .iter()
            .any(|entry| matches!(entry.change, Change::Clsact));
        let before = deletes_clsact.then(|| self.link_stats().ok()).flatten();
        let (outcomes, error) = undo::undo(&self.link.netns, &entries);
        let mut detached = Detached::default();
        if let (Some(before), Ok(after)) = (before, self.link_stats()) {
            let dropped = dropped_since(before, after);
            if dropped > 0 {
                detached.notes.push(dropped_text(dropped));
            }
        }
        for outcome in outcomes {
            if let Some((id, _)) = self.made.pop() {
                // If this cannot be written the next recovery finds nothing to do: no harm.
                if let Err(error) = self.journal.done(id) {
                    detached.notes.push(error.to_string());
                }
            }
            match outcome {
                Outcome::Undone(_) => {}
                Outcome::Gone(text) | Outcome::Kept(text) => detached.notes.push(text),
            }
        }
        match error {
            None => Ok(detached),
            Some(UndoError::Netns(error)) => Err(error.into()),
            Some(UndoError::Netlink(error)) => Err(self.failed(error)),
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::error!(
                interface = self.link.name,
                netns = %self.link.netns,
                %error,
                "could not detach; the next start of the daemon will try again"
            );
        }
    }
}
