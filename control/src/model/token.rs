//! Join tokens beside the cluster's two: each is good for a time, and for so many nodes if that is wanted.

use mesh_api::id::TokenId;
use mesh_api::table::Role;
use serde::{Deserialize, Serialize};

/// Most tokens that there are at a time.
pub const TOKENS_MAX: usize = 1000;
/// Shortest life of a token, ns: a minute.
pub const TOKEN_LIFE_MIN_NS: u64 = 60 * 1_000_000_000;
/// Longest life of a token, ns: 365 days.
pub const TOKEN_LIFE_MAX_NS: u64 = 365 * 24 * 3600 * 1_000_000_000;
/// Most nodes that a token can be limited to.
pub const TOKEN_USES_MAX: u32 = 10_000;
/// How long a token is kept after its end, ns, for who comes with it to be told why it opens nothing: a day.
pub const TOKEN_KEPT_NS: u64 = 24 * 3600 * 1_000_000_000;

/// A join token. What there is of it here makes no working one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// What hosts become that join by it.
    pub role: Role,
    /// Its secret's [`mesh_api::token::JoinToken::secret_digest`].
    pub secret_digest: [u8; 32],
    /// When it was made, ns since the epoch.
    pub created_ns: u64,
    /// It is good until then, ns since the epoch.
    pub expires_ns: u64,
    /// Nodes that can join by it still; `None` for any number.
    pub uses_left: Option<u32>,
}

/// Whether a token is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenState {
    /// It is.
    Valid,
    /// Its time is over.
    Expired,
    /// As many nodes have joined as it was made for.
    UsedUp,
}

impl Token {
    /// Whether it is good at a time, ns since the epoch.
    pub fn state(&self, now_ns: u64) -> TokenState {
        if self.uses_left == Some(0) {
            TokenState::UsedUp
        } else if self.expires_ns <= now_ns {
            TokenState::Expired
        } else {
            TokenState::Valid
        }
    }

    /// Whether it is not even told apart from what never was a token, at a time, ns since the epoch.
    pub fn is_forgotten(&self, now_ns: u64) -> bool {
        self.expires_ns.saturating_add(TOKEN_KEPT_NS) <= now_ns
    }
}
