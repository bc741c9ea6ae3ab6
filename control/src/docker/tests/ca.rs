//! The certificate authority, as users of the `docker` command line see it.

use std::time::Duration;

use mesh_api::table::Role;
use serde_json::Value;

use super::docker::Docker;
use super::host::FakeHost;
use crate::command::{Action, Command};
use crate::docker::local::LocalNode as _;
use crate::model::{ClusterObject, JoinSecrets};

impl Docker {
    fn cluster_object(&self) -> std::sync::Arc<ClusterObject> {
        self.host.cluster().unwrap().state().cluster.unwrap()
    }

    async fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(line).await).unwrap()
    }

    /// Every node renews its certificate, and the leader takes the former root away.
    async fn completes_rotation(&self) {
        let cluster = self.host.cluster().unwrap();
        let mut states = cluster.watch();
        let next = |state: &crate::model::State| {
            let rotation = state.cluster.as_ref().unwrap().ca.rotation.clone();
            rotation.map(|rotation| rotation.root.id)
        };
        let root = next(&states.wait_for(|state| next(state).is_some()).await.unwrap()).unwrap();
        for id in cluster.state().nodes.keys().cloned() {
            cluster.propose(Command::now(Action::SetNodeIssuer { id, issuer: root })).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let join_secrets = JoinSecrets { worker: [1; 16], manager: [2; 16] };
        cluster.propose(Command::now(Action::FinishRotation { root, join_secrets })).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_is_shown_and_rotated_and_nodes_show_what_they_trust() {
    let Some(docker) = Docker::of(FakeHost::new()).await else { return };
    docker.fails("swarm init --cert-expiry 30m", &["minimum certificate expiry time is 1h0m0s"]).await;
    docker.ok("swarm init --cert-expiry 48h").await;
    docker.host.add_node("n2", Role::Worker).await;
    docker.shows("info", &["Expiry Duration: 2 days", "Force Rotate: 0"]).await;
    let root = docker.ok("swarm ca").await;
    assert_eq!(root.trim(), docker.cluster_object().ca.root.certificate.trim());
    let of_cluster = "info --format {{json·.Swarm.Cluster.TLSInfo}}";
    let of_node = "node inspect n2 --format {{json·.Description.TLSInfo}}";
    let (cluster, node) = (docker.json(of_cluster).await, docker.json(of_node).await);
    assert_eq!(cluster, node);
    // A name of one attribute: the common name `swarm-ca`.
    assert_eq!(cluster["CertIssuerSubject"], "MBMxETAPBgNVBAMMCHN3YXJtLWNh");
    // The public key of P-256.
    assert!(
        cluster["CertIssuerPublicKey"].as_str().unwrap().starts_with("MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE")
    );

    let tokens =
        [docker.ok("swarm join-token -q worker").await, docker.ok("swarm join-token -q manager").await];
    docker.ok("swarm ca --rotate --detach --cert-expiry 3h").await;
    docker
        .shows("info", &["Expiry Duration: 3 hours", "Force Rotate: 1", "Root Rotation In Progress: true"])
        .await;
    docker.fails("swarm ca --rotate --detach", &["the root certificate is being rotated already"]).await;
    docker.fails("swarm update --cert-expiry 59m", &["minimum certificate expiry time is 1h0m0s"]).await;
    let wanted = docker.json(of_cluster).await;
    assert_ne!(wanted["CertIssuerPublicKey"], cluster["CertIssuerPublicKey"], "what nodes are to come to");
    assert_eq!(wanted["TrustRoot"], cluster["TrustRoot"]);
    let meanwhile = docker.json(of_node).await;
    assert_eq!(meanwhile["CertIssuerPublicKey"], cluster["CertIssuerPublicKey"]);
    assert_eq!(meanwhile["TrustRoot"].as_str().unwrap().matches("BEGIN CERTIFICATE").count(), 2);
    docker.completes_rotation().await;
    assert_eq!(docker.json(of_node).await, docker.json(of_cluster).await);
    let rotated =
        [docker.ok("swarm join-token -q worker").await, docker.ok("swarm join-token -q manager").await];
    for (before, after) in tokens.iter().zip(&rotated) {
        let parts = |token: &str| token.trim().rsplitn(3, '-').map(str::to_owned).collect::<Vec<_>>();
        let (before, after) = (parts(before), parts(after));
        assert!(before[0] != after[0] && before[1] != after[1], "{before:?} {after:?}");
    }

    // The command line waits for all nodes, and shows the new root.
    let (shown, ()) = tokio::join!(docker.ok("swarm ca --rotate"), docker.completes_rotation());
    let now = docker.ok("swarm ca").await;
    assert!(now != root && shown.contains(now.trim()), "{shown}");
    docker.shows("swarm update --cert-expiry 1h", &["Swarm updated."]).await;
    assert!(docker.cluster_object().ca.rotation.is_none(), "an update alone changes no root");

    let pem = docker.dir.path().join("root.pem");
    std::fs::write(&pem, &now).unwrap();
    let pem = pem.display();
    for line in [
        format!("swarm ca --rotate --detach --ca-cert {pem} --ca-key {pem}"),
        "swarm update --external-ca protocol=cfssl,url=https://ca.test".to_owned(),
    ] {
        docker.fails(&line, &["come from a CA of its own", "`docker swarm ca --rotate` alone"]).await;
    }
}
