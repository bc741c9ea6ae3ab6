//! Subnets and VXLAN identifiers of networks.

use std::fmt::Display;
use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use super::Draft;
use crate::model::network::{VNI_MAX, VNI_MIN};
use crate::model::{IpamConfig, Network, Node, State, Subnet};
use crate::refusal::Refusal;

/// Subnets that no network can have: this host, loopback, the nodes' own aliases for endpoints, multicast and above.
const UNUSABLE: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 64, 0), 18),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
];

pub(super) const SUBNET: &str = "IPAM.Config.Subnet";
pub(super) const GATEWAY: &str = "IPAM.Config.Gateway";

/// Longest prefix of a subnet: a gateway and a task.
const PREFIX_LEN_MAX: u8 = 30;
/// Shortest prefix of a subnet.
const PREFIX_LEN_MIN: u8 = 8;

impl Draft {
    /// The next free VXLAN identifier.
    pub(super) fn take_vni(&mut self) -> Result<u32, Refusal> {
        let count = VNI_MAX - VNI_MIN + 1;
        let last = self.state.counters.vni;
        let start = if last < VNI_MIN { 0 } else { last - VNI_MIN + 1 };
        let is_free = |vni: &u32| self.state.networks.values().all(|network| network.vni != *vni);
        let vni = (0..count).map(|step| VNI_MIN + (start + step) % count).find(is_free);
        let vni = vni.ok_or(Refusal::VnisExhausted)?;
        self.state.counters.vni = vni;
        Ok(vni)
    }

    /// The subnets for what was asked: as asked, or one from the pools.
    pub(super) fn choose_subnets(&self, ipam: &[IpamConfig]) -> Result<Vec<Subnet>, Refusal> {
        let mut taken: Vec<Ipv4Net> = self
            .state
            .networks
            .values()
            .flat_map(|network| &network.subnets)
            .map(|subnet| subnet.cidr)
            .collect();
        let automatic = [IpamConfig::default()];
        let ipam = if ipam.is_empty() { &automatic[..] } else { ipam };
        let mut subnets = Vec::with_capacity(ipam.len());
        for config in ipam {
            let chosen = match config.subnet {
                Some(cidr) => {
                    let asked = subnet(cidr.trunc(), config)?;
                    self.check_subnet(asked.cidr, &taken)?;
                    asked
                }
                None => subnet(self.automatic_subnet(&taken)?, config)?,
            };
            taken.push(chosen.cidr);
            subnets.push(chosen);
        }
        Ok(subnets)
    }

    fn check_subnet(&self, cidr: Ipv4Net, taken: &[Ipv4Net]) -> Result<(), Refusal> {
        if UNUSABLE.iter().any(|unusable| overlap(cidr, *unusable)) {
            return Err(Refusal::invalid(SUBNET, format!("{cidr} is reserved")));
        }
        match taken.iter().find(|other| overlap(cidr, **other)) {
            Some(other) => Err(Refusal::SubnetOverlaps { subnet: cidr.into(), other: (*other).into() }),
            None => check_routes(&self.state, cidr.into()),
        }
    }

    fn automatic_subnet(&self, taken: &[Ipv4Net]) -> Result<Ipv4Net, Refusal> {
        let cluster = self.cluster()?;
        let routes: Vec<Ipv4Net> = routes(&self.state).filter_map(|(_, route)| ipv4(route)).collect();
        let blocked = taken.iter().chain(&cluster.avoid).chain(&UNUSABLE).chain(&routes);
        let mut blocked: Vec<(u32, u32)> =
            blocked.map(|net| (net.network().into(), net.broadcast().into())).collect();
        blocked.sort_unstable();
        let mut gaps =
            cluster.address_pools.iter().filter_map(|pool| first_gap(*pool, cluster.subnet_size, &blocked));
        gaps.next().ok_or(Refusal::SubnetsExhausted)
    }
}

/// The first subnet of a pool that overlaps none of the blocked ranges, which are in order of their starts.
fn first_gap(pool: Ipv4Net, prefix_len: u8, blocked: &[(u32, u32)]) -> Option<Ipv4Net> {
    let size = 1_u64 << (32 - prefix_len);
    let mut start = u64::from(u32::from(pool.network()));
    for (first, last) in blocked.iter().map(|(first, last)| (u64::from(*first), u64::from(*last))) {
        if first >= start + size {
            break;
        }
        if last >= start {
            start = (last + 1).next_multiple_of(size);
        }
    }
    let start = u32::try_from(start).ok().map(Ipv4Addr::from)?;
    Ipv4Net::new(start, prefix_len).ok().filter(|subnet| pool.contains(subnet))
}

/// Whether two subnets have addresses in common; those of different families have none.
pub(super) fn overlap(a: impl Into<IpNet>, b: impl Into<IpNet>) -> bool {
    let (a, b) = (a.into(), b.into());
    a.contains(&b) || b.contains(&a)
}

fn ipv4(net: IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(net),
        IpNet::V6(_) => None,
    }
}

/// The subnets that the nodes' own routes lead to, as far as the nodes tell. A default route keeps nobody away.
pub(super) fn routes(state: &State) -> impl Iterator<Item = (&Node, IpNet)> {
    let of_node = |node| Node::routes(node).map(move |route| (node, route));
    state.nodes.values().map(Arc::as_ref).flat_map(of_node)
}

/// Refuses a subnet that a node has a route to: its tasks, and what goes out through it, could not reach both.
pub(super) fn check_routes(state: &State, subnet: IpNet) -> Result<(), Refusal> {
    let Some((node, route)) = routes(state).find(|(_, route)| overlap(subnet, *route)) else { return Ok(()) };
    let node = &node.description.hostname;
    let problem =
        format!("{subnet} overlaps {route}, which node {node} has a route to: choose another --subnet");
    Err(Refusal::invalid(SUBNET, problem))
}

/// A network that shares addresses with one of a node's own routes, and that route.
pub(crate) fn network_on_route<'s>(state: &'s State, node: &Node) -> Option<(&'s Network, IpNet)> {
    let on_route = |network: &Network, route: IpNet| {
        let subnets = network.subnets.iter().map(|subnet| IpNet::from(subnet.cidr));
        let mut subnets = subnets.chain(network.subnet6.map(|subnet| subnet.cidr.into()));
        subnets.any(|subnet| overlap(subnet, route))
    };
    let mut networks = state.networks.values();
    networks.find_map(|network| Some((&**network, node.routes().find(|route| on_route(network, *route))?)))
}

/// A subnet as it is asked for.
pub(super) fn subnet(cidr: Ipv4Net, config: &IpamConfig) -> Result<Subnet, Refusal> {
    if !(PREFIX_LEN_MIN..=PREFIX_LEN_MAX).contains(&cidr.prefix_len()) {
        let problem = format!("{cidr}: the prefix must be /{PREFIX_LEN_MIN} to /{PREFIX_LEN_MAX}");
        return Err(Refusal::invalid(SUBNET, problem));
    }
    let is_host = |addr: Ipv4Addr| cidr.contains(&addr) && addr != cidr.network() && addr != cidr.broadcast();
    let gateway = config.gateway.unwrap_or(Ipv4Addr::from(u32::from(cidr.network()) + 1));
    if !is_host(gateway) {
        return Err(Refusal::invalid(GATEWAY, format!("{gateway} is not a host address of {cidr}")));
    }
    let range = config.range.map_or(cidr, |range| range.trunc());
    if !cidr.contains(&range) {
        return Err(Refusal::invalid("IPAM.Config.IPRange", format!("{range} is not part of {cidr}")));
    }
    for (name, addr) in &config.aux {
        check_aux(name, addr, &gateway, is_host(*addr), cidr)?;
    }
    let reserved = config.aux.values().copied().collect();
    Ok(Subnet { cidr, gateway, range, reserved, cursor: 0 })
}

/// Checks an auxiliary address, which `is_host` if its subnet has it for hosts.
pub(super) fn check_aux<A: Display + PartialEq>(
    name: &str,
    addr: &A,
    gateway: &A,
    is_host: bool,
    cidr: impl Display,
) -> Result<(), Refusal> {
    let problem = if !is_host {
        format!("{addr} ({name}) is not a host address of {cidr}")
    } else if addr == gateway {
        format!(
            "{addr} ({name}) is the gateway, which no task gets: leave it out, or name another with --gateway"
        )
    } else {
        return Ok(());
    };
    Err(Refusal::invalid("IPAM.Config.AuxiliaryAddresses", problem))
}

#[cfg(test)]
mod tests {
    use mesh_api::session::{NodeDescription, ROUTES_MAX};
    use mesh_api::table::NodeState;

    use super::*;
    use crate::command::Action;
    use crate::model::{Ipam6Config, NetworkSpec};
    use crate::testing::{World, description, network};

    fn describe(world: &mut World, routes: &[&str]) -> Result<(), Refusal> {
        let routes = routes.iter().map(|route| route.parse().unwrap()).collect();
        let description = Some(NodeDescription { routes, ..description("n1") });
        let (state, message) = (NodeState::Ready, String::new());
        world.try_to(Action::SetNodeStatus { id: "n1".into(), state, message, description }).map(drop)
    }

    fn create(
        world: &mut World,
        name: &str,
        subnet: Option<&str>,
        ipv6: Option<&str>,
    ) -> Result<(), Refusal> {
        let subnet = subnet.map(|text| text.parse().unwrap());
        let ipam6 =
            ipv6.map(|text| Ipam6Config { subnet: Some(text.parse().unwrap()), ..Ipam6Config::default() });
        let spec = NetworkSpec {
            ipam: vec![IpamConfig { subnet, ..IpamConfig::default() }],
            ipam6,
            ..network(name)
        };
        world.try_to(Action::CreateNetwork { id: name.into(), spec }).map(drop)
    }

    #[test]
    fn networks_go_around_the_nodes_routes() {
        let mut world = World::new(&["n1"]);
        describe(
            &mut world,
            &["0.0.0.0/0", "::/0", "10.0.1.128/25", "10.0.2.0/23", "172.17.0.0/16", "fd00:9::/48"],
        )
        .unwrap();
        create(&mut world, "auto", None, None).unwrap();
        let auto = world.state.network_by_name("auto").unwrap();
        assert_eq!(auto.subnets[0].cidr.to_string(), "10.0.4.0/24");
        for (subnet, ipv6, problem) in [
            ("10.0.3.0/25", None, "10.0.3.0/25 overlaps 10.0.2.0/23, which node n1 has a route to"),
            ("172.16.0.0/12", None, "172.16.0.0/12 overlaps 172.17.0.0/16, which node n1 has a route to"),
            (
                "192.0.2.0/24",
                Some("fd00:9::/64"),
                "fd00:9::/64 overlaps fd00:9::/48, which node n1 has a route to",
            ),
        ] {
            let refusal = create(&mut world, "x", Some(subnet), ipv6).unwrap_err().to_string();
            assert_eq!(refusal, format!("IPAM.Config.Subnet: {problem}: choose another --subnet"));
        }
        create(&mut world, "free", Some("172.18.0.0/16"), Some("fd00:8::/64")).unwrap();
        assert_eq!(network_on_route(&world.state, world.node("n1")), None);
        world.check_invariants();
    }

    #[test]
    fn a_route_that_comes_after_a_network_is_found_and_moves_nothing() {
        let mut world = World::new(&["n1"]);
        create(&mut world, "app", Some("172.18.0.0/16"), Some("fd00:8::/64")).unwrap();
        for route in ["172.18.3.0/24", "fd00::/16"] {
            describe(&mut world, &["0.0.0.0/0", route]).unwrap();
            let (network, found) = network_on_route(&world.state, world.node("n1")).unwrap();
            assert_eq!((network.spec.name.as_str(), found.to_string().as_str()), ("app", route));
        }
        let many: Vec<String> =
            (0..=ROUTES_MAX).map(|at| format!("10.{}.{}.0/24", at / 256, at % 256)).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let refusal = describe(&mut world, &many).unwrap_err().to_string();
        assert_eq!(refusal, "routes: 1025 are more than the 1024 that a node can name");
    }

    #[test]
    fn pools_that_are_used_up_or_routed_are_said_to_be() {
        let mut world = World::new(&["n1"]);
        describe(&mut world, &["10.0.0.0/8"]).unwrap();
        let refusal = create(&mut world, "app", None, None).unwrap_err();
        assert_eq!(refusal, Refusal::SubnetsExhausted);
        assert!(
            refusal.to_string().contains("nodes have routes to it. Name a subnet with --subnet"),
            "{refusal}"
        );
    }
}
