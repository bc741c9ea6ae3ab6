//! Raft's questions and answers over TLS: a frame each way, on a stream that is then kept for the next question.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mesh_api::codec::{CodecError, FrameReader, FrameWriter};
use mesh_api::error::chain;
use mesh_api::id::NodeId;
use mesh_api::table::Role;
use mesh_api::tls::{Alpn, HandshakeError, Peer, Shared, connect, peer_of};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf, split};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::cluster::Cluster;
use crate::raft::{Calling, Manager, Request, Response, Transport, TransportError};

/// Longest question or answer, bytes of JSON.
pub(crate) const FRAME_BYTES_MAX: u32 = 16 << 20;
/// Streams kept for later questions to one manager. More are under way while several questions are.
const IDLE_MAX: usize = 4;

/// A manager, and where it is.
type Whom = (NodeId, SocketAddr);

/// This manager's streams to the others.
#[derive(Debug)]
pub struct Wire {
    credential: Shared,
    /// By whom they are with.
    idle: Mutex<BTreeMap<Whom, Vec<Conversation>>>,
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
enum WireError {
    #[error("this host has no certificate")]
    NoCertificate,
    #[error("its address can't be reached")]
    Unreachable(#[source] io::Error),
    #[error("TLS can't be set up")]
    Tls(#[source] tokio_rustls::rustls::Error),
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    #[error("another node answers there: {0}")]
    Other(NodeId),
    #[error("who answers there does not say which node it is")]
    Nobody,
    #[error("the stream failed")]
    Codec(#[from] CodecError),
    #[error("it hung up")]
    Closed,
}

/// One stream, on which an answer follows each question.
#[derive(Debug)]
struct Conversation {
    reader: FrameReader<ReadHalf<TlsStream<TcpStream>>, Response>,
    writer: FrameWriter<WriteHalf<TlsStream<TcpStream>>, Request>,
}

impl Conversation {
    async fn open(credential: &Shared, to: &Manager) -> Result<Self, WireError> {
        let credential = credential.get().ok_or(WireError::NoCertificate)?;
        let config = credential.client_config(Alpn::Raft).map_err(WireError::Tls)?;
        let stream = TcpStream::connect(to.addr).await.map_err(WireError::Unreachable)?;
        let _ = stream.set_nodelay(true);
        let stream = connect(stream, config).await?;
        match peer_of(stream.get_ref().1.peer_certificates()) {
            Ok(Some(peer)) if peer.node == to.node => {}
            Ok(Some(peer)) => return Err(WireError::Other(peer.node)),
            Ok(None) | Err(_) => return Err(WireError::Nobody),
        }
        let (reader, writer) = split(stream);
        Ok(Self { reader: FrameReader::new(reader, FRAME_BYTES_MAX), writer: FrameWriter::new(writer) })
    }

    async fn ask(&mut self, request: &Request) -> Result<Response, WireError> {
        self.writer.send(request).await?;
        self.reader.next().await?.ok_or(WireError::Closed)
    }
}

impl Wire {
    /// For the node that has `credential`.
    pub fn new(credential: Shared) -> Self {
        Self { credential, idle: Mutex::default() }
    }

    fn idle(&self) -> MutexGuard<'_, BTreeMap<Whom, Vec<Conversation>>> {
        // Its streams are put in and taken out whole.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, to: &Manager, request: &Request) -> Result<Response, WireError> {
        let whom = (to.node.clone(), to.addr);
        // The other side may have closed a stream that was kept. A question may be asked twice.
        loop {
            let kept = self.idle().get_mut(&whom).and_then(Vec::pop);
            let Some(mut conversation) = kept else { break };
            if let Ok(response) = conversation.ask(request).await {
                self.keep(&whom, conversation);
                return Ok(response);
            }
        }
        let mut conversation = Conversation::open(&self.credential, to).await?;
        let response = conversation.ask(request).await?;
        self.keep(&whom, conversation);
        Ok(response)
    }

    fn keep(&self, whom: &Whom, conversation: Conversation) {
        let mut idle = self.idle();
        let kept = idle.entry(whom.clone()).or_default();
        if kept.len() < IDLE_MAX {
            kept.push(conversation);
        }
    }
}

impl Transport for Wire {
    fn call<'a>(&'a self, to: &'a Manager, request: Request) -> Calling<'a> {
        Box::pin(async move {
            let failed = |error| TransportError { to: to.node.clone(), problem: chain(&error) };
            self.ask(to, &request).await.map_err(failed)
        })
    }
}

/// Answers what the manager `peer` asks on a stream, until it hangs up.
pub(super) async fn answer<S>(cluster: &Cluster, peer: &Peer, stream: S) -> Result<(), CodecError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (reader, writer) = split(stream);
    let mut reader = FrameReader::new(reader, FRAME_BYTES_MAX);
    let mut writer = FrameWriter::new(writer);
    while let Some(request) = reader.next().await? {
        let response = if may_ask(cluster, &peer.node) {
            cluster.handle(&peer.node, request).await
        } else {
            Response::Unavailable
        };
        writer.send(&response).await?;
    }
    Ok(())
}

/// Whether a node with a manager's certificate is listened to. One that is to be a worker, and that this manager does not
/// count among the managers any longer, is so by the leader alone, who tells it.
fn may_ask(cluster: &Cluster, node: &NodeId) -> bool {
    let state = cluster.state();
    if state.cluster.as_ref().is_some_and(|object| object.removed.contains_key(node)) {
        return false;
    }
    let is_worker = state.nodes.get(node).is_some_and(|node| node.spec.role == Role::Worker);
    !is_worker
        || cluster.leadership().borrow().is_leader
        || cluster.managers().iter().any(|member| member.manager.node == *node)
}
