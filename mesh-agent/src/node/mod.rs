//! The node's loop: brings this host to what the table asks of it, and tells the managers how that stands.
//!
//! One task owns everything that changes: the dataplane, the zone, which tasks there are. Tasks' own ways up and down
//! are [`driver`]s beside it, which talk to it in events.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_api::error::chain;
use mesh_api::id::{NodeId, TaskId};
use mesh_api::session::TaskStatus;
use mesh_api::table::{NodeRecord, NodeState, Table, TaskRecord, TaskState};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tracing::{info, warn};

mod absent;
mod alias;
mod assign;
pub(crate) mod attach;
mod driver;
mod plan;
mod plane;
mod setup;
pub(crate) mod silent;
mod tasks;

use absent::Absent;
use alias::Aliases;
use attach::Expected;
use driver::{Drivers, Event};
use plan::{TaskAction, TaskView, plan_tasks};
pub(crate) use plane::Plane;
pub use setup::NodeError;
use setup::Setup;
use silent::{Found, Silent, Vteps};
use tasks::LocalTask;

use crate::config::Config;
use crate::dataplane::{AttachmentKey, Local, Touched};
use crate::encryption::{Look, Situation};
use crate::facts::Describe;
use crate::links::Watch;
use crate::runtime::Runtime;
use crate::session::{Membership, Session, Statuses};

/// How often the host is looked at when nothing tells of a change.
const AUDIT: Duration = Duration::from_secs(2);
/// How long changes are gathered before they go to the dataplane.
pub(crate) const DEBOUNCE: Duration = Duration::from_millis(3);
/// How long a node that can't be brought up waits before it tries again.
const RETRY: Duration = Duration::from_secs(5);
/// Events waiting for the loop.
const EVENTS: usize = 256;

/// What a node is made of, and where it reports.
#[derive(Debug)]
pub(crate) struct NodeInputs {
    pub(crate) config: Config,
    pub(crate) membership: Membership,
    pub(crate) runtime: Runtime,
    pub(crate) describe: Describe,
    pub(crate) tables: watch::Receiver<Option<Arc<Table>>>,
    /// What changed of the table and has not been taken from here; the two agree while the table is borrowed.
    pub(crate) touched: Arc<Mutex<Touched>>,
    pub(crate) settled: watch::Receiver<u64>,
    pub(crate) applied: watch::Sender<Option<u64>>,
    pub(crate) statuses: watch::Sender<Statuses>,
    /// How long uplinks that are not there yet are waited for at a time.
    pub(crate) patience: Duration,
}

impl NodeInputs {
    /// A node that hears and reports through `session`.
    pub(crate) fn of_session(
        config: Config,
        membership: Membership,
        runtime: Runtime,
        describe: Describe,
        session: &Session,
        patience: Duration,
    ) -> Self {
        Self {
            config,
            membership,
            runtime,
            describe,
            tables: session.tables.clone(),
            touched: Arc::clone(&session.touched),
            settled: session.settled.clone(),
            applied: session.applied.clone(),
            statuses: session.statuses.clone(),
            patience,
        }
    }
}

/// A running node.
#[derive(Debug)]
pub(crate) struct Node {
    commands: mpsc::Sender<Command>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
enum Command {
    /// Stop the tasks, remove everything, and say what went wrong on the way.
    TearDown(oneshot::Sender<Vec<String>>),
    /// An attachment is to come in the table, and is of this; the answer comes once that is noted.
    Expect(TaskId, Box<Expected>, oneshot::Sender<()>),
    /// It is not to come.
    Unexpect(TaskId),
    /// End an attachment; the answer comes once it is gone.
    Detach(TaskId, oneshot::Sender<()>),
}

impl Node {
    /// Starts a node, with the dataplane `P`. The receiver tells how the first attempt to bring it up went; it waits
    /// for a table.
    pub(crate) fn start<P: Plane>(inputs: NodeInputs) -> (Self, oneshot::Receiver<Result<(), NodeError>>) {
        let (commands, receiver) = mpsc::channel(1);
        let (ready, first) = oneshot::channel();
        let task = tokio::spawn(run::<P>(inputs, receiver, ready));
        (Self { commands, task }, first)
    }

    /// Where attachments are made and ended.
    pub(crate) fn attachments(&self) -> attach::Attachments {
        attach::Attachments(self.commands.clone())
    }

    /// Stops the tasks and removes everything; returns what went wrong on the way.
    pub(crate) async fn tear_down(self) -> Vec<String> {
        let (reply, errors) = oneshot::channel();
        if self.commands.send(Command::TearDown(reply)).await.is_err() {
            return Vec::new();
        }
        errors.await.unwrap_or_else(|_| vec!["the node's loop has stopped".to_owned()])
    }
}

impl Drop for Node {
    /// The loop stops; tasks and dataplane go on.
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run<P: Plane>(
    mut inputs: NodeInputs,
    mut commands: mpsc::Receiver<Command>,
    ready: oneshot::Sender<Result<(), NodeError>>,
) {
    let mut ready = Some(ready);
    let worker = loop {
        let attempt = async {
            // The sender is the session's; without it there is nothing to be a node of.
            let table = inputs.tables.wait_for(Option::is_some).await.ok().and_then(|table| table.clone());
            let vxlan_port = table?.cluster.data_path_port;
            Some(Worker::<P>::bring_up(&inputs, vxlan_port).await)
        };
        let brought_up = tokio::select! {
            brought_up = attempt => brought_up,
            command = tear_down(&mut commands) => return clear_away::<P>(&inputs, command).await,
        };
        match brought_up {
            Some(Ok(worker)) => break worker,
            Some(Err(error)) => {
                warn!(error = &error as &dyn std::error::Error, "the node can't be brought up");
                if let Some(ready) = ready.take() {
                    let _ = ready.send(Err(error));
                }
            }
            None => return,
        }
        tokio::select! {
            () = sleep(RETRY) => {}
            command = tear_down(&mut commands) => return clear_away::<P>(&inputs, command).await,
        }
    };
    if let Some(ready) = ready.take() {
        let _ = ready.send(Ok(()));
    }
    worker.run(inputs, commands).await;
}

/// Waits for the command to tear down; `None` once nobody can give it. A node that is not up attaches nothing: whoever
/// asks for it learns that by the end of the command.
async fn tear_down(commands: &mut mpsc::Receiver<Command>) -> Option<oneshot::Sender<Vec<String>>> {
    loop {
        if let Command::TearDown(reply) = commands.recv().await? {
            return Some(reply);
        }
    }
}

/// Tears down a node that has not come up: what the attempts made, and what is left of an earlier run.
async fn clear_away<P: Plane>(inputs: &NodeInputs, reply: Option<oneshot::Sender<Vec<String>>>) {
    let Some(reply) = reply else { return };
    let _ =
        reply.send(remove_all::<P>(&inputs.runtime, &inputs.config.bpffs, &inputs.config.state_dir).await);
}

/// Removes what nodes of earlier runs left on this host, while none runs: tasks, attachments, pins, links, rules. Goes
/// on past failures and returns them in words.
pub(crate) async fn remove_all<P: Plane>(runtime: &Runtime, bpffs: &Path, state_dir: &Path) -> Vec<String> {
    let mut errors = driver::stop_all(runtime).await;
    errors.extend(silent::record(state_dir, &Vteps::new()).err().map(|error| error.to_string()));
    errors.extend(setup::clear_away::<P>(bpffs, state_dir).await);
    errors
}

/// The loop's state.
struct Worker<P> {
    config: Config,
    node: NodeId,
    membership: Membership,
    setup: Setup<P>,
    runtime: Runtime,
    drivers: Drivers,
    events: mpsc::Receiver<Event>,
    /// The last table. It is not kept for long: while it is, a change copies it.
    tables: watch::Receiver<Option<Arc<Table>>>,
    touched: Arc<Mutex<Touched>>,
    /// What was taken from there, and is still to be followed.
    pending: Touched,
    /// The ids of this node's tasks in the table.
    assigned: BTreeSet<TaskId>,
    tasks: BTreeMap<TaskId, LocalTask>,
    /// Attachments that are to come in the table.
    expected: BTreeMap<TaskId, Expected>,
    aliases: Aliases,
    /// Other nodes' tasks that are not there.
    absent: Absent,
    nacks: mpsc::Receiver<AttachmentKey>,
    /// Asks the other nodes whether they are there.
    silent: Silent,
    /// What was found out of them, as far as that has been followed.
    found: Found,
    /// Those silent that [`silent::record`] has.
    recorded: Option<Vteps>,
    settled: watch::Receiver<u64>,
    applied: watch::Sender<Option<u64>>,
    statuses: watch::Sender<Statuses>,
    describe: Describe,
    /// When the dataplane is to be brought up to date, if it is not.
    apply_at: Option<Instant>,
    /// Whether running tasks' links are to be looked at: networks may have changed, or it failed the last time.
    rewire: bool,
    tearing_down: Option<oneshot::Sender<Vec<String>>>,
}

impl<P: Plane> Worker<P> {
    /// Makes the node's own parts, finds the tasks of an earlier run, and applies the table.
    async fn bring_up(inputs: &NodeInputs, vxlan_port: u16) -> Result<Self, NodeError> {
        let setup = Setup::<P>::bring_up(inputs, vxlan_port).await?;
        let NodeInputs { config, membership, runtime, describe, settled, applied, statuses, .. } = inputs;
        let (sender, events) = mpsc::channel(EVENTS);
        let nacks = setup.plane.nacks().map_err(|error| NodeError::Dataplane(Box::new(error)))?;
        let mut worker = Self {
            config: config.clone(),
            node: membership.node_id.clone(),
            membership: membership.clone(),
            drivers: Drivers::new(runtime.clone(), setup.links.clone(), sender),
            runtime: runtime.clone(),
            setup,
            events,
            tables: inputs.tables.clone(),
            touched: Arc::clone(&inputs.touched),
            // Also where an attempt before this one took what there was.
            pending: Touched::all(),
            assigned: BTreeSet::new(),
            tasks: BTreeMap::new(),
            expected: BTreeMap::new(),
            aliases: Aliases::default(),
            absent: Absent::default(),
            nacks,
            silent: Silent::start(membership.data_path),
            found: Found::default(),
            recorded: None,
            settled: settled.clone(),
            applied: applied.clone(),
            statuses: statuses.clone(),
            describe: describe.clone(),
            apply_at: None,
            rewire: false,
            tearing_down: None,
        };
        worker.adopt().await?;
        // An earlier version may have configured its tasks otherwise.
        worker.refresh_links().await;
        worker.apply().await.map_err(|error| NodeError::Dataplane(Box::new(error)))?;
        worker.tell_uplinks();
        Ok(worker)
    }

    async fn run(mut self, inputs: NodeInputs, mut commands: mpsc::Receiver<Command>) {
        let mut settled = inputs.settled;
        let mut watch = Watch::open().map_err(|error| warn!(%error, "interfaces are only polled")).ok();
        let mut rules = Watch::of_rules().map_err(|error| warn!(%error, "rules are only polled")).ok();
        let mut audit = interval(AUDIT);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.tables.mark_changed();
        loop {
            self.plan(*settled.borrow());
            let deadline = self.tasks.values().filter_map(LocalTask::drain_deadline).min();
            tokio::select! {
                Ok(()) = self.tables.changed() => {
                    self.take_changes();
                    self.apply_soon();
                }
                Ok(()) = settled.changed() => {
                    settled.mark_unchanged();
                    if self.setup.encryption.waits_for_others() {
                        self.encrypt(Look::Changes).await;
                    }
                }
                Some(event) = self.events.recv() => self.event(event).await,
                Some(key) = self.nacks.recv() => self.take_nack(key),
                () = at(self.absent.next_expiry()) => self.look_again(),
                () = self.silent.changed() => self.take_silent(),
                () = at(self.apply_at) => self.apply_now().await,
                () = at(deadline) => {}
                () = changed(&mut watch) => self.audit().await,
                () = changed(&mut rules) => self.audit_rules().await,
                _ = audit.tick() => self.audit().await,
                command = commands.recv() => match command {
                    Some(Command::TearDown(reply)) => self.begin_tear_down(reply),
                    Some(Command::Expect(id, expected, noted)) => {
                        self.expected.insert(id, *expected);
                        let _ = noted.send(());
                    }
                    Some(Command::Unexpect(id)) => drop(self.expected.remove(&id)),
                    Some(Command::Detach(id, done)) => self.detach(&id, done),
                    None => return,
                },
            }
            // What the dataplane has to do comes first.
            if self.apply_at.is_none() && std::mem::take(&mut self.rewire) {
                self.rewire_all().await;
            }
            if self.tasks.values().all(LocalTask::has_ended)
                && let Some(reply) = self.tearing_down.take()
            {
                let _ = reply.send(self.tear_down().await);
                return;
            }
        }
    }

    /// Notes what changed of the table, and returns it; to be dropped soon.
    fn take_changes(&mut self) -> Option<Arc<Table>> {
        let table = {
            let table = self.tables.borrow_and_update();
            let touched = std::mem::take(&mut *self.touched.lock().unwrap_or_else(PoisonError::into_inner));
            self.absent.forget(&touched);
            self.pending.merge(touched);
            table.clone()?
        };
        let is_ours = |id: &TaskId| table.tasks.get(id).is_some_and(|task| task.node == self.node);
        self.rewire |= self.pending.all || self.pending.networks;
        if self.pending.all {
            self.assigned = table.tasks.keys().filter(|id| is_ours(id)).cloned().collect();
        }
        if self.pending.all || self.pending.nodes {
            let vteps = table.nodes.values().map(|node| node.vtep);
            self.silent.follow(vteps.filter(|vtep| *vtep != self.membership.data_path).collect());
        }
        for id in self.pending.tasks.values().flat_map(BTreeMap::keys) {
            if is_ours(id) {
                self.assigned.insert(id.clone());
            } else {
                self.assigned.remove(id);
            }
        }
        Some(table)
    }

    /// What `read` makes of the last table.
    fn with_table<T>(&self, read: impl FnOnce(&Table) -> T) -> Option<T> {
        self.tables.borrow().as_deref().map(read)
    }

    fn plan(&mut self, settled: u64) {
        if self.tearing_down.is_some() {
            return;
        }
        let now = Instant::now();
        let local: BTreeMap<TaskId, TaskView> =
            self.tasks.iter().map(|(id, task)| (id.clone(), task.view)).collect();
        let actions = self
            .with_table(|table| plan_tasks(table, &self.node, &self.assigned, &local, now))
            .unwrap_or_default();
        for action in actions {
            match action {
                TaskAction::Start(id) => self.start(&id),
                TaskAction::Decline(id) => self.decline(&id),
                TaskAction::Drain(id) => self.drain(&id),
                TaskAction::Stop(id) => self.stop(&id),
                TaskAction::Forget(id) => self.forget(&id),
            }
        }
        // While this node was given up, the others went on without its word: what they have settled on, it may not have applied.
        let settled = settled.min(self.applied.borrow().unwrap_or_default());
        // Also for what has only just begun to drain: it may have been applied already.
        for task in self.tasks.values_mut() {
            task.note_settled(settled, now);
        }
    }

    fn apply_soon(&mut self) {
        self.apply_at.get_or_insert_with(|| Instant::now() + DEBOUNCE);
    }

    async fn apply_now(&mut self) {
        if let Err(error) = self.apply().await {
            warn!(error = &error as &dyn std::error::Error, "the dataplane can't follow the table");
        }
    }

    /// Has WireGuard follow the table, tells the managers by which keys the node is reached, and returns the index of the
    /// table.
    async fn encrypt(&mut self, look: Look) -> Option<u64> {
        let (settled, mtu) = (*self.settled.borrow(), self.setup.uplink_mtu());
        let situation = self.with_table(|table| {
            let situation = Situation::new(table, &self.node, settled, mtu, self.membership.data_path);
            (situation, table.index)
        });
        let (situation, index) = situation?;
        let encryption = &mut self.setup.encryption;
        let before = encryption.own_wireguard_addr();
        encryption.follow(&situation, look).await;
        let changed = encryption.own_wireguard_addr() != before;
        self.describe.set_wireguard(encryption.identities());
        self.describe.health().set_wireguard(encryption.health());
        if changed {
            self.apply_soon();
        }
        Some(index)
    }

    /// Brings WireGuard, dataplane and names to the table, and tells the managers so.
    async fn apply(&mut self) -> Result<(), P::Error> {
        // The peers first: what they are sent is of use once they are there.
        let followed = self.encrypt(Look::Changes).await;
        self.apply_at = None;
        let Some(table) = self.take_changes() else { return Ok(()) };
        let local = Local {
            node: self.node.clone(),
            vtep: self.membership.data_path,
            wireguard: self.setup.encryption.own_wireguard_addr(),
            addresses: self.setup.facts.node_addresses(),
            endpoints: self.tasks.values().flat_map(|task| task.endpoints.iter().cloned()).collect(),
            absent: self.absent.keys(),
            silent: self.found.silent.clone(),
            answering: self.found.answering.clone(),
        };
        let touched = std::mem::take(&mut self.pending);
        self.setup.dns.update(&table, &touched, &local.endpoints);
        self.setup.plane.change(&table, &touched, &local)?;
        self.record_silent();
        let index = followed.map(|followed| followed.min(table.index));
        self.applied.send_if_modified(|applied| std::mem::replace(applied, index) != index);
        if index != Some(table.index) {
            // It changed while WireGuard followed it.
            self.apply_soon();
        }
        Ok(())
    }

    /// A node says that a task of its is not there.
    fn take_nack(&mut self, key: AttachmentKey) {
        if self.absent.note(key, Instant::now()) {
            let tasks = self.touch(|task| task.incarnation == key.incarnation);
            info!(?tasks, vni = key.vni, "not where the table has it, says its node: it is sent nothing");
        }
    }

    /// The tasks that were not there for long enough may be there again.
    fn look_again(&mut self) {
        let over = self.absent.expire(Instant::now());
        let tasks = self.touch(|task| over.contains(&task.incarnation));
        info!(?tasks, "may be where the table has it by now");
    }

    /// Other nodes don't answer, or do again.
    fn take_silent(&mut self) {
        let found = self.silent.found();
        let before = std::mem::replace(&mut self.found, found);
        let found = &self.found;
        let nodes_of = |vteps: BTreeSet<&IpAddr>, is_meant: fn(&NodeRecord) -> bool| {
            let is_one = |node: &&NodeRecord| vteps.contains(&node.vtep) && is_meant(node);
            let nodes = |table: &Table| -> BTreeMap<NodeId, String> {
                let nodes = table.nodes.values().filter(is_one);
                nodes.map(|node| (node.id.clone(), node.hostname.clone())).collect()
            };
            self.with_table(nodes).unwrap_or_default()
        };
        let lost = nodes_of(found.silent.difference(&before.silent).collect(), |_| true);
        let back = nodes_of(before.silent.difference(&found.silent).collect(), |_| true);
        // That others answer says nothing that is not known.
        let changed = found.answering.symmetric_difference(&before.answering).collect();
        let given_up = nodes_of(changed, |node| node.state == NodeState::Down);
        if !lost.is_empty() {
            warn!(nodes = ?lost.values(), "silent: where others serve, these nodes' tasks get no new flows from here");
        }
        if !back.is_empty() {
            info!(nodes = ?back.values(), "heard again");
        }
        let is_news = found.silent != before.silent || !given_up.is_empty();
        let nodes: BTreeSet<NodeId> =
            [lost, back, given_up].into_iter().flat_map(BTreeMap::into_keys).collect();
        if is_news {
            self.touch(|task| nodes.contains(&task.node));
        }
    }

    /// Leaves word of the silent nodes for who looks at this one.
    fn record_silent(&mut self) {
        if self.recorded.as_ref() == Some(&self.found.silent) {
            return;
        }
        match silent::record(&self.config.state_dir, &self.found.silent) {
            Ok(()) => self.recorded = Some(self.found.silent.clone()),
            Err(error) => warn!(%error, "can't write which nodes are silent to the state folder"),
        }
    }

    /// Has the dataplane look at tasks again, and returns which.
    fn touch(&mut self, is_meant: impl Fn(&TaskRecord) -> bool) -> Vec<TaskId> {
        let tables = self.tables.borrow();
        let tasks = tables.iter().flat_map(|table| table.tasks.values());
        let touched: Vec<_> = tasks.filter(|task| is_meant(task)).collect();
        for task in &touched {
            self.pending.note_task(task);
        }
        let ids = touched.into_iter().map(|task| task.id.clone()).collect();
        drop(tables);
        self.apply_soon();
        ids
    }

    async fn audit(&mut self) {
        let vxlan_port = self.with_table(|table| table.cluster.data_path_port);
        match self.setup.audit(&self.config, &self.membership, vxlan_port).await {
            Ok(true) => {
                self.tell_uplinks();
                self.refresh_links().await;
            }
            // What failed is tried again.
            Ok(false) => self.rewire = true,
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "the node's devices can't be kept right");
            }
        }
        self.follow_egress().await;
        self.audit_links().await;
        self.encrypt(Look::All).await;
        // Also what failed before is tried again here.
        self.apply_now().await;
    }

    /// Tells the managers how the dataplane is attached.
    fn tell_uplinks(&self) {
        let modes = self.setup.plane.modes();
        self.describe.set_dataplane(&modes);
        let uplinks = &self.setup.plane_config.uplinks;
        let mtu_of =
            |name: &str| uplinks.iter().find(|uplink| uplink.name == name).map_or(0, |uplink| uplink.mtu);
        self.describe.health().set_uplinks(&modes, mtu_of);
    }

    async fn audit_rules(&mut self) {
        if let Err(error) = self.setup.audit_rules().await {
            warn!(error = chain(&error), "the netfilter rules can't be kept right");
        }
    }

    fn report(&self, status: TaskStatus) {
        info!(task = %status.task, state = ?status.state, message = status.message, err = status.err, "task");
        self.statuses.send_modify(|statuses| drop(statuses.insert(status.task.clone(), status)));
    }

    fn begin_tear_down(&mut self, reply: oneshot::Sender<Vec<String>>) {
        self.tearing_down = Some(reply);
        let running: Vec<_> = self.tasks.keys().cloned().collect();
        for id in running {
            self.stop(&id);
        }
    }

    async fn tear_down(self) -> Vec<String> {
        let Self { config, setup, runtime, tasks, .. } = self;
        let mut errors = setup.tear_down().await;
        errors.extend(silent::record(&config.state_dir, &Vteps::new()).err().map(|error| error.to_string()));
        for id in tasks.keys() {
            errors.extend(runtime.remove(id).err().map(|error| chain(&error)));
        }
        errors
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn changed(watch: &mut Option<Watch>) {
    match watch {
        Some(watch) => watch.changed(DEBOUNCE).await,
        None => std::future::pending().await,
    }
}

/// A state for people to read in `docker service ps`.
fn status(task: &TaskId, state: TaskState, message: &str, err: String) -> TaskStatus {
    TaskStatus {
        task: task.clone(),
        state,
        since_ns: crate::runtime::layout::now_ns(),
        message: message.to_owned(),
        err,
        pid: None,
        exit_code: None,
    }
}

#[cfg(test)]
mod tests;
