//! What the host's interfaces are: addresses, MTUs and kinds, and which of them are uplinks.

use std::net::IpAddr;

use futures::TryStreamExt as _;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use super::{
    HOST_LINK, HOST_PEER_LINK, LinkError, Links, VXLAN_LINK, WIREGUARD_LINKS, endpoint, mtu_of, name_of,
};

/// An interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFact {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Whether it is one side of a veth pair.
    pub is_veth: bool,
    /// Whether it is a VLAN of another interface.
    pub is_vlan: bool,
    /// Whether it is the loopback.
    pub is_loopback: bool,
    /// Its addresses, of both families.
    pub addresses: Vec<IpAddr>,
}

/// All interfaces of the host, by index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The interfaces.
    pub links: Vec<LinkFact>,
}

impl LinkFact {
    fn new(link: &LinkMessage) -> Self {
        let kind = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(kind),
                _ => None,
            }),
            _ => None,
        });
        Self {
            ifindex: link.header.index,
            name: name_of(link).unwrap_or_default().to_owned(),
            mtu: mtu_of(link).unwrap_or_default(),
            is_veth: matches!(kind, Some(InfoKind::Veth)),
            is_vlan: matches!(kind, Some(InfoKind::Vlan)),
            is_loopback: link.header.flags.contains(LinkFlags::Loopback),
            addresses: Vec::new(),
        }
    }

    /// Whether Shoal made it.
    pub fn is_ours(&self) -> bool {
        [HOST_LINK, HOST_PEER_LINK, VXLAN_LINK].contains(&self.name.as_str())
            || WIREGUARD_LINKS.contains(&self.name.as_str())
            || self.is_task_link()
    }

    /// Whether it is the host's side of a task's pair.
    pub fn is_task_link(&self) -> bool {
        self.is_veth && endpoint::is_host_link_name(&self.name)
    }
}

impl Facts {
    /// Whether an interface holds `addr`.
    pub fn holds(&self, addr: IpAddr) -> bool {
        self.links.iter().any(|link| link.addresses.contains(&addr))
    }

    /// The interfaces called `names`, or where that is empty those that hold one of `addresses`: the uplinks.
    pub fn uplinks(&self, names: &[String], addresses: &[IpAddr]) -> Vec<&LinkFact> {
        let is_uplink = |link: &&LinkFact| match names {
            [] => addresses.iter().any(|addr| link.addresses.contains(addr)),
            names => names.contains(&link.name),
        };
        self.links.iter().filter(is_uplink).collect()
    }

    /// The node's own addresses, on which published ports answer: all but the loopback's and Shoal's own, and those
    /// of a link alone, which nobody dials without naming the link.
    pub fn node_addresses(&self) -> Vec<IpAddr> {
        let links = self.links.iter().filter(|link| !link.is_loopback && !link.is_ours());
        let mut addresses: Vec<_> = links.flat_map(|link| link.addresses.iter().copied()).collect();
        addresses.retain(|addr| match addr {
            IpAddr::V4(_) => true,
            IpAddr::V6(addr) => !addr.is_unicast_link_local(),
        });
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// The addresses that tasks could send to the outside under: all but Shoal's own, those of the loopback's range, and
    /// those of a link alone. An address that the network leads to this host may be on its loopback.
    pub fn egress_addresses(&self) -> Vec<IpAddr> {
        let links = self.links.iter().filter(|link| !link.is_ours());
        let mut addresses: Vec<_> = links.flat_map(|link| link.addresses.iter().copied()).collect();
        addresses.retain(|addr| match addr {
            IpAddr::V4(addr) => !addr.is_loopback() && !addr.is_link_local(),
            IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
        });
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }
}

impl Links {
    /// Looks at every interface and address of the namespace.
    pub async fn facts(&self) -> Result<Facts, LinkError> {
        let mut links = Vec::new();
        let mut answers = self.handle.link().get().execute();
        let list_links = || LinkError::netlink("list", "network interfaces");
        while let Some(link) = answers.try_next().await.map_err(list_links())? {
            links.push(LinkFact::new(&link));
        }
        let mut answers = self.handle.address().get().execute();
        let list_addresses = || LinkError::netlink("list", "addresses");
        while let Some(address) = answers.try_next().await.map_err(list_addresses())? {
            let link = links.iter_mut().find(|link| link.ifindex == address.header.index);
            if let (Some(addr), Some(link)) = (addr_of(&address), link) {
                link.addresses.push(addr);
            }
        }
        links.sort_by_key(|link| link.ifindex);
        Ok(Facts { links })
    }
}

/// The interface's own address in a message; none where another host turned out to have it.
fn addr_of(message: &AddressMessage) -> Option<IpAddr> {
    if message.header.flags.contains(AddressHeaderFlags::Dadfailed) {
        return None;
    }
    // On a point-to-point link `Address` is the other side's; `Local` is ours wherever there is one.
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(addr) => Some(*addr),
        _ => None,
    });
    local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(addr) => Some(*addr),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, name: &str, is_veth: bool, addresses: &[&str]) -> LinkFact {
        LinkFact {
            ifindex,
            name: name.to_owned(),
            mtu: 1500,
            is_veth,
            is_vlan: name.contains('.'),
            is_loopback: name == "lo",
            addresses: parsed(addresses),
        }
    }

    fn parsed(addresses: &[&str]) -> Vec<IpAddr> {
        addresses.iter().map(|addr| addr.parse().unwrap()).collect()
    }

    fn facts() -> Facts {
        let links = vec![
            link(1, "lo", false, &["127.0.0.1", "::1"]),
            link(2, "eth0", true, &["192.0.2.1", "192.0.2.9", "2001:db8::1", "fe80::1"]),
            link(3, "eth1", false, &["198.51.100.1", "2001:db8::1"]),
            link(4, "shoal0", true, &["169.254.64.1", "fd73:686f:616c:1::1"]),
            link(5, "sh0123456789a", true, &[]),
            link(6, "shoal-wg1", false, &["fd73:686f:616c:2:aaaa::1"]),
        ];
        Facts { links }
    }

    #[test]
    fn node_addresses_leave_out_the_loopback_our_own_and_those_of_a_link_alone() {
        assert_eq!(
            facts().node_addresses(),
            parsed(&["192.0.2.1", "192.0.2.9", "198.51.100.1", "2001:db8::1"])
        );
    }

    #[test]
    fn tasks_can_send_under_addresses_of_the_loopback_that_are_not_of_its_range() {
        let mut facts = facts();
        facts.links[0].addresses.extend(parsed(&["203.0.113.7", "2001:db8::7", "169.254.1.1"]));
        assert_eq!(
            facts.egress_addresses(),
            parsed(&["192.0.2.1", "192.0.2.9", "198.51.100.1", "203.0.113.7", "2001:db8::1", "2001:db8::7"])
        );
    }

    #[test]
    fn uplinks_are_those_named_or_else_those_that_hold_one_of_the_addresses() {
        let facts = facts();
        let names = |names: &[&str], addresses: &[&str]| -> Vec<String> {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            let uplinks = facts.uplinks(&names, &parsed(addresses));
            uplinks.into_iter().map(|link| link.name.clone()).collect()
        };
        assert_eq!(names(&[], &["192.0.2.9"]), ["eth0"]);
        assert_eq!(names(&[], &["192.0.2.9", "198.51.100.1"]), ["eth0", "eth1"]);
        assert_eq!(names(&[], &["192.0.2.9", "192.0.2.1"]), ["eth0"]);
        assert_eq!(names(&["eth1"], &["192.0.2.9"]), ["eth1"]);
        assert!(names(&[], &["192.0.2.77"]).is_empty());
    }

    #[test]
    fn a_vlan_is_told_from_other_kinds() {
        let vlan = LinkFact::new(&rtnetlink::LinkVlan::new("eth0.7", 2, 7).build());
        assert!(vlan.is_vlan && !vlan.is_veth);
        let veth = LinkFact::new(&rtnetlink::LinkVeth::new("a", "b").build());
        assert!(veth.is_veth && !veth.is_vlan);
    }

    #[test]
    fn a_task_link_is_a_veth_with_our_naming() {
        assert!(link(9, "sh0123456789a", true, &[]).is_task_link());
        assert!(!link(9, "sh0123456789a", false, &[]).is_task_link());
        assert!(!link(9, "shoal0p", true, &[]).is_task_link());
        assert!(!link(9, "shop-uplink-42", true, &[]).is_task_link());
    }
}
