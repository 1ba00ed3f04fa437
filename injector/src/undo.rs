//! Taking back single changes to an interface, whether they were made by this process or by one that
//! has died.
//!
//! Nothing is taken back that cannot be told to be ours: a namespace is known by its cookie, a filter by
//! the id of its program, an interface by its index and either our filter on it or its name and hardware
//! address.

use crate::{
    journal::{Change, Entry},
    netlink::{self, Filter, Hook, Link, NetlinkError},
    netns::{Netns, NetnsError},
};

/// What became of one change. Each text is a full sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Taken back.
    Undone(String),
    /// It was not there any more.
    Gone(String),
    /// Left in place, since it is not ours alone any more.
    Kept(String),
}

/// Why a change could not be taken back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UndoError {
    /// Its namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// A change in words, to begin a sentence with.
pub(crate) fn describe(entry: &Entry) -> String {
    let what = match &entry.change {
        Change::Lane => "The lane".to_owned(),
        Change::Clsact => "The clsact qdisc".to_owned(),
        Change::Filter { hook, priority, .. } => {
            format!("The {hook} filter with preference {priority}")
        }
    };
    format!(
        "{what} on interface {} ({}) of network namespace {}",
        entry.ifname,
        entry.ifindex,
        Netns::recorded(entry.netns, &entry.netns_path)
    )
}

/// Takes changes to one interface back, in the order given (newest first). Stops at the first that
/// fails: what lies below it may depend on it. The outcomes are those of the changes before that one.
pub(crate) fn undo(netns: &Netns, entries: &[&Entry]) -> (Vec<Outcome>, Option<UndoError>) {
    let mut outcomes = Vec::new();
    let result = netns.run(|| {
        let mut ours = false;
        for entry in entries {
            match undo_one(entry, &mut ours) {
                Ok(outcome) => outcomes.push(outcome),
                // It went while we looked.
                Err(error) if error.is_no_device() => {
                    outcomes.push(gone(entry, "its interface has been deleted"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    });
    match result {
        Ok(Ok(())) => (outcomes, None),
        Ok(Err(error)) => (outcomes, Some(error.into())),
        Err(error) if error.is_gone() => (
            entries
                .iter()
                .map(|entry| gone(entry, "its namespace has been deleted"))
                .collect(),
            None,
        ),
        Err(error) => (outcomes, Some(error.into())),
    }
}

fn gone(entry: &Entry, why: &str) -> Outcome {
    Outcome::Gone(format!("{} has gone: {why}.", describe(entry)))
}

/// Takes one change back. `ours` says whether a filter of ours was met on the interface, which proves
/// that it is the one that the journal means, even if it was renamed.
fn undo_one(entry: &Entry, ours: &mut bool) -> Result<Outcome, NetlinkError> {
    if entry.change == Change::Lane {
        return Ok(if crate::lane::delete(entry, None)? {
            Outcome::Undone(format!("{} was removed.", describe(entry)))
        } else {
            gone(entry, "it is not there any more")
        });
    }
    let Some(link) = netlink::link_by_index(entry.ifindex)? else {
        return Ok(gone(entry, "its interface has been deleted"));
    };
    match &entry.change {
        Change::Filter {
            hook,
            priority,
            handle,
            program,
            ..
        } => {
            if !netlink::filters(entry.ifindex, *hook)?
                .iter()
                .any(|filter| is_ours(filter, *priority, *handle, *program))
            {
                return Ok(gone(entry, "it is not there any more"));
            }
            *ours = true;
            netlink::detach(entry.ifindex, *hook, *priority, *handle)?;
        }
        // Dealt with above: it is known by its name and address.
        Change::Lane => {}
        Change::Clsact => {
            let same = link.name == entry.ifname && mac(&link) == entry.mac;
            if !same && !*ours {
                return Ok(gone(
                    entry,
                    &format!(
                        "interface {} ({}) is another one now and is left alone",
                        link.name, link.index
                    ),
                ));
            }
            if !netlink::has_clsact(entry.ifindex)? {
                return Ok(gone(entry, "it is not there any more"));
            }
            let mut foreign = Vec::new();
            for hook in Hook::BOTH {
                for filter in netlink::filters(entry.ifindex, hook)? {
                    foreign.push(format!("{hook} {}", name(&filter)));
                }
                if foreign.is_empty() {
                    for chain in netlink::chains(entry.ifindex, hook)? {
                        foreign.push(format!("{hook} chain {chain}"));
                    }
                }
            }
            if !foreign.is_empty() {
                return Ok(Outcome::Kept(format!(
                    "{} was left in place: others use it ({}).",
                    describe(entry),
                    foreign.join(", ")
                )));
            }
            netlink::delete_clsact(entry.ifindex)?;
        }
    }
    Ok(Outcome::Undone(format!("{} was removed.", describe(entry))))
}

/// Whether a filter is the one that was attached with these numbers.
pub(crate) fn is_ours(filter: &Filter, priority: u16, handle: u32, program: u32) -> bool {
    (filter.chain, filter.priority, filter.handle) == (0, priority, handle)
        && filter.bpf.as_ref().is_some_and(|bpf| bpf.id == program)
}

/// A hardware address as the journal has it.
pub(crate) fn mac(link: &Link) -> String {
    netlink::hexadecimal(&link.mac)
}

/// A filter in words.
pub(crate) fn name(filter: &Filter) -> String {
    let chain = match filter.chain {
        0 => String::new(),
        chain => format!(" chain {chain}"),
    };
    let bpf = filter
        .bpf
        .as_ref()
        .map_or_else(String::new, |bpf| format!(" '{}'", bpf.name));
    format!(
        "filter pref {}{chain} {}{bpf}",
        filter.priority, filter.kind
    )
}
