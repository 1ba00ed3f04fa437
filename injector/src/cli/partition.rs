//! `injector partition`: groups of hosts cut from each other.

use std::path::PathBuf;

use clap::Args;
use ipnet::IpNet;

use super::{
    exit::Failure,
    report,
    rule_args::{Names, absolute_netns},
    session::{self, Session},
};
use crate::{
    protocol::{Call, PartitionArgs as Request, PartitionResult},
    rules::{
        RuleSpec, check_name,
        text::{address, duration},
    },
};

/// Cut groups of hosts from each other
///
/// On a host that is in one side, this host is cut from the others. On a router or a bridge, the sides
/// are cut from each other.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line"
)]
pub(super) struct PartitionArgs {
    /// Name of the partition, for `heal` [default: made from its content]
    name: Option<String>,
    /// A side: addresses, CIDRs, names from a hosts file, @FILE; given at least twice
    #[arg(short, long, value_name = "HOST,...", required = true)]
    side: Vec<String>,
    /// Lose only what goes from an earlier side to a later one
    #[arg(long)]
    one_way: bool,
    /// Interfaces to cut at [default: those that lead to a side]
    #[arg(short, long, value_name = "IF,...", value_delimiter = ',')]
    iface: Vec<String>,
    /// Network namespace to cut in: a name, a path or a process id
    #[arg(short, long, value_name = "NAME|PATH|PID")]
    netns: Option<String>,
    /// Lifetime: 30s, 1m30s; without it the partition stays until it is healed
    #[arg(long = "for", value_name = "TIME")]
    lifetime: Option<String>,
    /// Seed of the rules' random streams [default: drawn, and reported]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Replace a partition of the same name instead of refusing
    #[arg(long)]
    replace: bool,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not protect the control connection (SSH) that this command is run over
    #[arg(long)]
    no_protect_operator: bool,
    /// A hosts file for names, besides /etc/hosts and those of labs
    #[arg(long, value_name = "FILE")]
    hosts: Vec<PathBuf>,
}

impl PartitionArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<(), Failure> {
        let mut request = self.request(session)?;
        let mut connected = session.connect_or_start()?;
        if request.netns.is_none() {
            request.netns = session::own_netns(&connected.info)?;
        }
        request.operator = session::operator(self.no_protect_operator);
        let result: PartitionResult = connected.client.call(Call::Partition(request))?;
        report::warnings(&result.added.warnings);
        session.output.either(&result, || {
            let mut text: String = result
                .plan
                .iter()
                .flat_map(|line| [line.as_str(), "\n"])
                .collect();
            text.push_str(&report::added(&result.added, self.dry_run));
            if !self.dry_run {
                text.push_str("heal it with: injector heal ");
                text.push_str(&result.group);
                text.push('\n');
            }
            text
        })
    }

    /// The validated request.
    fn request(&self, session: &Session) -> Result<Request, Failure> {
        if self.side.len() < 2 {
            return Err(Failure::usage("a partition has at least two sides")
                .help("give --side several times: --side 10.0.0.1 --side 10.0.0.2,10.0.0.3"));
        }
        if let Some(name) = &self.name {
            check_name(name)
                .map_err(|problem| Failure::from_spec(&problem.of("name", name), true))?;
        }
        let mut names = Names::new(&session.endpoint.state_dir, &self.hosts);
        let sides = self
            .side
            .iter()
            .map(|side| prefixes(&names.resolve(std::slice::from_ref(side))?))
            .collect::<Result<Vec<_>, Failure>>()?;
        if let Some((one, other, prefix)) = shared(&sides) {
            return Err(Failure::usage(format!(
                "--side: {} is in side {} and in side {}",
                address::format_prefix(&prefix),
                one + 1,
                other + 1
            ))
            .help("each address belongs to one side"));
        }
        // What a rule would say of it: parts of the request that rules have too.
        let probe = RuleSpec {
            netns: self.netns.as_deref().map(absolute_netns).transpose()?,
            iface: if self.iface.is_empty() {
                vec!["any".into()]
            } else {
                self.iface.clone()
            },
            lifetime: self.lifetime.clone(),
            fault: crate::rules::FaultSpec::cut(),
            all_traffic: true,
            ..RuleSpec::default()
        };
        let rule = probe
            .parse()
            .map_err(|error| Failure::from_spec(&error, true))?;
        Ok(Request {
            sides,
            netns: RuleSpec::from(&rule).netns,
            ifaces: self.iface.clone(),
            one_way: self.one_way,
            lifetime: rule.lifetime.map(duration::format),
            name: self.name.clone(),
            seed: self.seed,
            replace: self.replace,
            hold: false,
            operator: Vec::new(),
            dry_run: self.dry_run,
        })
    }
}

fn prefixes(side: &[String]) -> Result<Vec<IpNet>, Failure> {
    side.iter()
        .map(|text| {
            address::parse_prefix(text)
                .map_err(|problem| Failure::from_spec(&problem.of("side", text), true))
        })
        .collect()
}

/// A prefix that is in two sides, whole or in part, and the numbers of these.
fn shared(sides: &[Vec<IpNet>]) -> Option<(usize, usize, IpNet)> {
    // Sorted by first address, a prefix that overlaps another stands within it: look back to the
    // innermost prefix that is still open.
    let mut all: Vec<(IpNet, usize)> = sides
        .iter()
        .enumerate()
        .flat_map(|(side, prefixes)| prefixes.iter().map(move |&prefix| (prefix, side)))
        .collect();
    all.sort_unstable_by_key(|&(prefix, side)| (prefix.network(), prefix.prefix_len(), side));
    let mut open: Vec<(IpNet, usize)> = Vec::new();
    for (prefix, side) in all {
        while open
            .last()
            .is_some_and(|(outer, _)| !outer.contains(&prefix))
        {
            open.pop();
        }
        if let Some(&(_, other)) = open.iter().find(|&&(_, other)| other != side) {
            return Some((other.min(side), other.max(side), prefix));
        }
        open.push((prefix, side));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(texts: &[&str]) -> Vec<IpNet> {
        texts
            .iter()
            .map(|text| address::parse_prefix(text).unwrap())
            .collect()
    }

    #[test]
    fn an_address_in_two_sides_is_found() {
        let disjoint = [
            side(&["10.0.0.1", "10.1.0.0/16"]),
            side(&["10.0.0.2", "fd00::/8"]),
        ];
        assert_eq!(shared(&disjoint), None);
        let same = [
            side(&["10.0.0.1"]),
            side(&["10.0.0.2"]),
            side(&["10.0.0.1"]),
        ];
        assert_eq!(shared(&same).unwrap().0, 0);
        assert_eq!(shared(&same).unwrap().1, 2);
        let within = [side(&["10.0.0.0/8", "10.2.0.0/16"]), side(&["10.3.4.5"])];
        assert_eq!(shared(&within).unwrap().2, "10.3.4.5/32".parse().unwrap());
        let own = [side(&["10.0.0.0/8", "10.2.0.0/16"]), side(&["11.3.4.5"])];
        assert_eq!(shared(&own), None);
    }
}
