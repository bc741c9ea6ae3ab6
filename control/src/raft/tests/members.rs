//! Several managers: they join, agree, lose one another, and leave.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::id::{NodeId, TokenId};
use mesh_api::table::Role;
use mesh_api::tls::KeyId;
use tokio::time::{Instant, timeout};

use super::net::{Net, Weather, Wire};
use super::platter::{Fault, Platter};
use crate::cluster::{Cluster, ProposeError};
use crate::command::{Action, Command};
use crate::model::State;
use crate::raft::{Call, Manager, MembersError, RaftId, Replica, Request, Response, Settings, Storage};
use crate::refusal::Refusal;
use crate::store::folder::Engine;
use crate::testing::{description, genesis, network};

/// Short distances, so that snapshots are made and sent.
fn settings(id: RaftId) -> Settings {
    Settings {
        heartbeat: Duration::from_millis(100),
        election: Duration::from_millis(300 + id * 37 % 300),
        snapshot_every: 20,
        keep: 5,
    }
}

fn node(id: RaftId) -> NodeId {
    NodeId::from(format!("m{id}"))
}

fn manager(id: RaftId) -> Manager {
    Manager { node: node(id), addr: format!("192.0.2.{id}:2377").parse().unwrap() }
}

struct Running {
    cluster: Cluster,
    wire: Arc<Wire>,
}

/// Managers with disks in memory.
struct Managers {
    net: Net,
    disks: BTreeMap<RaftId, Platter>,
    running: BTreeMap<RaftId, Running>,
}

impl Managers {
    async fn new(count: u64) -> Self {
        let mut managers = Self { net: Net::new(1), disks: BTreeMap::new(), running: BTreeMap::new() };
        let replica = managers.start(1).await;
        replica.found(manager(1)).await.unwrap();
        managers.leader().await;
        let initialize = Action::Initialize(Box::new(genesis()));
        managers.of(1).propose(Command::now(initialize)).await.unwrap();
        for id in 2..=count {
            managers.start(id).await;
            managers.of(1).add_manager(id, manager(id)).await.unwrap();
        }
        managers
    }

    async fn start(&mut self, id: RaftId) -> Replica {
        let disk = self.disks.entry(id).or_default().clone();
        let wire = self.net.wire(&node(id));
        let storage = disk.open(id).unwrap();
        let replica = Replica::start(storage, settings(id), wire.clone()).await.unwrap();
        self.net.plug(&node(id), replica.clone());
        self.running.insert(id, Running { cluster: Cluster::over(replica.clone()), wire });
        replica
    }

    async fn kill(&mut self, id: RaftId) {
        let Running { cluster, wire } = self.running.remove(&id).unwrap();
        wire.kill();
        self.net.unplug(&node(id));
        self.disks[&id].crash(0);
        cluster.shutdown().await;
    }

    fn of(&self, id: RaftId) -> Cluster {
        self.running[&id].cluster.clone()
    }

    async fn leader(&self) -> RaftId {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            let leads = |running: &Running| running.cluster.leadership().borrow().is_leader;
            if let Some((id, _)) = self.running.iter().find(|(_, running)| leads(running)) {
                return *id;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody leads");
    }

    async fn settle(&self) {
        let latest = self.of(self.leader().await).linearizable().await.unwrap();
        for running in self.running.values() {
            let mut states = running.cluster.watch();
            let reached = timeout(Duration::from_secs(20), states.wait_for(|it| it.index >= latest.index));
            let state = reached.await.expect("it catches up").unwrap().clone();
            assert_eq!(state, latest);
        }
    }
}

fn create(name: &str) -> Command {
    Command::now(Action::CreateNetwork { id: name.into(), spec: network(name) })
}

#[tokio::test(start_paused = true)]
async fn any_manager_takes_writes_and_reads_what_is_decided() {
    let managers = Managers::new(3).await;
    for at in 0..30 {
        let (writer, reader) = (1 + at % 3, 1 + (at + 1) % 3);
        let reply = managers.of(writer).propose(create(&format!("n{at}"))).await.unwrap();
        assert!(managers.of(writer).state().index >= reply.index, "it is in effect where it was proposed");
        let read = managers.of(reader).linearizable().await.unwrap();
        assert!(read.network_by_name(&format!("n{at}")).is_some());
        let taken = managers.of(reader).propose(create(&format!("n{at}"))).await;
        assert!(matches!(taken, Err(ProposeError::Refused(_))));
    }
    managers.settle().await;
    let members = managers.of(managers.leader().await).managers();
    assert!(members.iter().all(|it| it.is_voter && it.is_reachable == Some(true) && it.lag == Some(0)));
    assert_eq!(members.iter().filter(|it| it.is_leader).count(), 1);
    let seen = managers.of(2).managers();
    assert_eq!(seen.iter().map(|it| it.manager.clone()).collect::<Vec<_>>(), [1, 2, 3].map(manager));
}

#[tokio::test(start_paused = true)]
async fn another_leads_within_two_seconds_and_what_was_acknowledged_stays() {
    let mut managers = Managers::new(3).await;
    for round in 0..8 {
        let leader = managers.leader().await;
        let before = format!("before{round}");
        managers.of(leader).propose(create(&before)).await.unwrap();
        managers.kill(leader).await;
        let other = *managers.running.keys().next().unwrap();
        let since = Instant::now();
        managers.of(other).propose(create(&format!("after{round}"))).await.unwrap();
        assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
        let read = managers.of(other).linearizable().await.unwrap();
        assert!(read.network_by_name(&before).is_some());
        managers.start(leader).await;
        managers.settle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_restarts_at_once_gives_no_stale_answers() {
    let mut managers = Managers::new(3).await;
    for round in 0..8 {
        let leader = managers.leader().await;
        let name = format!("n{round}");
        managers.of(leader).propose(create(&name)).await.unwrap();
        let before = managers.of(leader).leadership().borrow().term;
        managers.kill(leader).await;
        managers.start(leader).await;
        let next = managers.leader().await;
        assert!(managers.of(next).leadership().borrow().term > before, "it was elected for that");
        let read = managers.of(leader).linearizable().await.unwrap();
        assert!(read.network_by_name(&name).is_some(), "{name} was acknowledged");
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_majority_nothing_is_decided_and_it_is_said() {
    let mut managers = Managers::new(3).await;
    let leader = managers.leader().await;
    let others: Vec<RaftId> = managers.running.keys().copied().filter(|id| *id != leader).collect();
    for id in &others {
        managers.kill(*id).await;
    }
    let alone = managers.of(leader);
    let refused = alone.propose(create("alone")).await;
    assert!(matches!(refused, Err(ProposeError::NoLeader)));
    assert!(matches!(alone.linearizable().await, Err(ProposeError::NoLeader)));
    let leadership = alone.leadership().borrow().clone();
    assert!(!leadership.is_leader && leadership.leader.is_none(), "{leadership:?}");
    for id in others {
        managers.start(id).await;
    }
    managers.of(leader).propose(create("again")).await.unwrap();
    managers.settle().await;
}

#[tokio::test(start_paused = true)]
async fn a_manager_far_behind_gets_a_snapshot() {
    let mut managers = Managers::new(3).await;
    managers.leader().await;
    managers.kill(3).await;
    for at in 0..100 {
        managers.of(1).propose(create(&format!("n{at}"))).await.unwrap();
    }
    managers.start(3).await;
    managers.settle().await;
    managers.start(4).await;
    managers.of(2).add_manager(4, manager(4)).await.unwrap();
    managers.of(2).add_manager(4, manager(4)).await.unwrap();
    managers.settle().await;
    // They go on from it after a restart.
    managers.kill(4).await;
    managers.start(4).await;
    managers.settle().await;
}

#[tokio::test(start_paused = true)]
async fn managers_leave_until_one_is_left() {
    let mut managers = Managers::new(3).await;
    managers.leader().await;
    managers.kill(3).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let leader = managers.leader().await;
    let refused = managers.of(1).remove_manager(3 - leader).await;
    assert_eq!(refused, Err(MembersError::Quorum), "only one of the two left would be reachable");
    managers.of(1).remove_manager(3).await.unwrap();
    managers.of(1).remove_manager(3).await.unwrap();

    // Whoever was away hears of it when it is back.
    managers.start(3).await;
    let mut removed = managers.of(3).removed();
    timeout(Duration::from_secs(10), removed.wait_for(|removed| *removed)).await.unwrap().unwrap();
    managers.kill(3).await;

    // The leader can leave too.
    let leader = managers.leader().await;
    managers.of(leader).remove_manager(leader).await.unwrap();
    managers.kill(leader).await;
    let last = managers.leader().await;
    managers.of(last).propose(create("alone")).await.unwrap();
    assert_eq!(managers.of(last).remove_manager(last).await, Err(MembersError::Last));
    assert_eq!(managers.of(last).managers().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_manager_whose_disk_fails_stops_and_says_so() {
    let mut managers = Managers::new(3).await;
    for (round, fault) in [Fault::Full, Fault::Sync { is_written: true }, Fault::Sync { is_written: false }]
        .into_iter()
        .enumerate()
    {
        let leader = managers.leader().await;
        managers.disks[&leader].fail(fault);
        let failing = managers.of(leader);
        let refused = failing.propose(create(&format!("lost{round}"))).await;
        assert!(matches!(refused, Err(ProposeError::Storage(_))), "{refused:?}");
        // A disk that works again is no reason to go on: what it should have may be gone.
        managers.disks[&leader].mend();
        assert!(matches!(failing.linearizable().await, Err(ProposeError::Storage(_))));
        let other = managers.running.keys().copied().find(|id| *id != leader).unwrap();
        managers.of(other).propose(create(&format!("kept{round}"))).await.unwrap();
        assert_ne!(managers.leader().await, leader);
        managers.kill(leader).await;
        managers.start(leader).await;
        managers.settle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn messages_for_others_are_not_taken() {
    let managers = Managers::new(3).await;
    let (one, request) = (managers.of(1), |from, to| Request { from, to, call: Call::ReadIndex });
    assert!(matches!(one.handle(&node(2), request(2, 1)).await, Response::ReadIndex(_)));
    assert!(matches!(one.handle(&node(2), request(2, 9)).await, Response::Unavailable), "another member's");
    assert!(matches!(one.handle(&node(3), request(2, 1)).await, Response::Unavailable), "another's name");
    // Whoever is asked: those that don't lead ask the leader, who alone knows.
    for asked in [1, 2, 3] {
        assert!(matches!(managers.of(asked).handle(&node(8), request(8, asked)).await, Response::NotMember));
    }
}

/// Managers on real disks.
async fn on_disk(net: &Net, dir: &Path, id: RaftId, engine: Option<Engine>) -> Cluster {
    let dir = dir.join(format!("{id}"));
    let storage = match engine {
        Some(engine) => Storage::create(&dir, engine, id).unwrap(),
        None => Storage::open(&dir).unwrap(),
    };
    let replica = Replica::start(storage, settings(id), net.wire(&node(id))).await.unwrap();
    net.plug(&node(id), replica.clone());
    if id == 1 && engine.is_some() {
        replica.found(manager(1)).await.unwrap();
        replica.leadership().wait_for(|it| it.is_leader).await.unwrap();
    }
    Cluster::over(replica)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_makes_a_cluster_of_its_own() {
    let (net, dir) = (Net::new(1), tempfile::tempdir().unwrap());
    let mut clusters = Vec::new();
    for (id, engine) in [(1, Engine::Sled), (2, Engine::Redb), (3, Engine::Sled)] {
        clusters.push(on_disk(&net, dir.path(), id, Some(engine)).await);
        if id == 1 {
            let initialize = Action::Initialize(Box::new(genesis()));
            clusters[0].propose(Command::now(initialize)).await.unwrap();
        } else {
            clusters[0].add_manager(id, manager(id)).await.unwrap();
        }
    }
    for at in 0..30 {
        clusters[at % 3].propose(create(&format!("n{at}"))).await.unwrap();
    }
    let before = clusters[1].linearizable().await.unwrap();
    for (id, cluster) in (1..).zip(clusters) {
        net.unplug(&node(id));
        cluster.shutdown().await;
    }
    // One alone decides nothing.
    let alone = on_disk(&net, dir.path(), 2, None).await;
    assert!(matches!(alone.propose(create("alone")).await, Err(ProposeError::NoLeader)));
    net.unplug(&node(2));
    alone.shutdown().await;

    let path = dir.path().join("2");
    // A disk says as much while nobody runs on it; a backup of it has that.
    let storage = Storage::open(&path).unwrap();
    assert!(storage.read().unwrap().state == before);
    storage.close().await;
    let survivor = Cluster::force_new_cluster(&path, manager(2), net.wire(&node(2)), None).await.unwrap();
    let ours = survivor.state();
    assert!(ours.index > before.index + 1000, "no index that the lost may have given out is given again");
    assert!(State { index: before.index, ..ours } == before, "all that was acknowledged is there");
    let (history, lost) = (survivor.history(), before.index + 1);
    assert!(history.at(lost).is_none() && survivor.changed_since(lost).is_none(), "nor is one explained");
    assert_ne!(survivor.raft_id(), 2, "former members are not heard");
    assert_eq!(survivor.managers().len(), 1);
    survivor.propose(create("goes-on")).await.unwrap();
    // One of the lost that comes back asks for whom it knew there, and hears that it is a manager no longer.
    let lost = Request { from: 3, to: 2, call: Call::ReadIndex };
    assert!(matches!(survivor.handle(&node(3), lost).await, Response::NotMember));
    survivor.shutdown().await;
    let survivor = Cluster::open(&path).await.unwrap();
    assert!(survivor.state().network_by_name("goes-on").is_some());
    survivor.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_is_reached_elsewhere_takes_part_again_once_its_address_is_known() {
    for count in [2, 3] {
        let mut managers = Managers::new(count).await;
        for round in 0..4 {
            // The leader moves every other time.
            let leader = managers.leader().await;
            let moved = if round % 2 == 0 { leader } else { (1..=count).find(|id| *id != leader).unwrap() };
            managers.kill(moved).await;
            let addr = format!("198.51.100.{moved}:{}", 2377 + round).parse().unwrap();
            managers.net.settle(&node(moved), addr);
            managers.start(moved).await;
            // What its agent tells the leader, who may have to be elected first.
            let (told, manager) =
                (Instant::now() + Duration::from_mins(1), Manager { node: node(moved), addr });
            loop {
                assert!(Instant::now() < told, "{count} managers, round {round}: {moved} of {leader}");
                let leader = managers.leader().await;
                if managers.of(leader).add_manager(moved, manager.clone()).await.is_ok() {
                    break;
                }
            }
            let name = format!("n{round}");
            managers.of(moved).propose(create(&name)).await.unwrap();
            managers.settle().await;
            for running in managers.running.values() {
                let seen = running.cluster.managers();
                assert_eq!(seen.len() as u64, count);
                assert_eq!(seen.iter().find(|it| it.id == moved).map(|it| &it.manager), Some(&manager));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_join_token_is_good_for_so_many_nodes_whichever_managers_are_asked() {
    let managers = Managers::new(3).await;
    managers.net.set_weather(Weather { doubled: 50, ..Weather::FAIR });
    let (role, secret_digest) = (Role::Worker, [7; 32]);
    let token = TokenId::from("t");
    let life_ns = 3600 * 1_000_000_000;
    let made = Action::CreateToken { id: token.clone(), role, secret_digest, life_ns, uses: Some(5) };
    managers.of(1).propose(Command::now(made)).await.unwrap();
    let joining = (0..30_u64).map(|at| {
        let (cluster, token) = (managers.of(1 + at % 3), Some(token.clone()));
        let (id, description) = (NodeId::from(format!("n{at}")), description(&format!("n{at}")));
        let action = Action::AddNode { id, role, description, issuer: KeyId::default(), token };
        async move { cluster.propose(Command::now(action)).await }
    });
    let joined = futures::future::join_all(joining).await;
    let refused =
        |it: &Result<_, ProposeError>| matches!(it, Err(ProposeError::Refused(Refusal::TokenUsedUp)));
    assert_eq!(joined.iter().filter(|it| it.is_ok()).count(), 5);
    assert_eq!(joined.iter().filter(|it| refused(it)).count(), 25);
    managers.settle().await;
    let state = managers.of(2).state();
    assert_eq!((state.nodes.len(), state.tokens[&token].uses_left), (5, Some(0)));
}
