//! What a task sends: to endpoints and VIPs of its network, to clients of a published port, to the outside.

use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::hash::Tuple;
use mesh_common::mac_of;
use mesh_common::map::{
    AddrKey, Config, Endpoint, Flow, FlowKey, FlowKind, IFACE_INTERNAL, Iface, PROTO_ICMP, PROTO_UDP,
};
use mesh_common::vxlan::VNI_MESH_REPLY;

use crate::arp;
use crate::balance::{self, Chosen};
use crate::header::{ETHERTYPE_ARP, ETHERTYPE_IPV4};
use crate::host::to_host;
use crate::icmp;
use crate::nat::{self, End};
use crate::packet::{Fault, Rewrite};
use crate::parse::{Fragment, Parsed, parse_ethernet, parse_ipv4};
use crate::tables::Tables;
use crate::verdict::{Action, Verdict};

/// Decides on, and rewrites, a packet that a task sent by the interface with the host side `ifindex`.
#[inline(always)]
pub fn from_task<P: Rewrite>(packet: &mut P, tables: &impl Tables, ifindex: u32) -> Verdict {
    let Some(config) = tables.config() else {
        return Verdict::drop(Counter::DropNotReady);
    };
    let Some(iface) = tables.iface(ifindex) else {
        return Verdict::drop(Counter::DropUnknownInterface);
    };
    let Ok(ethernet) = parse_ethernet(packet) else {
        return Verdict::drop(Counter::DropMalformed);
    };
    if ethernet.src != mac_of(iface.addr) {
        return Verdict::drop(Counter::DropSpoofedMac);
    }
    match ethernet.ethertype {
        ETHERTYPE_IPV4 => {}
        ETHERTYPE_ARP => return arp::answer(packet, |addr| is_in_network(tables, iface, addr)),
        _ => return Verdict::drop(Counter::DropProtocol),
    }
    let Ok(parsed) = parse_ipv4(packet) else {
        return Verdict::drop(Counter::DropMalformed);
    };
    if parsed.src != iface.addr {
        return Verdict::drop(Counter::DropSpoofedSource);
    }
    let sender = Sender { config, iface, ifindex };
    match parsed.tuple() {
        Some(tuple) => match tables.flow(&FlowKey::new(&tuple, iface.vni)) {
            Some(flow) => known(packet, tables, &sender, parsed, &flow),
            None => unknown(packet, tables, &sender, parsed),
        },
        None => unknown(packet, tables, &sender, parsed),
    }
}

/// Who sends, and from which node.
struct Sender<'t> {
    config: &'t Config,
    iface: &'t Iface,
    ifindex: u32,
}

/// Whether `addr` is the gateway, an endpoint or a VIP of the interface's network.
#[inline(always)]
fn is_in_network(tables: &impl Tables, iface: &Iface, addr: Be32) -> bool {
    let key = AddrKey { vni: iface.vni, addr };
    addr == iface.gateway || tables.endpoint(&key).is_some() || tables.vip(&key).is_some()
}

/// A packet whose flow is in the flow table.
#[inline(always)]
fn known<P: Rewrite>(
    packet: &mut P,
    tables: &impl Tables,
    sender: &Sender<'_>,
    parsed: Parsed,
    flow: &Flow,
) -> Verdict {
    match flow.kind {
        FlowKind::MESH_REPLY if flow.incarnation == sender.iface.incarnation => {
            mesh_reply(packet, parsed, flow)
        }
        FlowKind::VIP_REPLY => match nat_source(packet, parsed, flow) {
            Ok(parsed) => forward(packet, tables, sender, parsed),
            Err(fault) => fault.into(),
        },
        FlowKind::SELF_REPLY => self_reply(packet, sender, parsed, flow),
        FlowKind::TO_BACKEND | FlowKind::TO_SELF => match balance::bound(tables, flow, parsed.opens) {
            Some(chosen) => to_backend(packet, tables, sender, parsed, chosen),
            None => unknown(packet, tables, sender, parsed),
        },
        _ => unknown(packet, tables, sender, parsed),
    }
}

/// A reply to a client of a published port: under the dialled address, by the ingress node.
#[inline(always)]
fn mesh_reply<P: Rewrite>(packet: &mut P, parsed: Parsed, flow: &Flow) -> Verdict {
    let rewritten = nat_source(packet, parsed, flow).and_then(|mut parsed| {
        let client = parsed.dst;
        nat::rewrite(packet, &mut parsed, End::Dst, client, Some(flow.client_port))?;
        Ok(parsed)
    });
    match rewritten {
        Ok(parsed) if flow.vtep == Be32::default() => Verdict {
            action: Action::Route { src: parsed.src, dst: parsed.dst },
            counter: Counter::MeshReplied,
        },
        Ok(parsed) => Verdict {
            action: Action::Tunnel { vni: VNI_MESH_REPLY, vtep: flow.vtep, tos: parsed.tos },
            counter: Counter::MeshReturned,
        },
        Err(fault) => fault.into(),
    }
}

#[inline(always)]
fn nat_source<P: Rewrite>(packet: &mut P, mut parsed: Parsed, flow: &Flow) -> Result<Parsed, Fault> {
    nat::rewrite(packet, &mut parsed, End::Src, flow.addr, Some(flow.port))?;
    Ok(parsed)
}

/// A task's answer to itself, asked by its service's VIP.
#[inline(always)]
fn self_reply<P: Rewrite>(packet: &mut P, sender: &Sender<'_>, mut parsed: Parsed, flow: &Flow) -> Verdict {
    let rewritten = nat::rewrite(packet, &mut parsed, End::Src, flow.addr, Some(flow.port))
        .and_then(|()| nat::rewrite(packet, &mut parsed, End::Dst, sender.iface.addr, None))
        .and_then(|()| nat::address_frame(packet, &parsed));
    match rewritten {
        Ok(()) => Verdict::deliver(sender.ifindex, Counter::OverlayDelivered),
        Err(fault) => fault.into(),
    }
}

/// A packet that the flow table doesn't know, or has nothing to do with.
#[inline(always)]
fn unknown<P: Rewrite>(packet: &mut P, tables: &impl Tables, sender: &Sender<'_>, parsed: Parsed) -> Verdict {
    let Sender { config, iface, .. } = sender;
    let key = AddrKey { vni: iface.vni, addr: parsed.dst };
    if parsed.dst == iface.gateway {
        return to_host(packet, config, iface, parsed);
    }
    if tables.endpoint(&key).is_some() {
        return forward(packet, tables, sender, parsed);
    }
    if let Some(service) = tables.vip(&key) {
        return to_vip(packet, tables, sender, parsed, service);
    }
    match outside(config, iface, &parsed) {
        None => to_host(packet, config, iface, parsed),
        Some(reason) => Verdict::drop(reason),
    }
}

/// Why a packet to an address that isn't in the network may not leave it either.
#[inline(always)]
fn outside(config: &Config, iface: &Iface, parsed: &Parsed) -> Option<Counter> {
    let dst = parsed.dst.raw();
    let multicast = parsed.dst.get() >= 0xe000_0000;
    let subnet_broadcast = dst == (iface.addr.raw() | !iface.mask.raw());
    if multicast || subnet_broadcast {
        Some(Counter::DropMulticast)
    } else if (dst ^ iface.addr.raw()) & iface.mask.raw() == 0 {
        Some(Counter::DropNoEndpoint)
    } else if iface.flags & IFACE_INTERNAL != 0 {
        Some(Counter::DropInternal)
    } else if (dst ^ config.alias_net.raw()) & config.alias_mask.raw() == 0 {
        Some(Counter::DropLinkLocal)
    } else if parsed.protocol == PROTO_UDP
        && parsed.ports.is_some_and(|(_, dst_port)| dst_port == config.vxlan_port)
    {
        // Masqueraded, it would come from this node's own VTEP.
        Some(Counter::DropTunnelFromTask)
    } else {
        None
    }
}

/// A new flow to a VIP.
#[inline(always)]
fn to_vip<P: Rewrite>(
    packet: &mut P,
    tables: &impl Tables,
    sender: &Sender<'_>,
    parsed: Parsed,
    service: u32,
) -> Verdict {
    if parsed.protocol == PROTO_ICMP {
        return icmp::answer_echo(packet, &parsed).unwrap_or(Verdict::drop(Counter::DropProtocol));
    }
    if parsed.fragment != Fragment::Whole {
        return Verdict::drop(Counter::DropFragment);
    }
    let Some(tuple) = parsed.tuple() else {
        return Verdict::drop(Counter::DropProtocol);
    };
    let Some(chosen) = balance::choose(tables, service, &tuple, sender.config.hash_seed) else {
        return Verdict::drop(Counter::DropNoBackend);
    };
    remember(tables, sender.iface, &tuple, chosen);
    to_backend(packet, tables, sender, parsed, chosen)
}

/// Writes both directions of a flow from a task to a VIP to the flow table.
#[inline(always)]
fn remember(tables: &impl Tables, iface: &Iface, tuple: &Tuple, chosen: Chosen<'_>) {
    let Chosen { slot, backend } = chosen;
    let itself = backend.addr == iface.addr;
    let forward = Flow {
        backend: slot,
        incarnation: backend.incarnation,
        port: tuple.dst_port,
        kind: if itself { FlowKind::TO_SELF } else { FlowKind::TO_BACKEND },
        ..Flow::default()
    };
    tables.insert_flow(&FlowKey::new(tuple, iface.vni), &forward);
    let reply = Tuple {
        src: backend.addr,
        dst: if itself { iface.gateway } else { tuple.src },
        src_port: tuple.dst_port,
        dst_port: tuple.src_port,
        protocol: tuple.protocol,
    };
    let back = Flow {
        incarnation: backend.incarnation,
        addr: tuple.dst,
        port: tuple.dst_port,
        kind: if itself { FlowKind::SELF_REPLY } else { FlowKind::VIP_REPLY },
        ..Flow::default()
    };
    tables.insert_flow(&FlowKey::new(&reply, iface.vni), &back);
}

/// A packet to a VIP, on its way to the backend. A task that is its own backend gets it from the gateway's address:
/// a stack takes nothing from outside that claims to come from itself.
#[inline(always)]
fn to_backend<P: Rewrite>(
    packet: &mut P,
    tables: &impl Tables,
    sender: &Sender<'_>,
    mut parsed: Parsed,
    chosen: Chosen<'_>,
) -> Verdict {
    let addr = chosen.backend.addr;
    if let Err(fault) = nat::rewrite(packet, &mut parsed, End::Dst, addr, None) {
        return fault.into();
    }
    if addr != sender.iface.addr {
        return forward(packet, tables, sender, parsed);
    }
    let rewritten = nat::rewrite(packet, &mut parsed, End::Src, sender.iface.gateway, None)
        .and_then(|()| nat::address_frame(packet, &parsed));
    match rewritten {
        Ok(()) => Verdict::deliver(sender.ifindex, Counter::OverlayDelivered),
        Err(fault) => fault.into(),
    }
}

/// A packet whose destination is an endpoint of the network: to its interface, or to its node.
#[inline(always)]
fn forward<P: Rewrite>(packet: &mut P, tables: &impl Tables, sender: &Sender<'_>, parsed: Parsed) -> Verdict {
    let vni = sender.iface.vni;
    let Some(endpoint) = tables.endpoint(&AddrKey { vni, addr: parsed.dst }) else {
        return Verdict::drop(Counter::DropNoEndpoint);
    };
    if let Err(fault) = nat::address_frame(packet, &parsed) {
        return fault.into();
    }
    let Endpoint { ifindex, vtep, peer, .. } = *endpoint;
    if peer == 0 {
        return Verdict::deliver(ifindex, Counter::OverlayDelivered);
    }
    let action = Action::Tunnel { vni, vtep, tos: parsed.tos };
    Verdict { action, counter: Counter::OverlayForwarded }
}
