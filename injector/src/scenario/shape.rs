//! Shapes of partitions, after Jepsen: which hosts are cut from which, as a pure function of hosts, shape and seed, so
//! that all hosts that play the same file compute the same partition without a coordinator.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{draw::Draw, file::Asked};
use crate::rules::Problem;

/// Hosts are cut from each other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Partition {
    /// How.
    pub shape: Shape,
    /// Among these hosts, whose order matters to some shapes; all, in the order of their names, where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
    /// Of `isolate`, the host that is alone; of `bridge`, the one that sees both sides; of `partial`, the two that do
    /// not see each other; of `primaries`, those that are alone (several are separated by commas).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    /// Of `sides`: the groups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sides: Option<Vec<Vec<String>>>,
    /// Only one direction is cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_way: Option<OneWay>,
}

/// The shape of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// The first half of the hosts and the rest.
    #[default]
    Halves,
    /// The same, of hosts in a random order.
    RandomHalves,
    /// A random majority, as small as it can be, and the rest.
    MajorityMinority,
    /// One host alone (`who`; a random one where absent).
    Isolate,
    /// Two halves, and one host (`who`; a random one where absent) that sees both.
    Bridge,
    /// Every host sees a majority, and no two hosts see the same one.
    MajoritiesRing,
    /// Some hosts (`who`; a random minority where absent) are alone each, the others together.
    Primaries,
    /// Two hosts (`who`; two random ones where absent) do not see each other; everybody else sees both.
    Partial,
    /// The groups given by `sides`.
    Sides,
}

/// Which host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Who {
    /// The host of this name; `random`: drawn from the seed.
    Host(String),
    /// The one whose name or address the command prints (its first word), such as the current leader.
    Asked(Asked),
}

/// Which direction is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OneWay {
    /// From the first side (the isolated host, the minority) to the others: they do not hear it, it hears them.
    Out,
    /// From the others to the first side: it does not hear them, they hear it.
    In,
}

/// What a partition comes to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Cut {
    /// Nothing gets from the first host to the second.
    pub links: BTreeSet<(String, String)>,
    /// The partition in words: `n1 | n2 n3`.
    pub words: String,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Halves => "halves",
            Self::RandomHalves => "random halves",
            Self::MajorityMinority => "majority and minority",
            Self::Isolate => "isolation",
            Self::Bridge => "bridge",
            Self::MajoritiesRing => "majorities ring",
            Self::Primaries => "primaries",
            Self::Partial => "partial",
            Self::Sides => "sides",
        })
    }
}

/// Whether a command has to name a host before the partition can be computed.
#[must_use]
pub fn needs_asking(partition: &Partition) -> bool {
    matches!(partition.who, Some(Who::Asked(_)))
}

/// Hosts that a shape has arranged: who is cut from whom, and an order of them for one-way cuts.
struct Arranged {
    /// Places of hosts that are cut from each other, each pair both ways round.
    pairs: BTreeSet<(usize, usize)>,
    /// The rank of each host: one-way cuts go from lower ranks to higher ones, or back.
    ranks: Vec<usize>,
    words: String,
}

/// The links that a partition cuts, among these hosts. `seed` is the step's own; `named` is the host that a command
/// has named, where the partition asks for one.
pub fn cut(
    partition: &Partition,
    hosts: &[String],
    seed: u64,
    named: Option<&str>,
) -> Result<Cut, Problem> {
    let among = partition.hosts.as_deref().unwrap_or(hosts);
    for (place, host) in among.iter().enumerate() {
        known(host, hosts)?;
        if among[..place].contains(host) {
            return Err(Problem::new(
                format!("host '{host}' is in the partition twice"),
                "name each host once",
            ));
        }
    }
    if partition.sides.is_some() && partition.shape != Shape::Sides {
        return Err(Problem::new(
            format!("'sides' has no meaning for shape '{}'", partition.shape),
            "shape: sides",
        ));
    }
    let who = chosen(partition, hosts, among, named)?;
    let arranged = arrange(partition, among, who, &mut Draw::new(seed))?;
    Ok(finished(among, arranged, partition.one_way))
}

/// Arranges hosts in the shape of a partition: around `who`, in that order, or around whom `draw` gives where nobody is named.
fn arrange(
    partition: &Partition,
    among: &[String],
    who: Vec<usize>,
    draw: &mut Draw,
) -> Result<Arranged, Problem> {
    let shape = partition.shape;
    let least = match shape {
        Shape::Bridge | Shape::MajoritiesRing | Shape::Partial => 3,
        Shape::Sides => 0,
        _ => 2,
    };
    if among.len() < least {
        return Err(Problem::new(
            format!(
                "a partition of shape '{shape}' needs at least {least} hosts, and has {}",
                among.len()
            ),
            "name them in 'hosts' of the scenario, or make a lab",
        ));
    }
    Ok(match shape {
        Shape::Halves => {
            let places: Vec<usize> = (0..among.len()).collect();
            sides(among, &halves(&places))
        }
        Shape::RandomHalves => sides(among, &halves(&shuffled(among.len(), draw))),
        Shape::MajorityMinority => {
            let places = shuffled(among.len(), draw);
            // The minority first: one-way cuts go from it.
            let (minority, majority) = places.split_at(among.len() - majority(among.len()));
            sides(among, &[minority.to_vec(), majority.to_vec()])
        }
        Shape::Isolate => {
            let alone = match who.as_slice() {
                [] => draw.below(among.len()),
                [one] => *one,
                _ => return Err(too_many("isolate", 1)),
            };
            let others = (0..among.len()).filter(|place| *place != alone).collect();
            sides(among, &[vec![alone], others])
        }
        Shape::Bridge => {
            let bridge = match who.as_slice() {
                [] => draw.below(among.len()),
                [one] => *one,
                _ => return Err(too_many("bridge", 1)),
            };
            let others: Vec<usize> = (0..among.len()).filter(|place| *place != bridge).collect();
            let mut arranged = sides(among, &halves(&others));
            let _ = write!(arranged.words, ", {} sees both", among[bridge]);
            arranged
        }
        Shape::MajoritiesRing => ring(among, &shuffled(among.len(), draw)),
        Shape::Primaries => {
            let alone = if who.is_empty() {
                let mut places = shuffled(among.len(), draw);
                let most = among.len() - majority(among.len());
                places.truncate(1 + draw.below(most.max(1)));
                places
            } else {
                who
            };
            let others: Vec<usize> = (0..among.len())
                .filter(|place| !alone.contains(place))
                .collect();
            let mut groups: Vec<Vec<usize>> = alone.into_iter().map(|place| vec![place]).collect();
            groups.push(others);
            sides(among, &groups)
        }
        Shape::Partial => {
            let (one, other) = match who.as_slice() {
                [] => {
                    let places = shuffled(among.len(), draw);
                    (places[0], places[1])
                }
                [one, other] if one != other => (*one, *other),
                _ => {
                    return Err(Problem::new(
                        "'who' of a partial partition is two hosts",
                        "who: n1,n2",
                    ));
                }
            };
            let mut arranged = sides(among, &[vec![one], vec![other]]);
            arranged.words.push_str(", others see both");
            arranged
        }
        Shape::Sides => as_given(partition, among)?,
    })
}

/// Hosts on the sides that the file gives.
fn as_given(partition: &Partition, among: &[String]) -> Result<Arranged, Problem> {
    let mut groups = Vec::new();
    for side in partition.sides.iter().flatten() {
        let places = side
            .iter()
            .map(|host| place(host, among))
            .collect::<Result<Vec<_>, _>>()?;
        groups.push(places);
    }
    let all: Vec<usize> = groups.iter().flatten().copied().collect();
    let distinct: BTreeSet<usize> = all.iter().copied().collect();
    if groups.len() < 2 || groups.iter().any(Vec::is_empty) || distinct.len() != all.len() {
        return Err(Problem::new(
            "a partition of shape 'sides' needs two or more sides, none of them empty, and no host in two",
            "sides: [[n1], [n2, n3]]",
        ));
    }
    Ok(sides(among, &groups))
}

/// Names instead of places, and one direction where only that is wanted.
fn finished(among: &[String], arranged: Arranged, one_way: Option<OneWay>) -> Cut {
    let links = arranged
        .pairs
        .into_iter()
        .filter(|(from, to)| {
            let (from, to) = (arranged.ranks[*from], arranged.ranks[*to]);
            match one_way {
                None => true,
                Some(OneWay::Out) => from < to,
                Some(OneWay::In) => from > to,
            }
        })
        .map(|(from, to)| (among[from].clone(), among[to].clone()))
        .collect();
    let words = match one_way {
        None => arranged.words,
        Some(OneWay::Out) => format!("{}, only from left to right", arranged.words),
        Some(OneWay::In) => format!("{}, only from right to left", arranged.words),
    };
    Cut { links, words }
}

fn too_many(shape: &str, count: usize) -> Problem {
    Problem::new(
        format!("'who' of shape '{shape}' is {count} host"),
        "who: n1",
    )
}

fn known(host: &str, hosts: &[String]) -> Result<(), Problem> {
    if hosts.iter().any(|known| known == host) {
        Ok(())
    } else {
        Err(Problem::new(
            format!("there is no host '{host}'"),
            format!("there are: {}", hosts.join(", ")),
        ))
    }
}

fn place(host: &str, among: &[String]) -> Result<usize, Problem> {
    among.iter().position(|one| one == host).ok_or_else(|| {
        Problem::new(
            format!("there is no host '{host}' in the partition"),
            format!("there are: {}", among.join(", ")),
        )
    })
}

/// The places of the hosts that `who` names; none where they are to be drawn.
fn chosen(
    partition: &Partition,
    hosts: &[String],
    among: &[String],
    named: Option<&str>,
) -> Result<Vec<usize>, Problem> {
    let text = match (&partition.who, named) {
        (None, _) => return Ok(Vec::new()),
        (Some(Who::Host(text)), _) if text == "random" => return Ok(Vec::new()),
        (Some(Who::Host(text)), _) => text.as_str(),
        (Some(Who::Asked(_)), Some(named)) => named,
        (Some(Who::Asked(_)), None) => {
            return Err(Problem::new(
                "a command has to name the host first",
                "it is run when the step begins",
            ));
        }
    };
    if !matches!(
        partition.shape,
        Shape::Isolate | Shape::Bridge | Shape::Partial | Shape::Primaries
    ) {
        return Err(Problem::new(
            format!("'who' has no meaning for shape '{}'", partition.shape),
            "it has for: isolate, bridge, partial, primaries",
        ));
    }
    text.split(',')
        .map(str::trim)
        .map(|host| known(host, hosts).and_then(|()| place(host, among)))
        .collect()
}

/// The smallest number of hosts that are a majority.
fn majority(count: usize) -> usize {
    count / 2 + 1
}

fn shuffled(count: usize, draw: &mut Draw) -> Vec<usize> {
    let mut places: Vec<usize> = (0..count).collect();
    draw.shuffle(&mut places);
    places
}

/// Two halves, of which the first is not the larger one (jepsen.nemesis, `bisect`).
fn halves(places: &[usize]) -> [Vec<usize>; 2] {
    let (first, second) = places.split_at(places.len() / 2);
    [first.to_vec(), second.to_vec()]
}

/// Nobody in one group hears anybody in another (jepsen.nemesis, `complete-grudge`).
fn sides(among: &[String], groups: &[Vec<usize>]) -> Arranged {
    let mut ranks = vec![0; among.len()];
    let mut pairs = BTreeSet::new();
    for (rank, group) in groups.iter().enumerate() {
        for &one in group {
            ranks[one] = rank;
            let others = groups
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != rank)
                .flat_map(|(_, group)| group);
            pairs.extend(others.map(|&other| (one, other)));
        }
    }
    let words: Vec<String> = groups
        .iter()
        .map(|group| {
            let names: Vec<&str> = group.iter().map(|&place| among[place].as_str()).collect();
            names.join(" ")
        })
        .collect();
    Arranged {
        pairs,
        ranks,
        words: words.join(" | "),
    }
}

/// Every host hears the majority that stands around it in a ring (jepsen.nemesis, `majorities-ring`: its perfect form,
/// which Jepsen uses for up to five nodes, and which holds for any number). With an even majority a host hears one
/// more on one side than on the other, so that some links are cut one way only.
fn ring(among: &[String], order: &[usize]) -> Arranged {
    let count = order.len();
    let size = majority(count);
    let mut pairs = BTreeSet::new();
    let mut ranks = vec![0; count];
    for (rank, &host) in order.iter().enumerate() {
        ranks[host] = rank;
        let heard: BTreeSet<usize> = (0..size)
            .map(|offset| order[(rank + count + offset - size / 2) % count])
            .collect();
        pairs.extend(
            order
                .iter()
                .filter(|other| !heard.contains(other))
                .map(|&other| (other, host)),
        );
    }
    let names: Vec<&str> = order.iter().map(|&place| among[place].as_str()).collect();
    Arranged {
        pairs,
        ranks,
        words: format!("ring of majorities {}", names.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::file::CommandLine;

    fn hosts(count: usize) -> Vec<String> {
        (1..=count).map(|number| format!("n{number}")).collect()
    }

    fn of(shape: Shape) -> Partition {
        Partition {
            shape,
            ..Partition::default()
        }
    }

    /// Who hears whom, themselves included.
    fn heard(cut: &Cut, hosts: &[String]) -> Vec<BTreeSet<String>> {
        hosts
            .iter()
            .map(|to| {
                hosts
                    .iter()
                    .filter(|from| !cut.links.contains(&((*from).clone(), to.clone())))
                    .cloned()
                    .collect()
            })
            .collect()
    }

    fn symmetric(cut: &Cut) -> bool {
        cut.links
            .iter()
            .all(|(from, to)| cut.links.contains(&(to.clone(), from.clone())))
    }

    #[test]
    fn every_shape_is_what_it_is_called() {
        for count in 3..=9 {
            let hosts = hosts(count);
            for seed in 0..50 {
                let cut = |shape| cut(&of(shape), &hosts, seed, None).unwrap();
                for shape in [Shape::Halves, Shape::RandomHalves] {
                    let cut = cut(shape);
                    let sizes: BTreeSet<usize> =
                        heard(&cut, &hosts).iter().map(BTreeSet::len).collect();
                    assert!(symmetric(&cut));
                    assert!(sizes.iter().all(|size| size.abs_diff(count - size) <= 1));
                }
                let split = heard(&cut(Shape::MajorityMinority), &hosts);
                let most = split.iter().map(BTreeSet::len).max().unwrap();
                assert_eq!(most, count / 2 + 1);
                assert_eq!(
                    split.iter().filter(|heard| heard.len() == most).count(),
                    most
                );
                let alone = heard(&cut(Shape::Isolate), &hosts);
                assert_eq!(alone.iter().filter(|heard| heard.len() == 1).count(), 1);
                assert_eq!(
                    alone
                        .iter()
                        .filter(|heard| heard.len() == count - 1)
                        .count(),
                    count - 1
                );
                let bridge = heard(&cut(Shape::Bridge), &hosts);
                assert!(bridge.iter().any(|heard| heard.len() == count));
                assert!(bridge.iter().filter(|heard| heard.len() == count).count() == 1);
                let ring = heard(&cut(Shape::MajoritiesRing), &hosts);
                assert!(
                    ring.iter().all(|heard| heard.len() == count / 2 + 1),
                    "{ring:?}"
                );
                let distinct: BTreeSet<_> = ring.iter().collect();
                assert_eq!(distinct.len(), count);
                for (host, heard) in hosts.iter().zip(&ring) {
                    assert!(heard.contains(host));
                }
                let partial = cut(Shape::Partial);
                assert_eq!(partial.links.len(), 2);
                assert!(symmetric(&partial));
                let primaries = heard(&cut(Shape::Primaries), &hosts);
                let singles = primaries.iter().filter(|heard| heard.len() == 1).count();
                assert!(singles >= 1 && singles <= (count - (count / 2 + 1)).max(1));
            }
        }
    }

    #[test]
    fn one_way_is_half_of_it() {
        let hosts = hosts(5);
        for shape in [
            Shape::Halves,
            Shape::RandomHalves,
            Shape::MajorityMinority,
            Shape::Isolate,
            Shape::Bridge,
            Shape::MajoritiesRing,
            Shape::Primaries,
            Shape::Partial,
        ] {
            let way = |one_way| {
                let partition = Partition {
                    one_way,
                    ..of(shape)
                };
                cut(&partition, &hosts, 3, None).unwrap().links
            };
            let (both, out, into) = (way(None), way(Some(OneWay::Out)), way(Some(OneWay::In)));
            assert!(out.is_disjoint(&into), "{shape}");
            assert_eq!(&out | &into, both, "{shape}");
            assert!(!out.is_empty());
            let reversed: BTreeSet<_> = into.into_iter().map(|(from, to)| (to, from)).collect();
            assert_eq!(out, reversed, "{shape}");
        }
    }

    #[test]
    fn it_depends_on_the_seed_and_on_nothing_else() {
        let hosts = hosts(7);
        let at = |seed| cut(&of(Shape::RandomHalves), &hosts, seed, None).unwrap();
        assert_eq!(at(1), at(1));
        assert!((2..20).any(|seed| at(seed) != at(1)));
    }

    #[test]
    fn named_hosts_are_taken() {
        let hosts = hosts(4);
        let partition = Partition {
            who: Some(Who::Host("n3".into())),
            one_way: Some(OneWay::Out),
            ..of(Shape::Isolate)
        };
        let cut = super::cut(&partition, &hosts, 0, None).unwrap();
        assert!(cut.links.iter().all(|(from, _)| from == "n3"));
        assert_eq!(cut.links.len(), 3);
        assert_eq!(cut.words, "n3 | n1 n2 n4, only from left to right");
        let asked = Partition {
            who: Some(Who::Asked(Asked {
                command: CommandLine::Shell("leader".into()),
                on: None,
            })),
            ..of(Shape::Isolate)
        };
        assert!(needs_asking(&asked));
        assert!(super::cut(&asked, &hosts, 0, None).is_err());
        let cut = super::cut(&asked, &hosts, 0, Some("n2")).unwrap();
        assert_eq!(cut.words, "n2 | n1 n3 n4");
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        let hosts = hosts(4);
        let refused = |partition: Partition| {
            let problem = cut(&partition, &hosts, 0, None).unwrap_err();
            format!("{}: {}", problem.problem, problem.help)
        };
        let who = |shape, who: &str| Partition {
            who: Some(Who::Host(who.into())),
            ..of(shape)
        };
        assert!(refused(who(Shape::Isolate, "n9")).contains("there are: n1, n2, n3, n4"));
        assert!(refused(who(Shape::Isolate, "n1,n2")).contains("1 host"));
        assert!(refused(who(Shape::Partial, "n1")).contains("two hosts"));
        assert!(refused(who(Shape::Halves, "n1")).contains("no meaning"));
        let few = Partition {
            hosts: Some(vec!["n1".into(), "n2".into()]),
            ..of(Shape::Bridge)
        };
        assert!(refused(few).contains("at least 3"));
        for sides in [
            vec![],
            vec![vec!["n1"]],
            vec![vec!["n1"], vec![]],
            vec![vec!["n1"], vec!["n1"]],
        ] {
            let sides = sides
                .into_iter()
                .map(|side| side.into_iter().map(str::to_owned).collect())
                .collect();
            let partition = Partition {
                sides: Some(sides),
                ..of(Shape::Sides)
            };
            assert!(refused(partition).contains("two or more sides"));
        }
    }
}
