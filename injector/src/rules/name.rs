//! Names of rules: what is allowed, and how one is made from a rule's content.
//!
//! A name enters the random stream of its rule, so a generated one must be the same whenever the
//! rule is the same: it is a hash of everything except the name and the seed.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

use super::{
    error::Problem,
    model::{Fault, Rule},
    spec::RuleSpec,
};

/// At most so many characters in a name.
pub const MAX_NAME_LENGTH: usize = 64;

/// Checks a name (of a rule or a group).
pub fn check_name(name: &str) -> Result<(), Problem> {
    const HELP: &str = "1 to 64 letters, digits, '.', '_', ':' and '-', not beginning with '-'";
    if name.is_empty() {
        return Err(Problem::new("is empty", HELP));
    }
    if name.len() > MAX_NAME_LENGTH {
        return Err(Problem::new(format!("is {} bytes long", name.len()), HELP));
    }
    if name.starts_with('-') {
        return Err(Problem::new("begins with '-'", HELP));
    }
    match name
        .chars()
        .find(|&c| !c.is_ascii_alphanumeric() && !".:_-".contains(c))
    {
        Some(wrong) => Err(Problem::new(format!("contains {wrong:?}"), HELP)),
        None => Ok(()),
    }
}

/// The name that a rule gets when none is given: its fault and eight hexadecimal digits of the
/// SipHash-2-4 (key zero) of its canonical text form without name and seed. The order in which
/// interfaces were given does not enter.
#[must_use]
pub fn generate_name(rule: &Rule) -> String {
    let mut spec = RuleSpec::from(rule);
    spec.name = None;
    spec.seed = None;
    spec.iface.sort_unstable();
    // Texts, numbers and booleans only: serialising them does not fail.
    let text = serde_json::to_vec(&spec).unwrap_or_default();
    let mut hasher = SipHasher24::new();
    hasher.write(&text);
    let hash = hasher.finish() >> 32;
    let kind = match rule.fault {
        Fault::Cut => "cut",
        Fault::DropNth(_) => "drop-nth",
        Fault::DropFirst(_) => "drop-first",
        Fault::DropEvery(_) => "drop-every",
        Fault::DropPattern { .. } => "drop-pattern",
        Fault::DropOnce => "drop-once",
        Fault::Reject(_) => "reject",
        Fault::None if rule.shaping.delay.is_some() => "delay",
        Fault::None if rule.shaping.rate.is_some() => "rate",
        Fault::None if rule.shaping.stall.is_some() => "stall",
        Fault::None if rule.shaping.mtu_blackhole.is_some() => "mtu-blackhole",
        Fault::None if rule.shaping.loss.is_some() => "loss",
        Fault::None if rule.shaping.corrupt.is_some() => "corrupt",
        Fault::None if rule.shaping.duplicate.is_some() => "duplicate",
        Fault::None => "reorder",
    };
    format!("{kind}-{hash:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "web-1", "A.b_c:d", "9", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a b", "ä", "a/b", &"x".repeat(65), "a\n"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
