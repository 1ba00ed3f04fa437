//! What is left of flows and rules when idle state has been collected.

use std::time::Duration;

use injector::rules::model::{Fault, Selector};
use libtest_mimic::Trial;
use tests::{
    model::{Packet, Subject as _},
    subject::Kernel,
};

use super::{of_kernel, out, rule, setup, udp, v4};

pub(super) fn trial() -> Trial {
    of_kernel("kernel::idle_state_is_collected", collected)
}

fn collected(kernel: &mut Kernel) -> anyhow::Result<()> {
    let packet = out(v4(udp(1, 2)));
    // A flow that was forgotten counts from 1 again; a shot that was fired stays fired.
    for (fault, fates) in [
        (Fault::DropNth(1), [true, true]),
        (Fault::DropOnce, [true, false]),
    ] {
        kernel.install(&setup(vec![rule(fault.clone(), Selector::default())]))?;
        for (round, cut) in fates.into_iter().enumerate() {
            expect(kernel, &packet, cut, &format!("{fault:?}, round {round}"))?;
            expect(kernel, &packet, false, &format!("{fault:?}, round {round}"))?;
            let states = kernel.collect(Duration::ZERO)?.idle_states;
            anyhow::ensure!(states == 1, "{fault:?}: {states} states were idle");
        }
    }
    Ok(())
}

fn expect(kernel: &mut Kernel, packet: &Packet, cut: bool, what: &str) -> anyhow::Result<()> {
    let outcome = kernel.decide(packet)?;
    anyhow::ensure!(outcome.cut == cut, "{what}: {outcome:?}");
    Ok(())
}
