//! A whole hook in one call, for user space: what the programs in the kernel do as rows of functions.
//!
//! `bpf/src/hook.rs` and `bpf/src/xdp.rs` are the same steps on contexts; the packet fixtures hold the two together.

use mesh_common::addr::{Address as _, Ip6};
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::{Config, Peer};
use mesh_common::vxlan::VNI_MESH_REQUEST;

use crate::encap::{
    Inner, MeshReply, decapsulate, encapsulate, fits, fits_unpacked, mesh_reply, reply_within,
};
use crate::family::Family;
use crate::header::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_NACK};
use crate::overlay::{Arrival, from_backend, from_ingress};
use crate::packet::{Fault, Resize, Reuse};
use crate::parse::{Fragment, Parsed, parse_ethernet};
use crate::refuse;
use crate::tables::{AddrTables, Tables};
use crate::task::Sent;
use crate::translation::{self, Work};
use crate::uplink::{Decision, Remote, claims_wireguard, decide, from_uplink};
use crate::verdict::{Action, Verdict};
use crate::{answer, arp, host, mesh, nack, neighbor, task};

/// Where a packet comes in, in TC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// On an uplink.
    Uplink,
    /// On the host side of a task's veth, which has this index.
    Task(u32),
    /// On the VXLAN device.
    Overlay(Arrival),
    /// On `shoal0p`.
    Host,
}

/// The tables of both families.
pub trait BothTables: AddrTables<Be32> + AddrTables<Ip6> {}

impl<T: AddrTables<Be32> + AddrTables<Ip6>> BothTables for T {}

/// What a TC program does with a packet before it carries the verdict out. `dialled` is told of a published port that a
/// task dials by an address of its own node. Who has an address is reached by `way` of it, if that is known.
pub fn run<P: Reuse>(
    hook: Hook,
    packet: &mut P,
    tables: &impl BothTables,
    way: impl Fn(Ip6) -> Option<Way>,
    dialled: impl Fn(),
) -> Verdict {
    let ethertype = parse_ethernet(packet).map(|ethernet| ethernet.ethertype);
    match (hook, ethertype) {
        (Hook::Task(ifindex), _) => match task::classify(packet, tables, ifindex) {
            Sent::Ipv4 => ip::<Be32, P>(hook, packet, tables, way, dialled),
            Sent::Ipv6 => match task::answer_discovery(packet, tables, ifindex) {
                Some(answered) => answered,
                None => ip::<Ip6, P>(hook, packet, tables, way, dialled),
            },
            Sent::Arp => task::answer_arp(packet, tables, ifindex),
            Sent::Refused(reason) => Verdict::drop(reason),
        },
        (_, Ok(ETHERTYPE_IPV4)) => ip::<Be32, P>(hook, packet, tables, way, dialled),
        (Hook::Uplink, Ok(ETHERTYPE_IPV6)) if claims_wireguard(packet) => {
            Verdict::drop(Counter::DropCleartext)
        }
        (_, Ok(ETHERTYPE_IPV6)) => match host_discovery(hook, packet, tables) {
            Some(answered) => answered,
            None => ip::<Ip6, P>(hook, packet, tables, way, dialled),
        },
        (Hook::Host, Ok(ETHERTYPE_ARP)) => arp::answer(packet, |addr| is_known_to_host(tables, &addr)),
        (Hook::Uplink, _) => Verdict::PASS,
        (Hook::Overlay(arrival), Ok(ETHERTYPE_NACK)) => match nack::hear(packet, tables, &arrival) {
            Ok(_) => Verdict::drop(Counter::NackHeard),
            Err(reason) => Verdict::drop(reason),
        },
        (Hook::Host | Hook::Overlay(_), Ok(_)) => Verdict::drop(Counter::DropProtocol),
        (Hook::Host | Hook::Overlay(_), Err(_)) => Verdict::drop(Counter::DropMalformed),
    }
}

/// Reads an IP packet, decides on it, and writes what was planned.
fn ip<A: refuse::Answer, P: Reuse>(
    hook: Hook,
    packet: &mut P,
    tables: &impl AddrTables<A>,
    way: impl Fn(Ip6) -> Option<Way>,
    dialled: impl Fn(),
) -> Verdict {
    let (vni, otherwise) = match hook {
        Hook::Uplink => (VNI_MESH_REQUEST, Verdict::PASS),
        Hook::Host => (VNI_MESH_REQUEST, Verdict::drop(Counter::DropMalformed)),
        Hook::Task(ifindex) => {
            (tables.iface(ifindex).map_or(0, |iface| iface.vni), Verdict::drop(Counter::DropMalformed))
        }
        Hook::Overlay(arrival) => (arrival.vni, Verdict::drop(Counter::DropMalformed)),
    };
    let Ok(parsed) = A::parse(packet) else { return otherwise };
    let mut work = Work::new(parsed);
    if work.read(packet, tables, vni, otherwise).is_ok() {
        match hook {
            Hook::Uplink => from_uplink(packet, tables, &mut work),
            Hook::Host => host::from_host(packet, tables, &mut work),
            Hook::Task(ifindex) => task::from_task(packet, tables, ifindex, &mut work),
            Hook::Overlay(arrival) if vni == VNI_MESH_REQUEST => {
                from_ingress(packet, tables, &arrival, &mut work);
            }
            Hook::Overlay(arrival) => from_backend(packet, tables, &arrival, &mut work),
        }
    }
    let mut verdict = translation::apply(packet, &work);
    if let (Action::Dial, Hook::Task(ifindex)) = (verdict.action(), hook) {
        dialled();
        mesh::dial(packet, tables, ifindex, &mut work);
        verdict = translation::apply(packet, &work);
    }
    if verdict.action() == Action::Route
        && let Some(Way { ifindex, mtu, link_mtu, .. }) = way(work.plan.translation.dst.to_ip6())
    {
        let instead = mesh::too_big_beyond(packet, &work.parsed, (ifindex, mtu), || Some(link_mtu.into()));
        verdict = instead.unwrap_or(verdict);
    }
    match verdict.action() {
        Action::Answer(answer) => answer::make::<A, _>(packet, tables, verdict.counter, answer),
        _ => verdict,
    }
}

/// Answers the host's neighbour discovery; `None` for any other packet.
fn host_discovery<P: Reuse>(hook: Hook, packet: &mut P, tables: &impl AddrTables<Ip6>) -> Option<Verdict> {
    if hook != Hook::Host {
        return None;
    }
    let parsed = Ip6::parse(packet).ok()?;
    if !neighbor::concerns(packet, &parsed) {
        return None;
    }
    Some(neighbor::answer(packet, &parsed, Ip6::default(), |addr| is_known_to_host(tables, addr)))
}

/// Whether the host reaches an address by `shoal0`: a task's alias, or where published ports are dialled locally.
#[inline(always)]
pub fn is_known_to_host<A: Family>(tables: &impl AddrTables<A>, addr: &A) -> bool {
    tables.alias(addr).is_some() || tables.config().is_some_and(|config| A::host(config).mesh == *addr)
}

/// What the XDP program does with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpEnd {
    /// Leaves it to the stack, and so to TC.
    Left,
    /// Drops it.
    Dropped(Counter),
    /// Sends it out of the interface with this index.
    Sent {
        /// The interface.
        ifindex: u32,
        /// What counts it.
        counter: Counter,
    },
}

/// The way to an address, by the host's routes and neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The interface.
    pub ifindex: u32,
    /// Ethernet address of the next hop.
    pub next_hop: [u8; 6],
    /// Ethernet address of the interface.
    pub source: [u8; 6],
    /// MTU, bytes.
    pub mtu: u16,
    /// MTU of the interface, bytes: at least that of the way.
    pub link_mtu: u16,
}

/// What the XDP program does with a frame. Who has an address is reached by `way` of it, if there is one.
pub fn run_xdp<P: Resize>(
    packet: &mut P,
    tables: &impl BothTables,
    way: impl Fn(Ip6) -> Option<Way>,
) -> XdpEnd {
    match parse_ethernet(packet).map(|ethernet| ethernet.ethertype) {
        Ok(ETHERTYPE_IPV4) => xdp::<Be32, P>(packet, tables, way),
        Ok(ETHERTYPE_IPV6) => xdp::<Ip6, P>(packet, tables, way),
        _ => XdpEnd::Left,
    }
}

fn xdp<A: Inner, P: Resize>(
    packet: &mut P,
    tables: &(impl BothTables + AddrTables<A>),
    way: impl Fn(Ip6) -> Option<Way>,
) -> XdpEnd {
    let Some(config) = Tables::config(tables) else { return XdpEnd::Left };
    let Ok(parsed) = A::parse(packet) else { return XdpEnd::Left };
    // Fragments are for TC, which knows their ports.
    if parsed.fragment != Fragment::Whole {
        return XdpEnd::Left;
    }
    let Some(tuple) = parsed.tuple() else { return XdpEnd::Left };
    if parsed.src.is_wireguard() {
        return XdpEnd::Left;
    }
    match decide::<A>(tables, config, &parsed, &tuple) {
        Decision::Remote(remote) => xdp_forward::<A, P>(packet, config, tables.peer(remote.peer), &remote),
        Decision::Tunnel => xdp_reply(packet, tables, config, &parsed, way),
        Decision::Refuse(reason) if drops_in_xdp(reason) => XdpEnd::Dropped(reason),
        Decision::Pass | Decision::Local(_) | Decision::Search(_) | Decision::Refuse(_) => XdpEnd::Left,
    }
}

/// Whether XDP drops what is refused for a reason; the rest is answered, which TC does.
#[inline(always)]
pub const fn drops_in_xdp(reason: Counter) -> bool {
    matches!(reason, Counter::DropNotMember | Counter::DropSourceRefused)
}

fn xdp_forward<A: Inner, P: Resize>(
    packet: &mut P,
    config: &Config,
    peer: Option<&Peer>,
    remote: &Remote,
) -> XdpEnd {
    let Some(peer) = peer else { return XdpEnd::Left };
    let plain = !peer.vtep.is_wireguard();
    if peer.expires_ns == 0 || !plain || !fits(packet.len(), peer.mtu, config.vtep.family()) {
        return XdpEnd::Left;
    }
    match encapsulate::<A, _>(packet, config, peer, remote) {
        Err(Fault) => XdpEnd::Dropped(Counter::DropRewriteFailed),
        Ok(()) => XdpEnd::Sent { ifindex: peer.ifindex, counter: Counter::MeshForwarded },
    }
}

fn xdp_reply<O: Inner, P: Resize>(
    packet: &mut P,
    tables: &impl BothTables,
    config: &Config,
    outer: &Parsed<O>,
    way: impl Fn(Ip6) -> Option<Way>,
) -> XdpEnd {
    match reply_within(packet, outer) {
        Some((ETHERTYPE_IPV4, around)) => {
            xdp_reply_of(packet, mesh_reply::<Be32>(packet, tables, config, around), around, way)
        }
        Some((ETHERTYPE_IPV6, around)) => {
            xdp_reply_of(packet, mesh_reply::<Ip6>(packet, tables, config, around), around, way)
        }
        _ => XdpEnd::Left,
    }
}

fn xdp_reply_of<A: Inner, P: Resize>(
    packet: &mut P,
    reply: Option<MeshReply<A>>,
    around: usize,
    way: impl Fn(Ip6) -> Option<Way>,
) -> XdpEnd {
    let way = reply.and_then(|reply| way(reply.dst.to_ip6()));
    let Some(way) = way.filter(|way| fits_unpacked(packet.len(), around, way.mtu)) else {
        return XdpEnd::Left;
    };
    match decapsulate::<A, _>(packet, around, way.next_hop, way.source) {
        Err(Fault) => XdpEnd::Dropped(Counter::DropRewriteFailed),
        Ok(()) => XdpEnd::Sent { ifindex: way.ifindex, counter: Counter::MeshReplied },
    }
}
