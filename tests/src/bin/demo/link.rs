//! Two hosts, and what a client on one of them meets when the link between them becomes slow, then lossy, then
//! narrow.

use std::thread;

use anyhow::{Result, bail, ensure};
use tests::lab::{
    injector::Injector,
    iperf::iperf,
    ping::{RoundTrips, ping},
    topology::Node,
};

use crate::stage::{DemoLab, Tone, paragraph, run, say, title};

/// Datagrams of this size, at this rate, for this long: about 7,500 of them.
const DATAGRAMS: [&str; 7] = [
    "--udp",
    "--length",
    "1000",
    "--bitrate",
    "20M",
    "--time",
    "3",
];

/// Plays it.
pub(crate) fn tell(injector: &Injector) -> Result<()> {
    paragraph(&[
        "Two hosts in a lab on this machine; n1 talks to n2. Their link becomes slow, then",
        "lossy, then narrow. ping and iperf3 are the ordinary programs, and see what they",
        "would see on a real link. Afterwards each rule tells what it was asked to do, and",
        "what it did.",
    ]);
    title("1. Two hosts on a switch, each in a network namespace of its own");
    let lab = DemoLab::up(injector, 2)?;
    let nodes = lab.nodes()?;
    let hosts = Hosts {
        injector,
        here: &nodes[0],
        there: &nodes[1],
    };
    let bare = hosts.ping("nothing is wrong yet", 10)?;
    hosts.slow(bare)?;
    hosts.lossy()?;
    hosts.narrow(bare)
}

/// Who talks to whom.
struct Hosts<'a> {
    injector: &'a Injector,
    here: &'a Node,
    there: &'a Node,
}

impl Hosts<'_> {
    fn add(&self, name: &str, fault: &[&str]) -> Result<()> {
        let mut words = vec![
            "add",
            name,
            "--netns",
            self.here.netns(),
            "--iface",
            "eth0",
            "--to",
            "n2",
        ];
        words.extend_from_slice(fault);
        run(self.injector, &words).map(drop)
    }

    fn ping(&self, when: &str, count: u32) -> Result<RoundTrips> {
        say(
            Tone::Command,
            &format!("n1$ ping -q -c {count} -i 0.1 {}", self.there.v4),
        );
        let trips = ping(self.here, self.there, count, "0.1")?;
        say(Tone::Plain, &format!("  {}   ({when})", in_words(trips)));
        Ok(trips)
    }

    fn slow(&self, bare: RoundTrips) -> Result<()> {
        title("2. The way to n2 takes 50 ms, give or take: normally distributed");
        self.add(
            "slow",
            &[
                "--delay",
                "50ms",
                "--jitter",
                "10ms",
                "--distribution",
                "normal",
            ],
        )?;
        let slow = self.ping("through the rule", 30)?;
        run(self.injector, &["heal", "slow"])?;
        ensure!(
            (40.0..70.0).contains(&(slow.mean - bare.mean)) && slow.max - slow.min > 5.0,
            "asked for 50 ms, the round trip rose from {} to {} ms",
            bare.mean,
            slow.mean
        );
        say(
            Tone::Good,
            "Every packet was delayed by itself; n2 answered at once.",
        );
        Ok(())
    }

    fn lossy(&self) -> Result<()> {
        title("3. One datagram of twenty is lost");
        // iperf3 greets its server with a short datagram, and waits for half a minute if that is lost.
        self.add(
            "lossy",
            &[
                "--proto", "udp", "--length", "1000-", "--loss", "5%", "--seed", "1",
            ],
        )?;
        say(
            Tone::Command,
            &format!(
                "n1$ iperf3 --client {} {}",
                self.there.v4,
                DATAGRAMS.join(" ")
            ),
        );
        let (sent, lost) = iperf(self.here, self.there, &DATAGRAMS)?.datagrams()?;
        let share = percent(lost, sent);
        say(
            Tone::Plain,
            &format!("  n2 misses {lost} of {sent} datagrams ({share:.2}%)"),
        );
        run(self.injector, &["heal", "lossy"])?;
        // Of about 7,500 datagrams 375 on average, give or take 19: five times that.
        ensure!(
            sent > 3000 && (3.7..6.3).contains(&share),
            "asked for 5%, {lost} of {sent} datagrams were lost"
        );
        say(
            Tone::Good,
            "The sender was told nothing: what is lost here is lost on the wire. With the same seed and the\n\
             same traffic, the same packets are lost again.",
        );
        Ok(())
    }

    fn narrow(&self, bare: RoundTrips) -> Result<()> {
        const DOWNLOAD: [&str; 2] = ["--time", "5"];
        title("4. The link carries 10 Mbit/s, with a deep queue in front: bufferbloat");
        self.add("narrow", &["--rate", "10mbit", "--queue", "100ms"])?;
        let idle = self.ping("the line is idle", 10)?;
        say(
            Tone::Command,
            &format!(
                "n1$ iperf3 --client {} {} &",
                self.there.v4,
                DOWNLOAD.join(" ")
            ),
        );
        let (rate, busy) = thread::scope(|scope| -> Result<_> {
            let transfer = scope.spawn(|| iperf(self.here, self.there, &DOWNLOAD)?.received());
            let busy = self.ping("beside the transfer, through the same queue", 40);
            let rate = transfer
                .join()
                .unwrap_or_else(|_| bail!("the transfer panicked"));
            Ok((rate? / 1e6, busy?))
        })?;
        say(
            Tone::Plain,
            &format!("  iperf3 got {rate:.2} Mbit/s through"),
        );
        run(self.injector, &["stats", "narrow"])?;
        run(self.injector, &["heal", "narrow"])?;
        let healed = self.ping("healed", 10)?;
        ensure!(
            (8.0..10.2).contains(&rate),
            "asked for 10 Mbit/s, iperf3 got {rate} Mbit/s"
        );
        ensure!(
            busy.max - idle.max > 50.0 && healed.mean < bare.mean + 20.0,
            "the queue did not fill, or did not go: {} ms idle, {} ms busy, {} ms healed",
            idle.max,
            busy.max,
            healed.mean
        );
        say(
            Tone::Good,
            "The queue filled, and the ping waited in it like everybody else; what did not fit was lost.",
        );
        say(Tone::Plain, "");
        Ok(())
    }
}

fn in_words(trips: RoundTrips) -> String {
    format!(
        "round trips: {:.1} ms on average, {:.1} to {:.1} ms",
        trips.mean, trips.min, trips.max
    )
}

#[expect(clippy::cast_precision_loss, reason = "counts of a few thousand")]
fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}
