//! The manager's part of a host: the cluster's state on disk, the port that agents and other managers come by, and the
//! leader's duties while it leads.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use control::cluster::{Cluster, InitRequest, OpenError, Place, ProposeError};
use control::command::{Action, Command};
use control::managers;
use control::model::{NodeSpec, State};
use control::pki::{First, FirstError, first_manager};
use control::raft;
use control::store::StoreError;
use control::store::keys::Keys;
use mesh_agent::Sealing;
use mesh_api::id::NodeId;
use mesh_api::seal::{Seal, UnlockKey};
use mesh_api::session::{ManagerDescription, NodeDescription};
use mesh_api::table::Role;
use mesh_api::tls::Shared;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The folder in the state folder.
pub(crate) const DIR: &str = "manager";
/// The folder beside it where a restored state is laid down, until it is whole.
pub(crate) const UNFINISHED: &str = "manager.unfinished";
/// The file in the folder that says where the manager listens.
const ADDRESSES_FILE: &str = "addresses.json";
/// How long between attempts to listen, at a start at which the address is not there yet.
const LISTEN_PERIOD: Duration = Duration::from_secs(1);

/// Where a manager listens, and where the others find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Addresses {
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// The node's address for the others.
    pub(crate) advertise: IpAddr,
    /// The port that the others dial.
    pub(crate) advertise_port: u16,
}

impl Addresses {
    /// What the others dial.
    pub(crate) fn advertised(&self) -> SocketAddr {
        SocketAddr::new(self.advertise, self.advertise_port)
    }

    /// What the manager's own agent dials: a port of this host, whatever is in front of it.
    pub(crate) fn local(&self) -> SocketAddr {
        if self.listen.ip().is_unspecified() {
            SocketAddr::new(self.advertise, self.listen.port())
        } else {
            self.listen
        }
    }
}

/// Why the manager can't come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManagerError {
    #[error("the cluster's state in {} can't be opened", dir.display())]
    State { dir: PathBuf, source: Box<OpenError> },
    #[error("{} can't be read or written", path.display())]
    Addresses { path: PathBuf, source: io::Error },
    #[error("can't listen on {listen}")]
    Listen { listen: SocketAddr, source: io::Error },
    #[error("this host can't become the swarm's first node")]
    First(#[source] Box<FirstError>),
    #[error("the restored state can't be put in {}", dir.display())]
    Restore { dir: PathBuf, source: io::Error },
    #[error("the other managers can't be made workers")]
    Demote(#[source] Box<ProposeError>),
}

/// A running manager.
#[derive(Debug)]
pub(crate) struct Manager {
    cluster: Cluster,
    addresses: Addresses,
    dir: PathBuf,
    /// Ends with [`Manager::stop`].
    duties: JoinHandle<()>,
}

impl Manager {
    /// Makes a cluster whose first node is this host, `node`, and begins to lead it; peers are served once `credential` is
    /// there. Leaves nothing behind if it fails.
    pub(crate) async fn create(
        state_dir: &Path,
        addresses: Addresses,
        request: InitRequest,
        node: NodeDescription,
        credential: Shared,
    ) -> Result<(Self, First), ManagerError> {
        let dir = state_dir.join(DIR);
        let listen = addresses.listen;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.map_err(|source| ManagerError::Listen { listen, source })?;
        let id = NodeId::random(&mut rand::rng());
        let cluster = Cluster::create_at(&dir, request, addresses.place(&id, &credential)).await;
        let cluster =
            cluster.map_err(|source| ManagerError::State { dir: dir.clone(), source: source.into() })?;
        let first = match addresses.save(&dir) {
            Ok(()) => {
                first_manager(&cluster, id, node).await.map_err(|error| ManagerError::First(error.into()))
            }
            Err(error) => Err(error),
        };
        match first {
            Ok(first) => {
                let duties = tokio::spawn(managers::serve(cluster.clone(), credential, listener));
                Ok((Self { cluster, addresses, dir, duties }, first))
            }
            Err(error) => {
                cluster.shutdown().await;
                remove(&dir);
                Err(error)
            }
        }
    }

    /// Takes up the cluster that is in the state folder, if there is one, as the node that has `credential`; with the unlock
    /// key where it is locked.
    pub(crate) async fn open(
        state_dir: &Path,
        credential: Shared,
        unlock: Option<UnlockKey>,
    ) -> Result<Option<Self>, ManagerError> {
        let dir = state_dir.join(DIR);
        if !Cluster::exists(&dir) {
            return Ok(None);
        }
        let addresses = Addresses::load(&dir)?;
        let wire = Arc::new(managers::Wire::new(credential.clone()));
        let cluster = Cluster::open_at(&dir, wire, unlock).await;
        let cluster =
            cluster.map_err(|source| ManagerError::State { dir: dir.clone(), source: source.into() })?;
        let duties = tokio::spawn(listen_and_serve(cluster.clone(), credential, addresses.listen));
        Ok(Some(Self { cluster, addresses, dir, duties }))
    }

    /// Begins a manager on `node`, which is to be one. It has nothing until the leader, which hears of it in the node's
    /// description, makes it a member.
    pub(crate) async fn join(
        state_dir: &Path,
        addresses: Addresses,
        node: &NodeId,
        credential: Shared,
    ) -> Result<Self, ManagerError> {
        let dir = state_dir.join(DIR);
        let listen = addresses.listen;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.map_err(|source| ManagerError::Listen { listen, source })?;
        let cluster = Cluster::join(&dir, addresses.place(node, &credential)).await;
        let cluster =
            cluster.map_err(|source| ManagerError::State { dir: dir.clone(), source: source.into() })?;
        if let Err(error) = addresses.save(&dir) {
            cluster.shutdown().await;
            remove(&dir);
            return Err(error);
        }
        let duties = tokio::spawn(managers::serve(cluster.clone(), credential, listener));
        Ok(Self { cluster, addresses, dir, duties })
    }

    /// Begins the only manager of a cluster that has come to `state`, of which this host is `node`. The state is on the disk
    /// whole or not at all; leaves nothing behind if it fails.
    pub(crate) async fn restore(
        state_dir: &Path,
        addresses: Addresses,
        node: &NodeId,
        state: State,
        credential: Shared,
    ) -> Result<Self, ManagerError> {
        let (dir, unfinished) = (state_dir.join(DIR), state_dir.join(UNFINISHED));
        let listen = addresses.listen;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.map_err(|source| ManagerError::Listen { listen, source })?;
        let unlock = state.cluster.as_ref().and_then(|cluster| cluster.lock.key.clone());
        match std::fs::remove_dir_all(&unfinished) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(ManagerError::Restore { dir: unfinished, source });
            }
            _ => {}
        }
        let failed = |source: OpenError| ManagerError::State { dir: dir.clone(), source: source.into() };
        let laid = Cluster::lay_down(&unfinished, addresses.manager(node), state).await;
        let put = laid.map_err(failed).and_then(|()| addresses.save(&unfinished)).and_then(|()| {
            let put = std::fs::rename(&unfinished, &dir).and_then(|()| File::open(state_dir)?.sync_all());
            put.map_err(|source| ManagerError::Restore { dir: dir.clone(), source })
        });
        put.inspect_err(|_| drop(std::fs::remove_dir_all(&unfinished)))?;
        let wire = Arc::new(managers::Wire::new(credential.clone()));
        let cluster = Cluster::open_at(&dir, wire, unlock).await;
        let cluster = cluster.map_err(failed).inspect_err(|_| remove(&dir))?;
        let duties = tokio::spawn(managers::serve(cluster.clone(), credential, listener));
        Ok(Self { cluster, addresses, dir, duties })
    }

    /// Goes on with what `node` has on its disk as the only manager, since more than half of them are lost; the others are
    /// workers, should they come back.
    pub(crate) async fn force_new_cluster(
        self,
        node: &NodeId,
        credential: Shared,
    ) -> Result<Self, ManagerError> {
        let (dir, addresses) = (self.dir.clone(), self.addresses);
        let unlock = self.cluster.keys().and_then(|keys| keys.unlock_key());
        self.stop().await;
        let wire = Arc::new(managers::Wire::new(credential.clone()));
        let cluster = Cluster::force_new_cluster(&dir, addresses.manager(node), wire, unlock).await;
        let cluster =
            cluster.map_err(|source| ManagerError::State { dir: dir.clone(), source: source.into() })?;
        let others: Vec<_> = cluster.state().nodes.values().cloned().collect();
        for other in others.iter().filter(|other| other.id != *node && other.spec.role == Role::Manager) {
            let spec = NodeSpec { role: Role::Worker, ..other.spec.clone() };
            let action = Action::UpdateNode { id: other.id.clone(), version: other.spec_version, spec };
            cluster
                .propose(Command::now(action))
                .await
                .map_err(|error| ManagerError::Demote(error.into()))?;
        }
        let duties = tokio::spawn(listen_and_serve(cluster.clone(), credential, addresses.listen));
        Ok(Self { cluster, addresses, dir, duties })
    }

    /// What seals its state, and the node's key with it.
    pub(crate) fn seal(&self) -> Option<Arc<Seal>> {
        self.cluster.keys().map(|keys| keys.seal())
    }

    /// What the node says of it.
    pub(crate) fn description(&self) -> ManagerDescription {
        ManagerDescription { raft: self.cluster.raft_id(), addr: self.addresses.advertised() }
    }

    /// The cluster.
    pub(crate) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Where the manager is.
    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Ends the duties and closes the state, which stays on disk.
    pub(crate) async fn stop(self) {
        self.duties.abort();
        // The leader ends with its task.
        let _ = self.duties.await;
        self.cluster.shutdown().await;
    }

    /// Ends the duties and removes the state.
    pub(crate) async fn destroy(self) {
        let dir = self.dir.clone();
        self.stop().await;
        remove(&dir);
    }
}

impl Addresses {
    fn manager(&self, node: &NodeId) -> raft::Manager {
        raft::Manager { node: node.clone(), addr: self.advertised() }
    }

    fn place(&self, node: &NodeId, credential: &Shared) -> Place {
        let transport = Arc::new(managers::Wire::new(credential.clone()));
        Place { manager: self.manager(node), transport, ..Place::default() }
    }

    fn load(dir: &Path) -> Result<Self, ManagerError> {
        let path = dir.join(ADDRESSES_FILE);
        let read =
            std::fs::read(&path).and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::other));
        read.map_err(|source| ManagerError::Addresses { path, source })
    }

    fn save(&self, dir: &Path) -> Result<(), ManagerError> {
        let path = dir.join(ADDRESSES_FILE);
        let written = serde_json::to_vec_pretty(self)
            .map_err(io::Error::other)
            .and_then(|bytes| std::fs::write(&path, bytes));
        written.map_err(|source| ManagerError::Addresses { path, source })
    }
}

/// What seals the state of the manager in the state folder, and the node's key with it: opened with the unlock key where it
/// is locked.
pub(crate) fn sealing(state_dir: &Path, unlock: Option<&UnlockKey>) -> Result<Sealing, ManagerError> {
    let dir = state_dir.join(DIR);
    if !Cluster::exists(&dir) {
        return Ok(Sealing::None);
    }
    match Keys::open(&dir, unlock) {
        Ok(keys) => Ok(Sealing::With(keys.seal())),
        Err(StoreError::Locked) => Ok(Sealing::Locked),
        Err(error) => Err(ManagerError::State { dir, source: OpenError::from(error).into() }),
    }
}

/// Removes the state of a manager that does not run.
pub(crate) fn remove_state(state_dir: &Path) {
    remove(&state_dir.join(DIR));
}

fn remove(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir) {
        tracing::warn!(%error, dir = %dir.display(), "the cluster's state can't be removed: remove the folder by hand");
    }
}

/// As [`managers::serve`], once the address can be listened on: at a boot the network may come up after the agent.
async fn listen_and_serve(cluster: Cluster, credential: Shared, listen: SocketAddr) {
    let mut said = false;
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => return managers::serve(cluster, credential, listener).await,
            Err(error) if !said => {
                tracing::warn!(%listen, %error, "the manager can't listen yet, and goes on trying");
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(LISTEN_PERIOD).await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn addresses(port: u16) -> Addresses {
        Addresses {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            advertise: Ipv4Addr::LOCALHOST.into(),
            advertise_port: port,
        }
    }

    async fn create(dir: &Path, port: u16) -> Result<Manager, ManagerError> {
        let node = NodeDescription {
            hostname: "n1".to_owned(),
            addr: Ipv4Addr::new(192, 0, 2, 1).into(),
            vtep: Ipv4Addr::new(192, 0, 2, 1).into(),
            os: "linux".to_owned(),
            architecture: "x86_64".to_owned(),
            nano_cpus: 1_000_000_000,
            memory_bytes: 1 << 30,
            version: "0.1.0".to_owned(),
            labels: Vec::new(),
            dataplane: String::new(),
            routes: Vec::new(),
            wireguard: Vec::new(),
            addresses: Vec::new(),
            manager: None,
        };
        let request = InitRequest::default();
        let created = Manager::create(dir, addresses(port), request, node, Shared::default()).await;
        created.map(|(manager, _)| manager)
    }

    #[tokio::test]
    async fn a_manager_comes_back_with_its_cluster() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Manager::open(dir.path(), Shared::default(), None).await.unwrap().is_none());
        let manager = create(dir.path(), 0).await.unwrap();
        let id = manager.cluster().state().cluster.clone().unwrap().id.clone();
        manager.stop().await;
        let manager = Manager::open(dir.path(), Shared::default(), None).await.unwrap().unwrap();
        assert_eq!(manager.cluster().state().cluster.clone().unwrap().id, id);
        assert_eq!(manager.addresses(), addresses(0));
        manager.destroy().await;
        assert!(Manager::open(dir.path(), Shared::default(), None).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_taken_port_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let result = create(dir.path(), port).await;
        assert!(matches!(result, Err(ManagerError::Listen { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_manager_waits_for_its_address() {
        let dir = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let manager = create(dir.path(), 0).await.unwrap();
        manager.stop().await;
        addresses(port).save(&dir.path().join(DIR)).unwrap();
        let manager = Manager::open(dir.path(), Shared::default(), None).await.unwrap().unwrap();
        drop(taken);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err() {
            assert!(tokio::time::Instant::now() < deadline, "the manager never listens");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        manager.stop().await;
    }

    #[test]
    fn the_own_agent_dials_a_port_of_this_host() {
        let mut addresses = Addresses {
            listen: "0.0.0.0:2377".parse().unwrap(),
            advertise: Ipv4Addr::new(192, 0, 2, 7).into(),
            advertise_port: 9,
        };
        assert_eq!(addresses.local(), "192.0.2.7:2377".parse().unwrap());
        assert_eq!(addresses.advertised(), "192.0.2.7:9".parse().unwrap());
        addresses.listen = "198.51.100.7:2377".parse().unwrap();
        assert_eq!(addresses.local(), addresses.listen);
        addresses.listen = "[::]:2377".parse().unwrap();
        addresses.advertise = "fd00::7".parse().unwrap();
        assert_eq!(addresses.local(), "[fd00::7]:2377".parse().unwrap());
        assert_eq!(addresses.advertised(), "[fd00::7]:9".parse().unwrap());
    }
}
