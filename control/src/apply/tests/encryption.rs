//! Encrypted networks, and the nodes' keys for them.

use mesh_api::wireguard::WireguardIdentity;

use super::*;
use crate::model::network::ENCRYPTED_OPTIONS;
use crate::session::view;
use crate::testing::identity;

fn with_option(name: &str, option: &str, value: &str) -> NetworkSpec {
    let mut spec = network(name);
    spec.options.insert(option.to_owned(), value.to_owned());
    spec
}

/// What nodes hear of a network.
fn is_encrypted(world: &World, id: &str) -> bool {
    view::table(&world.state, &"n1".into()).unwrap().networks[&NetworkId::from(id)].encrypted
}

#[test]
fn networks_are_encrypted_in_any_of_dockers_spellings() {
    let mut world = World::new(&[]);
    world.create_network("plain");
    assert!(!is_encrypted(&world, "net-plain"));
    for (number, (value, expected)) in
        [("", true), ("true", true), ("1", true), ("T", true), ("false", false), ("0", false)]
            .into_iter()
            .enumerate()
    {
        for (which, option) in ENCRYPTED_OPTIONS.into_iter().enumerate() {
            let id = format!("n{number}-{which}");
            let spec = with_option(&id, option, value);
            world.must(Action::CreateNetwork { id: id.as_str().into(), spec });
            assert_eq!(is_encrypted(&world, &id), expected, "{option}={value}");
        }
    }
    let mut both = with_option("both", ENCRYPTED_OPTIONS[0], "false");
    both.options.insert(ENCRYPTED_OPTIONS[1].to_owned(), String::new());
    both.options.insert("com.docker.network.driver.mtu".into(), "1400".into());
    world.must(Action::CreateNetwork { id: "both".into(), spec: both });
    assert!(is_encrypted(&world, "both"));
    assert_eq!(
        view::table(&world.state, &"n1".into()).unwrap().networks[&NetworkId::from("both")].mtu,
        Some(1400)
    );

    for (option, field) in ENCRYPTED_OPTIONS
        .into_iter()
        .zip(["Options.encrypted", "Options.com.docker.network.driver.overlay.encrypted"])
    {
        let spec = with_option("wrong", option, "maybe");
        let refusal = world.try_to(Action::CreateNetwork { id: "wrong".into(), spec }).unwrap_err();
        assert_eq!(refusal.to_string(), format!("{field}: 'maybe' is neither true nor false"));
        assert_eq!(refusal.code(), Code::InvalidArgument);
    }
}

#[test]
fn the_ingress_network_can_be_replaced_by_an_encrypted_one() {
    let mut world = World::new(&[]);
    let ingress = world.state.ingress().unwrap().id.clone();
    assert!(!is_encrypted(&world, ingress.as_str()));
    world.must(Action::RemoveNetwork { id: ingress });
    let spec = NetworkSpec { ingress: true, ..with_option("mesh", "encrypted", "") };
    world.must(Action::CreateNetwork { id: "mesh".into(), spec });
    assert!(is_encrypted(&world, "mesh") && world.state.ingress().unwrap().is_encrypted());
}

#[test]
fn nodes_know_each_others_keys() {
    let mut world = World::new(&["n1"]);
    let (old, new) = (identity(1, 51820), identity(2, 51821));
    let known = |world: &World| {
        let table = view::table(&world.state, &"n1".into()).unwrap();
        table.nodes.values().map(|node| node.wireguard.clone()).collect::<Vec<_>>()
    };
    let (id, role, issuer) = ("n2".into(), Role::Worker, KeyId::default());
    let joined = NodeDescription { wireguard: vec![old], ..description("n2") };
    world.must(Action::AddNode { id, role, description: joined, issuer, token: None });
    assert_eq!(known(&world), [vec![], vec![old]]);
    for described in [vec![old, new], vec![new, old], vec![new], vec![]] {
        let before = world.state.clone();
        world.must(world.keys("n2", &described));
        assert_eq!(known(&world), [vec![], described.clone()]);
        let changes = view::changes(&before, &world.state);
        assert!(matches!(&changes[..], [mesh_api::table::Change::Node(node)] if node.wireguard == described));
    }
}

#[test]
fn a_nodes_keys_and_what_follows_from_them_are_its_own() {
    let mut world = World::new(&["n1", "n2"]);
    let theirs = [identity(1, 51820), identity(2, 51821)];
    world.must(world.keys("n1", &theirs));
    // The same address, by another key.
    let beside = |of: &WireguardIdentity| {
        let mut key = *of.public_key.as_bytes();
        key[31] ^= 1;
        WireguardIdentity { public_key: key.into(), ..*of }
    };
    let cases: [(&[WireguardIdentity], &str); 8] = [
        (&[identity(3, 1), identity(4, 2), identity(5, 3)], "3 are more than the 2 that a node can have"),
        (&[identity(3, 0)], "port 0 is not one that WireGuard can have"),
        (&[identity(3, 4789)], "port 4789 is not one that WireGuard can have"),
        (&[identity(3, 51820), identity(3, 51821)], "lead to one address"),
        (&[identity(3, 51820), beside(&identity(3, 51821))], "lead to one address"),
        (&[identity(3, 51820), identity(4, 51820)], "share port 51820"),
        (&[identity(3, 51820), theirs[1]], "of node n1 (n1): if this host is a copy"),
        (&[beside(&theirs[0])], "`docker node rm`"),
    ];
    for (wrong, part) in cases {
        let refusal = world.try_to(world.keys("n2", wrong)).unwrap_err();
        let text = refusal.to_string();
        assert!(text.starts_with("wireguard: ") && text.contains(part), "{wrong:?}: {text}");
        assert_eq!(refusal.code(), Code::InvalidArgument);
        let (id, role, issuer) = ("n3".into(), Role::Worker, KeyId::default());
        let description = NodeDescription { wireguard: wrong.to_vec(), ..description("n3") };
        let add = Action::AddNode { id, role, description, issuer, token: None };
        assert_eq!(world.try_to(add), Err(refusal));
    }
    world.must(world.keys("n1", &[theirs[1], theirs[0]]));
    world.must(Action::RemoveNode { id: "n1".into(), force: true });
    world.must(world.keys("n2", &theirs));
}

#[test]
fn keys_are_rotated_by_counting() {
    let mut world = World::new(&["n1"]);
    let epoch = |state: &State| view::table(state, &"n1".into()).unwrap().cluster.key_epoch;
    assert_eq!(epoch(&world.state), 0);
    for expected in [1, 2] {
        let before = world.state.clone();
        world.must(Action::RotateKeys);
        assert_eq!(epoch(&world.state), expected);
        let changes = view::changes(&before, &world.state);
        assert!(matches!(&changes[..], [mesh_api::table::Change::Cluster(it)] if it.key_epoch == expected));
    }
    let command = Command { at_ns: 1, action: Action::RotateKeys };
    assert_eq!(apply(&State::empty(), 1, &command).unwrap_err(), Refusal::NotInitialized);
}

#[test]
fn the_ports_of_keys_are_not_published() {
    let mut world = World::new(&["n1"]);
    let publish = |name: &str, protocol| {
        let mut spec = service(name, 1);
        spec.endpoint.ports.push(PortConfig { protocol, ..ingress_port(51820, 51820) });
        Action::CreateService { id: name.into(), spec: Box::new(spec) }
    };
    world.must(publish("before", Protocol::Udp));
    world.must(Action::RemoveService { id: "before".into() });
    world.must(world.keys("n1", &[identity(1, 51820)]));
    world.must(publish("tcp", Protocol::Tcp));
    let refusal = world.try_to(publish("udp", Protocol::Udp)).unwrap_err();
    assert_eq!(refusal.to_string(), "port '51820/udp' is reserved for encryption between nodes");
}
