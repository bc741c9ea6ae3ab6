//! What a task sends: to endpoints and VIPs of its network, to clients of a published port, to the outside.

use mesh_common::addr::{Address, Ip6, backend_mac, mac_of};
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::hash::Tuple;
use mesh_common::map::{
    AddrKey, Config, Endpoint, FLOW_DIRECT, FLOW_TEACH, Flow, FlowKey, FlowKind, IFACE_INTERNAL, Iface,
    PROTO_UDP, PortKey,
};
use mesh_common::vxlan::VNI_MESH_REPLY;

use crate::answer::{Answer, Back};
use crate::arp;
use crate::balance::{self, Chosen};
use crate::family::Family;
use crate::flow::{self, Found};
use crate::fragment;
use crate::header::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet};
use crate::host::to_host;
use crate::mesh;
use crate::neighbor;
use crate::packet::{Packet, Rewrite};
use crate::parse::{Fragment, Parsed, parse_ethernet};
use crate::related::Quote;
use crate::tables::AddrTables;
use crate::translation::{Frame, Parts, Plan, Translation, Work};
use crate::verdict::{Action, Verdict};

/// What kind of frame a task sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sent {
    /// IPv4: for [`from_task`].
    Ipv4,
    /// IPv6: for [`answer_discovery`], then [`from_task`].
    Ipv6,
    /// ARP: for [`answer_arp`].
    Arp,
    /// To be dropped.
    Refused(Counter),
}

/// Tells what kind of frame a task sent, once it is sure that it is this task's.
#[inline(always)]
pub fn classify<P: Rewrite>(packet: &P, tables: &impl AddrTables<Be32>, ifindex: u32) -> Sent {
    if tables.config().is_none() {
        return Sent::Refused(Counter::DropNotReady);
    }
    let Some(iface) = tables.iface(ifindex) else {
        return Sent::Refused(Counter::DropUnknownInterface);
    };
    let Ok(ethernet) = parse_ethernet(packet) else {
        return Sent::Refused(Counter::DropMalformed);
    };
    if ethernet.src != mac_of(iface.addr) {
        return Sent::Refused(Counter::DropSpoofedMac);
    }
    match ethernet.ethertype {
        ETHERTYPE_IPV4 => Sent::Ipv4,
        ETHERTYPE_IPV6 => Sent::Ipv6,
        ETHERTYPE_ARP => Sent::Arp,
        _ => Sent::Refused(Counter::DropProtocol),
    }
}

/// Answers a task's ARP request for an address of its network.
#[inline(always)]
pub fn answer_arp<P: Rewrite>(packet: &mut P, tables: &impl AddrTables<Be32>, ifindex: u32) -> Verdict {
    let Some(iface) = tables.iface(ifindex) else {
        return Verdict::drop(Counter::DropUnknownInterface);
    };
    arp::answer(packet, |addr| is_in_network(tables, iface, &addr))
}

/// Answers a task's IPv6 neighbour discovery for an address of its network; `None` for any other packet.
#[inline(always)]
pub fn answer_discovery<P: Rewrite>(
    packet: &mut P,
    tables: &impl AddrTables<Ip6>,
    ifindex: u32,
) -> Option<Verdict> {
    let iface = tables.iface(ifindex)?;
    let parsed = Ip6::parse(packet).ok()?;
    if !neighbor::concerns(packet, &parsed) {
        return None;
    }
    Some(neighbor::answer(packet, &parsed, iface.gateway, |addr| is_in_network(tables, iface, addr)))
}

/// Decides on an IP packet that a task sent by the interface with the host side `ifindex`, once it is read.
#[inline(always)]
pub fn from_task<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    ifindex: u32,
    work: &mut Work<A>,
) {
    let Parts { parsed, ends, tuple, plan } = work.parts();
    let Some(config) = tables.config() else {
        return plan.end(Verdict::drop(Counter::DropNotReady));
    };
    let Some(iface) = tables.iface(ifindex) else {
        // A network without this family.
        return plan.end(Verdict::drop(Counter::DropProtocol));
    };
    if ends.0 != iface.addr {
        return plan.end(Verdict::drop(Counter::DropSpoofedSource));
    }
    // An error must be about something that the task itself received.
    if parsed.src != iface.addr {
        return plan.end(Verdict::drop(Counter::DropUnrelated));
    }
    let sender = Sender { config, iface };
    match course(packet, tables, &sender, parsed, tuple, plan) {
        Course::Ends(verdict) => plan.end(verdict),
        Course::ToHost => to_host(config, iface, plan),
        Course::ToClient(back) => to_client(packet, tables, &sender, parsed, back, plan),
        Course::Onward => forward(packet, tables, &sender, parsed, plan),
        Course::ToItself => {
            plan.go(Frame::ENDPOINTS, Verdict::deliver(ifindex, Counter::OverlayDelivered));
        }
    }
}

/// Who sends, and from which node.
struct Sender<'t, A> {
    config: &'t Config,
    iface: &'t Iface<A>,
}

/// Which way a task's packet takes, once its ends are planned.
enum Course {
    /// None.
    Ends(Verdict),
    /// Into the host's stack.
    ToHost,
    /// To a client of a published port.
    ToClient(Way),
    /// To an endpoint of the network.
    Onward,
    /// To the task itself.
    ToItself,
}

/// The way back to a client, as its flow has it.
#[derive(Clone, Copy)]
struct Way {
    peer: u32,
    incarnation: u32,
    flags: u8,
}

/// Whether `addr` is the gateway, an endpoint or a VIP of the interface's network.
#[inline(always)]
fn is_in_network<A: Address>(tables: &impl AddrTables<A>, iface: &Iface<A>, addr: &A) -> bool {
    let key = AddrKey { vni: iface.vni, addr: *addr };
    *addr == iface.gateway || tables.endpoint(&key).is_some() || tables.vip(&key).is_some()
}

/// Which way a packet takes: that of its flow, if it has one.
#[inline(always)]
fn course<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    sender: &Sender<'_, A>,
    parsed: &Parsed<A>,
    tuple: Option<&Tuple<A>>,
    plan: &mut Plan<A>,
) -> Course {
    if let Some(tuple) = tuple {
        let key = FlowKey::new(tuple, sender.iface.vni);
        if let Some(found) = flow::find(tables, &key)
            && let Some(course) = known(packet, tables, sender, parsed, &key, &found, plan)
        {
            return course;
        }
    }
    unknown(tables, sender, parsed, tuple, plan)
}

/// The way of a packet whose flow is in the flow table; `None` if the entry is void, or another tenant's.
#[inline(always)]
fn known<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    sender: &Sender<'_, A>,
    parsed: &Parsed<A>,
    key: &FlowKey<A>,
    found: &Found<A>,
    plan: &mut Plan<A>,
) -> Option<Course> {
    let flow = &found.flow;
    let course = match flow.kind {
        FlowKind::TO_BACKEND | FlowKind::TO_SELF => {
            return vip_request(packet, tables, sender, parsed, key, found, plan);
        }
        FlowKind::MESH_REPLY if flow.incarnation != sender.iface.incarnation => return None,
        FlowKind::MESH_REPLY => {
            plan.translation.ports.1 = flow.client_port;
            let Flow { peer, incarnation, flags, .. } = *flow;
            Course::ToClient(Way { peer, incarnation, flags })
        }
        FlowKind::VIP_REPLY => Course::Onward,
        FlowKind::SELF_REPLY => {
            plan.translation.dst = sender.iface.addr;
            Course::ToItself
        }
        _ => return None,
    };
    plan.translation.set_src(flow.addr, flow.port);
    flow::note_reply(packet, tables, parsed, key, found);
    Some(course)
}

/// The way of a request of a known flow to a VIP; `None` if it is to begin anew.
#[inline(always)]
fn vip_request<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    sender: &Sender<'_, A>,
    parsed: &Parsed<A>,
    key: &FlowKey<A>,
    found: &Found<A>,
    plan: &mut Plan<A>,
) -> Option<Course> {
    let Found { flow, stage } = found;
    let bound = balance::bound(tables, flow.backend, flow.incarnation);
    let Some(chosen) = bound else {
        tables.remove_flow(key, *stage);
        return parsed.is_midstream().then(|| nobody(Counter::DropFlowGone));
    };
    let reply_key = vip_reply_key(sender.iface, key, chosen);
    let ended = flow::is_idle(tables, parsed.protocol, flow.stamp)
        || parsed.opens() && flow::may_begin_anew(tables, found, key, &reply_key);
    if ended {
        return None;
    }
    flow::note_request(packet, tables, parsed, key, &reply_key, *stage, flow.stamp);
    Some(to_backend(sender, chosen, plan))
}

/// The way to a VIP's backend. A task that is its own backend gets the packet from the gateway's address: a stack takes
/// nothing from outside that claims to come from itself.
#[inline(always)]
fn to_backend<A: Quote>(sender: &Sender<'_, A>, chosen: Chosen<'_, A>, plan: &mut Plan<A>) -> Course {
    let addr = chosen.backend.addr;
    plan.translation.dst = addr;
    if addr != sender.iface.addr {
        return Course::Onward;
    }
    plan.translation.src = sender.iface.gateway;
    Course::ToItself
}

/// The way of a packet that the flow table doesn't know.
#[inline(always)]
fn unknown<A: Quote>(
    tables: &impl AddrTables<A>,
    sender: &Sender<'_, A>,
    parsed: &Parsed<A>,
    tuple: Option<&Tuple<A>>,
    plan: &mut Plan<A>,
) -> Course {
    let Sender { config, iface, .. } = sender;
    let key = AddrKey { vni: iface.vni, addr: parsed.dst };
    if parsed.dst == iface.gateway {
        return Course::ToHost;
    }
    if tables.endpoint(&key).is_some() {
        return Course::Onward;
    }
    if let Some(service) = tables.vip(&key) {
        return to_vip(tables, sender, parsed, tuple, service, plan);
    }
    if let Some(reason) = outside(config, iface, parsed) {
        return Course::Ends(Verdict::drop(reason));
    }
    if let Some(tuple) = tuple
        && tables.is_local(&tuple.dst)
        && tables.port(&PortKey::new::<A>(tuple.protocol, tuple.dst_port)).is_some()
    {
        return Course::Ends(Verdict::new(Action::Dial, Counter::MeshDelivered));
    }
    Course::ToHost
}

/// Why a packet to an address that isn't in the network may not leave it either.
#[inline(always)]
fn outside<A: Family>(config: &Config, iface: &Iface<A>, parsed: &Parsed<A>) -> Option<Counter> {
    let Parsed { dst, .. } = *parsed;
    let host = A::host(config);
    if dst.is_multicast() || dst.is_broadcast_of(iface.addr, iface.mask) {
        Some(Counter::DropMulticast)
    } else if dst.is_in(iface.addr, iface.mask) {
        Some(Counter::DropNoEndpoint)
    } else if iface.flags & IFACE_INTERNAL != 0 {
        Some(Counter::DropInternal)
    } else if dst.is_in(host.alias_net, host.alias_mask) {
        Some(Counter::DropLinkLocal)
    } else if dst.is_wireguard() {
        Some(Counter::DropTunnelFromTask)
    } else if parsed.protocol == PROTO_UDP
        && parsed.ports().is_some_and(|(_, dst_port)| dst_port == config.vxlan_port)
    {
        // Masqueraded, it would come from this node's own VTEP.
        Some(Counter::DropTunnelFromTask)
    } else if parsed.protocol == PROTO_UDP && parsed.ports().is_none() {
        // It could be the rest of such a packet.
        Some(Counter::DropFragment)
    } else {
        None
    }
}

/// The way of a packet to a VIP whose flow isn't known.
#[inline(always)]
fn to_vip<A: Quote>(
    tables: &impl AddrTables<A>,
    sender: &Sender<'_, A>,
    parsed: &Parsed<A>,
    tuple: Option<&Tuple<A>>,
    slot: u32,
    plan: &mut Plan<A>,
) -> Course {
    if parsed.is_error() {
        return Course::Ends(Verdict::drop(Counter::DropUnrelated));
    }
    if parsed.protocol == A::ICMP {
        return Course::Ends(Verdict::new(Action::Echo, Counter::EchoAnswered));
    }
    let Some(tuple) = tuple else {
        let unknown = parsed.fragment == Fragment::Later;
        let reason = if unknown { Counter::DropFragment } else { Counter::DropProtocol };
        return Course::Ends(Verdict::drop(reason));
    };
    let service = tables.service(slot);
    let chosen = service.and_then(|service| balance::choose(tables, service, tuple, sender.config.hash_seed));
    let Some(chosen) = chosen else {
        return nobody(Counter::DropNoBackend);
    };
    if parsed.is_midstream() {
        // Nobody but this node knew the connection, and it doesn't.
        return nobody(Counter::DropFlowGone);
    }
    remember(tables, sender.iface, tuple, chosen);
    to_backend(sender, chosen, plan)
}

/// Nobody is there, or knows of it.
#[inline(always)]
fn nobody(reason: Counter) -> Course {
    Course::Ends(Verdict::answer(reason, Answer::Nobody { back: Back::Reflect }))
}

/// The key of the replies to a flow to a VIP.
#[inline(always)]
fn vip_reply_key<A: Family>(iface: &Iface<A>, key: &FlowKey<A>, chosen: Chosen<'_, A>) -> FlowKey<A> {
    let addr = chosen.backend.addr;
    FlowKey {
        src: addr,
        // A task that reaches itself is told that its gateway asks.
        dst: if addr == iface.addr { iface.gateway } else { key.src },
        src_port: key.dst_port,
        dst_port: key.src_port,
        scope: key.scope,
    }
}

/// Writes both directions of a flow from a task to a VIP to the flow table.
#[inline(always)]
fn remember<A: Family>(
    tables: &impl AddrTables<A>,
    iface: &Iface<A>,
    tuple: &Tuple<A>,
    chosen: Chosen<'_, A>,
) {
    let Chosen { slot, backend } = chosen;
    let itself = backend.addr == iface.addr;
    let key = FlowKey::new(tuple, iface.vni);
    let request = Flow {
        backend: slot,
        incarnation: backend.incarnation,
        stamp: if tuple.protocol == PROTO_UDP { tables.now_s() } else { 0 },
        port: tuple.dst_port,
        kind: if itself { FlowKind::TO_SELF } else { FlowKind::TO_BACKEND },
        ..Flow::default()
    };
    flow::begin(tables, &key, &request);
    let reply = Flow {
        incarnation: backend.incarnation,
        addr: tuple.dst,
        port: tuple.dst_port,
        kind: if itself { FlowKind::SELF_REPLY } else { FlowKind::VIP_REPLY },
        ..Flow::default()
    };
    flow::begin(tables, &vip_reply_key(iface, &key, chosen), &reply);
}

/// A reply to a client of a published port: under the dialled address, by the ingress node.
#[inline(always)]
fn to_client<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    sender: &Sender<'_, A>,
    parsed: &Parsed<A>,
    way: Way,
    plan: &mut Plan<A>,
) {
    let Sender { config, .. } = sender;
    let Way { peer, incarnation, flags } = way;
    if peer == 0 {
        return mesh::to_client(tables, config, Frame::KEPT, plan);
    }
    let teaches = flags & FLOW_TEACH != 0;
    if flags & FLOW_DIRECT != 0 && !teaches {
        return plan.go(Frame::KEPT, Verdict::new(Action::Route, Counter::MeshReplied));
    }
    if let Some(mtu) = mesh::too_big(packet, tables, parsed, peer) {
        return plan.end(Verdict::answer(Counter::DropTooBig, Answer::TooBig { mtu }));
    }
    let frame = if teaches {
        let (dst, src) = (mac_of(parsed.dst), backend_mac(incarnation));
        Frame::given(Ethernet { dst, src, ethertype: A::ETHERTYPE })
    } else {
        Frame::KEPT
    };
    let action = Action::Tunnel { vni: VNI_MESH_REPLY, peer, tos: parsed.tos };
    plan.go(frame, Verdict::new(action, Counter::MeshReturned));
}

/// A packet that stays in its network: to the interface of the endpoint that its destination is, or to its node.
#[inline(always)]
fn forward<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    sender: &Sender<'_, A>,
    parsed: &Parsed<A>,
    plan: &mut Plan<A>,
) {
    let vni = sender.iface.vni;
    let Some(endpoint) = tables.endpoint(&AddrKey { vni, addr: plan.translation.dst }) else {
        return plan.end(Verdict::drop(Counter::DropNoEndpoint));
    };
    let Endpoint { ifindex, peer, incarnation } = *endpoint;
    if peer == 0 {
        return plan.go(Frame::ENDPOINTS, Verdict::deliver(ifindex, Counter::OverlayDelivered));
    }
    if let Some(mtu) = mesh::too_big(packet, tables, parsed, peer) {
        return plan.end(Verdict::answer(Counter::DropTooBig, Answer::TooBig { mtu }));
    }
    let action = Action::Tunnel { vni, peer, tos: parsed.tos };
    // The node there may know better who has the address.
    let Translation { src, ports, .. } = plan.translation;
    let (dst, src) = (backend_mac(incarnation), fragment::source(parsed, ports, mac_of(src)));
    let frame = Frame::given(Ethernet { dst, src, ethertype: A::ETHERTYPE });
    plan.go(frame, Verdict::new(action, Counter::OverlayForwarded));
}
