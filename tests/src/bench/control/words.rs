//! What the benchmark and its processes say to each other: JSON, a line each, by argument, standard input and output.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use mesh_api::id::NodeId;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::load::Load;

/// How much is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scale {
    /// A folder for the managers' stores, which is there.
    pub dir: PathBuf,
    /// Managers.
    pub managers: u32,
    /// Agents, each a node.
    pub agents: u32,
    /// Services; every fourth publishes a port.
    pub services: u32,
    /// Tasks, spread over the services.
    pub tasks: u32,
    /// Changes of a service, one after another.
    pub changes: u32,
}

/// What a manager's process is started with.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ManagerStart {
    /// Where its state is to be.
    pub(super) dir: PathBuf,
    pub(super) number: u32,
    pub(super) begin: Begin,
}

/// How a manager begins.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Begin {
    /// It makes the cluster.
    Found,
    /// It joins the cluster of another, with a token for managers.
    Join { remote: SocketAddr, token: String },
    /// It was there before.
    Return,
}

/// What an agent's process is started with.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct AgentStart {
    /// Where its state is to be.
    pub(super) dir: PathBuf,
    pub(super) number: u32,
    pub(super) remotes: Vec<SocketAddr>,
    /// For workers.
    pub(super) token: String,
}

/// What a manager is told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Order {
    /// Make those of the services, and the networks before the first.
    Fill { numbers: Range<u32>, load: Load },
    /// Publish another port of a service.
    Change { service: u32 },
    /// A node that joined as a manager is reached there, and gets no tasks.
    Admit { node: NodeId, raft: u64, addr: SocketAddr },
    /// Say how the cluster stands.
    Look,
}

/// What a manager answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Answer {
    Ready(Ready),
    Done(Done),
    Stands(Stands),
}

/// A manager serves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Ready {
    pub(super) node: NodeId,
    pub(super) raft: u64,
    pub(super) addr: SocketAddr,
    pub(super) worker_token: String,
    pub(super) manager_token: String,
}

/// Commands are in effect.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Done {
    /// When the first was proposed, ns of the clock [`now_ns`].
    pub(super) proposed_ns: u64,
    /// When the last was answered.
    pub(super) answered_ns: u64,
    /// The table index at which they are in effect.
    pub(super) index: u64,
}

/// How the cluster stands, as a manager knows it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Stands {
    /// The table index.
    pub(super) index: u64,
    /// Tasks that run.
    pub(super) running: u32,
    /// Nodes that the managers hear from.
    pub(super) ready: u32,
    /// Nodes that they have given up.
    pub(super) down: u32,
    /// Managers that decide.
    pub(super) voters: u32,
    /// Whether this one leads.
    pub(super) leads: bool,
}

/// What an agent tells.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Told {
    pub(super) agent: u32,
    /// When it happened, ns of the clock [`now_ns`].
    pub(super) at_ns: u64,
    pub(super) news: News,
}

/// What happened at an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum News {
    /// Its maps hold the table of that index; what that took.
    Applied { index: u64, took_ns: u64 },
    /// All live nodes' maps do, as the managers say.
    Settled { index: u64 },
    /// It has a session.
    Connected,
    /// It has none.
    Disconnected,
}

/// The time, ns, of a clock that all processes of this machine share.
pub(super) fn now_ns() -> Result<u64> {
    Ok(u64::try_from(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos())?)
}
