//! `/shoal/v1/tokens`, on managers: join tokens beside the swarm's two, each for a time and for so many nodes.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mesh_api::id::TokenId;
use mesh_api::token::JoinToken;
use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use crate::clock::now_ns;
use crate::command::{Action, Command};
use crate::docker::error::{ApiError, ApiResult};
use crate::docker::request::Body;
use crate::docker::time::rfc3339;
use crate::docker::{Api, names, nodes, swarm};
use crate::model::labels::duration_ns;
use crate::model::{Token, TokenState};

/// How long a token is good where nothing is said, ns: a day.
const LIFE_NS: u64 = 24 * 3600 * 1_000_000_000;

/// What token to make. A misspelt limit must not make an unlimited one.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase", deny_unknown_fields)]
pub(in crate::docker) struct TokenRequest {
    role: Option<String>,
    expires: Option<String>,
    uses: Option<i64>,
}

/// A token, without its secret.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct TokenAnswer {
    #[serde(rename = "ID")]
    id: String,
    role: &'static str,
    created_at: String,
    expires_at: String,
    /// Null: any number.
    uses_left: Option<u32>,
    /// `valid`, `expired` or `used up`.
    state: &'static str,
}

/// A token that was made just now: nobody is told its secret again.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct MadeToken {
    #[serde(flatten)]
    made: TokenAnswer,
    token: String,
    /// Where the host is to ask; null where this manager is one of the others no longer.
    remote_addr: Option<String>,
}

/// `GET /shoal/v1/tokens`.
pub(in crate::docker) async fn list(State(api): State<Api>) -> ApiResult<Json<Vec<TokenAnswer>>> {
    let state = api.state().await?;
    let now_ns = now_ns();
    Ok(Json(state.tokens.values().map(|token| show(token, now_ns)).collect()))
}

/// `POST /shoal/v1/tokens`.
pub(in crate::docker) async fn create(
    State(api): State<Api>,
    Body(request): Body<TokenRequest>,
) -> ApiResult<(StatusCode, Json<MadeToken>)> {
    let cluster = api.manager()?;
    let TokenRequest { role, expires, uses } = request;
    let missing = || ApiError::invalid("Role: missing: expected manager or worker (--role)");
    let role = nodes::role(&role.ok_or_else(missing)?)?;
    let life_ns = match expires.filter(|text| !text.is_empty()) {
        None => LIFE_NS,
        Some(text) => duration_ns(&text).ok_or_else(|| {
            ApiError::invalid(format!(
                "Expires: '{text}' is no time: give one such as 90m or 24h (--expires)"
            ))
        })?,
    };
    // What is none, apply refuses as it does 0.
    let uses = uses.map(|uses| u32::try_from(uses).unwrap_or(0));
    let (id, secret): (TokenId, [u8; 16]) = {
        let mut rng = rand::rng();
        (TokenId::random(&mut rng), rng.random())
    };
    let digest = swarm::object(&cluster.linearizable().await?)?.ca.root.digest();
    let token = JoinToken::new(&digest, &secret);
    let secret_digest = token.secret_digest();
    let action = Action::CreateToken { id: id.clone(), role, secret_digest, life_ns, uses };
    cluster.propose(Command::now(action)).await?;
    let state = cluster.state();
    let gone = || ApiError::conflict("the token was removed while it was made: make another");
    let made = show(state.tokens.get(&id).ok_or_else(gone)?, now_ns());
    let own = cluster.managers().into_iter().find(|member| member.id == cluster.raft_id());
    let remote_addr = own.map(|member| member.manager.addr.to_string());
    Ok((StatusCode::CREATED, Json(MadeToken { made, token: token.to_string(), remote_addr })))
}

/// `DELETE /shoal/v1/tokens/{id}`.
pub(in crate::docker) async fn remove(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<StatusCode> {
    let cluster = api.manager()?;
    let id = names::token(&cluster.linearizable().await?, &id)?.id.clone();
    cluster.propose(Command::now(Action::RemoveToken { id })).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn show(token: &Token, now_ns: u64) -> TokenAnswer {
    let Token { id, role, secret_digest: _, created_ns, expires_ns, uses_left } = token;
    TokenAnswer {
        id: id.to_string(),
        role: nodes::role_name(*role),
        created_at: rfc3339(*created_ns),
        expires_at: rfc3339(*expires_ns),
        uses_left: *uses_left,
        state: match token.state(now_ns) {
            TokenState::Valid => "valid",
            TokenState::Expired => "expired",
            TokenState::UsedUp => "used up",
        },
    }
}
