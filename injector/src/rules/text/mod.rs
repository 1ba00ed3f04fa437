//! One file per kind of text in a rule, each with the way in (parse) and the way out (format), so
//! that the two are seen side by side.

pub mod address;
pub mod distribution;
pub mod dscp;
pub mod duration;
pub mod flap;
pub mod icmp;
pub mod mark;
pub mod netns;
pub mod number;
pub mod protocol;
pub mod range;
pub mod rate;
pub mod share;
pub mod size;
pub mod tcp_flags;

use super::error::Problem;

/// The entries of a list, in which one text may hold several entries separated by commas.
pub(super) fn entries(list: &[String]) -> impl Iterator<Item = Result<&str, Problem>> {
    list.iter()
        .flat_map(|text| text.split(','))
        .map(|entry| match entry.trim() {
            "" => Err(Problem::new(
                "has an empty entry",
                "entries separated by single commas, none of them empty",
            )),
            entry => Ok(entry),
        })
}
