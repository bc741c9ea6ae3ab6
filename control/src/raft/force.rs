//! A cluster of one survivor: for when more than half of the managers are lost for good.

use std::collections::BTreeMap;
use std::sync::Arc;

use openraft::{CommittedLeaderId, EntryPayload};

use super::machine::Contents;
use super::replica::Storage;
use super::{Entry, LogId, Manager, RaftId, Vote};
use crate::store::StoreError;

impl Storage {
    /// Makes the member `id`, alone, of what another has kept here. All of its log counts as decided: what was acknowledged
    /// to anybody and reached this disk stays. The id is a new one, so that former members who come back are not heard.
    pub async fn force_new_cluster(self, id: RaftId, manager: Manager) -> Result<Self, StoreError> {
        let (log, snapshots) = (Arc::clone(&self.log), Arc::clone(&self.snapshots));
        let take_over = move || {
            let snapshot = snapshots.load()?.map(|body| Contents::decode(&body)).transpose()?;
            let snapshot = snapshot.and_then(|contents| contents.last);
            let (_, mut last) = log.ends()?;
            if let Some(snapshot) = snapshot
                && last.is_none_or(|last| last.index < snapshot.index)
            {
                log.check_reaches(snapshot.index)?;
                log.purge(snapshot)?;
                last = Some(snapshot);
            }
            let vote = log.vote()?.unwrap_or_default();
            let term = last.map_or(0, |last| last.leader_id.term).max(vote.leader_id.term) + 1;
            let index = last.map_or(0, |last| last.index + 1);
            let members = BTreeMap::from([(id, manager)]);
            let entry = Entry {
                log_id: LogId::new(CommittedLeaderId::new(term, id), index),
                payload: EntryPayload::Membership(members.into()),
            };
            log.take_over(id, &Vote::new(term, id), &entry)
        };
        self.log.work().run(take_over).await?;
        Ok(Self { id, ..self })
    }
}
