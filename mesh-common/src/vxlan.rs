//! Numbers of the VXLAN encapsulation (RFC 7348) as Shoal uses it.

/// Mesh requests: published-port packets on the way to the backend's node, unchanged but for the inner Ethernet header.
/// Its destination is [`backend_mac`](crate::addr::backend_mac) of the chosen backend. Its source is 02, how many nodes
/// have been asked for the packet's flow before, and [`tag_of`](crate::map::tag_of) the ingress node's VTEP.
pub const VNI_MESH_REQUEST: u32 = 1;
/// Mesh replies: packets on the way back to the ingress node, already carrying the dialled address and port.
pub const VNI_MESH_REPLY: u32 = 2;
/// The first VNI of networks, as in Docker.
pub const VNI_NETWORK_MIN: u32 = 4096;

/// Ethernet, IPv4, UDP and VXLAN headers in front of the inner frame, bytes.
pub const ENCAPSULATION_BYTES: u32 = 14 + 20 + 8 + 8;
/// Ethernet, IPv6, UDP and VXLAN headers in front of the inner frame, bytes.
pub const ENCAPSULATION6_BYTES: u32 = 14 + 40 + 8 + 8;

/// What encapsulation takes from the MTU of an underlay of this family (6, otherwise 4): the inner Ethernet header
/// instead of the outer one, bytes.
pub const fn mtu_overhead_bytes(family: u8) -> u32 {
    if family == 6 { ENCAPSULATION6_BYTES } else { ENCAPSULATION_BYTES }
}
