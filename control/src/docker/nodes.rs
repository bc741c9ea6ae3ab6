//! Nodes: list, inspect, update, remove.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mesh_api::id::NodeId;
use mesh_api::session::NodeDescription;
use mesh_api::table::{NodeState, Role};

use super::error::{ApiError, ApiResult};
use super::filters::Filters;
use super::request::{Body, Params};
use super::time::rfc3339;
use super::wire::answer as wire;
use super::wire::swarm::NodeSpecRequest;
use super::{Api, names, swarm};
use crate::command::{Action, Command};
use crate::model::{Availability, Node, NodeSpec};
use crate::pki::Authority;
use crate::raft::Member;

/// `GET /nodes`.
pub(super) async fn list(State(api): State<Api>, params: Params) -> ApiResult<Json<Vec<wire::Node>>> {
    let cluster = api.manager()?;
    let state = cluster.linearizable().await?;
    let accepted = ["id", "label", "membership", "name", "node.label", "role"];
    let filters = Filters::parse(params.get("filters"), &accepted)?;
    for wanted in filters.values("role") {
        role(wanted).map_err(|_| {
            ApiError::invalid(format!("Invalid role filter: '{wanted}': expected manager or worker"))
        })?;
    }
    for wanted in filters.values("membership") {
        if !["accepted", "pending"].contains(&wanted) {
            return Err(ApiError::invalid(format!(
                "Invalid membership filter: '{wanted}': expected accepted or pending"
            )));
        }
    }
    let matching = |node: &&Arc<Node>| {
        let engine_labels: BTreeMap<String, String> = node.description.labels.iter().cloned().collect();
        filters.prefix("id", node.id.as_str())
            && filters.prefix("name", &node.description.hostname)
            && filters.labels("label", &engine_labels)
            && filters.labels("node.label", &node.spec.labels)
            && filters.any("role", |wanted| wanted == role_name(node.spec.role))
            && filters.any("membership", |wanted| wanted == "accepted")
    };
    let managers = cluster.managers();
    let ca = &swarm::object(&state)?.ca;
    Ok(Json(state.nodes.values().filter(matching).map(|node| show(node, &managers, ca)).collect()))
}

/// `GET /nodes/{id}`.
pub(super) async fn inspect(State(api): State<Api>, Path(id): Path<String>) -> ApiResult<Json<wire::Node>> {
    let cluster = api.manager()?;
    let state = cluster.linearizable().await?;
    let ca = &swarm::object(&state)?.ca;
    Ok(Json(show(names::node(&state, &id)?, &cluster.managers(), ca)))
}

/// `POST /nodes/{id}/update`.
pub(super) async fn update(
    State(api): State<Api>,
    Path(id): Path<String>,
    params: Params,
    Body(spec): Body<NodeSpecRequest>,
) -> ApiResult<StatusCode> {
    let cluster = api.manager()?;
    let version = params.version("node")?;
    let state = cluster.linearizable().await?;
    let node = names::node(&state, &id)?;
    let missing =
        |field: &str, values: &str| ApiError::invalid(format!("{field}: missing: expected one of {values}"));
    let spec = NodeSpec {
        name: spec.name.unwrap_or_default(),
        labels: spec.labels.unwrap_or_default(),
        role: role(&spec.role.ok_or_else(|| missing("Role", "manager, worker"))?)?,
        availability: availability(
            &spec.availability.ok_or_else(|| missing("Availability", "active, pause, drain"))?,
        )?,
    };
    if spec.role == Role::Worker && node.spec.role == Role::Manager {
        check_quorum_without(&node.id, &cluster.managers())?;
    }
    let action = Action::UpdateNode { id: node.id.clone(), version, spec };
    cluster.propose(Command::now(action)).await?;
    Ok(StatusCode::OK)
}

/// Refuses to take a manager away that the others need to decide on anything (Docker's text).
fn check_quorum_without(node: &NodeId, managers: &[Member]) -> ApiResult<()> {
    let others: Vec<&Member> =
        managers.iter().filter(|member| member.is_voter && member.manager.node != *node).collect();
    let reachable = others.iter().filter(|member| member.is_reachable != Some(false)).count();
    // That the last one stays, the state itself says.
    if others.is_empty() || reachable > others.len() / 2 {
        return Ok(());
    }
    Err(ApiError::invalid(
        "can't remove member from the raft: this would result in a loss of quorum: bring the unreachable managers back, or \
         demote those first",
    ))
}

/// `DELETE /nodes/{id}`.
pub(super) async fn remove(
    State(api): State<Api>,
    Path(id): Path<String>,
    params: Params,
) -> ApiResult<StatusCode> {
    let cluster = api.manager()?;
    let force = params.boolean("force")?;
    let node = names::node(&cluster.linearizable().await?, &id)?.id.clone();
    cluster.propose(Command::now(Action::RemoveNode { id: node, force })).await?;
    Ok(StatusCode::OK)
}

/// Reads `--availability`.
pub(super) fn availability(text: &str) -> ApiResult<Availability> {
    match text.to_ascii_lowercase().as_str() {
        "active" => Ok(Availability::Active),
        "pause" => Ok(Availability::Pause),
        "drain" => Ok(Availability::Drain),
        _ => Err(ApiError::invalid(format!(
            "invalid Availability: \"{text}\": expected active, pause or drain"
        ))),
    }
}

/// Reads `manager` or `worker`.
pub(super) fn role(text: &str) -> ApiResult<Role> {
    match text.to_ascii_lowercase().as_str() {
        "manager" => Ok(Role::Manager),
        "worker" => Ok(Role::Worker),
        _ => Err(ApiError::invalid(format!("invalid Role: \"{text}\": expected manager or worker"))),
    }
}

pub(super) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Manager => "manager",
        Role::Worker => "worker",
    }
}

pub(super) fn availability_name(availability: Availability) -> &'static str {
    match availability {
        Availability::Active => "active",
        Availability::Pause => "pause",
        Availability::Drain => "drain",
    }
}

pub(super) fn state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::Unknown => "unknown",
        NodeState::Ready => "ready",
        NodeState::Down => "down",
    }
}

pub(super) fn show(node: &Node, managers: &[Member], ca: &Authority) -> wire::Node {
    let NodeDescription {
        hostname,
        addr,
        vtep: _,
        os,
        architecture,
        nano_cpus,
        memory_bytes,
        version,
        labels,
        dataplane,
        routes: _,
        wireguard: _,
        addresses: _,
        manager: _,
    } = &node.description;
    let member = managers.iter().find(|member| member.manager.node == node.id);
    let manager_status = member.map(|member| wire::ManagerStatus {
        leader: member.is_leader,
        // Who does not lead knows of the others what the leader says of their nodes.
        reachability: if member.is_reachable.unwrap_or(!node.is_down()) {
            "reachable"
        } else {
            "unreachable"
        },
        addr: member.manager.addr.to_string(),
    });
    let attachments = dataplane.split(',').filter(|uplink| !uplink.is_empty());
    let plugin = |kind, name: &str| wire::EnginePlugin { kind, name: name.to_owned() };
    let dataplane = attachments.map(|uplink| plugin("Dataplane", uplink));
    wire::Node {
        id: node.id.to_string(),
        version: wire::Version { index: node.spec_version },
        created_at: rfc3339(node.meta.created_ns),
        updated_at: rfc3339(node.meta.updated_ns),
        spec: wire::NodeSpec {
            name: node.spec.name.clone(),
            labels: node.spec.labels.clone(),
            role: role_name(node.spec.role),
            availability: availability_name(node.spec.availability),
        },
        description: wire::NodeDescription {
            hostname: hostname.clone(),
            platform: wire::Platform { architecture: architecture.clone(), os: os.clone() },
            resources: wire::ResourceAmount { nano_cpus: *nano_cpus, memory_bytes: *memory_bytes },
            engine: wire::Engine {
                engine_version: version.clone(),
                labels: labels.iter().cloned().collect(),
                plugins: dataplane.chain([plugin("Network", "overlay")]).collect(),
            },
            tls_info: swarm::tls_info(ca.trusted(), ca.root_of(node.issuer)),
        },
        status: wire::NodeStatus {
            state: state_name(node.status.state),
            message: node.status.message.clone(),
            addr: addr.to_string(),
        },
        manager_status,
    }
}
