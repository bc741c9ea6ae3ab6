//! A member's store while no member runs on it: what it leads to, and the store of a member that is to begin with a state.

use std::collections::BTreeMap;
use std::time::Duration;

use openraft::CommittedLeaderId;

use super::machine::Contents;
use super::replica::Storage;
use super::{LogId, Manager, Membership, RaftId, Vote};
use crate::model::State;
use crate::store::StoreError;

/// Entries read at once.
const STEP: u64 = 64;
/// How long closing a store may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// What a store leads to.
#[derive(Debug, Clone)]
pub struct OnDisk {
    /// The state with all that is in the log.
    pub state: State,
    /// Entries at the log's end of which the store does not know that they were decided. Like a cluster that is made of one
    /// survivor ([`super::force`]), the state has them: what was acknowledged to anybody and reached this disk is there, and
    /// so may be what nobody was told of.
    pub undecided: u64,
}

impl Storage {
    /// What is kept here. May block.
    pub fn read(&self) -> Result<OnDisk, StoreError> {
        let snapshot = self.snapshots.load()?.map(|body| Contents::decode(&body)).transpose()?;
        let mut contents =
            snapshot.unwrap_or_else(|| Contents::new(None, Membership::default(), State::empty()));
        let snapshot = contents.last.map(|last| last.index);
        if let Some(snapshot) = snapshot {
            self.log.check_reaches(snapshot)?;
        }
        let decided = self.log.committed()?.map(|committed| committed.index).max(snapshot);
        let end = self.log.ends()?.1.map_or(0, |last| last.index + 1);
        let mut next = snapshot.map_or(0, |snapshot| snapshot + 1);
        while next < end {
            let entries = self.log.entries(next, end.min(next + STEP))?;
            if entries.first().map(|entry| entry.log_id.index) != Some(next) {
                return Err(self.log.damaged(format!("entry {next} is missing")));
            }
            next += entries.len() as u64;
            for entry in entries {
                contents.apply(entry);
            }
        }
        let mut voters = contents.membership.voter_ids();
        let is_alone = voters.next() == Some(self.id) && voters.next().is_none();
        let undecided = match decided {
            // Whoever is alone decides by writing.
            _ if is_alone => 0,
            Some(decided) => end.saturating_sub(decided + 1),
            None => end,
        };
        Ok(OnDisk { state: contents.state, undecided })
    }

    /// Keeps, in a store that was begun just now, what a member has that is alone in a cluster that has come to `state`. May
    /// block.
    pub fn begin_with(&self, manager: Manager, state: State) -> Result<(), StoreError> {
        let term = 1;
        let last = LogId::new(CommittedLeaderId::new(term, self.id), state.index);
        let members: BTreeMap<RaftId, Manager> = BTreeMap::from([(self.id, manager)]);
        let membership = Membership::new(Some(last), members.into());
        let body = Contents::new(Some(last), membership, state).encode()?;
        self.log.save_vote(&Vote::new(term, self.id))?;
        self.log.receiving(last.index)?;
        self.snapshots.save(last.index, &body)?;
        self.log.purge(last)
    }

    /// Closes the store, of whose files nothing is in use any longer when this returns.
    pub async fn close(self) {
        let mut closed = self.closed.clone();
        drop(self);
        if tokio::time::timeout(CLOSE_TIMEOUT, closed.wait_for(|closed| *closed)).await.is_err() {
            tracing::warn!("the manager's store is still in use");
        }
    }
}
