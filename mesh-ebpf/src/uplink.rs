//! What comes in by an uplink: published ports, and the guard of the VXLAN port.
//!
//! XDP and TC share [`decide`]. XDP carries out only what leaves again by an uplink ([`Decision::Remote`]); whatever
//! else is decided, TC decides again from the same tables.

use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;
use mesh_common::hash::{Tuple, flow_hash};
use mesh_common::map::{Backend, Flow, FlowKey, FlowKind, PROTO_UDP, PortKey};
use mesh_common::vxlan::VNI_MESH_REQUEST;

use crate::balance::{self, Chosen};
use crate::nat::{self, End};
use crate::packet::{Fault, Packet, Rewrite};
use crate::parse::{Fragment, Parsed, parse};
use crate::tables::Tables;
use crate::verdict::{Action, Verdict};

/// What becomes of a packet that came in by an uplink.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'t> {
    /// Not the mesh's.
    Pass,
    /// Dropped, and why.
    Drop(Counter),
    /// For a task of another node.
    Remote(Remote),
    /// For a task of this node: see [`deliver`].
    Local(Local<'t>),
}

/// A mesh request for a task of another node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Remote {
    /// The node: a peer's slot.
    pub peer: u32,
    /// The backend's address, which the inner frame is addressed to.
    pub addr: Be32,
    /// The flow's hash, for the outer source port.
    pub hash: u32,
    /// DSCP and ECN of the packet.
    pub tos: u8,
}

/// A mesh request for a task of this node.
#[derive(Clone, Copy, Debug)]
pub struct Local<'t> {
    /// The packet's facts.
    pub parsed: Parsed,
    /// The flow.
    pub tuple: Tuple,
    /// The backend.
    pub chosen: Chosen<'t>,
    /// The port it listens on.
    pub target: Be16,
    /// Where replies go: the ingress node's VTEP; 0: they leave from here.
    pub vtep: Be32,
    /// Whether the flow table already says all this. Never of a packet that opens a connection: since the last one, the
    /// client may have dialled another address from the same port, and that flow's replies look the same to the task.
    pub known: bool,
}

/// Decides on a packet that came in by an uplink; remembers the flow of one that goes on to another node.
#[inline(always)]
pub fn decide<'t>(packet: &impl Packet, tables: &'t impl Tables) -> Decision<'t> {
    // What can't be parsed is the stack's to judge: the uplink carries more than the mesh.
    let (Some(config), Ok(parsed)) = (tables.config(), parse(packet)) else {
        return Decision::Pass;
    };
    let Some(tuple) = parsed.tuple() else {
        return Decision::Pass;
    };
    if parsed.fragment != Fragment::Whole {
        return Decision::Pass;
    }
    let key = FlowKey::new(&tuple, VNI_MESH_REQUEST);
    if let Some(flow) = tables.flow(&key)
        && let Some(chosen) = balance::bound(tables, &flow, parsed.opens)
    {
        let known = flow.vtep == Be32::default() && !parsed.opens;
        return towards(chosen, parsed, tuple, flow.port, known, config.hash_seed);
    }
    if tuple.protocol == PROTO_UDP && tuple.dst_port == config.vxlan_port && tables.is_local(tuple.dst) {
        return match tables.member(tuple.src) {
            Some(_) => Decision::Pass,
            None => Decision::Drop(Counter::DropNotMember),
        };
    }
    let Some(port) = tables.port(&PortKey::new(tuple.protocol, tuple.dst_port)) else {
        return Decision::Pass;
    };
    if !tables.is_local(tuple.dst) {
        return Decision::Pass;
    }
    let Some(chosen) = balance::choose(tables, port.service, &tuple, config.hash_seed) else {
        return Decision::Drop(Counter::DropNoBackend);
    };
    if chosen.backend.peer != 0 {
        tables.insert_flow(&key, &forward_flow(chosen, port.target, Be32::default()));
    }
    towards(chosen, parsed, tuple, port.target, false, config.hash_seed)
}

#[inline(always)]
fn towards(
    chosen: Chosen<'_>,
    parsed: Parsed,
    tuple: Tuple,
    target: Be16,
    known: bool,
    seed: u64,
) -> Decision<'_> {
    let Backend { addr, peer, .. } = *chosen.backend;
    if peer == 0 {
        return Decision::Local(Local { parsed, tuple, chosen, target, vtep: Be32::default(), known });
    }
    Decision::Remote(Remote { peer, addr, hash: flow_hash(&tuple, seed), tos: parsed.tos })
}

/// Decides on, and rewrites, a packet that came in by an uplink: all that TC does.
#[inline(always)]
pub fn from_uplink<P: Rewrite>(packet: &mut P, tables: &impl Tables) -> Verdict {
    match decide(packet, tables) {
        Decision::Pass => Verdict::PASS,
        Decision::Drop(reason) => Verdict::drop(reason),
        Decision::Local(local) => deliver(packet, tables, &local),
        Decision::Remote(remote) => send(packet, tables, &remote),
    }
}

/// Addresses a mesh request to its backend, and says where it goes.
#[inline(always)]
fn send<P: Rewrite>(packet: &mut P, tables: &impl Tables, remote: &Remote) -> Verdict {
    let (Some(config), Some(peer)) = (tables.config(), tables.peer(remote.peer)) else {
        return Verdict::drop(Counter::DropNotReady);
    };
    match nat::address_frame_to(packet, config.vtep, remote.addr) {
        Ok(()) => Verdict {
            action: Action::Tunnel { vni: VNI_MESH_REQUEST, vtep: peer.vtep, tos: remote.tos },
            counter: Counter::MeshForwarded,
        },
        Err(fault) => fault.into(),
    }
}

/// Delivers a mesh request to a task of this node, and remembers both directions of its flow.
#[inline(always)]
pub fn deliver<P: Rewrite>(packet: &mut P, tables: &impl Tables, local: &Local<'_>) -> Verdict {
    if !local.known {
        remember(tables, local);
    }
    let backend = local.chosen.backend;
    match translate(packet, local.parsed, backend, local.target) {
        Ok(()) => Verdict::deliver(backend.ifindex, Counter::MeshDelivered),
        Err(fault) => fault.into(),
    }
}

#[inline(always)]
fn translate<P: Rewrite>(
    packet: &mut P,
    mut parsed: Parsed,
    backend: &Backend,
    target: Be16,
) -> Result<(), Fault> {
    nat::rewrite(packet, &mut parsed, End::Dst, backend.addr, Some(target))?;
    nat::address_frame(packet, &parsed)
}

/// Writes both directions of a flow to the flow table: the request as clients send it, the reply as the task does.
#[inline(always)]
fn remember(tables: &impl Tables, local: &Local<'_>) {
    let Local { tuple, chosen, target, vtep, .. } = local;
    tables.insert_flow(&FlowKey::new(tuple, VNI_MESH_REQUEST), &forward_flow(*chosen, *target, *vtep));
    let reply = Tuple {
        src: chosen.backend.addr,
        dst: tuple.src,
        src_port: *target,
        dst_port: tuple.src_port,
        protocol: tuple.protocol,
    };
    let flow = Flow {
        incarnation: chosen.backend.incarnation,
        addr: tuple.dst,
        port: tuple.dst_port,
        vtep: *vtep,
        kind: FlowKind::MESH_REPLY,
        ..Flow::default()
    };
    tables.insert_flow(&FlowKey::new(&reply, chosen.backend.vni), &flow);
}

#[inline(always)]
fn forward_flow(chosen: Chosen<'_>, target: Be16, vtep: Be32) -> Flow {
    Flow {
        backend: chosen.slot,
        incarnation: chosen.backend.incarnation,
        port: target,
        vtep,
        kind: FlowKind::TO_BACKEND,
        ..Flow::default()
    }
}
