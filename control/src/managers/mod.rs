//! Managers among themselves: what carries raft's questions, and who is one.

pub mod membership;
mod own;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

use std::sync::Arc;

use mesh_api::tls::Shared;
use tokio::net::TcpListener;

pub use wire::Wire;

use crate::cluster::Cluster;
use crate::leader;
use crate::session::{Listener, RaftHandler, Server};

/// Serves whoever comes to a manager's port, and leads while the managers have it so, until it is dropped. Where `credential`
/// has expired, that is replaced for the meantime.
pub async fn serve(cluster: Cluster, credential: Shared, listener: TcpListener) {
    let server = Server::new(cluster.clone());
    let answering = cluster.clone();
    let raft: RaftHandler = Arc::new(move |stream, peer| {
        let cluster = answering.clone();
        Box::pin(async move {
            if let Err(error) = wire::answer(&cluster, &peer, stream).await {
                tracing::debug!(manager = %peer.node, %error, "a manager's stream ended");
            }
        })
    });
    let own = own::keep_valid(cluster.clone(), credential.clone());
    let port = Listener::new(Arc::clone(&server), credential).with_raft(raft);
    tokio::join!(leader::follow(cluster, server), port.serve(listener), own);
}
