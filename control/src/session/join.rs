//! A host asks to become a node: a token for a certificate, once.

use mesh_api::id::{NodeId, TokenId};
use mesh_api::session::{JoinAnswer, JoinRequest};
use mesh_api::table::Role;
use mesh_api::token::JoinToken;
use subtle::{Choice, ConstantTimeEq as _};
use tokio::io::{AsyncRead, AsyncWrite};

use super::handshake::{Denied, certify, check_protocol, cluster};
use super::slots::Slot;
use super::{Server, SessionError, exchange};
use crate::clock::now_ns;
use crate::cluster::ProposeError;
use crate::command::{Action, Command};
use crate::model::{State, TokenState};
use crate::pki::Issued;
use crate::refusal::Refusal;

/// What a join token opens.
struct Opening {
    role: Role,
    /// The token, where it is not one of the cluster's two.
    token: Option<TokenId>,
}

/// Answers the one request of a host.
pub(super) async fn serve<S>(server: &Server, stream: S, slot: Slot) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Send,
{
    let refuse =
        |denied: &Denied| JoinAnswer::Refused { reason: denied.reason, message: denied.message.clone() };
    exchange::serve(server, stream, slot, async |request| admit(server, request).await, refuse).await
}

pub(super) async fn admit(server: &Server, request: JoinRequest) -> Result<JoinAnswer, Denied> {
    let JoinRequest { protocol, token, csr, node } = request;
    check_protocol(protocol)?;
    let token: JoinToken = token.parse().map_err(|_| Denied::token())?;
    let (state, Opening { role, token }) = opening(server, &token).await?;
    let cluster = cluster(&state)?;
    let node_id = NodeId::random(&mut rand::rng());
    let Issued { chain, issuer } = certify(cluster, &node_id, role, &csr)?;
    let action = Action::AddNode { id: node_id.clone(), role, description: node, issuer, token };
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

/// What `token` opens, and the state by which it does.
async fn opening(server: &Server, token: &JoinToken) -> Result<(State, Opening), Denied> {
    let state = server.cluster.state();
    if let Some(opening) = find(&state, token)? {
        return Ok((state, opening));
    }
    // It may have been made a moment ago, by way of another manager.
    let _asking = server.asking.try_acquire().map_err(|_| Denied::token())?;
    let state = server.cluster.linearizable().await?;
    let opening = find(&state, token)?.ok_or_else(Denied::token)?;
    Ok((state, opening))
}

/// What `token` opens by `state`; all tokens are looked at, so that the time it takes says nothing of them.
fn find(state: &State, token: &JoinToken) -> Result<Option<Opening>, Denied> {
    let cluster = cluster(state)?;
    let roles = [Role::Worker, Role::Manager];
    if let Some(role) = roles.into_iter().find(|role| same(token, &cluster.join_token(*role))) {
        return Ok(Some(Opening { role, token: None }));
    }
    let digest = token.secret_digest();
    let is_known = |known: &[u8; 32]| -> Choice { known.ct_eq(&digest) };
    let found = state
        .tokens
        .values()
        .fold(None, |found, known| if is_known(&known.secret_digest).into() { Some(known) } else { found });
    let Some(found) = found.filter(|_| token.names(&cluster.ca.root.digest())) else { return Ok(None) };
    let refused = |refusal: Refusal| Err(ProposeError::from(refusal).into());
    match found.state(now_ns()) {
        TokenState::Valid => Ok(Some(Opening { role: found.role, token: Some(found.id.clone()) })),
        TokenState::Expired => refused(Refusal::TokenExpired),
        TokenState::UsedUp => refused(Refusal::TokenUsedUp),
    }
}

/// Compares in constant time, so that an answer's time says nothing of how much of a token is right.
fn same(a: &JoinToken, b: &JoinToken) -> bool {
    (a.digest.as_bytes().ct_eq(b.digest.as_bytes()) & a.secret.as_bytes().ct_eq(b.secret.as_bytes())).into()
}
