//! `_ping`, `version`, `info` and the built-in images' digests.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, PRAGMA};
use axum::http::{HeaderValue, Method};
use axum::response::Response;
use mesh_api::table::{Role, TaskState};
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::local::{HostFacts, Membership, SwarmError};
use super::wire::answer::{RemoteManager, SwarmInfo};
use super::{Api, spec, swarm, swarm_header, version as api_version};
use crate::clock;

/// `GET /_ping`, `HEAD /_ping`.
pub(super) async fn ping(State(api): State<Api>, method: Method) -> Response {
    let body = if method == Method::HEAD { Body::empty() } else { Body::from("OK") };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store, must-revalidate"));
    headers.insert(PRAGMA, HeaderValue::from_static("no-cache"));
    headers.insert("Swarm", HeaderValue::from_static(swarm_header(&api.host.membership())));
    response
}

/// `GET /version`.
pub(super) async fn version(State(api): State<Api>) -> Json<Value> {
    let HostFacts { version, git_commit, kernel, architecture, .. } = api.host.facts();
    let newest = api_version::NEWEST.to_string();
    let oldest = api_version::OLDEST.to_string();
    let arch = go_arch(&architecture);
    Json(json!({
        "Platform": { "Name": "Shoal" },
        "Components": [{
            "Name": "Engine",
            "Version": version,
            "Details": {
                "ApiVersion": newest,
                "Arch": arch,
                "BuildTime": "",
                "Experimental": "false",
                "GitCommit": git_commit,
                "GoVersion": "none (Rust)",
                "KernelVersion": kernel,
                "MinAPIVersion": oldest,
                "Os": "linux",
            },
        }],
        "Version": version,
        "ApiVersion": newest,
        "MinAPIVersion": oldest,
        "GitCommit": git_commit,
        "GoVersion": "none (Rust)",
        "Os": "linux",
        "Arch": arch,
        "KernelVersion": kernel,
        "BuildTime": "",
    }))
}

/// `GET /info`.
pub(super) async fn info(State(api): State<Api>) -> ApiResult<Json<Value>> {
    let facts = api.host.facts();
    let swarm =
        serde_json::to_value(swarm_info(&api)).map_err(|error| ApiError::internal(error.to_string()))?;
    let running = running_tasks(&api);
    let mut driver_status = Vec::new();
    if !facts.dataplane.is_empty() {
        driver_status.push(json!(["Dataplane", facts.dataplane]));
    }
    let host = json!({
        "ID": facts.id,
        "Containers": running,
        "ContainersRunning": running,
        "DriverStatus": driver_status,
        "DockerRootDir": facts.state_dir,
        "SystemTime": super::time::rfc3339(clock::now_ns()),
        "KernelVersion": facts.kernel,
        "OperatingSystem": facts.os,
        "Architecture": facts.architecture,
        "NCPU": facts.cpus,
        "MemTotal": facts.memory_bytes,
        "Name": facts.hostname,
        "ServerVersion": facts.version,
        "Swarm": swarm,
    });
    let parts = [engine_figures(), host_capabilities(), host];
    let fields = parts.into_iter().filter_map(|part| match part {
        Value::Object(fields) => Some(fields),
        _ => None,
    });
    Ok(Json(fields.flatten().collect()))
}

/// What Docker warns of when it is missing.
fn host_capabilities() -> Value {
    json!({
        "MemoryLimit": true,
        "SwapLimit": true,
        "CpuCfsPeriod": true,
        "CpuCfsQuota": true,
        "CPUShares": true,
        "CPUSet": true,
        "PidsLimit": true,
        "OomKillDisable": false,
        "IPv4Forwarding": true,
    })
}

/// What Docker says of its engine, for an engine that has no images, limits or containers.
fn engine_figures() -> Value {
    json!({
        "ContainersPaused": 0,
        "ContainersStopped": 0,
        "Images": 0,
        "Driver": "none",
        "Plugins": { "Volume": [], "Network": ["overlay"], "Authorization": null, "Log": [] },
        "Debug": false,
        "NFd": 0,
        "NGoroutines": 0,
        "NEventsListener": 0,
        "LoggingDriver": "none",
        "CgroupDriver": "none",
        "CgroupVersion": "2",
        "OSVersion": "",
        "OSType": "linux",
        "IndexServerAddress": "",
        "RegistryConfig": null,
        "GenericResources": null,
        "HttpProxy": "",
        "HttpsProxy": "",
        "NoProxy": "",
        "Labels": [],
        "ExperimentalBuild": false,
        "Runtimes": { "process": { "path": "shoal" } },
        "DefaultRuntime": "process",
        "LiveRestoreEnabled": true,
        "Isolation": "",
        "InitBinary": "",
        "ContainerdCommit": { "ID": "" },
        "RuncCommit": { "ID": "" },
        "InitCommit": { "ID": "" },
        "SecurityOptions": [],
        "ProductLicense": "",
        "Warnings": null,
    })
}

/// The node's view of its cluster.
fn swarm_info(api: &Api) -> SwarmInfo {
    let inactive = SwarmInfo {
        node_id: String::new(),
        node_addr: String::new(),
        local_node_state: "inactive",
        control_available: false,
        error: String::new(),
        remote_managers: None,
        nodes: 0,
        managers: 0,
        cluster: None,
    };
    let (node, role, addr, managers) = match api.host.membership() {
        Membership::Inactive => return inactive,
        Membership::Active { node, role, addr, managers } => (node, role, addr, managers),
        Membership::Locked { node: _, addr } => {
            let (node_addr, error) = (addr.to_string(), SwarmError::Locked.to_string());
            return SwarmInfo { node_addr, local_node_state: "locked", error, ..inactive };
        }
    };
    let state = api.host.cluster().map(|cluster| cluster.state());
    let manager_of = |addr: &std::net::SocketAddr| {
        let found = state.as_ref().and_then(|state| {
            let mut nodes = state.nodes.values();
            nodes.find(|node| node.spec.role == Role::Manager && addr.ip() == node.description.addr)
        });
        found.map_or_else(String::new, |node| node.id.to_string())
    };
    let remotes =
        managers.iter().map(|addr| RemoteManager { node_id: manager_of(addr), addr: addr.to_string() });
    let mut info = SwarmInfo {
        node_id: node.to_string(),
        node_addr: addr.to_string(),
        local_node_state: "active",
        control_available: role == Role::Manager && state.is_some(),
        remote_managers: Some(remotes.collect()),
        ..inactive
    };
    if let Some(state) = &state {
        info.nodes = state.nodes.len() as u64;
        info.managers = state.nodes.values().filter(|node| node.spec.role == Role::Manager).count() as u64;
        info.cluster = state.cluster.as_ref().map(|cluster| swarm::show(cluster, false));
    }
    info
}

/// Tasks that run on this node.
fn running_tasks(api: &Api) -> usize {
    let (Membership::Active { node, .. } | Membership::Locked { node, .. }) = api.host.membership() else {
        return 0;
    };
    api.host.table().map_or(0, |table| {
        let here =
            |task: &&mesh_api::table::TaskRecord| task.node == node && task.observed == TaskState::Running;
        table.tasks.values().filter(here).count()
    })
}

/// `GET /distribution/{name}/json`: the digests of the built-in images; Shoal asks no registry.
pub(super) async fn distribution(Path(path): Path<String>) -> ApiResult<Json<Value>> {
    let image = path.strip_suffix("/json").ok_or_else(|| ApiError::not_found("page not found"))?;
    let digest = spec::built_in_digest(image).ok_or_else(|| {
        ApiError::not_found(format!(
            "{image} is not one of the images that Shoal has built in (shoal/whoami, shoal/exec), and Shoal asks no registry"
        ))
    })?;
    Ok(Json(json!({
        "Descriptor": {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": 0,
        },
        "Platforms": [],
    })))
}

/// Go's name of a machine.
fn go_arch(architecture: &str) -> &str {
    match architecture {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
