//! Who is compared with the model.

use tests::{
    model::{Model, Subject},
    subject::{Kernel, Shared},
};

/// Makes a subject.
pub(crate) type Make = fn() -> anyhow::Result<Box<dyn Subject>>;

/// A subject, and what keeps it from running here.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// Name in the names of tests.
    pub(crate) name: &'static str,
    /// Makes it.
    pub(crate) make: Make,
    /// Takes only what `BPF_PROG_TEST_RUN` takes.
    pub(crate) needs_test_run: bool,
    /// The reason why it cannot run on this machine, if there is one.
    pub(crate) missing: fn() -> Option<String>,
}

/// The model itself, which is held to the hand-written cases like everyone else.
pub(crate) const MODEL: Entry = Entry {
    name: "model",
    make: || Ok(Box::new(Model::default())),
    needs_test_run: false,
    missing: || None,
};

/// Everything that is compared with the model.
pub(crate) const OTHERS: &[Entry] = &[
    Entry {
        name: "shared",
        make: || Ok(Box::new(Shared::default())),
        needs_test_run: false,
        missing: || None,
    },
    Entry {
        name: "kernel",
        make: || Ok(Box::new(Kernel::new()?)),
        needs_test_run: true,
        missing: Kernel::missing,
    },
];
