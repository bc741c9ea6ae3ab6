//! Which nodes have sessions, and how far their dataplanes are.
//!
//! From that follows the settled index: up to it, every node that can still send by the table has applied it. A node
//! that lags for too long, or whose session is gone for as long, doesn't hold the others up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::id::NodeId;
use mesh_api::session::SESSION_TIMEOUT_MS;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::health::SessionReport;
use crate::model::{Node, State};

/// How long a node can hold up the settled index: agents wait no longer for it either.
const LAG_MAX: Duration = Duration::from_secs(5);

/// How long a session may be about to begin.
const EXPECTED_MAX: Duration = Duration::from_millis(SESSION_TIMEOUT_MS);

/// Tells the sessions of one node apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(u64);

/// The sessions of all nodes.
#[derive(Debug)]
pub(super) struct Registry {
    /// When this manager began to listen: a node is not missed earlier than counted from here.
    since: Instant,
    nodes: BTreeMap<NodeId, Entry>,
    /// Nodes that have proved themselves and are about to have a session, since when.
    expected: BTreeMap<NodeId, Instant>,
    epochs: u64,
    settled: u64,
}

#[derive(Debug)]
struct Entry {
    epoch: Epoch,
    /// The session is up; dropped, it ends the session.
    kill: Option<oneshot::Sender<()>>,
    /// When it began, or ended.
    since: Instant,
    heard: Instant,
    /// The index of the last change that was sent.
    sent: u64,
    /// Up to here nothing more was to be sent.
    examined: u64,
    applied: u64,
    /// Since when `applied` is behind `sent`, or the session gone.
    behind_since: Option<Instant>,
    left: bool,
}

impl Entry {
    /// The index whose table the node sends by.
    fn effective(&self) -> u64 {
        if self.applied >= self.sent { self.examined } else { self.applied }
    }

    fn holds_up(&self, now: Instant) -> bool {
        !self.left && self.behind_since.is_none_or(|since| now.duration_since(since) < LAG_MAX)
    }
}

impl Registry {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            nodes: BTreeMap::new(),
            expected: BTreeMap::new(),
            epochs: 0,
            settled: 0,
        }
    }

    /// A session of the node is about to begin: the node counts as heard of, so that it is not given up between
    /// the command that says it is ready and [`Registry::connect`].
    pub(super) fn expect(&mut self, node: &NodeId) {
        self.expected.insert(node.clone(), Instant::now());
    }

    /// A session begins with a node that has the table at `index`, 0 if none that is known here; the node's former session,
    /// if any, ends. The receiver resolves when this one is to end.
    pub(super) fn connect(&mut self, node: &NodeId, index: u64) -> (Epoch, oneshot::Receiver<()>) {
        self.expected.remove(node);
        self.epochs += 1;
        let epoch = Epoch(self.epochs);
        let (kill, killed) = oneshot::channel();
        let now = Instant::now();
        // What it had applied it may have lost since.
        let applied = self.nodes.get(node).map_or(0, |entry| entry.applied).min(index);
        let entry = Entry {
            epoch,
            kill: Some(kill),
            since: now,
            heard: now,
            sent: index,
            examined: index,
            applied,
            behind_since: Some(now),
            left: false,
        };
        self.nodes.insert(node.clone(), entry);
        (epoch, killed)
    }

    fn entry(&mut self, node: &NodeId, epoch: Epoch) -> Option<&mut Entry> {
        self.nodes.get_mut(node).filter(|entry| entry.epoch == epoch)
    }

    /// A sign of life.
    pub(super) fn heard(&mut self, node: &NodeId, epoch: Epoch) {
        if let Some(entry) = self.entry(node, epoch) {
            entry.heard = Instant::now();
        }
    }

    /// The table up to `index` was sent. A host that has just joined has no older table to send by.
    pub(super) fn sent(&mut self, node: &NodeId, epoch: Epoch, index: u64, is_first_table: bool) {
        if let Some(entry) = self.entry(node, epoch) {
            entry.sent = index;
            entry.examined = index;
            if is_first_table {
                entry.applied = index;
            }
            if entry.applied >= index {
                entry.behind_since = None;
            } else {
                entry.behind_since.get_or_insert_with(Instant::now);
            }
        }
    }

    /// There is more for the node than could be sent so far.
    pub(super) fn falls_behind(&mut self, node: &NodeId, epoch: Epoch) {
        if let Some(entry) = self.entry(node, epoch) {
            entry.behind_since.get_or_insert_with(Instant::now);
        }
    }

    /// Nothing was to be sent up to `index`.
    pub(super) fn examined(&mut self, node: &NodeId, epoch: Epoch, index: u64) {
        if let Some(entry) = self.entry(node, epoch) {
            entry.examined = index;
        }
    }

    /// The node's dataplane holds the table at `index`. One that it was not sent in this session, and did not come with, says
    /// nothing: it is no state of this cluster, or none that is known here.
    pub(super) fn applied(&mut self, node: &NodeId, epoch: Epoch, index: u64) {
        if let Some(entry) = self.entry(node, epoch).filter(|entry| index <= entry.sent) {
            entry.applied = entry.applied.max(index);
            entry.behind_since = if entry.applied >= entry.sent {
                None
            } else {
                entry.behind_since.or_else(|| Some(Instant::now()))
            };
        }
    }

    /// A session has ended.
    pub(super) fn disconnect(&mut self, node: &NodeId, epoch: Epoch) {
        if let Some(entry) = self.entry(node, epoch) {
            entry.kill = None;
            entry.since = Instant::now();
            entry.behind_since.get_or_insert_with(Instant::now);
        }
    }

    /// The node leaves the cluster: it counts no longer, and is not missed.
    pub(super) fn leave(&mut self, node: &NodeId, epoch: Epoch) {
        if let Some(entry) = self.entry(node, epoch) {
            entry.left = true;
        }
    }

    /// Forgets nodes that are not in the cluster any more.
    pub(super) fn retain(&mut self, state: &State) {
        self.nodes.retain(|id, entry| entry.kill.is_some() || state.nodes.contains_key(id));
        self.expected.retain(|_, since| since.elapsed() < EXPECTED_MAX);
    }

    /// The node's session is up.
    pub(super) fn is_connected(&self, node: &NodeId) -> bool {
        self.nodes.get(node).is_some_and(|entry| entry.kill.is_some() && !entry.left)
    }

    /// How a node's session is, where the state is at `index`; `None` if it has had none.
    pub(super) fn session(&self, node: &NodeId, index: u64) -> Option<SessionReport> {
        let entry = self.nodes.get(node)?;
        let now = Instant::now();
        let [age, silence] = [entry.since, entry.heard].map(|at| now.duration_since(at));
        let report = SessionReport::new(entry.kill.is_some(), age, silence);
        Some(report.with_applied(entry.effective(), index, entry.behind_since))
    }

    /// How long nothing was heard of a node.
    pub(super) fn silence(&self, node: &NodeId) -> Duration {
        let heard = self.nodes.get(node).map_or(self.since, |entry| entry.heard);
        self.expected.get(node).map_or(heard, |expected| heard.max(*expected)).elapsed()
    }

    /// Up to which index every node that is not given up has applied the table, however long one of them takes: what
    /// was removed by then is forgotten everywhere.
    pub(super) fn acknowledged(&self, state: &State) -> u64 {
        let has_left = |node: &Arc<Node>| self.nodes.get(&node.id).is_some_and(|entry| entry.left);
        let live = state.nodes.values().filter(|node| !node.is_down() && !has_left(node));
        let applied = live.map(|node| self.nodes.get(&node.id).map_or(0, Entry::effective));
        applied.min().unwrap_or(state.index).min(state.index)
    }

    /// The settled index; it never goes back.
    pub(super) fn settled(&mut self, state: &State) -> u64 {
        let now = Instant::now();
        // Nodes that a former manager process served send by a table that this one knows nothing of yet.
        let is_missing = |node: &Arc<Node>| !node.is_down() && !self.nodes.contains_key(&node.id);
        if now.duration_since(self.since) < LAG_MAX && state.nodes.values().any(is_missing) {
            return self.settled;
        }
        let mut least = state.index;
        for (id, entry) in &self.nodes {
            // This runs for each node that has applied a change: the state is asked of few of them.
            let is_less = entry.effective() < least && entry.holds_up(now);
            if is_less && state.nodes.get(id).is_some_and(|node| !node.is_down()) {
                least = entry.effective();
            }
        }
        self.settled = self.settled.max(least);
        self.settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn state(index: u64, ids: &[&str]) -> State {
        let mut state = State::empty();
        state.index = index;
        for id in ids {
            state.nodes.insert((*id).into(), std::sync::Arc::new(testing::node(id)));
        }
        state
    }

    #[tokio::test(start_paused = true)]
    async fn the_settled_index_is_the_least_that_is_applied() {
        let mut registry = Registry::new();
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let (epoch_a, _kill_a) = registry.connect(&a, 0);
        let (epoch_b, _kill_b) = registry.connect(&b, 0);
        registry.sent(&a, epoch_a, 10, true);
        registry.sent(&b, epoch_b, 10, true);
        assert_eq!(registry.settled(&state(10, &["a", "b"])), 10);
        registry.sent(&a, epoch_a, 12, false);
        registry.sent(&b, epoch_b, 11, false);
        registry.examined(&b, epoch_b, 12);
        registry.applied(&a, epoch_a, 12);
        assert_eq!(registry.settled(&state(12, &["a", "b"])), 10);
        registry.applied(&b, epoch_b, 11);
        assert_eq!(registry.settled(&state(12, &["a", "b"])), 12, "b had nothing to apply beyond 11");
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_lags_or_is_gone_holds_up_for_five_seconds_only() {
        let mut registry = Registry::new();
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let (epoch_a, _kill_a) = registry.connect(&a, 0);
        let (epoch_b, _kill_b) = registry.connect(&b, 0);
        registry.sent(&a, epoch_a, 10, true);
        registry.sent(&b, epoch_b, 10, true);
        registry.disconnect(&b, epoch_b);
        registry.sent(&a, epoch_a, 11, false);
        registry.applied(&a, epoch_a, 11);
        assert_eq!(registry.settled(&state(11, &["a", "b"])), 10);
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(registry.settled(&state(11, &["a", "b"])), 11);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_waits_to_be_sent_more_holds_up_for_five_seconds_only() {
        let mut registry = Registry::new();
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let (epoch_a, _kill_a) = registry.connect(&a, 0);
        let (epoch_b, _kill_b) = registry.connect(&b, 0);
        for (node, epoch) in [(&a, epoch_a), (&b, epoch_b)] {
            registry.sent(node, epoch, 10, true);
        }
        registry.falls_behind(&b, epoch_b);
        registry.sent(&a, epoch_a, 11, false);
        registry.applied(&a, epoch_a, 11);
        assert_eq!(registry.settled(&state(11, &["a", "b"])), 10);
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(registry.settled(&state(11, &["a", "b"])), 11);
        // Nothing of what was waited for concerned it.
        registry.sent(&b, epoch_b, 10, false);
        registry.examined(&b, epoch_b, 11);
        registry.sent(&a, epoch_a, 12, false);
        registry.applied(&a, epoch_a, 12);
        assert_eq!(registry.settled(&state(12, &["a", "b"])), 11);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_acknowledged_waits_for_every_live_node_however_long() {
        let mut registry = Registry::new();
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let (epoch_a, _kill_a) = registry.connect(&a, 0);
        let (epoch_b, _kill_b) = registry.connect(&b, 0);
        registry.sent(&a, epoch_a, 10, true);
        assert_eq!(registry.acknowledged(&state(10, &["a", "b"])), 0, "b has no table yet");
        registry.sent(&b, epoch_b, 10, true);
        assert_eq!(registry.acknowledged(&state(10, &["a", "b"])), 10);
        registry.sent(&a, epoch_a, 11, false);
        registry.applied(&a, epoch_a, 11);
        registry.sent(&b, epoch_b, 11, false);
        registry.disconnect(&b, epoch_b);
        tokio::time::advance(Duration::from_hours(1)).await;
        let mut state = state(12, &["a", "b", "c"]);
        assert_eq!(registry.acknowledged(&state), 0, "c was never heard of");
        state.nodes.remove(&NodeId::from("c"));
        assert_eq!((registry.acknowledged(&state), registry.settled(&state)), (10, 11));
        let down = |node: &mut crate::model::Node| node.status.state = mesh_api::table::NodeState::Down;
        down(Arc::make_mut(&mut state.nodes[&b]));
        assert_eq!(registry.acknowledged(&state), 11);
        registry.leave(&a, epoch_a);
        assert_eq!(registry.acknowledged(&state), 12, "nobody is left to ask");
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_of_a_former_manager_process_are_waited_for_as_long() {
        let mut registry = Registry::new();
        let a = NodeId::from("a");
        let (epoch, _kill) = registry.connect(&a, 0);
        registry.sent(&a, epoch, 10, false);
        registry.applied(&a, epoch, 10);
        assert_eq!(registry.settled(&state(10, &["a", "b"])), 0);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(registry.settled(&state(10, &["a", "b"])), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn another_session_of_a_node_ends_the_former() {
        let mut registry = Registry::new();
        let a = NodeId::from("a");
        let (first, killed) = registry.connect(&a, 0);
        let (second, _kill) = registry.connect(&a, 0);
        assert!(killed.await.is_err());
        registry.disconnect(&a, first);
        assert!(registry.is_connected(&a));
        registry.disconnect(&a, second);
        assert!(!registry.is_connected(&a));
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_can_not_claim_what_it_was_not_sent() {
        let mut registry = Registry::new();
        let a = NodeId::from("a");
        let (epoch, _kill) = registry.connect(&a, 0);
        registry.sent(&a, epoch, 5, false);
        registry.applied(&a, epoch, u64::MAX);
        assert_eq!(registry.settled(&state(5, &["a"])), 0);
        registry.applied(&a, epoch, 5);
        registry.sent(&a, epoch, 6, false);
        assert_eq!(registry.settled(&state(6, &["a"])), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_comes_back_with_an_older_table_sends_by_that() {
        let mut registry = Registry::new();
        let a = NodeId::from("a");
        let (epoch, _kill) = registry.connect(&a, 0);
        registry.sent(&a, epoch, 8, true);
        assert_eq!(registry.acknowledged(&state(8, &["a"])), 8);
        // It lost power, and what it had written last.
        let (epoch, _kill) = registry.connect(&a, 6);
        assert_eq!(registry.acknowledged(&state(8, &["a"])), 6);
        // What it says of the table that it came with counts, before anything was sent and after.
        registry.applied(&a, epoch, 6);
        registry.sent(&a, epoch, 8, false);
        registry.applied(&a, epoch, 6);
        assert_eq!(registry.acknowledged(&state(8, &["a"])), 6);
        registry.applied(&a, epoch, 8);
        assert_eq!(registry.acknowledged(&state(8, &["a"])), 8);
    }
}
