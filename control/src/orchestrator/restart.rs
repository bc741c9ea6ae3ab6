//! Tasks that ended, or whose node can't keep them, are replaced as the service's restart policy says.

use std::sync::Arc;

use mesh_api::id::TaskId;
use mesh_api::table::TaskState;

use super::pass::{Hold, Pass};
use super::slot::is_placed_well;
use crate::command::Step;
use crate::model::{Availability, RestartCondition, RestartPolicy, Service, State, Task};

/// How long a node may be down before its tasks count as ended, ns: SwarmKit's 24 hours.
const ORPHAN_AFTER_NS: u64 = 24 * 3600 * 1_000_000_000;

/// Whether the policy lets a task be replaced that has ended, or whose node can't keep it.
///
/// Attempts count against the moment at which the task ended, so that the answer stays the same as time passes.
pub(super) fn policy_replaces(policy: &RestartPolicy, task: &Task) -> bool {
    let condition = match policy.condition {
        RestartCondition::Any => true,
        RestartCondition::OnFailure => task.status.state != TaskState::Complete,
        RestartCondition::None => false,
    };
    let ended_by_itself =
        matches!(task.status.state, TaskState::Complete | TaskState::Failed | TaskState::Rejected);
    condition
        && (!ended_by_itself || policy.max_attempts == 0 || attempts(policy, task) < policy.max_attempts)
}

/// Restarts that count when a task has ended.
fn attempts(policy: &RestartPolicy, task: &Task) -> u64 {
    // One after the task's end was noted by a clock that was ahead, say another manager's: of it nothing is known.
    let counts = |at_ns: &&u64| {
        policy.window_ns == 0
            || (**at_ns <= task.ended_ns && at_ns.saturating_add(policy.window_ns) > task.ended_ns)
    };
    task.restarts_ns.iter().filter(counts).count() as u64
}

/// Whether a task's node can keep it.
///
/// A replica that fits the constraints it was made with, but not today's, is left to the update, which moves the
/// service's tasks a few at a time.
pub(super) fn node_keeps(state: &State, service: &Service, task: &Task) -> bool {
    let Some(node) = &task.node else { return true };
    let fits =
        |node: &Arc<crate::model::Node>| !node.is_down() && node.spec.availability != Availability::Drain;
    let is_left_to_update = task.slot > 0
        && task.spec_version != service.spec_version
        && is_placed_well(state, &task.template.placement, task);
    state.nodes.get(node).is_some_and(fits)
        && (is_left_to_update || is_placed_well(state, &service.spec.task.placement, task))
}

/// Ends a wanted task that has ended or whose node can't keep it, and makes its replacement if the policy has one.
pub(super) fn restart(pass: &mut Pass<'_>, service: &Service, task: &Task) {
    pass.set_desired(task, TaskState::Shutdown);
    let policy = service.spec.task.restart;
    if !policy_replaces(&policy, task) {
        return;
    }
    if task.has_ended() {
        let hold = Hold { until_ns: pass.now_ns.saturating_add(policy.delay_ns), after: None };
        let restarts_ns = counted_restarts(&policy, task, service, pass.now_ns);
        pass.create_task(service, &task.slot_key(), hold, restarts_ns);
    } else {
        // It moves: at once from a node that is lost, otherwise when it has stopped there. What was held back already
        // waits for what it waited for.
        let hold = if task.desired == TaskState::Ready {
            Hold { until_ns: task.start_at_ns, after: task.start_after.clone() }
        } else {
            Hold { until_ns: 0, after: still_running(pass, task) }
        };
        let restarts_ns =
            if task.spec_version == service.spec_version { task.restarts_ns.clone() } else { Vec::new() };
        pass.create_task(service, &task.slot_key(), hold, restarts_ns);
    }
}

fn counted_restarts(policy: &RestartPolicy, task: &Task, service: &Service, now_ns: u64) -> Vec<u64> {
    if policy.max_attempts == 0 {
        return Vec::new();
    }
    let mut restarts_ns =
        if task.spec_version == service.spec_version { task.restarts_ns.clone() } else { Vec::new() };
    // Those that have left the window never count again.
    restarts_ns.retain(|at_ns| policy.window_ns == 0 || at_ns.saturating_add(policy.window_ns) > now_ns);
    restarts_ns.push(now_ns);
    let superfluous =
        restarts_ns.len().saturating_sub(usize::try_from(policy.max_attempts).unwrap_or(usize::MAX));
    restarts_ns.drain(..superfluous);
    restarts_ns
}

/// The task's id, if a successor has to wait for its end.
pub(super) fn still_running(pass: &Pass<'_>, task: &Task) -> Option<TaskId> {
    let task = pass.draft.state.tasks.get(&task.id)?;
    let reachable = task.node.as_ref().is_some_and(|node| pass.is_node_up(node));
    (reachable && !task.has_ended()).then(|| task.id.clone())
}

/// Starts tasks that are held back, once what they wait for has come.
pub(super) fn start_held_tasks(pass: &mut Pass<'_>) {
    let is_held = |task: &Arc<Task>| task.desired == TaskState::Ready && !task.has_ended();
    for task in pass.open_tasks().into_iter().filter(is_held) {
        let wait_ns = task.start_at_ns.saturating_sub(pass.now_ns);
        // What is further away than the whole delay was noted by a clock that was ahead, say another manager's.
        if (1..=task.template.restart.delay_ns).contains(&wait_ns) {
            pass.wake(task.start_at_ns);
            continue;
        }
        let before = task.start_after.as_ref().and_then(|id| pass.draft.state.tasks.get(id)).cloned();
        if before.is_none_or(|before| still_running(pass, &before).is_none()) {
            pass.set_desired(&task, TaskState::Running);
        }
    }
}

/// Tasks on nodes that are gone, or have been down for long, count as ended.
pub(super) fn give_up_on_lost_nodes(pass: &mut Pass<'_>) {
    let state = pass.draft.state.clone();
    for (node, ids) in &state.lookup.tasks_by_node {
        let orphan_at_ns = match state.nodes.get(node) {
            None => 0,
            Some(node) if node.is_down() => node.status.since_ns.saturating_add(ORPHAN_AFTER_NS),
            Some(_) => continue,
        };
        let mut tasks =
            ids.iter().filter_map(|id| state.tasks.get(id)).filter(|task| !task.has_ended()).peekable();
        if orphan_at_ns > pass.now_ns {
            if tasks.peek().is_some() {
                pass.wake(orphan_at_ns);
            }
            continue;
        }
        for task in tasks {
            pass.take(Step::Orphan { task: task.id.clone() });
        }
    }
}
