//! Services come, change and go.

use std::net::Ipv4Addr;

use mesh_api::id::{NetworkId, ServiceId, TaskId};
use mesh_api::table::{EndpointMode, PublishMode, TaskState};

use super::{Draft, ports, task, validate};
use crate::model::{
    Endpoint, EndpointSpec, Mode, Service, ServiceSpec, TaskTemplate, UpdateState, UpdateStatus, Vip,
};
use crate::refusal::Refusal;

/// Whether a service has a port that answers on every node.
pub(crate) fn publishes_in_ingress(endpoint: &EndpointSpec) -> bool {
    endpoint.ports.iter().any(|port| port.mode == PublishMode::Ingress)
}

/// Whether a service's tasks are on the ingress network: it publishes a port in it, or has no other network for the way
/// out.
pub(super) fn needs_ingress(template: &TaskTemplate, endpoint: &EndpointSpec) -> bool {
    publishes_in_ingress(endpoint) || template.networks.is_empty()
}

pub(super) fn create(draft: &mut Draft, id: &ServiceId, spec: &ServiceSpec) -> Result<(), Refusal> {
    if draft.state.services.contains_key(id) {
        return Err(Refusal::IdTaken(id.to_string()));
    }
    validate::service(&draft.state, spec)?;
    if draft.state.service_by_name(&spec.name).is_some() {
        return Err(Refusal::NameTaken { kind: "service".into(), name: spec.name.clone() });
    }
    let endpoint = endpoint(draft, id, spec, &Endpoint::default())?;
    let meta = draft.fresh_meta();
    draft.put_service(Service {
        id: id.clone(),
        meta,
        spec: spec.clone(),
        spec_version: draft.index,
        previous_spec: None,
        endpoint,
        update_status: None,
    });
    Ok(())
}

pub(super) fn update(
    draft: &mut Draft,
    id: &ServiceId,
    version: u64,
    spec: &ServiceSpec,
) -> Result<(), Refusal> {
    let service = Service::clone(draft.service(id)?);
    if service.meta.version != version {
        return Err(Refusal::OutOfSequence);
    }
    if service.spec.name != spec.name {
        return Err(Refusal::Rename);
    }
    if matches!(service.spec.mode, Mode::Global) != matches!(spec.mode, Mode::Global) {
        return Err(Refusal::ModeChange);
    }
    let previous = service.spec.clone();
    respecify(draft, service, spec.clone(), Some(previous), None)
}

/// An operator's rollback; a second one undoes the first.
pub(super) fn rollback(draft: &mut Draft, id: &ServiceId, version: u64) -> Result<(), Refusal> {
    let service = Service::clone(draft.service(id)?);
    if service.meta.version != version {
        return Err(Refusal::OutOfSequence);
    }
    let spec = service.previous_spec.clone().ok_or_else(|| Refusal::NoPreviousSpec(id.clone()))?;
    let previous = service.spec.clone();
    let status = rollback_status(draft, "manually requested rollback");
    respecify(draft, service, *spec, Some(previous), Some(status))
}

/// The rollback of a failed update; there is nothing to return to after it.
pub(super) fn roll_back_failed(draft: &mut Draft, id: &ServiceId, message: &str) -> Result<(), Refusal> {
    let service = Service::clone(draft.service(id)?);
    let spec = service.previous_spec.clone().ok_or_else(|| Refusal::NoPreviousSpec(id.clone()))?;
    let status = rollback_status(draft, message);
    respecify(draft, service, *spec, None, Some(status))
}

fn rollback_status(draft: &Draft, message: &str) -> UpdateStatus {
    UpdateStatus {
        state: UpdateState::RollbackStarted,
        started_ns: draft.at_ns,
        completed_ns: None,
        message: message.to_owned(),
    }
}

/// Gives a service another specification.
fn respecify(
    draft: &mut Draft,
    mut service: Service,
    spec: ServiceSpec,
    previous: Option<ServiceSpec>,
    status: Option<UpdateStatus>,
) -> Result<(), Refusal> {
    validate::service(&draft.state, &spec)?;
    service.endpoint = endpoint(draft, &service.id, &spec, &service.endpoint)?;
    service.spec = spec;
    service.previous_spec = previous.map(Box::new);
    service.spec_version = draft.index;
    service.update_status = status;
    draft.touch(&mut service.meta);
    draft.put_service(service);
    Ok(())
}

pub(super) fn remove(draft: &mut Draft, id: &ServiceId) -> Result<(), Refusal> {
    draft.service(id)?;
    draft.remove_service(id);
    let tasks: Vec<TaskId> = draft.state.tasks_of_service(id).map(|task| task.id.clone()).collect();
    for id in tasks {
        task::set_desired(draft, &id, TaskState::Remove);
    }
    Ok(())
}

/// Ports and VIPs for `spec`; what `old` has and `spec` still asks for stays.
fn endpoint(
    draft: &mut Draft,
    id: &ServiceId,
    spec: &ServiceSpec,
    old: &Endpoint,
) -> Result<Endpoint, Refusal> {
    let ports = ports::allocate(draft, id, &spec.endpoint, &old.ports)?;
    let ingress = draft.state.ingress().filter(|_| publishes_in_ingress(&spec.endpoint));
    let ingress = ingress.map(|network| (network.id.clone(), Vec::new()));
    let others = spec.task.networks.iter().map(|network| (network.target.clone(), network.aliases.clone()));
    let networks: Vec<(NetworkId, Vec<String>)> = ingress.into_iter().chain(others).collect();
    let mut vips = Vec::with_capacity(networks.len());
    for (network, aliases) in networks {
        let addr = match spec.endpoint.mode {
            EndpointMode::Dnsrr => None,
            EndpointMode::Vip => kept_vip(old, &network).or_else(|| draft.take_address(&network)),
        };
        if addr.is_none() && spec.endpoint.mode == EndpointMode::Vip {
            let name = draft.state.networks.get(&network).map_or("", |network| network.spec.name.as_str());
            let warning = format!(
                "network {name} has no free address for the service's virtual IP: the service gets one, and its name \
                 resolves, once an address is free"
            );
            draft.warnings.push(warning);
        }
        vips.push(Vip { network, addr, aliases });
    }
    Ok(Endpoint { ports, vips })
}

fn kept_vip(old: &Endpoint, network: &NetworkId) -> Option<Ipv4Addr> {
    old.vips.iter().find(|vip| vip.network == *network)?.addr
}

/// Whether a service lacks a VIP that it should have.
pub(crate) fn lacks_vip(service: &Service) -> bool {
    service.spec.endpoint.mode == EndpointMode::Vip
        && service.endpoint.vips.iter().any(|vip| vip.addr.is_none())
}

/// Finds the VIPs that a service lacks, as far as there are free addresses.
pub(super) fn allocate_vips(draft: &mut Draft, id: &ServiceId) {
    let Some(service) = draft.state.services.get(id).filter(|service| lacks_vip(service)) else { return };
    let mut service = Service::clone(service);
    for vip in service.endpoint.vips.iter_mut().filter(|vip| vip.addr.is_none()) {
        vip.addr = draft.take_address(&vip.network);
    }
    draft.touch(&mut service.meta);
    draft.put_service(service);
}
