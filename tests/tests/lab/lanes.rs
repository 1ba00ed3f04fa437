//! Rules that need a lane, on a kernel that cannot have one.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    injector::Injector,
    snapshot::Snapshot,
    topology::Lab,
    trial::{Need, Skip, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![trial(
        "lanes::are_refused_with_a_reason_where_the_kernel_lacks_them",
        &[Need::Root, Need::Injector],
        are_refused_with_a_reason_where_the_kernel_lacks_them,
    )]
}

/// The exit code for what the kernel lacks.
const LACKING: i32 = 5;

fn are_refused_with_a_reason_where_the_kernel_lacks_them() -> Result<()> {
    let lab = Lab::pair()?;
    let a = lab.a();
    let before = Snapshot::of(&a.ns)?;
    let injector = Injector::started(&[])?;
    let rule = |fault: &str| {
        injector.run(
            &format!(
                "add one --netns {} --iface eth0 --proto udp {fault}",
                a.netns()
            )
            .split(' ')
            .collect::<Vec<_>>(),
        )
    };
    let output = rule("--delay 10ms")?;
    if output.code() == Some(0) {
        return Err(Skip {
            reason: "this kernel can have lanes: the lane tier tests them".to_owned(),
            excusable: true,
        }
        .into());
    }
    ensure!(output.code() == Some(LACKING), "{}", output.describe());
    ensure!(
        output.stderr.contains("kernel module") && output.stderr.contains("nothing was changed"),
        "the reason is not told: {}",
        output.describe()
    );
    before.must_equal(&Snapshot::of(&a.ns)?)?;
    // Positions need none: without a lane a super-packet goes as a whole.
    rule("--drop-every 10")?.success()?;
    Ok(())
}
