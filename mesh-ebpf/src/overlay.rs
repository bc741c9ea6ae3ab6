//! What comes out of the VXLAN device: mesh requests, mesh replies, and overlay packets from other nodes' tasks.

use mesh_common::addr_of;
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::hash::Tuple;
use mesh_common::map::{AddrKey, FlowKey, FlowKind, PortKey};
use mesh_common::vxlan::{VNI_MESH_REPLY, VNI_MESH_REQUEST, VNI_NETWORK_MIN};

use crate::balance::{self, Chosen};
use crate::nat::{self, End};
use crate::packet::{Fault, Rewrite};
use crate::parse::{Fragment, Parsed, parse, parse_ethernet};
use crate::tables::Tables;
use crate::uplink::{Local, deliver};
use crate::verdict::{Action, Verdict};

/// How a packet came through the tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrival {
    /// The VNI.
    pub vni: u32,
    /// Source address of the outer header.
    pub vtep: Be32,
}

/// Decides on, and rewrites, a packet from another node.
#[inline(always)]
pub fn from_overlay<P: Rewrite>(packet: &mut P, tables: &impl Tables, arrival: Arrival) -> Verdict {
    let Some(peer) = tables.member(arrival.vtep) else {
        return Verdict::drop(Counter::DropNotMember);
    };
    let Ok(parsed) = parse(packet) else {
        return Verdict::drop(Counter::DropMalformed);
    };
    match arrival.vni {
        VNI_MESH_REQUEST => mesh_request(packet, tables, parsed, arrival.vtep),
        VNI_MESH_REPLY => mesh_reply(tables, &parsed),
        VNI_NETWORK_MIN.. => overlay(packet, tables, parsed, arrival.vni, peer),
        _ => Verdict::drop(Counter::DropUnknownVni),
    }
}

/// A published-port packet from its ingress node, for a task of this node.
#[inline(always)]
fn mesh_request<P: Rewrite>(packet: &mut P, tables: &impl Tables, parsed: Parsed, ingress: Be32) -> Verdict {
    if parsed.fragment != Fragment::Whole {
        return Verdict::drop(Counter::DropFragment);
    }
    let (Some(tuple), Ok(ethernet)) = (parsed.tuple(), parse_ethernet(packet)) else {
        return Verdict::drop(Counter::DropProtocol);
    };
    let wanted = addr_of(ethernet.dst);
    let flow = tables.flow(&FlowKey::new(&tuple, VNI_MESH_REQUEST));
    let bound = flow.and_then(|flow| {
        let chosen = balance::bound(tables, &flow, false)?;
        (chosen.backend.peer == 0).then_some((flow, chosen))
    });
    // The usual case: the flow is known, and the ingress node means the same backend as the flow table here.
    if let Some((flow, chosen)) = bound
        && wanted == Some(chosen.backend.addr)
    {
        let client_port = (flow.vtep == ingress && !parsed.opens).then_some(flow.client_port);
        let local = Local { parsed, tuple, chosen, target: flow.port, vtep: ingress, client_port };
        return deliver(packet, tables, &local);
    }
    let Some(port) = tables.port(&PortKey::new(tuple.protocol, tuple.dst_port)) else {
        return Verdict::drop(Counter::DropNotPublished);
    };
    let meant = wanted.and_then(|addr| meant(tables, port.service, addr));
    let Some(chosen) =
        meant.or(bound.map(|(_, chosen)| chosen)).or_else(|| own_choice(tables, port.service, &tuple))
    else {
        return Verdict::drop(Counter::DropBackendGone);
    };
    deliver(
        packet,
        tables,
        &Local { parsed, tuple, chosen, target: port.target, vtep: ingress, client_port: None },
    )
}

/// The backend of `service` on this node with the address that the ingress node meant.
#[inline(always)]
fn meant(tables: &impl Tables, service: u32, addr: Be32) -> Option<Chosen<'_>> {
    let vni = tables.service(service)?.vni;
    let endpoint = tables.endpoint(&AddrKey { vni, addr })?;
    if endpoint.peer != 0 || endpoint.service != service {
        return None;
    }
    let backend = tables.backend(endpoint.backend)?;
    (backend.incarnation == endpoint.incarnation).then_some(Chosen { slot: endpoint.backend, backend })
}

/// The backend that this node's own table gives, if it is on this node: the two nodes' tables differ for a moment.
#[inline(always)]
fn own_choice<'t>(tables: &'t impl Tables, service: u32, tuple: &Tuple) -> Option<Chosen<'t>> {
    let chosen = balance::choose(tables, service, tuple, tables.config()?.hash_seed)?;
    (chosen.backend.peer == 0).then_some(chosen)
}

/// A reply from the backend's node, to be put on the wire under the address that the client dialled here.
#[inline(always)]
fn mesh_reply(tables: &impl Tables, parsed: &Parsed) -> Verdict {
    if !tables.is_local(parsed.src) {
        return Verdict::drop(Counter::DropReplyNotLocal);
    }
    let action = Action::Route { src: parsed.src, dst: parsed.dst };
    Verdict { action, counter: Counter::MeshReplied }
}

/// A packet from a task of another node to one of this node.
#[inline(always)]
fn overlay<P: Rewrite>(packet: &mut P, tables: &impl Tables, parsed: Parsed, vni: u32, peer: u32) -> Verdict {
    let source = tables.endpoint(&AddrKey { vni, addr: parsed.src });
    if source.is_none_or(|source| source.peer != peer) {
        return Verdict::drop(Counter::DropForeignSource);
    }
    let destination = tables.endpoint(&AddrKey { vni, addr: parsed.dst });
    let Some(destination) = destination.filter(|destination| destination.peer == 0) else {
        return Verdict::drop(Counter::DropNoEndpoint);
    };
    match translate(packet, tables, parsed, vni) {
        Ok(()) => Verdict::deliver(destination.ifindex, Counter::OverlayDelivered),
        Err(fault) => fault.into(),
    }
}

/// Gives a backend's reply the VIP's address back, and the frame its endpoints' addresses.
#[inline(always)]
fn translate<P: Rewrite>(
    packet: &mut P,
    tables: &impl Tables,
    mut parsed: Parsed,
    vni: u32,
) -> Result<(), Fault> {
    if let Some(tuple) = parsed.tuple()
        && let Some(flow) = tables.flow(&FlowKey::new(&tuple, vni))
        && flow.kind == FlowKind::VIP_REPLY
    {
        nat::rewrite(packet, &mut parsed, End::Src, flow.addr, Some(flow.port))?;
    }
    nat::address_frame(packet, &parsed)
}
