//! Has a manager's files sealed as the state that it applies says: it alone knows when it can be read without the unlock key,
//! and every manager does so by itself.

use std::sync::{Arc, Weak};

use openraft::{ErrorSubject, ErrorVerb};
use tokio::sync::watch;

use super::log::Log;
use crate::model::State;
use crate::store::keys::Keys;
use crate::store::snapshot::Snapshots;

/// Follows the cluster's lock until the member stops.
pub(super) async fn follow(
    log: Weak<Log>,
    snapshots: Arc<dyn Snapshots>,
    keys: Arc<Keys>,
    mut state: watch::Receiver<State>,
) {
    let mut done = None;
    loop {
        let lock = state.borrow_and_update().cluster.as_ref().map(|cluster| cluster.lock.clone());
        if let Some(lock) = lock.filter(|lock| done != Some(lock.epoch)) {
            let Some(log) = log.upgrade() else { return };
            let (epoch, keys, snapshots) = (lock.epoch, Arc::clone(&keys), Arc::clone(&snapshots));
            let seal = move |log: &Log| {
                if keys.follow(&lock)? {
                    log.seal_anew()?;
                    snapshots.seal_anew()?;
                }
                Ok(())
            };
            // A failure is remembered, and the member takes part no more.
            if log.with(ErrorSubject::Store, ErrorVerb::Write, seal).await.is_err() {
                return;
            }
            done = Some(epoch);
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}
