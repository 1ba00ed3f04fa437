//! The interfaces that the daemon is attached to: each from its first rule to its last.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use injector_common::line::PACED_MOST_NS;

use super::{
    host::Host,
    lanes::{Hold, MARGIN},
    lease::nanos,
    plane::{LaneDevices, Plane, TargetConfig, TargetSlot},
    state::State,
};
use crate::{
    attach::{Presence, TargetLink, dropped_text},
    netlink::{Hook, LinkKind},
    netns::{Netns, NetnsId},
    protocol::{ErrorBody, ErrorCode, EventKind},
    rules::{model::NetnsRef, text},
};

/// What makes a target the same one, under whatever names its namespace is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetKey {
    /// The namespace.
    pub netns: NetnsId,
    /// The interface.
    pub ifindex: u32,
}

impl TargetKey {
    /// The key of an interface that was looked up.
    #[must_use]
    pub fn of(link: &TargetLink) -> Self {
        Self {
            netns: link.netns.id,
            ifindex: link.index,
        }
    }
}

/// One target.
pub(super) struct Target<A> {
    /// Its number in the kernel's tables.
    pub(super) slot: TargetSlot,
    /// What it is.
    pub(super) link: TargetLink,
    /// Our presence on it; none after somebody else removed it and putting it back was rolled back.
    pub(super) attachment: Option<A>,
    /// What is wrong with it.
    pub(super) problem: Option<String>,
    /// What a lane may hold of it by rules that have ended.
    pub(super) hold: Option<Hold>,
    /// Packets that its interface had dropped as they arrived when it became a target.
    pub(super) rx_dropped: u64,
}

impl<A> Target<A> {
    /// How it is called in events.
    pub(super) fn label(&self) -> String {
        label(&self.link.netns.reference, &self.link.name)
    }

    /// Whether our filters are on it, as far as is known.
    pub(super) fn is_attached(&self) -> bool {
        self.attachment.is_some() && self.problem.is_none()
    }

    /// For the tables; `lane` is that of its namespace. Packets without an Ethernet header cannot pass one.
    pub(super) fn config(&self, lane: Option<LaneDevices>) -> TargetConfig {
        TargetConfig {
            slot: self.slot,
            link: self.link.kind,
            loopback: self.link.loopback,
            ifindex: self.link.index,
            lane: lane.filter(|_| self.link.kind == LinkKind::Ethernet),
        }
    }
}

/// Something that could not be detached and is tried again.
pub(super) struct Leftover<A> {
    /// Its number, which is not used again meanwhile.
    pub(super) slot: TargetSlot,
    /// How it is called in events.
    pub(super) label: String,
    /// What is still there.
    pub(super) attachment: A,
    /// What went wrong the last time.
    pub(super) error: String,
}

/// A number that is not used again while a lane may hold packets that carry it: the lane's exit would send them out of
/// whatever interface has it then.
pub(super) struct Resting {
    slot: TargetSlot,
    until_ns: u64,
}

/// `iface`, or `netns/iface`.
pub(super) fn label(netns: &NetnsRef, iface: &str) -> String {
    match text::netns::format(netns) {
        Some(netns) => format!("{netns}/{iface}"),
        None => iface.to_owned(),
    }
}

/// Targets that a change was the first to need.
#[derive(Default)]
pub(super) struct Fresh {
    /// Made for it.
    made: Vec<TargetKey>,
    /// Attached again for it, having been lost before, with what was wrong.
    regained: Vec<(TargetKey, String)>,
}

impl<P: Plane, H: Host> State<P, H> {
    /// Attaches to every one of these links that the daemon is not attached to yet. After an error
    /// nothing has changed on the host.
    pub(super) fn attach_all(
        &mut self,
        links: &BTreeMap<TargetKey, TargetLink>,
    ) -> Result<Fresh, ErrorBody> {
        let mut fresh = Fresh::default();
        for (key, link) in links {
            if let Err(error) = self.attach_one(*key, link, &mut fresh) {
                self.take_back(fresh);
                return Err(ErrorBody {
                    message: format!("{}; nothing was changed", error.message),
                    ..error
                });
            }
        }
        Ok(fresh)
    }

    fn attach_one(
        &mut self,
        key: TargetKey,
        link: &TargetLink,
        fresh: &mut Fresh,
    ) -> Result<(), ErrorBody> {
        let (slot, lost) = match self.targets.get_mut(&key) {
            Some(target) if target.is_attached() => return Ok(()),
            Some(target) => {
                if let Some(mut rest) = target.attachment.take()
                    && let Err(error) = self.host.detach(&mut rest)
                {
                    target.attachment = Some(rest);
                    return Err(error);
                }
                (target.slot, target.problem.clone())
            }
            None => (self.free_target_slot()?, None),
        };
        self.plane.clear_target(slot)?;
        let attachment = self.host.attach(
            link,
            self.plane.program(Hook::Egress),
            self.plane.program(Hook::Ingress),
            slot,
        )?;
        if let Some(target) = self.targets.get_mut(&key) {
            target.attachment = Some(attachment);
            target.problem = None;
            fresh.regained.push((key, lost.unwrap_or_default()));
        } else {
            let target = Target {
                rx_dropped: self.host.rx_dropped(link).unwrap_or_default(),
                slot,
                link: link.clone(),
                attachment: Some(attachment),
                problem: None,
                hold: None,
            };
            self.targets.insert(key, target);
            fresh.made.push(key);
        }
        Ok(())
    }

    /// Keeps a target's number from being used again for as long as its lane, if it has one, may hold packets of it:
    /// by the rules that are in force now or were, and by departure times that senders had given them before.
    pub(super) fn rest(&mut self, key: &TargetKey, target: &Target<H::Attachment>) {
        if !self.lanes.contains_key(&key.netns) {
            return;
        }
        let hold = self
            .longest_hold_at(key)
            .saturating_add(Duration::from_nanos(PACED_MOST_NS))
            .saturating_add(MARGIN);
        let until_ns = self
            .plane
            .now_ns()
            .saturating_add(nanos(hold))
            .max(target.hold.map_or(0, |hold| hold.until_ns));
        self.resting.push(Resting {
            slot: target.slot,
            until_ns,
        });
    }

    fn free_target_slot(&mut self) -> Result<TargetSlot, ErrorBody> {
        let now_ns = self.plane.now_ns();
        self.resting.retain(|resting| resting.until_ns > now_ns);
        let used: BTreeSet<TargetSlot> = self
            .targets
            .values()
            .map(|target| target.slot)
            .chain(self.leftovers.iter().map(|leftover| leftover.slot))
            .chain(self.resting.iter().map(|resting| resting.slot))
            .collect();
        let most = self.plane.limits().targets;
        (1..=most)
            .map(TargetSlot)
            .find(|slot| !used.contains(slot))
            .ok_or_else(|| {
                ErrorBody::new(ErrorCode::Limit, format!("all {most} targets are in use"))
                    .with_hint("heal rules elsewhere, or start the daemon with more targets")
            })
    }

    /// Undoes [`State::attach_all`].
    pub(super) fn take_back(&mut self, fresh: Fresh) {
        for key in fresh.made {
            if let Some(mut target) = self.targets.remove(&key)
                && let Some(attachment) = target.attachment.take()
            {
                self.detach(target.slot, target.label(), attachment, false);
            }
        }
        for (key, problem) in fresh.regained {
            if let Some(target) = self.targets.get_mut(&key) {
                let (slot, label) = (target.slot, target.label());
                target.problem = Some(problem);
                if let Some(attachment) = target.attachment.take() {
                    self.detach(slot, label, attachment, false);
                }
            }
        }
    }

    /// Says which targets a change has made, once it is certain.
    pub(super) fn tell_fresh(&mut self, fresh: &Fresh) {
        let keys = fresh
            .made
            .iter()
            .chain(fresh.regained.iter().map(|(key, _)| key));
        for key in keys {
            if let Some(target) = self.targets.get(key) {
                let label = target.label();
                let dropped = target
                    .attachment
                    .as_ref()
                    .map_or(0, |attachment| self.host.dropped(attachment));
                let mut message = format!("attached to {label}");
                if dropped > 0 {
                    message.push_str("; ");
                    message.push_str(&dropped_text(dropped));
                }
                self.events
                    .push(EventKind::TargetAttached, None, Some(&label), message);
            }
        }
    }

    /// Detaches from every target that no active rule needs any more.
    pub(super) fn detach_unused(&mut self) {
        let used: BTreeSet<TargetKey> = self
            .rules
            .iter()
            .filter(|record| record.is_active())
            .flat_map(|record| record.places.iter().map(|place| place.key))
            .chain(
                self.targets
                    .iter()
                    .filter(|(_, target)| target.hold.is_some())
                    .map(|(key, _)| *key),
            )
            .collect();
        let unused: Vec<TargetKey> = self
            .targets
            .keys()
            .filter(|key| !used.contains(key))
            .copied()
            .collect();
        self.remove_unused_lanes();
        for key in unused {
            if let Some(target) = self.targets.remove(&key) {
                self.rest(&key, &target);
                self.let_go(target);
            }
        }
    }

    pub(super) fn let_go(&mut self, target: Target<H::Attachment>) {
        let label = target.label();
        if let Some(attachment) = target.attachment {
            self.detach(target.slot, label, attachment, true);
        }
    }

    /// Detaches, or remembers to try again. `tell`: there was an event when it was attached.
    pub(super) fn detach(
        &mut self,
        slot: TargetSlot,
        label: String,
        mut attachment: H::Attachment,
        tell: bool,
    ) {
        match self.host.detach(&mut attachment) {
            Ok(_) if !tell => {}
            Ok(notes) => {
                let mut message = format!("detached from {label}");
                for note in notes {
                    message.push_str("; ");
                    message.push_str(&note);
                }
                self.events
                    .push(EventKind::TargetDetached, None, Some(&label), message);
            }
            Err(error) => {
                let error = error.to_string();
                self.events.push(
                    EventKind::Problem,
                    None,
                    Some(&label),
                    format!("cannot detach from {label}, will try again: {error}"),
                );
                self.leftovers.push(Leftover {
                    slot,
                    label,
                    attachment,
                    error,
                });
            }
        }
    }

    /// Tries again what could not be detached.
    pub(super) fn retry_leftovers(&mut self) {
        for mut leftover in std::mem::take(&mut self.leftovers) {
            match self.host.detach(&mut leftover.attachment) {
                Ok(_) => self.events.push(
                    EventKind::TargetDetached,
                    None,
                    Some(&leftover.label),
                    format!("detached from {} after all", leftover.label),
                ),
                Err(error) => {
                    leftover.error = error.to_string();
                    self.leftovers.push(leftover);
                }
            }
        }
    }

    /// Looks at every target. Returns those whose interface has gone, with the reason.
    pub(super) fn look_at_targets(&mut self) -> Vec<(TargetKey, String)> {
        let mut gone = Vec::new();
        for (key, target) in &mut self.targets {
            let Some(attachment) = &target.attachment else {
                continue;
            };
            let label = label(&target.link.netns.reference, &target.link.name);
            match self.host.verify(attachment) {
                Ok(Presence::Present) => {}
                Ok(Presence::InterfaceGone) => {
                    gone.push((*key, format!("interface {label} has gone")));
                }
                Ok(Presence::NamespaceGone) => {
                    gone.push((*key, format!("the network namespace of {label} has gone")));
                }
                Ok(Presence::FilterRemoved { hook }) => {
                    if target.problem.is_none() {
                        let hook = hook_name(hook);
                        let problem = format!("somebody else removed our {hook} filter");
                        self.events.push(
                            EventKind::TargetLost,
                            None,
                            Some(&label),
                            format!(
                                "{label}: {problem}; rules do not act there until they are added \
                                 again"
                            ),
                        );
                        target.problem = Some(problem);
                    }
                }
                Err(error) => {
                    tracing::warn!(target = label, "cannot look at {label}: {error}");
                }
            }
        }
        gone
    }

    /// What runs before us on a target.
    pub(super) fn obstacles(&self, key: &TargetKey) -> Vec<String> {
        let Some(attachment) = self
            .targets
            .get(key)
            .and_then(|target| target.attachment.as_ref())
        else {
            return Vec::new();
        };
        match self.host.ahead(attachment) {
            Ok(obstacles) => obstacles
                .into_iter()
                .map(|obstacle| format!("{}: {}", hook_name(obstacle.hook), obstacle.what))
                .collect(),
            Err(error) => vec![format!("cannot tell what runs before us: {error}")],
        }
    }

    /// Pairs of targets that a packet passes both of.
    pub(super) fn double_passes(&self) -> Vec<String> {
        let targets: Vec<(Netns, u32)> = self
            .targets
            .values()
            .map(|target| (target.link.netns.clone(), target.link.index))
            .collect();
        if targets.len() < 2 {
            Vec::new()
        } else {
            self.host.double_pass(&targets)
        }
    }
}

/// A hook in words.
fn hook_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Egress => "egress",
        Hook::Ingress => "ingress",
    }
}
