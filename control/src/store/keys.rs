//! The data keys that a manager's files are sealed with, in a small file beside them: in the clear, or sealed themselves by
//! the swarm's unlock key (`docker swarm update --autolock`).
//!
//! This file alone changes with the unlock key, in one step. When it is first sealed, a fresh data key goes with it, since
//! the one before was on the disk in the clear; what that sealed is sealed anew, and it stays beside for what is not yet.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_api::seal::{DataKey, Seal, UnlockKey};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::folder::write_secret;
use super::{FORMAT, StoreError};
use crate::model::Lock;

/// The file in a manager's folder.
pub(super) const FILE: &str = "key";
const UNFINISHED: &str = "key.unfinished";

/// The file.
#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    /// The cluster's lock that it follows.
    epoch: u64,
    keys: KeptKeys,
}

/// The data keys, one after the other, the one that seals first; base 64.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KeptKeys {
    Clear(String),
    Sealed(String),
}

/// A manager's data keys.
#[derive(Debug)]
pub struct Keys {
    dir: PathBuf,
    inner: Mutex<Inner>,
    seal: watch::Sender<Arc<Seal>>,
}

struct Inner {
    lock: Lock,
    keys: Vec<DataKey>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("lock", &self.lock).finish_non_exhaustive()
    }
}

impl Keys {
    /// Makes a data key for the manager whose folder is `dir`, sealed as `lock` says.
    pub fn create(dir: &Path, lock: Lock) -> Result<Arc<Self>, StoreError> {
        let keys = Self::over(dir, lock, vec![rand::random()]);
        keys.save(&keys.inner())?;
        Ok(keys)
    }

    /// Reads those in `dir`: with the unlock key where they are sealed.
    pub fn open(dir: &Path, unlock: Option<&UnlockKey>) -> Result<Arc<Self>, StoreError> {
        let path = dir.join(FILE);
        let damaged = |problem: &str| StoreError::Damaged { path: path.clone(), problem: problem.to_owned() };
        let Kept { format: _, epoch, keys } = read(&path)?.ok_or_else(|| damaged("it is missing"))?;
        let (KeptKeys::Clear(text) | KeptKeys::Sealed(text)) = &keys;
        let bytes = STANDARD.decode(text).map_err(|_| damaged("it is not base 64"))?;
        let (key, bytes) = match (&keys, unlock) {
            (KeptKeys::Clear(_), _) => (None, bytes),
            (KeptKeys::Sealed(_), None) => return Err(StoreError::Locked),
            (KeptKeys::Sealed(_), Some(unlock)) => {
                let bytes =
                    unlock.seal().open(&name(epoch), &bytes).map_err(|_| StoreError::WrongUnlockKey)?;
                (Some(unlock.clone()), bytes)
            }
        };
        let (keys, rest) = bytes.as_chunks();
        if keys.is_empty() || !rest.is_empty() {
            return Err(damaged("it holds no whole key"));
        }
        Ok(Self::over(dir, Lock { epoch, key }, keys.to_vec()))
    }

    /// Whether those in `dir` are sealed by an unlock key.
    pub fn are_locked(dir: &Path) -> Result<bool, StoreError> {
        let kept = read(&dir.join(FILE))?;
        Ok(kept.is_some_and(|kept| matches!(kept.keys, KeptKeys::Sealed(_))))
    }

    fn over(dir: &Path, lock: Lock, keys: Vec<DataKey>) -> Arc<Self> {
        let seal = watch::Sender::new(seal_of(&keys));
        Arc::new(Self { dir: dir.to_owned(), inner: Mutex::new(Inner { lock, keys }), seal })
    }

    /// What seals at this moment.
    pub fn seal(&self) -> Arc<Seal> {
        self.seal.borrow().clone()
    }

    /// Follows what seals.
    pub fn watch(&self) -> watch::Receiver<Arc<Seal>> {
        self.seal.subscribe()
    }

    /// The unlock key, where there is one.
    pub fn unlock_key(&self) -> Option<UnlockKey> {
        self.inner().lock.key.clone()
    }

    /// Does as the cluster's lock says, unless it is older than what is followed already. Whether there is another data key
    /// then, and what was sealed before is to be sealed anew.
    pub fn follow(&self, lock: &Lock) -> Result<bool, StoreError> {
        let mut inner = self.inner();
        if lock.epoch <= inner.lock.epoch {
            return Ok(false);
        }
        let was_clear = inner.lock.key.is_none() && lock.key.is_some();
        let fresh = was_clear.then(rand::random);
        let next = Inner { lock: lock.clone(), keys: fresh.into_iter().chain(inner.keys.clone()).collect() };
        self.save(&next)?;
        *inner = next;
        if was_clear {
            self.seal.send_replace(seal_of(&inner.keys));
        }
        Ok(was_clear)
    }

    fn save(&self, inner: &Inner) -> Result<(), StoreError> {
        let Inner { lock: Lock { epoch, key }, keys } = inner;
        let bytes = keys.concat();
        let keys = match key {
            None => KeptKeys::Clear(STANDARD.encode(bytes)),
            Some(key) => KeptKeys::Sealed(STANDARD.encode(key.seal().seal(&name(*epoch), &bytes))),
        };
        let kept = serde_json::to_vec(&Kept { format: FORMAT, epoch: *epoch, keys }).map_err(io::Error::from);
        let written = kept.and_then(|kept| write_secret(&self.dir, FILE, UNFINISHED, &kept));
        written.map_err(StoreError::io("writing the manager's data key"))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // It is replaced as a whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn seal_of(keys: &[DataKey]) -> Arc<Seal> {
    let (first, former) =
        keys.split_first().map_or((DataKey::default(), &[][..]), |(first, rest)| (*first, rest));
    Arc::new(Seal::new(first, former))
}

/// What the keys are sealed under.
fn name(epoch: u64) -> Vec<u8> {
    [&b"keys"[..], &epoch.to_be_bytes()].concat()
}

fn read(path: &Path) -> Result<Option<Kept>, StoreError> {
    /// Only this much is read of a file that may have any format.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("reading the manager's data key")(error)),
    };
    let damaged =
        |error: serde_json::Error| StoreError::Damaged { path: path.to_owned(), problem: error.to_string() };
    let Format { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
    if format != FORMAT {
        return Err(StoreError::Format { path: path.to_owned(), format });
    }
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}
