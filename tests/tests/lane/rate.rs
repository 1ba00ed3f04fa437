//! Lines of limited rate: what gets through is what was asked, for UDP and TCP, at a constant rate and by a trace.

use std::{
    io::{Read, Write},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use libtest_mimic::Trial;
use tests::lab::{
    counters::Nstat,
    injector::Mode,
    lent::Lent,
    scratch::Scratch,
    tcp,
    timed::{Arrived, Timed},
    topology::{Lab, Node},
    transcript::report,
    trial::{Need, trial},
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "rate::udp_gets_the_asked_rate",
            NEEDS,
            udp_gets_the_asked_rate,
        ),
        trial(
            "rate::tcp_gets_the_asked_rate",
            NEEDS,
            tcp_gets_the_asked_rate,
        ),
        trial("rate::a_trace_is_replayed", NEEDS, a_trace_is_replayed),
        trial("rate::shares", NEEDS, shares),
        trial("rate::lines_in_series", NEEDS, lines_in_series),
    ]
}

/// Off by at most so much, over so long.
const WITHIN: f64 = 0.02;
const LASTING: Duration = Duration::from_secs(5);

/// Payload of the datagrams here, and what a line counts for each.
const PAYLOAD: u16 = 1200;
const FRAME: u32 = frame(PAYLOAD);

/// With IPv4, UDP and Ethernet headers.
const fn frame(payload: u16) -> u32 {
    payload as u32 + 8 + 20 + 14
}

/// By so much the header of IPv6 is longer.
const LONGER: u32 = 20;

/// An MTU with which a slow machine, too, sends 100 Mbit/s.
const JUMBO: u32 = 9000;

/// Bits per second between the first and the last of equally long packets.
fn bits_per_second(arrived: &[Arrived], frame: u32) -> f64 {
    let (Some(first), Some(last)) = (arrived.first(), arrived.last()) else {
        return 0.0;
    };
    let count = u32::try_from(arrived.len() - 1).unwrap_or(u32::MAX);
    f64::from(count) * f64::from(frame) * 8.0 / seconds(last.at_ns - first.at_ns)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "differences of times in a test are far below 2^52 ns"
)]
fn seconds(nanoseconds: i64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// Sends super-packets for so long, at so many bits per second; how many datagrams that was.
fn offer(path: &Timed, payload: u16, bits: f64, length: Duration) -> Result<u32> {
    let together = u32::from((60_000 / payload).min(8));
    let began = Instant::now();
    let mut sent = 0;
    while began.elapsed() < length {
        let due = f64::from(sent) * f64::from(frame(payload)) * 8.0 / bits;
        if began.elapsed().as_secs_f64() < due {
            thread::sleep(Duration::from_micros(200));
            continue;
        }
        path.send_super_packets(sent + 1..=sent + together, together as usize, payload)?;
        sent += together;
    }
    Ok(sent)
}

/// What came through a line, in bits per second, and how long it took, in seconds.
struct Through {
    bits: f64,
    seconds: f64,
}

/// A machine that is busy otherwise may not fill a line for a while; then the line's rate does not show. So often it
/// gets another chance.
const CHANCES: u32 = 3;

/// Measures until the line was busy all the time, and compares with what was asked. `false` if it never was.
fn compare(
    injector: &Lent,
    what: &str,
    line: &str,
    asked: f64,
    mut measure: impl FnMut() -> Result<Through>,
) -> Result<bool> {
    for _ in 0..CHANCES {
        injector.add(line)?;
        let Through { bits, seconds } = measure()?;
        let stats = injector.stats()?;
        let rule = stats.rule("line")?;
        let busy_ns = rule.both(|one| one.busy_ns);
        let busy = Duration::from_nanos(busy_ns).as_secs_f64() / seconds;
        let said = rule.realised("rate")?.realised.unwrap_or(f64::NAN);
        report(format!(
            "{what}: {bits:.0} bit/s through a line that was busy for {:.1} % of {seconds:.2} s; stats say {said:.0}",
            busy * 100.0
        ));
        stats.lanes_lost_nothing()?;
        injector.heal("line")?;
        // However busy: never more than it can carry.
        ensure!(bits < asked * (1.0 + WITHIN), "{what}: {bits} bit/s");
        if busy < 1.0 - WITHIN / 2.0 {
            continue;
        }
        ensure!(bits > asked * (1.0 - WITHIN), "{what}: {bits} bit/s");
        ensure!(
            (said / bits - 1.0).abs() < WITHIN,
            "{what}: stats say {said}, and {bits} came"
        );
        return Ok(true);
    }
    report(format!(
        "{what}: this machine could not fill the line in {CHANCES} attempts"
    ));
    Ok(false)
}

/// Rates by which a line is tried that the machine, which may be emulated, cannot fill at its rate.
const SLOWER: [u32; 2] = [2, 4];

/// The same at `mbit` Mbit/s, or at a half or a quarter of it where the machine cannot fill that.
fn compare_at(mbit: u32, mut at: impl FnMut(u32) -> Result<bool>) -> Result<()> {
    let mut rates = vec![mbit];
    if mbit >= 100 {
        rates.extend(SLOWER.map(|part| mbit / part));
    }
    for rate in &rates {
        if at(*rate)? {
            return Ok(());
        }
    }
    bail!("this machine could fill a line of none of {rates:?} Mbit/s")
}

fn udp_gets_the_asked_rate() -> Result<()> {
    let lab = Lab::steady_pair_with_mtu(JUMBO)?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    // TCP goes the other way each time, over the other protocol.
    for (direction, v6, mbit, payload) in [
        ("--to", false, 1_u32, PAYLOAD),
        ("--from", true, 10, PAYLOAD),
        ("--to", false, 100, 8900),
    ] {
        compare_at(mbit, |mbit| {
            let line = format!(
                "line --netns {} --iface eth0 {direction} {} --proto udp --rate {mbit}mbit",
                a.netns(),
                b.addresses()[usize::from(v6)]
            );
            let (from, to) = if direction == "--to" { (a, b) } else { (b, a) };
            let asked = f64::from(mbit) * 1e6;
            let what = format!("UDP {direction}, IPv6 {v6}, {mbit} Mbit/s");
            let frame = frame(payload) + if v6 { LONGER } else { 0 };
            compare(&injector, &what, &line, asked, || {
                let path = if v6 {
                    Timed::v6(from, 6000, to, 7000)?
                } else {
                    Timed::v4(from, 6000, to, 7000)?
                };
                // What comes in that time is more than a socket holds.
                let (sent, arrived) = thread::scope(|scope| {
                    let reader =
                        scope.spawn(|| path.receive(1, Duration::from_secs(1), 4 * LASTING));
                    let sent = offer(&path, payload, asked * 1.5, LASTING)?;
                    let arrived = reader
                        .join()
                        .map_err(|_| anyhow!("the receiver panicked"))??;
                    Ok::<_, anyhow::Error>((sent, arrived))
                })?;
                ensure!(
                    arrived.is_sorted_by_key(|one| one.number),
                    "order was not kept"
                );
                // Every packet is accounted for.
                let stats = injector.stats()?;
                let rule = stats.rule("line")?;
                let (through, lost) = (
                    rule.both(|one| one.queued_packets),
                    rule.both(|one| one.overflow_packets),
                );
                ensure!(
                    through == u64::try_from(arrived.len())? && through + lost == u64::from(sent),
                    "{} of {sent} came: {rule:?}",
                    arrived.len()
                );
                let ends =
                    [arrived.first(), arrived.last()].map(|one| one.map_or(0, |one| one.at_ns));
                Ok(Through {
                    bits: bits_per_second(&arrived, frame),
                    seconds: seconds(ends[1] - ends[0]),
                })
            })
        })?;
    }
    Ok(())
}

/// What a TCP stream of so many bytes gets through, from its first to its last byte. With an MTU of 9000 a segment of
/// 8948 bytes (8928 over IPv6) is a frame of 9014.
fn stream(from: &Node, to: &Node, v6: bool, bytes: usize) -> Result<Through> {
    const PORT: u16 = 7001;
    let (at, segment) = if v6 {
        (to.at6(PORT), 8928.0)
    } else {
        (to.at(PORT), 8948.0)
    };
    let before = Nstat::read(&from.ns)?;
    let listener = tcp::listen(&to.ns, at)?;
    let reader = thread::spawn(move || -> Result<Option<(Duration, usize)>> {
        let mut stream = tcp::accept(&listener, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut buffer = vec![0; 1 << 16];
        let mut first = None;
        let mut last = Instant::now();
        let mut total = 0;
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(first.map(|first| (last - first, total))),
                // What came with the first byte does not count, nor does its time.
                _ if first.is_none() => first = Some(Instant::now()),
                got => {
                    total += got;
                    last = Instant::now();
                }
            }
        }
    });
    let mut stream = tcp::connect(&from.ns, at, Duration::from_secs(10))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(&vec![0x5a; bytes])?;
    drop(stream);
    let (taken, counted) = reader
        .join()
        .map_err(|_| anyhow!("the receiver panicked"))??
        .context("nothing came")?;
    let again = Nstat::read(&from.ns)?.since(&before, "TcpRetransSegs")?;
    let segments = f64::from(u32::try_from(counted)?) / segment + f64::from(u32::try_from(again)?);
    Ok(Through {
        bits: segments * 9014.0 * 8.0 / taken.as_secs_f64(),
        seconds: taken.as_secs_f64(),
    })
}

/// The queue takes all that the stream sends: what is lost would come again, and late.
fn tcp_gets_the_asked_rate() -> Result<()> {
    let lab = Lab::steady_pair_with_mtu(JUMBO)?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (direction, v6, mbit) in [
        ("--from", true, 1_u32),
        ("--to", false, 10),
        ("--from", true, 100),
    ] {
        compare_at(mbit, |mbit| {
            let line = format!(
                "line --netns {} --iface eth0 {direction} {} --proto tcp --rate {mbit}mbit --queue 10s",
                a.netns(),
                b.addresses()[usize::from(v6)]
            );
            let (from, to) = if direction == "--to" { (a, b) } else { (b, a) };
            let asked = f64::from(mbit) * 1e6;
            let what = format!("TCP {direction}, IPv6 {v6}, {mbit} Mbit/s");
            let bytes = usize::try_from(u64::from(mbit) * 125_000 * LASTING.as_secs())?;
            compare(&injector, &what, &line, asked, || {
                stream(from, to, v6, bytes)
            })
        })?;
    }
    Ok(())
}

/// Slow and fast in turn: an opportunity every eight milliseconds for half a second, then one every two. With its
/// header of a TUN device a packet of 1500 bytes fills one.
fn a_trace_is_replayed() -> Result<()> {
    const IP: usize = 1500;
    const SLOW: u32 = 62;
    const FAST: u32 = 250;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    let folder = Scratch::new()?;
    let file = folder.path().join("steps.trace");
    let lines: Vec<String> = (1..=SLOW)
        .map(|n| n * 8)
        .chain((1..=FAST).map(|n| 500 + n * 2))
        .map(|time| time.to_string())
        .collect();
    std::fs::write(&file, lines.join("\n"))?;
    injector.add(&format!(
        "line --netns {} --iface eth0 --to {} --proto udp --rate-trace {} --queue 40p",
        a.netns(),
        b.v4,
        file.display()
    ))?;
    // What `list` prints is the rule, trace and all: it says nothing new.
    let listed = injector.json(&["list"])?;
    let spec = listed["rules"][0]["spec"].clone();
    ensure!(
        spec["fault"]["rate_trace"]["milliseconds"]
            .as_array()
            .map(Vec::len)
            == Some(usize::try_from(SLOW + FAST)?),
        "{spec}"
    );
    let again = injector
        .try_apply(&serde_json::json!([spec]), Mode::Add)?
        .success()?;
    ensure!(again.stdout.contains("unchanged"), "{}", again.stdout);
    let text = injector.ok(&["list"])?.stdout;
    ensure!(
        text.contains("steps.trace") && !text.contains("496"),
        "{text}"
    );

    let path = Timed::v4(a, 6000, b, 7000)?;
    // Twice as many as there are opportunities, for two rounds and a half.
    path.send_sized(1..=1560, IP - 28, Duration::from_micros(1600))?;
    let arrived = path.receive(1, Duration::from_millis(300), Duration::from_secs(20))?;
    let first = arrived.first().map_or(0, |one| one.at_ns);
    let rounds = arrived
        .iter()
        .filter(|one| one.at_ns - first <= 2_000_000_000)
        .count();
    let found = f64::from(u32::try_from(rounds)?);
    let asked = f64::from(2 * (SLOW + FAST));
    // In the fast half there are four times as many: in any 400 ms of it 200, in as much of the slow one 50.
    let counts: Vec<usize> = (0..16)
        .map(|step| {
            let from = first + step * 100_000_000;
            arrived
                .iter()
                .filter(|one| (from..from + 400_000_000).contains(&one.at_ns))
                .count()
        })
        .collect();
    let (least, most) = (
        counts.iter().min().copied().unwrap_or(0),
        counts.iter().max().copied().unwrap_or(0),
    );
    let stats = injector.stats()?;
    let said = stats.rule("line")?.realised("rate")?.clone();
    report(format!(
        "{found} packets in two rounds of {asked}, {least} to {most} in 400 ms; stats say {said:?}"
    ));
    ensure!(
        (found / asked - 1.0).abs() < WITHIN,
        "{found} packets in two rounds"
    );
    ensure!(
        (45..=56).contains(&least) && (190..=210).contains(&most),
        "in 400 ms came from {least} to {most}"
    );
    let mean = f64::from(SLOW + FAST) * 1504.0 * 8.0;
    ensure!((said.asked / mean - 1.0).abs() < 1e-6, "{said:?}");
    stats.lanes_lost_nothing()
}

/// Two flows through one line share it; with lines of their own each has all of the rate.
fn shares() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (share, together) in [("rule", true), ("peer", true), ("flow", false)] {
        injector.add(&format!(
            "line --netns {} --iface eth0 --to {} --proto udp --rate 2mbit --share {share} --queue 30s",
            a.netns(),
            b.v4
        ))?;
        let one = Timed::v4(a, 6000, b, 7000)?;
        let other = Timed::v4(a, 6001, b, 7001)?;
        // 300 of them take a second and a half.
        one.send_super_packets(1..=300, 50, PAYLOAD)?;
        other.send_super_packets(1..=300, 50, PAYLOAD)?;
        let first = one.receive(300, Duration::ZERO, Duration::from_secs(10))?;
        let second = other.receive(300, Duration::ZERO, Duration::from_secs(10))?;
        let ends = |arrived: &[Arrived]| arrived.last().map_or(0, |one| one.at_ns);
        let begins = |arrived: &[Arrived]| arrived.first().map_or(0, |one| one.at_ns);
        let apart = seconds(begins(&second) - ends(&first));
        report(format!(
            "{share}: the second began {apart:.3} s after the first had ended"
        ));
        if together {
            ensure!(apart > 0.0, "{share}: {apart}");
        } else {
            ensure!(apart < -0.7, "{share}: {apart}");
        }
        injector.heal("line")?;
    }
    Ok(())
}

/// Two rules: the slower one decides, and each has a queue of its own.
fn lines_in_series() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (name, rate) in [("first", "800kbit"), ("second", "400kbit")] {
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --proto udp --rate {rate} --queue 5s",
            a.netns(),
            b.v4
        ))?;
    }
    let path = Timed::v4(a, 6000, b, 7000)?;
    path.send_super_packets(1..=100, 50, PAYLOAD)?;
    let arrived = path.receive(100, Duration::ZERO, Duration::from_secs(10))?;
    let found = bits_per_second(&arrived, FRAME);
    ensure!((found / 4e5 - 1.0).abs() < WITHIN, "{found} bit/s");
    let stats = injector.stats()?;
    // The first takes half the time of the second: the last packet has waited as long for each of them.
    let frame = f64::from(FRAME) * 8.0;
    let longest = 99.0 * frame / 8e5;
    for name in ["first", "second"] {
        let queue = stats.rule(name)?.realised("queue")?.clone();
        let max = queue.max.unwrap_or(f64::NAN);
        report(format!("{name}: {queue:?}"));
        ensure!(
            max < longest + 0.001 && max > longest - 0.3,
            "{name}: the longest wait was {max} s, not {longest}"
        );
    }
    stats.lanes_lost_nothing()
}
