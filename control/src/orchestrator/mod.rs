//! What should happen next: a pure function from the state and the time to the steps that bring the tasks closer to
//! what is asked for. [`run`] calls it on every change, by way of an [`Orchestrator`], which looks only at what may have changed
//! since it looked last and comes to the same.
//!
//! The steps are taken on a draft as they are found, so that one call places the tasks that it has just made; the
//! same steps, applied to the replicated state, have the same effect.

mod attachment;
mod pass;
mod reap;
mod restart;
pub mod run;
mod schedule;
mod scope;
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
use scope::{Last, Scope};

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
    Orchestrator::default().reconcile(state, now_ns, ids)
}

/// Knows what the last pass looked at, so that the next need not.
#[derive(Debug, Clone, Default)]
pub struct Orchestrator {
    last: Option<Last>,
}

impl Orchestrator {
    /// What [`reconcile`] comes to. `state` is no older than at the last call, and has what became of that call's steps;
    /// otherwise they are to be forgotten first.
    pub fn reconcile(&mut self, state: &State, now_ns: u64, ids: &mut dyn FnMut() -> TaskId) -> Plan {
        let last = self.last.take();
        let scope = last.map_or_else(|| Scope::whole(state), |last| last.scope(state, now_ns));
        let Scope { services, open, mut due_ns } = scope;
        let mut pass = Pass::new(state, now_ns, services, open.clone(), ids);
        service::drop_tasks_of_removed_services(&mut pass);
        attachment::end(&mut pass);
        restart::give_up_on_lost_nodes(&mut pass);
        for id in pass.services.clone() {
            if pass.is_full() {
                break;
            }
            let wake_at_ns = pass.waking(|pass| {
                if let Some(service) = pass.draft.state.services.get(&id).cloned() {
                    service::reconcile(pass, &service);
                    update::reconcile(pass, &id);
                }
            });
            match wake_at_ns {
                Some(at_ns) => drop(due_ns.insert(id, at_ns)),
                None => drop(due_ns.remove(&id)),
            }
        }
        for at_ns in due_ns.values() {
            pass.wake(*at_ns);
        }
        restart::start_held_tasks(&mut pass);
        schedule::allocate(&mut pass);
        schedule::place(&mut pass);
        warm::warm_up(&mut pass);
        reap::reap(&mut pass);
        if !pass.is_full() {
            self.last = Some(Last { state: state.clone(), now_ns, open, due_ns });
        }
        pass.into_plan()
    }

    /// Has the next pass look at everything.
    pub fn forget(&mut self) {
        self.last = None;
    }
}
