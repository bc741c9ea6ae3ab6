//! What the sets and the map of a table hold of fixed egress addresses: as it is to be, as `nft` lists it, and the commands
//! between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::rules::{EGRESS, FIXED, SOURCES};

/// The elements of one table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Elements {
    fixed: BTreeSet<IpAddr>,
    egress: BTreeMap<IpAddr, IpAddr>,
    sources: BTreeSet<(IpAddr, IpAddr)>,
}

impl Elements {
    /// Those for these aliases, each with the addresses that may be sent under, the first of them by new flows.
    pub(super) fn of<'a>(senders: impl Iterator<Item = (IpAddr, &'a [IpAddr])>) -> Self {
        let mut elements = Self::default();
        for (alias, held) in senders {
            elements.fixed.insert(alias);
            elements.egress.extend(held.first().map(|first| (alias, *first)));
            elements.sources.extend(held.iter().map(|addr| (alias, *addr)));
        }
        elements
    }

    /// Those of a listed table. What is no element of ours does not count.
    pub(super) fn read(listed: &str) -> Self {
        let pairs = |kind, name, between| {
            let texts = texts(listed, kind, name).into_iter();
            texts.filter_map(move |text| {
                let (alias, addr) = text.split_once(between)?;
                Some((alias.trim().parse().ok()?, addr.trim().parse().ok()?))
            })
        };
        Self {
            fixed: texts(listed, "set", FIXED).into_iter().filter_map(|text| text.parse().ok()).collect(),
            // An IPv6 address has no space before or after its colons.
            egress: pairs("map", EGRESS, " : ").collect(),
            sources: pairs("set", SOURCES, " . ").collect(),
        }
    }

    /// Commands that lead from `found` to these in `table`. All of these are added, since somebody may have removed the table
    /// after it was listed; nft takes an element that is there already as it is, and refuses what is not as `found` says.
    pub(super) fn commands_from(&self, found: &Self, table: &str) -> String {
        let fixed = |all: &Self| all.fixed.iter().map(ToString::to_string).collect();
        let egress =
            |all: &Self| all.egress.iter().map(|(alias, addr)| format!("{alias} : {addr}")).collect();
        let sources =
            |all: &Self| all.sources.iter().map(|(alias, addr)| format!("{alias} . {addr}")).collect();
        [
            difference(table, FIXED, &fixed(found), &fixed(self)),
            difference(table, EGRESS, &egress(found), &egress(self)),
            difference(table, SOURCES, &sources(found), &sources(self)),
        ]
        .concat()
    }
}

fn difference(table: &str, set: &str, found: &BTreeSet<String>, wanted: &BTreeSet<String>) -> String {
    let command = |verb: &str, elements: Vec<&str>| match elements.as_slice() {
        [] => String::new(),
        elements => format!("{verb} element {table} {set} {{ {} }}\n", elements.join(", ")),
    };
    let gone = found.difference(wanted).map(String::as_str).collect();
    command("delete", gone) + &command("add", wanted.iter().map(String::as_str).collect())
}

/// The elements of a set or a map as `nft` prints them.
fn texts<'l>(listed: &'l str, kind: &str, name: &str) -> Vec<&'l str> {
    let block = listed.split_once(&format!("\t{kind} {name} {{\n")).map(|(_, rest)| rest);
    // Within a block, a closing brace stands alone on its line.
    let block = block.and_then(|rest| rest.split_once("\n\t}")).map(|(block, _)| block);
    let elements =
        block.and_then(|block| block.split_once("elements = {")).and_then(|(_, rest)| rest.split_once('}'));
    elements.map_or_else(Vec::new, |(elements, _)| elements.split(',').map(str::trim).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(senders: &[(&str, &[&str])]) -> Elements {
        let parse = |text: &&str| -> IpAddr { text.parse().unwrap() };
        let senders: Vec<(IpAddr, Vec<IpAddr>)> =
            senders.iter().map(|(alias, held)| (parse(alias), held.iter().map(parse).collect())).collect();
        Elements::of(senders.iter().map(|(alias, held)| (*alias, held.as_slice())))
    }

    #[test]
    fn elements_are_read_as_nft_lists_them() {
        let listed = "table ip6 shoal {\n\
            \tcounter egress_no_address {\n\t\tpackets 0 bytes 0\n\t}\n\n\
            \tset fixed {\n\t\ttype ipv6_addr\n\t\telements = { fd73:686f:616c:1::a9fe:4003,\n\t\t\t     fd73:686f:616c:1::a9fe:4004 }\n\t}\n\n\
            \tmap egress {\n\t\ttype ipv6_addr : ipv6_addr\n\t\telements = { fd73:686f:616c:1::a9fe:4003 : 2001:db8::7 }\n\t}\n\n\
            \tset sources {\n\t\ttype ipv6_addr . ipv6_addr\n\t\telements = { fd73:686f:616c:1::a9fe:4003 . 2001:db8::7,\n\t\t\t     fd73:686f:616c:1::a9fe:4003 . 2001:db8::8 }\n\t}\n}\n";
        let wanted = elements(&[
            ("fd73:686f:616c:1::a9fe:4003", &["2001:db8::7", "2001:db8::8"]),
            ("fd73:686f:616c:1::a9fe:4004", &[]),
        ]);
        assert_eq!(Elements::read(listed), wanted);
        assert_eq!(
            Elements::read("table ip shoal {\n\tset fixed {\n\t\ttype ipv4_addr\n\t}\n}\n"),
            Elements::default()
        );
        assert_eq!(Elements::read(""), Elements::default());
    }

    #[test]
    fn all_that_is_wanted_is_added_and_only_what_is_not_is_deleted() {
        let found =
            elements(&[("169.254.64.3", &["192.0.2.7", "192.0.2.8"]), ("169.254.64.4", &["192.0.2.7"])]);
        let wanted = elements(&[("169.254.64.3", &["192.0.2.8"]), ("169.254.64.5", &[])]);
        assert_eq!(
            wanted.commands_from(&found, "ip shoal"),
            "delete element ip shoal fixed { 169.254.64.4 }\n\
             add element ip shoal fixed { 169.254.64.3, 169.254.64.5 }\n\
             delete element ip shoal egress { 169.254.64.3 : 192.0.2.7, 169.254.64.4 : 192.0.2.7 }\n\
             add element ip shoal egress { 169.254.64.3 : 192.0.2.8 }\n\
             delete element ip shoal sources { 169.254.64.3 . 192.0.2.7, 169.254.64.4 . 192.0.2.7 }\n\
             add element ip shoal sources { 169.254.64.3 . 192.0.2.8 }\n"
        );
        let whole = wanted.commands_from(&Elements::default(), "ip shoal");
        assert_eq!(wanted.commands_from(&wanted, "ip shoal"), whole);
        assert_eq!(Elements::default().commands_from(&Elements::default(), "ip shoal"), "");
    }
}
