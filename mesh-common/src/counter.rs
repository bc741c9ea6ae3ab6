//! Every way that a packet can end, and its counter.
//!
//! Numbers are grouped by tens and never reused: they are indices of `shoal_counters` and part of the ABI. Names and
//! descriptions serve metrics, the command line and the documentation alike.

/// Entries of `shoal_counters`.
pub const COUNTERS_MAX: u32 = 128;

macro_rules! counters {
    ($($(#[$group:meta])* $variant:ident = $number:literal, $name:literal, $description:literal;)*) => {
        /// One way that a packet can end.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u32)]
        pub enum Counter {
            $($(#[$group])* #[doc = $description] $variant = $number,)*
        }

        impl Counter {
            /// All counters, by number.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in metrics and on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One sentence for people.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$variant => $description,)* }
            }
        }
    };
}

counters! {
    Passed = 0, "passed", "Left to the host's stack: not the mesh's.";

    MeshForwarded = 10, "mesh_forwarded", "Published-port packet sent on to the backend's node.";
    MeshDelivered = 11, "mesh_delivered", "Published-port packet delivered to a task of this node.";
    MeshReturned = 12, "mesh_returned", "Reply to a published-port client sent back to the ingress node.";
    MeshReplied = 13, "mesh_replied", "Reply to a published-port client put on the wire.";
    MeshSearched = 14, "mesh_searched", "Packet whose flow or task isn't known here, sent on to a node that may know it.";

    OverlayForwarded = 20, "overlay_forwarded", "Overlay packet sent to another node.";
    OverlayDelivered = 21, "overlay_delivered", "Overlay packet delivered to a task of this node.";
    ArpAnswered = 22, "arp_answered", "ARP request answered.";
    EchoAnswered = 23, "echo_answered", "ICMP echo to a VIP answered.";
    NeighborAnswered = 24, "neighbor_answered", "IPv6 neighbour solicitation answered.";

    HostEntered = 30, "host_entered", "Packet of a task handed to the host's stack: the way out, or the gateway.";
    HostDelivered = 31, "host_delivered", "Packet from the host's stack delivered to a task.";

    ResetSent = 40, "reset_sent", "TCP reset made, for a packet that was dropped.";
    UnreachableSent = 41, "unreachable_sent", "ICMP unreachable made, for a packet that was dropped.";
    TooBigSent = 42, "too_big_sent", "ICMP with the path's MTU made, for a packet that was dropped.";
    NackSent = 43, "nack_sent", "Word to another node that the task of its packet is not here, for that packet, which was dropped.";
    NackHeard = 44, "nack_heard", "Word of another node that a task is not there; the agent sends it nothing for a while.";

    DropMalformed = 50, "drop_malformed", "Headers truncated, or lying about their lengths.";
    DropFragment = 51, "drop_fragment", "Fragment of a packet whose first fragment, with the ports, has not been seen.";
    DropProtocol = 52, "drop_protocol", "Neither IP nor ARP, or a protocol that can't be balanced.";

    DropSpoofedMac = 60, "drop_spoofed_mac", "From a task, with an Ethernet source that isn't its own.";
    DropSpoofedSource = 61, "drop_spoofed_source", "From a task, with a source address that isn't its own.";
    DropNotMember = 62, "drop_not_member", "VXLAN from an address that is no node's.";
    DropForeignSource = 63, "drop_foreign_source", "Overlay packet whose source doesn't live on the node that sent it.";
    DropTunnelFromTask = 64, "drop_tunnel_from_task", "A task tried to send VXLAN into the underlay, or to a node's address in WireGuard.";
    DropCleartext = 65, "drop_cleartext", "In cleartext what nodes send each other encrypted, or from WireGuard's addresses outside of it.";
    DropMoved = 66, "drop_moved", "For a task that no longer has the address: another one has it by now.";

    DropNoEndpoint = 70, "drop_no_endpoint", "No endpoint of the network has the destination address.";
    DropNoBackend = 71, "drop_no_backend", "The service has no running task.";
    DropBackendGone = 72, "drop_backend_gone", "Mesh request for a task that this node doesn't run.";
    DropNotPublished = 73, "drop_not_published", "Mesh request for a port that is not published here.";
    DropReplyNotLocal = 74, "drop_reply_not_local", "Mesh reply whose source is no address of this node.";
    DropUnknownInterface = 75, "drop_unknown_interface", "From an interface that is no task's.";
    DropUnknownAlias = 76, "drop_unknown_alias", "From the host, for an alias that is no task's.";
    DropUnknownVni = 77, "drop_unknown_vni", "VXLAN with an identifier that is neither a network's nor the mesh's.";
    DropPortsTaken = 78, "drop_ports_taken", "A client dials one task by so many nodes' addresses from one port that no other is left.";

    DropFlowGone = 79, "drop_flow_gone", "TCP segment of a connection that no node knows, or that its task's end cut.";

    DropInternal = 80, "drop_internal", "Out of an internal network.";
    DropMulticast = 81, "drop_multicast", "Multicast or broadcast, which overlays don't carry.";
    DropLinkLocal = 82, "drop_link_local", "To the node-local alias addresses.";
    DropSourceRefused = 83, "drop_source_refused", "From a client that the service's rules don't let in.";
    DropUnrelated = 84, "drop_unrelated", "ICMP error about a flow that isn't known, or word of a task's absence from a node that it isn't sent to.";

    DropNoRoute = 90, "drop_no_route", "The host has no route to the destination, or the node that it is for is none any more.";
    DropRewriteFailed = 91, "drop_rewrite_failed", "The kernel refused to change the packet.";
    DropNotReady = 92, "drop_not_ready", "The agent hasn't configured the programs yet.";
    DropTooBig = 93, "drop_too_big", "Larger than the way to the other node or the client carries, and fragmented by nobody on it.";
}

impl Counter {
    /// Whether packets that end this way are lost.
    pub const fn is_drop(self) -> bool {
        self as u32 >= Self::DropMalformed as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_ascend_and_fit_the_map() {
        assert!(Counter::ALL.windows(2).all(|pair| (pair[0] as u32) < pair[1] as u32));
        assert!(Counter::ALL.iter().all(|counter| (*counter as u32) < COUNTERS_MAX));
    }

    #[test]
    fn the_name_says_whether_it_is_a_drop() {
        assert!(Counter::ALL.iter().all(|counter| counter.is_drop() == counter.name().starts_with("drop_")));
    }
}
