//! Address sets of many rules, resolved into one trie of classes.
//!
//! Every prefix that any rule names gets the class of the conditions that hold for the addresses it covers:
//! its own, and those of all prefixes around it. A longest-prefix look-up then needs no second step.

use std::collections::HashMap;

use injector_common::layout::family;
use ipnet::IpNet;

use super::image::PrefixOf;
use crate::rules::model::AddrSet;

/// A condition of one rule (or exemption) on one role.
#[derive(Debug, Clone)]
pub(super) struct Condition<'a> {
    pub(super) slot: u32,
    pub(super) role: usize,
    pub(super) set: &'a AddrSet,
}

/// What is known of a condition at a place in the trie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Mark {
    condition: u32,
    included: bool,
    excepted: bool,
}

/// Number of a state: a list of marks, by condition.
pub(super) type StateId = usize;

/// The trie's prefixes, each with the state that holds there.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) prefixes: Vec<(PrefixOf, StateId)>,
    states: Vec<Vec<Mark>>,
}

impl Resolved {
    /// Which conditions hold in a state, of those that are mentioned in it.
    pub(super) fn marks<'a>(
        &'a self,
        state: StateId,
        conditions: &'a [Condition<'a>],
    ) -> impl Iterator<Item = (usize, bool)> + 'a {
        self.states[state].iter().map(|mark| {
            let index = mark.condition as usize;
            let included = mark.included || conditions[index].set.include.is_empty();
            (index, included && !mark.excepted)
        })
    }
}

/// The state in which no prefix has been named.
pub(super) const ROOT: StateId = 0;

/// A prefix as the trie has it.
pub(super) fn prefix_of(net: &IpNet) -> PrefixOf {
    match net {
        IpNet::V4(net) => PrefixOf {
            family: family::V4,
            address: u128::from(u32::from(net.network())) << 96,
            length: net.prefix_len(),
        },
        IpNet::V6(net) => PrefixOf {
            family: family::V6,
            address: u128::from(net.network()),
            length: net.prefix_len(),
        },
    }
}

fn covers(outer: &PrefixOf, inner: &PrefixOf) -> bool {
    outer.family == inner.family
        && outer.length <= inner.length
        && (outer.length == 0
            || (outer.address ^ inner.address) >> (128 - u32::from(outer.length)) == 0)
}

/// Resolves the conditions' sets.
pub(super) fn resolve(conditions: &[Condition<'_>]) -> Resolved {
    let mut named: Vec<(PrefixOf, Mark)> = Vec::new();
    for (condition, of) in (0_u32..).zip(conditions) {
        let mark = |included: bool| Mark {
            condition,
            included,
            excepted: !included,
        };
        named.extend(
            of.set
                .include
                .iter()
                .map(|net| (prefix_of(net), mark(true))),
        );
        named.extend(
            of.set
                .except
                .iter()
                .map(|net| (prefix_of(net), mark(false))),
        );
    }
    // An outer prefix sorts before those that it covers.
    named.sort_unstable_by_key(|(prefix, mark)| (*prefix, mark.condition));

    let mut states: Vec<Vec<Mark>> = vec![Vec::new()];
    let mut known: HashMap<Vec<Mark>, StateId> = HashMap::from([(Vec::new(), ROOT)]);
    // The same step from the same state leads to the same state: with 10,000 peers in one set there are
    // 10,000 prefixes, but one step.
    let mut steps: HashMap<(StateId, Vec<Mark>), StateId> = HashMap::new();
    let mut around: Vec<(PrefixOf, StateId)> = Vec::new();
    let mut prefixes = Vec::new();
    for group in named.chunk_by(|a, b| a.0 == b.0) {
        let prefix = group[0].0;
        while around
            .last()
            .is_some_and(|(outer, _)| !covers(outer, &prefix))
        {
            around.pop();
        }
        let outer = around.last().map_or(ROOT, |(_, state)| *state);
        let step: Vec<Mark> = group.iter().map(|(_, mark)| *mark).collect();
        let state = *steps
            .entry((outer, step))
            .or_insert_with_key(|(outer, step)| {
                let marks = merge(&states[*outer], step);
                *known.entry(marks).or_insert_with_key(|marks| {
                    states.push(marks.clone());
                    states.len() - 1
                })
            });
        around.push((prefix, state));
        prefixes.push((prefix, state));
    }
    Resolved { prefixes, states }
}

/// Adds marks to a state; both are sorted by condition.
fn merge(state: &[Mark], step: &[Mark]) -> Vec<Mark> {
    let mut merged = state.to_vec();
    for mark in step {
        match merged.binary_search_by_key(&mark.condition, |mark| mark.condition) {
            Ok(at) => {
                merged[at].included |= mark.included;
                merged[at].excepted |= mark.excepted;
            }
            Err(at) => merged.insert(at, *mark),
        }
    }
    merged
}
