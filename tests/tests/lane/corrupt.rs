//! Corruption: exactly the drawn bits of the drawn packets, as a receiver of ours sees them; and what receivers of
//! UDP, TCP and ICMP make of it, also where a checksum counts as verified already.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use tests::{
    lab::{
        counters::Nstat,
        frame::{ETH_IPV4, ETH_IPV6},
        lent::Lent,
        packet_socket::{Capture, on_one_cpu},
        tcp,
        timed::{Timed, now_ns},
        topology::{Lab, Node},
        transcript::report,
        trial::{Need, trial},
        udp::socket,
        wait::wait_until,
    },
    model::{
        datagram::{Choice, Datagram, turn},
        line::Stream,
    },
};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial(
            "corrupt::exactly_the_drawn_bits_are_turned_over",
            NEEDS,
            exactly_the_drawn_bits_are_turned_over,
        ),
        trial(
            "corrupt::broken_datagrams_are_dropped_and_counted",
            NEEDS,
            broken_datagrams_are_dropped_and_counted,
        ),
        trial(
            "corrupt::broken_segments_are_sent_again",
            NEEDS,
            broken_segments_are_sent_again,
        ),
        trial(
            "corrupt::repaired_segments_bring_wrong_bytes",
            NEEDS,
            repaired_segments_bring_wrong_bytes,
        ),
        trial("corrupt::echoes", NEEDS, echoes),
    ]
}

pub(crate) const SEED: u64 = 7;
pub(crate) const WITHIN: Duration = Duration::from_secs(20);
pub(crate) const QUIET: Duration = Duration::from_millis(100);
/// Ethernet header.
pub(crate) const LINK: usize = 14;

/// Datagrams sent one by one, and in super-packets.
const SINGLES: u32 = 80;
const GROUP: u32 = 40;
pub(crate) const COUNT: u32 = SINGLES + 2 * GROUP;
const SIZE: usize = 700;

/// What is sent as number `number`.
pub(crate) fn content(number: u32) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().to_vec();
    bytes.extend((0_u32..).take(SIZE - 4).map(|at| {
        let [.., byte] = (number * 31 + at * 7).to_be_bytes();
        byte
    }));
    bytes
}

/// Sends all datagrams from a socket that is not connected: errors that come back are not its business. Between which
/// two times of day each was sent, in nanoseconds, in the order of their numbers.
pub(crate) fn send(sender: &UdpSocket, target: SocketAddr) -> Result<Vec<[i64; 2]>> {
    on_one_cpu(|| {
        let mut sent = Vec::new();
        for number in 1..=SINGLES {
            let before = now_ns()?;
            sender
                .send_to(&content(number), target)
                .with_context(|| format!("sending datagram {number}"))?;
            sent.push([before, now_ns()?]);
        }
        setsockopt(sender, UdpGsoSegment, &i32::try_from(SIZE)?).context("UDP_SEGMENT")?;
        let numbers: Vec<u32> = (SINGLES + 1..=COUNT).collect();
        for group in numbers.chunks(usize::try_from(GROUP)?) {
            let bytes: Vec<u8> = group.iter().flat_map(|&number| content(number)).collect();
            let before = now_ns()?;
            sender
                .send_to(&bytes, target)
                .context("sending a super-packet")?;
            let after = now_ns()?;
            sent.extend(group.iter().map(|_| [before, after]));
        }
        setsockopt(sender, UdpGsoSegment, &0).context("UDP_SEGMENT")?;
        Ok(sent)
    })
}

/// What is asked of a rule, as words and as what the model has to know of it.
pub(crate) struct Asked {
    pub(crate) words: &'static str,
    pub(crate) egress: bool,
    pub(crate) v6: bool,
    pub(crate) corrupt: f64,
    pub(crate) bits: usize,
    pub(crate) choice: Choice,
    pub(crate) loss: f64,
    pub(crate) duplicate: f64,
}

pub(crate) const ANY: Choice = Choice {
    header: true,
    payload: true,
    repairable: false,
};

const CASES: [Asked; 7] = [
    Asked {
        words: "--corrupt 25% --checksum repaired",
        egress: true,
        v6: false,
        corrupt: 0.25,
        bits: 1,
        choice: Choice {
            repairable: true,
            ..ANY
        },
        loss: 0.0,
        duplicate: 0.0,
    },
    Asked {
        words: "--corrupt 50% --bits 5 --where any --checksum repaired",
        egress: false,
        v6: true,
        corrupt: 0.5,
        bits: 5,
        choice: Choice {
            repairable: true,
            ..ANY
        },
        loss: 0.0,
        duplicate: 0.0,
    },
    Asked {
        words: "--corrupt 100% --bits 32 --where header --checksum repaired",
        egress: false,
        v6: false,
        corrupt: 1.0,
        bits: 32,
        choice: Choice {
            payload: false,
            repairable: true,
            ..ANY
        },
        loss: 0.0,
        duplicate: 0.0,
    },
    Asked {
        words: "--corrupt 50% --bits 32 --where payload --checksum repaired",
        egress: true,
        v6: true,
        corrupt: 0.5,
        bits: 32,
        choice: Choice {
            header: false,
            repairable: true,
            ..ANY
        },
        loss: 0.0,
        duplicate: 0.0,
    },
    Asked {
        words: "--corrupt 50% --bits 3",
        egress: false,
        v6: false,
        corrupt: 0.5,
        bits: 3,
        choice: ANY,
        loss: 0.0,
        duplicate: 0.0,
    },
    Asked {
        words: "--corrupt 100% --where header --checksum broken",
        egress: true,
        v6: true,
        corrupt: 1.0,
        bits: 1,
        choice: Choice {
            payload: false,
            ..ANY
        },
        loss: 0.0,
        duplicate: 0.0,
    },
    // Everything in one rule: what is lost is not corrupted, a copy is like its original.
    Asked {
        words: "--corrupt 50% --bits 2 --checksum repaired --loss 20% --duplicate 30% --delay 20ms",
        egress: true,
        v6: false,
        corrupt: 0.5,
        bits: 2,
        choice: Choice {
            repairable: true,
            ..ANY
        },
        loss: 0.2,
        duplicate: 0.3,
    },
];

impl Asked {
    /// What is to arrive, in order: numbers, each with the bits that are turned over.
    pub(crate) fn expected(&self, stream: &Stream) -> Vec<(u32, BTreeSet<usize>)> {
        let bits = self.datagram().bits(self.choice);
        let mut expected = Vec::new();
        for number in 1..=COUNT {
            let n = u64::from(number);
            if stream.loses(n, self.loss) {
                continue;
            }
            let flips = if stream.corrupts(n, self.corrupt) {
                stream.flips(n, self.bits, &bits)
            } else {
                BTreeSet::new()
            };
            if stream.duplicates(n, self.duplicate) {
                expected.push((number, flips.clone()));
            }
            expected.push((number, flips));
        }
        expected
    }

    pub(crate) fn datagram(&self) -> Datagram {
        Datagram {
            v6: self.v6,
            payload: SIZE,
        }
    }
}

/// Adds a rule for one direction of UDP at `a`; returns who sends and who receives.
pub(crate) fn corrupt_udp<'a>(
    injector: &Lent,
    lab: &'a Lab,
    egress: bool,
    v6: bool,
    words: &str,
) -> Result<(&'a Node, &'a Node)> {
    let (a, b) = (lab.a(), lab.b());
    let direction = if egress { "--to" } else { "--from" };
    let peer = if v6 {
        b.v6.to_string()
    } else {
        b.v4.to_string()
    };
    injector.add(&format!(
        "noise --netns {} --iface eth0 {direction} {peer} --proto udp --seed {SEED} {words}",
        a.netns()
    ))?;
    Ok(if egress { (a, b) } else { (b, a) })
}

fn exactly_the_drawn_bits_are_turned_over() -> Result<()> {
    let lab = Lab::pair()?;
    lab.a().make_clsact()?;
    let injector = Lent::new()?;
    for asked in CASES {
        let (from, to) = corrupt_udp(&injector, &lab, asked.egress, asked.v6, asked.words)?;
        let (source, target) = if asked.v6 {
            (from.at6(6000), to.at6(7000))
        } else {
            (from.at(6000), to.at(7000))
        };
        let ethertype = if asked.v6 { ETH_IPV6 } else { ETH_IPV4 };
        let capture = Capture::open(&to.ns, ethertype)?;
        let stream = Stream::of_udp(SEED, "noise", (source, target), asked.egress);
        let expected = asked.expected(&stream);
        send(&socket(&from.ns, source)?, target)?;
        let frames = capture.frames_to(to.mac, expected.len(), QUIET, WITHIN)?;
        let frames: Vec<Vec<u8>> = frames.into_iter().map(|frame| frame.bytes).collect();
        check(&asked, &frames, &expected, (from, to))
            .with_context(|| format!("{} {source} to {target}", asked.words))?;
        let stats = injector.stats()?;
        let rule = stats.rule("noise")?;
        let counted = rule.both(|one| one.corrupted_packets);
        let changed: BTreeSet<u32> = expected
            .iter()
            .filter(|(_, flips)| !flips.is_empty())
            .map(|(number, _)| *number)
            .collect();
        ensure!(counted == u64::try_from(changed.len())?, "{rule:?}");
        ensure!(
            rule.both(|one| one.matched_packets) == u64::from(COUNT),
            "{rule:?}"
        );
        stats.lanes_lost_nothing()?;
        report(format!(
            "{}: {counted} of {COUNT} datagrams to {target} corrupted, bit by bit as drawn",
            asked.words
        ));
        injector.heal("noise")?;
    }
    Ok(())
}

/// Compares what arrived with what was sent and drawn.
pub(crate) fn check(
    asked: &Asked,
    frames: &[Vec<u8>],
    expected: &[(u32, BTreeSet<usize>)],
    (from, to): (&Node, &Node),
) -> Result<()> {
    let datagram = asked.datagram();
    ensure!(frames.len() == expected.len(), "{} frames", frames.len());
    let link = [&to.mac[..], &from.mac[..]].concat();
    // What is the same in all packets: everything but checksums and IPv4's identification, which segmentation counts
    // up. Those of super-packets may be fragmented, others not.
    let mut firsts: BTreeMap<bool, Vec<u8>> = BTreeMap::new();
    let mut bases: BTreeMap<u32, u16> = BTreeMap::new();
    for (frame, (number, flips)) in frames.iter().zip(expected) {
        ensure!(frame[..12] == link, "datagram {number}: {frame:x?}");
        let mut packet = frame[LINK..].to_vec();
        ensure!(packet.len() == datagram.length(), "datagram {number}");
        if asked.choice.repairable {
            ensure!(datagram.is_valid(&packet), "datagram {number} is broken");
        }
        for position in flips {
            turn(&mut packet, *position);
        }
        if !asked.choice.repairable {
            ensure!(
                datagram.is_valid(&packet),
                "datagram {number}: other bits than {flips:?} were turned over"
            );
        }
        ensure!(
            packet[datagram.headers()..] == content(*number),
            "datagram {number}: payload has other bits turned over than {flips:?}"
        );
        let mut headers = packet[..datagram.headers()].to_vec();
        headers[datagram.network() + 6..].fill(0);
        if !datagram.v6 {
            if let Some(place) = number.checked_sub(SINGLES + 1) {
                let id = u16::from_be_bytes([headers[4], headers[5]]);
                let base = id.wrapping_sub(u16::try_from(place % GROUP)?);
                let first = *bases.entry(place / GROUP).or_insert(base);
                ensure!(
                    base == first,
                    "datagram {number}: id {id}, not {first} and on"
                );
            }
            headers[4..6].fill(0);
            headers[10..12].fill(0);
        }
        let first = firsts
            .entry(*number > SINGLES)
            .or_insert_with(|| headers.clone());
        ensure!(
            *first == headers,
            "datagram {number}: {headers:x?}, not {first:x?}, without {flips:?}"
        );
    }
    Ok(())
}

/// Lets what `b` sends come with checksums of its own, which `a` verifies on their way to GRO: what that does not merge
/// counts as verified then (`skb_gro_incr_csum_unnecessary`, include/net/gro.h, 6.1).
fn verify_on_arrival(lab: &Lab) -> Result<()> {
    lab.b().ns.tool("ethtool -K eth0 tx off")?;
    lab.a().ns.tool("ethtool -K eth0 gro on").map(drop)
}

/// The receiver drops exactly the drawn ones, and counts them. Without the reset of `CHECKSUM_UNNECESSARY` all of
/// them would reach the socket in the last case.
fn broken_datagrams_are_dropped_and_counted() -> Result<()> {
    const NUMBERS: u32 = 300;
    let lab = Lab::pair()?;
    lab.a().make_clsact()?;
    let injector = Lent::new()?;
    for (egress, v6, offload) in [
        (true, false, false),
        (false, true, false),
        (false, false, true),
        (false, true, true),
    ] {
        let words = "--corrupt 20% --where payload";
        let (from, to) = corrupt_udp(&injector, &lab, egress, v6, words)?;
        if offload {
            verify_on_arrival(&lab)?;
        }
        let path = if v6 {
            Timed::v6(from, 6000, to, 7000)?
        } else {
            Timed::v4(from, 6000, to, 7000)?
        };
        let stream = Stream::of_udp(SEED, "noise", path.ends, egress);
        let (drawn, left): (Vec<u32>, Vec<u32>) =
            (1..=NUMBERS).partition(|n| stream.corrupts(u64::from(*n), 0.2));
        let tap = Capture::tap(&to.ns)?;
        let before = Nstat::read(&to.ns)?;
        on_one_cpu(|| {
            path.send(1..=NUMBERS / 2, Duration::from_micros(50))?;
            if offload {
                path.send(NUMBERS / 2 + 1..=NUMBERS, Duration::from_micros(50))?;
                Ok(())
            } else {
                path.send_super_packets(NUMBERS / 2 + 1..=NUMBERS, 40, 1000)
            }
        })?;
        let arrived: Vec<u32> = path
            .receive(left.len(), QUIET, WITHIN)?
            .iter()
            .map(|one| one.number)
            .collect();
        ensure!(arrived == left, "arrived {arrived:?}, drawn {drawn:?}");
        if offload {
            // The tap sees each as it comes in, and those that come back from the lane once more.
            let seen = tap.frames_to(to.mac, usize::try_from(NUMBERS)?, QUIET, WITHIN)?;
            let verified = seen.iter().filter(|frame| frame.verified).count();
            ensure!(
                verified >= usize::try_from(NUMBERS)?,
                "only {verified} of {} frames came in as verified",
                seen.len()
            );
        }
        let name = if v6 {
            "Udp6InCsumErrors"
        } else {
            "UdpInCsumErrors"
        };
        let errors = Nstat::read(&to.ns)?.since(&before, name)?;
        let stats = injector.stats()?;
        let rule = stats.rule("noise")?;
        let counted = rule.both(|one| one.corrupted_packets);
        let expected = u64::try_from(drawn.len())?;
        ensure!(
            errors == expected && counted == expected,
            "{name} {errors}, corrupted {counted}, drawn {expected}"
        );
        stats.lanes_lost_nothing()?;
        report(format!(
            "egress {egress}, IPv6 {v6}, verified before {offload}: {name} {errors}, as drawn"
        ));
        injector.heal("noise")?;
    }
    Ok(())
}

/// Bytes of a stream of known content.
const STREAM: usize = 4 << 20;

fn known(at: usize) -> u8 {
    let [.., high, low] = at.wrapping_mul(0x9e37_79b1).to_be_bytes();
    high ^ low
}

/// Sends a stream from one node to another; returns what arrived.
fn transfer(from: &Node, to: &Node, target: SocketAddr) -> Result<Vec<u8>> {
    let listener = tcp::listen(&to.ns, target)?;
    let reader = thread::spawn(move || -> Result<Vec<u8>> {
        let mut stream = tcp::accept(&listener, WITHIN)?;
        stream.set_read_timeout(Some(WITHIN))?;
        let mut bytes = Vec::with_capacity(STREAM);
        stream
            .read_to_end(&mut bytes)
            .context("receiving a stream")?;
        Ok(bytes)
    });
    let sent = (|| {
        let mut stream = tcp::connect(&from.ns, target, WITHIN)?;
        stream.set_write_timeout(Some(WITHIN))?;
        let bytes: Vec<u8> = (0..STREAM).map(known).collect();
        stream.write_all(&bytes).context("sending a stream")
    })();
    let arrived = reader
        .join()
        .map_err(|_| anyhow!("the stream's receiver panicked"))?;
    sent?;
    let arrived = arrived?;
    ensure!(arrived.len() == STREAM, "{} bytes arrived", arrived.len());
    Ok(arrived)
}

/// Adds a rule for the data of TCP in one direction at `a`; runs the stream; returns what arrived, how much these
/// counters of the receiver rose, and how many packets were corrupted.
fn through_noise(
    lab: &Lab,
    injector: &Lent,
    egress: bool,
    v6: bool,
    words: &str,
    names: &[&str],
    is_all: impl Fn(&[u64], u64) -> bool,
) -> Result<(Vec<u8>, Vec<u64>, u64)> {
    let (a, b) = (lab.a(), lab.b());
    let direction = if egress { "egress" } else { "ingress" };
    injector.add(&format!(
        "noise --netns {} --iface eth0 --direction {direction} --proto tcp --seed {SEED} {words}",
        a.netns()
    ))?;
    let (from, to) = if egress { (a, b) } else { (b, a) };
    let target = if v6 { to.at6(7000) } else { to.at(7000) };
    let before = [Nstat::read(&from.ns)?, Nstat::read(&to.ns)?];
    let arrived = transfer(from, to, target)?;
    let (mut grown, mut corrupted) = (Vec::new(), 0);
    // What was sent again for no reason may still be on its way.
    let counted = wait_until("all is counted", Duration::from_secs(10), || {
        let stats = injector.stats()?;
        stats.lanes_lost_nothing()?;
        corrupted = stats.rule("noise")?.both(|one| one.corrupted_packets);
        let after = [Nstat::read(&from.ns)?, Nstat::read(&to.ns)?];
        grown = names
            .iter()
            .map(|name| Ok(after[0].since(&before[0], name)? + after[1].since(&before[1], name)?))
            .collect::<Result<Vec<u64>>>()?;
        Ok(is_all(&grown, corrupted))
    });
    counted.with_context(|| format!("{names:?} {grown:?}, corrupted {corrupted}"))?;
    injector.heal("noise")?;
    Ok((arrived, grown, corrupted))
}

/// About 2,900 packets with payload, of which each is corrupted with 1 %: none at all would be in one run of 10^12.
/// What is sent again is not what was corrupted: the sender's own bytes are not touched.
fn broken_segments_are_sent_again() -> Result<()> {
    let lab = Lab::pair()?;
    lab.a().make_clsact()?;
    let injector = Lent::new()?;
    for (egress, v6, offload) in [
        (true, false, false),
        (false, true, false),
        (false, false, true),
    ] {
        if offload {
            verify_on_arrival(&lab)?;
        }
        let (arrived, _, corrupted) = through_noise(
            &lab,
            &injector,
            egress,
            v6,
            "--corrupt 1% --where payload",
            &["TcpInCsumErrors"],
            |grown, corrupted| grown == [corrupted],
        )?;
        ensure!(
            (0..STREAM).all(|at| arrived[at] == known(at)),
            "the stream did not arrive intact"
        );
        ensure!(corrupted > 0, "nothing was corrupted");
        report(format!(
            "egress {egress}, IPv6 {v6}, verified before {offload}: TcpInCsumErrors {corrupted}, stream intact"
        ));
    }
    Ok(())
}

fn repaired_segments_bring_wrong_bytes() -> Result<()> {
    let lab = Lab::pair()?;
    lab.a().make_clsact()?;
    let injector = Lent::new()?;
    for (egress, v6) in [(true, false), (false, true)] {
        let (arrived, grown, corrupted) = through_noise(
            &lab,
            &injector,
            egress,
            v6,
            "--corrupt 1% --where payload --checksum repaired",
            &["TcpInCsumErrors", "TcpRetransSegs"],
            |_, _| true,
        )?;
        let wrong: u64 = (0..STREAM)
            .map(|at| u64::from((arrived[at] ^ known(at)).count_ones()))
            .sum();
        // A segment that is sent again for no reason may be corrupted in vain.
        let (errors, again) = (grown[0], grown[1]);
        ensure!(
            errors == 0 && wrong > 0 && wrong <= corrupted && corrupted <= wrong + again,
            "{wrong} wrong bits, {corrupted} corrupted, {errors} errors, {again} sent again"
        );
        report(format!(
            "egress {egress}, IPv6 {v6}: {wrong} wrong bits in {corrupted} corrupted packets"
        ));
    }
    Ok(())
}

/// Echo requests whose payload is corrupted: repaired ones are answered, and `ping` finds wrong bytes; broken ones
/// are not.
fn echoes() -> Result<()> {
    const PINGS: u64 = 20;
    let lab = Lab::pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (peer, proto, prefix) in [
        (b.v4.to_string(), "icmp", "Icmp"),
        (b.v6.to_string(), "icmpv6", "Icmp6"),
    ] {
        for checksum in ["broken", "repaired"] {
            let words = format!(
                "noise --netns {} --iface eth0 --to {peer} --proto {proto} --corrupt 100% --where payload \
                 --checksum {checksum}",
                a.netns()
            );
            injector.add(&words)?;
            let before = Nstat::read(&b.ns)?;
            let ping =
                a.ns.try_tool(&format!("ping -n -c {PINGS} -i 0.01 -W 1 -p a5 {peer}"))?;
            let after = Nstat::read(&b.ns)?;
            let errors = after.since(&before, &format!("{prefix}InCsumErrors"))?;
            let stats = injector.stats()?;
            let corrupted = stats.rule("noise")?.egress.corrupted_packets;
            ensure!(corrupted == PINGS, "{corrupted} of {PINGS} corrupted");
            let received = ping.stdout.contains(&format!("{PINGS} received"));
            let wrong = ping.stdout.contains("wrong data byte");
            // All 20 in the 16 bytes of 56 that are ping's time stamp: one run of 10^10.
            let as_asked = if checksum == "broken" {
                errors == PINGS && ping.stdout.contains(" 0 received")
            } else {
                errors == 0 && received && wrong
            };
            ensure!(
                as_asked,
                "{proto} {checksum}: {errors} errors, {}",
                ping.describe()
            );
            stats.lanes_lost_nothing()?;
            report(format!("{proto} {checksum}: {errors} checksum errors"));
            injector.heal("noise")?;
        }
    }
    Ok(())
}
