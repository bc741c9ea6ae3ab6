//! The agents' sessions, and the port that agents and managers come by.
//!
//! A session works over any stream, with the [`Peer`] that a [`Listener`] found its certificate to be of.

mod exchange;
mod feed;
mod handshake;
mod health;
mod join;
mod journal;
mod listener;
mod liveness;
mod peer;
mod readmit;
mod refusals;
mod registry;
mod slots;
#[cfg(test)]
mod tests;
mod trust;
pub mod view;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_api::codec::CodecError;
use mesh_api::health::NodeHealth;
use mesh_api::id::NodeId;
use mesh_api::tls::Peer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};

pub use health::{NodeReport, Report, SessionReport};
pub(crate) use journal::{Journal, Part};
pub use listener::{Listener, RaftHandler, Stream};
pub use refusals::Cause;

use crate::cluster::Cluster;
use crate::model::State;
use crate::raft::Reporter;
use feed::Feed;
use refusals::Refusals;
use registry::Registry;
use slots::Slots;

/// How long a peer has for the handshake and its first message.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Peers that have not said yet what they want.
const HANDSHAKES_MAX: usize = 256;
/// Hosts whose tokens this manager does not know, and asks the leader of.
const ASKING_MAX: usize = 32;
/// Nodes with a session.
const SESSIONS_MAX: usize = 4096;
/// Tables, or much of them, on their way at once: one of 20,000 tasks takes some 6 MB of memory until its node has taken it.
const TABLES_MAX: usize = 16;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The stream or a frame failed.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The peer was silent, or took nothing, for too long.
    #[error("the peer does not answer")]
    Timeout,
    /// The peer was turned away.
    #[error("the peer was refused: {0}")]
    Refused(String),
    /// The peer said something out of order.
    #[error("the peer opened a session within a session")]
    OutOfOrder,
    /// The peer was turned away without a word.
    #[error("the peer was turned away: {}", .0.name())]
    TurnedAway(Cause),
    /// Sessions are another manager's.
    #[error("this manager does not lead")]
    NotLeader,
    /// The node has opened another session.
    #[error("another session of the node took this one's place")]
    Replaced,
    /// The manager is shutting down, or its store failed.
    #[error("the manager can't serve")]
    Stopped,
}

/// Serves agents' sessions.
#[derive(Debug)]
pub struct Server {
    cluster: Cluster,
    /// Sessions are this manager's.
    leads: watch::Sender<bool>,
    registry: Mutex<Registry>,
    feed: Mutex<Feed>,
    /// How the nodes are, as they said last.
    health: Mutex<BTreeMap<NodeId, NodeHealth>>,
    settled: watch::Sender<u64>,
    slots: Arc<Slots>,
    sessions: Semaphore,
    tables: Semaphore,
    asking: Semaphore,
    refusals: Refusals,
}

impl Server {
    /// A server for `cluster`'s nodes, which sends them to the leader until it is told to [`Server::lead`].
    pub fn new(cluster: Cluster) -> Arc<Self> {
        let server = Arc::new(Self {
            cluster,
            leads: watch::Sender::new(false),
            registry: Mutex::new(Registry::new()),
            feed: Mutex::new(Feed::new(State::empty())),
            health: Mutex::default(),
            settled: watch::Sender::new(0),
            slots: Slots::new(HANDSHAKES_MAX, HANDSHAKE_TIMEOUT),
            sessions: Semaphore::new(SESSIONS_MAX),
            tables: Semaphore::new(TABLES_MAX),
            asking: Semaphore::new(ASKING_MAX),
            refusals: Refusals::default(),
        });
        let own = Arc::downgrade(&server);
        server.cluster.report_by(Reporter::new(move || Some(own.upgrade()?.report())));
        server
    }

    /// Serves the session of the agent that is `peer` over `stream`, to its end.
    pub async fn handle<S>(self: Arc<Self>, stream: S, peer: Peer) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let slot = self.slots.take(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        peer::serve(&self, stream, peer, slot).await
    }

    /// From here on, sessions are this manager's: it knows nothing of the nodes yet.
    pub(crate) fn lead(&self) {
        *self.registry() = Registry::new();
        *self.feed() = Feed::new(self.cluster.state());
        self.health().clear();
        self.leads.send_replace(true);
    }

    /// Sessions are another manager's: those under way end.
    pub(crate) fn resign(&self) {
        self.leads.send_replace(false);
    }

    /// Where the leader listens, if there is another than this manager.
    fn leader(&self) -> Option<SocketAddr> {
        let leadership = self.cluster.leadership();
        let leader = leadership.borrow().leader.clone();
        leader.filter(|(id, _)| *id != self.cluster.raft_id()).map(|(_, manager)| manager.addr)
    }

    /// How many peers were turned away.
    fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// Counts a peer that is turned away without a word.
    fn turn_away(&self, cause: Cause) -> SessionError {
        self.refusals.count(cause);
        SessionError::TurnedAway(cause)
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        // Its methods change plain values; a panic in one can't leave anything that matters half done.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self) -> MutexGuard<'_, Feed> {
        // A panic can come from encoding alone, before anything is changed.
        self.feed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> MutexGuard<'_, BTreeMap<NodeId, NodeHealth>> {
        // Single insertions and removals; a panic can't leave one half done.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the sessions how far all are.
    fn settle(&self) {
        let settled = self.registry().settled(&self.cluster.state());
        self.settled.send_if_modified(|known| {
            let grown = settled > *known;
            *known = settled.max(*known);
            grown
        });
    }
}
