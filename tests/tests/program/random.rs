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
    if !OTHERS.is_empty() {
        trials.push(Trial::ignorable_test("random::everyone", || {
            run(OTHERS, Limits::TestRun)
        }));
    }
    for entry in OTHERS {
        let limits = if entry.needs_test_run {
            Limits::TestRun
        } else {
            Limits::None
        };
        let one = std::slice::from_ref(entry);
        let name = format!("random::{}", entry.name);
        trials.push(Trial::ignorable_test(name, move || run(one, limits)));
    }
    trials
}

fn run(entries: &[Entry], limits: Limits) -> Result<Completion, Failed> {
    for entry in entries {
        if let Some(reason) = (entry.missing)() {
            return Ok(Completion::ignored_with(reason));
        }
    }
    side_by_side(entries, limits).map_err(|error| format!("{error:#}"))?;
    Ok(Completion::Completed)
}

fn side_by_side(entries: &[Entry], limits: Limits) -> anyhow::Result<()> {
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
    for seed in seed..seed + scenarios {
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
        "{} packets of {scenarios} scenarios with {} rules in {:.1} s: no difference; \
         {} matched, {} cut, {} answered, {} unparsed, {} orphan fragments",
        all.packets,
        all.rules,
        began.elapsed().as_secs_f64(),
        all.matched,
        all.cut,
        all.answered,
        all.unparsed,
        all.orphans
    );
    if scenarios >= SCENARIOS && all.packets < WANTED_PACKETS {
        bail!(
            "only {} packets were compared, not {WANTED_PACKETS}: {all:?}",
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
