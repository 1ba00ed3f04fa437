//! Waiting for a condition with a deadline, never for a time.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail};

/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);

/// Whether nobody wants to wait any longer.
static GIVEN_UP: AtomicBool = AtomicBool::new(false);

/// Ends all waiting, now and later, but for cleaning up. May be called from a signal handler.
pub fn give_up() {
    GIVEN_UP.store(true, Ordering::Relaxed);
}

/// Whether [`give_up`] was called.
#[must_use]
pub fn given_up() -> bool {
    GIVEN_UP.load(Ordering::Relaxed)
}

/// Looks until `look` gives something, and returns it; fails when `within` is over. An error of `look`
/// does not end the waiting: the last one is part of the failure's text.
pub fn wait_for<T>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    poll(what, within, || {
        if given_up() {
            bail!(Interrupted);
        }
        look()
    })
}

/// Why waiting ended early.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

fn poll<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let began = Instant::now();
    loop {
        let last = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) if error.is::<Interrupted>() => return Err(error.context(what.to_owned())),
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

/// The same for cleaning up, which goes on where other waiting has been given up.
pub fn wait_to_end(
    what: &str,
    within: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    poll(what, within, || Ok(holds()?.then_some(())))
}
