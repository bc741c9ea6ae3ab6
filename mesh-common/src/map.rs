//! Keys and values of the BPF maps.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `shoal_config` | 0 | [`Config`] | agent |
//! | `shoal_locals` | [`Be32`] address of the node | 1 | agent |
//! | `shoal_ports` | [`PortKey`] | [`Port`] | agent |
//! | `shoal_vips` | [`AddrKey`] | service slot | agent |
//! | `shoal_services` | service slot | [`Service`] | agent |
//! | `shoal_maglev` | place | backend slot | agent |
//! | `shoal_backends` | backend slot | [`Backend`] | agent |
//! | `shoal_endpts` | [`AddrKey`] | [`Endpoint`] | agent |
//! | `shoal_ifaces` | ifindex | [`Iface`] | agent |
//! | `shoal_aliases` | [`Be32`] alias | [`Alias`] | agent |
//! | `shoal_members` | [`Be32`] VTEP | peer slot | agent |
//! | `shoal_peers` | peer slot | [`Peer`] | agent (address), programs (next hop) |
//! | `shoal_flows` | [`FlowKey`] | [`Flow`] | programs; LRU |
//! | `shoal_counters` | [`Counter`](crate::counter::Counter) | `u64`, per CPU | programs |
//!
//! Slots start at 1: 0 is "none". All scalars are in host order unless their type says otherwise.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::be::{Be16, Be32};

/// IP protocol number of ICMP.
pub const PROTO_ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const PROTO_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTO_UDP: u8 = 17;

/// Entries of `shoal_services`.
pub const SERVICES_MAX: u32 = 16_384;
/// Entries of `shoal_backends`.
pub const BACKENDS_MAX: u32 = 131_072;
/// Entries of `shoal_maglev`.
pub const MAGLEV_MAX: u32 = 4 << 20;
/// Entries of `shoal_peers` and `shoal_members`.
pub const PEERS_MAX: u32 = 4_096;
/// Entries of `shoal_ports`.
pub const PORTS_MAX: u32 = 65_536;
/// Entries of `shoal_vips`.
pub const VIPS_MAX: u32 = 16_384;
/// Entries of `shoal_endpts`.
pub const ENDPOINTS_MAX: u32 = 131_072;
/// Entries of `shoal_ifaces` and `shoal_aliases`: what the alias subnet holds.
pub const IFACES_MAX: u32 = 16_384;
/// Entries of `shoal_locals`.
pub const LOCALS_MAX: u32 = 1_024;
/// Entries of `shoal_flows` unless the agent is told otherwise.
pub const FLOWS_MAX_DEFAULT: u32 = 262_144;

/// How long a peer's next hop is used before the programs look it up again, ns.
pub const NEXT_HOP_TTL_NS: u64 = 1_000_000_000;

macro_rules! abi {
    ($($(#[$doc:meta])* struct $name:ident($size:literal, align $align:literal) {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() == $align);

        #[cfg(feature = "user")]
        // SAFETY: `FromBytes` and `IntoBytes` hold: any bytes are a value, and no byte of a value is padding.
        unsafe impl aya::Pod for $name {}
    )*};
}

#[cfg(feature = "user")]
// SAFETY: A transparent wrapper of an integer.
unsafe impl aya::Pod for Be16 {}
#[cfg(feature = "user")]
// SAFETY: A transparent wrapper of an integer.
unsafe impl aya::Pod for Be32 {}

abi! {
    /// What the programs know of their node.
    struct Config(48, align 8) {
        /// Seed of [`flow_hash`](crate::hash::flow_hash), the cluster's.
        hash_seed: u64,
        /// The node's VXLAN address.
        vtep: Be32,
        /// The VXLAN device.
        vxlan_ifindex: u32,
        /// `shoal0`: where packets for the host's stack enter.
        host_ifindex: u32,
        /// Address of `shoal0`: what tasks reach under their gateway's address.
        host_addr: Be32,
        /// The aliases' subnet.
        alias_net: Be32,
        /// Its mask.
        alias_mask: Be32,
        /// UDP port of VXLAN.
        vxlan_port: Be16,
        /// The underlay's MTU, bytes.
        underlay_mtu: u16,
        /// Zero.
        reserved: [u32; 3],
    }

    /// A flow in one direction, as its packets are seen.
    struct FlowKey(16, align 4) {
        /// Source address.
        src: Be32,
        /// Destination address.
        dst: Be32,
        /// Source port.
        src_port: Be16,
        /// Destination port.
        dst_port: Be16,
        /// The network's VNI in the upper 24 bits ([`VNI_MESH_REQUEST`](crate::vxlan::VNI_MESH_REQUEST) for published ports), the IP protocol
        /// in the lower 8.
        scope: u32,
    }

    /// What is done to the packets of a flow.
    struct Flow(24, align 4) {
        /// The backend's slot ([`FlowKind::TO_BACKEND`], [`FlowKind::TO_SELF`]); otherwise 0.
        backend: u32,
        /// Incarnation of the backend; the entry is void once the slot, or the interface, holds another.
        incarnation: u32,
        /// Source address to write ([`FlowKind::MESH_REPLY`], [`FlowKind::VIP_REPLY`], [`FlowKind::SELF_REPLY`]); otherwise 0.
        addr: Be32,
        /// The ingress node that replies go back to; 0: they leave from here.
        vtep: Be32,
        /// Port to write: destination towards a backend, source on the way back.
        port: Be16,
        /// The client's port, to write at its end of a published port's flow: the one that the task sees it under on
        /// the way there, the client's own on the way back.
        client_port: Be16,
        /// What kind of flow.
        kind: FlowKind,
        /// Zero.
        reserved: [u8; 3],
    }

    /// A task as the target of balancing, in one network.
    struct Backend(24, align 4) {
        /// Its address.
        addr: Be32,
        /// Its network.
        vni: u32,
        /// Its node: a peer's slot; 0: this node.
        peer: u32,
        /// Host side of its interface, if on this node.
        ifindex: u32,
        /// Never 0 in a used slot, and never the same for two tasks.
        incarnation: u32,
        /// [`BACKEND_DRAINING`].
        flags: u32,
    }

    /// A service's balancing in one network.
    struct Service(16, align 4) {
        /// First place of its Maglev table.
        maglev_start: u32,
        /// Places in its Maglev table; 0: no backend.
        maglev_len: u32,
        /// Its network.
        vni: u32,
        /// Zero.
        reserved: u32,
    }

    /// A published port.
    struct PortKey(4, align 2) {
        /// The port that clients dial.
        port: Be16,
        /// TCP or UDP.
        protocol: u8,
        /// Zero.
        reserved: u8,
    }

    /// What a published port leads to.
    struct Port(8, align 4) {
        /// The service's slot.
        service: u32,
        /// The port that tasks listen on.
        target: Be16,
        /// Zero.
        reserved: u16,
    }

    /// An address in a network.
    struct AddrKey(8, align 4) {
        /// The network.
        vni: u32,
        /// The address.
        addr: Be32,
    }

    /// A task's attachment to a network, anywhere in the cluster.
    struct Endpoint(24, align 4) {
        /// Its node: a peer's slot; 0: this node.
        peer: u32,
        /// VTEP of its node; 0: this node.
        vtep: Be32,
        /// Host side of its interface, if on this node.
        ifindex: u32,
        /// The task's incarnation.
        incarnation: u32,
        /// Slot of its service in this network.
        service: u32,
        /// Its slot as a backend of that service; 0 if it takes no traffic.
        backend: u32,
    }

    /// A local task's interface, by the index of its host side.
    struct Iface(32, align 4) {
        /// Its network.
        vni: u32,
        /// The address that the task may send from.
        addr: Be32,
        /// The network's gateway.
        gateway: Be32,
        /// Mask of the subnet.
        mask: Be32,
        /// The node-local address that the host's stack knows the endpoint by.
        alias: Be32,
        /// The task's incarnation.
        incarnation: u32,
        /// [`IFACE_INTERNAL`].
        flags: u32,
        /// Zero.
        reserved: u32,
    }

    /// The endpoint behind an alias.
    struct Alias(16, align 4) {
        /// Its address in its network.
        addr: Be32,
        /// Its network's gateway.
        gateway: Be32,
        /// Host side of its interface.
        ifindex: u32,
        /// Its network.
        vni: u32,
    }

    /// Another node, and how to reach it.
    struct Peer(32, align 8) {
        /// Until when the next hop below holds, ns of the monotonic clock; 0: unknown.
        expires_ns: u64,
        /// Its VXLAN address.
        vtep: Be32,
        /// The interface towards it.
        ifindex: u32,
        /// Ethernet address of the next hop.
        next_hop: [u8; 6],
        /// Ethernet address of the interface.
        source: [u8; 6],
        /// MTU of the route, bytes.
        mtu: u16,
        /// Zero.
        reserved: u16,
    }
}

/// The backend gets no new flows.
pub const BACKEND_DRAINING: u32 = 1;
/// The interface's network has no way out.
pub const IFACE_INTERNAL: u32 = 1;

/// What kind of flow an entry describes.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct FlowKind(pub u8);

impl FlowKind {
    /// Towards a backend: the destination becomes the backend's.
    pub const TO_BACKEND: Self = Self(1);
    /// Towards a backend that is the client itself, by its VIP: the source becomes the gateway as well.
    pub const TO_SELF: Self = Self(2);
    /// From a task to a client of a published port: the source becomes what the client dialled.
    pub const MESH_REPLY: Self = Self(3);
    /// From a backend to a task that dialled a VIP: the source becomes the VIP.
    pub const VIP_REPLY: Self = Self(4);
    /// From a task to itself, answering [`Self::TO_SELF`]: the source becomes the VIP, the destination the task.
    pub const SELF_REPLY: Self = Self(5);
}

impl FlowKey {
    /// The key of the flow `tuple` in the network `vni`.
    #[inline(always)]
    pub const fn new(tuple: &crate::hash::Tuple, vni: u32) -> Self {
        let crate::hash::Tuple { src, dst, src_port, dst_port, protocol } = *tuple;
        Self { src, dst, src_port, dst_port, scope: vni << 8 | protocol as u32 }
    }
}

impl PortKey {
    /// The key of `port` for an IP protocol.
    #[inline(always)]
    pub const fn new(protocol: u8, port: Be16) -> Self {
        Self { port, protocol, reserved: 0 }
    }
}
