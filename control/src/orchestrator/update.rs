//! Rolling updates: slots whose tasks are not as the service is specified are replaced, so many at a time, with a pause
//! after each, stopping or turning back when too many of the new tasks fail.
//!
//! Nothing is remembered between passes beside the service's update status: which slots are under way, and which have
//! failed, shows in their tasks.

use std::sync::Arc;

use mesh_api::id::ServiceId;
use mesh_api::table::TaskState;

use super::pass::{Hold, Pass};
use super::restart::still_running;
use super::slot::{Slot, is_current, slots};
use crate::command::Step;
use crate::model::{
    FailureAction, RestartCondition, Service, SlotKey, Task, UpdateConfig, UpdateOrder, UpdateState,
    UpdateStatus,
};

pub(super) fn reconcile(pass: &mut Pass<'_>, id: &ServiceId) {
    let Some(service) = pass.draft.state.services.get(id).cloned() else { return };
    finish_start_first(pass, &service);
    let all = slots(&pass.draft.state, id);
    let held: Vec<Slot> = all.into_iter().filter(|slot| slot.is_live() || slot.is_spent(&service)).collect();
    let (dirty, done): (Vec<Slot>, Vec<Slot>) =
        held.into_iter().partition(|slot| slot.is_dirty(&pass.draft.state, &service));
    let status = match (&service.update_status, dirty.is_empty()) {
        (Some(status), _) if matches!(status.state, UpdateState::Updating | UpdateState::RollbackStarted) => {
            status.clone()
        }
        (Some(UpdateStatus { state: UpdateState::Paused | UpdateState::RollbackPaused, .. }), _)
        | (_, true) => return,
        (_, false) => {
            let status = UpdateStatus {
                state: UpdateState::Updating,
                started_ns: pass.now_ns,
                completed_ns: None,
                message: "update in progress".to_owned(),
            };
            set_status(pass, &service, status.clone());
            status
        }
    };
    let back = status.state == UpdateState::RollbackStarted;
    let config = if back { service.spec.rollback } else { service.spec.update };
    let total = dirty.len() + done.len();
    if let Some(failed) = too_many_failures(pass, &service, &config, total) {
        return stop(pass, &service, &status, &config, &failed);
    }
    if dirty.is_empty() {
        complete(pass, &service, &status, &config, &done);
    } else {
        replace_next(pass, &service, &config, &dirty, &done);
    }
}

fn set_status(pass: &mut Pass<'_>, service: &Service, status: UpdateStatus) {
    pass.take(Step::SetUpdateStatus {
        service: service.id.clone(),
        spec_version: service.spec_version,
        status,
    });
}

/// Where the other task runs, the old ones go.
fn finish_start_first(pass: &mut Pass<'_>, service: &Service) {
    for slot in slots(&pass.draft.state, &service.id) {
        let current = |task: &&Arc<Task>| is_current(&pass.draft.state, service, task);
        let running = slot.wanted().filter(current).any(|task| task.status.state == TaskState::Running);
        if running && slot.wanted().count() > 1 {
            let old: Vec<Arc<Task>> =
                slot.wanted().filter(|task| !is_current(&pass.draft.state, service, task)).cloned().collect();
            for task in old {
                pass.set_desired(&task, TaskState::Shutdown);
            }
        }
    }
}

/// Tasks of this specification that ended by themselves too early.
fn failures(pass: &Pass<'_>, service: &Service, config: &UpdateConfig) -> Vec<Arc<Task>> {
    let completes = service.spec.task.restart.condition != RestartCondition::Any;
    let failed = |task: &&Arc<Task>| {
        let ended = match task.status.state {
            TaskState::Failed | TaskState::Rejected => true,
            TaskState::Complete => !completes,
            _ => false,
        };
        // By one manager's clock: where another saw the end of it, too early, that says nothing.
        let ran_ns = task.ended_ns.checked_sub(task.running_since_ns);
        let early = task.running_since_ns == 0 || ran_ns.is_some_and(|ran_ns| ran_ns <= config.monitor_ns);
        task.spec_version == service.spec_version && ended && early
    };
    pass.draft.state.tasks_of_service(&service.id).filter(failed).cloned().collect()
}

fn too_many_failures(
    pass: &Pass<'_>,
    service: &Service,
    config: &UpdateConfig,
    total: usize,
) -> Option<Arc<Task>> {
    let failed = failures(pass, service, config);
    let too_many = failed.len() as u64 * 1_000_000 > u64::from(config.max_failure_ppm) * total as u64;
    let last = failed.into_iter().max_by_key(|task| task.ended_ns)?;
    (too_many && config.failure_action != FailureAction::Continue).then_some(last)
}

fn stop(pass: &mut Pass<'_>, service: &Service, status: &UpdateStatus, config: &UpdateConfig, failed: &Task) {
    let because = format!("due to failure or early termination of task {}", failed.id);
    let back = status.state == UpdateState::RollbackStarted;
    if !back && config.failure_action == FailureAction::Rollback && service.previous_spec.is_some() {
        return pass.take(Step::RollBack {
            service: service.id.clone(),
            spec_version: service.spec_version,
            message: format!("update rolled back {because}"),
        });
    }
    let (state, what) =
        if back { (UpdateState::RollbackPaused, "rollback") } else { (UpdateState::Paused, "update") };
    set_status(
        pass,
        service,
        UpdateStatus { state, message: format!("{what} paused {because}"), ..status.clone() },
    );
}

/// An update is complete once the last of its tasks has been watched long enough.
fn complete(
    pass: &mut Pass<'_>,
    service: &Service,
    status: &UpdateStatus,
    config: &UpdateConfig,
    slots: &[Slot],
) {
    if slots.iter().any(|slot| slot.is_live() && !slot.is_running()) {
        return;
    }
    let watched = slots.iter().flat_map(Slot::wanted);
    let last_ns = watched
        .filter(|task| task.spec_version == service.spec_version && task.has_begun(pass.now_ns))
        .map(|task| task.running_since_ns.saturating_add(config.monitor_ns))
        .max()
        .unwrap_or_default();
    if last_ns > pass.now_ns {
        return pass.wake(last_ns);
    }
    let (state, message) = if status.state == UpdateState::RollbackStarted {
        (UpdateState::RollbackCompleted, "rollback completed")
    } else {
        (UpdateState::Completed, "update completed")
    };
    let completed_ns = Some(pass.now_ns);
    set_status(pass, service, UpdateStatus { state, completed_ns, message: message.to_owned(), ..*status });
}

/// Whether a replaced slot still takes a place in the update's parallelism.
#[derive(Debug, Clone, Copy)]
enum Place {
    Free,
    /// Until its task runs or fails.
    Taken,
    /// Until then: the pause after a slot.
    TakenUntil(u64),
}

fn place(slot: &Slot, service: &Service, config: &UpdateConfig, now_ns: u64) -> Place {
    let Some(task) = slot.wanted().filter(|task| task.spec_version == service.spec_version).last() else {
        return Place::Free;
    };
    let given_up = |task: &Arc<Task>| {
        task.spec_version == service.spec_version
            && matches!(task.status.state, TaskState::Failed | TaskState::Rejected | TaskState::Complete)
    };
    if slot.tasks.iter().any(given_up) {
        return Place::Free;
    }
    if task.status.state != TaskState::Running {
        return Place::Taken;
    }
    let until_ns = task.running_since_ns.saturating_add(config.delay_ns);
    if until_ns > now_ns && task.has_begun(now_ns) { Place::TakenUntil(until_ns) } else { Place::Free }
}

fn replace_next(
    pass: &mut Pass<'_>,
    service: &Service,
    config: &UpdateConfig,
    dirty: &[Slot],
    done: &[Slot],
) {
    let mut taken = 0;
    for slot in done {
        match place(slot, service, config, pass.now_ns) {
            Place::Free => {}
            Place::Taken => taken += 1,
            Place::TakenUntil(until_ns) => {
                taken += 1;
                pass.wake(until_ns);
            }
        }
    }
    let free = match config.parallelism {
        0 => usize::MAX,
        parallelism => usize::try_from(parallelism).unwrap_or(usize::MAX).saturating_sub(taken),
    };
    // Slots that don't run have nothing to lose.
    let (down, up): (Vec<&Slot>, Vec<&Slot>) = dirty.iter().partition(|slot| !slot.is_running());
    for slot in down.into_iter().chain(up).filter(|slot| has_place(pass, slot)).take(free).collect::<Vec<_>>()
    {
        if pass.is_full() {
            return;
        }
        replace(pass, service, config, slot);
    }
}

/// A global service's task can only be replaced on a node that takes tasks.
fn has_place(pass: &Pass<'_>, slot: &Slot) -> bool {
    match &slot.key {
        SlotKey::Replica(_) => true,
        SlotKey::Node(node) => pass.draft.state.nodes.get(node).is_some_and(|node| node.is_schedulable()),
    }
}

fn replace(pass: &mut Pass<'_>, service: &Service, config: &UpdateConfig, slot: &Slot) {
    let after = match config.order {
        UpdateOrder::StartFirst if slot.is_running() => None,
        UpdateOrder::StartFirst | UpdateOrder::StopFirst => {
            for task in slot.wanted() {
                pass.set_desired(task, TaskState::Shutdown);
            }
            slot.tasks.iter().rev().find_map(|task| still_running(pass, task))
        }
    };
    pass.create_task(service, &slot.key, Hold { until_ns: 0, after }, Vec::new());
}
