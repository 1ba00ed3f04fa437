//! A whole scenario from a seed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::model::{InForce, Phase, Scenario, Setup};

use super::{chance, pick, rules, traffic::Traffic, world::World};

/// A packet meets at most 16 rules in one direction. Rules drawn around conversations may all meet in
/// one packet, so there are fewer of them, and room for one of those that are for one peer alone.
const MOST_GENERAL_RULES: usize = 14;
const MOST_EXEMPTIONS: usize = 6;

/// Which packets a scenario may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limits {
    /// Those that `BPF_PROG_TEST_RUN` takes.
    TestRun,
    /// All.
    None,
}

/// The scenario of a seed, with about so many packets; its targets have slots from `first_slot` on.
#[must_use]
pub fn scenario(seed: u64, packets: usize, first_slot: u16, limits: Limits) -> Scenario {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let world = World::new(&mut rng, first_slot);
    let mut activation = 0;
    let mut setup = setup(&mut rng, &world, &mut activation);
    let mut traffic = Traffic::new(&world, rng.random());
    let count = if chance(&mut rng, 30) {
        rng.random_range(2..=3)
    } else {
        1
    };
    let mut phases = Vec::new();
    for index in 0..count {
        if index > 0 {
            change(&mut rng, &world, &mut setup, &mut activation);
        }
        let packets = (0..packets.div_ceil(count))
            .map(|_| {
                loop {
                    let packet = traffic.packet(&mut rng);
                    let fits = packet.fits_test_run(world.link(packet.target));
                    if fits || limits == Limits::None {
                        break packet;
                    }
                }
            })
            .collect();
        let lease_lapsed = chance(&mut rng, 4);
        phases.push(Phase {
            setup: setup.clone(),
            lease_lapsed,
            packets,
        });
    }
    Scenario { seed, phases }
}

fn setup(rng: &mut ChaCha8Rng, world: &World, activation: &mut u32) -> Setup {
    let count = rng.random_range(1..=MOST_GENERAL_RULES);
    let mut rules: Vec<InForce> = (0..count)
        .map(|_| {
            *activation += 1;
            rules::rule(rng, world, *activation)
        })
        .collect();
    if chance(rng, 5) {
        rules.extend(crowd(rng, world, activation));
    }
    let exempt = if chance(rng, 25) {
        (0..rng.random_range(1..=MOST_EXEMPTIONS))
            .map(|_| rules::exemption(rng, world))
            .collect()
    } else {
        Vec::new()
    };
    Setup {
        targets: world.targets.clone(),
        rules,
        exempt,
    }
}

/// Many rules, each for one peer of its own: more than one word of any bitmap.
fn crowd(rng: &mut ChaCha8Rng, world: &World, activation: &mut u32) -> Vec<InForce> {
    let mut peers = world.peers.clone();
    for index in 0..rng.random_range(20..250_u16) {
        peers.push(if index % 2 == 0 {
            IpAddr::V4(Ipv4Addr::from_bits(0xac10_0000 | u32::from(index)))
        } else {
            IpAddr::V6(Ipv6Addr::new(0xfd00, 0xbeef, 0, 0, 0, 0, 0, index))
        });
    }
    peers.sort_unstable();
    peers.dedup();
    // Those that packets go to are not all at one end.
    let turn = rng.random_range(0..peers.len());
    peers.rotate_left(turn);
    peers
        .into_iter()
        .map(|peer| {
            *activation += 1;
            rules::rule_for_peer(rng, world, *activation, peer)
        })
        .collect()
}

/// Takes rules away, changes some, brings new ones, changes the protect list.
fn change(rng: &mut ChaCha8Rng, world: &World, setup: &mut Setup, activation: &mut u32) {
    let general = |entry: &InForce| entry.activation as usize;
    setup.rules.retain(|_| !chance(rng, 20));
    let mut room = MOST_GENERAL_RULES.saturating_sub(setup.rules.len());
    for entry in &mut setup.rules {
        // A changed rule is a new activation, under the same name or not.
        if chance(rng, 20) && general(entry) <= MOST_GENERAL_RULES {
            *activation += 1;
            let mut fresh = rules::rule(rng, world, *activation);
            if chance(rng, 50) {
                fresh.rule.name.clone_from(&entry.rule.name);
            }
            *entry = fresh;
        }
    }
    while room > 0 && chance(rng, 60) {
        room -= 1;
        *activation += 1;
        setup.rules.push(rules::rule(rng, world, *activation));
    }
    if chance(rng, 50) {
        let turn = rng.random_range(0..setup.rules.len().max(1));
        setup.rules.rotate_left(turn);
    }
    if chance(rng, 20) {
        let count = pick(rng, &[0, 1, MOST_EXEMPTIONS]);
        setup.exempt = (0..count).map(|_| rules::exemption(rng, world)).collect();
    }
}
