//! Services: create, list, inspect, update, remove.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mesh_api::id::ServiceId;
use mesh_api::table::TaskState;
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::filters::Filters;
use super::request::{Body, Params};
use super::time::rfc3339;
use super::wire::answer as wire;
use super::wire::spec::ServiceSpec;
use super::{Api, names, spec};
use crate::command::{Action, Command};
use crate::model::{self, Mode, Service, UpdateState};

/// `GET /services`.
pub(super) async fn list(State(api): State<Api>, params: Params) -> ApiResult<Json<Vec<wire::Service>>> {
    let state = api.state().await?;
    let filters = Filters::parse(params.get("filters"), &["id", "label", "mode", "name", "runtime"])?;
    let with_status = params.boolean("status")?;
    let matching = |service: &&Arc<Service>| {
        filters.prefix("id", service.id.as_str())
            && filters.prefix("name", &service.spec.name)
            && filters.labels("label", &service.spec.labels)
            && filters.any("mode", |mode| mode == mode_name(service.spec.mode))
            && filters.any("runtime", |runtime| runtime == "container")
    };
    let show_one = |service: &Arc<Service>| {
        let mut answer = show(&state, service);
        answer.service_status = with_status.then(|| status(&state, service));
        answer
    };
    Ok(Json(state.services.values().filter(matching).map(show_one).collect()))
}

/// `GET /services/{id}`.
pub(super) async fn inspect(
    State(api): State<Api>,
    Path(id): Path<String>,
    params: Params,
) -> ApiResult<Json<wire::Service>> {
    let state = api.state().await?;
    // The model holds every default, so that there is nothing left to insert.
    params.boolean("insertDefaults")?;
    Ok(Json(show(&state, names::service(&state, &id)?)))
}

/// `POST /services/create`.
pub(super) async fn create(
    State(api): State<Api>,
    Body(request): Body<ServiceSpec>,
) -> ApiResult<(StatusCode, Json<Value>)> {
    let cluster = api.manager()?;
    let spec = Box::new(spec::service_spec(request, &cluster.linearizable().await?)?);
    let id = ServiceId::random(&mut rand::rng());
    let reply = cluster.propose(Command::now(Action::CreateService { id: id.clone(), spec })).await?;
    Ok((StatusCode::CREATED, Json(json!({ "ID": id, "Warnings": reply.warnings }))))
}

/// `POST /services/{id}/update`; with `rollback=previous` the body is not looked at.
pub(super) async fn update(
    State(api): State<Api>,
    Path(id): Path<String>,
    params: Params,
    Body(request): Body<ServiceSpec>,
) -> ApiResult<Json<Value>> {
    let cluster = api.manager()?;
    let version = params.version("service")?;
    let state = cluster.linearizable().await?;
    let service = names::service(&state, &id)?;
    let action = match params.get("rollback").unwrap_or_default() {
        "previous" => Action::RollbackService { id: service.id.clone(), version },
        "" | "none" => {
            // A spec without a name keeps it, rather than getting an invented one.
            let name = request.name.clone().filter(|name| !name.is_empty());
            let request = ServiceSpec { name: name.or_else(|| Some(service.spec.name.clone())), ..request };
            let spec = Box::new(spec::service_spec(request, &state)?);
            Action::UpdateService { id: service.id.clone(), version, spec }
        }
        other => {
            return Err(ApiError::invalid(format!(
                "rollback: unrecognized rollback option {other}: expected previous or none"
            )));
        }
    };
    let reply = cluster.propose(Command::now(action)).await?;
    Ok(Json(json!({ "Warnings": reply.warnings })))
}

/// `DELETE /services/{id}`.
pub(super) async fn remove(State(api): State<Api>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let cluster = api.manager()?;
    let id = names::service(&cluster.linearizable().await?, &id)?.id.clone();
    cluster.propose(Command::now(Action::RemoveService { id })).await?;
    Ok(StatusCode::OK)
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Replicated { .. } => "replicated",
        Mode::Global => "global",
    }
}

/// How many tasks run, and how many should.
fn status(state: &model::State, service: &Service) -> wire::ServiceStatus {
    let mut running_tasks = 0;
    let mut wanted = 0;
    for task in state.tasks_of_service(&service.id).filter(|task| task.desired <= TaskState::Running) {
        wanted += 1;
        running_tasks += u64::from(task.status.state == TaskState::Running);
    }
    let desired_tasks = service.replicas().unwrap_or(wanted);
    wire::ServiceStatus { running_tasks, desired_tasks, completed_tasks: 0 }
}

pub(super) fn show(state: &model::State, service: &Service) -> wire::Service {
    let vips = service.endpoint.vips.iter().filter_map(|vip| {
        let network = state.networks.get(&vip.network)?;
        let addr = vip.addr?;
        let subnet = network.subnets.iter().find(|subnet| subnet.cidr.contains(&addr))?;
        Some(wire::VirtualIp {
            network_id: vip.network.to_string(),
            addr: format!("{addr}/{}", subnet.cidr.prefix_len()),
        })
    });
    wire::Service {
        id: service.id.to_string(),
        version: wire::Version { index: service.meta.version },
        created_at: rfc3339(service.meta.created_ns),
        updated_at: rfc3339(service.meta.updated_ns),
        spec: spec::show_service_spec(&service.spec),
        previous_spec: service.previous_spec.as_deref().map(spec::show_service_spec),
        endpoint: wire::Endpoint {
            spec: spec::endpoint_spec(&service.spec.endpoint),
            ports: service.endpoint.ports.iter().map(spec::port).collect(),
            virtual_ips: vips.collect(),
        },
        update_status: service.update_status.as_ref().map(update_status),
        service_status: None,
    }
}

fn update_status(status: &model::UpdateStatus) -> wire::UpdateStatus {
    wire::UpdateStatus {
        state: state_name(status.state),
        started_at: rfc3339(status.started_ns),
        completed_at: status.completed_ns.map(rfc3339),
        message: status.message.clone(),
    }
}

/// The word for where an update is.
pub(super) fn state_name(state: UpdateState) -> &'static str {
    match state {
        UpdateState::Updating => "updating",
        UpdateState::Paused => "paused",
        UpdateState::Completed => "completed",
        UpdateState::RollbackStarted => "rollback_started",
        UpdateState::RollbackPaused => "rollback_paused",
        UpdateState::RollbackCompleted => "rollback_completed",
    }
}
