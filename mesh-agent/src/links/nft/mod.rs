//! Shoal's netfilter tables, `ip shoal` and `ip6 shoal`, installed through `nft` in one transaction.
//!
//! Tasks' packets are masqueraded when they leave the host, or bear the address that their service has for that; what leaves
//! is checked once more after that. VXLAN between nodes is not tracked: it would fill the connection tracker with entries
//! that nobody reads. What is for the node-local addresses comes from tasks and local processes alone: from the wire it is
//! dropped. What has an address in WireGuard's network comes out of WireGuard and from nowhere else, and into it goes what
//! the programs have marked.

mod elements;
mod losses;
mod rules;

use std::io;
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

pub use losses::{Loss, losses};

use self::elements::Elements;
use self::rules::Family;
use super::{Egress, LinkError, RULES_TABLE, sysctl};

/// The families that the kernel has.
fn families() -> &'static [Family] {
    if sysctl::has_ipv6() { &[Family::Ip, Family::Ip6] } else { &[Family::Ip] }
}

/// Installs the tables, or replaces what they hold: there is no moment without them, or in which a task that stays could
/// send under another address.
pub(super) async fn install(vxlan_port: u16, egress: &Egress) -> Result<(), LinkError> {
    let (mut commands, mut anew) = (String::new(), String::new());
    for family in families() {
        let found = Elements::read(&listed(*family).await?.unwrap_or_default());
        let wanted = family.elements(egress);
        commands += &family.present(vxlan_port, &found, &wanted);
        anew += &family.absent();
        anew += &family.present(vxlan_port, &Elements::default(), &wanted);
    }
    match run(&commands).await {
        // A table of these names that has other chains or sets under the same names.
        Err(LinkError::NftRefused { .. }) => run(&anew).await,
        other => other,
    }
}

/// Removes the tables; one that is not there is no error.
pub(super) async fn remove() -> Result<(), LinkError> {
    run(&families().iter().map(|family| family.absent()).collect::<String>()).await
}

/// Whether the tables are there, with the rules that the tasks' way out depends on, and have tasks send as `egress` says.
pub(super) async fn is_installed(egress: &Egress) -> Result<bool, LinkError> {
    // One list a call: nft 1.0.6 fails to find the second table of a call.
    for family in families() {
        let listed = listed(*family).await?.unwrap_or_default();
        if !Family::is_whole(&listed) || Elements::read(&listed) != family.elements(egress) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The names of the tables that are there.
pub(super) async fn installed() -> Result<Vec<String>, LinkError> {
    let mut tables = Vec::new();
    for family in families() {
        if listed(*family).await?.is_some() {
            tables.push(format!("{} {RULES_TABLE}", family.name()));
        }
    }
    Ok(tables)
}

/// A family's table as `nft` prints it; `None` where there is none.
async fn listed(family: Family) -> Result<Option<String>, LinkError> {
    let mut command = Command::new("nft");
    command.arg(family.list_command()).stdin(Stdio::null()).kill_on_drop(true);
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
