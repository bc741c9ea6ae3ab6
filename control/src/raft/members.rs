//! Who is a member: first as a learner, who is sent the log, then with a vote.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use super::message::{Call, Response};
use super::propose::AskError;
use super::replica::Replica;
use super::{Manager, Metrics, RaftId};

/// How long a change may take, catching up included.
const CHANGE: Duration = Duration::from_secs(20);
/// How long a whole change may take for whoever asks for it: a leader may die amid it.
const ASK: Duration = Duration::from_secs(30);
/// A learner gets its vote when it is behind by at most so many entries.
const BEHIND_MAX: u64 = 64;
/// A member that has answered within this is reachable.
const REACHABLE: Duration = Duration::from_secs(2);
/// Between tries, where another change is under way.
const PAUSE: Duration = Duration::from_millis(50);

/// Why the membership stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum MembersError {
    /// Without this member there would be none.
    #[error("attempting to demote the last manager of the swarm")]
    Last,
    /// Too few of the others can be reached to decide on anything.
    #[error("raft: member cannot be removed, because removing it may result in loss of quorum")]
    Quorum,
    /// The log does not reach the new member in time.
    #[error("the manager can't be reached from the leader, or doesn't take the log")]
    Unreachable,
    /// There is no leader, or there was none for long enough.
    #[error(
        "The swarm does not have a leader. It's possible that too few managers are online. Make sure more than half of the \
         managers are online."
    )]
    NoLeader,
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id in raft.
    pub id: RaftId,
    /// How others reach it.
    pub manager: Manager,
    /// It has a vote.
    pub is_voter: bool,
    /// It leads, as far as the one asked knows.
    pub is_leader: bool,
    /// It has answered lately. Only the leader knows of members other than itself.
    pub is_reachable: Option<bool>,
    /// Entries that it lacks. Only the leader knows.
    pub lag: Option<u64>,
}

impl Replica {
    /// The members, as this one knows them.
    pub fn managers(&self) -> Vec<Member> {
        let metrics = self.inner.metrics.borrow().clone();
        let leader = self.inner.leadership.borrow().leader.clone().map(|(id, _)| id);
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<RaftId> = membership.voter_ids().collect();
        let member = |(id, manager): (&RaftId, &Manager)| Member {
            id: *id,
            manager: manager.clone(),
            is_voter: voters.contains(id),
            is_leader: leader == Some(*id),
            is_reachable: (metrics.replication.is_some() || *id == metrics.id)
                .then(|| *id == metrics.id || self.inner.heard.within(*id, REACHABLE)),
            lag: lag(&metrics, *id),
        };
        membership.nodes().map(member).collect()
    }

    /// Makes a voter of a manager, or has the others reach it elsewhere if it is one; on whichever member leads. It may be asked
    /// for again.
    pub async fn add(&self, id: RaftId, manager: Manager) -> Result<(), MembersError> {
        self.change(Call::Add(id, manager)).await
    }

    /// Takes a member out, on whichever member leads. It may be asked for again.
    pub async fn remove(&self, id: RaftId) -> Result<(), MembersError> {
        self.change(Call::Remove(id)).await
    }

    async fn change(&self, call: Call) -> Result<(), MembersError> {
        match self.ask(call, Instant::now() + ASK).await {
            Ok(Response::Members(result)) => result,
            Ok(_) | Err(AskError::NoLeader | AskError::Storage(_) | AskError::Stopped) => {
                Err(MembersError::NoLeader)
            }
        }
    }

    pub(super) async fn add_as_leader(&self, id: RaftId, manager: Manager) -> Result<(), MembersError> {
        let deadline = Instant::now() + CHANGE;
        if self.member(id).as_ref() != Some(&manager) {
            let _alone = self.inner.changing.lock().await;
            // An id is that of one log: it is the same member that is reached elsewhere.
            self.commit(ChangeMembers::SetNodes([(id, manager)].into()), deadline).await?;
        }
        if self.is_voter(id) && !self.is_changing() {
            return Ok(());
        }
        let mut metrics = self.inner.metrics.clone();
        let caught_up = metrics.wait_for(|metrics| lag(metrics, id).is_some_and(|lag| lag <= BEHIND_MAX));
        match timeout_at(deadline, caught_up).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(MembersError::NoLeader),
            Err(_) => return Err(MembersError::Unreachable),
        }
        let _alone = self.inner.changing.lock().await;
        self.commit(ChangeMembers::AddVoterIds([id].into()), deadline).await
    }

    pub(super) async fn remove_as_leader(&self, id: RaftId) -> Result<(), MembersError> {
        let _alone = self.inner.changing.lock().await;
        let deadline = Instant::now() + CHANGE;
        if self.member(id).is_none() {
            return Ok(());
        }
        if !self.is_voter(id) {
            return self.commit(ChangeMembers::RemoveNodes([id].into()), deadline).await;
        }
        let voters: BTreeSet<RaftId> = {
            let metrics = self.inner.metrics.borrow();
            metrics.membership_config.membership().voter_ids().filter(|voter| *voter != id).collect()
        };
        if voters.is_empty() {
            return Err(MembersError::Last);
        }
        let is_reachable =
            |voter: RaftId| voter == self.inner.id || self.inner.heard.within(voter, REACHABLE);
        if voters.iter().filter(|voter| is_reachable(**voter)).count() <= voters.len() / 2 {
            return Err(MembersError::Quorum);
        }
        let removed = self.commit(ChangeMembers::RemoveVoters([id].into()), deadline).await;
        // A leader that took itself out may lead no longer before it can say so.
        let is_out = id == self.inner.id && self.member(id).is_none();
        if is_out { Ok(()) } else { removed }
    }

    /// Completes a change that another leader began.
    pub(super) async fn finish_change(&self) -> Result<(), MembersError> {
        let _alone = self.inner.changing.lock().await;
        let finish = ChangeMembers::AddVoterIds(BTreeSet::new());
        self.commit(finish, Instant::now() + CHANGE).await
    }

    /// Whether a change of the membership is half done.
    fn is_changing(&self) -> bool {
        self.inner.metrics.borrow().membership_config.membership().get_joint_config().len() > 1
    }

    fn is_voter(&self, id: RaftId) -> bool {
        let metrics = self.inner.metrics.borrow();
        metrics.membership_config.membership().voter_ids().any(|voter| voter == id)
    }

    /// Has a change of the membership decided on; waits for others that are under way. It completes one that is half done: a voter
    /// whom that takes out is no member then, or the leader that took itself out would go on as one without a vote.
    async fn commit(
        &self,
        change: ChangeMembers<RaftId, Manager>,
        deadline: Instant,
    ) -> Result<(), MembersError> {
        while Instant::now() < deadline {
            // openraft does not expect changes from a leader that took itself out.
            if !self.is_voter(self.inner.id) {
                return Err(MembersError::NoLeader);
            }
            let changing = self.inner.raft.change_membership(change.clone(), false);
            let changed = tokio::select! {
                biased;
                changed = timeout_at(deadline, changing) => changed,
                () = self.leads_no_longer(self.inner.id) => return Err(MembersError::NoLeader),
            };
            match changed {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error)))) => match error {
                    ChangeMembershipError::InProgress(_) => tokio::time::sleep(PAUSE).await,
                    ChangeMembershipError::EmptyMembership(_) => return Err(MembersError::Last),
                    ChangeMembershipError::LearnerNotFound(_) => return Err(MembersError::Unreachable),
                },
                Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)) | RaftError::Fatal(_)))
                | Err(_) => return Err(MembersError::NoLeader),
            }
        }
        Err(MembersError::NoLeader)
    }
}

/// Entries that a member lacks, as the leader sees it.
fn lag(metrics: &Metrics, id: RaftId) -> Option<u64> {
    let replication = metrics.replication.as_ref()?;
    let last = metrics.last_log_index.map_or(0, |last| last + 1);
    if id == metrics.id {
        return Some(0);
    }
    let matched = replication.get(&id)?.map(|matched| matched.index + 1);
    matched.map(|matched| last.saturating_sub(matched))
}
