//! The packet library on byte vectors, called as the programs call it.

use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;
use mesh_common::vxlan::VNI_MESH_REQUEST;
use mesh_datapath::encap::{decapsulate, encapsulate, fits, fits_unpacked, mesh_reply, reply_within};
use mesh_datapath::family::Family as _;
use mesh_datapath::header::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use mesh_datapath::overlay::Arrival;
use mesh_datapath::packet::{Fault, Field, Packet, Resize, Reuse, Rewrite, Store};
use mesh_datapath::parse::{Fragment, Parsed, parse_ethernet};
use mesh_datapath::tables::{AddrTables, Tables as _};
use mesh_datapath::translation::Work;
use mesh_datapath::uplink::{Decision, Remote, decide};
use mesh_datapath::verdict::{Action, Verdict};
use mesh_datapath::{answer, arp, checksum, host, mesh, neighbor, overlay, task, translation, uplink};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::entries;
use super::family::Side;
use super::tables::HostTables;
use super::world::{CLIENT_ROUTE, LOOPBACK, World};
use super::{End, Hook, Outcome};

/// What is where nobody has stored anything.
const UNDEFINED: u8 = 0xaa;

/// A packet in a vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes {
    content: Vec<u8>,
    /// See [`Packet::segment_len`].
    pub segment_len: u32,
    /// Refuses every store, as the kernel may.
    pub read_only: bool,
}

impl Bytes {
    /// A packet that can be written.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { content: bytes, segment_len: 0, read_only: false }
    }

    /// The packet's bytes.
    pub fn into_inner(self) -> Vec<u8> {
        self.content
    }

    fn patch(&mut self, offset: usize, change: impl FnOnce(Be16) -> Be16) -> Result<(), Fault> {
        let checksum = self.load::<Be16>(offset).ok_or(Fault)?;
        self.store(offset, &change(checksum))
    }

    fn patch6(&mut self, offset: usize, from: &Ip6, to: &Ip6, udp: bool) -> Result<(), Fault> {
        for (from, to) in from.0.iter().zip(&to.0) {
            self.patch(offset, |old| checksum::patch_l4(old, from.raw(), to.raw(), udp))?;
        }
        Ok(())
    }
}

impl Packet for Bytes {
    fn len(&self) -> u32 {
        self.content.len() as u32
    }

    fn load<T: FromBytes + Immutable + KnownLayout + Copy>(&self, offset: usize) -> Option<T> {
        T::read_from_prefix(self.content.get(offset..)?).ok().map(|(value, _)| value)
    }

    fn segment_len(&self) -> u32 {
        self.segment_len
    }
}

impl Store for Bytes {
    fn store<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Result<(), Fault> {
        if self.read_only {
            return Err(Fault);
        }
        let to = self.content.get_mut(offset..offset + size_of::<T>()).ok_or(Fault)?;
        to.copy_from_slice(value.as_bytes());
        Ok(())
    }
}

impl Rewrite for Bytes {
    fn patch_ip_checksum(&mut self, offset: usize, from: u32, to: u32) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch(old, from, to))
    }

    fn patch_l4_checksum(
        &mut self,
        offset: usize,
        from: u32,
        to: u32,
        _: Field,
        udp: bool,
    ) -> Result<(), Fault> {
        self.patch(offset, |old| checksum::patch_l4(old, from, to, udp))
    }

    fn patch_l4_address6(&mut self, offset: usize, from: &Ip6, to: &Ip6, udp: bool) -> Result<(), Fault> {
        self.patch6(offset, from, to, udp)
    }

    fn patch_l4_payload6(&mut self, offset: usize, from: &Ip6, to: &Ip6) -> Result<(), Fault> {
        self.patch6(offset, from, to, false)
    }
}

impl Reuse for Bytes {
    fn set_len(&mut self, len: u32) -> Result<(), Fault> {
        self.content.resize(len as usize, UNDEFINED);
        self.segment_len = 0;
        Ok(())
    }

    fn is_checksum_deferred(&mut self, _: usize) -> bool {
        false
    }

    fn insert_header(&mut self, bytes: u32) -> Result<(), Fault> {
        self.content.splice(ETHERNET..ETHERNET, std::iter::repeat_n(UNDEFINED, bytes as usize));
        Ok(())
    }
}

impl Resize for Bytes {
    fn grow(&mut self, bytes: u32) -> Result<(), Fault> {
        self.content.splice(..0, std::iter::repeat_n(UNDEFINED, bytes as usize));
        Ok(())
    }

    fn shrink(&mut self, bytes: u32) -> Result<(), Fault> {
        self.content.drain(..bytes as usize);
        Ok(())
    }
}

/// Bytes of the Ethernet header.
const ETHERNET: usize = 14;

/// What the library makes of a packet.
pub fn run(hook: Hook, world: &World, packet: Bytes) -> Outcome {
    let tables = HostTables::new(world);
    let mut packet = packet;
    let (end, counter, made) = if hook == Hook::UplinkXdp {
        let (end, counter) = xdp(&mut packet, &tables);
        (end, counter, None)
    } else {
        let verdict = tc(hook, world, &mut packet, &tables);
        (End::Tc(verdict.action()), Some(verdict.counter), verdict.made())
    };
    let changes = entries::changes(&world.known, &tables.entries());
    Outcome { end, output: packet.into_inner(), counter, made, changes }
}

/// What a TC program does before it carries a verdict out: each hook's function by the frame's type.
fn tc(hook: Hook, world: &World, packet: &mut Bytes, tables: &HostTables) -> Verdict {
    let ethertype = parse_ethernet(packet).map(|ethernet| ethernet.ethertype);
    let otherwise = match ethertype {
        _ if matches!(hook, Hook::Uplink | Hook::UplinkXdp) => Verdict::PASS,
        Ok(_) => Verdict::drop(Counter::DropProtocol),
        Err(_) => Verdict::drop(Counter::DropMalformed),
    };
    match (hook, ethertype) {
        (Hook::Task(ifindex), _) => match task::classify(packet, tables, ifindex) {
            task::Sent::Ipv4 => ip::<Be32>(hook, world, packet, tables),
            task::Sent::Ipv6 => task::answer_discovery(packet, tables, ifindex)
                .unwrap_or_else(|| ip::<Ip6>(hook, world, packet, tables)),
            task::Sent::Arp => task::answer_arp(packet, tables, ifindex),
            task::Sent::Refused(reason) => Verdict::drop(reason),
        },
        (_, Ok(ETHERTYPE_IPV4)) => ip::<Be32>(hook, world, packet, tables),
        (Hook::Host, Ok(ETHERTYPE_IPV6)) => {
            host_discovery(packet, tables).unwrap_or_else(|| ip::<Ip6>(hook, world, packet, tables))
        }
        (_, Ok(ETHERTYPE_IPV6)) => ip::<Ip6>(hook, world, packet, tables),
        (Hook::Host, Ok(ETHERTYPE_ARP)) => arp::answer(packet, |addr| is_known_to_host(tables, &addr)),
        _ => otherwise,
    }
}

/// Reads an IP packet, decides on it, and does that.
fn ip<A: Side>(hook: Hook, world: &World, packet: &mut Bytes, tables: &HostTables) -> Verdict {
    let (vni, otherwise) = match hook {
        Hook::Uplink | Hook::UplinkXdp => (VNI_MESH_REQUEST, Verdict::PASS),
        Hook::Host => (VNI_MESH_REQUEST, Verdict::drop(Counter::DropMalformed)),
        Hook::Task(ifindex) => {
            let iface = AddrTables::<Be32>::iface(tables, ifindex);
            (iface.map_or(0, |iface| iface.vni), Verdict::drop(Counter::DropMalformed))
        }
        Hook::Overlay { vni, .. } => (vni, Verdict::drop(Counter::DropMalformed)),
    };
    let Ok(parsed) = A::parse(packet) else { return otherwise };
    let mut work = Work::new(parsed);
    if work.read(packet, tables, vni, otherwise).is_ok() {
        match hook {
            Hook::Uplink | Hook::UplinkXdp => uplink::from_uplink(packet, tables, &mut work),
            Hook::Host => host::from_host(packet, tables, &mut work),
            Hook::Task(ifindex) => task::from_task(packet, tables, ifindex, &mut work),
            Hook::Overlay { vni, from } => {
                let arrival = Arrival { vni, vtep: world.vtep(from) };
                if vni == VNI_MESH_REQUEST {
                    overlay::from_ingress(packet, tables, &arrival, &mut work);
                } else {
                    overlay::from_backend(packet, tables, &arrival, &mut work);
                }
            }
        }
    }
    let mut verdict = translation::apply(packet, &work);
    if let (Action::Dial, Hook::Task(ifindex)) = (verdict.action(), hook) {
        mesh::dial(packet, tables, ifindex, &mut work);
        verdict = translation::apply(packet, &work);
    }
    match verdict.action() {
        Action::Answer(answer) => answer::make::<A, _>(packet, tables, verdict.counter, answer),
        _ => verdict,
    }
}

/// Answers the host's neighbour discovery; `None` for any other packet.
fn host_discovery(packet: &mut Bytes, tables: &HostTables) -> Option<Verdict> {
    let parsed = Ip6::parse(packet).ok()?;
    let concerns = neighbor::concerns(packet, &parsed);
    concerns.then(|| neighbor::answer(packet, &parsed, Ip6::default(), |addr| is_known_to_host(tables, addr)))
}

/// Whether the host reaches an address by `shoal0`.
fn is_known_to_host<A: Side>(tables: &HostTables, addr: &A) -> bool {
    tables.alias(addr).is_some() || tables.config().is_some_and(|config| A::host(config).mesh == *addr)
}

/// What the XDP program does with a frame.
fn xdp(packet: &mut Bytes, tables: &HostTables) -> (End, Option<Counter>) {
    match parse_ethernet(packet).map(|ethernet| ethernet.ethertype) {
        Ok(ETHERTYPE_IPV4) => xdp_of::<Be32>(packet, tables),
        Ok(ETHERTYPE_IPV6) => xdp_of::<Ip6>(packet, tables),
        _ => (End::XdpPass, None),
    }
}

fn xdp_of<A: Side>(packet: &mut Bytes, tables: &HostTables) -> (End, Option<Counter>) {
    let left = (End::XdpPass, None);
    let (Some(config), Ok(parsed)) = (tables.config(), A::parse(packet)) else { return left };
    if parsed.fragment != Fragment::Whole {
        return left;
    }
    let Some(tuple) = parsed.tuple() else { return left };
    match decide::<A>(tables, config, &parsed, &tuple) {
        Decision::Remote(remote) => xdp_forward::<A>(packet, tables, &remote),
        Decision::Tunnel => xdp_reply(packet, tables, &parsed),
        Decision::Refuse(reason @ (Counter::DropNotMember | Counter::DropSourceRefused)) => {
            (End::XdpDrop, Some(reason))
        }
        Decision::Pass | Decision::Local(_) | Decision::Search(_) | Decision::Refuse(_) => left,
    }
}

fn xdp_forward<A: Side>(packet: &mut Bytes, tables: &HostTables, remote: &Remote) -> (End, Option<Counter>) {
    let (Some(config), Some(peer)) = (tables.config(), tables.peer(remote.peer)) else {
        return (End::XdpPass, None);
    };
    let family = if peer.vtep.to_mapped().is_some() { 4 } else { 6 };
    if peer.expires_ns == 0 || !fits(packet.len(), peer.mtu, family) {
        return (End::XdpPass, None);
    }
    let end = if peer.ifindex == LOOPBACK { End::XdpTx } else { End::XdpRedirect };
    match encapsulate::<A, _>(packet, config, peer, remote) {
        Err(Fault) => (End::XdpDrop, Some(Counter::DropRewriteFailed)),
        Ok(()) => (end, Some(Counter::MeshForwarded)),
    }
}

fn xdp_reply<O: Side>(packet: &mut Bytes, tables: &HostTables, outer: &Parsed<O>) -> (End, Option<Counter>) {
    match reply_within(packet, outer) {
        Some((ETHERTYPE_IPV4, around)) => xdp_reply_of::<Be32>(packet, tables, around),
        Some((ETHERTYPE_IPV6, around)) => xdp_reply_of::<Ip6>(packet, tables, around),
        _ => (End::XdpPass, None),
    }
}

/// What the XDP program does with a mesh reply; the way to the client is `world::CLIENT_ROUTE`.
fn xdp_reply_of<A: Side>(packet: &mut Bytes, tables: &HostTables, around: usize) -> (End, Option<Counter>) {
    let reply = tables.config().and_then(|config| mesh_reply::<A>(packet, tables, config, around));
    if reply.is_none() || !fits_unpacked(packet.len(), around, CLIENT_ROUTE.mtu) {
        return (End::XdpPass, None);
    }
    match decapsulate::<A, _>(packet, around, CLIENT_ROUTE.next_hop, CLIENT_ROUTE.source) {
        Err(Fault) => (End::XdpDrop, Some(Counter::DropRewriteFailed)),
        Ok(()) => (End::XdpRedirect, Some(Counter::MeshReplied)),
    }
}
