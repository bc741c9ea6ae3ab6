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
    let others = table.nodes.values().map(|node| Be32::from(node.vtep));
    // A host that left and joined again has an older record under the same address.
    others.filter(|vtep| *vtep != Be32::from(local.vtep)).collect()
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

#[cfg(test)]
pub(crate) mod tests {
    use mesh_api::table::{ClusterRecord, NetworkRecord, NodeRecord, Role, SubnetRecord, VipRecord};

    use super::*;

    fn node(id: &str, last: u8) -> NodeRecord {
        NodeRecord {
            id: id.into(),
            hostname: id.to_owned(),
            role: Role::Worker,
            vtep: Ipv4Addr::new(198, 18, 0, last),
            state: NodeState::Ready,
        }
    }

    fn network(id: &str, vni: u32, third: u8) -> NetworkRecord {
        let cidr = format!("10.0.{third}.0/24").parse().unwrap();
        NetworkRecord {
            id: id.into(),
            name: id.to_owned(),
            vni,
            subnets: vec![SubnetRecord { cidr, gateway: Ipv4Addr::new(10, 0, third, 1) }],
            internal: false,
            ingress: id == "ingress",
        }
    }

    fn task(number: u32, node: &str, observed: TaskState) -> TaskRecord {
        TaskRecord {
            id: format!("t{number}").as_str().into(),
            name: format!("web.{number}"),
            service: "web".into(),
            slot: u64::from(number),
            node: node.into(),
            incarnation: number,
            desired: TaskState::Running,
            observed,
            endpoints: vec![
                EndpointRecord {
                    network: "ingress".into(),
                    addr: Ipv4Addr::new(10, 0, 0, 10 + number as u8),
                },
                EndpointRecord { network: "back".into(), addr: Ipv4Addr::new(10, 0, 1, 10 + number as u8) },
            ],
            spec: None,
        }
    }

    /// Two nodes; the service `web` on `ingress` and `back`, published as 8080 on every node and as 9090 on its own
    /// tasks' nodes; task 1 on n1, tasks 2 and 3 on n2.
    pub(crate) fn table() -> Table {
        let cluster = ClusterRecord { id: "c".into(), hash_seed: 1, data_path_port: 4789 };
        let mut table = Table::new(cluster);
        let port = |mode, published| PortRecord { protocol: Protocol::Tcp, target: 80, published, mode };
        let vip =
            |network: &str, addr| VipRecord { network: network.into(), addr: Some(addr), aliases: vec![] };
        let service = ServiceRecord {
            id: "web".into(),
            name: "web".to_owned(),
            endpoint_mode: EndpointMode::Vip,
            vips: vec![vip("ingress", Ipv4Addr::new(10, 0, 0, 2)), vip("back", Ipv4Addr::new(10, 0, 1, 2))],
            ports: vec![port(PublishMode::Ingress, 8080), port(PublishMode::Host, 9090)],
        };
        table.services.insert(service.id.clone(), service);
        for node in [node("n1", 11), node("n2", 12)] {
            table.nodes.insert(node.id.clone(), node);
        }
        for network in [network("ingress", 4096, 0), network("back", 4097, 1)] {
            table.networks.insert(network.id.clone(), network);
        }
        for (number, node) in [(1, "n1"), (2, "n2"), (3, "n2")] {
            let task = task(number, node, TaskState::Running);
            table.tasks.insert(task.id.clone(), task);
        }
        table
    }

    /// n1, with its task attached.
    pub(crate) fn local() -> Local {
        let endpoint = |network: &str, third, ifindex, alias| LocalEndpoint {
            task: "t1".into(),
            network: network.into(),
            addr: Ipv4Addr::new(10, 0, third, 11),
            ifindex,
            alias: Ipv4Addr::new(169, 254, 64, alias),
        };
        Local {
            node: "n1".into(),
            vtep: Ipv4Addr::new(198, 18, 0, 11),
            addresses: vec![Ipv4Addr::new(198, 18, 0, 11)],
            endpoints: vec![endpoint("ingress", 0, 7, 2), endpoint("back", 1, 8, 3)],
        }
    }

    fn cluster(vni: u32) -> BalancerKey {
        BalancerKey { service: "web".into(), vni, scope: PublishScope::Cluster }
    }

    fn incarnations(plan: &Plan, key: &BalancerKey) -> Vec<u32> {
        plan.balancers[key].iter().map(|backend| backend.incarnation).collect()
    }

    #[test]
    fn running_tasks_of_all_nodes_serve_a_published_port() {
        let plan = plan(&table(), &local());
        let (balancer, target) = &plan.ports[&PortKey::new(PROTO_TCP, Be16::new(8080))];
        assert_eq!((balancer, target.get()), (&cluster(4096), 80));
        assert_eq!(incarnations(&plan, balancer), [1, 2, 3]);
        let place = plan.backends[&BackendKey { incarnation: 2, vni: 4096 }].place;
        assert_eq!(place, Place::There(Be32::ipv4(198, 18, 0, 12)));
        assert_eq!(plan.peers.len(), 1);
    }

    #[test]
    fn a_port_in_host_mode_leads_to_this_nodes_tasks_alone() {
        let plan = plan(&table(), &local());
        let (balancer, _) = &plan.ports[&PortKey::new(PROTO_TCP, Be16::new(9090))];
        assert_eq!(balancer.scope, PublishScope::Node);
        assert_eq!(incarnations(&plan, balancer), [1]);
    }

    #[test]
    fn a_task_told_to_stop_drains() {
        let mut table = table();
        table.tasks.get_mut(&"t2".into()).unwrap().desired = TaskState::Shutdown;
        let plan = plan(&table, &local());
        assert_eq!(incarnations(&plan, &cluster(4096)), [1, 3]);
        assert!(plan.backends[&BackendKey { incarnation: 2, vni: 4096 }].draining);
        assert!(plan.endpoints.contains_key(&AddrKey { vni: 4096, addr: Be32::ipv4(10, 0, 0, 12) }));
    }

    #[test]
    fn tasks_that_start_ended_or_live_on_a_dead_node_get_nothing() {
        let mut table = table();
        table.tasks.get_mut(&"t1".into()).unwrap().observed = TaskState::Starting;
        table.nodes.get_mut(&"n2".into()).unwrap().state = NodeState::Down;
        let plan = plan(&table, &local());
        assert!(plan.balancers.values().all(BTreeSet::is_empty));
        // The one that starts can be reached by its own address.
        assert!(plan.endpoints.contains_key(&AddrKey { vni: 4097, addr: Be32::ipv4(10, 0, 1, 11) }));
        table.tasks.get_mut(&"t3".into()).unwrap().observed = TaskState::Failed;
        let plan = super::plan(&table, &local());
        assert!(!plan.endpoints.contains_key(&AddrKey { vni: 4097, addr: Be32::ipv4(10, 0, 1, 13) }));
    }

    #[test]
    fn a_task_of_this_node_without_an_interface_gets_nothing() {
        let plan = plan(&table(), &Local { endpoints: vec![], ..local() });
        assert_eq!(incarnations(&plan, &cluster(4096)), [2, 3]);
        assert!(plan.ifaces.is_empty() && plan.aliases.is_empty());
    }

    #[test]
    fn an_interface_knows_its_network() {
        let mut table = table();
        table.networks.get_mut(&"back".into()).unwrap().internal = true;
        let plan = plan(&table, &local());
        let iface = plan.ifaces[&8];
        assert_eq!((iface.vni, iface.flags, iface.incarnation), (4097, IFACE_INTERNAL, 1));
        assert_eq!(iface.gateway, Be32::ipv4(10, 0, 1, 1));
        assert_eq!(iface.mask, Be32::ipv4(255, 255, 255, 0));
        assert_eq!(plan.aliases[&Be32::ipv4(169, 254, 64, 3)].ifindex, 8);
    }

    #[test]
    fn names_that_lead_nowhere_are_left_out() {
        let mut table = table();
        table.networks.clear();
        let empty = plan(&table, &local());
        assert!(empty.vips.is_empty() && empty.ports.is_empty() && empty.endpoints.is_empty());
        assert!(empty.ifaces.is_empty());
    }
}
