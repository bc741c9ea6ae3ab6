//! The HTTP side: every path answers with who and what; a few paths do more.
//!
//! | path | answer |
//! |---|---|
//! | `/bytes/N` | N bytes, the same for every request ([`byte_at`]) |
//! | `/slow/MS` | as usual, after MS milliseconds |
//! | `/stream` | a line a second until the connection closes |

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::Either;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, server::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Interval, interval, sleep, timeout};

use super::{Identity, plain_address};

/// Most that `/bytes/N` sends: 1 TiB is a typing mistake.
const BYTES_MAX: u64 = 1 << 40;
/// Longest that `/slow/MS` waits, ms.
const SLOW_MS_MAX: u64 = 600_000;
/// Bytes in a piece of a body.
const CHUNK_BYTES: u64 = 64 << 10;
/// How long a connection by which nothing was asked yet may take to ask, once the task is told to stop.
const FIRST_REQUEST: Duration = Duration::from_millis(200);
/// Period of [`byte_at`]: a prime, so that a piece sent twice or dropped shows.
const PERIOD: u64 = 251;

/// The byte at `offset` of what `/bytes/N` sends.
pub(super) fn byte_at(offset: u64) -> u8 {
    (offset % PERIOD) as u8
}

/// Accepts connections for ever.
pub(super) async fn serve(listener: TcpListener, identity: Arc<Identity>, drain: watch::Receiver<bool>) {
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                tokio::spawn(connection(stream, client, Arc::clone(&identity), drain.clone()));
            }
            // Out of descriptors, or the client gave up in the queue: the next may do better.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn connection(
    stream: TcpStream,
    client: SocketAddr,
    identity: Arc<Identity>,
    mut drain: watch::Receiver<bool>,
) {
    let local = stream.local_addr().map_or_else(|_| "-".to_owned(), |addr| plain_address(addr).to_string());
    let client = plain_address(client);
    let _ = stream.set_nodelay(true);
    let draining = drain.clone();
    let asked = AtomicBool::new(false);
    let service = service_fn(|request| {
        asked.store(true, Ordering::Relaxed);
        let (identity, local, draining) = (Arc::clone(&identity), local.clone(), draining.clone());
        async move { Ok::<_, Infallible>(answer(request, &identity, &local, client, draining).await) }
    });
    // Without a timer, so without hyper's limit for the next request: who keeps a connection idle has a reason.
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // How a connection ends is its client's business.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = drain.wait_for(|draining| *draining) => {}
    }
    // Closed before it is read, what was dialled just now would be reset.
    if !asked.load(Ordering::Relaxed) && timeout(FIRST_REQUEST, connection.as_mut()).await.is_ok() {
        return;
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

async fn answer(
    request: Request<Incoming>,
    identity: &Identity,
    local: &str,
    client: SocketAddr,
    draining: watch::Receiver<bool>,
) -> Response<Either<Pattern, Ticks>> {
    let path = request.uri().path();
    let number = |prefix: &str| path.strip_prefix(prefix).map(str::parse::<u64>);
    if path == "/stream" {
        let ticks = Ticks { interval: interval(Duration::from_secs(1)), count: 0, draining };
        return plain(StatusCode::OK, Either::Right(ticks));
    }
    match number("/bytes/") {
        Some(Ok(len)) if len <= BYTES_MAX => {
            let mut response = Response::new(Either::Left(Pattern::Count { at: 0, len }));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            return response;
        }
        Some(_) => return text(StatusCode::BAD_REQUEST, format!("expected /bytes/N, N up to {BYTES_MAX}\n")),
        None => {}
    }
    match number("/slow/") {
        Some(Ok(ms)) if ms <= SLOW_MS_MAX => sleep(Duration::from_millis(ms)).await,
        Some(_) => {
            return text(StatusCode::BAD_REQUEST, format!("expected /slow/MS, MS up to {SLOW_MS_MAX}\n"));
        }
        None => {}
    }
    text(StatusCode::OK, describe(&request, identity, local, client))
}

fn describe(request: &Request<Incoming>, identity: &Identity, local: &str, client: SocketAddr) -> String {
    let Identity { task, task_id, service, node } = identity;
    let (method, path) = (request.method(), request.uri());
    let mut body = format!(
        "task: {task}\ntask-id: {task_id}\nservice: {service}\nnode: {node}\nlocal: {local}\nclient: {client}\n\
         method: {method}\npath: {path}\n"
    );
    for (name, value) in request.headers() {
        // Writing to a String does not fail.
        let _ = writeln!(body, "{name}: {}", String::from_utf8_lossy(value.as_bytes()));
    }
    body
}

fn text(status: StatusCode, text: String) -> Response<Either<Pattern, Ticks>> {
    plain(status, Either::Left(Pattern::Text(Some(text.into()))))
}

fn plain(status: StatusCode, body: Either<Pattern, Ticks>) -> Response<Either<Pattern, Ticks>> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// A body of known length: a text, or the bytes of [`byte_at`].
enum Pattern {
    Text(Option<Bytes>),
    Count { at: u64, len: u64 },
}

impl Body for Pattern {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let chunk = match self.get_mut() {
            Self::Text(text) => text.take(),
            Self::Count { at, len } => next_chunk(at, *len),
        };
        Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Count { at, len } => at == len,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Text(text) => text.as_ref().map_or(0, |text| text.len() as u64),
            Self::Count { at, len } => len - at,
        })
    }
}

fn next_chunk(at: &mut u64, len: u64) -> Option<Bytes> {
    static CHUNK: std::sync::LazyLock<Bytes> =
        std::sync::LazyLock::new(|| (0..CHUNK_BYTES + PERIOD).map(byte_at).collect());
    let size = CHUNK_BYTES.min(len - *at);
    if size == 0 {
        return None;
    }
    let start = (*at % PERIOD) as usize;
    *at += size;
    Some(CHUNK.slice(start..start + size as usize))
}

/// A body that sends a line a second, until the client leaves or the server drains.
struct Ticks {
    interval: Interval,
    count: u64,
    draining: watch::Receiver<bool>,
}

impl Body for Ticks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let ticks = self.get_mut();
        if ticks.interval.poll_tick(context).is_pending() {
            return Poll::Pending;
        }
        if *ticks.draining.borrow() {
            return Poll::Ready(None);
        }
        let line = format!("tick {}\n", ticks.count);
        ticks.count += 1;
        Poll::Ready(Some(Ok(Frame::data(line.into()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_make_up_the_pattern_whatever_the_length() {
        for len in [0, 1, PERIOD, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7] {
            let mut at = 0;
            let mut sent = Vec::new();
            while let Some(chunk) = next_chunk(&mut at, len) {
                sent.extend_from_slice(&chunk);
            }
            let expected: Vec<u8> = (0..len).map(byte_at).collect();
            assert_eq!(sent, expected, "{len} bytes");
        }
    }
}
