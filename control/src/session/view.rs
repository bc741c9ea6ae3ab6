//! The replicated state as a node sees it, and the changes between two of them.
//!
//! A task is visible from its placement (and, if it was held back, its release) until it has ended. What it runs is
//! visible to its own node only. An attachment is a task that its node knows already, and a service in name only, which
//! its names are those of.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use mesh_api::id::{NodeId, ServiceId, TaskId};
use mesh_api::table::{
    BalancingRecord, Change, ClusterRecord, EndpointMode, EndpointRecord, NetworkRecord, NodeRecord,
    PortRecord, ReturnPath, ServiceRecord, SubnetRecord, Table, TaskRecord, TaskSpec, TaskState, VipRecord,
    WEIGHT_MAX,
};

use super::journal::Part;
use crate::model::constraint::Constraint;
use crate::model::labels::{self, ServiceOptions};
use crate::model::service::DEFAULT_STOP_GRACE_NS;
use crate::model::{
    ClusterObject, Network, Node, PortConfig, Service, State, Subnet, Task, TaskEndpoint, Vip, WARM,
};

/// The label by which `docker stack deploy` marks what it makes.
const STACK: &str = "com.docker.stack.namespace";

/// The whole table for `node`; `None` before the cluster's first command.
pub fn table(state: &State, node: &NodeId) -> Option<Table> {
    let task =
        |task: &Arc<Task>| task_record(state, task, Some(node)).map(|record| (record.id.clone(), record));
    let service = |(id, service): (&ServiceId, &Arc<Service>)| (id.clone(), service_record(state, service));
    let names = state.attachments().filter_map(|task| attachment_names(task));
    let names = names.map(|record| (record.id.clone(), record));
    Some(Table {
        index: state.index,
        cluster: cluster_record(state.cluster.as_ref()?),
        nodes: state.nodes.iter().map(|(id, node)| (id.clone(), node_record(node))).collect(),
        networks: state.networks.iter().map(|(id, network)| (id.clone(), network_record(network))).collect(),
        services: state.services.iter().map(service).chain(names).collect(),
        tasks: state.tasks.values().filter_map(task).collect(),
    })
}

/// The changes of the nodes' tables between two states, each task as its own node sees it: the others are not told what it
/// runs.
pub fn changes(old: &State, new: &State) -> Vec<Change> {
    let mut changes = Vec::new();
    if let (Some(old), Some(new)) = (&old.cluster, &new.cluster)
        && !Arc::ptr_eq(old, new)
        && cluster_record(old) != cluster_record(new)
    {
        changes.push(Change::Cluster(cluster_record(new)));
    }
    diff(
        &old.nodes,
        &new.nodes,
        |node| Some(node_record(node)),
        |node| Some(node_record(node)),
        Change::Node,
        Change::NodeRemoved,
        &mut changes,
    );
    diff(
        &old.networks,
        &new.networks,
        |network| Some(network_record(network)),
        |network| Some(network_record(network)),
        Change::Network,
        Change::NetworkRemoved,
        &mut changes,
    );
    diff(
        &old.services,
        &new.services,
        |service| Some(service_record(old, service)),
        |service| Some(service_record(new, service)),
        Change::Service,
        Change::ServiceRemoved,
        &mut changes,
    );
    services_that_follow(old, new, &mut changes);
    diff(
        &old.tasks,
        &new.tasks,
        attachment_names,
        attachment_names,
        Change::Service,
        |id| Change::ServiceRemoved(names_id(&id)),
        &mut changes,
    );
    diff(
        &old.tasks,
        &new.tasks,
        |task| task_record(old, task, task.node.as_ref()),
        |task| task_record(new, task, task.node.as_ref()),
        |record| Change::Task(Box::new(record)),
        Change::TaskRemoved,
        &mut changes,
    );
    tasks_that_follow(old, new, &mut changes);
    changes
}

/// Services that are as they were, and whose records follow from nodes or the cluster's labels, which are not.
fn services_that_follow(old: &State, new: &State, changes: &mut Vec<Change>) {
    let same_cluster = return_path(old) == return_path(new);
    if same_cluster && old.nodes.ptr_eq(&new.nodes) {
        return;
    }
    for (id, service) in &new.services {
        let is_same = old.services.get(id).is_some_and(|before| Arc::ptr_eq(before, service));
        if is_same && (!same_cluster || service.spec.labels.contains_key(labels::PUBLISH_NODES)) {
            let record = service_record(new, service);
            if record != service_record(old, service) {
                changes.push(Change::Service(record));
            }
        }
    }
}

/// Tasks that are as they were, on nodes whose weight is not.
fn tasks_that_follow(old: &State, new: &State, changes: &mut Vec<Change>) {
    if old.nodes.ptr_eq(&new.nodes) {
        return;
    }
    for node in new.nodes.keys().filter(|node| node_weight(old, node) != node_weight(new, node)) {
        for task in new.tasks_of_node(node) {
            let is_same = old.tasks.get(&task.id).is_some_and(|before| Arc::ptr_eq(before, task));
            let record = if is_same { task_record(new, task, Some(node)) } else { None };
            changes.extend(record.map(|record| Change::Task(Box::new(record))));
        }
    }
}

/// An object by its key, as it was and as it is.
type Difference<'a, K, V> = (&'a K, Option<&'a V>, Option<&'a V>);

/// The objects of one kind that differ.
fn differences<'a, K: Ord, V: PartialEq>(
    old: &'a OrdMap<K, Arc<V>>,
    new: &'a OrdMap<K, Arc<V>>,
) -> impl Iterator<Item = Difference<'a, K, V>> {
    old.diff(new).map(|item| match item {
        DiffItem::Add(key, value) => (key, None, Some(&**value)),
        DiffItem::Update { old: (_, old), new: (key, new) } => (key, Some(&**old), Some(&**new)),
        DiffItem::Remove(key, value) => (key, Some(&**value), None),
    })
}

/// The changes of one kind of object, as its records show them.
fn diff<K: Ord + Clone, V: PartialEq, R: PartialEq>(
    old: &OrdMap<K, Arc<V>>,
    new: &OrdMap<K, Arc<V>>,
    before: impl Fn(&V) -> Option<R>,
    after: impl Fn(&V) -> Option<R>,
    put: impl Fn(R) -> Change,
    remove: impl Fn(K) -> Change,
    changes: &mut Vec<Change>,
) {
    for (key, old, new) in differences(old, new) {
        match (old.and_then(&before), new.and_then(&after)) {
            (Some(_), None) => changes.push(remove(key.clone())),
            (before, Some(after)) if before.as_ref() != Some(&after) => changes.push(put(after)),
            _ => {}
        }
    }
}

/// What of the nodes' tables an entry of the log may have changed, leading from one state to another.
pub(super) fn touched(old: &State, new: &State) -> Vec<Part> {
    let mut parts = Vec::new();
    let same_cluster = match (&old.cluster, &new.cluster) {
        (Some(old), Some(new)) => Arc::ptr_eq(old, new),
        (old, new) => old.is_none() && new.is_none(),
    };
    if !same_cluster {
        let record = |state: &State| state.cluster.as_deref().map(cluster_record);
        parts.extend((record(old) != record(new)).then_some(Part::Cluster));
        parts.extend((return_path(old) != return_path(new)).then_some(Part::ReturnPath));
    }
    for (id, before, after) in differences(&old.nodes, &new.nodes) {
        let is_another = before.map(node_record) != after.map(node_record);
        parts.extend(is_another.then(|| Part::Node(id.clone())));
        let is_weighed_anew = node_weight(old, id) != node_weight(new, id);
        parts.extend(is_weighed_anew.then(|| Part::Weight(id.clone())));
        // What constraints look at.
        let same = |(before, after): (&Node, &Node)| {
            before.spec == after.spec && before.description == after.description
        };
        parts.extend((!before.zip(after).is_some_and(same)).then_some(Part::PublishNodes));
    }
    for (id, before, after) in differences(&old.networks, &new.networks) {
        let is_another = before.map(network_record) != after.map(network_record);
        parts.extend(is_another.then(|| Part::Network(id.clone())));
    }
    parts.extend(differences(&old.services, &new.services).map(|(id, ..)| Part::Service(id.clone())));
    for (id, before, after) in differences(&old.tasks, &new.tasks) {
        if before.into_iter().chain(after).any(is_visible) {
            parts.push(Part::Task(id.clone()));
            let is_attachment = before.into_iter().chain(after).any(Task::is_attachment);
            parts.extend(is_attachment.then(|| Part::Names(id.clone())));
        }
    }
    parts
}

/// `parts`, with those of tables that follow from them.
pub(super) fn with_following(state: &State, mut parts: BTreeSet<Part>) -> BTreeSet<Part> {
    let mut following = Vec::new();
    for part in &parts {
        match part {
            Part::ReturnPath => following.extend(state.services.keys().cloned().map(Part::Service)),
            Part::PublishNodes => {
                let chooses =
                    |service: &Arc<Service>| service.spec.labels.contains_key(labels::PUBLISH_NODES);
                let choosing = state.services.iter().filter(|(_, service)| chooses(service));
                following.extend(choosing.map(|(id, _)| Part::Service(id.clone())));
            }
            Part::Weight(id) => {
                following.extend(state.tasks_of_node(id).map(|task| Part::Task(task.id.clone())));
            }
            Part::Cluster
            | Part::Node(_)
            | Part::Network(_)
            | Part::Service(_)
            | Part::Names(_)
            | Part::Task(_) => {}
        }
    }
    parts.extend(following);
    parts
}

/// The records of `node`'s table of which [`with_following`] tells, as they are: what makes the present table of one that is
/// as old as they tell.
pub(super) fn renewed(state: &State, parts: BTreeSet<Part>, node: &NodeId) -> Vec<Change> {
    parts.into_iter().filter_map(|part| record_of(state, part, node)).collect()
}

/// The record that a part is, or that it is gone; `None` of what is no record of its own.
fn record_of(state: &State, part: Part, viewer: &NodeId) -> Option<Change> {
    Some(match part {
        Part::Cluster => Change::Cluster(cluster_record(state.cluster.as_deref()?)),
        Part::Node(id) => match state.nodes.get(&id) {
            Some(node) => Change::Node(node_record(node)),
            None => Change::NodeRemoved(id),
        },
        Part::Network(id) => match state.networks.get(&id) {
            Some(network) => Change::Network(network_record(network)),
            None => Change::NetworkRemoved(id),
        },
        Part::Service(id) => match state.services.get(&id) {
            Some(service) => Change::Service(service_record(state, service)),
            None => Change::ServiceRemoved(id),
        },
        Part::Names(id) => match state.tasks.get(&id).and_then(|task| attachment_names(task)) {
            Some(record) => Change::Service(record),
            None => Change::ServiceRemoved(names_id(&id)),
        },
        Part::Task(id) => {
            match state.tasks.get(&id).and_then(|task| task_record(state, task, Some(viewer))) {
                Some(record) => Change::Task(Box::new(record)),
                None => Change::TaskRemoved(id),
            }
        }
        Part::ReturnPath | Part::PublishNodes | Part::Weight(_) => return None,
    })
}

fn cluster_record(cluster: &ClusterObject) -> ClusterRecord {
    let ClusterObject {
        id,
        meta: _,
        spec,
        ca: _,
        join_secrets: _,
        hash_seed,
        data_path_port,
        address_pools: _,
        subnet_size: _,
        avoid: _,
        key_epoch,
        removed: _,
        lock: _,
    } = cluster;
    ClusterRecord {
        id: id.clone(),
        hash_seed: *hash_seed,
        data_path_port: *data_path_port,
        // Labels are checked when they come in; what an earlier version let in asks for nothing.
        return_path: labels::cluster(&spec.labels).unwrap_or_default(),
        key_epoch: *key_epoch,
    }
}

/// How replies return where a service doesn't say.
fn return_path(state: &State) -> ReturnPath {
    let cluster = state.cluster.as_ref();
    cluster.and_then(|cluster| labels::cluster(&cluster.spec.labels).ok()).unwrap_or_default()
}

/// The share of new flows that a node's tasks get.
fn node_weight(state: &State, node: &NodeId) -> u8 {
    state.nodes.get(node).and_then(|node| labels::node(&node.spec.labels).ok()).unwrap_or(WEIGHT_MAX)
}

fn node_record(node: &Node) -> NodeRecord {
    let Node { id, meta: _, spec_version: _, spec, description, status, issuer: _, readmission: _ } = node;
    NodeRecord {
        id: id.clone(),
        hostname: description.hostname.clone(),
        role: spec.role,
        vtep: description.vtep,
        state: status.state,
        wireguard: description.wireguard.clone(),
        manager: description.manager.as_ref().map(|own| own.addr),
    }
}

fn network_record(network: &Network) -> NetworkRecord {
    let Network { id, meta: _, spec, vni, subnets, subnet6 } = network;
    let subnet = |subnet: &Subnet| SubnetRecord { cidr: subnet.cidr, gateway: subnet.gateway };
    NetworkRecord {
        id: id.clone(),
        name: spec.name.clone(),
        vni: *vni,
        subnets: subnets.iter().map(subnet).collect(),
        subnet6: *subnet6,
        internal: spec.internal,
        ingress: spec.ingress,
        mtu: spec.mtu().unwrap_or_default(),
        encrypted: network.is_encrypted(),
    }
}

fn service_record(state: &State, service: &Service) -> ServiceRecord {
    let Service { id, meta: _, spec, spec_version: _, previous_spec: _, endpoint, update_status: _ } =
        service;
    ServiceRecord {
        id: id.clone(),
        name: spec.name.clone(),
        stack: spec.labels.get(STACK).map(String::as_str).unwrap_or_default().into(),
        endpoint_mode: spec.endpoint.mode,
        vips: endpoint.vips.iter().map(vip_record).collect(),
        ports: endpoint.ports.iter().map(port_record).collect(),
        balancing: balancing_record(state, labels::service(&spec.labels).unwrap_or_default()),
    }
}

/// What gives an attachment its names, for as long as its task is visible: a service of its own, whose name is its
/// address.
fn attachment_names(task: &Task) -> Option<ServiceRecord> {
    if !task.is_attachment() || !is_visible(task) {
        return None;
    }
    let vip = |TaskEndpoint { network, addr: _, aliases }: &TaskEndpoint| VipRecord {
        network: network.clone(),
        addr: None,
        aliases: aliases.clone(),
    };
    Some(ServiceRecord {
        id: names_id(&task.id),
        name: task.service_name.clone(),
        stack: "".into(),
        endpoint_mode: EndpointMode::Dnsrr,
        vips: task.endpoints.iter().map(vip).collect(),
        ports: Vec::new(),
        balancing: BalancingRecord::default(),
    })
}

/// The id of what gives an attachment its names.
fn names_id(task: &TaskId) -> ServiceId {
    ServiceId::from(task.as_str())
}

/// Whether nodes see a task.
fn is_visible(task: &Task) -> bool {
    task.node.is_some()
        && task.status.state >= TaskState::Assigned
        && !task.has_ended()
        && task.desired >= TaskState::Running
}

fn balancing_record(state: &State, options: ServiceOptions) -> BalancingRecord {
    let ServiceOptions {
        return_path,
        affinity,
        sources,
        publish_addresses,
        publish_nodes,
        slow_start_ns: _,
        egress: _,
    } = options;
    let hold = |constraints: &[Constraint], node: &Node| constraints.iter().all(|it| it.holds(node));
    let nodes = |constraints: Vec<Constraint>| {
        state.nodes.values().filter(|node| hold(&constraints, node)).map(|node| node.id.clone()).collect()
    };
    BalancingRecord {
        return_path: return_path.unwrap_or_else(|| self::return_path(state)),
        affinity,
        sources,
        publish_addresses,
        publish_nodes: publish_nodes.map(nodes),
    }
}

fn vip_record(vip: &Vip) -> VipRecord {
    let Vip { network, addr, aliases } = vip;
    VipRecord { network: network.clone(), addr: *addr, aliases: aliases.clone() }
}

fn port_record(port: &PortConfig) -> PortRecord {
    let PortConfig { name, protocol, target, published, mode } = port;
    PortRecord {
        name: name.as_str().into(),
        protocol: *protocol,
        target: *target,
        published: *published,
        mode: *mode,
    }
}

fn task_record(state: &State, task: &Task, viewer: Option<&NodeId>) -> Option<TaskRecord> {
    let Task {
        id,
        meta: _,
        service,
        service_name: _,
        slot,
        node,
        template: _,
        spec_version: _,
        host_ports: _,
        egress: _,
        endpoints,
        incarnation,
        desired,
        status,
        running_since_ns: _,
        warmth,
        ended_ns: _,
        start_at_ns: _,
        start_after: _,
        restarts_ns: _,
    } = task;
    let node = node.clone().filter(|_| is_visible(task))?;
    let endpoint = |endpoint: &TaskEndpoint| {
        Some(EndpointRecord { network: endpoint.network.clone(), addr: endpoint.addr? })
    };
    Some(TaskRecord {
        id: id.clone(),
        name: task.name().into(),
        service: if task.is_attachment() { names_id(id) } else { service.clone() },
        slot: *slot,
        spec: (Some(&node) == viewer).then(|| Box::new(task_spec(task))),
        weight: weight(node_weight(state, &node), *warmth),
        node,
        incarnation: *incarnation,
        desired: *desired,
        observed: status.state,
        endpoints: endpoints.iter().filter_map(endpoint).collect(),
    })
}

/// A task's share of new flows: its node's, as far as its slow start is, and at least 1.
fn weight(of_node: u8, warmth: u8) -> u8 {
    let share = u16::from(of_node) * u16::from(warmth) / u16::from(WARM);
    u8::try_from(share).unwrap_or(WEIGHT_MAX).clamp(1, WEIGHT_MAX)
}

fn task_spec(task: &Task) -> TaskSpec {
    let container = task.template.container.clone();
    TaskSpec {
        image: container.image,
        command: container.command,
        args: container.args,
        env: container.env,
        dir: container.dir,
        user: container.user,
        hostname: container.hostname,
        stop_grace_ns: container.stop_grace_ns.unwrap_or(DEFAULT_STOP_GRACE_NS),
        stop_signal: container.stop_signal,
        service_name: task.service_name.clone(),
        egress: task.egress.clone(),
    }
}
