//! What the log leads to on this member: the replicated state, the membership, and what has been answered. Beside raft's
//! log it is kept as snapshots only; after a restart, the entries since the last one are applied again.

use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError};

use openraft::storage::{RaftStateMachine, Snapshot};
use openraft::{EntryPayload, ErrorSubject, ErrorVerb, RaftSnapshotBuilder, SnapshotMeta, StorageError};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::answers::{Answer, Answers};
use super::history::{History, Recorder};
use super::log::Log;
use super::{Batch, Entry, LogId, Manager, Membership, RaftId, TypeConfig};
use crate::apply::apply;
use crate::clock;
use crate::model::{Lookup, State};
use crate::session::Journal;
use crate::store::snapshot::{Snapshots, hex};
use crate::store::{FORMAT, StoreError};

/// What a snapshot holds. Cloning is O(1).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Contents {
    format: u32,
    pub(super) last: Option<LogId>,
    pub(super) membership: Membership,
    pub(super) answers: Answers,
    pub(super) state: State,
    /// By how much table indices are ahead of the log's: see [`Contents::begin_anew`].
    ahead: u64,
}

/// What table indices grow by at least where a cluster is forced anew: more than managers can have decided on without the
/// survivor.
const INDICES: u64 = 1 << 32;

/// Only this much is read of a snapshot that may have any format.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

impl Contents {
    pub(super) fn new(last: Option<LogId>, membership: Membership, state: State) -> Self {
        Self { format: FORMAT, last, membership, answers: Answers::default(), state, ahead: 0 }
    }

    fn index(&self) -> u64 {
        self.last.map_or(0, |last| last.index)
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, StoreError> {
        let encoded = serde_json::to_vec(self);
        encoded.map_err(|error| StoreError::Io { what: "encoding a snapshot", source: error.into() })
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, StoreError> {
        let damaged = |error: serde_json::Error| StoreError::Damaged {
            path: "snapshot".into(),
            problem: error.to_string(),
        };
        // Before the rest, which another format may have in another shape.
        let Format { format } = serde_json::from_slice(body).map_err(damaged)?;
        if format != FORMAT {
            return Err(StoreError::Format { path: "snapshot".into(), format });
        }
        let mut contents: Self = serde_json::from_slice(body).map_err(damaged)?;
        contents.state.lookup = Lookup::of(&contents.state);
        Ok(contents)
    }

    fn meta(&self, body: &[u8]) -> SnapshotMeta<RaftId, Manager> {
        SnapshotMeta {
            last_log_id: self.last,
            last_membership: self.membership.clone(),
            // Snapshots of one index may differ in bytes, and pieces of two must not be mixed.
            snapshot_id: format!("{}-{}", self.index(), hex(&Sha256::digest(body)[..8])),
        }
    }

    /// The effect of a committed entry.
    pub(super) fn apply(&mut self, entry: Entry) -> Answer {
        let index = entry.log_id.index;
        self.last = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => Answer::Nothing,
            EntryPayload::Membership(membership) => {
                let former: Vec<RaftId> = self.membership.voter_ids().collect();
                // Members change in steps of which each shares some with the one before.
                let is_forced = !former.is_empty() && !membership.voter_ids().any(|id| former.contains(&id));
                if is_forced && let Some(id) = membership.voter_ids().next() {
                    self.begin_anew(id);
                }
                self.membership = Membership::new(self.last, membership);
                Answer::Nothing
            }
            EntryPayload::Normal(batch) => self.apply_batch(index, &batch),
        }
    }

    /// A survivor makes a cluster of itself ([`super::force`]). Those that are lost may have given out table indices beyond its
    /// log's end, and nodes may have come to them: no index is to mean two states, so those from here on are far above, at a
    /// place that follows from the survivor's id, which was drawn for this.
    fn begin_anew(&mut self, survivor: RaftId) {
        self.ahead = self.ahead.saturating_add(INDICES + (survivor & (INDICES - 1)));
        self.state.index = self.table_index();
    }

    /// The table index of what the last entry led to.
    fn table_index(&self) -> u64 {
        self.index() + self.ahead
    }

    fn apply_batch(&mut self, index: u64, batch: &Batch) -> Answer {
        if let Some(answer) = self.answers.find(batch.proposer, batch.number) {
            return answer;
        }
        let mut outcomes = Vec::with_capacity(batch.commands.len());
        for command in &batch.commands {
            outcomes.push(apply(&self.state, self.table_index(), command).map(|(state, reply)| {
                self.state = state;
                reply
            }));
        }
        self.answers.note(batch.proposer, batch.number, index, outcomes)
    }
}

/// When the last command of an entry was proposed, ns since the epoch.
fn proposed_ns(entry: &Entry) -> u64 {
    match &entry.payload {
        EntryPayload::Normal(batch) => {
            batch.commands.iter().map(|command| command.at_ns).max().unwrap_or_default()
        }
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    }
}

/// The state machine of a member.
#[derive(Debug)]
pub struct Machine {
    contents: Contents,
    log: Arc<Log>,
    snapshots: Arc<dyn Snapshots>,
    state: watch::Sender<State>,
    applied: watch::Sender<Option<u64>>,
    history: Recorder,
    journal: Arc<Mutex<Journal>>,
}

impl Machine {
    /// Begins with the latest snapshot. The second part follows the state; the third, the last applied index, which the
    /// state has already reached when it is told.
    pub async fn open(
        log: Arc<Log>,
        snapshots: Arc<dyn Snapshots>,
    ) -> Result<(Self, watch::Receiver<State>, watch::Receiver<Option<u64>>), StoreError> {
        let (checked, kept) = (Arc::clone(&log), Arc::clone(&snapshots));
        let contents = log.work().run(move || match kept.load()? {
            None => Ok(Contents::new(None, Membership::default(), State::empty())),
            Some(body) => {
                let contents = Contents::decode(&body)?;
                checked.check_reaches(contents.index())?;
                Ok(contents)
            }
        });
        let contents = contents.await?;
        if let Some(last) = contents.last {
            log.keeps(last.index);
        }
        let (state, states) = watch::channel(contents.state.clone());
        let (applied, reached) = watch::channel(contents.last.map(|last| last.index));
        let history = Recorder::new(contents.state.clone());
        let journal = Arc::new(Mutex::new(Journal::new(contents.state.index)));
        Ok((Self { contents, log, snapshots, state, applied, history, journal }, states, reached))
    }

    /// What changed since when.
    pub(super) fn journal(&self) -> Arc<Mutex<Journal>> {
        Arc::clone(&self.journal)
    }

    /// Applies a committed entry, and notes what it changes before anybody sees the state.
    fn take(&mut self, entry: Entry) -> Answer {
        let (before, ahead) = (self.contents.state.clone(), self.contents.ahead);
        let answer = self.contents.apply(entry);
        let Contents { state, .. } = &self.contents;
        // A panic can't leave more than one entry half noted, and with it the member is at its end.
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        if self.contents.ahead != ahead {
            journal.begin(state.index);
            self.history.begin(state);
        } else if state.index != before.index {
            journal.note(&before, state);
        }
        answer
    }

    /// The last states.
    pub fn history(&self) -> History {
        self.history.history()
    }

    /// Tells those who follow.
    fn publish(&self) {
        let state = &self.contents.state;
        self.state.send_if_modified(|published| {
            let is_news = published.index != state.index;
            if is_news {
                *published = state.clone();
            }
            is_news
        });
        self.history.publish(state.index);
        self.applied.send_replace(self.contents.last.map(|last| last.index));
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, Membership), StorageError<RaftId>> {
        Ok((self.contents.last, self.contents.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answer>, StorageError<RaftId>>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let mut answers = Vec::new();
        for entry in entries {
            let at_ns = proposed_ns(&entry);
            answers.push(self.take(entry));
            self.history.record(&self.contents.state, at_ns);
        }
        self.publish();
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let contents = self.contents.clone();
        Builder { contents, log: Arc::clone(&self.log), snapshots: Arc::clone(&self.snapshots) }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError<RaftId>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<RaftId, Manager>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError<RaftId>> {
        let subject = ErrorSubject::Snapshot(Some(meta.signature()));
        let (snapshots, index) = (Arc::clone(&self.snapshots), meta.last_log_id.map_or(0, |last| last.index));
        let save = move |log: &Log| {
            let body = snapshot.into_inner();
            let contents = Contents::decode(&body)?;
            log.receiving(index)?;
            snapshots.save(index, &body)?;
            log.keeps(index);
            Ok(contents)
        };
        self.contents = self.log.with(subject, ErrorVerb::Write, save).await?;
        self.history.record(&self.contents.state, clock::now_ns());
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).begin(self.contents.state.index);
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError<RaftId>> {
        let snapshots = Arc::clone(&self.snapshots);
        let load = move |_: &Log| {
            let Some(body) = snapshots.load()? else { return Ok(None) };
            let meta = Contents::decode(&body)?.meta(&body);
            Ok(Some(Snapshot { meta, snapshot: Box::new(Cursor::new(body)) }))
        };
        self.log.with(ErrorSubject::Snapshot(None), ErrorVerb::Read, load).await
    }
}

/// Makes a snapshot while the state machine goes on.
#[derive(Debug)]
pub struct Builder {
    contents: Contents,
    log: Arc<Log>,
    snapshots: Arc<dyn Snapshots>,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError<RaftId>> {
        let (contents, snapshots) = (self.contents.clone(), Arc::clone(&self.snapshots));
        let save = move |log: &Log| {
            let body = contents.encode()?;
            snapshots.save(contents.index(), &body)?;
            log.keeps(contents.index());
            Ok(Snapshot { meta: contents.meta(&body), snapshot: Box::new(Cursor::new(body)) })
        };
        self.log.with(ErrorSubject::Snapshot(None), ErrorVerb::Write, save).await
    }
}
