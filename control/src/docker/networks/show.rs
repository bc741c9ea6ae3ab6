//! Networks in the API's words.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use mesh_api::id::{NetworkId, NodeId};
use mesh_api::table::{NetworkRecord, Table, TaskRecord};

use super::VNI_OPTION;
use crate::docker::time::rfc3339;
use crate::docker::wire::answer as task_wire;
use crate::docker::wire::network as wire;
use crate::model::network::{ENCRYPTED_OPTIONS, MTU_OPTION};
use crate::model::{Network, NetworkSpec};

/// The cluster's own record of a network.
pub(in crate::docker) fn network(network: &Network) -> wire::Network {
    let spec = &network.spec;
    wire::Network {
        name: spec.name.clone(),
        id: network.id.to_string(),
        created: rfc3339(network.meta.created_ns),
        scope: "swarm",
        driver: "overlay",
        enable_ipv4: true,
        enable_ipv6: network.subnet6.is_some(),
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
pub(super) fn record(network: &NetworkRecord) -> wire::Network {
    let ipv4 = network.subnets.iter().map(|subnet| ipam_config(subnet.cidr, subnet.gateway));
    let ipv6 = network.subnet6.map(|subnet| ipam_config(subnet.cidr, subnet.gateway));
    wire::Network {
        name: network.name.clone(),
        id: network.id.to_string(),
        created: rfc3339(0),
        scope: "swarm",
        driver: "overlay",
        enable_ipv4: true,
        enable_ipv6: network.subnet6.is_some(),
        ipam: wire::Ipam { driver: "default", options: None, config: ipv4.chain(ipv6).collect() },
        internal: network.internal,
        attachable: false,
        ingress: network.ingress,
        config_from: wire::ConfigFrom::default(),
        config_only: false,
        containers: BTreeMap::new(),
        options: record_options(network),
        labels: BTreeMap::new(),
        peers: Vec::new(),
        services: None,
    }
}

/// The subnets, with the ranges and auxiliary addresses that were asked for.
fn configs(network: &Network) -> Vec<wire::IpamConfig> {
    let NetworkSpec { ipam, ipam6, .. } = &network.spec;
    // One automatic subnet was asked for by saying nothing.
    let asked = ipam.iter().map(Some).chain(std::iter::repeat(None));
    let ipv4 = network.subnets.iter().zip(asked).map(|(subnet, asked)| wire::IpamConfig {
        ip_range: asked.and_then(|asked| asked.range).map(|range| range.to_string()).unwrap_or_default(),
        auxiliary_addresses: asked.map(|asked| texts(&asked.aux)).unwrap_or_default(),
        ..ipam_config(subnet.cidr, subnet.gateway)
    });
    let ipv6 = network.subnet6.map(|subnet| wire::IpamConfig {
        auxiliary_addresses: ipam6.as_ref().map(|asked| texts(&asked.aux)).unwrap_or_default(),
        ..ipam_config(subnet.cidr, subnet.gateway)
    });
    ipv4.chain(ipv6).collect()
}

fn ipam_config(subnet: impl Into<IpNet>, gateway: impl Into<IpAddr>) -> wire::IpamConfig {
    wire::IpamConfig {
        subnet: subnet.into().to_string(),
        ip_range: String::new(),
        gateway: gateway.into().to_string(),
        auxiliary_addresses: BTreeMap::new(),
    }
}

fn texts<A: ToString>(addresses: &BTreeMap<String, A>) -> BTreeMap<String, String> {
    addresses.iter().map(|(name, addr)| (name.clone(), addr.to_string())).collect()
}

fn record_options(network: &NetworkRecord) -> BTreeMap<String, String> {
    let mtu = network.mtu.map(|mtu| (MTU_OPTION.to_owned(), mtu.to_string()));
    let encrypted = network.encrypted.then(|| (ENCRYPTED_OPTIONS[0].to_owned(), String::new()));
    mtu.into_iter().chain(encrypted).chain([(VNI_OPTION.to_owned(), network.vni.to_string())]).collect()
}

fn options(network: &Network) -> BTreeMap<String, String> {
    let mut options = network.spec.options.clone();
    options.insert(VNI_OPTION.to_owned(), network.vni.to_string());
    options
}

/// The endpoints of a network, with their tasks.
pub(super) fn endpoints<'t>(
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
pub(super) fn add_local_view(network: &mut wire::Network, table: &Table, node: &NodeId, verbose: bool) {
    let id = NetworkId::from(network.id.as_str());
    let Some(record) = table.networks.get(&id) else { return };
    let with_prefix = |addr: Ipv4Addr| {
        let subnet = record.subnets.iter().find(|subnet| subnet.cidr.contains(&addr));
        subnet.map_or_else(|| addr.to_string(), |subnet| format!("{addr}/{}", subnet.cidr.prefix_len()))
    };
    let with_prefix6 = |addr: Ipv4Addr| {
        let subnet = record.subnet6.as_ref();
        subnet.map_or_else(String::new, |subnet| {
            format!("{}/{}", subnet.addr_of(addr), subnet.cidr.prefix_len())
        })
    };
    let mut peers = BTreeSet::new();
    for (task, addr) in endpoints(table, &id) {
        if let Some(peer) = table.nodes.get(&task.node) {
            peers.insert(wire::Peer { name: peer.hostname.clone(), ip: peer.vtep.to_string() });
        }
        if task.node == *node {
            let resource = wire::EndpointResource {
                name: task.name.to_string(),
                endpoint_id: endpoint_id(task, &id),
                mac_address: mac(addr),
                ipv4_address: with_prefix(addr),
                ipv6_address: with_prefix6(addr),
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
            name: task.name.to_string(),
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

fn task_config(config: wire::IpamConfig) -> task_wire::TaskIpamConfig {
    let wire::IpamConfig { subnet, ip_range: range, gateway, auxiliary_addresses: _ } = config;
    task_wire::TaskIpamConfig { subnet, range, gateway }
}

/// A network as a task shows it.
pub(in crate::docker) fn in_task(network: &Network) -> task_wire::TaskNetwork {
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
            ipv6_enabled: network.subnet6.is_some(),
            internal: spec.internal,
            attachable: spec.attachable,
            ingress: spec.ingress,
            scope: "swarm",
        },
        driver_state: driver("overlay", options(network)),
        ipam_options: task_wire::IpamOptions {
            driver: driver("default", BTreeMap::new()),
            configs: configs(network).into_iter().map(task_config).collect(),
        },
    }
}
