//! How the nodes are, over the API: with a leader, and without.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use mesh_api::health::{NodeHealth, Problem, UplinkHealth, WireguardHealth, WireguardKind};
use mesh_api::table::Role;
use serde_json::{Value, json};

use super::host::{Client, FakeHost};
use crate::docker::local::LocalNode as _;
use crate::raft::Reporter;
use crate::session::{NodeReport, Report, SessionReport};

const PATH: &str = "/shoal/v1/status";

fn session(behind: u64, behind_ms: Option<u64>) -> SessionReport {
    let (since_ns, heard_ns) = (1_000_000_000, 2_500_000_000);
    SessionReport { is_open: true, since_ns, heard_ns, applied: 40, behind, behind_ms }
}

#[tokio::test]
async fn each_node_is_shown_as_the_leader_knows_it() {
    let client = Client::manager().await;
    let cluster = client.host.cluster().unwrap();
    let first = cluster.state().nodes.keys().next().unwrap().clone();
    let second = client.host.add_node("n2", Role::Worker).await;
    let third = client.host.add_node("n3", Role::Worker).await;
    let uplink = UplinkHealth { name: "eth0".into(), mode: "xdp-native".into(), mtu: 9000 };
    let wireguard = Some(WireguardHealth { kind: WireguardKind::UserSpace, key_made_ns: 3_000_000_000 });
    let problem = Some(Problem { text: "no uplink".into(), at_ns: 4_000_000_000 });
    let healthy = NodeHealth { uplinks: vec![uplink], wireguard, problem };
    let nodes = BTreeMap::from([
        (first.clone(), NodeReport { session: Some(session(0, None)), health: Some(healthy) }),
        (
            second.clone(),
            NodeReport { session: Some(session(2, Some(340))), health: Some(NodeHealth::default()) },
        ),
    ]);
    let refused = BTreeMap::from([("token".to_owned(), 3)]);
    let report = Report { index: 42, refused, nodes: Some(nodes) };
    cluster.report_by(Reporter::new(move || Some(report.clone())));

    let (status, answer) = client.get(PATH).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!((&answer["Index"], &answer["Leader"], answer.get("Note")), (&json!(42), &json!(first), None));
    let node =
        |id: &str| answer["Nodes"].as_array().unwrap().iter().find(|node| node["ID"] == id).unwrap().clone();
    let open = |behind: u64, behind_ms: u64| {
        json!({"Open": true, "Since": "1970-01-01T00:00:01Z", "Heard": "1970-01-01T00:00:02.5Z", "Applied": 40,
               "Behind": behind, "BehindMs": behind_ms})
    };
    let expected = json!({
        "ID": first, "Hostname": "n1", "Role": "manager", "Leader": true, "State": "ready", "Version": "0.1.0",
        "Session": open(0, 0),
        "Uplinks": [{"Name": "eth0", "Mode": "xdp-native", "MTU": 9000}],
        "WireGuard": {"Kind": "user-space", "KeyMade": "1970-01-01T00:00:03Z"},
        "Problem": {"Text": "no uplink", "Time": "1970-01-01T00:00:04Z"},
    });
    assert_eq!(node(first.as_str()), expected);
    let shown = node(second.as_str());
    assert_eq!((&shown["Leader"], &shown["Session"]), (&json!(false), &open(2, 340)));
    assert_eq!((&shown["WireGuard"], &shown["Problem"]), (&json!({"Kind": "none"}), &Value::Null));
    let shown = node(third.as_str());
    assert_eq!((&shown["Session"], &shown["WireGuard"]), (&Value::Null, &Value::Null), "it has said nothing");
    let manager =
        json!({"ID": first, "Hostname": "n1", "Answers": true, "Index": 42, "Refused": {"token": 3}});
    assert_eq!(answer["Managers"], json!([manager]));
}

#[tokio::test]
async fn what_is_known_without_a_leader_is_shown_with_a_word_on_it() {
    let client = Client::manager().await;
    let cluster = client.host.cluster().unwrap();
    let first = cluster.state().nodes.keys().next().unwrap().clone();
    let (status, answer) = client.get(PATH).await;
    assert_eq!(status, StatusCode::OK);
    assert!(answer["Note"].as_str().unwrap().contains("leader does not answer"), "{answer}");
    let manager = json!({"ID": first, "Hostname": "n1", "Answers": false, "Index": null, "Refused": null});
    assert_eq!((&answer["Leader"], &answer["Managers"]), (&Value::Null, &json!([manager])));

    // It answers, and does not lead.
    cluster.report_by(Reporter::new(|| Some(Report { index: 42, refused: BTreeMap::new(), nodes: None })));
    let (_, answer) = client.get(&format!("/v1.50{PATH}")).await;
    assert_eq!((&answer["Leader"], &answer["Managers"][0]["Refused"]), (&Value::Null, &json!({})));
    assert_eq!(answer["Index"], json!(cluster.state().index), "its own");
    let node = &answer["Nodes"][0];
    assert_eq!(
        (&node["Hostname"], &node["Role"], &node["Leader"]),
        (&json!("n1"), &json!("manager"), &json!(false))
    );
    let modes = json!([{"Name": "eth0", "Mode": "xdp-native"}, {"Name": "eth1", "Mode": "tc"}]);
    assert_eq!((&node["Session"], &node["Uplinks"]), (&Value::Null, &modes), "as the state has it");
}

#[tokio::test]
async fn who_can_not_tell_says_why() {
    let (status, answer) = Client::manager().await.get(&format!("{PATH}?node=n1")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(answer["message"], "unknown parameter 'node': this takes none");
    for (host, part) in
        [(FakeHost::new(), "docker swarm init"), (FakeHost::worker(), "Worker nodes can't be used")]
    {
        let (status, answer) = Client::of(host).get(PATH).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer["message"].as_str().unwrap().contains(part), "{answer}");
    }
}
