//! A task's attachments: where they are, and their part in balancing.

use std::cell::OnceCell;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use mesh_api::id::{NetworkId, NodeId, TaskId};
use mesh_api::table::{EndpointRecord, NodeState, Table, TaskRecord, TaskState};

use super::{Attachment, AttachmentKey, Local, LocalEndpoint, Part, Place, is_encrypted};

/// Where tasks are: what planning one needs to know beside its record.
#[derive(Debug)]
pub struct Places<'a> {
    table: &'a Table,
    node: &'a NodeId,
    absent: &'a BTreeSet<AttachmentKey>,
    silent: &'a BTreeSet<IpAddr>,
    answering: &'a BTreeSet<IpAddr>,
    endpoints: &'a [LocalEndpoint],
    /// Host sides of this node's tasks' interfaces; most changes are of other nodes' tasks.
    ifindexes: OnceCell<HashMap<(&'a TaskId, &'a NetworkId), u32>>,
}

impl<'a> Places<'a> {
    /// Places under `table`, as the node with the facts `local` sees them.
    pub fn new(table: &'a Table, local: &'a Local) -> Self {
        let Local { node, absent, silent, answering, endpoints, .. } = local;
        Self { table, node, absent, silent, answering, endpoints, ifindexes: OnceCell::new() }
    }

    /// A task's attachments; none once it has ended. Its service's record may be gone already.
    pub fn plan_task(&self, task: &TaskRecord) -> Vec<(AttachmentKey, Attachment)> {
        let Some(node) = self.table.nodes.get(&task.node) else { return Vec::new() };
        if task.observed.is_terminal() {
            return Vec::new();
        }
        let is_own = task.node == *self.node;
        let silent = !is_own && self.silent.contains(&node.vtep);
        // The managers have lost the node. While its host answers, its tasks may: what they were asked they go on with.
        let lost = node.state == NodeState::Down;
        let gone = lost && !is_own && !self.answering.contains(&node.vtep);
        let part = if task.observed != TaskState::Running || gone {
            Part::None
        } else if lost || task.desired > TaskState::Running {
            Part::Draining
        } else {
            Part::Serving { weight: task.weight.max(1) }
        };
        let planned = task.endpoints.iter().enumerate().filter_map(|(position, endpoint)| {
            let network = self.table.networks.get(&endpoint.network)?;
            let key = AttachmentKey { incarnation: task.incarnation, vni: network.vni };
            if self.absent.contains(&key) {
                return None;
            }
            let attachment = Attachment {
                addr: endpoint.addr.into(),
                addr6: network.subnet6.map(|subnet| subnet.addr_of(endpoint.addr).into()),
                place: self.place(task, endpoint)?,
                encrypted: network.encrypted,
                encrypted_backend: is_encrypted(
                    self.table,
                    network,
                    task.endpoints.iter().map(|endpoint| &endpoint.network),
                ),
                part,
                silent,
                first: position == 0,
            };
            Some((key, attachment))
        });
        planned.collect()
    }

    /// Where a task's endpoint is; `None` if it is to be on this node and isn't attached.
    fn place(&self, task: &TaskRecord, endpoint: &EndpointRecord) -> Option<Place> {
        if task.node != *self.node {
            return Some(Place::There(self.table.nodes.get(&task.node)?.vtep));
        }
        let interface = |one: &'a LocalEndpoint| ((&one.task, &one.network), one.ifindex);
        let ifindexes = self.ifindexes.get_or_init(|| self.endpoints.iter().map(interface).collect());
        let ifindex = *ifindexes.get(&(&task.id, &endpoint.network))?;
        Some(Place::Here { ifindex })
    }
}
