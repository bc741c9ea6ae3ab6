//! The host becomes the only manager of a swarm whose managers are lost.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use control::backup::Backup;
use control::backup::revive::{Revived, revive};
use control::cluster::Cluster;
use control::docker::{LocalNode as _, RestoreError, RestoreRequest, RestoredSwarm, SwarmError};
use control::pki::First;
use futures::future::join_all;
use mesh_agent::{Agent, SessionState};
use mesh_api::error::chain;
use mesh_api::session::NodeDescription;
use mesh_api::table::Role;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::{Host, Part, STATE_LIMIT, Stopping, locked, manager_error};
use crate::manager::{self, Addresses, Manager};

/// How long a former manager may take to answer before it counts as lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// How often to look whether the node has the restored table.
const LOOK: Duration = Duration::from_millis(100);

impl From<Stopping> for RestoreError {
    fn from(stopping: Stopping) -> Self {
        SwarmError::from(stopping).into()
    }
}

impl Host {
    /// Restores the swarm of a backup.
    pub(super) async fn restore_swarm(&self, request: RestoreRequest) -> Result<RestoredSwarm, RestoreError> {
        let _changing = self.changing.lock().await;
        let agent = self.agent().ok_or(Stopping)?;
        let RestoreRequest { backup, listen, advertise, advertise_port, data_path, force } = request;
        let addresses = Addresses { listen, advertise, advertise_port };
        let membership = agent.membership();
        if let Some(own) = &membership
            && own.cluster_id != backup.header.cluster
        {
            let (own, backup) = (own.cluster_id.clone(), backup.header.cluster);
            return Err(RestoreError::OtherSwarm { own, backup });
        }
        // One that waits for the swarm's state has nothing to lose.
        let has_state = match self.cluster() {
            Some(cluster) => cluster.state().cluster.is_some(),
            None => Cluster::exists(&self.state_dir.join(manager::DIR)),
        };
        if has_state {
            return Err(RestoreError::Manager);
        }
        if !force {
            check_lost(&agent, &backup, addresses).await?;
        }
        let index = backup.header.index;
        let data_path =
            data_path.or(membership.as_ref().map(|own| own.data_path)).unwrap_or(addresses.advertise);
        // Another manager takes the place of one that waits for the swarm's state.
        let description = NodeDescription { manager: None, ..agent.description(advertise, data_path) };
        let own = membership.as_ref().map(|own| own.node_id.clone());
        let revived = revive(backup.state, own, &description, SystemTime::now(), &mut rand::rng());
        let Revived { state, first, demoted, replaced, known } =
            revived.map_err(|error| RestoreError::Unfit(chain(&error)))?;
        if locked(&self.part).manager().is_some() {
            // What opens the node's key goes with its state.
            agent.set_seal(None).map_err(|error| SwarmError::Host(chain(&error)))?;
        }
        let empty = locked(&self.part).take_manager();
        agent.set_manager(None);
        if let Some(empty) = empty {
            empty.destroy().await;
        }
        let from = state.index;
        let First { cluster, node, credential } = first;
        let shared = agent.shared().clone();
        let manager = Manager::restore(&self.state_dir, addresses, &node, state, shared).await;
        let manager = manager.map_err(manager_error)?;
        agent.set_manager(Some(manager.description()));
        let remotes = vec![addresses.local()];
        let is_known = membership.is_some();
        let membership = membership.unwrap_or(mesh_agent::Membership {
            cluster_id: cluster.clone(),
            node_id: node.clone(),
            role: Role::Manager,
            advertise,
            data_path,
            remotes: remotes.clone(),
        });
        let enter = async {
            let failed = |text| Err(SwarmError::Host(text));
            agent.set_seal(manager.seal()).or_else(|error| failed(chain(&error)))?;
            if is_known {
                agent.reinstate(credential, remotes).await.or_else(|error| failed(chain(&error)))
            } else {
                agent.found(membership, credential).await.or_else(|error| failed(chain(&error)))
            }
        };
        if let Err(error) = enter.await {
            agent.set_manager(None);
            // The node's key is as it was.
            let _ = agent.set_seal(None);
            manager.destroy().await;
            return Err(error.into());
        }
        *locked(&self.part) = Part::Manager(manager);
        let has_table = async {
            while agent.table().is_none_or(|table| table.index < from) {
                sleep(LOOK).await;
            }
        };
        if is_known && timeout(STATE_LIMIT, has_table).await.is_err() {
            tracing::warn!("this node has not got the restored table yet");
        }
        tracing::warn!(%cluster, %node, index, "the swarm is restored, and this node its only manager");
        let advertise = addresses.advertised();
        Ok(RestoredSwarm { cluster, node, index: from, advertise, demoted, replaced, known })
    }
}

impl Host {
    /// Whether this manager is one of a swarm's former life: the node has a session with a leader by whom it is a worker, and its
    /// manager knows of no leader.
    pub(super) fn is_passed_over(&self) -> bool {
        let has_session = || self.agent().and_then(|agent| agent.session()) == Some(SessionState::Connected);
        let is_worker = || self.record().is_some_and(|own| own.role == Role::Worker);
        let leaderless = |cluster: Cluster| cluster.leadership().borrow().leader.is_none();
        self.cluster().is_some_and(leaderless) && has_session() && is_worker()
    }
}

/// Refuses where the swarm seems to live: what is restored beside it is another with the same name, certificates and addresses.
async fn check_lost(agent: &Agent, backup: &Backup, own: Addresses) -> Result<(), RestoreError> {
    if agent.session() == Some(SessionState::Connected) {
        return Err(RestoreError::Alive("this node has a session with the swarm's leader".to_owned()));
    }
    let managers = backup.state.nodes.values().filter(|node| node.spec.role == Role::Manager);
    let others = managers.filter_map(|node| {
        let addr = node.description.manager.as_ref()?.addr;
        (addr.ip() != own.advertise).then(|| (node.description.hostname.clone(), addr))
    });
    let answering = join_all(others.map(async |(name, addr): (String, SocketAddr)| {
        let connected = timeout(ANSWER_LIMIT, TcpStream::connect(addr)).await;
        matches!(connected, Ok(Ok(_))).then(|| format!("{name} at {addr}"))
    }));
    let answering: Vec<String> = answering.await.into_iter().flatten().collect();
    if answering.is_empty() {
        return Ok(());
    }
    let answering = answering.join(", ");
    Err(RestoreError::Alive(format!("managers of the swarm answer: {answering}")))
}
