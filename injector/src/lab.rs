//! `injector lab`: network namespaces joined by a bridge, to try things out.
//!
//! ```text
//!   injector-lab-n1        injector-lab-n2        injector-lab-n3
//!   eth0 10.77.0.1/24      eth0 10.77.0.2/24      eth0 10.77.0.3/24
//!        fd77::1/64             fd77::2/64             fd77::3/64
//!     │                      │                      │
//!     └─ p1 ──────────────── p2 ──────────────── p3 ┘
//!                   br0 in injector-lab-sw
//! ```
//!
//! Nothing of it is in the namespace of the host, so its addresses can collide with nothing there. Every
//! step is written down in lab.json before it is made; `down` removes what is written there, whole or
//! half made, and nothing else.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::{
    journal::{JournalError, boot_id},
    netlink::{self, NetlinkError},
    netns::{
        Netns, NetnsError, NetnsId, RUN_DIR,
        named::{self, Deleted, RunDir},
    },
};

/// Name of a lab that was given none.
pub const DEFAULT_NAME: &str = "lab";
/// Most nodes that a lab can have.
pub const MAX_NODES: u8 = 64;
/// Name by which the switch is addressed, as nodes are by "n1".
pub const SWITCH: &str = "sw";

const STATE_FILE: &str = "lab.json";
const BRIDGE: &str = "br0";
/// The longest lab name.
const MAX_NAME: usize = 32;
/// A link that was set up has its carrier within milliseconds.
const CARRIER: Duration = Duration::from_secs(10);

/// Why a lab could not be made, used or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// The number of nodes is out of range.
    #[error("cannot make a lab of {nodes} nodes: it takes 1 to {MAX_NODES}")]
    Nodes {
        /// The number asked for.
        nodes: u8,
    },
    /// The lab's name cannot be part of a namespace's.
    #[error(
        "'{name}' cannot be the name of a lab: use 1 to {MAX_NAME} lower-case letters, digits and \
         dashes, beginning with a letter"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// There is such a lab.
    #[error(
        "there is a lab '{name}' already, of {nodes} nodes{}; remove it (injector lab down --name \
         {name}) or give the new one another name",
        if *complete { "" } else { ", half made" }
    )]
    Exists {
        /// The lab.
        name: String,
        /// Its size.
        nodes: u8,
        /// Whether it was made completely.
        complete: bool,
    },
    /// There is no such lab.
    #[error("there is no lab '{name}'; make one with: injector lab up --name {name} --nodes 3")]
    NoSuchLab {
        /// The lab.
        name: String,
    },
    /// There is no such node.
    #[error("lab '{lab}' has no node '{node}'; it has n1 to n{nodes}, and sw, the switch")]
    NoSuchNode {
        /// The lab.
        lab: String,
        /// The node.
        node: String,
        /// Its size.
        nodes: u8,
    },
    /// Somebody else has a namespace of that name.
    #[error(
        "cannot make lab '{lab}': there is a network namespace {netns} that no lab of this state \
         directory made; delete it (ip netns del {netns}) or give the lab another name"
    )]
    NameTaken {
        /// The lab.
        lab: String,
        /// The namespace.
        netns: String,
    },
    /// A link did not come up.
    #[error("cannot make lab '{lab}': eth0 of {node} has no carrier after {} s", CARRIER.as_secs())]
    NoCarrier {
        /// The lab.
        lab: String,
        /// The node.
        node: String,
    },
    /// The lab's record cannot be used.
    #[error("cannot {attempt} {path}: {source}")]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another error in making it.
    #[error("lab '{lab}', {node}: {source}")]
    Netlink {
        /// The lab.
        lab: String,
        /// The namespace at work.
        node: String,
        /// What was refused.
        source: NetlinkError,
    },
    /// A namespace could not be made, entered or deleted.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The boot could not be told.
    #[error(transparent)]
    Boot(#[from] JournalError),
}

/// A node of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// "n1".
    pub name: String,
    /// Its namespace below /run/netns.
    pub netns: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The bridge port that leads to it, in the switch's namespace.
    pub port: String,
}

/// A lab that exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lab {
    /// Name of the lab.
    pub name: String,
    /// Namespace of the switch.
    pub switch: String,
    /// The bridge in it.
    pub bridge: String,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// Hosts file that names the nodes.
    pub hosts_file: PathBuf,
    /// What is not as it was made (a namespace that somebody deleted …); empty if all is well.
    pub problems: Vec<String>,
}

/// What `down` did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Removed {
    /// Namespaces that were deleted.
    pub namespaces: Vec<String>,
    /// What was left alone or still lives on, and why.
    pub notes: Vec<String>,
}

/// lab.json.
#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    boot_id: String,
    /// What we did to /run/netns; taken back with the last lab.
    run_dir: RunDir,
    labs: BTreeMap<String, Record>,
}

/// A lab in lab.json.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    nodes: u8,
    ipv6: bool,
    complete: bool,
    hosts_file: PathBuf,
    /// The switch, then the nodes.
    namespaces: Vec<Space>,
}

/// A namespace of a lab, its identity absent until it was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Space {
    node: String,
    netns: String,
    id: Option<NetnsId>,
}

impl Space {
    fn netns(&self) -> Option<Netns> {
        Some(Netns::recorded(
            self.id?,
            &Path::new(RUN_DIR).join(&self.netns),
        ))
    }
}

/// lab.json, locked against other commands.
struct Store {
    dir: PathBuf,
    state: State,
    _lock: Flock<File>,
}

impl Store {
    fn open(dir: &Path) -> Result<Self, LabError> {
        let failed = |source| LabError::File {
            attempt: "open the state directory",
            path: dir.to_owned(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed)?;
        let lock = Flock::lock(File::open(dir).map_err(failed)?, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed(errno.into()))?;
        Ok(Self {
            dir: dir.to_owned(),
            state: load(dir)?,
            _lock: lock,
        })
    }

    /// Writes lab.json, atomically and durably; removes it if there is nothing to say.
    fn save(&self) -> Result<(), LabError> {
        let path = self.dir.join(STATE_FILE);
        let failed = |source| LabError::File {
            attempt: "write",
            path: path.clone(),
            source,
        };
        if self.state.labs.is_empty() && self.state.run_dir == RunDir::default() {
            return remove_file(&path);
        }
        let mut text =
            serde_json::to_vec_pretty(&self.state).map_err(|error| failed(error.into()))?;
        text.push(b'\n');
        write_file(&path, &text, 0o600).map_err(failed)
    }
}

/// Reads lab.json. Labs of another boot have gone with it.
fn load(dir: &Path) -> Result<State, LabError> {
    let path = dir.join(STATE_FILE);
    let failed = |source| LabError::File {
        attempt: "read",
        path: path.clone(),
        source,
    };
    let boot_id = boot_id()?;
    let fresh = State {
        boot_id: boot_id.clone(),
        ..State::default()
    };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(fresh),
        Err(error) => return Err(failed(error)),
    };
    let state: State = serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
    Ok(if state.boot_id == boot_id {
        state
    } else {
        fresh
    })
}

/// Writes a file so that after a crash either the old or the new one is there.
fn write_file(path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&fresh)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<(), LabError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LabError::File {
            attempt: "remove",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// The IPv4 address of node `number`, from 1.
fn ipv4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number)
}

/// The addresses of node `number`, from 1, of every lab on this host.
#[must_use]
pub fn addresses(number: u8) -> Vec<IpAddr> {
    let mut addresses = vec![IpAddr::V4(ipv4(number))];
    if has_ipv6() {
        addresses.push(IpAddr::V6(ipv6(number)));
    }
    addresses
}

/// Whether there is IPv6. It is absent where the kernel has none, or was told so when it was booted.
fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").is_dir()
}

/// The name of the namespace of a node ("n1", or "sw" for the switch).
#[must_use]
pub fn netns_name(lab: &str, node: &str) -> String {
    format!("injector-{lab}-{node}")
}

/// The IPv6 address of node `number`, from 1: `fd77::N`, N written in decimal as in the IPv4 address.
fn ipv6(number: u8) -> Ipv6Addr {
    let digits = u16::from(number / 10) << 4 | u16::from(number % 10);
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, digits)
}

impl Record {
    fn new(dir: &Path, name: &str, nodes: u8) -> Self {
        let node_names = (1..=nodes).map(|number| format!("n{number}"));
        Self {
            nodes,
            ipv6: has_ipv6(),
            complete: false,
            hosts_file: dir.join(match name {
                DEFAULT_NAME => "hosts".to_owned(),
                name => format!("hosts.{name}"),
            }),
            namespaces: std::iter::once(SWITCH.to_owned())
                .chain(node_names)
                .map(|node| Space {
                    netns: netns_name(name, &node),
                    node,
                    id: None,
                })
                .collect(),
        }
    }

    fn addresses(&self, number: u8) -> Vec<IpAddr> {
        let mut addresses = vec![IpAddr::V4(ipv4(number))];
        if self.ipv6 {
            addresses.push(IpAddr::V6(ipv6(number)));
        }
        addresses
    }

    fn space(&self, node: &str) -> Option<&Space> {
        self.namespaces.iter().find(|space| space.node == node)
    }

    fn hosts(&self) -> String {
        (1..=self.nodes)
            .flat_map(|number| {
                self.addresses(number)
                    .into_iter()
                    .map(move |address| format!("{address} n{number}\n"))
            })
            .collect()
    }

    fn lab(&self, name: &str) -> Lab {
        let mut problems = Vec::new();
        if self.complete {
            for space in &self.namespaces {
                if !space.netns().is_some_and(|netns| netns.is_alive()) {
                    problems.push(format!("namespace {} has been deleted", space.netns));
                }
            }
        } else {
            problems.push("it was not made completely; remove it and make it again".to_owned());
        }
        let netns = |node: &str| {
            self.space(node)
                .map_or_else(String::new, |space| space.netns.clone())
        };
        Lab {
            name: name.to_owned(),
            switch: netns(SWITCH),
            bridge: BRIDGE.to_owned(),
            nodes: (1..=self.nodes)
                .map(|number| {
                    let node = format!("n{number}");
                    Node {
                        netns: netns(&node),
                        name: node,
                        addresses: self.addresses(number),
                        port: format!("p{number}"),
                    }
                })
                .collect(),
            hosts_file: self.hosts_file.clone(),
            problems,
        }
    }
}

/// Makes a lab of `nodes` nodes. If anything fails, what was made of it is removed again.
pub fn up(state_dir: &Path, name: &str, nodes: u8) -> Result<Lab, LabError> {
    check_name(name)?;
    if nodes == 0 || nodes > MAX_NODES {
        return Err(LabError::Nodes { nodes });
    }
    let mut store = Store::open(state_dir)?;
    if let Some(record) = store.state.labs.get(name) {
        return Err(LabError::Exists {
            name: name.to_owned(),
            nodes: record.nodes,
            complete: record.complete,
        });
    }
    let record = Record::new(&store.dir, name, nodes);
    for space in &record.namespaces {
        if fs::symlink_metadata(Path::new(RUN_DIR).join(&space.netns)).is_ok() {
            return Err(LabError::NameTaken {
                lab: name.to_owned(),
                netns: space.netns.clone(),
            });
        }
    }
    store.state.labs.insert(name.to_owned(), record);
    match build(&mut store, name) {
        Ok(lab) => Ok(lab),
        Err(error) => {
            // A namespace without an identity was not made: its name may be somebody else's by now.
            if let Some(record) = store.state.labs.get_mut(name) {
                record.namespaces.retain(|space| space.id.is_some());
            }
            // What cannot be removed now stays in lab.json for `down`; the first error says more.
            let _ = remove(&mut store, name);
            Err(error)
        }
    }
}

fn check_name(name: &str) -> Result<(), LabError> {
    let good = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if good {
        Ok(())
    } else {
        Err(LabError::BadName {
            name: name.to_owned(),
        })
    }
}

fn build(store: &mut Store, name: &str) -> Result<Lab, LabError> {
    let missing = RunDir::missing()?;
    store.state.run_dir.made |= missing.made;
    store.state.run_dir.bound |= missing.bound;
    store.save()?;
    missing.prepare()?;
    let count = store
        .state
        .labs
        .get(name)
        .map_or(0, |lab| lab.namespaces.len());
    for index in 0..count {
        let Some(space) = store
            .state
            .labs
            .get_mut(name)
            .and_then(|lab| lab.namespaces.get_mut(index))
        else {
            continue;
        };
        space.id = Some(named::create(&space.netns)?.id);
        store.save()?;
    }
    let Some(record) = store.state.labs.get_mut(name) else {
        return Err(no_such(name));
    };
    wire(record, name)?;
    let hosts = record.hosts();
    let hosts_file = record.hosts_file.clone();
    write_file(&hosts_file, hosts.as_bytes(), 0o644).map_err(|source| LabError::File {
        attempt: "write",
        path: hosts_file,
        source,
    })?;
    record.complete = true;
    let lab = record.lab(name);
    store.save()?;
    Ok(lab)
}

fn no_such(name: &str) -> LabError {
    LabError::NoSuchLab {
        name: name.to_owned(),
    }
}

/// Connects the nodes to the switch.
fn wire(record: &Record, name: &str) -> Result<(), LabError> {
    let at = |node: &str, work: &(dyn Fn() -> Result<(), NetlinkError> + Sync)| {
        let netns = record
            .space(node)
            .and_then(Space::netns)
            .ok_or_else(|| no_such(name))?;
        netns.run(work)?.map_err(|source| LabError::Netlink {
            lab: name.to_owned(),
            node: node.to_owned(),
            source,
        })
    };
    at(SWITCH, &|| {
        quiet_ipv6();
        set_up("lo")?;
        netlink::create_bridge(BRIDGE)?;
        set_up(BRIDGE)
    })?;
    for number in 1..=record.nodes {
        let (node, port) = (format!("n{number}"), format!("p{number}"));
        let path = Path::new(RUN_DIR).join(netns_name(name, &node));
        let target = File::open(&path).map_err(|source| NetnsError::Open { path, source })?;
        at(&node, &|| {
            quiet_ipv6();
            set_up("lo")
        })?;
        at(SWITCH, &|| {
            netlink::create_veth(&port, "eth0", Some(target.as_fd()))?;
            netlink::set_master(index(&port)?, index(BRIDGE)?)?;
            set_up(&port)
        })?;
        at(&node, &|| {
            let eth0 = index("eth0")?;
            netlink::set_up(eth0)?;
            for address in record.addresses(number) {
                let length = if address.is_ipv4() { 24 } else { 64 };
                if let Ok(net) = IpNet::new(address, length) {
                    netlink::add_address(eth0, net)?;
                }
            }
            Ok(())
        })?;
    }
    let deadline = Instant::now() + CARRIER;
    for number in 1..=record.nodes {
        let node = format!("n{number}");
        let running = || -> Result<bool, LabError> {
            let netns = record
                .space(&node)
                .and_then(Space::netns)
                .ok_or_else(|| no_such(name))?;
            let link = netns
                .run(|| netlink::link_by_name("eth0"))?
                .map_err(|source| LabError::Netlink {
                    lab: name.to_owned(),
                    node: node.clone(),
                    source,
                })?;
            Ok(link.is_some_and(|link| link.running))
        };
        while !running()? {
            if Instant::now() > deadline {
                return Err(LabError::NoCarrier {
                    lab: name.to_owned(),
                    node,
                });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

/// Lets IPv6 addresses of interfaces made from now on in this namespace be used at once. Where /proc/sys
/// cannot be written the lab works as well, a second or two later.
fn quiet_ipv6() {
    for (setting, value) in [
        ("disable_ipv6", "0"),
        ("accept_dad", "0"),
        ("dad_transmits", "0"),
    ] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/default/{setting}"), value);
    }
}

fn index(name: &str) -> Result<u32, NetlinkError> {
    netlink::link_by_name(name)?
        .map(|link| link.index)
        .ok_or_else(|| NetlinkError::Malformed {
            what: format!("find interface {name}"),
            detail: "it has vanished since it was made".to_owned(),
        })
}

fn set_up(name: &str) -> Result<(), NetlinkError> {
    netlink::set_up(index(name)?)
}

/// Removes a lab, whole or half made. `None`: there is none of that name.
pub fn down(state_dir: &Path, name: &str) -> Result<Option<Removed>, LabError> {
    check_name(name)?;
    if !state_dir.is_dir() {
        return Ok(None);
    }
    let mut store = Store::open(state_dir)?;
    remove(&mut store, name)
}

fn remove(store: &mut Store, name: &str) -> Result<Option<Removed>, LabError> {
    let Some(record) = store.state.labs.get(name).cloned() else {
        return Ok(None);
    };
    let mut removed = Removed::default();
    // The links first: a process that lives on in a namespace would keep them.
    if let Some(switch) = record.space(SWITCH).and_then(Space::netns) {
        // A switch that has gone has taken its links along.
        if let Ok(result) = switch.run(|| unwire(record.nodes)) {
            result.map_err(|source| LabError::Netlink {
                lab: name.to_owned(),
                node: SWITCH.to_owned(),
                source,
            })?;
        }
    }
    removed.notes.extend(remarks(&record));
    // Of those without an identity a crash can have left the first, and no other.
    let unsure = record
        .namespaces
        .iter()
        .position(|space| space.id.is_none());
    for (number, space) in record.namespaces.iter().enumerate() {
        if space.id.is_none() && unsure != Some(number) {
            continue;
        }
        let note = match named::delete(&space.netns, space.id.as_ref())? {
            Deleted::Deleted => {
                removed.namespaces.push(space.netns.clone());
                continue;
            }
            // It was never made.
            Deleted::Absent if space.id.is_none() => continue,
            Deleted::Absent => "had been deleted already".to_owned(),
            Deleted::Foreign => {
                "is another namespace than the lab's now, and was left alone".to_owned()
            }
        };
        removed
            .notes
            .push(format!("namespace {} {note}", space.netns));
    }
    remove_file(&record.hosts_file)?;
    store.state.labs.remove(name);
    if store.state.labs.is_empty() && store.state.run_dir != RunDir::default() {
        if !store.state.run_dir.restore()? {
            removed.notes.push(format!(
                "{RUN_DIR}, which the lab had made, was left in place: others use it now"
            ));
        }
        store.state.run_dir = RunDir::default();
    }
    store.save()?;
    Ok(Some(removed))
}

/// Deletes the switch's ports, and with them the nodes' interfaces, and the bridge.
fn unwire(nodes: u8) -> Result<(), NetlinkError> {
    let ports = (1..=nodes).map(|number| format!("p{number}"));
    for name in ports.chain([BRIDGE.to_owned()]) {
        if let Some(link) = netlink::link_by_name(&name)? {
            match netlink::delete_link(link.index) {
                Err(error) if !error.is_no_device() => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Processes that still live in the lab's namespaces, and in which.
fn living(record: &Record) -> impl Iterator<Item = (u32, &Space)> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse::<u32>().ok()?;
            let meta = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
            let home = record.namespaces.iter().find(|space| {
                space
                    .id
                    .is_some_and(|id| (id.dev, id.ino) == (meta.dev(), meta.ino()))
            })?;
            Some((pid, home))
        })
}

/// The same in words.
fn remarks(record: &Record) -> Vec<String> {
    living(record)
        .map(|(pid, space)| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!(
                "process {pid} ({}) still runs in {}, without a network now",
                name.trim(),
                space.node
            )
        })
        .collect()
}

/// Ids of the processes that live in the namespaces of a lab.
pub fn inhabitants(state_dir: &Path, name: &str) -> Result<Vec<u32>, LabError> {
    let state = load(state_dir)?;
    Ok(state
        .labs
        .get(name)
        .map(|record| living(record).map(|(pid, _)| pid).collect())
        .unwrap_or_default())
}

/// The labs that exist.
pub fn status(state_dir: &Path) -> Result<Vec<Lab>, LabError> {
    Ok(load(state_dir)?
        .labs
        .iter()
        .map(|(name, record)| record.lab(name))
        .collect())
}

/// The namespace of a node ("n1", or "sw" for the switch).
pub fn node(state_dir: &Path, name: &str, node: &str) -> Result<Netns, LabError> {
    let state = load(state_dir)?;
    let record = state.labs.get(name).ok_or_else(|| no_such(name))?;
    record
        .space(node)
        .ok_or_else(|| LabError::NoSuchNode {
            lab: name.to_owned(),
            node: node.to_owned(),
            nodes: record.nodes,
        })?
        .netns()
        .ok_or_else(|| no_such(name))
}

/// A command that will run in a node ("n1", or "sw" for the switch): the caller spawns or execs it.
pub fn command(
    state_dir: &Path,
    name: &str,
    node: &str,
    program: &str,
) -> Result<Command, LabError> {
    Ok(self::node(state_dir, name, node)?.command(program)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_like_node_numbers() {
        assert_eq!(ipv4(64).to_string(), "10.77.0.64");
        assert_eq!(ipv6(1).to_string(), "fd77::1");
        assert_eq!(ipv6(10).to_string(), "fd77::10");
        assert_eq!(ipv6(64).to_string(), "fd77::64");
    }

    #[test]
    fn hosts_files_name_every_node() {
        let dir = Path::new("/state");
        let mut record = Record::new(dir, "lab", 2);
        record.ipv6 = true;
        assert_eq!(
            record.hosts(),
            "10.77.0.1 n1\nfd77::1 n1\n10.77.0.2 n2\nfd77::2 n2\n"
        );
        assert_eq!(record.hosts_file, dir.join("hosts"));
        assert_eq!(Record::new(dir, "x", 2).hosts_file, dir.join("hosts.x"));
        let lab = record.lab("lab");
        assert_eq!(lab.nodes[1].netns, "injector-lab-n2");
        assert_eq!(lab.switch, "injector-lab-sw");
        assert_eq!(lab.problems.len(), 1);
    }

    #[test]
    fn wrong_input_is_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        for name in ["", "a/b", "Lab", "-a", "a b", &"x".repeat(33)] {
            assert!(
                matches!(up(&state, name, 3), Err(LabError::BadName { .. })),
                "{name}"
            );
        }
        for nodes in [0, 65] {
            assert!(matches!(
                up(&state, "lab", nodes),
                Err(LabError::Nodes { .. })
            ));
        }
        assert!(down(&state, "lab").unwrap().is_none());
        assert!(status(&state).unwrap().is_empty());
        assert!(matches!(
            command(&state, "lab", "n1", "true"),
            Err(LabError::NoSuchLab { .. })
        ));
        assert!(!state.exists());
    }

    #[test]
    fn labs_of_another_boot_have_gone() {
        let dir = tempfile::tempdir().unwrap();
        let state = State {
            boot_id: "another".to_owned(),
            run_dir: RunDir::default(),
            labs: BTreeMap::from([("lab".to_owned(), Record::new(dir.path(), "lab", 1))]),
        };
        fs::write(
            dir.path().join(STATE_FILE),
            serde_json::to_vec(&state).unwrap(),
        )
        .unwrap();
        assert!(status(dir.path()).unwrap().is_empty());
        fs::write(dir.path().join(STATE_FILE), "{").unwrap();
        assert!(status(dir.path()).is_err());
    }
}
