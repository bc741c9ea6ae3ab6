//! What a manager's disk holds while it does not run, and a manager that begins with what came back.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_api::seal::UnlockKey;

use super::{host, world};
use crate::backup::Backup;
use crate::backup::revive::revive;
use crate::cluster::{Cluster, InitRequest, OpenError};
use crate::command::{Action, Command};
use crate::model::{ClusterSpec, State};
use crate::raft::offline::OnDisk;
use crate::raft::{Isolated, Manager, Storage};
use crate::store::StoreError;
use crate::testing::network;

fn create(name: &str) -> Command {
    Command::now(Action::CreateNetwork { id: name.into(), spec: network(name) })
}

fn manager() -> Manager {
    Manager { node: "n9".into(), addr: (Ipv4Addr::LOCALHOST, 2377).into() }
}

fn autolocked() -> InitRequest {
    InitRequest { spec: ClusterSpec { autolock: true, ..ClusterSpec::default() }, ..InitRequest::default() }
}

fn unlock_key(state: &State) -> Option<UnlockKey> {
    state.cluster.as_ref().unwrap().lock.key.clone()
}

#[tokio::test]
async fn a_state_that_was_laid_down_is_a_cluster_of_one_that_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("manager");
    let state = world().state;
    let file = Backup::write(&state, SystemTime::now()).unwrap();
    let read = Backup::read(&file).unwrap().state;
    let revived = revive(read, None, &host("n9"), SystemTime::now(), &mut rand::rng()).unwrap().state;
    Cluster::lay_down(&dir, manager(), revived.clone()).await.unwrap();
    let again = Cluster::lay_down(&dir, manager(), revived.clone()).await;
    assert!(matches!(again, Err(OpenError::Exists(_))));
    let mut last = revived.index;
    for name in ["one", "two"] {
        let cluster = Cluster::open(&dir).await.unwrap();
        assert_eq!(cluster.managers().len(), 1);
        assert_eq!(cluster.managers()[0].manager, manager());
        assert_eq!(cluster.linearizable().await.unwrap().services, state.services);
        let index = cluster.propose(create(name)).await.unwrap().index;
        assert!(index > last, "{index} is not above {last}");
        last = index;
        cluster.shutdown().await;
    }
    let cluster = Cluster::open(&dir).await.unwrap();
    assert!(cluster.state().network_by_name("one").is_some());
    cluster.shutdown().await;
}

#[tokio::test]
async fn a_disk_says_all_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::create(dir.path(), InitRequest::default()).await.unwrap();
    for at in 0..30 {
        cluster.propose(create(&format!("n{at}"))).await.unwrap();
    }
    let in_use = Storage::open(dir.path()).unwrap_err().to_string();
    assert!(in_use.contains("stop that one"), "{in_use}");
    let state = cluster.state();
    cluster.shutdown().await;
    let storage = Storage::open(dir.path()).unwrap();
    let OnDisk { state: read, undecided } = storage.read().unwrap();
    assert!(read == state && undecided == 0);
    storage.close().await;
    let cluster = Cluster::open(dir.path()).await.unwrap();
    assert_eq!(cluster.state(), state, "reading changes nothing");
    cluster.shutdown().await;
}

#[tokio::test]
async fn a_locked_disk_is_read_with_its_unlock_key_alone() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::create(dir.path(), autolocked()).await.unwrap();
    let (state, key) = (cluster.state(), unlock_key(&cluster.state()).unwrap());
    cluster.shutdown().await;
    assert!(matches!(Storage::open(dir.path()), Err(StoreError::Locked)));
    let wrong = Storage::unlock(dir.path(), Some(&UnlockKey::random()));
    assert!(matches!(wrong, Err(StoreError::WrongUnlockKey)));
    let storage = Storage::unlock(dir.path(), Some(&key)).unwrap();
    assert_eq!(storage.read().unwrap().state, state);
    storage.close().await;

    // What comes back is locked as it was.
    let file = Backup::write(&state, SystemTime::now()).unwrap();
    let read = Backup::read(&file).unwrap().state;
    let revived = revive(read, None, &host("n9"), SystemTime::now(), &mut rand::rng()).unwrap().state;
    let other = dir.path().join("other");
    Cluster::lay_down(&other, manager(), revived.clone()).await.unwrap();
    assert!(Cluster::open(&other).await.is_err());
    let cluster = Cluster::open_at(&other, Arc::new(Isolated), Some(key)).await.unwrap();
    assert_eq!(cluster.state(), revived);
    cluster.shutdown().await;
}
