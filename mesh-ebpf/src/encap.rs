//! VXLAN encapsulation and decapsulation in place, for XDP: any family inside, any family outside.

use mesh_common::addr::{Ip6, backend_of};
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{Config, PROTO_UDP, Peer};
use mesh_common::vxlan::{
    ENCAPSULATION_BYTES, ENCAPSULATION6_BYTES, VNI_MESH_REPLY, VNI_MESH_REQUEST, mtu_overhead_bytes,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::checksum;
use crate::family::Family;
use crate::header::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IP_DF, IP_OFFSET, Ipv4, Ipv6, Outer, Outer6, Udp, VXLAN_FLAGS,
    Vxlan,
};
use crate::packet::{Fault, Packet, Resize};
use crate::parse::Parsed;
use crate::tables::AddrTables;
use crate::uplink::Remote;

/// Hop limit of the outer header.
const TTL: u8 = 64;
/// First of the UDP source ports that spread flows over paths (RFC 7348, section 5).
const SOURCE_PORT_MIN: u16 = 49_152;
/// Bytes of the UDP and VXLAN headers.
const UDP_VXLAN_LEN: u16 = (Udp::LEN + Vxlan::LEN) as u16;

/// The headers of an encapsulated frame on an IPv4 underlay, the inner Ethernet header included, in one store.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed(2))]
struct Headers {
    outer: Outer,
    inner: Ethernet,
}

/// The same on an IPv6 underlay.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed(2))]
struct Headers6 {
    outer: Outer6,
    inner: Ethernet,
}

/// Whether a frame of `len` bytes fits a path of `mtu` bytes once encapsulated for an underlay of a family.
#[inline(always)]
pub const fn fits(len: u32, mtu: u16, family: u8) -> bool {
    len + mtu_overhead_bytes(family) <= mtu as u32 + Ethernet::LEN as u32
}

/// Puts a mesh request of the family `A` into VXLAN towards `peer`: the outer headers in front, the inner frame's Ethernet
/// header saying what is to be done, everything from its IP header on untouched.
#[inline(always)]
pub fn encapsulate<A: Family, P: Resize>(
    packet: &mut P,
    config: &Config,
    peer: &Peer,
    remote: &Remote,
) -> Result<(), Fault> {
    // A cluster's VTEPs are of one family.
    match config.vtep.to_mapped() {
        Some(src) => {
            let [.., dst] = peer.vtep.0;
            encapsulate_ipv4::<A, P>(packet, config, peer, remote, (src, dst))
        }
        None => encapsulate_ipv6::<A, P>(packet, config, peer, remote),
    }
}

#[inline(always)]
fn encapsulate_ipv4<A: Family, P: Resize>(
    packet: &mut P,
    config: &Config,
    peer: &Peer,
    remote: &Remote,
    (src, dst): (Be32, Be32),
) -> Result<(), Fault> {
    let udp_len = packet.len() as u16 + UDP_VXLAN_LEN;
    packet.grow(ENCAPSULATION_BYTES)?;
    let mut ip = Ipv4 {
        version_ihl: 0x45,
        tos: remote.tos,
        total_len: Be16::new(udp_len + Ipv4::LEN as u16),
        id: Be16::new(0),
        fragment: IP_DF,
        ttl: TTL,
        protocol: PROTO_UDP,
        checksum: Be16::new(0),
        src,
        dst,
    };
    ip.checksum = checksum::ipv4(&ip);
    let outer = Outer {
        ethernet: Ethernet { dst: peer.next_hop, src: peer.source, ethertype: ETHERTYPE_IPV4 },
        ip,
        udp: udp(config, remote, udp_len),
        vxlan: vxlan(),
    };
    packet.store(0, &Headers { outer, inner: remote.errand.frame(A::ETHERTYPE) })
}

#[inline(always)]
fn encapsulate_ipv6<A: Family, P: Resize>(
    packet: &mut P,
    config: &Config,
    peer: &Peer,
    remote: &Remote,
) -> Result<(), Fault> {
    let udp_len = packet.len() as u16 + UDP_VXLAN_LEN;
    packet.grow(ENCAPSULATION6_BYTES)?;
    let ip = Ipv6 {
        version_class_flow: Be32::new(6 << 28 | u32::from(remote.tos) << 20 | u32::from(remote.entropy)),
        payload_len: Be16::new(udp_len),
        next_header: PROTO_UDP,
        hop_limit: TTL,
        src: config.vtep,
        dst: peer.vtep,
    };
    let outer = Outer6 {
        ethernet: Ethernet { dst: peer.next_hop, src: peer.source, ethertype: ETHERTYPE_IPV6 },
        ip,
        // Without a checksum, as tunnels may (RFC 6935).
        udp: udp(config, remote, udp_len),
        vxlan: vxlan(),
    };
    packet.store(0, &Headers6 { outer, inner: remote.errand.frame(A::ETHERTYPE) })
}

#[inline(always)]
fn udp(config: &Config, remote: &Remote, len: u16) -> Udp {
    Udp {
        src: Be16::new(SOURCE_PORT_MIN | (remote.entropy & 0x3fff)),
        dst: config.vxlan_port,
        len: Be16::new(len),
        checksum: Be16::new(0),
    }
}

#[inline(always)]
fn vxlan() -> Vxlan {
    Vxlan { flags: VXLAN_FLAGS, vni: Be32::new(VNI_MESH_REQUEST << 8) }
}

/// ECN's "congestion experienced".
const ECN_CE: u8 = 3;

/// A mesh reply inside VXLAN: the ends of the inner packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MeshReply<A> {
    /// Its source, an address of this node.
    pub src: A,
    /// Its destination, the client.
    pub dst: A,
}

/// EtherType of the mesh reply in a VXLAN packet, whose outer headers are `outer`, if it is one that only has to be unpacked
/// and sent on, and bytes of what is around it. Anything else is for the VXLAN device, and so for `from_overlay`.
#[inline(always)]
pub fn reply_within<O: Family>(packet: &impl Packet, outer: &Parsed<O>) -> Option<(Be16, usize)> {
    let udp_offset = if O::FAMILY == 6 { IP_OFFSET + Ipv6::LEN } else { IP_OFFSET + Ipv4::LEN };
    // Congestion that the underlay marked must be told to the inner packet (RFC 6040), which the VXLAN device does.
    if outer.l4_offset != udp_offset || outer.tos & ECN_CE == ECN_CE {
        return None;
    }
    let vxlan: Vxlan = packet.load(udp_offset + Udp::LEN)?;
    if { vxlan.flags } != VXLAN_FLAGS || { vxlan.vni } != Be32::new(VNI_MESH_REPLY << 8) {
        return None;
    }
    let around = udp_offset + Udp::LEN + Vxlan::LEN;
    let ethernet: Ethernet = packet.load(around)?;
    // One that teaches is for `from_overlay` as well.
    backend_of(ethernet.src).is_none().then_some((ethernet.ethertype, around))
}

/// The mesh reply of the family `A` behind `around` bytes, if it is for a client outside of this node.
#[inline(always)]
pub fn mesh_reply<A: Inner>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    config: &Config,
    around: usize,
) -> Option<MeshReply<A>> {
    let (reply, len) = A::ends(packet, around + IP_OFFSET)?;
    let host = A::host(config);
    let sound = around + IP_OFFSET + len <= packet.len() as usize;
    let outside = !reply.dst.is_in(host.alias_net, host.alias_mask) && reply.src != host.mesh;
    (sound && outside && tables.is_local(&reply.src)).then_some(reply)
}

/// A family inside a tunnel.
pub trait Inner: Family {
    /// The ends and the length, bytes, of the packet at `offset`.
    fn ends(packet: &impl Packet, offset: usize) -> Option<(MeshReply<Self>, usize)>;
}

impl Inner for Be32 {
    #[inline(always)]
    fn ends(packet: &impl Packet, offset: usize) -> Option<(MeshReply<Self>, usize)> {
        let ip: Ipv4 = packet.load(offset)?;
        let reply = MeshReply { src: ip.src, dst: ip.dst };
        let header_len = usize::from(ip.version_ihl & 0xf) * 4;
        let len = usize::from({ ip.total_len }.get());
        let sound = ip.version_ihl >> 4 == 4 && header_len >= Ipv4::LEN && len >= header_len;
        sound.then_some((reply, len))
    }
}

impl Inner for Ip6 {
    #[inline(always)]
    fn ends(packet: &impl Packet, offset: usize) -> Option<(MeshReply<Self>, usize)> {
        let ip: Ipv6 = packet.load(offset)?;
        let reply = MeshReply { src: ip.src, dst: ip.dst };
        let len = Ipv6::LEN + usize::from({ ip.payload_len }.get());
        ({ ip.version_class_flow }.get() >> 28 == 6).then_some((reply, len))
    }
}

/// Unpacks a mesh reply of the family `A`, which is behind `around` bytes, and addresses its frame to the next hop.
#[inline(always)]
pub fn decapsulate<A: Family, P: Resize>(
    packet: &mut P,
    around: usize,
    next_hop: [u8; 6],
    source: [u8; 6],
) -> Result<(), Fault> {
    packet.shrink(around as u32)?;
    packet.store(0, &Ethernet { dst: next_hop, src: source, ethertype: A::ETHERTYPE })
}

/// Whether what is behind `around` bytes of a frame of `len` bytes fits a path of `mtu` bytes.
#[inline(always)]
pub const fn fits_unpacked(len: u32, around: usize, mtu: u16) -> bool {
    len <= mtu as u32 + Ethernet::LEN as u32 + around as u32
}
