//! The shapes of answers: field names, words and forms that Docker's clients rest on.

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use mesh_api::session::NodeDescription;
use mesh_api::table::{NodeState, Role};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::host::{Client, FakeHost};
use crate::command::{Action, Command};
use crate::docker::local::LocalNode as _;
use crate::testing::identity;

/// Checks that `answer` holds everything in `expected`, and shows where it doesn't.
fn holds(answer: &Value, expected: &Value, at: &str) {
    match expected {
        Value::Object(fields) => {
            for (name, value) in fields {
                holds(&answer[name], value, &format!("{at}.{name}"));
            }
        }
        _ => assert_eq!(answer, expected, "{at}"),
    }
}

#[tokio::test]
async fn ping_tells_the_version_and_the_role() {
    for (client, role) in [
        (Client::of(FakeHost::new()), "inactive"),
        (Client::of(FakeHost::worker()), "active/worker"),
        (Client::manager().await, "active/manager"),
    ] {
        for method in [Method::GET, Method::HEAD] {
            let request = Request::builder().method(method).uri("/v1.24/_ping").body(Body::empty()).unwrap();
            let response = client.router.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
            assert_eq!(header("Api-Version"), "1.50");
            assert_eq!(header("Docker-Experimental"), "false");
            assert_eq!(header("Ostype"), "linux");
            assert_eq!(header("Swarm"), role);
        }
    }
}

#[tokio::test]
async fn info_shows_the_place_in_the_swarm() {
    let outside = Client::of(FakeHost::new());
    let (_, info) = outside.get("/info").await;
    holds(
        &info["Swarm"],
        &json!({"LocalNodeState": "inactive", "NodeID": "", "ControlAvailable": false}),
        "Swarm",
    );
    let manager = Client::manager().await;
    manager.host.add_node("n2", Role::Worker).await;
    let (_, info) = manager.get("/info").await;
    let (_, nodes) = manager.get("/nodes?filters=%7B%22role%22%3A%7B%22manager%22%3Atrue%7D%7D").await;
    let expected = json!({
        "LocalNodeState": "active", "NodeAddr": "192.0.2.7", "ControlAvailable": true, "Nodes": 2, "Managers": 1,
        "NodeID": nodes[0]["ID"],
        "RemoteManagers": [{"NodeID": nodes[0]["ID"], "Addr": "192.0.2.7:2377"}],
        "Cluster": {"SubnetSize": 24, "DataPathPort": 4789, "DefaultAddrPool": ["10.0.0.0/8"], "JoinTokens": null},
    });
    holds(&info["Swarm"], &expected, "Swarm");
}

#[tokio::test]
async fn swarm_shows_tokens_and_rotates_them() {
    let client = Client::manager().await;
    let (_, swarm) = client.get("/swarm").await;
    let worker = swarm["JoinTokens"]["Worker"].as_str().unwrap().to_owned();
    assert!(worker.starts_with("SWMTKN-1-") && worker.len() == 85, "{worker}");
    let version = swarm["Version"]["Index"].as_u64().unwrap();
    let path = format!("/swarm/update?version={version}&rotateWorkerToken=true&rotateManagerToken=false");
    let (status, answer) = client.post(&path, &swarm["Spec"].to_string()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (_, rotated) = client.get("/swarm").await;
    assert_ne!(rotated["JoinTokens"]["Worker"], swarm["JoinTokens"]["Worker"]);
    assert_eq!(rotated["JoinTokens"]["Manager"], swarm["JoinTokens"]["Manager"]);
}

#[tokio::test]
async fn a_service_shows_what_was_asked_for_and_what_it_got() {
    let client = Client::manager().await;
    client.post("/networks/create", r#"{"Name":"front","Driver":"overlay","Labels":{"a":"b"}}"#).await;
    let (_, network) = client.get("/networks/front").await;
    holds(
        &network,
        &json!({
            "Scope": "swarm", "Driver": "overlay", "EnableIPv4": true, "EnableIPv6": false, "Internal": false,
            "Ingress": false, "ConfigOnly": false, "ConfigFrom": {"Network": ""}, "Labels": {"a": "b"},
            "IPAM": {"Driver": "default", "Options": null, "Config": [{"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"}]},
            "Options": {"com.docker.network.driver.overlay.vxlanid_list": "4097"}, "Containers": {},
        }),
        "network",
    );
    let spec = json!({
        "Name": "web",
        "Labels": {"tier": "front"},
        "TaskTemplate": {
            "ContainerSpec": {
                "Image": "shoal/whoami:latest", "Args": ["--slow"], "Env": ["A=b"], "Init": false,
                "StopGracePeriod": 3_000_000_000_u64, "DNSConfig": {}, "Isolation": "default",
            },
            "Resources": {"Limits": {}, "Reservations": {}},
            "RestartPolicy": {"Condition": "on-failure", "Delay": 1_000_000, "MaxAttempts": 3},
            "Placement": {"Constraints": ["node.role==worker"], "MaxReplicas": 2},
            "Networks": [{"Target": network["Id"], "Aliases": ["www"]}],
            "ForceUpdate": 0,
            "Runtime": "container",
        },
        "Mode": {"Replicated": {"Replicas": 3}},
        "UpdateConfig": {
            "Parallelism": 2, "Delay": 5, "FailureAction": "rollback", "Monitor": 7, "MaxFailureRatio": 0.25,
            "Order": "start-first",
        },
        "RollbackConfig": {
            "Parallelism": 1, "FailureAction": "continue", "Monitor": 5_000_000_000_u64, "MaxFailureRatio": 0.0,
            "Order": "stop-first",
        },
        "EndpointSpec": {"Mode": "vip", "Ports": [
            {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"},
            {"Protocol": "udp", "TargetPort": 53, "PublishMode": "ingress"},
        ]},
    });
    let (status, created) = client.post("/services/create", &spec.to_string()).await;
    assert_eq!(status, StatusCode::CREATED, "{created}");
    let (_, service) = client.get(&format!("/services/{}", created["ID"].as_str().unwrap())).await;
    assert_eq!(service["Spec"], spec);
    assert_eq!(service["Endpoint"]["Spec"], spec["EndpointSpec"]);
    assert_eq!(service["Endpoint"]["Ports"][0]["PublishedPort"], 8080);
    assert_eq!(service["Endpoint"]["Ports"][1]["PublishedPort"], 30000);
    let vips = service["Endpoint"]["VirtualIPs"].as_array().unwrap();
    assert_eq!(vips.len(), 2);
    assert!(
        vips.iter()
            .any(|vip| vip["NetworkID"] == network["Id"] && vip["Addr"].as_str().unwrap().ends_with("/24"))
    );
    assert!(service["CreatedAt"].as_str().unwrap().ends_with('Z'));
    // The same spec again, as an update: nothing is lost on the way through a client.
    let version = service["Version"]["Index"].as_u64().unwrap();
    let (status, answer) =
        client.post(&format!("/services/web/update?version={version}"), &service["Spec"].to_string()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (_, updated) = client.get("/services/web").await;
    assert_eq!(updated["Spec"], spec);
    assert_eq!(updated["PreviousSpec"], spec);
}

#[tokio::test]
async fn a_network_gets_another_subnet() {
    let client = Client::manager().await;
    client.post("/networks/create", r#"{"Name":"front"}"#).await;
    let asked = r#"{"Subnet":"10.66.0.0/24","IPRange":"10.66.0.128/25","AuxiliaryAddresses":{"router":"10.66.0.130"}}"#;
    let (status, network) = client.post("/shoal/v1/networks/front/subnets", asked).await;
    assert_eq!(status, StatusCode::OK, "{network}");
    let ipam = json!([
        {"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"},
        {
            "Subnet": "10.66.0.0/24", "IPRange": "10.66.0.128/25", "Gateway": "10.66.0.1",
            "AuxiliaryAddresses": {"router": "10.66.0.130"},
        },
    ]);
    assert_eq!(network["IPAM"]["Config"], ipam);
    assert_eq!(client.get("/networks/front").await.1["IPAM"]["Config"], ipam);
    let (status, network) = client.post("/v1.44/shoal/v1/networks/front/subnets", "{}").await;
    assert_eq!(status, StatusCode::OK, "{network}");
    assert_eq!(network["IPAM"]["Config"][2], json!({"Subnet": "10.0.2.0/24", "Gateway": "10.0.2.1"}));
}

#[tokio::test]
async fn keys_are_rotated() {
    let client = Client::manager().await;
    let rotate = "/shoal/v1/networks/rotate-keys";
    let (status, answer) = client.post(rotate, "").await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer, json!({"KeyEpoch": 1, "Nodes": 0, "NodesDown": 0}));

    client.host.add_node("n2", Role::Worker).await;
    let cluster = client.host.cluster().unwrap();
    for (node, number) in cluster.state().nodes.values().zip(1..) {
        let wireguard = vec![identity(number, 51820)];
        let description = NodeDescription { wireguard, ..node.description.clone() };
        let (id, message) = (node.id.clone(), String::new());
        let state = if number == 2 { NodeState::Down } else { NodeState::Ready };
        let action = Action::SetNodeStatus { id, state, message, description: Some(description) };
        cluster.propose(Command::now(action)).await.unwrap();
    }
    let (_, answer) = client.post(rotate, "").await;
    assert_eq!(answer, json!({"KeyEpoch": 2, "Nodes": 2, "NodesDown": 1}));
    assert_eq!(cluster.state().cluster.unwrap().key_epoch, 2);
    let (_, answer) = client.get(rotate).await;
    assert_eq!(answer["message"], "page not found");
}

#[tokio::test]
async fn a_network_of_both_families_shows_both() {
    let client = Client::manager().await;
    let create = json!({
        "Name": "six", "Driver": "overlay", "EnableIPv6": true,
        "IPAM": {"Config": [{"Subnet": "fd00:6::/64", "Gateway": "fd00:6::1"}, {"Subnet": "10.66.0.0/24"}]},
    });
    let (status, answer) = client.post("/networks/create", &create.to_string()).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    let (_, six) = client.get("/networks/six").await;
    let ipam = json!([
        {"Subnet": "10.66.0.0/24", "Gateway": "10.66.0.1"},
        {"Subnet": "fd00:6::/64", "Gateway": "fd00:6::1"},
    ]);
    holds(&six, &json!({"EnableIPv4": true, "EnableIPv6": true, "IPAM": {"Config": ipam}}), "network");
    client.post("/networks/create", r#"{"Name":"auto","EnableIPv6":true}"#).await;
    for name in ["auto", "ingress"] {
        let (_, network) = client.get(&format!("/networks/{name}")).await;
        assert_eq!(network["EnableIPv6"], true, "{name}");
        let config = &network["IPAM"]["Config"];
        let subnet = config[1]["Subnet"].as_str().unwrap();
        assert!(config[0]["Subnet"].as_str().unwrap().starts_with("10.0."), "{config}");
        assert!(subnet.starts_with("fd") && subnet.ends_with("::/64"), "{config}");
    }
    // As Docker, one address a network: the IPv4 one.
    client.service("web", r#","Networks":[{"Target":"six"}]"#).await;
    let (_, service) = client.get("/services/web").await;
    assert_eq!(service["Endpoint"]["VirtualIPs"], json!([{"NetworkID": six["Id"], "Addr": "10.66.0.2/24"}]));
}

#[tokio::test]
async fn a_cluster_over_ipv6_shows_addresses_in_brackets() {
    let addrs = vec!["fe80::7/64".parse().unwrap(), "fd00::7/64".parse().unwrap()];
    let interface = crate::docker::Interface { name: "eth0".into(), up: true, addrs };
    for (request, manager) in [
        (r#"{"ListenAddr":"0.0.0.0:2377"}"#, "[fd00::7]:2377"),
        (r#"{"ListenAddr":"[::]:2377","AdvertiseAddr":"eth0:2400"}"#, "[fd00::7]:2400"),
        (r#"{"ListenAddr":"[fd00::7]:2500","AdvertiseAddr":"fd00::7"}"#, "[fd00::7]:2500"),
        (r#"{"AdvertiseAddr":"[fd00::7]:2400","DataPathAddr":"fd00::7"}"#, "[fd00::7]:2400"),
    ] {
        let client = Client::of(FakeHost::with_interfaces(vec![interface.clone()]));
        let (status, answer) = client.post("/swarm/init", request).await;
        assert_eq!(status, StatusCode::OK, "{request}: {answer}");
        let (_, node) = client.get("/nodes/n1").await;
        holds(&node, &json!({"Status": {"Addr": "fd00::7"}, "ManagerStatus": {"Addr": manager}}), "node");
        let (_, info) = client.get("/info").await;
        let swarm =
            json!({"NodeAddr": "fd00::7", "RemoteManagers": [{"NodeID": node["ID"], "Addr": manager}]});
        holds(&info["Swarm"], &swarm, "Swarm");
    }
}

#[tokio::test]
async fn the_clusters_labels_are_kept_from_init_on() {
    let client = Client::of(FakeHost::new());
    let init = r#"{"ListenAddr":"0.0.0.0:2377","Spec":{"Labels":{"shoal.return":"direct"}}}"#;
    assert_eq!(client.post("/swarm/init", init).await.0, StatusCode::OK);
    let (_, swarm) = client.get("/swarm").await;
    assert_eq!(swarm["Spec"]["Labels"], json!({"shoal.return": "direct"}));
}

#[tokio::test]
async fn a_node_shows_how_each_uplink_is_attached() {
    let client = Client::manager().await;
    client.host.add_node("n2", Role::Worker).await;
    let (_, node) = client.get("/nodes/n2").await;
    let plugins = json!([
        {"Type": "Dataplane", "Name": "eth0=xdp-native"},
        {"Type": "Dataplane", "Name": "eth1=tc"},
        {"Type": "Network", "Name": "overlay"},
    ]);
    assert_eq!(node["Description"]["Engine"]["Plugins"], plugins);
}

#[tokio::test]
async fn objects_are_found_by_id_name_and_beginning() {
    let client = Client::manager().await;
    let id = client.service("web", "").await;
    for input in [&id[..], "web", &id[..12]] {
        assert_eq!(client.get(&format!("/services/{input}")).await.1["ID"], json!(id), "{input}");
    }
    // 40 services: two ids begin alike.
    for number in 0..40 {
        client.service(&format!("s{number}"), "").await;
    }
    let (_, services) = client.get("/services").await;
    let firsts: Vec<char> = services
        .as_array()
        .unwrap()
        .iter()
        .map(|service| service["ID"].as_str().unwrap().chars().next().unwrap())
        .collect();
    let twice = firsts.iter().find(|first| firsts.iter().filter(|other| other == first).count() > 1).unwrap();
    let (status, answer) = client.get(&format!("/services/{twice}")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(answer["message"].as_str().unwrap().contains("is ambiguous"), "{answer}");
}

#[tokio::test]
async fn a_service_without_a_name_gets_one() {
    let client = Client::manager().await;
    let (status, answer) = client
        .post("/services/create", r#"{"TaskTemplate":{"ContainerSpec":{"Image":"shoal/whoami"}}}"#)
        .await;
    assert_eq!(status, StatusCode::CREATED);
    let (_, service) = client.get(&format!("/services/{}", answer["ID"].as_str().unwrap())).await;
    assert!(service["Spec"]["Name"].as_str().unwrap().contains('_'));
}

#[tokio::test]
async fn nodes_list_with_dockers_words() {
    let client = Client::manager().await;
    client.host.add_node("n2", Role::Worker).await;
    let (_, nodes) = client.get("/nodes?filters=%7B%22name%22%3A%5B%22n2%22%5D%7D").await;
    let expected = json!({
        "Spec": {"Role": "worker", "Availability": "active", "Labels": {}},
        "Description": {
            "Hostname": "n2", "Platform": {"Architecture": "x86_64", "OS": "linux"},
            "Resources": {"NanoCPUs": 2_000_000_000, "MemoryBytes": 1 << 30}, "Engine": {"EngineVersion": "0.1.0"},
        },
        "Status": {"State": "ready"},
        "ManagerStatus": null,
    });
    holds(&nodes[0], &expected, "node");
    let (_, manager) = client.get("/nodes/n1").await;
    holds(
        &manager["ManagerStatus"],
        &json!({"Leader": true, "Reachability": "reachable", "Addr": "192.0.2.7:2377"}),
        "manager",
    );
    let version = nodes[0]["Version"]["Index"].as_u64().unwrap();
    let body = r#"{"Role":"worker","Availability":"drain","Labels":{"zone":"b"}}"#;
    let (status, answer) = client.post(&format!("/nodes/n2/update?version={version}"), body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (_, node) = client.get("/nodes/n2").await;
    holds(&node["Spec"], &json!({"Availability": "drain", "Labels": {"zone": "b"}}), "spec");
}

#[tokio::test]
async fn events_tell_what_happens() {
    use futures::StreamExt as _;

    let client = Client::manager().await;
    let filters = "%7B%22type%22%3A%5B%22service%22%2C%22network%22%5D%7D";
    let request = Request::get(format!("/events?filters={filters}")).body(Body::empty()).unwrap();
    let response = client.router.clone().oneshot(request).await.unwrap();
    let mut stream = response.into_body().into_data_stream();
    let mut next = async || {
        let line = tokio::time::timeout(std::time::Duration::from_secs(10), stream.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let event: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(event["scope"], "swarm");
        assert_eq!(event["timeNano"].as_u64().unwrap() / 1_000_000_000, event["time"].as_u64().unwrap());
        let name = event["Actor"]["Attributes"]["name"].as_str().unwrap();
        format!("{} {} {name}", event["Type"].as_str().unwrap(), event["Action"].as_str().unwrap())
    };
    client.post("/networks/create", r#"{"Name":"front"}"#).await;
    assert_eq!(next().await, "network create front");
    client.post("/shoal/v1/networks/front/subnets", "{}").await;
    assert_eq!(next().await, "network update front");
    client.service("web", "").await;
    assert_eq!(next().await, "service create web");
    client.ask(Method::DELETE, "/services/web", "").await;
    assert_eq!(next().await, "service remove web");
}

#[tokio::test]
async fn the_modes_of_docker_py_are_understood() {
    let client = Client::manager().await;
    let spec = r#"{"Name":"NAME","TaskTemplate":{"ContainerSpec":{"Image":"shoal/whoami"}},"Mode":MODE}"#;
    for (name, mode, shown) in [
        ("web", r#"{"replicated":{"Replicas":3}}"#, serde_json::json!({ "Replicated": { "Replicas": 3 } })),
        ("each", r#"{"global":{}}"#, serde_json::json!({ "Global": {} })),
    ] {
        let body = spec.replace("NAME", name).replace("MODE", mode);
        let (status, answer) = client.post("/services/create", &body).await;
        assert_eq!(status, axum::http::StatusCode::CREATED, "{answer}");
        let (_, service) = client.get(&format!("/services/{name}")).await;
        assert_eq!(service["Spec"]["Mode"], shown);
    }
}
