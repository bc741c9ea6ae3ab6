//! What the host's interfaces are: addresses, MTUs and kinds, and which of them are uplinks.

use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt as _;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use super::{HOST_LINK, HOST_PEER_LINK, LinkError, Links, VXLAN_LINK, endpoint, mtu_of, name_of};

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
    /// Whether it is the loopback.
    pub is_loopback: bool,
    /// Its IPv4 addresses.
    pub addresses: Vec<Ipv4Addr>,
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
            is_loopback: link.header.flags.contains(LinkFlags::Loopback),
            addresses: Vec::new(),
        }
    }

    /// Whether Shoal made it.
    pub fn is_ours(&self) -> bool {
        [HOST_LINK, HOST_PEER_LINK, VXLAN_LINK].contains(&self.name.as_str()) || self.is_task_link()
    }

    /// Whether it is the host's side of a task's pair.
    pub fn is_task_link(&self) -> bool {
        self.is_veth && endpoint::is_host_link_name(&self.name)
    }
}

impl Facts {
    /// The interfaces that hold `addr`.
    pub fn holding(&self, addr: Ipv4Addr) -> impl Iterator<Item = &LinkFact> {
        self.links.iter().filter(move |link| link.addresses.contains(&addr))
    }

    /// The interfaces called `names`, or where that is empty those that hold `addr`: the uplinks.
    pub fn uplinks(&self, names: &[String], addr: Ipv4Addr) -> Vec<&LinkFact> {
        if names.is_empty() {
            return self.holding(addr).collect();
        }
        self.links.iter().filter(|link| names.contains(&link.name)).collect()
    }

    /// The node's own addresses, on which published ports answer: all but the loopback's and Shoal's own.
    pub fn node_addresses(&self) -> Vec<Ipv4Addr> {
        let links = self.links.iter().filter(|link| !link.is_loopback && !link.is_ours());
        let mut addresses: Vec<_> = links.flat_map(|link| link.addresses.iter().copied()).collect();
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
            // On a point-to-point link `Address` is the other side's; `Local` is ours wherever there is one.
            let mut found = None;
            for attribute in &address.attributes {
                match attribute {
                    AddressAttribute::Local(IpAddr::V4(addr)) => found = Some(*addr),
                    AddressAttribute::Address(IpAddr::V4(addr)) if found.is_none() => found = Some(*addr),
                    _ => {}
                }
            }
            let link = links.iter_mut().find(|link| link.ifindex == address.header.index);
            if let (Some(addr), Some(link)) = (found, link) {
                link.addresses.push(addr);
            }
        }
        links.sort_by_key(|link| link.ifindex);
        Ok(Facts { links })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, name: &str, is_veth: bool, addresses: &[[u8; 4]]) -> LinkFact {
        LinkFact {
            ifindex,
            name: name.to_owned(),
            mtu: 1500,
            is_veth,
            is_loopback: name == "lo",
            addresses: addresses.iter().map(|bytes| Ipv4Addr::from(*bytes)).collect(),
        }
    }

    fn facts() -> Facts {
        let links = vec![
            link(1, "lo", false, &[[127, 0, 0, 1]]),
            link(2, "eth0", true, &[[192, 0, 2, 1], [192, 0, 2, 9]]),
            link(3, "eth1", false, &[[198, 51, 100, 1]]),
            link(4, "shoal0", true, &[[169, 254, 64, 1]]),
            link(5, "sh0123456789a", true, &[]),
        ];
        Facts { links }
    }

    #[test]
    fn node_addresses_leave_out_the_loopback_and_our_own() {
        let expected = [[192, 0, 2, 1], [192, 0, 2, 9], [198, 51, 100, 1]].map(Ipv4Addr::from);
        assert_eq!(facts().node_addresses(), expected);
    }

    #[test]
    fn uplinks_are_those_named_or_else_those_that_hold_the_address() {
        let facts = facts();
        let names = |names: &[String]| -> Vec<String> {
            let addr = Ipv4Addr::new(192, 0, 2, 9);
            facts.uplinks(names, addr).into_iter().map(|link| link.name.clone()).collect()
        };
        assert_eq!(names(&[]), ["eth0"]);
        assert_eq!(names(&["eth1".to_owned()]), ["eth1"]);
    }

    #[test]
    fn a_task_link_is_a_veth_with_our_naming() {
        assert!(link(9, "sh0123456789a", true, &[]).is_task_link());
        assert!(!link(9, "sh0123456789a", false, &[]).is_task_link());
        assert!(!link(9, "shoal0p", true, &[]).is_task_link());
        assert!(!link(9, "shop-uplink-42", true, &[]).is_task_link());
    }
}
