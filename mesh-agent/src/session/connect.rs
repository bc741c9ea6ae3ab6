//! Opening a session: the first message and its answer.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_api::codec::{CodecError, FrameReader, FrameWriter, MANAGER_FRAME_BYTES_MAX};
use mesh_api::session::{AgentMessage, ManagerMessage, NodeDescription, RefusalReason};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// How long a manager has to take the connection, and as long again for each step of the greeting.
const STEP: Duration = Duration::from_secs(5);

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

type Reader = FrameReader<OwnedReadHalf, ManagerMessage>;
type Writer = FrameWriter<OwnedWriteHalf, AgentMessage>;

/// An open session, after the greeting.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) remote: SocketAddr,
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    /// The host as it was described to the manager.
    pub(crate) node: NodeDescription,
    /// `Joined` or `Resumed`.
    pub(crate) greeting: ManagerMessage,
}

/// Opens a session of the host `node` with the first of `remotes` that takes it. A refusal that every manager would repeat ends the search.
pub(crate) async fn connect(
    remotes: &[SocketAddr],
    node: NodeDescription,
    hello: impl FnOnce(NodeDescription) -> AgentMessage,
) -> Result<Connection, ConnectError> {
    let hello = hello(node.clone());
    let mut last = ConnectError::NoRemotes;
    for remote in remotes {
        match connect_one(*remote, &hello).await {
            Ok((reader, writer, greeting)) => {
                return Ok(Connection { remote: *remote, reader, writer, node, greeting });
            }
            Err(error @ ConnectError::Refused { reason, .. }) if reason != RefusalReason::Unavailable => {
                return Err(error);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect_one(
    remote: SocketAddr,
    hello: &AgentMessage,
) -> Result<(Reader, Writer, ManagerMessage), ConnectError> {
    let stream = match timeout(STEP, TcpStream::connect(remote)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    let stream = stream.map_err(|source| ConnectError::Unreachable { remote, source })?;
    let _ = stream.set_nodelay(true);
    let (read, write) = stream.into_split();
    let mut reader = FrameReader::new(read, MANAGER_FRAME_BYTES_MAX);
    let mut writer = FrameWriter::new(write);
    let greet = async {
        writer.send(hello).await?;
        reader.next().await
    };
    let greeting = match timeout(2 * STEP, greet).await {
        Ok(Ok(Some(greeting))) => greeting,
        Ok(Ok(None)) | Err(_) => return Err(ConnectError::Unexpected { remote }),
        Ok(Err(source)) => return Err(ConnectError::Stream { remote, source }),
    };
    match greeting {
        ManagerMessage::Joined { .. } | ManagerMessage::Resumed { .. } => Ok((reader, writer, greeting)),
        ManagerMessage::Refused { reason, message } => Err(ConnectError::Refused { remote, reason, message }),
        _ => Err(ConnectError::Unexpected { remote }),
    }
}
