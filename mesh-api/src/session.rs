//! The session between an agent and a manager: one stream, framed by [`crate::codec`], opened by the agent; and the
//! exchanges by which a host becomes a node, and by which a node comes back whose certificate has expired.
//!
//! ```text
//! host    -> JoinRequest              manager -> JoinAnswer (and the stream ends)
//! node    -> ReadmitRequest           manager -> ReadmitAnswer (and the stream ends)
//!
//! agent   -> Resume                   manager -> Resumed | Moved | Refused (after which the stream ends)
//!                                     manager -> Snapshot unless a Delta will do, then Delta for every change
//! agent   -> Applied, Tasks,          manager -> Settled, Trust, Alive
//!            Described, Health, Alive
//! agent   -> Attach                   manager -> Attached
//!                                     manager -> Renew
//! agent   -> Renew                    manager -> Certificate
//! agent   -> Renewed
//! ```
//!
//! The streams are TLS ([`crate::tls`]): who speaks is known by the certificate, and is not said.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::IpNet;
use serde::ser::Error as _;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::health::NodeHealth;
use crate::id::{ClusterId, NodeId, TaskId};
use crate::table::{Delta, Role, Table, TaskState};
use crate::wireguard::WireguardIdentity;

/// Version of this protocol; a manager refuses another.
pub const PROTOCOL_VERSION: u32 = 4;

/// The default port of managers.
pub const DEFAULT_PORT: u16 = 2377;

/// How often an agent sends `Alive`, and after how long a silence managers give up on it: Docker's 5 s, three times.
pub const HEARTBEAT_PERIOD_MS: u64 = 5_000;
/// See [`HEARTBEAT_PERIOD_MS`].
pub const SESSION_TIMEOUT_MS: u64 = 3 * HEARTBEAT_PERIOD_MS;

/// How often a manager sends `Alive`, and after how long a silence an agent looks for another manager: sooner than the
/// managers give up on a node, since that moves tasks and this moves nothing.
pub const MANAGER_HEARTBEAT_PERIOD_MS: u64 = 500;
/// See [`MANAGER_HEARTBEAT_PERIOD_MS`].
pub const MANAGER_TIMEOUT_MS: u64 = 1_800;

/// Most routes that a node describes itself with.
pub const ROUTES_MAX: usize = 1024;

/// Most addresses that a node describes itself with.
pub const ADDRESSES_MAX: usize = 1024;

/// What an agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum AgentMessage {
    /// The first message.
    Resume {
        /// [`PROTOCOL_VERSION`].
        protocol: u32,
        /// The host as it is today.
        node: NodeDescription,
        /// The index of the table that it has; 0 where it has lost that, `None` where it has never had one. A manager that
        /// knows what changed since goes on from there.
        index: Option<u64>,
    },
    /// The dataplane holds the table at this index.
    Applied {
        /// The table index.
        index: u64,
    },
    /// States of this node's tasks that changed.
    Tasks {
        /// The states.
        statuses: Vec<TaskStatus>,
    },
    /// The host is not as it was described last.
    Described {
        /// The host as it is now.
        node: NodeDescription,
    },
    /// How the node is, at the beginning and when that has changed; at most one a second. Decides nothing.
    Health {
        /// How it is.
        health: NodeHealth,
    },
    /// What runs on this node already, a process or a namespace, is to get an endpoint on a network. A manager of a version
    /// that has no attachments ends the session at it.
    Attach {
        /// The id that its task is to have.
        id: TaskId,
        /// What is asked for.
        spec: AttachmentSpec,
    },
    /// Asks for another certificate.
    Renew {
        /// The request for the node's next key, PEM.
        csr: String,
    },
    /// The certificate from [`ManagerMessage::Certificate`] is kept: it outlives a loss of power.
    Renewed,
    /// A sign of life.
    Alive,
    /// The node leaves the cluster for good.
    Leave,
}

/// What a manager says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum ManagerMessage {
    /// Answer to `Resume`.
    Resumed {
        /// The cluster.
        cluster_id: ClusterId,
        /// The node's role.
        role: Role,
        /// The roots to trust, PEM.
        roots: String,
    },
    /// Sessions are the leader's: this manager is none, or is none any longer. The stream ends.
    Moved {
        /// The leader, where this manager knows of one.
        leader: Option<SocketAddr>,
    },
    /// The session is refused, or the node was removed; the stream ends.
    Refused {
        /// Why.
        reason: RefusalReason,
        /// For people: what is wrong and what to do.
        message: String,
    },
    /// The whole table, in place of any that the agent has, whatever the index of that.
    Snapshot {
        /// The table.
        table: Box<Table>,
    },
    /// A change of the table: of the one that `Resume` told of, or of the last that was sent.
    Delta {
        /// The changes.
        delta: Delta,
    },
    /// Every live node has applied the table up to this index: no node sends new flows by an older one.
    Settled {
        /// The table index.
        index: u64,
    },
    /// Answer to `Attach`: a task of that id is in the table, or why not. Agents that don't ask never get it.
    Attached {
        /// The id asked for.
        id: TaskId,
        /// Why there is no such task; `None` if there is.
        refused: Option<AttachRefused>,
    },
    /// The node is to ask for another certificate, because those of the present one's issuer are on their way out.
    Renew,
    /// Answer to `Renew`.
    Certificate {
        /// The certificate chain, PEM, the node's own first.
        chain: String,
        /// The roots to trust, PEM.
        roots: String,
    },
    /// The roots to trust are others.
    Trust {
        /// PEM.
        roots: String,
    },
    /// A sign of life.
    Alive,
}

/// A [`Delta`] whose changes are encoded already, for any number of nodes.
#[derive(Debug, Clone)]
pub struct EncodedDelta<'a> {
    head: String,
    changes: Vec<&'a RawValue>,
    tail: String,
}

impl<'a> EncodedDelta<'a> {
    /// What leads from one table index to another. Of `changes`, each part of the table has one at most.
    pub fn new(from: u64, to: u64, changes: Vec<&'a RawValue>) -> serde_json::Result<Self> {
        let bare = ManagerMessage::Delta { delta: Delta { from, to, changes: Vec::new() } };
        let bare = serde_json::to_string(&bare)?;
        let (head, tail) =
            bare.split_once("[]").ok_or_else(|| serde_json::Error::custom("a delta has no changes"))?;
        Ok(Self { head: format!("{head}["), changes, tail: format!("]{tail}") })
    }

    /// The pieces of the [`ManagerMessage::Delta`] that it is.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> + Clone {
        let separators = std::iter::once("").chain(std::iter::repeat(","));
        let changes = separators.zip(&self.changes).flat_map(|(separator, change)| [separator, change.get()]);
        let (head, tail) = (self.head.as_str(), self.tail.as_str());
        std::iter::once(head).chain(changes).chain([tail]).map(str::as_bytes)
    }
}

/// The one message of a host that is to become a node.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The join token, `SWMTKN-1-…`.
    pub token: String,
    /// The request for its certificate, PEM.
    pub csr: String,
    /// The host.
    pub node: NodeDescription,
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, token: _, csr: _, node } = self;
        f.debug_struct("JoinRequest").field("protocol", protocol).field("node", node).finish_non_exhaustive()
    }
}

/// What a manager answers to a [`JoinRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum JoinAnswer {
    /// The host is a node.
    Joined {
        /// The cluster.
        cluster_id: ClusterId,
        /// The node's id.
        node_id: NodeId,
        /// Its role, from the token it joined with.
        role: Role,
        /// Its certificate chain, PEM, its own first.
        chain: String,
        /// The roots to trust, PEM.
        roots: String,
    },
    /// It is not.
    Refused {
        /// Why, for programs.
        reason: RefusalReason,
        /// For people: what is wrong and what to do.
        message: String,
    },
}

/// The one message of a node whose certificate has expired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadmitRequest {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The node's certificate chain, PEM: it says which node asks.
    pub chain: String,
    /// The request for its next certificate, PEM.
    pub csr: String,
    /// That the node has the chain's key: a signature over this connection and the request
    /// ([`crate::tls::Identity::prove`]).
    pub proof: Vec<u8>,
}

/// What a manager answers to a [`ReadmitRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum ReadmitAnswer {
    /// The node can open its session again.
    Readmitted {
        /// Its certificate chain, PEM, its own first.
        chain: String,
        /// The roots to trust, PEM.
        roots: String,
    },
    /// It can't, for the moment or for good.
    Refused {
        /// Why, for programs.
        reason: RefusalReason,
        /// For people: what is wrong and what to do.
        message: String,
    },
}

/// What is asked for an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentSpec {
    /// The network, by its id or its name.
    pub network: String,
    /// Its name in the network, which no service and no other attachment has there.
    pub name: String,
    /// Further names, which it may share.
    pub aliases: Vec<String>,
    /// The IPv4 address that it is to have; `None` for any.
    pub addr: Option<Ipv4Addr>,
}

/// Why an attachment is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct AttachRefused {
    /// For programs.
    pub reason: AttachRefusedReason,
    /// For people: which field is wrong, and what to do.
    pub message: String,
}

/// Why an attachment is refused, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachRefusedReason {
    /// There is no such network.
    NotFound,
    /// Another has the name or the address.
    Conflict,
    /// A field can't be what it is.
    Invalid,
}

/// Why a session is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalReason {
    /// The join token is not this cluster's, was rotated, or is used up or expired.
    InvalidToken,
    /// The node is not in the cluster (any more).
    UnknownNode,
    /// The node's certificate is not valid any more, or can't be made.
    Certificate,
    /// The node's certificate has expired, and no operator has approved that it comes back.
    Unapproved,
    /// The two speak different versions.
    Protocol,
    /// The host's description can't be accepted (its message says which field).
    Invalid,
    /// The manager can't serve now; try another, or again.
    Unavailable,
}

/// A host, as it describes itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDescription {
    /// Host name.
    pub hostname: String,
    /// The address it advertises to the others.
    pub addr: IpAddr,
    /// Its VXLAN address (`--data-path-addr`, otherwise `addr`).
    pub vtep: IpAddr,
    /// `linux`.
    pub os: String,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// CPUs in 1e-9 units, as Docker counts them.
    pub nano_cpus: u64,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Version of Shoal.
    pub version: String,
    /// Engine labels, `key=value`.
    pub labels: Vec<(String, String)>,
    /// How the dataplane is attached to each uplink, for `docker node inspect`: `eth0=xdp-native`, several separated by
    /// commas; the mode is `xdp-native`, `xdp-generic` or `tc`.
    pub dataplane: String,
    /// The subnets that its own routes lead to, at most [`ROUTES_MAX`]: networks are kept apart from them. Default routes,
    /// and those of Shoal's own devices, are not among them.
    #[serde(default)]
    pub routes: Vec<IpNet>,
    /// What others reach it by inside of WireGuard, at most [`crate::wireguard::WIREGUARD_IDENTITIES_MAX`]; they send to the
    /// first, and take what comes from either. Empty: it has no encrypted way, and gets no task on an encrypted network.
    #[serde(default)]
    pub wireguard: Vec<WireguardIdentity>,
    /// The addresses on its interfaces that tasks could send under, at most [`ADDRESSES_MAX`]: all but those of the loopback's
    /// own range, of a link alone, and of Shoal's own devices. It gets tasks with fixed egress addresses by these.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Its manager, where one runs.
    #[serde(default)]
    pub manager: Option<ManagerDescription>,
}

/// A manager that runs on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManagerDescription {
    /// Its id in raft; another one each time that the host becomes a manager.
    pub raft: u64,
    /// Where other managers and agents dial it.
    pub addr: SocketAddr,
}

/// What a node reports of one of its tasks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStatus {
    /// The task.
    pub task: TaskId,
    /// Its state.
    pub state: TaskState,
    /// When it entered the state, ns since the epoch.
    pub since_ns: u64,
    /// For people: what happens (`started`).
    pub message: String,
    /// For people: what went wrong; empty if nothing.
    pub err: String,
    /// The process id on its node, while it runs.
    pub pid: Option<u32>,
    /// The exit code, once it has ended: 128 + signal for a signal, as shells count.
    pub exit_code: Option<i32>,
}
