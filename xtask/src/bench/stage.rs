//! Hosts of the benchmarks' own beside the lab's nodes: network namespaces without Shoal, on the same switch, by links
//! of the same kind. What balancers are compared on.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::place::{PREFIX, Place};
use crate::{bounded, sys};

/// The lab's switch: its namespace, its bridge.
const SWITCH: &str = "shoal-sw";
const BRIDGE: &str = "br0";
/// Files of programs that run on the stage.
const FOLDER: &str = "/run/shb";
/// For one `ip`, `ethtool` or `nft`.
const LIMIT: Duration = Duration::from_secs(10);

/// How a link takes what the stack gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offloads {
    /// As veth does: packets of 64 KB, checksums to be filled in by whoever needs them.
    On,
    /// As a network card without any does.
    Off,
}

impl Offloads {
    fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
        }
    }
}

/// The namespaces, and the programs that serve on them. All of it goes when this is dropped.
#[derive(Debug)]
pub(super) struct Stage {
    namespaces: Vec<String>,
    servers: Vec<Child>,
    /// Files of programs that run here.
    folder: PathBuf,
}

impl Stage {
    /// An empty stage; what an earlier one left is removed first.
    pub(super) fn new() -> Result<Self> {
        for netns in namespaces() {
            remove(&netns);
        }
        fs::create_dir_all(FOLDER).with_context(|| format!("could not create {FOLDER}"))?;
        Ok(Self { namespaces: Vec::new(), servers: Vec::new(), folder: PathBuf::from(FOLDER) })
    }

    /// A namespace with nothing but its loopback interface; names are at most 11 bytes.
    pub(super) fn add_netns(&mut self, name: &str) -> Result<Place> {
        let netns = format!("{PREFIX}{name}");
        ip(&["netns", "add", &netns])?;
        self.namespaces.push(netns.clone());
        ip(&["-n", &netns, "link", "set", "lo", "up"])?;
        Ok(Place::named(&netns))
    }

    /// A host: its `eth0` leads to a port of the lab's switch, which is set as [`set_offloads`] does for [`Offloads::Off`],
    /// like the nodes'.
    pub(super) fn add_host(&mut self, name: &str, address: Ipv4Addr) -> Result<Place> {
        let place = self.add_netns(name)?;
        let netns = format!("{PREFIX}{name}");
        ip(&["-n", SWITCH, "link", "add", &netns, "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
        ip(&["-n", SWITCH, "link", "set", &netns, "master", BRIDGE, "up"])?;
        ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
        ip(&["-n", &netns, "address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        complete_on_the_switch(&netns, Offloads::Off)?;
        Ok(place)
    }

    /// Starts a program that serves until the end.
    pub(super) fn serve(&mut self, command: &mut Command) -> Result<()> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("starting {}", crate::run::line(command)))?;
        self.servers.push(child);
        Ok(())
    }

    /// Writes a file that programs on the stage read.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("could not write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The clean-up runs to its end after an interrupt, and whoever is interrupted has noticed by now.
        sys::forget_interrupt();
        for child in &mut self.servers {
            // One that has ended by itself is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        for netns in &self.namespaces {
            remove(netns);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The namespaces of stages that there are.
fn namespaces() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(PREFIX)).collect()
}

/// Removes a namespace, with the processes in it, and its port on the switch.
fn remove(netns: &str) {
    let pids = output(Command::new("ip").args(["netns", "pids", netns])).unwrap_or_default();
    for pid in pids.lines().filter_map(|pid| pid.trim().parse().ok()) {
        // One that is gone already is as good.
        let _ = sys::kill(pid, libc::SIGKILL);
    }
    // The port goes with the namespace, but not at once; a container's namespace has none.
    let _ = ip(&["-n", SWITCH, "link", "delete", netns]);
    if let Err(error) = ip(&["netns", "delete", netns]) {
        eprintln!("bench: namespace {netns} stays: {error:#}");
    }
}

/// Says how the ports of hosts, the lab's by their names and the stage's, and their own ends take packets.
///
/// Off is what the lab has between nodes, and besides no segmentation at the hosts' own ends.
pub(super) fn set_offloads(hosts: &[(&Place, &str)], offloads: Offloads) -> Result<()> {
    for (place, port) in hosts {
        complete_on_the_switch(port, offloads)?;
        let word = offloads.word();
        let mut own = place.command("ethtool");
        own.args(["-K", "eth0", "tso", word, "tx-udp_tnl-segmentation", word]);
        output(own.args(["tx-udp_tnl-csum-segmentation", word, "tx-udp-segmentation", word]))?;
    }
    Ok(())
}

/// The switch completes packets before it hands them to a host, as the lab's does for nodes, or leaves that to the host.
fn complete_on_the_switch(port: &str, offloads: Offloads) -> Result<()> {
    output(Place::named(SWITCH).command("ethtool").args(["-K", port, "tx", offloads.word()])).map(drop)
}

/// Attaches an XDP program that passes everything to both ends of a stage's host's link: the link then costs what the
/// links of nodes with XDP in the driver cost.
pub(super) fn pass_by_xdp(host: &str, pin: &Path) -> Result<()> {
    let (netns, pin) = (format!("{PREFIX}{host}"), pin.display().to_string());
    ip(&["-n", SWITCH, "link", "set", "dev", &netns, "xdp", "pinned", &pin])?;
    ip(&["-n", &netns, "link", "set", "dev", "eth0", "xdp", "pinned", &pin])
}

/// `ip`.
pub(super) fn ip(arguments: &[&str]) -> Result<()> {
    output(Command::new("ip").args(arguments)).map(drop)
}

/// `ip` in a place.
pub(super) fn ip_in(place: &Place, arguments: &[&str]) -> Result<()> {
    output(place.command("ip").args(arguments)).map(drop)
}

/// Writes settings of /proc/sys/net/ipv4, each as `path=value`, in a place.
pub(super) fn sysctl(place: &Place, settings: &[&str]) -> Result<()> {
    // /proc/sys/net shows the reader's own namespace.
    let script =
        r#"for setting; do echo "${setting#*=}" >"/proc/sys/net/ipv4/${setting%%=*}" || exit 1; done"#;
    output(place.command("sh").args(["-c", script, "sh"]).args(settings)).map(drop)
}

/// Runs one of the programs that set the stage.
pub(super) fn output(command: &mut Command) -> Result<String> {
    bounded::output(command, LIMIT)
}
