//! Agents that hold sessions with whichever manager leads, over streams that break, keep their table over the end of their
//! process, and say when their dataplane holds it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::codec::{FrameReader, FrameWriter, MANAGER_FRAME_BYTES_MAX};
use mesh_api::id::{NodeId, TaskId};
use mesh_api::session::{
    AgentMessage, HEARTBEAT_PERIOD_MS, MANAGER_TIMEOUT_MS, ManagerMessage, NodeDescription, PROTOCOL_VERSION,
    TaskStatus,
};
use mesh_api::table::{Role, Table, TaskRecord, TaskState};
use mesh_api::tls::Peer;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{DuplexStream, ReadHalf, WriteHalf, split};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};

use super::observer::Observer;
use super::{Managers, Mutant, node_at};
use crate::raft::tests::net::Net;
use crate::raft::tests::stream;
use crate::testing::CA;

const SILENCE: Duration = Duration::from_millis(MANAGER_TIMEOUT_MS);
const GREETING: Duration = Duration::from_secs(5);
const HEARTBEAT: Duration = Duration::from_millis(HEARTBEAT_PERIOD_MS);
/// Messages read ahead.
const READ_AHEAD: usize = 64;

type Reader = FrameReader<ReadHalf<DuplexStream>, ManagerMessage>;
type Writer = FrameWriter<WriteHalf<DuplexStream>, AgentMessage>;

/// What a host keeps of its agent when the process ends.
pub(super) struct Kept {
    pub(super) description: RefCell<NodeDescription>,
    /// Told when the description is another.
    pub(super) described: Notify,
    /// The table on the disk, and the one that the dataplane holds.
    pub(super) table: RefCell<Option<Table>>,
    pub(super) applied: RefCell<Option<Table>>,
    /// The states of the host's tasks, which run on without the agent.
    tasks: RefCell<BTreeMap<TaskId, TaskState>>,
    pub(super) is_connected: Cell<bool>,
}

impl Kept {
    pub(super) fn new(description: NodeDescription) -> Rc<Self> {
        Rc::new(Self {
            description: RefCell::new(description),
            described: Notify::new(),
            table: RefCell::default(),
            applied: RefCell::default(),
            tasks: RefCell::default(),
            is_connected: Cell::new(false),
        })
    }
}

/// An agent's process.
pub(super) struct Agent {
    pub(super) rng: StdRng,
    pub(super) node: NodeId,
    pub(super) kept: Rc<Kept>,
    pub(super) net: Net,
    pub(super) managers: Managers,
    pub(super) observer: Observer,
    pub(super) mutant: Option<Mutant>,
    /// The manager to ask first.
    leader: Option<NodeId>,
}

/// A task that ends with its owner.
struct Ends(JoinHandle<()>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Agent {
    pub(super) fn start(
        seed: u64,
        node: &NodeId,
        kept: &Rc<Kept>,
        net: &Net,
        managers: &Managers,
        observer: &Observer,
        mutant: Option<Mutant>,
    ) -> JoinHandle<()> {
        kept.is_connected.set(false);
        let agent = Self {
            rng: StdRng::seed_from_u64(seed),
            node: node.clone(),
            kept: Rc::clone(kept),
            net: net.clone(),
            managers: Rc::clone(managers),
            observer: observer.clone(),
            mutant,
            leader: None,
        };
        tokio::task::spawn_local(agent.run())
    }

    async fn run(mut self) {
        loop {
            if let Some((reader, writer)) = self.open().await {
                self.kept.is_connected.set(true);
                self.converse(reader, writer).await;
                self.kept.is_connected.set(false);
            }
            sleep(Duration::from_millis(self.rng.random_range(10..200))).await;
        }
    }

    /// The manager to ask: the one that another said leads, or any.
    fn remote(&mut self) -> Option<NodeId> {
        self.leader.take().or_else(|| {
            let managers = self.managers.borrow();
            let count = managers.len();
            (count > 0)
                .then(|| self.rng.random_range(0..count))
                .and_then(|at| managers.keys().nth(at).cloned())
        })
    }

    /// Opens a session.
    async fn open(&mut self) -> Option<(Reader, Writer)> {
        let remote = self.remote()?;
        let (ours, theirs) = stream::connect(&self.net, &self.node, &remote).await?;
        let (read, write) = split(ours);
        let mut reader = FrameReader::new(read, MANAGER_FRAME_BYTES_MAX);
        let mut writer: Writer = FrameWriter::new(write);
        {
            let managers = self.managers.borrow();
            let manager = managers.get(&remote)?;
            let century = Duration::from_hours(100 * 365 * 24);
            let peer = Peer {
                node: self.node.clone(),
                role: Role::Worker,
                cluster: "cluster".into(),
                issuer: CA.root.id,
                not_before: SystemTime::UNIX_EPOCH,
                not_after: SystemTime::UNIX_EPOCH + century,
            };
            let session = tokio::spawn(Arc::clone(&manager.server).handle(theirs, peer));
            manager.sessions.borrow_mut().push(session.abort_handle());
        }
        let index = self.kept.table.borrow().as_ref().map(|table| table.index);
        // One that lost its table says so; one that never had one does, too.
        let index = index.or_else(|| self.observer.has_table(&self.node).then_some(0));
        let node = self.kept.description.borrow().clone();
        let resume = AgentMessage::Resume { protocol: PROTOCOL_VERSION, node, index };
        let greeting = async {
            writer.send(&resume).await.ok()?;
            reader.next().await.ok()?
        };
        match timeout(GREETING, greeting).await.ok()?? {
            ManagerMessage::Resumed { .. } => Some((reader, writer)),
            ManagerMessage::Moved { leader } => {
                self.leader = leader.map(node_at);
                None
            }
            // A manager that can't serve at this moment.
            _ => None,
        }
    }

    async fn converse(&mut self, mut reader: Reader, mut writer: Writer) {
        let (sender, mut messages) = mpsc::channel(READ_AHEAD);
        let _reading = Ends(tokio::task::spawn_local(async move {
            while let Ok(Some(message)) = reader.next().await {
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        }));
        let kept = Rc::clone(&self.kept);
        let mut heartbeat = interval(HEARTBEAT);
        let (mut heard, mut settled) = (Instant::now(), 0);
        // The table that it came with may not be the one that its dataplane holds.
        let mut due = self.kept.table.borrow().is_some().then_some(heard);
        loop {
            let said = tokio::select! {
                biased;
                message = messages.recv() => {
                    heard = Instant::now();
                    match message {
                        Some(ManagerMessage::Snapshot { table }) => self.take(*table),
                        Some(ManagerMessage::Delta { delta }) => {
                            let Some(mut table) = self.kept.table.borrow().clone() else { return };
                            let mut delta = delta;
                            if self.mutant == Some(Mutant::LostChange) && self.rng.random_range(0..20) == 0 {
                                delta.changes.pop();
                            }
                            if let Err(gap) = table.apply(delta) {
                                self.observer.wrong(format!("{} is sent a change that does not fit: {gap}", self.node));
                                return;
                            }
                            self.take(table);
                        }
                        Some(ManagerMessage::Settled { index }) => {
                            if index <= settled {
                                self.observer.wrong(format!("{} heard {index} settled after {settled}", self.node));
                            }
                            settled = index;
                            continue;
                        }
                        Some(ManagerMessage::Alive | ManagerMessage::Trust { .. } | ManagerMessage::Renew) => continue,
                        Some(ManagerMessage::Moved { leader }) => {
                            self.leader = leader.map(node_at);
                            return;
                        }
                        Some(_) | None => return,
                    }
                    let delay = Duration::from_millis(self.rng.random_range(0..30));
                    due.get_or_insert_with(|| Instant::now() + delay);
                    continue;
                }
                () = sleep_until(due.unwrap_or(heard)), if due.is_some() => {
                    due = None;
                    self.apply()
                }
                () = kept.described.notified() => {
                    vec![AgentMessage::Described { node: kept.description.borrow().clone() }]
                }
                _ = heartbeat.tick() => vec![AgentMessage::Alive],
                () = sleep_until(heard + SILENCE) => return,
            };
            for message in said {
                if !matches!(timeout(SILENCE, writer.send(&message)).await, Ok(Ok(()))) {
                    return;
                }
            }
        }
    }

    /// A table came, or another made of the last.
    fn take(&mut self, table: Table) {
        self.observer.took(&self.node, &table);
        *self.kept.table.borrow_mut() = Some(table);
    }

    /// The dataplane holds the table from here on, and tasks begin and end as it says.
    fn apply(&mut self) -> Vec<AgentMessage> {
        let Some(table) = self.kept.table.borrow().clone() else { return Vec::new() };
        let kept = Rc::clone(&self.kept);
        let mut tasks = kept.tasks.borrow_mut();
        tasks.retain(|id, _| table.tasks.contains_key(id));
        let mut statuses = Vec::new();
        for task in table.tasks.values().filter(|task| task.spec.is_some()) {
            let known = tasks.get(&task.id).copied();
            let next = self.next(task, known);
            if let Some(next) = next {
                tasks.insert(task.id.clone(), next);
            }
            statuses.extend(
                next.or(known).filter(|state| *state != task.observed).map(|state| status(task, state)),
            );
        }
        self.observer.applied(&self.node, &table);
        let mut said = vec![AgentMessage::Applied { index: table.index }];
        *kept.applied.borrow_mut() = Some(table);
        if !statuses.is_empty() {
            said.push(AgentMessage::Tasks { statuses });
        }
        said
    }

    /// What becomes of a task.
    fn next(&mut self, task: &TaskRecord, known: Option<TaskState>) -> Option<TaskState> {
        match (task.desired, known) {
            (_, Some(ended)) if ended.is_terminal() => None,
            (TaskState::Running, None) => {
                let fails = self.rng.random_range(0..40) == 0;
                Some(if fails { TaskState::Failed } else { TaskState::Running })
            }
            (TaskState::Running, _) => None,
            _ => Some(TaskState::Shutdown),
        }
    }
}

fn status(task: &TaskRecord, state: TaskState) -> TaskStatus {
    let (message, err) = (String::new(), String::new());
    TaskStatus { task: task.id.clone(), state, since_ns: 1, message, err, pid: None, exit_code: None }
}
