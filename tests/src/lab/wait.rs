//! Waiting for a condition with a deadline, never for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};

/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);

/// Looks until `look` gives something, and returns it; fails when `within` is over. An error of `look`
/// does not end the waiting: the last one is part of the failure's text.
pub fn wait_for<T>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        let last = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if began.elapsed() >= within {
            let text = format!("waited {within:?} in vain: {what}");
            return Err(match last {
                Some(error) => error.context(text),
                None => anyhow!(text),
            });
        }
        thread::sleep(POLL);
    }
}

/// Looks until `holds` is true; fails when `within` is over.
pub fn wait_until(
    what: &str,
    within: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    wait_for(what, within, || Ok(holds()?.then_some(())))
}
