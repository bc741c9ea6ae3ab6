//! What the packet logic needs of the tables: the maps of `mesh_common::map`, read by key.
//!
//! Only the flow table is written, and a write may be refused: it is a cache.

use mesh_common::be::Be32;
use mesh_common::map::{
    AddrKey, Alias, Backend, Config, Endpoint, Flow, FlowKey, Iface, Peer, Port, PortKey, Service,
};

/// The tables of a node.
pub trait Tables {
    /// The node's own facts; `None` until the agent has written them.
    fn config(&self) -> Option<&Config>;
    /// Whether an address is the node's own.
    fn is_local(&self, addr: Be32) -> bool;
    /// What a published port leads to.
    fn port(&self, key: &PortKey) -> Option<&Port>;
    /// The slot of the service with a VIP.
    fn vip(&self, key: &AddrKey) -> Option<u32>;
    /// A service.
    fn service(&self, slot: u32) -> Option<&Service>;
    /// The backend's slot at a place of the Maglev tables.
    fn maglev(&self, place: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, slot: u32) -> Option<&Backend>;
    /// An endpoint.
    fn endpoint(&self, key: &AddrKey) -> Option<&Endpoint>;
    /// A local task's interface.
    fn iface(&self, ifindex: u32) -> Option<&Iface>;
    /// The endpoint behind an alias.
    fn alias(&self, addr: Be32) -> Option<&Alias>;
    /// The peer's slot of the node with a VTEP.
    fn member(&self, vtep: Be32) -> Option<u32>;
    /// Another node.
    fn peer(&self, slot: u32) -> Option<&Peer>;
    /// What is done to a flow.
    fn flow(&self, key: &FlowKey) -> Option<Flow>;
    /// Remembers what is done to a flow.
    fn insert_flow(&self, key: &FlowKey, flow: &Flow);
}
