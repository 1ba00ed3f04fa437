//! Hosts of a scenario: their names, their addresses, and which of them this host is.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
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
