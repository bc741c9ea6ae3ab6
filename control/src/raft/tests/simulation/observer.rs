//! What must hold all the time, whoever looks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use openraft::CommittedLeaderId;

use crate::model::State;
use crate::raft::{LogId, RaftId, Replica};
use crate::testing::World;

#[derive(Debug, Default)]
struct Seen {
    /// The leader whose entry is applied at an index: its term, and which of the members it is.
    entries: BTreeMap<u64, CommittedLeaderId<RaftId>>,
    /// The state at an index.
    states: BTreeMap<u64, State>,
    wrong: Vec<String>,
}

/// Watches all members.
#[derive(Debug, Clone, Default)]
pub(super) struct Observer {
    seen: Arc<Mutex<Seen>>,
}

impl Observer {
    /// Watches a member as long as it runs.
    pub(super) fn watch(&self, replica: &Replica) {
        let (id, seen) = (replica.id(), Arc::clone(&self.seen));
        let mut metrics = replica.inner.metrics.clone();
        tokio::spawn(async move {
            loop {
                let now = metrics.borrow_and_update().clone();
                if let Some(last) = now.last_applied {
                    seen.lock().unwrap().entry(id, last);
                }
                if metrics.changed().await.is_err() {
                    return;
                }
            }
        });
        let (mut states, seen) = (replica.state(), Arc::clone(&self.seen));
        tokio::spawn(async move {
            let mut last = 0;
            loop {
                let state = states.borrow_and_update().clone();
                seen.lock().unwrap().state(id, last, &state);
                last = state.index;
                if states.changed().await.is_err() {
                    return;
                }
            }
        });
        let (mut applied, seen) = (replica.inner.applied.clone(), Arc::clone(&self.seen));
        tokio::spawn(async move {
            let mut last = None;
            loop {
                let now = *applied.borrow_and_update();
                if now < last {
                    seen.lock().unwrap().wrong.push(format!("{id} went back from {last:?} to {now:?}"));
                }
                last = now;
                if applied.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Fails where anything was wrong.
    #[track_caller]
    pub(super) fn check(&self) {
        let seen = self.seen.lock().unwrap();
        assert!(seen.wrong.is_empty(), "{:#?}", seen.wrong);
    }
}

impl Seen {
    /// openraft orders leaders by term and member, and a term may have several, one after the other: what must not be is
    /// that two of them decide on one entry, or that an earlier leader's comes after a later one's.
    fn entry(&mut self, id: RaftId, applied: LogId) {
        let LogId { leader_id, index } = applied;
        let decided = *self.entries.entry(index).or_insert(leader_id);
        if decided != leader_id {
            self.wrong.push(format!("entry {index} is {decided}'s and, on {id}, {leader_id}'s"));
        }
        let before = self.entries.range(..index).next_back().filter(|(_, before)| **before > leader_id);
        let after = self.entries.range(index + 1..).next().filter(|(_, after)| **after < leader_id);
        if let Some((other, leader)) = before.or(after) {
            self.wrong.push(format!("entry {index} on {id} is {leader_id}'s, and entry {other} {leader}'s"));
        }
    }

    fn state(&mut self, id: RaftId, last: u64, state: &State) {
        if state.index < last {
            self.wrong.push(format!("the state of {id} went back from {last} to {}", state.index));
        }
        match self.states.get(&state.index) {
            Some(other) if other == state => {}
            Some(other) => {
                self.wrong.push(format!("two states at {}: {state:#?} on {id}, and {other:#?}", state.index));
            }
            None => {
                self.states.insert(state.index, state.clone());
                let mut world = World::new(&[]);
                world.state = state.clone();
                // No address, port or VNI is given twice, among other things.
                if std::panic::catch_unwind(|| world.check_invariants()).is_err() {
                    self.wrong.push(format!("the state at {} on {id} is wrong in itself", state.index));
                }
            }
        }
    }
}
