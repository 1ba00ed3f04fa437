//! A scenario as it will be played: loops unrolled, choices drawn, ready vocabulary spelt out, partitions and rules
//! made concrete for the hosts whose part this run does. A pure function of the file, the seed and these hosts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    hash::Hasher,
    time::Duration,
};

use ipnet::IpNet;
use serde_saphyr::{Location, Spanned};
use siphasher::sip::SipHasher24;

use super::{
    file::{
        After, Check, Edge, Expectation, FileError, Loop, OneOrMany, Partition, Place, Processes,
        Ramp, RunCommand, Scenario, Service, Step, When,
    },
    names::Hosts,
    nemesis,
    shape::{self, Cut},
    vocabulary::{self, Context},
};
use crate::rules::{
    FaultSpec, MAX_NAME_LENGTH, Problem, RuleSpec, Surface, check_name,
    hosts::Hosts as SystemHosts,
    text::{address, distribution, duration, rate},
};

/// Most steps that a plan may come to.
const MAX_STEPS: usize = 10_000;
/// Most rounds of a loop.
const MAX_ROUNDS: u32 = 10_000;
/// Most values of a ramp.
const MAX_VALUES: u32 = 1_000;

/// A scenario as it will be played.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The seed that everything was drawn from.
    pub seed: u64,
    /// The hosts.
    pub hosts: Hosts,
    /// Those of them whose part this run does, and where their rules go.
    pub selves: BTreeMap<String, Part>,
    /// The steps.
    pub steps: Vec<Planned>,
}

/// Where the rules of a host go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Part {
    /// Network namespace; the run's own where absent.
    pub netns: Option<String>,
    /// Interfaces; where empty, those that lead to the hosts that are cut off.
    pub iface: Vec<String>,
}

/// A step as it will be played.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// Its name within those of the groups around it: `split`, `loop-2[3]/cut-1`.
    pub path: String,
    /// Where it stands in the file.
    pub place: Place,
    /// When it begins.
    pub begins: Begins,
    /// What a check has to say before it begins, once it could.
    pub when: Option<When>,
    /// What it does.
    pub action: Action,
    /// How long.
    pub lasts: Option<Duration>,
    /// Whether its fault must meet packets.
    pub expect_effect: bool,
}

/// When a step begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begins {
    /// When the one before it in its group has ended.
    Next,
    /// So long after its group.
    At(Duration),
    /// After another step of its group.
    After {
        /// Its place in the group.
        step: usize,
        /// Which end of it counts.
        of: Edge,
        /// So long after that.
        plus: Duration,
    },
}

/// What a step does.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Rules act.
    Rules {
        /// The rules, complete but for what only the host knows.
        rules: Vec<RuleSpec>,
        /// The fault in words.
        words: String,
    },
    /// Hosts are cut from each other, of which one is only known when a command has named it.
    AskedPartition {
        /// The partition.
        partition: Partition,
        /// The step's own seed.
        seed: u64,
    },
    /// A fault changes from value to value.
    Ramp {
        /// For each value its text and its rules, which have the same names each time. Without rules where the value
        /// is zero and the fault has nothing else.
        values: Vec<(String, Vec<RuleSpec>)>,
        /// How long each value lasts.
        each: Duration,
        /// The fault in words.
        words: String,
    },
    /// Faults of these steps are healed; of all where empty.
    Heal(Vec<String>),
    /// A command is run.
    Run {
        /// The command.
        run: RunCommand,
        /// In this node; on the host itself where absent.
        on: Option<String>,
    },
    /// Processes stand still.
    Pause(Processes),
    /// Processes go on.
    Resume(Processes),
    /// Processes get a signal.
    Kill {
        /// Which.
        processes: Processes,
        /// Name of the signal, without SIG.
        signal: String,
    },
    /// A service is started again.
    Start(String),
    /// Nothing happens.
    Wait(Duration),
    /// Steps of its own.
    Group {
        /// They begin together, instead of one after the other.
        together: bool,
        /// The steps.
        steps: Vec<Planned>,
    },
    /// The part of other hosts, which takes its time here too.
    Others(Box<Self>),
}

/// The seed of one step: SipHash-2-4 of its path, keyed with the run's seed.
#[must_use]
pub fn step_seed(seed: u64, path: &str) -> u64 {
    let mut hasher = SipHasher24::new_with_keys(seed, 0x7363_656e_6172_696f);
    hasher.write(path.as_bytes());
    hasher.finish()
}

/// Makes the plan of a scenario. All mistakes of the file are returned, not only the first.
pub fn plan(
    path: &str,
    text: &str,
    scenario: &Scenario,
    seed: u64,
    hosts: Hosts,
    selves: BTreeMap<String, Part>,
) -> Result<Plan, Vec<FileError>> {
    let mut planner = Planner {
        file: path,
        text,
        scenario,
        seed,
        hosts,
        selves,
        system: SystemHosts::system(),
        errors: Vec::new(),
        count: 0,
        made_from: None,
    };
    planner.whole();
    let steps = planner.group("", &scenario.steps, &mut Vec::new());
    planner.heals(&steps);
    if !planner.errors.is_empty() {
        return Err(planner.errors);
    }
    Ok(Plan {
        seed,
        hosts: planner.hosts,
        selves: planner.selves,
        steps,
    })
}

struct Planner<'a> {
    file: &'a str,
    text: &'a str,
    scenario: &'a Scenario,
    seed: u64,
    hosts: Hosts,
    selves: BTreeMap<String, Part>,
    system: SystemHosts,
    errors: Vec<FileError>,
    count: usize,
    /// While steps are planned that a macro stands for: where that stands.
    made_from: Option<Place>,
}

/// Names of a group's steps and their paths, for those further in.
type Scope = BTreeMap<String, String>;

impl Planner<'_> {
    fn wrong(&mut self, at: Option<Place>, problem: impl Into<String>) {
        self.errors.push(FileError {
            path: self.file.to_owned(),
            at,
            problem: problem.into(),
            excerpt: at.and_then(|at| excerpt(self.text, at)),
        });
    }

    /// What is not a step: names of hosts, checks and services.
    fn whole(&mut self) {
        if let Err(problem) = check_name(&self.scenario.name) {
            self.wrong(
                None,
                format!(
                    "name '{}' {}: {}",
                    self.scenario.name, problem.problem, problem.help
                ),
            );
        }
        let mut seen = BTreeSet::new();
        for check in &self.scenario.checks {
            let at = Some(Place::from(check));
            if !seen.insert(check.value.name.clone()) {
                self.wrong(
                    at,
                    format!("there is another check '{}' before", check.value.name),
                );
            }
            self.check(at, &check.value);
        }
        let expect = &self.scenario.expect;
        if let Expectation::Fails(names) = &expect.value {
            for name in names.list() {
                if !seen.contains(name) {
                    let known = self.check_names();
                    self.wrong(
                        Some(Place::from(expect)),
                        format!("'expect': there is no check '{name}'; there are: {known}"),
                    );
                }
            }
        }
        let Some(lab) = &self.scenario.lab else {
            return;
        };
        let mut seen = BTreeSet::new();
        for service in &lab.services {
            let at = Some(Place::from(service));
            if !seen.insert(service.value.name.clone()) {
                self.wrong(
                    at,
                    format!("there is another service '{}' before", service.value.name),
                );
            }
            self.service(at, &service.value);
        }
    }

    fn service(&mut self, at: Option<Place>, service: &Service) {
        if let Err(problem) = check_name(&service.name) {
            self.wrong(
                at,
                format!(
                    "service name '{}' {}: {}",
                    service.name, problem.problem, problem.help
                ),
            );
        }
        self.node(at, &service.on);
        if let Some(ready) = &service.ready {
            let asks = [
                ready.command.is_some(),
                ready.tcp.is_some(),
                ready.http.is_some(),
            ];
            if asks.iter().filter(|&&asks| asks).count() != 1 || ready.stream.is_some() {
                self.wrong(
                    at,
                    format!(
                        "'ready' of service '{}' needs exactly one of: command, tcp, http",
                        service.name
                    ),
                );
            }
        }
    }

    fn check(&mut self, at: Option<Place>, check: &Check) {
        if let Err(problem) = check_name(&check.name) {
            self.wrong(
                at,
                format!(
                    "check name '{}' {}: {}",
                    check.name, problem.problem, problem.help
                ),
            );
        }
        let asks = [
            check.command.is_some(),
            check.tcp.is_some(),
            check.http.is_some(),
            check.stream.is_some(),
        ];
        if asks.iter().filter(|&&asks| asks).count() != 1 {
            self.wrong(
                at,
                format!(
                    "check '{}' needs exactly one of: command, tcp, http, stream",
                    check.name
                ),
            );
        }
        if check.stream.is_some() && check.at_end {
            self.wrong(
                at,
                format!(
                    "check '{}': a stream runs all the time, and not at_end",
                    check.name
                ),
            );
        }
        if let Some(tcp) = &check.tcp
            && let Err(problem) = super::names::host_and_port(&self.hosts, tcp)
        {
            self.wrong(at, format!("check '{}': {problem}", check.name));
        }
        if let Some(http) = &check.http
            && let Err(problem) = super::names::url(&self.hosts, &http.url)
        {
            self.wrong(at, format!("check '{}': {problem}", check.name));
        }
        if check.every.0.is_zero() || check.timeout.0.is_zero() {
            self.wrong(
                at,
                format!(
                    "check '{}': every and timeout must be above zero",
                    check.name
                ),
            );
        }
        if let Some(on) = &check.on {
            self.node(at, on);
        }
    }

    /// Makes sure that a name is a node of the lab.
    fn node(&mut self, at: Option<Place>, name: &str) {
        let nodes = self.scenario.lab.as_ref().map(|lab| lab.nodes.names());
        match nodes {
            None => self.wrong(
                at,
                format!("'on: {name}' needs a lab, and this scenario makes none"),
            ),
            Some(nodes) if !nodes.iter().any(|node| node == name) => self.wrong(
                at,
                format!("the lab has no node '{name}'; it has {}", nodes.join(", ")),
            ),
            Some(_) => {}
        }
    }

    /// Where a step stands in the file, or the macro that it was made from.
    fn place(&self, step: &Spanned<Step>) -> Place {
        let own = Place::from(step);
        if own.line > 0 {
            return own;
        }
        self.made_from.unwrap_or(own)
    }

    /// Plans the steps of a group whose path is `around`.
    fn group(
        &mut self,
        around: &str,
        steps: &[Spanned<Step>],
        scopes: &mut Vec<Scope>,
    ) -> Vec<Planned> {
        let paths: Vec<String> = steps
            .iter()
            .enumerate()
            .map(|(index, step)| {
                let name = match &step.value.name {
                    Some(name) => name.clone(),
                    None => format!("{}-{}", kind(&step.value), index + 1),
                };
                match around {
                    "" => name,
                    around => format!("{around}/{name}"),
                }
            })
            .collect();
        let mut scope = Scope::new();
        for (step, path) in steps.iter().zip(&paths) {
            let Some(name) = &step.value.name else {
                continue;
            };
            let at = Some(self.place(step));
            if let Err(problem) = check_name(name) {
                self.wrong(
                    at,
                    format!("name '{name}' {}: {}", problem.problem, problem.help),
                );
            }
            if scope.insert(name.clone(), path.clone()).is_some() {
                self.wrong(at, format!("there is another step '{name}' in this group"));
            }
        }
        scopes.push(scope);
        let planned = steps
            .iter()
            .zip(&paths)
            .enumerate()
            .filter_map(|(index, (step, path))| {
                self.count += 1;
                if self.count == MAX_STEPS + 1 {
                    self.wrong(
                        Some(self.place(step)),
                        format!("the scenario comes to more than {MAX_STEPS} steps here"),
                    );
                }
                if self.count > MAX_STEPS {
                    return None;
                }
                self.step(index, step, path, steps, scopes)
            })
            .collect();
        scopes.pop();
        planned
    }

    fn step(
        &mut self,
        index: usize,
        spanned: &Spanned<Step>,
        path: &str,
        siblings: &[Spanned<Step>],
        scopes: &mut Vec<Scope>,
    ) -> Option<Planned> {
        let step = &spanned.value;
        let place = self.place(spanned);
        let at = Some(place);
        let begins = self.begins(at, index, step, siblings);
        if let Some(when) = &step.when {
            self.when(at, when);
        }
        if let Some(on) = &step.on {
            for host in on.list() {
                if self.hosts.addresses(host).is_none() {
                    let known = self.hosts.names().join(", ");
                    self.wrong(
                        at,
                        format!("'on': there is no host '{host}'; there are: {known}"),
                    );
                }
            }
        }
        let action = self.action(at, step, path, scopes)?;
        if step.lasts.is_some() && !action.can_last() {
            self.wrong(
                at,
                format!("'for' has no meaning for a {} step", kind(step)),
            );
        }
        Some(Planned {
            path: path.to_owned(),
            place,
            begins,
            when: step.when.clone(),
            action,
            lasts: step.lasts.map(|lasts| lasts.0),
            expect_effect: step.expect_effect.unwrap_or(true),
        })
    }

    fn begins(
        &mut self,
        at: Option<Place>,
        index: usize,
        step: &Step,
        siblings: &[Spanned<Step>],
    ) -> Begins {
        match (&step.at, &step.after) {
            (None, None) => Begins::Next,
            (Some(offset), None) => Begins::At(offset.0),
            (None, Some(after)) => self.after(at, index, after, siblings),
            (Some(_), Some(_)) => {
                self.wrong(at, "a step has at most one of: at, after");
                Begins::Next
            }
        }
    }

    /// Makes sure that the check of a step's `when` can be waited for.
    fn when(&mut self, at: Option<Place>, when: &When) {
        match self
            .scenario
            .checks
            .iter()
            .find(|check| check.value.name == when.check)
        {
            None => {
                let known = self.check_names();
                self.wrong(
                    at,
                    format!(
                        "'when': there is no check '{}'; there are: {known}",
                        when.check
                    ),
                );
            }
            Some(check) if check.value.at_end => self.wrong(
                at,
                format!("'when': check '{}' is asked at the end only", when.check),
            ),
            Some(_) => {}
        }
    }

    fn after(
        &mut self,
        at: Option<Place>,
        index: usize,
        after: &After,
        siblings: &[Spanned<Step>],
    ) -> Begins {
        let after = after.precisely();
        let found = siblings
            .iter()
            .position(|step| step.value.name.as_ref() == Some(&after.step));
        match found {
            Some(found) if found < index => Begins::After {
                step: found,
                of: after.of,
                plus: after.plus.0,
            },
            Some(_) => {
                self.wrong(
                    at,
                    format!("'after': step '{}' must stand before this one", after.step),
                );
                Begins::Next
            }
            None => {
                let named: Vec<&str> = siblings[..index]
                    .iter()
                    .filter_map(|step| step.value.name.as_deref())
                    .collect();
                self.wrong(
                    at,
                    format!(
                        "'after': there is no step '{}' before this one in its group{}",
                        after.step,
                        if named.is_empty() {
                            String::new()
                        } else {
                            format!("; there are: {}", named.join(", "))
                        }
                    ),
                );
                Begins::Next
            }
        }
    }

    fn check_names(&self) -> String {
        let names: Vec<&str> = self
            .scenario
            .checks
            .iter()
            .map(|check| check.value.name.as_str())
            .collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each kind of step")]
    fn action(
        &mut self,
        at: Option<Place>,
        step: &Step,
        path: &str,
        scopes: &mut Vec<Scope>,
    ) -> Option<Action> {
        let kinds = kinds(step);
        if kinds.len() != 1 {
            let found = if kinds.is_empty() {
                "this one has none".to_owned()
            } else {
                format!("this one has {}", kinds.join(", "))
            };
            self.wrong(
                at,
                format!("a step has exactly one of: {}; {found}", KINDS.join(", ")),
            );
            return None;
        }
        let selves = self.selves_of(step);
        let ours = |action: Action| {
            if selves.is_empty() {
                Action::Others(Box::new(action))
            } else {
                action
            }
        };
        if let Some(rule) = &step.rule {
            let rules = self.rules(at, rule, path, &selves)?;
            return Some(ours(Action::Rules {
                rules,
                words: words_of(rule),
            }));
        }
        if let Some(partition) = &step.partition {
            return self.partition(at, partition, path);
        }
        if let Some(ramp) = &step.ramp {
            return self.ramp(at, ramp, path, &selves).map(ours);
        }
        if let Some(heal) = &step.heal {
            return Some(self.heal(at, heal, scopes));
        }
        if let Some(run) = &step.run {
            let on = match &step.on {
                Some(on) if on.list().len() == 1 => on.list().first().cloned(),
                Some(_) => {
                    self.wrong(at, "a command is run on one host: 'on' names several");
                    None
                }
                None => None,
            };
            let run = Action::Run {
                run: run.precisely(),
                on: on.filter(|_| self.scenario.lab.is_some()),
            };
            return Some(ours(run));
        }
        for (processes, pause) in [(&step.pause, true), (&step.resume, false)] {
            let Some(processes) = processes else {
                continue;
            };
            self.processes(at, processes);
            let processes = processes.clone();
            return Some(ours(if pause {
                Action::Pause(processes)
            } else {
                Action::Resume(processes)
            }));
        }
        if let Some(kill) = &step.kill {
            let processes = kill.processes();
            self.processes(at, &processes);
            if step.lasts.is_some() && kill.service.is_none() {
                self.wrong(
                    at,
                    "'for' of a kill step is after how long the service starts again: it needs 'service'",
                );
            }
            let signal = kill.signal.as_deref().unwrap_or("KILL");
            let signal = signal.trim_start_matches("SIG").to_ascii_uppercase();
            if format!("SIG{signal}")
                .parse::<nix::sys::signal::Signal>()
                .is_err()
            {
                self.wrong(
                    at,
                    format!("'{signal}' is no signal; KILL, TERM, HUP and so on are"),
                );
            }
            return Some(ours(Action::Kill { processes, signal }));
        }
        if let Some(service) = &step.start {
            self.known_service(at, service);
            return Some(ours(Action::Start(service.clone())));
        }
        if let Some(wait) = &step.wait {
            return Some(Action::Wait(wait.0));
        }
        if let Some(steps) = &step.sequence {
            let steps = self.group(path, steps, scopes);
            return Some(Action::Group {
                together: false,
                steps,
            });
        }
        if let Some(steps) = &step.parallel {
            let steps = self.group(path, steps, scopes);
            return Some(Action::Group {
                together: true,
                steps,
            });
        }
        if let Some(repeat) = &step.repeat {
            return self.repeat(at, repeat, path, scopes);
        }
        if let Some(steps) = &step.choose {
            if steps.is_empty() {
                self.wrong(at, "'choose' has no step to choose");
                return None;
            }
            // All of them have to be right, also those that this seed does not choose.
            let mut all = self.group(path, steps, scopes);
            let chosen = step_seed(self.seed, path) % steps.len() as u64;
            let chosen = usize::try_from(chosen)
                .ok()
                .filter(|&index| index < all.len())?;
            let mut only = all.swap_remove(chosen);
            only.begins = Begins::Next;
            return Some(Action::Group {
                together: false,
                steps: vec![only],
            });
        }
        let names = self.hosts.names();
        let services: Vec<(String, String)> = self
            .scenario
            .lab
            .iter()
            .flat_map(|lab| &lab.services)
            .map(|service| (service.value.name.clone(), service.value.on.clone()))
            .collect();
        let context = Context {
            hosts: &names,
            seed: step_seed(self.seed, path),
            services: &services,
            lab: self.scenario.lab.is_some(),
        };
        let expanded = match (&step.profile, &step.nemesis) {
            (Some(profile), _) => vocabulary::expand(profile, &context),
            (None, Some(nemesis)) => nemesis::expand(nemesis, &context),
            (None, None) => return None,
        };
        match expanded {
            Ok(mut expanded) => {
                // What a macro stands for is about the hosts that its step is about.
                if let Some(on) = &step.on {
                    inherit(&mut expanded, on);
                }
                let outer = std::mem::replace(&mut self.made_from, at);
                let expanded = Spanned::new(expanded, Location::UNKNOWN, Location::UNKNOWN);
                let steps = self.group(path, &[expanded], scopes);
                self.made_from = outer;
                Some(Action::Group {
                    together: false,
                    steps,
                })
            }
            Err(problem) => {
                self.wrong(at, format!("{}: {}", problem.problem, problem.help));
                None
            }
        }
    }

    /// The hosts whose part we do, of those that a step is about.
    fn selves_of(&self, step: &Step) -> Vec<String> {
        let all = self.selves.keys().cloned();
        match &step.on {
            None => all.collect(),
            Some(on) => all.filter(|host| on.list().contains(host)).collect(),
        }
    }

    /// A rule of a step, for each of these hosts.
    fn rules(
        &mut self,
        at: Option<Place>,
        rule: &RuleSpec,
        path: &str,
        selves: &[String],
    ) -> Option<Vec<RuleSpec>> {
        for (field, given) in [
            ("name", rule.name.is_some()),
            ("group", rule.group.is_some()),
            ("for", rule.lifetime.is_some()),
        ] {
            if given {
                self.wrong(
                    at,
                    format!("'{field}' is the step's: write it there, not in its rule"),
                );
            }
        }
        let mut resolved = rule.clone();
        for (field, list) in [
            ("peer", &mut resolved.peer),
            ("local", &mut resolved.local),
            ("src", &mut resolved.src),
            ("dst", &mut resolved.dst),
            ("except", &mut resolved.except),
        ] {
            match resolve(&self.hosts, &self.system, list) {
                Ok(addresses) => *list = addresses,
                Err(problem) => {
                    self.wrong(at, format!("{field}: {problem}"));
                    return None;
                }
            }
        }
        if let Some(text) = &mut resolved.fault.distribution
            && let Some(file) = distribution::file(text)
        {
            let read = fs::read_to_string(file)
                .map_err(|error| format!("reading {file}: {error}"))
                .and_then(|content| {
                    distribution::read(file, &content)
                        .map_err(|problem| format!("{file}: {}; {}", problem.problem, problem.help))
                });
            match read {
                Ok(read) => *text = distribution::format(&read),
                Err(problem) => {
                    self.wrong(at, format!("distribution: {problem}"));
                    return None;
                }
            }
        }
        let mut rules = Vec::new();
        // A file is judged as a whole also where no part of it is ours.
        let nobody = [(
            String::new(),
            Part {
                netns: None,
                iface: vec!["any".to_owned()],
            },
        )];
        let parts: Vec<(String, Part)> = if selves.is_empty() {
            nobody.to_vec()
        } else {
            selves
                .iter()
                .filter_map(|host| Some((host.clone(), self.selves.get(host)?.clone())))
                .collect()
        };
        let several = parts.len() > 1 || self.scenario.lab.is_some();
        for (host, part) in parts {
            let mut spec = resolved.clone();
            if spec.netns.is_none() {
                spec.netns.clone_from(&part.netns);
            }
            if spec.iface.is_empty() {
                spec.iface.clone_from(&part.iface);
            }
            if spec.iface.is_empty() {
                self.wrong(
                    at,
                    "where does this rule act? give 'iface' in the rule, or in 'targets' for all rules",
                );
                return None;
            }
            self.named(&mut spec, path, several.then_some(host.as_str()));
            if let Err(error) = spec.parse() {
                self.wrong(at, format!("{error}; {}", error.help(Surface::File)));
                return None;
            }
            rules.push(spec);
        }
        if selves.is_empty() {
            rules.clear();
        }
        Some(rules)
    }

    /// Gives a rule its name, group and seed: they depend on scenario, step and host alone.
    fn named(&self, spec: &mut RuleSpec, path: &str, host: Option<&str>) {
        let full = match host {
            Some(host) => format!("{}:{path}:{host}", self.scenario.name),
            None => format!("{}:{path}", self.scenario.name),
        };
        spec.name = Some(rule_name(&full));
        spec.group = Some(rule_name(&format!("{}:{path}", self.scenario.name)));
        if spec.seed.is_none() {
            spec.seed = Some(step_seed(self.seed, &full) >> 16);
        }
    }

    fn partition(
        &mut self,
        at: Option<Place>,
        partition: &Partition,
        path: &str,
    ) -> Option<Action> {
        let names = self.hosts.names();
        let seed = step_seed(self.seed, path);
        if shape::needs_asking(partition) {
            // With any host as the answer, the rest of it has to be right.
            let any = partition.hosts.as_ref().unwrap_or(&names).first().cloned();
            if let Err(problem) = shape::cut(partition, &names, seed, any.as_deref()) {
                self.wrong(at, format!("{}: {}", problem.problem, problem.help));
                return None;
            }
            return Some(Action::AskedPartition {
                partition: partition.clone(),
                seed,
            });
        }
        let cut = match shape::cut(partition, &names, seed, None) {
            Ok(cut) => cut,
            Err(problem) => {
                self.wrong(at, format!("{}: {}", problem.problem, problem.help));
                return None;
            }
        };
        let rules = partition_rules(
            &self.scenario.name,
            self.seed,
            path,
            &cut,
            &self.hosts,
            &self.selves,
        );
        let words = format!("partition {}", cut.words);
        let is_others = rules.is_empty();
        let action = Action::Rules { rules, words };
        Some(if is_others {
            Action::Others(Box::new(action))
        } else {
            action
        })
    }

    fn ramp(
        &mut self,
        at: Option<Place>,
        ramp: &Ramp,
        path: &str,
        selves: &[String],
    ) -> Option<Action> {
        if ramp.steps < 2 || ramp.steps > MAX_VALUES {
            self.wrong(
                at,
                format!("a ramp has 2 to {MAX_VALUES} steps, not {}", ramp.steps),
            );
            return None;
        }
        if ramp.over.0.is_zero() {
            self.wrong(at, "a ramp goes over a time above zero");
            return None;
        }
        let texts = match between(&ramp.from, &ramp.to, ramp.steps) {
            Ok(texts) if texts.iter().all(|text| is_nothing(text)) => {
                self.wrong(at, "a ramp goes to or from a value above zero");
                return None;
            }
            Ok(texts) => texts,
            Err(problem) => {
                self.wrong(at, format!("ramp: {problem}"));
                return None;
            }
        };
        let mut values = Vec::with_capacity(texts.len());
        for text in texts {
            let rule = match at_value(&ramp.rule, &ramp.field, &text) {
                Ok(rule) => rule,
                Err(problem) => {
                    self.wrong(at, format!("ramp: {problem}"));
                    return None;
                }
            };
            let rules = match rule {
                Some(rule) => self.rules(at, &rule, path, selves)?,
                None => Vec::new(),
            };
            values.push((text, rules));
        }
        Some(Action::Ramp {
            values,
            each: ramp.over.0 / ramp.steps,
            words: format!(
                "{} from {} to {} over {}",
                ramp.field, ramp.from, ramp.to, ramp.over
            ),
        })
    }

    fn heal(&mut self, at: Option<Place>, heal: &OneOrMany, scopes: &[Scope]) -> Action {
        if heal.list() == ["all"] {
            return Action::Heal(Vec::new());
        }
        let mut paths = Vec::new();
        for name in heal.list() {
            if let Some(path) = scopes.iter().rev().find_map(|scope| scope.get(name)) {
                paths.push(path.clone());
                continue;
            }
            let known: Vec<&str> = scopes
                .iter()
                .flat_map(Scope::keys)
                .map(String::as_str)
                .collect();
            self.wrong(
                at,
                format!(
                    "'heal': there is no step '{name}' here{}",
                    if known.is_empty() {
                        "; give the step a name, or write 'heal: all'".to_owned()
                    } else {
                        format!("; there are: {}, or 'all'", known.join(", "))
                    }
                ),
            );
        }
        Action::Heal(paths)
    }

    /// Makes sure that steps which are to be healed have something to heal.
    fn heals(&mut self, steps: &[Planned]) {
        let mut faults = BTreeSet::new();
        let mut heals = Vec::new();
        walk(steps, &mut |step| match &step.action {
            Action::Heal(paths) => heals.push((step.place, paths.clone())),
            action if action.can_be_healed() => {
                faults.insert(step.path.clone());
            }
            _ => {}
        });
        for (place, paths) in heals {
            for path in paths {
                let inside = format!("{path}/");
                if !faults
                    .iter()
                    .any(|fault| *fault == path || fault.starts_with(&inside))
                {
                    self.wrong(Some(place), format!("'heal': step '{path}' is no fault"));
                }
            }
        }
    }

    fn repeat(
        &mut self,
        at: Option<Place>,
        repeat: &Loop,
        path: &str,
        scopes: &mut Vec<Scope>,
    ) -> Option<Action> {
        if repeat.times == 0 || repeat.times > MAX_ROUNDS {
            self.wrong(
                at,
                format!("a loop goes 1 to {MAX_ROUNDS} times, not {}", repeat.times),
            );
            return None;
        }
        let place = at.unwrap_or(Place { line: 1, column: 1 });
        let mut rounds = Vec::new();
        for round in 1..=repeat.times {
            if !self.errors.is_empty() && round > 1 {
                break;
            }
            let path = format!("{path}[{round}]");
            let steps = self.group(&path, &repeat.steps, scopes);
            rounds.push(Planned {
                path,
                place,
                begins: Begins::Next,
                when: None,
                action: Action::Group {
                    together: false,
                    steps,
                },
                lasts: None,
                expect_effect: true,
            });
        }
        Some(Action::Group {
            together: false,
            steps: rounds,
        })
    }

    fn processes(&mut self, at: Option<Place>, processes: &Processes) {
        let given = [
            processes.service.is_some(),
            processes.asked.is_some(),
            processes.pid.is_some(),
            processes.pid_file.is_some(),
            processes.process.is_some(),
            processes.unit.is_some(),
            processes.cgroup.is_some(),
        ];
        if given.iter().filter(|&&given| given).count() != 1 {
            self.wrong(
                at,
                "which processes? exactly one of: service, asked, pid, pid_file, process, unit, cgroup",
            );
        }
        if let Some(service) = &processes.service {
            self.known_service(at, service);
        }
        if let Some(on) = processes.asked.as_ref().and_then(|asked| asked.on.as_ref()) {
            self.node(at, on);
        }
    }

    fn known_service(&mut self, at: Option<Place>, name: &str) {
        let names: Vec<&str> = self
            .scenario
            .lab
            .iter()
            .flat_map(|lab| &lab.services)
            .map(|service| service.value.name.as_str())
            .collect();
        if !names.contains(&name) {
            let known = if names.is_empty() {
                "this scenario's lab starts none".to_owned()
            } else {
                format!("there are: {}", names.join(", "))
            };
            self.wrong(at, format!("there is no service '{name}'; {known}"));
        }
    }
}

/// Calls `f` for each step, from the outside in.
pub fn walk(steps: &[Planned], f: &mut impl FnMut(&Planned)) {
    for step in steps {
        f(step);
        if let Action::Group { steps, .. } = &step.action {
            walk(steps, f);
        }
    }
}

/// The kinds of steps, as they are written.
const KINDS: [&str; 16] = [
    "rule",
    "partition",
    "heal",
    "run",
    "pause",
    "resume",
    "kill",
    "start",
    "wait",
    "sequence",
    "parallel",
    "loop",
    "ramp",
    "choose",
    "nemesis",
    "profile",
];

fn kinds(step: &Step) -> Vec<&'static str> {
    let given = [
        step.rule.is_some(),
        step.partition.is_some(),
        step.heal.is_some(),
        step.run.is_some(),
        step.pause.is_some(),
        step.resume.is_some(),
        step.kill.is_some(),
        step.start.is_some(),
        step.wait.is_some(),
        step.sequence.is_some(),
        step.parallel.is_some(),
        step.repeat.is_some(),
        step.ramp.is_some(),
        step.choose.is_some(),
        step.nemesis.is_some(),
        step.profile.is_some(),
    ];
    KINDS
        .into_iter()
        .zip(given)
        .filter_map(|(kind, given)| given.then_some(kind))
        .collect()
}

fn kind(step: &Step) -> &'static str {
    kinds(step).first().copied().unwrap_or("step")
}

/// Gives steps the hosts of the step that they were made from, unless they name their own.
fn inherit(step: &mut Step, on: &OneOrMany) {
    if step.on.is_none() && step.sequence.is_none() && step.parallel.is_none() {
        step.on = Some(on.clone());
    }
    let lists = [&mut step.sequence, &mut step.parallel, &mut step.choose];
    for inner in lists.into_iter().flatten().flatten() {
        inherit(&mut inner.value, on);
    }
    if let Some(repeat) = &mut step.repeat {
        for inner in &mut repeat.steps {
            inherit(&mut inner.value, on);
        }
    }
}

/// A rule in words.
fn words_of(rule: &RuleSpec) -> String {
    // Texts and numbers only: serialising them does not fail.
    let mut text = String::new();
    if let Ok(serde_json::Value::Object(fault)) = serde_json::to_value(&rule.fault) {
        for (field, value) in fault {
            let value = match value {
                serde_json::Value::String(value) => format!(" {value}"),
                serde_json::Value::Bool(_) | serde_json::Value::Object(_) => String::new(),
                value => format!(" {value}"),
            };
            let separator = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{separator}{}{value}", field.replace('_', "-"));
        }
    }
    let lists = [
        ("to and from", &rule.peer),
        ("of", &rule.local),
        ("from", &rule.src),
        ("to", &rule.dst),
        ("except", &rule.except),
        ("port", &rule.peer_port),
        ("own port", &rule.local_port),
        ("source port", &rule.src_port),
        ("destination port", &rule.dst_port),
        ("protocol", &rule.proto),
    ];
    for (word, list) in lists {
        if !list.is_empty() {
            let _ = write!(text, " {word} {}", list.join(","));
        }
    }
    if let Some(flows) = &rule.flows {
        let _ = write!(text, " {flows} of flows");
    }
    if let Some(direction) = &rule.direction {
        let _ = write!(text, " ({direction})");
    }
    text
}

/// A name that rules may have: what they may not contain becomes a dot, and one that is too long ends in a hash.
fn rule_name(full: &str) -> String {
    let clean: String = full
        .chars()
        .map(|c| match c {
            '/' => ':',
            c if c.is_ascii_alphanumeric() || ".:_-".contains(c) => c,
            _ => '.',
        })
        .collect();
    if clean.len() <= MAX_NAME_LENGTH {
        return clean;
    }
    let hash = step_seed(0, full) >> 32;
    format!("{}~{hash:08x}", &clean[..MAX_NAME_LENGTH - 9]).replace('~', "-")
}

/// Replaces names of hosts by their addresses; what is no name stays for the rule's own validation.
fn resolve(hosts: &Hosts, system: &SystemHosts, list: &[String]) -> Result<Vec<String>, String> {
    let mut resolved = Vec::new();
    for entry in list.iter().flat_map(|text| text.split(',')).map(str::trim) {
        let (mark, name) = match entry.strip_prefix('!') {
            Some(name) => ("!", name),
            None => ("", entry),
        };
        if let Some(nets) = hosts.addresses(name) {
            resolved.extend(
                nets.iter()
                    .map(|net| format!("{mark}{}", address::format_prefix(net))),
            );
            continue;
        }
        let one = [entry.to_owned()];
        resolved.extend(system.resolve_list(&one).map_err(|_| {
            format!(
                "there is no host '{name}'; there are: {}",
                hosts.names().join(", ")
            )
        })?);
    }
    Ok(resolved)
}

/// The rules by which the hosts whose part we do cut the links of a partition. Where both ends of a link are ours,
/// its sender cuts it.
#[must_use]
pub fn partition_rules(
    scenario: &str,
    seed: u64,
    path: &str,
    cut: &Cut,
    hosts: &Hosts,
    selves: &BTreeMap<String, Part>,
) -> Vec<RuleSpec> {
    let mut rules = Vec::new();
    for (host, part) in selves {
        let out: BTreeSet<&str> = cut
            .links
            .iter()
            .filter(|(from, _)| from == host)
            .map(|(_, to)| to.as_str())
            .collect();
        let into: BTreeSet<&str> = cut
            .links
            .iter()
            .filter(|(from, to)| to == host && !selves.contains_key(from))
            .map(|(from, _)| from.as_str())
            .collect();
        let sets = [
            ("both", out.intersection(&into).copied().collect::<Vec<_>>()),
            ("egress", out.difference(&into).copied().collect()),
            ("ingress", into.difference(&out).copied().collect()),
        ];
        for (direction, peers) in sets {
            let peer: Vec<String> = peers
                .iter()
                .filter_map(|peer| hosts.addresses(peer))
                .flatten()
                .map(address::format_prefix)
                .collect();
            if peer.is_empty() {
                continue;
            }
            let full = format!("{scenario}:{path}:{host}:{direction}");
            rules.push(RuleSpec {
                name: Some(rule_name(&full)),
                group: Some(rule_name(&format!("{scenario}:{path}"))),
                netns: part.netns.clone(),
                iface: part.iface.clone(),
                direction: Some(direction.to_owned()),
                peer,
                fault: crate::rules::FaultSpec::cut(),
                seed: Some(step_seed(seed, &full) >> 16),
                ..RuleSpec::default()
            });
        }
    }
    rules
}

/// `count` texts from one value to another in even steps, both ends included: of times, shares in percent, rates, or
/// whole numbers.
fn between(from: &str, to: &str, count: u32) -> Result<Vec<String>, String> {
    let steps = u128::from(count - 1);
    let even = |from: u128, to: u128| -> Vec<u128> {
        (0..=steps)
            .map(|step| (from * (steps - step) + to * step) / steps)
            .collect()
    };
    let times = |text: &str| match text {
        "0" => Some(Duration::ZERO),
        text => duration::parse(text).ok(),
    };
    if let (Some(from), Some(to)) = (times(from), times(to)) {
        return Ok(even(from.as_nanos(), to.as_nanos())
            .into_iter()
            .map(|nanos| {
                let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
                duration::format(Duration::from_nanos(nanos))
            })
            .collect());
    }
    // In millionths of a percent.
    let share = |text: &str| {
        let percent: f64 = text.strip_suffix('%')?.trim().parse().ok()?;
        (0.0..=100.0)
            .contains(&percent)
            .then(|| format!("{:.0}", percent * 1e6).parse::<u128>().ok())
            .flatten()
    };
    if let (Some(from), Some(to)) = (share(from), share(to)) {
        return Ok(even(from, to)
            .into_iter()
            .map(|share| format!("{}.{:06}%", share / 1_000_000, share % 1_000_000))
            .collect());
    }
    if let (Ok(from), Ok(to)) = (rate::parse(from), rate::parse(to)) {
        return Ok(even(from.into(), to.into())
            .into_iter()
            .map(|bits| format!("{bits}bit"))
            .collect());
    }
    if let (Ok(from), Ok(to)) = (from.parse::<u64>(), to.parse::<u64>()) {
        return Ok(even(from.into(), to.into())
            .into_iter()
            .map(|number| number.to_string())
            .collect());
    }
    Err(format!(
        "'{from}' and '{to}' are not two times (0ms, 2s), two shares (0%, 5%), two rates (1mbit) or two numbers"
    ))
}

/// Whether a value of a ramp is a time or a share of zero.
fn is_nothing(text: &str) -> bool {
    let share = text
        .strip_suffix('%')
        .and_then(|number| number.parse().ok());
    duration::parse(text).is_ok_and(|time| time.is_zero())
        || share.is_some_and(|share: f64| share <= 0.0)
}

/// The rule of a ramp at one of its values; none where the value is zero and there is no other fault.
fn at_value(rule: &RuleSpec, field: &str, text: &str) -> Result<Option<RuleSpec>, String> {
    let with = with_field(rule, field, text)?;
    // A delay of zero is one if it varies.
    if !is_nothing(text) || (field == "delay" && with.fault.jitter.is_some()) {
        return Ok(Some(with));
    }
    Ok((rule.fault != FaultSpec::default()).then(|| rule.clone()))
}

/// A rule with one field of its fault set.
fn with_field(rule: &RuleSpec, field: &str, text: &str) -> Result<RuleSpec, String> {
    let mut value = serde_json::to_value(rule).map_err(|error| error.to_string())?;
    let fault = value
        .as_object_mut()
        .map(|rule| rule.entry("fault").or_insert_with(|| serde_json::json!({})));
    if let Some(serde_json::Value::Object(fault)) = fault {
        let number = text.parse::<u64>().ok().map(serde_json::Value::from);
        fault.insert(
            field.to_owned(),
            number.unwrap_or_else(|| serde_json::Value::from(text)),
        );
    }
    serde_json::from_value(value).map_err(|error| format!("field '{field}': {error}"))
}

/// The lines of a file around a place, with the place marked.
fn excerpt(text: &str, at: Place) -> Option<String> {
    let number = usize::try_from(at.line).ok()?;
    let line = text.lines().nth(number.checked_sub(1)?)?;
    let column = usize::try_from(at.column).ok()?.saturating_sub(1);
    let width = number.to_string().len();
    Some(format!(
        "{number} | {line}\n{:width$} | {:column$}^",
        "", ""
    ))
}

/// How far into the run something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    /// So long after the first step's beginning, at the earliest.
    pub at: Duration,
    /// Whether it is known to be then: what follows a command or waits for a check is not.
    pub known: bool,
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.known { "" } else { "≥" };
        f.pad(&format!("{sign}{:.1}s", self.at.as_secs_f64()))
    }
}

/// One line of the timeline.
#[derive(Debug, Clone, PartialEq)]
pub struct TimelineEntry {
    /// When the step begins.
    pub begins: Moment,
    /// When it ends.
    pub ends: Moment,
    /// How deep it stands in groups.
    pub depth: usize,
    /// The step.
    pub path: String,
    /// What it does.
    pub words: String,
}

impl Plan {
    /// When each step will begin and end, in the order of the file.
    #[must_use]
    pub fn timeline(&self) -> Vec<TimelineEntry> {
        let mut entries = Vec::new();
        let start = Moment {
            at: Duration::ZERO,
            known: true,
        };
        timeline(&self.steps, start, false, 0, &mut entries);
        entries
    }
}

fn timeline(
    steps: &[Planned],
    start: Moment,
    together: bool,
    depth: usize,
    entries: &mut Vec<TimelineEntry>,
) -> Moment {
    let later = |moment: Moment, by: Duration| Moment {
        at: moment.at.saturating_add(by),
        ..moment
    };
    let mut known: Vec<(Moment, Moment)> = Vec::new();
    let mut last = start;
    let mut end = start;
    for step in steps {
        let mut begins = match &step.begins {
            Begins::Next if together => start,
            Begins::Next => last,
            Begins::At(offset) => later(start, *offset),
            Begins::After { step, of, plus } => {
                let (begun, ended) = known.get(*step).copied().unwrap_or((start, start));
                later(
                    match of {
                        Edge::Start => begun,
                        Edge::End => ended,
                    },
                    *plus,
                )
            }
        };
        begins.known &= step.when.is_none();
        let index = entries.len();
        entries.push(TimelineEntry {
            begins,
            ends: begins,
            depth,
            path: step.path.clone(),
            words: step.words(),
        });
        let ends = match &step.action {
            Action::Group { together, steps } => {
                let ends = timeline(steps, begins, *together, depth + 1, entries);
                match step.lasts {
                    Some(lasts) => later(begins, lasts),
                    None => ends,
                }
            }
            Action::Run { .. } => Moment {
                known: false,
                ..begins
            },
            action => later(begins, action.takes(step.lasts)),
        };
        if let Some(entry) = entries.get_mut(index) {
            entry.ends = ends;
        }
        known.push((begins, ends));
        last = ends;
        if ends.at > end.at {
            end.at = ends.at;
        }
        end.known &= ends.known;
    }
    end
}

impl Planned {
    /// What it does, in words.
    #[must_use]
    pub fn words(&self) -> String {
        let mut words = self.action.words();
        if let Some(lasts) = self.lasts {
            let _ = write!(words, " for {}", duration::format(lasts));
        }
        if let Some(when) = &self.when {
            let state = match when.is {
                super::file::CheckState::Holding => "holds",
                super::file::CheckState::Failing => "fails",
            };
            let _ = write!(words, ", when check '{}' {state}", when.check);
        }
        words
    }
}

impl Action {
    /// Whether it can go on for a time that the step gives.
    fn can_last(&self) -> bool {
        match self {
            Self::Rules { .. }
            | Self::AskedPartition { .. }
            | Self::Pause(_)
            | Self::Kill { .. }
            | Self::Group { .. } => true,
            Self::Others(action) => action.can_last(),
            _ => false,
        }
    }

    /// Whether it is a fault that another step can heal.
    fn can_be_healed(&self) -> bool {
        match self {
            Self::Rules { .. }
            | Self::AskedPartition { .. }
            | Self::Ramp { .. }
            | Self::Pause(_) => true,
            Self::Others(action) => action.can_be_healed(),
            _ => false,
        }
    }

    /// How long it takes, as far as the file says; `lasts` is the time that its step gives.
    #[must_use]
    pub fn takes(&self, lasts: Option<Duration>) -> Duration {
        match self {
            Self::Wait(time) => *time,
            Self::Ramp { values, each, .. } => {
                *each * u32::try_from(values.len()).unwrap_or(u32::MAX)
            }
            Self::Others(action) => action.takes(lasts),
            _ => lasts.unwrap_or_default(),
        }
    }

    /// What it does, in words.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::Rules { words, .. } | Self::Ramp { words, .. } => words.clone(),
            Self::Others(action) => format!("not for this host: {}", action.words()),
            Self::AskedPartition { partition, .. } => {
                format!(
                    "partition: {}, of a host that a command names",
                    partition.shape
                )
            }
            Self::Heal(paths) if paths.is_empty() => "heal everything".to_owned(),
            Self::Heal(paths) => format!("heal {}", paths.join(", ")),
            Self::Run { run, on } => {
                let first = run.command.to_string();
                let first = first.lines().next().unwrap_or_default();
                let at = on
                    .as_ref()
                    .map_or_else(String::new, |on| format!(" on {on}"));
                format!("run{at}: {first}")
            }
            Self::Pause(processes) => format!("pause {}", which(processes)),
            Self::Resume(processes) => format!("resume {}", which(processes)),
            Self::Kill { processes, signal } => {
                format!("send {signal} to {}", which(processes))
            }
            Self::Start(service) => format!("start service {service}"),
            Self::Wait(time) => format!("wait {}", duration::format(*time)),
            Self::Group { together: true, .. } => "together:".to_owned(),
            Self::Group { .. } => "one after the other:".to_owned(),
        }
    }
}

/// Processes in words.
#[must_use]
pub fn which(processes: &Processes) -> String {
    if let Some(service) = &processes.service {
        format!("service {service}")
    } else if processes.asked.is_some() {
        "what a command names".to_owned()
    } else if let Some(pid) = processes.pid {
        format!("process {pid}")
    } else if let Some(file) = &processes.pid_file {
        format!("the process of {file}")
    } else if let Some(name) = &processes.process {
        format!("processes named {name}")
    } else if let Some(unit) = &processes.unit {
        format!("unit {unit}")
    } else {
        format!(
            "control group {}",
            processes.cgroup.as_deref().unwrap_or_default()
        )
    }
}

/// The hosts of a scenario: those it names, and the nodes of its lab at these addresses.
pub fn hosts(scenario: &Scenario, nodes: &BTreeMap<String, Vec<IpNet>>) -> Result<Hosts, Problem> {
    let mut all = nodes.clone();
    let system = SystemHosts::system();
    for (name, addresses) in &scenario.hosts {
        check_name(name).map_err(|problem| {
            Problem::new(
                format!("host name '{name}' {}", problem.problem),
                problem.help,
            )
        })?;
        if nodes.contains_key(name) {
            return Err(Problem::new(
                format!("host '{name}' is a node of the lab"),
                "the lab's nodes are hosts without being named in 'hosts'",
            ));
        }
        let mut nets = Vec::new();
        for text in addresses.list() {
            nets.extend(system.resolve(text).map_err(|error| {
                Problem::new(
                    format!("host '{name}': {error}"),
                    "an address, a prefix, or a name of /etc/hosts",
                )
            })?);
        }
        all.insert(name.clone(), nets);
    }
    Ok(Hosts::new(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::file;

    /// Plans a scenario whose hosts are `a`, `b` and `c`, of which this is `selves`.
    fn planned(text: &str, selves: &[&str], seed: u64) -> Result<Plan, Vec<FileError>> {
        let scenario = file::read("test.yaml", text).map_err(|error| vec![error])?;
        let hosts = hosts(&scenario, &BTreeMap::new()).unwrap();
        let selves = selves
            .iter()
            .map(|name| {
                let part = Part {
                    netns: None,
                    iface: scenario.targets.iface.clone(),
                };
                ((*name).to_owned(), part)
            })
            .collect();
        plan("test.yaml", text, &scenario, seed, hosts, selves)
    }

    const HEAD: &str =
        "name: t\nhosts: {a: 10.0.0.1, b: 10.0.0.2, c: 10.0.0.3}\ntargets: {iface: [eth0]}\n";

    fn good(steps: &str, selves: &[&str]) -> Plan {
        match planned(&format!("{HEAD}{steps}"), selves, 1) {
            Ok(plan) => plan,
            Err(errors) => panic!("{errors:#?}"),
        }
    }

    fn rules(step: &Planned) -> &[RuleSpec] {
        match &step.action {
            Action::Rules { rules, .. } => rules,
            other => panic!("{other:?}"),
        }
    }

    fn at(plan: &Plan) -> Vec<(String, f64, f64)> {
        plan.timeline()
            .into_iter()
            .map(|entry| {
                (
                    entry.path,
                    entry.begins.at.as_secs_f64(),
                    entry.ends.at.as_secs_f64(),
                )
            })
            .collect()
    }

    #[test]
    fn steps_follow_each_other_unless_they_say_otherwise() {
        let plan = good(
            "steps:
  - {wait: 2s}
  - {name: x, rule: {peer: b, fault: {cut: true}}, for: 10s}
  - {name: y, at: 5s, rule: {peer: c, fault: {cut: true}}, for: 1s}
  - {after: {step: x, of: start, plus: 3s}, heal: x}
  - {after: y, wait: 1s}
  - parallel:
      - {wait: 1s}
      - {wait: 4s}
  - loop: {times: 2, steps: [{wait: 1s}, {wait: 2s}]}
",
            &["a"],
        );
        let times: Vec<(&str, f64, f64)> = vec![
            ("wait-1", 0.0, 2.0),
            ("x", 2.0, 12.0),
            ("y", 5.0, 6.0),
            ("heal-4", 5.0, 5.0),
            ("wait-5", 6.0, 7.0),
            ("parallel-6", 7.0, 11.0),
            ("parallel-6/wait-1", 7.0, 8.0),
            ("parallel-6/wait-2", 7.0, 11.0),
            ("loop-7", 11.0, 17.0),
            ("loop-7[1]", 11.0, 14.0),
            ("loop-7[1]/wait-1", 11.0, 12.0),
            ("loop-7[1]/wait-2", 12.0, 14.0),
            ("loop-7[2]", 14.0, 17.0),
            ("loop-7[2]/wait-1", 14.0, 15.0),
            ("loop-7[2]/wait-2", 15.0, 17.0),
        ];
        let found = at(&plan);
        let found: Vec<(&str, f64, f64)> = found
            .iter()
            .map(|(path, from, to)| (path.as_str(), *from, *to))
            .collect();
        assert_eq!(found, times);
    }

    #[test]
    fn every_host_does_its_part_of_the_same_partition() {
        let steps = "steps:\n  - {name: p, partition: {shape: random_halves}}\n";
        let links = |selves: &[&str]| -> BTreeSet<(String, String, String)> {
            let plan = good(steps, selves);
            let mut found = BTreeSet::new();
            if let Action::Rules { rules, .. } = &plan.steps[0].action {
                for rule in rules {
                    let host = rule
                        .name
                        .clone()
                        .unwrap()
                        .split(':')
                        .nth(2)
                        .unwrap()
                        .to_owned();
                    for peer in &rule.peer {
                        found.insert((host.clone(), peer.clone(), rule.direction.clone().unwrap()));
                    }
                }
            }
            found
        };
        // Host by host both directions are cut, all at once only what is sent: together the same links.
        let each: BTreeSet<(String, String)> = ["a", "b", "c"]
            .iter()
            .flat_map(|host| links(&[host]))
            .map(|(host, peer, direction)| {
                assert_eq!(direction, "both");
                (host, peer)
            })
            .collect();
        let all: BTreeSet<(String, String)> = links(&["a", "b", "c"])
            .into_iter()
            .map(|(host, peer, direction)| {
                assert_eq!(direction, "egress");
                (host, peer)
            })
            .collect();
        assert_eq!(each, all);
        assert_eq!(all.len(), 4, "{all:?}");
    }

    #[test]
    fn one_way_is_cut_where_it_leaves_and_where_it_arrives() {
        let steps = "steps:\n  - partition: {shape: isolate, who: a, one_way: out}\n";
        let plan = good(steps, &["a"]);
        let [rule] = rules(&plan.steps[0]) else {
            panic!()
        };
        assert_eq!(rule.direction.as_deref(), Some("egress"));
        assert_eq!(rule.peer, ["10.0.0.2", "10.0.0.3"]);
        let plan = good(steps, &["b"]);
        let [rule] = rules(&plan.steps[0]) else {
            panic!()
        };
        assert_eq!(rule.direction.as_deref(), Some("ingress"));
        assert_eq!(rule.peer, ["10.0.0.1"]);
    }

    #[test]
    fn a_check_is_waited_for_when_the_step_is_due_otherwise() {
        let plan = good(
            "checks: [{name: c, kind: measure, command: x}]
steps:
  - {name: x, rule: {peer: b, fault: {cut: true}}, for: 3s}
  - {when: {check: c, is: holding}, wait: 1s}
  - {after: {step: x, of: start, plus: 1s}, when: {check: c, is: failing}, wait: 1s}
",
            &["a"],
        );
        let moments: Vec<String> = plan
            .timeline()
            .iter()
            .map(|entry| entry.begins.to_string())
            .collect();
        assert_eq!(moments, ["0.0s", "\u{2265}3.0s", "\u{2265}1.0s"]);
        assert!(plan.steps[2].words().contains("when check 'c' fails"));
    }

    #[test]
    fn who_is_not_meant_waits() {
        let plan = good(
            "steps:\n  - {on: b, rule: {peer: c, fault: {cut: true}}, for: 3s}\n  - {wait: 1s}\n",
            &["a"],
        );
        assert!(matches!(plan.steps[0].action, Action::Others(_)));
        assert!((at(&plan)[1].1 - 3.0).abs() < 1e-9);
    }

    #[test]
    fn names_and_seeds_of_rules_depend_on_nothing_but_file_seed_and_host() {
        let steps = "steps:\n  - {name: x, rule: {peer: b, fault: {loss: 1%}}}\n";
        let one = rules(&good(steps, &["a"]).steps[0]).to_vec();
        let again = rules(&good(steps, &["a"]).steps[0]).to_vec();
        assert_eq!(one, again);
        assert_eq!(one[0].peer, ["10.0.0.2"]);
        assert_eq!(one[0].name.as_deref(), Some("t:x"));
        let other = planned(&format!("{HEAD}{steps}"), &["a"], 2).unwrap();
        assert_ne!(rules(&other.steps[0])[0].seed, one[0].seed);
        let long = rule_name(&"x/".repeat(80));
        assert!(check_name(&long).is_ok(), "{long}");
        assert_ne!(long, rule_name(&"x/".repeat(81)));
    }

    #[test]
    fn ramps_go_from_one_value_to_the_other() {
        for (from, to, values) in [
            ("0ms", "2s", ["0s", "1s", "2s"]),
            ("0%", "5%", ["0.000000%", "2.500000%", "5.000000%"]),
            (
                "100mbit",
                "1mbit",
                ["100000000bit", "50500000bit", "1000000bit"],
            ),
            ("1500", "500", ["1500", "1000", "500"]),
        ] {
            assert_eq!(between(from, to, 3).unwrap(), values);
        }
        assert!(between("1s", "5%", 3).is_err());
        let plan = good(
            "steps:\n  - ramp: {rule: {peer: b}, field: delay, from: 1ms, to: 2s, over: 60s, steps: 4}\n",
            &["a"],
        );
        let Action::Ramp { values, each, .. } = &plan.steps[0].action else {
            panic!()
        };
        assert_eq!(*each, Duration::from_secs(15));
        let delays: Vec<_> = values
            .iter()
            .map(|(_, rules)| rules[0].fault.delay.clone().unwrap())
            .collect();
        assert_eq!(delays.len(), 4);
        assert_eq!((delays[0].as_str(), delays[3].as_str()), ("1ms", "2s"));
    }

    #[test]
    fn what_other_hosts_do_takes_its_time_here() {
        let steps = "steps:
  - {name: ramp, on: b, ramp: {rule: {peer: a}, field: delay, from: 0ms, to: 2s, over: 60s}}
  - {name: cut, on: b, rule: {peer: a, fault: {cut: true}}, for: 5s}
  - {name: still, on: b, pause: {pid: 1}, for: 3s}
  - {name: split, partition: {shape: sides, sides: [[b], [c]]}, for: 2s}
  - {heal: [ramp, cut, still, split]}
";
        let (here, there) = (good(steps, &["a"]), good(steps, &["b"]));
        assert_eq!(at(&here), at(&there));
        for (here, there) in here.steps[..4].iter().zip(&there.steps) {
            assert!(matches!(here.action, Action::Others(_)), "{here:?}");
            assert_eq!(
                here.words(),
                format!("not for this host: {}", there.words())
            );
        }
        // And what is wrong there is wrong here.
        for wrong in [
            "steps:\n  - {on: b, run: 'true', for: 5s}\n",
            "steps:\n  - {name: r, on: b, run: 'true'}\n  - {heal: r}\n",
        ] {
            for selves in ["a", "b"] {
                assert!(planned(&format!("{HEAD}{wrong}"), &[selves], 1).is_err());
            }
        }
    }

    #[test]
    fn ramps_begin_and_end_without_a_fault() {
        let faults = |ramp: &str| -> Vec<Option<FaultSpec>> {
            let plan = good(
                &format!("steps:\n  - ramp: {{{ramp}, over: 60s, steps: 3}}\n"),
                &["a"],
            );
            let Action::Ramp { values, .. } = &plan.steps[0].action else {
                panic!()
            };
            values
                .iter()
                .map(|(_, rules)| rules.first().map(|rule| rule.fault.clone()))
                .collect()
        };
        let delays = faults("rule: {peer: b}, field: delay, from: 0ms, to: 2s");
        assert_eq!(delays[0], None);
        assert_eq!(delays[2].as_ref().unwrap().delay.as_deref(), Some("2s"));
        let losses = faults("rule: {peer: b}, field: loss, from: 5%, to: 0%");
        assert!(losses[1].is_some());
        assert_eq!(losses[2], None);
        // Another fault of the rule stays, and a delay of zero that varies is one.
        let beside =
            faults("rule: {peer: b, fault: {duplicate: 1%}}, field: loss, from: 0%, to: 5%");
        assert_eq!(beside[0].as_ref().unwrap().loss, None);
        assert_eq!(beside[0].as_ref().unwrap().duplicate.as_deref(), Some("1%"));
        let varying =
            faults("rule: {peer: b, fault: {jitter: 5ms}}, field: delay, from: 0ms, to: 2s");
        assert_eq!(varying[0].as_ref().unwrap().delay.as_deref(), Some("0s"));
        let nothing = format!(
            "{HEAD}steps:\n  - ramp: {{rule: {{peer: b}}, field: delay, from: 0ms, to: 0s, over: 5s}}\n"
        );
        assert!(planned(&nothing, &["a"], 1).is_err());
    }

    #[test]
    fn a_choice_is_made_by_the_seed() {
        let steps = format!(
            "{HEAD}steps:\n  - choose:\n      - {{name: x, wait: 1s}}\n      - {{name: y, wait: 2s}}\n"
        );
        let chosen = |seed| {
            let plan = planned(&steps, &["a"], seed).unwrap();
            at(&plan)[1].0.clone()
        };
        let all: BTreeSet<String> = (0..40).map(chosen).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(chosen(3), chosen(3));
    }

    #[test]
    fn macros_are_spelt_out() {
        let plan = good(
            "steps:
  - {name: w, profile: {name: lossy-wifi, peer: b}, for: 5s}
  - {name: n, nemesis: {faults: [{partition: isolate}], over: 60s, gap: 2s}}
",
            &["a"],
        );
        let found = at(&plan);
        assert_eq!(found[0], ("w".to_owned(), 0.0, 5.0));
        assert_eq!(found[1].0, "w/rule-1");
        assert!(
            found.iter().any(|(path, ..)| path.ends_with("partition-2")),
            "{found:?}"
        );
        let last = found.iter().map(|(_, _, to)| *to).fold(0.0, f64::max);
        assert!((last - 65.0).abs() < 1e-6, "{last}");
    }

    #[test]
    fn mistakes_are_all_found_with_their_places() {
        let text = format!(
            "{HEAD}steps:
  - {{name: x, rule: {{peer: z, fault: {{cut: true}}}}}}
  - {{rule: {{peer: b, fault: {{delay: 5}}}}}}
  - {{wait: 1s, heal: all}}
  - {{}}
  - {{after: later, wait: 1s}}
  - {{name: later, wait: 1s}}
  - {{heal: later}}
  - {{when: {{check: none, is: failing}}, wait: 1s}}
  - {{pause: {{service: db}}}}
  - {{partition: {{shape: isolate, who: z}}}}
  - {{wait: 1s, for: 3s}}
  - {{kill: {{pid: 7, signal: NONE}}}}
  - {{loop: {{times: 0, steps: []}}}}
  - {{rule: {{peer: b, name: mine, fault: {{cut: true}}}}}}
checks:
  - {{name: c, kind: safety}}
  - {{name: c, kind: safety, tcp: 'z:1'}}
  - {{name: d, kind: safety, http: {{url: 'https://a/'}}}}
  - {{name: e, kind: safety, on: n1, command: 'true'}}
expect: {{fails: other}}
"
        );
        let errors = planned(&text, &["a"], 1).unwrap_err();
        let found: Vec<(u64, &str)> = errors
            .iter()
            .map(|error| (error.at.map_or(0, |at| at.line), error.problem.as_str()))
            .collect();
        let has = |line: u64, words: &str| {
            assert!(
                found
                    .iter()
                    .any(|(at, problem)| *at == line && problem.contains(words)),
                "line {line}, '{words}': {found:#?}"
            );
        };
        has(5, "there is no host 'z'; there are: a, b, c");
        has(6, "delay");
        has(7, "this one has heal, wait");
        has(8, "this one has none");
        has(9, "must stand before");
        has(11, "is no fault");
        has(12, "no check 'none'");
        has(13, "no service 'db'");
        has(14, "no host 'z'");
        has(15, "'for' has no meaning");
        has(16, "no signal");
        has(17, "1 to 10000 times");
        has(18, "'name' is the step's");
        has(20, "exactly one of: command, tcp, http, stream");
        has(21, "another check 'c'");
        has(21, "no host 'z'");
        has(22, "does not begin with http://");
        has(23, "needs a lab");
        has(24, "no check 'other'");
        assert!(errors[0].excerpt.as_ref().unwrap().contains('^'));
    }

    #[test]
    fn a_file_that_grows_without_end_is_refused() {
        let text = format!(
            "{HEAD}steps:\n  - loop: {{times: 200, steps: [{{loop: {{times: 200, steps: [{{wait: 1s}}]}}}}]}}\n"
        );
        let errors = planned(&text, &["a"], 1).unwrap_err();
        assert!(
            errors[0].problem.contains("more than 10000 steps"),
            "{errors:?}"
        );
    }
}
