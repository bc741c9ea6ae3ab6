//! Attachments: what is given, and what is refused.

use std::net::Ipv4Addr;

use mesh_api::id::TaskId;
use mesh_api::session::AttachmentSpec;
use mesh_api::table::TaskState;

use crate::command::Action;
use crate::model::{IpamConfig, NetworkSpec, Task};
use crate::refusal::{Code, Refusal};
use crate::testing::{World, attach, attachment, network, service};

/// A world with the attachable networks `front` (192.0.2.0/28, of which the gateway and 192.0.2.3 are not given out and
/// tasks get the first half) and `other`, and with `closed`, which is not.
fn world() -> World {
    let mut world = World::new(&["n1", "n2"]);
    let aux = [("router".to_owned(), Ipv4Addr::new(192, 0, 2, 3))].into();
    let (subnet, range) = ("192.0.2.0/28".parse().ok(), "192.0.2.0/29".parse().ok());
    let ipam = vec![IpamConfig { subnet, range, aux, ..IpamConfig::default() }];
    let spec = NetworkSpec { attachable: true, ipam, ..network("front") };
    world.must(Action::CreateNetwork { id: "net-front".into(), spec });
    world.create_attachable_network("other");
    world.create_network("closed");
    world
}

fn task(world: &World, id: &str) -> Task {
    Task::clone(&world.state.tasks[&TaskId::from(id)])
}

fn with(action: Action, change: impl FnOnce(&mut AttachmentSpec)) -> Action {
    let Action::Attach { id, node, mut spec } = action else { panic!("no attachment") };
    change(&mut spec);
    Action::Attach { id, node, spec }
}

fn at(last: u8) -> impl FnOnce(&mut AttachmentSpec) {
    move |spec| spec.addr = Some(Ipv4Addr::new(192, 0, 2, last))
}

#[test]
fn an_attachment_is_a_task_of_its_node_with_an_address_and_names() {
    let mut world = world();
    let asked =
        with(attach("a1", "n1", "front", "db"), |spec| spec.aliases.push("store.example.com".to_owned()));
    world.must(asked);
    let task = task(&world, "a1");
    assert!(task.is_attachment());
    assert_eq!((task.name().as_str(), task.node.as_ref().unwrap().as_str()), ("db", "n1"));
    assert_eq!((task.desired, task.status.state), (TaskState::Running, TaskState::Assigned));
    assert_eq!(task.endpoints[0].addr, Some(Ipv4Addr::new(192, 0, 2, 2)));
    assert_eq!(task.endpoints[0].aliases, ["store.example.com"]);
    // By the network's id, and beside a service's addresses.
    let mut web = service("web", 0);
    web.task.networks.push(attachment("net-front"));
    world.create_service(web);
    world.must(with(attach("a2", "n2", "net-front", "cache"), at(6)));
    world.must(attach("a3", "n2", "front", "next"));
    let last = |id: &str| self::task(&world, id).endpoints[0].addr.unwrap().octets()[3];
    // 3 is set aside, and 4 the service's.
    assert_eq!((last("a2"), last("a3")), (6, 5));
    world.check_invariants();
    let refusal = world.try_to(Action::RemoveNetwork { id: "net-front".into() }).unwrap_err();
    assert!(matches!(refusal, Refusal::NetworkUsedByService { .. }), "{refusal}");
    world.must(Action::RemoveService { id: "svc-web".into() });
    let refusal = world.try_to(Action::RemoveNetwork { id: "net-front".into() }).unwrap_err();
    assert!(matches!(refusal, Refusal::NetworkUsedByTask { .. }), "{refusal}");
}

#[test]
fn what_can_not_be_attached_is_refused_by_field() {
    let mut world = world();
    let mut web = service("web", 0);
    web.task.networks.push(attachment("net-front"));
    world.create_service(web);
    world.must(attach("taken", "n1", "front", "db"));
    let fresh = || attach("fresh", "n1", "front", "new");
    let cases: Vec<(Action, Code, &str)> = vec![
        (attach("fresh", "n1", "nowhere", "new"), Code::NotFound, "network: there is no network nowhere"),
        (attach("fresh", "n1", "closed", "new"), Code::InvalidArgument, "network: closed is not attachable"),
        (
            attach("fresh", "n1", "ingress", "new"),
            Code::InvalidArgument,
            "network: ingress is not attachable",
        ),
        (attach("fresh", "n9", "front", "new"), Code::NotFound, "node n9 not found"),
        (attach("taken", "n1", "front", "new"), Code::AlreadyExists, "id taken already exists"),
        (
            attach("fresh", "n1", "front", "WEB"),
            Code::AlreadyExists,
            "name: a service on network front is called WEB",
        ),
        (
            attach("fresh", "n2", "front", "Db"),
            Code::AlreadyExists,
            "name: another attachment on network front",
        ),
        (attach("fresh", "n1", "front", "-"), Code::InvalidArgument, "name: name must be valid"),
        (
            with(fresh(), |spec| spec.aliases = vec!["a..b".to_owned()]),
            Code::InvalidArgument,
            "alias: name must be",
        ),
        (
            with(fresh(), |spec| spec.aliases = vec!["a".to_owned(), "A".to_owned()]),
            Code::InvalidArgument,
            "alias: A is given twice",
        ),
        (
            with(fresh(), |spec| spec.aliases = (0..33).map(|at| format!("a{at}")).collect()),
            Code::InvalidArgument,
            "alias: 33 are more",
        ),
        (
            with(fresh(), |spec| spec.addr = Some(Ipv4Addr::new(10, 9, 9, 9))),
            Code::InvalidArgument,
            "ip: 10.9.9.9 is not in network front, which has 192.0.2.0/28",
        ),
        (
            with(fresh(), at(9)),
            Code::InvalidArgument,
            "ip: network front gives out 192.0.2.1 to 192.0.2.7, and 192.0.2.9",
        ),
        (with(fresh(), at(0)), Code::InvalidArgument, "ip: network front gives out"),
        (with(fresh(), at(1)), Code::InvalidArgument, "ip: 192.0.2.1 is network front's gateway"),
        (with(fresh(), at(3)), Code::InvalidArgument, "set aside"),
        (with(fresh(), at(4)), Code::AlreadyExists, "ip: 192.0.2.4 is another's"),
    ];
    for (action, code, part) in cases {
        let refusal = world.try_to(action).unwrap_err();
        assert!(refusal.to_string().contains(part), "{refusal}");
        assert_eq!(refusal.code(), code, "{refusal}");
    }
    // On another network, names are free.
    world.must(attach("b1", "n1", "other", "db"));
    world.must(attach("b2", "n1", "other", "web"));
    let mut web = service("b2", 0);
    web.name = "db".to_owned();
    web.task.networks.push(attachment("net-other"));
    let refusal = world.try_to(Action::CreateService { id: "s".into(), spec: Box::new(web) }).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "ServiceSpec.Name: an attachment on network other is called db: choose another name"
    );
}

#[test]
fn an_address_is_given_again_once_every_node_has_forgotten_it() {
    let mut world = world();
    world.must(with(attach("a1", "n1", "front", "db"), at(5)));
    let ended = task(&world, "a1");
    world.report(&ended, TaskState::Complete);
    let again = with(attach("a2", "n1", "front", "db"), at(5));
    let refusal = world.try_to(again.clone()).unwrap_err();
    assert!(
        refusal.to_string().contains("ip: 192.0.2.5 was another's in network front a moment ago"),
        "{refusal}"
    );
    assert!(world.acknowledge());
    world.must(again);
    world.check_invariants();
    // 2, 4, 6 and 7 are left; then there is none.
    for number in 0..4 {
        world.must(attach(&format!("more{number}"), "n2", "front", &format!("more{number}")));
    }
    let refusal = world.try_to(attach("last", "n2", "front", "last")).unwrap_err();
    assert!(refusal.to_string().contains("network front has no free address"), "{refusal}");
    assert_eq!(refusal.code(), Code::AlreadyExists);
}
