//! A host whose manager is locked: from its init to its leaving.

use control::model::ClusterSpec;
use mesh_agent::{Health, SessionState};
use mesh_api::seal::UnlockKey;

use super::*;
use crate::agent::bring_up;
use crate::args::AgentArgs;

#[test]
fn a_manager_starts_locked_and_goes_on_once_it_is_unlocked() {
    alone(locked_and_unlocked);
}

#[test]
fn a_locked_manager_can_be_left() {
    alone(locked_and_left);
}

/// The agent as a process would start it.
async fn start(dir: &Path) -> Arc<Host> {
    let args = AgentArgs {
        state_dir: dir.to_owned(),
        run_dir: dir.to_owned(),
        bpffs: dir.join("bpf"),
        hostname: Some("h".to_owned()),
        xdp: XdpMode::Off,
        uplinks: vec!["eth0".to_owned()],
        flows_max: 1024,
        key_rotation: 12,
        log: "off".to_owned(),
        uninstall: false,
    };
    bring_up(&args, Health::default()).await.unwrap()
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "it never comes to that: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Whether the node's key, or a root's, is in the clear in the state folder.
fn shows_a_key(dir: &Path) -> bool {
    let shows = |path: &Path| std::fs::read(path).unwrap().windows(11).any(|window| window == b"PRIVATE KEY");
    std::fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            !path.ends_with("bpf") && shows_a_key(&path)
        } else {
            path.is_file() && shows(&path)
        }
    })
}

async fn set_lock(host: &Host, key: Option<&UnlockKey>) {
    let cluster = host.cluster().unwrap();
    let present = cluster.linearizable().await.unwrap().cluster.unwrap();
    let update = Action::UpdateCluster {
        version: present.meta.version,
        spec: ClusterSpec { autolock: key.is_some(), ..present.spec.clone() },
        worker_secret: None,
        manager_secret: None,
        rotation: None,
        unlock_key: key.cloned(),
    };
    cluster.propose(Command::now(update)).await.unwrap();
    let keys = cluster.keys().unwrap();
    until("the files follow the lock", || keys.unlock_key().as_ref() == key).await;
}

fn is_locked(host: &Host) -> bool {
    matches!(host.membership(), Membership::Locked { addr, .. } if addr == ADDR)
}

async fn locked_and_unlocked(dir: PathBuf) {
    let host = host(&dir, "eth0").await;
    host.init(InitRequest { autolock: true, ..request() }).await.unwrap();
    assert!(!shows_a_key(&dir), "from the first file on");
    let key = host.cluster().unwrap().state().cluster.unwrap().lock.key.clone().unwrap();
    let not_locked = host.unlock(key.clone()).await;
    assert_eq!(not_locked, Err(SwarmError::NotLocked));
    host.shutdown().await;

    let host = start(&dir).await;
    assert!(is_locked(&host) && host.cluster().is_none());
    let agent = host.agent().unwrap();
    let index = agent.table().unwrap().index;
    assert_eq!(agent.applied(), Some(index), "the dataplane is up with the last table");
    for _ in 0..2 {
        assert_eq!(host.unlock(UnlockKey::random()).await, Err(SwarmError::InvalidUnlockKey));
        assert!(is_locked(&host) && agent.shared().get().is_none());
        assert_ne!(agent.session(), Some(SessionState::Connected));
    }
    assert_eq!(host.force_new().await, Err(SwarmError::Locked));

    host.unlock(key).await.unwrap();
    assert!(matches!(host.membership(), Membership::Active { role: Role::Manager, .. }));
    until("a session", || agent.session() == Some(SessionState::Connected)).await;
    assert!(!shows_a_key(&dir));
    host.cluster().unwrap().linearizable().await.unwrap();

    // Another key; then none; then one again, with which the node's key is sealed anew as well.
    let next = UnlockKey::random();
    set_lock(&host, Some(&next)).await;
    set_lock(&host, None).await;
    assert!(matches!(manager::sealing(&dir, None).unwrap(), Sealing::With(_)));
    let membership = || std::fs::read_to_string(dir.join("membership.json")).unwrap();
    let before = membership();
    set_lock(&host, Some(&next)).await;
    until("the node's key is sealed anew", || membership() != before).await;
    drop(agent);
    host.shutdown().await;
    assert!(!shows_a_key(&dir));
    let host = start(&dir).await;
    assert!(is_locked(&host));
    host.unlock(next).await.unwrap();
    host.leave().await.unwrap();
    assert!(!dir.join("manager").exists() && !dir.join("membership.json").exists());
    host.shutdown().await;
}

async fn locked_and_left(dir: PathBuf) {
    let host = host(&dir, "eth0").await;
    host.init(InitRequest { autolock: true, ..request() }).await.unwrap();
    host.shutdown().await;
    let host = start(&dir).await;
    assert!(is_locked(&host));
    host.leave().await.unwrap();
    assert_eq!(host.membership(), Membership::Inactive);
    assert!(!dir.join("manager").exists() && !dir.join("membership.json").exists());
    host.init(request()).await.unwrap();
    // Without autolock nothing waits for a key.
    host.shutdown().await;
    let host = start(&dir).await;
    assert!(host.cluster().is_some() && !shows_a_key(&dir));
    host.leave().await.unwrap();
    host.shutdown().await;
}
