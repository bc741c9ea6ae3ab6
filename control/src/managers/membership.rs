//! Who keeps the state follows from the nodes' roles: the leader makes members of the nodes that are to be managers and have
//! told how they are reached, and of the others none.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_api::error::chain;
use mesh_api::id::NodeId;
use mesh_api::session::ManagerDescription;
use mesh_api::table::Role;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::cluster::Cluster;
use crate::model::State;
use crate::raft::{Manager, Member, RaftId};

/// How long to wait after a change that did not come about.
const RETRY: Duration = Duration::from_secs(1);

/// A change of the members.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Change {
    Add(RaftId, Manager),
    Remove(RaftId),
}

/// Keeps to it for as long as this is polled, which is while this manager leads.
pub async fn keep(cluster: Cluster) {
    let mut states = cluster.watch();
    loop {
        let state = states.borrow_and_update().clone();
        let Some(change) = next(&state, &cluster.managers()) else {
            if states.changed().await.is_err() {
                return;
            }
            continue;
        };
        let made = async {
            match &change {
                Change::Add(id, manager) => cluster.add_manager(*id, manager.clone()).await,
                Change::Remove(id) => cluster.remove_manager(*id).await,
            }
        };
        let done = tokio::select! {
            biased;
            done = made => done,
            is_led = withdrawn(&mut states, &cluster, &change) => if is_led { continue } else { return },
        };
        match done {
            Ok(()) => tracing::info!(?change, "the managers are others"),
            Err(error) => {
                tracing::warn!(
                    ?change,
                    error = chain(&error),
                    "the managers stay as they are for the moment"
                );
                sleep(RETRY).await;
            }
        }
    }
}

/// Waits until another change is the next one, say because the node that was to be added is gone, or has told of another member;
/// false where there is to be none.
async fn withdrawn(states: &mut watch::Receiver<State>, cluster: &Cluster, change: &Change) -> bool {
    while states.changed().await.is_ok() {
        let state = states.borrow_and_update().clone();
        if next(&state, &cluster.managers()).as_ref() != Some(change) {
            return true;
        }
    }
    false
}

/// The next change; managers come before others go, so that there are never fewer than need be.
fn next(state: &State, members: &[Member]) -> Option<Change> {
    let reached = |node: &NodeId| -> Option<&ManagerDescription> {
        let node = state.nodes.get(node).filter(|node| node.spec.role == Role::Manager)?;
        node.description.manager.as_ref()
    };
    let known: BTreeMap<RaftId, &Member> = members.iter().map(|member| (member.id, member)).collect();
    // What a node told may be of its former self, until it has told anew; which member the leader is, it knows.
    let leader = members.iter().find(|member| member.is_leader);
    let is_former = |node: &NodeId, raft: RaftId| {
        leader.is_some_and(|leader| leader.manager.node == *node && leader.id != raft)
    };
    for node in state.nodes.values().filter(|node| !node.is_down()) {
        let Some(ManagerDescription { raft, addr }) = reached(&node.id) else { continue };
        if is_former(&node.id, *raft) {
            continue;
        }
        let is_member = known.get(raft).is_some_and(|member| member.is_voter && member.manager.addr == *addr);
        if !is_member {
            return Some(Change::Add(*raft, Manager { node: node.id.clone(), addr: *addr }));
        }
    }
    let goes = |member: &&Member| match state.nodes.get(&member.manager.node) {
        // One that has not told yet how it is reached stays what it was.
        Some(node) if node.spec.role == Role::Manager => {
            !member.is_leader && node.description.manager.as_ref().is_some_and(|own| own.raft != member.id)
        }
        _ => true,
    };
    members.iter().find(goes).map(|member| Change::Remove(member.id))
}

#[cfg(test)]
mod tests;
