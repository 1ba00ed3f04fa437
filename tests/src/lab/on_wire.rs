//! TCP as it is seen on the wire, over IPv4: which of the packets that a socket sent came by, in their order.
//!
//! A connection numbers what it sends in the identification field, one number to a wire packet
//! (`ip_select_ident_segs`, `include/net/ip.h`; `inet_gso_segment`, `net/ipv4/af_inet.c`, 6.1), retransmissions
//! too. So a gap in these numbers is a burst of losses, of exactly as many packets.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    mem::size_of,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{
    frame::ETH_IPV4,
    netns::Netns,
    packet_socket::{BUFFER, open, set_option},
};

/// Headers of Ethernet, IPv4 and TCP, with their options.
const HEADERS: usize = 14 + 60 + 60;
const ETHERNET: usize = 14;
const TCP: u8 = 6;
const FIN: u8 = 1;
const SYN: u8 = 2;
/// A capture ends when nothing has come for so long: what a sender has sent twice may be on its way when all else has
/// arrived, or in the backlog of another CPU.
const QUIET: Duration = Duration::from_millis(250);
/// The lab's MTU where a test asks for nothing else.
const MTU: usize = 1500;

/// What came by of one connection's packets in one direction: numbers from 1, of those that were sent since the
/// first that came by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// All that came by.
    numbers: BTreeSet<u64>,
    /// The highest of them.
    pub last: u64,
    /// The identification of that one.
    identification: u16,
    /// Whether its end has come by.
    ended: bool,
    /// How often one came by after a later one. A veth hands over to the backlog of whatever CPU sends, and two
    /// CPUs do not go through theirs in step.
    pub overtaken: u64,
}

impl Seen {
    /// Adds one skb, unless no socket of this connection has sent it: what answers in place of one that is gone has
    /// no number (`tcp_sk_init`, `net/ipv4/tcp_ipv4.c`, 6.1), and comes after the end. What a socket sent before its
    /// end may come after it too, from another CPU's backlog.
    fn arrived(&mut self, segment: &Segment) -> Result<()> {
        if self.ended && segment.is_bare && segment.identification == 0 {
            return Ok(());
        }
        self.ended |= segment.is_end;
        self.add(segment.identification, segment.packets)
    }

    /// Adds what has come by: `packets` in one skb, the first of this identification.
    fn add(&mut self, identification: u16, packets: u64) -> Result<()> {
        let first = if self.last == 0 {
            1
        } else {
            let step = identification
                .wrapping_sub(self.identification)
                .cast_signed();
            // What is before the first of all was overtaken by it: no way to number that.
            self.last
                .checked_add_signed(step.into())
                .filter(|first| *first > 0)
                .context("the first packet of a connection was not the first to come by")?
        };
        let last = first + packets - 1;
        self.numbers.extend(first..=last);
        if first <= self.last {
            self.overtaken += 1;
        }
        if last > self.last {
            let further = u16::try_from(packets - 1).context("a super-packet")?;
            self.identification = identification.wrapping_add(further);
            self.last = last;
        }
        Ok(())
    }

    /// Numbers of those that did not come by, in ascending order.
    #[must_use]
    pub fn missing(&self) -> Vec<u64> {
        (1..self.last)
            .filter(|number| !self.numbers.contains(number))
            .collect()
    }
}

/// A capture that is running.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<BTreeMap<u16, Seen>>>>,
}

impl Capture {
    /// Looks at what arrives for a TCP port at `eth0` of a namespace, behind the ingress hook.
    pub fn start(ns: &Netns, port: u16) -> Result<Self> {
        let socket = ns.enter(|| open("eth0", ETH_IPV4))?;
        set_option(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            BUFFER,
        )?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || collect(&socket, port, &told));
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Ends it, when all that is of interest has arrived; returns what came by, by the sender's port. Fails if
    /// the capture itself missed something.
    pub fn finish(mut self) -> Result<BTreeMap<u16, Seen>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .take()
            .context("a capture is finished once")?
            .join()
            .map_err(|_| anyhow!("a capture panicked"))?
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

fn collect(socket: &OwnedFd, port: u16, stop: &AtomicBool) -> Result<BTreeMap<u16, Seen>> {
    let mut seen: BTreeMap<u16, Seen> = BTreeMap::new();
    let mut latest = Instant::now();
    loop {
        // Asked before looking, so that what had arrived by then is seen.
        let last = stop.load(Ordering::Relaxed);
        let mut bytes = [0_u8; HEADERS];
        // SAFETY: the buffer outlives the call and its length is passed.
        let got = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                bytes.len(),
                libc::MSG_DONTWAIT,
            )
        };
        let Ok(length) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            ensure!(
                error.kind() == io::ErrorKind::WouldBlock,
                "capturing: {error}"
            );
            if last && latest.elapsed() > QUIET {
                break;
            }
            thread::sleep(Duration::from_micros(500));
            continue;
        };
        let Some(segment) = segment(&bytes[..length], port) else {
            continue;
        };
        latest = Instant::now();
        let connection = seen.entry(segment.from).or_default();
        connection.arrived(&segment)?;
    }
    // Reading the number sets it to zero.
    let dropped = dropped(socket)?;
    ensure!(dropped == 0, "the capture missed {dropped} packets");
    Ok(seen)
}

/// One skb of TCP.
struct Segment {
    from: u16,
    identification: u16,
    /// Wire packets in it.
    packets: u64,
    /// It has a FIN.
    is_end: bool,
    /// It is an acknowledgement and nothing else.
    is_bare: bool,
}

/// What an IPv4 frame is, if it is TCP to this port.
fn segment(frame: &[u8], port: u16) -> Option<Segment> {
    let number =
        |bytes: &[u8], at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let ip = frame.get(ETHERNET..)?;
    let header = usize::from(ip.first()? & 0xf) * 4;
    let tcp = ip.get(header..)?;
    if *ip.get(9)? != TCP || number(tcp, 2)? != port {
        return None;
    }
    let headers = header + usize::from(tcp.get(12)? >> 4) * 4;
    let payload = usize::from(number(ip, 2)?).saturating_sub(headers);
    let flags = *tcp.get(13)?;
    let packets = payload.div_ceil(MTU - headers).max(1);
    Some(Segment {
        from: number(tcp, 0)?,
        identification: number(ip, 4)?,
        packets: u64::try_from(packets).ok()?,
        is_end: flags & FIN != 0,
        is_bare: payload == 0 && flags & (SYN | FIN) == 0,
    })
}

/// How many packets a packet socket had no room for.
fn dropped(socket: &OwnedFd) -> Result<u32> {
    // SAFETY: all-zero bytes are a valid tpacket_stats.
    let mut statistics: libc::tpacket_stats = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tpacket_stats>())?;
    // SAFETY: both outlive the call, and the length is that of the structure.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("PACKET_STATISTICS");
    }
    Ok(statistics.tp_drops)
}

#[cfg(test)]
mod tests {
    use super::{Seen, Segment};

    #[test]
    fn gaps_are_what_is_missing() -> anyhow::Result<()> {
        let mut seen = Seen::default();
        // Two, then one lost, four as a super-packet, three lost, one, and one of the three after all.
        for (identification, packets) in [(65_533, 1), (65_534, 1), (0, 4), (7, 1), (5, 1)] {
            seen.add(identification, packets)?;
        }
        assert_eq!(seen.missing(), [3, 8, 10]);
        assert_eq!((seen.last, seen.overtaken), (11, 1));
        assert!(seen.add(65_530, 1).is_err());
        Ok(())
    }

    #[test]
    fn what_its_own_end_overtook_is_seen() -> anyhow::Result<()> {
        let bare = |identification| Segment {
            from: 1,
            identification,
            packets: 1,
            is_end: false,
            is_bare: true,
        };
        let end = |identification| Segment {
            is_end: true,
            is_bare: false,
            ..bare(identification)
        };
        let mut seen = Seen::default();
        seen.arrived(&bare(700))?;
        seen.arrived(&end(702))?;
        assert_eq!(seen.missing(), [2]);
        // Of no socket.
        seen.arrived(&bare(0))?;
        assert_eq!((seen.last, seen.missing()), (3, vec![2]));
        seen.arrived(&bare(701))?;
        assert_eq!((seen.missing(), seen.overtaken), (vec![], 1));
        Ok(())
    }
}
