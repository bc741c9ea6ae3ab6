//! A running member: what it is made of, how it starts and stops, and what others may ask of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::id::NodeId;
#[cfg(test)]
use openraft::CommittedLeaderId;
use openraft::error::{Fatal, InitializeError, RaftError};
use tokio::sync::watch;

use super::leadership::{Leadership, follow};
use super::log::{Failure, Log, LogStore, Work};
use super::machine::Machine;
use super::message::{Call, Request, Response, Transport};
use super::network::{Heard, Links};
#[cfg(test)]
use super::{LogId, Membership, Vote, machine::Contents};
use super::{Manager, Metrics, Raft, RaftId, Settings};
use crate::model::State;
use crate::store::folder::{self, Engine};
use crate::store::memory::{MemoryKv, MemorySnapshots};
use crate::store::snapshot::{Files, Snapshots};
use crate::store::{LogKv, StoreError};

/// How long closing the store may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a member can't start.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The store failed.
    #[error(transparent)]
    Store(Arc<StoreError>),
    /// It is stopping.
    #[error("the manager is shutting down")]
    Stopped,
}

impl From<StoreError> for ReplicaError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// What a member keeps, opened.
#[derive(Debug)]
pub struct Storage {
    pub(super) id: RaftId,
    pub(super) log: Arc<Log>,
    pub(super) snapshots: Arc<dyn Snapshots>,
    pub(super) closed: watch::Receiver<bool>,
}

impl Storage {
    /// Begins a member's log in a folder that has none. May block.
    pub fn create(dir: &Path, engine: Engine, id: RaftId) -> Result<Self, StoreError> {
        let kv = folder::create(dir, engine)?;
        let storage = Self::over(kv, Arc::new(Files::new(dir)), dir, Work::Threads, id);
        storage.log.begin(id)?;
        Ok(storage)
    }

    /// Opens what a folder holds. May block.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let kv = folder::open(dir)?;
        Self::check(kv, Arc::new(Files::new(dir)), dir, Work::Threads)
    }

    /// Opens what an engine and a store of snapshots hold; they are at `path` (for messages).
    pub fn check(
        kv: Box<dyn LogKv>,
        snapshots: Arc<dyn Snapshots>,
        path: &Path,
        work: Work,
    ) -> Result<Self, StoreError> {
        let mut storage = Self::over(kv, snapshots, path, work, 0);
        storage.id = storage.log.check()?;
        Ok(storage)
    }

    /// Begins a member's log in memory.
    pub fn in_memory(id: RaftId) -> Result<Self, StoreError> {
        let kv = Box::<MemoryKv>::default();
        let snapshots = Arc::<MemorySnapshots>::default();
        let storage = Self::over(kv, snapshots, Path::new("memory"), Work::Inline, id);
        storage.log.begin(id)?;
        Ok(storage)
    }

    /// Begins a member's log in memory, alone in a cluster that has come to `state`.
    #[cfg(test)]
    pub(crate) fn in_memory_with(id: RaftId, state: State) -> Self {
        let storage = Self::in_memory(id).unwrap();
        let leader = CommittedLeaderId::new(1, id);
        let last = LogId::new(leader, state.index);
        let members = BTreeMap::from([(id, Manager::default())]);
        let membership = Membership::new(Some(last), members.into());
        let contents = Contents::new(Some(last), membership, state);
        storage.snapshots.save(last.index, &contents.encode().unwrap()).unwrap();
        storage.log.save_vote(&Vote::new_committed(1, id)).unwrap();
        storage.log.purge(last).unwrap();
        storage
    }

    fn over(kv: Box<dyn LogKv>, snapshots: Arc<dyn Snapshots>, path: &Path, work: Work, id: RaftId) -> Self {
        let (log, closed) = Log::new(kv, path.to_owned(), work);
        Self { id, log, snapshots, closed }
    }
}

/// A running member. Clones share it.
#[derive(Debug, Clone)]
pub struct Replica {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) id: RaftId,
    pub(super) raft: Raft,
    pub(super) state: watch::Receiver<State>,
    pub(super) applied: watch::Receiver<Option<u64>>,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) metrics: watch::Receiver<Metrics>,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) heard: Heard,
    pub(super) failure: Failure,
    pub(super) removed: watch::Sender<bool>,
    /// Held during a change of the membership: one at a time.
    pub(super) changing: tokio::sync::Mutex<()>,
    closed: watch::Receiver<bool>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Replica {
    /// Starts a member with what it has kept. One that has kept nothing waits until the leader [`Replica::add`]s it.
    pub async fn start(
        storage: Storage,
        settings: Settings,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, ReplicaError> {
        let Storage { id, log, snapshots, closed } = storage;
        let failure = log.failure();
        let former = Arc::clone(&log);
        log.work().run(move || former.lead_no_longer(id)).await?;
        let (machine, state, applied) = Machine::open(Arc::clone(&log), snapshots).await?;
        let heard = Heard::default();
        let removed = watch::Sender::new(false);
        let links = Links {
            from: id,
            transport: Arc::clone(&transport),
            heard: heard.clone(),
            removed: removed.clone(),
        };
        let raft = Raft::new(id, Arc::new(settings.config()), links, LogStore(log), machine).await;
        let raft = raft.map_err(|fatal| stopped(&fatal, &failure))?;
        // Once it answers, its metrics say what it found on the disk.
        raft.is_initialized().await.map_err(|fatal| stopped(&fatal, &failure))?;
        let metrics = raft.metrics();
        let (publish, leadership) = watch::channel(Leadership::default());
        let inner = Arc::new(Inner {
            id,
            raft,
            state,
            applied,
            leadership,
            metrics: metrics.clone(),
            transport,
            heard,
            failure,
            removed,
            changing: tokio::sync::Mutex::default(),
            closed,
        });
        tokio::spawn(follow(metrics, settings.election, publish, Arc::downgrade(&inner)));
        let replica = Self { inner };
        if replica.is_alone() {
            // Nobody else is to be waited for.
            let elected = replica.inner.raft.trigger().elect().await;
            elected.map_err(|fatal| stopped(&fatal, &replica.inner.failure))?;
        }
        Ok(replica)
    }

    /// Makes a cluster of this member alone. Fails where it has been a member already.
    pub async fn found(&self, manager: Manager) -> Result<(), ReplicaError> {
        let members = BTreeMap::from([(self.inner.id, manager)]);
        match self.inner.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotInMembers(_))) => Err(ReplicaError::Stopped),
            Err(RaftError::Fatal(fatal)) => Err(stopped(&fatal, &self.inner.failure)),
        }
    }

    /// The member's id.
    pub fn id(&self) -> RaftId {
        self.inner.id
    }

    /// Follows the state.
    pub fn state(&self) -> watch::Receiver<State> {
        self.inner.state.clone()
    }

    /// Follows who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// Turns true when the leader says that this is no member any longer.
    pub fn removed(&self) -> watch::Receiver<bool> {
        self.inner.removed.subscribe()
    }

    /// Whether this is the only voter.
    pub fn is_alone(&self) -> bool {
        let metrics = self.inner.metrics.borrow();
        let mut voters = metrics.membership_config.membership().voter_ids();
        voters.next() == Some(self.inner.id) && voters.next().is_none()
    }

    /// Why the member stopped, where its store failed.
    pub fn failure(&self) -> Option<Arc<StoreError>> {
        self.inner.failure.get().cloned()
    }

    /// Answers another manager; `from` is what its certificate says.
    pub async fn handle(&self, from: &NodeId, request: Request) -> Response {
        let Request { from: id, to, call } = request;
        if to != self.inner.id {
            return Response::Unavailable;
        }
        let asker = self.member(id);
        if asker.as_ref().is_some_and(|manager| manager.node != *from) {
            return Response::Unavailable;
        }
        // A leader that a majority confirms knows who is a member.
        let leads = self.inner.leadership.borrow().is_leader;
        if asker.is_none() && leads && self.read_index().await.is_some() && self.member(id).is_none() {
            return Response::NotMember;
        }
        let raft = &self.inner.raft;
        let response = match call {
            Call::Append(request) => raft.append_entries(request).await.ok().map(Response::Append),
            Call::Vote(request) => raft.vote(request).await.ok().map(Response::Vote),
            Call::Snapshot(request) => match raft.install_snapshot(request).await {
                Ok(response) => Some(Response::Snapshot(Ok(response))),
                Err(RaftError::APIError(error)) => Some(Response::Snapshot(Err(error))),
                Err(RaftError::Fatal(_)) => None,
            },
            call => Some(self.lead(call).await),
        };
        response.unwrap_or(Response::Unavailable)
    }

    pub(super) fn member(&self, id: RaftId) -> Option<Manager> {
        self.inner.metrics.borrow().membership_config.membership().get_node(&id).cloned()
    }

    /// Stops; the store is closed when this returns.
    pub async fn shutdown(&self) {
        let _ = self.inner.raft.shutdown().await;
        let mut closed = self.inner.closed.clone();
        if tokio::time::timeout(CLOSE_TIMEOUT, closed.wait_for(|closed| *closed)).await.is_err() {
            tracing::warn!("the manager's store is still in use");
        }
    }
}

/// Why raft stopped.
pub(super) fn stopped(fatal: &Fatal<RaftId>, failure: &Failure) -> ReplicaError {
    match (fatal, failure.get()) {
        (Fatal::StorageError(_), Some(failure)) => ReplicaError::Store(Arc::clone(failure)),
        (Fatal::StorageError(error), None) => {
            let source = std::io::Error::other(error.clone());
            ReplicaError::Store(Arc::new(StoreError::Io { what: "working with the log", source }))
        }
        (Fatal::Panicked | Fatal::Stopped, _) => ReplicaError::Stopped,
    }
}
