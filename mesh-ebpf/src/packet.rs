//! What the packet logic needs of a packet.
//!
//! Offsets count from the first byte of the Ethernet header. A load or store beyond the packet's end fails; in the
//! kernel the adapters prove that to the verifier.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A packet that can be read.
pub trait Packet {
    /// Its length from the Ethernet header on, bytes.
    fn len(&self) -> u32;

    /// A copy of the header at `offset`; `None` if the packet ends before it does.
    fn load<T: FromBytes + Immutable + KnownLayout + Copy>(&self, offset: usize) -> Option<T>;

    /// Whether the packet has no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A packet whose headers can be rewritten, with checksums kept right whether or not the hardware, or a later stage,
/// fills them in.
pub trait Rewrite: Packet {
    /// Overwrites the header at `offset`.
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault>;

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
}

/// A packet whose front can be moved.
pub trait Resize: Rewrite {
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
