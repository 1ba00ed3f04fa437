//! An independent, straightforward statement of what the injector decides.
//!
//! It shares the rule types with the injector and nothing else: its parser, its matching, its flow
//! identity and its hash key are written from the documented semantics, in the most obvious way
//! (a linear scan over the rules, a hash map per kind of state), so that a mistake in the fast code
//! is unlikely to be here too. Speed does not matter here.
//!
//! Where the documented semantics leave a choice, the place that makes it says so with the word
//! "Choice".

mod answering;
mod compare;
pub mod datagram;
mod decide;
mod flow;
pub mod line;
mod matching;
mod packet;
mod parse;
mod setup;

pub use compare::{Comparison, Difference, Outcome, Phase, Scenario, Subject, compare, minimise};
pub use decide::{Decision, Model, RuleOutcome, TargetOutcome};
pub use flow::{FlowKey, share_draw};
pub use packet::{Hook, Link, Packet};
pub use parse::{Fragment, Parsed, Transport, Unparsed, parse};
pub use setup::{Exemption, InForce, Setup, Target, describe_rule};

#[cfg(test)]
mod tests;
