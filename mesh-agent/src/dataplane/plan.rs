//! What the dataplane is to hold: a pure function of the table and of this node's own facts.
//!
//! The plan speaks of services and tasks by what they are. Numbers ([`slots`](super::slots)) come in
//! [`layout`](super::layout), so that two plans can be compared, and tested, without any.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::table::{
    EndpointMode, EndpointRecord, NodeState, PortRecord, Protocol, PublishMode, ServiceRecord, Table,
    TaskRecord, TaskState,
};
use mesh_common::be::{Be16, Be32};
use mesh_common::map::{AddrKey, Alias, IFACE_INTERNAL, Iface, PROTO_TCP, PROTO_UDP, PortKey};

/// This node's own facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// The node.
    pub node: NodeId,
    /// Its VXLAN address.
    pub vtep: Ipv4Addr,
    /// Every address that published ports answer on.
    pub addresses: Vec<Ipv4Addr>,
    /// The attachments of its running tasks.
    pub endpoints: Vec<LocalEndpoint>,
}

/// An attachment of a task of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// The task.
    pub task: TaskId,
    /// The network.
    pub network: NetworkId,
    /// The task's address in it.
    pub addr: Ipv4Addr,
    /// Host side of the interface.
    pub ifindex: u32,
    /// The node-local address that the host knows the endpoint by.
    pub alias: Ipv4Addr,
}

/// One service's balancing in one network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BalancerKey {
    /// The service.
    pub service: ServiceId,
    /// The VNI of the network.
    pub vni: u32,
    /// Which of its tasks.
    pub scope: PublishScope,
}

/// Which tasks a balancer chooses from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PublishScope {
    /// All of the service's.
    Cluster,
    /// This node's: a port published in host mode.
    Node,
}

/// A task in a network, as a target of balancing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendKey {
    /// The task's incarnation.
    pub incarnation: u32,
    /// The VNI of the network.
    pub vni: u32,
}

/// Where an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On this node, behind an interface.
    Here {
        /// Host side of the interface.
        ifindex: u32,
    },
    /// On the node with this VTEP.
    There(Be32),
}

/// A target of balancing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendPlan {
    /// Its address.
    pub addr: Be32,
    /// Where it is.
    pub place: Place,
    /// It gets no new flows.
    pub draining: bool,
}

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPlan {
    /// Where it is.
    pub place: Place,
    /// The task's incarnation.
    pub incarnation: u32,
    /// The cluster-wide balancing that it is part of.
    pub balancer: BalancerKey,
}

/// What the dataplane is to hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The node's own addresses.
    pub locals: BTreeSet<Be32>,
    /// The other nodes' VTEPs.
    pub peers: BTreeSet<Be32>,
    /// The backends that take new flows, by balancer.
    pub balancers: BTreeMap<BalancerKey, BTreeSet<BackendKey>>,
    /// All backends, draining ones included.
    pub backends: BTreeMap<BackendKey, BackendPlan>,
    /// Published ports, and the port that tasks listen on.
    pub ports: BTreeMap<PortKey, (BalancerKey, Be16)>,
    /// VIPs.
    pub vips: BTreeMap<AddrKey, BalancerKey>,
    /// Endpoints.
    pub endpoints: BTreeMap<AddrKey, EndpointPlan>,
    /// Interfaces of this node's tasks.
    pub ifaces: BTreeMap<u32, Iface>,
    /// Their aliases.
    pub aliases: BTreeMap<Be32, Alias>,
}

/// The plan for the node with the facts `local` under `table`. Records that refer to something the table doesn't
/// hold (yet) are left out.
pub fn plan(table: &Table, local: &Local) -> Plan {
    let mut plan = Plan {
        locals: local.addresses.iter().map(|addr| Be32::from(*addr)).collect(),
        peers: peers(table, local),
        ..Plan::default()
    };
    for service in table.services.values() {
        plan_service(&mut plan, table, service);
    }
    for task in table.tasks.values() {
        plan_task(&mut plan, table, local, task);
    }
    for endpoint in &local.endpoints {
        plan_iface(&mut plan, table, endpoint);
    }
    plan
}

fn peers(table: &Table, local: &Local) -> BTreeSet<Be32> {
    let others = table.nodes.values().filter(|node| node.id != local.node);
    others.map(|node| Be32::from(node.vtep)).collect()
}

/// A service's VIPs and ports; its balancers, still empty.
fn plan_service(plan: &mut Plan, table: &Table, service: &ServiceRecord) {
    for vip in &service.vips {
        let Some(network) = table.networks.get(&vip.network) else { continue };
        let key = balancer(service, network.vni, PublishScope::Cluster);
        plan.balancers.entry(key.clone()).or_default();
        if let (EndpointMode::Vip, Some(addr)) = (service.endpoint_mode, vip.addr) {
            plan.vips.insert(AddrKey { vni: network.vni, addr: addr.into() }, key.clone());
        }
        if network.ingress {
            for port in service.ports.iter().filter(|port| port.mode == PublishMode::Ingress) {
                plan.ports.insert(port_key(*port), (key.clone(), Be16::new(port.target)));
            }
        }
    }
}

/// A task's endpoints, and its part in its service's balancing.
fn plan_task(plan: &mut Plan, table: &Table, local: &Local, task: &TaskRecord) {
    let (Some(service), Some(node)) = (table.services.get(&task.service), table.nodes.get(&task.node)) else {
        return;
    };
    if task.observed.is_terminal() {
        return;
    }
    let serving = task.observed == TaskState::Running && node.state != NodeState::Down;
    for (position, endpoint) in task.endpoints.iter().enumerate() {
        let (Some(network), Some(place)) =
            (table.networks.get(&endpoint.network), place(table, local, task, endpoint))
        else {
            continue;
        };
        let vni = network.vni;
        let cluster = balancer(service, vni, PublishScope::Cluster);
        let planned = EndpointPlan { place, incarnation: task.incarnation, balancer: cluster.clone() };
        plan.endpoints.insert(AddrKey { vni, addr: endpoint.addr.into() }, planned);
        if !serving {
            continue;
        }
        let key = BackendKey { incarnation: task.incarnation, vni };
        let draining = task.desired > TaskState::Running;
        plan.backends.insert(key, BackendPlan { addr: endpoint.addr.into(), place, draining });
        if draining {
            continue;
        }
        if let Some(backends) = plan.balancers.get_mut(&cluster) {
            backends.insert(key);
        }
        if position == 0 && matches!(place, Place::Here { .. }) {
            publish_on_node(plan, service, key);
        }
    }
}

/// Ports in host mode answer on the task's own node, for its first attachment.
fn publish_on_node(plan: &mut Plan, service: &ServiceRecord, backend: BackendKey) {
    for port in service.ports.iter().filter(|port| port.mode == PublishMode::Host) {
        let key = balancer(service, backend.vni, PublishScope::Node);
        plan.balancers.entry(key.clone()).or_default().insert(backend);
        plan.ports.insert(port_key(*port), (key, Be16::new(port.target)));
    }
}

/// Where a task's endpoint is; `None` if it is to be on this node and isn't attached.
fn place(table: &Table, local: &Local, task: &TaskRecord, endpoint: &EndpointRecord) -> Option<Place> {
    if task.node != local.node {
        return Some(Place::There(table.nodes.get(&task.node)?.vtep.into()));
    }
    let attached =
        local.endpoints.iter().find(|one| one.task == task.id && one.network == endpoint.network)?;
    Some(Place::Here { ifindex: attached.ifindex })
}

fn plan_iface(plan: &mut Plan, table: &Table, endpoint: &LocalEndpoint) {
    let (Some(network), Some(task)) =
        (table.networks.get(&endpoint.network), table.tasks.get(&endpoint.task))
    else {
        return;
    };
    let Some(subnet) = network.subnets.iter().find(|subnet| subnet.cidr.contains(&endpoint.addr)) else {
        return;
    };
    let iface = Iface {
        vni: network.vni,
        addr: endpoint.addr.into(),
        gateway: subnet.gateway.into(),
        mask: subnet.cidr.netmask().into(),
        alias: endpoint.alias.into(),
        incarnation: task.incarnation,
        flags: if network.internal { IFACE_INTERNAL } else { 0 },
        reserved: 0,
    };
    plan.ifaces.insert(endpoint.ifindex, iface);
    let alias =
        Alias { addr: iface.addr, gateway: iface.gateway, ifindex: endpoint.ifindex, vni: network.vni };
    plan.aliases.insert(endpoint.alias.into(), alias);
}

fn balancer(service: &ServiceRecord, vni: u32, scope: PublishScope) -> BalancerKey {
    BalancerKey { service: service.id.clone(), vni, scope }
}

fn port_key(port: PortRecord) -> PortKey {
    let protocol = match port.protocol {
        Protocol::Tcp => PROTO_TCP,
        Protocol::Udp => PROTO_UDP,
    };
    PortKey::new(protocol, Be16::new(port.published))
}
