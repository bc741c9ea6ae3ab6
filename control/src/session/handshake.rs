//! Who opens a session: a node, by its certificate and by the list of nodes.

use std::sync::Arc;
use std::time::SystemTime;

use mesh_api::id::NodeId;
use mesh_api::session::{AgentMessage, ManagerMessage, NodeDescription, PROTOCOL_VERSION, RefusalReason};
use mesh_api::table::{NodeState, Role};
use mesh_api::tls::Peer;

use super::Server;
use super::refusals::Cause;
use super::trust::Trust;
use crate::cluster::ProposeError;
use crate::command::{Action, Command};
use crate::model::{ClusterObject, Node, State};
use crate::pki::{Issued, PkiError, Subject};
use crate::refusal::Refusal;

/// A node that is let in.
#[derive(Debug)]
pub(super) struct Admitted {
    /// The first answer.
    pub(super) answer: ManagerMessage,
    /// The index of the table that it has; 0 where it has lost that, `None` where it has never had one.
    pub(super) index: Option<u64>,
    /// What the answer tells of the CA.
    pub(super) trust: Trust,
}

/// A peer that is turned away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Denied {
    pub(super) reason: RefusalReason,
    pub(super) cause: Cause,
    pub(super) message: String,
}

impl Denied {
    pub(super) fn new(reason: RefusalReason, cause: Cause, message: impl Into<String>) -> Self {
        Self { reason, cause, message: message.into() }
    }

    /// Of a host whose join token is none.
    pub(super) fn token() -> Self {
        let message = "invalid join token: it is not this cluster's, or was rotated or removed; `docker swarm join-token` prints \
                       it";
        Self::new(RefusalReason::InvalidToken, Cause::Token, message)
    }
}

impl From<ProposeError> for Denied {
    fn from(error: ProposeError) -> Self {
        let (reason, cause) = match &error {
            ProposeError::Refused(Refusal::NodeNotFound(_)) => (RefusalReason::UnknownNode, Cause::Node),
            ProposeError::Refused(Refusal::TokenExpired) => {
                (RefusalReason::InvalidToken, Cause::TokenExpired)
            }
            ProposeError::Refused(Refusal::TokenUsedUp) => (RefusalReason::InvalidToken, Cause::TokenUsedUp),
            ProposeError::Refused(Refusal::TokenNotFound(_)) => return Self::token(),
            ProposeError::Refused(Refusal::NotApproved(_)) => (RefusalReason::Unapproved, Cause::Unapproved),
            ProposeError::Refused(Refusal::Unsupported(_))
            | ProposeError::Storage(_)
            | ProposeError::NoLeader
            | ProposeError::Stopped => (RefusalReason::Unavailable, Cause::Unavailable),
            ProposeError::Refused(_) => (RefusalReason::Invalid, Cause::Message),
        };
        Self::new(reason, cause, error.to_string())
    }
}

impl From<PkiError> for Denied {
    fn from(error: PkiError) -> Self {
        match error {
            PkiError::Request => Self::new(RefusalReason::Certificate, Cause::Message, error.to_string()),
            PkiError::Root | PkiError::Make(_) => {
                Self::new(RefusalReason::Unavailable, Cause::Unavailable, mesh_api::error::chain(&error))
            }
        }
    }
}

/// Decides on a node by its first message.
pub(super) async fn admit(server: &Server, peer: &Peer, message: AgentMessage) -> Result<Admitted, Denied> {
    let AgentMessage::Resume { protocol, node, index } = message else {
        return Err(Denied::new(RefusalReason::Protocol, Cause::Message, "a session begins with Resume"));
    };
    check_protocol(protocol)?;
    let (answer, trust) = resume(server, peer, node).await?;
    Ok(Admitted { answer, index, trust })
}

pub(super) fn check_protocol(protocol: u32) -> Result<(), Denied> {
    if protocol == PROTOCOL_VERSION {
        return Ok(());
    }
    let message = format!(
        "this manager speaks protocol version {PROTOCOL_VERSION}, the agent {protocol}: update the older"
    );
    Err(Denied::new(RefusalReason::Protocol, Cause::Message, message))
}

pub(super) fn cluster(state: &State) -> Result<&Arc<ClusterObject>, Denied> {
    let being_made =
        || Denied::new(RefusalReason::Unavailable, Cause::Unavailable, "the cluster is being made");
    state.cluster.as_ref().ok_or_else(being_made)
}

/// The node that a verified certificate is of, if it is one of the cluster's still.
pub(super) fn known(state: &State, peer: &Peer) -> Result<Arc<Node>, Denied> {
    let unknown = || {
        let message = "the node is not in the cluster: leave the swarm and join it again";
        Denied::new(RefusalReason::UnknownNode, Cause::Node, message)
    };
    if cluster(state)?.id != peer.cluster {
        return Err(unknown());
    }
    state.nodes.get(&peer.node).cloned().ok_or_else(unknown)
}

/// What a node's certificate is to say that it may do: a manager is one until the others do without it.
pub(super) fn role(server: &Server, node: &Node) -> Role {
    let is_member = server.cluster.managers().iter().any(|member| member.manager.node == node.id);
    if is_member { Role::Manager } else { node.spec.role }
}

/// A certificate for the node's key.
pub(super) fn certify(
    cluster: &ClusterObject,
    node: &NodeId,
    role: Role,
    csr: &str,
) -> Result<Issued, Denied> {
    let subject = Subject { node: node.clone(), role, cluster: cluster.id.clone() };
    let life = cluster.spec.cert_life();
    Ok(cluster.ca.sign(csr, &subject, life, SystemTime::now())?)
}

async fn resume(
    server: &Server,
    peer: &Peer,
    description: NodeDescription,
) -> Result<(ManagerMessage, Trust), Denied> {
    let state = server.cluster.state();
    let node = known(&state, peer)?;
    let id = node.id.clone();
    let action = Action::SetNodeStatus {
        id: id.clone(),
        state: NodeState::Ready,
        message: String::new(),
        description: Some(description),
    };
    server.registry().expect(&id);
    server.cluster.propose(Command::now(action)).await?;
    if node.issuer != peer.issuer {
        let action = Action::SetNodeIssuer { id: id.clone(), issuer: peer.issuer };
        server.cluster.propose(Command::now(action)).await?;
    }
    tracing::info!(node = %id, "a node opens its session");
    let cluster = cluster(&state)?;
    let (cluster_id, roots) = (cluster.id.clone(), cluster.ca.trusted());
    Ok((ManagerMessage::Resumed { cluster_id, role: node.spec.role, roots }, Trust::told(&state)))
}
