//! The session against a manager played by the test, over real sockets.

use std::net::Ipv4Addr;

use mesh_api::codec::{AGENT_FRAME_BYTES_MAX, FrameReader, FrameWriter};
use mesh_api::table::{Change, ClusterRecord, Delta, NodeRecord, NodeState, Role, TaskState};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use super::*;

struct Peer {
    reader: FrameReader<OwnedReadHalf, AgentMessage>,
    writer: FrameWriter<OwnedWriteHalf, ManagerMessage>,
}

impl Peer {
    async fn accept(listener: &TcpListener) -> Self {
        let (stream, _): (TcpStream, _) = listener.accept().await.unwrap();
        let (read, write) = stream.into_split();
        Self { reader: FrameReader::new(read, AGENT_FRAME_BYTES_MAX), writer: FrameWriter::new(write) }
    }

    /// The next message that is not a heartbeat.
    async fn next(&mut self) -> Option<AgentMessage> {
        loop {
            match self.reader.next().await.unwrap() {
                Some(AgentMessage::Alive) => {}
                other => return other,
            }
        }
    }

    async fn send(&mut self, message: ManagerMessage) {
        self.writer.send(&message).await.unwrap();
    }

    async fn resume(&mut self) {
        assert!(matches!(self.next().await, Some(AgentMessage::Resume { .. })));
        self.send(ManagerMessage::Resumed { cluster_id: "c".into(), role: Role::Worker }).await;
    }
}

fn table(index: u64) -> Table {
    let cluster = ClusterRecord { id: "c".into(), hash_seed: 1, data_path_port: 4789 };
    Table { index, ..Table::new(cluster) }
}

fn node() -> NodeRecord {
    let vtep = Ipv4Addr::new(192, 0, 2, 1);
    NodeRecord { id: "n".into(), hostname: "h".to_owned(), role: Role::Worker, vtep, state: NodeState::Ready }
}

fn status(state: TaskState) -> TaskStatus {
    let (message, err) = Default::default();
    TaskStatus { task: "t".into(), state, since_ns: 1, message, err, pid: None, exit_code: None }
}

async fn start() -> (Session, TcpListener, tempfile::TempDir) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let membership = Membership {
        cluster_id: "c".into(),
        node_id: "n".into(),
        role: Role::Worker,
        advertise: Ipv4Addr::LOCALHOST,
        data_path: Ipv4Addr::LOCALHOST,
        remotes: vec![listener.local_addr().unwrap()],
    };
    let credentials = Arc::new(Mutex::new(Credentials { membership, secret: "s".to_owned() }));
    let describe = Describe::new("h".to_owned());
    let session = Session::start(Store::new(folder.path()), credentials, describe, None, None);
    (session, listener, folder)
}

async fn index_becomes(session: &mut Session, index: u64) {
    let reached = |table: &Option<Arc<Table>>| table.as_ref().is_some_and(|table| table.index == index);
    timeout(Duration::from_secs(5), session.tables.wait_for(reached)).await.unwrap().unwrap();
}

#[tokio::test]
async fn snapshots_and_deltas_make_the_table_and_a_gap_starts_over() {
    let (mut session, listener, _folder) = start().await;
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    manager.send(ManagerMessage::Snapshot { table: Box::new(table(5)) }).await;
    index_becomes(&mut session, 5).await;
    let delta = |from, to| Delta { from, to, changes: vec![Change::Node(node())] };
    manager.send(ManagerMessage::Delta { delta: delta(5, 6) }).await;
    manager.send(ManagerMessage::Settled { index: 6 }).await;
    index_becomes(&mut session, 6).await;
    timeout(Duration::from_secs(5), session.settled.wait_for(|index| *index == 6)).await.unwrap().unwrap();
    assert_eq!(session.tables.borrow().as_ref().unwrap().nodes.len(), 1);

    manager.send(ManagerMessage::Delta { delta: delta(9, 10) }).await;
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    manager.send(ManagerMessage::Snapshot { table: Box::new(table(10)) }).await;
    index_becomes(&mut session, 10).await;
}

#[tokio::test]
async fn what_was_said_is_said_again_to_the_next_manager() {
    let (session, listener, _folder) = start().await;
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    session.applied.send_replace(Some(7));
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 7 }));
    let report = |state| {
        session.statuses.send_modify(|statuses| drop(statuses.insert("t".into(), status(state))));
    };
    report(TaskState::Running);
    let running = AgentMessage::Tasks { statuses: vec![status(TaskState::Running)] };
    assert_eq!(manager.next().await, Some(running.clone()));
    // The same again is not worth a message.
    report(TaskState::Running);
    session.applied.send_replace(Some(8));
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 8 }));
    drop(manager);

    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    let said = [manager.next().await.unwrap(), manager.next().await.unwrap()];
    assert!(said.contains(&AgentMessage::Applied { index: 8 }) && said.contains(&running), "{said:?}");
}

#[tokio::test]
async fn a_refusal_shows_and_a_farewell_is_said() {
    let (mut session, listener, _folder) = start().await;
    let mut manager = Peer::accept(&listener).await;
    assert!(manager.next().await.is_some());
    let message = "node n is not in the cluster".to_owned();
    manager
        .send(ManagerMessage::Refused { reason: RefusalReason::UnknownNode, message: message.clone() })
        .await;
    let refused = SessionState::Refused(RefusalReason::UnknownNode, message);
    session.state.wait_for(|state| *state == refused).await.unwrap();

    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    session.state.wait_for(|state| *state == SessionState::Connected).await.unwrap();
    let (said, ()) = tokio::join!(manager.next(), session.leave());
    assert_eq!(said, Some(AgentMessage::Leave));
}
