//! What only the leader can do, asked of any member: writes, reads of what is decided, and changes of the membership.

use std::sync::Arc;
use std::time::Duration;

use openraft::error::{ClientWriteError, RaftError};
use tokio::time::{Instant, timeout, timeout_at};

use super::answers::Answer;
use super::members::MembersError;
use super::message::{Call, Request, Response};
use super::replica::{Replica, ReplicaError};
use super::{Batch, Leadership, RaftId};
use crate::apply::Reply;
use crate::model::State;
use crate::refusal::Refusal;
use crate::store::StoreError;

/// How long one try at the leader may take; it is another by then, or hears nothing.
pub(super) const TRY: Duration = Duration::from_secs(2);
/// How long a leader may take to be confirmed by a majority.
const CONFIRM: Duration = Duration::from_millis(500);
/// Between tries.
const PAUSE: Duration = Duration::from_millis(25);

/// Why something that only the leader can do was not done, as far as is known.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AskError {
    /// No leader answered in time. A write may have been decided nonetheless, or may still be.
    #[error(
        "The swarm does not have a leader. It's possible that too few managers are online. Make sure more than half of the \
         managers are online."
    )]
    NoLeader,
    /// The member's store failed.
    #[error("the manager's store failed; its log says why")]
    Storage(#[source] Arc<StoreError>),
    /// The member is stopping.
    #[error("the manager is shutting down")]
    Stopped,
}

impl From<ReplicaError> for AskError {
    fn from(error: ReplicaError) -> Self {
        match error {
            ReplicaError::Store(error) => Self::Storage(error),
            ReplicaError::Stopped => Self::Stopped,
        }
    }
}

impl Replica {
    /// Has a batch decided on, and waits until it is in effect here too. The same batch may be proposed again after
    /// [`AskError::NoLeader`], until the proposer proposes its next one.
    pub async fn propose(
        &self,
        batch: Batch,
        deadline: Instant,
    ) -> Result<Vec<Result<Reply, Refusal>>, AskError> {
        match self.ask(Call::Propose(batch), deadline).await? {
            Response::Proposed(Answer::Done { index, outcomes }) => {
                // Whoever hears of it may look for it here.
                let _ = timeout_at(deadline, self.applied(index)).await;
                Ok(Arc::unwrap_or_clone(outcomes))
            }
            _ => Err(AskError::NoLeader),
        }
    }

    /// The state with all that was decided before this was called.
    pub async fn linearizable(&self, deadline: Instant) -> Result<State, AskError> {
        let Response::ReadIndex(index) = self.ask(Call::ReadIndex, deadline).await? else {
            return Err(AskError::NoLeader);
        };
        match timeout_at(deadline, self.applied(index)).await {
            Ok(Ok(())) => Ok(self.inner.state.borrow().clone()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(AskError::NoLeader),
        }
    }

    /// Waits until the log is applied up to `index`.
    async fn applied(&self, index: u64) -> Result<(), AskError> {
        let mut applied = self.inner.applied.clone();
        let reached = applied.wait_for(|applied| applied.is_some_and(|applied| applied >= index)).await;
        reached.map(drop).map_err(|_| self.ended())
    }

    /// Why this member takes no part any longer.
    fn ended(&self) -> AskError {
        self.failure().map_or(AskError::Stopped, AskError::Storage)
    }

    /// Asks the leader, whoever that is or comes to be, until `deadline`.
    pub(super) async fn ask(&self, call: Call, deadline: Instant) -> Result<Response, AskError> {
        let mut leadership = self.inner.leadership.clone();
        while Instant::now() < deadline {
            // They end when raft does, whatever ended it.
            let ended = self.inner.metrics.has_changed().is_err();
            if ended || self.inner.metrics.borrow().running_state.is_err() {
                return Err(self.ended());
            }
            let Leadership { leader, .. } = leadership.borrow_and_update().clone();
            let response = match leader {
                Some((id, _)) if id == self.inner.id => {
                    timeout_at(deadline, self.lead(call.clone())).await.ok()
                }
                Some((id, manager)) => {
                    let request = Request { from: self.inner.id, to: id, call: call.clone() };
                    let is_long = matches!(call, Call::Add(..) | Call::Remove(_));
                    let end = if is_long { deadline } else { deadline.min(Instant::now() + TRY) };
                    let called = timeout_at(end, self.inner.transport.call(&manager, request));
                    tokio::select! {
                        biased;
                        called = called => called.ok().and_then(Result::ok),
                        () = self.leads_no_longer(id) => None,
                    }
                }
                None => None,
            };
            match response {
                None
                | Some(
                    Response::NotLeader
                    | Response::Unavailable
                    | Response::Members(Err(MembersError::NoLeader)),
                ) => {}
                Some(Response::NotMember) => drop(self.inner.removed.send_replace(true)),
                Some(response) => return Ok(response),
            }
            let _ = timeout(PAUSE, leadership.changed()).await;
        }
        Err(AskError::NoLeader)
    }

    /// Answers as the leader.
    pub(super) async fn lead(&self, call: Call) -> Response {
        match call {
            // The write of a leader that nobody hears would wait for ever.
            Call::Propose(batch) => tokio::select! {
                biased;
                response = self.write(batch) => response,
                () = self.leads_no_longer(self.inner.id) => Response::NotLeader,
            },
            Call::ReadIndex => match self.read_index().await {
                Some(index) => Response::ReadIndex(index),
                None => Response::NotLeader,
            },
            Call::IsMember(id) => match self.is_member_as_leader(id).await {
                Some(is_member) => Response::IsMember(is_member),
                None => Response::NotLeader,
            },
            Call::Add(id, manager) => Response::Members(self.add_as_leader(id, manager).await),
            Call::Remove(id) => Response::Members(self.remove_as_leader(id).await),
            Call::Append(_) | Call::Vote(_) | Call::Snapshot(_) | Call::Report => Response::Unavailable,
        }
    }

    /// Returns when a member is not known to lead any longer.
    pub(super) async fn leads_no_longer(&self, id: RaftId) {
        let mut leadership = self.inner.leadership.clone();
        let _ = leadership.wait_for(|it| it.leader.as_ref().is_none_or(|(leader, _)| *leader != id)).await;
    }

    async fn write(&self, batch: Batch) -> Response {
        match self.inner.raft.client_write(batch).await {
            Ok(written) => Response::Proposed(written.data),
            Err(RaftError::APIError(
                ClientWriteError::ForwardToLeader(_) | ClientWriteError::ChangeMembershipError(_),
            )) => Response::NotLeader,
            Err(RaftError::Fatal(_)) => Response::Unavailable,
        }
    }

    /// The index up to which all is decided, if a majority confirms that this member leads.
    pub(super) async fn read_index(&self) -> Option<u64> {
        let confirmed = timeout(CONFIRM, self.inner.raft.get_read_log_id()).await;
        let (read, _) = confirmed.ok()?.ok()?;
        Some(read.map_or(0, |read| read.index))
    }
}
