//! A cluster as large as one likes: its table as the manager would send it, and the facts of the node that is measured.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use mesh_agent::dataplane::Local;
use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::table::{
    BalancingRecord, ClusterRecord, EndpointMode, EndpointRecord, NetworkRecord, NodeRecord, NodeState,
    PortRecord, Protocol, PublishMode, ReturnPath, Role, ServiceRecord, Subnet6Record, SubnetRecord, Table,
    TaskRecord, TaskState, VipRecord, WEIGHT_MAX,
};

/// The node that is measured. No task runs on it: what comes in is for the others.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 11);
/// Its second address.
pub const ADDRESS6: &str = "2001:db8::11";
/// The first of the ports that services publish, one each.
pub const FIRST_PORT: u16 = 20_000;
/// The port that tasks listen on.
const TARGET_PORT: u16 = 80;
/// The other nodes.
const PEERS: u32 = 100;
const INGRESS_VNI: u32 = 4096;

/// A table of so many services, each published and with so many tasks, which are spread over 100 nodes.
pub fn table(services: u32, tasks_each: u32) -> Result<Table> {
    let mut table = Table::new(ClusterRecord {
        id: "benchmark".into(),
        hash_seed: 0x5ea1_ab1e,
        data_path_port: 4789,
        return_path: ReturnPath::Tunnel,
        key_epoch: 0,
    });
    for number in 0..=PEERS {
        let record = node(number);
        table.nodes.insert(record.id.clone(), record);
    }
    let network = NetworkRecord {
        id: ingress(),
        name: "ingress".to_owned(),
        vni: INGRESS_VNI,
        subnets: vec![SubnetRecord { cidr: "10.0.0.0/9".parse()?, gateway: Ipv4Addr::new(10, 0, 0, 1) }],
        subnet6: Some(Subnet6Record { cidr: "fd00:1::/64".parse()?, gateway: "fd00:1::a00:1".parse()? }),
        internal: false,
        ingress: true,
        mtu: None,
        encrypted: false,
    };
    table.networks.insert(network.id.clone(), network);
    let services = (0..services).map(service).collect::<Result<Vec<_>>>()?;
    let tasks = services.iter().zip(0..).flat_map(|(service, number)| {
        (1..=tasks_each).map(move |slot| task(service, number, slot, tasks_each))
    });
    // Each map at once, as a snapshot is read: one that is filled entry by entry takes twice the memory.
    table.tasks = tasks.map(|task| (task.id.clone(), task)).collect();
    table.services = services.into_iter().map(|service| (service.id.clone(), service)).collect();
    table.index = 1;
    Ok(table)
}

/// The facts of the node that is measured.
pub fn local() -> Result<Local> {
    Ok(Local {
        node: node_id(0),
        vtep: ADDRESS.into(),
        wireguard: None,
        addresses: vec![ADDRESS.into(), ADDRESS6.parse()?],
        endpoints: Vec::new(),
        absent: BTreeSet::new(),
        answering: BTreeSet::new(),
        silent: BTreeSet::new(),
    })
}

/// A task of the service with a number, as it is while it stops.
pub fn draining(table: &Table, number: u32) -> Result<TaskRecord> {
    let id = task_id(number, 1);
    let task = table.tasks.get(&id).with_context(|| format!("no task {id}"))?;
    Ok(TaskRecord { desired: TaskState::Shutdown, ..task.clone() })
}

fn node(number: u32) -> NodeRecord {
    let addr = Ipv4Addr::from_bits(ADDRESS.to_bits() + number);
    NodeRecord {
        id: node_id(number),
        hostname: format!("n{}", number + 1),
        role: Role::Worker,
        vtep: addr.into(),
        state: NodeState::Ready,
        wireguard: Vec::new(),
        manager: None,
    }
}

fn service(number: u32) -> Result<ServiceRecord> {
    let published = u32::from(FIRST_PORT) + number;
    Ok(ServiceRecord {
        id: ServiceId::from(format!("{number:0>25}")),
        name: format!("service-{number}"),
        stack: "".into(),
        endpoint_mode: EndpointMode::Vip,
        vips: vec![VipRecord {
            network: ingress(),
            addr: Some(Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 0).to_bits() + number)),
            aliases: Vec::new(),
        }],
        ports: vec![PortRecord {
            name: "".into(),
            protocol: Protocol::Tcp,
            target: TARGET_PORT,
            published: u16::try_from(published).context("more services than ports")?,
            mode: PublishMode::Ingress,
        }],
        balancing: BalancingRecord::default(),
    })
}

fn task(service: &ServiceRecord, number: u32, slot: u32, tasks_each: u32) -> TaskRecord {
    let count = number * tasks_each + slot;
    let id = task_id(number, slot);
    TaskRecord {
        name: format!("{}.{slot}.{id}", service.name).into(),
        id,
        service: service.id.clone(),
        slot: slot.into(),
        node: node_id(1 + count % PEERS),
        incarnation: count,
        desired: TaskState::Running,
        observed: TaskState::Running,
        weight: WEIGHT_MAX,
        endpoints: Box::new([EndpointRecord {
            network: ingress(),
            addr: Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 1, 0).to_bits() + count),
        }]),
        spec: None,
    }
}

fn task_id(number: u32, slot: u32) -> TaskId {
    TaskId::from(format!("{number:0>20}{slot:0>5}"))
}

fn node_id(number: u32) -> NodeId {
    NodeId::from(format!("n{number:0>24}"))
}

fn ingress() -> NetworkId {
    "ingress".into()
}
