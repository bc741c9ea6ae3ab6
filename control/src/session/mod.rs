//! The agents' sessions: one listener, one session a node.
//!
//! A session works over any stream; TLS goes between the listener and [`Server::handle`].

mod handshake;
mod liveness;
mod peer;
mod registry;
#[cfg(test)]
mod tests;
pub mod view;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_api::codec::CodecError;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::cluster::Cluster;
use registry::Registry;

/// How long a peer has for its first message.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Peers that have not proved themselves yet.
const HANDSHAKES_MAX: usize = 256;
/// Nodes with a session.
const SESSIONS_MAX: usize = 4096;
/// How long to wait when the system can't accept, say for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    /// Too many peers.
    #[error("there are too many sessions")]
    Busy,
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
    registry: Mutex<Registry>,
    settled: watch::Sender<u64>,
    handshakes: Semaphore,
    sessions: Semaphore,
}

impl Server {
    /// A server for `cluster`'s nodes.
    pub fn new(cluster: Cluster) -> Arc<Self> {
        Arc::new(Self {
            cluster,
            registry: Mutex::new(Registry::new()),
            settled: watch::Sender::new(0),
            handshakes: Semaphore::new(HANDSHAKES_MAX),
            sessions: Semaphore::new(SESSIONS_MAX),
        })
    }

    /// Accepts agents and watches their lives, until dropped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut sessions = JoinSet::new();
        let liveness = Arc::clone(&self).watch_liveness();
        tokio::pin!(liveness);
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        let _ = stream.set_nodelay(true);
                        let server = Arc::clone(&self);
                        sessions.spawn(async move {
                            if let Err(error) = server.handle(stream).await {
                                tracing::debug!(%peer, %error, "a session ended");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "no connection can be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = sessions.join_next() => {}
                () = &mut liveness => return,
            }
        }
    }

    /// Serves one agent over `stream`, to the end of its session.
    pub async fn handle<S>(self: Arc<Self>, stream: S) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        peer::serve(&self, stream).await
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        // Its methods change plain values; a panic in one can't leave anything that matters half done.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
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
