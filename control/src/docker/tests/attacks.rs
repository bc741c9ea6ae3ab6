//! Attacks on the API's socket, and what an honest client sees of them.

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::routing::{self, get};
use futures::future::join_all;
use futures::stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::host::Client;
use crate::docker::bind;
use crate::docker::listen::{Limits, serve_within};
use crate::docker::request::{BODY_BYTES_MAX, SMALL_BODY_BYTES};
use crate::testing::{raise_open_files, resident};

/// How long anything may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long an honest client may wait amid an attack. On an idle machine it is some ms.
const HONEST_MAX: Duration = Duration::from_secs(10);
/// What refusing a body may cost, bytes: those that are read, and what the kernel holds. Other tests' memory is in there.
const GROWTH_MAX: u64 = 256 << 20;
/// Of answers that don't fit into the kernel's buffers, bytes.
const LARGE: usize = 4 << 20;

/// A router on a socket of its own.
struct Served {
    path: PathBuf,
    server: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Served {
    async fn of(router: Router, limits: Limits) -> Self {
        raise_open_files();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let listener = bind(&path).await.unwrap();
        let server = tokio::spawn(serve_within(listener, router, limits, std::future::pending()));
        Self { path, server, _dir: dir }
    }

    /// The API of a manager, within the product's limits.
    async fn manager() -> Self {
        Self::of(Client::manager().await.router, Limits::PRODUCT).await
    }

    /// Answers of several kinds, within these limits.
    async fn answers(limits: Limits) -> Self {
        let flood = || async { Body::from_stream(stream::repeat_with(|| io::Result::Ok(piece()))) };
        let slow = || async { sleep(PATIENCE).await };
        let restore = |body: Body| async {
            let bytes = to_bytes(body, usize::MAX).await;
            bytes.map_or_else(|error| error.to_string(), |bytes| format!("{} bytes", bytes.len()))
        };
        let router = Router::new()
            .route("/services", get(|| async { "[]" }))
            .route("/large", get(|| async { vec![b'x'; LARGE] }))
            .route("/flood", get(flood))
            .route("/slow", get(slow))
            .route("/shoal/v1/restore", routing::post(restore));
        Self::of(router, limits).await
    }

    /// A connection. The kernel's queue may be full for a moment.
    async fn dial(&self) -> UnixStream {
        let dialled = async {
            loop {
                match UnixStream::connect(&self.path).await {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        sleep(Duration::from_millis(5)).await;
                    }
                    dialled => return dialled.unwrap(),
                }
            }
        };
        timeout(PATIENCE, dialled).await.unwrap()
    }

    /// Says `bytes`, and hears all that is answered.
    async fn ask(&self, bytes: &[u8]) -> String {
        let mut stream = self.dial().await;
        // What is refused may be so before all of it is said.
        let _ = stream.write_all(bytes).await;
        all_of(stream).await
    }

    /// Asks for the services as everybody does; how long that takes.
    async fn is_well(&self) -> Duration {
        let began = Instant::now();
        let answer = self.ask(&request("/services")).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        began.elapsed()
    }

    /// Asks so over and over while `attack` goes on. Says how long the slowest answer took, and what became of the attack.
    async fn is_well_during<T>(&self, what: &str, attack: impl Future<Output = T>) -> T {
        let is_over = AtomicBool::new(false);
        let attacking = async {
            let done = attack.await;
            is_over.store(true, Ordering::Relaxed);
            done
        };
        let honest = async {
            let (mut slowest, mut count) = (self.is_well().await, 1);
            while !is_over.load(Ordering::Relaxed) {
                slowest = slowest.max(self.is_well().await);
                count += 1;
                sleep(Duration::from_millis(10)).await;
            }
            (slowest, count)
        };
        let (done, (slowest, count)) = tokio::join!(attacking, honest);
        println!("{what}: {count} honest requests meanwhile, the slowest in {slowest:?}");
        assert!(slowest < HONEST_MAX, "{what}: an honest client waited {slowest:?}");
        done
    }
}

fn piece() -> Bytes {
    Bytes::from_static(&[b'x'; 1 << 10])
}

fn request(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").into_bytes()
}

fn post(more: &str, body: &str) -> Vec<u8> {
    let head = "POST /v1.41/services/create HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    format!("{head}Content-Type: application/json\r\n{more}\r\n{body}").into_bytes()
}

/// All that comes, to the end of the stream.
async fn all_of(mut stream: UnixStream) -> String {
    let mut all = Vec::new();
    // One that ends in an error has ended, too.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("the connection stays open");
    String::from_utf8_lossy(&all).into_owned()
}

/// Sends pieces until they are not taken any more; how many bytes were, and the answer.
async fn pour(mut stream: UnixStream, head: &[u8], piece: &[u8], total: u64) -> (u64, String) {
    stream.write_all(head).await.unwrap();
    let mut taken = 0;
    while taken < total && stream.write_all(piece).await.is_ok() {
        taken += piece.len() as u64;
    }
    (taken, all_of(stream).await)
}

#[tokio::test]
async fn a_gigabyte_is_refused_before_it_is_said() {
    const GIB: u64 = 1 << 30;
    let served = Served::manager().await;
    let before = resident();
    let zeros = vec![b' '; 64 << 10];
    let length = post(&format!("Content-Length: {GIB}\r\n"), "");
    let chunked = post("Transfer-Encoding: chunked\r\n", "");
    let chunk = [&b"10000\r\n"[..], &zeros, b"\r\n"].concat();
    for (what, head, piece) in [("by its length", &length, &zeros), ("in chunks", &chunked, &chunk)] {
        let attack = async {
            let poured = (0..4).map(|_| async { pour(served.dial().await, head, piece, GIB).await });
            join_all(poured).await
        };
        for (taken, answer) in served.is_well_during(&format!("1 GiB {what}"), attack).await {
            assert!(taken < 16 << 20, "{what}: {taken} bytes were taken");
            assert!(answer.starts_with("HTTP/1.1 413 "), "{what}: {answer}");
            assert!(answer.contains("it may have up to 4194304 bytes"), "{what}: {answer}");
        }
    }
    let growth = resident().saturating_sub(before);
    println!("4 times 1 GiB, twice: {} kB more in memory", growth >> 10);
    assert!(growth < GROWTH_MAX, "{growth} bytes");
}

#[tokio::test]
async fn what_is_no_sound_request_is_refused_and_the_next_one_served() {
    let served = Served::manager().await;
    let body = |body: &str| post(&format!("Content-Length: {}\r\n", body.len()), body);
    let (open, close) = ("[".repeat(10_000), "]".repeat(10_000));
    let objects = r#"{"a":"#.repeat(10_000);
    let many = "X-Many: y\r\n".repeat(10_000);
    let long = "y".repeat(1 << 20);
    let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let get = |more: &str| format!("GET /services HTTP/1.1\r\nHost: x\r\n{more}\r\n").into_bytes();
    let filters = format!("GET /services?filters={open} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    for (what, bytes, expected) in [
        ("deep arrays", body(&format!(r#"{{"TaskTemplate":{open}{close}}}"#)), &["400"][..]),
        (
            "deep arrays where anything goes",
            body(&format!(r#"{{"TaskTemplate":{{"PluginSpec":{open}"#)),
            &["400"],
        ),
        ("deep objects", body(&objects), &["400"]),
        ("deep filters", filters.into_bytes(), &["400"]),
        ("a header of 1 MiB", get(&format!("X: {long}\r\n")), &["431"]),
        ("10,000 headers", get(&many), &["431"]),
        ("a path of 1 MiB", format!("GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes(), &["414", "431"]),
        ("two lengths", post("Content-Length: 2\r\nContent-Length: 3\r\n", "{}"), &["400"]),
        ("no length", post("Content-Length: -1\r\n", "{}"), &["400"]),
        (
            "both ways of saying a length",
            post("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "{}"),
            &["400", ""],
        ),
        ("chunks that are none", post("Transfer-Encoding: chunked\r\n", "xyz\r\n{}"), &["400"]),
        ("noise", noise, &["400"]),
        ("TLS", vec![22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3], &["400", ""]),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &["400", "505", ""]),
        ("HTTP/0.9", b"GET /services\r\n\r\n".to_vec(), &["400", ""]),
    ] {
        let attack = async {
            let mut stream = served.dial().await;
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            all_of(stream).await
        };
        let answer = served.is_well_during(what, attack).await;
        let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).unwrap_or_default();
        assert!(expected.contains(&status), "{what}: {answer}");
    }
}

#[tokio::test]
async fn a_thousand_requests_in_one_breath_are_answered_one_after_the_other() {
    let served = Served::manager().await;
    let one = b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n";
    let attack = async {
        let (mut reading, mut writing) = served.dial().await.into_split();
        let saying = async {
            writing.write_all(&one.repeat(999)).await.unwrap();
            writing.write_all(&request("/_ping")).await.unwrap();
            writing
        };
        let hearing = async {
            let mut all = Vec::new();
            reading.read_to_end(&mut all).await.unwrap();
            String::from_utf8(all).unwrap()
        };
        timeout(PATIENCE, async { tokio::join!(saying, hearing).1 }).await.unwrap()
    };
    let answers = served.is_well_during("1,000 requests at once on one connection", attack).await;
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 1000);
}

#[tokio::test]
async fn half_closed_connections_end() {
    let served = Served::manager().await;
    let whole = request("/services");
    for (what, said) in [("nothing", &[][..]), ("half a head", &whole[..20]), ("a request", &whole[..])] {
        let attack = async {
            let all = (0..64).map(|_| async {
                let mut stream = served.dial().await;
                stream.write_all(said).await.unwrap();
                stream.shutdown().await.unwrap();
                all_of(stream).await
            });
            join_all(all).await
        };
        served.is_well_during(&format!("64 half-closed connections that said {what}"), attack).await;
    }
}

#[tokio::test]
async fn two_thousand_connections_at_once_are_served() {
    let served = Served::manager().await;
    let (began, path) = (Instant::now(), served.path.clone());
    // On a thread of its own, which is held up by the kernel's queue alone: each has said its request once it is there.
    let clients = move || {
        let dial = |_| {
            let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
            let _ = stream.write_all(&request("/_ping"));
            stream
        };
        let streams: Vec<_> = (0..2000).map(dial).collect();
        let is_answered = |mut stream: std::os::unix::net::UnixStream| {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).is_ok() && answer.ends_with("OK")
        };
        streams.into_iter().map(is_answered).filter(|is_answered| *is_answered).count()
    };
    let attack = tokio::task::spawn_blocking(clients);
    let answered = served.is_well_during("2,000 connections at once", attack).await.unwrap();
    println!("2,000 connections at once: {answered} answered in {:?}", began.elapsed());
    // One whose thread rests for long between its two steps looks as if it had nothing to say.
    assert!(answered >= 1900, "{answered} are answered");
}

#[tokio::test]
async fn those_that_dribble_their_heads_give_way() {
    let served = Served::manager().await;
    let room = Limits::PRODUCT.connections;
    let until = Instant::now() + 6 * Limits::PRODUCT.grace;
    // More than there is room for, each of which says a byte of a header now and then.
    let slow = async || {
        let mut stream = served.dial().await;
        let mut said = stream.write_all(b"GET /services HTTP/1.1\r\nX-Slow: ").await;
        while Instant::now() < until && said.is_ok() {
            sleep(Duration::from_millis(200)).await;
            said = stream.write_all(b"y").await;
        }
        said.is_ok()
    };
    let attack = async { join_all((0..room + 88).map(|_| slow())).await };
    let left = served.is_well_during("600 connections that dribble their heads", attack).await;
    let left = left.into_iter().filter(|stays| *stays).count();
    assert!(left <= room, "{left} are left of them");
}

#[tokio::test]
async fn a_head_and_a_body_that_don_t_come_are_not_waited_for() {
    let short = Duration::from_millis(300);
    let limits = Limits { head: short, body: short, large_bodies: 1, ..Limits::PRODUCT };
    let served = Served::answers(limits).await;
    let long = "x".repeat(SMALL_BODY_BYTES + 1);
    let cases = [
        ("nothing", Vec::new(), ""),
        ("half a head", request("/services")[..30].to_vec(), ""),
        ("half a body", post("Content-Length: 9\r\n", "{"), "408"),
        ("half a long body", post("Content-Length: 999999\r\n", &long), "408"),
        ("another one", post("Content-Length: 999999\r\n", &long), "408"),
    ];
    let attack = join_all(cases.iter().map(|(_, said, _)| async {
        let mut stream = served.dial().await;
        stream.write_all(said).await.unwrap();
        all_of(stream).await
    }));
    let answers = served.is_well_during("heads and bodies that stop", attack).await;
    for ((what, _, expected), answer) in cases.iter().zip(answers) {
        let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).unwrap_or_default();
        assert_eq!(status, *expected, "{what}: {answer}");
    }
}

#[tokio::test]
async fn who_takes_no_answer_gives_way_and_who_takes_it_slowly_gets_it_where_nobody_waits() {
    let leisure = Duration::from_millis(200);
    let limits = Limits { requests: 4, leisure, head: leisure, ..Limits::PRODUCT };
    let served = Served::answers(limits).await;
    let attack = async {
        let mut all = Vec::new();
        for _ in 0..32 {
            let mut stream = served.dial().await;
            stream.write_all(&request("/large")).await.unwrap();
            all.push(stream);
        }
        for _ in 0..20 {
            served.is_well().await;
        }
        all
    };
    let held = served.is_well_during("32 clients that take no answer", attack).await;
    drop(held);
    // Slower than a head may be, since that is another limit.
    let mut stream = served.dial().await;
    stream.write_all(&request("/large")).await.unwrap();
    let (mut taken, mut piece) = (0, vec![0; LARGE / 8]);
    loop {
        sleep(leisure).await;
        match timeout(PATIENCE, stream.read(&mut piece)).await.unwrap().unwrap() {
            0 => break,
            len => taken += len,
        }
    }
    assert!(taken > LARGE, "{taken} bytes of {LARGE}");
}

#[tokio::test]
async fn streams_are_counted_and_end_where_nobody_takes_them() {
    let stalled = Duration::from_millis(500);
    let limits = Limits { streams: 4, requests: 2, stalled, ..Limits::PRODUCT };
    let served = Served::answers(limits).await;
    let before = resident();
    let attack = async {
        let mut all = Vec::new();
        for number in 0..6 {
            let mut stream = served.dial().await;
            stream.write_all(&request("/flood")).await.unwrap();
            let mut start = [0; 12];
            timeout(PATIENCE, stream.read_exact(&mut start)).await.unwrap().unwrap();
            let expected: &[u8] = if number < 4 { b"HTTP/1.1 200" } else { b"HTTP/1.1 503" };
            assert_eq!(start, expected, "stream {number}");
            all.push(stream);
        }
        let refused = all_of(all.pop().unwrap()).await;
        assert!(refused.contains("4 streams of events are open"), "{refused}");
        // They end, and there is room for another.
        let another = async {
            loop {
                let mut stream = served.dial().await;
                stream.write_all(&request("/flood")).await.unwrap();
                let mut start = [0; 12];
                stream.read_exact(&mut start).await.unwrap();
                if &start == b"HTTP/1.1 200" {
                    break;
                }
                sleep(stalled / 10).await;
            }
        };
        timeout(PATIENCE, another).await.expect("they go on");
    };
    served.is_well_during("streams that nobody takes", attack).await;
    let growth = resident().saturating_sub(before);
    assert!(growth < GROWTH_MAX, "{growth} bytes");
}

#[tokio::test]
async fn a_backup_may_be_longer_than_other_bodies_and_is_the_only_one() {
    let served = Served::answers(Limits::PRODUCT).await;
    let restore = |body: &str| {
        let head = "POST /shoal/v1/restore HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
        format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    let long = "x".repeat(BODY_BYTES_MAX + 1);
    let answer = served.ask(&restore(&long)).await;
    assert!(answer.ends_with("\r\n4194305 bytes"), "{answer}");
    let mut first = served.dial().await;
    first.write_all(&restore(&long)[..LARGE]).await.unwrap();
    let attack = async {
        let answer = served.ask(&restore("x")).await;
        assert!(answer.contains("another backup is being restored already"), "{answer}");
    };
    served.is_well_during("a backup that stops amid", attack).await;
    drop(first);
}

#[tokio::test]
async fn work_that_does_not_end_is_given_up() {
    let work = Duration::from_millis(300);
    let limits = Limits { work, requests: 2, turn: Duration::from_millis(100), ..Limits::PRODUCT };
    let served = Served::answers(limits).await;
    let asked = join_all((0..3).map(|_| async { served.ask(&request("/slow")).await })).await;
    let says = |text: &str| asked.iter().filter(|answer| answer.contains(text)).count();
    assert_eq!((says("took longer than"), says("busy with 2 other requests")), (2, 1), "{asked:?}");
    served.is_well().await;
}
