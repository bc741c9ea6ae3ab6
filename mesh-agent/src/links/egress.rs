//! What this node's tasks send to the outside under, where their services have fixed egress addresses.
//!
//! Only says what is to be; `nft` has the host's stack keep to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Facts, HOST_ADDR6, HOST_PREFIX6};

/// Tasks with fixed egress addresses, by their aliases. A task has an entry for each family of which addresses are listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Egress {
    senders: BTreeMap<IpAddr, Sender>,
}

/// What is sent under an alias.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sender {
    /// The addresses of the family, in the order in which they are preferred.
    listed: Vec<IpAddr>,
    /// Those of them that this node has, likewise.
    held: Vec<IpAddr>,
}

impl Egress {
    /// What tasks are to send under, by the aliases of their endpoints and the addresses listed for them, on a node whose
    /// interfaces are `facts`.
    pub fn new<'t>(tasks: impl IntoIterator<Item = (Ipv4Addr, &'t [IpAddr])>, facts: &Facts) -> Self {
        let here = facts.egress_addresses();
        let mut senders = BTreeMap::new();
        for (alias, listed) in tasks {
            for alias in [IpAddr::V4(alias), IpAddr::V6(alias6(alias))] {
                let of_family = listed.iter().filter(|addr| addr.is_ipv4() == alias.is_ipv4());
                let listed: Vec<IpAddr> = of_family.copied().collect();
                if !listed.is_empty() {
                    let held = listed.iter().filter(|addr| here.contains(addr)).copied().collect();
                    senders.insert(alias, Sender { listed, held });
                }
            }
        }
        Self { senders }
    }

    /// The aliases of a family, and for each the addresses that may be sent under, the first of them by new flows; none
    /// where nothing may leave.
    pub(super) fn of_family(&self, is_ipv4: bool) -> impl Iterator<Item = (IpAddr, &[IpAddr])> {
        let senders = self.senders.iter().filter(move |(alias, _)| alias.is_ipv4() == is_ipv4);
        senders.map(|(alias, sender)| (*alias, sender.held.as_slice()))
    }

    /// The lists of which this node has no address: nothing leaves of the tasks that are to send under them.
    pub fn missing(&self) -> BTreeSet<Vec<IpAddr>> {
        let missing = self.senders.values().filter(|sender| sender.held.is_empty());
        missing.map(|sender| sender.listed.clone()).collect()
    }

    /// The address of a list that is sent under; `None` where there is none, or no task has the list.
    pub fn in_use(&self, listed: &[IpAddr]) -> Option<IpAddr> {
        self.senders.values().find(|sender| sender.listed == listed)?.held.first().copied()
    }
}

/// The IPv6 form of an endpoint's alias, as the programs have it too.
fn alias6(alias: Ipv4Addr) -> Ipv6Addr {
    let net = HOST_ADDR6.to_bits() & (u128::MAX << (128 - HOST_PREFIX6));
    Ipv6Addr::from_bits(net | u128::from(alias.to_bits()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::LinkFact;
    use super::*;

    /// A node with these addresses on one interface.
    pub(in crate::links) fn node(addresses: &[&str]) -> Facts {
        let link = LinkFact {
            ifindex: 2,
            name: "eth0".to_owned(),
            mtu: 1500,
            is_veth: false,
            is_vlan: false,
            is_loopback: false,
            addresses: addresses.iter().map(|addr| addr.parse().unwrap()).collect(),
        };
        Facts { links: vec![link] }
    }

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    const ALIAS: Ipv4Addr = Ipv4Addr::new(169, 254, 64, 3);

    #[test]
    fn the_first_listed_address_that_the_node_has_is_sent_under() {
        let listed = addresses(&["192.0.2.8", "2001:db8::8", "192.0.2.7", "192.0.2.9"]);
        let free = Ipv4Addr::new(169, 254, 64, 4);
        let tasks = [(ALIAS, listed.as_slice()), (free, &[])];
        let egress = Egress::new(tasks, &node(&["192.0.2.1", "192.0.2.9", "192.0.2.7"]));
        let v4: Vec<_> = egress.of_family(true).collect();
        let held = addresses(&["192.0.2.7", "192.0.2.9"]);
        assert_eq!(v4, [(IpAddr::from(ALIAS), held.as_slice())]);
        let v6: Vec<_> = egress.of_family(false).collect();
        assert_eq!(v6, [(IpAddr::from(alias6(ALIAS)), &[][..])]);
        assert_eq!(egress.missing(), BTreeSet::from([addresses(&["2001:db8::8"])]));
        let (v4, v6) = (addresses(&["192.0.2.8", "192.0.2.7", "192.0.2.9"]), addresses(&["2001:db8::8"]));
        assert_eq!(egress.in_use(&v4), Some(held[0]));
        assert_eq!((egress.in_use(&v6), egress.in_use(&held)), (None, None));
    }

    #[test]
    fn families_that_are_not_listed_have_no_entry() {
        let listed = addresses(&["2001:db8::8"]);
        let egress = Egress::new([(ALIAS, listed.as_slice())], &node(&["2001:db8::8"]));
        assert_eq!(egress.of_family(true).count(), 0);
        assert_eq!(egress.of_family(false).next().unwrap().1, listed);
        assert!(egress.missing().is_empty());
    }

    #[test]
    fn aliases_have_the_ipv6_form_that_the_programs_know() {
        assert_eq!(alias6(ALIAS), "fd73:686f:616c:1::a9fe:4003".parse::<Ipv6Addr>().unwrap());
    }
}
