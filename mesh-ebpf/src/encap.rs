//! VXLAN encapsulation and decapsulation in place, for XDP.

use mesh_common::be::{Be16, Be32};
use mesh_common::mac_of;
use mesh_common::map::{Config, PROTO_UDP, Peer};
use mesh_common::vxlan::{ENCAPSULATION_BYTES, VNI_MESH_REPLY, VNI_MESH_REQUEST};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::checksum;
use crate::header::{ETHERTYPE_IPV4, Ethernet, IP_DF, IP_OFFSET, Ipv4, Outer, Udp, VXLAN_FLAGS, Vxlan};
use crate::packet::{Fault, Packet, Resize};
use crate::parse::Parsed;
use crate::tables::Tables;
use crate::uplink::Remote;

/// Hop limit of the outer header.
const TTL: u8 = 64;
/// First of the UDP source ports that spread flows over paths (RFC 7348, section 5).
const SOURCE_PORT_MIN: u16 = 49_152;

/// The headers of an encapsulated frame, the inner Ethernet header included, in one store.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed(2))]
struct Headers {
    outer: Outer,
    inner: Ethernet,
}

/// Whether a frame of `len` bytes fits a path of `mtu` bytes once encapsulated.
#[inline(always)]
pub const fn fits(len: u32, mtu: u16) -> bool {
    len + ENCAPSULATION_BYTES <= mtu as u32 + Ethernet::LEN as u32
}

/// Puts a mesh request into VXLAN towards `peer`: the outer headers in front, the inner frame addressed to the
/// backend, everything from its IP header on untouched.
#[inline(always)]
pub fn encapsulate<P: Resize>(
    packet: &mut P,
    config: &Config,
    peer: &Peer,
    remote: &Remote,
) -> Result<(), Fault> {
    let inner_len = packet.len();
    packet.grow(ENCAPSULATION_BYTES)?;
    let udp_len = inner_len as u16 + (Udp::LEN + Vxlan::LEN) as u16;
    let mut ip = Ipv4 {
        version_ihl: 0x45,
        tos: remote.tos,
        total_len: Be16::new(udp_len + Ipv4::LEN as u16),
        id: Be16::new(0),
        fragment: IP_DF,
        ttl: TTL,
        protocol: PROTO_UDP,
        checksum: Be16::new(0),
        src: config.vtep,
        dst: peer.vtep,
    };
    ip.checksum = checksum::ipv4(&ip);
    let headers = Headers {
        outer: Outer {
            ethernet: Ethernet { dst: peer.next_hop, src: peer.source, ethertype: ETHERTYPE_IPV4 },
            ip,
            udp: Udp {
                src: Be16::new(SOURCE_PORT_MIN | (remote.entropy & 0x3fff)),
                dst: config.vxlan_port,
                len: Be16::new(udp_len),
                checksum: Be16::new(0),
            },
            vxlan: Vxlan { flags: VXLAN_FLAGS, vni: Be32::new(VNI_MESH_REQUEST << 8) },
        },
        inner: Ethernet { dst: mac_of(remote.addr), src: mac_of(config.vtep), ethertype: ETHERTYPE_IPV4 },
    };
    packet.store(0, &headers)
}

/// ECN's "congestion experienced".
const ECN_CE: u8 = 3;
/// Offset of the UDP header behind an outer IPv4 header without options.
const OUTER_UDP_OFFSET: usize = IP_OFFSET + Ipv4::LEN;

/// A mesh reply inside VXLAN: the ends of the inner packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MeshReply {
    /// Its source, an address of this node.
    pub src: Be32,
    /// Its destination, the client.
    pub dst: Be32,
}

/// The mesh reply in a VXLAN packet, whose outer headers are `outer`, if it is one that only has to be unpacked and sent
/// on; anything else is for the VXLAN device, and so for `from_overlay`.
#[inline(always)]
pub fn mesh_reply(packet: &impl Packet, tables: &impl Tables, outer: &Parsed) -> Option<MeshReply> {
    // Congestion that the underlay marked must be told to the inner packet (RFC 6040), which the VXLAN device does.
    if outer.l4_offset != OUTER_UDP_OFFSET || outer.tos & ECN_CE == ECN_CE {
        return None;
    }
    let vxlan: Vxlan = packet.load(OUTER_UDP_OFFSET + Udp::LEN)?;
    if { vxlan.flags } != VXLAN_FLAGS || { vxlan.vni } != Be32::new(VNI_MESH_REPLY << 8) {
        return None;
    }
    let ethernet: Ethernet = packet.load(Outer::LEN)?;
    let ip: Ipv4 = packet.load(Outer::LEN + IP_OFFSET)?;
    let whole = Outer::LEN + IP_OFFSET + usize::from({ ip.total_len }.get()) <= packet.len() as usize;
    let sound = ethernet.ethertype == ETHERTYPE_IPV4 && ip.version_ihl >> 4 == 4 && whole;
    (sound && tables.is_local(ip.src)).then_some(MeshReply { src: ip.src, dst: ip.dst })
}

/// Unpacks a mesh reply and addresses its frame to the next hop.
#[inline(always)]
pub fn decapsulate<P: Resize>(packet: &mut P, next_hop: [u8; 6], source: [u8; 6]) -> Result<(), Fault> {
    packet.shrink(ENCAPSULATION_BYTES)?;
    packet.store(0, &Ethernet { dst: next_hop, src: source, ethertype: ETHERTYPE_IPV4 })
}

/// Whether what is inside a VXLAN frame of `len` bytes fits a path of `mtu` bytes.
#[inline(always)]
pub const fn fits_unpacked(len: u32, mtu: u16) -> bool {
    len <= mtu as u32 + Ethernet::LEN as u32 + ENCAPSULATION_BYTES
}
