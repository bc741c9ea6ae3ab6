//! What members say to each other, and over what.

use std::future::Future;
use std::pin::Pin;

use mesh_api::id::NodeId;
use openraft::error::InstallSnapshotError;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use serde::{Deserialize, Serialize};

use super::answers::Answer;
use super::members::MembersError;
use super::{Batch, Manager, RaftId, TypeConfig};
use crate::session::Report;

/// A question of one member to another. As JSON it has at most some 12 MiB.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Who asks.
    pub from: RaftId,
    /// Who is asked: the host may have become another member meanwhile.
    pub to: RaftId,
    /// What is asked.
    pub call: Call,
}

/// What one member asks another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Call {
    /// Raft: take these entries, and hear of the leader.
    Append(AppendEntriesRequest<TypeConfig>),
    /// Raft: vote for me.
    Vote(VoteRequest<RaftId>),
    /// Raft: take this piece of a snapshot.
    Snapshot(InstallSnapshotRequest<TypeConfig>),
    /// To the leader: decide on these commands.
    Propose(Batch),
    /// To the leader: how far must I have applied the log, so that I know all that was decided before this question?
    ReadIndex,
    /// To the leader: make a member of a manager.
    Add(RaftId, Manager),
    /// To the leader: a member is none any longer.
    Remove(RaftId),
    /// To the leader: is that a member?
    IsMember(RaftId),
    /// To any manager: what do you know that is not in the state?
    Report,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    /// To [`Call::Append`].
    Append(AppendEntriesResponse<RaftId>),
    /// To [`Call::Vote`].
    Vote(VoteResponse<RaftId>),
    /// To [`Call::Snapshot`].
    Snapshot(Result<InstallSnapshotResponse<RaftId>, InstallSnapshotError>),
    /// To [`Call::Propose`].
    Proposed(Answer),
    /// To [`Call::ReadIndex`].
    ReadIndex(u64),
    /// To [`Call::Add`] and [`Call::Remove`].
    Members(Result<(), MembersError>),
    /// To [`Call::IsMember`].
    IsMember(bool),
    /// To [`Call::Report`].
    Report(Box<Report>),
    /// Only the leader can answer that, and the one asked isn't, or can't tell.
    NotLeader,
    /// Whoever asks is no member any longer.
    NotMember,
    /// The one asked is not whom the question is for, or takes no part.
    Unavailable,
}

/// Why there is no answer. Whether the question arrived is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("manager {to} gives no answer: {problem}")]
pub struct TransportError {
    /// Who was asked.
    pub to: NodeId,
    /// What happened.
    pub problem: String,
}

/// An answer to come.
pub type Calling<'a> = Pin<Box<dyn Future<Output = Result<Response, TransportError>> + Send + 'a>>;

/// What carries questions to other managers. Each call is bounded in time by the caller, who drops it then.
pub trait Transport: std::fmt::Debug + Send + Sync + 'static {
    /// Asks a manager.
    fn call<'a>(&'a self, to: &'a Manager, request: Request) -> Calling<'a>;
}

/// A transport that reaches nobody, for a manager that is alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Isolated;

impl Transport for Isolated {
    fn call<'a>(&'a self, to: &'a Manager, _: Request) -> Calling<'a> {
        let (to, problem) = (to.node.clone(), "this manager has no way to others".to_owned());
        Box::pin(async { Err(TransportError { to, problem }) })
    }
}
