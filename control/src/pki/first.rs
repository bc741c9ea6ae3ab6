//! The first node of a cluster: the host that made it gives itself its certificate.

use std::time::{Duration, SystemTime};

use mesh_api::id::{ClusterId, NodeId};
use mesh_api::session::NodeDescription;
use mesh_api::table::Role;
use mesh_api::tls::{Credential, IdentityError, KeyId, KeyRequest, Roots, RootsError};

use super::{Issued, PkiError, Subject};
use crate::cluster::{Cluster, ProposeError};
use crate::command::{Action, Command};
use crate::model::ClusterObject;

/// Why a host that has the cluster's keys has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// It can't be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// It can't be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The cluster's root can't be used.
    #[error(transparent)]
    Roots(#[from] RootsError),
}

/// Why the host is not the first node.
#[derive(Debug, thiserror::Error)]
pub enum FirstError {
    /// It has no certificate.
    #[error(transparent)]
    Own(#[from] OwnError),
    /// The cluster does not take it.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// The cluster is not made yet.
    #[error("the cluster is being made")]
    NoCluster,
}

/// The first node.
#[derive(Debug, Clone)]
pub struct First {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node's id.
    pub node: NodeId,
    /// What it proves itself with.
    pub credential: Credential,
}

/// Makes this host a manager of `cluster`, with the id that the cluster was made with.
pub async fn first_manager(
    cluster: &Cluster,
    id: NodeId,
    description: NodeDescription,
) -> Result<First, FirstError> {
    let object = cluster.state().cluster.ok_or(FirstError::NoCluster)?;
    let life = object.spec.cert_life();
    let (credential, issuer) = manager_credential(&object, &id, life, SystemTime::now())?;
    let role = Role::Manager;
    let add = Action::AddNode { id: id.clone(), role, description, issuer, token: None };
    cluster.propose(Command::now(add)).await?;
    Ok(First { cluster: object.id.clone(), node: id, credential })
}

/// What this host, which has the cluster's own keys, proves itself with as its node `id` and a manager, for as long as `life`; and
/// the root that this comes from.
pub(crate) fn manager_credential(
    object: &ClusterObject,
    id: &NodeId,
    life: Duration,
    now: SystemTime,
) -> Result<(Credential, KeyId), OwnError> {
    let key = KeyRequest::new()?;
    let subject = Subject { node: id.clone(), role: Role::Manager, cluster: object.id.clone() };
    let Issued { chain, issuer } = object.ca.sign(key.csr(), &subject, life, now)?;
    let roots = Roots::from_pem(&object.ca.trusted())?;
    Ok((Credential { identity: key.identity(&chain)?, roots }, issuer))
}
