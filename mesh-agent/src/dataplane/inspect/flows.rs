//! The flows that the programs know, of both families: an entry of a table becomes a row that says who talks to whom.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use mesh_common::be::Be16;
use mesh_common::map::{
    AddrKey, Backend, Endpoint, FLOW_CLOSED, FLOW_DIRECT, FLOW_TEACH, Flow, FlowKey, FlowKind, PROTO_UDP,
    Port, PortKey, Sent,
};
pub use mesh_common::map::{PROTO_TCP as TCP, PROTO_UDP as UDP};
use mesh_common::vxlan::VNI_MESH_REQUEST;
use serde::{Serialize, Serializer};

use super::{Live, Side, protocol_name};
use crate::dataplane::error::DataplaneError;
use crate::sys::clock::monotonic_s;

/// Which table an entry is in, and so how far its flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowStage {
    /// Only one side has been heard, or nobody has confirmed what it said.
    Opening,
    /// Both sides agree to it.
    Established,
    /// Its packets go on to another node, which knows how far it is.
    Sent,
}

/// A word that is no [`FlowStage`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown stage {0:?}: use opening, established or sent")]
pub struct UnknownStage(String);

impl FlowStage {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Sent => "sent",
        }
    }
}

impl FromStr for FlowStage {
    type Err = UnknownStage;

    fn from_str(text: &str) -> Result<Self, UnknownStage> {
        let all = [Self::Opening, Self::Established, Self::Sent];
        all.into_iter().find(|stage| stage.name() == text).ok_or_else(|| UnknownStage(text.to_owned()))
    }
}

/// What an entry describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind(pub FlowKind);

impl Kind {
    /// Towards a task.
    pub const REQUEST: Self = Self(FlowKind::TO_BACKEND);

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self.0 {
            FlowKind::TO_BACKEND => "request",
            FlowKind::TO_SELF => "request-to-self",
            FlowKind::MESH_REPLY => "mesh-reply",
            FlowKind::VIP_REPLY => "vip-reply",
            FlowKind::SELF_REPLY => "reply-to-self",
            _ => "unknown",
        }
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// An entry of a table of flows: one direction of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct FlowRow {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The network; 1: a published port.
    pub vni: u32,
    /// How far the flow is.
    pub stage: FlowStage,
    /// Which direction of what.
    pub kind: Kind,
    /// Who dialled.
    pub client: SocketAddr,
    /// What the client dialled.
    pub dialled: SocketAddr,
    /// The task that answers, and the port it listens on; `None` if it is gone.
    pub task: Option<SocketAddr>,
    /// The VXLAN address of the task's node; `None`: this node.
    pub node: Option<IpAddr>,
    /// The VXLAN address of the node that the client dialled; `None`: this node, or not known.
    pub ingress: Option<IpAddr>,
    /// The port that the task sees the client under, if it is another than the client's own.
    pub seen_port: Option<u16>,
    /// The backend has closed the connection.
    pub closed: bool,
    /// Replies leave from the task's node.
    pub direct: bool,
    /// The ingress node is to be told the right node.
    pub teach: bool,
    /// The entry's task is gone: the next packet chooses anew, or is refused.
    pub void: bool,
    /// UDP: how long the flow has been silent, s.
    pub idle_s: Option<u32>,
}

/// An address, or an address and a port, that flows are looked for by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowEnd {
    /// The address.
    pub addr: IpAddr,
    /// The port; `None`: any.
    pub port: Option<u16>,
}

/// What is neither an address nor an address and a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address: use 192.0.2.1, 192.0.2.1:80, 2001:db8::1 or [2001:db8::1]:80")]
pub struct NoEnd(String);

impl FromStr for FlowEnd {
    type Err = NoEnd;

    fn from_str(text: &str) -> Result<Self, NoEnd> {
        if let Ok(addr) = text.parse() {
            return Ok(Self { addr, port: None });
        }
        let end: SocketAddr = text.parse().map_err(|_| NoEnd(text.to_owned()))?;
        Ok(Self { addr: end.ip(), port: Some(end.port()) })
    }
}

impl FlowEnd {
    fn is(&self, end: SocketAddr) -> bool {
        self.addr == end.ip() && self.port.is_none_or(|port| port == end.port())
    }
}

impl fmt::Display for FlowEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}", SocketAddr::new(self.addr, port)),
            None => write!(f, "{}", self.addr),
        }
    }
}

/// Which flows are looked for; all conditions must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Who dialled.
    pub client: Option<FlowEnd>,
    /// What was dialled.
    pub dialled: Option<FlowEnd>,
    /// The task's address.
    pub task: Option<FlowEnd>,
    /// The network; 1 for published ports.
    pub vni: Option<u32>,
    /// How far the flow is. Without it, an opening entry whose flow is established by now is left out.
    pub stage: Option<FlowStage>,
}

impl FlowFilter {
    /// Whether an entry with this protocol and VNI may be looked for.
    fn may_be(&self, protocol: u8, vni: u32) -> bool {
        self.protocol.is_none_or(|wanted| wanted == protocol) && self.vni.is_none_or(|wanted| wanted == vni)
    }

    fn is(&self, row: &FlowRow) -> bool {
        self.client.is_none_or(|wanted| wanted.is(row.client))
            && self.dialled.is_none_or(|wanted| wanted.is(row.dialled))
            && self.task.is_none_or(|wanted| row.task.is_some_and(|task| wanted.is(task)))
    }
}

/// How many entries match a filter, and how many of those were handed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Entries that match.
    pub matching: u64,
    /// Entries that were handed over.
    pub shown: u64,
}

impl Live {
    /// Hands the entries that match to `each`, at most `limit` of them, in no order. Entries are read a few thousand at a
    /// time; none are kept.
    pub fn flows(
        &self,
        filter: &FlowFilter,
        limit: u64,
        mut each: impl FnMut(FlowRow),
    ) -> Result<Seen, DataplaneError> {
        let mut sieve =
            Sieve { live: self, filter, limit, now_s: monotonic_s(), seen: Seen::default(), failed: None };
        sieve.family::<mesh_common::be::Be32>(&mut each)?;
        sieve.family::<mesh_common::addr::Ip6>(&mut each)?;
        match sieve.failed {
            Some(error) => Err(error),
            None => Ok(sieve.seen),
        }
    }
}

/// What is let through on the way from tables to rows.
struct Sieve<'l> {
    live: &'l Live,
    filter: &'l FlowFilter,
    limit: u64,
    now_s: u32,
    seen: Seen,
    failed: Option<DataplaneError>,
}

impl Sieve<'_> {
    fn family<A: Side>(&mut self, each: &mut impl FnMut(FlowRow)) -> Result<(), DataplaneError> {
        let maps = A::maps(self.live);
        let wants = |stage| self.filter.stage.is_none_or(|wanted| wanted == stage);
        let (opening, established, sent) =
            (wants(FlowStage::Opening), wants(FlowStage::Established), wants(FlowStage::Sent));
        if opening {
            maps.opening.read(|key: FlowKey<A>, flow: Flow<A>| {
                // It stays when its flow is established, until others need its place.
                let is_past =
                    established && maps.flows.get::<_, Flow<A>>(&key).is_ok_and(|flow| flow.is_some());
                if !is_past {
                    self.let_through(key, each, |live, now_s| {
                        of_flow(live, now_s, &key, &flow, FlowStage::Opening)
                    });
                }
            })?;
        }
        if established {
            maps.flows.read(|key: FlowKey<A>, flow: Flow<A>| {
                self.let_through(key, each, |live, now_s| {
                    of_flow(live, now_s, &key, &flow, FlowStage::Established)
                });
            })?;
        }
        if sent {
            maps.sent.read(|key: FlowKey<A>, sent: Sent| {
                self.let_through(key, each, |live, now_s| of_sent(live, now_s, &key, &sent));
            })?;
        }
        Ok(())
    }

    fn let_through<A: Side>(
        &mut self,
        key: FlowKey<A>,
        each: &mut impl FnMut(FlowRow),
        row: impl FnOnce(&Live, u32) -> Result<FlowRow, DataplaneError>,
    ) {
        if !self.filter.may_be(key.protocol(), key.vni()) {
            return;
        }
        match row(self.live, self.now_s) {
            Ok(row) if self.filter.is(&row) => {
                self.seen.matching += 1;
                if self.seen.shown < self.limit {
                    self.seen.shown += 1;
                    each(row);
                }
            }
            Ok(_) => {}
            Err(error) => self.failed = Some(error),
        }
    }
}

fn end<A: Side>(addr: A, port: Be16) -> SocketAddr {
    SocketAddr::new(addr.ip(), port.get())
}

/// The backend in a slot, if it is still the one with this incarnation.
fn backend_of<A: Side>(
    live: &Live,
    slot: u32,
    incarnation: u32,
) -> Result<Option<Backend<A>>, DataplaneError> {
    let backend: Option<Backend<A>> = A::maps(live).backends.get(&slot)?;
    Ok(backend.filter(|backend| backend.incarnation == incarnation && incarnation != 0))
}

/// The row of an entry of `shoal_opening4/6` or `shoal_flows4/6`.
fn of_flow<A: Side>(
    live: &Live,
    now_s: u32,
    key: &FlowKey<A>,
    flow: &Flow<A>,
    stage: FlowStage,
) -> Result<FlowRow, DataplaneError> {
    let Flow { backend, incarnation, peer, stamp, addr, port, client_port, kind, flags, reserved: _ } = *flow;
    let (src, dst) = (end(key.src, key.src_port), end(key.dst, key.dst_port));
    let (client, dialled, task, node) = match kind {
        FlowKind::MESH_REPLY => (end(key.dst, client_port), end(addr, port), Some(src), 0),
        FlowKind::VIP_REPLY => {
            let endpoint: Option<Endpoint> =
                A::maps(live).endpoints.get(&AddrKey { vni: key.vni(), addr: key.src })?;
            let task = endpoint.map(|_| src);
            (dst, end(addr, port), task, endpoint.map_or(0, |endpoint| endpoint.peer))
        }
        FlowKind::SELF_REPLY => (end(key.src, key.dst_port), end(addr, port), Some(src), 0),
        _ => {
            let backend = backend_of::<A>(live, backend, incarnation)?;
            let task = backend.map(|backend| end(backend.addr, port));
            (src, dst, task, backend.map_or(0, |backend| backend.peer))
        }
    };
    // The port under which the task knows the client is part of one key, the client's own of the other.
    let seen_port = match kind {
        FlowKind::TO_BACKEND if key.vni() == VNI_MESH_REQUEST => Some(client_port),
        FlowKind::MESH_REPLY => Some(key.dst_port),
        _ => None,
    };
    let is_request = matches!(kind, FlowKind::TO_BACKEND | FlowKind::TO_SELF);
    let is_timed = key.protocol() == PROTO_UDP && (stage == FlowStage::Established || is_request);
    Ok(FlowRow {
        protocol: protocol_name(key.protocol()),
        vni: key.vni(),
        stage,
        kind: Kind(kind),
        client,
        dialled,
        task,
        node: live.node(node)?,
        ingress: live.node(peer)?,
        seen_port: seen_port.map(Be16::get).filter(|port| *port != client.port()),
        closed: flags & FLOW_CLOSED != 0,
        direct: flags & FLOW_DIRECT != 0,
        teach: flags & FLOW_TEACH != 0,
        void: task.is_none(),
        idle_s: is_timed.then(|| now_s.saturating_sub(stamp)),
    })
}

/// The row of an entry of `shoal_sent4/6`.
fn of_sent<A: Side>(
    live: &Live,
    now_s: u32,
    key: &FlowKey<A>,
    sent: &Sent,
) -> Result<FlowRow, DataplaneError> {
    let Sent { backend, incarnation, stamp } = *sent;
    let backend = backend_of::<A>(live, backend, incarnation)?;
    let port: Option<Port> = live.ports.get(&PortKey::new::<A>(key.protocol(), key.dst_port))?;
    let target = port.map_or(Be16::new(0), |port| port.target);
    Ok(FlowRow {
        protocol: protocol_name(key.protocol()),
        vni: key.vni(),
        stage: FlowStage::Sent,
        kind: Kind(FlowKind::TO_BACKEND),
        client: end(key.src, key.src_port),
        dialled: end(key.dst, key.dst_port),
        task: backend.map(|backend| end(backend.addr, target)),
        node: live.node(backend.map_or(0, |backend| backend.peer))?,
        ingress: None,
        seen_port: None,
        closed: false,
        direct: false,
        teach: false,
        void: backend.is_none(),
        idle_s: (key.protocol() == PROTO_UDP).then(|| now_s.saturating_sub(stamp)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> FlowRow {
        FlowRow {
            protocol: "tcp".to_owned(),
            vni: 1,
            stage: FlowStage::Established,
            kind: Kind(FlowKind::TO_BACKEND),
            client: "198.51.100.7:40000".parse().unwrap(),
            dialled: "192.0.2.1:8080".parse().unwrap(),
            task: Some("10.0.0.5:80".parse().unwrap()),
            node: None,
            ingress: None,
            seen_port: None,
            closed: false,
            direct: false,
            teach: false,
            void: false,
            idle_s: None,
        }
    }

    fn end(text: &str) -> FlowEnd {
        text.parse().unwrap()
    }

    #[test]
    fn ends_are_read_with_and_without_a_port() {
        for text in ["192.0.2.1", "192.0.2.1:80", "2001:db8::1", "[2001:db8::1]:80"] {
            assert_eq!(text.parse::<FlowEnd>().unwrap().to_string(), text);
        }
        for text in ["", "web", "192.0.2.1:", "192.0.2.1:99999", "2001:db8::1:80:zz"] {
            assert!(text.parse::<FlowEnd>().unwrap_err().to_string().contains("is no address"), "{text}");
        }
    }

    #[test]
    fn all_conditions_of_a_filter_must_hold() {
        let matching = FlowFilter {
            protocol: Some(6),
            client: Some(end("198.51.100.7")),
            dialled: Some(end("192.0.2.1:8080")),
            task: Some(end("10.0.0.5")),
            vni: Some(1),
            stage: None,
        };
        assert!(matching.may_be(6, 1) && matching.is(&row()));
        assert!(!matching.may_be(17, 1) && !matching.may_be(6, 4096));
        for other in [
            FlowFilter { client: Some(end("198.51.100.7:40001")), ..matching.clone() },
            FlowFilter { dialled: Some(end("192.0.2.2")), ..matching.clone() },
            FlowFilter { task: Some(end("10.0.0.5:81")), ..matching.clone() },
        ] {
            assert!(!other.is(&row()), "{other:?}");
        }
        assert!(!matching.is(&FlowRow { task: None, ..row() }));
        assert!(FlowFilter::default().is(&row()));
    }

    #[test]
    fn stages_and_kinds_have_words() {
        for stage in [FlowStage::Opening, FlowStage::Established, FlowStage::Sent] {
            assert_eq!(stage.name().parse(), Ok(stage));
        }
        assert!("closed".parse::<FlowStage>().is_err());
        let json = serde_json::to_value(row()).unwrap();
        assert_eq!((json["stage"].as_str(), json["kind"].as_str()), (Some("established"), Some("request")));
        assert_eq!(json["client"], "198.51.100.7:40000");
    }
}
