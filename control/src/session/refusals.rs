//! How many peers were turned away, by what was wrong with them.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a peer was turned away before it had what it came for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// What came was no TLS 1.3, or the stream broke amid the handshake.
    Handshake,
    /// Its certificate is not from the cluster's CA, or not valid at this time.
    Certificate,
    /// It asked for no protocol, or for one that is not served.
    Protocol,
    /// It showed no certificate where one is needed.
    Anonymous,
    /// It is no node of the cluster, or not any more.
    Node,
    /// It is a worker where a manager is expected.
    Role,
    /// Its join token is not the cluster's, or was rotated or removed.
    Token,
    /// Its join token has expired.
    TokenExpired,
    /// As many nodes have joined by its token as that was made for.
    TokenUsedUp,
    /// Its certificate has expired, and no operator has approved that it comes back.
    Unapproved,
    /// What it said is malformed, too long, out of turn, or can't be.
    Message,
    /// It took too long to say what it wants.
    Slow,
    /// It was the last of too many that were still to say what they want.
    Crowded,
    /// The manager could not serve it.
    Unavailable,
}

impl Cause {
    /// All of them, in order.
    pub const ALL: [Self; 14] = [
        Self::Handshake,
        Self::Certificate,
        Self::Protocol,
        Self::Anonymous,
        Self::Node,
        Self::Role,
        Self::Token,
        Self::TokenExpired,
        Self::TokenUsedUp,
        Self::Unapproved,
        Self::Message,
        Self::Slow,
        Self::Crowded,
        Self::Unavailable,
    ];

    /// The name in figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Certificate => "certificate",
            Self::Protocol => "protocol",
            Self::Anonymous => "anonymous",
            Self::Node => "node",
            Self::Role => "role",
            Self::Token => "token",
            Self::TokenExpired => "token_expired",
            Self::TokenUsedUp => "token_used_up",
            Self::Unapproved => "unapproved",
            Self::Message => "message",
            Self::Slow => "slow",
            Self::Crowded => "crowded",
            Self::Unavailable => "unavailable",
        }
    }
}

/// The counts, since the manager's start.
#[derive(Debug, Default)]
pub struct Refusals([AtomicU64; Cause::ALL.len()]);

impl Refusals {
    pub(super) fn count(&self, cause: Cause) {
        self.0[cause as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many were turned away for `cause`.
    pub fn get(&self, cause: Cause) -> u64 {
        self.0[cause as usize].load(Ordering::Relaxed)
    }

    /// All counts that are not 0.
    pub fn counted(&self) -> Vec<(Cause, u64)> {
        let all = Cause::ALL.into_iter().map(|cause| (cause, self.get(cause)));
        all.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_counted_by_itself() {
        let refusals = Refusals::default();
        for (at, cause) in Cause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, at);
            refusals.count(cause);
            assert_eq!(refusals.get(cause), 1, "{}", cause.name());
        }
        assert_eq!(refusals.counted().len(), Cause::ALL.len());
    }
}
