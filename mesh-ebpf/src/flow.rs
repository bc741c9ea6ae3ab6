//! The flows of this node's tasks: how they are found, how far they are, when they are void.
//!
//! A flow begins in the table of opening flows, both directions at once. It is established once the backend has
//! answered, and the client has shown that it got the answer: by its acknowledgement (TCP), or by going on (UDP). A
//! flood from forged addresses gets no further than the first table.

use mesh_common::be::Be16;
use mesh_common::hash::{Tuple, flow_hash, other_port};
use mesh_common::map::{FLOW_CLOSED, Flow, FlowKey, FlowKind, PROTO_TCP, PROTO_UDP, UDP_IDLE_S};
use mesh_common::vxlan::VNI_MESH_REQUEST;

use crate::balance::{self, Chosen};
use crate::family::Family;
use crate::header::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Tcp};
use crate::packet::Packet;
use crate::parse::{Fragment, Parsed};
use crate::tables::{AddrTables, Stage};

/// How many other ports are tried for the client's end of a flow.
const CLIENT_PORT_ATTEMPTS: u32 = 4;
/// No port.
const NONE: Be16 = Be16::new(0);
/// How far a client's first acknowledgements may be from the backend's first sequence number: its first window.
const FIRST_WINDOW: u32 = 1 << 20;
/// The stamp of an opening UDP flow whose backend has answered.
const ANSWERED: u32 = 1;

/// A port of the client's end, as the task would see it.
enum Port {
    Free,
    /// Of a flow that was closed not long ago.
    Closed,
    Taken,
}

/// A flow that was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found<A> {
    /// What is done to it.
    pub flow: Flow<A>,
    /// How far it is.
    pub stage: Stage,
}

/// The flow with `key`, at whatever stage.
#[inline(always)]
pub fn find<A: Family>(tables: &impl AddrTables<A>, key: &FlowKey<A>) -> Option<Found<A>> {
    find_at(tables, key, Stage::Established).or_else(|| find_late(tables, key))
}

/// The flow with `key`, which was not among the established ones a moment ago.
///
/// Another CPU may establish it between two looks. It leaves the opening ones only after that, so what is in neither
/// table is in the first one by now.
#[inline(always)]
pub fn find_late<A: Family>(tables: &impl AddrTables<A>, key: &FlowKey<A>) -> Option<Found<A>> {
    find_at(tables, key, Stage::Opening).or_else(|| find_at(tables, key, Stage::Established))
}

/// The flow with `key`, if it is at `stage`.
#[inline(always)]
pub fn find_at<A: Family>(tables: &impl AddrTables<A>, key: &FlowKey<A>, stage: Stage) -> Option<Found<A>> {
    tables.flow(key, stage).map(|flow| Found { flow, stage })
}

/// Whether a UDP flow has been silent for so long that its next packet is a new flow's.
#[inline(always)]
pub fn is_idle<A: Family>(tables: &impl AddrTables<A>, protocol: u8, stamp: u32) -> bool {
    protocol == PROTO_UDP && tables.now_s().wrapping_sub(stamp) > UDP_IDLE_S
}

/// Notes that a packet from the client's side passed, of the flow that is at `stage` with this stamp: it is not idle, and may
/// now be established.
#[inline(always)]
pub fn note_request<A: Family>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    parsed: &Parsed<A>,
    key: &FlowKey<A>,
    reply_key: &FlowKey<A>,
    stage: Stage,
    stamp: u32,
) {
    if parsed.is_error() {
        return;
    }
    let now_s = if parsed.protocol == PROTO_UDP { tables.now_s() } else { 0 };
    if stamp != now_s {
        tables.mark_flow(key, stage, now_s, 0);
    }
    if stage == Stage::Established || parsed.tcp_flags & (TCP_SYN | TCP_RST) != 0 {
        return;
    }
    if let Some(reply) = tables.flow(reply_key, Stage::Opening)
        && is_confirmed(packet, parsed, reply.stamp)
    {
        let establish =
            |key, flow| tables.insert_flow(key, &Flow { stamp: now_s, ..flow }, Stage::Established);
        let request = tables.flow(key, Stage::Opening);
        // What the table refuses stays where it was, and the next packet tries again.
        if establish(reply_key, reply) && request.is_none_or(|request| establish(key, request)) {
            tables.remove_flow(reply_key, Stage::Opening);
            tables.remove_flow(key, Stage::Opening);
        }
    }
}

/// Whether a packet shows that its sender got the answer that `stamp` stands for.
#[inline(always)]
fn is_confirmed<A: Family>(packet: &impl Packet, parsed: &Parsed<A>, stamp: u32) -> bool {
    if stamp == 0 || parsed.fragment == Fragment::Later {
        return false;
    }
    if parsed.protocol != PROTO_TCP {
        return true;
    }
    let acknowledged = packet.load::<Tcp>(parsed.l4_offset).map(|tcp| { tcp.acknowledgement }.get());
    parsed.tcp_flags & TCP_ACK != 0
        && acknowledged.is_some_and(|acknowledged| acknowledged.wrapping_sub(stamp) < FIRST_WINDOW)
}

/// Notes that a packet from the backend's side passed: it has answered, or closed the connection.
#[inline(always)]
pub fn note_reply<A: Family>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    parsed: &Parsed<A>,
    key: &FlowKey<A>,
    found: &Found<A>,
) {
    if parsed.fragment == Fragment::Later || parsed.is_error() {
        return;
    }
    let Found { flow, stage } = found;
    match (parsed.protocol, stage) {
        (PROTO_TCP, Stage::Opening) if parsed.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN | TCP_ACK => {
            if let Some(tcp) = packet.load::<Tcp>(parsed.l4_offset) {
                tables.mark_flow(key, *stage, { tcp.sequence }.get().wrapping_add(1), 0);
            }
        }
        (PROTO_TCP, Stage::Established)
            if parsed.tcp_flags & (TCP_FIN | TCP_RST) != 0 && flow.flags & FLOW_CLOSED == 0 =>
        {
            tables.mark_flow(key, *stage, tables.now_s(), FLOW_CLOSED);
        }
        (PROTO_UDP, Stage::Opening) if flow.stamp == 0 => tables.mark_flow(key, *stage, ANSWERED, 0),
        (PROTO_UDP, Stage::Established) => {
            let now_s = tables.now_s();
            if flow.stamp != now_s {
                tables.mark_flow(key, *stage, now_s, 0);
            }
        }
        _ => {}
    }
}

/// Clears the way for a segment that opens a connection, where there was one: `true` if that is over, because its backend
/// has closed it or it never was established. A connection that is not over keeps its flow, and its backend's stack tells
/// the client.
#[inline(always)]
pub fn may_begin_anew<A: Family>(
    tables: &impl AddrTables<A>,
    found: &Found<A>,
    key: &FlowKey<A>,
    reply_key: &FlowKey<A>,
) -> bool {
    if found.stage == Stage::Opening {
        return true;
    }
    // Another flow may have taken the place of a closed one's replies.
    let reply = tables.flow(reply_key, Stage::Established).filter(|reply| is_reply_to(reply, key));
    let over = reply.is_none_or(|reply| reply.flags & FLOW_CLOSED != 0);
    if over {
        if reply.is_some() {
            tables.remove_flow(reply_key, Stage::Established);
        }
        tables.remove_flow(key, Stage::Established);
    }
    over
}

/// Whether `reply` is what is done to replies to the packets with `key`.
#[inline(always)]
fn is_reply_to<A: Family>(reply: &Flow<A>, key: &FlowKey<A>) -> bool {
    let client_port = if reply.kind == FlowKind::MESH_REPLY { key.src_port } else { reply.client_port };
    reply.addr == key.dst && reply.port == key.dst_port && reply.client_port == client_port
}

/// The backend of a published port's flow, if it is a task of this node that is still there; `None` if not, or if the
/// flow has been silent for too long.
#[inline(always)]
pub fn backend_here<'t, A: Family>(
    tables: &'t impl AddrTables<A>,
    protocol: u8,
    found: &Found<A>,
) -> Option<Chosen<'t, A>> {
    let Flow { backend, incarnation, kind, stamp, .. } = found.flow;
    if kind != FlowKind::TO_BACKEND || is_idle(tables, protocol, stamp) {
        return None;
    }
    balance::bound(tables, backend, incarnation).filter(|chosen| chosen.backend.peer == 0)
}

/// A published port's flow to a task of this node.
#[derive(Clone, Copy, Debug)]
pub struct MeshFlow<'t, A> {
    /// The flow, as clients send it.
    pub tuple: &'t Tuple<A>,
    /// The task.
    pub chosen: Chosen<'t, A>,
    /// The port it listens on.
    pub target: Be16,
    /// The ingress node's peer slot; 0: this node.
    pub peer: u32,
    /// `FLOW_DIRECT`, `FLOW_TEACH`.
    pub flags: u8,
}

impl<A: Family> MeshFlow<'_, A> {
    /// The key of its requests.
    #[inline(always)]
    pub fn key(&self) -> FlowKey<A> {
        FlowKey::new(self.tuple, VNI_MESH_REQUEST)
    }

    /// The key of its replies, if the task sees the client under `client_port`.
    #[inline(always)]
    pub fn reply_key(&self, client_port: Be16) -> FlowKey<A> {
        let Tuple { src, protocol, .. } = *self.tuple;
        let Chosen { backend, .. } = self.chosen;
        let reply =
            Tuple { src: backend.addr, dst: src, src_port: self.target, dst_port: client_port, protocol };
        FlowKey::new(&reply, backend.vni)
    }

    /// See [`may_begin_anew`].
    #[inline(always)]
    pub fn may_begin_anew(&self, tables: &impl AddrTables<A>, found: &Found<A>) -> bool {
        may_begin_anew(tables, found, &self.key(), &self.reply_key(found.flow.client_port))
    }

    /// Writes both directions of a flow that begins to the flow tables. Gives the client's port as the task is to see it,
    /// `preferred` if that is free; `None` if no free one was found.
    #[inline(always)]
    pub fn remember(&self, tables: &impl AddrTables<A>, preferred: Be16) -> Option<Be16> {
        let client_port = self.free_port(tables, preferred);
        if client_port == NONE {
            return None;
        }
        let (request, reply) = self.directions(tables, client_port);
        begin(tables, &self.key(), &request);
        begin(tables, &self.reply_key(client_port), &reply);
        Some(client_port)
    }

    /// Writes anew both directions of a flow that the tables know at `stage` otherwise, by another ingress node for
    /// example. How far it is stays.
    #[inline(always)]
    pub fn amend(&self, tables: &impl AddrTables<A>, stage: Stage, client_port: Be16) {
        let reply_key = self.reply_key(client_port);
        let (request, mut reply) = self.directions(tables, client_port);
        if let Some(old) = tables.flow(&reply_key, stage) {
            reply.stamp = old.stamp;
            reply.flags |= old.flags & FLOW_CLOSED;
        }
        tables.insert_flow(&self.key(), &request, stage);
        tables.insert_flow(&reply_key, &reply, stage);
    }

    /// Request and reply, as the tables have them at first.
    #[inline(always)]
    fn directions(&self, tables: &impl AddrTables<A>, client_port: Be16) -> (Flow<A>, Flow<A>) {
        let Self { tuple, chosen, target, peer, flags } = *self;
        let incarnation = chosen.backend.incarnation;
        let request = Flow {
            backend: chosen.slot,
            incarnation,
            port: target,
            client_port,
            peer,
            stamp: if tuple.protocol == PROTO_UDP { tables.now_s() } else { 0 },
            kind: FlowKind::TO_BACKEND,
            flags,
            ..Flow::default()
        };
        let reply = Flow {
            incarnation,
            addr: tuple.dst,
            port: tuple.dst_port,
            client_port: tuple.src_port,
            peer,
            kind: FlowKind::MESH_REPLY,
            flags,
            ..Flow::default()
        };
        (request, reply)
    }

    /// The client's port as the task is to see it; 0 if none is free.
    ///
    /// A client may dial several nodes from one port. The task would see one flow where there are two, so the later one
    /// comes to it under another port: if it can be, under one whose last flow is long over, and not just closed.
    ///
    /// (The first one is tried before the loop: Linux 6.1 takes no loop whose last instruction falls through to its first.)
    #[inline(always)]
    fn free_port(&self, tables: &impl AddrTables<A>, preferred: Be16) -> Be16 {
        let mut closed = match self.try_port(tables, preferred) {
            Port::Free => return preferred,
            Port::Closed => preferred,
            Port::Taken => NONE,
        };
        let Some(config) = tables.config() else { return NONE };
        let hash = flow_hash(self.tuple, config.hash_seed);
        for attempt in 0..CLIENT_PORT_ATTEMPTS {
            let other = Be16::new(other_port(hash, attempt));
            match self.try_port(tables, other) {
                Port::Free => return other,
                Port::Closed => closed = other,
                Port::Taken => {}
            }
        }
        closed
    }

    /// Whether the task may see the client under a port.
    #[inline(always)]
    fn try_port(&self, tables: &impl AddrTables<A>, client_port: Be16) -> Port {
        match find(tables, &self.reply_key(client_port)) {
            None => Port::Free,
            Some(other) if self.is_own_or_void(&other.flow, self.chosen.backend.incarnation) => Port::Free,
            Some(other) if other.flow.flags & FLOW_CLOSED != 0 => Port::Closed,
            Some(_) => Port::Taken,
        }
    }

    /// Whether an entry in the place of this flow's replies is that of the same flow, or of a former tenant.
    #[inline(always)]
    fn is_own_or_void(&self, other: &Flow<A>, incarnation: u32) -> bool {
        let Tuple { dst, dst_port, src_port, .. } = *self.tuple;
        let own = other.addr == dst && other.port == dst_port && other.client_port == src_port;
        own || other.kind != FlowKind::MESH_REPLY || other.incarnation != incarnation
    }
}

/// Writes one direction of a flow that begins. It must not be hidden by an established one of a former tenant.
#[inline(always)]
pub fn begin<A: Family>(tables: &impl AddrTables<A>, key: &FlowKey<A>, flow: &Flow<A>) {
    tables.remove_flow(key, Stage::Established);
    tables.insert_flow(key, flow, Stage::Opening);
}
