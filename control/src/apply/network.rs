//! Networks come and go.

use std::sync::Arc;

use mesh_api::id::NetworkId;
use mesh_api::table::TaskState;

use super::alloc6::{check_gateway, reserve};
use super::service::needs_ingress;
use super::{Draft, validate};
use crate::model::{IpamConfig, Network, NetworkSpec, Service};
use crate::refusal::Refusal;

pub(super) fn create(draft: &mut Draft, id: &NetworkId, spec: &NetworkSpec) -> Result<(), Refusal> {
    if draft.state.networks.contains_key(id) {
        return Err(Refusal::IdTaken(id.to_string()));
    }
    validate::network(spec)?;
    if draft.state.network_by_name(&spec.name).is_some() {
        return Err(Refusal::NameTaken { kind: "network".into(), name: spec.name.clone() });
    }
    if let Some(ingress) = draft.state.ingress().filter(|_| spec.ingress) {
        return Err(Refusal::IngressExists(ingress.id.clone()));
    }
    let mut subnets = draft.choose_subnets(&spec.ipam)?;
    let vni = draft.take_vni()?;
    let ipv6 = draft.choose_subnet6(spec, vni, &subnets)?;
    if let (Some(ipv6), Some(config)) = (&ipv6, &spec.ipam6) {
        reserve(&mut subnets, ipv6, config);
    }
    let meta = draft.fresh_meta();
    draft.put_network(Network { id: id.clone(), meta, spec: spec.clone(), vni, subnets, subnet6: ipv6 });
    Ok(())
}

/// Gives a network another subnet; what its tasks and services have stays.
pub(super) fn add_subnet(draft: &mut Draft, id: &NetworkId, config: &IpamConfig) -> Result<(), Refusal> {
    let mut network = Network::clone(draft.network(id)?);
    let mut added = draft.choose_subnets(std::slice::from_ref(config))?;
    if let (Some(ipv6), Some(config)) = (&network.subnet6, &network.spec.ipam6) {
        let gateway = network.subnets.first().map(|subnet| subnet.gateway);
        check_gateway(ipv6.gateway, gateway, &added)?;
        reserve(&mut added, ipv6, config);
    }
    if network.spec.ipam.is_empty() {
        // The automatic one that it was made with.
        network.spec.ipam.push(IpamConfig::default());
    }
    network.spec.ipam.push(config.clone());
    network.subnets.extend(added);
    draft.touch(&mut network.meta);
    draft.put_network(network);
    Ok(())
}

pub(super) fn remove(draft: &mut Draft, id: &NetworkId) -> Result<(), Refusal> {
    let is_ingress = draft.network(id)?.spec.ingress;
    let uses = |service: &&Arc<Service>| {
        let spec = &service.spec;
        (is_ingress && needs_ingress(&spec.task, &spec.endpoint))
            || spec.task.networks.iter().any(|network| network.target == *id)
    };
    if let Some(service) = draft.state.services.values().find(uses) {
        let (network, service) = (id.clone(), service.id.clone());
        return Err(if is_ingress {
            Refusal::IngressNeeded(service)
        } else {
            Refusal::NetworkUsedByService { network, service }
        });
    }
    // Tasks that are to run; one that is only left to end doesn't hold its network back (SwarmKit's rule, which
    // `docker stack rm` relies on).
    if draft.state.lookup.is_network_used(id) {
        let on_it = |task: &crate::model::Task| {
            task.desired <= TaskState::Running
                && !task.has_ended()
                && task.endpoints.iter().any(|endpoint| endpoint.network == *id)
        };
        if let Some(task) = draft.state.tasks.values().find(|task| on_it(task)) {
            return Err(Refusal::NetworkUsedByTask { network: id.clone(), task: task.id.clone() });
        }
    }
    draft.remove_network(id);
    Ok(())
}
