//! What comes in by an uplink: published ports, and the guard of the VXLAN port.
//!
//! XDP and TC share [`decide`]. XDP carries out only what leaves again by an uplink: [`Decision::Remote`], and mesh
//! replies among [`Decision::Tunnel`]. Whatever else is decided, TC decides again from the same tables.

use mesh_common::addr::Address as _;
use mesh_common::be::Be16;
use mesh_common::counter::Counter;
use mesh_common::hash::{Tuple, path_entropy};
use mesh_common::map::{
    BACKEND_DRAINING, Config, FLOW_DIRECT, Flow, FlowKey, PROTO_TCP, PROTO_UDP, PortKey, SERVICE_DIRECT,
    SERVICE_ENCRYPTED, Sent, Service,
};
use mesh_common::vxlan::VNI_MESH_REQUEST;

use crate::balance::{self, Admission, Chosen};
use crate::family::Family;
use crate::flow::{self, Found, MeshFlow};
use crate::header::{IP_OFFSET, Ipv6};
use crate::mesh::{self, Errand};
use crate::packet::Packet;
use crate::parse::Parsed;
use crate::related::Quote;
use crate::tables::{AddrTables, Stage};
use crate::translation::{Parts, Work};
use crate::verdict::Verdict;

/// What becomes of a packet that came in by an uplink.
// A tag of its own: Linux 6.1's verifier knows nothing of a byte that is put together with others by an OR, as the tag would
// be that `Known` has anyway, and takes one variant for another.
#[repr(C, u32)]
#[derive(Clone, Copy, Debug)]
pub enum Decision<'t, A> {
    /// Not the mesh's.
    Pass,
    /// Dropped, and why; answered, where the sender can be told.
    Refuse(Counter),
    /// VXLAN from another node: for the VXLAN device, unless XDP can do with it what that would.
    Tunnel,
    /// For a task of another node.
    Remote(Remote),
    /// For a task of this node: see [`mesh::deliver`].
    Local(Local<'t, A>),
    /// Amid a connection that isn't known here, although the service's table leads here: for the node with this peer slot.
    Search(Remote),
}

/// A mesh request for a task of another node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Remote {
    /// The node: a peer's slot.
    pub peer: u32,
    /// What the inner frame says.
    pub errand: Errand,
    /// What the flow's outer source port is made of.
    pub entropy: u16,
    /// DSCP and ECN of the packet.
    pub tos: u8,
}

/// A mesh request for a task of this node.
#[derive(Clone, Copy, Debug)]
pub struct Local<'t, A> {
    /// The flow.
    pub flow: MeshFlow<'t, A>,
    /// What the flow table knows of it.
    pub known: Known,
}

/// What the flow table knows of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Known {
    /// All of it.
    AsItIs {
        /// How far it is.
        stage: Stage,
        /// Its stamp.
        stamp: u32,
        /// The client's port as the task sees it.
        client_port: Be16,
    },
    /// All of it, but it is to be written otherwise: it comes by another ingress node, or that one is to be taught.
    Otherwise {
        /// How far it is.
        stage: Stage,
        /// The client's port as the task sees it.
        client_port: Be16,
    },
    /// Nothing that is of use: it begins.
    Begins {
        /// The client's port, if the task can see it under this one.
        client_port: Be16,
    },
}

impl Known {
    /// What was found; `as_it_is` says whether it may stay so.
    #[inline(always)]
    pub fn as_found<A>(found: &Found<A>, as_it_is: bool) -> Self {
        let Found { flow: Flow { stamp, client_port, .. }, stage } = *found;
        if as_it_is {
            Self::AsItIs { stage, stamp, client_port }
        } else {
            Self::Otherwise { stage, client_port }
        }
    }
}

/// Decides on a packet that came in by an uplink; remembers the flow of one that goes on to another node.
#[inline(always)]
pub fn decide<'t, A: Family>(
    tables: &'t impl AddrTables<A>,
    config: &Config,
    parsed: &Parsed<A>,
    tuple: &'t Tuple<A>,
) -> Decision<'t, A> {
    // (An error about VXLAN is the stack's.)
    if tuple.protocol == PROTO_UDP
        && tuple.dst_port == config.vxlan_port
        && !parsed.is_error()
        && tables.is_local(&tuple.dst)
    {
        return match tables.member(&tuple.src.to_ip6()) {
            Some(_) => Decision::Tunnel,
            None => Decision::Refuse(Counter::DropNotMember),
        };
    }
    published(tables, config, parsed, tuple, |addr| tables.is_local(addr))
}

/// Decides on a packet that may be for a published port, if `answers` on the address that it dials.
#[inline(always)]
pub fn published<'t, A: Family>(
    tables: &'t impl AddrTables<A>,
    config: &Config,
    parsed: &Parsed<A>,
    tuple: &'t Tuple<A>,
    answers: impl Fn(&A) -> bool,
) -> Decision<'t, A> {
    let key = FlowKey::new(tuple, VNI_MESH_REQUEST);
    let opens = parsed.opens();
    // The usual case for another node's task.
    let sent = tables.sent(&key);
    if !opens
        && let Some(sent) = sent
        && let Some(chosen) = balance::bound(tables, sent.backend, sent.incarnation)
        && chosen.backend.peer != 0
        && !flow::is_idle(tables, tuple.protocol, sent.stamp)
    {
        if tuple.protocol == PROTO_UDP && sent.stamp != tables.now_s() {
            tables.insert_sent(&key, &Sent { stamp: tables.now_s(), ..sent });
        }
        return remote(config, parsed, tuple, chosen);
    }
    // The usual case for a task of this node.
    let found = flow::find_at(tables, &key, Stage::Established);
    if let Some(local) = found.and_then(|found| known(tables, tuple, parsed, found)) {
        return Decision::Local(local);
    }
    let Some(port) = tables.port(&PortKey::new::<A>(tuple.protocol, tuple.dst_port)) else {
        return Decision::Pass;
    };
    // An error may be about a reply that went straight to its client, under another node's address.
    if !parsed.is_error() && !answers(&tuple.dst) {
        return Decision::Pass;
    }
    if let Some(local) = flow::find_late(tables, &key).and_then(|found| known(tables, tuple, parsed, found)) {
        return Decision::Local(local);
    }
    // An error begins no flow.
    if parsed.is_error() {
        return Decision::Pass;
    }
    let Some(service) = tables.service(port.service) else {
        return Decision::Refuse(Counter::DropNoBackend);
    };
    match balance::admit(tables, port.service, service, tuple) {
        Admission::Admitted => {}
        Admission::Refused => return Decision::Refuse(Counter::DropSourceRefused),
        Admission::NotHere => return Decision::Pass,
    }
    let Some(chosen) = balance::choose(tables, service, tuple, config.hash_seed) else {
        return Decision::Refuse(Counter::DropNoBackend);
    };
    // Nothing is stored for a SYN: the segments after it lead to the same backend. A connection under the same ports before
    // it must not lead them elsewhere.
    if opens && sent.is_some_and(|sent| sent.incarnation != chosen.backend.incarnation) {
        tables.remove_sent(&key);
    }
    if chosen.backend.peer != 0 {
        if !opens && packet_may_be_remembered(parsed) {
            let stamp = if tuple.protocol == PROTO_UDP { tables.now_s() } else { 0 };
            let incarnation = chosen.backend.incarnation;
            tables.insert_sent(&key, &Sent { backend: chosen.slot, incarnation, stamp });
        }
        return remote(config, parsed, tuple, chosen);
    }
    if tuple.protocol == PROTO_TCP && !opens {
        return search(tables, config, parsed, tuple, service, chosen);
    }
    let direct = is_direct(tables, config, service, tuple);
    let flags = if direct { FLOW_DIRECT } else { 0 };
    let flow = MeshFlow { tuple, chosen, target: port.target, peer: 0, flags };
    Decision::Local(Local { flow, known: Known::Begins { client_port: tuple.src_port } })
}

/// Whether a packet says enough of its flow: a TCP segment that isn't its end.
#[inline(always)]
fn packet_may_be_remembered<A: Family>(parsed: &Parsed<A>) -> bool {
    parsed.protocol != PROTO_TCP || parsed.is_midstream()
}

/// Whether replies to a client go straight to it. Clients on a node of the cluster are known under addresses that mean
/// something only there.
#[inline(always)]
pub fn is_direct<A: Family>(
    tables: &impl AddrTables<A>,
    config: &Config,
    service: &Service,
    tuple: &Tuple<A>,
) -> bool {
    let host = A::host(config);
    service.flags & SERVICE_DIRECT != 0
        && tuple.dst != host.mesh
        && !tuple.src.is_in(host.alias_net, host.alias_mask)
        // This node itself, which dialled another one: no route leads from here to it.
        && !tables.is_local(&tuple.src)
}

/// The flow to a task of this node that was found in the flow tables; `None` if it is a void one.
#[inline(always)]
fn known<'t, A: Family>(
    tables: &'t impl AddrTables<A>,
    tuple: &'t Tuple<A>,
    parsed: &Parsed<A>,
    found: Found<A>,
) -> Option<Local<'t, A>> {
    let chosen = flow::backend_here(tables, tuple.protocol, &found)?;
    let flow = MeshFlow { tuple, chosen, target: found.flow.port, peer: 0, flags: found.flow.flags };
    if parsed.opens() && flow.may_begin_anew(tables, &found) {
        if chosen.backend.flags & BACKEND_DRAINING != 0 {
            return None;
        }
        return Some(Local { flow, known: Known::Begins { client_port: found.flow.client_port } });
    }
    // The client's packets may have come in by another node before; errors come from anywhere.
    let as_it_is = found.flow.peer == 0 || parsed.is_error();
    Some(Local { flow, known: Known::as_found(&found, as_it_is) })
}

#[inline(always)]
fn remote<'t, A: Family>(
    config: &Config,
    parsed: &Parsed<A>,
    tuple: &Tuple<A>,
    chosen: Chosen<'t, A>,
) -> Decision<'t, A> {
    let errand = Errand { incarnation: chosen.backend.incarnation, asked: 0, ingress: config.tag };
    Decision::Remote(Remote {
        peer: chosen.backend.peer,
        errand,
        entropy: path_entropy(tuple),
        tos: parsed.tos,
    })
}

/// A TCP segment for a task of this node that knows nothing of it: its connection may be with a task of another node,
/// from before the service's table changed.
#[inline(always)]
fn search<'t, A: Family>(
    tables: &'t impl AddrTables<A>,
    config: &Config,
    parsed: &Parsed<A>,
    tuple: &Tuple<A>,
    service: &Service,
    chosen: Chosen<'t, A>,
) -> Decision<'t, A> {
    // Replies are to be encrypted as requests are.
    let encrypted = service.flags & SERVICE_ENCRYPTED != 0;
    let ingress = if encrypted { config.wireguard_tag } else { config.tag };
    let errand = Errand { incarnation: chosen.backend.incarnation, asked: 1, ingress };
    let peer = mesh::next_node(tables, service, 0);
    if peer == 0 || !parsed.is_midstream() {
        return Decision::Refuse(Counter::DropFlowGone);
    }
    Decision::Search(Remote { peer, errand, entropy: path_entropy(tuple), tos: parsed.tos })
}

/// Whether an IPv6 packet bears an address of WireGuard's network. From an uplink, the stack would take it for decrypted,
/// fragments and what can't be parsed here included.
#[inline(always)]
pub fn claims_wireguard(packet: &impl Packet) -> bool {
    packet.load::<Ipv6>(IP_OFFSET).is_some_and(|ip| { ip.src }.is_wireguard() || { ip.dst }.is_wireguard())
}

/// Decides on a packet that came in by an uplink, once it is read: all that TC does.
#[inline(always)]
pub fn from_uplink<A: Quote>(packet: &impl Packet, tables: &impl AddrTables<A>, work: &mut Work<A>) {
    let Parts { parsed, tuple, plan, .. } = work.parts();
    plan.end(Verdict::PASS);
    let Some(config) = tables.config() else {
        return;
    };
    let Some(tuple) = tuple else {
        return;
    };
    let decision = decide(tables, config, parsed, tuple);
    mesh::plan(packet, tables, parsed, &tuple.src, decision, plan);
}
