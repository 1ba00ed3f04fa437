//! The lane tier: faults of single packets, on a kernel that has fq and VLAN devices. Runs in virtual machines,
//! and on a host whose own kernel has them.
//!
//! Needs root and `INJECTOR_BIN`. The same rules as in the lab tier. Nodes have a clsact beforehand: the kernel
//! drops packets while one is made or deleted, and here each packet is accounted for.
//!
//! `--loss 0.00000002%` is for whatever is to be cut up into wire packets, and to lose none: it is the smallest chance
//! that there is, one in 2^32.

mod accuracy;
mod burst;
mod chance;
mod compose;
mod corrupt;
mod delay;
mod kinds;
mod life;
mod module;
mod mtu;
mod order;
mod queue;
mod queues;
mod rate;
mod reject;
mod smoke;
mod stall;
mod throughput;
mod undo;
mod way_back;
mod wire;

use std::{process::ExitCode, time::Duration};

use libtest_mimic::Arguments;
use tests::lab::{lent, snapshot::Snapshot, sweep::sweep, wait::wait_until};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One after the other: they measure time, on machines that have little of it.
    arguments.test_threads = Some(1);
    let mut trials = Vec::new();
    for tests in [
        smoke::tests,
        module::tests,
        delay::tests,
        accuracy::tests,
        order::tests,
        reject::tests,
        chance::tests,
        corrupt::tests,
        life::tests,
        compose::tests,
        burst::tests,
        queues::tests,
        way_back::tests,
        kinds::tests,
        rate::tests,
        queue::tests,
        stall::tests,
        mtu::tests,
        throughput::tests,
        wire::tests,
        undo::tests,
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
    lent::dismiss();
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
