//! What the packet logic does differently for IPv4 and IPv6. Everything else is generic over the address.

use mesh_common::addr::{Address, Ip6, mac_of};
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{Config, Host, PROTO_ICMP, PROTO_ICMP6};

use crate::header::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IP_CHECKSUM_OFFSET, IP_OFFSET, Ipv4, Ipv6};
use crate::packet::{Fault, Field, Packet, Rewrite};
use crate::parse::{Parsed, Unparsed, parse_ipv4, parse_ipv6};

/// A family of addresses, by its address type.
pub trait Family: Address {
    /// EtherType of its packets.
    const ETHERTYPE: Be16;
    /// IP protocol number of its ICMP.
    const ICMP: u8;
    /// Offset of the source address behind the IP header's first byte.
    const SRC_OFFSET: usize;
    /// Offset of the destination address behind the IP header's first byte.
    const DST_OFFSET: usize;
    /// Offset of the ICMP checksum that covers the addresses by way of a pseudo-header; IPv4's has none.
    const ICMP_COVERS_ADDRESSES: bool;

    /// Reads a packet's headers behind an Ethernet header known to announce this family.
    fn parse(packet: &impl Packet) -> Result<Parsed<Self>, Unparsed>;

    /// Adjusts the checksums for an address of the IP header at `IP_OFFSET` that changed: the IP header's own, and the
    /// layer 4 one (offset, and whether it is UDP's) where there is one here.
    fn patch_address<P: Rewrite>(
        packet: &mut P,
        l4: Option<(usize, bool)>,
        from: Self,
        to: Self,
    ) -> Result<(), Fault>;

    /// The node-local addresses of this family.
    fn host(config: &Config) -> &Host<Self>;
}

impl Family for Be32 {
    const ETHERTYPE: Be16 = ETHERTYPE_IPV4;
    const ICMP: u8 = PROTO_ICMP;
    const SRC_OFFSET: usize = core::mem::offset_of!(Ipv4, src);
    const DST_OFFSET: usize = core::mem::offset_of!(Ipv4, dst);
    const ICMP_COVERS_ADDRESSES: bool = false;

    #[inline(always)]
    fn parse(packet: &impl Packet) -> Result<Parsed<Self>, Unparsed> {
        parse_ipv4(packet, IP_OFFSET)
    }

    #[inline(always)]
    fn patch_address<P: Rewrite>(
        packet: &mut P,
        l4: Option<(usize, bool)>,
        from: Self,
        to: Self,
    ) -> Result<(), Fault> {
        if let Some((offset, udp)) = l4 {
            packet.patch_l4_checksum(offset, from.raw(), to.raw(), Field::Address, udp)?;
        }
        packet.patch_ip_checksum(IP_CHECKSUM_OFFSET, from.raw(), to.raw())
    }

    #[inline(always)]
    fn host(config: &Config) -> &Host<Self> {
        &config.host4
    }
}

impl Family for Ip6 {
    const ETHERTYPE: Be16 = ETHERTYPE_IPV6;
    const ICMP: u8 = PROTO_ICMP6;
    const SRC_OFFSET: usize = core::mem::offset_of!(Ipv6, src);
    const DST_OFFSET: usize = core::mem::offset_of!(Ipv6, dst);
    const ICMP_COVERS_ADDRESSES: bool = true;

    #[inline(always)]
    fn parse(packet: &impl Packet) -> Result<Parsed<Self>, Unparsed> {
        parse_ipv6(packet, IP_OFFSET)
    }

    #[inline(always)]
    fn patch_address<P: Rewrite>(
        packet: &mut P,
        l4: Option<(usize, bool)>,
        from: Self,
        to: Self,
    ) -> Result<(), Fault> {
        match l4 {
            Some((offset, udp)) => packet.patch_l4_address6(offset, &from, &to, udp),
            None => Ok(()),
        }
    }

    #[inline(always)]
    fn host(config: &Config) -> &Host<Self> {
        &config.host6
    }
}

/// Writes the Ethernet header of a frame from the endpoint at `src` to the one at `dst`.
#[inline(always)]
pub fn address_frame<A: Family, P: Rewrite>(packet: &mut P, src: A, dst: A) -> Result<(), Fault> {
    packet.store(0, &Ethernet { dst: mac_of(dst), src: mac_of(src), ethertype: A::ETHERTYPE })
}
