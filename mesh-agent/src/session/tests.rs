//! The session against a manager played by the test, over real sockets.

mod locked;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::SystemTime;

use mesh_api::codec::{AGENT_FRAME_BYTES_MAX, FrameReader, FrameWriter};
use mesh_api::session::{JoinAnswer, JoinRequest, ReadmitAnswer, ReadmitRequest};
use mesh_api::table::{
    Change, ClusterRecord, Delta, NodeRecord, NodeState, ReturnPath, Role, ServiceRecord, TaskState,
};
use mesh_api::tls::testing::{Ca, Wanted};
use mesh_api::tls::{self, Alpn, Binding, Credential, Former, KeyRequest, Roots};
use mesh_api::token::JoinToken;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::*;

/// The manager's end of a session.
struct Peer {
    reader: FrameReader<ReadHalf<TlsStream<TcpStream>>, AgentMessage>,
    writer: FrameWriter<WriteHalf<TlsStream<TcpStream>>, ManagerMessage>,
    roots: Roots,
    /// The agent, as its certificate says.
    node: tls::Peer,
}

/// The manager's port, and its CA.
struct Port {
    listener: TcpListener,
    ca: Ca,
}

impl Port {
    async fn new() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap(), ca: Ca::new() }
    }

    fn addr(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// The next stream, or why its handshake failed.
    async fn stream(&self) -> io::Result<TlsStream<TcpStream>> {
        let Credential { identity, roots } = self.ca.credential(&Wanted::new("m", Role::Manager, "c"));
        let config = tls::server_config(&identity, &roots, &Alpn::ALL).unwrap();
        let (stream, _) = self.listener.accept().await.unwrap();
        TlsAcceptor::from(config).accept(stream).await
    }
}

impl Peer {
    async fn accept(port: &Port) -> Self {
        let stream = port.stream().await.unwrap();
        let node = tls::peer_of(stream.get_ref().1.peer_certificates()).unwrap().unwrap();
        let (read, write) = tokio::io::split(stream);
        let (reader, writer) = (FrameReader::new(read, AGENT_FRAME_BYTES_MAX), FrameWriter::new(write));
        Self { reader, writer, roots: port.ca.roots(), node }
    }

    /// The next message, but for heartbeats and how the node is.
    async fn next(&mut self) -> Option<AgentMessage> {
        loop {
            match self.reader.next().await.unwrap() {
                Some(AgentMessage::Alive | AgentMessage::Health { .. }) => {}
                other => return other,
            }
        }
    }

    /// How the node is, as it says next.
    async fn health(&mut self) -> NodeHealth {
        loop {
            match self.reader.next().await.unwrap() {
                Some(AgentMessage::Health { health }) => return health,
                Some(_) => {}
                None => panic!("the session has ended"),
            }
        }
    }

    async fn send(&mut self, message: ManagerMessage) {
        self.writer.send(&message).await.unwrap();
    }

    async fn resume(&mut self) {
        assert!(matches!(self.next().await, Some(AgentMessage::Resume { .. })));
        self.greet().await;
    }

    async fn greet(&mut self) {
        let roots = self.roots.to_pem();
        self.send(ManagerMessage::Resumed { cluster_id: "c".into(), role: Role::Worker, roots }).await;
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
    NodeRecord { id, hostname, role, vtep, state, wireguard: Vec::new(), manager: None }
}

fn status(state: TaskState) -> TaskStatus {
    let (message, err) = Default::default();
    TaskStatus { task: "t".into(), state, since_ns: 1, message, err, pid: None, exit_code: None }
}

async fn start() -> (Session, Port, tempfile::TempDir) {
    start_as(Describe::new("h".to_owned())).await
}

async fn start_as(describe: Describe) -> (Session, Port, tempfile::TempDir) {
    let port = Port::new().await;
    let credential = port.ca.credential(&Wanted::new("n", Role::Worker, "c"));
    let (session, folder) = session_of(&port, credential, describe, Shared::default());
    (session, port, folder)
}

fn membership(port: &Port) -> Membership {
    Membership {
        cluster_id: "c".into(),
        node_id: "n".into(),
        role: Role::Worker,
        advertise: Ipv4Addr::LOCALHOST.into(),
        data_path: Ipv4Addr::LOCALHOST.into(),
        remotes: vec![port.addr()],
    }
}

fn session_of(
    port: &Port,
    credential: Credential,
    describe: Describe,
    shared: Shared,
) -> (Session, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let credentials = Credentials { membership: membership(port), credential: Arc::new(credential) };
    let credentials = Arc::new(Mutex::new(credentials));
    let session = Session::start(Store::new(folder.path()), credentials, shared, describe, None, true);
    (session, folder)
}

async fn index_becomes(session: &mut Session, index: u64) {
    let reached = |table: &Option<Arc<Table>>| table.as_ref().is_some_and(|table| table.index == index);
    timeout(Duration::from_secs(5), session.tables.wait_for(reached)).await.unwrap().unwrap();
}

#[tokio::test]
async fn snapshots_and_deltas_make_the_table_and_a_gap_starts_over() {
    let (mut session, port, _folder) = start().await;
    let mut manager = Peer::accept(&port).await;
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
    let mut manager = Peer::accept(&port).await;
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
    let (mut session, port, folder) = start().await;
    let store = Store::new(folder.path());
    let touched = |session: &Session| std::mem::take(&mut *session.touched.lock().unwrap());
    let mut manager = Peer::accept(&port).await;
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
    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    let same = session.tables.borrow().as_deref().cloned().unwrap();
    let mut next = Table { index: 9, ..same };
    next.services.insert("b".into(), service("b"));
    manager.send(ManagerMessage::Snapshot { table: Box::new(next.clone()) }).await;
    index_becomes(&mut session, 9).await;
    assert_eq!(store.load_table(), Some(next));
    assert_eq!(touched(&session), Touched { services: ["b".into()].into(), ..Touched::default() });
}

/// The index that an agent comes with; the session is open then.
async fn resumed(manager: &mut Peer) -> Option<u64> {
    let Some(AgentMessage::Resume { index, .. }) = manager.next().await else { panic!("not resumed") };
    manager.greet().await;
    index
}

#[tokio::test]
async fn a_session_goes_on_from_the_tables_index_by_a_delta() {
    let (mut session, port, folder) = start().await;
    let store = Store::new(folder.path());
    let touched = |session: &Session| std::mem::take(&mut *session.touched.lock().unwrap());
    let mut manager = Peer::accept(&port).await;
    assert_eq!(resumed(&mut manager).await, None);
    let services = ["a", "b"].map(|id| (id.into(), service(id))).into();
    let nodes = [("n".into(), node())].into();
    let had = Table { nodes, services, ..table(5) };
    manager.send(ManagerMessage::Snapshot { table: Box::new(had) }).await;
    index_becomes(&mut session, 5).await;
    assert!(touched(&session).all);
    drop(manager);

    // What changed back meanwhile, or came and went, is not touched: nothing is planned anew for it.
    let mut manager = Peer::accept(&port).await;
    assert_eq!(resumed(&mut manager).await, Some(5));
    let changes = vec![
        Change::Node(node()),
        Change::Service(service("a")),
        Change::ServiceRemoved("b".into()),
        Change::ServiceRemoved("never".into()),
        Change::Service(service("c")),
        Change::TaskRemoved("never".into()),
    ];
    manager.send(ManagerMessage::Delta { delta: Delta { from: 5, to: 90, changes } }).await;
    index_becomes(&mut session, 90).await;
    let services = ["a", "c"].map(|id| (id.into(), service(id))).into();
    let expected = Table { nodes: [("n".into(), node())].into(), services, ..table(90) };
    assert_eq!(session.tables.borrow().as_deref(), Some(&expected));
    assert_eq!(store.load_table(), Some(expected));
    let services = ["b".into(), "c".into()].into();
    assert_eq!(touched(&session), Touched { services, ..Touched::default() });
    drop(manager);

    // Where nothing changed, nothing is said.
    let mut manager = Peer::accept(&port).await;
    assert_eq!(resumed(&mut manager).await, Some(90));
    manager.send(ManagerMessage::Settled { index: 95 }).await;
    timeout(Duration::from_secs(5), session.settled.wait_for(|index| *index == 95)).await.unwrap().unwrap();
    manager.send(ManagerMessage::Delta { delta: Delta { from: 90, to: 96, changes: Vec::new() } }).await;
    index_becomes(&mut session, 96).await;
}

#[tokio::test]
async fn a_whole_table_of_a_lower_index_is_taken_and_nothing_of_it_is_settled() {
    let (mut session, port, folder) = start().await;
    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    manager.send(ManagerMessage::Snapshot { table: Box::new(table(50)) }).await;
    manager.send(ManagerMessage::Settled { index: 50 }).await;
    timeout(Duration::from_secs(5), session.settled.wait_for(|index| *index == 50)).await.unwrap().unwrap();
    drop(manager);

    let mut manager = Peer::accept(&port).await;
    assert_eq!(resumed(&mut manager).await, Some(50));
    let other = Table { services: [("a".into(), service("a"))].into(), ..table(7) };
    manager.send(ManagerMessage::Snapshot { table: Box::new(other.clone()) }).await;
    index_becomes(&mut session, 7).await;
    assert_eq!(*session.settled.borrow(), 0);
    assert_eq!(Store::new(folder.path()).load_table(), Some(other));
    let delta = Delta { from: 7, to: 8, changes: vec![Change::ServiceRemoved("a".into())] };
    manager.send(ManagerMessage::Delta { delta }).await;
    index_becomes(&mut session, 8).await;
    assert_eq!(Store::new(folder.path()).load_table(), Some(table(8)));
}

#[tokio::test]
async fn what_was_said_is_said_again_to_the_next_manager() {
    let (session, port, _folder) = start().await;
    let mut manager = Peer::accept(&port).await;
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

    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    let said = [manager.next().await.unwrap(), manager.next().await.unwrap()];
    assert!(said.contains(&AgentMessage::Applied { index: 8 }) && said.contains(&running), "{said:?}");
}

#[tokio::test]
async fn a_host_that_changes_is_described_anew() {
    let describe = Describe::new("h".to_owned());
    let (session, port, _folder) = start_as(describe.clone()).await;
    let mut manager = Peer::accept(&port).await;
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
    let mut manager = Peer::accept(&port).await;
    let Some(AgentMessage::Resume { node, .. }) = manager.next().await else { panic!("not resumed") };
    assert_eq!(node, describe.describe(addr, addr));
    manager.greet().await;
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 1 }));
}

#[tokio::test]
async fn how_the_node_is_is_told_at_the_beginning_and_then_once_a_second_at_most() {
    let describe = Describe::new("h".to_owned());
    let (session, port, _folder) = start_as(describe.clone()).await;
    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    assert_eq!(manager.health().await, NodeHealth::default());
    let began = Instant::now();
    for number in 0..100 {
        describe.health().note_problem(&format!("problem {number}"));
    }
    let text = |health: NodeHealth| health.problem.unwrap().text;
    assert_eq!(text(manager.health().await), "problem 99", "the last one is what is told");
    assert!(began.elapsed() > HEALTH_PERIOD / 2, "{:?}", began.elapsed());
    // What is as it was is not told again.
    describe.health().clear();
    session.applied.send_replace(Some(1));
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 1 }));
    drop(manager);

    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    assert_eq!(text(manager.health().await), "problem 99", "the next manager knows nothing of it");
}

#[tokio::test]
async fn a_refusal_shows_and_a_farewell_is_said() {
    let (mut session, port, _folder) = start().await;
    let mut manager = Peer::accept(&port).await;
    assert!(manager.next().await.is_some());
    let message = "node n is not in the cluster".to_owned();
    manager
        .send(ManagerMessage::Refused { reason: RefusalReason::UnknownNode, message: message.clone() })
        .await;
    let refused = SessionState::Refused(RefusalReason::UnknownNode, message);
    session.state.wait_for(|state| *state == refused).await.unwrap();

    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    session.state.wait_for(|state| *state == SessionState::Connected).await.unwrap();
    let (said, ()) = tokio::join!(manager.next(), session.leave());
    assert_eq!(said, Some(AgentMessage::Leave));
}

#[tokio::test]
async fn attachments_are_asked_for_once_and_a_session_that_ends_answers_none() {
    let (mut session, port, _folder) = start().await;
    let mut manager = Peer::accept(&port).await;
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
    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    let _waiting = call("a6");
    assert_eq!(manager.next().await, asked("a6"));
}

/// Answers a request for a certificate by one that lives for an hour.
async fn certify(port: &Port, manager: &mut Peer, wanted: &Wanted<'_>) {
    let csr = loop {
        match manager.next().await {
            Some(AgentMessage::Renew { csr }) => break csr,
            Some(_) => {}
            None => panic!("the session ended"),
        }
    };
    let chain = port.ca.sign_request(wanted, &csr);
    manager.send(ManagerMessage::Certificate { chain, roots: port.ca.roots().to_pem() }).await;
}

#[tokio::test]
async fn an_old_certificate_is_renewed_kept_and_used_from_the_next_handshake_on() {
    let port = Port::new().await;
    let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
    let good = Wanted::new("n", Role::Worker, "c");
    let old = Wanted { not_before: now - 10 * hour, not_after: now + hour, ..good.clone() };
    let old = port.ca.credential(&old);
    let former = old.identity.peer().clone();
    let shared = Shared::default();
    let (session, folder) = session_of(&port, old, Describe::new("h".to_owned()), shared.clone());
    let mut manager = Peer::accept(&port).await;
    assert_eq!(manager.node, former);
    manager.resume().await;
    // What is another node's, and what its own roots do not vouch for, is not taken.
    certify(&port, &mut manager, &Wanted { node: "other", ..good.clone() }).await;
    manager.send(ManagerMessage::Renew).await;
    let csr = loop {
        if let Some(AgentMessage::Renew { csr }) = manager.next().await {
            break csr;
        }
    };
    let chain = Ca::new().sign_request(&good, &csr);
    manager.send(ManagerMessage::Certificate { chain, roots: port.ca.roots().to_pem() }).await;
    manager.send(ManagerMessage::Renew).await;
    certify(&port, &mut manager, &good).await;
    assert_eq!(manager.next().await, Some(AgentMessage::Renewed));
    let kept = Store::new(folder.path()).load_credentials().unwrap().unwrap().credential;
    let used = shared.get().unwrap();
    assert_eq!(kept.identity.to_pem(), used.identity.to_pem());
    assert!(kept.identity.peer().not_after > former.not_after - hour && *kept.identity.peer() != former);
    drop(manager);
    let mut manager = Peer::accept(&port).await;
    assert_eq!(manager.node, *kept.identity.peer());
    manager.resume().await;
    // It is young: nothing is asked for.
    session.applied.send_replace(Some(1));
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 1 }));
}

#[tokio::test]
async fn a_node_that_is_something_else_by_the_table_asks_to_be_certified_so() {
    let (mut session, port, folder) = start().await;
    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    let promoted = NodeRecord { role: Role::Manager, ..node() };
    let nodes = [("n".into(), promoted)].into();
    manager.send(ManagerMessage::Snapshot { table: Box::new(Table { nodes, ..table(5) }) }).await;
    index_becomes(&mut session, 5).await;
    certify(&port, &mut manager, &Wanted::new("n", Role::Manager, "c")).await;
    assert_eq!(manager.next().await, Some(AgentMessage::Renewed));
    let kept = Store::new(folder.path()).load_credentials().unwrap().unwrap().credential;
    assert_eq!(kept.identity.peer().role, Role::Manager);
}

#[tokio::test]
async fn the_roots_that_the_managers_name_are_trusted_from_then_on() {
    let (session, port, folder) = start().await;
    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    let next = Ca::new();
    let both = port.ca.roots().to_pem() + &next.roots().to_pem();
    let kept =
        || Store::new(folder.path()).load_credentials().unwrap().map(|kept| kept.credential.roots.clone());
    manager.send(ManagerMessage::Trust { roots: "none".to_owned() }).await;
    manager.send(ManagerMessage::Trust { roots: both.clone() }).await;
    let deadline = Instant::now() + Duration::from_secs(5);
    while kept().is_none_or(|roots| roots.to_pem() != both) {
        assert!(Instant::now() < deadline, "the roots are not kept");
        sleep(Duration::from_millis(10)).await;
    }
    drop(manager);
    // A manager of the next root is one; the greeting tells that the former is gone.
    let port = Port { ca: next, ..port };
    let credential = port.ca.credential(&Wanted::new("m", Role::Manager, "c"));
    let trusted = Roots::from_pem(&both).unwrap();
    let config = tls::server_config(&credential.identity, &trusted, &Alpn::ALL).unwrap();
    let (stream, _) = port.listener.accept().await.unwrap();
    let stream = TlsAcceptor::from(config).accept(stream).await.unwrap();
    let node = tls::peer_of(stream.get_ref().1.peer_certificates()).unwrap().unwrap();
    let (read, write) = tokio::io::split(stream);
    let (reader, writer) = (FrameReader::new(read, AGENT_FRAME_BYTES_MAX), FrameWriter::new(write));
    let mut manager = Peer { reader, writer, roots: port.ca.roots(), node };
    manager.resume().await;
    session.applied.send_replace(Some(1));
    assert_eq!(manager.next().await, Some(AgentMessage::Applied { index: 1 }));
    assert_eq!(kept(), Some(port.ca.roots()));
}

#[tokio::test]
async fn an_expired_node_asks_until_it_is_approved_and_begins_its_session() {
    let port = Port::new().await;
    let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
    let good = Wanted::new("n", Role::Worker, "c");
    let expired = Wanted { not_before: now - 10 * hour, not_after: now - 5 * hour, ..good.clone() };
    let describe = Describe::new("h".to_owned());
    let (mut session, folder) = session_of(&port, port.ca.credential(&expired), describe, Shared::default());
    // Answers the node's one request.
    let answer = async |answer: &dyn Fn(&str) -> ReadmitAnswer| {
        let stream = timeout(Duration::from_secs(10), port.stream()).await.unwrap().unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(Alpn::Readmit.name()));
        assert_eq!(stream.get_ref().1.peer_certificates(), None);
        let binding = Binding::of(stream.get_ref().1).unwrap();
        let (read, write) = tokio::io::split(stream);
        let mut reader = FrameReader::<_, ReadmitRequest>::new(read, AGENT_FRAME_BYTES_MAX);
        let ReadmitRequest { protocol: _, chain, csr, proof } = reader.next().await.unwrap().unwrap();
        let former = Former::of(&chain, &port.ca.roots()).unwrap();
        assert_eq!(former.peer().node, "n".into());
        assert!(former.has_proved(&binding, &csr, &proof));
        FrameWriter::new(write).send(&answer(&csr)).await.unwrap();
    };
    let (reason, message) = (RefusalReason::Unapproved, "`shoal node approve n`".to_owned());
    answer(&|_| ReadmitAnswer::Refused { reason, message: message.clone() }).await;
    let refused = SessionState::Refused(reason, message.clone());
    timeout(Duration::from_secs(5), session.state.wait_for(|state| *state == refused))
        .await
        .unwrap()
        .unwrap();
    tokio::time::pause();
    tokio::time::advance(APPROVAL_PERIOD).await;
    tokio::time::resume();
    let roots = port.ca.roots().to_pem();
    answer(&|csr| ReadmitAnswer::Readmitted {
        chain: port.ca.sign_request(&good, csr),
        roots: roots.clone(),
    })
    .await;
    let mut manager = Peer::accept(&port).await;
    manager.resume().await;
    Store::new(folder.path()).load_credentials().unwrap().unwrap().credential.check().unwrap();
}

#[tokio::test]
async fn an_expired_node_keeps_to_its_certificate_until_it_has_a_better_one() {
    let port = Port::new().await;
    let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
    let expired = |node| Wanted {
        not_before: now - 10 * hour,
        not_after: now - 5 * hour,
        ..Wanted::new(node, Role::Worker, "c")
    };
    let credential = port.ca.credential(&expired("n"));
    let (mut session, folder) =
        session_of(&port, credential, Describe::new("h".to_owned()), Shared::default());
    for wanted in [Wanted::new("other", Role::Worker, "c"), expired("n")] {
        let before = session.state.borrow().clone();
        let stream = timeout(Duration::from_secs(10), port.stream()).await.unwrap().unwrap();
        let (read, write) = tokio::io::split(stream);
        let mut reader = FrameReader::<_, ReadmitRequest>::new(read, AGENT_FRAME_BYTES_MAX);
        let csr = reader.next().await.unwrap().unwrap().csr;
        let (chain, roots) = (port.ca.sign_request(&wanted, &csr), port.ca.roots().to_pem());
        FrameWriter::new(write).send(&ReadmitAnswer::Readmitted { chain, roots }).await.unwrap();
        let is_refused =
            |state: &SessionState| matches!(state, SessionState::Refused(..)) && *state != before;
        timeout(Duration::from_secs(5), session.state.wait_for(is_refused)).await.unwrap().unwrap();
        assert!(
            Store::new(folder.path()).load_credentials().unwrap().is_none(),
            "what is no better is not kept"
        );
    }
}

#[tokio::test]
async fn a_host_joins_by_a_key_of_its_own_and_tells_its_token_to_nobody_else() {
    let port = Port::new().await;
    let remotes = [port.addr()];
    let describe = Describe::new("h".to_owned());
    let node = || describe.describe(Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into());
    let key = KeyRequest::new().unwrap();
    let token = JoinToken::new(&port.ca.digest(), &[1; 16]);
    let answering = async {
        let stream = port.stream().await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(Alpn::Join.name()));
        assert_eq!(stream.get_ref().1.peer_certificates(), None);
        let (read, write) = tokio::io::split(stream);
        let mut reader = FrameReader::<_, JoinRequest>::new(read, AGENT_FRAME_BYTES_MAX);
        let request = reader.next().await.unwrap().unwrap();
        assert_eq!((request.token, request.node), (token.to_string(), node()));
        let answer = JoinAnswer::Joined {
            cluster_id: "c".into(),
            node_id: "n".into(),
            role: Role::Worker,
            chain: port.ca.sign_request(&Wanted::new("n", Role::Worker, "c"), &request.csr),
            roots: port.ca.roots().to_pem(),
        };
        FrameWriter::new(write).send(&answer).await.unwrap();
    };
    let (joined, ()) = tokio::join!(join(&remotes, &token, key.csr(), node()), answering);
    let Joined { node_id, chain, roots, .. } = joined.unwrap();
    let credential =
        Credential { identity: key.identity(&chain).unwrap(), roots: Roots::from_pem(&roots).unwrap() };
    credential.check().unwrap();
    assert_eq!(credential.identity.peer().node, node_id);

    let other = JoinToken::new(&[7; 32], &[1; 16]);
    let (refused, stream) = tokio::join!(join(&remotes, &other, key.csr(), node()), port.stream());
    assert!(matches!(refused, Err(ConnectError::Fingerprint { .. })), "{refused:?}");
    assert!(stream.is_err(), "nothing is said once the handshake fails");
}
