//! Sessions with fake agents, over streams in memory.

mod attachments;
mod attacks;
mod health;
mod port;
mod readmit;
mod resume;
mod rotation;
mod tables;
mod tokens;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::codec::{FrameReader, FrameWriter, MANAGER_FRAME_BYTES_MAX};
use mesh_api::id::{NodeId, TaskId};
use mesh_api::session::{
    AgentMessage, EncodedDelta, JoinAnswer, JoinRequest, ManagerMessage, NodeDescription, PROTOCOL_VERSION,
    RefusalReason, TaskStatus,
};
use mesh_api::table::{
    Affinity, BalancingRecord, Change, Delta, NodeState, ReturnPath, Role, SourceRule, Table, TaskState,
};
use mesh_api::tls::{Credential, KeyId, KeyRequest, Peer, Roots};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::task::JoinHandle;

use super::feed::Feed;
use super::handshake::Denied;
use super::{Cause, Server, SessionError, join, view};
use crate::cluster::{Cluster, InitRequest};
use crate::command::{Action, Command};
use crate::model::{PortConfig, State};
use crate::orchestrator::run::run;
use crate::testing::{World, attach, attachment, description, ingress_port, service};

/// An agent that does what it is told.
struct FakeAgent {
    reader: FrameReader<Box<dyn AsyncRead + Send + Unpin>, ManagerMessage>,
    writer: FrameWriter<Box<dyn AsyncWrite + Send + Unpin>, AgentMessage>,
    session: JoinHandle<Result<(), SessionError>>,
    node: Peer,
    table: Option<Table>,
    /// How many whole tables it was sent.
    tables: u32,
    settled: u64,
}

/// A host that becomes a worker, and has no session yet.
async fn enrol(server: &Server, hostname: &str) -> Credential {
    let key = KeyRequest::new().unwrap();
    let request = join_request(server, key.csr(), hostname);
    match join::admit(server, request).await.unwrap() {
        JoinAnswer::Joined { role: Role::Worker, chain, roots, .. } => {
            Credential { identity: key.identity(&chain).unwrap(), roots: Roots::from_pem(&roots).unwrap() }
        }
        answer => panic!("unexpected: {answer:?}"),
    }
}

fn join_request(server: &Server, csr: &str, hostname: &str) -> JoinRequest {
    let token = server.cluster.join_token(Role::Worker).to_string();
    let node = description(hostname);
    JoinRequest { protocol: PROTOCOL_VERSION, token, csr: csr.to_owned(), node }
}

fn resume(hostname: &str, index: Option<u64>) -> AgentMessage {
    AgentMessage::Resume { protocol: PROTOCOL_VERSION, node: description(hostname), index }
}

impl FakeAgent {
    /// An agent with this certificate, whose session is open as far as TLS goes.
    fn dial(server: &Arc<Server>, node: &Peer) -> Self {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let session = tokio::spawn(Arc::clone(server).handle(theirs, node.clone()));
        Self::over(ours, session, node)
    }

    fn over<S>(stream: S, session: JoinHandle<Result<(), SessionError>>, node: &Peer) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (reading, writing) = tokio::io::split(stream);
        let reader = FrameReader::new(Box::new(reading) as _, MANAGER_FRAME_BYTES_MAX);
        let writer = FrameWriter::new(Box::new(writing) as _);
        Self { reader, writer, session, node: node.clone(), table: None, tables: 0, settled: 0 }
    }

    async fn say(&mut self, message: AgentMessage) {
        self.writer.send(&message).await.unwrap();
    }

    async fn hear(&mut self) -> Option<ManagerMessage> {
        let message = tokio::time::timeout(Duration::from_secs(20), self.reader.next()).await.unwrap();
        message.unwrap_or_default()
    }

    async fn join(server: &Arc<Server>, hostname: &str) -> Self {
        let credential = enrol(server, hostname).await;
        let mut agent = Self::dial(server, credential.identity.peer());
        agent.say(resume(hostname, None)).await;
        agent.is_taken().await;
        agent
    }

    async fn is_taken(&mut self) {
        assert!(matches!(self.hear().await, Some(ManagerMessage::Resumed { role: Role::Worker, .. })));
    }

    /// Hears until the session ends with the reason why.
    async fn until_refused(&mut self) -> RefusalReason {
        loop {
            match self.hear().await {
                Some(ManagerMessage::Refused { reason, .. }) => break reason,
                Some(_) => {}
                None => panic!("the session ended without a word"),
            }
        }
    }

    async fn resume(server: &Arc<Server>, node: &Peer, hostname: &str) -> Self {
        let mut agent = Self::dial(server, node);
        agent.say(resume(hostname, Some(0))).await;
        agent
    }

    /// Takes one message, and answers as a node that runs every task at once.
    async fn step(&mut self) {
        let changed = match self.hear().await.expect("the session is up") {
            ManagerMessage::Snapshot { table } => {
                self.table = Some(*table);
                self.tables += 1;
                true
            }
            ManagerMessage::Delta { delta } => {
                self.table.as_mut().unwrap().apply(delta).unwrap();
                true
            }
            ManagerMessage::Settled { index } => {
                assert!(index > self.settled);
                self.settled = index;
                false
            }
            ManagerMessage::Alive => false,
            other => panic!("unexpected: {other:?}"),
        };
        if !changed {
            return self.say(AgentMessage::Alive).await;
        }
        let table = self.table.clone().unwrap();
        self.say(AgentMessage::Applied { index: table.index }).await;
        let own = table.tasks.values().filter(|task| task.spec.is_some());
        let report = |task: &mesh_api::table::TaskRecord| {
            let state =
                if task.desired == TaskState::Running { TaskState::Running } else { TaskState::Shutdown };
            (task.observed < state).then(|| status(task.id.as_str(), state))
        };
        let statuses: Vec<TaskStatus> = own.filter_map(report).collect();
        if !statuses.is_empty() {
            self.say(AgentMessage::Tasks { statuses }).await;
        }
    }

    async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            self.step().await;
        }
    }

    fn running(&self) -> usize {
        let tasks = self.table.iter().flat_map(|table| table.tasks.values());
        tasks.filter(|task| task.observed == TaskState::Running && task.desired == TaskState::Running).count()
    }
}

fn status(task: &str, state: TaskState) -> TaskStatus {
    let (message, err) = (String::new(), String::new());
    TaskStatus { task: task.into(), state, since_ns: 1, message, err, pid: None, exit_code: None }
}

async fn server() -> (tempfile::TempDir, Arc<Server>) {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::create(dir.path(), InitRequest::default()).await.unwrap();
    let server = Server::new(cluster);
    server.lead();
    (dir, server)
}

/// A server whose store needs no threads, so that paused time can pass.
async fn server_in_memory(world: &World) -> (tempfile::TempDir, Arc<Server>) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Cluster::in_memory(world.state.clone()).await);
    server.lead();
    (dir, server)
}

async fn refusal(agent: &mut FakeAgent) -> RefusalReason {
    match agent.hear().await {
        Some(ManagerMessage::Refused { reason, message }) => {
            assert!(!message.is_empty());
            reason
        }
        other => panic!("unexpected: {other:?}"),
    }
}

fn reason(answer: Result<JoinAnswer, Denied>) -> RefusalReason {
    let denied = answer.unwrap_err();
    assert!(!denied.message.is_empty());
    denied.reason
}

#[tokio::test]
async fn strangers_are_refused_with_reasons() {
    let (_dir, server) = server().await;
    let key = KeyRequest::new().unwrap();
    let good = join_request(&server, key.csr(), "n1");
    let mut wrong = good.token.clone();
    wrong.pop();
    wrong.push(if good.token.ends_with('0') { '1' } else { '0' });
    let cases = [
        (JoinRequest { protocol: PROTOCOL_VERSION + 1, ..good.clone() }, RefusalReason::Protocol),
        (JoinRequest { token: String::new(), ..good.clone() }, RefusalReason::InvalidToken),
        (JoinRequest { token: wrong, ..good.clone() }, RefusalReason::InvalidToken),
        (JoinRequest { csr: "no request".to_owned(), ..good.clone() }, RefusalReason::Certificate),
        (JoinRequest { node: description("no host name"), ..good.clone() }, RefusalReason::Invalid),
    ];
    for (request, expected) in cases {
        assert_eq!(reason(join::admit(&server, request.clone()).await), expected, "{request:?}");
    }
    let cluster = server.cluster.state().cluster.clone().unwrap();
    let stranger = |cluster: &str| Peer {
        node: "nobody".into(),
        role: Role::Worker,
        cluster: cluster.into(),
        issuer: KeyId::default(),
        not_before: SystemTime::UNIX_EPOCH,
        not_after: SystemTime::UNIX_EPOCH,
    };
    let old = AgentMessage::Resume { protocol: PROTOCOL_VERSION + 1, node: description("n1"), index: None };
    let cases = [
        (stranger(cluster.id.as_str()), AgentMessage::Alive, RefusalReason::Protocol),
        (stranger(cluster.id.as_str()), old, RefusalReason::Protocol),
        (stranger(cluster.id.as_str()), resume("n1", None), RefusalReason::UnknownNode),
        (stranger("another"), resume("n1", None), RefusalReason::UnknownNode),
    ];
    for (peer, message, expected) in cases {
        let mut agent = FakeAgent::dial(&server, &peer);
        agent.say(message.clone()).await;
        assert_eq!(refusal(&mut agent).await, expected, "{message:?}");
        assert!(agent.hear().await.is_none(), "the stream ends");
    }
    assert!(server.cluster.state().nodes.is_empty());
    assert_eq!(server.refusals().counted(), [(Cause::Node, 2), (Cause::Message, 2)]);
}

#[tokio::test]
async fn a_host_of_another_address_family_is_told_what_to_do() {
    let (_dir, server) = server().await;
    let mut first = FakeAgent::join(&server, "n1").await;
    first.until(|agent| agent.table.is_some()).await;
    let key = KeyRequest::new().unwrap();
    let node = NodeDescription { vtep: "fd00::2".parse().unwrap(), ..description("n2") };
    let request = JoinRequest { node, ..join_request(&server, key.csr(), "n2") };
    let Denied { reason, message, .. } = join::admit(&server, request).await.unwrap_err();
    assert_eq!(reason, RefusalReason::Invalid);
    assert!(message.contains("name an IPv4 address of this host with --data-path-addr"), "{message}");
}

#[tokio::test]
async fn garbage_harms_nobody() {
    let (_dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 3, b'{', b'{', b'{'], &[0xff; 64], &[0, 0, 0, 200, 1]]
    {
        let (mut ours, theirs) = tokio::io::duplex(1 << 10);
        let session = tokio::spawn(Arc::clone(&server).handle(theirs, agent.node.clone()));
        ours.write_all(bytes).await.unwrap();
        drop(ours);
        assert!(session.await.unwrap().is_err());
    }
    agent.until(|agent| agent.table.is_some()).await;
}

#[tokio::test]
async fn a_service_comes_up_and_goes_over_sessions() {
    let (_dir, server) = server().await;
    let cluster = server.cluster.clone();
    tokio::spawn(run(cluster.clone()));
    let mut first = FakeAgent::join(&server, "n1").await;
    let mut second = FakeAgent::join(&server, "n2").await;
    let mut web = service("web", 4);
    web.endpoint.ports.push(ingress_port(8080, 80));
    let create = Action::CreateService { id: "web".into(), spec: Box::new(web) };
    let index = cluster.propose(Command::now(create)).await.unwrap().index;
    tokio::join!(
        first.until(|agent| agent.running() == 4 && agent.settled >= index),
        second.until(|agent| agent.running() == 4 && agent.settled >= index),
    );
    let own = |agent: &FakeAgent| {
        let tasks = agent.table.as_ref().unwrap().tasks.values();
        tasks.filter(|task| task.spec.is_some()).count()
    };
    assert_eq!((own(&first), own(&second)), (2, 2), "only its own tasks' specifications");
    assert_eq!(first.table.as_ref().unwrap().services.len(), 1);

    cluster.propose(Command::now(Action::RemoveService { id: "web".into() })).await.unwrap();
    let gone = |agent: &FakeAgent| agent.table.as_ref().unwrap().tasks.is_empty();
    tokio::join!(first.until(gone), second.until(gone));
    let mut states = cluster.watch();
    states.wait_for(|state| state.tasks.is_empty()).await.unwrap();
    for agent in [&first, &second] {
        let mut expected = view::table(&cluster.state(), &agent.node.node).unwrap();
        let mut table = agent.table.clone().unwrap();
        (expected.index, table.index) = (0, 0);
        assert_eq!(table, expected);
    }
}

#[tokio::test]
async fn a_node_that_describes_itself_anew_is_known_so() {
    let (_dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    let (id, peer) = (agent.node.node.clone(), agent.node.clone());
    let attached = NodeDescription { dataplane: "eth0=xdp-native".to_owned(), ..description("n1") };
    let mut states = server.cluster.watch();
    agent.say(AgentMessage::Described { node: attached.clone() }).await;
    states.wait_for(|state| state.nodes[&id].description == attached).await.unwrap();
    let known = server.cluster.state();
    assert_eq!(known.nodes[&id].status.state, NodeState::Ready);

    // The same again is no news; what no node may say of itself ends the session, and changes nothing.
    agent.say(AgentMessage::Described { node: attached.clone() }).await;
    agent
        .say(AgentMessage::Described { node: NodeDescription { hostname: String::new(), ..attached } })
        .await;
    let ended = agent.session.await.unwrap();
    assert!(matches!(&ended, Err(SessionError::Refused(why)) if why.contains("hostname")), "{ended:?}");
    assert_eq!(server.cluster.state().nodes[&id], known.nodes[&id]);

    let mut early = FakeAgent::dial(&server, &peer);
    early.say(AgentMessage::Described { node: description("n1") }).await;
    assert_eq!(refusal(&mut early).await, RefusalReason::Protocol);
    let mut back = FakeAgent::resume(&server, &peer, "n1").await;
    assert!(matches!(back.hear().await, Some(ManagerMessage::Resumed { .. })));
}

#[tokio::test]
async fn a_node_comes_back_and_leaves() {
    let (_dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    let (id, peer) = (agent.node.node.clone(), agent.node.clone());
    let mut back = FakeAgent::resume(&server, &peer, "renamed").await;
    back.is_taken().await;
    back.until(|agent| agent.table.is_some()).await;
    assert!(matches!(agent.session.await.unwrap(), Err(SessionError::Replaced)));
    assert_eq!(server.cluster.state().nodes[&id].description.hostname, "renamed");

    back.say(AgentMessage::Leave).await;
    back.session.await.unwrap().unwrap();
    let node = server.cluster.state().nodes[&id].clone();
    assert_eq!((node.status.state, node.status.message.as_str()), (NodeState::Down, "node left the swarm"));

    let mut again = FakeAgent::resume(&server, &peer, "n1").await;
    again.is_taken().await;
    again.until(|agent| agent.table.is_some()).await;
    server.cluster.propose(Command::now(Action::RemoveNode { id, force: true })).await.unwrap();
    assert_eq!(again.until_refused().await, RefusalReason::UnknownNode);
    let mut gone = FakeAgent::resume(&server, &peer, "n1").await;
    assert_eq!(refusal(&mut gone).await, RefusalReason::UnknownNode);
}

#[tokio::test]
async fn a_node_reports_for_its_own_tasks_only_and_repetition_costs_nothing() {
    let mut world = World::new(&["n1", "n2"]);
    world.create_service(service("web", 2));
    while world.orchestrate().0 {}
    let (_dir, server) = server_in_memory(&world).await;
    let task = world.state.tasks.values().next().unwrap().clone();
    let (own, other) = (task.node.clone().unwrap(), NodeId::from("n3"));
    let report = status(task.id.as_str(), TaskState::Running);
    assert!(!crate::apply::report_changes(&server.cluster.state(), &other, std::slice::from_ref(&report)));
    assert!(crate::apply::report_changes(&server.cluster.state(), &own, std::slice::from_ref(&report)));
    let action = Action::ReportTasks { node: own.clone(), statuses: vec![report.clone()] };
    server.cluster.propose(Command::now(action)).await.unwrap();
    assert!(!crate::apply::report_changes(&server.cluster.state(), &own, &[report]));
}

#[tokio::test]
async fn silent_nodes_go_down_and_return() {
    let world = World::new(&["n1"]);
    let (_dir, server) = server_in_memory(&world).await;
    let node_state = |server: &Server| server.cluster.state().nodes[&NodeId::from("n1")].status.state;
    tokio::time::pause();
    let liveness = tokio::spawn(Arc::clone(&server).watch_liveness());
    let mut states = server.cluster.watch();
    states
        .wait_for(|state| state.nodes[&NodeId::from("n1")].status.state == NodeState::Unknown)
        .await
        .unwrap();
    states.wait_for(|state| state.nodes[&NodeId::from("n1")].status.state == NodeState::Down).await.unwrap();
    let (epoch, _kill) = server.registry().connect(&"n1".into(), 0);
    states.wait_for(|state| state.nodes[&NodeId::from("n1")].status.state == NodeState::Ready).await.unwrap();
    server.registry().disconnect(&"n1".into(), epoch);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(node_state(&server), NodeState::Ready, "an agent's restart is not an absence");
    states.wait_for(|state| state.nodes[&NodeId::from("n1")].status.state == NodeState::Down).await.unwrap();
    liveness.abort();
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_dropped() {
    let (_dir, server) = server_in_memory(&World::new(&[])).await;
    let credential = enrol(&server, "n1").await;
    let FakeAgent { reader: _reader, writer: _writer, session, .. } =
        FakeAgent::dial(&server, credential.identity.peer());
    assert!(matches!(session.await.unwrap(), Err(SessionError::TurnedAway(Cause::Slow))));
    assert_eq!(server.slots.len(), 0);
    assert_eq!(server.refusals().counted(), [(Cause::Slow, 1)]);
}

#[test]
fn a_services_record_says_its_stack_and_its_ports_names() {
    let mut world = World::new(&["n1"]);
    let mut web = service("site_web", 1);
    web.labels.insert("com.docker.stack.namespace".into(), "site".into());
    web.endpoint.ports =
        vec![PortConfig { name: "http".into(), ..ingress_port(8080, 80) }, ingress_port(8081, 81)];
    let ids = [world.create_service(web), world.create_service(service("plain", 1))];
    let table = view::table(&world.state, &"n1".into()).unwrap();
    let [web, plain] = ids.map(|id| table.services[&id].clone());
    assert_eq!((&*web.stack, &*plain.stack), ("site", ""));
    let names: Vec<_> = web.ports.iter().map(|port| (&*port.name, port.target)).collect();
    assert_eq!(names, [("http", 80), ("", 81)]);
}

fn set_return_path(world: &mut World, return_path: &str) {
    world.update_cluster(|spec| drop(spec.labels.insert("shoal.return".into(), return_path.into())));
}

#[test]
fn a_record_follows_labels_of_the_service_the_nodes_and_the_cluster() {
    let mut world = World::new(&["n1", "n2"]);
    let mut web = service("web", 1);
    for (label, value) in [
        ("shoal.affinity", "client-ip"),
        ("shoal.deny", "10.0.0.0/8"),
        ("shoal.publish.addresses", "192.0.2.0/24"),
        ("shoal.publish.nodes", "node.labels.edge==yes"),
    ] {
        web.labels.insert(label.into(), value.into());
    }
    let id = world.create_service(web);
    let balancing = |world: &World| {
        let table = view::table(&world.state, &"n1".into()).unwrap();
        assert_eq!(table.cluster.return_path, table.services[&id].balancing.return_path);
        table.services[&id].balancing.clone()
    };
    let expected = BalancingRecord {
        return_path: ReturnPath::Tunnel,
        affinity: Affinity::ClientIp,
        sources: vec![SourceRule { net: "10.0.0.0/8".parse().unwrap(), allow: false }],
        publish_addresses: vec!["192.0.2.0/24".parse().unwrap()],
        publish_nodes: Some(Vec::new()),
    };
    assert_eq!(balancing(&world), expected);
    let before = world.state.clone();
    world.label_node("n2", "edge", "yes");
    let publish_nodes = Some(vec![NodeId::from("n2")]);
    assert_eq!(balancing(&world), BalancingRecord { publish_nodes, ..expected });
    let changes = view::changes(&before, &world.state);
    assert!(matches!(&changes[..], [Change::Service(record)] if record.id == id), "{changes:?}");
    set_return_path(&mut world, "direct");
    assert_eq!(balancing(&world).return_path, ReturnPath::Direct);
    world.update_service(&id, |spec| drop(spec.labels.insert("shoal.return".into(), "tunnel".into())));
    let table = view::table(&world.state, &"n1".into()).unwrap();
    assert_eq!(
        table.services[&id].balancing.return_path,
        ReturnPath::Tunnel,
        "the service's word comes first"
    );
}

#[test]
fn a_networks_record_has_its_mtu_and_every_subnet() {
    let mut world = World::new(&["n1"]);
    let mut spec = crate::testing::network("app");
    spec.options.insert("com.docker.network.driver.mtu".into(), "1400".into());
    world.must(Action::CreateNetwork { id: "app".into(), spec });
    let before = world.state.clone();
    let (network, config) = ("app".into(), crate::model::IpamConfig::default());
    world.must(Action::AddSubnet { network, config });
    let changes = view::changes(&before, &world.state);
    let [Change::Network(record)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(record.mtu, Some(1400));
    let subnets: Vec<String> = record.subnets.iter().map(|subnet| subnet.cidr.to_string()).collect();
    assert_eq!(subnets, ["10.0.1.0/24", "10.0.2.0/24"]);
    assert_eq!(view::table(&before, &"n1".into()).unwrap().networks[&"ingress-id".into()].mtu, None);
}

#[test]
fn a_tasks_node_is_told_what_it_is_to_send_under_and_no_other() {
    let mut world = World::new(&["n1", "n2"]);
    world.has_addresses("n1", &["192.0.2.7"]);
    let mut web = service("web", 1);
    web.labels.insert("shoal.egress".to_owned(), "192.0.2.8,192.0.2.7".to_owned());
    world.create_service(web);
    while world.orchestrate().0 {}
    let specs = |viewer: &str| -> Vec<_> {
        let table = view::table(&world.state, &viewer.into()).unwrap();
        table.tasks.into_values().map(|task| task.spec.map(|spec| spec.egress)).collect()
    };
    let listed = ["192.0.2.8", "192.0.2.7"].map(|addr| addr.parse().unwrap()).to_vec();
    assert_eq!((specs("n1"), specs("n2")), (vec![Some(listed)], vec![None]));
}

#[test]
fn deltas_lead_to_the_same_table_as_a_snapshot() {
    let mut world = World::new(&["n1", "n2"]);
    world.create_network("app");
    world.create_attachable_network("front");
    let mut states: Vec<State> = vec![world.state.clone()];
    let mut web = service("web", 3);
    web.endpoint.ports.push(ingress_port(8080, 80));
    web.task.networks.push(attachment("net-app"));
    web.labels.insert("shoal.publish.nodes".into(), "node.labels.edge!=yes".into());
    web.labels.insert("shoal.slow-start".into(), "20s".into());
    let id = world.create_service(web);
    world.create_service(service("other", 1));
    states.push(world.state.clone());
    for round in 0..12 {
        world.orchestrate();
        states.push(world.state.clone());
        let live = world.state.tasks.values().filter(|task| task.node.is_some() && !task.has_ended());
        for task in live.cloned().collect::<Vec<_>>() {
            world.report(&task, if task.is_wanted() { TaskState::Running } else { TaskState::Shutdown });
            states.push(world.state.clone());
        }
        match round {
            0 => {
                world.must(attach("a1", "n1", "front", "one"));
                world.must(attach("a2", "n2", "front", "two"));
            }
            1 => world.label_node("n2", "shoal.weight", "40"),
            2 => world.label_node("n2", "edge", "yes"),
            3 => world.update_service(&id, |spec| spec.task.force_update = 1),
            4 => set_return_path(&mut world, "direct"),
            5 => {
                let (network, config) = ("net-app".into(), crate::model::IpamConfig::default());
                world.must(Action::AddSubnet { network, config });
            }
            6 => world.set_node_state("n1", NodeState::Down),
            7 => drop(world.must(Action::RemoveNode { id: "n1".into(), force: true })),
            8 => world.label_node("n2", "shoal.weight", "7"),
            9 => drop(world.must(Action::RemoveService { id: id.clone() })),
            10 => world.report(&world.state.tasks[&TaskId::from("a2")].clone(), TaskState::Complete),
            _ => {}
        }
        world.now_ns += 6_000_000_000;
    }
    for viewer in ["n1", "n2"].map(NodeId::from) {
        for (at, from) in states.iter().enumerate() {
            let table = view::table(from, &viewer).unwrap();
            let mut feed = Feed::new(from.clone());
            for to in &states[at..] {
                feed.advance(to).unwrap();
                let news = feed.since(from.index).unwrap();
                let mut next = Table { index: to.index, ..table.clone() };
                if let Some(delta) = news.delta(&viewer, from.index, to.index).unwrap() {
                    next.index = from.index;
                    next.apply(decoded(&delta)).unwrap();
                }
                assert_eq!(next, view::table(to, &viewer).unwrap());
            }
        }
    }
}

/// What an agent makes of a delta.
fn decoded(delta: &EncodedDelta<'_>) -> Delta {
    let frame: Vec<u8> = delta.pieces().flatten().copied().collect();
    match serde_json::from_slice(&frame).unwrap() {
        ManagerMessage::Delta { delta } => delta,
        other => panic!("unexpected: {other:?}"),
    }
}

#[test]
fn what_changed_often_is_told_once_and_as_its_node_sees_it() {
    let mut world = World::new(&["n1", "n2"]);
    world.create_service(service("web", 2));
    while world.orchestrate().0 {}
    let mut feed = Feed::new(world.state.clone());
    let from = world.state.index;
    for weight in ["10", "20", "30"] {
        for node in ["n1", "n2"] {
            world.label_node(node, "shoal.weight", weight);
        }
        feed.advance(&world.state).unwrap();
    }
    let news = feed.since(from).unwrap();
    for viewer in ["n1", "n2"].map(NodeId::from) {
        let told = decoded(&news.delta(&viewer, from, world.state.index).unwrap().unwrap());
        assert_eq!((told.from, told.to), (from, world.state.index));
        let mut of_own = 0;
        for change in &told.changes {
            let Change::Task(record) = change else { panic!("{change:?}") };
            assert_eq!((record.weight, record.spec.is_some()), (30, record.node == viewer));
            of_own += usize::from(record.node == viewer);
        }
        assert_eq!((told.changes.len(), of_own), (2, 1));
    }
    assert!(feed.since(world.state.index).unwrap().delta(&"n1".into(), 1, 2).unwrap().is_none());
    assert!(feed.since(from - 1).is_none() && feed.since(world.state.index + 1).is_none());
}

#[tokio::test]
async fn a_session_that_the_feed_does_not_reach_is_told_what_changed_nevertheless() {
    let (_dir, server) = server().await;
    let cluster = server.cluster.clone();
    tokio::spawn(run(cluster.clone()));
    let mut agent = FakeAgent::join(&server, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    // It forgets each step at once.
    *server.feed() = Feed::bounded(cluster.state(), 0);
    for name in ["a", "b", "c"] {
        let create = Action::CreateService { id: name.into(), spec: Box::new(service(name, 2)) };
        let index = cluster.propose(Command::now(create)).await.unwrap().index;
        agent.until(|agent| agent.settled >= index).await;
    }
    agent.until(|agent| agent.running() == 6).await;
    assert_eq!(agent.tables, 1);
    let node = agent.node.node.clone();
    let state = cluster.state();
    assert_eq!(
        Table { index: 0, ..agent.table.unwrap() },
        Table { index: 0, ..view::table(&state, &node).unwrap() }
    );
}

#[tokio::test(start_paused = true)]
async fn a_node_is_not_given_up_between_its_admission_and_its_session() {
    let (_dir, server) = server_in_memory(&World::new(&[])).await;
    tokio::time::advance(Duration::from_mins(1)).await;
    let node = enrol(&server, "n1").await.identity.peer().node.clone();
    assert_eq!(server.verdict(&server.cluster.state().nodes[&node]), None);
    tokio::time::advance(Duration::from_secs(20)).await;
    let given_up = server.verdict(&server.cluster.state().nodes[&node]);
    assert_eq!(given_up.map(|(state, _)| state), Some(NodeState::Down));
}

#[tokio::test]
async fn a_freed_address_waits_until_every_live_node_has_applied_its_end() {
    let mut world = World::new(&["n1", "n2"]);
    let id = world.create_service({
        let mut web = service("web", 0);
        web.endpoint.ports.push(ingress_port(8080, 80));
        web
    });
    world.must(Action::RemoveService { id });
    let freed_at = world.state.index;
    assert_eq!(world.state.freed.len(), 1);
    let (_dir, server) = server_in_memory(&world).await;
    tokio::time::pause();
    let (first, second) = (NodeId::from("n1"), NodeId::from("n2"));
    let (epoch_first, _kill_first) = server.registry().connect(&first, 0);
    let (epoch_second, _kill_second) = server.registry().connect(&second, 0);
    server.registry().sent(&first, epoch_first, freed_at, true);
    server.registry().sent(&second, epoch_second, freed_at, false);
    let liveness = tokio::spawn(Arc::clone(&server).watch_liveness());
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(server.cluster.state().counters.acknowledged, 0, "n2 is slow, and alive");
    server.registry().applied(&second, epoch_second, freed_at);
    let mut states = server.cluster.watch();
    states.wait_for(|state| state.counters.acknowledged >= freed_at).await.unwrap();
    let index = server.cluster.state().index;
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(server.cluster.state().index, index, "nothing is noted that nothing waits for");
    liveness.abort();
}
