//! The targets on their corpus, and on what that is changed to.

use std::time::{Duration, SystemTime};

use super::*;
use crate::health::{NodeHealth, Problem, UplinkHealth, WireguardHealth, WireguardKind};
use crate::session::{
    AttachRefused, AttachRefusedReason, AttachmentSpec, NodeDescription, PROTOCOL_VERSION, RefusalReason,
    TaskStatus,
};
use crate::table::{
    Change, ClusterRecord, EndpointRecord, NodeRecord, NodeState, ReturnPath, Role, TaskRecord, TaskState,
};
use crate::tls::testing::{Ca, Wanted};
use crate::wireguard::WireguardIdentity;

fn bodies<T: Serialize>(messages: &[T]) -> Vec<u8> {
    let bodies: Vec<Vec<u8>> = messages.iter().map(|message| written(message).unwrap()).collect();
    bodies.join(&b'\n')
}

fn description() -> NodeDescription {
    let addr = "192.0.2.1".parse().unwrap();
    NodeDescription {
        hostname: "n1".to_owned(),
        addr,
        vtep: "2001:db8::1".parse().unwrap(),
        os: "linux".to_owned(),
        architecture: "x86_64".to_owned(),
        nano_cpus: 2_000_000_000,
        memory_bytes: 1 << 30,
        version: "0.1.0".to_owned(),
        labels: vec![("zone".to_owned(), "b".to_owned())],
        dataplane: "eth0=xdp-native,eth1=tc".to_owned(),
        routes: vec!["198.51.100.0/24".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()],
        wireguard: vec![WireguardIdentity { public_key: [7; 32].into(), port: 51_820 }],
        addresses: vec![addr],
        manager: None,
    }
}

fn agent_messages() -> Vec<Vec<u8>> {
    let status = TaskStatus {
        task: "t1".into(),
        state: TaskState::Failed,
        since_ns: 1,
        message: "started".to_owned(),
        err: "it \"failed\"\n".to_owned(),
        pid: Some(7),
        exit_code: Some(-1),
    };
    let spec = AttachmentSpec {
        network: "front".to_owned(),
        name: "guest".to_owned(),
        aliases: vec!["other".to_owned()],
        addr: Some("10.0.1.9".parse().unwrap()),
    };
    let health = NodeHealth {
        uplinks: vec![UplinkHealth { name: "eth0".to_owned(), mode: "tc".to_owned(), mtu: 1500 }],
        wireguard: Some(WireguardHealth { kind: WireguardKind::Kernel, key_made_ns: 7 }),
        problem: Some(Problem::new("lost", 9)),
    };
    let resume = AgentMessage::Resume { protocol: PROTOCOL_VERSION, node: description(), index: Some(7) };
    let all = vec![
        resume.clone(),
        AgentMessage::Applied { index: u64::MAX },
        AgentMessage::Tasks { statuses: vec![status] },
        AgentMessage::Described { node: description() },
        AgentMessage::Attach { id: "t2".into(), spec },
        AgentMessage::Renew { csr: KeyRequest::new().unwrap().csr().to_owned() },
        AgentMessage::Renewed,
        AgentMessage::Alive,
        AgentMessage::Health { health },
        AgentMessage::Leave,
    ];
    let mut seeds: Vec<Vec<u8>> = all.iter().map(|message| bodies(std::slice::from_ref(message))).collect();
    seeds.push(bodies(&all));
    seeds
}

fn manager_messages() -> Vec<Vec<u8>> {
    let cluster = ClusterRecord {
        id: "c".into(),
        hash_seed: u64::MAX,
        data_path_port: 4789,
        return_path: ReturnPath::Tunnel,
        key_epoch: 1,
    };
    let node = |id: &str| NodeRecord {
        id: id.into(),
        hostname: id.to_owned(),
        role: Role::Manager,
        vtep: "192.0.2.1".parse().unwrap(),
        state: NodeState::Ready,
        wireguard: description().wireguard,
        manager: Some("192.0.2.1:2377".parse().unwrap()),
    };
    let task = |id: &str| TaskRecord {
        id: id.into(),
        name: format!("web.1.{id}").into(),
        service: "web".into(),
        slot: 1,
        node: "n1".into(),
        incarnation: 9,
        desired: TaskState::Running,
        observed: TaskState::Starting,
        weight: 100,
        endpoints: [EndpointRecord { network: "net".into(), addr: "10.0.1.3".parse().unwrap() }].into(),
        spec: None,
    };
    let service = r#"{"id":"web","name":"web","stack":"","endpoint_mode":"vip","vips":[{"network":"net","addr":"10.0.1.2","aliases":["w"]}],
        "ports":[{"name":"","protocol":"tcp","target":80,"published":8080,"mode":"ingress"}],"balancing":{"return_path":"tunnel",
        "affinity":"client_ip","sources":[{"net":"192.0.2.0/24","allow":true}],"publish_addresses":["::/0"],"publish_nodes":["n1"]}}"#;
    let network = r#"{"id":"net","name":"front","vni":4097,"subnets":[{"cidr":"10.0.1.0/24","gateway":"10.0.1.1"}],
        "subnet6":{"cidr":"fd00:1::/64","gateway":"fd00:1::1"},"internal":false,"ingress":false,"mtu":1400,"encrypted":true}"#;
    let mut table = Table::new(cluster.clone());
    table.nodes.insert("n1".into(), node("n1"));
    table.tasks.insert("t1".into(), task("t1"));
    let snapshot = ManagerMessage::Snapshot { table: Box::new(table) };
    let changes = vec![
        Change::Cluster(cluster),
        Change::Node(node("n2")),
        Change::Network(serde_json::from_str(network).unwrap()),
        Change::Service(serde_json::from_str(service).unwrap()),
        Change::Task(Box::new(task("t2"))),
        Change::TaskRemoved("t1".into()),
        Change::NodeRemoved("n1".into()),
    ];
    let delta = ManagerMessage::Delta { delta: Delta { from: 0, to: 9, changes } };
    let pem = Ca::new().roots().to_pem();
    let attach_refused =
        AttachRefused { reason: AttachRefusedReason::Conflict, message: "it is taken".to_owned() };
    let refused = || (RefusalReason::Unavailable, "later".to_owned());
    let all = [
        ManagerMessage::Resumed { cluster_id: "c".into(), role: Role::Worker, roots: pem.clone() },
        snapshot.clone(),
        delta.clone(),
        ManagerMessage::Settled { index: 9 },
        ManagerMessage::Moved { leader: Some("[2001:db8::1]:2377".parse().unwrap()) },
        ManagerMessage::Certificate { chain: pem.clone(), roots: pem.clone() },
        ManagerMessage::Trust { roots: pem },
        ManagerMessage::Attached { id: "t2".into(), refused: Some(attach_refused) },
        ManagerMessage::Renew,
        ManagerMessage::Alive,
        ManagerMessage::Refused { reason: refused().0, message: refused().1 },
    ];
    let mut seeds: Vec<Vec<u8>> = all.iter().map(|message| bodies(std::slice::from_ref(message))).collect();
    seeds.push(bodies(&[snapshot, delta]));
    seeds
}

fn exchanges() -> Vec<Vec<u8>> {
    let (ca, key) = (Ca::new(), KeyRequest::new().unwrap());
    let chain = ca.sign_request(&Wanted::new("n1", Role::Worker, "c"), key.csr());
    let csr = key.csr().to_owned();
    let token = JoinToken::new(&ca.digest(), &[1; 16]).to_string();
    let join = JoinRequest { protocol: PROTOCOL_VERSION, token, csr: csr.clone(), node: description() };
    let roots = ca.roots().to_pem();
    let joined = JoinAnswer::Joined {
        cluster_id: "c".into(),
        node_id: "n1".into(),
        role: Role::Worker,
        chain: chain.clone(),
        roots: roots.clone(),
    };
    let message = "no".to_owned();
    let refused = JoinAnswer::Refused { reason: RefusalReason::InvalidToken, message };
    let proof = vec![0, 127, 255];
    let readmit = ReadmitRequest { protocol: PROTOCOL_VERSION, chain: chain.clone(), csr, proof };
    let readmitted = ReadmitAnswer::Readmitted { chain, roots };
    vec![
        bodies(&[join]),
        bodies(std::slice::from_ref(&joined)),
        bodies(&[refused, joined]),
        bodies(&[readmit]),
        bodies(&[readmitted]),
    ]
}

fn tokens() -> Vec<Vec<u8>> {
    let secrets = [[0; 16], [1; 16], [0x7f; 16], [0xff; 16]];
    let tokens = secrets.iter().map(|secret| JoinToken::new(&[secret[0]; 32], secret));
    tokens.map(|token| token.to_string().into_bytes()).collect()
}

fn certificates() -> Vec<Vec<u8>> {
    let ca = Ca::new();
    let manager = ca.credential(&Wanted::new("m1", Role::Manager, "c"));
    let now = SystemTime::now();
    let (not_before, not_after) = (now - Duration::from_hours(2), now - Duration::from_hours(1));
    let expired = Wanted { not_before, not_after, ..Wanted::new("n1", Role::Worker, "c") };
    let der = |roots: &Roots| roots.certificates()[0].to_vec();
    let own = Roots::from_pem(&manager.identity.chain()).unwrap();
    vec![
        manager.identity.to_pem().into_bytes(),
        ca.credential(&expired).identity.to_pem().into_bytes(),
        manager.identity.chain().into_bytes(),
        ca.roots().to_pem().into_bytes(),
        (ca.roots().to_pem() + &Ca::new().roots().to_pem()).into_bytes(),
        der(&ca.roots()),
        der(&own),
    ]
}

#[test]
fn decoders_bear_what_their_corpus_is_changed_to() {
    let seeds = [agent_messages(), manager_messages(), exchanges(), tokens(), certificates()];
    for ((name, target), seeds) in TARGETS.into_iter().zip(seeds) {
        corpus::check(name, target, &seeds);
    }
}
