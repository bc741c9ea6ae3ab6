//! A task's links: a veth pair for each endpoint, the host's side in the node's namespace, the other in the task's.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;
use mesh_api::id::TaskId;
use netlink_packet_route::link::{InfoData, InfoVeth};
use netlink_packet_route::route::RouteScope;
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::{LinkError, Links, sysctl};
use crate::sys::netns::Netns;

/// Characters of a task's id in the names of its links.
const NAME_ID_LEN: usize = 10;
const BASE36: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// A veth pair to be made for an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointLink {
    /// The host's side: [`host_link_name`].
    pub host_name: String,
    /// The task's side: `eth0`, `eth1`…
    pub task_name: String,
    /// The endpoint's IPv4 address, which its MAC is made from.
    pub addr: Ipv4Addr,
    /// MTU of both sides, bytes.
    pub mtu: u32,
}

/// An address inside a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskAddress {
    /// The interface: `eth0`…
    pub link: String,
    /// The address. An interface that is given none of IPv6 has IPv6 off.
    pub addr: IpAddr,
    /// Prefix length of its subnet.
    pub prefix: u8,
}

/// A task's way to a subnet of one of its networks that its own address is not in: as to its own subnet, each address
/// is asked for by ARP, and who has none is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetRoute {
    /// The subnet.
    pub subnet: Ipv4Net,
    /// The interface in that network.
    pub link: String,
}

/// A task's way out, for one address family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Where it leads.
    pub gateway: IpAddr,
    /// The interface that it leads by.
    pub link: String,
}

/// A task's network configuration, as it is set up inside its namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskNetwork {
    /// The addresses.
    pub addresses: Vec<TaskAddress>,
    /// Its routes to its networks' other subnets. In IPv6, a network is one subnet.
    pub subnet_routes: Vec<SubnetRoute>,
    /// Its default routes: at most one a family, none where there is no way out.
    pub default_routes: Vec<DefaultRoute>,
    /// The namespace is not a task's own: what it is set to stays so, and a default route that it has.
    pub foreign: bool,
}

/// Name of the host's side of a task's endpoint `index`: `sh`, the id's first characters, a base-36 digit; `None`
/// past the 36th endpoint.
pub fn host_link_name(task: &TaskId, index: usize) -> Option<String> {
    let id: String = task.as_str().chars().take(NAME_ID_LEN).collect();
    BASE36.get(index).map(|digit| format!("sh{id}{}", char::from(*digit)))
}

/// Whether a name is one that [`host_link_name`] makes.
pub(super) fn is_host_link_name(name: &str) -> bool {
    name.strip_prefix("sh")
        .is_some_and(|rest| rest.len() == NAME_ID_LEN + 1 && rest.bytes().all(|byte| BASE36.contains(&byte)))
}

/// An endpoint's MAC, as Docker makes it: 02:42 and the address.
pub fn mac(addr: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = addr.octets();
    [0x02, 0x42, a, b, c, d]
}

impl Links {
    /// Makes an endpoint's pair, the task's side right inside `netns` and under its final name and MAC, and returns
    /// the index of the host's side. Both sides are down: programs are attached first.
    pub async fn add_endpoint(&self, netns: &Netns, link: &EndpointLink) -> Result<u32, LinkError> {
        let EndpointLink { host_name, task_name, addr, mtu } = link;
        // What is left of an earlier attempt has the same name.
        self.remove_named(host_name).await?;
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(task_name.clone())
            .mtu(*mtu)
            .address(mac(*addr).to_vec())
            .setns_by_fd(netns.raw_fd())
            .build();
        let message = LinkVeth::new(host_name, task_name)
            .mtu(*mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        let added = self.handle.link().add(message).execute().await;
        added.map_err(LinkError::netlink("add", host_name))?;
        let index = self.require(host_name).await?;
        // The host's stack has no part in what passes here; router solicitations of its own would only be dropped.
        sysctl::disable_ipv6(host_name)?;
        Ok(index)
    }

    /// Starts the host's side of an endpoint, once its program is attached.
    pub async fn start_endpoint(&self, index: u32) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(index).up();
        self.set("start", &format!("interface {index}"), message).await
    }

    /// Configures the inside of a task: sysctls, loopback, addresses and routes. `self` is of the task's namespace.
    /// What is there already stays.
    pub async fn configure_task(&self, netns: &Netns, network: &TaskNetwork) -> Result<(), LinkError> {
        set_task_sysctls(netns, network)?;
        let loopback = self.require("lo").await?;
        self.set("start", "lo", LinkUnspec::new_with_index(loopback).up()).await?;
        for link in links_of(network) {
            let index = self.require(link).await?;
            self.set("start", link, LinkUnspec::new_with_index(index).up()).await?;
        }
        for TaskAddress { link, addr, prefix } in &network.addresses {
            let index = self.require(link).await?;
            self.add_address(index, *addr, *prefix).await?;
        }
        for SubnetRoute { subnet, link } in &network.subnet_routes {
            let index = self.require(link).await?;
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(subnet.network(), subnet.prefix_len())
                .scope(RouteScope::Link)
                .output_interface(index);
            let added = self.handle.route().add(route.build()).replace().execute().await;
            added.map_err(LinkError::netlink("add a route by", format!("{link} to {subnet}")))?;
        }
        for DefaultRoute { gateway, link } in &network.default_routes {
            if network.foreign && self.has_default_route(*gateway).await? {
                continue;
            }
            let index = self.require(link).await?;
            let route = match gateway {
                IpAddr::V4(gateway) => {
                    RouteMessageBuilder::<Ipv4Addr>::new().gateway(*gateway).output_interface(index).build()
                }
                IpAddr::V6(gateway) => {
                    RouteMessageBuilder::<Ipv6Addr>::new().gateway(*gateway).output_interface(index).build()
                }
            };
            let added = self.handle.route().add(route).replace().execute().await;
            added.map_err(LinkError::netlink("add the default route by", link))?;
        }
        Ok(())
    }
}

fn links_of(network: &TaskNetwork) -> BTreeSet<&str> {
    network.addresses.iter().map(|address| address.link.as_str()).collect()
}

fn set_task_sysctls(netns: &Netns, network: &TaskNetwork) -> Result<(), LinkError> {
    let set_all = || -> Result<(), LinkError> {
        let mut filtering = links_of(network);
        if !network.foreign {
            // As in Docker's containers: no privilege is needed for a port below 1024, or for ping.
            sysctl::set_if_present(&["net", "ipv4", "ip_unprivileged_port_start"], "0")?;
            sysctl::set_if_present(&["net", "ipv4", "ping_group_range"], "0 2147483647")?;
            filtering.insert("all");
        }
        // Which interface a packet comes in by is the dataplane's to judge: a task that reaches itself by its own
        // VIP gets packets that its routes would send out elsewhere.
        for link in filtering {
            sysctl::set(&["net", "ipv4", "conf", link, "rp_filter"], "0")?;
        }
        for link in links_of(network) {
            let has_ipv6 = |address: &TaskAddress| address.link == link && address.addr.is_ipv6();
            if network.addresses.iter().any(has_ipv6) {
                sysctl::enable_ipv6(link)?;
            } else {
                sysctl::disable_ipv6(link)?;
            }
        }
        Ok(())
    };
    netns.run(|| Ok(set_all())).map_err(LinkError::Socket)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_an_interface_and_are_recognized() {
        let name = host_link_name(&"0123456789abcdefghijklmno".into(), 35).unwrap();
        assert_eq!(name, "sh0123456789z");
        assert!(name.len() <= 15 && is_host_link_name(&name));
        assert_eq!(host_link_name(&"0123456789abcdefghijklmno".into(), 36), None);
        for other in ["shoal0", "shoal0p", "shoal-vxlan", "eth0", "sh0123456789zz"] {
            assert!(!is_host_link_name(other), "{other}");
        }
    }

    #[test]
    fn a_mac_is_made_from_the_address() {
        assert_eq!(mac(Ipv4Addr::new(10, 0, 1, 255)), [0x02, 0x42, 10, 0, 1, 255]);
    }
}
