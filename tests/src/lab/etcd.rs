//! A three-node etcd on a lab's switch, a client host beside it, and the bookkeeping of writes: which
//! were acknowledged, and whether they are all there in the end.
//!
//! The servers are spoken to through their JSON gateway, from the client's own namespace.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    http,
    netns::Netns,
    process::Process,
    scratch::Scratch,
    services,
    topology::{Lab, Node},
    transcript::{Transcript, note},
    wait::{wait_for, wait_until},
};

/// etcd's heartbeat interval in the lab.
pub const HEARTBEAT: Duration = Duration::from_millis(100);
/// etcd's election timeout in the lab: a follower that hears nothing campaigns after one to two of it.
pub const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);
/// Members of the cluster: nodes 0 to 2 of the lab. Node 3 is the client.
pub const MEMBERS: usize = 3;
const CLIENT: usize = 3;
const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

/// The cluster and, where it was made for it, the lab that it runs in.
#[derive(Debug)]
pub struct Etcd {
    /// Three members, then the client.
    pub nodes: Vec<Node>,
    /// The namespace of the switch that they hang on.
    pub switch: Netns,
    servers: Vec<Process>,
    _state: Scratch,
    _lab: Option<Lab>,
}

/// What a member says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Which member answered.
    pub member: String,
    /// Whom it takes for the leader; `None`: nobody.
    pub leader: Option<String>,
    /// The raft term.
    pub term: u64,
    /// Entries applied.
    pub applied: u64,
}

/// Who leads, as the members see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    /// Index of the leader among the nodes.
    pub leader: usize,
    /// Its term.
    pub term: u64,
}

impl Etcd {
    /// Starts a cluster in a lab of its own and waits until it has a leader and accepts a write.
    pub fn start() -> Result<Self> {
        let lab = Lab::switched(MEMBERS + 1)?;
        let (nodes, switch) = (lab.nodes.clone(), lab.switch()?.clone());
        Self::start_on(nodes, switch, Some(lab))
    }

    /// Starts a cluster on hosts that are there: three members, then the client.
    pub fn start_on(nodes: Vec<Node>, switch: Netns, lab: Option<Lab>) -> Result<Self> {
        let state = Scratch::new()?;
        let binary = services::etcd()?;
        let url = |node: usize, port: u16| format!("http://{}", nodes[node].at(port));
        let cluster = (0..MEMBERS)
            .map(|n| format!("n{}={}", n + 1, url(n, PEER_PORT)))
            .collect::<Vec<_>>()
            .join(",");
        let mut servers = Vec::new();
        for (n, node) in nodes.iter().enumerate().take(MEMBERS) {
            let mut command = services::command(&node.ns, &binary)?;
            command
                .env("GOMAXPROCS", "2")
                .args(["--name", &format!("n{}", n + 1)])
                .arg("--data-dir")
                .arg(state.path().join(format!("n{}", n + 1)))
                .args(["--listen-peer-urls", &url(n, PEER_PORT)])
                .args(["--initial-advertise-peer-urls", &url(n, PEER_PORT)])
                .args([
                    "--listen-client-urls",
                    &format!("{},http://127.0.0.1:{CLIENT_PORT}", url(n, CLIENT_PORT)),
                ])
                .args(["--advertise-client-urls", &url(n, CLIENT_PORT)])
                .args(["--initial-cluster", &cluster])
                .args(["--initial-cluster-token", "lab"])
                .args(["--initial-cluster-state", "new"])
                .args(["--heartbeat-interval", &HEARTBEAT.as_millis().to_string()])
                .args([
                    "--election-timeout",
                    &ELECTION_TIMEOUT.as_millis().to_string(),
                ])
                .args(["--log-level", "warn"]);
            servers.push(Process::start(
                command,
                &state.path().join(format!("n{}.log", n + 1)),
            )?);
        }
        let etcd = Self {
            nodes,
            switch,
            servers,
            _state: state,
            _lab: lab,
        };
        let leadership = etcd
            .await_leader(&[0, 1, 2], Duration::from_mins(1))
            .with_context(|| etcd.logs())?;
        note(format!(
            "etcd: n{} leads in term {}",
            leadership.leader + 1,
            leadership.term
        ));
        wait_until("a first write", Duration::from_secs(20), || {
            etcd.put(leadership.leader, "first", "write", Duration::from_secs(5))
                .map(|_| true)
        })?;
        Ok(etcd)
    }

    /// The client's namespace.
    #[must_use]
    pub fn client(&self) -> &Netns {
        &self.nodes[CLIENT].ns
    }

    /// The addresses of a member's client port.
    #[must_use]
    pub fn endpoint(&self, node: usize) -> SocketAddr {
        self.nodes[node].at(CLIENT_PORT)
    }

    fn post(
        &self,
        node: usize,
        path: &str,
        body: &Value,
        within: Duration,
    ) -> Result<http::Answer> {
        http::post(self.client(), self.endpoint(node), path, body, within)
    }

    /// What a member says about itself.
    pub fn status(&self, node: usize) -> Result<Status> {
        let answer = self.post(
            node,
            "/v3/maintenance/status",
            &json!({}),
            Duration::from_secs(2),
        )?;
        ensure!(answer.status == 200, "status of n{}: {answer:?}", node + 1);
        Ok(Status {
            member: text(&answer.body["header"]["member_id"]),
            leader: match text(&answer.body["leader"]) {
                nobody if nobody.is_empty() || nobody == "0" => None,
                leader => Some(leader),
            },
            term: number(&answer.body["raftTerm"]),
            applied: number(&answer.body["raftAppliedIndex"]),
        })
    }

    /// Waits until the members named agree on a leader that is one of them.
    pub fn await_leader(&self, among: &[usize], within: Duration) -> Result<Leadership> {
        self.await_leader_after(0, among, within)
    }

    /// The same, in a later term than `term`. (What a member says about its term may lag behind what it
    /// says about its leader.)
    pub fn await_leader_after(
        &self,
        term: u64,
        among: &[usize],
        within: Duration,
    ) -> Result<Leadership> {
        wait_for(
            &format!("members {among:?} agree on a leader among them"),
            within,
            || {
                let seen = among
                    .iter()
                    .map(|&node| Ok((node, self.status(node)?)))
                    .collect::<Result<Vec<_>>>()?;
                let (_, first) = &seen[0];
                let agreed = seen
                    .iter()
                    .all(|(_, s)| s.leader == first.leader && s.term == first.term);
                let leader = seen
                    .iter()
                    .find(|(_, s)| Some(&s.member) == first.leader.as_ref());
                Ok(match leader {
                    Some((node, status)) if agreed && status.term > term => Some(Leadership {
                        leader: *node,
                        term: status.term,
                    }),
                    _ => None,
                })
            },
        )
    }

    /// Writes a key through one member. Returns the revision of an acknowledged write; an error says
    /// how it was refused, or that no answer came in time.
    pub fn put(&self, node: usize, key: &str, value: &str, within: Duration) -> Result<u64> {
        put(self.client(), self.endpoint(node), key, value, within)
    }

    /// Reads a key through one member, linearizably or from the member's own copy.
    pub fn get(
        &self,
        node: usize,
        key: &str,
        serializable: bool,
        within: Duration,
    ) -> Result<Option<String>> {
        let answer = self.post(
            node,
            "/v3/kv/range",
            &json!({"key": base64(key.as_bytes()), "serializable": serializable}),
            within,
        )?;
        ensure!(answer.status == 200, "refused: {}", answer.text.trim());
        answer.body["kvs"][0]["value"]
            .as_str()
            .map(|value| {
                let bytes = unbase64(value)?;
                String::from_utf8(bytes).context("a value that is no text")
            })
            .transpose()
    }

    /// All keys below a prefix with their values, from a member's own copy.
    pub fn all(&self, node: usize, prefix: &str) -> Result<BTreeMap<String, String>> {
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let answer = self.post(
            node,
            "/v3/kv/range",
            &json!({
                "key": base64(prefix.as_bytes()),
                "range_end": base64(&end),
                "serializable": true,
            }),
            Duration::from_secs(10),
        )?;
        ensure!(answer.status == 200, "refused: {}", answer.text.trim());
        let Some(pairs) = answer.body["kvs"].as_array() else {
            return Ok(BTreeMap::new());
        };
        pairs
            .iter()
            .map(|pair| {
                let part = |name: &str| -> Result<String> {
                    let coded = pair[name].as_str().unwrap_or_default();
                    Ok(String::from_utf8_lossy(&unbase64(coded)?).into_owned())
                };
                Ok((part("key")?, part("value")?))
            })
            .collect()
    }

    /// Waits until all members have the same revision, and the same hash of everything in it; returns
    /// revision and hash.
    pub fn await_agreement(&self, within: Duration) -> Result<(String, String)> {
        wait_for("all members hold the same data", within, || {
            let mut found = Vec::new();
            for node in 0..MEMBERS {
                let answer = self.post(
                    node,
                    "/v3/maintenance/hash",
                    &json!({}),
                    Duration::from_secs(3),
                )?;
                ensure!(answer.status == 200, "hash of n{}: {answer:?}", node + 1);
                found.push((
                    text(&answer.body["header"]["revision"]),
                    text(&answer.body["hash"]),
                ));
            }
            if found.iter().all(|one| *one == found[0]) && !found[0].1.is_empty() {
                return Ok(Some(found[0].clone()));
            }
            bail!("revision and hash of n1, n2, n3: {found:?}");
        })
    }

    /// The last lines of every member's log.
    #[must_use]
    pub fn logs(&self) -> String {
        (1..)
            .zip(&self.servers)
            .map(|(n, server)| format!("--- etcd n{n} ---\n{}", server.log_tail()))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for server in &self.servers {
            // Its data goes with it, so there is nothing to shut down in good order.
            let _sent = server.signal(Signal::SIGKILL);
        }
    }
}

/// Writes a key through one endpoint; see [`Etcd::put`].
pub fn put(
    client: &Netns,
    endpoint: SocketAddr,
    key: &str,
    value: &str,
    within: Duration,
) -> Result<u64> {
    let answer = http::post(
        client,
        endpoint,
        "/v3/kv/put",
        &json!({"key": base64(key.as_bytes()), "value": base64(value.as_bytes())}),
        within,
    )?;
    ensure!(answer.status == 200, "refused: {}", answer.text.trim());
    let revision = number(&answer.body["header"]["revision"]);
    ensure!(
        revision > 0,
        "an answer without a revision: {}",
        answer.text
    );
    Ok(revision)
}

/// One write that a client tried.
#[derive(Debug, Clone)]
pub struct Write {
    /// Its key; the value is the same text.
    pub key: String,
    /// Through which member.
    pub node: usize,
    /// When it began and ended.
    pub time: (Instant, Instant),
    /// The revision if it was acknowledged, else how it was refused.
    pub outcome: Result<u64, String>,
}

/// Clients that write all the time, one through each member, and remember what was acknowledged.
#[derive(Debug)]
pub struct Writers {
    stop: Arc<AtomicBool>,
    writes: Arc<Mutex<Vec<Write>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Writers {
    /// Starts writing keys that begin with `prefix`. A write that is not answered within a second
    /// counts as refused (it may be there nevertheless, as with any service).
    #[must_use]
    pub fn start(etcd: &Etcd, prefix: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(Mutex::new(Vec::new()));
        let threads = (0..MEMBERS)
            .map(|node| {
                let (stop, writes) = (Arc::clone(&stop), Arc::clone(&writes));
                let (client, endpoint) = (etcd.client().clone(), etcd.endpoint(node));
                let (prefix, transcript) = (prefix.to_owned(), Transcript::current());
                thread::spawn(move || {
                    transcript.adopt();
                    for count in 0_u64.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let key = format!("{prefix}n{}/{count:06}", node + 1);
                        let began = Instant::now();
                        let outcome = put(&client, endpoint, &key, &key, Duration::from_secs(1))
                            .map_err(|error| format!("{error:#}"));
                        let refused = outcome.is_err();
                        writes
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(Write {
                                key,
                                node,
                                time: (began, Instant::now()),
                                outcome,
                            });
                        // The pace of a client, not a wait for anything.
                        thread::park_timeout(Duration::from_millis(if refused { 100 } else { 20 }));
                    }
                })
            })
            .collect();
        Self {
            stop,
            writes,
            threads: Mutex::new(threads),
        }
    }

    /// All writes that have ended so far.
    #[must_use]
    pub fn so_far(&self) -> Vec<Write> {
        self.writes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until a write through `node`, begun after `since`, was acknowledged.
    pub fn await_acknowledged(&self, node: usize, since: Instant, within: Duration) -> Result<()> {
        wait_until(
            &format!("a write through n{} is acknowledged", node + 1),
            within,
            || {
                Ok(self
                    .so_far()
                    .iter()
                    .any(|w| w.node == node && w.time.0 >= since && w.outcome.is_ok()))
            },
        )
    }

    /// Stops writing and returns all writes.
    #[must_use]
    pub fn finish(&self) -> Vec<Write> {
        self.halt();
        self.so_far()
    }

    fn halt(&self) {
        self.stop.store(true, Ordering::Relaxed);
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            thread.thread().unpark();
            // A writer that panicked has said so; its writes up to then count.
            let _ended = thread.join();
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.halt();
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn number(value: &Value) -> u64 {
    text(value).parse().unwrap_or(0)
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base 64 (RFC 4648), as the JSON gateway wants bytes.
fn base64(bytes: &[u8]) -> String {
    let mut coded = String::new();
    for chunk in bytes.chunks(3) {
        let group = [
            chunk[0],
            chunk.get(1).copied().unwrap_or(0),
            chunk.get(2).copied().unwrap_or(0),
        ];
        let bits = u32::from_be_bytes([0, group[0], group[1], group[2]]);
        for place in 0..4 {
            let index = (bits >> (18 - 6 * place)) & 63;
            coded.push(if place <= chunk.len() {
                char::from(ALPHABET[index as usize])
            } else {
                '='
            });
        }
    }
    coded
}

fn unbase64(coded: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0_u32, 0);
    for letter in coded.bytes().filter(|letter| *letter != b'=') {
        let index = ALPHABET
            .iter()
            .position(|known| *known == letter)
            .with_context(|| format!("{coded:?} is not base 64"))?;
        bits = (bits << 6) | u32::try_from(index)?;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(((bits >> held) & 0xff) as u8);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::{base64, unbase64};

    #[test]
    fn base64_goes_there_and_back() -> anyhow::Result<()> {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
            assert_eq!(unbase64(coded)?, plain.as_bytes());
        }
        Ok(())
    }
}
