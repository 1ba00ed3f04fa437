//! The flags that make a rule, shared by `add` and `exec`, and their way into the rule language.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::Args;

use super::{
    distribution_file,
    exit::{Exit, Failure},
};
use crate::{
    lab,
    rules::{
        FaultSpec, RuleSpec, TraceSpec, hosts::Hosts, model::Rule, text::address, trace::Trace,
    },
};

/// Which packets, what happens to them, for how long.
#[derive(Debug, Clone, Default, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag of the command line"
)]
pub(super) struct RuleArgs {
    /// Interfaces to act on
    #[arg(
        short,
        long,
        value_name = "IF,...",
        value_delimiter = ',',
        required = true
    )]
    pub(super) iface: Vec<String>,
    /// Network namespace of the interfaces: a name, a path or a process id
    #[arg(short, long, value_name = "NAME|PATH|PID")]
    pub(super) netns: Option<String>,

    /// Packets to and from these addresses
    #[arg(long, value_name = "CIDR,...", help_heading = "Which packets", conflicts_with_all = ["to", "from"])]
    pub(super) peer: Vec<String>,
    /// Packets that leave to these addresses (--direction egress --peer)
    #[arg(long, value_name = "CIDR,...", help_heading = "Which packets", conflicts_with_all = ["from", "direction"])]
    pub(super) to: Vec<String>,
    /// Packets that arrive from these addresses (--direction ingress --peer)
    #[arg(
        long,
        value_name = "CIDR,...",
        help_heading = "Which packets",
        conflicts_with = "direction"
    )]
    pub(super) from: Vec<String>,
    /// Direction as seen at the interface: egress, ingress or both [default: both]
    #[arg(short, long, value_name = "DIRECTION", help_heading = "Which packets")]
    pub(super) direction: Option<String>,
    /// Addresses of the near side: source of what leaves, destination of what arrives
    #[arg(long, value_name = "CIDR,...", help_heading = "Which packets")]
    pub(super) local: Vec<String>,
    /// Source addresses
    #[arg(long, value_name = "CIDR,...", help_heading = "Which packets")]
    pub(super) src: Vec<String>,
    /// Destination addresses
    #[arg(long, value_name = "CIDR,...", help_heading = "Which packets")]
    pub(super) dst: Vec<String>,
    /// But not these addresses (same as '!CIDR' in the list itself)
    #[arg(long, value_name = "CIDR,...", help_heading = "Which packets")]
    pub(super) except: Vec<String>,
    /// Ports at the peer: P, P-Q, P-, -Q
    #[arg(
        long,
        value_name = "PORTS",
        help_heading = "Which packets",
        allow_hyphen_values = true
    )]
    pub(super) peer_port: Vec<String>,
    /// Ports at the near side
    #[arg(
        long,
        value_name = "PORTS",
        help_heading = "Which packets",
        allow_hyphen_values = true
    )]
    pub(super) local_port: Vec<String>,
    /// Source ports
    #[arg(
        long,
        value_name = "PORTS",
        help_heading = "Which packets",
        allow_hyphen_values = true
    )]
    pub(super) src_port: Vec<String>,
    /// Destination ports
    #[arg(
        long,
        value_name = "PORTS",
        help_heading = "Which packets",
        allow_hyphen_values = true
    )]
    pub(super) dst_port: Vec<String>,
    /// Protocols: tcp, udp, icmp, icmpv6, sctp …, a number, arp, nd, other
    #[arg(short, long, value_name = "PROTO,...", help_heading = "Which packets")]
    pub(super) proto: Vec<String>,
    /// 4 or 6
    #[arg(long, value_name = "VERSION", help_heading = "Which packets")]
    pub(super) ip_version: Option<u8>,
    /// Same as --ip-version 4
    #[arg(short = '4', long, help_heading = "Which packets", conflicts_with_all = ["ipv6", "ip_version"])]
    pub ipv4: bool,
    /// Same as --ip-version 6
    #[arg(
        short = '6',
        long,
        help_heading = "Which packets",
        conflicts_with = "ip_version"
    )]
    pub ipv6: bool,
    /// ICMP types by name or number
    #[arg(long, value_name = "TYPE,...", help_heading = "Which packets")]
    pub(super) icmp_type: Vec<String>,
    /// TCP flags that are set, or with '!' are not: syn,!ack; or VALUE/MASK
    #[arg(long, value_name = "FLAGS", help_heading = "Which packets")]
    pub(super) tcp_flags: Option<String>,
    /// Length of the IP packet on the wire in bytes: N, N-M, N-, -M
    #[arg(
        long,
        value_name = "BYTES",
        help_heading = "Which packets",
        allow_hyphen_values = true
    )]
    pub(super) length: Vec<String>,
    /// DSCP by name or number
    #[arg(long, value_name = "DSCP,...", help_heading = "Which packets")]
    pub(super) dscp: Vec<String>,
    /// Firewall marks: VALUE or VALUE/MASK
    #[arg(long, value_name = "MARK,...", help_heading = "Which packets")]
    pub(super) mark: Vec<String>,
    /// Share of conversations, chosen by hash: 25%
    #[arg(long, value_name = "PERCENT", help_heading = "Which packets")]
    pub(super) flows: Option<String>,
    /// Connections that began under the rule (new), or others (established)
    #[arg(long, value_name = "new|established", help_heading = "Which packets")]
    pub(super) state: Option<String>,
    /// Let the rule act on all traffic of the interfaces
    #[arg(long, help_heading = "Which packets")]
    pub(super) all_traffic: bool,
    /// Let the rule also act on what is protected (your own control connection!)
    #[arg(long, help_heading = "Which packets")]
    pub(super) unprotected: bool,
    /// Do not protect the control connection (SSH) that this command is run over
    #[arg(long, help_heading = "Which packets")]
    pub(super) no_protect_operator: bool,
    /// A hosts file for names in address lists, besides /etc/hosts and those of labs
    #[arg(long, value_name = "FILE", help_heading = "Which packets")]
    pub(super) hosts: Vec<PathBuf>,

    /// Lose every packet
    #[arg(long, help_heading = "Which of them are lost (one of)")]
    pub(super) cut: bool,
    /// Lose the N-th packet of each flow
    #[arg(
        long,
        value_name = "N",
        help_heading = "Which of them are lost (one of)"
    )]
    pub(super) drop_nth: Option<u64>,
    /// Lose the first N packets of each flow
    #[arg(
        long,
        value_name = "N",
        help_heading = "Which of them are lost (one of)"
    )]
    pub(super) drop_first: Option<u64>,
    /// Lose every N-th packet of each flow
    #[arg(
        long,
        value_name = "N",
        help_heading = "Which of them are lost (one of)"
    )]
    pub(super) drop_every: Option<u64>,
    /// Lose packets of each flow at the places of a 1, over and over: 0010
    #[arg(
        long,
        value_name = "BITS",
        help_heading = "Which of them are lost (one of)"
    )]
    pub(super) drop_pattern: Option<String>,
    /// With --drop-pattern: play it once
    #[arg(long, help_heading = "Which of them are lost (one of)")]
    pub(super) once: bool,
    /// Lose one packet: the first that matches
    #[arg(long, help_heading = "Which of them are lost (one of)")]
    pub(super) drop_once: bool,

    /// Lose every packet, and answer it: rst (with --proto tcp), icmp-host, icmp-port, icmp-admin
    #[arg(
        long,
        value_name = "ANSWER",
        help_heading = "Which of them are lost (one of)"
    )]
    pub(super) reject: Option<String>,

    /// Delay every packet: 100ms
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) delay: Option<String>,
    /// With --delay: vary it by so much, evenly or as --distribution says
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) jitter: Option<String>,
    /// With --jitter: uniform, normal, pareto, paretonormal, exponential, lognormal, or a file of netem's (its
    /// name ends in .dist); without: a file with samples of delay, one a line [default: uniform]
    #[arg(
        long,
        value_name = "NAME|file:PATH",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) distribution: Option<String>,
    /// With --jitter: how much a delay is like the one before: 25%
    #[arg(
        long,
        value_name = "PERCENT",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) correlation: Option<String>,
    /// With --jitter: keep (no packet overtakes an earlier one of its flow) or free [default: keep]
    #[arg(
        long,
        value_name = "ORDER",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) order: Option<String>,
    /// Lose packets by chance: 1%, gemodel:p,r[,1-h[,1-k]] or state:p13[,p31[,p32[,p23[,p14]]]]
    #[arg(
        long,
        value_name = "MODEL",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) loss: Option<String>,
    /// Turn bits of packets over by chance: 0.1%
    #[arg(
        long,
        value_name = "PERCENT",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) corrupt: Option<String>,
    /// With --corrupt: so many distinct bits, 1 to 32 [default: 1]
    #[arg(
        long,
        value_name = "N",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) bits: Option<u32>,
    /// With --corrupt: of which part: any, header or payload [default: any]
    #[arg(
        long = "where",
        value_name = "PART",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) part: Option<String>,
    /// With --corrupt: broken (the receiver's stack drops them) or repaired (the application reads wrong bytes)
    /// [default: broken]
    #[arg(
        long,
        value_name = "WHAT",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) checksum: Option<String>,
    /// Duplicate packets by chance: 2%
    #[arg(
        long,
        value_name = "PERCENT",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) duplicate: Option<String>,
    /// With --duplicate: copies besides the original, 1 to 8 [default: 1]
    #[arg(
        long,
        value_name = "N",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) copies: Option<u32>,
    /// With --duplicate: send the copies so much later [default: 0s]
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) copy_delay: Option<String>,
    /// Hold some packets back, so that others overtake them: 5%
    #[arg(
        long,
        value_name = "PERCENT",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) reorder: Option<String>,
    /// With --reorder: for how long: 3ms
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) hold: Option<String>,
    /// Send packets through a line of this rate: 10mbit
    #[arg(
        long,
        value_name = "RATE",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) rate: Option<String>,
    /// Send packets through a line whose rate follows a trace, in Mahimahi's packet-delivery format
    #[arg(
        long,
        value_name = "FILE",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) rate_trace: Option<PathBuf>,
    /// With --rate or --rate-trace: what waits in front of it at most, 100ms, 64kb or 50p [default: 100ms]
    #[arg(
        long,
        value_name = "LENGTH",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) queue: Option<String>,
    /// With --rate: bytes by which a packet is longer on the line than its frame; with --rate-trace: than its IP
    /// packet and four bytes [default: 0]
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "BYTES",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) overhead: Option<i32>,
    /// With --rate or --rate-trace: which packets share a line: rule, flow or peer [default: rule]
    #[arg(
        long,
        value_name = "WHAT",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) share: Option<String>,
    /// With --rate or --rate-trace: mark packets that wait longer (ECN): 5ms
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) ecn: Option<String>,
    /// Hold everything for so long from now, then let it go at once: 15s
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) stall: Option<String>,
    /// With --stall: so again and again: 60s
    #[arg(
        long,
        value_name = "TIME",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) every: Option<String>,
    /// Lose IP packets longer than this, and let no ICMP message say so: 1400
    #[arg(
        long,
        value_name = "BYTES",
        help_heading = "What else happens to them, packet by packet"
    )]
    pub(super) mtu_blackhole: Option<u32>,

    /// Lifetime: 30s, 1m30s; without it the rule stays until it is healed
    #[arg(long = "for", value_name = "TIME", help_heading = "When")]
    pub(super) lifetime: Option<String>,
    /// On and off in turn: up=3s,down=500ms[,phase=1s]; the fault acts in the down part
    #[arg(long, value_name = "up=TIME,down=TIME", help_heading = "When")]
    pub(super) flap: Option<String>,
    /// Seed of the random stream [default: drawn, and reported]
    #[arg(long, value_name = "N", help_heading = "When")]
    pub(super) seed: Option<u64>,
    /// What counts as one flow: tuple, service (without the ephemeral port), ordinal (the k-th
    /// connection to the service) [default: tuple]
    #[arg(long, value_name = "tuple|service|ordinal", help_heading = "When")]
    pub(super) key: Option<String>,
}

impl RuleArgs {
    /// The validated rule that the flags mean.
    pub(super) fn to_rule(&self, name: Option<&str>, state_dir: &Path) -> Result<Rule, Failure> {
        let spec = self.to_spec(name, state_dir)?;
        spec.parse().map_err(|error| {
            let mut error = error;
            // The flags that stand for `peer` with a direction.
            if error.field == "peer" {
                if !self.to.is_empty() {
                    error.field = "to";
                } else if !self.from.is_empty() {
                    error.field = "from";
                }
            }
            Failure::from_spec(&error, true)
        })
    }

    /// The text form of the flags, with names and files in address lists resolved.
    fn to_spec(&self, name: Option<&str>, state_dir: &Path) -> Result<RuleSpec, Failure> {
        let (direction, peer) = if !self.to.is_empty() {
            (Some("egress".to_owned()), &self.to)
        } else if !self.from.is_empty() {
            (Some("ingress".to_owned()), &self.from)
        } else {
            (self.direction.clone(), &self.peer)
        };
        let mut names = Names::new(state_dir, &self.hosts);
        let mut spec = RuleSpec {
            name: name.map(str::to_owned),
            group: None,
            netns: self.netns.as_deref().map(absolute_netns).transpose()?,
            iface: self.iface.clone(),
            direction,
            peer: names.resolve(peer)?,
            local: names.resolve(&self.local)?,
            src: names.resolve(&self.src)?,
            dst: names.resolve(&self.dst)?,
            except: Vec::new(),
            peer_port: self.peer_port.clone(),
            local_port: self.local_port.clone(),
            src_port: self.src_port.clone(),
            dst_port: self.dst_port.clone(),
            proto: self.proto.clone(),
            ip_version: match (self.ipv4, self.ipv6) {
                (true, _) => Some(4),
                (_, true) => Some(6),
                _ => self.ip_version,
            },
            icmp_type: self.icmp_type.clone(),
            tcp_flags: self.tcp_flags.clone(),
            length: self.length.clone(),
            dscp: self.dscp.clone(),
            mark: self.mark.clone(),
            flows: self.flows.clone(),
            state: self.state.clone(),
            fault: FaultSpec {
                cut: self.cut,
                drop_nth: self.drop_nth,
                drop_first: self.drop_first,
                drop_every: self.drop_every,
                drop_pattern: self.drop_pattern.clone(),
                once: self.once,
                drop_once: self.drop_once,
                reject: self.reject.clone(),
                loss: self.loss.clone(),
                corrupt: self.corrupt.clone(),
                bits: self.bits,
                part: self.part.clone(),
                checksum: self.checksum.clone(),
                duplicate: self.duplicate.clone(),
                copies: self.copies,
                copy_delay: self.copy_delay.clone(),
                delay: self.delay.clone(),
                jitter: self.jitter.clone(),
                distribution: self
                    .distribution
                    .as_deref()
                    .map(distribution_file::inline)
                    .transpose()?,
                correlation: self.correlation.clone(),
                order: self.order.clone(),
                reorder: self.reorder.clone(),
                hold: self.hold.clone(),
                mtu_blackhole: self.mtu_blackhole,
                rate: self.rate.clone(),
                rate_trace: self.rate_trace.as_deref().map(read_trace).transpose()?,
                queue: self.queue.clone(),
                overhead: self.overhead,
                share: self.share.clone(),
                ecn: self.ecn.clone(),
                stall: self.stall.clone(),
                every: self.every.clone(),
            },
            lifetime: self.lifetime.clone(),
            flap: self.flap.clone(),
            seed: self.seed,
            key: self.key.clone(),
            all_traffic: self.all_traffic,
            unprotected: self.unprotected,
        };
        let except = names.resolve(&self.except)?;
        if !except.is_empty() {
            // Exceptions are for the list that they stand beside.
            match (peer.is_empty(), self.src.is_empty(), self.dst.is_empty()) {
                (false, ..) | (true, true, true) => spec.except = except,
                (true, false, true) => spec.src.extend(excepted(&except)),
                (true, true, false) => spec.dst.extend(excepted(&except)),
                (true, false, false) => {
                    return Err(Failure::usage(
                        "--except: it does not say whether --src or --dst is meant",
                    )
                    .help(
                        "put the exception into the list itself: --src '10.0.0.0/8,!10.1.0.0/16'",
                    ));
                }
            }
        }
        Ok(spec)
    }
}

/// Reads a file with a trace; the rule carries its content, since the daemon may live elsewhere.
fn read_trace(path: &Path) -> Result<TraceSpec, Failure> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| {
        Failure::usage(format!("--rate-trace: reading {shown}")).caused_by(&error)
    })?;
    let milliseconds = Trace::read(&text).map_err(|problem| {
        Failure::usage(format!("--rate-trace: {shown}: {}", problem.problem)).help(problem.help)
    })?;
    Ok(TraceSpec {
        name: path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned()),
        milliseconds,
    })
}

fn excepted(list: &[String]) -> impl Iterator<Item = String> {
    list.iter()
        .map(|entry| format!("!{}", entry.trim_start_matches('!')))
}

/// The daemon has another working directory: paths go there whole.
pub(super) fn absolute_netns(text: &str) -> Result<String, Failure> {
    if !text.contains('/') || text.starts_with('/') {
        return Ok(text.to_owned());
    }
    let path = std::path::absolute(text).map_err(|error| {
        Failure::usage(format!("--netns '{text}': finding the path")).caused_by(&error)
    })?;
    path.into_os_string()
        .into_string()
        .map_err(|_| Failure::usage(format!("--netns '{text}': the path is not UTF-8")))
}

/// What names in address lists stand for. Files are read when the first name is met.
pub(super) struct Names<'a> {
    state_dir: &'a Path,
    files: &'a [PathBuf],
    hosts: Option<Hosts>,
}

impl<'a> Names<'a> {
    /// Looks into /etc/hosts, the hosts files of labs, and these.
    #[must_use]
    pub(super) fn new(state_dir: &'a Path, files: &'a [PathBuf]) -> Names<'a> {
        Names {
            state_dir,
            files,
            hosts: None,
        }
    }

    /// Replaces names by addresses and `@FILE` by what the file holds.
    pub(super) fn resolve(&mut self, list: &[String]) -> Result<Vec<String>, Failure> {
        let entries = expand(list)?;
        let plain = |entry: &String| {
            address::parse_prefix(entry.strip_prefix('!').unwrap_or(entry)).is_ok()
        };
        if entries.iter().all(plain) {
            return Ok(entries);
        }
        Ok(self.hosts()?.resolve_list(&entries)?)
    }

    fn hosts(&mut self) -> Result<&Hosts, Failure> {
        if self.hosts.is_none() {
            let mut hosts = Hosts::system();
            // A lab that is broken has no names, but breaks nothing else.
            for lab in lab::status(self.state_dir).unwrap_or_default() {
                if lab.hosts_file.exists() {
                    hosts.read(&lab.hosts_file)?;
                }
            }
            for file in self.files {
                hosts.read(file)?;
            }
            self.hosts = Some(hosts);
        }
        self.hosts
            .as_ref()
            .ok_or_else(|| Failure::new(Exit::Failed, "internal", "no hosts"))
    }
}

/// Splits a list at commas, and reads `@FILE` (`@-`: standard input) as a list of its own, with
/// entries apart by commas or white space and `#` before comments.
fn expand(list: &[String]) -> Result<Vec<String>, Failure> {
    let mut entries = Vec::new();
    for text in list {
        if let Some(path) = text.strip_prefix('@') {
            let content = if path == "-" {
                let mut content = String::new();
                io::stdin().read_to_string(&mut content).map(|_| content)
            } else {
                fs::read_to_string(path)
            };
            let content = content.map_err(|error| {
                Failure::usage(format!("reading addresses from {path}")).caused_by(&error)
            })?;
            let before = entries.len();
            for line in content.lines() {
                let line = line.split('#').next().unwrap_or_default();
                entries.extend(
                    line.split(|c: char| c == ',' || c.is_whitespace())
                        .filter(|entry| !entry.is_empty())
                        .map(str::to_owned),
                );
            }
            if entries.len() == before {
                return Err(Failure::usage(format!("{path} holds no address"))
                    .help("one address, CIDR or name to a line, or several apart by commas"));
            }
        } else {
            entries.extend(text.split(',').map(|entry| entry.trim().to_owned()));
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::rules::model::{Direction, Fault, NetnsRef};

    #[derive(Parser)]
    struct Command {
        name: Option<String>,
        #[command(flatten)]
        rule: RuleArgs,
    }

    fn rule(args: &str) -> Result<Rule, Failure> {
        let words = ["add", "-i", "eth0"]
            .into_iter()
            .chain(args.split_whitespace());
        let command =
            Command::try_parse_from(words).map_err(|error| Failure::usage(error.to_string()))?;
        command
            .rule
            .to_rule(command.name.as_deref(), Path::new("/nonexistent"))
    }

    #[test]
    fn to_from_and_peer() {
        for (args, direction) in [
            ("--cut --to 10.0.0.1", Direction::Egress),
            ("--cut --from 10.0.0.1", Direction::Ingress),
            ("--cut --peer 10.0.0.1", Direction::Both),
            ("--cut --peer 10.0.0.1 -d ingress", Direction::Ingress),
        ] {
            let rule = rule(args).unwrap();
            assert_eq!(rule.selector.direction, direction, "{args}");
            assert_eq!(rule.selector.peer.include.len(), 1);
        }
        for bad in [
            "--cut --to 10.0.0.1 --from 10.0.0.1",
            "--cut --to 10.0.0.1 --peer 10.0.0.1",
            "--cut --to 10.0.0.1 --direction ingress",
        ] {
            assert!(rule(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_flag_arrives() {
        let rule = rule(
            "web -n 42 --to 10.0.0.0/8,!10.1.0.0/16 --except 10.2.0.0/16 --local 10.9.0.1 \
             --peer-port 80,8000-8080 --local-port 1024- --proto tcp -4 --tcp-flags syn,!ack \
             --length -100 --dscp ef --mark 1/3 --flows 25% --state new --drop-pattern 0010 --once \
             --for 30s --flap up=3s,down=500ms --seed 7 --key service --unprotected",
        )
        .unwrap();
        let spec = serde_json::to_value(RuleSpec::from(&rule)).unwrap();
        let expected = serde_json::json!({
            "name": "web", "netns": "pid:42", "iface": ["eth0"], "direction": "egress",
            "peer": ["10.0.0.0/8", "!10.1.0.0/16", "!10.2.0.0/16"], "local": ["10.9.0.1"],
            "peer_port": ["80", "8000-8080"], "local_port": ["1024-"], "proto": ["tcp"],
            "ip_version": 4, "tcp_flags": "syn,!ack", "length": ["-100"], "dscp": ["ef"],
            "mark": ["0x1/0x3"], "flows": "25%", "state": "new",
            "fault": {"drop_pattern": "0010", "once": true}, "for": "30s",
            "flap": "up=3s,down=500ms", "seed": 7, "key": "service", "unprotected": true
        });
        assert_eq!(spec, expected);
    }

    #[test]
    fn other_faults_and_selectors() {
        assert_eq!(
            rule("--drop-nth 5 --proto udp").unwrap().fault,
            Fault::DropNth(5)
        );
        assert_eq!(
            rule("--drop-first 5 --proto udp").unwrap().fault,
            Fault::DropFirst(5)
        );
        assert_eq!(
            rule("--drop-every 5 --proto udp").unwrap().fault,
            Fault::DropEvery(5)
        );
        assert_eq!(
            rule("--drop-once --proto udp").unwrap().fault,
            Fault::DropOnce
        );
        assert_eq!(
            rule("--cut --icmp-type echo-request -6")
                .unwrap()
                .selector
                .icmpv6_types,
            [128]
        );
        assert_eq!(rule("--cut --all-traffic").unwrap().netns, NetnsRef::Own);
        assert_eq!(
            rule("--cut --src-port 1 --dst-port -9")
                .unwrap()
                .selector
                .dst_port,
            [0..=9]
        );
        let both = rule("--cut --src 10.0.0.0/8 --except 10.1.0.0/16").unwrap();
        assert_eq!(both.selector.src.except.len(), 1);
        let two = rule("--cut -i eth1,eth2 --proto udp").unwrap();
        assert_eq!(two.interfaces, ["eth0", "eth1", "eth2"]);
    }

    #[test]
    fn bad_input_names_the_flag_and_says_what_to_do() {
        for (args, fragment) in [
            ("--cut", "--all-traffic"),
            ("--proto tcp", "fault: none is given"),
            ("--cut --drop-nth 2 --proto tcp", "cut and --drop-nth"),
            ("--cut --to 10.0.0.1/8", "--to '10.0.0.1/8'"),
            (
                "--cut --from fd00::1 -4",
                "--from: fd00::1 leaves only IPv6",
            ),
            (
                "--cut --peer-port 90-80",
                "--peer-port '90-80': is a reversed range",
            ),
            ("--cut --peer 10.0.0.1 --for 0s", "--for '0s'"),
            ("-x --cut --peer 10.0.0.1", "-x"),
            ("--cut --peer nobody.invalid", "'nobody.invalid' is neither"),
            (
                "--cut --src 10.0.0.1 --dst 10.0.0.2 --except 10.0.0.3",
                "--except",
            ),
            ("a/b --cut --peer 10.0.0.1", "NAME 'a/b'"),
        ] {
            let failure = rule(args).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains(fragment), "{args}: {failure}");
        }
    }

    #[test]
    fn lists_from_files_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("list");
        fs::write(&list, "10.0.0.1, 10.0.0.2 # two\n\nn1\n").unwrap();
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, "10.0.0.3 n1\n").unwrap();
        let args = format!("--cut --to @{} --hosts {}", list.display(), hosts.display());
        assert_eq!(rule(&args).unwrap().selector.peer.include.len(), 3);
        fs::write(&list, "# nothing\n").unwrap();
        assert!(
            rule(&args)
                .unwrap_err()
                .message
                .contains("holds no address")
        );
        assert!(rule("--cut --to @/nonexistent").is_err());
    }
}
