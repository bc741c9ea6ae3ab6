//! The tunnel as a stranger's relay, and hosts that point at each other.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use etherparse::PacketBuilder;
use mesh_agent::dataplane::Counter;
use mesh_agent::dataplane::pins::version_folder;
use mesh_common::addr::{Ip6, backend_mac};
use mesh_common::be::Be32;
use mesh_common::map::{Backend, Peer as PeerEntry};
use mesh_common::vxlan::{VNI_MESH_REPLY, VNI_MESH_REQUEST};
use serde_json::Value;

use crate::figure;
use crate::intruders::{backends, forwarded};
use crate::lab::{self, CLIENT, Lab, Node, as_client, as_host, command_in};
use crate::peers::Peer;
use crate::raw::{ACK, STRANGER, SYN, Sender, segment};
use crate::ways::{self, Back};

/// The third host, which a relay would send to: the switch's router.
const THIRD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 1), 4444);
/// Frames of a kind.
const FRAMES: usize = 200;
const PEERS: [(&str, Ipv4Addr); 2] =
    [("peer", Ipv4Addr::new(198, 18, 0, 201)), ("other", Ipv4Addr::new(198, 18, 0, 202))];
const PEER_VNI: u32 = 7777;
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0x77, 0x77];
/// A host that there is not, beyond hosts that point at each other.
const NOWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);

/// VXLAN from `source` to `to`, with a datagram in it from the client to the third host.
fn tunnelled(source: Ipv4Addr, to: Ipv4Addr, vni: u32, mac: [u8; 6]) -> Result<Vec<u8>> {
    let inner = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], mac);
    let inner = inner.ipv4(CLIENT.octets(), THIRD.ip().octets(), 60).udp(THIRD.port(), THIRD.port());
    let mut vxlan = vec![8, 0, 0, 0];
    vxlan.extend((vni << 8).to_be_bytes());
    inner.write(&mut vxlan, b"relayed")?;
    let mut packet = Vec::new();
    PacketBuilder::ipv4(source.octets(), to.octets(), 64).udp(50_000, 4789).write(&mut packet, &vxlan)?;
    Ok(packet)
}

/// Sends packets, each with the host that it goes by, and counts what comes to the third host.
fn relayed(packets: &[(Ipv4Addr, Vec<u8>)]) -> Result<usize> {
    let third = as_host("sw", || Ok(UdpSocket::bind(THIRD)?)).context("listening at the third host")?;
    third.set_read_timeout(Some(Duration::from_millis(300)))?;
    as_client(|| {
        let sender = Sender::open()?;
        packets.iter().try_for_each(|(by, packet)| sender.send(packet, *by).map(drop))
    })?;
    let mut came = 0;
    while third.recv(&mut [0; 64]).is_ok() {
        came += 1;
    }
    Ok(came)
}

pub(crate) fn tunnel_is_no_open_relay(lab: &Lab) -> Result<()> {
    {
        let (name, address) = PEERS[0];
        let peer = Peer::on_the_switch(name, address)?;
        peer.ip(&format!("link add tunnel type vxlan id {PEER_VNI} dstport 4789 local {address}"))?;
        let mac = PEER_MAC.map(|byte| format!("{byte:02x}")).join(":");
        peer.ip(&format!("link set tunnel address {mac} up"))?;
        peer.ip("address add 192.0.2.129/25 dev tunnel")?;
        let packet = (address, tunnelled(STRANGER, address, PEER_VNI, PEER_MAC)?);
        let came = relayed(&vec![packet; FRAMES])?;
        figure!("the kernel's VXLAN: of {FRAMES} frames from {STRANGER}, {came} came to a third host");
        ensure!(came > FRAMES / 2, "the attack does not work on a peer");
    }
    ways::create_web(lab, 3, &[])?;
    let mut packets = Vec::new();
    for node in &lab.nodes {
        let known = backends(node)?;
        let (vni, incarnation) =
            known.first().map(|known| (known.vni, known.incarnation)).context("no task")?;
        for (vni, mac) in [
            (VNI_MESH_REQUEST, backend_mac(incarnation)),
            (VNI_MESH_REPLY, backend_mac(incarnation)),
            (vni, backend_mac(incarnation)),
            (vni, [0xff; 6]),
            (PEER_VNI, PEER_MAC),
        ] {
            for source in [STRANGER, CLIENT] {
                let packet = (node.address, tunnelled(source, node.address, vni, mac)?);
                packets.extend(std::iter::repeat_n(packet, FRAMES / 5));
            }
        }
    }
    let refused = |lab: &Lab| -> Result<u64> {
        let of = |node: &Node| Ok(node.count(Counter::DropNotMember)? + node.count(Counter::DropUnknownVni)?);
        lab.nodes.iter().map(of).sum()
    };
    let before = refused(lab)?;
    let came = relayed(&packets)?;
    let counted = refused(lab)? - before;
    figure!("Shoal: of {} frames of five kinds {came} came there; {counted} counted as drops", packets.len());
    ensure!(came == 0, "{came} frames were relayed");
    ensure!(counted == packets.len() as u64, "{counted} of {} are counted", packets.len());
    Ok(())
}

/// Packets that a host's link has sent.
fn sent(host: &str) -> Result<u64> {
    let shown = lab::output(command_in(host, "ip").args(["-s", "-j", "link", "show", "dev", "eth0"]))?;
    let shown: Value = serde_json::from_str(&shown)?;
    shown[0]["stats64"]["tx"]["packets"].as_u64().context("no count of packets")
}

/// Two routers, each of which takes the other for the way.
fn peers_go_in_circles() -> Result<()> {
    let peers =
        PEERS.into_iter().map(|(name, at)| Peer::on_the_switch(name, at)).collect::<Result<Vec<_>>>()?;
    for (peer, (_, to)) in peers.iter().zip(PEERS.into_iter().rev()) {
        peer.ip(&format!("route add {NOWHERE} via {to}"))?;
    }
    let (packets, before) = (50, sent(PEERS[0].0)? + sent(PEERS[1].0)?);
    as_client(|| {
        let sender = Sender::open()?;
        for port in 0..packets {
            let source = SocketAddrV4::new(CLIENT, 30_000 + port);
            sender.send(&segment(SYN, source, SocketAddrV4::new(NOWHERE, 80)), PEERS[0].1)?;
        }
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let times = (sent(PEERS[0].0)? + sent(PEERS[1].0)? - before) / u64::from(packets);
    figure!("two routers that point at each other send a packet on {times} times");
    ensure!(times > 50, "the attack does not work on a peer");
    Ok(())
}

/// The slot that `node` has for `other`.
fn slot_of(node: &Node, other: &Node) -> Result<u32> {
    let pin = node.run_dir().join("bpf").join(version_folder()).join("shoal_peers");
    let peers: Array<MapData, PeerEntry> = Map::Array(MapData::from_pin(pin)?).try_into()?;
    let vtep = Ip6::from(std::net::IpAddr::from(other.address));
    let slot = (1..peers.len()).find(|slot| peers.get(slot, 0).is_ok_and(|peer| peer.vtep == vtep));
    slot.with_context(|| format!("{node} has no slot for {other}"))
}

/// Has `node` believe that all tasks are on `other`.
fn misplace(node: &Node, other: &Node) -> Result<usize> {
    let slot = slot_of(node, other)?;
    let pin = node.run_dir().join("bpf").join(version_folder()).join("shoal_backends4");
    let mut tasks: Array<MapData, Backend<Be32>> = Map::Array(MapData::from_pin(pin)?).try_into()?;
    let mut changed = 0;
    for index in 0..4096 {
        let backend = tasks.get(&index, 0)?;
        if backend.incarnation != 0 {
            tasks.set(index, Backend { peer: slot, ifindex: 0, ..backend }, 0)?;
            changed += 1;
        }
    }
    Ok(changed)
}

/// Each of two nodes takes the other for the one where all tasks are.
pub(crate) fn nodes_that_point_at_each_other_end_what_comes(lab: &Lab) -> Result<()> {
    peers_go_in_circles()?;
    ways::create_web(lab, 2, &[])?;
    let [n1, n2, ..] = lab.nodes.as_slice() else { return Ok(()) };
    // No agent is to put it right meanwhile; the lab's reset starts them again.
    for node in [n1, n2] {
        lab.xtask(&["kill", &node.name])?;
    }
    let changed = misplace(n1, n2)? + misplace(n2, n1)?;
    let before = forwarded(lab)?;
    let mut packets = 0;
    as_client(|| {
        let sender = Sender::open()?;
        for number in 0..500 {
            let to = SocketAddrV4::new(n1.address, Back::Tunnel.port());
            // Half of them open a connection, half belong to one that nobody has.
            let flags = if number % 2 == 0 { SYN } else { ACK };
            let packet = segment(flags, SocketAddrV4::new(CLIENT, 30_000 + number), to);
            packets += u64::from(sender.send(&packet, n1.address)?);
        }
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(300));
    let soon = forwarded(lab)? - before;
    std::thread::sleep(Duration::from_secs(1));
    let later = forwarded(lab)? - before - soon;
    figure!(
        "{changed} entries misplaced: {packets} packets sent on {soon} times in all, {later} times later"
    );
    ensure!(soon >= packets / 2, "the nodes do not point at each other");
    ensure!(soon <= packets * 64 && later == 0, "{soon} times, and {later} times later");
    Ok(())
}
