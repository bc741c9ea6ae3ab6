//! What a task's record in the table comes to on this node: its links, addresses, routes and files.

use std::net::{IpAddr, Ipv4Addr};

use mesh_api::id::NetworkId;
use mesh_api::table::{NetworkRecord, Subnet6Record, SubnetRecord, Table, TaskRecord, TaskSpec};

use crate::dns::resolv_conf::for_task;
use crate::encryption::ENCRYPTION_OVERHEAD;
use crate::links::{
    DefaultRoute, EndpointLink, IPV6_MTU_MIN, SubnetRoute, TaskAddress, TaskNetwork, host_link_name,
};
use crate::runtime::layout::InitSpec;
use crate::runtime::{ImageError, Runtime, TaskNames};

/// A task, ready to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assignment {
    /// What it runs.
    pub(super) spec: TaskSpec,
    /// What the shim is told.
    pub(super) init: InitSpec,
    /// How it is connected.
    pub(super) wiring: Wiring,
}

/// How a task is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wiring {
    /// Its links, with the network of each.
    pub(super) links: Vec<(NetworkId, EndpointLink)>,
    /// What is configured inside.
    pub(super) network: TaskNetwork,
    /// Its name server.
    pub(super) name_server: Option<Ipv4Addr>,
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

/// How tasks' links are made on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkPlan {
    /// Their MTU, bytes.
    pub(super) mtu: u32,
    /// Whether they can have IPv6.
    pub(super) ipv6: bool,
}

impl LinkPlan {
    /// How they are made in a network.
    pub(super) fn within(self, network: &NetworkRecord) -> Self {
        let most = if network.encrypted { self.mtu.saturating_sub(ENCRYPTION_OVERHEAD) } else { self.mtu };
        let mtu = network.mtu.map_or(most, |bound| bound.min(most));
        Self { mtu, ipv6: self.ipv6 && mtu >= IPV6_MTU_MIN }
    }
}

/// Works out how to make a task on the node called `node_name`, whose own resolv.conf is `resolv_conf`.
pub(super) fn assign(
    table: &Table,
    task: &TaskRecord,
    node_name: &str,
    resolv_conf: &str,
    plan: LinkPlan,
) -> Result<Assignment, AssignError> {
    let spec = TaskSpec::clone(task.spec.as_deref().ok_or(AssignError::NoSpec)?);
    let wiring = wire(table, task, plan, None)?;
    let names = TaskNames {
        task: task.name.to_string(),
        node: node_name.to_owned(),
        resolv_conf: wiring.name_server.map(|server| for_task(resolv_conf, server)).unwrap_or_default(),
        addresses: task.endpoints.iter().map(|endpoint| endpoint.addr).collect(),
    };
    let init = Runtime::plan(&task.id, &spec, &names)?;
    Ok(Assignment { spec, init, wiring })
}

/// Works out how to connect a task, or with an `interface` what is attached by that.
pub(super) fn wire(
    table: &Table,
    task: &TaskRecord,
    plan: LinkPlan,
    interface: Option<&str>,
) -> Result<Wiring, AssignError> {
    let mut wiring = Wiring::default();
    wiring.network.foreign = interface.is_some();
    for (index, endpoint) in task.endpoints.iter().enumerate() {
        let addr = endpoint.addr;
        let record = table.networks.get(&endpoint.network);
        let (record, SubnetRecord { cidr, gateway }) = record
            .and_then(|record| Some((record, subnet(&record.subnets, addr)?)))
            .ok_or_else(|| AssignError::NoSubnet { network: endpoint.network.clone(), addr })?;
        let host_name = host_link_name(&task.id, index).ok_or(AssignError::TooManyEndpoints)?;
        let task_name = interface.map_or_else(|| format!("eth{index}"), str::to_owned);
        let LinkPlan { mtu, ipv6 } = plan.within(record);
        let Wiring { links, network, name_server } = &mut wiring;
        // The name server is at the gateway that the way out leads by, and without one at the first.
        let has_way_out = network.default_routes.iter().any(|route| route.gateway.is_ipv4());
        if !has_way_out && (name_server.is_none() || !record.internal) {
            *name_server = Some(gateway);
        }
        let mut on_link: Vec<(IpAddr, u8, IpAddr)> = vec![(addr.into(), cidr.prefix_len(), gateway.into())];
        if let Some(subnet6) = record.subnet6.filter(|_| ipv6) {
            let Subnet6Record { cidr, gateway } = subnet6;
            on_link.push((subnet6.addr_of(addr).into(), cidr.prefix_len(), gateway.into()));
        }
        for (addr, prefix, gateway) in on_link {
            network.addresses.push(TaskAddress { link: task_name.clone(), addr, prefix });
            let same_family = |route: &DefaultRoute| route.gateway.is_ipv4() == gateway.is_ipv4();
            if !record.internal && !network.default_routes.iter().any(same_family) {
                network.default_routes.push(DefaultRoute { gateway, link: task_name.clone() });
            }
        }
        let others = record.subnets.iter().map(|other| other.cidr).filter(|other| *other != cidr);
        let route = |subnet| SubnetRoute { subnet, link: task_name.clone() };
        network.subnet_routes.extend(others.map(route));
        links.push((endpoint.network.clone(), EndpointLink { host_name, task_name, addr, mtu }));
    }
    Ok(wiring)
}

fn subnet(subnets: &[SubnetRecord], addr: Ipv4Addr) -> Option<SubnetRecord> {
    subnets.iter().find(|subnet| subnet.cidr.contains(&addr)).copied()
}

#[cfg(test)]
pub(super) mod tests {
    use ipnet::Ipv4Net;
    use mesh_api::table::{ClusterRecord, EndpointRecord, ReturnPath, TaskState, WEIGHT_MAX};

    use super::*;

    /// A table with networks `ingress` (10.0.0.0/24, fd00:1::/64), `front` (10.0.1.0/24) and `back` (10.0.2.0/24 and
    /// fd00:3::/96, internal).
    pub(in crate::node) fn table() -> Table {
        let mut table = Table::new(ClusterRecord {
            id: "c".into(),
            hash_seed: 0,
            data_path_port: 4789,
            return_path: ReturnPath::Tunnel,
            key_epoch: 0,
        });
        let subnets6 = [Some(("fd00:1::/64", "fd00:1::1")), None, Some(("fd00:3::/96", "fd00:3::1"))];
        for ((number, id), subnet6) in ["ingress", "front", "back"].into_iter().enumerate().zip(subnets6) {
            let cidr = format!("10.0.{number}.0/24").parse().unwrap();
            let gateway = Ipv4Addr::new(10, 0, number as u8, 1);
            let record = NetworkRecord {
                id: id.into(),
                name: id.to_owned(),
                vni: 4096 + number as u32,
                subnets: vec![SubnetRecord { cidr, gateway }],
                subnet6: subnet6.map(|(cidr, gateway)| Subnet6Record {
                    cidr: cidr.parse().unwrap(),
                    gateway: gateway.parse().unwrap(),
                }),
                internal: id == "back",
                ingress: id == "ingress",
                mtu: None,
                encrypted: false,
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
            egress: Vec::new(),
        };
        TaskRecord {
            id: id.into(),
            name: format!("web.1.{id}").into(),
            service: "web".into(),
            slot: 1,
            node: "here".into(),
            incarnation: 1,
            desired: TaskState::Running,
            observed: TaskState::Assigned,
            weight: WEIGHT_MAX,
            endpoints: endpoints.collect(),
            spec: Some(Box::new(spec)),
        }
    }

    const ID: &str = "0123456789abcdefghijklmno";

    const PLAN: LinkPlan = LinkPlan { mtu: 1450, ipv6: true };

    fn assigned(networks: &[&str]) -> Assignment {
        assign(&table(), &task(ID, "shoal/whoami", &[], networks), "h", "search example.com", PLAN).unwrap()
    }

    fn routes(assignment: &Assignment) -> Vec<String> {
        let route = |route: &DefaultRoute| format!("{} {}", route.gateway, route.link);
        assignment.wiring.network.default_routes.iter().map(route).collect()
    }

    #[test]
    fn the_way_out_and_names_are_by_the_first_network_that_is_not_internal() {
        let cases: &[(&[&str], &[&str], Option<u8>)] = &[
            (&["ingress", "front"], &["10.0.0.1 eth0", "fd00:1::1 eth0"], Some(0)),
            (&["back", "front"], &["10.0.1.1 eth1"], Some(1)),
            (&["front", "ingress"], &["10.0.1.1 eth0", "fd00:1::1 eth1"], Some(1)),
            (&["back"], &[], Some(2)),
            (&[], &[], None),
        ];
        for (networks, expected, nameserver) in cases {
            let assignment = assigned(networks);
            assert_eq!(routes(&assignment), *expected, "{networks:?}");
            let expected = nameserver
                .map(|number| format!("nameserver 10.0.{number}.1\nsearch example.com\noptions ndots:0\n"));
            assert_eq!(assignment.init.resolv_conf, expected.unwrap_or_default(), "{networks:?}");
        }
    }

    #[test]
    fn networks_with_an_ipv6_subnet_give_an_ipv6_address_where_links_can_have_one() {
        let addresses = |assignment: &Assignment| -> Vec<String> {
            let text =
                |address: &TaskAddress| format!("{} {}/{}", address.link, address.addr, address.prefix);
            assignment.wiring.network.addresses.iter().map(text).collect()
        };
        let expected = ["eth0 10.0.0.5/24", "eth0 fd00:1::a00:5/64", "eth1 10.0.1.5/24", "eth2 10.0.2.5/24"];
        let all = ["ingress", "front", "back"];
        assert_eq!(addresses(&assigned(&all))[..4], expected);
        assert_eq!(addresses(&assigned(&all))[4], "eth2 fd00:3::a00:205/96");
        let plan = LinkPlan { ipv6: false, ..PLAN };
        let without = assign(&table(), &task(ID, "shoal/whoami", &[], &all), "h", "", plan).unwrap();
        assert!(without.wiring.network.addresses.iter().all(|address| address.addr.is_ipv4()));
        assert_eq!(routes(&without), ["10.0.0.1 eth0"]);
    }

    #[test]
    fn a_networks_mtu_bounds_its_links_and_one_below_ipv6s_least_leaves_ipv6_out() {
        let mut table = table();
        let all = ["ingress", "front", "back"];
        for (network, mtu) in all.iter().zip([1400, 9000, 1279]) {
            table.networks.get_mut(&NetworkId::from(*network)).unwrap().mtu = Some(mtu);
        }
        let wiring = wire(&table, &task(ID, "shoal/whoami", &[], &all), PLAN, None).unwrap();
        let mtus: Vec<_> = wiring.links.iter().map(|(_, link)| link.mtu).collect();
        assert_eq!(mtus, [1400, 1450, 1279]);
        let with_ipv6 = wiring.network.addresses.iter().filter(|address| address.addr.is_ipv6());
        assert_eq!(with_ipv6.map(|address| address.link.as_str()).collect::<Vec<_>>(), ["eth0"]);
    }

    #[test]
    fn a_networks_other_subnets_are_behind_the_same_link() {
        let mut table = table();
        for (network, number) in [("front", 21), ("back", 22), ("back", 23)] {
            let gateway = Ipv4Addr::new(10, number, 0, 1);
            let cidr = Ipv4Net::new_assert(gateway, 16).trunc();
            let record = table.networks.get_mut(&NetworkId::from(network)).unwrap();
            record.subnets.insert(0, SubnetRecord { cidr, gateway });
        }
        let task = task(ID, "shoal/whoami", &[], &["ingress", "front", "back"]);
        let TaskNetwork { subnet_routes, default_routes, addresses, foreign: false } =
            wire(&table, &task, PLAN, None).unwrap().network
        else {
            panic!("a task's own namespace");
        };
        let subnet_routes: Vec<_> =
            subnet_routes.iter().map(|route| format!("{} {}", route.subnet, route.link)).collect();
        assert_eq!(subnet_routes, ["10.21.0.0/16 eth1", "10.23.0.0/16 eth2", "10.22.0.0/16 eth2"]);
        assert_eq!(default_routes[0].gateway, Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(addresses.iter().filter(|address| address.addr.is_ipv4()).count(), 3);
    }

    #[test]
    fn links_and_environment_are_the_tasks_own() {
        let Assignment { init, wiring: Wiring { links, network, .. }, .. } = assigned(&["ingress", "back"]);
        assert_eq!(links[1].0.as_str(), "back");
        let link = EndpointLink {
            host_name: "sh01234567891".to_owned(),
            task_name: "eth1".to_owned(),
            addr: Ipv4Addr::new(10, 0, 2, 5),
            mtu: 1450,
        };
        assert_eq!(links[1].1, link);
        assert_eq!(network.addresses[0].prefix, 24);
        assert_eq!(init.hostname, "0123456789ab");
        assert!(init.hosts.contains("10.0.0.5\t0123456789ab\n"));
        for pair in ["GREETING=hello", "SHOAL_SERVICE=web", "SHOAL_NODE=h", "HOSTNAME=0123456789ab"] {
            assert!(init.env.iter().any(|have| have == pair), "{pair}");
        }
    }

    #[test]
    fn what_can_not_be_made_says_why() {
        let unknown = assign(&table(), &task(ID, "nginx", &[], &[]), "h", "", PLAN);
        assert!(matches!(unknown, Err(AssignError::Image(_))));
        let nowhere = assign(&table(), &task(ID, "shoal/whoami", &[], &["gone"]), "h", "", PLAN);
        assert!(matches!(nowhere, Err(AssignError::NoSubnet { .. })));
    }
}
