//! What rules leave alone: the connections of whoever runs the CLI, and the protect list.

use std::{fmt, net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;

use super::plane::Exemption;
use crate::{
    protocol::{ErrorBody, ErrorCode, OperatorConnection, ProtectedEntry},
    rules::model::{AddrSet, Protocol},
};

/// So many connections of operators are remembered, the latest ones.
const MAX_OPERATORS: usize = 24;

/// One entry of the protect list: the end of a flow that must be spared, local or remote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Only this protocol.
    protocol: Option<Protocol>,
    /// Addresses of that end.
    net: Option<IpNet>,
    /// Ports of that end.
    ports: Option<RangeInclusive<u16>>,
}

/// What an entry may look like.
const FORMS: &str = "an address or prefix, a port or range, or both, with a protocol in front where \
                     wanted: 10.0.0.1, 10.0.0.0/8, 22, 8000-8080, tcp/22, 10.0.0.1:22, \
                     [fd00::1]:22, udp/[fd00::/64]:53";

impl Entry {
    /// Reads an entry.
    ///
    /// # Errors
    /// The text has none of the forms.
    pub fn parse(text: &str) -> Result<Self, ErrorBody> {
        let wrong = |problem: String| {
            ErrorBody::new(
                ErrorCode::Invalid,
                format!("cannot protect {text:?}: {problem}; nothing was changed"),
            )
            .with_hint(format!("give {FORMS}"))
        };
        let (protocol, rest) = match text.split_once('/') {
            Some((name, rest)) if name.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                match protocol(name) {
                    Some(protocol) => (Some(protocol), rest),
                    // An IPv6 prefix may begin with a letter: fd00::/8.
                    None if name.contains(':') => (None, text),
                    None => return Err(wrong(format!("{name:?} is no protocol with ports"))),
                }
            }
            _ => (None, text),
        };
        if rest.is_empty() {
            return Err(wrong("it is empty".to_owned()));
        }
        let entry = |net, ports| Self {
            protocol,
            net,
            ports,
        };
        if let Some(ports) = ports(rest) {
            return ports.map(|ports| entry(None, Some(ports))).map_err(wrong);
        }
        if let Some(net) = net(rest) {
            return net.map(|net| entry(Some(net), None)).map_err(wrong);
        }
        let (address, port) = match rest.strip_prefix('[') {
            Some(inner) => match inner.split_once(']') {
                Some((address, "")) => (address, None),
                Some((address, after)) => match after.strip_prefix(':') {
                    Some(port) => (address, Some(port)),
                    None => return Err(wrong("after ] there must be : and a port".to_owned())),
                },
                None => return Err(wrong("the ] is missing".to_owned())),
            },
            None => match rest.rsplit_once(':') {
                Some((address, port)) => (address, Some(port)),
                None => return Err(wrong("it is neither an address nor a port".to_owned())),
            },
        };
        let net = net(address)
            .ok_or_else(|| wrong(format!("{address:?} is neither an address nor a prefix")))?
            .map_err(&wrong)?;
        let ports = port
            .map(|port| {
                ports(port)
                    .ok_or_else(|| wrong(format!("{port:?} is no port")))?
                    .map_err(&wrong)
            })
            .transpose()?;
        Ok(entry(Some(net), ports))
    }
}

/// Protocols that have ports, by name.
fn protocol(name: &str) -> Option<Protocol> {
    match name.to_ascii_lowercase().as_str() {
        "tcp" => Some(Protocol::Ip(6)),
        "udp" => Some(Protocol::Ip(17)),
        "sctp" => Some(Protocol::Ip(132)),
        _ => None,
    }
}

/// A port or a range of ports; `None` if the text does not look like one.
fn ports(text: &str) -> Option<Result<RangeInclusive<u16>, String>> {
    let looks = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'-');
    looks.then(|| {
        let port = |text: &str| {
            text.parse::<u16>()
                .map_err(|_| format!("{text:?} is no port from 0 to 65535"))
        };
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let (low, high) = (port(low)?, port(high)?);
        if low > high {
            return Err(format!("the range {text:?} is reversed"));
        }
        Ok(low..=high)
    })
}

/// An address or prefix; `None` if the text does not look like one.
fn net(text: &str) -> Option<Result<IpNet, String>> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(Ok(address.into()));
    }
    let net = text.parse::<IpNet>().ok()?;
    Some(if net == net.trunc() {
        Ok(net)
    } else {
        Err(format!(
            "{net} has bits set after its prefix; {} is meant, or {}",
            net.trunc(),
            net.addr()
        ))
    })
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Some(Protocol::Ip(6)) => f.write_str("tcp/")?,
            Some(Protocol::Ip(17)) => f.write_str("udp/")?,
            Some(Protocol::Ip(132)) => f.write_str("sctp/")?,
            _ => {}
        }
        if let Some(net) = &self.net {
            let host = net.prefix_len() == net.max_prefix_len();
            let bracket = self.ports.is_some() && net.addr().is_ipv6();
            if bracket {
                f.write_str("[")?;
            }
            if host {
                write!(f, "{}", net.addr())?;
            } else {
                write!(f, "{net}")?;
            }
            if bracket {
                f.write_str("]")?;
            }
            if self.ports.is_some() {
                f.write_str(":")?;
            }
        }
        if let Some(ports) = &self.ports {
            write!(f, "{}", ports.start())?;
            if ports.start() != ports.end() {
                write!(f, "-{}", ports.end())?;
            }
        }
        Ok(())
    }
}

/// Everything that is protected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protection {
    /// The protect list.
    list: Vec<Entry>,
    /// Connections of operators, the latest last.
    operators: Vec<OperatorConnection>,
}

impl Protection {
    /// A protect list to begin with.
    ///
    /// # Errors
    /// An entry cannot be read.
    pub fn new(list: &[String]) -> Result<Self, ErrorBody> {
        let mut protection = Self::default();
        protection.change(list, &[])?;
        Ok(protection)
    }

    /// Adds entries and takes entries away; after an error nothing has changed.
    ///
    /// # Errors
    /// An entry cannot be read, or one to take away is not there.
    pub fn change(&mut self, add: &[String], remove: &[String]) -> Result<(), ErrorBody> {
        let mut list = self.list.clone();
        for text in remove {
            let entry = Entry::parse(text)?;
            let before = list.len();
            list.retain(|kept| *kept != entry);
            if list.len() == before {
                return Err(ErrorBody::new(
                    ErrorCode::NotFound,
                    format!("{entry} is not in the protect list; nothing was changed"),
                )
                .with_hint("`injector protect` shows the list"));
            }
        }
        for text in add {
            let entry = Entry::parse(text)?;
            if !list.contains(&entry) {
                list.push(entry);
            }
        }
        self.list = list;
        Ok(())
    }

    /// Remembers connections of operators. The oldest give way where there are too many.
    pub fn remember(&mut self, connections: &[OperatorConnection]) {
        for connection in connections {
            let connection = OperatorConnection {
                client: connection.client.to_canonical(),
                server: connection.server.map(|server| server.to_canonical()),
                ..*connection
            };
            self.operators.retain(|known| *known != connection);
            self.operators.push(connection);
        }
        let surplus = self.operators.len().saturating_sub(MAX_OPERATORS);
        self.operators.drain(..surplus);
    }

    /// Forgets the operators' connections: no rule is left that could cut them.
    pub fn forget_operators(&mut self) {
        self.operators.clear();
    }

    /// What is protected and why.
    #[must_use]
    pub fn entries(&self) -> Vec<ProtectedEntry> {
        let operators = self.operators.iter().map(|connection| ProtectedEntry {
            what: match connection.server {
                Some(server) => format!(
                    "tcp {} <-> {}",
                    end(connection.client, connection.client_port),
                    end(server, connection.server_port)
                ),
                None => format!(
                    "tcp {} <-> port {}",
                    end(connection.client, connection.client_port),
                    connection.server_port
                ),
            },
            why: "control connection of whoever gave a command".to_owned(),
        });
        let list = self.list.iter().map(|entry| ProtectedEntry {
            what: match entry {
                Entry { net: None, .. } => format!("port {entry}"),
                _ => entry.to_string(),
            },
            why: "protect list".to_owned(),
        });
        operators.chain(list).collect()
    }

    /// The same for the data plane. Each end may be the peer or the local one: a router sees either.
    #[must_use]
    pub fn exemptions(&self) -> Vec<Exemption> {
        let mut exemptions = Vec::new();
        for connection in &self.operators {
            let client = one(Some(connection.client.into()));
            let server = one(connection.server.map(Into::into));
            let client_port = vec![connection.client_port..=connection.client_port];
            let server_port = vec![connection.server_port..=connection.server_port];
            exemptions.push(Exemption {
                peer: client.clone(),
                peer_port: client_port.clone(),
                local: server.clone(),
                local_port: server_port.clone(),
                protocols: vec![Protocol::Ip(6)],
            });
            exemptions.push(Exemption {
                peer: server,
                peer_port: server_port,
                local: client,
                local_port: client_port,
                protocols: vec![Protocol::Ip(6)],
            });
        }
        // Entries that name only addresses, or only ports, of one protocol share an exemption: lists
        // mean 'one of these'.
        let mut groups: Vec<Ends> = Vec::new();
        for entry in &self.list {
            let ends = Ends::of(entry);
            match groups.iter_mut().find(|group| group.takes(&ends)) {
                Some(group) => {
                    group.nets.extend(ends.nets);
                    group.ports.extend(ends.ports);
                }
                None => groups.push(ends),
            }
        }
        for Ends {
            protocols,
            nets,
            ports,
        } in groups
        {
            let set = AddrSet {
                include: nets,
                except: Vec::new(),
            };
            exemptions.push(Exemption {
                peer: set.clone(),
                peer_port: ports.clone(),
                protocols: protocols.clone(),
                ..Exemption::default()
            });
            exemptions.push(Exemption {
                local: set,
                local_port: ports,
                protocols,
                ..Exemption::default()
            });
        }
        exemptions
    }
}

/// Entries of the protect list that become one pair of exemptions.
struct Ends {
    protocols: Vec<Protocol>,
    nets: Vec<IpNet>,
    ports: Vec<RangeInclusive<u16>>,
}

impl Ends {
    fn of(entry: &Entry) -> Self {
        Self {
            protocols: entry.protocol.into_iter().collect(),
            nets: entry.net.into_iter().collect(),
            ports: entry.ports.iter().cloned().collect(),
        }
    }

    /// Whether a list of both means the same as both apart.
    fn takes(&self, other: &Self) -> bool {
        self.protocols == other.protocols
            && ((self.ports.is_empty() && other.ports.is_empty())
                || (self.nets.is_empty() && other.nets.is_empty()))
    }
}

fn one(net: Option<IpNet>) -> AddrSet {
    AddrSet {
        include: net.into_iter().collect(),
        except: Vec::new(),
    }
}

fn end(address: IpAddr, port: u16) -> std::net::SocketAddr {
    (address, port).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_written() {
        for (text, written) in [
            ("10.0.0.1", "10.0.0.1"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("fd00::/64", "fd00::/64"),
            ("fd00::1", "fd00::1"),
            ("[fd00::1]", "fd00::1"),
            ("22", "22"),
            ("8000-8080", "8000-8080"),
            ("tcp/22", "tcp/22"),
            ("UDP/53", "udp/53"),
            ("10.0.0.1:22", "10.0.0.1:22"),
            ("10.0.0.0/8:22", "10.0.0.0/8:22"),
            ("[fd00::1]:22", "[fd00::1]:22"),
            ("udp/[fd00::/64]:53-54", "udp/[fd00::/64]:53-54"),
            ("tcp/10.0.0.1", "tcp/10.0.0.1"),
        ] {
            let entry = Entry::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(entry.to_string(), written);
            assert_eq!(Entry::parse(written).unwrap(), entry);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, fragment) in [
            ("", "empty"),
            ("tcp/", "empty"),
            ("70000", "no port"),
            ("90-80", "reversed"),
            ("10.0.0.1/8", "10.0.0.0/8"),
            ("10.0.0.300", "neither"),
            ("icmp/10.0.0.1", "no protocol"),
            ("[fd00::1", "missing"),
            ("[fd00::1]22", "must be :"),
            ("10.0.0.1:x", "no port"),
        ] {
            let error = Entry::parse(text).unwrap_err();
            assert_eq!(error.code, ErrorCode::Invalid);
            assert!(error.message.contains(fragment), "{text}: {error}");
        }
    }

    #[test]
    fn a_change_with_an_error_changes_nothing() {
        let mut protection = Protection::new(&["22".into()]).unwrap();
        let before = protection.clone();
        protection
            .change(&["23".into(), "nonsense".into()], &[])
            .unwrap_err();
        let error = protection
            .change(&["23".into()], &["24".into()])
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(protection, before);
        protection
            .change(&["tcp/23".into(), "22".into()], &["22".into()])
            .unwrap();
        let what: Vec<String> = protection
            .entries()
            .into_iter()
            .map(|entry| entry.what)
            .collect();
        assert_eq!(what, ["port tcp/23", "port 22"]);
    }

    #[test]
    fn an_operators_connection_is_exempt_from_both_ends() {
        let mut protection = Protection::default();
        protection.remember(&[OperatorConnection {
            client: "::ffff:192.0.2.7".parse().unwrap(),
            client_port: 50022,
            server: Some("192.0.2.1".parse().unwrap()),
            server_port: 22,
        }]);
        let exemptions = protection.exemptions();
        assert_eq!(exemptions.len(), 2);
        assert_eq!(
            exemptions[0].peer.include,
            ["192.0.2.7/32".parse::<IpNet>().unwrap()]
        );
        assert_eq!(exemptions[0].local_port, [22..=22]);
        assert_eq!(exemptions[1].local.include, exemptions[0].peer.include);
        assert_eq!(
            protection.entries()[0].what,
            "tcp 192.0.2.7:50022 <-> 192.0.2.1:22"
        );
        for port in 0..100 {
            protection.remember(&[OperatorConnection {
                client: "192.0.2.7".parse().unwrap(),
                client_port: port,
                server: None,
                server_port: 22,
            }]);
        }
        assert_eq!(protection.entries().len(), MAX_OPERATORS);
        assert_eq!(
            protection.entries().last().unwrap().what,
            "tcp 192.0.2.7:99 <-> port 22"
        );
    }

    #[test]
    fn addresses_share_an_exemption_and_pairs_do_not() {
        let list: Vec<String> = [
            "10.0.0.1",
            "fd00::/64",
            "22",
            "80-90",
            "tcp/443",
            "10.0.0.2:53",
        ]
        .map(String::from)
        .into();
        let exemptions = Protection::new(&list).unwrap().exemptions();
        assert_eq!(exemptions.len(), 8);
        assert_eq!(exemptions[0].peer.include.len(), 2);
        assert_eq!(exemptions[2].peer_port, [22..=22, 80..=90]);
        assert_eq!(exemptions[4].protocols, [Protocol::Ip(6)]);
        assert_eq!(
            exemptions[7].local.include,
            ["10.0.0.2/32".parse::<IpNet>().unwrap()]
        );
        assert_eq!(exemptions[7].local_port, [53..=53]);
    }
}
