//! The agent as the `shoal` binary uses it: a host that is in no cluster, or a node of one.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_api::seal::Seal;
use mesh_api::session::{ManagerDescription, NodeDescription};
use mesh_api::table::Table;
use mesh_api::tls::{Credential, IdentityError, KeyRequest, Roots, RootsError, Shared};
use mesh_api::token::JoinToken;
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{info, warn};

mod attach;

pub use attach::{AttachError, DetachError};

use crate::claim::{ClaimError, NetnsClaim};
use crate::config::Config;
use crate::dataplane::Dataplane;
use crate::encryption;
use crate::facts::Describe;
use crate::node::{Node, NodeError, NodeInputs};
use crate::runtime::Runtime;
use crate::session::{ConnectError, Credentials, Joined, Membership, Session, SessionState, Store, join};

/// How long a join waits for the first table and for the dataplane to hold it: a slow machine needs half of it for the kernel
/// to verify the programs.
const JOIN_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a node that starts waits for its uplinks and their addresses; a host that joins has them.
const UPLINK_PATIENCE: Duration = Duration::from_mins(2);

/// Why the agent can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The host has an agent.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The state folder.
    #[error(
        "cannot read membership.json in the state folder {}: restore it, or remove it to give the node's place in the cluster up",
        dir.display()
    )]
    State {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host is a node, and can't be brought up as one.
    #[error(transparent)]
    Node(#[from] NodeError),
}

/// How to join a cluster.
#[derive(Debug, Clone)]
pub struct JoinRequest {
    /// Managers, any of which will do.
    pub remotes: Vec<SocketAddr>,
    /// The cluster's token for the role to join as.
    pub token: JoinToken,
    /// The address to advertise to the others.
    pub advertise: IpAddr,
    /// The VXLAN address; mostly the same.
    pub data_path: IpAddr,
}

/// Why the host can't join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// It is a node already.
    #[error(
        "This node is already part of a swarm. Use \"docker swarm leave\" to leave this swarm and join another one."
    )]
    AlreadyMember,
    /// No manager takes it.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Its own key, or the certificate that it was given, can't be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The roots that it was given can't be used.
    #[error("the manager sent no root certificates")]
    Roots(#[from] RootsError),
    /// The membership can't be remembered.
    #[error("cannot write the membership to the state folder {}", dir.display())]
    State {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It joined, but can't work as a node; it left again.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The manager took it but sent no table in time; it left again.
    #[error("the manager sent no table within {} s", JOIN_TIMEOUT.as_secs())]
    NoTable,
}

/// Why leaving was not clean; the host is out of the cluster all the same.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// It was in none.
    #[error("This node is not part of a swarm")]
    NotMember,
    /// Something could not be removed.
    #[error("left the swarm, but some of it could not be removed: {}", .0.join("; "))]
    Leftovers(Vec<String>),
}

/// An agent.
#[derive(Debug)]
pub struct Agent {
    /// Held for as long as this is the host's agent.
    _claim: NetnsClaim,
    config: Config,
    store: Store,
    shared: Shared,
    runtime: Runtime,
    describe: Describe,
    /// Keeps the routes of the description.
    _routes: JoinSet<()>,
    /// What is there while the host is a node; joining and leaving hold it throughout.
    active: AsyncMutex<()>,
    current: Mutex<Option<Active>>,
}

#[derive(Debug)]
struct Active {
    proof: Proof,
    session: Session,
    node: Node,
    tables: watch::Receiver<Option<Arc<Table>>>,
}

/// What the node proves itself with.
#[derive(Debug)]
enum Proof {
    Open(Arc<Mutex<Credentials>>),
    /// It is sealed; the session waits for it.
    Sealed(Membership, oneshot::Sender<Arc<Mutex<Credentials>>>),
}

/// What is known at an agent's start of what seals the node's key.
#[derive(Debug, Clone)]
pub enum Sealing {
    /// The host has no manager.
    None,
    /// The manager is locked: the node comes up with its last table, and asks no manager before [`Agent::unlock`].
    Locked,
    /// What seals the manager's state.
    With(Arc<Seal>),
}

impl Agent {
    /// Comes up with what the state folder says: in no cluster, or a node with its last table, whose dataplane is up
    /// before the managers are asked. What the node proves itself with is kept in `shared`, for as long as it is one.
    pub async fn start(config: Config, shared: Shared, sealing: Sealing) -> Result<Self, StartError> {
        let claim = NetnsClaim::take()?;
        let store = Store::new(&config.state_dir);
        let runtime = Runtime::new(store.tasks(), PathBuf::from("/proc/self/exe"));
        let describe = Describe::new(config.hostname.clone()).with_health(config.health.clone());
        let routes = describe.follow_routes().await;
        let (active, current) = (AsyncMutex::new(()), Mutex::new(None));
        let agent = Self {
            _claim: claim,
            config,
            store,
            shared,
            runtime,
            describe,
            _routes: routes,
            active,
            current,
        };
        let wrap = |source| StartError::State { dir: agent.config.state_dir.clone(), source };
        let Some(kept) = agent.store.load().map_err(wrap)? else {
            info!("in no cluster");
            return Ok(agent);
        };
        let membership = kept.membership;
        let credentials = match sealing {
            Sealing::Locked => None,
            Sealing::None => agent.store.load_credentials().map_err(wrap)?,
            Sealing::With(seal) => {
                agent.store.set_seal(Some(seal)).map_err(wrap)?;
                agent.store.load_credentials().map_err(wrap)?
            }
        };
        let table = agent.store.load_table().map(Arc::new);
        info!(node = %membership.node_id, index = table.as_ref().map(|table| table.index), "node of a cluster");
        agent.describe.set_wireguard(encryption::remembered(&agent.config.state_dir));
        let has_table = table.is_some();
        let (active, ready) = match credentials {
            Some(credentials) => agent.activate(credentials, table, false, UPLINK_PATIENCE),
            None => agent.activate_locked(membership, table),
        };
        // Without a table there is nothing to wait for until the managers answer.
        if has_table {
            // The loop answers before it does anything else, unless the runtime is shutting down.
            ready.await.unwrap_or(Ok(()))?;
        }
        agent.set(Some(active));
        Ok(agent)
    }

    /// What the node of the state folder proves itself with, for who needs it before the agent is up; `None` where the host
    /// is in no cluster. `seal` is what seals the state of the host's manager.
    pub fn credential(state_dir: &Path, seal: Option<&Seal>) -> Result<Option<Arc<Credential>>, StartError> {
        let kept = Store::new(state_dir).load();
        let credentials = kept.and_then(|kept| kept.map(|kept| kept.credentials(&[seal])).transpose());
        let wrap = |source| StartError::State { dir: state_dir.to_owned(), source };
        Ok(credentials.map_err(wrap)?.map(|credentials| credentials.credential))
    }

    /// Seals the node's key with what seals the host's manager, for as long as its certificate is a manager's; or not at
    /// all. The file on the disk is replaced when this returns.
    pub fn set_seal(&self, seal: Option<Arc<Seal>>) -> Result<(), StartError> {
        let wrap = |source| StartError::State { dir: self.config.state_dir.clone(), source };
        self.store.set_seal(seal).map_err(wrap)
    }

    /// Has a node that was started locked ask the managers, with its key, which `seal` opens.
    pub fn unlock(&self, seal: Arc<Seal>) -> Result<(), StartError> {
        let wrap = |source| StartError::State { dir: self.config.state_dir.clone(), source };
        self.store.set_seal(Some(seal)).map_err(wrap)?;
        let Some(credentials) = self.store.load_credentials().map_err(wrap)? else { return Ok(()) };
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Active { proof, .. }) = &mut *current else { return Ok(()) };
        self.shared.set(Some(Arc::clone(&credentials.credential)));
        let credentials = Arc::new(Mutex::new(credentials));
        if let Proof::Sealed(_, unlock) = std::mem::replace(proof, Proof::Open(Arc::clone(&credentials))) {
            // The session is there for as long as the node is.
            let _ = unlock.send(credentials);
        }
        Ok(())
    }

    fn activate(
        &self,
        credentials: Credentials,
        table: Option<Arc<Table>>,
        is_fresh: bool,
        patience: Duration,
    ) -> (Active, oneshot::Receiver<Result<(), NodeError>>) {
        let membership = credentials.membership.clone();
        self.shared.set(Some(Arc::clone(&credentials.credential)));
        let credentials = Arc::new(Mutex::new(credentials));
        let session = Session::start(
            self.store.clone(),
            Arc::clone(&credentials),
            self.shared.clone(),
            self.describe.clone(),
            table,
            is_fresh,
        );
        self.start_node(membership, Proof::Open(credentials), session, patience)
    }

    /// A node whose key is sealed: all but the session's beginning.
    fn activate_locked(
        &self,
        membership: Membership,
        table: Option<Arc<Table>>,
    ) -> (Active, oneshot::Receiver<Result<(), NodeError>>) {
        let (store, shared, describe) = (self.store.clone(), self.shared.clone(), self.describe.clone());
        let (session, unlock) = Session::start_locked(store, shared, describe, table);
        self.start_node(membership.clone(), Proof::Sealed(membership, unlock), session, UPLINK_PATIENCE)
    }

    fn start_node(
        &self,
        membership: Membership,
        proof: Proof,
        session: Session,
        patience: Duration,
    ) -> (Active, oneshot::Receiver<Result<(), NodeError>>) {
        let inputs = NodeInputs::of_session(
            self.config.clone(),
            membership,
            self.runtime.clone(),
            self.describe.clone(),
            &session,
            patience,
        );
        let (node, ready) = Node::start::<Dataplane>(inputs);
        let tables = session.tables.clone();
        (Active { proof, session, node, tables }, ready)
    }

    /// Joins a cluster by one of its managers; returns once the dataplane holds the first table.
    pub async fn join(&self, request: JoinRequest) -> Result<Membership, JoinError> {
        let _joining = self.active.lock().await;
        if self.membership().is_some() {
            return Err(JoinError::AlreadyMember);
        }
        let node = self.description(request.advertise, request.data_path);
        let (membership, credential) = become_node(request, node).await?;
        self.enter(membership.clone(), credential).await?;
        Ok(membership)
    }

    /// Becomes the first node of a cluster that was made on this host, which knows of the node and has given it
    /// `credential`; returns once the dataplane holds the first table.
    pub async fn found(&self, membership: Membership, credential: Credential) -> Result<(), JoinError> {
        let _joining = self.active.lock().await;
        if self.membership().is_some() {
            return Err(JoinError::AlreadyMember);
        }
        self.enter(membership, credential).await
    }

    /// Has the node go on by `credential`, and ask the managers at `remotes`: its cluster was restored there.
    pub async fn reinstate(
        &self,
        credential: Credential,
        remotes: Vec<SocketAddr>,
    ) -> Result<(), StartError> {
        let _reinstating = self.active.lock().await;
        let Some(membership) = self.membership() else { return Ok(()) };
        let membership = Membership { role: credential.identity.peer().role, remotes, ..membership };
        let credentials = Credentials { membership, credential: Arc::new(credential) };
        let saved = self.store.save_credentials(&credentials);
        saved.map_err(|source| StartError::State { dir: self.config.state_dir.clone(), source })?;
        self.shared.set(Some(Arc::clone(&credentials.credential)));
        self.with(|active| {
            if let Proof::Open(open) = &active.proof {
                *open.lock().unwrap_or_else(PoisonError::into_inner) = credentials;
            }
        });
        Ok(())
    }

    async fn enter(&self, membership: Membership, credential: Credential) -> Result<(), JoinError> {
        let credentials = Credentials { membership: membership.clone(), credential: Arc::new(credential) };
        let saved = self.store.save_credentials(&credentials);
        let (active, ready) = self.activate(credentials, None, true, Duration::ZERO);
        let result = match saved {
            Err(source) => Err(JoinError::State { dir: self.config.state_dir.clone(), source }),
            Ok(()) => match timeout(JOIN_TIMEOUT, ready).await {
                Ok(Ok(result)) => result.map_err(JoinError::from),
                Ok(Err(_)) | Err(_) => Err(JoinError::NoTable),
            },
        };
        match result {
            Ok(()) => {
                info!(node = %membership.node_id, cluster = %membership.cluster_id, "joined");
                self.set(Some(active));
                Ok(())
            }
            Err(error) => {
                for leftover in self.deactivate(active).await {
                    warn!(leftover, "left behind by a join that failed");
                }
                Err(error)
            }
        }
    }

    /// Leaves the cluster: stops the tasks, tears the dataplane down, forgets the membership. An error tells what was
    /// left behind; the host is out of the cluster in any case.
    pub async fn leave(&self) -> Result<(), LeaveError> {
        let _leaving = self.active.lock().await;
        let active = self.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        let leftovers = self.deactivate(active.ok_or(LeaveError::NotMember)?).await;
        info!("left the cluster");
        if leftovers.is_empty() { Ok(()) } else { Err(LeaveError::Leftovers(leftovers)) }
    }

    async fn deactivate(&self, active: Active) -> Vec<String> {
        let Active { session, node, .. } = active;
        session.leave().await;
        let mut leftovers = node.tear_down().await;
        leftovers.extend(self.store.forget().iter().map(ToString::to_string));
        self.shared.set(None);
        self.describe.set_dataplane(&[]);
        self.describe.health().clear();
        self.describe.set_wireguard(Vec::new());
        leftovers
    }

    /// The host's place in a cluster, while it has one.
    pub fn membership(&self) -> Option<Membership> {
        self.with(|active| match &active.proof {
            Proof::Open(credentials) => {
                credentials.lock().unwrap_or_else(PoisonError::into_inner).membership.clone()
            }
            Proof::Sealed(membership, _) => membership.clone(),
        })
    }

    /// What the node proves itself with, shared.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The last table, while the host is a node and has had one.
    pub fn table(&self) -> Option<Arc<Table>> {
        self.with(|active| active.tables.borrow().clone()).flatten()
    }

    /// The table index that the dataplane holds.
    pub fn applied(&self) -> Option<u64> {
        self.with(|active| *active.session.applied.borrow()).flatten()
    }

    /// How the session with the managers stands, while the host is a node.
    pub fn session(&self) -> Option<SessionState> {
        self.with(|active| active.session.state.borrow().clone())
    }

    /// The host, as it describes itself when it advertises `advertise` and does VXLAN from `data_path`.
    pub fn description(&self, advertise: IpAddr, data_path: IpAddr) -> NodeDescription {
        self.describe.describe(advertise, data_path)
    }

    /// Sets which manager runs on the host, which the node's description then says.
    pub fn set_manager(&self, manager: Option<ManagerDescription>) {
        self.describe.set_manager(manager);
    }

    /// Ends the agent; tasks and dataplane go on.
    pub async fn shutdown(self) {
        let active = self.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Active { node, session, .. }) = active else { return };
        drop(node);
        session.end().await;
    }

    fn set(&self, active: Option<Active>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = active;
    }

    fn with<T>(&self, read: impl FnOnce(&Active) -> T) -> Option<T> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(read)
    }
}

/// Has the host `node` become one of the cluster's.
pub(crate) async fn become_node(
    request: JoinRequest,
    node: NodeDescription,
) -> Result<(Membership, Credential), JoinError> {
    let JoinRequest { remotes, token, advertise, data_path } = request;
    let key = KeyRequest::new()?;
    let joined = join(&remotes, &token, key.csr(), node).await?;
    let Joined { cluster_id, node_id, role, chain, roots } = joined;
    let credential = Credential { identity: key.identity(&chain)?, roots: Roots::from_pem(&roots)? };
    credential.check()?;
    Ok((Membership { cluster_id, node_id, role, advertise, data_path, remotes }, credential))
}
