//! The first node of a cluster: the host that made it gives itself its certificate.

use std::time::{Duration, SystemTime};

use mesh_api::id::{ClusterId, NodeId};
use mesh_api::session::NodeDescription;
use mesh_api::table::Role;
use mesh_api::tls::{Credential, IdentityError, KeyRequest, Roots, RootsError};

use super::{Issued, PkiError, Subject};
use crate::cluster::{Cluster, ProposeError};
use crate::command::{Action, Command};

/// Why the host is not the first node.
#[derive(Debug, thiserror::Error)]
pub enum FirstError {
    /// Its certificate can't be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Its certificate can't be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The cluster's root can't be used.
    #[error(transparent)]
    Roots(#[from] RootsError),
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
    let role = Role::Manager;
    let key = KeyRequest::new()?;
    let subject = Subject { node: id.clone(), role, cluster: object.id.clone() };
    let life = Duration::from_nanos(object.spec.cert_expiry_ns);
    let Issued { chain, issuer } = object.ca.sign(key.csr(), &subject, life, SystemTime::now())?;
    let credential =
        Credential { identity: key.identity(&chain)?, roots: Roots::from_pem(&object.ca.trusted())? };
    cluster.propose(Command::now(Action::AddNode { id: id.clone(), role, description, issuer })).await?;
    Ok(First { cluster: object.id.clone(), node: id, credential })
}
