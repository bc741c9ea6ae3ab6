//! Frames for tasks of an encrypted network that go through no WireGuard, by whoever can send them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use etherparse::PacketBuilder;
use mesh_agent::dataplane::Counter;
use mesh_common::addr::{backend_mac, mac_of};
use mesh_common::be::Be32;
use mesh_common::vxlan::{VNI_MESH_REPLY, VNI_MESH_REQUEST};
use serde_json::Value;

use crate::engine::Task;
use crate::figure;
use crate::intruders::backends;
use crate::lab::{self, CLIENT, CLIENT6, Node, as_client, until, within};
use crate::mesh::PORT;
use crate::raw::Sender;
use crate::ways::Family;
use crate::wire::{Wire, holds};

/// Frames of a kind.
pub(crate) const FRAMES: u64 = 50;
/// The network's IPv6 subnet: addresses in it end in the task's IPv4 address.
const PREFIX6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x95, 0, 0, 0, 0, 0, 0);
/// What forged frames carry.
const MARK: &[u8] = b"shoal: in cleartext";
/// VXLAN's port.
const VXLAN: u16 = 4789;
/// How long a node may take until its maps have a task that runs.
const MAPPED: std::time::Duration = std::time::Duration::from_secs(5);
/// How long frames may be on their way.
const LATER: std::time::Duration = std::time::Duration::from_millis(200);

/// A task that frames are to reach, and whom they claim to be from.
pub(crate) struct Forgery {
    pub(crate) victim: Task,
    /// A task of another node, or nobody.
    source: Ipv4Addr,
    /// The network's identifier.
    vni: u32,
    /// The victim's incarnation.
    incarnation: u32,
}

impl Forgery {
    pub(crate) fn new(victim: &Task, source: Ipv4Addr) -> Result<Self> {
        let to = Be32::from(victim.address()?);
        // A task runs a moment before its node's maps have it.
        let known = until("the victim is a backend on its node", MAPPED, || {
            Ok(backends(&victim.node)?.into_iter().find(|backend| backend.addr == to))
        })?;
        Ok(Self { victim: victim.clone(), source, vni: known.vni, incarnation: known.incarnation })
    }

    /// VXLAN with a frame to the victim, as nodes send each other.
    pub(crate) fn vxlan(&self, family: Family) -> Result<Vec<u8>> {
        let to = self.victim.address()?;
        let builder =
            PacketBuilder::ethernet2(mac_of(Be32::from(self.source)), backend_mac(self.incarnation));
        let builder = match family {
            Family::V4 => builder.ipv4(self.source.octets(), to.octets(), 64),
            Family::V6 => builder.ipv6(v6(self.source).octets(), v6(to).octets(), 64),
        };
        let mut carried = vxlan_header(self.vni);
        builder.udp(7_777, 7_777).write(&mut carried, MARK)?;
        Ok(carried)
    }

    /// VXLAN with a client's request to the victim, which it sent to `by`.
    pub(crate) fn request(&self, by: &Node, family: Family) -> Result<Vec<u8>> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 0], backend_mac(self.incarnation));
        let builder = match family {
            Family::V4 => builder.ipv4(CLIENT.octets(), by.address.octets(), 60),
            Family::V6 => builder.ipv6(CLIENT6.octets(), by.address6.octets(), 60),
        };
        let mut carried = vxlan_header(VNI_MESH_REQUEST);
        builder.tcp(40_000, PORT, 1, 65_000).syn().write(&mut carried, MARK)?;
        Ok(carried)
    }
}

/// Such a frame with all that VXLAN's header can say: any flags, in any of some networks, any reserved bit of the last byte.
pub(crate) fn every_header(forgery: &Forgery) -> Result<Vec<Vec<u8>>> {
    let carried = forgery.vxlan(Family::V4)?;
    let (_, frame) = carried.split_at(8);
    let mut all = Vec::new();
    for vni in [forgery.vni, forgery.vni + 1, 0, VNI_MESH_REQUEST, VNI_MESH_REPLY] {
        for flags in 0..=u8::MAX {
            for reserved in 0..8 {
                let [vni @ .., _] = (vni << 8).to_be_bytes();
                all.push([&[flags, 0, 0, 0], &vni[..], &[1 << reserved], frame].concat());
            }
        }
    }
    Ok(all)
}

fn vxlan_header(vni: u32) -> Vec<u8> {
    [[8, 0, 0, 0], (vni << 8).to_be_bytes()].concat()
}

fn v6(v4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(PREFIX6.to_bits() | u128::from(v4.to_bits()))
}

/// An IP packet with a datagram to VXLAN's port.
pub(crate) fn datagram(source: impl Into<IpAddr>, to: impl Into<IpAddr>, payload: &[u8]) -> Result<Vec<u8>> {
    let builder = match (source.into(), to.into()) {
        (IpAddr::V4(source), IpAddr::V4(to)) => PacketBuilder::ipv4(source.octets(), to.octets(), 64),
        (IpAddr::V6(source), IpAddr::V6(to)) => PacketBuilder::ipv6(source.octets(), to.octets(), 64),
        (source, to) => bail!("two families: {source}, {to}"),
    };
    let mut packet = Vec::new();
    builder.udp(50_000, VXLAN).write(&mut packet, payload)?;
    Ok(packet)
}

/// An IPv4 packet without options in two fragments, the first of which ends with VXLAN's header.
pub(crate) fn fragments(packet: &[u8], id: u16) -> [Vec<u8>; 2] {
    let (header, data) = packet.split_at(20);
    let (first, rest) = data.split_at(16);
    // "More fragments", and then the offset in units of 8 bytes.
    [([0x20, 0], first), ([0, 2], rest)].map(|(place, part)| {
        let mut fragment = [header, part].concat();
        fragment[4..6].copy_from_slice(&id.to_be_bytes());
        fragment[6..8].copy_from_slice(&place);
        fragment
    })
}

/// Has the client send packets by a node, whatever addresses are in them.
pub(crate) fn from_underlay(packets: &[Vec<u8>], by: impl Into<IpAddr>) -> Result<()> {
    let by = by.into();
    as_client(|| {
        let sender = Sender::open()?;
        packets.iter().try_for_each(|packet| sender.send(packet, by).map(drop))
    })
}

/// Has the client send an IPv4 packet to a node [`FRAMES`] times, in a VLAN's tag that says nothing but a priority.
pub(crate) fn tagged(packet: &[u8], node: &Node) -> Result<impl Fn() -> Result<()> + use<>> {
    let shown = lab::output(node.command("ip").args(["-json", "link", "show", "dev", "eth0"]))?;
    let shown: Value = serde_json::from_str(&shown)?;
    let mac = shown[0]["address"].as_str().context("a link without an address")?;
    let mac: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    let frame = [&mac[..], &[2, 0, 0, 0, 0, 9], &[0x81, 0, 0xe0, 0, 8, 0], packet].concat();
    Ok(move || {
        let wire = Wire::open(&PathBuf::from("/run/netns/shoal-client"), CLIENT)?;
        (0..FRAMES).try_for_each(|_| wire.send(&frame))
    })
}

/// Sends a payload [`FRAMES`] times to VXLAN's port, by an ordinary socket in a network namespace that is bound to `from`;
/// what the kernel refuses to send is not sent.
pub(crate) fn by_socket(namespace: &str, from: IpAddr, to: IpAddr, payload: &[u8]) -> Result<()> {
    within(&PathBuf::from(namespace), || {
        let socket = UdpSocket::bind((from, 0))?;
        for _ in 0..FRAMES {
            let _ = socket.send_to(payload, SocketAddr::new(to, VXLAN));
        }
        Ok(())
    })
}

/// What counts the frames of an attack.
pub(crate) enum Count<'a> {
    /// The programs of this node.
    Of(&'a Node, Counter),
    /// The netfilter rule that keeps the processes of this node out of WireGuard.
    ByRule(&'a Node),
}

impl Count<'_> {
    fn now(&self) -> Result<u64> {
        match self {
            Self::Of(node, counter) => node.count(*counter),
            Self::ByRule(node) => {
                let mut nft = node.command("nft");
                let listed = lab::output(nft.args(["-j", "list", "chain", "ip6", "shoal", "wireguard"]))?;
                let listed: Value = serde_json::from_str(&listed)?;
                let rules = listed["nftables"].as_array().context("no rules")?;
                let parts = rules.iter().filter_map(|rule| rule["rule"]["expr"].as_array()).flatten();
                Ok(parts.filter_map(|part| part["counter"]["packets"].as_u64()).sum())
            }
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Of(_, counter) => counter.name(),
            Self::ByRule(_) => "by netfilter",
        }
    }
}

/// Who sends forged frames, what counts them, and how they are sent.
pub(crate) struct Attack<'a> {
    who: String,
    count: Count<'a>,
    send: Box<dyn Fn() -> Result<()> + 'a>,
}

impl<'a> Attack<'a> {
    pub(crate) fn new(who: &str, count: Count<'a>, send: impl Fn() -> Result<()> + 'a) -> Self {
        Self { who: who.to_owned(), count, send: Box::new(send) }
    }

    /// Fails if the victim hears anything, or not every frame is counted.
    pub(crate) fn run(&self, victim: &Task) -> Result<()> {
        let Self { who, count, send } = self;
        let before = count.now()?;
        let came = heard(victim, send)?;
        let grown = count.now()? - before;
        figure!("{who}: {came} of {FRAMES} reached a task, {grown} counted: {}", count.name());
        ensure!(came == 0, "{who}: {came} frames came");
        ensure!(grown == FRAMES, "{who}: {grown} of {FRAMES} are counted");
        Ok(())
    }
}

/// How many frames of an attack come to the victim, which listens to all of its interfaces.
pub(crate) fn heard(victim: &Task, attack: impl FnOnce() -> Result<()>) -> Result<u64> {
    let namespace = PathBuf::from(format!("/proc/{}/ns/net", victim.pid));
    let wires = victim.addresses.iter().map(|addr| Wire::open(&namespace, *addr));
    let wires = wires.collect::<Result<Vec<_>>>()?;
    attack()?;
    std::thread::sleep(LATER);
    let heard = wires.iter().map(|wire| wire.heard(|frame| holds(frame, MARK))).sum::<Result<usize>>()?;
    Ok(heard as u64)
}
