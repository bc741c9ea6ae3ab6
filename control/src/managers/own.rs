//! A manager whose certificate has expired certifies itself until its node has the next one. It has the root's key; and
//! managers that were all off for too long would otherwise never hear each other again, nor any node them.

use std::time::{Duration, SystemTime};

use mesh_api::error::chain;
use mesh_api::table::Role;
use mesh_api::tls::{Credential, Shared};
use tokio::time::sleep;

use crate::cluster::Cluster;
use crate::model::State;
use crate::pki::{OwnError, manager_credential};

/// How often to look whether the certificate has expired.
const PERIOD: Duration = Duration::from_secs(5);
/// How long such a certificate is good.
const LIFE: Duration = Duration::from_hours(1);

/// Keeps what is in `credential` valid, until it is dropped.
pub(super) async fn keep_valid(cluster: Cluster, credential: Shared) {
    let mut given = credential.watch();
    loop {
        let present = given.borrow_and_update().clone();
        if let Some(present) =
            present.filter(|present| present.identity.peer().not_after <= SystemTime::now())
        {
            match certify(&cluster.state(), &present) {
                Ok(Some(own)) => {
                    tracing::warn!("this manager's certificate has expired: it certifies itself for an hour");
                    credential.replace(&present, own.into());
                }
                Ok(None) => {}
                Err(error) => {
                    let error = chain(&error);
                    tracing::error!(
                        error,
                        "this manager's certificate has expired, and it can't certify itself"
                    );
                }
            }
        }
        tokio::select! {
            // The sender is this one's too.
            _ = given.changed() => {}
            () = sleep(PERIOD) => {}
        }
    }
}

/// Certifies the node of `expired` anew, if it is one of the managers by `state`.
pub(super) fn certify(state: &State, expired: &Credential) -> Result<Option<Credential>, OwnError> {
    let peer = expired.identity.peer();
    let is_manager = state.nodes.get(&peer.node).is_some_and(|node| node.spec.role == Role::Manager);
    let Some(cluster) = state.cluster.as_ref().filter(|cluster| is_manager && cluster.id == peer.cluster)
    else {
        return Ok(None);
    };
    let (own, _) = manager_credential(cluster, &peer.node, LIFE, SystemTime::now())?;
    Ok(Some(own))
}
