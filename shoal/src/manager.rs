//! The manager's part of a host: the cluster's state on disk, and the leader's duties on its port.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use control::cluster::{Cluster, InitRequest, OpenError};
use control::leader::Leader;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The folder in the state folder.
pub(crate) const DIR: &str = "manager";
/// The file in it that says where the manager listens.
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
    State { dir: PathBuf, source: OpenError },
    #[error("{} can't be read or written", path.display())]
    Addresses { path: PathBuf, source: io::Error },
    #[error("can't listen on {listen}")]
    Listen { listen: SocketAddr, source: io::Error },
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
    /// Makes a cluster and begins to lead it. Leaves nothing behind if it fails.
    pub(crate) async fn create(
        state_dir: &Path,
        addresses: Addresses,
        request: InitRequest,
    ) -> Result<Self, ManagerError> {
        let dir = state_dir.join(DIR);
        let listen = addresses.listen;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.map_err(|source| ManagerError::Listen { listen, source })?;
        let cluster = Cluster::create(&dir, request).await;
        let cluster = cluster.map_err(|source| ManagerError::State { dir: dir.clone(), source })?;
        if let Err(error) = addresses.save(&dir) {
            cluster.shutdown().await;
            remove(&dir);
            return Err(error);
        }
        let duties = tokio::spawn(lead(cluster.clone(), listener));
        Ok(Self { cluster, addresses, dir, duties })
    }

    /// Takes up the cluster that is in the state folder, if there is one.
    pub(crate) async fn open(state_dir: &Path) -> Result<Option<Self>, ManagerError> {
        let dir = state_dir.join(DIR);
        if !Cluster::exists(&dir) {
            return Ok(None);
        }
        let addresses = Addresses::load(&dir)?;
        let cluster = Cluster::open(&dir).await;
        let cluster = cluster.map_err(|source| ManagerError::State { dir: dir.clone(), source })?;
        let duties = tokio::spawn(listen_and_lead(cluster.clone(), addresses.listen));
        Ok(Some(Self { cluster, addresses, dir, duties }))
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

fn remove(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir) {
        tracing::warn!(%error, dir = %dir.display(), "the cluster's state can't be removed: remove the folder by hand");
    }
}

/// Leads until the task is aborted, which drops the leader.
async fn lead(cluster: Cluster, listener: TcpListener) {
    let _leader = Leader::start(&cluster, listener);
    std::future::pending::<()>().await;
}

/// As [`lead`], once the address can be listened on: at a boot the network may come up after the agent.
async fn listen_and_lead(cluster: Cluster, listen: SocketAddr) {
    let mut said = false;
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => return lead(cluster, listener).await,
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

    #[tokio::test]
    async fn a_manager_comes_back_with_its_cluster() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Manager::open(dir.path()).await.unwrap().is_none());
        let manager = Manager::create(dir.path(), addresses(0), InitRequest::default()).await.unwrap();
        let id = manager.cluster().state().cluster.clone().unwrap().id.clone();
        manager.stop().await;
        let manager = Manager::open(dir.path()).await.unwrap().unwrap();
        assert_eq!(manager.cluster().state().cluster.clone().unwrap().id, id);
        assert_eq!(manager.addresses(), addresses(0));
        manager.destroy().await;
        assert!(Manager::open(dir.path()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_taken_port_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let result = Manager::create(dir.path(), addresses(port), InitRequest::default()).await;
        assert!(matches!(result, Err(ManagerError::Listen { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_manager_waits_for_its_address() {
        let dir = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let manager = Manager::create(dir.path(), addresses(0), InitRequest::default()).await.unwrap();
        manager.stop().await;
        addresses(port).save(&dir.path().join(DIR)).unwrap();
        let manager = Manager::open(dir.path()).await.unwrap().unwrap();
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
