//! Labs: namespaces joined by a veth pair or by a bridge in a namespace of its own, deleted with their
//! guard.
//!
//! Every link is made inside the lab's namespaces, so nothing ever appears in the host's own one.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{
    PREFIX, command, counters::Transmitted, netns::Netns, transcript::note, wait::wait_until,
};

/// One host of a lab. Its interface is `eth0`.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its namespace.
    pub ns: Netns,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// The hardware address of `eth0`.
    pub mac: [u8; 6],
}

impl Node {
    /// Makes the clsact of `eth0` beforehand, so that the injector finds one. Making or deleting one takes
    /// the interface's queues out of service for a moment, in which the kernel drops what is sent
    /// (`qdisc_graft`, `net/sched/sch_api.c`): where a test accounts for every packet, that must not happen.
    pub fn make_clsact(&self) -> Result<()> {
        self.ns.tool("tc qdisc add dev eth0 clsact").map(drop)
    }

    /// Packets that `eth0` could not hand over: the machine's backlog, which others fill too, had no room for them.
    pub fn dropped(&self) -> Result<u64> {
        Ok(Transmitted::by(&self.ns, "eth0")?.dropped)
    }

    /// A socket address of the node.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// An IPv6 socket address of the node.
    #[must_use]
    pub fn at6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    /// Both addresses.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The namespace's name.
    #[must_use]
    pub fn netns(&self) -> &str {
        self.ns.name()
    }
}

/// A lab: its nodes and, where they hang on a bridge, the switch.
#[derive(Debug)]
pub struct Lab {
    /// The hosts, in the order asked for.
    pub nodes: Vec<Node>,
    /// The namespace with the bridge `br0` and the ports `p1`, `p2` …
    pub switch: Option<Netns>,
    spaces: Vec<Netns>,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

fn fresh_name() -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}-{number}", std::process::id())
}

impl Lab {
    /// Two hosts, `a` and `b`, joined by a veth pair, with fixed neighbour entries so that nothing but
    /// what a test sends crosses it.
    pub fn pair() -> Result<Self> {
        Self::pair_with_mtu(1500)
    }

    /// A pair of which what arrives is taken in the order in which it was handed over
    /// ([`Netns::receive_on_one_cpu`]).
    pub fn steady_pair() -> Result<Self> {
        Self::steady_pair_with_mtu(1500)
    }

    /// The same with another MTU.
    pub fn steady_pair_with_mtu(mtu: u32) -> Result<Self> {
        let lab = Self::pair_with_mtu(mtu)?;
        for node in &lab.nodes {
            node.ns.receive_on_one_cpu("eth0")?;
        }
        Ok(lab)
    }

    /// A pair with another MTU.
    pub fn pair_with_mtu(mtu: u32) -> Result<Self> {
        let lab = Self::with_nodes(2)?;
        let (a, b) = (lab.nodes[0].clone(), lab.nodes[1].clone());
        command::tool(&format!(
            "ip -n {} link add eth0 mtu {mtu} address {} type veth peer name eth0 mtu {mtu} \
             address {} netns {}",
            a.netns(),
            mac_text(a.mac),
            mac_text(b.mac),
            b.netns()
        ))?;
        lab.configure_nodes(true)?;
        Ok(lab)
    }

    /// `count` hosts on a bridge.
    pub fn switched(count: usize) -> Result<Self> {
        let mut lab = Self::with_nodes(count)?;
        let switch = lab.add_space("sw")?;
        let mut lines = vec![
            "link add br0 type bridge".to_owned(),
            "link set br0 up".to_owned(),
        ];
        for (number, node) in (1..).zip(&lab.nodes) {
            lines.push(format!(
                "link add p{number} type veth peer name eth0 address {} netns {}",
                mac_text(node.mac),
                node.netns()
            ));
            lines.push(format!("link set p{number} master br0 up"));
        }
        switch.ip(&lines)?;
        lab.switch = Some(switch);
        lab.configure_nodes(false)?;
        Ok(lab)
    }

    fn with_nodes(count: usize) -> Result<Self> {
        let mut lab = Self {
            nodes: Vec::new(),
            switch: None,
            spaces: Vec::new(),
        };
        let name = fresh_name();
        let numbers: Vec<u8> = (1..=u8::try_from(count).context("too many nodes")?).collect();
        lab.spaces = numbers
            .iter()
            .map(|number| Netns::named(&format!("{name}-n{number}")))
            .collect();
        Netns::create_all(&lab.spaces)?;
        for (number, ns) in numbers.into_iter().zip(&lab.spaces) {
            lab.nodes.push(Node {
                ns: ns.clone(),
                v4: Ipv4Addr::new(10, 88, 0, number),
                v6: Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, u16::from(number)),
                mac: [2, 0x88, 0, 0, 0, number],
            });
        }
        Ok(lab)
    }

    /// Another namespace that goes with the lab.
    pub fn add_space(&mut self, suffix: &str) -> Result<Netns> {
        let space = Netns::named(&format!("{}-{suffix}", fresh_name()));
        self.spaces.push(space.clone());
        Netns::create_all(std::slice::from_ref(&space))?;
        Ok(space)
    }

    /// Gives the nodes their addresses, and, where that is wanted, each a fixed entry for every other one, and waits
    /// until they are at rest.
    fn configure_nodes(&self, fixed_neighbours: bool) -> Result<()> {
        for node in &self.nodes {
            node.ns.enter(|| {
                for (name, value) in [
                    ("net/ipv6/conf/all/accept_dad", "0"),
                    ("net/ipv6/conf/default/accept_dad", "0"),
                    ("net/ipv6/conf/eth0/accept_dad", "0"),
                    ("net/ipv6/conf/eth0/router_solicitations", "0"),
                    ("net/ipv6/conf/eth0/addr_gen_mode", "1"),
                    ("net/ipv6/conf/eth0/mldv2_unsolicited_report_interval", "1"),
                ] {
                    std::fs::write(format!("/proc/sys/{name}"), value)
                        .with_context(|| format!("setting {name}"))?;
                }
                Ok(())
            })?;
            let mut lines = vec![
                "link set lo up".to_owned(),
                "link set eth0 up".to_owned(),
                format!("addr add {}/24 dev eth0", node.v4),
                format!("addr add {}/64 dev eth0 nodad", node.v6),
            ];
            if fixed_neighbours {
                for other in self.nodes.iter().filter(|other| other.v4 != node.v4) {
                    let mac = mac_text(other.mac);
                    lines.extend(other.addresses().map(|address| {
                        format!("neigh replace {address} lladdr {mac} nud permanent dev eth0")
                    }));
                }
            }
            node.ns.ip(&lines)?;
        }
        for space in &self.spaces {
            await_carrier(space)?;
        }
        for node in &self.nodes {
            await_multicast_reports(&node.ns)?;
        }
        note(format!(
            "lab of {}",
            self.spaces
                .iter()
                .map(Netns::name)
                .collect::<Vec<_>>()
                .join(", ")
        ));
        Ok(())
    }

    /// Forgets the fixed neighbour entries, so that ARP and neighbour discovery are at work.
    pub fn free_neighbours(&self) -> Result<()> {
        for node in &self.nodes {
            node.ns.tool("ip neigh flush all nud permanent")?;
            node.ns.tool("ip -6 neigh flush all nud permanent")?;
        }
        Ok(())
    }

    /// The first host.
    #[must_use]
    pub fn a(&self) -> &Node {
        &self.nodes[0]
    }

    /// The second host.
    #[must_use]
    pub fn b(&self) -> &Node {
        &self.nodes[1]
    }

    /// The switch's namespace.
    pub fn switch(&self) -> Result<&Netns> {
        self.switch.as_ref().context("this lab has no switch")
    }

    /// All namespaces of the lab.
    #[must_use]
    pub fn spaces(&self) -> &[Netns] {
        &self.spaces
    }
}

/// Waits until every veth of a namespace has its carrier and a queue: until then the kernel drops what is
/// sent, and it looks at carriers up to a second later (`linkwatch_schedule_work`, `net/core/link_watch.c`).
fn await_carrier(space: &Netns) -> Result<()> {
    wait_until("all links have a carrier", Duration::from_secs(20), || {
        let links = space.tool("ip -o link show type veth")?.stdout;
        Ok(links
            .lines()
            .all(|link| link.contains("state UP") && !link.contains("qdisc noop ")))
    })
}

/// Waits until a host has told everybody of the multicast groups of its addresses, which it does by itself and twice
/// (RFC 3810, section 9.1). A test that counts everything that crosses a link would count these too; the
/// sysctl of the interval brings the second close to the first, instead of up to a second later.
fn await_multicast_reports(host: &Netns) -> Result<()> {
    let latest = Instant::now() + Duration::from_secs(2);
    let mut before = 0;
    loop {
        let reports = host.enter(multicast_reports)?;
        if (reports >= 2 && reports == before) || Instant::now() > latest {
            return Ok(());
        }
        before = reports;
        thread::sleep(Duration::from_millis(20));
    }
}

/// How many `MLDv2` reports (ICMPv6 type 143) the namespace of the calling thread has sent.
fn multicast_reports() -> Result<u64> {
    let counters = std::fs::read_to_string("/proc/thread-self/net/snmp6").context("snmp6")?;
    counters
        .lines()
        .find_map(|line| line.strip_prefix("Icmp6OutType143"))
        .map_or(Ok(0), |count| {
            count.trim().parse().context("a count of ICMPv6 messages")
        })
}

/// A hardware address as text.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Drop for Lab {
    fn drop(&mut self) {
        // What the kernel itself dropped explains a failure; shown only then.
        for node in &self.nodes {
            let links = node.ns.enter(|| {
                std::fs::read_to_string("/proc/thread-self/net/dev").context("counters of links")
            });
            if let Ok(links) = links {
                note(&links);
            }
        }
        // A test may have deleted one itself.
        let there: Vec<Netns> = self
            .spaces
            .iter()
            .filter(|space| space.path().exists())
            .cloned()
            .collect();
        if !there.is_empty()
            && let Err(error) = Netns::delete_all(&there)
        {
            let names: Vec<&str> = there.iter().map(Netns::name).collect();
            eprintln!("could not delete {}: {error:#}", names.join(", "));
        }
    }
}
