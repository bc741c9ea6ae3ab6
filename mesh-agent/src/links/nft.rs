//! Shoal's one netfilter table, `ip shoal`, installed through `nft` in one transaction.

use std::io;
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::{HOST_ADDR, HOST_LINK, HOST_PREFIX, LinkError};

/// Replaces the table as a whole: there is no moment without it.
pub(super) async fn install(vxlan_port: u16) -> Result<(), LinkError> {
    run(&ruleset(vxlan_port)).await
}

/// Removes the table; one that is not there is no error.
pub(super) async fn remove() -> Result<(), LinkError> {
    run("table ip shoal\ndelete table ip shoal\n").await
}

/// Whether the table is there, with the rule that the tasks' way out depends on.
pub(super) async fn is_installed() -> Result<bool, LinkError> {
    let mut command = Command::new("nft");
    command.args(["list", "chain", "ip", "shoal", "postrouting"]).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(LinkError::NftRun)?;
    Ok(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("masquerade"))
}

fn ruleset(vxlan_port: u16) -> String {
    let range = format!("{HOST_ADDR}/{HOST_PREFIX}");
    // `delete table` fails where there is none, so it is declared first. VXLAN between nodes would fill the
    // connection tracker with entries that nobody reads.
    format!(
        "table ip shoal\n\
         delete table ip shoal\n\
         table ip shoal {{\n\
         \tchain postrouting {{\n\
         \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
         \t\tip saddr {range} oifname != {{ \"lo\", \"{HOST_LINK}\" }} masquerade\n\
         \t}}\n\
         \tchain prerouting {{\n\
         \t\ttype filter hook prerouting priority raw; policy accept;\n\
         \t\tudp dport {vxlan_port} notrack\n\
         \t}}\n\
         \tchain output {{\n\
         \t\ttype filter hook output priority raw; policy accept;\n\
         \t\tudp dport {vxlan_port} notrack\n\
         \t}}\n\
         }}\n"
    )
}

async fn run(rules: &str) -> Result<(), LinkError> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => LinkError::NftMissing,
        _ => LinkError::NftRun(error),
    })?;
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
