//! A host without an agent: it makes a real cluster in a folder of its own, and its tasks run in name only.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::time::SystemTime;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use mesh_api::attachment::{AttachRequest, AttachTarget, Attachment};
use mesh_api::id::NodeId;
use mesh_api::seal::UnlockKey;
use mesh_api::session::NodeDescription;
use mesh_api::table::{NodeState, Role, Table, TaskState};
use serde_json::Value;
use tower::ServiceExt as _;

use crate::apply::awaits;
use crate::backup::revive::{Revived, revive};
use crate::cluster::{self, Cluster};
use crate::command::{Action, Command};
use crate::docker::local::{
    AttachError, HostFacts, InitRequest, Interface, JoinRequest, LocalNode, Membership, RestoreError,
    RestoreRequest, RestoredSwarm, SwarmError,
};
use crate::model::{ClusterSpec, NodeSpec};
use crate::pki::First;
use crate::raft;
use crate::store::keys::Keys;
use crate::store::{StoreError, folder};
use crate::testing;

/// The host's only address.
pub(super) const ADDR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

/// A host that is in no cluster until it is told.
pub(super) struct FakeHost {
    dir: tempfile::TempDir,
    membership: Mutex<Membership>,
    cluster: Mutex<Option<Cluster>>,
    interfaces: Vec<Interface>,
    attachments: Mutex<Vec<Attachment>>,
    runs_tasks: bool,
}

impl FakeHost {
    /// A host in no cluster.
    pub(super) fn new() -> Self {
        let addrs = vec!["192.0.2.7/24".parse().unwrap()];
        Self::with_interfaces(vec![Interface { name: "eth0".into(), up: true, addrs }])
    }

    /// A host with these interfaces, in no cluster.
    pub(super) fn with_interfaces(interfaces: Vec<Interface>) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            membership: Mutex::new(Membership::Inactive),
            cluster: Mutex::new(None),
            interfaces,
            attachments: Mutex::default(),
            runs_tasks: false,
        }
    }

    /// A host in no cluster, whose cluster will orchestrate services and run their tasks in name.
    pub(super) fn that_runs_tasks() -> Self {
        Self { runs_tasks: true, ..Self::new() }
    }

    /// A host that is a worker of a cluster that it knows nothing of.
    pub(super) fn worker() -> Self {
        let host = Self::new();
        host.become_node("w0rker".into(), Role::Worker, ADDR.into(), SocketAddr::from((ADDR, 2377)));
        host
    }

    fn become_node(&self, node: NodeId, role: Role, addr: IpAddr, manager: SocketAddr) {
        *self.membership.lock().unwrap() = Membership::Active { node, role, addr, managers: vec![manager] };
    }

    fn keys(&self) -> Arc<Keys> {
        Arc::clone(self.cluster().unwrap().keys().unwrap())
    }

    /// Waits until its files are sealed by this unlock key.
    pub(super) async fn is_locked_by(&self, key: &str) {
        let key = key.parse().unwrap();
        until(|| self.keys().unlock_key().as_ref() == Some(&key)).await;
    }

    /// Waits until its files are sealed by none.
    pub(super) async fn is_unlocked(&self) {
        until(|| self.keys().unlock_key().is_none()).await;
    }

    /// Starts anew with what is on its disk; whether it is locked then.
    pub(super) async fn restart(&self) -> bool {
        let dir = self.dir.path().join("manager");
        let cluster = self.cluster.lock().unwrap().take().unwrap();
        cluster.shutdown().await;
        let is_locked = folder::is_locked(&dir).unwrap();
        if is_locked {
            let Membership::Active { node, addr, .. } = self.membership() else { panic!("it is no node") };
            *self.membership.lock().unwrap() = Membership::Locked { node, addr };
        } else {
            *self.cluster.lock().unwrap() = Some(Cluster::open(&dir).await.unwrap());
        }
        is_locked
    }

    /// Adds a node that only the cluster's state knows.
    pub(super) async fn add_node(&self, hostname: &str, role: Role) -> NodeId {
        self.add(NodeId::random(&mut rand::rng()), testing::description(hostname), role).await
    }

    async fn add(&self, id: NodeId, description: NodeDescription, role: Role) -> NodeId {
        let cluster = self.cluster().unwrap();
        let issuer = cluster.state().cluster.unwrap().ca.signer().id;
        let add = Action::AddNode { id: id.clone(), role, description, issuer, token: None };
        cluster.propose(Command::now(add)).await.unwrap();
        let ready = Action::SetNodeStatus {
            id: id.clone(),
            state: NodeState::Ready,
            message: String::new(),
            description: None,
        };
        cluster.propose(Command::now(ready)).await.unwrap();
        id
    }
}

impl LocalNode for FakeHost {
    fn membership(&self) -> Membership {
        self.membership.lock().unwrap().clone()
    }

    fn facts(&self) -> HostFacts {
        HostFacts {
            id: "7f5c9a52-3a6c-4b7f-9d2e-8a1f6f2f0f11".into(),
            hostname: "n1".into(),
            version: "0.1.0".into(),
            git_commit: "abcdef0".into(),
            kernel: "6.18.0".into(),
            os: "Debian GNU/Linux 13 (trixie)".into(),
            architecture: "x86_64".into(),
            cpus: 2,
            memory_bytes: 1 << 30,
            state_dir: "/var/lib/shoal".into(),
            dataplane: "tc".into(),
        }
    }

    fn interfaces(&self) -> Vec<Interface> {
        self.interfaces.clone()
    }

    fn cluster(&self) -> Option<Cluster> {
        self.cluster.lock().unwrap().clone()
    }

    fn table(&self) -> Option<Arc<Table>> {
        let Membership::Active { node, .. } = self.membership() else { return None };
        crate::session::view::table(&self.cluster()?.state(), &node).map(Arc::new)
    }

    fn swarm_init(&self, request: InitRequest) -> BoxFuture<'_, Result<NodeId, SwarmError>> {
        async move {
            let InitRequest {
                listen,
                advertise,
                advertise_port,
                data_path,
                data_path_port,
                address_pools,
                subnet_size,
                labels,
                task_history: _,
                cert_expiry_ns,
                autolock,
                availability,
            } = request;
            assert!(listen.ip().is_unspecified() || listen.ip() == advertise);
            assert!(listen.is_ipv6() || advertise.is_ipv4(), "nobody would reach it");
            let default = ClusterSpec::default();
            let request = cluster::InitRequest {
                spec: ClusterSpec {
                    labels,
                    cert_expiry_ns: cert_expiry_ns.unwrap_or(default.cert_expiry_ns),
                    autolock,
                    ..default
                },
                data_path_port,
                address_pools,
                subnet_size,
                ..cluster::InitRequest::default()
            };
            let id = NodeId::random(&mut rand::rng());
            let addr = SocketAddr::new(advertise, advertise_port);
            let manager = raft::Manager { node: id.clone(), addr };
            let place = cluster::Place { manager, ..cluster::Place::default() };
            let cluster = Cluster::create_at(&self.dir.path().join("manager"), request, place)
                .await
                .map_err(|error| SwarmError::Host(error.to_string()))?;
            *self.cluster.lock().unwrap() = Some(cluster.clone());
            let description =
                NodeDescription { addr: advertise, vtep: data_path, ..testing::description("n1") };
            let node = self.add(id, description, Role::Manager).await;
            let state = cluster.state();
            let spec = NodeSpec { availability, ..state.nodes[&node].spec.clone() };
            let version = state.nodes[&node].spec_version;
            cluster
                .propose(Command::now(Action::UpdateNode { id: node.clone(), version, spec }))
                .await
                .unwrap();
            self.become_node(node.clone(), Role::Manager, advertise, addr);
            if self.runs_tasks {
                tokio::spawn(crate::orchestrator::run::run(cluster.clone()));
                tokio::spawn(run_tasks(cluster));
            }
            Ok(node)
        }
        .boxed()
    }

    fn swarm_join(&self, request: JoinRequest) -> BoxFuture<'_, Result<NodeId, SwarmError>> {
        async move {
            let manager = request.remotes[0];
            // Documentation addresses: the one that nobody answers at, and the one whose cluster has another
            // token.
            match manager.ip().to_string().as_str() {
                "203.0.113.1" => Err(SwarmError::Unreachable {
                    remotes: manager.to_string(),
                    cause: "connection refused".into(),
                }),
                "203.0.113.2" => {
                    Err(SwarmError::InvalidToken("it is not this cluster's, or was rotated".into()))
                }
                "203.0.113.3" => {
                    Err(SwarmError::Refused { manager: manager.to_string(), message: "full".into() })
                }
                _ => {
                    let addr = request.advertise.unwrap_or(ADDR.into());
                    self.become_node("w0rker".into(), Role::Worker, addr, manager);
                    Ok("w0rker".into())
                }
            }
        }
        .boxed()
    }

    fn force_new_cluster(&self) -> BoxFuture<'_, Result<NodeId, SwarmError>> {
        async { Err(SwarmError::NotManager) }.boxed()
    }

    fn swarm_unlock(&self, key: UnlockKey) -> BoxFuture<'_, Result<(), SwarmError>> {
        async move {
            let dir = self.dir.path().join("manager");
            let cluster = match Cluster::open_at(&dir, Arc::new(raft::Isolated), Some(key)).await {
                Ok(cluster) => cluster,
                Err(cluster::OpenError::Store(error)) if matches!(*error, StoreError::WrongUnlockKey) => {
                    return Err(SwarmError::InvalidUnlockKey);
                }
                Err(error) => return Err(SwarmError::Host(error.to_string())),
            };
            *self.cluster.lock().unwrap() = Some(cluster);
            let Membership::Locked { node, addr } = self.membership() else {
                return Err(SwarmError::NotLocked);
            };
            self.become_node(node, Role::Manager, addr, SocketAddr::new(addr, 2377));
            Ok(())
        }
        .boxed()
    }

    fn restore(&self, request: RestoreRequest) -> BoxFuture<'_, Result<RestoredSwarm, RestoreError>> {
        async move {
            let dir = self.dir.path().join("manager");
            if folder::exists(&dir) {
                return Err(RestoreError::Manager);
            }
            let RestoreRequest { backup, listen: _, advertise, advertise_port, data_path, force } = request;
            let own = match self.membership() {
                Membership::Active { node, .. } => Some(node),
                Membership::Inactive | Membership::Locked { .. } => None,
            };
            if own.is_some() && !force {
                return Err(RestoreError::Alive("m2 answers".to_owned()));
            }
            let vtep = data_path.unwrap_or(advertise);
            let description = NodeDescription { addr: advertise, vtep, ..testing::description("n1") };
            let revived = revive(backup.state, own, &description, SystemTime::now(), &mut rand::rng());
            let revived = revived.map_err(|error| RestoreError::Unfit(error.to_string()))?;
            let Revived { state, first, demoted, replaced, known } = revived;
            let (index, key) = (state.index, state.cluster.as_ref().unwrap().lock.key.clone());
            let advertise = SocketAddr::new(advertise, advertise_port);
            let manager = raft::Manager { node: first.node.clone(), addr: advertise };
            Cluster::lay_down(&dir, manager, state).await.unwrap();
            let cluster = Cluster::open_at(&dir, Arc::new(raft::Isolated), key).await.unwrap();
            *self.cluster.lock().unwrap() = Some(cluster);
            self.become_node(first.node.clone(), Role::Manager, advertise.ip(), advertise);
            let First { cluster, node, credential: _ } = first;
            Ok(RestoredSwarm { cluster, node, index, advertise, demoted, replaced, known })
        }
        .boxed()
    }

    fn swarm_leave(&self, _force: bool) -> BoxFuture<'_, Result<(), SwarmError>> {
        async move {
            let cluster = self.cluster.lock().unwrap().take();
            if let Some(cluster) = cluster {
                cluster.shutdown().await;
            }
            let _ = std::fs::remove_dir_all(self.dir.path().join("manager"));
            *self.membership.lock().unwrap() = Membership::Inactive;
            Ok(())
        }
        .boxed()
    }

    fn attachments(&self) -> Result<Vec<Attachment>, AttachError> {
        Ok(self.attachments.lock().unwrap().clone())
    }

    fn attachment(&self, wanted: &str) -> Result<Attachment, AttachError> {
        let attachments = self.attachments.lock().unwrap();
        let found = attachments.iter().find(|it| it.id.as_str() == wanted || it.name == wanted);
        found.cloned().ok_or_else(|| AttachError::NotFound(format!("there is no attachment {wanted}")))
    }

    /// Attaches whatever exists in name: process 1, and any file.
    fn attach(&self, request: AttachRequest) -> BoxFuture<'_, Result<Attachment, AttachError>> {
        async move {
            let AttachRequest { network, name, aliases, addr, target, interface } = request;
            if matches!(target, AttachTarget::Process(pid) if pid != 1) {
                return Err(AttachError::NotFound("pid: there is no such process".into()));
            }
            if self.cluster().is_none() {
                return Err(AttachError::Unavailable("not part of a swarm".into()));
            }
            let attachment = Attachment {
                id: "0123456789abcdefghijklmno".into(),
                network: "network-id".into(),
                network_name: network,
                name: name.unwrap_or_else(|| "0123456789ab".into()),
                aliases,
                target,
                interface: interface.unwrap_or_else(|| "eth0".into()),
                addresses: vec![format!("{}/24", addr.unwrap_or(ADDR)).parse().unwrap()],
                gateways: vec![Ipv4Addr::new(10, 0, 1, 1).into()],
                name_server: Ipv4Addr::new(10, 0, 1, 1),
                mac: [2, 0x42, 10, 0, 1, 9],
                mtu: 1450,
                since_ns: 1_000_000_000,
            };
            self.attachments.lock().unwrap().push(attachment.clone());
            Ok(attachment)
        }
        .boxed()
    }

    fn detach(&self, wanted: String) -> BoxFuture<'_, Result<(), AttachError>> {
        async move {
            let found = self.attachment(&wanted)?;
            self.attachments.lock().unwrap().retain(|it| it.id != found.id);
            Ok(())
        }
        .boxed()
    }
}

async fn until(is_so: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(tokio::time::Instant::now() < deadline, "it never comes to that");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs the tasks of a cluster in name only: what is to run runs at once, what is to end ends.
async fn run_tasks(cluster: Cluster) {
    let mut watched = cluster.watch();
    loop {
        let state = watched.borrow_and_update().clone();
        let index = state.index;
        if awaits(&state, index)
            && cluster.propose(Command::now(Action::Acknowledge { index })).await.is_err()
        {
            return;
        }
        for task in state.tasks.values() {
            let Some(node) = &task.node else { continue };
            let (observed, pid, exit_code) = match (task.desired, task.status.state) {
                (TaskState::Running, seen) if seen < TaskState::Running => {
                    (TaskState::Running, Some(4711), None)
                }
                (desired, seen) if desired > TaskState::Running && !seen.is_terminal() => {
                    (TaskState::Shutdown, None, Some(143))
                }
                _ => continue,
            };
            let status = mesh_api::session::TaskStatus {
                task: task.id.clone(),
                state: observed,
                since_ns: crate::clock::now_ns(),
                message: "started".into(),
                err: String::new(),
                pid,
                exit_code,
            };
            let report = Action::ReportTasks { node: node.clone(), statuses: vec![status] };
            if cluster.propose(Command::now(report)).await.is_err() {
                return;
            }
        }
        if watched.changed().await.is_err() {
            return;
        }
    }
}

/// An API over a host, to be asked.
pub(super) struct Client {
    pub(super) host: Arc<FakeHost>,
    pub(super) router: Router,
}

impl Client {
    /// An API over `host`.
    pub(super) fn of(host: FakeHost) -> Self {
        let host = Arc::new(host);
        let router = crate::docker::router(Arc::clone(&host) as Arc<dyn LocalNode>);
        Self { host, router }
    }

    /// An API over a host that is the manager of a cluster.
    pub(super) async fn manager() -> Self {
        let client = Self::of(FakeHost::new());
        let (status, _) = client.post("/swarm/init", r#"{"ListenAddr":"0.0.0.0:2377"}"#).await;
        assert_eq!(status, StatusCode::OK);
        client
    }

    /// Asks; the answer's body as JSON, null where it is empty.
    pub(super) async fn ask(&self, method: Method, path: &str, body: &str) -> (StatusCode, Value) {
        let mut request = Request::builder().method(method).uri(path);
        if !body.is_empty() {
            request = request.header("Content-Type", "application/json");
        }
        let response =
            self.router.clone().oneshot(request.body(Body::from(body.to_owned())).unwrap()).await.unwrap();
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    pub(super) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.ask(Method::GET, path, "").await
    }

    pub(super) async fn post(&self, path: &str, body: &str) -> (StatusCode, Value) {
        self.ask(Method::POST, path, body).await
    }

    /// Makes a service of `replicas` with an optional published port, and answers its id.
    pub(super) async fn service(&self, name: &str, more: &str) -> String {
        let body = format!(
            r#"{{"Name":"{name}","TaskTemplate":{{"ContainerSpec":{{"Image":"shoal/whoami:latest"}}}}{more}}}"#
        );
        let (status, answer) = self.post("/services/create", &body).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        answer["ID"].as_str().unwrap().to_owned()
    }
}
