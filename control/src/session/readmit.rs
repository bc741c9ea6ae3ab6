//! A node comes back whose certificate has expired: it proves that it has the certificate's key, and an operator has
//! approved that it gets another.

use std::time::SystemTime;

use mesh_api::session::{ReadmitAnswer, ReadmitRequest, RefusalReason};
use mesh_api::tls::{Binding, Former, Roots};
use tokio::io::{AsyncRead, AsyncWrite};

use super::handshake::{Denied, certify, check_protocol, cluster, known, role};
use super::slots::Slot;
use super::{Cause, Server, SessionError, exchange};
use crate::clock::now_ns;
use crate::cluster::ProposeError;
use crate::command::{Action, Command};
use crate::model::Node;
use crate::pki::{Issued, PkiError};
use crate::refusal::Refusal;

/// Answers the one request of a node, on the connection of `binding`.
pub(super) async fn serve<S>(
    server: &Server,
    stream: S,
    slot: Slot,
    binding: &Binding,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Send,
{
    let refuse =
        |denied: &Denied| ReadmitAnswer::Refused { reason: denied.reason, message: denied.message.clone() };
    let decide = async |request| admit(server, request, binding).await;
    exchange::serve(server, stream, slot, decide, refuse).await
}

async fn admit(server: &Server, request: ReadmitRequest, binding: &Binding) -> Result<ReadmitAnswer, Denied> {
    let ReadmitRequest { protocol, chain, csr, proof } = request;
    check_protocol(protocol)?;
    let denied = |message| Denied::new(RefusalReason::Certificate, Cause::Certificate, message);
    let trusted = cluster(&server.cluster.state())?.ca.trusted();
    let roots = Roots::from_pem(&trusted).map_err(PkiError::from)?;
    let former = Former::of(&chain, &roots).map_err(|_| {
        denied("the node's certificate is not from this swarm's CA: leave the swarm and join it again")
    })?;
    if !former.has_proved(binding, &csr, &proof) {
        return Err(denied("the node does not prove that it has its certificate's key"));
    }
    let peer = former.peer();
    if SystemTime::now() < peer.not_after {
        return Err(denied(
            "the node's certificate is valid still by this manager's clock: check both hosts' clocks",
        ));
    }
    // From here on it is known who asks.
    let state = server.cluster.linearizable().await?;
    let node = known(&state, peer)?;
    if node.is_ready() {
        let message = "the managers hear from this node: if this host is a copy of it, leave the swarm and join it again";
        return Err(Denied::new(RefusalReason::Certificate, Cause::Node, message));
    }
    if !node.is_approved(now_ns()) {
        note(server, &node).await;
        return Err(ProposeError::from(Refusal::NotApproved(node.id.clone())).into());
    }
    let cluster = cluster(&state)?;
    let role = role(server, &node);
    let Issued { chain, issuer: _ } = certify(cluster, &node.id, role, &csr)?;
    server.cluster.propose(Command::now(Action::ReadmitNode { id: node.id.clone() })).await?;
    tracing::info!(node = %node.id, ?role, "a node whose certificate had expired has another, as was approved");
    Ok(ReadmitAnswer::Readmitted { chain, roots: cluster.ca.trusted() })
}

/// Has the state say that a node asks, for operators to see.
async fn note(server: &Server, node: &Node) {
    if node.readmission.asking_since_ns.is_some() {
        return;
    }
    tracing::warn!(
        node = %node.id,
        hostname = node.description.hostname,
        "a node whose certificate has expired asks for another: `shoal node approve` lets it come back"
    );
    if let Err(error) = server.cluster.propose(Command::now(Action::NoteAsking { id: node.id.clone() })).await
    {
        // It asks again.
        tracing::debug!(%error, "that a node asks could not be noted");
    }
}
