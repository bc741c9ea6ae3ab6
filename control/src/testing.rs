//! Objects and states for tests.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::LazyLock;
use std::time::SystemTime;

use ipnet::{Ipv4Net, Ipv6Net};
use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::session::{self, AttachmentSpec, NodeDescription};
use mesh_api::table::{NodeState, Protocol, PublishMode, Role, Subnet6Record, TaskState};
use mesh_api::tls::KeyId;
use mesh_api::wireguard::WireguardIdentity;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::apply::{Reply, apply, awaits};
use crate::command::{Action, Command, Genesis};
use crate::model::{
    Availability, ClusterSpec, EndpointSpec, JoinSecrets, Lookup, Meta, Mode, NetworkAttachment, NetworkSpec,
    Node, NodeSpec, NodeStatus, PortConfig, Readmission, ServiceSpec, State, Task, TaskTemplate,
    UpdateConfig, WARM,
};
use crate::orchestrator::{Orchestrator, reconcile};
use crate::pki::Authority;
use crate::refusal::Refusal;

/// Lets this process have as many files open as it may.
pub(crate) fn raise_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// What this process holds in memory, bytes.
pub(crate) fn resident() -> u64 {
    const PAGE_BYTES: u64 = 4096;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE_BYTES
}

/// A description of a host.
pub(crate) fn description(hostname: &str) -> NodeDescription {
    let host = hostname.bytes().fold(0_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte)).max(1);
    NodeDescription {
        hostname: hostname.to_owned(),
        addr: Ipv4Addr::new(192, 0, 2, host).into(),
        vtep: Ipv4Addr::new(192, 0, 2, host).into(),
        os: "linux".to_owned(),
        architecture: "x86_64".to_owned(),
        nano_cpus: 2_000_000_000,
        memory_bytes: 1 << 30,
        version: "0.1.0".to_owned(),
        labels: Vec::new(),
        dataplane: "eth0=xdp-native,eth1=tc".to_owned(),
        routes: Vec::new(),
        wireguard: Vec::new(),
        addresses: Vec::new(),
        manager: None,
    }
}

/// A key of a node, and its port.
pub(crate) fn identity(number: u8, port: u16) -> WireguardIdentity {
    WireguardIdentity { public_key: [number; 32].into(), port }
}

/// A worker that is ready.
pub(crate) fn node(id: &str) -> Node {
    Node {
        id: id.into(),
        meta: Meta { version: 1, created_ns: 0, updated_ns: 0 },
        spec_version: 1,
        spec: NodeSpec {
            name: String::new(),
            labels: BTreeMap::new(),
            role: Role::Worker,
            availability: Availability::Active,
        },
        description: description(id),
        status: NodeStatus { state: NodeState::Ready, message: String::new(), since_ns: 0 },
        issuer: KeyId::default(),
        readmission: Readmission::default(),
    }
}

/// The certificate authority of clusters that begin with [`genesis`].
pub(crate) static CA: LazyLock<Authority> = LazyLock::new(|| Authority::generate(SystemTime::now()).unwrap());

thread_local! {
    static ADDRESSES_TWICE: Cell<bool> = const { Cell::new(false) };
}

/// Has the allocator, on this thread, give out addresses that somebody has: a defect that tests must find.
pub(crate) fn give_addresses_twice(twice: bool) {
    ADDRESSES_TWICE.set(twice);
}

/// Whether [`give_addresses_twice`] was asked for.
pub(crate) fn gives_addresses_twice() -> bool {
    ADDRESSES_TWICE.get()
}

/// A cluster's beginning.
pub(crate) fn genesis() -> Genesis {
    Genesis {
        id: "cluster".into(),
        ca: CA.clone(),
        join_secrets: JoinSecrets { worker: [2; 16], manager: [3; 16] },
        unlock_key: None,
        hash_seed: 7,
        ingress: "ingress-id".into(),
        spec: ClusterSpec::default(),
        data_path_port: 4789,
        address_pools: vec![Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8)],
        subnet_size: 24,
        avoid: Vec::new(),
    }
}

/// A network without wishes.
pub(crate) fn network(name: &str) -> NetworkSpec {
    NetworkSpec { name: name.to_owned(), ..NetworkSpec::default() }
}

/// A replicated service.
pub(crate) fn service(name: &str, replicas: u64) -> ServiceSpec {
    let mut task = TaskTemplate::default();
    task.container.image = "shoal/whoami".to_owned();
    ServiceSpec {
        name: name.to_owned(),
        labels: BTreeMap::new(),
        task,
        mode: Mode::Replicated { replicas },
        update: UpdateConfig::default(),
        rollback: UpdateConfig::default(),
        endpoint: EndpointSpec::default(),
    }
}

/// A port published on every node.
pub(crate) fn ingress_port(published: u16, target: u16) -> PortConfig {
    let (name, protocol) = (String::new(), Protocol::Tcp);
    PortConfig { name, protocol, target, published, mode: PublishMode::Ingress }
}

/// An attachment to a network.
pub(crate) fn attachment(network: &str) -> NetworkAttachment {
    NetworkAttachment { target: network.into(), aliases: Vec::new(), options: BTreeMap::new() }
}

/// What asks for an attachment on a node, without wishes.
pub(crate) fn attach(id: &str, node: &str, network: &str, name: &str) -> Action {
    let (network, name) = (network.to_owned(), name.to_owned());
    let spec = AttachmentSpec { network, name, aliases: Vec::new(), addr: None };
    Action::Attach { id: id.into(), node: node.into(), spec }
}

/// Copies a folder and what is in it.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn task_ids(count: &mut u64) -> impl FnMut() -> TaskId {
    move || {
        *count += 1;
        TaskId::from(format!("id{count:05}"))
    }
}

/// A state with its log, and a clock of its own.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) log: Vec<Command>,
    pub(crate) now_ns: u64,
    ids: u64,
    orchestrator: Orchestrator,
}

impl World {
    /// A cluster with its ingress network and these nodes.
    pub(crate) fn new(nodes: &[&str]) -> Self {
        let mut world = Self {
            state: State::empty(),
            log: Vec::new(),
            now_ns: 1_000_000_000_000,
            ids: 0,
            orchestrator: Orchestrator::default(),
        };
        world.must(Action::Initialize(Box::new(genesis())));
        for id in nodes {
            world.add_node(id);
        }
        world
    }

    /// One that has come to this state.
    pub(crate) fn of(state: State) -> Self {
        Self {
            state,
            log: Vec::new(),
            now_ns: 1_000_000_000_000,
            ids: 0,
            orchestrator: Orchestrator::default(),
        }
    }

    pub(crate) fn add_node(&mut self, id: &str) {
        self.must(Action::AddNode {
            id: id.into(),
            role: Role::Worker,
            description: description(id),
            issuer: KeyId::default(),
            token: None,
        });
    }

    /// Begins a change of the root certificate; the next one's key.
    pub(crate) fn rotate(&mut self, now: SystemTime) -> KeyId {
        let cluster = self.state.cluster.clone().unwrap();
        let rotation = cluster.ca.next(now).unwrap();
        let id = rotation.root.id;
        self.must(Action::UpdateCluster {
            version: cluster.meta.version,
            spec: cluster.spec.clone(),
            worker_secret: None,
            manager_secret: None,
            rotation: Some(Box::new(rotation)),
            unlock_key: None,
        });
        id
    }

    /// `docker swarm update`.
    #[track_caller]
    pub(crate) fn update_cluster(&mut self, change: impl FnOnce(&mut ClusterSpec)) {
        let cluster = self.state.cluster.clone().unwrap();
        let mut spec = cluster.spec.clone();
        change(&mut spec);
        let version = cluster.meta.version;
        self.must(Action::UpdateCluster {
            version,
            spec,
            worker_secret: None,
            manager_secret: None,
            rotation: None,
            unlock_key: None,
        });
    }

    #[track_caller]
    pub(crate) fn node(&self, id: &str) -> &Node {
        &self.state.nodes[&NodeId::from(id)]
    }

    pub(crate) fn try_to(&mut self, action: Action) -> Result<Reply, Refusal> {
        let command = Command { at_ns: self.now_ns, action };
        let (state, reply) = apply(&self.state, self.state.index + 1, &command)?;
        self.state = state;
        self.log.push(command);
        Ok(reply)
    }

    #[track_caller]
    pub(crate) fn must(&mut self, action: Action) -> Reply {
        self.try_to(action).unwrap()
    }

    pub(crate) fn create_network(&mut self, name: &str) -> NetworkId {
        let id = NetworkId::from(format!("net-{name}"));
        self.must(Action::CreateNetwork { id: id.clone(), spec: network(name) });
        id
    }

    pub(crate) fn create_attachable_network(&mut self, name: &str) -> NetworkId {
        let id = NetworkId::from(format!("net-{name}"));
        let spec = NetworkSpec { attachable: true, ..network(name) };
        self.must(Action::CreateNetwork { id: id.clone(), spec });
        id
    }

    pub(crate) fn create_service(&mut self, spec: ServiceSpec) -> ServiceId {
        let id = ServiceId::from(format!("svc-{}", spec.name));
        self.must(Action::CreateService { id: id.clone(), spec: Box::new(spec) });
        id
    }

    pub(crate) fn update_service(&mut self, id: &ServiceId, change: impl FnOnce(&mut ServiceSpec)) {
        let service = &self.state.services[id];
        let version = service.meta.version;
        let mut spec = service.spec.clone();
        change(&mut spec);
        self.must(Action::UpdateService { id: id.clone(), version, spec: Box::new(spec) });
    }

    pub(crate) fn label_node(&mut self, id: &str, label: &str, value: &str) {
        let mut node = self.node(id).clone();
        node.spec.labels.insert(label.to_owned(), value.to_owned());
        self.must(Action::UpdateNode { id: id.into(), version: node.spec_version, spec: node.spec });
    }

    /// A node that describes itself with these keys.
    pub(crate) fn keys(&self, id: &str, wireguard: &[WireguardIdentity]) -> Action {
        let description =
            NodeDescription { wireguard: wireguard.to_vec(), ..self.node(id).description.clone() };
        let (state, message) = (NodeState::Ready, String::new());
        Action::SetNodeStatus { id: id.into(), state, message, description: Some(description) }
    }

    /// A node describes itself with these addresses.
    pub(crate) fn has_addresses(&mut self, id: &str, addresses: &[&str]) {
        let addresses = addresses.iter().map(|addr| addr.parse().unwrap()).collect();
        let description = NodeDescription { addresses, ..self.node(id).description.clone() };
        let (state, message) = (NodeState::Ready, String::new());
        self.must(Action::SetNodeStatus { id: id.into(), state, message, description: Some(description) });
    }

    pub(crate) fn set_node_state(&mut self, id: &str, state: NodeState) {
        self.must(Action::SetNodeStatus { id: id.into(), state, message: String::new(), description: None });
    }

    /// A node reports one of its tasks.
    pub(crate) fn report(&mut self, task: &Task, state: TaskState) {
        let node: NodeId = task.node.clone().unwrap();
        let status = session::TaskStatus {
            task: task.id.clone(),
            state,
            since_ns: self.now_ns,
            message: String::new(),
            err: String::new(),
            pid: None,
            exit_code: None,
        };
        self.must(Action::ReportTasks { node, statuses: vec![status] });
    }

    /// Every live node has applied the table as it is; whether anything waited for that.
    pub(crate) fn acknowledge(&mut self) -> bool {
        let index = self.state.index;
        let awaited = awaits(&self.state, index);
        if awaited {
            self.must(Action::Acknowledge { index });
        }
        awaited
    }

    /// One pass of the orchestrator; whether it had anything to do, and when it wants to look again.
    pub(crate) fn orchestrate(&mut self) -> (bool, Option<u64>) {
        let mut ids = self.ids;
        let whole = reconcile(&self.state, self.now_ns, &mut task_ids(&mut ids));
        let plan = self.orchestrator.reconcile(&self.state, self.now_ns, &mut task_ids(&mut self.ids));
        assert_eq!(plan, whole, "what was not looked at needed no look");
        let busy = !plan.steps.is_empty();
        if busy {
            self.must(Action::Orchestrate { steps: plan.steps });
        }
        (busy, plan.wake_at_ns)
    }

    /// Checks what must hold in every state.
    #[track_caller]
    pub(crate) fn check_invariants(&self) {
        let state = &self.state;
        assert_eq!(state.lookup, Lookup::of(state), "the indexes follow the objects");
        let mut addresses = std::collections::BTreeSet::new();
        let mut take = |network: &NetworkId, addr: Ipv4Addr| {
            assert!(addresses.insert((network.clone(), addr)), "{addr} of {network} is given twice");
            let subnets = &state.networks[network].subnets;
            assert!(subnets.iter().any(|subnet| subnet.range.contains(&addr)), "{addr} is outside {network}");
            assert!(subnets.iter().all(|subnet| subnet.gateway != addr), "{addr} is a gateway");
            assert!(!subnets.iter().any(|subnet| subnet.reserved.contains(&addr)), "{addr} is reserved");
        };
        for (network, resting) in &state.freed {
            assert!(!resting.is_empty());
            for freed in resting {
                assert!(freed.index <= state.index);
                take(network, freed.addr);
            }
        }
        let mut ports = std::collections::BTreeSet::new();
        for service in state.services.values() {
            for vip in &service.endpoint.vips {
                vip.addr.into_iter().for_each(|addr| take(&vip.network, addr));
            }
            for port in &service.endpoint.ports {
                assert_ne!(port.published, 0);
                assert!(
                    ports.insert((port.protocol, port.published)),
                    "{} is published twice",
                    port.published
                );
            }
        }
        let has_ingress = state.ingress().is_some();
        assert!(state.networks.values().filter(|network| network.spec.ingress).count() <= 1);
        for service in state.services.values() {
            let published = |port: &PortConfig| port.mode == PublishMode::Ingress;
            let needs =
                service.spec.task.networks.is_empty() || service.spec.endpoint.ports.iter().any(published);
            assert!(has_ingress || !needs, "{} needs the ingress network", service.spec.name);
        }
        let mut incarnations = std::collections::BTreeSet::new();
        for task in state.tasks.values() {
            assert!(task.warmth <= WARM);
            assert!(task.incarnation > 0 && incarnations.insert(task.incarnation));
            // A task that is only left to end doesn't hold its networks back.
            let stays = |network| task.desired <= TaskState::Running || state.networks.contains_key(network);
            let endpoints =
                task.endpoints.iter().filter(|endpoint| !task.has_ended() && stays(&endpoint.network));
            for endpoint in endpoints {
                endpoint.addr.into_iter().for_each(|addr| take(&endpoint.network, addr));
            }
        }
        let mut vnis = std::collections::BTreeSet::new();
        let mut subnets: Vec<Ipv4Net> = Vec::new();
        let mut subnets6: Vec<Ipv6Net> = Vec::new();
        for network in state.networks.values() {
            assert!(network.vni >= 4096 && vnis.insert(network.vni));
            for subnet in &network.subnets {
                let cidr = subnet.cidr;
                assert!(!subnets.iter().any(|other| other.contains(&cidr) || cidr.contains(other)));
                subnets.push(cidr);
            }
            assert_eq!(network.subnet6.is_some(), network.spec.ipam6.is_some());
            if let Some(Subnet6Record { cidr, gateway }) = network.subnet6 {
                assert!(!subnets6.iter().any(|other| other.contains(&cidr) || cidr.contains(other)));
                assert!(cidr.prefix_len() <= Subnet6Record::PREFIX_LEN_MAX && cidr.contains(&gateway));
                subnets6.push(cidr);
            }
        }
    }
}
