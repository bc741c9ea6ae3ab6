//! Addresses of both families, and the Ethernet addresses made from them.

use core::fmt::Debug;
use core::hash::Hash;
use core::net::Ipv6Addr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::be::{Be16, Be32};

/// An IPv4 ([`Be32`]) or IPv6 ([`Ip6`]) address.
pub trait Address:
    Copy + Eq + Ord + Hash + Debug + Default + FromBytes + IntoBytes + Immutable + KnownLayout + 'static
{
    /// The family in [`PortKey`](crate::map::PortKey): 4 or 6.
    const FAMILY: u8;

    /// The lowest 32 bits: an IPv4 address, or what an endpoint's IPv6 address has of its IPv4 address.
    fn low(self) -> Be32;

    /// The address as an IPv6 address: an IPv4 address in its mapped form.
    fn to_ip6(self) -> Ip6;

    /// The address folded to 32 bits by XOR.
    fn folded(self) -> u32;

    /// All of the address, mixed into `state`.
    fn mixed(self, state: u64) -> u64;

    /// Whether the address has the prefix that `net` and `mask` describe.
    fn is_in(self, net: Self, mask: Self) -> bool;

    /// Whether it is a multicast address, or IPv4's broadcast address.
    fn is_multicast(self) -> bool;

    /// Whether it is one of [`WIREGUARD_NET`], by which nodes reach one another through WireGuard.
    fn is_wireguard(self) -> bool;

    /// Whether it is the broadcast address of the subnet that `addr` and `mask` describe; IPv6 has none.
    fn is_broadcast_of(self, addr: Self, mask: Self) -> bool;
}

/// The subnet, of 64 bits, of the addresses that nodes have in WireGuard: what comes from one has been decrypted.
pub const WIREGUARD_NET: Ip6 = Ip6::from_groups([0xfd73, 0x686f, 0x616c, 2, 0, 0, 0, 0]);

/// An IPv6 address.
#[derive(Clone, Copy, Eq, PartialOrd, Ord, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Ip6(pub [Be32; 4]);

impl PartialEq for Ip6 {
    /// In one comparison: each more would be two ways for the verifier to walk.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let differs = |i: usize| self.0[i].raw() ^ other.0[i].raw();
        differs(0) | differs(1) | differs(2) | differs(3) == 0
    }
}

impl Hash for Ip6 {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Address for Be32 {
    const FAMILY: u8 = 4;

    #[inline(always)]
    fn low(self) -> Be32 {
        self
    }

    #[inline(always)]
    fn to_ip6(self) -> Ip6 {
        Ip6::mapped(self)
    }

    #[inline(always)]
    fn folded(self) -> u32 {
        self.get()
    }

    #[inline(always)]
    fn mixed(self, state: u64) -> u64 {
        crate::hash::mix(state ^ u64::from(self.get()))
    }

    #[inline(always)]
    fn is_in(self, net: Self, mask: Self) -> bool {
        (self.raw() ^ net.raw()) & mask.raw() == 0
    }

    #[inline(always)]
    fn is_multicast(self) -> bool {
        self.get() >= 0xe000_0000
    }

    #[inline(always)]
    fn is_wireguard(self) -> bool {
        false
    }

    #[inline(always)]
    fn is_broadcast_of(self, addr: Self, mask: Self) -> bool {
        self.raw() == addr.raw() | !mask.raw()
    }
}

impl Address for Ip6 {
    const FAMILY: u8 = 6;

    #[inline(always)]
    fn low(self) -> Be32 {
        self.0[3]
    }

    #[inline(always)]
    fn to_ip6(self) -> Ip6 {
        self
    }

    #[inline(always)]
    fn folded(self) -> u32 {
        let Self([a, b, c, d]) = self;
        a.get() ^ b.get() ^ c.get() ^ d.get()
    }

    #[inline(always)]
    fn mixed(self, state: u64) -> u64 {
        let Self([a, b, c, d]) = self;
        let halves = |high: Be32, low: Be32| u64::from(high.get()) << 32 | u64::from(low.get());
        crate::hash::mix(crate::hash::mix(state ^ halves(a, b)) ^ halves(c, d))
    }

    #[inline(always)]
    fn is_in(self, net: Self, mask: Self) -> bool {
        let differs = |i: usize| (self.0[i].raw() ^ net.0[i].raw()) & mask.0[i].raw();
        differs(0) | differs(1) | differs(2) | differs(3) == 0
    }

    #[inline(always)]
    fn is_multicast(self) -> bool {
        self.0[0].to_bytes()[0] == 0xff
    }

    #[inline(always)]
    fn is_wireguard(self) -> bool {
        let differs = |i: usize| self.0[i].raw() ^ WIREGUARD_NET.0[i].raw();
        differs(0) | differs(1) == 0
    }

    #[inline(always)]
    fn is_broadcast_of(self, _: Self, _: Self) -> bool {
        false
    }
}

impl Ip6 {
    /// The IPv4-mapped form of an IPv4 address.
    #[inline(always)]
    pub const fn mapped(addr: Be32) -> Self {
        Self([Be32::new(0), Be32::new(0), Be32::new(0xffff), addr])
    }

    /// The IPv4 address that this is the mapped form of.
    #[inline(always)]
    pub fn to_mapped(self) -> Option<Be32> {
        let Self([a, b, c, d]) = self;
        (a.raw() | b.raw() == 0 && c == Be32::new(0xffff)).then_some(d)
    }

    /// The family of the address that this is, or is the mapped form of: 4 or 6.
    #[inline(always)]
    pub fn family(self) -> u8 {
        if self.to_mapped().is_some() { Be32::FAMILY } else { Self::FAMILY }
    }

    /// This prefix of 96 bits, with `low` as the lowest 32.
    #[inline(always)]
    #[must_use]
    pub const fn with_low(self, low: Be32) -> Self {
        let Self([a, b, c, _]) = self;
        Self([a, b, c, low])
    }

    /// From the eight groups that it is written as.
    #[inline(always)]
    pub const fn from_groups(groups: [u16; 8]) -> Self {
        Self([pair(groups, 0), pair(groups, 2), pair(groups, 4), pair(groups, 6)])
    }
}

/// The word that two groups from the `i`th on make.
const fn pair(groups: [u16; 8], i: usize) -> Be32 {
    Be32::new((groups[i] as u32) << 16 | groups[i + 1] as u32)
}

impl From<Ipv6Addr> for Ip6 {
    fn from(addr: Ipv6Addr) -> Self {
        Self::from_groups(addr.segments())
    }
}

impl From<Ip6> for Ipv6Addr {
    fn from(Ip6([a, b, c, d]): Ip6) -> Self {
        let words = [a, b, c, d].map(|word| u128::from(word.get()));
        Self::from_bits(words.iter().fold(0, |bits, word| bits << 32 | word))
    }
}

impl From<core::net::IpAddr> for Ip6 {
    /// An IPv4 address becomes its mapped form.
    fn from(addr: core::net::IpAddr) -> Self {
        match addr {
            core::net::IpAddr::V4(addr) => Self::mapped(addr.into()),
            core::net::IpAddr::V6(addr) => addr.into(),
        }
    }
}

impl From<Ip6> for core::net::IpAddr {
    /// A mapped address becomes the IPv4 address.
    fn from(addr: Ip6) -> Self {
        match addr.to_mapped() {
            Some(addr) => Self::V4(addr.into()),
            None => Self::V6(addr.into()),
        }
    }
}

impl Debug for Ip6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", Ipv6Addr::from(*self))
    }
}

/// First bytes of an endpoint's Ethernet address, as Docker's.
const ENDPOINT_PREFIX: [u8; 2] = [0x02, 0x42];
/// First bytes of the Ethernet destination of an inner frame that names a task.
const BACKEND_PREFIX: [u8; 2] = [0x02, 0x53];

/// First bytes of the Ethernet source of an inner frame that says a fragment's ports. In a mesh request they also say that no
/// other node has been asked.
const PORTS_PREFIX: [u8; 2] = [0x06, 0x00];

/// Ethernet address of the endpoint at an address: `02:42` and its lowest 32 bits.
#[inline(always)]
pub fn mac_of(addr: impl Address) -> [u8; 6] {
    tagged(ENDPOINT_PREFIX, addr.low())
}

/// What names the task that a packet between nodes is for in its inner Ethernet header, and in that of a mesh reply which
/// teaches the one that it is from: `02:53` and its incarnation.
#[inline(always)]
pub const fn backend_mac(incarnation: u32) -> [u8; 6] {
    tagged(BACKEND_PREFIX, Be32::new(incarnation))
}

/// The incarnation in an Ethernet address made by [`backend_mac`]; `None` for any other.
#[inline(always)]
pub const fn backend_of(mac: [u8; 6]) -> Option<u32> {
    match mac {
        [0x02, 0x53, a, b, c, d] => Some(u32::from_be_bytes([a, b, c, d])),
        _ => None,
    }
}

/// What says a later fragment's ports to another node, source and destination, in the Ethernet source of its inner frame.
#[inline(always)]
pub const fn ports_mac((src, dst): (Be16, Be16)) -> [u8; 6] {
    let ([a, b], [c, d]) = (src.get().to_be_bytes(), dst.get().to_be_bytes());
    [PORTS_PREFIX[0], PORTS_PREFIX[1], a, b, c, d]
}

/// The ports in an Ethernet address made by [`ports_mac`]; `None` for any other.
#[inline(always)]
pub const fn ports_of(mac: [u8; 6]) -> Option<(Be16, Be16)> {
    match mac {
        [0x06, 0x00, a, b, c, d] => {
            Some((Be16::new(u16::from_be_bytes([a, b])), Be16::new(u16::from_be_bytes([c, d]))))
        }
        _ => None,
    }
}

#[inline(always)]
const fn tagged(prefix: [u8; 2], low: Be32) -> [u8; 6] {
    let [a, b, c, d] = low.to_bytes();
    [prefix[0], prefix[1], a, b, c, d]
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn a_mapped_address_is_the_ipv4_address_again() {
        let addr = Be32::ipv4(192, 0, 2, 1);
        assert_eq!(Ip6::mapped(addr).to_mapped(), Some(addr));
        assert_eq!(Ip6::from("fd00::1".parse::<Ipv6Addr>().unwrap()).to_mapped(), None);
    }

    #[test]
    fn an_address_is_in_the_subnets_that_share_its_prefix() {
        let ip = |text: &str| Ip6::from(text.parse::<Ipv6Addr>().unwrap());
        let mask = ip("ffff:ffff:ffff:ffff::");
        assert!(ip("fd00::1:2").is_in(ip("fd00::"), mask));
        assert!(!ip("fd00:0:0:1::2").is_in(ip("fd00::"), mask));
    }

    #[test]
    fn a_backend_is_named_by_its_incarnation() {
        assert_eq!(backend_of(backend_mac(0x0102_0304)), Some(0x0102_0304));
        assert_eq!(backend_of(mac_of(Be32::ipv4(10, 0, 0, 1))), None);
    }

    #[test]
    fn a_fragments_ports_are_taken_for_no_other_address() {
        let ports = (Be16::new(0x0102), Be16::new(0x0304));
        assert_eq!(ports_of(ports_mac(ports)), Some(ports));
        assert_eq!(backend_of(ports_mac(ports)), None);
        for other in [mac_of(Be32::ipv4(10, 0, 0, 1)), backend_mac(1), [0x02, 0, 198, 18, 0, 11]] {
            assert_eq!(ports_of(other), None);
        }
    }
}
