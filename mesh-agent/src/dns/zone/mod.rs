//! What every asker may know: answers from the table, by an index that follows its changes.
//!
//! Names live in networks: an asker is answered from the networks that its task is on, and from no other. The
//! ingress network has no names, as in Docker: services meet on the networks that they share by intent.
//!
//! The index holds what the table can't be asked for by name or address. It may be a moment behind the table: what it
//! refers to in vain is not there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use mesh_api::id::{NetworkId, ServiceId, TaskId};
use mesh_api::table::{EndpointMode, ServiceRecord, Table, TaskRecord, TaskState, VipRecord};

mod lookup;

use crate::dataplane::{LocalEndpoint, Touched};
use lookup::View;

/// Who may ask, and where the table has what they ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Zone {
    askers: HashMap<Ipv4Addr, Asker>,
    /// What they follow from.
    endpoints: Vec<LocalEndpoint>,
    networks: HashMap<NetworkId, Names>,
    /// What [`Names`] hold of each service, to be taken out again.
    services: HashMap<ServiceId, Listed>,
    /// The tasks of each service.
    tasks: HashMap<ServiceId, BTreeSet<TaskId>>,
}

/// What a task on this node may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asker {
    task: TaskId,
    /// Its service, unless the table lacked the task.
    service: Option<ServiceId>,
    networks: Vec<NetworkId>,
    /// One of its networks has a way out.
    external: bool,
}

/// A network's names. An IPv6 address follows from the IPv4 address, so that only the latter is kept.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names {
    /// Services by their names and aliases here, in lower case. Several may share an alias.
    services: HashMap<String, BTreeSet<ServiceId>>,
    /// Whose an address is: a service's VIP or a running task's. One of a task that is gone stays until it is another's.
    owners: HashMap<Ipv4Addr, Owner>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    Service(ServiceId),
    Task(TaskId),
}

/// A service's names and VIPs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Listed {
    names: Vec<(NetworkId, String)>,
    vips: Vec<(NetworkId, Ipv4Addr)>,
}

/// What the zone says to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The name's addresses, of both families; empty for a name without any.
    Addresses(Vec<IpAddr>),
    /// The address's name.
    Name(String),
    /// Where a service's port is served.
    Servers(Vec<Server>),
    /// There is no such name.
    NoName,
    /// Not for this zone to say: ask the host's resolvers, for this task.
    Forward(TaskId),
    /// Not for this zone to say, and the asker has no way out.
    NoWayOut,
    /// The asker is no task of this node.
    Refused,
}

/// A place where a service's port is served.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Server {
    /// The name of a service with a VIP, or of a task.
    pub name: String,
    /// The port there.
    pub port: u16,
    /// The name's addresses.
    pub addresses: Vec<IpAddr>,
}

impl Zone {
    /// Follows the table: what `touched` names of it, given that the rest was followed before; and `endpoints`, those
    /// of this node's tasks.
    pub fn update(&mut self, table: &Table, touched: &Touched, endpoints: &[LocalEndpoint]) {
        if touched.all {
            *self = Self::default();
            for task in table.tasks.values() {
                self.index_task(table, task);
            }
            for service in table.services.values() {
                self.list(table, service);
            }
        } else {
            for (service, tasks) in &touched.tasks {
                for id in tasks.keys() {
                    match table.tasks.get(id) {
                        Some(task) => self.index_task(table, task),
                        None => self.forget_task(service, id),
                    }
                }
            }
            // All out before any is in: an address may pass from one to another.
            for id in &touched.services {
                self.unlist(id);
            }
            for service in touched.services.iter().filter_map(|id| table.services.get(id)) {
                self.list(table, service);
            }
            if touched.networks {
                self.networks.retain(|id, _| has_names(table, id));
            }
        }
        let is_touched = |endpoint: &LocalEndpoint| touched.has_task(&endpoint.task);
        if self.endpoints != endpoints || touched.networks || endpoints.iter().any(is_touched) {
            self.askers = askers(table, endpoints);
            self.endpoints = endpoints.to_vec();
        }
    }

    fn index_task(&mut self, table: &Table, task: &TaskRecord) {
        self.tasks.entry(task.service.clone()).or_default().insert(task.id.clone());
        for endpoint in task.endpoints.iter().filter(|endpoint| has_names(table, &endpoint.network)) {
            let owners = &mut self.networks.entry(endpoint.network.clone()).or_default().owners;
            let owner = Owner::Task(task.id.clone());
            if is_running(task) {
                owners.insert(endpoint.addr, owner);
            } else if owners.get(&endpoint.addr) == Some(&owner) {
                owners.remove(&endpoint.addr);
            }
        }
    }

    fn forget_task(&mut self, service: &ServiceId, id: &TaskId) {
        if let Some(tasks) = self.tasks.get_mut(service) {
            tasks.remove(id);
            if tasks.is_empty() {
                self.tasks.remove(service);
            }
        }
    }

    fn list(&mut self, table: &Table, service: &ServiceRecord) {
        let mut listed = Listed::default();
        for vip in service.vips.iter().filter(|vip| has_names(table, &vip.network)) {
            let names = self.networks.entry(vip.network.clone()).or_default();
            for name in vip.aliases.iter().chain([&service.name]).map(|name| name.to_ascii_lowercase()) {
                names.services.entry(name.clone()).or_default().insert(service.id.clone());
                listed.names.push((vip.network.clone(), name));
            }
            if let (EndpointMode::Vip, Some(addr)) = (service.endpoint_mode, vip.addr) {
                names.owners.insert(addr, Owner::Service(service.id.clone()));
                listed.vips.push((vip.network.clone(), addr));
            }
        }
        self.services.insert(service.id.clone(), listed);
    }

    fn unlist(&mut self, id: &ServiceId) {
        let Some(Listed { names, vips }) = self.services.remove(id) else { return };
        for (network, name) in names {
            let Some(names) = self.networks.get_mut(&network) else { continue };
            if let Some(services) = names.services.get_mut(&name) {
                services.remove(id);
                if services.is_empty() {
                    names.services.remove(&name);
                }
            }
        }
        for (network, addr) in vips {
            if let Some(names) = self.networks.get_mut(&network)
                && names.owners.get(&addr) == Some(&Owner::Service(id.clone()))
            {
                names.owners.remove(&addr);
            }
        }
    }

    /// The task that asks from `source`, an alias of one of its endpoints.
    pub fn task_at(&self, source: Ipv4Addr) -> Option<&TaskId> {
        self.askers.get(&source).map(|asker| &asker.task)
    }

    /// What `name` (without its closing dot) stands for, for the asker at `source`.
    pub fn lookup(&self, table: &Table, source: Ipv4Addr, name: &str) -> Answer {
        self.view(table, source).map_or(Answer::Refused, |view| view.lookup(&name.to_ascii_lowercase()))
    }

    /// The name of `addr` for the asker at `source`.
    pub fn lookup_reverse(&self, table: &Table, source: Ipv4Addr, addr: IpAddr) -> Answer {
        self.view(table, source).map_or(Answer::Refused, |view| view.lookup_reverse(addr))
    }

    /// What becomes of a question that the zone can have no answer to.
    pub fn lookup_other(&self, source: Ipv4Addr) -> Answer {
        self.askers.get(&source).map_or(Answer::Refused, Asker::elsewhere)
    }

    fn view<'a>(&'a self, table: &'a Table, source: Ipv4Addr) -> Option<View<'a>> {
        Some(View { zone: self, table, asker: self.askers.get(&source)? })
    }
}

impl Asker {
    /// What lies outside the zone: a task on internal networks alone has no outside.
    fn elsewhere(&self) -> Answer {
        if self.external { Answer::Forward(self.task.clone()) } else { Answer::NoWayOut }
    }
}

fn askers(table: &Table, endpoints: &[LocalEndpoint]) -> HashMap<Ipv4Addr, Asker> {
    let mut by_task: BTreeMap<&TaskId, Asker> = BTreeMap::new();
    for endpoint in endpoints {
        let asker = by_task.entry(&endpoint.task).or_insert_with(|| {
            let service = table.tasks.get(&endpoint.task).map(|task| task.service.clone());
            Asker { task: endpoint.task.clone(), service, networks: Vec::new(), external: false }
        });
        let Some(network) = table.networks.get(&endpoint.network) else { continue };
        asker.external |= !network.internal;
        if !network.ingress {
            asker.networks.push(network.id.clone());
        }
    }
    let asker = |endpoint: &LocalEndpoint| Some((endpoint.alias, by_task.get(&endpoint.task)?.clone()));
    endpoints.iter().filter_map(asker).collect()
}

fn has_names(table: &Table, network: &NetworkId) -> bool {
    table.networks.get(network).is_some_and(|network| !network.ingress)
}

/// A task that takes traffic, and is not about to be stopped.
fn is_running(task: &TaskRecord) -> bool {
    task.observed == TaskState::Running && task.desired <= TaskState::Running
}

fn address(task: &TaskRecord, network: &NetworkId) -> Option<Ipv4Addr> {
    task.endpoints.iter().find(|endpoint| endpoint.network == *network).map(|endpoint| endpoint.addr)
}

/// What a service's name stands for in a network, if not for its tasks.
fn vip(service: &ServiceRecord, network: &NetworkId) -> Option<Ipv4Addr> {
    let is_here = |vip: &&VipRecord| vip.network == *network;
    let vip = service.vips.iter().find(is_here)?.addr;
    vip.filter(|_| service.endpoint_mode == EndpointMode::Vip)
}

#[cfg(test)]
pub(in crate::dns) mod tests;
