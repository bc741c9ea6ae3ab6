//! Dialling managers: to become a node, to open a session as one, and to come back as one.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::codec::{CodecError, FrameReader, FrameWriter, JOIN_FRAME_BYTES_MAX, MANAGER_FRAME_BYTES_MAX};
use mesh_api::id::{ClusterId, NodeId};
use mesh_api::session::{
    AgentMessage, JoinAnswer, JoinRequest, ManagerMessage, NodeDescription, PROTOCOL_VERSION, ReadmitAnswer,
    ReadmitRequest, RefusalReason,
};
use mesh_api::table::Role;
use mesh_api::tls::{
    self, Alpn, Binding, Credential, HandshakeError, Identity, Peer, is_certificate_refused, join_config,
};
use mesh_api::token::JoinToken;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::{ClientConfig, Error};

/// How long a manager has to take the connection, and as long again for each step of the greeting.
const STEP: Duration = Duration::from_secs(5);
/// How long it has to take the connection where there are others to ask.
const STEP_OF_SEVERAL: Duration = Duration::from_secs(1);
/// How often managers may name another as their leader, before they are taken for being at odds.
const MOVES_MAX: u32 = 3;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No manager is known.
    #[error("no manager's address is known")]
    NoRemotes,
    /// The manager can't be reached.
    #[error("cannot connect to manager {remote}")]
    Unreachable {
        /// Its address.
        remote: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// What answers is not of the cluster that the join token names.
    #[error(
        "remote CA does not match fingerprint: manager {remote} is not of the swarm that the join token is of, or that has \
         another root certificate by now; `docker swarm join-token` prints the token of today"
    )]
    Fingerprint {
        /// Its address.
        remote: SocketAddr,
    },
    /// What answers can't prove to be a manager of the cluster.
    #[error("no secure connection with manager {remote}")]
    Handshake {
        /// Its address.
        remote: SocketAddr,
        /// Why.
        source: HandshakeError,
    },
    /// This node can't prove to be one.
    #[error("{0}")]
    Certificate(String),
    /// This node's own key or roots can't be used.
    #[error("this node's certificate can't be used")]
    Own(#[source] Error),
    /// The stream broke, or what came is not this protocol.
    #[error("manager {remote} does not speak the session's protocol, or hung up")]
    Stream {
        /// Its address.
        remote: SocketAddr,
        /// Why.
        source: CodecError,
    },
    /// The manager said something else than a greeting.
    #[error("manager {remote} answered out of turn, or not at all")]
    Unexpected {
        /// Its address.
        remote: SocketAddr,
    },
    /// Sessions are the leader's, and this manager is none.
    #[error("manager {remote} does not lead, and knows of no leader that answers")]
    NoLeader {
        /// Its address.
        remote: SocketAddr,
    },
    /// The manager refused.
    #[error("{message}")]
    Refused {
        /// Its address.
        remote: SocketAddr,
        /// Why, for programs.
        reason: RefusalReason,
        /// Why, for people.
        message: String,
    },
}

impl ConnectError {
    /// Every manager would repeat it.
    fn is_final(&self) -> bool {
        matches!(self, Self::Refused { reason, .. } if *reason != RefusalReason::Unavailable)
    }
}

type Secure = TlsStream<TcpStream>;

/// An open session, after the greeting.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) remote: SocketAddr,
    pub(crate) reader: FrameReader<ReadHalf<Secure>, ManagerMessage>,
    pub(crate) writer: FrameWriter<WriteHalf<Secure>, AgentMessage>,
    /// The host as it was described to the manager.
    pub(crate) node: NodeDescription,
    /// The node's role.
    pub(crate) role: Role,
    /// The roots to trust, PEM.
    pub(crate) roots: String,
}

/// What a host got that joined.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) cluster_id: ClusterId,
    pub(crate) node_id: NodeId,
    pub(crate) role: Role,
    /// The certificate chain, PEM.
    pub(crate) chain: String,
    /// The roots to trust, PEM.
    pub(crate) roots: String,
}

/// Opens a session of the host `node`, which has the table of `index`, with the first of `remotes` that takes it, or that
/// one of them says is the leader.
pub(crate) async fn connect(
    remotes: &[SocketAddr],
    credential: &Credential,
    node: NodeDescription,
    index: Option<u64>,
) -> Result<Connection, ConnectError> {
    let config = credential.client_config(Alpn::Session).map_err(ConnectError::Own)?;
    let hello = AgentMessage::Resume { protocol: PROTOCOL_VERSION, node, index };
    let mut last = ConnectError::NoRemotes;
    let mut remotes: VecDeque<SocketAddr> = remotes.iter().copied().collect();
    let mut moves = 0;
    while let Some(remote) = remotes.pop_front() {
        let step = if remotes.is_empty() { STEP } else { STEP_OF_SEVERAL };
        let greeted = greet(remote, step, Arc::clone(&config), &hello, MANAGER_FRAME_BYTES_MAX).await;
        let error = match greeted {
            Ok((ManagerMessage::Resumed { cluster_id: _, role, roots }, reader, writer)) => {
                let AgentMessage::Resume { node, .. } = hello else { break };
                return Ok(Connection { remote, reader, writer, node, role, roots });
            }
            Ok((ManagerMessage::Moved { leader }, ..)) => {
                if let Some(leader) = leader.filter(|leader| *leader != remote && moves < MOVES_MAX) {
                    moves += 1;
                    remotes.retain(|other| *other != leader);
                    remotes.push_front(leader);
                }
                ConnectError::NoLeader { remote }
            }
            Ok((ManagerMessage::Refused { reason, message }, ..)) => {
                ConnectError::Refused { remote, reason, message }
            }
            Ok(_) => ConnectError::Unexpected { remote },
            Err(error) => refused_certificate(&error, &credential.identity).unwrap_or(error),
        };
        if error.is_final() {
            return Err(error);
        }
        last = error;
    }
    Err(last)
}

/// Joins, by the first of `remotes` that takes the host `node`, the cluster that `token` names. Nothing is said to one that
/// can't prove to be of it.
pub(crate) async fn join(
    remotes: &[SocketAddr],
    token: &JoinToken,
    csr: &str,
    node: NodeDescription,
) -> Result<Joined, ConnectError> {
    let config = join_config(token).map_err(ConnectError::Own)?;
    let (token, csr) = (token.to_string(), csr.to_owned());
    let request = JoinRequest { protocol: PROTOCOL_VERSION, token, csr, node };
    let (config, request) = (&config, &request);
    first_of(remotes, |remote| async move {
        match greet(remote, STEP, Arc::clone(config), request, JOIN_FRAME_BYTES_MAX).await?.0 {
            JoinAnswer::Joined { cluster_id, node_id, role, chain, roots } => {
                Ok(Joined { cluster_id, node_id, role, chain, roots })
            }
            JoinAnswer::Refused { reason, message } => Err(ConnectError::Refused { remote, reason, message }),
        }
    })
    .await
}

/// What a node got that comes back.
#[derive(Debug)]
pub(crate) struct Readmitted {
    /// The certificate chain, PEM.
    pub(crate) chain: String,
    /// The roots to trust, PEM.
    pub(crate) roots: String,
}

/// Asks the first of `remotes` that answers for a certificate by `csr`, as the node whose own in `credential` has expired.
pub(crate) async fn readmit(
    remotes: &[SocketAddr],
    credential: &Credential,
    csr: &str,
) -> Result<Readmitted, ConnectError> {
    let config = credential.roots.client_config(Alpn::Readmit).map_err(ConnectError::Own)?;
    let config = &config;
    first_of(remotes, |remote| async move {
        let secure = dial(remote, STEP, Arc::clone(config)).await?;
        let binding = Binding::of(secure.get_ref().1).map_err(ConnectError::Own)?;
        let proof = credential.identity.prove(&binding, csr).map_err(ConnectError::Own)?;
        let (chain, csr) = (credential.identity.chain(), csr.to_owned());
        let request = ReadmitRequest { protocol: PROTOCOL_VERSION, chain, csr, proof };
        match exchange(remote, secure, &request, JOIN_FRAME_BYTES_MAX).await?.0 {
            ReadmitAnswer::Readmitted { chain, roots } => Ok(Readmitted { chain, roots }),
            ReadmitAnswer::Refused { reason, message } => {
                Err(ConnectError::Refused { remote, reason, message })
            }
        }
    })
    .await
}

/// What the first of `remotes` gives that doesn't fail, or how the last one failed: or the first one that speaks for all.
async fn first_of<T, F: Future<Output = Result<T, ConnectError>>>(
    remotes: &[SocketAddr],
    ask: impl Fn(SocketAddr) -> F,
) -> Result<T, ConnectError> {
    let mut last = ConnectError::NoRemotes;
    for remote in remotes {
        match ask(*remote).await {
            Err(error) if !error.is_final() => last = error,
            ended => return ended,
        }
    }
    Err(last)
}

type Greeted<A, Q> = (A, FrameReader<ReadHalf<Secure>, A>, FrameWriter<WriteHalf<Secure>, Q>);

/// Dials, within `step`, says `hello`, and hears the answer.
async fn greet<A: DeserializeOwned, Q: Serialize>(
    remote: SocketAddr,
    step: Duration,
    config: Arc<ClientConfig>,
    hello: &Q,
    frame_bytes_max: u32,
) -> Result<Greeted<A, Q>, ConnectError> {
    exchange(remote, dial(remote, step, config).await?, hello, frame_bytes_max).await
}

/// Dials, within `step`.
async fn dial(remote: SocketAddr, step: Duration, config: Arc<ClientConfig>) -> Result<Secure, ConnectError> {
    let stream = match timeout(step, TcpStream::connect(remote)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    let stream = stream.map_err(|source| ConnectError::Unreachable { remote, source })?;
    let _ = stream.set_nodelay(true);
    let secure = match timeout(STEP, tls::connect(stream, config)).await {
        Ok(secure) => secure,
        Err(_) => Err(HandshakeError::Io(io::ErrorKind::TimedOut.into())),
    };
    secure.map_err(|source| match source {
        HandshakeError::Fingerprint => ConnectError::Fingerprint { remote },
        source => ConnectError::Handshake { remote, source },
    })
}

/// Says `hello`, and hears the answer.
async fn exchange<A: DeserializeOwned, Q: Serialize>(
    remote: SocketAddr,
    secure: Secure,
    hello: &Q,
    frame_bytes_max: u32,
) -> Result<Greeted<A, Q>, ConnectError> {
    let (read, write) = tokio::io::split(secure);
    let mut reader = FrameReader::new(read, frame_bytes_max);
    let mut writer = FrameWriter::new(write);
    let greeting = async {
        let sent = writer.send(hello).await;
        // Where the manager has hung up, what it said before tells more.
        match (reader.next().await, sent) {
            (Ok(None), Err(error)) => Err(error),
            (heard, _) => heard,
        }
    };
    match timeout(2 * STEP, greeting).await {
        Ok(Ok(Some(answer))) => Ok((answer, reader, writer)),
        Ok(Ok(None)) | Err(_) => Err(ConnectError::Unexpected { remote }),
        Ok(Err(source)) => Err(ConnectError::Stream { remote, source }),
    }
}

/// What is wrong with the node's own certificate, where that is what an attempt failed for.
fn refused_certificate(error: &ConnectError, own: &Identity) -> Option<ConnectError> {
    let ConnectError::Stream { remote, source: CodecError::Io(error) } = error else { return None };
    if !is_certificate_refused(error) {
        return None;
    }
    let own = own.peer();
    let refused = || {
        format!(
            "manager {remote} does not take this node's certificate: check both hosts' clocks; if they are right, leave the swarm \
             and join it again (`docker swarm leave`, `docker swarm join`), and remove the former node on a manager (`docker node \
             rm --force {}`)",
            own.node
        )
    };
    Some(ConnectError::Certificate(expired(own).unwrap_or_else(refused)))
}

/// Since when the node can't prove itself any more, and what to do; `None` while its certificate is valid.
pub(crate) fn expired(own: &Peer) -> Option<String> {
    let since = SystemTime::now().duration_since(own.not_after).ok()?;
    let (hours, node) = (since.as_secs() / 3600, &own.node);
    Some(format!(
        "this node's certificate expired {hours} h ago, before the node could renew it: let it come back by `shoal node approve \
         {node}` on a manager"
    ))
}
