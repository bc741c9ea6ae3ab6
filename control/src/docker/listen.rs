//! The API's unix socket: bound so that only root and its group may dial it, and served within [`Limits`], so that
//! a client that stalls or floods takes nothing from the others.

mod room;

use std::convert::Infallible;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response};
use axum::response::IntoResponse as _;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tower::ServiceExt as _;

use super::error::{ApiError, ApiResult};
use super::request;
use crate::patient::{Patient, Turn};
pub(super) use room::Limits;
use room::{Crowded, Place, Room};

/// Connections that wait in the kernel's queue.
const BACKLOG: u32 = 1024;
/// Headers of a request.
const HEADERS_MAX: usize = 100;
/// A request's line and headers, bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;

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
    serve_within(listener, router, Limits::PRODUCT, shutdown).await;
}

/// Serves within `limits`.
pub(super) async fn serve_within(
    listener: UnixListener,
    router: Router,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) {
    let room = Room::new(limits);
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        // Reaps, so that the set holds few that have ended.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection on the API socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (place, ended) = tokio::select! {
            () = &mut shutdown => break,
            entered = room.enter() => entered,
        };
        connections.spawn(connection(stream, router.clone(), place, ended));
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    // What is still open after the grace (event streams) is dropped with the set.
    let _ = timeout(SHUTDOWN_GRACE, ended).await;
}

async fn connection(stream: UnixStream, router: Router, place: Place, ended: oneshot::Receiver<()>) {
    let place = Arc::new(place);
    let limits = place.room.limits;
    let own = Arc::clone(&place);
    let stream = Patient::new(stream, limits.stalled).telling(move |turn| match turn {
        Turn::Theirs => own.awaits(),
        Turn::Ours => own.flushed(),
    });
    let service = service_fn(move |request| exchange(request, router.clone(), Arc::clone(&place)));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_headers(HEADERS_MAX)
        .max_header_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        served = served => if let Err(error) = served {
            tracing::debug!(%error, "a connection on the API socket ended early");
        },
        _ = ended => tracing::debug!("a connection on the API socket gave way to others"),
    }
}

/// Answers one request.
async fn exchange(
    request: Request<Incoming>,
    router: Router,
    place: Arc<Place>,
) -> Result<Response<Answer>, Infallible> {
    let response = worked_on(request, router, &place).await.unwrap_or_else(ApiError::into_response);
    Ok(response.map(|body| Answer { body, place }))
}

async fn worked_on(
    request: Request<Incoming>,
    router: Router,
    place: &Place,
) -> ApiResult<axum::response::Response> {
    let Room { limits, large_bodies, restores, .. } = &*place.room;
    let (parts, body) = request.into_parts();
    let (body, _leave) = if request::is_streamed(&parts) {
        // Whoever reads it knows how much of it to take.
        let leave = Arc::clone(restores).try_acquire_owned();
        let leave = leave.map_err(|_| ApiError::unavailable("another backup is being restored already"))?;
        (Body::new(body), Some(leave))
    } else {
        let (bytes, leave) = request::read_whole(body, large_bodies, limits.body).await?;
        (Body::from(bytes), leave)
    };
    let busy = |Crowded| {
        ApiError::unavailable(format!(
            "the API is busy with {} other requests: try again in a moment",
            limits.requests
        ))
    };
    place.begin().await.map_err(busy)?;
    let answered = timeout(limits.work, router.oneshot(Request::from_parts(parts, body))).await;
    place.answer();
    let Ok(Ok(response)) = answered else {
        let message =
            format!("the request took longer than {} s: its effect is unknown", limits.work.as_secs());
        return Err(ApiError::unavailable(message));
    };
    if response.body().size_hint().exact().is_none() {
        let many = |Crowded| {
            ApiError::unavailable(format!("{} streams of events are open: end some of them", limits.streams))
        };
        place.follow().map_err(many)?;
    }
    Ok(response)
}

/// An answer's body, which tells its connection's place when all of it is on its way.
struct Answer {
    body: Body,
    place: Arc<Place>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.place.said();
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
