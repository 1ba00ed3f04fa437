//! Program tier: the loaded program under `BPF_PROG_TEST_RUN`, the same decision computed in user
//! space by the shared code, and the independent model: hand-written cases for each of them, random
//! scenarios for all of them side by side, and proofs that the comparison notices wrong deciders.
//!
//! `INJECTOR_PROGRAM_SEED` and `INJECTOR_PROGRAM_SCENARIOS` choose other random scenarios and more of
//! them.

#[expect(
    clippy::unwrap_used,
    reason = "what is written down by hand is right or the test is wrong"
)]
mod cases;
mod random;
mod subjects;
mod tables;
mod wrong;

use libtest_mimic::Arguments;

fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = cases::trials();
    trials.extend(wrong::trials());
    trials.extend(random::trials());
    trials.extend(tables::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}
