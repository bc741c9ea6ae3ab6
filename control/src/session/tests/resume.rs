//! Agents that come back: what they missed, and when they get all of it anew.

use std::collections::BTreeMap;
use std::sync::Mutex;

use mesh_api::table::{Delta, TaskRecord};

use super::*;
use crate::model::{IpamConfig, NetworkSpec, ServiceSpec};
use crate::raft::{
    Calling, Isolated, Manager, RaftId, Replica, Request, Settings, Storage, Transport, TransportError,
};
use crate::testing::{genesis, network};

const LIMIT: Duration = Duration::from_secs(20);

/// What a manager says first of the table.
#[derive(Debug)]
enum First {
    Snapshot,
    Delta(Delta),
    /// Nothing before it says what all have applied, or that it is alive.
    Nothing,
}

impl First {
    /// The changes of a delta.
    fn changes(self) -> Vec<Change> {
        match self {
            Self::Delta(delta) => delta.changes,
            other => panic!("no delta: {other:?}"),
        }
    }
}

impl FakeAgent {
    fn index(&self) -> u64 {
        self.table.as_ref().unwrap().index
    }

    /// Ends the session; the agent keeps its table.
    async fn leave(self) -> (Peer, Table) {
        let Self { reader, writer, session, node, table, tables: _, settled: _ } = self;
        drop((reader, writer));
        let _ = session.await;
        (node, table.unwrap())
    }

    /// Comes back with a table, and takes what is said first of it.
    async fn come_back(server: &Arc<Server>, (node, table): (Peer, Table), hostname: &str) -> (Self, First) {
        let mut agent = Self::dial(server, &node);
        agent.say(resume(hostname, Some(table.index))).await;
        agent.say(AgentMessage::Applied { index: table.index }).await;
        agent.is_taken().await;
        agent.table = Some(table);
        let first = loop {
            match agent.hear().await.expect("the session is up") {
                ManagerMessage::Snapshot { table } => {
                    agent.table = Some(*table);
                    break First::Snapshot;
                }
                ManagerMessage::Delta { delta } => {
                    agent.table.as_mut().unwrap().apply(delta.clone()).unwrap();
                    break First::Delta(delta);
                }
                ManagerMessage::Settled { index } => {
                    agent.settled = index;
                    break First::Nothing;
                }
                ManagerMessage::Alive => break First::Nothing,
                ManagerMessage::Renew => {}
                other => panic!("unexpected: {other:?}"),
            }
        };
        (agent, first)
    }

    /// Its table is what a snapshot would say, but for how far it was counted.
    fn is_current(&self, state: &State) {
        let table = self.table.clone().unwrap();
        let expected = view::table(state, &self.node.node).unwrap();
        assert_eq!(Table { index: 0, ..table }, Table { index: 0, ..expected });
    }
}

async fn must(cluster: &Cluster, action: Action) -> u64 {
    cluster.propose(Command::now(action)).await.unwrap().index
}

async fn create(cluster: &Cluster, id: &str, spec: ServiceSpec) -> u64 {
    must(cluster, Action::CreateService { id: id.into(), spec: Box::new(spec) }).await
}

fn records(changes: &[Change]) -> Vec<&TaskRecord> {
    let records = changes.iter().map(|change| match change {
        Change::Task(record) => Some(&**record),
        _ => None,
    });
    records.flatten().collect()
}

#[tokio::test]
async fn an_agent_that_was_away_is_told_what_changed_and_each_thing_once() {
    let (_dir, server) = server().await;
    let cluster = server.cluster.clone();
    let orchestrator = tokio::spawn(run(cluster.clone()));
    let mut away = FakeAgent::join(&server, "n1").await;
    let mut other = FakeAgent::join(&server, "n2").await;
    create(&cluster, "gone", service("gone", 1)).await;
    create(&cluster, "web", service("web", 4)).await;
    tokio::join!(away.until(|it| it.running() == 5), other.until(|it| it.running() == 5));
    let left = away.leave().await;

    // The one that is there goes on; the tasks of the one that isn't stay as they are.
    must(&cluster, Action::RemoveService { id: "gone".into() }).await;
    for name in ["late", "later"] {
        create(&cluster, name, service(name, 2)).await;
    }
    must(&cluster, Action::RemoveService { id: "later".into() }).await;
    for _ in 0..10 {
        must(&cluster, Action::RotateKeys).await;
    }
    let is_done = |it: &FakeAgent| {
        let table = it.table.as_ref().unwrap();
        table.services.len() == 2 && table.cluster.key_epoch == 10
    };
    other.until(is_done).await;
    orchestrator.abort();
    let _ = orchestrator.await;

    let (away, first) = FakeAgent::come_back(&server, left, "n1").await;
    away.is_current(&cluster.state());
    let changes = first.changes();
    let clusters = changes.iter().filter(|change| matches!(change, Change::Cluster(_))).count();
    assert_eq!(clusters, 1, "{changes:?}");
    assert!(changes.contains(&Change::ServiceRemoved("gone".into())), "{changes:?}");
    for record in records(&changes) {
        assert_eq!(record.spec.is_some(), record.node == away.node.node, "{record:?}");
    }
}

#[tokio::test]
async fn an_agent_that_missed_nothing_is_told_nothing_and_counts_at_once() {
    let (_dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    let at = agent.index();
    let left = agent.leave().await;
    let (mut agent, first) = FakeAgent::come_back(&server, left, "n1").await;
    assert!(matches!(first, First::Nothing), "{first:?}");
    // Its own admission concerns no table, and holds nothing up.
    let index = server.cluster.state().index;
    assert!(index > at);
    agent.until(|agent| agent.settled >= index).await;

    // What comes next starts at its own index.
    must(&server.cluster, Action::RotateKeys).await;
    agent.until(|agent| agent.index() > index).await;
    agent.is_current(&server.cluster.state());
}

#[tokio::test]
async fn an_agent_that_is_older_than_what_is_known_gets_the_whole_table() {
    let mut world = World::new(&["n1", "n2"]);
    world.create_service(service("web", 2));
    let (_dir, server) = server_in_memory(&world).await;
    let mut agent = FakeAgent::join(&server, "n3").await;
    agent.until(|agent| agent.table.is_some()).await;
    let began = world.state.index;
    let (node, table) = agent.leave().await;
    for (index, is_whole) in [(began - 1, true), (0, true), (began, false)] {
        let held =
            if index == began { view::table(&world.state, &node.node).unwrap() } else { table.clone() };
        let (agent, first) =
            FakeAgent::come_back(&server, (node.clone(), Table { index, ..held }), "n3").await;
        assert_eq!(matches!(first, First::Snapshot), is_whole, "{index}: {first:?}");
        agent.is_current(&server.cluster.state());
    }
}

#[tokio::test]
async fn an_agent_that_is_ahead_gets_the_whole_table_and_what_it_claims_counts_for_nothing() {
    let (_dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    let (node, table) = agent.leave().await;
    let ahead = table.index + 1000;
    let (mut agent, first) =
        FakeAgent::come_back(&server, (node, Table { index: ahead, ..table }), "n1").await;
    assert!(matches!(first, First::Snapshot), "{first:?}");
    // It said that it has applied the one that it came with.
    assert!(agent.index() < ahead);
    let acknowledged = || server.registry().acknowledged(&server.cluster.state());
    agent.say(AgentMessage::Alive).await;
    assert_eq!(acknowledged(), 0);
    agent.say(AgentMessage::Applied { index: agent.index() }).await;
    let index = agent.index();
    agent.until(|agent| agent.settled >= index).await;
    assert!(acknowledged() >= index);
    must(&server.cluster, Action::RotateKeys).await;
    agent.until(|agent| agent.index() > index).await;
    agent.is_current(&server.cluster.state());
}

#[tokio::test]
async fn a_manager_that_restarts_knows_what_its_log_knows() {
    let (dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    let left = agent.leave().await;
    must(&server.cluster, Action::RotateKeys).await;
    server.cluster.shutdown().await;
    drop(server);
    let server = Server::new(Cluster::open(dir.path()).await.unwrap());
    server.lead();
    let (agent, first) = FakeAgent::come_back(&server, left, "n1").await;
    agent.is_current(&server.cluster.state());
    let changes = first.changes();
    assert!(matches!(changes[..], [Change::Cluster(_)]), "{changes:?}");
}

#[tokio::test]
async fn a_cluster_that_was_forced_anew_shares_no_index_with_what_was_lost() {
    let (dir, server) = server().await;
    let mut agent = FakeAgent::join(&server, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    let (node, table) = agent.leave().await;
    let before = server.cluster.state().index;
    server.cluster.shutdown().await;
    drop(server);
    let mut last = before;
    for _ in 0..2 {
        let transport = Arc::new(Isolated);
        let cluster =
            Cluster::force_new_cluster(dir.path(), Manager::default(), transport, None).await.unwrap();
        let server = Server::new(cluster);
        server.lead();
        // Managers that are lost may have gone this far with the node.
        for index in [table.index, before, before + 1, last + 1, last + 1000] {
            let held = (node.clone(), Table { index, ..table.clone() });
            let (agent, first) = FakeAgent::come_back(&server, held, "n1").await;
            assert!(matches!(first, First::Snapshot), "{index}: {first:?}");
            assert!(agent.index() > last + (1 << 32), "{} after {last}", agent.index());
            agent.leave().await;
        }
        // From here on it is as ever, also after a restart.
        let index = must(&server.cluster, Action::RotateKeys).await;
        let current = view::table(&server.cluster.state(), &node.node).unwrap();
        server.cluster.shutdown().await;
        drop(server);
        let server = Server::new(Cluster::open(dir.path()).await.unwrap());
        server.lead();
        assert_eq!(server.cluster.state().index, index);
        must(&server.cluster, Action::RotateKeys).await;
        let (agent, first) = FakeAgent::come_back(&server, (node.clone(), current), "n1").await;
        assert!(matches!(first.changes()[..], [Change::Cluster(_)]));
        agent.leave().await;
        last = server.cluster.state().index;
        server.cluster.shutdown().await;
    }
}

/// The ways between managers of one process.
#[derive(Debug, Clone, Default)]
struct Ways(Arc<Mutex<BTreeMap<NodeId, Replica>>>);

/// One manager's way to the others.
#[derive(Debug)]
struct Way {
    from: NodeId,
    ways: Ways,
}

impl Transport for Way {
    fn call<'a>(&'a self, to: &'a Manager, request: Request) -> Calling<'a> {
        let member = self.ways.0.lock().unwrap().get(&to.node).cloned();
        Box::pin(async move {
            match member {
                Some(member) => Ok(member.handle(&self.from, request).await),
                None => Err(TransportError { to: to.node.clone(), problem: "it is dead".to_owned() }),
            }
        })
    }
}

impl Ways {
    async fn member(&self, id: RaftId, settings: Settings) -> Replica {
        let node = NodeId::from(format!("m{id}"));
        let way = Arc::new(Way { from: node.clone(), ways: self.clone() });
        let replica = Replica::start(Storage::in_memory(id).unwrap(), settings, way).await.unwrap();
        self.0.lock().unwrap().insert(node, replica.clone());
        replica
    }
}

fn manager(id: RaftId) -> Manager {
    Manager { node: NodeId::from(format!("m{id}")), addr: format!("192.0.2.{id}:2377").parse().unwrap() }
}

/// Three managers, of which the third joins so late that it is sent a snapshot; the first leads.
async fn three_managers(ways: &Ways) -> [Arc<Server>; 3] {
    let settings = |id: RaftId| Settings {
        election: Duration::from_millis(200 + 70 * id),
        snapshot_every: 20,
        keep: 5,
        ..Settings::product(&mut rand::rng())
    };
    let first = ways.member(1, settings(1)).await;
    first.found(manager(1)).await.unwrap();
    let first = Cluster::over(first);
    first.leadership().wait_for(|it| it.is_leader).await.unwrap();
    must(&first, Action::Initialize(Box::new(genesis()))).await;
    let second = Cluster::over(ways.member(2, settings(2)).await);
    first.add_manager(2, manager(2)).await.unwrap();
    for _ in 0..60 {
        must(&first, Action::RotateKeys).await;
    }
    let third = Cluster::over(ways.member(3, settings(3)).await);
    first.add_manager(3, manager(3)).await.unwrap();
    [first, second, third].map(Server::new)
}

#[tokio::test]
async fn a_new_leader_goes_on_from_where_the_former_one_left_its_agents() {
    let ways = Ways::default();
    let [first, second, third] = three_managers(&ways).await;
    first.lead();
    let joined = first.cluster.state().index;
    let mut agent = FakeAgent::join(&first, "n1").await;
    agent.until(|agent| agent.table.is_some()).await;
    create(&first.cluster, "web", service("web", 1)).await;
    agent.until(|agent| !agent.table.as_ref().unwrap().services.is_empty()).await;
    let (node, table) = agent.leave().await;
    must(&first.cluster, Action::RotateKeys).await;
    let last = create(&first.cluster, "late", service("late", 1)).await;

    // Each of them has the same state at the same index, and knows what led to it.
    for follower in [&second, &third] {
        let mut states = follower.cluster.watch();
        let state = states.wait_for(|state| state.index >= last).await.unwrap().clone();
        assert_eq!(state, first.cluster.state());
        assert_eq!(follower.cluster.changed_since(table.index), first.cluster.changed_since(table.index));
    }
    assert_eq!(third.cluster.changed_since(10), None, "it began with a snapshot");
    assert!(third.cluster.changed_since(joined).is_some());

    ways.0.lock().unwrap().remove(&NodeId::from("m1"));
    first.resign();
    first.cluster.shutdown().await;
    let leads = async |server: &Arc<Server>| {
        server.cluster.leadership().wait_for(|it| it.is_leader).await.unwrap();
        Arc::clone(server)
    };
    let elected = async {
        tokio::select! {
            server = leads(&second) => server,
            server = leads(&third) => server,
        }
    };
    let leader = tokio::time::timeout(LIMIT, elected).await.unwrap();
    leader.lead();
    let (agent, first) = FakeAgent::come_back(&leader, (node, table), "n1").await;
    agent.is_current(&leader.cluster.state());
    let changes = first.changes();
    assert!(
        matches!(&changes[..], [Change::Cluster(_), Change::Service(late)] if late.id == "late".into()),
        "{changes:?}"
    );
    assert!(agent.index() > last);
}

/// What an agent is sent at the beginning of a session, of 2,000 services and 20,000 tasks of which one changed.
#[tokio::test]
async fn one_change_among_many_tasks_costs_no_more_than_itself() {
    const SERVICES: usize = 2000;
    const REPLICAS: u64 = 10;
    let mut world = World::new(&["n1", "n2", "n3", "n4"]);
    let config = IpamConfig { subnet: Some("10.7.0.0/16".parse().unwrap()), ..IpamConfig::default() };
    let spec = NetworkSpec { ipam: vec![config], ..network("app") };
    world.must(Action::CreateNetwork { id: "net-app".into(), spec });
    for at in 0..SERVICES {
        let mut spec = service(&format!("s{at}"), REPLICAS);
        spec.task.networks.push(attachment("net-app"));
        world.create_service(spec);
    }
    while world.orchestrate().0 {}
    assert_eq!(world.state.tasks.len(), SERVICES * REPLICAS as usize);
    let viewer = NodeId::from("n1");
    let whole = view::table(&world.state, &viewer).unwrap();
    let mut journal = super::super::Journal::new(world.state.index);
    let old = world.state.clone();
    let task = world.state.tasks.values().find(|task| task.node.is_some()).unwrap().clone();
    world.report(&task, TaskState::Running);
    journal.note(&old, &world.state);
    let changes = journal.told(old.index, &world.state, &viewer).unwrap();
    assert!(matches!(&changes[..], [Change::Task(record)] if record.id == task.id), "{changes:?}");
    let delta = Delta { from: old.index, to: world.state.index, changes };
    let bytes = |message: &ManagerMessage| serde_json::to_vec(message).unwrap().len();
    let snapshot = bytes(&ManagerMessage::Snapshot { table: Box::new(whole) });
    let delta = bytes(&ManagerMessage::Delta { delta });
    println!("whole table: {snapshot} bytes; one change: {delta} bytes");
    assert!(delta < 1000 && snapshot > 1_000_000, "{delta} of {snapshot}");
}
