//! East-west traffic: Shoal's overlay beside the kernel's VXLAN device under a bridge, which is Docker's layout, beside the
//! underlay itself; and an encrypted network beside WireGuard alone. Two hosts each, on the same switch; the same programs at
//! both ends.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;

use super::figures::{Case, Goal, Unit, show, show_goals};
use super::load::{self, Load};
use super::place::{PREFIX, Place};
use super::stage::{self, Offloads, Stage, ip_in};
use super::wireguard::{self, Device};
use super::{Scale, shoal};
use crate::lab::{self, Host, Lab};

const IPERF3: u16 = 5201;
const ECHO: u16 = 7007;
/// Docker's MTU in an overlay on a network of 1500 bytes.
const MTU: &str = "1450";
const VNI: &str = "77";

/// The hosts of the kernel's VXLAN, which also stand for the underlay: name, address on the switch.
const HOSTS: [(&str, Ipv4Addr); 2] =
    [("h1", Ipv4Addr::new(198, 18, 0, 221)), ("h2", Ipv4Addr::new(198, 18, 0, 222))];
/// Their containers: name, address in the overlay, Ethernet address.
const CONTAINERS: [(&str, Ipv4Addr, &str); 2] = [
    ("c1", Ipv4Addr::new(10, 77, 0, 2), "02:42:0a:4d:00:02"),
    ("c2", Ipv4Addr::new(10, 77, 0, 3), "02:42:0a:4d:00:03"),
];

/// One way from a client to a server on another host.
struct Path {
    name: &'static str,
    client: Place,
    server: Place,
    address: Ipv4Addr,
}

/// What is measured of each way, with offloads and without.
const FIGURES: [(&str, Unit); 3] = [("iperf3", Unit::GbitS), ("rtt_p50", Unit::Us), ("rtt_p99", Unit::Us)];

/// Measures on a lab of two nodes that is up.
pub(super) fn run(lab: &Lab, scale: Scale) -> Result<Vec<Case>> {
    let mut stage = Stage::new()?;
    let (kernel, hosts) = set_up_kernels_vxlan(&mut stage)?;
    let n1 = lab.node("n1")?;
    let plain = between_tasks(&n1, "shoal", &[])?;
    let encrypted = between_tasks(&n1, "shoal_encrypted", &["--opt", "encrypted"])?;
    let [h1, h2] = hosts;
    let underlay = Path { name: "underlay", client: h1.clone(), server: h2.clone(), address: HOSTS[1].1 };
    let (device, inside) = wireguard::join(&mut stage, [(&h1, HOSTS[0].1), (&h2, HOSTS[1].1)])?;
    let wireguard = Path { name: "wireguard", client: h1.clone(), server: h2.clone(), address: inside };
    let paths = [plain, kernel, underlay, encrypted, wireguard];

    let nodes = lab.nodes();
    let places: Vec<Place> = nodes.iter().map(Place::of_host).collect();
    let mut links: Vec<(&Place, &str)> =
        places.iter().zip(nodes.iter().map(|node| node.name.as_str())).collect();
    let ports = HOSTS.map(|(name, _)| format!("{PREFIX}{name}"));
    links.extend([(&h1, ports[0].as_str()), (&h2, ports[1].as_str())]);

    let mut loads = Vec::new();
    for (index, path) in paths.iter().enumerate() {
        // Two ways may lead to one server.
        if !paths[..index].iter().any(|other| other.server == path.server) {
            stage.serve(&mut load::iperf3_server(&path.server, IPERF3))?;
            stage.serve(&mut load::echo_server(&path.server, ECHO)?)?;
        }
        let load = Load::new(path.client.clone(), scale.seconds, &stage)?;
        load.await_iperf3(path.name, SocketAddrV4::new(path.address, IPERF3))?;
        loads.push(load);
    }
    println!(
        "overlay: task -> n1 -> switch -> n2 -> task; {} rounds, the ways in turns; wire: segmentation and checksums are \
         done before a link\n  iperf3       iperf3 -t {seconds} -c ADDRESS, one stream\n  rtt          64 bytes to and fro \
         on one TCP connection for {seconds} s\n  \
         wireguard    alone between two hosts, by {device}",
        scale.rounds,
        seconds = scale.seconds
    );
    let mut measured = [Offloads::On, Offloads::Off].map(|offloads| (offloads, cases(offloads, &paths)));
    for turns in scale.turns(paths.len()) {
        for (offloads, cases) in &mut measured {
            stage::set_offloads(&links, *offloads)?;
            for &turn in &turns {
                let (path, load, cases) = (&paths[turn], &loads[turn], &mut cases[turn]);
                let at = |port| SocketAddrV4::new(path.address, port);
                cases[0].push(load.gigabits(at(IPERF3), false)?);
                let latencies = load.round_trip_latencies(at(ECHO))?;
                cases[1].push(latencies.p50_us);
                cases[2].push(latencies.p99_us);
            }
        }
    }
    Ok(report(measured.map(|(_, cases)| cases), device))
}

/// The way between two nodes' tasks, in a network of its own.
fn between_tasks(manager: &Host, name: &'static str, options: &[&str]) -> Result<Path> {
    lab::docker(manager, &[&["network", "create", "--driver", "overlay"], options, &[name]].concat())?;
    let near = shoal::idle_task(manager, "n1", name)?;
    let far = shoal::idle_task(manager, "n2", name)?;
    Ok(Path { name, client: near.place, server: far.place, address: far.address })
}

/// The cases of each path, in the order of [`FIGURES`].
fn cases(offloads: Offloads, paths: &[Path]) -> Vec<[Case; 3]> {
    let prefix = if offloads == Offloads::On { "overlay" } else { "overlay_wire" };
    let of = |path: &Path| {
        FIGURES.map(|(figure, unit)| Case::new(format!("{prefix}_{figure}_{}", path.name), unit))
    };
    paths.iter().map(of).collect()
}

/// Shows figures, ratios and goals; gives figures and ratios.
fn report(measured: [Vec<[Case; 3]>; 2], device: Device) -> Vec<Case> {
    let (mut figures, mut ratios, mut goals) = (Vec::new(), Vec::new(), Vec::new());
    for cases in measured {
        let [shoal, vxlan, underlay, encrypted, wireguard] = cases.as_slice() else { continue };
        for (index, (_, unit)) in FIGURES.into_iter().enumerate() {
            let over = |other: &Case, name: &str| {
                shoal[index].over(other, format!("{}_of_{name}", shoal[index].name))
            };
            let of_vxlan = over(&vxlan[index], "vxlan_bridge");
            let goal = if unit == Unit::Us { Goal::AtMost(1.0) } else { Goal::AtLeast(1.3) };
            let encrypted_over = |other: &Case, name: &str| {
                encrypted[index].over(other, format!("{}_of_{name}", encrypted[index].name))
            };
            let cost = encrypted_over(&shoal[index], "shoal");
            let of_wireguard = encrypted_over(&wireguard[index], "wireguard");
            ratios.extend([of_vxlan.clone(), over(&underlay[index], "underlay"), cost, of_wireguard.clone()]);
            goals.push((of_vxlan, goal));
            if unit == Unit::GbitS {
                goals.push((of_wireguard, Goal::AtLeast(device.goal())));
            }
            figures.extend([shoal, vxlan, underlay, encrypted, wireguard].map(|cases| cases[index].clone()));
        }
    }
    show(&figures);
    show(&ratios);
    show_goals(&goals);
    figures.extend(ratios);
    figures
}

/// Two hosts with a bridge, a VXLAN device as a port of it, and a container each. As Docker does, forwarding entries are
/// written, not learned, and the VXLAN device answers ARP.
fn set_up_kernels_vxlan(stage: &mut Stage) -> Result<(Path, [Place; 2])> {
    let mut hosts = Vec::new();
    let mut containers = Vec::new();
    for (index, (name, address)) in HOSTS.into_iter().enumerate() {
        let (container, inner, mac) = CONTAINERS[index];
        let (_, far_inner, far_mac) = CONTAINERS[1 - index];
        let far = HOSTS[1 - index].1.to_string();
        let host = stage.add_host(name, address)?;
        let inside = stage.add_netns(container)?;
        let netns = format!("{PREFIX}{container}");
        for words in [
            "link add br0 type bridge stp_state 0 mcast_snooping 0".to_owned(),
            format!(
                "link add vx0 mtu {MTU} type vxlan id {VNI} dstport 4789 local {address} noudpcsum nolearning proxy l2miss l3miss"
            ),
            "link set vx0 master br0".to_owned(),
            format!("link add {container} mtu {MTU} type veth peer name eth0 netns {netns}"),
            format!("link set {container} master br0"),
            "link set br0 up".to_owned(),
            "link set vx0 up".to_owned(),
            format!("link set {container} up"),
            format!("neigh add {far_inner} lladdr {far_mac} dev vx0 nud permanent"),
        ] {
            ip_in(&host, &words.split(' ').collect::<Vec<_>>())?;
        }
        let entry = ["fdb", "add", far_mac, "dev", "vx0", "dst", &far, "self", "permanent"];
        stage::output(host.command("bridge").args(entry))?;
        for words in [
            format!("link set eth0 address {mac} mtu {MTU}"),
            "link set eth0 up".to_owned(),
            format!("address add {inner}/24 dev eth0"),
        ] {
            ip_in(&inside, &words.split(' ').collect::<Vec<_>>())?;
        }
        hosts.push(host);
        containers.push(inside);
    }
    let path = Path {
        name: "vxlan_bridge",
        client: containers[0].clone(),
        server: containers[1].clone(),
        address: CONTAINERS[1].1,
    };
    Ok((path, [hosts[0].clone(), hosts[1].clone()]))
}
