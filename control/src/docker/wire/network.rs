//! Networks: what `docker network create` sends, and what inspecting shows.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::optional_fields;
use super::spec::Labels;

optional_fields! {
    /// `NetworkCreateRequest`.
    CreateRequest {
        name: String,
        driver: String,
        scope: String,
        internal: bool,
        attachable: bool,
        ingress: bool,
        config_only: bool,
        config_from: Value,
        #[serde(rename = "IPAM")]
        ipam: IpamRequest,
        #[serde(rename = "EnableIPv4")]
        enable_ipv4: bool,
        #[serde(rename = "EnableIPv6")]
        enable_ipv6: bool,
        options: BTreeMap<String, String>,
        labels: Labels,
    }

    /// `IPAM` of a request.
    IpamRequest {
        driver: String,
        config: Vec<IpamConfigRequest>,
        options: BTreeMap<String, String>,
    }

    /// `IPAMConfig` of a request.
    IpamConfigRequest {
        subnet: String,
        #[serde(rename = "IPRange")]
        ip_range: String,
        gateway: String,
        #[serde(alias = "AuxiliaryAddresses")]
        aux_address: BTreeMap<String, String>,
    }
}

/// `network.Inspect`: one network, in a list or by itself.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Network {
    pub(in crate::docker) name: String,
    pub(in crate::docker) id: String,
    pub(in crate::docker) created: String,
    pub(in crate::docker) scope: &'static str,
    pub(in crate::docker) driver: &'static str,
    #[serde(rename = "EnableIPv4")]
    pub(in crate::docker) enable_ipv4: bool,
    #[serde(rename = "EnableIPv6")]
    pub(in crate::docker) enable_ipv6: bool,
    #[serde(rename = "IPAM")]
    pub(in crate::docker) ipam: Ipam,
    pub(in crate::docker) internal: bool,
    pub(in crate::docker) attachable: bool,
    pub(in crate::docker) ingress: bool,
    pub(in crate::docker) config_from: ConfigFrom,
    pub(in crate::docker) config_only: bool,
    pub(in crate::docker) containers: BTreeMap<String, EndpointResource>,
    pub(in crate::docker) options: BTreeMap<String, String>,
    pub(in crate::docker) labels: Labels,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(in crate::docker) peers: Vec<Peer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::docker) services: Option<BTreeMap<String, ServiceInfo>>,
}

/// `IPAM`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Ipam {
    pub(in crate::docker) driver: &'static str,
    pub(in crate::docker) options: Option<BTreeMap<String, String>>,
    pub(in crate::docker) config: Vec<IpamConfig>,
}

/// `IPAMConfig`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct IpamConfig {
    pub(in crate::docker) subnet: String,
    #[serde(rename = "IPRange", skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) ip_range: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(in crate::docker) gateway: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(in crate::docker) auxiliary_addresses: BTreeMap<String, String>,
}

/// `ConfigReference`: always empty here.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct ConfigFrom {
    pub(in crate::docker) network: String,
}

/// `EndpointResource`: a task of this node in the network.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct EndpointResource {
    pub(in crate::docker) name: String,
    #[serde(rename = "EndpointID")]
    pub(in crate::docker) endpoint_id: String,
    pub(in crate::docker) mac_address: String,
    #[serde(rename = "IPv4Address")]
    pub(in crate::docker) ipv4_address: String,
    #[serde(rename = "IPv6Address")]
    pub(in crate::docker) ipv6_address: String,
}

/// `PeerInfo`: a node that has an endpoint in the network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct Peer {
    pub(in crate::docker) name: String,
    #[serde(rename = "IP")]
    pub(in crate::docker) ip: String,
}

/// `ServiceInfo`: a service in the network, in a verbose inspection.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct ServiceInfo {
    #[serde(rename = "VIP")]
    pub(in crate::docker) vip: String,
    pub(in crate::docker) ports: Vec<String>,
    #[serde(rename = "LocalLBIndex")]
    pub(in crate::docker) local_lb_index: u32,
    pub(in crate::docker) tasks: Vec<ServiceInfoTask>,
}

/// `network.Task`: a task of a service, in a verbose inspection.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(in crate::docker) struct ServiceInfoTask {
    pub(in crate::docker) name: String,
    #[serde(rename = "EndpointID")]
    pub(in crate::docker) endpoint_id: String,
    #[serde(rename = "EndpointIP")]
    pub(in crate::docker) endpoint_ip: String,
    pub(in crate::docker) info: BTreeMap<String, String>,
}
