//! Join tokens are made, used, and go.

use std::sync::Arc;

use mesh_api::id::TokenId;
use mesh_api::table::Role;

use super::Draft;
use crate::model::token::{TOKEN_LIFE_MAX_NS, TOKEN_LIFE_MIN_NS, TOKEN_USES_MAX, TOKENS_MAX};
use crate::model::{Token, TokenState};
use crate::refusal::Refusal;

pub(super) fn create(
    draft: &mut Draft,
    id: &TokenId,
    role: Role,
    secret_digest: [u8; 32],
    life_ns: u64,
    uses: Option<u32>,
) -> Result<(), Refusal> {
    if draft.state.tokens.contains_key(id) {
        return Err(Refusal::IdTaken(id.to_string()));
    }
    if !(TOKEN_LIFE_MIN_NS..=TOKEN_LIFE_MAX_NS).contains(&life_ns) {
        let problem = "a token is good for 1m to 8760h (365 days): give a time between them (--expires)";
        return Err(Refusal::invalid("Expires", problem));
    }
    if uses.is_some_and(|uses| !(1..=TOKEN_USES_MAX).contains(&uses)) {
        let problem = format!(
            "a token is good for 1 to {TOKEN_USES_MAX} nodes: give a number between them, or none for any number (--uses)"
        );
        return Err(Refusal::invalid("Uses", problem));
    }
    if draft.state.tokens.len() >= TOKENS_MAX {
        return Err(Refusal::TokensExhausted);
    }
    let token = Token {
        id: id.clone(),
        role,
        secret_digest,
        created_ns: draft.at_ns,
        expires_ns: draft.at_ns.saturating_add(life_ns),
        uses_left: uses,
    };
    draft.state.tokens.insert(id.clone(), Arc::new(token));
    Ok(())
}

pub(super) fn remove(draft: &mut Draft, id: &TokenId) -> Result<(), Refusal> {
    draft.state.tokens.remove(id).map(drop).ok_or_else(|| Refusal::TokenNotFound(id.clone()))
}

/// A node joins by a token.
pub(super) fn take(draft: &mut Draft, id: &TokenId, role: Role) -> Result<(), Refusal> {
    let token = draft.state.tokens.get(id).filter(|token| token.role == role);
    let mut token = Token::clone(token.ok_or_else(|| Refusal::TokenNotFound(id.clone()))?);
    match token.state(draft.at_ns) {
        TokenState::Valid => {}
        TokenState::Expired => return Err(Refusal::TokenExpired),
        TokenState::UsedUp => return Err(Refusal::TokenUsedUp),
    }
    if let Some(uses_left) = &mut token.uses_left {
        *uses_left -= 1;
        draft.state.tokens.insert(id.clone(), Arc::new(token));
    }
    Ok(())
}

/// Drops those whose end is long over.
pub(super) fn drop_forgotten(draft: &mut Draft) {
    let now_ns = draft.at_ns;
    let forgotten: Vec<TokenId> =
        draft.state.tokens.values().filter(|it| it.is_forgotten(now_ns)).map(|it| it.id.clone()).collect();
    for id in &forgotten {
        draft.state.tokens.remove(id);
    }
}
