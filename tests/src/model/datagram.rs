//! UDP datagrams in IP packets without options, bit by bit: which bits are of which part, and which may change if
//! the checksums are to be right again. Shares no code with the injector.

/// What is known of a datagram beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram {
    /// Whether it is of IPv6.
    pub v6: bool,
    /// Bytes of its payload.
    pub payload: usize,
}

/// Which of its bits corruption chooses from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Those of headers.
    pub header: bool,
    /// Those of the payload.
    pub payload: bool,
    /// Only those that a repair of the checksums can follow.
    pub repairable: bool,
}

const UDP_HEADER: usize = 8;

impl Datagram {
    /// Bytes of the IP header.
    #[must_use]
    pub const fn network(self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    /// Bytes of the IP packet.
    #[must_use]
    pub const fn length(self) -> usize {
        self.headers() + self.payload
    }

    /// Bytes in front of the payload.
    #[must_use]
    pub const fn headers(self) -> usize {
        self.network() + UDP_HEADER
    }

    /// The bits chosen from, in the order in which they are sent.
    #[must_use]
    pub fn bits(self, choice: Choice) -> Vec<usize> {
        let network = self.network() * 8;
        // The first bit of each range, and the one behind it.
        let ip: &[(usize, usize)] = match (choice.repairable, self.v6) {
            (false, false) => &[(0, 160)],
            (false, true) => &[(0, 320)],
            // Type of service; identification; time to live; addresses.
            (true, false) => &[(8, 16), (32, 48), (64, 72), (96, 160)],
            // All but version, length and next header.
            (true, true) => &[(4, 32), (56, 320)],
        };
        let udp = if choice.repairable {
            32
        } else {
            UDP_HEADER * 8
        };
        let mut bits = Vec::new();
        if choice.header {
            bits.extend(ip.iter().flat_map(|(first, end)| *first..*end));
            bits.extend(network..network + udp);
        }
        if choice.payload {
            bits.extend(self.headers() * 8..self.length() * 8);
        }
        bits
    }

    /// Whether all checksums of the packet are right.
    #[must_use]
    pub fn is_valid(self, packet: &[u8]) -> bool {
        let (ip, udp) = packet.split_at(self.network());
        let addresses = if self.v6 { &ip[8..] } else { &ip[12..] };
        let length = u16::try_from(udp.len()).unwrap_or(u16::MAX);
        let pseudo = [addresses, &[0, 17], &length.to_be_bytes(), udp].concat();
        (self.v6 || sum(ip) == 0xffff) && udp[6..8] != [0, 0] && sum(&pseudo) == 0xffff
    }
}

/// Turns over the bit at `position`.
pub fn turn(packet: &mut [u8], position: usize) {
    packet[position / 8] ^= 0x80 >> (position % 8);
}

/// The ones' complement sum of RFC 1071.
fn sum(bytes: &[u8]) -> u64 {
    let mut sum: u64 = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u64::from))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}
