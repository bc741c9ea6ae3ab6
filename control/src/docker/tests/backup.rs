//! A swarm is backed up by one host and restored by another, over the API; and what the API refuses of it.

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, StatusCode};
use mesh_api::table::Role;
use serde_json::Value;
use tower::ServiceExt as _;

use super::host::{ADDR, Client, FakeHost};
use crate::backup::{Backup, BackupError};
use crate::docker::local::{LocalNode as _, Membership, RestoreError};
use crate::docker::{ApiError, Interface, SwarmError};

const BACKUP: &str = "/shoal/v1/backup";
const RESTORE: &str = "/shoal/v1/restore";

impl Client {
    /// Asks with bytes, and gets bytes.
    async fn exchange(&self, method: Method, path: &str, body: impl Into<Body>) -> (StatusCode, Bytes) {
        let request = Request::builder().method(method).uri(path).body(body.into()).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        (status, axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap())
    }

    async fn backup(&self) -> Bytes {
        let (status, file) = self.exchange(Method::GET, BACKUP, "").await;
        assert_eq!(status, StatusCode::OK, "{file:?}");
        file
    }

    async fn restore(&self, query: &str, file: impl Into<Body>) -> (StatusCode, Value) {
        let (status, answer) = self.exchange(Method::POST, &format!("{RESTORE}{query}"), file).await;
        (status, serde_json::from_slice(&answer).unwrap())
    }

    async fn is_refused(&self, query: &str, file: impl Into<Body>, status: u16, part: &str) {
        let (answered, answer) = self.restore(query, file).await;
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(
            answered.as_u16() == status && message.contains(part),
            "{query}: {answered} {message:?} lacks {part:?}"
        );
    }
}

#[tokio::test]
async fn what_one_manager_had_another_host_goes_on_with() {
    let lost = Client::manager().await;
    let other = lost.host.add_node("m2", Role::Manager).await;
    let worker = lost.host.add_node("w1", Role::Worker).await;
    lost.service("web", r#","EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":8080}]}"#).await;
    let before = lost.host.cluster().unwrap().state();
    let file = lost.backup().await;
    assert!(Backup::read(&file).unwrap().state == before);

    let addrs = vec!["198.51.100.9/24".parse().unwrap()];
    let host = FakeHost::with_interfaces(vec![Interface { name: "eth0".into(), up: true, addrs }]);
    let client = Client::of(host);
    let (status, answer) = client.restore("?listenAddr=0.0.0.0:2378", file.clone()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let cluster = before.cluster.as_ref().unwrap();
    assert_eq!(answer["ID"], cluster.id.as_str());
    assert_eq!(answer["Advertise"], "198.51.100.9:2378");
    let mut demoted: Vec<_> =
        answer["Demoted"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    demoted.sort_unstable();
    assert_eq!(demoted, ["m2", "n1"]);

    // It is the swarm, and goes on.
    let (_, services) = client.get("/services").await;
    assert_eq!(services[0]["Spec"]["Name"], "web");
    assert_eq!(services[0]["Endpoint"]["Ports"][0]["PublishedPort"], 8080);
    let (_, nodes) = client.get("/nodes").await;
    let managers = nodes.as_array().unwrap().iter().filter(|node| node["Spec"]["Role"] == "manager");
    assert_eq!(managers.map(|node| &node["ID"]).collect::<Vec<_>>(), [&answer["NodeID"]]);
    let ids: Vec<_> = nodes.as_array().unwrap().iter().filter_map(|node| node["ID"].as_str()).collect();
    assert!(ids.contains(&other.as_str()) && ids.contains(&worker.as_str()));
    let (status, more) = client.post("/networks/create", r#"{"Name":"more","Driver":"overlay"}"#).await;
    assert_eq!(status, StatusCode::CREATED, "{more}");
    let after = client.host.cluster().unwrap().state();
    assert!(after.index > answer["Index"].as_u64().unwrap());
    assert!(answer["Index"].as_u64().unwrap() > before.index);
    // And can be backed up in turn.
    assert!(Backup::read(&client.backup().await).unwrap().state == after);

    client.is_refused("", file, 409, "docker swarm leave --force").await;
}

#[tokio::test]
async fn a_worker_of_the_swarm_keeps_its_id_and_its_address() {
    let lost = Client::manager().await;
    let file = lost.backup().await;
    let client = Client::of(FakeHost::worker());
    let Membership::Active { node, .. } = client.host.membership() else { panic!("it is no node") };
    for (query, part) in [
        ("?advertiseAddr=198.51.100.1", "--advertise-addr"),
        ("?dataPathAddr=192.0.2.7", "--data-path-addr: this host is a node"),
        ("?listenAddr=nowhere", "--listen-addr"),
    ] {
        client.is_refused(query, file.clone(), 400, part).await;
    }
    client.is_refused("", file.clone(), 409, "--force").await;
    let (status, answer) = client.restore(&format!("?advertiseAddr={ADDR}:2379&force=1"), file).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(
        (answer["NodeID"].as_str(), answer["Advertise"].as_str()),
        (Some(node.as_str()), Some("192.0.2.7:2379"))
    );
    let membership = client.host.membership();
    assert!(matches!(membership, Membership::Active { role: Role::Manager, .. }), "{membership:?}");
}

#[tokio::test]
async fn only_a_manager_that_runs_has_a_backup() {
    for (client, part) in [
        (Client::of(FakeHost::new()), "Use \"docker swarm init\""),
        (Client::of(FakeHost::worker()), "Worker nodes can't be used"),
    ] {
        let (status, answer) = client.get(BACKUP).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(answer["message"].as_str().unwrap().contains(part), "{answer}");
    }
    let client = Client::manager().await;
    let (status, answer) = client.get(&format!("{BACKUP}?file=x")).await;
    assert_eq!(
        (status, answer["message"].as_str().unwrap().contains("takes none")),
        (StatusCode::BAD_REQUEST, true)
    );
    client.host.cluster().unwrap().shutdown().await;
    let (status, answer) = client.get(BACKUP).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("shutting down"), "{answer}");
}

#[tokio::test]
async fn what_is_no_backup_is_refused_and_changes_nothing() {
    let file = Client::manager().await.backup().await;
    let client = Client::of(FakeHost::new());
    client.is_refused("", "", 400, "the backup can't be read: the file is empty").await;
    client.is_refused("", "hello", 400, "no backup of a swarm").await;
    client.is_refused("", file.slice(..file.len() - 1), 400, "copy the file again").await;
    client.is_refused("?flags=all", file.clone(), 400, "unknown parameter 'flags'").await;
    client.is_refused("?force=perhaps", file.clone(), 400, "invalid value for force").await;
    let zeros = Bytes::from(vec![0; 1 << 16]);
    let endless = futures::stream::repeat_with(move || std::io::Result::Ok(zeros.clone()));
    client.is_refused("", Body::from_stream(endless), 400, "no backup of a swarm").await;
    assert_eq!(client.host.membership(), Membership::Inactive);
    assert!(client.host.cluster().is_none());
}

#[test]
fn errors_say_whose_fault_they_are() {
    let status = |error: RestoreError| ApiError::from(error).status.as_u16();
    let (own, backup) = ("a".into(), "b".into());
    let alive = RestoreError::Alive("m2 answers".to_owned());
    assert!(alive.to_string().contains("m2 answers. ") && alive.to_string().contains("--force"));
    assert_eq!(status(alive), 409);
    let other = RestoreError::OtherSwarm { own, backup };
    assert!(other.to_string().contains("another swarm (a) than the backup's (b)"));
    assert_eq!(status(other), 409);
    assert_eq!(status(RestoreError::Manager), 409);
    assert_eq!(status(RestoreError::Unfit(BackupError::Empty.to_string())), 400);
    let listen = SwarmError::Listen { listen: (ADDR, 2377).into(), cause: "in use".to_owned() };
    assert_eq!(status(listen.into()), 400);
    assert_eq!(status(SwarmError::Host(String::new()).into()), 500);
}
