//! The tasks of a simulated node, which take no time to start and to stop.

use std::collections::BTreeMap;

use mesh_api::id::{NodeId, TaskId};
use mesh_api::session::TaskStatus;
use mesh_api::table::{Table, TaskRecord, TaskState};

use crate::dataplane::{LocalEndpoint, Touched};
use crate::links::MESH_ADDR;
use crate::runtime::layout::now_ns;
use crate::session::Statuses;

/// The node's tasks in the table.
#[derive(Debug)]
pub(super) struct Tasks {
    node: NodeId,
    known: BTreeMap<TaskId, Task>,
    /// Numbers interfaces and aliases.
    endpoints: u32,
}

#[derive(Debug)]
struct Task {
    status: TaskStatus,
    endpoints: Vec<LocalEndpoint>,
}

impl Tasks {
    pub(super) fn new(node: NodeId) -> Self {
        Self { node, known: BTreeMap::new(), endpoints: 0 }
    }

    /// Starts, stops and forgets what the table asks for, given that the rest was looked at before; whether there was
    /// anything.
    pub(super) fn follow(&mut self, table: &Table, touched: &Touched) -> bool {
        let mut changed = false;
        if touched.all {
            let former = self.known.len();
            self.known.retain(|id, _| table.tasks.contains_key(id));
            changed |= self.known.len() != former;
            for task in table.tasks.values() {
                changed |= self.look_at(task);
            }
        }
        for id in touched.tasks.values().flat_map(BTreeMap::keys) {
            changed |= match table.tasks.get(id) {
                Some(task) => self.look_at(task),
                None => self.known.remove(id).is_some(),
            };
        }
        changed
    }

    fn look_at(&mut self, task: &TaskRecord) -> bool {
        if task.node != self.node {
            return false;
        }
        let state = match task.desired {
            desired if desired.is_terminal() => TaskState::Shutdown,
            TaskState::Running if task.spec.is_some() => TaskState::Running,
            // Not to be started yet.
            _ => return false,
        };
        if self.known.get(&task.id).is_some_and(|known| known.status.state >= state) {
            return false;
        }
        let runs = state == TaskState::Running;
        let endpoints = if runs { self.link(task) } else { Vec::new() };
        let status = TaskStatus {
            task: task.id.clone(),
            state,
            since_ns: now_ns(),
            message: if runs { "started" } else { "stopped" }.to_owned(),
            err: String::new(),
            pid: runs.then_some(1),
            exit_code: (!runs).then_some(0),
        };
        self.known.insert(task.id.clone(), Task { status, endpoints });
        true
    }

    fn link(&mut self, task: &TaskRecord) -> Vec<LocalEndpoint> {
        let link = |endpoint: &mesh_api::table::EndpointRecord| {
            self.endpoints += 1;
            LocalEndpoint {
                task: task.id.clone(),
                network: endpoint.network.clone(),
                addr: endpoint.addr,
                ifindex: self.endpoints,
                alias: std::net::Ipv4Addr::from_bits(MESH_ADDR.to_bits() + self.endpoints),
            }
        };
        task.endpoints.iter().map(link).collect()
    }

    /// The links of those that run.
    pub(super) fn endpoints(&self) -> Vec<LocalEndpoint> {
        self.known.values().flat_map(|task| task.endpoints.iter().cloned()).collect()
    }

    /// The states of all.
    pub(super) fn statuses(&self) -> Statuses {
        self.known.iter().map(|(id, task)| (id.clone(), task.status.clone())).collect()
    }
}
