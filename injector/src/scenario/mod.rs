//! Scenarios: faults over time and what must stay true, as a file that is played, judged and reported.
//!
//! The way of a file: [`file`] reads it; [`plan`] turns it into a tree of steps in which nothing is left to chance
//! (loops unrolled, choices drawn from the seed, partitions computed, ready vocabulary spelt out); [`play`] carries
//! the tree out and writes down what happens, as [`record`]s; [`verdict`] judges the records, and [`report`] shows
//! them. Everything but `play` is a pure function of its input.

pub mod draw;
pub mod file;
pub mod names;
pub mod nemesis;
pub mod plan;
pub mod play;
pub mod record;
pub mod report;
pub mod shape;
pub mod verdict;
pub mod vocabulary;
