//! What the session changes of the node's credentials: its certificate, and the roots that it trusts.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_api::error;
use mesh_api::session::AgentMessage;
use mesh_api::table::Role;
use mesh_api::tls::{Credential, IdentityError, KeyRequest, Roots, RootsError};
use tokio::time::Instant;
use tracing::{info, warn};

use super::connect::Readmitted;
use super::{Client, ConnectError, Credentials, expired, readmit};

/// Why a certificate or roots were not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Roots(#[from] RootsError),
    #[error("the certificate is another node's")]
    Other,
    #[error("the state folder can't be written")]
    Write(#[from] io::Error),
}

impl Client {
    /// Takes the roots, PEM, that the managers name.
    pub(super) async fn trust(&self, roots: &str) {
        let kept = match Roots::from_pem(roots) {
            Ok(roots) => {
                let Credentials { membership, credential } = self.credentials().clone();
                if credential.roots == roots {
                    return;
                }
                let credential = Credential { roots, ..Credential::clone(&credential) };
                self.keep(Credentials { membership, credential: Arc::new(credential) }).await
            }
            Err(error) => Err(error.into()),
        };
        match kept {
            Ok(()) => info!("the managers' root certificates are others"),
            Err(error) => {
                let error = error::chain(&error);
                warn!(error, "the managers' root certificates can't be kept");
            }
        }
    }

    /// Where the node's certificate has expired, asks for another: an operator has to approve that.
    pub(super) async fn readmit(&self) -> Result<(), ConnectError> {
        let Credentials { membership, credential } = self.credentials().clone();
        if expired(credential.identity.peer()).is_none() {
            return Ok(());
        }
        let request = KeyRequest::new().map_err(|error| ConnectError::Certificate(error::chain(&error)))?;
        let Readmitted { chain, roots } = readmit(&membership.remotes, &credential, request.csr()).await?;
        let certified = self.certify(&request, &chain, &roots).await;
        certified.map_err(|error| ConnectError::Certificate(error::chain(&error)))?;
        info!("the node's certificate had expired; it has another, as was approved");
        Ok(())
    }

    /// Makes an identity of the managers' answer to a request; it is on the disk when this returns.
    pub(super) async fn certify(
        &self,
        request: &KeyRequest,
        chain: &str,
        roots: &str,
    ) -> Result<(), KeepError> {
        let credential = Credential { identity: request.identity(chain)?, roots: Roots::from_pem(roots)? };
        credential.check()?;
        let mut membership = self.credentials().membership.clone();
        let own = credential.identity.peer();
        membership.role = own.role;
        if own.node != membership.node_id || own.cluster != membership.cluster_id {
            return Err(KeepError::Other);
        }
        self.keep(Credentials { membership, credential: Arc::new(credential) }).await
    }

    /// Writes the credentials, and only then uses them.
    pub(super) async fn keep(&self, credentials: Credentials) -> Result<(), KeepError> {
        let (store, kept) = (self.store.clone(), credentials.clone());
        match tokio::task::spawn_blocking(move || store.save_credentials(&kept)).await {
            Ok(saved) => saved?,
            // The runtime is shutting down.
            Err(_) => return Ok(()),
        }
        self.shared.set(Some(Arc::clone(&credentials.credential)));
        *self.credentials() = credentials;
        Ok(())
    }

    /// What the node's certificate makes it say.
    pub(super) fn renewals(&mut self) -> Option<AgentMessage> {
        let credential = Arc::clone(&self.credentials().credential);
        let own = credential.identity.peer();
        let table = self.tables.borrow().clone();
        // A manager is one until the others do without it.
        let role = table.and_then(|table| {
            let node = table.nodes.get(&own.node)?;
            Some(if node.manager.is_some() { Role::Manager } else { node.role })
        });
        self.renewal.due(own, role, (SystemTime::now(), Instant::now()))
    }
}
