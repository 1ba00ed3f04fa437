//! Shapes of partitions, after Jepsen: which hosts are cut from which, as a pure function of hosts, shape and seed, so
//! that all hosts that play the same file compute the same partition without a coordinator.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::file::CommandLine;

/// Hosts are cut from each other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Partition {
    /// How.
    pub shape: Shape,
    /// Among these hosts, whose order matters to some shapes; all, in the order of their names, where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
    /// Of `isolate`, the host that is alone; of `bridge`, the one that sees both sides; of `partial`, the two that do
    /// not see each other (separated by a comma).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    /// Of `sides`: the groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sides: Option<Vec<Vec<String>>>,
    /// Only one direction is cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_way: Option<OneWay>,
}

/// The shape of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// The first half of the hosts and the rest.
    #[default]
    Halves,
    /// The same, of hosts in a random order.
    RandomHalves,
    /// A random majority, as small as it can be, and the rest.
    MajorityMinority,
    /// One host alone (`who`; a random one where absent).
    Isolate,
    /// Two halves, and one host (`who`; a random one where absent) that sees both.
    Bridge,
    /// Every host sees a majority, and no two hosts see the same one.
    MajoritiesRing,
    /// Each host of a random minority (`primaries` of `nemesis`) alone, the others together.
    Primaries,
    /// Two hosts (`who`; two random ones where absent) do not see each other; everybody else sees both.
    Partial,
    /// The groups given by `sides`.
    Sides,
}

/// Which host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Who {
    /// The host of this name; `random`: drawn from the seed.
    Host(String),
    /// The one whose name or address the command prints, such as the current leader.
    Asked {
        /// The command.
        command: CommandLine,
        /// The node of a lab in which it is run.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        on: Option<String>,
    },
}

/// Which direction is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OneWay {
    /// From the first side (the isolated host, the minority) to the others: they do not hear it, it hears them.
    Out,
    /// From the others to the first side: it does not hear them, they hear it.
    In,
}

/// What a partition comes to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Cut {
    /// Nothing gets from the first host to the second.
    pub links: BTreeSet<(String, String)>,
    /// The partition in words: `n1 | n2 n3`.
    pub words: String,
}
