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

/// A host in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Version and times.
    pub meta: Meta,
    /// What an operator can set.
    pub spec: NodeSpec,
    /// The host, as it described itself last.
    pub description: NodeDescription,
    /// What the managers know of its life.
    pub status: NodeStatus,
    /// The root that its certificate comes from.
    pub issuer: KeyId,
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
