//! Nodes whose certificates have expired; and what a node's status leaves alone.

use super::*;
use crate::model::Readmission;

const MINUTE_NS: u64 = 60 * 1_000_000_000;

fn approve(id: &str) -> Action {
    Action::ApproveNode { id: id.into() }
}

fn readmit(id: &str) -> Action {
    Action::ReadmitNode { id: id.into() }
}

fn ask(id: &str) -> Action {
    Action::NoteAsking { id: id.into() }
}

#[test]
fn an_approval_is_good_for_one_certificate_within_an_hour() {
    let mut world = World::new(&["n1", "n2"]);
    let not_approved = Err(Refusal::NotApproved("n1".into()));
    assert_eq!(world.try_to(approve("n1")), Err(Refusal::NodeIsReady("n1".into())));
    world.set_node_state("n1", NodeState::Down);
    assert_eq!(world.try_to(readmit("n1")), not_approved);
    let text = Refusal::NotApproved("n1".into()).to_string();
    assert!(text.contains("`shoal node approve n1`"), "{text}");
    world.must(ask("n1"));
    let (since, index) = (world.now_ns, world.state.index);
    world.now_ns += MINUTE_NS;
    world.must(ask("n1"));
    assert_eq!(world.node("n1").readmission.asking_since_ns, Some(since), "it is one question");
    assert_eq!(world.state.index, index);

    world.must(approve("n1"));
    assert!(world.node("n1").is_approved(world.now_ns) && !world.node("n2").is_approved(world.now_ns));
    world.must(readmit("n1"));
    assert_eq!(world.node("n1").readmission, Readmission::default());
    assert_eq!(world.try_to(readmit("n1")), not_approved, "one certificate");

    world.must(approve("n1"));
    world.now_ns += 60 * MINUTE_NS - 1;
    world.must(approve("n1"));
    world.now_ns += 60 * MINUTE_NS - 1;
    assert!(world.node("n1").is_approved(world.now_ns), "from the last approval on");
    world.now_ns += 1;
    assert_eq!(world.try_to(readmit("n1")), not_approved);

    // Whoever is heard from needs none.
    world.must(approve("n1"));
    world.must(ask("n1"));
    world.set_node_state("n1", NodeState::Ready);
    assert_eq!(world.node("n1").readmission, Readmission::default());
    world.must(Action::RemoveNode { id: "n1".into(), force: true });
    for action in [ask("n1"), approve("n1"), readmit("n1")] {
        assert_eq!(world.try_to(action), Err(Refusal::NodeNotFound("n1".into())));
    }
}

#[test]
fn an_update_is_not_disturbed_by_what_happens_to_the_node() {
    let mut world = World::new(&["n1"]);
    let before = world.node("n1").clone();
    world.set_node_state("n1", NodeState::Down);
    world.must(ask("n1"));
    world.must(approve("n1"));
    world.must(Action::SetNodeIssuer { id: "n1".into(), issuer: KeyId::default() });
    world.set_node_state("n1", NodeState::Ready);
    let node = world.node("n1").clone();
    assert!(node.meta.version > before.meta.version);
    assert_eq!(node.spec_version, before.spec_version);
    let update = |version| Action::UpdateNode { id: "n1".into(), version, spec: before.spec.clone() };
    world.must(update(before.spec_version));
    assert_eq!(world.node("n1").spec_version, world.state.index);
    assert_eq!(world.try_to(update(before.spec_version)), Err(Refusal::OutOfSequence));
}
