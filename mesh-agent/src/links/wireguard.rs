//! The links that carry encrypted networks between nodes: WireGuard's, of the kernel or of this process, each with the
//! one address that its key has, and with the way that what is sent from this address takes.
//!
//! The way is chosen by the source address, so that two links can be there at a time, and it ends in "unreachable" where
//! the link is gone: what was to be encrypted takes no other way.

use std::net::Ipv6Addr;

use futures::TryStreamExt as _;
use mesh_api::wireguard::WIREGUARD_NET;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{IpVersion, LinkUnspec, LinkWireguard, RouteMessageBuilder};

use super::{LinkError, Links, ignore, is_up, mtu_of, sysctl};

/// The links' names, by slot.
pub const WIREGUARD_LINKS: [&str; 2] = ["shoal-wg0", "shoal-wg1"];
/// Numbers of the routing tables, and of the rules that lead to them, by slot.
pub const WIREGUARD_TABLES: [u32; 2] = [20_551, 20_552];

/// The metric of a table's route by its link, and the one of what is left without.
const METRIC: u32 = 1;
const METRIC_LAST: u32 = u32::MAX;

/// One of the links, as it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireguardWay {
    /// 0 or 1.
    pub slot: usize,
    /// The link's index.
    pub index: u32,
    /// The address of the link's key.
    pub addr: Ipv6Addr,
    /// Bytes.
    pub mtu: u32,
}

impl Links {
    /// The index of this slot's link, and whether it is the kernel's WireGuard; `None` where there is none.
    pub async fn wireguard(&self, slot: usize) -> Result<Option<(u32, bool)>, LinkError> {
        let link = self.get(WIREGUARD_LINKS[slot]).await?;
        Ok(link.map(|link| (link.header.index, is_wireguard(&link))))
    }

    /// Makes this slot's link in the kernel; false where the kernel has no WireGuard.
    pub async fn add_wireguard(&self, slot: usize) -> Result<bool, LinkError> {
        let name = WIREGUARD_LINKS[slot];
        let added = self.handle.link().add(LinkWireguard::new(name).build()).execute().await;
        match added.map_err(LinkError::netlink("add", name)) {
            Ok(()) => Ok(true),
            Err(error) if error.is(libc::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives a link its address and MTU, starts it, and leads what is sent from the address there.
    pub async fn lead(&self, way: WireguardWay) -> Result<(), LinkError> {
        let WireguardWay { slot, index, addr, mtu } = way;
        let name = WIREGUARD_LINKS[slot];
        // First what holds without the link.
        self.lead_nowhere(slot, addr).await?;
        self.set("configure", name, LinkUnspec::new_with_index(index).mtu(mtu)).await?;
        sysctl::enable_ipv6(name)?;
        self.set("start", name, LinkUnspec::new_with_index(index).up()).await?;
        self.add_address(index, addr.into(), Ipv6Addr::BITS as u8).await?;
        let route = route_to(slot).output_interface(index).priority(METRIC).build();
        self.add_route(slot, route).await
    }

    /// Whether a link is as [`Links::lead`] makes it, and what is sent from its address goes there.
    pub async fn is_led(&self, way: WireguardWay) -> Result<bool, LinkError> {
        let WireguardWay { slot, index, addr, mtu } = way;
        match self.get(WIREGUARD_LINKS[slot]).await? {
            Some(link) if link.header.index == index && mtu_of(&link) == Some(mtu) && is_up(&link) => {}
            _ => return Ok(false),
        }
        let has = self.handle.address().get().set_link_index_filter(index).set_address_filter(addr.into());
        let found = has.execute().try_next().await;
        if found.map_err(LinkError::netlink("list", "addresses"))?.is_none() {
            return Ok(false);
        }
        let question = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::from_bits(WIREGUARD_NET.addr().to_bits() | 1), Ipv6Addr::BITS as u8)
            .source_prefix(addr, Ipv6Addr::BITS as u8);
        let answer = self.handle.route().get(question.build()).execute().try_next().await;
        // An unreachable route is told as an error.
        Ok(answer.ok().flatten().is_some_and(|route| route.attributes.contains(&RouteAttribute::Oif(index))))
    }

    /// Has what is sent from `addr` go by this slot's table alone, where it is unreachable without a link.
    async fn lead_nowhere(&self, slot: usize, addr: Ipv6Addr) -> Result<(), LinkError> {
        let last = route_to(slot).kind(RouteType::Unreachable).priority(METRIC_LAST).build();
        self.add_route(slot, last).await?;
        let table = WIREGUARD_TABLES[slot];
        let mut is_there = false;
        for rule in self.rules_to(table).await? {
            if rule.attributes.contains(&RuleAttribute::Source(addr.into())) {
                is_there = true;
            } else {
                self.remove_rule(rule).await?;
            }
        }
        if is_there {
            return Ok(());
        }
        let rule = self.handle.rule().add().v6().source_prefix(addr, Ipv6Addr::BITS as u8);
        let rule = rule.table_id(table).priority(table).action(RuleAction::ToTable);
        let added = rule.execute().await;
        added.map_err(LinkError::netlink("add a rule for", WIREGUARD_LINKS[slot]))
    }

    async fn add_route(&self, slot: usize, route: RouteMessage) -> Result<(), LinkError> {
        let added = self.handle.route().add(route).replace().execute().await;
        added.map_err(LinkError::netlink("add a route by", WIREGUARD_LINKS[slot]))
    }

    async fn rules_to(&self, table: u32) -> Result<Vec<RuleMessage>, LinkError> {
        let rules = self.handle.rule().get(IpVersion::V6).execute();
        let leads_there = |rule: &RuleMessage| rule.attributes.contains(&RuleAttribute::Table(table));
        let rules = rules.try_filter(|rule| std::future::ready(leads_there(rule))).try_collect().await;
        rules.map_err(LinkError::netlink("list", "routing rules"))
    }

    async fn remove_rule(&self, rule: RuleMessage) -> Result<(), LinkError> {
        let removed = self.handle.rule().del(rule).execute().await;
        ignore(libc::ENOENT, removed.map_err(LinkError::netlink("remove", "a routing rule")))
    }

    /// Removes this slot's link with the rule and the routes; goes on past failures and returns them all.
    pub async fn remove_wireguard(&self, slot: usize) -> Vec<LinkError> {
        let mut errors: Vec<_> = self.remove_named(WIREGUARD_LINKS[slot]).await.err().into_iter().collect();
        if !sysctl::has_ipv6() {
            return errors;
        }
        match self.rules_to(WIREGUARD_TABLES[slot]).await {
            Ok(rules) => {
                for rule in rules {
                    errors.extend(self.remove_rule(rule).await.err());
                }
            }
            Err(error) => errors.push(error),
        }
        let last = route_to(slot).kind(RouteType::Unreachable).priority(METRIC_LAST).build();
        let removed = self.handle.route().del(last).execute().await;
        let removed = removed.map_err(LinkError::netlink("remove a route of", WIREGUARD_LINKS[slot]));
        errors.extend(ignore(libc::ESRCH, removed).err());
        errors
    }
}

fn route_to(slot: usize) -> RouteMessageBuilder<Ipv6Addr> {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(WIREGUARD_NET.addr(), WIREGUARD_NET.prefix_len())
        .table_id(WIREGUARD_TABLES[slot])
}

fn is_wireguard(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Wireguard)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{in_netns, run};

    #[test]
    fn what_is_sent_from_a_key_s_address_goes_by_its_link_or_nowhere() {
        in_netns(|| async {
            run("ip link set lo up");
            run("ip link add up0 type veth peer name up1");
            run("ip link set up1 up");
            run("ip link set up0 up");
            run("ip -6 address add 2001:db8::1/64 dev up0 nodad");
            run("ip -6 route add default via 2001:db8::2");
            run("ip link add shoal-wg1 type veth peer name wg1p");
            run("ip link set wg1p up");
            let links = Links::open().unwrap();
            let (index, is_kernel_s) = links.wireguard(1).await.unwrap().unwrap();
            assert!(!is_kernel_s);
            assert_eq!(links.wireguard(0).await.unwrap(), None);
            let addr = "fd73:686f:616c:2:aaaa::1".parse().unwrap();
            let way = WireguardWay { slot: 1, index, addr, mtu: 1440 };
            assert!(!links.is_led(way).await.unwrap());
            let lookup = || {
                let line = format!("ip -6 route get fd73:686f:616c:2::7 from {addr}");
                let words: Vec<_> = line.split(' ').collect();
                let output = std::process::Command::new(words[0]).args(&words[1..]).output().unwrap();
                output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
            };
            links.lead(way).await.unwrap();
            links.lead(way).await.unwrap();
            assert!(links.is_led(way).await.unwrap());
            assert!(lookup().unwrap().contains("dev shoal-wg1"));
            assert_eq!(run("ip -6 rule").matches("20552").count(), 2, "one rule, which names it twice");
            assert!(
                run("ip -6 address show dev shoal-wg1").matches("inet6").count() == 1,
                "none but the key's"
            );
            assert!(!links.is_led(WireguardWay { mtu: 1400, ..way }).await.unwrap());

            for spoil in [
                "ip link set shoal-wg1 down",
                "ip -6 address flush dev shoal-wg1",
                "ip -6 rule del table 20552",
                "ip -6 route flush table 20552",
            ] {
                run(spoil);
                assert!(!links.is_led(way).await.unwrap(), "{spoil}");
                links.lead(way).await.unwrap();
                assert!(links.is_led(way).await.unwrap(), "{spoil}");
            }

            run("ip link del shoal-wg1");
            assert_eq!(lookup(), None, "not by the default route");
            assert!(links.remove_wireguard(1).await.is_empty());
            assert!(links.remove_wireguard(1).await.is_empty());
            assert!(!run("ip -6 rule").contains("20552"));
            assert!(lookup().unwrap().contains("dev up0"));
        });
    }

    #[test]
    fn a_kernel_without_wireguard_says_so() {
        in_netns(|| async {
            let links = Links::open().unwrap();
            let made = links.add_wireguard(0).await.unwrap();
            assert_eq!(links.wireguard(0).await.unwrap().is_some_and(|(_, is_kernel_s)| is_kernel_s), made);
            assert!(links.remove_wireguard(0).await.is_empty());
        });
    }
}
