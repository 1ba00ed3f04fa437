//! What is counted where no rule acts.

use injector::rules::model::{Direction, Fault, Selector};
use libtest_mimic::Trial;
use tests::{
    model::{Hook, Packet, Subject as _},
    subject::Kernel,
};

use super::{ETHERNET, faults::bulk, of_kernel, rule, setup};

pub(super) fn trial() -> Trial {
    of_kernel("kernel::unfaulted_super_packets_are_counted", counted)
}

/// Ten wire packets each, whether the kernel has counted them or not, where rules act and where none does.
fn counted(kernel: &mut Kernel) -> anyhow::Result<()> {
    let selector = Selector {
        direction: Direction::Egress,
        ..Selector::default()
    };
    kernel.install(&setup(vec![rule(Fault::DropNth(1000), selector)]))?;
    for hook in [Hook::Egress, Hook::Ingress] {
        for segments in [10, 0] {
            let before = kernel.seen(ETHERNET, hook)?;
            let packet = Packet {
                hook,
                ..bulk(segments)
            };
            kernel.decide(&packet)?;
            let seen = kernel.seen(ETHERNET, hook)? - before;
            anyhow::ensure!(
                seen == 10,
                "{hook:?}, {segments} segments by the kernel: {seen} were counted"
            );
        }
    }
    Ok(())
}
