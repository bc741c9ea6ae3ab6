//! The lab's network: a namespace for each host, one for the switch, and a veth from each host to it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::layout::{
    self, BRIDGE, GATEWAY, GATEWAY6, Host, Lab, PREFIX, PREFIX6, ROUTED_CLIENT, ROUTED_CLIENT6, Xdp,
};
use crate::{bounded, sys};

/// For one `ip`, `mount` or `ethtool`.
const LIMIT: Duration = Duration::from_secs(10);
/// The switch's namespace, by its name as a host.
pub(super) const SWITCH: &str = "sw";

/// Makes the switch, the client and the nodes with their links; no agent runs yet.
pub(super) fn make(lab: &Lab) -> Result<()> {
    make_switch(lab.mtu)?;
    let client = Host::client();
    connect(&client, lab.mtu)?;
    // A client that the nodes can't reach on their own link: what goes to it leaves by the gateway.
    let routes = [
        (format!("{ROUTED_CLIENT}/32"), client.address.to_string()),
        (format!("{ROUTED_CLIENT6}/128"), client.address6.to_string()),
    ];
    for (routed, via) in &routes {
        ip(&["-n", &client.netns(), "address", "add", routed, "dev", "lo"])?;
        ip(&["-n", &layout::netns(SWITCH), "route", "add", routed, "via", via])?;
    }
    for node in lab.nodes() {
        connect(&node, lab.mtu)?;
        receive_by_flow(&node)?;
        complete_on_the_switch(&node)?;
        mount_bpffs(&node)?;
        if lab.xdp == Xdp::Native {
            poll_on_the_switch(&node)?;
        }
    }
    Ok(())
}

fn make_switch(mtu: u32) -> Result<()> {
    let netns = layout::netns(SWITCH);
    ip(&["netns", "add", &netns])?;
    // To a gateway that doesn't know the way a host gets an answer at once, not a timeout. No redirects: the detour to
    // the routed client is on purpose.
    for setting in [
        "ipv4/ip_forward=1",
        "ipv4/conf/all/send_redirects=0",
        "ipv4/conf/default/send_redirects=0",
        "ipv6/conf/all/forwarding=1",
    ] {
        sysctl(&netns, setting)?;
    }
    ip(&["-n", &netns, "link", "set", "lo", "up"])?;
    ip(&[
        "-n",
        &netns,
        "link",
        "add",
        BRIDGE,
        "type",
        "bridge",
        "stp_state",
        "0",
        "forward_delay",
        "0",
        "mcast_snooping",
        "0",
    ])?;
    ip(&["-n", &netns, "link", "set", BRIDGE, "mtu", &mtu.to_string(), "up"])?;
    ip(&["-n", &netns, "address", "add", &format!("{GATEWAY}/{PREFIX}"), "dev", BRIDGE])?;
    // No time is spent on whether somebody else has an address: here nobody has.
    ip(&["-n", &netns, "address", "add", &format!("{GATEWAY6}/{PREFIX6}"), "dev", BRIDGE, "nodad"])?;
    ip(&["-n", &netns, "route", "add", "unreachable", "default"])?;
    ip(&["-n", &netns, "-6", "route", "add", "unreachable", "default"])
}

/// A namespace with `eth0`, whose other side is a port of the switch.
fn connect(host: &Host, mtu: u32) -> Result<()> {
    let (switch, netns, mtu) = (layout::netns(SWITCH), host.netns(), mtu.to_string());
    ip(&["netns", "add", &netns])?;
    ip(&["-n", &netns, "link", "set", "lo", "up"])?;
    ip(&["-n", &switch, "link", "add", &host.name, "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
    ip(&["-n", &switch, "link", "set", &host.name, "mtu", &mtu, "master", BRIDGE, "up"])?;
    ip(&["-n", &netns, "link", "set", "eth0", "mtu", &mtu, "up"])?;
    ip(&["-n", &netns, "address", "add", &format!("{}/{PREFIX}", host.address), "dev", "eth0"])?;
    ip(&["-n", &netns, "address", "add", &format!("{}/{PREFIX6}", host.address6), "dev", "eth0", "nodad"])?;
    ip(&["-n", &netns, "route", "add", "default", "via", &GATEWAY.to_string()])?;
    ip(&["-n", &netns, "-6", "route", "add", "default", "via", &GATEWAY6.to_string()])
}

/// Makes a node receive all packets of a flow on one CPU, as from a network card: a veth's are taken by whichever CPU
/// comes first. Where two packets of an opening connection are taken at once, Linux before 6.19 may find neither its request
/// nor its socket, and resets it.
fn receive_by_flow(node: &Host) -> Result<()> {
    let cpus = std::thread::available_parallelism()?.get().min(32);
    let mask = format!("{:x}", u32::MAX >> (32 - cpus));
    // A /sys that shows the namespace's links.
    let mut command = Command::new("ip");
    command.args([
        "netns",
        "exec",
        &node.netns(),
        "sh",
        "-c",
        "echo $1 >/sys/class/net/eth0/queues/rx-0/rps_cpus",
    ]);
    bounded::output(command.args(["sh", &mask]), LIMIT).map(drop)
}

/// Makes a node's port of the switch behave as a wire does.
///
/// A veth hands over packets as they are in memory: not segmented, checksums not filled in. XDP in the driver would send
/// them on like that. So the switch completes what it sends to a node (`tx off`, which takes segmentation with it).
fn complete_on_the_switch(node: &Host) -> Result<()> {
    let mut command = in_netns(&layout::netns(SWITCH), "ethtool");
    bounded::output(command.args(["-K", &node.name, "tx", "off"]), LIMIT).map(drop)
}

/// Makes a node's port of the switch take frames that native XDP sends out of the node's end: the driver wakes the
/// other end for them only if that has an XDP program as well. This one passes everything.
fn poll_on_the_switch(node: &Host) -> Result<()> {
    let pin = node.bpffs().join("switch_port");
    sys::bpf::pin_xdp_pass(&pin)
        .with_context(|| format!("could not load an XDP program at {}", pin.display()))?;
    let pin = pin.display().to_string();
    ip(&["-n", &layout::netns(SWITCH), "link", "set", "dev", &node.name, "xdp", "pinned", &pin])
}

fn mount_bpffs(node: &Host) -> Result<()> {
    let folder = node.bpffs();
    fs::create_dir_all(&folder).with_context(|| format!("could not create {}", folder.display()))?;
    let mut command = Command::new("mount");
    bounded::output(command.args(["-t", "bpf", "shoal-lab"]).arg(&folder), LIMIT).map(drop)
}

/// Pulls the cable between a node and the switch, or plugs it back in.
pub(super) fn set_cable(node: &Host, plugged: bool) -> Result<()> {
    let state = if plugged { "up" } else { "down" };
    ip(&["-n", &layout::netns(SWITCH), "link", "set", &node.name, state])
}

/// Whether a node's cable is plugged in; None where the switch has no such port.
pub(super) fn is_cable_plugged(node: &Host) -> Option<bool> {
    let netns = layout::netns(SWITCH);
    let mut command = Command::new("ip");
    command.args(["-n", &netns, "-oneline", "link", "show", "dev", &node.name]);
    let shown = bounded::output(&mut command, LIMIT).ok()?;
    let flags = shown.split_once('<')?.1.split_once('>')?.0;
    Some(flags.split(',').any(|flag| flag == "UP"))
}

/// Removes a namespace, and with it the links in it.
pub(super) fn remove_netns(netns: &str) -> Result<()> {
    ip(&["netns", "delete", netns])
}

/// `program`, to be run in a namespace. Not `ip netns exec`: that gives it a /sys without the lab's BPF file systems.
pub(crate) fn in_netns(netns: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", layout::netns_path(netns).display())).arg("--").arg(program);
    command
}

fn sysctl(netns: &str, setting: &str) -> Result<()> {
    // /proc/sys/net shows the reader's own namespace.
    let script = "echo ${1#*=} >/proc/sys/net/${1%%=*}";
    let mut command = in_netns(netns, "sh");
    bounded::output(command.args(["-c", script, "sh", setting]), LIMIT).map(drop)
}

fn ip(arguments: &[&str]) -> Result<()> {
    bounded::output(Command::new("ip").args(arguments), LIMIT).map(drop)
}

/// The lab's namespaces that there are, by the names that `ip netns` shows.
pub(super) fn namespaces() -> Vec<String> {
    let names = fs::read_dir(Path::new("/run/netns")).into_iter().flatten().flatten();
    let mut names: Vec<String> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| layout::is_lab_netns(name))
        .collect();
    names.sort();
    names
}
