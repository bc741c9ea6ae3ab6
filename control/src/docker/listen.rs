//! The API's unix socket: bound so that only root and its group may dial it, and served with limits, so that
//! a client that stalls or floods takes nothing from the others.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::ServiceExt;

/// Connections served at once; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 512;

/// Connections that wait in the kernel's queue.
const BACKLOG: u32 = 256;

/// How long a client may take to send a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long requests in progress get to end at shutdown. Event streams don't end by themselves.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Root and its group may dial the socket.
const SOCKET_MODE: u32 = 0o660;

/// Why the socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers on it.
    #[error("{} is in use by a live agent: stop that one first, or give this one another --run-dir", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is something at the path that is not a socket.
    #[error("{} exists and is not a socket: remove it, or choose another --run-dir", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Any other failure.
    #[error("can't listen on {}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
}

/// Binds the socket at `path`, replacing one that a dead agent left there.
pub async fn bind(path: &Path) -> Result<UnixListener, ListenError> {
    use std::os::unix::fs::FileTypeExt;

    let failed = |source| ListenError::Io { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.to_owned() });
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(ListenError::InUse { path: path.to_owned() });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let socket = UnixSocket::new_stream().map_err(failed)?;
    let mode = Permissions::from_mode(SOCKET_MODE);
    // Linux makes the file with the socket's own mode, less the umask: nobody else can dial it at any moment.
    let own = socket.as_fd().try_clone_to_owned().map_err(failed)?;
    File::from(own).set_permissions(mode.clone()).map_err(failed)?;
    socket.bind(path).map_err(failed)?;
    std::fs::set_permissions(path, mode).map_err(failed)?;
    let listener = socket.listen(BACKLOG).map_err(failed)?;
    Ok(listener)
}

/// Serves `router` on `listener` until `shutdown` resolves; gives requests in progress a moment to end.
pub async fn serve(listener: UnixListener, router: Router, shutdown: impl Future<Output = ()>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (listener.accept().await, slot)
        };
        let (stream, slot) = tokio::select! {
            () = &mut shutdown => break,
            accepted = accepted => match accepted {
                (Ok((stream, _)), Ok(slot)) => (stream, slot),
                (Err(error), _) => {
                    tracing::warn!(%error, "can't accept a connection on the API socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
                (_, Err(_)) => break,
            },
            // Reaps, so that the set holds live connections only.
            Some(_) = connections.join_next() => continue,
        };
        let router = router.clone();
        connections.spawn(async move {
            connection(stream, router).await;
            drop(slot);
        });
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    // What is still open after the grace (event streams) is dropped with the set.
    let _ = tokio::time::timeout(SHUTDOWN_GRACE, ended).await;
}

async fn connection(stream: UnixStream, router: Router) {
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        router.clone().oneshot(request.map(Body::new))
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection on the API socket ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_live_socket_is_left_alone_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let live = bind(&path).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        assert!(matches!(bind(&path).await, Err(ListenError::InUse { .. })));
        drop(live);
        bind(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path).await, Err(ListenError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[tokio::test]
    async fn a_client_that_sends_nothing_does_not_hold_up_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let listener = bind(&path).await.unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(serve(listener, Router::new(), async { drop(stopped.await) }));
        let _idle = UnixStream::connect(&path).await.unwrap();
        stop.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(5), server).await.unwrap().unwrap();
    }
}
