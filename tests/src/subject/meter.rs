//! Nanoseconds a packet, from `BPF_PROG_TEST_RUN`, over the empty program of the same object.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use injector::dataplane::{DataPlane, LinkKind, TargetConfig, TargetSlot};

use super::many::{FREE_PORT, Size, peer};
use crate::lab::frame::{Layer4, Packet};

/// `TC_ACT_UNSPEC` (`include/uapi/linux/pkt_cls.h`): the packet goes on.
pub const PASSED: u32 = u32::MAX;
/// `TC_ACT_STOLEN`: it is cut.
pub const CUT: u32 = 4;
/// The target of a test run, whose `tc_classid` is 0.
pub const TARGET: TargetSlot = TargetSlot(0);
/// A target that no test run is at.
pub const ELSEWHERE: TargetSlot = TargetSlot(1);

const LOCAL: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// Runs of one packet that the kernel takes the mean of.
const REPEAT: u32 = 100_000;
/// Such means, taken in turns with those of the empty program; their median counts.
const ROUNDS: usize = 3;

/// What was measured of a packet, in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// A run of the empty program, with what the test run itself takes.
    pub empty: f64,
    /// What ours takes longer.
    pub over: f64,
}

/// Loaded programs, and rule sets of any size to measure them with.
pub struct Meter {
    plane: DataPlane,
    next_activation: u32,
}

impl Meter {
    /// Takes a data plane. Its lease lasts for ever.
    #[must_use]
    pub fn new(plane: DataPlane) -> Self {
        plane.lease().renew(u64::MAX);
        Self {
            plane,
            next_activation: 1,
        }
    }

    /// Puts no rule in force.
    pub fn clear(&mut self) -> Result<()> {
        self.plane.commit(&[], &[], &[])?;
        Ok(())
    }

    /// Puts a rule set in force; returns how long that took in milliseconds.
    pub fn commit(&mut self, size: Size, target: TargetSlot) -> Result<f64> {
        let rules = size.rules(target, self.next_activation)?;
        self.next_activation += u32::try_from(size.rules)?;
        let targets = [TARGET, ELSEWHERE].map(|slot| TargetConfig {
            slot,
            link: LinkKind::Ethernet,
            loopback: false,
            ifindex: 0,
            lane: None,
        });
        let commit = self.plane.commit(&targets, &rules, &[])?;
        Ok((commit.prepared + commit.settled).as_secs_f64() * 1e3)
    }

    /// A packet that is run many times, so that its flow is known. Fails if its fate is not `expected`.
    pub fn repeated(&self, frame: &[u8], expected: u32) -> Result<Cost> {
        let (mut empty, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            empty.push(self.run("injector_empty", frame, REPEAT, PASSED)?);
            ours.push(self.run("injector_egress", frame, REPEAT, expected)?);
        }
        Ok(Cost::of(&empty, &ours))
    }

    /// First packets, of flows from these ports to a peer of the rules that meet none of them. Each can be
    /// run only once, since by the second its flow is known; that takes the clock and cold caches into the
    /// bargain, for the empty program too.
    pub fn once(&self, ports: std::ops::Range<u16>) -> Result<Cost> {
        let (mut empty, mut ours) = (Vec::new(), Vec::new());
        for port in ports {
            let frame = frame(peer(0), FREE_PORT, port);
            empty.push(self.run("injector_empty", &frame, 1, PASSED)?);
            ours.push(self.run("injector_egress", &frame, 1, PASSED)?);
        }
        Ok(Cost::of(&empty, &ours))
    }

    fn run(&self, program: &'static str, frame: &[u8], repeat: u32, expected: u32) -> Result<f64> {
        let program: &SchedClassifier = self.plane.program(program)?;
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                repeat,
                ..TestRunOptions::new()
            })
            .context("BPF_PROG_TEST_RUN")?;
        ensure!(
            result.return_value == expected,
            "the program returned {:#x} where {expected:#x} was due: what was measured is not what was meant",
            result.return_value
        );
        Ok(result.duration.as_secs_f64() * 1e9)
    }
}

impl Cost {
    fn of(empty: &[f64], ours: &[f64]) -> Self {
        let empty = median(empty);
        Self {
            empty,
            over: median(ours) - empty,
        }
    }
}

/// A UDP packet to a peer.
#[must_use]
pub fn frame(to: Ipv4Addr, port: u16, from_port: u16) -> Vec<u8> {
    Packet::new(LOCAL, to, Layer4::Udp(from_port, port)).frame(0)
}

/// The middle one of some values; the upper one of two. Zero of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}
