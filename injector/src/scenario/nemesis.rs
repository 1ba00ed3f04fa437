//! The nemesis: a random sequence of faults, drawn from the seed out of a weighted set. What was drawn is ordinary
//! steps: a dry run and the log show it, and the same seed draws it again.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    draw::Draw,
    file::{Kill, OneOrMany, Partition, Period, Processes, Step},
    shape::{OneWay, Shape},
    vocabulary::{Context, Profile, within},
};
use crate::rules::Problem;

/// Most faults that a nemesis may come to.
const MAX_FAULTS: usize = 1_000;

/// A random sequence of faults, one at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nemesis {
    /// The faults.
    pub faults: Vec<Weighted>,
    /// How long it goes on.
    pub over: Period,
    /// The mean time between faults, which is distributed exponentially.
    #[serde(default = "gap")]
    pub gap: Period,
    /// How long a fault lasts at least.
    #[serde(default = "shortest")]
    pub shortest: Period,
    /// How long it lasts at most; all times between are equally likely.
    #[serde(default = "longest")]
    pub longest: Period,
    /// Among these hosts: partitions are of them, profiles befall one of them, a majority is one of them. All hosts
    /// where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
    /// A majority of the hosts is never touched by crashes and pauses, and never without each other by a partition.
    #[serde(default)]
    pub keep_majority: bool,
}

fn gap() -> Period {
    Period::secs(5)
}

fn shortest() -> Period {
    Period::secs(2)
}

fn longest() -> Period {
    Period::secs(10)
}

/// A fault that can be drawn: exactly one of its kinds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Weighted {
    /// How likely it is beside the others; 1 where absent.
    pub weight: Option<u32>,
    /// A partition of this shape.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<Shape>,
    /// With a partition: it is in one direction only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_way: Option<OneWay>,
    /// Services are paused: some of these, drawn each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause: Option<OneOrMany>,
    /// Services are killed, and started again when the fault is over: some of these, drawn each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kill: Option<OneOrMany>,
    /// A profile, at one host that is drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
}

/// Draws the sequence.
pub fn expand(nemesis: &Nemesis, context: &Context<'_>) -> Result<Step, Problem> {
    check(nemesis, context)?;
    let mut draw = Draw::new(context.seed);
    let weights: Vec<u32> = nemesis
        .faults
        .iter()
        .map(|fault| fault.weight.unwrap_or(1))
        .collect();
    let (over, mean) = (nemesis.over.0, nemesis.gap.0.as_secs_f64());
    let (shortest, longest) = (nemesis.shortest.0, nemesis.longest.0);
    let mut gone = Duration::ZERO;
    let mut steps = Vec::new();
    loop {
        let gap = milliseconds(Duration::try_from_secs_f64(draw.exponential(mean)).unwrap_or(over));
        let lasts = milliseconds(shortest + longest.saturating_sub(shortest).mul_f64(draw.unit()));
        let drawn = draw.weighted(&weights);
        if gone + gap + lasts > over {
            break;
        }
        if steps.len() >= 2 * MAX_FAULTS {
            return Err(Problem::new(
                format!("a nemesis comes to more than {MAX_FAULTS} faults"),
                "a longer 'gap', longer faults, or a shorter 'over'",
            ));
        }
        gone += gap + lasts;
        steps.push(within(Step {
            wait: Some(Period(gap)),
            ..Step::default()
        }));
        if let Some(fault) = nemesis.faults.get(drawn) {
            steps.push(within(one(nemesis, fault, lasts, context, &mut draw)));
        }
    }
    steps.push(within(Step {
        wait: Some(Period(over.saturating_sub(gone))),
        ..Step::default()
    }));
    Ok(Step {
        sequence: Some(steps),
        ..Step::default()
    })
}

/// Times are drawn in whole milliseconds: they are read by people.
fn milliseconds(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

fn one(
    nemesis: &Nemesis,
    fault: &Weighted,
    lasts: Duration,
    context: &Context<'_>,
    draw: &mut Draw,
) -> Step {
    let lasts = Some(Period(lasts));
    if let Some(shape) = fault.partition {
        return Step {
            partition: Some(Partition {
                shape,
                hosts: nemesis.hosts.clone(),
                one_way: fault.one_way,
                ..Partition::default()
            }),
            lasts,
            // Whether hosts talk to each other just then is not the nemesis's to say.
            expect_effect: None,
            ..Step::default()
        };
    }
    if let Some(profile) = &fault.profile {
        let host = draw.choose(among(nemesis, context)).cloned();
        return Step {
            profile: Some(profile.clone()),
            on: host.map(OneOrMany::One),
            lasts,
            ..Step::default()
        };
    }
    let (names, pause) = match (&fault.pause, &fault.kill) {
        (Some(names), _) => (names, true),
        (None, Some(names)) => (names, false),
        (None, None) => return Step::default(),
    };
    let mut names = names.list().to_vec();
    draw.shuffle(&mut names);
    let most = if nemesis.keep_majority {
        names.len().min(minority(among(nemesis, context).len()))
    } else {
        names.len()
    };
    names.truncate(1 + draw.below(most.max(1)));
    let each = names.into_iter().map(|name| {
        within(if pause {
            Step {
                pause: Some(Processes {
                    service: Some(name),
                    ..Processes::default()
                }),
                lasts,
                ..Step::default()
            }
        } else {
            Step {
                kill: Some(Kill {
                    service: Some(name),
                    ..Kill::default()
                }),
                lasts,
                ..Step::default()
            }
        })
    });
    Step {
        parallel: Some(each.collect()),
        ..Step::default()
    }
}

/// The hosts that it is about.
fn among<'a>(nemesis: &'a Nemesis, context: &'a Context<'_>) -> &'a [String] {
    nemesis.hosts.as_deref().unwrap_or(context.hosts)
}

/// The most hosts that are no majority.
fn minority(count: usize) -> usize {
    count.saturating_sub(1) / 2
}

fn check(nemesis: &Nemesis, context: &Context<'_>) -> Result<(), Problem> {
    let wrong = |problem: &str, help: &str| Err(Problem::new(format!("nemesis: {problem}"), help));
    if nemesis.faults.iter().all(|fault| fault.weight == Some(0)) {
        return wrong(
            "there is no fault to draw",
            "faults: [{partition: isolate}, …]",
        );
    }
    if nemesis.shortest > nemesis.longest {
        return wrong(
            "'shortest' is longer than 'longest'",
            "shortest: 2s, longest: 10s",
        );
    }
    if nemesis.gap.0.is_zero() && nemesis.longest.0.is_zero() {
        return wrong(
            "neither faults nor the gaps between them take time",
            "gap: 5s",
        );
    }
    let among = among(nemesis, context);
    if let Some(host) = among.iter().find(|host| !context.hosts.contains(host)) {
        return wrong(
            &format!("there is no host '{host}'"),
            &format!("hosts: [{}]", context.hosts.join(", ")),
        );
    }
    for fault in &nemesis.faults {
        if fault.one_way.is_some() && fault.partition.is_none() {
            return wrong(
                "'one_way' is about a partition",
                "{partition: isolate, one_way: out}",
            );
        }
        let kinds = [
            fault.partition.is_some(),
            fault.pause.is_some(),
            fault.kill.is_some(),
            fault.profile.is_some(),
        ];
        if kinds.iter().filter(|&&kind| kind).count() != 1 {
            return wrong(
                "each of 'faults' is exactly one of: partition, pause, kill, profile",
                "{weight: 2, partition: isolate}",
            );
        }
        for service in [&fault.pause, &fault.kill]
            .into_iter()
            .flatten()
            .flat_map(OneOrMany::list)
        {
            if !context.services.iter().any(|(name, _)| name == service) {
                return wrong(
                    &format!("there is no service '{service}'"),
                    "services of the lab",
                );
            }
        }
        if [&fault.pause, &fault.kill]
            .into_iter()
            .flatten()
            .any(|names| names.list().is_empty())
        {
            return wrong(
                "'pause' and 'kill' name the services to draw from",
                "kill: [db1, db2]",
            );
        }
        if !nemesis.keep_majority {
            continue;
        }
        if matches!(
            fault.partition,
            Some(Shape::Halves | Shape::RandomHalves | Shape::Sides)
        ) && among.len().is_multiple_of(2)
        {
            return wrong(
                "two equal halves leave no majority, which 'keep_majority' asks for",
                "partition: majority_minority",
            );
        }
        if (fault.pause.is_some() || fault.kill.is_some()) && minority(among.len()) == 0 {
            return wrong(
                "with fewer than three hosts nothing can be paused or killed while a majority is kept",
                "three hosts, or no 'keep_majority'",
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICES: [&str; 5] = ["s1", "s2", "s3", "s4", "s5"];

    fn nemesis() -> Nemesis {
        let all = || Some(OneOrMany::Many(SERVICES.map(str::to_owned).to_vec()));
        Nemesis {
            faults: vec![
                Weighted {
                    weight: Some(3),
                    partition: Some(Shape::Isolate),
                    ..Weighted::default()
                },
                Weighted {
                    pause: all(),
                    ..Weighted::default()
                },
                Weighted {
                    weight: Some(0),
                    kill: all(),
                    ..Weighted::default()
                },
                Weighted {
                    kill: all(),
                    ..Weighted::default()
                },
            ],
            over: Period::secs(120),
            gap: Period::secs(5),
            shortest: Period::secs(1),
            longest: Period::secs(4),
            hosts: None,
            keep_majority: true,
        }
    }

    fn drawn(nemesis: &Nemesis, seed: u64) -> Vec<Step> {
        let hosts: Vec<String> = (1..=5).map(|number| format!("n{number}")).collect();
        let services: Vec<(String, String)> = SERVICES
            .iter()
            .zip(&hosts)
            .map(|(service, host)| ((*service).to_owned(), host.clone()))
            .collect();
        let context = Context {
            hosts: &hosts,
            seed,
            services: &services,
            lab: true,
        };
        let step = expand(nemesis, &context).unwrap();
        step.sequence
            .unwrap()
            .into_iter()
            .map(|step| step.value)
            .collect()
    }

    #[test]
    fn a_seed_draws_the_same_again() {
        let nemesis = nemesis();
        assert_eq!(drawn(&nemesis, 1), drawn(&nemesis, 1));
        assert!((2..10).any(|seed| drawn(&nemesis, seed) != drawn(&nemesis, 1)));
    }

    #[test]
    fn a_majority_is_kept_and_time_is_filled() {
        let nemesis = nemesis();
        let mut counts = [0_u32; 2];
        let mut largest = 0;
        for seed in 0..1000 {
            let mut gone = Duration::ZERO;
            for step in drawn(&nemesis, seed) {
                gone += step.wait.map_or(Duration::ZERO, |wait| wait.0);
                gone += step.lasts.map_or(Duration::ZERO, |lasts| lasts.0);
                if step.partition.is_some() {
                    counts[0] += 1;
                }
                if let Some(together) = step.parallel {
                    gone += together[0].value.lasts.unwrap().0;
                    largest = largest.max(together.len());
                    counts[1] += 1;
                }
            }
            assert_eq!(gone, nemesis.over.0);
        }
        // A minority of five, and as large as it may be at times.
        assert_eq!(largest, 2);
        // Weights 3 of 5: about 16,000 faults; five standard deviations are 2 %. With equal weights of the three that
        // can be drawn it would be a third.
        let share = f64::from(counts[0]) / f64::from(counts[0] + counts[1]);
        assert!((0.58..0.62).contains(&share), "{share}");
    }

    #[test]
    fn others_than_the_named_hosts_are_left_alone() {
        let mut nemesis = nemesis();
        let three = ["n1", "n2", "n3"].map(str::to_owned).to_vec();
        nemesis.hosts = Some(three.clone());
        nemesis.faults[0].one_way = Some(OneWay::Out);
        let mut partitions = 0;
        for step in drawn(&nemesis, 1) {
            if let Some(partition) = step.partition {
                assert_eq!(partition.hosts.as_ref(), Some(&three));
                assert_eq!(partition.one_way, Some(OneWay::Out));
                partitions += 1;
            }
            // One is a minority of three, and two are one of five.
            assert!(step.parallel.is_none_or(|together| together.len() == 1));
        }
        assert!(partitions > 0);
    }

    #[test]
    fn without_asking_for_it_all_may_be_hit() {
        let mut nemesis = nemesis();
        nemesis.keep_majority = false;
        let most = (0..200)
            .flat_map(|seed| drawn(&nemesis, seed))
            .filter_map(|step| step.parallel.map(|together| together.len()))
            .max();
        assert_eq!(most, Some(5));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let hosts: Vec<String> = (1..=4).map(|number| format!("n{number}")).collect();
        let context = Context {
            hosts: &hosts,
            seed: 0,
            services: &[],
            lab: false,
        };
        let refused = |change: &dyn Fn(&mut Nemesis)| {
            let mut nemesis = nemesis();
            nemesis.faults.truncate(1);
            change(&mut nemesis);
            expand(&nemesis, &context).unwrap_err().problem
        };
        assert!(refused(&|n| n.faults.clear()).contains("no fault"));
        assert!(refused(&|n| n.longest = Period::default()).contains("longer"));
        assert!(refused(&|n| n.faults[0].partition = Some(Shape::Halves)).contains("majority"));
        assert!(refused(&|n| n.hosts = Some(vec!["n9".to_owned()])).contains("no host 'n9'"));
        assert!(
            refused(&|n| {
                n.faults[0] = Weighted {
                    one_way: Some(OneWay::Out),
                    profile: None,
                    ..Weighted::default()
                };
            })
            .contains("one_way")
        );
        assert!(
            refused(&|n| n.faults[0].kill = Some(OneOrMany::One("x".into())))
                .contains("exactly one")
        );
        assert!(
            refused(&|n| {
                n.faults[0].partition = None;
                n.faults[0].kill = Some(OneOrMany::One("x".into()));
            })
            .contains("no service 'x'")
        );
    }
}
