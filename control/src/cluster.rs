//! The handle on the replicated state: read it, watch it, propose commands to it.
//!
//! One task writes. It takes what has been proposed meanwhile as a batch, applies each command to the latest state,
//! makes the accepted ones durable with one sync, and only then publishes the state and answers. With replicated
//! managers, the journal's place is taken by raft; `apply` and all readers stay as they are.

use std::io;
use std::path::Path;
use std::sync::Arc;

use ipnet::Ipv4Net;
use mesh_api::id::{ClusterId, NetworkId};
use mesh_api::table::Role;
use mesh_api::token::JoinToken;
use rand::RngExt as _;
use tokio::sync::{mpsc, oneshot, watch};

use crate::apply::{Reply, apply};
use crate::command::{Action, Command, Genesis};
use crate::model::cluster::{DEFAULT_DATA_PATH_PORT, DEFAULT_SUBNET_SIZE};
use crate::model::{ClusterSpec, JoinSecrets, State};
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::journal::{Entry, Journal};

/// Proposals waiting for the writer.
const QUEUE_LEN: usize = 1024;
/// Commands made durable with one sync.
const BATCH_MAX: usize = 256;

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

/// Why a cluster's state can't be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The request can't be.
    #[error(transparent)]
    Refused(#[from] Refusal),
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

/// Why a proposal did not come into effect.
#[derive(Debug, thiserror::Error)]
pub enum ProposeError {
    /// The command does not fit the state.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The state can't be made durable; the manager takes no more proposals until it is restarted.
    #[error("the manager's store failed; its log says why")]
    Storage(#[source] Arc<StoreError>),
    /// The manager is shutting down.
    #[error("the manager is shutting down")]
    Stopped,
}

/// The handle on the replicated state. Clones share it.
#[derive(Debug, Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    proposals: mpsc::Sender<Proposal>,
    state: watch::Receiver<State>,
    shutdown: watch::Sender<bool>,
}

#[derive(Debug)]
struct Proposal {
    command: Command,
    answer: oneshot::Sender<Result<Reply, ProposeError>>,
}

impl Cluster {
    /// Whether `dir` looks like it holds a cluster's state; [`Cluster::open`] knows.
    pub fn exists(dir: &Path) -> bool {
        Journal::exists(dir)
    }

    /// Makes a cluster, its state in `dir`.
    pub async fn create(dir: &Path, request: InitRequest) -> Result<Self, OpenError> {
        let genesis = Command::now(Action::Initialize(Box::new(genesis(request))));
        // Checked before a folder is made: a wrong flag leaves nothing behind.
        apply(&State::empty(), 1, &genesis)?;
        let (journal, state) = Self::load(dir).await?;
        if state.cluster.is_some() {
            return Err(OpenError::Exists(dir.to_owned()));
        }
        let cluster = Self::start(journal, state);
        match cluster.propose(genesis).await {
            Ok(_) => Ok(cluster),
            Err(ProposeError::Refused(refusal)) => Err(refusal.into()),
            Err(ProposeError::Storage(source)) => {
                Err(StoreError::Io { what: "the cluster's first command", source: io::Error::other(source) }
                    .into())
            }
            Err(ProposeError::Stopped) => Err(OpenError::Stopped),
        }
    }

    /// Opens the cluster whose state is in `dir`.
    pub async fn open(dir: &Path) -> Result<Self, OpenError> {
        if !Self::exists(dir) {
            return Err(OpenError::Absent(dir.to_owned()));
        }
        let (journal, state) = Self::load(dir).await?;
        if state.cluster.is_none() {
            return Err(OpenError::Absent(dir.to_owned()));
        }
        Ok(Self::start(journal, state))
    }

    async fn load(dir: &Path) -> Result<(Journal, State), OpenError> {
        let dir = dir.to_owned();
        tokio::task::spawn_blocking(move || Journal::open(&dir))
            .await
            .map_err(|_| OpenError::Stopped)?
            .map_err(OpenError::Store)
    }

    /// Starts the writer on a journal and the state that it leads to.
    pub(crate) fn start(journal: Journal, state: State) -> Self {
        let (proposals, queue) = mpsc::channel(QUEUE_LEN);
        let (publish, watched) = watch::channel(state);
        let (shutdown, stop) = watch::channel(false);
        tokio::spawn(write(Arc::new(journal), queue, publish, stop));
        Self { inner: Arc::new(Inner { proposals, state: watched, shutdown }) }
    }

    /// Proposes a command; it is durable and in effect when this returns `Ok`.
    pub async fn propose(&self, command: Command) -> Result<Reply, ProposeError> {
        let (answer, answered) = oneshot::channel();
        let proposal = Proposal { command, answer };
        self.inner.proposals.send(proposal).await.map_err(|_| ProposeError::Stopped)?;
        answered.await.map_err(|_| ProposeError::Stopped)?
    }

    /// The latest state.
    pub fn state(&self) -> State {
        self.inner.state.borrow().clone()
    }

    /// Follows the state.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.inner.state.clone()
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

    /// Stops the writer after what it is at; the state is closed when this returns.
    pub async fn shutdown(&self) {
        self.inner.shutdown.send_replace(true);
        self.inner.proposals.closed().await;
        // The writer drops its end of the watch last, after the journal.
        let mut state = self.inner.state.clone();
        while state.changed().await.is_ok() {}
    }
}

fn genesis(request: InitRequest) -> Genesis {
    let InitRequest { spec, data_path_port, address_pools, subnet_size, avoid } = request;
    let mut rng = rand::rng();
    Genesis {
        id: ClusterId::random(&mut rng),
        digest: rng.random(),
        join_secrets: JoinSecrets { worker: rng.random(), manager: rng.random() },
        hash_seed: rng.random(),
        ingress: NetworkId::random(&mut rng),
        spec,
        data_path_port,
        address_pools,
        subnet_size,
        avoid,
    }
}

/// The writer.
async fn write(
    journal: Arc<Journal>,
    mut queue: mpsc::Receiver<Proposal>,
    publish: watch::Sender<State>,
    mut stop: watch::Receiver<bool>,
) {
    let mut batch = Vec::with_capacity(BATCH_MAX);
    let mut failed: Option<Arc<StoreError>> = None;
    let mut snapshot: Option<tokio::task::JoinHandle<()>> = None;
    loop {
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            taken = queue.recv_many(&mut batch, BATCH_MAX) => if taken == 0 { break },
        }
        if let Some(error) = &failed {
            for proposal in batch.drain(..) {
                let _ = proposal.answer.send(Err(ProposeError::Storage(Arc::clone(error))));
            }
            continue;
        }
        if let Err(error) = write_batch(&journal, &mut batch, &publish).await {
            tracing::error!(
                error = &*error as &dyn std::error::Error,
                "the store failed; restart the manager"
            );
            failed = Some(error);
            continue;
        }
        if snapshot.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) {
            let state = publish.borrow().clone();
            if journal.wants_snapshot(state.index) {
                let journal = Arc::clone(&journal);
                snapshot = Some(tokio::task::spawn_blocking(move || {
                    if let Err(error) = journal.snapshot(&state) {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "no snapshot of the state was made"
                        );
                    }
                }));
            }
        }
    }
    queue.close();
    if let Some(snapshot) = snapshot {
        let _ = snapshot.await;
    }
    // Closing the store can block.
    let _ = tokio::task::spawn_blocking(move || drop(journal)).await;
    drop(publish);
}

async fn write_batch(
    journal: &Arc<Journal>,
    batch: &mut Vec<Proposal>,
    publish: &watch::Sender<State>,
) -> Result<(), Arc<StoreError>> {
    let mut state = publish.borrow().clone();
    let mut entries = Vec::with_capacity(batch.len());
    let mut answers = Vec::with_capacity(batch.len());
    for Proposal { command, answer } in batch.drain(..) {
        let index = state.index + 1;
        match apply(&state, index, &command) {
            Ok((next, reply)) => {
                state = next;
                entries.push(Entry { index, command });
                answers.push((answer, reply));
            }
            Err(refusal) => drop(answer.send(Err(refusal.into()))),
        }
    }
    if entries.is_empty() {
        return Ok(());
    }
    let durable = {
        let journal = Arc::clone(journal);
        tokio::task::spawn_blocking(move || journal.append(&entries)).await
    };
    let durable = durable.unwrap_or_else(|panic| {
        Err(StoreError::Io { what: "appending to the log", source: io::Error::other(panic) })
    });
    match durable {
        Ok(()) => {
            publish.send_replace(state);
            for (answer, reply) in answers {
                let _ = answer.send(Ok(reply));
            }
            Ok(())
        }
        Err(error) => {
            let error = Arc::new(error);
            for (answer, _) in answers {
                let _ = answer.send(Err(ProposeError::Storage(Arc::clone(&error))));
            }
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests;
