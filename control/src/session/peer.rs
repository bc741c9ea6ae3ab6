//! One agent's session, from its first message to its end.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::codec::{AGENT_FRAME_BYTES_MAX, CodecError, FrameReader, FrameWriter};
use mesh_api::id::{NodeId, TaskId};
use mesh_api::session::{
    AgentMessage, AttachRefused, AttachRefusedReason, AttachmentSpec, EncodedDelta,
    MANAGER_HEARTBEAT_PERIOD_MS, ManagerMessage, NodeDescription, RefusalReason, SESSION_TIMEOUT_MS,
    TaskStatus,
};
use mesh_api::table::{Delta, NodeState};
use mesh_api::tls::{KeyId, Peer};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::{SemaphorePermit, mpsc, watch};
use tokio::time::timeout;

use super::feed::News;
use super::handshake::{Admitted, Denied, admit, certify, cluster, role};
use super::journal::Part;
use super::refusals::Cause;
use super::registry::Epoch;
use super::slots::Slot;
use super::trust::Trust;
use super::{Server, SessionError, view};
use crate::apply::{network_on_route, report_changes};
use crate::cluster::ProposeError;
use crate::command::{Action, Command};
use crate::model::State;
use crate::patient::Patient;
use crate::pki::Issued;
use crate::refusal::{Code, Refusal};

pub(super) const SILENCE_MAX: Duration = Duration::from_millis(SESSION_TIMEOUT_MS);
const HEARTBEAT_PERIOD: Duration = Duration::from_millis(MANAGER_HEARTBEAT_PERIOD_MS);
/// Answers that wait to be sent; the agent is not listened to while there are more.
const ANSWERS_MAX: usize = 16;
/// Records that an agent which was away is sent at once, however many others are as well; more of them take turns with tables,
/// for each agent's are encoded on their own.
pub(super) const SHORT_MAX: usize = 1_000;

type Reader<S> = FrameReader<ReadHalf<S>, AgentMessage>;

/// A peer that takes nothing for too long is gone; a table may take long on its way.
struct Writer<S>(FrameWriter<Patient<WriteHalf<S>>, ManagerMessage>);

impl<S: AsyncWrite> Writer<S> {
    fn new(stream: WriteHalf<S>) -> Self {
        Self(FrameWriter::new(Patient::new(stream, SILENCE_MAX)))
    }

    async fn send(&mut self, message: &ManagerMessage) -> Result<(), SessionError> {
        self.0.send(message).await.map_err(failed)
    }

    async fn send_delta(&mut self, delta: &EncodedDelta<'_>) -> Result<(), SessionError> {
        self.0.send_pieces(delta.pieces()).await.map_err(failed)
    }

    /// Refuses a peer before it has a session.
    async fn turn_away(self, server: &Server, denied: Denied) -> SessionError {
        server.refusals.count(denied.cause);
        self.refuse(denied.reason, denied.message).await
    }

    /// Sends a peer to the leader.
    async fn send_on(&mut self, server: &Server) -> SessionError {
        let moved = ManagerMessage::Moved { leader: server.leader() };
        // It is over either way.
        if self.send(&moved).await.is_ok() {
            let _ = self.0.finish().await;
        }
        SessionError::NotLeader
    }

    async fn refuse(mut self, reason: RefusalReason, message: String) -> SessionError {
        let refusal = ManagerMessage::Refused { reason, message: message.clone() };
        // It is over either way.
        if self.send(&refusal).await.is_ok() {
            let _ = self.0.finish().await;
        }
        SessionError::Refused(message)
    }
}

fn failed(error: CodecError) -> SessionError {
    match error {
        CodecError::Io(error) if error.kind() == ErrorKind::TimedOut => SessionError::Timeout,
        error => error.into(),
    }
}

/// What of its table an agent has not been told of.
struct Missed {
    /// The index of its copy.
    from: u64,
    parts: BTreeSet<Part>,
}

/// What an agent has been told of.
struct Told {
    /// The index of the state that was looked at last for news to it.
    examined: u64,
    /// The index that its copy of the table is at; less, where nothing concerned it since.
    at: u64,
}

/// A session under way.
struct Session<'a> {
    server: &'a Server,
    node: NodeId,
    epoch: Epoch,
}

pub(super) async fn serve<S>(
    server: &Arc<Server>,
    stream: S,
    peer: Peer,
    mut slot: Slot,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (reading, writing) = tokio::io::split(stream);
    let mut reader = FrameReader::new(reading, AGENT_FRAME_BYTES_MAX);
    let mut writer = Writer::new(writing);
    let first = match slot.within(reader.next()).await {
        Ok(Ok(Some(first))) => first,
        Ok(Ok(None) | Err(_)) => return Err(server.turn_away(Cause::Message)),
        Err(cause) => return Err(server.turn_away(cause)),
    };
    drop(slot);
    if !*server.leads.borrow() {
        return Err(writer.send_on(server).await);
    }
    let Ok(_session) = server.sessions.try_acquire() else {
        let message = "the manager serves as many nodes as it can";
        let denied = Denied::new(RefusalReason::Unavailable, Cause::Unavailable, message);
        return Err(writer.turn_away(server, denied).await);
    };
    let admitted = match admit(server, &peer, first).await {
        Ok(admitted) => admitted,
        Err(denied) => return Err(writer.turn_away(server, denied).await),
    };
    let node = peer.node;
    warn_of_routes(server, &node);
    // One that is ahead of this manager has no table of this cluster.
    let present = server.cluster.state().index;
    let index = admitted.index.filter(|index| *index <= present).unwrap_or(0);
    let (epoch, killed) = server.registry().connect(&node, index);
    let session = Session { server, node, epoch };
    let (answers, to_say) = mpsc::channel(ANSWERS_MAX);
    let ended = tokio::select! {
        ended = session.listen(reader, answers) => ended,
        ended = session.speak(writer, admitted, to_say) => ended,
        _ = killed => Err(SessionError::Replaced),
    };
    server.registry().disconnect(&session.node, epoch);
    tracing::info!(node = %session.node, ended = ?ended.as_ref().err().map(ToString::to_string), "a session ended");
    ended
}

/// Waits until sessions are another manager's.
async fn ended(leads: &mut watch::Receiver<bool>) {
    // Without whoever would tell, the manager is shutting down.
    let _ = leads.wait_for(|leads| !leads).await.map(drop);
}

/// A network can't move out of the way of a node that joins, or that gets another route.
fn warn_of_routes(server: &Server, node: &NodeId) {
    let state = server.cluster.state();
    let Some(node) = state.nodes.get(node) else { return };
    if let Some((network, route)) = network_on_route(&state, node) {
        let (node, network) = (&node.description.hostname, &network.spec.name);
        tracing::warn!(%node, %route, %network, "a network and a route of a node overlap: its tasks can't reach what is behind the route");
    }
}

/// A refusal in the session's words.
fn refused(refusal: &Refusal) -> AttachRefused {
    let reason = match refusal.code() {
        Code::NotFound => AttachRefusedReason::NotFound,
        Code::AlreadyExists => AttachRefusedReason::Conflict,
        Code::InvalidArgument | Code::FailedPrecondition | Code::Unknown | Code::Unimplemented => {
            AttachRefusedReason::Invalid
        }
    };
    AttachRefused { reason, message: refusal.to_string() }
}

impl Session<'_> {
    /// Takes what the agent says.
    async fn listen<S: AsyncRead>(
        &self,
        mut reader: Reader<S>,
        answers: mpsc::Sender<ManagerMessage>,
    ) -> Result<(), SessionError> {
        // What the certificate comes from that the node has not confirmed yet.
        let mut unconfirmed = None;
        loop {
            let message = timeout(SILENCE_MAX, reader.next()).await.map_err(|_| SessionError::Timeout)??;
            let Some(message) = message else { return Ok(()) };
            self.server.registry().heard(&self.node, self.epoch);
            match message {
                AgentMessage::Applied { index } => {
                    self.server.registry().applied(&self.node, self.epoch, index);
                    self.server.settle();
                }
                AgentMessage::Tasks { statuses } => self.report(statuses).await?,
                AgentMessage::Described { node } => self.describe(node).await?,
                AgentMessage::Attach { id, spec } => {
                    let refused = self.attach(id.clone(), spec).await?;
                    let answer = ManagerMessage::Attached { id, refused };
                    answers.send(answer).await.map_err(|_| SessionError::Stopped)?;
                }
                AgentMessage::Renew { csr } => {
                    let (issuer, certificate) = self.renew(&csr)?;
                    unconfirmed = Some(issuer);
                    answers.send(certificate).await.map_err(|_| SessionError::Stopped)?;
                }
                AgentMessage::Renewed => {
                    let issuer = unconfirmed.take().ok_or(SessionError::OutOfOrder)?;
                    self.propose(Action::SetNodeIssuer { id: self.node.clone(), issuer }).await?;
                }
                AgentMessage::Health { health } => self.server.note_health(&self.node, health),
                AgentMessage::Alive => {}
                AgentMessage::Leave => return self.leave().await,
                AgentMessage::Resume { .. } => return Err(SessionError::OutOfOrder),
            }
        }
    }

    async fn report(&self, statuses: Vec<TaskStatus>) -> Result<(), SessionError> {
        // An agent repeats itself after each reconnection; what is known already needs no command.
        if !report_changes(&self.server.cluster.state(), &self.node, &statuses) {
            return Ok(());
        }
        self.propose(Action::ReportTasks { node: self.node.clone(), statuses }).await
    }

    async fn describe(&self, description: NodeDescription) -> Result<(), SessionError> {
        let state = self.server.cluster.state();
        if state.nodes.get(&self.node).is_some_and(|node| node.description == description) {
            return Ok(());
        }
        tracing::info!(node = %self.node, dataplane = description.dataplane, "a node describes itself anew");
        let (id, state, message) = (self.node.clone(), NodeState::Ready, String::new());
        self.propose(Action::SetNodeStatus { id, state, message, description: Some(description) }).await?;
        warn_of_routes(self.server, &self.node);
        Ok(())
    }

    /// Another certificate for the node, as what it is; and the root that it comes from.
    fn renew(&self, csr: &str) -> Result<(KeyId, ManagerMessage), SessionError> {
        let state = self.server.cluster.state();
        let refused = |denied: Denied| SessionError::Refused(denied.message);
        let cluster = cluster(&state).map_err(refused)?;
        let node = state.nodes.get(&self.node).ok_or(SessionError::Stopped)?;
        let role = role(self.server, node);
        let Issued { chain, issuer } = certify(cluster, &self.node, role, csr).map_err(refused)?;
        tracing::info!(node = %self.node, ?role, "a node's certificate is renewed");
        Ok((issuer, ManagerMessage::Certificate { chain, roots: cluster.ca.trusted() }))
    }

    /// Makes an attachment on the node; why not, where that is refused.
    async fn attach(&self, id: TaskId, spec: AttachmentSpec) -> Result<Option<AttachRefused>, SessionError> {
        let node = self.node.clone();
        match self.server.cluster.propose(Command::now(Action::Attach { id, node, spec })).await {
            Ok(_) => Ok(None),
            Err(ProposeError::Refused(refusal)) => Ok(Some(refused(&refusal))),
            Err(ProposeError::NoLeader | ProposeError::Storage(_) | ProposeError::Stopped) => {
                Err(SessionError::Stopped)
            }
        }
    }

    async fn leave(&self) -> Result<(), SessionError> {
        self.server.registry().leave(&self.node, self.epoch);
        tracing::info!(node = %self.node, "a node leaves");
        let message = "node left the swarm".to_owned();
        let (id, state) = (self.node.clone(), NodeState::Down);
        self.propose(Action::SetNodeStatus { id, state, message, description: None }).await?;
        self.server.settle();
        Ok(())
    }

    async fn propose(&self, action: Action) -> Result<(), SessionError> {
        match self.server.cluster.propose(Command::now(action)).await {
            Ok(_) => Ok(()),
            Err(ProposeError::Refused(refusal)) => Err(SessionError::Refused(refusal.to_string())),
            Err(ProposeError::NoLeader | ProposeError::Storage(_) | ProposeError::Stopped) => {
                Err(SessionError::Stopped)
            }
        }
    }

    /// What an agent with the table at `index` has missed. `None` where it needs the whole table.
    ///
    /// An agent is told what changed since its index, where this manager knows that. `state` is never older than what another
    /// manager has sent: it has this session's admission, which was decided later. An agent that is ahead of it nevertheless has
    /// the table of a life of the swarm that this manager knows nothing of; it gets the whole table, which it takes whatever its
    /// index, and goes on from there.
    fn missed(&self, state: &State, index: Option<u64>) -> Option<Missed> {
        // At 0 there is no table that changes could be made to.
        let from = index.filter(|index| (1..=state.index).contains(index))?;
        let parts = self.server.cluster.changed_since(from)?;
        Some(Missed { from, parts: view::with_following(state, parts) })
    }

    /// What brings an agent to `state`, if it lacks anything, and the table index that its copy is at then; that may be less
    /// than the state's, where nothing concerned the agent.
    fn catch_up(
        &self,
        state: &State,
        missed: Option<Missed>,
    ) -> Result<(Option<ManagerMessage>, u64), SessionError> {
        let Some(Missed { from, parts }) = missed else {
            // There is one from the cluster's first command on.
            let table = Box::new(view::table(state, &self.node).ok_or(SessionError::Stopped)?);
            tracing::debug!(node = %self.node, "a node is sent the whole table");
            return Ok((Some(ManagerMessage::Snapshot { table }), state.index));
        };
        let changes = view::renewed(state, parts, &self.node);
        if from == state.index || changes.is_empty() {
            return Ok((None, from));
        }
        let delta = Delta { from, to: state.index, changes };
        Ok((Some(ManagerMessage::Delta { delta }), state.index))
    }

    /// Waits until another table, or much of one, can be on its way; the agent hears meanwhile that this manager lives, and where
    /// to go once another one leads.
    async fn turn<S: AsyncWrite>(&self, writer: &mut Writer<S>) -> Result<SemaphorePermit<'_>, SessionError> {
        // Nobody waits for it longer than for one that has been sent what it lacks.
        self.server.registry().falls_behind(&self.node, self.epoch);
        let mut heartbeat = tokio::time::interval(HEARTBEAT_PERIOD);
        let mut leads = self.server.leads.subscribe();
        let mut turn = pin!(self.server.tables.acquire());
        loop {
            tokio::select! {
                biased;
                () = ended(&mut leads) => return Err(writer.send_on(self.server).await),
                turn = &mut turn => return turn.map_err(|_| SessionError::Stopped),
                _ = heartbeat.tick() => writer.send(&ManagerMessage::Alive).await?,
            }
        }
    }

    /// The present state, which the feed is at.
    fn advance(&self, states: &mut watch::Receiver<State>) -> Result<State, SessionError> {
        let state = states.borrow_and_update().clone();
        Ok(self.server.feed().advance(&state).map_err(CodecError::Encode)?)
    }

    /// The present state, which the feed is at, and what has changed since the one at `index`, where that is known.
    fn follow(
        &self,
        states: &mut watch::Receiver<State>,
        index: u64,
    ) -> Result<(State, Option<News>), SessionError> {
        let state = states.borrow_and_update().clone();
        let mut feed = self.server.feed();
        let state = feed.advance(&state).map_err(CodecError::Encode)?;
        Ok((state, feed.since(index)))
    }

    /// Sends what the agent lacks, and returns what it is told of then.
    async fn begin<S: AsyncWrite>(
        &self,
        writer: &mut Writer<S>,
        states: &mut watch::Receiver<State>,
        trust: &mut Trust,
        index: Option<u64>,
    ) -> Result<Told, SessionError> {
        let mut state = self.advance(states)?;
        let mut missed = self.missed(&state, index);
        let mut turn = None;
        if missed.as_ref().is_none_or(|missed| missed.parts.len() > SHORT_MAX) {
            drop((state, missed));
            turn = Some(self.turn(writer).await?);
            state = self.advance(states)?;
            missed = self.missed(&state, index);
        }
        let (message, at) = self.catch_up(&state, missed)?;
        let (told, news) = (Told { examined: state.index, at }, trust.news(&state, &self.node));
        // What all states that slow agents are behind by hold together is many times what one does.
        drop(state);
        // Noted before it is sent, here and later: the agent's answer can overtake the end of `send`.
        self.server.registry().sent(&self.node, self.epoch, at, index.is_none());
        self.server.registry().examined(&self.node, self.epoch, told.examined);
        if let Some(message) = message {
            writer.send(&message).await?;
        }
        drop(turn);
        self.server.settle();
        for message in &news {
            writer.send(message).await?;
        }
        // Whether the node is still there is for whoever looks at changes.
        states.mark_changed();
        Ok(told)
    }

    /// Keeps the agent's table current.
    async fn speak<S: AsyncWrite>(
        &self,
        mut writer: Writer<S>,
        admitted: Admitted,
        mut answers: mpsc::Receiver<ManagerMessage>,
    ) -> Result<(), SessionError> {
        let Admitted { answer, index, mut trust } = admitted;
        let mut states = self.server.cluster.watch();
        let mut settled = self.server.settled.subscribe();
        let mut leads = self.server.leads.subscribe();
        writer.send(&answer).await?;
        let mut told = self.begin(&mut writer, &mut states, &mut trust, index).await?;
        settled.mark_changed();
        let mut heartbeat = tokio::time::interval(HEARTBEAT_PERIOD);
        loop {
            tokio::select! {
                changed = states.changed() => {
                    changed.map_err(|_| SessionError::Stopped)?;
                    let (state, steps) = self.follow(&mut states, told.examined)?;
                    if !state.nodes.contains_key(&self.node) {
                        let message = "the node was removed from the cluster".to_owned();
                        return Err(writer.refuse(RefusalReason::UnknownNode, message).await);
                    }
                    let Some(steps) = steps else {
                        drop(state);
                        told = self.begin(&mut writer, &mut states, &mut trust, Some(told.at)).await?;
                        continue;
                    };
                    let news = trust.news(&state, &self.node);
                    told.examined = state.index;
                    drop(state);
                    let delta = steps.delta(&self.node, told.at, told.examined).map_err(CodecError::Encode)?;
                    if let Some(delta) = delta {
                        told.at = told.examined;
                        self.server.registry().sent(&self.node, self.epoch, told.at, false);
                        writer.send_delta(&delta).await?;
                    } else {
                        self.server.registry().examined(&self.node, self.epoch, told.examined);
                        self.server.settle();
                    }
                    for message in &news {
                        writer.send(message).await?;
                    }
                }
                changed = settled.changed() => {
                    changed.map_err(|_| SessionError::Stopped)?;
                    let index = *settled.borrow_and_update();
                    if index > 0 {
                        writer.send(&ManagerMessage::Settled { index }).await?;
                    }
                }
                () = ended(&mut leads) => return Err(writer.send_on(self.server).await),
                Some(answer) = answers.recv() => writer.send(&answer).await?,
                _ = heartbeat.tick() => writer.send(&ManagerMessage::Alive).await?,
            }
        }
    }
}
