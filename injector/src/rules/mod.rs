//! The rule language: what a user may write, and what it means.
//!
//! A [`RuleSpec`] is the text form: what a file for `apply` holds and what `list --json` prints.
//! Parsing it ([`RuleSpec::parse`]) gives a [`model::Rule`], which cannot hold a wrong rule;
//! everything below takes nothing else. The way back ([`RuleSpec::from`]) is canonical and loses
//! nothing.

mod canonical;
mod describe;
pub mod error;
pub mod hosts;
pub mod model;
pub mod name;
pub mod numbers;
pub mod shaping;
pub mod spec;
pub mod text;
pub mod trace;
mod validate;

pub use error::{Problem, SpecError, Surface};
pub use name::{MAX_NAME_LENGTH, check_name, generate_name};
pub use spec::{FaultSpec, RuleSpec, TraceSpec};
pub use validate::{draw_seed, is_unconstrained};
