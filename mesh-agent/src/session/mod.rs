//! The node's side of the session with the managers.
//!
//! Keeps one session open, whatever breaks: the table that comes out of it is the last one heard of, and what goes
//! in (the index that the dataplane holds, the tasks' states) is said again to whichever manager listens next.
//!
//! A session begins with the index of the node's table. Indices are all managers' alike, and none means two states, so a manager
//! goes on from there by a delta where it knows what changed since; in any other case it sends the whole table. So two rules
//! are enough: a delta is taken where it starts at the table's index, and ends the session else; a whole table is taken
//! whatever its index is. Only one of another life of the swarm has a lower one: what was settled before says nothing then.

use std::collections::{BTreeMap, BTreeSet};
use std::future;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_api::codec::CodecError;
use mesh_api::error;
use mesh_api::health::NodeHealth;
use mesh_api::id::TaskId;
use mesh_api::session::{
    AgentMessage, AttachRefused, AttachmentSpec, HEARTBEAT_PERIOD_MS, MANAGER_TIMEOUT_MS, ManagerMessage,
    NodeDescription, RefusalReason, SESSION_TIMEOUT_MS, TaskStatus,
};
use mesh_api::table::{Delta, DeltaGap, Role, Table};
use mesh_api::tls::Shared;
use rand::RngExt as _;
use tokio::sync::oneshot::error::RecvError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, info, warn};

mod certificate;
mod connect;
mod difference;
mod renewal;
mod store;

pub use connect::ConnectError;
pub(crate) use connect::{Connection, Joined, connect, expired, join, readmit};
pub use store::Membership;
use store::TableWriter;
pub(crate) use store::{Credentials, Store};

use self::difference::{difference, is_news};
use self::renewal::Renewal;
use crate::dataplane::Touched;
use crate::facts::Describe;
use crate::sys::memory;

/// How often the managers are told how the node is, at most.
const HEALTH_PERIOD: Duration = Duration::from_secs(1);
const HEARTBEAT: Duration = Duration::from_millis(HEARTBEAT_PERIOD_MS);
/// How long a manager may take nothing of what is said.
const STUCK: Duration = Duration::from_millis(SESSION_TIMEOUT_MS);
/// How long a manager may say nothing.
const SILENCE: Duration = Duration::from_millis(MANAGER_TIMEOUT_MS);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Longest pause before a node asks again whether an operator has approved that it comes back.
const APPROVAL_PERIOD: Duration = Duration::from_secs(30);
/// Messages read ahead of what they change.
const READ_AHEAD: usize = 64;
/// Differences of a table that are taken one by one, with what they touch planned anew.
const DIFFERENCES_MAX: usize = 10_000;
/// Attachments that wait to be asked for.
const CALLS: usize = 16;
/// Task states in one message, far below the longest frame.
const STATUSES_MAX: usize = 500;

/// The states of this node's tasks, all of them.
pub(crate) type Statuses = BTreeMap<TaskId, TaskStatus>;

/// An attachment that the managers are asked for. Without an answer, the session has ended before there was one.
#[derive(Debug)]
pub(crate) struct AttachCall {
    pub(crate) id: TaskId,
    pub(crate) spec: AttachmentSpec,
    pub(crate) answer: oneshot::Sender<Result<(), AttachRefused>>,
}

/// How the session stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionState {
    /// Open.
    Connected,
    /// Broken, or not open yet; the text says why.
    Disconnected(String),
    /// The managers don't take this node; the text says why. It goes on asking.
    Refused(RefusalReason, String),
}

/// The node's ends of the session.
#[derive(Debug)]
pub(crate) struct Session {
    /// The last table. While somebody else holds on to it, a change copies it.
    pub(crate) tables: watch::Receiver<Option<Arc<Table>>>,
    /// What changed of it, for whom it is to be taken by: looked at while the table is borrowed, the two agree.
    pub(crate) touched: Arc<Mutex<Touched>>,
    /// The table index that every live node has applied.
    pub(crate) settled: watch::Receiver<u64>,
    /// The table index that the dataplane holds.
    pub(crate) applied: watch::Sender<Option<u64>>,
    /// The tasks' states.
    pub(crate) statuses: watch::Sender<Statuses>,
    /// How the session stands.
    pub(crate) state: watch::Receiver<SessionState>,
    /// Where attachments are asked for.
    pub(crate) calls: mpsc::Sender<AttachCall>,
    leave: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// The session's own ends.
struct Client {
    store: Store,
    credentials: Arc<Mutex<Credentials>>,
    shared: Shared,
    /// It has joined just now, and never had a table.
    is_fresh: bool,
    renewal: Renewal,
    /// The manager to ask first.
    leader: Option<SocketAddr>,
    describe: Describe,
    writer: TableWriter,
    tables: watch::Sender<Option<Arc<Table>>>,
    touched: Arc<Mutex<Touched>>,
    settled: watch::Sender<u64>,
    applied: watch::Receiver<Option<u64>>,
    statuses: watch::Receiver<Statuses>,
    state: watch::Sender<SessionState>,
    calls: mpsc::Receiver<AttachCall>,
    /// Who waits for the managers' answer in this session.
    asked: BTreeMap<TaskId, oneshot::Sender<Result<(), AttachRefused>>>,
    leave: watch::Receiver<bool>,
}

/// Why an open session ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("the manager closed the session")]
    Closed,
    #[error("nothing was heard of the manager for {} s", SILENCE.as_secs_f32())]
    Silent,
    #[error("the manager does not take messages")]
    Stuck,
    #[error("the manager does not lead any longer")]
    Moved(Option<SocketAddr>),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Gap(#[from] DeltaGap),
    #[error("{1}")]
    Refused(RefusalReason, String),
    #[error("the manager sent a message out of turn")]
    OutOfTurn,
    #[error("the node leaves")]
    Left,
}

/// What a message changed.
enum Taken {
    Table,
    /// The node has its next certificate.
    Certificate,
    Other,
}

impl Session {
    /// Starts from the last table. `is_fresh`: the node has never had one. The credential is shared with whoever else
    /// of the process needs the present one.
    pub(crate) fn start(
        store: Store,
        credentials: Arc<Mutex<Credentials>>,
        shared: Shared,
        describe: Describe,
        table: Option<Arc<Table>>,
        is_fresh: bool,
    ) -> Self {
        Self::begin(store, future::ready(Ok(credentials)), shared, describe, table, is_fresh)
    }

    /// As [`Session::start`] for a node whose key is sealed: what it proves itself with comes once it is unlocked.
    pub(crate) fn start_locked(
        store: Store,
        shared: Shared,
        describe: Describe,
        table: Option<Arc<Table>>,
    ) -> (Self, oneshot::Sender<Arc<Mutex<Credentials>>>) {
        let (unlock, unlocked) = oneshot::channel();
        (Self::begin(store, unlocked, shared, describe, table, false), unlock)
    }

    fn begin(
        store: Store,
        credentials: impl Future<Output = Result<Arc<Mutex<Credentials>>, RecvError>> + Send + 'static,
        shared: Shared,
        describe: Describe,
        table: Option<Arc<Table>>,
        is_fresh: bool,
    ) -> Self {
        let (tables, tables_rx) = watch::channel(table);
        let touched = Arc::new(Mutex::new(Touched::all()));
        let (settled, settled_rx) = watch::channel(0);
        let (applied_tx, applied) = watch::channel(None);
        let (statuses_tx, statuses) = watch::channel(Statuses::new());
        let (leave_tx, mut leave) = watch::channel(false);
        let (state, state_rx) = watch::channel(SessionState::Disconnected("connecting".to_owned()));
        let (calls, calls_rx) = mpsc::channel(CALLS);
        let noted = Arc::clone(&touched);
        let run = async move {
            let credentials = tokio::select! {
                Ok(credentials) = credentials => credentials,
                true = told(&mut leave) => return,
                else => return,
            };
            let client = Client {
                writer: TableWriter::new(store.clone()),
                store,
                credentials,
                shared,
                is_fresh,
                renewal: Renewal::new(),
                leader: None,
                describe,
                tables,
                touched: noted,
                settled,
                applied,
                statuses,
                state,
                calls: calls_rx,
                asked: BTreeMap::new(),
                leave,
            };
            client.run().await;
        };
        Self {
            tables: tables_rx,
            touched,
            settled: settled_rx,
            applied: applied_tx,
            statuses: statuses_tx,
            state: state_rx,
            calls,
            leave: leave_tx,
            task: tokio::spawn(run),
        }
    }

    /// Tells the managers that the node leaves, if one listens, and ends the session.
    pub(crate) async fn leave(mut self) {
        let _ = self.leave.send(true);
        // Without a manager to tell, the node leaves all the same.
        if timeout(HEARTBEAT, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

impl Session {
    /// Ends the session without a word to the managers.
    pub(crate) async fn end(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let state = match self.resume().await {
                Ok(open) => {
                    let since = Instant::now();
                    info!(manager = %open.remote, "session open");
                    self.state.send_replace(SessionState::Connected);
                    let end = self.converse(open).await;
                    if matches!(end, SessionEnd::Left) {
                        return;
                    }
                    warn!(reason = %end, "session ended");
                    if since.elapsed() > BACKOFF_MAX {
                        backoff = BACKOFF_MIN;
                    }
                    self.leader = None;
                    match end {
                        SessionEnd::Refused(reason, message) => SessionState::Refused(reason, message),
                        SessionEnd::Moved(leader) => {
                            self.leader = leader;
                            SessionState::Disconnected(SessionEnd::Moved(leader).to_string())
                        }
                        other => SessionState::Disconnected(other.to_string()),
                    }
                }
                Err(ConnectError::Refused { reason, message, .. }) => SessionState::Refused(reason, message),
                Err(ConnectError::Certificate(message)) => {
                    SessionState::Refused(RefusalReason::Certificate, message)
                }
                Err(error) => {
                    debug!(error = &error as &dyn std::error::Error, "no session");
                    SessionState::Disconnected(error.to_string())
                }
            };
            if let SessionState::Refused(reason, message) = &state {
                backoff = if *reason == RefusalReason::Unapproved { APPROVAL_PERIOD } else { BACKOFF_MAX };
                if *self.state.borrow() != state {
                    warn!(?reason, message, "the managers refuse this node; it goes on with its last table");
                }
            }
            self.state.send_replace(state);
            // Nodes that lost the same manager come back spread out.
            let pause = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
            tokio::select! {
                () = sleep(pause) => {}
                true = told(&mut self.leave) => return,
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn resume(&mut self) -> Result<Connection, ConnectError> {
        self.readmit().await?;
        let Credentials { membership, credential } = self.credentials().clone();
        let index = self.tables.borrow().as_ref().map(|table| table.index);
        let index = index.or((!self.is_fresh).then_some(0));
        let others = membership.remotes.iter().filter(|remote| self.leader != Some(**remote));
        let remotes: Vec<SocketAddr> = self.leader.iter().chain(others).copied().collect();
        let connection = connect(&remotes, &credential, self.description(), index).await?;
        self.set_role(connection.role).await;
        self.trust(&connection.roots).await;
        self.renewal.start_over();
        Ok(connection)
    }

    fn credentials(&self) -> MutexGuard<'_, Credentials> {
        self.credentials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host as it is now.
    fn description(&self) -> NodeDescription {
        let Membership { advertise, data_path, .. } = self.credentials().membership;
        self.describe.describe(advertise, data_path)
    }

    async fn set_role(&self, role: Role) {
        let mut credentials = self.credentials().clone();
        if credentials.membership.role != role {
            credentials.membership.role = role;
            if let Err(error) = self.keep(credentials).await {
                warn!(%error, "the node's role can't be written to the state folder");
            }
        }
    }

    /// Remembers where the managers are, by the table.
    async fn note_managers(&self) {
        let mut credentials = self.credentials().clone();
        let Membership { advertise, remotes, .. } = &credentials.membership;
        let managers: BTreeSet<SocketAddr> = {
            let table = self.tables.borrow();
            table.iter().flat_map(|table| table.nodes.values()).filter_map(|node| node.manager).collect()
        };
        // How this host reaches its own manager, others may not know.
        let own = remotes.iter().filter(|remote| remote.ip() == *advertise);
        let known: BTreeSet<SocketAddr> = managers.iter().chain(own).copied().collect();
        if managers.is_empty() || known == remotes.iter().copied().collect() {
            return;
        }
        credentials.membership.remotes = known.into_iter().collect();
        if let Err(error) = self.keep(credentials).await {
            warn!(%error, "the managers' addresses can't be written to the state folder");
        }
    }

    async fn converse(&mut self, connection: Connection) -> SessionEnd {
        let Connection { mut reader, mut writer, node, remote: _, role: _, roots: _ } = connection;
        let received = reader.received();
        let (sender, mut messages) = mpsc::channel(READ_AHEAD);
        // The reader is not cancel-safe, so it has a task of its own.
        let reading = AbortOnDrop(tokio::spawn(async move {
            loop {
                let message = reader.next().await;
                let last = !matches!(message, Ok(Some(_)));
                if sender.send(message).await.is_err() || last {
                    return;
                }
            }
        }));
        let mut sent = Sent::new(node);
        let mut described = self.describe.watch();
        described.mark_changed();
        let mut health = self.describe.health().watch();
        health.mark_changed();
        let mut health_from = Instant::now();
        self.applied.mark_changed();
        self.statuses.mark_changed();
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut heard_bytes = received.load(Ordering::Relaxed);
        let mut leave = self.leave.clone();
        let end = loop {
            let outgoing = tokio::select! {
                message = messages.recv() => {
                    heard = Instant::now();
                    match self.receive(message, &mut messages).await {
                        Ok(certified) => {
                            certified.then_some(AgentMessage::Renewed).into_iter().chain(self.renewals()).collect()
                        }
                        Err(end) => break end,
                    }
                }
                Ok(()) = self.applied.changed() => sent.applied(*self.applied.borrow_and_update()),
                Ok(()) = self.statuses.changed() => sent.statuses(&self.statuses.borrow_and_update()),
                Ok(()) = described.changed() => sent.description(self.description()),
                () = changed_after(&mut health, health_from) => {
                    health_from = Instant::now() + HEALTH_PERIOD;
                    sent.health(&health.borrow_and_update())
                }
                Some(call) = self.calls.recv() => self.ask(call),
                _ = heartbeat.tick() => [AgentMessage::Alive].into_iter().chain(self.renewals()).collect(),
                () = tokio::time::sleep_until(heard + SILENCE) => {
                    // A whole table may take longer than that.
                    let bytes = received.load(Ordering::Relaxed);
                    if bytes == heard_bytes {
                        break SessionEnd::Silent;
                    }
                    (heard, heard_bytes) = (Instant::now(), bytes);
                    Vec::new()
                }
                true = told(&mut leave) => {
                    let _ = timeout(HEARTBEAT, writer.send(&AgentMessage::Leave)).await;
                    break SessionEnd::Left;
                }
            };
            let say = async {
                for message in &outgoing {
                    writer.send(message).await?;
                }
                Ok::<_, CodecError>(())
            };
            match timeout(STUCK, say).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => break error.into(),
                Err(_) => break SessionEnd::Stuck,
            }
        };
        drop(reading);
        self.asked.clear();
        end
    }

    /// What to say for a call that is still waited for.
    fn ask(&mut self, call: AttachCall) -> Vec<AgentMessage> {
        let AttachCall { id, spec, answer } = call;
        if answer.is_closed() {
            return Vec::new();
        }
        self.asked.insert(id.clone(), answer);
        vec![AgentMessage::Attach { id, spec }]
    }

    /// Takes a message and those that wait behind it, so that a burst of deltas is told once. Whether the node has its
    /// next certificate.
    async fn receive(
        &mut self,
        first: Option<Result<Option<ManagerMessage>, CodecError>>,
        messages: &mut mpsc::Receiver<Result<Option<ManagerMessage>, CodecError>>,
    ) -> Result<bool, SessionEnd> {
        let (mut changed, mut certified) = (false, false);
        let mut next = first;
        let mut settled = None;
        let result = loop {
            let message = match next {
                Some(Ok(Some(message))) => message,
                Some(Ok(None)) | None => break Err(SessionEnd::Closed),
                Some(Err(error)) => break Err(error.into()),
            };
            match self.take(message, &mut settled).await {
                Ok(Taken::Table) => changed = true,
                Ok(Taken::Certificate) => certified = true,
                Ok(Taken::Other) => {}
                Err(end) => break Err(end),
            }
            match messages.try_recv() {
                Ok(message) => next = Some(message),
                Err(_) => break Ok(()),
            }
        };
        if changed {
            self.tables.send_modify(|_| ());
            self.note_managers().await;
        }
        if let Some(index) = settled {
            self.settled.send_replace(index);
        }
        result.map(|()| certified)
    }

    /// What changed.
    async fn take(
        &mut self,
        message: ManagerMessage,
        settled: &mut Option<u64>,
    ) -> Result<Taken, SessionEnd> {
        match message {
            ManagerMessage::Snapshot { table } => {
                info!(index = table.index, "gets the whole table");
                self.replace(*table).await;
                Ok(Taken::Table)
            }
            ManagerMessage::Delta { delta } => {
                let at = self.tables.borrow().as_ref().map(|table| table.index);
                match at {
                    Some(at) if at == delta.from => {
                        self.change(delta).await;
                        Ok(Taken::Table)
                    }
                    Some(at) => Err(DeltaGap { at, from: delta.from }.into()),
                    None => Err(SessionEnd::OutOfTurn),
                }
            }
            ManagerMessage::Settled { index } => {
                *settled = Some(index);
                Ok(Taken::Other)
            }
            ManagerMessage::Attached { id, refused } => {
                if let Some(answer) = self.asked.remove(&id) {
                    // Who no longer waits will find the task in the table.
                    let _ = answer.send(refused.map_or(Ok(()), Err));
                }
                Ok(Taken::Other)
            }
            ManagerMessage::Renew => {
                self.renewal.want();
                Ok(Taken::Other)
            }
            ManagerMessage::Certificate { chain, roots } => {
                let request = self.renewal.answered().ok_or(SessionEnd::OutOfTurn)?;
                match self.certify(&request, &chain, &roots).await {
                    Ok(()) => {
                        info!("the node has its next certificate");
                        self.renewal.done();
                        Ok(Taken::Certificate)
                    }
                    Err(error) => {
                        warn!(error = error::chain(&error), "the node's next certificate can't be kept");
                        Ok(Taken::Other)
                    }
                }
            }
            ManagerMessage::Trust { roots } => {
                self.trust(&roots).await;
                Ok(Taken::Other)
            }
            ManagerMessage::Alive => Ok(Taken::Other),
            ManagerMessage::Moved { leader } => Err(SessionEnd::Moved(leader)),
            ManagerMessage::Refused { reason, message } => Err(SessionEnd::Refused(reason, message)),
            ManagerMessage::Resumed { .. } => Err(SessionEnd::OutOfTurn),
        }
    }

    /// Takes a whole table: by its differences where they are few, as after a short absence, and else as it is.
    async fn replace(&mut self, table: Table) {
        if self.tables.borrow().as_ref().is_some_and(|former| former.index > table.index) {
            self.settled.send_replace(0);
        }
        let delta = self.tables.borrow().as_ref().map(|former| difference(former, &table));
        if let Some(delta) = delta.filter(|delta| delta.changes.len() < DIFFERENCES_MAX) {
            drop(table);
            memory::trim();
            return self.change(delta).await;
        }
        let table = Arc::new(table);
        self.writer.write(Arc::clone(&table)).await;
        self.tables.send_if_modified(|tables| {
            *self.touched.lock().unwrap_or_else(PoisonError::into_inner) = Touched::all();
            *tables = Some(table);
            false
        });
    }

    /// Makes a change that starts from the present table: on the disk first, since the dataplane must not be ahead of
    /// what the next agent comes back with.
    async fn change(&mut self, delta: Delta) {
        if self.writer.wants_table() {
            let table = self.tables.borrow().clone();
            if let Some(table) = table {
                self.writer.write(table).await;
            }
        }
        self.writer.append(&delta);
        self.tables.send_if_modified(|tables| {
            if let Some(table) = tables {
                let mut touched = self.touched.lock().unwrap_or_else(PoisonError::into_inner);
                // Where several changes of one record come to something, one of them is news to the table as it is.
                for change in delta.changes.iter().filter(|change| is_news(table, change)) {
                    touched.note(table, change);
                }
                // It starts where the table is, which has been looked at.
                let _ = Arc::make_mut(table).apply(delta);
            }
            false
        });
    }
}

/// What has been said in this session.
#[derive(Debug)]
struct Sent {
    node: NodeDescription,
    health: Option<NodeHealth>,
    applied: Option<u64>,
    statuses: Statuses,
}

impl Sent {
    /// Of a session that began with the host described as `node`.
    fn new(node: NodeDescription) -> Self {
        Self { node, health: None, applied: None, statuses: Statuses::new() }
    }

    fn description(&mut self, node: NodeDescription) -> Vec<AgentMessage> {
        if self.node == node {
            return Vec::new();
        }
        self.node = node.clone();
        vec![AgentMessage::Described { node }]
    }

    fn health(&mut self, health: &NodeHealth) -> Vec<AgentMessage> {
        if self.health.as_ref() == Some(health) {
            return Vec::new();
        }
        self.health = Some(health.clone());
        vec![AgentMessage::Health { health: health.clone() }]
    }

    fn applied(&mut self, applied: Option<u64>) -> Vec<AgentMessage> {
        match applied {
            Some(index) if self.applied != Some(index) => {
                self.applied = Some(index);
                vec![AgentMessage::Applied { index }]
            }
            _ => Vec::new(),
        }
    }

    fn statuses(&mut self, statuses: &Statuses) -> Vec<AgentMessage> {
        let changed: Vec<_> = statuses
            .values()
            .filter(|status| self.statuses.get(&status.task) != Some(status))
            .cloned()
            .collect();
        self.statuses.clone_from(statuses);
        changed.chunks(STATUSES_MAX).map(|part| AgentMessage::Tasks { statuses: part.to_vec() }).collect()
    }
}

/// Waits for a change that is told of no earlier than `from`.
async fn changed_after<T>(told: &mut watch::Receiver<T>, from: Instant) {
    tokio::time::sleep_until(from).await;
    if told.changed().await.is_err() {
        future::pending::<()>().await;
    }
}

/// Waits until the flag is set; false when nobody is left to set it.
async fn told(flag: &mut watch::Receiver<bool>) -> bool {
    flag.wait_for(|flag| *flag).await.is_ok()
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;
