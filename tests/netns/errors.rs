//! ICMP errors that somebody made up.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};
use mesh_agent::dataplane::Counter;

use crate::client;
use crate::engine::Task;
use crate::figure;
use crate::intruders::forwarded;
use crate::lab::{self, Lab, Node, as_client, command_in};
use crate::paths::path_mtu;
use crate::peers::{self, BALANCER, Balancer, Kind};
use crate::raw::{STRANGER, Sender};
use crate::steady::Connection;
use crate::ways::{self, Family, Way};

/// The same as [`STRANGER`], of RFC 3849's addresses for documentation.
const STRANGER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);
/// The path MTU that they tell of: the least that there is, bytes.
const TINY: u16 = 68;
/// The least that Linux believes (`min_pmtu`), and IPv6's own, bytes.
const FLOORS: [u32; 2] = [552, 1280];
const BULK_BYTES: usize = 1_000_000;

/// What an error is about.
#[derive(Clone, Copy)]
enum Error {
    TooBig,
    PortUnreachable,
}

/// Transport of a quoted packet.
#[derive(Clone, Copy)]
enum Quoted {
    Tcp,
    Udp,
    /// A request of the mesh in VXLAN.
    Vxlan,
}

/// An error from a stranger about a packet from `src` to `dst`, to `src`.
fn error(error: Error, quoted: Quoted, src: SocketAddr, dst: SocketAddr) -> Result<Vec<u8>> {
    let mut quote = Vec::new();
    let builder = match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => PacketBuilder::ipv4(src.octets(), dst.octets(), 60),
        (IpAddr::V6(src), IpAddr::V6(dst)) => PacketBuilder::ipv6(src.octets(), dst.octets(), 60),
        _ => bail!("two families"),
    };
    let data = [&[8, 0, 0, 0, 0, 0, 1, 0][..], &[0; 40]].concat();
    match quoted {
        Quoted::Tcp => builder.tcp(src.port(), dst.port(), 77, 65_000).write(&mut quote, &data)?,
        Quoted::Udp | Quoted::Vxlan => builder.udp(src.port(), dst.port()).write(&mut quote, &data)?,
    }
    let mut packet = Vec::new();
    match src.ip() {
        IpAddr::V4(src) => {
            let kind = match error {
                Error::TooBig => icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: TINY },
                Error::PortUnreachable => icmpv4::DestUnreachableHeader::Port,
            };
            let builder = PacketBuilder::ipv4(STRANGER.octets(), src.octets(), 64);
            builder.icmpv4(Icmpv4Type::DestinationUnreachable(kind)).write(&mut packet, &quote)?;
        }
        IpAddr::V6(src) => {
            let kind = match error {
                Error::TooBig => Icmpv6Type::PacketTooBig { mtu: TINY.into() },
                Error::PortUnreachable => {
                    Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port)
                }
            };
            let builder = PacketBuilder::ipv6(STRANGER6.octets(), src.octets(), 64);
            builder.icmpv6(kind).write(&mut packet, &quote)?;
        }
    }
    Ok(packet)
}

fn sum(lab: &Lab, counter: Counter) -> Result<u64> {
    lab.nodes.iter().map(|node| node.count(counter)).sum()
}

pub(crate) fn errors_about_nobodys_flow_reach_no_task(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 2, &[])?;
    let mut packets = Vec::new();
    for way in Way::all() {
        for node in &lab.nodes {
            for port in 31_000..31_010 {
                let (src, dst) = (way.to(node), SocketAddr::new(way.family.client(), port));
                for quoted in [Quoted::Tcp, Quoted::Udp] {
                    for kind in [Error::TooBig, Error::PortUnreachable] {
                        packets.push((src.ip(), error(kind, quoted, src, dst)?));
                    }
                }
            }
        }
    }
    let taken = || Ok::<_, anyhow::Error>(sum(lab, Counter::MeshDelivered)? + forwarded(lab)?);
    let before = (taken()?, sum(lab, Counter::Passed)?);
    as_client(|| {
        let sender = Sender::open()?;
        packets.iter().try_for_each(|(by, packet)| sender.send(packet, *by).map(drop))
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let (taken, passed) = (taken()? - before.0, sum(lab, Counter::Passed)? - before.1);
    figure!("{} errors about flows that there are not: {taken} delivered or sent on", packets.len());
    ensure!(taken == 0, "{taken} go on");
    ensure!(passed >= packets.len() as u64, "{passed} were left to the nodes' stacks");
    Ok(())
}

/// A stranger tells the server behind nftables of a tiny path; gives what the server believes, bytes.
fn peer_believes() -> Result<u32> {
    let _balancer = Balancer::start(Kind::Nftables)?;
    let to = SocketAddr::from(SocketAddrV4::new(BALANCER, peers::PORT));
    let client = SocketAddr::new(Family::V4.client(), 31_500);
    as_client(|| {
        client::udp(client, to, b"a flow")?;
        Sender::open()?.send(&error(Error::TooBig, Quoted::Udp, to, client)?, to.ip())
    })?;
    std::thread::sleep(Duration::from_millis(100));
    path_mtu(command_in("behind", "ip"), client.ip())
}

/// A flow's own client could say so as well: tasks believe it as far as their kernel does, and no further.
pub(crate) fn forged_path_mtu_of_a_flow_stays_above_the_floor(lab: &Lab) -> Result<()> {
    let believed = peer_believes()?;
    figure!("behind nftables a server believes in {believed} bytes");
    ensure!(believed == FLOORS[0], "the attack does not work on a peer");
    let tasks = ways::create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    for way in Way::all() {
        for (number, node) in lab.nodes[..2].iter().enumerate() {
            let (to, client) = (way.to(node), SocketAddr::new(way.family.client(), 31_600 + number as u16));
            as_client(|| {
                let mut connection = Connection::open(to)?.0;
                client::udp(client, to, b"a flow")?;
                let sender = Sender::open()?;
                sender.send(&error(Error::TooBig, Quoted::Udp, to, client)?, to.ip())?;
                sender.send(&error(Error::TooBig, Quoted::Tcp, to, connection.client()?)?, to.ip())?;
                std::thread::sleep(Duration::from_millis(50));
                connection.ask()?;
                client::udp(client, to, &[7; 1200])?;
                // The first ones may be what finds the path's true MTU.
                let mut tries = (0..3).map(|_| client::udp(client, to, &[7; 8000]));
                ensure!(tries.any(|answer| answer.is_ok()), "no answer in fragments");
                Ok(())
            })
            .with_context(|| format!("{way} by {node}"))?;
        }
        let known = |task: &Task| path_mtu(task.command("ip"), way.family.client());
        let believed = tasks.iter().map(known).collect::<Result<Vec<u32>>>()?;
        figure!("{way}: told of {TINY} bytes, tasks believe in {believed:?}, and all goes on");
        let floor = FLOORS[usize::from(way.family == Family::V6)];
        ensure!(believed.iter().all(|mtu| *mtu >= floor), "{believed:?} is less than {floor}");
    }
    Ok(())
}

/// What nodes send each other: an error about that tells the node's kernel of a tiny path to the other node.
pub(crate) fn forged_path_mtu_between_nodes_cuts_nobody_off(lab: &Lab) -> Result<()> {
    ways::create_web(lab, 1, &["--constraint", "node.hostname==n1"])?;
    let [n1, n2, ..] = lab.nodes.as_slice() else { return Ok(()) };
    as_client(|| {
        let sender = Sender::open()?;
        for (from, to) in [(n1, n2), (n2, n1)] {
            let (src, dst) = (SocketAddr::from((from.address, 50_000)), SocketAddr::from((to.address, 4789)));
            sender.send(&error(Error::TooBig, Quoted::Vxlan, src, dst)?, src.ip())?;
        }
        Ok(())
    })?;
    // The next hop is asked for once a second.
    std::thread::sleep(Duration::from_millis(1100));
    let of = |node: &Node, to: Ipv4Addr| path_mtu(node.command("ip"), to.into());
    let believed = [of(n1, n2.address)?, of(n2, n1.address)?];
    figure!("the kernels of {n1} and {n2} believe in paths of {believed:?} bytes to each other");
    ensure!(believed == [FLOORS[0]; 2], "the attack does not work on the kernel");
    for way in Way::all() {
        let to = way.to(n2);
        as_client(|| client::download(to, BULK_BYTES)).with_context(|| way.to_string())?;
        let client = SocketAddr::new(way.family.client(), 0);
        as_client(|| client::udp(client, to, &[7; 1000])).with_context(|| way.to_string())?;
        figure!("{way}: {BULK_BYTES} bytes by {n2} from a task on {n1}");
    }
    for node in [n1, n2] {
        lab::output(node.command("ip").args(["route", "flush", "cache"]))?;
    }
    Ok(())
}
