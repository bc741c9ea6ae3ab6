//! What comes in by an uplink: published ports, and the guard of the VXLAN port.
//!
//! XDP and TC share [`decide`]. XDP carries out only what leaves again by an uplink: [`Decision::Remote`], and mesh
//! replies among [`Decision::Tunnel`]. Whatever else is decided, TC decides again from the same tables.

use mesh_common::be::{Be16, Be32};
use mesh_common::counter::Counter;
use mesh_common::hash::{Tuple, flow_hash, other_port, path_entropy};
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
    /// VXLAN from another node: for the VXLAN device, unless XDP can do with it what that would.
    Tunnel(Parsed),
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
    /// What the flow's outer source port is made of.
    pub entropy: u16,
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
    /// The client's port as the task sees it, where the flow table already says all this. Not for a packet that opens a
    /// connection: that one writes both directions again, whatever has become of them since the last one.
    pub client_port: Option<Be16>,
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
    if tuple.protocol == PROTO_UDP && tuple.dst_port == config.vxlan_port && tables.is_local(tuple.dst) {
        return match tables.member(tuple.src) {
            Some(_) => Decision::Tunnel(parsed),
            None => Decision::Drop(Counter::DropNotMember),
        };
    }
    let key = FlowKey::new(&tuple, VNI_MESH_REQUEST);
    if let Some(flow) = tables.flow(&key)
        && let Some(chosen) = balance::bound(tables, &flow, parsed.opens)
    {
        let known = flow.vtep == Be32::default() && !parsed.opens;
        let client_port = known.then_some(flow.client_port);
        return towards(chosen, parsed, tuple, flow.port, client_port);
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
        tables.insert_flow(&key, &forward_flow(chosen, port.target, tuple.src_port, Be32::default()));
    }
    towards(chosen, parsed, tuple, port.target, None)
}

#[inline(always)]
fn towards(
    chosen: Chosen<'_>,
    parsed: Parsed,
    tuple: Tuple,
    target: Be16,
    client_port: Option<Be16>,
) -> Decision<'_> {
    let Backend { addr, peer, .. } = *chosen.backend;
    if peer == 0 {
        return Decision::Local(Local { parsed, tuple, chosen, target, vtep: Be32::default(), client_port });
    }
    Decision::Remote(Remote { peer, addr, entropy: path_entropy(&tuple), tos: parsed.tos })
}

/// Decides on, and rewrites, a packet that came in by an uplink: all that TC does.
#[inline(always)]
pub fn from_uplink<P: Rewrite>(packet: &mut P, tables: &impl Tables) -> Verdict {
    match decide(packet, tables) {
        Decision::Pass | Decision::Tunnel(_) => Verdict::PASS,
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
    let client_port = match local.client_port {
        Some(client_port) => client_port,
        None => match remember(tables, local) {
            Some(client_port) => client_port,
            None => return Verdict::drop(Counter::DropPortsTaken),
        },
    };
    let backend = local.chosen.backend;
    match translate(packet, local.parsed, backend, local.target, client_port) {
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
    client_port: Be16,
) -> Result<(), Fault> {
    let client = parsed.src;
    nat::rewrite(packet, &mut parsed, End::Dst, backend.addr, Some(target))?;
    nat::rewrite(packet, &mut parsed, End::Src, client, Some(client_port))?;
    nat::address_frame(packet, &parsed)
}

/// Writes both directions of a flow to the flow table: the request as clients send it, the reply as the task does.
/// Gives the client's port as the task is to see it; `None` if no free one was found.
///
/// A client may dial several nodes from one port. The task would see one flow where there are two, so the later one
/// comes to it under another port.
#[inline(always)]
fn remember(tables: &impl Tables, local: &Local<'_>) -> Option<Be16> {
    let Local { tuple, chosen, target, vtep, .. } = local;
    let backend = chosen.backend;
    let flow = Flow {
        incarnation: backend.incarnation,
        addr: tuple.dst,
        port: tuple.dst_port,
        client_port: tuple.src_port,
        vtep: *vtep,
        kind: FlowKind::MESH_REPLY,
        ..Flow::default()
    };
    let key_under = |client_port| {
        let reply = Tuple {
            src: backend.addr,
            dst: tuple.src,
            src_port: *target,
            dst_port: client_port,
            protocol: tuple.protocol,
        };
        FlowKey::new(&reply, backend.vni)
    };
    let mut client_port = tuple.src_port;
    let mut attempt = 0;
    let key = loop {
        let key = key_under(client_port);
        if tables.flow(&key).is_none_or(|other| is_same_or_void(&other, &flow)) {
            break key;
        }
        if attempt == CLIENT_PORT_ATTEMPTS {
            return None;
        }
        client_port = Be16::new(other_port(flow_hash(tuple, tables.config()?.hash_seed), attempt));
        attempt += 1;
    };
    tables.insert_flow(
        &FlowKey::new(tuple, VNI_MESH_REQUEST),
        &forward_flow(*chosen, *target, client_port, *vtep),
    );
    tables.insert_flow(&key, &flow);
    Some(client_port)
}

/// How many other ports are tried for the client's end of a flow.
const CLIENT_PORT_ATTEMPTS: u32 = 4;

/// Whether the entry `other`, in the place that `flow` is to have, is that of the same flow, or of a former tenant.
#[inline(always)]
fn is_same_or_void(other: &Flow, flow: &Flow) -> bool {
    let same = other.addr == flow.addr && other.port == flow.port && other.client_port == flow.client_port;
    same || other.kind != FlowKind::MESH_REPLY || other.incarnation != flow.incarnation
}

#[inline(always)]
fn forward_flow(chosen: Chosen<'_>, target: Be16, client_port: Be16, vtep: Be32) -> Flow {
    Flow {
        backend: chosen.slot,
        incarnation: chosen.backend.incarnation,
        port: target,
        client_port,
        vtep,
        kind: FlowKind::TO_BACKEND,
        ..Flow::default()
    }
}
