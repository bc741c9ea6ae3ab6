//! What the leading manager does beside keeping the state: orchestrate, and serve the agents' sessions.
//!
//! With one manager that is as long as it runs; with several it will follow the leadership.

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::cluster::Cluster;
use crate::orchestrator::run::run;
use crate::session::Server;

/// The leader's duties, under way until [`Leader::stop`] (or until this is dropped).
#[derive(Debug)]
pub struct Leader {
    duties: Vec<JoinHandle<()>>,
}

impl Leader {
    /// Begins: sessions on `listener` (the advertise address, port 2377), and the orchestrator.
    pub fn start(cluster: &Cluster, listener: TcpListener) -> Self {
        let sessions = tokio::spawn(Server::new(cluster.clone()).serve(listener));
        let orchestrator = tokio::spawn(run(cluster.clone()));
        Self { duties: vec![sessions, orchestrator] }
    }

    /// Ends the duties; sessions are cut, and the agents go on with the table that they have.
    pub async fn stop(mut self) {
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
        for duty in &self.duties {
            duty.abort();
        }
    }
}
