//! What a manager keeps on disk is sealed: nobody reads it, or changes it unnoticed, without the key. And the key that an
//! operator unlocks a manager with, in Docker's format: `SWMKEY-1-<43 characters of base 64>`.
//!
//! ```text
//! salt 16 | count 8 | ciphertext | tag 16        ChaCha20-Poly1305 (RFC 8439)
//! ```
//!
//! The cipher's key is derived from the data key and the salt (HKDF-SHA256, RFC 5869), and the nonce is the count. A [`Seal`]
//! draws its salt when it is made and counts what it seals, so that no key meets a nonce twice, however often a process
//! starts or a folder is copied.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;
use serde::{Deserialize, Serialize};

const SALT_BYTES: usize = 16;
const COUNT_BYTES: usize = 8;
const TAG_BYTES: usize = 16;
/// How much longer something is once it is sealed, bytes.
pub const SEAL_BYTES: usize = SALT_BYTES + COUNT_BYTES + TAG_BYTES;
const HEAD_BYTES: usize = SALT_BYTES + COUNT_BYTES;
/// What the derived keys are for.
const INFO: &[u8] = b"shoal seal 1";
/// Derived keys that are kept for what others sealed: a log has one for each start of its manager.
const MET_MAX: usize = 64;
const PREFIX: &str = "SWMKEY-1-";

/// A 256-bit data key.
pub type DataKey = [u8; 32];

type Salt = [u8; SALT_BYTES];

/// Something that none of the keys opens: they are others, or it was changed, cut off, or put in another's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it can't be opened: it was sealed with another key or under another name, or it is damaged")]
pub struct SealError;

/// Seals with one data key, and opens what that and earlier ones sealed.
pub struct Seal {
    keys: Vec<DataKey>,
    salt: Salt,
    key: LessSafeKey,
    next: AtomicU64,
    /// Keys of other salts, as far as something was opened with them; whether by the first data key.
    met: Mutex<Vec<Met>>,
}

#[derive(Clone)]
struct Met {
    salt: Salt,
    key: Arc<LessSafeKey>,
    is_first: bool,
}

impl Seal {
    /// Seals with `key`, and opens what `key` and `former` sealed.
    pub fn new(key: DataKey, former: &[DataKey]) -> Self {
        let salt: Salt = rand::random();
        let keys = [&[key], former].concat();
        Self { key: derived(&key, &salt), keys, salt, next: AtomicU64::new(0), met: Mutex::default() }
    }

    /// Seals `plain` under a name; it opens under that name alone.
    pub fn seal(&self, name: &[u8], plain: &[u8]) -> Vec<u8> {
        // It would take centuries for the count to run out.
        let count = self.next.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mut sealed = Vec::with_capacity(plain.len() + SEAL_BYTES);
        sealed.extend(self.salt);
        sealed.extend(count);
        sealed.extend(plain);
        let tag =
            self.key.seal_in_place_separate_tag(nonce(count), Aad::from(name), &mut sealed[HEAD_BYTES..]);
        match tag {
            Ok(tag) => sealed.extend(tag.as_ref()),
            // Only what is longer than 256 GB; what is without a tag never opens.
            Err(ring::error::Unspecified) => sealed.clear(),
        }
        sealed
    }

    /// Opens what was sealed under a name.
    pub fn open(&self, name: &[u8], sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        self.open_told(name, sealed).map(|(plain, _)| plain)
    }

    /// As [`Seal::open`], and whether the key that seals opened it.
    pub fn open_told(&self, name: &[u8], sealed: &[u8]) -> Result<(Vec<u8>, bool), SealError> {
        let (salt, rest) = sealed.split_first_chunk::<SALT_BYTES>().ok_or(SealError)?;
        let (count, body) = rest.split_first_chunk::<COUNT_BYTES>().ok_or(SealError)?;
        if *salt == self.salt {
            return opened(&self.key, *count, name, body).map(|plain| (plain, true)).ok_or(SealError);
        }
        let met = {
            let met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
            met.iter().find(|met| met.salt == *salt).cloned()
        };
        if let Some(Met { key, is_first, .. }) = met {
            return opened(&key, *count, name, body).map(|plain| (plain, is_first)).ok_or(SealError);
        }
        for (at, key) in self.keys.iter().enumerate() {
            let (key, is_first) = (derived(key, salt), at == 0);
            if let Some(plain) = opened(&key, *count, name, body) {
                let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
                if met.len() == MET_MAX {
                    met.remove(0);
                }
                met.push(Met { salt: *salt, key: Arc::new(key), is_first });
                return Ok((plain, is_first));
            }
        }
        Err(SealError)
    }

    /// Whether there are earlier keys, by which something may be sealed still.
    pub fn has_former(&self) -> bool {
        self.keys.len() > 1
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

fn nonce(count: [u8; COUNT_BYTES]) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[NONCE_LEN - COUNT_BYTES..].copy_from_slice(&count);
    Nonce::assume_unique_for_key(nonce)
}

fn opened(key: &LessSafeKey, count: [u8; COUNT_BYTES], name: &[u8], body: &[u8]) -> Option<Vec<u8>> {
    let mut plain = body.to_vec();
    let bytes = key.open_in_place(nonce(count), Aad::from(name), &mut plain).ok()?.len();
    plain.truncate(bytes);
    Some(plain)
}

#[expect(clippy::expect_used, reason = "HKDF gives up to 8160 bytes, and 32 are asked for")]
fn derived(key: &DataKey, salt: &Salt) -> LessSafeKey {
    let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(key);
    let derived = secret.expand(&[INFO], &CHACHA20_POLY1305).map(UnboundKey::from);
    LessSafeKey::new(derived.expect("32 bytes are not too many"))
}

/// The key that unlocks managers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct UnlockKey([u8; 32]);

/// A text that is not an unlock key (SwarmKit's words).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid key string")]
pub struct MalformedUnlockKey;

impl UnlockKey {
    /// A new one.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// What it seals with.
    pub fn seal(&self) -> Seal {
        Seal::new(self.0, &[])
    }
}

impl fmt::Display for UnlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", STANDARD_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for UnlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UnlockKey(…)")
    }
}

impl From<UnlockKey> for String {
    fn from(key: UnlockKey) -> Self {
        key.to_string()
    }
}

impl FromStr for UnlockKey {
    type Err = MalformedUnlockKey;

    fn from_str(text: &str) -> Result<Self, MalformedUnlockKey> {
        let bytes = text.strip_prefix(PREFIX).and_then(|digits| STANDARD_NO_PAD.decode(digits).ok());
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or(MalformedUnlockKey)
    }
}

impl TryFrom<String> for UnlockKey {
    type Error = MalformedUnlockKey;

    fn try_from(text: String) -> Result<Self, MalformedUnlockKey> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_key_and_the_name_open_it() {
        let seal = Seal::new([1; 32], &[]);
        let sealed = seal.seal(b"vote", b"for n1");
        assert_eq!(sealed.len(), 6 + SEAL_BYTES);
        assert!(!sealed.windows(4).any(|window| window == b"for "));
        assert_eq!(seal.open(b"vote", &sealed).unwrap(), b"for n1");
        // Another process with the same key.
        assert_eq!(Seal::new([1; 32], &[]).open_told(b"vote", &sealed), Ok((b"for n1".to_vec(), true)));
        assert_eq!(
            Seal::new([2; 32], &[[1; 32]]).open_told(b"vote", &sealed),
            Ok((b"for n1".to_vec(), false))
        );
        assert_eq!(seal.open(b"votes", &sealed), Err(SealError));
        assert_eq!(Seal::new([2; 32], &[]).open(b"vote", &sealed), Err(SealError));
        assert!(!format!("{seal:?}").contains("1, 1"));
    }

    #[test]
    fn nothing_is_sealed_alike_twice() {
        let seals = [Seal::new([1; 32], &[]), Seal::new([1; 32], &[])];
        let mut heads = std::collections::BTreeSet::new();
        for seal in seals.iter().cycle().take(1000) {
            assert!(heads.insert(seal.seal(b"", b"")[..HEAD_BYTES].to_vec()), "key and nonce are used twice");
        }
    }

    #[test]
    fn more_salts_than_are_kept_open_all_the_same() {
        let seal = Seal::new([1; 32], &[]);
        let sealed: Vec<_> = (0..3 * MET_MAX).map(|_| Seal::new([1; 32], &[]).seal(b"n", b"x")).collect();
        for sealed in sealed.iter().chain(&sealed) {
            assert_eq!(seal.open(b"n", sealed).unwrap(), b"x");
        }
        assert_eq!(seal.met.lock().unwrap().len(), MET_MAX);
    }

    /// Made by another implementation of the same standards.
    #[test]
    fn the_format_is_the_one_that_is_described() {
        let sealed = "AAECAwQFBgcICQoLDA0ODwAAAAAAAAAF630YarJEkoiu6O4kitD3sxkxJiRoeB8JvL5ffcQ8";
        let sealed = STANDARD_NO_PAD.decode(sealed).unwrap();
        assert_eq!(Seal::new([7; 32], &[]).open(b"log V", &sealed).unwrap(), b"a term, a vote");
    }

    proptest! {
        #[test]
        fn damage_of_any_byte_is_seen(at in 0_usize..60, bit in 0_u8..8) {
            let seal = Seal::new([1; 32], &[]);
            let mut sealed = seal.seal(b"name", &[7; 20]);
            sealed[at] ^= 1 << bit;
            prop_assert_eq!(seal.open(b"name", &sealed), Err(SealError));
            sealed[at] ^= 1 << bit;
            prop_assert_eq!(seal.open(b"name", &sealed[..at]), Err(SealError));
        }
    }

    #[test]
    fn an_unlock_key_is_written_as_docker_writes_it() {
        let key = UnlockKey([0xfb; 32]);
        let text = key.to_string();
        assert_eq!(text, "SWMKEY-1-+/v7+/v7+/v7+/v7+/v7+/v7+/v7+/v7+/v7+/v7+/s");
        assert_eq!(text.parse(), Ok(key.clone()));
        assert_eq!(serde_json::from_str::<UnlockKey>(&serde_json::to_string(&key).unwrap()).unwrap(), key);
        assert!(!format!("{key:?}").contains('+'));
        let last = &text[..text.len() - 1];
        for wrong in
            ["", "SWMKEY-1-", last, &format!("{last}t"), &format!("{text}="), &text.replace('1', "2")]
        {
            assert_eq!(wrong.parse::<UnlockKey>(), Err(MalformedUnlockKey), "{wrong}");
        }
        assert_ne!(UnlockKey::random(), UnlockKey::random());
    }
}
