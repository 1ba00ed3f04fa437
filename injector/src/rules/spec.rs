//! The text form of a rule: what files hold, what requests carry and what `list --json` prints.

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, SeqAccess, Visitor},
};
use std::fmt;

/// A rule as text. Every field may be left out except `iface` and `fault`; lists mean 'one of these'.
///
/// Where a list is expected, a single text or number is accepted too, and one text may hold several
/// entries separated by commas.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Name; generated from the content where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Name of the command that made several rules together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Network namespace: `NAME`, `/path`, `PID` or `pid:PID`; the daemon's own where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// Interface names.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub iface: Vec<String>,
    /// `egress`, `ingress` or `both` (the default).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<String>,
    /// Addresses and CIDRs of the peer; `!` before one takes it out again.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub peer: Vec<String>,
    /// The same for the local side.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub local: Vec<String>,
    /// The same for the source of the packet.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub src: Vec<String>,
    /// The same for the destination of the packet.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub dst: Vec<String>,
    /// Exceptions to `peer`: another way to write `!` there.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub except: Vec<String>,
    /// Ports and ranges (`80`, `8000-8080`) at the peer.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub peer_port: Vec<String>,
    /// Ports and ranges at the local side.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub local_port: Vec<String>,
    /// Source ports and ranges.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub src_port: Vec<String>,
    /// Destination ports and ranges.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub dst_port: Vec<String>,
    /// Protocols: names, numbers, `arp`, `nd`, `other`.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub proto: Vec<String>,
    /// 4 or 6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_version: Option<u8>,
    /// ICMP and ICMPv6 types, by name or number.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub icmp_type: Vec<String>,
    /// TCP flags: `syn,!ack`, or `VALUE/MASK`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_flags: Option<String>,
    /// Length of the IP packet on the wire: `1400-`, `64`, `-100`, `64-128`.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub length: Vec<String>,
    /// DSCP by name or number.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub dscp: Vec<String>,
    /// Firewall marks: `VALUE` or `VALUE/MASK`.
    #[serde(
        default,
        deserialize_with = "texts",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "Texts")]
    pub mark: Vec<String>,
    /// Share of conversations: `25%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<String>,
    /// `new` or `established`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// What happens to the packets.
    #[serde(default, skip_serializing_if = "FaultSpec::is_empty")]
    pub fault: FaultSpec,
    /// Lifetime: `30s`, `1m30s`. Until healed where absent.
    #[serde(rename = "for", default, skip_serializing_if = "Option::is_none")]
    pub lifetime: Option<String>,
    /// `up=3s,down=500ms`, and `phase=1s` where wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flap: Option<String>,
    /// Seed of the random stream; drawn where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// What counts as one flow: `tuple` (the default), `service` or `ordinal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The rule may match all traffic of its interfaces.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all_traffic: bool,
    /// The rule also acts on what is protected.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unprotected: bool,
}

/// What happens to the packets of a rule, as text: at least one of the faults, and at most one of those that go
/// by position or answer (from `cut` to `reject`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FaultSpec {
    /// Every packet is lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut: bool,
    /// The n-th packet of each flow is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_nth: Option<u64>,
    /// The first n packets of each flow are lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_first: Option<u64>,
    /// Every n-th packet of each flow is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_every: Option<u64>,
    /// Packets at the positions of a 1 are lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_pattern: Option<String>,
    /// The pattern is played once instead of over and over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// The first packet that matches the rule is lost, and no other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drop_once: bool,
    /// Every packet is lost and answered: `rst`, `icmp-host`, `icmp-port`, `icmp-admin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reject: Option<String>,
    /// Packets are lost by chance: `1%`, `gemodel:p,r[,1-h[,1-k]]`, `state:p13[,p31[,p32[,p23[,p14]]]]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<String>,
    /// Bits of packets are turned over by chance: `0.1%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<String>,
    /// Distinct bits of a corrupted packet, 1 to 32; 1 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u32>,
    /// Which bits: `any` (the default), `header` or `payload`.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub part: Option<String>,
    /// `broken` (the default): the receiver's stack drops it; `repaired`: the application reads wrong bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Packets are duplicated by chance: `2%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicate: Option<String>,
    /// Copies of a duplicated packet, besides the original; 1 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<u32>,
    /// What copies leave after the original: `3s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_delay: Option<String>,
    /// Packets are delayed: `100ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<String>,
    /// The delay varies: `20ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<String>,
    /// How it varies: `uniform` (the default), `normal`, `pareto`, `paretonormal`, `exponential`, `lognormal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distribution: Option<String>,
    /// How much a delay is like the one before: `25%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation: Option<String>,
    /// `keep` (the default): no packet overtakes an earlier one of its flow; `free`: each leaves at its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
    /// Packets are held back by chance: `5%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reorder: Option<String>,
    /// For how long: `3ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<String>,
    /// IP packets longer than so many bytes are lost, and no ICMP message says so: `1400`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu_blackhole: Option<u32>,
    /// Packets go through a line of so many bits per second: `10mbit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<String>,
    /// Packets go through a line whose rate follows a trace, in place of `rate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_trace: Option<TraceSpec>,
    /// What waits in front of it at most: `100ms` (the default), `64kb`, `50p`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// Bytes by which a packet is longer on the line than its frame (under `rate_trace`: than its IP packet and four
    /// bytes), or shorter where it is negative; 0 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overhead: Option<i32>,
    /// Which packets share a line: `rule` (the default), `flow` or `peer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
    /// Packets that wait longer are marked (ECN): `5ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ecn: Option<String>,
    /// Everything is held for so long, then let go at once: `15s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall: Option<String>,
    /// So again and again: `60s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<String>,
}

/// A trace of a link's rate: an opportunity to deliver 1504 bytes at each of these times, over and over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TraceSpec {
    /// What it is called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Times in milliseconds, in ascending order; the last one is also after how long it begins again.
    pub milliseconds: Vec<u32>,
}

impl FaultSpec {
    /// Fields that decide by position, or answer: a rule has one of them at most.
    pub const POSITIONAL: [&str; 7] = [
        "cut",
        "drop_nth",
        "drop_first",
        "drop_every",
        "drop_pattern",
        "drop_once",
        "reject",
    ];

    /// The other faults: a rule may have any of them.
    pub const COMBINED: [&str; 9] = [
        "loss",
        "corrupt",
        "duplicate",
        "delay",
        "reorder",
        "rate",
        "rate_trace",
        "stall",
        "mtu_blackhole",
    ];

    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == FaultSpec::default()
    }

    /// The fault that loses every packet.
    #[must_use]
    pub fn cut() -> FaultSpec {
        FaultSpec {
            cut: true,
            ..FaultSpec::default()
        }
    }
}

/// What [`texts`] reads, for the schema.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "never made: its schema is what it is for")]
enum Texts {
    Text(String),
    Number(u64),
    List(Vec<TextOrNumber>),
}

/// An entry of such a list.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "never made: its schema is what it is for")]
enum TextOrNumber {
    Text(String),
    Number(u64),
}

/// Reads a list of texts, and lets a single text or number stand for a list of one.
fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Texts;

    impl<'de> Visitor<'de> for Texts {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text, a number, or a list of these")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
            Ok(vec![number.to_string()])
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::with_capacity(list.size_hint().unwrap_or(0).min(4096));
            while let Some(Text(text)) = list.next_element()? {
                all.push(text);
            }
            Ok(all)
        }
    }

    struct Text(String);

    impl<'de> Deserialize<'de> for Text {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Text, D::Error> {
            struct One;

            impl Visitor<'_> for One {
                type Value = Text;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a text or a number")
                }

                fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                    Ok(Text(text.to_owned()))
                }

                fn visit_u64<E: de::Error>(self, number: u64) -> Result<Text, E> {
                    Ok(Text(number.to_string()))
                }
            }

            deserializer.deserialize_any(One)
        }
    }

    deserializer.deserialize_any(Texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_text_or_number_stands_for_a_list() {
        let spec: RuleSpec = serde_json::from_str(
            r#"{"iface":"eth0","peer":["10.0.0.1"],"peer_port":[80,"443"],"dscp":46,"src":null,
                "fault":{"cut":true}}"#,
        )
        .unwrap();
        assert_eq!(spec.iface, ["eth0"]);
        assert_eq!(spec.peer_port, ["80", "443"]);
        assert_eq!(spec.dscp, ["46"]);
        assert!(spec.src.is_empty());
    }

    /// Fields that say more about a fault, and are none themselves.
    const DETAILS: [&str; 16] = [
        "once",
        "bits",
        "where",
        "checksum",
        "copies",
        "copy_delay",
        "jitter",
        "distribution",
        "correlation",
        "order",
        "hold",
        "queue",
        "overhead",
        "share",
        "ecn",
        "every",
    ];

    #[test]
    fn no_fault_is_forgotten() {
        let schema = serde_json::to_value(schemars::schema_for!(FaultSpec)).unwrap();
        let fields = schema["properties"].as_object().unwrap();
        let mut listed: Vec<&str> = FaultSpec::POSITIONAL
            .into_iter()
            .chain(FaultSpec::COMBINED)
            .chain(DETAILS)
            .collect();
        listed.sort_unstable();
        let mut there: Vec<&str> = fields.keys().map(String::as_str).collect();
        there.sort_unstable();
        assert_eq!(listed, there);
    }

    #[test]
    fn what_is_absent_is_not_written() {
        let spec = RuleSpec {
            iface: vec!["eth0".into()],
            fault: FaultSpec::cut(),
            ..RuleSpec::default()
        };
        assert_eq!(
            serde_json::to_string(&spec).unwrap(),
            r#"{"iface":["eth0"],"fault":{"cut":true}}"#
        );
    }

    #[test]
    fn unknown_fields_are_named() {
        let error = serde_json::from_str::<RuleSpec>(r#"{"interface":"eth0"}"#).unwrap_err();
        assert!(
            error.to_string().contains("unknown field `interface`"),
            "{error}"
        );
        let error = serde_json::from_str::<RuleSpec>(r#"{"fault":{"lose":1}}"#).unwrap_err();
        assert!(
            error.to_string().contains("unknown field `lose`"),
            "{error}"
        );
    }

    #[test]
    fn wrong_types_are_refused() {
        for text in [
            r#"{"iface":[["a"]]}"#,
            r#"{"iface":true}"#,
            r#"{"peer_port":[-1]}"#,
        ] {
            assert!(serde_json::from_str::<RuleSpec>(text).is_err(), "{text}");
        }
    }
}
