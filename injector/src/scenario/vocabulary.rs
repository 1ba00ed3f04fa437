//! Ready vocabulary: models of systems, hosts and links by name, each spelt out as ordinary steps.
//!
//! A model is no more than what it expands to; `injector run --dry-run` shows that.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_saphyr::{Location, Spanned};

use super::file::{Kill, OneOrMany, Period, Step};
use crate::rules::{FaultSpec, Problem, RuleSpec};

/// A model or profile by name, and what of it is to be other than usual.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Which.
    pub name: Name,
    /// Only towards these hosts; towards everybody where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<OneOrMany>,
    /// Of models of hosts: the service of the lab whose processes are meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// In place of the usual delay; of `synchronous` the bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<String>,
    /// In place of the usual loss, corruption, or share of flows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
    /// In place of the usual rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<String>,
    /// In place of the usual queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// Of `partially-synchronous`: when it stabilises; of `crash-recovery`: when it comes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Period>,
}

/// The models and profiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Name {
    /// Every message arrives within a bound: delays between 0 and `delay` (100ms), in order.
    Synchronous,
    /// Asynchronous until `after` (30s), around ten times the bound that holds from then on, `delay` (100ms): Dwork,
    /// Lynch, Stockmeyer, 1988, where it holds from an unknown time on.
    PartiallySynchronous,
    /// No bound: delays with the heavy tail of a Pareto distribution around `delay` (50ms), out of order.
    Asynchronous,
    /// The processes of `service` are killed, and stay so.
    CrashStop,
    /// The processes of `service` are killed, and started again `after` (5s).
    CrashRecovery,
    /// A `share` (10%) of all messages is lost.
    Omission,
    /// Everything that leaves is `delay` (500ms) late.
    Slow,
    /// A `share` (1%) of packets arrives with other bits, and nothing notices: checksums fit.
    ByzantineCorruption,
    /// Nothing gets through, either way.
    CableCut,
    /// Up for 3 s, down for 1 s.
    FlappingLink,
    /// One of several equal paths is dead: a `share` (25%) of flows gets nothing through, the others notice nothing.
    GreyEcmpPath,
    /// A slow link (`rate`, 10mbit) behind a queue (`queue`, 1s) that is far too deep: load turns into latency.
    Bufferbloat,
    /// A faster link (`rate`, 100mbit) behind a queue (`queue`, 64kb) as small as a port of a switch has: load turns
    /// into loss.
    CongestedSwitch,
    /// Losses in bursts of three packets, 3 % in all (Gilbert: p 1 %, r 32 %), and 3 ms that vary by 2 ms.
    LossyWifi,
    /// 25 ms that vary by 10 ms, 20 Mbit/s (`rate`), and a queue of 300 ms (`queue`).
    Lte,
    /// 270 ms each way (up and down again 35,786 km are 239 ms at the speed of light), 20 Mbit/s (`rate`).
    GeoSatellite,
    /// 75 ms each way that vary by 2 ms, as between Europe and the west of North America.
    InterContinent,
    /// Packets over 1,400 bytes vanish, and no message says so (RFC 2923).
    PmtuBlackhole,
    /// The host is gone: silence. One of the five that a caller cannot tell apart.
    NodeDead,
    /// Connections that exist are cut; new ones can be made.
    ConnectionBroken,
    /// The host answers `delay` (10s) late.
    NodeSlow,
    /// At the server: connections are accepted, and what they ask (TCP segments with PSH) never arrives.
    RequestLost,
    /// At the server: what is asked arrives, is done, and the answer (TCP segments with PSH) never leaves.
    ResponseLost,
}

/// All of them.
pub const NAMES: [Name; 23] = [
    Name::Synchronous,
    Name::PartiallySynchronous,
    Name::Asynchronous,
    Name::CrashStop,
    Name::CrashRecovery,
    Name::Omission,
    Name::Slow,
    Name::ByzantineCorruption,
    Name::CableCut,
    Name::FlappingLink,
    Name::GreyEcmpPath,
    Name::Bufferbloat,
    Name::CongestedSwitch,
    Name::LossyWifi,
    Name::Lte,
    Name::GeoSatellite,
    Name::InterContinent,
    Name::PmtuBlackhole,
    Name::NodeDead,
    Name::ConnectionBroken,
    Name::NodeSlow,
    Name::RequestLost,
    Name::ResponseLost,
];

/// What steps are made for.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Names of the hosts.
    pub hosts: &'a [String],
    /// The step's own seed.
    pub seed: u64,
    /// Services of the lab, and the nodes that they run in.
    pub services: &'a [(String, String)],
    /// Whether there is a lab.
    pub lab: bool,
}

/// A step within one that was made.
pub(super) fn within(step: Step) -> Spanned<Step> {
    Spanned::new(step, Location::UNKNOWN, Location::UNKNOWN)
}

/// Spells a model out.
#[expect(clippy::too_many_lines, reason = "a table: one entry for each model")]
pub fn expand(profile: &Profile, _: &Context<'_>) -> Result<Step, Problem> {
    let given =
        |text: &Option<String>, usual: &str| Some(text.as_deref().unwrap_or(usual).to_owned());
    let fault = |fault: FaultSpec| Step {
        rule: Some(RuleSpec {
            peer: profile
                .peer
                .as_ref()
                .map(|peer| peer.list().to_vec())
                .unwrap_or_default(),
            all_traffic: profile.peer.is_none(),
            fault,
            ..RuleSpec::default()
        }),
        ..Step::default()
    };
    let with = |mut step: Step, change: &dyn Fn(&mut RuleSpec)| {
        if let Some(rule) = &mut step.rule {
            change(rule);
        }
        step
    };
    let service = || {
        profile.service.clone().ok_or_else(|| {
            Problem::new(
                "this profile is about processes, and names no service",
                "add 'service', one of the lab's",
            )
        })
    };
    let bound = || crate::rules::text::duration::parse(profile.delay.as_deref().unwrap_or("100ms"));
    let synchronous = || -> Result<Step, Problem> {
        let half = crate::rules::text::duration::format(bound()? / 2);
        Ok(fault(FaultSpec {
            delay: Some(half.clone()),
            jitter: Some(half),
            distribution: Some("uniform".to_owned()),
            ..FaultSpec::default()
        }))
    };
    let asynchronous = |delay: &str| {
        fault(FaultSpec {
            delay: Some(delay.to_owned()),
            jitter: Some(delay.to_owned()),
            distribution: Some("pareto".to_owned()),
            order: Some("free".to_owned()),
            ..FaultSpec::default()
        })
    };
    let cut = || fault(FaultSpec::cut());
    let tcp = |rule: &mut RuleSpec| {
        rule.proto = vec!["tcp".to_owned()];
        rule.tcp_flags = Some("psh".to_owned());
        rule.all_traffic = false;
    };
    Ok(match profile.name {
        Name::Synchronous => synchronous()?,
        Name::Asynchronous => asynchronous(profile.delay.as_deref().unwrap_or("50ms")),
        Name::PartiallySynchronous => {
            let long = crate::rules::text::duration::format(bound()? * 10);
            let mut before = asynchronous(&long);
            before.name = Some("unbounded".to_owned());
            before.lasts = Some(profile.after.unwrap_or(Period::secs(30)));
            let mut after = synchronous()?;
            after.name = Some("stable".to_owned());
            Step {
                sequence: Some(vec![within(before), within(after)]),
                ..Step::default()
            }
        }
        Name::CrashStop | Name::CrashRecovery => Step {
            kill: Some(Kill {
                service: Some(service()?),
                ..Kill::default()
            }),
            lasts: (profile.name == Name::CrashRecovery)
                .then(|| profile.after.unwrap_or(Period::secs(5))),
            ..Step::default()
        },
        Name::Omission => fault(FaultSpec {
            loss: given(&profile.share, "10%"),
            ..FaultSpec::default()
        }),
        Name::Slow | Name::NodeSlow => {
            let usual = if profile.name == Name::Slow {
                "500ms"
            } else {
                "10s"
            };
            let late = fault(FaultSpec {
                delay: given(&profile.delay, usual),
                ..FaultSpec::default()
            });
            with(late, &|rule| rule.direction = Some("egress".to_owned()))
        }
        Name::ByzantineCorruption => fault(FaultSpec {
            corrupt: given(&profile.share, "1%"),
            part: Some("payload".to_owned()),
            checksum: Some("repaired".to_owned()),
            ..FaultSpec::default()
        }),
        Name::CableCut | Name::NodeDead => cut(),
        Name::FlappingLink => with(cut(), &|rule| {
            rule.flap = Some("up=3s,down=1s".to_owned());
        }),
        Name::GreyEcmpPath => with(cut(), &|rule| {
            // What has no ports goes by addresses alone, and always the same path.
            rule.proto = vec!["tcp".to_owned(), "udp".to_owned()];
            rule.flows = given(&profile.share, "25%");
            rule.all_traffic = false;
        }),
        Name::Bufferbloat => fault(FaultSpec {
            rate: given(&profile.rate, "10mbit"),
            queue: given(&profile.queue, "1s"),
            ..FaultSpec::default()
        }),
        Name::CongestedSwitch => fault(FaultSpec {
            rate: given(&profile.rate, "100mbit"),
            queue: given(&profile.queue, "64kb"),
            ..FaultSpec::default()
        }),
        Name::LossyWifi => fault(FaultSpec {
            loss: Some("gemodel:1%,32%".to_owned()),
            delay: given(&profile.delay, "3ms"),
            jitter: Some("2ms".to_owned()),
            ..FaultSpec::default()
        }),
        Name::Lte => fault(FaultSpec {
            delay: given(&profile.delay, "25ms"),
            jitter: Some("10ms".to_owned()),
            distribution: Some("normal".to_owned()),
            rate: given(&profile.rate, "20mbit"),
            queue: given(&profile.queue, "300ms"),
            ..FaultSpec::default()
        }),
        Name::GeoSatellite => fault(FaultSpec {
            delay: given(&profile.delay, "270ms"),
            rate: given(&profile.rate, "20mbit"),
            queue: given(&profile.queue, "200ms"),
            ..FaultSpec::default()
        }),
        Name::InterContinent => fault(FaultSpec {
            delay: given(&profile.delay, "75ms"),
            jitter: Some("2ms".to_owned()),
            distribution: Some("normal".to_owned()),
            ..FaultSpec::default()
        }),
        Name::PmtuBlackhole => fault(FaultSpec {
            mtu_blackhole: Some(1400),
            ..FaultSpec::default()
        }),
        Name::ConnectionBroken => with(cut(), &|rule| {
            rule.state = Some("established".to_owned());
            rule.proto = vec!["tcp".to_owned()];
            rule.all_traffic = false;
        }),
        Name::RequestLost => with(cut(), &|rule| {
            tcp(rule);
            rule.direction = Some("ingress".to_owned());
        }),
        Name::ResponseLost => with(cut(), &|rule| {
            tcp(rule);
            rule.direction = Some("egress".to_owned());
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Surface;

    fn profile(name: Name) -> Profile {
        Profile {
            name,
            peer: None,
            service: Some("db".to_owned()),
            delay: None,
            share: None,
            rate: None,
            queue: None,
            after: None,
        }
    }

    fn context() -> Context<'static> {
        Context {
            hosts: &[],
            seed: 0,
            services: &[],
            lab: true,
        }
    }

    fn rules(step: &Step, found: &mut Vec<RuleSpec>) {
        found.extend(step.rule.clone());
        for step in step.sequence.iter().flatten() {
            rules(&step.value, found);
        }
    }

    #[test]
    fn every_profile_is_made_of_rules_that_are_right() {
        for name in NAMES {
            for peer in [None, Some(OneOrMany::One("10.0.0.1".to_owned()))] {
                let step = expand(
                    &Profile {
                        peer,
                        ..profile(name)
                    },
                    &context(),
                )
                .unwrap();
                let mut found = Vec::new();
                rules(&step, &mut found);
                assert!(!found.is_empty() || step.kill.is_some(), "{name:?}");
                for mut rule in found {
                    rule.iface = vec!["eth0".to_owned()];
                    if let Err(error) = rule.parse() {
                        panic!("{name:?}: {error} ({})", error.help(Surface::File));
                    }
                }
            }
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in NAMES {
            let text = serde_json::to_string(&name).unwrap();
            assert_eq!(serde_json::from_str::<Name>(&text).unwrap(), name);
        }
        let profile: Profile =
            serde_saphyr::from_str("{name: lossy-wifi, peer: n2, delay: 9ms}").unwrap();
        assert_eq!(profile.name, Name::LossyWifi);
        assert!(serde_saphyr::from_str::<Profile>("{name: lossy_wifi}").is_err());
    }

    #[test]
    fn what_is_given_is_taken() {
        let step = expand(
            &Profile {
                delay: Some("1s".to_owned()),
                ..profile(Name::Synchronous)
            },
            &context(),
        )
        .unwrap();
        assert_eq!(step.rule.unwrap().fault.delay.as_deref(), Some("500ms"));
        let nameless = Profile {
            service: None,
            ..profile(Name::CrashStop)
        };
        assert!(expand(&nameless, &context()).is_err());
    }
}
