//! What objects must be like, whoever asks for them. Texts are SwarmKit's where it has one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::Ipv4Net;
use mesh_api::id::NodeId;
use mesh_api::session::{NodeDescription, ROUTES_MAX};
use mesh_api::table::{EndpointMode, PublishMode};

use super::service::needs_ingress;
use crate::model::constraint::parse_all;
use crate::model::network::MTU_MAX;
use crate::model::{EndpointSpec, Mode, NetworkSpec, ServiceSpec, State, labels};
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

/// SwarmKit's rule: letters and digits, with `-` and `_` between them.
fn name(field: &'static str, name: &str) -> Result<(), Refusal> {
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
    // `--opt encrypted=false` asks for what is the case.
    if spec.options.get("encrypted").is_some_and(|value| value != "false") {
        // Taking the option and sending cleartext would be worse than refusing it.
        return Err(Refusal::Unsupported("this version of Shoal does not encrypt overlay networks"));
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
