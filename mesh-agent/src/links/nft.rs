//! Shoal's netfilter tables, `ip shoal` and `ip6 shoal`, installed through `nft` in one transaction.
//!
//! Tasks' packets are masqueraded when they leave the host, and VXLAN between nodes is not tracked: it would fill the
//! connection tracker with entries that nobody reads. What is for the node-local addresses comes from tasks and local
//! processes alone: from the wire it is dropped. What has an address in WireGuard's network comes out of WireGuard and
//! from nowhere else, and into it goes what the programs have marked.

use std::io;
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use mesh_api::wireguard::WIREGUARD_NET;
use mesh_common::map::WIREGUARD_MARK;

use super::{
    HOST_ADDR, HOST_ADDR6, HOST_LINK, HOST_PREFIX, HOST_PREFIX6, LinkError, WIREGUARD_LINKS, sysctl,
};

/// The name of the tables.
const TABLE: &str = "shoal";

/// A family of netfilter tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Ip,
    Ip6,
}

/// The families that the kernel has.
fn families() -> &'static [Family] {
    if sysctl::has_ipv6() { &[Family::Ip, Family::Ip6] } else { &[Family::Ip] }
}

/// Replaces the tables as a whole: there is no moment without them.
pub(super) async fn install(vxlan_port: u16) -> Result<(), LinkError> {
    run(&ruleset(families(), vxlan_port)).await
}

/// Removes the tables; one that is not there is no error.
pub(super) async fn remove() -> Result<(), LinkError> {
    run(&families().iter().map(|family| family.absent()).collect::<String>()).await
}

/// Whether the tables are there, with the rules that the tasks' way out depends on.
pub(super) async fn is_installed() -> Result<bool, LinkError> {
    // One list a call: nft 1.0.6 fails to find the second table of a call.
    for family in families() {
        let rules = list(&format!("list chain {} {TABLE} postrouting", family.name())).await?;
        if !rules.is_some_and(|rules| rules.contains("masquerade")) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The names of the tables that are there.
pub(super) async fn installed() -> Result<Vec<String>, LinkError> {
    let mut tables = Vec::new();
    for family in families() {
        let name = format!("{} {TABLE}", family.name());
        if list(&format!("list table {name}")).await?.is_some() {
            tables.push(name);
        }
    }
    Ok(tables)
}

impl Family {
    fn name(self) -> &'static str {
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

    /// Commands that leave no table. `delete table` fails where there is none, so it is declared first.
    fn absent(self) -> String {
        let name = self.name();
        format!("table {name} {TABLE}\ndelete table {name} {TABLE}\n")
    }

    fn table(self, vxlan_port: u16) -> String {
        let (name, aliases) = (self.name(), self.aliases());
        let links = WIREGUARD_LINKS.map(|link| format!("\"{link}\"")).join(", ");
        let links = format!("{{ {links} }}");
        let (guard, postrouting) = match self {
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
                     \t\toifname {links} meta l4proto != ipv6-icmp meta mark != {WIREGUARD_MARK:#x} drop\n\
                     \t}}\n"
                ),
            ),
        };
        format!(
            "table {name} {TABLE} {{\n\
             \tchain postrouting {{\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             \t\t{name} saddr {aliases} oifname != {{ \"lo\", \"{HOST_LINK}\" }} masquerade\n\
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
             {postrouting}\
             }}\n"
        )
    }
}

fn ruleset(families: &[Family], vxlan_port: u16) -> String {
    families.iter().map(|family| family.absent() + &family.table(vxlan_port)).collect()
}

/// What nft prints to a `list` command; `None` where what it names does not exist.
async fn list(command_line: &str) -> Result<Option<String>, LinkError> {
    let mut command = Command::new("nft");
    command.arg(command_line).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(not_run)?;
    Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned()))
}

fn not_run(error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::NotFound => LinkError::NftMissing,
        _ => LinkError::NftRun(error),
    }
}

async fn run(rules: &str) -> Result<(), LinkError> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn().map_err(not_run)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A refusal may close the pipe early: what nft says on stderr is the better message.
        let _ = stdin.write_all(rules.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(LinkError::NftRun)?;
    if output.status.success() {
        return Ok(());
    }
    Err(LinkError::NftRefused { stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_masquerades_and_guards_its_own_aliases_and_tracks_no_vxlan() {
        let rules = ruleset(&[Family::Ip, Family::Ip6], 4790);
        for line in [
            "ip saddr 169.254.64.1/18 oifname != { \"lo\", \"shoal0\" } masquerade",
            "ip6 saddr fd73:686f:616c:1::1/64 oifname != { \"lo\", \"shoal0\" } masquerade",
            "ip daddr 169.254.64.1/18 iifname != { \"lo\", \"shoal0\" } drop",
            "ip6 daddr fd73:686f:616c:1::1/64 iifname != { \"lo\", \"shoal0\" } drop",
        ] {
            assert!(rules.contains(line), "{rules}");
        }
        assert_eq!(rules.matches("udp dport 4790 notrack").count(), 4);
        for line in [
            "ip6 saddr fd73:686f:616c:2::/64 iifname != { \"shoal-wg0\", \"shoal-wg1\" } drop",
            "ip6 daddr fd73:686f:616c:2::/64 iifname != { \"shoal-wg0\", \"shoal-wg1\" } drop",
            "oifname { \"shoal-wg0\", \"shoal-wg1\" } meta l4proto != ipv6-icmp meta mark != 0x53485747 drop",
        ] {
            assert_eq!(rules.matches(line).count(), 1, "{rules}");
        }
        assert!(!ruleset(&[Family::Ip], 4790).contains("ip6"));
    }
}
