//! Answers: nodes, services, tasks, version and info, in Docker's shapes and order of fields.

use std::collections::BTreeMap;

use serde::Serialize;

use super::spec::{EndpointSpec, Labels, PortConfig, ServiceSpec, TaskTemplate};
use super::swarm::Swarm;

/// `Version`: what an update has to name.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Version {
    pub(in crate::docker) index: u64,
}

/// `Node`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Node {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    pub(in crate::docker) version: Version,
    pub(in crate::docker) created_at: String,
    pub(in crate::docker) updated_at: String,
    pub(in crate::docker) spec: NodeSpec,
    pub(in crate::docker) description: NodeDescription,
    pub(in crate::docker) status: NodeStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) manager_status: Option<ManagerStatus>,
}

/// `NodeSpec`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct NodeSpec {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) name: String,
    pub(in crate::docker) labels: Labels,
    pub(in crate::docker) role: &'static str,
    pub(in crate::docker) availability: &'static str,
}

/// `NodeDescription`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct NodeDescription {
    pub(in crate::docker) hostname: String,
    pub(in crate::docker) platform: Platform,
    pub(in crate::docker) resources: ResourceAmount,
    pub(in crate::docker) engine: Engine,
    #[serde(rename = "TLSInfo")]
    pub(in crate::docker) tls_info: super::swarm::TlsInfo,
}

/// `Platform`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Platform {
    pub(in crate::docker) architecture: String,
    #[serde(rename = "OS")]
    pub(in crate::docker) os: String,
}

/// `Resources`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct ResourceAmount {
    #[serde(rename = "NanoCPUs")]
    pub(in crate::docker) nano_cpus: u64,
    pub(in crate::docker) memory_bytes: u64,
}

/// `EngineDescription`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Engine {
    pub(in crate::docker) engine_version: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(in crate::docker) labels: Labels,
    pub(in crate::docker) plugins: Vec<EnginePlugin>,
}

/// `PluginDescription`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct EnginePlugin {
    #[serde(rename = "Type")]
    pub(in crate::docker) kind: &'static str,
    pub(in crate::docker) name: String,
}

/// `NodeStatus`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct NodeStatus {
    pub(in crate::docker) state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) message: String,
    pub(in crate::docker) addr: String,
}

/// `ManagerStatus`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct ManagerStatus {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::docker) leader: bool,
    pub(in crate::docker) reachability: &'static str,
    pub(in crate::docker) addr: String,
}

/// `Service`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Service {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    pub(in crate::docker) version: Version,
    pub(in crate::docker) created_at: String,
    pub(in crate::docker) updated_at: String,
    pub(in crate::docker) spec: ServiceSpec,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) previous_spec: Option<ServiceSpec>,
    pub(in crate::docker) endpoint: Endpoint,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) update_status: Option<UpdateStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) service_status: Option<ServiceStatus>,
}

/// `Endpoint`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Endpoint {
    pub(in crate::docker) spec: EndpointSpec,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::docker) ports: Vec<PortConfig>,
    #[serde(rename = "VirtualIPs", skip_serializing_if = "Vec::is_empty")]
    pub(in crate::docker) virtual_ips: Vec<VirtualIp>,
}

/// `EndpointVirtualIP`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct VirtualIp {
    #[serde(rename = "NetworkID")]
    pub(in crate::docker) network_id: String,
    pub(in crate::docker) addr: String,
}

/// `UpdateStatus`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct UpdateStatus {
    pub(in crate::docker) state: &'static str,
    pub(in crate::docker) started_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) completed_at: Option<String>,
    pub(in crate::docker) message: String,
}

/// `ServiceStatus`.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct ServiceStatus {
    pub(in crate::docker) running_tasks: u64,
    pub(in crate::docker) desired_tasks: u64,
    pub(in crate::docker) completed_tasks: u64,
}

/// `Task`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Task {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    pub(in crate::docker) version: Version,
    pub(in crate::docker) created_at: String,
    pub(in crate::docker) updated_at: String,
    pub(in crate::docker) labels: Labels,
    pub(in crate::docker) spec: TaskTemplate,
    #[serde(rename = "ServiceID")]
    pub(in crate::docker) service_id: String,
    #[serde(skip_serializing_if = "is_zero")]
    pub(in crate::docker) slot: u64,
    #[serde(rename = "NodeID", skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) node_id: String,
    pub(in crate::docker) status: TaskStatus,
    pub(in crate::docker) desired_state: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::docker) networks_attachments: Vec<NetworkAttachment>,
    pub(in crate::docker) volumes: (),
}

/// `TaskStatus`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct TaskStatus {
    pub(in crate::docker) timestamp: String,
    pub(in crate::docker) state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) err: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) container_status: Option<ContainerStatus>,
    pub(in crate::docker) port_status: PortStatus,
}

/// `ContainerStatus`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct ContainerStatus {
    #[serde(rename = "ContainerID")]
    pub(in crate::docker) container_id: String,
    #[serde(rename = "PID")]
    pub(in crate::docker) pid: u32,
    pub(in crate::docker) exit_code: i32,
}

/// `PortStatus`: the task's ports in host mode.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct PortStatus {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::docker) ports: Vec<PortConfig>,
}

/// `NetworkAttachment` of a task.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct NetworkAttachment {
    pub(in crate::docker) network: TaskNetwork,
    pub(in crate::docker) addresses: Vec<String>,
}

/// `swarm.Network`: a network as tasks show it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct TaskNetwork {
    #[serde(rename = "ID")]
    pub(in crate::docker) id: String,
    pub(in crate::docker) version: Version,
    pub(in crate::docker) created_at: String,
    pub(in crate::docker) updated_at: String,
    pub(in crate::docker) spec: TaskNetworkSpec,
    pub(in crate::docker) driver_state: Driver,
    #[serde(rename = "IPAMOptions")]
    pub(in crate::docker) ipam_options: IpamOptions,
}

/// `swarm.NetworkSpec`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct TaskNetworkSpec {
    pub(in crate::docker) name: String,
    pub(in crate::docker) labels: Labels,
    pub(in crate::docker) driver_configuration: Driver,
    #[serde(rename = "IPv6Enabled", skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::docker) ipv6_enabled: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::docker) internal: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::docker) attachable: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::docker) ingress: bool,
    pub(in crate::docker) scope: &'static str,
}

/// `Driver`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Driver {
    pub(in crate::docker) name: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(in crate::docker) options: BTreeMap<String, String>,
}

/// `IPAMOptions`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct IpamOptions {
    pub(in crate::docker) driver: Driver,
    pub(in crate::docker) configs: Vec<TaskIpamConfig>,
}

/// `swarm.IPAMConfig`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct TaskIpamConfig {
    pub(in crate::docker) subnet: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) range: String,
    pub(in crate::docker) gateway: String,
}

/// `Swarm` of `docker info`: the local node's view.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct SwarmInfo {
    #[serde(rename = "NodeID")]
    pub(in crate::docker) node_id: String,
    pub(in crate::docker) node_addr: String,
    pub(in crate::docker) local_node_state: &'static str,
    pub(in crate::docker) control_available: bool,
    pub(in crate::docker) error: String,
    pub(in crate::docker) remote_managers: Option<Vec<RemoteManager>>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(in crate::docker) nodes: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub(in crate::docker) managers: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) cluster: Option<Swarm>,
}

/// `Peer`: a manager that the node knows.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct RemoteManager {
    #[serde(rename = "NodeID")]
    pub(in crate::docker) node_id: String,
    pub(in crate::docker) addr: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's skip_serializing_if passes a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}
