//! The tasks of a service, by place: a replica's number, or a node.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::id::ServiceId;
use mesh_api::table::TaskState;

use super::restart::policy_replaces;
use crate::apply::task_networks;
use crate::model::constraint::parse_all;
use crate::model::{Placement, Service, SlotKey, State, Task, TaskTemplate, labels};

/// The tasks in one place, without those to be removed.
#[derive(Debug)]
pub(super) struct Slot {
    /// Which place.
    pub(super) key: SlotKey,
    /// Oldest first; never empty.
    pub(super) tasks: Vec<Arc<Task>>,
}

/// A service's slots in order.
pub(super) fn slots(state: &State, service: &ServiceId) -> Vec<Slot> {
    let mut by_key: BTreeMap<SlotKey, Vec<Arc<Task>>> = BTreeMap::new();
    for task in state.tasks_of_service(service) {
        if task.desired < TaskState::Remove {
            by_key.entry(task.slot_key()).or_default().push(Arc::clone(task));
        }
    }
    let sorted = |(key, mut tasks): (SlotKey, Vec<Arc<Task>>)| {
        tasks.sort_by_key(|task| task.incarnation);
        Slot { key, tasks }
    };
    by_key.into_iter().map(sorted).collect()
}

impl Slot {
    pub(super) fn wanted(&self) -> impl Iterator<Item = &Arc<Task>> {
        self.tasks.iter().filter(|task| task.is_wanted())
    }

    pub(super) fn newest(&self) -> Option<&Arc<Task>> {
        self.tasks.last()
    }

    /// Some task is wanted.
    pub(super) fn is_live(&self) -> bool {
        self.wanted().next().is_some()
    }

    /// Its last task has ended, and the restart policy says that this is it.
    pub(super) fn is_spent(&self, service: &Service) -> bool {
        let is_last = |task: &Arc<Task>| !policy_replaces(&service.spec.task.restart, task);
        !self.is_live() && self.newest().is_some_and(is_last)
    }

    /// A wanted task runs.
    pub(super) fn is_running(&self) -> bool {
        self.wanted().any(|task| task.status.state == TaskState::Running)
    }

    /// Its last task was as the service is specified, failed, and is not replaced: where updates start the other task
    /// first, the old one then goes on.
    fn was_tried_in_vain(&self, service: &Service) -> bool {
        self.newest().is_some_and(|task| {
            task.spec_version == service.spec_version
                && !task.is_wanted()
                && task.has_ended()
                && !policy_replaces(&service.spec.task.restart, task)
        })
    }

    /// No task in it is as the service is specified.
    pub(super) fn is_dirty(&self, state: &State, service: &Service) -> bool {
        if self.is_live() {
            !self.was_tried_in_vain(service) && self.wanted().all(|task| !is_current(state, service, task))
        } else {
            self.newest().is_some_and(|task| !is_current(state, service, task))
        }
    }
}

/// Whether a task is as its service is specified. One that merely was placed under other constraints is, as long as
/// its node satisfies those of today.
pub(super) fn is_current(state: &State, service: &Service, task: &Task) -> bool {
    if task.spec_version == service.spec_version {
        return true;
    }
    let TaskTemplate { container, resources, restart: _, placement, networks, force_update, other } =
        &*task.template;
    let spec = &service.spec.task;
    let same = task.egress == labels::egress(&service.spec.labels)
        && *container == spec.container
        && *resources == spec.resources
        && *networks == spec.networks
        && *force_update == spec.force_update
        && *other == spec.other;
    if !same || !(*placement == spec.placement || is_placed_well(state, &spec.placement, task)) {
        return false;
    }
    let host_ports =
        service.endpoint.ports.iter().filter(|port| port.mode == mesh_api::table::PublishMode::Host);
    let wanted_networks = task_networks(state, spec, &service.spec.endpoint);
    task.host_ports.iter().eq(host_ports)
        && task
            .endpoints
            .iter()
            .map(|endpoint| &endpoint.network)
            .eq(wanted_networks.iter().map(|(id, _)| id))
}

/// Whether a task's node satisfies a placement's constraints. A task without a node does.
pub(super) fn is_placed_well(state: &State, placement: &Placement, task: &Task) -> bool {
    let Some(node) = task.node.as_ref().and_then(|node| state.nodes.get(node)) else { return true };
    // Constraints are checked when a service comes in; one that does not parse holds nowhere.
    parse_all(&placement.constraints).is_ok_and(|all| all.iter().all(|constraint| constraint.holds(node)))
}
