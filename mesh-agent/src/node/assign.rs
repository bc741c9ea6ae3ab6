//! What a task's record in the table comes to on this node: its links, addresses, routes and files.

use std::net::Ipv4Addr;

use mesh_api::id::NetworkId;
use mesh_api::table::{SubnetRecord, Table, TaskRecord, TaskSpec};

use crate::links::{EndpointLink, TaskAddress, TaskNetwork, host_link_name};
use crate::runtime::layout::InitSpec;
use crate::runtime::{ImageError, Runtime, TaskNames};

/// A task, ready to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assignment {
    /// What it runs.
    pub(super) spec: TaskSpec,
    /// What the shim is told.
    pub(super) init: InitSpec,
    /// Its links, with the network of each.
    pub(super) links: Vec<(NetworkId, EndpointLink)>,
    /// What is configured inside.
    pub(super) network: TaskNetwork,
}

/// Why a task can't be made on this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum AssignError {
    /// What it is to run is not known or not possible.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The table has no specification of it for this node.
    #[error("the managers sent no specification of the task")]
    NoSpec,
    /// Its address is in no subnet of the network.
    #[error("network {network} has no subnet with the task's address {addr}")]
    NoSubnet {
        /// The network.
        network: NetworkId,
        /// The address.
        addr: Ipv4Addr,
    },
    /// More endpoints than link names.
    #[error("a task can be on 36 networks at most")]
    TooManyEndpoints,
}

/// Works out how to make a task on the node called `node_name`, whose tasks' links have `mtu`.
pub(super) fn assign(
    table: &Table,
    task: &TaskRecord,
    node_name: &str,
    mtu: u32,
) -> Result<Assignment, AssignError> {
    let spec = task.spec.clone().ok_or(AssignError::NoSpec)?;
    let mut links = Vec::new();
    let mut network = TaskNetwork::default();
    let mut nameserver = None;
    for (index, endpoint) in task.endpoints.iter().enumerate() {
        let addr = endpoint.addr;
        let (internal, SubnetRecord { cidr, gateway }) = table
            .networks
            .get(&endpoint.network)
            .and_then(|record| Some((record.internal, subnet(&record.subnets, addr)?)))
            .ok_or_else(|| AssignError::NoSubnet { network: endpoint.network.clone(), addr })?;
        let host_name = host_link_name(&task.id, index).ok_or(AssignError::TooManyEndpoints)?;
        let task_name = format!("eth{index}");
        // The name server is at the gateway that the way out leads by, and without one at the first.
        if network.default_route.is_none() && (nameserver.is_none() || !internal) {
            nameserver = Some(gateway);
        }
        if network.default_route.is_none() && !internal {
            network.default_route = Some((gateway, task_name.clone()));
        }
        let prefix = cidr.prefix_len();
        network.addresses.push(TaskAddress { link: task_name.clone(), addr, prefix });
        links.push((endpoint.network.clone(), EndpointLink { host_name, task_name, addr, mtu }));
    }
    let names = TaskNames {
        task: task.name.clone(),
        node: node_name.to_owned(),
        nameserver,
        addresses: task.endpoints.iter().map(|endpoint| endpoint.addr).collect(),
    };
    let init = Runtime::plan(&task.id, &spec, &names)?;
    Ok(Assignment { spec, init, links, network })
}

fn subnet(subnets: &[SubnetRecord], addr: Ipv4Addr) -> Option<SubnetRecord> {
    subnets.iter().find(|subnet| subnet.cidr.contains(&addr)).copied()
}

#[cfg(test)]
pub(super) mod tests {
    use mesh_api::table::{ClusterRecord, EndpointRecord, NetworkRecord, TaskState};

    use super::*;

    /// A table with networks `ingress` (10.0.0.0/24), `front` (10.0.1.0/24) and `back` (10.0.2.0/24, internal).
    pub(in crate::node) fn table() -> Table {
        let mut table = Table::new(ClusterRecord { id: "c".into(), hash_seed: 0, data_path_port: 4789 });
        for (number, id) in ["ingress", "front", "back"].into_iter().enumerate() {
            let cidr = format!("10.0.{number}.0/24").parse().unwrap();
            let gateway = Ipv4Addr::new(10, 0, number as u8, 1);
            let record = NetworkRecord {
                id: id.into(),
                name: id.to_owned(),
                vni: 4096 + number as u32,
                subnets: vec![SubnetRecord { cidr, gateway }],
                internal: id == "back",
                ingress: id == "ingress",
            };
            table.networks.insert(record.id.clone(), record);
        }
        table
    }

    /// A task of node `here` that is to run `image` on `networks`, with host number 5 in each.
    pub(in crate::node) fn task(id: &str, image: &str, args: &[&str], networks: &[&str]) -> TaskRecord {
        let number = |network: &str| ["ingress", "front", "back"].iter().position(|name| *name == network);
        let endpoints = networks.iter().map(|network| EndpointRecord {
            network: (*network).into(),
            addr: Ipv4Addr::new(10, 0, number(network).unwrap_or(99) as u8, 5),
        });
        let spec = TaskSpec {
            image: image.to_owned(),
            command: vec![],
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            env: vec!["GREETING=hello".to_owned()],
            dir: String::new(),
            user: String::new(),
            hostname: String::new(),
            stop_grace_ns: 2_000_000_000,
            stop_signal: String::new(),
            service_name: "web".to_owned(),
        };
        TaskRecord {
            id: id.into(),
            name: format!("web.1.{id}"),
            service: "web".into(),
            slot: 1,
            node: "here".into(),
            incarnation: 1,
            desired: TaskState::Running,
            observed: TaskState::Assigned,
            endpoints: endpoints.collect(),
            spec: Some(spec),
        }
    }

    const ID: &str = "0123456789abcdefghijklmno";

    fn assigned(networks: &[&str]) -> Assignment {
        assign(&table(), &task(ID, "shoal/whoami", &[], networks), "h", 1450).unwrap()
    }

    #[test]
    fn the_way_out_and_names_are_by_the_first_network_that_is_not_internal() {
        let gateway = |number| Ipv4Addr::new(10, 0, number, 1);
        let cases = [
            (vec!["ingress", "front"], Some((0, "eth0")), Some(0)),
            (vec!["back", "front"], Some((1, "eth1")), Some(1)),
            (vec!["back"], None, Some(2)),
            (vec![], None, None),
        ];
        for (networks, route, nameserver) in cases {
            let assignment = assigned(&networks);
            let expected = route.map(|(number, link)| (gateway(number), link.to_owned()));
            assert_eq!(assignment.network.default_route, expected, "{networks:?}");
            let expected = nameserver
                .map_or_else(String::new, |n| format!("nameserver {}\noptions ndots:0\n", gateway(n)));
            assert_eq!(assignment.init.resolv_conf, expected, "{networks:?}");
        }
    }

    #[test]
    fn links_and_environment_are_the_tasks_own() {
        let Assignment { init, links, network, .. } = assigned(&["ingress", "back"]);
        assert_eq!(links[1].0.as_str(), "back");
        let link = EndpointLink {
            host_name: "sh01234567891".to_owned(),
            task_name: "eth1".to_owned(),
            addr: Ipv4Addr::new(10, 0, 2, 5),
            mtu: 1450,
        };
        assert_eq!(links[1].1, link);
        assert_eq!(network.addresses[1].prefix, 24);
        assert_eq!(init.hostname, "0123456789ab");
        assert!(init.hosts.contains("10.0.0.5\t0123456789ab\n"));
        for pair in ["GREETING=hello", "SHOAL_SERVICE=web", "SHOAL_NODE=h", "HOSTNAME=0123456789ab"] {
            assert!(init.env.iter().any(|have| have == pair), "{pair}");
        }
    }

    #[test]
    fn what_can_not_be_made_says_why() {
        let unknown = assign(&table(), &task(ID, "nginx", &[], &[]), "h", 1450);
        assert!(matches!(unknown, Err(AssignError::Image(_))));
        let nowhere = assign(&table(), &task(ID, "shoal/whoami", &[], &["gone"]), "h", 1450);
        assert!(matches!(nowhere, Err(AssignError::NoSubnet { .. })));
    }
}
