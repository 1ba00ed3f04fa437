//! `injector protect`: what rules leave alone.

use clap::Args;
use serde_json::json;

use super::{exit::Failure, report, session::Session};
use crate::protocol::{Call, ProtectArgs as Request, ProtectResult};

/// Show or change what rules leave alone
#[derive(Debug, Args)]
#[command(long_about = "Show or change what rules leave alone\n\n\
    An entry is an address, a CIDR, a port or both: 10.0.0.1, 10.0.0.0/8, :22, 10.0.0.1:22, \
    [fd00::1]:22; with a protocol where that matters: tcp/:22, udp/10.0.0.0/8:53.")]
pub(super) struct ProtectArgs {
    /// Entries to add
    #[arg(value_name = "SPEC")]
    add: Vec<String>,
    /// Entries to take away
    #[arg(long, value_name = "SPEC", num_args = 1..)]
    remove: Vec<String>,
}

impl ProtectArgs {
    /// Runs the command.
    pub(super) fn run(&self, session: &Session) -> Result<(), Failure> {
        let request = Request {
            add: self.add.iter().map(|text| entry(text)).collect(),
            remove: self.remove.iter().map(|text| entry(text)).collect(),
        };
        let changes = !request.add.is_empty() || !request.remove.is_empty();
        let mut connected = if changes {
            session.connect_or_start()?
        } else {
            let Some(connected) = session.connect()? else {
                return session
                    .output
                    .either(&json!({ "protected": [], "daemon": null }), || {
                        "no daemon is running, so there are no rules and nothing is protected\n"
                            .to_owned()
                    });
            };
            connected
        };
        let result: ProtectResult = connected.client.call(Call::Protect(request))?;
        session.output.either(&result, || {
            if result.protected.is_empty() {
                "nothing is protected, apart from the control connections of whoever adds rules\n"
                    .to_owned()
            } else {
                report::protected(&result.protected)
            }
        })
    }
}

/// A port alone is written `:22` here and `22` in the protocol.
fn entry(text: &str) -> String {
    match text.rsplit_once('/') {
        Some((protocol, rest)) => match rest.strip_prefix(':') {
            Some(port) => format!("{protocol}/{port}"),
            None => text.to_owned(),
        },
        None => match text.strip_prefix(':') {
            // But `::1` is an address.
            Some(port) if !port.starts_with(':') => port.to_owned(),
            _ => text.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::entry;

    #[test]
    fn ports_alone() {
        for (text, sent) in [
            (":22", "22"),
            ("22", "22"),
            ("tcp/:22", "tcp/22"),
            ("10.0.0.1:22", "10.0.0.1:22"),
            ("udp/10.0.0.0/8:53", "udp/10.0.0.0/8:53"),
            ("::1", "::1"),
            ("[::1]:22", "[::1]:22"),
            ("fd00::/8", "fd00::/8"),
        ] {
            assert_eq!(entry(text), sent);
        }
    }
}
