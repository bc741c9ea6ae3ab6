//! A session whose node is locked: it has its last table, and asks nobody.

use super::*;

#[tokio::test]
async fn a_locked_session_has_its_table_and_asks_nobody_until_it_is_unlocked() {
    let port = Port::new().await;
    let (folder, shared) = (tempfile::tempdir().unwrap(), Shared::default());
    let store = Store::new(folder.path());
    let describe = Describe::new("h".to_owned());
    let last = Some(Arc::new(table(7)));
    let (mut session, unlock) = Session::start_locked(store, shared, describe, last);
    index_becomes(&mut session, 7).await;
    let asked = timeout(Duration::from_millis(500), port.listener.accept()).await;
    assert!(asked.is_err(), "without its key it can't prove itself");

    let credential = Arc::new(port.ca.credential(&Wanted::new("n", Role::Manager, "c")));
    let credentials = Credentials { membership: membership(&port), credential };
    unlock.send(Arc::new(Mutex::new(credentials))).unwrap();
    let mut manager = Peer::accept(&port).await;
    assert_eq!(manager.node.role, Role::Manager);
    match manager.next().await {
        Some(AgentMessage::Resume { index, .. }) => assert_eq!(index, Some(7)),
        other => panic!("{other:?}"),
    }
    manager.greet().await;
    manager.send(ManagerMessage::Snapshot { table: Box::new(table(8)) }).await;
    index_becomes(&mut session, 8).await;
}

#[tokio::test]
async fn a_locked_session_can_be_left() {
    let folder = tempfile::tempdir().unwrap();
    let describe = Describe::new("h".to_owned());
    let (session, unlock) =
        Session::start_locked(Store::new(folder.path()), Shared::default(), describe, None);
    let began = Instant::now();
    session.leave().await;
    assert!(began.elapsed() < HEARTBEAT && unlock.is_closed());
}
