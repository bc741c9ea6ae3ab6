//! The two forms of the fixtures' world. Everything in it has an IPv4 address; its IPv6 address is a fixed prefix with the
//! IPv4 address as its lowest 32 bits, as everywhere in Shoal.

use std::net::{IpAddr, Ipv4Addr};

use mesh_agent::dataplane::contents::{Contents, Family as Tables};
use mesh_common::addr::{Ip6, WIREGUARD_NET};
use mesh_common::be::{Be16, Be32};
use mesh_common::hash::{Tuple, client_hash, flow_hash, path_entropy};

use super::world::SEED;

/// One end of a flow, by its IPv4 address.
pub type Socket = (Ipv4Addr, u16);

/// The prefix of all IPv6 addresses in the world, 96 bits.
const PREFIX: Ip6 = Ip6::from_groups([0xfd00, 5, 0, 0, 0, 0, 0, 0]);
/// The mask of those bits.
const PREFIX_MASK: Ip6 = Ip6::from_groups([0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0, 0]);
/// First octet of the addresses whose IPv6 form is in WireGuard's network instead.
pub const WIREGUARD_OCTET: u8 = 253;
/// The length of [`PREFIX`], bits.
pub const PREFIX_BITS: u32 = 96;

/// A form of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both forms.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// An address in this form.
    pub fn addr(self, addr: Ipv4Addr) -> IpAddr {
        self.ip6(addr).into()
    }

    /// An address in this form as the tables of both families are compared: IPv4 in its mapped form.
    pub fn ip6(self, addr: Ipv4Addr) -> Ip6 {
        match self {
            Self::V4 => Ip6::mapped(addr.into()),
            Self::V6 => six(addr.into()),
        }
    }

    /// Bytes of an IP header without options and extensions.
    pub const fn header_len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }

    /// A flow's tuple in the form that tables are compared in.
    pub fn tuple(self, protocol: u8, src: Socket, dst: Socket) -> Tuple<Ip6> {
        tuple_of(protocol, (self.ip6(src.0), src.1), (self.ip6(dst.0), dst.1))
    }

    /// The flow's hash.
    pub fn flow_hash(self, protocol: u8, src: Socket, dst: Socket) -> u32 {
        match self {
            Self::V4 => flow_hash(&tuple4(protocol, src, dst), SEED),
            Self::V6 => flow_hash(&self.tuple(protocol, src, dst), SEED),
        }
    }

    /// The hash of the flow's client.
    pub fn client_hash(self, protocol: u8, src: Socket, dst: Socket) -> u32 {
        match self {
            Self::V4 => client_hash(&tuple4(protocol, src, dst), SEED),
            Self::V6 => client_hash(&self.tuple(protocol, src, dst), SEED),
        }
    }

    /// What the flow's outer source port is made of.
    pub fn path_entropy(self, protocol: u8, src: Socket, dst: Socket) -> u16 {
        match self {
            Self::V4 => path_entropy(&tuple4(protocol, src, dst)),
            Self::V6 => path_entropy(&self.tuple(protocol, src, dst)),
        }
    }
}

fn tuple4(protocol: u8, src: Socket, dst: Socket) -> Tuple<Be32> {
    tuple_of(protocol, (src.0.into(), src.1), (dst.0.into(), dst.1))
}

fn tuple_of<A>(protocol: u8, (src, src_port): (A, u16), (dst, dst_port): (A, u16)) -> Tuple<A> {
    Tuple { src, dst, src_port: Be16::new(src_port), dst_port: Be16::new(dst_port), protocol }
}

/// The IPv6 address that belongs to an IPv4 address.
pub fn six(addr: Be32) -> Ip6 {
    let net = if addr.to_bytes()[0] == WIREGUARD_OCTET { WIREGUARD_NET } else { PREFIX };
    net.with_low(addr)
}

/// The IPv6 mask that belongs to an IPv4 mask.
pub fn mask6(mask: Be32) -> Ip6 {
    PREFIX_MASK.with_low(mask)
}

/// An address type: how its tables are found, and how it becomes the form that tables are compared in.
pub trait Side: mesh_datapath::encap::Inner + mesh_datapath::refuse::Answer {
    /// Its tables.
    fn tables(contents: &Contents) -> &Tables<Self>;
    /// From the form that tables are compared in, of an address of this family, or of none.
    fn lower(addr: Ip6) -> Self;
    /// Whether such an address is of this family.
    fn is_of(addr: Ip6) -> bool;

    /// The form that tables are compared in; no address stays none.
    fn lift(self) -> Ip6 {
        if self == Self::default() { Ip6::default() } else { self.to_ip6() }
    }
}

impl Side for Be32 {
    fn tables(contents: &Contents) -> &Tables<Self> {
        &contents.v4
    }

    fn lower(addr: Ip6) -> Self {
        addr.to_mapped().unwrap_or_default()
    }

    fn is_of(addr: Ip6) -> bool {
        addr.to_mapped().is_some()
    }
}

impl Side for Ip6 {
    fn tables(contents: &Contents) -> &Tables<Self> {
        &contents.v6
    }

    fn lower(addr: Ip6) -> Self {
        addr
    }

    fn is_of(addr: Ip6) -> bool {
        addr.to_mapped().is_none()
    }
}
