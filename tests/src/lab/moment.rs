//! Random commands to a daemon, and random moments to kill it at.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{
    injector::{Connection, Injector},
    transcript::Transcript,
    wait::wait_until,
};

/// Where no command has been answered yet: about as long as the first takes.
const FIRST: Duration = Duration::from_millis(50);

/// Commands that are being given over a daemon's socket, one after the other, until it is no more.
#[derive(Debug)]
pub struct Commands {
    answered: Arc<AtomicU32>,
    began: Instant,
    thread: JoinHandle<()>,
}

impl Commands {
    /// Begins. `command` gives a random one; with its first error, which is one of the connection, it ends.
    pub fn give(
        injector: &Injector,
        seed: u64,
        mut command: impl FnMut(&mut Connection, &mut StdRng) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let mut connection = injector.connect()?;
        let transcript = Transcript::current();
        let answered = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&answered);
        let began = Instant::now();
        let thread = thread::spawn(move || {
            transcript.adopt();
            let mut random = StdRng::seed_from_u64(seed);
            while command(&mut connection, &mut random).is_ok() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Ok(Self {
            answered,
            began,
            thread,
        })
    }

    /// Waits for a random moment in the midst of one of the first `among` commands, however long these take on this
    /// machine: fixed times would, on a slow one, all lie before anything has happened.
    pub fn in_the_midst(&self, among: u32, random: &mut impl Rng) -> Result<()> {
        let after = random.random_range(0..among);
        wait_until("commands are answered", Duration::from_mins(1), || {
            Ok(self.answered.load(Ordering::Relaxed) >= after)
        })?;
        let each = if after == 0 {
            FIRST
        } else {
            self.began.elapsed() / after
        };
        thread::sleep(each.mul_f64(random.random()));
        Ok(())
    }

    /// Waits for their end, after that of the daemon; returns how many were answered.
    pub fn end(self) -> Result<u32> {
        self.thread
            .join()
            .map_err(|_| anyhow!("the commanding thread panicked"))?;
        Ok(self.answered.load(Ordering::Relaxed))
    }
}
