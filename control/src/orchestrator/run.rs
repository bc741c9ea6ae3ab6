//! The orchestrator's loop: a pass on every change of the state, and when something falls due.

use std::time::Duration;

use mesh_api::id::TaskId;

use super::Orchestrator;
use crate::clock::now_ns;
use crate::cluster::{Cluster, ProposeError};
use crate::command::{Action, Command};

/// How long to wait after a refusal, which only a defect of ours can cause.
const PAUSE_AFTER_REFUSAL: Duration = Duration::from_secs(1);

/// Runs until the cluster shuts down or its store fails.
pub async fn run(cluster: Cluster) {
    let mut states = cluster.watch();
    let mut orchestrator = Orchestrator::default();
    loop {
        let state = states.borrow_and_update().clone();
        let now = now_ns();
        let plan = orchestrator.reconcile(&state, now, &mut || TaskId::random(&mut rand::rng()));
        if !plan.steps.is_empty() {
            let command = Command { at_ns: now, action: Action::Orchestrate { steps: plan.steps } };
            match cluster.propose(command).await {
                Ok(_) => {}
                // What was proposed may have been decided on or not: the next pass may find any state.
                Err(ProposeError::NoLeader) => orchestrator.forget(),
                Err(ProposeError::Refused(refusal)) => {
                    orchestrator.forget();
                    tracing::error!(%refusal, "the orchestrator's steps were refused");
                    tokio::time::sleep(PAUSE_AFTER_REFUSAL).await;
                }
                Err(ProposeError::Storage(_) | ProposeError::Stopped) => return,
            }
            continue;
        }
        let due = async {
            match plan.wake_at_ns {
                Some(at_ns) => tokio::time::sleep(Duration::from_nanos(at_ns.saturating_sub(now_ns()))).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            () = due => {}
        }
    }
}
