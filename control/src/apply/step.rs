//! The orchestrator's steps. Each is taken if its ground still holds, and skipped otherwise: the orchestrator sees the
//! result and thinks again.

use std::sync::Arc;

use mesh_api::table::TaskState;

use super::Draft;
use super::service::{allocate_vips, roll_back_failed};
use super::task::{self, Fresh, service_at};
use crate::command::Step;
use crate::model::{Service, SlotKey, Task, UpdateState, UpdateStatus};

impl Draft {
    /// Takes one step, or skips it.
    pub(crate) fn step(&mut self, step: &Step) {
        match step {
            Step::CreateTask {
                id,
                service,
                spec_version,
                slot,
                node,
                desired,
                start_at_ns,
                start_after,
                restarts_ns,
            } => {
                let node_exists = node.as_ref().is_none_or(|node| self.state.nodes.contains_key(node));
                let startable = matches!(desired, TaskState::Ready | TaskState::Running);
                if self.state.tasks.contains_key(id) || !node_exists || !startable {
                    return;
                }
                let Some(service) = service_at(self, service, *spec_version) else { return };
                // What a former leader made of the state that it saw may come after what the present one made of it.
                let is_there = |task: &Arc<Task>| {
                    task.is_wanted() && !task.has_ended() && task.spec_version == *spec_version
                };
                let place = SlotKey::new(*slot, node.as_ref());
                if self.state.tasks_in_slot(&service.id, &place).any(is_there) {
                    return;
                }
                let fresh = Fresh {
                    id: id.clone(),
                    slot: *slot,
                    node: node.clone(),
                    desired: *desired,
                    start_at_ns: *start_at_ns,
                    start_after: start_after.clone(),
                    restarts_ns: restarts_ns.clone(),
                };
                task::create(self, &service, fresh);
            }
            Step::SetDesired { task, desired } => task::set_desired(self, task, *desired),
            Step::Warm { task, warmth } => task::warm(self, task, *warmth),
            Step::AllocateTask { task } => task::allocate(self, task),
            Step::AllocateService { service } => allocate_vips(self, service),
            Step::Assign { task, node } => task::assign(self, task, node),
            Step::Unplaceable { task, err } => task::unplaceable(self, task, err),
            Step::Orphan { task } => task::orphan(self, task),
            Step::DeleteTask { task } => task::delete(self, task),
            Step::SetUpdateStatus { service, spec_version, status } => {
                if let Some(service) = service_at(self, service, *spec_version) {
                    self.set_update_status(&service, status.clone());
                }
            }
            Step::RollBack { service, spec_version, message } => {
                let Some(service) = service_at(self, service, *spec_version) else { return };
                if let Err(refusal) = roll_back_failed(self, &service.id, message) {
                    // The previous specification has become impossible, say because its port was given away.
                    let status = UpdateStatus {
                        state: UpdateState::Paused,
                        started_ns: service
                            .update_status
                            .as_ref()
                            .map_or(self.at_ns, |status| status.started_ns),
                        completed_ns: None,
                        message: format!("{message}; the rollback is not possible: {refusal}"),
                    };
                    self.set_update_status(&service, status);
                }
            }
        }
    }

    fn set_update_status(&mut self, service: &Service, status: UpdateStatus) {
        let mut service = service.clone();
        service.update_status = Some(status);
        self.touch(&mut service.meta);
        self.put_service(service);
    }
}
