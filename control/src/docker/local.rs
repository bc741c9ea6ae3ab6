//! The host that the API speaks for, as the API sees it: the product implements it over the agent and the
//! cluster, tests over nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use futures::future::BoxFuture;
use ipnet::{IpNet, Ipv4Net};
use mesh_api::attachment::{AttachRequest, Attachment};
use mesh_api::id::{ClusterId, NodeId};
use mesh_api::seal::UnlockKey;
use mesh_api::table::{Role, Table};
use mesh_api::token::JoinToken;
use serde::{Deserialize, Serialize};

use crate::backup::Backup;
use crate::cluster::Cluster;
use crate::model::Availability;

/// The local host: a node of a cluster, or none yet.
pub trait LocalNode: Send + Sync + 'static {
    /// The host's place in a cluster.
    fn membership(&self) -> Membership;
    /// What `docker info` and `docker version` say about the host.
    fn facts(&self) -> HostFacts;
    /// The host's interfaces with their addresses, loopback and devices of Shoal's own left out.
    fn interfaces(&self) -> Vec<Interface>;
    /// The cluster, if the host is a manager.
    fn cluster(&self) -> Option<Cluster>;
    /// The last table, if the host is a node.
    fn table(&self) -> Option<Arc<Table>>;
    /// Makes a cluster with this host as its manager.
    fn swarm_init(&self, request: InitRequest) -> BoxFuture<'_, Result<NodeId, SwarmError>>;
    /// Makes the host a node of a cluster.
    fn swarm_join(&self, request: JoinRequest) -> BoxFuture<'_, Result<NodeId, SwarmError>>;
    /// Goes on with what this manager has on its disk as the only one: more than half of the managers are lost.
    fn force_new_cluster(&self) -> BoxFuture<'_, Result<NodeId, SwarmError>>;
    /// Unlocks the host's manager, which was started locked.
    fn swarm_unlock(&self, key: UnlockKey) -> BoxFuture<'_, Result<(), SwarmError>>;
    /// Makes this host the only manager of the cluster of a backup.
    fn restore(&self, request: RestoreRequest) -> BoxFuture<'_, Result<RestoredSwarm, RestoreError>>;
    /// Leaves the cluster; a manager only if `force`.
    fn swarm_leave(&self, force: bool) -> BoxFuture<'_, Result<(), SwarmError>>;
    /// What is attached on this host without being a task.
    fn attachments(&self) -> Result<Vec<Attachment>, AttachError>;
    /// The attachment of an id, the beginning of one, or a name.
    fn attachment(&self, wanted: &str) -> Result<Attachment, AttachError>;
    /// Attaches what runs on this host to a network.
    fn attach(&self, request: AttachRequest) -> BoxFuture<'_, Result<Attachment, AttachError>>;
    /// Ends the attachment of an id, the beginning of one, or a name.
    fn detach(&self, wanted: String) -> BoxFuture<'_, Result<(), AttachError>>;
}

/// Why something was not attached, or its attachment not ended. Texts of what is wrong with a request name the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// A field can't be what it is.
    #[error("{0}")]
    Invalid(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It is another's.
    #[error("{0}")]
    Conflict(String),
    /// Not on this host, or not now.
    #[error("{0}")]
    Unavailable(String),
    /// Something failed underneath.
    #[error("{0}")]
    Host(String),
}

/// The host's place in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Membership {
    /// Not in a cluster.
    Inactive,
    /// A node.
    Active {
        /// The node's id.
        node: NodeId,
        /// Manager or worker.
        role: Role,
        /// The address that it advertises.
        addr: IpAddr,
        /// The managers that it knows.
        managers: Vec<SocketAddr>,
    },
    /// A manager that was started locked: its tasks and its dataplane go on, and it takes no part in the cluster.
    Locked {
        /// The node's id.
        node: NodeId,
        /// The address that it advertises.
        addr: IpAddr,
    },
}

/// What `docker info` and `docker version` say about the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// An id of this installation, that lasts.
    pub id: String,
    /// Host name.
    pub hostname: String,
    /// Version of Shoal.
    pub version: String,
    /// Git commit that it was built from; empty where not known.
    pub git_commit: String,
    /// The kernel's release.
    pub kernel: String,
    /// The distribution's name.
    pub os: String,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// CPUs.
    pub cpus: u64,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Where the state is kept.
    pub state_dir: String,
    /// How the dataplane is attached.
    pub dataplane: String,
}

/// An interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// It is up.
    pub up: bool,
    /// Its addresses with their prefixes, of both families.
    pub addrs: Vec<IpNet>,
}

/// `docker swarm init`, its addresses resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitRequest {
    /// Where the manager listens.
    pub listen: SocketAddr,
    /// The node's address for the others.
    pub advertise: IpAddr,
    /// The port that managers are dialled on.
    pub advertise_port: u16,
    /// The node's VXLAN address.
    pub data_path: IpAddr,
    /// UDP port of the overlay.
    pub data_path_port: u16,
    /// Where automatic subnets come from; never empty.
    pub address_pools: Vec<Ipv4Net>,
    /// Prefix length of automatic subnets.
    pub subnet_size: u8,
    /// The cluster's labels.
    pub labels: BTreeMap<String, String>,
    /// Ended tasks kept per slot; `None` for the default.
    pub task_history: Option<u64>,
    /// Life of node certificates, ns; `None` for the default.
    pub cert_expiry_ns: Option<u64>,
    /// Whether managers that start are to be unlocked.
    pub autolock: bool,
    /// Whether the node gets tasks.
    pub availability: Availability,
}

/// `docker swarm join`, its addresses resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinRequest {
    /// The managers to dial, in order; never empty.
    pub remotes: Vec<SocketAddr>,
    /// The join token.
    pub token: JoinToken,
    /// Where it listens once it is a manager; `None` for the default port at all addresses.
    pub listen: Option<SocketAddr>,
    /// The node's address for the others; `None` to take the one that the route to the manager leaves by.
    pub advertise: Option<IpAddr>,
    /// The node's VXLAN address; `None` for the advertised one.
    pub data_path: Option<IpAddr>,
    /// Whether the node gets tasks.
    pub availability: Availability,
}

/// `shoal restore`, its addresses resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreRequest {
    /// The backup.
    pub backup: Box<Backup>,
    /// Where the manager listens.
    pub listen: SocketAddr,
    /// The node's address for the others.
    pub advertise: IpAddr,
    /// The port that managers are dialled on.
    pub advertise_port: u16,
    /// The node's VXLAN address; `None` for the one that it has as a node, or else the advertised one.
    pub data_path: Option<IpAddr>,
    /// Even if the swarm seems to live.
    pub force: bool,
}

/// A swarm that was restored: what `POST /shoal/v1/restore` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RestoredSwarm {
    /// Its id.
    #[serde(rename = "ID")]
    pub cluster: ClusterId,
    /// This host's id.
    #[serde(rename = "NodeID")]
    pub node: NodeId,
    /// The table index that it goes on from.
    pub index: u64,
    /// Where this manager is dialled.
    pub advertise: SocketAddr,
    /// Host names of the nodes that were managers, and are workers.
    pub demoted: Vec<String>,
    /// Host names of the nodes that had this host's address, and are removed.
    pub replaced: Vec<String>,
    /// Where the nodes look for managers, by what they knew when the backup was taken.
    #[serde(rename = "KnownManagers")]
    pub known: Vec<SocketAddr>,
}

/// Why a swarm was not restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The host is a manager.
    #[error(
        "this host is a manager, and has a swarm's state. To go on with that as the only manager: `docker swarm init \
         --force-new-cluster`. To go back to the backup: `docker swarm leave --force` here, and then restore again"
    )]
    Manager,
    /// The host is a node of another.
    #[error(
        "this host is a node of another swarm ({own}) than the backup's ({backup}): leave it first (`docker swarm leave`)"
    )]
    OtherSwarm {
        /// The swarm that it is of.
        own: ClusterId,
        /// The backup's.
        backup: ClusterId,
    },
    /// Some of it is not lost.
    #[error(
        "{0}. A swarm that is restored while the former one lives is there twice: stop the agents of its managers first, or give \
         --force if no node can reach them"
    )]
    Alive(String),
    /// The host does not fit the swarm.
    #[error("{0}")]
    Unfit(String),
    /// It did not become a manager.
    #[error(transparent)]
    Swarm(#[from] SwarmError),
}

/// Why the host did not become a node, or did not leave.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SwarmError {
    /// It is in a cluster already.
    #[error(
        "This node is already part of a swarm. Use \"docker swarm leave\" to leave this swarm and join another one."
    )]
    AlreadyInSwarm,
    /// It is in none.
    #[error("This node is not part of a swarm")]
    NotInSwarm,
    /// It is a manager, and was not told to force it; the text says what the others lose.
    #[error("You are attempting to leave the swarm on a node that is participating as a manager. {0}")]
    ManagerLeaves(String),
    /// It is none.
    #[error(
        "This node is not a swarm manager: --force-new-cluster goes on with the state that a manager has on its disk"
    )]
    NotManager,
    /// It is a manager that is locked.
    #[error(
        "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"docker swarm unlock\" to unlock it."
    )]
    Locked,
    /// It is a locked manager, and was not told to force its leaving.
    #[error("Swarm is encrypted and locked. Please unlock it first or use `--force` to ignore this message.")]
    LockedLeaves,
    /// It is not locked.
    #[error("swarm is not locked")]
    NotLocked,
    /// The unlock key is another.
    #[error("swarm could not be unlocked: invalid key provided")]
    InvalidUnlockKey,
    /// The token is not the cluster's.
    #[error("invalid join token: {0}")]
    InvalidToken(String),
    /// The manager refuses the host.
    #[error("the manager at {manager} refused this node: {message}")]
    Refused {
        /// The manager.
        manager: String,
        /// What it says.
        message: String,
    },
    /// No manager answers.
    #[error(
        "Timeout was reached before node joined: no manager answers at {remotes} ({cause}). Check the address, and that \
             port 2377/tcp is open on the way"
    )]
    Unreachable {
        /// The managers that were dialled.
        remotes: String,
        /// What happened to the last attempt.
        cause: String,
    },
    /// The address is not this host's.
    #[error("can't listen on {listen}: {cause}. Choose an address of this host with --listen-addr")]
    Listen {
        /// Where.
        listen: SocketAddr,
        /// Why not.
        cause: String,
    },
    /// Something failed underneath: dataplane, state directory.
    #[error("{0}")]
    Host(String),
}
