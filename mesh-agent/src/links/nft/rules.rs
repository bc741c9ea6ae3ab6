//! The text of Shoal's netfilter tables.

use mesh_api::wireguard::WIREGUARD_NET;
use mesh_common::map::WIREGUARD_MARK;

use super::super::{
    Egress, HOST_ADDR, HOST_ADDR6, HOST_LINK, HOST_PREFIX, HOST_PREFIX6, RULES_TABLE, WIREGUARD_LINKS,
};
use super::elements::Elements;

/// The aliases of tasks that send under fixed addresses alone.
pub(super) const FIXED: &str = "fixed";
/// By alias, the address that new flows are sent under.
pub(super) const EGRESS: &str = "egress";
/// Aliases with each of the addresses that may be sent under.
pub(super) const SOURCES: &str = "sources";
/// The counter of packets that were to be sent under an address that the node does not have.
pub(super) const NO_ADDRESS: &str = "egress_no_address";
/// The counter of packets that were to leave under an alias.
pub(super) const UNTRANSLATED: &str = "egress_untranslated";

/// A family of netfilter tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Ip,
    Ip6,
}

impl Family {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        }
    }

    /// The aliases, as tasks' packets have them for sources in the host's stack.
    fn aliases(self) -> String {
        match self {
            Self::Ip => format!("{HOST_ADDR}/{HOST_PREFIX}"),
            Self::Ip6 => format!("{HOST_ADDR6}/{HOST_PREFIX6}"),
        }
    }

    /// What the sets and the map of the table are to hold.
    pub(super) fn elements(self, egress: &Egress) -> Elements {
        Elements::of(egress.of_family(self == Self::Ip))
    }

    /// Commands that leave no table. `delete table` fails where there is none, so it is declared first.
    pub(super) fn absent(self) -> String {
        let name = self.name();
        format!("table {name} {RULES_TABLE}\ndelete table {name} {RULES_TABLE}\n")
    }

    /// Commands that leave these rules, whatever rules were there, in sets that hold `wanted` where they held `found`. What
    /// the table has counted stays, and an element that is in both is there throughout.
    pub(super) fn present(self, vxlan_port: u16, found: &Elements, wanted: &Elements) -> String {
        let name = self.name();
        format!(
            "table {name} {RULES_TABLE}\nflush table {name} {RULES_TABLE}\n{}{}",
            self.table(vxlan_port),
            wanted.commands_from(found, &format!("{name} {RULES_TABLE}")),
        )
    }

    /// The command that lists the table.
    pub(super) fn list_command(self) -> String {
        format!("list table {} {RULES_TABLE}", self.name())
    }

    /// Whether a listed table has the rules that the tasks' way out depends on.
    pub(super) fn is_whole(listed: &str) -> bool {
        let has = |words: &[&str]| listed.lines().any(|line| words.iter().all(|word| line.contains(word)));
        has(&["masquerade"])
            && has(&["snat to", &format!("@{EGRESS}")])
            && has(&[&format!("@{FIXED}"), &format!("@{SOURCES}"), NO_ADDRESS, "drop"])
            && has(&[UNTRANSLATED, "drop"])
    }

    fn table(self, vxlan_port: u16) -> String {
        let (name, aliases) = (self.name(), self.aliases());
        let outside = format!("oifname != {{ \"lo\", \"{HOST_LINK}\" }}");
        let links = WIREGUARD_LINKS.map(|link| format!("\"{link}\"")).join(", ");
        let (links, ways) = (format!("{{ {links} }}"), format!("{{ \"lo\", {links} }}"));
        let addr = match self {
            Self::Ip => "ipv4_addr",
            Self::Ip6 => "ipv6_addr",
        };
        let (guard, wireguard) = match self {
            Self::Ip => (String::new(), String::new()),
            Self::Ip6 => (
                format!(
                    "\t\tip6 saddr {WIREGUARD_NET} iifname != {links} drop\n\
                     \t\tip6 daddr {WIREGUARD_NET} iifname != {links} drop\n\
                     \t\tiifname {links} udp dport != {vxlan_port} drop\n\
                     \t\tiifname {links} meta l4proto != {{ udp, ipv6-icmp }} drop\n"
                ),
                format!(
                    "\tchain wireguard {{\n\
                     \t\ttype filter hook postrouting priority filter; policy accept;\n\
                     \t\toifname {links} meta l4proto != ipv6-icmp meta mark != {WIREGUARD_MARK:#x} counter drop\n\
                     \t\tip6 saddr {WIREGUARD_NET} oifname != {ways} counter drop\n\
                     \t\tip6 daddr :: udp dport {vxlan_port} counter drop\n\
                     \t}}\n"
                ),
            ),
        };
        format!(
            "table {name} {RULES_TABLE} {{\n\
             \tcounter {NO_ADDRESS} {{ }}\n\
             \tcounter {UNTRANSLATED} {{ }}\n\
             \tset {FIXED} {{ type {addr}; }}\n\
             \tmap {EGRESS} {{ type {addr} : {addr}; }}\n\
             \tset {SOURCES} {{ type {addr} . {addr}; }}\n\
             \tchain postrouting {{\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             \t\t{name} saddr {aliases} {outside} snat to {name} saddr map @{EGRESS}\n\
             \t\t{name} saddr {aliases} {outside} masquerade\n\
             \t}}\n\
             \tchain departure {{\n\
             \t\ttype filter hook postrouting priority srcnat + 10; policy accept;\n\
             \t\t{outside} ct original {name} saddr @{FIXED} \
             ct original {name} saddr . {name} saddr != @{SOURCES} counter name {NO_ADDRESS} drop\n\
             \t\t{name} saddr {aliases} {outside} counter name {UNTRANSLATED} drop\n\
             \t}}\n\
             \tchain prerouting {{\n\
             \t\ttype filter hook prerouting priority raw; policy accept;\n\
             \t\tudp dport {vxlan_port} notrack\n\
             \t\t{name} daddr {aliases} iifname != {{ \"lo\", \"{HOST_LINK}\" }} drop\n\
             {guard}\
             \t}}\n\
             \tchain output {{\n\
             \t\ttype filter hook output priority raw; policy accept;\n\
             \t\tudp dport {vxlan_port} notrack\n\
             \t}}\n\
             {wireguard}\
             }}\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ruleset(family: Family) -> String {
        family.present(4790, &Elements::default(), &Elements::default())
    }

    #[test]
    fn each_family_masquerades_and_guards_its_own_aliases_and_tracks_no_vxlan() {
        for (family, lines) in [
            (
                Family::Ip,
                [
                    "ip saddr 169.254.64.1/18 oifname != { \"lo\", \"shoal0\" } masquerade",
                    "ip daddr 169.254.64.1/18 iifname != { \"lo\", \"shoal0\" } drop",
                    "ip saddr 169.254.64.1/18 oifname != { \"lo\", \"shoal0\" } counter name egress_untranslated drop",
                ],
            ),
            (
                Family::Ip6,
                [
                    "ip6 saddr fd73:686f:616c:1::1/64 oifname != { \"lo\", \"shoal0\" } masquerade",
                    "ip6 daddr fd73:686f:616c:1::1/64 iifname != { \"lo\", \"shoal0\" } drop",
                    "ip6 saddr fd73:686f:616c:1::1/64 oifname != { \"lo\", \"shoal0\" } counter name egress_untranslated drop",
                ],
            ),
        ] {
            let rules = ruleset(family);
            for line in lines {
                assert_eq!(rules.matches(line).count(), 1, "{line}\n{rules}");
            }
            assert_eq!(rules.matches("udp dport 4790 notrack").count(), 2);
        }
    }

    #[test]
    fn wireguards_addresses_are_guarded_in_ipv6_alone() {
        for line in [
            "ip6 saddr fd73:686f:616c:2::/64 iifname != { \"shoal-wg0\", \"shoal-wg1\" } drop",
            "ip6 daddr fd73:686f:616c:2::/64 iifname != { \"shoal-wg0\", \"shoal-wg1\" } drop",
            "oifname { \"shoal-wg0\", \"shoal-wg1\" } meta l4proto != ipv6-icmp meta mark != 0x53485747 counter drop",
            "ip6 saddr fd73:686f:616c:2::/64 oifname != { \"lo\", \"shoal-wg0\", \"shoal-wg1\" } counter drop",
            // To a node that is gone, for a flow that is not yet.
            "ip6 daddr :: udp dport 4790 counter drop",
        ] {
            assert_eq!(ruleset(Family::Ip6).matches(line).count(), 1, "{line}");
        }
        assert!(!ruleset(Family::Ip).contains("ip6"));
    }

    #[test]
    fn a_fixed_address_is_chosen_before_the_nodes_own_and_checked_after_it_was_chosen() {
        let rules = ruleset(Family::Ip);
        let at = |text: &str| rules.find(text).unwrap_or_else(|| panic!("no {text} in\n{rules}"));
        assert!(at("snat to ip saddr map @egress\n") < at(" masquerade\n"));
        at("priority srcnat + 10;");
        at(
            "ct original ip saddr @fixed ct original ip saddr . ip saddr != @sources counter name egress_no_address drop\n",
        );
    }

    #[test]
    fn a_table_that_lacks_a_rule_of_the_way_out_is_not_whole() {
        let rules = ruleset(Family::Ip6);
        assert!(Family::is_whole(&rules));
        for missing in
            ["masquerade", "snat to", "counter name egress_no_address", "counter name egress_untranslated"]
        {
            let without: Vec<&str> = rules.lines().filter(|line| !line.contains(missing)).collect();
            assert!(!Family::is_whole(&without.join("\n")), "{missing}");
        }
    }
}
