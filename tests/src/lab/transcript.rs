//! What a test did and saw, kept per test and printed when it fails.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// The notes of one test. Clones share them.
#[derive(Clone)]
pub struct Transcript {
    name: Arc<str>,
    began: Instant,
    lines: Arc<Mutex<Vec<String>>>,
}

/// No note is longer than this; the middle of a longer one is left out.
const MAX_NOTE: usize = 6_000;

thread_local! {
    static CURRENT: RefCell<Transcript> = RefCell::new(Transcript::new("setup"));
}

impl Transcript {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            began: Instant::now(),
            lines: Arc::default(),
        }
    }

    /// Starts the transcript of test `name` on this thread.
    #[must_use]
    pub fn begin(name: &str) -> Self {
        let transcript = Self::new(name);
        transcript.adopt();
        transcript
    }

    /// The transcript of this thread.
    #[must_use]
    pub fn current() -> Self {
        CURRENT.with_borrow(Clone::clone)
    }

    /// Makes notes of this thread go to this transcript.
    pub fn adopt(&self) {
        CURRENT.set(self.clone());
    }

    /// Adds a line.
    pub fn note(&self, text: &str) {
        let mut text = text.to_owned();
        if text.len() > MAX_NOTE {
            let head = text.floor_char_boundary(MAX_NOTE / 2);
            let tail = text.ceil_char_boundary(text.len() - MAX_NOTE / 2);
            text = format!(
                "{}\n… {} bytes left out …\n{}",
                &text[..head],
                tail - head,
                &text[tail..]
            );
        }
        let line = format!("{:8.3}s {text}", self.began.elapsed().as_secs_f64());
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }

    /// All notes so far, one below the other.
    #[must_use]
    pub fn text(&self) -> String {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }

    /// Seconds since the test began.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}

/// Adds a line to the transcript of the running test.
pub fn note(text: impl AsRef<str>) {
    Transcript::current().note(text.as_ref());
}

/// Adds a line and prints it too: a finding that is worth reading when all is well.
pub fn report(text: impl AsRef<str>) {
    let transcript = Transcript::current();
    transcript.note(text.as_ref());
    eprintln!("    {}: {}", transcript.name, text.as_ref());
}
