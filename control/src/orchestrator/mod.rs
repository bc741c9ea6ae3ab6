//! What should happen next: a pure function from the state and the time to the steps that bring the tasks closer to
//! what is asked for. [`run`] calls it on every change.
//!
//! The steps are taken on a draft as they are found, so that one call places the tasks that it has just made; the
//! same steps, applied to the replicated state, have the same effect.

mod attachment;
mod pass;
mod reap;
mod restart;
pub mod run;
mod schedule;
mod service;
mod slot;
mod update;
mod warm;

#[cfg(test)]
mod chaos;
#[cfg(test)]
mod tests;

use mesh_api::id::TaskId;

use crate::command::Step;
use crate::model::State;
use pass::Pass;

/// What to do, and when to look again if nothing else happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// When something falls due (a restart, an update's next slot), ns since the epoch.
    pub wake_at_ns: Option<u64>,
}

/// What should happen next. `ids` gives ids to new tasks.
pub fn reconcile(state: &State, now_ns: u64, ids: &mut dyn FnMut() -> TaskId) -> Plan {
    let mut pass = Pass::new(state, now_ns, ids);
    service::drop_tasks_of_removed_services(&mut pass);
    attachment::end(&mut pass);
    restart::give_up_on_lost_nodes(&mut pass);
    let services: Vec<_> = pass.draft.state.services.values().cloned().collect();
    for service in &services {
        if pass.is_full() {
            break;
        }
        service::reconcile(&mut pass, service);
        update::reconcile(&mut pass, &service.id);
    }
    restart::start_held_tasks(&mut pass);
    schedule::allocate(&mut pass);
    schedule::place(&mut pass);
    warm::warm_up(&mut pass);
    reap::reap(&mut pass);
    pass.into_plan()
}
