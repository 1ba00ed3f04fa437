//! Ready vocabulary: system models, host models and link profiles by name, each spelt out as ordinary steps.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A model or profile by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Profile {}
