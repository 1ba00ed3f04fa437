//! Writing down what happens: in memory for the verdict and the reports, as lines of JSON in the run's log, and to
//! whoever watches.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use jiff::Timestamp;

use crate::scenario::record::{Event, Record};

/// Gets every record as it is written.
pub type Watcher = Box<dyn Fn(&Record) + Send + Sync>;

/// The run's log.
pub struct Recorder {
    start: Instant,
    watcher: Watcher,
    inner: Mutex<Inner>,
}

struct Inner {
    records: Vec<Record>,
    file: File,
    /// The first line that could not be written; the run goes on, and says so at its end.
    problem: Option<io::Error>,
}

impl Recorder {
    /// A log in a new file; time counts from now.
    pub fn create(path: &Path, watcher: Watcher) -> io::Result<Self> {
        Ok(Self {
            start: Instant::now(),
            watcher,
            inner: Mutex::new(Inner {
                records: Vec::new(),
                file: File::create(path)?,
                problem: None,
            }),
        })
    }

    /// Seconds since the run began.
    #[must_use]
    pub fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Seconds since the run began, of an instant.
    #[must_use]
    pub fn at(&self, instant: Instant) -> f64 {
        instant.saturating_duration_since(self.start).as_secs_f64()
    }

    /// Writes down what has just happened.
    pub fn write(&self, event: Event) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken under the lock: records are in the order of their times.
        let record = Record {
            t: self.now(),
            at: Timestamp::now(),
            event,
        };
        let written = serde_json::to_vec(&record)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                inner.file.write_all(&line)
            });
        if let Err(error) = written {
            inner.problem.get_or_insert(error);
        }
        (self.watcher)(&record);
        inner.records.push(record);
    }

    /// All records so far.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.records.clone()
    }

    /// Why the log is not complete, if it is not.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.problem.as_ref().map(ToString::to_string)
    }
}
