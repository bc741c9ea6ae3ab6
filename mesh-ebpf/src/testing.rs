//! Packets for unit tests: in a vector, with checksums that may be deferred, and with a judge of all checksums that
//! owes nothing to the code under test.

use std::vec::Vec;

use mesh_common::addr::Ip6;
use mesh_common::be::Be32;

pub use crate::bytes::Bytes;
use crate::family::Family;
use crate::parse::Parsed;

/// Ethernet addresses of sender and receiver.
pub const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The receiver's.
pub const RECEIVER: [u8; 6] = [2, 0, 0, 0, 0, 2];

impl Bytes {
    /// With the checksum at `offset` behind the layer 4 header at `start` as a sender leaves it that defers it. The
    /// checksum has to be right.
    pub(crate) fn defer(mut self, start: usize, offset: usize) -> Self {
        let field = start + offset..start + offset + 2;
        self.bytes[field.clone()].fill(0);
        let sum = fold(pseudo(&self.bytes, self.bytes.len() - start));
        self.bytes[field].copy_from_slice(&sum.to_be_bytes());
        self.deferred = Some((start, offset));
        self
    }

    /// As it will be on the wire.
    pub(crate) fn on_the_wire(mut self) -> Vec<u8> {
        if let Some((start, offset)) = self.deferred {
            let sum = !fold(words(&self.bytes[start..]));
            let sum = if sum == 0 { 0xffff } else { sum };
            self.bytes[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
        }
        self.bytes
    }

    pub(crate) fn parsed<A: Family>(&self) -> Parsed<A> {
        A::parse(self).unwrap()
    }
}

/// A family whose frames can be made up.
pub trait Frame: Family {
    /// The IP header before so many bytes of layer 4.
    fn header(src: Self, dst: Self, protocol: u8, l4_len: u16) -> Vec<u8>;
}

impl Frame for Be32 {
    fn header(src: Self, dst: Self, protocol: u8, l4_len: u16) -> Vec<u8> {
        let mut header = [0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0].to_vec();
        header[2..4].copy_from_slice(&(20 + l4_len).to_be_bytes());
        header.extend([src.to_bytes(), dst.to_bytes()].concat());
        let checksum = !fold(words(&header));
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }
}

impl Frame for Ip6 {
    fn header(src: Self, dst: Self, protocol: u8, l4_len: u16) -> Vec<u8> {
        let mut header = [0x60, 0, 0x12, 0x34, 0, 0, protocol, 64].to_vec();
        header[4..6].copy_from_slice(&l4_len.to_be_bytes());
        for addr in [src, dst] {
            header.extend(core::net::Ipv6Addr::from(addr).octets());
        }
        header
    }
}

/// A frame around a layer 4 header and payload whose checksum, if it has one, is at `checksum`, and is made right.
pub fn frame<A: Frame>(src: A, dst: A, protocol: u8, checksum: Option<usize>, l4: &[u8]) -> Vec<u8> {
    let header = A::header(src, dst, protocol, l4.len() as u16);
    let mut bytes = [&RECEIVER[..], &SENDER, &A::ETHERTYPE.to_bytes(), &header, l4].concat();
    if let Some(offset) = checksum {
        let at = bytes.len() - l4.len() + offset;
        bytes[at..at + 2].fill(0);
        let covered = &bytes[at - offset..];
        let sum = !fold(pseudo(&bytes, covered.len()) + words(covered));
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// An IPv4 frame with so many words of options that do nothing.
pub fn with_options(mut frame: Vec<u8>, count: u8) -> Vec<u8> {
    frame[14] += count;
    frame.splice(34..34, std::iter::repeat_n(1, usize::from(count) * 4));
    let len = (frame.len() - 14) as u16;
    frame[16..18].copy_from_slice(&len.to_be_bytes());
    frame[24..26].fill(0);
    let checksum = !fold(words(&frame[14..34 + usize::from(count) * 4]));
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Asserts that an IP header's checksum and that of the TCP, UDP, ICMP or ICMPv6 behind it are right, and that the
/// lengths are those of the packet.
pub fn assert_checksums(frame: &[u8]) {
    let (protocol, l4) = split(frame);
    if frame[14] >> 4 == 4 {
        let header = &frame[14..frame.len() - l4.len()];
        assert_eq!(fold(words(header)), 0xffff, "IPv4 header: {header:x?}");
    }
    assert_eq!(fold(pseudo(frame, l4.len()) + words(l4)), 0xffff, "protocol {protocol}: {l4:x?}");
}

/// Protocol and layer 4 of a frame without extension headers.
pub fn split(frame: &[u8]) -> (u8, &[u8]) {
    let len = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    if frame[14] >> 4 == 4 {
        assert_eq!(len(16), frame.len() - 14);
        (frame[23], &frame[14 + usize::from(frame[14] & 0xf) * 4..])
    } else {
        assert_eq!(len(18), frame.len() - 54);
        (frame[20], &frame[54..])
    }
}

/// The pseudo-header's sum for so many bytes of layer 4, which follow what extension headers there are.
fn pseudo(frame: &[u8], len: usize) -> u64 {
    // IPv4's ICMP has none.
    if frame[14] >> 4 == 4 && frame[23] == 1 {
        return 0;
    }
    if frame[14] >> 4 == 4 {
        return words(&frame[26..34]) + u64::from(frame[23]) + len as u64;
    }
    let (mut protocol, mut at) = (frame[20], 54);
    while at + len < frame.len() {
        protocol = frame[at];
        at += (usize::from(frame[at + 1]) + 1) * 8;
    }
    words(&frame[22..54]) + u64::from(protocol) + len as u64
}

fn words(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
