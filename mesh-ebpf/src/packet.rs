//! What the packet logic needs of a packet.
//!
//! Offsets count from the first byte of the Ethernet header. A load or store beyond the packet's end fails; in the
//! kernel the adapters prove that to the verifier.

use mesh_common::addr::Ip6;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A packet that can be read.
pub trait Packet {
    /// Its length from the Ethernet header on, bytes.
    fn len(&self) -> u32;

    /// A copy of the header at `offset`; `None` if the packet ends before it does.
    fn load<T: FromBytes + Immutable + KnownLayout + Copy>(&self, offset: usize) -> Option<T>;

    /// Bytes of payload in each segment that the packet will be cut into before it is on the wire; 0: it won't be.
    fn segment_len(&self) -> u32 {
        0
    }

    /// Whether the packet has no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A packet that can be written.
pub trait Store: Packet {
    /// Overwrites the header at `offset`.
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault>;
}

/// A packet whose headers can be rewritten, with checksums kept right whether or not the hardware, or a later stage,
/// fills them in.
pub trait Rewrite: Store {
    /// Adjusts the IPv4 header checksum at `offset` for a 4-byte field that changed.
    fn patch_ip_checksum(&mut self, offset: usize, from: u32, to: u32) -> Result<(), Fault>;

    /// Adjusts the TCP, UDP or ICMP checksum at `offset` for a field that changed. `field` says how long it is and
    /// whether it is part of the pseudo-header; a UDP checksum of zero (none) stays zero if `udp`.
    fn patch_l4_checksum(
        &mut self,
        offset: usize,
        from: u32,
        to: u32,
        field: Field,
        udp: bool,
    ) -> Result<(), Fault>;

    /// The same for an IPv6 address of the pseudo-header.
    fn patch_l4_address6(&mut self, offset: usize, from: &Ip6, to: &Ip6, udp: bool) -> Result<(), Fault>;

    /// The same for an IPv6 address in the payload, which an ICMPv6 checksum covers.
    fn patch_l4_payload6(&mut self, offset: usize, from: &Ip6, to: &Ip6) -> Result<(), Fault>;
}

/// A packet that can be made into an answer to itself.
pub trait Reuse: Rewrite {
    /// Cuts or extends the packet to `len` bytes; what is added is undefined until stored. Offloads that described the
    /// former packet are gone, but [`Reuse::is_checksum_deferred`] stays true where it was.
    fn set_len(&mut self, len: u32) -> Result<(), Fault>;

    /// Whether the layer 4 checksum of the packet as it came, at `offset`, is yet to be filled in by a later stage,
    /// which will then sum from the layer 4 header to the packet's end.
    fn is_checksum_deferred(&mut self, offset: usize) -> bool;

    /// Makes room for `bytes` between the Ethernet header and what follows it; undefined until stored.
    fn insert_header(&mut self, bytes: u32) -> Result<(), Fault>;
}

/// A packet whose front can be moved.
pub trait Resize: Store {
    /// Makes room for `bytes` before the packet's first byte; their content is undefined until stored.
    fn grow(&mut self, bytes: u32) -> Result<(), Fault>;

    /// Takes the packet's first `bytes` off.
    fn shrink(&mut self, bytes: u32) -> Result<(), Fault>;
}

/// A field that a layer 4 checksum covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Field {
    /// An IPv4 address, by way of the pseudo-header.
    Address,
    /// A port, or any two bytes of the layer 4 header.
    Port,
}

/// A change of the packet was refused: it is shorter than it said, or the kernel could not make it writable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault;
