//! What changes of the table touch of the dataplane: what is to be planned again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::table::{Change, NetworkRecord, NodeRecord, NodeState, ServiceRecord, Table, TaskRecord};
use mesh_api::wireguard::WireguardIdentity;

/// Which parts of a table changed since it was looked at last.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Touched {
    /// Whether the cluster's record changed, or the whole table.
    pub all: bool,
    /// Whether nodes changed in what others reach them by.
    pub nodes: bool,
    /// Whether networks changed.
    pub networks: bool,
    /// The services that changed, or that are on networks that did.
    pub services: BTreeSet<ServiceId>,
    /// The tasks that changed, came or went, or whose nodes or networks did, with their incarnations, by their service.
    pub tasks: BTreeMap<ServiceId, BTreeMap<TaskId, u32>>,
}

impl Touched {
    /// Everything.
    pub fn all() -> Self {
        Self { all: true, ..Self::default() }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        let Self { all, nodes, networks, services, tasks } = self;
        !all && !nodes && !networks && services.is_empty() && tasks.is_empty()
    }

    /// Notes a change that `table` is about to get.
    pub fn note(&mut self, table: &Table, change: &Change) {
        if self.all {
            return;
        }
        match change {
            Change::Cluster(_) => *self = Self::all(),
            Change::Node(record) => self.note_node(table, &record.id, Some(record)),
            Change::NodeRemoved(id) => self.note_node(table, id, None),
            Change::Network(NetworkRecord { id, .. }) | Change::NetworkRemoved(id) => {
                self.note_network(table, id);
            }
            Change::Service(record) => drop(self.services.insert(record.id.clone())),
            Change::ServiceRemoved(id) => drop(self.services.insert(id.clone())),
            Change::Task(record) => {
                self.note_task(record);
                // An id is one task's for good. Should it not be, the former one is looked for everywhere.
                let former = table.tasks.get(&record.id);
                let is_another = |former: &TaskRecord| {
                    former.incarnation != record.incarnation || former.service != record.service
                };
                if former.is_some_and(is_another) {
                    *self = Self::all();
                }
            }
            Change::TaskRemoved(id) => {
                if let Some(record) = table.tasks.get(id) {
                    self.note_task(record);
                }
            }
        }
    }

    /// Notes that a node becomes `next`, or goes. Of most changes of a node nothing follows for the dataplane.
    fn note_node(&mut self, table: &Table, id: &NodeId, next: Option<&NodeRecord>) {
        let former = table.nodes.get(id).map(Reached::of);
        let next = next.map(Reached::of);
        self.nodes |= former != next;
        if former.map(|node| node.of_tasks) != next.map(|node| node.of_tasks) {
            let tasks = table.tasks.values().filter(|task| task.node == *id);
            tasks.for_each(|task| self.note_task(task));
        }
    }

    /// Notes that a network changes, with all that is on it.
    fn note_network(&mut self, table: &Table, id: &NetworkId) {
        self.networks = true;
        let is_on = |service: &&ServiceRecord| service.vips.iter().any(|vip| vip.network == *id);
        let services = table.services.values().filter(is_on);
        self.services.extend(services.map(|service| service.id.clone()));
        let is_on = |task: &&TaskRecord| task.endpoints.iter().any(|endpoint| endpoint.network == *id);
        table.tasks.values().filter(is_on).for_each(|task| self.note_task(task));
    }

    /// Notes that a task is to be looked at.
    pub fn note_task(&mut self, task: &TaskRecord) {
        if !self.all {
            let tasks = self.tasks.entry(task.service.clone()).or_default();
            tasks.insert(task.id.clone(), task.incarnation);
        }
    }

    /// Whether a task is to be looked at.
    pub fn has_task(&self, id: &TaskId) -> bool {
        self.all || self.tasks.values().any(|tasks| tasks.contains_key(id))
    }

    /// Adds what came later.
    pub fn merge(&mut self, later: Self) {
        if self.all || later.all {
            *self = Self::all();
            return;
        }
        let Self { all: _, nodes, networks, services, tasks } = later;
        self.nodes |= nodes;
        self.networks |= networks;
        self.services.extend(services);
        for (service, tasks) in tasks {
            self.tasks.entry(service).or_default().extend(tasks);
        }
    }

    /// The services of which anything is to be planned again.
    pub fn service_ids(&self) -> BTreeSet<&ServiceId> {
        self.services.iter().chain(self.tasks.keys()).collect()
    }
}

/// What is planned by a node's record.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Reached<'a> {
    /// Where its tasks are, and whether they can be there.
    of_tasks: (IpAddr, bool),
    wireguard: &'a [WireguardIdentity],
}

impl<'a> Reached<'a> {
    fn of(node: &'a NodeRecord) -> Self {
        let NodeRecord { id: _, hostname: _, role: _, vtep, state, wireguard, manager: _ } = node;
        Self { of_tasks: (*vtep, *state == NodeState::Down), wireguard }
    }
}
