//! Addresses and prefixes: `10.0.0.0/8`, `fd00::1`, and `!…` for an exception.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::rules::{error::Problem, model::AddrSet};

const ACCEPTED: &str = "addresses such as 10.0.0.1 or fd00::1 and CIDRs such as 10.0.0.0/8 or \
                        fd00::/64, each with '!' before it for an exception";

/// Reads an address (a prefix of full length) or a CIDR whose host bits are zero. An IPv4-mapped
/// IPv6 address is refused: no packet carries one.
pub fn parse_prefix(text: &str) -> Result<IpNet, Problem> {
    if text.contains('%') {
        return Err(Problem::new(
            "carries a zone (%…)",
            "leave the zone out and name the interface with iface",
        ));
    }
    let prefix = if let Some((address, length)) = text.split_once('/') {
        let address: IpAddr = address.parse().map_err(|_| not_an_address())?;
        let longest: u8 = if address.is_ipv4() { 32 } else { 128 };
        let length = length
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| length.parse::<u8>().ok())
            .flatten()
            .filter(|&length| length <= longest)
            .ok_or_else(|| {
                Problem::new(
                    format!("has the prefix length '{length}'"),
                    format!("a length from 0 to {longest} after the '/'"),
                )
            })?;
        let prefix = IpNet::new(address, length)
            .map_err(|error| Problem::new(error.to_string(), ACCEPTED))?;
        if prefix.trunc() != prefix {
            return Err(Problem::new(
                "has bits set behind the prefix length",
                format!(
                    "write {} for the network, or {address} for the host",
                    prefix.trunc()
                ),
            ));
        }
        prefix
    } else {
        IpNet::from(text.parse::<IpAddr>().map_err(|_| not_an_address())?)
    };
    if let IpNet::V6(v6) = prefix
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.addr().to_ipv4_mapped()
    {
        return Err(Problem::new(
            "is an IPv4 address mapped into IPv6, which no packet carries",
            format!("write {v4}/{}", v6.prefix_len() - 96),
        ));
    }
    Ok(prefix)
}

fn not_an_address() -> Problem {
    Problem::new("is neither an address nor a CIDR", ACCEPTED)
}

/// Writes a prefix: an address where it is one, else a CIDR.
#[must_use]
pub fn format_prefix(prefix: &IpNet) -> String {
    if prefix.prefix_len() == prefix.max_prefix_len() {
        prefix.addr().to_string()
    } else {
        prefix.to_string()
    }
}

/// Puts the prefixes of a set into the one order that it is kept in, without duplicates.
pub fn normalise(set: &mut AddrSet) {
    for list in [&mut set.include, &mut set.except] {
        list.sort_unstable();
        list.dedup();
    }
}

/// Writes a set: what it includes, then its exceptions with `!`.
#[must_use]
pub fn format_set(set: &AddrSet) -> Vec<String> {
    set.include
        .iter()
        .map(format_prefix)
        .chain(
            set.except
                .iter()
                .map(|prefix| format!("!{}", format_prefix(prefix))),
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        for (text, shown) in [
            ("10.0.0.1", "10.0.0.1"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.1/32", "10.0.0.1"),
            ("FD00::1", "fd00::1"),
            ("::/0", "::/0"),
            ("0.0.0.0/0", "0.0.0.0/0"),
        ] {
            assert_eq!(format_prefix(&parse_prefix(text).unwrap()), shown);
        }
    }

    #[test]
    fn host_bits_are_refused_with_the_prefix_that_was_meant() {
        let problem = parse_prefix("10.1.2.3/8").unwrap_err();
        assert!(problem.help.contains("10.0.0.0/8"), "{problem:?}");
        assert!(problem.help.contains("10.1.2.3 "), "{problem:?}");
    }

    #[test]
    fn bad_prefixes() {
        for bad in [
            "",
            "10.0.0",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.0/a",
            "web",
            "fe80::1%eth0",
            "::ffff:10.0.0.1",
            "10.0.0.1 ",
            "10.0.0.256",
        ] {
            assert!(parse_prefix(bad).is_err(), "{bad}");
        }
    }
}
