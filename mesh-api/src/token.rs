//! Join tokens, in Docker's format: `SWMTKN-1-<50 base-36 digits: digest>-<25 base-36 digits: secret>`.
//!
//! The digest (SHA-256 of the DER of its root certificate) names the cluster, the secret the role. Source: SwarmKit's
//! `ca/config.go`.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::id::BASE36;

const PREFIX: &str = "SWMTKN-1-";
const DIGEST_LEN: usize = 50;
const SECRET_LEN: usize = 25;

/// A join token's parts.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// 50 base-36 digits that name the cluster.
    pub digest: String,
    /// 25 base-36 digits that name the role.
    pub secret: String,
}

/// A text that is not a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid join token: expected SWMTKN-1-<50 characters>-<25 characters>, as `docker swarm join-token` prints it"
)]
pub struct MalformedToken;

impl JoinToken {
    /// The token of a cluster with the 256-bit `digest`, for the role with the 128-bit `secret`.
    pub fn new(digest: &[u8; 32], secret: &[u8; 16]) -> Self {
        Self { digest: base36(digest, DIGEST_LEN), secret: base36(secret, SECRET_LEN) }
    }

    /// Whether it is of the cluster whose root certificate has this digest.
    pub fn names(&self, digest: &[u8; 32]) -> bool {
        self.digest == base36(digest, DIGEST_LEN)
    }

    /// SHA-256 of the secret's digits: enough to know the token by, and not to make it.
    pub fn secret_digest(&self) -> [u8; 32] {
        Sha256::digest(&self.secret).into()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-{}", self.digest, self.secret)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-…", self.digest)
    }
}

impl FromStr for JoinToken {
    type Err = MalformedToken;

    fn from_str(text: &str) -> Result<Self, MalformedToken> {
        let (digest, secret) =
            text.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).ok_or(MalformedToken)?;
        let valid = |part: &str, len| part.len() == len && part.bytes().all(|byte| BASE36.contains(&byte));
        if !valid(digest, DIGEST_LEN) || !valid(secret, SECRET_LEN) {
            return Err(MalformedToken);
        }
        Ok(Self { digest: digest.to_owned(), secret: secret.to_owned() })
    }
}

/// `bytes`, read as a big-endian number, in base 36, padded with zeros to `len` digits.
fn base36(bytes: &[u8], len: usize) -> String {
    let mut number = bytes.to_vec();
    let mut digits = vec![b'0'; len];
    for digit in digits.iter_mut().rev() {
        let mut remainder = 0;
        for byte in &mut number {
            let value = remainder * 256 + u32::from(*byte);
            *byte = (value / 36) as u8;
            remainder = value % 36;
        }
        *digit = BASE36[remainder as usize];
    }
    digits.into_iter().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_as_written() {
        let token = JoinToken::new(&[0xff; 32], &[7; 16]);
        let text = token.to_string();
        assert_eq!(text.len(), "SWMTKN-1-".len() + 50 + 1 + 25);
        assert!(token.names(&[0xff; 32]) && !token.names(&[0xfe; 32]));
        assert_ne!(token.secret_digest(), JoinToken::new(&[0xff; 32], &[8; 16]).secret_digest());
        assert_eq!(text.parse(), Ok(token));
    }

    #[test]
    fn the_largest_values_fit_their_digits() {
        assert_eq!(base36(&[0, 0], 4), "0000");
        assert_eq!(base36(&[0, 35], 4), "000z");
        assert_eq!(base36(&[1, 0], 4), "0074");
        assert_ne!(base36(&[0xff; 32], DIGEST_LEN).as_bytes()[0], b'0');
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "SWMTKN-1-", "SWMTKN-1-abc-def", "SWMTKN-2-x", &"x".repeat(85)] {
            assert_eq!(text.parse::<JoinToken>(), Err(MalformedToken), "{text}");
        }
    }

    #[test]
    fn debug_output_hides_the_secret() {
        let token = JoinToken::new(&[1; 32], &[2; 16]);
        assert!(!format!("{token:?}").contains(&token.secret));
    }
}
