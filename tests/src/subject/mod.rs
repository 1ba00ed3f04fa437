//! What is compared with the model: the loaded program, and the shared code in user space.

mod kernel;
pub mod many;
pub mod meter;
mod placing;
mod shared;
mod test_run;

pub use kernel::{Kernel, TEST_SIZES};
pub use shared::Shared;
pub use test_run::{Context, Dispatcher, TestRunError, Verdict};
