//! What the packet logic needs of the tables: the maps of `mesh_common::map`, read by key.
//!
//! Only flows are written, and a write may be refused: what can't be remembered is found again, or refused.

use mesh_common::addr::{Address, Ip6};
use mesh_common::map::{
    AddrKey, Alias, Backend, Config, Endpoint, Flow, FlowKey, FragmentKey, FragmentPorts, Iface, Peer, Port,
    PortKey, RuleKey, Sent, Service, TaskKey, TaskSlots,
};

/// The tables of a node that have no addresses for keys.
pub trait Tables {
    /// The node's own facts; `None` until the agent has written them.
    fn config(&self) -> Option<&Config>;
    /// What a published port leads to.
    fn port(&self, key: &PortKey) -> Option<&Port>;
    /// A service.
    fn service(&self, slot: u32) -> Option<&Service>;
    /// What is at a place: a backend's slot in a Maglev table, a peer's slot behind it.
    fn place(&self, place: u32) -> Option<u32>;
    /// The peer's slot of the node with a VTEP, IPv4 in its mapped form.
    fn member(&self, vtep: &Ip6) -> Option<u32>;
    /// The peer's slot of the node with a VTEP's tag.
    fn tagged(&self, tag: u32) -> Option<u32>;
    /// Another node.
    fn peer(&self, slot: u32) -> Option<&Peer>;
    /// Now, s of the monotonic clock; a few ms late.
    fn now_s(&self) -> u32;
    /// Takes one from a budget (`BUDGET_…`) of this second; `false` if it is spent.
    fn spend(&self, budget: u32) -> bool;
}

/// The tables of a node that exist once for each family.
pub trait AddrTables<A: Address>: Tables {
    /// Whether an address is the node's own.
    fn is_local(&self, addr: &A) -> bool;
    /// What the rules of a service say: `RULE_ALLOW` or `RULE_DENY` of the longest prefix that matches.
    fn rule(&self, key: &RuleKey<A>) -> Option<u32>;
    /// The slot of the service with a VIP.
    fn vip(&self, key: &AddrKey<A>) -> Option<u32>;
    /// A backend.
    fn backend(&self, slot: u32) -> Option<&Backend<A>>;
    /// A task's numbers.
    fn task(&self, key: &TaskKey) -> Option<&TaskSlots>;
    /// An endpoint.
    fn endpoint(&self, key: &AddrKey<A>) -> Option<&Endpoint>;
    /// A local task's interface.
    fn iface(&self, ifindex: u32) -> Option<&Iface<A>>;
    /// The endpoint behind an alias.
    fn alias(&self, addr: &A) -> Option<&Alias<A>>;

    /// What is known of a flow whose backend is on another node.
    fn sent(&self, key: &FlowKey<A>) -> Option<Sent>;
    /// Remembers it.
    fn insert_sent(&self, key: &FlowKey<A>, sent: &Sent);
    /// Forgets it.
    fn remove_sent(&self, key: &FlowKey<A>);

    /// What is done to a flow of a task of this node, if it is at `stage`.
    fn flow(&self, key: &FlowKey<A>, stage: Stage) -> Option<Flow<A>>;
    /// Remembers it; `false` if the table is too busy to take it now.
    fn insert_flow(&self, key: &FlowKey<A>, flow: &Flow<A>, stage: Stage) -> bool;
    /// Forgets it.
    fn remove_flow(&self, key: &FlowKey<A>, stage: Stage);
    /// Writes a flow's stamp, and adds to its flags.
    fn mark_flow(&self, key: &FlowKey<A>, stage: Stage, stamp: u32, flags: u8);

    /// The ports of a fragmented packet.
    fn fragment(&self, key: &FragmentKey<A>) -> Option<FragmentPorts>;
    /// Remembers them.
    fn insert_fragment(&self, key: &FragmentKey<A>, ports: &FragmentPorts);
}

/// How far a flow is, and so which table it is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Only one side has been heard, or nobody has confirmed what it said.
    Opening,
    /// Both sides agree to it.
    Established,
}
