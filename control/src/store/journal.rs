//! The log of commands, and the way back from it to the state: the latest snapshot, then the entries after it.
//!
//! ```text
//! <dir>/log/                       the engine; keys `L` + index (u64) + part (u16), big-endian; `F`, the format (u32)
//! <dir>/snapshot-<index>.json      the state at that index
//! ```

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::sled::{SledKv, VALUE_BYTES_MAX};
use super::{FORMAT, LogKv, Op, StoreError, snapshot, upgrade};
use crate::apply::apply;
use crate::command::Command;
use crate::model::State;

/// Entries between snapshots.
const SNAPSHOT_EVERY: u64 = 1000;
/// Entries read or removed at once.
const CHUNK: u64 = 256;
const LOG: u8 = b'L';
/// The key of the format; a log without it has format 1.
const FORMAT_KEY: &[u8] = b"F";
const LOG_DIR: &str = "log";

/// A command at its place in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The table index that the command leads to.
    pub index: u64,
    /// The command.
    pub command: Command,
}

/// The log of commands.
#[derive(Debug)]
pub struct Journal {
    kv: Box<dyn LogKv>,
    dir: PathBuf,
    snapshot_every: u64,
    /// The index of the last snapshot that was made or tried.
    snapshot_at: AtomicU64,
}

impl Journal {
    /// Whether `dir` holds a log or a snapshot.
    pub fn exists(dir: &Path) -> bool {
        dir.join(LOG_DIR).exists() || snapshot::latest(dir).is_ok_and(|found| found.is_some())
    }

    /// Opens the log in `dir`, which is made if it does not exist, and the state that it leads to.
    pub fn open(dir: &Path) -> Result<(Self, State), StoreError> {
        // The state holds the join tokens' secrets, and the folder may have been there before.
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        let made = made.and_then(|()| std::fs::set_permissions(dir, Permissions::from_mode(0o700)));
        made.map_err(StoreError::io("making the store's folder"))?;
        let log = dir.join(LOG_DIR);
        // Whoever made a snapshot had a log: without it, the snapshot alone would pass for the latest state.
        if !log.exists() && snapshot::latest(dir).map_err(StoreError::io("looking for snapshots"))?.is_some()
        {
            return Err(StoreError::Damaged { path: log, problem: "the log is missing".to_owned() });
        }
        let kv = SledKv::open(&log)?;
        Self::recover(dir, Box::new(kv), SNAPSHOT_EVERY)
    }

    /// Recovers the state from the snapshots in `dir` and the entries in `kv`.
    pub fn recover(dir: &Path, kv: Box<dyn LogKv>, snapshot_every: u64) -> Result<(Self, State), StoreError> {
        let mut state = snapshot::load(dir)?.unwrap_or_default();
        let snapshot_at = AtomicU64::new(state.index);
        let journal = Self { kv, dir: dir.to_owned(), snapshot_every, snapshot_at };
        let format = journal.format()?;
        let is_old = format < FORMAT;
        let Some(last) = journal.last_index()? else {
            if is_old {
                journal.set_format()?;
            }
            return Ok((journal, state));
        };
        // Compaction goes from the front, so that the snapshot's own entry is the last of its entries to go.
        if last < state.index {
            return Err(journal.damaged(format!("it ends at {last}, before its snapshot's {}", state.index)));
        }
        let reuses_at_once = upgrade::reuses_at_once(format);
        if reuses_at_once {
            upgrade::begin(&mut state);
        }
        while state.index < last {
            let from = state.index + 1;
            for mut entry in journal.read(from, last.min(from + CHUNK - 1) + 1)? {
                if entry.index != state.index + 1 {
                    return Err(journal.damaged(format!("entry {} is missing", state.index + 1)));
                }
                if format == 1 {
                    upgrade::command(&mut entry.command);
                }
                let (next, _) = apply(&state, entry.index, &entry.command).map_err(|refusal| {
                    journal.damaged(format!("entry {} does not apply: {refusal}", entry.index))
                })?;
                state = next;
            }
            if state.index < from {
                return Err(journal.damaged(format!("entry {from} is missing")));
            }
        }
        if reuses_at_once {
            upgrade::end(&mut state);
        }
        if is_old {
            // A snapshot takes the place of the entries, so that no log has entries of two formats.
            journal.snapshot(&state)?;
            journal.set_format()?;
        }
        Ok((journal, state))
    }

    /// The format of the log's entries; refuses one of a later version.
    fn format(&self) -> Result<u32, StoreError> {
        let stored = self.kv.get(FORMAT_KEY).map_err(StoreError::io("reading the log's format"))?;
        let stored = stored.map(|bytes| bytes.try_into().map(u32::from_be_bytes)).transpose();
        let stored = stored.map_err(|_| self.damaged("its format has the wrong length".to_owned()))?;
        let format = stored.unwrap_or(1);
        if (1..=FORMAT).contains(&format) {
            return Ok(format);
        }
        Err(StoreError::Format { path: self.dir.join(LOG_DIR), format })
    }

    fn set_format(&self) -> Result<(), StoreError> {
        let format = Op::Put(FORMAT_KEY.to_owned(), FORMAT.to_be_bytes().to_vec());
        self.kv.commit(vec![format]).map_err(StoreError::io("writing the log's format"))
    }

    /// Appends entries; they are durable when this returns `Ok`.
    pub fn append(&self, entries: &[Entry]) -> Result<(), StoreError> {
        let mut ops = Vec::with_capacity(entries.len());
        for Entry { index, command } in entries {
            let value = serde_json::to_vec(command).map_err(|error| self.damaged(error.to_string()))?;
            for (part, chunk) in value.chunks(VALUE_BYTES_MAX).enumerate() {
                let part = u16::try_from(part)
                    .map_err(|_| self.damaged(format!("entry {index} is {} bytes long", value.len())))?;
                ops.push(Op::Put(key(*index, part), chunk.to_vec()));
            }
        }
        self.kv.commit(ops).map_err(StoreError::io("appending to the log"))
    }

    /// Whether it is time for a snapshot of the state at `index`.
    pub fn wants_snapshot(&self, index: u64) -> bool {
        index >= self.snapshot_at.load(Ordering::Relaxed).saturating_add(self.snapshot_every)
    }

    /// Writes a snapshot, then drops what it makes superfluous: entries up to its index, and older snapshots.
    pub fn snapshot(&self, state: &State) -> Result<(), StoreError> {
        self.snapshot_at.store(state.index, Ordering::Relaxed);
        snapshot::save(&self.dir, state)?;
        let end = state.index + 1;
        while let Some((first, _)) =
            self.kv.first(key(0, 0), key(end, 0)).map_err(StoreError::io("reading the log"))?
        {
            let from = self.index_of(&first)?;
            let to = end.min(from.saturating_add(CHUNK));
            let pairs = self.kv.range(key(from, 0), key(to, 0)).map_err(StoreError::io("reading the log"))?;
            let ops = pairs.into_iter().map(|(key, _)| Op::Del(key)).collect();
            self.kv.commit(ops).map_err(StoreError::io("compacting the log"))?;
        }
        Ok(())
    }

    fn last_index(&self) -> Result<Option<u64>, StoreError> {
        let last = self.kv.last(key(0, 0), vec![LOG + 1]).map_err(StoreError::io("reading the log"))?;
        last.map(|(key, _)| self.index_of(&key)).transpose()
    }

    /// The entries from index `from` up to, but without, `to`.
    fn read(&self, from: u64, to: u64) -> Result<Vec<Entry>, StoreError> {
        let pairs = self.kv.range(key(from, 0), key(to, 0)).map_err(StoreError::io("reading the log"))?;
        let mut values: Vec<(u64, Vec<u8>)> = Vec::new();
        for (key, chunk) in pairs {
            let index = self.index_of(&key)?;
            match values.last_mut() {
                Some((last, value)) if *last == index => value.extend(chunk),
                _ => values.push((index, chunk)),
            }
        }
        let decode = |(index, value): (u64, Vec<u8>)| {
            let command = serde_json::from_slice(&value)
                .map_err(|error| self.damaged(format!("entry {index} does not decode: {error}")))?;
            Ok(Entry { index, command })
        };
        values.into_iter().map(decode).collect()
    }

    fn index_of(&self, key: &[u8]) -> Result<u64, StoreError> {
        let index = key.get(1..9).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        index.ok_or_else(|| self.damaged("a key has the wrong length".to_owned()))
    }

    fn damaged(&self, problem: String) -> StoreError {
        StoreError::Damaged { path: self.dir.join(LOG_DIR), problem }
    }
}

fn key(index: u64, part: u16) -> Vec<u8> {
    let mut key = Vec::with_capacity(11);
    key.push(LOG);
    key.extend(index.to_be_bytes());
    key.extend(part.to_be_bytes());
    key
}
