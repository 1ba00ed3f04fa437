//! The lab tier: the real injector and real services in network namespaces of the tests' own making.
//!
//! Needs root, `INJECTOR_BIN` (the binary under test) and `INJECTOR_SERVICES` (etcd and Redis, unpacked).
//! What is skipped is counted, and written with its reason to the file that `INJECTOR_SKIPS` names.
//! Tests run side by side, each in a lab of its own; when all are done the host must be as it was.

mod bad_input;
mod crash;
mod etcd;
mod exec;
mod host;
mod isolation;
mod lanes;
mod machinery;
mod mtu;
mod positions;
mod redis;
mod reject;
mod scenario;
mod scenario_hosts;
mod selectors;
mod share;
mod silence;
mod targets;
mod time;
mod undo;

use std::{process::ExitCode, time::Duration};

use libtest_mimic::Arguments;
use tests::lab::{snapshot::Snapshot, sweep::sweep, wait::wait_until};

/// So many tests at once: nearly all of them wait most of the time.
const THREADS: usize = 6;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    // The slowest first, so that none is alone at the end.
    let mut trials = Vec::new();
    for tests in [
        scenario::tests,
        scenario_hosts::tests,
        crash::tests,
        etcd::tests,
        redis::tests,
        time::tests,
        undo::tests,
        host::tests,
        selectors::tests,
        silence::tests,
        reject::tests,
        share::tests,
        positions::tests,
        isolation::tests,
        lanes::tests,
        targets::tests,
        exec::tests,
        bad_input::tests,
        machinery::tests,
        mtu::tests,
    ] {
        trials.extend(tests());
    }
    if arguments.list || !nix::unistd::geteuid().is_root() {
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    if let Err(error) = sweep() {
        eprintln!("could not remove what a killed run left behind: {error:#}");
        return ExitCode::FAILURE;
    }
    let before = match Snapshot::of_host() {
        Ok(before) => before,
        Err(error) => {
            eprintln!("could not look at the host: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let conclusion = libtest_mimic::run(&arguments, trials);
    etcd::finish();
    // Namespaces go some time after their names.
    let unchanged = wait_until("the host is as it was", Duration::from_secs(10), || {
        before.must_equal(&Snapshot::of_host()?).map(|()| true)
    });
    if let Err(error) = unchanged {
        eprintln!("error: the tests left something behind: {error:?}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}
