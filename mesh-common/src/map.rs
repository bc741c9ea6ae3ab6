//! Keys and values of the BPF maps.
//!
//! What holds addresses exists once a family: the map's name ends in `4` or `6`, and its types are generic over
//! [`Address`].
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `shoal_config` | 0 | [`Config`] | agent |
//! | `shoal_locals4/6` | address of the node | 1 | agent |
//! | `shoal_ports` | [`PortKey`] | [`Port`] | agent |
//! | `shoal_rules4/6` | [`RuleKey`], longest prefix | [`RULE_ALLOW`] or [`RULE_DENY`] | agent |
//! | `shoal_vips4/6` | [`AddrKey`] | service slot | agent |
//! | `shoal_services` | service slot | [`Service`] | agent |
//! | `shoal_places` | place | backend slot, or peer slot | agent |
//! | `shoal_backends4/6` | backend slot | [`Backend`] | agent |
//! | `shoal_tasks4/6` | [`TaskKey`] | [`TaskSlots`] | agent |
//! | `shoal_endpts4/6` | [`AddrKey`] | [`Endpoint`] | agent |
//! | `shoal_ifaces4/6` | ifindex | [`Iface`] | agent |
//! | `shoal_aliases4/6` | alias | [`Alias`] | agent |
//! | `shoal_members` | VTEP, [`Ip6`] | peer slot | agent |
//! | `shoal_tags` | [`tag_of`] a VTEP | peer slot | agent |
//! | `shoal_peers` | peer slot | [`Peer`] | agent (address), programs (next hop) |
//! | `shoal_sent4/6` | [`FlowKey`] | [`Sent`] | programs; LRU |
//! | `shoal_opening4/6` | [`FlowKey`] | [`Flow`] | programs; LRU |
//! | `shoal_flows4/6` | [`FlowKey`] | [`Flow`] | programs; LRU |
//! | `shoal_frags4/6` | [`FragmentKey`] | [`FragmentPorts`] | programs; LRU |
//! | `shoal_dialled` | socket cookie | [`Dialled`] | programs; LRU |
//! | `shoal_counters` | [`Counter`](crate::counter::Counter) | `u64`, per CPU | programs |
//! | `shoal_examples` | [`Counter`](crate::counter::Counter) | [`Example`] | programs |
//! | `shoal_events` | | [`Example`]s, a ring | programs |
//! | `shoal_nacks` | | [`Nack`]s, a ring | programs |
//! | `shoal_budgets` | what is limited | [`Budget`], per CPU | programs |
//!
//! Slots start at 1: 0 is "none". All scalars are in host order unless their type says otherwise.
//!
//! Three tables hold flows, so that a flood of packets that lead to nothing pushes out only what nobody needs:
//! `sent` is a cache of what the Maglev tables say about other nodes' tasks, `opening` has the flows of which not both
//! sides have been heard, `flows` those that both sides have agreed to.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Address, Ip6};
use crate::be::{Be16, Be32};

/// IP protocol number of ICMP.
pub const PROTO_ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const PROTO_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTO_UDP: u8 = 17;
/// IP protocol number of ICMPv6.
pub const PROTO_ICMP6: u8 = 58;

/// Entries of `shoal_services`.
pub const SERVICES_MAX: u32 = 32_768;
/// Entries of `shoal_backends4/6` and `shoal_tasks4/6`.
pub const BACKENDS_MAX: u32 = 131_072;
/// Entries of `shoal_places`.
pub const PLACES_MAX: u32 = 8 << 20;
/// Entries of `shoal_peers`, `shoal_members` and `shoal_tags`.
pub const PEERS_MAX: u32 = 4_096;
/// Entries of `shoal_ports`.
pub const PORTS_MAX: u32 = 131_072;
/// Entries of `shoal_rules4/6`.
pub const RULES_MAX: u32 = 65_536;
/// Entries of `shoal_vips4/6`.
pub const VIPS_MAX: u32 = 32_768;
/// Entries of `shoal_endpts4/6`.
pub const ENDPOINTS_MAX: u32 = 131_072;
/// Entries of `shoal_ifaces4/6` and `shoal_aliases4/6`: what the alias subnet holds.
pub const IFACES_MAX: u32 = 16_384;
/// Entries of `shoal_locals4/6`.
pub const LOCALS_MAX: u32 = 1_024;
/// Entries of `shoal_flows4/6` and `shoal_sent4/6` unless the agent is told otherwise.
pub const FLOWS_MAX_DEFAULT: u32 = 131_072;
/// Entries of `shoal_opening4/6`.
pub const OPENING_MAX: u32 = 65_536;
/// Entries of `shoal_frags4/6`.
pub const FRAGMENTS_MAX: u32 = 8_192;
/// Entries of `shoal_dialled`.
pub const DIALLED_MAX: u32 = 65_536;
/// Bytes of `shoal_events`.
pub const EVENTS_BYTES: u32 = 256 << 10;
/// Bytes of `shoal_nacks`.
pub const NACKS_BYTES: u32 = 64 << 10;

/// How long a peer's next hop is used before the programs look it up again, ns.
pub const NEXT_HOP_TTL_NS: u64 = 1_000_000_000;
/// How long a UDP flow may be silent before its next packet chooses a backend anew, s.
pub const UDP_IDLE_S: u32 = 120;
/// How long a TCP flow is kept after its backend has closed it, s.
pub const TCP_CLOSED_S: u32 = 60;
/// How long the ports of a fragmented packet are remembered, s: as long as a Linux host keeps its fragments.
pub const FRAGMENTS_S: u32 = 30;
/// The least time between two examples of one counter, ns.
pub const EXAMPLE_PERIOD_NS: u64 = 100_000_000;
/// Most nodes that a packet without a flow is sent to, one after another, in search of the one that knows it.
pub const SEARCH_MAX: u8 = 16;

macro_rules! abi {
    ($($(#[$doc:meta])* struct $name:ident $(<$addr:ident>)? ($size:literal $(| $size6:literal)?, align $align:literal) {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        #[derive(FromBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name $(<$addr>)? {
            $($(#[$field_doc])* pub $field: $type,)*
        }
        abi!(@assert $name $(<$addr>)? ($size $(| $size6)?, align $align) {$($field: $type,)*});
    )*};
    // Neither has padding: the size is that of the fields.
    (@assert $name:ident ($size:literal, align $align:literal) {$($field:ident: $type:ty,)*}) => {
        const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() == $align);
        const _: () = assert!($(size_of::<$type>() +)* 0 == $size);

        #[cfg(feature = "user")]
        // SAFETY: `FromBytes` holds, so any bytes are a value; the assertions above say that none is padding.
        unsafe impl aya::Pod for $name {}
    };
    (@assert $name:ident <$addr:ident> ($size:literal | $size6:literal, align $align:literal) {
        $($field:ident: $type:ty,)*
    }) => {
        const _: () = {
            type $addr = Be32;
            assert!(size_of::<$name<$addr>>() == $size && align_of::<$name<$addr>>() == $align);
            assert!($(size_of::<$type>() +)* 0 == $size);
        };
        const _: () = {
            type $addr = Ip6;
            assert!(size_of::<$name<$addr>>() == $size6 && align_of::<$name<$addr>>() == $align);
            assert!($(size_of::<$type>() +)* 0 == $size6);
        };

        #[cfg(feature = "user")]
        // SAFETY: As for the types without a family.
        unsafe impl<$addr: Address> aya::Pod for $name<$addr> {}
    };
}

#[cfg(feature = "user")]
// SAFETY: A transparent wrapper of an integer.
unsafe impl aya::Pod for Be16 {}
#[cfg(feature = "user")]
// SAFETY: A transparent wrapper of an integer.
unsafe impl aya::Pod for Be32 {}
#[cfg(feature = "user")]
// SAFETY: A transparent wrapper of integers.
unsafe impl aya::Pod for Ip6 {}

abi! {
    /// What the programs know of their node.
    struct Config(168, align 8) {
        /// Seed of [`flow_hash`](crate::hash::flow_hash), the cluster's.
        hash_seed: u64,
        /// The node's VXLAN address, IPv4 in its mapped form; all zero: not configured yet.
        vtep: Ip6,
        /// The address that what is encrypted is sent from, of [`WIREGUARD_NET`](crate::addr::WIREGUARD_NET); all zero: none.
        wireguard: Ip6,
        /// How tasks and the host's stack see one another, IPv4.
        host4: Host<Be32>,
        /// The same, IPv6.
        host6: Host<Ip6>,
        /// The VXLAN device.
        vxlan_ifindex: u32,
        /// `shoal0`: where packets for the host's stack enter.
        host_ifindex: u32,
        /// [`tag_of`] the node's VTEP.
        tag: u32,
        /// [`tag_of`] its address in WireGuard.
        wireguard_tag: u32,
        /// UDP port of VXLAN.
        vxlan_port: Be16,
        /// Bytes that every way to another node carries, whatever the kernel was told by ICMP errors.
        path_mtu_min: u16,
        /// Zero.
        reserved: [u16; 4],
    }

    /// The node-local addresses of one family.
    struct Host<A>(20 | 80, align 4) {
        /// Address of `shoal0`: what tasks reach under their gateway's address.
        addr: A,
        /// Where local processes' sockets are sent that dial a published port.
        mesh: A,
        /// What tasks see such a process under: an address that no other node has.
        client: A,
        /// The aliases' subnet.
        alias_net: A,
        /// Its mask.
        alias_mask: A,
    }

    /// A flow in one direction, as its packets are seen.
    struct FlowKey<A>(16 | 40, align 4) {
        /// Source address.
        src: A,
        /// Destination address.
        dst: A,
        /// Source port.
        src_port: Be16,
        /// Destination port.
        dst_port: Be16,
        /// The network's VNI in the upper 24 bits ([`VNI_MESH_REQUEST`](crate::vxlan::VNI_MESH_REQUEST) for published ports), the IP protocol
        /// in the lower 8.
        scope: u32,
    }

    /// What is done to the packets of a flow.
    struct Flow<A>(28 | 40, align 4) {
        /// The backend's slot ([`FlowKind::TO_BACKEND`], [`FlowKind::TO_SELF`]); otherwise 0.
        backend: u32,
        /// Incarnation of the backend; the entry is void once the slot, or the interface, holds another.
        incarnation: u32,
        /// The ingress node's peer slot; 0: this node. Replies go back to it, or straight from here if the service says so.
        peer: u32,
        /// In `opening`, towards the client: what an acknowledgement of the backend's first segment says (TCP), or whether
        /// the backend has answered (UDP). In `flows`: s of the monotonic clock when a UDP packet was last seen, or when the
        /// backend closed a TCP connection.
        stamp: u32,
        /// Source address to write ([`FlowKind::MESH_REPLY`], [`FlowKind::VIP_REPLY`], [`FlowKind::SELF_REPLY`]); otherwise 0.
        addr: A,
        /// Port to write: destination towards a backend, source on the way back.
        port: Be16,
        /// The client's port, to write at its end of a published port's flow: the one that the task sees it under on
        /// the way there, the client's own on the way back.
        client_port: Be16,
        /// What kind of flow.
        kind: FlowKind,
        /// [`FLOW_CLOSED`], [`FLOW_DIRECT`], [`FLOW_TEACH`].
        flags: u8,
        /// Zero.
        reserved: u16,
    }

    /// A flow whose packets go on to another node.
    struct Sent(12, align 4) {
        /// The backend's slot.
        backend: u32,
        /// Its incarnation; the entry is void once the slot holds another.
        incarnation: u32,
        /// When a UDP packet was last seen, s of the monotonic clock; 0 for TCP.
        stamp: u32,
    }

    /// A fragmented packet.
    struct FragmentKey<A>(16 | 40, align 4) {
        /// Source address.
        src: A,
        /// Destination address.
        dst: A,
        /// Identification of the fragments of one packet.
        id: u32,
        /// As in [`FlowKey`].
        scope: u32,
    }

    /// What the first fragment of a packet said.
    struct FragmentPorts(8, align 4) {
        /// Source port.
        src_port: Be16,
        /// Destination port.
        dst_port: Be16,
        /// When, s of the monotonic clock.
        stamp: u32,
    }

    /// A task as the target of balancing, in one network.
    struct Backend<A>(24 | 36, align 4) {
        /// Its address.
        addr: A,
        /// Its network.
        vni: u32,
        /// Its node: a peer's slot; 0: this node.
        peer: u32,
        /// Host side of its interface, if on this node.
        ifindex: u32,
        /// Never 0 in a used slot, and never the same for two tasks.
        incarnation: u32,
        /// [`BACKEND_DRAINING`], [`BACKEND_ENCRYPTED`].
        flags: u32,
    }

    /// A service's balancing in one network and family.
    struct Service(20, align 4) {
        /// First place of its Maglev table; behind the table come its nodes.
        start: u32,
        /// Places in its Maglev table; 0: no backend.
        len: u32,
        /// The nodes that have backends of it, draining ones included: peer slots in the order of their VTEPs, 0 for this
        /// node.
        nodes: u32,
        /// Its network.
        vni: u32,
        /// [`SERVICE_AFFINITY`], [`SERVICE_DIRECT`], [`SERVICE_SOURCES`], [`SERVICE_ADDRESSES`], [`SERVICE_ENCRYPTED`].
        flags: u32,
    }

    /// A published port.
    #[derive(IntoBytes)]
    struct PortKey(4, align 2) {
        /// The port that clients dial.
        port: Be16,
        /// TCP or UDP.
        protocol: u8,
        /// [`Address::FAMILY`].
        family: u8,
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

    /// Whom a service lets in, or which addresses it answers on: what follows the prefix length in `shoal_rules4/6`.
    struct RuleKey<A>(8 | 20, align 4) {
        /// The service's slot, shifted left by one; the lowest bit tells the client's addresses (0) from the dialled
        /// ones (1). In network order: prefixes count from the highest bit.
        scope: Be32,
        /// The address.
        addr: A,
    }

    /// An address in a network.
    struct AddrKey<A>(8 | 20, align 4) {
        /// The network.
        vni: u32,
        /// The address.
        addr: A,
    }

    /// A task in a network.
    struct TaskKey(8, align 4) {
        /// Its incarnation.
        incarnation: u32,
        /// The network.
        vni: u32,
    }

    /// A task's numbers.
    struct TaskSlots(8, align 4) {
        /// Its slot as a backend.
        backend: u32,
        /// Slot of its service.
        service: u32,
    }

    /// A task's attachment to a network, anywhere in the cluster.
    struct Endpoint(12, align 4) {
        /// Its node: a peer's slot; 0: this node.
        peer: u32,
        /// Host side of its interface, if on this node.
        ifindex: u32,
        /// The task's incarnation.
        incarnation: u32,
    }

    /// A local task's interface, by the index of its host side.
    struct Iface<A>(28 | 76, align 4) {
        /// The address that the task may send from.
        addr: A,
        /// The network's gateway.
        gateway: A,
        /// Mask of the subnet.
        mask: A,
        /// The node-local address that the host's stack knows the endpoint by.
        alias: A,
        /// Its network.
        vni: u32,
        /// The task's incarnation.
        incarnation: u32,
        /// [`IFACE_INTERNAL`].
        flags: u32,
    }

    /// The endpoint behind an alias.
    struct Alias<A>(16 | 40, align 4) {
        /// Its address in its network.
        addr: A,
        /// Its network's gateway.
        gateway: A,
        /// Host side of its interface.
        ifindex: u32,
        /// Its network.
        vni: u32,
    }

    /// A way to another node: to its VTEP, or to its address in WireGuard.
    struct Peer(48, align 8) {
        /// Until when the next hop below holds, ns of the monotonic clock; 0: unknown.
        expires_ns: u64,
        /// Where VXLAN is sent, IPv4 in its mapped form.
        vtep: Ip6,
        /// The interface towards it.
        ifindex: u32,
        /// Ethernet address of the next hop.
        next_hop: [u8; 6],
        /// Ethernet address of the interface.
        source: [u8; 6],
        /// MTU of the route, bytes.
        mtu: u16,
        /// Zero.
        reserved: [u16; 3],
    }

    /// What a local process dialled, by its socket.
    struct Dialled(20, align 4) {
        /// The address, IPv4 in its mapped form.
        addr: Ip6,
        /// The port.
        port: Be16,
        /// Zero.
        reserved: u16,
    }

    /// The last packet of a kind, or one of them in the ring of events.
    struct Example(120, align 8) {
        /// When, ns of the monotonic clock.
        time_ns: u64,
        /// How it ended: a [`Counter`](crate::counter::Counter).
        counter: u32,
        /// The interface that it came in by.
        ifindex: u32,
        /// Its length from the Ethernet header on, bytes.
        len: u32,
        /// Bytes of `head` that are its own.
        head_len: u32,
        /// Its first bytes.
        head: [[u8; 32]; 3],
    }

    /// A task that is not where this node sends what is for it, as that node says.
    struct Nack(8, align 4) {
        /// The task's incarnation.
        incarnation: u32,
        /// The network.
        vni: u32,
    }

    /// How much of something was done lately.
    struct Budget(16, align 8) {
        /// When the present period began, ns of the monotonic clock.
        since_ns: u64,
        /// How often it was done since.
        spent: u64,
    }
}

/// Mark of a packet (`skb->mark`) that the programs send into WireGuard's network: "SHWG".
pub const WIREGUARD_MARK: u32 = 0x5348_5747;

/// The backend gets no new flows.
pub const BACKEND_DRAINING: u32 = 1;
/// What other nodes send to it is encrypted.
pub const BACKEND_ENCRYPTED: u32 = 2;
/// The interface's network has no way out.
pub const IFACE_INTERNAL: u32 = 1;

/// A client's flows all go to one backend.
pub const SERVICE_AFFINITY: u32 = 1;
/// Replies to clients of published ports don't go by the ingress node.
pub const SERVICE_DIRECT: u32 = 2;
/// `shoal_rules4/6` say which clients are let in.
pub const SERVICE_SOURCES: u32 = 4;
/// `shoal_rules4/6` say which of the node's addresses answer.
pub const SERVICE_ADDRESSES: u32 = 8;
/// Nodes send each other nothing of it in cleartext.
pub const SERVICE_ENCRYPTED: u32 = 16;

/// The backend has closed the connection.
pub const FLOW_CLOSED: u8 = 1;
/// Replies leave from this node, whatever the ingress node.
pub const FLOW_DIRECT: u8 = 2;
/// The ingress node sent a packet to the wrong node, and is to be told which one is right.
pub const FLOW_TEACH: u8 = 4;

/// A match in `shoal_rules4/6`: let in, or answers.
pub const RULE_ALLOW: u32 = 1;
/// A match in `shoal_rules4/6`: refused.
pub const RULE_DENY: u32 = 2;

/// Element of `shoal_budgets`: errors sent to clients and tasks.
pub const BUDGET_ERRORS: u32 = 0;
/// Element of `shoal_budgets`: packets sent in search of the node that knows their flow.
pub const BUDGET_SEARCHES: u32 = 1;
/// Entries of `shoal_budgets`.
pub const BUDGETS_MAX: u32 = 2;
/// How often a second, and CPU, each budget may be spent.
pub const BUDGET_PER_S: u64 = 2_000;

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

impl<A: Address> FlowKey<A> {
    /// The key of the flow `tuple` in the network `vni`.
    #[inline(always)]
    pub const fn new(tuple: &crate::hash::Tuple<A>, vni: u32) -> Self {
        let crate::hash::Tuple { src, dst, src_port, dst_port, protocol } = *tuple;
        Self { src, dst, src_port, dst_port, scope: vni << 8 | protocol as u32 }
    }

    /// The flow's IP protocol.
    pub const fn protocol(&self) -> u8 {
        self.scope as u8
    }

    /// The flow's VNI.
    pub const fn vni(&self) -> u32 {
        self.scope >> 8
    }
}

impl PortKey {
    /// The key of `port` for an IP protocol and the family of `A`.
    #[inline(always)]
    pub const fn new<A: Address>(protocol: u8, port: Be16) -> Self {
        Self { port, protocol, family: A::FAMILY }
    }
}

impl<A: Address> RuleKey<A> {
    /// Bits of `scope`, which come before those of the address in a prefix.
    pub const SCOPE_BITS: u32 = 32;

    /// The rule of `service` for a client's address.
    #[inline(always)]
    pub const fn source(service: u32, addr: A) -> Self {
        Self { scope: Be32::new(service << 1), addr }
    }

    /// The rule of `service` for a dialled address.
    #[inline(always)]
    pub const fn dialled(service: u32, addr: A) -> Self {
        Self { scope: Be32::new(service << 1 | 1), addr }
    }
}

impl Config {
    /// The address of this node that VXLAN to a peer comes from.
    #[inline(always)]
    pub fn vtep_towards(&self, peer: &Peer) -> Ip6 {
        if peer.vtep.is_wireguard() { self.wireguard } else { self.vtep }
    }
}

/// What stands for a VTEP where there is room for 32 bits only: an IPv4 address as it is, an IPv6 address folded.
#[inline(always)]
pub fn tag_of(vtep: Ip6) -> u32 {
    match vtep.to_mapped() {
        Some(addr) => addr.get(),
        None => vtep.folded(),
    }
}
