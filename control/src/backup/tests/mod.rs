//! The format, what a restored state is, and what is on the disk.

mod disk;
mod fixture;
mod format;
mod revived;

use std::net::IpAddr;

use mesh_api::id::NodeId;
use mesh_api::session::{ManagerDescription, NodeDescription};
use mesh_api::table::{NodeState, Role, TaskState};

use crate::command::Action;
use crate::model::{IpamConfig, Mode, NetworkSpec, NodeSpec, Task};
use crate::testing::{World, attach, attachment, identity, ingress_port, network, service};

/// A swarm with every kind of object in it, and a history: n1 and n2 are managers, n3 and n4 workers, n5 was removed.
fn world() -> World {
    let mut world = World::new(&["n1", "n2", "n3", "n4", "n5"]);
    for (at, id) in [(1, "n1"), (2, "n2")] {
        let node = world.node(id).clone();
        let spec = NodeSpec { name: format!("the-{id}"), role: Role::Manager, ..node.spec };
        world.must(Action::UpdateNode { id: id.into(), version: node.spec_version, spec });
        let host = NodeDescription {
            labels: vec![("zone".to_owned(), "a".to_owned())],
            routes: vec!["172.16.0.0/16".parse().unwrap()],
            wireguard: vec![identity(at, 51820)],
            addresses: vec![node.description.addr],
            manager: Some(ManagerDescription { raft: at.into(), addr: manager_addr(node.description.addr) }),
            ..node.description
        };
        let (state, message) = (NodeState::Ready, String::new());
        world.must(Action::SetNodeStatus { id: id.into(), state, message, description: Some(host) });
    }
    world.label_node("n3", "disk", "ssd");
    world.rotate(std::time::SystemTime::now());
    world.must(Action::RotateKeys);
    let app = world.create_attachable_network("app");
    let options = [("encrypted".to_owned(), String::new())].into();
    let ipam = IpamConfig {
        subnet: Some("192.168.7.0/24".parse().unwrap()),
        range: Some("192.168.7.128/25".parse().unwrap()),
        gateway: Some("192.168.7.1".parse().unwrap()),
        aux: [("printer".to_owned(), "192.168.7.200".parse().unwrap())].into(),
    };
    let spec = NetworkSpec { ipam: vec![ipam], internal: true, options, ..network("vault") };
    world.must(Action::CreateNetwork { id: "net-vault".into(), spec });
    let config = IpamConfig { subnet: Some("192.168.8.0/24".parse().unwrap()), ..IpamConfig::default() };
    world.must(Action::AddSubnet { network: app.clone(), config });
    let mut web = service("web", 3);
    web.labels = [("shoal.slow-start".to_owned(), "10s".to_owned())].into();
    web.endpoint.ports = vec![ingress_port(8080, 80)];
    web.task.networks = vec![attachment("net-app")];
    let web = world.create_service(web);
    world.create_service(crate::model::ServiceSpec { mode: Mode::Global, ..service("agent", 0) });
    settle(&mut world);
    world.update_service(&web, |spec| spec.task.container.env = vec!["A=1".to_owned()]);
    settle(&mut world);
    let gone = world.create_service(service("gone", 2));
    settle(&mut world);
    world.must(Action::RemoveService { id: gone });
    settle(&mut world);
    let mut unplaceable = service("nowhere", 1);
    unplaceable.task.placement.constraints = vec!["node.labels.disk==tape".to_owned()];
    world.create_service(unplaceable);
    settle(&mut world);
    world.must(attach("attached", "n4", "app", "monitor"));
    world.set_node_state("n5", NodeState::Down);
    world.must(Action::RemoveNode { id: "n5".into(), force: false });
    world.check_invariants();
    world
}

fn manager_addr(ip: IpAddr) -> std::net::SocketAddr {
    (ip, 2377).into()
}

/// Orchestrates, and has the nodes do as they are told, until nothing happens any more at this time.
fn settle(world: &mut World) {
    for _ in 0..100 {
        let (is_busy, _) = world.orchestrate();
        let tasks: Vec<Task> = world.state.tasks.values().map(|task| Task::clone(task)).collect();
        let mut is_quiet = true;
        for task in
            tasks.iter().filter(|task| task.node.is_some() && !task.has_ended() && !task.is_attachment())
        {
            let next = match task.desired {
                TaskState::Running if task.status.state < TaskState::Running => TaskState::Running,
                desired if desired > TaskState::Running => TaskState::Shutdown,
                _ => continue,
            };
            world.report(task, next);
            is_quiet = false;
        }
        if !is_busy && is_quiet {
            return;
        }
        world.now_ns += 1_000_000_000;
    }
    panic!("it never settles");
}

/// A host with another address than those of the world's nodes.
fn host(name: &str) -> NodeDescription {
    let addr = IpAddr::from([198, 51, 100, 7]);
    NodeDescription { addr, vtep: addr, ..crate::testing::description(name) }
}

fn id(text: &str) -> NodeId {
    text.into()
}
