//! `injector stats`: what rules were asked to do and what they did.

use std::{fmt::Write, thread};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use super::{
    exit::{Exit, Failure},
    output::{Output, Table, Tone, age, bytes, percent, toned},
    report,
    session::Session,
};
use crate::{
    protocol::{Call, LaneLosses, NoArgs, RuleStats, StatsResult, TableUse, TargetStats},
    rules::text::duration,
    words::{self, grouped},
};

/// Show what rules were asked to do, and what they did
#[derive(Debug, Args)]
pub(super) struct StatsArgs {
    /// Only these rules, or the rules of these groups
    names: Vec<String>,
    /// Again and again, every INTERVAL
    #[arg(short, long, value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "1s")]
    watch: Option<String>,
    /// Fail (exit code 6) if a rule has matched nothing, or matched while the lease had lapsed
    #[arg(long, conflicts_with = "watch")]
    expect_effect: bool,
    /// Also show how full the kernel's tables are
    #[arg(long)]
    tables: bool,
}

/// The document of `stats --expect-effect --json`.
#[derive(Serialize)]
struct Expected<'a> {
    #[serde(flatten)]
    stats: &'a StatsResult,
    expect_effect: Verdict<'a>,
}

#[derive(Serialize)]
struct Verdict<'a> {
    met: bool,
    failures: &'a [Unmet],
}

/// A rule that had no effect, or a void one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Unmet {
    rule: Option<String>,
    reason: String,
}

impl StatsArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<Exit, Failure> {
        let interval = self
            .watch
            .as_ref()
            .map(|text| {
                duration::parse(text)
                    .ok()
                    .filter(|interval| !interval.is_zero())
                    .ok_or_else(|| {
                        Failure::usage(format!("--watch '{text}' is not an interval")).help(
                            "a time above zero, such as --watch=500ms; names stand before --watch",
                        )
                    })
            })
            .transpose()?;
        let Some(mut connected) = session.connect()? else {
            return self.without_daemon(session);
        };
        loop {
            let mut stats: StatsResult = connected.client.call(Call::Stats(NoArgs {}))?;
            self.select(&mut stats)?;
            let Some(interval) = interval else {
                return self.finish(session.output, &stats);
            };
            session.output.either(&stats, || {
                let text = text(session.output, &stats, self.tables);
                if session.output.terminal {
                    // Home, and clear what follows: the picture stands still.
                    format!("\u{1b}[H\u{1b}[J{text}")
                } else {
                    format!("{:.0}\n{text}\n", stats.at)
                }
            })?;
            thread::sleep(interval);
        }
    }

    fn without_daemon(&self, session: &Session) -> Result<Exit, Failure> {
        let recovery = session.recover()?;
        let failures = if self.expect_effect {
            vec![no_rules()]
        } else {
            Vec::new()
        };
        let mut document = json!({
            "rules": [], "targets": [], "tables": [], "lanes": [], "flushes": [],
            "lane_losses": LaneLosses::default(), "lapses": 0, "daemon": null,
            "recovered": recovery,
        });
        if self.expect_effect
            && let Some(object) = document.as_object_mut()
        {
            object.insert(
                "expect_effect".to_owned(),
                json!(Verdict {
                    met: false,
                    failures: &failures
                }),
            );
        }
        session.output.either(&document, || {
            "no daemon is running, so there are no rules\n".to_owned()
        })?;
        if let Some(name) = self.names.first() {
            return Err(super::session::no_such_rule(name));
        }
        Ok(verdict(&failures))
    }

    /// Leaves only what was asked for.
    fn select(&self, stats: &mut StatsResult) -> Result<(), Failure> {
        if self.names.is_empty() {
            return Ok(());
        }
        let is = |rule: &RuleStats, name: &String| {
            rule.name == *name || rule.group.as_ref() == Some(name)
        };
        for name in &self.names {
            if !stats.rules.iter().any(|rule| is(rule, name)) {
                return Err(Failure::new(
                    Exit::Name,
                    "not_found",
                    format!("there is no rule or group '{name}'"),
                )
                .help("`injector list` shows the names that exist"));
            }
        }
        stats
            .rules
            .retain(|rule| self.names.iter().any(|name| is(rule, name)));
        stats.targets.retain(|target| {
            target
                .rules
                .iter()
                .any(|n| stats.rules.iter().any(|r| r.name == *n))
        });
        Ok(())
    }

    fn finish(&self, output: Output, stats: &StatsResult) -> Result<Exit, Failure> {
        if !self.expect_effect {
            output.either(stats, || text(output, stats, self.tables))?;
            return Ok(Exit::Success);
        }
        let failures = unmet(stats);
        let met = failures.is_empty();
        let document = Expected {
            stats,
            expect_effect: Verdict {
                met,
                failures: &failures,
            },
        };
        output.either(&document, || text(output, stats, self.tables))?;
        Ok(verdict(&failures))
    }
}

/// Says on standard error which rules failed the expectation, and gives the exit code.
fn verdict(failures: &[Unmet]) -> Exit {
    for failure in failures {
        let rule = failure
            .rule
            .as_ref()
            .map_or_else(String::new, |rule| format!("rule '{rule}' "));
        super::output::say(&format!(
            "{} {rule}{}",
            toned(Tone::Bad, "no effect:"),
            failure.reason
        ));
    }
    if failures.is_empty() {
        Exit::Success
    } else {
        Exit::NoEffect
    }
}

fn no_rules() -> Unmet {
    Unmet {
        rule: None,
        reason: "there is no rule that could have had one".to_owned(),
    }
}

/// The rules that had no effect, or one that cannot be relied on.
fn unmet(stats: &StatsResult) -> Vec<Unmet> {
    if stats.rules.is_empty() {
        return vec![no_rules()];
    }
    let mut failures = Vec::new();
    for rule in &stats.rules {
        let total = report::total(rule);
        let mut fail = |reason: String| {
            failures.push(Unmet {
                rule: Some(rule.name.clone()),
                reason,
            });
        };
        if total.lapsed_packets > 0 {
            fail(format!(
                "matched {} packets while the lease had lapsed: they passed, the run is void",
                total.lapsed_packets
            ));
        }
        if total.matched_packets == 0 {
            let obstacles: Vec<&str> = stats
                .targets
                .iter()
                .filter(|target| target.rules.contains(&rule.name))
                .flat_map(|target| target.obstacles.iter().map(String::as_str))
                .collect();
            let mut reason = format!("matched no packet (asked: {}, {})", rule.fault, rule.asked);
            if !obstacles.is_empty() {
                let _ = write!(
                    reason,
                    "; hidden from it, perhaps, by {}",
                    obstacles.join(", ")
                );
            }
            fail(reason);
        }
    }
    failures
}

fn text(output: Output, stats: &StatsResult, tables: bool) -> String {
    let mut text = String::new();
    if stats.rules.is_empty() {
        text.push_str("there are no rules\n");
    } else {
        text.push_str(&rules(output, &stats.rules, stats.at));
    }
    text.push_str(&targets(output, &stats.targets));
    text.push_str(&lanes(stats));
    text.push_str(&report::flushes(&stats.flushes));
    if tables {
        text.push_str(&table_use(output, &stats.tables));
    }
    if !stats.lease.valid {
        let _ = writeln!(
            text,
            "{} the lease has lapsed: no rule acts until the daemon renews it",
            toned(Tone::Bad, "WARNING:")
        );
    }
    if stats.lapses > 0 {
        let _ = writeln!(
            text,
            "{} the lease has lapsed {} times: rules did not act in between",
            toned(Tone::Notice, "warning:"),
            stats.lapses
        );
    }
    text
}

/// Columns that are shown only where they say something; the first two always where a rule was asked to cut.
const RARE: [&str; 14] = [
    "CUT",
    "SHARE",
    "REJECTED",
    "EXCESS",
    "LOST",
    "CORRUPTED",
    "COPIES",
    "DELAYED",
    "HELD BACK",
    "OVERFLOW",
    "TOO LONG",
    "STALLED",
    "OFF",
    "LAPSED",
];

fn rules(output: Output, rules: &[RuleStats], now: Timestamp) -> String {
    let mut table = Table::new(&[
        "RULE",
        "STATE",
        "ASKED",
        "MATCHED",
        "CUT",
        "SHARE",
        "REJECTED",
        "EXCESS",
        "LOST",
        "CORRUPTED",
        "COPIES",
        "DELAYED",
        "HELD BACK",
        "OVERFLOW",
        "TOO LONG",
        "STALLED",
        "FLOWS",
        "OFF",
        "LAPSED",
        "FIRST",
        "LAST",
    ])
    .sparing(if rules.iter().any(report::cuts) {
        &RARE[2..]
    } else {
        &RARE
    });
    let mut lines = String::new();
    for rule in rules {
        let total = report::total(rule);
        let lapsed = total.lapsed_packets.to_string();
        // A rule that was not asked to cut has no share of it.
        let [cut, share] = if report::cuts(rule) {
            [
                amount(total.cut_packets, total.cut_bytes),
                percent(total.cut_packets, total.matched_packets),
            ]
        } else {
            ["0".to_owned(), "0".to_owned()]
        };
        table.row(vec![
            rule.name.clone(),
            report::state(rule.state),
            rule.fault.clone(),
            amount(total.matched_packets, total.matched_bytes),
            cut,
            share,
            total.answered_packets.to_string(),
            total.excess_packets.to_string(),
            total.lost_packets.to_string(),
            total.corrupted_packets.to_string(),
            total.copies.to_string(),
            total.delayed_packets.to_string(),
            total.reordered_packets.to_string(),
            total.overflow_packets.to_string(),
            total.too_long_packets.to_string(),
            total.stalled_packets.to_string(),
            total.flows.to_string(),
            total.off_packets.to_string(),
            if total.lapsed_packets > 0 {
                toned(Tone::Bad, &lapsed)
            } else {
                lapsed
            },
            age(total.first_at, now),
            age(total.last_at, now),
        ]);
        for one in &rule.realised {
            let _ = writeln!(lines, "{}: {}", rule.name, words::realised(one));
        }
        if let Some(queue) = report::queue(&total) {
            let _ = writeln!(lines, "{}: {queue}", rule.name);
        }
    }
    output.table(&table) + &lines
}

/// What lanes hold, and, loudly, what they lost.
fn lanes(stats: &StatsResult) -> String {
    let mut text = String::new();
    for lane in &stats.lanes {
        let _ = writeln!(
            text,
            "lane of network namespace {}: holds {} of {} packets, {} of {} of memory",
            lane.netns,
            grouped(lane.queued_packets),
            grouped(lane.capacity_packets),
            bytes(lane.memory_bytes),
            bytes(lane.memory_capacity)
        );
        if let Some(problem) = &lane.problem {
            let _ = writeln!(
                text,
                "{} {problem}; faults that need it do not act there until a rule with such a fault is added",
                toned(Tone::Bad, "WARNING:")
            );
        }
        if lane.missing_packets > 0 {
            let _ = writeln!(
                text,
                "{} {} packets went missing in it, and no counter of its devices tells of them",
                toned(Tone::Bad, "WARNING:"),
                grouped(lane.missing_packets)
            );
        }
        if lane.full_packets > 0 {
            let _ = writeln!(
                text,
                "{} it was full, and lost {} packets that no rule took (`injector daemon --lane-memory`, \
                 `--lane-packets`)",
                toned(Tone::Bad, "WARNING:"),
                lane.full_packets
            );
        }
        if lane.dropped_packets + lane.device_drops > 0 {
            let _ = writeln!(
                text,
                "{} its queues dropped {} packets, its devices {}",
                toned(Tone::Bad, "WARNING:"),
                lane.dropped_packets,
                lane.device_drops
            );
        }
        if lane.backlog_drops > 0 {
            let _ = writeln!(
                text,
                "{} its targets dropped {} packets as they arrived, or came back from it (their backlog was full: \
                 raise net.core.netdev_max_backlog)",
                toned(Tone::Notice, "warning:"),
                lane.backlog_drops
            );
        }
    }
    let losses = stats.lane_losses;
    if losses.entries + losses.copies + losses.returns + losses.strays > 0 {
        let _ = writeln!(
            text,
            "{} lanes lost {} packets on their way in, could not send {} copies, and not bring {} packets back; {} \
             packets on their devices were none of theirs",
            toned(Tone::Bad, "WARNING:"),
            losses.entries,
            losses.copies,
            losses.returns,
            losses.strays
        );
    }
    text
}

fn amount(packets: u64, size: u64) -> String {
    if packets == 0 {
        "0".to_owned()
    } else {
        format!("{packets} ({})", bytes(size))
    }
}

/// Targets with what came by, and, loudly, what hides packets from us there.
pub(super) fn targets(output: Output, targets: &[TargetStats]) -> String {
    if targets.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        "TARGET",
        "DIRECTION",
        "SEEN",
        "PASSED",
        "CUT",
        "UNPARSED",
        "ORPHANS",
        "ERRORS",
        "FULL",
        "LAPSED",
    ])
    .sparing(&["UNPARSED", "ORPHANS", "ERRORS", "FULL", "LAPSED"]);
    let mut notes = String::new();
    for target in targets {
        let name = report::interface(target.netns.as_ref(), &target.iface);
        for (direction, counters) in [("egress", &target.egress), ("ingress", &target.ingress)] {
            let alarming = |number: u64| {
                let text = number.to_string();
                if number > 0 {
                    toned(Tone::Notice, &text)
                } else {
                    text
                }
            };
            table.row(vec![
                name.clone(),
                direction.to_owned(),
                amount(counters.seen_packets, counters.seen_bytes),
                counters.passed_packets.to_string(),
                counters.cut_packets.to_string(),
                alarming(counters.unparsed_packets),
                alarming(counters.orphan_fragments),
                alarming(counters.errors + counters.too_many_rules),
                alarming(counters.table_full),
                alarming(counters.lapsed_packets),
            ]);
        }
        if let Some(problem) = &target.problem {
            let _ = writeln!(notes, "{} {name}: {problem}", toned(Tone::Bad, "WARNING:"));
        } else if !target.attached {
            let _ = writeln!(
                notes,
                "{} {name}: not attached",
                toned(Tone::Bad, "WARNING:")
            );
        }
        let refused = target.egress.lane_refused + target.ingress.lane_refused;
        if refused > 0 {
            let _ = writeln!(
                notes,
                "{} {name}: {} packets could not be sent into the lane, and passed without a fault",
                toned(Tone::Bad, "WARNING:"),
                grouped(refused)
            );
        }
        for obstacle in &target.obstacles {
            let _ = writeln!(
                notes,
                "{} {name}: {obstacle} runs before the injector and may hide packets from it",
                toned(Tone::Bad, "WARNING:")
            );
        }
    }
    output.table(&table) + &notes
}

fn table_use(output: Output, tables: &[TableUse]) -> String {
    let mut table = Table::new(&["TABLE", "USED", "CAPACITY", "MEMORY"]);
    for entry in tables {
        table.row(vec![
            entry.name.clone(),
            entry
                .used
                .map_or_else(|| "-".to_owned(), |used| used.to_string()),
            entry.capacity.to_string(),
            entry.bytes.map_or_else(|| "-".to_owned(), bytes),
        ]);
    }
    output.table(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> StatsResult {
        serde_json::from_value(json!({
            "at": "2026-01-01T00:01:00Z",
            "rules": [
                {"name": "web", "state": "active", "fault": "drop-every 10", "asked": "tcp",
                 "egress": counters(120, 12, 0), "ingress": counters(0, 0, 0)},
                {"name": "idle", "group": "g", "state": "expired", "fault": "cut", "asked": "udp",
                 "egress": counters(0, 0, 0), "ingress": counters(0, 0, 0)}
            ],
            "targets": [{"netns": "n1", "iface": "eth0", "ifindex": 2, "attached": true,
                "obstacles": ["TCX program id 12 'x'"], "rules": ["idle"],
                "egress": target(200), "ingress": target(0)}],
            "tables": [], "lapses": 0,
            "lease": {"seconds": 10.0, "valid": true, "lapses": 0}
        }))
        .unwrap()
    }

    fn counters(matched: u64, cut: u64, lapsed: u64) -> serde_json::Value {
        let first = (matched > 0).then_some("2026-01-01T00:00:30Z");
        json!({"matched_packets": matched, "matched_bytes": matched * 100, "cut_packets": cut,
            "cut_bytes": cut * 100, "excess_packets": 0, "flows": 1, "off_packets": 0,
            "lapsed_packets": lapsed, "stateless_packets": 0, "first_ns": matched, "last_ns": matched,
            "first_at": first, "last_at": first})
    }

    fn target(seen: u64) -> serde_json::Value {
        json!({"seen_packets": seen, "seen_bytes": seen * 100, "passed_packets": seen,
            "cut_packets": 0, "unparsed_packets": 0, "orphan_fragments": 0, "errors": 0,
            "table_full": 0, "lapsed_packets": 0, "too_many_rules": 0})
    }

    #[test]
    fn asked_and_realised_in_plain_columns() {
        let shown = super::super::output::bare(&text(Output::plain(), &sample(), false));
        let lines: Vec<&str> = shown.lines().collect();
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(
            words,
            [
                "web",
                "active",
                "drop-every",
                "10",
                "120",
                "(12.0",
                "kB)",
                "12",
                "(1.2",
                "kB)",
                "10.0%",
                "2",
                "30.0s",
                "ago",
                "30.0s",
                "ago"
            ]
        );
        assert!(lines[2].ends_with("never      never"), "{shown}");
        assert!(
            shown.contains("WARNING: n1/eth0: TCX program id 12 'x' runs before"),
            "{shown}"
        );
        assert!(!shown.contains('\u{1b}'));
    }

    #[test]
    fn expectations() {
        let mut stats = sample();
        let failures = unmet(&stats);
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].rule.as_deref(), Some("idle"));
        assert!(failures[0].reason.contains("TCX program"), "{failures:?}");
        stats.rules[1].ingress.matched_packets = 1;
        assert!(unmet(&stats).is_empty());
        stats.rules[0].egress.lapsed_packets = 4;
        assert!(unmet(&stats)[0].reason.contains("void"));
        stats.rules.clear();
        assert_eq!(unmet(&stats), [no_rules()]);
    }

    #[test]
    fn names_and_groups_select() {
        let args = |names: &[&str]| StatsArgs {
            names: names.iter().map(ToString::to_string).collect(),
            watch: None,
            expect_effect: false,
            tables: false,
        };
        let mut stats = sample();
        args(&["g"]).select(&mut stats).unwrap();
        assert_eq!(stats.rules.len(), 1);
        assert_eq!(stats.targets.len(), 1);
        let mut stats = sample();
        args(&["web"]).select(&mut stats).unwrap();
        assert!(stats.targets.is_empty());
        assert_eq!(
            args(&["nope"]).select(&mut stats).unwrap_err().exit,
            Exit::Name
        );
    }
}
