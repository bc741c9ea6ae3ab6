//! Carrying out what was decided about a published port's packet: to a task of this node, to another node, or back.

use mesh_common::addr::{backend_mac, backend_of};
use mesh_common::be::Be16;
use mesh_common::counter::Counter;
use mesh_common::hash::Tuple;
use mesh_common::map::{
    BUDGET_SEARCHES, Config, FlowKey, PROTO_TCP, PROTO_UDP, Peer, PortKey, SEARCH_MAX, Sent, Service, TaskKey,
};
use mesh_common::vxlan::{VNI_MESH_REQUEST, mtu_overhead_bytes};

use crate::answer::{Answer, Back};
use crate::family::Family;
use crate::flow;
use crate::fragment;
use crate::header::{Ethernet, IP_OFFSET, Tcp, Udp};
use crate::host;
use crate::packet::Packet;
use crate::parse::Parsed;
use crate::related::Quote;
use crate::tables::{AddrTables, Tables};
use crate::translation::{Frame, Parts, Plan, Work};
use crate::uplink::{Decision, Known, Local, Remote, published};
use crate::verdict::{Action, Verdict};

/// What the inner Ethernet header of a mesh request says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errand {
    /// The chosen backend.
    pub incarnation: u32,
    /// How many nodes have been asked for the packet's flow before.
    pub asked: u8,
    /// The ingress node: [`tag_of`](mesh_common::map::tag_of) its VTEP, or its address in WireGuard. Says nothing while nobody
    /// has been asked: then it is the sender.
    pub ingress: u32,
}

/// First byte of an Ethernet address that was not given out by a manufacturer.
const LOCALLY_ADMINISTERED: u8 = 0x02;

impl Errand {
    /// The Ethernet header that says it.
    #[inline(always)]
    pub fn frame(&self, ethertype: Be16) -> Ethernet {
        let [a, b, c, d] = self.ingress.to_be_bytes();
        let src = [LOCALLY_ADMINISTERED, self.asked, a, b, c, d];
        Ethernet { dst: backend_mac(self.incarnation), src, ethertype }
    }

    /// What an Ethernet header says; `None` if it isn't that of a mesh request.
    #[inline(always)]
    pub fn read(ethernet: &Ethernet) -> Option<Self> {
        let [_, asked, a, b, c, d] = ethernet.src;
        Some(Self {
            incarnation: backend_of(ethernet.dst)?,
            asked,
            ingress: u32::from_be_bytes([a, b, c, d]),
        })
    }
}

/// Plans what was decided about a packet, whose sender the mesh knows as `client`.
#[inline(always)]
pub fn plan<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    parsed: &Parsed<A>,
    client: &A,
    decision: Decision<'_, A>,
    plan: &mut Plan<A>,
) {
    let (remote, counter) = match decision {
        Decision::Pass | Decision::Tunnel => return plan.end(Verdict::PASS),
        Decision::Refuse(reason) => return plan.end(refuse(reason)),
        Decision::Local(local) => return deliver(packet, tables, parsed, &local, plan),
        Decision::Remote(remote) => (remote, Counter::MeshForwarded),
        Decision::Search(remote) if tables.spend(BUDGET_SEARCHES) => (remote, Counter::MeshSearched),
        Decision::Search(_) => return plan.end(refuse(Counter::DropFlowGone)),
    };
    plan.translation.src = *client;
    send(packet, tables, parsed, &remote, counter, plan);
}

/// Drops a packet, and has its sender told where it is one who asked for what isn't there.
#[inline(always)]
fn refuse(reason: Counter) -> Verdict {
    match reason {
        Counter::DropNoBackend | Counter::DropFlowGone => {
            Verdict::answer(reason, Answer::Nobody { back: Back::Reflect })
        }
        _ => Verdict::drop(reason),
    }
}

/// Addresses a mesh request to its backend, and says where it goes.
#[inline(always)]
pub fn send<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    parsed: &Parsed<A>,
    remote: &Remote,
    counter: Counter,
    plan: &mut Plan<A>,
) {
    if let Some(mtu) = too_big(packet, tables, parsed, remote.peer) {
        return plan.end(Verdict::answer(Counter::DropTooBig, Answer::TooBig { mtu }));
    }
    let Remote { peer, tos, errand, .. } = *remote;
    let mut frame = errand.frame(A::ETHERTYPE);
    // Who has been asked, and for which ingress node, is said where somebody has.
    if errand.asked == 0 {
        frame.src = fragment::source(parsed, plan.translation.ports, frame.src);
    }
    let action = Action::Tunnel { vni: VNI_MESH_REQUEST, peer, tos };
    plan.go(Frame::given(frame), Verdict::new(action, counter));
}

/// The largest packet that the way to a node carries in VXLAN, if this one is larger and may not be fragmented.
#[inline(always)]
pub fn too_big<A: Family>(
    packet: &impl Packet,
    tables: &impl Tables,
    parsed: &Parsed<A>,
    peer: u32,
) -> Option<u16> {
    let Peer { mtu, vtep, .. } = *tables.peer(peer)?;
    // Not known yet; or a packet that the stack below may fragment.
    if mtu == 0 || !parsed.whole_only {
        return None;
    }
    let limit = u32::from(mtu).saturating_sub(mtu_overhead_bytes(vtep.family()));
    (largest(packet, parsed) > limit).then_some(limit as u16)
}

/// What becomes of a packet for a client that the way there, which begins with an interface and carries `mtu` bytes, is too
/// narrow for; `None` if it is not.
///
/// One that may be fragmented is refused only if the interface's link, whose MTU `link_mtu` asks for, does not carry it
/// either: routers fragment it, and nobody does before them.
#[inline(always)]
pub fn too_big_beyond<A: Family>(
    packet: &impl Packet,
    parsed: &Parsed<A>,
    (ifindex, mtu): (u32, u16),
    link_mtu: impl FnOnce() -> Option<u32>,
) -> Option<Verdict> {
    // Whatever it is cut into is no longer than it.
    if packet.len() <= u32::from(mtu) + IP_OFFSET as u32 {
        return None;
    }
    let largest = largest(packet, parsed);
    let carries = if parsed.whole_only { u32::from(mtu) } else { link_mtu()? };
    (largest > carries).then_some(Verdict::answer(Counter::DropTooBig, Answer::TooBigBeyond { mtu, ifindex }))
}

/// Bytes of the largest IP packet that a packet will be on the wire: it may be cut into segments yet.
#[inline(always)]
fn largest<A: Family>(packet: &impl Packet, parsed: &Parsed<A>) -> u32 {
    let segment = packet.segment_len();
    if segment == 0 {
        return packet.len() - IP_OFFSET as u32;
    }
    let header = match packet.load::<Tcp>(parsed.l4_offset) {
        Some(tcp) if parsed.protocol == PROTO_TCP => u32::from(tcp.data_offset >> 4) * 4,
        _ => Udp::LEN as u32,
    };
    (parsed.l4_offset - IP_OFFSET) as u32 + header + segment
}

/// Delivers a mesh request to a task of this node, and remembers both directions of its flow.
#[inline(always)]
pub fn deliver<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    parsed: &Parsed<A>,
    local: &Local<'_, A>,
    plan: &mut Plan<A>,
) {
    let Local { flow, known } = *local;
    let client_port = match known {
        Known::AsItIs { stage, stamp, client_port } => {
            let reply_key = flow.reply_key(client_port);
            flow::note_request(packet, tables, parsed, &flow.key(), &reply_key, stage, stamp);
            client_port
        }
        Known::Otherwise { stage, client_port } => {
            flow.amend(tables, stage, client_port);
            client_port
        }
        Known::Begins { client_port } => match flow.remember(tables, client_port) {
            Some(client_port) => client_port,
            None => return plan.end(Verdict::drop(Counter::DropPortsTaken)),
        },
    };
    let backend = flow.chosen.backend;
    plan.translation.set_src(flow.tuple.src, client_port);
    plan.translation.set_dst(backend.addr, flow.target);
    plan.go(Frame::ENDPOINTS, Verdict::deliver(backend.ifindex, Counter::MeshDelivered));
}

/// Peer slot of the node after this one among those that have backends of `service`; 0 if all have been asked, `asked` of
/// them before this one, or if this one is not among them.
#[inline(always)]
pub fn next_node(tables: &impl Tables, service: &Service, asked: u8) -> u32 {
    let nodes = service.nodes;
    if u32::from(asked) + 1 >= nodes || asked >= SEARCH_MAX {
        return 0;
    }
    node_after_this(tables, service.start.wrapping_add(service.len), nodes)
}

/// Peer slot of the node after this one among the `nodes` nodes from a place on: they are in the same order everywhere,
/// this one as 0.
#[inline(never)]
fn node_after_this(tables: &impl Tables, first: u32, nodes: u32) -> u32 {
    for i in 0..NODES_MAX {
        if i >= nodes {
            break;
        }
        if tables.place(first.wrapping_add(i)) == Some(0) {
            let next = if i + 1 == nodes { 0 } else { i + 1 };
            return tables.place(first.wrapping_add(next)).unwrap_or_default();
        }
    }
    0
}

/// How many nodes of a service are looked through for this one.
const NODES_MAX: u32 = 32;

/// A published port that one of this node's tasks dialled by one of the node's addresses ([`Action::Dial`]): the mesh knows
/// the task by its alias.
#[inline(always)]
pub fn dial<A: Quote>(packet: &impl Packet, tables: &impl AddrTables<A>, ifindex: u32, work: &mut Work<A>) {
    let Parts { parsed, tuple, plan, .. } = work.parts();
    plan.end(Verdict::drop(Counter::DropNotReady));
    let Some(config) = tables.config() else {
        return;
    };
    let Some(iface) = tables.iface(ifindex) else {
        return;
    };
    from_client(packet, tables, config, parsed, tuple, &iface.alias, plan);
}

/// A published port dialled on this node by one of its own processes or tasks, which the mesh knows as `client`.
#[inline(always)]
pub fn from_client<A: Quote>(
    packet: &impl Packet,
    tables: &impl AddrTables<A>,
    config: &Config,
    parsed: &Parsed<A>,
    tuple: Option<&Tuple<A>>,
    client: &A,
    to: &mut Plan<A>,
) {
    let Some(tuple) = tuple else {
        return to.end(Verdict::drop(Counter::DropProtocol));
    };
    let tuple = Tuple { src: *client, ..*tuple };
    let decision = published(tables, config, parsed, &tuple, |_| true);
    if let Decision::Pass | Decision::Tunnel = decision {
        return to.end(Verdict::drop(Counter::DropNotPublished));
    }
    plan(packet, tables, parsed, client, decision, to);
}

/// Hands a reply, whose ends are planned, to the client: by the host's routes, or to a process or task of this node.
#[inline(always)]
pub fn to_client<A: Quote>(tables: &impl AddrTables<A>, config: &Config, frame: Frame, plan: &mut Plan<A>) {
    let host = A::host(config);
    if plan.translation.src == host.mesh {
        host::to_process(config, plan);
    } else if plan.translation.dst.is_in(host.alias_net, host.alias_mask) {
        host::to_alias(tables, plan);
    } else {
        plan.go(frame, Verdict::new(Action::Route, Counter::MeshReplied));
    }
}

/// Learns from a mesh reply which teaches where the flow's requests are to go.
#[inline(always)]
pub fn learn<A: Family>(tables: &impl AddrTables<A>, parsed: &Parsed<A>, incarnation: u32) -> Option<()> {
    let tuple = parsed.tuple()?.reversed();
    let port = tables.port(&PortKey::new::<A>(tuple.protocol, tuple.dst_port))?;
    let vni = tables.service(port.service)?.vni;
    let backend = tables.task(&TaskKey { incarnation, vni })?.backend;
    let stamp = if tuple.protocol == PROTO_UDP { tables.now_s() } else { 0 };
    tables.insert_sent(&FlowKey::new(&tuple, VNI_MESH_REQUEST), &Sent { backend, incarnation, stamp });
    Some(())
}
