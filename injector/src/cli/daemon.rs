//! `injector daemon`: the daemon in the foreground.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{
    exit::{Exit, Failure},
    session::Session,
};
use crate::{
    client::SOCKET_NAME,
    daemon::{self, DEFAULT_LANES, DEFAULT_LEASE, DaemonError, DaemonOptions, LogFormat},
    dataplane::{LaneBounds, Sizes},
    protocol::{ErrorBody, ErrorCode},
    rules::text::{duration, size},
};

/// Form of the log on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Log {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

/// Run the daemon in the foreground
///
/// It ends on SIGTERM, SIGINT and `injector down`, and then leaves nothing behind on the host. Under
/// systemd use Type=notify.
#[derive(Debug, Args)]
pub(super) struct DaemonArgs {
    /// Rules stop acting so long after the daemon's last sign of life [default: 10s]
    #[arg(long, value_name = "TIME")]
    lease: Option<String>,
    /// Leave so long after the last rule has gone [default: stay]
    #[arg(long, value_name = "TIME")]
    idle_exit: Option<String>,
    /// What all rules leave alone: 10.0.0.0/8, 22, 10.0.0.1:22, tcp/22; may be given several times
    #[arg(long, value_name = "SPEC")]
    protect: Vec<String>,
    /// Form of the log on standard error
    #[arg(long, value_enum, default_value = "text")]
    log_format: Log,
    /// Memory that packets held in one namespace may take, such as 64mb or 1gb [default: 256mb]
    #[arg(long, value_name = "BYTES")]
    lane_memory: Option<String>,
    /// Packets that may be held in one namespace [default: 262144]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8_388_607))]
    lane_packets: Option<u32>,
    #[command(flatten)]
    tables: TableSizes,
}

/// How much fits into the kernel's tables; what is absent has a default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Args)]
#[command(next_help_heading = "Sizes of the kernel's tables, in entries")]
struct TableSizes {
    /// Flows that meet rules [default: 65536]
    #[arg(long = "table-flows", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    flows: Option<u32>,
    /// Flows that positional faults remember something of [default: 131072]
    #[arg(long = "table-states", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    states: Option<u32>,
    /// Flows that are remembered as meeting no rule [default: 65536]
    #[arg(long = "table-idle-flows", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    idle_flows: Option<u32>,
    /// Prefixes in the address sets of all rules [default: 1048576]
    #[arg(long = "table-prefixes", value_name = "N", value_parser = clap::value_parser!(u32).range(16..=16_777_216))]
    prefixes: Option<u32>,
    /// Ways in which address and port sets overlap [default: 8192]
    #[arg(long = "table-bitmaps", value_name = "N", value_parser = clap::value_parser!(u32).range(16..=1_048_576))]
    bitmaps: Option<u32>,
    /// Interfaces, and one [default: 256]
    #[arg(long = "table-targets", value_name = "N", value_parser = clap::value_parser!(u16).range(2..=16_384))]
    targets: Option<u16>,
    /// Fragmented packets under way [default: 8192]
    #[arg(long = "table-fragments", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    fragments: Option<u32>,
}

impl TableSizes {
    fn sizes(self) -> Sizes {
        let usual = Sizes::default();
        Sizes {
            flows: self.flows.unwrap_or(usual.flows),
            states: self.states.unwrap_or(usual.states),
            idle_flows: self.idle_flows.unwrap_or(usual.idle_flows),
            prefixes: self.prefixes.unwrap_or(usual.prefixes),
            bitmaps: self.bitmaps.unwrap_or(usual.bitmaps),
            targets: self.targets.unwrap_or(usual.targets),
            fragments: self.fragments.unwrap_or(usual.fragments),
        }
    }
}

impl DaemonArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<(), Failure> {
        let time = |flag: &str, text: &Option<String>| match text {
            None => Ok(None),
            Some(text) => duration::parse(text).map(Some).map_err(|problem| {
                Failure::usage(format!("{flag} '{text}': {}", problem.problem)).help(problem.help)
            }),
        };
        let endpoint = &session.endpoint;
        let socket = (endpoint.socket != endpoint.state_dir.join(SOCKET_NAME))
            .then(|| endpoint.socket.clone());
        let options = DaemonOptions {
            state_dir: endpoint.state_dir.clone(),
            socket,
            lease: time("--lease", &self.lease)?.unwrap_or(DEFAULT_LEASE),
            idle_exit: time("--idle-exit", &self.idle_exit)?.filter(|time| *time > Duration::ZERO),
            protect: self.protect.clone(),
            sizes: self.tables.sizes(),
            lanes: self.lane_bounds()?,
            log_format: match self.log_format {
                Log::Text => LogFormat::Text,
                Log::Json => LogFormat::Json,
            },
        };
        daemon::run(options, daemon::kernel::load).map_err(|error| failed(&error))
    }
}

impl DaemonArgs {
    fn lane_bounds(&self) -> Result<LaneBounds, Failure> {
        let bytes = match &self.lane_memory {
            None => DEFAULT_LANES.bytes,
            Some(text) => size::parse(text).map_err(|problem| {
                Failure::usage(format!("--lane-memory '{text}': {}", problem.problem))
                    .help(problem.help)
            })?,
        };
        Ok(LaneBounds {
            packets: self.lane_packets.unwrap_or(DEFAULT_LANES.packets),
            bytes,
        })
    }
}

fn failed(error: &DaemonError) -> Failure {
    let (message, hint) = match error {
        DaemonError::Option(body) => (body.message.clone(), body.hint.clone()),
        DaemonError::Plane(body) => (
            format!("cannot load the data plane: {}", body.message),
            body.hint.clone(),
        ),
        _ => (error.to_string(), None),
    };
    let mut failure = Failure::from(ErrorBody::new(error.code(), message));
    if error.code() == ErrorCode::Exists {
        // Not a rule's name but another daemon.
        failure.exit = Exit::Failed;
        "daemon_running".clone_into(&mut failure.code);
    }
    if let Some(source) = std::error::Error::source(error) {
        failure = failure.caused_by(source);
    }
    failure.help = hint.or_else(|| {
        (failure.exit == Exit::NotPermitted).then(|| "run this as root (sudo)".to_owned())
    });
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The help states them.
    #[test]
    fn usual_sizes_are_those_of_the_help() {
        let usual = Sizes::default();
        assert_eq!(TableSizes::default().sizes(), usual);
        assert_eq!(
            (usual.flows, usual.states, usual.idle_flows, usual.prefixes),
            (65_536, 131_072, 65_536, 1_048_576)
        );
        assert_eq!(
            (usual.bitmaps, usual.targets, usual.fragments),
            (8192, 256, 8192)
        );
        assert_eq!(DEFAULT_LEASE, Duration::from_secs(10));
        assert_eq!(
            (DEFAULT_LANES.packets, DEFAULT_LANES.bytes),
            (262_144, 256 << 20)
        );
    }
}
