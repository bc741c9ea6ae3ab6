//! The cluster's own object: identity, tokens, defaults.

use std::collections::BTreeMap;
use std::time::Duration;

use imbl::OrdMap;
use ipnet::Ipv4Net;
use mesh_api::id::{ClusterId, NodeId};
use mesh_api::seal::UnlockKey;
use mesh_api::table::Role;
use mesh_api::token::JoinToken;
use serde::{Deserialize, Serialize};

use super::Meta;
use crate::pki::Authority;

/// Prefix length of automatic subnets, as Docker's default.
pub const DEFAULT_SUBNET_SIZE: u8 = 24;
/// UDP port of the overlay, as Docker's default.
pub const DEFAULT_DATA_PATH_PORT: u16 = 4789;
/// Tasks kept per slot for `docker service ps`, as Docker's default.
pub const DEFAULT_TASK_HISTORY: u64 = 5;
/// Heartbeat period of agents, ns.
pub const DEFAULT_HEARTBEAT_NS: u64 = 5_000_000_000;
/// Life of node certificates, ns: 90 days.
pub const DEFAULT_CERT_EXPIRY_NS: u64 = 90 * 24 * 3600 * 1_000_000_000;

/// What an operator can set on the cluster (`docker swarm update`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterSpec {
    /// Always `default` in Docker.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Ended tasks kept per slot.
    pub task_history: u64,
    /// Heartbeat period, ns.
    pub heartbeat_ns: u64,
    /// Life of node certificates, ns.
    pub cert_expiry_ns: u64,
    /// How often a new root certificate was asked for.
    pub force_rotate: u64,
    /// Whether managers that start are to be unlocked.
    pub autolock: bool,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            name: "default".to_owned(),
            labels: BTreeMap::new(),
            task_history: DEFAULT_TASK_HISTORY,
            heartbeat_ns: DEFAULT_HEARTBEAT_NS,
            cert_expiry_ns: DEFAULT_CERT_EXPIRY_NS,
            force_rotate: 0,
            autolock: false,
        }
    }
}

impl ClusterSpec {
    /// Life of node certificates.
    pub fn cert_life(&self) -> Duration {
        Duration::from_nanos(self.cert_expiry_ns)
    }
}

/// The secret parts of the join tokens.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinSecrets {
    /// Makes a host a worker.
    pub worker: [u8; 16],
    /// Makes a host a manager.
    pub manager: [u8; 16],
}

impl std::fmt::Debug for JoinSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinSecrets(…)")
    }
}

/// What seals the data keys of managers' disks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// Counts its changes: a manager that comes up from an older state than its disk is sealed by takes no step back.
    pub epoch: u64,
    /// The unlock key; none without autolock.
    pub key: Option<UnlockKey>,
}

impl Lock {
    /// Changes the key.
    pub fn set(&mut self, key: Option<UnlockKey>) {
        if self.key != key {
            *self = Self { epoch: self.epoch + 1, key };
        }
    }
}

/// The cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterObject {
    /// Its id.
    pub id: ClusterId,
    /// Version and times.
    pub meta: Meta,
    /// What an operator can set.
    pub spec: ClusterSpec,
    /// Its certificate authority.
    pub ca: Authority,
    /// The secret parts of the join tokens.
    pub join_secrets: JoinSecrets,
    /// What seals the managers' disks.
    pub lock: Lock,
    /// Seed of the flow hash.
    pub hash_seed: u64,
    /// UDP port of the overlay.
    pub data_path_port: u16,
    /// Where automatic subnets come from.
    pub address_pools: Vec<Ipv4Net>,
    /// Prefix length of automatic subnets.
    pub subnet_size: u8,
    /// Subnets that automatic ones must not overlap: the hosts' own.
    pub avoid: Vec<Ipv4Net>,
    /// How often nodes were told to replace their WireGuard keys.
    #[serde(default)]
    pub key_epoch: u64,
    /// Nodes that were removed while certificates of theirs may still be valid, and until when, ns since the epoch.
    #[serde(default)]
    pub removed: OrdMap<NodeId, u64>,
}

impl ClusterObject {
    /// The join token for `role`.
    pub fn join_token(&self, role: Role) -> JoinToken {
        let secret = match role {
            Role::Manager => &self.join_secrets.manager,
            Role::Worker => &self.join_secrets.worker,
        };
        JoinToken::new(&self.ca.root.digest(), secret)
    }
}
