//! The replicated state: cluster, nodes, networks, services and tasks.
//!
//! A [`State`] is a value: cloning it is O(1), and two of them differ in time proportional to their differences.
//! Only [`crate::apply`] makes one from another.

pub mod cluster;
pub mod constraint;
pub mod labels;
pub mod lookup;
pub mod network;
pub mod node;
pub mod service;
pub mod task;
pub mod token;

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId, TokenId};
use serde::{Deserialize, Serialize};

pub use cluster::{ClusterObject, ClusterSpec, JoinSecrets, Lock};
pub use lookup::Lookup;
pub use network::{Freed, Ipam6Config, IpamConfig, Network, NetworkSpec, Subnet};
pub use node::{Availability, Node, NodeSpec, NodeStatus, Readmission};
pub use service::{
    ContainerSpec, Endpoint, EndpointSpec, FailureAction, Mode, NetworkAttachment, Placement, PortConfig,
    ResourceAmount, Resources, RestartCondition, RestartPolicy, Service, ServiceSpec, TaskTemplate,
    UpdateConfig, UpdateOrder, UpdateState, UpdateStatus, Vip,
};
pub use task::{SlotKey, Task, TaskEndpoint, TaskStatus, WARM};
pub use token::{Token, TokenState};

/// Version and times of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The table index of its last change: what an update has to name.
    pub version: u64,
    /// When it was made, ns since the epoch.
    pub created_ns: u64,
    /// When it changed last, ns since the epoch.
    pub updated_ns: u64,
}

/// Where the allocators that count upwards are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// The last incarnation given to a task.
    pub incarnation: u32,
    /// The last VNI given to a network.
    pub vni: u32,
    /// Up to this table index, every live node is known to have applied the table: none holds an address that was freed
    /// by then. It lags behind, and moves on where an address waits for it.
    #[serde(default)]
    pub acknowledged: u64,
    /// The table index that a backup was restored at; 0 if none was. No address is given out until every live node is known to
    /// have applied that: others may have it, of whom the backup knows nothing.
    #[serde(default)]
    pub restored: u64,
}

impl Counters {
    /// Whether an address that is free by the state is so on every live node.
    pub fn know_all_addresses(&self) -> bool {
        self.acknowledged >= self.restored
    }
}

/// The replicated state at one table index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The table index: that of the command which led here. Not every number is one's.
    pub index: u64,
    /// The cluster; `None` before its first command.
    pub cluster: Option<Arc<ClusterObject>>,
    /// Nodes by id.
    pub nodes: OrdMap<NodeId, Arc<Node>>,
    /// Networks by id.
    pub networks: OrdMap<NetworkId, Arc<Network>>,
    /// Services by id.
    pub services: OrdMap<ServiceId, Arc<Service>>,
    /// Tasks by id.
    pub tasks: OrdMap<TaskId, Arc<Task>>,
    /// Addresses that nobody has any longer and that rest before others get them, by network.
    #[serde(default)]
    pub freed: OrdMap<NetworkId, OrdSet<Freed>>,
    /// Join tokens beside the cluster's two, by id.
    pub tokens: OrdMap<TokenId, Arc<Token>>,
    /// Where the allocators are.
    pub counters: Counters,
    /// Indexes over the above, kept by `apply` and rebuilt from a snapshot.
    #[serde(skip)]
    pub lookup: Lookup,
}

impl Default for State {
    fn default() -> Self {
        Self::empty()
    }
}

impl State {
    /// The state before the first command.
    pub fn empty() -> Self {
        Self {
            index: 0,
            cluster: None,
            nodes: OrdMap::new(),
            networks: OrdMap::new(),
            services: OrdMap::new(),
            tasks: OrdMap::new(),
            freed: OrdMap::new(),
            tokens: OrdMap::new(),
            counters: Counters::default(),
            lookup: Lookup::default(),
        }
    }

    /// What seals the managers' disks.
    pub(crate) fn lock(&self) -> Lock {
        self.cluster.as_ref().map(|cluster| cluster.lock.clone()).unwrap_or_default()
    }

    /// Whether this was made of `other` without a change. Takes no longer for large states.
    pub(crate) fn shares_all_with(&self, other: &Self) -> bool {
        let clusters = match (&self.cluster, &other.cluster) {
            (Some(ours), Some(theirs)) => Arc::ptr_eq(ours, theirs),
            (None, None) => true,
            _ => false,
        };
        clusters
            && self.nodes.ptr_eq(&other.nodes)
            && self.networks.ptr_eq(&other.networks)
            && self.services.ptr_eq(&other.services)
            && self.tasks.ptr_eq(&other.tasks)
            && self.freed.ptr_eq(&other.freed)
            && self.tokens.ptr_eq(&other.tokens)
            && self.counters == other.counters
    }

    /// The routing mesh's own network.
    pub fn ingress(&self) -> Option<&Arc<Network>> {
        self.networks.values().find(|network| network.spec.ingress)
    }

    /// The network with this name.
    pub fn network_by_name(&self, name: &str) -> Option<&Arc<Network>> {
        self.networks.values().find(|network| network.spec.name == name)
    }

    /// The service with this name.
    pub fn service_by_name(&self, name: &str) -> Option<&Arc<Service>> {
        self.lookup.service_names.get(name).and_then(|id| self.services.get(id))
    }

    /// The tasks of a service, in order of their ids.
    pub fn tasks_of_service(&self, service: &ServiceId) -> impl Iterator<Item = &Arc<Task>> {
        self.lookup
            .tasks_by_service
            .get(service)
            .into_iter()
            .flat_map(|ids| ids.iter())
            .filter_map(|id| self.tasks.get(id))
    }

    /// The tasks in one place of a service, in order of their ids.
    pub fn tasks_in_slot(&self, service: &ServiceId, slot: &SlotKey) -> impl Iterator<Item = &Arc<Task>> {
        let first = (slot.clone(), TaskId::from(""));
        let slots = self.lookup.tasks_by_slot.get(service);
        let from_first = slots.into_iter().flat_map(move |slots| slots.range(first.clone()..));
        let in_slot = from_first.take_while(move |(key, _)| key == slot);
        in_slot.filter_map(|(_, id)| self.tasks.get(id))
    }

    /// The attachments, in order of their ids.
    pub fn attachments(&self) -> impl Iterator<Item = &Arc<Task>> {
        let ids = self.lookup.tasks_by_service.get(&ServiceId::from(""));
        ids.into_iter().flat_map(|ids| ids.iter()).filter_map(|id| self.tasks.get(id))
    }

    /// The tasks on a node, in order of their ids.
    pub fn tasks_of_node(&self, node: &NodeId) -> impl Iterator<Item = &Arc<Task>> {
        self.lookup
            .tasks_by_node
            .get(node)
            .into_iter()
            .flat_map(|ids| ids.iter())
            .filter_map(|id| self.tasks.get(id))
    }
}
