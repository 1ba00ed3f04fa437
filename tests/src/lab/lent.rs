//! A daemon that serves one test after the other. Where the machine is emulated the verifier alone takes seconds of
//! each daemon's start, and what a daemon keeps of earlier rules must make no difference to later ones anyway.

use std::{
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    injector::{Injector, Stats},
    transcript::{note, report},
    wait::wait_to_end,
};

/// The one that no test has at the moment.
static IDLE: Mutex<Option<Arc<Injector>>> = Mutex::new(None);

/// An injector with a daemon of default settings and without rules. When the test is done with it, it goes to the next
/// one, if it is as good as new; otherwise it ends.
#[derive(Debug)]
pub struct Lent(Arc<Injector>);

impl Lent {
    /// The one that an earlier test has left, or a new one.
    pub fn new() -> Result<Self> {
        let idle = take();
        let injector = match idle {
            Some(injector) => {
                note(format!(
                    "the daemon of earlier tests at {}",
                    injector.state_dir().display()
                ));
                injector
            }
            None => Arc::new(Injector::started(&[])?),
        };
        Ok(Self(injector))
    }

    /// `stats`, asked for at the socket: in emulation each start of the command takes half a second.
    pub fn stats(&self) -> Result<Stats> {
        let answer = self.connect()?.call("stats", &json!({}))?;
        serde_json::from_value(answer).context("reading stats")
    }

    /// Heals all rules, at the socket.
    pub fn heal_all(&self) -> Result<Value> {
        self.connect()?.call("heal", &json!({"all": true}))
    }

    /// Heals one rule, at the socket.
    pub fn heal(&self, name: &str) -> Result<()> {
        let healed = self.connect()?.call("heal", &json!({"names": [name]}))?;
        note(format!("healed {name}: {healed}"));
        Ok(())
    }
}

impl Deref for Lent {
    type Target = Injector;

    fn deref(&self) -> &Injector {
        &self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        match as_good_as_new(&self.0) {
            Ok(()) => {
                note(self.0.daemon_log());
                *IDLE.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&self.0));
            }
            // Not only noted: where this becomes usual, a new daemon for each test takes most of the tests' time.
            Err(error) => report(format!("the daemon serves no further test: {error:#}")),
        }
    }
}

/// Ends the daemon that waits for a next test.
pub fn dismiss() {
    drop(take());
}

fn take() -> Option<Arc<Injector>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// How long held packets may take to leave their lane: to wait longer would take as long as a new daemon.
const LEAVING: Duration = Duration::from_secs(4);

/// Heals everything; fails if anything is left of it, or was lost in lanes.
fn as_good_as_new(injector: &Injector) -> Result<()> {
    let mut connection = injector.connect()?;
    let mut stats = None;
    // Lanes go when they are empty. What a rule holds that is still there need not be waited for.
    wait_to_end("nothing is left", LEAVING, || {
        let healed = connection.call("heal", &json!({"all": true, "flush": true}))?;
        let left: Stats = serde_json::from_value(connection.call("stats", &json!({}))?)
            .context("reading stats")?;
        let gone = left.lanes.is_empty() && left.flushes.is_empty();
        stats = Some(left);
        Ok(gone && healed["host_restored"] == json!(true))
    })
    .with_context(|| format!("{stats:?}"))?;
    let stats = stats.context("nobody has looked")?;
    ensure!(stats.lapses == 0, "its lease has lapsed: {stats:?}");
    stats.lanes_lost_nothing()
}
