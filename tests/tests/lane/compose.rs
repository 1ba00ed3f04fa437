//! Faults together, in one rule and in several on one interface: each packet meets exactly what each of them draws
//! for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use injector::{dataplane::distribution::quantile, rules::shaping::Distribution};
use libtest_mimic::Trial;
use tests::{
    lab::{
        frame::{ETH_IPV4, ETH_IPV6},
        lent::Lent,
        packet_socket::{Capture, Frame},
        timed::{Timed, delays, median, milliseconds},
        topology::{Lab, Node},
        transcript::report,
        trial::{Need, trial},
        udp::socket,
    },
    model::{
        datagram::{Choice, turn},
        line::Stream,
    },
};

use crate::corrupt::{self, Asked, content, corrupt_udp};

pub(crate) fn tests() -> Vec<Trial> {
    const NEEDS: &[Need] = &[Need::Root, Need::Injector];
    vec![
        trial("compose::faults_in_one_rule", NEEDS, faults_in_one_rule),
        trial("compose::several_rules", NEEDS, several_rules),
        trial("compose::five_on_a_line", NEEDS, five_on_a_line),
        trial(
            "compose::no_packet_waits_for_its_copies",
            NEEDS,
            no_packet_waits_for_its_copies,
        ),
        trial(
            "compose::copies_without_their_packet_keep_order",
            NEEDS,
            copies_without_their_packet_keep_order,
        ),
    ]
}

const SEED: u64 = 77;
/// Sent one by one, then as many again in super-packets.
const SINGLE: u32 = 250;
const SEGMENTS: u32 = 25;

/// One rule: its faults as they are written, and as the model takes them.
struct Rule {
    name: &'static str,
    faults: &'static str,
    loss: f64,
    duplicate: f64,
    copies: usize,
    delay_ms: f64,
    reorder: f64,
    hold_ms: f64,
}

/// The way that packets go, seen from the target.
#[derive(Clone, Copy)]
struct Way {
    egress: bool,
    v6: bool,
}

fn faults_in_one_rule() -> Result<()> {
    const ALL: Rule = Rule {
        name: "all",
        faults: "--delay 20ms --loss 10% --duplicate 15% --copies 2 --reorder 8% --hold 300ms",
        loss: 0.1,
        duplicate: 0.15,
        copies: 2,
        delay_ms: 20.0,
        reorder: 0.08,
        hold_ms: 300.0,
    };
    for (egress, v6) in [(true, false), (false, true)] {
        must_compose(&[ALL], Way { egress, v6 })?;
    }
    Ok(())
}

/// Several duplicate, which netem refuses on some kernels (`check_netem_in_tree`, `net/sched/sch_netem.c`): its copies
/// enter again at the root.
fn several_rules() -> Result<()> {
    const RULES: [Rule; 3] = [
        Rule {
            name: "one",
            faults: "--loss 5% --duplicate 10% --delay 10ms",
            loss: 0.05,
            duplicate: 0.1,
            copies: 1,
            delay_ms: 10.0,
            reorder: 0.0,
            hold_ms: 0.0,
        },
        Rule {
            name: "two",
            faults: "--loss 10% --duplicate 20% --copies 2",
            loss: 0.1,
            duplicate: 0.2,
            copies: 2,
            delay_ms: 0.0,
            reorder: 0.0,
            hold_ms: 0.0,
        },
        Rule {
            name: "three",
            faults: "--reorder 10% --hold 300ms --delay 20ms",
            loss: 0.0,
            duplicate: 0.0,
            copies: 0,
            delay_ms: 20.0,
            reorder: 0.1,
            hold_ms: 300.0,
        },
    ];
    for (egress, v6) in [(true, true), (false, false)] {
        must_compose(&RULES, Way { egress, v6 })?;
    }
    netem_beside()
}

/// Whether netem takes two of itself that duplicate.
fn netem_beside() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let ns = &lab.a().ns;
    ns.tool("tc qdisc add dev eth0 root handle 1: netem duplicate 10%")?;
    let second = ns.try_tool("tc qdisc add dev eth0 parent 1: handle 2: netem duplicate 20%")?;
    report(match second.code() {
        Some(0) => "netem: takes two that duplicate".to_owned(),
        _ => format!(
            "netem: refuses a second one that duplicates: {}",
            second.stderr.trim()
        ),
    });
    Ok(())
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fate {
    /// How often it arrives.
    arrives: usize,
    /// Whether the original is held back, and its copies are not.
    held: bool,
}

fn fate(rules: &[(&Rule, Stream)], n: u64) -> Option<Fate> {
    if rules
        .iter()
        .any(|(rule, stream)| stream.loses(n, rule.loss))
    {
        return None;
    }
    let copies: usize = rules
        .iter()
        .filter(|(rule, stream)| stream.duplicates(n, rule.duplicate))
        .map(|(rule, _)| rule.copies)
        .sum();
    Some(Fate {
        arrives: 1 + copies,
        held: rules
            .iter()
            .any(|(rule, stream)| stream.holds_back(n, rule.reorder)),
    })
}

fn must_compose(rules: &[Rule], way: Way) -> Result<()> {
    const COUNT: u32 = 2 * SINGLE;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for rule in rules {
        let direction = if way.egress { "egress" } else { "ingress" };
        injector.add(&format!(
            "{} --netns {} --iface eth0 --direction {direction} --proto udp --dst-port 7000 {} --seed {SEED}",
            rule.name,
            a.netns(),
            rule.faults
        ))?;
    }
    let path = path(a, b, way)?;
    let rules: Vec<(&Rule, Stream)> = rules
        .iter()
        .map(|rule| {
            let stream = Stream::of_udp(SEED, rule.name, path.ends, way.egress);
            (rule, stream)
        })
        .collect();
    let fates: BTreeMap<u32, Fate> = (1..=COUNT)
        .filter_map(|n| Some((n, fate(&rules, n.into())?)))
        .collect();
    let sent = path.send(1..=SINGLE, Duration::from_micros(500))?;
    path.send_super_packets(SINGLE + 1..=COUNT, SEGMENTS as usize, 1000)?;
    let arrived = path.receive(
        fates.values().map(|fate| fate.arrives).sum(),
        Duration::from_millis(50),
        Duration::from_secs(20),
    )?;
    let mut times: BTreeMap<u32, usize> = BTreeMap::new();
    for one in &arrived {
        *times.entry(one.number).or_default() += 1;
    }
    for n in 1..=COUNT {
        let (found, drawn) = (times.get(&n), fates.get(&n).map(|fate| fate.arrives));
        ensure!(
            found == drawn.as_ref(),
            "packet {n} arrived {found:?} times, drawn {:?}",
            fates.get(&n)
        );
    }
    let least: f64 = rules.iter().map(|(rule, _)| rule.delay_ms).sum();
    let longer: f64 = rules.iter().map(|(rule, _)| rule.hold_ms).sum();
    let single: Vec<_> = arrived
        .iter()
        .filter(|one| one.number <= SINGLE)
        .copied()
        .collect();
    let taken = delays(&sent, &single);
    ensure!(
        taken.iter().all(|delay| *delay >= least),
        "delays do not add up to {least} ms: {taken:?}"
    );
    // As many copies of a packet came so late as were held back: the original, or none.
    let mut late: BTreeMap<u32, usize> = BTreeMap::new();
    for (one, delay) in single.iter().zip(&taken) {
        if *delay >= least + longer {
            *late.entry(one.number).or_default() += 1;
        }
    }
    let held: BTreeSet<u32> = fates
        .iter()
        .filter(|(n, fate)| **n <= SINGLE && fate.held)
        .map(|(n, _)| *n)
        .collect();
    ensure!(
        late.keys().eq(&held) && late.values().all(|count| *count == 1),
        "held back {late:?}, drawn {held:?}"
    );
    let stats = injector.stats()?;
    for (rule, stream) in &rules {
        let found = stats.rule(rule.name)?;
        let count = |drawn: &dyn Fn(u64) -> bool| {
            (1..=u64::from(COUNT)).filter(|n| drawn(*n)).count() as u64
        };
        // Every rule counts and decides for itself, whatever the others do; but what is lost is not held back.
        ensure!(
            found.both(|one| one.matched_packets) == u64::from(COUNT)
                && found.both(|one| one.lost_packets) == count(&|n| stream.loses(n, rule.loss))
                && found.both(|one| one.copies)
                    == count(&|n| stream.duplicates(n, rule.duplicate)) * rule.copies as u64
                && found.both(|one| one.reordered_packets)
                    <= count(&|n| stream.holds_back(n, rule.reorder)),
            "{found:?}"
        );
    }
    report(format!(
        "egress {}, IPv6 {}: of {COUNT} {} lost, {} arrived, {} of {SINGLE} held back, as drawn",
        way.egress,
        way.v6,
        COUNT as usize - fates.len(),
        arrived.len(),
        held.len()
    ));
    stats.lanes_lost_nothing()
}

fn path(a: &Node, b: &Node, way: Way) -> Result<Timed> {
    let (from, to) = if way.egress { (a, b) } else { (b, a) };
    if way.v6 {
        Timed::v6(from, 6000, to, 7000)
    } else {
        Timed::v4(from, 6000, to, 7000)
    }
}

/// Faults of one rule with a line, and what its arithmetic needs of them besides.
struct Five {
    asked: Asked,
    delay_ms: f64,
    jitter_ms: f64,
}

/// Of the line of [`Five`]: a frame of 742 bytes takes 5.9 ms.
const BITS_PER_SECOND: f64 = 1e6;

/// Bytes of a datagram, of which its frame has 42 more, and how long that takes on a line of 64 kbit/s.
const DATAGRAM: usize = 1000;
const LINE_MS: f64 = 1042.0 * 8.0 / 64.0;

/// A packet whose flow has nothing else in the queue leaves when it is through the line, its copies when they are: were
/// they queued before it, fq would let it wait for them.
fn no_packet_waits_for_its_copies() -> Result<()> {
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for (direction, from, to) in [("--to", a, b), ("--from", b, a)] {
        injector.add(&format!(
            "twice --netns {} --iface eth0 {direction} {} --proto udp --rate 64kbit --queue 10s --duplicate 100% \
             --copies 2",
            a.netns(),
            b.v4
        ))?;
        let path = Timed::v4(from, 6000, to, 7000)?;
        for number in 1..=3 {
            let sent = path.send_sized([number], DATAGRAM, Duration::ZERO)?;
            let arrived = path.receive(3, Duration::from_millis(20), Duration::from_secs(10))?;
            let taken = delays(&sent, &arrived);
            for (times, taken) in (1..).zip(&taken) {
                let asked = LINE_MS * f64::from(times);
                ensure!(
                    (asked - 1.0..asked + LINE_MS / 2.0).contains(taken),
                    "{direction}: number {times} took {taken} ms, asked {asked}"
                );
            }
            ensure!(taken.len() == 3, "{taken:?}");
        }
        injector.heal("twice")?;
    }
    injector.stats()?.lanes_lost_nothing()
}

/// The second of two lines often has no room for a packet, and again when its copy comes through the first: that keeps
/// the flow's order, too.
fn copies_without_their_packet_keep_order() -> Result<()> {
    const COUNT: u32 = 60;
    let lab = Lab::steady_pair()?;
    let (a, b) = (lab.a(), lab.b());
    a.make_clsact()?;
    let injector = Lent::new()?;
    for rule in [
        "one --rate 1mbit --queue 10s --duplicate 100%",
        "two --rate 700kbit --queue 1p",
        "three --delay 100ms --jitter 60ms",
    ] {
        let (name, faults) = rule.split_once(' ').context("a rule without faults")?;
        injector.add(&format!(
            "{name} --netns {} --iface eth0 --to {} --proto udp {faults} --seed {SEED}",
            a.netns(),
            b.v4
        ))?;
    }
    let path = Timed::v4(a, 6000, b, 7000)?;
    path.send_sized(1..=COUNT, DATAGRAM, Duration::ZERO)?;
    let arrived = path.receive(1, Duration::from_secs(1), Duration::from_secs(20))?;
    let numbers: Vec<u32> = arrived.iter().map(|one| one.number).collect();
    let stats = injector.stats()?;
    // Of both that come in a row the line takes one at the most.
    let lonely = stats.rule("two")?.egress.overflow_packets;
    report(format!(
        "{} of {} arrived, {lonely} found no room",
        numbers.len(),
        2 * COUNT
    ));
    ensure!(
        lonely > 0 && numbers.len() > 10 && numbers.is_sorted(),
        "order was not kept: {numbers:?}, {lonely} found no room"
    );
    stats.lanes_lost_nothing()
}

/// Delay, rate, loss, duplicate and corrupt in one rule: the bits, the numbers, and the time of each arrival, by the
/// order of the stages. A constant delay is the same in front of the line and behind it; a drawn one is not.
fn five_on_a_line() -> Result<()> {
    const REPAIRED: Choice = Choice {
        repairable: true,
        ..corrupt::ANY
    };
    const CONSTANT: Asked = Asked {
        words: "--corrupt 50% --bits 2 --checksum repaired --loss 20% --duplicate 30% --rate 1mbit --queue 10s \
                --delay 100ms",
        egress: true,
        v6: false,
        corrupt: 0.5,
        bits: 2,
        choice: REPAIRED,
        loss: 0.2,
        duplicate: 0.3,
    };
    const DRAWN: Asked = Asked {
        words: "--corrupt 50% --bits 2 --checksum repaired --loss 20% --duplicate 30% --rate 1mbit --queue 10s \
                --delay 100ms --jitter 60ms",
        ..CONSTANT
    };
    let lab = Lab::steady_pair()?;
    lab.a().make_clsact()?;
    let injector = Lent::new()?;
    for (egress, v6) in [(true, false), (false, true)] {
        for (asked, jitter_ms) in [(CONSTANT, 0.0), (DRAWN, 60.0)] {
            let five = Five {
                asked: Asked {
                    egress,
                    v6,
                    ..asked
                },
                delay_ms: 100.0,
                jitter_ms,
            };
            five.must_hold(&injector, &lab)
                .with_context(|| format!("egress {egress}, IPv6 {v6}, jitter {jitter_ms} ms"))?;
        }
    }
    Ok(())
}

/// In which order a packet meets its faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stages {
    /// Loss, copies, line, delay.
    AsDocumented,
    /// What is lost takes its time on the line.
    LossBehindTheLine,
    /// Copies do not.
    CopiesBesideTheLine,
    /// The line is the last.
    DelayBeforeTheLine,
}

impl Five {
    /// How long a frame is on the line, in milliseconds.
    fn line_ms(&self) -> f64 {
        let bytes = u32::try_from(14 + self.asked.datagram().length()).unwrap_or(u32::MAX);
        f64::from(bytes) * 8e3 / BITS_PER_SECOND
    }

    /// When packets that were sent at these times leave, in the order of their numbers, each before its copy.
    fn leave(&self, stages: Stages, sent_ms: &[f64], stream: &Stream) -> Vec<(u32, f64)> {
        let mut line = f64::MIN;
        // Order is kept.
        let mut latest = f64::MIN;
        let mut leave = Vec::new();
        for (number, &sent) in (1..).zip(sent_ms) {
            let n = u64::from(number);
            if stream.loses(n, self.asked.loss) {
                if stages == Stages::LossBehindTheLine {
                    line = line.max(sent) + self.line_ms();
                }
                continue;
            }
            let delay =
                self.delay_ms + self.jitter_ms * quantile(&Distribution::Uniform, stream.delay(n));
            if stages == Stages::DelayBeforeTheLine {
                latest = latest.max(sent + delay);
                line = line.max(latest) + self.line_ms();
                leave.push((number, line));
            } else {
                line = line.max(sent) + self.line_ms();
                latest = latest.max(line + delay);
                leave.push((number, latest));
            }
            if stream.duplicates(n, self.asked.duplicate) {
                let behind = if stages == Stages::CopiesBesideTheLine {
                    0.0
                } else {
                    line += self.line_ms();
                    self.line_ms()
                };
                // A copy is not overtaken either.
                latest = leave.last().map_or(0.0, |(_, at)| *at) + behind;
                leave.push((number, latest));
            }
        }
        leave
    }

    fn must_hold(&self, injector: &Lent, lab: &Lab) -> Result<()> {
        let asked = &self.asked;
        let (from, to) = corrupt_udp(injector, lab, asked.egress, asked.v6, asked.words)?;
        let (source, target, ethertype) = if asked.v6 {
            (from.at6(6000), to.at6(7000), ETH_IPV6)
        } else {
            (from.at(6000), to.at(7000), ETH_IPV4)
        };
        let capture = Capture::open_stamped(&to.ns, ethertype)?;
        let stream = Stream::of_udp(corrupt::SEED, "noise", (source, target), asked.egress);
        let expected = asked.expected(&stream);
        let sent = corrupt::send(&socket(&from.ns, source)?, target)?;
        let frames = self.numbered(
            &capture.frames_to(to.mac, expected.len(), corrupt::QUIET, corrupt::WITHIN)?,
            &expected,
        )?;
        let numbers: Vec<u32> = frames.iter().map(|(number, _)| *number).collect();
        ensure!(numbers.is_sorted(), "order was not kept: {numbers:?}");
        let bytes: Vec<Vec<u8>> = frames
            .iter()
            .map(|(_, frame)| frame.bytes.clone())
            .collect();
        corrupt::check(asked, &bytes, &expected, (from, to))?;

        let began = sent.first().map_or(0, |[before, _]| *before);
        let since = |at_ns: i64| milliseconds(at_ns - began);
        let arrived = frames
            .iter()
            .map(|(number, frame)| {
                let at_ns = frame.at_ns.context("a frame came without its time")?;
                Ok((*number, since(at_ns)))
            })
            .collect::<Result<Vec<_>>>()?;
        let due = |stages| {
            // Each was decided while it was sent, and a later one never makes another earlier.
            [0, 1].map(|end| {
                let at: Vec<f64> = sent.iter().map(|times| since(times[end])).collect();
                self.leave(stages, &at, &stream)
            })
        };
        let (soonest, late) = compare(&arrived, &due(Stages::AsDocumented))?;
        let least = self.delay_ms - self.jitter_ms + self.line_ms();
        ensure!(
            arrived.iter().all(|(_, at)| *at >= least - CLOCKS_MS),
            "a packet came sooner than after {least} ms: {arrived:?}"
        );
        for wrong in [
            Stages::LossBehindTheLine,
            Stages::CopiesBesideTheLine,
            Stages::DelayBeforeTheLine,
        ] {
            let passes = compare(&arrived, &due(wrong)).is_ok();
            let same = wrong == Stages::DelayBeforeTheLine && self.jitter_ms == 0.0;
            ensure!(passes == same, "{wrong:?} passes for what is documented");
        }
        self.must_count(injector, &stream, &expected)?;
        report(format!(
            "egress {}, IPv6 {}, jitter {} ms: {} arrived, bit by bit as drawn, {soonest:.3} ms at the soonest and \
             {late:.3} ms in the median after they were due",
            asked.egress,
            asked.v6,
            self.jitter_ms,
            arrived.len()
        ));
        injector.heal("noise")
    }

    /// The frames with their numbers, which the payloads tell once the drawn bits are turned back.
    fn numbered(
        &self,
        frames: &[Frame],
        expected: &[(u32, BTreeSet<usize>)],
    ) -> Result<Vec<(u32, Frame)>> {
        let headers = self.asked.datagram().headers();
        let payloads: BTreeMap<Vec<u8>, u32> = expected
            .iter()
            .map(|(number, flips)| {
                let mut packet = vec![0; headers];
                packet.extend(content(*number));
                for position in flips {
                    turn(&mut packet, *position);
                }
                (packet.split_off(headers), *number)
            })
            .collect();
        frames
            .iter()
            .map(|frame| {
                let payload = &frame.bytes[corrupt::LINK + headers..];
                let number = payloads
                    .get(payload)
                    .with_context(|| format!("other bits were turned over: {payload:x?}"))?;
                Ok((*number, frame.clone()))
            })
            .collect()
    }

    fn must_count(
        &self,
        injector: &Lent,
        stream: &Stream,
        expected: &[(u32, BTreeSet<usize>)],
    ) -> Result<()> {
        let asked = &self.asked;
        let survivors: BTreeSet<u32> = expected.iter().map(|(number, _)| *number).collect();
        let corrupted: BTreeSet<u32> = expected
            .iter()
            .filter(|(_, flips)| !flips.is_empty())
            .map(|(number, _)| *number)
            .collect();
        let copies = (1..=corrupt::COUNT.into())
            .filter(|n| stream.duplicates(*n, asked.duplicate))
            .count();
        // Of these the bits of the copies tell when they were made.
        let alike = expected
            .windows(2)
            .filter(|pair| pair[0] == pair[1] && !pair[0].1.is_empty())
            .count();
        ensure!(alike > 0, "no corrupted packet has a copy");
        let stats = injector.stats()?;
        let rule = stats.rule("noise")?;
        let packets = u64::from(corrupt::COUNT);
        // A line is busy with each for as long as it takes, rounded down to a nanosecond.
        let busy = Duration::from_nanos(rule.both(|one| one.busy_ns)).as_secs_f64() * 1e3;
        let on_the_line = f64::from(u32::try_from(expected.len())?) * self.line_ms();
        ensure!(
            rule.both(|one| one.matched_packets) == packets
                && rule.both(|one| one.lost_packets) == packets - survivors.len() as u64
                && rule.both(|one| one.copies) == copies as u64
                && rule.both(|one| one.corrupted_packets) == corrupted.len() as u64
                && rule.both(|one| one.queued_packets) == expected.len() as u64
                && rule.both(|one| one.overflow_packets) == 0
                && (busy - on_the_line).abs() < 0.01,
            "{} on the line for {on_the_line} ms, {} of them survivors: {rule:?}",
            expected.len(),
            survivors.len()
        );
        stats.lanes_lost_nothing()
    }
}

/// By how much the clocks of departure and arrival may differ over a second or two.
const CLOCKS_MS: f64 = 0.5;
/// Later than the soonest by at most so much in the median: a machine that stalls before it decides the first packet
/// shifts all of them.
const LATE_MS: f64 = 25.0;

/// Compares arrivals with when they were due at the soonest and at the latest: by how much the soonest and the median
/// one was after that.
fn compare(arrived: &[(u32, f64)], due: &[Vec<(u32, f64)>; 2]) -> Result<(f64, f64)> {
    let after = due.each_ref().map(|due| {
        arrived
            .iter()
            .zip(due)
            .map(|((_, at), (_, due))| at - due)
            .collect::<Vec<f64>>()
    });
    let soonest = after[0].iter().copied().fold(f64::MAX, f64::min);
    let late = median(&after[1]);
    ensure!(
        arrived.len() == due[0].len() && soonest >= -CLOCKS_MS && late - soonest < LATE_MS,
        "of {} due {} arrived, {soonest} ms at the soonest and {late} ms in the median after their times",
        due[0].len(),
        arrived.len()
    );
    Ok((soonest, late))
}
