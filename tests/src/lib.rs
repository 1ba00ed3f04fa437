//! Machinery that the end-to-end tests share.

pub mod generate;
pub mod lab;
pub mod model;
pub mod subject;
pub mod table;

/// How many times as much a test does that is worth repeating: 10 where `INJECTOR_FULL` is set
/// (`cargo xtask test --full`), else 1.
#[must_use]
pub fn thoroughness() -> u32 {
    if std::env::var_os("INJECTOR_FULL").is_some() {
        10
    } else {
        1
    }
}
