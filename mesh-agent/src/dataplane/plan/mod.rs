//! What the dataplane is to hold: a pure function of the table and of this node's own facts.
//!
//! The plan comes in fragments, one a service, so that a change of one is planned without the others. It speaks of
//! tasks and nodes by what they are; numbers come in [`layout`](super::layout), so that plans can be compared, and
//! tested, without any.

mod local;
mod service;
mod task;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::table::{NetworkRecord, NodeRecord, NodeState, ServiceRecord, Table};
use mesh_common::addr::Ip6;
use mesh_common::be::{Be16, Be32};
use mesh_common::map::PortKey;

pub use self::local::{ALIAS6_NET, LocalFamily, LocalPlan, plan_local};
use self::service::plan_balancers;
pub use self::task::Places;
use super::sorted::Sorted;
use super::touched::Touched;

/// This node's own facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// The node.
    pub node: NodeId,
    /// Its VXLAN address.
    pub vtep: IpAddr,
    /// Its address in WireGuard, if it has one: where what is encrypted is sent from.
    pub wireguard: Option<Ipv6Addr>,
    /// Every address that published ports answer on, of both families.
    pub addresses: Vec<IpAddr>,
    /// The attachments of its running tasks.
    pub endpoints: Vec<LocalEndpoint>,
    /// Other nodes' attachments that are not there, whatever the table says. What changes of them is to be touched.
    pub absent: BTreeSet<AttachmentKey>,
    /// VXLAN addresses of other nodes that don't answer. What changes of their tasks is to be touched.
    pub silent: BTreeSet<IpAddr>,
    /// VXLAN addresses of those that do; one that has never answered is of neither kind. What changes of the tasks of a node
    /// that is down is to be touched.
    pub answering: BTreeSet<IpAddr>,
}

/// An attachment of a task of this node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalEndpoint {
    /// The task.
    pub task: TaskId,
    /// The network.
    pub network: NetworkId,
    /// The task's address in it; that of IPv6 follows from it.
    pub addr: Ipv4Addr,
    /// Host side of the interface.
    pub ifindex: u32,
    /// The node-local address that the host knows the endpoint by; that of IPv6 follows from it.
    pub alias: Ipv4Addr,
}

/// One of a service's balancers: one a network, and one for what is published in host mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BalancerKey {
    /// The VNI of the network.
    pub vni: u32,
    /// Which of the service's tasks.
    pub scope: PublishScope,
}

/// Which tasks a balancer chooses from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PublishScope {
    /// All of the service's.
    Cluster,
    /// This node's: a port published in host mode.
    Node,
}

/// A balancer, but for its backends: those are the service's [`Attachment`]s in its network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BalancerPlan {
    /// VIP.
    pub vip4: Option<Be32>,
    /// The same, IPv6.
    pub vip6: Option<Ip6>,
    /// Published ports of both families, and the port that tasks listen on.
    pub ports: Sorted<PortKey, Be16>,
    /// `SERVICE_…`.
    pub flags: u32,
    /// Ranges of clients and whether they are let in, all that there is to say about each family; empty: no rules.
    pub sources: RulePlan,
    /// Ranges of this node's addresses and whether they answer, likewise.
    pub addresses: RulePlan,
}

/// Ranges of addresses, and the verdict on each; the longest prefix counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RulePlan {
    /// IPv4: prefix length and network.
    pub v4: Sorted<(u8, Be32), u32>,
    /// IPv6.
    pub v6: Sorted<(u8, Ip6), u32>,
}

/// A task, and one of the networks that it is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentKey {
    /// The task's incarnation.
    pub incarnation: u32,
    /// The VNI of the network.
    pub vni: u32,
}

/// A task in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts of which none follows from the others")]
pub struct Attachment {
    /// Its address.
    pub addr: Be32,
    /// The same, IPv6.
    pub addr6: Option<Ip6>,
    /// Where it is.
    pub place: Place,
    /// Whether packets to its address go through WireGuard.
    pub encrypted: bool,
    /// Whether what its service balances to it does.
    pub encrypted_backend: bool,
    /// Its part in its service's balancing.
    pub part: Part,
    /// Whether its node doesn't answer: it gets no new flows while its service has others, who do.
    pub silent: bool,
    /// Whether it is the task's first: what ports in host mode lead to.
    pub first: bool,
}

/// A task's part in its service's balancing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// None: it can be reached by its own address.
    None,
    /// It keeps the flows that it has.
    Draining,
    /// It gets new flows, as many as its weight says beside the others'.
    Serving {
        /// From 1 up.
        weight: u8,
    },
}

/// Where an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On this node, behind an interface.
    Here {
        /// Host side of the interface.
        ifindex: u32,
    },
    /// On the node with this VTEP.
    There(IpAddr),
}

/// A way to another node: what the programs know as a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey {
    /// The node's VTEP.
    pub vtep: IpAddr,
    /// Whether the way is through WireGuard.
    pub encrypted: bool,
}

/// What one service and its tasks contribute. Tasks outlive their service's record while they are drained.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fragment {
    /// Its balancers.
    pub balancers: Sorted<BalancerKey, BalancerPlan>,
    /// Its tasks' attachments.
    pub attachments: Sorted<AttachmentKey, Attachment>,
}

/// All of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// This node's VTEP.
    pub vtep: IpAddr,
    /// The ways to the other nodes, each with the addresses that VXLAN comes from on it: the first is where it is sent.
    pub peers: BTreeMap<PeerKey, Vec<IpAddr>>,
    /// What is this node's own.
    pub local: LocalPlan,
    /// What the services contribute.
    pub fragments: BTreeMap<ServiceId, Fragment>,
}

/// The plan for the node with the facts `local` under `table`. Records that refer to something the table doesn't
/// hold (yet) are left out.
pub fn plan(table: &Table, local: &Local) -> Plan {
    let places = Places::new(table, local);
    let mut attachments: HashMap<&ServiceId, Vec<(AttachmentKey, Attachment)>> = HashMap::new();
    for task in table.tasks.values() {
        attachments.entry(&task.service).or_default().extend(places.plan_task(task));
    }
    let mut fragments = BTreeMap::new();
    for (id, service) in &table.services {
        let attachments = attachments.remove(id).unwrap_or_default();
        fragments.insert(id.clone(), Fragment::new(table, local, Some(service), attachments));
    }
    for (id, attachments) in attachments {
        fragments.insert(id.clone(), Fragment::new(table, local, None, attachments));
    }
    fragments.retain(|_, fragment| !fragment.is_empty());
    Plan { vtep: local.vtep, peers: peers(table, local), local: plan_local(table, local), fragments }
}

/// The ways to the other nodes.
pub fn peers(table: &Table, local: &Local) -> BTreeMap<PeerKey, Vec<IpAddr>> {
    let mut peers = BTreeMap::<_, Vec<_>>::new();
    // A host that left and joined again has an older record under the same address.
    let mut nodes: Vec<_> = table.nodes.values().filter(|node| node.vtep != local.vtep).collect();
    nodes.sort_by_key(|node| node.state == NodeState::Down);
    for NodeRecord { vtep, wireguard, .. } in nodes {
        peers.insert(PeerKey { vtep: *vtep, encrypted: false }, vec![*vtep]);
        if !wireguard.is_empty() {
            let addresses = wireguard.iter().map(|identity| IpAddr::V6(identity.address()));
            peers.entry(PeerKey { vtep: *vtep, encrypted: true }).or_default().extend(addresses);
        }
    }
    peers
}

/// Whether nodes send each other in cleartext nothing of a service that is on the networks `of_service`, in `network`.
///
/// What is published comes by the ingress network, and is as secret there as in the service's own.
fn is_encrypted<'a>(
    table: &Table,
    network: &NetworkRecord,
    mut of_service: impl Iterator<Item = &'a NetworkId>,
) -> bool {
    let encrypted = |id| table.networks.get(id).is_some_and(|network| network.encrypted);
    network.encrypted || network.ingress && of_service.any(encrypted)
}

impl Fragment {
    /// What a service with these attachments contributes.
    pub fn new(
        table: &Table,
        local: &Local,
        service: Option<&ServiceRecord>,
        attachments: impl IntoIterator<Item = (AttachmentKey, Attachment)>,
    ) -> Self {
        let attachments = attachments.into_iter().collect();
        let balancers = service.map(|service| plan_balancers(table, local, service, &attachments));
        Self { balancers: balancers.unwrap_or_default(), attachments }
    }

    /// Plans again what `touched` names of the service `id`, of which this is the plan so far.
    #[must_use]
    pub fn changed(
        &self,
        table: &Table,
        local: &Local,
        places: &Places<'_>,
        touched: &Touched,
        id: &ServiceId,
    ) -> Self {
        let tasks: BTreeMap<u32, &TaskId> = touched
            .tasks
            .get(id)
            .into_iter()
            .flatten()
            .map(|(task, incarnation)| (*incarnation, task))
            .collect();
        let kept = self.attachments.iter().filter(|(key, _)| !tasks.contains_key(&key.incarnation));
        let records = tasks.values().filter_map(|task| table.tasks.get(task));
        let planned = records.filter(|task| task.service == *id).flat_map(|task| places.plan_task(task));
        let attachments = kept.map(|(key, attachment)| (*key, *attachment)).chain(planned);
        Self::new(table, local, table.services.get(id), attachments)
    }

    /// Whether nothing is left of the service.
    pub fn is_empty(&self) -> bool {
        self.balancers.is_empty() && self.attachments.is_empty()
    }

    /// The backends that a balancer gives new flows to, with their weights.
    pub fn serving(&self, balancer: BalancerKey) -> impl Iterator<Item = (AttachmentKey, &Attachment, u8)> {
        let avoids_silent = self.avoids_silent(balancer);
        self.candidates(balancer).filter(move |(_, attachment, _)| !(avoids_silent && attachment.silent))
    }

    /// Where a balancer's backends are, those that drain included; and whether the way there is through WireGuard. A search
    /// for a flow would end at a node that doesn't answer: where new flows avoid it, so does that.
    pub fn places(&self, balancer: BalancerKey) -> impl Iterator<Item = (Place, bool)> {
        let avoids_silent = self.avoids_silent(balancer);
        let backends = self.attachments.iter().filter(move |(key, attachment)| {
            attachment.part != Part::None
                && attachment.is_of(**key, balancer)
                && !(avoids_silent && attachment.silent)
        });
        backends.map(|(_, attachment)| (attachment.place, attachment.encrypted_backend))
    }

    /// The backends that keep the connections that they have, and get nothing else, because their nodes don't answer.
    pub fn avoided(&self) -> impl Iterator<Item = AttachmentKey> {
        let silent = self.attachments.iter().filter(|(_, attachment)| attachment.silent);
        let avoided = silent.filter(|(key, attachment)| {
            let balancer = BalancerKey { vni: key.vni, scope: PublishScope::Cluster };
            attachment.part != Part::None && self.avoids_silent(balancer)
        });
        avoided.map(|(key, _)| *key)
    }

    /// Whether a balancer does without the backends on nodes that don't answer: only where it has others.
    fn avoids_silent(&self, balancer: BalancerKey) -> bool {
        self.candidates(balancer).any(|(_, attachment, _)| !attachment.silent)
    }

    /// The backends that a balancer gives new flows to if all nodes answer, with their weights.
    fn candidates(&self, balancer: BalancerKey) -> impl Iterator<Item = (AttachmentKey, &Attachment, u8)> {
        self.attachments.iter().filter_map(move |(key, attachment)| match attachment.part {
            Part::Serving { weight } if attachment.is_of(*key, balancer) => Some((*key, attachment, weight)),
            _ => None,
        })
    }
}

impl Attachment {
    /// Whether a balancer chooses from those like this one.
    fn is_of(&self, key: AttachmentKey, balancer: BalancerKey) -> bool {
        key.vni == balancer.vni
            && match balancer.scope {
                PublishScope::Cluster => true,
                PublishScope::Node => self.first && matches!(self.place, Place::Here { .. }),
            }
    }
}
