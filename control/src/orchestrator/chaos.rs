//! Random histories of operators, nodes and failures; after each the cluster heals, and then every service has what it
//! asks for, and removing them all leaves nothing.

use mesh_api::id::ServiceId;
use mesh_api::table::{NodeState, TaskState};
use proptest::prelude::*;

use super::tests::{COMPLETES, FAILS, SECOND};
use crate::command::Action;
use crate::model::labels::SLOW_START;
use crate::model::{Availability, FailureAction, Mode, RestartCondition, UpdateOrder, UpdateState, WARM};
use crate::testing::{World, attachment, ingress_port, service};

const NODES: [&str; 4] = ["n0", "n1", "n2", "n3"];
const SERVICES: u64 = 4;

/// What happens next.
#[derive(Debug, Clone)]
enum Event {
    Create { name: u64, replicas: u64, global: bool, knobs: u8 },
    Scale { name: u64, replicas: u64 },
    Image { name: u64, image: usize, knobs: u8 },
    Remove { name: u64 },
    Node { at: usize, state: NodeState },
    Availability { at: usize, availability: Availability },
    Kill { at: usize },
    Orchestrate,
    Nodes,
    Wait { seconds: u64 },
    Constrain { name: u64, at: usize },
    History { limit: u64 },
}

fn event() -> impl Strategy<Value = Event> {
    let name = 0..SERVICES;
    let states = prop_oneof![Just(NodeState::Ready), Just(NodeState::Down), Just(NodeState::Unknown)];
    let availabilities =
        prop_oneof![Just(Availability::Active), Just(Availability::Pause), Just(Availability::Drain)];
    prop_oneof![
        3 => (name.clone(), 0..7_u64, any::<bool>(), any::<u8>())
            .prop_map(|(name, replicas, global, knobs)| Event::Create { name, replicas, global, knobs }),
        2 => (name.clone(), 0..7_u64).prop_map(|(name, replicas)| Event::Scale { name, replicas }),
        2 => (name.clone(), 0..4_usize, any::<u8>()).prop_map(|(name, image, knobs)| Event::Image { name, image, knobs }),
        1 => name.clone().prop_map(|name| Event::Remove { name }),
        1 => (name, 0..=NODES.len()).prop_map(|(name, at)| Event::Constrain { name, at }),
        1 => (0..3_u64).prop_map(|limit| Event::History { limit }),
        2 => (0..NODES.len(), states).prop_map(|(at, state)| Event::Node { at, state }),
        1 => (0..NODES.len(), availabilities).prop_map(|(at, availability)| Event::Availability { at, availability }),
        3 => any::<usize>().prop_map(|at| Event::Kill { at }),
        6 => Just(Event::Orchestrate),
        4 => Just(Event::Nodes),
        2 => (0..20_u64).prop_map(|seconds| Event::Wait { seconds }),
    ]
}

fn id(name: u64) -> ServiceId {
    ServiceId::from(format!("svc-s{name}"))
}

fn knobs(spec: &mut crate::model::ServiceSpec, knobs: u8) {
    let bit = |at: u8| knobs & (1 << at) != 0;
    spec.update.parallelism = u64::from(knobs & 3);
    spec.update.order = if bit(2) { UpdateOrder::StartFirst } else { UpdateOrder::StopFirst };
    spec.update.failure_action = match knobs >> 3 & 3 {
        0 => FailureAction::Pause,
        1 => FailureAction::Continue,
        _ => FailureAction::Rollback,
    };
    spec.task.restart.condition = match knobs >> 5 & 3 {
        0 => RestartCondition::None,
        1 => RestartCondition::OnFailure,
        _ => RestartCondition::Any,
    };
    spec.task.restart.max_attempts = if bit(7) { 2 } else { 0 };
    spec.labels.clear();
    if bit(1) {
        spec.labels.insert(SLOW_START.to_owned(), "7s".to_owned());
    }
}

fn happen(world: &mut World, event: &Event) {
    match *event {
        Event::Create { name, replicas, global, knobs: bits } => {
            let mut spec = service(&format!("s{name}"), replicas);
            knobs(&mut spec, bits);
            if global {
                spec.mode = Mode::Global;
            }
            spec.endpoint.ports.push(ingress_port(0, 80));
            if bits & 1 != 0 {
                spec.task.networks.push(attachment("net-app"));
            }
            // Refused where the name is taken.
            let _ = world.try_to(Action::CreateService { id: id(name), spec: Box::new(spec) });
        }
        Event::Scale { name, replicas } => {
            if world.state.services.get(&id(name)).is_some_and(|service| service.replicas().is_some()) {
                world.update_service(&id(name), |spec| spec.mode = Mode::Replicated { replicas });
            }
        }
        Event::Image { name, image, knobs: bits } => {
            if world.state.services.contains_key(&id(name)) {
                world.update_service(&id(name), |spec| {
                    spec.task.container.image = ["v1", "v2", FAILS, COMPLETES][image].into();
                    knobs(spec, bits);
                });
            }
        }
        Event::Remove { name } => drop(world.try_to(Action::RemoveService { id: id(name) })),
        Event::Node { at, state } => world.set_node_state(NODES[at], state),
        Event::Availability { at, availability } => world.set_availability(NODES[at], availability),
        Event::Kill { at } => {
            let running = world.state.tasks.values().filter(|task| task.status.state == TaskState::Running);
            let running: Vec<_> = running.cloned().collect();
            if !running.is_empty() {
                world.report(&running[at % running.len()], TaskState::Failed);
            }
        }
        Event::Orchestrate => drop(world.orchestrate()),
        Event::Nodes => drop(world.run_nodes()),
        Event::Wait { seconds } => world.run_for(seconds * SECOND),
        Event::Constrain { name, at } => {
            if world.state.services.contains_key(&id(name)) {
                let constraints = NODES.get(at).map(|node| format!("node.hostname!={node}"));
                world.update_service(&id(name), |spec| {
                    spec.task.placement.constraints = constraints.into_iter().collect();
                });
            }
        }
        Event::History { limit } => world.update_cluster(|spec| spec.task_history = limit),
    }
}

/// All nodes are back, and every service gets a specification that works.
fn heal(world: &mut World) {
    for node in NODES {
        world.set_node_state(node, NodeState::Ready);
        world.set_availability(node, Availability::Active);
    }
    let services: Vec<ServiceId> = world.state.services.keys().cloned().collect();
    for id in services {
        world.update_service(&id, |spec| {
            spec.task.container.image = "good".into();
            spec.task.restart = crate::model::RestartPolicy::default();
            spec.task.placement.constraints.clear();
            spec.update.parallelism = 2;
        });
    }
    world.run_for(300 * SECOND);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_happened_the_cluster_heals(events in proptest::collection::vec(event(), 1..60)) {
        let mut world = World::new(&NODES);
        world.create_network("app");
        for event in &events {
            happen(&mut world, event);
            world.check_invariants();
            world.now_ns += SECOND / 10;
        }
        heal(&mut world);
        for service in world.state.services.values() {
            let running = world.running(&service.id);
            let expected = service.replicas().unwrap_or(NODES.len() as u64);
            prop_assert_eq!(running.len() as u64, expected, "{}", service.spec.name);
            prop_assert!(running.iter().all(|task| task.template.container.image == "good"));
            prop_assert!(running.iter().all(|task| task.warmth == WARM));
            let live = world.state.tasks_of_service(&service.id).filter(|task| !task.has_ended()).count();
            prop_assert_eq!(live as u64, expected, "nothing else is left running");
            let state = world.update_state(&service.id);
            prop_assert!(matches!(state, None | Some(UpdateState::Completed)), "{:?}", state);
        }
        let services: Vec<ServiceId> = world.state.services.keys().cloned().collect();
        for id in services {
            world.must(Action::RemoveService { id });
        }
        world.settle();
        prop_assert!(world.state.tasks.is_empty());
        prop_assert!(world.state.lookup.addresses.is_empty());
    }
}
