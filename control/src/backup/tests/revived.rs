//! A state that comes back: its only manager, and what is not given out twice.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::table::{Role, TaskState};
use mesh_api::tls::KeyId;

use super::{host, id, world};
use crate::backup::revive::{ReviveError, Revived, revive};
use crate::command::Action;
use crate::model::network::VNI_MIN;
use crate::model::{ClusterObject, State};
use crate::refusal::Refusal;
use crate::testing::{World, attach, description, service};

const DAY: Duration = Duration::from_hours(24);

fn at(days: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH + 20_000 * DAY + days * DAY
}

fn revived(state: &State, own: Option<&str>, name: &str) -> Revived {
    revive(state.clone(), own.map(id), &host(name), at(0), &mut rand::rng()).unwrap()
}

fn managers(state: &State) -> Vec<&str> {
    let managers = state.nodes.values().filter(|node| node.spec.role == Role::Manager);
    managers.map(|node| node.description.hostname.as_str()).collect()
}

#[test]
fn a_host_that_was_none_of_its_nodes_is_another() {
    let state = world().state;
    let Revived { state: after, first, demoted, replaced, known } = revived(&state, None, "n9");
    assert_eq!(managers(&after), ["n9"]);
    assert_eq!((after.nodes.len(), demoted, replaced.len()), (5, vec!["n1".to_owned(), "n2".to_owned()], 0));
    let addrs: Vec<_> = known.iter().map(ToString::to_string).collect();
    assert_eq!(addrs.len(), 2);
    assert!(addrs.iter().all(|addr| addr.ends_with(":2377")));
    let peer = first.credential.identity.peer();
    assert_eq!((&peer.node, peer.role, &peer.cluster), (&first.node, Role::Manager, &first.cluster));
    let object = after.cluster.as_ref().unwrap();
    assert_eq!(after.nodes[&first.node].issuer, object.ca.signer().id);
    // Nobody looks for managers where there are none.
    assert!(after.nodes.values().all(|node| node.description.manager.is_none()));
    // What people made is as it was.
    assert!(
        after.services == state.services && after.networks == state.networks && after.tasks == state.tasks
    );
    let same = |object: &ClusterObject| ClusterObject { key_epoch: 0, ..object.clone() };
    assert_eq!(same(object), same(state.cluster.as_ref().unwrap()));
}

#[test]
fn a_host_with_a_nodes_address_stands_in_for_it() {
    let mut world = world();
    let gone = world.node("n2").clone();
    let state = world.state.clone();
    let replacement = crate::testing::description("n9");
    let replacement = mesh_api::session::NodeDescription {
        addr: gone.description.addr,
        vtep: gone.description.vtep,
        ..replacement
    };
    let revived = revive(state, None, &replacement, at(0), &mut rand::rng()).unwrap();
    assert_eq!((revived.replaced, revived.demoted), (vec!["n2".to_owned()], vec!["n1".to_owned()]));
    world.state = revived.state;
    world.check_invariants();
    assert!(!world.state.nodes.contains_key(&id("n2")));
    assert!(world.state.cluster.as_ref().unwrap().removed.contains_key(&id("n2")), "its certificate is void");
    assert!(world.state.tasks_of_node(&id("n2")).all(|task| task.has_ended()), "its tasks move");
}

#[test]
fn a_node_of_the_swarm_keeps_its_id() {
    let mut world = world();
    for own in ["n1", "n3"] {
        let host = description(own);
        let issuer = world.node(own).issuer;
        let revived = revive(world.state.clone(), Some(id(own)), &host, at(0), &mut rand::rng()).unwrap();
        assert_eq!((managers(&revived.state), revived.state.nodes.len()), (vec![own], 4));
        assert_eq!((revived.first.node, revived.replaced.len()), (id(own), 0));
        let node = &revived.state.nodes[&id(own)];
        assert!(node.issuer != issuer && node.issuer != KeyId::default());
        assert_eq!(node.spec.labels, world.node(own).spec.labels);
    }
    // It joined after the backup was taken.
    let later = revived(&world.state, Some("n8"), "n8");
    assert_eq!((managers(&later.state), later.state.nodes.len()), (vec!["n8"], 5));
    // It was removed before, or the swarm has no such addresses.
    let removed = revive(world.state.clone(), Some(id("n5")), &host("n5"), at(0), &mut rand::rng());
    assert!(matches!(removed, Err(ReviveError::Removed)));
    let mut host = host("n9");
    (host.addr, host.vtep) = ("fd00::1".parse().unwrap(), "fd00::1".parse().unwrap());
    let unfit = revive(world.state.clone(), None, &host, at(0), &mut rand::rng());
    assert!(unfit.unwrap_err().to_string().contains("--data-path-addr"));
    world.state.cluster = None;
    let none = revive(world.state, None, &host, at(0), &mut rand::rng());
    assert!(matches!(none, Err(ReviveError::Refused(Refusal::NotInitialized))));
}

#[test]
fn what_counts_upwards_goes_on_far_above() {
    let state = world().state;
    let first = revived(&state, None, "n9").state;
    assert!(first.index > state.index + (1 << 32));
    assert_eq!(first.counters.restored, first.index);
    assert!(first.counters.incarnation >= state.counters.incarnation + (1 << 24));
    assert!(first.counters.vni >= VNI_MIN);
    let epoch = |state: &State| state.cluster.as_ref().unwrap().key_epoch;
    assert!(epoch(&first) > epoch(&state));
    // The same backup a day later, and the state that came of the first restoration: each is above what was before.
    let lived = State { index: first.index + 1_000_000, ..first };
    for later in [&state, &lived] {
        let again = revive(later.clone(), None, &host("n9"), at(1), &mut rand::rng()).unwrap().state;
        assert!(again.index > lived.index);
    }
    // On a host whose clock is in the past, too.
    let past =
        revive(lived.clone(), None, &host("n9"), SystemTime::UNIX_EPOCH, &mut rand::rng()).unwrap().state;
    assert!(past.index > lived.index);
    assert!(past.index < 1 << 53, "it stays exact where numbers are doubles");
}

#[test]
fn no_address_is_given_out_until_every_node_has_let_go() {
    let mut world = world();
    world.acknowledge();
    world.state = revived(&world.state, None, "n9").state;
    let before = world.state.clone();
    let id = world.create_service(service("fresh", 2));
    world.orchestrate();
    let fresh = |world: &World| -> Vec<TaskState> {
        world.state.tasks_of_service(&id).map(|task| task.status.state).collect()
    };
    assert_eq!(fresh(&world), [TaskState::New; 2], "their addresses may be others'");
    let mut wish = attach("wish", "n4", "app", "fixed");
    if let Action::Attach { spec, .. } = &mut wish {
        spec.addr = Some("192.168.8.77".parse().unwrap());
    }
    let refused = world.try_to(wish.clone()).unwrap_err().to_string();
    assert!(refused.contains("restored from a backup a moment ago"), "{refused}");
    // Until all nodes have the table, the state that came back included.
    world.must(Action::Acknowledge { index: before.index - 1 });
    assert!(!world.state.counters.know_all_addresses());
    assert!(world.acknowledge());
    while world.orchestrate().0 {}
    assert!(fresh(&world).iter().all(|state| *state == TaskState::Assigned), "{:?}", fresh(&world));
    world.must(wish);
    world.check_invariants();
    let tasks = world.state.tasks.values().filter(|task| !before.tasks.contains_key(&task.id));
    assert!(tasks.map(Arc::clone).all(|task| task.incarnation > before.counters.incarnation));
}
