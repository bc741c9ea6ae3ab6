//! A host in the cluster.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_api::id::NodeId;
use mesh_api::session::NodeDescription;
use mesh_api::table::{NodeState, Role};
use mesh_api::tls::KeyId;
use serde::{Deserialize, Serialize};

use super::Meta;

/// Whether a node gets and keeps tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Availability {
    /// Gets tasks.
    Active,
    /// Keeps its tasks, gets no others.
    Pause,
    /// Its tasks move away.
    Drain,
}

/// What an operator can set on a node (`docker node update`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// A name beside its host name; mostly empty.
    pub name: String,
    /// Labels, `node.labels.*` in constraints.
    pub labels: BTreeMap<String, String>,
    /// Manager or worker.
    pub role: Role,
    /// Whether it gets and keeps tasks.
    pub availability: Availability,
}

/// What the managers know of a node's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Whether they hear from it.
    pub state: NodeState,
    /// For people: why.
    pub message: String,
    /// When it entered the state, ns since the epoch by the manager's clock.
    pub since_ns: u64,
}

/// How far a node is on its way back whose certificate has expired.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readmission {
    /// Since when it asks for another certificate, ns since the epoch.
    pub asking_since_ns: Option<u64>,
    /// An operator lets it have one until then, ns since the epoch.
    pub approved_until_ns: Option<u64>,
}

/// A host in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Version and times, of whatever is known of it.
    pub meta: Meta,
    /// The table index at which `spec` changed last: what an update has to name.
    pub spec_version: u64,
    /// What an operator can set.
    pub spec: NodeSpec,
    /// The host, as it described itself last.
    pub description: NodeDescription,
    /// What the managers know of its life.
    pub status: NodeStatus,
    /// The root that its certificate comes from.
    pub issuer: KeyId,
    /// How far it is on its way back, where its certificate has expired.
    pub readmission: Readmission,
}

impl Node {
    /// The managers hear from it.
    pub fn is_ready(&self) -> bool {
        self.status.state == NodeState::Ready
    }

    /// The managers have given up on it for now.
    pub fn is_down(&self) -> bool {
        self.status.state == NodeState::Down
    }

    /// An operator lets it come back, at a time, ns since the epoch.
    pub fn is_approved(&self, now_ns: u64) -> bool {
        self.readmission.approved_until_ns.is_some_and(|until| now_ns < until)
    }

    /// The subnets that its own routes lead to, as far as it tells. A default route keeps no network away.
    pub fn routes(&self) -> impl Iterator<Item = IpNet> {
        self.description.routes.iter().copied().filter(|route| route.prefix_len() > 0)
    }

    /// It has an encrypted way to the others.
    pub fn encrypts(&self) -> bool {
        !self.description.wireguard.is_empty()
    }

    /// It has an address of each family among these: what a task that is to send under them can do so by.
    pub fn can_send_under(&self, addresses: &[IpAddr]) -> bool {
        let has = |wanted: &IpAddr| self.description.addresses.contains(wanted);
        [IpAddr::is_ipv4, IpAddr::is_ipv6].into_iter().all(|is_of_family| {
            let mut listed = addresses.iter().filter(|addr| is_of_family(addr)).peekable();
            listed.peek().is_none() || listed.any(has)
        })
    }

    /// It may get tasks.
    pub fn is_schedulable(&self) -> bool {
        self.is_ready() && self.spec.availability == Availability::Active
    }
}
