//! A daemon that serves one test after the other. Where the machine is emulated the verifier alone takes seconds of
//! each daemon's start, and what a daemon keeps of earlier rules must make no difference to later ones anyway.

use std::{
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    injector::{Injector, Stats},
    transcript::{note, report},
};

/// The one that no test has at the moment.
static IDLE: Mutex<Option<Arc<Injector>>> = Mutex::new(None);

/// How long held packets may take to leave their lane: to wait longer would take as long as a new daemon.
const LEAVING: Duration = Duration::from_secs(4);

/// An injector with a daemon of default settings and without rules. When the test is done with it, it goes to the next
/// one, if it is as good as new; otherwise it ends.
#[derive(Debug)]
pub struct Lent {
    injector: Arc<Injector>,
    /// The last event of earlier tests.
    earlier: Value,
}

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
        let events = injector.connect()?.call("events", &json!({}))?;
        Ok(Self {
            injector,
            earlier: events["last"].clone(),
        })
    }

    /// What events say of flushes of a rule of this name that are over, at the socket.
    pub fn flushed(&self, rule: &str) -> Result<Vec<String>> {
        Ok(self
            .events("flushed")?
            .into_iter()
            .filter(|event| event["rule"] == rule)
            .filter_map(|event| event["message"].as_str().map(str::to_owned))
            .collect())
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

    /// Heals one rule and drops what it holds, at the socket; what became of it so far.
    pub fn heal_flush(&self, name: &str) -> Result<Value> {
        self.connect()?
            .call("heal", &json!({"names": [name], "flush": true}))
    }

    /// Heals everything; fails if anything is left of it, was lost in lanes, or went wrong.
    fn return_as_new(&self) -> Result<()> {
        self.heal_all()?;
        // Lanes go when they are empty, and what they lost goes with them.
        let began = Instant::now();
        loop {
            let left = self.stats()?;
            left.lanes_lost_nothing()?;
            ensure!(left.lapses == 0, "its lease has lapsed: {left:?}");
            if left.targets.is_empty() && left.lanes.is_empty() && left.flushes.is_empty() {
                break;
            }
            ensure!(began.elapsed() < LEAVING, "something is left: {left:?}");
            thread::sleep(Duration::from_millis(20));
        }
        let healed = self.heal_all()?;
        ensure!(
            healed["host_restored"] == json!(true),
            "the host is not as it was: {healed}"
        );
        let problems = self.events("problem")?;
        ensure!(problems.is_empty(), "it had problems: {problems:?}");
        Ok(())
    }

    /// The events of a kind since this test has the daemon.
    fn events(&self, kind: &str) -> Result<Vec<Value>> {
        let since = json!({"after": self.earlier});
        let answer = self.connect()?.call("events", &since)?;
        let events = answer["events"].as_array().context("no list of events")?;
        Ok(events
            .iter()
            .filter(|event| event["kind"] == kind)
            .cloned()
            .collect())
    }
}

impl Deref for Lent {
    type Target = Injector;

    fn deref(&self) -> &Injector {
        &self.injector
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        match self.return_as_new() {
            Ok(()) => {
                note(self.injector.daemon_log());
                *IDLE.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(Arc::clone(&self.injector));
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
