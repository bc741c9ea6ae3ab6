//! The managers as raft members: one log of commands, agreed on by a majority, and the state that it leads to on each.
//!
//! Everything of openraft stays in here. [`Replica`] is a running member; [`message`] is what members say to each other,
//! over a [`Transport`] that knows nothing of raft; [`log`] and [`machine`] are what a member keeps.
//!
//! The table index is raft's log index. It jumps: blank entries, changes of the membership and commands that change nothing
//! have indexes too, and the commands of one batch share theirs. A cluster that is forced anew or restored goes on far above
//! the indices that its former managers may have given out, so that each is one state's for good.

pub mod answers;
pub mod force;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
pub mod history;
pub mod leadership;
mod lock;
pub mod log;
pub mod machine;
pub mod members;
pub mod message;
mod network;
pub mod offline;
pub mod propose;
pub mod replica;
mod reports;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_api::id::NodeId;
use serde::{Deserialize, Serialize};

pub use answers::Answer;
pub use history::{History, Moment, Next};
pub use leadership::Leadership;
pub use members::{Member, MembersError};
pub use message::{Call, Calling, Isolated, Request, Response, Transport, TransportError};
pub use replica::{Replica, ReplicaError, Storage};
pub use reports::Reporter;

use crate::command::Command;

/// A member's id in raft: random, and another for each time that a host becomes a manager.
pub type RaftId = u64;

/// A manager, as the others reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manager {
    /// The node.
    pub node: NodeId,
    /// Where it listens for managers.
    pub addr: SocketAddr,
}

impl Default for Manager {
    /// No manager; openraft asks for it where it fills gaps in a membership of its own making.
    fn default() -> Self {
        Self { node: NodeId::from(""), addr: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0) }
    }
}

/// Commands that are decided on together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Who proposes: a number that a member draws when it starts.
    pub proposer: u64,
    /// Counts the proposer's batches. The same batch, sent again, has the same number, and takes effect once.
    pub number: u64,
    /// The commands, in order.
    pub commands: Vec<Command>,
}

openraft::declare_raft_types!(
    /// openraft's parameters.
    pub TypeConfig:
        D = Batch,
        R = Answer,
        NodeId = RaftId,
        Node = Manager,
        SnapshotData = std::io::Cursor<Vec<u8>>,
);

pub(crate) type Raft = openraft::Raft<TypeConfig>;
pub(crate) type Entry = openraft::Entry<TypeConfig>;
pub(crate) type LogId = openraft::LogId<RaftId>;
pub(crate) type Vote = openraft::Vote<RaftId>;
pub(crate) type Membership = openraft::StoredMembership<RaftId, Manager>;
pub(crate) type Metrics = openraft::RaftMetrics<RaftId, Manager>;

/// How a member keeps time, and how much of the log it keeps.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Between a leader's heartbeats.
    pub heartbeat: Duration,
    /// A follower refuses votes for this long after it heard of the leader, and stands for election after twice as long. Each
    /// member has its own, so that they don't all stand at once.
    pub election: Duration,
    /// Entries between snapshots.
    pub snapshot_every: u64,
    /// Entries that stay in the log beside a snapshot that has them, for members that lag a little.
    pub keep: u64,
}

/// The shortest and longest [`Settings::election`]: a leader that dies is followed by another within about a second.
pub const ELECTION_MS: std::ops::Range<u64> = 250..450;
const HEARTBEAT: Duration = Duration::from_millis(100);
pub(crate) const SNAPSHOT_EVERY: u64 = 1000;
const KEEP: u64 = 1000;
/// Entries removed from the log at once.
const PURGE_BATCH: u64 = 256;
/// Bytes of a snapshot sent at once; JSON makes up to four times of it.
const SNAPSHOT_CHUNK_BYTES: u64 = 1 << 20;
/// How long sending one such piece and taking it may take, ms.
const SNAPSHOT_CHUNK_TIMEOUT_MS: u64 = 10_000;
/// Entries sent at once; [`log`] bounds their bytes.
const APPEND_ENTRIES_MAX: u64 = 256;

impl Settings {
    /// The product's, with an election timeout drawn from `rng`.
    pub fn product(rng: &mut impl rand::Rng) -> Self {
        use rand::RngExt as _;
        let election = Duration::from_millis(rng.random_range(ELECTION_MS));
        Self { heartbeat: HEARTBEAT, election, snapshot_every: SNAPSHOT_EVERY, keep: KEEP }
    }

    fn config(self) -> openraft::Config {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        openraft::Config {
            cluster_name: "shoal".to_owned(),
            heartbeat_interval: ms(self.heartbeat),
            election_timeout_min: ms(self.election),
            election_timeout_max: ms(self.election) + 1,
            install_snapshot_timeout: SNAPSHOT_CHUNK_TIMEOUT_MS,
            max_payload_entries: APPEND_ENTRIES_MAX,
            replication_lag_threshold: self.snapshot_every.saturating_mul(5),
            snapshot_policy: openraft::SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            snapshot_max_chunk_size: SNAPSHOT_CHUNK_BYTES,
            max_in_snapshot_log_to_keep: self.keep,
            purge_batch_size: PURGE_BATCH.min(self.snapshot_every),
            ..openraft::Config::default()
        }
    }
}
