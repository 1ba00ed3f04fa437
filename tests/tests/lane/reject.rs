//! Rejection on every kernel, of a flow that another rule would delay: rejected packets stay out of the lane.

use std::{net::TcpStream, time::Duration};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    capture::{Capture, Ip, Said},
    lent::Lent,
    tcp,
    topology::Lab,
    trial::{Need, trial},
    wait::wait_until,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![trial(
        "reject::what_is_rejected_is_not_delayed",
        &[Need::Root, Need::Injector],
        what_is_rejected_is_not_delayed,
    )]
}

fn what_is_rejected_is_not_delayed() -> Result<()> {
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let _listeners = [
        tcp::listen(&b.ns, b.at(7000))?,
        tcp::listen(&b.ns, b.at6(7000))?,
    ];
    injector.add(&format!(
        "slow --netns {} --iface eth0 --to {},{} --delay 10s",
        a.netns(),
        b.v4,
        b.v6
    ))?;
    for (answer, v4, v6) in [
        ("rst", libc::ECONNREFUSED, libc::ECONNREFUSED),
        ("icmp-host", libc::EHOSTUNREACH, libc::EHOSTUNREACH),
        ("icmp-port", libc::ECONNREFUSED, libc::ECONNREFUSED),
        ("icmp-admin", libc::EHOSTUNREACH, libc::EACCES),
    ] {
        injector.add(&format!(
            "no --netns {} --iface eth0 --to {},{} --proto tcp --peer-port 7000 --reject {answer}",
            a.netns(),
            b.v4,
            b.v6
        ))?;
        let capture = Capture::open(&a.ns, "eth0")?;
        for (to, expected) in [(b.at(7000), v4), (b.at6(7000), v6)] {
            // In silence, and with the delay alone, it takes longer.
            let within = Duration::from_secs(9);
            let result = a.ns.enter(|| Ok(TcpStream::connect_timeout(&to, within)))?;
            let error = result.err().and_then(|error| error.raw_os_error());
            ensure!(error == Some(expected), "{answer} {to}: {error:?}");
            let answers = capture.wait(1, |frame| frame.bytes[6..12] == b.mac)?;
            for frame in answers {
                let said = Said::read(&Ip::read(&frame.bytes[frame.link..])?)?;
                ensure!(
                    matches!(said, Some(Said::Reset { .. })) == (answer == "rst"),
                    "{answer} {to}: {said:?}"
                );
            }
        }
        let stats = injector.stats()?;
        let (rule, slow) = (stats.rule("no")?.egress, stats.rule("slow")?.egress);
        ensure!(
            rule.matched_packets >= 2
                && rule.answered_packets == rule.matched_packets
                && slow.delayed_packets == 0,
            "{rule:?} {slow:?}"
        );
        stats.lanes_lost_nothing()?;
        injector.heal("no")?;
    }
    // Answers bear the mark of what comes back from a lane, and do not count as such: nothing keeps it for 10 s.
    injector.heal("slow")?;
    wait_until("the lane has gone", Duration::from_secs(8), || {
        Ok(injector.stats()?.lanes.is_empty())
    })
}
