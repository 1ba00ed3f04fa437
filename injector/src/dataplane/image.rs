//! A rule set as the tables hold it, in ordinary memory.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use injector_common::layout::{
    Bitmap, Class, Distribution, PORT_CLASSES, PROTOCOL_CLASSES, RuleEntry, Shape,
};

use super::{traces::Traces, values::TargetSlot};

/// A prefix of the trie: family ([`injector_common::layout::family`]), address (IPv4 in the upper 32 bits)
/// and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixOf {
    /// Family.
    pub family: u32,
    /// Address, most significant bit first; IPv4 in the upper 32 bits.
    pub address: u128,
    /// Significant bits.
    pub length: u8,
}

/// What a rule set means to a target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TargetImage {
    /// By direction: index of the bitmap of its rules.
    pub bitmap: [u32; 2],
    /// Whether connections are tracked.
    pub track: bool,
}

/// One copy of the tables.
#[derive(Debug, Clone)]
pub struct Image {
    /// By target.
    pub targets: BTreeMap<TargetSlot, TargetImage>,
    /// Index of a bitmap by protocol class.
    pub protocols: Vec<u32>,
    /// Classes of ports.
    pub ports: Vec<Class>,
    /// Classes of addresses.
    pub prefixes: HashMap<PrefixOf, Class>,
    /// Bitmaps by index.
    pub bitmaps: BTreeMap<u32, Bitmap>,
    /// Rules by slot of the tables (exemptions come first there).
    pub rules: BTreeMap<u32, RuleEntry>,
    /// What rules do in lanes, by the same slots.
    pub shapes: BTreeMap<u32, Shape>,
    /// Different distributions that rules have brought along.
    pub given: Vec<Arc<Distribution>>,
    /// By the slots of rules with one of them: its place in `given`.
    pub given_of: BTreeMap<u32, usize>,
    /// Traces of the rules' rates.
    pub traces: Traces,
}

impl Image {
    /// Remembers the distribution that the rule in a slot has brought along.
    pub(super) fn give(&mut self, slot: u32, table: Arc<Distribution>) {
        let known = self.given.iter().position(|there| *there == table);
        let place = known.unwrap_or_else(|| {
            self.given.push(table);
            self.given.len() - 1
        });
        self.given_of.insert(slot, place);
    }
}

impl Default for Image {
    fn default() -> Self {
        Self {
            targets: BTreeMap::new(),
            protocols: vec![0; PROTOCOL_CLASSES as usize],
            ports: vec![Class::default(); PORT_CLASSES as usize],
            prefixes: HashMap::new(),
            bitmaps: BTreeMap::new(),
            rules: BTreeMap::new(),
            shapes: BTreeMap::new(),
            given: Vec::new(),
            given_of: BTreeMap::new(),
            traces: Traces::new(),
        }
    }
}
