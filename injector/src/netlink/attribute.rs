//! Reading and writing netlink attributes.
//!
//! Attributes are taken by number rather than through netlink-packet-route's typed messages: those
//! refuse a whole message for one attribute that a newer kernel made longer or a foreign filter filled
//! in an unexpected way, and what others put on an interface must never blind us.

use std::{ffi::CStr, net::IpAddr};

use netlink_packet_core::{DecodeError, DefaultNla, Emitable, NLA_HEADER_SIZE, NlasIterator};

/// The attributes of one level of a message.
#[derive(Debug, Default)]
pub(super) struct Attributes<'a>(Vec<(u16, &'a [u8])>);

impl<'a> Attributes<'a> {
    /// Splits `bytes` into attributes.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        NlasIterator::new(bytes)
            .map(|nla| {
                let nla = nla?;
                let (kind, length) = (nla.kind(), usize::from(nla.length()));
                // The iterator has checked that the length lies within the buffer.
                Ok((
                    kind,
                    nla.into_inner().get(NLA_HEADER_SIZE..length).unwrap_or(&[]),
                ))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Splits a message into its fixed header, of `header` bytes, and attributes.
    pub(super) fn after(header: usize, message: &'a [u8]) -> Result<Self, DecodeError> {
        let rest = message
            .get(header..)
            .ok_or_else(|| DecodeError::from("message shorter than its header"))?;
        Self::parse(rest)
    }

    /// The value of an attribute.
    pub(super) fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.0
            .iter()
            .find(|(number, _)| *number == kind)
            .map(|(_, value)| *value)
    }

    /// The attributes inside an attribute; none if it is absent.
    pub(super) fn nested(&self, kind: u16) -> Result<Attributes<'a>, DecodeError> {
        self.get(kind)
            .map_or_else(|| Ok(Self::default()), Self::parse)
    }

    /// An attribute of 32 bits in host order.
    pub(super) fn u32(&self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(
            self.get(kind)?.get(..4)?.try_into().ok()?,
        ))
    }

    /// An attribute that is a string, with or without its terminating zero.
    pub(super) fn string(&self, kind: u16) -> Option<String> {
        let bytes = self.get(kind)?;
        let text = CStr::from_bytes_until_nul(bytes).map_or(bytes, CStr::to_bytes);
        Some(String::from_utf8_lossy(text).into_owned())
    }

    /// An attribute that is an IPv4 or IPv6 address.
    pub(super) fn address(&self, kind: u16) -> Option<IpAddr> {
        let bytes = self.get(kind)?;
        <[u8; 4]>::try_from(bytes)
            .map(IpAddr::from)
            .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
            .ok()
    }
}

/// A message under construction: the fixed header, then attributes.
#[derive(Debug)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// Begins with a fixed header.
    pub(super) fn new(header: &impl Emitable) -> Self {
        let mut bytes = vec![0; header.buffer_len()];
        header.emit(&mut bytes);
        Self(bytes)
    }

    /// Begins with a fixed header given as bytes (a multiple of four of them).
    pub(super) fn from_header(header: &[u8]) -> Self {
        Self(header.to_vec())
    }

    /// Adds an attribute.
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        let nla = DefaultNla::new(kind, value.to_vec());
        let start = self.0.len();
        self.0.resize(start + nla.buffer_len(), 0);
        nla.emit(&mut self.0[start..]);
        self
    }

    /// Adds an attribute of 32 bits in host order.
    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Adds a string with its terminating zero.
    pub(super) fn string(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Adds an attribute that holds attributes.
    pub(super) fn nest(self, kind: u16, fill: impl FnOnce(Message) -> Message) -> Self {
        let inner = fill(Message(Vec::new())).0;
        self.bytes(kind | netlink_packet_core::NLA_F_NESTED, &inner)
    }

    /// The finished message.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let bytes = Message::from_header(&[9; 8])
            .bytes(1, &[7])
            .u32(2, 0x0102_0304)
            .string(3, "eth0")
            .nest(4, |inner| inner.string(1, "veth").u32(2, 5))
            .bytes(5, &[10, 77, 0, 1])
            .into_bytes();
        assert_eq!(bytes.len() % 4, 0);
        let read = Attributes::after(8, &bytes).unwrap();
        assert_eq!(read.get(1), Some(&[7][..]));
        assert_eq!(read.u32(2), Some(0x0102_0304));
        assert_eq!(read.string(3).as_deref(), Some("eth0"));
        let inner = read.nested(4).unwrap();
        assert_eq!(inner.string(1).as_deref(), Some("veth"));
        assert_eq!(inner.u32(2), Some(5));
        assert_eq!(read.address(5), Some("10.77.0.1".parse().unwrap()));
        assert_eq!(read.get(6), None);
        assert!(read.nested(6).unwrap().0.is_empty());
    }

    #[test]
    fn broken_attributes_are_errors_not_panics() {
        assert!(Attributes::parse(&[1, 0, 1]).is_err());
        assert!(Attributes::parse(&[2, 0, 1, 0]).is_err());
        assert!(Attributes::parse(&[200, 0, 1, 0, 1, 2]).is_err());
        assert!(Attributes::after(8, &[0; 4]).is_err());
        let short = Attributes::parse(&[5, 0, 1, 0, 9, 0, 0, 0]).unwrap();
        assert_eq!((short.u32(1), short.address(1)), (None, None));
    }
}
