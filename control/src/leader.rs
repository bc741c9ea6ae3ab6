//! What the leading manager does beside keeping the state: serve the nodes' sessions and watch over their lives,
//! orchestrate, and keep the managers those that the nodes' roles say.

use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::cluster::Cluster;
use crate::managers::membership;
use crate::orchestrator::run::run;
use crate::session::Server;

/// The leader's duties, under way until [`Leader::stop`] (or until this is dropped).
#[derive(Debug)]
pub struct Leader {
    server: Arc<Server>,
    duties: Vec<JoinHandle<()>>,
}

impl Leader {
    /// Begins.
    pub fn start(cluster: &Cluster, server: &Arc<Server>) -> Self {
        server.lead();
        let liveness = tokio::spawn(Arc::clone(server).watch_liveness());
        let orchestrator = tokio::spawn(run(cluster.clone()));
        let membership = tokio::spawn(membership::keep(cluster.clone()));
        Self { server: Arc::clone(server), duties: vec![liveness, orchestrator, membership] }
    }

    /// Ends the duties; the agents go on with the table that they have, until they find another leader.
    pub async fn stop(mut self) {
        self.server.resign();
        for duty in &self.duties {
            duty.abort();
        }
        for duty in self.duties.drain(..) {
            let _ = duty.await;
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.server.resign();
        for duty in &self.duties {
            duty.abort();
        }
    }
}

/// Has this manager lead whenever it is the leader, until the cluster is shut down.
pub async fn follow(cluster: Cluster, server: Arc<Server>) {
    let mut leadership = cluster.leadership();
    while leadership.wait_for(|it| it.is_leader).await.is_ok() {
        let leader = Leader::start(&cluster, &server);
        let ended = leadership.wait_for(|it| !it.is_leader).await.map(drop);
        leader.stop().await;
        if ended.is_err() {
            return;
        }
    }
}
