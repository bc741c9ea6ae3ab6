//! Numbers of the VXLAN encapsulation (RFC 7348) as Shoal uses it.

/// Mesh requests: published-port packets on the way to the backend's node, unchanged but for the inner Ethernet
/// header, whose destination is [`mac_of`](crate::mac_of) the chosen backend.
pub const VNI_MESH_REQUEST: u32 = 1;
/// Mesh replies: packets on the way back to the ingress node, already carrying the dialled address and port.
pub const VNI_MESH_REPLY: u32 = 2;
/// The first VNI of networks, as in Docker.
pub const VNI_NETWORK_MIN: u32 = 4096;

/// Ethernet, IPv4, UDP and VXLAN headers in front of the inner frame, bytes.
pub const ENCAPSULATION_BYTES: u32 = 14 + 20 + 8 + 8;
/// What encapsulation takes from the underlay's MTU: the inner Ethernet header instead of the outer one, bytes.
pub const MTU_OVERHEAD_BYTES: u32 = ENCAPSULATION_BYTES;
