//! What objects must be like, whoever asks for them. Texts are SwarmKit's where it has one.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::Ipv4Net;
use mesh_api::id::NodeId;
use mesh_api::session::{ADDRESSES_MAX, NodeDescription, ROUTES_MAX};
use mesh_api::table::{EndpointMode, PublishMode};
use mesh_api::wireguard::{WIREGUARD_IDENTITIES_MAX, WireguardIdentity};

use super::attachment;
use super::service::needs_ingress;
use crate::model::constraint::parse_all;
use crate::model::network::{ENCRYPTED_OPTIONS, MTU_MAX};
use crate::model::{EndpointSpec, Mode, NetworkSpec, Node, ServiceSpec, State, labels};
use crate::refusal::Refusal;

/// Longest name of a service or network.
const NAME_LEN_MAX: usize = 63;
/// Longest host name, RFC 1123.
const HOSTNAME_LEN_MAX: usize = 253;
/// Longest list of uplinks and how they are attached.
const DATAPLANE_LEN_MAX: usize = 1024;
/// Most engine labels of a node.
const LABELS_MAX: usize = 256;
/// Most replicas of a service: beyond any subnet's room in practice, and a bound on what one request can make.
const REPLICAS_MAX: u64 = 100_000;

/// Where a network's MTU is asked for.
const MTU_FIELD: &str = "Options.com.docker.network.driver.mtu";
/// Where encryption is, in the order of [`ENCRYPTED_OPTIONS`].
const ENCRYPTED_FIELDS: [&str; 2] =
    ["Options.encrypted", "Options.com.docker.network.driver.overlay.encrypted"];

/// SwarmKit's rule: letters and digits, with `-` and `_` between them.
pub(super) fn name(field: &'static str, name: &str) -> Result<(), Refusal> {
    if name.is_empty() {
        return Err(Refusal::invalid(field, "name must be provided"));
    }
    if name.len() > NAME_LEN_MAX {
        return Err(Refusal::invalid(field, format!("name must be {NAME_LEN_MAX} characters or fewer")));
    }
    let inner = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    let ends = [name.bytes().next(), name.bytes().last()];
    if !inner || !ends.into_iter().flatten().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(Refusal::invalid(field, "name must be valid as a DNS name component"));
    }
    Ok(())
}

/// Docker's rule for networks allows dots as well.
pub(super) fn network(spec: &NetworkSpec) -> Result<(), Refusal> {
    for part in spec.name.split('.') {
        name("Name", part)?;
    }
    if spec.name.len() > NAME_LEN_MAX {
        return Err(Refusal::invalid("Name", format!("name must be {NAME_LEN_MAX} characters or fewer")));
    }
    if spec.ingress && spec.attachable {
        return Err(Refusal::invalid(
            "Attachable",
            "ingress network cannot be attachable (leave out --attachable)",
        ));
    }
    if spec.ingress && spec.internal {
        let problem = "the ingress network is tasks' way out, and can't be internal (leave out --internal)";
        return Err(Refusal::invalid("Internal", problem));
    }
    if let Err(text) = spec.mtu() {
        let least = spec.mtu_min();
        let problem =
            format!("'{text}' is not an MTU that the network can have: expected {least} to {MTU_MAX}");
        return Err(Refusal::invalid(MTU_FIELD, problem));
    }
    if let Err((option, text)) = spec.encrypted() {
        let [own, prefixed] = ENCRYPTED_FIELDS;
        let field = if option == ENCRYPTED_OPTIONS[0] { own } else { prefixed };
        return Err(Refusal::invalid(field, format!("'{text}' is neither true nor false")));
    }
    Ok(())
}

pub(super) fn address_pools(pools: &[Ipv4Net], subnet_size: u8) -> Result<(), Refusal> {
    let field = "DefaultAddrPool";
    if pools.is_empty() {
        return Err(Refusal::invalid(field, "at least one pool is needed"));
    }
    if !(8..=29).contains(&subnet_size) {
        return Err(Refusal::invalid("SubnetSize", format!("{subnet_size} is not between 8 and 29")));
    }
    for (at, pool) in pools.iter().enumerate() {
        if pool.prefix_len() > subnet_size {
            return Err(Refusal::invalid(field, format!("{pool} is smaller than a /{subnet_size}")));
        }
        let overlaps = |other: &&Ipv4Net| other.contains(pool) || pool.contains(*other);
        if let Some(other) = pools[..at].iter().find(overlaps) {
            return Err(Refusal::invalid(field, format!("{pool} overlaps {other}")));
        }
    }
    Ok(())
}

pub(super) fn description(node: &NodeDescription) -> Result<(), Refusal> {
    let hostname = &node.hostname;
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if hostname.is_empty() || hostname.len() > HOSTNAME_LEN_MAX || !hostname.bytes().all(valid) {
        return Err(Refusal::invalid("hostname", "not a host name"));
    }
    for (field, addr) in [("addr", node.addr), ("vtep", node.vtep)] {
        let unreachable = match addr {
            IpAddr::V4(addr) => addr.is_broadcast(),
            IpAddr::V6(addr) => addr.is_unicast_link_local() || addr.to_ipv4_mapped().is_some(),
        };
        if unreachable || addr.is_unspecified() || addr.is_multicast() || addr.is_loopback() {
            let problem = format!("{addr} is not an address that other nodes can reach");
            return Err(Refusal::invalid(field, problem));
        }
    }
    let long = |text: &String| text.len() > HOSTNAME_LEN_MAX;
    if [&node.os, &node.architecture, &node.version].into_iter().any(long)
        || node.dataplane.len() > DATAPLANE_LEN_MAX
    {
        return Err(Refusal::invalid("description", "a field is too long"));
    }
    if node.routes.len() > ROUTES_MAX {
        let problem = format!("{} are more than the {ROUTES_MAX} that a node can name", node.routes.len());
        return Err(Refusal::invalid("routes", problem));
    }
    if node.addresses.len() > ADDRESSES_MAX {
        let problem =
            format!("{} are more than the {ADDRESSES_MAX} that a node can name", node.addresses.len());
        return Err(Refusal::invalid("addresses", problem));
    }
    let long_label = |(key, value): &(String, String)| key.len() + value.len() > 1024;
    if node.labels.len() > LABELS_MAX || node.labels.iter().any(long_label) {
        return Err(Refusal::invalid("labels", "too many or too long"));
    }
    Ok(())
}

/// Nodes send each other packets over one address family.
pub(super) fn underlay(state: &State, id: &NodeId, vtep: IpAddr) -> Result<(), Refusal> {
    let mut others = state.nodes.values().filter(|node| node.id != *id);
    let Some(other) = others.find(|other| other.description.vtep.is_ipv6() != vtep.is_ipv6()) else {
        return Ok(());
    };
    let (theirs, own) = if vtep.is_ipv6() { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
    let problem = format!(
        "{vtep} is {own}, and the cluster's nodes ({} at {}) exchange data over {theirs}: name an {theirs} address of this \
         host with --data-path-addr",
        other.description.hostname, other.description.vtep
    );
    Err(Refusal::invalid("data path address", problem))
}

/// A node's keys are its own, and lead to addresses and ports that are: packets to it find no other way.
pub(super) fn wireguard(state: &State, id: &NodeId, identities: &[WireguardIdentity]) -> Result<(), Refusal> {
    let refuse = |problem: String| Err(Refusal::invalid("wireguard", problem));
    if identities.len() > WIREGUARD_IDENTITIES_MAX {
        let problem =
            format!("{} are more than the {WIREGUARD_IDENTITIES_MAX} that a node can have", identities.len());
        return refuse(problem);
    }
    let data_path_port = state.cluster.as_ref().map(|cluster| cluster.data_path_port);
    for (at, identity) in identities.iter().enumerate() {
        let WireguardIdentity { public_key: key, port } = identity;
        if *port == 0 || Some(*port) == data_path_port {
            return refuse(format!("key {key}: port {port} is not one that WireGuard can have"));
        }
        for other in &identities[..at] {
            if other.address() == identity.address() {
                return refuse(format!("keys {} and {key} lead to one address", other.public_key));
            }
            if other.port == *port {
                return refuse(format!("keys {} and {key} share port {port}", other.public_key));
            }
        }
        let mut others = state.nodes.values().filter(|node| node.id != *id);
        let has = |node: &&Arc<Node>| {
            node.description.wireguard.iter().any(|other| other.address() == identity.address())
        };
        if let Some(other) = others.find(has) {
            return refuse(format!(
                "key {key} leads to the address of node {} ({}): if this host is a copy of that one, it needs keys of its \
                 own; if it takes that one's place, remove that one with `docker node rm`",
                other.description.hostname, other.id
            ));
        }
    }
    Ok(())
}

pub(super) fn service(state: &State, spec: &ServiceSpec) -> Result<(), Refusal> {
    name("ServiceSpec.Name", &spec.name)?;
    if spec.task.container.image.is_empty() {
        return Err(Refusal::invalid("ContainerSpec", "image reference must be provided"));
    }
    if let Mode::Replicated { replicas } = spec.mode
        && replicas > REPLICAS_MAX
    {
        let problem = format!("{replicas} exceeds the {REPLICAS_MAX} that a service can have");
        return Err(Refusal::invalid("Mode.Replicated.Replicas", problem));
    }
    parse_all(&spec.task.placement.constraints)
        .map_err(|error| Refusal::invalid("Placement.Constraints", error.to_string()))?;
    for (field, config) in [("UpdateConfig", &spec.update), ("RollbackConfig", &spec.rollback)] {
        if config.max_failure_ppm > 1_000_000 {
            return Err(Refusal::invalid(field, "MaxFailureRatio must be from 0 to 1"));
        }
    }
    labels::service(&spec.labels).map_err(Refusal::label("Labels"))?;
    networks(state, spec)?;
    ports(&spec.endpoint)
}

fn networks(state: &State, spec: &ServiceSpec) -> Result<(), Refusal> {
    if needs_ingress(&spec.task, &spec.endpoint) && state.ingress().is_none() {
        return Err(Refusal::NoIngress);
    }
    let mut seen = BTreeSet::new();
    for attachment in &spec.task.networks {
        let target = &attachment.target;
        let network = state.networks.get(target).ok_or_else(|| Refusal::NetworkNotFound(target.clone()))?;
        if network.spec.ingress {
            return Err(Refusal::ExplicitIngress(network.spec.name.clone()));
        }
        if !seen.insert(target) {
            let problem = format!("network {} is listed twice", network.spec.name);
            return Err(Refusal::invalid("TaskTemplate.Networks", problem));
        }
        if attachment::named(state, &spec.name, target).is_some() {
            let (name, network) = (&spec.name, &network.spec.name);
            let problem = format!("an attachment on network {network} is called {name}: choose another name");
            return Err(Refusal::conflict("ServiceSpec.Name", problem));
        }
    }
    Ok(())
}

fn ports(endpoint: &EndpointSpec) -> Result<(), Refusal> {
    let mut seen = BTreeSet::new();
    for port in &endpoint.ports {
        if port.target == 0 {
            return Err(Refusal::invalid("EndpointSpec", "TargetPort must be from 1 to 65535"));
        }
        if endpoint.mode == EndpointMode::Dnsrr && port.mode == PublishMode::Ingress {
            let problem = "port published with ingress mode can't be used with dnsrr mode";
            return Err(Refusal::invalid("EndpointSpec", problem));
        }
        if port.published != 0 && !seen.insert((port.protocol, port.published)) {
            return Err(Refusal::invalid("EndpointSpec", "duplicate published ports provided"));
        }
    }
    Ok(())
}
