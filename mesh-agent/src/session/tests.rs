//! The session against a manager played by the test, over real sockets.

use std::net::Ipv4Addr;

use mesh_api::codec::{AGENT_FRAME_BYTES_MAX, FrameReader, FrameWriter};
use mesh_api::table::{
    Change, ClusterRecord, Delta, NodeRecord, NodeState, ReturnPath, Role, ServiceRecord, TaskState,
};
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
    let (data_path_port, return_path) = (4789, ReturnPath::Tunnel);
    let cluster = ClusterRecord { id: "c".into(), hash_seed: 1, data_path_port, return_path, key_epoch: 0 };
    Table { index, ..Table::new(cluster) }
}

fn node() -> NodeRecord {
    let vtep = Ipv4Addr::new(192, 0, 2, 1).into();
    let (id, hostname, role, state) = ("n".into(), "h".to_owned(), Role::Worker, NodeState::Ready);
    NodeRecord { id, hostname, role, vtep, state, wireguard: Vec::new() }
}

fn status(state: TaskState) -> TaskStatus {
    let (message, err) = Default::default();
    TaskStatus { task: "t".into(), state, since_ns: 1, message, err, pid: None, exit_code: None }
}

async fn start() -> (Session, TcpListener, tempfile::TempDir) {
    start_as(Describe::new("h".to_owned())).await
}

async fn start_as(describe: Describe) -> (Session, TcpListener, tempfile::TempDir) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let membership = Membership {
        cluster_id: "c".into(),
        node_id: "n".into(),
        role: Role::Worker,
        advertise: Ipv4Addr::LOCALHOST.into(),
        data_path: Ipv4Addr::LOCALHOST.into(),
        remotes: vec![listener.local_addr().unwrap()],
    };
    let credentials = Arc::new(Mutex::new(Credentials { membership, secret: "s".to_owned() }));
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

fn service(id: &str) -> ServiceRecord {
    ServiceRecord {
        id: id.into(),
        name: id.to_owned(),
        stack: "".into(),
        endpoint_mode: mesh_api::table::EndpointMode::Vip,
        vips: Vec::new(),
        ports: Vec::new(),
        balancing: mesh_api::table::BalancingRecord::default(),
    }
}

#[tokio::test]
async fn what_changed_is_told_and_on_the_disk_before_the_table_is_handed_on() {
    let (mut session, listener, folder) = start().await;
    let store = Store::new(folder.path());
    let touched = |session: &Session| std::mem::take(&mut *session.touched.lock().unwrap());
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    manager.send(ManagerMessage::Snapshot { table: Box::new(table(5)) }).await;
    index_becomes(&mut session, 5).await;
    assert_eq!(store.load_table(), Some(table(5)));
    assert!(touched(&session).all);

    let changes = vec![Change::Service(service("a"))];
    manager.send(ManagerMessage::Delta { delta: Delta { from: 5, to: 6, changes } }).await;
    index_becomes(&mut session, 6).await;
    assert_eq!(store.load_table(), session.tables.borrow().as_deref().cloned());
    let of_service = Touched { services: ["a".into()].into(), ..Touched::default() };
    assert_eq!(touched(&session), of_service);
    drop(manager);

    // What the next manager has is taken by its differences.
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    let same = session.tables.borrow().as_deref().cloned().unwrap();
    let mut next = Table { index: 9, ..same };
    next.services.insert("b".into(), service("b"));
    manager.send(ManagerMessage::Snapshot { table: Box::new(next.clone()) }).await;
    index_becomes(&mut session, 9).await;
    assert_eq!(store.load_table(), Some(next));
    assert_eq!(touched(&session), Touched { services: ["b".into()].into(), ..Touched::default() });
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
async fn a_host_that_changes_is_described_anew() {
    let describe = Describe::new("h".to_owned());
    let (session, listener, _folder) = start_as(describe.clone()).await;
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    let addr = Ipv4Addr::LOCALHOST.into();
    for mode in ["xdp-generic", "tc"] {
        describe.set_dataplane(&[("eth0".to_owned(), mode)]);
        let node = describe.describe(addr, addr);
        assert_eq!(node.dataplane, format!("eth0={mode}"));
        assert_eq!(manager.next().await, Some(AgentMessage::Described { node }));
    }
    // The same again is not worth a message.
    describe.set_dataplane(&[("eth0".to_owned(), "tc")]);
    session.applied.send_replace(Some(1));
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 1 }));
    drop(manager);

    // The next manager is told in the greeting, and not once more.
    let mut manager = Peer::accept(&listener).await;
    let Some(AgentMessage::Resume { node, .. }) = manager.next().await else { panic!("not resumed") };
    assert_eq!(node, describe.describe(addr, addr));
    manager.send(ManagerMessage::Resumed { cluster_id: "c".into(), role: Role::Worker }).await;
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 1 }));
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

#[tokio::test]
async fn attachments_are_asked_for_once_and_a_session_that_ends_answers_none() {
    let (mut session, listener, _folder) = start().await;
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    session.state.wait_for(|state| *state == SessionState::Connected).await.unwrap();
    let spec = AttachmentSpec {
        network: "front".to_owned(),
        name: "db".to_owned(),
        aliases: Vec::new(),
        addr: Some(Ipv4Addr::new(10, 0, 1, 9)),
    };
    let call = |id: &str| {
        let (answer, answered) = oneshot::channel();
        session.calls.try_send(AttachCall { id: id.into(), spec: spec.clone(), answer }).unwrap();
        answered
    };
    let asked = |id: &str| Some(AgentMessage::Attach { id: id.into(), spec: spec.clone() });
    let (first, second) = (call("a1"), call("a2"));
    assert_eq!((manager.next().await, manager.next().await), (asked("a1"), asked("a2")));
    let refused = AttachRefused {
        reason: mesh_api::session::AttachRefusedReason::Conflict,
        message: "name: it is another's".to_owned(),
    };
    for (id, refused) in [("a2", Some(refused.clone())), ("a3", None), ("a1", None)] {
        manager.send(ManagerMessage::Attached { id: id.into(), refused }).await;
    }
    assert_eq!((first.await.unwrap(), second.await.unwrap()), (Ok(()), Err(refused)));

    let lost = call("a4");
    assert_eq!(manager.next().await, asked("a4"));
    drop(manager);
    assert!(lost.await.is_err());
    // Who no longer waits is not asked for.
    drop(call("a5"));
    let mut manager = Peer::accept(&listener).await;
    manager.resume().await;
    let _waiting = call("a6");
    assert_eq!(manager.next().await, asked("a6"));
}
