//! A running member: what it is made of, how it starts and stops, and what others may ask of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_api::id::NodeId;
use mesh_api::seal::UnlockKey;
use openraft::error::{Fatal, InitializeError, RaftError};
use tokio::sync::watch;
use tokio::time::timeout;

use super::history::History;
use super::leadership::{Leadership, follow};
use super::lock;
use super::log::{Failure, Log, LogStore, Work};
use super::machine::Machine;
use super::message::{Call, Request, Response, Transport};
use super::network::{Heard, Links};
use super::propose::TRY;
use super::reports::Reporter;
use super::{Manager, Metrics, Raft, RaftId, Settings};
use crate::model::{Lock, State};
use crate::session::{Journal, Part};
use crate::store::folder::{self, Engine, Folder};
use crate::store::keys::Keys;
use crate::store::memory::{MemoryKv, MemorySnapshots};
use crate::store::snapshot::Snapshots;
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
    /// What it is sealed with, on a disk.
    pub(super) keys: Option<Arc<Keys>>,
}

impl Storage {
    /// Begins a member's log in a folder that has none. May block.
    pub fn create(dir: &Path, engine: Engine, id: RaftId) -> Result<Self, StoreError> {
        Self::create_locked(dir, engine, id, Lock::default())
    }

    /// As [`Storage::create`], in a cluster that may have a lock already. May block.
    pub fn create_locked(dir: &Path, engine: Engine, id: RaftId, lock: Lock) -> Result<Self, StoreError> {
        let Folder { log, snapshots, keys } = folder::create(dir, engine, lock)?;
        let storage = Self::over(log, Arc::new(snapshots), dir, Work::Threads, id);
        storage.log.begin(id)?;
        Ok(Self { keys: Some(keys), ..storage })
    }

    /// Opens what a folder holds. May block.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::unlock(dir, None)
    }

    /// Opens what a folder holds, with the unlock key if it is locked. May block.
    pub fn unlock(dir: &Path, unlock: Option<&UnlockKey>) -> Result<Self, StoreError> {
        let Folder { log, snapshots, keys } = folder::open(dir, unlock)?;
        let storage = Self::check(log, Arc::new(snapshots), dir, Work::Threads)?;
        Ok(Self { keys: Some(keys), ..storage })
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
        storage.begin_with(Manager::default(), state).unwrap();
        storage
    }

    fn over(kv: Box<dyn LogKv>, snapshots: Arc<dyn Snapshots>, path: &Path, work: Work, id: RaftId) -> Self {
        let (log, closed) = Log::new(kv, path.to_owned(), work);
        Self { id, log, snapshots, closed, keys: None }
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
    keys: Option<Arc<Keys>>,
    history: History,
    journal: Arc<Mutex<Journal>>,
    /// Says what only the manager around this member knows.
    pub(super) reporter: Mutex<Option<Reporter>>,
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
        let Storage { id, log, snapshots, closed, keys } = storage;
        let failure = log.failure();
        let former = Arc::clone(&log);
        log.work().run(move || former.lead_no_longer(id)).await?;
        let (machine, state, applied) = Machine::open(Arc::clone(&log), Arc::clone(&snapshots)).await?;
        let (history, journal) = (machine.history(), machine.journal());
        if let Some(keys) = &keys {
            tokio::spawn(lock::follow(Arc::downgrade(&log), snapshots, Arc::clone(keys), state.clone()));
        }
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
            keys,
            history,
            journal,
            reporter: Mutex::default(),
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

    /// The last states.
    pub fn history(&self) -> History {
        self.inner.history.clone()
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

    /// What of the table changed after `index`; `None` where it is not known from there on.
    pub(crate) fn changed_since(&self, index: u64) -> Option<BTreeSet<Part>> {
        // See where it is noted.
        self.inner.journal.lock().unwrap_or_else(PoisonError::into_inner).since(index)
    }

    /// What its files are sealed with; none in memory.
    pub fn keys(&self) -> Option<&Arc<Keys>> {
        self.inner.keys.as_ref()
    }

    /// Why the member stopped, where its store failed.
    pub fn failure(&self) -> Option<Arc<StoreError>> {
        self.inner.failure.get().cloned()
    }

    /// Answers another manager; `from` is what its certificate says.
    pub async fn handle(&self, from: &NodeId, request: Request) -> Response {
        let Request { from: id, to, call } = request;
        let asker = self.member(id);
        if asker.as_ref().is_some_and(|manager| manager.node != *from) {
            return Response::Unavailable;
        }
        if asker.is_none() && self.is_member(id).await == Some(false) {
            return Response::NotMember;
        }
        // Told even to who means another: whom this host was before its cluster was made anew of a survivor or of a backup.
        if to != self.inner.id {
            return Response::Unavailable;
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
            Call::Report => self.report().map(Box::new).map(Response::Report),
            call => Some(self.lead(call).await),
        };
        response.unwrap_or(Response::Unavailable)
    }

    /// Whether there is such a member, if the leader is reached, who knows: this one may not have heard of it yet.
    async fn is_member(&self, id: RaftId) -> Option<bool> {
        let Leadership { leader, is_leader, .. } = self.inner.leadership.borrow().clone();
        if is_leader {
            return self.is_member_as_leader(id).await;
        }
        let (leader, manager) = leader?;
        let request = Request { from: self.inner.id, to: leader, call: Call::IsMember(id) };
        match timeout(TRY, self.inner.transport.call(&manager, request)).await {
            Ok(Ok(Response::IsMember(is_member))) => Some(is_member),
            _ => None,
        }
    }

    /// Whether there is such a member; `None` unless a majority confirms that this one leads.
    pub(super) async fn is_member_as_leader(&self, id: RaftId) -> Option<bool> {
        self.read_index().await?;
        Some(self.member(id).is_some())
    }

    pub(super) fn member(&self, id: RaftId) -> Option<Manager> {
        self.inner.metrics.borrow().membership_config.membership().get_node(&id).cloned()
    }

    /// Stops; the store is closed when this returns.
    pub async fn shutdown(&self) {
        let _ = self.inner.raft.shutdown().await;
        let mut closed = self.inner.closed.clone();
        if timeout(CLOSE_TIMEOUT, closed.wait_for(|closed| *closed)).await.is_err() {
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
