//! This host, as the API and the process see it: the agent, and on a manager the cluster.

mod part;
mod restore;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use control::cluster::{Cluster, InitRequest as ClusterRequest};
use control::command::{Action, Command};
use control::docker::{
    AttachError, HostFacts, InitRequest, Interface, JoinRequest, LocalNode, Membership, RestoreError,
    RestoreRequest, RestoredSwarm, SwarmError,
};
use control::model::{Availability, ClusterSpec, NodeSpec, State};
use control::pki::First;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use ipnet::{IpNet, Ipv4Net};
use mesh_agent::{Agent, ConnectError, JoinError, LeaveError};
use mesh_api::attachment::{AttachRequest, Attachment};
use mesh_api::error::chain;
use mesh_api::id::NodeId;
use mesh_api::seal::UnlockKey;
use mesh_api::session::{DEFAULT_PORT, RefusalReason};
use mesh_api::table::{NodeRecord, Role, Table};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep, timeout};

pub(crate) use self::part::Part;
use self::part::follow_seal;
use crate::manager::{self, Addresses, Manager, ManagerError};
use crate::{attachments, facts, interfaces};

/// How long the other managers may take to do without one that leaves.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// How long a host that joins as a manager may take until it has the state.
const STATE_LIMIT: Duration = Duration::from_secs(15);
/// How often to look whether the manager is as it should be, where nothing tells of a change.
const LOOK: Duration = Duration::from_secs(1);
/// How long the swarm goes on without this manager before that is taken for one of a former life: no change of leaders takes so
/// long.
const PASSED_OVER: Duration = Duration::from_secs(10);
/// How long calls in progress get to end at shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);
const SHUTDOWN_POLL: Duration = Duration::from_millis(20);

/// This host.
pub(crate) struct Host {
    /// For what goes on without the call that asked for it.
    own: Weak<Host>,
    agent: Mutex<Option<Arc<Agent>>>,
    part: Mutex<Part>,
    /// Held while the host joins or leaves.
    changing: AsyncMutex<()>,
    id: String,
    hostname: String,
    state_dir: PathBuf,
    kernel: String,
    os: String,
}

/// The host is shutting down.
#[derive(Debug, Clone, Copy)]
struct Stopping;

impl Stopping {
    const TEXT: &str = "the agent is shutting down";
}

impl From<Stopping> for SwarmError {
    fn from(_: Stopping) -> Self {
        Self::Host(Stopping::TEXT.to_owned())
    }
}

impl From<Stopping> for AttachError {
    fn from(_: Stopping) -> Self {
        Self::Unavailable(Stopping::TEXT.to_owned())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is replaced as a whole, so that a panic can't leave it half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// A host with its agent, and its part.
    pub(crate) fn new(
        agent: Agent,
        part: Part,
        id: String,
        hostname: String,
        state_dir: PathBuf,
    ) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: own.clone(),
            agent: Mutex::new(Some(Arc::new(agent))),
            part: Mutex::new(part),
            changing: AsyncMutex::new(()),
            id,
            hostname,
            state_dir,
            kernel: facts::kernel_release(),
            os: facts::os_name(),
        })
    }

    /// Does `work` to its end, also when the call is dropped because its client went away: half a join or half a leave
    /// is neither.
    fn to_its_end<T, E, F>(&self, work: impl FnOnce(Arc<Self>) -> F) -> BoxFuture<'static, Result<T, E>>
    where
        T: Send + 'static,
        E: From<Stopping> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send + 'static,
    {
        let Some(own) = self.own.upgrade() else { return async { Err(Stopping.into()) }.boxed() };
        let work = work(own);
        let ended = async { tokio::spawn(work).await.unwrap_or_else(|_| Err(Stopping.into())) };
        ended.boxed()
    }

    fn agent(&self) -> Option<Arc<Agent>> {
        locked(&self.agent).clone()
    }

    /// Ends the agent and the manager; tasks and dataplane go on.
    pub(crate) async fn shutdown(&self) {
        let agent = locked(&self.agent).take();
        if let Some(mut agent) = agent {
            let deadline = tokio::time::Instant::now() + SHUTDOWN_GRACE;
            loop {
                match Arc::try_unwrap(agent) {
                    Ok(agent) => break agent.shutdown().await,
                    Err(shared) if tokio::time::Instant::now() < deadline => agent = shared,
                    Err(_) => break tracing::warn!("a call is still in progress; the agent ends without it"),
                }
                tokio::time::sleep(SHUTDOWN_POLL).await;
            }
        }
        let manager = locked(&self.part).take_manager();
        if let Some(manager) = manager {
            manager.stop().await;
        }
    }

    async fn init(&self, request: InitRequest) -> Result<NodeId, SwarmError> {
        let _changing = self.changing.lock().await;
        let agent = self.agent().ok_or(Stopping)?;
        if agent.membership().is_some() {
            return Err(SwarmError::AlreadyInSwarm);
        }
        let InitRequest {
            listen,
            advertise,
            advertise_port,
            data_path,
            data_path_port,
            address_pools,
            subnet_size,
            labels,
            task_history,
            cert_expiry_ns,
            autolock,
            availability,
        } = request;
        let addresses = Addresses { listen, advertise, advertise_port };
        let default = ClusterSpec::default();
        let cluster_request = ClusterRequest {
            spec: ClusterSpec {
                labels,
                task_history: task_history.unwrap_or(default.task_history),
                cert_expiry_ns: cert_expiry_ns.unwrap_or(default.cert_expiry_ns),
                autolock,
                ..default
            },
            data_path_port,
            address_pools,
            subnet_size,
            avoid: ipv4_subnets(&self.interfaces()),
        };
        let description = agent.description(advertise, data_path);
        let shared = agent.shared().clone();
        let created = Manager::create(&self.state_dir, addresses, cluster_request, description, shared).await;
        let (manager, First { cluster, node, credential }) = created.map_err(manager_error)?;
        let membership = mesh_agent::Membership {
            cluster_id: cluster,
            node_id: node.clone(),
            role: Role::Manager,
            advertise,
            data_path,
            remotes: vec![addresses.local()],
        };
        agent.set_manager(Some(manager.description()));
        let sealed = agent.set_seal(manager.seal()).map_err(|error| SwarmError::Host(chain(&error)));
        let founded = match sealed {
            Ok(()) => {
                let founded = agent.found(membership, credential).await;
                founded.map_err(|error| join_error(error, &[addresses.local()]))
            }
            Err(error) => Err(error),
        };
        if let Err(error) = founded {
            agent.set_manager(None);
            // There is no key to unseal.
            let _ = agent.set_seal(None);
            manager.destroy().await;
            return Err(error);
        }
        let cluster = manager.cluster().clone();
        *locked(&self.part) = Part::Manager(manager);
        if availability != Availability::Active {
            set_availability(&cluster, &node, availability).await?;
        }
        tracing::info!(%node, manager = %addresses.advertised(), "the cluster is made");
        Ok(node)
    }

    async fn join(&self, request: JoinRequest) -> Result<NodeId, SwarmError> {
        let _changing = self.changing.lock().await;
        let agent = self.agent().ok_or(Stopping)?;
        let JoinRequest { remotes, token, listen, advertise, data_path, availability: _ } = request;
        let towards = || remotes.iter().find_map(|remote| interfaces::source_towards(*remote));
        let advertise = advertise.or_else(towards).ok_or_else(|| SwarmError::Unreachable {
            remotes: list(&remotes),
            cause: "this host has no route there".to_owned(),
        })?;
        let request = mesh_agent::JoinRequest {
            remotes: remotes.clone(),
            token,
            advertise,
            data_path: data_path.unwrap_or(advertise),
        };
        let membership = agent.join(request).await.map_err(|error| join_error(error, &remotes))?;
        if membership.role == Role::Manager {
            self.begin_manager(&agent, listen).await.map_err(manager_error)?;
            let cluster = self.cluster().ok_or(Stopping)?;
            let mut state = cluster.watch();
            // Without it the node is in the swarm all the same, and gets the state as soon as the leader reaches it.
            if timeout(STATE_LIMIT, state.wait_for(|state| state.cluster.is_some())).await.is_err() {
                tracing::warn!("the leader has not sent this manager the swarm's state yet");
            }
        }
        Ok(membership.node_id)
    }

    /// Begins a manager on this node, which is to be one.
    async fn begin_manager(&self, agent: &Agent, listen: Option<SocketAddr>) -> Result<(), ManagerError> {
        let Some(membership) = agent.membership() else { return Ok(()) };
        let advertise = membership.advertise;
        let anywhere: IpAddr = match advertise {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let listen = listen.unwrap_or(SocketAddr::new(anywhere, DEFAULT_PORT));
        let addresses = Addresses { listen, advertise, advertise_port: listen.port() };
        let shared = agent.shared().clone();
        let manager = Manager::join(&self.state_dir, addresses, &membership.node_id, shared).await?;
        tracing::info!(listen = %addresses.listen, "this node becomes a manager");
        agent.set_manager(Some(manager.description()));
        follow_seal(agent, &manager);
        *locked(&self.part) = Part::Manager(manager);
        Ok(())
    }

    /// Ends this node's manager, and removes its state.
    async fn end_manager(&self, agent: &Agent) {
        // What opens the node's key goes with the state.
        if let Err(error) = agent.set_seal(None) {
            tracing::error!(
                error = chain(&error),
                "the node's key can't be unsealed, and its manager is left"
            );
            return;
        }
        let manager = locked(&self.part).take_manager();
        if let Some(manager) = manager {
            tracing::info!("this node is a manager no longer");
            manager.destroy().await;
        }
        agent.set_manager(None);
    }

    /// Has a manager run while the node is to be one: by its certificate, and as long as the other managers don't say
    /// otherwise. Until the host is gone.
    pub(crate) async fn follow_role(host: Weak<Self>) {
        let Some(shared) = host.upgrade().and_then(|host| Some(host.agent()?.shared().clone())) else {
            return;
        };
        let mut credential = shared.watch();
        // Removed by the others, and not given the certificate that goes with it yet.
        let mut is_removed = false;
        let mut passed_over: Option<Instant> = None;
        loop {
            let Some(this) = host.upgrade() else { return };
            // Not while the host joins or leaves: what it is then isn't what it is to be.
            let changing = this.changing.lock().await;
            let role = credential.borrow_and_update().as_ref().map(|own| own.identity.peer().role);
            is_removed &= role == Some(Role::Manager);
            passed_over = this.is_passed_over().then(|| passed_over.unwrap_or_else(Instant::now));
            let is_former = passed_over.is_some_and(|since| since.elapsed() >= PASSED_OVER);
            is_removed = (is_removed && !this.is_wanted_anew()) || this.is_superfluous() || is_former;
            this.match_role(role.filter(|_| !is_removed)).await;
            drop(changing);
            let removed = this.cluster().map(|cluster| cluster.removed());
            drop(this);
            let removal = async {
                match removed {
                    // The manager that it tells of may be gone meanwhile.
                    Some(mut removed) => match removed.wait_for(|removed| *removed).await.map(drop) {
                        Ok(()) => {}
                        Err(_) => std::future::pending().await,
                    },
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = credential.changed() => if changed.is_err() { return },
                () = removal => is_removed = true,
                () = sleep(LOOK) => {}
            }
        }
    }

    /// Whether a manager runs here that never was one of those that decide, and is not to be one any more.
    fn is_superfluous(&self) -> bool {
        let Some(cluster) = self.cluster() else { return false };
        let is_worker = self.record().is_some_and(|own| own.role == Role::Worker);
        is_worker && !cluster.managers().iter().any(|member| member.id == cluster.raft_id())
    }

    /// Whether the node is to be a manager again, after everybody has heard that it was none any longer.
    fn is_wanted_anew(&self) -> bool {
        self.cluster().is_none()
            && self.record().is_some_and(|own| own.role == Role::Manager && own.manager.is_none())
    }

    /// This node, by the last table.
    fn record(&self) -> Option<NodeRecord> {
        let agent = self.agent()?;
        agent.table()?.nodes.get(&agent.membership()?.node_id).cloned()
    }

    /// Begins or ends the manager, while the host is [`Host::changing`].
    async fn match_role(&self, role: Option<Role>) {
        let Some(agent) = self.agent() else { return };
        let runs = match &*locked(&self.part) {
            Part::None => false,
            Part::Manager(manager) => {
                follow_seal(&agent, manager);
                true
            }
            // It waits for its key.
            Part::Locked => return,
        };
        match role {
            Some(Role::Manager) if !runs => {
                if let Err(error) = self.begin_manager(&agent, None).await {
                    tracing::error!(
                        error = chain(&error),
                        "this node is to be a manager, and none can be begun"
                    );
                }
            }
            Some(Role::Worker) | None if runs => self.end_manager(&agent).await,
            _ => {}
        }
    }

    async fn force_new(&self) -> Result<NodeId, SwarmError> {
        let _changing = self.changing.lock().await;
        let agent = self.agent().ok_or(Stopping)?;
        let membership = agent.membership().ok_or(SwarmError::NotInSwarm)?;
        if matches!(*locked(&self.part), Part::Locked) {
            return Err(SwarmError::Locked);
        }
        let manager = locked(&self.part).take_manager().ok_or(SwarmError::NotManager)?;
        let node = membership.node_id;
        let forced = manager.force_new_cluster(&node, agent.shared().clone()).await;
        let manager = forced.map_err(manager_error)?;
        tracing::warn!(%node, "this node is the swarm's only manager by force");
        agent.set_manager(Some(manager.description()));
        *locked(&self.part) = Part::Manager(manager);
        Ok(node)
    }

    /// Has the other managers do without this one.
    async fn hand_over(&self, agent: &Agent) {
        let Some(cluster) = self.cluster() else { return };
        if cluster.managers().len() < 2 {
            return;
        }
        let Some(node) = agent.membership().map(|membership| membership.node_id) else { return };
        let handed_over = async {
            // Or the leader makes it a manager again.
            agent.set_manager(None);
            let mut state = cluster.watch();
            let is_told =
                |state: &State| state.nodes.get(&node).is_none_or(|node| node.description.manager.is_none());
            let _ = state.wait_for(is_told).await.map(drop);
            cluster.remove_manager(cluster.raft_id()).await
        };
        match timeout(LEAVE_LIMIT, handed_over).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(error = chain(&error), "the other managers still count on this one");
            }
            Err(_) => tracing::warn!("the other managers don't answer, and still count on this one"),
        }
    }

    async fn leave(&self) -> Result<(), SwarmError> {
        let _changing = self.changing.lock().await;
        let agent = self.agent().ok_or(Stopping)?;
        self.hand_over(&agent).await;
        let left = agent.leave().await;
        // With the only manager the cluster goes.
        self.end_manager(&agent).await;
        if matches!(*locked(&self.part), Part::Locked) {
            manager::remove_state(&self.state_dir);
            *locked(&self.part) = Part::None;
        }
        left.map_err(|error| match error {
            LeaveError::NotMember => SwarmError::NotInSwarm,
            LeaveError::Leftovers(_) => SwarmError::Host(chain(&error)),
        })
    }
}

impl LocalNode for Host {
    fn membership(&self) -> Membership {
        let Some(membership) = self.agent().and_then(|agent| agent.membership()) else {
            return Membership::Inactive;
        };
        let part = locked(&self.part);
        if matches!(*part, Part::Locked) {
            return Membership::Locked { node: membership.node_id, addr: membership.advertise };
        }
        let own = part.manager().map(|manager| {
            let mut managers = vec![manager.addresses().advertised()];
            let others = membership.remotes.iter().filter(|addr| **addr != manager.addresses().local());
            managers.extend(others.filter(|addr| **addr != managers[0]).copied().collect::<Vec<_>>());
            managers
        });
        Membership::Active {
            node: membership.node_id,
            role: membership.role,
            addr: membership.advertise,
            managers: own.unwrap_or(membership.remotes),
        }
    }

    fn facts(&self) -> HostFacts {
        let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let description = self.agent().map(|agent| agent.description(unspecified, unspecified));
        let cpus = description.as_ref().map_or(0, |it| it.nano_cpus / 1_000_000_000);
        let memory_bytes = description.as_ref().map_or(0, |it| it.memory_bytes);
        HostFacts {
            id: self.id.clone(),
            hostname: self.hostname.clone(),
            version: facts::VERSION.to_owned(),
            git_commit: facts::GIT_COMMIT.to_owned(),
            kernel: self.kernel.clone(),
            os: self.os.clone(),
            architecture: std::env::consts::ARCH.to_owned(),
            cpus,
            memory_bytes,
            state_dir: self.state_dir.display().to_string(),
            dataplane: description.map(|it| it.dataplane).unwrap_or_default(),
        }
    }

    fn interfaces(&self) -> Vec<Interface> {
        interfaces::interfaces()
    }

    fn cluster(&self) -> Option<Cluster> {
        locked(&self.part).manager().map(|manager| manager.cluster().clone())
    }

    fn table(&self) -> Option<Arc<Table>> {
        self.agent()?.table()
    }

    fn swarm_init(&self, request: InitRequest) -> BoxFuture<'_, Result<NodeId, SwarmError>> {
        self.to_its_end(|host| async move { host.init(request).await })
    }

    fn swarm_join(&self, request: JoinRequest) -> BoxFuture<'_, Result<NodeId, SwarmError>> {
        self.to_its_end(|host| async move { host.join(request).await })
    }

    fn force_new_cluster(&self) -> BoxFuture<'_, Result<NodeId, SwarmError>> {
        self.to_its_end(|host| async move { host.force_new().await })
    }

    fn swarm_unlock(&self, key: UnlockKey) -> BoxFuture<'_, Result<(), SwarmError>> {
        self.to_its_end(|host| async move { host.unlock(key).await })
    }

    fn restore(&self, request: RestoreRequest) -> BoxFuture<'_, Result<RestoredSwarm, RestoreError>> {
        self.to_its_end(|host| async move { host.restore_swarm(request).await })
    }

    fn swarm_leave(&self, _force: bool) -> BoxFuture<'_, Result<(), SwarmError>> {
        self.to_its_end(|host| async move { host.leave().await })
    }

    fn attachments(&self) -> Result<Vec<Attachment>, AttachError> {
        let agent = self.agent().ok_or(Stopping)?;
        attachments::list(&agent)
    }

    fn attachment(&self, wanted: &str) -> Result<Attachment, AttachError> {
        let agent = self.agent().ok_or(Stopping)?;
        attachments::find(&agent, wanted)
    }

    fn attach(&self, request: AttachRequest) -> BoxFuture<'_, Result<Attachment, AttachError>> {
        self.to_its_end(|host| async move {
            let agent = host.agent().ok_or(Stopping)?;
            attachments::attach(&agent, request).await
        })
    }

    fn detach(&self, wanted: String) -> BoxFuture<'_, Result<(), AttachError>> {
        self.to_its_end(|host| async move {
            let agent = host.agent().ok_or(Stopping)?;
            attachments::detach(&agent, &wanted).await
        })
    }
}

/// `docker swarm init --availability`.
async fn set_availability(
    cluster: &Cluster,
    node: &NodeId,
    availability: Availability,
) -> Result<(), SwarmError> {
    let state = cluster.state();
    let Some(node) = state.nodes.get(node) else { return Ok(()) };
    let spec = NodeSpec { availability, ..node.spec.clone() };
    let action = Action::UpdateNode { id: node.id.clone(), version: node.spec_version, spec };
    match cluster.propose(Command::now(action)).await {
        Ok(_) => Ok(()),
        Err(error) => Err(SwarmError::Host(format!(
            "the swarm is made, but the node's availability could not be set: {}",
            chain(&error)
        ))),
    }
}

/// The subnets that the host is on.
fn ipv4_subnets(interfaces: &[Interface]) -> Vec<Ipv4Net> {
    let nets = interfaces.iter().flat_map(|interface| &interface.addrs);
    let ipv4 = nets.filter_map(|net| match net {
        IpNet::V4(net) => Some(net.trunc()),
        IpNet::V6(_) => None,
    });
    ipv4.collect()
}

fn list(remotes: &[SocketAddr]) -> String {
    remotes.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ")
}

fn manager_error(error: ManagerError) -> SwarmError {
    match error {
        ManagerError::Listen { listen, source } => SwarmError::Listen { listen, cause: source.to_string() },
        ManagerError::State { source, .. } if source.is_wrong_key() => SwarmError::InvalidUnlockKey,
        ManagerError::State { .. }
        | ManagerError::Restore { .. }
        | ManagerError::Addresses { .. }
        | ManagerError::First(_)
        | ManagerError::Demote(_) => SwarmError::Host(chain(&error)),
    }
}

fn join_error(error: JoinError, remotes: &[SocketAddr]) -> SwarmError {
    match error {
        JoinError::AlreadyMember => SwarmError::AlreadyInSwarm,
        JoinError::Connect(ConnectError::Refused {
            reason: RefusalReason::InvalidToken, message, ..
        }) => {
            let why = message.strip_prefix("invalid join token: ").unwrap_or(&message);
            SwarmError::InvalidToken(why.to_owned())
        }
        JoinError::Connect(ConnectError::Refused { remote, message, .. }) => {
            SwarmError::Refused { manager: remote.to_string(), message }
        }
        JoinError::Connect(error @ ConnectError::Fingerprint { .. }) => {
            SwarmError::InvalidToken(error.to_string())
        }
        JoinError::Connect(error) => SwarmError::Unreachable { remotes: list(remotes), cause: chain(&error) },
        JoinError::Identity(_)
        | JoinError::Roots(_)
        | JoinError::State { .. }
        | JoinError::Node(_)
        | JoinError::NoTable => SwarmError::Host(chain(&error)),
    }
}

#[cfg(test)]
mod tests;
