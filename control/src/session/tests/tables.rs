//! Whole tables on their way: slowly, and many at once.

use tokio::io::{AsyncReadExt as _, DuplexStream};
use tokio::time::{Instant, sleep};

use super::*;
use crate::session::TABLES_MAX;
use crate::session::peer::{SHORT_MAX, SILENCE_MAX};

const SERVICES: usize = 200;

/// A server whose table is much longer than the streams of these tests hold.
async fn server_of_many() -> (tempfile::TempDir, Arc<Server>) {
    server_of(SERVICES).await
}

async fn server_of(services: usize) -> (tempfile::TempDir, Arc<Server>) {
    let mut world = World::new(&[]);
    for number in 0..services {
        world.create_service(service(&format!("web{number}"), 1));
    }
    server_in_memory(&world).await
}

/// An agent without a table, on a stream that holds so many bytes that it has not taken.
async fn dial(server: &Arc<Server>, hostname: &str, bytes: usize) -> FakeAgent {
    let (stream, session, node) = dial_raw(server, hostname, bytes).await;
    let mut agent = FakeAgent::over(stream, session, &node);
    agent.say(resume(hostname, None)).await;
    agent
}

/// One that is told to wait for its turn.
async fn waiting(server: &Arc<Server>) -> FakeAgent {
    let mut agent = dial(server, "waiting", 1 << 20).await;
    agent.is_taken().await;
    assert!(matches!(agent.hear().await, Some(ManagerMessage::Alive)));
    agent
}

async fn dial_raw(
    server: &Arc<Server>,
    hostname: &str,
    bytes: usize,
) -> (DuplexStream, JoinHandle<Result<(), SessionError>>, Peer) {
    let node = enrol(server, hostname).await.identity.peer().clone();
    let (ours, theirs) = tokio::io::duplex(bytes);
    (ours, tokio::spawn(Arc::clone(server).handle(theirs, node.clone())), node)
}

#[tokio::test(start_paused = true)]
async fn one_that_takes_long_arrives_while_some_of_it_does() {
    let (_dir, server) = server_of_many().await;
    let (mut stream, session, _) = dial_raw(&server, "slow", 4096).await;
    let began = Instant::now();
    FrameWriter::new(&mut stream).send(&resume("slow", None)).await.unwrap();
    let mut taken = Vec::new();
    let table = loop {
        let mut some = [0; 4096];
        let count = stream.read(&mut some).await.unwrap();
        assert_ne!(count, 0, "it is given up after {:?}: {session:?}", began.elapsed());
        taken.extend_from_slice(&some[..count]);
        let mut frames = FrameReader::<_, ManagerMessage>::new(&taken[..], MANAGER_FRAME_BYTES_MAX);
        let mut table = None;
        while let Ok(Some(message)) = frames.next().await {
            if let ManagerMessage::Snapshot { table: whole } = message {
                table = Some(whole);
            }
        }
        if let Some(table) = table {
            break table;
        }
        sleep(SILENCE_MAX / 2).await;
        FrameWriter::new(&mut stream).send(&AgentMessage::Alive).await.unwrap();
    };
    assert_eq!(table.services.len(), SERVICES);
    assert!(began.elapsed() > SILENCE_MAX * 2, "it came at once: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_its_turn_hears_that_the_manager_lives() {
    let (_dir, server) = server_of_many().await;
    let mut stalled = Vec::new();
    for number in 0..TABLES_MAX {
        let mut agent = dial(&server, &format!("stalled{number}"), 4096).await;
        agent.is_taken().await;
        stalled.push(agent);
    }
    let mut waiting = waiting(&server).await;
    // A stalled one is given up in the end, and lets another one have its turn.
    let table = loop {
        match waiting.hear().await.expect("the session is up") {
            ManagerMessage::Snapshot { table } => break table,
            ManagerMessage::Alive => waiting.say(AgentMessage::Alive).await,
            other => panic!("unexpected: {other:?}"),
        }
    };
    assert_eq!(table.services.len(), SERVICES);
}

/// An agent that has the table and goes: who it is, and the index of its table.
async fn away(server: &Arc<Server>, hostname: &str) -> (Peer, u64) {
    let mut agent = dial(server, hostname, 1 << 20).await;
    agent.is_taken().await;
    agent.until(|agent| agent.table.is_some()).await;
    (agent.node, agent.table.unwrap().index)
}

/// Has it come back, and returns it with what it hears first.
async fn back(
    server: &Arc<Server>,
    (node, index): &(Peer, u64),
    hostname: &str,
) -> (FakeAgent, ManagerMessage) {
    let mut agent = FakeAgent::dial(server, node);
    agent.say(resume(hostname, Some(*index))).await;
    agent.is_taken().await;
    let first = agent.hear().await.expect("the session is up");
    (agent, first)
}

#[tokio::test]
async fn much_to_catch_up_with_takes_a_turn_and_little_takes_none() {
    let (_dir, server) = server_of(SHORT_MAX + 1).await;
    let cluster = server.cluster.clone();
    let far = away(&server, "far").await;
    let present = cluster.state().cluster.clone().unwrap();
    let mut spec = present.spec.clone();
    spec.labels.insert("shoal.return".into(), "direct".into());
    let action = Action::UpdateCluster {
        version: present.meta.version,
        spec,
        worker_secret: None,
        manager_secret: None,
        rotation: None,
        unlock_key: None,
    };
    cluster.propose(Command::now(action)).await.unwrap();
    let near = away(&server, "near").await;
    cluster.propose(Command::now(Action::RotateKeys)).await.unwrap();

    let turns = server.tables.acquire_many(TABLES_MAX as u32).await.unwrap();
    let (_near, first) = back(&server, &near, "near").await;
    assert!(matches!(first, ManagerMessage::Delta { .. }), "{first:?}");
    let (mut far, first) = back(&server, &far, "far").await;
    assert!(matches!(first, ManagerMessage::Alive), "{first:?}");
    drop(turns);
    let changes = loop {
        match far.hear().await.expect("the session is up") {
            ManagerMessage::Delta { delta } => break delta.changes,
            ManagerMessage::Alive => {}
            other => panic!("unexpected: {other:?}"),
        }
    };
    assert!(changes.len() > SHORT_MAX, "{}", changes.len());
}

#[tokio::test]
async fn whoever_waits_for_its_turn_is_sent_on_once_another_manager_leads() {
    let (_dir, server) = server_of_many().await;
    let turns = server.tables.acquire_many(TABLES_MAX as u32).await.unwrap();
    let mut waiting = waiting(&server).await;
    server.resign();
    loop {
        match waiting.hear().await {
            Some(ManagerMessage::Alive) => {}
            Some(ManagerMessage::Moved { .. }) => break,
            other => panic!("unexpected: {other:?}"),
        }
    }
    drop(turns);
}

#[tokio::test]
async fn a_node_that_is_removed_while_it_waits_for_its_turn_hears_of_it() {
    let (_dir, server) = server_of_many().await;
    let turns = server.tables.acquire_many(TABLES_MAX as u32).await.unwrap();
    let mut waiting = waiting(&server).await;
    let id = waiting.node.node.clone();
    server.cluster.propose(Command::now(Action::RemoveNode { id, force: true })).await.unwrap();
    drop(turns);
    assert_eq!(waiting.until_refused().await, RefusalReason::UnknownNode);
}
