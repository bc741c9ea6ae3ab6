//! Which nodes are alive: a node whose sessions have been gone, or silent, for as long as three heartbeats is down.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::id::NodeId;
use mesh_api::session::SESSION_TIMEOUT_MS;
use mesh_api::table::NodeState;
use tokio::time::Instant;

use super::Server;
use crate::apply::awaits;
use crate::clock::now_ns;
use crate::cluster::ProposeError;
use crate::command::{Action, Command};
use crate::model::{JoinSecrets, Node};

const PERIOD: Duration = Duration::from_millis(500);
const SILENCE_MAX: Duration = Duration::from_millis(SESSION_TIMEOUT_MS);
/// How long an address rests once every live node has let go of it: tasks may hold what a name resolved to for 5 s, and
/// have been answered just before.
const REST: Duration = Duration::from_secs(6);

impl Server {
    /// Keeps the nodes' states true until the cluster shuts down.
    pub(crate) async fn watch_liveness(self: Arc<Self>) {
        if self.forget_former_sessions().await.is_err() {
            return;
        }
        let mut tick = tokio::time::interval(PERIOD);
        let mut resting = VecDeque::new();
        loop {
            tick.tick().await;
            let state = self.cluster.state();
            for node in state.nodes.values() {
                if let Some((to, message)) = self.verdict(node)
                    && self.set_state(&node.id, to, message).await.is_err()
                {
                    return;
                }
            }
            self.registry().retain(&state);
            self.retain_health(&state);
            self.settle();
            let done = self.acknowledge(&mut resting).await.is_ok()
                && self.finish_rotation().await.is_ok()
                && self.drop_tokens().await.is_ok();
            if !done {
                return;
            }
        }
    }

    /// Notes in the state how far all live nodes were [`REST`] ago, where a freed address waits for it. `resting`: how far
    /// they were since when.
    async fn acknowledge(&self, resting: &mut VecDeque<(Instant, u64)>) -> Result<(), ()> {
        let state = self.cluster.state();
        let index = self.registry().acknowledged(&state);
        if resting.back().is_none_or(|(_, last)| *last < index) {
            resting.push_back((Instant::now(), index));
        }
        let over = resting.partition_point(|(since, _)| since.elapsed() >= REST);
        match resting.drain(..over).next_back() {
            Some((_, index)) if awaits(&state, index) => self.propose(Action::Acknowledge { index }).await,
            _ => Ok(()),
        }
    }

    /// Drops the present root once every node has a certificate from the next one. The tokens' secrets go with it: who has
    /// the former root's key may have been shown them.
    async fn finish_rotation(&self) -> Result<(), ()> {
        let state = self.cluster.state();
        let rotation = state.cluster.as_ref().and_then(|cluster| cluster.ca.rotation.as_ref());
        let Some(root) = rotation.map(|rotation| rotation.root.id) else { return Ok(()) };
        if state.nodes.values().any(|node| node.issuer != root) {
            return Ok(());
        }
        tracing::info!(%root, "every node has a certificate from the next root: the former one is dropped");
        let join_secrets = JoinSecrets { worker: rand::random(), manager: rand::random() };
        self.propose(Action::FinishRotation { root, join_secrets }).await
    }

    /// Drops join tokens whose end is long over.
    async fn drop_tokens(&self) -> Result<(), ()> {
        let now_ns = now_ns();
        if !self.cluster.state().tokens.values().any(|token| token.is_forgotten(now_ns)) {
            return Ok(());
        }
        self.propose(Action::DropTokens).await
    }

    /// What a former leader heard of the nodes says nothing of today.
    async fn forget_former_sessions(&self) -> Result<(), ()> {
        let state = self.cluster.state();
        for node in state.nodes.values().filter(|node| node.is_ready()) {
            if !self.registry().is_connected(&node.id) {
                let message = "node moved to \"unknown\" state: the leader is another";
                self.set_state(&node.id, NodeState::Unknown, message).await?;
            }
        }
        Ok(())
    }

    /// The state that a node should be in, where it is in another.
    pub(super) fn verdict(&self, node: &Node) -> Option<(NodeState, &'static str)> {
        let registry = self.registry();
        let state = node.status.state;
        if registry.is_connected(&node.id) {
            // A session that began while the node was being given up.
            (state != NodeState::Ready).then_some((NodeState::Ready, ""))
        } else {
            let missed = state != NodeState::Down && registry.silence(&node.id) >= SILENCE_MAX;
            missed.then_some((NodeState::Down, "heartbeat failure"))
        }
    }

    /// Fails when there is no point in going on.
    async fn set_state(&self, id: &NodeId, state: NodeState, message: &str) -> Result<(), ()> {
        tracing::info!(node = %id, ?state, message, "a node's state changes");
        let (id, message) = (id.clone(), message.to_owned());
        // Refused where the node was removed meanwhile.
        self.propose(Action::SetNodeStatus { id, state, message, description: None }).await
    }

    /// Fails when there is no point in going on.
    async fn propose(&self, action: Action) -> Result<(), ()> {
        match self.cluster.propose(Command::now(action)).await {
            // Without a leader, it is tried again.
            Ok(_) | Err(ProposeError::Refused(_) | ProposeError::NoLeader) => Ok(()),
            Err(ProposeError::Storage(_) | ProposeError::Stopped) => Err(()),
        }
    }
}
