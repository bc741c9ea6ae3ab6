//! The handle on the replicated state: read it, watch it, propose commands to it, and change who keeps it.
//!
//! One task proposes. It takes what has been proposed meanwhile as a batch, has raft decide on it with one sync a manager,
//! and answers once it is in effect here. What raft does is in [`crate::raft`].

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::Ipv4Net;
use mesh_api::id::{ClusterId, NetworkId, NodeId};
use mesh_api::seal::UnlockKey;
use mesh_api::table::Role;
use mesh_api::token::JoinToken;
use rand::RngExt as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use crate::apply::{Reply, apply};
use crate::command::{Action, Command, Genesis};
use crate::model::cluster::{DEFAULT_DATA_PATH_PORT, DEFAULT_SUBNET_SIZE};
use crate::model::{ClusterSpec, JoinSecrets, Lock, State};
use crate::pki::{Authority, PkiError};
use crate::raft::propose::AskError;
use crate::raft::{
    Batch, History, Isolated, Leadership, Manager, Member, MembersError, RaftId, Replica, ReplicaError,
    Reporter, Request, Response, Settings, Storage, Transport,
};
use crate::refusal::Refusal;
use crate::session::{Part, Report};
use crate::store::folder::{self, Engine};
use crate::store::keys::Keys;
use crate::store::{StoreError, snapshot};

/// Proposals waiting for the writer.
const QUEUE_LEN: usize = 1024;
/// Commands decided on together.
const BATCH_MAX: usize = 256;
/// Bytes of commands decided on together; one command may be longer.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Longest command, bytes of JSON: a message of raft's holds one of them.
const COMMAND_BYTES_MAX: usize = 8 << 20;
/// How long a write or a read waits for a leader.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long what is under way may still take when the manager shuts down.
const GRACE: Duration = Duration::from_secs(1);
/// How long a manager that is alone may take to lead.
const LEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// What `docker swarm init` says of the cluster to be.
#[derive(Debug, Clone)]
pub struct InitRequest {
    /// What an operator can set.
    pub spec: ClusterSpec,
    /// UDP port of the overlay.
    pub data_path_port: u16,
    /// Where automatic subnets come from.
    pub address_pools: Vec<Ipv4Net>,
    /// Prefix length of automatic subnets.
    pub subnet_size: u8,
    /// Subnets that automatic ones must not overlap: the host's own routes.
    pub avoid: Vec<Ipv4Net>,
}

impl Default for InitRequest {
    fn default() -> Self {
        Self {
            spec: ClusterSpec::default(),
            data_path_port: DEFAULT_DATA_PATH_PORT,
            address_pools: vec![Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 0, 0, 0), 8)],
            subnet_size: DEFAULT_SUBNET_SIZE,
            avoid: Vec::new(),
        }
    }
}

/// Where a manager is, and what it keeps its state in.
#[derive(Debug, Clone)]
pub struct Place {
    /// How the other managers reach it.
    pub manager: Manager,
    /// What its log rests on.
    pub engine: Engine,
    /// How it reaches the other managers.
    pub transport: Arc<dyn Transport>,
}

impl Default for Place {
    /// A manager that is alone, and stays so.
    fn default() -> Self {
        Self { manager: Manager::default(), engine: Engine::default(), transport: Arc::new(Isolated) }
    }
}

/// Why a cluster's state can't be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store failed.
    #[error(transparent)]
    Store(Arc<StoreError>),
    /// The request can't be.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No certificate authority can be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The folder holds a cluster already.
    #[error("{0} holds the state of a cluster already; leave it first, or remove the folder")]
    Exists(std::path::PathBuf),
    /// The folder holds no cluster.
    #[error("{0} holds no cluster's state")]
    Absent(std::path::PathBuf),
    /// The runtime is shutting down.
    #[error("the runtime is shutting down")]
    Stopped,
}

impl OpenError {
    /// Whether the unlock key is another.
    pub fn is_wrong_key(&self) -> bool {
        matches!(self, Self::Store(error) if matches!(**error, StoreError::WrongUnlockKey))
    }
}

impl From<StoreError> for OpenError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<ReplicaError> for OpenError {
    fn from(error: ReplicaError) -> Self {
        match error {
            ReplicaError::Store(error) => Self::Store(error),
            ReplicaError::Stopped => Self::Stopped,
        }
    }
}

/// Why a proposal did not come into effect, as far as is known.
#[derive(Debug, thiserror::Error)]
pub enum ProposeError {
    /// The command does not fit the state.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No leader answered in time. The command may have come into effect nonetheless, or may still do so.
    #[error(
        "The swarm does not have a leader. It's possible that too few managers are online. Make sure more than half of the \
         managers are online."
    )]
    NoLeader,
    /// The state can't be made durable; the manager takes no more proposals until it is restarted.
    #[error("the manager's store failed; its log says why")]
    Storage(#[source] Arc<StoreError>),
    /// The manager is shutting down.
    #[error("the manager is shutting down")]
    Stopped,
}

impl From<AskError> for ProposeError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::NoLeader => Self::NoLeader,
            AskError::Storage(error) => Self::Storage(error),
            AskError::Stopped => Self::Stopped,
        }
    }
}

/// The handle on the replicated state. Clones share it.
#[derive(Debug, Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    proposals: mpsc::Sender<Proposal>,
    replica: Replica,
    state: watch::Receiver<State>,
    shutdown: watch::Sender<bool>,
}

#[derive(Debug)]
struct Proposal {
    command: Command,
    bytes: usize,
    deadline: Instant,
    answer: oneshot::Sender<Result<Reply, ProposeError>>,
}

impl Cluster {
    /// Whether `dir` looks like it holds a manager's state; [`Cluster::open`] knows.
    pub fn exists(dir: &Path) -> bool {
        folder::exists(dir)
    }

    /// Makes a cluster of one manager that has no way to others, its state in `dir`.
    pub async fn create(dir: &Path, request: InitRequest) -> Result<Self, OpenError> {
        Self::create_at(dir, request, Place::default()).await
    }

    /// Makes a cluster, its state in `dir`; others can join.
    pub async fn create_at(dir: &Path, request: InitRequest, place: Place) -> Result<Self, OpenError> {
        let genesis = Command::now(Action::Initialize(Box::new(genesis(request)?)));
        // Checked before a folder is made: a wrong flag leaves nothing behind.
        let (founded, _) = apply(&State::empty(), 1, &genesis)?;
        let lock = founded.lock();
        if Self::exists(dir) {
            match Self::open(dir).await {
                Err(OpenError::Absent(_)) => {}
                Ok(cluster) => {
                    cluster.shutdown().await;
                    return Err(OpenError::Exists(dir.to_owned()));
                }
                Err(error) => return Err(error),
            }
        }
        let replica = begin(dir, &place, lock).await?;
        replica.found(place.manager).await?;
        let cluster = Self::over(replica);
        cluster.lead().await?;
        match cluster.propose(genesis).await {
            Ok(_) => Ok(cluster),
            Err(error) => {
                cluster.shutdown().await;
                Err(match error {
                    ProposeError::Refused(refusal) => refusal.into(),
                    ProposeError::Storage(error) => OpenError::Store(error),
                    ProposeError::NoLeader | ProposeError::Stopped => OpenError::Stopped,
                })
            }
        }
    }

    /// Begins an empty member in `dir`, which waits until a manager of the cluster [`Cluster::add_manager`]s it by its
    /// [`Cluster::raft_id`].
    pub async fn join(dir: &Path, place: Place) -> Result<Self, OpenError> {
        if Self::exists(dir) {
            return Err(OpenError::Exists(dir.to_owned()));
        }
        Ok(Self::over(begin(dir, &place, Lock::default()).await?))
    }

    /// Lays down in `dir` what a manager has that is alone in a cluster that has come to `state`, for [`Cluster::open_at`].
    pub async fn lay_down(dir: &Path, manager: Manager, state: State) -> Result<(), OpenError> {
        if Self::exists(dir) {
            return Err(OpenError::Exists(dir.to_owned()));
        }
        let (dir, id) = (dir.to_owned(), rand::rng().random());
        let lock = state.lock();
        let laid = blocking(move || {
            let storage = Storage::create_locked(&dir, Engine::default(), id, lock)?;
            storage.begin_with(manager, state)?;
            Ok(storage)
        });
        laid.await?.close().await;
        Ok(())
    }

    /// Opens the cluster whose state is in `dir`, for a manager that has no way to others.
    pub async fn open(dir: &Path) -> Result<Self, OpenError> {
        Self::open_at(dir, Arc::new(Isolated), None).await
    }

    /// Opens what `dir` holds, with the unlock key where it is locked. A manager that is alone has its whole state when this
    /// returns; one among several has what it knows to be decided, and hears of the rest.
    pub async fn open_at(
        dir: &Path,
        transport: Arc<dyn Transport>,
        unlock: Option<UnlockKey>,
    ) -> Result<Self, OpenError> {
        Self::open_with(dir, transport, unlock, None).await
    }

    /// Opens what `dir` holds as a cluster of this manager alone (`docker swarm init --force-new-cluster`): for when more
    /// than half of the managers are lost.
    pub async fn force_new_cluster(
        dir: &Path,
        manager: Manager,
        transport: Arc<dyn Transport>,
        unlock: Option<UnlockKey>,
    ) -> Result<Self, OpenError> {
        Self::open_with(dir, transport, unlock, Some(manager)).await
    }

    async fn open_with(
        dir: &Path,
        transport: Arc<dyn Transport>,
        unlock: Option<UnlockKey>,
        force: Option<Manager>,
    ) -> Result<Self, OpenError> {
        if !Self::exists(dir) {
            return Err(OpenError::Absent(dir.to_owned()));
        }
        let mut storage = {
            let dir = dir.to_owned();
            blocking(move || Storage::unlock(&dir, unlock.as_ref())).await?
        };
        if let Some(manager) = force {
            let id = rand::rng().random();
            storage = storage.force_new_cluster(id, manager).await?;
        }
        let settings = Settings::product(&mut rand::rng());
        let replica = Replica::start(storage, settings, transport).await?;
        let cluster = Self::over(replica);
        if cluster.inner.replica.is_alone() {
            cluster.lead().await?;
            if cluster.state().cluster.is_none() {
                cluster.shutdown().await;
                return Err(OpenError::Absent(dir.to_owned()));
            }
        }
        Ok(cluster)
    }

    /// Starts the writer of a member.
    pub fn over(replica: Replica) -> Self {
        let (proposals, queue) = mpsc::channel(QUEUE_LEN);
        let (shutdown, stop) = watch::channel(false);
        tokio::spawn(write(replica.clone(), queue, stop));
        let state = replica.state();
        Self { inner: Arc::new(Inner { proposals, replica, state, shutdown }) }
    }

    /// Waits until this manager, which is alone, leads.
    async fn lead(&self) -> Result<(), OpenError> {
        let mut leadership = self.leadership();
        let leads = async { leadership.wait_for(|it| it.is_leader).await.is_ok() };
        if timeout(LEAD_TIMEOUT, leads).await.unwrap_or(false) {
            return Ok(());
        }
        self.shutdown().await;
        Err(self.inner.replica.failure().map_or(OpenError::Stopped, OpenError::Store))
    }

    /// Proposes a command; it is durable with a majority and in effect here when this returns `Ok`.
    pub async fn propose(&self, command: Command) -> Result<Reply, ProposeError> {
        let bytes = snapshot::json_bytes(&command);
        if bytes > COMMAND_BYTES_MAX {
            let problem =
                format!("{bytes} bytes are more than the {COMMAND_BYTES_MAX} that managers exchange");
            return Err(Refusal::invalid("Spec", problem).into());
        }
        let (answer, answered) = oneshot::channel();
        let proposal = Proposal { command, bytes, deadline: Instant::now() + PATIENCE, answer };
        self.inner.proposals.send(proposal).await.map_err(|_| ProposeError::Stopped)?;
        answered.await.map_err(|_| ProposeError::Stopped)?
    }

    /// The latest state that this manager knows of. Others may know of later ones.
    pub fn state(&self) -> State {
        self.inner.state.borrow().clone()
    }

    /// The state with all that was decided before this was called, by whichever manager.
    pub async fn linearizable(&self) -> Result<State, ProposeError> {
        Ok(self.inner.replica.linearizable(Instant::now() + PATIENCE).await?)
    }

    /// Follows the state.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.inner.state.clone()
    }

    /// The last states that this manager went through.
    pub fn history(&self) -> History {
        self.inner.replica.history()
    }

    /// What of the table changed after `index`; `None` where this manager does not know it from there on.
    pub(crate) fn changed_since(&self, index: u64) -> Option<BTreeSet<Part>> {
        self.inner.replica.changed_since(index)
    }

    /// Has `reporter` say what this manager knows that is not in the state.
    pub fn report_by(&self, reporter: Reporter) {
        self.inner.replica.report_by(reporter);
    }

    /// What each manager knows that is not in the state; none of those that don't answer.
    pub async fn reports(&self) -> Vec<(Member, Option<Report>)> {
        self.inner.replica.reports().await
    }

    /// Follows who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.replica.leadership()
    }

    /// Turns true when the leader says that this manager is none any longer.
    pub fn removed(&self) -> watch::Receiver<bool> {
        self.inner.replica.removed()
    }

    /// This manager's id among the managers.
    pub fn raft_id(&self) -> RaftId {
        self.inner.replica.id()
    }

    /// What the manager's files are sealed with; none in memory.
    pub fn keys(&self) -> Option<&Arc<Keys>> {
        self.inner.replica.keys()
    }

    /// The managers, as this one knows them.
    pub fn managers(&self) -> Vec<Member> {
        self.inner.replica.managers()
    }

    /// Makes a manager one of those that keep the state, wherever the leader is. It may be asked for again.
    pub async fn add_manager(&self, id: RaftId, manager: Manager) -> Result<(), MembersError> {
        self.inner.replica.add(id, manager).await
    }

    /// A manager is to be none any longer, wherever the leader is. It may be asked for again.
    pub async fn remove_manager(&self, id: RaftId) -> Result<(), MembersError> {
        self.inner.replica.remove(id).await
    }

    /// Answers another manager, whose certificate says that it is the node `from`.
    pub async fn handle(&self, from: &NodeId, request: Request) -> Response {
        self.inner.replica.handle(from, request).await
    }

    /// The join token for `role`.
    pub fn join_token(&self, role: Role) -> JoinToken {
        let state = self.state();
        match &state.cluster {
            Some(cluster) => cluster.join_token(role),
            // Not reachable through `create` and `open`; a token that opens nothing.
            None => JoinToken::new(&[0; 32], &[0; 16]),
        }
    }

    /// Stops after what is under way; the store is closed when this returns.
    pub async fn shutdown(&self) {
        self.inner.shutdown.send_replace(true);
        self.inner.proposals.closed().await;
        self.inner.replica.shutdown().await;
    }
}

/// Begins an empty member; what an unfinished creation left goes.
async fn begin(dir: &Path, place: &Place, lock: Lock) -> Result<Replica, OpenError> {
    let (dir, engine, id) = (dir.to_owned(), place.engine, rand::rng().random());
    let storage = blocking(move || {
        folder::clear(&dir)?;
        Storage::create_locked(&dir, engine, id, lock)
    });
    let storage = storage.await?;
    let settings = Settings::product(&mut rand::rng());
    Ok(Replica::start(storage, settings, Arc::clone(&place.transport)).await?)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, OpenError> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(|_| OpenError::Stopped)??)
}

fn genesis(request: InitRequest) -> Result<Genesis, PkiError> {
    let InitRequest { spec, data_path_port, address_pools, subnet_size, avoid } = request;
    let ca = Authority::generate(SystemTime::now())?;
    let mut rng = rand::rng();
    Ok(Genesis {
        id: ClusterId::random(&mut rng),
        ca,
        join_secrets: JoinSecrets { worker: rng.random(), manager: rng.random() },
        unlock_key: spec.autolock.then(UnlockKey::random),
        hash_seed: rng.random(),
        ingress: NetworkId::random(&mut rng),
        spec,
        data_path_port,
        address_pools,
        subnet_size,
        avoid,
    })
}

/// The writer.
async fn write(replica: Replica, mut queue: mpsc::Receiver<Proposal>, mut stop: watch::Receiver<bool>) {
    let proposer = rand::rng().random();
    let mut number = 0;
    let mut waiting: Vec<Proposal> = Vec::with_capacity(BATCH_MAX);
    while !*stop.borrow() {
        if waiting.is_empty() {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                taken = queue.recv_many(&mut waiting, BATCH_MAX) => if taken == 0 { break },
            }
        }
        let now: Vec<Proposal> = waiting.drain(..batch_len(&waiting)).collect();
        number += 1;
        let deadline = now.iter().map(|proposal| proposal.deadline).min().unwrap_or_else(Instant::now);
        let (commands, answers): (Vec<_>, Vec<_>) =
            now.into_iter().map(|proposal| (proposal.command, proposal.answer)).unzip();
        let deciding = replica.propose(Batch { proposer, number, commands }, deadline);
        let stopping = async {
            let _ = stop.wait_for(|stop| *stop).await;
            tokio::time::sleep(GRACE).await;
        };
        let decided = tokio::select! {
            biased;
            decided = deciding => decided,
            () = stopping => Err(AskError::Stopped),
        };
        match decided {
            Ok(outcomes) => {
                for (answer, outcome) in answers.into_iter().zip(outcomes) {
                    let _ = answer.send(outcome.map_err(ProposeError::Refused));
                }
            }
            Err(error) => {
                for answer in answers {
                    let _ = answer.send(Err(error.clone().into()));
                }
            }
        }
    }
    queue.close();
    drop(queue);
    replica.shutdown().await;
}

/// How many of the proposals go into one batch.
fn batch_len(waiting: &[Proposal]) -> usize {
    let mut bytes = 0;
    let fits = |proposal: &&Proposal| {
        bytes += proposal.bytes;
        bytes <= BATCH_BYTES_MAX
    };
    waiting.iter().take_while(fits).count().max(1)
}

#[cfg(test)]
impl Cluster {
    /// A cluster whose store needs no threads, so that paused time can pass; it begins with `state`.
    pub(crate) async fn in_memory(state: State) -> Self {
        let storage = Storage::in_memory_with(1, state);
        let settings = Settings::product(&mut rand::rng());
        let replica = Replica::start(storage, settings, Arc::new(Isolated)).await.unwrap();
        let cluster = Self::over(replica);
        cluster.lead().await.unwrap();
        cluster
    }
}

#[cfg(test)]
mod tests;
