//! Hosts of a scenario: their names, their addresses, and which of them this host is.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

/// The hosts of a scenario in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hosts {
    addresses: BTreeMap<String, Vec<IpNet>>,
}

impl Hosts {
    /// Of names and addresses.
    #[must_use]
    pub fn new(addresses: BTreeMap<String, Vec<IpNet>>) -> Self {
        Self { addresses }
    }

    /// All names, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.addresses.keys().cloned().collect()
    }

    /// The addresses of one.
    #[must_use]
    pub fn addresses(&self, name: &str) -> Option<&[IpNet]> {
        self.addresses.get(name).map(Vec::as_slice)
    }

    /// The first IPv4 address of a host, or else its first one.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<IpAddr> {
        let all = self.addresses.get(name)?;
        all.iter()
            .map(IpNet::addr)
            .find(IpAddr::is_ipv4)
            .or_else(|| all.first().map(IpNet::addr))
    }

    /// The host of this name, or with this address.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<String> {
        if self.addresses.contains_key(text) {
            return Some(text.to_owned());
        }
        let address = text.parse::<IpAddr>().ok()?;
        self.with_any_of(&[address]).into_iter().next()
    }

    /// Those hosts that have one of these addresses.
    #[must_use]
    pub fn with_any_of(&self, own: &[IpAddr]) -> BTreeSet<String> {
        self.addresses
            .iter()
            .filter(|(_, nets)| {
                nets.iter()
                    .any(|net| own.iter().any(|own| net.contains(own)))
            })
            .map(|(name, _)| name.clone())
            .collect()
    }
}

/// `HOST:PORT`, where the host is a name of the scenario or an address.
pub fn host_and_port(hosts: &Hosts, text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let (host, port) = text
        .rsplit_once(':')
        .ok_or_else(|| format!("'{text}' is not HOST:PORT"))?;
    let port = port
        .parse()
        .map_err(|_| format!("'{port}' of '{text}' is not a port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = match host {
        "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
        host => host.parse().ok().or_else(|| hosts.address(host)),
    };
    address.map(|ip| SocketAddr::new(ip, port)).ok_or_else(|| {
        format!(
            "there is no host '{host}'; there are: {}",
            hosts.names().join(", ")
        )
    })
}

/// `http://HOST:PORT/PATH`: where to connect to, the Host header, and the path with its query.
pub fn url(hosts: &Hosts, text: &str) -> Result<(SocketAddr, String, String), String> {
    let rest = text.strip_prefix("http://").ok_or_else(|| {
        format!("'{text}' does not begin with http:// (for https use a command such as curl)")
    })?;
    let (authority, path) = match rest.find(['/', '?']) {
        Some(at) if rest.as_bytes().get(at) == Some(&b'?') => {
            (&rest[..at], format!("/{}", &rest[at..]))
        }
        Some(at) => (&rest[..at], rest[at..].to_owned()),
        None => (rest, "/".to_owned()),
    };
    let has_port = authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    let address = if has_port {
        host_and_port(hosts, authority)?
    } else {
        host_and_port(hosts, &format!("{authority}:80"))?
    };
    Ok((address, authority.to_owned(), path))
}
