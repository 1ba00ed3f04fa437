//! The nemesis: a random sequence of faults, drawn from the seed out of a weighted set.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A random sequence of faults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nemesis {}
