//! A Redis server and its replica on the two hosts of a pair.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead, BufReader, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{
    netns::Netns, process::Process, scratch::Scratch, services, topology::Lab, wait::wait_until,
};

const PORT: u16 = 6379;

/// The two servers and their lab: the master on `a`, the replica on `b`.
#[derive(Debug)]
pub struct Redis {
    /// The hosts.
    pub lab: Lab,
    servers: Vec<Process>,
    _state: Scratch,
}

/// Which of the two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Node `a`.
    Master,
    /// Node `b`.
    Replica,
}

impl Redis {
    /// Starts both, each with its own `repl-timeout` in seconds, and waits until they are in step.
    pub fn start(master_timeout: u32, replica_timeout: u32) -> Result<Self> {
        let lab = Lab::pair()?;
        let state = Scratch::new()?;
        let mut servers = Vec::new();
        let binary = services::redis_server()?;
        for (node, timeout, replica) in [
            (lab.a(), master_timeout, false),
            (lab.b(), replica_timeout, true),
        ] {
            let folder = state
                .path()
                .join(if replica { "replica" } else { "master" });
            std::fs::create_dir(&folder)?;
            let mut command = services::command(&node.ns, &binary)?;
            command
                .args(["--port", &PORT.to_string()])
                .args(["--bind", "0.0.0.0", "--protected-mode", "no"])
                .arg("--dir")
                .arg(&folder)
                .args(["--save", "", "--appendonly", "no", "--daemonize", "no"])
                .args(["--repl-diskless-sync-delay", "0"])
                .args(["--repl-ping-replica-period", "1"])
                .args(["--repl-timeout", &timeout.to_string()]);
            if replica {
                command.args(["--replicaof", &lab.a().v4.to_string(), &PORT.to_string()]);
            }
            servers.push(Process::start(command, &folder.join("log"))?);
        }
        let redis = Self {
            lab,
            servers,
            _state: state,
        };
        redis
            .await_in_step(Duration::from_secs(30))
            .with_context(|| redis.logs())?;
        Ok(redis)
    }

    fn host(&self, role: Role) -> &Netns {
        match role {
            Role::Master => &self.lab.a().ns,
            Role::Replica => &self.lab.b().ns,
        }
    }

    /// Runs a command on one of the servers, over its own loopback.
    pub fn command(&self, role: Role, words: &[&str]) -> Result<Reply> {
        self.session(role)?.command(words)
    }

    /// A client of one of the servers, over its own loopback. `WAIT` is about the writes of its own
    /// session.
    pub fn session(&self, role: Role) -> Result<Session> {
        let stream = self.host(role).enter(|| {
            TcpStream::connect(("127.0.0.1", PORT)).with_context(|| format!("connect to {role:?}"))
        })?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Session {
            stream: BufReader::new(stream),
        })
    }

    /// `INFO replication` of one of the servers.
    pub fn replication(&self, role: Role) -> Result<BTreeMap<String, String>> {
        let Reply::Text(text) = self.command(role, &["INFO", "replication"])? else {
            bail!("INFO did not answer with text");
        };
        Ok(text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect())
    }

    /// Whether the replica thinks that it has a master.
    pub fn replica_is_linked(&self) -> Result<bool> {
        Ok(self
            .replication(Role::Replica)?
            .get("master_link_status")
            .is_some_and(|status| status == "up"))
    }

    /// Whether the master thinks that it has a replica.
    pub fn master_has_replica(&self) -> Result<bool> {
        Ok(self
            .replication(Role::Master)?
            .get("connected_slaves")
            .is_some_and(|count| count == "1"))
    }

    /// Waits until both see each other and the replica has all that the master wrote.
    pub fn await_in_step(&self, within: Duration) -> Result<()> {
        wait_until("master and replica are in step", within, || {
            let (master, replica) = (
                self.replication(Role::Master)?,
                self.replication(Role::Replica)?,
            );
            let in_step = self.replica_is_linked()?
                && self.master_has_replica()?
                && master.get("master_repl_offset") == replica.get("slave_repl_offset");
            if !in_step {
                bail!("master {master:?}\nreplica {replica:?}");
            }
            Ok(true)
        })
    }

    /// The last lines of both logs.
    #[must_use]
    pub fn logs(&self) -> String {
        self.servers
            .iter()
            .map(Process::log_tail)
            .collect::<Vec<_>>()
            .join("\n--- replica ---\n")
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        for server in &self.servers {
            // Nothing that it holds is kept.
            let _sent = server.signal(Signal::SIGKILL);
        }
    }
}

/// A client's connection.
#[derive(Debug)]
pub struct Session {
    stream: BufReader<TcpStream>,
}

impl Session {
    /// Runs a command.
    pub fn command(&mut self, words: &[&str]) -> Result<Reply> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            write!(request, "${}\r\n{word}\r\n", word.len())?;
        }
        self.stream.get_mut().write_all(request.as_bytes())?;
        read_reply(&mut self.stream).with_context(|| words.join(" "))
    }
}

/// An answer of a Redis server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A string.
    Text(String),
    /// A number.
    Number(i64),
    /// No such thing.
    Nil,
}

fn read_reply(stream: &mut impl BufRead) -> Result<Reply> {
    let mut line = String::new();
    stream.read_line(&mut line).context("reading a reply")?;
    let line = line.trim_end();
    let Some((kind, rest)) = line.split_at_checked(1) else {
        bail!("an empty reply");
    };
    Ok(match kind {
        "+" => Reply::Text(rest.to_owned()),
        ":" => Reply::Number(rest.parse()?),
        "$" if rest == "-1" => Reply::Nil,
        "$" => {
            let mut bytes = vec![0; rest.parse::<usize>()? + 2];
            stream.read_exact(&mut bytes).context("reading a string")?;
            bytes.truncate(bytes.len() - 2);
            Reply::Text(String::from_utf8(bytes)?)
        }
        _ => bail!("the server said {line:?}"),
    })
}
