//! Tasks are made, placed, reported on and ended.

use std::sync::Arc;

use mesh_api::id::{NodeId, ServiceId, TaskId};
use mesh_api::session;
use mesh_api::table::{PublishMode, TaskState};

use super::{Draft, task_networks};
use crate::model::{Service, State, Task, TaskEndpoint, TaskStatus, TaskTemplate, WARM, labels};

/// Longest message or error kept of a report, bytes.
const TEXT_BYTES_MAX: usize = 512;

/// What a task is made with beside its service.
pub(super) struct Fresh {
    pub(super) id: TaskId,
    pub(super) slot: u64,
    pub(super) node: Option<NodeId>,
    pub(super) desired: TaskState,
    pub(super) start_at_ns: u64,
    pub(super) start_after: Option<TaskId>,
    pub(super) restarts_ns: Vec<u64>,
}

pub(super) fn create(draft: &mut Draft, service: &Service, fresh: Fresh) {
    let Fresh { id, slot, node, desired, start_at_ns, start_after, restarts_ns } = fresh;
    let template = shared_template(draft, service);
    let endpoints = task_networks(&draft.state, &template, &service.spec.endpoint);
    let endpoints =
        endpoints.into_iter().map(|(network, aliases)| TaskEndpoint { network, addr: None, aliases });
    let host = |port: &&crate::model::PortConfig| port.mode == PublishMode::Host;
    let mut task = Task {
        id,
        meta: draft.fresh_meta(),
        service: service.id.clone(),
        service_name: service.spec.name.clone(),
        slot,
        node,
        template,
        spec_version: service.spec_version,
        host_ports: service.endpoint.ports.iter().filter(host).cloned().collect(),
        egress: labels::egress(&service.spec.labels),
        endpoints: endpoints.collect(),
        incarnation: next_incarnation(draft),
        desired,
        status: TaskStatus {
            state: TaskState::New,
            since_ns: draft.at_ns,
            message: "created".to_owned(),
            err: String::new(),
            pid: None,
            exit_code: None,
        },
        running_since_ns: 0,
        warmth: WARM,
        ended_ns: 0,
        start_at_ns,
        start_after,
        restarts_ns,
    };
    find_addresses(draft, &mut task);
    draft.put_task(task);
}

/// All tasks of one specification hold one copy of the template.
fn shared_template(draft: &mut Draft, service: &Service) -> Arc<TaskTemplate> {
    match &draft.template {
        Some((id, version, template)) if *id == service.id && *version == service.spec_version => {
            Arc::clone(template)
        }
        _ => {
            let found = draft
                .state
                .tasks_of_service(&service.id)
                .find(|task| task.spec_version == service.spec_version)
                .map(|task| Arc::clone(&task.template));
            let template = found.unwrap_or_else(|| Arc::new(service.spec.task.clone()));
            draft.template = Some((service.id.clone(), service.spec_version, Arc::clone(&template)));
            template
        }
    }
}

pub(super) fn next_incarnation(draft: &mut Draft) -> u32 {
    let counter = &mut draft.state.counters.incarnation;
    *counter = counter.wrapping_add(1).max(1);
    *counter
}

/// Finds the addresses that a task lacks; with all of them it waits for a node, otherwise it says what it lacks.
fn find_addresses(draft: &mut Draft, task: &mut Task) {
    let mut lacking = None;
    for endpoint in task.endpoints.iter_mut().filter(|endpoint| endpoint.addr.is_none()) {
        endpoint.addr = draft.take_address(&endpoint.network);
        if endpoint.addr.is_none() {
            lacking = Some(endpoint.network.clone());
        }
    }
    match lacking {
        None => {
            task.status.state = TaskState::Pending;
            "pending task scheduling".clone_into(&mut task.status.message);
            task.status.err.clear();
        }
        Some(network) => {
            let name = draft.state.networks.get(&network).map_or("", |network| network.spec.name.as_str());
            task.status.err = format!(
                "network {name} has no free address: each is taken, or was a moment ago and nodes have yet to forget it"
            );
        }
    }
}

/// Tries again for a task without addresses.
pub(super) fn allocate(draft: &mut Draft, id: &TaskId) {
    let Some(task) = draft.state.tasks.get(id).filter(|task| task.status.state == TaskState::New) else {
        return;
    };
    let mut task = Task::clone(task);
    find_addresses(draft, &mut task);
    draft.touch(&mut task.meta);
    draft.put_task(task);
}

pub(super) fn assign(draft: &mut Draft, id: &TaskId, node: &NodeId) {
    let waits = |task: &Arc<Task>| {
        task.status.state == TaskState::Pending
            && task.is_wanted()
            && task.node.as_ref().is_none_or(|preset| preset == node)
    };
    let schedulable = draft.state.nodes.get(node).is_some_and(|node| node.is_schedulable());
    if !schedulable || !draft.state.tasks.get(id).is_some_and(waits) {
        return;
    }
    let since_ns = draft.at_ns;
    draft.change_task(id, |task| {
        task.node = Some(node.clone());
        enter(task, TaskState::Assigned, since_ns, "scheduler assigned task to node");
    });
}

pub(super) fn unplaceable(draft: &mut Draft, id: &TaskId, err: &str) {
    let pending = |task: &Arc<Task>| task.status.state == TaskState::Pending && task.status.err != err;
    if draft.state.tasks.get(id).is_some_and(pending) {
        draft.change_task(id, |task| err.clone_into(&mut task.status.err));
    }
}

fn enter(task: &mut Task, state: TaskState, since_ns: u64, message: &str) {
    task.status.state = state;
    task.status.since_ns = since_ns;
    message.clone_into(&mut task.status.message);
    task.status.err.clear();
}

/// Moves what the managers want of a task forward. A task that no node has seen ends at once.
pub(super) fn set_desired(draft: &mut Draft, id: &TaskId, desired: TaskState) {
    let Some(task) = draft.state.tasks.get(id).filter(|task| task.desired < desired) else { return };
    let known_to_node = task.status.state > TaskState::Assigned
        || (task.status.state == TaskState::Assigned && task.desired == TaskState::Running);
    let (at_ns, ends) = (draft.at_ns, desired > TaskState::Running && !known_to_node);
    draft.change_task(id, |task| {
        task.desired = desired;
        if ends {
            enter(task, TaskState::Shutdown, at_ns, "shutdown before it was started");
            task.ended_ns = at_ns;
        }
    });
}

/// Gives up on knowing how a task ended.
pub(super) fn orphan(draft: &mut Draft, id: &TaskId) {
    if draft.state.tasks.get(id).is_none_or(|task| task.has_ended()) {
        return;
    }
    let at_ns = draft.at_ns;
    draft.change_task(id, |task| {
        enter(task, TaskState::Orphaned, at_ns, "task orphaned: its node is gone");
        task.ended_ns = at_ns;
    });
}

fn has_slow_start(draft: &Draft, service: &ServiceId) -> bool {
    let service = draft.state.services.get(service);
    let options = service.and_then(|service| labels::service(&service.spec.labels).ok());
    options.is_some_and(|options| options.slow_start_ns > 0)
}

/// Moves a task's slow start on.
pub(super) fn warm(draft: &mut Draft, id: &TaskId, warmth: u8) {
    if draft.state.tasks.get(id).is_some_and(|task| task.warmth < warmth && warmth <= WARM) {
        draft.change_task(id, |task| task.warmth = warmth);
    }
}

/// Forgets a task that has ended.
pub(super) fn delete(draft: &mut Draft, id: &TaskId) {
    if draft.state.tasks.get(id).is_some_and(|task| task.has_ended()) {
        draft.remove_task(id);
    }
}

/// A node reports of its tasks.
pub(super) fn report(draft: &mut Draft, node: &NodeId, statuses: &[session::TaskStatus]) {
    for status in statuses {
        report_one(draft, node, status);
    }
}

/// Whether a node's report changes anything.
pub(crate) fn report_changes(state: &State, node: &NodeId, statuses: &[session::TaskStatus]) -> bool {
    let mut draft = Draft::new(state.clone(), state.index + 1, 0);
    report(&mut draft, node, statuses);
    !draft.state.tasks.ptr_eq(&state.tasks)
}

fn report_one(draft: &mut Draft, node: &NodeId, status: &session::TaskStatus) {
    let Some(task) = draft.state.tasks.get(&status.task) else { return };
    let reportable = status.state > TaskState::Assigned
        && !matches!(status.state, TaskState::Remove | TaskState::Orphaned);
    let forward = status.state > task.status.state
        || (status.state == task.status.state && !same_report(&task.status, status));
    if task.node.as_ref() != Some(node) || !reportable || !forward || task.has_ended() {
        return;
    }
    let at_ns = draft.at_ns;
    let starts_slowly = status.state == TaskState::Running && has_slow_start(draft, &task.service);
    draft.change_task(&status.task, |task| {
        task.status = TaskStatus {
            state: status.state,
            since_ns: status.since_ns,
            message: cut(&status.message),
            err: cut(&status.err),
            pid: status.pid,
            exit_code: status.exit_code,
        };
        if status.state == TaskState::Running && task.running_since_ns == 0 {
            task.running_since_ns = at_ns;
            // With the same command, so that no node ever sees it with its full share.
            task.warmth = if starts_slowly { 0 } else { WARM };
        }
        if status.state.is_terminal() {
            task.ended_ns = at_ns;
        }
    });
}

fn same_report(known: &TaskStatus, status: &session::TaskStatus) -> bool {
    known.message == cut(&status.message)
        && known.err == cut(&status.err)
        && known.pid == status.pid
        && known.exit_code == status.exit_code
}

/// Cuts a text at a character's end.
fn cut(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// The service that a task is to be made of, if it is as the orchestrator saw it.
pub(super) fn service_at(draft: &Draft, id: &ServiceId, spec_version: u64) -> Option<Arc<Service>> {
    draft.state.services.get(id).filter(|service| service.spec_version == spec_version).cloned()
}
