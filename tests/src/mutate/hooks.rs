//! The packet library at a hook, on tables that outlive the packet: flows and fragments of one packet meet the next.

use mesh_common::addr::Ip6;
use mesh_common::be::Be32;
use mesh_common::counter::Counter;
use mesh_common::map::Config;
use mesh_common::vxlan::VNI_MESH_REQUEST;
use mesh_datapath::encap::{decapsulate, encapsulate, fits, fits_unpacked, mesh_reply, reply_within};
use mesh_datapath::family::Family as _;
use mesh_datapath::header::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use mesh_datapath::overlay::{Arrival, from_backend, from_ingress};
use mesh_datapath::packet::{Fault, Packet as _};
use mesh_datapath::parse::{Fragment, Parsed, parse_ethernet};
use mesh_datapath::tables::{AddrTables, Tables as _};
use mesh_datapath::translation::{self, Work};
use mesh_datapath::uplink::{Decision, Remote, decide, from_uplink};
use mesh_datapath::verdict::{Action, Verdict};
use mesh_datapath::{answer, arp, host, mesh, neighbor, task};

use crate::packet::family::Side;
use crate::packet::host::Bytes;
use crate::packet::tables::HostTables;
use crate::packet::world::{CLIENT_ROUTE, LOOPBACK, World};
use crate::packet::{End, Hook};

/// A hook of a world, and the tables of its node.
#[derive(Debug)]
pub struct Node {
    hook: Hook,
    /// The node that packets of the tunnel come from.
    from: Ip6,
    tables: HostTables,
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Where it goes.
    pub end: End,
    /// What counted it; `None` for a packet that XDP leaves to TC.
    pub counter: Option<Counter>,
    /// What counted the answer that it has become.
    pub made: Option<Counter>,
}

impl Ended {
    const LEFT: Self = Self { end: End::XdpPass, counter: None, made: None };

    const fn by_xdp(end: End, counter: Counter) -> Self {
        Self { end, counter: Some(counter), made: None }
    }
}

impl Node {
    /// The node of `world` before its first packet.
    pub fn new(world: &World, hook: Hook) -> Self {
        let from = match hook {
            Hook::Overlay { from, .. } => world.vtep(from),
            _ => Ip6::default(),
        };
        Self { hook, from, tables: HostTables::new(world) }
    }

    /// The node's own facts.
    pub fn config(&self) -> Option<&Config> {
        self.tables.config()
    }

    /// Whether a peer has this slot.
    pub fn has_peer(&self, slot: u32) -> bool {
        self.tables.peer(slot).is_some()
    }

    /// Runs the hook on a packet.
    pub fn run(&self, packet: &mut Bytes) -> Ended {
        let ethertype = parse_ethernet(packet).map(|ethernet| ethernet.ethertype);
        let verdict = match (self.hook, ethertype) {
            (Hook::UplinkXdp, Ok(ETHERTYPE_IPV4)) => return self.xdp::<Be32>(packet),
            (Hook::UplinkXdp, Ok(ETHERTYPE_IPV6)) => return self.xdp::<Ip6>(packet),
            (Hook::UplinkXdp, _) => return Ended::LEFT,
            (Hook::Task(ifindex), _) => self.task(packet, ifindex),
            (_, Ok(ETHERTYPE_IPV4)) => self.ip::<Be32>(packet),
            (Hook::Host, Ok(ETHERTYPE_IPV6)) => {
                self.host_discovery(packet).unwrap_or_else(|| self.ip::<Ip6>(packet))
            }
            (_, Ok(ETHERTYPE_IPV6)) => self.ip::<Ip6>(packet),
            (Hook::Host, Ok(ETHERTYPE_ARP)) => arp::answer(packet, |addr| self.is_known_to_host(&addr)),
            (Hook::Uplink, _) => Verdict::PASS,
            (Hook::Host | Hook::Overlay { .. }, Ok(_)) => Verdict::drop(Counter::DropProtocol),
            (Hook::Host | Hook::Overlay { .. }, Err(_)) => Verdict::drop(Counter::DropMalformed),
        };
        Ended { end: End::Tc(verdict.action()), counter: Some(verdict.counter), made: verdict.made() }
    }

    fn task(&self, packet: &mut Bytes, ifindex: u32) -> Verdict {
        match task::classify(packet, &self.tables, ifindex) {
            task::Sent::Ipv4 => self.ip::<Be32>(packet),
            task::Sent::Ipv6 => task::answer_discovery(packet, &self.tables, ifindex)
                .unwrap_or_else(|| self.ip::<Ip6>(packet)),
            task::Sent::Arp => task::answer_arp(packet, &self.tables, ifindex),
            task::Sent::Refused(reason) => Verdict::drop(reason),
        }
    }

    fn ip<A: Side>(&self, packet: &mut Bytes) -> Verdict {
        let malformed = Verdict::drop(Counter::DropMalformed);
        let (vni, otherwise) = match self.hook {
            Hook::Uplink | Hook::UplinkXdp => (VNI_MESH_REQUEST, Verdict::PASS),
            Hook::Host => (VNI_MESH_REQUEST, malformed),
            Hook::Task(ifindex) => {
                let iface = AddrTables::<Be32>::iface(&self.tables, ifindex);
                (iface.map_or(0, |iface| iface.vni), malformed)
            }
            Hook::Overlay { vni, .. } => (vni, malformed),
        };
        let Ok(parsed) = A::parse(packet) else { return otherwise };
        let mut work = Work::new(parsed);
        if work.read(packet, &self.tables, vni, otherwise).is_ok() {
            self.decide(packet, &mut work);
        }
        let mut verdict = translation::apply(packet, &work);
        if let (Action::Dial, Hook::Task(ifindex)) = (verdict.action(), self.hook) {
            mesh::dial(packet, &self.tables, ifindex, &mut work);
            verdict = translation::apply(packet, &work);
        }
        match verdict.action() {
            Action::Answer(answer) => answer::make::<A, _>(packet, &self.tables, verdict.counter, answer),
            _ => verdict,
        }
    }

    fn decide<A: Side>(&self, packet: &Bytes, work: &mut Work<A>) {
        let tables = &self.tables;
        match self.hook {
            Hook::Uplink | Hook::UplinkXdp => from_uplink(packet, tables, work),
            Hook::Host => host::from_host(packet, tables, work),
            Hook::Task(ifindex) => task::from_task(packet, tables, ifindex, work),
            Hook::Overlay { vni, .. } => {
                let arrival = Arrival { vni, vtep: self.from };
                if vni == VNI_MESH_REQUEST {
                    from_ingress(packet, tables, &arrival, work);
                } else {
                    from_backend(packet, tables, &arrival, work);
                }
            }
        }
    }

    /// Answers the host's neighbour discovery; `None` for any other packet.
    fn host_discovery(&self, packet: &mut Bytes) -> Option<Verdict> {
        let parsed = Ip6::parse(packet).ok()?;
        let concerns = neighbor::concerns(packet, &parsed);
        concerns
            .then(|| neighbor::answer(packet, &parsed, Ip6::default(), |addr| self.is_known_to_host(addr)))
    }

    fn is_known_to_host<A: Side>(&self, addr: &A) -> bool {
        self.tables.alias(addr).is_some() || self.config().is_some_and(|config| A::host(config).mesh == *addr)
    }

    fn xdp<A: Side>(&self, packet: &mut Bytes) -> Ended {
        let (Some(config), Ok(parsed)) = (self.config(), A::parse(packet)) else { return Ended::LEFT };
        if parsed.fragment != Fragment::Whole {
            return Ended::LEFT;
        }
        let Some(tuple) = parsed.tuple() else { return Ended::LEFT };
        match decide::<A>(&self.tables, config, &parsed, &tuple) {
            Decision::Remote(remote) => self.xdp_forward::<A>(packet, config, &remote),
            Decision::Tunnel => self.xdp_reply(packet, config, &parsed),
            Decision::Refuse(reason @ (Counter::DropNotMember | Counter::DropSourceRefused)) => {
                Ended::by_xdp(End::XdpDrop, reason)
            }
            Decision::Pass | Decision::Local(_) | Decision::Search(_) | Decision::Refuse(_) => Ended::LEFT,
        }
    }

    fn xdp_forward<A: Side>(&self, packet: &mut Bytes, config: &Config, remote: &Remote) -> Ended {
        let Some(peer) = self.tables.peer(remote.peer) else { return Ended::LEFT };
        let family = if peer.vtep.to_mapped().is_some() { 4 } else { 6 };
        if peer.expires_ns == 0 || !fits(packet.len(), peer.mtu, family) {
            return Ended::LEFT;
        }
        let end = if peer.ifindex == LOOPBACK { End::XdpTx } else { End::XdpRedirect };
        match encapsulate::<A, _>(packet, config, peer, remote) {
            Err(Fault) => Ended::by_xdp(End::XdpDrop, Counter::DropRewriteFailed),
            Ok(()) => Ended::by_xdp(end, Counter::MeshForwarded),
        }
    }

    fn xdp_reply<O: Side>(&self, packet: &mut Bytes, config: &Config, outer: &Parsed<O>) -> Ended {
        match reply_within(packet, outer) {
            Some((ETHERTYPE_IPV4, around)) => self.xdp_reply_of::<Be32>(packet, config, around),
            Some((ETHERTYPE_IPV6, around)) => self.xdp_reply_of::<Ip6>(packet, config, around),
            Some(_) | None => Ended::LEFT,
        }
    }

    /// A mesh reply; the way to every client is that to `world::CLIENT`.
    fn xdp_reply_of<A: Side>(&self, packet: &mut Bytes, config: &Config, around: usize) -> Ended {
        let reply = mesh_reply::<A>(packet, &self.tables, config, around);
        if reply.is_none() || !fits_unpacked(packet.len(), around, CLIENT_ROUTE.mtu) {
            return Ended::LEFT;
        }
        match decapsulate::<A, _>(packet, around, CLIENT_ROUTE.next_hop, CLIENT_ROUTE.source) {
            Err(Fault) => Ended::by_xdp(End::XdpDrop, Counter::DropRewriteFailed),
            Ok(()) => Ended::by_xdp(End::XdpRedirect, Counter::MeshReplied),
        }
    }
}
