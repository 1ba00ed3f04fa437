//! Random scenarios, everyone side by side.

use std::time::Instant;

use anyhow::{Context as _, bail};
use libtest_mimic::{Completion, Failed, Trial};
use tests::{
    generate::{Limits, scenario},
    model::{Comparison, Subject, compare, minimise},
};

use crate::subjects::{Entry, OTHERS};

/// Scenarios of one run, each of [`PACKETS`] packets: more than 200,000 packets. Ten times as many with
/// `--full`.
const SCENARIOS: u64 = 2600;
const PACKETS: usize = 80;
const WANTED_PACKETS: u64 = 200_000;
/// Seeds are consecutive from here.
const SEED: u64 = 20_261_123;

fn number(variable: &str, otherwise: u64) -> anyhow::Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{variable}={text} is not a number")),
        Err(_) => Ok(otherwise),
    }
}

/// All subjects against the model, and those that need no kernel also with packets that
/// `BPF_PROG_TEST_RUN` refuses.
pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for half in [Half::First, Half::Second] {
        if !OTHERS.is_empty() {
            let name = format!("random::everyone, {}", half.words());
            trials.push(Trial::ignorable_test(name, move || {
                run(OTHERS, Limits::TestRun, half)
            }));
        }
        for entry in OTHERS {
            let limits = if entry.needs_test_run {
                Limits::TestRun
            } else {
                Limits::None
            };
            let one = std::slice::from_ref(entry);
            let name = format!("random::{}, {}", entry.name, half.words());
            trials.push(Trial::ignorable_test(name, move || run(one, limits, half)));
        }
    }
    trials
}

/// Half of the scenarios: the halves run beside each other.
#[derive(Debug, Clone, Copy)]
enum Half {
    First,
    Second,
}

impl Half {
    const fn words(self) -> &'static str {
        match self {
            Self::First => "first half",
            Self::Second => "second half",
        }
    }

    /// Its part of so many.
    fn of(self, count: u64) -> std::ops::Range<u64> {
        let middle = count.div_ceil(2);
        match self {
            Self::First => 0..middle,
            Self::Second => middle..count,
        }
    }
}

fn run(entries: &[Entry], limits: Limits, half: Half) -> Result<Completion, Failed> {
    for entry in entries {
        if let Some(reason) = (entry.missing)() {
            return Ok(Completion::ignored_with(reason));
        }
    }
    side_by_side(entries, limits, half).map_err(|error| format!("{error:#}"))?;
    Ok(Completion::Completed)
}

fn side_by_side(entries: &[Entry], limits: Limits, half: Half) -> anyhow::Result<()> {
    let mut subjects = Vec::new();
    for entry in entries {
        subjects.push((entry.make)().with_context(|| format!("making {}", entry.name))?);
    }
    let mut subjects: Vec<&mut dyn Subject> = subjects
        .iter_mut()
        .map(|subject| &mut **subject as &mut dyn Subject)
        .collect();

    let seed = number("INJECTOR_PROGRAM_SEED", SEED)?;
    let scenarios = number(
        "INJECTOR_PROGRAM_SCENARIOS",
        SCENARIOS * u64::from(tests::thoroughness()),
    )?;
    let began = Instant::now();
    let mut all = Comparison::default();
    let numbers = half.of(scenarios);
    for seed in numbers.clone().map(|number| seed + number) {
        let scenario = scenario(seed, PACKETS, 1, limits);
        let result = compare(&mut subjects, &scenario)?;
        if let Some(difference) = &result.difference {
            let (small, found) = minimise(&mut subjects, &scenario, difference)?;
            bail!(
                "seed {seed}: {difference}\n\nsmallest scenario found: {found}\n{small}\n\
                 to see it again: INJECTOR_PROGRAM_SEED={seed} INJECTOR_PROGRAM_SCENARIOS=1"
            );
        }
        all += result;
    }
    println!(
        "{} packets of {} scenarios with {} rules in {:.1} s: no difference; \
         {} matched, {} cut, {} answered, {} unparsed, {} orphan fragments",
        all.packets,
        numbers.end - numbers.start,
        all.rules,
        began.elapsed().as_secs_f64(),
        all.matched,
        all.cut,
        all.answered,
        all.unparsed,
        all.orphans
    );
    let wanted = WANTED_PACKETS * (numbers.end - numbers.start) / SCENARIOS;
    if scenarios >= SCENARIOS && all.packets < wanted {
        bail!(
            "only {} packets were compared, not {wanted}: {all:?}",
            all.packets
        );
    }
    // A comparison of packets that nothing matches proves nothing.
    if scenarios >= SCENARIOS
        && (all.cut * 8 < all.packets
            || all.answered * 40 < all.packets
            || all.unparsed * 50 < all.packets)
    {
        bail!("the scenarios exercise too little: {all:?}");
    }
    Ok(())
}
