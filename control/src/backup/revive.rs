//! What becomes of a state that comes back: one manager has it, and nothing that the swarm may have given out since the
//! backup is given out again.
//!
//! Of the swarm's life since then nobody knows anything but its nodes, which come back with tables of it. So whatever counts
//! upwards goes on far above where it can have come to:
//!
//! - the table index, which is raft's log index: by time, so that it grows even where one backup is restored twice;
//! - incarnations of tasks, by which packets name them: by more than tasks can have been made, and by chance beyond that;
//! - VXLAN identifiers of networks: from a place by chance on, and those that are taken are passed over;
//! - the epoch of the nodes' WireGuard keys: or the next rotation would be none to nodes that have done one since.
//!
//! Addresses can't grow. They are held back until every live node has applied the restored table, and with that has let go of
//! what it had since the backup ([`crate::model::Counters::restored`]).
//!
//! Former managers can't take part: raft's ids are drawn anew for each member, a question names whom it is for, and a leader
//! tells one that is no member of its cluster so, who then ends its manager ([`crate::raft::Replica::handle`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_api::id::NodeId;
use mesh_api::session::NodeDescription;
use mesh_api::table::{NodeState, Role};
use mesh_api::tls::KeyId;
use rand::{Rng, RngExt as _};

use crate::apply::apply;
use crate::command::{Action, Command};
use crate::model::network::{VNI_MAX, VNI_MIN};
use crate::model::{ClusterObject, Counters, Meta, Node, State};
use crate::pki::{First, OwnError, manager_credential};
use crate::refusal::Refusal;

/// The least that the table index grows by: more entries than any log comes to between two backups.
const INDEXES: u64 = 1 << 32;
/// The least that incarnations grow by: tasks made between a backup and its restoration are fewer.
const INCARNATIONS: u32 = 1 << 24;
/// Incarnations begin anywhere in so many above that: where one backup is restored twice, the two lives differ.
const INCARNATIONS_BY_CHANCE: u32 = 1 << 26;
/// What the epoch of the nodes' keys grows by: rotations are asked for by hand.
const KEY_EPOCHS: u64 = 1000;

/// Why a state can't come back on a host.
#[derive(Debug, thiserror::Error)]
pub enum ReviveError {
    /// The host was removed from the swarm.
    #[error(
        "this node was removed from the swarm before the backup was taken: leave the swarm first (`docker swarm leave`)"
    )]
    Removed,
    /// The backup's certificate authority gives the host no certificate.
    #[error("the backup's certificate authority can't certify this host")]
    Own(#[from] OwnError),
    /// The host does not fit the swarm.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A state that comes back.
#[derive(Debug, Clone)]
pub struct Revived {
    /// It, with the host as its only manager.
    pub state: State,
    /// The host as its node, and what it proves itself with.
    pub first: First,
    /// Host names of nodes that were managers too, and are workers.
    pub demoted: Vec<String>,
    /// Host names of nodes that had the host's address, which are removed: the host stands in for them.
    pub replaced: Vec<String>,
    /// Where the nodes look for managers, by what they knew.
    pub known: Vec<SocketAddr>,
}

/// Makes the host that `description` is of the only manager of the swarm of `state`: as the node `own`, where it is one of
/// that swarm, else as another. The backup need not know `own`.
pub fn revive(
    state: State,
    own: Option<NodeId>,
    description: &NodeDescription,
    now: SystemTime,
    rng: &mut impl Rng,
) -> Result<Revived, ReviveError> {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let at_ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    let index = state.index.saturating_add(INDEXES).max(at_ns / 1000);
    let object = state.cluster.clone().ok_or(Refusal::NotInitialized)?;
    let id = own.unwrap_or_else(|| NodeId::random(rng));
    if object.removed.contains_key(&id) {
        return Err(ReviveError::Removed);
    }
    let life = object.spec.cert_life();
    let (credential, issuer) = manager_credential(&object, &id, life, now)?;
    let known = known_managers(&state);
    let mut revived = Reviving { state, index, at_ns };
    revived.grow(rng);
    let demoted = revived.demote_all_but(&id);
    let replaced = revived.remove_all_at(description, &id)?;
    let demoted = demoted.iter().filter_map(|id| revived.state.nodes.get(id));
    let demoted = demoted.map(|node| node.description.hostname.clone()).collect();
    revived.put_manager(&id, description, issuer)?;
    let first = First { cluster: object.id.clone(), node: id, credential };
    Ok(Revived { state: State { index, ..revived.state }, first, demoted, replaced, known })
}

fn known_managers(state: &State) -> Vec<SocketAddr> {
    let managers = state.nodes.values().filter(|node| node.spec.role == Role::Manager);
    managers.filter_map(|node| Some(node.description.manager.as_ref()?.addr)).collect()
}

/// A state on its way.
struct Reviving {
    state: State,
    index: u64,
    at_ns: u64,
}

impl Reviving {
    /// Moves on what counts upwards.
    fn grow(&mut self, rng: &mut impl Rng) {
        let Counters { incarnation, vni: _, acknowledged, restored: _ } = self.state.counters;
        let by = INCARNATIONS + rng.random_range(0..INCARNATIONS_BY_CHANCE);
        self.state.counters = Counters {
            incarnation: incarnation.wrapping_add(by),
            vni: rng.random_range(VNI_MIN..=VNI_MAX),
            acknowledged,
            restored: self.index,
        };
        self.state.cluster = self.state.cluster.take().map(|object| {
            let key_epoch = object.key_epoch.saturating_add(KEY_EPOCHS);
            Arc::new(ClusterObject { key_epoch, ..ClusterObject::clone(&object) })
        });
    }

    /// Makes workers of the managers; which they are.
    fn demote_all_but(&mut self, own: &NodeId) -> Vec<NodeId> {
        let mut demoted = Vec::new();
        let others = self.state.nodes.clone();
        for node in others.values().filter(|node| node.id != *own) {
            let is_manager = node.spec.role == Role::Manager;
            if !is_manager && node.description.manager.is_none() {
                continue;
            }
            demoted.extend(is_manager.then(|| node.id.clone()));
            self.put(node, |node| {
                node.spec.role = Role::Worker;
                // It is not to be looked for there.
                node.description.manager = None;
            });
        }
        demoted
    }

    /// Removes the other nodes with this host's address, which can't both be; their host names.
    fn remove_all_at(&mut self, host: &NodeDescription, own: &NodeId) -> Result<Vec<String>, Refusal> {
        let others = self.state.nodes.clone();
        let mut removed = Vec::new();
        for node in others.values().filter(|node| node.id != *own && node.description.vtep == host.vtep) {
            self.run(Action::RemoveNode { id: node.id.clone(), force: true })?;
            removed.push(node.description.hostname.clone());
        }
        Ok(removed)
    }

    fn put_manager(&mut self, own: &NodeId, host: &NodeDescription, issuer: KeyId) -> Result<(), Refusal> {
        let (id, description) = (own.clone(), host.clone());
        if !self.state.nodes.contains_key(own) {
            return self.run(Action::AddNode { id, role: Role::Manager, description, issuer, token: None });
        }
        let (state, message, description) = (NodeState::Ready, String::new(), Some(description));
        self.run(Action::SetNodeStatus { id, state, message, description })?;
        if let Some(node) = self.state.nodes.get(own).cloned() {
            self.put(&node, |node| {
                node.spec.role = Role::Manager;
                node.issuer = issuer;
            });
        }
        Ok(())
    }

    /// Changes a node, its specification among the rest.
    fn put(&mut self, node: &Node, change: impl FnOnce(&mut Node)) {
        let mut node = node.clone();
        change(&mut node);
        node.meta = Meta { version: self.index, updated_ns: self.at_ns, ..node.meta };
        node.spec_version = self.index;
        self.state.nodes.insert(node.id.clone(), Arc::new(node));
    }

    fn run(&mut self, action: Action) -> Result<(), Refusal> {
        let command = Command { at_ns: self.at_ns, action };
        (self.state, _) = apply(&self.state, self.index, &command)?;
        Ok(())
    }
}
