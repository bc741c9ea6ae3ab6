//! The host's own routes: the subnets that it reaches without Shoal.
//!
//! Those of the main table alone: what other tables and VRFs hold is for packets that rules lead there, as a task's way
//! out mostly isn't.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_api::session::ROUTES_MAX;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType,
};
use rtnetlink::RouteMessageBuilder;

use super::{Facts, HOST_ADDR6, HOST_PREFIX6, LinkError, Links};

/// The longest prefix of a route that stands for a default one: whoever takes all traffic without touching the default
/// route, as VPNs do, adds the two halves of it.
const DEFAULT_PREFIX_MAX: u8 = 1;

/// Ranges that no network's subnet is from, and no site's subnet either: loopback, link-local (the IPv4 aliases among
/// them), multicast, the IPv6 aliases.
const LOCAL: [IpNet; 6] = [
    v4(Ipv4Addr::new(127, 0, 0, 0), 8),
    v4(Ipv4Addr::new(169, 254, 0, 0), 16),
    v4(Ipv4Addr::new(224, 0, 0, 0), 4),
    v6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    v6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    v6(HOST_ADDR6, HOST_PREFIX6),
];

const fn v4(addr: Ipv4Addr, prefix_len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(addr, prefix_len))
}

const fn v6(addr: Ipv6Addr, prefix_len: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(addr, prefix_len))
}

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Route {
    /// Where it leads.
    subnet: IpNet,
    /// The interface that it leads by; `None` if there are several, or what there is is named otherwise.
    ifindex: Option<u32>,
}

impl Route {
    /// A unicast route of the main table; `None` for any other, and for what the kernel notes of a single destination
    /// (a path's MTU, a redirect).
    fn new(message: &RouteMessage) -> Option<Self> {
        let RouteMessage { header, attributes, .. } = message;
        if header.table != RouteHeader::RT_TABLE_MAIN
            || header.kind != RouteType::Unicast
            || header.flags.contains(RouteFlags::Cloned)
        {
            return None;
        }
        let addr: IpAddr = attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(addr)) => Some((*addr).into()),
            RouteAttribute::Destination(RouteAddress::Inet6(addr)) => Some((*addr).into()),
            // A default route has none.
            _ => None,
        })?;
        let ifindex = attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(ifindex) => Some(*ifindex),
            _ => None,
        });
        Some(Self { subnet: IpNet::new(addr, header.destination_prefix_length).ok()?.trunc(), ifindex })
    }

    /// Whether it leads to a subnet that a network would keep the host's tasks away from.
    fn counts(&self, facts: &Facts) -> bool {
        let Self { subnet, ifindex } = self;
        let is_ours = facts.links.iter().any(|link| Some(link.ifindex) == *ifindex && link.is_ours());
        let is_itself = subnet.prefix_len() == subnet.max_prefix_len() && facts.holds(subnet.addr());
        subnet.prefix_len() > DEFAULT_PREFIX_MAX
            && !is_ours
            && !is_itself
            && !LOCAL.iter().any(|local| local.contains(subnet))
    }
}

impl Links {
    /// Whether there is a default route of the main table, in the family of `gateway`.
    pub(super) async fn has_default_route(&self, gateway: IpAddr) -> Result<bool, LinkError> {
        let request = match gateway {
            IpAddr::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
            IpAddr::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
        };
        let mut answers = self.handle.route().get(request).execute();
        let mut found = false;
        // To the end: what is left of an answer would be taken for the next one's.
        while let Some(message) =
            answers.try_next().await.map_err(LinkError::netlink("list", "default routes"))?
        {
            let RouteHeader { table, kind, destination_prefix_length, .. } = message.header;
            found |= table == RouteHeader::RT_TABLE_MAIN
                && kind == RouteType::Unicast
                && destination_prefix_length == 0;
        }
        Ok(found)
    }

    /// The subnets that the host's own routes lead to, in order, at most [`ROUTES_MAX`]. Default routes, those of Shoal's
    /// devices, and what no other host can be reached by are not among them.
    pub async fn routes(&self) -> Result<Vec<IpNet>, LinkError> {
        let facts = self.facts().await?;
        let mut subnets = BTreeSet::new();
        let requests =
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()];
        for request in requests {
            let mut answers = self.handle.route().get(request).execute();
            let list_routes = || LinkError::netlink("list", "routes");
            while let Some(message) = answers.try_next().await.map_err(list_routes())? {
                let route = Route::new(&message).filter(|route| route.counts(&facts));
                subnets.extend(route.map(|route| route.subnet));
            }
        }
        Ok(at_most(ROUTES_MAX, subnets.into_iter().collect()))
    }
}

/// No more than `max` subnets in the place of these: the same addresses in fewer subnets, and where that isn't enough,
/// private addresses first, which networks mostly are of, and the largest subnets of them.
fn at_most(max: usize, subnets: Vec<IpNet>) -> Vec<IpNet> {
    if subnets.len() <= max {
        return subnets;
    }
    let mut merged = IpNet::aggregate(&subnets);
    merged.sort_unstable_by_key(|subnet| (!is_private(*subnet), subnet.prefix_len(), *subnet));
    merged.truncate(max);
    merged.sort_unstable();
    merged
}

fn is_private(subnet: IpNet) -> bool {
    match subnet.addr() {
        IpAddr::V4(addr) => addr.is_private(),
        IpAddr::V6(addr) => addr.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{in_netns, run};

    fn subnets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn routes_to_subnets_count_and_those_of_the_host_alone_do_not() {
        in_netns(|| async {
            run("ip link set lo up");
            for link in ["up0", "shoal0"] {
                run(&format!("ip link add {link} type veth peer name {link}p"));
                run(&format!("ip link set {link}p up"));
                run(&format!("ip link set {link} up"));
            }
            run("ip address add 192.0.2.1/24 dev up0");
            run("ip address add 2001:db8::1/64 dev up0 nodad");
            run("ip address add 2001:db8:7::1/128 dev up0 nodad");
            run("ip address add 10.9.9.9/32 dev up0");
            run("ip address add 169.254.64.1/18 dev shoal0");
            run("ip address add fd73:686f:616c:1::1/64 dev shoal0 nodad");
            for route in [
                "default via 192.0.2.2",
                "0.0.0.0/1 via 192.0.2.2",
                "128.0.0.0/1 via 192.0.2.2",
                "10.1.0.0/16 via 192.0.2.2",
                "10.1.0.0/16 via 192.0.2.3 metric 7",
                "10.2.0.0/16 nexthop via 192.0.2.2 nexthop via 192.0.2.3",
                "10.3.0.7 via 192.0.2.2",
                "10.4.0.0/16 dev shoal0",
                "10.5.0.0/16 via 192.0.2.2 table 77",
                "169.254.0.0/16 dev up0",
                "224.0.0.0/4 dev up0",
                "unreachable 10.0.0.0/8",
                "blackhole 172.16.0.0/12",
            ] {
                run(&format!("ip route add {route}"));
            }
            for route in [
                "default via 2001:db8::2",
                "::/1 via 2001:db8::2",
                "fd00:1::/48 via 2001:db8::2",
                "fd00:2::/48 dev shoal0",
                "fd00:3::/48 via 2001:db8::2 table 77",
                "unreachable fc00::/7",
            ] {
                run(&format!("ip -6 route add {route}"));
            }
            let expected =
                ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.7/32", "192.0.2.0/24", "2001:db8::/64", "fd00:1::/48"];
            assert_eq!(Links::open().unwrap().routes().await.unwrap(), subnets(&expected));
        });
    }

    #[test]
    fn too_many_are_merged_and_then_those_of_private_addresses_kept() {
        let few = subnets(&["10.0.0.0/24", "10.0.1.0/24"]);
        assert_eq!(at_most(2, few.clone()), few);
        let many = subnets(&[
            "8.0.0.0/8",
            "10.0.0.0/24",
            "10.0.1.0/24",
            "10.0.1.128/25",
            "10.7.0.0/16",
            "2001:db8::/32",
            "fd00::/64",
        ]);
        assert_eq!(
            at_most(5, many.clone()),
            subnets(&["8.0.0.0/8", "10.0.0.0/23", "10.7.0.0/16", "2001:db8::/32", "fd00::/64"])
        );
        assert_eq!(at_most(3, many), subnets(&["10.0.0.0/23", "10.7.0.0/16", "fd00::/64"]));
    }
}
