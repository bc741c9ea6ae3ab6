//! Nodes join, live, change and go.

use mesh_api::id::{NodeId, TaskId};
use mesh_api::session::NodeDescription;
use mesh_api::table::{NodeState, Role};
use mesh_api::tls::KeyId;

use super::{Draft, task, validate};
use crate::model::cluster::DEFAULT_CERT_EXPIRY_NS;
use crate::model::{Availability, Node, NodeSpec, NodeStatus, Readmission, labels};
use crate::refusal::Refusal;

/// How long an operator's approval is good, ns: an hour.
const APPROVAL_NS: u64 = 3600 * 1_000_000_000;

pub(super) fn add(
    draft: &mut Draft,
    id: &NodeId,
    role: Role,
    description: &NodeDescription,
    issuer: KeyId,
) -> Result<(), Refusal> {
    if draft.state.nodes.contains_key(id) {
        return Err(Refusal::IdTaken(id.to_string()));
    }
    validate::description(description)?;
    validate::underlay(&draft.state, id, description.vtep)?;
    validate::wireguard(&draft.state, id, &description.wireguard)?;
    let meta = draft.fresh_meta();
    draft.put_node(Node {
        id: id.clone(),
        meta,
        spec_version: meta.version,
        spec: NodeSpec {
            name: String::new(),
            labels: std::collections::BTreeMap::new(),
            role,
            availability: Availability::Active,
        },
        description: description.clone(),
        status: NodeStatus { state: NodeState::Ready, message: String::new(), since_ns: draft.at_ns },
        issuer,
        readmission: Readmission::default(),
    });
    Ok(())
}

fn managers(draft: &Draft) -> usize {
    draft.state.nodes.values().filter(|node| node.spec.role == Role::Manager).count()
}

pub(super) fn set_status(
    draft: &mut Draft,
    id: &NodeId,
    state: NodeState,
    message: &str,
    description: Option<&NodeDescription>,
) -> Result<(), Refusal> {
    let mut node = Node::clone(draft.node(id)?);
    if let Some(description) = description {
        validate::description(description)?;
        validate::underlay(&draft.state, id, description.vtep)?;
        validate::wireguard(&draft.state, id, &description.wireguard)?;
        node.description = description.clone();
    }
    if node.status.state != state {
        node.status.since_ns = draft.at_ns;
    }
    node.status.state = state;
    if state == NodeState::Ready {
        node.readmission = Readmission::default();
    }
    message.clone_into(&mut node.status.message);
    draft.touch(&mut node.meta);
    draft.put_node(node);
    Ok(())
}

pub(super) fn set_issuer(draft: &mut Draft, id: &NodeId, issuer: KeyId) -> Result<(), Refusal> {
    let mut node = Node::clone(draft.node(id)?);
    node.issuer = issuer;
    draft.touch(&mut node.meta);
    draft.put_node(node);
    Ok(())
}

pub(super) fn update(draft: &mut Draft, id: &NodeId, version: u64, spec: &NodeSpec) -> Result<(), Refusal> {
    let mut node = Node::clone(draft.node(id)?);
    if node.spec_version != version {
        return Err(Refusal::OutOfSequence);
    }
    match (node.spec.role, spec.role) {
        (Role::Manager, Role::Worker) if managers(draft) == 1 => return Err(Refusal::LastManager),
        _ => {}
    }
    labels::node(&spec.labels).map_err(Refusal::label("Labels"))?;
    node.spec = spec.clone();
    draft.touch(&mut node.meta);
    node.spec_version = node.meta.version;
    draft.put_node(node);
    Ok(())
}

pub(super) fn note_asking(draft: &mut Draft, id: &NodeId) -> Result<(), Refusal> {
    let node = draft.node(id)?;
    if node.readmission.asking_since_ns.is_some() {
        return Ok(());
    }
    let mut node = Node::clone(node);
    node.readmission.asking_since_ns = Some(draft.at_ns);
    draft.touch(&mut node.meta);
    draft.put_node(node);
    Ok(())
}

pub(super) fn approve(draft: &mut Draft, id: &NodeId) -> Result<(), Refusal> {
    let mut node = Node::clone(draft.node(id)?);
    if node.is_ready() {
        return Err(Refusal::NodeIsReady(id.clone()));
    }
    node.readmission.approved_until_ns = Some(draft.at_ns.saturating_add(APPROVAL_NS));
    draft.touch(&mut node.meta);
    draft.put_node(node);
    Ok(())
}

pub(super) fn readmit(draft: &mut Draft, id: &NodeId) -> Result<(), Refusal> {
    let mut node = Node::clone(draft.node(id)?);
    if !node.is_approved(draft.at_ns) {
        return Err(Refusal::NotApproved(id.clone()));
    }
    node.readmission = Readmission::default();
    draft.touch(&mut node.meta);
    draft.put_node(node);
    Ok(())
}

pub(super) fn remove(draft: &mut Draft, id: &NodeId, force: bool) -> Result<(), Refusal> {
    let node = draft.node(id)?;
    if node.spec.role == Role::Manager {
        return Err(Refusal::NodeIsManager(id.clone()));
    }
    if !node.is_down() && !force {
        return Err(Refusal::NodeNotDown(id.clone()));
    }
    let mut cluster = draft.cluster()?.clone();
    let (now, valid) = (draft.at_ns, cluster.spec.cert_expiry_ns.max(DEFAULT_CERT_EXPIRY_NS));
    let expired: Vec<NodeId> =
        cluster.removed.iter().filter(|(_, until)| **until <= now).map(|(id, _)| id.clone()).collect();
    for id in &expired {
        cluster.removed.remove(id);
    }
    cluster.removed.insert(id.clone(), now.saturating_add(valid));
    draft.put_cluster(cluster);
    draft.remove_node(id);
    let tasks: Vec<TaskId> = draft.state.tasks_of_node(id).map(|task| task.id.clone()).collect();
    for id in tasks {
        task::orphan(draft, &id);
    }
    Ok(())
}
