//! Tasks: list and inspect.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use mesh_api::id::{NodeId, ServiceId};
use mesh_api::table::{PublishMode, TaskState};

use super::error::{ApiError, ApiResult};
use super::filters::Filters;
use super::local::Membership;
use super::request::Params;
use super::time::rfc3339;
use super::wire::answer as wire;
use super::{Api, names, networks, spec};
use crate::model::{self, Task};

/// `GET /tasks`.
pub(super) async fn list(State(api): State<Api>, params: Params) -> ApiResult<Json<Vec<wire::Task>>> {
    let state = api.state().await?;
    let accepted = ["_up-to-date", "desired-state", "id", "label", "name", "node", "runtime", "service"];
    let filters = Filters::parse(params.get("filters"), &accepted)?;
    // Services and nodes may be named; one that does not exist is an error, as in Docker.
    let mut services: BTreeSet<ServiceId> = BTreeSet::new();
    for input in filters.values("service") {
        services.insert(match names::service(&state, input) {
            Ok(service) => service.id.clone(),
            // The tasks of a removed service are there for a while.
            Err(_) if state.tasks_of_service(&ServiceId::from(input)).next().is_some() => {
                ServiceId::from(input)
            }
            Err(error) => return Err(error),
        });
    }
    let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
    for input in filters.values("node") {
        nodes.insert(match (input, api.host.membership()) {
            ("self", Membership::Active { node, .. }) => node,
            _ => names::node(&state, input)?.id.clone(),
        });
    }
    let mut desired: BTreeSet<&'static str> = BTreeSet::new();
    for input in filters.values("desired-state") {
        let known = STATES.iter().find(|name| name.eq_ignore_ascii_case(input)).ok_or_else(|| {
            ApiError::invalid(format!(
                "Invalid desired-state filter: '{input}': expected one of {}",
                STATES.join(", ")
            ))
        })?;
        desired.insert(known);
    }
    let up_to_date = filters.boolean("_up-to-date")?.unwrap_or(false);
    let matching = |task: &&Arc<Task>| {
        (services.is_empty() || services.contains(&task.service))
            && (nodes.is_empty() || task.node.as_ref().is_some_and(|node| nodes.contains(node)))
            && (desired.is_empty() || desired.contains(name(task.desired)))
            && filters.prefix("id", task.id.as_str())
            && filters.any("name", |wanted| task.name().starts_with(wanted))
            && filters.labels("label", &task.template.container.labels)
            && filters.any("runtime", |runtime| runtime == "container")
            && (!up_to_date || is_up_to_date(&state, task))
    };
    Ok(Json(state.tasks.values().filter(matching).map(|task| show(&state, task)).collect()))
}

/// `GET /tasks/{id}`.
pub(super) async fn inspect(State(api): State<Api>, Path(id): Path<String>) -> ApiResult<Json<wire::Task>> {
    let state = api.state().await?;
    Ok(Json(show(&state, names::task(&state, &id)?)))
}

/// `GET /services/{id}/logs`, `GET /tasks/{id}/logs`.
pub(super) async fn logs() -> ApiError {
    ApiError::unsupported(
        "Shoal does not collect the logs of tasks: `docker service ps --no-trunc` shows why a task failed, and its output is \
         in the agent's state directory on its node",
    )
}

/// Whether a task runs what its service asks for.
fn is_up_to_date(state: &model::State, task: &Task) -> bool {
    state.services.get(&task.service).is_some_and(|service| {
        let host_ports = || service.spec.endpoint.ports.iter().filter(|port| port.mode == PublishMode::Host);
        task.spec_version == service.spec_version
            || (*task.template == service.spec.task && host_ports().eq(task.host_ports.iter()))
    })
}

/// The words for task states.
const STATES: [&str; 14] = [
    "new",
    "pending",
    "assigned",
    "accepted",
    "preparing",
    "ready",
    "starting",
    "running",
    "complete",
    "shutdown",
    "failed",
    "rejected",
    "remove",
    "orphaned",
];

/// The word for a task state.
fn name(state: TaskState) -> &'static str {
    match state {
        TaskState::New => "new",
        TaskState::Pending => "pending",
        TaskState::Assigned => "assigned",
        TaskState::Accepted => "accepted",
        TaskState::Preparing => "preparing",
        TaskState::Ready => "ready",
        TaskState::Starting => "starting",
        TaskState::Running => "running",
        TaskState::Complete => "complete",
        TaskState::Shutdown => "shutdown",
        TaskState::Failed => "failed",
        TaskState::Rejected => "rejected",
        TaskState::Remove => "remove",
        TaskState::Orphaned => "orphaned",
    }
}

pub(super) fn show(state: &model::State, task: &Task) -> wire::Task {
    let attachments = task.endpoints.iter().filter_map(|endpoint| {
        let network = state.networks.get(&endpoint.network)?;
        let subnet_of = |addr| network.subnets.iter().find(|subnet| subnet.cidr.contains(&addr));
        let address =
            endpoint.addr.and_then(|addr| Some(format!("{addr}/{}", subnet_of(addr)?.cidr.prefix_len())));
        let address6 = endpoint
            .addr
            .zip(network.subnet6)
            .map(|(addr, subnet)| format!("{}/{}", subnet.addr_of(addr), subnet.cidr.prefix_len()));
        Some(wire::NetworkAttachment {
            network: networks::show_in_task(network),
            addresses: address.into_iter().chain(address6).collect(),
        })
    });
    let model::TaskStatus { state: observed, since_ns, message, err, pid, exit_code } = &task.status;
    // A task that never got as far as a process has no container to show.
    let container = (pid.is_some() || exit_code.is_some() || *observed == TaskState::Running).then(|| {
        wire::ContainerStatus {
            container_id: task.id.to_string(),
            pid: pid.unwrap_or_default(),
            exit_code: exit_code.unwrap_or_default(),
        }
    });
    let running = *observed == TaskState::Running;
    wire::Task {
        id: task.id.to_string(),
        version: wire::Version { index: task.meta.version },
        created_at: rfc3339(task.meta.created_ns),
        updated_at: rfc3339(task.meta.updated_ns),
        labels: task.template.container.labels.clone(),
        spec: spec::task_template(&task.template),
        service_id: task.service.to_string(),
        slot: task.slot,
        node_id: task.node.as_ref().map(NodeId::to_string).unwrap_or_default(),
        status: wire::TaskStatus {
            timestamp: rfc3339(*since_ns),
            state: name(*observed),
            message: message.clone(),
            err: err.clone(),
            container_status: container,
            port_status: wire::PortStatus {
                ports: if running { task.host_ports.iter().map(spec::port).collect() } else { Vec::new() },
            },
        },
        desired_state: name(task.desired),
        networks_attachments: attachments.collect(),
        volumes: (),
    }
}
