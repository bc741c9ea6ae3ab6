//! Who opens a session: a host with a join token, which becomes a node, or a node with its secret.

use mesh_api::id::{self, ClusterId, NodeId};
use mesh_api::session::{AgentMessage, ManagerMessage, NodeDescription, PROTOCOL_VERSION, RefusalReason};
use mesh_api::table::{NodeState, Role};
use mesh_api::token::JoinToken;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::Server;
use crate::cluster::ProposeError;
use crate::command::{Action, Command};
use crate::model::State;
use crate::refusal::Refusal;

/// A node that proved itself.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) node: NodeId,
    /// The first answer.
    pub(super) answer: ManagerMessage,
    /// It has never had a table.
    pub(super) is_fresh: bool,
}

/// A peer that is turned away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Denied {
    pub(super) reason: RefusalReason,
    pub(super) message: String,
}

impl Denied {
    fn new(reason: RefusalReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

impl From<ProposeError> for Denied {
    fn from(error: ProposeError) -> Self {
        let reason = match &error {
            ProposeError::Refused(Refusal::NodeNotFound(_)) => RefusalReason::UnknownNode,
            ProposeError::Refused(Refusal::Unsupported(_))
            | ProposeError::Storage(_)
            | ProposeError::Stopped => RefusalReason::Unavailable,
            ProposeError::Refused(_) => RefusalReason::Invalid,
        };
        Self::new(reason, error.to_string())
    }
}

/// Decides on a peer by its first message.
pub(super) async fn admit(server: &Server, message: AgentMessage) -> Result<Admitted, Denied> {
    match message {
        AgentMessage::Join { protocol, token, node } => {
            check_protocol(protocol)?;
            join(server, &token, node).await
        }
        AgentMessage::Resume { protocol, node_id, secret, node } => {
            check_protocol(protocol)?;
            resume(server, node_id, &secret, node).await
        }
        AgentMessage::Applied { .. }
        | AgentMessage::Tasks { .. }
        | AgentMessage::Described { .. }
        | AgentMessage::Attach { .. }
        | AgentMessage::Alive
        | AgentMessage::Leave => {
            Err(Denied::new(RefusalReason::Protocol, "a session begins with Join or Resume"))
        }
    }
}

fn check_protocol(protocol: u32) -> Result<(), Denied> {
    if protocol == PROTOCOL_VERSION {
        return Ok(());
    }
    let message = format!(
        "this manager speaks protocol version {PROTOCOL_VERSION}, the agent {protocol}: update the older"
    );
    Err(Denied::new(RefusalReason::Protocol, message))
}

fn cluster_id(state: &State) -> Result<ClusterId, Denied> {
    let cluster = state.cluster.as_ref();
    cluster
        .map(|cluster| cluster.id.clone())
        .ok_or_else(|| Denied::new(RefusalReason::Unavailable, "the cluster is being made"))
}

async fn join(server: &Server, token: &str, node: NodeDescription) -> Result<Admitted, Denied> {
    let cluster = &server.cluster;
    let cluster_id = cluster_id(&cluster.state())?;
    let invalid = || {
        let message = "invalid join token: it is not this cluster's, or was rotated; `docker swarm join-token` prints it";
        Denied::new(RefusalReason::InvalidToken, message)
    };
    let token: JoinToken = token.parse().map_err(|_| invalid())?;
    let role =
        [Role::Worker, Role::Manager].into_iter().find(|role| same(&token, &cluster.join_token(*role)));
    let role = role.ok_or_else(invalid)?;
    let (node_id, secret) = {
        let mut rng = rand::rng();
        (NodeId::random(&mut rng), id::random(&mut rng))
    };
    let action = Action::AddNode {
        id: node_id.clone(),
        role,
        description: node,
        secret_sha256: Sha256::digest(secret.as_bytes()).into(),
    };
    server.registry().expect(&node_id);
    cluster.propose(Command::now(action)).await?;
    tracing::info!(node = %node_id, ?role, "a node joined");
    let answer = ManagerMessage::Joined { cluster_id, node_id: node_id.clone(), secret, role };
    Ok(Admitted { node: node_id, answer, is_fresh: true })
}

/// Compares in constant time, so that an answer's time says nothing of how much of a token is right.
fn same(a: &JoinToken, b: &JoinToken) -> bool {
    (a.digest.as_bytes().ct_eq(b.digest.as_bytes()) & a.secret.as_bytes().ct_eq(b.secret.as_bytes())).into()
}

async fn resume(
    server: &Server,
    node_id: NodeId,
    secret: &str,
    description: NodeDescription,
) -> Result<Admitted, Denied> {
    let cluster = &server.cluster;
    let state = cluster.state();
    let unknown = || {
        let message =
            "the node is not in the cluster, or its secret is wrong: leave the swarm and join it again";
        Denied::new(RefusalReason::UnknownNode, message)
    };
    let digest: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
    let known = state.nodes.get(&node_id).filter(|node| bool::from(node.secret_sha256.ct_eq(&digest)));
    let role = known.ok_or_else(unknown)?.spec.role;
    let action = Action::SetNodeStatus {
        id: node_id.clone(),
        state: NodeState::Ready,
        message: String::new(),
        description: Some(description),
    };
    server.registry().expect(&node_id);
    cluster.propose(Command::now(action)).await?;
    tracing::info!(node = %node_id, "a node is back");
    let answer = ManagerMessage::Resumed { cluster_id: cluster_id(&state)?, role };
    Ok(Admitted { node: node_id, answer, is_fresh: false })
}
