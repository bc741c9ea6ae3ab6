//! What `apply` accepts, refuses and gives out; and, over random commands, what holds in every state.

mod attachment;
mod encryption;
mod readmission;
mod token;

use std::net::Ipv4Addr;

use mesh_api::id::{NetworkId, NodeId, ServiceId, TaskId};
use mesh_api::session::{AttachmentSpec, NodeDescription};
use mesh_api::table::{EndpointMode, NodeState, Protocol, PublishMode, Role, TaskState};
use mesh_api::tls::KeyId;
use proptest::prelude::*;

use super::apply;
use crate::command::{Action, Command, Genesis, Step};
use crate::model::cluster::DEFAULT_CERT_EXPIRY_NS;
use crate::model::{
    Ipam6Config, IpamConfig, Lookup, Mode, NetworkSpec, NodeSpec, PortConfig, State, UpdateState,
};
use crate::refusal::{Code, Refusal};
use crate::testing::{World, attachment, description, ingress_port, network, service};

fn addr(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

#[test]
fn a_cluster_begins_with_the_ingress_network() {
    let mut world = World::new(&[]);
    let ingress = world.state.ingress().unwrap();
    assert_eq!((ingress.vni, ingress.subnets[0].cidr.to_string().as_str()), (4096, "10.0.0.0/24"));
    assert_eq!(ingress.subnets[0].gateway, addr("10.0.0.1"));
    world.create_network("app");
    let app = world.state.network_by_name("app").unwrap();
    assert_eq!((app.vni, app.subnets[0].cidr.to_string().as_str()), (4097, "10.0.1.0/24"));
    let again = Action::Initialize(Box::new(crate::testing::genesis()));
    assert_eq!(world.try_to(again).unwrap_err(), Refusal::NotInitialized);
}

#[test]
fn a_taken_port_is_refused_with_dockers_words() {
    let mut world = World::new(&[]);
    let mut web = service("web", 1);
    web.endpoint.ports.push(ingress_port(8080, 80));
    let id = world.create_service(web.clone());
    web.name = "other".into();
    let create = |spec| Action::CreateService { id: "x".into(), spec: Box::new(spec) };
    let refusal = world.try_to(create(web.clone())).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        format!("port '8080' is already in use by service 'web' ({id}) as an ingress port")
    );
    assert_eq!(refusal.code(), Code::InvalidArgument);
    web.endpoint.ports[0].protocol = Protocol::Udp;
    world.must(create(web.clone()));
    for (port, protocol) in [(2377, Protocol::Tcp), (4789, Protocol::Udp)] {
        let mut spec = service("reserved", 1);
        spec.endpoint.ports.push(ingress_port(port, 80));
        spec.endpoint.ports[0].protocol = protocol;
        let refusal =
            world.try_to(Action::CreateService { id: "y".into(), spec: Box::new(spec) }).unwrap_err();
        assert!(matches!(refusal, Refusal::PortReserved { .. }), "{refusal}");
    }
}

#[test]
fn host_ports_are_shared_between_services_but_not_with_the_mesh() {
    let mut world = World::new(&[]);
    let mut host = service("a", 1);
    host.endpoint.ports.push(ingress_port(9000, 80));
    host.endpoint.ports[0].mode = PublishMode::Host;
    world.create_service(host.clone());
    host.name = "b".into();
    world.create_service(host.clone());
    host.name = "c".into();
    host.endpoint.ports[0].mode = PublishMode::Ingress;
    let refusal = world.try_to(Action::CreateService { id: "c".into(), spec: Box::new(host) }).unwrap_err();
    assert!(matches!(refusal, Refusal::PortInUse { host: true, .. }), "{refusal}");
}

#[test]
fn automatic_ports_stay_over_updates() {
    let mut world = World::new(&[]);
    let mut web = service("web", 1);
    web.endpoint.ports.push(ingress_port(0, 80));
    web.endpoint.ports.push(ingress_port(30000, 81));
    let id = world.create_service(web);
    let published = |world: &World| world.state.services[&id].endpoint.ports[0].published;
    assert_eq!(published(&world), 30001);
    world.update_service(&id, |spec| spec.endpoint.ports.truncate(1));
    assert_eq!(published(&world), 30001);
}

/// Makes a specification wrong.
type Change = Box<dyn Fn(&mut crate::model::ServiceSpec)>;

#[test]
fn an_automatic_port_is_never_the_overlays_own() {
    let genesis = Genesis { data_path_port: 30000, ..crate::testing::genesis() };
    let command = Command { at_ns: 1, action: Action::Initialize(Box::new(genesis)) };
    let (state, _) = apply(&State::empty(), 1, &command).unwrap();
    let mut dns = service("dns", 1);
    dns.endpoint.ports.push(PortConfig { protocol: Protocol::Udp, ..ingress_port(0, 53) });
    let action = Action::CreateService { id: "dns".into(), spec: Box::new(dns) };
    let (state, _) = apply(&state, 2, &Command { at_ns: 2, action }).unwrap();
    assert_eq!(state.services[&ServiceId::from("dns")].endpoint.ports[0].published, 30001);
}

#[test]
fn wrong_specifications_are_refused_by_field() {
    let mut world = World::new(&[]);
    world.create_network("app");
    let cases: Vec<(&str, Change)> = vec![
        (
            "ServiceSpec.Name: name must be valid as a DNS name component",
            Box::new(|spec| spec.name = "-x".into()),
        ),
        (
            "ContainerSpec: image reference must be provided",
            Box::new(|spec| spec.task.container.image.clear()),
        ),
        ("network nowhere not found", Box::new(|spec| spec.task.networks.push(attachment("nowhere")))),
        (
            "Service cannot be explicitly attached to the ingress network \"ingress\"",
            Box::new(|spec| spec.task.networks.push(attachment("ingress-id"))),
        ),
        (
            "TaskTemplate.Networks: network app is listed twice",
            Box::new(|spec| spec.task.networks = vec![attachment("net-app"), attachment("net-app")]),
        ),
        (
            "EndpointSpec: duplicate published ports provided",
            Box::new(|spec| spec.endpoint.ports = vec![ingress_port(80, 80), ingress_port(80, 81)]),
        ),
        (
            "EndpointSpec: port published with ingress mode can't be used with dnsrr mode",
            Box::new(|spec| {
                spec.endpoint.mode = EndpointMode::Dnsrr;
                spec.endpoint.ports = vec![ingress_port(80, 80)];
            }),
        ),
        (
            "Placement.Constraints: constraint expected one operator from ==, !=",
            Box::new(|spec| spec.task.placement.constraints.push("node.role".into())),
        ),
    ];
    for (text, change) in cases {
        let mut spec = service("web", 1);
        change(&mut spec);
        let refusal =
            world.try_to(Action::CreateService { id: "s".into(), spec: Box::new(spec) }).unwrap_err();
        assert_eq!(refusal.to_string(), text);
    }
}

#[test]
fn updates_must_name_the_current_version() {
    let mut world = World::new(&["n1"]);
    let id = world.create_service(service("web", 1));
    let spec = Box::new(service("web", 2));
    let update = |version| Action::UpdateService { id: id.clone(), version, spec: spec.clone() };
    assert_eq!(world.try_to(update(1)).unwrap_err(), Refusal::OutOfSequence);
    let version = world.state.services[&id].meta.version;
    world.must(update(version));
    assert_eq!(world.try_to(update(version)).unwrap_err(), Refusal::OutOfSequence);
    let renamed = Action::UpdateService {
        id: id.clone(),
        version: world.state.services[&id].meta.version,
        spec: Box::new(service("other", 2)),
    };
    assert_eq!(world.try_to(renamed).unwrap_err(), Refusal::Rename);
    let rollback = |world: &World| Action::RollbackService {
        id: id.clone(),
        version: world.state.services[&id].meta.version,
    };
    world.must(rollback(&world));
    let service = &world.state.services[&id];
    assert_eq!(service.replicas(), Some(1));
    assert_eq!(service.update_status.as_ref().unwrap().state, UpdateState::RollbackStarted);
    world.must(rollback(&world));
    assert_eq!(world.state.services[&id].replicas(), Some(2), "a second rollback undoes the first");
}

#[test]
fn networks_in_use_stay_until_their_tasks_are_only_left_to_end() {
    let mut world = World::new(&["n1"]);
    let app = world.create_network("app");
    let mut web = service("web", 1);
    web.task.networks.push(attachment("net-app"));
    let id = world.create_service(web);
    let remove = Action::RemoveNetwork { id: app.clone() };
    let refusal = world.try_to(remove.clone()).unwrap_err();
    assert_eq!(refusal.to_string(), format!("network {app} is in use by service {id}"));
    while world.orchestrate().0 {}
    world.must(Action::RemoveService { id });
    let task = world.state.tasks.values().next().unwrap().clone();
    assert!(!task.has_ended());
    world.must(remove);
    world.report(&task, TaskState::Shutdown);
}

#[test]
fn the_ingress_network_is_replaced_when_no_service_needs_it() {
    let mut world = World::new(&["n1"]);
    world.create_network("app");
    let mut web = service("web", 1);
    web.task.networks.push(attachment("net-app"));
    web.endpoint.ports.push(ingress_port(8080, 80));
    let id = world.create_service(web.clone());
    let plain = world.create_service(service("plain", 1));
    let remove = |id: &str| Action::RemoveNetwork { id: id.into() };
    for (needing, rid) in [(plain.clone(), true), (id.clone(), false)] {
        let refusal = world.try_to(remove("ingress-id")).unwrap_err();
        assert_eq!(refusal, Refusal::IngressNeeded(needing.clone()));
        let text = format!("ingress network cannot be removed because service {needing} depends on it");
        assert!(refusal.to_string().starts_with(&text), "{refusal}");
        if rid {
            world.must(Action::RemoveService { id: needing });
        } else {
            world.update_service(&needing, |spec| spec.endpoint.ports.clear());
        }
    }
    world.must(remove("ingress-id"));
    assert!(world.state.ingress().is_none() && world.state.services[&id].endpoint.vips.len() == 1);

    for needing in [service("plain", 1), web] {
        let create = Action::CreateService { id: "x".into(), spec: Box::new(needing) };
        let refusal = world.try_to(create).unwrap_err();
        assert!(matches!(refusal, Refusal::NameTaken { .. } | Refusal::NoIngress), "{refusal}");
    }
    let version = world.state.services[&id].meta.version;
    let rollback = Action::RollbackService { id: id.clone(), version };
    assert_eq!(world.try_to(rollback).unwrap_err(), Refusal::NoIngress);

    let mut spec = network("mesh");
    spec.ingress = true;
    spec.ipam.push(IpamConfig { subnet: Some("10.11.0.0/16".parse().unwrap()), ..Default::default() });
    for (wrong, text) in [
        (
            NetworkSpec { attachable: true, ..spec.clone() },
            "Attachable: ingress network cannot be attachable",
        ),
        (NetworkSpec { internal: true, ..spec.clone() }, "Internal: the ingress network is tasks' way out"),
    ] {
        let refusal = world.try_to(Action::CreateNetwork { id: "mesh".into(), spec: wrong }).unwrap_err();
        assert!(refusal.to_string().starts_with(text), "{refusal}");
    }
    let create = |id: &str, spec: &NetworkSpec| Action::CreateNetwork { id: id.into(), spec: spec.clone() };
    world.must(create("mesh", &spec));
    let second = NetworkSpec { name: "mesh2".into(), ipam: Vec::new(), ..spec };
    assert_eq!(world.try_to(create("mesh2", &second)).unwrap_err(), Refusal::IngressExists("mesh".into()));
    world.update_service(&id, |spec| spec.endpoint.ports.push(ingress_port(8080, 80)));
    let vip = &world.state.services[&id].endpoint.vips[0];
    assert_eq!((vip.network.as_str(), vip.addr), ("mesh", Some(addr("10.11.0.2"))));
    assert_eq!(
        world.state.ingress().unwrap().vni,
        4098,
        "a network that is gone doesn't give its VNI away at once"
    );
    world.check_invariants();
}

#[test]
fn subnets_asked_for_are_checked_and_automatic_ones_go_around_them() {
    let mut world = World::new(&[]);
    let create = |world: &mut World, name: &str, subnet: &str| {
        let mut spec = network(name);
        spec.ipam.push(IpamConfig { subnet: Some(subnet.parse().unwrap()), ..Default::default() });
        world.try_to(Action::CreateNetwork { id: name.into(), spec })
    };
    create(&mut world, "a", "10.0.1.128/25").unwrap();
    assert_eq!(create(&mut world, "b", "10.0.0.0/16").unwrap_err().code(), Code::InvalidArgument);
    for reserved in ["127.0.0.0/24", "169.254.64.0/24", "239.0.0.0/16", "192.0.2.0/31"] {
        assert!(matches!(create(&mut world, "c", reserved), Err(Refusal::Invalid { .. })), "{reserved}");
    }
    let id = world.create_network("auto");
    assert_eq!(world.state.networks[&id].subnets[0].cidr.to_string(), "10.0.2.0/24");
    assert_eq!(
        world
            .try_to(Action::CreateNetwork { id: "again".into(), spec: network("auto") })
            .unwrap_err()
            .to_string(),
        "name conflicts with an existing object: network auto already exists"
    );
}

#[test]
fn a_nodes_report_counts_for_its_own_tasks_and_only_forward() {
    let mut world = World::new(&["n1", "n2"]);
    world.create_service(service("web", 1));
    while world.orchestrate().0 {}
    let task = world.state.tasks.values().next().unwrap().clone();
    let state = |world: &World| world.state.tasks[&task.id].status.state;
    let mut stranger = crate::model::Task::clone(&task);
    stranger.node =
        Some(if task.node.as_ref().unwrap().as_str() == "n1" { "n2".into() } else { "n1".into() });
    world.report(&stranger, TaskState::Running);
    assert_eq!(state(&world), TaskState::Assigned);
    world.report(&task, TaskState::Running);
    world.report(&task, TaskState::Starting);
    assert_eq!(state(&world), TaskState::Running);
    for impossible in [TaskState::Remove, TaskState::Orphaned] {
        world.report(&task, impossible);
        assert_eq!(state(&world), TaskState::Running);
    }
    world.report(&task, TaskState::Failed);
    world.report(&task, TaskState::Rejected);
    assert_eq!(state(&world), TaskState::Failed);
}

#[test]
fn managers_and_live_nodes_are_not_removed_by_accident() {
    let mut world = World::new(&["n1"]);
    let manager = Action::AddNode {
        id: "m".into(),
        role: Role::Manager,
        description: crate::testing::description("m"),
        issuer: KeyId::default(),
        token: None,
    };
    world.must(manager.clone());
    let Action::AddNode { role, description, issuer, .. } = manager else { unreachable!() };
    let remove = |id: &str, force| Action::RemoveNode { id: id.into(), force };
    assert_eq!(world.try_to(remove("m", true)).unwrap_err(), Refusal::NodeIsManager("m".into()));
    assert_eq!(world.try_to(remove("n1", false)).unwrap_err(), Refusal::NodeNotDown("n1".into()));
    let node = world.node("m").clone();
    let spec = NodeSpec { role: Role::Worker, ..node.spec.clone() };
    let demote = Action::UpdateNode { id: "m".into(), version: node.spec_version, spec };
    assert_eq!(world.try_to(demote.clone()).unwrap_err(), Refusal::LastManager);
    world.must(remove("n1", true));
    assert_eq!(world.try_to(remove("n1", true)).unwrap_err(), Refusal::NodeNotFound("n1".into()));
    world.must(Action::AddNode { id: "m2".into(), role, description, issuer, token: None });
    world.must(demote);
    world.must(remove("m", true));
    let removed = |world: &World| -> Vec<NodeId> {
        world.state.cluster.as_ref().unwrap().removed.keys().cloned().collect()
    };
    assert_eq!(removed(&world), ["m".into(), "n1".into()]);
    // Certificates that they may still have are valid no longer than that.
    world.now_ns += DEFAULT_CERT_EXPIRY_NS + 1;
    world.add_node("n2");
    world.must(remove("n2", true));
    assert_eq!(removed(&world), ["n2".into()]);
}

#[test]
fn steps_without_ground_are_skipped() {
    let mut world = World::new(&["n1"]);
    let steps = vec![
        Step::SetDesired { task: "none".into(), desired: TaskState::Remove },
        Step::Assign { task: "none".into(), node: "n1".into() },
        Step::DeleteTask { task: "none".into() },
        Step::RollBack { service: "none".into(), spec_version: 1, message: String::new() },
        Step::CreateTask {
            id: "t".into(),
            service: "none".into(),
            spec_version: 1,
            slot: 1,
            node: None,
            desired: TaskState::Running,
            start_at_ns: 0,
            start_after: None,
            restarts_ns: Vec::new(),
        },
    ];
    world.must(Action::Orchestrate { steps });
    assert!(world.state.tasks.is_empty());
}

#[test]
fn nodes_exchange_data_over_one_address_family() {
    let mut world = World::new(&["n1"]);
    let describe = |vtep: &str| {
        let (addr, vtep) = ("fd00::9".parse().unwrap(), vtep.parse().unwrap());
        NodeDescription { addr, vtep, ..description("n2") }
    };
    let add = |vtep: &str| {
        let (id, role, issuer) = ("n2".into(), Role::Worker, KeyId::default());
        Action::AddNode { id, role, description: describe(vtep), issuer, token: None }
    };
    let refusal = world.try_to(add("fd00::9")).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "data path address: fd00::9 is IPv6, and the cluster's nodes (n1 at 192.0.2.131) exchange data over IPv4: name an \
         IPv4 address of this host with --data-path-addr"
    );
    assert_eq!(refusal.code(), Code::InvalidArgument);
    world.must(add("192.0.2.9"));
    let back = |id: &str, description| Action::SetNodeStatus {
        id: id.into(),
        state: NodeState::Ready,
        message: String::new(),
        description: Some(description),
    };
    assert!(world.try_to(back("n2", describe("fd00::9"))).is_err(), "nor does it come back with another");
    world.must(Action::RemoveNode { id: "n1".into(), force: true });
    world.must(back("n2", describe("fd00::9")));
    for unreachable in ["fe80::1", "::1", "::", "ff02::1", "::ffff:192.0.2.1", "255.255.255.255", "127.0.0.1"]
    {
        let refusal = world.try_to(back("n2", describe(unreachable))).unwrap_err().to_string();
        assert!(refusal.contains("is not an address that other nodes can reach"), "{unreachable}: {refusal}");
    }
}

#[test]
fn labels_of_shoals_own_are_checked_on_services_nodes_and_the_cluster() {
    let mut world = World::new(&["n1"]);
    let mut web = service("web", 1);
    web.labels.insert("shoal.return".into(), "dirct".into());
    let create = |spec: &crate::model::ServiceSpec| Action::CreateService {
        id: "web".into(),
        spec: Box::new(spec.clone()),
    };
    let refusal = world.try_to(create(&web)).unwrap_err();
    assert_eq!(refusal.to_string(), "Labels: label shoal.return holds 'dirct': expected direct or tunnel");
    assert_eq!(refusal.code(), Code::InvalidArgument);
    web.labels.insert("shoal.return".into(), "direct".into());
    world.must(create(&web));
    web.labels.insert("shoal.afinity".into(), "client-ip".into());
    let version = world.state.services[&ServiceId::from("web")].meta.version;
    let update = Action::UpdateService { id: "web".into(), version, spec: Box::new(web) };
    assert!(world.try_to(update).unwrap_err().to_string().contains("shoal.afinity"));

    let node = world.node("n1").clone();
    let mut spec = node.spec.clone();
    spec.labels.insert("shoal.weight".into(), "0".into());
    let update = Action::UpdateNode { id: "n1".into(), version: node.spec_version, spec };
    assert!(world.try_to(update).unwrap_err().to_string().contains("from 1 to 100"));

    let cluster = world.state.cluster.clone().unwrap();
    let mut spec = cluster.spec.clone();
    spec.labels.insert("shoal.weight".into(), "1".into());
    let version = cluster.meta.version;
    let update = Action::UpdateCluster {
        version,
        spec: spec.clone(),
        worker_secret: None,
        manager_secret: None,
        rotation: None,
        unlock_key: None,
    };
    assert!(world.try_to(update).unwrap_err().to_string().contains("it belongs to a node"));
    let genesis = Genesis { spec, ..crate::testing::genesis() };
    let command = Command { at_ns: 1, action: Action::Initialize(Box::new(genesis)) };
    assert!(apply(&State::empty(), 1, &command).unwrap_err().to_string().starts_with("Spec.Labels: "));
}

/// What the random history below does next.
#[derive(Debug, Clone)]
enum Deed {
    CreateNetwork { name: u8, small: bool, ipv6: u8 },
    RemoveNetwork(u8),
    CreateService { name: u8, networks: u8, port: u16, replicas: u8, global: bool, dnsrr: bool },
    UpdateService { name: u8, networks: u8, port: u16, replicas: u8, image: u8 },
    Rollback(u8),
    RemoveService(u8),
    Node(u8, u8),
    Orchestrate(u8),
    Report(u16, u8),
    Acknowledge(u8),
    Ingress(bool),
    Attach { name: u8, network: u8, node: u8, last: u8 },
}

fn deed() -> impl Strategy<Value = Deed> {
    let port = prop_oneof![Just(0_u16), 8080_u16..8084];
    prop_oneof![
        1 => (0..4_u8, any::<bool>(), 0..4_u8)
            .prop_map(|(name, small, ipv6)| Deed::CreateNetwork { name, small, ipv6 }),
        1 => (0..4_u8).prop_map(Deed::RemoveNetwork),
        1 => (0..5_u8, 0..16_u8, port.clone(), 0..7_u8, any::<bool>(), any::<bool>()).prop_map(
            |(name, networks, port, replicas, global, dnsrr)| Deed::CreateService {
                name,
                networks,
                port,
                replicas,
                global,
                dnsrr
            }
        ),
        1 => (0..5_u8, 0..16_u8, port, 0..7_u8, 0..3_u8).prop_map(|(name, networks, port, replicas, image)| {
            Deed::UpdateService { name, networks, port, replicas, image }
        }),
        1 => (0..5_u8).prop_map(Deed::Rollback),
        1 => (0..5_u8).prop_map(Deed::RemoveService),
        1 => (0..3_u8, 0..4_u8).prop_map(|(node, what)| Deed::Node(node, what)),
        6 => (0..3_u8).prop_map(Deed::Orchestrate),
        6 => (any::<u16>(), any::<u8>()).prop_map(|(task, state)| Deed::Report(task, state)),
        2 => (0..10_u8).prop_map(Deed::Acknowledge),
        1 => any::<bool>().prop_map(Deed::Ingress),
        2 => (0..4_u8, 0..4_u8, 0..3_u8, 0..9_u8)
            .prop_map(|(name, network, node, last)| Deed::Attach { name, network, node, last }),
    ]
}

fn fill(spec: &mut crate::model::ServiceSpec, networks: u8, port: u16) {
    let all = ["n0", "n1", "n2", "n3"];
    let chosen = all.iter().enumerate().filter(|(at, _)| networks & (1 << at) != 0);
    spec.task.networks = chosen.map(|(_, name)| attachment(name)).collect();
    spec.endpoint.ports = if port == 8083 { Vec::new() } else { vec![ingress_port(port, 80)] };
}

fn act(world: &mut World, deed: &Deed) {
    world.now_ns += 1_000_000_000;
    let service_id = |name: u8| format!("s{name}").as_str().into();
    let version = |world: &World, name: u8| {
        world
            .state
            .services
            .get(&mesh_api::id::ServiceId::from(format!("s{name}")))
            .map_or(0, |service| service.meta.version)
    };
    let action = match *deed {
        Deed::CreateNetwork { name, small, ipv6 } => {
            let id = NetworkId::from(format!("n{name}"));
            // Ids are never used twice; here one is, once nothing remembers its former owner.
            if !world.state.networks.contains_key(&id) && world.state.lookup.is_network_used(&id) {
                return;
            }
            let mut spec = network(&format!("n{name}"));
            spec.attachable = name % 2 == 0;
            let subnets6 = [None, Some(64), Some(31)];
            spec.ipam6 = usize::from(ipv6).checked_sub(1).map(|at| {
                let subnet = subnets6[at].map(|length| format!("fd00:{name}::/{length}").parse().unwrap());
                Ipam6Config { subnet, ..Default::default() }
            });
            if small {
                let subnet = Some(format!("192.168.{name}.0/29").parse().unwrap());
                spec.ipam.push(IpamConfig { subnet, ..Default::default() });
            }
            Action::CreateNetwork { id, spec }
        }
        Deed::RemoveNetwork(name) => Action::RemoveNetwork { id: format!("n{name}").as_str().into() },
        Deed::CreateService { name, networks, port, replicas, global, dnsrr } => {
            let mut spec = service(&format!("s{name}"), replicas.into());
            fill(&mut spec, networks, port);
            if global {
                spec.mode = Mode::Global;
            }
            if dnsrr {
                spec.endpoint.mode = EndpointMode::Dnsrr;
            }
            Action::CreateService { id: service_id(name), spec: Box::new(spec) }
        }
        Deed::UpdateService { name, networks, port, replicas, image } => {
            let mut spec = service(&format!("s{name}"), replicas.into());
            spec.task.container.image = format!("image{image}");
            fill(&mut spec, networks, port);
            Action::UpdateService {
                id: service_id(name),
                version: version(world, name),
                spec: Box::new(spec),
            }
        }
        Deed::Rollback(name) => {
            Action::RollbackService { id: service_id(name), version: version(world, name) }
        }
        Deed::RemoveService(name) => Action::RemoveService { id: service_id(name) },
        Deed::Node(node, what) => {
            let id = mesh_api::id::NodeId::from(format!("node{node}"));
            match what {
                0 => Action::RemoveNode { id, force: true },
                1 | 2 => Action::SetNodeStatus {
                    id,
                    state: if what == 1 { NodeState::Down } else { NodeState::Ready },
                    message: String::new(),
                    description: None,
                },
                _ => Action::AddNode {
                    description: crate::testing::description(id.as_str()),
                    id,
                    role: Role::Worker,
                    issuer: KeyId::default(),
                    token: None,
                },
            }
        }
        Deed::Acknowledge(ago) => Action::Acknowledge { index: world.state.index.saturating_sub(ago.into()) },
        Deed::Ingress(true) => {
            let id = format!("ingress{}", world.state.index).as_str().into();
            Action::CreateNetwork { id, spec: NetworkSpec { ingress: true, ..network("mesh") } }
        }
        Deed::Ingress(false) => {
            let Some(ingress) = world.state.ingress() else { return };
            Action::RemoveNetwork { id: ingress.id.clone() }
        }
        Deed::Attach { name, network, node, last } => {
            let asked = Ipv4Addr::new(192, 168, network, last);
            let spec = AttachmentSpec {
                network: format!("n{network}"),
                name: format!("a{name}"),
                aliases: Vec::new(),
                addr: (last > 0).then_some(asked),
            };
            let id = TaskId::from(format!("a{:05}", world.state.index));
            Action::Attach { id, node: format!("node{node}").as_str().into(), spec }
        }
        Deed::Orchestrate(times) => {
            for _ in 0..=times {
                world.orchestrate();
            }
            return;
        }
        Deed::Report(at, state) => {
            let states = [
                TaskState::Running,
                TaskState::Running,
                TaskState::Shutdown,
                TaskState::Failed,
                TaskState::Starting,
            ];
            let placed: Vec<_> =
                world.state.tasks.values().filter(|task| task.node.is_some()).cloned().collect();
            if let Some(task) = placed.get(at as usize % placed.len().max(1)) {
                world.report(task, states[state as usize % states.len()]);
            }
            return;
        }
    };
    // Refusals are part of the game.
    let _ = world.try_to(action);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn invariants_hold_and_the_log_leads_to_the_same_state(deeds in proptest::collection::vec(deed(), 1..80)) {
        let mut world = World::new(&["node0", "node1"]);
        for deed in deeds {
            act(&mut world, &deed);
            world.check_invariants();
        }
        let mut replayed = State::empty();
        for command in &world.log {
            let stored = serde_json::to_vec(command).unwrap();
            let command: Command = serde_json::from_slice(&stored).unwrap();
            replayed = apply(&replayed, replayed.index + 1, &command).unwrap().0;
        }
        prop_assert_eq!(&replayed, &world.state);
        let mut snapshot: State = serde_json::from_slice(&serde_json::to_vec(&world.state).unwrap()).unwrap();
        snapshot.lookup = Lookup::of(&snapshot);
        prop_assert_eq!(&snapshot, &world.state);
    }
}
