//! Tasks by what they are on: the networks of an isolation case, and everybody's place in them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use mesh_common::addr::mac_of;
use mesh_common::be::Be32;
use serde_json::Value;

use crate::engine::{self, Task};
use crate::forgery::Spot;
use crate::lab::{Lab, within};
use crate::overlay::create_network;
use crate::wire::Wire;

/// The networks' names. Nothing leaves the last one.
pub(crate) const NETWORKS: [&str; 4] = ["red", "blue", "green", "inner"];
/// Which one is internal.
pub(crate) const INTERNAL: usize = 3;
/// Services with a task on each node, by the networks that they are on: six tasks on each.
pub(crate) const SERVICES: [(&str, &[usize]); 6] = [
    ("red", &[0]),
    ("red-blue", &[0, 1]),
    ("blue", &[1]),
    ("green", &[2]),
    ("green-inner", &[2, 3]),
    ("inner", &[3]),
];

/// The IPv4 subnet of a network.
pub(crate) fn subnet(network: usize) -> String {
    format!("10.91.{network}.0/24")
}

/// A task, and where it is in its networks.
pub(crate) struct Member {
    pub(crate) task: Task,
    /// Which of [`SERVICES`] it is of.
    pub(crate) service: usize,
    /// Its networks, and its place in each.
    pub(crate) spots: Vec<(usize, Spot)>,
}

impl Member {
    /// The file of its network namespace.
    pub(crate) fn namespace(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.task.pid))
    }

    /// Runs `work` in its network namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(&self.namespace(), work)
    }

    pub(crate) fn is_on(&self, network: usize) -> bool {
        self.spots.iter().any(|(own, _)| *own == network)
    }

    /// Its interfaces, in the order of [`Member::spots`].
    pub(crate) fn wires(&self) -> Result<Vec<Wire>> {
        self.spots.iter().map(|(_, spot)| Wire::open(&self.namespace(), spot.v4)).collect()
    }
}

/// Makes [`NETWORKS`] with `options` on top, and [`SERVICES`] that run `shoal/whoami` on them, on so many nodes as the swarm
/// has.
pub(crate) fn create(lab: &Lab, nodes: usize, options: &[&str]) -> Result<Vec<Member>> {
    let mut made = Vec::new();
    for (network, name) in NETWORKS.iter().enumerate() {
        let (v4, v6) = (subnet(network), format!("fd00:91:{network}::/64"));
        let internal: &[&str] = if network == INTERNAL { &["--internal"] } else { &[] };
        create_network(
            lab,
            name,
            &[&["--ipv6", "--subnet", &v4, "--subnet", &v6], internal, options].concat(),
        )?;
        made.push(Network::read(lab, name)?);
    }
    let mut members = Vec::new();
    for (service, (name, networks)) in SERVICES.iter().enumerate() {
        let on = networks.iter().flat_map(|network| ["--network", NETWORKS[*network]]);
        let arguments: Vec<&str> =
            ["--mode", "global"].into_iter().chain(on).chain(["shoal/whoami"]).collect();
        for task in engine::create(lab, name, nodes, &arguments)? {
            let spots =
                task.addresses.iter().map(|v4| spot(&task, *v4, &made)).collect::<Result<Vec<_>>>()?;
            let member = Member { task, service, spots };
            ensure!(networks.iter().all(|network| member.is_on(*network)), "{name}: {:?}", member.task);
            ensure!(member.spots.len() == networks.len(), "{name}: {:?}", member.task);
            members.push(member);
        }
    }
    for (network, name) in NETWORKS.iter().enumerate() {
        let tasks = members.iter().filter(|member| member.is_on(network)).count();
        ensure!(tasks == 2 * nodes, "{tasks} tasks on {name}");
    }
    Ok(members)
}

/// A network as it was made.
struct Network {
    vni: u32,
    gateway6: Ipv6Addr,
}

impl Network {
    fn read(lab: &Lab, name: &str) -> Result<Self> {
        let shown: Value = serde_json::from_str(&engine::get(lab.manager(), &format!("/networks/{name}"))?)?;
        let vni = shown["Options"]["com.docker.network.driver.overlay.vxlanid_list"].as_str();
        let vni = vni.context("a network without an identifier")?.parse()?;
        let subnets = shown["IPAM"]["Config"].as_array().context("a network without subnets")?;
        let gateway6 = subnets.iter().find_map(|subnet| subnet["Gateway"].as_str()?.parse().ok());
        Ok(Self { vni, gateway6: gateway6.context("a network without IPv6")? })
    }
}

/// The place at an address of one of the networks.
fn spot(task: &Task, v4: Ipv4Addr, made: &[Network]) -> Result<(usize, Spot)> {
    let network = usize::from(v4.octets()[2]);
    let Network { vni, gateway6 } = *made.get(network).with_context(|| format!("{v4} is of no network"))?;
    let v6 = |v4: Ipv4Addr| {
        let prefix = Ipv6Addr::new(0xfd00, 0x91, network as u16, 0, 0, 0, 0, 0);
        Ipv6Addr::from_bits(prefix.to_bits() | u128::from(v4.to_bits()))
    };
    let gateway4 = Ipv4Addr::new(10, 91, network as u8, 1);
    let spot = Spot {
        mac: mac_of(Be32::from(v4)),
        v4,
        v6: v6(v4),
        vni,
        gateway_mac: mac_of(Be32::from(gateway4)),
        gateway4,
        gateway6,
        node4: task.node.address,
        node6: task.node.address6,
    };
    Ok((network, spot))
}
