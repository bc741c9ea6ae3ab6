//! What earlier formats left on disk, as this version means it. In format 1, the ingress network had no IPv6 subnet, and
//! labels that begin with `shoal.` were an operator's own. In formats 1 and 2, a freed address could be given out again
//! at once. In formats 1 to 3, no network was encrypted, and up to 4, no service had egress addresses; what they left means
//! the same today.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::apply::ingress_subnet6;
use crate::command::{Action, Command};
use crate::model::labels::PREFIX;
use crate::model::{ClusterObject, Ipam6Config, Network, Node, Service, State};
use crate::refusal::Refusal;

/// A state of format 1, as it would be if this version had led to it.
pub(super) fn state(state: &mut State) -> Result<(), Refusal> {
    if let (Some(cluster), Some(ingress)) = (&state.cluster, state.ingress()) {
        let mut ingress = Network::clone(ingress);
        ingress.spec.ipam6 = Some(Ipam6Config::default());
        ingress.subnet6 = Some(ingress_subnet6(&cluster.id, ingress.vni, &ingress.subnets)?);
        state.networks.insert(ingress.id.clone(), Arc::new(ingress));
    }
    if let Some(cluster) = &state.cluster {
        let mut cluster = ClusterObject::clone(cluster);
        labels(&mut cluster.spec.labels);
        state.cluster = Some(Arc::new(cluster));
    }
    for id in state.nodes.keys().cloned().collect::<Vec<_>>() {
        if let Some(node) = state.nodes.get_mut(&id) {
            labels(&mut Arc::<Node>::make_mut(node).spec.labels);
        }
    }
    for id in state.services.keys().cloned().collect::<Vec<_>>() {
        if let Some(service) = state.services.get_mut(&id) {
            let service = Arc::<Service>::make_mut(service);
            labels(&mut service.spec.labels);
            service.previous_spec.iter_mut().for_each(|spec| labels(&mut spec.labels));
        }
    }
    Ok(())
}

/// Whether a freed address could be given out again at once.
pub(super) fn reuses_at_once(format: u32) -> bool {
    format < 3
}

/// Makes a state ready for such commands: they give out the addresses that they did then.
pub(super) fn begin(state: &mut State) {
    state.counters.acknowledged = u64::MAX;
}

/// After the last such command: from here on, freed addresses rest.
pub(super) fn end(state: &mut State) {
    state.counters.acknowledged = 0;
}

/// A command of format 1, so that it has the same effect and is refused no more than then.
pub(super) fn command(command: &mut Command) {
    match &mut command.action {
        Action::Initialize(genesis) => labels(&mut genesis.spec.labels),
        Action::UpdateCluster { spec, .. } => labels(&mut spec.labels),
        Action::UpdateNode { spec, .. } => labels(&mut spec.labels),
        Action::CreateService { spec, .. } | Action::UpdateService { spec, .. } => labels(&mut spec.labels),
        Action::AddNode { .. }
        | Action::SetNodeStatus { .. }
        | Action::RemoveNode { .. }
        | Action::CreateNetwork { .. }
        | Action::AddSubnet { .. }
        | Action::RotateKeys
        | Action::RemoveNetwork { .. }
        | Action::RollbackService { .. }
        | Action::RemoveService { .. }
        | Action::ReportTasks { .. }
        | Action::Acknowledge { .. }
        | Action::Orchestrate { .. }
        | Action::Attach { .. } => {}
    }
}

fn labels(labels: &mut BTreeMap<String, String>) {
    labels.retain(|label, _| !label.to_ascii_lowercase().starts_with(PREFIX));
}
