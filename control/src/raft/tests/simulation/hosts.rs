//! The hosts: each with an agent, some with a manager, as the table says; what they keep when their processes die.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use mesh_api::id::NodeId;
use mesh_api::session::ManagerDescription;
use mesh_api::table::{Role, Table, TaskState};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::agent::{Agent, Kept};
use super::observer::Observer;
use super::{Managers, Mutant, Running, node};
use crate::clock::simulated;
use crate::cluster::{Cluster, ProposeError};
use crate::command::{Action, Command, Genesis};
use crate::leader;
use crate::model::State;
use crate::raft::tests::net::Net;
use crate::raft::tests::platter::Platter;
use crate::raft::{ELECTION_MS, Manager, RaftId, Replica, Settings};
use crate::session::{Server, view};
use crate::testing::{CA, description, genesis};

/// How often hosts look at what the table wants them to be.
const LOOK: Duration = Duration::from_millis(50);
/// How long a manager whose disk failed may take to notice.
const NOTICES: Duration = Duration::from_secs(1);
/// So few addresses that they are given out again.
const SUBNET_SIZE: u8 = 28;

/// A host.
pub(super) struct Host {
    number: u8,
    kept: Rc<Kept>,
    /// How far its clock is ahead.
    pub(super) ahead_ns: Rc<Cell<i64>>,
    /// Its manager and that one's disk, whether it runs or not.
    pub(super) manager: Option<(RaftId, Platter)>,
    /// Its agent's process.
    agent: Option<JoinHandle<()>>,
}

impl Host {
    fn addr(&self) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, self.number], 2377))
    }

    fn has_failed(&self) -> bool {
        self.manager.as_ref().is_some_and(|(_, disk)| disk.has_failed())
    }
}

pub(super) struct Simulation {
    seed: u64,
    pub(super) rng: StdRng,
    pub(super) net: Net,
    pub(super) observer: Observer,
    pub(super) hosts: BTreeMap<NodeId, Host>,
    pub(super) managers: Managers,
    pub(super) mutant: Option<Mutant>,
    /// Processes started so far.
    started: u64,
    /// Links that come and go.
    pub(super) flapping: Vec<JoinHandle<()>>,
}

impl Simulation {
    pub(super) fn new(seed: u64, mutant: Option<Mutant>) -> Self {
        Self {
            seed,
            rng: StdRng::seed_from_u64(seed),
            net: Net::new(seed.wrapping_mul(31) + 7),
            observer: Observer::default(),
            hosts: BTreeMap::new(),
            managers: Rc::default(),
            mutant,
            started: 0,
            flapping: Vec::new(),
        }
    }

    /// A cluster of so many hosts, the first of which are managers.
    pub(super) async fn found(&mut self, managers: u8, workers: u8) {
        for number in 1..=managers + workers {
            let host = Host {
                number,
                kept: Kept::new(description(node(number).as_str())),
                ahead_ns: Rc::default(),
                manager: None,
                agent: None,
            };
            self.hosts.insert(node(number), host);
        }
        for number in 1..=managers {
            self.begin_manager(&node(number)).await;
        }
        let first = self.cluster(&node(1)).unwrap();
        let replica = self.managers.borrow()[&node(1)].replica.clone();
        replica.found(self.manager(&node(1))).await.unwrap();
        let genesis = Genesis { subnet_size: SUBNET_SIZE, ..genesis() };
        self.must(&first, Action::Initialize(Box::new(genesis))).await;
        for number in 1..=managers + workers {
            let role = if number <= managers { Role::Manager } else { Role::Worker };
            let description = self.hosts[&node(number)].kept.description.borrow().clone();
            self.must(
                &first,
                Action::AddNode { id: node(number), role, description, issuer: CA.root.id, token: None },
            )
            .await;
        }
        for number in 1..=managers + workers {
            self.start_agent(&node(number));
        }
        while first.managers().iter().filter(|member| member.is_voter).count() < usize::from(managers) {
            self.pass(LOOK).await;
        }
    }

    async fn must(&self, cluster: &Cluster, action: Action) {
        let at_ns = simulated::true_ns().unwrap();
        cluster.propose(Command { at_ns, action }).await.unwrap();
    }

    fn manager(&self, node: &NodeId) -> Manager {
        Manager { node: node.clone(), addr: self.hosts[node].addr() }
    }

    /// Begins a manager that has nothing yet, and has the agent tell of it.
    async fn begin_manager(&mut self, node: &NodeId) {
        self.started += 1;
        let (raft, disk) = (self.started, Platter::default());
        if self.mutant == Some(Mutant::CarelessDisk) {
            disk.be_careless();
        }
        let host = self.hosts.get_mut(node).unwrap();
        host.manager = Some((raft, disk));
        let addr = host.addr();
        self.start_manager(node).await;
        self.describe(node, Some(ManagerDescription { raft, addr }));
    }

    fn describe(&self, node: &NodeId, manager: Option<ManagerDescription>) {
        let kept = &self.hosts[node].kept;
        kept.description.borrow_mut().manager = manager;
        kept.described.notify_one();
    }

    /// Starts a host's manager with what is on its disk, if that works.
    async fn start_manager(&mut self, node: &NodeId) {
        let host = &self.hosts[node];
        let Some((raft, disk)) = host.manager.clone() else { return };
        let settings = Settings {
            heartbeat: Duration::from_millis(100),
            election: Duration::from_millis(self.rng.random_range(ELECTION_MS)),
            snapshot_every: 20,
            keep: self.rng.random_range(0..20),
        };
        let wire = self.net.wire(node);
        let storage = match disk.open(raft) {
            Ok(storage) => storage,
            Err(error) => {
                return assert!(
                    disk.has_failed(),
                    "what {node} has kept does not open: {}",
                    mesh_api::error::chain(&error)
                );
            }
        };
        let replica = match Replica::start(storage, settings, wire.clone()).await {
            Ok(replica) => replica,
            Err(error) => {
                return assert!(
                    disk.has_failed(),
                    "the manager of {node} does not start: {}",
                    mesh_api::error::chain(&error)
                );
            }
        };
        self.net.plug(node, replica.clone());
        self.observer.watch(&replica);
        let cluster = Cluster::over(replica.clone());
        let server = Server::new(cluster.clone());
        let leading = leader::follow(cluster.clone(), server.clone());
        let (mut states, own) = (cluster.watch(), node.clone());
        let duties = tokio::spawn(async move {
            // It serves nobody before it is one of the nodes itself.
            if states.wait_for(|state| state.nodes.contains_key(&own)).await.is_ok() {
                leading.await;
            }
        });
        let running = Running {
            raft,
            cluster,
            replica,
            server,
            wire,
            duties: duties.abort_handle(),
            sessions: RefCell::default(),
            ahead_ns: Rc::clone(&host.ahead_ns),
        };
        self.managers.borrow_mut().insert(node.clone(), running);
    }

    fn start_agent(&mut self, node: &NodeId) {
        self.started += 1;
        let seed = self.seed.wrapping_mul(7919) + self.started;
        let Self { net, managers, observer, mutant, .. } = self;
        let host = self.hosts.get_mut(node).unwrap();
        host.agent = Some(Agent::start(seed, node, &host.kept, net, managers, observer, *mutant));
    }

    /// The host's processes die, and its disk forgets what was not synced, but for so many writes.
    pub(super) fn kill(&mut self, node: &NodeId) {
        // A host that loses power tells nobody; a process that dies is heard of.
        if self.rng.random_bool(0.5) {
            self.net.lose(node);
        }
        self.kill_agent(node);
        self.kill_manager(node);
    }

    fn kill_agent(&mut self, node: &NodeId) {
        let host = self.hosts.get_mut(node).unwrap();
        if let Some(agent) = host.agent.take() {
            agent.abort();
        }
        host.kept.is_connected.set(false);
    }

    /// The agent's process dies and starts again, perhaps without its table.
    pub(super) fn restart_agent(&mut self, node: &NodeId, loses_table: bool) {
        if self.hosts[node].agent.is_none() {
            return;
        }
        self.kill_agent(node);
        if loses_table {
            *self.hosts[node].kept.table.borrow_mut() = None;
        }
        self.start_agent(node);
    }

    fn kill_manager(&mut self, node: &NodeId) {
        let Some(running) = self.managers.borrow_mut().remove(node) else { return };
        running.wire.kill();
        self.net.unplug(node);
        running.duties.abort();
        running.sessions.borrow().iter().for_each(tokio::task::AbortHandle::abort);
        if let Some((_, disk)) = &self.hosts[node].manager {
            disk.crash(self.rng.random_range(0..4));
        }
        tokio::spawn(async move { running.cluster.shutdown().await });
    }

    pub(super) fn is_up(&self, node: &NodeId) -> bool {
        self.hosts[node].agent.is_some()
    }

    /// Hosts that are up.
    pub(super) fn up(&self) -> Vec<NodeId> {
        self.hosts.keys().filter(|node| self.is_up(node)).cloned().collect()
    }

    pub(super) fn any(&mut self, of: &[NodeId]) -> Option<NodeId> {
        (!of.is_empty()).then(|| of[self.rng.random_range(0..of.len())].clone())
    }

    pub(super) fn cluster(&self, node: &NodeId) -> Option<Cluster> {
        self.managers.borrow().get(node).map(|running| running.cluster.clone())
    }

    pub(super) fn leader(&self) -> Option<NodeId> {
        let managers = self.managers.borrow();
        managers
            .iter()
            .find(|(_, it)| it.cluster.leadership().borrow().is_leader)
            .map(|(node, _)| node.clone())
    }

    /// Lets time pass, in which hosts become what the table says.
    pub(super) async fn pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            sleep(LOOK.min(end - Instant::now())).await;
            self.follow_roles().await;
            // What the leader does, it does by its own clock.
            if let Some(leader) = self.leader() {
                simulated::set_ahead_ns(self.hosts[&leader].ahead_ns.get());
            }
        }
        self.observer.check();
    }

    /// Hosts begin and end managers as the table says and the other managers tell.
    async fn follow_roles(&mut self) {
        for node in self.up() {
            let record =
                self.hosts[&node].kept.table.borrow().as_ref().and_then(|it| it.nodes.get(&node).cloned());
            let Some(record) = record else { continue };
            let ends = self.managers.borrow().get(&node).is_some_and(|running| {
                let members = running.cluster.managers();
                let is_superfluous =
                    record.role == Role::Worker && !members.iter().any(|member| member.id == running.raft);
                *running.cluster.removed().borrow() || is_superfluous
            });
            if ends {
                self.kill_manager(&node);
                self.hosts.get_mut(&node).unwrap().manager = None;
                self.describe(&node, None);
            } else if record.role == Role::Manager
                && record.manager.is_none()
                && self.hosts[&node].manager.is_none()
            {
                self.begin_manager(&node).await;
            }
        }
    }

    /// Hosts that are down, or whose disks failed, start again.
    pub(super) async fn restart(&mut self, share: f64) {
        for node in self.hosts.keys().cloned().collect::<Vec<_>>() {
            if self.hosts[&node].has_failed() {
                self.takes_no_part(&node).await;
                self.kill(&node);
            }
            if !self.is_up(&node) && self.rng.random_bool(share) {
                self.start_agent(&node);
            }
            let has_none = !self.managers.borrow().contains_key(&node);
            if self.is_up(&node) && has_none {
                self.start_manager(&node).await;
            }
        }
    }

    /// A manager whose disk failed answers nobody any longer.
    async fn takes_no_part(&self, node: &NodeId) {
        let Some(cluster) = self.cluster(node) else { return };
        sleep(NOTICES).await;
        let read = cluster.linearizable().await;
        assert!(
            matches!(read, Err(ProposeError::Storage(_) | ProposeError::Stopped)),
            "the disk of {node} failed, and its manager answers {read:?}"
        );
    }

    /// Mends everything, and starts whatever is down.
    pub(super) async fn mend(&mut self) {
        self.flapping.drain(..).for_each(|flapping| flapping.abort());
        self.net.heal();
        self.net.set_weather(crate::raft::tests::net::Weather::FAIR);
        for host in self.hosts.values() {
            host.manager.iter().for_each(|(_, disk)| disk.mend());
        }
        self.restart(1.0).await;
    }

    /// Whether any manager can be asked, and answers.
    pub(super) async fn serves(&self) -> bool {
        let clusters: Vec<Cluster> = self.managers.borrow().values().map(|it| it.cluster.clone()).collect();
        let answers = clusters.iter().map(Cluster::linearizable);
        self.leader().is_some() && futures::future::join_all(answers).await.iter().all(Result::is_ok)
    }

    /// What is not as it should be once nothing is wrong any longer and nobody wants anything.
    pub(super) fn unsettled(&self) -> Option<String> {
        let Some(leader) = self.leader() else { return Some("nobody leads".to_owned()) };
        let cluster = self.cluster(&leader)?;
        let state = cluster.state();
        let members = cluster.managers();
        let voters: BTreeSet<&NodeId> =
            members.iter().filter(|member| member.is_voter).map(|member| &member.manager.node).collect();
        let wanted = state.nodes.values().filter(|node| node.spec.role == Role::Manager);
        if voters != wanted.map(|node| &node.id).collect() || voters.len() != members.len() {
            return Some("the managers are not those that the table says".to_owned());
        }
        for (node, running) in &*self.managers.borrow() {
            let index = running.cluster.state().index;
            if running.cluster.state() != state {
                return Some(format!("{node} is at {index}, {leader} at {}", state.index));
            }
        }
        let other = self.hosts.iter().find(|(node, host)| {
            let shown = view::table(&state, node).map(|table| Table { index: 0, ..table });
            let has = host.kept.applied.borrow().clone().map(|table| Table { index: 0, ..table });
            !host.kept.is_connected.get() || has != shown
        });
        match other {
            Some((node, host)) if host.kept.is_connected.get() => Some(format!("{node} has another table")),
            Some((node, _)) => Some(format!("{node} has no session")),
            None => lacks_tasks(&state),
        }
    }

    /// What the leader and the agents have, for messages.
    pub(super) fn details(&self) -> String {
        let state = self.leader().and_then(|leader| self.cluster(&leader)).map(|cluster| cluster.state());
        let tables = self.hosts.iter().map(|(node, host)| (node, host.kept.applied.borrow().clone()));
        format!("{:#?}\n{state:#?}\n{:#?}", self.seen(), tables.collect::<Vec<_>>())
    }

    /// What each manager knows, for messages.
    pub(super) fn seen(&self) -> Vec<impl std::fmt::Debug> {
        let managers = self.managers.borrow();
        let seen = |(node, Running { cluster, .. }): (&NodeId, &Running)| {
            (node.clone(), cluster.state().index, cluster.leadership().borrow().clone(), cluster.managers())
        };
        managers.iter().map(seen).collect()
    }
}

/// A service that has fewer or more tasks than it asks for.
fn lacks_tasks(state: &State) -> Option<String> {
    for service in state.services.values() {
        let tasks: Vec<_> = state.tasks_of_service(&service.id).filter(|task| !task.has_ended()).collect();
        let running =
            tasks.iter().filter(|task| task.is_wanted() && task.status.state == TaskState::Running).count();
        if service.replicas() != Some(running as u64) || tasks.len() != running {
            return Some(format!("of service {} {running} tasks run, of {}", service.spec.name, tasks.len()));
        }
    }
    None
}
