//! What the next change of the members is.

use mesh_api::table::NodeState;

use super::*;
use crate::testing::World;

fn member(id: RaftId, node: &str, is_voter: bool) -> Member {
    let manager = Manager { node: node.into(), addr: addr(id) };
    Member { id, manager, is_voter, is_leader: id == 1, is_reachable: None, lag: None }
}

fn addr(id: RaftId) -> std::net::SocketAddr {
    format!("192.0.2.{id}:2377").parse().unwrap()
}

/// Nodes `a`, `b` and `c`, with these roles and raft ids.
fn state(nodes: [(Role, Option<RaftId>); 3]) -> State {
    let mut world = World::new(&["a", "b", "c"]);
    for (id, (role, raft)) in ["a", "b", "c"].into_iter().zip(nodes) {
        let mut node = crate::model::Node::clone(world.node(id));
        node.spec.role = role;
        node.status.state = NodeState::Ready;
        node.description.manager = raft.map(|raft| ManagerDescription { raft, addr: addr(raft) });
        world.state.nodes.insert(id.into(), node.into());
    }
    world.state
}

#[test]
fn the_members_are_those_that_the_nodes_roles_say() {
    use Role::{Manager as M, Worker as W};
    let (add, remove) =
        (|id, node: &str| Some(Change::Add(id, member(id, node, true).manager)), Change::Remove);
    let [a, b, c] = [member(1, "a", true), member(2, "b", true), member(3, "c", true)];
    let learner = member(2, "b", false);
    let former = member(9, "b", true);
    let moved = |member: &Member| {
        let manager = Manager { addr: "198.51.100.1:2377".parse().unwrap(), ..member.manager.clone() };
        Member { manager, ..member.clone() }
    };
    for (nodes, members, expected) in [
        // As it should be; a manager that has not told where it listens stays what it is.
        ([(M, Some(1)), (W, None), (W, None)], vec![a.clone()], None),
        ([(M, None), (W, None), (W, None)], vec![a.clone()], None),
        // Promoted: once it has told.
        ([(M, Some(1)), (M, None), (W, None)], vec![a.clone()], None),
        ([(M, Some(1)), (M, Some(2)), (W, None)], vec![a.clone()], add(2, "b")),
        ([(M, Some(1)), (M, Some(2)), (W, None)], vec![a.clone(), learner], add(2, "b")),
        ([(M, Some(1)), (M, Some(2)), (W, None)], vec![a.clone(), b.clone()], None),
        // Reached elsewhere: the others are told; the leader itself as well.
        ([(M, Some(1)), (M, Some(2)), (W, None)], vec![a.clone(), moved(&b)], add(2, "b")),
        ([(M, Some(1)), (M, Some(2)), (W, None)], vec![moved(&a), b.clone()], add(1, "a")),
        // Demoted, though it still runs; the leader itself as well.
        ([(M, Some(1)), (W, Some(2)), (W, None)], vec![a.clone(), b.clone()], Some(remove(2))),
        ([(W, Some(1)), (M, Some(2)), (W, None)], vec![a.clone(), b.clone()], Some(remove(1))),
        // Began anew: in before the former self is out.
        ([(M, Some(1)), (M, Some(2)), (W, None)], vec![a.clone(), former.clone()], add(2, "b")),
        ([(M, Some(1)), (M, Some(2)), (W, None)], vec![a.clone(), former, b.clone()], Some(remove(9))),
        // The leader began anew by force, and has not told yet.
        ([(M, Some(9)), (W, None), (W, None)], vec![a.clone()], None),
        ([(M, Some(9)), (W, Some(2)), (W, None)], vec![a.clone(), b.clone()], Some(remove(2))),
        // What is to come, before what is to go.
        ([(M, Some(1)), (W, Some(2)), (M, Some(3))], vec![a.clone(), b.clone()], add(3, "c")),
        ([(M, Some(1)), (W, Some(2)), (M, Some(3))], vec![a.clone(), b, c], Some(remove(2))),
        // No node any longer.
        ([(M, Some(1)), (W, None), (W, None)], vec![a, member(7, "z", true)], Some(remove(7))),
    ] {
        assert_eq!(next(&state(nodes), &members), expected, "{nodes:?} {members:?}");
    }
}

#[test]
fn a_node_that_is_down_is_not_made_a_manager() {
    let nodes = [(Role::Manager, Some(1)), (Role::Manager, Some(2)), (Role::Worker, None)];
    let mut state = state(nodes);
    let mut node = crate::model::Node::clone(&state.nodes[&NodeId::from("b")]);
    node.status.state = NodeState::Down;
    state.nodes.insert("b".into(), node.into());
    assert_eq!(next(&state, &[member(1, "a", true)]), None);
    assert_eq!(next(&state, &[member(1, "a", true), member(2, "b", true)]), None);
}
