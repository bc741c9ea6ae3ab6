//! Join tokens: how long they hold, for how many nodes, and when they go.

use mesh_api::id::TokenId;

use super::*;
use crate::model::TokenState;
use crate::model::token::{TOKEN_KEPT_NS, TOKEN_LIFE_MAX_NS, TOKEN_LIFE_MIN_NS, TOKEN_USES_MAX, TOKENS_MAX};

const HOUR_NS: u64 = 3600 * 1_000_000_000;

fn create(id: &str, life_ns: u64, uses: Option<u32>) -> Action {
    let (id, role, secret_digest) = (id.into(), Role::Worker, [7; 32]);
    Action::CreateToken { id, role, secret_digest, life_ns, uses }
}

fn join(node: &str, role: Role, token: &str) -> Action {
    let (description, issuer, token) = (description(node), KeyId::default(), Some(token.into()));
    Action::AddNode { id: node.into(), role, description, issuer, token }
}

fn uses_left(world: &World, id: &str) -> Option<u32> {
    world.state.tokens[&TokenId::from(id)].uses_left
}

#[test]
fn a_token_holds_for_its_time_and_so_many_nodes() {
    let mut world = World::new(&[]);
    world.must(create("few", HOUR_NS, Some(2)));
    world.must(create("any", HOUR_NS, None));
    world.must(join("n1", Role::Worker, "few"));
    assert_eq!(uses_left(&world, "few"), Some(1));
    // What is not taken is not counted: a node that exists, a description that can't be, another role.
    assert_eq!(world.try_to(join("n1", Role::Worker, "few")), Err(Refusal::IdTaken("n1".into())));
    let Action::AddNode { id, role, issuer, token, .. } = join("n2", Role::Worker, "few") else {
        unreachable!()
    };
    let unfit = NodeDescription { wireguard: vec![crate::testing::identity(1, 0)], ..description("n2") };
    assert!(world.try_to(Action::AddNode { id, role, description: unfit, issuer, token }).is_err());
    let other = world.try_to(join("n2", Role::Manager, "few")).unwrap_err();
    assert_eq!(other, Refusal::TokenNotFound("few".into()));
    assert_eq!(uses_left(&world, "few"), Some(1));
    world.must(join("n2", Role::Worker, "few"));
    assert_eq!(world.try_to(join("n3", Role::Worker, "few")), Err(Refusal::TokenUsedUp));
    assert_eq!(world.state.nodes.len(), 2, "who is refused leaves nothing");
    for node in ["n3", "n4", "n5"] {
        world.must(join(node, Role::Worker, "any"));
    }
    assert_eq!(uses_left(&world, "any"), None);

    world.now_ns += HOUR_NS - 1;
    world.must(join("n6", Role::Worker, "any"));
    world.now_ns += 1;
    assert_eq!(world.try_to(join("n7", Role::Worker, "any")), Err(Refusal::TokenExpired));
    let states: Vec<_> = world.state.tokens.values().map(|token| token.state(world.now_ns)).collect();
    assert_eq!(states, [TokenState::Expired, TokenState::UsedUp]);
    world.must(Action::RemoveToken { id: "any".into() });
    let gone = Refusal::TokenNotFound("any".into());
    assert_eq!(world.try_to(join("n7", Role::Worker, "any")), Err(gone.clone()));
    assert_eq!(world.try_to(Action::RemoveToken { id: "any".into() }), Err(gone));
}

#[test]
fn a_token_is_kept_for_a_day_after_its_end() {
    let mut world = World::new(&[]);
    world.must(create("short", HOUR_NS, None));
    world.must(create("used", 2 * HOUR_NS, Some(1)));
    world.must(join("n1", Role::Worker, "used"));
    let kept = |world: &mut World| -> Vec<String> {
        world.must(Action::DropTokens);
        world.state.tokens.keys().map(ToString::to_string).collect()
    };
    world.now_ns += HOUR_NS + TOKEN_KEPT_NS - 1;
    assert_eq!(kept(&mut world), ["short", "used"]);
    world.now_ns += 1;
    assert_eq!(kept(&mut world), ["used"]);
    let before = world.state.index;
    assert_eq!(kept(&mut world), ["used"]);
    assert_eq!(world.state.index, before, "nothing to drop is no change");
    world.now_ns += HOUR_NS;
    assert!(kept(&mut world).is_empty());
}

#[test]
fn tokens_have_bounds_that_are_named() {
    let mut world = World::new(&[]);
    for (action, part) in [
        (create("t", TOKEN_LIFE_MIN_NS - 1, None), "Expires: a token is good for 1m to 8760h"),
        (create("t", TOKEN_LIFE_MAX_NS + 1, None), "--expires"),
        (create("t", HOUR_NS, Some(0)), "Uses: a token is good for 1 to 10000 nodes"),
        (create("t", HOUR_NS, Some(TOKEN_USES_MAX + 1)), "--uses"),
    ] {
        let refusal = world.try_to(action).unwrap_err();
        assert!(refusal.to_string().contains(part), "{refusal}");
        assert_eq!(refusal.code(), Code::InvalidArgument);
    }
    world.must(create("t0", TOKEN_LIFE_MIN_NS, Some(1)));
    assert_eq!(world.try_to(create("t0", HOUR_NS, None)), Err(Refusal::IdTaken("t0".into())));
    for at in 1..TOKENS_MAX {
        world.must(create(&format!("t{at}"), TOKEN_LIFE_MAX_NS, Some(TOKEN_USES_MAX)));
    }
    let refusal = world.try_to(create("more", HOUR_NS, None)).unwrap_err();
    assert!(refusal.to_string().contains("shoal token rm"), "{refusal}");
    world.must(Action::RemoveToken { id: "t0".into() });
    world.must(create("more", HOUR_NS, None));
}

#[test]
fn tokens_go_with_the_root_that_they_name() {
    let mut world = World::new(&[]);
    world.must(create("t", HOUR_NS, None));
    let root = world.rotate(std::time::SystemTime::now());
    assert_eq!(world.state.tokens.len(), 1);
    let join_secrets = crate::model::JoinSecrets { worker: [8; 16], manager: [9; 16] };
    world.must(Action::FinishRotation { root, join_secrets });
    assert!(world.state.tokens.is_empty());
}
