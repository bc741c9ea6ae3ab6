//! IPv6 subnets. Addresses in them are not given out: each follows from an IPv4 address, as its lowest 32 bits.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_api::id::ClusterId;
use mesh_api::table::Subnet6Record;
use sha2::{Digest as _, Sha256};

use super::Draft;
use super::alloc::{GATEWAY, SUBNET, check_aux, check_routes, overlap, routes};
use crate::model::{Ipam6Config, NetworkSpec, State, Subnet};
use crate::refusal::Refusal;

/// Shortest prefix of a subnet.
const PREFIX_LEN_MIN: u8 = 8;
/// Prefix length of an automatic subnet.
const AUTOMATIC_PREFIX_LEN: u8 = 64;

/// Subnets that no network can have, and what they are.
const UNUSABLE: [(Ipv6Net, &str); 4] = [
    (Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 64), "loopback, and IPv4 addresses written as IPv6"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10), "link-local"),
    (Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8), "multicast"),
    (
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd73, 0x686f, 0x616c, 0, 0, 0, 0, 0), 48),
        "Shoal's own on each node",
    ),
];

/// The 65,536 /64 subnets of a cluster: a unique local prefix (RFC 4193) whose 40 random bits come from the cluster's id.
fn cluster_prefix(cluster: &ClusterId) -> u128 {
    let digest = Sha256::digest(cluster.as_str().as_bytes());
    let random = digest.iter().take(5).fold(0_u128, |bits, byte| bits << 8 | u128::from(*byte));
    0xfd << 120 | random << 80
}

/// The subnet for the network with `vni`: the one of that number, in 16 bits, or the next that is free.
fn automatic(cluster: &ClusterId, vni: u32, taken: &[Ipv6Net]) -> Option<Ipv6Net> {
    let prefix = cluster_prefix(cluster);
    let mut subnets = (0..=0xffff_u32).filter_map(|step| {
        let number = u128::from(vni.wrapping_add(step) & 0xffff);
        Ipv6Net::new(Ipv6Addr::from_bits(prefix | number << 64), AUTOMATIC_PREFIX_LEN).ok()
    });
    subnets.find(|subnet| !taken.iter().any(|other| overlap(*subnet, *other)))
}

fn taken(state: &State) -> Vec<Ipv6Net> {
    state.networks.values().filter_map(|network| Some(network.subnet6?.cidr)).collect()
}

/// Those that the nodes have routes to.
fn routed(state: &State) -> impl Iterator<Item = Ipv6Net> {
    routes(state).filter_map(|(_, route)| match route {
        IpNet::V4(_) => None,
        IpNet::V6(route) => Some(route),
    })
}

impl Draft {
    /// The IPv6 subnet for what was asked, of a network with `vni` and these IPv4 subnets.
    pub(super) fn choose_subnet6(
        &self,
        spec: &NetworkSpec,
        vni: u32,
        subnets: &[Subnet],
    ) -> Result<Option<Subnet6Record>, Refusal> {
        let Some(config) = &spec.ipam6 else { return Ok(None) };
        let cluster = &self.cluster()?.id;
        let mut taken = taken(&self.state);
        if config.subnet.is_none() {
            taken.extend(routed(&self.state));
        }
        let subnet = subnet6(cluster, config, vni, subnets, &taken)?;
        check_routes(&self.state, subnet.cidr.into())?;
        Ok(Some(subnet))
    }
}

fn subnet6(
    cluster: &ClusterId,
    config: &Ipam6Config,
    vni: u32,
    subnets: &[Subnet],
    taken: &[Ipv6Net],
) -> Result<Subnet6Record, Refusal> {
    let cidr = match config.subnet {
        Some(subnet) => checked(subnet, taken)?,
        None => automatic(cluster, vni, taken).ok_or(Refusal::Subnets6Exhausted)?,
    };
    let unnamed = Subnet6Record { cidr, gateway: cidr.network() };
    let gateway4 = subnets.first().map(|subnet| subnet.gateway);
    let default = gateway4.map_or(cidr.network(), |gateway| unnamed.addr_of(gateway));
    let gateway = config.gateway.unwrap_or(default);
    if !cidr.contains(&gateway) || gateway == cidr.network() {
        return Err(Refusal::invalid(GATEWAY, format!("{gateway} is not a host address of {cidr}")));
    }
    check_gateway(gateway, gateway4, subnets)?;
    for (name, addr) in &config.aux {
        let is_host = cidr.contains(addr) && *addr != cidr.network();
        check_aux(name, addr, &gateway, is_host, cidr)?;
    }
    Ok(Subnet6Record { cidr, gateway })
}

/// Refuses a gateway that would have an endpoint's MAC address: that of an endpoint ends in its IPv4 address, as its IPv6
/// address does, and so does the gateway's. `gateway4` is nobody else's.
pub(super) fn check_gateway(
    gateway: Ipv6Addr,
    gateway4: Option<Ipv4Addr>,
    subnets: &[Subnet],
) -> Result<(), Refusal> {
    let [.., a, b, c, d] = gateway.octets();
    let end = Ipv4Addr::new(a, b, c, d);
    let is_endpoints = |cidr: Ipv4Net| cidr.contains(&end) && Some(end) != gateway4;
    if !subnets.iter().any(|subnet| is_endpoints(subnet.cidr)) {
        return Ok(());
    }
    let remedy = gateway4
        .map_or_else(String::new, |gateway| format!(": name one that ends as {gateway} does, or none"));
    let problem =
        format!("{gateway} ends in {end}, an address of the network's IPv4 subnet, and is a task's{remedy}");
    Err(Refusal::invalid(GATEWAY, problem))
}

/// Keeps the IPv4 addresses from tasks whose IPv6 addresses are auxiliary ones.
pub(super) fn reserve(subnets: &mut [Subnet], ipv6: &Subnet6Record, config: &Ipam6Config) {
    for addr in config.aux.values() {
        let [.., a, b, c, d] = addr.octets();
        let end = Ipv4Addr::new(a, b, c, d);
        let holder = subnets.iter_mut().find(|subnet| subnet.cidr.contains(&end) && subnet.gateway != end);
        if let Some(subnet) = holder.filter(|_| ipv6.addr_of(end) == *addr) {
            subnet.reserved.insert(end);
        }
    }
}

fn checked(subnet: Ipv6Net, taken: &[Ipv6Net]) -> Result<Ipv6Net, Refusal> {
    let cidr = subnet.trunc();
    let longest = Subnet6Record::PREFIX_LEN_MAX;
    if !(PREFIX_LEN_MIN..=longest).contains(&cidr.prefix_len()) {
        let problem = format!(
            "{subnet}: the prefix must be /{PREFIX_LEN_MIN} to /{longest}, since tasks' IPv6 addresses end in their IPv4 \
             addresses"
        );
        return Err(Refusal::invalid(SUBNET, problem));
    }
    if let Some((_, what)) = UNUSABLE.iter().find(|(unusable, _)| overlap(cidr, *unusable)) {
        let problem = format!("{subnet} is reserved ({what}): choose one such as fd00:1234:5678:1::/64");
        return Err(Refusal::invalid(SUBNET, problem));
    }
    match taken.iter().find(|other| overlap(cidr, **other)) {
        Some(other) => Err(Refusal::SubnetOverlaps { subnet: cidr.into(), other: (*other).into() }),
        None => Ok(cidr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Action;
    use crate::model::IpamConfig;
    use crate::refusal::Code;
    use crate::testing::{World, network};

    fn net(text: &str) -> Ipv6Net {
        text.parse().unwrap()
    }

    fn create(world: &mut World, name: &str, subnet: &str, gateway: Option<&str>) -> Result<(), Refusal> {
        let gateway = gateway.map(|text| text.parse().unwrap());
        let ipam6 = Some(Ipam6Config { subnet: Some(net(subnet)), gateway, ..Default::default() });
        let spec = NetworkSpec { ipam6, ..network(name) };
        world.try_to(Action::CreateNetwork { id: name.into(), spec }).map(drop)
    }

    fn subnet6(world: &World, name: &str) -> Subnet6Record {
        world.state.network_by_name(name).unwrap().subnet6.unwrap()
    }

    #[test]
    fn subnets_are_made_of_the_clusters_id_and_the_vni() {
        let mut world = World::new(&[]);
        let spec = NetworkSpec { ipam6: Some(Ipam6Config::default()), ..network("app") };
        world.must(Action::CreateNetwork { id: "app".into(), spec });
        world.create_network("plain");
        assert_eq!(world.state.network_by_name("plain").unwrap().subnet6, None);
        // VNIs 4096 and 4097.
        let digest = Sha256::digest(b"cluster");
        let hex = |bytes: std::ops::Range<usize>| {
            digest[bytes].iter().fold(0_u16, |group, byte| group << 8 | u16::from(*byte))
        };
        let prefix = format!("fd{:02x}:{:x}:{:x}", hex(0..1), hex(1..3), hex(3..5));
        let ingress = subnet6(&world, "ingress");
        assert_eq!(ingress.cidr, net(&format!("{prefix}:1000::/64")));
        assert_eq!(ingress.gateway, format!("{prefix}:1000::a00:1").parse::<Ipv6Addr>().unwrap());
        let app = subnet6(&world, "app");
        assert_eq!(app.cidr, net(&format!("{prefix}:1001::/64")));
        assert_eq!(app.gateway, app.addr_of(Ipv4Addr::new(10, 0, 1, 1)));
        assert_ne!(cluster_prefix(&"another".into()), cluster_prefix(&"cluster".into()));
        world.check_invariants();
    }

    #[test]
    fn automatic_subnets_go_around_those_that_are_taken() {
        let cluster = ClusterId::from("cluster");
        let first = automatic(&cluster, 0x2_ffff, &[]).unwrap();
        let next = automatic(&cluster, 0x2_ffff, &[first]).unwrap();
        assert_eq!(next, automatic(&cluster, 0, &[]).unwrap(), "numbers go round");
        let all = Ipv6Net::new(first.network(), 48).unwrap();
        assert_eq!(automatic(&cluster, 4096, &[all]), None);
    }

    #[test]
    fn subnets_asked_for_are_checked() {
        let mut world = World::new(&[]);
        create(&mut world, "a", "fd00:1::/64", None).unwrap();
        assert_eq!(subnet6(&world, "a").gateway.to_string(), "fd00:1::a00:101");
        create(&mut world, "b", "fd00:2::/96", Some("fd00:2::1")).unwrap();
        assert_eq!(subnet6(&world, "b").gateway.to_string(), "fd00:2::1");
        create(&mut world, "c", "2001:db8::/32", Some("2001:db8:ffff::a00:301")).unwrap();
        for (subnet, gateway, expected) in [
            ("fd00:3::/97", None, "the prefix must be /8 to /96"),
            ("fc00::/7", None, "the prefix must be /8 to /96"),
            ("fe80:1::/64", None, "is reserved (link-local)"),
            ("ff05::/64", None, "is reserved (multicast)"),
            ("::ffff:0:0/96", None, "is reserved (loopback, and IPv4 addresses written as IPv6)"),
            ("::/8", None, "is reserved"),
            ("fd73:686f:616c:1::/64", None, "is reserved (Shoal's own on each node)"),
            ("fd00:1::/96", None, "fd00:1::/96 overlaps fd00:1::/64"),
            ("fd00::/16", None, "overlaps"),
            ("fd00:3::/64", Some("fd00:4::1"), "fd00:4::1 is not a host address of fd00:3::/64"),
            ("fd00:3::/64", Some("fd00:3::"), "fd00:3:: is not a host address of fd00:3::/64"),
            ("fd00:3::/64", Some("fd00:3::1:a00:409"), "ends in 10.0.4.9"),
        ] {
            let refusal = create(&mut world, "d", subnet, gateway).unwrap_err();
            assert!(refusal.to_string().contains(expected), "{subnet} {gateway:?}: {refusal}");
            assert_eq!(refusal.code(), Code::InvalidArgument, "{refusal}");
        }
        world.check_invariants();
    }

    #[test]
    fn the_gateway_follows_the_ipv4_gateway() {
        let mut world = World::new(&[]);
        let mut spec = NetworkSpec { ipam6: Some(Ipam6Config::default()), ..network("app") };
        let subnet = Some("10.77.0.0/24".parse().unwrap());
        let gateway = Some(Ipv4Addr::new(10, 77, 0, 254));
        spec.ipam.push(IpamConfig { subnet, gateway, ..Default::default() });
        world.must(Action::CreateNetwork { id: "app".into(), spec });
        assert!(subnet6(&world, "app").gateway.to_string().ends_with("::a4d:fe"));
    }
}
