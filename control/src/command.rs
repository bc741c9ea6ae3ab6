//! What can happen to the state. A command carries everything that its effect depends on beside the state itself:
//! ids, secrets and the time, so that applying a log of commands gives the same state wherever and whenever it is done.

use ipnet::Ipv4Net;
use mesh_api::id::{ClusterId, NetworkId, NodeId, ServiceId, TaskId, TokenId};
use mesh_api::seal::UnlockKey;
use mesh_api::session::{AttachmentSpec, NodeDescription, TaskStatus};
use mesh_api::table::{NodeState, Role, TaskState};
use mesh_api::tls::KeyId;
use serde::{Deserialize, Serialize};

use crate::model::{ClusterSpec, IpamConfig, JoinSecrets, NetworkSpec, NodeSpec, ServiceSpec};
use crate::pki::{Authority, Rotation};

/// An action, and when it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The time of the proposer, ns since the epoch.
    pub at_ns: u64,
    /// What to do.
    pub action: Action,
}

impl Command {
    /// `action`, asked for at this moment.
    pub fn now(action: Action) -> Self {
        Self { at_ns: crate::clock::now_ns(), action }
    }
}

/// What can happen to the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The first command: makes the cluster and its ingress network.
    Initialize(Box<Genesis>),
    /// `docker swarm update`, `docker swarm join-token --rotate`.
    UpdateCluster {
        /// The version that the update is based on.
        version: u64,
        /// What it becomes.
        spec: ClusterSpec,
        /// The worker token's secret part, if it changes.
        worker_secret: Option<[u8; 16]>,
        /// The manager token's secret part, if it changes.
        manager_secret: Option<[u8; 16]>,
        /// The next root, if it changes: made for the present one.
        rotation: Option<Box<Rotation>>,
        /// The next unlock key, if it changes; without autolock there is none.
        unlock_key: Option<UnlockKey>,
    },
    /// Every node has a certificate from the next root: it takes the present one's place, and join tokens name it.
    FinishRotation {
        /// The next root.
        root: KeyId,
        /// The secret parts of the join tokens from here on.
        join_secrets: JoinSecrets,
    },
    /// A host becomes a node.
    AddNode {
        /// Its id.
        id: NodeId,
        /// Its role, from the token.
        role: Role,
        /// The host.
        description: NodeDescription,
        /// The root that its certificate comes from.
        issuer: KeyId,
        /// The join token that it came by, where that is not one of the cluster's two: this is one use of it.
        token: Option<TokenId>,
    },
    /// `shoal token create`.
    CreateToken {
        /// Its id.
        id: TokenId,
        /// What hosts become that join by it.
        role: Role,
        /// SHA-256 of its secret part.
        secret_digest: [u8; 32],
        /// How long it is good, ns.
        life_ns: u64,
        /// For how many nodes; `None` for any number.
        uses: Option<u32>,
    },
    /// `shoal token rm`.
    RemoveToken {
        /// The token.
        id: TokenId,
    },
    /// Tokens go that nobody has to be told of any longer.
    DropTokens,
    /// A node whose certificate has expired asks for another, and has proved who it is.
    NoteAsking {
        /// The node.
        id: NodeId,
    },
    /// `shoal node approve`: such a node may have another certificate, once and within an hour.
    ApproveNode {
        /// The node.
        id: NodeId,
    },
    /// Such a node gets another certificate.
    ReadmitNode {
        /// The node.
        id: NodeId,
    },
    /// A node has another certificate.
    SetNodeIssuer {
        /// The node.
        id: NodeId,
        /// The root that the certificate comes from.
        issuer: KeyId,
    },
    /// What the managers know of a node's life changed.
    SetNodeStatus {
        /// The node.
        id: NodeId,
        /// Whether they hear from it.
        state: NodeState,
        /// For people: why.
        message: String,
        /// The host as it describes itself, if it did.
        description: Option<NodeDescription>,
    },
    /// `docker node update`.
    UpdateNode {
        /// The node.
        id: NodeId,
        /// The version that the update is based on.
        version: u64,
        /// What it becomes.
        spec: NodeSpec,
    },
    /// `docker node rm`.
    RemoveNode {
        /// The node.
        id: NodeId,
        /// Even if the managers hear from it.
        force: bool,
    },
    /// `docker network create`.
    CreateNetwork {
        /// Its id.
        id: NetworkId,
        /// What is asked for.
        spec: NetworkSpec,
    },
    /// A network gets another IPv4 subnet; Docker has no word for it.
    AddSubnet {
        /// The network.
        network: NetworkId,
        /// What is asked for.
        config: IpamConfig,
    },
    /// `shoal network rotate-keys`: every node replaces its WireGuard keys.
    RotateKeys,
    /// `docker network rm`.
    RemoveNetwork {
        /// The network.
        id: NetworkId,
    },
    /// `docker service create`.
    CreateService {
        /// Its id.
        id: ServiceId,
        /// What is asked for.
        spec: Box<ServiceSpec>,
    },
    /// `docker service update`, `docker service scale`.
    UpdateService {
        /// The service.
        id: ServiceId,
        /// The version that the update is based on.
        version: u64,
        /// What it becomes.
        spec: Box<ServiceSpec>,
    },
    /// `docker service rollback`: back to the previous specification.
    RollbackService {
        /// The service.
        id: ServiceId,
        /// The version that the rollback is based on.
        version: u64,
    },
    /// `docker service rm`.
    RemoveService {
        /// The service.
        id: ServiceId,
    },
    /// A node reports of its tasks. What does not fit (another node's task, a state that lies behind) is skipped.
    ReportTasks {
        /// The node.
        node: NodeId,
        /// The states.
        statuses: Vec<TaskStatus>,
    },
    /// Every live node has applied the table up to an index: addresses that were freed by then are held by none.
    Acknowledge {
        /// The table index.
        index: u64,
    },
    /// The orchestrator's steps, in order. A step whose ground has gone meanwhile is skipped.
    Orchestrate {
        /// The steps.
        steps: Vec<Step>,
    },
    /// What runs on a node already gets an endpoint on an attachable network: `shoal attach` there.
    Attach {
        /// The id of its task.
        id: TaskId,
        /// The node.
        node: NodeId,
        /// What is asked for.
        spec: AttachmentSpec,
    },
}

/// What a cluster begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Genesis {
    /// The cluster's id.
    pub id: ClusterId,
    /// Its certificate authority.
    pub ca: Authority,
    /// The secret parts of the join tokens.
    pub join_secrets: JoinSecrets,
    /// The unlock key, with autolock.
    pub unlock_key: Option<UnlockKey>,
    /// Seed of the flow hash.
    pub hash_seed: u64,
    /// The ingress network's id.
    pub ingress: NetworkId,
    /// What an operator can set.
    pub spec: ClusterSpec,
    /// UDP port of the overlay.
    pub data_path_port: u16,
    /// Where automatic subnets come from.
    pub address_pools: Vec<Ipv4Net>,
    /// Prefix length of automatic subnets.
    pub subnet_size: u8,
    /// Subnets that automatic ones must not overlap.
    pub avoid: Vec<Ipv4Net>,
}

/// One step of the orchestrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Makes a task of a service as it is specified at `spec_version`.
    CreateTask {
        /// Its id.
        id: TaskId,
        /// Its service.
        service: ServiceId,
        /// The specification that the orchestrator saw; the step is skipped if there is another by now.
        spec_version: u64,
        /// Its slot; 0 for a global service.
        slot: u64,
        /// Its node, for a global service.
        node: Option<NodeId>,
        /// `Running`, or `Ready` to hold it back.
        desired: TaskState,
        /// Held back until then, ns since the epoch.
        start_at_ns: u64,
        /// Held back until this task has ended.
        start_after: Option<TaskId>,
        /// When its predecessors were replaced, ns since the epoch.
        restarts_ns: Vec<u64>,
    },
    /// Moves what the managers want of a task; only ever forward.
    SetDesired {
        /// The task.
        task: TaskId,
        /// `Running`, `Shutdown` or `Remove`.
        desired: TaskState,
    },
    /// Moves a task's slow start on; only ever forward.
    Warm {
        /// The task.
        task: TaskId,
        /// How far it is, in [`crate::model::WARM`]ths.
        warmth: u8,
    },
    /// Tries again to find addresses for a task that has none.
    AllocateTask {
        /// The task.
        task: TaskId,
    },
    /// Tries again to find VIPs for a service that lacks one.
    AllocateService {
        /// The service.
        service: ServiceId,
    },
    /// Places a task.
    Assign {
        /// The task.
        task: TaskId,
        /// Its node.
        node: NodeId,
    },
    /// Notes why a task has no node.
    Unplaceable {
        /// The task.
        task: TaskId,
        /// For people.
        err: String,
    },
    /// Gives up on knowing how a task ended.
    Orphan {
        /// The task.
        task: TaskId,
    },
    /// Forgets a task that has ended.
    DeleteTask {
        /// The task.
        task: TaskId,
    },
    /// Moves a service's update on.
    SetUpdateStatus {
        /// The service.
        service: ServiceId,
        /// The specification that the orchestrator saw; the step is skipped if there is another by now.
        spec_version: u64,
        /// Where the update is.
        status: crate::model::UpdateStatus,
    },
    /// Returns a service to its previous specification, since its update failed.
    RollBack {
        /// The service.
        service: ServiceId,
        /// The specification that the orchestrator saw; the step is skipped if there is another by now.
        spec_version: u64,
        /// For people.
        message: String,
    },
}

impl Step {
    /// The task that it changes, if it changes one.
    pub fn task(&self) -> Option<&TaskId> {
        match self {
            Self::SetDesired { task, .. }
            | Self::Warm { task, .. }
            | Self::AllocateTask { task }
            | Self::Assign { task, .. }
            | Self::Unplaceable { task, .. }
            | Self::Orphan { task }
            | Self::DeleteTask { task } => Some(task),
            Self::CreateTask { .. }
            | Self::AllocateService { .. }
            | Self::SetUpdateStatus { .. }
            | Self::RollBack { .. } => None,
        }
    }
}
