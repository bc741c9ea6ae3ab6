//! openraft's way to other members: its calls as [`Request`]s over a [`Transport`], and who has answered when.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::error::{InstallSnapshotError, RPCError, RaftError, RemoteError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use tokio::sync::watch;
use tokio::time::Instant;

use super::message::{Call, Request, Response, Transport, TransportError};
use super::{Manager, RaftId, TypeConfig};

/// How long to leave a member alone that could not be reached.
const BACKOFF: Duration = Duration::from_millis(100);

type Failed<E> = RPCError<RaftId, Manager, E>;

/// When each member last answered.
#[derive(Debug, Clone, Default)]
pub(super) struct Heard {
    last: Arc<Mutex<BTreeMap<RaftId, Instant>>>,
}

impl Heard {
    fn note(&self, id: RaftId) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Instant::now());
    }

    /// Whether a member answered within `bound`.
    pub(super) fn within(&self, id: RaftId, bound: Duration) -> bool {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.get(&id).is_some_and(|at| at.elapsed() < bound)
    }
}

/// Makes a [`Link`] to each member.
#[derive(Debug, Clone)]
pub(super) struct Links {
    pub(super) from: RaftId,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) heard: Heard,
    /// Told when the leader says that this is no member any longer.
    pub(super) removed: watch::Sender<bool>,
}

impl RaftNetworkFactory<TypeConfig> for Links {
    type Network = Link;

    async fn new_client(&mut self, target: RaftId, manager: &Manager) -> Link {
        Link { links: self.clone(), to: target, manager: manager.clone() }
    }
}

/// The way to a member.
#[derive(Debug)]
pub(super) struct Link {
    links: Links,
    to: RaftId,
    manager: Manager,
}

impl Link {
    async fn call(&self, call: Call) -> Result<Response, TransportError> {
        let request = Request { from: self.links.from, to: self.to, call };
        let response = self.links.transport.call(&self.manager, request).await?;
        match response {
            Response::Unavailable => {}
            Response::NotMember => drop(self.links.removed.send_replace(true)),
            _ => self.links.heard.note(self.to),
        }
        Ok(response)
    }

    /// For an answer that doesn't fit the question.
    fn amiss(&self) -> Unreachable {
        let problem = "it takes no part".to_owned();
        Unreachable::new(&TransportError { to: self.manager.node.clone(), problem })
    }
}

impl RaftNetwork<TypeConfig> for Link {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<RaftId>, Failed<RaftError<RaftId>>> {
        match self.call(Call::Append(request)).await {
            Ok(Response::Append(response)) => Ok(response),
            Ok(_) => Err(self.amiss().into()),
            Err(error) => Err(Unreachable::new(&error).into()),
        }
    }

    async fn vote(
        &mut self,
        request: VoteRequest<RaftId>,
        _: RPCOption,
    ) -> Result<VoteResponse<RaftId>, Failed<RaftError<RaftId>>> {
        match self.call(Call::Vote(request)).await {
            Ok(Response::Vote(response)) => Ok(response),
            Ok(_) => Err(self.amiss().into()),
            Err(error) => Err(Unreachable::new(&error).into()),
        }
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<TypeConfig>,
        _: RPCOption,
    ) -> Result<InstallSnapshotResponse<RaftId>, Failed<RaftError<RaftId, InstallSnapshotError>>> {
        match self.call(Call::Snapshot(request)).await {
            Ok(Response::Snapshot(Ok(response))) => Ok(response),
            Ok(Response::Snapshot(Err(error))) => {
                Err(RemoteError::new(self.to, RaftError::APIError(error)).into())
            }
            Ok(_) => Err(self.amiss().into()),
            Err(error) => Err(Unreachable::new(&error).into()),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(BACKOFF))
    }
}
