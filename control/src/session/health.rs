//! What the leader knows of the nodes beside the state: their sessions, how far their dataplanes are, and how they are by
//! their own word. It is in memory alone: a leader that begins hears it from the nodes, as their sessions open.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_api::health::NodeHealth;
use mesh_api::id::NodeId;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Server;
use crate::clock;
use crate::model::State;

/// What a manager knows that is not in the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The table index that it is at.
    pub index: u64,
    /// How many peers its port turned away since it began, by [`super::Cause::name`]; those of which there was one.
    pub refused: BTreeMap<String, u64>,
    /// What it knows of the nodes; `None` if it does not lead.
    pub nodes: Option<BTreeMap<NodeId, NodeReport>>,
}

/// What the leader knows of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Its session; `None` if it has had none with this leader.
    pub session: Option<SessionReport>,
    /// How it is, as it said last.
    pub health: Option<NodeHealth>,
}

/// A node's session with the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReport {
    /// It is up; else it has ended.
    pub is_open: bool,
    /// Since when it is so, ns since the epoch.
    pub since_ns: u64,
    /// When the node was heard last, ns since the epoch.
    pub heard_ns: u64,
    /// The index whose table its dataplane holds.
    pub applied: u64,
    /// By how many entries of the log that is behind.
    pub behind: u64,
    /// For how long it has been behind, ms; `None` if it isn't.
    pub behind_ms: Option<u64>,
}

impl SessionReport {
    /// A session that has been as it is for `age`, of a node that was heard `silence` ago.
    pub(super) fn new(is_open: bool, age: Duration, silence: Duration) -> Self {
        let now_ns = clock::now_ns();
        let ago = |age: Duration| now_ns.saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX));
        Self { is_open, since_ns: ago(age), heard_ns: ago(silence), applied: 0, behind: 0, behind_ms: None }
    }

    /// Of a node whose dataplane holds the table at `applied` of `index`, and has been behind since then.
    pub(super) fn with_applied(self, applied: u64, index: u64, behind_since: Option<Instant>) -> Self {
        let behind = index.saturating_sub(applied);
        let ms = |since: Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Self { applied, behind, behind_ms: behind_since.filter(|_| behind > 0).map(ms), ..self }
    }
}

impl Server {
    /// Notes how a node is.
    pub(super) fn note_health(&self, node: &NodeId, health: NodeHealth) {
        self.health().insert(node.clone(), health.bounded());
    }

    /// Forgets nodes that are not in the cluster any more.
    pub(super) fn retain_health(&self, state: &State) {
        self.health().retain(|node, _| state.nodes.contains_key(node));
    }

    /// What this manager knows that is not in the state.
    pub(super) fn report(&self) -> Report {
        let state = self.cluster.state();
        let refused = self.refusals().counted().into_iter();
        let leads = *self.leads.borrow();
        Report {
            index: state.index,
            refused: refused.map(|(cause, count)| (cause.name().to_owned(), count)).collect(),
            nodes: leads.then(|| self.node_reports(&state)),
        }
    }

    fn node_reports(&self, state: &State) -> BTreeMap<NodeId, NodeReport> {
        let (registry, health) = (self.registry(), self.health());
        let report = |node: &NodeId| NodeReport {
            session: registry.session(node, state.index),
            health: health.get(node).cloned(),
        };
        state.nodes.keys().map(|node| (node.clone(), report(node))).collect()
    }
}
