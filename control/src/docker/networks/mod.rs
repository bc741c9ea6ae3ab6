//! Networks: create, list, inspect, remove, prune. A manager shows the cluster's, a worker those that its
//! tasks are on.

pub(super) mod ask;
mod show;

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mesh_api::id::NetworkId;
use mesh_api::table::NetworkRecord;
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::filters::Filters;
use super::local::Membership;
use super::request::{Body, Params};
use super::time;
use super::wire::network as wire;
use super::{Api, names};
use crate::clock;
use crate::command::{Action, Command};
use crate::model::State as ClusterState;

pub(super) use show::in_task as show_in_task;
pub(super) use show::network as show_network;

/// Under which option Docker shows a network's VNI.
const VNI_OPTION: &str = "com.docker.network.driver.overlay.vxlanid_list";

/// `GET /networks`.
pub(super) async fn list(State(api): State<Api>, params: Params) -> ApiResult<Json<Vec<wire::Network>>> {
    let accepted = ["dangling", "driver", "id", "label", "name", "scope", "type"];
    let filters = Filters::parse(params.get("filters"), &accepted)?;
    let dangling = filters.boolean("dangling")?;
    for wanted in filters.values("type") {
        if !["custom", "builtin"].contains(&wanted) {
            return Err(ApiError::invalid(format!(
                "invalid filter 'type={wanted}': expected custom or builtin"
            )));
        }
    }
    let state = state(&api).await?;
    let used = used_networks(&api, state.as_ref());
    let mut networks = visible(&api, state.as_ref(), false);
    networks.retain(|network| {
        filters.matches("name", &network.name)
            && filters.matches("id", &network.id)
            && filters.any("driver", |wanted| wanted == network.driver)
            && filters.any("scope", |wanted| wanted == network.scope)
            // Built in are an engine's own: bridge, host and none.
            && filters.any("type", |wanted| wanted == "custom")
            && filters.labels("label", &network.labels)
            && dangling.is_none_or(|dangling| dangling != used.contains(&network.id))
    });
    Ok(Json(networks))
}

/// `GET /networks/{id}`.
pub(super) async fn inspect(
    State(api): State<Api>,
    Path(id): Path<String>,
    params: Params,
) -> ApiResult<Json<wire::Network>> {
    let verbose = params.boolean("verbose")?;
    let in_scope = matches!(params.get("scope"), None | Some("" | "swarm" | "global"));
    let mut networks =
        if in_scope { visible(&api, state(&api).await?.as_ref(), verbose) } else { Vec::new() };
    let by = |test: &dyn Fn(&wire::Network) -> bool| {
        networks.iter().enumerate().filter(|(_, network)| test(network)).map(|(at, _)| at).collect::<Vec<_>>()
    };
    let candidates = [
        by(&|network| network.id == id),
        by(&|network| network.name == id),
        by(&|network| network.id.starts_with(&id)),
    ];
    match candidates.into_iter().find(|found| !found.is_empty()).as_deref() {
        Some([at]) => Ok(Json(networks.swap_remove(*at))),
        Some(found) => Err(ApiError::invalid(format!(
            "network {id} is ambiguous ({} matches found based on ID prefix)",
            found.len()
        ))),
        None => Err(ApiError::not_found(format!("network {id} not found"))),
    }
}

/// `POST /networks/create`.
pub(super) async fn create(
    State(api): State<Api>,
    Body(request): Body<wire::CreateRequest>,
) -> ApiResult<(StatusCode, Json<Value>)> {
    let driver = request.driver.as_deref().unwrap_or_default();
    if !["", "overlay"].contains(&driver) {
        return Err(ApiError::unsupported(format!(
            "Driver: networks of driver '{driver}' belong to a container engine: create the network with --driver overlay"
        )));
    }
    let cluster = api.manager()?;
    let spec = ask::spec(request)?;
    if cluster.linearizable().await?.network_by_name(&spec.name).is_some() {
        return Err(ApiError::conflict(format!("network with name {} already exists", spec.name)));
    }
    let id = NetworkId::random(&mut rand::rng());
    cluster.propose(Command::now(Action::CreateNetwork { id: id.clone(), spec })).await?;
    Ok((StatusCode::CREATED, Json(json!({ "Id": id, "Warning": "" }))))
}

/// `DELETE /networks/{id}`.
pub(super) async fn remove(State(api): State<Api>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let cluster = api.manager()?;
    let id = names::network(&cluster.linearizable().await?, &id)?.id.clone();
    cluster.propose(Command::now(Action::RemoveNetwork { id })).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /networks/prune`: removes the networks that no service and no task is on.
pub(super) async fn prune(State(api): State<Api>, params: Params) -> ApiResult<Json<Value>> {
    let cluster = api.manager()?;
    let filters = Filters::parse(params.get("filters"), &["label", "label!", "until"])?;
    let until_ns = until_ns(&filters)?;
    let state = cluster.linearizable().await?;
    let used = used_networks(&api, Some(&state));
    let mut deleted = Vec::new();
    for network in state.networks.values() {
        let labels = &network.spec.labels;
        let kept = filters.contains("label!") && filters.labels("label!", labels);
        if network.spec.ingress
            || used.contains(network.id.as_str())
            || kept
            || until_ns.is_some_and(|until_ns| network.meta.created_ns > until_ns)
            || !filters.labels("label", labels)
        {
            continue;
        }
        // One that got a service meanwhile is refused, and stays.
        if cluster.propose(Command::now(Action::RemoveNetwork { id: network.id.clone() })).await.is_ok() {
            deleted.push(network.spec.name.clone());
        }
    }
    Ok(Json(json!({ "NetworksDeleted": deleted })))
}

/// Before when a network must have been made to be pruned, ns since the epoch.
fn until_ns(filters: &Filters) -> ApiResult<Option<u64>> {
    let mut values = filters.values("until");
    let Some(text) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(ApiError::invalid("invalid filter 'until': more than one until filter specified"));
    }
    let ns = time::point_ns(text, clock::now_ns()).ok_or_else(|| {
        ApiError::invalid(format!(
            "invalid filter 'until={text}': expected a time such as 2026-01-31T12:00:00Z, seconds since 1970, or a duration such \
             as 24h"
        ))
    });
    ns.map(Some)
}

/// The state, on a manager.
async fn state(api: &Api) -> ApiResult<Option<ClusterState>> {
    Ok(match api.host.cluster() {
        Some(cluster) => Some(cluster.linearizable().await?),
        None => None,
    })
}

/// Networks that a service or a task is on, by the state where there is one, or else by the node's table.
fn used_networks(api: &Api, state: Option<&ClusterState>) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    if let Some(state) = state {
        for service in state.services.values() {
            used.extend(service.spec.task.networks.iter().map(|network| network.target.to_string()));
            used.extend(service.endpoint.vips.iter().map(|vip| vip.network.to_string()));
        }
        for task in state.tasks.values().filter(|task| !task.has_ended()) {
            used.extend(task.endpoints.iter().map(|endpoint| endpoint.network.to_string()));
        }
    } else if let Some(table) = api.host.table() {
        let endpoints = table.tasks.values().flat_map(|task| &task.endpoints);
        used.extend(endpoints.map(|endpoint| endpoint.network.to_string()));
    }
    used
}

/// The networks that this node shows, each with what is of it on this node.
fn visible(api: &Api, state: Option<&ClusterState>, verbose: bool) -> Vec<wire::Network> {
    let Membership::Active { node, .. } = api.host.membership() else { return Vec::new() };
    let table = api.host.table();
    let mut networks: Vec<wire::Network> = match (state, &table) {
        (Some(state), _) => state.networks.values().map(|network| show::network(network)).collect(),
        (None, Some(table)) => {
            let here = |network: &&NetworkRecord| {
                network.ingress || show::endpoints(table, &network.id).any(|(task, _)| task.node == node)
            };
            table.networks.values().filter(here).map(show::record).collect()
        }
        (None, None) => Vec::new(),
    };
    if let Some(table) = table {
        for network in &mut networks {
            show::add_local_view(network, &table, &node, verbose);
        }
    }
    networks
}
