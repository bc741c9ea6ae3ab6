//! The handle: proposals come into effect once, in order, and stay.

use mesh_api::table::Role;

use super::{Cluster, InitRequest, OpenError, ProposeError};
use crate::command::{Action, Command};
use crate::refusal::Refusal;
use crate::testing::{description, network};

fn create_network(name: &str) -> Command {
    Command::now(Action::CreateNetwork { id: name.into(), spec: network(name) })
}

#[tokio::test]
async fn a_cluster_is_the_same_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("state");
    assert!(matches!(Cluster::open(&dir).await, Err(OpenError::Absent(_))));
    let cluster = Cluster::create(&dir, InitRequest::default()).await.unwrap();
    let founded = cluster.state().index;
    let reply = cluster.propose(create_network("app")).await.unwrap();
    assert_eq!((reply.index, cluster.state().index), (founded + 1, founded + 1));
    let (before, token) = (cluster.state(), cluster.join_token(Role::Worker));
    assert_ne!(token, cluster.join_token(Role::Manager));
    cluster.shutdown().await;
    assert!(matches!(cluster.propose(create_network("late")).await, Err(ProposeError::Stopped)));
    assert!(matches!(Cluster::create(&dir, InitRequest::default()).await, Err(OpenError::Exists(_))));
    let cluster = Cluster::open(&dir).await.unwrap();
    assert_eq!(cluster.state(), before);
    assert_eq!(cluster.join_token(Role::Worker), token);
    assert!(cluster.propose(create_network("more")).await.unwrap().index > before.index);
    cluster.shutdown().await;
}

#[tokio::test]
async fn proposals_at_once_all_come_into_effect_and_refusals_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::create(dir.path(), InitRequest::default()).await.unwrap();
    let mut states = cluster.watch();
    let proposals = (0..1500).map(|at| {
        let cluster = cluster.clone();
        // Every third takes a name that is taken.
        tokio::spawn(async move { cluster.propose(create_network(&format!("n{}", at - at % 3 % 2))).await })
    });
    let mut accepted = 0;
    let mut last = 0;
    for proposal in proposals.collect::<Vec<_>>() {
        match proposal.await.unwrap() {
            Ok(reply) => {
                accepted += 1;
                last = last.max(reply.index);
            }
            Err(error) => assert!(matches!(error, ProposeError::Refused(Refusal::IdTaken(_))), "{error}"),
        }
    }
    let before = cluster.state();
    assert_eq!((accepted, before.networks.len(), before.index), (1000, 1001, last));
    states.borrow_and_update();
    assert!(cluster.propose(create_network("n0")).await.is_err());
    let noted = cluster.linearizable().await.unwrap();
    assert!(noted == before && !states.has_changed().unwrap(), "a refusal wakes nobody");
    cluster.shutdown().await;
    let cluster = Cluster::open(dir.path()).await.unwrap();
    assert_eq!(cluster.state(), before, "snapshot and log together");
    cluster.shutdown().await;
}

#[tokio::test]
async fn a_wrong_request_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("state");
    let request = InitRequest { subnet_size: 31, ..InitRequest::default() };
    assert!(matches!(Cluster::create(&dir, request).await, Err(OpenError::Refused(_))));
    assert!(!dir.exists());
}

#[tokio::test]
async fn the_ingress_network_avoids_the_hosts_own_subnets() {
    let dir = tempfile::tempdir().unwrap();
    let request = InitRequest { avoid: vec!["10.0.0.0/22".parse().unwrap()], ..InitRequest::default() };
    let cluster = Cluster::create(dir.path(), request).await.unwrap();
    assert_eq!(cluster.state().ingress().unwrap().subnets[0].cidr.to_string(), "10.0.4.0/24");
    let node = Action::AddNode {
        id: "n".into(),
        role: Role::Worker,
        description: description("n"),
        issuer: mesh_api::tls::KeyId::default(),
    };
    cluster.propose(Command::now(node)).await.unwrap();
    assert!(!format!("{:?}", cluster.state()).contains("PRIVATE"), "secrets don't reach logs");
}
