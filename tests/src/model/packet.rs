//! A packet as a hook sees it.

use std::fmt;

/// The shortest and the longest data that `BPF_PROG_TEST_RUN` takes, and the shortest IPv4 and IPv6
/// frames: `bpf_prog_test_run_skb` in `net/bpf/test_run.c` wants an IP header that it may look into.
const TEST_RUN_LENGTHS: std::ops::RangeInclusive<usize> = 14..=3700;
const TEST_RUN_SHORTEST_V4: usize = 34;
const TEST_RUN_SHORTEST_V6: usize = 54;

/// Where a packet meets the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Leaving through the target.
    Egress,
    /// Arriving at the target.
    Ingress,
}

impl Hook {
    /// Both hooks, in the order in which counters are kept.
    pub const ALL: [Self; 2] = [Self::Egress, Self::Ingress];

    /// Index into a pair of counters.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Egress => 0,
            Self::Ingress => 1,
        }
    }
}

/// What a packet of a target begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Link {
    /// An Ethernet header.
    Ethernet,
    /// Nothing: the network header comes first (tun, ppp).
    Raw,
}

/// One packet at one hook.
#[derive(Clone, PartialEq, Eq)]
pub struct Packet {
    /// Slot of the target.
    pub target: u16,
    /// Hook of the target.
    pub hook: Hook,
    /// `skb->protocol` in host order; only read on targets without a link header.
    pub protocol: u16,
    /// `gso_size` of a super-packet, 0 for a packet that is one wire packet.
    pub gso_size: u16,
    /// `gso_segs`, 0 where the kernel has not filled it in.
    pub gso_segs: u16,
    /// `skb->mark`.
    pub mark: u32,
    /// Everything from the link header on.
    pub bytes: Vec<u8>,
}

impl Packet {
    /// Whether `BPF_PROG_TEST_RUN` takes this packet and hands it to the program unchanged.
    #[must_use]
    pub fn fits_test_run(&self, link: Link) -> bool {
        if !TEST_RUN_LENGTHS.contains(&self.bytes.len()) {
            return false;
        }
        // The kernel reads an Ethernet header whatever the target is.
        let ethertype = u16::from_be_bytes([self.bytes[12], self.bytes[13]]);
        let long_enough = match ethertype {
            0x0800 => self.bytes.len() >= TEST_RUN_SHORTEST_V4,
            0x86dd => self.bytes.len() >= TEST_RUN_SHORTEST_V6,
            _ => true,
        };
        long_enough && (link == Link::Ethernet || ethertype == self.protocol)
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "target {} {:?} protocol {:#06x}",
            self.target, self.hook, self.protocol
        )?;
        write!(f, " gso_size {} gso_segs {}", self.gso_size, self.gso_segs)?;
        write!(f, " mark {:#x} len {} ", self.mark, self.bytes.len())?;
        self.bytes
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
