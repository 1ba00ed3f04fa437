//! Rules of a run: added, changed and healed through the daemon, on a connection that the run holds, so that all of
//! them end with it whatever becomes of this process.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedMutexGuard, watch};

use super::{World, recorder::Recorder};
use crate::{
    client::{Client, ClientError},
    dataplane::DataPlane,
    netlink::{self, NetlinkError},
    netns::{Netns, NetnsError},
    protocol::{AddArgs, AddResult, Call, HealArgs, HealResult, NoArgs, RuleStats, StatsResult},
    rules::{RuleSpec, text},
    scenario::record::{Event, FaultEnded, FaultStarted, Sample},
    ssh::OperatorConnection,
};

/// Why a fault could not be made, changed or healed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum FaultError {
    /// The daemon refused, or could not be reached.
    #[error("{}", with_hint(.0))]
    Client(#[from] ClientError),
    /// The namespace of a rule.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Looking for interfaces.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// No interface leads to a host.
    #[error("no route leads to {peers}: give 'iface' in 'targets'")]
    NoRoute {
        /// The hosts' addresses.
        peers: String,
    },
    /// A task of ours ended without an answer.
    #[error("asking the daemon: {0}")]
    Task(#[from] tokio::task::JoinError),
}

fn with_hint(error: &ClientError) -> String {
    match error {
        ClientError::Refused(body) => body.to_string(),
        other => match other.help() {
            Some(help) => format!("{other} ({help})"),
            None => other.to_string(),
        },
    }
}

/// The faults of a run. They begin, change and end one after the other, and whatever has begun to do so does it to the end,
/// also where the step that asked for it is given up.
pub(super) struct Faults {
    client: Arc<Mutex<Client>>,
    turns: Arc<tokio::sync::Mutex<()>>,
    operator: Vec<OperatorConnection>,
    world: Arc<World>,
    active: Mutex<BTreeMap<String, Active>>,
}

/// The fault of a step, while it acts.
struct Active {
    /// It acts on other hosts, and has no rules here.
    elsewhere: bool,
    rules: BTreeSet<String>,
    /// What rules did that have been replaced since.
    before: Vec<RuleStats>,
    healed: watch::Sender<bool>,
}

impl Faults {
    /// On a connection that is used for nothing else.
    #[must_use]
    pub(super) fn new(
        client: Client,
        operator: Vec<OperatorConnection>,
        world: Arc<World>,
    ) -> Arc<Self> {
        Arc::new(Self {
            client: Arc::new(Mutex::new(client)),
            turns: Arc::default(),
            operator,
            world,
            active: Mutex::new(BTreeMap::new()),
        })
    }

    async fn turn(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.turns).lock_owned().await
    }

    /// Does something to the end, and only then lets others have their turn.
    async fn to_the_end<T: Send + 'static>(
        turn: OwnedMutexGuard<()>,
        operation: impl Future<Output = Result<T, FaultError>> + Send + 'static,
    ) -> Result<T, FaultError> {
        tokio::spawn(async move {
            let _turn = turn;
            operation.await
        })
        .await?
    }

    fn recorder(&self) -> &Recorder {
        &self.world.recorder
    }

    async fn call<T: serde::de::DeserializeOwned + Send + 'static>(
        &self,
        call: Call,
    ) -> Result<T, FaultError> {
        let client = Arc::clone(&self.client);
        Ok(tokio::task::spawn_blocking(move || {
            let mut client = client.lock().unwrap_or_else(PoisonError::into_inner);
            client.call(call)
        })
        .await??)
    }

    async fn add_rules(
        &self,
        mut rules: Vec<RuleSpec>,
        replace: bool,
    ) -> Result<AddResult, FaultError> {
        if rules.iter().any(|rule| rule.iface.is_empty()) {
            rules = tokio::task::spawn_blocking(move || {
                for rule in &mut rules {
                    find_interfaces(rule)?;
                }
                Ok::<_, FaultError>(rules)
            })
            .await??;
        }
        self.call(Call::Add(AddArgs {
            rules,
            replace,
            hold: true,
            operator: self.operator.clone(),
            dry_run: false,
        }))
        .await
    }

    /// Makes the rules of a step act, of which there may be none yet. The receiver turns true when they are healed.
    pub(super) async fn start(
        self: &Arc<Self>,
        step: &str,
        words: &str,
        rules: Vec<RuleSpec>,
        expect_effect: bool,
    ) -> Result<watch::Receiver<bool>, FaultError> {
        let turn = self.turn().await;
        let names = names(&rules);
        // Before they are added: whoever gives this up half-way can still heal them.
        let receiver = self.activate(step, false, names.clone());
        let (faults, step, words) = (Arc::clone(self), step.to_owned(), words.to_owned());
        Self::to_the_end(turn, async move {
            let (effect_ns, warnings) = if rules.is_empty() {
                (DataPlane::monotonic_ns(), Vec::new())
            } else {
                match faults.add_rules(rules, false).await {
                    Ok(added) => (added.effect_ns, added.warnings),
                    Err(error) => {
                        faults.locked().remove(&step);
                        return Err(error);
                    }
                }
            };
            faults.recorder().write(Event::FaultStarted(FaultStarted {
                step,
                what: words,
                rules: names.into_iter().collect(),
                effect_ns,
                expect_effect,
            }));
            for warning in warnings {
                faults.recorder().write(Event::Note { text: warning });
            }
            Ok(receiver)
        })
        .await
    }

    fn activate(
        &self,
        step: &str,
        elsewhere: bool,
        rules: BTreeSet<String>,
    ) -> watch::Receiver<bool> {
        let (healed, receiver) = watch::channel(false);
        let active = Active {
            elsewhere,
            rules,
            before: Vec::new(),
            healed,
        };
        self.locked().insert(step.to_owned(), active);
        receiver
    }

    /// Takes down that a step's fault acts on other hosts. The receiver turns true when it is healed, which it is by the
    /// same steps there as here.
    pub(super) fn start_elsewhere(&self, step: &str) -> watch::Receiver<bool> {
        self.activate(step, true, BTreeSet::new())
    }

    /// Changes the rules of a step to others of the same names, at once; to none where there are none. `false` if the
    /// step has been healed: nothing changes then.
    pub(super) async fn change(
        self: &Arc<Self>,
        step: &str,
        rules: Vec<RuleSpec>,
    ) -> Result<bool, FaultError> {
        let turn = self.turn().await;
        let Some(old) = self.locked().get(step).map(|active| active.rules.clone()) else {
            return Ok(false);
        };
        let (faults, step) = (Arc::clone(self), step.to_owned());
        Self::to_the_end(turn, async move {
            let new = names(&rules);
            let mut before = if rules.is_empty() {
                faults.heal_rules(&step, old).await?
            } else {
                // A rule that says something else begins to count anew.
                let before = faults.stats_of(&old).await?;
                faults.add_rules(rules, true).await?;
                before
            };
            if let Some(active) = faults.locked().get_mut(&step) {
                active.before.append(&mut before);
                active.rules = new;
            }
            Ok(true)
        })
        .await
    }

    async fn stats_of(&self, names: &BTreeSet<String>) -> Result<Vec<RuleStats>, FaultError> {
        let stats: StatsResult = self.call(Call::Stats(NoArgs {})).await?;
        Ok(stats
            .rules
            .into_iter()
            .filter(|rule| names.contains(&rule.name))
            .collect())
    }

    /// Heals the faults of a step, or of a group of steps. Nothing happens where none of them acts.
    pub(super) async fn heal(self: &Arc<Self>, path: &str) -> Result<(), FaultError> {
        let inside = format!("{path}/");
        let rounds = format!("{path}[");
        let steps: Vec<String> = self
            .locked()
            .keys()
            .filter(|step| *step == path || step.starts_with(&inside) || step.starts_with(&rounds))
            .cloned()
            .collect();
        for step in steps {
            self.heal_step(&step).await?;
        }
        Ok(())
    }

    /// Heals all faults of the run.
    pub(super) async fn heal_all(self: &Arc<Self>) -> Result<(), FaultError> {
        let steps: Vec<String> = self.locked().keys().cloned().collect();
        let mut first = Ok(());
        for step in steps {
            let healed = self.heal_step(&step).await;
            if first.is_ok() {
                first = healed;
            }
        }
        first
    }

    async fn heal_step(self: &Arc<Self>, step: &str) -> Result<(), FaultError> {
        let turn = self.turn().await;
        let Some(active) = self.locked().remove(step) else {
            return Ok(());
        };
        let (faults, step) = (Arc::clone(self), step.to_owned());
        Self::to_the_end(turn, async move {
            if !active.elsewhere {
                let mut rules = active.before;
                rules.extend(faults.heal_rules(&step, active.rules).await?);
                let matched = rules
                    .iter()
                    .map(|rule| rule.egress.matched_packets + rule.ingress.matched_packets)
                    .sum();
                let realised = rules
                    .iter()
                    .flat_map(|rule| rule.realised.clone())
                    .collect();
                faults.recorder().write(Event::FaultEnded(FaultEnded {
                    step,
                    rules,
                    matched_packets: matched,
                    realised,
                }));
            }
            active.healed.send_replace(true);
            Ok(())
        })
        .await
    }

    /// Heals rules of a step, and tells what they did.
    async fn heal_rules(
        &self,
        step: &str,
        names: BTreeSet<String>,
    ) -> Result<Vec<RuleStats>, FaultError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let healed: HealResult = self
            .call(Call::Heal(HealArgs {
                names: names.into_iter().collect(),
                all: false,
                flush: false,
            }))
            .await?;
        for problem in healed.problems {
            self.recorder().write(Event::Trouble {
                text: format!("healing step {step}: {problem}"),
            });
        }
        Ok(healed.healed)
    }

    /// Writes down the counters of the rules that act.
    pub(super) async fn sample(&self) -> Result<(), FaultError> {
        let names: BTreeSet<String> = self
            .locked()
            .values()
            .flat_map(|active| active.rules.clone())
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        let stats: StatsResult = self.call(Call::Stats(NoArgs {})).await?;
        self.recorder().write(Event::Sample(Sample {
            rules: stats
                .rules
                .into_iter()
                .filter(|rule| names.contains(&rule.name))
                .collect(),
            lanes: stats.lanes,
        }));
        Ok(())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn names(rules: &[RuleSpec]) -> BTreeSet<String> {
    rules.iter().filter_map(|rule| rule.name.clone()).collect()
}

/// Gives a rule that names no interface those that lead to its peers.
fn find_interfaces(rule: &mut RuleSpec) -> Result<(), FaultError> {
    if !rule.iface.is_empty() {
        return Ok(());
    }
    let netns = match rule.netns.as_deref().map(text::netns::parse) {
        Some(Ok(reference)) => Netns::resolve(&reference)?,
        _ => Netns::own()?,
    };
    let peers: Vec<ipnet::IpNet> = rule
        .peer
        .iter()
        .filter_map(|peer| text::address::parse_prefix(peer).ok())
        .collect();
    let names = netns.run(|| -> Result<BTreeSet<String>, NetlinkError> {
        let routes = netlink::routes()?;
        let indices: BTreeSet<u32> = peers
            .iter()
            .flat_map(|peer| netlink::outgoing(&routes, peer))
            .collect();
        Ok(netlink::links()?
            .into_iter()
            .filter(|link| indices.contains(&link.index))
            .map(|link| link.name)
            .collect())
    })??;
    if names.is_empty() {
        return Err(FaultError::NoRoute {
            peers: rule.peer.join(", "),
        });
    }
    rule.iface = names.into_iter().collect();
    Ok(())
}
