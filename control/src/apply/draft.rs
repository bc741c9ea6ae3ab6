//! A state in the making: objects go in and out only here, so that the indexes always follow.

use std::sync::Arc;

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};

use crate::model::lookup::{held_addresses, vips};
use crate::model::{ClusterObject, Meta, Network, Node, Service, State, Task, TaskTemplate};
use crate::refusal::Refusal;

/// A state in the making.
#[derive(Debug)]
pub(crate) struct Draft {
    /// The state so far.
    pub(crate) state: State,
    /// The table index that this leads to.
    pub(crate) index: u64,
    /// The command's time.
    pub(crate) at_ns: u64,
    /// What the operator should know.
    pub(crate) warnings: Vec<String>,
    /// The template that the last task was made with: tasks of one service share it.
    pub(super) template: Option<(ServiceId, u64, Arc<TaskTemplate>)>,
}

impl Draft {
    pub(crate) fn new(state: State, index: u64, at_ns: u64) -> Self {
        Self { state, index, at_ns, warnings: Vec::new(), template: None }
    }

    /// Metadata of an object made by this command.
    pub(super) fn fresh_meta(&self) -> Meta {
        Meta { version: self.index, created_ns: self.at_ns, updated_ns: self.at_ns }
    }

    /// Marks an object as changed by this command.
    pub(super) fn touch(&self, meta: &mut Meta) {
        meta.version = self.index;
        meta.updated_ns = self.at_ns;
    }

    pub(super) fn cluster(&self) -> Result<&ClusterObject, Refusal> {
        self.state.cluster.as_deref().ok_or(Refusal::NotInitialized)
    }

    pub(super) fn node(&self, id: &NodeId) -> Result<&Arc<Node>, Refusal> {
        self.state.nodes.get(id).ok_or_else(|| Refusal::NodeNotFound(id.clone()))
    }

    pub(super) fn network(&self, id: &NetworkId) -> Result<&Arc<Network>, Refusal> {
        self.state.networks.get(id).ok_or_else(|| Refusal::NetworkNotFound(id.clone()))
    }

    pub(super) fn service(&self, id: &ServiceId) -> Result<&Arc<Service>, Refusal> {
        self.state.services.get(id).ok_or_else(|| Refusal::ServiceNotFound(id.clone()))
    }

    pub(super) fn put_cluster(&mut self, cluster: ClusterObject) {
        self.state.cluster = Some(Arc::new(cluster));
    }

    pub(super) fn put_node(&mut self, node: Node) {
        self.state.nodes.insert(node.id.clone(), Arc::new(node));
    }

    pub(super) fn remove_node(&mut self, id: &NodeId) {
        self.state.nodes.remove(id);
    }

    pub(super) fn put_network(&mut self, network: Network) {
        self.state.networks.insert(network.id.clone(), Arc::new(network));
    }

    pub(super) fn remove_network(&mut self, id: &NetworkId) {
        self.state.networks.remove(id);
        self.state.freed.remove(id);
        self.state.lookup.resting.remove(id);
    }

    pub(super) fn put_service(&mut self, service: Service) {
        let old = self.state.services.get(&service.id).cloned();
        if let Some(old) = &old {
            self.state.lookup.remove_service(old);
        }
        self.state.lookup.add_service(&service);
        self.state.services.insert(service.id.clone(), Arc::new(service));
        self.rest(old.iter().flat_map(|old| vips(old)));
    }

    pub(super) fn remove_service(&mut self, id: &ServiceId) {
        if let Some(old) = self.state.services.remove(id) {
            self.state.lookup.remove_service(&old);
            self.rest(vips(&old));
        }
    }

    pub(super) fn put_task(&mut self, task: Task) {
        let old = self.state.tasks.get(&task.id).cloned();
        if let Some(old) = &old {
            self.state.lookup.remove_task(old);
        }
        self.state.lookup.add_task(&task);
        self.state.tasks.insert(task.id.clone(), Arc::new(task));
        self.rest(old.iter().flat_map(|old| held_addresses(old)));
    }

    pub(super) fn remove_task(&mut self, id: &TaskId) {
        if let Some(old) = self.state.tasks.remove(id) {
            self.state.lookup.remove_task(&old);
            self.rest(held_addresses(&old));
        }
    }

    /// Changes a task, if it exists.
    pub(super) fn change_task(&mut self, id: &TaskId, change: impl FnOnce(&mut Task)) {
        let Some(task) = self.state.tasks.get(id) else { return };
        let mut task = Task::clone(task);
        change(&mut task);
        self.touch(&mut task.meta);
        self.put_task(task);
    }
}
