//! Names for addresses, from files in the format of /etc/hosts. No name server is asked: a rule must
//! not depend on an answer that may differ next time.

use std::{
    collections::HashMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use thiserror::Error;

use super::{error::Problem, text::address};

/// The file that is read always.
pub const SYSTEM_FILE: &str = "/etc/hosts";

/// A hosts file that cannot be used, or a text that none explains.
#[derive(Debug, Error)]
pub enum HostsError {
    /// The file cannot be read.
    #[error("reading the hosts file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line is not `ADDRESS NAME…`.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A text is neither an address nor a CIDR, and no file knows it as a name.
    #[error(
        "'{name}' is neither an address nor a CIDR nor a name in {}",
        files(searched)
    )]
    Unknown {
        /// The text.
        name: String,
        /// The files that were read.
        searched: Vec<PathBuf>,
    },
    /// A text is meant as an address or CIDR and is wrong.
    #[error("'{text}' {}", problem.problem)]
    Address {
        /// The text.
        text: String,
        /// What is wrong and what is accepted.
        problem: Problem,
    },
}

impl HostsError {
    /// What to do about it.
    #[must_use]
    pub fn help(&self) -> String {
        match self {
            HostsError::Read { .. } => "name a file in the format of /etc/hosts".to_owned(),
            HostsError::Line { .. } => {
                "each line is an address and then its names, '#' begins a comment".to_owned()
            }
            HostsError::Unknown { .. } => {
                "give an address, a CIDR, or a hosts file that has the name (--hosts FILE); name \
                 servers are not asked"
                    .to_owned()
            }
            HostsError::Address { problem, .. } => problem.help.clone(),
        }
    }
}

fn files(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "a hosts file (none was read)".to_owned();
    }
    paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// What is known about names.
#[derive(Debug, Clone, Default)]
pub struct Hosts {
    names: HashMap<String, Vec<IpAddr>>,
    searched: Vec<PathBuf>,
}

impl Hosts {
    /// Reads the system's file. It is nobody's fault here if it is missing or has lines that make no
    /// sense: those are passed over, as the C library does.
    #[must_use]
    pub fn system() -> Hosts {
        let mut hosts = Hosts::default();
        let path = Path::new(SYSTEM_FILE);
        if let Ok(bytes) = fs::read(path) {
            for line in String::from_utf8_lossy(&bytes).lines() {
                if let Ok(Some((address, names))) = split(line) {
                    hosts.learn(address, names);
                }
            }
            hosts.searched.push(path.to_owned());
        }
        hosts
    }

    /// Reads a file that the user named; what it says comes before what is known already.
    pub fn read(&mut self, path: &Path) -> Result<(), HostsError> {
        let text = fs::read_to_string(path).map_err(|source| HostsError::Read {
            path: path.to_owned(),
            source,
        })?;
        self.learn_file(path, &text)
    }

    fn learn_file(&mut self, path: &Path, text: &str) -> Result<(), HostsError> {
        let mut file = Hosts::default();
        for (index, line) in text.lines().enumerate() {
            let parsed = split(line).map_err(|problem| HostsError::Line {
                path: path.to_owned(),
                line: index + 1,
                problem,
            })?;
            if let Some((address, names)) = parsed {
                file.learn(address, names);
            }
        }
        self.names.extend(file.names);
        self.searched.insert(0, path.to_owned());
        Ok(())
    }

    fn learn<'a>(&mut self, address: IpAddr, names: impl Iterator<Item = &'a str>) {
        for name in names {
            let addresses = self.names.entry(name.to_ascii_lowercase()).or_default();
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }

    /// The addresses of a name, if it is known. Case does not matter.
    #[must_use]
    pub fn look_up(&self, name: &str) -> Option<&[IpAddr]> {
        self.names
            .get(&name.to_ascii_lowercase())
            .map(Vec::as_slice)
    }

    /// What a text stands for: an address, a CIDR, or all addresses of a name.
    pub fn resolve(&self, text: &str) -> Result<Vec<IpNet>, HostsError> {
        if let Some(addresses) = self.look_up(text) {
            return Ok(addresses
                .iter()
                .map(|&address| IpNet::from(address))
                .collect());
        }
        match address::parse_prefix(text) {
            Ok(prefix) => Ok(vec![prefix]),
            Err(_) if is_name(text) => Err(HostsError::Unknown {
                name: text.to_owned(),
                searched: self.searched.clone(),
            }),
            Err(problem) => Err(HostsError::Address {
                text: text.to_owned(),
                problem,
            }),
        }
    }

    /// Replaces the names in a list of addresses, CIDRs and exceptions by their addresses. Entries
    /// that are no names stay as they are, right or wrong, for the rule's own validation to judge.
    pub fn resolve_list(&self, list: &[String]) -> Result<Vec<String>, HostsError> {
        let mut resolved = Vec::with_capacity(list.len());
        for entry in list.iter().flat_map(|text| text.split(',')).map(str::trim) {
            let (mark, name) = match entry.strip_prefix('!') {
                Some(name) => ("!", name),
                None => ("", entry),
            };
            match self.resolve(name) {
                Ok(prefixes) => resolved.extend(
                    prefixes
                        .iter()
                        .map(|p| format!("{mark}{}", address::format_prefix(p))),
                ),
                Err(error @ HostsError::Unknown { .. }) => return Err(error),
                Err(_) => resolved.push(entry.to_owned()),
            }
        }
        Ok(resolved)
    }
}

/// Whether a text can only be meant as a name: it has a letter that no address has, or nothing of an
/// address at all.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.contains(['/', ':', '%'])
        && text.contains(|c: char| c.is_alphabetic())
        && text
            .chars()
            .all(|c| c.is_alphanumeric() || "-_.".contains(c))
}

/// Splits a line into the address and its names; `None` for a line without content.
fn split(line: &str) -> Result<Option<(IpAddr, impl Iterator<Item = &str>)>, String> {
    let content = line.split('#').next().unwrap_or_default();
    let mut words = content.split_whitespace();
    let Some(address) = words.next() else {
        return Ok(None);
    };
    let address: IpAddr = address
        .parse()
        .map_err(|_| format!("'{address}' is not an address"))?;
    let mut words = words.peekable();
    if words.peek().is_none() {
        return Err(format!("{address} has no name"));
    }
    Ok(Some((address, words)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab() -> Hosts {
        let mut hosts = Hosts::default();
        let text = "# the lab\n10.77.0.1 n1 leader\nfd77::1\tN1 # six\n\n10.77.0.2 n2\n";
        hosts.learn_file(Path::new("lab.hosts"), text).unwrap();
        hosts
    }

    #[test]
    fn names_addresses_and_prefixes() {
        let hosts = lab();
        let texts = |text: &str| {
            hosts
                .resolve(text)
                .unwrap()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(texts("n1"), ["10.77.0.1/32", "fd77::1/128"]);
        assert_eq!(texts("LEADER"), ["10.77.0.1/32"]);
        assert_eq!(texts("10.0.0.0/8"), ["10.0.0.0/8"]);
        assert_eq!(texts("fd00::1"), ["fd00::1/128"]);
    }

    #[test]
    fn what_is_no_name_is_judged_as_an_address() {
        let hosts = lab();
        assert!(matches!(
            hosts.resolve("n3"),
            Err(HostsError::Unknown { .. })
        ));
        assert!(matches!(
            hosts.resolve("10.0.0.300"),
            Err(HostsError::Address { .. })
        ));
        assert!(matches!(
            hosts.resolve("10.0.0.1/8"),
            Err(HostsError::Address { .. })
        ));
        assert!(
            hosts
                .resolve("n3")
                .unwrap_err()
                .to_string()
                .contains("lab.hosts")
        );
    }

    #[test]
    fn lists() {
        let list = [
            "n1,!n2".to_owned(),
            "10.0.0.0/8".to_owned(),
            "10.0.0.1/8".to_owned(),
        ];
        assert_eq!(
            lab().resolve_list(&list).unwrap(),
            [
                "10.77.0.1",
                "fd77::1",
                "!10.77.0.2",
                "10.0.0.0/8",
                "10.0.0.1/8"
            ]
        );
        assert!(lab().resolve_list(&["nobody".to_owned()]).is_err());
    }

    #[test]
    fn a_named_file_is_read_strictly_and_comes_first() {
        let mut hosts = lab();
        let path = Path::new("mine");
        hosts.learn_file(path, "192.0.2.1 n1\n").unwrap();
        assert_eq!(
            hosts.look_up("n1").unwrap(),
            ["192.0.2.1".parse::<IpAddr>().unwrap()]
        );
        for bad in ["n1 10.0.0.1\n", "10.0.0.1\n", "\n\n10.0.0 n1"] {
            let error = hosts.learn_file(path, bad).unwrap_err();
            assert!(matches!(error, HostsError::Line { .. }), "{error}");
        }
        let missing = hosts.read(Path::new("/nonexistent/hosts")).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/hosts"));
    }
}
