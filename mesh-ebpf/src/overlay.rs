//! What comes out of the VXLAN device: mesh requests, mesh replies, and overlay packets from other nodes' tasks.

use mesh_common::addr::{Address as _, Ip6, backend_of};
use mesh_common::counter::Counter;
use mesh_common::hash::{Tuple, path_entropy};
use mesh_common::map::{
    AddrKey, BACKEND_ENCRYPTED, BUDGET_SEARCHES, Config, FLOW_DIRECT, FLOW_TEACH, FlowKey, FlowKind,
    PROTO_TCP, PortKey, SEARCH_MAX, SERVICE_ENCRYPTED, Service, TaskKey, tag_of,
};
use mesh_common::vxlan::{VNI_MESH_REPLY, VNI_MESH_REQUEST, VNI_NETWORK_MIN};

use crate::answer::{Answer, Back};
use crate::balance::{self, Chosen};
use crate::flow::{self, Found, MeshFlow};
use crate::header::Ethernet;
use crate::mesh::{self, Errand};
use crate::packet::Packet;
use crate::parse::{Fragment, Parsed, parse_ethernet};
use crate::related::Quote;
use crate::tables::{AddrTables, Tables};
use crate::translation::{Frame, Parts, Plan, Work};
use crate::uplink::{Known, Local, Remote, is_direct};
use crate::verdict::Verdict;

/// How a packet came through the tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrival {
    /// The VNI.
    pub vni: u32,
    /// Source address of the outer header, IPv4 in its mapped form.
    pub vtep: Ip6,
}

/// Decides on a mesh request, once it is read.
#[inline(always)]
pub fn from_ingress<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    arrival: &Arrival,
    work: &mut Work<A>,
) {
    work.be_told(packet);
    let Parts { parsed, tuple, plan, .. } = work.parts();
    match Sender::of(packet, tables, arrival) {
        Ok(sender) => mesh_request(packet, tables, parsed, tuple, &sender, plan),
        Err(reason) => plan.end(Verdict::drop(reason)),
    }
}

/// Decides on any other packet from another node, once it is read.
#[inline(always)]
pub fn from_backend<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    arrival: &Arrival,
    work: &mut Work<A>,
) {
    work.be_told(packet);
    let Parts { parsed, ends, tuple, plan } = work.parts();
    let sender = match Sender::of(packet, tables, arrival) {
        Ok(sender) => sender,
        Err(reason) => return plan.end(Verdict::drop(reason)),
    };
    match arrival.vni {
        VNI_MESH_REPLY => mesh_reply(tables, &sender, parsed, &ends.0, plan),
        VNI_NETWORK_MIN.. => overlay(packet, tables, parsed, ends, tuple, &sender, plan),
        _ => plan.end(Verdict::drop(Counter::DropUnknownVni)),
    }
}

/// The node that a packet comes from.
struct Sender<'t> {
    config: &'t Config,
    /// The VNI that it sent the packet with.
    vni: u32,
    /// Its peer slot.
    peer: u32,
    /// The address that it sent the packet from.
    vtep: Ip6,
    /// The packet's Ethernet header.
    ethernet: Ethernet,
}

impl<'t> Sender<'t> {
    #[inline(always)]
    fn of(packet: &impl Packet, tables: &'t impl Tables, arrival: &Arrival) -> Result<Self, Counter> {
        let Arrival { vni, vtep } = *arrival;
        let config = tables.config().ok_or(Counter::DropNotReady)?;
        let peer = tables.member(&vtep).ok_or(Counter::DropNotMember)?;
        let ethernet = parse_ethernet(packet).map_err(|_| Counter::DropMalformed)?;
        Ok(Self { config, vni, peer, vtep, ethernet })
    }
}

/// A published-port packet from its ingress node, or from one that was asked before, for a task of this node.
#[inline(always)]
fn mesh_request<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    parsed: &Parsed<A>,
    tuple: Option<&Tuple<A>>,
    sender: &Sender<'_>,
    plan: &mut Plan<A>,
) {
    let Sender { config, peer, vtep, ref ethernet, .. } = *sender;
    let encrypted = vtep.is_wireguard();
    let Some(mut errand) = Errand::read(ethernet) else {
        return plan.end(Verdict::drop(Counter::DropMalformed));
    };
    if errand.asked == 0 {
        errand.ingress = tag_of(vtep);
    }
    let ingress = match errand {
        Errand { asked: 0, .. } => Some(peer),
        // The packet went in a circle.
        Errand { ingress, .. } if ingress == config.tag || ingress == config.wireguard_tag => Some(0),
        Errand { ingress, .. } => tables.tagged(ingress),
    };
    let Some(ingress) = ingress else {
        return plan.end(Verdict::drop(Counter::DropNotMember));
    };
    let Some(tuple) = tuple else {
        let unknown = parsed.fragment == Fragment::Later;
        let reason = if unknown { Counter::DropFragment } else { Counter::DropProtocol };
        return plan.end(Verdict::drop(reason));
    };
    let request = Request { config, parsed, tuple, errand, ingress, encrypted };
    let found = flow::find(tables, &FlowKey::new(tuple, VNI_MESH_REQUEST));
    let bound = found.and_then(|found| {
        let chosen = flow::backend_here(tables, tuple.protocol, &found)?;
        Some((found, chosen))
    });
    if bound.is_some_and(|(_, chosen)| chosen.backend.flags & BACKEND_ENCRYPTED != 0) && !encrypted {
        return plan.end(Verdict::drop(Counter::DropCleartext));
    }
    let known = bound.and_then(|(found, chosen)| request.known(tables, &found, chosen));
    let local = match known {
        Some(local) => local,
        None => match request.new_flow(tables) {
            Ok(local) => local,
            Err(Unserved::Dropped(reason)) => return plan.end(Verdict::drop(reason)),
            Err(Unserved::Unknown(service)) => return request.search(packet, tables, service, plan),
            Err(Unserved::Elsewhere(chosen)) => return request.pass_on(packet, tables, chosen, plan),
        },
    };
    mesh::deliver(packet, tables, parsed, &local, plan);
}

/// Why a mesh request is not delivered here.
enum Unserved<'t, A> {
    /// It is to be dropped.
    Dropped(Counter),
    /// It is amid a connection to this service that isn't known here.
    Unknown(&'t Service),
    /// The task that it is for is gone; this one, of another node, can serve it.
    Elsewhere(Chosen<'t, A>),
}

/// A mesh request.
struct Request<'c, A> {
    config: &'c Config,
    parsed: &'c Parsed<A>,
    tuple: &'c Tuple<A>,
    errand: Errand,
    /// The ingress node's peer slot; 0: this node.
    ingress: u32,
    /// Whether it came through WireGuard.
    encrypted: bool,
}

impl<'c, A: Quote> Request<'c, A> {
    /// The request's flow as the flow table has it; `None` if it begins a connection anew, on another task.
    #[inline(always)]
    fn known<'t>(
        &self,
        tables: &'t impl AddrTables<A>,
        found: &Found<A>,
        chosen: Chosen<'t, A>,
    ) -> Option<Local<'t, A>>
    where
        'c: 't,
    {
        let direct = found.flow.flags & FLOW_DIRECT;
        let looked_for = self.looked_for();
        let flow = MeshFlow {
            tuple: self.tuple,
            chosen,
            target: found.flow.port,
            peer: self.ingress,
            flags: direct | looked_for,
        };
        if self.parsed.opens() && flow.may_begin_anew(tables, found) {
            let same = chosen.backend.incarnation == self.errand.incarnation;
            return same
                .then_some(Local { flow, known: Known::Begins { client_port: found.flow.client_port } });
        }
        // The flow may have moved to another ingress node; and that one may have learned where its packets go.
        let by_it = found.flow.peer == self.ingress && found.flow.flags & FLOW_TEACH == looked_for;
        let as_it_is = by_it || self.parsed.is_error();
        Some(Local { flow, known: Known::as_found(found, as_it_is) })
    }

    /// The flow that the request begins.
    #[inline(always)]
    fn new_flow<'t>(&self, tables: &'t impl AddrTables<A>) -> Result<Local<'t, A>, Unserved<'t, A>>
    where
        'c: 't,
    {
        let Self { config, parsed, tuple, ingress, encrypted, .. } = *self;
        if parsed.is_error() {
            return Err(Unserved::Dropped(Counter::DropUnrelated));
        }
        let port = tables.port(&PortKey::new::<A>(tuple.protocol, tuple.dst_port));
        let Some(port) = port else {
            return Err(Unserved::Dropped(Counter::DropNotPublished));
        };
        let Some(service) = tables.service(port.service) else {
            return Err(Unserved::Dropped(Counter::DropNotPublished));
        };
        if service.flags & SERVICE_ENCRYPTED != 0 && !encrypted {
            return Err(Unserved::Dropped(Counter::DropCleartext));
        }
        if tuple.protocol == PROTO_TCP && !parsed.opens() {
            return Err(Unserved::Unknown(service));
        }
        let meant = self.meant(tables, port.service, service);
        // The ingress node's table and this one's may differ for a moment.
        let Some(chosen) = meant.or_else(|| balance::choose(tables, service, tuple, config.hash_seed)) else {
            return Err(Unserved::Dropped(Counter::DropBackendGone));
        };
        if chosen.backend.peer != 0 {
            return Err(Unserved::Elsewhere(chosen));
        }
        let direct = if is_direct(tables, config, service, tuple) { FLOW_DIRECT } else { 0 };
        let flags = direct | self.looked_for();
        let flow = MeshFlow { tuple, chosen, target: port.target, peer: ingress, flags };
        Ok(Local { flow, known: Known::Begins { client_port: tuple.src_port } })
    }

    /// `FLOW_TEACH` if the ingress node sent the packet to another node at first.
    #[inline(always)]
    fn looked_for(&self) -> u8 {
        if self.errand.asked > 0 { FLOW_TEACH } else { 0 }
    }

    /// The backend of the service on this node that the ingress node meant.
    #[inline(always)]
    fn meant<'t>(
        &self,
        tables: &'t impl AddrTables<A>,
        slot: u32,
        service: &Service,
    ) -> Option<Chosen<'t, A>> {
        let incarnation = self.errand.incarnation;
        let task = tables.task(&TaskKey { incarnation, vni: service.vni })?;
        if task.service != slot {
            return None;
        }
        balance::bound(tables, task.backend, incarnation).filter(|chosen| chosen.backend.peer == 0)
    }

    /// A packet that begins a flow with a task that is gone: to the one that this node's table gives.
    #[inline(always)]
    fn pass_on(
        &self,
        packet: &impl Packet,
        tables: &impl AddrTables<A>,
        chosen: Chosen<'_, A>,
        plan: &mut Plan<A>,
    ) {
        let Self { parsed, tuple, errand, .. } = self;
        if errand.asked >= SEARCH_MAX || !tables.spend(BUDGET_SEARCHES) {
            return plan.end(Verdict::drop(Counter::DropBackendGone));
        }
        let incarnation = chosen.backend.incarnation;
        let errand = Errand { asked: errand.asked + 1, incarnation, ..*errand };
        let remote =
            Remote { peer: chosen.backend.peer, errand, entropy: path_entropy(tuple), tos: parsed.tos };
        mesh::send(packet, tables, parsed, &remote, Counter::MeshSearched, plan);
    }

    /// A segment of a connection that isn't known here: on to the next node, or back with a reset if all were asked.
    #[inline(always)]
    fn search(
        &self,
        packet: &impl Packet,
        tables: &impl AddrTables<A>,
        service: &Service,
        plan: &mut Plan<A>,
    ) {
        let Self { parsed, tuple, errand, ingress, .. } = self;
        let peer = mesh::next_node(tables, service, errand.asked);
        if peer == 0 || !parsed.is_midstream() {
            let back = Back::Client { peer: *ingress };
            return plan.end(Verdict::answer(Counter::DropFlowGone, Answer::Nobody { back }));
        }
        let errand = Errand { asked: errand.asked + 1, ..*errand };
        let remote = Remote { peer, errand, entropy: path_entropy(tuple), tos: parsed.tos };
        mesh::send(packet, tables, parsed, &remote, Counter::MeshSearched, plan);
    }
}

/// A reply from the backend's node, to be handed to the client under the address that it dialled here, or an error that
/// the backend's node sends as `src`.
#[inline(always)]
fn mesh_reply<A: Quote>(
    tables: &impl AddrTables<A>,
    sender: &Sender<'_>,
    parsed: &Parsed<A>,
    src: &A,
    plan: &mut Plan<A>,
) {
    let Sender { config, ref ethernet, .. } = *sender;
    if !tables.is_local(src) && *src != A::host(config).mesh {
        return plan.end(Verdict::drop(Counter::DropReplyNotLocal));
    }
    if let Some(incarnation) = backend_of(ethernet.src) {
        // Without it, the next request is looked for again.
        let _ = mesh::learn(tables, parsed, incarnation);
    }
    mesh::to_client(tables, config, Frame::KEPT, plan);
}

/// A packet from a task of another node to one of this node, between these `ends`.
#[inline(always)]
fn overlay<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    parsed: &Parsed<A>,
    (src, dst): &(A, A),
    tuple: Option<&Tuple<A>>,
    sender: &Sender<'_>,
    plan: &mut Plan<A>,
) {
    let Sender { vni, peer, vtep, ref ethernet, .. } = *sender;
    let source = tables.endpoint(&AddrKey { vni, addr: *src });
    if source.is_none_or(|source| source.peer != peer) {
        let way = source.and_then(|source| tables.peer(source.peer));
        let bare = !vtep.is_wireguard() && way.is_some_and(|way| way.vtep.is_wireguard());
        let reason = if bare { Counter::DropCleartext } else { Counter::DropForeignSource };
        return plan.end(Verdict::drop(reason));
    }
    let meant = backend_of(ethernet.dst);
    let here = tables.endpoint(&AddrKey { vni, addr: *dst }).filter(|endpoint| endpoint.peer == 0);
    let Some(destination) = here.filter(|endpoint| meant == Some(endpoint.incarnation)) else {
        let reason = if here.is_some() { Counter::DropMoved } else { Counter::DropNoEndpoint };
        return plan.end(match meant {
            Some(_) => Verdict::answer(reason, Answer::NotHere { vni, peer }),
            None => Verdict::drop(reason),
        });
    };
    // A backend's reply, or its error about a request, is the VIP's.
    if let Some(tuple) = tuple {
        let key = FlowKey::new(tuple, vni);
        if let Some(found) = flow::find(tables, &key)
            && found.flow.kind == FlowKind::VIP_REPLY
        {
            flow::note_reply(packet, tables, parsed, &key, &found);
            plan.translation.set_src(found.flow.addr, found.flow.port);
        }
    }
    plan.go(Frame::ENDPOINTS, Verdict::deliver(destination.ifindex, Counter::OverlayDelivered));
}
