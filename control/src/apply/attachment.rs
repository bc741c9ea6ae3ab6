//! What runs on a node already gets an endpoint on a network.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::session::AttachmentSpec;
use mesh_api::table::TaskState;

use super::task::next_incarnation;
use super::{Draft, validate};
use crate::model::{Network, State, Task, TaskEndpoint, TaskStatus, TaskTemplate, WARM};
use crate::refusal::Refusal;

/// Most aliases of an attachment.
const ALIASES_MAX: usize = 32;

/// Makes an attachment: a task that its node has had from the start.
pub(super) fn attach(
    draft: &mut Draft,
    id: &TaskId,
    node: &NodeId,
    spec: &AttachmentSpec,
) -> Result<(), Refusal> {
    let AttachmentSpec { network, name, aliases, addr } = spec;
    if draft.state.tasks.contains_key(id) {
        return Err(Refusal::IdTaken(id.to_string()));
    }
    let encrypts = draft.node(node)?.encrypts();
    let network = find(&draft.state, network)?;
    if network.is_encrypted() && !encrypts {
        let problem = format!(
            "{} is encrypted, and this node has no encrypted way to the others: its agent's log says why",
            network.spec.name
        );
        return Err(Refusal::invalid("network", problem));
    }
    check_names(&draft.state, &network, name, aliases)?;
    let addr = match addr {
        Some(addr) => {
            draft.claim_address(&network.id, *addr)?;
            *addr
        }
        None => draft.take_address(&network.id).ok_or_else(|| exhausted(&network))?,
    };
    let task = Task {
        id: id.clone(),
        meta: draft.fresh_meta(),
        service: ServiceId::from(""),
        service_name: name.clone(),
        slot: 0,
        node: Some(node.clone()),
        template: Arc::new(TaskTemplate::default()),
        spec_version: 0,
        host_ports: Vec::new(),
        endpoints: vec![TaskEndpoint {
            network: network.id.clone(),
            addr: Some(addr),
            aliases: aliases.clone(),
        }],
        egress: Vec::new(),
        incarnation: next_incarnation(draft),
        desired: TaskState::Running,
        status: TaskStatus {
            state: TaskState::Assigned,
            since_ns: draft.at_ns,
            message: "attachment asked for by its node".to_owned(),
            err: String::new(),
            pid: None,
            exit_code: None,
        },
        running_since_ns: 0,
        warmth: WARM,
        ended_ns: 0,
        start_at_ns: 0,
        start_after: None,
        restarts_ns: Vec::new(),
    };
    draft.put_task(task);
    Ok(())
}

/// The attachable network of this id or name.
fn find(state: &State, wanted: &str) -> Result<Arc<Network>, Refusal> {
    let found = state.networks.get(&NetworkId::from(wanted)).or_else(|| state.network_by_name(wanted));
    let network = found.ok_or_else(|| Refusal::NoSuchNetwork(wanted.to_owned()))?;
    if !network.spec.attachable {
        let problem = format!(
            "{wanted} is not attachable: networks are when they are made with `docker network create --attachable`"
        );
        return Err(Refusal::invalid("network", problem));
    }
    Ok(Arc::clone(network))
}

fn check_names(state: &State, network: &Network, name: &str, aliases: &[String]) -> Result<(), Refusal> {
    validate::name("name", name)?;
    if aliases.len() > ALIASES_MAX {
        let problem = format!("{} are more than the {ALIASES_MAX} that there can be", aliases.len());
        return Err(Refusal::invalid("alias", problem));
    }
    let mut seen = BTreeSet::new();
    for alias in aliases {
        for part in alias.split('.') {
            validate::name("alias", part)?;
        }
        if !seen.insert(alias.to_ascii_lowercase()) {
            return Err(Refusal::invalid("alias", format!("{alias} is given twice")));
        }
    }
    let service = state.services.values().find(|service| service.spec.name.eq_ignore_ascii_case(name));
    let is_here = |vip: &crate::model::Vip| vip.network == network.id;
    let holder = if service.is_some_and(|service| service.endpoint.vips.iter().any(is_here)) {
        "a service"
    } else if named(state, name, &network.id).is_some() {
        "another attachment"
    } else {
        return Ok(());
    };
    let problem = format!("{holder} on network {} is called {name}: choose another name", network.spec.name);
    Err(Refusal::conflict("name", problem))
}

/// The attachment that has this name in a network.
pub(super) fn named<'s>(state: &'s State, name: &str, network: &NetworkId) -> Option<&'s Arc<Task>> {
    state.attachments().find(|task| {
        task.is_wanted()
            && !task.has_ended()
            && task.service_name.eq_ignore_ascii_case(name)
            && task.endpoints.iter().any(|endpoint| endpoint.network == *network)
    })
}

fn exhausted(network: &Network) -> Refusal {
    let problem = format!(
        "network {} has no free address: each is taken, or was a moment ago and nodes have yet to forget it. Try again in \
         some seconds, or give it another subnet",
        network.spec.name
    );
    Refusal::conflict("network", problem)
}
