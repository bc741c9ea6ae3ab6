//! The port that managers listen on: TLS first, and then what the peer came for, as it says by ALPN.
//!
//! Who the peer is, its certificate says; whether that still holds, the replicated list of nodes: a node that was
//! removed is refused with its next connection, whatever its certificate says.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use mesh_api::table::Role;
use mesh_api::tls::{Alpn, Binding, Credential, Peer, Roots, Shared, peer_of, server_config, tls_error};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{self, ServerConfig};

use super::refusals::Cause;
use super::{Server, SessionError, join, peer, readmit};
use crate::model::ClusterObject;
use crate::patient::Patient;

/// How long to wait when the system can't accept, say for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Streams of other managers: each keeps a few, and opens more while it asks several things at once.
pub(super) const RAFT_STREAMS_MAX: usize = 256;
/// How long another manager may ask nothing on a stream, or take nothing of an answer; it opens another when it needs one.
const RAFT_SILENCE_MAX: Duration = Duration::from_mins(1);

/// A stream of either kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Serves the streams of other managers, each to its end.
pub type RaftHandler = Arc<dyn Fn(Box<dyn Stream>, Peer) -> BoxFuture<'static, ()> + Send + Sync>;

/// The manager's port.
pub struct Listener {
    server: Arc<Server>,
    credential: Shared,
    raft: Option<RaftHandler>,
    raft_streams: Semaphore,
    config: Mutex<Option<Config>>,
}

/// How handshakes are answered, and what that was made of.
#[derive(Debug)]
struct Config {
    credential: Arc<Credential>,
    /// None on a manager that has not been sent the state yet.
    cluster: Option<Arc<ClusterObject>>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("credential", &self.credential).finish_non_exhaustive()
    }
}

impl Listener {
    /// Serves hosts that join and nodes' sessions by `server`, as the node that has `credential`.
    pub fn new(server: Arc<Server>, credential: Shared) -> Self {
        let raft_streams = Semaphore::new(RAFT_STREAMS_MAX);
        Self { server, credential, raft: None, raft_streams, config: Mutex::default() }
    }

    /// Serves managers too: `handler` gets a stream once its peer has proved to be a manager of the cluster.
    #[must_use]
    pub fn with_raft(self, handler: RaftHandler) -> Self {
        Self { raft: Some(handler), ..self }
    }

    /// Accepts, until dropped.
    pub async fn serve(self, listener: TcpListener) {
        let listening = Arc::new(self);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, addr)) => {
                        let _ = stream.set_nodelay(true);
                        let listening = Arc::clone(&listening);
                        connections.spawn(async move {
                            if let Err(error) = listening.handle(stream, addr.ip()).await {
                                tracing::debug!(peer = %addr, %error, "a connection ended");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "no connection can be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    /// Serves one connection from `source`, to its end.
    pub async fn handle<S>(&self, stream: S, source: IpAddr) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let server = &self.server;
        let mut slot = server.slots.take(source);
        let Some(config) = self.config() else { return Err(server.turn_away(Cause::Unavailable)) };
        let stream = match slot.within(TlsAcceptor::from(config).accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(server.turn_away(cause(&error))),
            Err(cause) => return Err(server.turn_away(cause)),
        };
        let (_, connection) = stream.get_ref();
        let alpn = connection.alpn_protocol().and_then(Alpn::of);
        let Ok(peer) = peer_of(connection.peer_certificates()) else {
            return Err(server.turn_away(Cause::Certificate));
        };
        match (alpn, peer) {
            (None, _) => Err(server.turn_away(Cause::Protocol)),
            (Some(Alpn::Join), _) => join::serve(server, stream, slot).await,
            (Some(Alpn::Readmit), _) => {
                let binding = Binding::of(connection).map_err(|_| server.turn_away(Cause::Handshake))?;
                readmit::serve(server, stream, slot, &binding).await
            }
            (Some(Alpn::Session | Alpn::Raft), None) => Err(server.turn_away(Cause::Anonymous)),
            (Some(Alpn::Session), Some(peer)) => peer::serve(server, stream, peer, slot).await,
            (Some(Alpn::Raft), Some(peer)) => {
                drop(slot);
                self.check_manager(&peer).map_err(|cause| server.turn_away(cause))?;
                let Some(handler) = &self.raft else { return Err(server.turn_away(Cause::Protocol)) };
                let Ok(_stream) = self.raft_streams.try_acquire() else {
                    return Err(server.turn_away(Cause::Crowded));
                };
                let stream = Patient::new(stream, RAFT_SILENCE_MAX).hearing_within(RAFT_SILENCE_MAX);
                handler(Box::new(stream), peer).await;
                Ok(())
            }
        }
    }

    /// A manager by its certificate, unless it was removed. Whether it is one still, each question is asked for anew; this
    /// manager's list of nodes may lack the latest.
    fn check_manager(&self, peer: &Peer) -> Result<(), Cause> {
        let own = self.credential.get().ok_or(Cause::Unavailable)?;
        if peer.cluster != own.identity.peer().cluster {
            return Err(Cause::Node);
        }
        let cluster = self.server.cluster.state().cluster;
        if cluster.is_some_and(|cluster| cluster.removed.contains_key(&peer.node)) {
            return Err(Cause::Node);
        }
        if peer.role == Role::Manager { Ok(()) } else { Err(Cause::Role) }
    }

    /// With the certificate that the node has and the roots that the cluster trusts, or the node where it does not know the
    /// cluster; `None` where there is no certificate yet.
    fn config(&self) -> Option<Arc<ServerConfig>> {
        let credential = self.credential.get()?;
        let cluster = self.server.cluster.state().cluster;
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*config
            && Arc::ptr_eq(&known.credential, &credential)
            && same(known.cluster.as_ref(), cluster.as_ref())
        {
            return Some(Arc::clone(&known.server));
        }
        let mut protocols = vec![Alpn::Join, Alpn::Readmit, Alpn::Session];
        protocols.extend(self.raft.is_some().then_some(Alpn::Raft));
        let trusted = match &cluster {
            Some(cluster) => Roots::from_pem(&cluster.ca.trusted()).map_err(|error| error.to_string()),
            None => Ok(credential.roots.clone()),
        };
        let made = trusted.and_then(|trusted| {
            server_config(&credential.identity, &trusted, &protocols).map_err(|error| error.to_string())
        });
        match made {
            Ok(server) => {
                *config = Some(Config { credential, cluster, server: Arc::clone(&server) });
                Some(server)
            }
            Err(error) => {
                tracing::error!(error, "the manager can't prove itself to its peers");
                None
            }
        }
    }
}

fn same(one: Option<&Arc<ClusterObject>>, other: Option<&Arc<ClusterObject>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (one, other) => one.is_none() && other.is_none(),
    }
}

/// What was wrong with a handshake.
fn cause(error: &io::Error) -> Cause {
    match tls_error(error) {
        Some(rustls::Error::InvalidCertificate(_)) => Cause::Certificate,
        Some(rustls::Error::NoApplicationProtocol) => Cause::Protocol,
        _ => Cause::Handshake,
    }
}
