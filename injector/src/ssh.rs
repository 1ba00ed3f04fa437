//! Connections that the person running the CLI depends on: a rule that cut them would lock its author
//! out.
//!
//! `sudo` clears the environment, so the CLI's own often says nothing; its ancestors' do.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

/// A process tree deeper than this is a loop in what we read.
const MAX_DEPTH: usize = 128;

/// A control connection, as SSH describes it to what it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OperatorConnection {
    /// The operator's side.
    pub client: IpAddr,
    /// Port there.
    pub client_port: u16,
    /// This host's address, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<IpAddr>,
    /// Port here.
    pub server_port: u16,
}

impl OperatorConnection {
    /// Reads `SSH_CONNECTION`: client address and port, server address and port.
    #[must_use]
    pub fn from_ssh_connection(text: &str) -> Option<Self> {
        let mut fields = text.split_ascii_whitespace();
        let connection = Self {
            client: address(fields.next()?)?,
            client_port: fields.next()?.parse().ok()?,
            server: Some(address(fields.next()?)?),
            server_port: fields.next()?.parse().ok()?,
        };
        fields.next().is_none().then_some(connection)
    }

    /// Reads `SSH_CLIENT`: client address and port, server port.
    #[must_use]
    pub fn from_ssh_client(text: &str) -> Option<Self> {
        let mut fields = text.split_ascii_whitespace();
        let connection = Self {
            client: address(fields.next()?)?,
            client_port: fields.next()?.parse().ok()?,
            server: None,
            server_port: fields.next()?.parse().ok()?,
        };
        fields.next().is_none().then_some(connection)
    }
}

/// An address as sshd writes it: IPv6 ones perhaps with a scope, IPv4 ones perhaps mapped into IPv6.
fn address(text: &str) -> Option<IpAddr> {
    if let Some((address, _scope)) = text.split_once('%') {
        return address.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    }
    text.parse::<IpAddr>()
        .ok()
        .map(|address| address.to_canonical())
}

/// The connections found in the environments of this process and of its ancestors. Environments that
/// may not be read (another user's) are passed over.
#[must_use]
pub fn operator_connections() -> Vec<OperatorConnection> {
    let mut found = BTreeSet::new();
    let mut pid = std::process::id();
    for _ in 0..MAX_DEPTH {
        if let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) {
            found.extend(in_environment(&environment));
        }
        let Some(parent) = fs::read_to_string(format!("/proc/{pid}/status"))
            .ok()
            .as_deref()
            .and_then(parent)
        else {
            break;
        };
        pid = parent;
    }
    without_repetitions(&found)
}

/// The parent in the text of /proc/PID/status; none for the first process.
fn parent(status: &str) -> Option<u32> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))
        .and_then(|pid| pid.trim().parse().ok())
        .filter(|pid| *pid != 0)
}

/// The connections in an environment (`NAME=value`, separated by zeros).
fn in_environment(environment: &[u8]) -> impl Iterator<Item = OperatorConnection> {
    environment.split(|byte| *byte == 0).filter_map(|variable| {
        let variable = std::str::from_utf8(variable).ok()?;
        match variable.split_once('=')? {
            ("SSH_CONNECTION", value) => OperatorConnection::from_ssh_connection(value),
            ("SSH_CLIENT", value) => OperatorConnection::from_ssh_client(value),
            _ => None,
        }
    })
}

/// Leaves out what says less about a connection than another entry does.
fn without_repetitions(found: &BTreeSet<OperatorConnection>) -> Vec<OperatorConnection> {
    found
        .iter()
        .filter(|one| {
            one.server.is_some()
                || !found.iter().any(|other| {
                    other.server.is_some()
                        && OperatorConnection {
                            server: None,
                            ..*other
                        } == **one
                })
        })
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(environment: &str) -> Vec<OperatorConnection> {
        let found = in_environment(environment.replace('|', "\0").as_bytes()).collect();
        without_repetitions(&found)
    }

    #[test]
    fn ssh_variables_are_read() {
        assert_eq!(
            read(
                "HOME=/root|SSH_CONNECTION=192.0.2.7 51000 10.0.0.1 22|SSH_CLIENT=192.0.2.7 51000 22|"
            ),
            [OperatorConnection {
                client: "192.0.2.7".parse().unwrap(),
                client_port: 51000,
                server: Some("10.0.0.1".parse().unwrap()),
                server_port: 22,
            }]
        );
        let found = read(
            "SSH_CLIENT=fe80::1%eth0 51000 22|SSH_CONNECTION=::ffff:10.0.0.9 1 ::ffff:10.0.0.1 2",
        );
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].client, "10.0.0.9".parse::<IpAddr>().unwrap());
        assert_eq!(found[1].client, "fe80::1".parse::<IpAddr>().unwrap());
        assert_eq!(found[1].server, None);
    }

    #[test]
    fn what_is_not_a_connection_is_passed_over() {
        for text in [
            "",
            "SSH_CONNECTION=",
            "SSH_CONNECTION=UNKNOWN 65535 UNKNOWN 65535",
            "SSH_CONNECTION=10.0.0.1 22 10.0.0.2",
            "SSH_CONNECTION=10.0.0.1 22 10.0.0.2 70000",
            "SSH_CONNECTION=10.0.0.1 22 10.0.0.2 22 7",
            "SSH_CLIENT=10.0.0.1 22",
            "XSSH_CLIENT=10.0.0.1 22 22",
        ] {
            assert_eq!(read(text), [], "{text}");
        }
        assert_eq!(parent("Name:\tx\nPPid:\t42\n"), Some(42));
        assert_eq!(parent("PPid:\t0\n"), None);
        assert_eq!(parent(""), None);
    }

    #[test]
    fn ancestors_are_searched() {
        // A child's environment is read from outside, as an ancestor's is.
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env("SSH_CONNECTION", "192.0.2.7 51000 10.0.0.1 22")
            .spawn()
            .unwrap();
        let path = format!("/proc/{}/environ", child.id());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let mut found = 0;
        while found == 0 && std::time::Instant::now() < deadline {
            found = fs::read(&path).map_or(0, |bytes| in_environment(&bytes).count());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, 1);
        let of_this_process = operator_connections();
        assert!(of_this_process.len() < MAX_DEPTH * 2);
    }
}
