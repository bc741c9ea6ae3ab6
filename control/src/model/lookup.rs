//! Indexes over the state: which addresses are taken, which tasks a service or a node has, which names exist.
//!
//! They follow from the objects alone, so a snapshot doesn't carry them: [`Lookup::of`] builds them again.

use std::net::Ipv4Addr;

use imbl::{OrdMap, OrdSet};
use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};

use super::{Service, SlotKey, State, Task};

/// Indexes over a [`State`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lookup {
    /// Addresses of tasks that have not ended, and VIPs, by network. Gateways are not among them.
    pub addresses: OrdMap<NetworkId, OrdSet<Ipv4Addr>>,
    /// Addresses that rest, by network: as [`State::freed`] has them, without the order.
    pub resting: OrdMap<NetworkId, OrdSet<Ipv4Addr>>,
    /// Tasks by service, including those of services that are gone.
    pub tasks_by_service: OrdMap<ServiceId, OrdSet<TaskId>>,
    /// The same by their places in it.
    pub tasks_by_slot: OrdMap<ServiceId, OrdSet<(SlotKey, TaskId)>>,
    /// Tasks by node.
    pub tasks_by_node: OrdMap<NodeId, OrdSet<TaskId>>,
    /// Services by name.
    pub service_names: OrdMap<String, ServiceId>,
}

impl Lookup {
    /// Builds the indexes of `state`.
    pub fn of(state: &State) -> Self {
        let mut lookup = Self::default();
        for service in state.services.values() {
            lookup.add_service(service);
        }
        for task in state.tasks.values() {
            lookup.add_task(task);
        }
        for (network, resting) in &state.freed {
            resting.iter().for_each(|freed| lookup.add_resting(network, freed.addr));
        }
        lookup
    }

    /// Whether an address of a network is taken by a task or as a VIP.
    pub fn is_taken(&self, network: &NetworkId, addr: Ipv4Addr) -> bool {
        self.addresses.get(network).is_some_and(|taken| taken.contains(&addr))
    }

    /// Whether an address of a network rests before others get it.
    pub fn is_resting(&self, network: &NetworkId, addr: Ipv4Addr) -> bool {
        self.resting.get(network).is_some_and(|resting| resting.contains(&addr))
    }

    /// Whether any address of a network is taken.
    pub fn is_network_used(&self, network: &NetworkId) -> bool {
        self.addresses.contains_key(network)
    }

    pub(crate) fn add_service(&mut self, service: &Service) {
        self.service_names.insert(service.spec.name.clone(), service.id.clone());
        for (network, addr) in vips(service) {
            self.addresses.entry(network.clone()).or_default().insert(addr);
        }
    }

    pub(crate) fn remove_service(&mut self, service: &Service) {
        self.service_names.remove(&service.spec.name);
        for (network, addr) in vips(service) {
            self.free(network, addr);
        }
    }

    pub(crate) fn add_task(&mut self, task: &Task) {
        self.tasks_by_service.entry(task.service.clone()).or_default().insert(task.id.clone());
        self.tasks_by_slot
            .entry(task.service.clone())
            .or_default()
            .insert((task.slot_key(), task.id.clone()));
        if let Some(node) = &task.node {
            self.tasks_by_node.entry(node.clone()).or_default().insert(task.id.clone());
        }
        for (network, addr) in held_addresses(task) {
            self.addresses.entry(network.clone()).or_default().insert(addr);
        }
    }

    pub(crate) fn remove_task(&mut self, task: &Task) {
        remove_from(&mut self.tasks_by_service, &task.service, &task.id);
        remove_from(&mut self.tasks_by_slot, &task.service, &(task.slot_key(), task.id.clone()));
        if let Some(node) = &task.node {
            remove_from(&mut self.tasks_by_node, node, &task.id);
        }
        for (network, addr) in held_addresses(task) {
            self.free(network, addr);
        }
    }

    pub(crate) fn add_resting(&mut self, network: &NetworkId, addr: Ipv4Addr) {
        self.resting.entry(network.clone()).or_default().insert(addr);
    }

    pub(crate) fn remove_resting(&mut self, network: &NetworkId, addr: Ipv4Addr) {
        remove_from(&mut self.resting, network, &addr);
    }

    fn free(&mut self, network: &NetworkId, addr: Ipv4Addr) {
        remove_from(&mut self.addresses, network, &addr);
    }
}

/// The addresses that a service has.
pub(crate) fn vips(service: &Service) -> impl Iterator<Item = (&NetworkId, Ipv4Addr)> {
    service.endpoint.vips.iter().filter_map(|vip| Some((&vip.network, vip.addr?)))
}

/// The addresses that a task has. One that has ended keeps its addresses for display only.
pub(crate) fn held_addresses(task: &Task) -> impl Iterator<Item = (&NetworkId, Ipv4Addr)> {
    let held = if task.has_ended() { &[][..] } else { &task.endpoints[..] };
    held.iter().filter_map(|endpoint| Some((&endpoint.network, endpoint.addr?)))
}

/// Removes a member, and its set with the last one, so that equal states have equal indexes.
fn remove_from<K: Ord + Clone, V: Ord + Clone>(sets: &mut OrdMap<K, OrdSet<V>>, key: &K, value: &V) {
    let Some(set) = sets.get_mut(key) else { return };
    set.remove(value);
    if set.is_empty() {
        sets.remove(key);
    }
}
