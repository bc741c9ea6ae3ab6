//! A host asks to become a node: a token for a certificate, once.

use mesh_api::codec::{FrameReader, FrameWriter, JOIN_FRAME_BYTES_MAX};
use mesh_api::id::NodeId;
use mesh_api::session::{JoinAnswer, JoinRequest, RefusalReason};
use mesh_api::table::Role;
use mesh_api::token::JoinToken;
use subtle::ConstantTimeEq as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::handshake::{Denied, certify, check_protocol, cluster};
use super::peer::SILENCE_MAX;
use super::refusals::Cause;
use super::slots::Slot;
use super::{Server, SessionError};
use crate::command::{Action, Command};
use crate::pki::Issued;

/// Answers the one request of a host.
pub(super) async fn serve<S>(server: &Server, stream: S, mut slot: Slot) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Send,
{
    let (reading, writing) = tokio::io::split(stream);
    let mut reader = FrameReader::<_, JoinRequest>::new(reading, JOIN_FRAME_BYTES_MAX);
    let request = match slot.within(reader.next()).await {
        Ok(Ok(Some(request))) => request,
        Ok(Ok(None) | Err(_)) => return Err(server.turn_away(Cause::Message)),
        Err(cause) => return Err(server.turn_away(cause)),
    };
    drop(slot);
    let (answer, denied) = match admit(server, request).await {
        Ok(answer) => (answer, None),
        Err(Denied { reason, cause, message }) => {
            (JoinAnswer::Refused { reason, message: message.clone() }, Some((cause, message)))
        }
    };
    let mut writer = FrameWriter::new(writing);
    let say = async {
        writer.send(&answer).await?;
        writer.finish().await
    };
    let said = timeout(SILENCE_MAX, say).await.map_err(|_| SessionError::Timeout)?;
    match denied {
        Some((cause, message)) => {
            server.refusals.count(cause);
            Err(SessionError::Refused(message))
        }
        None => Ok(said?),
    }
}

pub(super) async fn admit(server: &Server, request: JoinRequest) -> Result<JoinAnswer, Denied> {
    let JoinRequest { protocol, token, csr, node } = request;
    check_protocol(protocol)?;
    let state = server.cluster.state();
    let cluster = cluster(&state)?;
    let invalid = || {
        let message = "invalid join token: it is not this cluster's, or was rotated; `docker swarm join-token` prints it";
        Denied::new(RefusalReason::InvalidToken, Cause::Token, message)
    };
    let token: JoinToken = token.parse().map_err(|_| invalid())?;
    let role =
        [Role::Worker, Role::Manager].into_iter().find(|role| same(&token, &cluster.join_token(*role)));
    let role = role.ok_or_else(invalid)?;
    let node_id = NodeId::random(&mut rand::rng());
    let Issued { chain, issuer } = certify(cluster, &node_id, role, &csr)?;
    let action = Action::AddNode { id: node_id.clone(), role, description: node, issuer };
    server.registry().expect(&node_id);
    server.cluster.propose(Command::now(action)).await?;
    tracing::info!(node = %node_id, ?role, "a node joined");
    Ok(JoinAnswer::Joined {
        cluster_id: cluster.id.clone(),
        node_id,
        role,
        chain,
        roots: cluster.ca.trusted(),
    })
}

/// Compares in constant time, so that an answer's time says nothing of how much of a token is right.
fn same(a: &JoinToken, b: &JoinToken) -> bool {
    (a.digest.as_bytes().ct_eq(b.digest.as_bytes()) & a.secret.as_bytes().ct_eq(b.secret.as_bytes())).into()
}
