//! ICMP and ICMPv6 types by name or number. A name means the type of each family that has it; a
//! number means the same number in both; `icmp/…` and `icmpv6/…` say which family is meant.

use super::number;
use crate::rules::error::Problem;

/// A type in either family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpType {
    /// The ICMP type that is meant, if one is.
    pub v4: Option<u8>,
    /// The ICMPv6 type that is meant, if one is.
    pub v6: Option<u8>,
}

/// Name, ICMP type (IANA 'ICMP Type Numbers'), ICMPv6 type ('ICMPv6 "type" Numbers').
const NAMES: [(&str, Option<u8>, Option<u8>); 21] = [
    ("echo-request", Some(8), Some(128)),
    ("echo-reply", Some(0), Some(129)),
    ("destination-unreachable", Some(3), Some(1)),
    ("time-exceeded", Some(11), Some(3)),
    ("parameter-problem", Some(12), Some(4)),
    ("redirect", Some(5), Some(137)),
    ("router-advertisement", Some(9), Some(134)),
    ("router-solicitation", Some(10), Some(133)),
    ("source-quench", Some(4), None),
    ("timestamp-request", Some(13), None),
    ("timestamp-reply", Some(14), None),
    ("address-mask-request", Some(17), None),
    ("address-mask-reply", Some(18), None),
    ("packet-too-big", None, Some(2)),
    ("mld-query", None, Some(130)),
    ("mld-report", None, Some(131)),
    ("mld-done", None, Some(132)),
    ("neighbour-solicitation", None, Some(135)),
    ("neighbour-advertisement", None, Some(136)),
    ("mld2-report", None, Some(143)),
    ("extended-echo-request", Some(42), Some(160)),
];

/// ICMPv6 types that are neighbour discovery (RFC 4861), which is a protocol class of its own here.
#[must_use]
pub fn is_neighbour_discovery(icmpv6_type: u8) -> bool {
    (133..=137).contains(&icmpv6_type)
}

/// Reads a type.
pub fn parse(text: &str) -> Result<IcmpType, Problem> {
    let lower = text.to_ascii_lowercase();
    if let Some(rest) = lower.strip_prefix("icmp/") {
        let found = either(rest)?;
        return match found.v4 {
            Some(_) => Ok(IcmpType { v6: None, ..found }),
            None => Err(Problem::new("is not a type of ICMP", accepted())),
        };
    }
    if let Some(rest) = lower.strip_prefix("icmpv6/") {
        let found = either(rest)?;
        return match found.v6 {
            Some(_) => Ok(IcmpType { v4: None, ..found }),
            None => Err(Problem::new("is not a type of ICMPv6", accepted())),
        };
    }
    either(&lower)
}

fn either(text: &str) -> Result<IcmpType, Problem> {
    let spelled = text.replace("neighbor", "neighbour");
    if let Some(&(_, v4, v6)) = NAMES.iter().find(|(name, ..)| *name == spelled) {
        return Ok(IcmpType { v4, v6 });
    }
    number::parse(text)
        .and_then(|number| u8::try_from(number).ok())
        .map(|number| IcmpType {
            v4: Some(number),
            v6: Some(number),
        })
        .ok_or_else(|| Problem::new("is not an ICMP type", accepted()))
}

fn accepted() -> String {
    let names: Vec<&str> = NAMES.iter().map(|&(name, ..)| name).collect();
    format!(
        "numbers from 0 to 255 and {}, each with icmp/ or icmpv6/ before it where one family is meant",
        names.join(", ")
    )
}

/// Writes types so that reading them gives the same: by name where there is one, with the family
/// where both occur.
#[must_use]
pub fn format(v4: &[u8], v6: &[u8]) -> Vec<String> {
    let both = !v4.is_empty() && !v6.is_empty();
    let one = |prefix: &str, number: u8, name: Option<&str>| {
        let text = name.map_or_else(|| number.to_string(), str::to_owned);
        if both {
            format!("{prefix}/{text}")
        } else {
            text
        }
    };
    let of_v4 = v4.iter().map(|&number| {
        let name = NAMES.iter().find(|&&(_, known, _)| known == Some(number));
        one("icmp", number, name.map(|&(name, ..)| name))
    });
    let of_v6 = v6.iter().map(|&number| {
        let name = NAMES.iter().find(|&&(.., known)| known == Some(number));
        one("icmpv6", number, name.map(|&(name, ..)| name))
    });
    of_v4.chain(of_v6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_each_family_that_has_them() {
        assert_eq!(
            parse("echo-request").unwrap(),
            IcmpType {
                v4: Some(8),
                v6: Some(128)
            }
        );
        assert_eq!(
            parse("icmp/echo-request").unwrap(),
            IcmpType {
                v4: Some(8),
                v6: None
            }
        );
        assert_eq!(
            parse("icmpv6/2").unwrap(),
            IcmpType {
                v4: None,
                v6: Some(2)
            }
        );
        assert_eq!(
            parse("neighbor-solicitation").unwrap(),
            IcmpType {
                v4: None,
                v6: Some(135)
            }
        );
        assert_eq!(
            parse("77").unwrap(),
            IcmpType {
                v4: Some(77),
                v6: Some(77)
            }
        );
        for bad in [
            "",
            "256",
            "ping",
            "icmp/packet-too-big",
            "icmpv6/source-quench",
            "icmp/",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_number_comes_back() {
        for number in 0..=255 {
            let text = format(&[number], &[]);
            assert_eq!(parse(&text[0]).unwrap().v4, Some(number));
            let text = format(&[], &[number]);
            assert_eq!(parse(&text[0]).unwrap().v6, Some(number));
            let text = format(&[number], &[number]);
            assert_eq!(
                parse(&text[0]).unwrap(),
                IcmpType {
                    v4: Some(number),
                    v6: None
                }
            );
            assert_eq!(
                parse(&text[1]).unwrap(),
                IcmpType {
                    v4: None,
                    v6: Some(number)
                }
            );
        }
    }
}
