//! What the search begins with: sound messages, entries and snapshots.

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{CommittedLeaderId, EntryPayload, SnapshotMeta};
use serde_json::to_vec;

use super::contents;
use crate::command::{Action, Command};
use crate::raft::machine::Contents;
use crate::raft::message::{Call, Request, Response};
use crate::raft::{Answer, Batch, Entry, LogId, Manager, Membership, RaftId, Vote};
use crate::testing::{World, attach, network, service};

fn log_id(index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(1, 1), index)
}

fn batch(commands: Vec<Command>) -> Batch {
    Batch { proposer: 7, number: 9, commands }
}

fn normal(index: u64, action: Action) -> Entry {
    let command = Command { at_ns: 1, action };
    Entry { log_id: log_id(index), payload: EntryPayload::Normal(batch(vec![command])) }
}

fn manager() -> Manager {
    Manager { node: "n1".into(), addr: "192.0.2.1:2377".parse().unwrap() }
}

fn members() -> Membership {
    contents().membership
}

/// One of several kinds of action.
fn actions() -> Vec<Action> {
    let mut log = World::new(&["n3"]).log;
    // The first one is a cluster's beginning, which this cluster has behind it.
    let mut actions: Vec<Action> = log.drain(1..).map(|command| command.action).collect();
    actions.push(Action::CreateNetwork { id: "front".into(), spec: network("front") });
    actions.push(Action::CreateService { id: "svc".into(), spec: Box::new(service("more", 2)) });
    actions.push(Action::RemoveService { id: "svc-web".into() });
    actions.push(Action::RemoveNode { id: "n1".into(), force: true });
    actions.push(attach("guest", "n1", "app", "guest"));
    let mut ids = 0;
    let mut id = || {
        ids += 1;
        format!("new{ids}").into()
    };
    let mut state = contents().state;
    // Its tasks are to be made and to be ended.
    state.tasks.clear();
    let steps = crate::orchestrator::reconcile(&state, 2, &mut id).steps;
    actions.push(Action::Orchestrate { steps });
    actions
}

pub(crate) fn entries() -> Vec<Vec<u8>> {
    let mut entries: Vec<Entry> =
        actions().into_iter().enumerate().map(|(at, action)| normal(8 + at as u64, action)).collect();
    entries.push(Entry { log_id: log_id(8), payload: EntryPayload::Blank });
    let membership = EntryPayload::Membership(members().membership().clone());
    entries.push(Entry { log_id: log_id(9), payload: membership });
    entries.iter().map(|entry| to_vec(entry).unwrap()).collect()
}

pub(crate) fn messages() -> Vec<Vec<u8>> {
    let vote = Vote::new_committed(1, 1);
    let entries: Vec<Entry> = actions().into_iter().take(2).map(|action| normal(8, action)).collect();
    let append =
        AppendEntriesRequest { vote, prev_log_id: Some(log_id(7)), entries, leader_commit: Some(log_id(7)) };
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(7)),
        last_membership: members(),
        snapshot_id: "7-00".to_owned(),
    };
    let data = b"{\"format\":1}".to_vec();
    let snapshot = InstallSnapshotRequest { vote, meta, offset: 0, data, done: true };
    let commands = vec![Command { at_ns: 1, action: Action::RemoveService { id: "svc-web".into() } }];
    let calls = [
        Call::Append(append),
        Call::Vote(VoteRequest::new(vote, Some(log_id(7)))),
        Call::Snapshot(snapshot),
        Call::Propose(batch(commands)),
        Call::ReadIndex,
        Call::Add(2, manager()),
        Call::Remove(RaftId::MAX),
        Call::IsMember(9),
    ];
    let responses = [
        Response::Append(AppendEntriesResponse::Conflict),
        Response::Vote(VoteResponse::new(vote, Some(log_id(7)), true)),
        Response::Snapshot(Ok(InstallSnapshotResponse { vote })),
        Response::Proposed(Answer::Late),
        Response::ReadIndex(7),
        Response::Members(Ok(())),
        Response::IsMember(false),
        Response::NotLeader,
    ];
    let asked = calls.into_iter().map(|call| to_vec(&Request { from: 1, to: 2, call }).unwrap());
    asked.chain(responses.iter().map(|response| to_vec(response).unwrap())).collect()
}

pub(crate) fn snapshots() -> Vec<Vec<u8>> {
    let of = |state| Contents::new(Some(log_id(7)), members(), state).encode().unwrap();
    let mut world = World::new(&["n1"]);
    let first = of(world.state.clone());
    world.create_network("front");
    let empty = of(crate::model::State::empty());
    vec![contents().encode().unwrap(), first, of(world.state), empty]
}
