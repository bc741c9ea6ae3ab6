//! The table as agents see it: a projection of the replicated state, and the deltas that keep a copy current.
//!
//! Every agent holds all of it, since every node answers for every published port and forwards to every endpoint.
//! Only what runs a task ([`TaskSpec`]) goes to the task's own node alone.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::id::{ClusterId, NetworkId, NodeId, ServiceId, TaskId};
use crate::wireguard::WireguardIdentity;

/// A copy of the table at one table index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// The table index that this copy reflects.
    pub index: u64,
    /// The cluster's own record.
    pub cluster: ClusterRecord,
    /// Nodes by id.
    pub nodes: BTreeMap<NodeId, NodeRecord>,
    /// Networks by id.
    pub networks: BTreeMap<NetworkId, NetworkRecord>,
    /// Services by id.
    #[serde(deserialize_with = "compact")]
    pub services: BTreeMap<ServiceId, ServiceRecord>,
    /// Tasks by id. Tasks that ended and whose node has confirmed it are not in the table.
    #[serde(deserialize_with = "compact")]
    pub tasks: BTreeMap<TaskId, TaskRecord>,
}

/// Reads a map at once: one that is filled entry by entry takes twice the memory.
fn compact<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Ord + Deserialize<'de>,
    V: Deserialize<'de>,
{
    struct Entries<K, V>(PhantomData<(K, V)>);

    impl<'de, K: Deserialize<'de>, V: Deserialize<'de>> Visitor<'de> for Entries<K, V> {
        type Value = Vec<(K, V)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    deserializer.deserialize_map(Entries(PhantomData)).map(BTreeMap::from_iter)
}

/// What holds for the whole cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The cluster's id.
    pub id: ClusterId,
    /// Seed of the flow hash: the same on every node, so that all choose the same backend, and unknown outside.
    pub hash_seed: u64,
    /// UDP port of the overlay's VXLAN (`--data-path-port`, default 4789).
    pub data_path_port: u16,
    /// How replies to clients of published ports return, where a service doesn't say.
    pub return_path: ReturnPath,
    /// How often an operator asked for new WireGuard keys (`shoal network rotate-keys`): a node replaces those that it made
    /// while this was less.
    #[serde(default)]
    pub key_epoch: u64,
}

/// How a reply to a client of a published port returns from another node than the client dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReturnPath {
    /// By the node that the client dialled. Asks nothing of the underlay.
    #[default]
    Tunnel,
    /// Straight from the task's node, under the dialled address, which the underlay must let pass.
    Direct,
}

/// Manager or worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Keeps the replicated state, and runs tasks as well.
    Manager,
    /// Runs tasks.
    Worker,
}

/// Whether the managers hear from a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Known from the store, not heard from since the manager started.
    Unknown,
    /// Its session is up.
    Ready,
    /// Its session ended, or its heartbeats stopped.
    Down,
}

/// A host in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The node's id.
    pub id: NodeId,
    /// Its host name.
    pub hostname: String,
    /// Manager or worker, as it is to be.
    pub role: Role,
    /// Its VXLAN address on the underlay, of the cluster's one address family there.
    pub vtep: IpAddr,
    /// Whether the managers hear from it.
    pub state: NodeState,
    /// What others reach it by inside of WireGuard, as in [`crate::session::NodeDescription::wireguard`].
    #[serde(default)]
    pub wireguard: Vec<WireguardIdentity>,
    /// Where agents dial its manager, where one runs: also one that is to be none, until the others do without it.
    #[serde(default)]
    pub manager: Option<SocketAddr>,
}

/// An overlay network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// The network's id.
    pub id: NetworkId,
    /// Its name.
    pub name: String,
    /// Its VXLAN identifier, 24 bits, from 4096 up.
    pub vni: u32,
    /// Its IPv4 subnets.
    pub subnets: Vec<SubnetRecord>,
    /// Its IPv6 subnet, if it has one.
    pub subnet6: Option<Subnet6Record>,
    /// No way out of the network.
    pub internal: bool,
    /// The routing mesh's own network, which published ports deliver through.
    pub ingress: bool,
    /// The most that its links carry, bytes (`--opt com.docker.network.driver.mtu`): a bound on what each node finds that
    /// its underlay lets through. `None` for no other bound than that.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Its packets cross the underlay inside of WireGuard alone (`--opt encrypted`).
    #[serde(default)]
    pub encrypted: bool,
}

/// A subnet of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetRecord {
    /// The subnet in CIDR form.
    pub cidr: Ipv4Net,
    /// The address that every node answers for: DNS, and the way out.
    pub gateway: Ipv4Addr,
}

/// The IPv6 subnet of a network. Nothing is allocated in it: see [`Subnet6Record::addr_of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet6Record {
    /// The subnet in CIDR form; its prefix has at most [`Subnet6Record::PREFIX_LEN_MAX`] bits.
    pub cidr: Ipv6Net,
    /// The address that every node answers for: the way out.
    pub gateway: Ipv6Addr,
}

impl Subnet6Record {
    /// The longest prefix that leaves room for an IPv4 address.
    pub const PREFIX_LEN_MAX: u8 = 96;

    /// The IPv6 address of the endpoint, VIP or gateway at `addr`: the subnet's prefix, with `addr` as the lowest 32 bits.
    pub fn addr_of(&self, addr: Ipv4Addr) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.cidr.network().to_bits() | u128::from(addr.to_bits()))
    }
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Where a published port answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublishMode {
    /// On every node.
    Ingress,
    /// On the node of each task, for that task.
    Host,
}

/// A published port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRecord {
    /// Its name, by which DNS knows it beside its number; mostly empty.
    #[serde(default)]
    pub name: Box<str>,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port that tasks listen on.
    pub target: u16,
    /// The port that nodes answer on.
    pub published: u16,
    /// Every node, or the task's own.
    pub mode: PublishMode,
}

/// How a service's name resolves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointMode {
    /// To its VIP.
    Vip,
    /// To its tasks' addresses.
    Dnsrr,
}

/// A service, or what gives an attachment its names: a record with the attachment's id, in mode `dnsrr`, without ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// The service's id.
    pub id: ServiceId,
    /// Its name.
    pub name: String,
    /// The stack that it was deployed with (label `com.docker.stack.namespace`); empty for none.
    #[serde(default)]
    pub stack: Box<str>,
    /// How its name resolves.
    pub endpoint_mode: EndpointMode,
    /// Its VIP in each of its networks (the ingress network among them, where ports are published).
    pub vips: Vec<VipRecord>,
    /// Its published ports.
    pub ports: Vec<PortRecord>,
    /// How flows are balanced over its tasks.
    pub balancing: BalancingRecord,
}

/// How flows to a service are balanced over its tasks, and which are let in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BalancingRecord {
    /// How replies to clients of its published ports return.
    pub return_path: ReturnPath,
    /// What keeps a client with one task.
    pub affinity: Affinity,
    /// Clients of its published ports, by source address; empty: all. The longest matching prefix decides; where none
    /// matches, a client is let in if nothing is allowed expressly.
    pub sources: Vec<SourceRule>,
    /// The nodes' addresses that its published ports answer on; empty: all.
    pub publish_addresses: Vec<IpNet>,
    /// The nodes that its ports in ingress mode answer on; `None`: all.
    pub publish_nodes: Option<Vec<NodeId>>,
}

/// What keeps a client with one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Affinity {
    /// Nothing: each connection may get another task.
    #[default]
    None,
    /// The client's address.
    ClientIp,
}

/// Whether clients from a range of addresses are let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRule {
    /// The range.
    pub net: IpNet,
    /// Let in, or refused.
    pub allow: bool,
}

/// A service's virtual IP in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VipRecord {
    /// The network.
    pub network: NetworkId,
    /// The address; `None` where the service resolves to its tasks (`dnsrr`).
    pub addr: Option<Ipv4Addr>,
    /// Further names of the service in this network.
    pub aliases: Vec<String>,
}

/// A task's state, observed or desired, in SwarmKit's words and order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Made by the orchestrator.
    New,
    /// Its addresses are allocated; waits for a node.
    Pending,
    /// Has a node.
    Assigned,
    /// The node has taken it.
    Accepted,
    /// The node makes its network and image ready.
    Preparing,
    /// Ready to start, held until told to run.
    Ready,
    /// Starting.
    Starting,
    /// Running; takes traffic.
    Running,
    /// Ended by itself without error.
    Complete,
    /// Ended because it was told to.
    Shutdown,
    /// Ended with an error.
    Failed,
    /// The node can't run it.
    Rejected,
    /// To be removed once it has ended (desired state only).
    Remove,
    /// Its node has been gone for too long to know.
    Orphaned,
}

impl TaskState {
    /// Whether a task in this state has ended for good.
    pub fn is_terminal(self) -> bool {
        self > TaskState::Running
    }
}

/// The [`TaskRecord::weight`] of a task that is given its full share.
pub const WEIGHT_MAX: u8 = 100;

/// A task, placed on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// The task's id.
    pub id: TaskId,
    /// Its name: `<service>.<slot>.<task id>`, or `<service>.<node id>.<task id>` where the service is global; of an
    /// attachment, what it was given.
    pub name: Box<str>,
    /// Its service.
    pub service: ServiceId,
    /// Its slot, from 1; 0 for a task of a global service.
    pub slot: u64,
    /// Its node.
    pub node: NodeId,
    /// A number no other task of the cluster has had: tells an address's tenants apart. Never 0.
    pub incarnation: u32,
    /// What the managers want: `Running`, `Shutdown` or `Remove`.
    pub desired: TaskState,
    /// What its node last reported.
    pub observed: TaskState,
    /// Its share of new flows beside the service's other tasks: 1 to [`WEIGHT_MAX`].
    pub weight: u8,
    /// Its attachments, the ingress network's first where it has one.
    pub endpoints: Box<[EndpointRecord]>,
    /// What to run; only in the copy of the task's own node.
    pub spec: Option<Box<TaskSpec>>,
}

/// One attachment of a task to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// The network.
    pub network: NetworkId,
    /// The task's address in it.
    pub addr: Ipv4Addr,
}

/// What a task runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// The image, as given: `shoal/whoami`, `shoal/exec`. Empty for an attachment: what runs already, and its node knows.
    pub image: String,
    /// `ContainerSpec.Command`: replaces the image's entry point.
    pub command: Vec<String>,
    /// `ContainerSpec.Args`: what follows the entry point.
    pub args: Vec<String>,
    /// `KEY=value` pairs.
    pub env: Vec<String>,
    /// Working directory; empty for `/`.
    pub dir: String,
    /// User to run as; empty for root.
    pub user: String,
    /// Host name inside the task; empty for the task's id, cut to 12 characters as Docker's.
    pub hostname: String,
    /// How long after the stop signal the task is killed, ns.
    pub stop_grace_ns: u64,
    /// The stop signal's name (`SIGTERM`); empty for `SIGTERM`.
    pub stop_signal: String,
    /// The service's name, as tasks are told it.
    pub service_name: String,
    /// What the task sends to the outside under: the first of these of each family that its node has, and where it has none
    /// of a listed family, nothing. Families that are not listed leave by the node's own addresses.
    #[serde(default)]
    pub egress: Vec<IpAddr>,
}

impl TaskSpec {
    /// Whether the task is an attachment: nothing is run for it, its node knows what it is of.
    pub fn is_attachment(&self) -> bool {
        self.image.is_empty()
    }
}

/// A change of one record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The cluster's record became this.
    Cluster(ClusterRecord),
    /// A node was added or became this.
    Node(NodeRecord),
    /// A node is gone.
    NodeRemoved(NodeId),
    /// A network was added or became this.
    Network(NetworkRecord),
    /// A network is gone.
    NetworkRemoved(NetworkId),
    /// A service was added or became this.
    Service(ServiceRecord),
    /// A service is gone.
    ServiceRemoved(ServiceId),
    /// A task was added or became this.
    Task(Box<TaskRecord>),
    /// A task is gone.
    TaskRemoved(TaskId),
}

/// The changes that lead from one table index to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// The table index that these changes start from.
    pub from: u64,
    /// The table index that they lead to.
    pub to: u64,
    /// The changes, in order.
    pub changes: Vec<Change>,
}

/// A delta that does not start where the table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the table is at index {at}, the delta starts at {from}")]
pub struct DeltaGap {
    /// Where the table is.
    pub at: u64,
    /// Where the delta starts.
    pub from: u64,
}

impl Table {
    /// An empty table of `cluster` at index 0.
    pub fn new(cluster: ClusterRecord) -> Self {
        Self {
            index: 0,
            cluster,
            nodes: BTreeMap::new(),
            networks: BTreeMap::new(),
            services: BTreeMap::new(),
            tasks: BTreeMap::new(),
        }
    }

    /// Brings the table from `delta.from` to `delta.to`; refuses a delta that starts elsewhere.
    pub fn apply(&mut self, delta: Delta) -> Result<(), DeltaGap> {
        let Delta { from, to, changes } = delta;
        if from != self.index {
            return Err(DeltaGap { at: self.index, from });
        }
        for change in changes {
            self.change(change);
        }
        self.index = to;
        Ok(())
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Cluster(record) => self.cluster = record,
            Change::Node(record) => drop(self.nodes.insert(record.id.clone(), record)),
            Change::NodeRemoved(id) => drop(self.nodes.remove(&id)),
            Change::Network(record) => drop(self.networks.insert(record.id.clone(), record)),
            Change::NetworkRemoved(id) => drop(self.networks.remove(&id)),
            Change::Service(record) => drop(self.services.insert(record.id.clone(), record)),
            Change::ServiceRemoved(id) => drop(self.services.remove(&id)),
            Change::Task(record) => drop(self.tasks.insert(record.id.clone(), *record)),
            Change::TaskRemoved(id) => drop(self.tasks.remove(&id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table::new(ClusterRecord {
            id: "c".into(),
            hash_seed: 7,
            data_path_port: 4789,
            return_path: ReturnPath::Tunnel,
            key_epoch: 0,
        })
    }

    fn node(id: &str) -> NodeRecord {
        NodeRecord {
            id: id.into(),
            hostname: id.to_owned(),
            role: Role::Worker,
            vtep: Ipv4Addr::new(192, 0, 2, 1).into(),
            state: NodeState::Ready,
            wireguard: Vec::new(),
            manager: None,
        }
    }

    #[test]
    fn a_delta_adds_replaces_and_removes_records() {
        let mut table = table();
        let changes = vec![Change::Node(node("a")), Change::Node(node("b")), Change::NodeRemoved("a".into())];
        table.apply(Delta { from: 0, to: 3, changes }).unwrap();
        assert_eq!(table.index, 3);
        assert_eq!(table.nodes.keys().map(NodeId::as_str).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_table_reads_back_as_written() {
        let service = |id: &str| ServiceRecord {
            id: id.into(),
            name: format!("name of {id}"),
            stack: "".into(),
            endpoint_mode: EndpointMode::Vip,
            vips: Vec::new(),
            ports: Vec::new(),
            balancing: BalancingRecord::default(),
        };
        let mut table = table();
        let changes = ["b", "a", "c"].map(|id| Change::Service(service(id))).to_vec();
        table.apply(Delta { from: 0, to: 1, changes }).unwrap();
        let json = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<Table>(&json).unwrap(), table);
        for damaged in [json.replace("\"tasks\":{}", "\"tasks\":[]"), json.replace(",\"tasks\":{}", "")] {
            assert!(serde_json::from_str::<Table>(&damaged).is_err(), "{damaged}");
        }
    }

    #[test]
    fn a_delta_that_starts_elsewhere_changes_nothing() {
        let mut table = table();
        let delta = Delta { from: 5, to: 6, changes: vec![Change::Node(node("a"))] };
        assert_eq!(table.apply(delta), Err(DeltaGap { at: 0, from: 5 }));
        assert!(table.nodes.is_empty());
    }

    #[test]
    fn an_ipv6_address_ends_in_the_ipv4_address() {
        let subnet =
            Subnet6Record { cidr: "fd00:1::/64".parse().unwrap(), gateway: "fd00:1::1".parse().unwrap() };
        assert_eq!(
            subnet.addr_of(Ipv4Addr::new(10, 0, 1, 5)),
            "fd00:1::a00:105".parse::<Ipv6Addr>().unwrap()
        );
    }

    #[test]
    fn terminal_states_are_those_after_running() {
        assert!(!TaskState::Running.is_terminal());
        assert!(TaskState::Complete.is_terminal());
        assert!(TaskState::Orphaned.is_terminal());
    }
}
