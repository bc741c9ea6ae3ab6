//! What raft writes before it speaks: the log, the vote, and how far either has come.
//!
//! ```text
//! F              the format (u32)
//! I              the member's raft id (u64)
//! V, C, P        the vote, the last committed and the last purged entry's id, as JSON
//! S              the index of a snapshot that another member sent, from before it is written (u64)
//! L index part   an entry as JSON, cut up: index u64, part u16, all big-endian
//! ```

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, LogState, RaftLogReader};
use openraft::{ErrorSubject, ErrorVerb, StorageError, StorageIOError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::{Entry, LogId, RaftId, TypeConfig, Vote};
use crate::store::{FORMAT, LogKv, Op, PLAIN_BYTES_MAX, StoreError};

const FORMAT_KEY: &[u8] = b"F";
const ID_KEY: &[u8] = b"I";
const VOTE_KEY: &[u8] = b"V";
const COMMITTED_KEY: &[u8] = b"C";
const PURGED_KEY: &[u8] = b"P";
const RECEIVING_KEY: &[u8] = b"S";
const LOG: u8 = b'L';
/// Entries removed at once.
const CHUNK: u64 = 256;
/// Entries read at once where their bytes count.
const STEP: u64 = 16;
/// Bytes of entries sent to another member at once; one entry may be longer.
const SEND_BYTES_MAX: usize = 4 << 20;

/// Where the store's work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// On threads that may block: the product.
    Threads,
    /// At once: for stores in memory, under a clock that stands still while a thread works.
    Inline,
}

impl Work {
    /// Does it.
    pub async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        match self {
            Self::Inline => work(),
            Self::Threads => match tokio::task::spawn_blocking(work).await {
                Ok(done) => done,
                Err(panic) => {
                    Err(StoreError::Io { what: "working with the store", source: io::Error::other(panic) })
                }
            },
        }
    }
}

/// The first failure of a store, if there was one.
pub(super) type Failure = Arc<OnceLock<Arc<StoreError>>>;

/// A member's log. It is closed when all that use it have gone.
#[derive(Debug)]
pub struct Log {
    kv: Option<Box<dyn LogKv>>,
    path: PathBuf,
    work: Work,
    /// The first failure: from there on, the member takes part no more.
    failure: Failure,
    /// The entries before this index are in a snapshot that is kept.
    kept: watch::Sender<u64>,
    closed: watch::Sender<bool>,
}

impl Log {
    /// Uses `kv`, which is at `path` (for messages). The second part turns true when it has been closed.
    pub fn new(kv: Box<dyn LogKv>, path: PathBuf, work: Work) -> (Arc<Self>, watch::Receiver<bool>) {
        let (closed, hears) = watch::channel(false);
        let failure = Failure::default();
        let kept = watch::Sender::new(0);
        (Arc::new(Self { kv: Some(kv), path, work, failure, kept, closed }), hears)
    }

    /// Begins an empty log of a member.
    pub fn begin(&self, id: RaftId) -> Result<(), StoreError> {
        let ops = vec![
            Op::Put(FORMAT_KEY.to_vec(), FORMAT.to_be_bytes().to_vec()),
            Op::Put(ID_KEY.to_vec(), id.to_be_bytes().to_vec()),
        ];
        self.kv()?.commit(ops).map_err(StoreError::io("beginning the log"))
    }

    /// The member whose log it is; refuses another format.
    pub fn check(&self) -> Result<RaftId, StoreError> {
        let number = |key: &[u8]| self.kv()?.get(key).map_err(StoreError::io("reading the log's format"));
        let Some(format) = number(FORMAT_KEY)? else {
            return Err(self.damaged("nothing is in it".to_owned()));
        };
        match format.try_into().map(u32::from_be_bytes) {
            Ok(FORMAT) => {}
            Ok(format) => return Err(StoreError::Format { path: self.path.clone(), format }),
            Err(_) => return Err(self.damaged("its format has the wrong length".to_owned())),
        }
        let id = number(ID_KEY)?.and_then(|id| id.try_into().ok()).map(u64::from_be_bytes);
        id.ok_or_else(|| self.damaged("it names no member".to_owned()))
    }

    /// Where the first failure of the store will be.
    pub(super) fn failure(&self) -> Failure {
        Arc::clone(&self.failure)
    }

    pub(super) fn work(&self) -> Work {
        self.work
    }

    /// Does something with the store where that belongs, and remembers its failure.
    pub(super) async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        subject: ErrorSubject<RaftId>,
        verb: ErrorVerb,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StorageError<RaftId>> {
        let log = Arc::clone(self);
        let done = match self.failure.get() {
            Some(failed) => Err(Arc::clone(failed)),
            None => self.work.run(move || work(&log)).await.map_err(Arc::new),
        };
        done.map_err(|error| {
            let source = AnyError::new(&*error);
            let _ = self.failure.set(error);
            // Whoever waits for a snapshot waits no longer.
            self.kept.send_modify(|_| ());
            StorageIOError::new(subject, verb, source).into()
        })
    }

    /// The snapshot at `index` is kept, durably.
    pub(super) fn keeps(&self, index: u64) {
        self.kept.send_modify(|kept| *kept = index.saturating_add(1).max(*kept));
    }

    /// Waits until a snapshot is kept that has the entry at `index`, or until the store has failed.
    async fn is_kept(&self, index: u64) {
        let mut kept = self.kept.subscribe();
        let is_over = |kept: &u64| *kept > index || self.failure.get().is_some();
        // Its sender is this log's own.
        let _ = kept.wait_for(is_over).await;
    }

    fn kv(&self) -> Result<&dyn LogKv, StoreError> {
        self.kv.as_deref().ok_or_else(|| self.damaged("it is closed".to_owned()))
    }

    pub(super) fn damaged(&self, problem: String) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), problem }
    }

    fn read<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StoreError> {
        let value = self.kv()?.get(key).map_err(StoreError::io("reading the log"))?;
        value.map(|value| self.decode(&value, key)).transpose()
    }

    fn decode<T: DeserializeOwned>(&self, value: &[u8], key: &[u8]) -> Result<T, StoreError> {
        serde_json::from_slice(value)
            .map_err(|error| self.damaged(format!("{} does not decode: {error}", key.escape_ascii())))
    }

    fn encode(&self, value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(value).map_err(|error| self.damaged(error.to_string()))
    }

    pub(super) fn vote(&self) -> Result<Option<Vote>, StoreError> {
        self.read(VOTE_KEY)
    }

    /// What is known to be decided. What was noted and isn't in the log says nothing of what is: a crash came before the snapshot
    /// that was to take its place.
    pub(super) fn committed(&self) -> Result<Option<LogId>, StoreError> {
        let Some(noted): Option<LogId> = self.read(COMMITTED_KEY)? else { return Ok(None) };
        if self.read(PURGED_KEY)?.is_some_and(|purged: LogId| noted <= purged) {
            return Ok(Some(noted));
        }
        let held = self.entries(noted.index, noted.index + 1)?.pop();
        Ok(held.map(|entry| entry.log_id).filter(|held| *held == noted))
    }

    /// The last purged and the last entry.
    pub(super) fn ends(&self) -> Result<(Option<LogId>, Option<LogId>), StoreError> {
        let purged: Option<LogId> = self.read(PURGED_KEY)?;
        let kv = self.kv()?;
        let last = kv.last(key(0, 0), vec![LOG + 1]).map_err(StoreError::io("reading the log"))?;
        let last = last.map(|(key, _)| self.index_of(&key)).transpose()?;
        // A crash amid a purge leaves some of what was purged.
        let last = last.filter(|last| purged.is_none_or(|purged| *last > purged.index));
        let Some(last) = last else { return Ok((purged, purged)) };
        let entry = self.entries(last, last + 1)?.pop();
        let entry = entry.ok_or_else(|| self.damaged(format!("entry {last} is missing")))?;
        Ok((purged, Some(entry.log_id)))
    }

    /// The entries from index `from` up to, but without, `to`.
    pub(super) fn entries(&self, from: u64, to: u64) -> Result<Vec<Entry>, StoreError> {
        let (entries, _) = self.entries_sized(from, to)?;
        Ok(entries)
    }

    fn entries_sized(&self, from: u64, to: u64) -> Result<(Vec<Entry>, usize), StoreError> {
        if from >= to {
            return Ok((Vec::new(), 0));
        }
        let pairs = self.kv()?.range(key(from, 0), key(to, 0)).map_err(StoreError::io("reading the log"))?;
        let bytes = pairs.iter().map(|(_, chunk)| chunk.len()).sum();
        let mut values: Vec<(u64, Vec<u8>)> = Vec::new();
        for (key, chunk) in pairs {
            let index = self.index_of(&key)?;
            match values.last_mut() {
                Some((last, value)) if *last == index => value.extend(chunk),
                Some((last, _)) if *last + 1 != index => {
                    return Err(self.damaged(format!("entry {} is missing", *last + 1)));
                }
                _ => values.push((index, chunk)),
            }
        }
        let decode = |(index, value): (u64, Vec<u8>)| {
            let entry: Entry = serde_json::from_slice(&value)
                .map_err(|error| self.damaged(format!("entry {index} does not decode: {error}")))?;
            if entry.log_id.index == index {
                Ok(entry)
            } else {
                Err(self.damaged(format!("entry {index} is another")))
            }
        };
        let entries: Result<Vec<Entry>, StoreError> = values.into_iter().map(decode).collect();
        Ok((entries?, bytes))
    }

    /// Entries from index `from` on, as many as are sent at once.
    fn entries_to_send(&self, from: u64, to: u64) -> Result<Vec<Entry>, StoreError> {
        let mut entries = Vec::new();
        let (mut at, mut bytes) = (from, 0);
        while at < to && bytes < SEND_BYTES_MAX {
            let end = to.min(at + STEP);
            let (step, step_bytes) = self.entries_sized(at, end)?;
            entries.extend(step);
            bytes += step_bytes;
            at = end;
        }
        Ok(entries)
    }

    pub(super) fn append(&self, entries: &[Entry]) -> Result<(), StoreError> {
        let mut ops = Vec::with_capacity(entries.len());
        for entry in entries {
            let index = entry.log_id.index;
            let value = self.encode(entry)?;
            for (part, chunk) in value.chunks(PLAIN_BYTES_MAX).enumerate() {
                let part = u16::try_from(part)
                    .map_err(|_| self.damaged(format!("entry {index} is {} bytes long", value.len())))?;
                ops.push(Op::Put(key(index, part), chunk.to_vec()));
            }
        }
        self.kv()?.commit(ops).map_err(StoreError::io("appending to the log"))
    }

    pub(super) fn save_vote(&self, vote: &Vote) -> Result<(), StoreError> {
        let value = self.encode(vote)?;
        let op = Op::Put(VOTE_KEY.to_vec(), value);
        self.kv()?.commit(vec![op]).map_err(StoreError::io("writing the vote"))
    }

    /// Makes of a vote by which this member led one by which it stands for election. Raft takes a leader that restarts for the
    /// leader still, and lets it answer reads before it knows again how much of its log is decided.
    pub(super) fn lead_no_longer(&self, id: RaftId) -> Result<(), StoreError> {
        match self.vote()? {
            Some(vote) if vote.is_committed() && vote.leader_id.node_id == id => {
                self.save_vote(&Vote::new(vote.leader_id.term, id))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn save_committed(&self, committed: Option<LogId>) -> Result<(), StoreError> {
        let op = match committed {
            Some(committed) => Op::Put(COMMITTED_KEY.to_vec(), self.encode(&committed)?),
            None => Op::Del(COMMITTED_KEY.to_vec()),
        };
        // Not synced: a member that is behind on this hears it from the leader.
        self.kv()?.note(vec![op]).map_err(StoreError::io("noting what is committed"))
    }

    fn truncate(&self, from: u64) -> Result<(), StoreError> {
        let kv = self.kv()?;
        let pairs = kv.range(key(from, 0), vec![LOG + 1]).map_err(StoreError::io("reading the log"))?;
        let ops = pairs.into_iter().map(|(key, _)| Op::Del(key)).collect();
        kv.commit(ops).map_err(StoreError::io("truncating the log"))
    }

    pub(super) fn purge(&self, upto: LogId) -> Result<(), StoreError> {
        let kv = self.kv()?;
        let end = upto.index + 1;
        let mut mark = vec![Op::Put(PURGED_KEY.to_vec(), self.encode(&upto)?)];
        loop {
            let first = kv.first(key(0, 0), key(end, 0)).map_err(StoreError::io("reading the log"))?;
            let mut ops = std::mem::take(&mut mark);
            if let Some((first, _)) = first {
                let from = self.index_of(&first)?;
                let to = end.min(from.saturating_add(CHUNK));
                let pairs = kv.range(key(from, 0), key(to, 0)).map_err(StoreError::io("reading the log"))?;
                ops.extend(pairs.into_iter().map(|(key, _)| Op::Del(key)));
            }
            if ops.is_empty() {
                return Ok(());
            }
            kv.commit(ops).map_err(StoreError::io("compacting the log"))?;
        }
    }

    /// Notes that a snapshot which the log may not reach is about to be written.
    pub(super) fn receiving(&self, index: u64) -> Result<(), StoreError> {
        let op = Op::Put(RECEIVING_KEY.to_vec(), index.to_be_bytes().to_vec());
        self.kv()?.commit(vec![op]).map_err(StoreError::io("noting a snapshot"))
    }

    /// Refuses a log that ends before its own snapshot: it lost its end.
    pub(super) fn check_reaches(&self, snapshot: u64) -> Result<(), StoreError> {
        let (_, last) = self.ends()?;
        if last.is_some_and(|last| last.index >= snapshot) {
            return Ok(());
        }
        let received = self.kv()?.get(RECEIVING_KEY).map_err(StoreError::io("reading the log"))?;
        if received.is_some_and(|index| *index == snapshot.to_be_bytes()) {
            return Ok(());
        }
        let last = last.map_or("nowhere".to_owned(), |last| format!("at {}", last.index));
        Err(self.damaged(format!("it ends {last}, before its snapshot's {snapshot}")))
    }

    /// Has the present data key seal what an earlier one sealed.
    pub(super) fn seal_anew(&self) -> Result<(), StoreError> {
        self.kv()?.seal_anew().map_err(StoreError::io("sealing the log anew"))
    }

    /// Takes the log over for another member: see [`super::force`].
    pub(super) fn take_over(&self, id: RaftId, vote: &Vote, entry: &Entry) -> Result<(), StoreError> {
        let ops = vec![
            Op::Put(ID_KEY.to_vec(), id.to_be_bytes().to_vec()),
            Op::Put(VOTE_KEY.to_vec(), self.encode(vote)?),
            Op::Put(COMMITTED_KEY.to_vec(), self.encode(&entry.log_id)?),
            Op::Put(key(entry.log_id.index, 0), self.encode(entry)?),
        ];
        self.kv()?.commit(ops).map_err(StoreError::io("taking the log over"))
    }

    fn index_of(&self, key: &[u8]) -> Result<u64, StoreError> {
        let index = key.get(1..9).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        index.ok_or_else(|| self.damaged("a key has the wrong length".to_owned()))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let (kv, closed) = (self.kv.take(), self.closed.clone());
        let close = move || {
            drop(kv);
            closed.send_replace(true);
        };
        // Closing an engine may block, and this may run anywhere.
        if self.work == Work::Inline {
            close();
        } else {
            std::thread::spawn(close);
        }
    }
}

fn key(index: u64, part: u16) -> Vec<u8> {
    let mut key = Vec::with_capacity(11);
    key.push(LOG);
    key.extend(index.to_be_bytes());
    key.extend(part.to_be_bytes());
    key
}

/// openraft's handle on a [`Log`].
#[derive(Debug, Clone)]
pub struct LogStore(pub(super) Arc<Log>);

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, StorageError<RaftId>> {
        let from = match range.start_bound() {
            Bound::Included(from) => *from,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(last) => last + 1,
            Bound::Excluded(to) => *to,
            Bound::Unbounded => u64::MAX,
        };
        self.0.with(ErrorSubject::Logs, ErrorVerb::Read, move |log| log.entries(from, to)).await
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, StorageError<RaftId>> {
        self.0.with(ErrorSubject::Logs, ErrorVerb::Read, move |log| log.entries_to_send(start, end)).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<RaftId>> {
        let ends = self.0.with(ErrorSubject::Logs, ErrorVerb::Read, Log::ends).await?;
        Ok(LogState { last_purged_log_id: ends.0, last_log_id: ends.1 })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError<RaftId>> {
        let vote = *vote;
        self.0.with(ErrorSubject::Vote, ErrorVerb::Write, move |log| log.save_vote(&vote)).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError<RaftId>> {
        self.0.with(ErrorSubject::Vote, ErrorVerb::Read, Log::vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError<RaftId>> {
        self.0.with(ErrorSubject::Store, ErrorVerb::Write, move |log| log.save_committed(committed)).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError<RaftId>> {
        self.0.with(ErrorSubject::Store, ErrorVerb::Read, Log::committed).await
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError<RaftId>>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        self.0.with(ErrorSubject::Logs, ErrorVerb::Write, move |log| log.append(&entries)).await?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError<RaftId>> {
        self.0.with(ErrorSubject::Logs, ErrorVerb::Delete, move |log| log.truncate(log_id.index)).await
    }

    /// openraft asks for it while the snapshot that takes the entries' place may still be on its way to the disk.
    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError<RaftId>> {
        self.0.is_kept(log_id.index).await;
        self.0.with(ErrorSubject::Logs, ErrorVerb::Delete, move |log| log.purge(log_id)).await
    }
}
