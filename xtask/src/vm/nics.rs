//! A lab whose hosts have virtio interfaces, on a hub inside QEMU, in place of veths on a bridge.
//!
//! Namespaces, addresses and files are those of `cargo xtask lab`, so its commands and the netns suite work on it.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bounded;
use crate::lab::{
    self, BINARY, GATEWAY, GATEWAY6, Host, Lab, PREFIX, PREFIX6, ROUTED_CLIENT, ROUTED_CLIENT6, Underlay, Xdp,
};

const NODES: usize = 3;
const MTU: u32 = 1500;
/// For one `ip`, `mount` or `sysctl`.
const LIMIT: Duration = Duration::from_secs(30);

/// A host's place on the hub.
struct Place {
    /// `sw`, `n1`…, `client`
    name: String,
    address: Ipv4Addr,
    address6: Ipv6Addr,
    mac: String,
}

/// The switch's router, the nodes, the client.
fn places() -> Vec<Place> {
    let hosts = (1..=NODES).map(Host::node).chain([Host::client()]);
    let switch = Host { name: "sw".to_owned(), address: GATEWAY, address6: GATEWAY6 };
    // Locally administered, and "shol".
    let mac = |index: usize| format!("02:73:68:6f:6c:{index:02x}");
    let all = std::iter::once(switch).chain(hosts).enumerate();
    all.map(|(index, Host { name, address, address6 })| Place { name, address, address6, mac: mac(index) })
        .collect()
}

/// QEMU's arguments for the hub and the interfaces on it.
pub(super) fn devices() -> Vec<String> {
    let mut arguments = Vec::new();
    for Place { name, mac, .. } in places() {
        arguments.extend(["-netdev".to_owned(), format!("hubport,id={name},hubid=0")]);
        // Without the file that it would boot from the network with.
        arguments.extend(["-device".to_owned(), format!("virtio-net-pci,netdev={name},mac={mac},romfile=")]);
    }
    arguments
}

/// Brings the lab up, in a guest: `binary` runs on every node, and n1 is the manager of a swarm of them all.
pub(super) fn up(binary: &Path, xdp: Xdp) -> Result<Lab> {
    // Nobody here loads drivers for the devices that there are.
    call("modprobe", &["virtio_net"])?;
    let folder = Path::new(BINARY).parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).with_context(|| format!("could not create {}", folder.display()))?;
    call("mount", &["-t", "tmpfs", "shoal-lab", &folder.display().to_string()])?;
    fs::copy(binary, BINARY).with_context(|| format!("could not copy {}", binary.display()))?;
    let lab = Lab { nodes: NODES, xdp, mtu: MTU, underlay: Underlay::Ipv4 };
    lab.write()?;
    for place in places() {
        connect(&place)?;
    }
    route()?;
    let nodes = lab.nodes();
    for node in &nodes {
        let bpffs = node.bpffs();
        fs::create_dir_all(&bpffs).with_context(|| format!("could not create {}", bpffs.display()))?;
        call("mount", &["-t", "bpf", "shoal-lab", &bpffs.display().to_string()])?;
        lab::start_agent(&lab, node)?;
    }
    let [manager, workers @ ..] = nodes.as_slice() else { return Ok(lab) };
    let address = manager.address.to_string();
    lab::docker(manager, &["swarm", "init", "--advertise-addr", &address])?;
    let token = lab::docker(manager, &["swarm", "join-token", "--quiet", "worker"])?;
    for worker in workers {
        lab::docker(worker, &["swarm", "join", "--token", &token, &format!("{address}:2377")])?;
    }
    Ok(lab)
}

/// A namespace with the host's interface in it.
fn connect(place: &Place) -> Result<()> {
    let netns = format!("shoal-{}", place.name);
    let interface = interface_of(&place.mac)?;
    call("ip", &["netns", "add", &netns])?;
    call("ip", &["link", "set", &interface, "netns", &netns, "name", "eth0"])?;
    let inside = |arguments: &[&str]| call("ip", &[&["-n", &netns], arguments].concat());
    inside(&["link", "set", "lo", "up"])?;
    inside(&["link", "set", "eth0", "mtu", &MTU.to_string(), "up"])?;
    inside(&["address", "add", &format!("{}/{PREFIX}", place.address), "dev", "eth0"])?;
    inside(&["address", "add", &format!("{}/{PREFIX6}", place.address6), "dev", "eth0", "nodad"])?;
    if place.address != GATEWAY {
        inside(&["route", "add", "default", "via", &GATEWAY.to_string()])?;
        inside(&["-6", "route", "add", "default", "via", &GATEWAY6.to_string()])?;
    }
    Ok(())
}

/// The switch routes to the client's other addresses, and has ports for `lab cut` and `lab heal` to work on.
fn route() -> Result<()> {
    for (setting, value) in [
        ("ipv4/ip_forward", 1),
        ("ipv4/conf/all/send_redirects", 0),
        ("ipv4/conf/eth0/send_redirects", 0),
        ("ipv6/conf/all/forwarding", 1),
    ] {
        // /proc/sys/net shows the reader's own namespace.
        let mut command = lab::in_netns("shoal-sw", "sh");
        bounded::output(command.args(["-c", &format!("echo {value} >/proc/sys/net/{setting}")]), LIMIT)?;
    }
    let client = Host::client();
    let routes = [
        (format!("{ROUTED_CLIENT}/32"), client.address.to_string()),
        (format!("{ROUTED_CLIENT6}/128"), client.address6.to_string()),
    ];
    for (routed, via) in &routes {
        call("ip", &["-n", &client.netns(), "address", "add", routed, "dev", "lo"])?;
        call("ip", &["-n", "shoal-sw", "route", "add", routed, "via", via])?;
    }
    for node in (1..=NODES).map(Host::node) {
        call("ip", &["-n", "shoal-sw", "link", "add", &node.name, "type", "bridge"])?;
    }
    Ok(())
}

/// Fails unless each node's agent says that it has XDP in its interface's driver, and the interface that it has.
pub(super) fn check_native(lab: &Lab) -> Result<()> {
    for node in lab.nodes() {
        let info = lab::get_json(&node, "/info")?;
        let lines = info["DriverStatus"].as_array().map(Vec::as_slice).unwrap_or_default();
        let said = lines.iter().find(|line| line[0] == "Dataplane").map(|line| line[1].to_string());
        ensure!(
            said.as_deref() == Some("\"eth0=xdp-native\""),
            "{} says of its dataplane: {said:?}",
            node.name
        );
        let shown = call("ip", &["-n", &node.netns(), "-details", "link", "show", "dev", "eth0"])?;
        ensure!(
            shown.contains(" xdp ") && shown.contains("prog/xdp"),
            "{}'s driver has no XDP program: {shown}",
            node.name
        );
    }
    Ok(())
}

/// The interface with an Ethernet address.
fn interface_of(mac: &str) -> Result<String> {
    for entry in fs::read_dir("/sys/class/net")?.flatten() {
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if address.trim() == mac {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    anyhow::bail!("no interface has the address {mac}")
}

fn call(program: &str, arguments: &[&str]) -> Result<String> {
    bounded::output(Command::new(program).args(arguments), LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_an_interface_of_its_own_on_one_hub() {
        let arguments = devices();
        let hubs = arguments.iter().filter(|argument| argument.ends_with("hubid=0")).count();
        let macs: std::collections::BTreeSet<String> = places().into_iter().map(|place| place.mac).collect();
        assert_eq!((hubs, macs.len()), (NODES + 2, NODES + 2));
    }
}
