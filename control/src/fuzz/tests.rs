//! The targets on their corpus, and on what that is changed to.

use mesh_api::fuzz::corpus;
use mesh_api::session::{AttachmentSpec, PROTOCOL_VERSION, TaskStatus};
use mesh_api::table::TaskState;
use serde_json::json;

use super::*;
use crate::backup::Backup;
use crate::docker::fuzz::shown;
use crate::raft::fuzz::seeds;
use crate::testing::{World, description, ingress_port, service};

fn jsons(values: &[serde_json::Value]) -> Vec<Vec<u8>> {
    values.iter().map(|value| value.to_string().into_bytes()).collect()
}

fn node_messages() -> Vec<Vec<u8>> {
    let task = STATE.tasks.values().next().unwrap();
    let status = TaskStatus {
        task: task.id.clone(),
        state: TaskState::Failed,
        since_ns: 1,
        message: "started".to_owned(),
        err: "failed".to_owned(),
        pid: Some(7),
        exit_code: Some(1),
    };
    let spec = AttachmentSpec {
        network: "app".to_owned(),
        name: "guest".to_owned(),
        aliases: vec!["other".to_owned()],
        addr: Some("10.0.1.9".parse().unwrap()),
    };
    let messages = [
        AgentMessage::Resume { protocol: PROTOCOL_VERSION, node: description("n1"), index: None },
        AgentMessage::Described { node: description("n3") },
        AgentMessage::Tasks { statuses: vec![status] },
        AgentMessage::Attach { id: "fuzzed".into(), spec },
        AgentMessage::Applied { index: 7 },
    ];
    let mut seeds: Vec<Vec<u8>> = messages.iter().map(|it| serde_json::to_vec(it).unwrap()).collect();
    seeds.push(seeds.join(&b'\n'));
    seeds
}

fn backups() -> Vec<Vec<u8>> {
    let mut served = World::new(&["n1", "n2"]);
    served.create_service(service("web", 2));
    served.orchestrate();
    let states = [STATE.clone(), World::new(&["n1"]).state, World::new(&[]).state, served.state];
    states.iter().map(|state| Backup::write(state, SystemTime::UNIX_EPOCH).unwrap()).collect()
}

fn requests_to_sign() -> Vec<Vec<u8>> {
    (0..4).map(|_| KeyRequest::new().unwrap().csr().as_bytes().to_vec()).collect()
}

fn services() -> Vec<Vec<u8>> {
    let mut world = World::of(STATE.clone());
    let mut full = service("full", 3);
    full.labels.insert("shoal.allow".to_owned(), "192.0.2.0/24, 2001:db8::/32".to_owned());
    full.endpoint.ports = vec![ingress_port(8081, 80), ingress_port(0, 81)];
    full.task.placement.constraints = vec!["node.role==worker".to_owned()];
    full.task.container.env = vec!["A=1".to_owned()];
    let id = world.create_service(full);
    let mut seeds = jsons(&[
        json!({"Name": "least", "TaskTemplate": {"ContainerSpec": {"Image": "shoal/whoami"}}}),
        json!({
            "Name": "web", "Labels": {"com.docker.stack.namespace": "shop"},
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": "shoal/whoami:latest@sha256:0", "Args": ["-p", "80"], "Env": ["A=1"], "Hostname": "h", "Init": false,
                    "StopSignal": "SIGTERM", "StopGracePeriod": 10_000_000_000_i64, "Mounts": [], "DNSConfig": {},
                },
                "RestartPolicy": {"Condition": "on-failure", "Delay": 5, "MaxAttempts": 3, "Window": 0},
                "Placement": {"Constraints": ["node.labels.zone != b"], "MaxReplicas": 2},
                "Networks": [{"Target": "app", "Aliases": ["w"]}], "ForceUpdate": 1,
            },
            "Mode": {"Replicated": {"Replicas": 2}},
            "UpdateConfig": {"Parallelism": 1, "Delay": 1, "FailureAction": "rollback", "Monitor": 5, "MaxFailureRatio": 0.1, "Order": "start-first"},
            "EndpointSpec": {"Mode": "vip", "Ports": [{"Protocol": "udp", "TargetPort": 53, "PublishedPort": 5353, "PublishMode": "host"}]},
        }),
        json!({"Name": "all", "TaskTemplate": {"ContainerSpec": {"Image": "shoal/whoami"}}, "Mode": {"Global": {}}, "EndpointSpec": {"Mode": "dnsrr"}}),
    ]);
    seeds.push(shown(&world.state.services[&id].spec));
    seeds
}

fn networks() -> Vec<Vec<u8>> {
    jsons(&[
        json!({"Name": "front", "Driver": "overlay"}),
        json!({
            "Name": "back", "Driver": "overlay", "Scope": "swarm", "Internal": true, "Attachable": true, "EnableIPv6": true,
            "IPAM": {"Driver": "default", "Config": [
                {"Subnet": "10.9.0.0/24", "IPRange": "10.9.0.128/25", "Gateway": "10.9.0.1", "AuxiliaryAddresses": {"a": "10.9.0.2"}},
                {"Subnet": "fd00:9::/64", "Gateway": "fd00:9::1"},
            ]},
            "Options": {"encrypted": ""}, "Labels": {"a": "b"},
        }),
        json!({"Subnet": "10.10.0.0/16", "Gateway": "10.10.0.1"}),
        json!({"Name": "in", "Driver": "overlay", "Ingress": true, "Options": {"com.docker.network.driver.mtu": "1400"}}),
    ])
}

fn requests() -> Vec<Vec<u8>> {
    jsons(&[
        json!({"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": "eth0", "DefaultAddrPool": ["10.0.0.0/8"], "SubnetSize": 24,
            "Spec": {"Labels": {"shoal.return": "direct"}, "CAConfig": {"NodeCertExpiry": 7_776_000_000_000_000_u64}}}),
        json!({"ListenAddr": "", "AdvertiseAddr": "", "RemoteAddrs": ["192.0.2.1:2377"], "JoinToken": "SWMTKN-1-x-y"}),
        json!({"Name": "default", "Orchestration": {"TaskHistoryRetentionLimit": 5}, "Dispatcher": {"HeartbeatPeriod": 5_000_000_000_u64},
            "EncryptionConfig": {"AutoLockManagers": false}, "CAConfig": {"ExternalCAs": [], "ForceRotate": 1}}),
        json!({"Labels": {"a": "b"}, "Role": "worker", "Availability": "drain"}),
        json!({"Network": "app", "Name": "guest", "Aliases": ["g"], "IPv4Address": "10.0.1.9", "Pid": 1, "Interface": "eth1"}),
        json!({"Network": "app", "Netns": "/run/netns/a"}),
    ])
}

fn queries() -> Vec<Vec<u8>> {
    let texts = [
        "filters=%7B%22name%22%3A%7B%22%5Eweb%24%22%3Atrue%7D%7D&status=true",
        "filters=%7B%22label%22%3A%5B%22a=b%22%5D%7D",
        "filters=%7B%22mode%22%3A%5B%22true%22%5D%7D&version=7&until=1.5",
        "filters=%7B%22id%22%3A%5B%22svc%22%5D%2C%22type%22%3A%5B%5D%7D&until=2026-11-23T00%3A00%3A00Z",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn label_texts() -> Vec<Vec<u8>> {
    let texts = [
        "shoal.return=direct\nshoal.affinity=client-ip\nshoal.allow=192.0.2.0/24,2001:db8::/32\nshoal.deny=192.0.2.7",
        "shoal.publish.addresses=192.0.2.0/24\nshoal.publish.nodes=node.role==worker, node.labels.zone != b\nshoal.slow-start=30s",
        "shoal.weight=50\nzone=b",
        "shoal.egress=192.0.2.9,2001:db8::9\nshoal.slow-start=1m30s",
        "node.hostname==n1\nnode.ip!=192.0.2.0/24\nnode.platform.arch==amd64\nengine.labels.a==b",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn decoders_bear_what_their_corpus_is_changed_to() {
    let all = [
        seeds::messages(),
        seeds::entries(),
        seeds::snapshots(),
        backups(),
        node_messages(),
        requests_to_sign(),
        services(),
        networks(),
        requests(),
        queries(),
        label_texts(),
    ];
    for ((name, target), seeds) in TARGETS.into_iter().zip(all) {
        corpus::check(name, target, &seeds);
    }
}
