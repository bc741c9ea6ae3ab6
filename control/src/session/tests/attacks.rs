//! Attacks on the managers' port that are more than a wrong certificate, and what the nodes beside see of them.

use std::net::Ipv4Addr;
use std::time::Instant;

use futures::FutureExt as _;
use futures::future::join_all;
use mesh_api::tls::{Alpn, Shared, connect, join_config};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls;

use super::port::{Port, drained, from};
use super::*;
use crate::cluster::Place;
use crate::managers::{self, Wire};
use crate::pki::first_manager;
use crate::raft::{Call, Manager, Request, Response, Transport as _};
use crate::session::Listener;
use crate::session::listener::RAFT_STREAMS_MAX;
use crate::testing::{raise_open_files, resident};

/// How long anything may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a node may wait amid an attack. On an idle machine it is some ms.
const HONEST_MAX: Duration = Duration::from_secs(10);
const GIB: u32 = 1 << 30;

fn framed(message: &AgentMessage) -> Vec<u8> {
    frame(&serde_json::to_string(message).unwrap())
}

fn frame(body: &str) -> Vec<u8> {
    [&(body.len() as u32).to_be_bytes()[..], body.as_bytes()].concat()
}

/// What is no message, as it comes after the handshake.
fn nonsense() -> Vec<(&'static str, Vec<u8>)> {
    let deep = "[".repeat(10_000);
    let objects = r#"{"a":"#.repeat(10_000);
    let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    vec![
        ("a frame of 1 GiB", [&GIB.to_be_bytes()[..], b"{"].concat()),
        ("the longest frame", u32::MAX.to_be_bytes().to_vec()),
        ("deep arrays", frame(&deep)),
        ("deep arrays in a message", frame(&format!(r#"{{"type":"resume","node":{deep}"#))),
        ("deep objects", frame(&objects)),
        ("no JSON", frame("SWMTKN")),
        ("no text", frame("\u{0}\u{7f}")),
        ("an empty frame", vec![0; 4]),
        ("noise", noise),
    ]
}

/// Says `bytes`, and then goes on and on; how much of that was taken, bytes.
async fn pour(stream: TlsStream<TcpStream>, bytes: &[u8]) -> u64 {
    let (reading, mut writing) = tokio::io::split(stream);
    let pouring = async {
        let mut taken = 0;
        let mut said = writing.write_all(bytes).await;
        while said.is_ok() && taken < u64::from(GIB) {
            said = writing.write_all(&[b' '; 16 << 10]).await;
            taken += 16 << 10;
        }
        taken
    };
    tokio::time::timeout(PATIENCE, async { tokio::join!(pouring, drained(reading)).0 }).await.unwrap()
}

/// Changes the table, and waits until the node has heard of it; how long that took.
async fn is_well(port: &Port, beside: &mut FakeAgent, number: usize) -> Duration {
    let began = Instant::now();
    let name = format!("web-{number}");
    let create = Action::CreateService { id: name.as_str().into(), spec: Box::new(service(&name, 0)) };
    port.cluster.propose(Command::now(create)).await.unwrap();
    let knows = |agent: &FakeAgent| {
        agent.table.as_ref().is_some_and(|table| table.services.contains_key(&name.as_str().into()))
    };
    beside.until(knows).await;
    began.elapsed()
}

#[tokio::test]
async fn what_is_no_message_is_refused_before_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let worker = port.join(&port.token(), "n1").await.unwrap();
    let mut beside = port.resume(&worker, "n1").await;
    let other = port.join(&port.token(), "n2").await.unwrap();
    let (mut slowest, mut number) = (Duration::ZERO, 0);
    for (what, bytes) in nonsense() {
        let join = join_config(&port.token()).unwrap();
        let session = other.client_config(Alpn::Session).unwrap();
        let readmit = other.roots.client_config(Alpn::Readmit).unwrap();
        let peers = [("a host that joins", join), ("a node", session), ("one that comes back", readmit)];
        for (to, config) in peers {
            let attack = async {
                let taken = pour(port.tls(config).await.unwrap(), &bytes).await;
                assert!(taken < 16 << 20, "{what}, from {to}: {taken} bytes were taken");
            };
            port.refuses(&format!("{what}, from {to}"), Cause::Message, attack).await;
        }
        // Within a session, which ends of it.
        let stream = port.tls(other.client_config(Alpn::Session).unwrap()).await.unwrap();
        let taken = pour(stream, &[framed(&resume("n2", None)), bytes].concat()).await;
        assert!(taken < 16 << 20, "{what}, in a session: {taken} bytes were taken");
        number += 1;
        slowest = slowest.max(is_well(&port, &mut beside, number).await);
    }
    println!("{number} kinds of nonsense: a node beside heard of each change within {slowest:?}");
    assert!(slowest < HONEST_MAX, "{slowest:?}");
    port.close().await;
}

#[tokio::test]
async fn a_manager_that_talks_nonsense_is_hung_up_on() {
    let dir = tempfile::tempdir().unwrap();
    let (listener, credential) =
        (TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(), Shared::default());
    let addr = listener.local_addr().unwrap();
    let own = Manager { node: "m1".into(), addr };
    let wire = Arc::new(Wire::new(credential.clone()));
    let place = Place { manager: own.clone(), transport: Arc::clone(&wire) as _, ..Place::default() };
    let cluster = Cluster::create_at(dir.path(), InitRequest::default(), place).await.unwrap();
    let first = first_manager(&cluster, "m1".into(), description("m1")).await.unwrap();
    let config = first.credential.client_config(Alpn::Raft).unwrap();
    credential.set(Some(Arc::new(first.credential)));
    let serving = tokio::spawn(managers::serve(cluster.clone(), credential, listener));
    for (what, bytes) in nonsense() {
        let stream = connect(TcpStream::connect(addr).await.unwrap(), Arc::clone(&config)).await.unwrap();
        let taken = pour(stream, &bytes).await;
        assert!(taken < 16 << 20, "{what}: {taken} bytes were taken");
        let (from, to) = (cluster.raft_id(), cluster.raft_id());
        let answer = wire.call(&own, Request { from, to, call: Call::ReadIndex }).await;
        assert!(matches!(answer, Ok(Response::ReadIndex(_))), "{what}: {answer:?}");
    }
    serving.abort();
    let _ = serving.await;
    cluster.shutdown().await;
}

#[tokio::test]
async fn other_managers_have_so_many_streams() {
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let worker = port.join(&port.token(), "n1").await.unwrap();
    let mut beside = port.resume(&worker, "n1").await;
    // Serves each for as long as its peer holds it.
    let holds = Arc::new(|mut stream: Box<dyn crate::session::Stream>, _: Peer| {
        async move { drop(stream.read_u8().await) }.boxed()
    });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let held = Listener::new(Arc::clone(&port.server), port.credential.clone()).with_raft(holds);
    let serving = tokio::spawn(held.serve(listener));
    let config = port.credential.get().unwrap().client_config(Alpn::Raft).unwrap();
    let dial = async || connect(TcpStream::connect(addr).await.unwrap(), Arc::clone(&config)).await.unwrap();
    let mut streams = Vec::new();
    let attack = async {
        for _ in 0..=RAFT_STREAMS_MAX {
            streams.push(dial().await);
        }
    };
    port.refuses("a stream too many", Cause::Crowded, attack).await;
    let waited = is_well(&port, &mut beside, 1).await;
    assert!(waited < HONEST_MAX, "{waited:?}");
    drop(streams);
    // There is room again: one is held that says nothing.
    let free = async {
        while tokio::time::timeout(Duration::from_millis(200), dial().await.read_u8()).await.is_ok() {}
    };
    tokio::time::timeout(PATIENCE, free).await.expect("no stream is served any more");
    serving.abort();
    port.close().await;
}

#[tokio::test]
async fn who_never_reads_is_hung_up_on_and_the_others_hear_of_every_change() {
    let dir = tempfile::tempdir().unwrap();
    // Little fits between the two.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(4096).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let cluster = Cluster::create(dir.path(), InitRequest::default()).await.unwrap();
    let first = first_manager(&cluster, "m1".into(), description("m1")).await.unwrap();
    let port = Port::open_at(socket.listen(64).unwrap(), cluster, first.credential);
    let worker = port.join(&port.token(), "n1").await.unwrap();
    let mut beside = port.resume(&worker, "n1").await;
    let deaf = port.join(&port.token(), "n2").await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream =
        connect(socket.connect(port.addr).await.unwrap(), deaf.client_config(Alpn::Session).unwrap());
    let node = deaf.identity.peer();
    let mut agent = FakeAgent::over(stream.await.unwrap(), tokio::spawn(async { Ok(()) }), node);
    agent.say(resume("n2", None)).await;
    let is_connected = || port.server.registry().is_connected(&node.node);
    let before = resident();
    let (mut slowest, mut number, began) = (Duration::ZERO, 0, Instant::now());
    while number == 0 || is_connected() {
        assert!(began.elapsed() < PATIENCE, "it is served still");
        number += 1;
        slowest = slowest.max(is_well(&port, &mut beside, number).await);
        // It goes on saying that it is there.
        let _ = agent.writer.send(&AgentMessage::Alive).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!(
        "one that never reads: gone after {:?} and {number} changes, of each of which another heard within {slowest:?}; {} kB \
         more in memory",
        began.elapsed(),
        resident().saturating_sub(before) >> 10
    );
    assert!(slowest < HONEST_MAX, "{slowest:?}");
    port.close().await;
}

#[tokio::test]
async fn two_thousand_slow_handshakes_hold_nobody_up() {
    raise_open_files();
    let dir = tempfile::tempdir().unwrap();
    let port = Port::new(dir.path()).await;
    let worker = port.join(&port.token(), "n1").await.unwrap();
    let mut beside = port.resume(&worker, "n1").await;
    let hello = hello(&worker);
    let dribble = async |number: usize| {
        let source = Ipv4Addr::new(127, 0, 9, (number % 4) as u8 + 1);
        let mut stream = from(source.into(), port.addr).await;
        for byte in &hello {
            if stream.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        drained(stream).await;
    };
    let flood = join_all((0..2000).map(dribble));
    let honest = async {
        let mut slowest = Duration::ZERO;
        for number in 1..=10 {
            slowest = slowest.max(is_well(&port, &mut beside, number).await);
            let began = Instant::now();
            let hostname = format!("new-{number}");
            let joined = port.join(&port.token(), &hostname).await.unwrap();
            drop(port.resume(&joined, &hostname).await);
            slowest = slowest.max(began.elapsed());
        }
        println!("2,000 slow handshakes: hosts joined, and a node heard of changes, within {slowest:?}");
        assert!(slowest < HONEST_MAX, "{slowest:?}");
    };
    tokio::time::timeout(PATIENCE, async { tokio::join!(flood, honest) }).await.expect("some are held");
    let refusals = port.server.refusals();
    println!("2,000 slow handshakes: refused as {:?}", refusals.counted());
    assert_eq!(
        refusals.get(Cause::Crowded) + refusals.get(Cause::Slow) + refusals.get(Cause::Handshake),
        2000
    );
    assert_eq!(port.server.slots.len(), 0);
    port.close().await;
}

/// How a node begins its handshake.
fn hello(credential: &Credential) -> Vec<u8> {
    let name = mesh_api::tls::SERVER_NAME.try_into().unwrap();
    let config = credential.client_config(Alpn::Session).unwrap();
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}
