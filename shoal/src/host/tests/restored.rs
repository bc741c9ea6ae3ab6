//! A swarm is restored: on a host that is no node, on one that is, and not where it lives.

use std::time::SystemTime;

use control::backup::Backup;
use control::docker::{RestoreError, RestoreRequest, RestoredSwarm};
use control::model::Node;
use mesh_agent::SessionState;
use mesh_api::session::{ManagerDescription, NodeDescription};

use super::*;

#[test]
fn a_host_that_is_no_node_becomes_the_manager_of_a_restored_swarm() {
    alone(on_a_fresh_host);
}

#[test]
fn a_node_without_a_manager_keeps_its_id_in_a_restored_swarm() {
    alone(on_a_node);
}

fn backup(host: &Host) -> Box<Backup> {
    let file = Backup::write(&host.cluster().unwrap().state(), SystemTime::now()).unwrap();
    Box::new(Backup::read(&file).unwrap())
}

async fn restore(host: &Host, backup: &Backup, force: bool) -> Result<RestoredSwarm, RestoreError> {
    let InitRequest { listen, advertise, advertise_port, .. } = request();
    let backup = Box::new(backup.clone());
    let request = RestoreRequest { backup, listen, advertise, advertise_port, data_path: None, force };
    LocalNode::restore(host, request).await
}

async fn propose(host: &Host, action: Action) {
    host.cluster().unwrap().propose(Command::now(action)).await.unwrap();
}

fn own(host: &Host) -> Arc<Node> {
    let id = host.agent().unwrap().membership().unwrap().node_id;
    host.cluster().unwrap().state().nodes[&id].clone()
}

async fn on_a_fresh_host(dir: PathBuf) {
    let host = host(&dir, "eth0").await;
    let node = host.init(request()).await.unwrap();
    // Another manager, which answers for as long as the listener is there.
    let other = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = other.local_addr().unwrap();
    let manager = Some(ManagerDescription { raft: 7, addr });
    let elsewhere: IpAddr = [192, 0, 2, 2].into();
    let description = NodeDescription {
        hostname: "m2".to_owned(),
        addr: elsewhere,
        vtep: elsewhere,
        manager,
        wireguard: Vec::new(),
        ..own(&host).description.clone()
    };
    let (role, issuer) = (Role::Manager, own(&host).issuer);
    propose(&host, Action::AddNode { id: "m2".into(), role, description, issuer, token: None }).await;
    let backup = backup(&host);
    let refused = restore(&host, &backup, true).await.unwrap_err();
    assert_eq!(refused, RestoreError::Manager);
    host.leave().await.unwrap();

    let refused = restore(&host, &backup, false).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("m2 at {addr}")) && refused.contains("--force"), "{refused}");
    assert!(host.agent().unwrap().membership().is_none() && !dir.join("manager").exists());
    drop(other);
    let restored = restore(&host, &backup, false).await.unwrap();
    assert_eq!(restored.cluster, backup.header.cluster);
    assert!(restored.node != node && restored.index > backup.header.index);
    // The former node had its address.
    assert_eq!((restored.replaced, restored.demoted), (vec!["h".to_owned()], vec!["m2".to_owned()]));
    let state = host.cluster().unwrap().linearizable().await.unwrap();
    assert_eq!((state.nodes.len(), own(&host).spec.role), (2, Role::Manager));
    assert!(host.table().unwrap().index >= restored.index);
    // It is there after a restart.
    host.shutdown().await;
    let opened = Manager::open(&dir, Shared::default(), None).await.unwrap().unwrap();
    assert_eq!(opened.cluster().state().cluster.as_ref().unwrap().id, restored.cluster);
    opened.destroy().await;
}

async fn on_a_node(dir: PathBuf) {
    let host = host(&dir, "eth0").await;
    let node = host.init(request()).await.unwrap();
    let backup = backup(&host);
    let before = host.table().unwrap().index;
    // The swarm's life goes on, and ends.
    propose(&host, Action::RotateKeys).await;
    let manager = locked(&host.part).take_manager().unwrap();
    let agent = host.agent().unwrap();
    agent.set_seal(None).unwrap();
    manager.destroy().await;
    agent.set_manager(None);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let restored = loop {
        match restore(&host, &backup, false).await {
            // It takes a moment until the node knows that its manager is gone.
            Err(RestoreError::Alive(_)) if tokio::time::Instant::now() < deadline => {
                sleep(Duration::from_millis(50)).await;
            }
            restored => break restored.unwrap(),
        }
    };
    assert_eq!((&restored.node, &restored.cluster), (&node, &backup.header.cluster));
    assert!(restored.replaced.is_empty() && restored.demoted.is_empty());
    let table = host.table().unwrap();
    assert!(table.index >= restored.index && table.index > before);
    assert_eq!(agent.session(), Some(SessionState::Connected));
    assert_eq!(own(&host).spec.role, Role::Manager);
    assert_eq!(host.cluster().unwrap().managers().len(), 1);
    let mut other = Backup::clone(&backup);
    other.header.cluster = "another".into();
    assert!(matches!(restore(&host, &other, true).await, Err(RestoreError::OtherSwarm { .. })));
    drop(agent);
    host.leave().await.unwrap();
    host.shutdown().await;
}
