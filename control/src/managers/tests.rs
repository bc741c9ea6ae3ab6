//! Two managers over real TLS: one becomes a member, ceases to be one, and is no node any more.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use mesh_api::id::NodeId;
use mesh_api::seal::UnlockKey;
use mesh_api::session::{ManagerDescription, NodeDescription};
use mesh_api::table::{NodeState, Role};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::cluster::{InitRequest, Place};
use crate::command::{Action, Command};
use crate::model::{ClusterSpec, NodeSpec};
use crate::pki::{first_manager, manager_credential};
use crate::raft::{Call, Manager, RaftId, Request, Response, Transport as _};
use crate::testing::{description, network};

const LIMIT: Duration = Duration::from_secs(20);

/// A manager that runs.
struct Running {
    node: NodeId,
    cluster: Cluster,
    credential: Shared,
    addr: SocketAddr,
    serving: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Running {
    async fn first() -> Self {
        let (dir, listener, credential) = (tempfile::tempdir().unwrap(), listen().await, Shared::default());
        let addr = listener.local_addr().unwrap();
        let place = place("m1", addr, &credential);
        let cluster = Cluster::create_at(dir.path(), InitRequest::default(), place).await.unwrap();
        let raft = cluster.raft_id();
        let host = NodeDescription { manager: Some(ManagerDescription { raft, addr }), ..description("m1") };
        let first = first_manager(&cluster, "m1".into(), host).await.unwrap();
        credential.set(Some(first.credential.into()));
        let serving = tokio::spawn(serve(cluster.clone(), credential.clone(), listener));
        Self { node: "m1".into(), cluster, credential, addr, serving, _dir: dir }
    }

    /// A node that joined as a manager, and begins one.
    async fn second(first: &Self) -> Self {
        let (dir, listener, credential) = (tempfile::tempdir().unwrap(), listen().await, Shared::default());
        let addr = listener.local_addr().unwrap();
        let object = first.cluster.state().cluster.unwrap();
        let (id, role, host) = (NodeId::from("m2"), Role::Manager, description("m2"));
        let (own, issuer) =
            manager_credential(&object, &id, Duration::from_hours(1), SystemTime::now()).unwrap();
        credential.set(Some(own.into()));
        first.must(Action::AddNode { id: id.clone(), role, description: host, issuer, token: None }).await;
        let cluster = Cluster::join(dir.path(), place("m2", addr, &credential)).await.unwrap();
        let serving = tokio::spawn(serve(cluster.clone(), credential.clone(), listener));
        Self { node: id, cluster, credential, addr, serving, _dir: dir }
    }

    async fn must(&self, action: Action) {
        self.cluster.propose(Command::now(action)).await.unwrap();
    }

    /// Says of itself that it is reached here.
    async fn tell(&self, to: &Self) {
        self.tell_of(self.cluster.raft_id(), to).await;
    }

    /// Says of itself that this member of raft is reached here.
    async fn tell_of(&self, raft: RaftId, to: &Self) {
        let manager = ManagerDescription { raft, addr: self.addr };
        let host = NodeDescription { manager: Some(manager), ..description(self.node.as_str()) };
        let (id, state, message) = (self.node.clone(), NodeState::Ready, String::new());
        to.must(Action::SetNodeStatus { id, state, message, description: Some(host) }).await;
    }

    async fn stop(self) {
        self.serving.abort();
        let _ = self.serving.await;
        self.cluster.shutdown().await;
    }
}

async fn listen() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
}

fn place(node: &str, addr: SocketAddr, credential: &Shared) -> Place {
    let transport = Arc::new(Wire::new(credential.clone()));
    Place { manager: Manager { node: node.into(), addr }, transport, ..Place::default() }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let all = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(timeout(LIMIT, all).await.is_ok(), "{what}: not within {LIMIT:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_joins_is_locked_as_the_others_are() {
    let first = Running::first().await;
    let lock = async |key: Option<UnlockKey>| {
        let present = first.cluster.linearizable().await.unwrap().cluster.unwrap();
        let spec = ClusterSpec { autolock: key.is_some(), ..present.spec.clone() };
        let version = present.meta.version;
        let (worker_secret, manager_secret, rotation) = (None, None, None);
        let update =
            Action::UpdateCluster { version, spec, worker_secret, manager_secret, rotation, unlock_key: key };
        first.must(update).await;
    };
    let key = UnlockKey::random();
    lock(Some(key.clone())).await;
    let second = Running::second(&first).await;
    let has =
        |one: &Running, key: Option<&UnlockKey>| one.cluster.keys().unwrap().unlock_key().as_ref() == key;
    assert!(has(&second, None), "it knows nothing yet");
    second.tell(&first).await;
    let both = |key: Option<&UnlockKey>| has(&first, key) && has(&second, key);
    until("both are locked", || both(Some(&key))).await;
    let next = UnlockKey::random();
    lock(Some(next.clone())).await;
    until("both have the next key", || both(Some(&next))).await;
    lock(None).await;
    until("neither is locked", || both(None)).await;
    second.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_asked_for_no_longer_is_waited_for_no_longer() {
    let first = Running::first().await;
    let second = Running::second(&first).await;
    // Of its former self, which nobody hears any more.
    second.tell_of(second.cluster.raft_id() ^ 1, &first).await;
    until("it is a member", || first.cluster.managers().len() == 2).await;
    second.tell(&first).await;
    let voters = || first.cluster.managers().iter().filter(|member| member.is_voter).count();
    let both = async { until("both decide", || voters() == 2).await };
    assert!(timeout(Duration::from_secs(10), both).await.is_ok(), "the leader waits for the former one");
    until("the former one is gone", || first.cluster.managers().len() == 2).await;
    second.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_comes_takes_part_and_goes() {
    let first = Running::first().await;
    let second = Running::second(&first).await;
    second.tell(&first).await;
    let voters = |one: &Running| one.cluster.managers().iter().filter(|member| member.is_voter).count();
    until("both decide", || voters(&first) == 2 && voters(&second) == 2).await;

    // Whichever is told, the other knows.
    second.must(Action::CreateNetwork { id: "blue".into(), spec: network("blue") }).await;
    assert!(first.cluster.linearizable().await.unwrap().network_by_name("blue").is_some());
    first.must(Action::CreateNetwork { id: "red".into(), spec: network("red") }).await;
    assert!(second.cluster.linearizable().await.unwrap().network_by_name("red").is_some());

    // What only the leader knows, and what each knows of itself.
    for one in [&first, &second] {
        let reports = one.cluster.reports().await;
        let known: Vec<_> =
            reports.iter().map(|(member, report)| (member.is_leader, report.as_ref())).collect();
        assert_eq!(known.len(), 2);
        for (is_leader, report) in known {
            let nodes = report.expect("it answers").nodes.as_ref();
            assert_eq!(nodes.map(BTreeMap::len), is_leader.then_some(2));
        }
    }

    let node = first.cluster.state().nodes[&second.node].clone();
    let spec = NodeSpec { role: Role::Worker, ..node.spec.clone() };
    first.must(Action::UpdateNode { id: node.id.clone(), version: node.spec_version, spec }).await;
    until("the second hears that it is none any longer", || *second.cluster.removed().borrow()).await;
    assert_eq!(voters(&first), 1);

    // What a former manager asks, its certificate still being one's, has no effect.
    let wire = Wire::new(second.credential.clone());
    let to = Manager { node: first.node.clone(), addr: first.addr };
    let ask = || {
        let (from, to) = (second.cluster.raft_id(), first.cluster.raft_id());
        Request { from, to, call: Call::ReadIndex }
    };
    assert!(matches!(wire.call(&to, ask()).await, Ok(Response::NotMember)));
    let other = Manager { node: "m3".into(), ..to.clone() };
    assert!(wire.call(&other, ask()).await.is_err(), "a stream is with whom it was opened to");

    // And once it is no node any more, it is not even heard: neither on the stream that it has, nor on another.
    first.must(Action::RemoveNode { id: second.node.clone(), force: true }).await;
    assert!(matches!(wire.call(&to, ask()).await, Ok(Response::Unavailable) | Err(_)));
    assert!(Wire::new(second.credential.clone()).call(&to, ask()).await.is_err());
    assert!(matches!(first.cluster.reports().await[..], [(_, Some(_))]), "it is not asked any more");
    second.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_dialled_must_be_who_answers() {
    let first = Running::first().await;
    let wire = Wire::new(first.credential.clone());
    let request = || Request { from: 7, to: first.cluster.raft_id(), call: Call::ReadIndex };
    let to = Manager { node: "m9".into(), addr: first.addr };
    let error = wire.call(&to, request()).await.unwrap_err();
    assert!(error.to_string().contains("another node answers there: m1"), "{error}");
    let nowhere = Wire::new(Shared::default());
    let to = Manager { node: first.node.clone(), addr: first.addr };
    let error = nowhere.call(&to, request()).await.unwrap_err();
    assert!(error.to_string().contains("no certificate"), "{error}");
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn managers_whose_certificates_have_expired_hear_each_other_until_they_have_others() {
    let first = Running::first().await;
    let second = Running::second(&first).await;
    second.tell(&first).await;
    let voters = |one: &Running| one.cluster.managers().iter().filter(|member| member.is_voter).count();
    until("both decide", || voters(&first) == 2 && voters(&second) == 2).await;
    let past = SystemTime::now() - Duration::from_hours(2);
    let object = first.cluster.state().cluster.unwrap();
    for one in [&first, &second] {
        let former = one.credential.get().unwrap();
        let (expired, _) = manager_credential(&object, &one.node, Duration::from_hours(1), past).unwrap();
        let expired = Arc::new(expired);
        assert!(expired.check().is_err());
        one.credential.set(Some(Arc::clone(&expired)));
        until("it certifies itself", || one.credential.get().unwrap().check().is_ok()).await;
        let own = one.credential.get().unwrap();
        assert_eq!((&own.identity.peer().node, own.identity.peer().role), (&one.node, Role::Manager));
        // What its node gets, it keeps.
        one.credential.replace(&expired, Arc::clone(&former));
        assert!(Arc::ptr_eq(&one.credential.get().unwrap(), &own), "that was another's to replace");
    }
    // On streams of their own.
    for (from, to) in [(&first, &second), (&second, &first)] {
        let wire = Wire::new(from.credential.clone());
        let (whom, ids) = (
            Manager { node: to.node.clone(), addr: to.addr },
            (from.cluster.raft_id(), to.cluster.raft_id()),
        );
        let request = Request { from: ids.0, to: ids.1, call: Call::ReadIndex };
        assert!(wire.call(&whom, request).await.is_ok());
    }
    second.must(Action::CreateNetwork { id: "blue".into(), spec: network("blue") }).await;

    // A node that is to be a worker is no manager for that.
    let node = first.cluster.state().nodes[&second.node].clone();
    let spec = NodeSpec { role: Role::Worker, ..node.spec.clone() };
    first.must(Action::UpdateNode { id: node.id.clone(), version: node.spec_version, spec }).await;
    until("the second hears that it is none any longer", || *second.cluster.removed().borrow()).await;
    let state = first.cluster.state();
    assert!(own::certify(&state, &second.credential.get().unwrap()).unwrap().is_none());
    assert!(own::certify(&state, &first.credential.get().unwrap()).unwrap().is_some());
    second.stop().await;
    first.stop().await;
}
