//! The replicated state as a node sees it, and the changes between two of them.
//!
//! A task is visible from its placement (and, if it was held back, its release) until it has ended. What it runs is
//! visible to its own node only.

use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use mesh_api::id::NodeId;
use mesh_api::table::{
    Change, ClusterRecord, EndpointRecord, NetworkRecord, NodeRecord, PortRecord, ServiceRecord,
    SubnetRecord, Table, TaskRecord, TaskSpec, TaskState, VipRecord,
};

use crate::model::service::DEFAULT_STOP_GRACE_NS;
use crate::model::{
    ClusterObject, Network, Node, PortConfig, Service, State, Subnet, Task, TaskEndpoint, Vip,
};

/// The whole table for `node`; `None` before the cluster's first command.
pub fn table(state: &State, node: &NodeId) -> Option<Table> {
    let record = |task: &Arc<Task>| task_record(task, node).map(|record| (record.id.clone(), record));
    Some(Table {
        index: state.index,
        cluster: cluster_record(state.cluster.as_ref()?),
        nodes: state.nodes.iter().map(|(id, node)| (id.clone(), node_record(node))).collect(),
        networks: state.networks.iter().map(|(id, network)| (id.clone(), network_record(network))).collect(),
        services: state.services.iter().map(|(id, service)| (id.clone(), service_record(service))).collect(),
        tasks: state.tasks.values().filter_map(record).collect(),
    })
}

/// The changes of `node`'s table between two states.
pub fn changes(old: &State, new: &State, node: &NodeId) -> Vec<Change> {
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
        Change::Node,
        Change::NodeRemoved,
        &mut changes,
    );
    diff(
        &old.networks,
        &new.networks,
        |network| Some(network_record(network)),
        Change::Network,
        Change::NetworkRemoved,
        &mut changes,
    );
    diff(
        &old.services,
        &new.services,
        |service| Some(service_record(service)),
        Change::Service,
        Change::ServiceRemoved,
        &mut changes,
    );
    diff(
        &old.tasks,
        &new.tasks,
        |task| task_record(task, node),
        |record| Change::Task(Box::new(record)),
        Change::TaskRemoved,
        &mut changes,
    );
    changes
}

/// The changes of one kind of object, as its records show them.
fn diff<K: Ord + Clone, V: PartialEq, R: PartialEq>(
    old: &OrdMap<K, Arc<V>>,
    new: &OrdMap<K, Arc<V>>,
    record: impl Fn(&V) -> Option<R>,
    put: impl Fn(R) -> Change,
    remove: impl Fn(K) -> Change,
    changes: &mut Vec<Change>,
) {
    if old.ptr_eq(new) {
        return;
    }
    for item in old.diff(new) {
        let (key, before, after) = match item {
            DiffItem::Add(key, value) => (key, None, record(value)),
            DiffItem::Update { old: (_, old), new: (key, new) } => (key, record(old), record(new)),
            DiffItem::Remove(key, value) => (key, record(value), None),
        };
        match (before, after) {
            (Some(_), None) => changes.push(remove(key.clone())),
            (before, Some(after)) if before.as_ref() != Some(&after) => changes.push(put(after)),
            _ => {}
        }
    }
}

fn cluster_record(cluster: &ClusterObject) -> ClusterRecord {
    let ClusterObject {
        id,
        meta: _,
        spec: _,
        digest: _,
        join_secrets: _,
        hash_seed,
        data_path_port,
        address_pools: _,
        subnet_size: _,
        avoid: _,
    } = cluster;
    ClusterRecord { id: id.clone(), hash_seed: *hash_seed, data_path_port: *data_path_port }
}

fn node_record(node: &Node) -> NodeRecord {
    let Node { id, meta: _, spec, description, status, secret_sha256: _ } = node;
    NodeRecord {
        id: id.clone(),
        hostname: description.hostname.clone(),
        role: spec.role,
        vtep: description.vtep,
        state: status.state,
    }
}

fn network_record(network: &Network) -> NetworkRecord {
    let Network { id, meta: _, spec, vni, subnets } = network;
    let subnet = |subnet: &Subnet| SubnetRecord { cidr: subnet.cidr, gateway: subnet.gateway };
    NetworkRecord {
        id: id.clone(),
        name: spec.name.clone(),
        vni: *vni,
        subnets: subnets.iter().map(subnet).collect(),
        internal: spec.internal,
        ingress: spec.ingress,
    }
}

fn service_record(service: &Service) -> ServiceRecord {
    let Service { id, meta: _, spec, spec_version: _, previous_spec: _, endpoint, update_status: _ } =
        service;
    ServiceRecord {
        id: id.clone(),
        name: spec.name.clone(),
        endpoint_mode: spec.endpoint.mode,
        vips: endpoint.vips.iter().map(vip_record).collect(),
        ports: endpoint.ports.iter().map(port_record).collect(),
    }
}

fn vip_record(vip: &Vip) -> VipRecord {
    let Vip { network, addr, aliases } = vip;
    VipRecord { network: network.clone(), addr: *addr, aliases: aliases.clone() }
}

fn port_record(port: &PortConfig) -> PortRecord {
    let PortConfig { name: _, protocol, target, published, mode } = port;
    PortRecord { protocol: *protocol, target: *target, published: *published, mode: *mode }
}

fn task_record(task: &Task, viewer: &NodeId) -> Option<TaskRecord> {
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
        endpoints,
        incarnation,
        desired,
        status,
        running_since_ns: _,
        ended_ns: _,
        start_at_ns: _,
        start_after: _,
        restarts_ns: _,
    } = task;
    let node = node.clone()?;
    if status.state < TaskState::Assigned || status.state.is_terminal() || *desired < TaskState::Running {
        return None;
    }
    let endpoint = |endpoint: &TaskEndpoint| {
        Some(EndpointRecord { network: endpoint.network.clone(), addr: endpoint.addr? })
    };
    Some(TaskRecord {
        id: id.clone(),
        name: task.name(),
        service: service.clone(),
        slot: *slot,
        spec: (node == *viewer).then(|| task_spec(task)),
        node,
        incarnation: *incarnation,
        desired: *desired,
        observed: status.state,
        endpoints: endpoints.iter().filter_map(endpoint).collect(),
    })
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
    }
}
