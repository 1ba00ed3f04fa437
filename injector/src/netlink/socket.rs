//! One netlink socket: a request and its acknowledgement, or a dump.

use std::{io, os::fd::AsRawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkBuffer,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};

use super::{attribute::Attributes, error::NetlinkError};

/// `struct nlmsghdr`.
const NETLINK_HEADER_LEN: usize = 16;
// include/uapi/linux/netlink.h
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// So often a dump that was overtaken by a change is begun again.
const DUMP_TRIES: u32 = 16;
/// The kernel answers within the system call that sends the request; longer than this, in seconds, and
/// something is wrong.
const ANSWER_SECONDS: i64 = 30;

/// One message of an answer: its type and what follows its header.
pub(super) type Part = (u16, Vec<u8>);

/// What became of a sequence of messages.
enum Answer {
    /// Complete.
    Parts(Vec<Part>),
    /// The table changed under the dump.
    Torn,
}

/// A netlink socket in the namespace of the thread that opened it.
pub(super) struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    /// Opens a route netlink socket; `what` is what it is for.
    pub(super) fn open(what: &str) -> Result<Self, NetlinkError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            // Without these two the kernel says only a number where it has a sentence to say.
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            setsockopt(
                &socket,
                sockopt::ReceiveTimeout,
                &TimeVal::new(ANSWER_SECONDS, 0),
            )?;
            Ok(socket)
        };
        let socket = open().map_err(|source| NetlinkError::Open {
            what: what.to_owned(),
            source,
        })?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a request and waits until the kernel has carried it out. The parts are what it answered
    /// besides the acknowledgement (to a request for one object: that object).
    pub(super) fn request(
        &mut self,
        what: &str,
        kind: u16,
        flags: u16,
        payload: &[u8],
    ) -> Result<Vec<Part>, NetlinkError> {
        self.send(what, kind, NLM_F_REQUEST | NLM_F_ACK | flags, payload)?;
        match self.receive(what)? {
            Answer::Parts(parts) => Ok(parts),
            Answer::Torn => Err(malformed(what, "a torn answer to a single request")),
        }
    }

    /// Reads a whole table, as it was at one moment.
    pub(super) fn dump(
        &mut self,
        what: &str,
        kind: u16,
        payload: &[u8],
    ) -> Result<Vec<Part>, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            self.send(what, kind, NLM_F_REQUEST | NLM_F_DUMP, payload)?;
            if let Answer::Parts(parts) = self.receive(what)? {
                return Ok(parts);
            }
        }
        Err(NetlinkError::Interrupted {
            what: what.to_owned(),
            tries: DUMP_TRIES,
        })
    }

    fn send(
        &mut self,
        what: &str,
        kind: u16,
        flags: u16,
        payload: &[u8],
    ) -> Result<(), NetlinkError> {
        self.sequence += 1;
        let length = NETLINK_HEADER_LEN + payload.len();
        let mut bytes = vec![0; length];
        let mut message = NetlinkBuffer::new(&mut bytes);
        message.set_length(u32::try_from(length).map_err(|_| malformed(what, "request too long"))?);
        message.set_message_type(kind);
        message.set_flags(flags);
        message.set_sequence_number(self.sequence);
        bytes[NETLINK_HEADER_LEN..].copy_from_slice(payload);
        retry(|| self.socket.send(&bytes, 0)).map_err(|source| NetlinkError::Transfer {
            what: what.to_owned(),
            source,
        })?;
        Ok(())
    }

    /// Receives until the end of the answer to the last request.
    fn receive(&mut self, what: &str) -> Result<Answer, NetlinkError> {
        let mut parts = Vec::new();
        let mut torn = false;
        loop {
            let datagram = self.datagram().map_err(|source| NetlinkError::Transfer {
                what: what.to_owned(),
                source,
            })?;
            if read_datagram(what, &datagram, self.sequence, &mut parts, &mut torn)? {
                return Ok(if torn {
                    Answer::Torn
                } else {
                    Answer::Parts(parts)
                });
            }
        }
    }

    /// One datagram from the kernel, whatever its size.
    fn datagram(&self) -> io::Result<Vec<u8>> {
        loop {
            let peek = libc::MSG_PEEK | libc::MSG_TRUNC;
            let length = retry(|| self.socket.recv(&mut Vec::new(), peek))?;
            let mut buffer = Vec::with_capacity(length.max(1));
            let (_, from) = retry(|| self.socket.recv_from(&mut buffer, 0))?;
            // Any process may send to a netlink socket; the kernel's port is 0.
            if from.port_number() == 0 {
                return Ok(buffer);
            }
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

/// Repeats a system call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The error for an answer that cannot be understood.
#[expect(
    clippy::needless_pass_by_value,
    reason = "an error is handed over where it ends, and texts are literals"
)]
pub(super) fn malformed(what: &str, detail: impl ToString) -> NetlinkError {
    NetlinkError::Malformed {
        what: what.to_owned(),
        detail: detail.to_string(),
    }
}

/// Takes the messages of one datagram; says whether the answer is complete.
fn read_datagram(
    what: &str,
    mut datagram: &[u8],
    sequence: u32,
    parts: &mut Vec<Part>,
    torn: &mut bool,
) -> Result<bool, NetlinkError> {
    while !datagram.is_empty() {
        let message =
            NetlinkBuffer::new_checked(datagram).map_err(|error| malformed(what, error))?;
        let (kind, flags) = (message.message_type(), message.flags());
        let length = usize::try_from(message.length()).map_err(|error| malformed(what, error))?;
        let payload = &datagram[NETLINK_HEADER_LEN..length];
        let answers_us = message.sequence_number() == sequence;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        if !answers_us {
            continue;
        }
        *torn |= flags & NLM_F_DUMP_INTR != 0;
        match kind {
            NLMSG_NOOP => {}
            NLMSG_OVERRUN => return Err(malformed(what, "data lost")),
            NLMSG_ERROR => return verdict(what, payload, flags, true).map(|()| true),
            NLMSG_DONE => return verdict(what, payload, flags, false).map(|()| true),
            _ => parts.push((kind, payload.to_vec())),
        }
    }
    Ok(false)
}

/// Reads the error number, and the kernel's words on it, of an acknowledgement (which repeats the
/// request's header) or of the end of a dump (which does not).
fn verdict(what: &str, payload: &[u8], flags: u16, acknowledges: bool) -> Result<(), NetlinkError> {
    let number = |at: usize| -> Option<[u8; 4]> { payload.get(at..at + 4)?.try_into().ok() };
    // The end of a dump carries its error number only from where it can fail.
    let code = match number(0) {
        Some(bytes) => i32::from_ne_bytes(bytes),
        None if acknowledges => {
            return Err(malformed(what, "acknowledgement without error number"));
        }
        None => 0,
    };
    if code == 0 {
        return Ok(());
    }
    let words_at = if !acknowledges {
        4
    } else if flags & NLM_F_CAPPED != 0 {
        4 + NETLINK_HEADER_LEN
    } else {
        // The whole request is repeated; its first field is its length.
        4 + number(4)
            .map_or(0, |bytes| {
                usize::try_from(u32::from_ne_bytes(bytes)).unwrap_or(usize::MAX / 2)
            })
            .next_multiple_of(4)
    };
    let kernel = (flags & NLM_F_ACK_TLVS != 0)
        .then(|| {
            Attributes::parse(payload.get(words_at..)?)
                .ok()?
                .string(NLMSGERR_ATTR_MSG)
        })
        .flatten()
        .filter(|text| !text.is_empty());
    Err(NetlinkError::Refused {
        what: what.to_owned(),
        source: io::Error::from_raw_os_error(code.saturating_neg()),
        kernel,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attribute::Message;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; NETLINK_HEADER_LEN + payload.len()];
        let length = u32::try_from(bytes.len()).unwrap();
        let mut buffer = NetlinkBuffer::new(&mut bytes);
        buffer.set_length(length);
        buffer.set_message_type(kind);
        buffer.set_flags(flags);
        buffer.set_sequence_number(sequence);
        bytes[NETLINK_HEADER_LEN..].copy_from_slice(payload);
        bytes
    }

    fn read(datagram: &[u8]) -> (Result<bool, NetlinkError>, Vec<Part>, bool) {
        let (mut parts, mut torn) = (Vec::new(), false);
        let result = read_datagram("test", datagram, 7, &mut parts, &mut torn);
        (result, parts, torn)
    }

    #[test]
    fn dumps_are_gathered_over_messages_and_torn_ones_noticed() {
        let mut datagram = message(16, 2, 7, &[1, 2, 3, 4]);
        datagram.extend(message(16, 2, 6, &[9; 4])); // a late answer to another request
        datagram.extend(message(16, 2, 7, &[5, 6, 7, 8]));
        let (result, parts, torn) = read(&datagram);
        assert!(!result.unwrap());
        assert_eq!(parts, [(16, vec![1, 2, 3, 4]), (16, vec![5, 6, 7, 8])]);
        assert!(!torn);
        let (result, _, torn) = read(&message(NLMSG_DONE, 2 | NLM_F_DUMP_INTR, 7, &[0; 4]));
        assert!(result.unwrap());
        assert!(torn);
        let (result, ..) = read(&message(NLMSG_DONE, 2, 7, &(-19_i32).to_ne_bytes()));
        assert!(result.unwrap_err().is_no_device());
    }

    #[test]
    fn refusals_carry_the_kernels_words() {
        let words = Message::from_header(&[])
            .string(NLMSGERR_ATTR_MSG, "Exclusivity flag on, cannot modify.")
            .into_bytes();
        for (capped, repeated) in [(NLM_F_CAPPED, 0), (0, 12)] {
            let mut payload = (-17_i32).to_ne_bytes().to_vec();
            payload.extend(message(36, 0, 7, &vec![0; repeated]));
            payload.extend(&words);
            let (result, ..) = read(&message(NLMSG_ERROR, NLM_F_ACK_TLVS | capped, 7, &payload));
            let error = result.unwrap_err();
            assert_eq!(error.errno(), Some(libc::EEXIST));
            assert_eq!(
                error.to_string(),
                "cannot test: File exists (os error 17) (kernel: Exclusivity flag on, cannot modify)"
            );
        }
        let (result, ..) = read(&message(NLMSG_ERROR, 0, 7, &[0; 20]));
        assert!(result.unwrap());
    }

    #[test]
    fn nonsense_is_an_error_not_a_panic() {
        assert!(read(&[1, 2, 3]).0.is_err());
        let mut short = message(16, 0, 7, &[0; 8]);
        short.truncate(20);
        assert!(read(&short).0.is_err());
        assert!(read(&message(NLMSG_ERROR, 0, 7, &[])).0.is_err());
        let huge = [(-1_i32).to_ne_bytes(), u32::MAX.to_ne_bytes()].concat();
        let (result, ..) = read(&message(NLMSG_ERROR, NLM_F_ACK_TLVS, 7, &huge));
        assert!(result.unwrap_err().errno().is_some());
    }
}
