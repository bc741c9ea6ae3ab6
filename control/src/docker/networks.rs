//! Networks: create, list, inspect, remove, prune. A manager shows the cluster's, a worker those that its
//! tasks are on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use ipnet::{IpNet, Ipv4Net};
use mesh_api::id::{NetworkId, NodeId};
use mesh_api::table::{NetworkRecord, Table, TaskRecord};
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::filters::Filters;
use super::local::Membership;
use super::request::{Body, Params};
use super::time::rfc3339;
use super::wire::answer as task_wire;
use super::wire::network as wire;
use super::{Api, names};
use crate::command::{Action, Command};
use crate::model::{IpamConfig, Network, NetworkSpec};

/// Under which option Docker shows a network's VNI.
const VNI_OPTION: &str = "com.docker.network.driver.overlay.vxlanid_list";

/// Names that Docker keeps for itself.
const PREDEFINED: [&str; 4] = ["bridge", "host", "none", "default"];

/// Options of Docker's overlay driver that have an effect there and would have none here.
const OPTIONS_REFUSED: [(&str, &str); 4] = [
    ("encrypted", "encryption is not in this version of Shoal, and the network would carry cleartext"),
    ("com.docker.network.driver.overlay.encrypted", "encryption is not in this version of Shoal"),
    ("com.docker.network.driver.mtu", "the MTU follows from the underlay's"),
    (VNI_OPTION, "identifiers are given by the managers"),
];

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
    let used = used_networks(&api);
    let mut networks = visible(&api, false);
    // Docker's `name` and `id` filters match anywhere in the text.
    networks.retain(|network| {
        filters.any("name", |wanted| network.name.contains(wanted))
            && filters.any("id", |wanted| network.id.contains(wanted))
            && filters.any("driver", |wanted| wanted == network.driver)
            && filters.any("scope", |wanted| wanted == network.scope)
            && filters.any("type", |wanted| (wanted == "builtin") == network.ingress)
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
    let mut networks = if in_scope { visible(&api, verbose) } else { Vec::new() };
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
    let spec = spec(request)?;
    if cluster.state().network_by_name(&spec.name).is_some() {
        return Err(ApiError::conflict(format!("network with name {} already exists", spec.name)));
    }
    let id = NetworkId::random(&mut rand::rng());
    cluster.propose(Command::now(Action::CreateNetwork { id: id.clone(), spec })).await?;
    Ok((StatusCode::CREATED, Json(json!({ "Id": id, "Warning": "" }))))
}

/// `DELETE /networks/{id}`.
pub(super) async fn remove(State(api): State<Api>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    let cluster = api.manager()?;
    let id = names::network(&cluster.state(), &id)?.id.clone();
    cluster.propose(Command::now(Action::RemoveNetwork { id })).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /networks/prune`: removes the networks that no service and no task is on.
pub(super) async fn prune(State(api): State<Api>, params: Params) -> ApiResult<Json<Value>> {
    let cluster = api.manager()?;
    let filters = Filters::parse(params.get("filters"), &["label", "label!"])?;
    let state = cluster.state();
    let used = used_networks(&api);
    let mut deleted = Vec::new();
    for network in state.networks.values() {
        let labels = &network.spec.labels;
        let kept = filters.contains("label!") && filters.labels("label!", labels);
        if network.spec.ingress
            || used.contains(network.id.as_str())
            || kept
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

/// What a request asks for, checked.
fn spec(request: wire::CreateRequest) -> ApiResult<NetworkSpec> {
    let wire::CreateRequest {
        name,
        driver: _,
        scope,
        internal,
        attachable,
        ingress,
        config_only,
        config_from,
        ipam,
        enable_ipv4,
        enable_ipv6,
        options,
        labels,
    } = request;
    let name = name.unwrap_or_default();
    if PREDEFINED.contains(&name.as_str()) {
        return Err(ApiError::forbidden(format!(
            "{name} is a pre-defined network and cannot be created: choose another Name"
        )));
    }
    // As `apply` has it: what names a service, or several with dots between them.
    if name.split('.').any(|part| names::check("Name", part).is_err()) {
        return Err(ApiError::invalid(format!(
            "invalid Name '{name}': name must be valid as a DNS name (parts of letters, digits, and - or _ between them)"
        )));
    }
    if !matches!(scope.as_deref(), None | Some("" | "swarm" | "global")) {
        return Err(ApiError::invalid(format!(
            "Scope: '{}' is not an overlay's: expected swarm",
            scope.unwrap_or_default()
        )));
    }
    if ingress == Some(true) {
        return Err(ApiError::unsupported(
            "Ingress: every cluster has its ingress network already (leave out --ingress)",
        ));
    }
    let config_from = config_from.and_then(|from| from.get("Network")?.as_str().map(str::to_owned));
    if config_only == Some(true) || config_from.is_some_and(|network| !network.is_empty()) {
        return Err(ApiError::unsupported(
            "ConfigOnly, ConfigFrom: not supported (leave out --config-only, --config-from)",
        ));
    }
    if enable_ipv6 == Some(true) {
        return Err(ApiError::unsupported(
            "EnableIPv6: overlays are IPv4 in this version of Shoal (leave out --ipv6)",
        ));
    }
    if enable_ipv4 == Some(false) {
        return Err(ApiError::unsupported(
            "EnableIPv4: overlays are IPv4 in this version of Shoal (leave out --ipv4=false)",
        ));
    }
    let options = options.unwrap_or_default();
    for (option, why) in OPTIONS_REFUSED {
        // `--opt encrypted=false` asks for what is the case.
        if options.get(option).is_some_and(|value| value != "false") {
            return Err(ApiError::unsupported(format!(
                "Options.{option}: not supported (leave out --opt {option}): {why}"
            )));
        }
    }
    let ipam = ipam.unwrap_or_default();
    let driver = ipam.driver.unwrap_or_default();
    if !["", "default"].contains(&driver.as_str()) {
        return Err(ApiError::unsupported(format!(
            "IPAM.Driver: '{driver}' is not there: leave out --ipam-driver, or use 'default'"
        )));
    }
    let configs = ipam.config.unwrap_or_default();
    Ok(NetworkSpec {
        name,
        labels: labels.unwrap_or_default(),
        options,
        internal: internal.unwrap_or_default(),
        attachable: attachable.unwrap_or_default(),
        ingress: false,
        ipam: configs
            .iter()
            .enumerate()
            .map(|(at, config)| ipam_config(config, at))
            .collect::<ApiResult<_>>()?,
    })
}

fn ipam_config(config: &wire::IpamConfigRequest, at: usize) -> ApiResult<IpamConfig> {
    let subnet = subnet(config.subnet.as_deref(), &format!("IPAM.Config[{at}].Subnet"), "invalid subnet")?;
    let range = subnet_of_range(config.ip_range.as_deref(), at)?;
    if config.aux_address.as_ref().is_some_and(|aux| !aux.is_empty()) {
        return Err(ApiError::unsupported(format!(
            "IPAM.Config[{at}].AuxiliaryAddresses: not supported (leave out --aux-address)"
        )));
    }
    let gateway = match config.gateway.as_deref() {
        None | Some("") => None,
        Some(text) => Some(text.parse::<Ipv4Addr>().map_err(|_| {
            ApiError::invalid(format!(
                "IPAM.Config[{at}].Gateway: invalid gateway {text}: expected an IPv4 address of the subnet"
            ))
        })?),
    };
    if subnet.is_none() && (range.is_some() || gateway.is_some()) {
        return Err(ApiError::invalid(format!(
            "IPAM.Config[{at}].Subnet: missing: --ip-range and --gateway need a --subnet to be in"
        )));
    }
    if let (Some(subnet), Some(range)) = (subnet, range)
        && !subnet.contains(&range)
    {
        return Err(ApiError::invalid(format!(
            "IPAM.Config[{at}].IPRange: ipam configuration: subnet {subnet} does not contain range {range}"
        )));
    }
    if let (Some(subnet), Some(gateway)) = (subnet, gateway)
        && (!subnet.contains(&gateway) || gateway == subnet.network() || gateway == subnet.broadcast())
    {
        return Err(ApiError::invalid(format!(
            "IPAM.Config[{at}].Gateway: ipam configuration: subnet {subnet} does not contain gateway {gateway} as a host"
        )));
    }
    Ok(IpamConfig { subnet, range, gateway })
}

fn subnet_of_range(text: Option<&str>, at: usize) -> ApiResult<Option<Ipv4Net>> {
    subnet(text, &format!("IPAM.Config[{at}].IPRange"), "invalid range")
}

fn subnet(text: Option<&str>, field: &str, problem: &str) -> ApiResult<Option<Ipv4Net>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    match text.parse::<IpNet>() {
        Ok(IpNet::V4(subnet)) if subnet.addr() != subnet.network() => {
            Err(ApiError::invalid(format!("{field}: {problem} {text}: it should be {}", subnet.trunc())))
        }
        Ok(IpNet::V4(subnet)) => Ok(Some(subnet)),
        Ok(IpNet::V6(_)) => {
            Err(ApiError::unsupported(format!("{field}: {text}: overlays are IPv4 in this version of Shoal")))
        }
        Err(_) => {
            Err(ApiError::invalid(format!("{field}: {problem} {text}: expected one such as 10.20.0.0/24")))
        }
    }
}

/// Networks that a service or a task is on.
fn used_networks(api: &Api) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    if let Some(cluster) = api.host.cluster() {
        let state = cluster.state();
        for service in state.services.values() {
            used.extend(service.spec.task.networks.iter().map(|network| network.target.to_string()));
            used.extend(service.endpoint.vips.iter().map(|vip| vip.network.to_string()));
        }
        for task in state.tasks.values().filter(|task| !task.has_ended()) {
            used.extend(task.endpoints.iter().map(|endpoint| endpoint.network.to_string()));
        }
    } else if let Some(table) = api.host.table() {
        used.extend(
            table
                .tasks
                .values()
                .flat_map(|task| &task.endpoints)
                .map(|endpoint| endpoint.network.to_string()),
        );
    }
    used
}

/// The networks that this node shows, each with what is of it on this node.
fn visible(api: &Api, verbose: bool) -> Vec<wire::Network> {
    let Membership::Active { node, .. } = api.host.membership() else { return Vec::new() };
    let table = api.host.table();
    let mut networks: Vec<wire::Network> = match (api.host.cluster(), &table) {
        (Some(cluster), _) => cluster.state().networks.values().map(show).collect(),
        (None, Some(table)) => {
            let here = |network: &&NetworkRecord| {
                network.ingress || endpoints(table, &network.id).any(|(task, _)| task.node == node)
            };
            table.networks.values().filter(here).map(show_record).collect()
        }
        (None, None) => Vec::new(),
    };
    if let Some(table) = table {
        for network in &mut networks {
            add_local_view(network, &table, &node, verbose);
        }
    }
    networks
}

/// The cluster's own record of a network.
fn show(network: &Arc<Network>) -> wire::Network {
    let spec = &network.spec;
    wire::Network {
        name: spec.name.clone(),
        id: network.id.to_string(),
        created: rfc3339(network.meta.created_ns),
        scope: "swarm",
        driver: "overlay",
        enable_ipv4: true,
        enable_ipv6: false,
        ipam: wire::Ipam { driver: "default", options: None, config: configs(network) },
        internal: spec.internal,
        attachable: spec.attachable,
        ingress: spec.ingress,
        config_from: wire::ConfigFrom::default(),
        config_only: false,
        containers: BTreeMap::new(),
        options: options(network),
        labels: spec.labels.clone(),
        peers: Vec::new(),
        services: None,
    }
}

/// A network as a worker knows it.
fn show_record(network: &NetworkRecord) -> wire::Network {
    let subnets = network.subnets.iter().map(|subnet| wire::IpamConfig {
        subnet: subnet.cidr.to_string(),
        gateway: subnet.gateway.to_string(),
    });
    wire::Network {
        name: network.name.clone(),
        id: network.id.to_string(),
        created: rfc3339(0),
        scope: "swarm",
        driver: "overlay",
        enable_ipv4: true,
        enable_ipv6: false,
        ipam: wire::Ipam { driver: "default", options: None, config: subnets.collect() },
        internal: network.internal,
        attachable: false,
        ingress: network.ingress,
        config_from: wire::ConfigFrom::default(),
        config_only: false,
        containers: BTreeMap::new(),
        options: BTreeMap::from([(VNI_OPTION.to_owned(), network.vni.to_string())]),
        labels: BTreeMap::new(),
        peers: Vec::new(),
        services: None,
    }
}

fn configs(network: &Network) -> Vec<wire::IpamConfig> {
    let config = |subnet: &crate::model::Subnet| wire::IpamConfig {
        subnet: subnet.cidr.to_string(),
        gateway: subnet.gateway.to_string(),
    };
    network.subnets.iter().map(config).collect()
}

fn options(network: &Network) -> BTreeMap<String, String> {
    let mut options = network.spec.options.clone();
    options.insert(VNI_OPTION.to_owned(), network.vni.to_string());
    options
}

/// The endpoints of a network, with their tasks.
fn endpoints<'t>(
    table: &'t Table,
    network: &'t NetworkId,
) -> impl Iterator<Item = (&'t TaskRecord, Ipv4Addr)> {
    table.tasks.values().flat_map(move |task| {
        let endpoints = task.endpoints.iter().filter(move |endpoint| endpoint.network == *network);
        endpoints.map(move |endpoint| (task, endpoint.addr))
    })
}

/// What the dataplane of this node knows of the network: the tasks here, the nodes that have any, and on
/// request services.
fn add_local_view(network: &mut wire::Network, table: &Table, node: &NodeId, verbose: bool) {
    let id = NetworkId(network.id.clone());
    let Some(record) = table.networks.get(&id) else { return };
    let with_prefix = |addr: Ipv4Addr| {
        let subnet = record.subnets.iter().find(|subnet| subnet.cidr.contains(&addr));
        subnet.map_or_else(|| addr.to_string(), |subnet| format!("{addr}/{}", subnet.cidr.prefix_len()))
    };
    let mut peers = BTreeSet::new();
    for (task, addr) in endpoints(table, &id) {
        if let Some(peer) = table.nodes.get(&task.node) {
            peers.insert(wire::Peer { name: peer.hostname.clone(), ip: peer.vtep.to_string() });
        }
        if task.node == *node {
            let resource = wire::EndpointResource {
                name: task.name.clone(),
                endpoint_id: endpoint_id(task, &id),
                mac_address: mac(addr),
                ipv4_address: with_prefix(addr),
                ipv6_address: String::new(),
            };
            network.containers.insert(task.id.to_string(), resource);
        }
    }
    network.peers = peers.into_iter().collect();
    network.services = verbose.then(|| services(table, &id));
}

/// The services in a network, with their VIPs and tasks.
fn services(table: &Table, network: &NetworkId) -> BTreeMap<String, wire::ServiceInfo> {
    let mut services = BTreeMap::new();
    for service in table.services.values() {
        let Some(vip) = service.vips.iter().find(|vip| vip.network == *network) else { continue };
        let tasks = endpoints(table, network).filter(|(task, _)| task.service == service.id);
        let tasks = tasks.map(|(task, addr)| wire::ServiceInfoTask {
            name: task.name.clone(),
            endpoint_id: endpoint_id(task, network),
            endpoint_ip: addr.to_string(),
            info: table
                .nodes
                .get(&task.node)
                .map(|node| ("Host IP".to_owned(), node.vtep.to_string()))
                .into_iter()
                .collect(),
        });
        let ports =
            service.ports.iter().map(|port| format!("Target: {}, Publish: {}", port.target, port.published));
        let info = wire::ServiceInfo {
            vip: vip.addr.map(|addr| addr.to_string()).unwrap_or_default(),
            ports: ports.collect(),
            local_lb_index: 0,
            tasks: tasks.collect(),
        };
        services.insert(service.name.clone(), info);
    }
    services
}

fn endpoint_id(task: &TaskRecord, network: &NetworkId) -> String {
    format!("{}{}", task.id, network)
}

/// An endpoint's MAC address: `02:42` and its IPv4 address.
fn mac(addr: Ipv4Addr) -> String {
    let [a, b, c, d] = addr.octets();
    format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// A network as a task shows it.
pub(super) fn show_in_task(network: &Arc<Network>) -> task_wire::TaskNetwork {
    let spec = &network.spec;
    let driver = |name, options| task_wire::Driver { name, options };
    task_wire::TaskNetwork {
        id: network.id.to_string(),
        version: task_wire::Version { index: network.meta.version },
        created_at: rfc3339(network.meta.created_ns),
        updated_at: rfc3339(network.meta.updated_ns),
        spec: task_wire::TaskNetworkSpec {
            name: spec.name.clone(),
            labels: spec.labels.clone(),
            driver_configuration: driver("overlay", spec.options.clone()),
            internal: spec.internal,
            attachable: spec.attachable,
            ingress: spec.ingress,
            scope: "swarm",
        },
        driver_state: driver("overlay", options(network)),
        ipam_options: task_wire::IpamOptions {
            driver: driver("default", BTreeMap::new()),
            configs: configs(network),
        },
    }
}
