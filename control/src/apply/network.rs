//! Networks come and go.

use mesh_api::id::NetworkId;
use mesh_api::table::TaskState;

use super::{Draft, validate};
use crate::model::{Network, NetworkSpec};
use crate::refusal::Refusal;

pub(super) fn create(draft: &mut Draft, id: &NetworkId, spec: &NetworkSpec) -> Result<(), Refusal> {
    if draft.state.networks.contains_key(id) {
        return Err(Refusal::IdTaken(id.to_string()));
    }
    validate::network(spec)?;
    if draft.state.network_by_name(&spec.name).is_some() {
        return Err(Refusal::NameTaken { kind: "network", name: spec.name.clone() });
    }
    if let Some(ingress) = draft.state.ingress().filter(|_| spec.ingress) {
        return Err(Refusal::IngressExists(ingress.id.clone()));
    }
    let subnets = draft.choose_subnets(&spec.ipam)?;
    let vni = draft.take_vni()?;
    let ipv6 = draft.choose_subnet6(spec, vni, &subnets)?;
    let meta = draft.fresh_meta();
    draft.put_network(Network { id: id.clone(), meta, spec: spec.clone(), vni, subnets, subnet6: ipv6 });
    Ok(())
}

pub(super) fn remove(draft: &mut Draft, id: &NetworkId) -> Result<(), Refusal> {
    if draft.network(id)?.spec.ingress {
        return Err(Refusal::IngressNeeded);
    }
    let uses = |network: &crate::model::NetworkAttachment| network.target == *id;
    let mut services = draft.state.services.values();
    if let Some(service) = services.find(|service| service.spec.task.networks.iter().any(uses)) {
        return Err(Refusal::NetworkUsedByService { network: id.clone(), service: service.id.clone() });
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
