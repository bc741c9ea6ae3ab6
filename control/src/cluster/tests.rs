//! The handle: proposals come into effect once, in order, and stay.

use mesh_api::table::Role;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_api::seal::UnlockKey;
use tokio::time::timeout;

use super::{Cluster, InitRequest, OpenError, ProposeError};
use crate::command::{Action, Command};
use crate::model::ClusterSpec;
use crate::raft::{Isolated, SNAPSHOT_EVERY};
use crate::refusal::Refusal;
use crate::store::{StoreError, folder};
use crate::testing::{description, network, service};

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
        token: None,
    };
    cluster.propose(Command::now(node)).await.unwrap();
    assert!(!format!("{:?}", cluster.state()).contains("PRIVATE"), "secrets don't reach logs");
}

impl Cluster {
    /// `docker swarm update --autolock=…`, with another unlock key or without one.
    async fn set_lock(&self, key: Option<&UnlockKey>) {
        let present = self.state().cluster.unwrap();
        let spec = ClusterSpec { autolock: key.is_some(), ..present.spec.clone() };
        let update = Action::UpdateCluster {
            version: present.meta.version,
            spec,
            worker_secret: None,
            manager_secret: None,
            rotation: None,
            unlock_key: key.cloned(),
        };
        self.propose(Command::now(update)).await.unwrap();
        let mut seal = self.keys().unwrap().watch();
        let follows = async {
            // The file changes last of what can be seen here.
            while self.keys().unwrap().unlock_key().as_ref() != key {
                let _ = timeout(Duration::from_millis(10), seal.changed()).await;
            }
        };
        timeout(Duration::from_secs(20), follows).await.unwrap();
    }
}

async fn opens(dir: &Path, key: Option<&UnlockKey>) -> Result<Cluster, OpenError> {
    Cluster::open_at(dir, Arc::new(Isolated), key.cloned()).await
}

#[tokio::test]
async fn a_managers_files_follow_the_clusters_lock() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("state");
    let (one, other) = (UnlockKey::random(), UnlockKey::random());
    let mut cluster = Cluster::create(&dir, InitRequest::default()).await.unwrap();
    for (key, former) in
        [(Some(&one), None), (Some(&other), Some(&one)), (None, Some(&other)), (Some(&one), None)]
    {
        cluster.set_lock(key).await;
        let before = cluster.state();
        cluster.shutdown().await;
        assert_eq!(folder::is_locked(&dir).unwrap(), key.is_some());
        if key.is_some() {
            let refused = opens(&dir, former).await.unwrap_err();
            let expected = if former.is_some() { StoreError::WrongUnlockKey } else { StoreError::Locked };
            assert_eq!(refused.to_string(), expected.to_string());
            assert_eq!(refused.is_wrong_key(), former.is_some());
        }
        cluster = opens(&dir, key).await.unwrap();
        assert_eq!(cluster.state(), before);
    }
    cluster.shutdown().await;
}

#[tokio::test]
async fn autolock_without_a_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::create(dir.path(), InitRequest::default()).await.unwrap();
    let present = cluster.state().cluster.unwrap();
    let update = Action::UpdateCluster {
        version: present.meta.version,
        spec: ClusterSpec { autolock: true, ..present.spec.clone() },
        worker_secret: None,
        manager_secret: None,
        rotation: None,
        unlock_key: None,
    };
    let refused = cluster.propose(Command::now(update)).await.unwrap_err();
    assert!(refused.to_string().contains("EncryptionConfig.AutoLockManagers"), "{refused}");
    cluster.shutdown().await;
}

/// Whether any file below `dir` holds `secret`.
fn holds(dir: &Path, secret: &[u8]) -> bool {
    std::fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, secret);
        }
        std::fs::read(path).unwrap().windows(secret.len()).any(|window| window == secret)
    })
}

#[tokio::test]
async fn no_secret_is_in_any_file_in_the_clear() {
    for autolock in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let spec = ClusterSpec { autolock, ..ClusterSpec::default() };
        let cluster =
            Cluster::create(dir.path(), InitRequest { spec, ..InitRequest::default() }).await.unwrap();
        assert_eq!(folder::is_locked(dir.path()).unwrap(), autolock, "from the first file on");
        let mut spec = service("web", 1);
        spec.task.container.env = vec!["PASSWORD=correct horse".to_owned()];
        let spec = Box::new(spec);
        cluster.propose(Command::now(Action::CreateService { id: "web".into(), spec })).await.unwrap();
        // Enough for a snapshot.
        for at in 0..SNAPSHOT_EVERY + 100 {
            cluster.propose(create_network(&format!("n{at}"))).await.unwrap();
        }
        let has_snapshot = || {
            std::fs::read_dir(dir.path())
                .unwrap()
                .any(|entry| entry.unwrap().file_name().to_string_lossy().starts_with("snapshot-"))
        };
        let snapshot = async {
            while !has_snapshot() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(20), snapshot).await.unwrap();
        let object = cluster.state().cluster.unwrap();
        let state = serde_json::to_string(&cluster.state()).unwrap();
        let join_secret = serde_json::to_string(&object.join_secrets.manager).unwrap();
        cluster.shutdown().await;
        let mut secrets = vec!["correct horse".to_owned(), "PRIVATE KEY".to_owned(), join_secret];
        let key = object.lock.key.as_ref().map(|key| key.to_string().split_off("SWMKEY-1-".len()));
        assert_eq!(key.is_some(), autolock);
        secrets.extend(key);
        for secret in secrets {
            assert!(state.contains(&secret), "it is what the state has: {secret}");
            assert!(!holds(dir.path(), secret.as_bytes()), "{secret}");
        }
    }
}
