//! WireGuard alone between two hosts: what an encrypted network can at best be. By the kernel's device where the kernel
//! has one, else by wireguard-go, the user-space device that others ship.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::place::Place;
use super::stage::{self, Stage, ip_in};
use crate::{bounded, run};

/// The UDP port on both hosts.
const PORT: &str = "51999";
/// wireguard-go's sockets are not a namespace's own, so names differ. The hosts' addresses inside.
const LINKS: [(&str, Ipv4Addr); 2] =
    [("shbwg1", Ipv4Addr::new(10, 78, 0, 1)), ("shbwg2", Ipv4Addr::new(10, 78, 0, 2))];
/// How long wireguard-go may take to make its device.
const STARTED: Duration = Duration::from_secs(5);

/// What joins the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Device {
    /// The kernel's.
    Kernel,
    /// wireguard-go's.
    UserSpace,
}

impl Device {
    /// Of its throughput, what an encrypted network is to have.
    pub(super) fn goal(self) -> f64 {
        match self {
            Self::Kernel => 0.95,
            Self::UserSpace => 2.0,
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel => "the kernel's device",
            Self::UserSpace => "wireguard-go",
        })
    }
}

/// Joins two hosts, given with their addresses; gives what joins them, and the second host's address inside.
pub(super) fn join(stage: &mut Stage, hosts: [(&Place, Ipv4Addr); 2]) -> Result<(Device, Ipv4Addr)> {
    let secrets = [secret()?, secret()?];
    let mut device = Device::Kernel;
    for ((host, _), (link, _)) in hosts.iter().zip(LINKS) {
        if ip_in(host, &["link", "add", link, "type", "wireguard"]).is_err() {
            device = Device::UserSpace;
            stage.serve(host.server("wireguard-go").args(["-f", link]))?;
        }
    }
    for (index, (host, _)) in hosts.iter().enumerate() {
        let (link, inner) = LINKS[index];
        let key = stage.write(link, &secrets[index])?;
        let peer = public(&secrets[1 - index])?;
        let endpoint = format!("{}:{PORT}", hosts[1 - index].1);
        let allowed = format!("{}/32", LINKS[1 - index].1);
        bounded::until("wireguard-go has made its device", STARTED, || {
            let mut set = host.command("wg");
            set.args(["set", link, "listen-port", PORT, "private-key"]).arg(&key);
            set.args(["peer", &peer, "endpoint", &endpoint, "allowed-ips", &allowed]);
            Ok(stage::output(&mut set).ok())
        })?;
        ip_in(host, &["address", "add", &format!("{inner}/24"), "dev", link])?;
        // As wg-quick does: what WireGuard takes of 1500 bytes, over either family.
        ip_in(host, &["link", "set", link, "mtu", "1420", "up"])?;
    }
    Ok((device, LINKS[1].1))
}

fn secret() -> Result<String> {
    Ok(run::output(Command::new("wg").arg("genkey"))?.trim().to_owned())
}

/// The public key of a secret one.
fn public(secret: &str) -> Result<String> {
    use std::io::Write as _;
    let mut wg = Command::new("wg");
    wg.arg("pubkey").stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = wg.spawn().context("starting wg pubkey")?;
    // Dropped at once, which ends the input.
    child.stdin.take().context("wg without an input")?.write_all(secret.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("wg pubkey ended with {}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
